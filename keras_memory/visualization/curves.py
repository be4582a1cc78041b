"""Curves: how runs learned, and one number over another."""

import numpy as np

from keras_memory.visualization.images import LINES
from keras_memory.visualization.images import WIDTH
from keras_memory.visualization.images import Figure
from keras_memory.visualization.images import numbers
from keras_memory.visualization.images import write_labels

STYLES = "-", "--", "-.", ":"
COUNTS = "epoch", "step", "sequences", "longest", "seconds", "learning_rate"


def plot_curves(
    series,
    ax=None,
    title="",
    x_label="",
    y_label="",
    log_x=False,
    log_y=False,
    marks=None,
    goal=None,
):
    """Draws lines; of several runs their mean, in a band from the lowest to
    the highest.

    Args:
        series: dict from label to (x, y), at most 8: x (P,) increases; y is
            (P,) or, for several runs, (S, P). NaN is a hole.
        ax: axes; None for a new figure.
        title, x_label, y_label: str.
        log_x, log_y: bool, whether the scale grows by factors. That of y has
            zero at its bottom.
        marks: dict from text to the x of a line.
        goal: number, y of a line; None for none.
    """
    if not 1 <= len(series) <= len(LINES):
        raise ValueError(
            f"`series` must be 1 to {len(LINES)} lines, as many as have "
            f"colors. Received: {len(series)} lines"
        )
    ax = ax or Figure((WIDTH, 3.6), layout="constrained").subplots()
    least = goal or np.inf
    for index, (label, (x, y)) in enumerate(series.items()):
        sizes = {}
        x = numbers(f"{label} x", x, ("P",), sizes)
        y = np.expand_dims(y, 0) if np.ndim(y) == 1 else y
        y = numbers(f"{label} y", y, ("S", "P"), sizes)
        wrong = (log_x and x.min() <= 0) or (log_y and np.nanmin(y) < 0)
        if np.any(np.diff(x) <= 0) or wrong:
            raise ValueError(
                "`series` must have x that increases, and none below zero on "
                f"a scale by factors. Received: {label!r}: x={x}, y={y}"
            )
        least = min([least, *y[y > 0]])
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
    if log_y:
        least = 1.0 if least == np.inf else least
        least = 10.0 ** np.floor(np.log10(least))  # below it is zero
        ax.set_yscale("symlog", linthresh=least, linscale=0.5)
    ax.set_ylim(bottom=0.0 if log_y else min(0.0, ax.get_ylim()[0]))
    for text, x in (marks or {}).items():
        ax.axvline(x, color="0.4", lw=1, ls=":")
        at = {"x": x, "y": 0.04, "transform": ax.get_xaxis_transform()}
        if not log_y:  # low numbers are at the bottom
            at |= {"y": 0.96, "va": "top"}
        at |= {"ha": "right", "rotation": 90}  # close ones do not overlap
        ax.text(s=f" {text}", **at, fontsize=9, color="0.3")
    if goal is not None:
        ax.axhline(goal, color="0.3", lw=1, ls="--", label=f"goal: {goal:g}")
    write_labels(ax, title, x_label, y_label)
    ax.tick_params(labelsize=9)
    ax.grid(color="0.92")
    if len(ax.get_legend_handles_labels()[0]) > 1 or len(y) > 1:
        ax.legend(fontsize=9, framealpha=0.7)
    return ax.figure


def plot_learning(runs, names=None, x=None, goals=None, title="", x_label=None):
    """Draws how runs learned: loss and errors, an axes each. Runs under one
    label, such as seeds, are their mean in a band; one that ended early goes
    on level. Where "longest", the length of a curriculum, grows, a line is
    drawn.

    Args:
        runs: dict from label to a run or a list of runs. A run is what `fit`
            returned, its `history`, or a list of dicts of numbers.
        names: numbers to draw; None for all but counts, such as "step".
        x: the number to the right; None for "step", or else epochs.
        goals: dict from a name to the number to be reached.
        title, x_label: str.

    Example:

    >>> runs = {"NTM": [{"loss": [1.0, 0.5]}, {"loss": [0.9, 0.7]}]}
    >>> figure = keras_memory.visualization.plot_learning(runs)
    >>> figure.axes[0].get_xlabel()
    'epoch'
    """
    groups = {label: _columns(group) for label, group in runs.items()}
    every = [run for group in groups.values() for run in group]
    names = names or [n for run in every[:1] for n in run if n not in COUNTS]
    x = x or ("step" if every and "step" in every[0] else "epoch")
    missing = {n for n in (x, *names) for run in every if n not in run}
    if not names or missing:
        raise ValueError(
            "`runs` must have at least one run, and each all numbers that are "
            f"drawn. Received: {len(every)} runs, without {sorted(missing)}"
        )
    run, marks = max(every, key=lambda run: len(run[x])), {}
    for at in np.flatnonzero(np.diff(run.get("longest", []))):
        marks[f"up to {run['longest'][at + 1]:g}"] = run[x][at]
    figure = Figure((WIDTH, 0.6 + 2.2 * len(names)), layout="constrained")
    axes = np.ravel(figure.subplots(len(names), 1, sharex=True))
    for ax, name in zip(axes, names):
        series = {}
        for label, group in groups.items():
            at = max((run[x] for run in group), key=lambda x: x[-1])
            y = [np.interp(at, run[x], run[name]) for run in group]
            series[label] = at, np.stack(y)
        goal = (goals or {}).get(name)
        positive = all(np.nanmin(y) >= 0 for _, y in series.values())
        options = {"log_y": positive, "marks": marks, "goal": goal}
        plot_curves(series, ax, y_label=name.replace("_", " "), **options)
    write_labels(axes[0], title, "", axes[0].get_ylabel())
    write_labels(axes[-1], axes[-1].get_title(loc="left"), x_label or x, None)
    return figure


def _columns(group):
    """Runs of a group, each a dict of arrays."""
    group = group.history if hasattr(group, "history") else group
    is_rows = isinstance(group, (list, tuple)) and all(
        isinstance(row, dict) and all(np.ndim(v) == 0 for v in row.values())
        for row in group
    )
    if isinstance(group, (list, tuple)) and not is_rows:
        return [run for one in group for run in _columns(one)]
    if is_rows:
        group = {n: [row[n] for row in group] for n in (group or [{}])[0]}
    run = {name: np.asarray(values, float) for name, values in group.items()}
    epochs = np.arange(1, 1 + max(map(len, run.values()), default=0))
    return [{"epoch": epochs, **run}]
