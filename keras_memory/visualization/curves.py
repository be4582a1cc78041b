"""Draws learning curves of runs, and other curves."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from keras_memory.checks import check_bool
from keras_memory.checks import is_number
from keras_memory.hints import Array
from keras_memory.visualization.images import HUGE
from keras_memory.visualization.images import LINES
from keras_memory.visualization.images import WIDTH
from keras_memory.visualization.images import Drawn
from keras_memory.visualization.images import Figure
from keras_memory.visualization.images import check_axes
from keras_memory.visualization.images import check_dict
from keras_memory.visualization.images import check_list
from keras_memory.visualization.images import numbers
from keras_memory.visualization.images import require
from keras_memory.visualization.images import write_labels

STYLES = "-", "--", "-.", ":"
LOG = " on a logarithmic scale"
COUNTS = "epoch", "step", "sequences", "longest", "seconds", "learning_rate"


def plot_curves(
    series: Mapping[Any, Sequence[Array]],
    ax: Axes | Iterable[Axes] | None = None,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
    goal: float | None = None,
) -> Drawn:
    """Draws lines; several runs are drawn as their mean and min-max band.

    Args:
        series: dict from label to (x, y), at most 8: x (P,) increases; y is
            (P,) or, for several runs, (S, P). NaN and infinities leave gaps.
        ax: axes; None for a new figure.
        title, x_label, y_label: str.
        log_x: bool, whether x has a logarithmic scale.
        log_y: bool, whether y has one. If a value is zero, it is symlog with
            zero at the bottom.
        marks: dict from a text to the x of a vertical line with this text.
        goal: number, y of a horizontal line; None for none.
    """
    series = check_dict("series", series, "pairs of x and y")
    marks = check_dict("marks", {} if marks is None else marks, "numbers")
    check_bool("log_x", log_x)
    check_bool("log_y", log_y)
    wanted, count = f"be 1 to {len(LINES)} lines", len(series)
    require(0 < count <= len(LINES), "series", wanted, f"{count} lines")
    for text, at in marks.items():
        _check_line(f"marks[{text!r}]", at, log_x, 5e-324)
    if goal is not None:
        _check_line("goal", goal, log_y)
    if ax is None:
        ax = Figure((WIDTH, 3.6), layout="constrained").subplots()
    (ax,) = check_axes(ax)
    shown = [[] if goal is None else [goal]]
    for index, (label, pair) in enumerate(series.items()):
        name, sizes = f"series[{label!r}]", {}
        x, y = check_list(name, pair, 2)
        x = _increasing(name, x, sizes, log_x)
        y = numbers(name, y, ("S?", "P"), sizes)
        is_right = not log_y or not (y < 0).any()
        require(is_right, name, f"have y from zero on{LOG}", y)
        shown.append(y[~np.isnan(y)])
        color = LINES[index]
        if len(y) > 1:
            ends = y.min(axis=0), y.max(axis=0)
            ax.fill_between(x, *ends, color=color, alpha=0.2, lw=0)
            ax.plot(x, y.T, color=color, lw=0.6, alpha=0.6)
        style = STYLES[index % len(STYLES)] + "o" * (len(x) <= 20)
        mean = y.mean(axis=0)
        ax.plot(x, mean, style, color=color, lw=2, ms=4, label=label)
    if log_x:
        ax.set_xscale("log")
    if goal is not None:
        ax.axhline(goal, color="0.3", lw=1, ls="--", label=f"goal: {goal:g}")
    shown = np.concatenate(shown)
    ax.margins(y=0.08)
    if log_y and np.all(shown > 0):
        ax.set_yscale("log")
    elif log_y:
        least = shown[shown > 0].min(initial=HUGE)
        least = 1.0 if least == HUGE else 10.0 ** np.floor(np.log10(least))
        ax.set_yscale("symlog", linthresh=least, linscale=0.5)
        ax.set_ylim(bottom=0.0)
    else:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    for text, x in marks.items():
        ax.axvline(x, color="0.4", lw=1, ls=":")
        at = {"x": x, "y": 0.04, "transform": ax.get_xaxis_transform()}
        if not log_y:  # low values would be under the text
            at |= {"y": 0.96, "va": "top"}
        at |= {"ha": "right", "rotation": 90}  # so close texts do not overlap
        ax.text(s=f" {text}", **at, fontsize=9, color="0.3")
    write_labels(ax, title, x_label, y_label)
    ax.tick_params(labelsize=9)
    ax.grid(color="0.92")
    if len(ax.get_legend_handles_labels()[0]) > 1 or len(y) > 1:
        ax.legend(fontsize=9, framealpha=0.7)
    return ax.figure


def plot_learning(
    runs: Mapping[Any, Any],
    names: Sequence[str] | None = None,
    x: str | None = None,
    goals: Mapping[str, float] | None = None,
    title: str = "",
    x_label: str | None = None,
) -> Figure:
    """Draws learning curves: one plot for the loss and one for each error.

    Runs with one label, such as seeds, are drawn as their mean and min-max
    band; a run that ends early keeps its last value. Vertical lines mark where
    the curriculum's `longest` reaches a new maximum.

    Args:
        runs: dict from label to a run or a list of runs. A run is the result
            of `fit`, its `history`, or a list of dicts of numbers, some of
            which may be missing. A shorter "val_" column is drawn at every
            n-th epoch, as from `fit(validation_freq=n)`; if its length does
            not determine n, it is left out.
        names: names of the numbers to draw; None for all but counts, such as
            "step".
        x: name of the horizontal axis; None for "step", or else epochs.
        goals: dict from a name to the number to reach.
        title, x_label: str.

    Example:

    >>> runs = {"NTM": [{"loss": [1.0, 0.5]}, {"loss": [0.9, 0.7]}]}
    >>> figure = keras_memory.visualization.plot_learning(runs)
    >>> figure.axes[0].get_xlabel()
    'epoch'
    """
    runs = check_dict("runs", runs, "runs")
    groups = {n: _runs(f"runs[{n!r}]", group) for n, group in runs.items()}
    every = [run for group in groups.values() for run in group if run]
    known = dict.fromkeys(n for run in every for row in run for n in row)
    if x is None:
        x = "step" if all("step" in run[-1] for run in every) else "epoch"
    if names is None:
        names = [name for name in known if name not in COUNTS] or [x]
    names = check_list("names", names)
    missing = [name for name in names if name not in known]
    missing += [x for run in every if not _points(run, x, x).size][:1]
    wanted = "have at least one run, and all of `names` and `x`"
    got = f"{len(every)} runs, without {missing}"
    require(every and not missing, "runs", wanted, got)
    goals = check_dict("goals", {} if goals is None else goals, "numbers")
    for name, goal in goals.items():
        _check_line(f"goals[{name!r}]", goal)
    lengths = [_points(run, x, "longest") for run in every]
    at, longest = max(lengths, key=lambda points: points.size)
    longest = np.fmax.accumulate(longest)
    grown = np.flatnonzero(np.diff(longest) > 0)
    marks = {f"up to {longest[i + 1]:.15g}": at[i] for i in grown}
    figure = Figure((WIDTH, 0.6 + 2.2 * len(names)), layout="constrained")
    axes = np.ravel(figure.subplots(len(names), 1, sharex=True))
    for ax, name in zip(axes, names):
        series, goal = {}, goals.get(name)
        for label, group in groups.items():
            points = [_points(run, x, name) for run in group]
            points = [curve for curve in points if curve.size] or [
                [[1], [np.nan]]
            ]
            for curve in points:
                _increasing(f"runs[{label!r}]", curve[0])
            at = max((x for x, _ in points), key=lambda x: x[-1])
            series[label] = at, [np.interp(at, *p, np.nan) for p in points]
        lines = [goal or 0.0, *(np.ravel(y) for _, y in series.values())]
        positive = not np.any(np.hstack(lines) < 0)
        options = {"log_y": positive, "marks": marks, "goal": goal}
        plot_curves(series, ax, y_label=name.replace("_", " "), **options)
    if x in COUNTS[:4]:
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    write_labels(axes[0], title, "", axes[0].get_ylabel())
    write_labels(axes[-1], axes[-1].get_title(loc="left"), x_label or x, None)
    return figure


def _runs(name, group):
    """Runs of a group, each a list of dicts of numbers."""
    group = getattr(group, "history", group)
    group = _by_epoch(name, group) if isinstance(group, dict) else group
    wanted = "be a result of `fit`, its `history`, or dicts of numbers"
    require(isinstance(group, (list, tuple)), name, wanted, group)
    if not all(isinstance(row, dict) for row in group) or any(
        np.iterable(value) for row in group for value in row.values()
    ):
        return [run for member in group for run in _runs(name, member)]
    return [[{"epoch": epoch, **row} for epoch, row in enumerate(group, 1)]]


def _by_epoch(name, columns):
    """Converts columns to a list of dicts, one for each epoch. Leaves out a
    "val_" column that fits no interval of epochs, or several."""
    columns = {
        column: numbers(f"{name}[{column!r}]", values, ("epochs",))
        for column, values in columns.items()
    }
    rows = [{} for _ in range(max(map(len, columns.values()), default=0))]
    for column, values in columns.items():
        every = [rows[n :: n + 1] for n in range(len(rows))]
        every = [subset for subset in every if len(subset) == len(values)]
        is_right = len(values) == len(rows) or str(column)[:4] == "val_"
        got = f"{column!r}, {len(values)} numbers of {len(rows)} epochs"
        require(is_right, name, "have a number for each epoch", got)
        for row, value in zip(every[0] if len(every) == 1 else [], values):
            row[column] = value
    return rows


def _points(run, x, name):
    """x and y, (2, P), of the rows that have both."""
    pairs = [(row.get(x), row.get(name)) for row in run]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return np.empty((2, 0))
    return numbers(f"runs: {name}", pairs, ("P", 2)).T


def _increasing(name, x, sizes=None, is_log=False):
    """Checks the x of a line; returns it as an array (P,)."""
    x = numbers(name, x, ("P",), sizes)
    wanted = f"have x that increases, from above zero{LOG}"
    least = 0.0 if is_log else -np.inf
    require(np.all(np.diff(x, prepend=least) > 0), name, wanted, x)
    return x


def _check_line(name, at, is_log=False, least=0.0):
    is_right = is_number(at) and not (is_log and at < least)
    word = "from zero on" if least == 0 else "above zero"
    wanted = f"be a finite number{f', {word}{LOG}' * is_log}"
    require(is_right, name, wanted, at)
