"""Type hints of public names, as a type checker (pyright) sees them."""

import ast
import importlib.util
import inspect
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import typing
from typing import Any

import harness
import pytest

import keras_memory
from keras_memory import training

ROOT = pathlib.Path(__file__).parents[1]
TYPING = ROOT / "tests" / "typing"
REGISTERED = re.compile(
    r"^@keras\.saving\.register_keras_serializable.*\n", re.M
)
UNKNOWN = re.compile("nnotation .*is missing|Unknown|Type (argument|unknown)")

needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None,
    reason="pyright is not installed",
)


def pyright(*arguments, root=ROOT):
    """What pyright writes as JSON; of a package's names from `root`."""
    found = subprocess.run(
        [
            *(sys.executable, "-m", "pyright", "--outputjson"),
            *("--pythonpath", sys.executable),
            *arguments,
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert found.stdout, found.stderr
    return json.loads(found.stdout)


def public():
    """The public functions and classes, by the names that pyright has."""
    names = [getattr(keras_memory, name) for name in keras_memory.__all__]
    modules = [found for found in names if inspect.ismodule(found)] + [training]
    is_package = {module: hasattr(module, "__path__") for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "")
            if name.startswith("_") or not callable(value):
                continue
            if own == module.__name__ or (
                is_package[module] and own.startswith("keras_memory.")
            ):
                names.append(value)
    return {
        f"{value.__module__}.{value.__qualname__}": value
        for value in names
        if not inspect.ismodule(value)
    }


# What is right, and what is wrong.


@pytest.fixture(scope="module")
def errors():
    """Lines, rules and texts of the errors in the files of tests/typing."""
    found = pyright(str(TYPING / "right.py"), str(TYPING / "wrong.py"))
    assert found["summary"]["filesAnalyzed"] == 2, found
    errors = {"right.py": [], "wrong.py": []}
    for error in found["generalDiagnostics"]:
        name = pathlib.Path(error["file"]).name
        line = error["range"]["start"]["line"] + 1
        errors[name].append((line, error["rule"], error["message"]))
    return errors


@needs_pyright
def test_right_uses_are_right(errors):
    assert errors["right.py"] == []


def test_right_uses_run(tmp_path, monkeypatch):
    harness.skip_on(*harness.OTHERS, because="the hints are the same")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(TYPING / "right.py")


@needs_pyright
def test_wrong_uses_are_errors(errors):
    lines = (TYPING / "wrong.py").read_text().splitlines()
    expected = [
        (number, rule)
        for number, line in enumerate(lines, start=1)
        for rule in re.findall(r"# error: (\w+)$", line)
    ]
    assert len(expected) > 40
    assert [error[:2] for error in errors["wrong.py"]] == expected, errors


# Hints are there.


@needs_pyright
def test_types_of_public_names_are_known(tmp_path):
    """Of a copy in which no class is registered: Keras has no hints, and what
    its decorators return is not looked into."""
    shutil.copytree(ROOT / "keras_memory", tmp_path / "keras_memory")
    for path in (tmp_path / "keras_memory").rglob("*.py"):
        path.write_text(REGISTERED.sub("", path.read_text()))
    arguments = "--verifytypes", "keras_memory", "--ignoreexternal"
    found = pyright(*arguments, root=tmp_path)["typeCompleteness"]
    assert found["packageRootDirectory"] == str(tmp_path / "keras_memory")
    symbols = {symbol["name"]: symbol for symbol in found["symbols"]}
    names = public()
    assert len(names) > 90 and names.keys() <= symbols.keys()
    unknown = {}
    for name, symbol in symbols.items():
        is_public = {name, name.rpartition(".")[0]} & names.keys()
        if not symbol["isTypeKnown"] and is_public:
            reasons = [reason["message"] for reason in symbol["diagnostics"]]
            # The bases that are Keras's are not fully known either.
            reasons = [reason for reason in reasons if UNKNOWN.search(reason)]
            if reasons:
                unknown[name] = reasons
    assert unknown == {}


def functions(name, value):
    """A public function, or the public methods of a class, with those that it
    inherits of this library."""
    if not inspect.isclass(value):
        yield name, value
        return
    for base in value.__mro__:
        if base.__module__.startswith("keras_memory"):
            for key, member in vars(base).items():
                member = getattr(member, "__func__", member)
                member = getattr(member, "fget", member)
                is_public = key in ("__init__", "__call__") or key[0] != "_"
                # Not what `MemoryCell` and `MemoryRNN` make.
                is_own = getattr(member, "__module__", "") == base.__module__
                if is_public and is_own and inspect.isfunction(member):
                    yield f"{base.__qualname__}.{key}", member


def test_public_signatures_are_hinted():
    """Also of Keras's layers."""
    bare = set()
    for name, value in public().items():
        for key, function in functions(name, value):
            found = inspect.signature(function)
            hints = [
                parameter.annotation
                for parameter in found.parameters.values()
                if parameter.name not in ("self", "cls")
            ]
            if not key.endswith("__init__"):
                hints.append(found.return_annotation)
            if found.empty in hints:
                bare.add(key)
    assert bare == set()


def test_hints_can_be_read_when_the_program_runs():
    found = {}
    for name, value in public().items():
        for key, function in [(name, value), *functions(name, value)]:
            found[key] = typing.get_type_hints(function)
    assert found["keras_memory.inspection.plotting.plot"]["return"] is Any


def test_attributes_that_type_checkers_see_are_there():
    tree = ast.parse(
        pathlib.Path(inspect.getfile(keras_memory.MemoryCell)).read_text()
    )
    (written,) = (
        node
        for node in ast.walk(tree)
        if getattr(node, "name", "") == "CellArguments"
    )
    fields = [node for node in written.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 15
    for layer in (keras_memory.NTMLayer(3), keras_memory.DNCLayer(3)):
        for owner in (layer, layer.cell):
            assert all(hasattr(owner, field.target.id) for field in fields)
