"""Controllers by name, and how a memory cell uses a controller.

A controller is a Keras RNN cell (`LSTMCell`, `StackedRNNCells`, one of your
own, ...) or a feed-forward layer such as `Dense`.
"""

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.addressing.gradients import activate
from keras_memory.addressing.gradients import activate_each
from keras_memory.addressing.gradients import linear
from keras_memory.checks import check_layers
from keras_memory.checks import check_rate
from keras_memory.hints import Array
from keras_memory.recurrent.cells import DenseCell
from keras_memory.recurrent.cells import LayerNormLSTMCell
from keras_memory.recurrent.cells import LayerNormSimpleRNNCell
from keras_memory.recurrent.cells import NASCell
from keras_memory.recurrent.cells import PeepholeLSTMCell
from keras_memory.recurrent.cells import _drop
from keras_memory.recurrent.cells import _summed_products
from keras_memory.recurrent.cells import check_units
from keras_memory.recurrent.cells import seed_of

CELLS: dict[str, type[keras.layers.Layer]] = {
    "lstm": keras.layers.LSTMCell,
    "gru": keras.layers.GRUCell,
    "rnn": keras.layers.SimpleRNNCell,
    "dense": DenseCell,
    "layer_norm_lstm": LayerNormLSTMCell,
    "layer_norm_rnn": LayerNormSimpleRNNCell,
    "peephole_lstm": PeepholeLSTMCell,
    "nas": NASCell,
}


def get(
    controller: str | keras.layers.Layer,
    units: int,
    layers: int,
    dropout: float = 0.0,
    seed: int | None = None,
    dtype: Any = None,
    **options: Any,
) -> keras.layers.Layer:
    """Makes a controller from its name, or checks one that was given.

    Args:
        controller: a name of `CELLS` (`"lstm"`, `"gru"`, `"rnn"`, `"dense"`,
            `"layer_norm_lstm"`, `"layer_norm_rnn"`, `"peephole_lstm"`,
            `"nas"`), or any Keras RNN cell or feed-forward layer, which is
            returned as it is. The arguments below are used only if
            `controller` is a name.
        units: int, at least 1; width of each layer.
        layers: int, at least 1; more than one are stacked.
        dropout: float in [0, 1), dropout rate of each layer's inputs.
        seed: int or None, seed of the dropout.
        dtype: dtype policy of the cells.
        **options: further arguments of the cells.

    Returns:
        A Keras layer.

    Raises:
        ValueError: the name is unknown, or a size is out of range.
        TypeError: `controller` is neither a name nor a Keras layer, or it is a
            layer that runs over time.
    """
    if isinstance(controller, keras.layers.RNN):
        raise TypeError(
            "`controller` must be an RNN cell, which runs one step, not a "
            "layer that runs over time: `LSTMCell` instead of `LSTM`. "
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
    check_layers("controller_layers", layers)
    check_rate("controller_dropout", dropout)
    check_units(CELLS[controller], "controller_units", units, layers)
    cells = [
        CELLS[controller](
            units,
            dropout=dropout,
            seed=seed_of(seed, layer),
            dtype=dtype,
            **options,
        )
        for layer in range(layers)
    ]
    if layers == 1:
        return cells[0]
    return keras.layers.StackedRNNCells(cells, dtype=dtype)


def state_structure(controller: keras.layers.Layer) -> Any:
    """Sizes of a controller's states: nested lists of ints, or []."""
    return getattr(controller, "state_size", [])


def state_names(cell: keras.layers.Layer) -> list[str]:
    """Names of a cell's states, as a flat list, which served models use."""
    if isinstance(cell, keras.layers.StackedRNNCells):
        names = list(map(state_names, cell.cells))
        if len(names) == 1:
            return names[0]
        return [f"{name}_{i}" for i, own in enumerate(names) for name in own]
    count = len(keras.tree.flatten(state_structure(cell)))
    names = getattr(cell, "state_names", None)
    if names is None and isinstance(cell, _CELLS_WITH_H):
        names = ["h", "c"][:count]
    if names is None or len(names) != count:
        names = [f"state_{index}" for index in range(count)]
    return list(names)


_CELLS_WITH_H = (
    keras.layers.LSTMCell,
    keras.layers.GRUCell,
    keras.layers.SimpleRNNCell,
)


def output_size(controller: keras.layers.Layer, input_size: int | None) -> int:
    """Width of a controller's output. Only feed-forward layers need
    `input_size`."""
    if not hasattr(controller, "state_size"):
        return controller.compute_output_shape((None, input_size))[-1]
    size = getattr(controller, "output_size", None)
    return size or keras.tree.flatten(controller.state_size)[0]


def step(
    controller: keras.layers.Layer,
    inputs: Array,
    states: Any,
    training: bool | None,
) -> tuple[Array, Any]:
    """Runs a controller for one step.

    Args:
        controller: a Keras RNN cell or feed-forward layer.
        inputs: (B, D).
        states: nested as `state_structure`, each (B, size).
        training: bool.

    Returns:
        Output (B, U), and the new states, nested as `states`.
    """
    own_step = _STEPS.get(type(controller))
    if own_step is not None and _is_plain(controller, inputs):
        states = keras.tree.map_structure(
            lambda state: ops.cast(state, controller.compute_dtype), states
        )
        output, new_states = own_step(controller, inputs, states, training)
    else:
        arguments = {}
        if getattr(controller, "_call_has_training_arg", False):
            arguments["training"] = training
        if not hasattr(controller, "state_size"):
            return controller(inputs, **arguments), states
        as_list = states if keras.tree.is_nested(states) else [states]
        output, new_states = controller(inputs, as_list, **arguments)
    # A stack of one cell returns its states without the outer list.
    return output, keras.tree.pack_sequence_as(
        states, keras.tree.flatten(new_states)
    )


# Steps of Keras's own cells: the same results as their `call`, but written with
# `linear` and `activate`, whose results the fast loop saves.


def _is_plain(controller, inputs):
    """Whether the functions below support the options of a Keras cell."""
    return (
        getattr(controller, "implementation", 2) == 2
        and getattr(controller, "reset_after", True)
        and controller.activity_regularizer is None
        and controller.compute_dtype == ops.dtype(inputs)
    )


def _stacked(controller, inputs, states, training):
    after = []
    for cell, before in zip(controller.cells, states):
        inputs, of_cell = step(cell, inputs, before, training)
        after.append(of_cell)
    return inputs, after


def _simple_rnn(controller, inputs, states, training):
    (h,) = keras.tree.flatten(states)
    z = _summed_products(controller, inputs, h, training)
    h = activate(controller.activation, z)
    return h, h


def _lstm(controller, inputs, states, training):
    h, c = states
    z = _summed_products(controller, inputs, h, training)
    gate, activation = controller.recurrent_activation, controller.activation
    i, f, g, o = activate_each(
        [gate, gate, activation, gate], [(controller.units,)] * 4, z
    )
    c = f * c + i * g
    h = o * activate(activation, c)
    return h, [h, c]


def _gru(controller, inputs, states, training):
    (h,) = keras.tree.flatten(states)
    x, _ = _drop(controller, inputs, h, training)
    x = linear([x], [controller.kernel])
    inner = linear([h], [controller.recurrent_kernel])
    if controller.use_bias:
        bias = ops.cast(controller.bias, x.dtype)
        x, inner = x + bias[0], inner + bias[1]
    units = controller.units
    gate = controller.recurrent_activation
    gates = activate(gate, x[:, : 2 * units] + inner[:, : 2 * units])
    z, r = ops.split(gates, 2, axis=-1)
    candidate = x[:, 2 * units :] + r * inner[:, 2 * units :]
    h = z * h + (1.0 - z) * activate(controller.activation, candidate)
    return h, h


_STEPS = {
    keras.layers.StackedRNNCells: _stacked,
    keras.layers.SimpleRNNCell: _simple_rnn,
    keras.layers.LSTMCell: _lstm,
    keras.layers.GRUCell: _gru,
}


def dropout_cells(
    controller: keras.layers.Layer, input_size: int
) -> Iterator[tuple[keras.layers.Layer, int]]:
    """Yields (cell, input width) for each cell whose dropout needs masks."""
    if isinstance(controller, keras.layers.StackedRNNCells):
        for cell in controller.cells:
            yield from dropout_cells(cell, input_size)
            input_size = output_size(cell, input_size)
    elif isinstance(controller, DropoutRNNCell):
        yield controller, input_size
