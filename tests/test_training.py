"""Configurations, training and the command line, on a small task."""

import csv
import dataclasses
import json
import os

import harness
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import keras_memory
from keras_memory import callbacks
from keras_memory import cli
from keras_memory import config
from keras_memory import tasks
from keras_memory import training

SMALL = [
    "bits=3",
    "max_length=4",
    "buckets=1",
    "memory_slots=11",
    "slot_size=5",
    "controller_units=13",
    "batch_size=2",
    "report_every=5",
    "checkpoint_every=50",
    "picture_every=25",
    "curriculum=()",
    "jit_compile=False",
]


def small(*settings):
    return config.override(config.PRESETS["copy"], [*SMALL, *settings])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, what was shown, and what was returned."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    shown = []
    results = training.train(small("steps=50"), folder, shown.append)
    return folder, shown, results


def test_a_run_leaves_everything(run):
    folder, shown, results = run
    again = config.from_json((folder / "config.json").read_text())
    assert again == small("steps=50")
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["steps"] == 50
    assert results["sequences"] == 100
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert any(folder.glob("logs/train/events*"))
    assert any(folder.glob("logs/probe/events*"))
    with Image.open(folder / "pictures" / "trained.png") as png:
        assert png.format == "PNG"
    with Image.open(folder / "pictures" / "training.gif") as gif:
        assert gif.n_frames == 3  # before, after 25 and after 50 steps
    assert "wrong bits" in shown[0]
    assert "50/50" in shown[-1]
    for name in ("loss", "bits", "wrong", "seq/s", "left"):
        assert name in shown[-1]
    assert not list(folder.rglob("*writing*"))


def test_a_run_can_be_loaded_and_served(run):
    folder, _, _ = run
    model = keras.models.load_model(folder / "model.keras")
    kept = keras.models.load_model(folder / "checkpoint.keras")
    x = np.random.default_rng(3).normal(size=(2, 7, 4)).astype("float32")
    harness.close(kept(x), model(x), tolerance=0)
    served = tf.saved_model.load(str(folder / "export" / "1"))
    outputs = served.signatures["serving_default"](tf.constant(x))
    harness.close(next(iter(outputs.values())), model(x))
    assert int(kept.optimizer.iterations) == 50


def test_a_backend_that_cannot_export_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="TensorFlow backend.*=torch"):
        training.train(config.PRESETS["copy"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_same_seed_same_run(run, tmp_path):
    folder, _, _ = run
    training.train(small("steps=50"), tmp_path / "two", lambda line: None)
    first = (folder / "history.csv").read_text()
    assert (tmp_path / "two" / "history.csv").read_text() == first


class Results:
    stop_training = False


def test_steps_are_the_most_steps_and_pictures_can_be_off(tmp_path):
    settings = small("steps=7", "picture_every=0", "checkpoint_every=0")
    results = training.train(settings, tmp_path / "run", lambda line: None)
    assert results["steps"] == 7
    assert (tmp_path / "run" / "pictures" / "trained.png").exists()
    assert not (tmp_path / "run" / "checkpoint.keras").exists()


def test_a_stateful_layer_has_no_probe(tmp_path):
    layer = keras_memory.NTMLayer(3, stateful=True)
    with pytest.raises(ValueError, match="stateful"):
        callbacks.ProbePictures(layer, None, tmp_path)


def curriculum_of(*settings):
    curriculum = training.Curriculum(small(*settings))
    curriculum.set_model(Results())
    return curriculum


def reached(curriculum):
    rng = np.random.default_rng(3)
    batches = (curriculum.sample(rng, 1) for _ in range(50))
    return max(int(batch.mask.sum()) for batch in batches)


def test_the_curriculum_grows_with_success_and_ends_at_the_goal():
    curriculum = curriculum_of("curriculum=(1, 2)", "stop_wrong_bits=0.5")
    bad = {"accuracy": 0.9, "wrong_bits_per_sequence": 0.0}
    good = {"accuracy": 0.99, "wrong_bits_per_sequence": 0.7}
    best = {"accuracy": 1.0, "wrong_bits_per_sequence": 0.4}
    assert reached(curriculum) == 1
    curriculum.on_epoch_end(0, bad)
    assert reached(curriculum) == 1
    curriculum.on_epoch_end(1, good)
    assert reached(curriculum) == 2
    curriculum.on_epoch_end(2, best)  # the goal counts at full length only
    assert reached(curriculum) == 4
    assert not curriculum.model.stop_training
    curriculum.on_epoch_end(3, good)
    assert not curriculum.model.stop_training
    curriculum.on_epoch_end(4, best)
    assert curriculum.model.stop_training


def test_saving_is_all_or_nothing(tmp_path):
    class Model:
        def __init__(self, error=None):
            self.error = error

        def save(self, path):
            path.write_text("half")
            if self.error:
                raise self.error
            path.write_text("whole")

    path = tmp_path / "model.keras"
    training.save(Model(), path)
    with pytest.raises(OSError, match="disk full"):
        training.save(Model(OSError("disk full")), path)
    assert path.read_text() == "whole"


def test_the_picture_shows_the_probe(tmp_path):
    settings = small()
    model = training.build(settings)
    probe = settings.task.sample(np.random.default_rng(1), 1, length=4)
    pictures = callbacks.ProbePictures(
        model.layers[1], probe, tmp_path, every=2
    )
    pictures.set_model(model)
    for _ in range(2):  # also in a second `fit`
        pictures.on_train_begin()
        assert len(pictures.frames) == 1
        for epoch in range(3):
            pictures.on_epoch_end(epoch)
        assert len(pictures.frames) == 2
        pictures.on_train_end()
        assert len(pictures.frames) == 3
    with Image.open(tmp_path / "latest.png") as png:
        assert np.array_equal(np.asarray(png), pictures.frames[-1])


def test_config_goes_through_json():
    made = small("head_order=('read', 'write')", "initial_memory=0.5")
    assert config.from_json(config.to_json(made)) == made
    assert made.model.head_order == ("read", "write")


def test_settings_reach_task_model_and_training():
    made = small("bits=5", "controller=gru", "learning_rate=1e-4", "seed=7")
    assert made.task == tasks.Copy(bits=5, max_length=4, buckets=1)
    assert made.model.controller == "gru"
    assert made.learning_rate == 1e-4
    assert made.seed == 7
    assert config.PRESETS["copy"].task == tasks.Copy()
    settings = training.build(small("optimizer=sgd", "momentum=0.5")).optimizer
    assert isinstance(settings, keras.optimizers.SGD)
    assert settings.momentum == 0.5


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_are_of_known_parts(name):
    made = config.PRESETS[name]
    assert config.from_json(config.to_json(made)) == made
    assert made.task.name == name
    assert dataclasses.replace(made, seed=2) != made


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nothing"],
        ["train", "copy", "--set", "memory_slot=3"],
        ["train", "copy", "--set", "memory_slots"],
        ["train", "copy", "--set", "memory_slots=0"],
        ["train", "copy", "--set", "memory_slots=2"],
        ["train", "copy", "--set", "memory_slots=3.5"],
        ["train", "copy", "--set", "memory_slots=many"],
        ["train", "copy", "--set", "controller=ltsm"],
        ["train", "copy", "--set", "optimizer=adamm"],
        ["train", "copy", "--set", "momentum=0.5"],  # adam has none
        ["train", "copy", "--set", "learning_rate=nan"],
        ["train", "copy", "--set", "learning_rate=-1"],
        ["train", "copy", "--set", "clipnorm=0"],
        ["train", "copy", "--set", "curriculum=(9, 5)"],
        ["train", "copy", "--set", "curriculum=5"],
        ["train", "copy", "--set", "curriculum=('a',)"],
        ["train", "copy", "--set", "min_length=15"],
        ["train", "copy", "--set", "stop_wrong_bits=-1"],
        ["train", "copy", "--set", "steps={[]: 1}"],
        ["train", "copy", "--set", "jit_compile=1"],
        ["train", "copy", "--set", "head_order=('read',)"],
        ["train", "copy", "--steps", "0"],
        ["train", "copy", "--seed", "-1"],
    ],
    ids=lambda arguments: " ".join(arguments[1:]),
)
def test_bad_input_is_one_line_and_nothing_is_left(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*arguments, "--out", str(out)]) == 2
    text = capsys.readouterr()
    assert text.err.startswith("keras-memory: error: ")
    assert text.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["play"], ["train"], ["train", "copy", "--steps", "x"]]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "keras-memory" in capsys.readouterr().err


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert cli.main(["train", "copy", "--out", str(tmp_path)]) == 2
    assert "folder of its own" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert cli.main(["train", "copy", "--out", str(out)]) == 2
    assert "keras-memory: error:" in capsys.readouterr().err


def test_the_command_trains_and_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = ["train", "copy", "--steps", "5", "--seed", "3", *settings]
    (tmp_path / "runs" / "copy-1").mkdir(parents=True)  # of an earlier run
    assert cli.main(command) == 0
    assert "runs/copy-2/export/1" in capsys.readouterr().out
    run = tmp_path / "runs" / "copy-2"
    assert config.from_json((run / "config.json").read_text()).seed == 3
    assert (run / "pictures" / "trained.png").exists()
