"""Nearest neighbours, by exact search in the graph.

Axes: B rows of a batch, each with a memory of its own, N slots, D width of
keys, V width of values, K neighbours.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.checks import check_batch
from keras_memory.checks import check_bytes
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.checks import check_within
from keras_memory.checks import make_plain

BLOCK = 16384  # keys that are compared at a time
QUERIES = 1024  # queries that are compared at a time
GROUP = 8  # values whose largest is looked at first, if there are many
LARGEST = 1e15  # of a component: products of two must be finite in float32
NORM_EPSILON = 1e-24  # in the roots
SAMPLE = 63  # keys amid which distances are measured from

SIMILARITIES = ("dot", "cosine", "l2")
METHODS = ("exact", "blocked", "approximate")
WRITES = ("training", "always", "never")


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
        ValueError: `top_k` is not from 1 to M.

    Example:

    >>> keys = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], "float32")
    >>> products, indices = nearest(keys[:1], keys, top_k=2)
    >>> indices
    <tf.Tensor: shape=(1, 2), dtype=int32, numpy=array([[2, 0]], dtype=int32)>
    """
    queries, keys = ops.stop_gradient(queries), ops.stop_gradient(keys)
    if bias is not None:
        bias = ops.stop_gradient(bias)
    number = keys.shape[0]
    both = isinstance(number, int) and isinstance(top_k, int)
    if both and not 1 <= top_k <= number:
        raise ValueError(
            "`top_k` must be from 1 to the number of keys. "
            f"Received: top_k={top_k}, keys of shape {tuple(keys.shape)}"
        )
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
    if groups <= top_k:
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
        values: (B, ..., K, V), likewise.
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
        max_memories: int, N, slots of each row; one more entry takes the place
            of the oldest.
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

    Raises:
        ValueError: a size below 1, or another similarity or method.

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

    def __post_init__(self):
        make_plain(self)
        width = self.dim if self.value_dim is None else self.value_dim
        for name, size in (
            ("dim", check_size("dim", self.dim)),
            ("max_memories", check_size("max_memories", self.max_memories)),
            ("value_dim", check_size("value_dim", width, least=0)),
        ):
            object.__setattr__(self, name, size)
        check_one_of("similarity", self.similarity, SIMILARITIES)
        check_one_of("method", self.method, METHODS)
        check_within("target_recall", self.target_recall)

    def initial_state(self, batch_size, dtype="float32"):
        """An empty memory for each row.

        Args:
            batch_size: int or scalar tensor, B.
            dtype: of keys and values; half as much memory in 16 bits. They are
                compared in float32 all the same.

        Returns:
            `RingState`.
        """
        self._check_bytes(batch_size, dtype)
        slots = (batch_size, self.max_memories)
        return RingState(
            ops.zeros((*slots, self.dim), dtype),
            ops.zeros((*slots, self.value_dim), dtype),
            ops.zeros((batch_size,), "int32"),
        )

    def _check_bytes(self, batch_size, dtype):
        is_known = isinstance(batch_size, (int, np.integer))
        rows = batch_size if is_known else None
        slots = ("batch size", rows), ("max_memories", self.max_memories)
        width = "dim + value_dim", self.dim + self.value_dim
        check_bytes("The memory", [*slots, width], dtype)

    def size(self, state):
        """(B,) int32, how many entries each row has."""
        return ops.minimum(state.count, self.max_memories)

    def clear(self, state, rows):
        """Forgets all entries of some rows, and nobody else's.

        Args:
            state: `RingState`.
            rows: (B,) bool, True for those that are cleared.

        Returns:
            `RingState`.
        """
        rows = ops.convert_to_tensor(rows)
        is_bool = keras.backend.standardize_dtype(rows.dtype) == "bool"
        if (
            not is_bool
            or len(rows.shape) != 1
            or _differ(rows.shape, state.keys)
        ):
            raise ValueError(
                "`rows` must be (B,) bool, True for each row of the memory "
                f"that is cleared. Received: shape {tuple(rows.shape)}, dtype "
                f"{rows.dtype}, a memory of shape {tuple(state.keys.shape)}"
            )
        return state._replace(count=ops.where(rows, 0, state.count))

    def add(self, state, keys, values=None, mask=None):
        """Appends entries to each row, in the place of the oldest ones.

        Args:
            state: `RingState`.
            keys: (B, n, D), any real value; n may be larger than N.
            values: (B, n, V); None where V is 0.
            mask: (B, n) bool, False for entries that are left out; None for
                all. A row of False is not touched.

        Returns:
            `RingState`. No gradient flows to what was added.

        Raises:
            ValueError: wrong shapes.
        """
        keys, values = self._entries(state, keys, values)
        kept = is_sound(keys) & is_sound(values)
        if mask is not None:
            mask = ops.convert_to_tensor(mask, "bool")
            if tuple(mask.shape) != tuple(keys.shape[:2]):
                raise ValueError(
                    "`mask` must be (B, n), one bool an entry. Received: shape "
                    f"{tuple(mask.shape)}, keys of shape {tuple(keys.shape)}"
                )
            kept = kept & mask
        if keys.shape[1] == 0:
            return state
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
        slots = state.count[:, None] + ops.maximum(order - 1, 0)
        slots = slots % size

        def written(before, entries):
            entries = ops.where(
                added[:, :, None] > 0,
                _rows_at(entries, source),
                _rows_at(before, slots),
            )
            return _with_rows_at(before, slots, entries)

        count = state.count + added[:, 0]
        return RingState(
            written(state.keys, keys),
            written(state.values, values) if self.value_dim else state.values,
            ops.where(count < 2 * size, count, size + count % size),
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
            ValueError: wrong shapes, or another `top_k`.
        """
        check_size("top_k", top_k)
        if top_k > self.max_memories:
            raise ValueError(
                "`top_k` must be at most `max_memories`, as more can never be "
                f"found. Received: top_k={top_k}, "
                f"max_memories={self.max_memories}"
            )
        self._check_state(state)
        queries = ops.convert_to_tensor(queries)
        axes = queries.shape
        if len(axes) < 2 or axes[-1] != self.dim or _differ(axes, state.keys):
            raise ValueError(
                f"`queries` must be (B, ..., {self.dim}), vectors as wide as "
                "the keys for each row of the memory. Received: shape "
                f"{tuple(axes)}, keys of shape {tuple(state.keys.shape)}"
            )
        shape = (*ops.shape(queries)[:-1], top_k)
        flat = ops.reshape(queries, (shape[0], -1, self.dim))
        sound = is_sound(flat)[..., None]
        flat = ops.where(sound, ops.cast(flat, "float32"), 0.0)
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
        size = self.size(state)[:, None]
        bias = ops.where(slots < size, 0.0, -np.inf)
        if self.similarity == "cosine":
            keys = unit(keys)
        if self.similarity == "l2":  # -|q - k|^2 / 2, but for what all share
            # Far from zero the difference of products would be rounding.
            steps = ops.arange(SAMPLE, dtype="int32")
            places = steps * (ops.maximum(size, 1) - 1) // (SAMPLE - 1)
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

    def _check_state(self, state):
        slots = (None, self.max_memories)
        wanted = (*slots, self.dim), (*slots, self.value_dim), (None,)
        for name, part, axes in zip(RingState._fields, state, wanted):
            shape = tuple(part.shape)
            if len(shape) != len(axes) or any(
                None not in pair and len(set(pair)) > 1
                for pair in zip(shape, axes)
            ):
                asked = ", ".join("B" if n is None else str(n) for n in axes)
                raise ValueError(
                    f"`{name}` of the state must be ({asked}), as "
                    f"`initial_state` makes it. Received: shape {shape}"
                )

    def _entries(self, state, keys, values):
        """Checked, without gradient, in the dtype of the state."""
        self._check_state(state)
        keys = ops.convert_to_tensor(keys)
        if values is None and not self.value_dim:
            values = ops.zeros((*ops.shape(keys)[:2], 0))
        checked = []
        for name, entries, width, before in (
            ("keys", keys, self.dim, state.keys),
            ("values", values, self.value_dim, state.values),
        ):
            if entries is not None:
                entries = ops.convert_to_tensor(entries)
            shape = None if entries is None else tuple(ops.shape(entries))
            if shape is None or len(shape) != 3 or shape[-1] != width:
                raise ValueError(
                    f"`{name}` must be (B, n, {width}), n entries for each row "
                    f"of the memory. Received: shape {shape}"
                )
            if _differ(shape, before) or _differ(shape[1:], keys[0]):
                raise ValueError(
                    f"`{name}` must have as many rows as the memory and as "
                    f"many entries as `keys`. Received: shape {shape}, keys of "
                    f"shape {tuple(keys.shape)}, and a memory of shape "
                    f"{tuple(before.shape)}"
                )
            checked.append(
                ops.stop_gradient(ops.cast(entries, ops.dtype(before)))
            )
        return checked


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
    `memory_dtype` and returned in the compute dtype.

    The batch size is fixed, since each row of the batch has a memory: `fit`
    needs a multiple of it, and `predict` the same `batch_size`. Where it
    varies, over several devices, or to serve a memory that each client keeps,
    hand a `RingState` in and out instead (`RingMemory`).

    Args:
        max_memories, similarity, method, target_recall: as of `RingMemory`.
        top_k: int, K, from 1 (32 by default) to `max_memories`.
        write: when entries are written and rows cleared for good:
            `"training"` (default), so that evaluation leaves the memory alone,
            `"always"`, or `"never"`.
        memory_dtype: of what is kept, `"float32"` by default.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        queries: (B, ..., D), any real value.
        keys: (B, n, D), entries to write; None to only search.
        values: (B, n, V); None where only keys are kept. What the first call
            has decides: without, V is 0.
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        ring = RingMemory(1, max_memories, 0, similarity, method, target_recall)
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
        self.memory_dtype = keras.backend.standardize_dtype(memory_dtype)
        if "float" not in self.memory_dtype:
            raise ValueError(
                "`memory_dtype` must be a floating point type, or entries "
                "would be rounded to integers. Received: "
                f"memory_dtype={memory_dtype!r}"
            )

    def build(self, queries_shape, keys_shape=None, values_shape=None):
        batch, dim = queries_shape[0], queries_shape[-1]
        if batch is None or dim is None:
            raise ValueError(
                "`queries` must have a known batch size and width, as each row "
                "has a memory among the weights: `keras.Input(batch_shape=...)`"
                f". Received: shape {tuple(queries_shape)}"
            )
        self.ring = RingMemory(
            dim,
            self.max_memories,
            values_shape[-1] if values_shape else 0,
            self.similarity,
            self.method,
            self.target_recall,
        )
        self.ring._check_bytes(batch, self.memory_dtype)
        slots = (batch, self.max_memories)
        shapes = [(*slots, dim), (*slots, self.ring.value_dim), (batch,)]
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
                RingState._fields, shapes, [self.memory_dtype] * 2 + ["int32"]
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
        queries = ops.convert_to_tensor(queries)
        if queries.shape:
            size = self.memory_keys.shape[0]
            queries = check_batch("queries", queries, size)
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
        return found._replace(
            keys=ops.cast(found.keys, self.compute_dtype),
            values=ops.cast(found.values, self.compute_dtype),
        )

    def get_config(self):
        names = ("max_memories", "top_k", "similarity", "method")
        names += ("target_recall", "write", "memory_dtype")
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}


def unit(vectors):
    """Vectors of length 1, or 0 where they are; (..., D)."""
    squares = ops.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors / ops.sqrt(squares + NORM_EPSILON)


def similarity_of(queries, keys, similarity):
    """Similarities of vectors, (..., D) and (..., D): (...,) float32."""
    queries, keys = (ops.cast(one, "float32") for one in (queries, keys))
    if similarity == "l2":
        return -ops.sum(ops.square(queries - keys), axis=-1)
    if similarity == "cosine":
        queries, keys = unit(queries), unit(keys)
    return ops.sum(queries * keys, axis=-1)


def places_of_sample(size):
    """(SAMPLE,) ints from 0 to size - 1, where to look for the `middle`."""
    return np.arange(SAMPLE) * (size - 1) // (SAMPLE - 1)


def middle(vectors):
    """A point amid most of (..., SAMPLE, D) vectors, however far some are: the
    medians of the components; (..., 1, D)."""
    half = SAMPLE // 2
    return ops.sort(vectors, axis=-2)[..., half : half + 1, :]


def is_sound(vectors):
    """True where all components are numbers that can be computed with."""
    vectors = ops.cast(vectors, "float32")
    return ops.all(ops.abs(vectors) <= LARGEST, axis=-1)


def _differ(shape, array):
    """Whether the first axes are known and not the same."""
    one, other = shape[0], array.shape[0]
    return isinstance(one, int) and isinstance(other, int) and one != other


def _flat(entries, slots):
    """Entries of all rows in a line, (B N, W), and the places of (B, ...)
    slots in it."""
    batch, size, width = ops.shape(entries)
    first = size * ops.arange(batch, dtype="int32")
    axes = [None] * (len(slots.shape) - 1)
    return ops.reshape(entries, (batch * size, width)), first[
        (..., *axes)
    ] + slots


def _rows_at(entries, slots):
    """(B, N, W) at (B, ...): (B, ..., W)."""
    entries, places = _flat(entries, slots)
    return ops.take(entries, places, axis=0)


def _with_rows_at(entries, slots, new):
    """(B, N, W), with (B, n, W) new ones at (B, n)."""
    flat, places = _flat(entries, slots)
    flat = ops.scatter_update(
        flat,
        ops.reshape(places, (-1, 1)),
        ops.reshape(new, (-1, new.shape[-1])),
    )
    return ops.reshape(flat, ops.shape(entries))
