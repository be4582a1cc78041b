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

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import itertools
import math
import typing

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory import controllers
from keras_memory import scan
from keras_memory.arguments import Arguments
from keras_memory.arguments import parameters
from keras_memory.arguments import written_as
from keras_memory.checks import MOST_LAYERS
from keras_memory.checks import check_array
from keras_memory.checks import check_batch
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_clip
from keras_memory.checks import check_layers
from keras_memory.checks import check_seed
from keras_memory.checks import check_share
from keras_memory.checks import check_size
from keras_memory.checks import is_number
from keras_memory.checks import plain
from keras_memory.checks import with_rows_of
from keras_memory.checks import with_size
from keras_memory.numerics import LayerNormalization
from keras_memory.numerics import at_least_float32
from keras_memory.replay import activate_parts
from keras_memory.replay import linear
from keras_memory.replay import to_train
from keras_memory.state import LayerState


class Access(typing.Protocol):
    """What a block asks of its memory. An access holds no weights.

    A user's own access is any object with these attributes; `NTMAccess` in
    `ntm.py` is the one to read.
    """

    interface_size: int
    """Width of the interface vector that `step` takes."""

    read_size: int
    """Width of all reads of one step, flattened."""

    initial_state: typing.NamedTuple
    """A record whose fields are `Initial`. The first is `reads`, and there is
    a `controller`, which is () here: the cell fills it in."""

    def step(self, interface, state):
        """Acts once on the memory.

        Args:
            interface: (B, interface_size), float32 or float64.
            state: a record like `initial_state`, with arrays (B,
                *`shape_in_step`).

        Returns:
            The record after the step, with these reads in its first field,
            and a dict of what else happened (weightings, gates: (B, ...)),
            for `trace`.
        """


@dataclasses.dataclass(frozen=True)
class Initial:
    """How one state tensor starts.

    Args:
        shape: tuple of ints, without the batch axis.
        start: `"learned"` (a trainable weight), `"random"` (a weight drawn
            once and kept), `"constant"`, or a number, which is then the
            constant.
        constant: what `"constant"` fills the tensor with: a number, or an
            array that broadcasts to `shape`.
        draw: Keras initializer of the weight, if it is one.
        activation: function from the weight to the state, such as softmax
            where the state is a weighting.
        turned: bool; True: a step has the last two axes of `shape` the other
            way round, as a memory has, whose slots come last there.
        held: function that brings a state from outside, (B, *`shape_in_step`),
            into the range that steps keep it in; None where that is any.
    """

    shape: tuple
    start: str | float = "constant"
    constant: typing.Any = 0.0
    draw: typing.Any = "zeros"
    activation: typing.Callable = keras.activations.linear
    turned: bool = False
    held: typing.Callable | None = None

    @property
    def shape_in_step(self):
        if not self.turned:
            return self.shape
        *others, a, b = self.shape
        return (*others, b, a)

    @property
    def is_weight(self):
        return self.start in ("learned", "random")

    @property
    def fill(self):
        return self.constant if self.start == "constant" else self.start

    @classmethod
    def check(cls, name, value):
        """Returns `value` if it is a valid one, or raises ValueError."""
        by_name = isinstance(value, str) and value in (
            "learned",
            "random",
            "constant",
        )
        if by_name or is_number(value):
            return value
        raise ValueError(
            f'`{name}` must be "learned", "random", "constant" or a finite '
            "number, which is then the constant. "
            f"Received: {name}={value!r}"
        )


class MemoryCell(Arguments, DropoutRNNCell, keras.layers.Layer):
    """A recurrent cell with a memory: controller + interface + access.

    The base of all recurrent architectures, and of a user's own: give it one
    `Access` a block. It works in `MemoryRNN` and in `keras.layers.RNN`.

    Equations: the head of `recurrent.py`.

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
    could have made is first brought into its range (`Initial.held`).

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
        self.initial_controller_state = Initial.check(
            "initial_controller_state", initial_controller_state
        )
        self.activation = keras.activations.get(activation)
        self.clip_value = check_clip("clip_value", clip_value)
        self.interface_layer_norm = check_bool(
            "interface_layer_norm", interface_layer_norm
        )
        self.bypass_dropout = check_share("bypass_dropout", bypass_dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.seed = check_seed("seed", seed)

        self.block_controllers = [
            self._make_controller(block) for block in range(len(self.accesses))
        ]
        self.interface_norms = [
            LayerNormalization(
                dtype=self.dtype_policy, name=f"interface_norm{_index(block)}"
            )
            for block in range(len(self.accesses) * interface_layer_norm)
        ]
        self._bypass_mask = None
        if bypass_dropout:
            after = len(self.accesses) * controller_layers  # the controllers'
            self.seed_generator = keras.random.SeedGenerator(
                controllers.seed_of(seed, after)
            )
        # One memory for each distinct access, in order of appearance.
        memories = list(
            {id(access): access for access in self.accesses}.values()
        )
        self.memory_of_block = [memories.index(a) for a in self.accesses]
        self.initial_records = tuple(
            access.initial_state._replace(
                controller=tuple(
                    keras.tree.map_structure(
                        lambda size: Initial(
                            (size,),
                            self.initial_controller_state,
                            draw=keras.initializers.RandomNormal(stddev=0.05),
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
        initials = keras.tree.flatten(self.initial_records)
        self.state_size = [math.prod(i.shape) for i in initials]
        self.learned_states = [  # whose initial values are of weights
            index for index, initial in enumerate(initials) if initial.is_weight
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
                "blocks (`layers` of a DNC)"
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
            controllers.seed_of(self.seed, block * self.controller_layers),
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
            controllers.check_kernel(controller, size)
            if not controller.built:  # built already if reloaded or cloned
                controller.build((None, size))
            self._input_sizes.append(size)
            size = controllers.output_size(controller, size)
            self.interfaces.append(
                self._add_projection(
                    f"interface{_index(block)}", size, access.interface_size
                )
            )
            if self.interface_layer_norm:
                norm = self.interface_norms[block]
                norm.build((None, access.interface_size))
            size += access.read_size
        if self.units is not None:
            self.output_projection = self._add_projection(
                "output", size, self.units
            )
        self.start_weights = self._map_initials(self._add_initial_weight)

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

    def _map_initials(self, function):
        """[function(initial, name)] over all state tensors."""
        results = []
        for memory, record in enumerate(self.initial_records):
            for field, value in record._asdict().items():
                for index, initial in enumerate(keras.tree.flatten(value)):
                    name = f"initial{_index(memory)}_{field}{_index(index)}"
                    results.append(function(initial, name))
        return results

    def _add_initial_weight(self, initial, name):
        if not initial.is_weight:
            return None
        return self.add_weight(
            shape=initial.shape,
            initializer=initial.draw,
            trainable=initial.start == "learned",
            name=name,
        )

    @property
    def state_names(self):
        """A name for each state, in order, as served models have them."""
        names = []
        for memory, record in enumerate(self.initial_records):
            blocks = self._blocks_of_memory(memory)
            several = len(self.initial_records) > 1
            front = f"block{blocks[0]}_" if several else ""
            for field, value in record._asdict().items():
                if field == "controller":
                    names += self._controller_state_names(blocks)
                else:
                    tensors = range(len(keras.tree.flatten(value)))
                    names += [f"{front}{field}{_index(i)}" for i in tensors]
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
        initials = keras.tree.flatten(self.initial_records)
        for initial, weight in zip(initials, self.start_weights):
            if weight is None:
                value = ops.convert_to_tensor(
                    np.broadcast_to(initial.fill, initial.shape),
                    dtype=self.compute_dtype,
                )
            else:
                value = initial.activation(ops.convert_to_tensor(weight))
            if initial.turned:
                value = ops.swapaxes(value, -1, -2)
            value = ops.cast(ops.reshape(value, (1, -1)), self.compute_dtype)
            shape = (batch_size, value.shape[-1])
            # A copy: on PyTorch this is a view, of the weight if there is one,
            # and a stateful layer would write into it.
            states.append(ops.copy(ops.broadcast_to(value, shape)))
        if self.initial_controller_state == "constant":
            states = self._flatten(
                self._with_controller_states(
                    self._unflatten(states), batch_size
                )
            )
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
        records = self._turn(self._unflatten(states))
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
        records = (record,) if len(self.initial_records) == 1 else record
        given = keras.tree.flatten(records)
        names = self._map_initials(lambda initial, name: name)
        initials = keras.tree.flatten(self.initial_records)
        if len(given) != len(initials):
            raise ValueError(
                f"The state has {len(initials)} tensors: {names}. "
                f"Received: {len(given)} tensors"
            )
        sizes = {}
        given = [
            check_array(
                name.removeprefix("initial_"),
                value,
                ("batch", *initial.shape),
                sizes,
            )
            for value, initial, name in zip(given, initials, names)
        ]
        records = keras.tree.pack_sequence_as(self.initial_records, given)
        return [
            ops.cast(value, self.compute_dtype)
            for value in self._flatten(self._turn(records))
        ]

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
        starts = self._unflatten(
            self.get_initial_state(ops.shape(states[0])[0])
        )
        after = self._flatten(
            tuple(
                start._replace(controller=record.controller)
                if part == "memory"
                else record._replace(controller=start.controller)
                for record, start in zip(self._unflatten(states), starts)
            )
        )
        after = [ops.cast(new, old.dtype) for new, old in zip(after, states)]
        if rows is not None:
            after = [
                scan.select(rows, new, old) for old, new in zip(states, after)
            ]
        return after

    def _unflatten(self, states):
        initials = keras.tree.flatten(self.initial_records)
        return keras.tree.pack_sequence_as(
            self.initial_records,
            [
                ops.reshape(state, (-1, *initial.shape_in_step))
                for state, initial in zip(states, initials)
            ],
        )

    def _records(self, states):
        """The records of states from outside, in their ranges."""
        return keras.tree.pack_sequence_as(
            self.initial_records,
            [
                initial.held(value) if initial.held else value
                for value, initial in zip(
                    keras.tree.flatten(self._unflatten(states)),
                    keras.tree.flatten(self.initial_records),
                )
            ],
        )

    def _turn(self, records):
        """From how a step has its state to how the public sees it, and
        back: see `Initial.turned`."""
        return keras.tree.pack_sequence_as(
            self.initial_records,
            [
                ops.swapaxes(value, -1, -2) if initial.turned else value
                for value, initial in zip(
                    keras.tree.flatten(records),
                    keras.tree.flatten(self.initial_records),
                )
            ],
        )

    def _flatten(self, records):
        return [
            ops.reshape(value, (-1, int(np.prod(value.shape[1:]))))
            for value in keras.tree.flatten(records)
        ]

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
            dict a block of what happened inside and the memory's record after
            it, for `trace`.
        """
        records, details = list(records), []
        inputs = ops.cast(inputs, self.compute_dtype)
        reads = records[self.memory_of_block[-1]].reads
        if not use_memory:
            reads = ops.zeros_like(reads)
        for block, access in enumerate(self.accesses):
            memory = self.memory_of_block[block]
            record = records[memory]
            turn = self._blocks_of_memory(memory).index(block)
            controller_states = list(record.controller)
            output, states = controllers.step(
                self.block_controllers[block],
                ops.concatenate([inputs, _flat(reads)], axis=-1),
                controller_states[turn],
                training,
            )
            output = ops.cast(output, self.compute_dtype)
            output = _clip(output, self.controller_clip)
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
                with to_train(training):
                    record, inside = access.step(
                        ops.cast(interface, self.access_dtype),
                        _cast(
                            record._replace(controller=()), self.access_dtype
                        ),
                    )
                record = _cast(record, self.compute_dtype)
                reads = record.reads
            else:
                reads = ops.zeros_like(record.reads)
            records[memory] = record._replace(
                controller=tuple(controller_states)
            )
            inputs = output
            fields = self._state_fields(records)[block]
            details.append({"controller_output": output, **fields, **inside})
        features = ops.concatenate([inputs, _flat(reads)], axis=-1)
        return features, tuple(records), details

    def _state_fields(self, records):
        """The record behind each block, as a dict without the controller."""
        records = self._turn(records)
        fields = [records[memory]._asdict() for memory in self.memory_of_block]
        for block in fields:
            del block["controller"]
            for name in [n for n in block if isinstance(block[n], tuple)]:
                del block[name]  # () where the architecture does without
        return fields

    def _named(self, details):
        """One dict for all blocks, with their numbers if there are several."""
        if len(details) == 1:
            return details[0]
        return {
            f"block{block}/{name}": value
            for block, inside in enumerate(details)
            for name, value in inside.items()
        }

    @property
    def access_dtype(self):
        """What addressing computes in: never in 16 bits."""
        return at_least_float32(self.compute_dtype)

    def project(self, features, training=False):
        """Makes the output of the features: (B, F) or (B, T, F), with the
        last axis of size `units`."""
        if training and self.bypass_dropout:
            features = features * self._feature_mask(features)
        if self.units is not None:
            features = _project(features, *self.output_projection)
        return self.activation(_clip(features, self.clip_value))

    def call(self, inputs, states=None, training=False, use_memory=True):
        check_bool("use_memory", use_memory)
        inputs = check_array("inputs", inputs, ("batch", self.input_size))
        states = self._check_states(states, inputs.shape[0])
        features, records, _ = self.step(
            inputs, self._records(states), training, use_memory
        )
        return self.project(features, training), self._flatten(records)

    # Dropout: Keras's RNN asks any `DropoutRNNCell` for its masks in front
    # of the time loop. The masks are those of the controllers inside, and
    # that of the controller output past the memory.

    def get_dropout_mask(self, step_input):
        if self.bypass_dropout:
            self._feature_mask(step_input)
        for cell, width in self._dropout_cells():
            cell.get_dropout_mask(self._ones(step_input, width))

    def get_recurrent_dropout_mask(self, state):
        for cell, _ in self._dropout_cells():
            width = (keras.tree.flatten(cell.state_size) or [1])[0]
            cell.get_recurrent_dropout_mask(self._ones(state, width))

    def reset_dropout_mask(self):
        self._bypass_mask = None
        for cell, _ in self._dropout_cells():
            cell.reset_dropout_mask()

    def reset_recurrent_dropout_mask(self):
        for cell, _ in self._dropout_cells():
            cell.reset_recurrent_dropout_mask()

    def dropout_masks(self):
        """The masks drawn at this moment, as (cell, attribute, mask)."""
        names = "_dropout_mask", "_recurrent_dropout_mask", "_bypass_mask"
        return [
            (layer, name, mask)
            for layer in self._flatten_layers()
            if isinstance(layer, DropoutRNNCell)
            for name in names
            if (mask := getattr(layer, name, None)) is not None
        ]

    @contextlib.contextmanager
    def dropping(self, masks):
        """Steps in here drop what `masks`, earlier `dropout_masks`, say."""
        now = [(layer, name, getattr(layer, name)) for layer, name, _ in masks]
        try:
            for layer, name, mask in masks:
                setattr(layer, name, mask)
            yield
        finally:
            for layer, name, mask in now:
                setattr(layer, name, mask)

    def _feature_mask(self, like):
        """(B, F), or (B, 1, F) for features of a sequence; the reads' part
        is 1."""
        if self._bypass_mask is None:
            reads = self._ones(like, self.accesses[-1].read_size)
            width = self.features_size - self.accesses[-1].read_size
            mask = keras.random.dropout(
                self._ones(like, width),
                self.bypass_dropout,
                seed=self.seed_generator,
            )
            self._bypass_mask = ops.concatenate([mask, reads], axis=-1)
        mask = self._bypass_mask
        return mask[:, None] if len(like.shape) == 3 else mask

    def _dropout_cells(self):
        for controller, size in zip(self.block_controllers, self._input_sizes):
            yield from controllers.dropout_cells(controller, size)

    def _ones(self, like, width):
        return ops.ones((ops.shape(like)[0], width), dtype=self.compute_dtype)

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
            for name in _parameters(type(self))
            if name not in ("accesses", "name", "trainable", "dtype")
        ]
        own = {name: _serialize(getattr(self, name)) for name in arguments}
        return {**super().get_config(), **own}


# Arguments of cells that are no attributes of layers: what `MemoryRNN` does not
# take, and what Keras takes for the layers within a model.
NOT_SHOWN = ("accesses", "layers")
BACKENDS = ("tensorflow", "jax", "torch")

# Where `trace_model` collects the layers' calls, as (layer, arguments).
_recording = contextvars.ContextVar("recording", default=None)

# Goes past Keras's `RNN.call`, which hands no further arguments on.
_memory_in_use = contextvars.ContextVar("memory_in_use", default=True)


class _OfClass:
    """An attribute of a class that its instances do not have: their signature
    is that of a call, which `tf.function` asks for."""

    def __init__(self, value):
        self.value = value

    def __get__(self, instance, owner):
        if instance is not None:
            raise AttributeError("__signature__")
        return self.value


@keras.saving.register_keras_serializable(package="keras_memory")
class MemoryRNN(Arguments, keras.layers.RNN):
    """Runs a memory cell over time; the base of all recurrent layers here.

    `MemoryRNN(cell, ...)` runs any `MemoryCell`. A subclass
    `class NTMLayer(MemoryRNN, cell=NTMCell)` makes its own: it takes the
    cell's arguments, then those below. The cell's arguments can be read as
    attributes of the layer, such as `layer.memory_slots`, except `layers` of a
    DNC, which Keras takes for those of a model: `layer.cell.layers`.

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

    cell_class = None

    def __init_subclass__(cls, cell=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if cell is not None:
            cls.cell_class = cell
            own = _parameters(MemoryRNN)
            both = {**_parameters(cell), **own}
            both.pop("accesses", None)
            cls.__signature__ = _OfClass(
                inspect.Signature(sorted(both.values(), key=lambda p: p.kind))
            )
            # The same attributes on all backends, whose classes have names of
            # their own: `share_memory` is one of PyTorch's.
            taken = {
                name
                for base in cls.__mro__
                if base.__module__.partition(".")[0] not in BACKENDS
                for name in vars(base)
            }
            for name in {*_parameters(cell)} - {*own, *NOT_SHOWN} - taken:
                setattr(cls, name, _of_cell(name))
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # not that of the base

    @classmethod
    def _accepted_behind(cls, owner):
        if owner is MemoryRNN and cls.cell_class is not None:
            return None  # the rest goes to the cell, which looks at it
        return super()._accepted_behind(owner)

    def __init__(
        self,
        *args,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        zero_output_for_mask=False,
        loop="auto",
        recompute=None,
        **kwargs,
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
        if loop not in scan.LOOPS:
            raise ValueError(
                f"`loop` must be one of {scan.LOOPS}. Received: loop={loop!r}"
            )
        if recompute is not None and recompute != "sqrt":
            check_size("recompute", recompute, others=', "sqrt" or None')
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

        self.loop = loop
        self.recompute = recompute
        self.time_loop = None
        self._was_trained = False  # by a call that `time_loop` tells of

    def build(self, sequences_shape=None, initial_state_shape=None):
        if sequences_shape is None:  # the layer was called on None
            check_array("sequences", None)
        self._check_sequences(sequences_shape)
        super().build(sequences_shape, initial_state_shape)

    def __call__(self, sequences, *args, **kwargs):
        if isinstance(sequences, np.ndarray):  # Keras's error names no argument
            check_array("sequences", sequences, result="given")
        return super().__call__(sequences, *args, **kwargs)

    def call(
        self,
        sequences,
        initial_state=None,
        mask=None,
        training=False,
        use_memory=True,
    ):
        sequences, initial_state, mask = self._check_arguments(
            sequences, initial_state, mask
        )
        starts = []
        if self.stateful:
            batch_size, given = self.states[0].shape[0], sequences
            sequences = check_batch("sequences", sequences, batch_size)
            if mask is not None:
                mask = check_batch("mask", mask, batch_size)
            states, starts = self._present_states()
            initial_state = states if initial_state is None else initial_state
        in_use = _memory_in_use.set(check_bool("use_memory", use_memory))
        try:
            outputs = super().call(sequences, initial_state, mask, training)
        finally:
            _memory_in_use.reset(in_use)
        if starts:
            for variable, start in zip(self._starts, starts):
                variable.assign(start)
        if self.stateful:
            if not self.return_state:
                return with_rows_of(outputs, given)
            outputs = [with_rows_of(outputs[0], given), *outputs[1:]]
        return outputs

    def compute_output_spec(
        self, sequences, initial_state=None, mask=None, **kwargs
    ):
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

    def inner_loop(self, sequences, initial_state, mask, training=False):
        use_memory = _memory_in_use.get()
        arguments = sequences, initial_state, mask, training, use_memory
        if (calls := _recording.get()) is not None:
            calls.append((self, arguments))
        if self.stateful:
            # PyTorch writes the next states into the memory of these, which
            # the gradient still needs.
            initial_state = [ops.copy(state) for state in initial_state]
        features, records, time_loop = scan.run(
            self.cell,
            sequences,
            self.cell._records(initial_state),
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
        return last, outputs, self.cell._flatten(records)

    def _masked_outputs(self, outputs, mask):
        """Zeroes masked outputs, or those in front of the first valid step,
        which have no output to hold."""
        mask = ops.cast(mask, "int32")
        if self.go_backwards:
            mask = ops.flip(mask, axis=1)
        if not self.zero_output_for_mask:
            mask = ops.cumsum(mask, axis=1)
        shown = mask > 0 if self.return_sequences else mask[:, -1] > 0
        return scan.select(shown, outputs, ops.zeros_like(outputs))

    def _create_state_variables(self, batch_size):
        def initial(index, shape, dtype):
            # Here and not around: where the layer is built within a graph,
            # TensorFlow lifts initializers out of it.
            return ops.cast(self.get_initial_state(shape[0])[index], dtype)

        def variables(name, rows, indices):
            return [
                (
                    f"{name}{_index(number)}",
                    (rows, self.cell.state_size[index]),
                    functools.partial(initial, index),
                )
                for number, index in enumerate(indices)
            ]

        states = range(len(self.cell.state_size))
        self._state = LayerState(
            [
                *variables("state", batch_size, states),
                *variables("start", 1, self.cell.learned_states),
            ],
            self.variable_dtype,
            name="state",
            dtype=self.dtype_policy,
        )

    @property
    def states(self):
        """Variables (B, size) of a stateful layer; None where there are none,
        or not yet."""
        if self._state is None:
            return None
        return self._state.variables[: len(self.cell.state_size)]

    @states.setter
    def states(self, value):
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
        if self.cell.learned_states:
            initial = self.get_initial_state(1)
        for index, start in zip(self.cell.learned_states, self._starts):
            starts.append(ops.cast(initial[index], start.dtype))
            begun = ops.any(states[index] != start, axis=1, keepdims=True)
            states[index] = ops.where(begun, states[index], starts[-1])
        return states, starts

    def reset_state(self):
        """Puts the states of a stateful layer back to the initial state."""
        if self.states is not None:
            batch_size = self.states[0].shape[0]
            initial = self.get_initial_state(batch_size)
            learned = [initial[index][:1] for index in self.cell.learned_states]
            for variable, value in zip(
                [*self.states, *self._starts], [*initial, *learned]
            ):
                variable.assign(ops.cast(value, variable.dtype))

    def reset_memory(self, states=None, rows=None):
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

    def reset_controller(self, states=None, rows=None):
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

    def get_config(self):
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
    def from_config(cls, config, custom_objects=None):
        if cls.cell_class is None:
            return super().from_config(config, custom_objects)
        return cls(**config)


class Trace(dict):
    """What `trace` gives: a dict of arrays, which a notebook shows as a
    picture. `keras.tree` takes it for one leaf: give it `dict(trace)`."""

    def __repr__(self):
        shapes = [f"{name}: {np.shape(one)}" for name, one in self.items()]
        return f"Trace({', '.join(shapes)})"

    def _repr_png_(self):
        from keras_memory import visualization

        return visualization.plot_task(self)._repr_png_()


def joined(traces):
    """One trace of those of several layers, as `trace_model` gives them: the
    layer's name is in front of each name where there are several."""
    several = len(traces) > 1
    return Trace(
        (f"{layer}/{name}" if several else name, ops.convert_to_numpy(values))
        for layer, trace in traces.items()
        for name, values in trace.items()
    )


def trace(
    layer,
    inputs,
    initial_state=None,
    mask=None,
    training=False,
    use_memory=True,
):
    """Records what happens inside a recurrent layer of this library.

    Runs the layer's cell over the sequences once more.

    Args:
        layer: a `MemoryRNN`, such as `NTMLayer`.
        inputs: (B, T, D) array.
        initial_state: list of (B, size), or None for the layer's own.
        mask: (B, T) bool or None; a masked step repeats the step before.
        training: bool.
        use_memory: bool, as in the layer's call.

    Returns:
        `Trace`, a dict of NumPy arrays (B, T, ...), in the order in which the
        steps were taken, which a notebook shows as a picture: `"output"`,
        every field of the state record after the step except the
        controller's states (for the NTM `"reads"`, `"memory"`,
        `"read_weighting"`, `"write_weighting"`), `"controller_output"`, and
        what the architecture adds (keys, gates, ...). Where a cell has
        several blocks, names start with `"block0/"`, `"block1/"`, ...

    Raises:
        TypeError: not a recurrent layer of this library.
        ValueError: inputs or states that the layer would refuse.
    """
    if not isinstance(layer, MemoryRNN):
        raise TypeError(
            "`trace` takes a recurrent layer of keras_memory, such as "
            "`NTMLayer`; for a whole model there is `trace_model`. "
            f"Received: {layer!r}"
        )
    check_bool("use_memory", use_memory)
    mask = get_keras_mask(inputs) if mask is None else mask
    inputs = check_array("inputs", inputs)
    layer._check_sequences(inputs.shape, "inputs")
    if not layer.built:
        layer.build(tuple(inputs.shape))
    if initial_state is None and layer.stateful:
        initial_state, _ = layer._present_states()
    inputs, initial_state, mask = layer._check_arguments(
        inputs, initial_state, mask
    )
    if initial_state is None:
        initial_state = layer.cell.get_initial_state(batch_size=inputs.shape[0])
    inside = _inside(layer, inputs, initial_state, mask, training, use_memory)
    return Trace(keras.tree.map_structure(ops.convert_to_numpy, inside))


def trace_model(model, inputs, training=False):
    """Records what happens inside each recurrent memory of a model.

    The states of stateful layers go on, as in any call of the model.

    Args:
        model: a `keras.Model`, also a subclassed one.
        inputs: what the model takes.
        training: bool.

    Returns:
        Tuple of the model's outputs, and a dict from the layers' names, in
        the order of their calls, to what `trace` gives for each. A layer that
        is called again has a number behind its name.
        All are tensors, so that this can be compiled.

    Raises:
        TypeError: not a Keras model.
        ValueError: inputs that the model would refuse.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model; for a layer there is `trace`. "
            f"Received: {model!r}"
        )
    calls = []
    recording = _recording.set(calls)
    try:
        outputs = model(inputs, training=training)
    finally:
        _recording.reset(recording)
    traces = {}
    for layer, arguments in calls:
        name, number = layer.name, 1
        while name in traces:
            number += 1
            name = f"{layer.name}_{number}"
        traces[name] = _inside(layer, *arguments)
    return outputs, traces


def _inside(layer, inputs, initial_state, mask, training, use_memory):
    """What happens inside of a layer, as a dict of tensors (B, T, ...)."""
    cell = layer.cell
    states = tuple(
        ops.cast(state, cell.compute_dtype) for state in initial_state
    )
    sequences = [inputs]
    if mask is not None:
        padding = ops.zeros_like(inputs)
        sequences = [scan.select(mask, inputs, padding), mask]
    if layer.go_backwards:
        sequences = [ops.flip(one, axis=1) for one in sequences]
    sequences = [ops.swapaxes(one, 0, 1) for one in sequences]

    def step(before, at_step):
        states, held = before
        features, after, details = cell.step(
            at_step[0], cell._records(states), training, use_memory
        )
        after = tuple(cell._flatten(after))
        output = cell.project(features, training)
        now = {"output": output, **cell._named(details)}
        if mask is not None:
            select = functools.partial(scan.select, at_step[1])
            now = keras.tree.map_structure(select, now, held)
            after = tuple(map(select, after, states))
        return (after, now), (after, now)

    cell.get_dropout_mask(inputs)
    cell.get_recurrent_dropout_mask(inputs)
    try:
        records = cell._records(states)
        features, _, details = cell.step(
            sequences[0][0], records, training, use_memory
        )
        shapes = {"output": cell.project(features), **cell._named(details)}
        # In front of the first valid step nothing happened, but a state is.
        held = keras.tree.map_structure(ops.zeros_like, shapes)
        held.update(cell._named(cell._state_fields(records)))
        _, (_, inside) = ops.scan(step, (states, held), tuple(sequences))
    finally:
        cell.reset_dropout_mask()
        cell.reset_recurrent_dropout_mask()
    inside = {name: ops.swapaxes(inside[name], 0, 1) for name in shapes}
    if mask is not None and layer.zero_output_for_mask:
        output, shown = inside["output"], ops.swapaxes(sequences[1], 0, 1)
        inside["output"] = scan.select(shown, output, ops.zeros_like(output))
    return inside


def interface_size(shapes):
    """Width of an interface whose parts have these shapes; None for none."""
    return sum(math.prod(shape) for shape in shapes if shape is not None)


def split_interface(interface, shapes, activations):
    """Takes an interface vector apart.

    Args:
        interface: (B, `interface_size(shapes)`).
        shapes: record with the shape of each part, without the batch axis, in
            the order in which they stand in the interface; None for parts
            that a layer does without.
        activations: a record like it, with the function of each part.

    Returns:
        A record like it, with arrays (B, *shape) or None.
    """
    present = [
        (activation, shape)
        for activation, shape in zip(activations, shapes, strict=True)
        if shape is not None
    ]
    parts = iter(activate_parts(*zip(*present), interface))
    return type(shapes)(
        *(None if shape is None else next(parts) for shape in shapes)
    )


def _parameters(cls):
    """Parameters of a class's `__init__`, by name, with those that its
    `**kwargs` hands to the base, up to `MemoryCell` or `MemoryRNN`."""
    end = DropoutRNNCell, keras.layers.RNN
    bases = itertools.takewhile(lambda base: base not in end, cls.__mro__)
    return parameters(bases)


def _of_cell(name):
    """A property of a layer that reads an argument of its cell. Where the
    layer itself has an attribute of that name, as Keras's `RNN` gives it a
    `state_size`, this is it."""

    def read(layer):
        own = vars(layer)
        return own[name] if name in own else getattr(layer.cell, name)

    def write(layer, value):
        if name not in vars(layer) and hasattr(layer, "time_loop"):
            raise AttributeError(
                f"`{name}` is an argument of the cell, which is made with it: "
                "make another layer."
            )
        vars(layer)[name] = value

    return property(read, write, doc=f"`{name}` of the cell.")


def check_sizes_of_memory(access):
    """Raises ValueError unless the sizes of an access are such, and what it
    has of them fits into the machine."""
    for name in ("memory_slots", "slot_size", "read_heads", "write_heads"):
        check_size(name, getattr(access, name))
    check_bytes_of_state(access, "The memory", ("memory_slots", "slot_size"))
    for heads in ("read_heads", "write_heads"):
        names = (heads, "memory_slots"), (heads, "slot_size")
        check_bytes_of_state(access, "The weightings", names[0])
        check_bytes_of_state(access, "The vectors", names[1])


def check_bytes_of_state(access, what, names, instead=""):
    """Raises ValueError unless a state fits into the machine, and into the one
    axis that it has outside of a step."""
    sizes = [(name, getattr(access, name)) for name in names]
    what = f"{what} of one row"
    check_bytes(what, sizes, instead=instead)
    size = math.prod(size for _, size in sizes)
    check_bytes(what, [(" x ".join(names), size)], instead=instead)


def _serialize(value):
    if isinstance(value, keras.initializers.Initializer):
        return keras.initializers.serialize(value)
    if isinstance(value, keras.layers.Layer):
        return keras.saving.serialize_keras_object(value)
    if callable(value):
        return keras.activations.serialize(value)
    return plain(value)  # Keras's NumPy backend mistakes a NumPy scalar


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


def _index(index):
    """Ending of a weight's name: none for the first of its kind."""
    return f"_{index}" if index else ""


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
