"""From a configuration to a trained, drawn, exported model in a run folder."""

import json
import os
import pathlib
import shutil
import sys
import time

import keras
import numpy as np

from keras_memory import config as configuration
from keras_memory import tasks
from keras_memory.callbacks import ProbePictures
from keras_memory.export import export_for_serving
from keras_memory.losses import BitsPerSequence
from keras_memory.losses import WrongBitsPerSequence
from keras_memory.visualization import encode_png

EVALUATED_SEQUENCES = 320


def build(config):
    """Makes the compiled Keras model of a configuration.

    Args:
        config: a `config.Training`.

    Returns:
        `keras.Model` from (B, T, task.input_size) to probabilities
        (B, T, task.output_size), compiled for `fit` on `tasks.dataset`.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown optimizer.
    """
    inputs = keras.Input((None, config.task.input_size), name="inputs")
    outputs = config.model.layer(
        config.task.output_size, activation="sigmoid", return_sequences=True
    )(inputs)
    model = keras.Model(inputs, outputs, name=config.task.name)
    keras.optimizers.get(config.optimizer)  # raises if there is none
    settings = {
        "learning_rate": config.learning_rate,
        "clipnorm": config.clipnorm,
    }
    if config.learning_rate_decay:
        settings["learning_rate"] = keras.optimizers.schedules.CosineDecay(
            config.learning_rate, config.steps
        )
    if config.momentum:
        settings["momentum"] = config.momentum
    optimizer = keras.optimizers.get(
        {"class_name": config.optimizer, "config": settings}
    )
    model.compile(
        optimizer,
        keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight"),
        weighted_metrics=[
            BitsPerSequence(),
            WrongBitsPerSequence(),
            keras.metrics.BinaryAccuracy(name="accuracy"),
        ],
        jit_compile=config.jit_compile,
    )
    return model


def train(config, folder, show=print):
    """Trains a model and leaves everything about it in a run folder.

    The folder gets `config.json`, `checkpoint.keras` (every
    `checkpoint_every` steps), `history.csv`, `logs/` for TensorBoard,
    `pictures/`, at the end `model.keras`, `results.json` and `export/1/`, a
    SavedModel that has been loaded and compared with the model.

    Args:
        config: a `config.Training`.
        folder: path of the run folder, absent or empty.
        show: function that takes a line of text for the user.

    Returns:
        Dict of results: steps, sequences, seconds, and wrong bits a sequence
        on fresh sequences.

    Raises:
        ValueError: sizes that do not fit, a folder with files in it, or a
            backend other than TensorFlow.
        OSError: the folder cannot be made or written.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "A training run ends with a SavedModel, which needs the "
            "TensorFlow backend: unset KERAS_BACKEND. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )
    keras.utils.set_random_seed(config.seed)
    model = build(config)
    folder = make_run_folder(folder)
    (folder / "config.json").write_text(configuration.to_json(config))

    probe = config.task.sample(
        np.random.default_rng([config.seed, 1]),
        1,
        length=config.task.max_length,
    )
    curriculum = Curriculum(config)
    pictures = ProbePictures(
        model.layers[1],
        probe,
        folder / "pictures",
        folder / "logs",
        every=_in_reports(config.picture_every, config),
        title=lambda epoch: (
            f"{config.task.name}: step {epoch * config.report_every}"
        ),
    )
    start = time.perf_counter()
    model.fit(
        tasks.dataset(curriculum, config.batch_size, config.seed),
        epochs=-(-config.steps // config.report_every),
        steps_per_epoch=config.report_every,
        shuffle=False,
        verbose=0,
        callbacks=[
            curriculum,
            keras.callbacks.TensorBoard(folder / "logs", write_graph=False),
            keras.callbacks.CSVLogger(folder / "history.csv"),
            Checkpoint(
                folder / "checkpoint.keras",
                _in_reports(config.checkpoint_every, config),
            ),
            pictures,
            Progress(config, curriculum, show),
        ],
    )
    seconds = time.perf_counter() - start
    save(model, folder / "model.keras")
    steps = int(model.optimizer.iterations)
    results = {
        "steps": steps,
        "sequences": steps * config.batch_size,
        "seconds": round(seconds, 1),
        **evaluate(config, model),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    export_for_serving(model, folder / "export", name=config.task.name)
    title = f"{config.task.name}: after {steps} steps"
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "trained.png").write_bytes(
        encode_png(pictures.picture(title, memory=True))
    )
    return results


def evaluate(config, model):
    """Wrong bits a sequence on fresh sequences, also on longer ones."""
    rng = np.random.default_rng([config.seed, 2])
    longest = config.task.max_length
    samples = {
        f"wrong_bits_up_to_{longest}": {},
        f"wrong_bits_at_{longest}": {"length": longest},
        f"wrong_bits_at_{2 * longest}": {"length": 2 * longest},
    }
    results = {}
    for name, arguments in samples.items():
        metric = WrongBitsPerSequence()
        for _ in range(10):
            inputs, targets, mask = config.task.sample(
                rng, EVALUATED_SEQUENCES // 10, **arguments
            )
            metric.update_state(targets, model(inputs, training=False), mask)
        results[name] = round(float(metric.result()), 4)
    return results


def make_run_folder(folder):
    """Makes a run folder, or takes an empty one, and returns its path."""
    folder = pathlib.Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            "A run needs a folder of its own, so that nothing of an earlier "
            f"run is lost. Received: {folder}, which has files in it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"No permission to write to {folder}")
    return folder


def save(model, path):
    """Saves a model so that `path` is always whole: written aside, renamed."""
    aside = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        model.save(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _in_reports(steps, config):
    """Steps in reports, rounded up."""
    return -(-steps // config.report_every)


class Checkpoint(keras.callbacks.Callback):
    """Saves the model after every `every`-th epoch, in place of the last.

    Args:
        path: path of the `.keras` file.
        every: int, at least 0, in epochs; 0 saves none.
    """

    def __init__(self, path, every):
        super().__init__()
        self.path = path
        self.every = every

    def on_epoch_end(self, epoch, logs=None):
        if self.every and (epoch + 1) % self.every == 0:
            save(self.model, self.path)


class Curriculum(keras.callbacks.Callback):
    """A task that grows with the model, and ends the training at its goal or
    at the last of its steps.

    It stands in for the task in `tasks.dataset`, and looks at the results of
    each report.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        longest = config.task.max_length
        self.longest = [n for n in config.curriculum if n < longest]
        self.longest.append(longest)
        self.input_size = config.task.input_size
        self.output_size = config.task.output_size

    def sample(self, rng, batch_size):
        task = self.config.task
        return task.sample(rng, batch_size, longest=self.longest[0])

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) >= self.config.steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if len(self.longest) > 1:
            if 1.0 - logs["accuracy"] < self.config.curriculum_wrong:
                self.longest.pop(0)
        elif logs["wrong_bits_per_sequence"] < self.config.stop_wrong_bits:
            self.model.stop_training = True


class Progress(keras.callbacks.Callback):
    """One line: loss, bits, wrong bits, sequences a second, time left.

    On a terminal the line is written over, elsewhere each is a new one.
    """

    def __init__(self, config, curriculum, show):
        super().__init__()
        self.config = config
        self.curriculum = curriculum
        self.show = show
        self.in_place = show is print and sys.stdout.isatty()

    def on_train_begin(self, logs=None):
        self.show(
            "step  longest sequence  loss  bits and wrong bits a sequence  "
            "sequences/s  most time left\n"
            "(each length is compiled once: the first steps take a while)"
        )
        self.started = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self.longest = self.curriculum.longest[0]
        self.epoch_started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        steps, size = self.config.steps, self.config.report_every
        step = min((epoch + 1) * size, steps)
        rate = (step - epoch * size) * self.config.batch_size
        rate /= now - self.epoch_started
        left = (now - self.started) / step * (steps - step)
        line = (
            f"{step:,}/{steps:,}  <={self.longest}"
            f"  loss {logs['loss']:.4f}"
            f"  bits {logs['bits_per_sequence']:.2f}"
            f"  wrong {logs['wrong_bits_per_sequence']:.2f}"
            f"  {rate:,.0f} seq/s"
            f"  {left // 60:.0f}:{int(left % 60):02} left"
        )
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        else:
            self.show(line)

    def on_train_end(self, logs=None):
        if self.in_place:
            print()
