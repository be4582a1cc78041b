"""Exact nearest-neighbor search in the graph.

Axes: B rows of a batch, M or N keys, D width of keys, V width of values, K
neighbors.
"""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.slots import precise_products
from keras_memory.checks import check_array
from keras_memory.checks import check_process
from keras_memory.checks import check_size
from keras_memory.hints import Array

BLOCK = 16384  # keys compared at a time
GROUP = 8  # values in a group, whose maximum is compared first


def nearest(
    queries: Array, keys: Array, top_k: Array, bias: Array | None = None
) -> tuple[Array, Array]:
    """Finds the keys with the largest inner products with each query.

    Keys are compared in blocks, so memory use does not grow with their number.
    No gradient flows.

    Args:
        queries: (B, D), any real value.
        keys: (M, D), any real value.
        top_k: int, from 1 to M; a tensor if M is unknown.
        bias: (M,) or (B, M), added to the products; -inf leaves a key out.
            None for 0.

    Returns:
        (B, top_k) biased products, the largest first, and (B, top_k) int32
        indices of the keys. If fewer than `top_k` keys are above -inf, the
        last products are -inf and their indices have no meaning.

    Raises:
        ValueError: `top_k` is not from 1 to M; wrong shapes or dtypes.

    Example:

    >>> keys = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], "float32")
    >>> products, indices = nearest(keys[:1], keys, top_k=2)
    >>> indices
    <tf.Tensor: shape=(1, 2), dtype=int32, numpy=array([[2, 0]], dtype=int32)>
    """
    check_process("nearest")
    sizes = {}
    queries = check_array("queries", queries, ("B", "D"), sizes)
    keys = check_array("keys", keys, ("M", "D"), sizes)
    queries, keys = ops.stop_gradient(queries), ops.stop_gradient(keys)
    if bias is not None:
        dtype = keras.backend.result_type(ops.dtype(queries), ops.dtype(keys))
        bias = check_array("bias", bias, (..., "M"), sizes, dtype=dtype)
        bias = ops.stop_gradient(bias)
        if len(bias.shape) != 1:
            check_array("bias", bias, ("B", "M"), sizes)
    number = keys.shape[0]
    are_known = isinstance(number, int) and isinstance(top_k, int)
    if are_known and not 1 <= top_k <= number:
        raise ValueError(
            "`top_k` must be from 1 to the number of keys. "
            f"Received: top_k={top_k}, keys of shape {tuple(keys.shape)}"
        )
    if not ops.is_tensor(top_k):
        top_k = check_size("top_k", top_k)
    if not isinstance(number, int) or number <= BLOCK:  # unknown: small
        products = precise_products(queries, ops.transpose(keys))
        if bias is not None:
            products = products + bias
        best, places = ops.top_k(products, top_k)
        return best, ops.cast(places, "int32")

    def search(block, best, places):
        # The last block starts early to be full; the keys that it shares with
        # the block before are left out.
        first = ops.minimum(block * BLOCK, number - BLOCK)
        rows = first + ops.arange(BLOCK, dtype="int32")
        block_keys = ops.slice(keys, (first, 0), (BLOCK, keys.shape[1]))
        products = precise_products(queries, ops.transpose(block_keys))
        if bias is not None:
            products = products + ops.take(bias, rows, axis=-1)
        is_new = rows >= block * BLOCK
        products = ops.where(is_new, products, -np.inf)
        products, columns = largest(products, min(top_k, BLOCK))
        best = ops.concatenate([best, products], axis=1)
        new = first + ops.cast(columns, "int32")
        places = ops.concatenate([places, new], axis=1)
        best, columns = ops.top_k(best, top_k)
        return best, ops.take_along_axis(places, columns, axis=1)

    start = ops.zeros_like(queries[:, :1])
    best = ops.tile(start - np.inf, (1, top_k))
    places = ops.tile(ops.cast(start, "int32"), (1, top_k))
    return ops.fori_loop(
        0,
        -(-number // BLOCK),
        lambda block, carried: search(block, *carried),
        (best, places),
    )


def largest(values, top_k):
    """As `ops.top_k`: the largest values of the last axis, and their indices.

    Faster for a large axis, mostly on GPUs, where `ops.top_k` sorts all values.
    """
    number = values.shape[-1]
    groups = -(-number // GROUP)
    if groups <= top_k or 0 in values.shape:  # max needs values
        return ops.top_k(values, top_k)
    # The K largest values lie in the K groups with the largest maxima.
    more = groups * GROUP - number
    if more:
        widths = [*[(0, 0)] * (len(values.shape) - 1), (0, more)]
        values = ops.pad(values, widths, constant_values=-np.inf)
    shape = tuple(ops.shape(values)[:-1])
    maxima = ops.max(ops.reshape(values, (*shape, GROUP, groups)), axis=-2)
    _, group = largest(maxima, top_k)
    members = groups * ops.arange(GROUP, dtype="int32")[:, None]
    places = ops.cast(group, "int32")[..., None, :] + members
    places = ops.reshape(places, (*shape, GROUP * top_k))
    values = ops.take_along_axis(values, places, axis=-1)
    values_found, of_places = ops.top_k(values, top_k)
    places = ops.take_along_axis(places, of_places, axis=-1)
    # If all values are -inf, an index may point to padding.
    return values_found, ops.minimum(places, number - 1)


class Neighbours(NamedTuple):
    """The result of a search: the neighbors of each query, the nearest first.

    Args:
        scores: (B, ..., K) float32, larger is nearer: the inner product, the
            cosine, or minus the squared distance; -inf where nothing was found.
        indices: (B, ..., K) int32, slots from 0; -1 where nothing was found.
        mask: (B, ..., K) bool, False where nothing was found: the memory has
            fewer entries, or the query has a NaN, an infinity or a component
            beyond 1e15.
        keys: (B, ..., K, D), as added; 0 where nothing was found.
        values: (B, ..., K, V), likewise, in the dtype of values.
    """

    scores: Any
    indices: Any
    mask: Any
    keys: Any
    values: Any
