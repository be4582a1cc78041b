"""Arguments of cells and layers: their signatures, and how they are saved."""

import dataclasses
import inspect
import itertools
import re
import types

import keras
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.arguments import KEYWORD
from keras_memory.arguments import POSITIONAL
from keras_memory.arguments import UNNAMED
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import parameters
from keras_memory.arguments import unknown
from keras_memory.checks import check_bool
from keras_memory.checks import check_layers
from keras_memory.checks import plain

BACKENDS = ("tensorflow", "jax", "torch")
OF_BLOCKS = {"num_layers": 1, "share_memory": True}
# Names that a field of an access must not have, besides those of attributes of
# the classes `MemoryCell` and `keras.layers.RNN` (`test_contract.py` has all).
TAKEN = (
    "cell",
    "cell_class",
    "go_backwards",
    "input_size",
    "interfaces",
    "kwargs",
    "loop",
    "output_projection",
    "recompute",
    "return_sequences",
    "return_state",
    "self",
    "single_state",
    "start_weights",
    "stateful",
    "states",
    "time_loop",
    "unroll",
    "zero_output_for_mask",
    *KerasArguments.__annotations__,
    *UNNAMED,
)


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


def init_with_access(cell, access, defaults):
    """Makes the `__init__` of a cell that makes its own accesses.

    Args:
        cell: the class.
        access: the access class, a dataclass.
        defaults: dict of new defaults by name. Without it `num_layers` is 1,
            `share_memory` True, and the others are those of the bases.
    """
    of_bases = init_parameters(cell)
    fields = _fields(cell, access, of_bases)
    _check_defaults(cell, access, defaults, of_bases)
    signature = inspect.Signature(
        [
            inspect.Parameter("self", POSITIONAL),
            inspect.Parameter("units", POSITIONAL),
            *sorted(map(_parameter_of, fields), key=lambda p: p.kind),
            *(
                inspect.Parameter(name, KEYWORD, default=default)
                for name, default in {**OF_BLOCKS, **defaults}.items()
            ),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )

    def __init__(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        of_access = {field.name: given[field.name] for field in fields}
        of_base = {name: given[name] for name in {*defaults} - {*OF_BLOCKS}}
        of_base.update(given["kwargs"])
        if "accesses" in of_base:
            raise unknown(type(self), "accesses", of_base["accesses"])
        blocks = check_layers("num_layers", given["num_layers"])
        if check_bool("share_memory", given["share_memory"]):
            accesses = [access(**of_access)] * blocks
        else:
            accesses = [access(**of_access) for _ in range(blocks)]
        super(cell, self).__init__(given["units"], accesses=accesses, **of_base)
        self.num_layers = blocks
        self.share_memory = given["share_memory"]
        for name in of_access:
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


def _fields(cell, access, of_bases):
    """The fields of an access class that are arguments of a cell. TypeError
    unless they can be."""
    if not isinstance(access, type) or not dataclasses.is_dataclass(access):
        raise TypeError(
            f"`access` of {cell.__name__} must be a dataclass, whose fields "
            f"become arguments. Received: access={access!r}"
        )
    if {*OF_BLOCKS} & {*of_bases} or "__init__" in vars(cell):
        bases = ", ".join(base.__name__ for base in cell.__bases__)
        raise TypeError(
            "`access` must belong to a class without `__init__`, whose bases "
            "have no `access`: it makes the `__init__`. "
            f"Received: class {cell.__name__}({bases})"
        )
    fields = [field for field in dataclasses.fields(access) if field.init]
    names = [field.name for field in fields]
    if {*names} != {*inspect.signature(access).parameters}:
        raise TypeError(
            f"`access` of {cell.__name__} must have its fields as arguments. "
            f"Received: {access.__name__}{inspect.signature(access)} with the "
            f"fields {names}"
        )
    taken = {*of_bases, *OF_BLOCKS, *TAKEN}
    for field in fields:
        name = field.name
        of_class = hasattr(cell, name) or hasattr(keras.layers.RNN, name)
        if of_class or name in taken or name.startswith("_"):
            _refuse_field(cell, access, name)
        if field.default_factory is not dataclasses.MISSING:
            raise TypeError(
                f"{access.__name__} must have plain defaults, since its fields "
                f"are arguments of {cell.__name__}. Received: `{name}` with a "
                "`default_factory`"
            )
    return fields


def _refuse_field(cell, access, name):
    raise TypeError(
        f"{access.__name__} must not have a field `{name}`: {cell.__name__}, "
        "its layer or Keras uses that name. Rename the field."
    )


def _check_defaults(cell, access, defaults, of_bases):
    """TypeError unless class keywords are arguments that may have defaults."""
    allowed = [*OF_BLOCKS, *of_bases]
    allowed = [n for n in allowed if n not in ("units", "accesses")]
    for name, value in defaults.items():
        if name not in allowed:
            raise TypeError(
                f"The class keywords of {cell.__name__} must be `access` and "
                f"arguments that get new defaults: {', '.join(allowed)}. "
                f"Fields get theirs in {access.__name__}. "
                f"Received: {name}={value!r}"
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


def saved_arguments(cls):
    """Parameters of a cell, by name, that its configuration has besides those
    of `keras.layers.Layer`."""
    others = ("accesses", "name", "trainable", "dtype")
    return {n: p for n, p in init_parameters(cls).items() if n not in others}


def serialize(name, value, by_name):
    """Converts an argument of a cell to plain values, for `get_config`.

    Args:
        name: str, name of the argument, for the error.
        value: a plain value, function, Keras object or array, or nested lists,
            tuples and dicts of these.
        by_name: bool. True: the argument takes the name of a Keras function
            too, and the function becomes its name.

    Raises:
        TypeError: the value cannot be saved.
    """
    # Plain, since Keras's NumPy backend takes NumPy scalars for tensors.
    value = plain(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {k: serialize(name, v, by_name) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        values = [serialize(name, v, by_name) for v in value]
        return tuple(values) if isinstance(value, tuple) else values
    is_function = isinstance(value, types.FunctionType)
    try:
        if callable(value) and not is_function:
            value.get_config  # noqa: B018, without it nothing can be loaded
        if is_function and by_name and value.__name__ != "<lambda>":
            return keras.activations.serialize(value)
        return keras.saving.serialize_keras_object(value)
    except Exception as error:
        raise TypeError(
            f"`{name}` must be a plain value, a function, an object of Keras "
            f"or an array, to be saved. Received: {name}={value!r}"
        ) from error


def deserialize(value):
    """Undoes `serialize`, except that names of functions stay names."""
    if isinstance(value, dict):
        if "class_name" in value and "config" in value:
            return keras.saving.deserialize_keras_object(value)
        return {key: deserialize(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(deserialize, value))
    return value


def unbuilt(config):
    """Removes the shapes that inner layers were built for, such as the cells
    of a `StackedRNNCells`, from a configuration."""
    if isinstance(config, dict):
        return {
            key: unbuilt(value)
            for key, value in config.items()
            if key != "build_config"
        }
    if isinstance(config, list):
        return [unbuilt(value) for value in config]
    return config
