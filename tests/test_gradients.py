"""Each custom gradient equals the backend's gradient of the plain function, in
float64."""

import functools
import importlib
import inspect
import pathlib

import keras
import numpy as np
import pytest
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory.addressing import activations

PACKAGE = pathlib.Path(keras_memory.__file__).parent
BATCH, HEADS, WIDTH, SLOTS = 2, 3, 5, 7


@functools.cache
def decorated():
    """Functions with a custom gradient, by module and name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if "custom_gradient" in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            for name, value in inspect.getmembers(module, inspect.isfunction):
                own = value.__module__ == module.__name__
                if own and hasattr(value, "gradient"):
                    found[f"{parts[-1]}.{name}"] = value
    return found


def array(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape)


def weighting(*shape, seed=5):
    exponentials = np.exp(array(*shape, seed=seed))
    return exponentials / exponentials.sum(-1, keepdims=True)


PLACES = np.array([[0.0, 3.0, 3.0], [6.0, 1.0, 0.0]])
ACTIVATIONS = (
    keras.activations.sigmoid,
    keras.activations.linear,
    activations.softmax,
)

# Arrays and options for each. Sizes are different primes.
ARGUMENTS = {
    "gradients._activate": [
        ([array(BATCH, SLOTS)], {"function": function})
        for function in (
            keras.activations.linear,
            keras.activations.sigmoid,
            keras.activations.softplus,
            keras.activations.tanh,
            activations.softmax,
            activations.oneplus,
        )
    ],
    "gradients._activate_each": [
        (
            [array(BATCH, 3 + 2 + 5 * 2)],
            {"functions": ACTIVATIONS, "shapes": ((3,), (2,), (5, 2))},
        )
    ],
    "slots.read": [
        ([array(BATCH, WIDTH, SLOTS), array(BATCH, HEADS, SLOTS)], {})
    ],
    "slots.inner_products": [
        ([array(BATCH, HEADS, WIDTH), array(BATCH, WIDTH, SLOTS)], {})
    ],
    "slots.outer_write": [
        ([array(BATCH, HEADS, WIDTH), array(BATCH, HEADS, SLOTS)], {})
    ],
    "slots.gather": [([array(BATCH, SLOTS, WIDTH), PLACES], {})],
    "slots.scatter_add": [
        ([array(BATCH, PLACES.shape[1], WIDTH), PLACES], {"size": SLOTS})
    ],
    "location.interpolate": [
        (
            [
                weighting(BATCH, HEADS, SLOTS),
                weighting(BATCH, HEADS, SLOTS, seed=7),
                weighting(BATCH, HEADS),
            ],
            {},
        )
    ],
    "location.shift": [
        (
            [
                weighting(BATCH, HEADS, SLOTS),
                weighting(BATCH, HEADS, 2 * shift_range + 1),
            ],
            {},
        )
        for shift_range in (0, 1, 2)
    ],
    "location.sharpen": [
        (
            [weighting(BATCH, HEADS, SLOTS), 1.0 + array(BATCH, HEADS) ** 2],
            {},
        )
    ],
    "content._weigh": [
        (
            [
                array(BATCH, WIDTH, SLOTS),
                array(BATCH, HEADS, WIDTH),
                array(BATCH, HEADS, 1) ** 2,
            ],
            {"norm_epsilon": norm_epsilon, "product_epsilon": product_epsilon},
        )
        for norm_epsilon, product_epsilon in ((1e-16, 0.0), (0.3, 0.5))
    ],
    "usage._allocate": [
        ([weighting(BATCH, SLOTS)], {"epsilon": epsilon, "sort": sort})
        for epsilon in (1e-16, 0.1)
        for sort in (False, True)
    ],
    "linkage._links": [
        (
            [
                weighting(BATCH, SLOTS, SLOTS),
                weighting(BATCH, 1, SLOTS),
                weighting(BATCH, 1, SLOTS, seed=7),
            ],
            {},
        )
    ],
    "linkage._forward_and_backward": [
        ([array(BATCH, SLOTS, SLOTS), array(BATCH, HEADS, SLOTS)], {})
    ],
    "memory_wrap._product_of_both": [
        (
            [array(BATCH, WIDTH), array(BATCH, WIDTH), array(2 * WIDTH, SLOTS)],
            {},
        )
    ],
}


def test_each_custom_gradient_is_tested():
    assert {*decorated()} == {*ARGUMENTS}


@pytest.mark.parametrize(
    ("name", "arrays", "options"),
    [
        pytest.param(name, *case, id=f"{name}-{index}")
        for name, cases in ARGUMENTS.items()
        for index, case in enumerate(cases)
    ],
)
@needs_tensorflow
def test_custom_gradients_equal_those_of_the_backend(name, arrays, options):
    import tensorflow as tf

    function = decorated()[name]
    arrays = [ops.convert_to_tensor(values) for values in arrays]
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        results = function.__wrapped__(*arrays, **options)
        result = results[0] if function.saves else results
        upstream = ops.convert_to_tensor(array(*result.shape, seed=11))
        loss = ops.sum(upstream * result)
    expected = tape.gradient(loss, arrays, unconnected_gradients="zero")
    saved = [results] if function.saves else []
    given = function.gradient(upstream, *saved, *arrays, **options)
    given = given if isinstance(given, (tuple, list)) else [given]
    assert len(given) == len(expected)
    for actual, wanted in zip(given, expected):
        assert actual.shape == wanted.shape
        np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-12)
