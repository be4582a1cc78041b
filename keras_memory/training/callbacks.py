"""Callbacks of a training: reports, checkpoints, curriculum, progress."""

import csv
import math
import shutil
import sys
import time

import keras
import numpy as np

from keras_memory.files import atomic_write
from keras_memory.inspection.callbacks import MemoryTensorBoard
from keras_memory.training import losses
from keras_memory.training import runs
from keras_memory.training.config import check_training


class StepsBoard(keras.callbacks.TensorBoard):
    """Keras's `TensorBoard` with training steps, not epochs, on its axis."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(logs["step"], logs)


class StepsMemoryBoard(MemoryTensorBoard):
    """`MemoryTensorBoard` with training steps, not epochs, on its axis."""

    unit = "steps"

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(logs["step"] - 1, logs)


class History(keras.callbacks.Callback):
    """Writes the numbers of all reports to a CSV file.

    Args:
        path: `pathlib.Path` of the file.
        rows: list of dicts of numbers, the earlier reports. New reports are
            appended to it.
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
            atomic_write(self.path) as path,
            open(path, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, names, restval="NA")
            writer.writeheader()
            writer.writerows(self.rows)


class Checkpoint(keras.callbacks.Callback):
    """Saves the model every `every` epochs, over the previous checkpoint.

    Args:
        path: path of the `.keras` file.
        every: int, at least 0, in epochs; 0 saves only when `asked`.
    """

    asked = False  # True: save after this epoch, then stop

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
        with atomic_write(self.path) as path:
            self.model.save(path)
        self._saved = True


class Curriculum(keras.callbacks.Callback):
    """Lengthens the sequences as the model learns, and ends the training.

    After each report it may move to the next length. The training ends when
    the error reaches the goal, or after the last step. `tasks.dataset` samples
    from this callback instead of from the task.
    """

    def __init__(self, config):
        super().__init__()
        check_training(config)
        self.config = config
        shortest, longest = config.task.min_length, config.task.max_length
        lengths = [n for n in config.curriculum if shortest <= n < longest]
        if config.curriculum_doubles and shortest < longest:
            lengths = lengths or [shortest]
            while 2 * lengths[-1] < longest:
                lengths.append(2 * lengths[-1])
        self.longest = [*lengths, longest]
        self.error = losses.KINDS[config.task.kind].error
        self.input_size = config.task.input_size
        self.output_size = config.task.output_size
        self.reached = False
        self._reports = 0  # that count for the next length

    def sample(self, rng, batch_size):
        task = self.config.task
        return task.sample(rng, batch_size, longest=self.longest[0])

    def on_epoch_begin(self, epoch, logs=None):
        self._first_step = epoch * self.config.report_every

    def on_train_batch_end(self, batch, logs=None):
        if self._first_step + batch + 1 >= self.config.steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["loss"]):  # raise before it is checkpointed
            step = min(
                (epoch + 1) * self.config.report_every, self.config.steps
            )
            raise ValueError(
                "The training has diverged: try a smaller learning_rate, or "
                "clipnorm. The checkpoint is from an earlier step. Received: "
                f"a loss of {logs['loss']} in the report of step {step:,}"
            )
        self.look(logs)
        if self.reached:
            self.model.stop_training = True

    def look(self, logs):
        """Moves to the next length, or notes that the goal is reached."""
        config = self.config
        if len(self.longest) == 1:
            self.reached = logs[self.error] < config.stop_error
            return
        if config.curriculum_error:
            learned = logs[self.error] < config.curriculum_error
        else:
            learned = logs["loss"] < config.curriculum_loss
        reports = in_reports("curriculum_steps", config)
        self._reports = self._reports + 1 if reports or learned else 0
        if self._reports >= (reports or config.curriculum_reports):
            self.longest.pop(0)
            self._reports = 0


class Progress(keras.callbacks.Callback):
    """Shows a line per report: steps, time left, loss, error, sequences/s.

    Ends the training when its time is over, also within a report.

    On a terminal each line overwrites the last; elsewhere each is a new line.
    It also adds the totals so far to the logs of later callbacks: `step`,
    `sequences`, `longest` (the longest length) and `seconds`.
    """

    def __init__(self, config, curriculum, seconds, show):
        super().__init__()
        self.config = config
        self.curriculum = curriculum
        self.seconds = seconds
        self.show = show
        self.limit = 60 * config.minutes or math.inf
        self.in_place = show is print and sys.stdout.isatty()

    def on_train_begin(self, logs=None):
        self.show(
            "steps  time left at most  longest length  loss and error  "
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
        self.step = self.first_step + batch + 1
        now = time.perf_counter()
        if self._total(now) >= self.limit:
            self.model.stop_training = True
        # The first steps compile, so they say nothing about the time left.
        if not self.marks and 2 * (batch + 1) >= self.config.report_every:
            self.marks.append((self.step, now))

    def _total(self, now):
        return round(self.seconds + now - self.started, 3)

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        config, steps, step = self.config, self.config.steps, self.step
        logs["step"], logs["sequences"] = step, step * config.batch_size
        logs["longest"] = self.longest
        logs["seconds"] = self._total(now)
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
        """Time left, minutes:seconds, at the speed of the later half."""
        marks = self.marks or [(step, now)]
        before, then = marks[len(marks) // 2]
        if step == before:
            return "?:??"
        left = (now - then) / (step - before) * (self.config.steps - step)
        left = min(left, max(self.limit - self._total(now), 0.0))
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes}:{seconds:02}"

    def on_train_end(self, logs=None):
        if self.in_place:
            print()


def in_reports(name, config):
    """Converts a number of steps of `config` to reports, rounded up."""
    return -(-getattr(config, name) // config.report_every)
