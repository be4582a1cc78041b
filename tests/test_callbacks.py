"""Tests of the files that callbacks write, read as TensorBoard reads them, and
viewed in a browser."""

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from typing import Any
from typing import NamedTuple

import harness
import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from catalogue import slow_unless
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

import keras_memory
from keras_memory import visualization
from keras_memory.addressing import dense_linkage
from keras_memory.inspection import callbacks
from keras_memory.inspection import probe as probe_module
from keras_memory.recurrent.interface import StateSpec
from keras_memory.training import tasks

TASK = tasks.Copy(bits=3, max_length=3, buckets=1)
BATCH = TASK.sample(np.random.default_rng(3), 2, length=5)


def ntm(units=3, **arguments):
    return keras_memory.NTMLayer(
        units,
        memory_slots=11,
        slot_size=5,
        controller_units=7,
        return_sequences=True,
        **arguments,
    )


def dnc(**arguments):
    return keras_memory.DNCLayer(
        3,
        memory_slots=7,
        slot_size=5,
        read_heads=2,
        controller_units=7,
        return_sequences=True,
        **arguments,
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(5)
        self.memory = ntm(3, read_heads=2)

    def call(self, inputs, training=False):
        return keras.ops.sigmoid(self.memory(self.first(inputs)))


def sequential(*layers):
    return keras.Sequential([keras.Input((None, 4)), *layers])


def fitted(model, *made, epochs=3):
    harness.compiled(model, "adam", "mse")
    model.fit(
        tasks.dataset(TASK, 2),
        epochs=epochs,
        steps_per_epoch=2,
        verbose=0,
        shuffle=False,
        callbacks=made,
    )
    return model


def watched(model, *made, epochs=1):
    """Calls callbacks like `fit`, but without steps: tracing takes longest."""
    calls = keras.callbacks.CallbackList(list(made), model=model)
    calls.on_train_begin()
    for epoch in range(epochs):
        calls.on_epoch_begin(epoch)
        calls.on_epoch_end(epoch)
    calls.on_train_end()


def events(folder):
    guidance = event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE
    read = event_accumulator.EventAccumulator(str(folder / "memory"), guidance)
    read.Reload()
    return read


def tensors(read, tag):
    return [
        (event.step, tf.make_ndarray(event.tensor_proto))
        for event in read.Tensors(tag)
    ]


def thumbnail(plot, *arguments, **options):
    figure = plot(*arguments, width=callbacks.THUMBNAIL, **options)
    return visualization.to_image(figure)


@pytest.mark.parametrize("sparse_links", [slow_unless(False, None), 3])
def test_tensorboard_gets_usage_and_links_of_a_dnc(tmp_path, sparse_links):
    options = {"write_heads": 2, "sparse_links": sparse_links}
    model = sequential(dnc(name="dnc", **options))
    watched(model, callbacks.MemoryTensorBoard(tmp_path, BATCH))
    read = events(tmp_path)
    inside = keras_memory.trace(model.layers[0], BATCH.inputs)

    def shown(tag):
        ((_, (_, _, encoded)),) = tensors(read, tag)
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))

    for name, heads in {
        "allocation_weighting": ["allocation 0", "allocation 1"],
        "forward_weighting": [
            f"forward, read {pair // 2}, write {pair % 2}" for pair in range(4)
        ],
        "read_weighting": ["read 0", "read 1"],
    }.items():
        values = inside[name][0]
        expected = thumbnail(
            visualization.plot_weighting,
            values.reshape(len(values), -1, 7),  # pairs of heads in a row
            names=heads,
            title=name.replace("_", " "),
        )
        np.testing.assert_array_equal(shown(f"dnc/{name}"), expected)
    usage = inside["usage"][0]
    expected = thumbnail(visualization.plot_weighting, usage, title="usage")
    np.testing.assert_array_equal(shown("dnc/usage"), expected)
    for head in range(2):
        links = inside["linkage"][0][:, head]
        if sparse_links:
            columns = inside["link_columns"][0][:, head]
            links = dense_linkage(links, columns)
        expected = thumbnail(visualization.plot_linkage, links)
        np.testing.assert_array_equal(shown(f"dnc/linkage_{head}"), expected)
    tags = read.Tags()["tensors"]
    assert "dnc/linkage/mean" in tags
    assert not any("link_columns" in tag for tag in tags)


def titles(figure):
    every = [ax.get_title(loc="left") for ax in figure.axes]
    return [title for title in every if title]


def test_a_probe_draws_gates_and_weightings():
    model = sequential(dnc(name="dnc"))
    seen = probe_module.Probe.of(BATCH).look(model)
    figure = probe_module.probe_picture(seen, "title", memory=True)
    heads = ["write 0", "read 0", "read 1"]
    assert titles(figure)[-5:] == ["gates", *heads, "memory"]
    inside = keras_memory.trace(model.layers[0], BATCH.inputs)
    drawn = {ax.get_title(loc="left"): ax for ax in figure.axes}
    array = drawn["read 1"].images[0].get_array()
    harness.close(array, inside["read_weighting"][0, :, 1].T)
    rows = [text.get_text() for text in drawn["gates"].get_yticklabels()]
    modes = [f"read 0 {mode}" for mode in ("backward", "content", "forward")]
    assert rows[:4] == ["free 0", "free 1", "allocation 0", "write 0"]
    assert rows[4:7] == modes


class OtherState(NamedTuple):
    """State of a custom memory, with names that a DNC has too."""

    reads: Any
    memory: Any
    key_memory: Any
    usage: Any
    linkage: Any
    read_weighting: Any
    controller: Any = ()


class OtherAccess:
    interface_size = 5
    read_size = 5
    initial_state = OtherState(
        reads=StateSpec((1, 5)),
        memory=StateSpec((7,)),
        key_memory=StateSpec((7, 5)),
        usage=StateSpec((2, 7)),
        linkage=StateSpec((7, 7)),
        read_weighting=StateSpec((7,)),
    )

    def step(self, interface, state):
        weighting = keras.ops.softmax(
            keras.ops.einsum("bnw,bw->bn", state.key_memory, interface)
        )
        state = state._replace(
            reads=interface[:, None],
            key_memory=state.key_memory + interface[:, None],
            read_weighting=weighting,
        )
        gates = keras.ops.sigmoid(interface)
        return state, {"open_gate": gates[:, 0], "slot_gate": gates[:, None]}


class OtherCell(keras_memory.MemoryCell):
    def __init__(self, units, blocks=1, **kwargs):
        super().__init__(
            units, accesses=[OtherAccess() for _ in range(blocks)], **kwargs
        )
        self.blocks = blocks


class OtherLayer(keras_memory.MemoryRNN, cell=OtherCell):
    pass


def own(units=3, **arguments):
    """The fastest memory that can be drawn."""
    return OtherLayer(
        units, controller_units=7, return_sequences=True, **arguments
    )


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_custom_memory_of_other_shapes_is_written(blocks, tmp_path):
    model = sequential(own(blocks=blocks, name="own"))
    watched(model, callbacks.MemoryTensorBoard(tmp_path, BATCH))
    tags = events(tmp_path).Tags()["tensors"]
    first = "own/block0/" if blocks > 1 else "own/"
    drawn = {"read_weighting", "key_memory", "key_memory_over_time"}
    assert {first + name for name in drawn} <= set(tags)
    for name in ("usage", "linkage", "open_gate", "slot_gate", "memory"):
        assert f"{first}{name}/values" in tags and first + name not in tags
    seen = probe_module.Probe.of(BATCH).look(model)
    picture = probe_module.probe_picture(seen, "title", memory=True)
    assert "read 0" in str(titles(picture))


def test_tensorboard_gets_histograms_images_and_scalars(tmp_path):
    model = sequential(ntm(4, name="low"), ntm(3, name="high"))
    board = callbacks.MemoryTensorBoard(tmp_path, BATCH, every=2)
    fitted(model, board)
    read = events(tmp_path)
    inside = keras_memory.trace(model.layers[0], BATCH.inputs)
    for layer in ("low", "high"):
        for tag in (
            f"{layer}/read_weighting",
            f"{layer}/write_weighting",
            f"{layer}/memory",
            f"{layer}/memory_over_time",
        ):
            assert [step for step, _ in tensors(read, tag)] == [2, 3]
    for name, values in inside.items():
        steps = tensors(read, f"low/{name}/values")
        assert [step for step, _ in steps] == [2, 3]
        counted = steps[-1][1][:, 2].sum()  # left edge, right edge, count
        assert counted == values.size
        harness.close(steps[-1][1][0, 0], values.min())

    _, (width, height, encoded) = tensors(read, "low/read_weighting")[-1]
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.size == (int(width), int(height))
        expected = thumbnail(
            visualization.plot_weighting,
            inside["read_weighting"][0],
            names=["read 0"],
            title="read weighting",
        )
        np.testing.assert_array_equal(np.asarray(image), expected)
    _, (_, _, encoded) = tensors(read, "high/memory_over_time")[-1]
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format == "GIF"
        assert 2 <= image.n_frames <= 11

    def scalar(tag):
        return tensors(read, tag)[-1][1]

    weighting = inside["read_weighting"]
    entropy = -(weighting * np.log2(weighting + 1e-30)).sum(-1).mean()
    harness.close(scalar("low/read_weighting/entropy_bits"), entropy, 1e-4)
    harness.close(
        scalar("low/memory/root_mean_square"),
        np.sqrt((inside["memory"] ** 2).mean()),
    )
    harness.close(
        scalar("low/interpolation_gate/mean"),
        inside["interpolation_gate"].mean(),
    )
    _, (_, _, encoded) = tensors(read, "probe")[-1]
    assert Image.open(io.BytesIO(encoded)).format == "PNG"


def test_each_tag_has_one_kind(tmp_path):
    board = callbacks.MemoryTensorBoard(tmp_path, BATCH, 1)
    watched(sequential(ntm()), board, epochs=3)
    read = events(tmp_path)
    kinds = [
        set(read.PluginTagToContent(plugin))
        for plugin in ("images", "scalars", "histograms")
    ]
    assert all(kinds)
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    for tag in kinds[0]:  # the size, and one image
        assert {len(values) for _, values in tensors(read, tag)} == {3}


def test_a_subclassed_model_accepts_any_probe(tmp_path):
    model = Subclassed()
    probes = {"mask": BATCH, "targets": BATCH[:2], "inputs": BATCH.inputs}
    boards = [
        callbacks.MemoryTensorBoard(tmp_path / name, probe)
        for name, probe in probes.items()
    ]
    fitted(model, *boards)
    for name in probes:
        tags = events(tmp_path / name).Tags()["tensors"]
        assert f"{model.memory.name}/read_weighting" in tags
        assert ("probe" in tags) == (name != "inputs")


def test_a_look_traces_each_call_of_each_layer():
    shared = own(4, name="shared")
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, own(3, name="last")(shared(shared(inputs))))
    seen = probe_module.Probe(BATCH).look(model)
    assert list(seen.traces) == ["shared", "shared_2", "last"]
    first = keras_memory.trace(shared, BATCH.inputs)
    harness.close(seen.traces["shared"]["output"], first["output"])
    second = keras_memory.trace(shared, first["output"])
    for name, values in second.items():
        harness.close(seen.traces["shared_2"][name], values)
    harness.close(seen.traces["last"]["output"], seen.outputs)
    harness.close(seen.outputs, model(BATCH.inputs))


def test_a_look_uses_the_current_masks_and_weights():
    model = sequential(keras.layers.Masking(), ntm())
    x = BATCH.inputs * (np.arange(11) < 8)[:, None]
    probe = probe_module.Probe(x)
    for _ in range(2):
        seen = probe.look(model)
        mask = (x != 0).any(-1)
        inside = keras_memory.trace(model.layers[1], x, mask=mask)
        for name, values in inside.items():
            harness.close(seen.traces[model.layers[1].name][name], values)
        weights = model.get_weights()
        model.set_weights([w + 0.1 for w in weights])


def last_only():
    inputs = keras.Input((None, 4))
    layer = keras_memory.NTMLayer(3, memory_slots=11, slot_size=5)
    return keras.Model(inputs, layer(inputs)), (BATCH.inputs, np.ones((2, 3)))


def tokens():
    inputs = keras.Input((None,), dtype="int32")
    outputs = ntm()(keras.layers.Embedding(5, 4)(inputs))
    probe = (np.ones((2, 7), "int32"), np.ones((2, 7, 3)))
    return keras.Model(inputs, outputs), probe


def two_outputs():
    inputs = keras.Input((None, 4))
    outputs = ntm()(inputs)
    pair = [outputs, keras.layers.Dense(2)(outputs)]
    targets = [np.ones((2, 11, 3)), np.ones((2, 11, 2))]
    return keras.Model(inputs, pair), (BATCH.inputs, targets)


def two_inputs():
    inputs = {name: keras.Input((None, 4), name=name) for name in "ab"}
    outputs = ntm()(keras.layers.Add()(list(inputs.values())))
    x = {"a": BATCH.inputs, "b": BATCH.inputs}
    return keras.Model(inputs, outputs), (x, BATCH.targets)


def shorter():
    layer = keras.layers.Cropping1D((0, 2))
    return sequential(ntm(), layer), (BATCH.inputs, BATCH.targets[:, 2:])


@pytest.mark.parametrize(
    "make",
    [
        slow_unless(make in (last_only, two_outputs), make)
        for make in (last_only, tokens, two_outputs, two_inputs, shorter)
    ],
)
def test_models_without_drawable_sequences_get_no_picture(make, tmp_path):
    model, (x, y) = make()
    model.compile("sgd", "mse", run_eagerly=True)
    probe = probe_module.Probe((x, y))
    board = callbacks.MemoryTensorBoard(tmp_path, probe, every=1)
    model.fit(x, y, verbose=0, callbacks=[board])
    tags = events(tmp_path).Tags()["tensors"]
    assert "probe" not in tags
    assert any(tag.endswith("/read_weighting") for tag in tags)
    pictures = callbacks.ProbePictures(probe, tmp_path / "pictures")
    with pytest.raises(ValueError, match="A picture of a probe needs"):
        model.fit(x, y, verbose=0, callbacks=[pictures])


def test_an_untraceable_memory_warns_and_training_continues(tmp_path):
    class Hidden(Subclassed):
        def __init__(self):
            super().__init__()
            self.run = tf.function(lambda inputs: self.memory(inputs))

        def call(self, inputs):
            return self.run(inputs)

    board = callbacks.MemoryTensorBoard(tmp_path, BATCH)
    model = Hidden()
    model(BATCH.inputs)
    with pytest.warns(UserWarning, match="within a `tf.function`"):
        fitted(model, board)


def test_a_look_does_not_change_states():
    layer = ntm(stateful=True)
    model = keras.Sequential([keras.Input((None, 4), batch_size=2), layer])
    model(BATCH.inputs)
    before = [np.array(state) for state in layer.states]
    probe = probe_module.Probe(BATCH)
    first, second = probe.look(model).outputs, probe.look(model).outputs
    np.testing.assert_array_equal(first, second)
    for state, kept in zip(layer.states, before):
        np.testing.assert_array_equal(state, kept)
    harness.close(model(BATCH.inputs), first)


def test_a_look_does_not_change_dropout_seeds():
    model = sequential(dnc(bypass_dropout=0.5, controller_dropout=0.5, seed=3))
    seeds = [v for v in model.non_trainable_variables if "seed" in v.path]
    assert len(seeds) == 2
    model(BATCH.inputs)
    before = [np.array(seed) for seed in seeds]
    probe_module.Probe(BATCH).look(model)
    for seed, kept in zip(seeds, before):
        np.testing.assert_array_equal(seed, kept)


def test_a_look_copies_no_weights(monkeypatch):
    """Each call writes to a large memory; a look must undo it without a
    copy."""
    entry = keras.Input(batch_shape=(2, 1, 4))
    memory = keras_memory.KNNMemoryLayer(500, top_k=3, write="always")
    found = memory(entry, entry, entry)
    model = keras.Model(entry, keras.layers.Flatten()(found.values))
    x = np.ones((2, 1, 4), "float32")
    model(x)
    before = model.get_weights()
    copied = []
    to_numpy = probe_module.ops.convert_to_numpy

    def noted(tensor):
        copied.append(np.prod(tensor.shape))
        return to_numpy(tensor)

    monkeypatch.setattr(probe_module.ops, "convert_to_numpy", noted)
    assigned = []
    assign = keras.Variable.assign
    monkeypatch.setattr(
        keras.Variable,
        "assign",
        lambda self, value: assigned.append(0) or assign(self, value),
    )
    probe = probe_module.Probe(x)
    probe.look(model)
    assigned.clear()  # ignores assignments during tracing
    outputs = [probe.look(model).outputs for _ in range(2)]
    assert max(copied) <= 100 and not assigned
    np.testing.assert_array_equal(*outputs)
    assert np.count_nonzero(outputs[0]) == 2 * 1 * 4  # one entry per row
    for weight, kept in zip(model.get_weights(), before):
        np.testing.assert_array_equal(weight, kept)


def test_a_look_builds_an_unbuilt_model():
    model = Subclassed()
    seen = probe_module.Probe(BATCH).look(model)
    harness.close(seen.outputs, model(BATCH.inputs))


def test_looks_take_a_small_share_of_the_time_by_default(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    board = callbacks.MemoryTensorBoard(tmp_path, BATCH)
    written = []

    def images(seen):
        now[0] += 2.0  # seconds that a look takes
        written.append(now[0])
        return {}

    board.set_model(sequential(own()))
    board._images = images
    board.on_train_begin()
    for epoch in range(100):
        now[0] += 10.0
        board.on_epoch_end(epoch)
        assert 2.0 * (len(written) - 1) <= 0.04 * (epoch + 1) * 10.0
    assert 18 <= len(written) <= 20
    board.on_train_end()
    assert len(written) <= 21


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_wrong_periods_and_probes_are_refused(every, tmp_path):
    with pytest.raises(ValueError, match="Received: every"):
        callbacks.MemoryTensorBoard(tmp_path, BATCH, every=every)
    with pytest.raises(ValueError, match="4 parts"):
        callbacks.MemoryTensorBoard(tmp_path, (1, 2, 3, 4))


@pytest.mark.parametrize("bad", ["text", None, object(), {"a": "text"}, 1.0])
def test_probes_other_than_arrays_are_refused(bad, tmp_path):
    for make in (
        probe_module.Probe,
        lambda probe: callbacks.ProbePictures(probe, tmp_path),
        lambda probe: callbacks.MemoryTensorBoard(tmp_path, probe),
    ):
        with pytest.raises(ValueError, match="`inputs` must be an array"):
            make(bad)
        if bad is not None:
            with pytest.raises(ValueError, match="`targets` must be an array"):
                make((BATCH.inputs, bad))
            with pytest.raises(ValueError, match="`mask` must be an array"):
                make((*BATCH[:2], bad))
    complex_inputs = BATCH.inputs.astype("complex64")
    with pytest.raises(ValueError, match="`inputs`.*complex64"):
        probe_module.Probe(complex_inputs)
    with pytest.raises(ValueError, match="`targets`.*B=2.*shape .1,"):
        probe_module.Probe((BATCH.inputs, BATCH.targets[:1]))


@pytest.mark.parametrize("bad", [None, 3, b"bytes"])
def test_wrong_folders_are_refused(bad):
    images = np.ones((2, 4, 4))
    for call, name in (
        (lambda: callbacks.MemoryTensorBoard(bad, BATCH), "log_dir"),
        (lambda: callbacks.ExplanationTensorBoard(bad, images), "log_dir"),
        (lambda: callbacks.ProbePictures(BATCH, bad), "folder"),
        (lambda: callbacks.pictures(bad), "folder"),
        (lambda: callbacks.animation(bad), "folder"),
        (lambda: callbacks.write_images(bad, "map", []), "folder"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be the path"):
            call()


def test_wrong_arguments_of_callbacks_are_refused(tmp_path):
    images = np.ones((2, 4, 4))
    for call, words in (
        (
            lambda: callbacks.ProbePictures(BATCH, tmp_path, title="title"),
            "`title` must be a function",
        ),
        (
            lambda: callbacks.ExplanationTensorBoard(tmp_path, "text"),
            "`x` must be an array",
        ),
        (
            lambda: callbacks.ExplanationTensorBoard(tmp_path, images[0]),
            "`x` must be an array",
        ),
        (
            lambda: callbacks.ExplanationTensorBoard(
                tmp_path, images, to_image=1
            ),
            "`to_image` must be a function",
        ),
        (
            lambda: callbacks.write_images(tmp_path, "map", [images]),
            "`images` must be an array",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_model_without_memory_is_refused(tmp_path):
    board = callbacks.MemoryTensorBoard(tmp_path, BATCH)
    with pytest.raises(TypeError, match="recurrent layers of keras_memory"):
        fitted(sequential(keras.layers.LSTM(3, return_sequences=True)), board)


def test_pictures_of_the_probe_become_an_animation(tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    others = [folder / "20.png", folder / "2024-01-01.png"]
    for other in others:
        other.write_bytes(b"a user's own")
    pictures = callbacks.ProbePictures(BATCH, folder, every=2)
    model = fitted(sequential(ntm()), pictures, epochs=5)
    assert all(other.exists() for other in others)
    names = [path.name for path in callbacks.pictures(folder)]
    assert names == [f"{done:08}.png" for done in (0, 2, 4, 5)]
    seen = probe_module.Probe(tuple(part[:1] for part in BATCH)).look(model)
    expected = visualization.to_image(
        probe_module.probe_picture(seen, "epoch 5", slots="all")
    )
    with Image.open(folder / names[-1]) as png:
        different = (np.asarray(png) != expected).any(axis=2)
        assert different.mean() < 0.002  # ticks, under frames
    with Image.open(io.BytesIO(callbacks.animation(folder))) as gif:
        assert gif.n_frames == 4
    with pytest.raises(FileNotFoundError, match="`folder` must have pictures"):
        callbacks.animation(tmp_path)


@pytest.mark.filterwarnings("default:.*is not overwritten")
def test_pictures_of_other_programs_are_kept(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    other = visualization.to_png(np.zeros((2, 2, 3), "uint8"))
    users = {"20240101.png": other, "00000001.png": b"a user's own"}
    for name, content in users.items():
        (folder / name).write_bytes(content)
    model = sequential(own())

    def draw(epochs, every=1):
        watched(
            model,
            callbacks.ProbePictures(BATCH, folder, every=every),
            epochs=epochs,
        )
        return [path.name for path in callbacks.pictures(folder)]

    with pytest.warns(UserWarning, match="00000001.png is not of `Probe"):
        assert draw(3) == [f"{done:08}.png" for done in (0, 2, 3)]
    # Another process replaces the pictures of this one.
    assert draw(2, every=2) == [f"{done:08}.png" for done in (0, 2)]
    for name, content in users.items():
        assert (folder / name).read_bytes() == content
    with Image.open(io.BytesIO(callbacks.animation(folder))) as gif:
        assert gif.n_frames >= 1


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1500,2000",
    "--virtual-time-budget=20000",
]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read()
    except OSError:
        return b""


TAGS = "/data/plugin/images/tags"


def served(url, tag):
    """The images of a tag, in order of steps."""
    where = f"{url}/data/plugin/images"
    question = urllib.parse.urlencode(
        {"run": "memory", "tag": tag, "sample": 0}
    )
    steps = json.loads(answers(f"{where}/images?{question}"))
    return [
        answers(f"{where}/individualImage?{step['query']}") for step in steps
    ]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_tensorboard_shows_the_images_in_a_browser(tmp_path):
    logs = tmp_path / "logs"
    fitted(sequential(ntm()), callbacks.MemoryTensorBoard(logs, BATCH, 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "tensorboard.main", "--logdir", str(logs)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, *command, "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            if b"memory_over_time" in answers(f"{url}{TAGS}"):
                break
            assert server.poll() is None
            time.sleep(0.5)
        shot = tmp_path / "images.png"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        page = [CHROMIUM, *FLAGS, profile]
        subprocess.run(
            [*page, f"--screenshot={shot}", f"{url}/#images"],
            check=True,
            timeout=120,
            capture_output=True,
        )
        images = {
            tag: served(url, tag)
            for tag in json.loads(answers(f"{url}{TAGS}"))["memory"]
        }
    finally:
        server.terminate()
        server.wait()
    assert set(map(len, images.values())) == {3}  # epochs
    for tag, shown in images.items():
        with Image.open(io.BytesIO(shown[-1])) as image:
            animated = tag.endswith("over_time")
            assert image.format == ("GIF" if animated else "PNG")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for end in (0.0, 1.0):  # the weightings are visible
        color = np.multiply(matplotlib.colormaps["viridis"](end)[:3], 255)
        assert (np.abs(pixels - color).max(-1) < 8).sum() > 200


def test_each_image_is_a_step(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (4, 5, 3), "uint8") for _ in range(3)]
    callbacks.write_images(tmp_path / "memory", "map", images)
    found = tensors(events(tmp_path), "map")
    assert [step for step, _ in found] == [1, 2, 3]
    for (_, values), image in zip(found, images):
        width, height, encoded = values
        assert (int(width), int(height)) == (5, 4)
        assert (np.asarray(Image.open(io.BytesIO(encoded))) == image).all()
