"""What an access must have, and what its steps must return."""

import inspect
import math

import keras
from keras import ops

from keras_memory.addressing.slot_states import SlotState
from keras_memory.checks import check_size
from keras_memory.checks import described
from keras_memory.checks import plain
from keras_memory.recurrent.interface import StateSpec

ATTRIBUTES = ("interface_size", "read_size", "initial_state", "step")
# Names in a trace that do not come from the dict of a step.
OF_TRACE = ("output", "controller_output")


def check_access(access):
    """Returns the state record of an access; TypeError or ValueError unless
    the access has what `Access` describes."""
    if isinstance(access, type):
        raise TypeError(
            f"`accesses` must have objects such as `{access.__name__}()`, not "
            f"classes. Received: {access!r}"
        )
    name = type(access).__name__
    for attribute in ATTRIBUTES:
        # An AttributeError within a property is the user's own.
        is_there = inspect.getattr_static(access, attribute, access)
        if is_there is access and not hasattr(access, attribute):
            raise TypeError(
                f"`{name}` must have the attribute `{attribute}`: see "
                f"`keras_memory.Access`. Received: {access!r}"
            )
    if not callable(access.step):
        raise TypeError(
            f"`{name}.step` must be a method. Received: {access.step!r}"
        )
    check_size(f"{name}.interface_size", access.interface_size, least=0)
    record = access.initial_state
    _check_record(name, record)
    size = math.prod(record.reads.shape)
    read_size = plain(access.read_size)
    if not isinstance(read_size, int) or read_size != size:
        raise ValueError(
            f"`{name}.read_size` must be the number of entries of `reads`, "
            f"{size} for the shape {record.reads.shape}. "
            f"Received: read_size={access.read_size!r}"
        )
    return record


def _check_record(name, record):
    present = getattr(record, "_fields", ())
    missing = [
        field for field in ("reads", "controller") if field not in present
    ]
    if missing:
        raise TypeError(
            f"`{name}.initial_state` must be a NamedTuple with the fields "
            "`reads` and `controller`, whose default is (). "
            f"Received: {type(record).__name__} without {missing}"
        )
    for field, value in record._asdict().items():
        specs = [value] if field == "reads" else keras.tree.flatten(value)
        is_spec = all(isinstance(spec, StateSpec) for spec in specs)
        if field != "controller" and not is_spec:
            unused = "." if field == "reads" else ", or () for an unused state."
            raise TypeError(
                f"`{name}.initial_state.{field}` must be a `StateSpec`{unused} "
                f"Received: {value!r:.300}"
            )


def check_step(access, before, interface, result):
    """Returns the state record and the dict that a step returned; TypeError or
    ValueError unless they fit the record before the step.

    Only shapes and dtypes that are known without running a graph are checked.
    """
    name = f"{type(access).__name__}.step"
    is_pair = isinstance(result, tuple) and len(result) == 2
    if (
        not is_pair
        or getattr(result[0], "_fields", None) != before._fields
        or not isinstance(result[1], dict)
    ):
        got = type(result).__name__
        if type(result) is tuple:
            got = f"({', '.join(type(part).__name__ for part in result)})"
        raise TypeError(
            f"`{name}` must return the state, a {type(before).__name__}, and a "
            f"dict for `trace`. Received: {got}"
        )
    after, inside = result
    for field, old, new in zip(before._fields, before, after):
        if field != "controller" and not _is_like(old, new):
            raise ValueError(
                f"`{name}` must return `{field}` with the shape and dtype that "
                f"it has before the step: {_in_words(old)}. "
                f"Received: {_in_words(new)}"
            )
    for entry, value in inside.items():
        _check_entry(name, before, interface, entry, value)
    return after, inside


def _is_like(old, new):
    """Whether a state after a step has the shape and dtype of that before."""
    if isinstance(old, SlotState):
        return isinstance(new, SlotState) and new.index == old.index
    olds, news = keras.tree.flatten(old), keras.tree.flatten(new)
    return len(olds) == len(news) and all(
        _is_tensor(after)
        and ops.dtype(after) == ops.dtype(before)
        and _fit(before.shape, after.shape)
        for before, after in zip(olds, news)
    )


def _is_tensor(value):
    return ops.is_tensor(value) or isinstance(value, keras.KerasTensor)


def _fit(wanted, shape):
    """Whether two shapes may be the same: None is unknown, as is a shape
    without rank."""
    if getattr(shape, "rank", 0) is None:
        return True
    return len(wanted) == len(shape) and all(
        a == b or a is None or b is None for a, b in zip(wanted, shape)
    )


def _in_words(value):
    if isinstance(value, tuple):
        return f"({', '.join(map(_in_words, value))})"
    return described(value) if _is_tensor(value) else type(value).__name__


def _check_entry(name, before, interface, entry, value):
    taken = (*OF_TRACE, *before._fields)
    if entry in taken or not isinstance(entry, str):
        raise ValueError(
            f"`{name}` must give the entries for `trace` names other than "
            f"{', '.join(taken)}. Received: {entry!r}"
        )
    shape = getattr(value, "shape", ())
    if getattr(shape, "rank", 0) is None:
        return
    if len(shape) == 0 or not _fit(interface.shape[:1], shape[:1]):
        raise ValueError(
            f"`{name}` must return `{entry}` for `trace` as an array with the "
            f"batch axis first. Received: {value!r:.300}"
        )
