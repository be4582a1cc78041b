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

from keras_memory.addressing.slots import select
from keras_memory.arguments import ArgumentError
from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_bool
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.checks import plain
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
from keras_memory.recurrent.serialization import saved_arguments
from keras_memory.recurrent.serialization import with_arguments
from keras_memory.recurrent.state import LayerState
from keras_memory.recurrent.state import index_suffix

# While `trace_model` runs in this thread: a function to call with each layer
# and the arguments of its `inner_loop`, also for layers that the model makes.
recorder = contextvars.ContextVar("recorder", default=None)


@keras.saving.register_keras_serializable(package="keras_memory")
class MemoryRNN(Arguments, keras.layers.RNN):
    """Runs a memory cell over time; the base of all recurrent layers here.

    `MemoryRNN(cell, ...)` runs any `MemoryCell`. A subclass
    `class NTMLayer(MemoryRNN, cell=NTMCell)` makes its own cell: it takes the
    cell's arguments, then those below. The cell's arguments can be read as
    attributes of the layer, such as `layer.memory_slots`.

    Differences from `keras.layers.RNN`, which does not fit a memory:
    `reset_state` restores the cell's initial state instead of zeros; masked
    steps keep output and state on every backend, and their inputs are never
    used, even if NaN; the states of a stateful layer are tracked variables on
    every backend; the output projection runs once, after the time loop.

    Args:
        *args: a `MemoryCell`, or the arguments of the subclass's cell.
        return_sequences: bool. True: return the output of every step. False:
            of the last step only.
        return_state: bool, also return the final states, flat: see
            `MemoryCell.unpack_state`.
        go_backwards: bool, run from the last step to the first.
        stateful: bool, continue from the final states of the previous batch.
            Needs a fixed batch size. `states` are variables, but not weights,
            as in Keras: `get_weights`, `set_weights` and files leave them out,
            so that weights can be copied between stateless and stateful layers
            and between batch sizes. A loaded layer begins at its initial
            state; `reset_state()` returns to it. After either, a row makes its
            first step from the initial state of the current weights.
        unroll: bool, as in `keras.layers.RNN`.
        zero_output_for_mask: bool, masked steps give 0 instead of the output
            of the step before.
        loop: `"auto"`, `"fast"` or `"portable"`. The fast loop has a custom
            gradient: the same results, faster, but first derivatives only, and
            no vectorized gradients, such as `batch_jacobian` in a
            `tf.function`; use `"portable"` for these. `"auto"` uses the fast
            loop in training, on TensorFlow and JAX, unless `unroll` is True or
            a step adds losses or changes variables, as a controller with
            `Dropout` layers does; `time_loop` gives the reason. `"fast"` uses
            it or raises an error. The fast loop runs each step twice: use
            `"portable"` for a cell of your own that draws random numbers other
            than by Keras, or uses tensors from outside that need gradients.
        recompute: None, an int of at least 1, or `"sqrt"`: gradient
            checkpointing in the fast loop. With an int k it saves the states
            every k steps only, and recomputes the steps between in the
            backward pass: less memory for one more forward pass. `"sqrt"`: k
            is the square root of the number of steps, which needs the least
            memory. The segment that is being recomputed, and the first 1 to k
            steps, still save everything. No effect in the portable loop.
            Default None: every step saves everything.
        **kwargs: of the subclass's cell, and of `keras.layers.Layer`.

    Attributes:
        time_loop: the loop that the last call with `training=True` used, or,
            without such a call, the last call: "fast", or "portable: " and the
            reason. None before the first call. Calls of already compiled
            functions do not count.

    Call arguments:
        sequences: (B, T, D). For further batch axes reshape first:
            `keras.ops.reshape(x, (-1, *x.shape[-2:]))`.
        initial_state: list of (B, size), as from `return_state`. Default: the
            cell's own. `MemoryCell` documents the range of its entries and of
            the sequences.
        mask: (B, T), or (B, T, 1), bool; False: the row keeps its output and
            state at that step.
        training: bool.
        use_memory: bool. False: the controller runs without the memory, which
            stays unchanged; all reads are 0. Default True. `Bidirectional`,
            `Sequential` and other layers around this one do not pass it on.

    Raises:
        ValueError: the inputs are not (B, T, D), have no time steps, or
            another width than before; initial states do not fit the cell; a
            mask has another shape; loop="fast" is not possible; `recompute` is
            combined with loop="portable" or `unroll`; the given cell has an
            `activity_regularizer`; or a bool argument is not a bool.
        TypeError: an argument is unknown or missing.
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
            _check_cell_class(cls, cell)
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
            # The same attributes on all backends: those of the backends' own
            # classes, such as PyTorch's `share_memory`, are overridden.
            taken = {
                name
                for base in cls.__mro__
                if base.__module__.partition(".")[0] not in BACKENDS
                for name in vars(base)
            }
            for name in {*init_parameters(cell)} - {*own, "accesses"} - taken:
                setattr(cls, name, cell_property(name))
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # not the signature of the base

    @classmethod
    def _all_arguments(cls):
        names = super()._all_arguments()
        if cls.cell_class is None or "cell" not in names:
            return names
        names += cls.cell_class._all_arguments()
        return [name for name in names if name != "cell"]

    @classmethod
    def _accepted_behind(cls, owner):
        if owner is MemoryRNN and cls.cell_class is not None:
            return None  # the rest goes to the cell, which checks it
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
            try:
                args = (self.cell_class(*args, dtype=dtype, **kwargs),)
            except ArgumentError as error:
                raise error.naming(type(self), self.cell_class) from None
            kwargs = {}
        elif not args:
            args = (kwargs.pop("cell", None),)
        if not isinstance(args[0], MemoryCell):
            raise TypeError(
                "`cell` must be a `MemoryCell`; `keras.layers.RNN` runs other "
                f"cells. Received: cell={args[0]!r}"
            )
        regularizer = args[0].activity_regularizer
        if regularizer is not None:  # which only a call of the cell would use
            raise ValueError(
                "`activity_regularizer` must be given to the layer instead of "
                f"its cell. Received: activity_regularizer={regularizer!r}"
            )
        if len(args) > 1 or "cell" in kwargs:
            raise TypeError(
                f"{type(self).__name__} takes one positional argument, the "
                f"cell. Received: {args}"
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
        check_one_of("loop", loop, LOOPS)
        is_root = isinstance(recompute, str) and recompute == "sqrt"
        if recompute is not None and not is_root:
            check_size("recompute", recompute, alternatives=', "sqrt" or None')
        if recompute is not None and (loop == "portable" or unroll):
            raise ValueError(
                "`recompute` needs the fast time loop. Received: "
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
        if self.cell_class is None:
            self.cell.check_not_on_host(f"`{type(self).__name__}(cell)`")
        self.loop = loop
        self.recompute = recompute
        self.time_loop = None
        self._was_trained = False  # whether `time_loop` is of a training call

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
        # Keras would make tensors of flags such as `np.False_`.
        return super().__call__(sequences, *args, **plain(kwargs))

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
            batch_size, steps = ops.shape(sequences)[:2]
            on_jax = keras.backend.backend() == "jax"  # which knows all sizes
            is_known = isinstance(steps, int) or not on_jax
            if self.cell.starts_empty and not self.return_state and is_known:
                # Nobody sees how many slots the states have.
                states = self.cell.get_initial_state(batch_size, steps)
            else:
                states = self.get_initial_state(batch_size)
        states = self.cell.layout.cast(states, self.cell.compute_dtype)
        # Before the loop, inside of which JAX cannot draw random numbers.
        self.cell.get_dropout_mask(sequences[:, 0])
        self.cell.get_recurrent_dropout_mask(states[0])
        last, outputs, states = self.inner_loop(
            sequences, states, mask, training, use_memory
        )
        self.cell.reset_dropout_mask()
        self.cell.reset_recurrent_dropout_mask()
        outputs = outputs if self.return_sequences else last
        outputs = ops.cast(outputs, self.compute_dtype)
        states = self.cell.layout.cast(states, self.compute_dtype)
        if self.stateful:
            self._assign_states([*states, *starts])
            outputs = with_rows_of(outputs, given)
        return (outputs, *states) if self.return_state else outputs

    def compute_output_spec(
        self,
        sequences: Array,
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        # Here too, so that a wrong Functional model raises an error when it is
        # made, and not at its first call.
        self._check_arguments(sequences, initial_state, mask)
        spec = super().compute_output_spec(
            sequences, initial_state, mask, **kwargs
        )
        if not self.return_state:
            return spec
        # Keras gives all results the compute dtype.
        output, *states = spec
        return output, *(
            keras.KerasTensor(state.shape, own.dtype_in(state.dtype))
            for state, own in zip(states, self.cell.layout.specs)
        )

    def _check_arguments(self, sequences, initial_state, mask):
        """Checks the arguments, and returns them as tensors.

        The mask becomes bool, (B, T), or None.
        """
        if mask is None:
            # Keras passes it only to layers with one tensor argument. Read it
            # first: the cast of integers to floats drops it.
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
        """Runs the time loop on arguments that `call` has checked.

        Returns the last output, all outputs, and the states.
        """
        if (record := recorder.get()) is not None:
            record(self, sequences, initial_state, mask, training, use_memory)
        if self.stateful and keras.backend.backend() == "torch":
            # PyTorch writes the next states into the same memory, but the
            # gradient still needs these.
            initial_state = [ops.copy(state) for state in initial_state]
        features, records, time_loop = run(
            self.cell,
            sequences,
            self.cell.layout.in_range(initial_state),
            mask=mask,
            training=training,
            go_backwards=self.go_backwards,
            # TensorFlow's graph optimizer divides by the batch size.
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
        """Zeroes masked outputs, or only those before the first valid step,
        which have no earlier output to repeat."""
        mask = ops.cast(mask, "int32")
        if self.go_backwards:
            mask = ops.flip(mask, axis=1)
        if not self.zero_output_for_mask:
            mask = ops.cumsum(mask, axis=1)
        shown = mask > 0 if self.return_sequences else mask[:, -1] > 0
        return select(shown, outputs, ops.zeros_like(outputs))

    def _create_state_variables(self, batch_size):
        def initial(index, shape, dtype):
            if index in self.cell.weight_states:
                # State and start are equal, so each row starts from the current
                # weights. XLA cannot read weights in an initializer.
                return ops.zeros(shape, dtype)
            # Computed in here: if the layer is built within a graph, TensorFlow
            # lifts initializers out of the graph.
            return ops.cast(self.get_initial_state(shape[0])[index], dtype)

        def variables(name, rows, indices):
            return [
                (
                    f"{name}{index_suffix(number)}",
                    (rows, self.cell.state_size[index]),
                    self.cell.layout.specs[index].dtype_in(self.variable_dtype),
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
            name="state",
            dtype=self.dtype_policy,
        )

    @property
    def states(self) -> Any:
        """State variables (B, size) of a stateful layer; None if it is not
        stateful or not built."""
        if self._state is None:
            return None
        return self._state.variables[: len(self.cell.state_size)]

    @states.setter
    def states(self, value: Array) -> Any:
        self._state = value  # None, which Keras's RNN sets at first

    @property
    def _starts(self):
        """Variables (1, size): the initial states, of weights, from which the
        rows started."""
        return self._state.variables[len(self.cell.state_size) :]

    def _present_states(self):
        """The current states of a stateful layer, and new values of `_starts`.

        A row without a step yet starts from the current weights, which may
        have been loaded after the layer was built.
        """
        number = len(self.cell.state_size)
        values = self._values_of_state()
        states, starts = values[:number], []
        if self.cell.weight_states:
            initial = self.get_initial_state(1)
        for index, start in zip(self.cell.weight_states, values[number:]):
            starts.append(ops.cast(initial[index], start.dtype))
            begun = ops.any(states[index] != start, axis=1, keepdims=True)
            states[index] = ops.where(begun, states[index], starts[-1])
        return states, starts

    def _values_of_state(self):
        """The values of `states`, then of `_starts`, to begin a call with."""
        return [ops.convert_to_tensor(v) for v in self._state.variables]

    def _assign_states(self, values):
        """Assigns values to `states`, then to `_starts`, to end a call."""
        for variable, value in zip([*self.states, *self._starts], values):
            variable.assign(value)

    def reset_state(self) -> None:
        """Resets the states of a stateful layer to the initial state."""
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
        """Resets the memory to its initial state; the controller's state stays.

        Args:
            states: list of (B, size), as from `return_state`; None for the
                states of a stateful layer, which are then updated.
            rows: (B,) bool, rows of the batch to reset; None for all.

        Returns:
            List of (B, size).

        Raises:
            ValueError: the states do not fit the layer, there are none, or
                `rows` is not one bool for each row of the batch.
        """
        return self._reset(self.cell.reset_memory, states, rows)

    def reset_controller(
        self, states: Sequence[Array] | None = None, rows: Array | None = None
    ) -> list[Array]:
        """Resets the controller to its initial state; the memory and its reads
        stay. Arguments and errors: see `reset_memory`."""
        return self._reset(self.cell.reset_controller, states, rows)

    def _reset(self, reset, states, rows):
        if states is not None:
            return reset(states, rows)
        if not self.states:
            raise ValueError(
                "`states` must be given: the layer has no states of its own. "
                "Only a stateful layer has, from its first batch on. Received: "
                f"states=None, stateful={self.stateful}"
            )
        states, starts = self._present_states()
        # Copies: on PyTorch unchanged states are views of the layer's states.
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
            return cls(**cls._arguments_from(config))

    @classmethod
    def _arguments_from(cls, config):
        """The arguments of `__init__`, from a configuration."""
        cell = cls.cell_class
        if cell.from_config.__func__ is MemoryCell.from_config.__func__:
            return cell._with_objects(config)
        # Only the cell's own `from_config` knows its arguments.
        of_cell = saved_arguments(cell)
        own = {*init_parameters(cls), *KerasArguments.__annotations__}
        own -= {*of_cell}
        made = cell.from_config(
            {n: v for n, v in config.items() if n not in own - {"dtype"}}
        )
        return {
            **{name: config[name] for name in own & {*config}},
            **{name: getattr(made, name) for name in of_cell},
        }


def _check_cell_class(layer, cell):
    """Raises TypeError unless a layer can make its own cells of a class."""
    if not isinstance(cell, type) or not issubclass(cell, MemoryCell):
        raise TypeError(
            f"`cell` of {layer.__name__} must be a subclass of `MemoryCell`. "
            f"Received: cell={cell!r}"
        )
    base = next(b for b in layer.__mro__[1:] if issubclass(b, MemoryRNN))
    if base.__init__ is not MemoryRNN.__init__ and not issubclass(
        cell, base.cell_class or cell
    ):
        raise TypeError(
            f"`cell` of {layer.__name__} must be a subclass of "
            f"{base.cell_class.__name__}, whose arguments {base.__name__} "
            "takes: for another cell derive from `MemoryRNN`. "
            f"Received: cell={cell.__name__}"
        )
