"""The shape that all recurrent memories share.

A step is a list of blocks, and each block is controller + interface + access:

    controller_in  = concat(x_t, previous reads)
    controller_out = controller(controller_in)
    interface      = controller_out @ interface_kernel + interface_bias
    state          = access.step(interface, state)      no weights inside
    features       = concat(controller_out, reads)

The first block sees the input and the last block's reads of the step before,
each further block sees the features of the block in front of it. The layer's
output is a projection of the last block's features, outside the time loop.
"""

import inspect

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.gradients import custom_gradients
from keras_memory.addressing.gradients import linear
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.arguments import Arguments
from keras_memory.checks import MOST_LAYERS
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_clip
from keras_memory.checks import check_layers
from keras_memory.checks import check_rate
from keras_memory.checks import check_seed
from keras_memory.checks import check_size
from keras_memory.recurrent import cells
from keras_memory.recurrent import controllers
from keras_memory.recurrent.cells import LayerNormalization
from keras_memory.recurrent.dropout import SequenceDropout
from keras_memory.recurrent.interface import StateSpec
from keras_memory.recurrent.serialization import init_parameters
from keras_memory.recurrent.serialization import serialize
from keras_memory.recurrent.state import StateLayout
from keras_memory.recurrent.state import index_suffix
from keras_memory.recurrent.state import select


class MemoryCell(Arguments, SequenceDropout, keras.layers.Layer):
    """A recurrent cell with a memory: controller + interface + access.

    The base of all recurrent architectures, and of a user's own: give it one
    `Access` a block. It works in `MemoryRNN` and in `keras.layers.RNN`.

    Equations: the head of `recurrent/cell.py`.

    State: flat tensors (B, size) outside, so that Keras's RNN machinery can
    declare, hold and save them; `unpack_state` makes a named record of them.

    Masking and dtype: under 16-bit policies the access, which addresses the
    memory, computes in float32; states are kept in the compute dtype. Dropout
    masks of a cell that is called by itself stay until
    `reset_dropout_mask()` and `reset_recurrent_dropout_mask()`, as those of
    Keras's cells; a layer draws them anew for each call.

    Range: with inputs, memories, reads and controller states up to 1e18 in
    float32 and bfloat16, 1e150 in float64 and 100 in float16 (whose largest
    number is 65504), outputs, states and gradients are finite, for the
    controllers by name, weights of about 1 and upstream gradients of about 1
    (`test_extremes.py`). A controller whose output grows with its state, such
    as a GRU, asks for strengths and powers as large, which gradients multiply:
    with it gradients are finite for states up to 1e9, in float16 up to 100.
    The gradient of a kernel is its input times the gradient of its result,
    added up over batch and time: it is finite where that product is.
    An initial state may have any weightings, usages and links: what no step
    could have made is first brought into its range (`StateSpec.held`).

    Args:
        units: int, at least 1, width of the output; or None, for the features
            concat(controller output, reads) as they are.
        accesses: list with one `Access` a block. The same object twice is one
            memory that two blocks act on, one after the other.
        controller: `"lstm"`, `"gru"`, `"rnn"`, `"dense"`,
            `"layer_norm_lstm"`, `"layer_norm_rnn"`, `"peephole_lstm"`,
            `"nas"`, any Keras RNN cell (`StackedRNNCells` included), or a
            feed-forward layer. Further blocks get a new controller of the
            same configuration. A layer norm multiplies gradients at steps
            where all it sees is 0: mask zeros at the start of a sequence.
        controller_units: int, at least 1; width of a controller made by name.
            This and the next two do nothing to one that is given.
        controller_layers: int from 1 to 1024; its number of layers. At most
            1024 over all blocks.
        controller_dropout: float in [0, 1), dropped share of its inputs.
        controller_clip: positive float or None; clips its output to +- this.
        controller_state_clip: positive float or None; clips its states.
        initial_controller_state: `"learned"`, `"random"` (drawn once), a
            number, or `"constant"`, the default: what the controller's own
            `get_initial_state` says, zeros for those made by name.
        activation: Keras activation of the output. Default: linear.
        clip_value: positive float or None; clips the output to +- this, in
            front of the activation.
        interface_layer_norm: bool; True: the interface is layer-normalised,
            as in Franke et al. 2018 (arXiv 1807.02658). Default False.
        bypass_dropout: float in [0, 1), dropped share of the controller output
            on its way to the output, past the memory (same paper; here the
            same units at all steps of a sequence). Default 0.
        kernel_initializer: Keras initializer of interface and output kernels.
        bias_initializer: Keras initializer of interface and output biases.
        seed: int from 0 to 2^32 - 1, seed of the dropouts; or None.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        inputs: (B, D).
        states: list of (B, size).
        training: bool.
        use_memory: bool. False: the controller goes on without its memory,
            which stays as it is; all reads are 0.

    Raises:
        ValueError: a size, clip, share, seed or initial value out of range,
            or sizes of which the machine cannot hold the states or weights.
        TypeError: a controller that is neither a name nor a layer, or an
            argument that the class does not have or lacks.
    """

    def __init__(
        self,
        units,
        accesses,
        controller="lstm",
        controller_units=100,
        controller_layers=1,
        controller_dropout=0.0,
        controller_clip=None,
        controller_state_clip=None,
        initial_controller_state="constant",
        activation=None,
        clip_value=None,
        interface_layer_norm=False,
        bypass_dropout=0.0,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        seed=None,
        **kwargs,
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
            after = len(self.accesses) * controller_layers  # the controllers'
            self.seed_generator = keras.random.SeedGenerator(
                cells.seed_of(seed, after)
            )
        # One memory for each distinct access, in order of appearance.
        memories = list(
            {id(access): access for access in self.accesses}.values()
        )
        self.memory_of_block = [memories.index(a) for a in self.accesses]
        records = tuple(
            access.initial_state._replace(
                controller=tuple(
                    keras.tree.map_structure(
                        lambda size: StateSpec(
                            (size,),
                            self.initial_controller_state,
                            initializer=keras.initializers.RandomNormal(
                                stddev=0.05
                            ),
                        ),
                        controllers.state_structure(controller),
                    )
                    for controller, memory in zip(
                        self.block_controllers, self.memory_of_block
                    )
                    if memory == index
                )
            )
            for index, access in enumerate(memories)
        )
        self.layout = StateLayout(records)
        self._turns = [  # of each block, among those of its memory
            self._blocks_of_memory(memory).index(block)
            for block, memory in enumerate(self.memory_of_block)
        ]
        # What addressing computes in: never 16 bits.
        self.access_dtype = at_least_float32(self.compute_dtype)
        self.state_size = self.layout.sizes
        self.learned_states = [  # whose initial values are of weights
            index
            for index, spec in enumerate(self.layout.specs)
            if spec.is_weight
        ]
        for size in self.state_size:
            check_bytes("A state of one row", [("its numbers", size)])

    def _check_number_of_layers(self):
        layers = check_layers("controller_layers", self.controller_layers)
        blocks = len(self.accesses)
        if isinstance(self.controller, str) and blocks * layers > MOST_LAYERS:
            raise ValueError(
                f"`controller_layers` must be at most {MOST_LAYERS} over all "
                "blocks of a step, as each of them is made and traced by "
                f"itself. Received: controller_layers={layers}, {blocks} "
                "blocks (`num_layers` of a DNC)"
            )

    def _make_controller(self, block):
        """The controller of a block, a copy where one was given for all."""
        given = self.controller
        if block and isinstance(given, keras.layers.Layer):
            config = _unbuilt(given.get_config())
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
    def features_size(self):
        """Width of concat(controller output, reads) of the last block."""
        size = controllers.output_size(
            self.block_controllers[-1],
            self._input_sizes[-1] if self.built else None,
        )
        return size + self.accesses[-1].read_size

    @property
    def output_size(self):
        return self.features_size if self.units is None else self.units

    def build(self, input_shape):
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
        self.start_weights = list(
            map(self._add_initial_weight, self.layout.specs, self.layout.names)
        )

    def _add_projection(self, name, inputs, outputs):
        width = "units" if name == "output" else "size of the interface"
        sizes = ("size of the features", inputs), (width, outputs)
        check_bytes(f"The kernel of the {name}", sizes)

        def add(kind, shape, initializer):
            # An initializer draws the same numbers each time, which two
            # blocks must not have.
            if name.startswith("interface_") and hasattr(initializer, "clone"):
                initializer = initializer.clone()
            return self.add_weight(
                shape=shape, initializer=initializer, name=f"{name}_{kind}"
            )

        kernel = add("kernel", (inputs, outputs), self.kernel_initializer)
        return kernel, add("bias", (outputs,), self.bias_initializer)

    def _add_initial_weight(self, spec, name):
        if not spec.is_weight:
            return None
        return self.add_weight(
            shape=spec.shape,
            initializer=spec.initializer,
            trainable=spec.initial == "learned",
            name=name,
        )

    @property
    def state_names(self):
        """A name for each state, in order, as served models have them."""
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

    def get_initial_state(self, batch_size=None):
        """The states before the first step: a list of (B, size)."""
        if not self.built:
            raise ValueError(
                f"{type(self).__name__} {self.name!r} must be built before "
                "it can give its initial state, which may be learned: call "
                "it on data or call `build(input_shape)` first."
            )
        if isinstance(batch_size, int):
            for size in self.state_size:
                sizes = ("batch size", batch_size), ("numbers of a row", size)
                check_bytes("A state", sizes, self.compute_dtype)
        states = []
        for spec, weight in zip(self.layout.specs, self.start_weights):
            if weight is None:
                value = ops.convert_to_tensor(
                    np.broadcast_to(spec.fill, spec.shape),
                    dtype=self.compute_dtype,
                )
            else:
                value = spec.activation(ops.convert_to_tensor(weight))
            if spec.transposed:
                value = ops.swapaxes(value, -1, -2)
            value = ops.cast(ops.reshape(value, (1, -1)), self.compute_dtype)
            shape = (batch_size, value.shape[-1])
            # A copy: on PyTorch this is a view, of the weight if there is one,
            # and a stateful layer would write into it.
            states.append(ops.copy(ops.broadcast_to(value, shape)))
        if self.initial_controller_state == "constant":
            records = self.layout.unflatten(states)
            records = self._with_controller_states(records, batch_size)
            states = self.layout.flatten(records)
        return states

    def _with_controller_states(self, records, batch_size):
        """Puts in what a given controller itself says it starts with."""

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

    # States: flat tensors outside, named records inside.

    def unpack_state(self, states):
        """Names and shapes the flat states.

        Args:
            states: list of (B, size) tensors, as `get_initial_state`, the
                layer's `return_state` or a cell's call give them.

        Returns:
            The record of the architecture (for the NTM an `NTMState`); a
            tuple of records where the cell has several memories.

        Raises:
            ValueError: the number or the sizes of the states differ from
                what the cell has, or their batch sizes from one another.
        """
        states = self._check_states(states)
        records = self.layout.transpose(self.layout.unflatten(states))
        return records[0] if len(records) == 1 else records

    def _check_states(self, states, batch_size=None, name="states"):
        """A flat list of tensors, after a look at number, shapes and dtypes."""
        states = [] if states is None else keras.tree.flatten(states)
        shapes = [tuple(getattr(state, "shape", ())) for state in states]
        batch_sizes = {batch_size, *(shape[0] for shape in shapes if shape)}
        fit = [shape[1:] for shape in shapes] == [(n,) for n in self.state_size]
        if not fit or len(batch_sizes - {None}) > 1:
            rows = "" if batch_size is None else f" for a batch of {batch_size}"
            raise ValueError(
                f"`{name}` must be {len(self.state_size)} states of "
                f"{type(self).__name__}, of shape (batch, size), with the "
                f"batch size of the inputs and the sizes {self.state_size}: as "
                "`get_initial_state` makes them, `return_state` gives them "
                "behind the output, and `pack_state` makes them of a record. "
                f"Received: {len(shapes)} states of shapes {shapes}{rows}"
            )
        return [
            check_array(f"{name}[{index}]", state)
            for index, state in enumerate(states)
        ]

    def pack_state(self, record):
        """Makes flat states of what `unpack_state` returns.

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
                f"The state has {len(specs)} tensors: {names}. "
                f"Received: {len(given)} tensors"
            )
        sizes = {}
        given = [
            check_array(
                name.removeprefix("initial_"),
                value,
                ("batch", *spec.shape),
                sizes,
            )
            for value, spec, name in zip(given, specs, names)
        ]
        records = keras.tree.pack_sequence_as(self.layout.records, given)
        states = self.layout.flatten(self.layout.transpose(records))
        return [ops.cast(state, self.compute_dtype) for state in states]

    def reset_memory(self, states, rows=None):
        """Puts the memory back to its start while the controller goes on.

        Args:
            states: list of (B, size).
            rows: (B,) bool, rows of the batch to reset; None for all.

        Returns:
            List of (B, size).

        Raises:
            ValueError: states that the cell does not have, or rows that are
                not one bool for each row of the batch.
        """
        return self._reset(states, rows, "memory")

    def reset_controller(self, states, rows=None):
        """Puts the controller back to its start while the memory, with what
        was read from it, stays. Arguments and errors: `reset_memory`."""
        return self._reset(states, rows, "controller")

    def _reset(self, states, rows, part):
        self.unpack_state(states)  # raises if the sizes do not fit
        if isinstance(states[0], keras.KerasTensor):
            raise ValueError(
                "`states` must be arrays or tensors; within a functional "
                "model reset them in a layer of your own. Received: "
                f"{states[0]!r}"
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

    # One step.

    def step(self, inputs, records, training=False, use_memory=True):
        """One step, up to the output projection.

        Args:
            inputs: (B, D).
            records: tuple with one state record a memory.
            training: bool.
            use_memory: bool.

        Returns:
            Features (B, F); the records after the step; and a list with one
            pair a block, for `trace`: the records behind it, and a dict of what
            happened inside.
        """
        records, details = list(records), []
        inputs = ops.cast(inputs, self.compute_dtype)
        reads = records[self.memory_of_block[-1]].reads
        if not use_memory:
            reads = ops.zeros_like(reads)
        for block, access in enumerate(self.accesses):
            memory = self.memory_of_block[block]
            record = records[memory]
            turn = self._turns[block]
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
                    before = _cast(before, self.access_dtype)
                with custom_gradients(training):
                    record, inside = access.step(interface, before)
                if not is_wide:
                    record = _cast(record, self.compute_dtype)
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

    def _state_fields(self, records, block):
        """The record behind a block, as a dict without the controller."""
        record = self.layout.transpose(records)[self.memory_of_block[block]]
        return {
            name: value
            for name, value in record._asdict().items()
            # () where the architecture does without
            if name != "controller" and not isinstance(value, tuple)
        }

    def _named(self, details):
        """One dict for all blocks, with their numbers if there are several:
        the fields of the state behind each, and what happened inside."""
        details = [
            {**self._state_fields(records, block), **inside}
            for block, (records, inside) in enumerate(details)
        ]
        if len(details) == 1:
            return details[0]
        return {
            f"block{block}/{name}": value
            for block, inside in enumerate(details)
            for name, value in inside.items()
        }

    def project(self, features, training=False):
        """Makes the output of the features: (B, F) or (B, T, F), with the
        last axis of size `units`."""
        if training and self.bypass_dropout:
            features = features * self.bypass_mask(features)
        if self.units is not None:
            features = _project(features, *self.output_projection)
        return self.activation(_clip(features, self.clip_value))

    def call(self, inputs, states=None, training=False, use_memory=True):
        check_bool("use_memory", use_memory)
        inputs = check_array("inputs", inputs, ("batch", self.input_size))
        states = self._check_states(states, inputs.shape[0])
        features, records, _ = self.step(
            inputs, self.layout.in_range(states), training, use_memory
        )
        return self.project(features, training), self.layout.flatten(records)

    def get_config(self):
        """Every argument of `__init__`, under its own name."""
        if "accesses" in inspect.signature(type(self).__init__).parameters:
            raise NotImplementedError(
                "An access cannot be saved, but a class that makes its own "
                "can: subclass `MemoryCell`, register it with "
                "`keras.saving.register_keras_serializable`, and make the "
                "accesses in its `__init__`, as `NTMCell` does. "
                f"Received: {type(self).__name__} {self.name!r}"
            )
        arguments = [
            name
            for name in init_parameters(type(self))
            if name not in ("accesses", "name", "trainable", "dtype")
        ]
        own = {name: serialize(getattr(self, name)) for name in arguments}
        return {**super().get_config(), **own}


def _unbuilt(config):
    """A configuration without the shapes that layers inside were built for,
    as the cells of a `StackedRNNCells` are."""
    if isinstance(config, dict):
        return {
            key: _unbuilt(value)
            for key, value in config.items()
            if key != "build_config"
        }
    if isinstance(config, list):
        return [_unbuilt(value) for value in config]
    return config


def _flat(reads):
    return ops.reshape(reads, (-1, int(np.prod(reads.shape[1:]))))


def _project(inputs, kernel, bias):
    dtype = inputs.dtype
    return ops.matmul(inputs, ops.cast(kernel, dtype)) + ops.cast(bias, dtype)


def _clip(value, bound):
    return value if bound is None else ops.clip(value, -bound, bound)


def _cast(record, dtype):
    return keras.tree.map_structure(
        lambda value: ops.cast(value, dtype), record
    )
