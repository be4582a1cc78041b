"""Checks of arguments: what was wanted, why, what arrived."""

import os
import pathlib

import keras
import numpy as np
from keras import ops

LONGEST_AXIS = 2**31 - 1  # an index of an axis is an int32

# Kinds of numbers by NumPy's letters: what `check_array` takes as which.
KINDS = {
    "real": ("fiu", "real numbers"),
    "integer": ("iu", "integers"),
    "bool": ("b", "bool"),
    "mask": ("bfiu", "bools, or of numbers of which 0 is False"),
}


def check_size(name, value, least=1, others=""):
    """An int, or ValueError unless `value` is an integer of at least `least`
    that an axis can have; `others` says what else it may be."""
    whole = isinstance(value, (int, np.integer)) and type(value) is not bool
    if not whole or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}{others}. "
            f"Received: {name}={value!r}"
        )
    if value > LONGEST_AXIS:
        raise ValueError(
            f"`{name}` must be at most {LONGEST_AXIS}, the longest axis of a "
            f"tensor. Received: {name}={value!r}"
        )
    return int(value)


def check_array(
    name,
    value,
    axes=None,
    sizes=None,
    kind="real",
    dtype=None,
    as_numpy=False,
):
    """The one door for arrays: a tensor of what a user gave, or an error.

    Args:
        name: str, of the argument, for the error.
        value: array, tensor, variable, `keras.KerasTensor` (returned as it
            is), or nested lists of numbers.
        axes: what each axis must be: an int, a name such as `"B"`, which
            stands for one size in all arguments that share `sizes`, or None
            for any size; `...` stands for any number of axes. None: any axes.
        sizes: dict from names to sizes. It is filled in here: hand the same
            one to the checks of all arguments of a call. A size that a graph
            does not know fits any.
        kind: `"real"` (integers become floats), `"integer"`, `"bool"`, or
            `"mask"` (numbers become bools).
        dtype: what the result is cast to; None keeps the dtype of an array,
            and makes Keras's `floatx` of integers and of lists of numbers.
        as_numpy: bool, return a NumPy array, which keeps float64 on JAX too.

    Returns:
        Tensor, or NumPy array.

    Raises:
        ValueError: None, text, bools, complex numbers, ragged lists, another
            number of axes, sizes that disagree. It names the argument, what
            was wanted and what arrived.

    Example:

    >>> sizes = {}
    >>> keys = check_array("keys", [[1, 2, 3]], ("n", "D"), sizes)
    >>> keys.shape, keys.dtype, sizes
    (TensorShape([1, 3]), tf.float32, {'n': 1, 'D': 3})
    """
    sizes = {} if sizes is None else sizes
    is_tensor = isinstance(value, (keras.KerasTensor, keras.Variable))
    is_tensor = is_tensor or ops.is_tensor(value)
    is_list = not is_tensor and not hasattr(value, "dtype")
    found = value if is_tensor else _as_numpy(name, value, axes, sizes, kind)
    letters, _ = KINDS[kind]
    if _kind_of(found) not in letters:
        got = type(value).__name__ if value is None else _described(found)
        raise ValueError(f"{_wanted(name, axes, sizes, kind)} Received: {got}")
    shape = tuple(found.shape)
    known = _fitting(shape, axes, sizes)
    if known is None:
        raise ValueError(
            f"{_wanted(name, axes, sizes, kind)} Received: {_described(found)}"
        )
    sizes.update(known)
    if isinstance(value, keras.KerasTensor):
        return value
    if dtype is None and kind == "real":
        if is_list or _kind_of(found) != "f":
            dtype = keras.config.floatx()
    dtype = "bool" if kind == "mask" else dtype
    if as_numpy:
        return np.asarray(ops.convert_to_numpy(found), dtype)
    if dtype is not None and ops.is_tensor(found):
        return ops.cast(found, dtype)
    return ops.convert_to_tensor(found, dtype)


def _as_numpy(name, value, axes, sizes, kind):
    try:
        found = np.asarray(value)
    except Exception as error:  # a ragged list, or what refuses to be one
        raise ValueError(
            f"{_wanted(name, axes, sizes, kind)} "
            f"Received: {type(value).__name__} ({error})"
        ) from error
    empty = kind != "real" and found.size == 0 and not hasattr(value, "dtype")
    return (
        found.astype("bool" if kind == "bool" else "int32") if empty else found
    )


def _kind_of(array):
    """NumPy's letter for the kind of an array's or a tensor's dtype."""
    if isinstance(array, np.ndarray) and array.dtype.kind != "V":
        return array.dtype.kind
    name = str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")
    for start, letter in (
        ("float", "f"),
        ("bfloat", "f"),
        ("uint", "u"),
        ("int", "i"),
        ("bool", "b"),
    ):
        if name.startswith(start):
            return letter
    return "O"


def _fitting(shape, axes, sizes):
    """The named sizes of a shape, or None where it does not fit."""
    if axes is None:
        return {}
    axes, known = list(axes), {}
    if ... in axes:
        at = axes.index(...)
        more = len(shape) - len(axes) + 1
        if more < 0:
            return None
        axes[at : at + 1] = [None] * more
    if len(axes) != len(shape):
        return None
    for axis, size in zip(axes, shape):
        wanted = axis
        if isinstance(axis, str):
            wanted = known.get(axis, sizes.get(axis))
            if size is not None:
                known.setdefault(axis, size)
        if None not in (wanted, size) and wanted != size:
            return None
    return {name: size for name, size in known.items() if name not in sizes}


def _wanted(name, axes, sizes, kind):
    words = KINDS[kind][1]
    if axes is None:
        return f"`{name}` must be an array of {words}."
    shape = ", ".join(
        "..." if axis is ... else "any" if axis is None else str(axis)
        for axis in axes
    )
    shape = f"({shape},)" if len(axes) == 1 else f"({shape})"
    known = [
        f"{axis}={sizes[axis]}"
        for axis in axes
        if isinstance(axis, str) and sizes.get(axis) is not None
    ]
    where = f" with {', '.join(known)}" if known else ""
    return f"`{name}` must be an array {shape} of {words}{where}."


def _described(array):
    dtype = str(getattr(array.dtype, "name", array.dtype))
    return f"shape {tuple(array.shape)}, dtype {dtype.removeprefix('torch.')}"


def check_path(name, path):
    """A `pathlib.Path`, or ValueError unless `path` is a str or a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"`{name}` must be a path. Received: {name}={path!r}")
    return pathlib.Path(path)


def check_batch(name, tensor, size):
    """A tensor, or ValueError unless it has as many rows as a layer that keeps
    a state for each."""
    rows = tensor.shape[0]
    if rows is None:  # in a graph of TensorFlow: when one of them arrives
        import tensorflow as tf

        shape = (size, *tensor.shape[1:])
        return tf.ensure_shape(tensor, shape, name="batch_size_is_fixed")
    if rows != size:
        raise ValueError(
            f"`{name}` must have the batch size that the layer was built for, "
            f"{size}, as it keeps a state for each row. Received: shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor


def is_number(value):
    """True for finite numbers; False for bools, texts and all else."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and type(value) is not bool and bool(np.isfinite(value))


def check_clip(name, value):
    """Raises ValueError unless `value` is None or a positive number."""
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(
            f"`{name}` is the bound of +-{name} and must be positive, or None "
            f"for no clipping. Received: {name}={value!r}"
        )
    return value


def check_bool(name, value):
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={value!r}"
        )
    return value


def check_one_of(name, value, choices):
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {tuple(choices)}. "
            f"Received: {name}={value!r}"
        )
    return value


def check_between(name, value, least, most=np.inf, or_none=False):
    """Raises ValueError unless `value` is a number from `least` to `most`, or
    None where that has a meaning."""
    if value is None and or_none:
        return value
    if not (is_number(value) and least <= value <= most):
        wanted = (
            f"in [{least}, {most}]" if most < np.inf else f"at least {least}"
        )
        raise ValueError(
            f"`{name}` must be {wanted}{', or None' if or_none else ''}. "
            f"Received: {name}={value!r}"
        )
    return value


def check_within(name, value):
    """Raises ValueError unless `value` is above 0 and below 1."""
    if not is_number(value) or not 0.0 < value < 1.0:
        raise ValueError(
            f"`{name}` must be above 0 and below 1. Received: {name}={value!r}"
        )
    return value


def check_share(name, value):
    """Raises ValueError unless `value` is in [0, 1)."""
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(
            f"`{name}` is a dropped share and must be in [0, 1), since "
            f"nothing is left of all. Received: {name}={value!r}"
        )
    return value
