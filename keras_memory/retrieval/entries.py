"""What keys and values may be: dtypes, sizes, finite numbers."""

import keras
import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import check_bytes
from keras_memory.checks import check_exact
from keras_memory.retrieval.similarities import LARGEST

FLOATS = ("float16", "bfloat16", "float32", "float64")
VALUE_DTYPES = (*FLOATS, "int32", "int64")
OF_INTEGERS = ", floating point types: `value_dtype` is for integers as values"
KEY_REMEDY = "Keys are floats: cast them yourself where they may be rounded."
VALUE_REMEDY = (
    'The memory keeps integers if made with `value_dtype="int32"` or '
    '"int64", and floats with "float32".'
)


def check_dtype(name, dtype, choices, alternatives="", in_graph=True):
    """The name of a dtype, or ValueError unless it is one of `choices` that the
    backend has, if it is of a graph; `alternatives` says what else it may
    be."""
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
                f"`{name}` must be of 32 bits or fewer in JAX, until "
                '`jax.config.update("jax_enable_x64", True)` was called. '
                f"Received: {name}={dtype!r}"
            )
    return dtype_name


def check_bytes_of_entries(
    slots, key_dim, value_dim, dtype, value_dtype, on_host=False
):
    """`check_bytes` of keys, and of values, whose dtype None is the keys'."""
    for what, name, width, of_numbers in (
        ("The keys", "key_dim", key_dim, dtype),
        ("The values", "value_dim", value_dim, value_dtype or dtype),
    ):
        sizes = [*slots, (name, width)]
        check_bytes(what, sizes, of_numbers, on_host=on_host)


def check_value_dtype(dtype, in_graph=True, default=None):
    """The name of a dtype of values, or `default` for None; see
    `check_dtype`."""
    if dtype is None:
        return default
    return check_dtype(
        "value_dtype", dtype, VALUE_DTYPES, ", or None", in_graph
    )


def of_values(value_dtype, dtype=None):
    """Options of `check_array` for values, which become `value_dtype`, or if
    that is None `dtype`."""
    kind = "real" if value_dtype in (None, *FLOATS) else "integer"
    dtype = value_dtype or dtype
    return {"kind": kind, "dtype": dtype, "remedy": VALUE_REMEDY}


def let_in(name, value, *arguments, **options):
    """What a layer is called with, checked as by `check_array`, before Keras
    makes a tensor of it, which may round it, or fail without a name.

    Tensors are for `call` to check, as they may have masks.
    """
    if isinstance(value, keras.KerasTensor) or ops.is_tensor(value):
        return value
    return check_array(name, value, *arguments, **options)


def to_numpy(name, values):
    """An array of what a user may give."""
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
    """An array (rows, ..., width) of a dtype, checked.

    Args:
        name: str, of the argument.
        values: what was given.
        shape: tuple of what it must be, None for any size, ... for any axes;
            without the axis of rows for what is of one row.
        rows: (R,) ints of the rows, for the error.
        dtype: str, which it becomes.
        remedy: str, for integers that it does not keep; None to round them.
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
            f"`{name}` must be {asked}, vectors for each row that is meant. "
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
            f"`{name}` must be finite, and within +-{LARGEST:.0e} so that "
            f"products are, or searches would find nonsense. Received: "
            f"{given[place]} in row {row}, at {place}, to be kept as {dtype}"
        )
    return array


def are_sound(array):
    """True where numbers can be computed with, or need not."""
    if array.dtype.kind in "iu":
        return np.ones(array.shape, bool)
    with np.errstate(over="ignore"):
        return np.abs(array.astype("float32", copy=False)) <= LARGEST


def check_bools(name, values, shape, meaning):
    """An array of bools of a shape, checked; `meaning` is for the error."""
    array = to_numpy(name, values)
    if array.shape != shape or array.dtype != bool:
        raise ValueError(
            f"`{name}` must be {shape} bool, {meaning}. "
            f"Received: shape {array.shape}, dtype {array.dtype}"
        )
    return array
