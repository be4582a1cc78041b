"""Neural memory as Keras layers."""

import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Access",
    "BaselineMemory",
    "CausalAttention",
    "CausalAttentionState",
    "DNCCell",
    "DNCLayer",
    "DNCState",
    "ESMCell",
    "ESMLayer",
    "ESMMap",
    "KNNAttention",
    "KNNAttentionState",
    "KNNMemory",
    "KNNMemoryLayer",
    "MERLINState",
    "MemorizingTransformer",
    "MemoryCell",
    "MemoryRNN",
    "MemoryWrapClassifier",
    "MemoryWrapLayer",
    "NTMCell",
    "NTMLayer",
    "NTMState",
    "Neighbours",
    "RelativePositionBias",
    "RingMemory",
    "SAMCell",
    "SAMLayer",
    "SAMState",
    "SDNCCell",
    "SDNCLayer",
    "SDNCState",
    "ScannIndex",
    "StateSpec",
    "callbacks",
    "controllers",
    "convert",
    "explanations",
    "export",
    "geometry",
    "losses",
    "plot",
    "retrieval",
    "rgbd",
    "rooms",
    "tasks",
    "trace",
    "trace_model",
    "visualization",
]


def _is_command():
    """True in `keras-memory` and in `python -m keras_memory`."""
    script, *arguments = getattr(sys, "argv", None) or [""]
    if script == "-m":  # Python has not found the file yet
        script = sys.orig_argv[-1 - len(arguments)].removeprefix("-m")
    return pathlib.Path(script).stem in ("keras-memory", "keras_memory")


# All modules are imported, which registers their layers: Keras loads only
# registered ones. The command delays this until it has parsed its arguments, as
# importing TensorFlow takes seconds.
if TYPE_CHECKING:
    from keras_memory import addressing as addressing
    from keras_memory import training as training
    from keras_memory import visualization as visualization
if TYPE_CHECKING or not _is_command():
    from keras_memory.api import *


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __dir__():
        own = {"TYPE_CHECKING", "importlib", "pathlib", "sys"}
        return sorted({*globals(), *__all__} - own)

    def __getattr__(name):
        # `from keras_memory import ...` asks here first, also for modules.
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        if _is_command():
            api = importlib.import_module("keras_memory.api")
            globals().update(
                {key: vars(api)[key] for key in __all__ if key in vars(api)}
            )
            if name in __all__:
                return vars(api)[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
