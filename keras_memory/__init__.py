"""Neural memory as Keras layers."""

import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_command():
    """True in `keras-memory` and in `python -m keras_memory`."""
    script, *arguments = getattr(sys, "argv", None) or [""]
    if script == "-m":  # Python has not found the file yet
        script = sys.orig_argv[-1 - len(arguments)].removeprefix("-m")
    return pathlib.Path(script).stem in ("keras-memory", "keras_memory")


# Keras loads a layer only if it is registered, so all modules are imported.
# Only the command waits until it has parsed its arguments, as TensorFlow takes
# seconds.
if TYPE_CHECKING:
    from keras_memory import visualization as visualization
if TYPE_CHECKING or not _is_command():
    from keras_memory.api import *  # noqa: F403


def __getattr__(name):
    # `from keras_memory import ...` asks for a module first here.
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    if _is_command():
        api = importlib.import_module("keras_memory.api")
        public = {key: vars(api)[key] for key in vars(api) if key[0] != "_"}
        globals().update(public)
        if name in public:
            return public[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
