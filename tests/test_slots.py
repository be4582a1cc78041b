"""Tests of `addressing/slots.py`, which reads and writes slots."""

import itertools

import harness
import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_memory.addressing import slots as on_tensors

pytestmark = pytest.mark.every_backend

access = harness.on_arrays(on_tensors)
slots_last = harness.slots_last
BATCH, HEADS, SLOTS, WIDTH = 2, 3, 7, 5

needs_float64 = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="compares in float64, which the TensorFlow backend computes in",
)


def read(memory, weighting):
    return access.read(slots_last(memory), weighting)


def erase_and_add(memory, *of_heads):
    return slots_last(access.erase_and_add(slots_last(memory), *of_heads))


def close(actual, expected, tolerance=1e-6):
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def parts():
    """Memory, weighting, erase vectors, add vectors."""
    rng = np.random.default_rng(7)
    return (
        rng.normal(size=(BATCH, SLOTS, WIDTH)),
        reference.softmax(rng.normal(size=(BATCH, HEADS, SLOTS))),
        rng.uniform(size=(BATCH, HEADS, WIDTH)),
        rng.normal(size=(BATCH, HEADS, WIDTH)),
    )


def test_gather_returns_scattered_vectors():
    vectors = np.arange(12, dtype="float32").reshape(2, 3, 2)
    places = np.array([[4, 0, 4], [1, 2, 3]], "float32")
    found = access.scatter_add(vectors, places, size=SLOTS)
    expected = np.zeros((2, SLOTS, 2))
    expected[0, 4] = vectors[0, 0] + vectors[0, 2]
    expected[0, 0] = vectors[0, 1]
    expected[1, 1:4] = vectors[1]
    close(found, expected, 0)
    taken = access.gather(found, places)
    close(taken, [expected[0, [4, 0, 4]], expected[1, 1:4]], 0)


@needs_float64
def test_read_equals_the_oracle(parts):
    memory, weighting, _, _ = parts
    expected = [
        [reference.read(memory[item], w) for w in weighting[item]]
        for item in range(BATCH)
    ]
    close(read(memory, weighting), expected, 1e-12)


@needs_float64
@pytest.mark.parametrize("heads", [1, 3])
def test_erase_and_add_equals_the_oracle(parts, heads):
    memory, *of_heads = parts
    of_heads = [value[:, :heads] for value in of_heads]
    expected = [
        reference.write(memory[item], *(value[item] for value in of_heads))
        for item in range(BATCH)
    ]
    close(erase_and_add(memory, *of_heads), expected, 1e-12)


def test_two_slots_match_values_computed_by_hand():
    memory = np.array([[[1.0, 2.0], [3.0, 4.0]]], "float32")
    weighting = np.array([[[1 / 4, 3 / 4]]], "float32")
    # 1/4 (1, 2) + 3/4 (3, 4).
    close(read(memory, weighting), [[[2.5, 3.5]]])
    erase = np.array([[[1.0, 0.0]]], "float32")
    add = np.array([[[4.0, 8.0]]], "float32")
    # (1 - 1/4) 1 + 1/4 4 = 7/4,   2 + 1/4 8 = 4
    # (1 - 3/4) 3 + 3/4 4 = 15/4,  4 + 3/4 8 = 10
    close(
        erase_and_add(memory, weighting, erase, add),
        [[[7 / 4, 4.0], [15 / 4, 10.0]]],
    )
    # Without erasing: 1 + 1/4 4 = 2, 3 + 3/4 4 = 6.
    close(
        erase_and_add(memory, weighting, None, add),
        [[[2.0, 4.0], [6.0, 10.0]]],
    )


def test_all_heads_erase_before_any_adds():
    memory = np.array([[[5.0]]], "float32")
    weighting = np.ones((1, 2, 1), "float32")
    erase = np.array([[[0.0], [1.0]]], "float32")
    add = np.array([[[2.0], [0.0]]], "float32")
    # In turn, the second head would erase the first head's addition.
    close(erase_and_add(memory, weighting, erase, add), [[[2.0]]])


def test_the_order_of_heads_does_not_matter(parts):
    memory, *of_heads = parts
    expected = ops.convert_to_numpy(erase_and_add(memory, *of_heads))
    for order in itertools.permutations(range(HEADS)):
        permuted = (value[:, list(order)] for value in of_heads)
        close(erase_and_add(memory, *permuted), expected)


def test_erase_1_at_weighting_1_replaces_the_slot(parts):
    memory, _, _, add = parts
    weighting = np.eye(SLOTS)[None, [4]].repeat(BATCH, axis=0)
    written = ops.convert_to_numpy(
        erase_and_add(memory, weighting, np.ones((BATCH, 1, WIDTH)), add[:, :1])
    )
    close(written[:, 4], add[:, 0])
    others = np.arange(SLOTS) != 4
    close(written[:, others], memory[:, others])


def test_erase_of_none_erases_nothing(parts):
    memory, weighting, erase, add = parts
    close(
        erase_and_add(memory, weighting, None, add),
        ops.convert_to_numpy(erase_and_add(memory, weighting, 0 * erase, add)),
    )


def test_weighting_0_does_not_change_the_memory(parts):
    memory, weighting, erase, add = parts
    close(erase_and_add(memory, 0 * weighting, erase, add), memory)
    close(read(memory, 0 * weighting), np.zeros((BATCH, HEADS, WIDTH)), 0)


@harness.needs_tensorflow
def test_canary_tensorflow_tells_whether_xlacompiles():
    import tensorflow as tf

    found = []

    def look():
        found.append(on_tensors.compiles())

    look()
    tf.function(look)()
    tf.function(look, jit_compile=True)()
    assert found == [False, False, True], (
        "TensorFlow no longer tells in `GraphOrParentsInXlaContext` whether "
        "XLA will compile a graph. `slots.compiles` asks it that."
    )


def test_read_of_a_one_hot_weighting_is_the_slot(parts):
    memory = parts[0]
    weighting = np.eye(SLOTS)[None, [4, 0, 6]].repeat(BATCH, axis=0)
    close(read(memory, weighting), memory[:, [4, 0, 6]])
