"""Nearest neighbours, by exact search in the graph."""

import numpy as np
from keras import ops

BLOCK = 16384  # keys that are compared at a time


def nearest(queries, keys, top_k, bias=None):
    """Finds the keys with the largest products with each query.

    Keys are compared a block at a time, so that memory does not grow with
    their number. Nothing is differentiated.

    Args:
        queries: (B, D), any real value.
        keys: (M, D), any real value.
        top_k: int, from 1 to M; a tensor where M is not known.
        bias: (M,) or (B, M), added to the products; -inf leaves a key out.
            None for 0.

    Returns:
        (B, top_k) products with bias, the largest first, and (B, top_k) int32
        indices of the keys. Where fewer than `top_k` are above -inf, the last
        products are -inf and their indices have no meaning.

    Raises:
        ValueError: `top_k` is not from 1 to M.

    Example:

    >>> keys = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], "float32")
    >>> products, indices = nearest(keys[:1], keys, top_k=2)
    >>> indices
    <tf.Tensor: shape=(1, 2), dtype=int32, numpy=array([[2, 0]], dtype=int32)>
    """
    queries, keys = ops.stop_gradient(queries), ops.stop_gradient(keys)
    if bias is not None:
        bias = ops.stop_gradient(bias)
    number = keys.shape[0]
    both = isinstance(number, int) and isinstance(top_k, int)
    if both and not 1 <= top_k <= number:
        raise ValueError(
            "`top_k` must be from 1 to the number of keys. "
            f"Received: top_k={top_k}, keys of shape {tuple(keys.shape)}"
        )
    if not isinstance(number, int) or number <= BLOCK:  # a free one is small
        products = ops.matmul(queries, ops.transpose(keys))
        if bias is not None:
            products = products + bias
        found, places = ops.top_k(products, top_k)
        return found, ops.cast(places, "int32")

    def search(block, found, places):
        # The last block reaches back into the one before, and leaves out what
        # that has seen.
        first = ops.minimum(block * BLOCK, number - BLOCK)
        rows = first + ops.arange(BLOCK, dtype="int32")
        some = ops.slice(keys, (first, 0), (BLOCK, keys.shape[1]))
        products = ops.matmul(queries, ops.transpose(some))
        if bias is not None:
            products = products + ops.take(bias, rows, axis=-1)
        is_new = rows >= block * BLOCK
        products = ops.where(is_new, products, -np.inf)
        products, columns = ops.top_k(products, min(top_k, BLOCK))
        found = ops.concatenate([found, products], axis=1)
        new = first + ops.cast(columns, "int32")
        places = ops.concatenate([places, new], axis=1)
        found, columns = ops.top_k(found, top_k)
        return found, ops.take_along_axis(places, columns, axis=1)

    start = ops.zeros_like(queries[:, :1])
    found = ops.tile(start - np.inf, (1, top_k))
    places = ops.tile(ops.cast(start, "int32"), (1, top_k))
    return ops.fori_loop(
        0,
        -(-number // BLOCK),
        lambda block, carried: search(block, *carried),
        (found, places),
    )
