"""Run folders: what a training has left, read, tested and drawn."""

import csv
import functools
import json
import pathlib

import keras
import numpy as np

from keras_memory import config as configuration
from keras_memory import losses
from keras_memory import tasks
from keras_memory import visualization
from keras_memory.callbacks import Probe
from keras_memory.callbacks import animation
from keras_memory.callbacks import probe_picture
from keras_memory.checks import check_whole
from keras_memory.files import written_aside

EVALUATED_BATCHES, EVALUATED_BATCH_SIZE = 40, 8

# Values of a configuration that say what is written down.
_REPORTING = (
    "test_lengths",
    "probe_lengths",
    "report_every",
    "checkpoint_every",
    "picture_every",
)


def load(path):
    """Loads a model that a training has saved.

    Raises:
        ValueError: a file that is none.
        OSError: it is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no model {path}")
    try:
        model = keras.models.load_model(path)
    except Exception as error:
        raise ValueError(
            f"{path} must be a model that a training has saved. Received a "
            f"file that cannot be read: {error}"
        ) from error
    if model.optimizer is None:
        raise ValueError(
            f"{path} must be a model that a training has saved. Received one "
            "without an optimizer"
        )
    return model


def read_config(folder):
    """Reads the configuration of a run folder.

    Raises:
        ValueError: not a run folder, or a configuration that cannot be read.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        return configuration.from_json(path.read_text())
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "A run folder has a config.json, which a training writes. "
            f"Received: {folder} ({error!r})"
        ) from error


def read_history(folder, config, reports=None):
    """Reads what a run has reported.

    Args:
        folder: path of the run folder.
        config: its `config.Training`.
        reports: int, how many to read; None for all.

    Returns:
        List with a dict of numbers for each report.

    Raises:
        ValueError: fewer reports than asked for, or ones without loss, error
            and seconds, or that are no numbers.
    """
    wanted = {"loss", "seconds", losses.KINDS[config.task.kind].error}
    path = pathlib.Path(folder) / "history.csv"
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))[:reports]
    try:
        rows = [
            {key: float(row[key]) for key in row if row[key] != "NA"}
            for row in rows
        ]
    except (TypeError, ValueError):
        rows = None
    whole = rows is not None and all(wanted <= set(row) for row in rows)
    if not whole or len(rows) < (reports or 0):
        raise ValueError(
            f"{path} must have {reports or 'its'} whole reports, of "
            f"{', '.join(sorted(wanted))}, as the training wrote them"
        )
    return rows


def sequences_seen(config, reports):
    """Number of sequences that were trained on after so many reports."""
    steps = np.minimum(reports * config.report_every, config.steps)
    return steps * config.batch_size


def evaluate(model, task, seed=1, **ranges):
    """Tests a model on 320 fresh sequences.

    Args:
        model: a model that `build` made.
        task: a task of `tasks.py`.
        seed: int, at least 0, of the sequences, which differ from those that
            a training with this seed sees.
        **ranges: of `task.sample`: `length`, for sequences of this length
            (otherwise they are spread evenly over the task's); `repeats`.

    Returns:
        Dict of the task's errors, named after what they are and the lengths;
        for `n-grams` also what the optimal predictor gets.

    Raises:
        ValueError: a length that the task cannot have.
    """
    check_whole("seed", seed, least=0)
    answer = _compiled(model, task.input_size)
    rng = np.random.default_rng([seed, 0, 2])
    metrics = losses.KINDS[task.kind].make_metrics()
    optimum = []
    if isinstance(task, tasks.NGrams):
        optimum.append(losses.BitsPerSequence("optimal_bits_per_sequence"))
    lengths = np.linspace(task.min_length, task.max_length, EVALUATED_BATCHES)
    for length in lengths.round().astype(int):
        at = {"length": int(length), **ranges}
        batch = task.sample(rng, EVALUATED_BATCH_SIZE, **at)
        outputs = answer(batch.inputs)
        for metric in metrics:
            metric.update_state(batch.targets, outputs, batch.mask)
        for metric in optimum:
            best = task.optimal_outputs(batch)
            metric.update_state(batch.targets, best, batch.mask)
    where = f"up_to_{task.max_length}"
    if "length" in ranges:
        where = f"at_{ranges['length']}"
    if "repeats" in ranges:
        where += f"_times_{ranges['repeats']}"
    return {
        f"{metric.name}_{where}": round(float(metric.result()), 4)
        for metric in metrics + optimum
    }


@functools.lru_cache(maxsize=1)
def _compiled(model, width):
    """The model for any batch and time: traced once, not for each length."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, None, width))])
    def answer(inputs):
        return model(inputs, training=False)

    return answer


def probes(config):
    """The sequences that are drawn: dict from length to `Probe`."""
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
    """Draws what a model does, and how it learned it, into `pictures`.

    For each probe `length-<length>.png` (inputs, targets, outputs,
    weightings, memory), and `length-<length>.gif` over the training;
    `learning.png`, the error over the training.

    Args:
        config: a `config.Training`.
        model: the trained model.
        folder: path of the run folder.
        drawn: what `probes` gave, or None.

    Returns:
        List of the paths of the pictures.
    """
    pictures = pathlib.Path(folder) / "pictures"
    pictures.mkdir(exist_ok=True)
    steps = int(model.optimizer.iterations)
    written = []
    for length, probe in (drawn or probes(config)).items():
        picture = probe_picture(
            probe.look(model),
            f"{config.task.name}, length {length}: after {steps:,} steps",
            memory=True,
        )
        written.append(_write_png(pictures / f"length-{length}.png", picture))
        frames = pictures / f"length-{length}"
        if frames.exists():
            written.append(pictures / f"length-{length}.gif")
            with written_aside(written[-1]) as path:
                path.write_bytes(animation(frames))
    history = read_history(folder, config)
    if history:
        x = sequences_seen(config, np.arange(1, len(history) + 1))
        error = losses.KINDS[config.task.kind].error
        picture = visualization.curves(
            {f"seed {config.seed}": (x, [row[error] for row in history])},
            f"{config.task.name}: learning",
            "sequences trained on",
            error.replace("_", " "),
            log_y=True,
        )
        written.append(_write_png(pictures / "learning.png", picture))
    return written


def draw_lengths(config, model, folder):
    """Draws the error at lengths up to twice the longest of the training.

    Args:
        config, model, folder: as of `draw`.

    Returns:
        The path of the picture.
    """
    task = config.task
    error = losses.KINDS[task.kind].error
    most = task.max_length * (1 if task.kind == "class" else 2)
    lengths = np.unique(
        np.linspace(task.min_length, most, 12).round().astype(int)
    )
    errors = [
        evaluate(model, task, config.seed, length=int(length))[
            f"{error}_at_{length}"
        ]
        for length in lengths
    ]
    picture = visualization.curves(
        {f"seed {config.seed}": (lengths, errors)},
        f"{task.name}: error by length",
        "length",
        error.replace("_", " "),
        marks={"longest in training": task.max_length},
    )
    return _write_png(
        pathlib.Path(folder) / "pictures" / "error_by_length.png", picture
    )


def compare(folders, path, by="sequences", below=0.1):
    """Compares runs: runs that differ in the seed only are drawn as one.

    Args:
        folders: paths of run folders, each once, of one kind of task.
        path: path of the PNG file to write.
        by: `"sequences"`, `"steps"` or `"seconds"`, over which to draw.
        below: the table says from which report on the error is below.

    Returns:
        List of dicts, one a run: folder, seed, sequences and seconds until
        the error is first below `below` (None if it never is), the smallest
        and the last error, and whether the run is finished.

    Raises:
        ValueError: folders that are no runs, have no reports, are given twice,
            or whose errors are not the same quantity.
    """
    if by not in ("sequences", "steps", "seconds"):
        raise ValueError(
            "`by` must be 'sequences', 'steps' or 'seconds'. "
            f"Received: by={by!r}"
        )
    if len({pathlib.Path(folder).resolve() for folder in folders}) < len(
        folders
    ):
        raise ValueError(
            "Each run can be given once. "
            f"Received: {', '.join(map(str, folders))}"
        )
    runs = [_Run(folder) for folder in folders]
    kinds = {run.error for run in runs}
    if len(kinds) != 1:
        raise ValueError(
            "Runs can be compared if their errors are one quantity. "
            f"Received: {', '.join(sorted(kinds))}"
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
    picture = visualization.curves(
        series,
        "Learning; runs that ended early go on level",
        f"{by} trained on" if by == "sequences" else by,
        runs[0].error.replace("_", " "),
        log_y=True,
    )
    _write_png(pathlib.Path(path), picture)
    return [run.summary(below) for run in runs]


class _Run:
    """A run folder's history, for comparison."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.config = read_config(folder)
        history = read_history(folder, self.config)
        if not history:
            raise ValueError(
                "Only runs that have reported can be compared. "
                f"Received: {folder}, which has no history.csv"
            )
        self.error = losses.KINDS[self.config.task.kind].error
        self.errors = np.array([row[self.error] for row in history])
        self.sequences = sequences_seen(
            self.config, np.arange(1, len(history) + 1)
        )
        self.steps = self.sequences // self.config.batch_size
        self.seconds = np.array([row["seconds"] for row in history])

    def settings(self):
        """Tuple of (name, value) of all that makes a difference to learning,
        without the seed."""
        document = json.loads(configuration.to_json(self.config))
        for name in ("seed", *_REPORTING):
            document.pop(name)
        flat = {}
        for name, value in document.items():
            parts = value if name in ("task", "model") else {name: value}
            for key, one in parts.items():
                flat[name if key == "name" else key] = str(one)
        return tuple(flat.items())

    def summary(self, below):
        reached = np.flatnonzero(self.errors < below)
        first = reached[0] if len(reached) else None

        def at(values):
            return None if first is None else round(float(values[first]))

        return {
            "folder": str(self.folder),
            "seed": self.config.seed,
            f"sequences_below_{below:g}": at(self.sequences),
            f"seconds_below_{below:g}": at(self.seconds),
            "least_error": round(float(self.errors.min()), 4),
            "last_error": round(float(self.errors[-1]), 4),
            "finished": (self.folder / "results.json").exists(),
        }


def _aligned(runs, by):
    """x (P,) and the errors (S, P) of runs over it, level after their end."""
    longest = max((getattr(run, by) for run in runs), key=lambda x: x[-1])
    errors = [np.interp(longest, getattr(run, by), run.errors) for run in runs]
    return longest, np.stack(errors)


def _write_png(path, picture):
    with written_aside(path) as aside:
        aside.write_bytes(visualization.encode_png(picture))
    return path
