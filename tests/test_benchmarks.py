"""Tests of what the benchmarks measure and print. `test_benchmark_runs.py` runs
each benchmark once."""

import functools
import json
import math
import os
import pathlib
import re
import sys
import time
from unittest import mock

import harness
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from keras_memory.retrieval import scann_row
from keras_memory.retrieval import tuning
from keras_memory.visualization.images import LINES

pytestmark = pytest.mark.benchmarks

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

cases = pytest.importorskip("benchmarks.cases")
command_line = pytest.importorskip("benchmarks.__main__")
key_drift = pytest.importorskip("benchmarks.key_drift")
measure = pytest.importorskip("benchmarks.measure")
esm = pytest.importorskip("benchmarks.esm")
memory_wrap = pytest.importorskip("benchmarks.memory_wrap")
neighbours = pytest.importorskip("benchmarks.neighbours")
references = pytest.importorskip("benchmarks.references")
report = pytest.importorskip("benchmarks.report")
retrieval = pytest.importorskip("benchmarks.retrieval")
sam = pytest.importorskip("benchmarks.sam")
scaling = pytest.importorskip("benchmarks.scaling")
static_store = pytest.importorskip("benchmarks.static_store")
steps = pytest.importorskip("benchmarks.steps")

TINY = {"steps": 3, "slots": 5, "width": 3, "units": 3, "batch": 2}
TINY = {**TINY, "bits": 2, "size": 3}
needs_proc = pytest.mark.skipif(
    not measure.memory(), reason="memory is measured on Linux only"
)


def lists_of(table):
    """The cells of each line of a Markdown table; all lines have equally
    many."""
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


def test_variants_run_alone_without_room_for_all(fakes):
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


def test_slow_steps_are_measured_less_often():
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
def test_earlier_workers_end_to_make_room():
    class Large:
        size, ended = 1.0, False

        def end(self):
            self.ended = True

    large = Large()
    make = functools.partial(time.sleep, 60)
    with pytest.raises(measure.Stopped, match="over 0.4 s"):
        measure.Worker(int, make, seconds=0.4, gigabytes=0.9, others=[large])
    assert large.ended


def test_a_worker_reports_errors_and_its_exit_code():
    with pytest.raises(measure.Stopped, match="ValueError: math domain error"):
        measure.Worker(functools.partial(math.sqrt, -1), int)
    with pytest.raises(measure.Stopped, match="process ended with 3"):
        measure.Worker(functools.partial(sys.exit, 3), int)


@needs_proc
def test_a_peak_counts_only_memory_used_after_the_reset():
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


def test_rows_say_what_was_not_run_or_not_computed():
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
def test_the_json_has_the_printed_numbers(tmp_path, monkeypatch, capsys):
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


def test_curves_end_at_the_first_limit(fakes, tmp_path, monkeypatch):
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
    with Image.open(tmp_path / "scaling-dnc.png") as image:
        picture = np.asarray(image.convert("RGB"))
    for color in LINES[:2]:  # our lines are in both plots
        color = np.round(np.multiply(to_rgb(color), 255))
        columns = np.all(picture == color, axis=2).any(axis=0)
        half = len(columns) // 2
        assert columns[:half].any() and columns[half:].any()


def test_curves_are_drawn_from_the_json_alone(tmp_path):
    text = (ROOT / "benchmarks/scaling.json").read_text()
    path = tmp_path / "scaling.json"
    path.write_text(text)
    command_line.main(["scaling", "--draw", str(path)])
    pictures = {"scaling-ntm.png", "scaling-dnc.png"}
    assert {one.name for one in tmp_path.iterdir()} == {path.name, *pictures}
    results = json.loads(text)["results"]
    units = {"ms": "milliseconds", "MB": "megabytes"}
    drawn = {
        (kind, ax.get_xlabel(), line.get_label(), units[ax.get_ylabel()], x): y
        for kind in ("ntm", "dnc")
        for ax in scaling.figure_of(kind, results).axes
        for line in ax.lines
        for x, y in zip(*line.get_data())
        if not math.isnan(y)
    }
    parts = "layer", "axis", "variant"
    assert drawn == {
        (*map(one.get, parts), quantity, one["value"]): one[quantity]
        for one in results
        for quantity in scaling.QUANTITIES
        if quantity in one
    }


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
        ("scaling --draw /nowhere.json", "/nowhere.json is not there"),
        ("retrieval --cases 3K", "invalid choice: '3K'"),
        ("retrieval --data some", "invalid choice: 'some'"),
        ("retrieval --threads 0", "at least 1, not 0"),
        ("retrieval --json /nowhere/x.json", "the folder of /nowhere/x.json"),
        ("esm --rounds 0", "at least 1, not 0"),
        ("esm --ivy /nowhere", "/nowhere has not the folders"),
        ("sam --cases all", "invalid choice: 'all'"),
        ("sam --pytorch-dnc /nowhere", "/nowhere is no checkout"),
        ("sam --draw /nowhere.json", "/nowhere.json is not there"),
        ("sam --seconds 0", "above 0, not 0"),
    ],
)
def test_wrong_options_are_refused_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.main(arguments.split())
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


# Memory Wrap.


@pytest.mark.parametrize("options", [{}, {"jit_compile": False}, {"top_k": 2}])
@pytest.mark.parametrize("kind", ["train", "answer"])
def test_steps_of_memory_wrap_train_or_answer(kind, options):
    harness.skip_on(*harness.OTHERS, because="the benchmarks use TensorFlow")
    step = memory_wrap.ours(kind, 5, 7, **options)
    first, second = step(), step()
    assert np.isfinite(first).all()
    if kind == "train":
        assert second < first
    else:
        np.testing.assert_array_equal(first, second)


def test_the_reference_of_memory_wrap_trains_and_answers():
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


def test_memory_wrap_has_a_job_for_every_variant(monkeypatch):
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


# Sparse Access Memory.


@pytest.fixture
def small_sam(monkeypatch):
    monkeypatch.setattr(sam, "ROW", {**sam.ROW, **TINY, "top_k": 2})


@harness.needs_tensorflow
@pytest.mark.parametrize(
    "layer",
    ["SAM", pytest.param("SDNC", marks=pytest.mark.slow), "NTM", "DNC"],
)
def test_steps_next_to_sam_train(layer, small_sam):
    tf = pytest.importorskip("tensorflow")
    tf.config.run_functions_eagerly(True)  # without XLA
    try:
        losses = {}
        for train in (True, False):
            row = {**sam.ROW, "layer": layer, "train": train}
            if layer == "SDNC":
                row["arguments"] = {"sparse_links": 2}
            step = sam.ours(row)
            losses[train] = [step() for _ in range(3)]
    finally:
        tf.config.run_functions_eagerly(False)
    assert np.isfinite([*losses.values()]).all()
    assert len(set(losses[True])) == 3
    assert len(set(losses[False])) == 1


def test_sam_has_a_job_for_every_row(monkeypatch):
    def jobs(checkout):
        return [
            (variant, sam.job({**sam.ROW, **row}, 1, checkout))
            for _, groups in sam.CASES.values()
            for group in groups
            for variant, row in group.items()
        ]

    monkeypatch.setattr(references, "installed", lambda name: True)
    assert all(callable(job[1]) for _, job in jobs("folder"))
    is_text = {name: isinstance(job, str) for name, job in jobs(None)}
    needy = [name for name, text in is_text.items() if text]
    assert needy == [sam.REFERENCE, sam.LINKED]
    monkeypatch.setattr(references, "installed", lambda name: name != "faiss")
    texts = {job for _, job in jobs(None) if isinstance(job, str)}
    assert texts == {
        'needs `pip install -e ".[bench]"` and `--pytorch-dnc` with a checkout'
    }


@pytest.fixture
def fake_sam(fakes, monkeypatch):
    """Steps of SAM take 2 ms, of others a share of their slots."""

    def job(row, threads, checkout):
        if row["layer"] == sam.REFERENCE:
            return "needs a checkout"
        slots = 0 if row["layer"] == "SAM" else row["slots"]
        return row["layer"], 2.0 + slots / 2**10

    monkeypatch.setattr(sam, "job", job)


def test_a_variant_of_sam_ends_at_its_limit(fake_sam, tmp_path, capsys):
    path = tmp_path / "all.json"
    arguments = "sam --rounds 2 --cases memories --json"
    command_line.main([*arguments.split(), str(path)])
    header, _, *rows = lists_of(capsys.readouterr().out)
    assert header == list(sam.header("SAM"))
    assert rows[1][:5] == ["NTM", "1,024", "40", "3", "1.5 (1.5 to 1.5)"]
    assert rows[2][0] == sam.REFERENCE
    assert rows[2][3] == "not run: needs a checkout"
    assert rows[3][:5] == ["SAM", "1,024", "40", "2", ""]
    reached = {
        layer: [row[1] for row in rows if row[0] == layer]
        for layer in (sam.REFERENCE, "SAM", "NTM", "DNC")
    }
    slots = [f"{n:,}" for n in sam.SLOTS.values()]
    assert (
        reached
        == {
            sam.REFERENCE: slots[:1],
            "SAM": slots,
            "NTM": slots[:6],  # the last one is over the limit
            "DNC": slots[:6],
        }
    )
    assert rows[-4][1:4] == ["262,144", "40", "not run: over 120 s"]
    records = json.loads(path.read_text())["results"]
    assert len(records) == len(rows)
    assert records[1]["ratio_quartiles"] == [1.5] * 3


def test_the_dense_memory_is_extrapolated(fake_sam, tmp_path, capsys):
    path = tmp_path / "all.json"
    arguments = "sam --rounds 2 --cases published --json"
    command_line.main([*arguments.split(), str(path)])
    *_, last = lists_of(capsys.readouterr().out)
    # 66 ms for 2**16 slots; 2**17 are over the limit.
    assert last[0] == "NTM, extrapolated from N = 65,536"
    assert last[1:5] == ["1,048,576", "10", "1,056", "528 (528 to 528)"]
    records = json.loads(path.read_text())["results"]
    assert [one["slots"] for one in records if one["layer"] == "NTM"] == [
        2**14,
        2**16,
        2**17,
        2**20,
    ]
    last = {**records[2], "slots": 2**20}
    assert sam.extrapolated([*records[:2], last]) == []


def test_curves_of_sam_are_drawn_from_the_json_alone(tmp_path):
    path = tmp_path / "sam.json"
    path.write_text((ROOT / "benchmarks/sam.json").read_text())
    command_line.main(["sam", "--draw", str(path)])
    assert {one.name for one in tmp_path.iterdir()} == {
        "sam.json",
        "scaling-sam.png",
    }
    with Image.open(tmp_path / "scaling-sam.png") as image:
        picture = np.asarray(image.convert("RGB"))
    for color in LINES[:4]:
        color = np.round(np.multiply(to_rgb(color), 255))
        columns = np.all(picture == color, axis=2).any(axis=0)
        half = len(columns) // 2
        assert columns[:half].any() and columns[half:].any()


def test_ticks_are_short():
    values = 20, 1000, 4096, 2**14, 2**22, 10_001
    ticks = ["20", "1,000", "4K", "16K", "4M", "10,001"]
    assert list(map(scaling._tick, values)) == ticks


def test_an_exact_index_finds_the_nearest_slots():
    pytest.importorskip("faiss")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    memory, keys = (
        rng.normal(size=shape).astype("float32") for shape in ((11, 3), (2, 3))
    )
    index = references.ExactIndex(cell_size=3, K=5, probes=7)
    index.add(torch.from_numpy(memory[::-1].copy()))
    index.reset()
    index.add(torch.from_numpy(memory).requires_grad_(), last=7)
    distances, positions = index.search(torch.from_numpy(keys))
    expected = ((memory[:7] - keys[:, None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(positions, expected.argsort()[:, :5])
    np.testing.assert_allclose(
        distances, np.sort(expected)[:, :5], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "sdnc"])
def test_the_reference_of_sam_trains(kind):
    checkout = os.environ.get("PYTORCH_DNC")
    if not checkout:
        pytest.skip("PYTORCH_DNC names no checkout of pytorch-dnc")
    row = {**sam.ROW, **TINY, "top_k": 2, "slots": 50}
    prepare, make = references.job(kind, row, 1, checkout)
    worker = measure.Worker(prepare, make)
    assert worker.step()[0] > 0
    worker.end()


# Egospheric Spatial Memory.


@pytest.mark.parametrize("variant", esm.VARIANTS)
def test_steps_of_esm_are_finite(variant, monkeypatch):
    harness.skip_on(*harness.OTHERS, because="the benchmarks use TensorFlow")
    monkeypatch.setattr(esm, "SIZE", 4)
    monkeypatch.setattr(esm, "SMALL", (6, 8))
    monkeypatch.setattr(esm, "LARGE", (8, 12))
    step = esm.ours(*esm.VARIANTS[variant])
    for _ in range(2):
        assert all(np.isfinite(part).all() for part in step()[:1])


def test_esm_prints_a_table(fakes, monkeypatch, tmp_path, capsys):
    times = {"ivy_memory": 60.0, "a frame, XLA": 2.0, "smoothing, XLA": "none"}
    found = {
        name: time if time == "none" else (name, time)
        for name, time in times.items()
    }
    monkeypatch.setattr(esm, "jobs", lambda threads, ivy: found)
    path = tmp_path / "all.json"
    command_line.main(["esm", "--rounds", "2", "--json", str(path)])
    header, _, *rows = lists_of(capsys.readouterr().out)
    assert tuple(header) == esm.HEADER
    assert rows[1] == ["a frame, XLA", "2", "30 (30 to 30)", "20 ms"]
    assert rows[2][1] == "not run: none"
    assert set(json.loads(path.read_text())["results"]) == set(times)


def test_esm_has_a_job_for_every_variant():
    jobs = esm.jobs(2, None)
    assert "needs `--ivy`" in jobs["ivy_memory"]
    assert set(jobs) == {"ivy_memory", *esm.VARIANTS}
    assert callable(esm.jobs(2, "there")["ivy_memory"][1])


# Retrieval.


def test_a_step_may_be_prepared_and_report():
    make = functools.partial(mock.Mock, **{"tell.return_value": {"x": 3}})
    worker = measure.Worker(int, make, rounds=2)

    def state():
        path = pathlib.Path(f"/proc/{worker.process.pid}/stat")
        return path.read_text().rsplit(")")[1].split()[0]

    try:
        assert worker.result["told"] == {"x": 3}
        if measure.memory():  # halted except in its turn
            deadline = time.monotonic() + 10
            while state() != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state() == "T"
        assert len(worker.step()) == 2
        assert worker.tell() == {"x": 3}
    finally:
        worker.end()


def test_preparation_of_a_step_is_not_timed():
    step = mock.Mock()
    step.before = functools.partial(time.sleep, 0.2)
    assert measure.timed(step)[0] < 100 and step.call_count == 1


class InProcess:
    """A worker without a process, which runs real steps."""

    def __init__(self, prepare, make, rounds, others, **limits):
        self.made, self.alive = make(), True
        self.alone = [self.step() for _ in range(rounds)]
        self.result = {"first_step_seconds": 0.5, "megabytes": 7.0}
        if hasattr(self.made, "tell"):
            self.result["told"] = self.made.tell()

    def step(self):
        return measure.timed(self.made)

    def tell(self):
        return self.made.tell()

    def end(self):
        self.alive = False


class Pool:
    """A process pool that runs all in this process, where sizes are tiny."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, do, *given):
        return mock.Mock(**{"result.return_value": do(*given)})


def shrink(monkeypatch):
    """Makes the benchmark of retrieval tiny, and runs it in this process."""
    harness.skip_on(*harness.OTHERS, because="the benchmarks use TensorFlow")
    monkeypatch.setattr(measure, "Worker", InProcess)
    monkeypatch.setattr(measure, "forget_peak", int)  # takes a second here
    monkeypatch.setattr(measure, "alone", lambda do, *given: do(*given))
    for module, sizes in (
        (neighbours, {"CLUSTERS": 13}),
        (retrieval, {"HEADS": 3, "QUERIES": 5, "TOP_K": 7, "ADDED": 11}),
        (retrieval, {"SAMPLE": 17}),
        (static_store, {"SIZE": 2003, "QUERIES": 47, "BATCH": 20, "FEW": 7}),
        (static_store, {"SAMPLE": 23, "REPEATS": 1, "FACTORS": (2, 64)}),
        (key_drift, {"ENTRIES": 880, "STEPS": 40, "ADDED": 22, "EVERY": 20}),
        (key_drift, {"SEARCHED": 32, "QUERIES": 19, "TOP_K": 7, "BATCH": 16}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    for name in ("use_cores", "prepare"):
        monkeypatch.setattr(neighbours, name, lambda threads: None)
    monkeypatch.setattr(key_drift.futures, "ProcessPoolExecutor", Pool)
    prepared = dict.fromkeys(static_store.PREPARED, lambda threads: None)
    monkeypatch.setattr(static_store, "PREPARED", prepared)
    build = scann_row.ScannRow._build
    monkeypatch.setattr(scann_row.ScannRow, "_build", build)


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def trees(monkeypatch):
    """Makes ScaNN build trees of some hundred entries."""
    pytest.importorskip("scann")
    monkeypatch.setattr(tuning, "FLAT", 300)
    monkeypatch.setattr(tuning, "WORTH", 10.0)
    monkeypatch.setattr(tuning, "WORN", math.inf)
    monkeypatch.setattr(tuning, "REBUILT", 0.25)


def test_recall_counts_the_neighbours_found():
    keys = np.array([[3.0], [1.0], [4.0], [2.0]], "float32")
    numbers = np.array([13, 11, 14, 12])
    queries = np.ones((5, 1), "float32")
    least = neighbours.least_right(queries, keys, 2)
    assert least.tolist() == [3.0] * 5

    def recall(*found):
        found = np.array([found] * 5)
        return neighbours.recall(queries, keys, numbers, found, least)

    assert recall(13, 14) == recall(14, 13) == 1.0
    assert recall(14, 14) == recall(14, 11) == recall(14, -1) == 0.5
    assert recall(14, 99) == recall(14, 0) == 0.5
    assert recall(11, 12) == 0.0
    keys[3] = 3.0  # equally near as another
    assert recall(14, 12) == 1.0


def test_data_of_one_seed_is_equal():
    for kind in neighbours.KINDS:
        one, other = (neighbours.Data(kind, 3).draw(2, 5) for _ in range(2))
        assert one.shape == (2, 5, neighbours.DIM) and one.dtype == "float32"
        np.testing.assert_array_equal(one, other)
        assert np.abs(one - neighbours.Data(kind, 4).draw(2, 5)).max() > 0
    vectors, clusters = neighbours.Data("clustered", 3).draw_with_clusters(500)
    centers = neighbours.Data("clustered", 5).centers
    np.testing.assert_allclose(np.std(vectors - centers[clusters]), 0.5, 0.05)


def take(step, rounds=2):
    """Runs rounds of two steps each, then returns the step's `tell()`."""
    for _ in range(2 * rounds):
        measure.timed(step)
    return step.tell()


@pytest.mark.parametrize("kind", neighbours.KINDS)
def test_graph_and_host_memory_steps_find_all_neighbours(tiny, kind):
    made = [
        retrieval.OfRingMemory(101, kind, jit_compile=False),
        retrieval.OfKNNMemory(101, kind, "exact"),
    ]
    for step in made:
        told = take(step)
        assert told["recall"] == 1.0
        assert told["search_ms"] > 0 and told["add_ms"] > 0
        keys, values = step.held(1)
        assert keys.shape == values.shape == (101, neighbours.DIM)
        # The memory ends with the entries of four steps.
        assert max(values[:, 0]) == 101 + 4 * retrieval.ADDED - 1
    np.testing.assert_array_equal(*(step.queries for step in made))


@pytest.mark.scann
def test_steps_rebuild_trees_and_report_recall(tiny, trees):
    step = retrieval.OfKNNMemory(1000, "clustered", "approximate")
    assert step.trees.tell()["trees_built"] == 2
    assert step.number > 1000  # halfway to the next tree
    step.memory.wait()
    told = take(step, rounds=12)
    step.memory.wait()
    measure.timed(step)  # a busy row starts its tree now
    step.memory.wait()
    assert told["recall"] > 0.5
    assert len(told["leaves"]) == 2 and told["leaves"][0][0]
    built = told["trees_built"] + step.trees.tell()["trees_built"]
    assert built == 2


@pytest.mark.parametrize(
    "processes", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_the_reference_of_retrieval_is_restored(tiny, tmp_path, processes):
    if not retrieval.has_reference():
        pytest.skip("memorizing-transformers-pytorch is absent")
    step = retrieval.Reference(300, "clustered", tmp_path / "db", processes)
    told = take(step)
    assert 0.5 < told["recall"] <= 1.0
    for _ in range(2):
        step.before()
        assert step.memory.db_offsets.tolist() == [300, 300]
        assert [knn.index.ntotal for knn in step.memory.knns] == [300, 300]
        assert [len(knn.ids) for knn in step.memory.knns] == [300, 300]
        assert step.memory.n_jobs == step.jobs
        assert sorted(step.held(0)[1][:, 0]) == list(range(300))
        step()
        assert step.memory.knns[1].index.ntotal == 311


def test_retrieval_has_a_job_for_every_variant(monkeypatch):
    monkeypatch.setattr(references, "installed", lambda name: name != "faiss")
    jobs = retrieval.jobs(2048, "clustered", 2, "folder")
    assert all("pip install" in jobs[name] for name in retrieval.REFERENCES)
    assert len(jobs) == 6 and callable(jobs["RingMemory, XLA"][1])
    monkeypatch.setattr(references, "installed", lambda name: name != "scann")
    jobs = retrieval.jobs(1 << 18, "clustered", 2, "folder")
    assert len(jobs) == 4  # a graph does not compare all entries
    assert "retrieval" in jobs['KNNMemory, search_method="approximate"']
    assert callable(jobs["reference, one process"][1])


class Telling(Fake):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.result["told"] = self.told(1.0)

    def told(self, recall):
        told = {"recall": recall, "search_ms": 1.5, "add_ms": 0.25}
        return {**told, "trees_built": 3}

    def tell(self):
        return self.told(0.9)


def test_retrieval_prints_a_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "Worker", Telling)
    one, other = retrieval.REFERENCES
    times = {one: 6.0, other: 4.0, "ours": 2.0}
    monkeypatch.setattr(
        retrieval,
        "jobs",
        lambda size, kind, threads, folder: {
            **{name: (name, time) for name, time in times.items()},
            "absent": "no such package",
        },
    )
    path = tmp_path / "all.json"
    arguments = "retrieval --rounds 2 --data clustered --cases 64K --json"
    command_line.main([*arguments.split(), str(path)])
    header, _, *rows = lists_of(capsys.readouterr().out)
    assert tuple(header) == retrieval.HEADER
    assert [row[2] for row in rows] == [one, f"{other} (*)", "ours", "absent"]
    text = "2 | 1.5 | 0.25 | 1.000, 0.900 | 0.95 | 2 (2 to 2) | 3 | 3"
    assert rows[2][3:] == text.split(" | ")
    assert rows[3][3] == "not run: no such package"
    results = json.loads(path.read_text())["dynamic"]
    assert results[2]["ratios"] == {one: [3.0] * 3, other: [2.0] * 3}
    assert results[2]["faster_reference"] == other


def test_without_the_reference_there_are_no_ratios(monkeypatch):
    monkeypatch.setattr(measure, "Worker", Telling)
    jobs = {**dict.fromkeys(retrieval.REFERENCES, "absent"), "ours": ("o", 2.0)}
    monkeypatch.setattr(retrieval, "jobs", lambda *arguments: jobs)
    results = retrieval.measured("2K", "clustered", 1, 2)
    assert retrieval.rows_of("2K", "clustered", results)[2][8] == ""


def test_bisection_finds_the_smallest_sufficient_parameter():
    shares = np.linspace(0.5, 1.0, 101)
    points = static_store.bisected(shares, lambda share: {"recall": share})
    recalls = [point["recall"] for point in points]
    assert recalls == sorted(recalls) and len(recalls) < 20
    for target in static_store.TARGETS:
        assert min(s for s in recalls if s >= target) == min(
            s for s in shares if s >= target
        )
    assert static_store.bisected([0.5], lambda s: {"recall": s})


def test_a_static_store_is_compared_with_faiss(
    tiny, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("faiss")
    grid = {"IVF11,Flat": "nprobe", "IVF7,PQ32x4fs,RFlat": "nprobe"}
    monkeypatch.setattr(static_store, "GRID", {**grid, "HNSW4": "efSearch"})
    path = tmp_path / "all.json"
    arguments = "retrieval --cases static --data unclustered --rounds 1 "
    arguments += "--threads 1"
    command_line.main([*arguments.split(), "--json", str(path)])
    found = json.loads(path.read_text())["static"]["unclustered"]
    assert list(found["grid"]) == list(static_store.GRID)
    flat = found["grid"]["IVF11,Flat"]
    assert flat["best"]["0.95"]["recall"] >= 0.95
    assert flat["best"]["0.99"]["parameters"] == {"nprobe": 11}
    assert len(found["results"]) == 5
    by_kind = {(r["kind"], r["asked_for"]): r for r in found["results"]}
    exact = by_kind["exact", 1.0]
    assert exact["recall"] == 1.0 and exact["queries"] == 20
    if tuning.import_error() is None:
        ours = by_kind["ours", 0.95]
        assert ours["recall"] == 1.0 and ours["queries"] == 47
        assert len(ours["times_faiss"]) == len(ours["times_exact"]) == 3
        rate, other = (r["queries_per_second"] for r in (ours, exact))
        np.testing.assert_allclose(ours["times_exact"][1], rate / other)
    first, last = capsys.readouterr().out.split("\n\n")[:2]
    assert len(lists_of(first)) == 2 + 2 * 3
    assert len(lists_of(last)) == 2 + 5


def test_a_static_store_without_faiss_is_compared_with_numpy(
    tiny, monkeypatch, capsys
):
    monkeypatch.setattr(references, "installed", lambda name: False)
    found = static_store.run("clustered", 1, 2, quick=True)
    by_kind = {(r["kind"], r["asked_for"]): r for r in found["results"]}
    assert by_kind["exact", 1.0]["name"] == "NumPy"
    assert by_kind["exact", 1.0]["recall"] == 1.0
    assert "not_run" in by_kind["faiss", 0.95]
    assert "not run" in capsys.readouterr().out


def test_failures_in_a_process_of_their_own_are_reported():
    with_bar = functools.partial(math.sqrt, -1)
    told = measure.alone(with_bar)
    assert told == {"not_run": "ValueError: math domain error"}


@pytest.mark.scann
def test_rebuild_rules_are_compared_on_drifting_keys(
    tiny, trees, monkeypatch, capsys
):
    rules = {
        name: {"REBUILT": share, **key_drift.UNTRIED}
        for name, share in (("never", math.inf), ("25 %", 0.25), ("all", 1.0))
    }
    monkeypatch.setattr(key_drift, "RULES", rules)
    rule = tuning.REBUILT

    numbers = key_drift.run(2)
    assert tuning.REBUILT == rule
    found = numbers["rules"]
    # 22 of 880 at each of 40 steps.
    assert [one["trees_built"] for one in found.values()] == [0, 4, 1]
    for one in found.values():
        assert one["steps"] == [1, 20, 40]
        assert all(0 < recall <= 1 for recall in one["recalls"])
        assert one["leaves"][0][0]
    assert len(numbers["losses"]) == 40 and numbers["moved"] > 0
    first, last = capsys.readouterr().out.split("\n\n")[:2]
    assert len(lists_of(first)) == 2 + 3
    assert lists_of(last)[0] == ["step", *rules]


# Interrupted runs.


@pytest.fixture
def cut_off(monkeypatch):
    """Workers that are interrupted during the turns of the second case, and
    jobs for each command: (name, milliseconds)."""
    turns = []

    class Interrupted(Telling):
        def step(self):
            turns.append(self.name)
            if len(turns) > 4:  # two variants, two rounds
                raise KeyboardInterrupt
            return self.times

    monkeypatch.setattr(measure, "Worker", Interrupted)
    one, other = ("one", 6.0), ("other", 2.0)
    first = next(iter(retrieval.REFERENCES))
    monkeypatch.setattr(
        cases,
        "jobs",
        lambda kind, *rest: {references.NAMES[kind]: one, "fast loop": other},
    )
    monkeypatch.setattr(
        memory_wrap,
        "jobs",
        lambda *rest: {("memorywrap", 1): one, ("XLA", 1): other},
    )
    monkeypatch.setattr(
        retrieval,
        "jobs",
        lambda *rest: {
            **dict.fromkeys(retrieval.REFERENCES, "absent"),
            first: one,
            "ours": other,
        },
    )
    monkeypatch.setattr(esm, "jobs", lambda *rest: {"ivy_memory": one})
    monkeypatch.setattr(report, "machine", lambda *rest: {})


@pytest.mark.parametrize(
    "arguments, name, part, printed",
    [
        ("--cases ntm-1 dnc-1 --threads 1 --json", "all.json", "results", 2),
        (
            "memory_wrap --threads 1 --cases CASES --json",
            "all.json",
            "results",
            2,
        ),
        (
            "retrieval --data clustered --cases 2K 16K --json",
            "all.json",
            "dynamic",
            3,
        ),
        ("scaling --cases dnc --axes N --out", "scaling.json", "results", 1),
    ],
    ids=["steps", "memory_wrap", "retrieval", "scaling"],
)
def test_an_interrupted_run_keeps_its_results(
    arguments, name, part, printed, cut_off, tmp_path, capsys
):
    arguments = arguments.split()
    if "CASES" in arguments:
        at = arguments.index("CASES")
        arguments[at : at + 1] = list(memory_wrap.CASES)[:2]
    path = tmp_path / name
    target = path if arguments[-1] == "--json" else tmp_path
    with pytest.raises(KeyboardInterrupt):
        command_line.main([*arguments, str(target), "--rounds", "2"])
    results = json.loads(path.read_text())[part]
    ran = [one for one in results if "not_run" not in one]
    assert [one["in_turn"] for one in ran] == [True, True, False, False]
    assert all(one["milliseconds"] > 0 for one in ran)
    rows = [
        line for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert len(rows) == 2 + printed
    if name == "scaling.json":
        assert len(lists_of((tmp_path / "scaling.md").read_text())) == 2 + 1


def test_an_interrupted_run_of_esm_keeps_its_results(
    cut_off, monkeypatch, tmp_path
):
    path = tmp_path / "all.json"
    with pytest.raises(KeyboardInterrupt):
        command_line.main(["esm", "--rounds", "9", "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"].values()
    assert not result["in_turn"] and result["milliseconds"] == 6.0


def test_an_interrupted_run_of_a_static_store_keeps_its_results(
    monkeypatch, tmp_path, capsys
):
    done = []

    def alone(function, folder, name, threads):
        done.append(name)
        if name == "NumPy":
            raise KeyboardInterrupt
        return {"not_run": f"{name}, as a test"}

    monkeypatch.setattr(measure, "alone", alone)
    monkeypatch.setattr(references, "installed", lambda name: True)
    monkeypatch.setattr(report, "machine", lambda *rest: {})
    path = tmp_path / "all.json"
    arguments = "retrieval --cases static --data clustered --quick --json"
    with pytest.raises(KeyboardInterrupt):
        command_line.main([*arguments.split(), str(path)])
    found = json.loads(path.read_text())["static"]["clustered"]
    assert list(found["grid"]) == list(static_store.QUICK)
    assert list(found["exact"]) == ["faiss"]
    assert len(lists_of(capsys.readouterr().out)) == 2 + 2 * len(
        static_store.QUICK
    )


def test_a_failed_write_keeps_the_old_json(tmp_path):
    path = tmp_path / "all.json"
    report.write_json(path, {"one": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"one": object()})
    assert json.loads(path.read_text()) == {"one": 1}
