"""Runs each benchmark in small; times are not checked."""

import json
import sys

import harness
import pytest
import tensorflow as tf
from test_benchmarks import TINY
from test_benchmarks import cases
from test_benchmarks import command_line
from test_benchmarks import esm
from test_benchmarks import key_drift
from test_benchmarks import lists_of
from test_benchmarks import memory_wrap
from test_benchmarks import references
from test_benchmarks import retrieval
from test_benchmarks import sam
from test_benchmarks import scaling
from test_benchmarks import shrink

from keras_memory.retrieval import tuning
from keras_memory.training import presets
from keras_memory.training import tasks
from keras_memory.training.config import override

stability = pytest.importorskip("benchmarks.stability")

pytestmark = pytest.mark.skipif(
    harness.BACKEND != "tensorflow", reason="the benchmarks use TensorFlow"
)

OF_REFERENCE = {"layer": sam.REFERENCE}
NO_XLA = {"no XLA": {"jit_compile": False}}
SETTINGS = [  # for all runs: module, name and value
    (cases, "CASES", {"ntm-1": ("ntm", TINY, 60)}),
    (cases, "VARIANTS", NO_XLA),
    (scaling, "AXES", {"N": ("slots", (5,))}),
    (scaling, "VARIANTS", tuple(NO_XLA)),
    (memory_wrap, "CASES", {"train": ("train", (5, 7), 1.5)}),
    (memory_wrap, "OURS", {"train": NO_XLA}),
    (retrieval, "CASES", {"2K": (101, 0.95, 2)}),
    (key_drift, "RULES", {"never": key_drift.NEVER}),
    (esm, "VARIANTS", {"a frame, no XLA": (esm.FRAME, False)}),
    (esm, "SIZE", 4),
    (esm, "LARGE", (8, 12)),
    (sam, "ROW", {**sam.ROW, **TINY, "top_k": 2}),
    (
        sam,
        "CASES",
        {"memories": ("SAM", [{sam.REFERENCE: OF_REFERENCE, "SAM": {}}])},
    ),
    (references, "installed", lambda name: False),
]
RUNS = {  # rows of the last table, and how many are not run
    "steps": ("--threads 1", 2, 1),
    "scaling": ("scaling --cases ntm", 1, 0),
    "memory_wrap": ("memory_wrap --threads 1", 2, 1),
    "retrieval": ("retrieval --cases 2K --data clustered", 6, 3),
    "static": ("retrieval --cases static --data clustered", 5, 4),
    "drift": ("retrieval --cases drift", 3, 0),
    "esm": ("esm", 2, 1),
    "sam": ("sam", 2, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_benchmark_runs(name, tmp_path, monkeypatch, capsys):
    if name == "drift" and tuning.import_error() is not None:
        pytest.skip(tuning.import_error())
    shrink(monkeypatch)
    for setting in SETTINGS:
        monkeypatch.setattr(*setting)
    monkeypatch.setitem(cases.BASES, "ntm", TINY)
    arguments, number, missing = RUNS[name]
    path = tmp_path / "scaling.json"
    where = ["--out", tmp_path] if name == "scaling" else ["--json", path]
    arguments = [*arguments.split(), "--rounds", "1", *map(str, where)]
    command_line.main(arguments)
    assert json.loads(path.read_text())
    *_, table = (
        part for part in capsys.readouterr().out.split("\n\n") if "|" in part
    )
    assert len(lists_of(table)) == 2 + number
    assert table.count("not run") == missing


def test_searches_of_a_full_memory_are_compared(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scann")
    from benchmarks import sam_search

    small = {"steps": 2, "size": 3, "width": 4, "units": 3, "top_k": 2}
    monkeypatch.setattr(sam_search, "ROW", {**sam_search.ROW, **small})
    monkeypatch.setattr(sam_search, "SLOTS", {"16K": 64, "1M": 128})
    monkeypatch.setattr(cases, "prepare", lambda threads: None)
    options = "--rounds 1 --batch 1 --slots 16K --contents clustered --json"
    path = tmp_path / "all.json"
    for methods in (["--methods", "exact"], []):
        command_line.main(["sam_search", *options.split(), str(path), *methods])
        table = capsys.readouterr().out.split("\n\n")[0]
        rows = lists_of(table)[2:]
        assert rows[0][:4] == ["64", "clustered", "exact", "1"]
        assert [row[-1] for row in rows] == ["1.000"] * len(rows)
    records = json.loads(path.read_text())["results"]
    # A case that was measured again has one record.
    assert [one["search"] for one in records] == ["exact", "approximate"]


@pytest.mark.slow
def test_xla_reserves_less_for_sparse_links(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jax")
    path, options = tmp_path / "all.json", "xla_memory --slots 256 --json"
    command_line.main([*options.split(), str(path), "--layers", "SDNC", "DNC"])
    records = json.loads(path.read_text())["results"]
    sparse, dense = (record["bytes"] for record in records)
    assert 0 < 10 * sparse < dense
    rows = lists_of(capsys.readouterr().out.split("\n\n")[0])[2:]
    assert [row[0] for row in rows] == ["SDNC", "DNC"]


def test_curricula_are_trained_once_and_tested_on_longer_sequences(
    tmp_path, monkeypatch, capsys
):
    shrink(monkeypatch)
    monkeypatch.setattr(cases, "prepare", lambda threads: None)
    small = [
        *("bits=2", "max_length=9", "slot_size=3", "controller_units=3"),
        *("batch_size=2", "report_every=5", "steps=10", "jit_compile=False"),
        *("curriculum=(1,)", "curriculum_error=99", "probe_lengths=(2,)"),
    ]
    copy = presets.PRESETS["copy"]
    changed = {**copy, "sam": override(copy["sam"], small)}
    monkeypatch.setitem(presets.PRESETS, "copy", changed)
    options = "curriculum --tasks copy --models sam --seeds 3 --minutes 5"
    path = tmp_path / "numbers.json"
    options = [*options.split(), "--out", str(tmp_path), "--json", str(path)]
    command_line.main(options)
    first, *_ = capsys.readouterr().out.split("\n\n")
    (row,) = lists_of(first)[2:]
    assert row[:4] == ["copy", "sam", "3", "10"]
    assert row[5:7] == ["1", "2"]  # learned, and trained on
    assert [cell.split(" of ")[1] for cell in row[7:]] == ["4", "8", "20", "40"]
    result = json.loads(path.read_text())["results"]["copy-sam-3"]
    assert result["errors"]["5"]["length"] == 10
    command_line.main(options)  # the run folder is there
    assert capsys.readouterr().out.split("\n\n")[0] == first


@pytest.fixture
def small_stability(monkeypatch):
    """The script with short sequences, without XLA."""
    monkeypatch.setattr(stability, "TASK", tasks.Copy(2, buckets=1))
    tf.config.run_functions_eagerly(True)
    yield stability
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("name", stability.ARCHITECTURES)
def test_stability_finds_finite_values(
    name, small_stability, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", f"_ {name} --seeds 1 --steps 1".split())
    small_stability.main()
    table, _ = capsys.readouterr().out.rsplit("\n", 1)
    rows = lists_of(table)[2:]
    assert [row[:6] for row in rows] == [
        [rate, "1", "0", "0", "0", "0"] for rate in ("0.0001", "0.001", "0.01")
    ]


def test_stability_counts_nan_values(small_stability, monkeypatch):
    """A NaN in the output's bias reaches everything but the states."""
    made = stability.made

    def broken(name):
        layer = made(name)
        _, bias = layer.cell.output_projection
        bias.assign(float("nan") * bias)
        return layer

    monkeypatch.setattr(stability, "made", broken)
    row = small_stability.stability("sam", [0.1], seeds=1, steps=1)[0.1]
    assert [row[part] for part in stability.CHECKED] == [1, 1, 1, 0]
