"""ScaNN: whether it can be had, and how its trees are built and tuned."""

import functools
import importlib
import math
import os

import numpy as np

FLAT = 16384  # entries up to which all are compared
HASHED = 500_000  # entries beyond which compressed ones are compared
REBUILT = 0.5  # share of entries that are written until a tree is built anew
TRIED = 0.005, 0.05  # likewise, until it is tried again how much of it must be
# searched: a new tree soon, later seldom
WORN = 2.0  # times as much as at first must be searched of a tree to rebuild it
WORTH = 0.25  # share of entries, compared by a tree, from which all are
SAMPLE = 256  # queries that a tree is tried with
FEW = 64  # queries from which on it is; with fewer, keys are taken besides
DISTANCES = {
    "dot": "dot_product",
    "cosine": "dot_product",
    "l2": "squared_l2",
}
BLOCK = 1 << 20  # numbers of keys that are looked at closely at a time
ROUNDING = 1e-9  # of a sum in float64, and more
USUAL = 32  # neighbours, until it is known how many are asked for
MARGIN = 0.2  # of what a tree may miss, that it is to find all the same


@functools.cache
def import_error():
    """None, or a text that says why ScaNN cannot be had here."""
    try:
        importlib.import_module("scann")
    except Exception as error:  # on another TensorFlow a NotFoundError, say
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {text}"
    return None


def check_scann(who, instead):
    """Raises ImportError unless ScaNN can be had.

    Args:
        who: str, what asks for it.
        instead: str, what there is without it.
    """
    reason = import_error()
    if reason is not None:
        raise ImportError(
            f"{who} needs ScaNN, `pip install scann==1.4.2`, which there is "
            f"for Linux on x86-64, beside TensorFlow 2.20. {instead}. "
            f"Received, from `import scann`: {reason}"
        )


def threads():
    """How many threads this process may use at a time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def configured(builder, leaves, is_hashed):
    """A builder of ScaNN's, told what to build."""
    if leaves is not None:
        builder = builder.tree(
            leaves, 1, training_sample_size=100 * leaves, training_iterations=6
        )
    if is_hashed:
        return builder.score_ah(2, 0.2).reorder(100, quantize=True)
    return builder.score_brute_force()


def candidates(top_k, is_hashed):
    """How many to take from ScaNN, and how many it looks at closely. Scores of
    compressed vectors are rough: the best of twice as many are to be found by
    the vectors themselves."""
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
    """The tree that finds enough and compares least.

    Args:
        make: function of a number of leaves, or None for all entries flat, and
            whether vectors are compressed, to a searcher.
        vectors: (M, D), its entries.
        similarity: str, by which they are near.
        queries: (Q, D) float32, which it is tried with.
        top_k: int, K, likewise.
        target: float in (0, 1), the share of neighbours that should be found.
        is_hashed: bool, whether to compress vectors, where that finds enough.
        is_wanted: function that returns False once no tree is.

    Returns:
        Searcher, its leaves, and how many of them to search; or None where
        comparing all entries is as good.
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
    """How many leaves must be searched; half of them are taken for enough.

    Args:
        search: function of a number of leaves, to slots and scores.
        leaves: int, how many the tree has.
        near: function of (Q, n) slots to how close they are, as `closeness`.
        right: (Q, K) the neighbours of each query.
        target: float in (0, 1), the share of them that should be found.

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
    """With how many vectors a query is compared, the leaves' own among them."""
    return leaves + leaves_to_search * size / leaves


def closeness(queries, keys, similarity, slots):
    """How close keys are to queries.

    Args:
        queries: (Q, D).
        keys: (M, D).
        similarity: `"dot"`, `"cosine"`, but for the queries' lengths, or
            `"l2"`.
        slots: (Q, n) ints of keys.

    Returns:
        (Q, n) float64, the larger the nearer.
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
    """The share of right neighbours, or as near ones, that were found.

    Args:
        retrieved: (Q, n) `closeness` of what was found, -inf where nothing
            was.
        right: (Q, K) that of what should be.

    Returns:
        float in [0, 1].
    """
    least = right.min(axis=1, keepdims=True)
    hits = np.sum(retrieved >= least - ROUNDING * np.abs(least), axis=1)
    return float(np.minimum(hits, right.shape[1]).sum() / right.size)
