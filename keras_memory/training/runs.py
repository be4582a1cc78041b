"""Reads, tests, draws and compares the models of run folders."""

import contextlib
import csv
import functools
import json
import os
from collections.abc import Sequence

import keras
import numpy as np

from keras_memory.checks import check_one_of
from keras_memory.checks import check_whole
from keras_memory.checks import is_number
from keras_memory.files import atomic_write
from keras_memory.files import check_path
from keras_memory.files import check_run_folder
from keras_memory.inspection.callbacks import animation
from keras_memory.inspection.probe import Probe
from keras_memory.inspection.probe import probe_picture
from keras_memory.training import losses
from keras_memory.training import tasks
from keras_memory.training.config import check_training
from keras_memory.training.config import from_json
from keras_memory.training.config import to_json

EVALUATED_SEQUENCES, EVALUATED_BATCH_SIZE = 320, 8
# The longest stream of an exported memory that starts empty, such as a SAM.
STREAM_STEPS = 1000

COUNTS = "step", "sequences", "longest"  # totals so far, in each report

# Settings that change what is written, not what is learned.
_REPORTING = (
    "test_lengths",
    "test_sequences",
    "probe_lengths",
    "report_every",
    "checkpoint_every",
    "picture_every",
)


@contextlib.contextmanager
def _reading(path, what):
    """Names the file in errors that occur while it is read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(
            f"{path} must be {what}. Received: {kind}{error}"
        ) from error


def load(path):
    """Loads a model that a training has saved.

    Args:
        path: path of the `.keras` file.

    Raises:
        ValueError: the file is not such a model.
        FileNotFoundError: the file does not exist.
    """
    path = check_path("path", path)
    if not path.exists():
        raise FileNotFoundError(f"There is no model {path}")
    with _reading(path, "a model that a training has saved"):
        model = keras.models.load_model(path)
        if getattr(model, "optimizer", None) is None:
            raise ValueError("a model without optimizer")
    return model


def read_config(folder):
    """Reads the configuration of a run folder.

    Raises:
        ValueError: `folder` is no run folder, or its configuration cannot be
            read.
    """
    path = check_run_folder(folder) / "config.json"
    with _reading(path, "a configuration that a training has written"):
        return from_json(path.read_text("utf-8"))


def is_finished(folder):
    """True if a run is finished, so that it has results.

    Raises:
        ValueError: the results cannot be read.
    """
    path = check_path("folder", folder) / "results.json"
    if not path.exists():
        return False
    with _reading(path, "results that a training has written"):
        results = json.loads(path.read_text("utf-8"))
        if not isinstance(results, dict):
            raise ValueError(f"a {type(results).__name__}, not a dict")
    return True


def read_history(folder, config, reports=None):
    """Reads the reports of a run.

    Args:
        folder: path of the run folder.
        config: its `config.Training`.
        reports: int, number of reports to read; None for all.

    Returns:
        List with a dict of numbers for each report: steps and sequences
        trained on so far (`step`, `sequences`), the longest length trained on
        (`longest`), loss, errors, seconds.

    Raises:
        ValueError: there are too few reports, a report lacks loss, error or
            seconds, or a value is not a number.
    """
    check_training(config)
    path = check_path("folder", folder) / "history.csv"
    if reports is not None:
        check_whole("reports", reports, least=0)
    wanted = {"loss", "seconds", losses.KINDS[config.task.kind].error}
    what = (
        f"a file of {f'{reports} ' if reports else ''}whole reports of "
        f"{', '.join(sorted(wanted))}, as the training wrote them"
    )
    rows = []
    with _reading(path, what):
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))[:reports]
        rows = [
            {key: float(row[key]) for key in row if row[key] != "NA"}
            for row in rows
        ]
        if len(rows) < (reports or 0):
            raise ValueError(f"{len(rows)} reports")
        for done, row in enumerate(rows, 1):
            if not wanted <= set(row):
                raise ValueError(
                    f"a report with only {', '.join(map(str, row))}"
                )
            # Older runs did not write the counts.
            sequences = sequences_seen(config, done)
            step, longest = (
                sequences // config.batch_size,
                config.task.max_length,
            )
            for name, value in zip(COUNTS, (step, sequences, longest)):
                row[name] = int(row.get(name, value))
    return rows


def longest_trained(folder, config, steps):
    """The longest length that a run had trained on after `steps` steps."""
    history = read_history(folder, config)
    seen = [row["longest"] for row in history if row["step"] <= steps]
    return int([config.task.max_length, *seen][-1])


def sequences_seen(config, reports):
    """Number of training sequences after `reports` reports."""
    check_training(config)
    steps = np.minimum(reports * config.report_every, config.steps)
    return steps * config.batch_size


def export(model, task, folder, version=1):
    """Exports a model for TensorFlow Serving; returns the version's folder."""
    from keras_memory.serving.export import export_for_serving

    return export_for_serving(
        model,
        folder,
        version=version,
        name=task.name,
        max_steps=STREAM_STEPS,
    )


def evaluate(
    model,
    task,
    seed=1,
    longest=None,
    sequences=EVALUATED_SEQUENCES,
    **ranges,
):
    """Tests a model on fresh sequences.

    Args:
        model: a model that `build` made.
        task: a task of `tasks.py`.
        seed: int, at least 0, seed of the sequences. They differ from the
            training sequences of the same seed.
        longest: int, the largest length; None for the task's `max_length`.
        sequences: int, at least 1, number of sequences, rounded up to whole
            batches of 8.
        **ranges: arguments of `task.sample`: `length`, one length for all
            sequences (default: lengths spread evenly up to `longest`);
            `repeats`.

    Returns:
        Dict of the task's errors, named by error and length. For bits also the
        mean number of bits in a sequence; for `n-grams` also the error of the
        optimal predictor.

    Raises:
        ValueError: `model` is no model, `task` is no task, or the task cannot
            have the length.
    """
    check_whole("seed", seed, least=0)
    check_whole("sequences", sequences, least=1)
    if not callable(model):
        raise ValueError(
            "`model` must be a model, as `training.build` makes it. "
            f"Received: {type(model).__name__}"
        )
    if not isinstance(task, tasks.Task):
        raise ValueError(
            "`task` must be a task, such as `tasks.Copy()`. "
            f"Received: task={task!r}"
        )
    answer = _compiled(model, task.input_size)
    rng = np.random.default_rng([seed, 0, 2])
    metrics = losses.KINDS[task.kind].make_metrics()
    optimum, bits = [], 0.0
    if isinstance(task, tasks.NGrams):
        optimum.append(losses.BitsPerSequence("optimal_bits_per_sequence"))
    longest = task.max_length if longest is None else longest
    check_whole("longest", longest, least=task.min_length)
    batches = -(-sequences // EVALUATED_BATCH_SIZE)
    lengths = np.linspace(task.min_length, longest, batches)
    for length in lengths.round().astype(int):
        at = {"length": int(length), **ranges}
        batch = task.sample(rng, EVALUATED_BATCH_SIZE, **at)
        outputs = answer(batch.inputs)
        bits += batch.mask.sum() * task.output_size
        for metric in metrics:
            metric.update_state(batch.targets, outputs, batch.mask)
        for metric in optimum:
            best = task.optimal_outputs(batch)
            metric.update_state(batch.targets, best, batch.mask)
    where = f"up_to_{longest}"
    if "length" in ranges:
        where = f"at_{ranges['length']}"
    if "repeats" in ranges:
        where += f"_times_{ranges['repeats']}"
    results = {
        f"{metric.name}_{where}": round(float(metric.result()), 4)
        for metric in metrics + optimum
    }
    if task.kind == "bits":
        bits /= batches * EVALUATED_BATCH_SIZE
        results[f"bits_in_a_sequence_{where}"] = float(bits)
    return results


@functools.lru_cache(maxsize=1)
def _compiled(model, width):
    """Compiles a model for any B and T: traced once, not for each length."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, None, width))])
    def answer(inputs):
        return model(inputs, training=False)

    return answer


def probes(config):
    """Makes the sequences to draw: dict from length to `Probe`."""
    check_training(config)
    lengths = config.probe_lengths or (config.task.max_length,)
    return {
        length: Probe(
            config.task.sample(
                np.random.default_rng([config.seed, 0, 1]), 1, length=length
            )
        )
        for length in lengths
    }


def draw(config, model, folder, drawn=None):
    """Draws a model's probes and its learning curves into `pictures`.

    Writes `length-<length>.png` (inputs, targets, outputs, weightings, memory)
    and `length-<length>.gif` (the training's pictures) for each probe, and
    `learning.png` (loss and error during the training).

    Args:
        config: a `config.Training`.
        model: the trained model.
        folder: path of the run folder.
        drawn: result of `probes`; None calls it.

    Returns:
        List of the paths of the pictures.
    """
    from keras_memory import visualization

    check_training(config)
    pictures = _pictures_of(folder)
    steps = int(model.optimizer.iterations)
    written = []
    for length, probe in (drawn or probes(config)).items():
        picture = probe_picture(
            probe.look(model),
            titled(config, length, steps),
            memory=True,
        )
        written.append(_write_png(pictures / f"length-{length}.png", picture))
        frames = pictures / f"length-{length}"
        if any(frames.glob("*.png")):
            written.append(pictures / f"length-{length}.gif")
            with _reading(frames, "a folder of the training's pictures"):
                joined = animation(frames)
            with atomic_write(written[-1]) as path:
                path.write_bytes(joined)
    history = read_history(folder, config)
    if history:
        error = losses.KINDS[config.task.kind].error
        names = "step", "longest", "loss", error
        picture = visualization.plot_learning(
            {
                f"seed {config.seed}": [
                    {name: row[name] for name in names} for row in history
                ]
            },
            goals={error: config.stop_error} if config.stop_error else None,
            title=f"{config.task.name}: learning",
            x_label=f"steps of {config.batch_size} sequences",
        )
        written.append(_write_png(pictures / "learning.png", picture))
    return written


def _pictures_of(folder):
    pictures = check_run_folder(folder) / "pictures"
    pictures.mkdir(exist_ok=True)
    return pictures


def titled(config, length, steps):
    """The headline of a picture of a probe."""
    return (
        f"{config.task.name}, length {length}: after {steps:,} steps "
        f"({steps * config.batch_size:,} sequences)"
    )


def draw_lengths(config, model, folder):
    """Draws the error at lengths up to twice the longest in training.

    For classes, which `argmax` has, lengths go up to the longest in training.

    Args:
        config, model, folder: as in `draw`.

    Returns:
        The path of the picture.
    """
    from keras_memory import visualization

    check_training(config)
    pictures = _pictures_of(folder)
    task = config.task
    error = losses.KINDS[task.kind].error
    trained = longest_trained(folder, config, int(model.optimizer.iterations))
    longest = trained * (1 if task.kind == "class" else 2)
    lengths = np.unique(
        np.linspace(task.min_length, longest, 12).round().astype(int)
    )
    errors = [
        evaluate(
            model,
            task,
            config.seed,
            sequences=config.test_sequences,
            length=int(length),
        )[f"{error}_at_{length}"]
        for length in lengths
    ]
    picture = visualization.plot_curves(
        {f"seed {config.seed}": (lengths, errors)},
        title=f"{task.name}: error by length",
        x_label="length",
        y_label=error.replace("_", " "),
        marks={"longest in training": trained},
    )
    return _write_png(pictures / "error_by_length.png", picture)


def compare(folders, path, by="steps", threshold=0.1):
    """Compares runs; runs that differ only in the seed are drawn as one line.

    Args:
        folders: paths of run folders, each once, of one task.
        path: path of the PNG file to write.
        by: `"steps"`, `"sequences"` or `"seconds"`, the horizontal axis.
        threshold: float, the error to reach; see the returned dicts.

    Returns:
        List of dicts, one per run: folder, seed, steps, sequences and seconds
        until the error is first below `threshold` (None if it never is), the
        smallest and the last error, and whether the run is finished.

    Raises:
        ValueError: a folder is no run, has no reports or is given twice, or
            the runs are of different tasks.
    """
    from keras_memory import visualization

    check_one_of("by", by, ("steps", "sequences", "seconds"))
    if not is_number(threshold):
        raise ValueError(
            f"`threshold` must be a number. Received: threshold={threshold!r}"
        )
    is_one = isinstance(folders, (str, os.PathLike))
    if is_one or not isinstance(folders, Sequence) or not folders:
        raise ValueError(
            "`folders` must be a list of the paths of run folders. "
            f"Received: folders={folders!r}"
        )
    path = check_path("path", path)
    folders = [check_run_folder(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            "`folders` must not have a run twice. "
            f"Received: {', '.join(map(str, folders))}"
        )
    runs = [_Run(folder) for folder in folders]
    if len({run.config.task.name for run in runs}) > 1:
        told = [f"{run.folder} ({run.config.task.name})" for run in runs]
        raise ValueError(
            "`folders` must be runs of one task, as errors of different tasks "
            f"cannot be compared. Received: {', '.join(told)}"
        )
    groups = {}
    for run in runs:
        groups.setdefault(run.settings(), []).append(run)
    common = set.intersection(*(set(settings) for settings in groups))
    series = {}
    for settings, members in groups.items():
        differing = sorted(set(settings) - common)
        label = ", ".join(f"{name}={value}" for name, value in differing)
        if len(differing) > 3:
            label = str(members[0].folder) + ", ..." * (len(members) > 1)
        label = label or runs[0].config.task.name
        label += f" ({len(members)} {'runs' if len(members) > 1 else 'run'})"
        series[label] = _aligned(members, by)
    picture = visualization.plot_curves(
        series,
        title="Learning; runs that ended early go on level",
        x_label=_axis(by, {run.config.batch_size for run in runs}),
        y_label=runs[0].error.replace("_", " "),
        log_y=True,
    )
    _write_png(path, picture)
    return [run.summary(threshold) for run in runs]


def _axis(by, batch_sizes):
    if by == "steps" and len(batch_sizes) == 1:
        return f"steps of {batch_sizes.pop()} sequences"
    return f"{by} trained on" if by == "sequences" else by


class _Run:
    """A run folder's history, for comparison."""

    def __init__(self, folder):
        self.folder = folder
        self.config = read_config(folder)
        history = read_history(folder, self.config)
        if not history:
            raise ValueError(
                "Only runs with reports can be compared. "
                f"Received: {folder}, which has no history.csv"
            )
        self.error = losses.KINDS[self.config.task.kind].error
        self.errors = np.array([row[self.error] for row in history])
        self.steps, self.sequences, self.seconds = (
            np.array([row[name] for row in history])
            for name in ("step", "sequences", "seconds")
        )

    def settings(self):
        """Tuple of (name, value) of all settings that affect learning, except
        the seed."""
        document = json.loads(to_json(self.config))
        for name in ("seed", *_REPORTING):
            document.pop(name)
        flat = {}
        for name, value in document.items():
            parts = value if name in ("task", "model") else {name: value}
            for key, setting in parts.items():
                flat[name if key == "name" else key] = str(setting)
        return tuple(flat.items())

    def summary(self, threshold):
        reached = np.flatnonzero(self.errors < threshold)
        first = reached[0] if len(reached) else None

        def at(values):
            return None if first is None else round(float(values[first]))

        return {
            "folder": str(self.folder),
            "seed": self.config.seed,
            f"steps_below_{threshold:g}": at(self.steps),
            f"sequences_below_{threshold:g}": at(self.sequences),
            f"seconds_below_{threshold:g}": at(self.seconds),
            "least_error": round(float(self.errors.min()), 4),
            "last_error": round(float(self.errors[-1]), 4),
            "finished": is_finished(self.folder),
        }


def _aligned(runs, by):
    """x (P,) and errors (S, P) of runs; ended runs keep their last error."""
    longest = max((getattr(run, by) for run in runs), key=lambda x: x[-1])
    errors = [np.interp(longest, getattr(run, by), run.errors) for run in runs]
    return longest, np.stack(errors)


def _write_png(path, figure):
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png")
    return path
