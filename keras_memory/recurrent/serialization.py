"""Arguments of cells and layers: their signatures, and how they are saved."""

import itertools
import re

import keras
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.arguments import parameters
from keras_memory.checks import plain

OBJECTS = (
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.layers.Layer,
)
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


def with_arguments(docstring, names, *sources):
    """A docstring with further arguments, documented as elsewhere.

    Args:
        docstring: str with a section "Args:", or None.
        names: the names of all arguments, in order.
        *sources: docstrings that document those that `docstring` leaves out.
    """
    section = re.compile(r"\n    Args:\n(.*?\n)(?=\n    \S|    $)", re.DOTALL)
    if not docstring or not section.search(docstring):
        return docstring
    known = {}
    for text in (docstring, *sources):
        entries = re.split(r"(?m)^ {8}(?=[\w*])", section.search(text)[1])
        for entry in entries[1:]:
            for name in entry.partition(":")[0].split(", "):
                known.setdefault(name, (text is docstring, entry))
    entries = [known[name] for name in names if name in known]
    more = [f"        {entry}" for is_own, entry in entries if not is_own]
    more.append("        **kwargs: of `keras.layers.Layer`.\n")
    end = section.search(docstring).end(1)
    return docstring[:end] + "".join(more) + docstring[end:]


def serialize(value):
    """An argument of a cell as `get_config` has it: plain values."""
    if isinstance(value, OBJECTS):
        return keras.saving.serialize_keras_object(value)
    if callable(value):
        return keras.activations.serialize(value)
    return plain(value)  # Keras's NumPy backend mistakes a NumPy scalar
