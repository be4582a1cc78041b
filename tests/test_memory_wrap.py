"""Tests of the layers of Memory Wrap and of their classifier."""

import harness
import keras
import numpy as np
import pytest
from catalogue import LAYERS
from catalogue import WRAPS
from catalogue import name_of
from catalogue import slow_unless
from harness import close
from keras import ops

import keras_memory
from keras_memory import convert
from keras_memory import memory_wrap
from keras_memory.inspection import explanations
from keras_memory.memory_wrap import BaselineMemory
from keras_memory.memory_wrap import MemoryWrapLayer
from keras_memory.memory_wrap_classifier import MemoryWrapClassifier
from keras_memory.retrieval import exact
from keras_memory.retrieval import examples
from keras_memory.retrieval.knn_memory import KNNMemory

pytestmark = pytest.mark.every_backend

each_wrap = pytest.mark.parametrize("case", WRAPS, ids=name_of)
each_distance = pytest.mark.parametrize("distance", memory_wrap.SIMILARITIES)
both_layers = pytest.mark.parametrize(
    "layer_class", [MemoryWrapLayer, BaselineMemory]
)
trains = pytest.mark.skipif(
    not harness.TRAINS, reason="Keras does not train on NumPy"
)


# The paper, in NumPy, one input at a time.


def sparsemax(z):
    ranked = np.sort(z)[::-1]
    sums = np.cumsum(ranked)
    count = np.count_nonzero(1 + np.arange(1, len(z) + 1) * ranked > sums)
    return np.maximum(z - (sums[count - 1] - 1) / count, 0)


def distance_of(one, other, distance):
    if distance == "l2":
        return ((one - other) ** 2).sum()
    if distance == "dot":
        return -(one @ other)
    norms = [np.sqrt(x @ x + 1e-6) for x in (one, other)]
    return 1 - one @ other / np.prod(norms)


def content_weights(encoding, memory, distance):
    return sparsemax(
        -np.array([distance_of(encoding, row, distance) for row in memory])
    )


# Checks of every layer.


@each_wrap
def test_a_config_restores_the_layer(case):
    harness.config_round_trip(case)


@pytest.mark.few_backends
@each_wrap
def test_a_file_restores_the_layer(case, tmp_path):
    harness.file_round_trip(case, tmp_path)


@pytest.mark.few_backends
@each_wrap
def test_a_clone_equals_its_original(case):
    harness.clone(case)


@pytest.mark.few_backends
@each_wrap
@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float16"]
)
def test_mixed_precision_is_close_to_float32(policy, case):
    harness.mixed_precision(case, policy)


@each_wrap
def test_shapes_are_those_declared(case):
    x = harness.inputs_of(case)
    layer = harness.built(case)
    for more in ({}, {"return_weights": True}):
        eager = keras.tree.flatten(layer(x, **more))
        symbolic = keras.tree.flatten(layer(case.entry(), **more))
        assert len(eager) == len(symbolic)
        for one, other in zip(eager, symbolic):
            assert ops.dtype(one) == other.dtype
            assert len(one.shape) == len(other.shape)
            assert all(n in (None, m) for n, m in zip(other.shape, one.shape))
        assert tuple(eager[0].shape) == (3, 3)
    if not isinstance(layer, keras.Model):
        assert layer.compute_output_shape([(3, 5), (7, 5)]) == (3, 3)
    weights = ops.convert_to_numpy(eager[1])
    assert (weights >= 0).all()
    close(weights.sum(axis=1), np.ones(3, weights.dtype))
    assert 0 < np.count_nonzero(weights == 0)  # the weights are sparse


@trains
@pytest.mark.parametrize(
    ("jit_compile", "case"),
    [
        slow_unless(case in LAYERS or not jit_compile, jit_compile, case)
        for jit_compile in (False, True)
        for case in WRAPS
    ],
    ids=name_of,
)
def test_a_training_step_changes_all_trainable_weights(jit_compile, case):
    if harness.BACKEND == "torch" and jit_compile:
        pytest.skip("not run: torch.compile takes half a minute")
    layer = harness.built(case)
    model = harness.compiled(
        harness.model_of(layer, case), "sgd", "mse", jit_compile=jit_compile
    )
    x = [0.3 * one for one in harness.inputs_of(case)]  # for wide supports
    before = [ops.convert_to_numpy(w) for w in model.weights]
    for _ in range(2):
        assert np.isfinite(model.train_on_batch(x, np.ones((3, 3))))
    for weight, old in zip(model.weights, before):
        moved = (ops.convert_to_numpy(weight) != old).any()
        assert moved == weight.trainable, weight.path


# The reference implementation, and the paper in NumPy.


def gradients(function, *arrays):
    import tensorflow as tf

    arrays = [tf.constant(a) for a in arrays]
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        result = function(*arrays)
    return tape.gradient(result, arrays)


@harness.needs_tensorflow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["a", "b_linear_classifier"])
@both_layers
@each_distance
def test_outputs_and_gradients_equal_memorywrap(
    distance, layer_class, name, training
):
    import tensorflow as tf

    golden, arrays, _ = harness.golden(f"memorywrap__{name}")
    of = layer_class.__name__
    weights = {
        key.removeprefix(f"{of}.w."): value
        for key, value in golden.items()
        if key.startswith(f"{of}.w.")
    }
    layer = convert.from_memorywrap(
        weights, of == "BaselineMemory", similarity=distance, dtype="float64"
    )
    assert type(layer) is layer_class

    @tf.function(jit_compile=training)
    def call(encodings, memory):
        variables = layer.trainable_variables
        inputs = [encodings, memory]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs, found = layer(
                inputs, return_weights=True, training=training
            )
            loss = tf.reduce_sum(outputs**2)
        return outputs, found, loss, tape.gradient(loss, inputs + variables)

    encodings, memory = golden["encoder_output"], golden["memory_set"]
    outputs, found, loss, slopes = call(
        tf.constant(encodings), tf.constant(memory)
    )
    expected = {
        key.removeprefix(f"{of}.{distance}."): value
        for key, value in golden.items()
        if key.startswith(f"{of}.{distance}.")
    }
    close(outputs, expected["output"], 1e-9)
    close(found, expected["content_weights"], 1e-9)
    close(found.numpy() @ memory, expected["memory_vector"], 1e-9)
    close(loss, expected["loss"], 1e-9)
    names = ["encoder_output", "memory_set", *weights]
    assert len(names) == len(slopes)
    for one, slope in zip(names, slopes):
        slope = tf.transpose(slope) if one.endswith(".weight") else slope
        close(slope, expected[f"grad.{one}"], 1e-9)
    for index, row in enumerate(encodings):  # checks our oracle, too
        close(found[index], content_weights(row, memory, distance), 1e-9)


@each_distance
@pytest.mark.parametrize("head", [None, "dense", keras.layers.Dense])
def test_the_layer_equals_the_paper(head, distance):
    rng = np.random.default_rng(7)
    make = head if head in (None, "dense") else head(2, "tanh")
    layer = MemoryWrapLayer(3, head=make, similarity=distance)
    encodings, memory = rng.normal(size=(2, 5)), rng.normal(size=(11, 5))
    layer.build([(2, 5), (11, 5)])
    rng = np.random.default_rng(5)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    weights = [ops.convert_to_numpy(w) for w in layer.trainable_weights]
    kernels = list(weights)

    def projected(x):
        if head is None:
            return x
        kernel, bias = kernels[0], kernels[1]
        x = x @ kernel + bias
        return x if head == "dense" else np.tanh(x)

    first, first_bias, last, last_bias = kernels[2 if head else 0 :]
    outputs, found = layer([encodings, memory], return_weights=True)
    for row, encoding in enumerate(encodings):
        w = content_weights(projected(encoding), projected(memory), distance)
        close(found[row], w.astype("float32"), 1e-5)
        features = np.concatenate([encoding, w @ memory])
        hidden = np.maximum(features @ first + first_bias, 0)
        close(outputs[row], (hidden @ last + last_bias).astype("float32"), 1e-4)


def test_default_classifiers_have_the_sizes_of_the_paper():
    shapes = {
        MemoryWrapLayer: [(14, 28), (28, 3)],
        BaselineMemory: [(7, 14), (14, 3)],
    }
    for layer_class, expected in shapes.items():
        layer = layer_class(3)
        layer.build([(2, 7), (5, 7)])
        kernels = [w.shape for w in layer.weights if len(w.shape) == 2]
        assert kernels == expected


@each_wrap
def test_keywords_and_a_memory_for_each_input_give_the_same(case):
    encodings, memory = harness.inputs_of(case)
    layer = harness.built(case)
    if isinstance(layer, keras.Model):
        layer = layer.memory_layer
        width = layer._width
        encodings, memory = encodings[:, :width], memory[:, :width]
    expected = keras.tree.flatten(
        layer([encodings, memory], return_weights=True)
    )
    by_name = layer(
        encodings=encodings, memory_encodings=memory, return_weights=True
    )
    each = np.stack([memory, memory[::-1], memory])
    of_each = layer([encodings, each], return_weights=True)
    turned = layer([encodings, memory[::-1]], return_weights=True)
    for one, other, several, of_turned in zip(
        expected, by_name, of_each, turned
    ):
        close(other, one, 0)
        close(several[0], one[0])
        close(several[1], of_turned[1])


# Options.


@both_layers
@each_distance
def test_masking_equals_removing(layer_class, distance):
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(2, 5)), rng.normal(size=(7, 5))
    counts = np.array([True, False, True, True, False, False, True])
    for top_k in (None, 2, 5):
        layer = layer_class(3, similarity=distance, top_k=top_k)
        expected = layer([encodings, memory[counts]])
        poisoned = np.where(counts[:, None], memory, 1e3)
        for mask in (counts, np.stack([counts] * 2)):
            close(layer([encodings, poisoned], memory_mask=mask), expected)
        layer.set_memory(poisoned)
        close(layer(encodings, memory_mask=counts), expected)
        # Each row has its own mask; one row masks all examples.
        masks = np.stack([counts, np.zeros(7, bool)])
        mixed, weights = layer(
            [encodings, memory], memory_mask=masks, return_weights=True
        )[:2]
        close(mixed[0], expected[0])
        assert (ops.convert_to_numpy(weights)[1] == 0).all()
        nothing = layer([encodings[1:], 0 * memory[:1]])
        close(mixed[1:], nothing)


@each_distance
@pytest.mark.parametrize("block", [4, 100])
def test_top_k_is_exact_where_it_covers_the_support(
    block, distance, monkeypatch
):
    monkeypatch.setattr(exact, "BLOCK", block)
    rng = np.random.default_rng(7)
    scale = 1.0 if distance == "cosine" else 0.5
    encodings = scale * rng.normal(size=(13, 3))
    memory = scale * rng.normal(size=(17, 3))
    layer = MemoryWrapLayer(3, similarity=distance)
    expected, weights = layer([encodings, memory], return_weights=True)
    weights = ops.convert_to_numpy(weights)
    support = np.count_nonzero(weights, axis=1)
    assert 2 <= support.min() < support.max() <= 12
    layer.top_k = int(support.max()) - 1
    for each in (memory, np.stack([memory] * 13)):
        outputs, some, indices = layer([encodings, each], return_weights=True)
        some, indices = map(ops.convert_to_numpy, (some, indices))
        inside = support <= layer.top_k
        assert inside.any() and not inside.all()
        close(outputs[inside], expected[inside])
        every = np.zeros_like(weights)
        np.put_along_axis(every, indices, some, axis=1)
        close(every[inside], weights[inside])
        # Rows whose smallest weight is 0 are exact.
        assert (inside >= (some.min(axis=1) == 0)).all()
        assert np.abs(every - weights)[~inside].max() > 1e-3
    layer.top_k = 1000
    close(layer([encodings, memory]), expected)


@pytest.mark.parametrize(
    "size", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)]
)
def test_knn_candidates_are_exact_where_they_cover_the_support(size):
    """Rows are exact if the candidates found contain the support."""
    rng = np.random.default_rng(7)
    centers = rng.normal(size=(500, 16))
    memory, encodings = (
        (centers[rng.integers(500, size=n)] + 0.3 * rng.normal(size=(n, 16)))
        for n in (size, 101)
    )
    memory, encodings = memory.astype("float32"), encodings.astype("float32")
    knn = KNNMemory(16, size, value_dim=0, background=False)
    knn.add(memory[None])
    found = knn.search(encodings[None], 32)
    layer = MemoryWrapLayer(3, similarity="dot")
    expected, weights = layer([encodings, memory], return_weights=True)
    outputs, some = layer(
        [encodings, found.keys[0]],
        memory_mask=found.mask[0],
        return_weights=True,
    )
    support = ops.convert_to_numpy(weights) > 0
    assert support.sum(axis=1).max() > 1
    inside = np.array(
        [
            np.isin(np.flatnonzero(row), indices).all()
            for row, indices in zip(support, found.indices[0])
        ]
    )
    assert np.mean(inside) > 0.8
    close(outputs[inside], expected[inside], 1e-5)
    some, weights = map(ops.convert_to_numpy, (some, weights))
    every = np.zeros_like(weights)
    np.put_along_axis(every, found.indices[0], some, axis=1)
    close(every[inside], weights[inside], 1e-5)


@pytest.mark.parametrize("block", [4, 100])
def test_top_k_may_exceed_the_unmasked_examples(block, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK", block)
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(3, 5)), rng.normal(size=(11, 5))
    counts = np.isin(np.arange(11), [0, 3, 9])
    layer = MemoryWrapLayer(3, similarity="dot")
    expected = layer([encodings, memory[counts]])
    layer.top_k = 6
    for each in (memory, np.stack([memory] * 3)):
        close(layer([encodings, each], memory_mask=counts), expected)


@harness.needs_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_top_k_works_with_a_memory_of_unknown_size(jit_compile):
    import tensorflow as tf

    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(2, 3, 5)).astype("float32")
    layer = MemoryWrapLayer(3, top_k=7)
    expected = layer([encodings, memory])
    free = tf.TensorSpec((None, 5))

    @tf.function(input_signature=[free, free], jit_compile=jit_compile)
    def call(encodings, memory):
        return layer([encodings, memory])

    close(call(encodings, memory), expected)


def test_l2_is_accurate_far_from_zero():
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(2, 3, 64), scale=0.2)
    layer = MemoryWrapLayer(3, similarity="l2")
    _, expected = layer([encodings, memory], return_weights=True)
    moved = [x + 1024.0 for x in (encodings, memory)]
    moved = [x.astype("float32") for x in moved]
    _, weights = layer(moved, return_weights=True)
    close(weights, expected, 1e-2)  # encodings are rounded
    layer.set_memory(moved[1])
    _, fixed = layer(moved[0], return_weights=True)
    close(fixed, weights)


@harness.needs_tensorflow
@each_distance
def test_gradients_with_top_k_equal_those_without(distance):
    import tensorflow as tf

    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(5, 3)), rng.normal(size=(17, 3))
    layer = MemoryWrapLayer(3, similarity=distance, dtype="float64")

    def loss(encodings, memory):
        return tf.reduce_sum(layer([encodings, memory], training=True) ** 2)

    expected = gradients(loss, encodings, memory)
    layer.top_k = 13
    for one, other in zip(gradients(loss, encodings, memory), expected):
        close(tf.convert_to_tensor(one), other, 1e-9)


@each_wrap
def test_a_fixed_memory_equals_the_same_memory_as_input(case, tmp_path):
    encodings, memory = harness.inputs_of(case)
    layer = harness.built(case)
    expected = keras.tree.flatten(
        layer([encodings, memory], return_weights=True)
    )
    layer.set_memory(memory)
    for one, other in zip(layer(encodings, return_weights=True), expected):
        close(one, other)
    # Files and clones contain the memory.
    entry = keras.Input(encodings.shape[1:])
    model = keras.Model(entry, layer(entry))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(encodings), expected[0])
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    close(copy(encodings), expected[0])
    # Another memory of that size replaces it, also in compiled functions.
    model.predict(encodings, verbose=0)
    layer.set_memory(memory[::-1] / 2)
    changed = layer([encodings, memory[::-1] / 2])
    close(model.predict(encodings, verbose=0), changed)


def changed(layer):
    """Changes all trainable weights, as loading and training do."""
    rng = np.random.default_rng(11)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.5))


@pytest.mark.parametrize("head", [None, "dense"])
@each_distance
@both_layers
def test_a_fixed_memory_follows_the_weights(layer_class, distance, head):
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(3, 5)), rng.normal(size=(6, 5))
    layer = layer_class(3, head=head, similarity=distance)
    layer.build([(3, 5), (6, 5)])
    layer.set_memory(memory)
    before = ops.convert_to_numpy(layer(encodings))
    changed(layer)
    after = layer(encodings)
    close(after, layer([encodings, memory]))
    assert np.abs(ops.convert_to_numpy(after) - before).max() > 0.1


@harness.needs_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiled_answers_follow_weights_and_memory(clusters, jit_compile):
    import tensorflow as tf

    x, _ = clusters
    model = classifier(top_k=9)
    model.set_memory(x[:13])
    answer = tf.function(lambda x: model(x), jit_compile=jit_compile)
    close(answer(x[:7]), model(x[:7]))
    changed(model.memory_layer)
    close(answer(x[:7]), model(x[:7]))
    close(
        answer(x[:7]),
        model.memory_layer([model.encoder(x[:7]), model.encoder(x[:13])]),
    )
    model.set_memory(x[20:33])  # same size
    close(answer(x[:7]), model(x[:7]))
    model.set_memory(x[:20])
    if jit_compile:  # XLA has no errors
        assert np.isnan(answer(x[:7])).all()
    else:
        with pytest.raises(tf.errors.InvalidArgumentError, match="Trace it"):
            answer(x[:7])
    assert np.isfinite(model(x[:7])).all()


@harness.needs_tensorflow
@each_wrap
def test_exports_equal_the_layer(case, tmp_path, recwarn):
    import tensorflow as tf

    encodings, memory = harness.inputs_of(case)
    layer = harness.built(case)
    layer.set_memory(memory)
    keras_memory.export.export_for_serving(layer, tmp_path)
    served = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    close(served(inputs=encodings)["outputs"], layer(encodings))
    assert [w for w in recwarn.list if "export" in str(w.message)] == []


# Extreme numbers.


def reference_weights(encodings, memory, distance):
    """Weights of the float32 numbers, computed in float64."""
    encodings, memory = (
        np.asarray(one, "float32").astype("float64")
        for one in (encodings, memory)
    )
    return np.stack(
        [content_weights(row, memory, distance) for row in encodings]
    )


@pytest.mark.parametrize("far", [1e5, 1e18, 1e30])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_a_far_example_does_not_change_other_distances(masked, top_k, far):
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(17, 5)), rng.normal(size=(23, 5))
    layer = MemoryWrapLayer(3, similarity="l2")
    expected = reference_weights(encodings, memory, "l2")
    with_far = np.concatenate([memory, np.full((1, 5), far)])
    mask = np.arange(24) < 23 if masked else None
    layer.top_k = top_k
    outputs, weights, *indices = layer(
        [encodings, with_far], memory_mask=mask, return_weights=True
    )
    weights = ops.convert_to_numpy(weights)
    if top_k:
        every = np.zeros((17, 24), "float32")
        np.put_along_axis(
            every, ops.convert_to_numpy(indices[0]), weights, axis=1
        )
        weights = every
    close(weights[:, :23], expected.astype("float32"), 1e-5)
    assert (weights[:, 23] == 0).all()
    layer.top_k = None
    close(outputs, layer([encodings, memory]), 1e-5)


@pytest.mark.parametrize("top_k", [None, 7])
def test_weights_are_accurate_in_two_groups_far_apart(top_k):
    rng = np.random.default_rng(7)
    groups = 1e5 * (np.arange(24) % 2)[:, None]
    memory = (rng.normal(size=(24, 5)) + groups).astype("float32")
    encodings = (rng.normal(size=(10, 5)) + groups[:10]).astype("float32")
    layer = MemoryWrapLayer(3, similarity="l2", top_k=top_k)
    expected = reference_weights(encodings, memory, "l2")
    _, weights, *indices = layer([encodings, memory], return_weights=True)
    weights = ops.convert_to_numpy(weights)
    if top_k:
        every = np.zeros((10, 24), "float32")
        np.put_along_axis(
            every, ops.convert_to_numpy(indices[0]), weights, axis=1
        )
        weights = every
    close(weights, expected.astype("float32"), 1e-4)


@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize("top_k", [None, 9])
def test_far_examples_leave_a_large_memory_accurate(top_k, share, monkeypatch):
    """Products are centered on unmasked examples, however far some are."""
    monkeypatch.setattr(examples, "FEW", 10)
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(2, 150, 5)) + 300
    encodings = encodings[:9]
    memory[::10] = 1e5
    counts = rng.uniform(size=150) >= share
    layer = MemoryWrapLayer(3, similarity="l2", top_k=top_k)
    expected = reference_weights(encodings, memory[counts], "l2")
    for mask in (counts, np.stack([counts] * 9)):
        poisoned = np.where(counts[:, None], memory, 1e30)
        _, weights, *indices = layer(
            [encodings, poisoned], memory_mask=mask, return_weights=True
        )
        weights = ops.convert_to_numpy(weights)
        if top_k:
            every = np.zeros((9, 150), "float32")
            np.put_along_axis(
                every, ops.convert_to_numpy(indices[0]), weights, axis=1
            )
            weights = every
        close(weights[:, counts], expected.astype("float32"), 1e-3)
        assert (weights[:, ~counts] == 0).all()


@harness.needs_tensorflow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("each", [False, True])
@each_distance
def test_masked_examples_reach_no_gradient(distance, each, bad):
    import tensorflow as tf

    rng = np.random.default_rng(7)
    encodings = rng.normal(size=(2, 5)).astype("float32")
    memory = rng.normal(size=(7, 5)).astype("float32")
    counts = np.array([True, False, True, True, False, False, True])
    shown = memory.copy()
    shown[~counts] = bad
    for top_k, head in ((None, None), (3, "dense")):
        layer = MemoryWrapLayer(3, similarity=distance, top_k=top_k, head=head)
        layer.build([(2, 5), (7, 5)])

        def look(memory, mask):
            inputs = [tf.constant(one) for one in (encodings, memory)]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(  # noqa: B023
                    inputs, memory_mask=mask, training=True
                )
            return outputs, *tape.gradient(
                outputs,
                inputs + layer.trainable_weights,  # noqa: B023
            )

        shape = (2, 7, 5) if each else (7, 5)
        expected = look(np.broadcast_to(memory, shape), counts)
        for mask in (counts, np.stack([counts] * 2)):
            found = look(np.broadcast_to(shown, shape), mask)
            for one, other in zip(found, expected):
                close(tf.convert_to_tensor(one), tf.convert_to_tensor(other))
        # The example affects only the inputs that it is not masked for.
        mixed = look(shown, np.stack([counts, counts | True]))
        close(mixed[0][:1], expected[0][:1])
        if not np.isfinite(bad):
            assert np.isnan(mixed[0][1]).all()
        (slope,) = gradients(
            lambda x: layer([x, shown], memory_mask=counts)[0, 0],  # noqa: B023
            encodings,
        )
        assert np.isfinite(slope).all()


def test_unmasked_nan_reaches_the_output():
    rng = np.random.default_rng(7)
    encodings, memory = rng.normal(size=(2, 3, 5))
    encodings[1] = np.nan
    for mask in (None, np.array([True, True, False])):
        for top_k in (None, 2):
            layer = BaselineMemory(3, top_k=top_k, similarity="l2")
            outputs = layer([encodings, memory], memory_mask=mask)
            lost = np.isnan(ops.convert_to_numpy(outputs)).all(axis=1)
            assert (lost == [False, True, False]).all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-11, 1e-3, 0.1, 3.0, 1e18])
def test_cosine_does_not_depend_on_scale(size):
    rng = np.random.default_rng(7)
    directions = rng.normal(size=(11, 5))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = directions[:4] @ directions.T
    queries = ops.convert_to_tensor((size * directions).astype("float32"))
    unit = ops.convert_to_numpy(memory_wrap._unit(queries))
    close(unit[:4] @ unit.T, expected.astype("float32"), 2e-5)
    layer = MemoryWrapLayer(3)
    _, weights = layer(
        [size * directions[:4], directions / size], return_weights=True
    )
    close(
        weights,
        np.stack([sparsemax(row) for row in expected]).astype("float32"),
        1e-4,
    )


@harness.needs_tensorflow
def test_unit_vectors_of_zeros_are_zero():
    import tensorflow as tf

    for size in (0.0, 1e-45, 1e-38):
        x = tf.constant([[size, 0.0, size], [1.0, 2.0, 2.0]])
        with tf.GradientTape() as tape:
            tape.watch(x)
            unit = memory_wrap._unit(x)
            total = tf.reduce_sum(unit[0] * [0.0, 1.0, 1.0] + unit[1])
        slope = tape.gradient(total, x)
        assert np.isfinite(slope).all()
        close(unit[1], np.array([1, 2, 2], "float32") / 3, 1e-5)
        assert size or not np.asarray(unit)[0].any()


@pytest.mark.parametrize("top_k", [None, 2])
@each_distance
def test_an_empty_batch_gives_empty_outputs(distance, top_k):
    layer = MemoryWrapLayer(3, similarity=distance, top_k=top_k)
    memory = np.ones((7, 5), "float32")
    layer([memory[:2], memory])
    call = layer
    if harness.BACKEND == "tensorflow" and (distance, top_k) == ("l2", 2):
        import tensorflow as tf

        call = tf.function(layer, jit_compile=True)
    for mask in (None, np.ones(7, bool), np.ones((0, 7), bool)):
        for memories in (memory, np.ones((0, 7, 5), "float32")):
            outputs, weights, *_ = call(
                [memory[:0], memories], memory_mask=mask, return_weights=True
            )
            assert tuple(outputs.shape) == (0, 3)
            assert tuple(weights.shape) == (0, top_k or 7)


@harness.needs_tensorflow
@both_layers
@each_distance
@pytest.mark.parametrize(
    "dtype", ["float32", "mixed_float16", slow_unless(False, "float16")]
)
def test_singular_inputs_have_finite_gradients(layer_class, distance, dtype):
    import tensorflow as tf

    layer = layer_class(3, similarity=distance, dtype=dtype)
    layer.build([(1, 5), (1, 5)])
    zero, one, large = np.zeros((1, 5)), np.ones((1, 5)), np.full((1, 5), 300.0)
    repeated = np.ones((7, 5))
    for encodings in (zero, one, large):
        for memory in (zero, one, large, repeated, 0 * repeated):

            def loss(encodings, memory):
                outputs = layer([encodings, memory], training=True)
                return tf.reduce_mean(tf.cast(outputs, "float32"))

            arrays = [a.astype("float32") for a in (encodings, memory)]
            for slope in gradients(loss, *arrays):
                assert np.isfinite(slope).all()
            _, weights = layer([encodings, memory], return_weights=True)
            close(weights, np.full((1, len(memory)), 1 / len(memory)), 1e-3)


# Errors.


def refuses(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@both_layers
def test_bad_arguments_are_refused(layer_class):
    for name, value in {
        "similarity": "euclidean",
        "head": "linear",
        "classifier": "dense",
        "top_k": 0,
        "memory_size": 0,
    }.items():
        refuses(lambda: layer_class(3, **{name: value}), name, repr(value))  # noqa: B023
    refuses(lambda: layer_class(0), "units")


def test_bad_shapes_are_refused():
    layer = MemoryWrapLayer(3)
    e, m = np.ones((2, 5)), np.ones((7, 5))
    layer([e, m])
    refuses(lambda: layer(e), "set_memory")
    refuses(lambda: layer([e]), "list of 1")
    refuses(lambda: layer([e, m], memory_encodings=m), "memory_encodings")
    refuses(lambda: layer([e[0], m]), "`encodings`", "(5,)")
    refuses(lambda: layer([e, m[:, :4]]), "`memory_encodings`", "(7, 4)")
    refuses(lambda: layer([e, m[:0]]), "at least one example")
    pair = {"encodings": e, "memory_encodings": m}
    refuses(lambda: MemoryWrapLayer(3)(pair), "dict", "memory_encodings")
    of_list = layer([e, m], memory_mask=[True] * 3 + [False] * 4)
    close(of_list, layer([e, m[:3]]), 1e-6)
    refuses(lambda: layer([e, np.ones((3, 7, 5))]), "(3, 7, 5)")
    for shape in ((6,), (3, 7), (2, 6), (2, 7, 1)):
        mask = np.ones(shape, bool)
        refuses(lambda: layer([e, m], memory_mask=mask), "`memory_mask`")  # noqa: B023
    wrong = MemoryWrapLayer(3, classifier=keras.layers.Dense(4))
    refuses(lambda: wrong([e, m]), "`classifier`", "units=3", "(None, 4)")
    wrong = MemoryWrapLayer(3, head=keras.layers.Reshape((5, 1)))
    refuses(lambda: wrong([e, m]), "`head`")


def test_wrong_encodings_are_refused():
    layer = MemoryWrapLayer(3)
    e, m = np.ones((2, 5), "float32"), np.ones((7, 5), "float32")
    layer([e, m])
    bad = ["text", np.full((7, 5), "a"), m > 0, m + 1j, [[1.0], [1.0, 2.0]]]
    for one in bad:
        refuses(lambda: layer([one, m]), "`encodings`", "Received")  # noqa: B023
        refuses(lambda: layer([e, one]), "`memory_encodings`", "Received")  # noqa: B023
        refuses(lambda: layer.set_memory(one), "`memory_encodings`", "Received")  # noqa: B023
    refuses(lambda: layer([None, m]), "`encodings`", "NoneType")
    refuses(lambda: layer.set_memory(None), "`memory_encodings`", "NoneType")
    for one in ("text", np.full(7, "a"), m[:, 0] + 1j, np.ones(6, bool)):
        refuses(
            lambda: layer([e, m], memory_mask=one),  # noqa: B023
            "`memory_mask`",
            "Received",
        )
    close(layer([e.astype("int32"), m.astype("int64")]), layer([e, m]))


def test_bad_memories_are_refused():
    layer = MemoryWrapLayer(3)
    memory = np.ones((7, 5), "float32")
    layer.build([(2, 5), (7, 5)])
    refuses(lambda: layer.set_memory(memory[:, :4]), "(7, 4)")
    refuses(lambda: layer.set_memory(memory[:0]), "at least one example")
    refuses(lambda: layer.set_memory(np.where(memory, np.nan, 0)), "finite")
    assert layer.memory_keys is None
    layer.set_memory(memory)
    refuses(lambda: layer.set_memory(memory[:6]), "6 examples")
    refuses(lambda: layer(memory, training=True), "training=True")


def test_the_converter_refuses_wrong_weights():
    golden, _, _ = harness.golden("memorywrap__a")
    start = "MemoryWrapLayer.w."
    weights = {
        key.removeprefix(start): value
        for key, value in golden.items()
        if key.startswith(start)
    }

    def convert_with(changed=(), **kwargs):
        return lambda: convert.from_memorywrap(
            {**weights, **dict(changed)}, **kwargs
        )

    refuses(convert_with({"extra": np.ones(2)}), "extra")
    refuses(convert_with({"classifier.fc2.bias": np.ones(5)}), "(5,")
    refuses(convert_with(units=4), "units")
    refuses(convert_with(classifier=keras.layers.Dense(3)), "classifier")
    refuses(convert_with(similarity="far"), "similarity")
    odd = {"classifier.weight": np.ones((3, 5)), "classifier.bias": np.ones(3)}
    refuses(lambda: convert.from_memorywrap(odd), "baseline=True")
    assert convert.from_memorywrap(odd, baseline=True).units == 3


# The classifier.


@pytest.fixture
def clusters():
    """Well separated points of three classes."""
    rng = np.random.default_rng(7)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 5), scale=0.3) + 2 * np.eye(3, 5)[y]
    return x.astype("float32"), y


def classifier(**kwargs):
    arguments = {"memory_size": 11, "seed": 3, **kwargs}
    encoder = keras.layers.Dense(7, "tanh")
    model = MemoryWrapClassifier(encoder, 3, **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"])
    return model


@trains
@pytest.mark.parametrize("baseline", [False, True])
def test_the_classifier_learns_predicts_and_is_saved(
    baseline, clusters, tmp_path
):
    x, y = clusters
    model = classifier(baseline=baseline)
    history = model.fit(x, y, 16, epochs=8, validation_split=0.2, verbose=0)
    assert history.history["val_accuracy"][-1] > 0.9
    assert model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] > 0.9
    several = model.predict(x, draws=4, verbose=0)
    assert (several.argmax(axis=1) == y).mean() > 0.9
    model.set_memory(x[:13], y[:13])  # not the size of training
    fixed = model.predict(x, verbose=0)
    close(model((x, x[:13])), fixed, 1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded.predict(x, verbose=0), fixed, 0)
    assert (ops.convert_to_numpy(loaded.memory_labels) == y[:13]).all()
    model.set_memory(x)
    assert model.memory_labels.shape == (60,)
    close(model.predict(x, verbose=0), model((x, x)), 1e-5)
    model.fit(x, y, verbose=0)  # drops the fixed memory
    refuses(lambda: model(x), "set_memory")
    model.predict(x, verbose=0)


@trains
def test_each_step_draws_its_own_memory(clusters, monkeypatch):
    x, y = clusters
    drawn = []
    draw = MemoryWrapClassifier._draw

    def noted(model, rng):
        inputs, labels = draw(model, rng)
        drawn.append(inputs)
        assert inputs.shape == (11, 5)
        assert len(np.unique(inputs, axis=0)) == 11  # without replacement
        for row, label in zip(inputs, labels):
            (place,) = np.flatnonzero((x == row).all(axis=1))
            assert y[place] == label
        return inputs, labels

    monkeypatch.setattr(MemoryWrapClassifier, "_draw", noted)
    histories = []
    for seed, extra in ((3, {}), (3, {"validation_data": (x, y)}), (4, {})):
        keras.utils.set_random_seed(1)
        model = classifier(seed=seed)
        history = model.fit(x, y, 20, epochs=2, verbose=0, **extra).history
        histories.append(history["loss"])
    # Draws between the steps do not change training.
    assert histories[0] == histories[1] != histories[2]
    several = {memory.tobytes() for memory in drawn}
    assert len(several) >= 14  # two seeds, six steps, two epochs


@trains
def test_predictions_are_the_mean_over_draws(clusters):
    x, y = clusters
    one, other = classifier(), classifier()
    for model in (one, other):
        keras.utils.set_random_seed(1)
        model.fit(x, y, verbose=0)
    other.set_weights(one.get_weights())
    several = one.predict(x, draws=3, verbose=0)
    each = []
    for _ in range(3):
        memory, _ = other.draw()
        each.append(ops.convert_to_numpy(other((x, memory))))
    close(several, np.mean(each, axis=0), 1e-5)
    assert np.abs(each[0] - each[1]).max() > 1e-3


@trains
def test_fit_uses_sample_weights_and_memory_data(clusters):
    x, y = clusters
    model = classifier()
    model.build(x.shape)
    before = [ops.convert_to_numpy(w) for w in model.trainable_weights]
    assert len(before) == 6
    model.fit(x, y, sample_weight=np.zeros(60), verbose=0)
    for weight, old in zip(model.trainable_weights, before):
        close(weight, old, 0)
    memory = x[:20] + 1
    model.fit(x, y, memory_data=(memory, y[:20]), verbose=0)
    inputs, _ = model.draw()
    assert all((memory == row).all(axis=1).any() for row in inputs)


def test_custom_layers_are_restored():
    class Mine(keras.layers.Dense):
        pass

    given = {"custom_objects": {"Mine": Mine}}
    layer = MemoryWrapLayer(3, head=Mine(2))
    copy = MemoryWrapLayer.from_config(layer.get_config(), **given)
    assert type(copy.head) is Mine
    model = MemoryWrapClassifier(Mine(4), 3, 7)
    copy = MemoryWrapClassifier.from_config(model.get_config(), **given)
    assert type(copy.encoder) is Mine


def test_a_refused_memory_keeps_the_old_one(clusters):
    x, y = clusters
    model = classifier()
    model.set_memory(x[:13], y[:13])
    expected = model.predict(x, verbose=0)
    bad = x[:20].copy()
    bad[3] = np.nan
    refuses(lambda: model.set_memory(bad, y[:20]), "finite")
    close(model.predict(x, verbose=0), expected, 0)
    assert model.get_config()["fixed_memory_size"] == 13
    inputs = x.copy()
    model.set_memory(inputs, y)
    inputs[:] = 0
    assert (model.memory_inputs == x).all()


@trains
def test_fit_accepts_keras_arguments_and_validation_data(clusters):
    x, y = clusters
    model = classifier(fixed_memory_size=5, top_k=32)  # more than examples
    model.fit(x, y, 20, 2, 0)  # batch_size, epochs, verbose
    model.set_memory(x[:30], y[:30])
    copy = MemoryWrapClassifier.from_config(model.get_config())
    copy.compile("sgd", model.loss)
    history = copy.fit(x, y, validation_split=0.5, verbose=0)
    assert np.isfinite(history.history["val_loss"]).all()
    # Divergence shows as NaN, like in Keras.
    copy.compile(keras.optimizers.SGD(1e30), model.loss)
    history = copy.fit(x, y, validation_data=(x, y), epochs=2, verbose=0)
    assert np.isnan(history.history["val_loss"][-1])


@harness.needs_tensorflow
def test_batches_can_bring_their_own_memory(clusters):
    import tensorflow as tf

    x, y = clusters
    memory = x[:7]  # another size than the batch
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    pairs = data.map(lambda inputs, targets: ((inputs, memory), targets))
    model = classifier()  # without a fixed memory
    expected = ops.convert_to_numpy(model((x, memory)))
    close(model.predict(pairs, verbose=0), expected)
    accuracy = model.evaluate(pairs, verbose=0)[1]
    close(accuracy, (expected.argmax(axis=1) == y).mean(), 1e-6)
    with pytest.raises(ValueError, match="must have a memory to read"):
        model.predict(data, verbose=0)


def test_set_memory_with_wrong_inputs_keeps_the_old_memory(clusters):
    x, y = clusters
    encoder = keras.Sequential([keras.layers.Flatten()])
    model = MemoryWrapClassifier(encoder, 3, memory_size=5)
    model.set_memory(x[:13], y[:13])
    before = model(x[:4])
    for some in (x[:13, 1:], x[:7, 1:]):  # same size, and another size
        with pytest.raises(ValueError, match="`x` must be inputs as the model"):
            model.set_memory(some)
        close(model(x[:4]), before, 0)


def test_weights_with_a_memory_of_another_size_are_loaded(clusters, tmp_path):
    x, y = clusters
    model = classifier()
    model.set_memory(x[:13], y[:13])
    model.save_weights(tmp_path / "memory.weights.h5")
    other = classifier(fixed_memory_size=4)
    other.build(x.shape)
    other.load_weights(tmp_path / "memory.weights.h5")
    close(other(x[:4]), model(x[:4]), 1e-6)
    assert other.fixed_memory_size == 13
    assert other.memory_labels.shape == (13,)


@harness.needs_tensorflow
def test_fit_accepts_a_tf_dataset(clusters, recwarn):
    import tensorflow as tf

    x, y = clusters
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(60).batch(16)
    model = classifier()
    history = model.fit(data, memory_data=(x, y), epochs=8, verbose=0)
    assert history.history["accuracy"][-1] > 0.9
    assert not recwarn.list
    refuses(lambda: model.fit(data), "memory_data")
    refuses(
        lambda: model.fit(data, batch_size=7, memory_data=(x, y)), "batch_size"
    )


@trains
def test_the_classifier_refuses_wrong_input(clusters):
    x, y = clusters
    refuses(lambda: MemoryWrapClassifier("resnet", 3), "encoder")
    refuses(lambda: classifier(memory_size=0), "memory_size")
    refuses(lambda: classifier(fixed_memory_size=0), "fixed_memory_size")
    refuses(lambda: classifier(seed=-1), "seed")
    refuses(lambda: classifier(baseline=1), "baseline")
    model = MemoryWrapClassifier(keras.layers.Reshape((5, 1)), 3)
    refuses(lambda: model((x, x)), "`encoder`", "(None, 5, 1)")
    model = classifier()
    refuses(lambda: model(x), "set_memory")
    refuses(lambda: model.predict(x), "set_memory")
    refuses(lambda: model.fit(x[:10], y[:10]), "memory_size=11", "10 examples")
    refuses(lambda: model.fit([[1.0]], y), "tf.data.Dataset", "list")
    refuses(lambda: model.fit(x), "`y`")
    refuses(lambda: model.fit(x, y, memory_data=[x]), "1 parts")
    refuses(lambda: model.set_memory(x, y + 0.5), "whole numbers")
    refuses(lambda: model.set_memory(x, y.astype(str)), "whole numbers")
    refuses(lambda: model.fit(x, y[:9]), "60")
    refuses(lambda: model.set_memory(x, y[:9]), "(9,)", "(60,)")
    refuses(lambda: model.set_memory(x, y + 1), "[-1, 2]", "label=3")
    refuses(lambda: model.set_memory(x, np.ones((60, 4))), "(60, 3)")
    wide = np.ones((60, 6))
    refuses(lambda: model.fit(x, y, memory_data=wide), "memory_data", "(60, 6)")
    pair = (x, x[:20])  # Keras would split it into batches
    refuses(lambda: model.evaluate(pair, y), "tuple of 2")
    refuses(lambda: model.fit(x, y, validation_data=(pair, y)), "tuple of 2")
    refuses(lambda: model.set_memory(x[:0]), "at least one")
    refuses(lambda: model.set_memory(np.where(x > 1, np.nan, x)), "finite")
    model.set_memory(x, np.eye(3)[y])  # one-hot
    assert (ops.convert_to_numpy(model.memory_labels) == y).all()
    refuses(lambda: model.predict(x, draws=3), "draws=3")
    refuses(lambda: model.predict([x]), "list of 1")
    trained = classifier()
    trained.fit(x, y, verbose=0)
    once = (x for _ in range(2))
    refuses(lambda: trained.predict(once, draws=2), "draws=2", "generator")
    empty = keras.models.clone_model(model)
    empty.compile()
    for look in (
        lambda: empty.predict(x),
        lambda: empty.evaluate(x, y),
        lambda: explanations.explain(empty, x),
    ):
        refuses(look, "must be filled", "fixed_memory_size=60")
    refuses(lambda: model.encode(x, 0), "batch_size")
    for one in ("text", None, x + 1j, x > 0, x[0], np.full((9, 5), "a")):
        for name, call in (
            ("inputs", lambda: model(one)),  # noqa: B023
            ("memory_inputs", lambda: model((x, one))),  # noqa: B023
            ("inputs", lambda: model.encode(one)),  # noqa: B023
            ("x", lambda: model.set_memory(one)),  # noqa: B023
            ("x", lambda: model.fit(one, y)),  # noqa: B023
            ("x", lambda: model.predict(one)),  # noqa: B023
            ("x", lambda: model.evaluate(one, y)),  # noqa: B023
        ):
            refuses(call, f"`{name}`", "Received")
    refuses(
        lambda: model.fit(x, y, sample_weight=y[:9]), "`sample_weight`", "N=60"
    )
    refuses(lambda: model.fit(x, "text", memory_data=x), "`y`", "str")
    for one in ("text", x, y + 1j, [[1], [1, 2]]):
        refuses(lambda: model.set_memory(x, one), "`y`", "Received")  # noqa: B023


@trains
def test_predict_of_no_rows_is_empty(clusters):
    x, y = clusters
    model = classifier(top_k=3)
    refuses(lambda: model.predict(x[:0]), "set_memory")
    model.set_memory(x, y)
    found = model.predict(x[:0], verbose=0)
    assert found.shape == (0, 3) and found.dtype == "float32"
    assert tuple(model.encode(x[:0]).shape) == (0, 7)
    refuses(lambda: model.evaluate(x[:0], y[:0], verbose=0), "one input")
    model.fit(x, y, verbose=0)
    assert model.predict(x[:0], draws=2, verbose=0).shape == (0, 3)


@trains
def test_predicting_with_a_drawn_memory_warns_once(clusters, recwarn):
    x, y = clusters

    def told():
        return [w for w in recwarn.list if "set_memory" in str(w.message)]

    model = classifier()
    model.fit(x, y, validation_split=0.2, verbose=0)
    model.predict(x, draws=2, verbose=0)
    model.evaluate(x, y, verbose=0)
    assert not told()
    for _ in range(2):
        model.predict(x, verbose=0)
    (warning,) = told()
    assert warning.filename == __file__
    for word in ("`set_memory`", "`draws=`", "`seed=3`"):
        assert word in str(warning.message)
    model.set_memory(x, y)
    model.predict(x, verbose=0)
    assert len(told()) == 1
