"""Compares training steps of keras_memory and of other implementations.

    python -m benchmarks [--pytorch-ntm CHECKOUT] [--rounds 20] [--json FILE]
    python -m benchmarks scaling [--pytorch-ntm CHECKOUT] [--out FOLDER]
    python -m benchmarks scaling --draw FILE
    python -m benchmarks memory_wrap [--rounds 20] [--json FILE]
    python -m benchmarks retrieval [--cases 2K static] [--json FILE]
    python -m benchmarks esm [--ivy FOLDER] [--rounds 20] [--json FILE]
    python -m benchmarks sam [--pytorch-dnc CHECKOUT] [--json FILE]
    python -m benchmarks sam --draw FILE
    python -m benchmarks sam_search [--batch 4] [--json FILE]
    python -m benchmarks xla_memory [--slots 2048] [--json FILE]
    python -m benchmarks curriculum [--minutes 10] [--json FILE]

The first compares a few cases of recurrent memories. The second varies one
size at a time, and the third redraws its curves from a file. The others are for
Memory Wrap, memories of nearest neighbours, Egospheric Spatial Memory and
Sparse Access Memory, with its searches; `xla_memory` compiles steps and counts
bytes. The last trains models on tasks whose length doubles.
README.md beside this file explains each number.
"""

import argparse
import json
import math
import pathlib
import sys

from benchmarks import cases
from benchmarks import curriculum
from benchmarks import esm
from benchmarks import memory_wrap
from benchmarks import neighbours
from benchmarks import references
from benchmarks import retrieval
from benchmarks import sam
from benchmarks import sam_search
from benchmarks import scaling
from benchmarks import steps
from benchmarks import xla_memory


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    mains = {
        "scaling": main_of_scaling,
        "memory_wrap": main_of_memory_wrap,
        "retrieval": main_of_retrieval,
        "esm": main_of_esm,
        "sam": main_of_sam,
        "sam_search": main_of_sam_search,
        "xla_memory": main_of_xla_memory,
        "curriculum": main_of_curriculum,
    }
    name, *rest = arguments or [None]
    return mains[name](rest) if name in mains else main_of_steps(arguments)


def main_of_steps(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Times training steps next to those of other implementations. "
            "`python -m benchmarks scaling --help`: over time steps, slots "
            "and batch. `python -m benchmarks memory_wrap --help` and "
            "`python -m benchmarks retrieval --help` and "
            "`python -m benchmarks esm --help` and "
            "`python -m benchmarks sam --help` and "
            "`python -m benchmarks sam_search --help` and "
            "`python -m benchmarks xla_memory --help` and "
            "`python -m benchmarks curriculum --help`: likewise."
        ),
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=cases.CASES,
        help="layer and batch, or slots with a batch of 1 (default: all)",
    )
    add_comparison(parser)
    options = parsed(parser, arguments, rounds=20)
    steps.run(
        options.cases or list(cases.CASES),
        sorted(set(options.threads)),
        options.rounds,
        options.pytorch_ntm,
        options.json,
    )


def main_of_memory_wrap(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory_wrap",
        description="Times Memory Wrap next to the package memorywrap.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=memory_wrap.CASES,
        metavar="CASE",
        help=f"of {list(memory_wrap.CASES)} (default: all)",
    )
    add_comparison(parser)
    add_rounds(parser, 20)
    options = checked(parser, parser.parse_args(arguments))
    memory_wrap.run(
        options.cases or list(memory_wrap.CASES),
        sorted(set(options.threads)),
        options.rounds,
        options.json,
    )


def main_of_retrieval(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks retrieval",
        description=(
            "Times memories of nearest neighbours next to "
            "memorizing-transformers-pytorch and faiss, with their recall."
        ),
    )
    names = [*retrieval.CASES, "static", "drift"]
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=names,
        default=names,
        help=(
            "entries a row of a memory that is written, a store of a million "
            "that is not, or keys that drift in training (default: all)"
        ),
    )
    parser.add_argument(
        "--data",
        nargs="+",
        choices=neighbours.KINDS,
        default=neighbours.KINDS,
        help="default: both",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few indexes of faiss for the static store, not all",
    )
    add_run(parser, threads=2, rounds=15)
    options = checked(parser, parser.parse_args(arguments))
    retrieval.run(
        options.cases,
        options.data,
        options.rounds,
        options.threads,
        options.quick,
        options.json,
    )


def main_of_esm(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks esm",
        description="Times Egospheric Spatial Memory next to ivy_memory.",
    )
    parser.add_argument("--ivy", help="a folder of ivy and checkouts")
    add_run(parser, threads=2, rounds=20)
    options = checked(parser, parser.parse_args(arguments))
    if options.ivy and not esm.is_ivy(options.ivy):
        parser.error(
            f"--ivy: {options.ivy} has not the folders {esm.CHECKOUTS}"
        )
    esm.run(options.rounds, options.threads, options.ivy, options.json)


def main_of_sam(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sam",
        description=(
            "Times Sparse Access Memory over slots and time steps, next to "
            "dense memories and to pytorch-dnc."
        ),
    )
    parser.add_argument(
        "--cases", nargs="+", choices=sam.CASES, help="default: all"
    )
    parser.add_argument("--pytorch-dnc", help="a checkout of pytorch-dnc")
    add_limits(parser, sam.GIGABYTES, sam.SECONDS)
    add_draw(parser, "a file of --json")
    add_run(parser, threads=1, rounds=10)
    options = checked(parser, parser.parse_args(arguments))
    if options.draw:
        draw(parser, options.draw, sam.draw)
        return
    check_checkout(parser, "sam", options.pytorch_dnc)
    sam.run(
        options.cases or list(sam.CASES),
        options.rounds,
        options.threads,
        {"gigabytes": options.memory_limit, "seconds": options.seconds},
        options.pytorch_dnc,
        options.json,
    )


def main_of_sam_search(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sam_search",
        description=(
            "Times Sparse Access Memory on a full, stateful memory, with an "
            "exact and an approximate search."
        ),
    )
    for name, values in (
        ("slots", list(sam_search.SLOTS)),
        ("contents", list(sam_search.CONTENTS)),
        ("methods", list(sam_search.METHODS)),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=values,
            default=values,
            help="default: all",
        )
    parser.add_argument(
        "--batch",
        type=count,
        default=sam.ROW["batch"],
        help="sequences of a step (default: %(default)s)",
    )
    add_run(parser, threads=1, rounds=5)
    options = checked(parser, parser.parse_args(arguments))
    sam_search.run(
        options.slots,
        options.contents,
        options.methods,
        options.batch,
        options.rounds,
        options.threads,
        options.json,
    )


def main_of_xla_memory(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks xla_memory",
        description="Counts the bytes that XLA reserves for a training step.",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=xla_memory.LAYERS,
        default=xla_memory.LAYERS,
        help="default: all",
    )
    parser.add_argument(
        "--slots",
        type=count,
        default=2048,
        help="number of slots (default: %(default)s)",
    )
    parser.add_argument("--json", help="file to write all numbers to")
    options = checked(parser, parser.parse_args(arguments))
    xla_memory.run(options.layers, options.slots, options.json)


def main_of_curriculum(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks curriculum",
        description="Trains models on tasks whose length doubles.",
    )
    for name, kind, values in (
        ("tasks", str, curriculum.TASKS),
        ("models", str, tuple(curriculum.MODELS)),
        ("seeds", int, curriculum.SEEDS),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=kind,
            choices=values if kind is str else None,
            default=values,
            help=f"default: {' '.join(map(str, values))}",
        )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=10.0,
        help="of each training (default: 10)",
    )
    parser.add_argument(
        "--threads", type=count, default=1, help="of a process (default: 1)"
    )
    parser.add_argument(
        "--out",
        default="runs/curriculum",
        help="folder for the run folders (default: runs/curriculum)",
    )
    parser.add_argument(
        "--json",
        help="file to write all numbers to; trainings in it are not repeated",
    )
    options = checked(parser, parser.parse_args(arguments))
    curriculum.run(
        options.tasks,
        options.models,
        options.seeds,
        options.minutes,
        options.threads,
        options.out,
        options.json,
    )


def main_of_scaling(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scaling",
        description="Times training steps over time steps, slots and batch.",
    )
    parser.add_argument(
        "--cases", nargs="+", choices=cases.BASES, help="default: both"
    )
    parser.add_argument(
        "--axes", nargs="+", choices=scaling.AXES, help="default: all"
    )
    parser.add_argument(
        "--threads", type=count, default=1, help="of each process (default: 1)"
    )
    add_limits(parser, 16.0, 60.0)
    parser.add_argument(
        "--out",
        default="runs/scaling",
        help="folder to write to (default: runs/scaling)",
    )
    add_draw(parser, "a scaling.json")
    options = parsed(parser, arguments, rounds=5)
    if options.draw:
        draw(parser, options.draw, scaling.draw)
        return
    if pathlib.Path(options.out).is_file():
        parser.error(f"--out: {options.out} is a file, not a folder")
    scaling.run(
        options.cases or list(cases.BASES),
        options.axes or list(scaling.AXES),
        options.rounds,
        options.threads,
        options.memory_limit,
        options.seconds,
        options.out,
        options.pytorch_ntm,
    )


def add_comparison(parser):
    parser.add_argument(
        "--threads",
        type=count,
        nargs="+",
        default=[1, 2],
        help="of PyTorch as of TensorFlow; all take turns (default: 1 2)",
    )
    parser.add_argument("--json", help="file to write all numbers to")


def add_run(parser, threads, rounds):
    """The options of a command whose variants all have the same threads."""
    parser.add_argument(
        "--threads",
        type=count,
        default=threads,
        help=f"of each process (default: {threads})",
    )
    parser.add_argument("--json", help="file to write all numbers to")
    add_rounds(parser, rounds)


def add_limits(parser, gigabytes, seconds):
    parser.add_argument(
        "--memory-limit",
        type=positive,
        default=gigabytes,
        help=(
            "gigabytes of a process at which a variant ends "
            f"(default: {gigabytes:g})"
        ),
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=seconds,
        help=(
            "for the first steps of a variant, without imports "
            f"(default: {seconds:g})"
        ),
    )


def add_draw(parser, what):
    parser.add_argument(
        "--draw",
        metavar="FILE",
        help=f"{what}: draws its pictures beside it, measures nothing",
    )


def draw(parser, path, function):
    """Draws the numbers of a file beside it."""
    path = pathlib.Path(path)
    if not path.is_file():
        parser.error(f"--draw: {path} is not there")
    function(json.loads(path.read_text()), path.parent)


def add_rounds(parser, rounds):
    parser.add_argument(
        "--rounds",
        type=count,
        default=rounds,
        help=f"steps of each that are measured (default: {rounds})",
    )


def checked(parser, options):
    path = getattr(options, "json", None)
    if path and not pathlib.Path(path).parent.is_dir():
        parser.error(f"--json: the folder of {path} does not exist")
    return options


def parsed(parser, arguments, rounds):
    """Parses the options, including those of the commands with a checkout."""
    add_rounds(parser, rounds)
    parser.add_argument("--pytorch-ntm", help="a checkout of pytorch-ntm")
    options = checked(parser, parser.parse_args(arguments))
    check_checkout(parser, "ntm", options.pytorch_ntm)
    return options


def check_checkout(parser, kind, checkout):
    """Ends with an error if a given folder is not a checkout."""
    reference = references.REFERENCES[kind]
    path = reference.path
    if checkout and not (pathlib.Path(checkout) / path).is_file():
        parser.error(
            f"{reference.option}: {checkout} is no checkout of "
            f"{reference.repository}, since {path} is not there"
        )


def count(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


if __name__ == "__main__":
    main()
