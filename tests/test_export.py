"""Exports serve the model: whole, step by step, and without Python."""

import os
import pathlib
import signal
import subprocess
import sys
import types

import harness
import keras
import numpy as np
import pytest
from catalogue import name_of
from catalogue import of_layers
from harness import close

import keras_memory
from keras_memory.serving import export
from keras_memory.serving import saved_model
from keras_memory.serving import streaming
from keras_memory.serving.export import export_for_serving

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("exports need the TensorFlow backend", allow_module_level=True)

PROGRAM = pathlib.Path(__file__).with_name("saved_model_c_api.py")
SIGNATURES = {"serving_default", "step", "initial_state"}


def random(*shape, seed=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype("float32")


def load(path):
    return tf.saved_model.load(str(path)).signatures


def run(signature, **inputs):
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in signature(**inputs).items()}


def stream(signatures, x, name="inputs"):
    """Outputs of the steps, and the final states."""
    states = run(signatures["initial_state"], **{name: x[:, 0]})
    outputs = []
    for time in range(x.shape[1]):
        states = run(signatures["step"], **{name: x[:, time]}, **states)
        outputs.append(states.pop("outputs"))
    return outputs, states


def takes(signature):
    return set(signature.structured_input_signature[1])


def gives(signature):
    return set(signature.structured_outputs)


def ntm(**kwargs):
    return keras_memory.NTMLayer(
        3,
        memory_slots=11,
        slot_size=5,
        controller_units=13,
        **{"return_sequences": True, **kwargs},
    )


def sequential(*layers, shape=(None, 5), **kwargs):
    return keras.Sequential([keras.Input(shape, **kwargs), *layers])


def tiny():
    """The fastest model that can be streamed."""
    return sequential(keras.layers.SimpleRNN(2, return_sequences=True))


# The catalogue.


@pytest.fixture(scope="module", params=of_layers, ids=name_of)
def exported(request, tmp_path_factory):
    case = request.param
    layer = harness.built(case)
    folder = tmp_path_factory.mktemp("export") / "layer"
    path = export_for_serving(layer, folder, warm_up=())
    return types.SimpleNamespace(case=case, layer=layer, path=path)


def test_every_case_is_served(exported):
    signatures = load(exported.path)
    assert set(signatures) == SIGNATURES
    width = exported.case.input_shape[-1]
    for batch, time in [(1, 1), (2, 7), (5, 3)]:
        x = random(batch, time, width)
        whole = exported.layer(x)
        served = run(signatures["serving_default"], inputs=x)
        assert set(served) == {"outputs"}
        close(served["outputs"], whole, tolerance=1e-5)
    outputs, states = stream(signatures, x)
    close(np.stack(outputs, axis=1), whole, tolerance=1e-6)
    # The states are those of `return_state`, in the same order.
    stateful = harness.like(exported.layer, exported.case, return_state=True)
    _, *expected = stateful(x)
    names = exported.layer.cell.state_names
    assert set(states) == set(names) and len(names) == len(expected)
    for name, state in zip(names, expected):
        close(states[name], state, tolerance=1e-6)
    initial = run(signatures["initial_state"], inputs=x[:, 0])
    given = exported.layer.get_initial_state(batch_size=len(x))
    for name, state in zip(names, given):
        close(initial[name], state, tolerance=0)


def test_exports_have_only_stock_operations(exported):
    ops = operations(exported.path)
    assert {op for op in ops if not hasattr(tf.raw_ops, op)} == set()
    assert not {op for op in ops if "PyFunc" in op or "Random" in op}
    # `tf.custom_gradient` leaves it, and TensorFlow warns of it at loading.
    assert "IdentityN" not in ops


def graph_def(path):
    from tensorflow.core.protobuf import saved_model_pb2

    data = (path / "saved_model.pb").read_bytes()
    (meta_graph,) = saved_model_pb2.SavedModel.FromString(data).meta_graphs
    return meta_graph.graph_def


def operations(path):
    graph = graph_def(path)
    functions = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node]
    for function in graph.library.function:
        nodes += function.node_def
    return {node.op for node in nodes} - functions


# A trained model with several layers.

STATE_SIZES = {
    "head_reads": 5,
    "head_memory": 55,
    "head_read_weighting": 11,
    "head_write_weighting": 11,
    "head_controller_h": 13,
    "head_controller_c": 13,
    "tail_h": 7,
    "tail_c": 7,
}


class Compiled(keras.layers.Layer):
    """Requests XLA, which a server may lack."""

    def build(self, input_shape):
        self.function = tf.function(tf.tanh, jit_compile=True)

    def call(self, inputs):
        return self.function(inputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = sequential(
        layers.Dense(5),
        Compiled(),
        ntm(controller_dropout=0.2, name="head"),
        layers.LayerNormalization(),
        layers.LSTM(7, return_sequences=True, dropout=0.2, name="tail"),
        layers.Dropout(0.3),
        layers.BatchNormalization(),
        layers.Dense(2, activation="sigmoid"),
    )
    harness.compiled(model, "sgd", "mse", jit_compile=True)
    model.fit(random(4, 3, 5), np.ones((4, 3, 2)), epochs=2, verbose=0)
    folder = tmp_path_factory.mktemp("export") / "mixed"
    path = export_for_serving(model, folder, warm_up=[(1, 1), (2, 3)])
    return types.SimpleNamespace(model=model, path=path)


def test_signatures_have_the_documented_names_and_shapes(trained):
    assert trained.path.name == "1" and isinstance(trained.path, pathlib.Path)
    signatures = load(trained.path)
    states = {name: (None, size) for name, size in STATE_SIZES.items()}

    def shapes(specs):
        return {name: tuple(spec.shape) for name, spec in specs.items()}

    def takes(name):
        return shapes(signatures[name].structured_input_signature[1])

    def gives(name):
        return shapes(signatures[name].structured_outputs)

    assert takes("serving_default") == {"inputs": (None, None, 5)}
    assert gives("serving_default") == {"outputs": (None, None, 2)}
    assert takes("step") == {"inputs": (None, 5), **states}
    assert gives("step") == {"outputs": (None, 2), **states}
    assert takes("initial_state") == {"inputs": (None, 5)}
    assert gives("initial_state") == states


def test_a_trained_model_is_served_and_streamed(trained):
    signatures = load(trained.path)
    for batch, time in [(1, 1), (3, 11)]:
        x = random(batch, time, 5)
        whole = trained.model(x, training=False)
        served = run(signatures["serving_default"], inputs=x)["outputs"]
        close(served, whole, tolerance=1e-5)
        outputs, _ = stream(signatures, x)
        close(np.stack(outputs, axis=1), whole, tolerance=1e-6)


def test_a_server_needs_neither_xla_nor_random_numbers(trained):
    graph = graph_def(trained.path)
    functions = graph.library.function
    holders = [*functions, *(node for f in functions for node in f.node_def)]
    assert not any(h.attr["_XlaMustCompile"].b for h in holders)
    assert not {op for op in operations(trained.path) if "Random" in op}


def test_the_c_api_serves_a_model_without_python(trained, tmp_path):
    """All signatures, and a stream, in a process without Keras."""
    x = random(3, 5, 5)
    np.savez(tmp_path / "x.npz", inputs=x)
    calls = ["serving_default", "x.npz", "y.npz"]
    calls += ["initial_state", "x0.npz", "s0.npz"]
    for time in range(5):
        np.savez(tmp_path / f"x{time}.npz", inputs=x[:, time])
        files = f"x{time}.npz,s{time}.npz"
        calls += ["step", files, f"s{time + 1}.npz"]
    done = subprocess.run(
        [sys.executable, "-I", PROGRAM, trained.path, *calls],
        cwd=tmp_path,
        env={"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = {p.stem: np.load(p) for p in tmp_path.glob("[ys]*.npz")}
    whole = trained.model(x, training=False)
    close(results["y"]["outputs"], whole, tolerance=1e-5)
    steps = [results[f"s{time + 1}"]["outputs"] for time in range(5)]
    close(np.stack(steps, axis=1), whole, tolerance=1e-6)
    signatures = load(trained.path)
    initial = run(signatures["initial_state"], inputs=x[:, 0])
    assert set(results["s0"]) == set(initial)
    for name, state in initial.items():
        close(results["s0"][name], state, tolerance=1e-6)
    _, final = stream(signatures, x)
    for name, state in final.items():
        close(results["s5"][name], state, tolerance=1e-6)


def test_exporting_does_not_change_the_model(tmp_path):
    model = tiny()
    before = [dict(vars(layer)) for layer in (model, *model.layers)]
    export_for_serving(model, tmp_path / "model", warm_up=())
    for layer, attributes in zip((model, *model.layers), before):
        assert set(vars(layer)) == set(attributes)
        for name, value in attributes.items():
            assert vars(layer)[name] is value, name


def test_warm_up_requests_match_the_signatures(trained):
    prediction_log = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2"
    )
    signatures = load(trained.path)
    path = trained.path / "assets.extra" / "tf_serving_warmup_requests"
    sizes = []
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        log = prediction_log.PredictionLog.FromString(record)
        request = log.predict_log.request
        assert request.model_spec.name == "mixed"
        name = request.model_spec.signature_name
        inputs = {
            key: tf.make_ndarray(value) for key, value in request.inputs.items()
        }
        assert all(
            np.isfinite(value).all()
            for value in run(signatures[name], **inputs).values()
        )
        sizes.append((name, inputs["inputs"].shape))
    assert sorted(sizes) == sorted(
        [
            ("serving_default", (1, 1, 5)),
            ("serving_default", (2, 3, 5)),
            ("step", (1, 5)),
            ("step", (2, 5)),
            ("initial_state", (1, 5)),
            ("initial_state", (2, 5)),
        ]
    )


def test_models_config_names_the_model_and_its_folder(trained):
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = pytest.importorskip(
        "tensorflow_serving.config.model_server_config_pb2"
    ).ModelServerConfig()
    text = (trained.path.parent / "models.config").read_text()
    (model,) = text_format.Parse(text, config).model_config_list.config
    assert model.name == "mixed"
    assert model.base_path == "/models/mixed"
    assert model.model_platform == "tensorflow"


# Streams.


def check(model, path, x):
    """Served and streamed outputs equal the model's."""
    signatures = load(path)
    whole = run(signatures["serving_default"], inputs=x)["outputs"]
    close(whole, model(x, training=False), tolerance=1e-5)
    outputs, _ = stream(signatures, x)
    joined = np.stack(outputs, axis=1) if whole.ndim == 3 else outputs[-1]
    close(joined, whole, tolerance=1e-6)


def test_layers_that_return_the_last_output_are_streamed(tmp_path):
    model = sequential(
        ntm(),
        keras.layers.GRU(2, return_sequences=True),
        ntm(return_sequences=False),
        keras.layers.Dense(2),
    )
    path = export_for_serving(model, tmp_path, name="last", warm_up=())
    check(model, path, random(2, 3, 5))


def test_a_functional_model_with_branches_and_submodels_is_streamed(tmp_path):
    inside = sequential(
        keras.layers.RNN(
            [keras.layers.LSTMCell(2), keras.layers.GRUCell(3)],
            return_sequences=True,
        ),
        shape=(4, 5),
    )
    inputs = keras.Input((4, 5))
    shared = keras.layers.GRU(3, return_sequences=True)
    outputs = keras.layers.Add()(
        [inside(inputs), shared(inputs), shared(keras.ops.tanh(inputs))]
    )
    model = keras.Model(inputs, outputs)
    path = export_for_serving(model, tmp_path / "model", warm_up=())
    check(model, path, random(2, 4, 5))
    # The served model accepts other numbers of time steps.
    served = run(load(path)["serving_default"], inputs=random(3, 7, 5))
    assert served["outputs"].shape == (3, 7, 3)


def test_a_subclassed_model_is_served(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.memory = keras.layers.SimpleRNN(3, return_sequences=True)
            self.out = keras.layers.Dense(2)

        def call(self, inputs):
            return self.out(self.memory(inputs))

    model = Own()
    x = random(2, 3, 5)
    model(x)
    check(model, export_for_serving(model, tmp_path / "own"), x)


def test_token_models_are_streamed(tmp_path):
    model = sequential(
        keras.layers.Embedding(7, 3),
        keras.layers.SimpleRNN(2, return_sequences=True),
        shape=(None,),
        dtype="int32",
    )
    path = export_for_serving(model, tmp_path / "tokens")
    check(model, path, np.array([[3, 0, 6], [1, 0, 0]], "int32"))


def test_a_stateful_layer_is_served_without_its_state(tmp_path):
    model = sequential(ntm(stateful=True), batch_shape=(2, None, 5), shape=None)
    x = random(2, 3, 5)
    first = model(x).numpy()
    held = [state.numpy() for state in model.layers[0].states]
    path = export_for_serving(model, tmp_path / "stateful")
    for state, before in zip(model.layers[0].states, held):
        close(state, before, tolerance=0)
    signatures = load(path)
    for _ in range(2):
        served = run(signatures["serving_default"], inputs=x)["outputs"]
        close(served, first, tolerance=1e-5)
    more = random(5, 4, 5)
    whole = run(signatures["serving_default"], inputs=more)["outputs"]
    close(np.stack(stream(signatures, more)[0], 1), whole, tolerance=1e-6)


def test_gpu_only_kernels_are_avoided(tmp_path, monkeypatch):
    def cudnn(*args, **kwargs):
        raise RuntimeError("a cuDNN kernel was asked for")

    model = sequential(keras.layers.LSTM(2))
    monkeypatch.setattr(keras.src.backend, "lstm", cudnn)
    with pytest.raises(RuntimeError, match="cuDNN"):
        model(random(2, 3, 5))
    export_for_serving(model, tmp_path / "model", warm_up=())


def test_mixed_precision_states_are_float16(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = sequential(ntm(), keras.layers.Dense(2, dtype="float32"))
    signatures = load(export_for_serving(model, tmp_path / "half"))
    _, specs = signatures["step"].structured_input_signature
    assert specs.pop("inputs").dtype == "float32"
    assert {spec.dtype.name for spec in specs.values()} == {"float16"}
    x = random(2, 3, 5)
    outputs, _ = stream(signatures, x)
    close(np.stack(outputs, 1), model(x, training=False), tolerance=1e-2)


def bidirectional(**kwargs):
    inside = keras.layers.SimpleRNN(2, return_sequences=True)
    return keras.layers.Bidirectional(inside, **kwargs)


def attention(inputs):
    return keras.layers.MultiHeadAttention(1, 3, name="looks")(inputs, inputs)


@pytest.mark.parametrize(
    "name, layers",
    [
        ("looks", lambda: bidirectional(name="looks")),
        ("looks", lambda: ntm(go_backwards=True, name="looks")),
        ("looks", lambda: attention),
        (
            "looks",
            lambda: keras.layers.Conv1D(3, 2, padding="causal", name="looks"),
        ),
        ("looks", lambda: keras.layers.GlobalMaxPooling1D(name="looks")),
    ],
    ids=[
        "bidirectional",
        "backwards",
        "attention",
        "convolution",
        "pooling",
    ],
)
def test_models_that_cannot_be_streamed_are_served_with_a_warning(
    name, layers, tmp_path
):
    inputs = keras.Input((None, 5))
    layer = layers()
    memory = keras.layers.SimpleRNN(3, return_sequences=True)
    model = keras.Model(inputs, layer(memory(inputs)))
    remedy = "Call `serving_default` with whole sequences"
    with pytest.warns(UserWarning, match=f"`step`.*{name!r}.*{remedy}"):
        path = export_for_serving(model, tmp_path / "model")
    signatures = load(path)
    assert set(signatures) == {"serving_default"}
    for batch, time in [(2, 3), (1, 7)]:
        x = random(batch, time, 5)
        x[0, -1] = 0.0
        served = run(signatures["serving_default"], inputs=x)["outputs"]
        close(served, model(x, training=False), tolerance=1e-5)


def gappy(*shape, value=0.0):
    """Rows with masked steps at the start, in the middle and at the end."""
    x = random(*shape)
    x[0, -2:] = x[1, 0] = x[2, 1] = x[2, 3] = value
    return x


def rnn(layer, **kwargs):
    return layer(3, **{"return_sequences": True, **kwargs})


class OwnCell(keras.layers.Layer):
    state_size = [2, 2]
    output_size = 2

    def call(self, inputs, states):
        return states[0] + inputs[:, :2], [states[0] + 1.0, states[1] * 0.5]

    def get_initial_state(self, batch_size=None):
        return [keras.ops.ones((batch_size, 2))] * 2


MASKED = {  # layers, and the number of them that hold an output
    "ours": (lambda: [keras.layers.Masking(), ntm(), keras.layers.GRU(2)], 2),
    "value": (
        lambda: [keras.layers.Masking(-2.0), rnn(keras.layers.SimpleRNN)],
        1,
    ),
    "middle": (
        lambda: [
            rnn(keras.layers.SimpleRNN),
            keras.layers.Dense(2, "relu"),
            keras.layers.Masking(),
            rnn(keras.layers.LSTM),
            keras.layers.LayerNormalization(),
            keras.layers.TimeDistributed(keras.layers.Dense(3)),
            rnn(keras.layers.GRU),
        ],
        2,
    ),
    "stack": (
        lambda: [
            keras.layers.Masking(),
            keras.layers.RNN([keras.layers.LSTMCell(2), OwnCell()]),
            keras.layers.Dense(2),
        ],
        1,
    ),
    "zeros": (
        lambda: [
            keras.layers.Masking(),
            rnn(keras.layers.LSTM, zero_output_for_mask=True),
        ],
        0,
    ),
    "zeros-last": (
        lambda: [
            keras.layers.Masking(),
            rnn(
                keras.layers.GRU,
                zero_output_for_mask=True,
                return_sequences=False,
            ),
        ],
        0,
    ),
}


@pytest.mark.parametrize("case", MASKED)
def test_masked_steps_hold_outputs_in_a_stream(case, tmp_path, recwarn):
    layers, count = MASKED[case]
    model = sequential(*layers())
    path = export_for_serving(model, tmp_path / "model", warm_up=())
    assert not [w for w in recwarn if "`step`" in str(w.message)]
    check(model, path, gappy(3, 6, 5, value=-2.0 if case == "value" else 0.0))
    states = gives(load(path)["initial_state"])
    assert sum("held_output" in name for name in states) == count


def test_masked_tokens_hold_outputs_in_a_stream(tmp_path):
    model = sequential(
        keras.layers.Embedding(7, 3, mask_zero=True),
        rnn(keras.layers.LSTM, name="first"),
        keras.layers.GRU(2, name="second"),
        shape=(None,),
        dtype="int32",
    )
    path = export_for_serving(model, tmp_path / "tokens", warm_up=())
    check(model, path, np.array([[3, 0, 6, 0], [0, 1, 0, 2]], "int32"))
    assert takes(load(path)["step"]) == {
        "inputs",
        *("first_h", "first_c", "first_held_output"),
        *("second_h", "second_held_output"),
    }


def test_rows_with_a_masked_step_keep_their_states(tmp_path):
    """Several clients share a batch, and one has no input at a step."""
    model = sequential(keras.layers.Masking(), rnn(keras.layers.LSTM))
    path = export_for_serving(model, tmp_path / "model", warm_up=())
    signatures = load(path)
    x = random(2, 3, 5)
    first, states = stream(signatures, x)
    news = random(2, 5)
    news[0] = 0.0
    after = run(signatures["step"], inputs=news, **states)
    close(after.pop("outputs")[0], first[-1][0], tolerance=0)
    for name, state in after.items():
        close(state[0], states[name][0], tolerance=0)
        assert np.abs(state[1] - states[name][1]).max() > 1e-3


# Names.


def names_of(model, tmp_path):
    path = export_for_serving(model, tmp_path / "names", warm_up=())
    signatures = load(path)
    assert takes(signatures["initial_state"]) < takes(signatures["step"])
    states = gives(signatures["initial_state"])
    (name,) = takes(signatures["initial_state"])
    assert takes(signatures["serving_default"]) == {name}
    assert takes(signatures["step"]) == {name, *states}
    outputs = gives(signatures["serving_default"])
    assert gives(signatures["step"]) == {*outputs, *states}
    # The names belong to the right arrays.
    x = random(2, 3, 5)
    whole = run(signatures["serving_default"], **{name: x})
    given = run(signatures["initial_state"], **{name: x[:, 0]})
    for time in range(3):
        given = run(signatures["step"], **{name: x[:, time]}, **given)
        for output in outputs:
            one = given.pop(output)
            close(one, whole[output][:, time], tolerance=1e-6)
    return name, outputs, states


@pytest.mark.parametrize(
    "given, served",
    [("sensor", "sensor"), (None, "inputs"), ("1st", "arg_1st")],
)
def test_a_named_input_keeps_its_name(given, served, tmp_path):
    model = sequential(rnn(keras.layers.SimpleRNN), name=given)
    assert names_of(model, tmp_path) == (served, {"outputs"}, {"h"})


@pytest.mark.parametrize(
    "given, served",
    [
        ("inputs", "inputs"),
        ("input_layer_3", "inputs"),  # Keras's name after loading
        ("my-input", "my_input"),
        ("_x", "arg__x"),
        ("größe 2", "gr__e_2"),
        ("class", "arg_class"),
        ("self", "arg_self"),
    ],
)
def test_names_become_valid_for_tensorflow(given, served):
    assert streaming._names("inputs", keras.Input((5,), name=given)) == [served]

    def function(**inputs):
        return inputs

    signature = streaming._trace(function, {served: ((None,), "float32")})
    assert takes(signature) == {served}
    signature(**{served: tf.ones(3)})


def test_outputs_keep_their_keys_and_clashing_states_are_renamed(tmp_path):
    inputs = keras.Input((None, 5), name="h")
    first = rnn(keras.layers.LSTM, name="my-lstm")(inputs)
    model = keras.Model(inputs, {"go": first, "my-lstm_c": first + 1.0})
    assert names_of(model, tmp_path) == (
        "h",
        {"go", "my_lstm_c"},
        {"my_lstm_h", "my_lstm_c_1"},
    )


def test_a_layer_called_again_gets_a_number(tmp_path):
    inputs = keras.Input((None, 5))
    shared = rnn(keras.layers.GRU, name="shared")
    masked = shared(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, masked + shared(inputs))
    _, _, states = names_of(model, tmp_path)
    assert states == {"shared_h", "shared_held_output", "shared_1_h"}


def test_states_of_several_memories_are_named_by_block():
    def names(**kwargs):
        sizes = {"memory_slots": 3, "slot_size": 2, "linkage": False}
        return keras_memory.DNCCell(3, **sizes, **kwargs).state_names

    record = ["reads", "memory", "usage", "read_weighting", "write_weighting"]
    assert names(controller="dense") == record
    assert names(controller_layers=2) == [
        *record,
        *("controller_h_0", "controller_c_0"),
        *("controller_h_1", "controller_c_1"),
    ]
    assert names(controller="gru", num_layers=2) == [
        *record,
        *("block0_controller_h", "block1_controller_h"),
    ]
    assert names(controller="nas", num_layers=2, share_memory=False) == [
        f"block{block}_{name}"
        for block in range(2)
        for name in [*record, "controller_c", "controller_m"]
    ]


def test_cells_name_their_states(tmp_path):
    own, named = OwnCell(), OwnCell()
    named.state_names = ["count", "share"]
    cells = [own, keras.layers.LSTMCell(2), named]
    model = sequential(keras.layers.RNN(cells, return_sequences=True))
    _, _, states = names_of(model, tmp_path)
    assert states == {
        *("state_0_0", "state_1_0", "h_1", "c_1", "count_2", "share_2")
    }


def test_unnamed_inputs_are_numbered_and_dict_keys_are_kept(tmp_path):
    first, second = keras.Input((2,)), keras.Input((2,), name="second")
    model = keras.Model([first, second], [first + second, first - second])
    path = export_for_serving(model, tmp_path / "list")
    signature = load(path)["serving_default"]
    assert takes(signature) == {"inputs_0", "second"}
    assert gives(signature) == {"outputs_0", "outputs_1"}
    x, y = random(3, 2), random(3, 2, seed=1)
    served = run(signature, inputs_0=x, second=y)
    close(served["outputs_1"], x - y, tolerance=1e-6)
    keyed = keras.Model(
        {"a b": keras.Input((2,), name="a b"), "a-b": second},
        {"of": {"all": second * 2.0, "none": second * 0.0}},
    )
    signature = load(export_for_serving(keyed, tmp_path / "dict"))
    signature = signature["serving_default"]
    assert takes(signature) == {"a_b", "a_b_1"}
    assert gives(signature) == {"of_all", "of_none"}


def test_several_inputs_and_outputs_are_served_but_not_streamed(tmp_path):
    first, second = (
        keras.Input((None, 5), name="a"),
        keras.Input((3,), name="b"),
    )
    outputs = keras.layers.SimpleRNN(3, return_sequences=True)(first)
    model = keras.Model(
        {"a": first, "b": second}, [outputs, keras.layers.Dense(2)(second)]
    )
    with pytest.warns(UserWarning, match="one input.*'a', 'b'"):
        path = export_for_serving(model, tmp_path / "model")
    x = {"a": random(2, 3, 5), "b": random(2, 3)}
    served = run(load(path)["serving_default"], **x)
    expected = model(x, training=False)
    close(served["outputs_0"], expected[0], tolerance=1e-5)
    close(served["outputs_1"], expected[1], tolerance=1e-5)


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: sequential(ntm(), shape=(1, 5)), "one time step"),
        (
            lambda: sequential(
                ntm(),
                keras.layers.Flatten(),
                keras.layers.Dense(2, name="wide"),
                shape=(3, 5),
            ),
            "fails on a single time step.*'wide'",
        ),
    ],
    ids=["one-step", "flattened"],
)
def test_models_without_a_time_axis_are_only_served(model, reason, tmp_path):
    model = model()
    with pytest.warns(UserWarning, match=reason):
        path = export_for_serving(model, tmp_path / "model")
    signatures = load(path)
    assert set(signatures) == {"serving_default"}
    x = random(2, model.input_shape[1] or 3, 5)
    served = run(signatures["serving_default"], inputs=x)["outputs"]
    close(served, model(x), tolerance=1e-5)


def test_models_without_recurrent_layers_are_served_without_warnings(
    tmp_path, recwarn
):
    model = sequential(keras.layers.Dense(2))
    signatures = load(export_for_serving(model, tmp_path / "model"))
    assert not [w for w in recwarn if "export" in str(w.message)]
    assert set(signatures) == {"serving_default"}


@pytest.mark.parametrize("time", [4, None], ids=["fixed", "free"])
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_time_distributed_layers_are_served(time, streams, tmp_path):
    layers = keras.layers
    model = sequential(
        *[rnn(layers.SimpleRNN)] * streams,
        layers.TimeDistributed(layers.Dense(4)),
        layers.TimeDistributed(layers.Reshape((2, 2))),
        layers.TimeDistributed(layers.SimpleRNN(2)),
        shape=(time, 5),
    )
    path = export_for_serving(model, tmp_path / "model", warm_up=())
    x = random(3, 4, 5)
    if streams:
        check(model, path, x)
    else:
        served = run(load(path)["serving_default"], inputs=x)["outputs"]
        close(served, model(x), tolerance=1e-5)


class Looped(keras.layers.Layer):
    """Acts on each step, and needs a known number of steps."""

    def call(self, inputs):
        steps = [inputs[:, time] * 2.0 for time in range(inputs.shape[1])]
        return keras.ops.stack(steps, axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a_layer_may_require_a_known_number_of_steps(tmp_path):
    model = sequential(rnn(keras.layers.SimpleRNN), Looped(), shape=(4, 5))
    path = export_for_serving(model, tmp_path / "model", warm_up=())
    check(model, path, random(2, 4, 5))
    _, specs = load(path)["serving_default"].structured_input_signature
    assert specs["inputs"].shape == (None, 4, 5)


# Files.


def test_versions_are_written_side_by_side(tmp_path):
    folder = tmp_path / "new" / "model"
    first = export_for_serving(tiny(), folder)
    before = {path: path.stat() for path in first.rglob("*")}
    with pytest.raises(ValueError, match="`version` must be a new one"):
        export_for_serving(tiny(), folder)
    assert {path: path.stat() for path in first.rglob("*")} == before
    second = export_for_serving(tiny(), folder, version=2, name="other")
    assert {path.name for path in folder.iterdir()} == {
        "1",
        "2",
        "models.config",
    }
    assert 'name: "other"' in (folder / "models.config").read_text()
    assert {path: path.stat() for path in first.rglob("*")} == before
    # A server of another user may read it.
    (tmp_path / "usual").mkdir()
    assert second.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_without_tensorflow_serving_warm_up_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.warns(UserWarning, match="pip install.*2.20.0") as caught:
        path = export_for_serving(tiny(), tmp_path / "model")
    assert len([w for w in caught if "warm-up" in str(w.message)]) == 1
    assert set(load(path)) == SIGNATURES
    assert not (path / "assets.extra").exists()
    assert (tmp_path / "model" / "models.config").exists()


def wrong_weights(save):
    def save_wrong(module, *args, **kwargs):
        for variable in module.all_variables[0]:
            variable.assign_add(tf.ones_like(variable))
        return save(module, *args, **kwargs)

    return save_wrong


def failing(*args, **kwargs):
    raise OSError("no space left")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place, name, replacement, error",
    [
        (None, "save", lambda save: failing, OSError),
        (None, "save", wrong_weights, RuntimeError),
        (None, "load", lambda load: interrupted, KeyboardInterrupt),
        (export, "check_signatures", lambda check: failing, OSError),
        (export, "write_warm_up", lambda write: failing, OSError),
        (os, "fsync", lambda fsync: failing, OSError),
        (pathlib.Path, "rename", lambda rename: failing, OSError),
    ],
    ids="save mismatch interrupt check warm-up fsync rename".split(),
)
def test_a_failed_export_leaves_no_files(
    place, name, replacement, error, tmp_path, monkeypatch
):
    # Looked up here, since `model.export` replaces the module.
    place = place or tf.saved_model
    monkeypatch.setattr(place, name, replacement(getattr(place, name)))
    with pytest.raises(error):
        export_for_serving(tiny(), tmp_path / "model")
    left = {path.name for path in (tmp_path / "model").iterdir()}
    assert left <= {"models.config"}


@pytest.mark.parametrize(
    "place, name, error",
    [
        (None, "save", tf.errors.ResourceExhaustedError(None, None, "no room")),
        (pathlib.Path, "write_text", OSError(28, "no room")),
        (os, "fsync", OSError(28, "no room")),
        (
            tf.io,
            "TFRecordWriter",
            tf.errors.UnknownError(None, None, "no room"),
        ),
    ],
    ids="save config flush warm-up".split(),
)
def test_a_full_disk_raises_an_os_error(
    place, name, error, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise error

    if name == "TFRecordWriter":
        pytest.importorskip("tensorflow_serving.apis")
    folder = tmp_path / "model"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "saved_model.pb").write_bytes(b"old")
    monkeypatch.setattr(place or tf.saved_model, name, full)
    match = "Could not write .*model/2: .*no room.* are unchanged"
    with pytest.raises(OSError, match=match):
        export_for_serving(tiny(), folder, version=2)
    assert {path.name for path in folder.rglob("*")} <= {
        *("1", "saved_model.pb", "models.config")
    }
    assert (folder / "1" / "saved_model.pb").read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a writer")
def test_files_of_killed_exports_are_removed(tmp_path):
    folder = tmp_path / "model"
    with saved_model.appearing_folder(
        folder / "3"
    ) as running:  # another export, still running
        (running / "part").write_text("half")
        reads, writes = os.pipe()
        killed = os.fork()
        if killed == 0:
            with saved_model.appearing_folder(folder / "1") as left:
                (left / "part").write_text("half")
                os.write(writes, b"!")
                signal.pause()
        assert os.read(reads, 1) == b"!"
        hidden = {path.name for path in folder.iterdir()}
        with saved_model.appearing_folder(folder / "2"):  # while the other runs
            assert hidden < {path.name for path in folder.iterdir()}
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        os.close(reads), os.close(writes)
        # A folder of an older version, without a lock, is removed; a folder
        # of a user is kept.
        (folder / ".7.0123abcd").mkdir()
        (folder / ".7.mine").mkdir()
        with saved_model.appearing_folder(folder / "4"):
            pass
        names = {running.name, f"{running.name}.lock", ".7.mine", "2", "4"}
        assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in folder.iterdir()} == {
        *("2", "3", "4", ".7.mine")
    }
    assert (folder / "3" / "part").read_text() == "half"


def test_a_wrong_stream_is_refused(tmp_path, monkeypatch):
    initial = streaming._initial_states

    def shifted(calls, batch, steps):
        states = initial(calls, batch, steps)
        traced = tf.is_symbolic_tensor(batch)
        return [state + traced * 1.0 for state in states]

    monkeypatch.setattr(streaming, "_initial_states", shifted)
    with pytest.raises(RuntimeError, match="signature `step`.*difference of"):
        export_for_serving(tiny(), tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "take_apart", failing)  # fails if work starts
    file = tmp_path / "file"
    file.write_text("in the way")
    for folder in (file, file / "below"):
        with pytest.raises(OSError, match="`folder` must be .*file"):
            export_for_serving(tiny(), folder)
    assert file.read_text() == "in the way"

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", denied)
    with pytest.raises(OSError, match="`folder` must be .*Permission denied"):
        export_for_serving(tiny(), tmp_path / "model")


@pytest.mark.parametrize("version", [0, -1, 1.5, "1", None, True, 2**63])
def test_versions_are_positive_integers(version, tmp_path):
    with pytest.raises(ValueError, match="`version` must be an integer"):
        export_for_serving(tiny(), tmp_path, version=version)


def test_empty_batches_are_served(tmp_path):
    model = sequential(keras.layers.Masking(), rnn(keras.layers.LSTM))
    path = export_for_serving(model, tmp_path / "model", warm_up=())
    signatures, none = load(path), np.zeros((0, 3, 5), "float32")
    whole = run(signatures["serving_default"], inputs=none)["outputs"]
    assert whole.shape == none[:, :, :3].shape
    outputs, states = stream(signatures, none)
    assert outputs[-1].shape == (0, 3)
    assert {state.shape for state in states.values()} == {(0, 3)}


def test_versions_may_be_timestamps(tmp_path):
    version = 20261129150725000
    path = export_for_serving(tiny(), tmp_path, version=version, name="a")
    assert path.name == str(version) and set(load(path)) == SIGNATURES


def test_arguments_are_checked_before_any_work(tmp_path, monkeypatch):
    whole = tiny()

    def refused(error, match, model=whole, folder=tmp_path / "model", **kwargs):
        with pytest.raises(error, match=match):
            export_for_serving(model, folder, **kwargs)

    refused(TypeError, "`model` must be a Keras model", model=len)
    refused(ValueError, "must be built", model=ntm())
    refused(ValueError, "must be built", model=keras.Sequential([ntm()]))
    refused(TypeError, "`model` must be a Keras.*model=None", model=None)
    refused(ValueError, "`folder` must be a path.*folder=None", folder=None)
    refused(ValueError, "`folder` must be a path.*folder=3", folder=3)
    refused(ValueError, "`name` must be letters", name='a"b')
    refused(ValueError, "`name` must be letters.*name=3", name=3)
    for pairs in (None, 3, (1, 2), [(1,)], [(1, 2, 3)], "text", [None]):
        refused(ValueError, "`warm_up` must be pairs", warm_up=pairs)
    refused(ValueError, "warm_up batch size", warm_up=[("a", 1)])
    refused(ValueError, "warm_up batch size", warm_up=[(True, 1)])
    refused(ValueError, "`exact_search` must be True", exact_search=None)
    refused(ValueError, "`name` must be letters", folder=tmp_path / "a b")
    refused(ValueError, "`warm_up` must have at most", warm_up=[(1, 1)] * 334)
    refused(ValueError, "warm_up batch size", warm_up=[(0, 1)])
    refused(ValueError, "warm_up time steps", warm_up=[(1, 0.5)])
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    refused(RuntimeError, "KERAS_BACKEND=tensorflow.*KERAS_BACKEND=jax")
    assert not list(tmp_path.iterdir())


def test_a_model_of_unknown_input_shape_is_refused(tmp_path):
    class Two(keras.Model):
        def build(self, shapes):
            self.out = keras.layers.Dense(2)
            self.out.build(shapes[0])

        def call(self, inputs):
            return self.out(inputs[0]) + self.out(inputs[1])

    model = Two()
    model([random(2, 5), random(2, 5)])
    with pytest.raises(ValueError, match="one input of known shape"):
        export_for_serving(model, tmp_path / "two")
    assert not list((tmp_path / "two").iterdir())
