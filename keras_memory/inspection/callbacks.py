"""Keras callbacks that show a memory while it learns."""

import pathlib
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_memory import addressing
from keras_memory import recurrent
from keras_memory.checks import check_bool
from keras_memory.checks import check_size
from keras_memory.files import atomic_write
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import PathLike
from keras_memory.inspection.probe import Probe
from keras_memory.inspection.probe import check_numbers
from keras_memory.inspection.probe import probe_picture
from keras_memory.recurrent.heads import by_place
from keras_memory.recurrent.heads import named_heads


class ProbePictures(keras.callbacks.Callback):
    """Draws how a model processes one fixed sequence, as it learns.

    Writes pictures of inputs, targets, outputs and weightings over time to
    `folder`: before the training, after every `every`-th epoch and at the end.
    They are named by the number of epochs done; `animation` makes a GIF of
    them. A training that starts from epoch 0 replaces earlier pictures. Other
    files stay: a mark in each picture identifies it.

    Args:
        probe_batch: (inputs, targets) or (inputs, targets, mask), such as a
            `tasks.Batch`, with inputs (B, T, D) and targets (B, T, units). The
            first sequence is drawn. Or a `Probe`, which callbacks can share.
        folder: folder for the files; it is made if absent.
        every: int, at least 0, epochs between pictures; 0 for none.
        title: function from the number of epochs done to the headline.

    Raises:
        ValueError: an argument is out of its range; or, when the training
            begins, probe or outputs are no sequences.
    """

    def __init__(
        self,
        probe_batch: Any,
        folder: PathLike,
        every: int = 1,
        title: Callable[[int], str] = "epoch {}".format,
    ):
        super().__init__()
        self.probe = Probe.of(probe_batch)
        self.folder = _path("folder", folder)
        self.every = check_size("every", every, least=0)
        self.title = _function("title", title)

    def on_train_begin(self, logs: Config | None = None) -> None:
        self._done = self._redrawn = None

    def on_epoch_begin(self, epoch: int, logs: Config | None = None) -> None:
        if self._done is None and self.every:
            self._done = epoch
            if epoch == 0:
                self._draw()
            for path in pictures(self.folder):  # of an interrupted training
                number = int(path.stem)
                if number > epoch or number % self.every:
                    path.unlink()

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        self._done = epoch + 1
        if self.every and self._done % self.every == 0:
            self._draw()

    def on_train_end(self, logs: Config | None = None) -> None:
        if self.every and self._done is not None and self._done % self.every:
            self._draw()

    def _draw(self):
        from keras_memory.visualization import images

        before = self._redrawn and self._redrawn.figure
        figure = probe_picture(
            self.probe.look(self.model),
            self.title(self._done),
            slots="all",
            figure=before,
        )
        if figure is not before:
            self._redrawn = images.Redrawn(figure)
        image = self._redrawn.image()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._done:08}.png"
        if path.exists() and not _is_marked(path):
            warnings.warn(
                f"{path} is not of `ProbePictures` and is not overwritten; "
                "choose a separate `folder` for the pictures",
                stacklevel=2,
            )
            return
        with atomic_write(path) as aside:
            aside.write_bytes(images.to_png(image, MARK))


MARK = "keras_memory.callbacks.ProbePictures"  # "Software" of a PNG


def _is_marked(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except OSError:  # no image
        return False


def pictures(folder: PathLike) -> list[pathlib.Path]:
    """Paths of the pictures of `ProbePictures` in a folder, in order."""
    paths = _path("folder", folder).glob("[0-9]" * 8 + ".png")
    return sorted(path for path in paths if _is_marked(path))


def animation(folder: PathLike, milliseconds: int = 400) -> bytes:
    """Makes a GIF of the pictures that `ProbePictures` wrote to a folder.

    Args:
        folder: path of the folder.
        milliseconds: how long a picture is shown.

    Returns:
        Bytes of a GIF file.

    Raises:
        FileNotFoundError: the folder has no pictures.
    """
    from PIL import Image

    from keras_memory.visualization import images

    frames = []
    for path in pictures(folder):
        with Image.open(path) as image:
            frames.append(np.asarray(image.convert("RGB")))
    if not frames:
        raise FileNotFoundError(
            "`folder` must have pictures of `ProbePictures` (`every` at least "
            "1; in a run, `picture_every`). "
            f"Received: {folder}, which has none"
        )
    # A run resumed with another version may have pictures of two sizes.
    size = np.max([frame.shape for frame in frames], axis=0)
    frames = [
        np.pad(frame, [(0, more) for more in size - frame.shape], "edge")
        for frame in frames
    ]
    return images.to_gif(frames + frames[-1:] * 5, milliseconds)


THUMBNAIL = 4.5  # inches, width of pictures for TensorBoard's columns


class MemoryTensorBoard(keras.callbacks.Callback):
    """Shows in TensorBoard what a memory does with one fixed batch.

    The model, which may be subclassed, has one or more recurrent layers of
    this library. For each layer TensorBoard gets

    - images of the first sequence: each weighting (slots over time, on the
      scale of `visualization.plot_weighting`), the memory at some time steps,
      and an animation of the memory beside the heads' weightings; for a DNC
      also the usage over time and the links at some time steps; inputs,
      targets and outputs on one time axis;
    - scalars: the entropy of each weighting in bits (0 if a head looks at one
      slot, log2 of the number of slots if it looks at all equally), the root
      mean square of the memory, the mean of gates, strengths and all other
      values;
    - histograms of all these values.

    The layers' states do not change. For losses and metrics use
    `keras.callbacks.TensorBoard`, which can write to the same folder.

    Args:
        log_dir: TensorBoard's folder; the files go to `memory` in it.
        probe_batch: inputs, or a tuple (inputs, targets) or (inputs, targets,
            mask), such as a `tasks.Batch`. The first sequence is drawn, with
            inputs, targets and outputs if they are (B, T, D) and
            (B, T, units). Or a `Probe`, which callbacks can share.
        every: int, at least 1, epochs between updates; None (default) updates
            as often as it can in 4 % of the training's time, and once at the
            end. The first update comes at the first epoch end after 25 seconds.

    Raises:
        ValueError: an argument is out of its range, or a tuple has another
            form.
        TypeError: the model has no such layer; raised when the training
            begins.

    Example:

    >>> import os, tempfile
    >>> layer = keras_memory.NTMLayer(3, memory_slots=5, slot_size=2,
    ...     return_sequences=True)
    >>> model = keras.Sequential([layer])
    >>> model.compile("adam", "mse")
    >>> x = np.ones((2, 7, 3), "float32")
    >>> log_dir = tempfile.mkdtemp()
    >>> board = keras_memory.callbacks.MemoryTensorBoard(log_dir, (x, x))
    >>> history = model.fit(x, x, verbose=0, callbacks=[board])
    >>> os.listdir(log_dir)
    ['memory']
    """

    # If `every` is None: the updates' share of the training's time, and the
    # assumed seconds of the first update.
    SHARE = 0.04
    FIRST = 1.0
    unit = "epochs"  # of TensorBoard's axis

    def __init__(
        self, log_dir: PathLike, probe_batch: Any, every: int | None = None
    ):
        super().__init__()
        self.folder = _path("log_dir", log_dir) / "memory"
        self.probe = Probe.of(probe_batch)
        self.every = every if every is None else check_size("every", every)

    def on_train_begin(self, logs: Config | None = None) -> None:
        layers = self.model._flatten_layers()
        if not any(isinstance(layer, recurrent.MemoryRNN) for layer in layers):
            raise TypeError(
                "`MemoryTensorBoard` needs a model with recurrent layers of "
                "keras_memory, such as `NTMLayer`. "
                f"Received: {self.model.name!r}, which "
                f"has only {[layer.name for layer in self.model.layers]}"
            )
        self._writer = None
        self._done = self._written = 0
        self._started = time.perf_counter()
        self._spent, self._last = 0.0, self.FIRST

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        self._done = epoch + 1
        if self.every is None:
            elapsed = time.perf_counter() - self._started - self._spent
            due = self._spent + self._last <= self.SHARE * elapsed
        else:
            due = self._done % self.every == 0
        if due:
            self._write()

    def on_train_end(self, logs: Config | None = None) -> None:
        if self._written != self._done:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def _write(self):
        begun = time.perf_counter()
        import tensorflow as tf

        seen = self.probe.look(self.model)
        if not seen.traces:
            warnings.warn(
                "`MemoryTensorBoard` cannot trace the layers of "
                f"{self.model.name!r}: they are not called, or are called "
                "within a `tf.function` of the model",
                stacklevel=2,
            )
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.folder))
        with self._writer.as_default(step=self._done):
            for tag, (encoded, image) in self._images(seen).items():
                _write_image(tag, encoded, image)
            for layer, trace in seen.traces.items():
                for name, values in trace.items():
                    if name.split("/")[-1] == "link_columns":
                        continue  # indices, whose mean has no meaning
                    tag = f"{layer}/{name}"
                    # Separate tags, as TensorBoard mixes kinds up under one.
                    tf.summary.histogram(f"{tag}/values", values)
                    tf.summary.scalar(*_number(tag, values))
        self._writer.flush()
        self._written = self._done
        self._last = time.perf_counter() - begun
        self._spent += self._last

    def _images(self, seen):
        """Dict from tag to (encoded image, the image or its first frame)."""
        from keras_memory.visualization import images

        pictures = {}
        if seen.has_sequences():
            pictures["probe"] = probe_picture(
                seen._replace(traces={}),
                f"After {self._done:,} {self.unit}",
                width=THUMBNAIL,
            )
        for layer, trace in seen.traces.items():
            for place, parts in by_place(trace).items():
                parts = {kind: values[:1] for kind, values in parts.items()}
                pictures |= _thumbnails(layer, place, parts)
        encoded = {}
        for tag, picture in pictures.items():
            if isinstance(picture, images.Animation):
                frames = picture.images()
                encoded[tag] = images.to_gif(frames), frames[0]
            else:
                image = images.to_image(picture)
                encoded[tag] = images.to_png(image), image
        return encoded


def _thumbnails(layer, place, parts):
    """Dict from tag to figure or animation of a trace at one place."""
    from keras_memory import visualization

    prefix = f"{place}/" if place else ""
    sequence = {kind: values[0] for kind, values in parts.items()}
    ways = {kind: parts[kind] for kind in parts if kind.endswith("_weighting")}
    pictures = {}
    for kind, values in sequence.items():
        tag = f"{layer}/{prefix}{kind}"
        title = f"{prefix}{kind}".replace("_", " ")
        if kind in ways:
            heads = named_heads(kind, sequence)
            values = np.stack([*heads.values()], 1)
            pictures[tag] = visualization.plot_weighting(
                values, names=list(heads), title=title, width=THUMBNAIL
            )
        elif kind == "usage" and values.ndim == 2:
            pictures[tag] = visualization.plot_weighting(
                values, title=title, width=THUMBNAIL
            )
        elif kind == "linkage" and values.ndim == 4:
            for head in range(values.shape[1]):
                links = values[:, head]
                if "link_columns" in sequence:
                    columns = sequence["link_columns"][:, head]
                    links = addressing.dense_linkage(links, columns)
                several = f"_{head}" * (values.shape[1] > 1)
                pictures[tag + several] = visualization.plot_linkage(
                    links, width=THUMBNAIL
                )
        elif kind.endswith("memory") and values.ndim == 3:
            pictures[tag] = visualization.plot_memory(
                values, frames=4, title=title, width=THUMBNAIL
            )
            pictures[f"{tag}_over_time"] = visualization.animate(
                {"memory": parts[kind], **ways}, title=layer, width=THUMBNAIL
            )
    return pictures


class ExplanationTensorBoard(keras.callbacks.Callback):
    """Shows in TensorBoard which examples a Memory Wrap uses, as it learns.

    For a `MemoryWrapClassifier` and fixed inputs, writes the picture of
    `explanations.picture` and the mean number of examples with a weight above
    0. The memory is drawn anew each time.

    Args:
        log_dir: TensorBoard's folder; the files go to `explanations` in it.
        x: (B, H, W), (B, H, W, 1) or (B, H, W, 3) images, a few.
        class_names, max_examples, attribution, to_image, labels: as in
            `explanations.picture`.
        every: int, at least 1, epochs between updates.

    Raises:
        ValueError: an argument is out of its range, or `x` has no images in
            [0, 1].
        TypeError: the model is no `MemoryWrapClassifier`; raised when the
            training begins.

    Example:

    >>> import os, tempfile
    >>> x, y = np.random.rand(30, 4, 4).astype("float32"), np.arange(30) % 3
    >>> encoder = keras.layers.Flatten()
    >>> model = keras_memory.MemoryWrapClassifier(encoder, 3, memory_size=20)
    >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    >>> log_dir = tempfile.mkdtemp()
    >>> board = keras_memory.callbacks.ExplanationTensorBoard(log_dir, x[:2])
    >>> history = model.fit(x, y, verbose=0, callbacks=[board])
    >>> os.listdir(log_dir)
    ['explanations']
    """

    def __init__(
        self,
        log_dir: PathLike,
        x: Array,
        class_names: Sequence[str] | None = None,
        max_examples: int = 6,
        attribution: bool = True,
        to_image: Callable[[Array], Array] | None = None,
        every: int = 1,
        labels: Array | None = None,
    ):
        from keras_memory.checks import check_labels
        from keras_memory.visualization.tiles import check_shades

        super().__init__()
        self.folder = _path("log_dir", log_dir) / "explanations"
        self.x: np.ndarray = check_numbers("x", x, ("B", "H", "W", ...))
        if labels is not None:
            check_labels(labels, len(self.x), name="labels")
        self.labels = labels
        if to_image is not None:
            _function("to_image", to_image)
        self.class_names = class_names
        self.max_examples = check_size("max_examples", max_examples)
        self.attribution = check_bool("attribution", attribution)
        self.to_image = to_image
        self.every = check_size("every", every)
        for image in self.x:  # an error now, not after the first epoch
            check_shades("x", image if to_image is None else to_image(image))

    def on_train_begin(self, logs: Config | None = None) -> None:
        from keras_memory.checks import check_labels
        from keras_memory.inspection import explanations

        explanations.check_model(self.model, self.class_names)
        if self.labels is not None:
            units = self.model.memory_layer.units
            check_labels(self.labels, len(self.x), units, "labels")
        self._writer = None

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        import tensorflow as tf

        from keras_memory.inspection.explanations import explain
        from keras_memory.inspection.explanations import picture
        from keras_memory.visualization import images

        if (epoch + 1) % self.every:
            return
        explanations = explain(self.model, self.x)
        figure = picture(
            self.model,
            self.x,
            self.class_names,
            self.max_examples,
            self.attribution,
            to_image=self.to_image,
            explanations=explanations,
            labels=self.labels,
        )
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.folder))
        with self._writer.as_default(step=epoch + 1):
            image = images.to_image(figure)
            _write_image("explanations", images.to_png(image), image)
            used = [len(why.weights) for why in explanations]
            tf.summary.scalar("examples_used", np.mean(used))
        self._writer.flush()

    def on_train_end(self, logs: Config | None = None) -> None:
        if self._writer is not None:
            self._writer.close()


def write_images(
    folder: PathLike, name: str, images: Sequence[np.ndarray]
) -> None:
    """Writes images to TensorBoard, one per step, from step 1.

    Args:
        folder: path of the logs.
        name: str, name of the images in TensorBoard.
        images: list of (H, W, 3) uint8 arrays.

    Raises:
        ValueError: `folder` is no path, or `images` are no images.
    """
    import tensorflow as tf

    from keras_memory.visualization.images import to_png

    images = [
        check_numbers("images", image, ("H", "W", 3), kind="integer")
        for image in images
    ]
    writer = tf.summary.create_file_writer(str(_path("folder", folder)))
    with writer.as_default(step=0):
        for step, image in enumerate(images, 1):
            tf.summary.experimental.set_step(step)
            _write_image(name, to_png(image), image)
    writer.close()


def _path(name, value):
    try:
        return pathlib.Path(value)
    except TypeError:
        raise ValueError(
            f"`{name}` must be the path of a folder. Received: {name}={value!r}"
        ) from None


def _function(name, value):
    if not callable(value):
        raise ValueError(
            f"`{name}` must be a function. Received: {name}={value!r}"
        )
    return value


def _number(tag, values):
    """Tag and value of the most informative scalar of a quantity."""
    if tag.endswith("_weighting"):
        return f"{tag}/entropy_bits", addressing.entropy(values).mean()
    if tag.endswith("memory"):
        return f"{tag}/root_mean_square", np.sqrt(np.square(values).mean())
    return f"{tag}/mean", values.mean()


def _write_image(tag, encoded, image):
    """Writes an encoded image unchanged, so that TensorBoard shows a GIF."""
    import tensorflow as tf
    from tensorboard.plugins.image import metadata

    height, width, _ = image.shape
    tf.summary.write(
        tag,
        tf.constant([str(width).encode(), str(height).encode(), encoded]),
        metadata=metadata.create_summary_metadata(
            display_name=None, description=None, converted_to_tensor=True
        ),
    )
