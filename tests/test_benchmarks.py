"""The benchmarks run; their times are nobody's business here."""

import json
import math
import pathlib
import sys

import harness
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

benchmarks = pytest.importorskip("benchmarks.__main__")


def test_variants_take_turns_and_the_reference_is_what_ratios_are_of():
    calls = []

    def made(name):
        return lambda: lambda: calls.append(name)

    variants = {"reference": made("r"), "a": made("a"), "b": "no such package"}
    results = benchmarks.measure(variants, rounds=4)
    assert calls[-8:] == ["r", "a"] * 4
    assert results["b"] == {"not_run": "no such package"}
    assert results["reference"]["ratio"] == 1.0
    low, high = results["a"]["ratio_range"]
    assert 0 < low <= results["a"]["ratio"] <= high


def test_rows_tell_what_was_not_run():
    cells = benchmarks.row("ntm-1", "a", {"not_run": "no such package"}, 60)
    assert "not run: no such package" in cells
    results = benchmarks.measure({"fast loop": lambda: lambda: None}, 3)
    cells = benchmarks.row("ntm-1", "fast loop", results["fast loop"], 60)
    assert cells.count("|") == 8 and cells.endswith("| 60 |")


@harness.needs_tensorflow
@pytest.mark.parametrize("kind", ["ntm", "dnc"])
def test_our_steps_train(kind):
    sizes = {"steps": 3, "bits": 2, "size": 3, "slots": 5, "width": 3}
    step = benchmarks.ours(
        kind, {**sizes, "units": 3, "batch": 2}, jit_compile=False
    )
    losses = [step() for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert len(set(losses)) == 3


@harness.needs_tensorflow
def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    small = {"steps": 2, "bits": 2, "slots": 5, "width": 3, "units": 3}
    cases = {"tiny": ("ntm", {**small, "batch": 1}, 60)}
    monkeypatch.setattr(benchmarks, "CASES", cases)
    file = tmp_path / "results.json"
    benchmarks.main(["--cases", "tiny", "--rounds", "2", "--json", str(file)])
    written = json.loads(file.read_text())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(written["tiny"])
    assert "not_run" in written["tiny"]["reference"]
    assert written["tiny"]["fast loop"]["milliseconds"] > 0
    assert written["peak_megabytes"] > 0
