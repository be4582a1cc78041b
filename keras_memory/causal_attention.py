"""Causal attention with the keys and values of earlier segments in front.

Dai et al., "Transformer-XL", 2019 (arXiv 1901.02860), section 3.2; Shazeer,
"Fast Transformer Decoding: One Write-Head is All You Need", 2019 (arXiv
1911.02150). Axes: B rows, T tokens of a segment, X tokens before it, S = X + T,
H heads, G heads of keys and values (1 or H), D width of keys, V of values.
"""

import functools
import math
from typing import Any
from typing import NamedTuple
from typing import Self
from typing import Unpack

import keras
from keras import ops
from keras.src.backend import get_keras_mask

from keras_memory.addressing.activations import softmax
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.slots import rows_at
from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_bool
from keras_memory.checks import check_process
from keras_memory.checks import check_rate
from keras_memory.checks import check_size
from keras_memory.checks import with_rows_of
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape
from keras_memory.recurrent.state import LayerState
from keras_memory.relative_positions import RelativePositionBias

MASKED = -1e30  # logit of what is not attended to; finite, so no NaN arises


class CausalAttentionState(NamedTuple):
    """Keys and values of the latest tokens before a segment.

    Args:
        xl_keys: (B, G, X, D), the latest token last.
        xl_values: (B, G, X, V), likewise.
        xl_count: (B,) int32 in [0, X], how many of the last entries are valid.
    """

    xl_keys: Any
    xl_values: Any
    xl_count: Any


class Segment(NamedTuple):
    """What attention needs to know about the tokens of a segment.

    Padding comes last: the first `count` tokens are valid. `order` says where
    they were before.

    Args:
        x: (B, T, width).
        count: (B,) int32, number of valid tokens.
        documents: (B, T) int32, 0 for the document that the state belongs to,
            1 for the first that starts in the segment, ...; None if none may
            start.
        next_document: (B,) int32, that of the next segment's first token.
        order: (B, T) int32; None if there is no mask.
    """

    x: Any
    count: Any
    documents: Any
    next_document: Any
    order: Any


@keras.saving.register_keras_serializable(package="keras_memory")
class CausalAttention(Arguments, keras.layers.Layer):
    """Causal attention to a segment and, in front, to the tokens before it.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; Dai et al. 2019
    (Transformer-XL, arXiv 1901.02860), section 3.2: keys and values of the last
    tokens are kept for the next segment, without gradient; Shazeer 2019 (arXiv
    1911.02150), multi-query attention.

    Each token sees itself, the tokens of its document before it in the segment,
    and, if its document started before the segment, the tokens in the state.

    State: `CausalAttentionState`, by `initial_state` and `return_state`, or in
    the layer with `stateful=True`.

    Masking and dtype: masked tokens are neither attended to nor kept, and do
    not count in distances; their own outputs are undefined. Logits and
    softmax are computed in float32 under 16-bit policies.

    Args:
        num_heads: int, H.
        key_dim: int, D, width of keys and queries of a head. Default 64.
        value_dim: int, V, width of values of a head; None (default) for D.
        output_dim: int, width of the output; None (default) for that of `x`.
        xl_size: int X, at least 0, number of tokens before the segment that are
            attended to. Default 0.
        multi_query: bool, all heads share one head of keys and values (True,
            default), or each has its own.
        position_bias: `"t5"` (default), a `RelativePositionBias` of the layer's
            own; a `RelativePositionBias` to share between layers; or None.
        dropout: float in [0, 1), rate for attention weights. Default 0.
        use_bias: bool, whether queries, keys and values have a bias.
            Default False.
        use_output_bias: bool, whether the output has one. Default False.
        output_gate: bool, multiply the output by tanh of a learned number,
            initially 0, so that a layer added to a trained model changes
            nothing at first (Alayrac et al. 2022, arXiv 2204.14198).
            Default False.
        kernel_initializer, bias_initializer: initializers of weights.
        stateful: bool, continue from the state of the previous call; needs a
            known batch size. Default False.
        return_state: bool, return the state after the output. Default False.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: (B, T, width).
        initial_state: `CausalAttentionState` or a list of its tensors; None
            for that of the layer, or an empty one.
        mask: (B, T) bool, False for padding.
        clear: (B, T) bool, True for tokens with which a document starts; or
            (B,), True for rows in which the segment starts one. None for none.
        clear_after: (B, T) bool, True for tokens with which a document ends;
            None for none.
        training: bool.
        shift: (B,) int32, tokens by which queries are moved back in relative
            positions, for converted weights; None for 0.

    Returns:
        (B, T, `output_dim`), then the state with `return_state=True`. No
        gradient flows through the state to an earlier segment.

    Raises:
        ValueError: an argument out of range; wrong shapes or dtypes; unknown
            batch size of a stateful layer.

    Example:

    >>> layer = CausalAttention(num_heads=2, key_dim=8, xl_size=16,
    ...                         return_state=True)
    >>> x = np.zeros((3, 5, 4), "float32")
    >>> y, state = layer(x)
    >>> y, state = layer(x, initial_state=state)
    >>> y.shape, state.xl_count.numpy()
    (TensorShape([3, 5, 4]), array([10, 10, 10], dtype=int32))
    """

    state_class = CausalAttentionState

    def __init__(
        self,
        num_heads: int,
        key_dim: int = 64,
        value_dim: int | None = None,
        output_dim: int | None = None,
        xl_size: int = 0,
        multi_query: bool = True,
        position_bias: Any = "t5",
        dropout: float = 0.0,
        use_bias: bool = False,
        use_output_bias: bool = False,
        output_gate: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        stateful: bool = False,
        return_state: bool = False,
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = check_size("num_heads", num_heads)
        self.key_dim = check_size("key_dim", key_dim)
        if value_dim is not None:
            check_size("value_dim", value_dim, alternatives=", or None")
        self.value_dim = value_dim
        if output_dim is not None:
            check_size("output_dim", output_dim, alternatives=", or None")
        self.output_dim = output_dim
        self.xl_size = check_size("xl_size", xl_size, least=0)
        self.multi_query = check_bool("multi_query", multi_query)
        self.position_bias = self._check_position_bias(position_bias)
        self.dropout = check_rate("dropout", dropout)
        self.use_bias = check_bool("use_bias", use_bias)
        self.use_output_bias = check_bool("use_output_bias", use_output_bias)
        self.output_gate = check_bool("output_gate", output_gate)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.stateful = check_bool("stateful", stateful)
        self.return_state = check_bool("return_state", return_state)
        self._state = None
        self._dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)

    def _check_position_bias(self, value):
        if value is None or (isinstance(value, str) and value == "t5"):
            return value
        if not isinstance(value, RelativePositionBias):
            raise ValueError(
                '`position_bias` must be "t5", a `RelativePositionBias` or '
                f"None. Received: position_bias={value!r}"
            )
        if value.num_heads != self.num_heads:
            raise ValueError(
                "`position_bias` must have the heads of the layer, "
                f"{self.num_heads}. Received: num_heads={value.num_heads}"
            )
        return value

    @property
    def _key_heads(self):
        return 1 if self.multi_query else self.num_heads

    @property
    def _value_width(self):
        return self.key_dim if self.value_dim is None else self.value_dim

    # Weights and state.

    def build(self, input_shape: Shape) -> None:
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                "`x` must be (B, T, width) with a known width. Received: shape "
                f"{tuple(input_shape)}"
            )
        width = input_shape[-1]
        self._width = width
        heads, key_heads = self.num_heads, self._key_heads
        self._add_projection("query", width, heads, self.key_dim)
        self._add_projection("key", width, key_heads, self.key_dim)
        self._add_projection("value", width, key_heads, self._value_width)
        output = width if self.output_dim is None else self.output_dim
        self.output_kernel = self.add_weight(
            shape=(heads * self._value_width, output),
            initializer=self.kernel_initializer,
            name="output_kernel",
        )
        if self.use_output_bias:
            self.output_bias = self.add_weight(
                shape=(output,),
                initializer=self.bias_initializer,
                name="output_bias",
            )
        if self.output_gate:
            self.gate_of_output = self.add_weight(
                shape=(), initializer="zeros", name="output_gate"
            )
        self._bias = self.position_bias
        if self._bias == "t5":
            self._bias = RelativePositionBias(
                self.num_heads, name="position_bias", dtype=self.dtype_policy
            )
        if self._bias is not None and not self._bias.built:
            self._bias.build(())
        if self.stateful:
            self._create_state(input_shape[0])
        self.built = True

    def _add_projection(self, name, width, heads, size):
        kernel = self.add_weight(
            shape=(width, heads * size),
            initializer=self.kernel_initializer,
            name=f"{name}_kernel",
        )
        setattr(self, f"{name}_kernel", kernel)
        if self.use_bias:
            bias = self.add_weight(
                shape=(heads * size,),
                initializer=self.bias_initializer,
                name=f"{name}_bias",
            )
            setattr(self, f"{name}_bias", bias)

    def _state_shapes(self):
        """Shape of each state without the batch axis, and its dtype."""
        entries = self._key_heads, self.xl_size
        return {
            "xl_keys": ((*entries, self.key_dim), self.compute_dtype),
            "xl_values": ((*entries, self._value_width), self.compute_dtype),
            "xl_count": ((), "int32"),
        }

    def _create_state(self, batch_size):
        if batch_size is None:
            raise ValueError(
                "A stateful layer needs a known batch size, since it keeps a "
                "state for each row: use `keras.Input(batch_shape=...)`. "
                "Received: a batch size of None"
            )
        self._state = LayerState(
            [
                (name, (batch_size, *shape), dtype, ops.zeros)
                for name, (shape, dtype) in self._state_shapes().items()
            ],
            name="state",
            dtype=self.dtype_policy,
        )

    def get_initial_state(self, batch_size: Array) -> Any:
        """An empty state.

        Args:
            batch_size: int or scalar tensor, B.
        """
        return self.state_class(
            **{
                name: ops.zeros((batch_size, *shape), dtype)
                for name, (shape, dtype) in self._state_shapes().items()
            }
        )

    @property
    def states(self) -> Any:
        """The state of a stateful layer, variables; None if it is not stateful
        or not built."""
        if self._state is None:
            return None
        return self.state_class(*self._state.variables)

    def reset_state(self) -> None:
        """Empties the state of a stateful layer."""
        for variable in self._state.variables if self._state else ():
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    # The call.

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        x = check_array("x", x, (None, None, None), result="given")
        # Keras passes a mask on only if `x` is the only tensor.
        if kwargs.get("mask") is None and get_keras_mask(x) is not None:
            kwargs["mask"] = get_keras_mask(x)
        return super().__call__(x, *args, **kwargs)

    def call(
        self,
        x: Array,
        initial_state: Any = None,
        mask: Array | None = None,
        clear: Array | None = None,
        clear_after: Array | None = None,
        training: bool | None = False,
        shift: Array | None = None,
    ) -> Any:
        documents = clear, clear_after
        return self._run(x, initial_state, mask, documents, training, shift)

    def _run(
        self, given, initial_state, mask, documents, training, shift, **options
    ):
        segment, state = self._checked(given, initial_state, mask, *documents)
        if shift is not None:
            sizes = {"B": state.xl_count.shape[0]}
            shift = check_array("shift", shift, ("B",), sizes, "integer")
        query, key, value = self._project(segment.x)
        keys = self._join(state.xl_keys, key)
        values = self._join(state.xl_values, value)
        logits = self._masked(
            self._logits(query, keys) + self._distance_bias(segment, shift),
            self._is_visible(segment, state),
        )
        outputs = self._attend(
            query, logits, values, segment, state, training, **options
        )
        outputs = self._output(outputs)
        after = self._state_after(keys, values, segment, state, **options)
        if segment.order is not None:
            outputs = rows_at(outputs, ops.argsort(segment.order, axis=1))
        if self.stateful and initial_state is None:
            self._state.assign(after)
        outputs = with_rows_of(outputs, given)
        return (outputs, after) if self.return_state else outputs

    def _checked(self, x, initial_state, mask, clear, clear_after):
        check_process(type(self).__name__)
        sizes = {}
        x = check_array("x", x, ("B", "T", self._width), sizes)
        if self.stateful and initial_state is None:
            x = check_batch("x", x, self._state.variables[0].shape[0])
        x = ops.cast(x, self.compute_dtype)
        state = self._given_state(initial_state, x, sizes)
        time = ops.shape(x)[1]
        count = ops.zeros_like(x[:, 0, 0], dtype="int32") + time
        order = None
        if mask is not None:
            mask = check_array("mask", mask, ("B", "T"), sizes, "bool")
            place = ops.arange(time, dtype="int32")
            order = ops.argsort(ops.where(mask, place, place + time), axis=1)
            count = ops.sum(ops.cast(mask, "int32"), axis=1)
            # A weight of 0 would not hide a NaN.
            x = rows_at(ops.where(mask[:, :, None], x, 0.0), order)

        def of_tokens(name, marks):
            marks = check_array(name, marks, ("B", "T"), sizes, "bool")
            if mask is None:
                return marks
            return rows_at(ops.logical_and(marks, mask), order)

        starts = []  # (B, T + 1): of the tokens, and of the one behind them
        if clear is not None:
            clear = check_array("clear", clear, ("B", ...), sizes, "bool")
            if len(clear.shape) > 1:
                starts.append(
                    ops.pad(of_tokens("clear", clear), ((0, 0), (0, 1)))
                )
            else:
                starts.append(ops.pad(clear[:, None], ((0, 0), (0, time))))
        if clear_after is not None:
            ends = of_tokens("clear_after", clear_after)
            starts.append(ops.pad(ends, ((0, 0), (1, 0))))
        documents = following = None
        if starts:
            is_start = functools.reduce(ops.logical_or, starts)
            documents = ops.cumsum(ops.cast(is_start, "int32"), axis=1)
            documents, following = documents[:, :-1], documents[:, -1]
        return Segment(x, count, documents, following, order), state

    def _given_state(self, initial_state, x, sizes):
        if initial_state is None:
            if not self.stateful:
                return self.get_initial_state(ops.shape(x)[0])
            return self.state_class(*self._state.values())
        return self._check_state("initial_state", initial_state, sizes)

    def _check_state(self, name, given, sizes):
        shapes = self._state_shapes()
        if not isinstance(given, (tuple, list)) or len(given) != len(shapes):
            got = len(given) if isinstance(given, (tuple, list)) else given
            raise ValueError(
                f"`{name}` must have {len(shapes)} tensors: "
                f"{', '.join(shapes)}. Received: {got}"
            )
        return self.state_class(
            *(
                check_array(
                    f"{name}.{field}",
                    part,
                    ("B", *shape),
                    sizes,
                    "integer" if dtype == "int32" else "real",
                    dtype,
                )
                for part, (field, (shape, dtype)) in zip(given, shapes.items())
            )
        )

    def _project(self, x):
        """Queries (B, H, T, D), keys (B, G, T, D) and values (B, G, T, V)."""
        query = self._per_head("query", x, self.num_heads)
        key = self._per_head("key", x, self._key_heads)
        value = self._per_head("value", x, self._key_heads)
        return query, key, value

    def _per_head(self, name, x, heads):
        product = ops.matmul(x, getattr(self, f"{name}_kernel"))
        if self.use_bias:
            product = product + getattr(self, f"{name}_bias")
        batch, time = ops.shape(x)[:2]
        size = product.shape[-1] // heads
        product = ops.reshape(product, (batch, time, heads, size))
        return ops.swapaxes(product, 1, 2)

    def _join(self, before, new):
        """Puts the entries of the state before those of the segment."""
        if not self.xl_size:
            return new
        return ops.concatenate([ops.cast(before, ops.dtype(new)), new], axis=2)

    def _logits(self, query, keys):
        """(B, H, T, S), the inner products, divided by the root of D."""
        return self._products(query / math.sqrt(self.key_dim), keys)

    def _products(self, query, keys):
        """(B, H, T, D) queries times (B, G, n, D) keys: (B, H, T, n)."""
        batch, _, time, width = ops.shape(query)
        groups = self._key_heads
        query = ops.reshape(query, (batch, groups, -1, width))
        query = ops.cast(query, self._wide_dtype)
        keys = ops.cast(keys, self._wide_dtype)
        products = ops.matmul(query, ops.swapaxes(keys, 2, 3))
        return ops.reshape(products, (batch, self.num_heads, time, -1))

    def _weigh(self, weights, values):
        """(B, H, T, n) weights of (B, G, n, V) values: (B, H, T, V)."""
        batch, _, time, number = ops.shape(weights)
        weights = ops.cast(weights, self.compute_dtype)
        weights = ops.reshape(weights, (batch, self._key_heads, -1, number))
        sums = ops.matmul(weights, values)
        return ops.reshape(
            sums, (batch, self.num_heads, time, self._value_width)
        )

    @property
    def _wide_dtype(self):
        return at_least_float32(self.compute_dtype)

    def _distance_bias(self, segment, shift):
        if self._bias is None:
            return 0.0
        time = ops.shape(segment.x)[1]
        bias = self._bias.of_segment(time, self.xl_size + time, shift)
        return ops.cast(bias, self._wide_dtype)

    def _is_visible(self, segment, state):
        """(B or 1, T, S) bool: which keys each token may attend to."""
        time = ops.shape(segment.x)[1]
        key = ops.arange(self.xl_size + time, dtype="int32")
        query = self.xl_size + ops.arange(time, dtype="int32")[:, None]
        # Padding comes last, so that no valid token sees it.
        is_visible = (key <= query)[None]
        if self.xl_size:
            is_valid = key >= self.xl_size - state.xl_count[:, None]
            is_visible = ops.logical_and(is_visible, is_valid[:, None])
        if segment.documents is not None:
            document = segment.documents
            before = ops.zeros_like(document[:, :1])
            before = ops.repeat(before, self.xl_size, axis=1)
            of_key = ops.concatenate([before, document], axis=1)
            is_same = ops.equal(document[:, :, None], of_key[:, None])
            is_visible = ops.logical_and(is_visible, is_same)
        return is_visible

    def _masked(self, logits, is_visible):
        return ops.where(is_visible[:, None], logits, MASKED)

    def _attend(self, query, logits, values, segment, state, training):
        """(B, H, T, V), the attended values."""
        weights = self._dropout(softmax(logits), training=training)
        return self._weigh(weights, values)

    def _output(self, outputs):
        batch, _, time, _ = ops.shape(outputs)
        outputs = ops.reshape(ops.swapaxes(outputs, 1, 2), (batch, time, -1))
        outputs = ops.matmul(outputs, self.output_kernel)
        if self.use_output_bias:
            outputs = outputs + self.output_bias
        if self.output_gate:
            outputs = outputs * ops.tanh(self.gate_of_output)
        return outputs

    def _kept(self, segment, state):
        """The entries [X, T] of the document that goes on: the first, and the
        end, (B,) int32 each."""
        first, end = self.xl_size - state.xl_count, self.xl_size + segment.count
        if segment.documents is None:
            return first, end
        goes_on = segment.next_document
        is_older = ops.logical_and(
            segment.documents < goes_on[:, None],
            ops.arange(ops.shape(segment.x)[1]) < segment.count[:, None],
        )
        older = ops.sum(ops.cast(is_older, "int32"), axis=1)
        return ops.where(goes_on > 0, self.xl_size + older, first), end

    def _state_after(self, keys, values, segment, state):
        first, end = self._kept(segment, state)
        return self.state_class(
            **self._xl_after(keys, values, segment, first, end)
        )

    def _xl_after(self, keys, values, segment, first, end):
        """The X entries before `end`, of which those from `first` are valid."""
        xl_count = ops.minimum(end - first, self.xl_size)
        if segment.order is None:  # they are the last X of all
            time = ops.shape(segment.x)[1]
            xl_keys, xl_values = keys[:, :, time:], values[:, :, time:]
            if not self.xl_size:
                xl_keys, xl_values = keys[:, :, :0], values[:, :, :0]
        else:
            place = ops.arange(self.xl_size, dtype="int32")
            place = end[:, None] - self.xl_size + place
            xl_keys, xl_values = (
                ops.swapaxes(rows_at(ops.swapaxes(part, 1, 2), place), 1, 2)
                for part in (keys, values)
            )
        return {
            "xl_keys": ops.stop_gradient(xl_keys),
            "xl_values": ops.stop_gradient(xl_values),
            "xl_count": xl_count,
        }

    def get_config(self) -> Config:
        names = ("num_heads", "key_dim", "value_dim", "output_dim", "xl_size")
        names += ("multi_query", "dropout", "use_bias", "use_output_bias")
        names += ("output_gate", "stateful", "return_state")
        config = {name: getattr(self, name) for name in names}
        for name in ("kernel_initializer", "bias_initializer"):
            config[name] = keras.initializers.serialize(getattr(self, name))
        config["position_bias"] = self.position_bias
        if isinstance(self.position_bias, RelativePositionBias):
            config["position_bias"] = keras.saving.serialize_keras_object(
                self.position_bias
            )
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        if isinstance(config.get("position_bias"), dict):
            bias = keras.saving.deserialize_keras_object(
                config["position_bias"]
            )
            config = {**config, "position_bias": bias}
        return cls(**config)
