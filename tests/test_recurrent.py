"""Tests of `recurrent`, the part that all recurrent memories share.

`test_catalogue.py` checks every layer against the demands of Keras. This file
checks where `MemoryRNN` differs from `keras.layers.RNN`, which errors are
raised, and that Keras still has the private hooks that the layers depend on.
"""

import concurrent.futures
import dataclasses
import functools
import inspect
import json
import pathlib
import re
import sys
import threading
from typing import Any
from typing import NamedTuple

import harness
import keras
import numpy as np
import pytest
import toy
from catalogue import slow_unless
from keras import ops
from keras.src import backend
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

import keras_memory
from keras_memory.recurrent import cells
from keras_memory.recurrent import controllers
from keras_memory.recurrent import serialization
from keras_memory.recurrent.interface import StateSpec

BATCH, TIME, WIDTH = 2, 7, 5
SIZES = {
    "memory_slots": 11,
    "slot_size": 3,
    "controller_units": 13,
    "initial_memory": "random",
    "bias_initializer": "random_normal",
}

NAN = float("nan")

needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="uses tf.function"
)


def skip_where_the_dtype_is_missing(dtype):
    if dtype == "float64":
        harness.skip_on("jax", because="JAX has no float64 unless told")
    if dtype == "float16":
        harness.skip_on(
            *harness.OTHERS,
            because="test_canary_no_orthogonal_weights_in_float16",
        )


def close(actual, expected, tolerance=1e-6):
    actual, expected = map(ops.convert_to_numpy, (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def differ(one, other):
    one, other = map(ops.convert_to_numpy, (one, other))
    assert one.shape == other.shape
    return np.abs(one - other).max() > 1e-4


@pytest.fixture
def x():
    rng = np.random.default_rng(7)
    return rng.normal(size=(BATCH, TIME, WIDTH)).astype("float32")


def ntm(**kwargs):
    return keras_memory.NTMLayer(
        2, **{**SIZES, "return_sequences": True, **kwargs}
    )


def ntm_cell(**kwargs):
    return keras_memory.NTMCell(2, **{**SIZES, **kwargs})


def holes():
    """A mask with a masked first step, holes, and an unmasked row."""
    mask = np.ones((BATCH, TIME), bool)
    mask[0, [0, 3, 4, 6]] = False
    return mask


class Silent:
    """An access that always reads zeros: with constant inputs, a feed-forward
    controller gets the same input at every step."""

    interface_size = 1
    read_size = 2

    def __init__(self):
        self.initial_state = toy.ToyState(
            reads=StateSpec((1, 2)), total=StateSpec((1,))
        )

    def step(self, interface, state):
        return state, {}


# reset_state, and the states of a stateful layer.


def test_reset_state_restores_the_initial_state_instead_of_zeros(x):
    cell = ntm_cell(initial_memory="learned", initial_reads=0.5)
    plain = keras.layers.RNN(cell, stateful=True)
    plain(x)
    plain.reset_state()
    assert all(not ops.convert_to_numpy(state).any() for state in plain.states)
    ours = keras_memory.MemoryRNN(cell, stateful=True)
    ours(x)
    # The reset must use the trained weight, not its first value.
    (memory,) = (w for w in cell.weights if w.name == "initial_memory")
    memory.assign(ops.convert_to_numpy(memory) + 2.0)
    ours.reset_state()
    initial = cell.get_initial_state(batch_size=BATCH)
    for state, expected in zip(ours.states, initial):
        close(state, expected, 0)
    record = cell.unpack_state(ours.states)
    close(record.reads, np.full((BATCH, 1, 3), 0.5), 0)
    assert ops.convert_to_numpy(record.memory).mean() > 1.5
    ours.reset_states()  # Keras's alias
    close(ours.states[0], initial[0], 0)


def test_reset_state_before_the_first_call_does_nothing():
    layer = ntm(stateful=True)
    layer.reset_state()
    assert layer.states is None


def test_states_are_variables_of_the_layer_and_not_weights(x):
    """JAX trains with tracked variables only, and PyTorch moves only those."""
    plain = keras.layers.RNN(ntm_cell(), stateful=True)
    plain(x)
    ours = ntm(stateful=True)
    ours(x)

    def tracked(layer):
        variables = {id(v) for v in layer.non_trainable_variables}
        return [id(state) in variables for state in layer.states]

    assert not any(tracked(plain))
    assert all(tracked(ours))
    assert not any(state.trainable for state in ours.states)
    assert len({state.path for state in ours.states}) == len(ours.states)
    names = [weight.path.split("/")[-1] for weight in ours.weights]
    assert not any("state" in name for name in names)
    assert ours.count_params() == ours.cell.count_params()
    assert [w.shape for w in ours.get_weights()] == [
        w.shape for w in plain.get_weights()
    ]


def test_weights_transfer_between_stateless_and_stateful_layers(x, tmp_path):
    """Train in batches, deploy as a stream."""

    def model_of(batch, **more):
        layer = ntm(initial_memory="learned", **more)
        return keras.Sequential(
            [keras.Input(batch_shape=(batch, None, WIDTH)), layer]
        )

    trained = model_of(None)
    for weight in trained.weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1)
    expected = trained(x)
    wide = model_of(BATCH, stateful=True)
    wide.set_weights(trained.get_weights())
    # It starts at the learned memory, though the weights were set after build.
    close(wide(x), expected)
    stream = model_of(1, stateful=True)
    trained.save_weights(tmp_path / "model.weights.h5")
    stream.load_weights(tmp_path / "model.weights.h5")
    steps = [stream(x[:1, t : t + 1]) for t in range(TIME)]
    close(ops.concatenate(steps, axis=1), expected[:1])
    # A started sequence continues, and states set by a user are kept.
    (layer,) = wide.layers
    before = [ops.convert_to_numpy(state) for state in layer.states]
    wide.set_weights(stream.get_weights())
    goes_on = wide(x)
    assert differ(goes_on, expected)
    layer.reset_state()
    for state, value in zip(layer.states, before):
        state.assign(value)
    close(wide(x), goes_on)
    # Back again, from a file written by a stateful layer.
    wide.save_weights(tmp_path / "wide.weights.h5")
    again = model_of(None)
    again.load_weights(tmp_path / "wide.weights.h5")
    close(again(x), expected)


def test_a_loaded_stateful_layer_begins_at_its_initial_state(x, tmp_path):
    model = keras.Sequential(
        [keras.Input(batch_shape=(BATCH, 3, WIDTH)), ntm(stateful=True)]
    )
    first = model(x[:, :3])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(x[:, :3]), first, 0)
    assert differ(model(x[:, :3]), first)


@harness.needs_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("rows", [3, 5])
def test_fit_of_a_stateful_layer_refuses_other_batch_sizes(
    x, rows, jit_compile
):
    """This check comes before any other shape error, such as the mask's."""
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, TIME, WIDTH)),
            keras.layers.Masking(),
            ntm(stateful=True),
            keras.layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse", jit_compile=jit_compile)
    y = np.zeros((rows, TIME, 2), "float32")
    x = np.concatenate([x] * rows)[:rows]
    with pytest.raises(Exception, match="with_state_must_be_4"):
        model.fit(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_stateful_layer_works_in_a_subclassed_model(x, jit_compile):
    """Built within `fit` or `predict`, where the initial state is symbolic."""

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.memory = ntm(stateful=True, initial_memory="learned")

        def call(self, inputs):
            return self.memory(inputs)

    y = np.zeros((BATCH, TIME, 2), "float32")
    model = Own()
    model.compile("sgd", "mse", jit_compile=jit_compile)
    if keras.backend.backend() == "tensorflow" and jit_compile:
        model.fit(x, y, batch_size=BATCH, verbose=0)
        model.memory.reset_state()
    first = model.predict(x, batch_size=BATCH, verbose=0)
    second = model.predict(x, batch_size=BATCH, verbose=0)
    model.memory.reset_state()
    close(model.predict(x, batch_size=BATCH, verbose=0), first)
    assert differ(first, second)


def test_a_layer_may_have_initial_states_of_its_own(x):
    class Own(keras_memory.NTMLayer):
        def get_initial_state(self, batch_size):
            states = super().get_initial_state(batch_size)
            return [state + 0.5 for state in states]

    layer = Own(2, **SIZES, return_sequences=True)
    outputs = layer(x)
    states = layer.get_initial_state(len(x))
    close(layer(x, initial_state=states), outputs)
    plain_states = layer.cell.get_initial_state(len(x))
    assert differ(layer(x, initial_state=plain_states), outputs)


@pytest.mark.every_backend
@pytest.mark.parametrize("batch", [1, BATCH])
def test_training_a_stateful_layer_keeps_its_initial_state(x, batch):
    """On PyTorch, views and saved tensors would change with the state."""
    harness.skip_on("numpy", because="Keras does not train on NumPy")
    layer = ntm(stateful=True, initial_memory="learned")
    model = keras.Sequential(
        [keras.Input(batch_shape=(batch, TIME, WIDTH)), layer]
    )
    (memory,) = (w for w in layer.weights if w.name == "initial_memory")
    before = ops.convert_to_numpy(memory).copy()
    layer(x[:batch])
    close(memory, before, 0)
    harness.compiled(model, "sgd", "mse")
    history = model.fit(
        x[:batch],
        np.ones((batch, TIME, 2)),
        batch_size=batch,
        epochs=2,
        verbose=0,
    ).history
    assert history["loss"][0] != history["loss"][1]


def test_a_stateful_layer_continues_from_given_initial_states(x):
    layer = ntm(stateful=True)
    states = [
        np.full((BATCH, size), 0.3, "float32")
        for size in [3, 33, 11, 11, 13, 13]
    ]
    given = layer(x, initial_state=states)
    layer.reset_state()
    assert differ(layer(x), given)
    layer(x[:, :4], initial_state=states)
    close(layer(x[:, 4:]), given[:, 4:])


# One projection outside of the loop gives the same numbers as the cell.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "sigmoid", "clip_value": 0.1},
        {
            "read_heads": 2,
            "controller": "gru",
            "head_order": ("write", "read", "read"),
        },
    ],
)
@pytest.mark.parametrize("return_sequences", [False, True])
def test_a_cell_in_keras_rnn_gives_the_same_results(
    x, options, return_sequences
):
    layer = ntm(return_sequences=return_sequences, return_state=True, **options)
    output, *states = layer(x)
    plain = keras.layers.RNN(
        ntm_cell(**options),
        return_sequences=return_sequences,
        return_state=True,
    )
    plain.build(x.shape)
    plain.cell.set_weights(layer.cell.get_weights())
    expected, *expected_states = plain(x)
    close(output, expected)
    assert len(states) == len(expected_states) > 0
    for state, expected in zip(states, expected_states):
        close(state, expected)


def test_stacked_cells_in_keras_rnn_equal_stacked_layers(x):
    first, second = ntm(), ntm()
    expected = second(first(x))
    stack = keras.layers.RNN(
        keras.layers.StackedRNNCells([ntm_cell(), ntm_cell()]),
        return_sequences=True,
    )
    stack.build(x.shape)
    for cell, layer in zip(stack.cell.cells, (first, second)):
        cell.set_weights(layer.cell.get_weights())
    close(stack(x), expected)


@pytest.mark.parametrize("return_sequences", [False, True])
def test_the_output_is_projected_once(x, return_sequences):
    layer = ntm(return_sequences=return_sequences)
    layer.build(x.shape)
    shapes, project = [], layer.cell.project

    def watched(features, training):
        shapes.append(tuple(features.shape))
        return project(features, training)

    layer.cell.project = watched
    layer(x)
    size = layer.cell.features_size
    shape = (BATCH, TIME, size) if return_sequences else (BATCH, size)
    assert shapes == [shape]


@needs_tensorflow
def test_unroll_leaves_no_loop(x):
    import tensorflow as tf

    def loops(**arguments):
        layer = ntm(**arguments)
        layer.build(x.shape)
        call = tf.function(layer.__call__).get_concrete_function(x)
        kinds = {operation.type for operation in call.graph.get_operations()}
        return [kind for kind in kinds if "While" in kind]

    assert loops() != [] and loops(unroll=True) == []


# Masks.


@pytest.mark.parametrize("zero_output_for_mask", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
@needs_tensorflow  # where Keras's own masking is right
def test_masking_equals_that_of_keras_rnn(
    x, zero_output_for_mask, go_backwards, return_sequences
):
    arguments = {
        "zero_output_for_mask": zero_output_for_mask,
        "go_backwards": go_backwards,
        "return_sequences": return_sequences,
        "return_state": True,
    }
    cell = ntm_cell()
    plain = keras.layers.RNN(cell, **arguments)
    ours = keras_memory.MemoryRNN(cell, **arguments)
    expected, *expected_states = plain(x, mask=holes())
    output, *states = ours(x, mask=holes())
    close(output, expected)
    for state, expected_state in zip(states, expected_states):
        close(state, expected_state)


@pytest.mark.parametrize("go_backwards", [False, True])
def test_unrolling_does_not_change_masked_outputs(x, go_backwards):
    cell = ntm_cell()
    expected, output = (
        keras_memory.MemoryRNN(
            cell,
            return_sequences=True,
            go_backwards=go_backwards,
            unroll=unroll,
        )(x, mask=holes())
        for unroll in (False, True)
    )
    close(output, expected)


def test_a_row_without_any_valid_step_keeps_its_initial_state(x):
    mask = np.ones((BATCH, TIME), bool)
    mask[1] = False
    layer = ntm(return_state=True)
    output, *states = layer(x, mask=mask)
    close(output[0], layer(x)[0][0])
    close(output[1], np.zeros((TIME, 2)), 0)
    for state, initial in zip(states, layer.cell.get_initial_state(BATCH)):
        close(state[1], initial[1], 0)
        assert differ(state[0], initial[0])
    last = ntm(return_sequences=False)
    last.build(x.shape)
    last.cell.set_weights(layer.cell.get_weights())
    close(last(x, mask=mask)[0], output[0, -1])
    close(last(x, mask=mask)[1], np.zeros(2), 0)


def test_masks_of_other_types_and_shapes_are_accepted(x):
    layer = ntm()
    expected = layer(x, mask=holes())
    assert differ(expected, layer(x))
    close(layer(x, mask=ops.convert_to_tensor(holes())), expected, 0)
    close(layer(x, mask=holes()[:, :, None]), expected, 0)
    close(layer(x, mask=holes().astype("int32")), expected, 0)
    close(layer(x, mask=holes().astype("float32")), expected, 0)


@pytest.mark.parametrize("loop", ["fast", "portable"])
@pytest.mark.parametrize(
    "make",
    [
        slow_unless(name in ("ntm", "dnc"), make)
        for name, make in (
            ("ntm", lambda **k: ntm(**k)),
            ("dnc", lambda **k: dnc(**k)),
            *(
                (name, functools.partial(ntm, controller=name))
                for name in controllers.CELLS
            ),
        )
    ],
)
def test_masked_inputs_reach_no_gradient(x, make, loop):
    harness.skip_on("numpy", because="not applicable: no gradients here")
    if loop == "fast":
        harness.skip_on("torch", because="no: the fast loop is not run here")
    layer = make(loop=loop)
    layer.build(x.shape)

    def loss(inputs):
        return ops.sum(layer(inputs, mask=holes(), training=True) ** 2)

    poison = np.resize([np.nan, np.inf, -3e38], x.shape)
    poisoned = np.where(holes()[:, :, None], x, poison).astype("float32")
    expected = harness.gradient(loss, np.where(holes()[:, :, None], x, 0))
    close(harness.gradient(loss, poisoned), expected, 0)
    assert not expected[~holes()].any()
    if harness.BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(poisoned)
        for gradient in tape.gradient(value, layer.trainable_weights):
            assert np.isfinite(gradient).all()


def test_a_model_passes_masks_on_beside_initial_states(x):
    """Keras itself passes masks only to layers with one input tensor."""
    layer = ntm(return_sequences=False)
    entry = keras.Input((TIME, WIDTH))
    layer.build((None, TIME, WIDTH))
    entries = [keras.Input((size,)) for size in layer.cell.state_size]
    masked = keras.layers.Masking()(entry)
    model = keras.Model([entry, *entries], layer(masked, initial_state=entries))
    states = layer.cell.get_initial_state(BATCH)
    x[:, 4:] = 0
    close(model([ops.convert_to_tensor(x), *states]), layer(x[:, :4]))
    # The mask must survive the cast from integers to floats.
    whole = ops.convert_to_tensor(np.round(3 * x).astype("int32"))
    backend.set_keras_mask(whole, ops.any(whole != 0, axis=-1))
    close(
        layer(whole, initial_state=states),
        layer(whole[:, :4], initial_state=states),
    )
    inside = keras_memory.trace(layer, whole)
    held = inside["memory"]
    close(held[:, 4:], np.repeat(held[:, 3:4], TIME - 4, axis=1), 0)


@needs_tensorflow
def test_no_gradient_flows_into_masked_steps(x):
    import tensorflow as tf

    layer = ntm()
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, mask=tf.constant(holes())) ** 2)
    gradient = ops.convert_to_numpy(tape.gradient(loss, inputs))
    seen = np.abs(gradient).max(-1) > 0
    assert (seen == holes()).all()


# Nested controllers.


def test_a_prebuilt_controller_keeps_its_weights(x):
    controller = keras.layers.LSTMCell(13)
    controller.build((None, WIDTH + 3))
    before = list(controller.weights)
    values = controller.get_weights()
    layer = ntm(controller=controller)
    layer(x)
    assert layer.cell.block_controllers[0] is controller
    assert len(controller.weights) == len(before)
    for weight, other in zip(controller.weights, before):
        assert weight is other
    for value, other in zip(controller.get_weights(), values):
        close(value, other, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.GRUCell(13, recurrent_dropout=0.25),
        lambda: keras.layers.StackedRNNCells(
            [keras.layers.LSTMCell(7), cells.DenseCell(13)]
        ),
        lambda: ntm_cell(controller="rnn"),
    ],
    ids=["cell", "stack", "memory"],
)
def test_a_given_controller_survives_saving(make, x, tmp_path):
    model = keras.Sequential(
        [keras.Input((None, WIDTH)), ntm(controller=make())]
    )
    model.set_weights([0.9 * w + 0.1 for w in model.get_weights()])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights)
    close(loaded(x), model(x), 0)


def test_constant_start_uses_the_initial_state_of_the_controller(x):
    class Warm(toy.PlainCell):
        def get_initial_state(self, batch_size=None):
            return ops.full((batch_size, self.units), 0.75)

    for start, expected in (("constant", 0.75), (0.25, 0.25)):
        layer = ntm(controller=Warm(13), initial_controller_state=start)
        layer.build(x.shape)
        state = layer.cell.get_initial_state(batch_size=BATCH)[-1]
        close(state, np.full((BATCH, 13), expected), 0)
    stack = keras.layers.StackedRNNCells([keras.layers.LSTMCell(3), Warm(13)])
    layer = ntm(controller=stack)
    layer.build(x.shape)
    states = layer.cell.get_initial_state(batch_size=BATCH)
    assert [state.shape[-1] for state in states[-3:]] == [3, 3, 13]
    close(states[-1], np.full((BATCH, 13), 0.75), 0)
    close(states[-2], np.zeros((BATCH, 3)), 0)


def test_controller_outputs_and_states_are_clipped(x):
    options = {"controller": "lstm", "return_state": True}
    free = ntm(**options)
    one = x[:, :1]
    *_, h, c = free(one)
    bound, state_bound = 0.05, 0.02
    assert np.abs(ops.convert_to_numpy(h)).max() > bound
    clipped = ntm(
        controller_clip=bound, controller_state_clip=state_bound, **options
    )
    clipped.build(x.shape)
    clipped.cell.set_weights(free.cell.get_weights())
    inside = keras_memory.trace(clipped, one)
    close(inside["controller_output"][:, 0], ops.clip(h, -bound, bound))
    *_, clipped_h, clipped_c = clipped(one)
    close(clipped_h, ops.clip(h, -state_bound, state_bound))
    close(clipped_c, ops.clip(c, -state_bound, state_bound))


# Errors and empty batches.


def dnc(**kwargs):
    sizes = {"memory_slots": 5, "slot_size": 3, "controller_units": 7}
    return keras_memory.DNCLayer(
        2, **{**sizes, "return_sequences": True, **kwargs}
    )


@needs_tensorflow
@pytest.mark.parametrize(
    ("make", "unroll"),
    [(ntm, False), (ntm, True), (dnc, True), slow_unless(False, dnc, False)],
)
def test_an_empty_batch_gives_empty_outputs(make, unroll):
    import tensorflow as tf

    layer = make(unroll=unroll, return_state=True)
    layer.build((None, 3, WIDTH))

    @tf.function
    def call(x):
        with tf.GradientTape() as tape:
            output, *_ = layer(x, training=True)
            loss = tf.reduce_sum(output)
        return tape.gradient(loss, layer.trainable_weights)

    @tf.function
    def infer(x):
        return layer(x, mask=tf.ones((0, 3), "bool"))

    x = np.zeros((0, 3, WIDTH), "float32")
    for output, *states in (layer(x), infer(x)):
        assert output.shape == (0, 3, 2)
        assert [s.shape for s in states] == [
            (0, size) for size in layer.cell.state_size
        ]
    for weight, gradient in zip(layer.trainable_weights, call(x)):
        close(gradient, np.zeros(weight.shape), 0)
    if not unroll:
        model = keras.Sequential([keras.Input((3, WIDTH)), make()])
        assert model.predict_on_batch(x).shape == (0, 3, 2)


WRONG = {
    "text": np.full((BATCH, TIME, WIDTH), "a"),
    "bool": np.ones((BATCH, TIME, WIDTH), "bool"),
    "complex": np.ones((BATCH, TIME, WIDTH), "complex64"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_sequences_other_than_real_numbers_are_refused(kind, x):
    """Under XLA they would crash the process."""
    if kind == "text":
        harness.skip_on("jax", "torch", "numpy", because="no text here")
    for layer in (ntm(), dnc()):
        with pytest.raises(ValueError, match="`sequences` must be .* real num"):
            layer(WRONG[kind])
        with pytest.raises(ValueError, match="`inputs` must be .* real number"):
            keras_memory.trace(layer, WRONG[kind])
    if harness.BACKEND == "tensorflow":
        import tensorflow as tf

        layer = ntm()
        layer.build(x.shape)
        wrong = tf.constant(WRONG[kind])
        with pytest.raises(ValueError, match="`sequences` must be .* real num"):
            tf.function(lambda x: layer(x), jit_compile=True)(wrong)


def test_integer_sequences_are_cast_to_floats(x):
    layer = ntm()
    whole = np.round(3 * x)
    close(layer(whole.astype("int32")), layer(whole))


def test_wrong_initial_states_are_refused_when_a_model_is_made(x):
    layer, other = ntm(return_state=True), ntm(memory_slots=13)
    entry = keras.Input((TIME, WIDTH))
    output, *states = layer(entry)
    for wrong in (
        [output, *states],
        states[:-1],
        [keras.Input((size,)) for size in (3, 39, 13, 13, 13, 13)],
        [
            keras.Input((size,), dtype="bool")
            for size in (3, 33, 11, 11, 13, 13)
        ],
        layer.cell.unpack_state(layer.cell.get_initial_state(BATCH)),
    ):
        with pytest.raises(ValueError, match="`initial_state.*Received: "):
            layer(entry, initial_state=wrong)
    with pytest.raises(ValueError, match="`initial_state` must be 6 states of"):
        other(entry, initial_state=states)
    keras.Model(entry, layer(entry, initial_state=states)[0])


def test_a_cell_refuses_wrong_inputs_and_states(x):
    cell = ntm_cell()
    cell.build((BATCH, WIDTH))
    states = cell.get_initial_state(BATCH)
    step = x[:, 0]
    for wrong in (x, step[:, :3], step.astype("complex64"), step > 0):
        with pytest.raises(ValueError, match="`inputs` must be an array .bat"):
            cell(wrong, states)
    for wrong in (None, [], states[:2], cell.get_initial_state(BATCH + 1)):
        with pytest.raises(ValueError, match="`states` must be 6 states of"):
            cell(step, wrong)
    with pytest.raises(ValueError, match="`states` must be 6 states of"):
        cell(step)
    record = cell.unpack_state(states)
    one = cell.unpack_state(cell.get_initial_state(1))
    with pytest.raises(ValueError, match="`memory` must be .*batch=2"):
        cell.pack_state(record._replace(memory=one.memory))
    with pytest.raises(ValueError, match="`memory` must be .*real numbers"):
        cell.pack_state(record._replace(memory=None))


def test_trace_of_a_stateful_layer_refuses_another_batch_size(x):
    layer = ntm(stateful=True)
    layer(x)
    with pytest.raises(ValueError, match="`initial_state` must .*batch of 1"):
        keras_memory.trace(layer, x[:1])


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((BATCH, TIME + 1), "bool"),
        np.ones((BATCH, TIME, 2), "bool"),
        np.ones(BATCH, "bool"),
        np.full((BATCH, TIME), "yes"),
        np.ones((BATCH, TIME), "complex64"),
    ],
)
def test_wrong_masks_are_refused(x, mask):
    with pytest.raises((ValueError, TypeError), match="`mask` must be|type"):
        ntm()(x, mask=mask)


@needs_tensorflow
def test_time_loop_reports_training_after_a_validation(x):
    layer = ntm()
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layer])
    model(x)
    assert layer.time_loop.startswith("portable")
    model.compile("sgd", "mse")
    y = np.zeros((BATCH, TIME, 2), "float32")
    model.fit(x, y, validation_data=(x, y), verbose=0)
    assert layer.time_loop == "fast"


@needs_tensorflow
def test_the_portable_loop_compiles_for_an_unknown_batch_size(x):
    model = keras.Sequential([ntm(loop="portable")])
    model.compile("sgd", "mse", jit_compile=True)
    sizes = [len(part) for part in (x, x[:1])]
    assert sizes[0] != sizes[1]  # a smaller last batch
    both = np.concatenate([x, x[:1]])
    y = np.zeros((len(both), TIME, 2), "float32")
    losses = model.fit(both, y, batch_size=len(x), verbose=0).history["loss"]
    assert np.isfinite(losses).all()


def test_jax_refuses_steps_that_change_variables(x):
    if keras.backend.backend() != "jax":
        pytest.skip("the other backends run them")
    controller = keras.Sequential(
        [keras.layers.Dense(5), keras.layers.Dropout(0.3)]
    )
    with pytest.raises(NotImplementedError, match="controller_dropout"):
        ntm(controller=controller)(x, training=True)


# Dropout: one mask per sequence.


def silent_cell(**kwargs):
    return keras_memory.MemoryCell(
        accesses=[Silent()],
        **{
            "units": None,
            "controller": "dense",
            "controller_units": 13,
            "controller_layers": 2,
            "controller_dropout": 0.5,
            "seed": 3,
            **kwargs,
        },
    )


def in_memory_rnn():
    return keras_memory.MemoryRNN(silent_cell(), return_sequences=True)


def in_keras_rnn():
    return keras.layers.RNN(silent_cell(), return_sequences=True)


def in_a_stack():
    return keras.layers.RNN(
        keras.layers.StackedRNNCells(
            [silent_cell(), silent_cell(units=7, seed=5)]
        ),
        return_sequences=True,
    )


def in_a_controller():
    return keras_memory.MemoryRNN(
        silent_cell(controller=silent_cell(units=7)), return_sequences=True
    )


@pytest.mark.parametrize(
    ("how", "make"),
    [
        slow_unless(
            # XLA compiles the same graph, and Keras's loop like ours: the
            # combinations without a case here are slow and teach little.
            how == "eager"
            or (how == "jit" and make in (in_memory_rnn, in_a_controller))
            or (how == "graph" and make in (in_keras_rnn, in_a_stack)),
            how,
            make,
        )
        for how in ("eager", "graph", "jit")
        for make in (in_memory_rnn, in_keras_rnn, in_a_stack, in_a_controller)
    ],
)
def test_all_steps_share_one_dropout_mask(make, how):
    if how != "eager":
        harness.skip_on(*harness.OTHERS, because="uses tf.function")
    layer = make()
    constant = np.ones((BATCH, TIME, WIDTH), "float32")
    layer.build(constant.shape)
    for weight in layer.trainable_weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1)

    def call(training):
        return layer(constant, training=training)

    if how != "eager":
        import tensorflow as tf

        call = tf.function(call, jit_compile=how == "jit")
    still, first, second = call(False), call(True), call(True)
    for output in (still, first, second):
        for time in range(1, TIME):
            close(output[:, time], output[:, 0])
    assert differ(first, second), "the same mask for two sequences"
    assert differ(first, still)
    assert differ(first[0], first[1]), "the same mask for two rows"
    close(call(False), still, 0)
    close(still[0], still[1], 1e-6)


@pytest.mark.parametrize("implementation", [1, 2])
def test_dropout_equals_that_of_a_loop_over_the_cell(x, implementation):
    def make():
        controller = keras.layers.LSTMCell(
            13,
            dropout=0.3,
            recurrent_dropout=0.5,
            seed=3,
            implementation=implementation,
        )
        layer = ntm(controller=controller, kernel_initializer="ones")
        layer.build(x.shape)
        layer.cell.set_weights([0.1 + 0 * w for w in layer.cell.get_weights()])
        return layer

    output = make()(x, training=True)
    cell = make().cell
    states = cell.get_initial_state(batch_size=BATCH)
    cell.get_dropout_mask(x[:, 0])
    cell.get_recurrent_dropout_mask(states[0])
    for time in range(TIME):
        expected, states = cell(x[:, time], states, training=True)
        close(output[:, time], expected)
    assert differ(output, make()(x))


def test_a_cell_draws_and_resets_masks_of_all_its_controllers(x):
    both = keras.layers.SimpleRNNCell(7, dropout=0.5, recurrent_dropout=0.25)
    dense = cells.DenseCell(11, dropout=0.5)
    last = keras.layers.SimpleRNNCell(13, recurrent_dropout=0.25)
    stack = keras.layers.StackedRNNCells([both, dense, last])
    layer = ntm(controller=stack, slot_size=3, read_heads=2)
    layer.build(x.shape)
    cell = layer.cell
    cell.get_dropout_mask(x[:, 0])
    cell.get_recurrent_dropout_mask(np.zeros((BATCH, 6), "float32"))
    assert both._dropout_mask.shape == (BATCH, WIDTH + 6)
    assert dense._dropout_mask.shape == (BATCH, 7)
    assert last._dropout_mask is None
    assert both._recurrent_dropout_mask.shape == (BATCH, 7)
    assert last._recurrent_dropout_mask.shape == (BATCH, 13)
    cell.reset_dropout_mask()
    assert both._dropout_mask is None and dense._dropout_mask is None
    assert both._recurrent_dropout_mask is not None
    cell.reset_recurrent_dropout_mask()
    assert both._recurrent_dropout_mask is None
    assert last._recurrent_dropout_mask is None


def test_each_block_has_its_own_dropout_mask(x):
    layer = toy.ToyLayer(3, controller_units=7, controller_dropout=0.5)
    layer.build(x.shape)
    layer.cell.get_dropout_mask(x[:, 0])
    first, second = layer.cell.block_controllers
    assert first._dropout_mask.shape == (BATCH, WIDTH + 3)
    assert second._dropout_mask.shape == (BATCH, 7 + 3)


def test_dropout_masks_do_not_outlive_the_sequence(x):
    layer = ntm(controller_dropout=0.5, controller_layers=2)
    layer(x, training=True)
    for cell in layer.cell.block_controllers[0].cells:
        assert cell._dropout_mask is None
    other_batch = np.concatenate([x, x, x])
    assert layer(other_batch, training=True).shape == (6, TIME, 2)


def test_trace_draws_its_own_dropout_masks(x):
    layer = ntm(controller_dropout=0.5)
    first = keras_memory.trace(layer, x, training=True)
    second = keras_memory.trace(layer, x, training=True)
    assert differ(first["output"], second["output"])
    # The trace leaves no mask in the layer.
    other_batch = np.concatenate([x, x, x])
    assert layer(other_batch, training=True).shape == (6, TIME, 2)


# Steps without side effects: TensorFlow runs the first one twice.


def test_a_call_does_not_change_the_layer(x):
    layer = ntm(controller_layers=2, read_heads=2)
    layer.build(x.shape)
    access = layer.cell.accesses[0]
    names = set(vars(layer.cell))
    attributes = dict(vars(access))
    weights = layer.cell.get_weights()
    first = layer(x)
    layer(x[:, :3], mask=np.ones((BATCH, 3), bool))
    close(layer(x), first, 0)
    assert set(vars(layer.cell)) == names
    assert vars(access).keys() == attributes.keys()
    assert all(vars(access)[name] is attributes[name] for name in attributes)
    for value, before in zip(layer.cell.get_weights(), weights):
        close(value, before, 0)


# dtype


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16", "float64"])
def test_sublayers_and_states_follow_the_dtype_policy(x, policy):
    skip_where_the_dtype_is_missing(policy)
    layer = ntm(
        controller="gru",
        controller_layers=2,
        stateful=True,
        return_state=True,
        dtype=policy,
    )
    output, *states = layer(x)
    for sublayer in layer._flatten_layers():
        assert sublayer.dtype_policy.name == policy, sublayer
    two_blocks = toy.ToyLayer(3, controller_units=7, dtype=policy)
    for controller in two_blocks.cell.block_controllers:
        assert controller.dtype_policy.name == policy
    for value in (output, *states):
        assert backend.standardize_dtype(value.dtype) == layer.compute_dtype
    for state in layer.states:
        assert backend.standardize_dtype(state.dtype) == layer.variable_dtype
    initial = layer.cell.get_initial_state(batch_size=BATCH)
    for state in initial:
        assert backend.standardize_dtype(state.dtype) == layer.compute_dtype


@pytest.mark.parametrize(
    ("policy", "wide"),
    [
        ("mixed_bfloat16", "float32"),
        ("mixed_float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_the_access_never_computes_in_16_bits(x, policy, wide):
    skip_where_the_dtype_is_missing(policy)
    seen = set()

    class Watched(Silent):
        def step(self, interface, state):
            for value in keras.tree.flatten((interface, state)):
                seen.add(backend.standardize_dtype(value.dtype))
            return super().step(interface, state)

    cell = keras_memory.MemoryCell(3, accesses=[Watched()], dtype=policy)
    layer = keras_memory.MemoryRNN(cell, dtype=policy)
    layer(x)
    assert seen == {wide}


def test_initial_values_have_the_precision_of_the_dtype(x):
    skip_where_the_dtype_is_missing("float64")
    layer = ntm(
        dtype="float64",
        initial_memory=0.1,
        initial_reads=0.2,
        initial_weighting=0.3,
        initial_controller_state=0.4,
    )
    layer.build(x.shape)
    record = layer.cell.unpack_state(layer.cell.get_initial_state(1))
    for value, number in zip(
        keras.tree.flatten(record), [0.2, 0.1, 0.3, 0.3, 0.4, 0.4]
    ):
        close(value, np.full(value.shape, number), 0)


# States: flat outside, named inside.


def test_pack_state_inverts_unpack_state(x):
    layer = ntm(read_heads=2, return_state=True)
    _, *states = layer(x)
    record = layer.cell.unpack_state(states)
    assert type(record) is keras_memory.NTMState
    shapes = {
        name: tuple(value.shape)
        for name, value in record._asdict().items()
        if name != "controller"
    }
    assert shapes == {
        "reads": (BATCH, 2, 3),
        "memory": (BATCH, 11, 3),
        "read_weighting": (BATCH, 2, 11),
        "write_weighting": (BATCH, 1, 11),
    }
    as_numpy = keras.tree.map_structure(ops.convert_to_numpy, record)
    for state, other in zip(layer.cell.pack_state(as_numpy), states):
        close(state, other, 0)
    packed = layer.cell.pack_state(
        keras.tree.map_structure(lambda value: value.astype("int32"), as_numpy)
    )
    assert all(
        backend.standardize_dtype(state.dtype) == "float32" for state in packed
    )
    # Slots come last in the flat memory.
    close(record.memory[:, 1], states[1][:, 1::11], 0)


def test_wrong_numbers_or_orders_of_states_are_refused(x):
    layer = ntm(return_state=True)
    _, *states = layer(x)
    sizes = r"6 states.*\[3, 33, 11, 11, 13, 13\]"
    wrong = {
        f"{sizes}.*Received: 5 states": states[:-1],
        f"{sizes}.*Received: 0 states": [],
        f"{sizes}.*Received: 7 states": [*states, states[0]],
        sizes + r".*Received.*\(2, 13\).*\(2, 3\)": states[::-1],
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            layer.cell.unpack_state(bad)
        with pytest.raises(ValueError, match=message):
            layer(x, initial_state=bad)
        with pytest.raises(ValueError, match=message):
            keras_memory.trace(layer, x, initial_state=bad)


@pytest.mark.parametrize(
    "bend",
    [
        lambda state: state[0],
        lambda state: state[None],
        lambda state: state[:1],
        lambda state: np.concatenate([state, state]),
    ],
    ids=["no batch axis", "one axis more", "batch too small", "too large"],
)
def test_initial_states_of_another_batch_or_rank_are_refused(x, bend):
    layer = ntm(return_state=True)
    _, *states = layer(x)
    bad = [bend(ops.convert_to_numpy(state)) for state in states]
    with pytest.raises(ValueError, match="states.*Received: "):
        layer(x, initial_state=bad)


def test_state_records_of_wrong_shape_are_refused(x):
    layer = ntm(return_state=True)
    _, *states = layer(x)
    cell = layer.cell
    record = cell.unpack_state(states)
    short = record._replace(reads=np.zeros((BATCH, 1, 4)))
    with pytest.raises(ValueError, match=r"`reads`.*1, 3\).*\(2, 1, 4\)"):
        cell.pack_state(short)
    hidden = record.controller[0][1]
    bent = record._replace(controller=([hidden, hidden[:, :5]],))
    with pytest.raises(ValueError, match=r"`controller_1`.*13\).*\(2, 5\)"):
        cell.pack_state(bent)
    with pytest.raises(ValueError, match="6 tensors.*Received: 4 tensors"):
        cell.pack_state(record._replace(controller=()))


# What is refused.


NOT_SEQUENCES = pytest.mark.parametrize(
    "shape", [(2, 5), (2, 3, 7, 5), (2, 0, 5)], ids=["2D", "4D", "no steps"]
)
WHAT_SEQUENCES_ARE = r"\(batch, time, width\).*reshape.*Received"


@NOT_SEQUENCES
def test_inputs_that_are_not_sequences_are_refused(shape):
    with pytest.raises(ValueError, match=WHAT_SEQUENCES_ARE):
        ntm()(np.zeros(shape, "float32"))
    layer = ntm()
    layer(np.zeros((2, 3, 5), "float32"))
    with pytest.raises(ValueError, match=WHAT_SEQUENCES_ARE):
        layer(np.zeros(shape, "float32"))


@NOT_SEQUENCES
def test_trace_refuses_inputs_that_are_not_sequences(shape):
    layer = ntm()
    layer(np.zeros((2, 3, 5), "float32"))
    with pytest.raises(ValueError, match=WHAT_SEQUENCES_ARE):
        keras_memory.trace(layer, np.zeros(shape, "float32"))


@NOT_SEQUENCES
def test_symbolic_inputs_that_are_not_sequences_are_refused(shape):
    with pytest.raises(ValueError, match=WHAT_SEQUENCES_ARE):
        ntm()(keras.Input(shape[1:]))


def test_an_unknown_input_width_is_refused():
    with pytest.raises(ValueError, match=r"width.*known.*\(None, None\)"):
        ntm()(keras.Input((None, None)))


def test_an_unbuilt_cell_has_no_initial_state():
    cell = ntm_cell(name="bare")
    with pytest.raises(ValueError, match="NTMCell 'bare' must be built"):
        cell.get_initial_state(batch_size=BATCH)


@pytest.mark.parametrize("cell", [keras.layers.LSTMCell(3), "lstm"])
def test_memory_rnn_refuses_other_cells(cell, x):
    with pytest.raises((TypeError, ValueError), match="`?cell`? .*Received"):
        keras_memory.MemoryRNN(cell)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("units", [0, -1, 2.0, "3"]),
        ("units", [True]),
        ("controller_clip", [0, -1.0, NAN]),
        ("controller_clip", ["1"]),
        ("controller_state_clip", [0.0, NAN]),
        ("clip_value", [0, -2, NAN]),
        ("controller_units", [0, 2.0]),
        ("controller_layers", [0, 1.0]),
        ("controller_dropout", [1.0, -0.5, NAN]),
        (
            "initial_controller_state",
            ["zeros", None, True, NAN, float("inf"), [0.0]],
        ),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_memory_cell_are_refused(name, values):
    for value in values:
        arguments = {"units": 3, "accesses": [Silent()], name: value}
        with pytest.raises(ValueError) as error:
            keras_memory.MemoryCell(**arguments)
        assert f"`{name}`" in str(error.value)
        assert f"Received: {name}={value!r}" in str(error.value)


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="NTMLayer has no argument `read_head`"):
        ntm(read_head=2)
    with pytest.raises(TypeError, match="memory_slots"):
        keras_memory.MemoryRNN(ntm_cell(), memory_slots=3)


def test_numpy_numbers_are_accepted_as_arguments(x):
    arguments = {
        "clip_value": np.float32(0.5),
        "norm_epsilon": np.float64(0.25),
        "initial_memory": np.float32(0.5),
        "memory_slots": np.int64(11),
        "slot_size": np.int64(3),
        "read_heads": np.int64(2),
        "controller_units": np.int64(13),
    }
    model = keras.Sequential([keras.Input((TIME, WIDTH)), ntm(**arguments)])
    copy = keras.models.model_from_json(model.to_json())
    assert copy.layers[0].get_config() == model.layers[0].get_config()


# trace


def test_trace_builds_an_unbuilt_layer(x):
    inside = keras_memory.trace(ntm(), x)
    assert inside["output"].shape == (BATCH, TIME, 2)
    assert all(type(value) is np.ndarray for value in inside.values())


def test_trace_takes_states_and_keeps_those_of_the_layer(x):
    layer = ntm(stateful=True, return_state=True)
    _, *states = layer(x[:, :4])
    rest = keras_memory.trace(layer, x[:, 4:])
    for state, before in zip(layer.states, states):
        close(state, before, 0)
    output, *final = layer(x[:, 4:])
    close(rest["output"], output)
    layer.reset_state()
    whole = keras_memory.trace(layer, x)
    close(whole["output"][:, 4:], output)
    given = keras_memory.trace(layer, x[:, 4:], initial_state=states)
    close(given["output"], output)
    close(given["memory"][:, -1], layer.cell.unpack_state(final).memory)


def test_trace_goes_backwards_and_holds_masked_steps(x):
    layer = ntm(go_backwards=True)
    close(keras_memory.trace(layer, x)["output"], layer(x))
    inside = keras_memory.trace(layer, x, mask=holes())
    close(inside["output"], layer(x, mask=holes()))
    # Row 0 runs from its end: its steps 6, 4 and 3 are masked.
    memory = inside["memory"][0]
    start = layer.cell.get_initial_state(batch_size=len(x))
    close(memory[0], layer.cell.unpack_state(start).memory[0], 0)
    close(memory[2], memory[1], 0)
    close(memory[3], memory[1], 0)
    assert differ(memory[4], memory[3])


def test_trace_zeroes_masked_outputs_where_the_layer_does(x):
    layer = ntm(zero_output_for_mask=True)
    inside = keras_memory.trace(layer, x, mask=holes())
    close(inside["output"], layer(x, mask=holes()))
    assert not inside["output"][~holes()].any()
    assert inside["memory"][~holes()].any()


def test_trace_refuses_other_layers_cells_and_models(x):
    for layer in (keras.layers.LSTM(3), ntm_cell(), keras.Sequential([ntm()])):
        with pytest.raises(
            TypeError, match="model use `trace_model`. Received: <"
        ):
            keras_memory.trace(layer, x)


# Further batch axes.


def test_the_documented_reshape_handles_further_batch_axes():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(1, 2, 3, 32)).astype("float32")
    layer = ntm()
    output = layer(keras.ops.reshape(x, (-1, *x.shape[-2:])))
    assert output.shape == (2, 3, 2)
    output = ops.reshape(output, (*x.shape[:-1], 2))
    for item in range(2):
        close(output[:, item], layer(x[:, item]))
    close(keras.layers.TimeDistributed(layer)(x), output)


# Two blocks.


@pytest.mark.parametrize("share_memory", [False, True])
def test_two_blocks_match_values_computed_by_hand(share_memory):
    """Each controller sums its inputs. The interface is that sum times
    (1, 2, 3). The access adds the interface to its total and reads it."""
    layer = toy.ToyLayer(
        None,
        share_memory=share_memory,
        controller=keras.layers.Dense(
            1, use_bias=False, kernel_initializer="ones"
        ),
        return_sequences=True,
    )
    layer.build((1, 2, 1))
    for kernel, _ in layer.cell.interfaces:
        kernel.assign([[1.0, 2.0, 3.0]])
    start = np.array([[5.0, 0.0, 0.0], [7.0, 0.0, 0.0]])
    weights = [w for w in layer.cell.weights if w.shape == (3,)]
    weights = [w for w in weights if w.name.startswith("initial")]
    assert len(weights) == (1 if share_memory else 2)
    for weight, value in zip(weights, start):
        weight.assign(value)
    features = ops.convert_to_numpy(layer(np.array([[[1.0], [2.0]]])))[0]
    inside = keras_memory.trace(layer, np.array([[[1.0], [2.0]]]))

    def controller_output(block, time):
        return inside[f"block{block}/controller_output"][0, time]

    key = np.array([1.0, 2.0, 3.0])
    # First step. No reads yet: the first block sees 1.
    seen = 1
    close(controller_output(0, 0), [1.0])
    total = start[0] + seen * key  # 6 2 3
    # The second block sees the first block's output and reads of this step.
    seen = 1 + 6 + 2 + 3
    close(controller_output(1, 0), [12.0])
    other = (total if share_memory else start[1]) + seen * key
    close(features[0], [seen, *other])
    # Second step. The first block sees 2 and the second block's last reads.
    seen = 2 + other.sum()
    close(controller_output(0, 1), [seen])
    total = (other if share_memory else total) + seen * key
    seen = seen + total.sum()
    close(controller_output(1, 1), [seen])
    other = (total if share_memory else other) + seen * key
    close(features[1], [seen, *other])
    # A shared memory is written twice a step.
    assert len(layer.cell.state_size) == (2 if share_memory else 4)


@pytest.mark.parametrize("share_memory", [False, True])
def test_each_block_has_its_own_controller_states(share_memory, x):
    layer = toy.ToyLayer(
        3,
        share_memory=share_memory,
        controller="rnn",
        controller_units=7,
        return_state=True,
    )
    _, *states = layer(x)
    inside = keras_memory.trace(layer, x)
    # The state of a simple recurrent cell is its output.
    after = [state for state in states if state.shape[-1] == 7]
    assert len(after) == 2
    for block, state in enumerate(after):
        close(state, inside[f"block{block}/controller_output"][:, -1])
    assert differ(*after)


@pytest.mark.parametrize("share_memory", [False, True])
def test_trace_shows_the_reads_of_each_block(share_memory, x):
    layer = toy.ToyLayer(3, share_memory=share_memory, controller_units=7)
    inside = keras_memory.trace(layer, x)
    start = ops.convert_to_numpy(layer.cell.get_initial_state(BATCH)[1])
    first, second = (
        {name: inside[f"block{block}/{name}"] for name in ("added", "reads")}
        for block in (0, 1)
    )
    close(first["reads"][:, 0, 0], start + first["added"][:, 0])
    before = first["reads"][:, 0, 0] if share_memory else start
    close(second["reads"][:, 0, 0], before + second["added"][:, 0])


@pytest.mark.parametrize("axes", [2, 3])
def test_a_numeric_mask_acts_like_a_boolean_mask(x, axes):
    layer = ntm(return_sequences=True, return_state=True)
    mask = np.ones((BATCH, TIME), bool)
    mask[0, 2:4] = mask[1, 5:] = False
    expected = layer(x, mask=mask)
    numbers = np.where(mask, [[0.5], [-2.0]], 0.0).astype("float32")
    if axes == 3:
        numbers = numbers[:, :, None]
    for value, one in zip(layer(x, mask=numbers), expected):
        close(value, one, 0)
    if axes == 2:
        for value, one in zip(layer(x, mask=mask.tolist()), expected):
            close(value, one, 0)
    close(keras_memory.trace(layer, x, mask=numbers)["output"], expected[0])


@pytest.mark.parametrize(
    "shape",
    [
        (BATCH,),
        (BATCH, TIME - 1),
        (1, TIME),
        (TIME, BATCH),
        (BATCH, TIME, WIDTH),
        (BATCH, TIME, 1, 1),
    ],
    ids=str,
)
def test_masks_of_wrong_shape_are_refused(shape, x):
    layer = ntm()
    layer.build(x.shape)
    for call in (layer, functools.partial(keras_memory.trace, layer)):
        with pytest.raises(ValueError, match="`mask` must be an array .*Recei"):
            call(x, mask=np.ones(shape, bool))


def test_a_built_layer_refuses_inputs_of_another_width(x):
    layer = ntm()
    layer(x)
    for call in (layer, functools.partial(keras_memory.trace, layer)):
        with pytest.raises(
            ValueError, match="built for inputs of width 5.*Rec"
        ):
            call(x[:, :, 1:])


@pytest.mark.parametrize("widths", [(3, 5), (5, 3)])
def test_blocks_may_have_reads_of_different_widths(widths, x):
    class Cell(keras_memory.MemoryCell):
        def __init__(self):
            accesses = [toy.ToyAccess(width) for width in widths]
            super().__init__(None, accesses, controller_units=7)

    layer = keras_memory.MemoryRNN(Cell())
    assert layer(x).shape == (BATCH, 7 + widths[1])
    without = ops.convert_to_numpy(layer(x, use_memory=False))
    assert (without[:, :7] != 0).all() and (without[:, 7:] == 0).all()


def test_blocks_start_with_different_weights():
    layer = toy.ToyLayer(3, controller_units=7)
    layer.build((BATCH, TIME, WIDTH))
    first, second = (kernel for kernel, _ in layer.cell.interfaces)
    assert first.shape == second.shape
    assert differ(first, second), "two blocks drew the same kernel"


def test_blocks_of_one_seed_drop_different_units():
    layer = toy.ToyLayer(3, controller_units=97, controller_dropout=0.5, seed=3)
    layer.build((BATCH, TIME, 97))
    layer.cell.get_dropout_mask(np.ones((BATCH, 97), "float32"))
    first, second = layer.cell.block_controllers
    assert differ(first._dropout_mask, second._dropout_mask)


def test_an_initializer_without_a_config_is_accepted(x):
    class Constant(keras.initializers.Initializer):
        def __init__(self, value):
            self.value = value

        def __call__(self, shape, dtype=None):
            return ops.full(shape, self.value, dtype=dtype)

    layer = ntm(kernel_initializer=Constant(0.25))
    layer.build(x.shape)
    kernel = layer.cell.interfaces[0][0]
    close(kernel, np.full(kernel.shape, 0.25), 0)


# Requirements of an access.


def access_with(**attributes):
    """A subclass of `ToyAccess` with some attributes replaced."""
    return type("Mine", (toy.ToyAccess,), attributes)


class OnlyReads(NamedTuple):
    reads: Any


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        (
            {"initial_state": OnlyReads(StateSpec((1, 3)))},
            TypeError,
            "`Mine.initial_state` must .* OnlyReads without .'controller'.",
        ),
        (
            {"initial_state": {"reads": StateSpec((1, 3))}},
            TypeError,
            "Received: dict without",
        ),
        (
            {"read_size": 5},
            ValueError,
            "`Mine.read_size` must be .* 3 for .* Received: read_size=5",
        ),
    ],
)
def test_an_invalid_access_is_refused(attributes, error, message):
    with pytest.raises(error, match=message):
        keras_memory.MemoryCell(2, [access_with(**attributes)()])


@pytest.mark.parametrize("result", [None, (1, 2), "text"])
def test_a_step_must_return_a_state_and_a_dict(result):
    access = access_with(step=lambda self, interface, state: result)()
    layer = keras_memory.MemoryRNN(keras_memory.MemoryCell(2, [access]))
    with pytest.raises(TypeError, match="`Mine.step` must return"):
        layer(np.ones((2, 3, 5), "float32"))


def fields(**values):
    """An access dataclass with further fields."""
    kinds = [(name, Any, value) for name, value in values.items()]
    return dataclasses.make_dataclass(
        "Mine", kinds, bases=(toy.ToyAccess,), frozen=True
    )


@pytest.mark.parametrize(
    "name", ["activation", "step", "layout", "interfaces", "num_layers"]
)
def test_a_field_named_like_an_attribute_is_refused(name):
    with pytest.raises(TypeError, match=f"Mine must not have a field `{name}`"):

        class Cell(keras_memory.MemoryCell, access=fields(**{name: 3})):
            pass

        Cell(2)


def test_fields_need_plain_defaults_or_no_default():
    factory = dataclasses.field(default_factory=list)
    with pytest.raises(TypeError, match="Received: `sizes` with a"):

        class Cell(keras_memory.MemoryCell, access=fields(sizes=factory)):
            pass

    depth = ("depth", int, dataclasses.field(kw_only=True))
    access = dataclasses.make_dataclass(
        "Mine", [depth], bases=(toy.ToyAccess,), frozen=True
    )

    class NeedsDepth(keras_memory.MemoryCell, access=access):
        pass

    assert NeedsDepth(2, depth=4).depth == 4
    with pytest.raises(TypeError, match="NeedsDepth: missing .* 'depth'"):
        NeedsDepth(2)
    parameters = inspect.signature(NeedsDepth).parameters
    assert parameters["depth"].annotation is int


# Signatures list every argument, for readers and editors.


def test_the_signature_lists_the_arguments_of_cell_and_layer():
    parameters = inspect.signature(keras_memory.NTMLayer).parameters
    names = list(parameters)
    assert names[:5] == [
        "units",
        "memory_slots",
        "slot_size",
        "read_heads",
        "write_heads",
    ]
    of_cell = inspect.signature(keras_memory.NTMCell.__init__).parameters
    of_base = inspect.signature(keras_memory.MemoryCell.__init__).parameters
    of_rnn = inspect.signature(keras_memory.MemoryRNN.__init__).parameters
    expected = {*of_cell, *of_base, *of_rnn} - {"self", "args", "accesses"}
    assert set(names) == expected
    assert len(names) == len(set(names)) and len(names) > 30
    for name in ("return_sequences", "stateful"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    "layer", [keras_memory.NTMLayer, keras_memory.DNCLayer]
)
def test_layer_and_cell_have_the_same_arguments(layer):
    """The layer lists them for editors; the cell takes them as a dataclass."""
    found = {**inspect.signature(layer).parameters}
    of_cell = serialization.init_parameters(layer.cell_class)
    of_rnn = serialization.init_parameters(keras_memory.MemoryRNN)
    expected = {**of_rnn, **of_cell}
    del expected["accesses"], found["kwargs"]
    assert {n: (p.default, p.kind) for n, p in found.items()} == {
        n: (p.default, p.kind) for n, p in expected.items()
    }


@pytest.mark.parametrize(
    "layer", [keras_memory.NTMLayer, keras_memory.DNCLayer]
)
def test_the_help_documents_each_argument(layer):
    text = layer.__doc__
    for name in inspect.signature(layer).parameters:
        pattern = rf"^        ([\w*]+, )*(\*\*)?{name}(, \w+)*: "
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1, name
    assert (
        text.index("Args:") < text.index("recompute:") < text.index("Raises:")
    )


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["NTMLayer", "DNCLayer", "MemoryWrapLayer"])
def test_editors_complete_the_arguments(layer):
    """Jedi reads the source without running it."""
    jedi = pytest.importorskip("jedi")
    root = pathlib.Path(keras_memory.__file__).parents[1]
    project = jedi.Project(root, environment_path=sys.prefix)
    source = f"import keras_memory\nkeras_memory.{layer}("
    script = jedi.Script(source, path=root / "new.py", project=project)
    completed = {found.name for found in script.complete()}
    expected = {*inspect.signature(getattr(keras_memory, layer)).parameters}
    assert {f"{name}=" for name in expected - {"kwargs"}} <= completed


def test_the_first_arguments_may_be_positional():
    layer = keras_memory.NTMLayer(3, 11, 5)
    cell = layer.cell
    assert (cell.units, cell.memory_slots, cell.slot_size) == (3, 11, 5)
    layer = keras_memory.NTMLayer(3, 11, 5, 2, 4)
    config = layer.get_config()
    assert (config["read_heads"], config["write_heads"]) == (2, 4)
    with pytest.raises(TypeError, match="^NTMLayer: too many positional"):
        keras_memory.NTMLayer(3, 11, 5, 2, 4, "gru")


# Regularizers, constraints and custom objects work as in Keras's layers.


def test_regularizer_and_constraint_apply_to_the_kernels(x, tmp_path):
    layer = ntm(
        kernel_regularizer=keras.regularizers.L2(0.25),
        kernel_constraint="non_neg",
    )
    layer.build(x.shape)
    kernels = [kernel for kernel, _ in layer.cell.interfaces]
    kernels.append(layer.cell.output_projection[0])
    expected = sum(0.25 * ops.sum(kernel**2) for kernel in kernels)
    close(sum(layer.losses), expected)
    if not harness.TRAINS:
        return
    entry = keras.Input(x.shape[1:])
    model = keras.Model(entry, layer(entry))
    model.compile("sgd", "mse")
    model.fit(x, np.ones(model(x).shape), verbose=0)
    for kernel in kernels:
        values = ops.convert_to_numpy(kernel)
        assert values.min() == 0.0 and values.max() > 0.0
    assert ops.convert_to_numpy(layer.cell.interfaces[0][1]).min() < 0.0
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").layers[-1]
    assert isinstance(again.kernel_regularizer, keras.regularizers.L2)
    assert isinstance(again.kernel_constraint, keras.constraints.NonNeg)


def test_a_layer_is_restored_with_custom_objects():
    class Shifted(keras.initializers.Zeros):
        def __call__(self, shape, dtype=None):
            return 1.0 + super().__call__(shape, dtype)

    layer = ntm(kernel_initializer=Shifted(), controller=toy.PlainCell(7))
    config = json.loads(json.dumps(layer.get_config()))
    copy = keras_memory.NTMLayer.from_config(
        config, custom_objects={"Shifted": Shifted}
    )
    assert type(copy.kernel_initializer) is Shifted
    assert type(copy.controller) is toy.PlainCell


# Canaries: private hooks of Keras that this library depends on.


class Recorder(DropoutRNNCell, keras.layers.Layer):
    """Logs the calls of `keras.layers.RNN` on a cell with dropout."""

    state_size = 3
    output_size = 3

    def __init__(self, log):
        super().__init__()
        self.log = lambda entry: log.append(entry)

    def call(self, inputs, states):
        self.log("step")
        return states[0], states

    def get_dropout_mask(self, step_input):
        self.log(("mask", tuple(step_input.shape)))

    def get_recurrent_dropout_mask(self, step_input):
        self.log(("recurrent mask", tuple(step_input.shape)))

    def reset_dropout_mask(self):
        self.log("reset")

    def reset_recurrent_dropout_mask(self):
        self.log("recurrent reset")


@pytest.mark.parametrize("stacked", [False, True])
def test_canary_keras_rnn_makes_and_resets_dropout_masks(x, stacked):
    log = []
    cell = Recorder(log)
    if stacked:
        cell = keras.layers.StackedRNNCells([cell])
    keras.layers.RNN(cell)(x)
    assert log[:2] == [("mask", (BATCH, WIDTH)), ("recurrent mask", (BATCH, 3))]
    assert log[-2:] == ["reset", "recurrent reset"], (
        "keras.layers.RNN no longer asks every DropoutRNNCell for its masks "
        "in front of the time loop, with the first inputs and the first "
        "state, and no longer resets them after it (RNN."
        "_maybe_config_dropout_masks and _maybe_reset_dropout_masks). "
        "MemoryCell overrides those four methods to make the masks of the "
        f"controllers inside. RNN called: {log}"
    )
    assert set(log[2:-2]) == {"step"}


def test_canary_keras_cells_with_dropout_are_dropout_cells():
    for cell in (
        keras.layers.LSTMCell,
        keras.layers.GRUCell,
        keras.layers.SimpleRNNCell,
    ):
        assert issubclass(cell, DropoutRNNCell), (
            f"keras.layers.{cell.__name__} no longer derives from the private "
            "DropoutRNNCell. `controllers.dropout_cells` finds the cells "
            "whose masks are made outside of the time loop by that class."
        )


def test_canary_a_dropout_cell_caches_its_mask():
    cell = keras.layers.LSTMCell(3, dropout=0.5, recurrent_dropout=0.5)
    ones = np.ones((BATCH, 97), "float32")
    for make, reset in (
        (cell.get_dropout_mask, cell.reset_dropout_mask),
        (cell.get_recurrent_dropout_mask, cell.reset_recurrent_dropout_mask),
    ):
        first = make(ones)
        again = make(ones)
        reset()
        other = make(ones)
        assert first is again and differ(first, other), (
            "A Keras RNN cell no longer keeps the dropout mask that "
            "`get_dropout_mask` made until `reset_dropout_mask`. MemoryCell "
            "makes the masks of its controllers through these two, in front "
            "of the time loop."
        )


def test_canary_keras_rnn_calls_inner_loop(x):
    seen = []

    class Probe(keras.layers.RNN):
        def inner_loop(self, *args, **kwargs):
            seen.append((args, kwargs))
            sequences = kwargs["sequences"]
            features = ops.repeat(sequences[:, :, :1], 3, axis=-1)
            states = [ops.ones((BATCH, 3))]
            return features[:, 0] + 1, features, states

    cell = toy.PlainCell(3)
    output, state = Probe(cell, return_sequences=True, return_state=True)(
        x, mask=holes(), training=True
    )
    last = Probe(cell)(x)
    parameters = list(inspect.signature(keras.layers.RNN.inner_loop).parameters)
    message = (
        "keras.layers.RNN.call no longer hands the whole time loop to "
        "`self.inner_loop(sequences=, initial_state=, mask=, training=)` and "
        "takes (last output, outputs, states) back. MemoryRNN.inner_loop "
        "overrides it to run `scan.run` and to project the output once."
    )
    expected = ["sequences", "initial_state", "mask", "training"]
    assert parameters == ["self", *expected], message
    for args, kwargs in seen:
        assert args == () and set(kwargs) == set(expected), message
    assert isinstance(seen[0][1]["initial_state"], list), message
    assert seen[0][1]["mask"] is not None, message
    assert seen[0][1]["training"] is True, message
    assert seen[1][1]["mask"] is None, message
    close(output, x[:, :, :1].repeat(3, axis=-1), 0)
    close(state, np.ones((BATCH, 3)), 0)
    close(last, x[:, 0, :1].repeat(3, axis=-1) + 1, 0)


def test_canary_keras_rnn_creates_state_variables(x):
    batches = []

    class Probe(keras.layers.RNN):
        def _create_state_variables(self, batch_size):
            batches.append(batch_size)
            super()._create_state_variables(batch_size)

    stateful = Probe(toy.PlainCell(3), stateful=True)
    stateful(x)
    stateful(x)
    Probe(toy.PlainCell(3))(x)
    message = (
        "keras.layers.RNN.build no longer makes the states of a stateful "
        "layer, once, by `self._create_state_variables(batch_size)` and keeps "
        "them in `self.states`. MemoryRNN overrides it to make them "
        "non-trainable weights that start at the cell's initial state."
    )
    assert batches == [BATCH], message
    assert stateful.states is not None, message
    assert stateful._expected_batch_size == BATCH, message
    with pytest.raises(ValueError, match="batch size"):
        stateful(x[:1])


def test_canary_backend_rnn_has_the_arguments_in_use(x):
    message = (
        "`keras.src.backend.rnn`, the private time loop of Keras, no longer "
        "has the arguments or the results that `scan.run` uses."
    )
    parameters = list(inspect.signature(backend.rnn).parameters)
    assert parameters[:3] == ["step_function", "inputs", "initial_states"], (
        message
    )
    used = {"go_backwards", "unroll", "input_length", "return_all_outputs"}
    assert used <= set(parameters), message

    def step(inputs, states):
        total = states[0] + inputs[:, :3]
        return total, [total, states[1] + 1]

    start = [ops.zeros((BATCH, 3)), ops.zeros((BATCH, 2, 3))]
    inputs = ops.convert_to_tensor(x)
    totals = np.cumsum(x[:, :, :3], axis=1)
    for all_outputs in (False, True):
        last, outputs, states = backend.rnn(
            step,
            inputs,
            start,
            go_backwards=False,
            unroll=False,
            input_length=TIME,
            return_all_outputs=all_outputs,
        )
        close(last, totals[:, -1], 1e-5)
        if all_outputs:
            close(outputs, totals, 1e-5)
        # States with more than two axes keep their shape.
        close(states[0], totals[:, -1], 1e-5)
        close(states[1], np.full((BATCH, 2, 3), TIME), 0)
    _, outputs, _ = backend.rnn(
        step, inputs, start, go_backwards=True, return_all_outputs=True
    )
    close(outputs, np.cumsum(x[:, ::-1, :3], axis=1), 1e-5)


@pytest.mark.every_backend
def test_canary_no_orthogonal_weights_in_float16():
    harness.skip_on("tensorflow", because="draws them")
    draw = keras.initializers.Orthogonal()
    with pytest.raises((NotImplementedError, TypeError)):
        # If this passes without an error, drop the skips that name this test.
        draw((3, 3), dtype="float16")


def test_canary_layers_tell_whether_call_takes_training():
    assert keras.layers.Dropout(0.5)._call_has_training_arg is True
    assert keras.layers.LSTMCell(3)._call_has_training_arg is True
    assert toy.PlainCell(3)._call_has_training_arg is False, (
        "A Keras layer no longer tells in `_call_has_training_arg` whether "
        "its call takes `training`. `controllers.step` asks it that."
    )


@needs_tensorflow
@pytest.mark.parametrize("make", [ntm, dnc])
def test_a_layer_can_be_passed_to_tf_function(make, x):
    import tensorflow as tf

    layer = make()
    close(tf.function(layer)(x), layer(x), 1e-6)


@needs_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_widths_unknown_to_a_graph_are_checked_when_it_runs(x, jit_compile):
    model = keras.Sequential([keras.Input((None, WIDTH)), ntm()])
    model.compile(jit_compile=jit_compile)
    model.predict(x, verbose=0)
    with pytest.raises(Exception, match=f"width_must_be_{WIDTH}"):
        model.predict(x[:, :, 1:], verbose=0)


def test_a_mask_may_be_a_list(x):
    layer, mask = ntm(), [[True] * (TIME - 1) + [False]] * BATCH
    close(layer(x, mask=mask), layer(x, mask=np.array(mask)), 0)


def test_sequences_of_objects_are_refused_by_name(x):
    with pytest.raises(ValueError, match="`sequences` must be .* real numbers"):
        ntm()(x.astype(object))


def test_a_trace_is_a_dict_with_a_short_repr(x):
    inside = keras_memory.trace(ntm(), x)
    shapes = keras.tree.map_structure(np.shape, dict(inside))
    assert list(shapes) == list(inside)
    assert shapes["memory"] == inside["memory"].shape
    assert f"memory: {shapes['memory']}" in repr(inside)


@pytest.mark.parametrize("stateful", [False, True])
def test_states_are_returned_in_a_tuple(stateful, x):
    """As `keras.layers.LSTM` returns them."""
    layer = ntm(return_state=True, stateful=stateful)
    assert type(layer(x)) is tuple


def test_layers_that_a_model_creates_in_build_are_traced(x):
    class Late(keras.Model):
        def build(self, shape):
            self.memory = ntm()
            self.memory.build(shape)

        def call(self, x):
            return self.memory(x)

    _, traces = keras_memory.trace_model(Late(), x)
    assert [list(one)[0] for one in traces.values()] == ["output"]


@harness.needs_tensorflow
def test_two_threads_can_trace_the_same_model(x):
    meet = threading.Barrier(2)

    class Meet(keras.layers.Layer):
        """Waits until both threads have arrived."""

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

        def call(self, x):
            meet.wait(60)
            return x

    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, Meet()(ntm()(Meet()(inputs))))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(keras_memory.trace_model, model, x) for _ in "12"]
        assert [len(call.result()[1]) for call in calls] == [1, 1]


def test_trace_model_refuses_anything_but_a_model(x):
    for wrong in (None, ntm()):
        with pytest.raises(TypeError, match="`model` must be a Keras model"):
            keras_memory.recurrent.trace_model(wrong, x)
