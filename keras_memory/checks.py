"""Checks of arguments. Errors say what was wanted, why, and what arrived."""

import dataclasses
import functools
import math
import os
import pathlib
import typing

import keras
import ml_dtypes
import numpy as np
from keras import ops

LONGEST_AXIS = 2**31 - 1  # indices of an axis are int32
MOST_LAYERS = 1024  # each is an object, and is traced separately
MOST_SEED = 2**32 - 1  # the limit of `keras.utils.set_random_seed`
ADDRESS_SPACE = 2**47  # bytes that a process can address
NO_LABEL = -1  # label of an example of unknown class

# Kinds of arrays for `check_array`: NumPy's letters of the dtypes that it
# accepts, and the words for errors.
KINDS = {
    "real": ("fiu", "real numbers"),
    "integer": ("iu", "integers"),
    "bool": ("b", "bool"),
    "mask": ("bfiu", "bools, or of 0 and 1"),
    "whole": ("bfiu", "whole numbers"),
    "any": ("bfiu", "numbers"),
}


def plain(value: typing.Any) -> typing.Any:
    """Converts NumPy scalars and arrays without axes to Python's own types,
    which JSON needs.

    Also within lists, tuples and dicts. Other values stay as they are.
    """
    if isinstance(value, np.generic) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    ):
        item = value.item()
        return float(item) if isinstance(item, np.floating) else item
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def plain_tuple(value):
    """Makes a value plain, and a tuple of a list, a tuple or an array."""
    value = value.tolist() if isinstance(value, np.ndarray) else plain(value)
    return tuple(value) if isinstance(value, list) else value


def plain_field(value, wanted):
    """Makes the value of a dataclass field of type `wanted` plain.

    The result is the same after a round trip through JSON: lists become
    tuples, and whole numbers in a float field become floats.
    """
    value = plain_tuple(value)
    is_float = float in (wanted, *typing.get_args(wanted))
    if type(value) is int and is_float and abs(value) < 1e300:
        return float(value)
    return value


def make_plain(instance):
    """Makes all fields of a dataclass plain, even of a frozen one. Call it
    first in `__post_init__`."""
    for field in dataclasses.fields(instance):
        value = plain_field(getattr(instance, field.name), field.type)
        object.__setattr__(instance, field.name, value)


def check_whole(name, value, least=1, largest=None, alternatives=""):
    """Returns an int; ValueError unless `value` is an integer from `least` to
    `largest`. `alternatives` names other allowed values in the error."""
    value = plain(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (largest is not None and value > largest):
        wanted = f"of at least {least}"
        if whole and value > least:
            wanted = f"from {least} to {largest}"
        raise ValueError(
            f"`{name}` must be an integer {wanted}{alternatives}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def check_size(name, value, least=1, alternatives=""):
    """Returns an int; ValueError unless `value` is an integer from `least` to
    the longest axis. `alternatives` names other allowed values in the error."""
    value = check_whole(name, value, least, alternatives=alternatives)
    if value > LONGEST_AXIS:
        raise ValueError(
            f"`{name}` must be at most {LONGEST_AXIS}, the longest axis of a "
            f"tensor. Received: {name}={value!r}"
        )
    return value


def check_layers(name, value):
    """Returns an int; ValueError unless `value` is a number of layers, or of
    other parts that are traced one by one."""
    value = check_whole(name, value)
    if value > MOST_LAYERS:
        raise ValueError(
            f"`{name}` must be at most {MOST_LAYERS}, since each one is made "
            f"and traced separately. Received: {name}={value!r}"
        )
    return value


def check_seed(name, value):
    """Returns an int or None; ValueError unless `value` is a seed or None."""
    if value is None:
        return None
    return check_whole(name, value, 0, MOST_SEED, alternatives=", or None")


def check_bytes(what, sizes, dtype="float32", instead="", on_host=False):
    """Raises ValueError unless an array fits into the machine's memory.

    Call it before making an array whose size depends on an argument.

    Args:
        what: str, name of the array, for the error.
        sizes: list with a pair for each axis: the name of the argument that
            sets its size, and the size. None counts as 1.
        dtype: str, dtype of the array.
        instead: str, a sentence with an alternative, for the error.
        on_host: bool. False: the array may be on an accelerator, whose memory
            size Keras does not know. If there is one, only sizes that no
            process can address are rejected.
    """
    shape = [1 if size is None else int(size) for _, size in sizes]
    name = keras.backend.standardize_dtype(dtype)
    wanted = math.prod(shape) * np.dtype(name).itemsize
    limit = machine_bytes()
    reason = ""
    if max(shape, default=0) > LONGEST_AXIS:
        reason = f"an axis of a tensor has at most {LONGEST_AXIS} entries"
    elif wanted > ADDRESS_SPACE or (
        limit is not None
        and wanted > limit
        and (on_host or not has_accelerator())
    ):
        size = "less" if limit is None else f"only {_in_words(limit)} of"
        reason = f"this machine has {size} memory"
    if reason:
        product = " x ".join(f"{name}={size}" for name, size in sizes)
        raise ValueError(
            f"{what} would take {_in_words(wanted)}, but {reason}. "
            f"{instead}{' ' if instead else ''}Received: {product}, {dtype}"
        )


def _in_words(size):
    units = ("EB", 10**18), ("PB", 10**15), ("TB", 10**12), ("GB", 10**9)
    name, unit = next((pair for pair in units if size >= pair[1]), units[-1])
    digits = ".3g" if size < 100 * unit else ",.0f"
    return f"{size / unit:{digits}} {name}"


@functools.cache
def machine_bytes():
    """Bytes of memory that this process may use; None if unknown."""
    limits = []
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        limits.append(pages * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # Windows
        pass
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits.append(soft)  # negative if there is no limit
    except (ImportError, AttributeError):  # Windows
        pass
    for path in ("memory.max", "memory/memory.limit_in_bytes"):
        try:  # the limit of the container, if there is one
            limits.append(int(pathlib.Path("/sys/fs/cgroup", path).read_text()))
        except (OSError, ValueError):
            pass
    return min((limit for limit in limits if limit > 0), default=None)


def has_accelerator():
    """Whether the backend sees an accelerator."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return torch.cuda.is_available()
    if backend not in ("tensorflow", "jax"):
        return False
    devices = keras.distribution.list_devices()
    return any(not device.lower().startswith("cpu") for device in devices)


def check_array(
    name,
    value,
    axes=None,
    sizes=None,
    kind="real",
    dtype=None,
    remedy=None,
    result="tensor",
):
    """Converts an argument to a tensor, or raises an error.

    All array arguments use it, except those of `KNNMemory` and images, which
    are NumPy arrays only.

    Args:
        name: str, name of the argument, for the error.
        value: array, tensor, variable, `keras.KerasTensor` (returned as it
            is), or nested lists of numbers.
        axes: what each axis must be: an int, a name such as `"B"`, which
            stands for one size in all arguments that share `sizes`, or None
            for any size; `...` stands for any number of axes. None: any axes.
        sizes: dict from names to sizes. This function adds to it: pass the
            same dict to the checks of all arguments of a call. Sizes that are
            unknown in a graph fit any size.
        kind: `"real"` (integers become floats), `"integer"`, `"bool"`,
            `"mask"`, `"whole"` or `"any"`: the dtypes that are allowed, and
            the words of the error. Values are not checked.
        dtype: dtype of the result. None keeps the dtype of an array; integers
            and lists of numbers become Keras's `floatx`.
        remedy: str, a sentence for the error about integers that `dtype`
            cannot represent exactly; None allows rounding.
        result: `"tensor"`; `"numpy"`, which keeps float64 on JAX too; or
            `"given"`, the array or tensor as it came, or a NumPy array for
            lists.

    Returns:
        Tensor, or array; see `result`.

    Raises:
        ValueError: the value is None, text, bools, complex numbers or a ragged
            list, or has a wrong number of axes or wrong sizes. The error names
            the argument, what was wanted and what arrived.

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
    array = value if is_tensor else _as_numpy(name, value, axes, sizes, kind)
    letters, _ = KINDS[kind]
    is_dense = type(value).__name__ not in ("RaggedTensor", "SparseTensor")
    if not is_dense or _kind_of(array) not in letters:
        is_named = value is None or not is_dense
        got = type(value).__name__ if is_named else described(array)
        is_number = remedy and _kind_of(array) in KINDS["real"][0]
        wanted = _wanted(name, axes, sizes, kind)
        wanted += f" {remedy}" if is_number else ""
        raise ValueError(f"{wanted} Received: {got}")
    shape = tuple(array.shape)
    known = _fitting(shape, axes, sizes)
    if known is None:
        raise ValueError(
            f"{_wanted(name, axes, sizes, kind)} Received: {described(array)}"
        )
    if dtype is None and kind == "real":
        if is_list or _kind_of(array) != "f":
            dtype = keras.config.floatx()
    if remedy is not None and dtype is not None:
        check_exact(name, array, dtype, remedy)
    sizes.update(known)
    if isinstance(value, keras.KerasTensor) or result == "given":
        return array
    if result == "tensor":
        check_process(name)
    if result == "numpy":
        return np.asarray(ops.convert_to_numpy(array), dtype)
    if dtype is not None and ops.is_tensor(array):
        return ops.cast(array, dtype)
    return ops.convert_to_tensor(array, dtype)


def check_exact(name, array, dtype, remedy):
    """Raises ValueError if a dtype cannot represent integers exactly.

    For NumPy arrays the numbers are checked; for tensors, whose numbers are
    unknown in a graph, the limits of their dtype.

    Args:
        name: str, name of the argument, for the error.
        array: array, tensor or lists; floats may be rounded.
        dtype: str, dtype of the cast.
        remedy: str, a sentence for the error.
    """
    array = array if hasattr(array, "dtype") else np.asarray(array)
    if _kind_of(array) not in KINDS["integer"][0]:
        return
    numbers = array
    if not isinstance(array, np.ndarray):
        limits = np.iinfo(_dtype_name(array))
        numbers = np.array([limits.min, limits.max], limits.dtype)
    is_integer = dtype.startswith(("int", "uint"))
    if is_integer:
        limits = np.iinfo(dtype)
        least, largest = limits.min, limits.max
    else:  # all integers up to this are exact
        largest = 1 << (ml_dtypes.finfo(dtype).nmant + 1)
        least = -largest
    beyond = numbers[(numbers < least) | (numbers > largest)]
    inexact = beyond.tolist()
    if inexact and not is_integer:
        with np.errstate(over="ignore"):
            rounded = beyond.astype(dtype).astype("float64").tolist()
        inexact = [n for n, nearest in zip(inexact, rounded) if n != nearest]
    if inexact:
        got = described(array)
        got = f"{inexact[0]}, {got}" if numbers is array else got
        raise ValueError(
            f"`{name}` must be integers that {dtype} keeps exactly. {remedy} "
            f"Received: {got}"
        )


def _as_numpy(name, value, axes, sizes, kind):
    try:
        array = np.asarray(value)
    except Exception as error:  # a ragged list, or no array at all
        raise ValueError(
            f"{_wanted(name, axes, sizes, kind)} "
            f"Received: {type(value).__name__} ({error})"
        ) from error
    empty = kind != "real" and array.size == 0 and not hasattr(value, "dtype")
    return (
        array.astype("bool" if kind == "bool" else "int32") if empty else array
    )


def _kind_of(array):
    """NumPy's letter for the kind of an array's or a tensor's dtype."""
    if isinstance(array, np.ndarray) and array.dtype.kind != "V":
        return array.dtype.kind
    name = _dtype_name(array)
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


def _dtype_name(array):
    name = str(getattr(array.dtype, "name", array.dtype))
    return name.removeprefix("torch.")


def _fitting(shape, axes, sizes):
    """The named sizes of a shape, or None if it does not fit `axes`."""
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
    description = KINDS[kind][1]
    if axes is None:
        return f"`{name}` must be an array of {description}."
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
    return f"`{name}` must be an array {shape} of {description}{where}."


def described(array):
    """Shape and dtype of an array, in words for an error."""
    return f"shape {tuple(array.shape)}, dtype {_dtype_name(array)}"


# A fork lacks the threads with which a backend computes, and would wait for
# them forever.

_forked_from = None  # id of the parent process, if it had such threads


def _backend_has_threads():
    """Whether the backend may have computed in this process."""
    if keras.backend.backend() == "torch":
        return True  # PyTorch does not tell
    try:
        if keras.backend.backend() == "tensorflow":
            from tensorflow.python.eager import context

            context = context.context_safe()
            return context is not None and context._context_handle is not None
        if keras.backend.backend() == "jax":
            from jax._src import xla_bridge

            return xla_bridge.backends_are_initialized()
    except (ImportError, AttributeError):  # another version: it may have
        return True
    return False


def _after_fork_in_child():
    global _forked_from
    if _backend_has_threads():
        _forked_from = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def check_process(name):
    """Raises RuntimeError in a fork of a process that used the backend.

    Args:
        name: str, name of the computation, for the error.
    """
    backend = keras.backend.backend()
    if _forked_from is None:
        return
    if backend == "torch":
        import torch

        if torch.get_num_threads() == 1:  # as in workers of a `DataLoader`
            return
    raise RuntimeError(
        "The Keras backend must not compute in a fork of a process that used "
        f"{backend}, or it waits forever for missing threads. Start the "
        'process with `multiprocessing.get_context("spawn")`. '
        f"Received: `{name}` in a fork of process {_forked_from}"
    )


def with_size(tensor, axis, size, what):
    """Checks the size of an axis when a TensorFlow graph runs, if the size is
    unknown before.

    Args:
        tensor: tensor.
        axis: int.
        size: int that the axis must have, or None for any.
        what: str, becomes the name of the operation. Errors show this name
            even in XLA, which leaves out messages.
    """
    is_symbolic = isinstance(tensor, keras.KerasTensor)
    if is_symbolic or size is None or tensor.shape[axis] is not None:
        return tensor
    import tensorflow as tf

    shape = list(tensor.shape)
    shape[axis] = size
    return tf.ensure_shape(tensor, shape, name=f"{what}_must_be_{size}")


def check_batch(name, tensor, size):
    """Returns a tensor; ValueError unless it has the batch size of a layer that
    keeps a state for each row."""
    rows = tensor.shape[0]
    if rows is None:  # in a TensorFlow graph: checked when it runs
        what = "rows_of_every_batch_of_a_layer_with_state"
        return with_size(tensor, 0, size, what)
    if rows != size:
        raise ValueError(
            f"`{name}` must have the batch size that the layer was built for, "
            f"{size}, since it keeps a state for each row. Received: shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor


def with_rows_of(tensor, batch):
    """Gives `tensor` the batch size of `batch`, which `check_batch` checked.

    Otherwise a TensorFlow graph knows the number of rows, and may report a
    mismatch with the targets before `check_batch` reports the batch size.
    """
    if batch.shape[0] is not None:
        return tensor
    import tensorflow as tf

    return tensor[: tf.shape(batch)[0]]


def is_number(value):
    """True for finite numbers; False for bools, text and all else."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    try:
        return number and type(value) is not bool and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def check_clip(name, value):
    """Raises ValueError unless `value` is None or a positive number."""
    value = plain(value)
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(
            f"`{name}` must be positive, the bound of +-{name}, or None for no "
            f"clipping. Received: {name}={value!r}"
        )
    return value


def check_bool(name, value, alternatives=""):
    """Returns a bool; ValueError unless `value` is a bool of Python or NumPy.
    `alternatives` names other allowed values in the error."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be True or False{alternatives}. "
            f"Received: {name}={value!r}"
        )
    return value


def check_one_of(name, value, choices):
    """Raises ValueError unless `value` is one of `choices`."""
    value = plain(value)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {tuple(choices)}. "
            f"Received: {name}={value!r}"
        )
    return value


def check_closed(name, value, least, largest=np.inf, or_none=False):
    """Raises ValueError unless `value` is a number from `least` to `largest`,
    or None with `or_none`."""
    value = plain(value)
    if value is None and or_none:
        return value
    if not (is_number(value) and least <= value <= largest):
        wanted = (
            f"in [{least}, {largest}]"
            if largest < np.inf
            else f"at least {least}"
        )
        raise ValueError(
            f"`{name}` must be {wanted}{', or None' if or_none else ''}. "
            f"Received: {name}={value!r}"
        )
    return value


def check_open(name, value):
    """Raises ValueError unless `value` is above 0 and below 1."""
    value = plain(value)
    if not is_number(value) or not 0.0 < value < 1.0:
        raise ValueError(
            f"`{name}` must be above 0 and below 1. Received: {name}={value!r}"
        )
    return value


def check_rate(name, value):
    """Raises ValueError unless `value` is in [0, 1)."""
    value = plain(value)
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(
            f"`{name}` must be in [0, 1): a rate of 1 drops every unit. "
            f"Received: {name}={value!r}"
        )
    return value


def check_labels(y, number, units=None, name="y"):
    """Converts labels to int32 (number,).

    Args:
        y: (number,) or (number, 1) whole numbers, from -1 (no label) to
            `units` - 1; or (number, units) one-hot. Bools count as 0 and 1.
        number: int, number of labels.
        units: int, number of outputs of the model. With one output, labels may
            be any whole numbers. None: the model is not known yet, and labels
            may have any number of classes.
        name: str, name of the argument, for the error.

    Raises:
        ValueError: the shape is wrong, or a label is not a class.
    """
    labels = np.asarray(check_array(name, y, kind="whole", result="given"))
    if labels.ndim == 2:
        width = labels.shape[1]
        if width == 1:
            labels = labels[:, 0]
        elif width and width == (units or width):
            labels = labels.argmax(axis=1)
    if labels.shape != (number,):
        wide = "classes" if units is None else units
        one_hot = "" if units == 1 else f", or ({number}, {wide}) one-hot"
        raise ValueError(
            f"`{name}` must be one label for each input or example: "
            f"({number},) whole numbers{one_hot}. "
            f"Received: shape {np.shape(y)}"
        )
    if labels.dtype.kind == "f" and (labels % 1 != 0).any():
        raise ValueError(
            f"`{name}` must be classes, which are whole numbers. "
            f"Received: {labels.dtype} such as {labels[:3]}"
        )
    if units != 1 and number:
        wanted = f"at least {NO_LABEL}"
        if units is not None:
            wanted = f"in [{NO_LABEL}, {units - 1}]"
        for label in (labels.min(), labels.max()):
            if not NO_LABEL <= label < (units or np.inf):
                raise ValueError(
                    f"`{name}` must be {wanted}. Received: label={int(label)}"
                )
    return labels.astype("int32")
