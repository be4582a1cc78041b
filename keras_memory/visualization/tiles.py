"""Rows of images with words, and the examples behind answers."""

from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Rectangle

from keras_memory.checks import check_size
from keras_memory.visualization.images import LINES
from keras_memory.visualization.images import SEQUENTIAL
from keras_memory.visualization.images import Figure
from keras_memory.visualization.images import check_length

WRONG = "#a00000"  # dark red


class Tile(NamedTuple):
    """An image for `plot_tiles`.

    Fields:
        image: (H, W), (H, W, 1) or (H, W, 3), in [0, 1].
        caption: a short text, in the color of the frame.
        words: text below that, above the image.
        color: of the frame; None for grey. The first of a row stands apart.
        heat: (H, W) or (H, W, C), such as attributions: what is positive,
            summed over channels, is drawn below on the faint image; or None.
    """

    image: np.ndarray
    caption: str = ""
    words: str = ""
    color: str | None = None
    heat: np.ndarray | None = None


def plot_tiles(rows, ax=None):
    """Draws rows of images, with words above and heat maps below.

    Args:
        rows: list of lists of `Tile`.
        ax: axes; None for a new figure.
    """
    if not rows or not all(rows):
        raise ValueError(f"`rows` must be rows of tiles. Received: {rows!r}")
    apart, above = 0.15, 0.42  # inches, as is 1, the side of an image
    places, bottom = [], 0.0
    for row in rows:
        left, top = apart, bottom + above + apart / 2
        for tile in row:
            places.append((left, top, tile))
            left += 1 + apart + 0.4 * (tile is row[0] and len(row) > 1)
        bottom = top + 1 + 1.08 * any(tile.heat is not None for tile in row)
    right = max(left for left, _, _ in places) + 1 + apart
    bottom += apart
    if ax is None:
        ax = Figure((right, bottom)).add_axes((0, 0, 1, 1))
    for left, top, (image, caption, words, color, heat) in places:
        color, parts = color or "0.3", [check_shades(image)]
        if heat is not None:
            parts.append(_heated(parts[0], heat))
        height, width = np.divide(parts[0].shape[:2], max(parts[0].shape[:2]))
        ax.text(left, top - 0.24, caption, fontsize=8, color=color)
        ax.text(left, top - 0.06, words, fontsize=10, color="0.1")
        for y, part in zip((top, top + 1.08), parts):
            extent = left, left + width, y + height, y
            ax.imshow(part, extent=extent, interpolation="nearest")
            frame = {"fill": False, "ec": color, "lw": 2}
            ax.add_patch(Rectangle((left, y), width, height, **frame))
    ax.set(xlim=(0, right), ylim=(bottom, 0))
    ax.set_axis_off()
    return ax.figure


def plot_explanations(
    explanations,
    inputs=None,
    labels=None,
    class_names=None,
    most=6,
    attributions=None,
    ax=None,
):
    """Draws inputs beside the examples that decided the answers: a row each,
    the heaviest example first. Wrong answers are marked.

    Args:
        explanations: list of `keras_memory.explanations.Explanation`.
        inputs: an image in [0, 1] for each; None for those explained.
        labels: (B,) int, the true classes; None where they are not known.
        class_names: a text for each class; None for numbers.
        most: int, the largest number of examples in a row.
        attributions: a pair for each, as `integrated_gradients` gives it: of
            the input and of the examples; or None.
        ax: axes; None for a new figure.
    """
    check_size("most", most)
    if labels is not None:
        check_length("labels", labels, len(explanations))
    inputs = [why.input for why in explanations] if inputs is None else inputs
    check_length("inputs", inputs, len(explanations))

    def name(label):
        return str(label if class_names is None else class_names[label])

    rows = []
    for index, why in enumerate(explanations):
        if inputs[index] is None or why.inputs is None:
            raise ValueError(
                "The examples of the memory must be known to be drawn, and a "
                "saved model does not keep them: call `set_memory` again. "
                "Received: a memory of encodings"
            )
        heats = [None] * (1 + len(why.inputs))
        if attributions is not None:
            heats = [attributions[index][0], *attributions[index][1]]
        caption, words, color = "answer", name(why.prediction), None
        if labels is not None and labels[index] != why.prediction:
            caption, color = "WRONG answer", WRONG
            words += f", is {name(labels[index])}"
        elif labels is not None:
            caption = "right answer"
        row = [Tile(inputs[index], caption, words, color, heats[0])]
        for one in range(min(most, len(why.inputs))):
            kind = 0 if why.is_example[one] else 1
            seen, label = why.classes[one], why.labels[one]
            words = f"{why.weights[one]:.2f}: {name(seen)}"
            words += f", is {name(label)}" if label not in (-1, seen) else ""
            caption = ("example", "counterfactual")[kind]
            image, heat = why.inputs[one], heats[1 + one]
            row.append(Tile(image, caption, words, LINES[kind], heat))
        rows.append(row)
    return plot_tiles(rows, ax)


def check_shades(image):
    """An image in [0, 1], also a grey one, as (H, W, 3)."""
    image = np.asarray(image, "float64")
    values = image[:, :, None] if image.ndim == 2 else image
    if values.ndim != 3 or values.shape[2] not in (1, 3) or not values.size:
        raise ValueError(
            "An image must be (H, W), (H, W, 1) or (H, W, 3). "
            f"Received: shape {image.shape}"
        )
    if not (values.min() >= -1e-6 and values.max() <= 1 + 1e-6):
        raise ValueError(
            "An image must be in [0, 1] to be drawn: undo its normalization. "
            f"Received: values from {values.min():.3g} to {values.max():.3g}"
        )
    return np.repeat(values.clip(0, 1), 3 // values.shape[2], axis=2)


def _heated(image, heat):
    """The image, faint, under what is positive in `heat`."""
    heat = np.reshape(heat, (*image.shape[:2], -1)).sum(axis=2).clip(0)
    heat = heat / (heat.max() or 1.0)
    colors = mpl.colormaps[SEQUENTIAL](heat)[:, :, :3]
    share = 0.25 + 0.65 * heat[:, :, None]
    grey = 0.69 + 0.3 * image.mean(axis=2, keepdims=True)
    return share * colors + (1 - share) * grey
