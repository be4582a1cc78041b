"""A memory of many slots on the host, in which ScaNN finds the nearest.

A step of a large memory reads and writes few rows. Here the rows stay where
they are: the graph calls the host instead of carrying the memory.
"""

import threading

import numpy as np

from keras_memory.addressing.sparse import BLOCK
from keras_memory.addressing.sparse import NEVER_ACCESSED
from keras_memory.addressing.sparse import UNWRITTEN
from keras_memory.checks import check_bytes
from keras_memory.retrieval import forks
from keras_memory.retrieval.scann_row import Builder
from keras_memory.retrieval.scann_row import ScannRow
from keras_memory.retrieval.similarities import unit


class HostMemory:
    """The slots of each row of a batch, and an index of each row.

    Slots are first written in ascending order: the written slots of a row are 0
    to n - 1. ScaNN's trees are built in the background, so which neighbors they
    miss depends on timing. Without a tree a search compares all written slots.
    `roll_back` undoes all writes by `replace` since the last `forget`.

    Args:
        memory_slots: int N, number of slots.
        slot_size: int W, width of a slot.
        target_recall: float in (0, 1), recall that trees are tuned for.
        norm_epsilon: float above 0, added to the squared norm of each slot.
        more: dict with further arrays that have a row for each slot: from the
            name to the size of a row, the dtype and the initial value.

    Attributes: those of `more`, (B, N, size), and, set by `allocate`:
        memory: (B, N, W) float32, slot contents.
        last_access: (B, N) int32, as in `SAMState`.
        call: int, the number of the call that may use the memory.
    """

    def __init__(
        self, memory_slots, slot_size, target_recall, norm_epsilon, more=()
    ):
        self.memory_slots, self.slot_size = memory_slots, slot_size
        self.call = 0
        self._target_recall = target_recall
        self._norm_epsilon, self._more = norm_epsilon, dict(more)
        self._lock = threading.RLock()
        self._builder = Builder()
        self._journal = []  # (array, slots, rows before), the oldest first
        self._indices = []
        forks.register(self)

    def allocate(self, batch_size):
        """Makes an empty memory for a batch.

        Raises:
            ValueError: it would not fit into the machine's memory.
        """
        slots = ("batch size", batch_size), ("memory_slots", self.memory_slots)
        sizes = [*slots, ("slot_size", self.slot_size)]
        check_bytes("The memory", sizes, on_host=True)
        shape = batch_size, self.memory_slots
        self.memory = np.zeros((*shape, self.slot_size), "float32")
        self.last_access = np.full(shape, UNWRITTEN, "int32")
        for name, (size, dtype, initial) in self._more.items():
            check_bytes("The memory", [*slots, (name, size)], on_host=True)
            setattr(self, name, np.full((*shape, size), initial, dtype))
        # No slot of a block of `BLOCK` slots was accessed before its bound.
        blocks = -(-self.memory_slots // BLOCK)
        self._bounds = np.zeros((batch_size, blocks), "int32")
        self._rows = np.arange(batch_size)[:, None]
        self._indices = [
            _NormedRow(
                keys,
                self._norm_epsilon,
                self._target_recall,
                self._lock,
                self._builder,
            )
            for keys in self.memory
        ]
        self.forget()

    # Reads and writes of a step.

    def check_call(self, token):
        """Raises RuntimeError unless an array of int32 has the number of the
        running call."""
        if token.size and token.flat[0] != self.call:
            raise RuntimeError(
                "A memory on the host takes one call at a time: before this "
                "call ended, another thread called or reset the layer, or read "
                "its memory. This call changes nothing. Use a lock around the "
                "calls of several threads. Received: call "
                f"{token.flat[0]} during call {self.call}"
            )

    def take(self, name, slots):
        """A copy of the rows of an array at slots (B, P): (B, P, ...)."""
        return getattr(self, name)[self._rows, slots]

    def take_entries(self, name, numbers):
        """The entries of an array (B, N, size) at numbers (B, ...): entry k of
        slot i has the number i size + k."""
        array = getattr(self, name)
        array = array.reshape(len(array), -1)
        flat = np.clip(numbers.reshape(len(array), -1), 0, array.shape[1] - 1)
        return np.take_along_axis(array, flat, axis=1).reshape(numbers.shape)

    def replace(self, name, slots, rows, updated=None):
        """Replaces rows (B, P, ...) at slots (B, P).

        Args:
            name: "memory", "last_access", or a name in `more`.
            slots: (B, P) int32. A slot may occur several times, with equal
                rows.
            rows: (B, P, ...), finite.
            updated: (B,) bool or None; False: the row of the batch stays.

        Raises:
            ValueError: rows are not finite, or leave out a slot.
        """
        if not np.isfinite(rows).all():
            raise ValueError(
                "A memory on the host must stay finite, since ScaNN crashes on "
                "NaN and infinity. The memory is as before the call. Received: "
                "a write of NaN or infinity"
            )
        if updated is None:
            updated = np.ones(len(slots), bool)
        with self._lock:
            if name == "memory":
                self._check_slots(slots, updated)
            before = self.take(name, slots)
            self._journal.append((name, np.array(slots), before))
            more = (1,) * (before.ndim - 1)
            rows = np.where(updated.reshape(-1, *more), rows, before)
            self._set(name, slots, rows)
            if name == "memory":
                for row in np.flatnonzero(updated):
                    self._indices[row].write(np.unique(slots[row]))

    def _check_slots(self, slots, updated):
        """Raises ValueError if a write would leave out a slot."""
        for row in np.flatnonzero(updated):
            last, size = slots[row].max(initial=0), self._indices[row].size
            if last > size:
                raise ValueError(
                    "The states of a layer must be those of its memory on the "
                    "host, which they do not contain: `reset_state()` resets "
                    f"both. Received: states that write to slot {last} of a "
                    f"memory with {size} written slots"
                )

    def _set(self, name, slots, rows):
        getattr(self, name)[self._rows, slots] = rows
        if name == "last_access":
            np.minimum.at(self._bounds, (self._rows, slots // BLOCK), rows)

    def least_recently_accessed(self):
        """The slot of each row whose last access is the longest ago, (B, 1).

        `sparse.least_recently_accessed` explains the search.
        """
        with self._lock:
            slots = [self._oldest(row) for row in range(len(self.memory))]
        return np.array(slots, "int32")[:, None]

    def _oldest(self, row):
        bounds = self._bounds[row]
        while True:
            block = int(bounds.argmin())
            first = block * BLOCK
            accesses = self.last_access[row, first : first + BLOCK]
            accesses = np.maximum(accesses, NEVER_ACCESSED)
            place = int(accesses.argmin())
            if accesses[place] <= bounds[block]:
                return first + place
            bounds[block] = accesses[place]

    def nearest(self, queries, top_k):
        """The slots whose cosines with each query are the largest.

        Args:
            queries: (B, H, W) float32, finite.
            top_k: int K.

        Returns:
            (B, H, K) int32, the nearest first; -1 where fewer were found.
        """
        if not np.isfinite(queries).all():
            raise ValueError(
                "The keys that a memory on the host is searched for must be "
                "finite. The memory is as before the call. Received: NaN or "
                "infinity"
            )
        queries = unit(queries, np)
        found = np.full((*queries.shape[:2], top_k), -1, "int32")
        with self._lock:
            for row, index in enumerate(self._indices):
                count = min(top_k, index.size)
                if count:
                    slots, scores = index.search(queries[row], count)
                    slots = np.where(
                        scores > -np.inf, slots.astype("int32"), -1
                    )
                    found[row, :, :count] = slots
        return found

    # Transactions, and changes outside of them.

    def roll_back(self):
        """Undoes all writes since `forget`.

        It can be repeated: if it is interrupted, the next one completes it.
        """
        with self._lock:
            for name, slots, rows in reversed(self._journal):
                self._set(name, slots, rows)
            touched = [s for name, s, _ in self._journal if name == "memory"]
            if touched:
                touched = np.concatenate(touched, axis=1)
                for row, index in enumerate(self._indices):
                    self._reindex(row, index, np.unique(touched[row]))
            self.forget()

    def _reindex(self, row, index, touched):
        size = int(np.sum(self.last_access[row] > UNWRITTEN))
        if index.size != size:
            # ScaNN cannot drop vectors, and `clear` may have been interrupted
            # behind.
            index.clear()
            touched = np.arange(size)
        touched = touched[touched < size]
        if len(touched):
            index.write(touched)

    def forget(self):
        """Keeps all writes so far."""
        self._journal = []

    def clear(self, rows=None):
        """Empties the memory of the rows (B,) of bool; None: of all rows."""
        with self._lock:
            for row, index in enumerate(self._indices):
                if rows is None or rows[row]:
                    self.memory[row, : index.size] = 0
                    self.last_access[row] = UNWRITTEN
                    for name, (_, _, initial) in self._more.items():
                        getattr(self, name)[row, : index.size] = initial
                    self._bounds[row] = 0
                    index.clear()

    def fill(self, contents):
        """Replaces all slots by contents, and builds the indices.

        Each slot counts as accessed once. `roll_back` does not undo this.

        Args:
            contents: (B, n, W) float32, finite, n from 1 to N.
        """
        number = contents.shape[1]
        with self._lock:
            self.clear()
            self.memory[:, :number] = contents
            self.last_access[:, :number] = 1
            for index in self._indices:
                index.write(np.arange(number))
        self.wait()

    def wait(self):
        """Waits for trees that are being built or tuned."""
        for index in self._indices:
            index.wait()

    # Forks, which lack the thread that builds trees.

    def _before_fork(self):
        self._lock.acquire()

    def _after_fork(self, is_child):
        if is_child:
            self._builder.after_fork()
            for index in self._indices:
                index.after_fork()
        self._lock.release()


class _NormedRow(ScannRow):
    """A `ScannRow` of cosines, with an epsilon in the norms of keys: small keys
    are as far from each query as in `sparse.nearest`."""

    def __init__(self, keys, norm_epsilon, *arguments):
        self._norm_epsilon = norm_epsilon
        super().__init__(keys, "dot", *arguments)

    def _vectors(self, slots):
        keys = super()._vectors(slots)
        squares = np.einsum("nd,nd->n", keys, keys, dtype="float64")
        norms = np.sqrt(squares + self._norm_epsilon)[:, None]
        return np.divide(keys, norms, out=keys, casting="same_kind")
