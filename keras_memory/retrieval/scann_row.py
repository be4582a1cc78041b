"""One row of a memory, indexed by ScaNN on the host."""

import functools
import threading
import warnings
from concurrent import futures

import numpy as np

from keras_memory.retrieval import tuning
from keras_memory.retrieval.similarities import middle
from keras_memory.retrieval.similarities import places_of_sample
from keras_memory.retrieval.similarities import unit
from keras_memory.retrieval.tuning import best_tree
from keras_memory.retrieval.tuning import candidates
from keras_memory.retrieval.tuning import closeness
from keras_memory.retrieval.tuning import compared
from keras_memory.retrieval.tuning import configured
from keras_memory.retrieval.tuning import fewest_leaves
from keras_memory.retrieval.tuning import threads


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
        self._latest = None  # queries, `SAMPLE` at most
        self._top_k = 0  # neighbours that were asked for since it was tried
        self._tuned_with, self._tuned_for = (
            0,
            tuning.USUAL,
        )  # queries, neighbours

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
        slots, scores = self._search_leaves(queries, top_k)
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
        number = min(len(queries), tuning.SAMPLE)
        sample = queries[np.arange(number) * len(queries) // number]
        if self._latest is not None:
            sample = np.concatenate([self._latest, sample])[-tuning.SAMPLE :]
        self._latest = sample
        self._top_k = max(self._top_k, top_k)

    def _search_leaves(self, queries, top_k):
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
        if self.size <= tuning.FLAT or self._is_busy:
            return
        if (
            self._is_worn
            or self._since_built >= tuning.REBUILT * self._built_of
        ):
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
        if asked < tuning.FEW:
            return False
        more = (
            self._tuned_with < asked >= min(2 * self._tuned_with, tuning.SAMPLE)
        )
        if more or self._top_k > self._tuned_for:
            return True
        lower, upper = (share * self._built_of for share in tuning.TRIED)
        return self._since_tried >= np.clip(self._since_built / 2, lower, upper)

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
        if tuned_with < tuning.FEW:  # keys are easier to find than queries
            sample = vectors[:: -(-size // tuning.SAMPLE)]
            queries = np.concatenate(
                [sample, *([queries] if tuned_with else [])]
            )
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
            worn = compared(size, leaves, fewest) > tuning.WORN * self._compared
            self._is_worn = worn

    def _best_tree(self, vectors, queries, top_k, epoch):
        make = functools.partial(Searcher, vectors, self._similarity)
        # ScaNN cannot write to compressed vectors of the other distance.
        is_hashed = len(vectors) > tuning.HASHED and self._similarity != "l2"
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
        self._center = middle(vectors[places_of_sample(len(vectors))], np)
        vectors = self.prepared(vectors)
        builder = scann_ops_pybind.builder(
            vectors, 10, tuning.DISTANCES[similarity]
        )
        builder = configured(builder, leaves, is_hashed)
        self._scann = builder.build().searcher
        self._scann.set_num_threads(threads())

    def prepared(self, vectors):
        """What ScaNN compares of (n, D) keys or queries."""
        if self._similarity == "cosine":
            return unit(vectors, np)
        if self._similarity == "l2":
            # Far from zero ScaNN's distances would be rounding.
            return vectors - self._center
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


def _warn(what, error):
    warnings.warn(
        f"ScaNN should have {what}; searches go on with exact scores of all "
        f"entries, or with the tree before. Received: {error!r}",
        RuntimeWarning,
        stacklevel=2,
    )
