"""It learns: run with `pytest -m slow`."""

import dataclasses

import pytest

from keras_memory import config
from keras_memory import training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [1, 10, 100])
def test_copy_preset(seed, tmp_path):
    preset = config.override(config.PRESETS["copy"], [f"seed={seed}"])
    results = training.train(preset, tmp_path / "run", lambda line: None)
    assert results["steps"] < preset.steps
    assert results["wrong_bits_up_to_20"] < 0.1


def test_copy_without_a_memory_fails(tmp_path):
    """The control: one slot holds one vector, and no more is learned."""
    preset = config.override(
        config.PRESETS["copy"],
        ["memory_slots=1", "shift_range=0", "controller=dense", "steps=1000"],
    )
    preset = dataclasses.replace(preset, curriculum=())
    results = training.train(preset, tmp_path / "run", lambda line: None)
    assert results["wrong_bits_up_to_20"] > 10
