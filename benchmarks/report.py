"""Tables, and a description of the machine."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform

from keras_memory.files import atomic_write

PACKAGES = "keras", "tensorflow", "torch", "dnc", "memorywrap", "numpy"


def table(header, rows):
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class Table:
    """A Markdown table, printed row by row, so that no finished row is lost."""

    def __init__(self, header):
        self.header, self.rows = header, []

    def add(self, rows):
        lines = table(self.header, rows).splitlines()
        print("\n".join(lines[2 if self.rows else 0 :]), flush=True)
        self.rows += rows

    def end(self):
        if self.rows:
            print(flush=True)


def short(number, unit=""):
    """Three digits: 0.0123, 1.23, 1,235."""
    if number is None:
        return "not measured"
    return (f"{number:,.0f}" if number >= 100 else f"{number:.3g}") + unit


def with_spread(quartiles):
    if not quartiles:
        return ""
    low, middle, high = map(short, quartiles)
    return f"{middle} ({low} to {high})"


def counted(number, what):
    """1 thread, 2 threads."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def machine(packages=PACKAGES):
    """Versions of packages, and the machine."""
    import keras_memory

    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "processor": _processor(),
        "cores": _cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "keras_memory": keras_memory.__version__,
        **found,
    }


def on(machine):
    """Describes the machine in one line."""
    first = "processor", "cores", "system"
    cores = counted(machine["cores"], "core")
    versions = [f"{k} {v}" for k, v in machine.items() if k not in first]
    return (
        f"{machine['processor']}, {cores}, {machine['system']}; "
        f"{', '.join(versions)}"
    )


def write_json(path, numbers):
    """Writes all numbers so far atomically; does nothing if `path` is None."""
    if path is not None:
        with atomic_write(pathlib.Path(path)) as aside:
            aside.write_text(json.dumps(numbers, indent=1) + "\n")


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].split(": ")[1] if names else platform.processor()


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
