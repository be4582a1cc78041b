"""Arguments of cells and layers: their signatures, and how they are saved."""

import itertools

import keras
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.arguments import parameters
from keras_memory.checks import plain

BACKENDS = ("tensorflow", "jax", "torch")


class ClassAttribute:
    """An attribute of a class that its instances do not have: their signature
    is that of a call, which `tf.function` asks for."""

    def __init__(self, value):
        self.value = value

    def __get__(self, instance, owner):
        if instance is not None:
            raise AttributeError("__signature__")
        return self.value


def init_parameters(cls):
    """Parameters of a class's `__init__`, by name, with those that its
    `**kwargs` hands to the base, up to `MemoryCell` or `MemoryRNN`."""
    end = DropoutRNNCell, keras.layers.RNN
    bases = itertools.takewhile(lambda base: base not in end, cls.__mro__)
    return parameters(bases)


def cell_property(name):
    """A property of a layer that reads an argument of its cell. Where the
    layer itself has an attribute of that name, as Keras's `RNN` gives it a
    `state_size`, this is it."""

    def read(layer):
        own = vars(layer)
        return own[name] if name in own else getattr(layer.cell, name)

    def write(layer, value):
        if name not in vars(layer) and hasattr(layer, "time_loop"):
            raise AttributeError(
                f"`{name}` is an argument of the cell, which is made with it: "
                "make another layer."
            )
        vars(layer)[name] = value

    return property(read, write, doc=f"`{name}` of the cell.")


def serialize(value):
    """An argument of a cell as `get_config` has it: plain values."""
    if isinstance(value, keras.initializers.Initializer):
        return keras.initializers.serialize(value)
    if isinstance(value, keras.layers.Layer):
        return keras.saving.serialize_keras_object(value)
    if callable(value):
        return keras.activations.serialize(value)
    return plain(value)  # Keras's NumPy backend mistakes a NumPy scalar
