"""Loops a step of a map over time."""

import itertools
import math

import keras
from keras import ops
from keras.src import backend

from keras_memory.spatial.maps import ESMMap


def over_time(step, given, state, all_steps):
    """Runs a step for each time.

    Args:
        step: function of the inputs of one time step and the map before it,
            which returns the map to output and the map after the step.
        given: structure of tensors (B, T, ...), the inputs.
        state: `ESMMap` before the first step.
        all_steps: bool, whether to return the outputs of all steps, or only of
            the last.

    Returns:
        `ESMMap` (B, T, ...) of outputs, with T = 1 for only the last, and the
        `ESMMap` after the last step.
    """
    flat = keras.tree.flatten(given)
    if flat[0].shape[1] == 1:
        at_once = keras.tree.map_structure(lambda part: part[:, 0], given)
        shown, state = step(at_once, state)
        return ESMMap(*(part[:, None] for part in shown)), state
    # Keras's loop takes a single tensor on all backends, so pack the inputs.
    lead = ops.shape(flat[0])[:2]
    shapes = [ops.shape(part)[2:] for part in flat]
    sizes = [math.prod(shape) for shape in shapes]
    ends = list(itertools.accumulate(sizes, initial=0))
    channels = state.mean.shape[-1]
    packed = ops.concatenate(
        [
            ops.cast(ops.reshape(part, (*lead, size)), state.mean.dtype)
            for part, size in zip(flat, sizes)
        ],
        axis=-1,
    )

    def apart(map_):
        return ESMMap(map_[..., :channels], map_[..., channels:])

    def packed_step(packed, states):
        parts = [
            ops.reshape(packed[:, begin:end], (ops.shape(packed)[0], *shape))
            for begin, end, shape in zip(ends, ends[1:], shapes)
        ]
        parts = [
            ops.cast(part_at_step, part.dtype)
            for part_at_step, part in zip(parts, flat)
        ]
        parts = keras.tree.pack_sequence_as(given, parts)
        shown, after = step(parts, apart(states[0]))
        return ops.concatenate(shown, -1), [ops.concatenate(after, -1)]

    _, shown, states = backend.rnn(
        packed_step,
        packed,
        [ops.concatenate(state, axis=-1)],
        input_length=packed.shape[1],
        return_all_outputs=all_steps,
    )
    return apart(shown), apart(states[0])
