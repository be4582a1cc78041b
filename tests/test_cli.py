"""Tests of the command before it imports TensorFlow: outputs and imports."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_memory
from keras_memory import cli
from keras_memory.training.presets import PRESETS

PACKAGE = pathlib.Path(keras_memory.__file__).parent
AS_SCRIPT = """
import sys
from keras_memory.cli import main
sys.exit(main())
"""
# Prints at the end of the process whether TensorFlow was imported.
WATCHED = """
import atexit, sys
def told():
    heavy = {"tensorflow", "keras", "jax", "torch", "numpy"} & set(sys.modules)
    print(*sorted(heavy), file=open("imported", "w"))
atexit.register(told)
"""


@pytest.fixture
def command(tmp_path):
    """Runs the command in a process that starts as for users, and reports its
    imports."""
    script = tmp_path / "bin" / "keras-memory"
    script.parent.mkdir()
    script.write_text(AS_SCRIPT)
    (tmp_path / "sitecustomize.py").write_text(WATCHED)
    starts = {
        "keras-memory": [script],
        "-m keras_memory": ["-m", "keras_memory"],
        "-m keras_memory.cli": ["-m", "keras_memory.cli"],
    }
    paths = [str(tmp_path), str(PACKAGE.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)

    def run(start, *arguments):
        done = subprocess.run(
            [sys.executable, *starts[start], *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done, (tmp_path / "imported").read_text().split()

    return run


@pytest.mark.parametrize(
    "start", ["keras-memory", "-m keras_memory", "-m keras_memory.cli"]
)
def test_version_and_help_need_no_tensorflow(start, command):
    for argument, text in (
        ("--version", f"keras-memory {keras_memory.__version__}\n"),
        ("--help", "keras-memory train copy"),
    ):
        done, imported = command(start, argument)
        assert (done.returncode, done.stderr) == (0, "")
        assert text in done.stdout
        assert imported == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("", "required: command"),
        ("--verison", "unrecognized arguments: --verison"),
        ("trian copy", "invalid choice: 'trian'"),
        ("train cpoy", "the task must be one of: copy, .* Received: cpoy"),
        ("train", "the task must be one of"),
        ("train copy --preset mine", "the preset of copy must be one of"),
        ("train argmax --preset paper", "the preset of argmax must be one of"),
        ("train copy --steps 0", "--steps must be at least 1"),
        ("train copy --seed -1", "--seed must be at least 0"),
        ("train copy --out bin", "has files in it"),
        ("train copy --out imported", "imported, a file"),
        ("train --resume nowhere", "config.json.*Received: nowhere"),
        ("evaluate nowhere", "config.json.*Received: nowhere"),
        ("evaluate begun", "before its first checkpoint.*--resume begun"),
        ("evaluate begun --length 3 0", "--length must be at least 1"),
        ("plot nowhere", "Received: nowhere"),
        ("compare nowhere", "Received: nowhere"),
        ("compare begun --out x.jpg", "a .png file"),
        ("export nowhere out", "Received: nowhere"),
        ("export begun out --version 0", "--version must be at least 1"),
        ("convert pytorch-ntm nowhere x.keras", "Received: nowhere"),
        ("convert pytorch-ntm imported x.txt", "a new .keras file"),
        ("convert pytorch-ntm imported x.keras --clip 3", "does not take"),
    ],
)
def test_usage_errors_are_reported_before_tensorflow_is_imported(
    arguments, told, command, tmp_path
):
    (tmp_path / "imported").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    done, imported = command("keras-memory", *arguments.split())
    assert done.returncode == 2
    assert imported == []
    last = done.stderr.splitlines()[-1]
    assert re.match("keras-memory.*: error: ", last)
    assert re.search(told, last)


def test_outside_the_command_all_layers_are_registered_at_once():
    """Here a test has imported `keras_memory`, not the command."""
    public = ast.parse((PACKAGE / "api.py").read_text()).body[1:]
    names = {alias.asname for node in public for alias in node.names}
    assert {"NTMLayer", "callbacks", "ScannIndex"} <= names
    assert names <= set(vars(keras_memory))


def test_the_command_knows_all_tasks_and_presets():
    presets = {task: set(PRESETS[task]) for task in PRESETS}
    assert presets == {task: set(cli.PRESETS[task]) for task in cli.PRESETS}
    assert list(cli.PRESETS) == list(PRESETS)


def test_custom_tasks_are_known(monkeypatch, capsys):
    mine = {"default": PRESETS["copy"]["default"]}
    monkeypatch.setitem(PRESETS, "mine", mine)
    assert cli.main(["train", "mine", "--print-config"]) == 0
    assert '"name": "copy"' in capsys.readouterr().out


def test_the_log_level_of_the_user_is_kept(monkeypatch, capsys):
    for before, after in (("0", "0"), (None, "3")):
        if before is None:
            monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
        else:
            monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before)
        assert cli.main(["train", "nothing"]) == 2
        assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == after
