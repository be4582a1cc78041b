"""Examples in docstrings and README run, and public names have docstrings."""

import doctest
import importlib
import inspect
import pathlib
import re

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


def test_readme_examples_run(tmp_path, monkeypatch):
    harness.skip_on(*harness.OTHERS, because="exports a SavedModel")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    names = {"x": np.zeros((2, 7, 9), "f4"), "y": np.zeros((2, 7, 8), "f4")}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(block, names)
    assert names["inside"]["write_weighting"].shape == (2, 7, 1, 128)
    assert names["state"].memory.shape == (2, 128, 20)
    assert (tmp_path / "served/copy/1/saved_model.pb").exists()
