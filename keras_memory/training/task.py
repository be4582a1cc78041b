"""What a task is: batches of sequences, made on the fly, and what counts."""

import dataclasses
from typing import Any
from typing import ClassVar
from typing import NamedTuple

import numpy as np

from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.checks import make_plain


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
class Task:
    """What the tasks share: a length is drawn, and padded to a bucket.

    All sequences of a batch are of one length, which is drawn uniformly and
    padded to the next bucket: one compilation under XLA for each bucket, and
    a mask that leaves the padding out.

    A subclass has a `name`, the `unit` that its lengths count, the `kind` of
    its targets (`"bits"`: each is 0 or 1; `"class"`: one of them is 1;
    `"sum"`: only their sum over time counts), `input_size`, `output_size`,
    `time_steps`, the longest T of a batch, and `sequences`, which makes a
    `Batch` of one length and is called by `sample`.

    Args:
        min_length: int, at least 1. What is counted, the task says.
        max_length: int, at least `min_length`.
        buckets: int, at least 1, number of padded lengths, evenly spaced up
            to the longest.

    Raises:
        ValueError: a size out of its range.
    """

    min_length: int = 1
    max_length: int = 20
    buckets: int = 4

    name: ClassVar[str]
    unit: ClassVar[str] = "steps"
    kind: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        make_plain(self)
        for field in dataclasses.fields(self):
            if field.type in (int, "int"):
                check_size(field.name, getattr(self, field.name))
        self._check_order("min_length", "max_length")
        self.check_bytes(1)

    def _check_order(self, low, high):
        if getattr(self, high) < getattr(self, low):
            raise ValueError(
                f"`{high}` of the task {self.name} must be at least `{low}`. "
                f"Received: {low}={getattr(self, low)}, "
                f"{high}={getattr(self, high)}"
            )

    def check_bytes(self, batch_size: int, time: int | None = None) -> None:
        """Raises ValueError unless a batch fits into the machine.

        Args:
            batch_size: int.
            time: int, its time steps; None for `time_steps`.
        """
        time = self.time_steps if time is None else time
        width = self.input_size + self.output_size + 1
        sizes = ("batch_size", batch_size), ("time steps", time)
        check_bytes(
            f"A batch of {self}",
            [*sizes, ("numbers of a step", width)],
            on_host=True,
        )

    def sample(
        self,
        rng: np.random.Generator,
        batch_size: int,
        longest: int | None = None,
        length: int | None = None,
        **ranges: Any,
    ) -> Batch:
        """Draws a batch.

        Args:
            rng: `numpy.random.Generator`.
            batch_size: int B, at least 1.
            longest: int from `min_length` to `max_length`, to draw lengths up
                to this one, for a curriculum; None is `max_length`.
            length: int, for sequences of this length without padding, also
                beyond `max_length`; None draws one and pads to its bucket.
            **ranges: what else a task lets its caller fix: `repeats` of
                `RepeatCopy`.

        Returns:
            A `Batch`.

        Raises:
            ValueError: no generator, or a length that the task cannot have.
        """
        if not isinstance(rng, np.random.Generator):
            raise ValueError(
                "`rng` must be a numpy.random.Generator, such as "
                f"`np.random.default_rng(1)`. Received: rng={rng!r}"
            )
        batch_size = check_size("batch_size", batch_size)
        if length is not None:
            length = check_size("length", length)
            return self.sequences(rng, batch_size, length, **ranges)
        longest = self.max_length if longest is None else longest
        longest = check_size("longest", longest, least=self.min_length)
        if longest > self.max_length:
            raise ValueError(
                "`longest` is the end of a curriculum's lengths and can be at "
                "most the task's `max_length`; for longer sequences there is "
                f"`length`. Received: longest={longest}, "
                f"max_length={self.max_length}"
            )
        length = int(rng.integers(self.min_length, longest + 1))
        batch = self.sequences(rng, batch_size, length, longest, **ranges)
        return self._padded(batch)

    def _padded(self, batch):
        time = batch.mask.shape[1]
        # The first bucket that ends at `time` or behind it.
        bucket = (time - 1) * self.buckets // self.time_steps + 1
        end = -(-bucket * self.time_steps // self.buckets)
        padding = end - time if bucket <= self.buckets else 0
        return Batch(
            *(
                np.pad(
                    part, [(0, 0), (0, padding)] + [(0, 0)] * (part.ndim - 2)
                )
                for part in batch
            )
        )

    def _blank(self, batch_size, time):
        self.check_bytes(batch_size, time)
        return Batch(
            np.zeros((batch_size, time, self.input_size), "float32"),
            np.zeros((batch_size, time, self.output_size), "float32"),
            np.zeros((batch_size, time), "float32"),
        )
