"""Checks that every layer must pass. Each takes a catalogue case; the checks
of time, state and masks need a case of a recurrent layer."""

import dataclasses
import functools
import inspect
import json
import pathlib
import types

import keras
import numpy as np
import pytest
from keras import ops

import keras_memory

TOLERANCE = 2e-6
GOLDENS = pathlib.Path(__file__).parent / "goldens"
BACKEND = keras.backend.backend()
TRAINS = BACKEND != "numpy"
OTHERS = ("jax", "torch", "numpy")  # than TensorFlow

needs_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="computes in float64, or takes gradients with GradientTape",
)


def skip_on(*backends, because):
    """Skips a check on some backends. The table of docs/guides/backends.md
    shows the reason, which begins with "no", "not run" or "not applicable"."""
    if BACKEND in backends:
        pytest.skip(because)


def on_arrays(module):
    """The functions of a module, taking NumPy arrays: PyTorch does not mix them
    with tensors."""

    def on_tensors(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            return function(
                *(
                    ops.convert_to_tensor(a) if isinstance(a, np.ndarray) else a
                    for a in args
                ),
                **kwargs,
            )

        return call if inspect.isfunction(function) else function

    attributes = vars(module).items()
    return types.SimpleNamespace(
        **{name: on_tensors(value) for name, value in attributes}
    )


def slots_last(memory):
    """Converts a memory between (B, N, W), the layout of `reference.py` and of
    users, and (B, W, N), the layout of a step."""
    return ops.swapaxes(ops.convert_to_tensor(memory), 1, 2)


def act(access, interface, state):
    """`access.step`, with the memory in the layout of users."""
    state = state._replace(memory=slots_last(state.memory))
    state, inside = access.step(interface, state)
    return state._replace(memory=slots_last(state.memory)), inside


def inputs_of(case, seed=3):
    return case.inputs(np.random.default_rng(seed))


def few_inputs_of(case, seed=3):
    return case.few_inputs(np.random.default_rng(seed))


def built(case, **more):
    """A layer with all weights away from their initial values."""
    layer = case.make(**more)
    layer.build(case.input_shape)
    rng = np.random.default_rng(5)
    for weight in getattr(layer, "cell", layer).weights:
        if weight.dtype == "int32":  # labels
            continue
        weight.assign(
            ops.convert_to_numpy(weight)
            + rng.normal(size=weight.shape, scale=0.3)
        )
    return layer


@functools.cache
def ran(case):
    """A built layer, inputs, outputs and states. They are the same in all
    tests, since each test starts with the same seeds."""
    layer = built(case, return_state=True)
    x = inputs_of(case)
    output, *states = layer(x)
    return layer, x, output, states


def like(layer, case, **more):
    """A second layer with other arguments and the same weights."""
    other = case.make(**more)
    other.build(case.input_shape)
    other.cell.set_weights(layer.cell.get_weights())
    return other


def model_of(layer, case):
    inputs = case.entry()
    return keras.Model(inputs, layer(inputs))


def close(actual, expected, tolerance=TOLERANCE):
    actual, expected = map(ops.convert_to_numpy, (actual, expected))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all() and np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def gradient(function, x):
    """Gradient of a scalar by an array; 0 if it is independent of the array."""
    x = ops.convert_to_tensor(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x, unconnected_gradients="zero").numpy()
    if BACKEND == "jax":
        import jax

        return np.asarray(jax.grad(function)(x))
    x.requires_grad_()
    y = function(x)
    if y.requires_grad:
        y.backward()
    return np.zeros_like(x.detach()) if x.grad is None else x.grad.numpy()


def golden(name):
    """Arrays of a reference implementation, its weights by name, and its
    settings."""
    arrays = dict(np.load(GOLDENS / f"{name}.npz"))
    meta = json.loads(str(arrays.pop("__meta__")))
    weights = {
        name[2:]: value
        for name, value in arrays.items()
        if name.startswith("w.")
    }
    return arrays, weights, meta


def config_round_trip(case):
    layer = case.make()
    text = json.dumps(layer.get_config())
    copy = type(layer).from_config(json.loads(text))
    assert json.dumps(copy.get_config()) == text
    config = json.loads(text)
    assert copy.dtype_policy == layer.dtype_policy
    arguments = set(case.kwargs) - {"cell"}
    assert arguments <= set(config), arguments - set(config)


def file_round_trip(case, folder):
    layer = built(case)
    model = model_of(layer, case)
    x = few_inputs_of(case)
    expected = model(x)
    path = folder / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    close(loaded(x), expected, tolerance=0)
    weights = folder / "model.weights.h5"
    model.save_weights(weights)
    fresh = model_of(case.make(), case)
    fresh.load_weights(weights)
    close(fresh(x), expected, tolerance=0)


def clone(case):
    model = model_of(built(case), case)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    x = few_inputs_of(case)
    close(copy(x), model(x), tolerance=0)


def shapes(case):
    x = few_inputs_of(case)
    batch, time, width = x.shape
    for sequences in (True, False):
        layer = case.make(return_sequences=sequences, return_state=True)
        symbolic = layer(keras.Input((None, width)))
        eager = layer(x)
        declared = layer.compute_output_shape((batch, time, width))
        assert len(symbolic) == len(eager) == len(declared)
        for a, b, c in zip(symbolic, eager, declared):
            assert tuple(b.shape) == tuple(c)
            assert len(a.shape) == len(b.shape)
            assert all(n in (None, m) for n, m in zip(a.shape, b.shape))
            assert a.dtype == ops.dtype(b)
        expected = (batch, time) if sequences else (batch,)
        assert tuple(eager[0].shape) == (*expected, case.output_size)
        assert symbolic[0].shape[-1] == case.output_size


def compiled(model, *args, **kwargs):
    """Compiles a model and builds the optimizer, if possible: otherwise
    TensorFlow would trace the first step twice."""
    model.compile(*args, **kwargs)
    if model.built:
        model.optimizer.build(model.trainable_variables)
    return model


def training_step(case, jit_compile):
    skip_on("numpy", because="not applicable: Keras does not train here")
    if BACKEND == "torch" and jit_compile:
        if case.name != "ntm-default":
            skip_on("torch", because="not run: half a minute a time step")
        batch, _, width = case.input_shape
        case = dataclasses.replace(case, input_shape=(batch, 2, width))
    layer = built(case)
    model = compiled(
        model_of(layer, case), "sgd", "mse", jit_compile=jit_compile
    )
    x = inputs_of(case)
    y = np.ones((*case.input_shape[:2], case.output_size), "float32")
    before = {w.path: ops.convert_to_numpy(w) for w in model.weights}
    loss = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    for weight in model.weights:
        after = ops.convert_to_numpy(weight)
        assert np.isfinite(after).all(), weight.path
        moved = np.abs(after - before[weight.path]).max() > 0
        is_state = "seed" in weight.path
        assert moved == weight.trainable or is_state, weight.path


def mask_is_truncation(case):
    layer, x, unmasked, _ = ran(case)
    batch, time, _ = x.shape
    length = 4
    padded = np.arange(time)[None] < np.array([[length]] * batch)
    whole, *states = layer(x, mask=padded)
    cut, *cut_states = layer(x[:, :length])
    close(whole[:, :length], cut)
    for held in range(length, time):  # the last output is held
        close(whole[:, held], cut[:, -1])
    for state, cut_state in zip(states, cut_states):
        close(state, cut_state)
    last = like(layer, case, return_sequences=False)
    close(last(x, mask=padded), cut[:, -1])
    # The contents of masked steps do not matter.
    poison = np.where(np.arange(batch) % 2, np.inf, np.nan)[:, None, None]
    poisoned = np.where(padded[:, :, None], x, poison).astype("float32")
    close(layer(poisoned, mask=padded)[0], whole)
    # Masked steps in the middle act as if removed; in front, outputs are 0.
    kept = [1, 2, 5]
    holes = np.isin(np.arange(time), kept)[None].repeat(batch, 0)
    with_holes, *states = layer(x, mask=holes)
    without, *expected = layer(x[:, kept])
    close(ops.convert_to_numpy(with_holes)[:, kept], without)
    close(with_holes[:, 0], ops.zeros_like(with_holes[:, 0]))
    close(with_holes[:, 4], without[:, 1])
    for state, other in zip(states, expected):
        close(state, other)
    zeroing = like(layer, case, zero_output_for_mask=True)
    zeroed = ops.convert_to_numpy(zeroing(x, mask=holes))
    close(zeroed[:, kept], without)
    assert (zeroed[:, ~holes[0]] == 0).all()
    # Masks of rows are independent.
    rows = np.ones((batch, time), bool)
    rows[0, length:] = False
    mixed = layer(x, mask=rows)[0]
    close(mixed[0], whole[0])
    close(mixed[1:], unmasked[1:])
    # In a Functional model, the mask comes from the previous layer.
    marked = np.where(padded[:, :, None], x, 0.0).astype("float32")
    entry = keras.Input((None, x.shape[-1]))
    masked = keras.layers.Masking()(entry)
    model = keras.Model(entry, like(layer, case)(masked))
    close(model.predict(marked, verbose=0), whole)


def state_in_and_out(case):
    layer, x, whole, final = ran(case)
    first, *states = layer(x[:, :3])
    second, *states = layer(x[:, 3:], initial_state=states)
    close(ops.concatenate([first, second], axis=1), whole)
    for state, other in zip(states, final):
        close(state, other)
    cell = layer.cell
    packed = cell.pack_state(cell.unpack_state(final))
    for state, other in zip(packed, final):
        close(state, other, tolerance=0)
    # Symbolic states, in a Functional model.
    entry = keras.Input((None, x.shape[-1]))
    entries = [keras.Input((size,)) for size in cell.state_size]
    model = keras.Model([entry, *entries], layer(entry, initial_state=entries))
    given = cell.get_initial_state(batch_size=len(x))
    close(model([ops.convert_to_tensor(x), *given])[0], whole)


def stateful_is_one_sequence(case):
    layer, x, whole, _ = ran(case)
    stateful = like(layer, case, stateful=True)
    stateful.reset_state()
    chunks = [stateful(x[:, :3]), stateful(x[:, 3:])]
    close(ops.concatenate(chunks, axis=1), whole)
    stateful.reset_state()
    close(stateful(x), whole)
    # States are variables on every backend, and not among the weights.
    assert not any(state.trainable for state in stateful.states)
    variables = {id(v) for v in stateful.non_trainable_variables}
    assert variables >= {id(state) for state in stateful.states}
    assert stateful.count_params() == layer.count_params()
    stateful.set_weights(layer.get_weights())


def backwards(case):
    x = inputs_of(case)
    layer = built(case)
    reverse = like(layer, case, go_backwards=True)
    close(reverse(x), layer(x[:, ::-1]))
    mask = np.arange(x.shape[1])[None].repeat(len(x), 0) < 4
    close(reverse(x, mask=mask)[:, 3:], layer(x[:, 3::-1]))
    close(reverse(x, mask=mask)[:, :3], np.zeros((len(x), 3, case.output_size)))


def in_models(case):
    """Works stacked, in `Bidirectional`, in a subclassed model and unrolled."""
    x = few_inputs_of(case)
    batch, time, width = x.shape
    model = keras.Sequential(
        [
            keras.Input((None, width)),
            keras.layers.Bidirectional(case.make()),
            case.make(return_sequences=False),
            keras.layers.Dense(2),
        ]
    )
    assert model(x).shape == (batch, 2)
    copy = keras.Sequential.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    close(copy(x), model(x), tolerance=0)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.memory = case.make()

        def call(self, inputs):
            return self.memory(inputs)

    assert Own()(x).shape == (batch, time, case.output_size)
    layer = built(case)
    close(like(layer, case, unroll=True)(x), layer(x))


def draws_orthogonal_in_float16(layer):
    return any(
        isinstance(
            getattr(part, "recurrent_initializer", None),
            keras.initializers.Orthogonal,
        )
        and part.variable_dtype == "float16"
        for part in layer._flatten_layers()
    )


def mixed_precision(case, policy):
    options = {"dtype": policy}
    given = {"cell", "encoder", "head", "classifier"} & set(case.kwargs)
    if given:  # given layers keep their own policy
        keras.config.set_dtype_policy(policy)
        options = {}
    if draws_orthogonal_in_float16(case.make(**options)):
        skip_on(
            *OTHERS,
            because="no: Keras cannot draw orthogonal weights in float16 here",
        )
    layer = built(case, **options)
    assert layer.compute_dtype in policy
    model = model_of(layer, case)
    x = inputs_of(case)
    output = model(x)
    assert ops.dtype(output) == layer.compute_dtype
    assert np.isfinite(ops.convert_to_numpy(ops.cast(output, "float32"))).all()
    if TRAINS:
        model.compile("sgd", "mse", run_eagerly=True)
        y = np.zeros(output.shape, "float32")
        assert np.isfinite(model.train_on_batch(x, y))
    for weight in model.weights:
        value = ops.convert_to_numpy(ops.cast(weight, "float32"))
        assert np.isfinite(value).all(), weight.path


def trace_is_what_happens(case):
    layer, x, output, states = ran(case)
    inside = keras_memory.trace(layer, x)
    close(inside["output"], output)
    assert all(value.shape[:2] == x.shape[:2] for value in inside.values())
    record = layer.cell.unpack_state(states)
    if hasattr(record, "_asdict"):
        for name, value in record._asdict().items():
            if not isinstance(value, tuple):  # the controller's
                found = [k for k in inside if k.split("/")[-1] == name]
                if not found:  # bounds, which only searches need
                    assert name == "block_access"
                    continue
                last = inside[found[-1]][:, -1]
                # A memory that starts empty has no more slots than it needs.
                close(last, value[:, : last.shape[1]])
    mask = np.arange(x.shape[1])[None].repeat(len(x), 0) % 3 != 0
    poisoned = np.where(mask[:, :, None], x, np.nan)
    close(
        keras_memory.trace(layer, poisoned, mask=mask)["output"],
        layer(x, mask=mask)[0],
    )
