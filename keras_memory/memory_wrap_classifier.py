"""`MemoryWrapClassifier`: a Keras model that draws memories and trains."""

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

NOT_FILLED = -2  # label of memory entries until they are filled
NAMES = "inputs", "memory_inputs"  # of a call with a memory


def without_gradients():
    """A context in which PyTorch records no gradients."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@keras.saving.register_keras_serializable(package="keras_memory")
class MemoryWrapClassifier(Arguments, keras.Model):
    """An encoder followed by a `MemoryWrapLayer`, and memories for the layer.

    Source: La Rosa, Capobianco & Nardi 2021 (arXiv 2106.01440). `fit` draws a
    new memory from the training data at each step, and encodes it along with
    the batch. Afterwards `predict` and `evaluate` draw memories likewise, or
    read the memory that `set_memory` fixed, which is encoded only once.

    `train_on_batch`, `test_on_batch`, `predict_on_batch` and a call of the
    model draw no memory: they read the fixed memory, or the one given with the
    inputs.

    State: the weights `memory_values`, encodings of a fixed memory,
    `memory_keys`, the normalized encodings, and `memory_labels` (M,) int32, -1
    if unknown, -2 until `set_memory` or loaded weights fill them. They are
    saved and exported with the model; training data and the memory's inputs
    are not.

    Args:
        encoder: a layer or model that maps inputs, one array (B, ...), to
            encodings (B, D).
        units: int, number of classes.
        memory_size: int, number of examples in a drawn memory; 100 by default,
            as in the paper.
        baseline: bool, whether the layer is `BaselineMemory`.
        head, classifier, similarity, top_k: see `MemoryWrapLayer`.
        fixed_memory_size: int, number of examples in the fixed memory, set by
            `set_memory`. A model created with it has weights for a memory,
            which loaded weights fill.
        seed: int, for the draws; None takes a seed from NumPy's generator,
            which `keras.utils.set_random_seed` seeds.
        **kwargs: see `keras.Model`.

    Call arguments:
        inputs: (B, ...), inputs of the encoder, for the fixed memory; or a
            tuple `(inputs, memory_inputs)`, the second (M, ...).
        return_weights, training: see `MemoryWrapLayer`.

    Returns:
        See `MemoryWrapLayer`.

    Raises:
        ValueError: an argument out of range, an encoder that does not return
            one vector for each input, or no memory.

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
                "`encoder` must be a Keras layer or model that returns one "
                f"vector for each input. Received: encoder={encoder!r}"
            )
        self.encoder = encoder
        self.memory_size = check_size("memory_size", memory_size)
        if fixed_memory_size is not None:
            alternatives = ", or None without a fixed memory"
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
        # The layer always has weights for a memory, fixed or drawn; None means
        # that no memory is fixed.
        self.fixed_memory_size = fixed_memory_size
        self.memory_labels: Array | None = None
        self.memory_inputs: Array | None = None
        self.seed = check_seed("seed", seed)
        start = np.random.randint(2**31) if seed is None else seed
        # Two generators, so that draws between steps do not change training.
        self._of_steps, self._of_others = (
            np.random.default_rng([start, number]) for number in range(2)
        )
        self._examples = None  # inputs and labels to draw memories from
        self._holds_draw = self._warned = False

    def build(self, input_shape: Any) -> None:
        self._input_shape = (None, *first_shape(input_shape)[1:])
        encoded = self.encoder(keras.KerasTensor(self._input_shape))
        if len(encoded.shape) != 2:
            raise ValueError(
                "`encoder` must return one vector for each input, (B, D). "
                f"Received: an encoder that returns {tuple(encoded.shape)} for "
                f"{self._input_shape}"
            )
        self.memory_layer.build(encoded.shape)
        self._make_labels()
        self.built = True

    def _make_labels(self):
        was_locked = self._tracker.locked
        self._tracker.unlock()  # a built model accepts no new weights
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
            inputs = tuple(map(_inputs, NAMES, split_pair(inputs, NAMES)))
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
            inputs, memory = split_pair(inputs, NAMES)
            encoded = self.encoder(inputs), self.encoder(memory)
            return self.memory_layer(
                list(encoded), return_weights=return_weights, training=training
            )
        if self.fixed_memory_size is None and not self._holds_draw:
            raise ValueError(
                "The model must have a memory to read: call `set_memory`, or "
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
        """Encodes inputs, in batches.

        Args:
            inputs: array (any number, ...), inputs of the encoder.
            batch_size: int, inputs to encode at a time.

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
        """Fixes the memory: encodes these examples once; all calls without a
        memory read them until the next `fit`.

        The encodings are weights of the model, saved and exported with it. The
        inputs are not saved: `memory_inputs` holds a copy in this process. Call
        this again after training other than by `fit`. If the number of examples
        changes, a model or function that was traced around this model must be
        traced again: until then, on TensorFlow, it raises an error, or returns
        NaN under XLA, which has no errors; a `jax.jit` function keeps the
        weights and the memory of its trace.

        Args:
            x: (M, ...) inputs; M may differ from `memory_size`.
            y: (M,) int labels, or (M, units) one-hot, or None.
            batch_size: int, inputs to encode at a time.

        Raises:
            ValueError: no inputs, a wrong number of labels, a label that is
                not a class, or an encoding that is not finite.
        """
        x, labels = self._examples_of(x, y)
        if not self.built:
            self.build(x.shape)
        encodings = self.encode(x, batch_size)
        width = self.memory_layer._width
        if encodings.shape[-1] != width:
            raise ValueError(
                f"`x` must be inputs as the model was built for, of shape "
                f"{self._input_shape}, with encodings (M, {width}). Received: "
                f"shape {x.shape}, with encodings {tuple(encodings.shape)}"
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
                f"with at least one example. Received: shape {x.shape}"
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
        # The compiled functions read the old memory.
        self.predict_function = self.test_function = None

    def check_memory(self) -> None:
        """Raises ValueError if the fixed memory has not been filled."""
        if self.fixed_memory_size is None:
            return
        if self.built:
            labels = ops.convert_to_numpy(self.memory_labels)
            if (labels != NOT_FILLED).all():
                return
        raise ValueError(
            "The fixed memory must be filled before it is read: call "
            "`set_memory`, or load weights. Received: "
            f"fixed_memory_size={self.fixed_memory_size}, and an empty memory"
        )

    def draw(self) -> tuple[Array, Array | None]:
        """Draws a memory from the training data, without replacement.

        Returns:
            (memory_size, ...) inputs, and (memory_size,) int labels or None.

        Raises:
            ValueError: no training data: the model has not been trained by
                `fit` in this process.
        """
        if self._examples is None:
            raise ValueError(
                "There must be training data to draw a memory from: call `fit` "
                "first, or `set_memory`, since a saved model keeps no training "
                "data. Received: no training data in this process"
            )
        return self._draw(self._of_others)

    def _draw(self, rng):
        x, labels = self._examples
        rows = rng.choice(len(x), self.memory_size, replace=False)
        return x[rows], None if labels is None else labels[rows]

    @contextlib.contextmanager
    def _drawn(self, x):
        """A context in which the model has a drawn memory, unless one is fixed.

        Without training data, batches must bring a memory, so none is drawn.
        """
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
        """Trains with a new memory at each step, drawn from the training data
        without replacement, as in the paper. Drops a fixed memory.

        Args:
            x: array (any number, ...) of inputs; or a `tf.data.Dataset` of
                batches `(x, y)` or `(x, y, sample_weight)`, with `memory_data`.
            y: array of targets.
            batch_size: int, 32 by default.
            epochs, verbose, callbacks, validation_split, validation_data,
                shuffle, class_weight, sample_weight: see `keras.Model.fit`.
                Validation uses one memory for each epoch.
            memory_data: inputs to draw memories from, or a pair of inputs and
                int labels; None for `x` and `y`.
            **kwargs: see `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: fewer examples than `memory_size`, or inputs of a wrong
                kind.
        """
        is_dataset = not hasattr(x, "shape")
        if is_dataset and not type(x).__module__.startswith("tensorflow."):
            raise ValueError(
                "`x` must be an array or a `tf.data.Dataset`, so that each "
                f"batch can get a memory. Received: {type(x).__name__}"
            )
        if not is_dataset and y is None:
            raise ValueError(
                "`y`, the targets, must be given if `x` is an array. "
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
                "With a `tf.data.Dataset`, targets, weights and batches must "
                f"come from the dataset. Received: {given} as arguments"
            )
        if is_dataset and memory_data is None:
            raise ValueError(
                "`memory_data` must be given with a `tf.data.Dataset`, since "
                "no memories can be drawn from a dataset. "
                "Received: memory_data=None"
            )
        if isinstance(validation_data, (list, tuple)) and validation_data:
            _one_input(validation_data[0], "validation_data[0]")
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
        drawn from the training data. A `tf.data.Dataset` of batches
        `((x, memory), y)` brings a memory with each batch."""
        x = _one_input(x)
        if hasattr(x, "shape") and not len(x):
            raise ValueError(
                "`x` must have at least one input, to compute a mean loss. "
                f"Received: shape {tuple(x.shape)}"
            )
        with self._drawn(x):
            return super().evaluate(x, *args, **kwargs)

    def predict(
        self, x: Any, *args: Any, draws: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """As `keras.Model.predict`, with the fixed memory, or else with
        memories drawn from the training data.

        Args:
            x: inputs.
            *args: see `keras.Model.predict`.
            draws: int, number of memories to draw; the outputs are averaged
                over them. None for one draw, or for the fixed memory.
            **kwargs: see `keras.Model.predict`.

        Returns:
            Array (any number, units).

        Raises:
            ValueError: no memory and no training data to draw from, `x` is not
                an array of numbers, or `draws` is given although the memory is
                fixed or `x` can be read only once.

        Warns:
            UserWarning: once, if a memory is drawn without `draws`: the next
                call draws another memory and returns other outputs.
        """
        x = _one_input(x)
        if draws is not None:
            check_size("draws", draws, alternatives=", or None")
            if self.fixed_memory_size is not None:
                raise ValueError(
                    "`draws` must be None if the memory is fixed: all draws "
                    f"would be the same. Received: draws={draws}"
                )
            if hasattr(x, "__next__"):
                raise ValueError(
                    "`draws` must be None if `x` can be read only once, since "
                    "each draw reads all inputs. "
                    f"Received: draws={draws}, x={type(x).__name__}"
                )
        outputs = []
        for _ in range(draws or 1):
            with self._drawn(x):
                if self._holds_draw and not draws:
                    self._warn_of_draws()
                if hasattr(x, "shape") and not len(x):  # Keras refuses these
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
            "No memory is fixed, so each call of `predict` draws another "
            "memory and returns other outputs: call `set_memory` to fix one, "
            "or set `draws=` to average over several memories. "
            f"`seed={self.seed}` fixes only the order of the draws",
            stacklevel=3,
        )

    def load_own_variables(self, store: Any) -> None:
        if "0" in store.keys():  # labels; the memory's size may differ
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


def _one_input(x, name="x"):
    """Checks that `x` is one array, or a source of batches; returns it."""
    if isinstance(x, (list, tuple)):
        raise ValueError(
            f"`{name}` must be one array: Keras would split a memory passed "
            "with it into batches. Pass the memory to `set_memory`, call the "
            "model directly, or use a `tf.data.Dataset` of `((x, memory), y)`. "
            f"Received: a {type(x).__name__} of {len(x)}"
        )
    is_one = hasattr(x, "shape") or isinstance(x, (str, bytes))
    has_many = hasattr(x, "__iter__") or hasattr(x, "__getitem__")
    return _inputs(name, x) if is_one or not has_many else x


def _inputs(name, x):
    """Checks an array or tensor (any number, ...) of numbers; returns it."""
    check_process("MemoryWrapClassifier")
    return check_array(name, x, ("N", None, ...), result="given")


def _beside_x(name, array, sizes):
    """Checks an array with one row for each input of `x`; returns it."""
    return check_array(name, array, ("N", ...), sizes, "any", result="given")
