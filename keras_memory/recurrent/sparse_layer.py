"""Cell and layer of memories with a row for each slot, of which a step touches
few. Such a memory is in the graph, or stays on the host."""

import threading
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_memory.addressing import sparse
from keras_memory.addressing.slot_states import call_host
from keras_memory.addressing.slots import compiles
from keras_memory.checks import check_array
from keras_memory.checks import check_process
from keras_memory.hints import Array
from keras_memory.recurrent.cell import MemoryCell
from keras_memory.recurrent.layer import MemoryRNN

LAST_CALL = 2**31 - 1  # calls are numbered in int32


class Transaction:
    """Makes each call of a layer with memories on the host all or nothing.

    Calls are numbered. A call that is undone while another thread still runs it
    gets an error at its next step.

    Args:
        memories: list of `HostMemory`.
        tokens: indices of the states that have the number of the call.
    """

    def __init__(self, memories, tokens=()):
        self._memories, self._tokens = memories, tokens
        self._states = None  # before a call, until one ends
        self._ended = None  # after the last call that ended
        self._call = 0
        self._lock = threading.RLock()

    def begin(self, *states):
        """Begins a call with the layer's states, arrays.

        Returns:
            The states to begin with; see `settle`.
        """
        with self._lock:
            states = self.settle(*states)
            self._next_call()
            # Copies: TensorFlow may reuse the memory of arguments and results.
            self._states = _copies(states)
            return self._with_tokens(states, self._call)

    def settle(self, *states):
        """Undoes the writes of a call that has begun but not ended.

        Returns:
            The layer's states, or, until the next call ends, those before the
            call that was undone.
        """
        with self._lock:
            if self._states is None:
                self._forget()
                return states
            self._next_call()
            for memory in self._memories:
                memory.roll_back()
            return _copies(self._states)

    def end(self, *states):
        """Ends a call with the states after it: it counts.

        Returns:
            The states.
        """
        with self._lock:
            try:
                for index in self._tokens if states else ():
                    self._memories[0].check_call(states[index])
            except RuntimeError:
                # It may have assigned its states after the call that ended.
                self._states = self._states or self._ended
                raise
            states = self._with_tokens(states, 0) if states else []
            self._ended = _copies(states) or None
            self._states = None  # from here on, even if it is interrupted
            self._forget()
            return states

    def _next_call(self):
        self._call = self._call % LAST_CALL + 1
        for memory in self._memories:
            memory.call = self._call

    def _with_tokens(self, states, call):
        states = list(states)
        for index in self._tokens:
            states[index] = np.full_like(states[index], call)
        return states

    def _forget(self):
        for memory in self._memories:
            memory.forget()


def _copies(states):
    return [np.array(state) for state in states]


class SparseCell(MemoryCell):
    """A `MemoryCell` whose accesses have the fields of `SAMState`, maybe more,
    and a method `epsilon(dtype)`: the number added to squared norms."""

    def state_with(self, contents: Array) -> list[Array]:
        """The initial state with slots that are already written.

        The first slots get the contents, and count as accessed once, so that
        unwritten slots are written first. A sparse DNC starts without links.

        Args:
            contents: (B, n, W), n from 1 to `memory_slots`, such as the keys
                of a `KNNMemory`.

        Returns:
            List of (B, size), for `initial_state`. If the cell has several
            memories, each has these contents.

        Raises:
            ValueError: the contents have another shape, or more than
                `memory_slots` slots; or the memory is on the host.
        """
        if self.is_on_host:
            raise ValueError(
                "The states of a memory on the host do not have its slots: use "
                "`layer.set_memory(contents)`. Received: "
                f"search_method={self.search_method!r}"
            )
        return self._state_with(self._check_contents(contents))

    def _check_contents(self, contents, batch_size=None):
        sizes = {} if batch_size is None else {"B": batch_size}
        contents = check_array(
            "contents", contents, ("B", "n", self.slot_size), sizes
        )
        if not 1 <= contents.shape[1] <= self.memory_slots:
            raise ValueError(
                "`contents` must have 1 to `memory_slots` slots, "
                f"{self.memory_slots}. Received: shape {tuple(contents.shape)}"
            )
        return contents

    def _state_with(self, contents):
        batch, count, _ = contents.shape
        written = {"time": ops.ones((batch, 1))}
        if not self.is_on_host:  # which has the rest
            # As states are kept, and then as steps compute.
            contents = ops.cast(contents, self.compute_dtype)
            contents = ops.cast(contents, self.access_dtype)
            epsilon = self.accesses[0].epsilon(self.access_dtype)
            # Blocks of which each slot counts as accessed.
            blocks = count // sparse.BLOCK + (count == self.memory_slots)
            blocks = min(blocks, -(-self.memory_slots // sparse.BLOCK))
            written |= {
                "memory": contents,
                "norms": sparse.norms_of(contents, epsilon),
                "last_access": ops.ones((batch, count)),
                "block_access": ops.ones((batch, blocks)),
            }

        def first(record, field, values):
            before = getattr(record, field)
            values = ops.cast(values, ops.dtype(before))
            rest = before[:, values.shape[1] :]
            return ops.concatenate([values, rest], axis=1)

        states = self.get_initial_state(batch_size=batch)
        records = self.layout.unflatten(states)
        return self.layout.flatten(
            tuple(
                record._replace(
                    **{
                        field: first(record, field, values)
                        for field, values in written.items()
                    }
                )
                for record in records
            )
        )


class SparseRNN(MemoryRNN):
    """A `MemoryRNN` of a `SparseCell`.

    If its accesses have a `host_memory`, the small states are variables, and
    the memory is not. A `Transaction` keeps them together: a call begins when
    it reads the states, and ends when it has assigned them.
    """

    def _prepare_host(self):
        """Prepares calls; to be called at the end of `__init__`, when the cell
        and all arguments are set."""
        self._given_state = False  # whether the last call had `initial_state`
        self._is_compiled = None  # whether XLA compiled the last call
        if not self.cell.is_on_host:
            return
        self._check_own_arguments()
        self.supports_jit = False
        accesses = {id(access): access for access in self.cell.accesses}
        self._memories = [a.host_memory for a in accesses.values()]
        specs = enumerate(self.cell.layout.specs)
        tokens = [index for index, spec in specs if spec.on_host]
        self._transaction = Transaction(self._memories, tokens)

    def _check_own_arguments(self):
        wanted = {
            "stateful": (True, "the memory is kept between calls"),
            "return_state": (False, "states do not have the memory"),
            "unroll": (False, "calls of the host need the fast time loop"),
            "recompute": (None, "a step must not write twice"),
        }
        wrong = {
            f"{name}={value}": why
            for name, (value, why) in wanted.items()
            if getattr(self, name) != value
        }
        if self.loop == "portable":
            wrong['loop="auto" or "fast"'] = "other loops give no gradients"
        if self.dtype_policy.name != "float32":
            wrong['dtype="float32"'] = "ScaNN searches float32"
        if wrong:
            whys = "; ".join(f"{name}, since {wrong[name]}" for name in wrong)
            raise ValueError(
                f'search_method="approximate" needs {whys}. Or use '
                f'search_method="exact". Received: stateful={self.stateful}, '
                f"return_state={self.return_state}, unroll={self.unroll}, "
                f"recompute={self.recompute!r}, loop={self.loop!r}, "
                f"dtype={self.dtype_policy.name!r}"
            )

    def _create_state_variables(self, batch_size):
        super()._create_state_variables(batch_size)
        if self.cell.is_on_host:
            for memory in self._memories:
                memory.allocate(batch_size)
            for variable in self._state.variables:
                # Every call reads the states, so that TensorFlow asks them to
                # be saved with each graph that has a call.
                variable.value._export_to_saved_model_graph = self._refuse

    def _refuse(self, *arguments, **options):
        self.cell.check_not_on_host("A SavedModel")

    def _check_arguments(self, sequences, initial_state, mask):
        if self.cell.is_on_host and initial_state is not None:
            raise ValueError(
                "`initial_state` must be None for search_method="
                '"approximate": states do not have the memory. '
                "`set_memory(contents)` fills it, and `reset_state()` clears "
                f"it. Received: {len(initial_state)} states"
            )
        return super()._check_arguments(sequences, initial_state, mask)

    def call(
        self,
        sequences: Array,
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
        training: bool | None = False,
        use_memory: bool = True,
    ) -> Any:
        self._given_state = initial_state is not None
        self._is_compiled = compiles()
        if self.cell.is_on_host:
            self._check_call()
        outputs = super().call(
            sequences, initial_state, mask, training, use_memory
        )
        return self._after_call(outputs) if self.cell.is_on_host else outputs

    def _check_call(self):
        import tensorflow as tf

        if self._is_compiled:
            raise ValueError(
                'search_method="approximate" calls the host, which XLA cannot: '
                "use `compile(..., jit_compile=False)`, or search_method="
                '"exact". Received: a call compiled by XLA'
            )
        if self._remat_mode is not None:
            raise ValueError(
                'search_method="approximate" cannot compute a call twice, as '
                "`keras.RematScope` does: a step would write twice. Make the "
                'layer outside of the scope, or use search_method="exact" with '
                f"`recompute`. Received: mode={self._remat_mode.mode!r}"
            )
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                'search_method="approximate" needs a strategy with one '
                "replica, since replicas would write to the same memory: use "
                f'search_method="exact". Received: {replicas} replicas'
            )

    def _values_of_state(self):
        values = super()._values_of_state()
        if self.cell.is_on_host:
            return self._call_host(self._transaction.begin, values)
        return values

    def _assign_states(self, values):
        super()._assign_states(values)
        if self.cell.is_on_host:
            # Ends when all states are assigned. The next call begins when it
            # reads the states, and so after these assignments.
            values = self._call_host(self._transaction.end, values)
            super()._assign_states(values)

    def _after_call(self, outputs):
        """Lets layers behind this one wait for the end of the call."""
        import tensorflow as tf

        with tf.control_dependencies(super()._values_of_state()):
            return tf.identity(outputs)

    def _call_host(self, function, values):
        return call_host(function, values, *values)

    def reset_state(self) -> None:
        is_on_host = self.cell.is_on_host and self.states is not None
        if is_on_host:
            check_process(type(self).__name__)
            self._transaction.settle()
        super().reset_state()
        if is_on_host:
            for memory in self._memories:
                memory.clear()
            self._transaction.end()

    def _reset(self, reset, states, rows):
        after = super()._reset(reset, states, rows)
        if self.cell.is_on_host and states is None:
            self._transaction.end()
        return after

    def reset_memory(
        self, states: Sequence[Array] | None = None, rows: Array | None = None
    ) -> list[Array]:
        if not self.cell.is_on_host:
            return super().reset_memory(states, rows)
        check_process(type(self).__name__)
        if states is not None:
            raise ValueError(
                "`states` must be None for search_method="
                '"approximate": states do not have the memory. '
                f"Received: {len(states)} states"
            )
        after = super().reset_memory(None, rows)
        rows = None if rows is None else ops.convert_to_numpy(rows)
        for memory in self._memories:
            memory.clear(rows)
        return after

    @property
    def engine(self) -> str:
        """How the last call used the memory: a word and the reason.

        A call of an already compiled function does not change it. Before the
        first call it is that of a call without `initial_state` and, on
        TensorFlow, without XLA.
        """
        if self.cell.is_on_host:
            return "host: the memory stays on the host, where ScaNN searches it"
        if not (self._given_state or self.return_state or self.stateful):
            return (
                "empty: the memory starts empty in each call, with as many "
                "slots as steps"
            )
        if keras.backend.backend() != "jax" and not self._is_compiled:
            return (
                "copied: each step copies the memory; with XLA "
                "(`jit_compile=True`) on TensorFlow, or on JAX, it does not"
            )
        if self._given_state:
            why = "`initial_state` was given"
        elif self.return_state:
            why = "`return_state=True` returns all slots"
        else:
            return "in place: steps change the memory of the layer's states"
        return f"copied: {why}, so each call copies the memory once"

    def set_memory(self, contents: Array) -> None:
        """Fills the memory of a stateful layer, as `SAMCell.state_with` does.

        All states begin anew, also those of the controller.

        Args:
            contents: (B, n, W), n from 1 to `memory_slots`, such as the keys
                of a `KNNMemory`. Each memory gets them, if there are several.

        Raises:
            ValueError: the layer has no states of its own; the contents have
                another shape; or they are not finite, for search_method=
                "approximate".
        """
        contents = self.cell._check_contents(contents, self._batch_size())
        if self.cell.is_on_host:
            array = ops.convert_to_numpy(contents).astype("float32")
            if not np.isfinite(array).all():
                raise ValueError(
                    "`contents` must be finite within float32 for "
                    'search_method="approximate". Received: NaN or infinity'
                )
        self.reset_state()
        states = self.cell._state_with(contents)
        for variable, value in zip(self.states, states):
            variable.assign(ops.cast(value, variable.dtype))
        if self.cell.is_on_host:
            for memory in self._memories:
                memory.fill(array)

    def get_memory(self) -> list[np.ndarray]:
        """The contents of the memory of a stateful layer.

        Returns:
            List with an array (B, N, W) for each memory, usually one; slots
            without a write are 0.

        Raises:
            ValueError: the layer has no states of its own.
        """
        self._batch_size()
        if self.cell.is_on_host:
            self._transaction.settle()
            return [memory.memory.copy() for memory in self._memories]
        records = self.cell.layout.unflatten(self.states)
        return [ops.convert_to_numpy(record.memory) for record in records]

    def _batch_size(self):
        if not self.states:
            raise ValueError(
                "The layer must be stateful and built to have a memory of its "
                "own: call it on data or call `build(input_shape)`. Without "
                "`stateful=True` pass `cell.state_with(contents)` as "
                f"`initial_state`. Received: stateful={self.stateful}, "
                f"built={self.built}"
            )
        return self.states[0].shape[0]
