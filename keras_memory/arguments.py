"""Checks of constructor arguments, and serialization of layers among them.

A class with `Arguments` as its first base, and each of its subclasses, gets
plain Python values: NumPy scalars are converted before `__init__` runs, so that
`get_config` can be written as JSON. Errors about unknown or missing arguments
name the class that the user wrote.
"""

import difflib
import functools
import inspect
import typing

import keras

from keras_memory.checks import check_bool
from keras_memory.checks import plain

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY

# Arguments that Keras's layers and cells take in `**kwargs` only.
UNNAMED = ("input_dim", "input_shape", "implementation")


class KerasArguments(typing.TypedDict, total=False):
    """Arguments that a layer passes on to `keras.layers.Layer`."""

    name: str | None
    dtype: typing.Any
    trainable: bool
    autocast: bool
    activity_regularizer: typing.Any
    input_shape: tuple[int | None, ...]
    input_dim: int


class Arguments:
    """A base, which must be the first one, that checks arguments.

    It wraps each `__init__`. The wrapper checks the arguments that its
    `__init__` names, and leaves `**kwargs` to the wrapper of the next
    `__init__`. The last wrapper, before Keras's `__init__`, checks the rest
    against Keras's arguments.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            # `cls.__init__ = ` would hide the arguments from editors (jedi).
            type.__setattr__(cls, "__init__", checked(cls, cls.__init__))

    @classmethod
    def _accepted_behind(cls, owner):
        """Names of the arguments that the bases after `owner` take; None if
        the next one has a wrapper, which checks them itself."""
        bases = cls.__mro__[cls.__mro__.index(owner) + 1 :]
        first = next(base for base in bases if "__init__" in vars(base))
        if issubclass(first, Arguments):
            return None
        return {*parameters(bases), *UNNAMED}

    @classmethod
    def _all_arguments(cls):
        """Names of all arguments, for the hints in errors."""
        names = [*inspect.signature(cls).parameters, *parameters(cls.__mro__)]
        return [n for n in names if n not in ("args", "kwargs", "self")]


def parameters(bases):
    """Parameters, by name, of the `__init__` of the first of some classes, and
    of the next ones to which `*args` and `**kwargs` are passed on.

    For `class A(B)` with `A.__init__(self, x, **kwargs)` and
    `B.__init__(self, y=1, name=None)` they are x, y and name, the last two by
    keyword only.
    """
    by_name, is_positional = {}, True
    for base in bases:
        if "__init__" not in vars(base):
            continue
        _, *named = inspect.signature(base.__init__).parameters.values()
        kinds = {parameter.kind for parameter in named}
        for parameter in named:
            if parameter.kind in (POSITIONAL, KEYWORD):
                if not is_positional:
                    parameter = parameter.replace(kind=KEYWORD)
                by_name.setdefault(parameter.name, parameter)
        is_positional = inspect.Parameter.VAR_POSITIONAL in kinds and not any(
            parameter.kind is POSITIONAL
            and parameter.default is not parameter.empty
            for parameter in by_name.values()
        )
        if base is keras.layers.Layer:
            break  # the backend's classes after it take no arguments
        is_last = inspect.Parameter.VAR_KEYWORD not in kinds
        if is_last and issubclass(base, Arguments):
            break  # `keras.Model.__init__` calls no further `__init__`
    return by_name


def given(arguments):
    """All arguments of an `__init__` by name.

    Args:
        arguments: dict, the `locals()` at the start of the `__init__`.
    """
    kwargs = arguments.get("kwargs", {})
    own = ("self", "kwargs", "__class__")
    named = {n: value for n, value in arguments.items() if n not in own}
    return {**named, **kwargs}


class ArgumentError(TypeError):
    """An unknown, missing or superfluous argument.

    Args:
        made: the class that was given the arguments.
        message: function from the class to name to the words of the error.
    """

    def __init__(self, made, message):
        super().__init__(message(made))
        self.made, self.message = made, message

    def __reduce__(self):  # `made` and `message` may be local to a function
        return TypeError, self.args

    def naming(self, written, made):
        """This error, which names the class `written` instead of `made`, to
        which `written` passed its arguments on."""
        return (
            ArgumentError(written, self.message) if self.made is made else self
        )


def checked(owner, init):
    """Wraps the `__init__` of a class: see `Arguments`."""
    signature = inspect.signature(init)
    _, *named = signature.parameters.values()
    names = {p.name for p in named if p.kind in (POSITIONAL, KEYWORD)}
    has_more = any(p.kind is p.VAR_KEYWORD for p in named)

    @functools.wraps(init)
    def init_checked(self, *args, **kwargs):
        more = [name for name in kwargs if name not in names]
        behind = self._accepted_behind(owner) if more and has_more else ()
        if behind is not None:
            for name in more:
                if name not in behind:
                    raise unknown(type(self), name, kwargs[name])
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise _not_bound(type(self), error) from None
        for name in ("trainable", "autocast"):  # which Keras does not check
            if name in more:
                check_bool(name, kwargs[name])
        init(self, *plain(args), **plain(kwargs))

    # Keras reads the signature of the wrapper itself.
    init_checked.__signature__ = signature
    return init_checked


# Former names, which old files and programs may use.
RENAMED = {
    "dim": "key_dim",
    "distance": "similarity",
    "fixed_memory_size": "memory_size",
    "layers": "num_layers",
    "max_memories": "memory_size",
    "method": "search_method",
    "store": "search_method",
}


def _not_bound(made, error):
    words = str(error)

    def message(written):
        named = inspect.signature(written).parameters.values()
        named = [p.replace(annotation=p.empty) for p in named]
        return (
            f"{written.__name__}: {words}. It is called as "
            f"{written.__name__}{inspect.Signature(named)}"
        )

    return ArgumentError(made, message)


def unknown(made, name, value):
    """The error about an argument that the class `made` does not have."""

    def message(written):
        return (
            f"{written.__name__} has no argument `{name}`"
            f"{_hint(written, name)} Received: {name}={value!r}"
        )

    return ArgumentError(made, message)


def _hint(written, name):
    """What `name` may stand for, as the end of a sentence."""
    names = dict.fromkeys(written._all_arguments())
    if RENAMED.get(name) in names:
        return f": it is called `{RENAMED[name]}` now."
    parts = set(name.split("_"))
    close = [
        candidate for candidate in names if parts <= set(candidate.split("_"))
    ]
    close += difflib.get_close_matches(name, names)
    close = " or ".join(f"`{candidate}`" for candidate in dict.fromkeys(close))
    return (
        f". Did you mean {close}?"
        if close
        else f". It has: {', '.join(names)}."
    )


# Layers as arguments.


def check_layer(name, value, wanted="a layer or None"):
    """Returns `value`; ValueError unless it is a layer or else in `wanted`."""
    by_name = value == "dense" if isinstance(value, str) else value is None
    if isinstance(value, keras.layers.Layer) or (
        by_name and (value is None or "dense" in wanted)
    ):
        return value
    raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")


def config_with_layers(owner, names):
    """Attributes for `get_config`, with layers serialized."""
    values = {name: getattr(owner, name) for name in names}
    for name, value in values.items():
        if isinstance(value, keras.layers.Layer):
            values[name] = keras.saving.serialize_keras_object(value)
    return values


def layers_from_config(config, custom_objects=None):
    """Deserializes the layers in a configuration."""
    return {
        name: keras.saving.deserialize_keras_object(value, custom_objects)
        if name in ("encoder", "head", "classifier") and isinstance(value, dict)
        else value
        for name, value in config.items()
    }
