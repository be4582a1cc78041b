"""Draws rows of images with texts, and the examples behind answers."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from keras_memory.checks import NO_LABEL
from keras_memory.checks import check_labels
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.visualization.images import LINES
from keras_memory.visualization.images import SEQUENTIAL
from keras_memory.visualization.images import Drawn
from keras_memory.visualization.images import Figure
from keras_memory.visualization.images import check_axes
from keras_memory.visualization.images import check_list
from keras_memory.visualization.images import numbers
from keras_memory.visualization.images import require

WRONG = "#a00000"  # dark red


class Tile(NamedTuple):
    """An image for `plot_tiles`.

    Fields:
        image: (H, W), (H, W, 1) or (H, W, 3), in [0, 1].
        caption: a short text, in the color of the frame.
        text: up to three lines between caption and image.
        color: of frame and caption; None for gray.
        heat: (H, W) or (H, W, C), such as attributions, or None. The positive
            part of its sum over channels is drawn below, over the faint image.
    """

    image: Array
    caption: str = ""
    text: str = ""
    color: str | None = None
    heat: Array | None = None


def plot_tiles(
    rows: Sequence[Sequence[Tile]], ax: Axes | Iterable[Axes] | None = None
) -> Drawn:
    """Draws rows of images, with texts above and heat maps below.

    Args:
        rows: list of lists of `Tile`. The first tile of a row stands apart.
        ax: axes; None for a new figure.
    """
    rows = [check_list("rows", row) for row in check_list("rows", rows)]
    is_right = all(isinstance(tile, Tile) for row in rows for tile in row)
    require(is_right, "rows", "be rows of `Tile`", rows)
    return _draw([[_checked(tile, "rows") for tile in row] for row in rows], ax)


def _checked(tile, name, of_heat="rows"):
    """A tile with its image as (H, W, 3) and its heat map as (H, W)."""
    image, heat = check_shades(name, tile.image), tile.heat
    if heat is not None:
        heat = numbers(of_heat, heat, (*image.shape[:2], "C?"))
        heat = np.nan_to_num(heat).sum(axis=2).clip(0)
    return tile._replace(image=image, heat=heat)


def _draw(rows, ax):
    """Draws tiles with images (H, W, 3) and heat maps (H, W)."""
    apart = 0.15  # inches; the longer side of an image is 1 inch
    places, bottom = [], 0.0
    for row in rows:
        texts = [_fitted(tile.text, 10, 3) for tile in row]
        above = 0.1 + 0.16 * max(map(len, texts))
        left, top = apart, bottom + above + 0.16 + apart / 2
        for index, (tile, lines) in enumerate(zip(row, texts)):
            places.append((left, top, tile, lines))
            left += 1 + apart + 0.4 * (index == 0 and len(row) > 1)
        bottom = top + 1 + 1.08 * any(tile.heat is not None for tile in row)
    right = max(left for left, *_ in places) + 1 + apart
    bottom += apart
    if ax is None:
        ax = Figure((right, bottom)).add_axes((0, 0, 1, 1))
    (ax,) = check_axes(ax)
    for left, top, (image, caption, _, color, heat), lines in places:
        color = color or "0.3"
        parts = [image] if heat is None else [image, _heated(image, heat)]
        height, width = np.divide(image.shape[:2], max(image.shape[:2]))
        caption, high = *_fitted(caption, 8, 1), 0.08 + 0.16 * len(lines)
        options = {"fontsize": 8, "color": color, "parse_math": False}
        ax.text(left, top - high, caption, **options)
        options |= {"fontsize": 10, "color": "0.1"}
        ax.text(left, top - 0.06, "\n".join(lines), **options)
        for y, part in zip((top, top + 1.08), parts):
            extent = left, left + width, y + height, y
            ax.imshow(part, extent=extent, interpolation="nearest")
            frame = {"fill": False, "ec": color, "lw": 2}
            ax.add_patch(Rectangle((left, y), width, height, **frame))
    ax.set(xlim=(0, right), ylim=(bottom, 0))
    ax.set_axis_off()
    return ax.figure


def plot_explanations(
    explanations: Sequence[Any],
    inputs: Array | None = None,
    labels: Array | None = None,
    class_names: Sequence[str] | None = None,
    max_examples: int = 6,
    attributions: Sequence[Sequence[Array]] | None = None,
    ax: Axes | Iterable[Axes] | None = None,
) -> Drawn:
    """Draws inputs beside the examples that decided the answers.

    Each input has a row, with the example of the largest weight first. Wrong
    answers are marked.

    Args:
        explanations: list of `keras_memory.explanations.Explanation`.
        inputs: an image in [0, 1] for each explanation; None for the
            explained inputs.
        labels: (B,) int or (B, units) one-hot, the true classes, -1 for an
            unknown one; None if all are unknown.
        class_names: a text for each class; None for numbers.
        max_examples: int, the largest number of examples in a row.
        attributions: for each explanation a pair from `integrated_gradients`,
            of the input and of the examples; or None.
        ax: axes; None for a new figure.
    """
    check_size("max_examples", max_examples)
    explanations = check_list("explanations", explanations)
    is_right = all(hasattr(why, "is_example") for why in explanations)
    require(is_right, "explanations", "be `Explanation`", explanations)
    if labels is not None:
        labels = check_labels(labels, len(explanations), name="labels")
    inputs = [why.input for why in explanations] if inputs is None else inputs
    inputs = check_list("inputs", inputs, len(explanations))
    if attributions is not None:
        check_list("attributions", attributions, len(explanations))

    def name(label):
        try:
            return str(label if class_names is None else class_names[label])
        except (TypeError, LookupError):
            wanted = f"be texts, also one for class {label}"
            require(False, "class_names", wanted, class_names)

    rows = []
    for index, why in enumerate(explanations):
        is_known = inputs[index] is not None and why.inputs is not None
        wanted = "have inputs, which a saved model lacks: call `set_memory`"
        require(is_known, "explanations", wanted, "a memory of encodings")
        heat, example_heats = None, [None] * len(why.inputs)
        if attributions is not None:
            heat, example_heats = check_list(
                "attributions", attributions[index], 2
            )
            example_heats = check_list(
                "attributions", example_heats, len(why.inputs)
            )
        caption, text, color = "answer", name(why.prediction), None
        label = NO_LABEL if labels is None else labels[index]
        if label == why.prediction:
            caption = "right answer"
        elif label != NO_LABEL:
            caption, color = "WRONG answer", WRONG
            text += f", is {name(label)}"
        tile = Tile(inputs[index], caption, text, color, heat)
        row = [_checked(tile, "inputs", "attributions")]
        for rank in range(min(max_examples, len(example_heats))):
            kind = 0 if why.is_example[rank] else 1
            predicted, label = why.classes[rank], why.labels[rank]
            text = f"{why.weights[rank]:.2f}: {name(predicted)}"
            if label not in (NO_LABEL, predicted):
                text += f", is {name(label)}"
            caption = ("example", "counterfactual")[kind]
            tile = (
                why.inputs[rank],
                caption,
                text,
                LINES[kind],
                example_heats[rank],
            )
            row.append(_checked(Tile(*tile), "explanations", "attributions"))
        rows.append(row)
    return _draw(rows, ax)


def check_shades(name, image):
    """Checks an image in [0, 1], gray or color; returns (H, W, 3)."""
    values = numbers(name, image, ("H", "W", "C?"))
    wanted = "be images (H, W), (H, W, 1) or (H, W, 3)"
    require(values.shape[2] in (1, 3), name, wanted, f"shape {values.shape}")
    low, high = values.min(), values.max()
    wanted = "be images in [0, 1]: undo their normalization"
    got = f"values from {low:.3g} to {high:.3g}"
    require(low >= -1e-6 and high <= 1 + 1e-6, name, wanted, got)
    return np.repeat(values.clip(0, 1), 3 // values.shape[2], axis=2)


def _heated(image, heat):
    """A heat map over the faint image."""
    heat = heat / (heat.max() or 1.0)
    colors = mpl.colormaps[SEQUENTIAL](heat)[:, :, :3]
    share = 0.25 + 0.65 * heat[:, :, None]
    gray = 0.69 + 0.3 * image.mean(axis=2, keepdims=True)
    return share * colors + (1 - share) * gray


def _fitted(text, size, max_lines):
    """Breaks a text into lines as wide as a tile; too long ones end in "…"."""

    def is_wide(line):
        line = line.replace("$", r"\$")  # do not parse it as a formula
        return TextPath((0, 0), line, size).get_extents().width > 75  # points

    lines = []
    for word in str(text)[:80].split():
        longer = " ".join([*lines[-1:], word])
        if len(lines) < max_lines and (not lines or is_wide(longer)):
            lines.append(word)
        else:
            lines[-1] = longer
    for index in range(len(lines)):
        while is_wide(lines[index]):
            lines[index] = lines[index][:-2].rstrip() + "…"
    return lines or [""]
