"""Sparse Access Memory (Rae et al. 2016, arXiv 1610.09027).

Equation numbers are the paper's. Each head reads the `top_k` slots that are
nearest to its key. A step writes to the slots that it read last and to the one
that was accessed longest ago. So it reads and writes few slots; only the search
for the nearest compares the key with all.
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
from keras_memory.addressing.activations import activation_by_name
from keras_memory.addressing.activations import not_negative
from keras_memory.addressing.activations import softmax
from keras_memory.addressing.content import NORM_EPSILON
from keras_memory.addressing.slots import same_place
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import given
from keras_memory.checks import check_closed
from keras_memory.checks import check_one_of
from keras_memory.checks import check_open
from keras_memory.checks import check_rate
from keras_memory.checks import check_size
from keras_memory.hints import Activation
from keras_memory.recurrent.cell import CellArguments
from keras_memory.recurrent.interface import StateSpec
from keras_memory.recurrent.interface import check_bytes_of_state
from keras_memory.recurrent.interface import interface_size
from keras_memory.recurrent.interface import split_interface
from keras_memory.recurrent.sparse_layer import SparseCell
from keras_memory.recurrent.sparse_layer import SparseRNN

SEARCH_METHODS = ("auto", "exact", "approximate")
# Logit of a slot that is not there. It is finite, so that a head without slots
# gives no NaN.
LOWEST_LOGIT = -1e30


class SAMState(NamedTuple):
    """The state of a SAM between steps. The first axis is the batch, B.

    Args:
        reads: (B, R, W) read vectors of the last step.
        memory: (B, N, W) slot contents.
        norms: (B, N), at least float32: norms of the written slots, with
            `norm_epsilon` inside the root; 1 for unwritten slots.
        last_access: (B, N) int32, number of the step that accessed a slot last;
            0 if the slot was written but never accessed (see
            `access_threshold`), -1 if it was never written.
        block_access: (B, ceil(N / 256)) int32, a lower bound of the last
            accesses in each block of 256 slots, where unwritten slots count as
            0. Zeros are always valid.
        read_slots: (B, R, K) int32, the slots of the last step's reads; -1 for
            none.
        read_weights: (B, R, K), their weights; 0 for none.
        time: (B, 1) int32, number of steps so far. Masked steps do not count.
        controller: tuple with the state of each controller, nested as Keras
            nests it.

    Whoever changes `memory` must change `norms` too; `SAMCell.state_with` makes
    both.
    """

    reads: Any
    memory: Any
    norms: Any
    last_access: Any
    block_access: Any
    read_slots: Any
    read_weights: Any
    time: Any
    controller: Any = ()


class SAMInterface(NamedTuple):
    """The controller's parameters for the heads.

    Args:
        key: (B, R, W) look-up vectors, q.
        strength: (B, R), above 0, beta.
        add_vector: (B, W), what to write, a.
        write_gate: (B, 1) in (0, 1), alpha: scales what is added. The least
            recently accessed slot is erased in any case.
        interpolation_gate: (B, 1) in (0, 1), gamma: to the slots that were read
            last (1) or to the least recently accessed one (0).
    """

    key: Any
    strength: Any
    add_vector: Any
    write_gate: Any
    interpolation_gate: Any


@dataclasses.dataclass(frozen=True, eq=False)
class SAMAccess:
    """Addressing, reading and writing. `SAMLayer` documents the arguments."""

    memory_slots: int = 65536
    slot_size: int = 32
    read_heads: int = 4
    top_k: int = 4
    _: dataclasses.KW_ONLY
    access_threshold: float = 0.005
    key_activation: Activation = "linear"
    add_activation: Activation = "linear"
    strength_activation: Activation = "oneplus"
    norm_epsilon: float | None = None
    search_method: str = "auto"
    target_recall: float = 0.9

    def step(self, interface, state):
        """Writes to the memory, then reads it."""
        interface = self.split(interface)
        state, write_slots, write_weights = self._write(interface, state)
        slots, weights, reads, inside = self._read(interface, state)
        time = state.time + 1
        last_access = sparse.mark_accessed(
            state.last_access,
            ops.concatenate([flat(slots, at_least=0), write_slots], axis=1),
            # The mean over heads, as in the write.
            ops.concatenate(
                [flat(weights) / self.read_heads, write_weights], axis=1
            ),
            self.access_threshold,
            time,
        )
        after = state._replace(
            reads=reads,  # r_t
            last_access=last_access,  # t - U_t
            read_slots=slots,
            read_weights=weights,  # w^R_t
            time=time,
        )
        inside |= {"write_slots": write_slots, "write_weights": write_weights}
        return after, {**inside, **interface._asdict()}

    def _write(self, interface, state):
        """M_t = (1 - R_t) o M_{t-1} + A_t (eq. 3), where R_t erases the least
        recently accessed slot, A_t = w^W_t a_t^T, and
        w^W_t = alpha_t (gamma_t w^R_{t-1} + (1 - gamma_t) I^U_t) (eq. 5).

        I^U_t is kept as an index, `oldest`. Returns the state, the slots (B,
        R K + 1), and their weights; those of equal slots are to be summed."""
        oldest, block_access = sparse.least_recently_accessed(
            state.last_access, state.block_access
        )  # I^U_t
        read_slots = flat(state.read_slots)
        read_weights = ops.where(
            read_slots >= 0, flat(state.read_weights) / self.read_heads, 0.0
        )  # w^R_{t-1}: the mean of the heads
        # A missing read has no weight. Its index must be valid.
        read_slots = ops.where(read_slots >= 0, read_slots, oldest)
        slots = ops.concatenate([read_slots, oldest], axis=1)
        alpha, gamma = interface.write_gate, interface.interpolation_gate
        weights = alpha * ops.concatenate(
            [gamma * read_weights, 1.0 - gamma], axis=1
        )  # eq. 5
        # Equal slots have the same row, with their total weight.
        total = sparse.sum_over_equal(slots, weights)  # w^W_t
        added = total[:, :, None] * interface.add_vector[:, None]  # A_t
        rows = sparse.take(state.memory, slots)
        is_erased = ops.equal(slots, oldest)  # R_t
        rows = ops.where(is_erased[:, :, None], 0.0, rows)
        memory = sparse.put(state.memory, slots, rows + added)  # eq. 3
        state = state._replace(
            memory=memory,  # M_t
            norms=sparse.update_norms(
                state.norms, memory, slots, self.epsilon(ops.dtype(rows))
            ),
            last_access=sparse.mark_written(state.last_access, slots),
            block_access=block_access,
        )
        return state, slots, weights

    def _read(self, interface, state):
        """r_t = sum_k w^R_t(s_k) M_t(s_k) over the K nearest slots s_k (eq. 4).

        Returns the slots, their weights, (B, R, K), the reads, and a dict of
        other arrays for `trace`."""
        slots, weights, rows = self._by_content(interface, state)
        reads = ops.sum(weights[:, :, :, None] * rows, axis=2)  # eq. 4
        return slots, weights, reads, {}

    def _by_content(self, interface, state):
        """The slots that are nearest to the key of each head, their weights,
        (B, R, K), and their contents, (B, R, K, W)."""
        slots = sparse.nearest(
            state.memory,
            state.norms,
            state.last_access,
            interface.key,
            self.top_k,
        )
        rows = self._rows_per_head(state.memory, slots)
        epsilon = self.epsilon(ops.dtype(rows))
        cosines = sparse.cosines(interface.key, rows, epsilon)
        logits = interface.strength[:, :, None] * cosines  # beta
        is_found = slots >= 0
        weights = softmax(ops.where(is_found, logits, LOWEST_LOGIT))
        return slots, ops.where(is_found, weights, 0.0), rows  # w^R_t

    def _rows_per_head(self, memory, slots):
        rows = sparse.take(memory, flat(slots, at_least=0))
        shape = (-1, self.read_heads, self.top_k, self.slot_size)
        return ops.reshape(rows, shape)

    def epsilon(self, dtype):
        """Added to squared norms of vectors of this dtype."""
        if self.norm_epsilon is not None:
            return self.norm_epsilon
        return NORM_EPSILON[dtype]

    def touched(self, state, inside):
        """The slots that a step read or wrote, (B, 2 R K + 1)."""
        return ops.concatenate(
            [flat(state.read_slots), inside["write_slots"]], axis=1
        )

    def wide_details(self, state, inside, slots):
        """Entries of `trace` with an axis for the slots that it shows."""
        writes = inside["write_slots"], inside["write_weights"]
        return {
            "read_weighting": weighting(
                state.read_slots, state.read_weights, slots
            ),
            "write_weighting": weighting(*(x[:, None] for x in writes), slots),
        }

    def slots_for(self, steps):
        """Number of slots that a memory needs which starts empty and runs for
        some steps: each writes to one new slot at most, and a search needs
        `top_k` slots."""
        if isinstance(steps, int):
            return min(max(steps, self.top_k), self.memory_slots)
        needed = ops.maximum(steps, self.top_k)
        return ops.minimum(needed, self.memory_slots)

    def unwritten(self, state):
        """Number of slots of a state, and of its unwritten ones, (B,)."""
        unwritten = ops.cast(state.last_access <= sparse.UNWRITTEN, "int32")
        return state.last_access.shape[1], ops.sum(unwritten, axis=1)

    def split(self, interface):
        """(B, interface_size) -> `SAMInterface`, with activations."""
        return split_interface(interface, self.parts, self.activations)

    def __post_init__(self):
        for name in ("memory_slots", "slot_size", "read_heads", "top_k"):
            check_size(name, getattr(self, name))
        check_bytes_of_state(self, "The vectors", ("read_heads", "slot_size"))
        check_bytes_of_state(self, "The weights", ("read_heads", "top_k"))
        if self.top_k > self.memory_slots:
            raise ValueError(
                "`top_k` must be at most `memory_slots`: it is the number of "
                f"slots that a head reads. Received: top_k={self.top_k}, "
                f"memory_slots={self.memory_slots}"
            )
        check_rate("access_threshold", self.access_threshold)
        check_closed("norm_epsilon", self.norm_epsilon, 1e-30, or_none=True)
        check_one_of("search_method", self.search_method, SEARCH_METHODS)
        check_open("target_recall", self.target_recall)
        if self.search_method == "approximate":
            # Here: other memories do not import all of `retrieval`.
            from keras_memory.retrieval.tuning import check_scann

            check_scann(
                '`search_method="approximate"`', 'Or use search_method="exact"'
            )
            if keras.backend.backend() != "tensorflow":
                raise ValueError(
                    "The backend must be TensorFlow for "
                    'search_method="approximate", whose graph calls the host; '
                    'or use search_method="exact". Received: '
                    f"KERAS_BACKEND={keras.backend.backend()}"
                )
        self.activations  # noqa: B018, raises if one is unknown

    # Further states per slot: size of a row, dtype and initial value.
    more_per_slot = {}

    @functools.cached_property
    def host_memory(self):
        """The slots, with search_method="approximate"; else None."""
        if self.search_method != "approximate":
            return None
        from keras_memory.retrieval.host_memory import HostMemory

        return HostMemory(
            self.memory_slots,
            self.slot_size,
            self.target_recall,
            self.epsilon("float32"),
            self.more_per_slot,
        )

    @functools.cached_property
    def parts(self):
        """Shape of each part of the interface."""
        return SAMInterface(
            key=(self.read_heads, self.slot_size),
            strength=(self.read_heads,),
            add_vector=(self.slot_size,),
            write_gate=(1,),
            interpolation_gate=(1,),
        )

    @functools.cached_property
    def activations(self):
        """Activation of each part of the interface."""
        return SAMInterface(
            key=activation_by_name(self.key_activation),
            strength=activation_by_name(self.strength_activation),
            add_vector=activation_by_name(self.add_activation),
            write_gate=keras.activations.sigmoid,
            interpolation_gate=keras.activations.sigmoid,
        )

    @functools.cached_property
    def interface_size(self):
        return interface_size(self.parts)

    @functools.cached_property
    def read_size(self):
        return self.read_heads * self.slot_size

    @property
    def initial_state(self):
        whole = functools.partial(StateSpec, dtype="int32")
        reads = (self.read_heads, self.top_k)
        return SAMState(
            reads=StateSpec((self.read_heads, self.slot_size)),
            **self._states_per_slot,
            read_slots=whole(
                reads,
                constant=-1,
                into_range=self._existing_slots,
            ),
            read_weights=StateSpec(reads, into_range=not_negative),
            time=whole((1,), into_range=lambda x: ops.maximum(x, 0)),
        )

    def _existing_slots(self, slots):
        return ops.clip(slots, -1, self.memory_slots - 1)

    @property
    def _states_per_slot(self):
        number = self.memory_slots
        states = {
            "memory": self._per_slot("memory", (self.slot_size,)),
            "last_access": self._per_slot(
                "last_access", (), constant=sparse.UNWRITTEN, dtype="int32"
            ),
        }
        if self.host_memory is not None:  # which has norms and blocks
            return {**states, "norms": (), "block_access": ()}
        norms = StateSpec(
            (number,), constant=1.0, dtype="float32", per_slot=True
        )
        blocks = StateSpec(
            (-(-number // sparse.BLOCK),),
            dtype="int32",
            per_slot=True,
            slots_per_row=sparse.BLOCK,
        )
        return {**states, "norms": norms, "block_access": blocks}

    def _per_slot(self, name, row, **options):
        """The spec of a state with rows of this shape, or of its token if the
        memory is on the host."""
        if self.host_memory is None:
            shape = (self.memory_slots, *row)
            return StateSpec(shape, per_slot=True, **options)
        on_host = self.host_memory, name
        return StateSpec((1,), dtype="int32", per_slot=True, on_host=on_host)


def weighting(positions, weights, slots):
    """Weights (B, H, K) at slots (B, H, K), as (B, H, S) over slots (B, S)."""
    is_at = same_place(positions, slots[:, None])
    return ops.sum(ops.where(is_at, weights[..., None], 0.0), axis=-2)


def flat(x, at_least=None):
    """(B, R, K) -> (B, R K), with entries raised to `at_least`."""
    x = ops.reshape(x, (-1, x.shape[1] * x.shape[2]))
    return x if at_least is None else ops.maximum(x, at_least)


if TYPE_CHECKING:

    class SAMArguments(SAMAccess, CellArguments):
        """For type checkers: attributes of `SAMCell` and `SAMLayer`."""

else:
    SAMArguments = object


@keras.saving.register_keras_serializable(package="keras_memory")
class SAMCell(SparseCell, SAMArguments, access=SAMAccess):
    """One step of a Sparse Access Memory, for `SAMLayer` or Keras's `RNN`.

    For arguments, equations, state and departures see `SAMLayer`, which passes
    its arguments on to its cell. In Keras's `RNN` the memory always has all its
    slots.

    Example:

    >>> cell = keras_memory.SAMCell(3, memory_slots=16, slot_size=5)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])
    """

    if TYPE_CHECKING:  # `MemoryCell` takes the fields of the access

        def __init__(self, units: int | None, *args: Any, **kwargs: Any): ...


@keras.saving.register_keras_serializable(package="keras_memory")
class SAMLayer(SparseRNN, SAMArguments, cell=SAMCell):
    """Sparse Access Memory: a step reads and writes few of many slots.

    Source: Rae et al. 2016 (arXiv 1610.09027), section 3.
    Departures: unwritten slots are never read; the paper reads them, but they
    are all equal. The search is exact, where the paper uses an index (see
    `search_method`). With several heads, the write and the last access see the
    mean of their read weightings. A strength multiplies the cosine, one for
    each head. The softmax is over the `top_k` slots that a head reads. The
    paper minimizes the time since the last access (eq. 6), which must be meant
    the other way round.

    The memory starts empty, and each step writes to one new slot at most.
    Unless `return_state`, `stateful` or `initial_state` is used, a sequence of
    T steps takes space and time for T slots, not for N (times `num_layers`, if
    layers share the memory). `cell.state_with(contents)` is an initial state
    with written slots; the memory then has all its N slots, and each step
    searches them.

    Args:
        units: int, at least 1, width of the output; None: see `MemoryCell`.
        memory_slots: int, N, number of slots. Default 65536.
        slot_size: int, W, width of a slot. Default 32.
        read_heads: int, R. Default 4.
        top_k: int K from 1 to N, number of slots that each head reads. A step
            compares the R K slots with each other. Default 4.
        access_threshold: float in [0, 1), delta: a step accesses a slot if its
            read and write weights sum to more than this. Default 0.005.
        key_activation: Keras activation of keys. Default `"linear"`.
        add_activation: Keras activation of add vectors. Default `"linear"`.
        strength_activation: Keras activation of strengths, with values above
            0; or `"oneplus"` (default).
        norm_epsilon: float, at least 1e-30, added inside the root of each
            norm. Default None: 1e-8, in float64 1e-16.
        search_method: `"exact"` compares a key with every slot;
            `"approximate"` keeps the memory on the host, where ScaNN finds
            most of the nearest slots; `"auto"` (default) is `"exact"`, since
            approximate searches give other numbers.
        target_recall: float in (0, 1), share of the nearest slots that
            approximate searches should find. Default 0.9.

    `search_method="approximate"` is for a large memory that stays: TensorFlow
    without XLA, `stateful=True`, float32, no `initial_state`, `return_state`,
    `recompute` or `unroll`. `set_memory` fills the memory. Gradients are those
    of the slots found. A call that fails leaves memory and states as they
    were. Files and exports do not contain the memory.

    Raises:
        ValueError: an argument is out of range, or not possible with
            search_method="approximate".
        ImportError: search_method="approximate", and ScaNN cannot be imported.

    Call arguments and further errors: see `MemoryRNN`.

    Example:

    >>> layer = keras_memory.SAMLayer(3, memory_slots=1_000_000,
    ...                               return_sequences=True)
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
        self.cell: SAMCell
        self._prepare_host()
