"""Outputs, states and gradients are finite for inputs and states up to the
bounds that `MemoryCell` documents."""

import harness
import keras
import numpy as np
import pytest
from catalogue import CASES
from catalogue import dnc
from catalogue import ntm
from keras import ops

from keras_memory.addressing import scaling
from keras_memory.recurrent import cells
from keras_memory.recurrent import controllers

pytestmark = harness.needs_tensorflow

BOUNDS = {
    "float32": 1e18,
    "mixed_bfloat16": 1e18,
    "float64": 1e150,
    "float16": 1e2,
}
# Its state is its output, so interfaces become as large.
BOUND_OF_GRU = 1e9

OF_CONTROLLERS = [
    make(f"with-{name}", controller=name)
    for make in (ntm, dnc)
    for name in controllers.CELLS
]
FEW = [
    ("dnc-with-layer_norm_lstm", "portable"),
    ("ntm-with-layer_norm_rnn", "fast"),
]


def extreme_states(cell, bound, rng):
    """States of the size of the bound, including weightings and usages."""
    records = cell.unpack_state(cell.get_initial_state(2))
    columns = [
        record.link_columns
        for record in (records if type(records) is tuple else (records,))
        if "link_columns" in record._fields
    ]
    kept = {id(value) for value in keras.tree.flatten(columns)}

    def state(value):
        signs = rng.choice([-1.0, 1.0], size=value.shape)
        return (
            value if id(value) in kept else ops.cast(bound * signs, "float64")
        )

    return cell.pack_state(keras.tree.map_structure(state, records))


def is_finite(arrays):
    arrays = [ops.cast(array, "float64").numpy() for array in arrays]
    return all(np.isfinite(array).all() for array in arrays)


def holds(case, loop, dtype="float32", bound=None):
    import tensorflow as tf

    bound = bound or BOUNDS[dtype]
    layer = harness.built(case, return_state=True, loop=loop, dtype=dtype)
    rng = np.random.default_rng(3)
    x = rng.choice([-1.0, 1.0], size=(*case.input_shape[:1], 2, 5))
    for size, states in [
        (bound, layer.cell.get_initial_state(2)),
        (1.0, extreme_states(layer.cell, bound, rng)),
    ]:
        arrays = [tf.cast(size * x, layer.compute_dtype), *states]
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            outputs, *after = layer(
                arrays[0], initial_state=arrays[1:], training=True
            )
            weights = tf.cast(tf.range(tf.size(outputs)) % 5 - 2, "float32")
            loss = tf.reduce_sum(
                tf.reshape(tf.cast(outputs, "float32"), (-1,)) * weights
            )
        wanted = [*arrays, *(w.value for w in layer.trainable_variables)]
        gradients = tape.gradient(loss, wanted, unconnected_gradients="zero")
        assert is_finite([outputs, *after])
        assert is_finite(gradients)


def bound_of(case, dtype="float32"):
    of_gru = case.kwargs.get("controller") == "gru"
    return min(BOUNDS[dtype], BOUND_OF_GRU if of_gru else np.inf)


def cases(few):
    return [
        pytest.param(
            case,
            loop,
            id=f"{case.name}-{loop}",
            marks=() if (case.name, loop) in few else pytest.mark.slow,
        )
        for case in [*CASES, *OF_CONTROLLERS]
        for loop in ("fast", "portable")
    ]


@pytest.mark.parametrize(("case", "loop"), cases(FEW))
def test_inputs_and_states_up_to_the_bound_stay_finite(case, loop):
    holds(case, loop, bound=bound_of(case))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize(("case", "loop"), cases([]))
def test_bounds_hold_in_other_dtypes(case, loop, dtype):
    holds(case, loop, dtype, bound_of(case, dtype))


# Layer norms.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_layer_norms_do_not_depend_on_scale(dtype):
    import tensorflow as tf

    norm = cells.LayerNormalization(dtype=dtype)
    largest = float(np.finfo("float16").max) if dtype == "float16" else 3e38
    rng = np.random.default_rng(3)
    for size in (largest / 1e3, largest):
        x = tf.cast(size * rng.uniform(-1, 1, size=(3, 7)), dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = norm(x)
            loss = tf.reduce_sum(tf.cast(y, "float32") * np.arange(7.0))
        wide = tf.cast(x, "float64")
        expected = wide - tf.reduce_mean(wide, -1, keepdims=True)
        expected /= tf.math.reduce_std(wide, -1, keepdims=True)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        harness.close(tf.cast(y, "float64"), expected, tolerance)
        assert is_finite([tape.gradient(loss, x)])
    same = norm(tf.fill((1, 7), tf.cast(largest, dtype)))
    assert is_finite([same])


def test_layer_norms_of_ordinary_numbers_equal_keras():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 7), scale=1e6).astype("float32")
    found = cells.LayerNormalization(epsilon=1e-3)(x)
    np.testing.assert_array_equal(
        found, keras.layers.LayerNormalization(epsilon=1e-3)(x)
    )


def test_scales_of_ordinary_numbers_are_exactly_1():
    x = ops.convert_to_tensor(np.float32([[0.0, -3e-9, 2.0**30, 7.0]]))
    scaled, scale = scaling.in_range(x, axis=-1)
    np.testing.assert_array_equal(scaled, x)
    np.testing.assert_array_equal(scale, [[1.0]])


# Given states that no step produces.


def test_a_dnc_clips_given_weightings_and_usage_to_their_ranges():
    layer = harness.built(dnc("two-writers", write_heads=2))
    cell, x = layer.cell, np.ones((2, 3, 5), "float32")
    record = cell.unpack_state(cell.get_initial_state(2))
    ones = {
        name: ops.ones_like(getattr(record, name))
        for name in ("usage", "linkage", "precedence", "read_weighting")
    }
    slots = record.usage.shape[1]
    wild = {name: 1e30 * value for name, value in ones.items()}
    held = {
        name: value if name == "usage" else value / slots
        for name, value in ones.items()
    }
    outputs = [
        layer(x, initial_state=cell.pack_state(record._replace(**fields)))
        for fields in (wild, held)
    ]
    harness.close(*outputs, 1e-6)
