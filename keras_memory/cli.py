"""The command `keras-memory`."""

import argparse
import pathlib
import sys


def main(arguments=None):
    """Runs the command.

    Args:
        arguments: list of str; None takes those of the command line.

    Returns:
        Exit code: 0; 2 after a line that says what was wrong; 130 if it was
        interrupted, and the run folder has the last checkpoint.
    """
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("keras-memory: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, ImportError) as error:
        reason = " ".join(str(error).split())
        print(f"keras-memory: error: {reason}", file=sys.stderr)
        return 2
    return 0


def parser():
    """The parser of the command line."""
    top = argparse.ArgumentParser(
        prog="keras-memory",
        description="Neural memory as Keras layers: train, see, serve.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "train",
        help="train a model on a task and export it",
        description="Trains a model on a task. Leaves configuration, "
        "checkpoints, TensorBoard logs, pictures and an exported SavedModel "
        "in a run folder.",
        epilog="Example: keras-memory train copy --set memory_slots=64 "
        "--seed 7 --out runs/small",
    )
    command.add_argument("task", help="what to learn: copy")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a value of the configuration; may be repeated",
    )
    command.add_argument("--seed", type=int, help="seed of weights and data")
    command.add_argument("--steps", type=int, help="most training steps")
    command.add_argument(
        "--out",
        metavar="FOLDER",
        help="run folder, absent or empty (default: runs/<task>-1, -2, ...)",
    )
    command.set_defaults(run=train)

    command = commands.add_parser(
        "convert",
        help="make a Keras model of another implementation's weights",
        description="Makes a Keras model of a trained model of another "
        "implementation. Nothing in the checkpoint is executed.",
        epilog="Example: keras-memory convert pytorch-ntm "
        "copy-task-10-batch-50000.model copy.keras",
    )
    command.add_argument(
        "implementation", choices=["pytorch-ntm"], help="where it is from"
    )
    command.add_argument(
        "checkpoint",
        help="its state dict as torch.save wrote it (needs torch), or an .npz",
    )
    command.add_argument("out", help="the .keras file to write, not there yet")
    command.set_defaults(run=convert)
    return top


def train(parsed):
    """The command `train`."""
    from keras_memory import config as configuration
    from keras_memory import training

    presets = configuration.PRESETS
    if parsed.task not in presets:
        raise ValueError(
            f"the task must be one of: {', '.join(presets)}. "
            f"Received: {parsed.task}"
        )
    settings = [
        f"{name}={value}"
        for name in ("seed", "steps")
        if (value := getattr(parsed, name)) is not None
    ]
    config = configuration.override(
        presets[parsed.task], [*parsed.set, *settings]
    )
    folder = parsed.out or _next_folder(parsed.task)
    results = training.train(config, folder)
    print(
        f"trained {results['sequences']:,} sequences in {results['seconds']} s"
    )
    for name, value in results.items():
        if name.startswith("wrong_bits"):
            print(f"{name.replace('_', ' ')}: {value} a sequence")
    print(f"picture:     {folder}/pictures/trained.png, training.gif")
    print(f"SavedModel:  {folder}/export/1 (loaded and checked)")
    print(f"TensorBoard: tensorboard --logdir {folder}/logs")


def convert(parsed):
    """The command `convert`."""
    out = pathlib.Path(parsed.out)
    if out.suffix != ".keras" or out.exists() or not out.parent.is_dir():
        raise ValueError(
            "the output must be a new .keras file in a folder that exists. "
            f"Received: {out}"
        )

    import keras

    from keras_memory import convert as converters
    from keras_memory import training

    layer = converters.from_pytorch_ntm(
        converters.read_pytorch_checkpoint(parsed.checkpoint)
    )
    cell = layer.cell
    inputs = keras.Input((None, cell.input_size), name="inputs")
    training.save(keras.Model(inputs, layer(inputs), name="ntm"), out)
    print(
        f"NTM from {cell.input_size} inputs to {cell.units} outputs: "
        f"{cell.memory_slots} slots of {cell.slot_size}, heads "
        f"{', '.join(cell.head_order)}, LSTM of {cell.controller_units}"
    )
    print(f"model: {out}")


def _next_folder(task):
    """runs/<task>-1, or the first number that is free."""
    number = 1
    while (folder := pathlib.Path("runs") / f"{task}-{number}").exists():
        number += 1
    return folder
