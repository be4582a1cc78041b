"""Each example runs, for two steps."""

import pathlib
import runpy

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LESS = {"memory_wrap_digits": ["--models", "memory wrap", "--draws", "1"]}


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem
)
def test_example(path, capsys, tmp_path, monkeypatch):
    if path.stem == "memory_wrap_digits":
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps", "2", *LESS.get(path.stem, [])]
    runpy.run_path(path)["main"](arguments)
    assert capsys.readouterr().out
