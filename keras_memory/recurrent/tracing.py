"""Records the inner values of a recurrent memory, step by step."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask
from keras.src.backend.common.symbolic_scope import get_symbolic_scope

from keras_memory.addressing.slots import select
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.hints import Array
from keras_memory.recurrent.backend import scan
from keras_memory.recurrent.layer import MemoryRNN
from keras_memory.recurrent.layer import recorder


class Trace(dict[str, np.ndarray]):
    """The result of `trace`: a dict of arrays that a notebook shows as a
    picture. `keras.tree` treats it as one leaf: pass it `dict(trace)`."""

    def __repr__(self) -> str:
        shapes = [
            f"{name}: {np.shape(values)}" for name, values in self.items()
        ]
        return f"Trace({', '.join(shapes)})"

    def _repr_png_(self):
        from keras_memory import visualization

        try:
            return visualization.plot_task(self)._repr_png_()
        except ValueError:  # nothing to draw: the notebook shows text
            return None


def joined(traces):
    """Joins the traces of layers, from `trace_model`, into one. If there are
    several, each name starts with the layer's name."""
    several = len(traces) > 1
    return Trace(
        (f"{layer}/{name}" if several else name, ops.convert_to_numpy(values))
        for layer, trace in traces.items()
        for name, values in trace.items()
    )


def trace(
    layer: MemoryRNN,
    inputs: Array,
    initial_state: Sequence[Array] | None = None,
    mask: Array | None = None,
    training: bool = False,
    use_memory: bool = True,
) -> Trace:
    """Records what happens inside a recurrent layer of this library.

    Runs the layer's cell over the sequences once more.

    Args:
        layer: a `MemoryRNN`, such as `NTMLayer`.
        inputs: (B, T, D) array.
        initial_state: list of (B, size), or None for the layer's own.
        mask: (B, T) bool or None; a masked step repeats the step before.
        training: bool.
        use_memory: bool, as in the layer's call.

    Returns:
        `Trace`, a dict of NumPy arrays (B, T, ...) that a notebook shows as a
        picture; steps are in the order in which the layer takes them. It has
        `"output"`, every field of the state after the step except the
        controller's states (for the NTM `"reads"`, `"memory"`,
        `"read_weighting"`, `"write_weighting"`), `"controller_output"`, and
        the values of the architecture (keys, gates, ...). If a cell has
        several blocks, names start with `"block0/"`, `"block1/"`, ...

        A SAM, which has states per slot, is traced in the slots that the
        sequence touches, or in all if it may touch as many: `"slots"` (B, T, P)
        has them in ascending order, then -1. Weightings and fields per slot
        have an axis for these P slots. To find them, the cell runs once more.

    Raises:
        TypeError: `layer` is not a recurrent layer of this library.
        ValueError: the inputs or states do not fit the layer.
    """
    if not isinstance(layer, MemoryRNN):
        raise TypeError(
            "`layer` must be a recurrent layer of keras_memory, such as "
            "`NTMLayer`; for a whole model use `trace_model`. "
            f"Received: {layer!r}"
        )
    check_bool("use_memory", use_memory)
    layer.cell.check_not_on_host("A trace")
    mask = get_keras_mask(inputs) if mask is None else mask
    inputs = check_array("inputs", inputs)
    layer._check_sequences(inputs.shape, "inputs")
    if not layer.built:
        layer.build(tuple(inputs.shape))
    if initial_state is None and layer.stateful:
        initial_state, _ = layer._present_states()
    inputs, initial_state, mask = layer._check_arguments(
        inputs, initial_state, mask
    )
    if initial_state is None:
        initial_state = layer.cell.get_initial_state(*inputs.shape[:2])
    inside = _inside(
        layer,
        inputs,
        initial_state,
        mask,
        training,
        use_memory,
        trims=True,
    )
    return Trace(keras.tree.map_structure(ops.convert_to_numpy, inside))


def trace_model(
    model: keras.Model, inputs: Any, training: bool = False
) -> tuple[Any, dict[str, dict[str, Array]]]:
    """Records what happens inside each recurrent memory of a model.

    The states of stateful layers advance, as in any call of the model.

    Args:
        model: a `keras.Model`, also a subclassed one.
        inputs: the model's inputs.
        training: bool.

    Returns:
        Tuple of the model's outputs and a dict from layer name, in the order
        of the calls, to a plain dict of tensors with the entries of `trace`,
        so the call can be compiled. If a layer is called again, its key ends in
        a number, such as `"ntm_layer_2"`.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the inputs do not fit the model.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model; for a layer use `trace`. "
            f"Received: {model!r}"
        )
    outputs, inside = trace_layers(model, inputs, training)
    return outputs, {name: parts for name, (_, parts) in inside.items()}


def trace_layers(model, inputs, training=False):
    """Like `trace_model`, but each value is a pair (layer, trace)."""
    calls, scope = [], get_symbolic_scope()

    def record(*call):
        call[0].cell.check_not_on_host("A trace")
        # Leaves out the calls with symbolic tensors that build a model.
        if get_symbolic_scope() is scope:
            calls.append(call)

    token = recorder.set(record)
    try:
        outputs = model(inputs, training=training)
    finally:
        recorder.reset(token)
    traces = {}
    for layer, *arguments in calls:
        name, number = layer.name, 1
        while name in traces:
            number += 1
            name = f"{layer.name}_{number}"
        traces[name] = layer, _inside(layer, *arguments)
    return outputs, traces


def _inside(
    layer, inputs, initial_state, mask, training, use_memory, trims=False
):
    """The trace of a layer, as a dict of tensors (B, T, ...).

    `trims`: bool, whether the number of slots shown may depend on values.
    """
    cell = layer.cell
    states = tuple(cell.layout.cast(initial_state, cell.compute_dtype))
    sequences = [inputs]
    if mask is not None:
        padding = ops.zeros_like(inputs)
        sequences = [select(mask, inputs, padding), mask]
    if layer.go_backwards:
        sequences = [ops.flip(sequence, axis=1) for sequence in sequences]
    sequences = [ops.swapaxes(sequence, 0, 1) for sequence in sequences]

    def run(states, at_step):
        features, after, details = cell.step(
            at_step[0], cell.layout.in_range(states), training, use_memory
        )
        after = tuple(cell.layout.flatten(after))
        if mask is not None:
            hold = functools.partial(select, at_step[1])
            after = tuple(map(hold, after, states))
        return features, after, details

    def touched_in(states, at_step):
        _, after, details = run(states, at_step)
        touched = _touched(cell, details)
        if mask is not None:
            touched = keras.tree.map_structure(
                lambda slots: select(at_step[1], slots, -ops.ones_like(slots)),
                touched,
            )
        return after, touched

    def step(before, at_step):
        states, held = before
        features, after, details = run(states, at_step)
        output = cell.project(features, training)
        now = {"output": output, **cell._named(details, slots)}
        if mask is not None:
            hold = functools.partial(select, at_step[1])
            now = keras.tree.map_structure(hold, now, held)
        return (after, now), now

    cell.get_dropout_mask(inputs)
    cell.get_recurrent_dropout_mask(inputs)
    try:
        records = cell.layout.in_range(states)
        features, _, details = cell.step(
            sequences[0][0], records, training, use_memory
        )
        slots = _slots_shown(
            cell, details, touched_in, states, sequences, trims
        )
        shapes = {
            "output": cell.project(features),
            **cell._named(details, slots),
        }
        # Before the first valid step all values are 0, except the state.
        held = keras.tree.map_structure(ops.zeros_like, shapes)
        held.update(cell._named([(records, {})] * len(cell.accesses), slots))
        _, inside = scan(step, (states, held), sequences, _specs(held))
    finally:
        cell.reset_dropout_mask()
        cell.reset_recurrent_dropout_mask()
    inside = {name: ops.swapaxes(inside[name], 0, 1) for name in shapes}
    if mask is not None and layer.zero_output_for_mask:
        output, shown = inside["output"], ops.swapaxes(sequences[1], 0, 1)
        inside["output"] = select(shown, output, ops.zeros_like(output))
    return inside


def _specs(arrays):
    return keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, ops.dtype(x)), arrays
    )


def _touched(cell, details):
    """Dict from each memory with states per slot to the slots that its blocks
    touched in a step, (B, P) int32."""
    touched = {}
    for block, (records, inside) in enumerate(details):
        memory = cell.memory_of_block[block]
        if cell._has_accessed(inside) and hasattr(
            cell.accesses[block], "touched"
        ):
            slots = cell.accesses[block].touched(records[memory], inside)
            touched.setdefault(memory, []).append(slots)
    return {m: ops.concatenate(parts, axis=1) for m, parts in touched.items()}


def _slots_shown(cell, details, touched_in, states, sequences, trims):
    """Dict from each memory with states per slot to the slots that the trace
    shows, (B, P) int32, ascending; -1 for none.

    These are all slots if the steps may touch as many, else those that they
    touch, which a first run over the sequence finds.
    """
    shown, touched = {}, _touched(cell, details)
    steps = sequences[0].shape[0]
    for memory, slots in touched.items():
        number = cell.slots_of(details[-1][0], memory)
        if None not in (number, steps) and steps * slots.shape[1] >= number:
            rows = ops.zeros_like(slots[:, :1])
            shown[memory] = rows + ops.arange(number, dtype="int32")
    if touched.keys() != shown.keys():
        _, touched = scan(touched_in, states, sequences, _specs(touched))
    for memory in touched.keys() - shown.keys():
        slots = ops.swapaxes(touched[memory], 0, 1)
        rows, *sizes = ops.shape(slots)
        slots = _different(ops.reshape(slots, (rows, math.prod(sizes))))
        if trims:
            is_shown = ops.convert_to_numpy(ops.any(slots >= 0, axis=0))
            slots = slots[:, : max(1, int(is_shown.sum()))]
        shown[memory] = slots
    return shown


def _different(slots):
    """The different slots in each row of (B, P), ascending, then -1."""
    none = np.iinfo("int32").max
    slots = ops.sort(ops.where(slots >= 0, slots, none), axis=1)
    is_equal = ops.equal(slots[:, 1:], slots[:, :-1])
    is_equal = ops.pad(is_equal, ((0, 0), (1, 0)))
    slots = ops.sort(ops.where(is_equal, none, slots), axis=1)
    return ops.where(ops.equal(slots, none), -1, slots)
