"""Arrays that `checks.check_array` accepts, and its errors for others."""

import os

import harness
import keras
import numpy as np
import programs
import pytest
from keras import ops

from keras_memory.checks import LONGEST_AXIS
from keras_memory.checks import check_array
from keras_memory.checks import check_size


@pytest.mark.parametrize(
    "value, received",
    [
        (None, "NoneType"),
        ("text", "shape (), dtype str"),
        ([["a", "b"]], "shape (1, 2), dtype str"),
        (np.ones((1, 2), "bool"), "shape (1, 2), dtype bool"),
        (np.ones((1, 2), "complex64"), "shape (1, 2), dtype complex64"),
        ([[1.0], [1.0, 2.0]], "list (setting an array element"),
        (object(), "dtype object"),
        (np.ones(2), "shape (2,), dtype float64"),
        (np.ones((1, 2, 3)), "shape (1, 2, 3), dtype float64"),
        (np.ones((2, 3)), "shape (2, 3), dtype float64"),
        (keras.KerasTensor((2, 3)), "shape (2, 3), dtype float32"),
        (keras.KerasTensor((2, 2), "bool"), "shape (2, 2), dtype bool"),
    ],
)
def test_errors_name_the_argument_and_the_received_value(value, received):
    sizes = {"D": 2}
    with pytest.raises(ValueError) as error:
        check_array("keys", value, ("n", "D"), sizes)
    text = str(error.value)
    assert text.startswith(
        "`keys` must be an array (n, D) of real numbers with D=2. Received: "
    )
    assert received in text
    assert sizes == {"D": 2}  # a refused argument defines no size


def test_named_sizes_must_agree_between_arguments():
    sizes = {}
    check_array("queries", np.ones((2, 5, 3)), ("B", ..., "D"), sizes)
    assert sizes == {"B": 2, "D": 3}
    check_array("keys", np.ones((2, 7, 3)), ("B", "n", "D"), sizes)
    with pytest.raises(
        ValueError, match="B=2, n=7, D=3. Received: shape .3, 7, 3"
    ):
        check_array("values", np.ones((3, 7, 3)), ("B", "n", "D"), sizes)
    with pytest.raises(ValueError, match="must be an array .m, m."):
        check_array("square", np.ones((3, 2)), ("m", "m"))


@pytest.mark.parametrize(
    "value, kind, dtype",
    [
        ([1, 2], "real", "float32"),
        ([1.5, 2.5], "real", "float32"),
        (np.ones(2, "float16"), "real", "float16"),
        (np.ones(2, "int64"), "real", "float32"),
        ([], "real", "float32"),
        ([1, 2], "integer", None),
        ([], "integer", "int32"),
        ([True, False], "bool", "bool"),
        ([], "bool", "bool"),
    ],
)
def test_valid_arrays_become_tensors(value, kind, dtype):
    tensor = check_array("x", value, (None,), kind=kind)
    assert ops.is_tensor(tensor)
    assert dtype in (None, ops.dtype(tensor))
    again = check_array("x", tensor, (None,), kind=kind)
    assert ops.dtype(again) == ops.dtype(tensor)


def test_bfloat16_is_a_real_number():
    x = ops.ones((2, 3), "bfloat16")
    assert ops.dtype(check_array("x", x, ("n", 3))) == "bfloat16"
    assert ops.dtype(check_array("x", x, ("n", 3), dtype="float32")) == (
        "float32"
    )


def test_sizes_unknown_to_a_graph_are_accepted():
    sizes = {}
    x = keras.KerasTensor((None, 3))
    assert check_array("x", x, ("B", "D"), sizes) is x
    assert sizes == {"D": 3}


def test_axes_longer_than_32_bit_indices_are_refused():
    assert check_size("slots", LONGEST_AXIS) == LONGEST_AXIS
    with pytest.raises(ValueError, match="`slots` must be at most 2147483647"):
        check_size("slots", 2**31)


REMEDY = "Scale them."


@pytest.mark.parametrize(
    "numbers, dtype, inexact",
    [
        ([1 << 24, -(1 << 24), 1 << 60], "float32", None),
        ([3, (1 << 24) + 1], "float32", 16777217),
        (np.array([-(1 << 24) - 1]), "float32", -16777217),
        (np.array([(1 << 63) - 1]), "float64", (1 << 63) - 1),
        (np.array([257], "uint16"), "bfloat16", 257),
        ([1 << 20], "float16", 1 << 20),  # infinite in float16
        ([(1 << 31) - 1, -(1 << 31)], "int32", None),
        ([1 << 31], "int32", 1 << 31),
        (np.array([1 << 63], "uint64"), "int64", 1 << 63),
        ([], "int32", None),
    ],
)
def test_integers_are_kept_exactly_or_refused(numbers, dtype, inexact):
    kind = "integer" if dtype.startswith("int") else "real"
    if dtype == "int64" and keras.backend.backend() == "jax":
        pytest.skip("no int64 there")

    def check(remedy=REMEDY):
        return check_array(
            "ids", numbers, (None,), kind=kind, dtype=dtype, remedy=remedy
        )

    if inexact is None:
        found = ops.convert_to_numpy(check())
        assert [int(number) for number in found] == list(map(int, numbers))
        return
    told = f"`ids` must be integers that {dtype} keeps exactly. Scale them. "
    with pytest.raises(ValueError, match=f"{told}Received: {inexact}, shape"):
        check()
    if dtype == "float32":
        check(remedy=None)  # rounds them


@pytest.mark.parametrize(
    "of, dtype, is_kept",
    [
        ("int8", "bfloat16", True),
        ("uint8", "bfloat16", True),
        ("int16", "float16", False),
        ("int16", "float32", True),
        ("int32", "float32", False),
        ("int32", "int32", True),
        ("float32", "float16", True),
    ],
)
def test_integer_tensors_are_checked_by_their_dtype(of, dtype, is_kept):
    kind = "integer" if dtype.startswith("int") else "real"
    options = {"kind": kind, "dtype": dtype, "remedy": REMEDY}
    for value in (ops.zeros((2, 3), of), keras.KerasTensor((2, 3), of)):
        if is_kept:
            check_array("ids", value, **options)
            continue
        with pytest.raises(ValueError, match=f"Scale.*, dtype {of}"):
            check_array("ids", value, **options)


def test_errors_for_floats_instead_of_integers_give_the_remedy():
    with pytest.raises(ValueError, match="of integers. Scale them. Received"):
        check_array("ids", [1.0], (1,), kind="integer", remedy=REMEDY)


FORK = """
import os, sys
import keras, numpy as np
import keras_memory
from keras_memory import geometry

x = np.ones((2, 4, 3), "float32")
layer = keras_memory.NTMLayer(3, 6, 4, controller_units=5)
layer(x)
wrap = keras_memory.MemoryWrapLayer(3)
wrap([x[:, 0], x[0]])
encoder = keras.layers.Dense(4)
model = keras_memory.MemoryWrapClassifier(encoder, 3, memory_size=2)
model.set_memory(x[:, 0])
model.predict(x[:, 0], verbose=0)
calls = [
    lambda: layer(x),
    lambda: keras_memory.trace(layer, x),
    lambda: wrap([x[:, 0], x[0]]),
    lambda: model.predict(x[:, 0], verbose=0),
    lambda: geometry.motions(np.eye(3, 4)[None]),
]
child = os.fork()
if not child:
    for call in calls:
        try:
            print("computed", call())
        except RuntimeError as error:
            print('get_context("spawn")' in str(error))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
@harness.needs_tensorflow
def test_errors_of_calls_in_a_fork_say_to_spawn():
    done = programs.run(FORK, timeout=90)
    assert done.stdout.splitlines() == ["True"] * 5, done.stderr


@harness.needs_tensorflow
@pytest.mark.parametrize("make", ["RaggedTensor", "SparseTensor"])
def test_sparse_and_ragged_tensors_are_refused(make):
    import tensorflow as tf

    values = {
        "RaggedTensor": tf.ragged.constant([[1.0], [2.0, 3.0]]),
        "SparseTensor": tf.sparse.from_dense([[1.0, 0.0]]),
    }
    with pytest.raises(ValueError, match=f"`x` must be.*Received: {make}"):
        check_array("x", values[make], (None, None))
