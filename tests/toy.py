"""A user's own memory on the public contract: two blocks a step."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

import keras_memory
from keras_memory.recurrent.interface import StateSpec


class ToyState(NamedTuple):
    reads: Any
    total: Any
    controller: Any = ()


class ToyAccess:
    """Adds the interface to a running total and reads it: linear, so that a
    test can follow it by hand."""

    def __init__(self, width=3):
        self.interface_size = self.read_size = width
        self.initial_state = ToyState(
            reads=StateSpec((1, width)), total=StateSpec((width,), "learned")
        )

    def step(self, interface, state):
        total = state.total + interface
        state = state._replace(reads=total[:, None], total=total)
        return state, {"added": interface}


@keras.saving.register_keras_serializable(package="tests")
class ToyCell(keras_memory.MemoryCell):
    """Two blocks, on one memory or on one each."""

    def __init__(self, units, share_memory=False, **kwargs):
        first = ToyAccess()
        second = first if share_memory else ToyAccess()
        super().__init__(units, accesses=[first, second], **kwargs)
        self.share_memory = share_memory


@keras.saving.register_keras_serializable(package="tests")
class ToyLayer(keras_memory.MemoryRNN, cell=ToyCell):
    """`ToyCell` over sequences."""


def feed_forward(units):
    return keras.Sequential(
        [
            keras.layers.Dense(units + 2, activation="tanh"),
            keras.layers.Dense(units),
        ]
    )


@keras.saving.register_keras_serializable(package="tests")
class PlainCell(keras.layers.Layer):
    """The least that Keras asks of an RNN cell: no `output_size`, no
    `get_initial_state`, an int for `state_size`, a tensor for the state."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.state_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units))

    def call(self, inputs, states):
        new = ops.tanh(ops.matmul(inputs, self.kernel) + states[0])
        return new, [new]

    def get_config(self):
        return {**super().get_config(), "units": self.units}
