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
    """Runs jobs one at a time in background threads.

    At exit only the running job is awaited; jobs that have not begun are
    dropped.
    """

    def __init__(self):
        self._turn = threading.Lock()
        self._is_closed = False

    @property
    def is_open(self):
        return not self._is_closed and threading.main_thread().is_alive()

    def submit(self, work, *arguments):
        """Calls a function when all earlier jobs are done; returns a future."""
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
        """Drops all jobs that have not begun."""
        self._is_closed = True

    def after_fork(self):
        """Replaces the lock in a fork, where the running job does not exist."""
        self._turn = threading.Lock()


class ScannRow:
    """The index of one row of a memory, updated by each write.

    Up to `FLAT` entries, searches compare all. For more entries, trees of two
    sizes are built in the background. Each is tuned: it searches the fewest
    leaves that reach `target_recall` on a sample of the latest queries. The
    tree with the fewest comparisons is used if it compares less than a quarter
    of the entries (`WORTH`); otherwise all are compared.

    Keys and queries may drift apart, for example while an encoder is trained.
    So the number of leaves is retuned after 0.5 % (a new tree) to 5 % (an old
    one) of the entries were written (`TRIED`), when twice as many queries are
    known as at the last tuning, and when a search asks for more neighbors. The
    tree is rebuilt when a query must be compared with twice as many vectors as
    at first (`WORN`), or when entries amounting to half of those in the tree
    were written (`REBUILT`).

    Args:
        keys: (N, D) float32, finite, keys of all slots; the owner writes to the
            array and then calls `write`.
        similarity: `"dot"`, `"cosine"` or `"l2"`.
        target_recall: float in (0, 1).
        lock: held by the caller of each method but `wait`; the builder takes it
            to swap trees.
        builder: `Builder` of trees; None to build them in `write` and `search`.
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
        self.leaves = None  # of the tree; None without a tree
        self.leaves_to_search = None
        self.building = None  # a future, while a tree is built or tuned
        self._epoch += 1  # a job of an earlier epoch is canceled
        self._searcher = None
        self._built_of = 0  # entries when the last build began
        self._since_built = self._since_tried = 0  # entries written since then
        self._flat_for = 0  # writes until a flat searcher is rebuilt
        self._compared = 0  # vectors compared per query, when the tree was new
        self._is_worn = False  # the tree must be rebuilt
        self._is_busy = False  # building or tuning
        self._changed = None  # slots written since the running build began
        self._latest = None  # the latest queries, at most `SAMPLE`
        self._top_k = 0  # the largest `top_k` since the last tuning
        self._tuned_with, self._tuned_for = (
            0,
            tuning.USUAL,
        )  # number of queries, `top_k`

    def after_fork(self):
        """Forgets, in a fork, the build that runs in the parent process."""
        if self._changed is not None:
            self._is_worn = True
        self._epoch += 1
        self.building = self._changed = None
        self._is_busy = False

    def _vectors(self, slots):
        return np.take(self._keys, slots, axis=0)

    def write(self, slots):
        """Updates the index after keys were written.

        Args:
            slots: (n,) different ints, n at least 1; slots from 0 to the
                largest so far must all have been written.
        """
        slots = np.sort(slots)  # ScaNN numbers new vectors in order
        before, self.size = self.size, max(self.size, int(slots.max()) + 1)
        failed = None
        try:
            if self._searcher is not None:
                self._searcher.upsert(slots, before, self._vectors(slots))
        except Exception as error:  # the index may be half updated
            self._compare_all()
            self._is_worn, failed = True, error
        if self._changed is not None:
            self._changed.append(slots)
        self._flat_for -= len(slots)
        self._since_built += len(slots)
        self._since_tried += len(slots)
        self._follow()
        if failed is not None:
            _warn(
                "update its index, so searches compare all entries until the "
                "next tree",
                failed,
            )

    def _compare_all(self):
        """Drops the tree: searches compare all entries until the next tree."""
        self._searcher = self.leaves = self.leaves_to_search = None

    def wait(self):
        """Waits for the running build. The caller must not hold the lock."""
        building = self.building
        if building is not None:
            building.result()

    def search(self, queries, top_k, is_counted=True):
        """Finds the nearest entries.

        Args:
            queries: (Q, D) float32, finite, Q at least 1.
            top_k: int, from 1 to `size`.
            is_counted: bool, whether trees may be tuned with these queries.

        Returns:
            (Q, top_k) slots, and float32 scores, larger is nearer, -inf where
            nothing was found.
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
        if self._similarity == "cosine":  # clips rounding errors
            scores = np.where(scores > -np.inf, np.clip(scores, -1, 1), scores)
        return slots, scores

    def _best(self, searcher, queries, slots, scores, top_k):
        """Picks the best candidates by exact scores: those of compressed
        vectors are rough."""
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
        """Keeps a sample of the queries, and `top_k`, to tune trees with."""
        number = min(len(queries), tuning.SAMPLE)
        sample = queries[np.arange(number) * len(queries) // number]
        if self._latest is not None:
            sample = np.concatenate([self._latest, sample])[-tuning.SAMPLE :]
        self._latest = sample
        self._top_k = max(self._top_k, top_k)

    def _search_leaves(self, queries, top_k):
        """Searches; queries that find too few entries search more leaves."""
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
        """Whether the keys may have moved far from a flat searcher's center."""
        is_flat = self._searcher is not None and self.leaves is None
        return is_flat and self._similarity == "l2" and self._flat_for <= 0

    # The builder's side.

    def _follow(self):
        """Starts to build or tune a tree if that is due."""
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
        except Exception as error:  # the previous index stays in use
            _warn(
                "build or tune a tree, so searches use the previous index",
                error,
            )
        finally:
            with self._lock:
                if self._epoch == epoch:
                    self._is_busy, self._changed = False, None

    def _is_wanted(self, epoch):
        is_open = self._builder is None or self._builder.is_open
        return is_open and self._epoch == epoch

    def _build(self, epoch, size, queries, top_k):
        # A write during the copy may tear a key; its slot is in `_changed`.
        vectors = self._vectors(np.arange(size))
        tuned_with = 0 if queries is None else len(queries)
        # Too few queries: keys are added. They are easier to find, so
        # `tuned_with = 0` makes later queries retune the tree.
        if tuned_with < tuning.FEW:
            sample = vectors[:: -(-size // tuning.SAMPLE)]
            queries = np.concatenate(
                [sample, *([queries] if tuned_with else [])]
            )
            tuned_with = 0
        best = self._best_tree(vectors, queries, min(top_k, size), epoch)
        with self._lock:
            if not self._is_wanted(epoch):  # cleared meanwhile
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
            with self._lock:  # no writes during a search
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
        # ScaNN cannot update compressed vectors of the squared distance.
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
    """A ScaNN searcher over (M, D) vectors.

    Flat, or a tree with `leaves` leaves; vectors compressed if `is_hashed`.
    """

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
        """(n, D) keys or queries as ScaNN compares them."""
        if self._similarity == "cosine":
            return unit(vectors, np)
        if self._similarity == "l2":
            # Far from zero, ScaNN's distances would be mere rounding errors.
            return vectors - self._center
        return vectors

    def search(self, queries, top_k, leaves_to_search=None):
        """(Q, K) slots, and scores, larger is nearer, -inf where nothing was
        found. Compressed vectors: (Q, 2 K), and scores are rough."""
        queries = self.prepared(queries)
        top_k, reordered = candidates(top_k, self.is_hashed)
        batch = min(256, max(16, len(queries) // (4 * threads())))
        slots, distances = self._scann.search_batched(
            queries, top_k, reordered, leaves_to_search or -1, True, batch
        )
        if self._similarity == "l2":
            distances = -distances
        # ScaNN returns NaN where it finds fewer than `top_k`.
        return slots, np.where(np.isnan(distances), -np.inf, distances)

    def upsert(self, slots, size, vectors):
        """Writes (n, D) vectors to (n,) ascending slots. Slots below `size`
        exist; the others are new and consecutive."""
        places = [int(slot) if slot < size else None for slot in slots]
        self._scann.upsert(places, self.prepared(vectors), len(places))


def _warn(failure, error):
    warnings.warn(
        f"ScaNN failed to {failure}. Received: {error!r}",
        RuntimeWarning,
        stacklevel=2,
    )
