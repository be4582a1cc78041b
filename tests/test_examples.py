"""Runs each example for two steps."""

import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LESS = {"memory_wrap_digits": ["--models", "memory wrap", "--draws", "1"]}


@pytest.mark.parametrize(
    "example, arguments, package",
    [
        ("knn_memory", [], "scikit-learn"),
        ("memory_wrap_digits", [], "scikit-learn"),
        ("memory_wrap_digits", ["--dataset", "svhn"], "scipy"),
    ],
)
def test_a_missing_package_is_named(example, arguments, package, monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, None)
    main = runpy.run_path(EXAMPLES / f"{example}.py")["main"]
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        main(arguments)


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem
)
def test_examples_run(path, capsys, tmp_path, monkeypatch):
    if path.stem == "memory_wrap_digits":
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps", "2", *LESS.get(path.stem, [])]
    runpy.run_path(path)["main"](arguments)
    assert capsys.readouterr().out
