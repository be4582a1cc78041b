"""Similarities of inputs and examples, and search for the nearest examples.

Axes: B inputs, M examples, D width of both, K nearest examples. Gradients flow
through the similarities. For the cosine, queries and keys must be unit vectors.
"""

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.slots import precise_products
from keras_memory.retrieval.exact import nearest
from keras_memory.retrieval.similarities import LARGEST
from keras_memory.retrieval.similarities import about_middle
from keras_memory.retrieval.similarities import places_of_sample

FEW = 2**17  # components of the largest memory compared by differences
FARTHEST = 1e37  # limit of squared distances: infinity has no gradient


def compare(queries, keys, similarity, mask=None):
    """The similarity of each input and each example.

    Args:
        queries: (B, D).
        keys: (M, D), or (B, M, D), a memory for each input.
        similarity: str, `"cosine"`, `"dot"` or `"l2"`; `"l2"` is minus the
            squared distance, perhaps plus a constant for each input.
        mask: (M,) or (B, M) bool, False for examples that are left out; None
            for all.

    Returns:
        (B, M), -inf for examples that are left out.
    """
    if similarity == "l2":
        similarities = _minus_squares(queries, keys, mask)
    else:
        similarities = _products(queries, keys)
    return similarities if mask is None else _least_unless(mask, similarities)


def nearest_examples(queries, keys, top_k, similarity, mask=None):
    """Finds the examples with the largest similarities.

    Args:
        queries, keys, similarity, mask: see `compare`.
        top_k: int, K; M if that is smaller.

    Returns:
        (B, K) similarities, -inf for examples that are left out, and their
        int32 indices. No gradient flows.
    """
    size = keys.shape[-2]
    if isinstance(size, int):
        top_k = min(top_k, size)
    else:
        top_k = _smaller(top_k, ops.shape(keys)[-2])
    is_l2 = similarity == "l2"
    if len(keys.shape) == 3 or (is_l2 and _are_few(keys)):
        similarities = compare(queries, keys, similarity, mask)
        similarities, indices = ops.top_k(
            ops.stop_gradient(similarities), top_k
        )
        return similarities, ops.cast(indices, "int32")
    bias = ops.zeros_like(keys[:, 0])
    if is_l2:
        sample = _sample_of(keys, mask)
        queries, keys, bias = about_middle(queries, keys, sample, LARGEST)
    bias = bias if mask is None else _least_unless(mask, bias)
    return nearest(queries, keys, top_k, bias)


def _products(queries, keys):
    """Inner products of (B, D) and (M, D) or (B, M, D): (B, M)."""
    if len(keys.shape) == 2:
        return ops.matmul(queries, ops.transpose(keys))
    return ops.matmul(keys, queries[:, :, None])[:, :, 0]


def _minus_squares(queries, keys, mask):
    """-|q - k|^2 for each query q and key k, plus a constant for each query.

    Few keys: sums of squared differences, so no key affects the rounding of
    another one; the constant is 0. Many keys: inner products about the median
    of the keys that are not masked.
    """
    if len(keys.shape) == 2 and keys.shape[0] is None:
        return ops.cond(
            ops.shape(keys)[0] * keys.shape[1] <= FEW,
            lambda: _by_differences(queries, keys),
            lambda: _by_products(queries, keys, mask),
        )
    if _are_few(keys):
        return _by_differences(queries, keys)
    return _by_products(queries, keys, mask)


def _by_differences(queries, keys):
    squares = ops.sum(ops.square(queries[:, None] - keys), axis=-1)
    return -ops.where(squares > FARTHEST, FARTHEST, squares)


def _by_products(queries, keys, mask):
    sample = _sample_of(keys, mask)
    queries, keys, bias = about_middle(queries, keys, sample, LARGEST)
    return 2.0 * (precise_products(queries, ops.transpose(keys)) + bias)


def _are_few(keys):
    """Whether the (B, M, D) array of all differences is affordable.

    If each input has its own memory, an array of that size exists already.
    """
    number = keys.shape[-2]
    known = len(keys.shape) == 2 and isinstance(number, int)
    return not known or number * keys.shape[-1] <= FEW


def _sample_of(keys, mask):
    """(SAMPLE, D) of the (M, D) keys that are not masked for all inputs."""
    if mask is None:
        places = places_of_sample(ops.shape(keys)[0], ops)
    else:
        counts = mask if len(mask.shape) == 1 else ops.any(mask, axis=0)
        number = ops.maximum(ops.sum(ops.cast(counts, "int32")), 1)
        order = ops.argsort(ops.cast(~counts, "int32"))
        places = ops.take(order, places_of_sample(number, ops))
    return ops.take(keys, places, axis=0)


def _least_unless(counts, similarity):
    return ops.where(counts, similarity, -np.inf)


def _smaller(number, size):
    """The minimum of a number and a size unknown while tracing."""
    if keras.backend.backend() == "jax":  # symbolic size in an export
        from jax import core

        return core.min_dim(number, size)
    return ops.minimum(number, size)
