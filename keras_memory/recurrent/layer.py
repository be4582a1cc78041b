"""The layer that runs a memory cell over time."""

import contextvars
import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import Self

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask

from keras_memory.arguments import Arguments
from keras_memory.arguments import written_as
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_bool
from keras_memory.checks import check_size
from keras_memory.checks import with_rows_of
from keras_memory.checks import with_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.recurrent.cell import MemoryCell
from keras_memory.recurrent.loop import LOOPS
from keras_memory.recurrent.loop import run
from keras_memory.recurrent.serialization import BACKENDS
from keras_memory.recurrent.serialization import ClassAttribute
from keras_memory.recurrent.serialization import cell_property
from keras_memory.recurrent.serialization import init_parameters
from keras_memory.recurrent.serialization import with_arguments
from keras_memory.recurrent.state import LayerState
from keras_memory.recurrent.state import index_suffix
from keras_memory.recurrent.state import select

# What `trace_model` has called with each layer and the arguments of its
# `inner_loop`, in this thread, also of layers that a model makes meanwhile.
recorder = contextvars.ContextVar("recorder", default=None)


@keras.saving.register_keras_serializable(package="keras_memory")
class MemoryRNN(Arguments, keras.layers.RNN):
    """Runs a memory cell over time; the base of all recurrent layers here.

    `MemoryRNN(cell, ...)` runs any `MemoryCell`. A subclass
    `class NTMLayer(MemoryRNN, cell=NTMCell)` makes its own: it takes the
    cell's arguments, then those below. The cell's arguments can be read as
    attributes of the layer, such as `layer.memory_slots`.

    It differs from `keras.layers.RNN` where that does not fit a memory:
    `reset_state` restores the cell's initial state instead of zeros; masked
    steps hold output and state on every backend, and what they contain is never
    looked at; the states of a stateful layer are tracked variables on every
    backend; the output projection happens once, after the time loop.

    Args:
        *args: a `MemoryCell`, or the arguments of the subclass's cell.
        return_sequences: bool, output of every step or of the last.
        return_state: bool, also return the final states, flat: see
            `MemoryCell.unpack_state`.
        go_backwards: bool, from the last step to the first.
        stateful: bool, go on from the states of the batch before. Needs a
            fixed batch size. `states` are variables, but not weights, as in
            Keras: `get_weights`, `set_weights` and files leave them out, so
            that weights go from a stateless layer to a stateful one, and from
            one batch size to another. A loaded layer begins at its initial
            state. `reset_state()` starts afresh. A row that has made no step
            since starts from the weights as they are when it makes one.
        unroll: bool, as in `keras.layers.RNN`.
        zero_output_for_mask: bool, masked steps give 0 instead of the output
            of the step before.
        loop: `"auto"`, `"fast"` or `"portable"`. The fast loop has a gradient
            of its own: the same numbers, sooner, but first derivatives only,
            and none that are vectorized, as `batch_jacobian` in a
            `tf.function` does: take `"portable"` for these.
            `"auto"` takes it in training, on TensorFlow and JAX, unless
            `unroll` is True or a step changes variables, as a controller with
            `Dropout` layers does, or adds losses; `time_loop` says why.
            `"fast"` takes it or raises an error. A step of a cell of your own
            runs twice in it: take `"portable"` if it is random other than by
            Keras, or computes with tensors from outside that need gradients.
        recompute: None, an int of at least 1, or `"sqrt"`. In training the
            fast loop keeps for its gradient the states of every step, or of
            every so many steps only, and computes those between again: less
            memory for one more forward run. `"sqrt"`: as many as the square
            root of the number of steps, the least memory. The steps that are
            computed again, and a first few, still keep everything while their
            turn lasts. No effect where the portable loop is taken. Default
            None: all.
        **kwargs: of the subclass's cell, and of `keras.layers.Layer`.

    Attributes:
        time_loop: which loop the last call with `training=True` took, or the
            last call where there was none: "fast", or "portable: " and why.
            None before the first call. Calls of what is compiled already do
            not count.

    Call arguments:
        sequences: (B, T, D). For further batch axes reshape first:
            `keras.ops.reshape(x, (-1, *x.shape[-2:]))`.
        initial_state: list of (B, size), as `return_state` gives it. Default:
            the cell's own. `MemoryCell` says how large its entries may be,
            and those of the sequences.
        mask: (B, T), or (B, T, 1), bool; False holds a row at that step.
        training: bool.
        use_memory: bool. False: the controller goes on without its memory,
            which stays as it is; all reads are 0. Default True. Not passed on
            by `Bidirectional`, `Sequential` and other layers around this one.

    Raises:
        ValueError: inputs that are not (B, T, D), no time steps, another width
            than before, initial states that the cell does not have, a mask
            of another shape, loop="fast" where it cannot be, `recompute` with
            loop="portable" or `unroll`, or a bool that is something else.
        TypeError: an argument that the class does not have or lacks.
        NotImplementedError: second derivatives through the fast loop.
    """

    cell_class: type[MemoryCell] | None = None

    if TYPE_CHECKING:
        return_sequences: bool
        return_state: bool
        go_backwards: bool
        stateful: bool
        unroll: bool
        zero_output_for_mask: bool
        loop: str
        recompute: int | str | None
        time_loop: str | None

    def __init_subclass__(
        cls, cell: type[MemoryCell] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if cell is not None:
            cls.cell_class = cell
            own = init_parameters(MemoryRNN)
            all_parameters = {**init_parameters(cell), **own}
            all_parameters.pop("accesses", None)
            if "__init__" not in vars(cls):
                parameters = sorted(
                    all_parameters.values(), key=lambda p: p.kind
                )
                cls.__signature__ = ClassAttribute(
                    inspect.Signature(parameters)
                )
            cls.__doc__ = with_arguments(
                cls.__doc__,
                all_parameters,
                MemoryCell.__doc__,
                MemoryRNN.__doc__,
            )
            # The same attributes on all backends, whose classes have names of
            # their own: `share_memory` is one of PyTorch's.
            taken = {
                name
                for base in cls.__mro__
                if base.__module__.partition(".")[0] not in BACKENDS
                for name in vars(base)
            }
            for name in {*init_parameters(cell)} - {*own, "accesses"} - taken:
                setattr(cls, name, cell_property(name))
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # not that of the base

    @classmethod
    def _accepted_behind(cls, owner):
        if owner is MemoryRNN and cls.cell_class is not None:
            return None  # the rest goes to the cell, which looks at it
        return super()._accepted_behind(owner)

    def __init__(
        self,
        *args: Any,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        loop: str = "auto",
        recompute: int | str | None = None,
        **kwargs: Any,
    ):
        of_layer = {
            key: kwargs.pop(key)
            for key in ("name", "trainable", "activity_regularizer")
            if key in kwargs
        }
        dtype = kwargs.pop("dtype", None)
        if self.cell_class is not None:
            with written_as(self.cell_class, type(self)):
                args = (self.cell_class(*args, dtype=dtype, **kwargs),)
            kwargs = {}
        elif not args:
            args = (kwargs.pop("cell", None),)
        if not isinstance(args[0], MemoryCell):
            raise TypeError(
                "`cell` must be a `MemoryCell`; `keras.layers.RNN` runs any "
                f"other. Received: cell={args[0]!r}"
            )
        if len(args) > 1 or "cell" in kwargs:
            raise TypeError(
                f"{type(self).__name__} takes one argument without a name, "
                f"the cell. Received: {args}"
            )
        flags = {
            "return_sequences": return_sequences,
            "return_state": return_state,
            "go_backwards": go_backwards,
            "stateful": stateful,
            "unroll": unroll,
            "zero_output_for_mask": zero_output_for_mask,
        }
        for name, value in flags.items():
            check_bool(name, value)
        if loop not in LOOPS:
            raise ValueError(
                f"`loop` must be one of {LOOPS}. Received: loop={loop!r}"
            )
        if recompute is not None and recompute != "sqrt":
            check_size("recompute", recompute, alternatives=', "sqrt" or None')
        if recompute is not None and (loop == "portable" or unroll):
            raise ValueError(
                "`recompute` is a way of the fast time loop. Received: "
                f"recompute={recompute!r}, loop={loop!r}, unroll={unroll}"
            )
        super().__init__(
            *args,
            **flags,
            dtype=dtype,
            **of_layer,
            **kwargs,
        )

        self.cell: MemoryCell
        self.loop = loop
        self.recompute = recompute
        self.time_loop = None
        self._was_trained = False  # by a call that `time_loop` tells of

    def build(
        self, sequences_shape: Any = None, initial_state_shape: Any = None
    ) -> None:
        if sequences_shape is None:  # the layer was called on None
            check_array("sequences", None)
        self._check_sequences(sequences_shape)
        super().build(sequences_shape, initial_state_shape)

    def __call__(self, sequences: Array, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sequences, np.ndarray):  # Keras's error names no argument
            check_array("sequences", sequences, result="given")
        return super().__call__(sequences, *args, **kwargs)

    def call(
        self,
        sequences: Array,
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
        training: bool | None = False,
        use_memory: bool = True,
    ) -> Any:
        sequences, initial_state, mask = self._check_arguments(
            sequences, initial_state, mask
        )
        check_bool("use_memory", use_memory)
        if self.unroll and sequences.shape[1] is None:
            raise ValueError(
                "`sequences` must have a known number of time steps for "
                f"unroll=True. Received: shape {tuple(sequences.shape)}"
            )
        given, states, starts = sequences, None, []
        if self.stateful:
            batch_size = self.states[0].shape[0]
            sequences = check_batch("sequences", sequences, batch_size)
            if mask is not None:
                mask = check_batch("mask", mask, batch_size)
            states, starts = self._present_states()
        if initial_state is not None:
            states = initial_state
        elif states is None:
            states = self.get_initial_state(ops.shape(sequences)[0])
        states = [ops.cast(state, self.cell.compute_dtype) for state in states]
        # Before the loop, as JAX draws no random numbers within one.
        self.cell.get_dropout_mask(sequences[:, 0])
        self.cell.get_recurrent_dropout_mask(states[0])
        last, outputs, states = self.inner_loop(
            sequences, states, mask, training, use_memory
        )
        self.cell.reset_dropout_mask()
        self.cell.reset_recurrent_dropout_mask()
        outputs = outputs if self.return_sequences else last
        outputs = ops.cast(outputs, self.compute_dtype)
        states = [ops.cast(state, self.compute_dtype) for state in states]
        if self.stateful:
            for variable, value in zip(
                [*self.states, *self._starts], [*states, *starts]
            ):
                variable.assign(value)
            outputs = with_rows_of(outputs, given)
        return (outputs, *states) if self.return_state else outputs

    def compute_output_spec(
        self,
        sequences: Array,
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        # Here too, as what is wrong in a Functional model is told where it is
        # made, and not where it is first called.
        self._check_arguments(sequences, initial_state, mask)
        return super().compute_output_spec(
            sequences, initial_state, mask, **kwargs
        )

    def _check_arguments(self, sequences, initial_state, mask):
        """Sequences, states and a mask of bools (B, T), or None, as tensors."""
        if mask is None:
            # Keras hands it on to layers of one tensor only. Here in front, as
            # the sequences lose it where integers become floats.
            mask = get_keras_mask(sequences)
        width = self.cell.input_size if self.built else None
        sequences = check_array("sequences", sequences)
        self._check_sequences(sequences.shape)
        sequences = with_size(sequences, -1, width, "width")
        batch_size, time = sequences.shape[:2]
        if initial_state is not None:
            initial_state = self.cell._check_states(
                initial_state, batch_size, "initial_state"
            )
        if mask is not None:
            if isinstance(mask, (list, tuple)):
                mask = check_array("mask", mask, kind="mask", result="given")
            with_width = len(getattr(mask, "shape", ())) == 3
            mask = check_array(
                "mask",
                mask,
                ("batch", "time", 1) if with_width else ("batch", "time"),
                {"batch": batch_size, "time": time},
                kind="mask",
                dtype="bool",
            )
            mask = mask[:, :, 0] if with_width else mask
        return sequences, initial_state, mask

    def _check_sequences(self, shape, name="sequences"):
        if len(shape) != 3 or shape[1] == 0:
            raise ValueError(
                f"`{name}` of {type(self).__name__} must be of shape "
                "(batch, time, width) with at least one time step. For further "
                "batch axes reshape to three axes first: "
                "`keras.ops.reshape(x, (-1, *x.shape[-2:]))`. Received: "
                f"shape {tuple(shape)}"
            )
        if self.built and shape[2] not in (self.cell.input_size, None):
            raise ValueError(
                f"{type(self).__name__} {self.name!r} was built for inputs of "
                f"width {self.cell.input_size} (their last axis). Received: "
                f"shape {tuple(shape)}"
            )

    def inner_loop(
        self,
        sequences: Array,
        initial_state: Sequence[Array],
        mask: Array | None,
        training: bool | None = False,
        use_memory: bool = True,
    ) -> tuple[Array, Array, list[Array]]:
        """The call without its surroundings: last output, all outputs, and
        states, of what `call` has checked."""
        if (record := recorder.get()) is not None:
            record(self, sequences, initial_state, mask, training, use_memory)
        if self.stateful:
            # PyTorch writes the next states into the memory of these, which
            # the gradient still needs.
            initial_state = [ops.copy(state) for state in initial_state]
        features, records, time_loop = run(
            self.cell,
            sequences,
            self.cell.layout.in_range(initial_state),
            mask=mask,
            training=training,
            go_backwards=self.go_backwards,
            # TensorFlow's optimizer of graphs divides by the size of batches.
            unroll=self.unroll and sequences.shape[0] != 0,
            all_outputs=self.return_sequences,
            use_memory=use_memory,
            loop=self.loop,
            recompute=self.recompute,
        )
        if training or not self._was_trained:
            self.time_loop = time_loop
            self._was_trained = bool(training)
        outputs = self.cell.project(features, training)
        if mask is not None:
            outputs = self._masked_outputs(outputs, mask)
        last = outputs[:, -1] if self.return_sequences else outputs
        return last, outputs, self.cell.layout.flatten(records)

    def _masked_outputs(self, outputs, mask):
        """Zeroes masked outputs, or those in front of the first valid step,
        which have no output to hold."""
        mask = ops.cast(mask, "int32")
        if self.go_backwards:
            mask = ops.flip(mask, axis=1)
        if not self.zero_output_for_mask:
            mask = ops.cumsum(mask, axis=1)
        shown = mask > 0 if self.return_sequences else mask[:, -1] > 0
        return select(shown, outputs, ops.zeros_like(outputs))

    def _create_state_variables(self, batch_size):
        def initial(index, shape, dtype):
            # Here and not around: where the layer is built within a graph,
            # TensorFlow lifts initializers out of it.
            return ops.cast(self.get_initial_state(shape[0])[index], dtype)

        def variables(name, rows, indices):
            return [
                (
                    f"{name}{index_suffix(number)}",
                    (rows, self.cell.state_size[index]),
                    functools.partial(initial, index),
                )
                for number, index in enumerate(indices)
            ]

        states = range(len(self.cell.state_size))
        self._state = LayerState(
            [
                *variables("state", batch_size, states),
                *variables("start", 1, self.cell.weight_states),
            ],
            self.variable_dtype,
            name="state",
            dtype=self.dtype_policy,
        )

    @property
    def states(self) -> Any:
        """Variables (B, size) of a stateful layer; None where there are none,
        or not yet."""
        if self._state is None:
            return None
        return self._state.variables[: len(self.cell.state_size)]

    @states.setter
    def states(self, value: Array) -> Any:
        self._state = value  # None, which Keras's RNN begins with

    @property
    def _starts(self):
        """Variables (1, size): where rows began whose initial state is of
        weights."""
        return self._state.variables[len(self.cell.state_size) :]

    def _present_states(self):
        """What a stateful layer goes on from, and the `_starts` then.

        A row that has made no step yet starts from the weights as they are
        now, which may have been loaded since the layer was built.
        """
        states = [ops.convert_to_tensor(state) for state in self.states]
        starts = []
        if self.cell.weight_states:
            initial = self.get_initial_state(1)
        for index, start in zip(self.cell.weight_states, self._starts):
            starts.append(ops.cast(initial[index], start.dtype))
            begun = ops.any(states[index] != start, axis=1, keepdims=True)
            states[index] = ops.where(begun, states[index], starts[-1])
        return states, starts

    def reset_state(self) -> None:
        """Puts the states of a stateful layer back to the initial state."""
        if self.states is not None:
            batch_size = self.states[0].shape[0]
            initial = self.get_initial_state(batch_size)
            learned = [initial[index][:1] for index in self.cell.weight_states]
            for variable, value in zip(
                [*self.states, *self._starts], [*initial, *learned]
            ):
                variable.assign(ops.cast(value, variable.dtype))

    def reset_memory(
        self, states: Sequence[Array] | None = None, rows: Array | None = None
    ) -> list[Array]:
        """Puts the memory back to its start while the controller goes on.

        Args:
            states: list of (B, size), as `return_state` gives it; None for
                those of a stateful layer, which are set.
            rows: (B,) bool, rows of the batch to reset; None for all.

        Returns:
            List of (B, size).

        Raises:
            ValueError: states that the layer does not have, no states, or
                rows that are not one bool for each row of the batch.
        """
        return self._reset(self.cell.reset_memory, states, rows)

    def reset_controller(
        self, states: Sequence[Array] | None = None, rows: Array | None = None
    ) -> list[Array]:
        """Puts the controller back to its start while the memory, with what
        was read from it, stays. Arguments and errors: `reset_memory`."""
        return self._reset(self.cell.reset_controller, states, rows)

    def _reset(self, reset, states, rows):
        if states is not None:
            return reset(states, rows)
        if not self.states:
            raise ValueError(
                "`states` must be given to a layer that has none of its own: "
                "only a stateful one does, from its first batch on. Received: "
                f"states=None, stateful={self.stateful}"
            )
        states, starts = self._present_states()
        # Copies: on PyTorch what is kept is a view of the layer's states.
        after = [ops.copy(value) for value in reset(states, rows)]
        for variable, value in zip(
            [*self.states, *self._starts], [*after, *starts]
        ):
            variable.assign(value)
        return after

    def get_config(self) -> Config:
        config = {
            **super().get_config(),
            "loop": self.loop,
            "recompute": self.recompute,
        }
        if self.cell_class is not None:
            config.pop("cell")
            config = {**self.cell.get_config(), **config}
        return config

    @classmethod
    def from_config(
        cls, config: Config, custom_objects: Config | None = None
    ) -> Self:
        if cls.cell_class is None:
            return super().from_config(config, custom_objects)
        with keras.saving.custom_object_scope(custom_objects or {}):
            return cls(**config)
