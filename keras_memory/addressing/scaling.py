"""Arithmetic that holds up to the largest finite numbers of a dtype.

The square of a number overflows from the root of the largest one on: a norm,
a variance or an inner product of large numbers is then infinite, and what is
divided by it NaN. Here such numbers are first divided by a scale, which the
result does not depend on.
"""

from keras import ops

# Squares of numbers up to this can be added up, and such sums multiplied,
# without overflow.
LARGEST_FACTOR = {"float32": 2.0**30, "float64": 2.0**250}


def at_least_float32(dtype):
    """The dtype to take squares in: for these float16 has too small a range,
    and bfloat16 too few digits."""
    return dtype if dtype in LARGEST_FACTOR else "float32"


def in_range(x, axis):
    """Scales vectors down whose squares may overflow.

    Args:
        x: float32 or float64 array; any finite value.
        axis: int, the axis of the vectors.

    Returns:
        `x` times a scale, and that scale, in (0, 1], with an axis of size 1.
        It is exactly 1 for vectors of entries up to `LARGEST_FACTOR`. It has
        no gradient: a result that does not depend on it needs none.
    """
    limit = LARGEST_FACTOR[ops.dtype(x)]
    # Keras takes no maximum of nothing without an `initial` one.
    largest = ops.max(ops.abs(x), axis=axis, keepdims=True, initial=limit)
    scale = ops.stop_gradient(limit / largest)
    return x * scale, scale
