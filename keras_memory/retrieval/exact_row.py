"""Exact search in one row of a host memory, by the backend."""

import numpy as np
from keras import ops

from keras_memory.checks import check_process
from keras_memory.retrieval.ring import QUERIES
from keras_memory.retrieval.ring import RingMemory
from keras_memory.retrieval.ring import RingState


class ExactRow:
    """The index of one row: the backend compares queries with all entries."""

    def __init__(self, keys, similarity):
        self.keys, self.similarity = keys, similarity
        self.size = 0
        self._on_device = None

    def write(self, slots):
        self.size = max(self.size, int(slots.max()) + 1)
        self._on_device = None

    def clear(self):
        self.size = 0
        self._on_device = None

    def wait(self):
        pass

    def search(self, queries, top_k, is_counted=True):
        """(Q, top_k) slots and scores."""
        check_process('KNNMemory(search_method="exact")')
        # Sizes are padded to powers of two, so few shapes are compiled.
        if self._on_device is None:
            slots = min(len(self.keys), power_of_two(self.size, least=1024))
            keys = ops.convert_to_tensor(self.keys[None, :slots])
            none = ops.zeros((1, slots, 0))
            size = ops.convert_to_tensor(np.array([self.size], "int32"))
            self._on_device = RingState(keys, none, size)
        state = self._on_device
        slots = state.keys.shape[1]
        ring = RingMemory(queries.shape[1], slots, 0, self.similarity, "auto")
        padded_top_k = min(slots, power_of_two(top_k))
        parts = []
        for begin in range(0, len(queries), QUERIES):
            block = queries[begin : begin + QUERIES]
            more = min(QUERIES, power_of_two(len(block), least=16)) - len(block)
            padded = np.pad(block, ((0, more), (0, 0)))
            result = ring.search(
                state, ops.convert_to_tensor(padded[None]), padded_top_k
            )
            parts.append(
                [
                    ops.convert_to_numpy(part[0])[: len(block), :top_k]
                    for part in (result.indices, result.scores)
                ]
            )
        return tuple(map(np.concatenate, zip(*parts)))


def power_of_two(number, least=1):
    """The smallest power of two that is at least `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())
