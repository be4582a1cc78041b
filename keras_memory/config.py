"""Training configurations: plain dataclasses, and presets by name.

A new task or architecture fits in as one more dataclass: a task goes into
`tasks.TASKS`, an architecture into `MODELS`, a combination worth a name into
`PRESETS`.
"""

import ast
import dataclasses
import json

from keras_memory import tasks
from keras_memory.checks import check_size
from keras_memory.checks import is_number
from keras_memory.ntm import NTMLayer


@dataclasses.dataclass(frozen=True)
class NTM:
    """The arguments of `NTMLayer` that a training can set.

    Args: as of `NTMCell`.
    """

    memory_slots: int = 128
    slot_size: int = 20
    read_heads: int = 1
    write_heads: int = 1
    controller: str = "lstm"
    controller_units: int = 100
    controller_layers: int = 1
    head_order: str | tuple = "parallel"
    addressing: str = "content_and_location"
    shift_range: int = 1
    erase: bool = True
    writing: str = "addressed"
    retroactive_discount: float | None = None
    initial_memory: str | float = "constant"
    initial_reads: str | float = "constant"
    initial_weighting: str | float = "constant"
    initial_controller_state: str | float = "constant"

    def layer(self, units, **kwargs):
        """Makes the layer, with `units` outputs."""
        return NTMLayer(units, **dataclasses.asdict(self), **kwargs)


MODELS = {"ntm": NTM}


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that determines a training run.

    Args:
        task: a task of `tasks.py`.
        model: an architecture of this module.
        steps: int, at least 1, most training steps (batches).
        batch_size: int, at least 1, sequences a step.
        optimizer: name of a Keras optimizer. Default `"adam"`.
        learning_rate: float above 0.
        learning_rate_decay: bool, along a cosine from `learning_rate` at the
            first step to 0 at the last.
        momentum: float in [0, 1), for an optimizer that has it.
        clipnorm: float above 0, largest norm of a weight's gradient, or None.
        curriculum: tuple of lengths, growing. Training starts with sequences
            up to the first and goes on to the next, at last to the task's
            own, when less than `curriculum_wrong` of the bits are wrong.
            Lengths from the task's own on are left out, and () trains on the
            task's own lengths from the start.
        curriculum_wrong: float in (0, 1), that share of wrong bits.
        stop_wrong_bits: float, at least 0; training ends as soon as fewer
            bits a sequence are wrong, over one report, at the task's full
            lengths. 0 runs all steps.
        report_every: int, at least 1, steps between reports, which are what
            Keras calls an epoch: progress, history, TensorBoard.
        checkpoint_every: int, at least 0, steps between checkpoints, rounded
            up to whole reports; 0 for none.
        picture_every: int, at least 0, likewise, between pictures of the
            probe.
        jit_compile: bool, compile with XLA.
        seed: int, at least 0, of weights and data.

    Raises:
        ValueError: a value out of its range.
    """

    task: tasks.Copy
    model: NTM
    steps: int = 10_000
    batch_size: int = 16
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    learning_rate_decay: bool = False
    momentum: float = 0.0
    clipnorm: float | None = 1.0
    curriculum: tuple = ()
    curriculum_wrong: float = 0.02
    stop_wrong_bits: float = 0.0
    report_every: int = 100
    checkpoint_every: int = 500
    picture_every: int = 100
    jit_compile: bool = True
    seed: int = 1

    def __post_init__(self):
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("report_every", 1),
            ("checkpoint_every", 0),
            ("picture_every", 0),
            ("seed", 0),
        ):
            check_size(name, getattr(self, name), least)
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                "`learning_rate` must be above 0. "
                f"Received: learning_rate={self.learning_rate!r}"
            )
        if self.clipnorm is not None and not self.clipnorm > 0:
            raise ValueError(
                "`clipnorm` must be above 0, or None for no clipping. "
                f"Received: clipnorm={self.clipnorm!r}"
            )
        for length in self.curriculum:
            check_size("curriculum", length, least=self.task.min_length)
        if list(self.curriculum) != sorted(self.curriculum):
            raise ValueError(
                "`curriculum` must be lengths that grow. "
                f"Received: curriculum={self.curriculum}"
            )
        for name, most in (
            ("momentum", 1.0),
            ("curriculum_wrong", 1.0),
            ("stop_wrong_bits", float("inf")),
        ):
            if not 0.0 <= getattr(self, name) < most:
                raise ValueError(
                    f"`{name}` must be at least 0 and less than {most}. "
                    f"Received: {name}={getattr(self, name)!r}"
                )


PRESETS = {
    "copy": Training(
        task=tasks.Copy(),
        model=NTM(),
        steps=4_000,
        learning_rate=1e-2,
        learning_rate_decay=True,
        clipnorm=0.2,
        curriculum=(5, 10),
        curriculum_wrong=0.04,
        stop_wrong_bits=0.02,
    ),
}


def to_json(config):
    """Text of a configuration, from which `from_json` makes it again."""
    document = dataclasses.asdict(config)
    for part, registry in _PARTS.items():
        value = getattr(config, part)
        document[part]["name"] = _name_of(registry, value)
    return json.dumps(document, indent=2) + "\n"


def from_json(text):
    """Makes a configuration of what `to_json` wrote.

    Raises:
        ValueError: unknown names, or values out of their range.
    """
    document = json.loads(text)
    for part, registry in _PARTS.items():
        arguments = document[part]
        name = arguments.pop("name")
        if name not in registry:
            raise ValueError(
                f"`{part}` must be one of {sorted(registry)}. "
                f"Received: {part}={name!r}"
            )
        document[part] = _make(registry[name], arguments)
    return _make(Training, document)


def override(config, settings):
    """Changes values of a configuration by name.

    Args:
        config: a `Training`.
        settings: sequence of `"name=value"`, where `name` is a field of the
            configuration, its task or its model, and `value` a Python
            literal; a text needs no quotes.

    Returns:
        A new `Training`.

    Raises:
        ValueError: an unknown name, or a value out of its range.
    """
    fields = {part: _fields(getattr(config, part)) for part in _PARTS}
    fields[None] = _fields(config)
    names = [n for part in fields.values() for n in part if n not in _PARTS]
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in names:
            raise ValueError(
                "A setting has the form name=value, with one of these names: "
                f"{', '.join(names)}. Received: {setting!r}"
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError):
            value = text
        next(part for part in fields.values() if name in part)[name] = value
    for part in _PARTS:
        cls = type(getattr(config, part))
        fields[None][part] = _make(cls, fields[part])
    return _make(Training, fields[None])


_PARTS = {"task": tasks.TASKS, "model": MODELS}


def _fields(value):
    """Fields of a dataclass and their values, without going deeper."""
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
    }


def _name_of(registry, value):
    return next(name for name, cls in registry.items() if cls is type(value))


def _make(cls, arguments):
    """An instance of a dataclass, after a look at the types of its values."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    made = {}
    for name, value in arguments.items():
        if name not in fields:
            raise ValueError(
                f"{cls.__name__} has no {name!r}; it has: {', '.join(fields)}"
            )
        wanted = fields[name]
        if isinstance(value, list):
            value = tuple(value)
        if type(value) is int and not isinstance(value, wanted):
            value = float(value)
        is_bool = isinstance(value, bool)
        if not isinstance(value, wanted) or is_bool != (wanted is bool):
            raise ValueError(
                f"`{name}` must be of type "
                f"{getattr(wanted, '__name__', wanted)}. "
                f"Received: {name}={value!r}"
            )
        made[name] = value
    return cls(**made)
