"""Approximate nearest neighbours by ScaNN, in host memory or in a SavedModel.

Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector
Quantization" (arXiv 1908.10396). ScaNN crashes, or answers wrongly, on what it
does not expect: whoever calls what is here has checked vectors and sizes.
Axes: Q queries, M entries, D width of keys, V width of values, K neighbours.
"""

import contextlib
import functools
import importlib
import math
import os
import threading
import uuid
import warnings
import weakref
import zlib
from concurrent import futures

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_exact
from keras_memory.checks import check_one_of
from keras_memory.checks import check_process
from keras_memory.checks import check_size
from keras_memory.checks import check_within
from keras_memory.retrieval import KEY_REMEDY
from keras_memory.retrieval import SIMILARITIES
from keras_memory.retrieval import VALUE_REMEDY
from keras_memory.retrieval import Neighbours
from keras_memory.retrieval import check_bytes_of_entries
from keras_memory.retrieval import check_value_dtype
from keras_memory.retrieval import is_sound
from keras_memory.retrieval import let_in
from keras_memory.retrieval import middle
from keras_memory.retrieval import nearest
from keras_memory.retrieval import of_values
from keras_memory.retrieval import places_of_sample
from keras_memory.retrieval import similarity_of
from keras_memory.retrieval import unit

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


class Builder:
    """Does work beside what asks for it, one at a time, until the program ends,
    which then waits for no more than what has begun."""

    def __init__(self):
        self._turn = threading.Lock()
        self._is_closed = False

    @property
    def is_open(self):
        return not self._is_closed and threading.main_thread().is_alive()

    def submit(self, work, *arguments):
        """Calls a function, once it is its turn; returns a future."""
        done = futures.Future()
        threading.Thread(
            target=self._do, args=(done, work, arguments), name="KNNMemory"
        ).start()
        return done

    def _do(self, done, work, arguments):
        with self._turn:
            try:
                if self.is_open:
                    work(*arguments)
            finally:
                done.set_result(None)

    def close(self):
        """Begins no more work."""
        self._is_closed = True

    def after_fork(self):
        """Forgets, in a new process, what the one before goes on with."""
        self._turn = threading.Lock()


class ScannRow:
    """The index of one row of a memory, which follows what is written there.

    Up to `FLAT` entries all are compared. Beyond, a tree is built beside the
    searches, of two sizes, each with as many of its leaves searched as find
    `target_recall` of what a sample of the latest queries should find; the one
    that compares fewer entries takes over, unless comparing all is as good. It
    follows what is written. As keys and queries may drift apart, which an
    encoder's do that is being trained, it is tried again and again (`TRIED`)
    how many leaves must be searched, and so it is when there are twice as many
    queries to try it with, or more neighbours are asked for; it is built anew
    when these are `WORN` times as many as at first, or `REBUILT` of its entries
    have been written.

    Args:
        keys: (N, D) float32, finite, of all slots; whoever writes to it tells.
        similarity: `"dot"`, `"cosine"` or `"l2"`.
        target_recall: float in (0, 1).
        lock: held by whoever calls a method; the builder takes it to swap.
        builder: `Builder` of trees, or None: who writes waits for them.
    """

    def __init__(self, keys, similarity, target_recall, lock, builder):
        self._keys, self._similarity = keys, similarity
        self._target = target_recall
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
        self._built_of = 0  # entries
        self._since_built = self._since_tried = 0  # entries that were written
        self._flat_for = 0  # likewise, until a flat searcher is made anew
        self._compared = 0  # entries for a query, of the tree when it was new
        self._is_worn = False  # so much that it is to be built anew
        self._is_busy = False  # building or trying
        self._changed = None  # slots written since a tree began to be built
        self._latest = None  # queries, SAMPLE at most
        self._top_k = 0  # neighbours that were asked for since it was tried
        self._tuned_with, self._tuned_for = 0, USUAL  # queries, neighbours

    def after_fork(self):
        """Forgets, in a new process, what only the one before goes on with."""
        if self._changed is not None:
            self._is_worn = True
        self._epoch += 1
        self.building = self._changed = None
        self._is_busy = False

    def _vectors(self, slots):
        return np.take(self._keys, slots, axis=0)

    def write(self, slots):
        """Follows what was written.

        Args:
            slots: (n,) different ints, n at least 1; once all are written,
                none is left out between 0 and the largest ever.
        """
        slots = np.sort(slots)  # ScaNN numbers new ones as they come
        before, self.size = self.size, max(self.size, int(slots.max()) + 1)
        failed = None
        try:
            if self._searcher is not None:
                self._searcher.upsert(slots, before, self._vectors(slots))
        except Exception as error:  # it may be half written
            self._compare_all()
            self._is_worn, failed = True, error
        if self._changed is not None:
            self._changed.append(slots)
        self._flat_for -= len(slots)
        self._since_built += len(slots)
        self._since_tried += len(slots)
        self._follow()
        if failed is not None:
            _warn("followed what was written", failed)

    def _compare_all(self):
        """From the next search on, until there is another tree."""
        self._searcher = self.leaves = self.leaves_to_search = None

    def wait(self):
        """Waits for a tree that is being built; without the lock."""
        building = self.building
        if building is not None:
            building.result()

    def search(self, queries, top_k, is_counted=True):
        """Finds the nearest entries.

        Args:
            queries: (Q, D) float32, finite, Q at least 1.
            top_k: int, from 1 to `size`.
            is_counted: bool, whether trees are to be tried with them.

        Returns:
            (Q, top_k) slots, and float32 scores, the larger the nearer, -inf
            where nothing was found.
        """
        if is_counted:
            self._note(queries, top_k)
        if self._is_stale():
            self._compare_all()
        if self._searcher is None:
            vectors = self._vectors(np.arange(self.size))
            self._searcher = Searcher(vectors, self._similarity)
            self._flat_for = self.size
        slots, scores = self._found(queries, top_k)
        searcher = self._searcher
        self._follow()
        if searcher.is_hashed:
            slots, scores = self._best(searcher, queries, slots, scores, top_k)
        if self._similarity == "cosine":  # rounding may lead beyond 1
            scores = np.where(scores > -np.inf, np.clip(scores, -1, 1), scores)
        return slots, scores

    def _best(self, searcher, queries, slots, scores, top_k):
        """The best of what was found, by the vectors themselves: scores of
        compressed ones are rough."""
        vectors = searcher.prepared(self._vectors(slots.ravel()))
        vectors = vectors.reshape(*slots.shape, -1)
        exact = np.einsum("qkd,qd->qk", vectors, searcher.prepared(queries))
        exact = np.where(scores > -np.inf, exact, -np.inf)
        best = np.argsort(-exact, axis=1)[:, :top_k]
        return (
            np.take_along_axis(slots, best, axis=1),
            np.take_along_axis(exact, best, axis=1),
        )

    def _note(self, queries, top_k):
        """Keeps what trees are to be tried with."""
        number = min(len(queries), SAMPLE)
        some = queries[np.arange(number) * len(queries) // number]
        if self._latest is not None:
            some = np.concatenate([self._latest, some])[-SAMPLE:]
        self._latest = some
        self._top_k = max(self._top_k, top_k)

    def _found(self, queries, top_k):
        """What the searcher finds; in more leaves than usual for those queries
        that would find too few."""
        leaves = self.leaves_to_search
        if leaves is not None and top_k > self._tuned_for:
            leaves = min(self.leaves, -(-leaves * top_k // self._tuned_for))
        slots, scores = self._searcher.search(queries, top_k, leaves)
        while leaves is not None and leaves < self.leaves:
            few = np.sum(scores > -np.inf, axis=1) < top_k
            if not few.any():
                break
            leaves = min(2 * leaves, self.leaves)
            slots, scores = np.array(slots), np.array(scores)
            slots[few], scores[few] = self._searcher.search(
                queries[few], top_k, leaves
            )
        return slots, scores

    def _is_stale(self):
        """Whether a flat searcher's origin may be far from most keys now."""
        is_flat = self._searcher is not None and self.leaves is None
        return is_flat and self._similarity == "l2" and self._flat_for <= 0

    # The builder's side.

    def _follow(self):
        """Begins to build or to try a tree, where that is due."""
        if self.size <= FLAT or self._is_busy:
            return
        if self._is_worn or self._since_built >= REBUILT * self._built_of:
            work, self._changed, self._is_worn = self._build, [], False
            self._since_built = self._since_tried = 0
            self._built_of = self.size
        elif self._is_to_be_tried():
            work = self._try
            self._since_tried = 0
        else:
            return
        self._is_busy = True
        top_k, self._top_k = self._top_k or self._tuned_for, 0
        arguments = work, self._epoch, self.size, self._latest, top_k
        if self._builder is None:
            self._work(*arguments)
        else:
            self.building = self._builder.submit(self._work, *arguments)

    def _is_to_be_tried(self):
        if self.leaves is None or self._latest is None:
            return False
        asked = len(self._latest)
        if asked < FEW:
            return False
        more = self._tuned_with < asked >= min(2 * self._tuned_with, SAMPLE)
        if more or self._top_k > self._tuned_for:
            return True
        least, most = (share * self._built_of for share in TRIED)
        return self._since_tried >= np.clip(self._since_built / 2, least, most)

    def _work(self, work, epoch, *arguments):
        try:
            if self._is_wanted(epoch):
                work(epoch, *arguments)
        except Exception as error:  # the index before serves on
            _warn("built a tree", error)
        finally:
            with self._lock:
                if self._epoch == epoch:
                    self._is_busy, self._changed = False, None

    def _is_wanted(self, epoch):
        is_open = self._builder is None or self._builder.is_open
        return is_open and self._epoch == epoch

    def _build(self, epoch, size, queries, top_k):
        # What is written meanwhile may be copied in parts: it is in `_changed`.
        vectors = self._vectors(np.arange(size))
        tuned_with = 0 if queries is None else len(queries)
        if tuned_with < FEW:  # keys are easier to find than queries
            some = vectors[:: -(-size // SAMPLE)]
            queries = np.concatenate([some, *([queries] if tuned_with else [])])
            tuned_with = 0
        best = self._best_tree(vectors, queries, min(top_k, size), epoch)
        with self._lock:
            if not self._is_wanted(epoch):  # it was cleared
                return
            if best is None:
                if self.leaves is not None:
                    self._compare_all()
                return
            searcher, leaves, leaves_to_search = best
            if self._changed:
                slots = np.unique(np.concatenate(self._changed))
                searcher.upsert(slots, size, self._vectors(slots))
            self._searcher = searcher
            self.leaves, self.leaves_to_search = leaves, leaves_to_search
            self._compared = compared(size, leaves, leaves_to_search)
            self._tuned_with, self._tuned_for = tuned_with, top_k

    def _try(self, epoch, size, queries, top_k):
        with self._lock:
            if self._epoch != epoch or self.leaves is None:
                return
            searcher, leaves = self._searcher, self.leaves
        vectors = self._vectors(np.arange(size))
        right, _ = Searcher(vectors, self._similarity).search(queries, top_k)
        near = functools.partial(closeness, queries, vectors, self._similarity)

        def search(leaves_to_search):
            with self._lock:  # or it would be written to meanwhile
                return searcher.search(queries, top_k, leaves_to_search)

        fewest = fewest_leaves(search, leaves, near, right, self._target)
        with self._lock:
            if self._epoch != epoch or self._searcher is not searcher:
                return
            self.leaves_to_search = fewest
            self._tuned_with, self._tuned_for = len(queries), top_k
            worn = compared(size, leaves, fewest) > WORN * self._compared
            self._is_worn = worn

    def _best_tree(self, vectors, queries, top_k, epoch):
        make = functools.partial(Searcher, vectors, self._similarity)
        # ScaNN cannot write to compressed vectors of the other distance.
        is_hashed = len(vectors) > HASHED and self._similarity != "l2"
        return best_tree(
            make,
            vectors,
            self._similarity,
            queries,
            top_k,
            self._target,
            is_hashed,
            lambda: self._is_wanted(epoch),
        )


class Searcher:
    """ScaNN over (M, D) vectors: flat, or a tree with so many leaves, of
    vectors as they are or compressed."""

    def __init__(self, vectors, similarity, leaves=None, is_hashed=False):
        from scann.scann_ops.py import scann_ops_pybind

        self.is_hashed = is_hashed
        self._similarity = similarity
        self._centre = np.median(
            vectors[places_of_sample(len(vectors))], axis=0
        )
        vectors = self.prepared(vectors)
        builder = scann_ops_pybind.builder(vectors, 10, DISTANCES[similarity])
        builder = configured(builder, leaves, is_hashed)
        self._scann = builder.build().searcher
        self._scann.set_num_threads(threads())

    def prepared(self, vectors):
        """What ScaNN compares of (n, D) keys or queries."""
        if self._similarity == "cosine":
            return unit(vectors, np)
        if self._similarity == "l2":
            # Far from zero ScaNN's distances would be rounding.
            return vectors - self._centre
        return vectors

    def search(self, queries, top_k, leaves_to_search=None):
        """(Q, K) slots, and scores, the larger the nearer, -inf where nothing
        was found; of compressed vectors 2 K, and rough scores."""
        queries = self.prepared(queries)
        top_k, reordered = candidates(top_k, self.is_hashed)
        batch = min(256, max(16, len(queries) // (4 * threads())))
        slots, distances = self._scann.search_batched(
            queries, top_k, reordered, leaves_to_search or -1, True, batch
        )
        if self._similarity == "l2":
            distances = -distances
        # Where there are fewer, ScaNN answers with NaN.
        return slots, np.where(np.isnan(distances), -np.inf, distances)

    def upsert(self, slots, size, vectors):
        """Writes (n, D) vectors to (n,) ascending slots. Those below `size` are
        there, the others are new and leave no gap."""
        places = [int(slot) if slot < size else None for slot in slots]
        self._scann.upsert(places, self.prepared(vectors), len(places))


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
        found = np.where(scores > -np.inf, near(slots), -np.inf)
        enough = recall(found, right) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high


def compared(size, leaves, leaves_to_search):
    """With how many vectors a query is compared, the leaves' own among them."""
    return leaves + leaves_to_search * size / leaves


def _warn(what, error):
    warnings.warn(
        f"ScaNN should have {what}; searches go on with exact scores of all "
        f"entries, or with the tree before. Received: {error!r}",
        RuntimeWarning,
        stacklevel=2,
    )


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
    found = np.empty(slots.shape)
    step = max(1, BLOCK // max(1, slots.shape[1] * keys.shape[1]))
    for begin in range(0, len(queries), step):
        some = slice(begin, begin + step)
        near = keys[slots[some]].astype("float64")
        query = queries[some].astype("float64")
        if similarity == "l2":
            near -= query[:, None]
            found[some] = -np.einsum("qnd,qnd->qn", near, near)
            continue
        found[some] = np.einsum("qnd,qd->qn", near, query)
        if similarity == "cosine":
            squares = np.einsum("qnd,qnd->qn", near, near)
            found[some] /= np.sqrt(np.where(squares > 0, squares, 1))
    return found


def recall(found, right):
    """The share of right neighbours, or as near ones, that were found.

    Args:
        found: (Q, n) `closeness` of what was found, -inf where nothing was.
        right: (Q, K) that of what should be.

    Returns:
        float in [0, 1].
    """
    least = right.min(axis=1, keepdims=True)
    hits = np.sum(found >= least - ROUNDING * np.abs(least), axis=1)
    return float(np.minimum(hits, right.shape[1]).sum() / right.size)


@keras.saving.register_keras_serializable(package="keras_memory")
class ScannIndex(Arguments, keras.layers.Layer):
    """Finds the nearest of many fixed entries, in the graph, by ScaNN's ops.

    For a store that no longer changes: kNN language models, Memory Wrap over a
    whole training set. The index, a tree of compressed vectors, is part of a
    SavedModel; candidates are compared exactly with the keys themselves, which
    are weights.

    Where it runs: TensorFlow on a CPU, with ScaNN's ops, which XLA cannot
    compile (models with it proceed with `jit_compile=False`) and through which
    no gradient flows to the indices. A process that loads such a SavedModel, a
    server too, must load them first: `tf.load_op_library` of `_scann_ops.so` in
    the package scann; the stock image of TensorFlow Serving has none.
    `exact=True` compares with all entries instead, by stock ops on any backend;
    `export_for_serving(..., exact_search=True)` exports so what was trained
    with ScaNN.

    State: weights that are not trained, `memory_keys` (M, D), `memory_values`
    (M, V) and `memory_version`, 0 for no entries, else a checksum of the keys,
    whoever changes them. A `.keras` file has these; the index is built anew
    from them where it is of other keys, also after `set_weights`.

    Up to 16,384 entries, and where no tree would do with a quarter of the
    entries, all are compared, by ScaNN.

    Args:
        memory_size: int, M, how many entries it will hold.
        top_k: int, K, from 1 to M, 10 by default.
        value_dim: int, V, width of values, 0 (default) for none.
        similarity: `"dot"` (default), `"cosine"` or `"l2"`, minus the squared
            distance.
        target_recall: float in (0, 1), 0.95 by default, the share of the
            neighbours that a tree is to find.
        exact: bool, False by default.
        value_dtype: str, of values, which come back in it: `"int32"` or
            `"int64"` for whole numbers such as ids, `"float16"`, `"bfloat16"`,
            `"float32"` or `"float64"`; None (default) keeps them in float32 and
            returns them in the compute dtype.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        queries: (..., D). One with a NaN, an infinity or a component beyond
            1e15 finds nothing.

    Returns:
        `retrieval.Neighbours`. Gradients flow from scores to queries.

    Raises:
        ImportError: ScaNN cannot be imported, and `exact` is False.
        ValueError: an argument out of its range, another backend, entries that
            are not finite, or a call before `set_memory`.

    Example:

    >>> index = ScannIndex(memory_size=3, top_k=2)
    >>> index.set_memory(np.eye(3, dtype="float32"))
    >>> index(np.array([[0.0, 2.0, 1.0]], "float32")).indices
    <tf.Tensor: shape=(1, 2), dtype=int32, numpy=array([[1, 2]], dtype=int32)>
    """

    def __init__(
        self,
        memory_size,
        top_k=10,
        value_dim=0,
        similarity="dot",
        target_recall=0.95,
        exact=False,
        value_dtype=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.memory_size = check_size("memory_size", memory_size)
        self.top_k = check_size("top_k", top_k)
        if top_k > memory_size:
            raise ValueError(
                "`top_k` must be at most `memory_size`, as more can never be "
                f"found. Received: top_k={top_k}, memory_size={memory_size}"
            )
        self.value_dim = check_size("value_dim", value_dim, least=0)
        self.similarity = check_one_of("similarity", similarity, SIMILARITIES)
        check_within("target_recall", target_recall)
        self.target_recall = target_recall
        self.exact = check_bool("exact", exact)
        self.value_dtype = check_value_dtype(value_dtype)
        self.supports_jit = exact
        if not exact:
            check_scann("`ScannIndex`", "`exact=True` needs none")
            if keras.backend.backend() != "tensorflow":
                raise ValueError(
                    "`ScannIndex` needs TensorFlow, for which ScaNN has ops; "
                    "`exact=True` does not. Received: "
                    f"KERAS_BACKEND={keras.backend.backend()}"
                )
        self._index = None  # of the graph, of this version of the memory
        self._version = 0

    def build(self, queries_shape):
        dim = queries_shape[-1] if len(queries_shape) > 1 else None
        if dim is None:
            raise ValueError(
                "The last axis of `queries`, (..., D), must have a known size, "
                f"that of the keys. Received: shape {tuple(queries_shape)}"
            )

        def weight(name, shape, dtype="float32", kind=keras.Variable):
            with keras.name_scope(self.name, caller=self):
                return kind(
                    "zeros",
                    shape=shape,
                    dtype=dtype,
                    trainable=False,
                    autocast=False,
                    name=name,
                )

        slots = [("memory_size", self.memory_size)]
        check_bytes_of_entries(
            slots, dim, self.value_dim, "float32", self.value_dtype
        )
        watched = functools.partial(_Watched, self._match_version)
        self.memory_keys = weight(
            "memory_keys", (self.memory_size, dim), kind=watched
        )
        self.memory_values = None
        if self.value_dim:
            shape = (self.memory_size, self.value_dim)
            dtype = self.value_dtype or "float32"
            self.memory_values = weight("memory_values", shape, dtype)
        self.memory_version = weight("memory_version", (), "int32", watched)
        self.built = True

    def set_memory(self, keys, values=None):
        """Fixes the entries, and builds the index, which takes seconds for
        100,000 of them.

        A function that was traced before, such as a model's for `predict`,
        refuses to answer from the entries before: trace it anew, by
        `model.make_predict_function(force=True)`.

        Args:
            keys: (M, D), finite, each component within +-1e15.
            values: (M, V), likewise; None where V is 0.

        Raises:
            ValueError: wrong shapes, or values that are not finite.
        """
        check_process("ScannIndex")
        sizes = {"memory_size": self.memory_size, "value_dim": self.value_dim}
        if self.built:
            sizes["D"] = self.memory_keys.shape[-1]
        keys = check_array(
            "keys",
            keys,
            ("memory_size", "D"),
            sizes,
            dtype="float32",
            remedy=KEY_REMEDY,
        )
        sound = [keys]
        if self.value_dim or values is not None:
            given = values
            values = check_array(
                "values",
                given,
                ("memory_size", "value_dim"),
                sizes,
                **of_values(self.value_dtype, "float32"),
            )
            # They come back in the dtype that is computed in.
            back = self.value_dtype or self.compute_dtype
            check_exact("values", given, back, VALUE_REMEDY)
            sound += [values] if "float" in ops.dtype(values) else []
        if not all(bool(ops.all(is_sound(part))) for part in sound):
            raise ValueError(
                "Entries must be finite, and within +-1e15 so that products "
                "are. Received: NaN, infinity or larger values"
            )
        if not self.built:
            self.build(tuple(keys.shape))
        if self.value_dim:
            self.memory_values.assign(values)
        self.memory_version.assign(0)  # not to look at the keys twice
        self.memory_keys.assign(keys)
        self.memory_version.assign(1)
        self._renew()

    def _match_version(self):
        """Makes the version that of the keys, if there are entries."""
        if self.exact or not self.built:
            return
        import tensorflow as tf

        if not tf.executing_eagerly():
            raise ValueError(
                "The weights of a `ScannIndex` must be changed outside of "
                "graphs, as an index is built of them. Received: a change "
                "while a function is traced"
            )
        version = int(self.memory_version)
        if version:
            checksum = zlib.crc32(ops.convert_to_numpy(self.memory_keys))
            checksum = max(1, checksum & 0x7FFFFFFF)
            if version != checksum:
                self.memory_version.assign(checksum)

    def _renew(self):
        """Builds the index anew if it is not that of the entries.

        Returns:
            bool, whether there are any.
        """
        with _outside_of_graphs():
            try:
                version = int(self.memory_version)
            except TypeError:  # JAX traces it, and there is no index
                return True
            if version != self._version:
                self._version, self._index = version, None
                if version and not self.exact:
                    keys = ops.convert_to_tensor(self.memory_keys)
                    keys = ops.convert_to_numpy(keys)
                    self._index = _Index(
                        keys, self.similarity, self.top_k, self.target_recall
                    )
        return version != 0

    @property
    def is_by_scann(self):
        """Whether ScaNN finds the entries, now."""
        return self._index is not None

    def __call__(self, queries, **named):
        check_process("ScannIndex")
        queries = let_in("queries", queries, (None, ..., None))
        return super().__call__(queries, **named)

    def call(self, queries):
        queries = self._checked(queries)
        if not self._renew():
            raise ValueError(
                "There must be entries to find: call `set_memory`, or load "
                "weights. Received: nothing to look at yet"
            )
        shape = (*ops.shape(queries)[:-1], self.top_k)
        flat = ops.reshape(queries, (-1, queries.shape[-1]))
        sound = is_sound(flat)[:, None]
        flat = ops.where(sound, ops.cast(flat, "float32"), 0.0)
        keys = ops.convert_to_tensor(self.memory_keys)
        with self._current():
            if self._index is None:
                slots, found = self._compare(ops.stop_gradient(flat), keys)
            else:
                slots, found = self._index.search(
                    ops.stop_gradient(flat), self.top_k
                )
        keys = ops.take(keys, slots, axis=0)
        scores = similarity_of(flat[:, None], keys, self.similarity)
        if slots.shape[1] != self.top_k:  # the best of more candidates
            scores = ops.where(found > -np.inf, scores, -np.inf)
            found, best = ops.top_k(scores, self.top_k)
            scores = ops.take_along_axis(scores, best, axis=1)
            slots = ops.take_along_axis(slots, best, axis=1)
            keys = ops.take_along_axis(keys, best[..., None], axis=1)
        mask = sound & (found > -np.inf)
        keys = ops.where(mask[..., None], keys, 0)
        if self.value_dim:
            values = ops.take(
                ops.convert_to_tensor(self.memory_values), slots, axis=0
            )
            values = ops.where(mask[..., None], values, 0)
        else:
            values = ops.zeros((*ops.shape(slots), 0))
        return Neighbours(
            ops.reshape(ops.where(mask, scores, -np.inf), shape),
            ops.reshape(ops.where(mask, slots, -1), shape),
            ops.reshape(mask, shape),
            ops.reshape(
                ops.cast(keys, self.compute_dtype), (*shape, keys.shape[-1])
            ),
            ops.reshape(
                ops.cast(values, self.value_dtype or self.compute_dtype),
                (*shape, self.value_dim),
            ),
        )

    def _compare(self, queries, keys):
        bias = None
        if self.similarity == "cosine":
            queries, keys = unit(queries), unit(keys)
        if self.similarity == "l2":  # far from zero, differences are rounding
            sample = ops.take(keys, places_of_sample(keys.shape[0]), axis=0)
            centre = middle(sample)
            queries, keys = queries - centre, keys - centre
            bias = -0.5 * ops.sum(keys * keys, axis=-1)
        return nearest(queries, keys, self.top_k, bias)[::-1]

    @contextlib.contextmanager
    def _current(self):
        """In a graph of another version of the memory, an error."""
        if self._index is None:
            yield
            return
        import tensorflow as tf

        check = tf.debugging.assert_equal(
            self.memory_version.value,
            self._version,
            "The entries were changed after this function was traced, which "
            "would go on finding those before: trace it anew, a model's by "
            "`model.make_predict_function(force=True)`",
        )
        with tf.control_dependencies([check] if check is not None else []):
            yield

    def _checked(self, queries):
        dim = self.memory_keys.shape[-1]
        return check_array("queries", queries, (None, ..., dim))

    def compute_output_spec(self, queries):
        self._checked(queries)
        shape = (*queries.shape[:-1], self.top_k)
        dtype = self.compute_dtype
        return Neighbours(
            keras.KerasTensor(shape, "float32"),
            keras.KerasTensor(shape, "int32"),
            keras.KerasTensor(shape, "bool"),
            keras.KerasTensor((*shape, queries.shape[-1]), dtype),
            keras.KerasTensor(
                (*shape, self.value_dim), self.value_dtype or dtype
            ),
        )

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self._renew()

    def get_build_config(self):
        if not self.built:
            return None
        return {"input_shape": (None, self.memory_keys.shape[-1])}

    def build_from_config(self, config):
        self.build(config["input_shape"])

    def get_config(self):
        names = ("memory_size", "top_k", "value_dim", "similarity")
        names += ("target_recall", "exact", "value_dtype")
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}


def _outside_of_graphs():
    """Where values can be read while a function is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


class _Watched(keras.Variable):
    """A weight that tells of each new value."""

    def __init__(self, changed, *arguments, **options):
        self._changed = changed
        super().__init__(*arguments, **options)

    def assign(self, value):
        value = super().assign(value)
        self._changed()
        return value


class _Index:
    """ScaNN's ops over (M, D) keys, and the tensors that make their index
    anew in another process."""

    def __init__(self, keys, similarity, top_k, target_recall):
        from scann.scann_ops.py import scann_ops

        self._negative = similarity == "l2"
        self._similarity = similarity
        self._centre = np.median(keys[places_of_sample(len(keys))], axis=0)
        vectors = ops.convert_to_numpy(self._prepared(keys))

        def make(leaves, is_hashed):
            builder = scann_ops.builder(vectors, 10, DISTANCES[similarity])
            name = f"keras_memory-{uuid.uuid4()}"
            scann = configured(builder, leaves, is_hashed)
            scann = scann.build(shared_name=name)
            scann.name = name
            # TensorFlow would keep it until the process ends.
            destroy = functools.partial(_destroy, scann.searcher_handle)
            weakref.finalize(scann, destroy, os.getpid()).atexit = False
            return _GraphSearcher(scann, is_hashed, self._negative)

        best = None
        if len(keys) > FLAT:
            queries = vectors[:: -(-len(keys) // SAMPLE)]
            best = best_tree(
                make,
                vectors,
                "l2" if self._negative else "dot",  # of unit vectors
                queries,
                top_k,
                target_recall,
                is_hashed=True,
            )
        self.leaves = self.leaves_to_search = None
        searcher = make(None, False)
        if best is not None:
            searcher, self.leaves, self.leaves_to_search = best
        self.is_hashed = searcher.is_hashed
        self.tensors = searcher.scann.serialize_to_module()
        self._scann = searcher.scann  # lives as long as this

    def _prepared(self, vectors):
        if self._similarity == "l2":
            return vectors - self._centre
        return unit(vectors) if self._similarity == "cosine" else vectors

    def search(self, queries, top_k):
        """As `Searcher`, of tensors."""
        import tensorflow as tf
        from scann.scann_ops.py import scann_ops

        part, scann = self.tensors, self._scann
        if tf.executing_eagerly():
            return self._found_by(scann, queries, top_k)
        # Finds the one of this name; makes it in another process.
        handle = scann_ops.tensors_to_scann(
            part.dataset,
            part.scann_config,
            part.serialized_partitioner,
            part.datapoint_to_token,
            part.ah_codebook,
            part.hashed_dataset,
            part.int8_dataset,
            part.int8_multipliers,
            part.dp_norms,
            shared_name=scann.name,
        )
        return self._found_by(scann_ops.ScannSearcher(handle), queries, top_k)

    def _found_by(self, scann, queries, top_k):
        searcher = _GraphSearcher(scann, self.is_hashed, self._negative)
        queries = self._prepared(queries)
        return searcher.search(queries, top_k, self.leaves_to_search)


def _destroy(handle, process):
    if os.getpid() != process:  # a fork would wait for TensorFlow's threads
        return
    import tensorflow as tf
    from tensorflow.python.eager import context

    with tf.init_scope():
        tf.raw_ops.DestroyResourceOp(resource=handle)
    context.context().clear_kernel_cache()  # which holds a part of it


class _GraphSearcher:
    """`Searcher`, by ScaNN's ops."""

    def __init__(self, scann, is_hashed, negative):
        self.scann, self.is_hashed, self._negative = scann, is_hashed, negative

    def search(self, queries, top_k, leaves_to_search=None):
        """As of `Searcher`."""
        top_k, reordered = candidates(top_k, self.is_hashed)
        slots, distances = self.scann.search_batched_parallel(
            queries, top_k, reordered, leaves_to_search
        )
        # Its shape is not known in a graph, and for no queries it is (0, 0).
        shape = (ops.shape(queries)[0], top_k)
        slots, distances = (
            ops.reshape(part, shape) for part in (slots, distances)
        )
        if self._negative:
            distances = -distances
        return slots, ops.where(ops.isnan(distances), -np.inf, distances)
