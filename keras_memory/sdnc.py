"""Sparse Differentiable Neural Computer (Rae et al. 2016, arXiv 1610.09027).

Equation numbers are those of the paper's Supplementary D. Memory, writes and
content reads are those of SAM (`sam.py`). Temporal links say which slots were
written right after which, and each head may also read the slots that follow or
precede those that it read last.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple
from typing import Unpack

import keras
from keras import ops

from keras_memory.addressing import sparse
from keras_memory.addressing.activations import not_negative
from keras_memory.addressing.activations import softmax
from keras_memory.addressing.activations import sums_into_unit_range
from keras_memory.addressing.slots import rows_at
from keras_memory.addressing.slots import same_place
from keras_memory.addressing.sparse_linkage import Links
from keras_memory.addressing.sparse_linkage import Precedence
from keras_memory.addressing.sparse_linkage import linked_slots
from keras_memory.addressing.sparse_linkage import links_after_write
from keras_memory.addressing.sparse_linkage import precedence_after_write
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import given
from keras_memory.checks import LONGEST_AXIS
from keras_memory.checks import check_size
from keras_memory.hints import Activation
from keras_memory.recurrent.cell import CellArguments
from keras_memory.recurrent.interface import StateSpec
from keras_memory.recurrent.sparse_layer import SparseCell
from keras_memory.recurrent.sparse_layer import SparseRNN
from keras_memory.sam import SAMAccess
from keras_memory.sam import flat
from keras_memory.sam import weighting


class SDNCState(NamedTuple):
    """The state of an SDNC between steps. The first axis is the batch, B.

    Args:
        reads, memory, norms, last_access, block_access, read_slots,
            read_weights, time, controller: as in `SAMState`.
        predecessors: (B, N, K_L) int32, the slots that each slot was written
            after, columns of the paper's N; -1 for none.
        link_weights: (B, N, K_L), at least float32, in [0, 1]: how much the
            slot was written right after each of them, entries of N; 0 for
            none. A row sums to at most 1.
        successors: (B, N, K_L) int32, numbers of links to later slots, columns
            of the paper's P; -1 for none. Number i K_L + k is the link
            `predecessors[:, i, k]`, which leads to slot i. An entry is void if
            that link starts at another slot now.
        precedence_slots: (B, K_L) int32, the slots that were written last,
            then -1 for none.
        precedence_weights: (B, K_L), at least float32, in [0, 1]: how much each
            was; 0 for none. They sum to at most 1.

    Links and precedence of a state from outside are not checked for agreement:
    they should be those of a step.
    """

    reads: Any
    memory: Any
    norms: Any
    last_access: Any
    block_access: Any
    read_slots: Any
    read_weights: Any
    time: Any
    predecessors: Any
    link_weights: Any
    successors: Any
    precedence_slots: Any
    precedence_weights: Any
    controller: Any = ()


class SDNCInterface(NamedTuple):
    """The controller's parameters for the heads.

    Args:
        key, strength, add_vector, write_gate, interpolation_gate: as in
            `SAMInterface`.
        read_mode: (B, R, 3), pi, a distribution over backward, content and
            forward weighting.
    """

    key: Any
    strength: Any
    add_vector: Any
    write_gate: Any
    interpolation_gate: Any
    read_mode: Any


@dataclasses.dataclass(frozen=True, eq=False)
class SDNCAccess(SAMAccess):
    """Addressing, reading and writing. `SDNCLayer` documents the arguments."""

    sparse_links: int = 8

    def _write(self, interface, state):
        """Writes as SAM does; links the slots with those written before."""
        state, slots, weights = super()._write(interface, state)
        links = Links(state.predecessors, state.link_weights, state.successors)
        precedence = Precedence(
            state.precedence_slots, state.precedence_weights
        )
        # No gradient through links, as in the paper.
        written = ops.cast(
            ops.stop_gradient(weights), ops.dtype(precedence.weights)
        )
        links = links_after_write(links, precedence, slots, written)
        precedence = precedence_after_write(precedence, slots, written)
        state = state._replace(
            predecessors=links.predecessors,  # N_t
            link_weights=links.weights,
            successors=links.successors,  # P_t
            precedence_slots=precedence.slots,  # p_t
            precedence_weights=precedence.weights,
        )
        return state, slots, weights

    def _read(self, interface, state):
        """w^R_t = pi_1 b_t + pi_2 c_t + pi_3 f_t, whose K largest weights are
        kept, and r_t = sum_k w^R_t(s_k) M_t(s_k)."""
        content_slots, content, _ = self._by_content(interface, state)  # c_t
        links = Links(state.predecessors, state.link_weights, state.successors)
        before, to_before, after, to_after = linked_slots(
            links, flat(state.read_slots)
        )
        previous = state.read_weights  # w^R_{t-1}
        slots = {
            "backward": self._per_head(self._existing_slots(before)),
            "content": content_slots,
            "forward": self._per_head(self._existing_slots(after)),
        }
        weights = {
            "backward": self._follow(to_before, previous),  # b_t (eq. 22)
            "content": content,
            "forward": self._follow(to_after, previous),  # f_t (eq. 21)
        }
        modes = ops.split(interface.read_mode, 3, axis=2)  # pi
        mixed_slots = ops.concatenate(list(slots.values()), axis=2)
        mixed = ops.concatenate(
            [mode * part for mode, part in zip(modes, weights.values())], axis=2
        )
        # A mode of 0 still reads a slot; a weighting of 0 does not.
        is_read = ops.concatenate(list(weights.values()), axis=2) > 0.0
        read_slots = sparse.largest_sums(
            ops.where(is_read, mixed_slots, -1), mixed, self.top_k
        )
        is_at = same_place(read_slots, mixed_slots)
        is_at = ops.logical_and(is_at, is_read[:, :, None])
        read_weights = ops.sum(
            ops.where(is_at, mixed[:, :, None], 0.0), axis=3
        )  # w^R_t
        rows = self._rows_per_head(state.memory, read_slots)
        reads = ops.sum(read_weights[..., None] * rows, axis=2)  # eq. 4 of SAM
        inside = {f"{name}_slots": value for name, value in slots.items()}
        inside |= {f"{name}_weights": value for name, value in weights.items()}
        return read_slots, read_weights, reads, inside

    def _follow(self, links, previous):
        """The weights of linked slots, (B, R, K K_L): those of the links times
        those of the slots that they start from.

        They may sum to more than 1, since links do not fade when the slot that
        they start from is written again. Then they are scaled down."""
        # Links of a given state may be negative, and would cancel others.
        links = not_negative(self._per_head(links))
        links = ops.cast(links, ops.dtype(previous))
        shape = (-1, self.read_heads, self.top_k, self.sparse_links)
        weights = ops.reshape(links, shape) * previous[..., None]
        weights = ops.reshape(weights, (-1, *links.shape[1:]))
        total = ops.sum(weights, axis=2, keepdims=True)
        return weights / ops.where(total > 1.0, total, 1.0)

    def _per_head(self, linked):
        """(B, R K, K_L) -> (B, R, K K_L)."""
        shape = (-1, self.read_heads, self.top_k * self.sparse_links)
        return ops.reshape(linked, shape)

    def touched(self, state, inside):
        """The slots that a step read or wrote, and the precedence after it."""
        slots = super().touched(state, inside)
        return ops.concatenate([slots, state.precedence_slots], axis=1)

    def wide_details(self, state, inside, slots):
        """Entries of `trace` with an axis for the slots that it shows."""
        wide = super().wide_details(state, inside, slots)
        for name in ("backward", "content", "forward"):
            parts = inside[f"{name}_slots"], inside[f"{name}_weights"]
            wide[f"{name}_weighting"] = weighting(*parts, slots)
        return {**wide, **_links_between(state, slots)}

    def __post_init__(self):
        super().__post_init__()
        check_size("sparse_links", self.sparse_links)
        if self.sparse_links > self.memory_slots:
            raise ValueError(
                "`sparse_links` must be at most `memory_slots`: it is the "
                "number of links that a slot keeps in each direction. "
                f"Received: sparse_links={self.sparse_links}, "
                f"memory_slots={self.memory_slots}"
            )
        if self.memory_slots * self.sparse_links > LONGEST_AXIS:
            raise ValueError(
                "`memory_slots` times `sparse_links` must be at most "
                f"{LONGEST_AXIS}, as links have int32 numbers. Received: "
                f"memory_slots={self.memory_slots}, "
                f"sparse_links={self.sparse_links}"
            )

    @functools.cached_property
    def parts(self):
        """Shape of each part of the interface."""
        return SDNCInterface(*super().parts, read_mode=(self.read_heads, 3))

    @functools.cached_property
    def activations(self):
        """Activation of each part of the interface."""
        return SDNCInterface(*super().activations, read_mode=softmax)

    @property
    def initial_state(self):
        state = super().initial_state._asdict()
        whole = functools.partial(StateSpec, constant=-1, dtype="int32")
        weight = functools.partial(StateSpec, dtype="float32")
        state["read_weights"] = dataclasses.replace(
            state["read_weights"], into_range=sums_into_unit_range
        )
        return SDNCState(
            **state,
            **{
                name: self._per_slot(
                    name, (size,), constant=initial, dtype=dtype
                )
                for name, (size, dtype, initial) in self.more_per_slot.items()
            },
            precedence_slots=whole(
                (self.sparse_links,), into_range=self._existing_slots
            ),
            precedence_weights=weight(
                (self.sparse_links,), into_range=sums_into_unit_range
            ),
        )

    @property
    def more_per_slot(self):
        """Size of a row, dtype and initial value of each state of the links."""
        count = self.sparse_links
        return {
            "predecessors": (count, "int32", -1),
            "link_weights": (count, "float32", 0.0),
            "successors": (count, "int32", -1),
        }


def _links_between(state, slots):
    """The links between slots (B, S), as a DNC with sparse links has them, for
    `addressing.dense_linkage`: weights (B, 1, S, K_L), and the places of the
    earlier slots in `slots`."""
    rows = ops.maximum(slots, 0)
    before = rows_at(state.predecessors, rows)
    is_at = same_place(before, slots[:, None])  # (B, S, K_L, S)
    is_shown = ops.logical_and(ops.any(is_at, axis=3), slots[:, :, None] >= 0)
    weights = ops.where(is_shown, rows_at(state.link_weights, rows), 0.0)
    places = ops.argmax(ops.cast(is_at, "int32"), axis=3)
    return {"linkage": weights[:, None], "link_columns": places[:, None]}


if TYPE_CHECKING:

    class SDNCArguments(SDNCAccess, CellArguments):
        """For type checkers: attributes of `SDNCCell` and `SDNCLayer`."""

else:
    SDNCArguments = object


@keras.saving.register_keras_serializable(package="keras_memory")
class SDNCCell(SparseCell, SDNCArguments, access=SDNCAccess):
    """One step of a sparse DNC, for `SDNCLayer` or Keras's `RNN`.

    For arguments, equations, state and departures see `SDNCLayer`, which passes
    its arguments on to its cell. In Keras's `RNN` the memory always has all its
    slots.

    Example:

    >>> cell = keras_memory.SDNCCell(3, memory_slots=16, slot_size=5)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])
    """

    if TYPE_CHECKING:  # `MemoryCell` takes the fields of the access

        def __init__(self, units: int | None, *args: Any, **kwargs: Any): ...


@keras.saving.register_keras_serializable(package="keras_memory")
class SDNCLayer(SparseRNN, SDNCArguments, cell=SDNCCell):
    """Sparse Differentiable Neural Computer: SAM with temporal links.

    Source: Rae et al. 2016 (arXiv 1610.09027), Supplementary D.
    Departures: those of `SAMLayer`. Links are followed along rows: forward
    along the row of P, backward along the row of N, so that each slot leads to
    at most `sparse_links` others. The paper takes columns, of N forward and of
    P backward, which may have any number of entries. Forward and backward
    weightings that sum to more than 1 are scaled down to 1: in the paper they
    could grow without bound, since links do not fade when the slot that they
    start from is written again. P has the weights of N: see
    `addressing/sparse_linkage.py`. Where the paper is silent: no slot is linked
    with itself; of equally strong links the older ones stay; the weights of the
    slots that a head reads are not normalized after the cut.

    A step reads the slots that are nearest to the key of a head, those that
    were written right after the slots that it read in the step before, and
    those written right before them. Read modes weigh the three; the `top_k`
    slots with the largest sums are read. No gradient passes through links.

    Memory, cost and calls are those of `SAMLayer`. Each slot keeps
    `sparse_links` links in each direction, which take 12 bytes together.

    Args:
        units: int, at least 1, width of the output; None: see `MemoryCell`.
        memory_slots: int, N, number of slots. Default 65536.
        slot_size: int, W, width of a slot. Default 32.
        read_heads: int, R. Default 4.
        top_k: int K from 1 to N, number of slots that each head finds by its
            key, and number of slots that it reads. A step compares each with
            each: the R K + 1 written slots, K (2 K_L + 1) slots in each head,
            2 K_L links of each written slot, and R K + K_L + 1 of each slot of
            the precedence. Default 4.
        sparse_links: int K_L from 1 to N, number of links that each slot keeps
            in each direction, and of slots that count as written last.
            Default 8.

    Other arguments, and `search_method="approximate"`: see `SAMLayer`.

    Raises:
        ValueError: an argument is out of range, or not possible with
            search_method="approximate".
        ImportError: search_method="approximate", and ScaNN cannot be imported.

    Call arguments and further errors: see `MemoryRNN`.

    Example:

    >>> layer = keras_memory.SDNCLayer(3, memory_slots=1_000_000,
    ...                                return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])

    References:
        Rae et al. (2016), Scaling Memory-Augmented Neural Networks with Sparse
        Reads and Writes, https://arxiv.org/abs/1610.09027
    """

    def __init__(
        self,
        units: int | None,
        memory_slots: int = 65536,
        slot_size: int = 32,
        read_heads: int = 4,
        top_k: int = 4,
        sparse_links: int = 8,
        *,
        access_threshold: float = 0.005,
        key_activation: Activation = "linear",
        add_activation: Activation = "linear",
        strength_activation: Activation = "oneplus",
        norm_epsilon: float | None = None,
        search_method: str = "auto",
        target_recall: float = 0.9,
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
        self.cell: SDNCCell
        self._prepare_host()
