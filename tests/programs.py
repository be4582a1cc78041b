"""Python programs that tests run in processes of their own."""

import os
import pathlib
import subprocess
import sys

# Garbage collection would take two of the five seconds in which a program
# imports TensorFlow and ends.
START = """\
import atexit, gc
gc.set_threshold(10_000)
atexit.register(gc.freeze)
"""
OF_FILE = """\
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(program, *arguments):
    """The command that runs a program: a path, or code."""
    if isinstance(program, pathlib.Path):
        program, arguments = OF_FILE, (program, *arguments)
    return [sys.executable, "-c", START + program, *map(str, arguments)]


def run(program, *arguments, cwd=None, timeout=None, **environment):
    """Runs a program until it ends, and returns its exit code and texts."""
    return subprocess.run(
        command(program, *arguments),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def output(program, *arguments, **options):
    """Runs a program that must succeed, and returns what it printed."""
    done = run(program, *arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
