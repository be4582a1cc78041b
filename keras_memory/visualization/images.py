"""Images, (height, width, 3) uint8: from figures, to PNG and GIF files."""

import base64
import io
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

import matplotlib as mpl
import matplotlib.animation
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_memory.checks import check_array
from keras_memory.checks import check_closed
from keras_memory.hints import Array

LINES = (  # Okabe and Ito's, which color-blind readers can distinguish
    "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #882255".split()
)
WIDTH = 6.4  # inches, of a figure
SEQUENTIAL = "viridis"  # for values of at least 0; readable in gray
WIDTHS = 2.5, 300.0  # inches, the smallest and the largest width of a picture
DPI = 100  # pixels per inch
HUGE = 1e300  # the scale of larger numbers cannot be computed


class Figure(mpl.figure.Figure):
    """A Matplotlib figure that a notebook shows without pyplot."""

    def __init__(self, size: tuple[float, float], **options: Any):
        super().__init__(size, DPI, facecolor="white", **options)

    def _repr_png_(self):
        return to_png(to_image(self))


# If the caller passes axes, their figure; else a new one.
Drawn: TypeAlias = Figure | Any


def to_image(figure: mpl.figure.FigureBase) -> np.ndarray:
    """Renders a figure at its `dpi`: (H, W, 3) uint8.

    For a `SubFigure`, renders the whole figure.
    """
    is_figure = isinstance(figure, mpl.figure.FigureBase)
    require(is_figure, "figure", "be a figure of Matplotlib", figure)
    figure = figure.figure  # the root
    before = figure.canvas
    canvas = FigureCanvasAgg(figure)
    try:
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    finally:
        figure.set_canvas(before)


def to_png(image: np.ndarray, software: str = "keras_memory") -> bytes:
    """Encodes an image, (H, W, 3) uint8, as the bytes of a PNG file.

    `software` is stored under the key "Software".
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text, stream = PngInfo(), io.BytesIO()
    text.add_text("Software", str(software))
    Image.fromarray(_image("image", image)).save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


def to_gif(images: Sequence[np.ndarray], milliseconds: int = 200) -> bytes:
    """Encodes images as the bytes of a GIF file that repeats forever.

    Args:
        images: list of (H, W, 3) uint8 arrays of one size. They share one
            palette, so that no color flickers.
        milliseconds: how long each is shown, at least 10.
    """
    from PIL import Image

    check_closed("milliseconds", milliseconds, 10)
    images = [_image("images", image) for image in check_list("images", images)]
    shapes = sorted({image.shape for image in images})
    require(len(shapes) == 1, "images", "be of one size", f"shapes {shapes}")
    sample = np.concatenate([*images[:: len(images) // 4 + 1], images[-1]])
    palette = Image.fromarray(sample).quantize(256)
    first, *rest = (
        Image.fromarray(image).quantize(palette=palette, dither=0)
        for image in images
    )
    stream = io.BytesIO()
    options = {"append_images": rest, "duration": milliseconds, "loop": 0}
    first.save(stream, "GIF", save_all=True, **options)
    return stream.getvalue()


def _image(name, image):
    image = check_array(name, image, kind="any", result="numpy")
    wanted = image.dtype == "uint8" and image.shape[2:] == (3,) and image.size
    got = f"{image.dtype} of shape {image.shape}"
    require(wanted, name, "be (H, W, 3) uint8", got)
    return image


class Redrawn:
    """Redraws a figure fast (blitting).

    The background is rendered once, then only texts, images, and the patches
    and spines over images.
    """

    def __init__(self, figure):
        self.figure, self.changing = figure, [*figure.texts]
        for ax in figure.axes:
            self.changing += [*ax.images, *ax.patches, *ax.spines.values()]
        before, self._canvas = figure.canvas, FigureCanvasAgg(figure)
        try:
            mpl.artist.setp(self.changing, animated=True)
            self._canvas.draw()
            self._still = self._canvas.copy_from_bbox(figure.bbox)
        finally:
            mpl.artist.setp(self.changing, animated=False)
            figure.set_canvas(before)

    def image(self):
        """Renders the figure as it is now: (H, W, 3) uint8."""
        self._canvas.restore_region(self._still)
        for artist in self.changing:
            artist.draw(self._canvas.get_renderer())
        return np.asarray(self._canvas.buffer_rgba())[:, :, :3].copy()


class Animation(mpl.animation.FuncAnimation):
    """A Matplotlib animation that a notebook shows, as a GIF.

    `save("memory.gif", writer="pillow")` writes a file. `images` is faster, as
    it redraws only the parts that change.
    """

    def __init__(
        self,
        figure: Figure,
        update: Callable[[Any], Any],
        steps: Iterable[Any],
        milliseconds: Array,
    ):
        self._given = figure, update, list(steps), milliseconds
        super().__init__(figure, update, list(steps), interval=milliseconds)

    def images(self) -> list[np.ndarray]:
        """The frames: list of (H, W, 3) uint8."""
        figure, update, steps, _ = self._given
        redrawn, images = Redrawn(figure), []
        for step in steps:
            update(step)
            images.append(redrawn.image())
        return images

    def _repr_html_(self):
        data = base64.b64encode(to_gif(self.images(), self._given[3])).decode()
        return f'<img src="data:image/gif;base64,{data}">'


def require(is_right, name, wanted, got):
    """Raises ValueError unless `is_right`."""
    if not is_right:
        got = got if isinstance(got, str) else f"{got!r:.300}"
        raise ValueError(f"`{name}` must {wanted}. Received: {got}")


def numbers(name, values, axes, sizes=None, shares=False):
    """Checks an array and returns it as float64. No axis may be empty; an axis
    whose name ends in "?" may be missing and then has size 1. Infinities and
    numbers beyond `HUGE` become NaN. With `shares`, values must be in [0, 1],
    up to float16 rounding, or NaN."""
    values = check_array(name, values, kind="any", result="numpy")
    optional = [i for i, axis in enumerate(axes) if str(axis)[-1] == "?"]
    if values.ndim == len(axes) - len(optional):
        values = np.expand_dims(values, optional)
    check_array(name, values, axes, sizes, "any", result="given")
    require(values.size, name, "have no empty axis", values.shape)
    values = values.astype("float64")
    if shares:
        low, high = np.fmin.reduce(values, None), np.fmax.reduce(values, None)
        is_right, got = not (low < -0.02 or high > 1.02), f"{low:g} to {high:g}"
        require(is_right, name, "be in [0, 1], or NaN", got)
        values = values.clip(0, 1)
    return np.where(np.abs(values) <= HUGE, values, np.nan)


def check_list(name, values, count=None):
    """Checks values; returns a list of `count`, or of at least one."""
    is_list = np.iterable(values) and not isinstance(values, (dict, str))
    items = list(values) if is_list else []
    wanted = f"be a list of {count or 'at least one'}"
    got = len(items) if is_list else values
    require(items and len(items) == (count or len(items)), name, wanted, got)
    return items


def check_dict(name, values, what):
    """Checks a dict; returns it with strings as keys."""
    require(isinstance(values, dict), name, f"be a dict of {what}", values)
    return {str(key): value for key, value in values.items()}


def check_axes(ax, count=1):
    """Checks axes of Matplotlib; returns a list of `count`."""
    axes = check_list("ax", np.ravel(np.asarray(ax, object)), count)
    is_right = all(isinstance(item, Axes) for item in axes)
    require(is_right, "ax", f"be {count} axes of Matplotlib", ax)
    return axes


def write_labels(ax, title=None, x_label=None, y_label=None):
    """Writes the title and labels of axes that are not None."""
    if title is not None:
        ax.set_title(title, loc="left", fontsize=10, pad=4)
    if x_label is not None:
        ax.set_xlabel(x_label, fontsize=10)
    if y_label is not None:
        ax.set_ylabel(y_label, fontsize=10)
