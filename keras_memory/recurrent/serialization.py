"""Arguments of cells and layers: their signatures, and how they are saved."""

import dataclasses
import inspect
import itertools
import re

import keras
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.arguments import KEYWORD
from keras_memory.arguments import POSITIONAL
from keras_memory.arguments import parameters
from keras_memory.checks import check_bool
from keras_memory.checks import check_layers
from keras_memory.checks import plain

OBJECTS = (
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.layers.Layer,
)
BACKENDS = ("tensorflow", "jax", "torch")
# Attributes that `build` sets.
OF_BUILD = ("input_size", "interfaces", "output_projection", "start_weights")


class ClassAttribute:
    """An attribute of a class that its instances do not have.

    `__signature__` of a class is that of `__init__`. `tf.function` asks an
    instance, whose signature is that of its call.
    """

    def __init__(self, value):
        self.value = value

    def __get__(self, instance, owner):
        if instance is not None:
            raise AttributeError("__signature__")
        return self.value


def init_parameters(cls):
    """Parameters of a class's `__init__` by name, and those that `**kwargs`
    passes to its bases, up to `MemoryCell` or `MemoryRNN`."""
    end = DropoutRNNCell, keras.layers.RNN
    bases = itertools.takewhile(lambda base: base not in end, cls.__mro__)
    return parameters(bases)


def init_with_access(cell, base, access, defaults):
    """Makes the `__init__` of a cell that makes its own accesses.

    Args:
        cell: the class.
        base: `MemoryCell`.
        access: the access class, a dataclass.
        defaults: dict of new defaults by name. Without it `num_layers` is 1,
            `share_memory` True, and the others are those of `MemoryCell`.
    """
    fields = {field.name: field for field in dataclasses.fields(access)}
    _check_fields(cell, base, access, fields)
    of_blocks = {"num_layers": 1, "share_memory": True}
    signature = inspect.Signature(
        [
            inspect.Parameter("self", POSITIONAL),
            inspect.Parameter("units", POSITIONAL),
            *map(_parameter_of, fields.values()),
            *(
                inspect.Parameter(name, KEYWORD, default=default)
                for name, default in {**of_blocks, **defaults}.items()
            ),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )

    def __init__(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        of_access = {name: given[name] for name in fields}
        blocks = check_layers("num_layers", given["num_layers"])
        if check_bool("share_memory", given["share_memory"]):
            accesses = [access(**of_access)] * blocks
        else:
            accesses = [access(**of_access) for _ in range(blocks)]
        of_base = {name: given[name] for name in {*defaults} - {*of_blocks}}
        super(cell, self).__init__(
            given["units"], accesses=accesses, **of_base, **given["kwargs"]
        )
        self.num_layers = blocks
        self.share_memory = given["share_memory"]
        for name in fields:
            if hasattr(self, name):
                _refuse_field(cell, access, name)
            setattr(self, name, getattr(accesses[0], name))

    __init__.__signature__ = signature
    return __init__


def _parameter_of(field):
    """The parameter of `__init__` for a field of a dataclass."""
    default = field.default
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    kind = KEYWORD if field.kw_only else POSITIONAL
    annotation = field.type
    return inspect.Parameter(
        field.name, kind, default=default, annotation=annotation
    )


def _check_fields(cell, base, access, fields):
    """Raises TypeError unless the fields can be arguments of the cell."""
    of_base = {*init_parameters(base), *OF_BUILD}
    of_base |= {"num_layers", "share_memory"}
    for name, field in fields.items():
        if name in of_base or hasattr(cell, name):
            _refuse_field(cell, access, name)
        if field.default_factory is not dataclasses.MISSING:
            raise TypeError(
                f"{access.__name__} must have plain defaults, since its fields "
                f"are arguments of {cell.__name__}. Received: `{name}` with a "
                "`default_factory`"
            )


def _refuse_field(cell, access, name):
    raise TypeError(
        f"{access.__name__} must not have a field `{name}`: {cell.__name__} "
        "has an attribute of that name. Rename the field."
    )


def cell_property(name):
    """A property of a layer that reads an argument of its cell.

    An attribute of the layer itself comes first, such as `state_size`, which
    Keras's `RNN` sets.
    """

    def read(layer):
        own = vars(layer)
        return own[name] if name in own else getattr(layer.cell, name)

    def write(layer, value):
        if name not in vars(layer) and hasattr(layer, "time_loop"):
            raise AttributeError(
                f"`{name}` is an argument of the cell and cannot be set later: "
                "make another layer."
            )
        vars(layer)[name] = value

    return property(read, write, doc=f"`{name}` of the cell.")


def with_arguments(docstring, names, *sources):
    """Adds arguments to a docstring, as other docstrings document them.

    Args:
        docstring: str with a section "Args:", or None.
        names: the names of all arguments, in order.
        *sources: docstrings with the arguments that `docstring` leaves out.
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
    """Converts an argument of a cell to plain values, for `get_config`."""
    if isinstance(value, OBJECTS):
        return keras.saving.serialize_keras_object(value)
    if callable(value):
        return keras.activations.serialize(value)
    return plain(value)  # Keras's NumPy backend takes NumPy scalars for tensors
