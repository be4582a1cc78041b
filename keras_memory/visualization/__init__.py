"""Pictures of memory, drawn by Matplotlib.

Each `plot_` function returns a figure: Jupyter shows it, `savefig` writes it
as PNG, SVG or PDF, `to_image` makes an array of it. `ax` is axes to draw into,
or a list of them. Time runs to the right, slots run down; slots, heads and
time steps count from 0. Wrong shapes raise ValueError, as do weights, gates
and images outside [0, 1]. NaN is magenta in matrices, gray in `plot_sphere`, a
hole in curves, 0 in heat maps, an error in images. pyplot is not used.

>>> weighting = np.eye(5)[[0, 1, 2]]  # three steps, five slots
>>> figure = keras_memory.visualization.plot_weighting(weighting)
>>> figure.savefig("weighting.pdf")  # doctest: +SKIP
"""

from keras_memory.visualization.curves import plot_curves as plot_curves
from keras_memory.visualization.curves import plot_learning as plot_learning
from keras_memory.visualization.images import LINES as LINES
from keras_memory.visualization.images import Animation as Animation
from keras_memory.visualization.images import Figure as Figure
from keras_memory.visualization.images import to_gif as to_gif
from keras_memory.visualization.images import to_image as to_image
from keras_memory.visualization.images import to_png as to_png
from keras_memory.visualization.plots import animate as animate
from keras_memory.visualization.plots import plot_gates as plot_gates
from keras_memory.visualization.plots import plot_linkage as plot_linkage
from keras_memory.visualization.plots import plot_memory as plot_memory
from keras_memory.visualization.plots import plot_sphere as plot_sphere
from keras_memory.visualization.plots import plot_task as plot_task
from keras_memory.visualization.plots import plot_weighting as plot_weighting
from keras_memory.visualization.tiles import Tile as Tile
from keras_memory.visualization.tiles import (
    plot_explanations as plot_explanations,
)
from keras_memory.visualization.tiles import plot_tiles as plot_tiles
