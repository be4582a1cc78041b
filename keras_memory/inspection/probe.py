"""A fixed batch with which a model is traced during training."""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_memory import recurrent
from keras_memory.checks import check_array
from keras_memory.recurrent import tracing


class Seen(NamedTuple):
    """Outputs and traces of a model for a probe, as NumPy arrays.

    Args:
        inputs: inputs of the model.
        targets: targets, or None.
        outputs: outputs of the model.
        mask: (B, T) or None.
        traces: dict from layer name to the result of `trace`.
    """

    inputs: Any
    targets: Any
    outputs: Any
    mask: np.ndarray | None
    traces: dict[str, Any]

    def has_sequences(self) -> bool:
        """True for inputs (B, T, D), targets and outputs (B, T, units)."""
        parts = self.inputs, self.targets, self.outputs
        return (
            all(getattr(part, "ndim", 0) == 3 for part in parts)
            and self.targets.shape == self.outputs.shape
            and self.targets.shape[:2] == self.inputs.shape[:2]
            and (self.mask is None or self.mask.shape == self.inputs.shape[:2])
        )


class Probe:
    """A fixed batch with which models are traced.

    On TensorFlow the first `look` compiles the traced model.

    Args:
        batch: inputs, which are no tuple, or a tuple (inputs, targets) or
            (inputs, targets, mask), such as a `tasks.Batch`.

    Raises:
        ValueError: the tuple has another form, its parts are no arrays of
            numbers, or their batch sizes differ.
    """

    def __init__(self, batch: Any):
        parts = batch if isinstance(batch, tuple) else (batch,)
        if not 1 <= len(parts) <= 3:
            raise ValueError(
                "A probe must be inputs, (inputs, targets) or (inputs, "
                f"targets, mask). Received: {len(parts)} parts"
            )
        sizes = {}

        def arrays(name, structure):
            if structure is None and name != "inputs":
                return None
            return keras.tree.map_structure(
                lambda array: check_numbers(name, array, ("B", ...), sizes),
                structure,
            )

        names = "inputs", "targets", "mask"
        parts = [*map(arrays, names, parts), None, None]
        self.inputs, self.targets, self.mask = parts[:3]
        self._model = self._run = None

    @classmethod
    def of(cls, batch: Any) -> "Probe":
        """The probe of a batch, or the probe itself."""
        return batch if isinstance(batch, cls) else cls(batch)

    def look(self, model: keras.Model) -> Seen:
        """Traces a model on the batch.

        The model's variables, such as states, do not change: assignments of
        the call are discarded, and nothing is copied.

        Returns:
            `Seen`.
        """
        if model is not self._model:
            self._model = model
            self._run = self._compiled(model)
        inputs = keras.tree.map_structure(ops.convert_to_tensor, self.inputs)
        if not model.built:
            with keras.StatelessScope():
                model(inputs)
        seen = self._run(inputs)
        outputs, traces = keras.tree.map_structure(ops.convert_to_numpy, seen)
        return Seen(self.inputs, self.targets, outputs, self.mask, traces)

    def _compiled(self, model):
        def run(inputs):
            with keras.StatelessScope():
                return recurrent.trace_model(model, inputs)

        if keras.backend.backend() != "tensorflow":
            return run
        import tensorflow as tf

        return tf.function(run)


def probe_picture(seen, title, memory=False, **options):
    """Draws the first sequence of a probe.

    Args:
        seen: `Seen`, with targets.
        title: str, the headline.
        memory: bool, whether the memory is drawn.
        **options: arguments of `visualization.plot_task`.

    Returns:
        `visualization.Figure`.

    Raises:
        ValueError: `seen` has no sequences, or no targets.
    """
    if not seen.has_sequences():
        shapes = [keras.tree.map_structure(np.shape, part) for part in seen[:4]]
        raise ValueError(
            "A picture of a probe needs inputs (B, T, D), targets and outputs "
            "(B, T, units), and a mask (B, T) or none. Received: inputs {}, "
            "targets {}, outputs {}, mask {}".format(*shapes)
        )
    from keras_memory import visualization

    return visualization.plot_task(
        tracing.joined(seen.traces),
        seen.inputs,
        seen.targets,
        seen.outputs,
        seen.mask,
        title=title,
        memory=memory,
        **options,
    )


def check_numbers(name, value, axes, sizes=None, kind="any"):
    """Checks an array with `check_array`; returns it as a NumPy array."""
    array = check_array(name, value, axes, sizes, kind, result="given")
    return ops.convert_to_numpy(array)
