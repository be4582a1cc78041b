"""Arithmetic that works up to the largest finite numbers of a dtype.

The square of a number above the root of the largest one overflows: a norm, a
variance or an inner product of large numbers is infinite, and division by it
gives NaN. Here such numbers are first divided by a scale that cancels in the
result.
"""

from keras import ops

# Sums of squares of numbers up to this, and products of two such sums, do not
# overflow.
LARGEST_FACTOR = {"float32": 2.0**30, "float64": 2.0**250}


def at_least_float32(dtype):
    """The dtype for squares: float16 has too small a range for them, and
    bfloat16 too few digits."""
    return dtype if dtype in LARGEST_FACTOR else "float32"


def in_range(x, axis):
    """Scales down vectors whose squares may overflow.

    Args:
        x: float32 or float64 array; any finite value.
        axis: int, the axis of the vectors.

    Returns:
        `x` times a scale, and the scale, in (0, 1], with an axis of size 1.
        The scale is exactly 1 for vectors of entries up to `LARGEST_FACTOR`.
        It has no gradient, which results that do not depend on it do not need.
    """
    limit = LARGEST_FACTOR[ops.dtype(x)]
    # Without `initial`, Keras rejects the maximum of an empty axis.
    largest = ops.max(ops.abs(x), axis=axis, keepdims=True, initial=limit)
    scale = ops.stop_gradient(limit / largest)
    return x * scale, scale
