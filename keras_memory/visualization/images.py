"""Images: figures as arrays, PNG and GIF files.

An image is an array (height, width, 3) of uint8.
"""

import base64
import io

import matplotlib as mpl
import matplotlib.animation
import matplotlib.figure
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_memory.checks import check_array
from keras_memory.checks import check_closed

LINES = (  # Okabe and Ito: colour-blind readers tell them apart
    "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #882255".split()
)
WIDTH = 6.4  # inches, of a figure
SEQUENTIAL = "viridis"  # for values from zero on; readable in grey
DPI = 100  # pixels an inch


class Figure(mpl.figure.Figure):
    """A Matplotlib figure that a notebook shows without pyplot."""

    def __init__(self, size, **options):
        super().__init__(size, DPI, facecolor="white", **options)

    def _repr_png_(self):
        return to_png(to_image(self))


def to_image(figure):
    """The picture of a figure: (H, W, 3) uint8, at the figure's `dpi`."""
    before = figure.canvas
    canvas = FigureCanvasAgg(figure)
    try:
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    finally:
        figure.set_canvas(before)


def to_png(image, software="keras_memory"):
    """The bytes of a PNG file of an image, (H, W, 3) uint8.

    `software` is stored in the file, under the key "Software".
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text, stream = PngInfo(), io.BytesIO()
    text.add_text("Software", software)
    Image.fromarray(_image(image)).save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


def to_gif(images, milliseconds=200):
    """The bytes of a GIF file that shows images again and again.

    Args:
        images: list of (H, W, 3) uint8 arrays of one size. They share one
            palette, so that no color flickers.
        milliseconds: how long each is shown, at least 10.
    """
    from PIL import Image

    check_closed("milliseconds", milliseconds, 10)
    images = [_image(image) for image in images]
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        raise ValueError(
            "`images` must be at least one, and of one size. Received: "
            f"{len(images)} images, of shapes {shapes}"
        )
    some = np.concatenate([*images[:: len(images) // 4 + 1], images[-1]])
    palette = Image.fromarray(some).quantize(256)
    first, *others = (
        Image.fromarray(image).quantize(palette=palette, dither=0)
        for image in images
    )
    stream = io.BytesIO()
    options = {"append_images": others, "duration": milliseconds, "loop": 0}
    first.save(stream, "GIF", save_all=True, **options)
    return stream.getvalue()


def _image(image):
    image = np.asarray(image)
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            "An image must be (H, W, 3) uint8. "
            f"Received: {image.dtype} of shape {image.shape}"
        )
    return image


class Redrawn:
    """A figure of which only images and the title change: all else is drawn
    once, but for what lies over images."""

    def __init__(self, figure):
        self.figure, self.changing = figure, [*figure.texts]
        for ax in figure.axes:
            self.changing += [*ax.images, *ax.patches, *ax.spines.values()]
        before, self._canvas = figure.canvas, FigureCanvasAgg(figure)
        for artist in self.changing:
            artist.set_animated(True)
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(figure.bbox)
        for artist in self.changing:
            artist.set_animated(False)
        figure.set_canvas(before)

    def image(self):
        """The picture now: (H, W, 3) uint8."""
        self._canvas.restore_region(self._still)
        for artist in self.changing:
            artist.draw(self._canvas.get_renderer())
        return np.asarray(self._canvas.buffer_rgba())[:, :, :3].copy()


class Animation(mpl.animation.FuncAnimation):
    """A Matplotlib animation that a notebook shows, as a GIF.

    `save("memory.gif", writer="pillow")` writes a file. `images` takes less
    time, as only what changes is drawn.
    """

    def __init__(self, figure, update, steps, milliseconds):
        self._given = figure, update, list(steps), milliseconds
        super().__init__(figure, update, list(steps), interval=milliseconds)

    def images(self):
        """The frames: list of (H, W, 3) uint8."""
        figure, update, steps, _ = self._given
        redrawn = Redrawn(figure)
        return [redrawn.image() for step in steps if update(step)]

    def _repr_html_(self):
        data = base64.b64encode(to_gif(self.images(), self._given[3])).decode()
        return f'<img src="data:image/gif;base64,{data}">'


def numbers(name, values, axes, sizes=None):
    """An array of floats, without an empty axis."""
    sizes = {} if sizes is None else sizes
    values = check_array(name, values, axes, sizes, "any", result="numpy")
    if not values.size:
        raise ValueError(
            f"`{name}` must have no empty axis. Received: shape {values.shape}"
        )
    return values.astype("float64")


def check_length(name, values, count):
    """Raises ValueError unless `values` has as many entries."""
    if len(values) != count:
        raise ValueError(
            f"`{name}` must be {count}, one for each part that is drawn. "
            f"Received: {len(values)}"
        )


def write_labels(ax, title=None, x_label=None, y_label=None):
    """Writes what is not None at the sides of axes."""
    if title is not None:
        ax.set_title(title, loc="left", fontsize=10, pad=4)
    if x_label is not None:
        ax.set_xlabel(x_label, fontsize=10)
    if y_label is not None:
        ax.set_ylabel(y_label, fontsize=10)
