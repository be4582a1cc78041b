"""Approximate nearest neighbours by ScaNN, in host memory.

Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector
Quantization" (arXiv 1908.10396). ScaNN crashes, or answers wrongly, on what it
does not expect: whoever calls what is here has checked vectors and sizes.
"""

import functools
import importlib
import math
import os
import warnings

import numpy as np

FLAT = 16384  # entries up to which all are compared
HASHED = 500_000  # entries beyond which compressed ones are compared
REBUILT = 0.25  # share of entries that are written until a tree is built anew
WORTH = 0.25  # share of entries, compared by a tree, from which all are
SAMPLE = 256  # queries that a new tree is tried with
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


class ScannRow:
    """The index of one row of a memory, which follows what is written there.

    Up to `FLAT` entries all are compared. Beyond, a tree is built beside the
    searches, of two sizes, each with as many of its leaves searched as find
    `target_recall` of what a sample of the latest queries should find; the one
    that compares fewer entries takes over, unless comparing all is as good. It
    follows what is written, and is built anew when `REBUILT` of its entries
    have been.

    Args:
        vectors: function of an array of slots: their (n, D) float32 vectors,
            finite, as they are compared.
        distance: `"dot_product"` or `"squared_l2"`.
        target_recall: float in (0, 1).
        lock: held by whoever calls a method; the builder takes it to swap.
        builder: `concurrent.futures.Executor` that builds trees, or None: who
            writes waits for them.
    """

    def __init__(self, vectors, distance, target_recall, lock, builder):
        self._vectors = vectors
        self._distance = distance
        self._target = 1 - (1 - MARGIN) * (1 - target_recall)
        self._lock = lock
        self._builder = builder
        self._epoch = 0
        self.clear()

    def clear(self):
        """Forgets all entries."""
        self.size = 0
        self.leaves = None  # of the tree, and how many of them are searched
        self.leaves_to_search = None
        self.building = None  # a future, while a tree is built
        self._epoch += 1
        self._searcher = None
        self._is_hashed = False
        self._since = self._built_of = 0  # entries written, since how many were
        self._changed = None  # slots written since a tree began to be built
        self._latest = None  # queries
        self._top_k = 32

    def write(self, slots):
        """Follows what was written.

        Args:
            slots: (n,) different ints, n at least 1; once all are written,
                none is left out between 0 and the largest ever.
        """
        slots = np.sort(slots)  # ScaNN numbers new ones as they come
        before, self.size = self.size, max(self.size, int(slots.max()) + 1)
        try:
            if self._searcher is not None:
                self._upsert(self._searcher, slots, before)
        except Exception as error:  # it may be half written
            self._searcher, self._built_of = None, 0
            _warn("followed what was written", error)
        if self._changed is not None:
            self._changed.append(slots)
        self._since += len(slots)
        if self.size > FLAT and self._changed is None:
            if self._since >= REBUILT * self._built_of:
                self._begin()

    def wait(self):
        """Waits for a tree that is being built; without the lock."""
        building = self.building
        if building is not None:
            building.result()

    def _upsert(self, searcher, slots, size):
        """Slots below `size` are there, the others are new."""
        places = [int(slot) if slot < size else None for slot in slots]
        searcher.upsert(places, self._vectors(slots), len(places))

    def search(self, queries, top_k):
        """Finds the nearest entries.

        Args:
            queries: (Q, D) float32, finite, Q at least 1.
            top_k: int, from 1 to `size`.

        Returns:
            (Q, top_k) slots, and float32 scores, the larger the nearer, -inf
            where nothing was found.
        """
        step = -(-len(queries) // SAMPLE)
        self._latest, self._top_k = queries[::step].copy(), top_k
        if self._searcher is None:
            self._searcher = self._build(self._vectors(np.arange(self.size)))
            self.leaves = self.leaves_to_search = None
            self._is_hashed = False
        slots, scores = self._search(
            self._searcher,
            queries,
            top_k,
            self.leaves_to_search,
            self._is_hashed,
        )
        if not self._is_hashed:
            return slots, scores
        # Scores of compressed vectors are rough: the best of twice as many.
        vectors = self._vectors(slots.ravel()).reshape(*slots.shape, -1)
        if self._distance == "squared_l2":
            exact = -np.sum((vectors - queries[:, None]) ** 2, axis=-1)
        else:
            exact = np.einsum("qkd,qd->qk", vectors, queries)
        exact = np.where(scores > -np.inf, exact, -np.inf)
        best = np.argsort(-exact, axis=1)[:, :top_k]
        return (
            np.take_along_axis(slots, best, axis=1),
            np.take_along_axis(exact, best, axis=1),
        )

    def _search(self, searcher, queries, top_k, leaves_to_search, is_hashed):
        """As `search`; of compressed vectors twice as many."""
        before_reordering = -1
        if is_hashed:
            before_reordering, top_k = 5 * top_k + 50, 2 * top_k
        batch = min(256, max(16, len(queries) // (4 * threads())))
        slots, distances = searcher.search_batched(
            queries,
            top_k,
            before_reordering,
            leaves_to_search or -1,
            True,
            batch,
        )
        if self._distance == "squared_l2":
            distances = -distances
        # Where there are fewer, ScaNN answers with NaN.
        return slots, np.where(np.isnan(distances), -np.inf, distances)

    def _build(self, vectors, leaves=None, is_hashed=False, training_threads=1):
        from scann.scann_ops.py import scann_ops_pybind

        builder = scann_ops_pybind.builder(vectors, 10, self._distance)
        if leaves is not None:
            builder = builder.tree(
                leaves,
                1,
                training_sample_size=min(len(vectors), 100 * leaves),
                training_iterations=6,
            )
        if is_hashed:
            builder = builder.score_ah(2, 0.2).reorder(100, quantize=True)
        else:
            builder = builder.score_brute_force()
        builder = builder.set_n_training_threads(training_threads)
        searcher = builder.build().searcher
        searcher.set_num_threads(threads())
        return searcher

    # The builder's side.

    def _begin(self):
        self._changed = []
        self._since, self._built_of = 0, self.size
        if self._builder is None:
            self._build_tree(self._epoch, self.size)
        else:
            self.building = self._builder.submit(
                self._build_tree, self._epoch, self.size
            )

    def _build_tree(self, epoch, size):
        try:
            self._try_to_build(epoch, size)
        except Exception as error:  # the index before serves on
            with self._lock:
                if self._epoch == epoch:
                    self._changed = None
            _warn("built a tree", error)

    def _try_to_build(self, epoch, size):
        # What is written meanwhile may be copied in parts: it is in `_changed`.
        vectors = self._vectors(np.arange(size))
        queries, top_k = self._latest, self._top_k
        if queries is None:
            step = -(-size // SAMPLE)
            queries = vectors[::step]
        best = self._best_tree(vectors, queries, top_k)
        with self._lock:
            if self._epoch != epoch:  # it was cleared
                return
            changed, self._changed = self._changed, None
            if best is None:
                if self.leaves is not None:
                    self._searcher = None  # flat, at the next search
                return
            if changed:
                slots = np.unique(np.concatenate(changed))
                self._upsert(best[0], slots, size)
            self._searcher, self.leaves, self.leaves_to_search = best
            self._is_hashed = size > HASHED

    def _best_tree(self, vectors, queries, top_k):
        """The searcher, its leaves, and how many to search; or None."""
        size, is_hashed = len(vectors), len(vectors) > HASHED
        flat = self._build(vectors)
        right, _ = self._search(flat, queries, top_k, None, False)
        del flat
        best, least = None, WORTH * size
        for leaves in (math.isqrt(size), 2 * math.isqrt(size)):
            tree = self._build(vectors, leaves, is_hashed)
            low, high = 0, leaves // 2  # at `high` it is taken for enough
            while high - low > 1:
                middle = (low + high) // 2
                slots, scores = self._search(
                    tree, queries, top_k, middle, is_hashed
                )
                share = recall(slots, scores > -np.inf, right)
                low, high = (
                    (low, middle) if share >= self._target else (middle, high)
                )
            compared = leaves + high * size / leaves
            if compared < least:
                best, least = (tree, leaves, high), compared
        return best


def _warn(what, error):
    warnings.warn(
        f"ScaNN should have {what}; searches go on with exact scores of all "
        f"entries, or with the tree before. Received: {error!r}",
        RuntimeWarning,
        stacklevel=2,
    )


def recall(slots, found, right):
    """The share of right neighbours that were found.

    Args:
        slots: (Q, K) what was found.
        found: (Q, K) bool, where something was.
        right: (Q, K) what should be.

    Returns:
        float in [0, 1].
    """
    hits = [
        np.isin(row, one[some], assume_unique=True).sum()
        for row, one, some in zip(right, slots, found)
    ]
    return float(np.sum(hits) / right.size)
