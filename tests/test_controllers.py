"""Controllers by name, and what a memory cell asks of any controller."""

import keras
import numpy as np
import pytest
import reference
import toy
from keras import ops

from keras_memory import controllers

BATCH, WIDTH, UNITS = 2, 5, 7


def close(actual, expected, tolerance=1e-6):
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def x():
    rng = np.random.default_rng(7)
    return rng.normal(size=(BATCH, WIDTH)).astype("float32")


def made(name, layers=1, **kwargs):
    controller = controllers.get(name, UNITS, layers, **kwargs)
    controller.build((None, WIDTH))
    return controller


def zeros(structure):
    return keras.tree.map_structure(lambda n: np.zeros((BATCH, n)), structure)


# get


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("lstm", keras.layers.LSTMCell),
        ("gru", keras.layers.GRUCell),
        ("rnn", keras.layers.SimpleRNNCell),
        ("dense", controllers.DenseCell),
    ],
)
def test_get_by_name(name, cls):
    cell = controllers.get(name, UNITS, 1, 0.25, 11, "mixed_bfloat16")
    assert type(cell) is cls
    assert (cell.units, cell.dropout, cell.seed) == (UNITS, 0.25, 11)
    assert cell.dtype_policy.name == "mixed_bfloat16"
    stack = controllers.get(name, UNITS, 3, 0.25, None, "mixed_bfloat16")
    assert type(stack) is keras.layers.StackedRNNCells
    assert [type(cell) for cell in stack.cells] == [cls] * 3
    for layer in (stack, *stack.cells):
        assert layer.dtype_policy.name == "mixed_bfloat16"
    assert all(cell.dropout == 0.25 for cell in stack.cells)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.LSTMCell(3),
        lambda: keras.layers.Dense(3),
        lambda: keras.layers.StackedRNNCells([keras.layers.GRUCell(3)]),
    ],
)
def test_get_returns_a_layer_as_it_is(make):
    given = make()
    assert controllers.get(given, UNITS, 2) is given


@pytest.mark.parametrize(
    ("name", "units", "layers", "dropout", "message"),
    [
        ("ltsm", 7, 1, 0, r"one of \['dense', 'gru', 'lstm'.*'ltsm'"),
        ("lstm", 0, 1, 0, "`controller_units`.*at least 1.*controller_units=0"),
        ("lstm", 7.0, 1, 0, "`controller_units`.*integer.*units=7.0"),
        ("lstm", True, 1, 0, "`controller_units`.*integer.*units=True"),
        ("lstm", "7", 1, 0, "`controller_units`.*integer.*units='7'"),
        ("gru", 7, 0, 0, "`controller_layers`.*at least 1.*layers=0"),
        ("gru", 7, None, 0, "`controller_layers`.*integer.*layers=None"),
        ("gru", 7, True, 0, "`controller_layers`.*integer.*layers=True"),
        ("rnn", 7, 1, 1.0, r"`controller_dropout`.*\[0, 1\).*dropout=1.0"),
        ("rnn", 7, 1, -0.1, "`controller_dropout`.*dropout=-0.1"),
        ("rnn", 7, 1, float("nan"), "`controller_dropout`.*dropout=nan"),
        ("rnn", 7, 1, "0.5", "`controller_dropout`.*dropout='0.5'"),
        ("rnn", 7, 1, None, "`controller_dropout`.*dropout=None"),
    ],
)
def test_get_refuses(name, units, layers, dropout, message):
    with pytest.raises(ValueError, match=message):
        controllers.get(name, units, layers, dropout)


@pytest.mark.parametrize(
    "controller", [None, 5, [keras.layers.LSTMCell], keras.layers.LSTMCell]
)
def test_get_refuses_what_is_neither_a_name_nor_a_layer(controller):
    with pytest.raises(TypeError, match="name or a Keras layer.*Received: "):
        controllers.get(controller, UNITS, 1)


def test_layers_with_a_seed_drop_different_units():
    stack = made("rnn", layers=3, dropout=0.5, seed=3)
    ones = np.ones((BATCH, 97), "float32")
    masks = [
        ops.convert_to_numpy(cell.get_dropout_mask(ones))
        for cell in stack.cells
    ]
    assert (masks[0] != masks[1]).any()
    assert (masks[1] != masks[2]).any()


# DenseCell


def test_dense_cell_is_a_dense_layer(x):
    cell = made("dense")
    cell.set_weights([w + 0.5 for w in cell.get_weights()])
    output, states = cell(x, [])
    kernel, bias = cell.get_weights()
    assert kernel.shape == (WIDTH, UNITS) and bias.shape == (UNITS,)
    close(output, [reference.dense_step(row, kernel, bias) for row in x])
    assert states == [] and cell.get_initial_state(batch_size=BATCH) == []
    linear = controllers.DenseCell(UNITS, activation=None)
    linear.build((None, WIDTH))
    linear.set_weights(cell.get_weights())
    close(linear(x, [])[0], x @ kernel + bias, 1e-5)


def test_dense_cell_keeps_its_arguments():
    arguments = {
        "units": 3,
        "activation": "relu",
        "dropout": 0.25,
        "seed": 11,
        "dtype": "mixed_bfloat16",
    }
    cell = controllers.DenseCell(
        **arguments, kernel_initializer="ones", bias_initializer="ones"
    )
    copy = controllers.DenseCell.from_config(cell.get_config())
    assert copy.get_config() == cell.get_config()
    for name in ("units", "dropout", "seed"):
        assert getattr(copy, name) == arguments[name]
    assert copy.activation is keras.activations.relu
    assert copy.dtype_policy.name == "mixed_bfloat16"
    copy.build((None, 2))
    close(copy.get_weights()[0], np.ones((2, 3)), 0)
    close(copy.get_weights()[1], np.ones(3), 0)


def test_dense_cell_keeps_its_mask_until_it_is_reset(x):
    cell = made("dense", dropout=0.5)
    plain, _ = cell(x, [])
    first, _ = cell(x, [], training=True)
    again, _ = cell(x, [], training=True)
    cell.reset_dropout_mask()
    other, _ = cell(x, [], training=True)
    close(again, ops.convert_to_numpy(first), 0)
    assert np.abs(ops.convert_to_numpy(first - other)).max() > 1e-3
    close(cell(x, [])[0], ops.convert_to_numpy(plain), 0)
    no_dropout = made("dense")
    no_dropout.set_weights(cell.get_weights())
    close(no_dropout(x, [], training=True)[0], ops.convert_to_numpy(plain), 0)


# What a cell asks of its controller.

CONTROLLERS = {
    "lstm": lambda: controllers.get("lstm", UNITS, 1),
    "gru": lambda: controllers.get("gru", UNITS, 1),
    "rnn": lambda: controllers.get("rnn", UNITS, 1),
    "dense": lambda: controllers.get("dense", UNITS, 1),
    "three lstm": lambda: controllers.get("lstm", UNITS, 3),
    "two dense": lambda: controllers.get("dense", UNITS, 2),
    "state size is an int": lambda: toy.PlainCell(UNITS),
    "stack of one": lambda: keras.layers.StackedRNNCells(
        [keras.layers.LSTMCell(UNITS)]
    ),
    "stack of one with one state": lambda: keras.layers.StackedRNNCells(
        [toy.PlainCell(UNITS)]
    ),
    "mixed stack": lambda: keras.layers.StackedRNNCells(
        [
            controllers.DenseCell(3),
            keras.layers.LSTMCell(11),
            keras.layers.GRUCell(UNITS),
        ]
    ),
    "Dense": lambda: keras.layers.Dense(UNITS),
    "Sequential": lambda: toy.feed_forward(UNITS),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_step_keeps_the_structure_and_tells_its_width(name, x):
    controller = CONTROLLERS[name]()
    structure = controllers.state_structure(controller)
    assert controllers.output_size(controller, WIDTH) == UNITS  # not built
    controller.build((None, WIDTH))
    assert controllers.output_size(controller, WIDTH) == UNITS
    states = zeros(structure)
    output, after = controllers.step(controller, x, states, False)
    assert tuple(output.shape) == (BATCH, UNITS)
    keras.tree.assert_same_structure(states, after)
    for before, now in zip(
        keras.tree.flatten(states), keras.tree.flatten(after)
    ):
        assert tuple(now.shape) == before.shape
        assert np.abs(ops.convert_to_numpy(now)).max() > 0


def test_states_reach_the_controller_in_their_order(x):
    stack = made("lstm", layers=2)
    rng = np.random.default_rng(3)
    states = keras.tree.map_structure(
        lambda n: rng.normal(size=(BATCH, n)).astype("float32"),
        controllers.state_structure(stack),
    )
    output, after = controllers.step(stack, x, states, False)
    hidden = x
    for cell, before, now in zip(stack.cells, states, after):
        weights = [np.array(w, "float64") for w in cell.get_weights()]
        for item in range(BATCH):
            h, c = reference.lstm_step(
                hidden[item], *(state[item] for state in before), *weights
            )
            close(now[0][item], h, 1e-5)
            close(now[1][item], c, 1e-5)
        hidden = ops.convert_to_numpy(now[0])
    close(output, hidden, 0)


def test_training_reaches_those_who_want_it(x):
    dropping = keras.layers.Dropout(0.9)
    still, _ = controllers.step(dropping, x, (), False)
    dropped, _ = controllers.step(dropping, x, (), True)
    close(still, x, 0)
    assert (ops.convert_to_numpy(dropped) == 0).any()
    cell = made("rnn", dropout=0.9)
    states = zeros([UNITS])
    still, _ = controllers.step(cell, x, states, False)
    dropped, _ = controllers.step(cell, x, states, True)
    assert np.abs(ops.convert_to_numpy(still - dropped)).max() > 1e-3
    # Neither of these takes `training`.
    controllers.step(keras.layers.Dense(3), x, (), True)
    controllers.step(toy.PlainCell(WIDTH), x, zeros(WIDTH), True)


def test_dropout_cells_come_with_the_width_of_their_inputs():
    first = keras.layers.LSTMCell(3, dropout=0.5)
    second = controllers.DenseCell(11, dropout=0.5)
    third = keras.layers.GRUCell(UNITS, dropout=0.5)
    inner = keras.layers.StackedRNNCells([first, toy.PlainCell(13), second])
    stack = keras.layers.StackedRNNCells([inner, third])
    assert list(controllers.dropout_cells(stack, WIDTH)) == [
        (first, WIDTH),
        (second, 13),
        (third, 11),
    ]
    assert list(controllers.dropout_cells(first, WIDTH)) == [(first, WIDTH)]
    assert not list(controllers.dropout_cells(keras.layers.Dense(3), WIDTH))
