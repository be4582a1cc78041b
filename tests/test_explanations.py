"""Tests of explanations: the examples that Memory Wrap used, and
attributions."""

import io

import harness
import keras
import numpy as np
import pytest
from harness import close
from keras import ops
from PIL import Image

from keras_memory import visualization
from keras_memory.inspection import callbacks
from keras_memory.inspection import explanations
from keras_memory.memory_wrap_classifier import MemoryWrapClassifier

pytestmark = pytest.mark.every_backend

trains = pytest.mark.skipif(
    not harness.TRAINS, reason="Keras has no gradients on NumPy"
)


@pytest.fixture(scope="module")
def images():
    """3 x 3 images of three classes, each with a bright row."""
    rng = np.random.default_rng(7)
    y = np.arange(60) % 3
    x = rng.uniform(0, 0.4, size=(60, 3, 3))
    x[np.arange(60), y] += 0.6
    return x.astype("float32"), y


def untrained(**kwargs):
    encoder = keras.Sequential(
        [keras.layers.Flatten(), keras.layers.Dense(5, "tanh")]
    )
    model = MemoryWrapClassifier(encoder, 3, 11, seed=3, **kwargs)
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


@pytest.fixture(scope="module")
def trained(images):
    """A trained model, for tests that do not change it."""
    keras.utils.set_random_seed(1)
    model = untrained()
    model.fit(*images, epochs=15, verbose=0)
    return model


def answers(model, x, memory, **kwargs):
    """Predictions, and weights on request, as arrays."""
    inputs = [model.encode(x), model.encode(memory)]
    found = model.memory_layer(inputs, **kwargs)
    return keras.tree.map_structure(ops.convert_to_numpy, found)


def test_explanations_of_a_fixed_memory_list_the_used_examples(images):
    x, y = images
    x = 2 * x  # makes images differ more
    model = untrained(similarity="l2")
    model.set_memory(x[:13], y[:13])
    outputs, weights = answers(model, x[13:36], x[:13], return_weights=True)
    used = np.count_nonzero(weights, axis=1)
    middle = int(np.median(used))
    assert used.min() < middle < used.max()
    for top_k in (None, middle):
        model.memory_layer.top_k = top_k
        whys = explanations.explain(model, x[13:36], batch_size=10)
        assert len(whys) == 23
        model.memory_layer.top_k = None
        left_out = used > (top_k or 13)
        for row, why in enumerate(whys):
            if left_out[row]:
                continue
            assert why.prediction == outputs[row].argmax()
            assert set(why.indices) == set(np.flatnonzero(weights[row]))
            assert (np.diff(why.weights) <= 0).all()
            close(why.weights, weights[row][why.indices].astype("float64"))
            close(why.weights.sum(), np.float64(1.0), 1e-5)
            assert (why.labels == y[why.indices]).all()
            assert (why.inputs == x[why.indices]).all()
            # Each example is classified by the others.
            for place, index in enumerate(why.indices):
                others = np.arange(13) != index
                alone = answers(model, x[index : index + 1], x[:13][others])
                assert why.predicted[place] == alone.argmax()
            expected = why.predicted == why.prediction
            assert (why.is_example == expected).all()
            assert (why.classes == why.predicted).all()


def test_a_loaded_memory_explains_without_its_inputs(images, tmp_path):
    x, y = images
    model = untrained()
    model.set_memory(x[:13], y[:13])
    expected = explanations.explain(model, x[13:17])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    whys = explanations.explain(loaded, x[13:17])
    for why, other in zip(whys, expected):
        assert (why.indices == other.indices).all()
        assert why.predicted is None and why.inputs is None
        assert (why.classes == other.labels).all()
        assert (why.is_example == (other.labels == why.prediction)).all()
    with pytest.raises(ValueError, match="must have inputs"):
        explanations.picture(loaded, x[13:17])
    with pytest.raises(ValueError, match="only their encodings"):
        explanations.explanation_accuracy(loaded, x, y)
    loaded.set_memory(x[:13])
    (why,) = explanations.explain(loaded, x[13:14])
    assert (why.labels == -1).all()
    assert (why.predicted == expected[0].predicted).all()


@trains
def test_explanations_of_a_drawn_memory_list_the_used_examples(
    trained, images, monkeypatch
):
    x, y = images
    memories = [(x[:11], y[:11]), (x[11:22], y[11:22])]
    drawn = iter(memories)
    monkeypatch.setattr(MemoryWrapClassifier, "draw", lambda _: next(drawn))
    whys = explanations.explain(trained, x[30:])
    outputs, weights = answers(trained, x[30:], x[:11], return_weights=True)
    of_memory = answers(trained, x[:11], x[11:22]).argmax(axis=1)
    for row, why in enumerate(whys):
        assert why.prediction == outputs[row].argmax()
        assert set(why.indices) == set(np.flatnonzero(weights[row]))
        assert (why.predicted == of_memory[why.indices]).all()
        assert (why.labels == y[why.indices]).all()


@trains
def test_explanation_accuracy_equals_the_code_of_the_paper(
    trained, images, monkeypatch
):
    x, y = images
    y = np.where(np.arange(60) % 5, y, (y + 1) % 3)  # wrong labels
    rng = np.random.default_rng(7)
    x = x + rng.normal(size=x.shape, scale=0.5)
    memories = []

    def draw(_):
        rows = rng.choice(60, 11, replace=False)
        memories.append(x[rows] + rng.normal(size=(11, 3, 3), scale=0.5))
        return memories[-1], None

    monkeypatch.setattr(MemoryWrapClassifier, "draw", draw)
    found = explanations.explanation_accuracy(trained, x, y, batch_size=23)
    assert len(memories) == 6  # two for each of three batches
    right = {True: [], False: []}
    for batch, begin in enumerate((0, 23, 46)):
        some = x[begin : begin + 23]
        memory, second = memories[2 * batch : 2 * batch + 2]
        outputs, weights = answers(trained, some, memory, return_weights=True)
        of_memory = answers(trained, memory, second).argmax(axis=1)
        for row, output in enumerate(outputs):
            prediction = output.argmax()
            agrees = of_memory[weights[row].argmax()] == prediction
            right[bool(agrees)].append(prediction == y[begin + row])
    assert right[True] and right[False]
    assert found == {
        "explanation_accuracy": len(right[True]) / 60,
        "accuracy": sum(right[True] + right[False]) / 60,
        "accuracy_by_example": np.mean(right[True]),
        "accuracy_by_counterfactual": np.mean(right[False]),
    }


def test_accuracy_by_counterfactual_is_none_without_any(images):
    x, y = images
    model = untrained()
    model.set_memory(x[:1], y[:1])
    model.memory_layer._classify.set_weights(
        [np.zeros(w.shape) for w in model.memory_layer._classify.weights[:-1]]
        + [np.array([0.0, 1.0, 0.0])]
    )
    model.set_memory(x[:1], y[:1])
    found = explanations.explanation_accuracy(model, x, np.eye(3)[y])
    assert found == {
        "explanation_accuracy": 1.0,
        "accuracy": 20 / 60,
        "accuracy_by_example": 20 / 60,
        "accuracy_by_counterfactual": None,
    }


# Attribution.


@trains
def test_attributions_sum_to_the_difference(trained, images):
    x, _ = images
    for baseline in (0.0, 1.0, x[5]):
        for target in (None, 0, 2):
            of_x, of_examples = explanations.integrated_gradients(
                trained, x[0], x[1:4], target, baseline, steps=300
            )
            assert of_x.shape == (3, 3) and of_examples.shape == (3, 3, 3)
            ends = [
                answers(trained, one[None], several)[0]
                for one, several in (
                    (x[0], x[1:4]),
                    (0 * x[0] + baseline, 0 * x[1:4] + baseline),
                )
            ]
            index = ends[0].argmax() if target is None else target
            total = of_x.sum() + of_examples.sum()
            close(total, ends[0][index] - ends[1][index], 0.02)


@trains
def test_attributions_of_a_linear_model_are_exact():
    """A single example has weight 1, so the output is linear in both images."""
    model = MemoryWrapClassifier(
        keras.layers.Flatten(),
        2,
        classifier=keras.layers.Dense(2, use_bias=False),
        memory_size=1,
    )
    rng = np.random.default_rng(7)
    x, example = rng.normal(size=(2, 1, 2, 3)).astype("float32")
    model((x, example))
    kernel = ops.convert_to_numpy(model.trainable_weights[0])
    of_x, of_example = explanations.integrated_gradients(
        model, x[0], example, target=1, steps=2
    )
    close(of_x, x[0] * kernel[:6, 1].reshape(2, 3))
    close(of_example, example * kernel[6:, 1].reshape(1, 2, 3))
    images = (100 * np.abs(x)).astype("uint8")
    for size in (1, 2, 100):
        of_x, _ = explanations.integrated_gradients(
            model, images[0], images, target=1, steps=3, batch_size=size
        )
        close(of_x / 100, images[0] / 100 * kernel[:6, 1].reshape(2, 3), 1e-5)


# Pictures.


def test_tiles_are_drawn_with_frames_words_and_heat():
    image = np.full((5, 7), 0.5)
    heat = np.zeros((5, 7, 1))
    heat[1, 2] = 3.0
    heat[2, 2] = -3.0
    row = [
        visualization.Tile(image, "prediction", "5"),
        visualization.Tile(np.ones((5, 7, 3)), "example", "0.3", "blue", heat),
    ]
    figure = visualization.plot_tiles([row])
    (ax,) = figure.axes
    first, second, hot = (image.get_array() for image in ax.images)
    np.testing.assert_array_equal(first, np.full((5, 7, 3), 0.5))
    np.testing.assert_array_equal(second, 1.0)
    assert (hot[1, 2] < second[1, 2]).any()
    np.testing.assert_array_equal(hot[2, 2], hot[0, 0])
    words = [text.get_text() for text in ax.texts]
    assert words == ["prediction", "5", "example", "0.3"]
    assert [frame.get_edgecolor()[2] for frame in ax.patches] == [0.3, 1, 1]
    with pytest.raises(
        ValueError, match="`rows` must be a list of at least one.*Received: 0"
    ):
        visualization.plot_tiles([[]])
    for wrong, words in (
        (np.zeros((5, 7, 2)), r"\(5, 7, 2\)"),
        (np.full((5, 7), 2.0), "from 2 to 2"),
        (np.full((5, 7), np.nan), "from nan"),
    ):
        with pytest.raises(ValueError, match=words):
            visualization.plot_tiles([[visualization.Tile(wrong)]])


def test_tile_texts_are_not_parsed_as_formulas():
    tile = visualization.Tile(np.ones((5, 5)), "$a_b$", "$\\wrong$ \\$")
    figure = visualization.plot_tiles([[tile, tile, tile]])
    visualization.to_image(figure)
    assert words_of(figure) == 3 * ["$a_b$", "$\\wrong$ \\$"]
    places = [frame.get_x() for frame in figure.axes[0].patches]
    np.testing.assert_allclose(np.diff(places), [1.55, 1.15])


def words_of(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


@trains
def test_pictures_follow_max_examples_and_to_image(trained, images):
    x, y = images
    model = untrained()
    model((x, x))
    model.set_weights(trained.get_weights())
    model.set_memory(x, y)
    small = explanations.picture(
        model, x[:2], max_examples=2, attribution=False
    )
    large = explanations.picture(model, x[:2], "abc", max_examples=5)
    assert len(large.axes[0].images) > 2 * len(small.axes[0].images)
    inverse = explanations.picture(
        model,
        x[:2],
        max_examples=2,
        attribution=False,
        to_image=lambda one: 1 - one,
    )
    for one, other in zip(small.axes[0].images, inverse.axes[0].images):
        close(one.get_array(), 1 - other.get_array())


def test_a_picture_marks_wrong_answers(images):
    """The second example has class 1 but is predicted as class 2."""
    x, _ = images
    why = explanations.Explanation(
        prediction=1,
        indices=np.array([3, 5]),
        weights=np.array([0.75, 0.25]),
        labels=np.array([1, 1]),
        predicted=np.array([1, 2]),
        inputs=x[[3, 5]],
        input=x[0],
    )
    unknown = ["answer", "1", "example", "0.75: 1"]
    unknown += ["counterfactual", "0.25: 2, is 1"]
    assert words_of(visualization.plot_explanations([why])) == unknown
    right, wrong = (
        words_of(visualization.plot_explanations([why], labels=[label]))
        for label in (1, 0)
    )
    assert right == ["right answer", *unknown[1:]]
    assert wrong == ["WRONG answer", "1, is 0", *unknown[2:]]
    named = visualization.plot_explanations(
        [why], class_names="abc", max_examples=1
    )
    assert words_of(named) == ["answer", "b", "example", "0.75: b"]
    with pytest.raises(
        ValueError, match=r"`labels` must be .*\(1,\).*Received: shape \(2,\)"
    ):
        visualization.plot_explanations([why], labels=[1, 2])


@pytest.mark.parametrize(
    "name", ["golden retriever", "Pneumonoultramicroscopicsilicosis", "i" * 99]
)
def test_words_do_not_overlap(images, name):
    x, _ = images
    why = explanations.Explanation(
        *(1, np.arange(3), np.array([0.5, 0.3, 0.2]), np.array([1, 0, 1])),
        *(np.array([1, 1, 0]), x[:3], x[3]),
    )
    names = [name, f"other {name}"]
    figure = visualization.plot_explanations(
        [why], labels=[0], class_names=names
    )
    visualization.to_image(figure)
    (ax,) = figure.axes
    boxes = [text.get_window_extent() for text in ax.texts]
    boxes += [image.get_window_extent() for image in ax.images]
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])
    assert "…" in "".join(words_of(figure))


def test_labels_may_be_one_hot_or_unknown(images):
    x, _ = images
    why = explanations.Explanation(
        *(1, np.arange(1), np.ones(1), np.ones(1, int), np.ones(1, int)),
        *(x[:1], x[1]),
    )
    for label, answer in (([0, 1], "right"), ([1, 0], "WRONG")):
        figure = visualization.plot_explanations([why], labels=[label])
        assert words_of(figure)[0] == f"{answer} answer"
    figure = visualization.plot_explanations([why], labels=[-1])
    assert words_of(figure)[:2] == ["answer", "1"]


def test_a_notebook_shows_explanations_of_images(images):
    x, y = images
    model = untrained()
    model.set_memory(x, y)
    whys = explanations.explain(model, x[:2])
    for one in (whys, whys[0]):
        assert one._repr_png_().startswith(b"\x89PNG")
    assert len(repr(whys[0])) < 80
    vectors = whys[0]._replace(input=np.ones(3), inputs=np.ones((2, 3)))
    assert vectors._repr_png_() is None


@harness.needs_tensorflow
def test_tensorboard_gets_explanations(images, tmp_path):
    import tensorflow as tf

    x, y = images
    model = untrained()
    board = callbacks.ExplanationTensorBoard(tmp_path, x[:2], every=2)
    model.fit(x, y, epochs=5, verbose=0, callbacks=[board])
    (path,) = (tmp_path / "explanations").iterdir()
    events = [
        (event.step, value.tag, value.tensor)
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    assert [step for step, tag, _ in events if tag == "explanations"] == [2, 4]
    tensors = [
        tf.make_ndarray(t) for _, tag, t in events if tag != "explanations"
    ]
    assert all(1 <= used <= 11 for used in tensors)
    width, height, png = next(
        tf.make_ndarray(t) for _, tag, t in events if tag == "explanations"
    )
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (int(width), int(height))
    dense = keras.Sequential([keras.layers.Dense(3)])
    dense.compile("sgd", "mse")
    with pytest.raises(TypeError, match="MemoryWrapClassifier"):
        dense.fit(x[:, 0], x[:, 0], callbacks=[board], verbose=0)
    board = callbacks.ExplanationTensorBoard(tmp_path, x[:2], ["one"])
    with pytest.raises(ValueError, match="1 names"):
        model.fit(x, y, callbacks=[board], verbose=0)


@harness.needs_tensorflow
def test_labels_are_checked_before_training(images, tmp_path):
    x, y = images
    for labels in (
        [0, 1, 2],
        [0],
        0,
        [0.5, 1.0],
        [0, -2],
        ["0", "1"],
        np.ones((2, 3, 1), int),
        np.ones((2, 0), int),
        np.ones((3, 3), int),
    ):
        with pytest.raises(ValueError, match="`labels` must be.*Received: "):
            callbacks.ExplanationTensorBoard(tmp_path, x[:2], labels=labels)
    for labels in ([0, 7], np.eye(2, 4)):  # of a model with three classes
        board = callbacks.ExplanationTensorBoard(tmp_path, x[:2], labels=labels)
        with pytest.raises(ValueError, match="`labels` must be.*Received: "):
            untrained().fit(x, y, callbacks=[board], verbose=0)
        with pytest.raises(ValueError, match="`labels` must be.*Received: "):
            explanations.picture(untrained(), x[:2], labels=labels)
    assert not [*tmp_path.iterdir()]
    for labels in ([2, -1], y[:2, None], np.eye(2, 3)):
        board = callbacks.ExplanationTensorBoard(tmp_path, x[:2], labels=labels)
        untrained().fit(x, y, callbacks=[board], verbose=0)
    assert (tmp_path / "explanations").exists()


# Bad input.


def test_wrong_arguments_are_refused(images):
    x, y = images
    model = untrained()
    with pytest.raises(ValueError, match="set_memory"):
        explanations.explain(model, x)
    model.set_memory(x, y)
    of_numbers = MemoryWrapClassifier(
        keras.Sequential(
            [keras.layers.Embedding(5, 2), keras.layers.Flatten()]
        ),
        3,
    )
    for call, words in (
        (lambda: explanations.explain(model, x[:0]), "B at least 1"),
        (lambda: explanations.explain(model, x, 0), "batch_size"),
        (
            lambda: explanations.explanation_accuracy(model, x, y[:9]),
            r"shape \(9,\)",
        ),
        (
            lambda: explanations.integrated_gradients(model, x, x),
            "`x` must be one input",
        ),
        (
            lambda: explanations.integrated_gradients(model, x[0], x, steps=0),
            "steps",
        ),
        (
            lambda: explanations.picture(model, x, max_examples=0),
            "max_examples",
        ),
        (lambda: explanations.picture(model, x, ["one"]), "1 names"),
        (lambda: explanations.picture(model, x, 3), "`class_names`.*Rec"),
        (
            lambda: explanations.picture(model, x, explanations=3),
            "`explanations`.*Rec",
        ),
        (
            lambda: explanations.picture(model, x, explanations=[1]),
            "`explanations`.*Rec",
        ),
        (lambda: explanations.explain(model, x * np.nan), "finite"),
        (
            lambda: explanations.integrated_gradients(model, x[0], x, 3),
            "`target`",
        ),
        (
            lambda: callbacks.ExplanationTensorBoard("logs", 2 * x),
            "normalization",
        ),
        (
            lambda: explanations.explain(
                MemoryWrapClassifier(keras.layers.Flatten(), 1), x
            ),
            "units=1",
        ),
        (
            lambda: explanations.explanation_accuracy(model, x, y.astype(str)),
            "whole numbers",
        ),
        (
            lambda: explanations.integrated_gradients(
                of_numbers, np.ones(3), np.ones((4, 3))
            ),
            "has a gradient",
        ),
    ):
        if words == "has a gradient" and harness.BACKEND == "jax":
            continue  # its gradient is 0 instead
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="MemoryWrapClassifier"):
        explanations.explain(keras.Sequential(), x)
    for bad in ("text", None, x + 1j, x > 0, [[1.0], [1.0, 2.0]]):
        for name, call in (
            ("x", lambda: explanations.explain(model, bad)),  # noqa: B023
            ("x", lambda: explanations.explanation_accuracy(model, bad, y)),  # noqa: B023
            ("x", lambda: explanations.picture(model, bad)),  # noqa: B023
            ("x", lambda: explanations.integrated_gradients(model, bad, x)),  # noqa: B023
            (
                "memory_inputs",
                lambda: explanations.integrated_gradients(model, x[0], bad),  # noqa: B023
            ),
            (
                "baseline",
                lambda: explanations.integrated_gradients(
                    model,
                    x[0],
                    x,
                    0,
                    bad,  # noqa: B023
                ),
            ),
        ):
            with pytest.raises(ValueError, match=f"`{name}`.*Received"):
                call()
    with pytest.raises(ValueError, match=r"`baseline`.*shape \(2,\)"):
        explanations.integrated_gradients(model, x[0], x, 0, np.ones(2))
