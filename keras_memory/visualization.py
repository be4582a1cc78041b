"""Pictures of memory: arrays in, image arrays out.

An image is a uint8 array (height, width, 3). Nothing here knows of files,
models or TensorBoard. Every panel begins its cells at pixel row `TOP`, pixel
column `LEFT`, so stacked panels with equally wide cells share their time axis.
Slots, heads, bits and time steps count from 0, slot 0 at the top.
"""

import functools
import io
from typing import NamedTuple

import numpy as np


def _table(colours):
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()])


# Anchor colours from low to high, evenly spaced to the eye.
SEQUENTIAL = _table(  # violet, teal, yellow: for what begins at zero
    "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
)
DIVERGING = _table(  # blue, white, rust: for what has a sign
    "1c3a73 3266b0 6497d3 abc7e3 f5f5f5 e2baa4 d07a53 a84218 6e1c05"
)
NAN_COLOUR = 255, 0, 160  # magenta, in neither table
LINES = _table(  # one a series, told apart by colour-blind eyes too
    "0072b2 d55e00 009e73 cc79a7 e69f00 56b4e9 262626 882255"
)

TOP, LEFT, RIGHT, GAP = 34, 64, 76, 8  # pixels around and between the cells
INSET, MARK_ROW = 8, 18  # pixels around the curves, and for a mark's text
FINE = 4  # curves are drawn so many times larger, then reduced
PLOT_WIDTH, PLOT_HEIGHT = 640, 400  # what the size of a cell is chosen for
MOST_ROWS = 512  # with more, neighbours share a cell
TITLE_INK, INK, FAINT_INK, FRAME = "#262626", "#404040", "#5c5c5c", "#8c8c8c"
GRID = "#e8e8e8"
BAND = 0.2  # opacity


def colorize(values, low=0.0, high=1.0, palette=SEQUENTIAL, levels=None):
    """Turns numbers into colours, by a scale that is even to the eye.

    Args:
        values: (rows, columns) numbers; those outside of `low` to `high` are
            clipped, and NaN gets `NAN_COLOUR`.
        low: the number at the palette's first colour.
        high: the number at the palette's last colour; above `low`.
        palette: (K, 3) anchor colours, 0 to 255, evenly spread over the scale.
        levels: how many colours there are at most, evenly spread; at least 2.
            By default as many as there are.

    Returns:
        (rows, columns, 3) uint8 image.

    Raises:
        ValueError: `values` is not a matrix, or `high` is not above `low`.
    """
    values = _array(values, "values", "(rows, columns)")
    if not high > low:
        raise ValueError(
            "`high` must be above `low`, or the colours have no scale. "
            f"Received: low={low}, high={high}."
        )
    missing = np.isnan(values)
    place = (np.clip(values, low, high) - low) / (high - low)
    place = np.where(missing, 0.0, place)
    if levels:
        place = np.round(place * (levels - 1)) / (levels - 1)
    place = place * (len(palette) - 1)
    anchors = np.arange(len(palette))
    channels = [np.interp(place, anchors, c) for c in np.transpose(palette)]
    image = np.stack(channels, axis=-1).round().astype("uint8")
    image[missing] = NAN_COLOUR
    return image


def panel(
    values,
    title,
    low=0.0,
    high=1.0,
    x_label="time step",
    y_label="slot",
    cell=None,
    mask=None,
    palette=SEQUENTIAL,
):
    """Draws a heat map with title, axes and colour bar.

    Above `MOST_ROWS` rows, each row drawn is the strongest (largest magnitude)
    of a few neighbours, as the label then says, so that no hot slot is lost.

    Args:
        values: (rows, columns) numbers; row 0 is drawn at the top.
        title: the line above.
        low: the number at the first colour.
        high: the number at the last colour; above `low`.
        x_label: what the columns count; "" leaves the line out.
        y_label: what the rows count.
        cell: (width, height) of a cell in pixels, at least 1; by default such
            that the cells fill about 640 x 400 pixels.
        mask: (columns,), zero for columns to grey out; by default none.
        palette: (K, 3) anchor colours, as for `colorize`.

    Returns:
        (H, W, 3) uint8 image; cell (i, j) begins at pixel row
        `TOP + i * height` and pixel column `LEFT + j * width`.

    Raises:
        ValueError: a shape, the scale or the cell is impossible.
    """
    values, block = _strongest(_array(values, "values", "(rows, columns)"))
    rows, columns = values.shape
    width, height = _cell(rows, columns) if cell is None else cell
    if min(width, height) < 1:
        raise ValueError(
            "`cell` must be at least one pixel wide and high, or nothing is "
            f"seen. Received: cell={cell}."
        )
    colours = colorize(values, low, high, palette)
    if mask is not None:
        mask = _array(mask, "mask", "(columns,)")
        _same_length({"values": values.T, "mask": mask})
        colours[:, mask == 0] = _grey(colours[:, mask == 0])
    return _figure(
        [_enlarge(colours, width, height)],
        title,
        (x_label, _ticks(columns, width, 44)),
        _slot_axis(y_label, rows, height, block),
        [_colour_bar(len(colours) * height, low, high, palette)],
    )


def stack(panels, title=""):
    """Joins images top to bottom, aligned at the left, on white.

    Args:
        panels: sequence of (H, W, 3) uint8 images; sizes may differ.
        title: a headline over the whole; "" leaves it out.

    Returns:
        (H, W, 3) uint8 image.

    Raises:
        ValueError: no panels, or one that is not an image.
    """
    panels = [_image(one) for one in panels]
    if not panels:
        raise ValueError(
            "`panels` must hold at least one image, since a picture cannot be "
            "empty. Received: no panels."
        )
    if title:
        panels = [_headline(title), *panels]
    return np.concatenate(_widened(panels, GAP))[:-GAP]


def weightings(weighting, title):
    """Draws where each head looks: slots over time, on a fixed scale 0 to 1.

    Args:
        weighting: (T, N) or (T, heads, N), in 0 to 1.
        title: the line above; the head's number is added if there are several.

    Returns:
        (H, W, 3) uint8 image: one panel a head, on one time axis.

    Raises:
        ValueError: `weighting` has another rank, or an empty axis.
    """
    return _over_time(_head_rows(weighting, title))


def slots_over_time(values, title):
    """Draws one number a slot over time, such as the usage.

    Args:
        values: (T, N); any real value.
        title: the line above.

    Returns:
        (H, W, 3) uint8 image, on a scale from 0 to 1, or as far as the values
        reach beyond.

    Raises:
        ValueError: `values` has another rank, or an empty axis.
    """
    values = _array(values, "values", "(T, N)")
    finite = values[np.isfinite(values)]
    scale = {"low": finite.min(initial=0.0), "high": finite.max(initial=1.0)}
    return _over_time([(title, values, scale)])


def target_and_output(target, output, mask=None, high=1.0):
    """Draws target, output and their absolute difference, bits over time.

    Args:
        target: (T, bits) in 0 to `high`.
        output: (T, bits) in 0 to `high`: probabilities, not logits.
        mask: (T,), zero at steps outside the loss, which are greyed out.
        high: the number at the last colour, for example 4 for digits 0 to 4.

    Returns:
        (H, W, 3) uint8 image: three panels on one time axis.

    Raises:
        ValueError: the shapes do not fit one another.
    """
    return _over_time(_bits(target, output, mask, high))


def memory_film_strip(memory, frames=8, title="Memory"):
    """Draws the memory at a few moments, the last always among them.

    Args:
        memory: (T, N, W) contents after each step; any real value.
        frames: how many moments at most, evenly spread; at least 1.
        title: the line above.

    Returns:
        (H, W, 3) uint8 image: the moments side by side, on one scale symmetric
        about zero that reaches to the largest magnitude in all of `memory`.

    Raises:
        ValueError: `memory` has another rank or an empty axis, or no frames.
    """
    memory = _array(memory, "memory", "(T, N, W)")
    reach = _reach(memory)
    scale = {"low": -reach, "high": reach, "palette": DIVERGING}
    return _film_strip(memory, frames, title, "contents", scale)


def linkage_film_strip(linkage, frames=8, title="Linkage"):
    """Draws temporal links at a few moments, the last always among them.

    Args:
        linkage: (T, N, N) in 0 to 1, links after each step; row i, column j:
            slot i was written right after slot j.
        frames: how many moments at most, evenly spread; at least 1.
        title: the line above.

    Returns:
        (H, W, 3) uint8 image: the moments side by side, on a scale 0 to 1.

    Raises:
        ValueError: `linkage` has another rank or an empty axis, or no frames.
    """
    linkage = _array(linkage, "linkage", "(T, N, N)")
    title = f"{title}: row written right after column"
    return _film_strip(linkage, frames, title, "links", {})


def dense_linkage(linkage, columns):
    """Makes N x N links of those that a DNC with `sparse_links` keeps.

    Args:
        linkage: (..., N, K) links, as `trace` or a `DNCState` have them.
        columns: (..., N, K) whole numbers in [0, N), their `link_columns`.

    Returns:
        (..., N, N) array, 0 where no link is kept, for `linkage_film_strip`.

    Raises:
        ValueError: the shapes differ.
    """
    linkage, columns = np.asarray(linkage), np.asarray(columns)
    if linkage.shape != columns.shape or linkage.ndim < 2:
        raise ValueError(
            "`linkage` and `columns` must both be (..., N, K). Received: "
            f"linkage.shape={linkage.shape}, columns.shape={columns.shape}"
        )
    slots = linkage.shape[-2]
    dense = np.zeros((*linkage.shape[:-1], slots), linkage.dtype)
    *places, _ = np.indices(linkage.shape, sparse=True)
    np.add.at(dense, (*places, columns.astype("int64")), linkage)
    return dense


def _film_strip(matrices, frames, title, what, scale):
    steps = _moments(len(matrices), frames, "frames")
    shown = len(steps)
    moments = [_strongest(matrices[step]) for step in steps]
    (rows, columns), block = moments[0][0].shape, moments[0][1]
    width = min(max(1, ((PLOT_WIDTH + GAP) // shown - GAP) // columns), 16)
    _, height = _cell(rows, columns)
    centres = np.arange(shown) * (columns * width + GAP) + columns * width // 2
    return _figure(
        [_enlarge(colorize(m, **scale), width, height) for m, _ in moments],
        title,
        (f"{what} after time step", np.stack([centres, steps], axis=-1)),
        _slot_axis("slot", rows, height, block),
        [_colour_bar(rows * height, **scale)],
    )


def sequence_frames(memory, weightings, title, most=64):
    """Draws the memory and its weightings step by step, for `encode_gif`.

    The slots are rows throughout: first the contents, then a column for each
    head of each weighting, on a fixed scale 0 to 1. A scale has 65 colours
    only, so that the GIF is small.

    Args:
        memory: (T, N, W) contents after each step; any real value.
        weightings: dict from name to (T, N) or (T, heads, N), in 0 to 1. Of a
            name such as "read_weighting" only "read" is written.
        title: the line above, to which the time step is added.
        most: how many frames at most, evenly spread; at least 1.

    Returns:
        List of (H, W, 3) uint8 images of one size: the moments in order, the
        last step always among them, on one scale symmetric about zero that
        reaches to the largest magnitude in all of `memory`.

    Raises:
        ValueError: shapes do not fit one another, or no frames.
    """
    memory = _array(memory, "memory", "(T, N, W)")
    steps = _moments(len(memory), most, "most")
    groups = {name: _heads(one) for name, one in weightings.items()}
    _same_length({"memory": memory, **groups})
    slots = {name: one.shape[2] for name, one in groups.items()}
    if set(slots.values()) - {memory.shape[1]}:
        raise ValueError(
            "`weightings` must have as many slots as `memory`, since they "
            f"share its rows. Received: memory {memory.shape[1]}, {slots}."
        )
    reach = _reach(memory)
    scale = {"low": -reach, "high": reach, "palette": DIVERGING, "levels": 65}
    share = {"levels": 65}
    parts = [("memory", memory, scale)]
    for name, one in groups.items():
        label = name.removesuffix("_weighting").replace("_", " ")
        parts.append((label, one.transpose(0, 2, 1), share))
    first, block = _strongest(memory[0])
    rows = len(first)
    _, height = _cell(rows, 1)
    widths, ticks, right = [], [], 0
    for label, values, _ in parts:
        columns = values.shape[2]
        width = max(1, min(PLOT_WIDTH // 2 // columns, 16))
        widths.append(max(width, -(-_widest(12, [label]) // columns)))
        ticks.append((right + widths[-1] * columns // 2, label))
        right += widths[-1] * columns + GAP
    bars = [_colour_bar(rows * height, name="contents", **scale)]
    if groups:
        bars.append(_colour_bar(rows * height, name="weighting", **share))
    slot_axis = _slot_axis("slot", rows, height, block)
    frames = []
    for step in steps:
        images = [
            _enlarge(colorize(_strongest(v[step])[0], **s), width, height)
            for (_, v, s), width in zip(parts, widths)
        ]
        headline = f"{title}, after {step + 1} of {len(memory)} time steps"
        frames.append(_figure(images, headline, ("", ticks), slot_axis, bars))
    return _widened(frames)


def task_picture(inputs, targets, outputs, mask, trace, title, high=1.0):
    """Composes all of one sequence; a column is one time step throughout.

    Args:
        inputs: (T, channels). Where some are below 0 or above 1, the scale is
            symmetric about zero and reaches to the largest magnitude.
        targets: (T, bits) in 0 to `high`.
        outputs: (T, bits) in 0 to `high`: probabilities, not logits.
        mask: (T,), zero at steps outside the loss; None if all count.
        trace: dict of what is drawn below: each gate, (T, heads), whose name
            ends in "_gate"; each weighting, (T, N) or (T, heads, N), whose
            name ends in "_weighting", in the dict's order but with
            "write_weighting" first; and, to add a film strip, "memory"
            (T, N, W). Names of several layers or blocks have these in front,
            such as "block0/memory". Empty for a model without memory.
        title: the headline.
        high: the number at the last colour of targets and outputs.

    Returns:
        (H, W, 3) uint8 image.

    Raises:
        ValueError: `trace` has no weighting, or shapes do not fit one another.
    """
    names = [name for name in trace if name.endswith("_weighting")]
    places = [name.rpartition("/")[0] for name in names]

    def place(name):  # a block writes before it reads
        of, _, last = name.rpartition("/")
        return places.index(of), last != "write_weighting"

    if trace and not names:
        raise ValueError(
            "`trace` must be empty or hold a weighting, such as "
            "'read_weighting', since the picture shows where heads look. "
            f"Received: keys {sorted(trace)}."
        )
    inputs = _array(inputs, "inputs", "(T, channels)")
    options = {"y_label": "channel"}
    if np.any((inputs < 0) | (inputs > 1)):
        reach = _reach(inputs)
        options |= {"low": -reach, "high": reach, "palette": DIVERGING}
    rows = [("Input", inputs, options), *_bits(targets, outputs, mask, high)]
    for name in [name for name in trace if name.endswith("_gate")]:
        rows.append((_words(name), trace[name], {"y_label": "head"}))
    for name in sorted(names, key=place):
        rows += _head_rows(trace[name], _words(name))
    panels = [_over_time(rows, PLOT_HEIGHT * 2 // 3)]
    for name in [name for name in trace if name.split("/")[-1] == "memory"]:
        _same_length({"Input": inputs, name: trace[name]})
        panels.append(memory_film_strip(trace[name], title=_words(name)))
    return stack(panels, title)


class Tile(NamedTuple):
    """An image for `tiles`.

    Fields:
        image: (H, W), (H, W, 1) or (H, W, 3), in [0, 1].
        caption: a short text, in the colour of the frame.
        words: text below that, above the image.
        colour: int, which of `LINES` the frame has; None for a grey one, which
            stands apart.
        heat: an array like `image`, such as attributions, drawn below: what is
            positive, summed over channels, on the greyed image; or None.
    """

    image: np.ndarray
    caption: str
    words: str
    colour: int | None = None
    heat: np.ndarray | None = None


def tiles(row, size=96):
    """Draws images side by side, with words above and heat maps below.

    Args:
        row: sequence of `Tile`.
        size: int, pixels that the larger side of an image takes at least.

    Returns:
        (H, W, 3) uint8 image.

    Raises:
        ValueError: no tiles, or an array that is no image in [0, 1].
    """
    if not row:
        raise ValueError(
            "`row` must hold at least one tile, since a picture cannot be "
            "empty. Received: no tiles."
        )
    Image, ImageDraw, font = _pillow()
    columns = []
    for tile in row:
        image = _colours(tile.image)
        scale = max(1, round(size / max(image.shape[:2])))
        parts = [image]
        if tile.heat is not None:
            parts.append(_heated(image, tile.heat))
        parts = [_enlarge(part, scale, scale) for part in parts]
        height, width, _ = parts[0].shape
        texts = (tile.caption, 12), (tile.words, 15)
        widest = max(_widest(points, [text]) for text, points in texts)
        end = max(width, widest) + 2 * GAP
        canvas = Image.new(
            "RGB", (end, 44 + len(parts) * (height + GAP)), "white"
        )
        draw = ImageDraw.Draw(canvas)
        ink = INK if tile.colour is None else tuple(LINES[tile.colour])
        draw.text((GAP, 16), tile.caption, ink, font(12), "ls")
        draw.text((GAP, 36), tile.words, TITLE_INK, font(15), "ls")
        for index, part in enumerate(parts):
            y = 44 + index * (height + GAP)
            box = (GAP - 2, y - 2, GAP + width + 1, y + height + 1)
            draw.rectangle(box, outline=ink, width=2)
            canvas.paste(Image.fromarray(part), (GAP, y))
        columns.append(np.array(canvas))
        if tile.colour is None:
            columns.append(np.full((1, 2 * GAP, 3), 255, "uint8"))
    highest = max(len(column) for column in columns)
    return np.concatenate(
        [
            np.pad(
                column,
                ((0, highest - len(column)), (0, 0), (0, 0)),
                constant_values=255,
            )
            for column in columns
        ],
        axis=1,
    )


def _colours(image):
    """An image in [0, 1], also a grey one, as (H, W, 3) uint8."""
    values = np.asarray(image, "float64")
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3) or not values.size:
        raise ValueError(
            "An image must be (H, W), (H, W, 1) or (H, W, 3), grey or red, "
            f"green and blue. Received: shape {np.shape(image)}."
        )
    if not (values.min() >= -1e-6 and values.max() <= 1 + 1e-6):
        raise ValueError(
            "An image must be in [0, 1] to be drawn: undo its normalisation. "
            f"Received: values from {values.min():.3g} to {values.max():.3g}."
        )
    shades = (255 * np.clip(values, 0, 1)).round().astype("uint8")
    return np.broadcast_to(shades, (*shades.shape[:2], 3))


def _heated(image, heat):
    """The image, faint, under what is positive in `heat`."""
    heat = np.asarray(heat, "float64")
    heat = np.maximum(heat.reshape(*image.shape[:2], -1).sum(axis=2), 0)
    heat = heat / (heat.max() or 1.0)
    colours = colorize(heat)
    share = 0.25 + 0.65 * heat[:, :, None]
    return (share * colours + (1 - share) * _grey(image)).astype("uint8")


def sphere(mean, variance=None, farthest=None, title="Map"):
    """Draws the map of an egospheric memory: colour, depth, uncertainty.

    Args:
        mean: (H, W, C) map, C at least 3: column, row, depth in metres, and
            features. Of these the first three are drawn as red, green and blue
            in [0, 1], or the first as grey if there are fewer.
        variance: (H, W, C) of it, whose standard deviation of depth is drawn;
            None to leave that out.
        farthest: metres at the last colour of depth; the largest by default.
        title: the line above.

    Returns:
        (H', W', 3) uint8 image.

    Raises:
        ValueError: arrays of another shape.
    """
    mean = _array(mean, "mean", "(H, W, C)")
    height, width, channels = mean.shape
    if channels < 3:
        raise ValueError(
            "`mean` must have columns, rows and depth, or it is no map. "
            f"Received: shape {mean.shape}."
        )
    scale = max(1, round(PLOT_WIDTH / width))
    depth = mean[:, :, 2]
    farthest = float(depth.max()) or 1.0 if farthest is None else farthest
    bar = _colour_bar(height * scale, 0.0, farthest, name="m")
    parts = []
    if channels > 3:
        shown = mean[:, :, 3:6] if channels > 5 else mean[:, :, 3:4]
        parts.append((_colours(np.clip(shown, 0, 1)), title, []))
    parts.append((colorize(depth, 0.0, farthest), "depth", [bar]))
    if variance is not None:
        variance = _array(variance, "variance", "(H, W, C)")
        if variance.shape != mean.shape:
            raise ValueError(
                "`variance` must be of the shape of `mean`. Received: shapes "
                f"{variance.shape} and {mean.shape}."
            )
        spread = np.log10(np.maximum(variance[:, :, 2], 1e-12)) / 2
        bar = _colour_bar(height * scale, -2.0, 1.0, name="log10 m")
        name = "standard deviation of depth"
        parts.append((colorize(spread, -2.0, 1.0), name, [bar]))
    sides = ["behind", "left", "ahead", "right"]
    x_ticks = [(width * scale * i // 4, side) for i, side in enumerate(sides)]
    y_ticks = [
        (height * scale * i // 2, side)
        for i, side in enumerate(["up", "level", "down"])
    ]
    panels = [
        _figure(
            [_enlarge(image, scale, scale)],
            name,
            ("", x_ticks),
            ("", y_ticks),
            beside,
        )
        for image, name, beside in parts
    ]
    return stack(panels)


def curves(
    series,
    title,
    x_label,
    y_label,
    log_y=False,
    size=(PLOT_WIDTH, PLOT_HEIGHT),
    marks=None,
    log_x=False,
):
    """Draws lines, each the mean of runs in a band from lowest to highest.

    What is NaN or infinite breaks a run's line there, and the mean and the band
    where any of the runs is broken. A point without neighbours is a dot, as
    are all points of a line that has few.

    Args:
        series: dict from label to (x, y), at most 8: x (P,) increases, and y
            is (P,) or, for several runs, (S, P).
        title: the line above.
        x_label: what x counts.
        y_label: what y counts.
        log_y: whether y grows by factors rather than from zero. Zeros then lie
            on a line of their own at the bottom, marked 0. The mean stays that
            of the numbers, not of their logarithms.
        size: (width, height) of the plot in pixels, at least 96 each; in
            height 18 more for each mark.
        marks: dict from text to the x where a dashed line stands for it.
        log_x: whether x grows by factors; all x, of marks too, are then
            above 0.

    Returns:
        (H, W, 3) uint8 image; the plot begins at pixel row `TOP` and pixel
        column `LEFT`, or further right where the numbers of y are long.

    Raises:
        ValueError: nothing or too much to draw, shapes that do not fit, x that
            does not increase, or on a logarithmic scale a negative number or,
            of x, zero.
    """
    if not 1 <= len(series) <= len(LINES):
        raise ValueError(
            f"`series` must hold 1 to {len(LINES)} lines, as many as have "
            f"colours that are told apart. Received: {len(series)} lines."
        )
    lines = [_runs(f"series[{key!r}]", *series[key]) for key in series]
    marks = sorted((marks or {}).items(), key=lambda mark: mark[1])
    positions = np.array([x for _, x in marks], "float64")
    if not np.isfinite(positions).all():
        raise ValueError(
            "`marks` must stand at finite positions, to be on the axis. "
            f"Received: {dict(marks)}."
        )
    every_x = np.concatenate([positions, *(x for x, _ in lines)])
    every_y = np.concatenate([y[np.isfinite(y)] for _, y in lines])
    if log_y and np.any(every_y < 0):
        raise ValueError(
            "`log_y` wants numbers that are not negative, which have no "
            f"logarithm. Received: a smallest number of {every_y.min()}."
        )
    if log_x and every_x.min() <= 0:
        raise ValueError(
            "`log_x` wants numbers above 0, which have a logarithm. Received: "
            f"a smallest x of {every_x.min()}."
        )
    width, height = size
    if min(width, height - MARK_ROW * len(marks)) < 96:
        raise ValueError(
            "`size` must be at least 96 pixels each way, and "
            f"{MARK_ROW} more in height for each mark, or axes have no room. "
            f"Received: size={size}, {len(marks)} marks."
        )
    y_axis = _log_axis if log_y else _zero_axis
    top = INSET + MARK_ROW * len(marks)
    place_y, y_ticks = y_axis(every_y, height - 1 - INSET, top, 36)
    x_axis = _tight_log_axis if log_x else _axis
    extent = every_x.min(), every_x.max()
    place_x, x_ticks = x_axis(*extent, INSET, width - 1 - INSET, 64)
    plot = _plot(
        [(place_x(x), place_y(y), place_y(y.mean(0))) for x, y in lines],
        [(text, place_x(x)) for text, x in marks],
        x_ticks,
        y_ticks,
        size,
    )
    return _figure(
        [plot],
        title,
        (x_label, x_ticks),
        (y_label, y_ticks),
        [_legend(series, [len(y) > 1 for _, y in lines])],
        max(LEFT, 36 + _widest(12, [text for _, text in y_ticks])),
    )


def entropy(weighting):
    """How widely a weighting is spread, in bits: the sum of -w log2 w.

    0 where one slot has all, log2(N) where all share alike. What sums to less
    than 1 is taken as it stands, not rescaled, so that a head which looks
    nowhere has 0 as well.

    Args:
        weighting: (..., N), not negative.

    Returns:
        (...) float64.

    Raises:
        ValueError: `weighting` has no slots, or is negative somewhere.

    >>> print(entropy([[1.0, 0.0], [0.5, 0.5], [0.5, 0.0]]))
    [0.  1.  0.5]
    """
    weighting = np.asarray(weighting, "float64")
    if not weighting.ndim or not weighting.shape[-1]:
        raise ValueError(
            "`weighting` must have the shape (..., N), since entropy is that "
            f"of N slots. Received: shape {weighting.shape}."
        )
    if np.any(weighting < -1e-6):  # less is rounding
        raise ValueError(
            "`weighting` must not be negative, since the entropy would be no "
            f"real number. Received: a smallest of {np.nanmin(weighting)}."
        )
    bits = np.log2(np.where(weighting <= 0, 1.0, weighting))
    return 0.0 - (weighting * bits).sum(axis=-1)


def encode_png(image):
    """Encodes a (H, W, 3) uint8 image as the bytes of a PNG file."""
    Image, _, _ = _pillow()
    stream = io.BytesIO()
    Image.fromarray(_image(image)).save(stream, "PNG")
    return stream.getvalue()


def decode_png(data):
    """Decodes the bytes of a PNG file as a (H, W, 3) uint8 image."""
    Image, _, _ = _pillow()
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def encode_gif(frames, milliseconds=200):
    """Encodes images as the bytes of a GIF file that plays forever.

    One palette serves all frames, so that no colour flickers. It is exact up
    to 255 colours, and always for white. Equal frames in a row are stored as
    one that lasts as long as they do together.

    Args:
        frames: sequence of (H, W, 3) uint8 images, all of one size.
        milliseconds: how long a frame lasts, at least 10; the format rounds to
            hundredths of a second.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: no frames, frames of several sizes, or too short a time.
    """
    frames = [_image(frame) for frame in frames]
    sizes = sorted({frame.shape for frame in frames})
    if len(sizes) != 1:
        raise ValueError(
            "`frames` must be images of one size, since a GIF has one canvas. "
            f"Received: {len(frames)} frames, of shapes {sizes}."
        )
    if milliseconds < 10:
        raise ValueError(
            "`milliseconds` must be at least 10, the shortest time that a GIF "
            f"can store. Received: milliseconds={milliseconds}."
        )
    Image, _, _ = _pillow()
    codes = [
        red << 16 | green << 8 | blue
        for frame in frames
        for red, green, blue in [np.moveaxis(frame.astype("int32"), -1, 0)]
    ]
    index = np.zeros(1 << 24, "uint8")  # of each colour code in the palette
    for code in codes:
        index[code] = 1
    present = np.flatnonzero(index)
    # Each colour counts once, so that a rare hot cell is not averaged away.
    colours = np.stack([present >> 16, present >> 8 & 255, present & 255], -1)
    reduced = Image.fromarray(colours[None].astype("uint8")).quantize(255)
    index[present] = np.asarray(reduced)[0]
    index[0xFFFFFF] = 255
    palette = bytes(reduced.getpalette()[: 3 * 255]).ljust(3 * 256, b"\xff")
    images = [Image.fromarray(index[code]) for code in codes]
    for image in images:
        image.putpalette(palette)
    first, *others = images
    options = {"append_images": others, "duration": milliseconds, "loop": 0}
    stream = io.BytesIO()
    first.save(stream, "GIF", save_all=True, **options)
    return stream.getvalue()


def _heads(weighting):
    if np.ndim(weighting) == 2:
        weighting = np.expand_dims(weighting, 1)
    return _array(weighting, "weighting", "(T, heads, N)", " or (T, N)")


def _head_rows(weighting, title):
    weighting = _heads(weighting)
    heads = range(weighting.shape[1])
    names = [f"{title}, head {h}" if len(heads) > 1 else title for h in heads]
    return [(names[h], weighting[:, h], {}) for h in heads]


def _words(name):
    return name.replace("_", " ").capitalize()


def _bits(target, output, mask, high):
    target = _array(target, "target", "(T, bits)")
    output = _array(output, "output", "(T, bits)")
    if target.shape != output.shape:
        raise ValueError(
            "`target` and `output` must have one shape, since they are "
            f"compared bit by bit. Received: target {target.shape}, output "
            f"{output.shape}."
        )
    all_count = mask is None or np.all(mask)
    note = "" if all_count else " (grey: outside the loss)"
    y_label = "bit" if high == 1 else "channel"
    options = {"y_label": y_label, "mask": mask, "high": high}
    return [
        ("Target" + note, target, options),
        ("Output", output, options),
        ("|Target - output|", np.abs(target - output), options),
    ]


def _over_time(rows, plot_height=PLOT_HEIGHT):
    """Stacks panels (title, values (T, ...), options) over one time axis."""
    _same_length({title: values for title, values, _ in rows})
    panels = []
    for title, values, options in rows:
        cell = _cell(*values.T.shape, plot_height)
        x_label = "time step" if len(panels) == len(rows) - 1 else ""
        options = {"x_label": x_label, "cell": cell, **options}
        panels.append(panel(values.T, title, **options))
    return stack(panels)


def _moments(steps, most, name):
    """Indices of at most `most` steps, evenly spread, the last among them."""
    if most < 1:
        raise ValueError(
            f"`{name}` must be at least 1, since without frames nothing is "
            f"shown. Received: {name}={most}."
        )
    moments = np.linspace(steps - 1, 0, min(most, steps))
    return moments.round().astype(int)[::-1]


def _reach(values):
    """The largest magnitude, for a scale symmetric about zero."""
    return np.abs(values[np.isfinite(values)]).max(initial=0.0) or 1.0


def _cell(rows, columns, plot_height=PLOT_HEIGHT):
    """Pixels (width, height) of a cell, so that the plot has a good size."""
    width = min(PLOT_WIDTH // columns, 64)
    height = min(plot_height // rows, max(16, 48 // rows))
    return max(1, width), max(1, height)


def _strongest(values):
    """At most MOST_ROWS rows, and how many of `values` each stands for."""
    block = -(-len(values) // MOST_ROWS)
    padding = ((0, -len(values) % block), (0, 0))
    blocks = np.pad(values, padding, mode="edge")
    blocks = blocks.reshape(-1, block, values.shape[1])
    places = np.abs(blocks).argmax(axis=1)[:, None]  # NaN counts as largest
    return np.take_along_axis(blocks, places, axis=1)[:, 0], block


def _slot_axis(label, rows, height, block):
    note = f" (strongest of {block})" if block > 1 else ""
    return label + note, _ticks(rows, height, 24, block)


def _ticks(count, cell, spacing, block=1):
    """(pixel, number) at the middle of every 1st, 2nd, 5th, 10th ... cell."""
    numbers = range(0, count * block, _whole_step(spacing * block / cell))
    return [(n // block * cell + cell // 2, n) for n in numbers]


def _step(least):
    """The smallest of ... 0.5, 1, 2, 5, 10 ... that is at least `least`."""
    unit = 10.0 ** np.floor(np.log10(least))
    return next(m * unit for m in (1, 2, 5, 10, 20) if m * unit >= least)


def _whole_step(least):
    return int(_step(max(1, least)))


def _axis(low, high, begin, end, spacing):
    """A scale from `low` at pixel `begin` to `high` at pixel `end`.

    Returns:
        Function from numbers to pixels, and (pixel, text) ticks at round
        numbers, at least `spacing` pixels apart.
    """
    if not high > low:
        high = low + max(1.0, abs(low))

    def place(numbers):
        share = (np.asarray(numbers) - low) / (high - low)
        return begin + share * (end - begin)

    step = _step((high - low) * spacing / abs(end - begin))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    numbers = step * np.arange(first, last + 1)
    return place, _at_pixels(place, numbers, _texts(numbers))


def _zero_axis(values, begin, end, spacing):
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    return _axis(low, high, begin, end, spacing)


def _log_axis(values, begin, end, spacing):
    """As `_axis`, in decades; one tick more, below, if there are zeros."""
    exponents = np.log10(values[values > 0])
    low = int(np.floor(exponents.min())) if len(exponents) else 0
    high = exponents.max(initial=low + 1)
    zeros = bool(np.any(values == 0))
    step = _whole_step((high - low + zeros) * spacing / abs(end - begin))
    bottom = low - step * zeros
    place_exponent, _ = _axis(bottom, high, begin, end, spacing)

    def place(numbers):
        positive = np.where(np.equal(numbers, 0), 1.0, numbers)
        exponents = np.log10(positive)
        return place_exponent(np.where(np.equal(numbers, 0), bottom, exponents))

    decades = [10.0**e for e in range(low, int(np.floor(high)) + 1, step)]
    numbers = [0.0] * zeros + decades
    return place, _at_pixels(place, numbers, [_texts([n])[0] for n in numbers])


def _tight_log_axis(low, high, begin, end, spacing):
    """As `_axis`, by factors; ticks at 1, 2, 5, 10, 20 ... if there is room,
    else at powers of 10."""
    high = high if high > low else 10 * low
    exponents = np.log10([low, high])
    place_exponent, _ = _axis(*exponents, begin, end, spacing)

    def place(numbers):
        return place_exponent(np.log10(numbers))

    first, last = np.floor(exponents).astype(int)
    decade = place(10.0) - place(1.0)
    step = _whole_step(spacing / abs(decade))
    within = (1, 2, 5) if 2 * spacing <= 3 * abs(decade) and step == 1 else (1,)
    numbers = [
        m * 10.0**e for e in range(first, last + 1, step) for m in within
    ]
    numbers = [n for n in numbers if low * 0.999 <= n <= high * 1.001]
    return place, _at_pixels(place, numbers, [_texts([n])[0] for n in numbers])


def _at_pixels(place, numbers, texts):
    return [(round(float(place(n))), text) for n, text in zip(numbers, texts)]


def _texts(numbers):
    """Writes numbers short, all in one unit: 12k, 0.3M, 1,500, 1e-5."""
    most = np.abs(numbers).max(initial=0.0)
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    fitting = [s for s, unit in units.items() if most >= max(unit, 1e4)]
    suffix = ["", *fitting][-1]
    unit = units.get(suffix, 1.0)
    texts = [f"{number / unit + 0.0:,.10g}" for number in numbers]
    return [t.replace("e-0", "e-") + suffix * (t != "0") for t in texts]


def _grey(colours):
    """Takes the hue and most of the contrast away."""
    luminance = colours @ np.array([[0.3], [0.59], [0.11]])
    return (175 + 0.3 * luminance).astype("uint8")


def _enlarge(image, width, height):
    return image.repeat(height, axis=0).repeat(width, axis=1)


def _figure(images, title, x_axis, y_axis, beside, left=LEFT):
    """Puts title and axes around images, side by side; then what is beside."""
    Image, ImageDraw, font = _pillow()
    (x_label, x_ticks), (y_label, y_ticks) = x_axis, y_axis
    height = images[0].shape[0]
    right = left + sum(image.shape[1] + GAP for image in images) - GAP
    bottom = TOP + height
    title_end = left + _widest(15, [title]) + GAP
    end = right + sum(image.shape[1] for image in beside)
    lowest = [TOP - 1 + image.shape[0] for image in beside]
    size = max(end, title_end), max([bottom + (42 if x_label else 22), *lowest])
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)

    def write(x, y, text, points, ink, anchor):
        draw.text((x, y), text, ink, font(points), anchor)

    x = right
    for image in beside:
        canvas.paste(Image.fromarray(image), (x, TOP - 1))
        x += image.shape[1]
    x = left
    for image in images:
        _framed(canvas, image, x, TOP)
        x += image.shape[1] + GAP
    write(left, TOP - 11, title, 15, TITLE_INK, "ls")
    write((left + right) // 2, bottom + 34, x_label, 13, INK, "ms")
    for x, text in x_ticks:
        draw.line((left + x, bottom, left + x, bottom + 4), FRAME)
        write(left + x, bottom + 16, str(text), 12, FAINT_INK, "ms")
    for y, text in y_ticks:
        draw.line((left - 5, TOP + y, left - 1, TOP + y), FRAME)
        write(left - 8, TOP + y, str(text), 12, FAINT_INK, "rm")
    label = Image.new("RGB", (size[1], 18), "white")  # lying, then upright
    middle = size[1] - TOP - height // 2
    ImageDraw.Draw(label).text((middle, 9), y_label, INK, font(13), "mm")
    canvas.paste(label.transpose(Image.Transpose.ROTATE_90), (6, 0))
    return np.array(canvas)


def _framed(canvas, image, x, y):
    Image, ImageDraw, _ = _pillow()
    box = (x - 1, y - 1, x + image.shape[1], y + image.shape[0])
    ImageDraw.Draw(canvas).rectangle(box, outline=FRAME)
    canvas.paste(Image.fromarray(image), (x, y))


def _colour_bar(height, low=0.0, high=1.0, palette=SEQUENTIAL, name="", **more):
    Image, ImageDraw, font = _pillow()
    canvas = Image.new("RGB", (RIGHT, height + (22 if name else 2)), "white")
    draw = ImageDraw.Draw(canvas)
    values = np.linspace(high, low, height)[:, None]
    bar = colorize(values, low, high, palette, **more)
    _framed(canvas, _enlarge(bar, 10, 1), 12, 1)
    draw.text((28, 0), f"{high:.3g}", FAINT_INK, font(12), "lt")
    draw.text((28, height + 2), f"{low:.3g}", FAINT_INK, font(12), "ls")
    draw.text((11, height + 17), name, FAINT_INK, font(12), "ls")
    return np.array(canvas)


def _legend(labels, banded):
    """A row for each label, with its line and, for several runs, its band."""
    Image, ImageDraw, font = _pillow()
    size = 52 + _widest(12, labels) + GAP, 20 * len(labels) + 6
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, colour, band) in enumerate(zip(labels, LINES, banded)):
        y = 20 * row + 10
        if band:
            draw.rectangle((16, y - 6, 41, y + 6), _tint(colour, BAND))
        draw.rectangle((16, y - 1, 41, y + 1), tuple(colour))
        draw.text((50, y + 4), label, INK, font(12), "ls")
    return np.array(canvas)


def _tint(colour, strength):
    """What `colour` of that opacity looks like on white."""
    tinted = 255 - strength * (255 - np.asarray(colour))
    return tuple(tinted.round().astype(int))


def _runs(name, x, y):
    """x (P,) and y (S, P), with NaN for what is infinite."""
    x = _array(x, name + "[0]", "(P,)")
    y = np.expand_dims(y, 0) if np.ndim(y) == 1 else y
    y = _array(y, name + "[1]", "(S, P)", " or (P,)")
    if y.shape[1:] != x.shape:
        raise ValueError(
            f"`{name}` must hold as many y as x, since each point has both. "
            f"Received: x {x.shape}, y {y.shape}."
        )
    if not (np.isfinite(x).all() and np.all(np.diff(x) > 0)):
        raise ValueError(
            f"`{name}[0]` must be finite and increase, since a line is drawn "
            f"from left to right. Received: {x}."
        )
    return x, np.where(np.isfinite(y), y, np.nan)


def _plot(lines, marks, x_ticks, y_ticks, size):
    """Draws within the frame; all in pixels.

    Args:
        lines: list of (x (P,), y (S, P), mean y (P,)), in the order of `LINES`.
        marks: list of (text, x), from left to right.
        x_ticks: list of (x, text), of which the grid needs the first.
        y_ticks: list of (y, text), likewise.
        size: (width, height).

    Returns:
        (height, width, 3) uint8 image.
    """
    Image, ImageDraw, font = _pillow()
    width, height = size
    canvas = Image.new("RGB", (width * FINE, height * FINE), "white")
    draw = ImageDraw.Draw(canvas)
    for x, _ in x_ticks:
        _box(draw, x, 0, x, height, GRID)
    for y, _ in y_ticks:
        _box(draw, 0, y, width, y, GRID)
    coloured = [(*line, tuple(colour)) for line, colour in zip(lines, LINES)]
    several = [line for line in coloured if len(line[1]) > 1]
    for x, runs, _, colour in several:
        band = Image.new("L", canvas.size)
        edges = np.stack([x, runs.min(axis=0), runs.max(axis=0)], axis=-1)
        for piece in _pieces(edges):
            _fill(ImageDraw.Draw(band), piece, round(255 * BAND))
        canvas.paste(colour, mask=band)
    for x, runs, _, colour in several:
        for run in runs:
            for piece in _pieces(np.stack([x, run], axis=-1)):
                _line(draw, piece, _tint(colour, 0.5), 1)
    for row, (_, x) in enumerate(marks):
        for y in range(MARK_ROW * row + 3, height, 8):
            _box(draw, round(x), y, round(x), y + 4, FAINT_INK)
    for x, _, mean, colour in coloured:
        for piece in _pieces(np.stack([x, mean], axis=-1)):
            _line(draw, piece, colour, 3, len(x) * 16 <= width)
    plot = canvas.reduce(FINE)
    draw = ImageDraw.Draw(plot)
    for row, (text, x) in enumerate(marks):
        room = _widest(12, [text]) + 5
        start = x + 5 if x + room < width else max(2, x - room)
        place = round(start), MARK_ROW * row + 15
        box = draw.textbbox(place, text, font(12), "ls")
        draw.rectangle(box, "white")
        draw.text(place, text, FAINT_INK, font(12), "ls")
    return np.array(plot)


def _pieces(points):
    """Splits (P, K) points where one is NaN, into arrays without."""
    there = ~np.isnan(points).any(axis=1)
    cuts = np.flatnonzero(np.diff(there)) + 1
    pieces = np.split(points, cuts)
    return pieces[0 if there[0] else 1 :: 2]


def _fine(pixels):
    """The place, in the enlarged drawing, of the middle of pixels."""
    return (np.asarray(pixels) + 0.5) * FINE - 0.5


def _box(draw, left, top, right, bottom, ink):
    """Fills whole pixels, the last ones included."""
    end = FINE - 1
    corners = np.multiply([left, top, right, bottom], FINE) + [0, 0, end, end]
    draw.rectangle(corners.tolist(), ink)


def _fill(draw, piece, ink):
    """Fills between the edges (P, 3): x, one y, and another."""
    if len(piece) == 1:
        piece = piece + [[-1.5, 0, 0], [1.5, 0, 0]]
    x, one, other = _fine(piece).T
    for start in range(0, len(x) - 1, 15):  # long polygons are slow
        part = slice(start, start + 16)
        there, back = np.c_[x, one][part], np.c_[x, other][part][::-1]
        draw.polygon(np.r_[there, back].ravel().tolist(), ink)


def _line(draw, piece, ink, width, dots=False):
    """Joins points (P, 2), and dots them all if `dots` or there is one."""
    piece = _fine(piece)
    if len(piece) > 1:
        draw.line(piece.ravel().tolist(), ink, width * FINE, "curve")
    radius = (width + 1) * FINE
    for x, y in piece if dots or len(piece) == 1 else []:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), ink)


def _headline(title):
    Image, ImageDraw, font = _pillow()
    size = LEFT + _widest(20, [title]) + GAP, 36
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((LEFT, 32), title, TITLE_INK, font(20), "ls")
    return np.array(canvas)


def _pillow():
    try:
        from PIL import Image
        from PIL import ImageDraw
    except ImportError as error:
        raise ImportError(
            "`keras_memory.visualization` needs Pillow to write text into "
            "images and to encode them. Install it with `pip install Pillow`."
        ) from error
    return Image, ImageDraw, _font


@functools.cache
def _font(points):
    from PIL import ImageFont

    return ImageFont.load_default(points)


def _widest(points, texts):
    """Pixels that the widest of some texts takes."""
    _, _, font = _pillow()
    return max((int(font(points).getlength(t)) for t in texts), default=0)


def _widened(images, below=0):
    """Adds white: right, to the width of the widest, and rows below."""
    widest = max(one.shape[1] for one in images)
    return [
        np.pad(
            one,
            ((0, below), (0, widest - one.shape[1]), (0, 0)),
            constant_values=255,
        )
        for one in images
    ]


def _array(values, name, shape, alternative=""):
    """`values` as floats, if they have the axes that `shape` names."""
    values = np.asarray(values, "float64")
    axes = shape.strip("(,)").split(",")
    if values.ndim != len(axes):
        raise ValueError(
            f"`{name}` must have the shape {shape}{alternative}, without a "
            f"batch axis, to be drawn. Received: shape {values.shape}."
        )
    if not values.size:
        raise ValueError(
            f"`{name}` must have no empty axis, since nothing would be drawn. "
            f"Received: shape {values.shape}."
        )
    return values


def _same_length(arrays):
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "All must have as many time steps (columns of a panel), since they "
            f"share one axis. Received: {lengths}."
        )


def _image(image):
    image = np.asarray(image)
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            "An image must be a uint8 array (H, W, 3), for red, green and "
            f"blue. Received: {image.dtype} of shape {image.shape}."
        )
    return image
