"""Checks of arguments: what was wanted, why, what arrived."""

import numpy as np


def check_size(name, value, least=1, others=""):
    """An int, or ValueError unless `value` is an integer of at least `least`;
    `others` says what else it may be."""
    whole = isinstance(value, (int, np.integer)) and type(value) is not bool
    if not whole or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}{others}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


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
