"""Draws what a layer or a model does with its inputs, in one call."""

from typing import TYPE_CHECKING
from typing import Any

import keras
from keras import ops

from keras_memory import recurrent
from keras_memory.checks import check_array
from keras_memory.checks import check_whole
from keras_memory.esm import ESMLayer
from keras_memory.inspection import explanations
from keras_memory.memory_wrap_classifier import MemoryWrapClassifier
from keras_memory.recurrent import tracing

if TYPE_CHECKING:
    from keras_memory.visualization import Figure
else:
    Figure = Any  # for `typing.get_type_hints`, without an import


def plot(layer: keras.layers.Layer, x: Any, **options: Any) -> "Figure":
    """Draws what a layer or a model of this library does with inputs.

    Args:
        layer: a recurrent layer such as `NTMLayer`, or a model with such
            layers: draws sequence, gates, heads and memory; a
            `MemoryWrapClassifier`: draws the examples behind its answers; an
            `ESMLayer`: draws the last map.
        x: inputs of `layer`. A model's inputs and outputs are drawn if they
            are sequences as long as those of its memory.
        **options: arguments of `visualization.plot_task`, such as `row` or
            `targets`; of `explanations.picture`; or `row` and arguments of
            `visualization.plot_sphere`.

    Time runs in the order of the inputs. If the layer, or each memory of the
    model, goes backwards, time runs in the order of the steps: `x` and
    `inputs` are reversed; `targets`, `outputs` and `mask` are taken in the
    order of the steps, as the layer's outputs are.

    Returns:
        `visualization.Figure`, which a notebook shows.

    Raises:
        TypeError: `layer` is another layer, or a model without memory.
        ValueError: the model's memories take sequences of different lengths.

    Example:

    >>> layer = keras_memory.NTMLayer(3, memory_slots=7, slot_size=5)
    >>> x = np.ones((2, 11, 4), "float32")
    >>> figure = keras_memory.plot(layer, x, row=1)
    >>> figure.savefig("task.svg")  # doctest: +SKIP
    """
    from keras_memory import visualization

    if isinstance(layer, MemoryWrapClassifier):
        return explanations.picture(layer, x, **options)
    if isinstance(layer, ESMLayer):
        maps = [ops.convert_to_numpy(part) for part in layer(x)[:2]]
        row = check_whole("row", options.pop("row", 0), 0, len(maps[0]) - 1)
        last = [part[row, -1] if part.ndim == 5 else part[row] for part in maps]
        options = {
            "depth_prior": layer.depth_prior,
            "variance_prior": layer.variance_limits[1],
            **options,
        }
        return visualization.plot_sphere(*last, **options)
    leaves = keras.tree.flatten(x)
    if all(isinstance(leaf, (int, float)) for leaf in leaves):  # nested lists
        x = check_array("x", x)
    given, traces = {"inputs": x}, {}
    if isinstance(layer, recurrent.MemoryRNN):
        x = check_array("x", x, ("B", "T", "D"), result="given")
        traces = {layer.name: (layer, recurrent.trace(layer, x))}
    elif isinstance(layer, keras.Model):
        given["outputs"], traces = tracing.trace_layers(layer, x)
    shapes = {
        name: tuple(parts["output"].shape[:2])
        for name, (_, parts) in traces.items()
    }
    if not shapes:
        raise TypeError(
            "`layer` must be a recurrent layer of keras_memory, a model with "
            "such layers, an `ESMLayer`, or a `MemoryWrapClassifier`. "
            f"Received: {layer!r}"
        )
    if len({*shapes.values()}) > 1:
        raise ValueError(
            "`layer` must have memories whose sequences are of one length, to "
            "share a time axis: draw each trace of `trace_model` with "
            f"`visualization.plot_task`. Received: {shapes}"
        )
    given = {
        name: ops.convert_to_numpy(values)
        for name, values in given.items()
        if len(getattr(values, "shape", ())) == 3
        and tuple(values.shape[:2]) in shapes.values()
    }
    options = {**given, **options}
    backward = [
        memory_layer.go_backwards for memory_layer, _ in traces.values()
    ]
    if all(backward) and options.get("inputs") is not None:
        axes, inputs = ("B", "T", "channels"), options["inputs"]
        inputs = check_array(
            "inputs", inputs, axes, None, "any", result="numpy"
        )
        options["inputs"] = inputs[:, ::-1]
        titles = options.get("title"), "from the last input to the first"
        options["title"] = ", ".join(filter(None, titles))
    shown = {}
    for name, (memory_layer, parts) in traces.items():
        if memory_layer.go_backwards and not all(backward):
            parts = {n: ops.flip(values, axis=1) for n, values in parts.items()}
            name += " (right to left)"
        shown[name] = parts
    trace = tracing.joined(shown)
    return visualization.plot_task(trace, **options)
