"""Curves over time steps, slots or batch size, with the others as in a base
case."""

import functools
import pathlib
import sys

import numpy as np

from benchmarks import cases
from benchmarks import measure
from benchmarks import references
from benchmarks import report
from keras_memory import visualization

AXES = {  # the varied size, and its values
    "T": ("steps", (20, 50, 100, 200, 500, 1000, 2000)),
    "N": ("slots", (64, 128, 256, 512, 1024, 2048, 4096)),
    "batch": ("batch", (1, 4, 16, 64, 256)),
}
VARIANTS = "fast loop", "portable loop"
QUANTITIES = {  # unit and title
    "milliseconds": ("ms", "time of a training step"),
    "megabytes": ("MB", "memory at the peak of a step"),
}


def run(kinds, axes, rounds, threads, gigabytes, seconds, folder, checkout):
    """Measures, prints tables, and writes tables, numbers and pictures.

    Args:
        kinds: "ntm", "dnc" or both.
        axes: keys of `AXES`.
        rounds: number of measured steps of a point.
        threads: number of threads of each process.
        gigabytes, seconds: limits of a variant at a point; once it exceeds
            one, it is not tried at larger values.
        folder: for scaling.md, scaling.json and scaling-KIND.png.
        checkout: of pytorch-ntm, if there is one.

    Returns:
        All numbers.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"gigabytes": gigabytes, "seconds": seconds}
    numbers = {
        "machine": report.machine(),
        "threads": threads,
        "rounds": rounds,
        "limits": limits,
        "results": [],
    }
    text = []

    def write(kind, axis, value, results, before):
        numbers["results"] = before + [
            {
                "layer": kind,
                "axis": axis,
                "value": value,
                "variant": name,
                **result,
            }
            for name, result in results.items()
        ]
        report.write_json(folder / "scaling.json", numbers)

    for kind in kinds:
        for axis in axes:
            print(f"{described(kind, axis)}\n", flush=True)
            text.append("")
            points, printed = [], None
            for value in AXES[axis][1]:
                seen = functools.partial(
                    write, kind, axis, value, before=numbers["results"]
                )
                given = kind, axis, value, points, rounds, threads, checkout
                results = point(*given, seen=seen, **limits)
                seen(results)
                points.append((value, results))
                printed = printed or report.Table(header(axis, results))
                printed.add([row(value, results)])
                text[-1] = f"{described(kind, axis)}\n\n{table(axis, points)}\n"
                (folder / "scaling.md").write_text("\n".join(text))
            printed.end()
            draw(numbers, folder)
    text.append(
        f"Milliseconds a training step (medians of at most "
        f"{report.counted(rounds, 'step')}, "
        f"{report.counted(threads, 'thread')}) and megabytes at its peak. A "
        f"variant ends at {gigabytes:g} GB or {seconds:g} s a point; larger "
        f"values are not tried (-).\n{report.on(numbers['machine'])}.\n"
    )
    print(text[-1])
    (folder / "scaling.md").write_text("\n".join(text))
    return numbers


def point(kind, axis, value, points, rounds, threads, checkout, **options):
    """Results by variant at a value of an axis. Variants that failed at one of
    the smaller values, `points`, are not tried."""
    print(f"{kind}, {axis} = {value} ...", file=sys.stderr, flush=True)
    sizes = {**cases.BASES[kind], AXES[axis][0]: value}
    jobs = cases.jobs(kind, sizes, threads, checkout, VARIANTS)
    for name in jobs:
        if not isinstance(jobs[name], str) and any(
            "not_run" in results[name] for _, results in points
        ):
            jobs[name] = "-"
    return measure.compare(jobs, rounds, rounds, **options)


def described(kind, axis):
    """Describes the varied and the fixed sizes."""
    sizes = cases.BASES[kind]
    others = [
        f"{name} = {sizes[size]}"
        for name, (size, _) in AXES.items()
        if name != axis
    ]
    missing = references.not_computed(
        kind, None if axis == "T" else sizes["steps"]
    )
    return (
        f"{kind.upper()}, {axis} varied, {', '.join(others)}; "
        f"{references.NAMES[kind]}: {missing}"
    )


def table(axis, points):
    rows = [row(value, results) for value, results in points]
    return report.table(header(axis, points[0][1]), rows)


def header(axis, results):
    return [axis] + [
        f"{name}, {unit}" for unit, _ in QUANTITIES.values() for name in results
    ]


def row(value, results):
    cells = [
        _cell(result, quantity)
        for quantity in QUANTITIES
        for result in results.values()
    ]
    return [f"{value:,}", *cells]


def _cell(result, quantity):
    if "not_run" in result:
        return result["not_run"]
    return report.short(result[quantity])


def draw(numbers, folder):
    """Draws scaling-KIND.png from the numbers of scaling.json, all or some."""
    for kind in dict.fromkeys(one["layer"] for one in numbers["results"]):
        path = pathlib.Path(folder) / f"scaling-{kind}.png"
        figure_of(kind, numbers["results"]).savefig(path)


def figure_of(kind, results):
    """A figure of a layer: a row for each varied axis of `AXES`, a column for
    each of `QUANTITIES`."""
    by_axis = {}
    for result in results:
        if result["layer"] == kind:
            points = by_axis.setdefault(result["axis"], {})
            variants = points.setdefault(result["value"], {})
            variants[result["variant"]] = result
    size = 5.6 * len(QUANTITIES), 3 * len(by_axis)
    figure = visualization.Figure(size, layout="tight")
    grid = figure.subplots(len(by_axis), len(QUANTITIES), squeeze=False)
    for (axis, points), row_of_axes in zip(by_axis.items(), grid):
        panel(kind, axis, list(points.items()), row_of_axes)
    return figure


def panel(kind, axis, points, axes):
    """Draws each quantity into its own axes; the reference, if it ran, is the
    last line."""
    values = [value for value, _ in points]
    reference, *names = points[0][1]
    if any("not_run" not in results[reference] for _, results in points):
        names.append(reference)
    for ax, quantity in zip(axes, QUANTITIES):
        unit, title = QUANTITIES[quantity]
        series = {
            name: (values, [_number(r.get(name), quantity) for _, r in points])
            for name in names
        }
        visualization.plot_curves(
            series,
            ax,
            f"{kind.upper()}: {title}",
            axis,
            unit,
            log_x=True,
            log_y=True,
        )
        ax.set_xticks(values, list(map(_tick, values)))
        ax.set_xticks([], minor=True)


def _tick(value):
    """20, 1,000, 16K, 4M; K and M are powers of 2."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value % size == 0:
            return f"{value // size}{unit}"
    return f"{value:,}"


def _number(result, quantity):
    number = (result or {}).get(quantity)
    return np.nan if number is None else max(number, 0.0)
