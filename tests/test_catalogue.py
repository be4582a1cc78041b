"""Every public layer passes the harness."""

import importlib.util
import inspect
import os
import subprocess
import sys

import backends
import harness
import keras
import numpy as np
import pytest
from catalogue import CASES
from catalogue import LAYERS
from catalogue import OTHERS
from catalogue import PLAIN
from catalogue import WRAPS
from catalogue import each_layer
from catalogue import each_shape
from catalogue import each_state
from catalogue import each_structure
from catalogue import few_backends_unless
from catalogue import name_of
from catalogue import slow_unless

import keras_memory

pytestmark = pytest.mark.every_backend


def public_layers():
    return {
        value
        for value in vars(keras_memory).values()
        if isinstance(value, type) and issubclass(value, keras.layers.Layer)
    }


def covered():
    layers = set()
    for case in CASES:
        layer = case.make()
        for cls in (type(layer), type(layer.cell)):
            layers |= {cls, *cls.__bases__}
    return layers | {case.layer for case in [*WRAPS, *OTHERS]}


def test_every_public_layer_is_in_the_catalogue():
    assert public_layers() <= covered()


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=name_of)
def test_config_round_trip(case):
    harness.config_round_trip(case)


@pytest.mark.few_backends
@each_structure
def test_file_round_trip(case, tmp_path):
    harness.file_round_trip(case, tmp_path)


@pytest.mark.few_backends
@each_layer
def test_clone(case):
    harness.clone(case)


@each_shape
def test_shapes(case):
    harness.shapes(case)


def fits_always(case, jit_compile):
    """Whether the case is fitted this way even without `-m slow`."""
    # `test_time_loops.py` or `test_same_numbers` checks the other gradients.
    return case in LAYERS and jit_compile == (harness.BACKEND != "torch")


@pytest.mark.parametrize(
    ("jit_compile", "case"),
    [
        slow_unless(fits_always(case, jit_compile), jit_compile, case)
        for jit_compile in (False, True)
        for case in CASES
    ],
    ids=name_of,
)
def test_training_step(jit_compile, case):
    harness.training_step(case, jit_compile)


@each_layer
def test_mask_is_truncation(case):
    harness.mask_is_truncation(case)


@each_state
def test_state_in_and_out(case):
    harness.state_in_and_out(case)


@each_state
def test_stateful_is_one_sequence(case):
    harness.stateful_is_one_sequence(case)


@each_layer
def test_backwards(case):
    harness.backwards(case)


@each_layer
def test_in_models(case):
    harness.in_models(case)


@pytest.mark.few_backends
@pytest.mark.parametrize(
    ("policy", "case"),
    [
        slow_unless(
            case in LAYERS
            # Its cell is an NTM.
            and (policy == "mixed_float16" or case.name != "memory-rnn"),
            policy,
            case,
        )
        for policy in ("mixed_float16", "mixed_bfloat16", "float16")
        for case in CASES
    ],
    ids=name_of,
)
def test_mixed_precision(policy, case):
    harness.mixed_precision(case, policy)


@each_state
def test_trace(case):
    harness.trace_is_what_happens(case)


@pytest.fixture(scope="session")
def of_tensorflow(tmp_path_factory):
    """The results of `backends.numbers` for all cases on TensorFlow."""
    because = "not applicable: what the others are compared with"
    harness.skip_on("tensorflow", because=because)
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    if path := os.environ.get("NUMBERS_OF_TENSORFLOW"):  # set by `.ci/run`
        return np.load(path)
    path = tmp_path_factory.mktemp("numbers") / "tensorflow.npz"
    subprocess.run(
        [sys.executable, backends.__file__, "numbers", path],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        check=True,
    )
    return np.load(path)


@pytest.mark.parametrize(
    "case",
    [few_backends_unless(case in PLAIN, case) for case in CASES],
    ids=name_of,
)
def test_same_numbers(case, of_tensorflow):
    for name, value in backends.numbers(case).items():
        expected = of_tensorflow[f"{case.name}/{name}"]
        size = np.abs(expected).max() or 1.0
        harness.close(value / size, expected / size, tolerance=1e-5)


def test_page_of_backends_has_every_check_and_backend():
    tests = {
        name.removeprefix("test_")
        for name, value in globals().items()
        if name.startswith("test_")
        and "case" in inspect.signature(value).parameters
    }
    assert {name.partition("[")[0] for name in backends.CHECKS} == tests
    _, _, rest = backends.PAGE.read_text().partition(backends.START)
    table, _, _ = rest.partition(backends.END)
    for words in (*backends.CHECKS.values(), *backends.BACKENDS.values()):
        assert f"| {words} " in table, words
