"""Explains the answers of a Memory Wrap by the examples that it used.

Source: La Rosa, Capobianco & Nardi 2021 (arXiv 2106.01440). An example in
memory with the input's predicted class is an explanation by example; an
example with another class is a counterfactual. Examples with weight 0 did not
contribute to the answer.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_memory.checks import NO_LABEL
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_closed
from keras_memory.checks import check_labels
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.memory_wrap_classifier import MemoryWrapClassifier
from keras_memory.memory_wrap_classifier import without_gradients

if TYPE_CHECKING:
    from keras_memory.visualization import Figure
else:
    Figure = Any  # for `typing.get_type_hints`, without an import


class Explanation(NamedTuple):
    """The examples that decided one answer, the largest weight first.

    Fields:
        prediction: int, the class that the model predicts for the input.
        indices: (n,) int, indices of the memory's examples with a weight
            above 0.
        weights: (n,) in (0, 1], sum 1.
        labels: (n,) int, labels of the examples as given, -1 if not known.
        predicted: (n,) int, the classes that the model predicts for the
            examples when its memory has other examples; None if their inputs
            are not known, as in a model that was saved.
        inputs: (n, ...), the examples; None if not known.
        input: (...), the explained input; None if not known.

    A notebook shows it as a picture, if the inputs are images in [0, 1].
    """

    prediction: int
    indices: np.ndarray
    weights: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray | None
    inputs: np.ndarray | None
    input: np.ndarray | None = None

    @property
    def classes(self) -> np.ndarray:
        """(n,) int: the predicted classes, or else the labels."""
        return self.labels if self.predicted is None else self.predicted

    @property
    def is_example(self) -> np.ndarray:
        """(n,) bool: True for examples of the input's predicted class, False
        for counterfactuals."""
        return self.classes == self.prediction

    def __repr__(self) -> str:
        return (
            f"Explanation(prediction={self.prediction}, "
            f"{self.is_example.sum()} examples, "
            f"{(~self.is_example).sum()} counterfactuals)"
        )

    def _repr_png_(self):
        return Explanations([self])._repr_png_()


class Explanations(list[Explanation]):
    """A list of `Explanation`, which a notebook shows as a picture."""

    def _repr_png_(self):
        from keras_memory import visualization

        try:
            return visualization.plot_explanations(self)._repr_png_()
        except ValueError:  # no images, or not known: the notebook shows text
            return None


def explain(
    model: MemoryWrapClassifier, x: Array, batch_size: int = 128
) -> Explanations:
    """Finds the examples behind each answer.

    A model without a fixed memory draws a memory from its training data, and a
    second one with which it classifies the examples of the first, as the
    paper's code does. With a fixed memory, each example is classified with the
    other examples of the memory.

    Args:
        model: `MemoryWrapClassifier`, with a fixed memory or after `fit`.
        x: (B, ...) inputs.
        batch_size: int, number of inputs to process at a time.

    Returns:
        `Explanations`, a list of B `Explanation`.

    Raises:
        TypeError: `model` is no `MemoryWrapClassifier`.
        ValueError: there are no inputs, or there is no memory.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(8, 3)).astype("float32"), np.arange(8) % 2
    >>> model = keras_memory.MemoryWrapClassifier(keras.layers.Dense(5), 2)
    >>> model.set_memory(x, y)
    >>> why = keras_memory.explanations.explain(model, x[:1])[0]
    >>> bool(why.weights[0] == why.weights.max()), len(why.inputs) < 8
    (True, True)
    """
    x = _inputs_of(model, x, batch_size)
    memory = _Memory(model)
    explanations = Explanations()
    for begin in range(0, len(x), batch_size):
        explanations += memory.explain(x[begin : begin + batch_size])
    return explanations


def explanation_accuracy(
    model: MemoryWrapClassifier, x: Array, y: Array, batch_size: int = 500
) -> dict[str, float | None]:
    """Share of inputs whose top example has the predicted class.

    The top example is the one with the largest weight.

    Source: `paper/explanation_accuracy.py` of the paper's code. For each input
    the model classifies the top example with a second memory; this class is
    compared with the prediction for the input. Each batch of inputs has two
    memories of its own, unless the memory is fixed.

    Args:
        model: `MemoryWrapClassifier`, after `fit`, or with a fixed memory that
            was set in this process.
        x: (B, ...) inputs.
        y: (B,) int labels, or (B, units) one-hot.
        batch_size: int, number of inputs that share a memory. The paper's code
            takes 500.

    Returns:
        Dict of shares in [0, 1]: `explanation_accuracy`, inputs whose top
        example has the predicted class; `accuracy`, inputs whose prediction
        is right; `accuracy_by_example` and `accuracy_by_counterfactual`, the
        accuracy of the inputs whose top example has the predicted class, and
        of the other inputs; None if there are no such inputs.

    Raises:
        TypeError: `model` is no `MemoryWrapClassifier`.
        ValueError: there are no inputs; labels have another number or are no
            classes; there is no memory whose examples could be classified.
    """
    x = _inputs_of(model, x, batch_size)
    y = check_labels(y, len(x), model.memory_layer.units)
    agrees, right = [], []
    for begin in range(0, len(x), batch_size):
        batch = x[begin : begin + batch_size]
        memory = _Memory(model)
        if memory.inputs is None:
            raise ValueError(
                "`model` must have the inputs of its memory, which are "
                "classified; a loaded model has only their encodings. Call "
                "`set_memory` again. Received: a memory of encodings"
            )
        logits, weights, indices = memory.look(batch)
        predictions = logits.argmax(axis=1)
        top = np.take_along_axis(
            indices, weights.argmax(axis=1)[:, None], axis=1
        )[:, 0]
        agrees.append(memory.predicted(top) == predictions)
        right.append(predictions == y[begin : begin + batch_size])
    agrees, right = np.concatenate(agrees), np.concatenate(right)

    def share(of):
        return float(of.mean()) if len(of) else None

    return {
        "explanation_accuracy": share(agrees),
        "accuracy": share(right),
        "accuracy_by_example": share(right[agrees]),
        "accuracy_by_counterfactual": share(right[~agrees]),
    }


def integrated_gradients(
    model: MemoryWrapClassifier,
    x: Array,
    memory_inputs: Array,
    target: int | None = None,
    baseline: Array = 0.0,
    steps: int = 40,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Attributes a class's output to parts of an input and of its examples.

    Source: Sundararajan, Taly & Yan 2017 (arXiv 1703.01365), eq. 1, by the
    midpoint rule, over input and examples together, as in the paper's figures.

    Args:
        model: `MemoryWrapClassifier`.
        x: (...) one input.
        memory_inputs: (n, ...) the examples, such as `Explanation.inputs`,
            which leaves out only examples of weight 0.
        target: int, the class; None for the predicted class.
        baseline: an input without information: a number, or an array like `x`.
            The paper's code takes 1.0 for normalized images.
        steps: int, number of points on the path from the baseline.
        batch_size: int, approximate number of images to encode at a time.

    Returns:
        Arrays like `x` and like `memory_inputs`. The sum of all their values
        is the class's output minus its output for the baselines, up to the
        error of the midpoint rule.

    Raises:
        TypeError: `model` is no `MemoryWrapClassifier`.
        ValueError: `x` is not one input, a size is out of its range, or the
            encoder has no gradient, such as an encoder of integers (on JAX
            its gradient is 0).
    """
    check_size("steps", steps)
    dtype = keras.config.floatx()
    x = _inputs_of(model, x, batch_size, axes=(None, ...)).astype(dtype)
    examples = _inputs_of(model, memory_inputs, batch_size, "memory_inputs")
    examples = examples.astype(dtype)
    if x.shape != examples.shape[1:]:
        raise ValueError(
            "`x` must be one input, like each of `memory_inputs`. "
            f"Received: x of shape {x.shape}, memory_inputs of shape "
            f"{examples.shape}"
        )
    if target is None:
        outputs = model((ops.convert_to_tensor(x[None]), examples))
        target = int(ops.argmax(outputs[0]))
    check_closed("target", target, 0, model.memory_layer.units - 1)
    baseline = check_array("baseline", baseline, result="given")
    baseline = ops.convert_to_numpy(baseline).astype(dtype)
    try:
        baseline = np.broadcast_to(baseline, x.shape)
    except ValueError:
        raise ValueError(
            "`baseline` must be a number, or an array like `x`. Received: "
            f"shape {baseline.shape}, x of shape {x.shape}"
        ) from None

    def path(end, shares):  # (some of the steps, *end.shape)
        along = shares.reshape(-1, *[1] * end.ndim)
        return along * end + (1 - along) * baseline

    def output(inputs, memory):
        encoded = model.encoder(ops.reshape(memory, (-1, *x.shape)))
        memory = ops.reshape(encoded, (len(inputs), len(examples), -1))
        outputs = model.memory_layer([model.encoder(inputs), memory])
        return ops.sum(outputs[:, target])

    gradient = _gradient_of(output)
    at_a_time = max(1, batch_size // (1 + len(examples)))
    sums = [np.zeros_like(x), np.zeros_like(examples)]
    for begin in range(0, steps, at_a_time):
        numbers = np.arange(begin, min(begin + at_a_time, steps))
        shares = ((numbers + 0.5) / steps).astype(dtype)
        slopes = gradient(path(x, shares), path(examples, shares))
        for of_one, slope in zip(sums, slopes):
            of_one += slope.sum(axis=0)
    of_x, of_examples = (of_one / steps for of_one in sums)
    return (x - baseline) * of_x, (examples - baseline) * of_examples


def picture(
    model: MemoryWrapClassifier,
    x: Array,
    class_names: Sequence[str] | None = None,
    max_examples: int = 6,
    attribution: bool = True,
    baseline: Array = 0.0,
    to_image: Callable[[Array], Array] | None = None,
    explanations: Sequence[Explanation] | None = None,
    labels: Array | None = None,
) -> "Figure":
    """Draws inputs beside the examples that decided the answers.

    Each input has one row of images: the input, then the examples used, the
    largest weight first. Texts tell weight and class, and the true class if it
    differs. Counterfactuals have a frame of another color. The heat map below
    an image shows which of its parts support the answer.

    Args:
        model: `MemoryWrapClassifier`, whose memory's inputs are known.
        x: (B, ...) inputs, images (H, W), (H, W, 1) or (H, W, 3).
        class_names: sequence of texts, one for each class; None for numbers.
        max_examples: int, the largest number of examples in a row.
        attribution: bool, whether to draw heat maps, by integrated gradients
            over all examples used.
        baseline: as in `integrated_gradients`.
        to_image: function from one input to an image in [0, 1], such as the
            inverse of a normalization; None if inputs are in [0, 1].
        explanations: result of `explain` for `x`; None calls it.
        labels: (B,) int or (B, units) one-hot, the true classes of `x`, which
            mark wrong answers; None if they are not known.

    Returns:
        `visualization.Figure`.

    Raises:
        TypeError: `model` is no `MemoryWrapClassifier`.
        ValueError: `x` has no images, the memory has only encodings, or class
            names or labels have another number.
    """
    from keras_memory import visualization

    check_model(model, class_names)
    check_size("max_examples", max_examples)
    check_bool("attribution", attribution)
    x = _inputs_of(model, x, 1, axes=("B", "H", "W", ...))
    if labels is not None:
        units = model.memory_layer.units
        labels = check_labels(labels, len(x), units, "labels")
    explanations = explain(model, x) if explanations is None else explanations
    is_list = isinstance(explanations, (list, tuple))
    if not (
        is_list
        and len(explanations) == len(x)
        and all(isinstance(why, Explanation) for why in explanations)
    ):
        raise ValueError(
            f"`explanations` must be a list of {len(x)} `Explanation`, one for "
            f"each input. Received: {explanations!r}"
        )
    attributions = None
    if attribution and all(why.inputs is not None for why in explanations):
        attributions = [
            integrated_gradients(
                model, image, why.inputs, why.prediction, baseline
            )
            for image, why in zip(x, explanations)
        ]
    if to_image is not None:
        explanations = [
            why
            if why.inputs is None
            else why._replace(
                inputs=[to_image(example) for example in why.inputs]
            )
            for why in explanations
        ]
        x = [to_image(image) for image in x]
    return visualization.plot_explanations(
        explanations, x, labels, class_names, max_examples, attributions
    )


class _Memory:
    """The memory that explains answers: the fixed one, or two drawn ones.

    The model classifies the examples of the first with the second.
    """

    def __init__(self, model):
        self.model = model
        self.drawn = None
        if model.fixed_memory_size is not None:
            model.check_memory()
            labels = ops.convert_to_numpy(model.memory_labels)
            self.inputs = model.memory_inputs
        else:
            self.inputs, labels = model.draw()
            second, _ = model.draw()
            self.drawn = model.encode(self.inputs), model.encode(second)
        if labels is None:
            labels = np.full(len(self.inputs), NO_LABEL)
        self.labels = labels

    def look(self, x):
        """Outputs (B, units), weights and indices (B, n), as arrays."""
        encodings = self.model.encode(x, len(x))
        inputs = encodings
        if self.drawn is not None:
            inputs = [encodings, self.drawn[0]]
        with without_gradients():
            results = self.model.memory_layer(inputs, return_weights=True)
        outputs, weights, *indices = (
            ops.convert_to_numpy(result).astype("float64") for result in results
        )
        if not np.isfinite(outputs).all():
            raise ValueError(
                "The outputs must be finite to be explained. Received: NaN or "
                "infinite outputs, because of such inputs or a model that has "
                "diverged"
            )
        if indices:
            return outputs, weights, indices[0].astype(int)
        every = np.broadcast_to(np.arange(weights.shape[1]), weights.shape)
        return outputs, weights, every

    def predicted(self, rows):
        """Predicted classes of examples of the memory, each without itself if
        the memory is set. None without inputs."""
        if self.inputs is None:
            return None
        different, back = np.unique(rows, return_inverse=True)
        layer = self.model.memory_layer
        classes = []
        for begin in range(0, len(different), 128):
            indices = different[begin : begin + 128]
            with without_gradients():
                if self.drawn is not None:
                    encodings = ops.take(self.drawn[0], indices, axis=0)
                    outputs = layer([encodings, self.drawn[1]])
                else:
                    memory_mask = (
                        np.arange(len(self.inputs)) != indices[:, None]
                    )
                    encodings = self.model.encode(self.inputs[indices])
                    outputs = layer(encodings, memory_mask=memory_mask)
            classes.append(ops.convert_to_numpy(ops.argmax(outputs, axis=1)))
        return np.concatenate(classes)[back.ravel()]

    def explain(self, x):
        outputs, weights, indices = self.look(x)
        order = np.argsort(-weights, axis=1, kind="stable")
        weights = np.take_along_axis(weights, order, axis=1)
        indices = np.take_along_axis(indices, order, axis=1)
        used = weights > 0
        predicted = self.predicted(indices[used])
        ends = np.cumsum(used.sum(axis=1))[:-1]
        of_row = [None] * len(x)
        if predicted is not None:
            of_row = np.split(predicted, ends)
        return [
            Explanation(
                int(outputs[row].argmax()),
                indices[row][used[row]],
                weights[row][used[row]],
                self.labels[indices[row][used[row]]],
                of_row[row],
                None
                if self.inputs is None
                else self.inputs[indices[row][used[row]]],
                x[row],
            )
            for row in range(len(x))
        ]


def check_model(model: Any, class_names: Sequence[str] | None = None) -> None:
    """Raises TypeError unless `model` is a `MemoryWrapClassifier`, and
    ValueError unless it has classes, with as many names."""
    if not isinstance(model, MemoryWrapClassifier):
        raise TypeError(
            "`model` must be a `MemoryWrapClassifier`, which knows its encoder "
            f"and its memory. Received: model={model!r}"
        )
    units = model.memory_layer.units
    if units < 2:
        raise ValueError(
            "Explanations need a model with an output for each class, at least "
            f"two. Received: units={units}"
        )
    if class_names is None:
        return
    count = len(class_names) if hasattr(class_names, "__len__") else "no"
    if count != units:
        raise ValueError(
            "`class_names` must have a name for each class of the model. "
            f"Received: {count} names, units={units}"
        )


def _inputs_of(model, x, batch_size, name="x", axes=("B", None, ...)):
    check_model(model)
    check_size("batch_size", batch_size)
    x = ops.convert_to_numpy(check_array(name, x, axes, result="given"))
    if not len(x):
        raise ValueError(
            f"`{name}` must be an array (B, ...), with B at least 1. "
            f"Received: shape {x.shape}"
        )
    return x


def _gradient_of(function):
    """The gradient, as a function, of a scalar function of two arrays."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def differentiate(*arrays):
            arrays = [tf.convert_to_tensor(array) for array in arrays]
            with tf.GradientTape() as tape:
                tape.watch(arrays)
                result = function(*arrays)
            return tape.gradient(result, arrays)

    elif backend == "jax":
        import jax

        differentiate = jax.jit(jax.grad(function, (0, 1)))
    elif backend == "torch":
        import torch

        def differentiate(*arrays):
            arrays = [
                ops.convert_to_tensor(array).requires_grad_()
                for array in arrays
            ]
            return torch.autograd.grad(
                function(*arrays), arrays, allow_unused=True
            )

    else:
        raise RuntimeError(
            "Integrated gradients need a backend with gradients: TensorFlow, "
            f"JAX or PyTorch. Received: KERAS_BACKEND={backend}"
        )

    def gradient(*arrays):
        gradients = differentiate(*arrays)
        if any(array is None for array in gradients):
            raise ValueError(
                "Integrated gradients need an encoder whose output has a "
                "gradient to its inputs, which an encoder of integers lacks. "
                "Received: an encoder without gradient"
            )
        return [ops.convert_to_numpy(array) for array in gradients]

    return gradient
