"""`KNNMemory`: (key, value) pairs in host RAM, with nearest-neighbor search.

Wu et al., "Memorizing Transformers", 2022 (arXiv 2203.08913), section 3. Axes:
R rows, each with its own memory, n entries, N slots of a row, D width of keys,
V width of values, K neighbors.
"""

import contextlib
import math
import threading
import weakref
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_memory.arguments import Arguments
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_one_of
from keras_memory.checks import check_open
from keras_memory.checks import check_size
from keras_memory.checks import has_accelerator
from keras_memory.hints import Array
from keras_memory.retrieval import forks
from keras_memory.retrieval.durable import STORED
from keras_memory.retrieval.durable import Durable
from keras_memory.retrieval.entries import KEY_REMEDY
from keras_memory.retrieval.entries import VALUE_REMEDY
from keras_memory.retrieval.entries import check_bools
from keras_memory.retrieval.entries import check_bytes_of_entries
from keras_memory.retrieval.entries import check_value_dtype
from keras_memory.retrieval.entries import check_vectors
from keras_memory.retrieval.entries import to_numpy
from keras_memory.retrieval.exact import Neighbours
from keras_memory.retrieval.exact_row import ExactRow
from keras_memory.retrieval.ring import RingMemory
from keras_memory.retrieval.scann_row import Builder
from keras_memory.retrieval.scann_row import ScannRow
from keras_memory.retrieval.similarities import SIMILARITIES
from keras_memory.retrieval.tuning import check_scann
from keras_memory.retrieval.tuning import closeness
from keras_memory.retrieval.tuning import import_error
from keras_memory.retrieval.tuning import recall

SEARCH_METHODS = ("auto", "exact", "approximate")


class Statistics(NamedTuple):
    """Usage of the entries of a row, the oldest entry first.

    Args:
        hits: (n,) int64, how often each entry was found.
        age: (n,) int64, searches of the row since the entry was added.
        age_since_hit: (n,) int64, searches of the row since the entry was last
            found, or added if never found.
    """

    hits: Any
    age: Any
    age_since_hit: Any


class KNNMemory(Arguments, Durable):
    """Rows of (key, value) entries in host RAM, with nearest-neighbor search.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3: each row of a batch
    has its own memory, without gradient, which drops its oldest entries one by
    one.

    Methods take NumPy arrays or tensors of any backend and return NumPy arrays.
    A memory is thread-safe: its threads take turns. For a memory within a
    compiled model use `KNNMemoryLayer` or `retrieval.RingMemory`.

    Search methods: `"exact"` compares with all entries, by the Keras backend,
    on a GPU if there is one. `"approximate"` uses ScaNN. Up to 16,384 entries a
    row, ScaNN compares with all, faster than the backend on a CPU. For more
    entries it builds a tree that reaches `target_recall`, in the background,
    and rebuilds the tree as entries change; meanwhile searches use the previous
    index. If every tree would have to compare a quarter of the entries or more,
    as in data without clusters, all entries are compared. `recall` measures the
    recall.

    Durability: `save` and `load`; or `open` a folder, to which `flush` writes
    new entries, so that they survive a kill and a loss of power.

    Args:
        key_dim: int, D, width of keys and queries.
        memory_size: int, N, slots of each row; once a row is full, each new
            entry replaces the oldest.
        num_rows: int, R, 1 by default.
        value_dim: int, V, width of values, 0 for none; None (default) for D.
        similarity: `"dot"` (default), `"cosine"`, 0 for vectors of zeros, or
            `"l2"`, minus the squared distance.
        search_method: `"approximate"`, by ScaNN; `"exact"`, by the backend; or
            `"auto"` (default), approximate if ScaNN can be imported and the
            backend sees no accelerator.
        target_recall: float in (0, 1), 0.95 by default, the recall that trees
            are tuned for.
        background: bool. True (default): trees are built in a background
            thread, so results depend on timing. False: `add` waits for the
            tree, and runs are reproducible.
        keep_statistics: bool, False by default; see `statistics`.
        value_dtype: str, dtype in which values are stored and returned:
            `"int32"` or `"int64"` for integers such as ids, `"float16"`,
            `"bfloat16"`, `"float32"` or `"float64"`; None (default) for
            float32, the dtype of the keys.

    Forks: ScaNN works in a fork, which builds its own trees. Exact search
    raises RuntimeError in a fork of a process that used the backend, since a
    fork lacks the backend's threads: start such processes by `"spawn"`. A fork
    neither writes nor refreshes an open folder.

    Raises:
        ValueError: an argument out of range.
        ImportError: `search_method="approximate"`, and ScaNN cannot be
            imported.

    Example:

    >>> memory = KNNMemory(key_dim=2, memory_size=3, num_rows=2, value_dim=1)
    >>> keys = np.eye(2, dtype="float32")[None].repeat(2, axis=0)
    >>> memory.add(keys, values=[[[1.0], [2.0]], [[3.0], [4.0]]])
    array([[0, 1],
           [0, 1]], dtype=int32)
    >>> memory.clear(rows=[0])
    >>> memory.size()
    array([0, 2], dtype=int32)
    >>> found = memory.search([[[2.0, 1.0]]], top_k=2, rows=[1])
    >>> found.values[0, 0, :, 0], found.scores[0, 0]
    (array([3., 4.], dtype=float32), array([2., 1.], dtype=float32))
    """

    def __init__(
        self,
        key_dim: int,
        memory_size: int,
        num_rows: int = 1,
        value_dim: int | None = None,
        similarity: str = "dot",
        search_method: str = "auto",
        target_recall: float = 0.95,
        background: bool = True,
        keep_statistics: bool = False,
        value_dtype: str | None = None,
    ):
        self.key_dim = check_size("key_dim", key_dim)
        self.memory_size = check_size("memory_size", memory_size)
        self.num_rows = check_size("num_rows", num_rows)
        if value_dim is None:
            value_dim = key_dim
        self.value_dtype: str = check_value_dtype(value_dtype, False, "float32")
        self.value_dim = check_size("value_dim", value_dim, least=0)
        self.similarity = check_one_of("similarity", similarity, SIMILARITIES)
        self.target_recall: float = check_open("target_recall", target_recall)
        self.background = check_bool("background", background)
        self.keep_statistics = check_bool("keep_statistics", keep_statistics)
        check_one_of("search_method", search_method, SEARCH_METHODS)
        if search_method == "auto":
            may = import_error() is None and not has_accelerator()
            search_method = "approximate" if may else "exact"
        if search_method == "exact":
            RingMemory(key_dim, memory_size, 0)  # raises for too many slots
        if search_method == "approximate":
            check_scann(
                '`KNNMemory(search_method="approximate")`',
                'Or use `search_method="exact"`',
            )
        self.search_method = search_method
        slots = (num_rows, memory_size)
        rows = ("num_rows", num_rows), ("memory_size", memory_size)
        check_bytes_of_entries(
            rows, key_dim, value_dim, "float32", self.value_dtype, on_host=True
        )
        check_bytes(  # about 1 kB each
            "An index for each row",
            [rows[0], ("bytes", 1000)],
            "uint8",
            on_host=True,
        )
        self._keys = np.zeros((*slots, key_dim), "float32")
        self._values = np.zeros((*slots, value_dim), self.value_dtype)
        self._count = np.zeros(num_rows, "int64")  # added since last cleared
        self._lock = threading.RLock()
        self._builder = None
        if search_method == "approximate" and background:
            self._builder = Builder()
            weakref.finalize(self, self._builder.close)
        self._indexes = [self._index(row) for row in range(num_rows)]
        if keep_statistics:
            self._searches = np.zeros(num_rows, "int64")
            self._hits = np.zeros(slots, "int64")
            self._added_at = np.zeros(slots, "int64")
            self._hit_at = np.zeros(slots, "int64")
        self._is_counted = True  # whether searches enter statistics and tuning
        self._file = self._mode = None
        self._stored_count = np.zeros(num_rows, "int64")  # `_count` in the file
        self._is_cleared = np.zeros(num_rows, bool)  # cleared since the flush
        forks.register(self)

    def _index(self, row):
        if self.search_method == "exact":
            return ExactRow(self._keys[row], self.similarity)
        return ScannRow(
            self._keys[row],
            self.similarity,
            self.target_recall,
            self._lock,
            self._builder,
        )

    def add(
        self,
        keys: Array,
        values: Array | None = None,
        mask: Array | None = None,
        rows: Array | None = None,
    ) -> np.ndarray:
        """Appends entries to rows; a full row drops its oldest entries.

        Args:
            keys: (R, n, D), finite, each component within +-1e15. Integers must
                be exact in float32. In a memory of one row also (n, D); then
                values, mask and slots have no axis of rows either.
            values: (R, n, V), likewise; None if V is 0. Integers must be exact
                in `value_dtype`.
            mask: (R, n) bool, False for entries that are left out; None for
                all.
            rows: ints, the rows to add to, or (num_rows,) bool; None for all.
                Other rows stay unchanged.

        Returns:
            (R, n) int32, the slot of each entry, an index for your own data; -1
            if the entry was left out, or replaced by later entries of the same
            call. Slots do not change in this object, but a memory that is
            loaded may number its entries anew, from the oldest: store ids that
            must last in `values`.

        Raises:
            ValueError: wrong shapes, dtypes, values or rows, or a memory opened
                for reading, or closed. Nothing was added.
        """
        with self._lock:
            self._check_writable()
            rows = self._rows(rows)
            keys = to_numpy("keys", keys)
            is_of_one = self._is_of_one(keys, rows)
            axis = () if is_of_one else (len(rows),)
            keys = check_vectors(
                "keys",
                keys,
                (*axis, None, self.key_dim),
                rows,
                remedy=KEY_REMEDY,
            )
            shape = (*keys.shape[:-1], self.value_dim)
            if values is None and not self.value_dim:
                values = np.zeros(shape, self.value_dtype)
            values = check_vectors(
                "values", values, shape, rows, self.value_dtype, VALUE_REMEDY
            )
            kept = np.ones(shape[:-1], bool)
            if mask is not None:
                kept = check_bools(
                    "mask", mask, shape[:-1], "one for each entry"
                )
            if is_of_one:
                keys, values, kept = keys[None], values[None], kept[None]
            slots = np.full(kept.shape, -1, "int32")
            for i, (row, is_kept) in enumerate(zip(rows, kept)):
                if is_kept.any():
                    entries = keys[i, is_kept], values[i, is_kept]
                    slots[i, is_kept] = self._add(row, *entries)
            return slots[0] if is_of_one else slots

    def _is_of_one(self, array, rows):
        """Whether an array for the only row lacks the axis of rows."""
        return self.num_rows == len(rows) == 1 and array.ndim == 2

    def _add(self, row, keys, values):
        """Appends checked entries to one row; returns their slots, as `add`."""
        number, size = len(keys), self.memory_size
        first = max(0, number - size)  # later ones replace those before
        self._count[row] += number
        numbers = np.arange(self._count[row] - number, self._count[row])
        slots = numbers[first:] % size
        self._keys[row, slots] = keys[first:]
        self._values[row, slots] = values[first:]
        if self.keep_statistics:
            self._hits[row, slots] = 0
            self._added_at[row, slots] = self._searches[row]
            self._hit_at[row, slots] = self._searches[row]
        if len(slots):
            self._indexes[row].write(slots)
        return np.concatenate([np.full(first, -1), slots])

    def search(
        self,
        queries: Array,
        top_k: int,
        rows: Array | None = None,
        return_keys: bool = True,
        return_values: bool = True,
    ) -> Neighbours:
        """Finds the entries nearest to each query in its row.

        Args:
            queries: (R, ..., D), finite, each component within +-1e15. In a
                memory of one row also (Q, D), for results of shape (Q, K).
            top_k: int, K, at least 1. If a row has fewer entries, the mask is
                False for the rest.
            rows: ints, the rows to search, or (num_rows,) bool; None for all.
            return_keys, return_values: bool, True by default. False is faster,
                and returns arrays of shape (R, ..., K, 0) instead.

        Returns:
            `retrieval.Neighbours` of NumPy arrays.

        Raises:
            ValueError: wrong shapes, dtypes, values or rows.
            RuntimeError: `search_method="exact"`, in a fork; see the class.
        """
        check_size("top_k", top_k)
        check_bool("return_keys", return_keys)
        check_bool("return_values", return_values)
        with self._lock:
            rows = self._rows(rows)
            queries, is_of_one = self._queries(queries, rows)
            flat = _flat(queries)
            shape = (len(rows), flat.shape[1], top_k)
            check_bytes(
                "The neighbours",
                [("rows", len(rows)), ("queries", shape[1]), ("top_k", top_k)]
                + [
                    (
                        "2 + key_dim + value_dim",
                        2 + self.key_dim + self.value_dim,
                    )
                ],
                on_host=True,
            )
            slots = np.full(shape, -1, "int32")
            scores = np.full(shape, -np.inf, "float32")
            for i, row in enumerate(rows):
                self._search(row, flat[i], slots[i], scores[i])
            widths = (
                self.key_dim if return_keys else 0,
                self.value_dim if return_values else 0,
            )
            result = Neighbours(
                scores,
                slots,
                slots >= 0,
                np.empty((*shape, widths[0]), "float32"),
                np.empty((*shape, widths[1]), self.value_dtype),
            )
            for i, row in enumerate(rows):
                for stored, output in (
                    (self._keys, result.keys),
                    (self._values, result.values),
                ):
                    if output.size:
                        # "wrap" skips the bounds check; -1 is the last slot.
                        np.take(
                            stored[row],
                            slots[i],
                            axis=0,
                            out=output[i],
                            mode="wrap",
                        )
                        if (slots[i] < 0).any():
                            output[i][slots[i] < 0] = 0
        shape = (*queries.shape[:-1], top_k)
        if is_of_one:
            shape = shape[1:]
        return Neighbours(
            *(part.reshape(shape) for part in result[:3]),
            result.keys.reshape(*shape, widths[0]),
            result.values.reshape(*shape, widths[1]),
        )

    def _queries(self, queries, rows):
        """(R, ..., D) float32, and whether the axis of rows was added."""
        queries = to_numpy("queries", queries)
        is_of_one = self._is_of_one(queries, rows)
        axis = () if is_of_one else (len(rows),)
        queries = check_vectors(
            "queries", queries, (*axis, ..., self.key_dim), rows
        )
        return (queries[None] if is_of_one else queries), is_of_one

    def _search(self, row, queries, slots, scores):
        """Searches one row, and writes to (Q, K) `slots` and `scores`."""
        size = int(self.size()[row])
        if self.keep_statistics and self._is_counted:
            self._searches[row] += 1
        if not size or not len(queries):
            return
        count = min(slots.shape[1], size)
        indices, similarities = self._indexes[row].search(
            queries, count, self._is_counted
        )
        is_found = similarities > -np.inf
        slots[:, :count] = np.where(is_found, indices, -1)
        scores[:, :count] = similarities
        if self.keep_statistics and self._is_counted:
            hits = np.bincount(indices[is_found], minlength=self.memory_size)
            self._hits[row] += hits
            self._hit_at[row, hits > 0] = self._searches[row]

    def clear(self, rows: Array | None = None) -> None:
        """Clears rows. Other rows keep their entries.

        Args:
            rows: ints, the rows to clear, or (num_rows,) bool; None for all.

        Raises:
            ValueError: wrong rows, or a memory opened for reading, or closed.
        """
        with self._lock:
            self._check_writable()
            for row in self._rows(rows):
                self._clear(row)

    def _clear(self, row):
        self._count[row] = self._stored_count[row] = 0
        self._is_cleared[row] = True
        self._indexes[row].clear()

    def size(self) -> np.ndarray:
        """(num_rows,) int32, the number of entries in each row."""
        return np.minimum(self._count, self.memory_size).astype("int32")

    def entries(self, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The entries of a row, the oldest first.

        Args:
            row: int, from 0 to `num_rows` - 1.

        Returns:
            (n, D) keys and (n, V) values, copies.
        """
        with self._lock:
            slots = self._slots(row)
            return self._keys[row, slots], self._values[row, slots]

    def statistics(self, row: int = 0) -> Statistics:
        """Usage of the entries of a row.

        Args:
            row: int, from 0 to `num_rows` - 1.

        Returns:
            `Statistics`, in the order of `entries`.

        Raises:
            ValueError: the memory was created without `keep_statistics`.
        """
        if not self.keep_statistics:
            raise ValueError(
                "`keep_statistics` must be True when the memory is created, so "
                "that searches are counted. Received: keep_statistics=False"
            )
        with self._lock:
            slots = self._slots(row)
            now = self._searches[row]
            return Statistics(
                self._hits[row, slots],
                now - self._added_at[row, slots],
                now - self._hit_at[row, slots],
            )

    def _slots(self, row):
        """The slots of a row's entries, the oldest first."""
        if isinstance(row, (bool, np.bool_)):  # [True] is a row
            check_size("row", row, least=0)
        (row,) = self._rows([row])
        count = int(self._count[row])
        first = max(0, count - self.memory_size)
        return np.arange(first, count) % self.memory_size

    def recall(
        self,
        queries: Array | None = None,
        top_k: int = 32,
        rows: Array | None = None,
        sample: int = 1000,
    ) -> float:
        """The recall of searches: the share of nearest entries that they find.

        Entries as near as a nearest one count too.

        Args:
            queries: (R, ..., D), of which a sample is used; None for keys in
                the memory, which are easier to find than other queries.
            top_k: int, K, at least 1.
            rows: ints, the rows to search, or (num_rows,) bool; None for all.
            sample: int, number of queries to use for each row.

        Returns:
            float in [0, 1]; 1.0 if there is nothing to find.
        """
        check_size("top_k", top_k)
        check_size("sample", sample)
        num_found = num_wanted = 0
        with self._lock, self._uncounted():
            rows = self._rows(rows)
            if queries is not None:
                queries = _flat(self._queries(queries, rows)[0])
            for i, row in enumerate(rows):
                of_row = queries[i] if queries is not None else None
                if of_row is None:
                    of_row = self._keys[row, self._slots(row)]
                step = max(1, -(-len(of_row) // sample))
                of_row = of_row[::step]
                count = min(top_k, int(self.size()[row]))
                if not count or not len(of_row):
                    continue
                slots = self.search(
                    of_row[None],
                    count,
                    [row],
                    return_keys=False,
                    return_values=False,
                ).indices[0]
                exact = ExactRow(self._keys[row], self.similarity)
                exact.size = self._indexes[row].size
                right, _ = exact.search(of_row, count)
                near, right = (
                    closeness(
                        of_row, self._keys[row], self.similarity, candidates
                    )
                    for candidates in (slots, right)
                )
                near = np.where(slots >= 0, near, -np.inf)
                num_found += recall(near, right) * right.size
                num_wanted += right.size
        return num_found / num_wanted if num_wanted else 1.0

    @contextlib.contextmanager
    def _uncounted(self):
        self._is_counted = False
        try:
            yield
        finally:
            self._is_counted = True

    def wait(self) -> None:
        """Waits until all trees under construction are in use."""
        for index in self._indexes:
            index.wait()

    # Files.

    def _before_fork(self):
        self._lock.acquire()
        if self._file is not None:
            self._file.disconnect()

    def _after_fork(self, is_child):
        if is_child and self._builder is not None:
            self._builder.after_fork()
            for index in self._indexes:
                index.after_fork()
        self._lock.release()

    def __reduce__(self) -> Any:
        raise TypeError(
            "A `KNNMemory` cannot be pickled or copied: use `save` and `load`. "
            f"Received: {self!r}"
        )

    def __repr__(self) -> str:
        names = [*STORED[:-1], "search_method", "target_recall"]
        if self.value_dtype != "float32":
            names.insert(-2, "value_dtype")
        values = (f"{name}={getattr(self, name)!r}" for name in names)
        return f"KNNMemory({', '.join(values)})"

    def _rows(self, rows):
        """The argument `rows`, checked, as ints."""
        if rows is None:
            return np.arange(self.num_rows)
        wanted = (
            "`rows` must be different ints from 0 to num_rows - 1, or "
            f"({self.num_rows},) bool. Received: rows={rows!r}, "
            f"num_rows={self.num_rows}"
        )
        rows = to_numpy("rows", rows)
        if rows.dtype == bool:
            if rows.shape != (self.num_rows,):
                raise ValueError(wanted)
            return np.flatnonzero(rows)
        if rows.ndim == 1 and not rows.size:
            return rows.astype("int64")
        is_int = rows.dtype.kind in "iu" and rows.ndim == 1
        if not is_int or len(set(rows.tolist())) < len(rows):
            raise ValueError(wanted)
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise ValueError(wanted)
        return rows


def _flat(queries):
    """(R, ..., D) as (R, Q, D)."""
    rows, *number, width = queries.shape
    return queries.reshape(rows, math.prod(number), width)
