"""States: flat tensors outside of a step, named records inside."""

import math

import keras
from keras import ops


class StateLayout:
    """Converts the state of a cell between flat tensors and named records.

    Outside of a step a state is a list of tensors (B, size), which Keras's RNN
    machinery declares, holds and saves. Inside, it is a tuple with one record
    for each memory, of tensors (B, *`shape_in_step`).

    Args:
        records: tuple with one record of `StateSpec`s for each memory.

    Attributes:
        specs: list of the `StateSpec`s, in the order of the flat tensors.
        sizes: list of ints, the sizes of the flat tensors.
        names: list of the weights' names, such as `"initial_memory"`.
    """

    def __init__(self, records):
        self.records = records
        self.specs = keras.tree.flatten(records)
        self.sizes = [math.prod(spec.shape) for spec in self.specs]
        self.names = [
            f"initial{index_suffix(memory)}_{field}{index_suffix(index)}"
            for memory, record in enumerate(records)
            for field, specs in record._asdict().items()
            for index, _ in enumerate(keras.tree.flatten(specs))
        ]

    def unflatten(self, states):
        """Converts a flat list to records."""
        return self._packed(
            ops.reshape(state, (-1, *_shape_in_step(state, spec)))
            for state, spec in zip(states, self.specs)
        )

    def flatten(self, records):
        """Converts records to a flat list."""
        return [
            ops.reshape(value, (-1, _size(value, spec)))
            for value, spec in self._with_specs(records)
        ]

    def cast(self, states, dtype):
        """Casts a flat list to `dtype`, or to the dtypes of the `StateSpec`s
        that have one."""
        return [
            ops.cast(state, spec.dtype_in(dtype))
            for state, spec in zip(states, self.specs)
        ]

    def cast_record(self, memory, record, dtype):
        """Casts the record of a memory, without its controllers, to `dtype`.

        States with a dtype of their own, or a row for each slot, stay as they
        are.
        """
        specs = self.records[memory]._replace(controller=())
        return keras.tree.map_structure(
            lambda spec, value: (
                value if spec.dtype or spec.per_slot else ops.cast(value, dtype)
            ),
            specs,
            record,
        )

    def in_range(self, states):
        """Converts a given flat list to records, and brings them into the
        ranges that steps keep. Those with a dtype of their own get no
        gradient."""
        return self._packed(
            _in_range(value, spec)
            for value, spec in self._with_specs(self.unflatten(states))
        )

    def transpose(self, records):
        """Converts a step's records to the records that users see, and back:
        see `StateSpec.transposed`."""
        return self._packed(
            ops.swapaxes(value, -1, -2) if spec.transposed else value
            for value, spec in self._with_specs(records)
        )

    def _with_specs(self, records):
        return zip(keras.tree.flatten(records), self.specs)

    def _packed(self, values):
        return keras.tree.pack_sequence_as(self.records, list(values))


def _in_range(value, spec):
    value = spec.into_range(value) if spec.into_range else value
    return ops.stop_gradient(value) if spec.dtype else value


def _shape_in_step(state, spec):
    """Shape of a state in a step, without the batch axis."""
    if not spec.per_slot:
        return spec.shape_in_step
    _, *row = spec.shape
    return ops.shape(state)[1] // math.prod(row), *row


def _size(value, spec):
    """Size of a state outside of a step, without the batch axis."""
    if not spec.per_slot:
        return math.prod(spec.shape)
    _, *row = spec.shape
    return ops.shape(value)[1] * math.prod(row)


def index_suffix(index):
    """Suffix of a name: empty for index 0."""
    return f"_{index}" if index else ""


class LayerState(keras.layers.Layer):
    """Holds the state of a stateful layer, apart from its weights.

    Its variables are among the `variables` of the layer that owns it, like
    those of seeds and metrics, so that every backend trains, compiles and
    exports with them. They are not among the `weights`: these are the same
    without state and for any batch size, and files do not contain the state.

    Args:
        variables: list of (name, shape, dtype, initializer), the last a
            function (shape, dtype) -> tensor.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, variables, **kwargs):
        super().__init__(trainable=False, **kwargs)
        for name, shape, dtype, initializer in variables:
            self.add_weight(
                shape=shape,
                initializer=initializer,
                dtype=dtype,
                trainable=False,
                autocast=False,
                name=name,
            )
        self.built = True

    @property
    def weights(self):
        return []

    def values(self):
        """The values of the variables, to begin a call with."""
        values = [ops.convert_to_tensor(v) for v in self.variables]
        if keras.backend.backend() == "torch":
            # `assign` writes into the same memory, but the gradient of the
            # call still needs these values.
            values = [ops.copy(value) for value in values]
        return values

    def assign(self, values):
        """Assigns values to the variables, to end a call."""
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def save_own_variables(self, store):
        """Saves nothing."""

    def load_own_variables(self, store):
        """Loads nothing."""
