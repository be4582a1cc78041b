"""From a configuration to a trained, drawn, exported model in a run folder."""

import contextlib
import gc
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from typing import Any

import keras

from keras_memory.files import atomic_write
from keras_memory.files import check_new_folder
from keras_memory.files import check_run_folder
from keras_memory.files import locked
from keras_memory.hints import PathLike
from keras_memory.inspection.callbacks import ProbePictures
from keras_memory.serving.export import export_for_serving
from keras_memory.training import losses
from keras_memory.training import runs
from keras_memory.training import tasks
from keras_memory.training.callbacks import Checkpoint
from keras_memory.training.callbacks import Curriculum
from keras_memory.training.callbacks import History
from keras_memory.training.callbacks import Progress
from keras_memory.training.callbacks import StepsBoard
from keras_memory.training.callbacks import StepsMemoryBoard
from keras_memory.training.callbacks import in_reports
from keras_memory.training.config import LSTMConfig
from keras_memory.training.config import Training
from keras_memory.training.config import check_training
from keras_memory.training.config import to_json


def build(config: Training) -> keras.Model:
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
    check_training(config)
    kind = losses.KINDS[config.task.kind]
    inputs = keras.Input((None, config.task.input_size), name="inputs")
    outputs = config.model.build(
        inputs, config.task.output_size, kind.activation
    )
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


def train(
    config: Training, folder: PathLike, show: Callable[[str], object] = print
) -> dict[str, Any]:
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
    text = to_json(config)
    check_new_folder(folder)
    keras.utils.set_random_seed(config.seed)
    model = build(config)
    folder = make_run_folder(folder)
    with atomic_write(folder / "config.json") as path:
        path.write_text(text, "utf-8")
    with locked(folder / "config.json"):
        return _run(config, model, folder, show)


def resume(
    folder: PathLike, show: Callable[[str], object] = print
) -> dict[str, Any]:
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
    reports = in_reports("steps", config)
    if done < reports and not curriculum.reached:
        checkpoint = Checkpoint(
            folder / "checkpoint.keras", in_reports("checkpoint_every", config)
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
                    StepsBoard(folder / "logs", write_graph=False),
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
    every = in_reports("picture_every", config)
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
    if isinstance(config.model, LSTMConfig):
        return drawn
    board = StepsMemoryBoard(folder / "logs", next(iter(probes.values())))
    return [*drawn, board]


def _finish(config, model, folder, last, probes):
    """Evaluates, draws and exports; `results.json` says that all is there."""
    with atomic_write(folder / "model.keras") as path:
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
    with atomic_write(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def make_run_folder(folder):
    """Makes a run folder, or takes an empty one, and returns its path."""
    folder = check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"No permission to write to {folder}")
    return folder


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
