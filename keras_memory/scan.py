"""The time loop of a recurrent memory.

`run` is the portable way through time: Keras's own RNN loop, on any backend.
"""

import keras
from keras import ops
from keras.src import backend


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
):
    """Steps a memory cell through time.

    The mask travels as one more input into each step, and a masked step holds
    the features and all states: Keras's own masking takes the first state for
    the previous output on JAX.

    Args:
        cell: a `MemoryCell`.
        sequences: (B, T, D).
        records: the cell's state records at the beginning.
        mask: (B, T) bool or None; False holds a row at that step.
        training: bool.
        go_backwards: bool, from the last step to the first.
        unroll: bool, as in `keras.layers.RNN`.
        all_outputs: bool, features of every step, or of the last only.
        use_memory: bool, as in the cell's call.

    Returns:
        Features (B, T, F), in the order in which the steps were taken, or
        (B, F) of the last step; and the state records at the end.
    """
    states = keras.tree.flatten(records)
    if mask is not None:
        sequences = ops.cast(sequences, cell.compute_dtype)
        mask = ops.cast(mask, cell.compute_dtype)
        mask = mask if len(mask.shape) == 3 else mask[:, :, None]
        sequences = ops.concatenate([sequences, mask], axis=-1)
        held = ops.zeros(
            (ops.shape(sequences)[0], cell.features_size),
            dtype=cell.compute_dtype,
        )
        states = [held, *states]

    def step(inputs, states):
        features, after, _ = cell.step(
            inputs,
            keras.tree.pack_sequence_as(records, list(states)),
            training,
            use_memory,
        )
        return features, keras.tree.flatten(after)

    def masked_step(inputs, states):
        features, after = step(inputs[:, :-1], states[1:])
        keep = inputs[:, -1] > 0
        after = [
            hold(keep, old, new) for old, new in zip(states, [features, *after])
        ]
        return after[0], after

    last, features, states = backend.rnn(
        step if mask is None else masked_step,
        sequences,
        states,
        go_backwards=go_backwards,
        unroll=unroll,
        input_length=sequences.shape[1],
        return_all_outputs=all_outputs,
    )
    if mask is not None:
        states = states[1:]
    records = keras.tree.pack_sequence_as(records, list(states))
    return (features if all_outputs else last), records


def hold(keep, old, new):
    """Takes `new` in the rows where `keep` (B,) is True, else `old`."""
    keep = ops.reshape(keep, (-1,) + (1,) * (len(new.shape) - 1))
    return ops.where(keep, new, old)
