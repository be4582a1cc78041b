"""The time loop of a recurrent memory: which one runs, and the portable one.

The portable loop is Keras's own. It runs on any backend, and the backend
differentiates it. The fast loop, with a custom gradient, is in `fast_loop.py`.
Both give the same results.
"""

import keras
from keras import ops
from keras.src import backend

from keras_memory.addressing.slot_states import SlotState
from keras_memory.addressing.slot_states import with_slots
from keras_memory.addressing.slots import select
from keras_memory.recurrent.fast_loop import run_fast
from keras_memory.recurrent.fast_loop import shape_pass
from keras_memory.recurrent.interface import StateSpec

LOOPS = ("auto", "fast", "portable")


def run(
    cell,
    sequences,
    records,
    mask=None,
    training=False,
    go_backwards=False,
    unroll=False,
    all_outputs=True,
    use_memory=True,
    loop="auto",
    recompute=None,
):
    """Runs a memory cell over time.

    Args:
        cell: a `MemoryCell`.
        sequences: (B, T, D).
        records: the cell's initial state records.
        mask: (B, T) bool or None; False: the row keeps its features and state
            at that step.
        training: bool.
        go_backwards: bool, run from the last step to the first.
        unroll: bool, as in `keras.layers.RNN`.
        all_outputs: bool. True: return the features of every step. False: of
            the last step only.
        use_memory: bool, as in the cell's call.
        loop: one of `LOOPS`; `"auto"` uses the fast loop in training, if the
            cell allows it, and for memories on the host.
        recompute: int, "sqrt" or None, see `MemoryRNN`.

    Returns:
        Features (B, T, F), in the order in which the steps ran, or (B, F) of
        the last step; the final state records; and the loop that ran: "fast",
        or "portable: " and the reason.

    Raises:
        ValueError: loop="fast" is not possible.
        NotImplementedError: on JAX, a step changes variables.
    """
    inputs = [ops.cast(sequences, cell.compute_dtype)]
    states = keras.tree.flatten(records)
    if loop == "auto" and cell.is_on_host:
        loop = "fast"  # calls of the host have no gradient in other loops
    why = _why_portable(loop, training, unroll)
    kinds = cell.layout.specs
    # If the loop itself does not return the last features, a state holds them.
    holds = mask is not None or not (all_outputs or why)
    if holds:
        rows = ops.shape(sequences)[0]
        held = ops.zeros((rows, cell.features_size), dtype=cell.compute_dtype)
        states, kinds = [held, *states], [StateSpec(()), *kinds]
    if mask is not None:
        # Masked inputs must not reach a step: NaN times a gradient of 0 is NaN.
        inputs[0] = select(mask, inputs[0], ops.zeros_like(inputs[0]))
        inputs.append(mask)

    # Saved here: both are reset before the fast loop runs a step again.
    dropout_masks = cell.dropout_masks()
    autocast = getattr(backend.get_autocast_scope(), "dtype", None)

    def step(inputs, states):
        updated = inputs[1] if mask is not None else None
        states = with_slots(states, kinds, updated)
        before = states[1:] if holds else states
        before = keras.tree.pack_sequence_as(records, before)
        with cell.dropping(dropout_masks), backend.AutocastScope(autocast):
            features, after, _ = cell.step(
                inputs[0], before, training, use_memory
            )
        after = keras.tree.flatten(after)
        if holds:
            after = [features, *after]
        after = [kept(old, new, updated) for old, new in zip(states, after)]
        return features if updated is None else after[0], after

    def kept(old, new, updated):
        if isinstance(new, SlotState):  # which does not change masked rows
            return new.array
        return new if updated is None else select(updated, new, old)

    if not why:
        shapes = shape_pass(step, inputs, states, kinds)
        why = shapes.why_not
        if backend.backend() == "jax" and shapes.scope.changed:
            raise NotImplementedError(
                "On JAX a step must not change variables, as `Dropout` and "
                "`BatchNormalization` in a controller do: use "
                "`controller_dropout`, or another backend. Received: "
                f"{why}"
            )
    if loop == "fast" and why:
        raise ValueError(
            f'loop="fast" is not possible for {cell.name!r} here: {why}'
        )
    if why:
        features, states = _portable(
            step, inputs, states, go_backwards, all_outputs, unroll
        )
    else:
        features, states = run_fast(
            step,
            inputs,
            states,
            go_backwards,
            all_outputs,
            recompute,
            shapes,
        )
    if holds and not all_outputs:
        features = states[0]
    states = states[1:] if holds else states
    records = keras.tree.pack_sequence_as(records, list(states))
    return features, records, f"portable: {why}" if why else "fast"


def _why_portable(loop, training, unroll):
    if loop == "portable":
        return 'loop="portable"'
    if backend.backend() not in ("tensorflow", "jax"):
        return f"the fast loop does not run on {backend.backend()}"
    if unroll:
        return "unroll=True"
    if loop == "auto" and not training:
        return "not called with training=True"
    return ""


def _portable(step, inputs, states, go_backwards, all_outputs, unroll):
    """Runs Keras's loop, with the mask as a further input of each step.

    On JAX, Keras's own masking repeats the first state instead of the previous
    output.
    """
    masked = len(inputs) > 1
    if masked:
        mask = ops.cast(inputs[1], inputs[0].dtype)[:, :, None]
        inputs = [ops.concatenate([inputs[0], mask], axis=-1)]

    def step_of_one(inputs, states):
        if masked:
            return step([inputs[:, :-1], inputs[:, -1] > 0], states)
        return step([inputs], states)

    last, features, states = backend.rnn(
        step_of_one,
        inputs[0],
        states,
        go_backwards=go_backwards,
        unroll=unroll,
        input_length=inputs[0].shape[1],
        return_all_outputs=all_outputs,
    )
    return features if all_outputs else last, states
