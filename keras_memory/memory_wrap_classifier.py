"""A classifier with a Memory Wrap layer: training, memories, labels."""

import contextlib
import warnings
from typing import Any
from typing import Self
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import config_with_layers
from keras_memory.arguments import layers_from_config
from keras_memory.checks import NO_LABEL
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_closed
from keras_memory.checks import check_labels
from keras_memory.checks import check_process
from keras_memory.checks import check_seed
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.memory_wrap import BaselineMemory
from keras_memory.memory_wrap import MemoryWrapLayer
from keras_memory.memory_wrap import first_shape
from keras_memory.memory_wrap import split_pair
from keras_memory.retrieval.batches import MemoryBatches
from keras_memory.retrieval.batches import with_memories

NOT_FILLED = -2  # of a memory's place, until it is filled


def without_gradients():
    """A context in which PyTorch keeps nothing for gradients."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@keras.saving.register_keras_serializable(package="keras_memory")
class MemoryWrapClassifier(Arguments, keras.Model):
    """An encoder with a `MemoryWrapLayer` behind it, and memories for it.

    Source: La Rosa, Capobianco & Nardi 2021 (arXiv 2106.01440). `fit` draws a
    fresh memory of the training data at each step, and encodes it beside the
    batch. Afterwards `predict` and `evaluate` draw memories likewise, or look
    at the one that `set_memory` fixes, which is encoded once.

    `train_on_batch`, `test_on_batch`, `predict_on_batch` and a call of the
    model draw nothing: they look at the fixed memory, or at the one that comes
    with the inputs.

    State: the weights `memory_values`, the encodings of a fixed memory, of
    which `memory_keys` are the directions, and `memory_labels` (M,) int32, -1
    where not known, -2 until `set_memory` or loaded weights fill them. They
    are saved and exported with the model; training data and the memory's
    inputs are not.

    Args:
        encoder: a layer or model that makes (B, D) of the inputs, one array
            (B, ...).
        units: int, number of classes.
        memory_size: int, how many examples are drawn; the paper's 100 by
            default.
        baseline: bool, whether the layer is `BaselineMemory`.
        head, classifier, similarity, top_k: see `MemoryWrapLayer`.
        fixed_memory_size: int, set by `set_memory`; a model that is made with
            it has place for a memory, which loaded weights fill.
        seed: int of what is drawn; None takes one from NumPy's, which
            `keras.utils.set_random_seed` sets.
        **kwargs: as of `keras.Model`.

    Call arguments:
        inputs: what the encoder takes, (B, ...), for the fixed memory; or a
            tuple `(inputs, memory_inputs)`, the second (M, ...).
        return_weights, training: see `MemoryWrapLayer`.

    Returns:
        As of `MemoryWrapLayer`.

    Raises:
        ValueError: an argument out of its range, an encoder that does not make
            one vector of each input, or no memory.

    Example:

    >>> x, y = np.random.rand(60, 8).astype("float32"), np.arange(60) % 3
    >>> encoder = keras.layers.Dense(16, "relu")
    >>> model = keras_memory.MemoryWrapClassifier(encoder, 3, memory_size=20)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss, metrics=["accuracy"])
    >>> history = model.fit(x, y, verbose=0)
    >>> model.predict(x, draws=5, verbose=0).shape
    (60, 3)
    >>> model.set_memory(x, y)  # all of them
    >>> why = keras_memory.explanations.explain(model, x[:1])[0]
    >>> int(why.indices[0])  # what it was trained with
    0
    """

    def __init__(
        self,
        encoder: keras.layers.Layer,
        units: int,
        memory_size: int = 100,
        baseline: bool = False,
        head: str | keras.layers.Layer | None = None,
        classifier: keras.layers.Layer | None = None,
        similarity: str = "cosine",
        top_k: int | None = None,
        fixed_memory_size: int | None = None,
        seed: int | None = None,
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        if not isinstance(encoder, keras.layers.Layer):
            raise ValueError(
                "`encoder` must be a Keras layer or model that makes one "
                f"vector of each input. Received: encoder={encoder!r}"
            )
        self.encoder = encoder
        self.memory_size = check_size("memory_size", memory_size)
        if fixed_memory_size is not None:
            alternatives = ", or None where none is fixed"
            check_size(
                "fixed_memory_size",
                fixed_memory_size,
                alternatives=alternatives,
            )
        self.baseline = check_bool("baseline", baseline)
        self.memory_layer = (BaselineMemory if baseline else MemoryWrapLayer)(
            units,
            head=head,
            classifier=classifier,
            similarity=similarity,
            top_k=top_k,
            memory_size=(
                memory_size if fixed_memory_size is None else fixed_memory_size
            ),
            dtype=self.dtype_policy,
            name="memory",
        )
        # The layer always has place for a memory, the one that is fixed or
        # one that is drawn; None here says that none is fixed.
        self.fixed_memory_size = fixed_memory_size
        self.memory_labels: Array | None = None
        self.memory_inputs: Array | None = None
        self.seed = check_seed("seed", seed)
        start = np.random.randint(2**31) if seed is None else seed
        # Who looks at a model between its steps does not change them.
        self._of_steps, self._of_others = (
            np.random.default_rng([start, number]) for number in range(2)
        )
        self._examples = None  # that memories are drawn from, and labels
        self._holds_draw = self._warned = False

    def build(self, input_shape: Any) -> None:
        self._input_shape = (None, *first_shape(input_shape)[1:])
        encoded = self.encoder(keras.KerasTensor(self._input_shape))
        if len(encoded.shape) != 2:
            raise ValueError(
                "`encoder` must make one vector of each input, (B, D). "
                f"Received: one that makes {tuple(encoded.shape)} of "
                f"{self._input_shape}"
            )
        self.memory_layer.build(encoded.shape)
        self._make_labels()
        self.built = True

    def _make_labels(self):
        was_locked = self._tracker.locked
        self._tracker.unlock()  # a built model takes no weights otherwise
        if self.memory_labels is not None:
            self._untrack_variable(self.memory_labels)
        self.memory_labels = self.add_weight(
            (self.memory_layer.memory_size,),
            initializer=keras.initializers.Constant(NOT_FILLED),
            dtype="int32",
            trainable=False,
            name="memory_labels",
        )
        if was_locked:
            self._tracker.lock()

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, (list, tuple)):
            names = "inputs", "memory_inputs"
            inputs = tuple(map(_inputs, names, split_pair(inputs)))
        else:
            inputs = _inputs("inputs", inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(
        self,
        inputs: Any,
        return_weights: bool = False,
        training: bool | None = None,
    ) -> Any:
        if isinstance(inputs, (list, tuple)):
            inputs, memory = split_pair(inputs)
            encoded = self.encoder(inputs), self.encoder(memory)
            return self.memory_layer(
                list(encoded), return_weights=return_weights, training=training
            )
        if self.fixed_memory_size is None and not self._holds_draw:
            raise ValueError(
                "There must be a memory to look at: call `set_memory`, or "
                "call the model with [inputs, memory_inputs]; `predict` and "
                "`evaluate` draw one after `fit`. Received: inputs only"
            )
        return self.memory_layer(
            self.encoder(inputs),
            return_weights=return_weights,
            training=training,
        )

    def compute_output_spec(
        self,
        inputs: Any,
        return_weights: bool = False,
        training: bool | None = None,
    ) -> Any:
        encoded = keras.tree.map_structure(self.encoder, inputs)
        return self.memory_layer.compute_output_spec(
            encoded, return_weights=return_weights, training=training
        )

    def encode(self, inputs: Array, batch_size: int = 128) -> Array:
        """Encodings, in batches.

        Args:
            inputs: array (any number, ...), what the encoder takes.
            batch_size: int, how many are encoded at a time.

        Returns:
            Array (the same number, D).
        """
        check_size("batch_size", batch_size)
        inputs = _inputs("inputs", inputs)
        starts = range(0, max(len(inputs), 1), batch_size)
        with without_gradients():
            encodings = [
                self.encoder(inputs[start : start + batch_size], training=False)
                for start in starts
            ]
            return ops.concatenate(encodings, axis=0)

    def set_memory(
        self, x: Array, y: Array | None = None, batch_size: int = 128
    ) -> None:
        """Fixes the memory: these examples are encoded once, and looked at by
        all calls without a memory until the next `fit`.

        The encodings are weights of the model: they are saved and exported
        with it. The inputs are not: `memory_inputs` has a copy in this process.
        Call this again after training in another way than by `fit`. A model or
        function that was traced around this one must be traced anew where the
        number of examples changes: until then, on TensorFlow, it raises an
        error, or answers NaN under XLA, which has no errors; a function of
        `jax.jit` keeps the weights and the memory that it was traced with.

        Args:
            x: (M, ...) inputs; M may be another number than `memory_size`.
            y: (M,) int labels, or (M, units) one-hot, or None.
            batch_size: int, how many are encoded at a time.

        Raises:
            ValueError: there are no inputs; labels of another number, or of
                no class; an encoding is not finite.
        """
        x, labels = self._examples_of(x, y)
        if not self.built:
            self.build(x.shape)
        encodings = self.encode(x, batch_size)
        width = self.memory_layer._width
        if encodings.shape[-1] != width:
            raise ValueError(
                f"`x` must be inputs like those before, {self._input_shape}, "
                f"of which `encoder` makes (M, {width}). Received: shape "
                f"{x.shape}, of which it makes {tuple(encodings.shape)}"
            )
        self.memory_layer._check_finite(encodings)
        self._put(encodings, labels)
        self.memory_inputs = x.copy()
        self.fixed_memory_size = len(x)

    def _examples_of(self, x, y):
        """Inputs, and int labels or None, as arrays of one length."""
        x = np.asarray(_inputs("x", x))
        if not len(x):
            raise ValueError(
                "Examples for the memory must be an array (any number, ...), "
                f"of one at least. Received: shape {x.shape}"
            )
        if y is None:
            return x, None
        return x, check_labels(y, len(x), self.memory_layer.units)

    def _put(self, encodings, labels):
        self._make_place(len(encodings))
        with without_gradients():
            self.memory_layer._fill(
                ops.cast(encodings, self.memory_layer.compute_dtype)
            )
        if labels is None:
            labels = np.full(len(encodings), NO_LABEL)
        self.memory_labels.assign(labels)

    def _make_place(self, size):
        if size == self.memory_layer.memory_size:
            return
        self.memory_layer._make_memory(size)
        self._make_labels()
        # Compiled functions look at the memory before.
        self.predict_function = self.test_function = None

    def check_memory(self) -> None:
        """Raises ValueError where a memory is fixed that nothing has filled."""
        if self.fixed_memory_size is None:
            return
        if self.built:
            labels = ops.convert_to_numpy(self.memory_labels)
            if (labels != NOT_FILLED).all():
                return
        raise ValueError(
            "The fixed memory must be filled before it is looked at: call "
            "`set_memory`, or load weights. Received: "
            f"fixed_memory_size={self.fixed_memory_size}, and nothing in it"
        )

    def draw(self) -> tuple[Array, Array | None]:
        """Draws a memory set of the training data, without replacement.

        Returns:
            (memory_size, ...) inputs, and (memory_size,) int labels or None.

        Raises:
            ValueError: there are none: the model has not been trained in this
                process.
        """
        if self._examples is None:
            raise ValueError(
                "There must be examples to draw a memory from, which `fit` "
                "brings and a saved model does not keep: call `set_memory`. "
                "Received: no training data in this process"
            )
        return self._draw(self._of_others)

    def _draw(self, rng):
        x, labels = self._examples
        rows = rng.choice(len(x), self.memory_size, replace=False)
        return x[rows], None if labels is None else labels[rows]

    @contextlib.contextmanager
    def _drawn(self, x):
        """Holds a memory that is drawn, unless one is fixed, or comes with the
        inputs, as it must where there is nothing to draw from."""
        self.check_memory()
        may_bring_it = self._examples is None and not hasattr(x, "shape")
        if self.fixed_memory_size is not None or may_bring_it:
            yield
            return
        inputs, labels = self.draw()
        self._put(self.encode(inputs), labels)
        self._holds_draw = True
        try:
            yield
        finally:
            self._holds_draw = False

    def fit(
        self,
        x: Any = None,
        y: Array | None = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Array | None = None,
        *,
        memory_data: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains with a fresh memory at each step, drawn of the training data
        without replacement, as the paper does. A fixed memory is forgotten.

        Args:
            x: array (any number, ...) of inputs; or a `tf.data.Dataset` of
                batches `(x, y)` or `(x, y, sample_weight)`, with `memory_data`.
            y: array of targets.
            batch_size: int, 32 by default.
            epochs, verbose, callbacks, validation_split, validation_data,
                shuffle, class_weight, sample_weight: as of `keras.Model.fit`.
                Validation looks at one memory an epoch.
            memory_data: inputs that memories are drawn from, or a pair of
                inputs and int labels; None for `x` and `y`.
            **kwargs: as of `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: fewer examples than `memory_size`, or inputs of another
                kind.
        """
        is_dataset = not hasattr(x, "shape")
        if is_dataset and not type(x).__module__.startswith("tensorflow."):
            raise ValueError(
                "`x` must be an array or a `tf.data.Dataset`, so that a memory "
                f"can be put beside each batch. Received: {type(x).__name__}"
            )
        if not is_dataset and y is None:
            raise ValueError(
                "`y` must be given with arrays, what is to be learned. "
                "Received: y=None"
            )
        of_arrays = {
            "y": y,
            "batch_size": batch_size,
            "validation_split": validation_split or None,
            "sample_weight": sample_weight,
        }
        given = [name for name, array in of_arrays.items() if array is not None]
        if is_dataset and given:
            raise ValueError(
                "A `tf.data.Dataset` brings targets, weights and batches "
                f"itself. Received: {given} beside it"
            )
        if is_dataset and memory_data is None:
            raise ValueError(
                "`memory_data` must be given with a `tf.data.Dataset`, of "
                "which no memories can be drawn. Received: memory_data=None"
            )
        if isinstance(validation_data, (list, tuple)) and validation_data:
            _one_input(validation_data[0])
        if not is_dataset:
            sizes = {}
            x = check_array("x", x, ("N", None, ...), sizes, result="given")
            x, y = np.asarray(x), np.asarray(_beside_x("y", y, sizes))
            if sample_weight is not None:
                sample_weight = np.asarray(
                    _beside_x("sample_weight", sample_weight, sizes)
                )
            if validation_split and validation_data is None:
                check_closed("validation_split", validation_split, 0.0, 1.0)
                first = int(len(x) * (1.0 - validation_split))
                parts = [x, y]
                if sample_weight is not None:
                    parts.append(sample_weight)
                validation_data = tuple(part[first:] for part in parts)
                x, y, *rest = (part[:first] for part in parts)
                sample_weight = rest[0] if rest else None
        if memory_data is None:
            memory_data = x, y
        elif not isinstance(memory_data, (tuple, list)):
            memory_data = (memory_data, None)
        if len(memory_data) != 2:
            raise ValueError(
                "`memory_data` must be an array of inputs, or a pair of inputs "
                f"and labels. Received: {len(memory_data)} parts"
            )
        examples = self._examples_of(*memory_data)
        if not is_dataset and x.shape[1:] != examples[0].shape[1:]:
            raise ValueError(
                "`memory_data` must have inputs like those of `x`. Received: "
                f"shape {examples[0].shape}, and x of shape {x.shape}"
            )
        if len(examples[0]) < self.memory_size:
            raise ValueError(
                "There must be at least `memory_size` examples to draw a "
                f"memory from. Received: memory_size={self.memory_size}, "
                f"{len(examples[0])} examples"
            )
        self._examples = examples
        if not self.built:
            self.build(examples[0].shape)
        self.fixed_memory_size = self.memory_inputs = None
        self._make_place(self.memory_size)

        def draw():
            return self._draw(self._of_steps)[0]

        if is_dataset:
            steps = with_memories(x, draw)
        else:
            arrays = [x, y]
            if sample_weight is not None:
                arrays.append(sample_weight)
            order = self._of_steps if shuffle else None
            steps = MemoryBatches(arrays, batch_size or 32, order, draw)
            kwargs.setdefault("validation_batch_size", batch_size)
        return super().fit(
            steps,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_data=validation_data,
            shuffle=False,
            class_weight=class_weight,
            **kwargs,
        )

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`, with the fixed memory, or else with one
        that is drawn of the training data. Of batches `((x, memory), y)` of a
        `tf.data.Dataset` each brings its own."""
        x = _one_input(x)
        if hasattr(x, "shape") and not len(x):
            raise ValueError(
                "`x` must have one input at least, or there is no mean. "
                f"Received: shape {tuple(x.shape)}"
            )
        with self._drawn(x):
            return super().evaluate(x, *args, **kwargs)

    def predict(
        self, x: Any, *args: Any, draws: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """As `keras.Model.predict`, with the fixed memory, or else with some
        that are drawn of the training data.

        Args:
            x: inputs.
            *args: as of `keras.Model.predict`.
            draws: int, the number of memories over whose outputs the mean is
                taken; None for 1, or for the fixed memory.
            **kwargs: as of `keras.Model.predict`.

        Returns:
            Array (any number, units).

        Raises:
            ValueError: there is no memory and nothing to draw one from, `x` is
                no array of numbers, or `draws` is given where the memory is
                fixed or `x` can be read only once.

        Warns:
            UserWarning: once, where the answers are those of a memory that is
                drawn, and another call draws another one.
        """
        x = _one_input(x)
        if draws is not None:
            check_size("draws", draws, alternatives=", or None")
            if self.fixed_memory_size is not None:
                raise ValueError(
                    "`draws` must be None where the memory is fixed, which "
                    f"gives one answer. Received: draws={draws}"
                )
            if hasattr(x, "__next__"):
                raise ValueError(
                    "`draws` must be None where inputs come once, as each "
                    "draw looks at all of them. "
                    f"Received: draws={draws}, x={type(x).__name__}"
                )
        outputs = []
        for _ in range(draws or 1):
            with self._drawn(x):
                if self._holds_draw and not draws:
                    self._warn_of_draws()
                if hasattr(x, "shape") and not len(x):  # which Keras refuses
                    dtype = self.memory_layer._output_dtype
                    empty = ops.zeros((0, self.memory_layer.units), dtype)
                    outputs.append(ops.convert_to_numpy(empty))
                else:
                    outputs.append(super().predict(x, *args, **kwargs))
        return np.mean(outputs, axis=0) if draws else outputs[0]

    def _warn_of_draws(self):
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            "No memory is fixed, so that each call of `predict` draws another "
            "one and answers otherwise: call `set_memory` for one answer, or "
            "say `draws=` for the mean over several memories. "
            f"`seed={self.seed}` fixes only the order of the draws",
            stacklevel=3,
        )

    def load_own_variables(self, store: Any) -> None:
        if "0" in store.keys():  # labels, maybe of a memory of another size
            size = len(store["0"])
            self._make_place(size)
            if self.fixed_memory_size is not None:
                self.fixed_memory_size = size
        super().load_own_variables(store)
        self.memory_inputs = None

    def get_build_config(self) -> Config | None:
        return {"input_shape": self._input_shape} if self.built else None

    def get_config(self) -> Config:
        layer = self.memory_layer
        return {
            **super().get_config(),
            **config_with_layers(
                layer, ("units", "head", "classifier", "similarity", "top_k")
            ),
            **config_with_layers(
                self,
                (
                    "encoder",
                    "memory_size",
                    "baseline",
                    "fixed_memory_size",
                    "seed",
                ),
            ),
        }

    @classmethod
    def from_config(
        cls, config: Config, custom_objects: Config | None = None
    ) -> Self:
        return cls(**layers_from_config(config, custom_objects))


def _one_input(x):
    """An array of numbers, or what brings batches, as it came."""
    if isinstance(x, (list, tuple)):
        raise ValueError(
            "Inputs must be one array, as a memory beside them would be cut "
            "into batches like them: fix it by `set_memory`, call the model "
            "itself, or use a `tf.data.Dataset` of `((x, memory), y)`. "
            f"Received: a {type(x).__name__} of {len(x)}"
        )
    is_one = hasattr(x, "shape") or isinstance(x, (str, bytes))
    has_many = hasattr(x, "__iter__") or hasattr(x, "__getitem__")
    return _inputs("x", x) if is_one or not has_many else x


def _inputs(name, x):
    """An array or tensor (any number, ...) of numbers, as it came."""
    check_process("MemoryWrapClassifier")
    return check_array(name, x, ("N", None, ...), result="given")


def _beside_x(name, array, sizes):
    """An array with a row for each of `x`, as it came."""
    return check_array(name, array, ("N", ...), sizes, "any", result="given")
