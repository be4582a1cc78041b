"""Keras callbacks that show a memory while it learns."""

import pathlib

import keras
from keras import ops

from keras_memory import recurrent
from keras_memory import visualization


class ProbePictures(keras.callbacks.Callback):
    """Draws what a model does with one fixed sequence, as it learns it.

    Writes into `folder`, before the training, after every `every`-th epoch and
    at the end, `latest.png` (inputs, targets, outputs, weightings over time)
    and, at the end, `training.gif` of all pictures; with `log_dir` also each
    picture to TensorBoard's image page.

    Args:
        layer: the `MemoryRNN` of the model whose weightings are drawn; it is
            the model's first layer, so that the model's inputs are its own.
        probe: `tasks.Batch`, whose first sequence is drawn.
        folder: folder for the files; it is made if absent.
        log_dir: TensorBoard's folder, or None.
        every: int, at least 0, epochs from picture to picture; 0 for none.
        title: function from the number of epochs done to the headline.

    Raises:
        ValueError: a stateful layer.
    """

    def __init__(
        self,
        layer,
        probe,
        folder,
        log_dir=None,
        every=1,
        title="epoch {}".format,
    ):
        super().__init__()
        self.layer = layer
        self.probe = probe
        self.folder = pathlib.Path(folder)
        self.log_dir = log_dir
        self.every = every
        self.title = title
        if layer.stateful:
            raise ValueError(
                "`layer` must not be stateful, as drawing the probe would "
                f"change its states. Received: {layer.name!r} with stateful="
                "True"
            )

    def on_train_begin(self, logs=None):
        self.frames = []
        self._last_epoch = -1
        self._writer = None
        if self.every:
            self._draw(-1)

    def picture(self, title, memory=False):
        """The picture as an image (H, W, 3), with the memory if asked."""
        inputs, targets, mask = (part[:1] for part in self.probe)
        outputs = ops.convert_to_numpy(self.model(inputs, training=False))
        inside = recurrent.trace(self.layer, inputs)
        shown = ["read_weighting", "write_weighting"] + ["memory"] * memory
        return visualization.task_picture(
            inputs[0],
            targets[0],
            outputs[0],
            mask[0],
            {name: inside[name][0] for name in shown},
            title,
        )

    def on_epoch_end(self, epoch, logs=None):
        self._last_epoch = epoch
        if self.every and (epoch + 1) % self.every == 0:
            self._draw(epoch)

    def on_train_end(self, logs=None):
        if self.every and (self._last_epoch + 1) % self.every:
            self._draw(self._last_epoch)
        if self.frames:
            held = [self.frames[-1]] * 5
            gif = visualization.encode_gif(self.frames + held, milliseconds=400)
            (self.folder / "training.gif").write_bytes(gif)
        if self._writer is not None:
            self._writer.close()

    def _draw(self, epoch):
        frame = self.picture(self.title(epoch + 1))
        self.frames.append(frame)
        self.folder.mkdir(parents=True, exist_ok=True)
        png = visualization.encode_png(frame)
        (self.folder / "latest.png").write_bytes(png)
        if self.log_dir is not None:
            self._log(epoch, frame)

    def _log(self, epoch, frame):
        import tensorflow as tf

        if self._writer is None:
            folder = str(pathlib.Path(self.log_dir) / "probe")
            self._writer = tf.summary.create_file_writer(folder)
        with self._writer.as_default(step=epoch + 1):
            tf.summary.image("probe", frame[None])
        self._writer.flush()
