"""Training configurations: plain dataclasses, and presets by name.

To add a task or an architecture, write a dataclass and register it: a task in
`tasks.TASKS`, an architecture in `MODELS`, a named combination in `PRESETS`.

The `build` of an architecture takes inputs (B, T, D), the number of outputs and
their activation, and returns outputs (B, T, units). Register your own layers
with Keras, or their runs cannot be loaded:

>>> @dataclasses.dataclass(frozen=True)
... class GRU:
...     units: int = 32
...
...     def build(self, inputs, units, activation):
...         x = keras.layers.GRU(self.units, return_sequences=True)(inputs)
...         return keras.layers.Dense(units, activation)(x)
>>> MODELS["gru"] = GRU
>>> config = Training(tasks.Copy(), GRU())
>>> override(config, ["units=64"]).model
GRU(units=64)
>>> from_json(to_json(config)) == config
True
>>> del MODELS["gru"]
"""

import ast
import dataclasses
import functools
import inspect
import json
import math
import operator
import types
import typing
from collections.abc import Iterable

import keras
import numpy as np

from keras_memory.checks import MOST_SEED
from keras_memory.checks import check_bool
from keras_memory.checks import check_clip
from keras_memory.checks import check_layers
from keras_memory.checks import check_one_of
from keras_memory.checks import check_rate
from keras_memory.checks import check_size
from keras_memory.checks import check_whole
from keras_memory.checks import is_number
from keras_memory.checks import plain
from keras_memory.dnc import DNCLayer
from keras_memory.ntm import NTMLayer
from keras_memory.recurrent.cells import check_units
from keras_memory.sam import SAMLayer
from keras_memory.sdnc import SDNCLayer
from keras_memory.training import tasks

MOST_STEPS = 2**31 - 1  # TensorFlow cannot count more


def _fields(value):
    """Fields of a dataclass and their values, not recursive."""
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.init
    }


def _make(cls, arguments):
    """Makes a dataclass, after converting and checking its values' types."""
    try:
        return cls(**_converted(cls, arguments))
    except TypeError as error:  # an argument is missing
        raise ValueError(f"{cls.__name__} cannot be made: {error}") from error


def _normalize(instance):
    """Converts the fields of a frozen dataclass to their declared types."""
    converted = _converted(type(instance), _fields(instance))
    for name, value in converted.items():
        object.__setattr__(instance, name, value)


def _converted(cls, arguments):
    """Converts values to their fields' types, or raises ValueError."""
    try:
        types_of = typing.get_type_hints(cls)
    except NameError:  # a type hint names a class local to a function
        types_of = {}
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    converted = {}
    for name, value in arguments.items():
        if name not in fields:
            raise ValueError(
                f"{cls.__name__} has no {name!r}; it has: {', '.join(fields)}"
            )
        wanted = types_of.get(name, typing.Any)
        value = _plain(value)
        if not _fits(value, wanted):
            if isinstance(value, list):
                value = _tuples(value)
            elif type(value) is int and abs(value) < 1e300:
                value = float(value)
        if not _fits(value, wanted):
            raise ValueError(
                f"`{name}` must be of type "
                f"{getattr(wanted, '__name__', wanted)}. "
                f"Received: {name}={arguments[name]!r:.200}"
            )
        converted[name] = value
    return converted


def _plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else plain(value)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value, wanted):
    """True if a value has a type; items of generic types are not checked."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(wanted))
    if origin is typing.Literal:
        return value in typing.get_args(wanted)
    wanted = origin or wanted
    if not isinstance(wanted, type):  # such as typing.Any
        return True
    if isinstance(value, bool) and wanted is not object:
        return wanted is bool
    return isinstance(value, wanted)


@typing.runtime_checkable
class Architecture(typing.Protocol):
    """The interface that the configuration of a model must have."""

    def build(self, inputs, units, activation):
        """Maps inputs (B, T, D) to outputs (B, T, units)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Memory:
    """Base class of the configurations of recurrent memories."""

    initialization: str = "keras"

    layer_class = None

    def __post_init__(self):
        _normalize(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("num_layers", "controller_layers"):
                check_layers(field.name, value)
            elif field.type is int:
                least = 0 if field.name == "shift_range" else 1
                check_size(field.name, value, least)
            elif field.type is bool:
                check_bool(field.name, value)
        check_rate("controller_dropout", self.controller_dropout)
        choices = "keras", "pytorch-ntm"
        check_one_of("initialization", self.initialization, choices)
        if self.initialization == "pytorch-ntm" and self.controller != "lstm":
            raise ValueError(
                "`controller` must be 'lstm' for initialization='pytorch-ntm'; "
                "for other controllers set initialization='keras'. "
                f"Received: controller={self.controller!r}"
            )
        if self.initialization == "pytorch-ntm":
            check_units(
                keras.layers.LSTMCell,
                "controller_units",
                self.controller_units,
                self.controller_layers,
            )

    def build(self, inputs, units, activation):
        """(B, T, D) -> (B, T, units)."""
        arguments = dataclasses.asdict(self)
        arguments.pop("initialization")
        if self.initialization == "pytorch-ntm":
            width = inputs.shape[-1] + self.read_heads * self.slot_size
            arguments["controller"] = self._large_lstm(width)
            arguments["kernel_initializer"] = (
                keras.initializers.VarianceScaling(1.4**2, "fan_avg", "uniform")
            )
        return self.layer_class(
            units,
            **arguments,
            activation=activation,
            return_sequences=True,
        )(inputs)

    def _large_lstm(self, width):
        """An LSTM with initial kernels several times as large as Keras's.

        The width of the first layer's inputs sets the range of all layers and
        blocks.
        """
        bound = 5.0 / math.sqrt(width + self.controller_units)

        def kernel():
            return keras.initializers.RandomUniform(-bound, bound)

        cells = [
            keras.layers.LSTMCell(
                self.controller_units,
                kernel_initializer=kernel(),
                recurrent_initializer=kernel(),
                unit_forget_bias=False,
                dropout=self.controller_dropout,
            )
            for _ in range(self.controller_layers)
        ]
        return (
            cells[0] if len(cells) == 1 else keras.layers.StackedRNNCells(cells)
        )


# Arguments of a recurrent memory that a training sets or cannot use.
SET_BY_TRAINING = {
    *("units", "activation", "seed", "return_sequences", "return_state"),
    *("go_backwards", "stateful", "unroll", "zero_output_for_mask"),
}


def _config_of(name, layer):
    """Makes a dataclass of the layer arguments that a training can set.

    These are the arguments that are numbers, strings, bools or tuples.
    """
    plain_types = bool, int, float, str, tuple, type(None)
    fields = []
    for parameter in inspect.signature(layer).parameters.values():
        kind = parameter.annotation
        kinds = typing.get_args(kind) or (kind,)
        kinds = [typing.get_origin(member) or member for member in kinds]
        kinds = [member for member in kinds if member in plain_types]
        of_rnn = parameter.name in SET_BY_TRAINING
        is_keyword = parameter.kind is not parameter.VAR_KEYWORD
        if kinds and is_keyword and not of_rnn:
            kind = functools.reduce(operator.or_, kinds)
            fields.append((parameter.name, kind, parameter.default))
    document = f"""The arguments of `{layer.__name__}` that a training can set.

    Args:
        initialization: `"keras"` (default), or `"pytorch-ntm"`: the initial
            weights of an LSTM controller and of the heads are as large as in
            pytorch-ntm.
        others: as in `{layer.__name__}`.
    """
    names = {"layer_class": layer, "__doc__": document, "__module__": __name__}
    return dataclasses.make_dataclass(
        name, fields, bases=(_Memory,), namespace=names, frozen=True
    )


NTMConfig = _config_of("NTMConfig", NTMLayer)
DNCConfig = _config_of("DNCConfig", DNCLayer)
SAMConfig = _config_of("SAMConfig", SAMLayer)
SDNCConfig = _config_of("SDNCConfig", SDNCLayer)


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """The baseline without memory: `keras.layers.LSTM` and a dense layer.

    Args:
        units: int, at least 1, units of each LSTM layer.
        num_layers: int from 1 to 1024.
    """

    units: int = 128
    num_layers: int = 1

    def __post_init__(self):
        _normalize(self)
        check_layers("num_layers", self.num_layers)
        check_units(keras.layers.LSTMCell, "units", self.units, self.num_layers)

    def build(self, inputs, units, activation):
        """(B, T, D) -> (B, T, units)."""
        for _ in range(self.num_layers):
            inputs = keras.layers.LSTM(self.units, return_sequences=True)(
                inputs
            )
        return keras.layers.Dense(units, activation)(inputs)


MODELS = {
    "ntm": NTMConfig,
    "dnc": DNCConfig,
    "sam": SAMConfig,
    "sdnc": SDNCConfig,
    "lstm": LSTMConfig,
}


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that determines a training run.

    Args:
        task: a task of `tasks.py`, or another `tasks.Task`.
        model: an architecture of this module, or one in `MODELS`.
        steps: int, at least 1, largest number of training steps (batches).
        minutes: float, at least 0; training ends after so many minutes,
            compilation included. 0 runs all steps.
        batch_size: int, at least 1, sequences per step.
        optimizer: name of a Keras optimizer. Default `"adam"`.
        learning_rate: float above 0.
        learning_rate_decay: bool, whether the learning rate falls along a
            cosine from `learning_rate` at the first step to 0 at the last.
        optimizer_options: dict, further arguments of the optimizer, such as
            `{"momentum": 0.9}`.
        clipnorm: float above 0, largest norm of a weight's gradient, or None.
        clipvalue: float above 0, largest entry of a gradient, or None.
        curriculum: tuple of increasing lengths. Training starts with sequences
            up to the first length, then up to the next, and at last up to the
            task's `max_length`. Lengths that the task does not have are
            skipped. () trains on all lengths of the task from the start.
        curriculum_doubles: bool, whether the last length of `curriculum`
            doubles until it is the task's `max_length`. If `curriculum` is (),
            the task's `min_length` doubles.
        curriculum_loss: float above 0; a report with a lower loss starts the
            next length.
        curriculum_error: float, at least 0; instead of the loss, a report with
            a lower error starts the next length. 0 uses the loss.
        curriculum_reports: int, at least 1, number of such reports in a row
            that start the next length.
        curriculum_steps: int, at least 0; instead of the loss, this many steps
            start the next length, rounded up to whole reports. 0 uses the
            loss.
        stop_error: float, at least 0; training ends when the error of a
            report, at the task's full lengths, is lower. 0 runs all steps. The
            error is the number of wrong bits per sequence; for `adding` the
            error of the sum; for `argmax` the share of wrong answers.
        test_lengths: tuple of lengths at which the trained model is tested, in
            addition to the longest of the training.
        test_sequences: int, at least 1, number of fresh sequences of each
            test, rounded up to whole batches of 8.
        probe_lengths: tuple of lengths; one sequence of each is drawn during
            the training. () draws one of the task's longest.
        report_every: int, at least 1, steps between reports (progress,
            history, TensorBoard). One report is one epoch of Keras.
        checkpoint_every: int, at least 0, steps between checkpoints, rounded
            up to whole reports; 0 for none.
        picture_every: int, at least 0, steps between pictures of the probes,
            rounded up to whole reports; 0 for none.
        jit_compile: bool, compile with XLA.
        seed: int from 0 to 2^32 - 1, of weights and data.

    Raises:
        ValueError: a value out of its range.
    """

    task: tasks.Task
    model: Architecture
    steps: int = 10_000
    minutes: float = 0.0
    batch_size: int = 16
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    learning_rate_decay: bool = False
    optimizer_options: dict = dataclasses.field(default_factory=dict)
    clipnorm: float | None = None
    clipvalue: float | None = None
    curriculum: tuple = ()
    curriculum_doubles: bool = False
    curriculum_loss: float = 0.1
    curriculum_error: float = 0.0
    curriculum_reports: int = 1
    curriculum_steps: int = 0
    stop_error: float = 0.0
    test_lengths: tuple = ()
    test_sequences: int = 320
    probe_lengths: tuple = ()
    report_every: int = 100
    checkpoint_every: int = 500
    picture_every: int = 100
    jit_compile: bool = True
    seed: int = 1

    def __post_init__(self):
        _normalize(self)
        if isinstance(self.model, type):
            raise ValueError(
                "`model` must be an instance of an architecture, not its "
                f"class. Received: model={self.model.__name__}"
            )
        for name, least in (
            ("steps", 1),
            ("curriculum_reports", 1),
            ("curriculum_steps", 0),
            ("test_sequences", 1),
            ("report_every", 1),
            ("checkpoint_every", 0),
            ("picture_every", 0),
        ):
            check_whole(name, getattr(self, name), least, MOST_STEPS)
        bools = "learning_rate_decay", "curriculum_doubles", "jit_compile"
        for name in bools:
            check_bool(name, getattr(self, name))
        check_whole("seed", self.seed, 0, MOST_SEED)
        self.task.check_bytes(check_size("batch_size", self.batch_size))
        for name in ("learning_rate", "curriculum_loss"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ValueError(
                    f"`{name}` must be above 0. Received: {name}={value!r}"
                )
        for name in ("minutes", "curriculum_error", "stop_error"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(
                    f"`{name}` must be at least 0. Received: {name}={value!r}"
                )
        if self.curriculum_steps and self.curriculum_error:
            raise ValueError(
                "Only one of `curriculum_steps` and `curriculum_error` can be "
                "set; the other must be 0. "
                f"Received: curriculum_steps={self.curriculum_steps}, "
                f"curriculum_error={self.curriculum_error}"
            )
        if "gradient_accumulation_steps" in self.optimizer_options:
            raise ValueError(
                "`optimizer_options` must not have "
                "`gradient_accumulation_steps`, as each step updates the "
                "weights; set `batch_size` instead. Received: "
                f"optimizer_options={self.optimizer_options}"
            )
        check_clip("clipnorm", self.clipnorm)
        check_clip("clipvalue", self.clipvalue)
        if None not in (self.clipnorm, self.clipvalue):
            raise ValueError(
                "Only one of `clipnorm` and `clipvalue` can be set; the other "
                f"must be None. Received: clipnorm={self.clipnorm}, "
                f"clipvalue={self.clipvalue}"
            )
        for length in self.curriculum:
            check_size("curriculum", length)
        for length in (*self.test_lengths, *self.probe_lengths):
            rng = np.random.default_rng(0)
            self.task.sample(rng, 1, length=length)  # raises if it is invalid
        if list(self.curriculum) != sorted(self.curriculum):
            raise ValueError(
                "`curriculum` must be increasing lengths. "
                f"Received: curriculum={self.curriculum}"
            )


def to_json(config):
    """Writes a configuration as JSON text, which `from_json` reads.

    Raises:
        ValueError: the task or the model is not registered in `tasks.TASKS` or
            `MODELS`, or has values that JSON cannot restore.
    """
    check_training(config)
    document = _fields(config)
    for part, registry in _PARTS.items():
        value = document[part]
        name = _name_of(registry, value)
        document[part] = {**_fields(value), "name": name}
    try:
        text = json.dumps(document, indent=2, default=_plain) + "\n"
        same = _all_fields(from_json(text)) == _all_fields(config)
    except (TypeError, ValueError, RecursionError) as error:
        same = error
    if same is not True:
        raise ValueError(
            "`config` must come back unchanged from JSON, so that the run can "
            "be resumed: use numbers, strings and tuples. No field may be "
            f"called `name`. Received: {config!r}"
            + ("" if same is False else f" ({same})")
        )
    return text


def from_json(text):
    """Reads a configuration that `to_json` wrote.

    Raises:
        ValueError: the text is not such JSON, a name is unknown, or a value is
            out of its range.
    """
    wanted = "A configuration must be a JSON object, as `to_json` writes it. "
    if not isinstance(text, str):
        raise ValueError(f"{wanted}Received: {type(text).__name__}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}Received: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{wanted}Received: {type(document).__name__}")
    for part, registry in _PARTS.items():
        arguments = document.get(part)
        if not isinstance(arguments, dict):
            raise ValueError(
                f"`{part}` must be an object with a name. "
                f"Received: {part}={arguments!r:.80}"
            )
        name = arguments.pop("name", None)
        if not isinstance(name, str) or name not in registry:
            raise ValueError(
                f"The `name` of `{part}` must be one of {sorted(registry)}. "
                f"Received: name={name!r:.80}"
            )
        document[part] = _make(registry[name], arguments)
    return _make(Training, document)


def override(config, settings):
    """Changes values of a configuration by name.

    Args:
        config: a `Training`.
        settings: sequence of `"name=value"`. `name` is a field of the
            configuration, its task or its model; `value` is a Python literal,
            and a string needs no quotes. If several have the field, the
            configuration's is set, or else the task's; `"task.name=value"` and
            `"model.name=value"` choose one. A new `max_length` scales
            `test_lengths` and `probe_lengths`, unless they are set too.

    Returns:
        A new `Training`.

    Raises:
        ValueError: a name is unknown, or a value is out of its range.
    """
    check_training(config)
    if isinstance(settings, str) or not isinstance(settings, Iterable):
        raise ValueError(
            "`settings` must be a sequence of strings name=value. "
            f"Received: settings={settings!r}"
        )
    fields = {part: _fields(getattr(config, part)) for part in _PARTS}
    fields[None] = _fields(config)
    places = {}
    for part in (*reversed(_PARTS), None):  # the last one wins
        for name in fields[part]:
            places[f"{part}.{name}"] = places[name] = part, name
    names = [
        name for part in fields.values() for name in part if name not in _PARTS
    ]
    changed = {}
    for setting in settings:
        name, equals, text = str(setting).partition("=")
        if not equals or name not in places or name in _PARTS:
            raise ValueError(
                "A setting must be name=value, with one of these names: "
                f"{', '.join(names)}. Received: {setting!r}"
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError):
            value = text
        changed[places[name]] = value
    for (part, name), value in changed.items():
        fields[part][name] = value
    made = {
        part: _make(type(getattr(config, part)), fields[part])
        for part in _PARTS
    }
    for name in ("test_lengths", "probe_lengths"):
        if (None, name) not in changed:
            fields[None][name] = _scaled(
                fields[None][name], config.task, made["task"]
            )
    return _make(Training, {**fields[None], **made})


def _scaled(lengths, before, task):
    """Scales lengths by the ratio of the tasks' `max_length`."""
    scale = task.max_length / before.max_length
    scaled = (max(round(scale * n), task.min_length) for n in lengths)
    return lengths if scale == 1 else tuple(dict.fromkeys(scaled))


_PARTS = {"task": tasks.TASKS, "model": MODELS}


def _all_fields(config):
    parts = {part: _fields(getattr(config, part)) for part in _PARTS}
    return {**_fields(config), **parts}


def check_training(config):
    """Raises ValueError unless `config` is a `Training`."""
    if not isinstance(config, Training):
        raise ValueError(
            "`config` must be a `config.Training`. "
            f"Received: {type(config).__name__}"
        )


def _name_of(registry, value):
    for name, cls in registry.items():
        if cls is type(value) and dataclasses.is_dataclass(cls):
            return name
    raise ValueError(
        "Task and model must be registered dataclasses, or the run could not "
        "be written: put yours into `tasks.TASKS` or `config.MODELS`. "
        f"Received: {value!r}"
    )
