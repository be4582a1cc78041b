"""From a configuration to a trained, drawn, exported model in a run folder."""

import contextlib
import csv
import gc
import json
import os
import shutil
import signal
import sys
import threading
import time

import keras
import numpy as np

from keras_memory import config as configuration
from keras_memory import losses
from keras_memory import runs
from keras_memory import tasks
from keras_memory.files import check_new_folder
from keras_memory.files import check_run_folder
from keras_memory.files import locked
from keras_memory.files import written_aside
from keras_memory.inspection.callbacks import MemoryTensorBoard
from keras_memory.inspection.callbacks import ProbePictures
from keras_memory.serving.export import export_for_serving


def build(config):
    """Makes the compiled Keras model of a configuration.

    Args:
        config: a `config.Training`.

    Returns:
        `keras.Model` from (B, T, task.input_size) to outputs
        (B, T, task.output_size): probabilities, for `adding` numbers;
        compiled for `fit` on `tasks.dataset`.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown optimizer.
    """
    configuration.check_training(config)
    kind = losses.KINDS[config.task.kind]
    inputs = keras.Input((None, config.task.input_size), name="inputs")
    outputs = config.model(inputs, config.task.output_size, kind.activation)
    model = keras.Model(inputs, outputs, name=config.task.name)
    keras.optimizers.get(config.optimizer)  # raises if there is none
    settings = {
        "learning_rate": config.learning_rate,
        "clipnorm": config.clipnorm,
        "clipvalue": config.clipvalue,
        **config.optimizer_options,
    }
    if config.learning_rate_decay:
        settings["learning_rate"] = keras.optimizers.schedules.CosineDecay(
            config.learning_rate, config.steps
        )
    optimizer = keras.optimizers.get(
        {"class_name": config.optimizer, "config": settings}
    )
    model.compile(
        optimizer,
        kind.loss(),
        weighted_metrics=kind.make_metrics(),
        jit_compile=config.jit_compile,
    )
    # Keras would build it within the first step, which TensorFlow then traces
    # twice.
    optimizer.build(model.trainable_variables)
    return model


def train(config, folder, show=print):
    """Trains a model and leaves everything about it in a run folder.

    The folder gets `config.json`, `checkpoint.keras` (every
    `checkpoint_every` steps), `history.csv`, `logs/` for TensorBoard,
    `pictures/`, at the end `model.keras`, `export/1/`, a SavedModel that has
    been loaded and compared with the model, and last `results.json`.

    Ctrl-C (SIGINT) and SIGTERM end the training after the report that is
    being made, with a checkpoint; a second one ends it at once. `resume` goes
    on from the last checkpoint.

    Args:
        config: a `config.Training`.
        folder: path of the run folder, absent or empty.
        show: function that takes a line of text for the user.

    Returns:
        Dict of results: steps, sequences, seconds, number of parameters, the
        longest length trained on, and the error on fresh sequences, also
        longer ones.

    Raises:
        ValueError: sizes that do not fit, a folder with files in it, a
            backend other than TensorFlow, or a loss that is not finite.
        OSError: the folder cannot be made or written.
        KeyboardInterrupt: it was interrupted.
    """
    _check_backend()
    _check_show(show)
    text = configuration.to_json(config)
    check_new_folder(folder)
    keras.utils.set_random_seed(config.seed)
    model = build(config)
    folder = make_run_folder(folder)
    with written_aside(folder / "config.json") as path:
        path.write_text(text, "utf-8")
    with locked(folder / "config.json"):
        return _run(config, model, folder, show)


def resume(folder, show=print):
    """Goes on with a training that was interrupted or killed.

    From the last checkpoint on, everything is as if it had never ended, but
    for the seconds, for steps that TensorBoard's logs have twice, and for
    dropout masks, which are drawn from the start again: Keras saves no random
    states.

    Args:
        folder: path of the run folder.
        show: function that takes a line of text for the user.

    Returns:
        As `train`.

    Raises:
        ValueError: not a run folder, a finished run, one that is being
            trained, files in it that cannot be read, or as `train`.
        OSError, KeyboardInterrupt: as `train`.
    """
    _check_backend()
    _check_show(show)
    folder = check_run_folder(folder)
    config = runs.read_config(folder)
    if runs.is_finished(folder):
        raise ValueError(
            "Only a run that was interrupted can go on; for longer training "
            "start a new run with more --steps. "
            f"Received: {folder}, which is finished"
        )
    keras.utils.set_random_seed(config.seed)
    checkpoint = folder / "checkpoint.keras"
    if checkpoint.exists():
        model = runs.load(checkpoint)
    else:
        show("no checkpoint yet: from the start")
        model = build(config)
    with locked(folder / "config.json"):
        return _run(config, model, folder, show)


def _check_backend():
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "A training run ends with a SavedModel, which needs the "
            "TensorFlow backend: unset KERAS_BACKEND. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )


def _check_show(show):
    if not callable(show):
        raise ValueError(
            "`show` must be a function that takes a line of text. "
            f"Received: show={show!r}"
        )


def _run(config, model, folder, show):
    """Trains from where the model is to the end, and finishes the folder."""
    done = -(-int(model.optimizer.iterations) // config.report_every)
    rows = runs.read_history(folder, config, done)
    curriculum = Curriculum(config)
    for row in rows:
        curriculum.look(row)
    seconds = rows[-1]["seconds"] if rows else 0.0

    probes = runs.probes(config)
    reports = _in_reports("steps", config)
    if done < reports and not curriculum.reached:
        checkpoint = Checkpoint(
            folder / "checkpoint.keras", _in_reports("checkpoint_every", config)
        )
        with _interruptible(checkpoint, show):
            model.fit(
                tasks.dataset(
                    curriculum,
                    config.batch_size,
                    config.seed,
                    first_step=done * config.report_every,
                ),
                initial_epoch=done,
                epochs=reports,
                steps_per_epoch=config.report_every,
                shuffle=False,
                verbose=0,
                callbacks=[
                    Progress(config, curriculum, seconds, show),
                    curriculum,
                    _StepsBoard(folder / "logs", write_graph=False),
                    History(folder / "history.csv", rows),
                    *_pictures(config, folder, probes),
                    checkpoint,  # last: what is in front of it is written
                ],
            )
        gc.collect()  # the iterator, or TensorFlow warns when Python ends
        if checkpoint.asked:
            raise KeyboardInterrupt
    if curriculum.reached:
        error = curriculum.error.replace("_", " ")
        show(f"the goal is reached: {error} below {config.stop_error}")
    show("testing, drawing and exporting")
    return _finish(config, model, folder, rows[-1], probes)


def _pictures(config, folder, probes):
    every = _in_reports("picture_every", config)
    if not every:
        return []

    def title(length):
        return lambda done: runs.titled(
            config, length, min(done * config.report_every, config.steps)
        )

    drawn = [
        ProbePictures(
            probe,
            folder / "pictures" / f"length-{length}",
            every=every,
            title=title(length),
        )
        for length, probe in probes.items()
    ]
    if isinstance(config.model, configuration.LSTM):
        return drawn
    board = _StepsMemoryBoard(folder / "logs", next(iter(probes.values())))
    return [*drawn, board]


def _finish(config, model, folder, last, probes):
    """Evaluates, draws and exports; `results.json` says that all is there."""
    with written_aside(folder / "model.keras") as path:
        model.save(path)
    steps = int(model.optimizer.iterations)
    task = config.task
    results = {
        "steps": steps,
        "sequences": steps * config.batch_size,
        "seconds": round(last["seconds"], 1),
        "parameters": model.count_params(),
        "longest_trained": last["longest"],
        **runs.evaluate(model, task, config.seed),
    }
    for length in (task.max_length, *config.test_lengths):
        results |= runs.evaluate(model, task, config.seed, length=length)
    runs.draw(config, model, folder, probes)
    shutil.rmtree(folder / "export", ignore_errors=True)
    export_for_serving(model, folder / "export", name=task.name)
    with written_aside(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def make_run_folder(folder):
    """Makes a run folder, or takes an empty one, and returns its path."""
    folder = check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"No permission to write to {folder}")
    return folder


def _in_reports(name, config):
    """A number of steps in reports, rounded up."""
    return -(-getattr(config, name) // config.report_every)


@contextlib.contextmanager
def _interruptible(checkpoint, show):
    """Ctrl-C asks the training for a checkpoint and an end, then insists."""

    def interrupt(number, frame):
        if checkpoint.asked:
            raise KeyboardInterrupt
        checkpoint.asked = True
        show("stopping after this report; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread only
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _StepsBoard(keras.callbacks.TensorBoard):
    """Keras's, on an axis of steps."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(logs["step"], logs)


class _StepsMemoryBoard(MemoryTensorBoard):
    """Counts steps, where that of any training counts epochs."""

    unit = "steps"

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(logs["step"] - 1, logs)


class History(keras.callbacks.Callback):
    """Writes what each report tells into a CSV file, with those before.

    Args:
        path: `pathlib.Path` of the file.
        rows: list of dicts of numbers, the reports before, which grows.
    """

    def __init__(self, path, rows):
        super().__init__()
        self.path = path
        self.rows = rows

    def on_epoch_end(self, epoch, logs=None):
        first = {name: logs[name] for name in runs.COUNTS}
        self.rows.append({**first, **logs})
        names = dict.fromkeys(name for row in self.rows for name in row)
        with (
            written_aside(self.path) as path,
            open(path, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, names, restval="NA")
            writer.writeheader()
            writer.writerows(self.rows)


class Checkpoint(keras.callbacks.Callback):
    """Saves the model after every `every`-th epoch, in place of the last.

    Args:
        path: path of the `.keras` file.
        every: int, at least 0, in epochs; 0 saves only when `asked`.
    """

    asked = False  # for a checkpoint after this epoch, which is then the last

    def __init__(self, path, every):
        super().__init__()
        self.path = path
        self.every = every
        self._saved = True

    def on_epoch_end(self, epoch, logs=None):
        self._saved = False
        if self.asked:
            self.model.stop_training = True
        if self.asked or (self.every and (epoch + 1) % self.every == 0):
            self._save()

    def on_train_end(self, logs=None):
        if (self.every or self.asked) and not self._saved:
            self._save()

    def _save(self):
        with written_aside(self.path) as path:
            self.model.save(path)
        self._saved = True


class Curriculum(keras.callbacks.Callback):
    """A task that grows with the model, and ends the training at its goal or
    at the last of its steps.

    It stands in for the task in `tasks.dataset`, and looks at the results of
    each report.
    """

    def __init__(self, config):
        super().__init__()
        configuration.check_training(config)
        self.config = config
        least, most = config.task.min_length, config.task.max_length
        self.longest = [n for n in config.curriculum if least <= n < most]
        self.longest.append(most)
        self.error = losses.KINDS[config.task.kind].error
        self.input_size = config.task.input_size
        self.output_size = config.task.output_size
        self.reached = False
        self._reports = 0  # at the present length

    def sample(self, rng, batch_size):
        task = self.config.task
        return task.sample(rng, batch_size, longest=self.longest[0])

    def on_epoch_begin(self, epoch, logs=None):
        self._first_step = epoch * self.config.report_every

    def on_train_batch_end(self, batch, logs=None):
        if self._first_step + batch + 1 >= self.config.steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["loss"]):  # before a checkpoint is made of it
            step = min(
                (epoch + 1) * self.config.report_every, self.config.steps
            )
            raise ValueError(
                "The training has diverged: try a smaller learning_rate, or "
                "clipnorm. What the checkpoint has is from before. Received: "
                f"a loss of {logs['loss']} in the report of step {step:,}"
            )
        self.look(logs)
        if self.reached:
            self.model.stop_training = True

    def look(self, logs):
        """Decides, after a report, what comes next."""
        self._reports += 1
        if len(self.longest) == 1:
            self.reached = logs[self.error] < self.config.stop_error
        elif (
            self._reports >= _in_reports("curriculum_steps", self.config)
            if self.config.curriculum_steps
            else logs["loss"] < self.config.curriculum_loss
        ):
            self.longest.pop(0)
            self._reports = 0


class Progress(keras.callbacks.Callback):
    """One line: steps, time left, loss, error, sequences a second.

    On a terminal the line is written over, elsewhere each is a new one. It
    also gives the callbacks after it what has been done so far: `step`,
    `sequences`, `longest`, the longest length, and `seconds`.
    """

    def __init__(self, config, curriculum, seconds, show):
        super().__init__()
        self.config = config
        self.curriculum = curriculum
        self.seconds = seconds
        self.show = show
        self.in_place = show is print and sys.stdout.isatty()

    def on_train_begin(self, logs=None):
        self.show(
            "steps  most time left  longest length  loss and error  "
            "sequences/s\n"
            "(each length is compiled once: the first steps take a while)"
        )
        self.started = time.perf_counter()
        self.marks = []  # steps and times

    def on_epoch_begin(self, epoch, logs=None):
        self.first_step = epoch * self.config.report_every
        self.longest = self.curriculum.longest[0]
        self.epoch_started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        # The time left is that of steps which are compiled.
        if not self.marks and 2 * (batch + 1) >= self.config.report_every:
            now = time.perf_counter()
            self.marks.append((self.first_step + batch + 1, now))

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        config, steps = self.config, self.config.steps
        step = min(self.first_step + config.report_every, steps)
        logs["step"], logs["sequences"] = step, step * config.batch_size
        logs["longest"] = self.longest
        logs["seconds"] = round(self.seconds + now - self.started, 3)
        rate = (step - self.first_step) * config.batch_size
        rate /= now - self.epoch_started
        error = self.curriculum.error
        line = (
            f"{step:,}/{steps:,} steps ({logs['sequences']:,} sequences)"
            f"  {self._left(step, now)} left"
            f"  <={self.longest}"
            f"  loss {logs['loss']:.4f}"
            f"  {error.replace('_', ' ')} {logs[error]:.2f}"
            f"  {rate:,.0f} seq/s"
        )
        self.marks.append((step, now))
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        else:
            self.show(line)

    def _left(self, step, now):
        """Minutes and seconds, at the pace of the later half of the steps."""
        before, then = self.marks[len(self.marks) // 2]
        if step == before:
            return "?:??"
        left = (now - then) / (step - before) * (self.config.steps - step)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes}:{seconds:02}"

    def on_train_end(self, logs=None):
        if self.in_place:
            print()
