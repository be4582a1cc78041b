"""Pictures of memory: arrays in, image arrays out.

An image is a uint8 array (height, width, 3). Nothing here knows of files,
models or TensorBoard. Every panel begins its cells at pixel row `TOP`, pixel
column `LEFT`, so stacked panels with equally wide cells share their time axis.
Slots, heads, bits and time steps count from 0, slot 0 at the top.
"""

import io

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

TOP, LEFT, RIGHT, GAP = 34, 64, 76, 8  # pixels around and between the cells
PLOT_WIDTH, PLOT_HEIGHT = 640, 400  # what the size of a cell is chosen for
MOST_ROWS = 512  # with more, neighbours share a cell
TITLE_INK, INK, FAINT_INK, FRAME = "#262626", "#404040", "#5c5c5c", "#8c8c8c"


def colorize(values, low=0.0, high=1.0, palette=SEQUENTIAL):
    """Turns numbers into colours, by a scale that is even to the eye.

    Args:
        values: (rows, columns) numbers; those outside of `low` to `high` are
            clipped, and NaN gets `NAN_COLOUR`.
        low: the number at the palette's first colour.
        high: the number at the palette's last colour; above `low`.
        palette: (K, 3) anchor colours, 0 to 255, evenly spread over the scale.

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
    place = np.where(missing, 0.0, place) * (len(palette) - 1)
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
        (low, high, palette),
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
    widest = max(one.shape[1] for one in panels)
    rows = []
    for one in panels:
        padding = ((0, GAP), (0, widest - one.shape[1]), (0, 0))
        rows.append(np.pad(one, padding, constant_values=255))
    return np.concatenate(rows)[:-GAP]


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
    return _over_time(_heads(weighting, title))


def target_and_output(target, output, mask=None):
    """Draws target, output and their absolute difference, bits over time.

    Args:
        target: (T, bits) in 0 to 1.
        output: (T, bits) in 0 to 1: probabilities, not logits.
        mask: (T,), zero at steps outside the loss, which are greyed out.

    Returns:
        (H, W, 3) uint8 image: three panels on one time axis.

    Raises:
        ValueError: the shapes do not fit one another.
    """
    return _over_time(_bits(target, output, mask))


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
    if frames < 1:
        raise ValueError(
            "`frames` must be at least 1, since a strip without frames shows "
            f"nothing. Received: frames={frames}."
        )
    last, shown = len(memory) - 1, min(frames, len(memory))
    steps = np.linspace(last, 0, shown).round().astype(int)[::-1]
    reach = np.abs(memory[np.isfinite(memory)]).max(initial=0.0) or 1.0
    moments = [_strongest(memory[step]) for step in steps]
    (rows, columns), block = moments[0][0].shape, moments[0][1]
    width = min(max(1, ((PLOT_WIDTH + GAP) // shown - GAP) // columns), 16)
    _, height = _cell(rows, columns)
    colours = [colorize(m, -reach, reach, DIVERGING) for m, _ in moments]
    centres = np.arange(shown) * (columns * width + GAP) + columns * width // 2
    return _figure(
        [_enlarge(one, width, height) for one in colours],
        title,
        ("contents after time step", np.stack([centres, steps], axis=-1)),
        _slot_axis("slot", rows, height, block),
        (-reach, reach, DIVERGING),
    )


def task_picture(inputs, targets, outputs, mask, trace, title):
    """Composes all of one sequence; a column is one time step throughout.

    Args:
        inputs: (T, channels) in 0 to 1.
        targets: (T, bits) in 0 to 1.
        outputs: (T, bits) in 0 to 1: probabilities, not logits.
        mask: (T,), zero at steps outside the loss; None if all count.
        trace: dict with "write_weighting" (T, H, N), "read_weighting"
            (T, R, N) and, to add a film strip, "memory" (T, N, W).
        title: the headline.

    Returns:
        (H, W, 3) uint8 image.

    Raises:
        ValueError: a weighting is absent, or shapes do not fit one another.
    """
    if not {"write_weighting", "read_weighting"} <= set(trace):
        raise ValueError(
            "`trace` must hold 'write_weighting' and 'read_weighting', which "
            f"the picture shows. Received: keys {sorted(trace)}."
        )
    inputs = _array(inputs, "inputs", "(T, channels)")
    rows = [("Input", inputs, {"y_label": "channel"})]
    rows += _bits(targets, outputs, mask)
    rows += _heads(trace["write_weighting"], "Write weighting")
    rows += _heads(trace["read_weighting"], "Read weighting")
    panels = [_over_time(rows, PLOT_HEIGHT * 2 // 3)]
    if "memory" in trace:
        _same_length({"Input": inputs, "memory": trace["memory"]})
        panels.append(memory_film_strip(trace["memory"]))
    return stack(panels, title)


def encode_png(image):
    """Encodes a (H, W, 3) uint8 image as the bytes of a PNG file."""
    Image, _, _ = _pillow()
    stream = io.BytesIO()
    Image.fromarray(_image(image)).save(stream, "PNG", optimize=True)
    return stream.getvalue()


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
    codes = [frame @ np.array([1 << 16, 1 << 8, 1]) for frame in frames]
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


def _heads(weighting, title):
    if np.ndim(weighting) == 2:
        weighting = np.expand_dims(weighting, 1)
    weighting = _array(weighting, "weighting", "(T, heads, N)", " or (T, N)")
    heads = range(weighting.shape[1])
    names = [f"{title}, head {h}" if len(heads) > 1 else title for h in heads]
    return [(names[h], weighting[:, h], {}) for h in heads]


def _bits(target, output, mask):
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
    options = {"y_label": "bit", "mask": mask}
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
    steps = (m * 10**e for e in range(9) for m in (1, 2, 5))
    step = next(step for step in steps if step * cell >= spacing * block)
    numbers = range(0, count * block, step)
    return [(n // block * cell + cell // 2, n) for n in numbers]


def _grey(colours):
    """Takes the hue and most of the contrast away."""
    luminance = colours @ np.array([[0.3], [0.59], [0.11]])
    return (175 + 0.3 * luminance).astype("uint8")


def _enlarge(image, width, height):
    return image.repeat(height, axis=0).repeat(width, axis=1)


def _figure(images, title, x_axis, y_axis, scale):
    """Puts title, axes and a colour bar around images, side by side."""
    Image, ImageDraw, font = _pillow()
    (x_label, x_ticks), (y_label, y_ticks) = x_axis, y_axis
    low, high, palette = scale
    height = images[0].shape[0]
    right = LEFT + sum(image.shape[1] + GAP for image in images) - GAP
    bottom = TOP + height
    title_end = LEFT + int(font(15).getlength(title)) + GAP
    size = max(right + RIGHT, title_end), bottom + (42 if x_label else 22)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)

    def write(x, y, text, points, ink, anchor):
        draw.text((x, y), text, ink, font(points), anchor)

    def frame(image, left):
        box = (left - 1, TOP - 1, left + image.shape[1], bottom)
        draw.rectangle(box, outline=FRAME)
        canvas.paste(Image.fromarray(image), (left, TOP))

    left = LEFT
    for image in images:
        frame(image, left)
        left += image.shape[1] + GAP
    write(LEFT, TOP - 11, title, 15, TITLE_INK, "ls")
    write((LEFT + right) // 2, bottom + 34, x_label, 13, INK, "ms")
    for x, number in x_ticks:
        draw.line((LEFT + x, bottom, LEFT + x, bottom + 4), FRAME)
        write(LEFT + x, bottom + 7, str(number), 12, FAINT_INK, "mt")
    for y, number in y_ticks:
        draw.line((LEFT - 5, TOP + y, LEFT - 1, TOP + y), FRAME)
        write(LEFT - 8, TOP + y, str(number), 12, FAINT_INK, "rm")
    label = Image.new("RGB", (size[1], 18), "white")  # lying, then upright
    middle = size[1] - TOP - height // 2
    ImageDraw.Draw(label).text((middle, 9), y_label, INK, font(13), "mm")
    canvas.paste(label.transpose(Image.Transpose.ROTATE_90), (6, 0))

    bar = colorize(np.linspace(high, low, height)[:, None], low, high, palette)
    frame(_enlarge(bar, 10, 1), right + 12)
    write(right + 28, TOP - 1, f"{high:.3g}", 12, FAINT_INK, "lt")
    write(right + 28, bottom + 1, f"{low:.3g}", 12, FAINT_INK, "ls")
    return np.array(canvas)


def _headline(title):
    Image, ImageDraw, font = _pillow()
    size = LEFT + int(font(20).getlength(title)) + GAP, 36
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((LEFT, 32), title, TITLE_INK, font(20), "ls")
    return np.array(canvas)


def _pillow():
    try:
        from PIL import Image
        from PIL import ImageDraw
        from PIL import ImageFont
    except ImportError as error:
        raise ImportError(
            "`keras_memory.visualization` needs Pillow to write text into "
            "images and to encode them. Install it with `pip install Pillow`."
        ) from error
    return Image, ImageDraw, lambda points: ImageFont.load_default(points)


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
