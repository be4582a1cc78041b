"""The Neural Turing Machine (Graves, Wayne, Danihelka 2014, arXiv 1410.5401),
also with MERLIN's way of writing (Wayne et al. 2018, arXiv 1803.10760).

Equation numbers refer to section 3 of the first paper.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.activations import activation_by_name
from keras_memory.addressing.activations import not_negative
from keras_memory.addressing.activations import oneplus
from keras_memory.addressing.activations import softmax
from keras_memory.addressing.content import content_weighting
from keras_memory.addressing.location import interpolate
from keras_memory.addressing.location import sharpen
from keras_memory.addressing.location import shift
from keras_memory.addressing.slots import erase_and_add
from keras_memory.addressing.slots import read
from keras_memory.addressing.usage import add_usage
from keras_memory.addressing.usage import least_used
from keras_memory.addressing.usage import mark_used
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import given
from keras_memory.checks import check_bool
from keras_memory.checks import check_clip
from keras_memory.checks import check_closed
from keras_memory.checks import check_layers
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.checks import is_number
from keras_memory.checks import plain_tuple
from keras_memory.hints import Activation
from keras_memory.recurrent.cell import CellArguments
from keras_memory.recurrent.cell import MemoryCell
from keras_memory.recurrent.interface import StateSpec
from keras_memory.recurrent.interface import check_sizes_of_memory
from keras_memory.recurrent.interface import interface_size
from keras_memory.recurrent.interface import split_interface
from keras_memory.recurrent.layer import MemoryRNN


class NTMState(NamedTuple):
    """The state of an NTM between steps. The first axis is the batch, B.

    Args:
        reads: (B, R, W) read vectors of the last step.
        memory: (B, N, W) slot contents.
        read_weighting: (B, R, N), over the slots.
        write_weighting: (B, H, N), over the slots.
        controller: tuple with the state of each controller, nested as Keras
            nests it.
    """

    reads: Any
    memory: Any
    read_weighting: Any
    write_weighting: Any
    controller: Any = ()


class MERLINState(NamedTuple):
    """The state of an NTM with sequential writing between steps.

    Args:
        reads, memory, read_weighting, controller: as in `NTMState`.
        write_weighting: (B, 1, N), 1 on the slot that was written.
        retroactive_weighting: (B, 1, N), the write weighting of the second
            halves of slots; 0 without retroactive writing.
        usage: (B, N), -1 until a slot is first written, then the sum of its
            read weightings since.
    """

    reads: Any
    memory: Any
    read_weighting: Any
    write_weighting: Any
    retroactive_weighting: Any
    usage: Any
    controller: Any = ()


class NTMInterface(NamedTuple):
    """The controller's parameters for the heads.

    K heads address the memory, read heads first: R + H heads, or R if writing
    is sequential. Unused parts are None.

    Args:
        key: (B, K, W) look-up vectors, k.
        strength: (B, K), above 0, beta.
        interpolation_gate: (B, K) in (0, 1), g.
        shift: (B, K, 2 shift_range + 1) distribution over offsets, s.
        sharpening: (B, K), at least 1, gamma.
        erase_vector: (B, H, W) in (0, 1), e.
        add_vector: (B, H, W), a; (B, 1, W / 2) in retroactive writing.
    """

    key: Any
    strength: Any
    interpolation_gate: Any
    shift: Any
    sharpening: Any
    erase_vector: Any
    add_vector: Any


@dataclasses.dataclass(frozen=True, eq=False)
class NTMAccess:
    """Addressing, reading and writing. `NTMLayer` documents the arguments."""

    memory_slots: int = 128
    slot_size: int = 20
    read_heads: int = 1
    write_heads: int = 1
    _: dataclasses.KW_ONLY
    head_order: str | list[str] | tuple[str, ...] = "parallel"
    addressing: str = "content_and_location"
    shift_range: int = 1
    erase: bool = True
    writing: str = "addressed"
    retroactive_discount: float | None = None
    interface_clip: float | None = None
    key_activation: Activation = "tanh"
    add_activation: Activation = "tanh"
    strength_activation: Activation = "softplus"
    initial_memory: str | float = "constant"
    initial_reads: str | float = "constant"
    initial_weighting: str | float = "constant"
    norm_epsilon: float | None = None
    product_epsilon: float = 0.0

    def split(self, interface):
        """(B, interface_size) -> `NTMInterface`, with activations."""
        if self.interface_clip is not None:
            interface = ops.clip(
                interface, -self.interface_clip, self.interface_clip
            )
        return split_interface(interface, self.parts, self.activations)

    def address(self, memory, interface, previous, heads):
        """Content weighting and final weighting of a slice of the heads."""
        content = content_weighting(  # eqs. 5, 6
            memory,
            interface.key[:, heads],
            interface.strength[:, heads],
            self.norm_epsilon,
            self.product_epsilon,
        )
        if not self.by_location:
            return content, content
        weighting = interpolate(  # eq. 7
            content,
            previous[:, heads],
            interface.interpolation_gate[:, heads],
        )
        weighting = shift(weighting, interface.shift[:, heads])  # eq. 8
        weighting = sharpen(weighting, interface.sharpening[:, heads])  # eq. 9
        return content, weighting

    def step(self, interface, state):
        """All heads address the memory and read it or write to it."""
        interface = self.split(interface)
        previous = state.read_weighting
        if not self.sequential:
            previous = ops.concatenate(
                [previous, state.write_weighting], axis=1
            )
        reads, reading, writing, contents = [], [], [], {}
        for heads, readers, writers in self.turns:
            if heads.stop > heads.start:
                content, weighting = self.address(
                    state.memory, interface, previous, heads
                )
                contents[heads.start] = content
                # `split`, since the gradient of a slice is padded with zeros.
                of_readers, of_writers = ops.split(weighting, [readers], axis=1)
            if readers:
                reading.append(of_readers)
                reads.append(read(state.memory, reading[-1]))  # eq. 2
                if self.sequential:
                    usage = add_usage(state.usage, reading[-1])
                    state = state._replace(usage=usage)
            if writers.stop > writers.start:
                if self.sequential:
                    state = self.write_next(state, interface.add_vector)
                    writing.append(state.write_weighting)
                else:
                    writing.append(of_writers)
                    memory = self.write(
                        state.memory, interface, writing[-1], writers
                    )
                    state = state._replace(memory=memory)
        state = state._replace(
            reads=_join(reads),
            read_weighting=_join(reading),
            write_weighting=_join(writing),
        )
        inside = {
            "content_weighting": _join([contents[h] for h in sorted(contents)])
        }
        for name, part in interface._asdict().items():
            if part is not None:
                inside[name] = part
        return state, inside

    def write(self, memory, interface, weighting, heads):
        """Writes to the memory with a slice of the write heads."""
        erase = interface.erase_vector
        groups = [slice(None)]  # of the heads in `weighting`
        if self.head_order == "writes_in_turn":
            groups = [slice(h, h + 1) for h in range(self.write_heads)]
        for group in groups:
            memory = erase_and_add(  # eqs. 3, 4
                memory,
                weighting[:, group],
                erase[:, heads][:, group] if self.erase else None,
                interface.add_vector[:, heads][:, group],
            )
        return memory

    def write_next(self, state, add_vector):
        """Writes to the first unwritten slot or, if there is none, to the slot
        that was read least (MERLIN)."""
        weighting = least_used(state.usage)
        state = state._replace(usage=mark_used(state.usage, weighting))
        discount = self.retroactive_discount
        if discount is not None:
            later = (
                discount * state.retroactive_weighting
                + (1.0 - discount) * state.write_weighting  # of t - 1
            )
            if self.erase:  # overwritten slots get no retroactive writes
                later = later * (1.0 - weighting)
            nothing = ops.zeros_like(add_vector)
            memory = erase_and_add(
                state.memory,
                later,
                None,
                ops.concatenate([nothing, add_vector], axis=-1),
            )
            state = state._replace(memory=memory, retroactive_weighting=later)
            add_vector = ops.concatenate([add_vector, nothing], axis=-1)
        erase = ops.ones_like(add_vector) if self.erase else None
        return state._replace(
            memory=erase_and_add(state.memory, weighting, erase, add_vector),
            write_weighting=weighting,
        )

    def __post_init__(self):
        object.__setattr__(self, "head_order", plain_tuple(self.head_order))
        check_sizes_of_memory(self)
        check_size("shift_range", self.shift_range, least=0)
        check_clip("interface_clip", self.interface_clip)
        check_bool("erase", self.erase)
        for name in ("initial_memory", "initial_reads", "initial_weighting"):
            StateSpec.check(name, getattr(self, name))
        check_closed("norm_epsilon", self.norm_epsilon, 1e-30, or_none=True)
        check_closed("product_epsilon", self.product_epsilon, 0)
        if is_number(self.initial_weighting) and self.initial_weighting < 0:
            raise ValueError(
                "`initial_weighting` must be at least 0, like all weightings. "
                f"Received: initial_weighting={self.initial_weighting!r}"
            )
        self._check_writing()
        order, heads = self.head_order, (self.read_heads, self.write_heads)
        by_name = isinstance(order, str) and order in (
            "parallel",
            "writes_in_turn",
        )
        if by_name and order == "writes_in_turn":
            check_layers("write_heads", self.write_heads)
        if not by_name and (
            not isinstance(order, tuple)
            or (order.count("read"), order.count("write")) != heads
            or len(order) != sum(heads)
        ):
            raise ValueError(
                '`head_order` must be "parallel", "writes_in_turn", or name '
                "each head once: "
                f'{self.read_heads} times "read" (`read_heads`) and '
                f'{self.write_heads} times "write" (`write_heads`). '
                f"Received: head_order={self.head_order!r}"
            )
        choices = "content_and_location", "content"
        check_one_of("addressing", self.addressing, choices)
        if self.by_location and 2 * self.shift_range + 1 > self.memory_slots:
            raise ValueError(
                "`shift_range` must satisfy 2 * shift_range + 1 <= "
                "memory_slots, or shifts overlap. Received: "
                f"shift_range={self.shift_range}, "
                f"memory_slots={self.memory_slots}"
            )
        self.activations  # noqa: B018, raises if one is unknown

    def _check_writing(self):
        check_one_of("writing", self.writing, ("addressed", "sequential"))
        if self.sequential and self.write_heads != 1:
            raise ValueError(
                '`write_heads` must be 1 with writing="sequential", which '
                "writes one slot per step. "
                f"Received: write_heads={self.write_heads!r}"
            )
        discount = self.retroactive_discount
        if discount is None:
            return
        if not (is_number(discount) and 0.0 <= discount < 1.0):
            raise ValueError(
                "`retroactive_discount` must be in [0, 1), or None for no "
                "retroactive writing. "
                f"Received: retroactive_discount={discount!r}"
            )
        if not self.sequential or self.slot_size % 2:
            raise ValueError(
                '`retroactive_discount` needs writing="sequential" and an even '
                "`slot_size`: it writes later vectors to the second half of a "
                "slot. Received: "
                f"writing={self.writing!r}, slot_size={self.slot_size!r}"
            )

    @functools.cached_property
    def sequential(self):
        return self.writing == "sequential"

    @functools.cached_property
    def by_location(self):
        return self.addressing == "content_and_location"

    @functools.cached_property
    def parts(self):
        """Shape of each part of the interface; None for unused parts."""
        heads = self.read_heads + (0 if self.sequential else self.write_heads)
        shifts = 2 * self.shift_range + 1
        halves = 1 if self.retroactive_discount is None else 2
        learns_erase = self.erase and not self.sequential
        return NTMInterface(
            key=(heads, self.slot_size),
            strength=(heads,),
            interpolation_gate=(heads,) if self.by_location else None,
            shift=(heads, shifts) if self.by_location else None,
            sharpening=(heads,) if self.by_location else None,
            erase_vector=(
                (self.write_heads, self.slot_size) if learns_erase else None
            ),
            add_vector=(self.write_heads, self.slot_size // halves),
        )

    @functools.cached_property
    def activations(self):
        """Activation of each part of the interface."""
        return NTMInterface(
            key=activation_by_name(self.key_activation),
            strength=activation_by_name(self.strength_activation),
            interpolation_gate=keras.activations.sigmoid,
            shift=softmax,
            sharpening=oneplus,
            erase_vector=keras.activations.sigmoid,
            add_vector=activation_by_name(self.add_activation),
        )

    @functools.cached_property
    def interface_size(self):
        return interface_size(self.parts)

    @functools.cached_property
    def read_size(self):
        return self.read_heads * self.slot_size

    @property
    def initial_state(self):
        first_slot = np.zeros(self.memory_slots, "float32")
        first_slot[0] = 1.0

        def weighting(heads):
            return StateSpec(
                (heads, self.memory_slots),
                # Content addressing never uses it: there is nothing to learn.
                self.initial_weighting if self.by_location else "constant",
                constant=first_slot,
                initializer=keras.initializers.RandomNormal(stddev=1.0),
                activation=softmax,
                into_range=not_negative,
            )

        reach = 1.0 / math.sqrt(self.memory_slots + self.slot_size)
        state = NTMState(
            reads=StateSpec(
                (self.read_heads, self.slot_size),
                self.initial_reads,
                initializer=keras.initializers.RandomNormal(stddev=0.05),
            ),
            memory=StateSpec(
                (self.memory_slots, self.slot_size),
                self.initial_memory,
                constant=1e-6,
                initializer=keras.initializers.RandomUniform(-reach, reach),
                transposed=True,
            ),
            read_weighting=weighting(self.read_heads),
            write_weighting=weighting(self.write_heads),
        )
        if not self.sequential:
            return state
        no_weighting = StateSpec((1, self.memory_slots))
        fields = {**state._asdict(), "write_weighting": no_weighting}
        return MERLINState(
            **fields,
            retroactive_weighting=no_weighting,
            usage=StateSpec((self.memory_slots,), constant=-1.0),
        )

    @property
    def turns(self):
        """Groups of heads that act at once; the groups act one after another.

        Each is (slice of the addressing heads, number of read heads among
        them, slice of the write heads). Read heads come before write heads.
        """
        first = {"read": 0, "write": self.read_heads}
        if isinstance(self.head_order, str):
            groups = [(0, self.read_heads + self.write_heads)]
        else:
            groups = []
            for kind in self.head_order:
                groups.append((first[kind], first[kind] + 1))
                first[kind] += 1
        heads, _ = self.parts.key
        return [
            (
                slice(start, min(stop, heads)),
                max(0, min(stop, self.read_heads) - start),
                slice(
                    max(0, start - self.read_heads),
                    max(0, stop - self.read_heads),
                ),
            )
            for start, stop in groups
        ]


def _join(heads):
    return heads[0] if len(heads) == 1 else ops.concatenate(heads, axis=1)


if TYPE_CHECKING:

    class NTMArguments(NTMAccess, CellArguments):
        """For type checkers: attributes of `NTMCell` and `NTMLayer`."""

else:
    NTMArguments = object


@keras.saving.register_keras_serializable(package="keras_memory")
class NTMCell(MemoryCell, NTMArguments, access=NTMAccess):
    """One step of a Neural Turing Machine, for `NTMLayer` or Keras's `RNN`.

    For arguments, equations, state and departures see `NTMLayer`, which passes
    its arguments on to its cell.

    Example:

    >>> cell = keras_memory.NTMCell(3, memory_slots=16, slot_size=5)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])
    """

    if TYPE_CHECKING:  # `MemoryCell` takes the fields of the access

        def __init__(self, units: int | None, *args: Any, **kwargs: Any): ...


@keras.saving.register_keras_serializable(package="keras_memory")
class NTMLayer(MemoryRNN, NTMArguments, cell=NTMCell):
    """A Neural Turing Machine over sequences.

    A controller sees the input and the previous reads. It tells each head
    where to focus on a memory of N slots of width W, by content and by
    location. Read heads return the weighted sum of the slots; write heads
    erase and add.

    Equations: the controller's output is projected to an `NTMInterface`
    (`NTMAccess.split`); content weighting, eqs. 5-6; interpolation, eq. 7;
    shift, eq. 8; sharpening, eq. 9 (`NTMAccess.address`, and
    `addressing`); reading, eq. 2; erasing and adding, eqs. 3-4
    (`NTMAccess.step` and `addressing/slots.py`); MERLIN's sequential and
    retroactive writing, Wayne et al. 2018, Methods (`NTMAccess.write_next`).

    State: an `NTMState`, or a `MERLINState`; reads start at `initial_reads`,
    memory at `initial_memory`, weightings at `initial_weighting`; the heads
    update all of them at every step. A `MERLINState` starts with write
    weightings of 0 and usages of -1, which marks a slot never written. Under
    16-bit policies the order of first writes is exact, but usage is rounded
    after each step and stops growing at about 4 to 8 reads. Of slots with equal
    usage the first is overwritten.

    Masking and dtype: see `MemoryCell`.

    Departures: `norm_epsilon` in the norms and an epsilon in the sharpening
    keep gradients finite where the paper's formulas divide zero by zero
    (`test_accesses.py`, singular points). MERLIN adds to the slot that it
    overwrites; here it is cleared first, together with its retroactive
    weighting, unless `erase=False` (`test_ntm.py`, sequential writing).

    Args:
        units: int, at least 1, width of the output. None: the output is the
            features, concat(controller output, reads), without projection.
        memory_slots: int N, at least 1. Default 128.
        slot_size: int W, at least 1. Default 20.
        read_heads: int R, at least 1. Default 1.
        write_heads: int H, at least 1. Default 1.
        head_order: `"parallel"` (default): all heads address and read the
            memory of the step before, then all erase, then all add.
            `"writes_in_turn"`: the same, but each write head also erases the
            additions of the write heads before it (Collier & Beel 2018). Or a
            sequence such as `("read", "write", "read", "write")`: the heads
            act one after the other and see each other's writes; the i-th
            `"read"` is read head i. The paper leaves the order open.
        addressing: `"content_and_location"` (default), or `"content"`: the
            content weighting alone, without eqs. 7-9.
        shift_range: int, at least 0, largest shift in slots. Default 1.
        erase: bool. False leaves eq. 3 out: heads only add. Default True.
        writing: `"addressed"` (default): write heads address the memory as
            read heads do. `"sequential"`: as in MERLIN, step t writes to slot
            t; after N steps, to the slot that was read least since its first
            write, which is often the newest: N should be at least the number
            of steps. The slot is overwritten; with `erase=False` the new
            vector is added to its contents. Needs `write_heads=1`; the write
            head then has no key, strength and so on, and no erase vector.
        retroactive_discount: float in [0, 1) or None (default), gamma of
            MERLIN's retroactive writing. Needs sequential writing and an even
            W. Add vectors then have width W / 2. Each is written to the first
            half of its slot, and to the second half of the slots written
            before: n steps back, times (1 - gamma) gamma^(n - 1).
        interface_clip: positive float or None (default); clips the interface
            to +- this before its activations.
        key_activation: Keras activation of keys. Default `"tanh"`.
        add_activation: Keras activation of add vectors. Default `"tanh"`.
        strength_activation: Keras activation of strengths, with values above
            0; or `"oneplus"`. Default `"softplus"`.
        initial_memory: `"learned"`, `"random"` (drawn once, from +- 1 /
            sqrt(N + W), and kept), a number, or `"constant"` (default): 1e-6.
        initial_reads: as `initial_memory`; `"constant"` (default) is 0.
        initial_weighting: the same, for all heads; `"constant"` (default) is
            1 on the first slot and 0 elsewhere, `"learned"` and `"random"`
            are a softmax of weights. Unused with addressing="content", and by
            a sequential write head.
        norm_epsilon: float, at least 1e-30, added inside the root of each
            norm. Default None: 1e-8, in float64 1e-16.
        product_epsilon: float, at least 0, added to the product of the norms
            of key and slot. Default 0.

    Raises:
        ValueError: an argument is out of range.

    Call arguments and further errors: see `MemoryRNN`.

    Example:

    >>> layer = keras_memory.NTMLayer(3, memory_slots=16, slot_size=5,
    ...                               return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])
    >>> inside = keras_memory.trace(layer, np.zeros((2, 7, 4), "float32"))
    >>> inside["write_weighting"].shape
    (2, 7, 1, 16)

    References:
        Graves, Wayne, Danihelka (2014), Neural Turing Machines,
        https://arxiv.org/abs/1410.5401
        Collier, Beel (2018), Implementing Neural Turing Machines (initial
        memory), https://arxiv.org/abs/1807.08518
        Wayne et al. (2018), Unsupervised Predictive Memory in a Goal-Directed
        Agent (MERLIN), https://arxiv.org/abs/1803.10760
    """

    def __init__(
        self,
        units: int | None,
        memory_slots: int = 128,
        slot_size: int = 20,
        read_heads: int = 1,
        write_heads: int = 1,
        *,
        head_order: str | list[str] | tuple[str, ...] = "parallel",
        addressing: str = "content_and_location",
        shift_range: int = 1,
        erase: bool = True,
        writing: str = "addressed",
        retroactive_discount: float | None = None,
        interface_clip: float | None = None,
        key_activation: Activation = "tanh",
        add_activation: Activation = "tanh",
        strength_activation: Activation = "softplus",
        initial_memory: str | float = "constant",
        initial_reads: str | float = "constant",
        initial_weighting: str | float = "constant",
        norm_epsilon: float | None = None,
        product_epsilon: float = 0.0,
        num_layers: int = 1,
        share_memory: bool = True,
        controller: str | keras.layers.Layer = "lstm",
        controller_units: int = 100,
        controller_layers: int = 1,
        controller_dropout: float = 0.0,
        controller_clip: float | None = None,
        controller_state_clip: float | None = None,
        initial_controller_state: str | float = "constant",
        activation: Activation | None = None,
        clip_value: float | None = None,
        interface_layer_norm: bool = False,
        bypass_dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        kernel_constraint: Any = None,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        loop: str = "auto",
        recompute: int | str | None = None,
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**given(locals()))
        self.cell: NTMCell
