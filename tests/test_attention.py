"""Causal attention, attention to a memory, and relative positions."""

import harness
import keras
import numpy as np
import pytest
import reference_attention
from catalogue import few_backends_unless
from catalogue import slow_unless
from harness import close
from keras import ops

from keras_memory import CausalAttention
from keras_memory import KNNAttention
from keras_memory import RelativePositionBias

pytestmark = pytest.mark.every_backend
SEGMENTS = 3, 5, 7  # batch, tokens, width
PLAIN = "plain", "latest"
LAYERS = {
    "plain": (CausalAttention, {}),
    "latest": (CausalAttention, {"xl_size": 11}),
    "gate": (KNNAttention, {}),
    "informed": (
        KNNAttention,
        {"mixing": "informed_gate", "xl_size": 2, "similarity": "dot"},
    ),
    "joint": (
        KNNAttention,
        {"mixing": "joint_softmax", "multi_query": False, "output_gate": True},
    ),
}
each = pytest.mark.parametrize("name", LAYERS)
# Of checks that hardly depend on the options, the others are slow.
most = pytest.mark.parametrize(
    "name",
    [
        few_backends_unless(n == "gate", n)
        if n in ("gate", "latest")
        else slow_unless(False, n)
        for n in LAYERS
    ],
)
remembering = pytest.mark.parametrize(
    "name", [slow_unless(n == "gate", n) for n in LAYERS if n not in PLAIN]
)


def made(name, **more):
    """A layer with weights away from their initial values."""
    layer_class, kwargs = LAYERS[name]
    if layer_class is KNNAttention:
        kwargs = {"memory_size": 13, "top_k": 3, **kwargs}
    kwargs = {"num_heads": 2, "key_dim": 5, "value_dim": 3, **kwargs}
    layer = layer_class(**{"return_state": True, **kwargs, **more})
    layer.build(SEGMENTS)
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        near = ops.convert_to_numpy(weight)
        weight.assign(near + rng.normal(size=weight.shape, scale=0.5))
    return layer


def segments(number=1, seed=0, shape=SEGMENTS):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, *shape)).astype("float32")
    return x if number > 1 else x[0]


def numpy_state(state):
    return type(state)(
        *(None if p is None else ops.convert_to_numpy(p) for p in state)
    )


@pytest.fixture
def in_float64(monkeypatch):
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy("float32")


def of_oracle(layer):
    """Weights and options of a layer for `reference_attention`."""
    weights = {w.path.split("/")[-1]: w.numpy() for w in layer.weights}
    options = {
        "heads": layer.num_heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
        "multi_query": layer.multi_query,
        "xl_size": layer.xl_size,
        "memory": isinstance(layer, KNNAttention),
    }
    if options["memory"]:
        names = "memory_size", "top_k", "mixing", "similarity"
        options |= {name: getattr(layer, name) for name in names}
    return weights, options


@harness.needs_tensorflow
@each
def test_the_oracle_attends_alike(name, in_float64):
    """Over segments with padding and documents, until the memory is full."""
    few = RelativePositionBias(2, num_buckets=4, max_distance=7)
    layer = made(name, position_bias=few)
    weights, options = of_oracle(layer)
    options["max_distance"] = 7
    state = expected_state = None
    rng = np.random.default_rng(2)
    for number, x in enumerate(segments(6).astype("float64")):
        mask = rng.random(SEGMENTS[:2]) < 0.7
        clear = rng.random(SEGMENTS[:2]) < 0.1 if number in (1, 2) else None
        outputs, state = layer(x, state, mask=mask, clear=clear)
        expected, expected_state = reference_attention.attention(
            weights, x, expected_state, mask=mask, clear=clear, **options
        )
        close(outputs.numpy()[mask], expected[mask], 1e-9)
    for row, expected in enumerate(expected_state):
        assert state.xl_count[row] == len(expected["xl"])
        for place, (key, value) in enumerate(reversed(expected["xl"]), 1):
            close(state.xl_keys[row, :, -place], key, 1e-9)
            close(state.xl_values[row, :, -place], value, 1e-9)
        for age, (key, value) in enumerate(reversed(expected["memory"])):
            slot = (int(state.memory_count[row]) - 1 - age) % layer.memory_size
            close(state.memory_keys[row, :, slot], key, 1e-9)
            close(state.memory_values[row, :, slot], value, 1e-9)


@harness.needs_tensorflow
@each
def test_the_oracle_has_the_same_gradients(name, in_float64):
    import tensorflow as tf

    few = RelativePositionBias(2, num_buckets=4, max_distance=7)
    layer = made(name, position_bias=few)
    weights, options = of_oracle(layer)
    options["max_distance"] = 7
    before, x = segments(2).astype("float64")
    _, state = layer(before)
    _, expected_state = reference_attention.attention(
        weights, before, **options
    )
    upstream = np.random.default_rng(3).normal(size=(*SEGMENTS[:2], 7))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, initial_state=state)[0] * upstream)
    rng = np.random.default_rng(4)
    weights_of = layer.trainable_variables
    for weight, grad in zip(weights_of, tape.gradient(loss, weights_of)):
        direction = rng.normal(size=weight.shape)
        expected = reference_attention.directional_derivative(
            weights,
            x,
            expected_state,
            upstream,
            {weight.path.split("/")[-1]: direction},
            **options,
        )
        found = np.sum(tf.convert_to_tensor(grad).numpy() * direction)
        close(found, expected, 1e-8)


@harness.needs_tensorflow
@pytest.mark.parametrize("number", "ab")
def test_golden_of_attention(number, in_float64):
    arrays, weights, meta = harness.golden(f"mt__attention_{number}")
    layer = like_reference(CausalAttention, weights, meta, arrays)
    layer.output_bias.assign(weights["to_out.bias"])
    state = state_of_golden(layer, arrays)
    outputs, after = layer(arrays["x"], initial_state=state)
    close(outputs, arrays["output"], 1e-9)
    if "new_xl_memory" in arrays:
        close(after.xl_keys[:, 0], arrays["new_xl_memory"][:, :, 0], 1e-9)
        close(after.xl_values[:, 0], arrays["new_xl_memory"][:, :, 1], 1e-9)


@harness.needs_tensorflow
@pytest.mark.parametrize("number", "ab")
def test_golden_of_attention_to_a_memory(number, in_float64):
    arrays, weights, meta = harness.golden(f"mt__knn_attention_{number}")
    layer = like_reference(
        KNNAttention,
        weights,
        meta,
        arrays,
        memory_size=31,
        top_k=arrays["retrieved_kv"].shape[3],
        mixing="joint_softmax",
        output_gate="output_gate" in weights,
    )
    layer.log_scale.assign(weights["scale"][:, 0, 0])
    if layer.output_gate:
        layer.gate_of_output.assign(weights["output_gate"][0])
    state = state_of_golden(layer, arrays)
    outputs, after = layer(arrays["x"], initial_state=state)
    close(outputs, arrays["output"], 1e-9)
    expected = arrays["knn_memory_after"]
    number = expected.shape[1]
    close(after.memory_count, [number] * len(expected), 0)
    close(after.memory_keys[:, 0, :number], expected[:, :, 0], 1e-9)
    close(after.memory_values[:, 0, :number], expected[:, :, 1], 1e-9)


def like_reference(layer_class, weights, meta, arrays, **more):
    """A layer with the weights of a golden file."""
    heads = meta["settings"]["heads"] if "settings" in meta else meta["heads"]
    key_dim = len(weights["to_kv.weight"]) // 2
    layer = layer_class(
        heads,
        key_dim,
        xl_size=arrays["new_xl_memory"].shape[1]
        if "new_xl_memory" in arrays
        else 0,
        position_bias=None,
        use_output_bias=layer_class is CausalAttention,
        return_state=True,
        **more,
    )
    layer.build(arrays["x"].shape)
    key_value = weights["to_kv.weight"].T
    layer.query_kernel.assign(weights["to_q.weight"].T)
    layer.key_kernel.assign(key_value[:, :key_dim])
    layer.value_kernel.assign(key_value[:, key_dim:])
    layer.output_kernel.assign(weights["to_out.weight"].T)
    if "rel_pos_bias" in arrays:  # of the keys that are there
        bias = arrays["rel_pos_bias"]
        absent = layer.xl_size - arrays["xl_memory"].shape[1]
        bias = np.pad(bias, [(0, 0), (0, 0), (0, 0), (absent, 0)])
        layer._distance_bias = lambda *_: bias
    return layer


def state_of_golden(layer, arrays):
    state = layer.get_initial_state(len(arrays["x"]))
    if "xl_memory" in arrays:
        before = arrays["xl_memory"]  # (B, n, 2, D)
        number = before.shape[1]
        padded = np.pad(
            before, [(0, 0), (layer.xl_size - number, 0), (0, 0), (0, 0)]
        )
        state = state._replace(
            xl_keys=padded[:, None, :, 0],
            xl_values=padded[:, None, :, 1],
            xl_count=np.full(len(before), number, "int32"),
        )
    if "knn_memory_before" in arrays:
        before = arrays["knn_memory_before"]
        number = before.shape[1]
        more = [(0, 0), (0, layer.memory_size - number), (0, 0), (0, 0)]
        padded = np.pad(before, more)
        state = state._replace(
            memory_keys=padded[:, None, :, 0],
            memory_values=padded[:, None, :, 1],
            memory_count=np.full(len(before), number, "int32"),
        )
    return state


@harness.needs_tensorflow
@pytest.mark.parametrize("number", "ab")
def test_golden_of_relative_positions(number, in_float64):
    arrays, weights, meta = harness.golden(f"mt__t5_bias_{number}")
    table = weights["relative_attention_bias.weight"]
    layer = RelativePositionBias(
        table.shape[1], len(table), {"a": 128, "b": 20}[number]
    )
    layer.build()
    layer.embeddings.assign({"a": 3.0, "b": 2.0}[number] * table)
    for name, expected in arrays.items():
        if name.startswith("bias_"):
            queries, keys = map(int, name.split("_")[1:])
            # The reference has the queries at the start of the keys.
            shift = np.array([keys - queries], "int32")
            close(layer.of_segment(queries, keys, shift), expected, 1e-12)


@pytest.mark.few_backends
@most
def test_a_later_token_changes_nothing_before_it(name):
    layer, (before, x) = made(name), segments(2)
    _, state = layer(before)
    changed = x.copy()
    changed[:, 3] += 1.0
    a, _ = layer(x, initial_state=state)
    b, _ = layer(changed, initial_state=state)
    close(a[:, :3], b[:, :3], 0)
    assert np.abs(ops.convert_to_numpy(a - b)[:, 3:]).max() > 1e-3


@pytest.mark.few_backends
def test_one_segment_equals_two():
    layer, x = made("latest"), segments(shape=(3, 10, 7))
    whole, after = layer(x)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:], initial_state=state)
    close(ops.concatenate([first, second], axis=1), whole)
    close(state.xl_keys, after.xl_keys)
    close(state.xl_count, [10] * 3, 0)


@pytest.mark.few_backends
def test_biases_are_weights_of_a_constant_input():
    layer, x = made("gate", use_bias=True), segments()
    one = np.ones((*x.shape[:2], 1), "float32")
    wider = made("gate", output_dim=7)
    wider = KNNAttention.from_config(wider.get_config())
    wider.build((3, 5, 8))
    values = {w.path.split("/")[-1]: w for w in layer.weights}
    for weight in wider.weights:
        name = weight.path.split("/")[-1]
        value = ops.convert_to_numpy(values[name])
        if f"{name[:-7]}_bias" in values and name != "gate_bias":
            bias = ops.convert_to_numpy(values[f"{name[:-7]}_bias"])
            value = np.concatenate([value, bias[None]])
        weight.assign(value)
    a, state = layer(x)
    b, other = wider(np.concatenate([x, one], axis=2))
    close(a, b)
    close(state.memory_values, other.memory_values)


@pytest.mark.few_backends
@most
def test_rows_are_independent(name):
    layer, (before, x) = made(name), segments(2)
    _, state = layer(before)
    whole, _ = layer(x, initial_state=state)
    _, state = layer(before[1:2])
    row, _ = layer(x[1:2], initial_state=state)
    close(row, whole[1:2])


@pytest.mark.few_backends
@most
def test_padding_counts_nowhere(name):
    layer, (before, x) = made(name), segments(2)
    mask = np.array([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    _, states = layer(before, mask=mask)
    outputs, after = layer(x, initial_state=states, mask=mask)
    for row, kept in enumerate(mask):
        _, state = layer(before[row : row + 1, kept])
        expected, state = layer(x[row : row + 1, kept], initial_state=state)
        close(ops.convert_to_numpy(outputs)[row, kept], expected[0])
        for a, b in zip(numpy_state(after), numpy_state(state)):
            if "int" in str(a.dtype):
                assert a[row] == b[0]
    poisoned = np.where(mask[..., None], x, np.nan).astype("float32")
    again, _ = layer(poisoned, initial_state=states, mask=mask)
    close(
        ops.convert_to_numpy(again)[mask], ops.convert_to_numpy(outputs)[mask]
    )


@pytest.mark.few_backends
@most
def test_all_padding_changes_no_state(name):
    layer, (before, x) = made(name), segments(2)
    _, state = layer(before)
    outputs, after = layer(
        x, initial_state=state, mask=np.zeros(SEGMENTS[:2], bool)
    )
    assert np.isfinite(ops.convert_to_numpy(outputs)).all()
    for a, b in zip(numpy_state(state), numpy_state(after)):
        close(a, b, 0)


@most
def test_a_document_sees_nothing_older(name):
    layer, (before, x) = made(name), segments(2)
    _, state = layer(before)
    clear = np.zeros(SEGMENTS[:2], bool)
    clear[0, 2] = clear[1, 0] = True
    outputs, after = layer(x, initial_state=state, clear=clear)
    going_on, going_on_state = layer(x, initial_state=state)
    alone, alone_state = layer(x[:1, 2:])
    close(outputs[0, :2], going_on[0, :2])
    close(outputs[0, 2:], alone[0])
    fresh, fresh_state = layer(x[1:2])
    close(outputs[1], fresh[0])
    close(outputs[2], going_on[2])
    for a, *parts in zip(
        numpy_state(after),
        numpy_state(alone_state),
        numpy_state(fresh_state),
        numpy_state(going_on_state),
    ):
        if "int" in str(a.dtype):
            assert list(a) == [parts[0][0], parts[1][0], parts[2][2]]
    # The next segment too.
    first, _ = layer(x, initial_state=after)
    close(first[0], layer(x[:1], initial_state=alone_state)[0][0])
    # Of whole rows.
    rows, _ = layer(x, initial_state=state, clear=[False, True, False])
    close(rows[1], fresh[0])
    close(rows[2], going_on[2])


@pytest.mark.few_backends
@most
def test_a_document_ends(name):
    layer, (before, x) = made(name), segments(2)
    _, state = layer(before)
    ends = np.zeros(SEGMENTS[:2], bool)
    ends[0, 1] = ends[1, -1] = True
    starts = np.roll(ends, 1, axis=1)
    starts[:, 0] = False
    a, after = layer(x, initial_state=state, clear_after=ends)
    b, expected = layer(x, initial_state=state, clear=starts)
    close(a, b)
    counts = {
        n: (
            ops.convert_to_numpy(getattr(after, n)),
            ops.convert_to_numpy(getattr(expected, n)),
        )
        for n in ("xl_count", "memory_count")
        if hasattr(after, n)
    }
    for ours, other in counts.values():
        assert ours[1] == 0
        assert list(ours[[0, 2]]) == list(other[[0, 2]])


@pytest.mark.few_backends
@remembering
def test_the_memory_has_the_newest_tokens(name):
    """A segment may have more tokens than the memory."""
    layer = made(name, memory_size=4)
    x = segments(shape=(3, 9, 7))
    _, state = layer(x)
    xl = layer.xl_size
    close(
        state.memory_count, [9 - xl if 9 - xl < 8 else 4 + (9 - xl) % 4] * 3, 0
    )
    keys = ops.convert_to_numpy(state.memory_keys)  # (B, G, N, D)
    close(np.linalg.norm(keys, axis=3), np.ones(keys.shape[:3]), 1e-5)
    _, key, value = layer._project(ops.convert_to_tensor(x))
    newest = ops.convert_to_numpy(value)[:, :, 9 - xl - 4 : 9 - xl]
    stored = ops.convert_to_numpy(state.memory_values)
    slots = np.arange(9 - xl - 4, 9 - xl) % 4
    close(stored[:, :, slots], newest)


@pytest.mark.few_backends
@remembering
def test_without_writing_the_memory_stays(name):
    layer, (before, x) = made(name), segments(2)
    _, state = layer(before)
    outputs, after = layer(x, initial_state=state, write=False)
    close(outputs, layer(x, initial_state=state)[0])
    for field in ("memory_keys", "memory_values", "memory_count"):
        close(getattr(after, field), getattr(state, field), 0)


@pytest.mark.few_backends
@remembering
def test_an_empty_memory_is_plain_attention(name):
    """Nothing of the memory, and no gate, enters the outputs."""
    layer, x = made(name), segments()
    outputs, _ = layer(x)
    plain = CausalAttention(
        layer.num_heads,
        layer.key_dim,
        layer.value_dim,
        multi_query=layer.multi_query,
        output_gate=layer.output_gate,
    )
    plain.build(SEGMENTS)
    for weight in plain.weights:
        weight.assign(
            next(
                w
                for w in layer.weights
                if w.path.split("/")[1:] == weight.path.split("/")[1:]
            )
        )
    if layer.similarity == "cosine":
        plain._project = layer._project
        plain._logits = layer._logits
    close(plain(x), outputs)


@most
def test_stateful_is_state_in_and_out(name):
    layer = made(name)
    stateful = made(name, stateful=True)
    stateful.set_weights(layer.get_weights())
    state = None
    for x in segments(3):
        expected, state = layer(x, initial_state=state)
        outputs, after = stateful(x)
        close(outputs, expected)
    for a, b in zip(numpy_state(after), numpy_state(state)):
        close(a, b)
    assert stateful.count_params() == layer.count_params()
    stateful.reset_state()
    close(stateful(x)[0], layer(x)[0])


@pytest.mark.few_backends
@most
def test_no_gradient_enters_the_state(name):
    if not harness.TRAINS:
        pytest.skip("not applicable: Keras does not train here")
    layer, (before, x) = made(name), segments(2)

    def loss(before):
        _, state = layer(before)
        outputs, _ = layer(x, initial_state=state)
        return ops.sum(outputs**2)

    assert (harness.gradient(loss, before) == 0).all()


@pytest.mark.few_backends
@most
@pytest.mark.parametrize(
    "policy",
    ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)],
)
def test_16_bits(name, policy):
    layer = made(name, dtype=policy)
    state = None
    for x in segments(3):
        outputs, state = layer(10 * x, initial_state=state)
        assert ops.dtype(outputs) == layer.compute_dtype
        outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
        assert np.isfinite(outputs).all()
    if not harness.TRAINS:
        return
    x = segments()
    x[:, 2] = 0.0  # a token of zeros, and one that is masked
    mask = np.arange(5)[None].repeat(3, 0) < 4

    def loss(x):
        outputs, _ = layer(x, initial_state=state, mask=mask)
        return ops.sum(ops.cast(outputs, "float32")[:, :4] ** 2)

    assert np.isfinite(harness.gradient(loss, x)).all()


@pytest.mark.few_backends
def test_the_mask_of_a_layer_before_counts():
    tokens = np.array([[3, 4, 5, 0], [3, 4, 0, 0]])
    embedding = keras.layers.Embedding(6, 7, mask_zero=True)
    layer = CausalAttention(2, 5, xl_size=8, return_state=True)
    _, state = layer(embedding(tokens))
    _, state = layer(embedding(tokens), initial_state=state)
    close(state.xl_count, [6, 4], 0)


@pytest.mark.few_backends
def test_a_token_enters_the_memories_of_all_heads_or_none():
    layer, x = made("joint", output_gate=False), segments()
    kernel = ops.convert_to_numpy(layer.value_kernel)
    kernel[0, -1] = 1e15  # of the second head
    layer.value_kernel.assign(kernel)
    x[:, :, 0] = 0.0
    x[0, 2, 0] = 100.0
    _, state = layer(x)
    close(state.memory_count, [4, 5, 5], 0)
    keys = np.linalg.norm(ops.convert_to_numpy(state.memory_keys), axis=3)
    close(keys[0, :, :5], [[1, 1, 1, 1, 0]] * 2, 1e-5)


@pytest.mark.few_backends
@pytest.mark.parametrize("name", ["gate", "joint"])
def test_one_token_and_one_neighbor(name):
    """Keras warns about a softmax over one entry; warnings are errors."""
    layer = made(name, top_k=1)
    state = None
    for x in segments(3)[:, :, :1]:
        outputs, state = layer(x, initial_state=state)
    assert np.isfinite(ops.convert_to_numpy(outputs)).all()


@pytest.mark.few_backends
@most
def test_zeros_have_finite_gradients(name):
    if not harness.TRAINS:
        pytest.skip("not applicable: Keras does not train here")
    layer = made(name)
    _, state = layer(np.zeros(SEGMENTS, "float32"))

    def loss(x):
        return ops.sum(layer(x, initial_state=state)[0] ** 2)

    for x in (np.zeros(SEGMENTS, "float32"), 1e4 * segments()):
        assert np.isfinite(harness.gradient(loss, x)).all()


@most
def test_in_a_model(name, tmp_path):
    layer = made(name, stateful=True, return_state=False, position_bias="t5")
    model = keras.Sequential(
        [keras.Input(batch_shape=(3, None, 7)), layer, keras.layers.Dense(2)]
    )
    x = segments(4)
    if harness.TRAINS:
        compiles = name == "gate" and harness.BACKEND != "torch"
        model.compile("sgd", "mse", jit_compile=compiles)
        flat = x.reshape(12, 5, 7)
        model.fit(flat, flat[..., :2], batch_size=3, verbose=0, shuffle=False)
    layer.reset_state()
    expected = model(x[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(x[0]), expected, 0)


@pytest.mark.few_backends
def test_layers_share_a_position_bias():
    bias = RelativePositionBias(2, num_buckets=4, max_distance=8)
    layers = [made("plain", position_bias=bias) for _ in range(2)]
    assert layers[0]._bias is layers[1]._bias is bias
    copy = CausalAttention.from_config(layers[0].get_config())
    assert copy.position_bias.num_buckets == 4
    with pytest.raises(ValueError, match="heads of the layer, 3.*num_heads=2"):
        CausalAttention(3, position_bias=bias)


def test_buckets_of_distances():
    bias = RelativePositionBias(1, num_buckets=8, max_distance=32)
    found = bias.buckets(np.array([-3, 0, 1, 3, 4, 6, 7, 11, 12, 19, 31, 99]))
    # 4 (32 / 4)^(k / 4) = 4, 6.7, 11.3, 19.03
    assert ops.convert_to_numpy(found).tolist() == [
        *(0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7)
    ]


@pytest.mark.few_backends
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"xl_size": -1}, "xl_size"),
        ({"mixing": "sum"}, "mixing"),
        ({"top_k": 14}, "top_k=14, memory_size=13"),
        ({"dropout": 1.0}, "dropout"),
        ({"memory_dropout": -0.1}, "memory_dropout"),
        ({"position_bias": "alibi"}, "position_bias='alibi'"),
        ({"similarity": "l2"}, "similarity"),
        ({"memory_dtype": "int8"}, "memory_dtype"),
        ({"search_method": "nearest"}, "search_method"),
        ({"value_dim": 0}, "value_dim"),
    ],
)
def test_arguments_are_checked(kwargs, words):
    kwargs = {"num_heads": 2, "memory_size": 13, "top_k": 3, **kwargs}
    with pytest.raises(ValueError, match=words):
        KNNAttention(**kwargs)


@pytest.mark.few_backends
def test_calls_are_checked():
    layer, x = made("gate"), segments()
    with pytest.raises(ValueError, match="6 tensors: xl_keys"):
        layer(x, initial_state=[x])
    _, state = layer(x)
    with pytest.raises(ValueError, match="initial_state.memory_keys"):
        layer(x, initial_state=state._replace(memory_keys=state.xl_keys))
    with pytest.raises(ValueError, match="`clear`"):
        layer(x, clear=np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="write"):
        layer(x, write=1)
    with pytest.raises(ValueError, match="`initial_state`.*Received: 5"):
        layer(x, initial_state=5)
    with pytest.raises(ValueError, match="`searched` must be a `KNNAtt"):
        layer(x, searched=state[:3])
    with pytest.raises(ValueError, match="searched.memory_keys"):
        layer(x, searched=state._replace(memory_keys=state.xl_keys))
    with pytest.raises(ValueError, match="`shift`"):
        layer(x, shift=np.zeros(1, "int32"))
    stateful = made("gate", stateful=True)
    with pytest.raises(ValueError, match="batch size"):
        stateful(x[:2])
    with pytest.raises(ValueError, match="known batch size"):
        KNNAttention(2, stateful=True).build((None, 5, 7))
