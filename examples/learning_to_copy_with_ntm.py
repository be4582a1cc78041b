"""Shows a Neural Turing Machine learn to copy, in the terminal and as a GIF.

    python examples/learning_to_copy_with_ntm.py
    python examples/learning_to_copy_with_ntm.py --overfit

The model sees a few random vectors of bits and an end marker, and must repeat
the vectors. Target and prediction are drawn during training. With `--overfit`
it sees only one sequence, which it learns within seconds. No display is needed:
the pictures are written to `learning_to_copy.gif`.
"""

import argparse
import pathlib

import keras
import numpy as np

import keras_memory
from keras_memory import losses
from keras_memory import tasks
from keras_memory import visualization


def in_text(target, output):
    """Target and prediction side by side, a row for each bit."""
    shades = " ░▒▓█"

    def row(values):
        return "".join(shades[round(4 * float(v))] * 2 for v in values)

    rows = zip(target.T, output.T)
    lines = [f"|{row(wanted)}|  |{row(given)}|" for wanted, given in rows]
    width = 2 * len(target) + 4
    return "\n".join(["target".ljust(width) + "prediction", *lines])


class Drawing(keras.callbacks.Callback):
    """Shows target and prediction of one sequence after every epoch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch
        self.frames = []

    def on_epoch_end(self, epoch, logs=None):
        outputs = np.asarray(self.model(self.batch.inputs[:1], training=False))
        target, output = self.batch.targets[0], outputs[0]
        mask = self.batch.mask[0]
        answer = mask > 0
        print(f"\nepoch {epoch + 1}: loss {logs['loss']:.4f}")
        print(in_text(target[answer], output[answer]))
        figure = visualization.plot_task(
            {},
            targets=self.batch.targets[:1],
            outputs=outputs,
            mask=self.batch.mask[:1],
            title=f"epoch {epoch + 1}: loss {logs['loss']:.4f}",
        )
        self.frames.append(visualization.to_image(figure))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--overfit", action="store_true", help="one sequence")
    parser.add_argument("--length", type=int, default=8, help="in vectors")
    parser.add_argument("--steps", type=int, help="default: 2000, overfit: 200")
    parser.add_argument("--out", type=pathlib.Path, default=".", help="folder")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    steps = parsed.steps or (200 if parsed.overfit else 2000)
    epochs = min(steps, 10)
    keras.utils.set_random_seed(1)

    task = tasks.Copy(bits=8, max_length=parsed.length, buckets=1)
    batch = task.sample(np.random.default_rng(1), 1, length=parsed.length)
    if parsed.overfit:
        import tensorflow as tf

        data = tf.data.Dataset.from_tensors(tuple(batch)).repeat()
    else:
        data = tasks.dataset(task, batch_size=8)

    model = keras.Sequential(
        [
            keras.Input((None, task.input_size)),
            keras_memory.NTMLayer(
                task.output_size,
                memory_slots=32,
                slot_size=16,
                activation="sigmoid",
                return_sequences=True,
            ),
        ]
    )
    model.compile(
        keras.optimizers.Adam(1e-2, clipnorm=0.2),
        keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight"),
        weighted_metrics=[losses.WrongBitsPerSequence()],
        jit_compile=True,
    )
    drawing = Drawing(batch)
    history = model.fit(
        data,
        epochs=epochs,
        steps_per_epoch=steps // epochs,
        shuffle=False,  # each batch is new
        verbose=0,
        callbacks=[drawing],
    )
    path = parsed.out / "learning_to_copy.gif"
    path.write_bytes(visualization.to_gif(drawing.frames, 400))
    wrong = history.history["wrong_bits_per_sequence"][-1]
    print(f"\nwrong bits a sequence: {wrong:.2f}; drawn: {path}")
    return wrong


if __name__ == "__main__":
    main()
