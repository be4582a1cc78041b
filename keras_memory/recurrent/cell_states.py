"""The states of a memory cell: names, initial values, records and resets."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.slots import select
from keras_memory.checks import check_array
from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.checks import plain
from keras_memory.hints import Array
from keras_memory.recurrent import controllers
from keras_memory.recurrent.state import index_suffix


class CellStates:
    """The methods of a memory cell for its states; a base of `MemoryCell`.

    States are flat tensors outside of a step and named records inside. The
    cell's `layout` (`StateLayout`) converts them.
    """

    def build_states(self) -> None:
        """Adds a weight for each learned or random initial state."""
        self.start_weights = [
            self.add_weight(
                shape=spec.shape,
                initializer=spec.initializer,
                trainable=spec.initial == "learned",
                name=name,
            )
            if spec.is_weight
            else None
            for spec, name in zip(self.layout.specs, self.layout.names)
        ]

    @property
    def state_names(self) -> list[str]:
        """Names of the states, in order, which served models use."""
        names = []
        for memory, record in enumerate(self.layout.records):
            blocks = self._blocks_of_memory(memory)
            several = len(self.layout.records) > 1
            front = f"block{blocks[0]}_" if several else ""
            for field, value in record._asdict().items():
                if field == "controller":
                    names += self._controller_state_names(blocks)
                else:
                    tensors = range(len(keras.tree.flatten(value)))
                    names += [
                        f"{front}{field}{index_suffix(i)}" for i in tensors
                    ]
        return names

    def _controller_state_names(self, blocks):
        several = len(self.accesses) > 1
        return [
            f"{f'block{block}_' if several else ''}controller_{name}"
            for block in blocks
            for name in controllers.state_names(self.block_controllers[block])
        ]

    def get_initial_state(
        self, batch_size: Array | None = None, steps: Array | None = None
    ) -> list[Array]:
        """The states before the first step: a list of (B, size).

        Args:
            batch_size: int, or a scalar tensor.
            steps: int, or a scalar tensor: for how many steps the states are
                used at most. Memories that start empty then have no more slots
                than those steps can write to (`Access.slots_for`). None: the
                states are those that `state_size` says.
        """
        if not self.built:
            raise ValueError(
                f"{type(self).__name__} {self.name!r} must be built to have an "
                "initial state, which may be learned: call it on data or call "
                "`build(input_shape)` first."
            )
        # Otherwise a size that is unknown while a graph is made.
        batch_size = plain(batch_size)
        if isinstance(batch_size, (int, float, str, type(None))):
            check_size("batch_size", batch_size, least=0)
            rows = "batch size", batch_size
            for spec, size, blocks in zip(
                self.layout.specs, self.state_size, self._blocks_of_states()
            ):
                if steps is None or not self._starts_empty(spec, blocks):
                    sizes = rows, ("numbers of a row", size)
                    check_bytes("A state", sizes, self.compute_dtype)
        states = []
        for spec, weight, blocks in zip(
            self.layout.specs, self.start_weights, self._blocks_of_states()
        ):
            dtype = spec.dtype_in(self.compute_dtype)
            if steps is not None and self._starts_empty(spec, blocks):
                _, *row = spec.shape
                slots = self.accesses[blocks[0]].slots_for(steps * len(blocks))
                size = -(-slots // spec.slots_per_row) * math.prod(row)
                states.append(ops.full((batch_size, size), spec.fill, dtype))
                continue
            if weight is None:
                value = ops.convert_to_tensor(
                    np.broadcast_to(spec.fill, spec.shape), dtype=dtype
                )
            else:
                value = spec.activation(ops.convert_to_tensor(weight))
            if spec.transposed:
                value = ops.swapaxes(value, -1, -2)
            value = ops.cast(ops.reshape(value, (1, -1)), dtype)
            shape = (batch_size, value.shape[-1])
            # A copy: on PyTorch this is a view (of the weight, if there is
            # one), and a stateful layer would write into the original.
            states.append(ops.copy(ops.broadcast_to(value, shape)))
        if self.initial_controller_state == "constant":
            records = self.layout.unflatten(states)
            records = self._with_controller_states(records, batch_size)
            states = self.layout.flatten(records)
        return states

    @property
    def starts_empty(self) -> bool:
        """Whether `get_initial_state(..., steps)` depends on the steps."""
        return any(
            map(self._starts_empty, self.layout.specs, self._blocks_of_states())
        )

    def _starts_empty(self, spec, blocks):
        access = self.accesses[blocks[0]]
        return spec.per_slot and hasattr(access, "slots_for")

    def slots_of(self, records: Sequence[Any], memory: int) -> int | None:
        """Number of slots of the states per slot of a memory; None if it is
        unknown while a graph is made."""
        specs = keras.tree.flatten(self.layout.records[memory])
        for spec, value in zip(specs, keras.tree.flatten(records[memory])):
            if spec.per_slot and spec.slots_per_row == 1:
                return value.shape[1]
        return None

    @property
    def is_on_host(self) -> bool:
        """Whether a memory stays on the host, so that states do not have it."""
        return any(spec.on_host for spec in self.layout.specs)

    def check_not_on_host(self, what: str) -> None:
        """Raises ValueError if a memory is on the host, which only a call of
        the cell's own layer reaches."""
        if self.is_on_host:
            raise ValueError(
                f"{what} cannot reach a memory on the host: only a call of the "
                'layer can, such as `SAMLayer`. Use search_method="exact" '
                "instead. Received: "
                f"{type(self).__name__} {self.name!r} with "
                'search_method="approximate"'
            )

    def has_room(self, states: Sequence[Array]) -> Array | None:
        """Whether memories made for a number of steps have slots for one more.

        Args:
            states: list of (B, size), as from `get_initial_state(..., steps)`.

        Returns:
            Scalar bool tensor; None if all memories have all their slots.
        """
        room = []
        records = self.layout.unflatten(states)
        for memory, record in enumerate(records):
            blocks = self._blocks_of_memory(memory)
            access = self.accesses[blocks[0]]
            if hasattr(access, "unwritten"):
                slots, left = access.unwritten(record)
                if slots < access.memory_slots:
                    room.append(ops.all(left >= len(blocks)))
        return ops.all(ops.stack(room)) if room else None

    def _blocks_of_states(self):
        """The blocks that act on the memory of each flat state."""
        for memory, record in enumerate(self.layout.records):
            for _ in keras.tree.flatten(record):
                yield self._blocks_of_memory(memory)

    def _with_controller_states(self, records, batch_size):
        """Replaces the controllers' states by their own initial states."""

        def initial(controller, zeros):
            if not hasattr(controller, "get_initial_state"):
                return zeros
            given = controller.get_initial_state(batch_size=batch_size)
            return keras.tree.pack_sequence_as(zeros, keras.tree.flatten(given))

        return tuple(
            record._replace(
                controller=tuple(
                    initial(self.block_controllers[block], zeros)
                    for block, zeros in zip(
                        self._blocks_of_memory(memory), record.controller
                    )
                )
            )
            for memory, record in enumerate(records)
        )

    def _blocks_of_memory(self, memory):
        return [b for b, m in enumerate(self.memory_of_block) if m == memory]

    def unpack_state(self, states: Sequence[Array]) -> Any:
        """Converts flat states to a named record.

        Args:
            states: list of (B, size) tensors, from `get_initial_state`, the
                layer's `return_state` or a cell's call.

        Returns:
            The record of the architecture (for the NTM an `NTMState`); a
            tuple of records if the cell has several memories.

        Raises:
            ValueError: the number or the sizes of the states do not fit the
                cell, or their batch sizes differ.
        """
        states = self._check_states(states)
        records = self.layout.transpose(self.layout.unflatten(states))
        return records[0] if len(records) == 1 else records

    def _check_states(self, states, batch_size=None, name="states"):
        """The states as a flat list of tensors, after checking them."""
        states = [] if states is None else keras.tree.flatten(states)
        shapes = [tuple(getattr(state, "shape", ())) for state in states]
        batch_sizes = {batch_size, *(shape[0] for shape in shapes if shape)}
        fit = [shape[1:] for shape in shapes] == [(n,) for n in self.state_size]
        if not fit or len(batch_sizes - {None}) > 1:
            rows = "" if batch_size is None else f" for a batch of {batch_size}"
            raise ValueError(
                f"`{name}` must be {len(self.state_size)} states of "
                f"{type(self).__name__}, of shape (batch, size), with the "
                f"batch size of the inputs and the sizes {self.state_size}. "
                "`get_initial_state`, `return_state` and `pack_state` return "
                "such states. "
                f"Received: {len(shapes)} states of shapes {shapes}{rows}"
            )
        return [
            check_array(
                f"{name}[{index}]",
                state,
                kind=spec.kind,
                dtype=spec.dtype and spec.dtype_in(self.compute_dtype),
            )
            for index, (state, spec) in enumerate(
                zip(states, self.layout.specs)
            )
        ]

    def pack_state(self, record: Any) -> list[Array]:
        """Converts a named record to flat states: undoes `unpack_state`.

        Args:
            record: the record, or a tuple of records; its fields may be
                arrays of any backend or NumPy.

        Returns:
            List of (B, size) tensors in the compute dtype.

        Raises:
            ValueError: a field is missing, or its shape or dtype is wrong, or
                fields differ in their batch size.
        """
        records = (record,) if len(self.layout.records) == 1 else record
        given = keras.tree.flatten(records)
        names, specs = self.layout.names, self.layout.specs
        if len(given) != len(specs):
            raise ValueError(
                f"`record` must have {len(specs)} tensors: {names}. "
                f"Received: {len(given)} tensors"
            )
        sizes = {}
        given = [
            check_array(
                name.removeprefix("initial_"),
                value,
                ("batch", *spec.shape),
                sizes,
                kind=spec.kind,
                dtype=spec.dtype and spec.dtype_in(self.compute_dtype),
            )
            for value, spec, name in zip(given, specs, names)
        ]
        records = keras.tree.pack_sequence_as(self.layout.records, given)
        states = self.layout.flatten(self.layout.transpose(records))
        return self.layout.cast(states, self.compute_dtype)

    def reset_memory(
        self, states: Sequence[Array], rows: Array | None = None
    ) -> list[Array]:
        """Resets the memory to its initial state; the controller's state stays.

        Args:
            states: list of (B, size).
            rows: (B,) bool, rows of the batch to reset; None for all.

        Returns:
            List of (B, size).

        Raises:
            ValueError: the states do not fit the cell, or `rows` is not one
                bool for each row of the batch.
        """
        return self._reset(states, rows, "memory")

    def reset_controller(
        self, states: Sequence[Array], rows: Array | None = None
    ) -> list[Array]:
        """Resets the controller to its initial state; the memory and its reads
        stay. Arguments and errors: see `reset_memory`."""
        return self._reset(states, rows, "controller")

    def _reset(self, states, rows, part):
        self.unpack_state(states)  # raises if the sizes do not fit
        if isinstance(states[0], keras.KerasTensor):
            raise ValueError(
                "`states` must have values, not be symbolic: in a functional "
                "model, reset them in the `call` of a layer. "
                f"Received: {states[0]!r}"
            )
        if rows is not None:
            sizes = {"B": states[0].shape[0]}
            rows = check_array("rows", rows, ("B",), sizes, "bool")
        starts = self.layout.unflatten(
            self.get_initial_state(ops.shape(states[0])[0])
        )
        after = self.layout.flatten(
            tuple(
                start._replace(controller=record.controller)
                if part == "memory"
                else record._replace(controller=start.controller)
                for record, start in zip(self.layout.unflatten(states), starts)
            )
        )
        after = [ops.cast(new, old.dtype) for new, old in zip(after, states)]
        if rows is not None:
            after = [select(rows, new, old) for old, new in zip(states, after)]
        return after
