"""Controllers by name, and what a memory cell asks of any controller.

A controller is a Keras RNN cell (`LSTMCell`, `StackedRNNCells`, one of your
own, ...) or a feed-forward layer such as `Dense`.
"""

import keras
from keras import ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.checks import check_size
from keras_memory.checks import is_number


@keras.saving.register_keras_serializable(package="keras_memory")
class DenseCell(DropoutRNNCell, keras.layers.Layer):
    """A dense layer in the form of an RNN cell that has no state.

    It lets a feed-forward controller be stacked, and gives it one dropout
    mask for all steps of a sequence, as recurrent controllers have.

    Args:
        units: int, at least 1; output width.
        activation: Keras activation. Default `"tanh"`.
        kernel_initializer: Keras initializer.
        bias_initializer: Keras initializer.
        dropout: float in [0, 1), dropped share of the inputs.
        seed: int or None, seed of the dropout.
        **kwargs: of `keras.layers.Layer`.

    Example:

    >>> cell = keras_memory.controllers.DenseCell(3)
    >>> output, states = cell(np.ones((2, 5), "float32"), [])
    >>> output.shape, states
    (TensorShape([2, 3]), [])
    """

    recurrent_dropout = 0.0

    def __init__(
        self,
        units,
        activation="tanh",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.dropout = dropout
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.state_size = []
        self.output_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units),
            initializer=self.kernel_initializer,
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(self.units,),
            initializer=self.bias_initializer,
            name="bias",
        )

    def call(self, inputs, states, training=False):
        if training and self.dropout > 0:
            inputs = inputs * self.get_dropout_mask(inputs)
        output = ops.matmul(inputs, self.kernel) + self.bias
        return self.activation(output), states

    def get_initial_state(self, batch_size=None):
        return []

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "dropout": self.dropout,
            "seed": self.seed,
        }


CELLS = {
    "lstm": keras.layers.LSTMCell,
    "gru": keras.layers.GRUCell,
    "rnn": keras.layers.SimpleRNNCell,
    "dense": DenseCell,
}


def get(controller, units, layers, dropout=0.0, seed=None, dtype=None):
    """Makes a controller from its name, or checks one that was given.

    Args:
        controller: `"lstm"`, `"gru"`, `"rnn"`, `"dense"`, or any Keras RNN
            cell or feed-forward layer, which is returned as it is.
        units: int, at least 1; width of each layer. By name only.
        layers: int, at least 1; more than one are stacked. By name only.
        dropout: float in [0, 1), dropped share of each layer's inputs. By
            name only.
        seed: int or None, seed of the dropout. By name only.
        dtype: dtype policy of the made cells.

    Returns:
        A Keras layer.

    Raises:
        ValueError: an unknown name, or sizes out of range.
        TypeError: neither a name nor a Keras layer.
    """
    if isinstance(controller, keras.layers.RNN):
        raise TypeError(
            "`controller` must be an RNN cell, which makes one step, and not "
            "a layer that runs over time: `LSTMCell` instead of `LSTM`. "
            f"Received: controller={controller!r}"
        )
    if isinstance(controller, keras.layers.Layer):
        return controller
    if not isinstance(controller, str):
        raise TypeError(
            "`controller` must be a name or a Keras layer. "
            f"Received: controller={controller!r}"
        )
    if controller not in CELLS:
        raise ValueError(
            f"`controller` must be one of {sorted(CELLS)}, or a Keras RNN "
            "cell, or a feed-forward layer. "
            f"Received: controller={controller!r}"
        )
    check_size("controller_units", units)
    check_size("controller_layers", layers)
    if not is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise ValueError(
            "`controller_dropout` is the dropped share of the inputs and must "
            f"be in [0, 1). Received: controller_dropout={dropout!r}"
        )
    cells = [
        CELLS[controller](
            units,
            dropout=dropout,
            seed=None if seed is None else seed + layer,
            dtype=dtype,
        )
        for layer in range(layers)
    ]
    if layers == 1:
        return cells[0]
    return keras.layers.StackedRNNCells(cells, dtype=dtype)


def state_structure(controller):
    """Sizes of a controller's states: nested lists of ints, or []."""
    return getattr(controller, "state_size", [])


def output_size(controller, input_size):
    """Width of a controller's output. Only a feed-forward layer needs
    `input_size` to tell."""
    if not hasattr(controller, "state_size"):
        return controller.compute_output_shape((None, input_size))[-1]
    size = getattr(controller, "output_size", None)
    return size or keras.tree.flatten(controller.state_size)[0]


def step(controller, inputs, states, training):
    """Runs a controller for one step.

    Args:
        controller: a Keras RNN cell or feed-forward layer.
        inputs: (B, D).
        states: nested as `state_structure`, each (B, size).
        training: bool.

    Returns:
        Output (B, U), and the states, nested as they came.
    """
    arguments = {}
    if controller._call_has_training_arg:
        arguments["training"] = training
    if not hasattr(controller, "state_size"):
        return controller(inputs, **arguments), states
    as_list = states if keras.tree.is_nested(states) else [states]
    output, new_states = controller(inputs, as_list, **arguments)
    # A stack of one cell hands its states back without the outer list.
    return output, keras.tree.pack_sequence_as(
        states, keras.tree.flatten(new_states)
    )


def dropout_cells(controller, input_size):
    """Yields (cell, input width) for each cell whose dropout needs masks."""
    if isinstance(controller, keras.layers.StackedRNNCells):
        for cell in controller.cells:
            yield from dropout_cells(cell, input_size)
            input_size = output_size(cell, input_size)
    elif isinstance(controller, DropoutRNNCell):
        yield controller, input_size
