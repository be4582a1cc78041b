"""Every public layer passes the harness."""

import harness
import keras
import pytest
from catalogue import CASES

import keras_memory

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


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
    return layers


def test_every_public_layer_is_in_the_catalogue():
    assert public_layers() <= covered()


@each_case
def test_config_round_trip(case):
    harness.config_round_trip(case)


@each_case
def test_file_round_trip(case, tmp_path):
    harness.file_round_trip(case, tmp_path)


@each_case
def test_clone(case):
    harness.clone(case)


@each_case
def test_shapes(case):
    harness.shapes(case)


@each_case
@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_step(case, jit_compile):
    harness.training_step(case, jit_compile)


@each_case
def test_mask_is_truncation(case):
    harness.mask_is_truncation(case)


@each_case
def test_state_in_and_out(case):
    harness.state_in_and_out(case)


@each_case
def test_stateful_is_one_sequence(case):
    harness.stateful_is_one_sequence(case)


@each_case
def test_backwards(case):
    harness.backwards(case)


@each_case
def test_in_models(case):
    harness.in_models(case)


@each_case
@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float16"]
)
def test_mixed_precision(case, policy):
    harness.mixed_precision(case, policy)


@each_case
def test_trace(case):
    harness.trace_is_what_happens(case)
