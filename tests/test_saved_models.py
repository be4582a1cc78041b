"""The committed models still solve their tasks."""

import pathlib
import runpy

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_memory.training import losses
from keras_memory.training import runs
from keras_memory.training import tasks
from keras_memory.training.config import MODELS

SAVED = pathlib.Path(__file__).parents[1] / "saved_models"


@pytest.fixture(scope="module")
def copier():
    return tf.saved_model.load(str(SAVED / "ntm_copy" / "1")).signatures


@pytest.mark.parametrize("name", ["ntm_copy", "dnc_copy"])
def test_configurations_can_be_read(name):
    """`keras-memory train --resume` and `compare` read them."""
    config = runs.read_config(SAVED / name)
    assert config.task == tasks.Copy()
    assert type(config.model) is MODELS[name.removesuffix("_copy")]


@pytest.mark.parametrize("length", [1, 5, 20, 80])
def test_ntm_copy_copies_every_length(copier, length):
    rng = np.random.default_rng(3)
    batch = tasks.Copy().sample(rng, 17, length=length)
    outputs = copier["serving_default"](inputs=tf.constant(batch.inputs))
    wrong = losses.wrong_bits_per_sequence(
        batch.targets, outputs["outputs"], batch.mask
    )
    assert float(tf.reduce_mean(wrong)) < 0.1


@pytest.mark.parametrize("length", [1, 5, 20, 40])
def test_dnc_copy_copies_every_length(length):
    dnc = tf.saved_model.load(str(SAVED / "dnc_copy" / "1")).signatures
    batch = tasks.Copy().sample(np.random.default_rng(3), 17, length=length)
    outputs = dnc["serving_default"](inputs=tf.constant(batch.inputs))
    wrong = losses.wrong_bits_per_sequence(
        batch.targets, outputs["outputs"], batch.mask
    )
    assert float(tf.reduce_mean(wrong)) < 0.1


@pytest.mark.parametrize(
    ("length", "most"),
    [(3, 0.5), (12, 1.5), pytest.param(96, 6.0, marks=pytest.mark.slow)],
)
def test_sam_recalls_among_more_items_than_trained_on(length, most):
    folder = SAVED / "sam_associative_recall"
    config = runs.read_config(folder)
    assert type(config.model) is MODELS["sam"]
    sam = keras.models.load_model(folder / "model.keras")
    batch = config.task.sample(np.random.default_rng(3), 32, length=length)
    wrong = losses.wrong_bits_per_sequence(
        batch.targets, sam(batch.inputs), batch.mask
    )
    assert float(tf.reduce_mean(wrong)) < most  # of 18; chance has 9


@pytest.mark.parametrize("length", [16, 32])
def test_sdnc_follows_a_chain(length):
    folder = SAVED / "sdnc_chain"
    config = runs.read_config(folder)
    assert type(config.model) is MODELS["sdnc"]
    sdnc = keras.models.load_model(folder / "model.keras")
    batch = config.task.sample(np.random.default_rng(3), 32, length=length)
    wrong = losses.wrong_bits_per_sequence(
        batch.targets, sdnc(batch.inputs), batch.mask
    )
    assert float(tf.reduce_mean(wrong)) < 1.6  # 5 % of 32; chance has 16


def test_ntm_copy_streams_the_same_outputs(copier):
    batch = tasks.Copy().sample(np.random.default_rng(3), 5, length=7)
    inputs = tf.constant(batch.inputs)
    whole = copier["serving_default"](inputs=inputs)["outputs"]
    states = copier["initial_state"](inputs=inputs[:, 0])
    for time in range(inputs.shape[1]):
        states = copier["step"](inputs=inputs[:, time], **states)
        np.testing.assert_allclose(
            states.pop("outputs"), whole[:, time], rtol=0, atol=1e-6
        )


def test_memory_wrap_reads_and_explains_digits():
    digits = pytest.importorskip("sklearn.datasets")
    x, y = digits.load_digits(return_X_y=True)
    # The example shuffles like this with its first seed.
    order = np.random.default_rng(1).permutation(len(x))
    x = (x[order] / 16).reshape(-1, 8, 8, 1).astype("float32")
    y = y[order]
    path = str(SAVED / "memory_wrap_digits" / "1")
    served = tf.saved_model.load(path).signatures["serving_default"]
    found = served(inputs=tf.constant(x[1200:]))
    answers = found["outputs_0"].numpy().argmax(axis=1)
    assert (answers == y[1200:]).mean() > 0.96
    weights = found["outputs_1"].numpy()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert (weights > 0).sum(axis=1).mean() < 20  # of 100
    # The memory holds training images in another random order.
    order = np.random.default_rng(1)
    order.permutation(len(x))
    labels = y[:1200][order.permutation(1200)][:100]
    top = labels[weights.argmax(axis=1)]
    assert (top == answers).mean() > 0.9


def test_esm_policy_finds_the_middle_by_its_memory():
    example = runpy.run_path(SAVED.parent / "examples/esm_in_a_model.py")
    inputs, targets = example["sequences"](32, seed=2000)
    path = str(SAVED / "esm_policy" / "1")
    served = tf.saved_model.load(path).signatures["serving_default"]
    found = served(**{k: tf.constant(v) for k, v in inputs.items()})
    (outputs,) = found.values()
    assert example["degrees"](targets, outputs.numpy()) < 15
    # The policy uses its memory: the last step alone gives a larger error.
    inputs["depth"][:, :-1] = 0.0
    found = served(**{k: tf.constant(v) for k, v in inputs.items()})
    (outputs,) = found.values()
    assert example["degrees"](targets, outputs.numpy()) > 25


def test_committed_models_are_small():
    files = [path for path in SAVED.rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) < 5 * 2**20
