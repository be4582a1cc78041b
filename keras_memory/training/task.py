"""The base class of tasks: batches of sequences, made on the fly."""

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
    """Base class of tasks: draws a length and pads it to a bucket.

    All sequences of a batch have one length, which is drawn uniformly. They
    are padded to the next bucket, so that XLA compiles once for each bucket.
    The mask leaves the padding out.

    A subclass has

    - `name`, and the `unit` that its lengths count;
    - `kind`, the kind of its targets: `"bits"`, each is 0 or 1; `"class"`, one
      of them is 1; `"sum"`, only their sum over time counts;
    - `input_size`, `output_size`, and `time_steps`, the longest T of a batch;
    - `sequences`, which makes a `Batch` of one length. `sample` calls it.

    Args:
        min_length: int, at least 1, in the task's `unit`.
        max_length: int, at least `min_length`.
        buckets: int, at least 0, number of padded lengths, evenly spaced up
            to the longest; 0 pads time to powers of two, for a curriculum whose
            lengths double.

    Raises:
        ValueError: a size is out of its range.
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
                least = 0 if field.name == "buckets" else 1
                check_size(field.name, getattr(self, field.name), least)
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
        """Raises ValueError unless a batch fits into the machine's memory.

        Args:
            batch_size: int.
            time: int, number of time steps; None for `time_steps`.
        """
        time = self._padded_time(self.time_steps) if time is None else time
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
            longest: int from `min_length` to `max_length`, the largest length
                to draw, for a curriculum; None for `max_length`.
            length: int, the length of the sequences, which are not padded; it
                may exceed `max_length`. None draws a length and pads it to its
                bucket.
            **ranges: further arguments of the task: `repeats` of `RepeatCopy`.

        Returns:
            A `Batch`.

        Raises:
            ValueError: `rng` is no generator, or the task cannot have the
                length.
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
                "`longest` must be at most the task's `max_length`; for longer "
                f"sequences set `length`. Received: longest={longest}, "
                f"max_length={self.max_length}"
            )
        length = int(rng.integers(self.min_length, longest + 1))
        batch = self.sequences(rng, batch_size, length, longest, **ranges)
        return self._padded(batch)

    def _padded(self, batch):
        time = batch.mask.shape[1]
        padding = self._padded_time(time) - time
        return Batch(
            *(
                np.pad(
                    part, [(0, 0), (0, padding)] + [(0, 0)] * (part.ndim - 2)
                )
                for part in batch
            )
        )

    def _padded_time(self, time):
        """The smallest bucket that holds `time` steps."""
        if not self.buckets:
            return 1 << (time - 1).bit_length()
        bucket = (time - 1) * self.buckets // self.time_steps + 1
        end = -(-bucket * self.time_steps // self.buckets)
        return end if bucket <= self.buckets else time

    def _blank(self, batch_size, time):
        self.check_bytes(batch_size, time)
        return Batch(
            np.zeros((batch_size, time, self.input_size), "float32"),
            np.zeros((batch_size, time, self.output_size), "float32"),
            np.zeros((batch_size, time), "float32"),
        )
