"""Memory Wrap: a classifier that reads examples, and names those it used.

La Rosa, Capobianco & Nardi, "Memory Wrap: a Data-Efficient and Interpretable
Extension to Image Classification Models", 2021 (arXiv 2106.01440), and "A
self-interpretable module for deep image classification on small data", Applied
Intelligence 2022. The paper does not number its equations; here they have
names. Axes: B inputs, M examples in the memory, D width of an encoding.
"""

import inspect
from typing import Any
from typing import Self
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.activations import sparsemax
from keras_memory.addressing.gradients import custom_gradient
from keras_memory.addressing.gradients import custom_gradients
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import check_layer
from keras_memory.arguments import config_with_layers
from keras_memory.arguments import layers_from_config
from keras_memory.checks import check_array
from keras_memory.checks import check_bytes
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.retrieval.examples import compare
from keras_memory.retrieval.examples import nearest_examples
from keras_memory.retrieval.replaced import is_replaced
from keras_memory.retrieval.replaced import mark_of_replaced
from keras_memory.retrieval.similarities import LARGEST

SIMILARITIES = ("cosine", "l2", "dot")
NORM_EPSILON = 1e-6  # added to squared lengths, as in the paper's code
FULL_LENGTH = 0.25  # shorter vectors get less than `NORM_EPSILON`


class _MemoryWrap(Arguments, keras.layers.Layer):
    """The base of `MemoryWrapLayer` and `BaselineMemory`.

    They differ in `_parts`, the number of vectors of width D that are
    classified: 2 for [e; v], 1 for v.
    """

    def __init__(
        self,
        units: int,
        head: str | keras.layers.Layer | None = None,
        classifier: keras.layers.Layer | None = None,
        similarity: str = "cosine",
        top_k: int | None = None,
        memory_size: int | None = None,
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        self.units = check_size("units", units)
        self.head = check_layer("head", head, 'a layer, "dense" or None')
        self.classifier = check_layer("classifier", classifier)
        self.similarity = check_one_of("similarity", similarity, SIMILARITIES)
        if top_k is not None:
            check_size(
                "top_k", top_k, alternatives=", or None for all examples"
            )
        self.top_k = top_k
        if memory_size is not None:
            alternatives = ", or None if each call brings a memory"
            check_size("memory_size", memory_size, alternatives=alternatives)
        self.memory_size = memory_size
        self.memory_keys = self.memory_values = None

    def build(self, input_shape: Any) -> None:
        self._width = width = first_shape(input_shape)[-1]
        if width is None:
            raise ValueError(
                "The last axis of `encodings` must have a known size, to build "
                f"the classifier. Received: shapes {input_shape}"
            )
        self._project = self.head
        if self.head == "dense":
            self._project = keras.layers.Dense(
                width, name="head", dtype=self.dtype_policy
            )
        self._key_size = width
        if self._project is not None:
            shape = tuple(self._made_by(self._project, width).shape)
            if len(shape) != 2:
                raise ValueError(
                    f"`head` must map encodings (B, {width}) to vectors (B, "
                    "any size). Received: a head whose output has the shape "
                    f"{shape}"
                )
            self._key_size = shape[-1]
        self._classify = self.classifier
        features = self._parts * width
        if self.classifier is None:
            sizes = [("2 x features", 2 * features), ("units", self.units)]
            check_bytes("The classifier", sizes)
            self._classify = keras.Sequential(
                [
                    keras.layers.Dense(
                        2 * features, "relu", dtype=self.dtype_policy
                    ),
                    keras.layers.Dense(self.units, dtype=self.dtype_policy),
                ],
                name="classifier",
            )
        made = self._made_by(self._classify, features)
        self._output_dtype, shape = made.dtype, tuple(made.shape)
        if shape != (None, self.units):
            raise ValueError(
                f"`classifier` must map features (B, {features}) to (B, "
                f"units). Received: units={self.units}, and a classifier whose "
                f"output has the shape {shape}"
            )
        if self.memory_size is not None:
            self._make_memory(self.memory_size)
        self.built = True

    def _made_by(self, layer, size):
        return layer(keras.KerasTensor((None, size), self.compute_dtype))

    def _make_memory(self, size):
        """Replaces the memory's weights by new ones for `size` examples."""
        sizes = ("memory_size", size), ("D", self._width)
        check_bytes("The memory", sizes, self.compute_dtype)
        dtypes = {"memory_values": self.compute_dtype}
        if self.similarity == "cosine" and self._project is None:
            dtypes["memory_keys"] = self._wide_dtype
        was_locked = self._tracker.locked
        self._tracker.unlock()  # a built layer accepts no new weights
        for name in ("memory_values", "memory_keys"):
            before = getattr(self, name)
            if before is not None:
                if name == "memory_values":  # see `is_replaced`
                    mark = mark_of_replaced(before.dtype)
                    before.assign(ops.full(before.shape, mark, before.dtype))
                self._untrack_variable(before)
                setattr(self, name, None)
            if name in dtypes:
                weight = self.add_weight(
                    (size, self._width),
                    initializer="zeros",
                    dtype=dtypes[name],
                    trainable=False,
                    autocast=False,
                    name=name,
                )
                setattr(self, name, weight)
        if was_locked:
            self._tracker.lock()
        self.memory_size = size

    def __call__(
        self,
        encodings: Array,
        memory_encodings: Array | None = None,
        memory_mask: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        is_pair = isinstance(encodings, (list, tuple))
        if is_pair:
            names = "encodings", "memory_encodings"
            encodings, memory_encodings = split_pair(
                encodings, names, memory_encodings
            )
        encodings, memory_encodings, memory_mask = self._checked(
            encodings, memory_encodings, memory_mask
        )
        if is_pair:
            encodings, memory_encodings = [encodings, memory_encodings], None
        return super().__call__(
            encodings,
            memory_encodings=memory_encodings,
            memory_mask=memory_mask,
            **kwargs,
        )

    def _checked(self, encodings, memory, mask):
        if isinstance(encodings, dict):
            first_shape(encodings)
        sizes = {"D": self._width} if self.built else {}
        encodings = check_array("encodings", encodings, ("B", "D"), sizes)
        if memory is not None:
            name, axes = "memory_encodings", ("M", "D")
            memory = check_array(
                name, memory, (..., *axes), {**sizes}, result="given"
            )
            if len(memory.shape) == 3:
                axes = ("B", *axes)
            memory = check_array(name, memory, axes, sizes)
        elif self.memory_values is not None:
            sizes["M"] = self.memory_size
        if mask is not None:
            name, kind = "memory_mask", "mask"
            mask = check_array(
                name, mask, (..., "M"), {**sizes}, kind, result="given"
            )
            axes = ("B", "M") if len(mask.shape) == 2 else ("M",)
            mask = check_array(name, mask, axes, sizes, kind, "bool")
        return encodings, memory, mask

    def call(
        self,
        encodings: Array,
        memory_encodings: Array | None = None,
        memory_mask: Array | None = None,
        return_weights: bool = False,
        training: bool | None = None,
    ) -> Any:
        if isinstance(encodings, (list, tuple)):
            encodings, memory_encodings = encodings
        self._check_readable(memory_encodings, training)
        values, keys, replaced = memory_encodings, None, None
        if values is None:
            values = ops.convert_to_tensor(self.memory_values)
            replaced = is_replaced(values)
            if self.memory_keys is not None:
                keys = ops.convert_to_tensor(self.memory_keys)
        lost = None
        if memory_mask is not None:
            counts, lost = _counted(values, memory_mask)
            values = _zero_unless(counts, values)
            keys = None if keys is None else _zero_unless(counts, keys)
        if keys is None:
            keys = self._keys(values)
        weights, indices = self._weigh(self._keys(encodings), keys, memory_mask)
        if lost is not None:
            weights = ops.where(lost, np.nan, weights)
        read = _read(weights, self._wide(values), indices)
        with custom_gradients(training):
            outputs = self._classified(
                encodings, ops.cast(read, self.compute_dtype)
            )
        if replaced is not None:
            outputs = ops.where(replaced, np.nan, outputs)
        if not return_weights:
            return outputs
        weights = ops.cast(weights, self.compute_dtype)
        if replaced is not None:
            weights = ops.where(replaced, np.nan, weights)
        if indices is None:
            return outputs, weights
        return outputs, weights, indices

    def set_memory(self, memory_encodings: Array) -> None:
        """Fixes the memory: from now on `layer(x)` gives the result of
        `layer([x, memory_encodings])`, also if weights change later. For the
        cosine without `head`, the examples are normalized only once.

        Args:
            memory_encodings: (M, D) encodings of examples, finite.

        Raises:
            ValueError: wrong shape, values that are not finite, or a number of
                examples other than `memory_size`.
        """
        memory = check_array(
            "memory_encodings",
            memory_encodings,
            ("M", "D"),
            {"D": self._width} if self.built else {},
            dtype=self.compute_dtype,
        )
        if not self.built:
            self.build((None, memory.shape[-1]))
        self._check_finite(memory)
        if self.memory_size is None:
            self._make_memory(len(memory))
        if len(memory) != self.memory_size:
            raise ValueError(
                "`memory_encodings` must have `memory_size` examples, since "
                "compiled functions of this layer read a memory of that size: "
                f"create a layer with `memory_size={len(memory)}`, and copy "
                "the `trainable_weights` to it. Received: "
                f"{len(memory)} examples, "
                f"memory_size={self.memory_size}"
            )
        self._fill(memory)

    def _check_finite(self, memory):
        _check_not_empty(memory)
        if not bool(ops.all(ops.isfinite(memory))):
            raise ValueError(
                "`memory_encodings` must be finite, since each output may read "
                "each example. Received: NaN or infinite values"
            )

    def _fill(self, memory):
        if self.memory_keys is not None:
            self.memory_keys.assign(self._keys(memory))
        self.memory_values.assign(memory)

    # The paper's equations.

    def _weigh(self, queries, keys, mask):
        """ "Content weights" w: sparsemax of the similarities.

        Returns:
            (B, M) weights and None; with `top_k` the weights (B, K) of the
            nearest examples, and their indices.
        """
        indices = None
        if self.top_k is not None:
            nearest, indices = nearest_examples(
                queries, keys, self.top_k, self.similarity, mask
            )
            keys = _take(keys, indices, shared=len(keys.shape) == 2)
            if mask is not None:  # fewer than `top_k` may be unmasked
                mask = ops.not_equal(nearest, -np.inf)
        similarity = compare(queries, keys, self.similarity, mask)
        if mask is None:
            return sparsemax(similarity), indices
        # An input whose examples are all masked reads zeros.
        any_counts = ops.any(mask, axis=-1, keepdims=True)
        weights = sparsemax(ops.where(any_counts, similarity, 0.0))
        return ops.where(any_counts, weights, 0.0), indices

    def _keys(self, encodings):
        """The vectors to compare: projected by `head`; unit for the cosine."""
        keys = encodings
        if self._project is not None:
            keys = self._project(keys)
        keys = self._wide(keys)
        return _unit(keys) if self.similarity == "cosine" else keys

    def _classified(self, encodings, read):
        """g([e; v]), or g(v) of `BaselineMemory`."""
        dense, rest = self._first_dense()
        sees_encodings = self._parts == 2
        if dense is None:
            parts = [encodings, read] if sees_encodings else [read]
            return self._classify(ops.concatenate(parts, axis=-1))
        kernel = ops.cast(dense.kernel, self.compute_dtype)
        if sees_encodings:
            hidden = _product_of_both(encodings, read, kernel)
        else:
            hidden = ops.matmul(read, kernel)
        if dense.use_bias:
            hidden = hidden + ops.cast(dense.bias, self.compute_dtype)
        hidden = dense.activation(hidden)
        for layer in rest:
            hidden = layer(hidden)
        return hidden

    def _first_dense(self):
        """The classifier's first layer if it is a plain `Dense`, else None, and
        the remaining layers."""
        layers = [self._classify]
        if type(self._classify) is keras.Sequential:
            layers = self._classify.layers
        first = layers[0]
        is_plain = (
            type(first) is keras.layers.Dense
            and first.compute_dtype == self.compute_dtype
            and first.quantization_mode is None
            and first.activity_regularizer is None
        )
        return (first, layers[1:]) if is_plain else (None, layers)

    @property
    def _wide_dtype(self):
        """The dtype of addressing: squares overflow in 16 bits."""
        return at_least_float32(self.compute_dtype)

    def _wide(self, x):
        return ops.cast(x, self._wide_dtype)

    # Keras hooks.

    def _check_readable(self, memory, training):
        if memory is not None:
            _check_not_empty(memory)
            return
        if self.memory_values is None:
            raise ValueError(
                "The layer must have a memory to read: call it with "
                "[encodings, memory_encodings], or create it with "
                "`memory_size` and call `set_memory`. Received: "
                "encodings only"
            )
        if training:
            raise ValueError(
                "Training must not use the fixed memory, whose encodings do "
                "not follow the encoder: call the layer with "
                "[encodings, memory_encodings]. "
                "Received: training=True and no memory_encodings"
            )

    def get_build_config(self) -> Config | None:
        return {"input_shape": (None, self._width)} if self.built else None

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, int]:
        return (first_shape(input_shape)[0], self.units)

    def compute_output_spec(
        self,
        encodings: Array,
        memory_encodings: Array | None = None,
        memory_mask: Array | None = None,
        return_weights: bool = False,
        training: bool | None = None,
    ) -> Any:
        if isinstance(encodings, (list, tuple)):
            encodings, memory_encodings = encodings
        self._check_readable(memory_encodings, training)
        batch = encodings.shape[0]
        outputs = keras.KerasTensor((batch, self.units), self._output_dtype)
        if not return_weights:
            return outputs
        memory = memory_encodings
        size = (self.memory_values if memory is None else memory).shape[-2]
        if self.top_k is not None and size is not None:
            size = min(self.top_k, size)
        weights = keras.KerasTensor((batch, size), self.compute_dtype)
        if self.top_k is None:
            return outputs, weights
        return outputs, weights, keras.KerasTensor((batch, size), "int32")

    def get_config(self) -> Config:
        names = list(inspect.signature(_MemoryWrap.__init__).parameters)[1:-1]
        return {**super().get_config(), **config_with_layers(self, names)}

    @classmethod
    def from_config(
        cls, config: Config, custom_objects: Config | None = None
    ) -> Self:
        return cls(**layers_from_config(config, custom_objects))


@keras.saving.register_keras_serializable(package="keras_memory")
class MemoryWrapLayer(_MemoryWrap):
    """Classifies encodings together with the examples nearest to them.

    Source: La Rosa, Capobianco & Nardi 2021 (arXiv 2106.01440), section 3.
    Departure: for the cosine, the paper's code adds 1e-6 to squared lengths,
    so vectors of length 0.01 and less count as longer than they are. Here
    1e-6 is added only from a length of 1/4 on; below, the addend falls with
    the fourth power of the length, so the cosine is right to 2e-5 at all
    lengths (`test_cosine_does_not_depend_on_scale`), and 0 for zeros. The
    README of the paper's code describes a linear `head` by default; the code
    and the paper's results have none. Here it is `head="dense"`.

    Squared distances are sums of squared differences, so no example, far or
    masked, affects the rounding of another one. A memory of more than 131,072
    components (M D) that all inputs share is compared by inner products about
    the median of 63 examples instead: the error of a distance is then the
    rounding error of the squared lengths about that median. Distances of the
    `top_k` nearest examples are sums of squared differences in any case.

    Equations:
        w = sparsemax(-distance(e, M)), content weights -> `_weigh`
        v = w M, memory vector -> `_read`
        o = g([e; v]), output -> `_classified`

    Sparsemax gives most examples a weight of exactly 0. These do not affect
    the output; the others explain it (`keras_memory.explanations`).

    Memory: either each call brings a memory, to which gradients flow, so that
    encoder and memory are trained together; or `set_memory` fixes one for
    inference, which is saved and exported with the layer.

    Masking and dtype: `memory_mask` leaves examples out, even if they are NaN;
    an input with no examples left reads zeros. Distances, weights and the sum
    of examples are computed in float32 under 16-bit policies.

    Args:
        units: int, width of the output, such as the number of classes.
        head: one projection of encodings to both queries and keys: a layer,
            `"dense"` for a `Dense` layer of the encodings' width, or None
            (default) for none. The values that are read are not projected.
        classifier: a layer that maps (B, 2 D) to (B, units); None (default)
            for the paper's, `Dense(4 D, "relu")` and `Dense(units)`, whose
            outputs are logits.
        similarity: `"cosine"` (default), `"dot"`, the inner product, or
            `"l2"`, minus the squared Euclidean distance.
        top_k: int, at least 1, number of nearest examples to read, for large
            memories; None (default) for all. The result equals that of all
            examples if the smallest of the `top_k` weights is 0.
        memory_size: int, number of examples in the memory that `set_memory`
            fixes; None (default) until then. If given, the memory is zeros
            until `set_memory` or loaded weights fill it.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        encodings: (B, D); or a list `[encodings, memory_encodings]`.
        memory_encodings: (M, D), or (B, M, D), a memory for each input; None
            for the fixed memory.
        memory_mask: (M,) or (B, M) bool, False for examples that are left out;
            None for all.
        return_weights: bool, whether to return the weights too.
        training: bool. The fixed memory is for inference only.

    Returns:
        (B, units). With `return_weights` also the weights (B, M), at least 0
        and with sum 1 up to rounding; with `top_k` the weights (B, K) and the
        int32 indices (B, K) of those examples, K the smaller one of `top_k`
        and M.

    Raises:
        ValueError: an argument out of range; shapes that do not fit; no
            memory; a fixed memory in training.

    Example:

    >>> layer = keras_memory.MemoryWrapLayer(10)
    >>> encodings, memory = np.ones((2, 16)), np.ones((5, 16))
    >>> logits, weights = layer([encodings, memory], return_weights=True)
    >>> logits.shape, weights.shape
    (TensorShape([2, 10]), TensorShape([2, 5]))
    >>> layer.set_memory(memory)
    >>> layer(encodings).shape
    TensorShape([2, 10])

    References:
        B. La Rosa, R. Capobianco, D. Nardi, 2021, "Memory Wrap: a
        Data-Efficient and Interpretable Extension to Image Classification
        Models", https://arxiv.org/abs/2106.01440
    """

    _parts = 2


@keras.saving.register_keras_serializable(package="keras_memory")
class BaselineMemory(_MemoryWrap):
    """Classifies encodings only by the examples nearest to them.

    Source: La Rosa, Capobianco & Nardi 2021 (arXiv 2106.01440), section 4, the
    baseline that uses only the memory: o = g(v).

    As `MemoryWrapLayer`, except that the classifier maps (B, D) to (B, units);
    the paper's is `Dense(2 D, "relu")` and `Dense(units)`.

    Example:

    >>> layer = keras_memory.BaselineMemory(10, similarity="l2")
    >>> layer([np.ones((2, 16)), np.ones((5, 16))]).shape
    TensorShape([2, 10])
    """

    _parts = 1


def _grad_product_of_both(upstream, encodings, read, kernel):
    """The gradient of [e; v] as (W dy^T)^T, on a CPU two or three times faster
    than dy W^T."""
    grad_both = ops.matmul(kernel, ops.transpose(upstream))
    # Transposed at once, XLA would rewrite the product to dy W^T.
    parts = ops.split(grad_both, 2, axis=0)
    features = ops.concatenate([encodings, read], axis=-1)
    return [
        *map(ops.transpose, parts),
        ops.matmul(ops.transpose(features), upstream),
    ]


@custom_gradient(_grad_product_of_both)
def _product_of_both(encodings, read, kernel):
    """[e; v] W."""
    return ops.matmul(ops.concatenate([encodings, read], axis=-1), kernel)


def _check_not_empty(memory):
    if memory.shape[-2] == 0:
        raise ValueError(
            "`memory_encodings` must have at least one example. "
            f"Received: shape {tuple(memory.shape)}"
        )


def _counted(memory, mask):
    """Finds the examples that may enter products: a masked NaN must not, since
    0 times NaN is NaN.

    Returns:
        (M,) or (B, M) bool, examples that may enter products; and (B, 1) bool,
        inputs whose outputs must be set to NaN because one of their unmasked
        examples is not finite, or None if they become NaN anyway.
    """
    if len(mask.shape) == 1 or len(memory.shape) == 3:
        return mask, None
    finite = ops.all(ops.isfinite(memory), axis=-1)
    lost = ops.any(mask & ~finite, axis=-1, keepdims=True)
    return ops.any(mask, axis=0) & finite, lost


def _zero_unless(counts, memory):
    return ops.where(counts[..., None], memory, ops.zeros_like(memory))


def _unit(vectors):
    """Normalizes (..., D) vectors, up to the epsilon; zeros stay zeros.

    Vectors are first scaled to a largest component of 1, since squares of very
    large or small components overflow or underflow.
    """
    largest = ops.max(ops.abs(vectors), axis=-1, keepdims=True, initial=0.0)
    tiny = np.finfo(ops.dtype(vectors)).tiny
    largest = ops.stop_gradient(ops.where(largest < tiny, 1.0, largest))
    vectors = vectors / largest
    squares = ops.sum(vectors * vectors, axis=-1, keepdims=True)
    length = ops.sqrt(ops.where(squares > 0, squares, 1.0))
    share = ops.minimum(largest, LARGEST) / FULL_LENGTH * length
    share = ops.minimum(share, 1.0 / ops.maximum(share, 1.0))
    epsilon = NORM_EPSILON / FULL_LENGTH**2 * share * share
    return vectors / (length * ops.sqrt(1.0 + epsilon))


def _read(weights, values, indices):
    """ "Memory vector" v: the weighted sum of the values, (B, V)."""
    if indices is not None:
        values = _take(values, indices, shared=len(values.shape) == 2)
    if len(values.shape) == 2:
        return ops.matmul(weights, values)
    return ops.matmul(weights[:, None], values)[:, 0]


def _take(values, indices, shared):
    """Takes (B, K) indices of (B, M, ...), or of (M, ...) if `shared`."""
    if shared:
        return ops.take(values, indices, axis=0)
    axes = [None] * (len(values.shape) - 2)
    return ops.take_along_axis(values, indices[(..., *axes)], axis=1)


def split_pair(inputs, names, memory=None):
    """Checks that a list is a pair of inputs and their memory.

    Args:
        inputs: list.
        names: pair of str, names of both, for the error.
        memory: a memory passed beside the list, which is an error; or None.
    """
    if len(inputs) != 2 or memory is not None:
        raise ValueError(
            f"Inputs must be one array, or a pair ({', '.join(names)}). "
            f"Received: a list of {len(inputs)}"
            f"{'' if memory is None else f' and {names[1]}'}"
        )
    return inputs


def first_shape(shape):
    """The encodings' shape, from theirs or from a list with the memory's."""
    if isinstance(shape, dict):
        raise ValueError(
            "Inputs must be a tensor, or a list of a tensor and the memory. "
            f"Received: a dict of {sorted(shape)}"
        )
    first = shape[0]
    return shape if first is None or isinstance(first, int) else first
