"""Shows what each backend supports, and compares their numbers.

    KERAS_BACKEND=torch python tests/backends.py numbers FILE.npz
    python tests/backends.py table [--results FOLDER] [--write]

`numbers` writes what every catalogue case computes from weights that NumPy
draws. `table` runs the catalogue, and the tests of the other layers, on every
backend and prints the tables of docs/guides/backends.md; `--write` puts them
there. `--results` keeps the runs' JUnit files, and uses those that are there
already.
"""

import argparse
import collections
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import harness
import keras
import numpy as np
from catalogue import CASES
from keras import ops

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "backends.md"
START, END = "<!-- backends: start -->\n", "<!-- backends: end -->\n"

BACKENDS = {
    "tensorflow": "TensorFlow",
    "jax": "JAX",
    "torch": "PyTorch",
    "numpy": "NumPy",
}

TRAINING = ("tensorflow", "jax", "torch")  # NumPy is for forward passes only

# Layers whose inputs or outputs are not those of the catalogue, by the file of
# their tests.
OTHER_LAYERS = {
    "memory_wrap": "`MemoryWrapLayer`, `MemoryWrapClassifier`",
    "retrieval": "`RingMemory`, `KNNMemoryLayer`",
    "scann_index": "`ScannIndex`",
    "esm": "`ESMLayer`, `ESMCell`",
}

# The checks of `test_catalogue.py`, in the words of the table in the docs.
CHECKS = {
    "config_round_trip": "`get_config`, `from_config`",
    "file_round_trip": "`.keras` and `.weights.h5` files",
    "clone": "`clone_model`",
    "shapes": "symbolic and actual shapes are those declared",
    "training_step": "`fit`, with `jit_compile=True` except on PyTorch",
    "mask_is_truncation": "masks",
    "state_in_and_out": "`initial_state`, `return_state`",
    "stateful_is_one_sequence": "`stateful`",
    "backwards": "`go_backwards`",
    "in_models": "`Bidirectional`, stacked, subclassed, `unroll`",
    "mixed_precision[mixed_float16]": "`mixed_float16`",
    "mixed_precision[mixed_bfloat16]": "`mixed_bfloat16`",
    "mixed_precision[float16]": "`float16`",
    "trace": "`trace`",
    "same_numbers": (
        "outputs, states, loss and gradients, also with masks, as on "
        "TensorFlow to 1e-5"
    ),
}


class Gradient(keras.optimizers.Optimizer):
    """Replaces the weights by their gradients."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, gradient)


class SumOfSquares(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.sum(y_pred**2, axis=-1)


def numbers(case):
    """Dict of arrays: outputs, final states, loss and gradients of a case.

    All weights and inputs come from NumPy, as initializers draw other numbers
    on each backend. Dropout does so too, and is turned off.
    """
    rng = np.random.default_rng(5)
    dropout = {n: 0.0 for n in case.kwargs if n.endswith("_dropout")}
    layer = case.make(return_state=True, **dropout)
    layer.build(case.input_shape)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.3))
    x = rng.normal(size=case.input_shape).astype("float32")
    mask = rng.uniform(size=x.shape[:2]) < 0.7
    results = {}
    for name, values in (
        ("plain", layer(x)),
        ("masked", layer(x, mask=mask)),
    ):
        for index, value in enumerate(values):
            results[f"{name} {index or 'output'}"] = value
    if harness.TRAINS:
        entries = [
            keras.Input(x.shape[1:]),
            keras.Input(mask.shape[1:], dtype="bool"),
        ]
        outputs, *_ = layer(entries[0], mask=entries[1])
        model = keras.Model(entries, outputs)
        model.compile(
            Gradient(1.0),
            SumOfSquares("sum"),
            # Tracing takes longest on TensorFlow.
            run_eagerly=keras.backend.backend() == "tensorflow",
        )
        nothing = np.zeros((len(x), *outputs.shape[1:]))
        loss = model.train_on_batch([x, mask], nothing)
        results["loss"] = np.array(loss)
        for index, weight in enumerate(layer.trainable_weights):
            results[f"gradient {index} {weight.name}"] = weight
    return {n: ops.convert_to_numpy(value) for n, value in results.items()}


def write_numbers(path):
    np.savez(
        path,
        **{
            f"{case.name}/{name}": value
            for case in CASES
            for name, value in numbers(case).items()
        },
    )


def run_tests(backend, path, name):
    """Runs a test file on a backend, and writes a JUnit file."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--dist=load"),
            f"--junitxml={path}",
            ROOT / "tests" / f"test_{name}.py",
        ],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=ROOT,
    )


def results(path):
    """Yields each test in a JUnit file, and its outcome: "yes", "fails", or
    the reason of a skip."""
    for test in xml.etree.ElementTree.parse(path).iter("testcase"):
        outcome = "yes"
        for result in test:
            if result.tag in ("failure", "error"):
                outcome = "fails"
            elif result.tag == "skipped":
                outcome = result.get("message")
        yield test, outcome


def outcomes(path):
    """Dict from each check to a Counter of its outcomes in a JUnit file."""
    found = collections.defaultdict(collections.Counter)
    for test, outcome in results(path):
        check, _, parameters = test.get("name").partition("[")
        for case in CASES:  # the case is the last parameter
            parameters = parameters.removesuffix(f"{case.name}]")
        check = check.removeprefix("test_")
        if parameters and check in CHECKS:  # they do not matter
            parameters = ""
        if parameters:
            check += f"[{parameters.removesuffix('-')}]"
        found[check][outcome] += 1
    return found


def summary(path):
    """A field of the table of other layers: how many tests of a JUnit file
    passed, and why the others did not run, by the most common reason."""
    found = collections.Counter(outcome for _, outcome in results(path))
    passed, failed = found.pop("yes", 0), found.pop("fails", 0)
    words = f"{passed} tests" + (f", {failed} fail" if failed else "")
    if not found:
        return words
    ((reason, number),) = found.most_common(1)
    return f"{words}; {found.total()} not run ({number}: {reason})"


def cell(found):
    """A field of the table, from a Counter of `outcomes`."""
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(
        f"{outcome} ({number} of {found.total()} cases)"
        for outcome, number in found.most_common()
    )


def table(folder):
    """The tables in Markdown, from the JUnit files of all backends."""
    columns = [outcomes(folder / f"{name}.xml") for name in BACKENDS]
    titles = [
        f"{title} {importlib.metadata.version(name)}"
        for name, title in BACKENDS.items()
    ]
    checks = [
        [words, *(cell(column[check]) for column in columns)]
        for check, words in CHECKS.items()
    ]
    others = [
        [
            words,
            *(summary(folder / f"{name}-{file}.xml") for name in TRAINING),
        ]
        for file, words in OTHER_LAYERS.items()
    ]
    day = datetime.date.fromtimestamp(
        max(path.stat().st_mtime for path in folder.glob("*.xml"))
    )
    return "\n".join(
        [
            "Recurrent layers. Each check runs for every layer at least once, "
            f"of {len(CASES)} layers and options. Keras {keras.__version__}, "
            f"Python {platform.python_version()}, CPU, {day}:",
            "",
            *_rows(titles, checks),
            "",
            "The other layers: how many of their tests pass, how many do not "
            "run, and the most common reason. On NumPy they are not tested.",
            "",
            *_rows(titles[: len(TRAINING)], others),
            "",
        ]
    )


def _rows(titles, rows):
    rows = [["", *titles], ["---"] * (1 + len(titles)), *rows]
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]


def write_table(text):
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + START + text + END + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("numbers").add_argument("file")
    of_table = commands.add_parser("table")
    of_table.add_argument("--results", type=pathlib.Path)
    of_table.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "numbers":
        write_numbers(arguments.file)
        return

    def run(backend, path, *arguments):
        if not path.exists():
            run_tests(backend, path, *arguments)
        if not path.exists():
            parser.exit(1, f"The run on {backend} crashed.\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.results or pathlib.Path(temporary)
        for backend in BACKENDS:
            run(backend, folder / f"{backend}.xml", "catalogue")
            for name in OTHER_LAYERS if backend in TRAINING else ():
                run(backend, folder / f"{backend}-{name}.xml", name)
        text = table(folder)
    print(text)
    if arguments.write:
        write_table(text)


if __name__ == "__main__":
    main()
