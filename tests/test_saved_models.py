"""The committed models still do what they were trained for."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from keras_memory import losses
from keras_memory import tasks

MODELS = pathlib.Path(__file__).parents[1] / "saved_models"


@pytest.fixture(scope="module")
def copier():
    return tf.saved_model.load(str(MODELS / "ntm_copy" / "1")).signatures


@pytest.mark.parametrize("length", [1, 5, 20, 80])
def test_ntm_copy_copies(copier, length):
    rng = np.random.default_rng(3)
    batch = tasks.Copy().sample(rng, 17, length=length)
    outputs = copier["serving_default"](inputs=tf.constant(batch.inputs))
    wrong = losses.wrong_bits_per_sequence(
        batch.targets, outputs["outputs"], batch.mask
    )
    assert float(tf.reduce_mean(wrong)) < 0.1


@pytest.mark.parametrize("length", [1, 5, 20, 40])
def test_dnc_copy_copies(length):
    dnc = tf.saved_model.load(str(MODELS / "dnc_copy" / "1")).signatures
    batch = tasks.Copy().sample(np.random.default_rng(3), 17, length=length)
    outputs = dnc["serving_default"](inputs=tf.constant(batch.inputs))
    wrong = losses.wrong_bits_per_sequence(
        batch.targets, outputs["outputs"], batch.mask
    )
    assert float(tf.reduce_mean(wrong)) < 0.1


def test_ntm_copy_streams(copier):
    batch = tasks.Copy().sample(np.random.default_rng(3), 5, length=7)
    inputs = tf.constant(batch.inputs)
    whole = copier["serving_default"](inputs=inputs)["outputs"]
    states = copier["initial_state"](inputs=inputs[:, 0])
    for time in range(inputs.shape[1]):
        states = copier["step"](inputs=inputs[:, time], **states)
        np.testing.assert_allclose(
            states.pop("outputs"), whole[:, time], rtol=0, atol=1e-6
        )


def test_committed_models_are_small():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) < 5 * 2**20
