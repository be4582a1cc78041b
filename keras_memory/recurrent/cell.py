"""The structure that all recurrent memories share.

A step is a list of blocks, and each block is controller + interface + access:

    controller_in  = concat(x_t, previous reads)
    controller_out = controller(controller_in)
    interface      = controller_out @ interface_kernel + interface_bias
    state          = access.step(interface, state)      no weights inside
    features       = concat(controller_out, reads)

The first block sees the input and the last block's reads of the step before.
Each further block sees the features of the previous block. The layer's output
is a projection of the last block's features, outside the time loop.
"""

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import Self
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.gradients import custom_gradients
from keras_memory.addressing.gradients import linear
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.slots import rows_at
from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.arguments import checked
from keras_memory.checks import MOST_LAYERS
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_clip
from keras_memory.checks import check_layers
from keras_memory.checks import check_rate
from keras_memory.checks import check_seed
from keras_memory.checks import check_size
from keras_memory.checks import plain
from keras_memory.hints import Activation
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape
from keras_memory.recurrent import cells
from keras_memory.recurrent import controllers
from keras_memory.recurrent.cell_states import CellStates
from keras_memory.recurrent.cells import LayerNormalization
from keras_memory.recurrent.contract import check_access
from keras_memory.recurrent.contract import check_step
from keras_memory.recurrent.dropout import SequenceDropout
from keras_memory.recurrent.interface import Access
from keras_memory.recurrent.interface import StateSpec
from keras_memory.recurrent.serialization import deserialize
from keras_memory.recurrent.serialization import init_parameters
from keras_memory.recurrent.serialization import init_with_access
from keras_memory.recurrent.serialization import saved_arguments
from keras_memory.recurrent.serialization import serialize
from keras_memory.recurrent.serialization import unbuilt
from keras_memory.recurrent.state import StateLayout
from keras_memory.recurrent.state import index_suffix

if TYPE_CHECKING:

    class CellArguments:
        """Attributes of a cell, and of a layer that makes its own cell."""

        units: int | None
        controller: str | keras.layers.Layer
        controller_units: int
        controller_layers: int
        controller_dropout: float
        controller_clip: float | None
        controller_state_clip: float | None
        initial_controller_state: str | float
        activation: Callable[..., Any]
        clip_value: float | None
        interface_layer_norm: bool
        bypass_dropout: float
        kernel_initializer: keras.initializers.Initializer
        bias_initializer: keras.initializers.Initializer
        kernel_regularizer: keras.regularizers.Regularizer | None
        kernel_constraint: keras.constraints.Constraint | None
        seed: int | None
        num_layers: int
        share_memory: bool

else:
    CellArguments = object


class MemoryCell(
    Arguments,
    CellStates,
    SequenceDropout,
    keras.layers.Layer,
    CellArguments,
):
    """A recurrent cell with a memory: controller + interface + access.

    The base of all recurrent architectures here, and of your own: pass one
    `Access` per block. It works in `MemoryRNN` and in `keras.layers.RNN`.

    A subclass `class NTMCell(MemoryCell, access=NTMAccess)` makes its own
    accesses: `NTMAccess` is a dataclass, and the cell takes `units`, the
    fields of that class, and the arguments below except `accesses`. Other class
    keywords change the defaults of these arguments, as in
    `controller_units=64`.

    Equations: see the module docstring of `recurrent/cell.py`.

    State: flat tensors (B, size) outside of a step, so that Keras's RNN
    machinery can declare, hold and save them; `unpack_state` converts them to
    a named record.

    Masking and dtype: under 16-bit policies the access, which addresses the
    memory, computes in float32; states are kept in the compute dtype. If a
    cell is called without a layer, its dropout masks stay until
    `reset_dropout_mask()` and `reset_recurrent_dropout_mask()`, as in Keras's
    cells. A layer draws new masks for each call.

    Range: outputs, states and gradients are finite for inputs, memories, reads
    and controller states up to 1e18 in float32 and bfloat16, 1e150 in float64
    and 100 in float16 (whose largest number is 65504). This holds for the
    controllers made by name, weights of about 1 and upstream gradients of about
    1 (`test_extremes.py`). A controller whose output grows with its state, such
    as a GRU, produces equally large strengths and powers, which multiply the
    gradients. With such a controller, gradients are finite for states up to
    1e9, in float16 up to 100. The gradient of a kernel is its input times the
    gradient of its result, summed over batch and time: it is finite if that
    product is. Initial states may have any weightings, usages and links: values
    that no step can produce are first brought into range
    (`StateSpec.into_range`).

    Args:
        units: int, at least 1, width of the output. None: the output is the
            features, concat(controller output, reads), without projection.
        accesses: list with one `Access` per block. Blocks with the same access
            object share one memory and act on it one after the other.
        controller: `"lstm"`, `"gru"`, `"rnn"`, `"dense"`,
            `"layer_norm_lstm"`, `"layer_norm_rnn"`, `"peephole_lstm"`,
            `"nas"`, any Keras RNN cell (`StackedRNNCells` included), or a
            feed-forward layer. Further blocks get a new controller of the
            same configuration. The `layer_norm_*` controllers amplify
            gradients where all inputs are 0: mask such steps at the start of a
            sequence.
        controller_units: int, at least 1; width of a controller made by name.
            `controller_units`, `controller_layers` and `controller_dropout`
            are ignored when `controller` is a layer.
        controller_layers: int from 1 to 1024; number of the controller's
            layers. At most 1024 over all blocks.
        num_layers: int from 1 to 1024, number of blocks (controller,
            interface, memory) that run one after another in a step. Only for
            cells that make their own accesses. Default 1.
        share_memory: bool, for the same cells. True (default): all blocks
            share one memory; False: each block has its own.
        controller_dropout: float in [0, 1), dropout rate of the controller's
            inputs.
        controller_clip: positive float or None; clips the controller's output
            to +- this.
        controller_state_clip: positive float or None; clips the controller's
            states to +- this.
        initial_controller_state: `"learned"`, `"random"` (drawn once), a
            number, or `"constant"` (default): the controller's own
            `get_initial_state`, which is zeros for controllers made by name.
        activation: Keras activation of the output. Default: linear.
        clip_value: positive float or None; clips the output to +- this before
            the activation.
        interface_layer_norm: bool; True: the interface is layer-normalized,
            as in Franke et al. 2018 (arXiv 1807.02658). Default False.
        bypass_dropout: float in [0, 1), dropout rate of the controller output
            that bypasses the memory on its way to the output (same paper; here
            the same units are dropped at all steps of a sequence). Default 0.
        kernel_initializer: Keras initializer of interface and output kernels.
        bias_initializer: Keras initializer of interface and output biases.
        kernel_regularizer: Keras regularizer of interface and output kernels.
        kernel_constraint: Keras constraint of interface and output kernels.
        seed: int from 0 to 2^32 - 1, seed of the dropout; or None.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        inputs: (B, D).
        states: list of (B, size).
        training: bool.
        use_memory: bool. False: the controller runs without the memory, which
            stays unchanged; all reads are 0.

    Raises:
        ValueError: a size, clip, rate, seed or initial value is out of range,
            or the states or weights do not fit into the machine's memory; an
            access, or the result of its step, has wrong shapes or dtypes.
        TypeError: the controller is neither a name nor a layer; an argument
            is unknown or missing; or an access, its class or the result of its
            step is not as `Access` describes.
    """

    if TYPE_CHECKING:
        accesses: list[Access]
        block_controllers: list[keras.layers.Layer]
        interface_norms: list[keras.layers.Layer]
        interfaces: list[tuple[keras.Variable, keras.Variable]]
        output_projection: tuple[keras.Variable, keras.Variable]
        memory_of_block: list[int]
        layout: StateLayout
        access_dtype: str
        input_size: int
        state_size: list[int]
        weight_states: list[int]
        seed_generator: keras.random.SeedGenerator

    def __init_subclass__(
        cls, access: Callable[..., Access] | None = None, **defaults: Any
    ) -> None:
        super().__init_subclass__()
        if access is not None:
            init = init_with_access(cls, access, defaults)
            type.__setattr__(cls, "__init__", checked(cls, init))
        elif defaults:
            raise TypeError(
                f"The class keywords of {cls.__name__} must begin with "
                "`access`, as in `class MyCell(MemoryCell, access=MyAccess, "
                "controller_units=64)`: the others are defaults of a cell that "
                f"makes its own accesses. Received: {defaults}"
            )

    def __init__(
        self,
        units: int | None,
        accesses: Iterable[Access],
        controller: str | keras.layers.Layer | Config = "lstm",
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
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        if units is not None:
            check_size("units", units)
        self.units = units
        self.accesses = list(accesses)
        if not self.accesses:
            raise ValueError(
                "`accesses` must have one access for each block, at least "
                f"one. Received: accesses={accesses!r}"
            )
        if isinstance(controller, dict):
            controller = keras.saving.deserialize_keras_object(controller)
        self.controller = controller
        self.controller_units = controller_units
        self.controller_layers = controller_layers
        self._check_number_of_layers()
        self.controller_dropout = controller_dropout
        self.controller_clip = check_clip("controller_clip", controller_clip)
        self.controller_state_clip = check_clip(
            "controller_state_clip", controller_state_clip
        )
        self.initial_controller_state = StateSpec.check(
            "initial_controller_state", initial_controller_state
        )
        self.activation = keras.activations.get(activation)
        self.clip_value = check_clip("clip_value", clip_value)
        self.interface_layer_norm = check_bool(
            "interface_layer_norm", interface_layer_norm
        )
        self.bypass_dropout = check_rate("bypass_dropout", bypass_dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.seed = check_seed("seed", seed)

        self.block_controllers = [
            self._make_controller(block) for block in range(len(self.accesses))
        ]
        self.interface_norms = [
            LayerNormalization(
                dtype=self.dtype_policy,
                name=f"interface_norm{index_suffix(block)}",
            )
            for block in range(len(self.accesses) * interface_layer_norm)
        ]
        if bypass_dropout:
            # The seeds of the controllers come first.
            after = len(self.accesses) * controller_layers
            self.seed_generator = keras.random.SeedGenerator(
                cells.seed_of(seed, after)
            )
        # One memory for each distinct access, in order of appearance.
        memories = {id(access): access for access in self.accesses}
        numbers = {key: memory for memory, key in enumerate(memories)}
        self.memory_of_block = [numbers[id(a)] for a in self.accesses]
        self.layout = StateLayout(
            tuple(
                check_access(access)._replace(
                    controller=self._controller_specs(memory)
                )
                for memory, access in enumerate(memories.values())
            )
        )
        self._controller_index = [  # of each block among those of its memory
            self._blocks_of_memory(memory).index(block)
            for block, memory in enumerate(self.memory_of_block)
        ]
        # The dtype of addressing: never 16 bits.
        self.access_dtype = at_least_float32(self.compute_dtype)
        self.state_size = self.layout.sizes
        self.weight_states = [  # indices of states that start from weights
            index
            for index, spec in enumerate(self.layout.specs)
            if spec.is_weight
        ]
        for spec, size in zip(self.layout.specs, self.state_size):
            if not spec.per_slot:  # which may never be made as a whole
                check_bytes("A state of one batch row", [("its numbers", size)])

    @classmethod
    def _all_arguments(cls):
        names = super()._all_arguments()
        if "accesses" in inspect.signature(cls).parameters:
            return names
        return [name for name in names if name != "accesses"]  # makes its own

    def _controller_specs(self, memory):
        """`StateSpec`s of the controllers whose blocks act on a memory."""

        def spec(size):
            initializer = keras.initializers.RandomNormal(stddev=0.05)
            start = self.initial_controller_state
            return StateSpec((size,), start, initializer=initializer)

        return tuple(
            keras.tree.map_structure(
                spec, controllers.state_structure(self.block_controllers[block])
            )
            for block in self._blocks_of_memory(memory)
        )

    def _check_number_of_layers(self):
        layers = check_layers("controller_layers", self.controller_layers)
        blocks = len(self.accesses)
        if isinstance(self.controller, str) and blocks * layers > MOST_LAYERS:
            raise ValueError(
                f"`controller_layers` must be at most {MOST_LAYERS} over all "
                "blocks, since each layer is made and traced separately. "
                f"Received: controller_layers={layers}, {blocks} blocks "
                "(`num_layers`)"
            )

    def _make_controller(self, block):
        """Makes the controller of a block, a copy if a layer was given."""
        given = self.controller
        if block and isinstance(given, keras.layers.Layer):
            config = unbuilt(given.get_config())
            config["name"] = f"{given.name}_{block}"
            return type(given).from_config(config)
        return controllers.get(
            given,
            self.controller_units,
            self.controller_layers,
            self.controller_dropout,
            cells.seed_of(self.seed, block * self.controller_layers),
            self.dtype_policy,
        )

    @property
    def features_size(self) -> int:
        """Width of concat(controller output, reads) of the last block."""
        size = controllers.output_size(
            self.block_controllers[-1],
            self._input_sizes[-1] if self.built else None,
        )
        return size + self.accesses[-1].read_size

    @property
    def output_size(self) -> int:
        return self.features_size if self.units is None else self.units

    def build(self, input_shape: Shape) -> None:
        if input_shape[-1] is None:
            raise ValueError(
                "The width of the inputs (their last axis) must be known to "
                f"build the weights. Received: input_shape={input_shape}"
            )
        self.input_size = input_shape[-1]
        size = self.input_size + self.accesses[-1].read_size
        self._input_sizes, self.interfaces = [], []
        for block, access in enumerate(self.accesses):
            controller = self.block_controllers[block]
            cells.check_kernel(controller, size)
            if not controller.built:  # built already if reloaded or cloned
                controller.build((None, size))
            self._input_sizes.append(size)
            size = controllers.output_size(controller, size)
            self.interfaces.append(
                self._add_projection(
                    f"interface{index_suffix(block)}",
                    size,
                    access.interface_size,
                )
            )
            if self.interface_layer_norm:
                norm = self.interface_norms[block]
                norm.build((None, access.interface_size))
            size += access.read_size
        self.build_dropout(self._input_sizes)
        if self.units is not None:
            self.output_projection = self._add_projection(
                "output", size, self.units
            )
        self.build_states()

    def _add_projection(self, name, inputs, outputs):
        widths = "size of the controller's output", "size of the interface"
        if name == "output":
            widths = "size of the features", "units"
        sizes = (widths[0], inputs), (widths[1], outputs)
        check_bytes(f"The kernel of the {name}", sizes)

        def add(kind, shape, initializer, **options):
            # An initializer draws the same numbers at each call. A clone
            # without a fixed seed draws others, so that blocks differ.
            if name.startswith("interface_") and hasattr(initializer, "clone"):
                initializer = initializer.clone()
            return self.add_weight(
                shape=shape,
                initializer=initializer,
                name=f"{name}_{kind}",
                **options,
            )

        kernel = add(
            "kernel",
            (inputs, outputs),
            self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        return kernel, add("bias", (outputs,), self.bias_initializer)

    # One step.

    def step(
        self,
        inputs: Array,
        records: Sequence[Any],
        training: bool | None = False,
        use_memory: bool = True,
    ) -> tuple[Array, tuple[Any, ...], list[tuple[Any, dict[str, Array]]]]:
        """Runs one step, up to the output projection.

        Args:
            inputs: (B, D).
            records: tuple with one state record per memory.
            training: bool.
            use_memory: bool.

        Returns:
            Features (B, F); the records after the step; and, for `trace`, a
            list with one pair per block: the records after the block, and a
            dict of its inner values.
        """
        records, details = list(records), []
        inputs = ops.cast(inputs, self.compute_dtype)
        reads = records[self.memory_of_block[-1]].reads
        if not use_memory:
            reads = ops.zeros_like(reads)
        for block, access in enumerate(self.accesses):
            memory = self.memory_of_block[block]
            record = records[memory]
            turn = self._controller_index[block]
            controller_states = list(record.controller)
            output, states = controllers.step(
                self.block_controllers[block],
                ops.concatenate([inputs, _flat(reads)], axis=-1),
                controller_states[turn],
                training,
            )
            output = _clip(
                ops.cast(output, self.compute_dtype), self.controller_clip
            )
            controller_states[turn] = keras.tree.map_structure(
                lambda state: _clip(
                    ops.cast(state, self.compute_dtype),
                    self.controller_state_clip,
                ),
                states,
            )
            inside = {}
            if use_memory:
                kernel, bias = self.interfaces[block]
                interface = linear([output], [kernel], bias)
                if self.interface_layer_norm:
                    interface = self.interface_norms[block](interface)
                before = record._replace(controller=())
                is_wide = self.access_dtype == self.compute_dtype
                if not is_wide:
                    interface = ops.cast(interface, self.access_dtype)
                    before = self.layout.cast_record(
                        memory, before, self.access_dtype
                    )
                with custom_gradients(training):
                    after = access.step(interface, before)
                record, inside = check_step(access, before, interface, after)
                if not is_wide:
                    record = self.layout.cast_record(
                        memory, record, self.compute_dtype
                    )
                reads = record.reads
            else:
                reads = ops.zeros_like(record.reads)
            records[memory] = record._replace(
                controller=tuple(controller_states)
            )
            inputs = output
            inside = {"controller_output": output, **inside}
            details.append((tuple(records), inside))
        features = ops.concatenate([inputs, _flat(reads)], axis=-1)
        return features, tuple(records), details

    def _state_fields(self, records, block, slots):
        """The state after a block, as a dict without the controller."""
        memory = self.memory_of_block[block]
        record = self.layout.transpose(records)[memory]
        specs = self.layout.records[memory]._asdict()
        fields = {} if slots is None else {"slots": slots}
        for name, value in record._asdict().items():
            # () stands for an unused field
            if name == "controller" or isinstance(value, tuple):
                continue
            spec = specs[name]
            if slots is None or not spec.per_slot:
                fields[name] = value
            elif spec.slots_per_row == 1:
                fields[name] = rows_at(value, ops.maximum(slots, 0))
        return fields

    @staticmethod
    def _has_accessed(inside):
        """Whether a block used its memory in a step with these inner values."""
        return bool(inside.keys() - {"controller_output"})

    def _wide_details(self, records, block, inside, slots):
        access = self.accesses[block]
        if not self._has_accessed(inside) or not hasattr(
            access, "wide_details"
        ):
            return {}
        if slots is None and hasattr(access, "touched"):
            return {}
        record = records[self.memory_of_block[block]]
        return access.wide_details(record, inside, slots)

    def _named(self, details, slots=None):
        """One dict for all blocks: the state after each and its inner values.

        Names start with the number of the block if there are several.
        `slots`: dict from a memory to the slots, (B, P) int32, of which to
        give states `per_slot`; -1 for none.
        """
        slots = [(slots or {}).get(m) for m in self.memory_of_block]
        details = [
            {
                **self._state_fields(records, block, slots[block]),
                **inside,
                **self._wide_details(records, block, inside, slots[block]),
            }
            for block, (records, inside) in enumerate(details)
        ]
        if len(details) == 1:
            return details[0]
        return {
            f"block{block}/{name}": value
            for block, inside in enumerate(details)
            for name, value in inside.items()
        }

    def project(self, features: Array, training: bool | None = False) -> Array:
        """Projects features (B, F) or (B, T, F) to the output, whose last axis
        has the size `units`."""
        if training and self.bypass_dropout:
            features = features * self.bypass_mask(features)
        if self.units is not None:
            features = _project(features, *self.output_projection)
        return self.activation(_clip(features, self.clip_value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keras would make tensors of flags such as `np.False_`.
        return super().__call__(*args, **plain(kwargs))

    def call(
        self,
        inputs: Array,
        states: Sequence[Array] | None = None,
        training: bool | None = False,
        use_memory: bool = True,
    ) -> tuple[Array, list[Array]]:
        check_bool("use_memory", use_memory)
        self.check_not_on_host("A call of a cell")
        inputs = check_array("inputs", inputs, ("batch", self.input_size))
        states = self._check_states(states, inputs.shape[0])
        features, records, _ = self.step(
            inputs, self.layout.in_range(states), training, use_memory
        )
        return self.project(features, training), self.layout.flatten(records)

    def get_config(self) -> Config:
        """Every argument of `__init__`, under its own name."""
        if "accesses" in inspect.signature(type(self).__init__).parameters:
            raise NotImplementedError(
                "A cell with the argument `accesses` cannot be saved. A cell "
                "that makes its own accesses can: write "
                "`class MyCell(MemoryCell, access=MyAccess)` and register it "
                "with `keras.saving.register_keras_serializable`, as for "
                "`NTMCell`. "
                f"Received: {type(self).__name__} {self.name!r}"
            )
        of_base = init_parameters(MemoryCell)
        arguments = {
            name: serialize(
                name,
                getattr(self, name),
                # Else nothing would tell a name from a function.
                by_name=name in of_base or isinstance(parameter.default, str),
            )
            for name, parameter in saved_arguments(type(self)).items()
        }
        return {**super().get_config(), **arguments}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return super().from_config(cls._with_objects(config))

    @classmethod
    def _with_objects(cls, config):
        """A configuration whose arguments are what they were before
        `get_config`. Those of `MemoryCell` can stay: `__init__` takes both."""
        own = {*saved_arguments(cls)} - {*init_parameters(MemoryCell)}
        return {
            name: deserialize(value) if name in own else value
            for name, value in config.items()
        }


def _flat(reads):
    return ops.reshape(reads, (-1, int(np.prod(reads.shape[1:]))))


def _project(inputs, kernel, bias):
    dtype = inputs.dtype
    return ops.matmul(inputs, ops.cast(kernel, dtype)) + ops.cast(bias, dtype)


def _clip(value, bound):
    return value if bound is None else ops.clip(value, -bound, bound)
