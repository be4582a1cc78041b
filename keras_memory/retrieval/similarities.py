"""Similarities of vectors: cosines, inner products, squared distances.

Axes: B inputs, Q queries, M keys, D width of both.
"""

import numpy as np
from keras import ops

LARGEST = 1e15  # bound of components, so that products are finite in float32
SAMPLE = 63  # keys whose median is the origin of distances

SIMILARITIES = ("dot", "cosine", "l2")
# The smallest normal numbers.
TINY = {
    "float16": float(np.finfo("float16").tiny),
    "float32": float(np.finfo("float32").tiny),
}


def is_sound(vectors):
    """(...) bool, True if all components are finite and within +-`LARGEST`."""
    vectors = ops.cast(vectors, "float32")
    return ops.all(ops.abs(vectors) <= LARGEST, axis=-1)


def unit(vectors, xp=ops):
    """Normalizes (..., D) vectors of any scale to length 1; zeros stay zeros.

    `xp` is NumPy for NumPy arrays.
    """
    largest = xp.max(xp.abs(vectors), axis=-1, keepdims=True, initial=0)
    if xp is ops:  # the result does not depend on the scale
        largest = ops.stop_gradient(largest)
    # Subnormal numbers have few bits, and some devices flush them to 0. In
    # float16 the bound of float32 would be 0.
    dtype = ops.dtype(vectors) if xp is ops else str(vectors.dtype)
    is_zero = largest < TINY.get(dtype, TINY["float32"])
    vectors = vectors / xp.where(is_zero, 1, largest)
    squares = xp.sum(vectors * vectors, axis=-1, keepdims=True)
    return xp.where(
        is_zero, 0, vectors / xp.sqrt(xp.where(is_zero, 1, squares))
    )


def similarity_of(queries, keys, similarity):
    """Similarities of (..., D) and (..., D) vectors: (...,) float32."""
    queries, keys = (
        ops.cast(vectors, "float32") for vectors in (queries, keys)
    )
    if similarity == "l2":
        return -ops.sum(ops.square(queries - keys), axis=-1)
    if similarity == "dot":
        return ops.sum(queries * keys, axis=-1)
    cosines = ops.sum(unit(queries) * unit(keys), axis=-1)
    # Clips rounding errors beyond 1; the gradient remains the cosine's.
    return cosines + ops.stop_gradient(ops.clip(cosines, -1, 1) - cosines)


def places_of_sample(size, xp=np):
    """(SAMPLE,) int32 from 0 to size - 1: evenly spaced indices of the keys for
    `middle`. With `keras.ops` also (B, 1) sizes: (B, SAMPLE)."""
    steps, last = xp.arange(SAMPLE, dtype="int32"), SAMPLE - 1
    # `steps * size` could overflow int32.
    return (size - 1) // last * steps + (size - 1) % last * steps // last


def middle(vectors, xp=ops):
    """The componentwise median of (..., SAMPLE, D) vectors: (..., 1, D).

    Unlike the mean it stays close to most vectors if a few are far away.
    """
    half = SAMPLE // 2
    return xp.sort(vectors, axis=-2)[..., half : half + 1, :]


def about_middle(queries, keys, sample, largest=None):
    """Centers queries and keys on the keys' median, and gives each key a bias.

    `queries @ keys.T + bias` is then -|q - k|^2 / 2 plus a constant for each
    query. Without centering, differences of large products would be mere
    rounding.

    Args:
        queries: (..., Q, D).
        keys: (..., M, D).
        sample: (..., SAMPLE, D), the keys whose median is the center.
        largest: float, bound to which centered components are clipped; None
            if all are within `LARGEST` already.

    Returns:
        Centered queries and keys, and the bias (..., M).
    """
    center = ops.stop_gradient(middle(sample))
    queries, keys = queries - center, keys - center
    if largest is not None:
        queries, keys = (
            ops.clip(vectors, -largest, largest) for vectors in (queries, keys)
        )
    return queries, keys, -0.5 * ops.sum(keys * keys, axis=-1)
