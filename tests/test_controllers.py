"""Controllers by name, and the demands of a memory cell on any controller."""

import ast
import json

import keras
import numpy as np
import pytest
import reference
import toy
from harness import GOLDENS
from harness import compiled
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory.recurrent import controllers

pytestmark = pytest.mark.every_backend

BATCH, WIDTH, UNITS = 2, 5, 7

# The cells of tensorflow-addons.
ADDONS = {
    "layer_norm_lstm": controllers.LayerNormLSTMCell,
    "layer_norm_rnn": controllers.LayerNormSimpleRNNCell,
    "peephole_lstm": controllers.PeepholeLSTMCell,
    "nas": controllers.NASCell,
}


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
        *ADDONS.items(),
    ],
)
def test_get_makes_cells_by_name(name, cls):
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
        ("ltsm", 7, 1, 0, r"one of \['dense', 'gru', 'layer_norm.*'ltsm'"),
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
def test_get_refuses_wrong_arguments(name, units, layers, dropout, message):
    with pytest.raises(ValueError, match=message):
        controllers.get(name, units, layers, dropout)


@pytest.mark.parametrize(
    "controller", [None, 5, [keras.layers.LSTMCell], keras.layers.LSTMCell]
)
def test_get_refuses_anything_but_names_and_layers(controller):
    with pytest.raises(TypeError, match="name or a Keras layer.*Received: "):
        controllers.get(controller, UNITS, 1)


def test_layers_of_one_seed_drop_different_units():
    stack = made("rnn", layers=3, dropout=0.5, seed=3)
    ones = np.ones((BATCH, 97), "float32")
    masks = [
        ops.convert_to_numpy(cell.get_dropout_mask(ones))
        for cell in stack.cells
    ]
    assert (masks[0] != masks[1]).any()
    assert (masks[1] != masks[2]).any()


# DenseCell


def test_dense_cell_equals_a_dense_layer(x):
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


# Demands of a memory cell on its controller.

CONTROLLERS = {
    **{
        name: lambda name=name: controllers.get(name, UNITS, 1)
        for name in controllers.CELLS
    },
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
            controllers.NASCell(13, projection=3),
            controllers.LayerNormSimpleRNNCell(5),
            keras.layers.GRUCell(UNITS),
        ]
    ),
    "Dense": lambda: keras.layers.Dense(UNITS),
    "Sequential": lambda: toy.feed_forward(UNITS),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_step_keeps_the_structure_and_the_output_size(name, x):
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


def test_states_reach_the_controller_in_order(x):
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


def test_training_reaches_the_layers_that_take_it(x):
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
    # Neither layer takes `training`.
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


# The cells of tensorflow-addons.


def randomised(name, **kwargs):
    """A cell with all weights drawn at random."""
    cell = ADDONS[name](UNITS, **kwargs)
    cell.build((None, WIDTH))
    rng = np.random.default_rng(5)
    cell.set_weights(
        [rng.normal(size=w.shape, scale=0.5) for w in cell.get_weights()]
    )
    return cell


def random_states(cell):
    rng = np.random.default_rng(3)
    return [
        rng.normal(size=state.shape).astype("float32")
        for state in cell.get_initial_state(batch_size=BATCH)
    ]


def steps_close(ours, theirs, tolerance=1e-6):
    """Compares two pairs of output and states."""
    for a, b in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs)):
        close(a, ops.convert_to_numpy(b), tolerance)


def literal(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def from_golden(name, dtype):
    """A layer with the weights of a golden file, its states, and the file."""
    file = dict(np.load(GOLDENS / f"tfa__{name}.npz"))
    settings = json.loads(str(file["__meta__"]))
    options = {key: literal(v) for key, v in settings["options"].items()}
    cls = getattr(controllers, settings["cell"])
    cell = cls(settings["units"], dtype=dtype, **options)
    layer = keras.layers.RNN(cell, return_sequences=True, dtype=dtype)
    layer.build(file["x"].shape)
    names = settings["weights_in_order"]
    cell.set_weights([file[f"w.{weight}"] for weight in names])
    states = [file[key] for key in sorted(file) if key.startswith("init.")]
    return layer, states, names, file


each_golden = pytest.mark.parametrize(
    "name",
    [f"{cls.__name__}_{run}" for cls in ADDONS.values() for run in "ab"],
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float64", 1e-9, marks=needs_tensorflow),
        ("float32", 1e-5),
    ],
)
@each_golden
def test_steps_equal_tensorflow_addons(name, dtype, tolerance):
    layer, states, _, file = from_golden(name, dtype)
    x = file["x"].astype(dtype)
    states = [state.astype(dtype) for state in states]
    close(layer(x), file["output_from_zero_state"], tolerance)
    for time in range(x.shape[1]):
        output, states = layer.cell(x[:, time], states)
        close(output, file["output"][:, time], tolerance)
        for index, state in enumerate(states):
            close(state, file[f"step.state{index}"][:, time], tolerance)


@each_golden
@needs_tensorflow
def test_gradients_equal_tensorflow_addons(name):
    import tensorflow as tf

    layer, states, names, file = from_golden(name, "float64")
    x, states = tf.constant(file["x"]), [tf.constant(s) for s in states]
    with tf.GradientTape() as tape:
        tape.watch([x, states])
        loss = tf.reduce_sum(layer(x, initial_state=states) ** 2)
    close(loss, file["loss"], 1e-9)
    of_x, of_states, of_weights = tape.gradient(
        loss, [x, states, layer.cell.trainable_weights]
    )
    close(of_x, file["grad.x"], 1e-7)
    for index, gradient in enumerate(of_states):
        close(gradient, file[f"grad.init.state{index}"], 1e-7)
    assert len(of_weights) == len(names)
    for weight, gradient in zip(names, of_weights):
        close(gradient, file[f"grad.{weight}"], 1e-7)


# Options that the golden files do not cover.


def hard_sigmoid(x):
    return np.clip(x / 6 + 0.5, 0, 1)


def layer_norm(x, gamma, beta, epsilon):
    deviation = np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return (x - x.mean(-1, keepdims=True)) / deviation * gamma + beta


def test_lstm_options_match_values_computed_by_hand(x):
    options = {
        "activation": "relu",
        "recurrent_activation": "hard_sigmoid",
        "use_bias": False,
    }
    cell = randomised("peephole_lstm", **options)
    states = h, c = random_states(cell)
    kernel, recurrent_kernel, p_i, p_f, p_o = cell.get_weights()
    i, f, g, o = np.split(x @ kernel + h @ recurrent_kernel, 4, axis=-1)
    c = hard_sigmoid(f + p_f * c) * c
    c = c + hard_sigmoid(i + p_i * states[1]) * np.maximum(g, 0)
    h = hard_sigmoid(o + p_o * c) * np.maximum(c, 0)
    steps_close(cell(x, states), (h, [h, c]), 1e-5)

    cell = randomised("layer_norm_lstm", norm_epsilon=0.5, **options)
    states = h, c = random_states(cell)
    kernel, recurrent_kernel, *norms = cell.get_weights()
    z = layer_norm(x @ kernel, *norms[:2], 0.5)
    z = z + layer_norm(h @ recurrent_kernel, *norms[2:4], 0.5)
    i, f, g, o = np.split(z, 4, axis=-1)
    c = hard_sigmoid(f) * c + hard_sigmoid(i) * np.maximum(g, 0)
    c = layer_norm(c, *norms[4:], 0.5)
    h = hard_sigmoid(o) * np.maximum(c, 0)
    steps_close(cell(x, states), (h, [h, c]), 1e-5)


@pytest.mark.parametrize("name", ["layer_norm_rnn", "nas"])
def test_no_bias_equals_a_bias_of_zero(name, x):
    cell = randomised(name, use_bias=True)
    without = randomised(name, use_bias=False)
    weights = without.get_weights()
    weights.insert(2, np.zeros(cell.bias.shape))
    cell.set_weights(weights)
    states = random_states(cell)
    steps_close(cell(x, states), without(x, states))


def test_nas_projects_its_output(x):
    cell = randomised("nas", projection=3)
    plain = randomised("nas")
    recurrent_kernel, kernel, projection = cell.get_weights()
    assert projection.shape == (UNITS, 3)
    c, m = random_states(cell)
    assert m.shape == (BATCH, 3)
    # The plain cell sees the same m_{t-1}, padded with zeros.
    fill = np.zeros((UNITS - 3, 8 * UNITS))
    plain.set_weights([np.concatenate([recurrent_kernel, fill]), kernel])
    wide_m = np.pad(m, [(0, 0), (0, UNITS - 3)])
    output, (wide_c, _) = plain(x, [c, wide_m])
    projected = ops.convert_to_numpy(output) @ projection
    steps_close(cell(x, [c, m]), (projected, [wide_c, projected]))


def test_initial_weights_follow_the_arguments():
    for name in ("layer_norm_lstm", "peephole_lstm"):
        for unit_forget_bias in (True, False):
            cell = ADDONS[name](UNITS, unit_forget_bias=unit_forget_bias)
            cell.build((None, WIDTH))
            bias = np.split(ops.convert_to_numpy(cell.bias), 4)
            close(bias, np.outer([0, unit_forget_bias, 0, 0], [1] * UNITS), 0)
    cell = controllers.LayerNormLSTMCell(
        UNITS, norm_gamma_initializer="zeros", norm_beta_initializer="ones"
    )
    cell.build((None, WIDTH))
    gammas_and_betas = cell.get_weights()[3:]
    assert [w.mean() for w in gammas_and_betas] == [0, 1] * 3
    # A shared initializer must not draw equal weights.
    draw = keras.initializers.RandomNormal()
    peephole = controllers.PeepholeLSTMCell(UNITS, kernel_initializer=draw)
    norm = controllers.LayerNormLSTMCell(UNITS, norm_gamma_initializer=draw)
    for cell, first, second in ((peephole, 3, 4), (norm, 3, 5)):
        cell.build((None, WIDTH))
        weights = cell.get_weights()
        assert (weights[first] != weights[second]).all()


each_name = pytest.mark.parametrize("name", ADDONS)


@each_name
def test_all_gates_and_steps_share_one_dropout_mask(name, x):
    shares = {"dropout": 0.5, "seed": 11}
    if name != "nas":
        shares["recurrent_dropout"] = 0.4
    cell, twin = randomised(name, **shares), randomised(name, **shares)
    plain = randomised(name)
    x = np.stack([x, 2 * x, -x], axis=1)
    layer = keras.layers.RNN(cell, return_sequences=True)
    output = ops.convert_to_numpy(layer(x, training=True))
    # The twin draws the same masks as the layer.
    mask = ops.convert_to_numpy(twin.get_dropout_mask(x[:, 0]))
    states = [np.zeros((BATCH, UNITS), "float32") for _ in random_states(cell)]
    recurrent_mask = np.ones((BATCH, UNITS), "float32")
    if name != "nas":
        recurrent_mask = ops.convert_to_numpy(
            twin.get_recurrent_dropout_mask(states[0])
        )
        assert recurrent_mask.shape == (BATCH, UNITS)
        assert set(recurrent_mask.ravel()) == {0, np.float32(1 / 0.6)}
    assert mask.shape == (BATCH, WIDTH)
    assert set(mask.ravel()) == {0, 2}
    for time in range(3):
        states[0] = states[0] * recurrent_mask  # only U sees the dropped h
        after = plain(x[:, time] * mask, states)
        expected, states = keras.tree.map_structure(ops.convert_to_numpy, after)
        close(output[:, time], expected)
    others = ops.convert_to_numpy(layer(x, training=True))
    assert np.abs(others - output).max() > 1e-3
    without = keras.layers.RNN(plain, return_sequences=True)(x, training=True)
    close(layer(x), ops.convert_to_numpy(without))


@each_name
def test_masked_steps_hold_output_and_states(name):
    if name == "nas" and keras.backend.backend() in ("jax", "numpy"):
        pytest.skip("Keras holds the first state there, not the output")
    layer = keras.layers.RNN(randomised(name), return_state=True)
    rng = np.random.default_rng(7)
    x = rng.normal(size=(BATCH, 7, WIDTH)).astype("float32")
    mask = np.ones((BATCH, 7), bool)
    mask[:, 4:] = False
    steps_close(layer(x, mask=mask), layer(x[:, :4]))


def test_a_compiled_stack_trains_and_is_saved(tmp_path):
    shares = {"dropout": 0.25, "recurrent_dropout": 0.25}
    *cells, nas = ADDONS.values()
    stack = [cell(UNITS, **shares) for cell in cells]
    stack.append(nas(UNITS, projection=3, use_bias=True, dropout=0.25))
    layer = keras.layers.RNN(keras.layers.StackedRNNCells(stack))
    model = keras.Sequential([keras.Input((None, WIDTH)), layer])
    x = np.random.default_rng(7).normal(size=(BATCH, 3, WIDTH))
    backend = keras.backend.backend()
    if backend != "numpy":  # Keras does not train there
        compiled(model, "sgd", "mse", jit_compile=backend != "torch")
        before = model.get_weights()
        model.fit(x, np.ones((BATCH, 3)), epochs=2, verbose=0)
        for weight, old in zip(model.weights, before):
            new = ops.convert_to_numpy(weight)
            assert np.isfinite(new).all() and (new != old).any(), weight.path
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(x), ops.convert_to_numpy(model(x)), 0)


@each_name
def test_a_saved_memory_keeps_its_addons_controller(name, tmp_path):
    sizes = {"memory_slots": 11, "slot_size": 3, "return_sequences": True}
    model = keras.Sequential(
        [
            keras.Input((None, WIDTH)),
            keras_memory.NTMLayer(3, controller=ADDONS[name](UNITS), **sizes),
            keras_memory.NTMLayer(
                3,
                controller=name,
                controller_units=UNITS,
                controller_layers=2,
                **sizes,
            ),
        ]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(7).normal(size=(BATCH, 3, WIDTH))
    close(loaded(x), ops.convert_to_numpy(model(x)), 0)
    assert type(loaded.layers[0].cell.controller) is ADDONS[name]


CELL = {
    "units": 3,
    "use_bias": False,
    "kernel_initializer": "ones",
    "recurrent_initializer": "ones",
    "bias_initializer": "ones",
    "dropout": 0.25,
    "seed": 11,
    "dtype": "mixed_bfloat16",
    "name": "mine",
}
RNN_CELL = {
    **CELL,
    "activation": "relu",
    "recurrent_dropout": 0.5,
    "kernel_regularizer": "l2",
    "recurrent_regularizer": "l2",
    "bias_regularizer": "l2",
    "kernel_constraint": "non_neg",
    "recurrent_constraint": "non_neg",
    "bias_constraint": "non_neg",
}
LSTM_CELL = {
    **RNN_CELL,
    "recurrent_activation": "hard_sigmoid",
    "unit_forget_bias": False,
}
# All arguments of tensorflow-addons, and `seed`.
ARGUMENTS = {
    "layer_norm_lstm": {
        **LSTM_CELL,
        "norm_gamma_initializer": "zeros",
        "norm_beta_initializer": "ones",
        "norm_epsilon": 0.5,
    },
    "layer_norm_rnn": {
        **RNN_CELL,
        "layernorm_epsilon": 0.5,
        "gamma_initializer": "zeros",
        "gamma_regularizer": "l2",
        "gamma_constraint": "non_neg",
    },
    "peephole_lstm": LSTM_CELL,
    "nas": {
        **CELL,
        "use_bias": True,
        "projection": 2,
        "projection_initializer": "ones",
    },
}


@each_name
def test_every_argument_is_kept(name):
    cell = ADDONS[name](**ARGUMENTS[name])
    text = json.dumps(cell.get_config())
    default = ADDONS[name](7).get_config()
    for key in ARGUMENTS[name]:
        assert json.loads(text)[key] != default[key], key
    copy = ADDONS[name].from_config(json.loads(text))
    assert json.dumps(copy.get_config()) == text
    for layer in (cell, copy):
        layer.build((None, WIDTH))
    assert json.dumps(copy.get_config()) == text
    for ours, theirs in zip(copy.get_weights(), cell.get_weights()):
        close(ours, theirs, 0)
    for layer in vars(copy).values():
        if isinstance(layer, keras.layers.LayerNormalization):
            assert layer.dtype_policy == copy.dtype_policy


REFUSED = [
    ({"units": 0}, "`units`.*at least 1.*Received: units=0"),
    ({"units": "7"}, "`units`.*integer.*Received: units='7'"),
    ({"dropout": 1.0}, r"`dropout`.*\[0, 1\).*Received: dropout=1.0"),
    ({"dropout": -0.1}, "`dropout`.*Received: dropout=-0.1"),
]
RECURRENT = [({"recurrent_dropout": 1.5}, "Received: recurrent_dropout=1.5")]


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("dense", []),
        (
            "layer_norm_lstm",
            [*RECURRENT, ({"norm_epsilon": 0}, "`norm_epsilon`.*positive")],
        ),
        (
            "layer_norm_rnn",
            [*RECURRENT, ({"layernorm_epsilon": None}, "epsilon=None")],
        ),
        ("peephole_lstm", RECURRENT),
        ("nas", [({"projection": 0}, "`projection`.*least 1.*projection=0")]),
    ],
)
def test_cells_refuse_wrong_arguments(name, refused):
    for arguments, message in REFUSED + refused:
        with pytest.raises(ValueError, match=message):
            controllers.CELLS[name](**{"units": UNITS, **arguments})


@pytest.mark.parametrize(("steps", "scale"), [(1, 0.0), (3, 1e3)])
@each_name
@needs_tensorflow
def test_zero_and_saturated_inputs_have_finite_gradients(name, steps, scale):
    import tensorflow as tf

    rng = np.random.default_rng(7)
    x = tf.constant(scale * rng.normal(size=(BATCH, steps, WIDTH)), "float32")
    of_output = tf.constant(rng.normal(size=(BATCH, UNITS)), "float32")
    for dtype in ("float32", "float16", "mixed_float16", "mixed_bfloat16"):
        layer = keras.layers.RNN(ADDONS[name](UNITS, dtype=dtype), dtype=dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = tf.cast(layer(x), "float32")
            loss = tf.reduce_sum(output * of_output)
        assert np.isfinite(output).all()
        for gradient in tape.gradient(loss, [x, *layer.trainable_weights]):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["layer_norm_lstm", "layer_norm_rnn"])
@needs_tensorflow
def test_masked_leading_zeros_have_finite_gradients(name):
    import tensorflow as tf

    rng = np.random.default_rng(7)
    x = rng.normal(size=(BATCH, 40, WIDTH)).astype("float32")
    x[:, :35] = 0
    layer = keras.layers.RNN(ADDONS[name](UNITS))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, mask=(x != 0).any(-1)) ** 2)
    for gradient in tape.gradient(loss, layer.trainable_weights):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softsign"])
def test_gates_of_any_activation_equal_those_of_keras(activation):
    cell = keras.layers.LSTMCell(6, recurrent_activation=activation)
    x = np.random.default_rng(3).normal(size=(2, 5)).astype("float32")
    states = [0.1 * x[:, :1] * np.ones((2, 6), "float32")] * 2
    expected, _ = cell(x, states)
    output, _ = controllers.step(cell, ops.array(x), states, False)
    close(ops.convert_to_numpy(output), ops.convert_to_numpy(expected))
