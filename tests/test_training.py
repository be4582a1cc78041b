"""Tests of configurations, training and the command, on a small task."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import typing

import harness
import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import slow_unless
from PIL import Image

from keras_memory import cli
from keras_memory import training
from keras_memory import visualization
from keras_memory.inspection import callbacks
from keras_memory.training import config
from keras_memory.training import presets
from keras_memory.training import runner
from keras_memory.training import runs
from keras_memory.training import tasks
from keras_memory.training.callbacks import Curriculum
from keras_memory.training.callbacks import Progress

SMALL = [
    "bits=3",
    "max_length=4",
    "buckets=1",
    "memory_slots=11",
    "slot_size=5",
    "controller_units=13",
    "batch_size=2",
    "test_lengths=(7,)",
    "probe_lengths=()",
    "report_every=5",
    "checkpoint_every=50",
    "picture_every=25",
    "curriculum=()",
    "initialization=keras",
    "jit_compile=False",
]
OF_A_MEMORY = ("memory_slots", "slot_size", "controller_units", "initializ")


def small(*settings):
    return config.override(
        presets.PRESETS["copy"]["default"], [*SMALL, *settings]
    )


def plain(*settings):
    """Settings of an LSTM, the fastest to trace, if only the run matters."""
    fit = [one for one in SMALL if not one.startswith(OF_A_MEMORY)]
    return config.override(
        presets.PRESETS["copy"]["lstm"], [*fit, "units=13", *settings]
    )


# Settings of runs that are broken and resumed, and of the runs that they must
# equal.
RESUMED = [
    "steps=50",
    "checkpoint_every=10",
    "curriculum_doubles=True",
    "curriculum_error=99",
    "curriculum_reports=3",
    "learning_rate_decay=True",
    "picture_every=10",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, its printed lines, and its results."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    shown = []
    results = training.train(small(*RESUMED), folder, shown.append)
    return folder, shown, results


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    training.train(plain(*RESUMED), folder, lambda line: None)
    return folder


def test_a_run_writes_all_its_files(run):
    folder, shown, results = run
    assert runs.read_config(folder) == small(*RESUMED)
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["steps"] == 50
    assert results["sequences"] == 100
    assert {
        "wrong_bits_per_sequence_up_to_4",
        "wrong_bits_per_sequence_at_4",
        "bits_per_sequence_at_7",
    } <= set(results)
    rows = runs.read_history(folder, small())
    assert len(rows) == 10
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert [row["step"] for row in rows] == list(range(5, 51, 5))
    assert [row["sequences"] for row in rows] == list(range(10, 101, 10))
    assert [row["longest"] for row in rows] == [1] * 3 + [2] * 3 + [4] * 4
    assert results["longest_trained"] == 4
    assert results["bits_in_a_sequence_at_7"] == 3 * 7
    assert results["seconds"] == round(rows[-1]["seconds"], 1)
    assert any(folder.glob("logs/train/events*"))
    assert any(folder.glob("logs/memory/events*"))
    frames = folder / "pictures" / "length-4"
    assert [path.stem for path in sorted(frames.iterdir())] == [
        f"{reports:08}" for reports in (0, 2, 4, 6, 8, 10)
    ]
    with Image.open(folder / "pictures" / "length-4.gif") as gif:
        assert gif.n_frames == 6
    for name in ("length-4", "learning"):
        with Image.open(folder / "pictures" / f"{name}.png") as png:
            assert png.format == "PNG"
    assert "error" in shown[0]
    assert "50/50" in shown[-2]
    assert shown[-1] == "testing, drawing and exporting"
    line = "50/50 steps (100 sequences)  0:00 left  <=4  loss "
    assert shown[-2].startswith(line)
    for name in ("loss", "wrong bits per sequence", "seq/s"):
        assert name in shown[-2]
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
        training.train(presets.PRESETS["copy"]["default"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def without_seconds(folder):
    return [
        {name: row[name] for name in row if name != "seconds"}
        for row in runs.read_history(folder, small())
    ]


def test_runs_of_one_seed_are_equal(plain_run, tmp_path):
    training.train(plain(*RESUMED), tmp_path / "two", lambda line: None)
    assert without_seconds(tmp_path / "two") == without_seconds(plain_run)


def test_steps_limit_the_run_and_pictures_can_be_off(tmp_path):
    settings = plain("steps=7", "picture_every=0", "checkpoint_every=0")
    results = training.train(settings, tmp_path / "run", lambda line: None)
    assert results["steps"] == 7
    assert (tmp_path / "run" / "pictures" / "length-4.png").exists()
    assert not (tmp_path / "run" / "checkpoint.keras").exists()


def summaries(folder):
    """Dict from each TensorBoard tag to its steps."""
    found = {}
    for path in sorted(folder.glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_histories_and_summaries_count_steps(run, monkeypatch, tmp_path):
    """`test_a_run_writes_all_its_files` checks console and history."""
    folder, _, _ = run
    written = summaries(folder / "logs" / "train")
    assert written["epoch_loss"] == list(range(5, 51, 5))
    assert written["epoch_sequences"] == list(range(5, 51, 5))
    of_memory = summaries(folder / "logs" / "memory")
    assert {step for steps in of_memory.values() for step in steps} <= set(
        range(5, 51, 5)
    )
    assert of_memory["probe"][-1] == 50
    written = {}
    monkeypatch.setattr(
        runs,
        "_write_png",
        lambda path, figure: written.update({path.name: figure}),
    )
    model = runs.load(folder / "model.keras")
    runs.draw(small(*RESUMED), model, folder, {})
    runs.compare([folder], tmp_path / "out.png")
    learning = written["learning.png"].axes
    comparison = written["out.png"].axes
    assert [ax.get_ylabel() for ax in learning] == [
        "loss",
        "wrong bits per sequence",
    ]
    marks = [text.get_text() for text in learning[0].texts]
    assert marks == [" up to 2", " up to 4"]  # the curriculum
    goal = f"goal: {small(*RESUMED).stop_error:g}"
    assert (goal in learning[1].get_legend_handles_labels()[1]) == (
        small(*RESUMED).stop_error > 0
    )
    for ax in (*learning, *comparison):
        (line,) = ax.get_legend_handles_labels()[0][:1]
        assert list(line.get_xdata()) == list(range(5, 51, 5))
    for ax in (learning[-1], *comparison):
        assert ax.get_xlabel() == "steps of 2 sequences"


def test_an_animation_fits_its_largest_picture(tmp_path):
    for number, width in enumerate((30, 47)):
        frame = np.full((20, width, 3), 50 * number, "uint8")
        path = tmp_path / f"{number:08}.png"
        path.write_bytes(visualization.to_png(frame, callbacks.MARK))
    (tmp_path / "out.gif").write_bytes(callbacks.animation(tmp_path))
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.size == (47, 20)


def test_a_run_of_an_older_version_can_be_read(run, tmp_path):
    """Its history has no columns for steps and sequences."""
    folder = tmp_path / "old"
    folder.mkdir()
    rows = runs.read_history(run[0], small(*RESUMED))
    names = [name for name in rows[0] if name not in runs.COUNTS]
    lines = [["epoch", *names]]
    lines += [[i, *(row[n] for n in names)] for i, row in enumerate(rows)]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    (folder / "history.csv").write_text(text)
    old = runs.read_history(folder, small(*RESUMED))
    for name in ("step", "sequences"):
        assert [row[name] for row in old] == [row[name] for row in rows]
    assert {row["longest"] for row in old} == {4}


def test_time_left_excludes_compilation(monkeypatch):
    """The first steps take a minute, later ones a tenth of a second."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config, shown = small("steps=100", "report_every=10"), []
    curriculum = Curriculum(config)
    progress = Progress(config, curriculum, 0.0, shown.append)
    progress.on_train_begin()
    for epoch in range(3):
        progress.on_epoch_begin(epoch)
        for batch in range(10):
            now[0] += 60.0 if (epoch, batch) < (0, 3) else 0.1
            progress.on_train_batch_end(batch)
        progress.on_epoch_end(epoch, report())
    assert [line.split("  ")[1] for line in shown[1:]] == [
        "0:09 left",
        "0:08 left",
        "0:07 left",
    ]
    assert shown[1].startswith("10/100 steps (20 sequences)")


@pytest.mark.parametrize("report_every", [1, 3])
def test_time_left_is_unknown_after_one_step(report_every, monkeypatch):
    config, shown = small(f"report_every={report_every}", "steps=1"), []
    curriculum = Curriculum(config)
    progress = Progress(config, curriculum, 0.0, shown.append)
    progress.on_train_begin()
    progress.on_epoch_begin(0)
    progress.on_train_batch_end(0)
    progress.on_epoch_end(0, report())
    assert "  ?:?? left  " in shown[-1]


# Curriculum.


class Model:
    stop_training = False


def curriculum_of(*settings):
    curriculum = Curriculum(small(*settings))
    curriculum.set_model(Model())
    return curriculum


def reached(curriculum):
    rng = np.random.default_rng(3)
    batches = (curriculum.sample(rng, 1) for _ in range(50))
    return max(int(batch.mask.sum()) for batch in batches)


def report(loss=0.0, error=0.0):
    return {"loss": loss, "wrong_bits_per_sequence": error}


def test_the_curriculum_grows_with_success_and_ends_at_the_goal():
    curriculum = curriculum_of(
        "curriculum=(1, 2)", "curriculum_loss=0.2", "stop_error=0.5"
    )
    assert reached(curriculum) == 1
    curriculum.on_epoch_end(0, report(loss=0.3))
    assert reached(curriculum) == 1
    curriculum.on_epoch_end(1, report(loss=0.1))
    assert reached(curriculum) == 2
    curriculum.on_epoch_end(2, report(loss=0.1))
    assert reached(curriculum) == 4
    assert not curriculum.model.stop_training  # only the full length counts
    curriculum.on_epoch_end(3, report(error=0.7))
    assert not curriculum.model.stop_training
    curriculum.on_epoch_end(4, report(error=0.4))
    assert curriculum.model.stop_training


def test_the_curriculum_grows_with_steps():
    curriculum = curriculum_of("curriculum=(1, 2)", "curriculum_steps=8")
    seen = []
    for epoch in range(6):  # 8 steps are two reports of 5
        seen.append(reached(curriculum))
        curriculum.on_epoch_end(epoch, report(loss=9.0))
    assert seen == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        (["max_length=13"], [1, 2, 4, 8, 13]),
        (["max_length=12", "curriculum=(2, 3)"], [2, 3, 6, 12]),
        (["max_length=12", "min_length=5", "curriculum=(3,)"], [5, 10, 12]),
        (["max_length=4", "min_length=4"], [4]),
    ],
)
def test_lengths_double_up_to_the_longest_of_the_task(settings, longest):
    assert (
        curriculum_of("curriculum_doubles=True", *settings).longest == longest
    )


def test_the_curriculum_grows_after_low_errors_in_a_row():
    curriculum = curriculum_of(
        "curriculum_doubles=True",
        "curriculum_error=0.5",
        "curriculum_reports=2",
    )
    seen = []
    for epoch, error in enumerate((0.4, 0.5, 0.4, 0.4, 0.4, 0.6, 0.1, 0.1)):
        curriculum.on_epoch_end(epoch, report(loss=9.0, error=error))
        seen.append(reached(curriculum))
    assert seen == [1, 1, 1, 2, 2, 2, 2, 4]


def test_the_time_limit_ends_a_training_within_a_report(tmp_path, monkeypatch):
    clock = itertools.count()  # a second passes between two looks
    monkeypatch.setattr(
        training.callbacks,
        "time",
        types.SimpleNamespace(perf_counter=clock.__next__),
    )
    folder = tmp_path / "run"
    settings = plain(
        *("steps=500", "minutes=0.25", "buckets=0"),
        *("curriculum_doubles=True", "curriculum_error=1e-9"),
    )
    results = training.train(settings, folder, lambda line: None)
    assert 5 < results["steps"] < 15 and results["steps"] % 5
    assert results["seconds"] >= 15
    *_, last = runs.read_history(folder, settings)
    assert last["step"] == results["steps"]
    # The model is tested on what it was trained on, not on the whole task.
    assert results["longest_trained"] == 1
    assert {"bits_per_sequence_up_to_1", "bits_per_sequence_at_1"} < set(
        results
    )
    (folder / "results.json").unlink()  # as if it was killed before the end
    assert training.resume(folder, lambda line: None) == results


@pytest.mark.parametrize("preset", ["default", "dnc"])
def test_presets_take_controller_dropout(preset):
    settings = ["controller_dropout=0.25", "controller_layers=2"]
    model = training.build(
        config.override(presets.PRESETS["copy"][preset], settings)
    )
    (layer,) = [one for one in model.layers if hasattr(one, "cell")]
    (controller,) = layer.cell.block_controllers
    assert [cell.dropout for cell in controller.cells] == [0.25, 0.25]


# Resuming.


class Killed(Exception):
    pass


def same_run(folder, other):
    assert without_seconds(folder) == without_seconds(other)
    first, second = (
        runs.load(one / "model.keras").get_weights() for one in (folder, other)
    )
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    first, second = (
        json.loads((one / "results.json").read_text())
        for one in (folder, other)
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    names = [
        sorted(p.name for p in one.glob("pictures/**/*.*"))
        for one in (folder, other)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(  # before and after a checkpoint, and last
    "line", [1, slow_unless(False, 4), slow_unless(False, 10)]
)
def test_a_resumed_run_equals_an_unbroken_one(line, run, tmp_path):
    folder, shown = tmp_path / "run", []

    def show(text):
        shown.append(text)
        if len(shown) == line + 1:  # the first line is the headline
            raise Killed

    with pytest.raises(Killed):
        training.train(small(*RESUMED), folder, show)
    training.resume(folder, lambda text: None)
    same_run(folder, run[0])
    with pytest.raises(ValueError, match="finished"):
        training.resume(folder)


def test_ctrl_c_saves_and_exits(plain_run, tmp_path):
    folder, shown = tmp_path / "run", []

    def show(text):
        shown.append(text)
        if text.startswith("15/"):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.train(plain(*RESUMED), folder, show)
    assert signal.getsignal(signal.SIGINT) is before
    assert "a second signal" in shown[-1] or "a second signal" in shown[-2]
    saved = runs.load(folder / "checkpoint.keras")
    assert int(saved.optimizer.iterations) == len(shown[2:]) * 5
    training.resume(folder, lambda text: None)
    same_run(folder, plain_run)


def test_a_second_ctrl_c_exits_at_once(tmp_path):
    folder = tmp_path / "run"

    def show(text):
        if text.startswith(("15/", "stopping")):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(plain(*RESUMED), folder, show)
    saved = runs.load(folder / "checkpoint.keras")
    assert int(saved.optimizer.iterations) == 10


def test_a_diverging_run_stops_and_keeps_the_last_good_weights(
    tmp_path, monkeypatch
):
    class Broken(tasks.Copy):
        """Inputs are NaN from the eighth step on."""

        drawn = 0

        def sample(self, rng, batch_size, **ranges):
            Broken.drawn += batch_size > 1
            inputs, *rest = super().sample(rng, batch_size, **ranges)
            inputs[:] += np.nan if Broken.drawn >= 8 else 0.0
            return tasks.Batch(inputs, *rest)

    start = plain("steps=50", "checkpoint_every=5")
    task = Broken(**dataclasses.asdict(start.task))
    with pytest.raises(ValueError, match="TASKS.*Received: .*Broken"):
        config.to_json(dataclasses.replace(start, task=task))
    monkeypatch.setitem(tasks.TASKS, "copy", Broken)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="has diverged.*report of step 10$"):
        training.train(
            dataclasses.replace(start, task=task), folder, lambda line: None
        )
    assert not (folder / "results.json").exists()
    saved = runs.load(folder / "checkpoint.keras")
    assert int(saved.optimizer.iterations) == 5
    assert all(np.isfinite(weight).all() for weight in saved.get_weights())
    assert len(runs.read_history(folder, start)) == 1


def test_only_one_process_can_train_a_run(plain_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder)
    (folder / "results.json").unlink()
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1])\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, folder / "config.json"],
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match="Only one writer"):
            training.resume(folder, lambda line: None)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    training.resume(folder, lambda line: None)


def test_ctrl_c_at_the_very_end_saves(tmp_path, monkeypatch):
    def interrupted(self, logs=None):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner.ProbePictures, "on_train_end", interrupted)
    folder = tmp_path / "run"
    settings = ["steps=10", "checkpoint_every=0"]
    with pytest.raises(KeyboardInterrupt):
        training.train(plain(*settings), folder, lambda line: None)
    saved = runs.load(folder / "checkpoint.keras")
    assert int(saved.optimizer.iterations) == 10


def test_evaluation_draws_sequences_not_seen_in_training(monkeypatch):
    class Model:
        def __call__(self, inputs, training):
            return inputs[..., :8]

    task = tasks.Copy(min_length=8, max_length=8)
    seen, fresh = set(), set()
    for step in range(50):
        batch = task.sample(np.random.default_rng([1, step]), 8)
        seen |= {row.tobytes() for row in batch.inputs}
    sample = tasks.Copy.sample

    def spy(*arguments, **ranges):
        batch = sample(*arguments, **ranges)
        fresh.update(row.tobytes() for row in batch.inputs)
        return batch

    monkeypatch.setattr(tasks.Copy, "sample", spy)
    runs.evaluate(Model(), task)
    (probe,) = runs.probes(
        small("bits=8", "min_length=8", "max_length=8", "test_lengths=()")
    ).values()
    assert probe.inputs.shape == (1, 17, 9)
    assert len(seen) == 400
    assert len(fresh) == 321
    assert not fresh & seen


def test_evaluation_has_every_length_equally_often():
    """An ignorant model costs one bit for each bit."""

    class Model:
        def __call__(self, inputs, training):
            return tf.fill(tf.shape(inputs[..., :8]), 0.5)

    results = runs.evaluate(Model(), tasks.Copy())
    assert results["bits_per_sequence_up_to_20"] == 8 * 10.5
    results = runs.evaluate(Model(), tasks.Copy(), length=7)
    assert results["bits_per_sequence_at_7"] == 8 * 7
    results = runs.evaluate(Model(), tasks.Copy(), longest=6, sequences=48)
    assert results["bits_per_sequence_up_to_6"] == 8 * 3.5


def test_each_architecture_has_a_preset(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Small:
        units: int = 3

        def build(self, inputs, units, activation):
            return keras.layers.Dense(units, activation)(inputs)

    monkeypatch.setitem(config.MODELS, "small", Small)
    made = presets._presets()
    assert {*made} == {*presets.PRESETS}
    for task, named in made.items():
        of_all = ["default", "lstm", "dnc", "sam", "sdnc", "small"]
        assert [*named][: len(of_all)] == of_all
        assert named.pop("small").model == Small()
        assert named == presets.PRESETS[task]


@pytest.mark.parametrize("task", ["copy", "associative-recall"])
def test_presets_of_sparse_memories_double_the_length(task):
    sam, sdnc = (presets.PRESETS[task][name] for name in ("sam", "sdnc"))
    assert type(sdnc.model) is config.SDNCConfig
    assert sdnc == dataclasses.replace(sam, model=sdnc.model)
    assert sam.curriculum_doubles
    assert sam.task.max_length > 100 * sam.curriculum[0]


def test_sparse_memories_of_a_chain_read_with_one_head():
    chain = presets.PRESETS["chain"]
    for name in ("sam", "sdnc"):
        model = config.MODELS[name](read_heads=1)
        assert chain[name] == dataclasses.replace(chain["lstm"], model=model)


def test_invalid_resumes_are_refused(run, tmp_path, capsys):
    assert cli.main(["train"]) == 2
    assert "the task must be one of: copy" in capsys.readouterr().err
    for folder, reason in (
        (run[0], "finished"),
        (tmp_path, "config.json"),
        (tmp_path / "absent", "config.json"),
    ):
        assert cli.main(["train", "--resume", str(folder)]) == 2
        assert reason in capsys.readouterr().err
    torn = tmp_path / "torn"
    shutil.copytree(run[0], torn)
    (torn / "results.json").unlink()
    (torn / "checkpoint.keras").write_bytes(b"half")
    assert cli.main(["train", "--resume", str(torn)]) == 2
    assert "checkpoint.keras must be a model" in capsys.readouterr().err
    for more in (
        ["--seed", "0"],
        ["--print-config"],
        ["--preset", "paper"],
        ["--report-every", "7"],
        ["--set", "bits=3"],
    ):
        assert cli.main(["train", "--resume", str(torn), *more]) == 2
        error = capsys.readouterr().err
        assert "takes no other options" in error
        assert error.endswith(f"Received: {more[0]}\n")


@pytest.mark.slow
def test_a_killed_run_can_always_be_resumed(tmp_path):
    """kill -9 at 25 random moments, many of them during a checkpoint."""
    settings = [*SMALL, *RESUMED, "steps=300", "checkpoint_every=5"]
    unbroken = tmp_path / "unbroken"
    training.train(small(*settings), unbroken, lambda line: None)
    rng = np.random.default_rng(3)
    folder = tmp_path / "run"
    kills = finished = 0
    while kills < 25 or not finished:
        if (folder / "config.json").exists():
            arguments = ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            sets = [f"--set={setting}" for setting in settings]
            arguments = ["copy", *sets, "--out", str(folder)]
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first = process.stdout.readline()  # the run has started
        wait = rng.uniform(0.0, 15.0) if kills < 25 else None
        try:
            rest, _ = process.communicate(timeout=wait)
            assert process.returncode == 0, first + rest
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        for path in folder.glob("*.keras"):
            if not path.name.startswith("."):
                runs.load(path)
        if (folder / "results.json").exists():
            same_run(folder, unbroken)
            finished += 1
            shutil.rmtree(folder)


TRAIN = """
import sys
from keras_memory import cli
raise SystemExit(cli.main(["train", *sys.argv[1:]]))
"""


def test_config_survives_json():
    made = small("head_order=('read', 'write')", "initial_memory=0.5")
    assert config.from_json(config.to_json(made)) == made
    assert made.model.head_order == ("read", "write")


def test_settings_reach_task_model_and_training():
    made = small("bits=5", "controller=gru", "learning_rate=1e-4", "seed=7")
    assert made.task == tasks.Copy(bits=5, max_length=4, buckets=1)
    assert made.model.controller == "gru"
    assert made.learning_rate == 1e-4
    assert made.seed == 7
    assert presets.PRESETS["copy"]["default"].task == tasks.Copy()
    options = "optimizer_options={'momentum': 0.5}"
    settings = training.build(small("optimizer=sgd", options)).optimizer
    assert isinstance(settings, keras.optimizers.SGD)
    assert settings.momentum == 0.5


PRESETS = [
    (task, name) for task in tasks.TASKS for name in presets.PRESETS[task]
]


@pytest.mark.parametrize(("task", "name"), PRESETS)
def test_presets_survive_json_and_keep_their_task(task, name):
    made = presets.PRESETS[task][name]
    assert config.from_json(config.to_json(made)) == made
    assert made.task.name == task
    assert dataclasses.replace(made, seed=2) != made


@pytest.mark.parametrize(
    "task",
    [
        # A task of numbers; `run` is a task of bits. The others are slow.
        slow_unless(task == "adding", task)
        for task in tasks.TASKS
    ],
)
def test_each_task_trains(task, tmp_path):
    preset = presets.PRESETS[task]["default"]
    longest = 10 if task == "n-grams" else 4
    settings = [setting for setting in SMALL if not setting.startswith("bits")]
    settings += ["steps=5", f"max_length={longest}", "min_length=2"]
    settings += ["test_lengths=()"]
    if task == "n-grams":
        settings.append("min_length=7")
    if task == "priority-sort":
        settings.append("sorted_vectors=3")
    small = config.override(preset, settings)
    results = training.train(small, tmp_path / "run", lambda line: None)
    assert all(np.isfinite(value) for value in results.values())
    if task == "n-grams":
        # Other models are tested on the same sequences.
        again = runs.evaluate(training.build(small), small.task, length=10)
        optimal = results["optimal_bits_per_sequence_at_10"]
        assert again["optimal_bits_per_sequence_at_10"] == optimal
        assert 0 < optimal < results["bits_per_sequence_at_10"]
    folder = str(tmp_path / "run")
    assert (
        cli.main(["evaluate", folder, "--length", "3" if longest == 4 else "9"])
        == 0
    )


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
        ["train", "copy", "--set", "controller=gru"],  # not in this preset
        ["train", "copy", "--set", "optimizer=adamm"],
        ["train", "copy", "--set", "optimizer_options={'beta': 0.5}"],
        ["train", "copy", "--set", "optimizer_options=3"],
        ["train", "copy", "--set", "test_lengths=(0,)"],
        ["train", "argmax", "--set", "test_lengths=(99,)"],
        ["train", "copy", "--set", "clipvalue=1.0"],  # conflicts with clipnorm
        ["train", "copy", "--set", "curriculum_loss=0"],
        ["train", "copy", "--set", "curriculum_error=-1"],
        ["train", "copy", "--set", "curriculum_reports=0"],
        ["train", "copy", "--set", "curriculum_doubles=2"],
        ["train", "copy", "--set", "curriculum_error=1"]
        + ["--set", "curriculum_steps=100"],
        ["train", "copy", "--set", "test_sequences=0"],
        ["train", "copy", "--set", "buckets=-1"],
        ["train", "copy", "--set", "minutes=nan"],
        ["train", "copy", "--minutes", "-1"],
        ["train", "copy", "--preset", "mine"],
        ["train", "copy", "--set", "controller_dropout=1.5"],
        ["train", "copy", "--set", "controller_dropout=-0.5"],
        ["train", "copy", "--set", "initialization=mine"],
        ["train", "copy", "--report-every", "0"],
        ["train", "copy", "--checkpoint-every", "-1"],
        ["train", "copy", "--set", "learning_rate=nan"],
        ["train", "copy", "--set", "learning_rate=-1"],
        ["train", "copy", "--set", "clipnorm=0"],
        ["train", "copy", "--set", "curriculum=(9, 5)"],
        ["train", "copy", "--set", "curriculum=5"],
        ["train", "copy", "--set", "curriculum=('a',)"],
        ["train", "copy", "--set", "min_length=25"],
        ["train", "copy", "--set", "stop_error=-1"],
        ["train", "copy", "--set", "steps={[]: 1}"],
        ["train", "copy", "--set", "jit_compile=1"],
        ["train", "copy", "--set", "head_order=('read',)"],
        ["train", "copy", "--steps", "0"],
        ["train", "copy", "--seed", "-1"],
    ],
    ids=lambda arguments: " ".join(arguments[1:]),
)
def test_bad_input_prints_one_line_and_leaves_no_files(
    arguments, tmp_path, capsys
):
    out = tmp_path / "run"
    assert cli.main([*arguments, "--out", str(out)]) == 2
    text = capsys.readouterr()
    assert text.err.startswith("keras-memory: error: ")
    assert text.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["play"], ["evaluate"], ["train", "copy", "--steps", "x"]]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "keras-memory" in capsys.readouterr().err


def test_a_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert cli.main(["train", "copy", "--out", str(tmp_path)]) == 2
    assert "a new or empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


def test_an_impossible_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert cli.main(["train", "copy", "--out", str(out)]) == 2
    assert "keras-memory: error:" in capsys.readouterr().err


def test_the_command_trains_and_prints_the_folder(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = ["train", "copy", "--steps", "5", "--seed", "3", *settings]
    (tmp_path / "runs" / "copy-1").mkdir(parents=True)  # an earlier run
    assert cli.main(command) == 0
    assert "runs/copy-2/export/1" in capsys.readouterr().out
    run = tmp_path / "runs" / "copy-2"
    assert config.from_json((run / "config.json").read_text()).seed == 3
    assert (run / "pictures" / "length-4.png").exists()


# Other commands on runs.


def test_evaluate_prints_the_errors(plain_run, capsys):
    folder = plain_run
    results = json.loads((folder / "results.json").read_text())
    assert cli.main(["evaluate", str(folder), "--length", "7", "3"]) == 0
    text = capsys.readouterr().out
    error = results["wrong_bits_per_sequence_at_7"]
    trained = "copy: trained to 4 vectors in 50 steps (100 sequences)\n"
    assert text.startswith(trained)
    assert f"wrong bits per sequence at 7: {error} of 21\n" in text
    assert "bits per sequence at 3: " in text
    assert cli.main(["evaluate", str(folder)]) == 0
    assert "up to 4" in capsys.readouterr().out


def test_plot_writes_pictures(plain_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder)
    shutil.rmtree(folder / "pictures")
    frames = plain_run / "pictures" / "length-4"
    shutil.copytree(frames, folder / "pictures" / "length-4")
    assert cli.main(["plot", str(folder)]) == 0
    paths = capsys.readouterr().out.split()
    assert [os.path.basename(path) for path in paths] == [
        "length-4.png",
        "length-4.gif",
        "learning.png",
        "error_by_length.png",
    ]
    for path in paths:
        with Image.open(path) as image:
            image.verify()


def test_compare_joins_seeds_and_reports_when_they_learned(
    plain_run, tmp_path, capsys
):
    other = tmp_path / "other"
    training.train(plain("steps=30", "seed=7"), other, lambda line: None)
    out = tmp_path / "out.png"
    rows = runs.compare([plain_run, other], out, threshold=1e9)
    assert [row["seed"] for row in rows] == [1, 7]
    assert [row["sequences_below_1e+09"] for row in rows] == [10, 10]
    last = runs.read_history(other, small())[-1]["wrong_bits_per_sequence"]
    assert rows[1]["last_error"] == round(last, 4)
    assert all(row["finished"] for row in rows)
    command = ["compare", str(plain_run), str(other), "--by", "seconds"]
    assert cli.main([*command, "--below", "0", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "sequences_below_0" in text
    assert text.count("\n") == 4
    with Image.open(out) as image:
        image.verify()


@pytest.mark.parametrize(
    "changes, label",
    [
        ({"seed": 7}, "copy (2 runs)"),
        ({"seed": 7, "checkpoint_every": 5}, "copy (2 runs)"),
        ({"batch_size": 3}, "batch_size=3 (1 run)"),
        (
            {"steps": 51, "batch_size": 3, "clipnorm": 2.0, "optimizer": "sgd"},
            "FOLDER/other (1 run)",
        ),
    ],
)
def test_the_legend_names_the_settings_that_differ(
    run, changes, label, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run[0] / "history.csv", other)
    changed = dataclasses.replace(small(*RESUMED), **changes)
    (other / "config.json").write_text(config.to_json(changed))
    written = []
    monkeypatch.setattr(
        runs, "_write_png", lambda path, figure: written.append(figure)
    )
    runs.compare([run[0], other], tmp_path / "out.png")
    _, labels = written[0].axes[0].get_legend_handles_labels()
    assert labels[-1] == label.replace("FOLDER", str(tmp_path))


def test_finished_seeds_keep_their_last_error_in_the_mean():
    class Run:
        def __init__(self, steps, errors):
            self.steps, self.errors = np.array(steps), np.array(errors)

    x, errors = runs._aligned(
        [Run([5, 10], [3.0, 1.0]), Run([5, 10, 15], [4.0, 2.0, 0.0])], "steps"
    )
    np.testing.assert_array_equal(x, [5, 10, 15])
    np.testing.assert_array_equal(errors, [[3, 1, 1], [4, 2, 0]])


def test_export_writes_a_run_once_per_version(run, tmp_path, capsys):
    out = tmp_path / "served"
    command = ["export", str(run[0]), str(out), "--version", "3"]
    assert cli.main(command) == 0
    assert (out / "3" / "saved_model.pb").exists()
    assert cli.main(command) == 2  # this version exists
    assert "keras-memory: error:" in capsys.readouterr().err


def test_an_exported_sam_has_small_states(tmp_path):
    sizes = ["memory_slots=5000", "slot_size=3", "controller_units=3"]
    changed = config.override(presets.PRESETS["copy"]["sam"], sizes)
    model = training.build(changed)
    folder = runs.export(model, changed.task, tmp_path / "sam")
    step = tf.saved_model.load(folder).signatures["step"]
    shapes = {
        name: spec.shape[1]
        for name, spec in step.structured_input_signature[1].items()
    }
    assert shapes["memory"] == 3 * 1000
    assert shapes["last_access"] == 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "RUN", "--length", "0"],
        ["evaluate", "RUN", "--repeats", "3"],
        ["evaluate", "nowhere"],
        ["plot", "nowhere"],
        ["compare", "RUN", "nowhere"],
        ["compare", "RUN", "--out", "nowhere/x.png"],
        ["compare", "RUN", "--out", "x.jpg"],
        ["export", "RUN", "OUT", "--version", "0"],
        ["export", "nowhere", "OUT"],
    ],
    ids=" ".join,
)
def test_bad_input_about_runs_prints_one_line(arguments, run, tmp_path, capsys):
    places = {"RUN": str(run[0]), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(part, part) for part in arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("keras-memory: error: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_print_config_shows_the_settings(capsys):
    command = ["train", "copy", "--preset", "pytorch-ntm", "--print-config"]
    assert cli.main([*command, "--set", "memory_slots=7"]) == 0
    shown = config.from_json(capsys.readouterr().out)
    preset = presets.PRESETS["copy"]["pytorch-ntm"]
    assert shown == config.override(preset, ["memory_slots=7"])


# Custom architectures and tasks.


@dataclasses.dataclass
class GRU:
    """A user's architecture: not frozen, with fields of several types."""

    units: int = 7
    rate: float = 0.0
    sizes: "tuple[int, ...]" = ()
    names: list = dataclasses.field(default_factory=list)
    bits: int | None = None  # tasks have this name, too
    kind: typing.Literal["one", "two"] = "one"
    seed: int = 0  # trainings have this name, too

    def build(self, inputs, units, activation):
        x = keras.layers.GRU(self.units, return_sequences=True)(inputs)
        return keras.layers.Dense(units, activation)(x)


@dataclasses.dataclass(frozen=True)
class Shifted(tasks.Copy):
    """A task with a field that is not a size."""

    noise: float = 0.5

    name = "shifted"


@pytest.fixture
def own(monkeypatch):
    """A training with a custom architecture and task."""
    monkeypatch.setitem(config.MODELS, "gru", GRU)
    monkeypatch.setitem(tasks.TASKS, "shifted", Shifted)
    return dataclasses.replace(
        plain(),
        model=GRU(sizes=(2, 3), names=["a", "b"]),
        task=Shifted(bits=3, max_length=4, buckets=1),
    )


def test_a_custom_model_survives_json(own):
    assert config.from_json(config.to_json(own)) == own


def test_settings_reach_a_custom_model(own):
    made = config.override(
        own,
        ["units=9", "rate=1", "sizes=[[4], 5]", "names=['c']", "noise=1"],
    )
    assert made.model == GRU(9, 1.0, ((4,), 5), ["c"])
    assert made.task.noise == 1.0
    made = config.override(own, ["bits=4", "model.bits=5", "seed=6"])
    assert (made.task.bits, made.model.bits, made.seed) == (4, 5, 6)
    made = config.override(own, ["task.bits=8", "model.seed=9"])
    assert (made.task.bits, made.model.seed, made.seed) == (8, 9, own.seed)
    for setting in ("units=x", "kind=three", "names=3", "rate=True", "n=1"):
        with pytest.raises(ValueError, match=setting.split("=")[0]):
            config.override(own, [setting])


def test_a_custom_model_is_trained_and_resumed(own, tmp_path):
    settings = ["steps=10", "checkpoint_every=5", "picture_every=0"]

    def show(text):
        if text.startswith("5/"):
            os.kill(os.getpid(), signal.SIGINT)

    folder = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        training.train(config.override(own, settings), folder, show)
    assert training.resume(folder, lambda line: None)["steps"] == 10
    assert runs.load(f"{folder}/model.keras").count_params()
    assert runs.read_config(folder).model == own.model


def test_parts_that_could_not_be_restored_are_refused(own, monkeypatch):
    @dataclasses.dataclass
    class Mine(GRU):
        other: object = None
        name: str = "mine"

    monkeypatch.setitem(config.MODELS, "mine", Mine)
    with pytest.raises(
        ValueError, match="`model` must be of type Architecture"
    ):
        config.Training(tasks.Copy(), lambda *_: None)
    for model in (Mine(name="other"), Mine(other={1, 2})):
        with pytest.raises(ValueError, match="unchanged from JSON|be written"):
            config.to_json(dataclasses.replace(own, model=model))


def test_numpy_numbers_are_accepted(own):
    made = dataclasses.replace(
        own,
        steps=np.int64(7),
        learning_rate=np.float32(0.5),
        jit_compile=np.bool_(True),
        test_lengths=np.arange(2, 4),
        curriculum=[np.int32(2)],
        optimizer_options={"momentum": np.float64(0.5)},
        task=Shifted(bits=np.int8(3), max_length=np.uint8(4)),
        model=GRU(units=np.int64(3)),
    )
    plain = json.loads(json.dumps(dataclasses.asdict(made), default=int))
    assert plain["test_lengths"] == [2, 3] and plain["curriculum"] == [2]
    assert type(made.steps) is int and type(made.task.bits) is int
    assert made.jit_compile is True
    assert config.from_json(config.to_json(made)) == made
    json.dumps(dataclasses.asdict(made.task))


def test_test_and_probe_lengths_follow_the_longest(capsys):
    assert (
        cli.main(["train", "copy", "--set", "max_length=5", "--print-config"])
        == 0
    )
    made = config.from_json(capsys.readouterr().out)
    assert made.test_lengths == (10, 20, 30)
    assert made.probe_lengths == (5, 20)
    start = presets.PRESETS["copy"]["default"]
    made = config.override(start, ["test_lengths=(7,)", "max_length=5"])
    assert (made.test_lengths, made.probe_lengths) == ((7,), (5, 20))
    made = config.override(start, ["max_length=1"])
    assert (made.test_lengths, made.probe_lengths) == ((2, 4, 6), (1, 4))
    assert config.override(start, ["bits=5"]).test_lengths == (40, 80, 120)


# Damaged files.

GOOD = config.to_json(presets.PRESETS["copy"]["default"])
DAMAGED = {
    "empty": b"",
    "truncated": GOOD.encode()[: len(GOOD) // 2],
    "zeros": GOOD.encode()[:90] + bytes(80),
    "all zeros": bytes(500),
    "UTF-16": GOOD.encode("utf-16"),
    "Latin-1": GOOD.replace("adam", "\xe4dam").encode("latin-1"),
    "deep": b"[" * 10_000 + b"]" * 10_000,
    "deep within": GOOD.replace(
        '"seed": 1', '"seed": ' + "[" * 10_000 + "]" * 10_000
    ).encode(),
    "a list": b"[1, 2]",
    "a number": b"3",
    "nothing in it": b"{}",
    "a task of text": GOOD.replace('"task": {', '"task": "x", "y": {').encode(),
    "a name of numbers": GOOD.replace('"name": "ntm"', '"name": [1]').encode(),
    "another name": GOOD.replace('"name": "ntm"', '"name": "mine"').encode(),
    "an unknown value": GOOD.replace('"seed"', '"seeds"').encode(),
    "text for a number": GOOD.replace('"seed": 1', '"seed": "x"').encode(),
    "a number of 5,000 digits": GOOD.replace(
        '"seed": 1', '"seed": ' + "9" * 5000
    ).encode(),
    "not finite": GOOD.replace("0.005", "NaN").encode(),
    "none": GOOD.replace('"steps": 6000', '"steps": null').encode(),
    "lists in lists": GOOD.replace('"curriculum": []', '"curriculum": [[]]')
    .encode(),
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_configuration_is_refused_with_its_path(
    content, tmp_path, capsys
):
    assert content != GOOD.encode()
    path = tmp_path / "config.json"
    path.write_bytes(content)
    (tmp_path / "model.keras").touch()
    with pytest.raises(ValueError, match="^" + re.escape(str(path))):
        runs.read_config(tmp_path)
    for command in (["train", "--resume"], ["evaluate"], ["compare"]):
        assert cli.main([*command, str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert str(path) in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"loss,seconds\n1.0,2.0\n",
        b"loss,seconds,wrong_bits_per_sequence\n1.0,2.0\n",
        b"loss,seconds,wrong_bits_per_sequence\n1.0,2.0,x\n",
        b"loss,seconds,wrong_bits_per_sequence\n1.0,2.0,3.0,4.0\n",
        b"loss,seconds,wrong_bits_per_sequence\n1.0,2.0," + bytes(9),
        b"step,loss,seconds,wrong_bits_per_sequence\nnan,1.0,2.0,3.0\n",
        b"\xff\xfe" + "loss,seconds\n1,2".encode("utf-16"),
        b"loss,seconds,wrong_bits_per_sequence\n1.0,2.0," + b"1" * 200_000,
    ],
)
def test_a_damaged_history_is_refused_with_its_path(content, tmp_path):
    path = tmp_path / "history.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(str(path))):
        runs.read_history(tmp_path, small())


@pytest.mark.parametrize("content", [b"", b"{", bytes(9), b"[]", b"\xff\xfe"])
def test_damaged_results_are_refused_with_their_path(content, tmp_path):
    (tmp_path / "config.json").write_text(GOOD)
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(str(path))):
        training.resume(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04half", bytes(99)])
def test_a_damaged_model_is_refused_with_its_name(content, tmp_path):
    for name in ("model.keras", "checkpoint.keras"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} must be a model"):
            runs.load(str(tmp_path / name))


def test_a_damaged_picture_is_refused_with_its_path(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    frames = folder / "pictures" / "length-4"
    path = frames / "00000000.png"
    path.write_bytes(path.read_bytes()[:200])
    model = runs.load(folder / "model.keras")
    with pytest.raises(ValueError, match=re.escape(str(frames))):
        runs.draw(small(*RESUMED), model, folder)


# Runs of different tasks, and unfinished runs.


def test_runs_of_different_tasks_are_not_compared(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run[0] / "history.csv", other)
    repeat = presets.PRESETS["repeat-copy"]["default"]
    (other / "config.json").write_text(config.to_json(repeat))
    out = tmp_path / "out.png"
    command = ["compare", str(run[0]), str(other), "--out", str(out)]
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert "one task" in told and "other (repeat-copy)" in told
    assert not out.exists()


def test_commands_use_the_checkpoint_of_an_unfinished_run(
    plain_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder)
    (folder / "results.json").unlink()
    (folder / "model.keras").unlink()
    note = "is not finished; this is its checkpoint.keras, of step 50"
    out = str(tmp_path / "served")
    for command in (
        ["evaluate", str(folder), "--length", "2"],
        ["plot", str(folder)],
        ["export", str(folder), out],
    ):
        assert cli.main(command) == 0
        assert note in capsys.readouterr().err
    assert cli.main(["evaluate", str(plain_run), "--length", "2"]) == 0
    assert "not finished" not in capsys.readouterr().err


# Wrong arguments.

START = presets.PRESETS["copy"]["default"]
RNG = np.random.default_rng(1)
NO_TEXT, NO_PATH = (None, 3.5, "x"), (None, 3.5)
CALLS = [
    ("path", NO_PATH, runs.load),
    ("folder", NO_PATH, runs.read_config),
    ("folder", NO_PATH, lambda x: runs.read_history(x, START)),
    ("config", NO_TEXT, lambda x: runs.read_history(".", x)),
    ("reports", (3.5, "x"), lambda x: runs.read_history(".", START, x)),
    ("config", NO_TEXT, lambda x: runs.sequences_seen(x, 1)),
    ("model", NO_TEXT, lambda x: runs.evaluate(x, tasks.Copy())),
    ("task", NO_TEXT, lambda x: runs.evaluate(len, x)),
    ("seed", NO_TEXT, lambda x: runs.evaluate(len, tasks.Copy(), x)),
    (
        "longest",
        (3.5, "x", 0),
        lambda x: runs.evaluate(len, tasks.Copy(), longest=x),
    ),
    (
        "sequences",
        (None, 0, "x"),
        lambda x: runs.evaluate(len, tasks.Copy(), sequences=x),
    ),
    ("config", NO_TEXT, runs.probes),
    ("config", NO_TEXT, lambda x: runs.draw(x, len, ".")),
    ("folder", NO_PATH, lambda x: runs.draw(START, len, x)),
    ("config", NO_TEXT, lambda x: runs.draw_lengths(x, len, ".")),
    ("folder", NO_PATH, lambda x: runs.draw_lengths(START, len, x)),
    ("folders", (*NO_TEXT, []), lambda x: runs.compare(x, "x.png")),
    ("folder", NO_PATH, lambda x: runs.compare([x], "x.png")),
    ("path", NO_PATH, lambda x: runs.compare(["."], x)),
    ("by", NO_TEXT, lambda x: runs.compare(["."], "x.png", x)),
    (
        "threshold",
        (None, "x"),
        lambda x: runs.compare(["."], "x.png", threshold=x),
    ),
    ("config", NO_TEXT, config.to_json),
    ("configuration", (*NO_TEXT, b"{}"), config.from_json),
    ("config", NO_TEXT, lambda x: config.override(x, [])),
    ("settings", NO_TEXT, lambda x: config.override(START, x)),
    ("setting", NO_TEXT, lambda x: config.override(START, [x])),
    ("task", NO_TEXT, lambda x: config.Training(x, START.model)),
    ("model", (*NO_TEXT, GRU), lambda x: config.Training(START.task, x)),
    ("steps", NO_TEXT, lambda x: dataclasses.replace(START, steps=x)),
    ("curriculum", NO_TEXT, lambda x: dataclasses.replace(START, curriculum=x)),
    ("optimizer", NO_PATH, lambda x: dataclasses.replace(START, optimizer=x)),
    ("units", NO_TEXT, config.LSTMConfig),
    ("memory_slots", NO_TEXT, config.NTMConfig),
    ("num_layers", NO_TEXT, lambda x: config.DNCConfig(num_layers=x)),
    ("config", NO_TEXT, training.build),
    ("config", NO_TEXT, lambda x: training.train(x, ".")),
    ("folder", NO_PATH, lambda x: training.train(START, x)),
    ("show", NO_TEXT, lambda x: training.train(START, "x", x)),
    ("folder", NO_PATH, training.resume),
    ("folder", NO_PATH, runner.make_run_folder),
    ("min_length", NO_TEXT, tasks.Copy),
    ("rng", NO_TEXT, lambda x: tasks.Copy().sample(x, 1)),
    ("batch_size", NO_TEXT, lambda x: tasks.Copy().sample(RNG, x)),
    ("length", (3.5, "x"), lambda x: tasks.Copy().sample(RNG, 1, length=x)),
    ("longest", (3.5, "x"), lambda x: tasks.Copy().sample(RNG, 1, longest=x)),
    (
        "repeats",
        (3.5, "x"),
        lambda x: tasks.RepeatCopy().sample(RNG, 1, repeats=x),
    ),
    ("task", NO_TEXT, lambda x: tasks.dataset(x, 1)),
    ("batch_size", NO_TEXT, lambda x: tasks.dataset(tasks.Copy(), x)),
    ("seed", NO_TEXT, lambda x: tasks.dataset(tasks.Copy(), 1, x)),
    ("first_step", NO_TEXT, lambda x: tasks.dataset(tasks.Copy(), 1, 1, x)),
    ("batch", NO_TEXT, tasks.NGrams().optimal_outputs),
    (
        "batch.mask",
        NO_TEXT,
        lambda x: tasks.NGrams().optimal_outputs(
            tasks.Batch(np.ones((2, 9, 1)), np.ones((2, 9, 1)), x)
        ),
    ),
]


@pytest.mark.parametrize(("name", "wrong", "call"), CALLS)
def test_errors_name_the_wrong_argument(
    name, wrong, call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{re.escape(name)}\b"):
            call(value)
    assert os.listdir(tmp_path) == []
