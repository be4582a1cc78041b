"""Draws what a layer or a model does with its inputs, in one call."""

import keras
import numpy as np
from keras import ops

from keras_memory import recurrent
from keras_memory.esm import ESMLayer
from keras_memory.inspection import explanations
from keras_memory.memory_wrap_classifier import MemoryWrapClassifier
from keras_memory.recurrent import tracing


def plot(layer, x, **options):
    """Draws what a layer or a model of this library does with inputs.

    Args:
        layer: a recurrent layer such as `NTMLayer`, or a model with some: its
            sequence, gates, heads and memory; a `MemoryWrapClassifier`: the
            examples behind its answers; an `ESMLayer`: the last map.
        x: what it takes.
        **options: of `visualization.plot_task`, such as `row` or `targets`, of
            `explanations.picture`, or of `visualization.plot_sphere`.

    Returns:
        `visualization.Figure`, which a notebook shows.

    Raises:
        TypeError: another layer, or a model without memory.

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
        shown = [ops.convert_to_numpy(part)[0] for part in layer(x)[:2]]
        last = [part[-1] if part.ndim == 4 else part for part in shown]
        return visualization.plot_sphere(*last, **options)
    given = {}
    if isinstance(layer, recurrent.MemoryRNN):
        trace = recurrent.trace(layer, x)
    else:
        outputs, traces = recurrent.trace_model(layer, x)
        if not traces:
            raise TypeError(
                "`layer` must be a layer of keras_memory, or a model with one. "
                f"Received: {layer!r}"
            )
        trace = tracing.joined(traces)
        outputs = keras.tree.map_structure(ops.convert_to_numpy, outputs)
        if np.ndim(outputs) == 3:
            given["outputs"] = outputs
    if not isinstance(x, (dict, list, tuple)) and np.ndim(x) == 3:
        given["inputs"] = ops.convert_to_numpy(x)
    return visualization.plot_task(trace, **{**given, **options})
