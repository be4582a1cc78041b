"""Models learn: run `pytest -m slow tests/test_learning.py` (40 minutes)."""

import pathlib
import runpy

import numpy as np
import pytest

from keras_memory import training
from keras_memory.training import config
from keras_memory.training import presets
from keras_memory.training import runs

pytestmark = pytest.mark.slow


def train(start, folder, *settings):
    start = config.override(start, settings)
    return training.train(start, folder, lambda line: None)


@pytest.mark.parametrize("seed", [1, 10, 100])
def test_an_ntm_learns_to_copy(seed, tmp_path):
    start = presets.PRESETS["copy"]["default"]
    results = train(start, tmp_path / "run", f"seed={seed}")
    assert results["steps"] < start.steps
    assert results["wrong_bits_per_sequence_up_to_20"] < 0.1


@pytest.mark.parametrize("seed", [1, 10, 100])
def test_a_dnc_learns_to_copy(seed, tmp_path):
    start = presets.PRESETS["copy"]["dnc"]
    all_steps = ("steps=1500", "stop_error=0")  # as in docs/results.md
    results = train(start, tmp_path / "run", f"seed={seed}", *all_steps)
    assert results["wrong_bits_per_sequence_up_to_20"] < 0.1


def test_the_preset_of_pytorch_ntm_learns_to_copy(tmp_path):
    start = presets.PRESETS["copy"]["pytorch-ntm"]
    train(start, tmp_path / "run", "steps=12000")
    history = runs.read_history(tmp_path / "run", start)
    errors = [row["wrong_bits_per_sequence"] for row in history]
    assert np.isfinite(errors).all()
    assert min(errors) < 0.1


@pytest.mark.parametrize(
    "task, error, most",
    [
        ("repeat-copy", "wrong_bits_per_sequence_up_to_10", 0.1),
        ("associative-recall", "wrong_bits_per_sequence_up_to_6", 1.0),
        ("adding", "absolute_error_of_sum_up_to_100", 2.0),
        ("argmax", "error_rate_up_to_10", 0.02),
    ],
)
def test_each_task_is_learned(task, error, most, tmp_path):
    results = train(presets.PRESETS[task]["default"], tmp_path / "run")
    assert results[error] < most


def test_a_sparse_dnc_follows_the_links_of_a_chain(tmp_path):
    results = train(presets.PRESETS["chain"]["sdnc"], tmp_path / "run")
    assert results["wrong_bits_per_sequence_up_to_16"] < 0.05 * 32
    assert results["wrong_bits_per_sequence_at_32"] < 0.05 * 32


@pytest.mark.parametrize("name", ["dnc", "sam"])
def test_training_never_gets_a_nan(name):
    benchmark = pathlib.Path(__file__).parents[1] / "benchmarks"
    benchmark = runpy.run_path(str(benchmark / "stability.py"))
    rates = 1e-4, 1e-3, 1e-2
    table = benchmark["stability"](name, rates, seeds=20, steps=1000)
    for row in table.values():
        assert [row[part] for part in benchmark["CHECKED"]] == [0, 0, 0, 0]
    assert table[1e-3]["median loss"] < table[1e-4]["median loss"] < 0.69


def test_copy_without_a_memory_fails(tmp_path):
    """The control: one slot holds only one vector, so longer copies fail."""
    start = presets.PRESETS["copy"]["default"]
    settings = ["memory_slots=1", "shift_range=0", "steps=1000"]
    settings += ["initialization=keras", "controller=dense"]
    results = train(start, tmp_path / "run", *settings)
    assert results["wrong_bits_per_sequence_up_to_20"] > 10
