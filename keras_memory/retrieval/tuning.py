"""ScaNN: guarded import, and how its trees are built and tuned."""

import functools
import importlib
import math
import os

import numpy as np

FLAT = 16384  # no tree is built for at most this many entries
HASHED = 500_000  # vectors are compressed for more entries than this
REBUILT = 0.5  # rebuild a tree when this share of its entries was written
# Retune a tree when this share of its entries was written: the first number
# for a new tree, the second for an old one.
TRIED = 0.005, 0.05
WORN = 2.0  # rebuild a tree that must search this many times as much as new
WORTH = 0.25  # a tree must compare less than this share of the entries
SAMPLE = 256  # most queries to tune a tree with
FEW = 64  # with fewer queries than this, keys are added as queries
DISTANCES = {
    "dot": "dot_product",
    "cosine": "dot_product",
    "l2": "squared_l2",
}
BLOCK = 1 << 20  # components of keys in memory at a time, in `closeness`
ROUNDING = 1e-9  # relative tolerance, above the rounding of float64 sums
USUAL = 32  # assumed `top_k`, until a search gives it
MARGIN = 0.2  # trees are tuned to miss this share less than they may


@functools.cache
def import_error():
    """None if ScaNN can be imported, else the reason why not, as text."""
    try:
        importlib.import_module("scann")
    except Exception as error:  # NotFoundError on another TensorFlow
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {text}"
    return None


def check_scann(who, instead):
    """Raises ImportError unless ScaNN can be imported.

    Args:
        who: str, the class or option that needs ScaNN.
        instead: str, the alternative without ScaNN.
    """
    reason = import_error()
    if reason is not None:
        raise ImportError(
            f"{who} needs ScaNN (`pip install scann==1.4.2`), which requires "
            f"Linux on x86-64 and TensorFlow 2.20. {instead}. "
            f"Received, from `import scann`: {reason}"
        )


def threads():
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def configured(builder, leaves, is_hashed):
    """Configures a ScaNN builder: flat or a tree, compressed or not."""
    if leaves is not None:
        builder = builder.tree(
            leaves, 1, training_sample_size=100 * leaves, training_iterations=6
        )
    if is_hashed:
        return builder.score_ah(2, 0.2).reorder(100, quantize=True)
    return builder.score_brute_force()


def candidates(top_k, is_hashed):
    """The number of neighbors to ask ScaNN for, and the number it reorders.

    Scores of compressed vectors are rough, so twice as many neighbors are
    requested; the caller picks the best by exact scores.
    """
    return (2 * top_k, 5 * top_k + 50) if is_hashed else (top_k, -1)


def best_tree(
    make,
    vectors,
    similarity,
    queries,
    top_k,
    target,
    is_hashed,
    is_wanted=lambda: True,
):
    """Builds the tree that reaches the target recall with fewest comparisons.

    Args:
        make: function of a number of leaves (None: flat, no tree), and whether
            vectors are compressed, which returns a searcher.
        vectors: (M, D), the entries.
        similarity: str; see `closeness`.
        queries: (Q, D) float32, to tune the tree with.
        top_k: int, K, to tune the tree for.
        target: float in (0, 1), recall to reach.
        is_hashed: bool, whether to try compressed vectors first.
        is_wanted: function that returns False to cancel the build.

    Returns:
        Searcher, its number of leaves, and the number of leaves to search; or
        None if no tree is worth it, or if the build was canceled.
    """
    size = len(vectors)
    right, _ = make(None, False).search(queries, top_k)
    near = functools.partial(closeness, queries, vectors, similarity)
    best, least = None, WORTH * size
    for compress in (True, False) if is_hashed else (False,):
        for leaves in (math.isqrt(size), 2 * math.isqrt(size)):
            if not is_wanted():
                return None
            tree = make(leaves, compress)
            search = functools.partial(tree.search, queries, top_k)
            fewest = fewest_leaves(search, leaves, near, right, target)
            number = compared(size, leaves, fewest)
            if number < least:
                best, least = (tree, leaves, fewest), number
        if best is not None:
            break
    return best


def fewest_leaves(search, leaves, near, right, target):
    """The fewest leaves to search for the target recall, at most half of them.

    Half of the leaves are assumed to suffice.

    Args:
        search: function of a number of leaves, which returns slots and scores.
        leaves: int, number of leaves of the tree.
        near: function of (Q, n) slots, which returns their `closeness`.
        right: (Q, K) slots of the true neighbors of each query.
        target: float in (0, 1), recall to reach.

    Returns:
        int.
    """
    target = 1 - (1 - MARGIN) * (1 - target)
    right = near(np.asarray(right))
    low, high = 0, leaves // 2
    while high - low > 1:
        middle = (low + high) // 2
        slots, scores = map(np.asarray, search(middle))
        retrieved = np.where(scores > -np.inf, near(slots), -np.inf)
        enough = recall(retrieved, right) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high


def compared(size, leaves, leaves_to_search):
    """How many vectors a query is compared with, centers of leaves included."""
    return leaves + leaves_to_search * size / leaves


def closeness(queries, keys, similarity, slots):
    """How close keys are to queries, in float64.

    Args:
        queries: (Q, D).
        keys: (M, D).
        similarity: `"dot"`, `"cosine"` (times the query's length), or `"l2"`.
        slots: (Q, n) ints, indices of keys.

    Returns:
        (Q, n) float64, larger is nearer.
    """
    result = np.empty(slots.shape)
    step = max(1, BLOCK // max(1, slots.shape[1] * keys.shape[1]))
    for begin in range(0, len(queries), step):
        block = slice(begin, begin + step)
        near = keys[slots[block]].astype("float64")
        query = queries[block].astype("float64")
        if similarity == "l2":
            near -= query[:, None]
            result[block] = -np.einsum("qnd,qnd->qn", near, near)
            continue
        result[block] = np.einsum("qnd,qd->qn", near, query)
        if similarity == "cosine":
            squares = np.einsum("qnd,qnd->qn", near, near)
            result[block] /= np.sqrt(np.where(squares > 0, squares, 1))
    return result


def recall(retrieved, right):
    """The share of neighbors found; entries as near as a neighbor count too.

    Args:
        retrieved: (Q, n) `closeness` of the entries found, -inf for none.
        right: (Q, K) `closeness` of the true neighbors.

    Returns:
        float in [0, 1].
    """
    least = right.min(axis=1, keepdims=True)
    hits = np.sum(retrieved >= least - ROUNDING * np.abs(least), axis=1)
    return float(np.minimum(hits, right.shape[1]).sum() / right.size)
