"""A transformer over documents that remembers what it read.

Wu et al., "Memorizing Transformers", 2022 (arXiv 2203.08913). Axes: B documents
side by side, T tokens of a segment, C tokens of the vocabulary.
"""

from typing import Any
from typing import Unpack

import keras
from keras import ops
from keras.src.backend import set_keras_mask

from keras_memory.addressing.activations import gelu
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import given
from keras_memory.causal_attention import CausalAttention
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_bool
from keras_memory.checks import check_process
from keras_memory.checks import check_rate
from keras_memory.checks import check_size
from keras_memory.checks import check_whole
from keras_memory.checks import is_number
from keras_memory.checks import plain_tuple
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape
from keras_memory.knn_attention import KNNAttention
from keras_memory.recurrent.state import LayerState
from keras_memory.relative_positions import RelativePositionBias

MEMORY = "memory_of_state_"  # prefix of the memory's arrays in files


@keras.saving.register_keras_serializable(package="keras_memory")
class MemorizingTransformer(Arguments, keras.Model):
    """Decoder-only transformer, some of whose layers remember earlier segments.

    Source: Wu et al. 2022 (arXiv 2203.08913), section 3. Blocks with layer
    normalization before attention and before a feed-forward network with GELU.
    Layers in `memorizing_layers` are `KNNAttention`, the others
    `CausalAttention`; each kind shares one relative position bias.

    Documents are read in segments: row b of each call goes on where row b of
    the last call ended. The memory is the model's own, in `fit`, `predict` and
    calls, or `state=` is passed in and out.

    Evaluation, and validation in `fit`, start from an empty memory, write to it
    as they go through the documents, and drop it: the model's own stays as it
    was. `evaluate(..., write=False)` searches the model's own instead.

    `fit` does not empty the memory between epochs: without `clear_on_token`, a
    second epoch finds its own targets of the first. Call `reset_memory` then.

    Every batch has the size of the first one, also in `predict`. For other
    sizes use `stateful=False` and `state=`.

    Files do not contain the memory, except those of `save(..., memory=True)`,
    which a model of the same batch size loads.

    Args:
        num_tokens: int, C.
        dim: int, width of the model. Default 512.
        depth: int, number of blocks. Default 6.
        num_heads: int. Default 8.
        key_dim: int, width of a head. Default 64.
        memorizing_layers: ints from 1 to `depth`, each once, or an int; None
            (default) for the middle one, `depth` // 2, at least 1.
        memory_size: int, tokens in the memory of a layer. Default 65536.
        top_k: int, entries that a query attends to. Default 32.
        xl_size: int, tokens before the segment that are attended to directly.
            Default 0.
        xl_layers: ints likewise, layers with these tokens; None (default) for
            all.
        mixing, similarity, multi_query, memory_dropout, search_method,
            memory_dtype, output_gate: see `KNNAttention`.
        ff_mult: int, width of the feed-forward networks, in `dim`s. Default 4.
        dropout, ff_dropout: floats in [0, 1), rates for attention weights and
            in feed-forward networks. Default 0.
        pad_id: int, token that is neither attended to, nor remembered, nor
            scored as a label; None (default) for none.
        clear_on_token: int, token with which a document starts; None (default)
            for none. It and later tokens find and see nothing older.
        clear_on_end_token: int, token with which a document ends, likewise.
        shift_memories_down: int, at least 0: a layer searches the memory of
            the memorizing layer this many above, the last those of the first.
            Default 0.
        shift_xl_down: int, likewise for the tokens before the segment (Ding et
            al. 2021, arXiv 2012.15688). Default 0.
        num_buckets, max_distance: see `RelativePositionBias`.
        misplaced_positions: bool, count distances as
            memorizing-transformers-pytorch does, which places queries at the
            start of the keys before the segment. Default False.
        stateful: bool, whether the model has a memory of its own. True by
            default. It then needs a fixed batch size.
        **kwargs: see `keras.Model`.

    Call arguments:
        tokens: (B, T) integers in [0, C).
        state: from `create_memories`, or from the last call; None for the
            model's own, or an empty one if it has none.
        labels: (B, T) integers in [0, C), the token behind each token; None
            for none.
        training: bool.
        write: bool, whether the memory is written. True by default.

    Returns:
        (B, T, C) logits; with `labels` the mean cross entropy instead, (),
        without those that are `pad_id`. If `state` is given, then also the
        state afterwards.

    Raises:
        ValueError: an argument out of range; wrong shapes or dtypes.

    Example:

    >>> model = MemorizingTransformer(num_tokens=11, dim=8, depth=2,
    ...     num_heads=2, key_dim=4, memorizing_layers=2, memory_size=100)
    >>> tokens = np.arange(10).reshape(2, 5)
    >>> state = model.create_memories(batch_size=2)
    >>> logits, state = model(tokens, state=state)
    >>> logits.shape, state[1].memory_count.numpy()
    (TensorShape([2, 5, 11]), array([5, 5], dtype=int32))
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        key_dim: int = 64,
        memorizing_layers: Any = None,
        memory_size: int = 65536,
        top_k: int = 32,
        xl_size: int = 0,
        xl_layers: Any = None,
        *,
        mixing: str = "gate",
        similarity: str = "cosine",
        multi_query: bool = True,
        ff_mult: int = 4,
        dropout: float = 0.0,
        memory_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        search_method: str = "auto",
        memory_dtype: str | None = None,
        output_gate: bool = False,
        pad_id: int | None = None,
        clear_on_token: int | None = None,
        clear_on_end_token: int | None = None,
        shift_memories_down: int = 0,
        shift_xl_down: int = 0,
        num_buckets: int = 32,
        max_distance: int = 128,
        misplaced_positions: bool = False,
        stateful: bool = True,
        **kwargs: Unpack[KerasArguments],
    ):
        arguments = given(locals())
        super().__init__(**kwargs)
        self._arguments = {
            name: value
            for name, value in arguments.items()
            if name not in kwargs
        }
        check_size("num_tokens", num_tokens)
        check_size("dim", dim)
        check_size("depth", depth)
        check_size("ff_mult", ff_mult)
        check_rate("ff_dropout", ff_dropout)
        check_bool("misplaced_positions", misplaced_positions)
        for name in ("pad_id", "clear_on_token", "clear_on_end_token"):
            if arguments[name] is not None:
                check_whole(name, arguments[name], 0, num_tokens - 1)
        for name in ("clear_on_token", "clear_on_end_token"):
            if pad_id is not None and arguments[name] == pad_id:
                raise ValueError(
                    f"`pad_id` must differ from `{name}`: padding is ignored. "
                    f"Received: {pad_id} for both"
                )
        for name in ("shift_memories_down", "shift_xl_down"):
            check_size(name, arguments[name], least=0)
        if memorizing_layers is None:
            memorizing_layers = max(1, depth // 2)
        self.num_tokens = num_tokens
        self.memorizing_layers: tuple[int, ...] = check_layer_numbers(
            "memorizing_layers", memorizing_layers, depth
        )
        if xl_layers is None:
            xl_layers = range(1, depth + 1)
        self.xl_layers: tuple[int, ...] = check_layer_numbers(
            "xl_layers", xl_layers, depth
        )
        # As `get_config` gives them, so that any sequence can be saved.
        for name in ("memorizing_layers", "xl_layers"):
            if self._arguments[name] is not None:
                self._arguments[name] = list(getattr(self, name))
        if not check_size("xl_size", xl_size, least=0):
            self.xl_layers = ()
        self.pad_id = pad_id
        self.clear_on_token = clear_on_token
        self.clear_on_end_token = clear_on_end_token
        self.shift_memories_down = shift_memories_down
        self.shift_xl_down = shift_xl_down
        self.misplaced_positions = misplaced_positions
        self.stateful = check_bool("stateful", stateful)
        own = {"dtype": self.dtype_policy}
        self.embedding = keras.layers.Embedding(
            num_tokens, dim, name="embedding", **own
        )
        bias = (num_heads, num_buckets, max_distance)
        self.position_bias = RelativePositionBias(
            *bias, name="position_bias", **own
        )
        self.knn_position_bias = RelativePositionBias(
            *bias, name="knn_position_bias", **own
        )
        # Of each block, in the order of a call.
        self.norms: list[keras.layers.Layer] = []
        self.attentions: list[CausalAttention] = []
        self.feed_forwards: list[keras.layers.Layer] = []
        for number in range(1, depth + 1):
            shared = {
                "num_heads": num_heads,
                "key_dim": key_dim,
                "xl_size": xl_size if number in self.xl_layers else 0,
                "multi_query": multi_query,
                "dropout": dropout,
                "return_state": True,
                "name": f"attention_{number}",
                **own,
            }
            if number in self.memorizing_layers:
                attention = KNNAttention(
                    memory_size=memory_size,
                    top_k=top_k,
                    mixing=mixing,
                    similarity=similarity,
                    memory_dropout=memory_dropout,
                    search_method=search_method,
                    memory_dtype=memory_dtype,
                    output_gate=output_gate,
                    position_bias=self.knn_position_bias,
                    **shared,
                )
            else:
                attention = CausalAttention(
                    use_output_bias=True,
                    position_bias=self.position_bias,
                    **shared,
                )
            norms = [
                keras.layers.LayerNormalization(epsilon=1e-5, **own)
                for _ in range(2)
            ]
            feed_forward = [
                norms[1],
                keras.layers.Dense(ff_mult * dim, gelu, **own),
                keras.layers.Dropout(ff_dropout, **own),
                keras.layers.Dense(dim, **own),
            ]
            self.norms.append(norms[0])
            self.attentions.append(attention)
            self.feed_forwards.append(
                keras.Sequential(feed_forward, name=f"feed_forward_{number}")
            )
        self.final_norm = keras.layers.LayerNormalization(
            epsilon=1e-5, name="final_norm", **own
        )
        self.to_logits = keras.layers.Dense(num_tokens, name="to_logits", **own)
        self.dim = dim
        self._state = None
        self._writes = True  # whether steps of `fit` and `evaluate` write
        self._saves_memory = False

    # State.

    def build(self, input_shape: Shape) -> None:
        shape = (*input_shape, self.dim)
        self.embedding.build(input_shape)
        for bias in (self.position_bias, self.knn_position_bias):
            bias.build()
        layers = self.norms, self.attentions, self.feed_forwards
        for layer in (*sum(layers, []), self.final_norm, self.to_logits):
            layer.build(shape)
        if self.stateful:
            self._create_state(input_shape[0])
        self.built = True

    def _create_state(self, batch_size):
        if batch_size is None:
            raise ValueError(
                "A model with a memory of its own needs a known batch size: "
                "call it on data, or use `stateful=False` and `state=`. "
                "Received: a batch size of None"
            )
        self._state = LayerState(
            [
                (f"{name}_{index}", (batch_size, *shape), dtype, ops.zeros)
                for index, attention in enumerate(self.attentions)
                for name, (
                    shape,
                    dtype,
                ) in attention._state_shapes().items()
            ],
            name="state",
            dtype=self.dtype_policy,
        )

    def create_memories(self, batch_size: Array) -> tuple[Any, ...]:
        """An empty state: a `CausalAttentionState` or `KNNAttentionState` for
        each block.

        Args:
            batch_size: int or scalar tensor, B.
        """
        return tuple(
            attention.get_initial_state(batch_size)
            for attention in self.attentions
        )

    @property
    def states(self) -> Any:
        """The model's own state, of variables; None if it has none yet."""
        if self._state is None:
            return None
        return self._packed(self._state.variables)

    def _packed(self, values):
        values, states = list(values), []
        for attention in self.attentions:
            number = len(attention._state_shapes())
            states.append(attention.state_class(*values[:number]))
            values = values[number:]
        return tuple(states)

    def reset_memory(self, rows: Array | None = None) -> None:
        """Empties the model's own memory.

        Args:
            rows: (B,) bool, rows to empty; None for all.
        """
        if self._state is None:
            return
        size = self._state.variables[0].shape[0]
        if rows is not None:
            rows = check_array("rows", rows, (size,), kind="bool")
        for variable in self._state.variables:
            value = ops.convert_to_tensor(variable)
            after = ops.zeros_like(value)
            if rows is not None:
                shape = (-1, *[1] * (len(value.shape) - 1))
                after = ops.where(ops.reshape(rows, shape), after, value)
            variable.assign(after)

    # The call.

    def call(
        self,
        tokens: Array,
        state: Any = None,
        labels: Array | None = None,
        training: bool | None = False,
        write: bool = True,
    ) -> Any:
        check_process("MemorizingTransformer")
        check_bool("write", write)
        sizes = {}
        tokens = check_array("tokens", tokens, ("B", "T"), sizes, "integer")
        tokens = ops.cast(tokens, "int32")
        is_own = state is None and self._state is not None
        if is_own:
            rows = self._state.variables[0].shape[0]
            tokens = check_batch("tokens", tokens, rows)
        before = self._present_state(state, tokens)
        mask = None if self.pad_id is None else tokens != self.pad_id
        shared = {"mask": mask}
        if self.clear_on_token is not None:
            shared["clear"] = tokens == self.clear_on_token
        if self.clear_on_end_token is not None:
            shared["clear_after"] = tokens == self.clear_on_end_token
        if self.misplaced_positions and self.xl_layers:
            shared["shift"] = before[self.xl_layers[0] - 1].xl_count
        x, after = self.embedding(tokens), []
        for number, attention in enumerate(self.attentions, 1):
            options, layer_state = dict(shared), before[number - 1]
            if number in self.xl_layers:
                above = before[
                    self._above(number, self.xl_layers, self.shift_xl_down)
                ]
                layer_state = layer_state._replace(
                    xl_keys=above.xl_keys,
                    xl_values=above.xl_values,
                    xl_count=above.xl_count,
                )
            if number in self.memorizing_layers:
                options["write"] = write
                if self.shift_memories_down:
                    options["searched"] = before[
                        self._above(
                            number,
                            self.memorizing_layers,
                            self.shift_memories_down,
                        )
                    ]
            attended, layer_state = attention(
                self.norms[number - 1](x),
                initial_state=layer_state,
                training=training,
                **options,
            )
            x = x + attended
            x = x + self.feed_forwards[number - 1](x, training=training)
            after.append(layer_state)
        logits = self.to_logits(self.final_norm(x))
        if is_own:
            self._state.assign(part for parts in after for part in parts)
        result = logits
        if labels is not None:
            labels = check_array("labels", labels, ("B", "T"), sizes, "integer")
            result = self._cross_entropy(logits, labels)
        return result if state is None else (result, tuple(after))

    def _above(self, number, layers, shift):
        """Index of the block that is `shift` of `layers` above."""
        return layers[(layers.index(number) + shift) % len(layers)] - 1

    def _present_state(self, state, tokens):
        if state is not None:
            if len(state) != len(self.attentions):
                raise ValueError(
                    "`state` must have one state for each block, "
                    f"{len(self.attentions)}, as `create_memories` returns. "
                    f"Received: {len(state)}"
                )
            return tuple(
                attention.state_class(*part)
                for attention, part in zip(self.attentions, state)
            )
        if self._state is None:
            return self.create_memories(ops.shape(tokens)[0])
        return self._packed(self._state.values())

    def _cross_entropy(self, logits, labels):
        logits = ops.cast(logits, at_least_float32(ops.dtype(logits)))
        losses = keras.losses.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        if self.pad_id is None:
            return ops.mean(losses)
        is_scored = labels != self.pad_id
        total = ops.sum(ops.cast(is_scored, losses.dtype))
        losses = ops.where(is_scored, losses, 0.0)
        return ops.sum(losses) / ops.maximum(total, 1.0)

    # Training and evaluation.

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self.pad_id is not None and y is not None:
            # The mask of the outputs leaves padding out of loss and metrics.
            set_keras_mask(y_pred, y != self.pad_id)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def evaluate(self, *args: Any, write: bool = True, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`, on a memory of its own.

        Args:
            write: bool. True (default): start from an empty memory, write to
                it, and drop it at the end. False: search the model's own
                memory, and write nothing.
        """
        check_bool("write", write)
        if not write:
            self.test_function = None  # it was traced to write
        before = None
        if self._state is not None:
            before = [ops.copy(v.value) for v in self._state.variables]
        self._writes = write
        try:
            if write:
                self.reset_memory()
            return super().evaluate(*args, **kwargs)
        finally:
            if not write:
                self._writes, self.test_function = True, None
            if before is not None:
                self._state.assign(before)
            else:
                self.reset_memory()

    def __call__(self, tokens: Array, *args: Any, **kwargs: Any) -> Any:
        tokens = check_array(
            "tokens", tokens, (None, None), kind="integer", result="given"
        )
        if not self._writes:
            kwargs.setdefault("write", False)
        return super().__call__(tokens, *args, **kwargs)

    # Files.

    def save(
        self, filepath: Any, *args: Any, memory: bool = False, **kwargs: Any
    ) -> None:
        """As `keras.Model.save`.

        Args:
            memory: bool, whether the file contains the model's own memory.
                False by default.

        Raises:
            ValueError: `memory=True`, and the model has no memory of its own.
        """
        if check_bool("memory", memory) and self._state is None:
            raise ValueError(
                "`memory=True` needs a model with a memory of its own, which "
                "has been called. Received: "
                f"stateful={self.stateful}, built={self.built}"
            )
        self._saves_memory = memory
        try:
            return super().save(filepath, *args, **kwargs)
        finally:
            self._saves_memory = False

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self._saves_memory:
            for index, variable in enumerate(self._state.variables):
                store[f"{MEMORY}{index}"] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        own = {key: store[key] for key in store.keys()}
        memory = {k: own.pop(k) for k in list(own) if k.startswith(MEMORY)}
        super().load_own_variables(own)
        if memory and self._state is not None:
            for index, variable in enumerate(self._state.variables):
                variable.assign(memory[f"{MEMORY}{index}"])

    def get_config(self) -> Config:
        return {**super().get_config(), **self._arguments}

    @classmethod
    def from_config(cls, config: Config, custom_objects: Any = None) -> Any:
        return cls(**config)


def check_layer_numbers(name, value, depth):
    """Layer numbers as a sorted tuple of ints from 1 to `depth`, each once."""
    numbers = [value] if is_number(value) else list(plain_tuple(value))
    if len(set(numbers)) < len(numbers) or any(
        isinstance(number, bool)
        or not isinstance(number, int)
        or not 1 <= number <= depth
        for number in numbers
    ):
        raise ValueError(
            f"`{name}` must be layer numbers from 1 to `depth`, {depth}, each "
            f"once. Received: {name}={value!r}"
        )
    return tuple(sorted(numbers))
