"""The command `keras-memory`.

Arguments are checked before TensorFlow is imported, which takes seconds. So
this module imports nothing at the top that needs TensorFlow.
"""

import argparse
import importlib
import os
import pathlib
import sys

from keras_memory import __version__
from keras_memory.files import atomic_write
from keras_memory.files import check_new_folder
from keras_memory.files import check_run_folder

EXAMPLES = """examples:
  keras-memory train copy                     learn to copy, in two minutes
  keras-memory train copy --print-config      all values that --set can change
  keras-memory train repeat-copy --set read_heads=2 --seed 7 --out runs/x
  keras-memory train --resume runs/x          continue after Ctrl-C or a crash
  keras-memory evaluate runs/x --length 20 120
  keras-memory plot runs/x                    pictures of model and training
  keras-memory compare runs/a runs/b runs/c   several seeds, mean and band
  keras-memory export runs/x served/x         for TensorFlow Serving

`keras-memory COMMAND --help` tells more."""

_OF_ALL = "default", "lstm", "dnc", "sam", "sdnc"
# Presets of each task, the same as in `training.presets.PRESETS`.
PRESETS = {
    "copy": (*_OF_ALL, "paper", "pytorch-dnc", "pytorch-ntm"),
    "repeat-copy": (*_OF_ALL, "paper", "pytorch-ntm"),
    "associative-recall": (*_OF_ALL, "paper"),
    "chain": _OF_ALL,
    "n-grams": (*_OF_ALL, "paper"),
    "priority-sort": (*_OF_ALL, "paper"),
    "adding": (*_OF_ALL, "pytorch-dnc"),
    "argmax": (*_OF_ALL, "pytorch-dnc"),
}

_KNOWN = ValueError, TypeError, OSError, MemoryError, ImportError, RuntimeError


def main(arguments=None):
    """Runs the command.

    Args:
        arguments: list of str; None takes those of the command line.

    Returns:
        Exit code: 0; 2 after an error, printed in one line; 130 if
        interrupted.

    Raises:
        SystemExit: with code 2 if the arguments cannot be parsed; with code 0
            for `--help` and `--version`.
    """
    top = parser()
    parsed, unknown = top.parse_known_args(arguments)
    if unknown:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    if "run" not in parsed:
        top.error("the following arguments are required: command")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("keras-memory: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # TensorFlow's own errors, such as out of memory, have no base class
        # that could be named without importing TensorFlow.
        known = isinstance(error, _KNOWN)
        if not (known or type(error).__module__.startswith("tensorflow.")):
            raise
        reason = " ".join(str(error).split())
        print(f"keras-memory: error: {reason}", file=sys.stderr)
        return 2
    return 0


def parser():
    """The parser of the command line."""
    top = argparse.ArgumentParser(
        prog="keras-memory",
        description="Neural memory as Keras layers: train, see, serve.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--version", action="version", version=f"keras-memory {__version__}"
    )
    commands = top.add_subparsers(metavar="command")

    def add(function, help, description, example):
        command = commands.add_parser(
            function.__name__,
            help=help,
            description=description,
            epilog=f"Example: keras-memory {function.__name__} {example}",
        )
        command.set_defaults(run=function)
        return command

    command = add(
        train,
        "train a model on a task and export it",
        "Trains a model on a task. Writes configuration, checkpoints, "
        "TensorBoard logs, pictures, results and an exported SavedModel to a "
        "run folder. Ctrl-C saves a checkpoint and stops; --resume continues.",
        "copy --set memory_slots=64 --seed 7 --out runs/small",
    )
    command.add_argument(
        "task",
        nargs="?",
        help=f"task to learn: {', '.join(PRESETS)}",
    )
    command.add_argument(
        "--preset",
        help="named configuration to start from: default (if none is given), "
        "dnc, sam, sdnc, lstm, paper (Graves et al. 2014), pytorch-ntm, "
        "pytorch-dnc; not every task has each",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a value of the configuration; may be repeated",
    )
    for name, (kind, _, text) in _TRAIN_OPTIONS.items():
        command.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help=text
        )
    command.add_argument(
        "--out",
        metavar="FOLDER",
        help="run folder, absent or empty (default: runs/<task>-1, -2, ...)",
    )
    command.add_argument(
        "--resume",
        metavar="FOLDER",
        help="continue the run in this folder from its last checkpoint",
    )
    command.add_argument(
        "--print-config",
        action="store_true",
        default=None,
        help="print the configuration, with all names that --set can change, "
        "and do not train",
    )

    command = add(
        evaluate,
        "test a trained model, also on lengths not in the training",
        "Tests the model of a run on fresh sequences.",
        "runs/copy-1 --length 20 120",
    )
    _add_run(command)
    command.add_argument(
        "--length",
        type=int,
        nargs="+",
        default=[],
        help="lengths of the sequences, in the task's unit (default: up to "
        "the longest of the training)",
    )
    command.add_argument(
        "--repeats", type=int, help="repeat-copy: number of copies"
    )
    command.add_argument(
        "--seed", type=int, help="seed of the sequences (default: the run's)"
    )

    command = add(
        plot,
        "draw a model's memory and its training",
        "Draws into the run's folder `pictures`: inputs, targets, outputs, "
        "weightings and memory over time; the error during the training and "
        "by sequence length; an animation of the training.",
        "runs/copy-1",
    )
    _add_run(command)

    command = add(
        compare,
        "draw several runs in one picture",
        "Draws the error during the training. Runs that differ only in the "
        "seed are drawn as their mean, in a band from lowest to highest.",
        "runs/copy-1 runs/copy-2 --out seeds.png",
    )
    command.add_argument("folders", nargs="+", help="run folders")
    command.add_argument(
        "--out", default="comparison.png", help="the PNG file to write"
    )
    command.add_argument(
        "--by",
        choices=["steps", "sequences", "seconds"],
        default="steps",
        help="horizontal axis of the picture (default: steps)",
    )
    command.add_argument(
        "--below",
        type=float,
        default=0.1,
        help="error to reach: the table shows when each run was first below "
        "(default: 0.1)",
    )

    command = add(
        export,
        "export a trained model for TensorFlow Serving",
        "Writes the model of a run as a SavedModel, loads it again and "
        "compares it with the model. Streams of a SAM or SDNC have at most "
        "1,000 steps.",
        "runs/copy-1 served/copy --version 2",
    )
    _add_run(command)
    command.add_argument("out", help="folder; its folder VERSION is made")
    command.add_argument("--version", type=int, default=1, help="default: 1")

    command = add(
        convert,
        "make a Keras model from another implementation's weights",
        "Makes a Keras model from a trained model of another implementation. "
        "No code in the checkpoint is executed.",
        "pytorch-ntm copy-task-10-batch-50000.model copy.keras",
    )
    command.add_argument(
        "implementation",
        choices=["pytorch-ntm", "pytorch-dnc", "deepmind-dnc"],
        help="origin of the checkpoint; deepmind-dnc takes an .npz",
    )
    command.add_argument(
        "checkpoint",
        help="state dict written by torch.save (needs torch), or an .npz",
    )
    command.add_argument("out", help="the .keras file to write, must not exist")
    for name, (kind, help) in _CONVERT_OPTIONS.items():
        command.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help=help
        )
    return top


# Option of `train` -> type, least value and help.
_TRAIN_OPTIONS = {
    "seed": (int, 0, "seed of weights and data"),
    "steps": (int, 1, "largest number of training steps (batches)"),
    "minutes": (float, 0, "time after which the training ends; 0 for none"),
    "report_every": (int, 1, "steps between reports"),
    "checkpoint_every": (int, 0, "steps between checkpoints; 0 for none"),
}

_CONVERT_OPTIONS = {
    "memory_slots": (int, "DNC: nr_cells or memory_size of the reference"),
    "read_heads": (int, "pytorch-dnc: read_heads of the reference"),
    "nonlinearity": (str, "pytorch-dnc's RNN: relu, if it is not tanh"),
    "sparse_reads": (
        int,
        "pytorch-dnc's SAM and SDNC: sparse_reads of the reference",
    ),
    "temporal_reads": (
        int,
        "pytorch-dnc's SDNC: temporal_reads of the reference",
    ),
    "clip": (float, "DNC: if not 20 (pytorch-dnc) or none (deepmind-dnc)"),
}


def _add_run(command):
    command.add_argument("folder", help="run folder of a training")


def train(parsed):
    """The command `train`."""
    if parsed.resume:
        given = [
            name if name == "task" else f"--{name.replace('_', '-')}"
            for name, value in vars(parsed).items()
            if name not in ("run", "resume") and value not in (None, [])
        ]
        if given:
            raise ValueError(
                "--resume takes no other options, as it uses the run's "
                f"settings. Received: {', '.join(given)}"
            )
        folder = check_run_folder(parsed.resume)
    else:
        _check_training(parsed)
        folder = parsed.out or _next_folder(parsed.task)

    from keras_memory import training
    from keras_memory.training import runs
    from keras_memory.training.config import to_json

    if parsed.resume:
        train, arguments = training.resume, ()
    else:
        config = _config(parsed)
        if parsed.print_config:
            print(to_json(config), end="")
            return
        train, arguments = training.train, (config,)
    try:
        results = train(*arguments, folder)
    except KeyboardInterrupt:
        if (pathlib.Path(folder) / "config.json").exists():
            print(f"to continue: keras-memory train --resume {folder}")
        raise
    _print_training(folder, runs.read_config(folder), results["steps"])
    print(f"seconds: {results['seconds']}")
    _print_results(results, skip=5)
    print(f"pictures:    {folder}/pictures")
    print(f"SavedModel:  {folder}/export/1 (loaded and checked)")
    print(f"TensorBoard: tensorboard --logdir {folder}/logs")


def _check_training(parsed):
    """Raises ValueError for invalid arguments of `train`."""
    presets = _presets()
    if parsed.task not in presets:
        raise ValueError(
            f"the task must be one of: {', '.join(presets)}. "
            f"Received: {parsed.task}"
        )
    if parsed.preset not in (None, *presets[parsed.task]):
        raise ValueError(
            f"the preset of {parsed.task} must be one of: "
            f"{', '.join(presets[parsed.task])}. Received: {parsed.preset}"
        )
    least = {name: least for name, (_, least, _) in _TRAIN_OPTIONS.items()}
    _check_least(parsed, **least)
    if parsed.out is not None:
        check_new_folder(parsed.out)


def _presets():
    """Names of presets by task, including those that a program registered."""
    presets = sys.modules.get("keras_memory.training.presets")
    return PRESETS if presets is None else presets.PRESETS


def _check_least(parsed, **least):
    for name, bound in least.items():
        values = getattr(parsed, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < bound:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {bound}. "
                    f"Received: {value}"
                )


def _config(parsed):
    """Makes the configuration from the arguments of `train`."""
    from keras_memory.training.config import override
    from keras_memory.training.presets import PRESETS

    preset = PRESETS[parsed.task][parsed.preset or "default"]
    settings = [
        f"{name}={value}"
        for name in _TRAIN_OPTIONS
        if (value := getattr(parsed, name)) is not None
    ]
    return override(preset, [*parsed.set, *settings])


def evaluate(parsed):
    """The command `evaluate`."""
    _check_least(parsed, length=1, repeats=1, seed=0)
    config, model = _trained(parsed.folder)

    from keras_memory.training import runs

    ranges = {}
    if parsed.repeats is not None:
        if config.task.name != "repeat-copy":
            raise ValueError(
                "--repeats is for repeat-copy. "
                f"Received: a run of {config.task.name}"
            )
        ranges["repeats"] = parsed.repeats
    steps = int(model.optimizer.iterations)
    _print_training(parsed.folder, config, steps)
    seed = config.seed if parsed.seed is None else parsed.seed
    longest = runs.longest_trained(parsed.folder, config, steps)
    for length in parsed.length or [None]:
        at = {} if length is None else {"length": length}
        results = runs.evaluate(
            model,
            config.task,
            seed,
            longest,
            config.test_sequences,
            **at,
            **ranges,
        )
        _print_results(results)


def plot(parsed):
    """The command `plot`."""
    config, model = _trained(parsed.folder)

    from keras_memory.training import runs

    paths = runs.draw(config, model, parsed.folder)
    paths.append(runs.draw_lengths(config, model, parsed.folder))
    for path in paths:
        print(path)


def compare(parsed):
    """The command `compare`."""
    out = pathlib.Path(parsed.out)
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ValueError(
            "the output must be a .png file in a folder that exists. "
            f"Received: {out}"
        )
    for folder in parsed.folders:
        check_run_folder(folder)

    from keras_memory.training import runs

    rows = runs.compare(parsed.folders, out, parsed.by, parsed.below)
    cells = [list(rows[0])]
    cells += [
        ["-" if v is None else f"{v}" for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print(f"picture: {out}")


def export(parsed):
    """The command `export`."""
    _check_least(parsed, version=1)
    config, model = _trained(parsed.folder)

    from keras_memory.training import runs

    target = runs.export(model, config.task, parsed.out, parsed.version)
    print(f"SavedModel: {target} (loaded and checked)")


def _trained(folder):
    """Loads configuration and model of a run.

    If the run is not finished, loads the last checkpoint and prints a note.
    """
    folder = check_run_folder(folder)
    path = next(
        (
            path
            for name in ("model.keras", "checkpoint.keras")
            if (path := folder / name).exists()
        ),
        None,
    )
    if path is None:
        raise ValueError(
            "The run must have a model: it was interrupted before its first "
            f"checkpoint; continue: `keras-memory train --resume {folder}`. "
            f"Received: {folder}, without model.keras and checkpoint.keras"
        )

    from keras_memory.training import runs

    importlib.import_module("keras_memory.api")  # registers all layers
    config = runs.read_config(folder)
    model = runs.load(path)
    if not runs.is_finished(folder):
        print(
            f"keras-memory: note: {folder} is not finished; this is its "
            f"{path.name}, of step {int(model.optimizer.iterations):,} of at "
            f"most {config.steps:,}",
            file=sys.stderr,
        )
    return config, model


def _print_training(folder, config, steps):
    """Prints the longest length, steps and sequences of the training."""
    from keras_memory.training import runs

    task = config.task
    print(
        f"{task.name}: trained to {runs.longest_trained(folder, config, steps)}"
        f" {task.unit} in {steps:,} steps "
        f"({steps * config.batch_size:,} sequences)"
    )


def _print_results(results, skip=0):
    for name, value in list(results.items())[skip:]:
        error, _, where = name.partition("_sequence_")
        if error == "bits_in_a":
            continue  # printed with the wrong bits
        of = ""
        if error == "wrong_bits_per":
            of = f" of {results[f'bits_in_a_sequence_{where}']:g}"
        print(f"{name.replace('_', ' ')}: {value}{of}")


def convert(parsed):
    """The command `convert`."""
    out = pathlib.Path(parsed.out)
    if out.suffix != ".keras" or out.exists() or not out.parent.is_dir():
        raise ValueError(
            "the output must be a new .keras file in a folder that exists. "
            f"Received: {out}"
        )
    implementation = parsed.implementation
    takes = {  # option -> argument of the converter
        "pytorch-ntm": {},
        "pytorch-dnc": {name: name for name in _CONVERT_OPTIONS},
        "deepmind-dnc": {"memory_slots": "memory_slots", "clip": "clip_value"},
    }[implementation]
    given = {
        name: getattr(parsed, name)
        for name in _CONVERT_OPTIONS
        if getattr(parsed, name) is not None
    }
    needed = {"memory_slots", "read_heads"} & set(takes)
    for name in sorted(set(given) - set(takes) | needed - set(given)):
        verb = "does not take" if name in given else "needs"
        raise ValueError(f"{implementation} {verb} --{name.replace('_', '-')}")
    if not os.path.exists(parsed.checkpoint):
        raise FileNotFoundError(
            "the checkpoint must be a file that exists. "
            f"Received: {parsed.checkpoint}"
        )

    import keras

    from keras_memory import convert as converters

    converter = getattr(converters, f"from_{implementation.replace('-', '_')}")
    layer = converter(
        converters.read_pytorch_checkpoint(parsed.checkpoint),
        **{takes[name]: value for name, value in given.items()},
    )
    name = type(layer).__name__.removesuffix("Layer")
    cell = layer.cell
    inputs = keras.Input((None, cell.input_size), name="inputs")
    with atomic_write(out) as path:
        keras.Model(inputs, layer(inputs), name=name.lower()).save(path)
    print(
        f"{name} from {cell.input_size} inputs to {cell.units} "
        f"outputs: {cell.memory_slots} slots of {cell.slot_size}, "
        f"{cell.read_heads} read and {getattr(cell, 'write_heads', 1)} write "
        "heads, "
        f"controller of {cell.controller_units}"
    )
    print(f"model: {out}")


def _next_folder(task):
    """runs/<task>-1, or the first number that is free."""
    number = 1
    while (folder := pathlib.Path("runs") / f"{task}-{number}").exists():
        number += 1
    return folder


if __name__ == "__main__":
    sys.exit(main())
