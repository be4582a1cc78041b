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
        (B, T, task.output_size): probabilities, or numbers for `adding`;
        compiled for `fit` on `tasks.dataset`.

    Raises:
        ValueError: sizes do not fit each other, or the optimizer is unknown.
    """
    check_training(config)
    kind = losses.KINDS[config.task.kind]
    inputs = keras.Input((None, config.task.input_size), name="inputs")
    outputs = config.model.build(
        inputs, config.task.output_size, kind.activation
    )
    model = keras.Model(inputs, outputs, name=config.task.name)
    keras.optimizers.get(config.optimizer)  # raises for an unknown name
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
    # If Keras built it in the first step, TensorFlow would trace that step
    # twice.
    optimizer.build(model.trainable_variables)
    return model


def train(
    config: Training, folder: PathLike, show: Callable[[str], object] = print
) -> dict[str, Any]:
    """Trains a model and writes everything about it to a run folder.

    During the training the folder gets `config.json`, `checkpoint.keras`
    (every `checkpoint_every` steps), `history.csv`, `logs/` for TensorBoard
    and `pictures/`. At the end it gets `model.keras`, `export/1/` (a
    SavedModel, loaded and compared with the model) and, last, `results.json`.

    Ctrl-C (SIGINT) or SIGTERM saves a checkpoint and stops the training after
    the current report; a second signal stops it at once. `resume` continues
    from the last checkpoint.

    Args:
        config: a `config.Training`.
        folder: path of the run folder, absent or empty.
        show: function that takes a line of text for the user.

    Returns:
        Dict of results: steps, sequences, seconds, number of parameters, the
        longest length trained on, and the errors on fresh sequences, including
        longer ones.

    Raises:
        ValueError: sizes do not fit each other, the folder has files in it,
            the backend is not TensorFlow, or the loss is not finite.
        OSError: the folder cannot be made or written.
        KeyboardInterrupt: the training was interrupted.
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
    """Continues a training that was interrupted or killed.

    It starts at the last checkpoint. The results are those of a training
    without interruption, with three exceptions: the seconds; steps that are
    twice in TensorBoard's logs; and dropout masks, which start again from the
    seed, as Keras saves no random states.

    Args:
        folder: path of the run folder.
        show: function that takes a line of text for the user.

    Returns:
        As `train`.

    Raises:
        ValueError: `folder` is no run folder, the run is finished or being
            trained, a file in it cannot be read, or as `train`.
        OSError, KeyboardInterrupt: as `train`.
    """
    _check_backend()
    _check_show(show)
    folder = check_run_folder(folder)
    config = runs.read_config(folder)
    if runs.is_finished(folder):
        raise ValueError(
            "Only an interrupted run can be resumed; for a longer training "
            "start a new run with more --steps. "
            f"Received: {folder}, which is finished"
        )
    keras.utils.set_random_seed(config.seed)
    checkpoint = folder / "checkpoint.keras"
    if checkpoint.exists():
        model = runs.load(checkpoint)
    else:
        show("no checkpoint yet: training from the start")
        model = build(config)
    with locked(folder / "config.json"):
        return _run(config, model, folder, show)


def _check_backend():
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "A training exports a SavedModel, which needs the "
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
    """Trains from the model's current step to the end; writes the results."""
    done = -(-int(model.optimizer.iterations) // config.report_every)
    rows = runs.read_history(folder, config, done)
    curriculum = Curriculum(config)
    for row in rows:
        curriculum.look(row)
    seconds = rows[-1]["seconds"] if rows else 0.0

    probes = runs.probes(config)
    reports = in_reports("steps", config)
    progress = Progress(config, curriculum, seconds, show)
    if done < reports and not curriculum.reached and seconds < progress.limit:
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
                    progress,
                    curriculum,
                    StepsBoard(folder / "logs", write_graph=False),
                    History(folder / "history.csv", rows),
                    *_pictures(config, folder, probes),
                    checkpoint,  # last: saves after the others have written
                ],
            )
        gc.collect()  # frees the iterator, or TensorFlow warns at exit
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
    """Evaluates, draws and exports; `results.json`, last, marks the end."""
    with atomic_write(folder / "model.keras") as path:
        model.save(path)
    steps = int(model.optimizer.iterations)
    task, longest = config.task, last["longest"]
    tested = {"seed": config.seed, "sequences": config.test_sequences}
    results = {
        "steps": steps,
        "sequences": steps * config.batch_size,
        "seconds": round(last["seconds"], 1),
        "parameters": model.count_params(),
        "longest_trained": longest,
        **runs.evaluate(model, task, longest=longest, **tested),
    }
    for length in (longest, *config.test_lengths):
        results |= runs.evaluate(model, task, length=length, **tested)
    runs.draw(config, model, folder, probes)
    shutil.rmtree(folder / "export", ignore_errors=True)
    runs.export(model, task, folder / "export")
    with atomic_write(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def make_run_folder(folder):
    """Makes a run folder, or uses an empty one; returns its path."""
    folder = check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"No permission to write to {folder}")
    return folder


@contextlib.contextmanager
def _interruptible(checkpoint, show):
    """The first Ctrl-C saves a checkpoint and stops; the second stops now."""

    def interrupt(number, frame):
        if checkpoint.asked:
            raise KeyboardInterrupt
        checkpoint.asked = True
        show("stopping after this report; a second signal stops at once")

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
