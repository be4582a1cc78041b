"""The benchmarks run; their times are nobody's business here."""

import functools
import json
import math
import pathlib
import re
import sys
import time

import harness
import numpy as np
import pytest

from keras_memory import visualization

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

cases = pytest.importorskip("benchmarks.cases")
command_line = pytest.importorskip("benchmarks.__main__")
measure = pytest.importorskip("benchmarks.measure")
memory_wrap = pytest.importorskip("benchmarks.memory_wrap")
references = pytest.importorskip("benchmarks.references")
report = pytest.importorskip("benchmarks.report")
scaling = pytest.importorskip("benchmarks.scaling")
steps = pytest.importorskip("benchmarks.steps")

TINY = {"steps": 3, "slots": 5, "width": 3, "units": 3, "batch": 2}
TINY = {**TINY, "bits": 2, "size": 3}
needs_proc = pytest.mark.skipif(
    not measure.memory(), reason="memory is measured on Linux only"
)


def lists_of(table):
    """Cells of the lines of a Markdown table, all equally many."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert len({line.count("|") for line in lines}) == 1
    return rows


class Fake:
    """A worker without a process: its job is (name, milliseconds)."""

    calls = []
    largest = 100.0  # milliseconds

    def __init__(self, name, milliseconds, rounds, others, **limits):
        if milliseconds > self.largest:
            raise measure.Stopped(f"over {limits['seconds']:g} s")
        self.name, self.times, self.alive = name, (milliseconds, 1.0), True
        self.result = {"first_step_seconds": 0.5, "megabytes": 7.0}
        self.alone = [self.times] * rounds

    def step(self):
        if self.name == "killed":
            raise measure.Stopped("its process has ended")
        self.calls.append(self.name)
        return self.times

    def end(self):
        self.alive = False


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(measure, "Worker", Fake)
    monkeypatch.setattr(Fake, "calls", [])
    return Fake


def test_variants_take_turns(fakes):
    jobs = {"r": ("r", 6.0), "a": ("a", 2.0), "b": "no such package"}
    results = measure.compare(jobs, rounds=4)
    assert fakes.calls == ["r", "a"] * 4
    assert list(results) == ["r", "a", "b"]
    assert results["b"] == {"not_run": "no such package"}
    assert results["a"]["milliseconds"] == 2.0 and results["a"]["in_turn"]
    assert measure.ratio(results["a"], results["r"]) == [3.0, 3.0, 3.0]


def test_without_room_for_all_each_has_its_own_steps(fakes):
    jobs = {"r": ("r", 6.0), "killed": ("killed", 2.0)}
    results = measure.compare(jobs, rounds=4, alone=3)
    assert [len(one["rounds"]) for one in results.values()] == [3, 3]
    assert not any(one["in_turn"] for one in results.values())


def test_one_round_is_enough():
    one, other = {"rounds": [(2.0, 1.0)]}, {"rounds": [(5.0, 1.0)]}
    assert measure.ratio(one, other) == [2.5, 2.5, 2.5]


def test_a_worker_ends_at_its_time_limit():
    make = functools.partial(time.sleep, 60)
    with pytest.raises(measure.Stopped, match="^over 0.2 s$"):
        measure.Worker(int, make, seconds=0.2)


def test_slow_steps_are_fewer():
    sleep = functools.partial(functools.partial, time.sleep, 0.1)
    worker = measure.Worker(int, sleep, rounds=100, seconds=2.0)
    assert 1 <= len(worker.alone) <= 8
    assert worker.step()[0] >= 100
    worker.end()


@needs_proc
def test_a_worker_ends_at_its_memory_limit():
    make = functools.partial(time.sleep, 60)
    with pytest.raises(measure.Stopped, match="^over 0.001 GB$"):
        measure.Worker(int, make, gigabytes=0.001)


@needs_proc
def test_workers_before_it_make_room():
    class Large:
        size, ended = 1.0, False

        def end(self):
            self.ended = True

    large = Large()
    make = functools.partial(time.sleep, 60)
    with pytest.raises(measure.Stopped, match="over 0.4 s"):
        measure.Worker(int, make, seconds=0.4, gigabytes=0.9, others=[large])
    assert large.ended


def test_a_worker_tells_of_errors_and_of_its_end():
    with pytest.raises(measure.Stopped, match="ValueError: math domain error"):
        measure.Worker(functools.partial(math.sqrt, -1), int)
    with pytest.raises(measure.Stopped, match="process ended with 3"):
        measure.Worker(functools.partial(sys.exit, 3), int)


@needs_proc
def test_peaks_are_those_of_what_follows():
    before = measure.memory()
    held = np.ones(2**25, "uint8")
    del held
    measure.forget_peak()
    after = measure.peak(before)
    held = np.ones(2**25, "uint8")
    assert 24 < measure.peak(before) - after < 40 and held.all()


def test_memory_is_not_measured_without_proc(monkeypatch):
    monkeypatch.setattr(measure, "memory", dict)
    assert measure.peak({}) is None
    assert report.short(None) == "not measured"


@harness.needs_tensorflow
@pytest.mark.parametrize("kind", ["ntm", "dnc"])
def test_our_steps_train(kind):
    step = cases.ours(kind, TINY, jit_compile=False)
    losses = [step() for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_the_reference_of_the_dnc_trains():
    pytest.importorskip("dnc")
    step = references.pytorch_dnc(TINY)
    assert math.isfinite(step()) and step() != step()


def test_rows_tell_what_was_not_run_and_what_is_not_computed():
    ran = {
        "milliseconds": 1234.5,
        "cpu_milliseconds": 0.01234,
        "first_step_seconds": 1.5,
        "megabytes": None,
        "ratio_quartiles": [1.0, 2.0, 300.0],
    }
    missing = {"not_run": "no such package"}
    rows = [
        steps.row("ntm-1", ("pytorch-ntm", 1), missing),
        steps.row("ntm-1", ("fast loop", 2), ran),
        steps.row("dnc-1", ("pytorch-dnc", 2), ran),
    ]
    cells = lists_of(report.table(steps.HEADER, rows))
    assert cells[2][1] == "pytorch-ntm (loss of the last 20 of 41 steps only)"
    assert cells[2][3] == "not run: no such package"
    text = "ntm-1 | fast loop | 2 | 1,234 | 0.0123 | 1.5 | not measured"
    assert cells[3] == [*text.split(" | "), "2 (1 to 300)", "60"]
    assert cells[4][1] == "pytorch-dnc (reads are not fed back)"


def test_the_best_of_both_is_shown_with_its_threads():
    def result(*times):
        rounds = [(t, 1.0) for t in times]
        return {"milliseconds": np.median(times), "rounds": rounds}

    results = {
        ("pytorch-dnc", 1): result(10, 10),
        ("pytorch-dnc", 2): result(12, 12),
        ("fast loop", 1): result(4, 4),
        ("fast loop", 2): result(2, 2),
    }
    assert steps.best_row("dnc-1", results) == [
        ["dnc-1", "10 (1 thread)", "2 (2 threads)", "5 (5 to 5)", 14]
    ]
    results["pytorch-dnc", 1] = results["pytorch-dnc", 2] = {"not_run": "-"}
    assert steps.best_row("dnc-1", results) == []


@harness.needs_tensorflow
def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "CASES", {"tiny": ("ntm", TINY, 60)})
    quick = {"fast loop": {"jit_compile": False}}
    monkeypatch.setattr(cases, "VARIANTS", quick)
    file = tmp_path / "results.json"
    options = "--threads 1 --rounds 1 --json".split()
    command_line.main([*options, str(file)])
    written = json.loads(file.read_text())
    assert list(written) == ["machine", "threads", "rounds", "results"]
    reference, ours = written["results"]
    assert "--pytorch-ntm" in reference["not_run"]
    assert (ours["case"], ours["variant"], ours["threads"]) == (
        "tiny",
        "fast loop",
        1,
    )
    assert ours["milliseconds"] > 0 and ours["first_step_seconds"] > 0
    assert ours["megabytes"] is None or 0 < ours["megabytes"] < 1000
    printed = capsys.readouterr().out
    assert len(lists_of(printed)) == 2 + 2
    assert f"keras {written['machine']['keras']}" in printed


def test_curves_end_where_a_limit_is_reached(fakes, tmp_path, monkeypatch):
    def jobs(kind, sizes, threads, checkout, variants):
        return {
            "pytorch-dnc": "needs a package",
            "fast loop": ("fast loop", 1.0 * sizes["slots"] ** 0.5),
            "portable loop": ("portable loop", 0.5 * sizes["slots"]),
        }

    monkeypatch.setattr(cases, "jobs", jobs)
    arguments = "scaling --cases dnc --axes N --seconds 9 --rounds 2 --out"
    command_line.main([*arguments.split(), str(tmp_path)])
    text = (tmp_path / "scaling.md").read_text()
    rows = {row[0]: row[1:] for row in lists_of(text)}
    assert rows["N"][0] == "pytorch-dnc, ms"
    assert rows["128"][:3] == ["needs a package", "11.3", "64"]
    assert rows["256"][:3] == ["needs a package", "16", "over 9 s"]
    assert rows["4,096"] == ["needs a package", "64", "-"] + (
        ["needs a package", "7", "-"]
    )
    assert "larger values are not tried" in text
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert written["limits"] == {"gigabytes": 16.0, "seconds": 9.0}
    assert len(written["results"]) == 3 * len(scaling.AXES["N"][1])
    picture = visualization.decode_png(
        (tmp_path / "scaling-dnc.png").read_bytes()
    )
    for colour in visualization.LINES[:2]:  # of ours, in both plots
        columns = np.all(picture == colour, axis=2).any(axis=0)
        half = len(columns) // 2
        assert columns[:half].any() and columns[half:].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--rounds 0", "at least 1, not 0"),
        ("--threads 1 x", "invalid count value: 'x'"),
        ("--cases ntm-2", "invalid choice: 'ntm-2'"),
        ("--pytorch-ntm /nowhere", "/nowhere is no checkout"),
        ("--json /nowhere/x.json", "the folder of /nowhere/x.json does not"),
        ("scaling --axes X", "invalid choice: 'X'"),
        ("scaling --seconds 0", "above 0, not 0"),
        ("scaling --memory-limit nan", "above 0, not nan"),
        ("scaling --pytorch-ntm /nowhere", "/nowhere is no checkout"),
    ],
)
def test_wrong_options_are_told_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.main(arguments.split())
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


# Memory Wrap.


@pytest.mark.parametrize("options", [{}, {"jit_compile": False}, {"top_k": 2}])
@pytest.mark.parametrize("kind", ["train", "answer"])
def test_steps_of_memory_wrap(kind, options):
    harness.skip_on(*harness.OTHERS, because="the benchmarks use TensorFlow")
    step = memory_wrap.ours(kind, 5, 7, **options)
    first, second = step(), step()
    assert np.isfinite(first).all()
    if kind == "train":
        assert second < first
    else:
        np.testing.assert_array_equal(first, second)


def test_reference_of_memory_wrap():
    pytest.importorskip("memorywrap")
    step = memory_wrap.memorywrap("train", 5, 7)
    first = step()
    assert step() < first
    answers = memory_wrap.memorywrap("answer", 5, 7)()
    assert answers.shape == (memory_wrap.BATCH, memory_wrap.CLASSES)


def test_memory_wrap_prints_a_table(fakes, monkeypatch, tmp_path, capsys):
    times = {"memorywrap": 6.0, "XLA": 2.0, "no XLA": 3.0}

    def jobs(kind, sizes, threads):
        found = {
            (name, count): (name, time)
            for name, time in times.items()
            for count in threads
        }
        return (
            found if kind == "train" else {**found, ("memorywrap", 1): "none"}
        )

    monkeypatch.setattr(memory_wrap, "jobs", jobs)
    names = ["train, 100 examples", "answer, 100 examples"]
    arguments = ["memory_wrap", "--rounds", "2", "--threads", "1", "--cases"]
    path = tmp_path / "all.json"
    command_line.main([*arguments, *names, "--json", str(path)])
    header, _, *rows = lists_of(capsys.readouterr().out)
    assert tuple(header) == memory_wrap.HEADER
    assert rows[1][1:] == ["XLA", "1", "2", "7", "3 (3 to 3)", "1.5"]
    assert rows[3][3] == "not run: none"
    assert rows[4][3:5] == ["2", "7"]
    results = json.loads(path.read_text())["results"]
    assert [r["case"] for r in results] == [n for n in names for _ in range(3)]


def test_jobs_of_memory_wrap(monkeypatch):
    monkeypatch.setattr(references, "installed", lambda name: name != "torch")
    jobs = memory_wrap.jobs("answer", (5, 7), [1, 2])
    assert "pip install" in jobs["memorywrap", 2]
    assert {name for name, _ in jobs} == {
        "memorywrap",
        "XLA",
        "no XLA",
        "no XLA, bfloat16",
    }
    monkeypatch.setattr(references, "installed", lambda name: True)
    jobs = memory_wrap.jobs("answer", (5, 7000), [1])
    assert callable(jobs["memorywrap", 1][1])
    assert jobs["XLA, top_k=32", 1][1].keywords == {"top_k": 32}
