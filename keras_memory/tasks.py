"""Tasks that a memory can learn: sequences made on the fly.

A task is a dataclass of its ranges. It tells the widths of its inputs and
targets and draws batches; everything random comes from the generator that it
is given, so that a seed and a step number determine a batch.
"""

import dataclasses
import itertools
import math
from typing import ClassVar
from typing import NamedTuple

import numpy as np

from keras_memory.checks import check_size


class Batch(NamedTuple):
    """A batch of sequences, in the order that Keras's `fit` takes.

    Args:
        inputs: (B, T, input_size) float32.
        targets: (B, T, output_size) float32.
        mask: (B, T) float32, 1 where the target counts, else 0.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Copy:
    """Copy a sequence of random bit vectors after an end marker.

    Source: Graves et al. 2014, section 4.1.

    The inputs are the sequence, an end marker in a channel of its own, and
    blanks for as long as the sequence was; the targets are the sequence, over
    the blanks. All sequences of a batch are of one length, which is drawn
    uniformly and padded to the next bucket: one compilation under XLA for
    each bucket, and a mask that leaves the padding out.

    Args:
        bits: int, at least 1, width of a vector. Default 8.
        min_length: int, at least 1, in vectors. Default 1.
        max_length: int, at least `min_length`, in vectors. Default 20.
        buckets: int, at least 1, number of padded lengths, evenly spaced up
            to `max_length`. Default 4.

    Raises:
        ValueError: a size out of its range.

    Example:

    >>> task = keras_memory.tasks.Copy(max_length=5, buckets=1)
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2)
    >>> batch.inputs.shape, batch.targets.shape, batch.mask.shape
    ((2, 11, 9), (2, 11, 8), (2, 11))
    """

    bits: int = 8
    min_length: int = 1
    max_length: int = 20
    buckets: int = 4

    name: ClassVar[str] = "copy"

    def __post_init__(self):
        for name in ("bits", "min_length", "max_length", "buckets"):
            check_size(name, getattr(self, name))
        if self.max_length < self.min_length:
            raise ValueError(
                "`max_length` of the copy task must be at least `min_length`. "
                f"Received: min_length={self.min_length}, "
                f"max_length={self.max_length}"
            )

    @property
    def input_size(self):
        return self.bits + 1

    @property
    def output_size(self):
        return self.bits

    @property
    def padded_lengths(self):
        """Upper end of each bucket."""
        shares = range(1, self.buckets + 1)
        return [math.ceil(n * self.max_length / self.buckets) for n in shares]

    def sample(self, rng, batch_size, longest=None, length=None):
        """Draws a batch.

        Args:
            rng: `numpy.random.Generator`.
            batch_size: int B, at least 1.
            longest: int, to draw lengths up to this one, for a curriculum;
                None draws up to `max_length`.
            length: int, for sequences of this length without padding, also
                beyond `max_length`; None draws one and pads to its bucket.

        Returns:
            A `Batch` with T = 2 * padded length + 1.
        """
        padded = length
        if length is None:
            longest = self.max_length if longest is None else longest
            length = int(rng.integers(self.min_length, longest + 1))
            padded = next(n for n in self.padded_lengths if n >= length)
        time = 2 * padded + 1
        answer = slice(length + 1, 2 * length + 1)
        sequence = rng.integers(0, 2, (batch_size, length, self.bits))
        inputs = np.zeros((batch_size, time, self.input_size), "float32")
        targets = np.zeros((batch_size, time, self.output_size), "float32")
        mask = np.zeros((batch_size, time), "float32")
        inputs[:, :length, : self.bits] = sequence
        inputs[:, length, self.bits] = 1.0
        targets[:, answer] = sequence
        mask[:, answer] = 1.0
        return Batch(inputs, targets, mask)


TASKS = {task.name: task for task in (Copy,)}


def dataset(task, batch_size, seed=1, first_step=0):
    """An endless `tf.data.Dataset` of batches for Keras's `fit`.

    Args:
        task: a task of this module.
        batch_size: int, at least 1.
        seed: int; with the step number it determines a batch.
        first_step: int, number of the first batch, to go on where an earlier
            training ended.

    Returns:
        Dataset of (inputs, targets, mask); Keras takes the mask as
        `sample_weight`. Batches are of several lengths, so set
        `steps_per_epoch`.
    """
    import tensorflow as tf

    def batches():
        for step in itertools.count(first_step):
            rng = np.random.default_rng([seed, step])
            yield tuple(task.sample(rng, batch_size))

    def spec(*shape):
        return tf.TensorSpec((batch_size, None, *shape), "float32")

    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            spec(task.input_size),
            spec(task.output_size),
            spec(),
        ),
    )
