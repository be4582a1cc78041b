"""A memory of (key, value) pairs whose methods take and return its state."""

import dataclasses
import functools
import operator
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.slots import precise_products
from keras_memory.addressing.slots import replace_rows
from keras_memory.addressing.slots import rows_at
from keras_memory.checks import check_array
from keras_memory.checks import check_one_of
from keras_memory.checks import check_open
from keras_memory.checks import check_process
from keras_memory.checks import check_size
from keras_memory.checks import make_plain
from keras_memory.hints import Array
from keras_memory.retrieval.entries import FLOATS
from keras_memory.retrieval.entries import KEY_REMEDY
from keras_memory.retrieval.entries import OF_INTEGERS
from keras_memory.retrieval.entries import check_bytes_of_entries
from keras_memory.retrieval.entries import check_dtype
from keras_memory.retrieval.entries import check_top_k
from keras_memory.retrieval.entries import check_value_dtype
from keras_memory.retrieval.entries import of_values
from keras_memory.retrieval.exact import Neighbours
from keras_memory.retrieval.exact import largest
from keras_memory.retrieval.similarities import SIMILARITIES
from keras_memory.retrieval.similarities import about_middle
from keras_memory.retrieval.similarities import is_sound
from keras_memory.retrieval.similarities import places_of_sample
from keras_memory.retrieval.similarities import similarity_of
from keras_memory.retrieval.similarities import unit

QUERIES = 1024  # queries compared at a time
MOST_SLOTS = 1 << 30  # slots of a row: counts, below twice as many, fit int32
SEARCH_METHODS = ("exact", "auto", "approximate")


class RingState(NamedTuple):
    """A memory of (key, value) pairs for each row of a batch.

    Args:
        keys: (B, N, D), 0 until a slot is first written.
        values: (B, N, V), likewise.
        count: (B,) int32 in [0, 2 N): the number of entries added since the
            row was cleared; at 2 N it falls back to N. The next entry goes to
            slot `count % N`.
    """

    keys: Any
    values: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class RingMemory:
    """Nearest-neighbor memory in the graph, exact by default.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3: a memory of (key,
    value) pairs without gradient, which drops the oldest entries.

    All methods are pure functions of tensors on any backend; they compile with
    XLA and lower for GPU and TPU. `add` and `clear` take a state and return the
    next one: pass it from call to call, or use `KNNMemoryLayer`, which keeps it
    in weights. Each row of the batch has its own memory.

    A graph cannot raise errors about values. Instead, an entry with a NaN, an
    infinity or a component beyond 1e15 is not written, and such a query finds
    nothing.

    Args:
        key_dim: int, D, width of keys and queries.
        memory_size: int, N, slots of each row, at most 2^30; once a row is
            full, each new entry replaces the oldest.
        value_dim: int, V, width of values, 0 for none; None (default) for D.
        similarity: `"dot"` (default), `"cosine"`, 0 for vectors of zeros, or
            `"l2"`, minus the squared distance.
        search_method: `"exact"` (default), the largest products with all keys;
            `"auto"`, the same result, faster for large memories: only the
            groups of slots with the largest maxima are sorted;
            `"approximate"`, the approximate search of TensorFlow or JAX, faster
            on a TPU; on other backends the same as `"exact"`.
        target_recall: float in (0, 1), the recall of `"approximate"`, 0.95 by
            default.
        value_dtype: str, dtype in which values are stored and returned:
            `"int32"` or `"int64"` for integers such as ids, `"float16"`,
            `"bfloat16"`, `"float32"` or `"float64"`; None (default) for the
            dtype of the keys.

    Raises:
        ValueError: a size below 1 (`value_dim`: 0), an unknown similarity,
            search method or dtype, or a dtype that the backend lacks.

    Example:

    >>> ring = RingMemory(key_dim=2, memory_size=3)
    >>> state = ring.initial_state(batch_size=1)
    >>> keys = np.array([[[1.0, 0.0], [0.0, 1.0]]], "float32")
    >>> state = ring.add(state, keys, values=keys)
    >>> found = ring.search(state, keys[:, :1], top_k=3)
    >>> found.indices.numpy(), found.mask.numpy()
    (array([[[ 0,  1, -1]]], dtype=int32), array([[[ True,  True, False]]]))
    """

    key_dim: int
    memory_size: int
    value_dim: int | None = None
    similarity: str = "dot"
    search_method: str = "exact"
    target_recall: float = 0.95
    value_dtype: str | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        width = self.key_dim if self.value_dim is None else self.value_dim
        for name, size in (
            ("key_dim", check_size("key_dim", self.key_dim)),
            ("memory_size", check_size("memory_size", self.memory_size)),
            ("value_dim", check_size("value_dim", width, least=0)),
        ):
            object.__setattr__(self, name, size)
        if self.memory_size > MOST_SLOTS:
            raise ValueError(
                f"`memory_size` must be at most {MOST_SLOTS}, since a row's "
                "count reaches twice as many and must fit int32. "
                f"Received: memory_size={self.memory_size}"
            )
        check_one_of("similarity", self.similarity, SIMILARITIES)
        check_one_of("search_method", self.search_method, SEARCH_METHODS)
        check_open("target_recall", self.target_recall)
        dtype = check_value_dtype(self.value_dtype)
        object.__setattr__(self, "value_dtype", dtype)

    def initial_state(
        self, batch_size: Array, dtype: str = "float32"
    ) -> RingState:
        """An empty memory for each row.

        Args:
            batch_size: int or scalar tensor, B.
            dtype: str, dtype of keys, and of values unless `value_dtype` is
                set; floating point. 16 bits halve the memory use. Keys are
                compared in float32 in any case.

        Returns:
            `RingState`.
        """
        check_process("RingMemory")
        if not ops.is_tensor(batch_size):
            check_size("batch_size", batch_size, least=0)
        dtype = check_dtype("dtype", dtype, FLOATS, OF_INTEGERS)
        self._check_bytes(batch_size, dtype)
        slots = (batch_size, self.memory_size)
        return RingState(
            ops.zeros((*slots, self.key_dim), dtype),
            ops.zeros((*slots, self.value_dim), self.value_dtype or dtype),
            ops.zeros((batch_size,), "int32"),
        )

    def _check_bytes(self, batch_size, dtype):
        is_known = isinstance(batch_size, (int, np.integer))
        rows = batch_size if is_known else None
        slots = ("batch size", rows), ("memory_size", self.memory_size)
        check_bytes_of_entries(
            slots, self.key_dim, self.value_dim, dtype, self.value_dtype
        )

    def size(self, state: RingState) -> Array:
        """(B,) int32, the number of entries in each row."""
        state, _ = self._checked(state)
        return ops.minimum(state.count, self.memory_size)

    def clear(self, state: RingState, rows: Array) -> RingState:
        """Clears some rows. Other rows keep their entries.

        Args:
            state: `RingState`.
            rows: (B,) bool, True for rows to clear.

        Returns:
            `RingState`.
        """
        state, sizes = self._checked(state)
        rows = check_array("rows", rows, ("B",), sizes, "bool")
        return state._replace(
            count=ops.where(rows, ops.zeros_like(state.count), state.count)
        )

    def add(
        self,
        state: RingState,
        keys: Array,
        values: Array | None = None,
        mask: Array | None = None,
    ) -> RingState:
        """Appends entries to each row; a full row drops its oldest entries.

        Args:
            state: `RingState`.
            keys: (B, n, D), any real value; n may be larger than N. Integers
                must be exact in the dtype of the state: NumPy arrays and lists
                are checked by value, tensors by dtype.
            values: (B, n, V), likewise; None if V is 0.
            mask: (B, n) bool, False for entries that are left out; None for
                all. A row of False stays unchanged.

        Returns:
            `RingState`. No gradient flows to the new entries.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        state, sizes = self._checked(state)
        keys, values = self._entries(state, keys, values, sizes)
        kept = is_sound(keys)
        if not _is_integer(values):
            kept = kept & is_sound(values)
        if mask is not None:
            kept = kept & check_array("mask", mask, ("B", "n"), sizes, "bool")
        if keys.shape[1] == 0:
            return state
        if keys.shape[1] is None:  # may be 0: pad by a masked entry
            keys, values = (
                ops.pad(part, ((0, 0), (0, 1), (0, 0)))
                for part in (keys, values)
            )
            kept = ops.pad(kept, ((0, 0), (0, 1)), constant_values=False)
        size = self.memory_size
        order = ops.cumsum(ops.cast(kept, "int32"), axis=1)
        added = order[:, -1:]
        kept = kept & (order > added - size)  # the last N at most
        # A masked entry repeats the last kept entry, or the next slot's
        # content, so that no slot is written with two different contents.
        last = ops.argmax(ops.where(kept, order, 0), axis=1)[:, None]
        here = ops.arange(ops.shape(keys)[1], dtype="int32")
        source = ops.where(kept, here, ops.cast(last, "int32"))
        order = ops.take_along_axis(order, source, axis=1)
        slots = _after(state.count[:, None], ops.maximum(order - 1, 0), size)
        slots = slots % size

        def written(before, entries):
            entries = ops.where(
                added[:, :, None] > 0,
                rows_at(entries, source),
                rows_at(before, slots),
            )
            return replace_rows(before, slots, entries)

        return RingState(
            written(state.keys, keys),
            written(state.values, values) if self.value_dim else state.values,
            _after(state.count, added[:, 0], size),
        )

    def search(
        self, state: RingState, queries: Array, top_k: int
    ) -> Neighbours:
        """Finds the entries nearest to each query in its row's memory.

        Args:
            state: `RingState`.
            queries: (B, ..., D), any real value.
            top_k: int, K, from 1 to N.

        Returns:
            `Neighbours`. Gradients flow from the scores to the queries, but not
            to the memory.

        Raises:
            ValueError: wrong shapes or dtypes, or `top_k` out of range.
        """
        check_top_k(top_k, self.memory_size)
        state, sizes = self._checked(state)
        queries = check_array(
            "queries", queries, ("B", ..., self.key_dim), sizes, dtype="float32"
        )
        shape = (*ops.shape(queries)[:-1], top_k)
        number = functools.reduce(operator.mul, shape[1:-1], 1)
        flat = ops.reshape(queries, (shape[0], number, self.key_dim))
        sound = is_sound(flat)[..., None]
        flat = ops.where(sound, flat, 0.0)
        state = RingState(*map(ops.stop_gradient, state))
        products, slots = self._find(state, ops.stop_gradient(flat), top_k)
        mask = sound & (products > -np.inf)
        keys = rows_at(state.keys, slots)
        scores = similarity_of(flat[:, :, None], keys, self.similarity)
        neighbours = Neighbours(
            ops.where(mask, scores, -np.inf),
            ops.where(mask, slots, -1),
            mask,
            ops.where(mask[..., None], keys, 0),
            ops.where(mask[..., None], rows_at(state.values, slots), 0),
        )
        widths = (), (), (), (self.key_dim,), (self.value_dim,)
        return Neighbours(
            *(
                ops.reshape(part, (*shape, *width))
                for part, width in zip(neighbours, widths)
            )
        )

    def _find(self, state, queries, top_k):
        """(B, Q, K) largest products, -inf for empty slots, and their slots."""
        keys = ops.cast(state.keys, "float32")
        slots = ops.arange(self.memory_size, dtype="int32")
        size = ops.minimum(state.count, self.memory_size)[:, None]
        bias = ops.where(slots < size, ops.cast(0.0, "float32"), -np.inf)
        if self.similarity == "cosine":
            queries, keys = unit(queries), unit(keys)
        if self.similarity == "l2":
            places = places_of_sample(ops.maximum(size, 1), ops)
            sample = rows_at(keys, places)
            queries, keys, nearness = about_middle(queries, keys, sample)
            bias = bias + nearness
        keys = ops.swapaxes(keys, 1, 2)

        def search(queries):
            products = precise_products(queries, keys) + bias[:, None]
            largest, slots = self._largest(products, top_k)
            return largest, ops.cast(slots, "int32")

        number = queries.shape[1]
        # JAX has expressions for unknown sizes.
        if not isinstance(number, int) or number <= QUERIES:
            return search(queries)
        blocks = -(-number // QUERIES)
        more = blocks * QUERIES - number
        queries = ops.pad(queries, ((0, 0), (0, more), (0, 0)))
        queries = ops.reshape(queries, (-1, blocks, QUERIES, self.key_dim))
        results = ops.map(search, ops.swapaxes(queries, 0, 1))
        return tuple(
            ops.reshape(
                ops.swapaxes(part, 0, 1), (-1, blocks * QUERIES, top_k)
            )[:, :number]
            for part in results
        )

    def _largest(self, products, top_k):
        backend = keras.backend.backend()
        if self.search_method == "approximate" and backend == "jax":
            import jax

            return jax.lax.approx_max_k(
                products, top_k, recall_target=self.target_recall
            )
        if self.search_method == "approximate" and backend == "tensorflow":
            import tensorflow as tf

            return tf.math.approx_max_k(
                products, top_k, recall_target=self.target_recall
            )
        if self.search_method == "auto":
            return largest(products, top_k)
        return ops.top_k(products, top_k)

    def _checked(self, state):
        """A state as checked tensors, and a dict with B, its number of rows."""
        check_process("RingMemory")
        if not isinstance(state, (tuple, list)) or len(state) != 3:
            raise ValueError(
                "`state` must be a `RingState`, as `initial_state` returns. "
                f"Received: {type(state).__name__}"
            )
        keys, values, count = state
        sizes, slots = {}, ("B", self.memory_size)
        options = of_values(self.value_dtype)
        keys = check_array(
            "state.keys", keys, (*slots, self.key_dim), sizes, remedy=KEY_REMEDY
        )
        values = check_array(
            "state.values", values, (*slots, self.value_dim), sizes, **options
        )
        count = check_array(
            "state.count", count, ("B",), sizes, "integer", "int32"
        )
        return RingState(keys, values, count), sizes

    def _entries(self, state, keys, values, sizes):
        """Checked keys and values in the state's dtypes, without gradient."""
        dtypes = [ops.dtype(part) for part in state]
        of_keys = {"dtype": dtypes[0], "remedy": KEY_REMEDY}
        keys = check_array(
            "keys", keys, ("B", "n", self.key_dim), sizes, **of_keys
        )
        if values is None and not self.value_dim:
            values = ops.zeros((*ops.shape(keys)[:2], 0), dtypes[1])
        values = check_array(
            "values",
            values,
            ("B", "n", self.value_dim),
            sizes,
            **of_values(self.value_dtype, dtypes[1]),
        )
        return ops.stop_gradient(keys), ops.stop_gradient(values)


def _is_integer(array):
    return "int" in ops.dtype(array)


def _after(count, added, size):
    """The `count` of a `RingState` after `added` more entries, all int32.

    No intermediate sum exceeds 2 N, so nothing overflows.
    """
    is_full = added >= size - count
    # Python's numbers would become int64 where `floatx` is float64.
    full = ops.cast(is_full, "int32") * size
    return (count % size + added % size) % size + full
