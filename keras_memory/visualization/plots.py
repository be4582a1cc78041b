"""Draws a memory and its heads: see `visualization/__init__.py`."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_closed
from keras_memory.checks import check_size
from keras_memory.checks import check_whole
from keras_memory.hints import Array
from keras_memory.recurrent.heads import by_place
from keras_memory.recurrent.heads import head_names
from keras_memory.recurrent.heads import head_weightings
from keras_memory.recurrent.heads import heads_of
from keras_memory.visualization.images import DPI
from keras_memory.visualization.images import SEQUENTIAL
from keras_memory.visualization.images import WIDTH
from keras_memory.visualization.images import WIDTHS
from keras_memory.visualization.images import Animation
from keras_memory.visualization.images import Drawn
from keras_memory.visualization.images import Figure
from keras_memory.visualization.images import check_axes
from keras_memory.visualization.images import check_dict
from keras_memory.visualization.images import check_list
from keras_memory.visualization.images import numbers
from keras_memory.visualization.images import require
from keras_memory.visualization.images import write_labels

DIVERGING = "RdBu_r"  # for signed values
NAN_COLOR, UNSEEN = "#ff00a0", "0.75"
STEPS = 1, 2, 5, 10  # between the ticks of an axis
LEFT, WIDE_LEFT, RIGHT = 0.8, 1.4, 0.7  # inches
TOP, GAP, LABEL = 0.32, 0.3, 0.34


def plot_weighting(
    weighting: Array,
    ax: Axes | Iterable[Axes] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    slots: str | Sequence[int] = "used",
    width: float = WIDTH,
) -> Drawn:
    """Draws the weights of heads on slots over time.

    The scale ends at 1, or at the largest weight if that is below 0.5, as in
    weightings that are spread over many slots; `slots="all"` keeps 1.

    Args:
        weighting: (T, N) or (T, heads, N), in [0, 1]; NaN is magenta.
        ax: axes; a list of them for several heads; None for a new figure.
        names: a title for each head; None for numbers.
        title: str, headline of a new figure, or title of the first `ax`.
        slots: "all"; a list of slots; or "used", the shortest range of slots
            that contains every slot whose weight exceeds a tenth of the
            largest at some step. The range may wrap around the last slot.
        width: inches of a new figure, at least 2.5.
    """
    axes = "T", "heads?", "N"
    weighting = numbers("weighting", weighting, axes, None, True)
    heads = weighting.shape[1]
    if names is None:
        names = [f"head {h}" for h in range(heads)] if heads > 1 else [""]
    names = check_list("names", names, heads)
    rows = _rows(np.fmax.reduce(weighting, (0, 1)), slots)
    panels = [
        _weighting_panel(weighting[:, head], name, rows, slots)
        for head, name in enumerate(names)
    ]
    return _drawn(panels, ax, title, width)


def plot_memory(
    memory: Array,
    ax: Axes | Iterable[Axes] | None = None,
    frames: int = 6,
    title: str = "memory",
    slots: str | Sequence[int] = "used",
    width: float = WIDTH,
) -> Drawn:
    """Draws the memory at a few time steps, side by side.

    All have one scale, which is symmetric about zero.

    Args:
        memory: (T, N, W) contents after each step; any real value. NaN and
            infinities are magenta.
        ax, width: as in `plot_weighting`.
        frames: int, the largest number of time steps to draw, evenly spread
            up to the last.
        title: str, above the axes.
        slots: as in `plot_weighting`; a slot is used if its contents differ
            from those of most slots.
    """
    memory = numbers("memory", memory, ("T", "N", "W"))
    rows = _rows(_use({}, memory), slots)
    return _drawn([_memory_panel(memory, title, rows, frames)], ax, "", width)


def plot_linkage(
    linkage: Array,
    ax: Axes | Iterable[Axes] | None = None,
    frames: int = 4,
    title: str = "links",
    slots: str | Sequence[int] = "used",
    width: float = WIDTH,
) -> Drawn:
    """Draws temporal links at a few time steps, side by side.

    Row i, column j is the degree to which slot i was written right after slot
    j.

    Args:
        linkage: (T, N, N), or (T, heads, N, N) of several write heads, in
            [0, 1], links after each step; NaN is magenta.
        ax, slots: as in `plot_weighting`.
        frames, title, width: as in `plot_memory`.
    """
    axes = "T", "heads?", "N", "N"
    linkage = numbers("linkage", linkage, axes, None, True)
    largest = np.fmax.reduce(linkage, (0, 1))
    rows = _rows(np.fmax.reduce([*largest, *largest.T]), slots)
    steps, several = _moments(len(linkage), frames), linkage.shape[1] > 1
    wide = check_closed("width", width, *WIDTHS) - LEFT - RIGHT
    options = {"x_label": "links after step", "steps": steps.tolist()}
    options |= {"slots": (rows.tolist(), linkage.shape[2])}
    options |= {"high": _high(linkage), "inches": min(2.4, wide / len(steps))}
    panels = []
    for head in range(linkage.shape[1]):
        name = f"{title}{f' {head}' * several}: row written right after column"
        shown = linkage[steps, head][:, rows][:, :, rows]
        panels.append(_Panel(shown, title=name, **options))
    return _drawn(panels, ax, "", width)


def plot_gates(
    gates: Mapping[str, Array],
    ax: Axes | Iterable[Axes] | None = None,
    title: str = "gates",
    width: float = WIDTH,
) -> Drawn:
    """Draws gates and read modes over time, a row each, on the scale 0 to 1.

    Args:
        gates: dict of arrays of one sequence, such as a part of a trace. The
            function draws names that end in "_gate", (T, heads), and
            "read_mode", (T, heads, 2 H + 1): backward for each of H write
            heads, content, forward for each; all in [0, 1], NaN is magenta.
            "read_weighting" and "write_weighting" determine the heads' names.
        ax, title, width: as in `plot_memory`.
    """
    gates = check_dict("gates", gates, "arrays")
    return _drawn([_gates_panel(gates, title)], ax, "", width)


def plot_task(
    trace: Mapping[str, Array],
    inputs: Array | None = None,
    targets: Array | None = None,
    outputs: Array | None = None,
    mask: Array | None = None,
    row: int = 0,
    title: str = "",
    slots: str | Sequence[int] = "used",
    memory: bool = True,
    width: float = WIDTH,
    figure: Figure | None = None,
) -> Figure:
    """Draws one sequence and the memory behind it, one column per time step.

    From top to bottom: inputs, targets, outputs, gates and read modes, the
    weighting of each head, the memory.

    Args:
        trace: dict of (B, T, ...), as `keras_memory.trace` gives it; {} for
            none. Names may start with a place, such as "block0/".
        inputs: (B, T, channels) or None.
        targets: (B, T, units) or None.
        outputs: (B, T, units), not logits; None for "output" of the trace.
        mask: (B, T), zero at steps that do not count, where targets and
            outputs are gray; None if all count.
        row: int, the sequence of the batch to draw.
        title: str, headline.
        slots, width: as in `plot_weighting`; heads and memory share a range.
        memory: bool, whether to draw the memory.
        figure: a figure that this function returned before. It is updated,
            which is faster, if only the numbers and the title differ.

    Example:

    >>> layer = keras_memory.NTMLayer(3, memory_slots=7, slot_size=5)
    >>> x = np.ones((2, 11, 4), "float32")
    >>> trace = keras_memory.trace(layer, x)
    >>> figure = keras_memory.visualization.plot_task(trace, x)
    >>> [ax.get_title(loc="left") for ax in figure.axes][:3]
    ['input', 'output', 'gates']
    """
    trace = check_dict("trace", trace, "arrays")
    check_bool("memory", memory)
    sizes, sequence, gray = {}, {}, None
    shown, own = _shown(trace, row, sizes), outputs is None
    outputs = trace.get("output") if own else outputs
    given = {"inputs": inputs, "targets": targets, "outputs": outputs}
    for name, values in given.items():
        axes = "B", "T", "channels" if name == "inputs" else "units"
        argument = "trace['output']" if name == "outputs" and own else name
        if values is not None:
            sequence[name] = _row(argument, values, axes, sizes, row)
    if mask is not None:
        gray = (_row("mask", mask, ("B", "T"), sizes, row) == 0).tolist()
    panels, memories = _sequence_panels(sequence, gray), []
    for place, here in shown.items():
        prefix = f"{place}: " if place else ""
        if any(map(_is_gate, here)):
            panels.append(_gates_panel(here, f"{prefix}gates", "trace"))
        heads, contents = heads_of(here), here.get("memory")
        if not heads and contents is None:
            continue
        rows = _rows(_use(heads, contents), slots)
        for name, values in heads.items():
            panels.append(_weighting_panel(values, prefix + name, rows, slots))
        if memory and contents is not None:
            memories.append(_memory_panel(contents, f"{prefix}memory", rows))
    panels += memories
    wanted = "have outputs, weightings, gates or a memory, or not be alone"
    require(panels, "trace", wanted, sorted(trace))
    is_figure = figure is None or isinstance(figure, mpl.figure.Figure)
    require(is_figure, "figure", "be of `plot_task`", figure)
    return _drawn(panels, None, title, width, figure)


def plot_sphere(
    mean: Array,
    variance: Array | None = None,
    ax: Axes | Iterable[Axes] | None = None,
    farthest: float | None = None,
    title: str = "map",
    depth_prior: float = 0.01,
    variance_prior: float = 1e4,
) -> Drawn:
    """Draws the map of an egospheric memory.

    The parts are color, depth, and the standard deviation of the depth. Unseen
    and NaN pixels are gray. Smoothing fills some unseen pixels; these have a
    depth and no standard deviation.

    Args:
        mean: (H, W, C), C at least 3: column, row, depth in meters, and
            features, the first three (or one) of which are colors in [0, 1].
        variance: (H, W, C), at least 0, the variance of `mean`; None leaves
            the standard deviation out.
        ax: axes, a list of one for each part; None for a new figure.
        farthest: meters at the end of the scale; None for the largest depth.
        title: str.
        depth_prior: meters, depth of unseen pixels, as in `ESMLayer`.
        variance_prior: square meters, the upper one of the `variance_limits`
            of `ESMLayer`.
    """
    sizes = {}
    mean = numbers("mean", mean, ("H", "W", "C"), sizes)
    wanted = "be a map, of columns, rows and depth"
    require(mean.shape[2] > 2, "mean", wanted, f"shape {mean.shape}")
    depth, parts = mean[:, :, 2], []
    if variance is not None:
        variance = numbers("variance", variance, ("H", "W", "C"), sizes)
        least = np.fmin.reduce(variance, None)
        require(not least < 0, "variance", "be at least 0", least)
    if farthest is not None:
        check_closed("farthest", farthest, 1e-9)
    unseen = np.isclose(depth, check_closed("depth_prior", depth_prior, 0))
    unseen |= np.isnan(mean).any(axis=2)
    if mean.shape[2] > 3:
        shown = mean[:, :, 3 : 6 if mean.shape[2] > 5 else 4].clip(0, 1)
        shown = np.where(unseen[:, :, None], float(UNSEEN), shown)
        parts.append((np.repeat(shown, 3 // shown.shape[2], 2), title, {}))
    depths = np.ma.masked_where(unseen, depth)
    far = farthest or _top(depths.compressed()) or 1.0
    parts.append((depths, "depth, m", {"vmin": 0.0, "vmax": far}))
    if variance is not None:
        limit = 0.99 * check_closed("variance_prior", variance_prior, 0)
        hidden = unseen | ~(variance[:, :, 2] < limit)
        deviations = np.sqrt(np.ma.masked_where(hidden, variance[:, :, 2]))
        low, high = np.percentile([*deviations.compressed()] or [1.0], [1, 99])
        norm = LogNorm(max(low, 1e-9), max(high, 1.1 * low, 2e-9), clip=True)
        name = "standard deviation of depth, m"
        parts.append((deviations, name, {"norm": norm}))
    height, width = depth.shape
    inches = (WIDTH - LEFT - RIGHT) * height / width
    axes = _axes(ax, [(np.clip(inches, 0.4, 6.0), "")] * len(parts))
    cmap = mpl.colormaps[SEQUENTIAL].with_extremes(bad=UNSEEN)
    sides = ["behind", "left", "ahead", "right", "behind"]
    levels = ["up", "level", "down"]
    for panel_ax, (values, name, scale) in zip(axes, parts):
        _style(panel_ax, name)
        image = panel_ax.imshow(values, cmap, interpolation="nearest", **scale)
        if not 0.1 < height / width < 1.2:  # would be a thin line
            panel_ax.set_aspect("auto")
        panel_ax.set_xticks(np.linspace(-0.5, width - 0.5, 5), sides)
        panel_ax.set_yticks(np.linspace(-0.5, height - 0.5, 3), levels)
        if scale:
            _color_bar(panel_ax, image)
    return axes[0].figure


def animate(
    trace: Mapping[str, Array],
    row: int = 0,
    max_steps: int = 64,
    slots: str | Sequence[int] = "used",
    title: str = "",
    width: float = WIDTH,
) -> Animation:
    """Animates the memory, beside the heads' weights on the same slots.

    A step takes 0.2 seconds.

    Args:
        trace: dict of (B, T, ...), as `keras_memory.trace` gives it, with
            "memory", (B, T, N, W).
        row: int, the sequence of the batch to show.
        max_steps: int, the largest number of steps, which are evenly spread
            and include the last.
        slots, width: as in `plot_weighting`.
        title: str.
    """
    trace = check_dict("trace", trace, "arrays")
    check_closed("width", width, *WIDTHS)
    shown = _shown(trace, row, {}).get("", {})
    wanted = "have a 'memory', (B, T, N, W), of one block or layer only"
    require("memory" in shown, "trace", wanted, sorted(trace))
    memory, heads = shown["memory"], heads_of(shown)
    rows = _rows(_use(heads, memory), slots)
    steps = _moments(len(memory), check_size("max_steps", max_steps))
    parts = [(memory[:, rows], _about_zero(memory))]
    if heads:
        weights = np.stack([*heads.values()], -1)
        parts.append((weights[:, rows], {"high": _high(weights, slots)}))
    height, bottom_margin = np.clip(0.12 * len(rows), 1.6, 3.6), 0.8
    total, wide = height + TOP + bottom_margin, width - LEFT - 2 * RIGHT
    figure = Figure((width, total))
    ratios = [0.6, 0.4][: len(parts)]
    axes = figure.subplots(1, len(parts), squeeze=False, width_ratios=ratios)[0]
    left, right = LEFT / width, 1 - RIGHT / width
    top, bottom = 1 - TOP / total, bottom_margin / total
    figure.subplots_adjust(left, bottom, right, top, wspace=2 * RIGHT / wide)
    options = {"inches": height, "slots": (rows.tolist(), memory.shape[1])}
    drawn = [
        _draw(ax, _Panel(values[:1], **options, **scale))
        for ax, (values, scale) in zip(axes, parts)
    ]
    write_labels(axes[0], x_label="contents")
    for ax in axes[1:]:
        ax.set_xticks(range(len(heads)), heads, rotation=90)
        ax.set(ylabel="", yticks=[])
    text = figure.text(left, 1 - 0.08 / total, "", va="top", fontsize=11)

    def update(step):
        for image, (values, _) in zip(drawn, parts):
            image.set_data(values[step])
        text.set_text(f"{title} after step {step} (0 to {len(memory) - 1})")
        return [*drawn, text]

    return Animation(figure, update, steps, milliseconds=200)


class _Panel(NamedTuple):
    """The content of axes.

    `_drawn` compares all fields but the first by `==`, so only the first may
    be an array.
    """

    matrices: np.ndarray  # (moments, rows, columns), side by side
    inches: float  # height
    title: str = ""
    x_label: str = "time step"
    low: float = 0.0  # ends of the scale
    high: float = 1.0
    cmap: str = SEQUENTIAL
    steps: list | None = None  # one for each matrix; None: columns are steps
    names: list | None = None  # of rows
    slots: tuple | None = None  # list of the rows' slots, number of all slots
    gray: list | None = None  # a bool for each column: is it grayed out?


def _drawn(panels, ax, title, width, figure=None):
    """Draws panels; updates `figure` if only numbers and title differ."""
    frame = [width, *((panel.matrices.shape, *panel[1:]) for panel in panels)]
    drawn = [
        panel_ax.images
        for panel_ax in getattr(figure, "axes", ())
        if panel_ax.images
    ]
    is_same = getattr(figure, "frame", None) == frame and figure.texts
    if is_same and len(drawn) == len(panels):
        figure.texts[0].set_text(title)
        for parts, panel in zip(drawn, panels):
            for image, matrix in zip(parts, panel.matrices):
                image.set_data(matrix)
        return figure
    if ax is not None and title:
        full_title = ", ".join(filter(None, [title, panels[0].title]))
        panels = [panels[0]._replace(title=full_title), *panels[1:]]
    left = WIDE_LEFT if any(panel.names for panel in panels) else LEFT
    sizes = [(panel.inches, panel.x_label) for panel in panels]
    axes = _axes(ax, sizes, title, width, left)
    for panel_ax, panel in zip(axes, panels):
        _draw(panel_ax, panel)
    if ax is None:
        axes[0].figure.frame = frame
    return axes[0].figure


def _axes(ax, sizes, title="", width=WIDTH, left=LEFT):
    """The user's axes, or new ones, one below the other.

    Neighbors with the same x label share it. `sizes` are pairs of a height in
    inches and an x label.
    """
    heights, labels = zip(*sizes)
    check_closed("width", width, *WIDTHS)
    if ax is not None:
        axes = check_axes(ax, len(sizes))
        for panel_ax, label in zip(axes, labels):
            write_labels(panel_ax, x_label=label)
        return axes
    shared = [
        label == next_label != ""
        for label, next_label in pairwise([*labels, ""])
    ]
    gaps = [GAP if share else GAP + LABEL for share in shared]
    head = TOP + 0.34 * bool(title)
    height = head + sum(heights) + sum(gaps)
    figure, axes, top = Figure((width, height)), [], height - head
    figure.text(left / width, 1 - 0.1 / height, title, va="top", fontsize=12)
    for inches, gap, share, label in zip(heights, gaps, shared, labels):
        corner = left / width, (top - inches) / height
        size = (width - left - RIGHT) / width, inches / height
        axes.append(figure.add_axes((*corner, *size)))
        axes[-1].tick_params(labelbottom=not share)
        write_labels(axes[-1], x_label="" if share else label)
        top -= inches + gap
    return axes


def _shown(trace, row, sizes):
    """Heads, gates and memory of one sequence: dict from place to dict."""
    places = {}
    for place, parts in by_place(trace).items():
        prefix, heads = place and f"{place}/", head_weightings(parts)
        slots, places[place] = f"{prefix}N", {}
        for kind, values in parts.items():
            axes = "B", "T", ..., slots
            if kind == "memory":
                axes = "B", "T", slots, None
            elif _is_gate(kind):
                axes = ("B", "T", None, None)[: 3 + (kind == "read_mode")]
            elif kind not in heads:
                continue
            name = f"trace[{prefix + kind!r}]"
            values = check_array(name, values, kind="any", result="numpy")
            if values.ndim == len(axes) or ... in axes:
                values = _row(name, values, axes, sizes, row, kind != "memory")
                places[place][kind] = values
    return places


def _is_gate(kind):
    return kind.endswith("_gate") or kind == "read_mode"


def _sequence_panels(given, gray):
    """Panels of inputs, targets and outputs, each (T, channels)."""
    note = " (gray: does not count)" * (gray is not None)
    pair = [given[n] for n in ("targets", "outputs") if n in given]
    scale = {"gray": gray, **_scale(*pair)}
    parts = {n.removesuffix("s"): (v, scale) for n, v in given.items()}
    if "inputs" in given:
        parts["input"] = given["inputs"], {}
    if len(pair) == 2:
        error = np.abs(pair[0] - pair[1])
        high = max(scale["high"], _top(error))
        parts["|target - output|"] = error, {"gray": gray, "high": high}
    panels = []
    for name, (values, options) in parts.items():
        inches = np.clip(0.11 * values.shape[1], 0.4, 1.3)
        name += note * (name == "target")
        panels.append(_time_panel(values, inches, name, **options))
    return panels


def _gates_panel(gates, title, argument="gates"):
    sizes, rows = {}, {}
    for name in filter(_is_gate, gates):
        axes = ("T", "heads", "modes")[: 2 + (name == "read_mode")]
        given = f"{argument}[{name!r}]"
        values = numbers(given, gates[name], axes, {**sizes}, True)
        sizes["T"] = len(values)
        if name != "read_mode":
            names = head_names(name, values.shape[1:], gates)
            rows.update(zip(names, values.T))
            continue
        wanted = "have 2 H + 1 modes, of H write heads"
        require(values.shape[2] % 2, given, wanted, f"shape {values.shape}")
        for head in range(values.shape[1]):
            links = values.shape[2] // 2
            suffixes = [
                f" {link}" if links > 1 else "" for link in range(links)
            ]
            modes = [f"backward{suffix}" for suffix in suffixes] + ["content"]
            modes += [f"forward{suffix}" for suffix in suffixes]
            names = [f"read {head} {mode}" for mode in modes]
            rows.update(zip(names, values[:, head].T))
    require(rows, "gates", "have a gate", sorted(gates))
    values = np.stack([*rows.values()], -1)
    return _time_panel(values, 0.19 * len(rows) + 0.05, title, names=[*rows])


def _time_panel(values, inches, title, **options):
    """A panel of values (T, rows) over time."""
    return _Panel(values.T[None], inches, title, **_scale(values) | options)


def _weighting_panel(values, title, rows, slots):
    inches = _inches(rows, 1.0, 0.07, 2)  # the frame would hide 1 pixel
    of = rows.tolist(), values.shape[1]
    options = {"slots": of, "high": _high(values, slots)}
    return _time_panel(values[:, rows], inches, title, **options)


def _inches(rows, least, each, pixels):
    """Height of a panel of slots; each slot has at least `pixels` pixels."""
    count = len(rows)
    return min(6.0, max(least, each * min(count, 24), pixels * count / DPI))


def _high(weights, slots=None):
    """The end of a scale: the largest weight if that is below 0.5, else 1."""
    is_all = isinstance(slots, str) and slots == "all"
    return _top(weights) if 0 < _top(weights) < 0.5 and not is_all else 1.0


def _scale(*arrays):
    """From 0 to at least 1; symmetric about zero if a number is negative."""
    values = np.hstack([0.0, *map(np.ravel, arrays)])
    is_signed = (values < 0).any()
    return _about_zero(values) if is_signed else {"high": _top(values, 1.0)}


def _top(values, least=0.0):
    """The largest number of an array without NaN, or `least` if larger."""
    return float(np.fmax.reduce(values, axis=None, initial=least))


def _memory_panel(memory, title, rows, frames=6):
    steps, inches = _moments(len(memory), frames), _inches(rows, 1.2, 0.08, 1)
    options = {"x_label": "contents after step", "steps": steps.tolist()}
    options |= {"slots": (rows.tolist(), memory.shape[1])} | _about_zero(memory)
    return _Panel(memory[steps][:, rows], inches, title, **options)


def _draw(ax, panel):
    """Draws a panel; returns its last image."""
    count, wide = panel.matrices.shape[1:]
    _style(ax, panel.title)
    cmap = mpl.colormaps[panel.cmap].with_extremes(bad=NAN_COLOR)
    starts = np.arange(len(panel.matrices)) * max(wide * 1.06, wide + 0.3)
    options = {"vmin": panel.low, "vmax": panel.high, "aspect": "auto"}
    options |= {"interpolation": "nearest"} if max(count, wide) < 300 else {}
    for start, matrix in zip(starts, panel.matrices):
        extent = start - 0.5, start + wide - 0.5, count - 0.5, -0.5
        image = ax.imshow(matrix, cmap, extent=extent, **options)
    ax.set_xlim(-0.5, starts[-1] + wide - 0.5)
    if panel.steps is None:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=STEPS))
    else:
        ax.set_xticks(starts + (wide - 1) / 2, panel.steps)
    edges = np.diff(np.r_[0, panel.gray or [], 0])
    for first, end in np.flatnonzero(edges).reshape(-1, 2):
        ax.axvspan(first - 0.5, end - 0.5, color="0.7", alpha=0.85, lw=0)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
    if panel.names is not None:
        ax.set_yticks(range(count), panel.names, fontsize=8)
    elif panel.slots is not None:
        rows, of = panel.slots
        label = "slot" if count == of else f"slot ({count} of {of})"
        write_labels(ax, y_label=label)
        ticks = MaxNLocator(5, integer=True, steps=STEPS)
        apart = int(ticks.tick_values(0, count)[1])
        at = [place for place, slot in enumerate(rows) if slot % apart == 0]
        at = at or range(0, count, apart)
        ax.set_yticks(at, [rows[place] for place in at])
    _color_bar(ax, image)
    return image


def _style(ax, title):
    ax.tick_params(labelsize=9, length=2)
    ax.spines[:].set(color="0.6", lw=0.6)
    write_labels(ax, title)


def _color_bar(ax, image):
    # An inch as a share of the axes' width.
    inch = ax.figure.dpi / ax.get_window_extent().width
    place = 1 + 0.075 * inch, 0, 0.1 * inch, 1
    bar = ax.figure.colorbar(image, cax=ax.inset_axes(place))
    ends = image.get_clim()
    labels = [f"{end:.2g}".replace("e+0", "e") for end in ends]
    bar.set_ticks(ends, labels=[label.replace("e-0", "e-") for label in labels])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)


def _rows(strength, slots):
    """Indices of the slots to draw; `strength` (N,) is each slot's use."""
    count = len(strength)
    if isinstance(slots, str):
        wanted = "be 'used', 'all' or a list of slots"
        require(slots in ("used", "all"), "slots", wanted, slots)
        used = np.flatnonzero(strength > 0.1 * _top(strength))
        if slots == "all" or not len(used):
            return np.arange(count)
        gaps = np.diff(used, append=used[0] + count)
        first = used[(gaps.argmax() + 1) % len(used)]
        wide = count - gaps.max() + 3  # one more at each end
        if wide > 0.8 * count:
            return np.arange(count)
        return (first - 1 + np.arange(wide)) % count
    rows = check_list("slots", slots)
    return np.array([check_whole("slots", slot, 0, count - 1) for slot in rows])


def _use(heads, memory):
    """(N,), how much each slot is used.

    This is the largest weight of the heads, (T, N) each. Without heads it is
    the largest distance of the slot's contents, (T, N, W), to the median over
    slots.
    """
    if heads:
        return np.fmax.reduce([*heads.values()], (0, 1))
    known = np.ma.masked_invalid(memory)
    apart = np.abs(known - np.ma.median(known, axis=1, keepdims=True))
    return apart.max(axis=(0, 2)).filled(0.0)


def _moments(steps, count):
    """At most `count` step numbers, evenly spread, including the last."""
    count = min(check_size("frames", count), steps)
    return np.linspace(steps - 1, 0, count).round().astype(int)[::-1]


def _about_zero(values):
    """A scale that is symmetric about zero."""
    reach = _top(np.abs(values)) or 1.0
    return {"low": -reach, "high": reach, "cmap": DIVERGING}


def _row(name, values, axes, sizes, row, shares=False):
    """One sequence of (B, ...)."""
    values = check_array(name, values, axes, sizes, "any", result="numpy")
    row = check_whole("row", row, 0, max(0, len(values) - 1))
    return numbers(name, values[row : row + 1], axes, None, shares)[0]
