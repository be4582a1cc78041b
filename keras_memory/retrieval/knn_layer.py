"""`KNNMemoryLayer`: a ring memory in the weights of a layer."""

from typing import Any
from typing import Unpack

import keras
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_exact
from keras_memory.checks import check_one_of
from keras_memory.checks import check_process
from keras_memory.checks import with_rows_of
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape
from keras_memory.retrieval.entries import FLOATS
from keras_memory.retrieval.entries import KEY_REMEDY
from keras_memory.retrieval.entries import OF_INTEGERS
from keras_memory.retrieval.entries import VALUE_REMEDY
from keras_memory.retrieval.entries import check_dtype
from keras_memory.retrieval.entries import check_top_k
from keras_memory.retrieval.entries import let_in
from keras_memory.retrieval.entries import of_values
from keras_memory.retrieval.exact import Neighbours
from keras_memory.retrieval.ring import RingMemory
from keras_memory.retrieval.ring import RingState

WRITES = ("training", "always", "never")


@keras.saving.register_keras_serializable(package="keras_memory")
class KNNMemoryLayer(Arguments, keras.layers.Layer):
    """A nearest-neighbor memory in the weights of a model, for plain `fit`.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3.

    Each call searches first and writes the new entries afterwards, so no query
    finds its own entry.

    State: non-trainable weights `memory_keys` (B, N, D), `memory_values` (B, N,
    V) and `memory_count` (B,), as in `RingState`; initially empty, written by
    each call in training, saved with the model.

    Masking and dtype: entries masked by `keys_mask` are not written. Searches
    run in float32 under any policy; keys and values are stored in
    `memory_dtype` and returned in the compute dtype. With `value_dtype`, values
    are stored and returned in that dtype.

    The batch size is fixed, since each row of the batch has its own memory:
    `fit` needs a multiple of it, and `predict` the same `batch_size`. If the
    batch size varies, for several devices, or for a server whose clients keep
    their memories, pass a `RingState` in and out instead (`RingMemory`).

    Args:
        memory_size, similarity, search_method, target_recall, value_dtype: see
            `RingMemory`.
        top_k: int, K, from 1 to `memory_size`, 32 by default.
        write: when calls keep written entries and cleared rows: `"training"`
            (default; evaluation does not change the memory), `"always"`, or
            `"never"`.
        memory_dtype: str, dtype of stored keys and values, floating point,
            `"float32"` by default.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        queries: (B, ..., D), any real value.
        keys: (B, n, D), entries to write; None to only search.
        values: (B, n, V); None if V is 0. The first call fixes V; without
            values it is 0. Integers need a `value_dtype` that holds all
            numbers of their dtype exactly.
        keys_mask: (B, n) bool, False for entries that are not written.
        clear: (B,) bool, True for rows to clear before the search, for example
            at the start of a document.
        training: bool.

    Returns:
        `Neighbours`.

    Raises:
        ValueError: unknown batch size, wrong shapes, or arguments out of range.

    Example:

    >>> layer = KNNMemoryLayer(memory_size=100, top_k=2)
    >>> keys = np.eye(3, dtype="float32")[None]
    >>> layer(keys, keys, keys, training=True).mask.numpy().any()
    np.False_
    >>> layer(keys[:, :1]).keys.numpy()[0, 0, 0]
    array([1., 0., 0.], dtype=float32)
    """

    def __init__(
        self,
        memory_size: int,
        top_k: int = 32,
        similarity: str = "dot",
        search_method: str = "exact",
        target_recall: float = 0.95,
        write: str = "training",
        memory_dtype: str = "float32",
        value_dtype: str | None = None,
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        self.autocast = False  # entries are not rounded to the compute dtype
        ring = RingMemory(
            1,
            memory_size,
            0,
            similarity,
            search_method,
            target_recall,
            value_dtype,
        )
        self.memory_size = ring.memory_size
        self.top_k: int = check_top_k(top_k, memory_size)
        self.similarity = similarity
        self.search_method = search_method
        self.target_recall = target_recall
        self.write = check_one_of("write", write, WRITES)
        self.memory_dtype = check_dtype(
            "memory_dtype", memory_dtype, FLOATS, OF_INTEGERS
        )
        self.value_dtype = ring.value_dtype

    def build(
        self,
        queries_shape: Shape,
        keys_shape: Shape | None = None,
        values_shape: Shape | None = None,
    ) -> None:
        batch, key_dim = ([None, *queries_shape][place] for place in (1, -1))
        if batch is None or key_dim is None or len(queries_shape) < 2:
            raise ValueError(
                "`queries` must be (B, ..., D) with known batch size and "
                "width, since each row has its own memory weights: use "
                "`keras.Input(batch_shape=...)`. Received: shape "
                f"{tuple(queries_shape)}"
            )
        self.ring = RingMemory(
            key_dim,
            self.memory_size,
            values_shape[-1] if values_shape else 0,
            self.similarity,
            self.search_method,
            self.target_recall,
            self.value_dtype,
        )
        self.ring._check_bytes(batch, self.memory_dtype)
        slots = (batch, self.memory_size)
        shapes = [(*slots, key_dim), (*slots, self.ring.value_dim), (batch,)]
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
    def state(self) -> RingState:
        """The memory in the weights, as a `RingState`."""
        weights = self.memory_keys, self.memory_values, self.memory_count
        return RingState(*map(ops.convert_to_tensor, weights))

    def reset_state(self) -> None:
        """Forgets all entries."""
        self.memory_count.assign(ops.zeros_like(self.state.count))

    def __call__(
        self,
        queries: Array,
        keys: Array | None = None,
        values: Array | None = None,
        *args: Any,
        **named: Any,
    ) -> Neighbours:
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
            # A search returns values in this dtype.
            back = self.value_dtype or self.compute_dtype
            check_exact("values", given, back, VALUE_REMEDY)
        given = [queries, keys, values, *args]
        while given[-1] is None:  # Keras takes None by name only
            given.pop()
        return super().__call__(*given, **named)

    def call(
        self,
        queries: Array,
        keys: Array | None = None,
        values: Array | None = None,
        keys_mask: Array | None = None,
        clear: Array | None = None,
        training: bool | None = False,
    ) -> Neighbours:
        before = state = self.state
        given = check_array("queries", queries, (None, ..., self.ring.key_dim))
        rows = self.memory_keys.shape[0]
        queries = check_batch("queries", given, rows)
        arrays = {"keys": keys, "values": values}
        arrays |= {"keys_mask": keys_mask, "clear": clear}
        keys, values, keys_mask, clear = (
            check_batch(name, array, rows) if ops.is_tensor(array) else array
            for name, array in arrays.items()
        )
        if clear is not None:
            state = self.ring.clear(state, clear)
        result = self.ring.search(state, queries, self.top_k)
        if keys is not None:
            state = self.ring.add(state, keys, values, keys_mask)
        if self.write == "always" or (self.write == "training" and training):
            self.memory_count.assign(state.count)
            if state.keys is not before.keys:
                self.memory_keys.assign(state.keys)
                self.memory_values.assign(state.values)
        dtype = self.value_dtype or self.compute_dtype
        result = result._replace(
            keys=ops.cast(result.keys, self.compute_dtype),
            values=ops.cast(result.values, dtype),
        )
        return Neighbours(*(with_rows_of(part, given) for part in result))

    def get_config(self) -> Config:
        names = ("memory_size", "top_k", "similarity", "search_method")
        names += ("target_recall", "write", "memory_dtype", "value_dtype")
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}
