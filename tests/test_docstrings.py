"""Examples in docstrings run, and public names have docs."""

import doctest
import importlib
import inspect
import pathlib

import harness
import keras
import numpy as np
import pytest

import keras_memory
from keras_memory.retrieval import tuning

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_memory"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    harness.skip_on(*harness.OTHERS, because="shapes print as TensorFlow's do")
    if name.endswith("scann_index") and tuning.import_error() is not None:
        pytest.skip(f"needs ScaNN: {tuning.import_error()}")
    module = importlib.import_module(f"keras_memory.{name}")
    known = {"keras": keras, "keras_memory": keras_memory, "np": np}
    result = doctest.testmod(
        module, extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_docstrings(name):
    module = importlib.import_module(f"keras_memory.{name}")
    assert module.__doc__
    for key, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and not key.startswith("_") and callable(value):
            assert inspect.getdoc(value), key
