"""Attention to a segment of a document and to a memory of older segments.

Wu et al., "Memorizing Transformers", 2022 (arXiv 2203.08913), section 3; the
paper has no equation numbers. Axes: B rows, T tokens of a segment, X tokens of
Transformer-XL memory, H heads, G heads of keys and values (1 or H), D width of
keys, V of values, N slots of the memory, K neighbors.
"""

import math
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_memory.addressing.activations import softmax
from keras_memory.causal_attention import MASKED
from keras_memory.causal_attention import CausalAttention
from keras_memory.checks import check_bool
from keras_memory.checks import check_one_of
from keras_memory.checks import check_rate
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape
from keras_memory.retrieval.entries import FLOATS
from keras_memory.retrieval.entries import check_dtype
from keras_memory.retrieval.entries import check_top_k
from keras_memory.retrieval.ring import RingMemory
from keras_memory.retrieval.ring import RingState
from keras_memory.retrieval.similarities import is_sound
from keras_memory.retrieval.similarities import unit

MIXINGS = ("gate", "informed_gate", "joint_softmax")
INITIAL_SCALE = 20.0  # of cosines
FEATURES = 4  # of the informed gate


class KNNAttentionState(NamedTuple):
    """The tokens before a segment: the latest, and a memory of older ones.

    Args:
        xl_keys, xl_values, xl_count: as in `CausalAttentionState`.
        memory_keys: (B, G, N, D), of length 1; 0 until a slot is first written.
        memory_values: (B, G, N, V), likewise.
        memory_count: (B,) int32, see `RingState`.
    """

    xl_keys: Any
    xl_values: Any
    xl_count: Any
    memory_keys: Any
    memory_values: Any
    memory_count: Any


class Retrieved(NamedTuple):
    """What the queries found in the memory.

    Args:
        cosines: (B, H, T, K), of queries and keys; -1 where nothing was found.
        values: (B, H, T, K, V); 0 where nothing was found.
        is_found: (B, H, T, K) bool.
        age: (B, H, T, K) int32, tokens added to the memory since; 0 where
            nothing was found.
    """

    cosines: Any
    values: Any
    is_found: Any
    age: Any


@keras.saving.register_keras_serializable(package="keras_memory")
class KNNAttention(CausalAttention):
    """Causal attention that also attends to the nearest tokens of a memory.

    Without `stateful=True` or `initial_state`, the memory is empty in every
    call.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3. Each query attends to
    the keys of its segment, and to the K keys in the memory that are nearest
    to it. Tokens that leave the segment, or the Transformer-XL memory if there
    is one, enter the memory, so that none is attended to twice. The memory has
    no gradient, and drops its oldest entries.

    With `mixing="gate"`, of the paper, a head with the learned gate g = sigmoid
    (b) returns g V_m + (1 - g) V_l, where V_m and V_l are the results of
    attention to memory and segment. Where nothing is found, g is 0: the paper
    does not say.

    State: `KNNAttentionState`, by `initial_state` and `return_state`, or in the
    layer with `stateful=True`. The memory is searched before it is written, so
    no query finds its own segment.

    Documents: a token with `clear` starts one. It and later tokens find and see
    nothing older, the tokens before it do. Afterwards the state has only what
    came from the last such token on.

    Args:
        num_heads, key_dim: see `CausalAttention`.
        memory_size: int, N, slots of the memory, in tokens.
        top_k: int K from 1 to N, entries that each query attends to. Default
            32.
        mixing: `"gate"` (default); `"joint_softmax"`, one softmax over the
            retrieved and the local logits, as in
            memorizing-transformers-pytorch; or `"informed_gate"`, where b also
            depends, by learned weights that are initially 0, on how many
            entries were found, on the largest and the mean cosine, and on their
            age.
        similarity: of local attention. `"cosine"` (default), cosines times a
            learned factor for each head, initially 20 (Henry et al. 2020,
            arXiv 2010.04245); or `"dot"`, inner products divided by the root of
            D. The logits of the memory are always such cosines: its keys are
            normalized.
        memory_dropout: float in [0, 1), rate for attention weights of retrieved
            entries. Default 0.
        search_method, target_recall: see `RingMemory`. Default `"auto"`.
        memory_dtype: str, dtype of the memory; None (default) for the compute
            dtype.
        **kwargs: other arguments of `CausalAttention`.

    Call arguments, beyond those of `CausalAttention`:
        write: bool, whether tokens enter the memory and documents clear it.
            True by default. Transformer-XL memory is kept in any case.
        searched: a state whose memory is searched instead, for example that of
            another layer.

    Raises:
        ValueError: as `CausalAttention`.

    Example:

    >>> layer = KNNAttention(num_heads=2, key_dim=8, memory_size=100, top_k=4,
    ...                      return_state=True)
    >>> x = np.zeros((3, 5, 4), "float32")
    >>> y, state = layer(x)
    >>> y, state = layer(x, initial_state=state)
    >>> y.shape, state.memory_count.numpy()
    (TensorShape([3, 5, 4]), array([10, 10, 10], dtype=int32))
    """

    state_class = KNNAttentionState

    def __init__(
        self,
        num_heads: int,
        key_dim: int = 64,
        memory_size: int = 65536,
        top_k: int = 32,
        *,
        mixing: str = "gate",
        similarity: str = "cosine",
        memory_dropout: float = 0.0,
        search_method: str = "auto",
        target_recall: float = 0.95,
        memory_dtype: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_heads, key_dim, **kwargs)
        self.memory_size = check_size("memory_size", memory_size)
        self.top_k: int = check_top_k(top_k, memory_size)
        self.mixing = check_one_of("mixing", mixing, MIXINGS)
        self.similarity = check_one_of(
            "similarity", similarity, ("cosine", "dot")
        )
        self.memory_dropout = check_rate("memory_dropout", memory_dropout)
        self._memory_dropout = keras.layers.Dropout(
            memory_dropout, dtype=self.dtype_policy
        )
        if memory_dtype is not None:
            check_dtype("memory_dtype", memory_dtype, FLOATS)
        self.memory_dtype = memory_dtype
        self._ring = RingMemory(
            self.key_dim,
            memory_size,
            self._value_width,
            "dot",  # of normalized keys
            search_method,
            target_recall,
        )
        self.search_method = search_method
        self.target_recall = target_recall

    def build(self, input_shape: Shape) -> None:
        heads = (self.num_heads,)
        self.log_scale = self.add_weight(
            shape=heads,
            initializer=keras.initializers.Constant(math.log(INITIAL_SCALE)),
            name="log_scale",
        )
        if self.mixing != "joint_softmax":
            self.gate_bias = self.add_weight(
                shape=heads, initializer="zeros", name="gate_bias"
            )
        if self.mixing == "informed_gate":
            self.gate_kernel = self.add_weight(
                shape=(self.num_heads, FEATURES),
                initializer="zeros",
                name="gate_kernel",
            )
        super().build(input_shape)

    def _state_shapes(self):
        dtype = self.memory_dtype or self.compute_dtype
        entries = self._key_heads, self.memory_size
        return {
            **super()._state_shapes(),
            "memory_keys": ((*entries, self.key_dim), dtype),
            "memory_values": ((*entries, self._value_width), dtype),
            "memory_count": ((), "int32"),
        }

    def call(
        self,
        x: Array,
        initial_state: Any = None,
        mask: Array | None = None,
        clear: Array | None = None,
        clear_after: Array | None = None,
        training: bool | None = False,
        shift: Array | None = None,
        write: bool = True,
        searched: Any = None,
    ) -> Any:
        check_bool("write", write)
        return self._run(
            x,
            initial_state,
            mask,
            (clear, clear_after),
            training,
            shift,
            write=write,
            searched=searched,
        )

    def _project(self, x):
        query, key, value = super()._project(x)
        if self.similarity == "cosine":
            query, key = unit(query), unit(key)
        return query, key, value

    def _logits(self, query, keys):
        if self.similarity == "dot":
            return super()._logits(query, keys)
        return self._products(query, keys) * self._scale()

    def _scale(self):
        scale = ops.exp(ops.cast(self.log_scale, self._wide_dtype))
        return scale[:, None, None]

    def _attend(
        self,
        query,
        logits,
        values,
        segment,
        state,
        training,
        write=True,
        searched=None,
    ):
        found = self._retrieve(
            unit(query), segment, self._searched(searched, state)
        )
        memory_logits = ops.where(
            found.is_found, found.cosines * self._scale(), MASKED
        )
        if self.mixing == "joint_softmax":
            both = ops.concatenate([memory_logits, logits], axis=3)
            weights = softmax(both)
            of_memory = weights[..., : self.top_k]
            local = weights[..., self.top_k :]
        else:
            gate = self._gate(found)  # g
            of_memory = gate * softmax(memory_logits)
            local = (1.0 - gate) * softmax(logits)
        # Where nothing was found, the softmax is uniform.
        of_memory = ops.where(found.is_found, of_memory, 0.0)
        of_memory = self._memory_dropout(of_memory, training=training)
        local = self._dropout(local, training=training)
        of_memory = ops.cast(of_memory, self.compute_dtype)
        attended = ops.sum(of_memory[..., None] * found.values, axis=3)
        return attended + self._weigh(local, values)

    def _searched(self, searched, state):
        if searched is None:
            return state
        if not isinstance(searched, KNNAttentionState):
            raise ValueError(
                "`searched` must be a `KNNAttentionState`. Received: "
                f"{type(searched).__name__}"
            )
        sizes = {"B": state.xl_count.shape[0]}
        return self._check_state("searched", searched, sizes)

    def _gate(self, found):
        """(B, H, T, 1), the share of the memory, 0 where nothing was found."""
        dtype = self._wide_dtype
        logit = ops.cast(self.gate_bias, dtype)[:, None, None]
        is_found = ops.cast(found.is_found, dtype)
        if self.mixing == "informed_gate":
            number = ops.sum(is_found, axis=3)
            age = ops.log(1.0 + ops.cast(found.age, dtype))
            cosines = is_found * ops.cast(found.cosines, dtype)
            features = [
                number / self.top_k,
                ops.max(ops.cast(found.cosines, dtype), axis=3),
                ops.sum(cosines, axis=3) / ops.maximum(number, 1.0),
                ops.sum(age * is_found, axis=3)
                / (ops.maximum(number, 1.0) * math.log(1.0 + self.memory_size)),
            ]
            kernel = ops.cast(self.gate_kernel, dtype)[:, None]
            features = ops.stack(features, axis=3)  # (B, H, T, 4)
            logit = logit + ops.sum(features * kernel, axis=3, keepdims=True)
        any_found = ops.any(found.is_found, axis=3, keepdims=True)
        return ops.where(any_found, ops.sigmoid(logit), 0.0)

    def _retrieve(self, query, segment, state):
        """The nearest entries of each query (B, H, T, D) of length 1."""
        batch, heads, time, _ = ops.shape(query)
        count, per_group = self.top_k, self.num_heads // self._key_heads
        rows = ops.reshape(query, (-1, per_group * time, self.key_dim))
        neighbours = self._ring.search(
            self._ring_state(state), ops.stop_gradient(rows), count
        )
        shape = (batch, heads, time, count)
        keys = ops.reshape(neighbours.keys, (*shape, self.key_dim))
        values = ops.reshape(neighbours.values, (*shape, self._value_width))
        is_found = ops.reshape(neighbours.mask, shape)
        if segment.documents is not None:
            is_older = ops.equal(segment.documents, 0)[:, None, :, None]
            is_found = ops.logical_and(is_found, is_older)
        slots = ops.reshape(neighbours.indices, shape)
        last = state.memory_count[:, None, None, None] - 1
        age = (last - slots) % self.memory_size
        keys = ops.cast(keys, self._wide_dtype)
        query = ops.cast(query, self._wide_dtype)[:, :, :, None]
        cosines = ops.sum(query * keys, axis=4)
        values = ops.cast(values, self.compute_dtype)
        return Retrieved(
            ops.where(is_found, cosines, -1.0),
            ops.where(is_found[..., None], values, 0.0),
            is_found,
            ops.where(is_found, age, 0),
        )

    def _ring_state(self, state):
        """The memory with a row for each head of keys, (B G, N, D)."""

        def rows(array):
            return ops.reshape(array, (-1, *array.shape[2:]))

        count = ops.repeat(state.memory_count, self._key_heads, axis=0)
        return RingState(
            rows(state.memory_keys), rows(state.memory_values), count
        )

    def _state_after(
        self, keys, values, segment, state, write=True, searched=None
    ):
        first, end = self._kept(segment, state)
        after = self._xl_after(keys, values, segment, first, end)
        memory = {
            name: getattr(state, name)
            for name in ("memory_keys", "memory_values", "memory_count")
        }
        if write:
            memory = self._written(
                keys, values, segment, state, first, end - after["xl_count"]
            )
        return self.state_class(**after, **memory)

    def _written(self, keys, values, segment, state, first, end):
        """The memory after the entries from `first` to `end` entered it."""
        time = ops.shape(segment.x)[1]
        place = ops.arange(time, dtype="int32")
        enters = ops.logical_and(place >= first[:, None], place < end[:, None])
        ring = self._ring_state(state)

        def per_row(array):
            return ops.repeat(array, self._key_heads, axis=0)

        if segment.documents is not None:
            is_over = segment.next_document > 0
            ring = self._ring.clear(ring, per_row(is_over))

        def rows(array):  # entries behind these stay in the state
            return ops.reshape(array[:, :, :time], (-1, time, array.shape[3]))

        # A token enters the memories of all heads or of none.
        for array in (keys, values):
            is_kept = ops.all(is_sound(array[:, :, :time]), axis=1)
            enters = ops.logical_and(enters, is_kept)
        ring = self._ring.add(
            ring, unit(rows(keys)), rows(values), per_row(enters)
        )
        batch = ops.shape(segment.x)[0]
        return {
            "memory_keys": ops.reshape(
                ring.keys, (batch, -1, *ring.keys.shape[1:])
            ),
            "memory_values": ops.reshape(
                ring.values, (batch, -1, *ring.values.shape[1:])
            ),
            "memory_count": ring.count[:: self._key_heads],
        }

    def get_config(self) -> Config:
        names = ("memory_size", "top_k", "mixing", "similarity")
        names += ("memory_dropout", "search_method", "target_recall")
        names += ("memory_dtype",)
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}
