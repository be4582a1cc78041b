"""Checks of keys and values: dtypes, sizes, finite numbers."""

import keras
import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import check_bytes
from keras_memory.checks import check_exact
from keras_memory.checks import check_size
from keras_memory.retrieval.similarities import LARGEST

FLOATS = ("float16", "bfloat16", "float32", "float64")
VALUE_DTYPES = (*FLOATS, "int32", "int64")
OF_INTEGERS = ", a floating-point dtype; `value_dtype` is for integer values"
KEY_REMEDY = "Keys are floats: cast them yourself if rounding is acceptable."
VALUE_REMEDY = (
    'Create the memory with `value_dtype="int32"` or "int64" for integers, '
    'and with "float32" for floats.'
)


def check_dtype(name, dtype, choices, alternatives="", in_graph=True):
    """Checks a dtype and returns its name.

    Args:
        name: str, of the argument, for the error.
        dtype: the dtype, as a user gives it.
        choices: names of the allowed dtypes.
        alternatives: str for the error, other allowed values.
        in_graph: bool, whether the backend must support the dtype.

    Raises:
        ValueError: another dtype, or 64 bits in JAX without x64.
    """
    try:
        dtype_name = keras.backend.standardize_dtype(dtype)
    except (TypeError, ValueError):
        dtype_name = None
    if dtype is None or dtype_name not in choices:
        raise ValueError(
            f"`{name}` must be one of {tuple(choices)}{alternatives}. "
            f"Received: {name}={dtype!r}"
        )
    is_wide = in_graph and dtype_name.endswith("64")
    if is_wide and keras.backend.backend() == "jax":
        import jax

        if not jax.config.jax_enable_x64:
            raise ValueError(
                f"`{name}` must have at most 32 bits in JAX, unless "
                '`jax.config.update("jax_enable_x64", True)` was called. '
                f"Received: {name}={dtype!r}"
            )
    return dtype_name


def check_bytes_of_entries(
    slots, key_dim, value_dim, dtype, value_dtype, on_host=False
):
    """`check_bytes` of keys and values; `value_dtype` None means `dtype`."""
    for what, name, width, of_numbers in (
        ("The keys", "key_dim", key_dim, dtype),
        ("The values", "value_dim", value_dim, value_dtype or dtype),
    ):
        sizes = [*slots, (name, width)]
        check_bytes(what, sizes, of_numbers, on_host=on_host)


def check_value_dtype(dtype, in_graph=True, default=None):
    """As `check_dtype`, for the dtype of values; `default` for None."""
    if dtype is None:
        return default
    return check_dtype(
        "value_dtype", dtype, VALUE_DTYPES, ", or None", in_graph
    )


def of_values(value_dtype, dtype=None):
    """Options of `check_array` that cast values to `value_dtype`, or to `dtype`
    if that is None."""
    kind = "real" if value_dtype in (None, *FLOATS) else "integer"
    dtype = value_dtype or dtype
    return {"kind": kind, "dtype": dtype, "remedy": VALUE_REMEDY}


def check_top_k(top_k, memory_size):
    """Returns `top_k`; ValueError unless so many entries may exist."""
    check_size("top_k", top_k)
    if top_k > memory_size:
        raise ValueError(
            "`top_k` must be at most `memory_size`, the most entries that "
            f"exist. Received: top_k={top_k}, memory_size={memory_size}"
        )
    return top_k


def let_in(name, value, *arguments, **options):
    """Checks an argument of a layer, as `check_array`, before Keras converts it
    to a tensor: Keras may round it, and its errors name no argument.

    Tensors pass unchecked, since they may carry masks: `call` checks them.
    """
    if isinstance(value, keras.KerasTensor) or ops.is_tensor(value):
        return value
    return check_array(name, value, *arguments, **options)


def to_numpy(name, values):
    """Converts an array or tensor of any backend to NumPy."""
    try:
        if keras.ops.is_tensor(values) or isinstance(values, keras.Variable):
            return np.asarray(ops.convert_to_numpy(values))
        return np.asarray(values)
    except Exception as error:
        raise ValueError(
            f"`{name}` must be an array or a tensor. "
            f"Received: {type(values).__name__} ({error})"
        ) from error


def check_vectors(name, values, shape, rows, dtype="float32", remedy=None):
    """Checks vectors and returns an array (rows, ..., width).

    Args:
        name: str, of the argument, for errors.
        values: array or tensor, as given.
        shape: tuple, the wanted shape: None for any size, ... for any axes;
            without the axis of rows if the array is for a single row.
        rows: (R,) ints of the rows, for errors.
        dtype: str, of the result.
        remedy: str for the error about integers that `dtype` cannot hold
            exactly; None rounds them.
    """
    array = to_numpy(name, values)
    asked = str(shape).replace("Ellipsis", "...").replace("None", "n")
    is_right = array.ndim >= 2 and array.shape[-1] == shape[-1]
    if ... in shape:
        before = shape[: shape.index(...)]
        is_right = is_right and array.shape[: len(before)] == before
    else:
        sizes = zip(array.shape, shape)
        is_right = array.ndim == len(shape) and all(
            size == wanted or wanted is None for size, wanted in sizes
        )
    if not is_right:
        raise ValueError(
            f"`{name}` must be {asked}, vectors for each selected row. "
            f"Received: shape {array.shape}, rows={rows.tolist()}"
        )
    is_float = dtype in FLOATS
    kind = "f" if "float" in array.dtype.name else array.dtype.kind
    if kind not in "iu" + "f" * (is_float or not array.size):
        wanted = "real numbers." if is_float else f"integers. {remedy}"
        raise ValueError(
            f"`{name}` must be {wanted} Received: dtype {array.dtype}"
        )
    if remedy is not None:
        check_exact(name, array, dtype, remedy)
    given = array
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(array, dtype)
    is_sound = are_sound(array)
    if not is_sound.all():
        place = tuple(map(int, np.argwhere(~is_sound)[0]))
        row = rows[place[0] if len(rows) > 1 else 0]
        raise ValueError(
            f"`{name}` must be finite and within +-{LARGEST:.0e}, or products "
            f"overflow and searches find wrong entries. Received: "
            f"{given[place]} in row {row}, at {place}, to be kept as {dtype}"
        )
    return array


def are_sound(array):
    """For each element, whether it is an integer or a float within
    +-`LARGEST`. NaN is not."""
    if array.dtype.kind in "iu":
        return np.ones(array.shape, bool)
    with np.errstate(over="ignore"):
        return np.abs(array.astype("float32", copy=False)) <= LARGEST


def check_bools(name, values, shape, meaning):
    """Checks an array of bools; `meaning` is for the error."""
    array = to_numpy(name, values)
    if array.shape != shape or array.dtype != bool:
        raise ValueError(
            f"`{name}` must be {shape} bool, {meaning}. "
            f"Received: shape {array.shape}, dtype {array.dtype}"
        )
    return array
