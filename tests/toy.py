"""A custom memory, written with the public interface: two blocks a step."""

import dataclasses
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


@dataclasses.dataclass(frozen=True, eq=False)
class ToyAccess:
    """Adds the interface to a running total and reads the total. It is linear,
    so that a test can compute it by hand."""

    width: int = 3

    @property
    def interface_size(self):
        return self.width

    @property
    def read_size(self):
        return self.width

    @property
    def initial_state(self):
        return ToyState(
            reads=StateSpec((1, self.width)),
            total=StateSpec((self.width,), "learned"),
        )

    def step(self, interface, state):
        total = state.total + interface
        state = state._replace(reads=total[:, None], total=total)
        return state, {"added": interface}


@keras.saving.register_keras_serializable(package="tests")
class ToyCell(
    keras_memory.MemoryCell,
    access=ToyAccess,
    num_layers=2,
    share_memory=False,
):
    """Two blocks that share a memory or have one each."""


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
    """A minimal Keras RNN cell: no `output_size`, no `get_initial_state`, an
    int for `state_size`, a tensor for the state."""

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
