"""A map through time: one step for each."""

import itertools
import math

import keras
from keras import ops
from keras.src import backend

from keras_memory.spatial.maps import ESMMap


def over_time(step, given, state, all_steps):
    """Runs a step for each time.

    Args:
        step: function of what is given at a time, and the map before, to the
            map that is shown and the one after.
        given: structure of tensors (B, T, ...).
        state: `ESMMap` before the first.
        all_steps: bool, whether all that is shown is wanted, or the last.

    Returns:
        `ESMMap` (B, T, ...) of what is shown, T 1 for the last, and the one
        after it.
    """
    flat = keras.tree.flatten(given)
    if flat[0].shape[1] == 1:
        at_once = keras.tree.map_structure(lambda part: part[:, 0], given)
        shown, state = step(at_once, state)
        return ESMMap(*(part[:, None] for part in shown)), state
    # Keras's loop takes one tensor, on all backends.
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
