"""The Memorizing Transformer, and its conversion."""

import harness
import keras
import numpy as np
import pytest
from harness import close
from keras import ops

from keras_memory import MemorizingTransformer
from keras_memory import convert

pytestmark = pytest.mark.every_backend
SIZES = {
    "num_tokens": 11,
    "dim": 6,
    "depth": 3,
    "num_heads": 2,
    "key_dim": 4,
    "memory_size": 17,
    "top_k": 3,
    "ff_mult": 2,
}
PAD, START, END = 0, 1, 2


def made(**more):
    model = MemorizingTransformer(**{**SIZES, "stateful": False, **more})
    model.build((2 if model.stateful else None, 5))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        near = ops.convert_to_numpy(weight)
        weight.assign(near + rng.normal(size=weight.shape, scale=0.3))
    return model


def tokens(segments=1, length=5, least=3, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(least, 11, (segments, 2, length))
    return drawn if segments > 1 else drawn[0]


def numbers_of(state):
    return [ops.convert_to_numpy(part) for parts in state for part in parts]


@pytest.fixture
def in_float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@harness.needs_tensorflow
@pytest.mark.parametrize("name", "ab")
def test_golden_over_segments(name, in_float64):
    import tensorflow as tf

    arrays, weights, meta = harness.golden(f"mt__transformer_{name}")
    options = {"a": {"xl_size": 4, "top_k": 3}, "b": {"top_k": 4}}[name]
    model = convert.from_memorizing_transformers(
        weights, memory_size=100, **options
    )
    state, loss = model.create_memories(2), 0.0
    length = arrays["tokens"].shape[1] // 3
    with tf.GradientTape() as tape:
        for number in range(3):
            segment = arrays["tokens"][:, number * length :][:, :length]
            logits, state = model(segment, state=state)
            close(logits, arrays[f"seg{number}.logits"], 1e-9)
            loss += tf.reduce_sum(logits**2)
            labels = arrays[f"seg{number}.labels"]
            model.pad_id = PAD  # only labels are padding there
            found = model._cross_entropy(logits, labels)
            model.pad_id = None
            expected = arrays[f"seg{number}.cross_entropy_ignoring_pad"]
            close(found, expected, 1e-9)
    close(loss, arrays["loss"], 1e-7)
    variables = [
        model.embedding.embeddings,
        model.attentions[1].log_scale,
        model.attentions[1].query_kernel,
        model.attentions[0].output_kernel,
    ]
    names = (
        "token_emb.weight",
        "layers.1.0.fn.scale",
        "layers.1.0.fn.to_q.weight",
        "layers.0.0.fn.to_out.weight",
    )
    for name, grad in zip(names, tape.gradient(loss, variables)):
        grad = tf.convert_to_tensor(grad).numpy()
        expected = arrays[f"grad.{name}"]
        if "to_" in name:
            grad = grad.T
        close(grad.reshape(expected.shape), expected, 1e-9)


@pytest.mark.few_backends
def test_right_positions_after_conversion():
    arrays, weights, _ = harness.golden("mt__transformer_a")
    kwargs = {"memory_size": 9, "top_k": 2, "xl_size": 4}
    model, right = (
        convert.from_memorizing_transformers(
            weights, misplaced_positions=misplaced, **kwargs
        )
        for misplaced in (True, False)
    )
    state, other = model.create_memories(2), right.create_memories(2)
    segment = arrays["tokens"][:, :5]
    a, state = model(segment, state=state)
    b, other = right(segment, state=other)
    close(a, b)  # nothing is before the first segment
    a, _ = model(segment, state=state)
    b, _ = right(segment, state=other)
    assert np.abs(ops.convert_to_numpy(a - b)).max() > 1e-3


@pytest.mark.few_backends
def test_a_model_whose_layers_all_remember_is_converted():
    _, weights, _ = harness.golden("mt__transformer_a")
    weights = {n: w for n, w in weights.items() if "layers.0." not in n}
    weights = {n.replace("layers.1", "layers.0"): w for n, w in weights.items()}
    model = convert.from_memorizing_transformers(
        weights, memory_size=9, top_k=2
    )
    assert model.memorizing_layers == (1,)
    assert model(np.ones((2, 3), int)).shape == (2, 3, 11)


@pytest.mark.few_backends
def test_weights_for_conversion_are_checked():
    _, weights, _ = harness.golden("mt__transformer_a")
    with pytest.raises(ValueError, match="`depth` must be 2"):
        convert.from_memorizing_transformers(weights, depth=3)
    missing = {n: w for n, w in weights.items() if "norm" not in n}
    with pytest.raises(ValueError, match="layers.0.0.norm.bias"):
        convert.from_memorizing_transformers(missing)
    wrong = {**weights, "to_logits.1.bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"to_logits.1.bias.*\(11,\)"):
        convert.from_memorizing_transformers(wrong)


def test_own_memory_is_state_in_and_out():
    model = made()
    own = made(stateful=True)
    own.set_weights(model.get_weights())
    state = model.create_memories(batch_size=2)
    for segment in tokens(3):
        logits, state = model(segment, state=state)
        close(own(segment), logits)
    for a, b in zip(numbers_of(own.states), numbers_of(state)):
        close(a, b)
    own.reset_memory(rows=[True, False])
    counts = ops.convert_to_numpy(own.states[0].memory_count)
    assert list(counts) == [0, 15]
    own.reset_memory()
    assert not any(array.any() for array in numbers_of(own.states))
    assert own.count_params() == model.count_params()


@pytest.mark.few_backends
def test_the_middle_layer_remembers_by_default():
    assert MemorizingTransformer(5, depth=6).memorizing_layers == (3,)
    assert MemorizingTransformer(5, depth=1).memorizing_layers == (1,)
    assert made(memorizing_layers=(3, 1)).memorizing_layers == (1, 3)
    model = made(memorizing_layers=range(2, 4))
    assert model.get_config()["memorizing_layers"] == [2, 3]
    assert made(memorizing_layers=np.array([2])).memorizing_layers == (2,)


@pytest.mark.few_backends
def test_documents_start_and_end():
    model = made(
        xl_size=3,
        pad_id=PAD,
        clear_on_token=START,
        clear_on_end_token=END,
        memorizing_layers=(1, 3),
    )
    before, segment = tokens(2)
    _, state = model(before, state=model.create_memories(2))
    segment = segment.copy()
    segment[0, 2] = START
    segment[1, 1] = END
    logits, after = model(segment, state=state)
    empty = model.create_memories(1)
    for row, start in ((0, 2), (1, 2)):
        expected, alone = model(segment[row : row + 1, start:], state=empty)
        close(logits[row, start:], expected[0])
        for a, b in zip(numbers_of(after), numbers_of(alone)):
            if "int" in str(a.dtype):
                assert a[row] == b[0]
    # An end empties the memory, also in front of padding.
    segment[0, 2:] = [4, 5, END]
    segment[1, 2:] = [END, PAD, PAD]
    _, after = model(segment, state=state)
    for part in after:
        for name, value in part._asdict().items():
            if value is not None and "count" in name:
                assert list(ops.convert_to_numpy(value)) == [0, 0]


@pytest.mark.few_backends
def test_padding_is_neither_remembered_nor_scored():
    model = made(pad_id=PAD, xl_size=2)
    segment = tokens(length=6)
    padded = np.insert(segment, [0, 3, 6], PAD, axis=1)
    state = model.create_memories(2)
    logits, after = model(segment, state=state)
    found, other = model(padded, state=state)
    kept = [1, 2, 3, 5, 6, 7]
    close(ops.convert_to_numpy(found)[:, kept], logits)
    for a, b in zip(numbers_of(after), numbers_of(other)):
        close(a, b)
    labels = np.roll(segment, -1, axis=1)
    labels[:, -1] = PAD
    loss, _ = model(segment, state=state, labels=labels)
    logs = ops.convert_to_numpy(ops.log_softmax(logits))
    right = np.take_along_axis(logs, labels[..., None], axis=2)[:, :-1]
    close(loss, -right.mean(), 1e-5)
    if harness.TRAINS:
        keras_loss = keras.losses.SparseCategoricalCrossentropy(True)
        model.compile("sgd", keras_loss, jit_compile=False)
        found = model.evaluate(segment, labels, batch_size=2, verbose=0)
        close(found, -right.mean(), 1e-5)


def test_evaluation_leaves_the_memory():
    if not harness.TRAINS:
        pytest.skip("not applicable: Keras does not train here")
    options = {"depth": 1, "xl_size": 2}
    model = made(stateful=True, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=False)
    x = tokens(4).reshape(8, 5)
    data = {"batch_size": 2, "verbose": 0}
    empty = model.evaluate(x, x, **data)
    model.fit(
        *(x, x),
        shuffle=False,
        validation_data=(x, x),
        validation_batch_size=2,
        **data,
    )
    before = numbers_of(model.states)
    assert before[5].tolist() != [0, 0]
    first = model.evaluate(x, x, **data)
    assert first != empty
    assert model.evaluate(x, x, **data) == first
    own = model.evaluate(x, x, write=False, **data)
    assert own != first
    assert model.evaluate(x, x, write=False, **data) == own
    assert model.evaluate(x, x, **data) == first
    for a, b in zip(numbers_of(model.states), before):
        close(a, b, 0)
    # Equal to going through the documents by hand, from an empty memory.
    by_hand = made(**options)
    by_hand.set_weights(model.get_weights())
    state, losses = by_hand.create_memories(2), []
    for segment in x.reshape(4, 2, 5):
        value, state = by_hand(segment, state=state, labels=segment)
        losses.append(float(value))
    close(first, np.mean(losses), 1e-5)


@pytest.mark.few_backends
def test_files_have_the_memory_on_demand(tmp_path):
    model = made(stateful=True)
    for segment in tokens(2):
        model(segment)
    expected = model(tokens(seed=5), write=False)
    model.save(tmp_path / "without.keras")
    model.save(tmp_path / "with.keras", memory=True)
    loaded = keras.models.load_model(tmp_path / "with.keras")
    for a, b in zip(numbers_of(loaded.states), numbers_of(model.states)):
        close(a, b, 0)
    loaded = keras.models.load_model(tmp_path / "without.keras")
    assert not any(array.any() for array in numbers_of(loaded.states))
    assert list(loaded.get_config()) == list(model.get_config())
    assert expected.shape == (2, 5, 11)


@pytest.mark.few_backends
def test_a_layer_searches_the_memory_above():
    layers = {"depth": 2, "memorizing_layers": (1, 2)}
    model, shifted = made(**layers), made(shift_memories_down=1, **layers)
    shifted.set_weights(model.get_weights())
    before, segment = tokens(2)
    _, state = model(before, state=model.create_memories(2))
    _, same = shifted(before, state=model.create_memories(2))
    for a, b in zip(numbers_of(state), numbers_of(same)):
        close(a, b, 0)  # nothing was found yet
    swapped = tuple(
        part._replace(
            memory_keys=other.memory_keys,
            memory_values=other.memory_values,
            memory_count=other.memory_count,
        )
        for part, other in zip(state, state[::-1])
    )
    found, after = shifted(segment, state=state)
    expected, _ = model(segment, state=swapped)
    close(found, expected)
    close(after[0].memory_keys[:, :, :5], state[0].memory_keys[:, :, :5], 0)


@pytest.mark.few_backends
def test_a_layer_has_the_latest_tokens_of_the_layer_above():
    options = {"xl_size": 4, "xl_layers": (2, 3)}
    model, shifted = made(**options), made(shift_xl_down=1, **options)
    shifted.set_weights(model.get_weights())
    before, segment = tokens(2)
    _, state = model(before, state=model.create_memories(2))
    names = "xl_keys", "xl_values", "xl_count"
    swapped = [
        state[0],
        *(
            part._replace(**{name: getattr(other, name) for name in names})
            for part, other in ((state[1], state[2]), (state[2], state[1]))
        ),
    ]
    found, _ = shifted(segment, state=state)
    expected, _ = model(segment, state=swapped)
    close(found, expected)


@pytest.mark.few_backends
@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["informed_gate", "joint_softmax"])
def test_it_learns(mixing):
    """To repeat, from memory, what the segment before had."""
    if not harness.TRAINS:
        pytest.skip("not applicable: Keras does not train here")
    model = MemorizingTransformer(
        **{**SIZES, "dim": 16, "depth": 1, "memorizing_layers": 1},
        mixing=mixing,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    x = np.repeat(tokens(2).reshape(4, 5), 2, axis=0)
    history = model.fit(
        *(x, x), batch_size=2, epochs=5, verbose=0, shuffle=False
    ).history["loss"]
    assert history[-1] < history[0]
    assert np.isfinite(history).all()


@pytest.mark.few_backends
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"memorizing_layers": (1, 1)}, "each once"),
        ({"memorizing_layers": 4}, "from 1 to `depth`, 3.*=4"),
        ({"memorizing_layers": 0}, "memorizing_layers=0"),
        ({"memorizing_layers": (1.5,)}, "1.5"),
        ({"xl_size": 2, "xl_layers": (5,)}, "xl_layers"),
        ({"pad_id": 11}, "pad_id"),
        ({"clear_on_token": -1}, "clear_on_token"),
        ({"pad_id": 1, "clear_on_end_token": 1}, "`pad_id` must differ"),
        ({"depth": 0}, "depth"),
        ({"ff_dropout": 1.0}, "ff_dropout"),
        ({"top_k": 18}, "top_k=18, memory_size=17"),
        ({"shift_memories_down": -1}, "shift_memories_down"),
    ],
)
def test_arguments_are_checked(kwargs, words):
    with pytest.raises(ValueError, match=words):
        MemorizingTransformer(**{**SIZES, **kwargs})


@pytest.mark.few_backends
def test_calls_are_checked():
    model = made(stateful=True)
    with pytest.raises(ValueError, match="`tokens` must be"):
        model(np.zeros((2, 5), "float32"))
    with pytest.raises(ValueError, match="batch size"):
        model(tokens()[:1])
    with pytest.raises(ValueError, match="one state for each block, 3.*: 2"):
        model(tokens(), state=model.create_memories(2)[:2])
    with pytest.raises(ValueError, match="`labels`"):
        model(tokens(), labels=tokens()[:, :3])
    with pytest.raises(ValueError, match="known batch size"):
        MemorizingTransformer(**SIZES).build((None, 5))
    with pytest.raises(ValueError, match="of its own.*stateful=False"):
        made().save("model.keras", memory=True)
