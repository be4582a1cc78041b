"""How near vectors are: cosines, inner products, squared distances.

Axes: B inputs, Q queries, M keys, D width of both.
"""

import numpy as np
from keras import ops

LARGEST = 1e15  # of a component: products of two must be finite in float32
SAMPLE = 63  # keys amid which distances are measured from

SIMILARITIES = ("dot", "cosine", "l2")


def is_sound(vectors):
    """True where all components are numbers that can be computed with."""
    vectors = ops.cast(vectors, "float32")
    return ops.all(ops.abs(vectors) <= LARGEST, axis=-1)


def unit(vectors, xp=ops):
    """Vectors of length 1, or 0 where they are, however small or large they
    are; (..., D). `xp` may be NumPy, for arrays of its own."""
    largest = xp.max(xp.abs(vectors), axis=-1, keepdims=True, initial=0)
    if xp is ops:  # the scale does not matter, nor what it changes with
        largest = ops.stop_gradient(largest)
    # Smaller numbers have few bits, or none where a device takes them for 0.
    is_zero = largest < np.finfo("float32").tiny
    vectors = vectors / xp.where(is_zero, 1, largest)
    squares = xp.sum(vectors * vectors, axis=-1, keepdims=True)
    return xp.where(
        is_zero, 0, vectors / xp.sqrt(xp.where(is_zero, 1, squares))
    )


def similarity_of(queries, keys, similarity):
    """Similarities of vectors, (..., D) and (..., D): (...,) float32."""
    queries, keys = (
        ops.cast(vectors, "float32") for vectors in (queries, keys)
    )
    if similarity == "l2":
        return -ops.sum(ops.square(queries - keys), axis=-1)
    if similarity == "dot":
        return ops.sum(queries * keys, axis=-1)
    cosines = ops.sum(unit(queries) * unit(keys), axis=-1)
    # Rounding may lead beyond 1. Gradients are the cosine's all the same.
    return cosines + ops.stop_gradient(ops.clip(cosines, -1, 1) - cosines)


def places_of_sample(size, xp=np):
    """(SAMPLE,) int32 from 0 to size - 1, where to look for the `middle`; of
    (B, 1) sizes, (B, SAMPLE), with `keras.ops`."""
    steps, last = xp.arange(SAMPLE, dtype="int32"), SAMPLE - 1
    # Their product with the size may be too large for an int32.
    return (size - 1) // last * steps + (size - 1) % last * steps // last


def middle(vectors, xp=ops):
    """A point amid most of (..., SAMPLE, D) vectors, however far some are: the
    medians of the components; (..., 1, D)."""
    half = SAMPLE // 2
    return xp.sort(vectors, axis=-2)[..., half : half + 1, :]


def about_middle(queries, keys, sample, largest=None):
    """Moves queries and keys to the keys' middle, and gives each key a bias.

    `queries @ keys.T + bias` is then -|q - k|^2 / 2 plus a number for each
    query. Far from zero the difference of such products would be rounding.

    Args:
        queries: (..., Q, D).
        keys: (..., M, D).
        sample: (..., SAMPLE, D), some of the keys, whose middle it is.
        largest: float, of components behind the move; None if vectors are
            sound.

    Returns:
        Queries and keys, moved, and the bias (..., M).
    """
    center = ops.stop_gradient(middle(sample))
    queries, keys = queries - center, keys - center
    if largest is not None:
        queries, keys = (
            ops.clip(vectors, -largest, largest) for vectors in (queries, keys)
        )
    return queries, keys, -0.5 * ops.sum(keys * keys, axis=-1)
