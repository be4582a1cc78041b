"""The Differentiable Neural Computer (Graves et al. 2016, Nature 538, 471-476).

Equations have the names of the paper's Methods section, which does not number
them.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.activations import activation_by_name
from keras_memory.addressing.activations import into_unit_range
from keras_memory.addressing.activations import oneplus
from keras_memory.addressing.activations import softmax
from keras_memory.addressing.activations import sums_into_unit_range
from keras_memory.addressing.content import content_weighting
from keras_memory.addressing.gradients import saved_value
from keras_memory.addressing.linkage import follow_links
from keras_memory.addressing.linkage import follow_sparse_links
from keras_memory.addressing.linkage import linkage_after_write
from keras_memory.addressing.linkage import precedence_after_write
from keras_memory.addressing.linkage import sparse_linkage_after_write
from keras_memory.addressing.location import sharpen
from keras_memory.addressing.slots import erase_and_add
from keras_memory.addressing.slots import read
from keras_memory.addressing.usage import allocation
from keras_memory.addressing.usage import retention
from keras_memory.addressing.usage import usage_after_write
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import given
from keras_memory.checks import check_bool
from keras_memory.checks import check_closed
from keras_memory.checks import check_layers
from keras_memory.checks import check_size
from keras_memory.hints import Activation
from keras_memory.hints import Shape
from keras_memory.recurrent.cell import CellArguments
from keras_memory.recurrent.cell import MemoryCell
from keras_memory.recurrent.interface import StateSpec
from keras_memory.recurrent.interface import check_bytes_of_state
from keras_memory.recurrent.interface import check_sizes_of_memory
from keras_memory.recurrent.interface import interface_size
from keras_memory.recurrent.interface import split_interface
from keras_memory.recurrent.layer import MemoryRNN


class DNCState(NamedTuple):
    """The state of a DNC between steps. The first axis is the batch, B.

    Args:
        reads: (B, R, W) read vectors of the last step.
        memory: (B, N, W) slot contents.
        usage: (B, N) in [0, 1], how much each slot is in use.
        linkage: (B, H, N, N) in [0, 1]; entry i, j: slot i was written right
            after slot j. With `sparse_links` (B, H, N, K), the K entries kept
            per row i. () without linkage.
        precedence: (B, H, N) in [0, 1], how much each slot was the last one
            written. () without linkage.
        read_weighting: (B, R, N), over the slots.
        write_weighting: (B, H, N), over the slots.
        controller: tuple with the state of each controller, nested as Keras
            nests it.
        link_columns: (B, H, N, K) whole numbers in [0, N), the slots j of the
            entries of `linkage`. () without `sparse_links`.
    """

    reads: Any
    memory: Any
    usage: Any
    linkage: Any
    precedence: Any
    read_weighting: Any
    write_weighting: Any
    controller: Any = ()
    link_columns: Any = ()


class DNCInterface(NamedTuple):
    """The controller's parameters for the heads. Unused parts are None.

    Args:
        read_key: (B, R, W) look-up vectors, k^r.
        read_strength: (B, R), beta^r.
        write_key: (B, H, W) look-up vectors, k^w.
        write_strength: (B, H), beta^w.
        erase_vector: (B, H, W) in (0, 1), e.
        add_vector: (B, H, W), v.
        free_gate: (B, R) in (0, 1), f: frees the slots read the step before.
        allocation_gate: (B, H) in (0, 1), g_a: free slots (1) or content (0).
        write_gate: (B, H) in (0, 1), g_w: whether to write at all.
        read_mode: (B, R, 2 H + 1), pi, a distribution over the backward
            weightings of the H write heads, the content weighting, and their
            forward weightings. None without linkage.
        read_mask: (B, R, W) in (0, 1), with content masks.
        write_mask: (B, H, W) in (0, 1), with content masks.
        forward_sharpening: (B, R, H), at least 1, with link sharpening.
        backward_sharpening: (B, R, H), at least 1, with link sharpening.
    """

    read_key: Any
    read_strength: Any
    write_key: Any
    write_strength: Any
    erase_vector: Any
    add_vector: Any
    free_gate: Any
    allocation_gate: Any
    write_gate: Any
    read_mode: Any
    read_mask: Any
    write_mask: Any
    forward_sharpening: Any
    backward_sharpening: Any


@dataclasses.dataclass(frozen=True, eq=False)
class DNCAccess:
    """Addressing, reading and writing. `DNCLayer` documents the arguments."""

    memory_slots: int = 64
    slot_size: int = 16
    read_heads: int = 4
    write_heads: int = 1
    _: dataclasses.KW_ONLY
    linkage: bool = True
    sparse_links: int | None = None
    content_masks: bool = False
    deallocation: bool = False
    link_sharpening: bool = False
    usage_gradient: bool = True
    key_activation: Activation = "linear"
    add_activation: Activation = "linear"
    strength_activation: Activation = "oneplus"
    initial_memory: str | float = "constant"
    norm_epsilon: float | None = None
    product_epsilon: float = 0.0
    usage_epsilon: float | None = None

    def step(self, interface, state):
        """Writes to the memory, then reads it."""
        interface = self.split(interface)
        psi = retention(interface.free_gate, state.read_weighting)  # psi_t
        usage = self._usage(state, psi)  # u_t
        write_weighting, writing = self._write_weighting(
            interface, state.memory, usage
        )  # w^w_t
        memory = self._write(interface, state.memory, write_weighting, psi)
        links, columns, precedence = self._link(state, write_weighting)
        read_weighting, reading = self._read_weighting(
            interface, memory, links, columns, state.read_weighting
        )  # w^r_t
        after = state._replace(
            reads=read(memory, read_weighting),  # r_t
            memory=memory,  # M_t
            usage=usage,
            linkage=links,  # L_t
            precedence=precedence,  # p_t
            read_weighting=read_weighting,
            write_weighting=write_weighting,
            link_columns=columns,
        )
        parts = interface._asdict().items()
        inside = {name: part for name, part in parts if part is not None}
        return after, {**reading, **writing, "retention": psi, **inside}

    def _usage(self, state, psi):
        """u_t, from the reads and writes of the step before."""
        written = state.write_weighting  # w^w_{t-1}
        if not self.usage_gradient:
            written = ops.stop_gradient(written)
        return usage_after_write(state.usage, written) * psi

    def _write_weighting(self, interface, memory, usage):
        """w^w_t = g^w (g^a a_t + (1 - g^a) c^w_t)."""
        content = self.by_content(  # c^w_t
            memory,
            interface.write_key,  # k^w
            interface.write_strength,  # beta^w
            interface.write_mask,
        )
        write_gate = interface.write_gate  # g^w
        allocation_gate = interface.allocation_gate  # g^a
        allocated = self.allocate(usage, allocation_gate * write_gate)  # a_t
        gate = allocation_gate[:, :, None]
        weighting = write_gate[:, :, None] * (
            gate * allocated + (1.0 - gate) * content
        )
        return weighting, {
            "write_content_weighting": content,
            "allocation_weighting": allocated,
        }

    def _write(self, interface, memory, write_weighting, psi):
        """M_t = M_{t-1} o (E - w^w_t e^T) + w^w_t v^T; with `deallocation`
        M_{t-1} is first multiplied by psi_t."""
        if self.deallocation:
            memory = memory * psi[:, None]
        return erase_and_add(
            memory,
            write_weighting,
            interface.erase_vector,  # e
            interface.add_vector,  # v
        )

    def _link(self, state, write_weighting):
        """L_t, its columns if links are sparse, and p_t; () for unused ones."""
        if not self.linkage:
            return (), (), ()
        before = state.precedence, write_weighting
        precedence = precedence_after_write(*before)
        if self.sparse_links is None:
            return linkage_after_write(state.linkage, *before), (), precedence
        links, columns = sparse_linkage_after_write(
            state.linkage, state.link_columns, *before
        )
        return links, columns, precedence

    def _read_weighting(self, interface, memory, links, columns, previous):
        """w^r_t = pi_1 b_t + pi_2 c^r_t + pi_3 f_t, where b_t and f_t follow
        the links of each write head from w^r_{t-1}, `previous`."""
        content = self.by_content(  # c^r_t
            memory,
            interface.read_key,  # k^r
            interface.read_strength,  # beta^r
            interface.read_mask,
        )
        inside = {"read_content_weighting": content}
        if not self.linkage:
            return content, inside
        if self.sparse_links is None:
            forward, backward = follow_links(links, previous)  # f_t, b_t
        else:
            forward, backward = follow_sparse_links(links, columns, previous)
        if self.link_sharpening:
            forward = _sharpen(forward, interface.forward_sharpening)
            backward = _sharpen(backward, interface.backward_sharpening)
        inside["forward_weighting"] = forward
        inside["backward_weighting"] = backward
        mode = interface.read_mode[:, :, :, None]  # pi
        heads = self.write_heads
        weighting = saved_value(
            ops.sum(mode[:, :, :heads] * backward, axis=2)
            + mode[:, :, heads] * content
            + ops.sum(mode[:, :, heads + 1 :] * forward, axis=2)
        )
        return weighting, inside

    def by_content(self, memory, key, strength, mask):
        """C(M, k, beta), with masks as in Csordas & Schmidhuber 2019."""
        return content_weighting(
            memory,
            key,
            strength,
            self.norm_epsilon,
            self.product_epsilon,
            mask,
        )

    def allocate(self, usage, gate):
        """Allocation weighting of each write head (B, H, N). The usage that a
        head sees includes the allocations of the heads before it."""
        weightings = []
        for head in range(self.write_heads):
            weightings.append(allocation(usage, self.usage_epsilon))
            taken = gate[:, head, None] * weightings[-1]
            usage = usage + (1.0 - usage) * taken
        return ops.stack(weightings, axis=1)

    def split(self, interface):
        """(B, interface_size) -> `DNCInterface`, with activations."""
        return split_interface(interface, self.parts, self.activations)

    def __post_init__(self):
        check_sizes_of_memory(self)
        check_layers("write_heads", self.write_heads)
        for name in (
            "linkage",
            "content_masks",
            "deallocation",
            "link_sharpening",
            "usage_gradient",
        ):
            check_bool(name, getattr(self, name))
        StateSpec.check("initial_memory", self.initial_memory)
        check_closed("norm_epsilon", self.norm_epsilon, 1e-30, or_none=True)
        check_closed("product_epsilon", self.product_epsilon, 0)
        check_closed(
            "usage_epsilon", self.usage_epsilon, 1e-30, 0.1, or_none=True
        )
        if self.sparse_links is not None:
            check_size(
                "sparse_links", self.sparse_links, alternatives=" or None"
            )
            if not self.linkage or self.sparse_links > self.memory_slots:
                raise ValueError(
                    "`sparse_links` must be at most `memory_slots`, and needs "
                    "`linkage=True`: it is the number of links kept per slot. "
                    f"Received: sparse_links={self.sparse_links}, "
                    f"linkage={self.linkage}, memory_slots={self.memory_slots}"
                )
        if self.linkage:
            self._check_bytes_of_links()
        if self.link_sharpening and not self.linkage:
            raise ValueError(
                "`link_sharpening` needs `linkage=True`: it sharpens the "
                "weightings that follow the links. Received: linkage=False, "
                "link_sharpening=True"
            )
        self.activations  # noqa: B018, raises if one is unknown

    def _check_bytes_of_links(self):
        names, instead = ["write_heads", "memory_slots", "sparse_links"], ""
        if self.sparse_links is None:
            names[2] = "memory_slots"
            instead = (
                "Set `sparse_links`, the number of links kept per slot, or "
                "`linkage=False`."
            )
        check_bytes_of_state(self, "The linkage", names, instead)

    @functools.cached_property
    def parts(self):
        """Shape of each part of the interface; None for unused parts."""
        of_reads = (self.read_heads, self.slot_size)
        of_writes = (self.write_heads, self.slot_size)
        of_links = (self.read_heads, self.write_heads)
        modes = (self.read_heads, 2 * self.write_heads + 1)
        return DNCInterface(
            read_key=of_reads,
            read_strength=(self.read_heads,),
            write_key=of_writes,
            write_strength=(self.write_heads,),
            erase_vector=of_writes,
            add_vector=of_writes,
            free_gate=(self.read_heads,),
            allocation_gate=(self.write_heads,),
            write_gate=(self.write_heads,),
            read_mode=modes if self.linkage else None,
            read_mask=of_reads if self.content_masks else None,
            write_mask=of_writes if self.content_masks else None,
            forward_sharpening=of_links if self.link_sharpening else None,
            backward_sharpening=of_links if self.link_sharpening else None,
        )

    @functools.cached_property
    def activations(self):
        """Activation of each part of the interface."""
        return DNCInterface(
            read_key=activation_by_name(self.key_activation),
            read_strength=activation_by_name(self.strength_activation),
            write_key=activation_by_name(self.key_activation),
            write_strength=activation_by_name(self.strength_activation),
            erase_vector=keras.activations.sigmoid,
            add_vector=activation_by_name(self.add_activation),
            free_gate=keras.activations.sigmoid,
            allocation_gate=keras.activations.sigmoid,
            write_gate=keras.activations.sigmoid,
            read_mode=softmax,
            read_mask=keras.activations.sigmoid,
            write_mask=keras.activations.sigmoid,
            forward_sharpening=oneplus,
            backward_sharpening=oneplus,
        )

    @functools.cached_property
    def interface_size(self):
        return interface_size(self.parts)

    @functools.cached_property
    def read_size(self):
        return self.read_heads * self.slot_size

    @property
    def initial_state(self):
        slots, heads = self.memory_slots, self.write_heads
        weighting = functools.partial(
            StateSpec, into_range=sums_into_unit_range
        )
        links, columns = (), ()
        if self.sparse_links is not None:
            of_rows = (heads, slots, self.sparse_links)
            links = StateSpec(
                of_rows, transposed=True, into_range=_rows_into_unit_range
            )
            columns = StateSpec(
                of_rows, constant=np.arange(self.sparse_links), transposed=True
            )
        elif self.linkage:
            links = StateSpec(
                (heads, slots, slots), into_range=_links_into_unit_range
            )
        return DNCState(
            reads=StateSpec((self.read_heads, self.slot_size)),
            memory=StateSpec(
                (slots, self.slot_size),
                self.initial_memory,
                initializer=keras.initializers.RandomNormal(stddev=0.05),
                transposed=True,
            ),
            usage=StateSpec((slots,), into_range=into_unit_range),
            linkage=links,
            precedence=weighting((heads, slots)) if self.linkage else (),
            read_weighting=weighting((self.read_heads, slots)),
            write_weighting=weighting((heads, slots)),
            link_columns=columns,
        )


# These functions bring given states into the ranges that steps keep. Outside of
# them usage and linkage would grow at each step.


def _rows_into_unit_range(x):
    return into_unit_range(x, lambda x: ops.sum(x, axis=-2, keepdims=True))


def _links_into_unit_range(x):
    def largest(x):
        rows, columns = ops.sum(x, axis=-1), ops.sum(x, axis=-2)
        largest_sum = ops.max(ops.maximum(rows, columns), axis=-1, initial=0.0)
        return largest_sum[:, :, None, None]

    return into_unit_range(x, largest)


def _sharpen(weighting, sharpening):
    """Sharpens (B, R, H, N): one weighting per pair of heads."""
    slots = weighting.shape[-1]
    pairs = weighting.shape[1] * weighting.shape[2]
    sharpened = sharpen(
        ops.reshape(weighting, (-1, pairs, slots)),
        ops.reshape(sharpening, (-1, pairs)),
    )
    return ops.reshape(sharpened, (-1, *weighting.shape[1:]))


if TYPE_CHECKING:

    class DNCArguments(DNCAccess, CellArguments):
        """For type checkers: attributes of `DNCCell` and `DNCLayer`."""

else:
    DNCArguments = object


@keras.saving.register_keras_serializable(package="keras_memory")
class DNCCell(MemoryCell, DNCArguments, access=DNCAccess, controller_units=64):
    """One step of a Differentiable Neural Computer, for `DNCLayer` or Keras's
    `RNN`.

    For arguments, equations, state and departures see `DNCLayer`, which passes
    its arguments on to its cell.

    Example:

    >>> cell = keras_memory.DNCCell(3, memory_slots=16, slot_size=5)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])
    """

    if TYPE_CHECKING:  # `MemoryCell` takes the fields of the access

        def __init__(self, units: int | None, *args: Any, **kwargs: Any): ...

    def build(self, input_shape: Shape) -> None:
        largest = {"float16": 2048, "bfloat16": 256}.get(self.compute_dtype)
        if self.sparse_links and largest and self.memory_slots > largest:
            raise ValueError(
                f"`memory_slots` must be at most {largest} with `sparse_links` "
                f"in {self.compute_dtype}, which represents slot indices "
                "exactly only up to there. "
                f"Received: memory_slots={self.memory_slots}"
            )
        super().build(input_shape)


@keras.saving.register_keras_serializable(package="keras_memory")
class DNCLayer(MemoryRNN, DNCArguments, cell=DNCCell):
    """A Differentiable Neural Computer over sequences.

    A controller sees the input and the previous reads. It tells the heads
    where to act on a memory of N slots of width W. Write heads find slots by
    content, or allocate free slots. Links record the order in which slots were
    written. Read heads find slots by content, or follow the links forward and
    backward.

    Equations (Graves et al. 2016, Methods, by their names there), all in
    `DNCAccess.step` and `addressing`: interface parameters
    (`DNCAccess.split`), content-based addressing (`content_weighting`),
    dynamic memory allocation (`retention`, `usage_after_write`,
    `allocation`), write weighting, temporal memory linkage
    (`precedence_after_write`, `linkage_after_write`, `follow_links`), read
    weighting. Masked content addressing, de-allocation and link sharpening:
    Csordas & Schmidhuber 2019. Bypass dropout and layer normalization of the
    interface: Franke et al. 2018.

    State: a `DNCState`, all zeros at first, except the memory, which starts at
    `initial_memory`, and the columns of sparse links, which start at 0 to
    K - 1 in each row. The heads update all of it at every step. If several
    blocks have a memory each, the state is a tuple of `DNCState`s. Under 16-bit
    policies the state is rounded after each step, so errors of usage and
    linkage add up.

    Masking and dtype: see `MemoryCell`.

    Departures: `norm_epsilon` in the norms and `usage_epsilon` in the
    allocation keep gradients finite where the paper's formulas divide zero by
    zero or sort numbers that are equal (`test_accesses.py`, singular points).
    The paper has one write head; several write heads follow DeepMind's code:
    each has its own links, and the usage that its allocation sees includes the
    allocations of the heads before it. With several `controller_layers`,
    interface and output see only the last layer, as in other implementations;
    in the paper they see all. Bypass dropout drops the same units at all steps
    of a sequence; the paper draws new ones at each step.

    Args:
        units: int, at least 1, width of the output. None: the output is the
            features, concat(controller output, reads), without projection.
        memory_slots: int N, at least 1. Default 64.
        slot_size: int W, at least 1. Default 16.
        read_heads: int R, at least 1. Default 4.
        write_heads: int H, from 1 to 1024. Default 1.
        linkage: bool. False leaves out links, precedence and read modes: read
            heads find slots by content alone, and a step costs N instead of
            N^2. Default True.
        sparse_links: int K, at least 1 and at most N. Each slot keeps its K
            largest links. Only the K largest entries of write weighting and
            precedence make new links. A step then costs N K instead of N^2. In
            bfloat16 N is at most 256, in float16 2048, so that columns are
            exact. Default None: all links are kept.
        content_masks: bool; True: each head has a mask that weighs the W
            entries when a key is compared. Default False.
        deallocation: bool; True: freed slots are also erased from the memory,
            by the retention vector psi. Default False.
        link_sharpening: bool; True: forward and backward weightings are
            sharpened (raised to a power of at least 1 and normalized; uniform
            where there is no link). Default False.
        usage_gradient: bool. False: usage passes no gradient to the write
            weightings. Default True.
        key_activation: Keras activation of keys. Default `"linear"`.
        add_activation: Keras activation of add vectors. Default `"linear"`.
        strength_activation: Keras activation of strengths, with values above
            0; or `"oneplus"` (default).
        initial_memory: `"learned"`, `"random"` (drawn once, and kept), a
            number, or `"constant"` (default): 0.
        norm_epsilon: float, at least 1e-30, added inside the root of each
            norm. Default None: 1e-8, in float64 1e-16.
        product_epsilon: float, at least 0, added to the product of the norms
            of key and slot. Default 0.
        usage_epsilon: float in [1e-30, 0.1], usage of an unused slot in the
            products of the allocation. Default None: 1e-8, in float64 1e-16.
            With larger values, such as the references' 1e-6, a write leaves a
            trace on the next free slot, which the next write then skips.

    Raises:
        ValueError: an argument is out of range.

    Call arguments and further errors: see `MemoryRNN`.

    Example:

    >>> layer = keras_memory.DNCLayer(3, memory_slots=16, slot_size=5,
    ...                               return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])
    >>> inside = keras_memory.trace(layer, np.zeros((2, 7, 4), "float32"))
    >>> inside["linkage"].shape
    (2, 7, 1, 16, 16)

    References:
        Graves et al. (2016), Hybrid computing using a neural network with
        dynamic external memory, Nature 538,
        https://doi.org/10.1038/nature20101
        Csordas, Schmidhuber (2019), Improving Differentiable Neural Computers
        Through Memory Masking, De-allocation, and Link Distribution Sharpness
        Control, https://arxiv.org/abs/1904.10278
        Franke, Niehues, Waibel (2018), Robust and Scalable Differentiable
        Neural Computer for Question Answering,
        https://arxiv.org/abs/1807.02658
    """

    def __init__(
        self,
        units: int | None,
        memory_slots: int = 64,
        slot_size: int = 16,
        read_heads: int = 4,
        write_heads: int = 1,
        *,
        linkage: bool = True,
        sparse_links: int | None = None,
        content_masks: bool = False,
        deallocation: bool = False,
        link_sharpening: bool = False,
        usage_gradient: bool = True,
        key_activation: Activation = "linear",
        add_activation: Activation = "linear",
        strength_activation: Activation = "oneplus",
        initial_memory: str | float = "constant",
        norm_epsilon: float | None = None,
        product_epsilon: float = 0.0,
        usage_epsilon: float | None = None,
        num_layers: int = 1,
        share_memory: bool = True,
        controller: str | keras.layers.Layer = "lstm",
        controller_units: int = 64,
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
        self.cell: DNCCell
