"""Nearest neighbours, by exact search in the graph.

Axes: B rows of a batch, each with a memory of its own, N slots, D width of
keys, V width of values, K neighbours.
"""

import dataclasses
import functools
import operator
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_bytes
from keras_memory.checks import check_exact
from keras_memory.checks import check_one_of
from keras_memory.checks import check_process
from keras_memory.checks import check_size
from keras_memory.checks import check_within
from keras_memory.checks import make_plain
from keras_memory.checks import with_rows_of

BLOCK = 16384  # keys that are compared at a time
QUERIES = 1024  # queries that are compared at a time
GROUP = 8  # values whose largest is looked at first, if there are many
LARGEST = 1e15  # of a component: products of two must be finite in float32
MOST_SLOTS = 1 << 30  # of a row: its count is below twice as many
SAMPLE = 63  # keys amid which distances are measured from

SIMILARITIES = ("dot", "cosine", "l2")
METHODS = ("exact", "blocked", "approximate")
WRITES = ("training", "always", "never")
FLOATS = ("float16", "bfloat16", "float32", "float64")
VALUE_DTYPES = (*FLOATS, "int32", "int64")
OF_INTEGERS = ", floating point types: `value_dtype` is for integers as values"
KEY_REMEDY = "Keys are floats: cast them yourself where they may be rounded."
VALUE_REMEDY = (
    'The memory keeps integers if made with `value_dtype="int32"` or '
    '"int64", and floats with "float32".'
)


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
        ValueError: `top_k` is not from 1 to M; wrong shapes or dtypes.

    Example:

    >>> keys = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], "float32")
    >>> products, indices = nearest(keys[:1], keys, top_k=2)
    >>> indices
    <tf.Tensor: shape=(1, 2), dtype=int32, numpy=array([[2, 0]], dtype=int32)>
    """
    check_process("nearest")
    sizes = {}
    queries = check_array("queries", queries, ("B", "D"), sizes)
    keys = check_array("keys", keys, ("M", "D"), sizes)
    queries, keys = ops.stop_gradient(queries), ops.stop_gradient(keys)
    if bias is not None:
        dtype = keras.backend.result_type(ops.dtype(queries), ops.dtype(keys))
        bias = check_array("bias", bias, (..., "M"), sizes, dtype=dtype)
        bias = ops.stop_gradient(bias)
        if len(bias.shape) != 1:
            check_array("bias", bias, ("B", "M"), sizes)
    number = keys.shape[0]
    both = isinstance(number, int) and isinstance(top_k, int)
    if both and not 1 <= top_k <= number:
        raise ValueError(
            "`top_k` must be from 1 to the number of keys. "
            f"Received: top_k={top_k}, keys of shape {tuple(keys.shape)}"
        )
    if not ops.is_tensor(top_k):
        top_k = check_size("top_k", top_k)
    if not isinstance(number, int) or number <= BLOCK:  # a free one is small
        products = inner_products(queries, ops.transpose(keys))
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
        products = inner_products(queries, ops.transpose(some))
        if bias is not None:
            products = products + ops.take(bias, rows, axis=-1)
        is_new = rows >= block * BLOCK
        products = ops.where(is_new, products, -np.inf)
        products, columns = largest(products, min(top_k, BLOCK))
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


def inner_products(vectors, columns):
    """A product of matrices as exact as their dtype, on accelerators too.

    By default JAX and TensorFlow let a GPU round float32 factors to 11 bits,
    and a TPU to 8: one of two thousand neighbours would be a wrong one, or
    more.

    Args:
        vectors: (..., n, D).
        columns: (..., D, m), vectors too.

    Returns:
        (..., n, m).
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            return ops.matmul(vectors, columns)
    dtypes = {ops.dtype(vectors), ops.dtype(columns)}
    if backend == "tensorflow" and dtypes == {"float32"} and _rounds():
        (high, low), (columns, rest) = map(_halves, (vectors, columns))
        small = ops.matmul(high, rest) + ops.matmul(low, columns)
        return ops.matmul(high, columns) + small
    return ops.matmul(vectors, columns)


def _rounds():
    import tensorflow as tf

    may = tf.config.experimental.tensor_float_32_execution_enabled()
    return may and bool(tf.config.list_physical_devices("GPU"))


def _halves(x):
    """The leading 11 bits of each, and what is left (TensorFlow)."""
    import tensorflow as tf

    bits = tf.bitcast(x, "uint32") & np.uint32(0xFFFFE000)
    high = tf.bitcast(bits, "float32")
    return high, x - high


def largest(values, top_k):
    """The largest of the last axis and their places, as `ops.top_k` finds them.

    For large axes it is quicker than that, mostly on GPUs, which sort all.
    """
    number = values.shape[-1]
    groups = -(-number // GROUP)
    if groups <= top_k or 0 in values.shape:  # which has no maxima
        return ops.top_k(values, top_k)
    # The largest K are in those K groups that have the largest maxima.
    more = groups * GROUP - number
    if more:
        widths = [*[(0, 0)] * (len(values.shape) - 1), (0, more)]
        values = ops.pad(values, widths, constant_values=-np.inf)
    shape = tuple(ops.shape(values)[:-1])
    maxima = ops.max(ops.reshape(values, (*shape, GROUP, groups)), axis=-2)
    _, group = largest(maxima, top_k)
    members = groups * ops.arange(GROUP, dtype="int32")[:, None]
    places = ops.cast(group, "int32")[..., None, :] + members
    places = ops.reshape(places, (*shape, GROUP * top_k))
    values = ops.take_along_axis(values, places, axis=-1)
    found, of_places = ops.top_k(values, top_k)
    places = ops.take_along_axis(places, of_places, axis=-1)
    # Where all are at -inf it may be a place that only fills the groups.
    return found, ops.minimum(places, number - 1)


class Neighbours(NamedTuple):
    """What a search finds, for each query the best first.

    Args:
        scores: (B, ..., K) float32, larger is nearer: the inner product, its
            cosine, or minus the squared distance; -inf where nothing was found.
        indices: (B, ..., K) int32, the slots, from 0; -1 where nothing was
            found.
        mask: (B, ..., K) bool, False where nothing was found, as the memory
            had fewer entries.
        keys: (B, ..., K, D), as they were added; 0 where nothing was found.
        values: (B, ..., K, V), likewise, in the dtype of values.
    """

    scores: Any
    indices: Any
    mask: Any
    keys: Any
    values: Any


class RingState(NamedTuple):
    """A memory of (key, value) pairs for each row of a batch.

    Args:
        keys: (B, N, D), 0 until a slot is first written.
        values: (B, N, V), likewise.
        count: (B,) int32 in [0, 2 N): how many entries were added since the
            row was cleared; beyond 2 N, N less again and again. The next entry
            goes to slot `count % N`.
    """

    keys: Any
    values: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class RingMemory:
    """Exact nearest-neighbour memory in the graph: state in, state out.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3: a memory of (key,
    value) pairs, not differentiated, of which the oldest are dropped.

    All methods are pure functions of tensors on any backend, which compile with
    XLA and lower for GPU and TPU; hand the state on from call to call, or use
    `KNNMemoryLayer`, which keeps it in weights. Each row of the batch has a
    memory of its own.

    What cannot be refused in a graph does no harm: an entry with a NaN, an
    infinity or a component beyond 1e15 is not written, and a query with one
    finds nothing.

    Args:
        dim: int, D, width of keys and queries.
        max_memories: int, N, slots of each row, 2^30 at most; one more entry
            takes the place of the oldest.
        value_dim: int, V, width of values, 0 for none; None (default) for D.
        similarity: `"dot"` (default), `"cosine"`, where vectors of zeros are at
            0 from all others, or `"l2"`, minus the squared distance.
        method: `"exact"` (default), a product with all keys and their largest;
            `"blocked"`, as exact, and faster for large memories: it looks for
            the largest among the groups of slots that can hold them;
            `"approximate"`, the backend's approximate search (TensorFlow, JAX),
            which is quicker on a TPU.
        target_recall: float in (0, 1), the share of the neighbours that
            `"approximate"` is to find, 0.95 by default.
        value_dtype: str, of values, which come back in it: `"int32"` or
            `"int64"` for whole numbers such as ids, `"float16"`, `"bfloat16"`,
            `"float32"` or `"float64"`; None (default) for that of the keys.

    Raises:
        ValueError: a size below 1, another similarity, method or dtype, or one
            that the backend does not have.

    Example:

    >>> ring = RingMemory(dim=2, max_memories=3)
    >>> state = ring.initial_state(batch_size=1)
    >>> keys = np.array([[[1.0, 0.0], [0.0, 1.0]]], "float32")
    >>> state = ring.add(state, keys, values=keys)
    >>> found = ring.search(state, keys[:, :1], top_k=3)
    >>> found.indices.numpy(), found.mask.numpy()
    (array([[[ 0,  1, -1]]], dtype=int32), array([[[ True,  True, False]]]))
    """

    dim: int
    max_memories: int
    value_dim: int | None = None
    similarity: str = "dot"
    method: str = "exact"
    target_recall: float = 0.95
    value_dtype: str | None = None

    def __post_init__(self):
        make_plain(self)
        width = self.dim if self.value_dim is None else self.value_dim
        for name, size in (
            ("dim", check_size("dim", self.dim)),
            ("max_memories", check_size("max_memories", self.max_memories)),
            ("value_dim", check_size("value_dim", width, least=0)),
        ):
            object.__setattr__(self, name, size)
        if self.max_memories > MOST_SLOTS:
            raise ValueError(
                f"`max_memories` must be at most {MOST_SLOTS}, or a row's "
                "count, up to twice as many, would not be an int32. "
                f"Received: max_memories={self.max_memories}"
            )
        check_one_of("similarity", self.similarity, SIMILARITIES)
        check_one_of("method", self.method, METHODS)
        check_within("target_recall", self.target_recall)
        dtype = check_value_dtype(self.value_dtype)
        object.__setattr__(self, "value_dtype", dtype)

    def initial_state(self, batch_size, dtype="float32"):
        """An empty memory for each row.

        Args:
            batch_size: int or scalar tensor, B.
            dtype: of keys, and of values but for `value_dtype`, a floating
                point type; half as much memory in 16 bits. Keys are compared in
                float32 all the same.

        Returns:
            `RingState`.
        """
        check_process("RingMemory")
        if not ops.is_tensor(batch_size):
            check_size("batch_size", batch_size, least=0)
        dtype = check_dtype("dtype", dtype, FLOATS, OF_INTEGERS)
        self._check_bytes(batch_size, dtype)
        slots = (batch_size, self.max_memories)
        return RingState(
            ops.zeros((*slots, self.dim), dtype),
            ops.zeros((*slots, self.value_dim), self.value_dtype or dtype),
            ops.zeros((batch_size,), "int32"),
        )

    def _check_bytes(self, batch_size, dtype):
        is_known = isinstance(batch_size, (int, np.integer))
        rows = batch_size if is_known else None
        slots = ("batch size", rows), ("max_memories", self.max_memories)
        check_bytes_of_entries(
            slots, self.dim, self.value_dim, dtype, self.value_dtype
        )

    def size(self, state):
        """(B,) int32, how many entries each row has."""
        state, _ = self._checked(state)
        return ops.minimum(state.count, self.max_memories)

    def clear(self, state, rows):
        """Forgets all entries of some rows, and nobody else's.

        Args:
            state: `RingState`.
            rows: (B,) bool, True for those that are cleared.

        Returns:
            `RingState`.
        """
        state, sizes = self._checked(state)
        rows = check_array("rows", rows, ("B",), sizes, "bool")
        return state._replace(count=ops.where(rows, 0, state.count))

    def add(self, state, keys, values=None, mask=None):
        """Appends entries to each row, in the place of the oldest ones.

        Args:
            state: `RingState`.
            keys: (B, n, D), any real value; n may be larger than N.
            values: (B, n, V); None where V is 0. Integers are refused where
                their dtype does not keep them exactly: NumPy's and lists by
                their numbers, tensors by their dtype. So are keys.
            mask: (B, n) bool, False for entries that are left out; None for
                all. A row of False is not touched.

        Returns:
            `RingState`. No gradient flows to what was added.

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
        if keys.shape[1] is None:  # there may be none: one that is left out
            keys, values = (
                ops.pad(part, ((0, 0), (0, 1), (0, 0)))
                for part in (keys, values)
            )
            kept = ops.pad(kept, ((0, 0), (0, 1)), constant_values=False)
        size = self.max_memories
        order = ops.cumsum(ops.cast(kept, "int32"), axis=1)
        added = order[:, -1:]
        kept = kept & (order > added - size)  # the last N, if there are more
        # Entries that are left out repeat the last one that is kept, or what
        # the next slot holds, so that no slot is written with two contents.
        last = ops.argmax(ops.where(kept, order, 0), axis=1)[:, None]
        here = ops.arange(ops.shape(keys)[1], dtype="int32")
        source = ops.where(kept, here, ops.cast(last, "int32"))
        order = ops.take_along_axis(order, source, axis=1)
        slots = _after(state.count[:, None], ops.maximum(order - 1, 0), size)
        slots = slots % size

        def written(before, entries):
            entries = ops.where(
                added[:, :, None] > 0,
                _rows_at(entries, source),
                _rows_at(before, slots),
            )
            return _with_rows_at(before, slots, entries)

        return RingState(
            written(state.keys, keys),
            written(state.values, values) if self.value_dim else state.values,
            _after(state.count, added[:, 0], size),
        )

    def search(self, state, queries, top_k):
        """Finds the nearest entries of each query in its row's memory.

        Args:
            state: `RingState`.
            queries: (B, ..., D), any real value.
            top_k: int, K, from 1 to N.

        Returns:
            `Neighbours`. Gradients flow from the scores to the queries, and
            none to the memory.

        Raises:
            ValueError: wrong shapes or dtypes, or another `top_k`.
        """
        check_size("top_k", top_k)
        if top_k > self.max_memories:
            raise ValueError(
                "`top_k` must be at most `max_memories`, as more can never be "
                f"found. Received: top_k={top_k}, "
                f"max_memories={self.max_memories}"
            )
        state, sizes = self._checked(state)
        queries = check_array(
            "queries", queries, ("B", ..., self.dim), sizes, dtype="float32"
        )
        shape = (*ops.shape(queries)[:-1], top_k)
        number = functools.reduce(operator.mul, shape[1:-1], 1)
        flat = ops.reshape(queries, (shape[0], number, self.dim))
        sound = is_sound(flat)[..., None]
        flat = ops.where(sound, flat, 0.0)
        state = RingState(*map(ops.stop_gradient, state))
        found, slots = self._find(state, ops.stop_gradient(flat), top_k)
        mask = sound & (found > -np.inf)
        keys = _rows_at(state.keys, slots)
        scores = similarity_of(flat[:, :, None], keys, self.similarity)
        neighbours = Neighbours(
            ops.where(mask, scores, -np.inf),
            ops.where(mask, slots, -1),
            mask,
            ops.where(mask[..., None], keys, 0),
            ops.where(mask[..., None], _rows_at(state.values, slots), 0),
        )
        widths = (), (), (), (self.dim,), (self.value_dim,)
        return Neighbours(
            *(
                ops.reshape(part, (*shape, *width))
                for part, width in zip(neighbours, widths)
            )
        )

    def _find(self, state, queries, top_k):
        """(B, Q, K) products, -inf for slots without an entry, and slots."""
        keys = ops.cast(state.keys, "float32")
        slots = ops.arange(self.max_memories, dtype="int32")
        size = ops.minimum(state.count, self.max_memories)[:, None]
        bias = ops.where(slots < size, 0.0, -np.inf)
        if self.similarity == "cosine":
            queries, keys = unit(queries), unit(keys)
        if self.similarity == "l2":  # -|q - k|^2 / 2, but for what all share
            # Far from zero the difference of products would be rounding.
            places = places_of_sample(ops.maximum(size, 1), ops)
            centre = middle(_rows_at(keys, places))
            queries, keys = queries - centre, keys - centre
            bias = bias - 0.5 * ops.sum(keys * keys, axis=-1)
        keys = ops.swapaxes(keys, 1, 2)

        def search(queries):
            products = inner_products(queries, keys) + bias[:, None]
            found, slots = self._largest(products, top_k)
            return found, ops.cast(slots, "int32")

        number = queries.shape[1]
        if number is None or number <= QUERIES:
            return search(queries)
        blocks = -(-number // QUERIES)
        more = blocks * QUERIES - number
        queries = ops.pad(queries, ((0, 0), (0, more), (0, 0)))
        queries = ops.reshape(queries, (-1, blocks, QUERIES, self.dim))
        found = ops.map(search, ops.swapaxes(queries, 0, 1))
        return tuple(
            ops.reshape(
                ops.swapaxes(part, 0, 1), (-1, blocks * QUERIES, top_k)
            )[:, :number]
            for part in found
        )

    def _largest(self, products, top_k):
        backend = keras.backend.backend()
        if self.method == "approximate" and backend == "jax":
            import jax

            return jax.lax.approx_max_k(
                products, top_k, recall_target=self.target_recall
            )
        if self.method == "approximate" and backend == "tensorflow":
            import tensorflow as tf

            return tf.math.approx_max_k(
                products, top_k, recall_target=self.target_recall
            )
        if self.method == "blocked":
            return largest(products, top_k)
        return ops.top_k(products, top_k)

    def _checked(self, state):
        """The tensors of a state, and a dict with B, the number of its rows."""
        check_process("RingMemory")
        if not isinstance(state, (tuple, list)) or len(state) != 3:
            raise ValueError(
                "`state` must be a `RingState`, as `initial_state` makes it. "
                f"Received: {type(state).__name__}"
            )
        keys, values, count = state
        sizes, slots = {}, ("B", self.max_memories)
        options = of_values(self.value_dtype)
        keys = check_array(
            "state.keys", keys, (*slots, self.dim), sizes, remedy=KEY_REMEDY
        )
        values = check_array(
            "state.values", values, (*slots, self.value_dim), sizes, **options
        )
        count = check_array(
            "state.count", count, ("B",), sizes, "integer", "int32"
        )
        return RingState(keys, values, count), sizes

    def _entries(self, state, keys, values, sizes):
        """Checked, without gradient, in the dtypes of the state."""
        dtypes = [ops.dtype(part) for part in state]
        of_keys = {"dtype": dtypes[0], "remedy": KEY_REMEDY}
        keys = check_array("keys", keys, ("B", "n", self.dim), sizes, **of_keys)
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


@keras.saving.register_keras_serializable(package="keras_memory")
class KNNMemoryLayer(Arguments, keras.layers.Layer):
    """A nearest-neighbour memory in the weights of a model, for plain `fit`.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3.

    First each query finds its nearest entries, then the new entries are
    written, so that no query finds its own.

    State: weights that are not trained, `memory_keys` (B, N, D),
    `memory_values` (B, N, V) and `memory_count` (B,), as of `RingState`; empty
    at first, written by each call in training, saved with the model.

    Masking and dtype: a mask that comes with the keys leaves entries out.
    Searches are in float32 under any policy; keys and values are kept in
    `memory_dtype` and returned in the compute dtype. With `value_dtype` values
    are kept and returned in it.

    The batch size is fixed, since each row of the batch has a memory: `fit`
    needs a multiple of it, and `predict` the same `batch_size`. Where it
    varies, over several devices, or to serve a memory that each client keeps,
    hand a `RingState` in and out instead (`RingMemory`).

    Args:
        max_memories, similarity, method, target_recall, value_dtype: as of
            `RingMemory`.
        top_k: int, K, from 1 (32 by default) to `max_memories`.
        write: when entries are written and rows cleared for good:
            `"training"` (default), so that evaluation leaves the memory alone,
            `"always"`, or `"never"`.
        memory_dtype: of what is kept, a floating point type, `"float32"` by
            default.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        queries: (B, ..., D), any real value.
        keys: (B, n, D), entries to write; None to only search.
        values: (B, n, V); None where only keys are kept. What the first call
            has decides: without, V is 0. Integers need a `value_dtype` that
            keeps all of their dtype.
        keys_mask: (B, n) bool, False for entries that are not written.
        clear: (B,) bool, True for rows whose entries are forgotten before the
            search, as at the start of a document.
        training: bool.

    Returns:
        `Neighbours`.

    Raises:
        ValueError: a batch size that is not known, wrong shapes, or arguments
            out of range.

    Example:

    >>> layer = KNNMemoryLayer(max_memories=100, top_k=2)
    >>> keys = np.eye(3, dtype="float32")[None]
    >>> layer(keys, keys, keys, training=True).mask.numpy().any()
    np.False_
    >>> layer(keys[:, :1]).keys.numpy()[0, 0, 0]
    array([1., 0., 0.], dtype=float32)
    """

    def __init__(
        self,
        max_memories,
        top_k=32,
        similarity="dot",
        method="exact",
        target_recall=0.95,
        write="training",
        memory_dtype="float32",
        value_dtype=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.autocast = False  # what is kept is not rounded to compute with
        ring = RingMemory(
            1, max_memories, 0, similarity, method, target_recall, value_dtype
        )
        self.max_memories = ring.max_memories
        self.top_k = check_size("top_k", top_k)
        if top_k > max_memories:
            raise ValueError(
                "`top_k` must be at most `max_memories`, as more can never be "
                f"found. Received: top_k={top_k}, max_memories={max_memories}"
            )
        self.similarity = similarity
        self.method = method
        self.target_recall = target_recall
        self.write = check_one_of("write", write, WRITES)
        self.memory_dtype = check_dtype(
            "memory_dtype", memory_dtype, FLOATS, OF_INTEGERS
        )
        self.value_dtype = ring.value_dtype

    def build(self, queries_shape, keys_shape=None, values_shape=None):
        batch, dim = ([None, *queries_shape][place] for place in (1, -1))
        if batch is None or dim is None or len(queries_shape) < 2:
            raise ValueError(
                "`queries` must be (B, ..., D), of a known batch size and "
                "width, as each row has a memory among the weights: "
                "`keras.Input(batch_shape=...)`. Received: shape "
                f"{tuple(queries_shape)}"
            )
        self.ring = RingMemory(
            dim,
            self.max_memories,
            values_shape[-1] if values_shape else 0,
            self.similarity,
            self.method,
            self.target_recall,
            self.value_dtype,
        )
        self.ring._check_bytes(batch, self.memory_dtype)
        slots = (batch, self.max_memories)
        shapes = [(*slots, dim), (*slots, self.ring.value_dim), (batch,)]
        value_dtype = self.value_dtype or self.memory_dtype
        self.memory_keys, self.memory_values, self.memory_count = (
            self.add_weight(
                shape=shape,
                initializer="zeros",
                dtype=dtype,
                trainable=False,
                autocast=False,
                name=f"memory_{name}",
            )
            for name, shape, dtype in zip(
                RingState._fields,
                shapes,
                (self.memory_dtype, value_dtype, "int32"),
            )
        )
        self.built = True

    @property
    def state(self):
        """`RingState` of the weights."""
        weights = self.memory_keys, self.memory_values, self.memory_count
        return RingState(*map(ops.convert_to_tensor, weights))

    def reset_state(self):
        """Forgets all entries."""
        self.memory_count.assign(ops.zeros_like(self.state.count))

    def __call__(self, queries, keys=None, values=None, *others, **named):
        check_process("KNNMemoryLayer")
        queries = let_in("queries", queries, (None, ..., None))
        any_entries = (None, None, None)
        if keys is not None:
            of_keys = {"dtype": self.memory_dtype, "remedy": KEY_REMEDY}
            keys = let_in("keys", keys, any_entries, **of_keys)
        if values is not None:
            given = values
            options = of_values(self.value_dtype, self.memory_dtype)
            values = let_in("values", given, any_entries, **options)
            # They come back in the dtype that is computed in.
            back = self.value_dtype or self.compute_dtype
            check_exact("values", given, back, VALUE_REMEDY)
        given = [queries, keys, values, *others]
        while given[-1] is None:  # which Keras takes by name only
            given.pop()
        return super().__call__(*given, **named)

    def call(
        self,
        queries,
        keys=None,
        values=None,
        keys_mask=None,
        clear=None,
        training=False,
    ):
        before = state = self.state
        given = check_array("queries", queries, (None, ..., self.ring.dim))
        rows = self.memory_keys.shape[0]
        queries = check_batch("queries", given, rows)
        others = {"keys": keys, "values": values}
        others |= {"keys_mask": keys_mask, "clear": clear}
        keys, values, keys_mask, clear = (
            check_batch(name, other, rows) if ops.is_tensor(other) else other
            for name, other in others.items()
        )
        if clear is not None:
            state = self.ring.clear(state, clear)
        found = self.ring.search(state, queries, self.top_k)
        if keys is not None:
            state = self.ring.add(state, keys, values, keys_mask)
        if self.write == "always" or (self.write == "training" and training):
            self.memory_count.assign(state.count)
            if state.keys is not before.keys:
                self.memory_keys.assign(state.keys)
                self.memory_values.assign(state.values)
        dtype = self.value_dtype or self.compute_dtype
        found = found._replace(
            keys=ops.cast(found.keys, self.compute_dtype),
            values=ops.cast(found.values, dtype),
        )
        return Neighbours(*(with_rows_of(part, given) for part in found))

    def get_config(self):
        names = ("max_memories", "top_k", "similarity", "method")
        names += ("target_recall", "write", "memory_dtype", "value_dtype")
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}


def check_dtype(name, dtype, choices, others="", in_graph=True):
    """The name of a dtype, or ValueError unless it is one of `choices` that the
    backend has, if it is of a graph; `others` says what else it may be."""
    try:
        found = keras.backend.standardize_dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if dtype is None or found not in choices:
        raise ValueError(
            f"`{name}` must be one of {tuple(choices)}{others}. "
            f"Received: {name}={dtype!r}"
        )
    is_wide = in_graph and found.endswith("64")
    if is_wide and keras.backend.backend() == "jax":
        import jax

        if not jax.config.jax_enable_x64:
            raise ValueError(
                f"`{name}` must be of 32 bits or fewer in JAX, until "
                '`jax.config.update("jax_enable_x64", True)` was called. '
                f"Received: {name}={dtype!r}"
            )
    return found


def check_bytes_of_entries(
    slots, dim, value_dim, dtype, value_dtype, on_host=False
):
    """`check_bytes` of keys, and of values, whose dtype None is the keys'."""
    for what, name, width, of_numbers in (
        ("The keys", "dim", dim, dtype),
        ("The values", "value_dim", value_dim, value_dtype or dtype),
    ):
        sizes = [*slots, (name, width)]
        check_bytes(what, sizes, of_numbers, on_host=on_host)


def check_value_dtype(dtype, in_graph=True, default=None):
    """The name of a dtype of values, or `default` for None; see
    `check_dtype`."""
    if dtype is None:
        return default
    return check_dtype(
        "value_dtype", dtype, VALUE_DTYPES, ", or None", in_graph
    )


def of_values(value_dtype, dtype=None):
    """Options of `check_array` for values, which become `value_dtype`, or if
    that is None `dtype`."""
    kind = "real" if value_dtype in (None, *FLOATS) else "integer"
    dtype = value_dtype or dtype
    return {"kind": kind, "dtype": dtype, "remedy": VALUE_REMEDY}


def let_in(name, value, *arguments, **options):
    """What a layer is called with, checked as by `check_array`, before Keras
    makes a tensor of it, which may round it, or fail without a name.

    Tensors are for `call` to check, as they may have masks.
    """
    if isinstance(value, keras.KerasTensor) or ops.is_tensor(value):
        return value
    return check_array(name, value, *arguments, **options)


def _is_integer(array):
    return "int" in ops.dtype(array)


def unit(vectors, xp=ops):
    """Vectors of length 1, or 0 where they are, however small or large they
    are; (..., D). `xp` may be NumPy, for arrays of its own."""
    largest = xp.max(xp.abs(vectors), axis=-1, keepdims=True, initial=0)
    if xp is ops:  # the scale does not matter, nor what it changes with
        largest = ops.stop_gradient(largest)
    # Smaller numbers have few bits, or none where a device takes them for 0.
    is_zero = largest < np.finfo("float32").tiny
    vectors = vectors / xp.where(is_zero, 1, largest)
    squares = xp.sum(vectors * vectors, axis=-1, keepdims=True)
    return xp.where(
        is_zero, 0, vectors / xp.sqrt(xp.where(is_zero, 1, squares))
    )


def similarity_of(queries, keys, similarity):
    """Similarities of vectors, (..., D) and (..., D): (...,) float32."""
    queries, keys = (ops.cast(one, "float32") for one in (queries, keys))
    if similarity == "l2":
        return -ops.sum(ops.square(queries - keys), axis=-1)
    if similarity == "dot":
        return ops.sum(queries * keys, axis=-1)
    cosines = ops.sum(unit(queries) * unit(keys), axis=-1)
    # Rounding may lead beyond 1. Gradients are the cosine's all the same.
    return cosines + ops.stop_gradient(ops.clip(cosines, -1, 1) - cosines)


def places_of_sample(size, xp=np):
    """(SAMPLE,) int32 from 0 to size - 1, where to look for the `middle`; of
    (B, 1) sizes, (B, SAMPLE), with `keras.ops`."""
    steps, last = xp.arange(SAMPLE, dtype="int32"), SAMPLE - 1
    # Their product with the size may be too large for an int32.
    return (size - 1) // last * steps + (size - 1) % last * steps // last


def middle(vectors):
    """A point amid most of (..., SAMPLE, D) vectors, however far some are: the
    medians of the components; (..., 1, D)."""
    half = SAMPLE // 2
    return ops.sort(vectors, axis=-2)[..., half : half + 1, :]


def is_sound(vectors):
    """True where all components are numbers that can be computed with."""
    vectors = ops.cast(vectors, "float32")
    return ops.all(ops.abs(vectors) <= LARGEST, axis=-1)


def _after(count, added, size):
    """The `count` of a `RingState` after more entries, all int32: no sum here
    is above 2 N, which 32 bits hold."""
    is_full = added >= size - count
    return (count % size + added % size) % size + ops.where(is_full, size, 0)


def _rows_at(entries, slots):
    """(B, N, W) at (B, ...): (B, ..., W)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(entries, slots, batch_dims=1)
    return entries[_rows_of(slots), ops.cast(slots, _index_dtype())]


def _with_rows_at(entries, slots, new):
    """(B, N, W), with (B, n, W) new ones at (B, n)."""
    places = [ops.broadcast_to(_rows_of(slots), ops.shape(slots))]
    places.append(ops.cast(slots, _index_dtype()))
    return ops.scatter_update(
        entries,
        ops.reshape(ops.stack(places, axis=-1), (-1, 2)),
        ops.reshape(new, (-1, new.shape[-1])),
    )


# Places are pairs of a row and a slot, since one number for both, such as for
# entries of all rows in a line, might be beyond 2^31.


def _rows_of(slots):
    """The row of each of (B, ...) slots, (B, 1 ...)."""
    rows = ops.arange(ops.shape(slots)[0], dtype=_index_dtype())
    return ops.reshape(rows, (-1, *[1] * (len(slots.shape) - 1)))


def _index_dtype():
    """JAX has no int64, and needs none; TensorFlow makes of the pairs one."""
    return "int32" if keras.backend.backend() == "jax" else "int64"
