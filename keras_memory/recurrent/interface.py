"""The `Access` interface, and how an interface vector is split."""

import dataclasses
import math
import typing

import keras
import numpy as np

from keras_memory.addressing.gradients import activate_each
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.checks import is_number
from keras_memory.checks import plain_tuple
from keras_memory.hints import Array


class Access(typing.Protocol):
    """Reads and writes the memory of a block. An access has no weights.

    Your own access is any object with these attributes. `NTMAccess` in
    `ntm.py` is an example.
    """

    interface_size: int
    """Width of the interface vector that `step` takes."""

    read_size: int
    """Width of all reads of one step, flattened."""

    initial_state: typing.NamedTuple
    """A record of `StateSpec`s. It has a field `reads`, and a field
    `controller`, which is () here: the cell fills it in."""

    if typing.TYPE_CHECKING:  # they are read-only: properties fit too

        @property
        def interface_size(self) -> int: ...

        @property
        def read_size(self) -> int: ...

        @property
        def initial_state(self) -> typing.Any: ...

    def step(
        self, interface: Array, state: typing.Any
    ) -> tuple[typing.Any, dict[str, Array]]:
        """Reads and writes the memory once.

        Args:
            interface: (B, interface_size), float32 or float64.
            state: a record like `initial_state`, with arrays (B,
                *`shape_in_step`).

        Returns:
            The record after the step, with the read vectors in `reads`, and
            with the shapes and dtypes of `state`; and, for `trace`, a dict of
            other arrays of the step (weightings, gates: (B, ...)). Their names
            are not those of fields, `"output"` or `"controller_output"`.
        """

    # An access may also have
    #
    # - `wide_details(state, inside, slots)`: a dict of further arrays for
    #   `trace`, which are too large to compute in each step;
    # - `touched(state, inside)`: the slots that a step touched, (B, P) int32,
    #   -1 for none. `trace` then shows `slots`, (B, P), that some step touches,
    #   instead of all; without it `slots` is None;
    # - `slots_for(steps)`, if its memory starts empty: the number of slots that
    #   so many steps can write to. States `per_slot` have only these, where
    #   nobody sees them;
    # - `unwritten(state)`: the number of slots of such a state, and of those
    #   without a write, (B,). Exported streams need it.


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Shape and initial value of one state tensor.

    Args:
        shape: tuple of ints, without the batch axis.
        initial: `"learned"` (a trainable weight), `"random"` (a weight drawn
            once and kept), `"constant"`, or a number, which is then the
            constant.
        constant: the value for `"constant"`: a number, or an array that
            broadcasts to `shape`.
        initializer: Keras initializer of the weight, if there is one.
        activation: function from the weight to the state, such as softmax for
            a weighting.
        transposed: bool; True: inside a step the last two axes of `shape` are
            swapped, as for a memory, whose slots come last there.
        dtype: `"int32"` for whole numbers, such as counters and indices of
            slots, or `"float32"`, which is float64 under a float64 policy: such
            states have no gradient, and 16-bit policies do not round them.
            None: the compute dtype.
        per_slot: bool; True: the first axis is the slots, and a step only
            reaches the state by the functions of `addressing/sparse.py`. The
            fast loop then neither copies nor saves it at each step. If it
            starts empty, it may have fewer slots than `shape` says: see
            `MemoryCell.get_initial_state`.
        slots_per_row: int, at least 1; a state `per_slot` then has a row for
            each so many slots.
        into_range: function that brings a given state, (B, *`shape_in_step`),
            into the range that steps keep; None if any value is allowed.
        on_host: None, or a pair for a state `per_slot` whose rows stay on the
            host: its `HostMemory`, and the name of the array there. The state
            itself is then a token of shape (1,) and int32, which orders the
            calls of the host.

    Raises:
        ValueError: `shape`, `initial`, `constant`, `transposed`, `dtype` or
            `per_slot` is wrong, or they exclude each other.
        TypeError: `activation` or `into_range` is not a function.
    """

    shape: tuple[int, ...]
    initial: str | float = "constant"
    constant: typing.Any = 0.0
    initializer: typing.Any = "zeros"
    activation: typing.Callable[..., typing.Any] = keras.activations.linear
    transposed: bool = False
    dtype: str | None = None
    per_slot: bool = False
    slots_per_row: int = 1
    into_range: typing.Callable[..., typing.Any] | None = None
    on_host: typing.Any = None

    def __post_init__(self) -> None:
        shape = plain_tuple(self.shape)
        is_shape = isinstance(shape, tuple) and all(
            type(size) is int and size > 0 for size in shape
        )
        check_bool("transposed", self.transposed)
        check_bool("per_slot", self.per_slot)
        check_size("slots_per_row", self.slots_per_row)
        if self.dtype not in (None, "int32", "float32"):
            raise ValueError(
                '`dtype` must be "int32", "float32" or None, the compute '
                "dtype. "
                f"Received: dtype={self.dtype!r}"
            )
        if (self.per_slot or self.dtype) and (
            self.transposed or self.is_weight
        ):
            raise ValueError(
                "A state with a `dtype` or `per_slot` must start from a "
                "constant, and not be transposed. Received: "
                f"initial={self.initial!r}, transposed={self.transposed}"
            )
        if not is_shape or len(shape) < 2 * self.transposed:
            two = ", two at least, for transposed=True"
            raise ValueError(
                "`shape` must be a tuple of integers of at least 1, without "
                f"the batch axis{two if self.transposed else ''}. "
                f"Received: shape={self.shape!r}"
            )
        object.__setattr__(self, "shape", shape)
        self.check("initial", self.initial)
        constant = check_array("constant", self.constant, result="given")
        try:
            fits = np.broadcast_shapes(constant.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                "`constant` must be a number, or an array that broadcasts to "
                f"the shape {shape}. Received: shape {tuple(constant.shape)}"
            )
        functions = {"activation": self.activation}
        if self.into_range is not None:
            functions["into_range"] = self.into_range
        for name, function in functions.items():
            if not callable(function):
                raise TypeError(
                    f"`{name}` must be a function. "
                    f"Received: {name}={function!r}"
                )

    @property
    def shape_in_step(self) -> tuple[int, ...]:
        if not self.transposed:
            return self.shape
        *leading, a, b = self.shape
        return (*leading, b, a)

    def dtype_in(self, compute_dtype: str) -> str:
        """The dtype of the state under a policy with this compute dtype."""
        if self.dtype == "int32":
            return "int32"
        is_wide = self.dtype is None or compute_dtype == "float64"
        return compute_dtype if is_wide else "float32"

    @property
    def kind(self) -> str:
        """What `check_array` calls such numbers."""
        return "whole" if self.dtype == "int32" else "real"

    @property
    def is_weight(self) -> bool:
        return self.initial in ("learned", "random")

    @property
    def fill(self) -> typing.Any:
        return self.constant if self.initial == "constant" else self.initial

    @classmethod
    def check(cls, name: str, value: typing.Any) -> typing.Any:
        """Returns `value`; ValueError unless it is a valid `initial`."""
        by_name = isinstance(value, str) and value in (
            "learned",
            "random",
            "constant",
        )
        if by_name or is_number(value):
            return value
        raise ValueError(
            f'`{name}` must be "learned", "random", "constant" or a finite '
            "number, which is then the constant. "
            f"Received: {name}={value!r}"
        )


def interface_size(shapes):
    """Width of an interface of parts with these shapes; None for no part."""
    return sum(math.prod(shape) for shape in shapes if shape is not None)


def split_interface(interface, shapes, activations):
    """Splits an interface vector into its parts.

    Args:
        interface: (B, `interface_size(shapes)`).
        shapes: record with the shape of each part, without the batch axis, in
            the order of the parts in the interface; None for unused parts.
        activations: record of the same class, with the activation of each
            part.

    Returns:
        Record of the same class, with arrays (B, *shape) or None.
    """
    present = [
        (activation, shape)
        for activation, shape in zip(activations, shapes, strict=True)
        if shape is not None
    ]
    parts = iter(activate_each(*zip(*present), interface))
    return type(shapes)(
        *(None if shape is None else next(parts) for shape in shapes)
    )


def check_sizes_of_memory(access):
    """Raises ValueError unless the sizes are positive ints and the state fits
    into the machine's memory."""
    for name in ("memory_slots", "slot_size", "read_heads", "write_heads"):
        check_size(name, getattr(access, name))
    check_bytes_of_state(access, "The memory", ("memory_slots", "slot_size"))
    for heads in ("read_heads", "write_heads"):
        names = (heads, "memory_slots"), (heads, "slot_size")
        check_bytes_of_state(access, "The weightings", names[0])
        check_bytes_of_state(access, "The vectors", names[1])


def check_bytes_of_state(access, what, names, instead=""):
    """Raises ValueError unless a state fits into the machine's memory, and into
    one axis, which it has outside of a step."""
    sizes = [(name, getattr(access, name)) for name in names]
    what = f"{what} of one batch row"
    check_bytes(what, sizes, instead=instead)
    size = math.prod(size for _, size in sizes)
    check_bytes(what, [(" x ".join(names), size)], instead=instead)
