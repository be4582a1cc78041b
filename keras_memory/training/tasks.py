"""Tasks for models with a memory: sequences made on the fly.

A task is a dataclass of its ranges. It knows the widths of its inputs and
targets, and draws batches. All randomness comes from the generator that the
caller passes, so a seed and a step number determine a batch.
"""

import dataclasses
import itertools
import math
from typing import Any
from typing import ClassVar

import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.training.task import Batch
from keras_memory.training.task import Task


@dataclasses.dataclass(frozen=True)
class _Bits(Task):
    """Base class of tasks with random bit vectors.

    `signals` additional input channels carry markers, such as the end marker.
    """

    bits: int = 8

    signals: ClassVar[int]

    @property
    def input_size(self) -> int:
        return self.bits + self.signals

    @property
    def output_size(self) -> int:
        return self.bits


@dataclasses.dataclass(frozen=True)
class Copy(_Bits):
    """Copy a sequence of random bit vectors after an end marker.

    Source: Graves et al. 2014, section 4.1.

    The inputs are the sequence, an end marker in its own channel, and as many
    blanks as the sequence has vectors. The targets are the sequence, during
    the blanks.

    Args:
        min_length: int, at least 1, in vectors. Default 1.
        max_length: int, in vectors. Default 20.
        buckets: int, number of padded lengths. Default 4.
        bits: int, at least 1, width of a vector. Default 8.

    Example:

    >>> task = keras_memory.tasks.Copy(max_length=5, buckets=1)
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2)
    >>> batch.inputs.shape, batch.targets.shape, batch.mask.shape
    ((2, 11, 9), (2, 11, 8), (2, 11))
    """

    name: ClassVar[str] = "copy"
    unit: ClassVar[str] = "vectors"
    signals: ClassVar[int] = 1

    @property
    def time_steps(self) -> int:
        return 2 * self.max_length + 1

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = 2 length + 1."""
        inputs, targets, mask = self._blank(batch_size, 2 * length + 1)
        sequence = rng.integers(0, 2, (batch_size, length, self.bits))
        inputs[:, :length, : self.bits] = sequence
        inputs[:, length, self.bits] = 1.0
        targets[:, length + 1 :] = sequence
        mask[:, length + 1 :] = 1.0
        return Batch(inputs, targets, mask)


@dataclasses.dataclass(frozen=True)
class RepeatCopy(_Bits):
    """Copy a sequence of random bit vectors several times, then mark the end.

    Source: Graves et al. 2014, section 4.2.

    The inputs are the sequence, an end marker, the number of copies in its own
    channel, and blanks. The number is normalized to mean 0 and variance 1 over
    the range from `min_repeats` to `max_repeats`. The targets are the copies,
    then an end marker in its own channel.

    Departure: the inputs have an end marker, as in pytorch-ntm. The paper has
    the number alone, which may be 0 after normalization.

    Args:
        min_length: int, at least 1, in vectors. Default 1.
        max_length: int, in vectors. Default 10.
        buckets: int, number of padded lengths. Default 4.
        bits: int, at least 1, width of a vector. Default 8.
        min_repeats: int, at least 1. Default 1.
        max_repeats: int, at least `min_repeats`. Default 10.

    Example:

    >>> task = keras_memory.tasks.RepeatCopy()
    >>> rng = np.random.default_rng(1)
    >>> batch = task.sample(rng, batch_size=2, length=3, repeats=4)
    >>> batch.inputs.shape, batch.targets.shape  # 3 + 2 in, 3 * 4 + 1 out
    ((2, 18, 10), (2, 18, 9))
    """

    max_length: int = 10
    min_repeats: int = 1
    max_repeats: int = 10

    name: ClassVar[str] = "repeat-copy"
    unit: ClassVar[str] = "vectors"
    signals: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_order("min_repeats", "max_repeats")

    @property
    def output_size(self) -> int:
        return self.bits + 1

    @property
    def time_steps(self) -> int:
        return self.max_length * (self.max_repeats + 1) + 3

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
        repeats: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length + 2 + length * repeats + 1.

        A curriculum's `longest` also bounds the number of repeats, as long as
        it is below `max_length`.
        """
        if repeats is None:
            max_repeats = self.max_repeats
            if longest is not None and longest < self.max_length:
                max_repeats = min(max(longest, self.min_repeats), max_repeats)
            repeats = int(rng.integers(self.min_repeats, max_repeats + 1))
        check_size("repeats", repeats)
        mean = (self.min_repeats + self.max_repeats) / 2
        choices = self.max_repeats - self.min_repeats + 1
        deviation = math.sqrt((choices**2 - 1) / 12) or 1.0
        answer, end = length + 2, length + 2 + length * repeats
        inputs, targets, mask = self._blank(batch_size, end + 1)
        sequence = rng.integers(0, 2, (batch_size, length, self.bits))
        inputs[:, :length, : self.bits] = sequence
        inputs[:, length, self.bits] = 1.0
        inputs[:, length + 1, self.bits + 1] = (repeats - mean) / deviation
        targets[:, answer:end, : self.bits] = np.tile(sequence, (repeats, 1))
        targets[:, end, self.bits] = 1.0
        mask[:, answer:] = 1.0
        return Batch(inputs, targets, mask)


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(_Bits):
    """Recall the item that followed a queried item.

    Source: Graves et al. 2014, section 4.3.

    An item is a few random bit vectors. The inputs are the items, each after a
    delimiter; then the queried item again, between two delimiters in another
    channel; then blanks. The targets, during the blanks, are the item that
    followed the queried one.

    Args:
        min_length: int, at least 2, number of items. Default 2.
        max_length: int, number of items. Default 6.
        buckets: int, number of padded lengths. Default 4.
        bits: int, at least 1, width of a vector. Default 6.
        vectors: int, at least 1, vectors of an item. Default 3. If an item has
            few bits, two items may be equal and the query ambiguous.

    Example:

    >>> task = keras_memory.tasks.AssociativeRecall()
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2, length=4)
    >>> batch.inputs.shape, batch.targets.shape  # 4 * 4 + 5 in, 3 out
    ((2, 24, 8), (2, 24, 6))
    """

    min_length: int = 2
    max_length: int = 6
    bits: int = 6
    vectors: int = 3

    name: ClassVar[str] = "associative-recall"
    unit: ClassVar[str] = "items"
    signals: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("min_length", self.min_length, least=2)

    @property
    def time_steps(self) -> int:
        return self.max_length * (self.vectors + 1) + 2 * self.vectors + 2

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length (vectors + 1) + 2 vectors + 2."""
        check_size("length", length, least=2)
        vectors = self.vectors
        question = length * (vectors + 1)
        answer = question + vectors + 2
        inputs, targets, mask = self._blank(batch_size, answer + vectors)
        rows = np.arange(batch_size)
        shape = batch_size, length, vectors, self.bits
        items = rng.integers(0, 2, shape)
        asked = rng.integers(0, length - 1, batch_size)
        shown = inputs[:, :question].reshape(
            batch_size, length, vectors + 1, -1
        )
        shown[:, :, 0, self.bits] = 1.0
        shown[:, :, 1:, : self.bits] = items
        inputs[:, :question] = shown.reshape(batch_size, question, -1)
        inputs[:, [question, answer - 1], self.bits + 1] = 1.0
        inputs[:, question + 1 : answer - 1, : self.bits] = items[rows, asked]
        targets[:, answer:] = items[rows, asked + 1]
        mask[:, answer:] = 1.0
        return Batch(inputs, targets, mask)


@dataclasses.dataclass(frozen=True)
class Chain(_Bits):
    """Recall the item written before or after a queried item.

    The inputs are the items, one a time step; then `queries` queries. A query
    is an item together with a 1 in one of two channels, "before" or "after",
    then a blank. The target, during the blank, is the item that was before or
    after the queried one. The queries of a sequence are independent. The item
    before the first one and the item after the last one are never asked for.

    All items of a sequence are different, so each query has one answer. It
    depends on the order in which the items were written, which the temporal
    links of a DNC keep.

    Args:
        min_length: int, at least 2, number of items. Default 4.
        max_length: int, at most 2 ** `bits`, number of items. Default 16.
        buckets: int, number of padded lengths. Default 1.
        bits: int, at least 1, width of an item. Default 8.
        queries: int, at least 1, queries of a sequence. Default 4.

    Example:

    >>> task = keras_memory.tasks.Chain()
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2, length=5)
    >>> batch.inputs.shape, batch.targets.shape  # 5 + 2 * 4 steps
    ((2, 13, 10), (2, 13, 8))
    >>> batch.mask[0].astype(int)
    array([0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1])
    """

    min_length: int = 4
    max_length: int = 16
    buckets: int = 1
    queries: int = 4

    name: ClassVar[str] = "chain"
    unit: ClassVar[str] = "items"
    signals: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("min_length", self.min_length, least=2)
        self._check_different("max_length", self.max_length)

    def _check_different(self, name, length):
        if length > 2 ** min(self.bits, 62):
            raise ValueError(
                f"`{name}` must be at most 2 ** `bits`, as all items of a "
                "sequence of the task chain are different. "
                f"Received: {name}={length}, bits={self.bits}"
            )

    @property
    def time_steps(self) -> int:
        return self.max_length + 2 * self.queries

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length + 2 queries."""
        check_size("length", length, least=2)
        self._check_different("length", length)
        time = length + 2 * self.queries
        inputs, targets, mask = self._blank(batch_size, time)
        rows = np.arange(batch_size)[:, None]
        items = self._items(rng, batch_size, length)
        asked, step = self._questions(rng, batch_size, length)
        inputs[:, :length, : self.bits] = items
        inputs[:, length::2, : self.bits] = items[rows, asked]
        inputs[:, length::2, self.bits] = step < 0
        inputs[:, length::2, self.bits + 1] = step > 0
        targets[:, length + 1 :: 2] = items[rows, asked + step]
        mask[:, length + 1 :: 2] = 1.0
        return Batch(inputs, targets, mask)

    def _items(self, rng, batch_size, length):
        """(B, length, bits), all different in a sequence."""
        items = rng.integers(0, 2, (batch_size, length, self.bits))
        bits = min(self.bits, 62)  # more do not fit in an int64
        numbers = [
            rng.choice(2**bits, length, replace=False)
            for _ in range(batch_size)
        ]
        items[:, :, :bits] = np.stack(numbers)[:, :, None] >> np.arange(bits)
        return items & 1

    def _questions(self, rng, batch_size, length):
        """(B, queries) places of the queried items, and steps of -1 or 1 to
        the items that are asked for; all pairs of neighbors are as likely."""
        shape = batch_size, self.queries
        before = rng.integers(0, length - 1, shape)
        backward = rng.integers(0, 2, shape)
        return before + backward, 1 - 2 * backward


@dataclasses.dataclass(frozen=True)
class NGrams(Task):
    """Predict the next bit of a random source, a new one for each sequence.

    Source: Graves et al. 2014, section 4.4 ("Dynamic N-Grams").

    The probability that a bit is 1 depends on the `context` bits before it.
    The table of these probabilities is drawn from Beta(1/2, 1/2) for each
    sequence. The first `context` bits are drawn uniformly. At each step the
    input is a bit and the target is the next bit; steps with a whole context
    count.

    Args:
        min_length: int, above `context`, number of bits. Default 200.
        max_length: int, number of bits. Default 200.
        buckets: int, number of padded lengths. Default 1.
        context: int, at least 1. Default 5 (6-grams).

    Example:

    >>> task = keras_memory.tasks.NGrams()
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2)
    >>> batch.inputs.shape, batch.targets.shape
    ((2, 199, 1), (2, 199, 1))
    >>> task.optimal_outputs(batch).shape
    (2, 199, 1)
    """

    min_length: int = 200
    max_length: int = 200
    buckets: int = 1
    context: int = 5

    name: ClassVar[str] = "n-grams"
    unit: ClassVar[str] = "bits"
    input_size: ClassVar[int] = 1
    output_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("min_length", self.min_length, least=self.context + 1)
        self._check_bytes_of_table(1)

    def _check_bytes_of_table(self, batch_size):
        # Larger powers are refused as well, and their numbers would be too
        # long for the error.
        contexts = "2 ** context", 2 ** min(self.context, 32)
        sizes = ("batch_size", batch_size), contexts
        check_bytes(f"A table of {self}", sizes, "float64", on_host=True)

    @property
    def time_steps(self) -> int:
        return self.max_length - 1

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length - 1."""
        check_size("length", length, least=self.context + 1)
        self._check_bytes_of_table(batch_size)
        inputs, targets, mask = self._blank(batch_size, length - 1)
        rows = np.arange(batch_size)
        table = rng.beta(0.5, 0.5, (batch_size, 2**self.context))
        bits = rng.integers(0, 2, (batch_size, length))
        chance = rng.random((batch_size, length))
        for time in range(self.context, length):
            code = self._contexts(bits[:, time - self.context : time])[:, 0]
            bits[:, time] = chance[:, time] < table[rows, code]
        inputs[:, :, 0] = bits[:, :-1]
        targets[:, :, 0] = bits[:, 1:]
        mask[:, self.context - 1 :] = 1.0
        return Batch(inputs, targets, mask)

    def optimal_outputs(self, batch: Batch) -> np.ndarray:
        """Outputs of the optimal predictor, which knows the tables' prior.

        Source: Graves et al. 2014, section 4.4: P(B = 1 | N1, N0, c) =
        (N1 + 1/2) / (N1 + N0 + 1), where N1 and N0 count the ones and zeros
        that followed the context c so far.

        Args:
            batch: a `Batch` of this task.

        Returns:
            (B, T, 1) float32 probabilities; 0.5 before the first whole
            context, and meaningless where the mask is 0.

        Raises:
            ValueError: `batch` is no `Batch`, or one of another task.
        """
        if not isinstance(batch, Batch):
            raise ValueError(
                "`batch` must be a `tasks.Batch`. "
                f"Received: {type(batch).__name__}"
            )
        sizes = {}
        batch = Batch(
            *(
                ops.convert_to_numpy(
                    check_array(f"batch.{name}", part, axes, sizes)
                )
                for name, part, axes in zip(
                    Batch._fields,
                    batch,
                    [("B", "T", 1), ("B", "T", 1), ("B", "T")],
                )
            )
        )
        bits, following = batch.inputs[:, :, 0], batch.targets[:, :, 0]
        codes = self._contexts(bits.astype(int))
        rows = np.arange(len(bits))
        counts = np.zeros((len(bits), 2**self.context, 2))
        outputs = np.full(batch.targets.shape, 0.5, "float32")
        for code, time in zip(codes.T, range(self.context - 1, bits.shape[1])):
            zeros, ones = counts[rows, code].T
            outputs[:, time, 0] = (ones + 0.5) / (ones + zeros + 1.0)
            counts[rows, code, following[:, time].astype(int)] += 1
        return outputs

    def _contexts(self, bits):
        """(B, T) bits -> (B, T - context + 1) numbers of the contexts."""
        windows = np.lib.stride_tricks.sliding_window_view(
            bits, self.context, axis=1
        )
        return windows @ (1 << np.arange(self.context)[::-1])


@dataclasses.dataclass(frozen=True)
class PrioritySort(_Bits):
    """Sort random bit vectors by priority, the highest first.

    Source: Graves et al. 2014, section 4.5.

    The inputs are the vectors, an end marker, and blanks. Each vector has its
    priority, drawn from [-1, 1], in a separate channel. The targets, during
    the blanks, are the vectors of highest priority in order.

    Args:
        min_length: int, at least 1, number of vectors. Default 20.
        max_length: int, number of vectors. Default 20.
        buckets: int, number of padded lengths. Default 1.
        bits: int, at least 1, width of a vector. Default 8.
        sorted_vectors: int, from 1 to `max_length`, number of target vectors
            if the length is `max_length`; other lengths have the same share,
            rounded up. Default 16.

    Example:

    >>> task = keras_memory.tasks.PrioritySort()
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2)
    >>> batch.inputs.shape, batch.targets.shape  # 20 + 1 in, 16 out
    ((2, 37, 10), (2, 37, 8))
    """

    min_length: int = 20
    max_length: int = 20
    buckets: int = 1
    sorted_vectors: int = 16

    name: ClassVar[str] = "priority-sort"
    unit: ClassVar[str] = "vectors"
    signals: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_order("sorted_vectors", "max_length")

    @property
    def time_steps(self) -> int:
        return self.max_length + 1 + self.sorted_vectors

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length + 1 + the number of sorted vectors."""
        asked = math.ceil(length * self.sorted_vectors / self.max_length)
        inputs, targets, mask = self._blank(batch_size, length + 1 + asked)
        vectors = rng.integers(0, 2, (batch_size, length, self.bits))
        priorities = rng.uniform(-1.0, 1.0, (batch_size, length))
        order = np.argsort(-priorities, axis=1, kind="stable")[:, :asked, None]
        inputs[:, :length, : self.bits] = vectors
        inputs[:, :length, self.bits] = priorities
        inputs[:, length, self.bits + 1] = 1.0
        targets[:, length + 1 :] = np.take_along_axis(vectors, order, axis=1)
        mask[:, length + 1 :] = 1.0
        return Batch(inputs, targets, mask)


@dataclasses.dataclass(frozen=True)
class _Digits(Task):
    """Random digits from 0 to `digits` - 1, one-hot, and an end marker."""

    digits: int = 5

    @property
    def input_size(self) -> int:
        return self.digits + 1

    @property
    def time_steps(self) -> int:
        return self.max_length + 1

    def _draw(self, rng, batch_size, length):
        """(B, length) digits, and a `Batch` with T = length + 1 to fill."""
        batch = self._blank(batch_size, length + 1)
        values = rng.integers(0, self.digits, (batch_size, length))
        np.put_along_axis(
            batch.inputs[:, :length], values[:, :, None], 1.0, axis=-1
        )
        batch.inputs[:, length, self.digits] = 1.0
        return values, batch


@dataclasses.dataclass(frozen=True)
class Adding(_Digits):
    """Add up a sequence of digits.

    Source: pytorch-dnc's adding task, with lengths up to 1,000 by default.

    The inputs are one-hot digits and an end marker. As in the source, the
    answer is the sum of the outputs over all time steps, and only the error of
    this sum counts: the model must learn the value of each digit.

    Args:
        min_length: int, at least 1, number of digits. Default 2.
        max_length: int, number of digits. Default 100.
        buckets: int, number of padded lengths. Default 4.
        digits: int, at least 1, number of different digits, from 0 on.
            Default 5.

    Example:

    >>> task = keras_memory.tasks.Adding()
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2, length=7)
    >>> batch.inputs.shape, batch.targets.shape
    ((2, 8, 6), (2, 8, 1))
    >>> batch.targets.sum(axis=(1, 2))  # the answers
    array([15., 17.], dtype=float32)
    """

    min_length: int = 2
    max_length: int = 100

    name: ClassVar[str] = "adding"
    unit: ClassVar[str] = "digits"
    kind: ClassVar[str] = "sum"
    output_size: ClassVar[int] = 1

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length + 1, whose targets add up to the sum."""
        values, (inputs, targets, mask) = self._draw(rng, batch_size, length)
        targets[:, :length, 0] = values
        mask[:] = 1.0
        return Batch(inputs, targets, mask)


@dataclasses.dataclass(frozen=True)
class Argmax(_Digits):
    """Find the first position of the largest digit of a sequence.

    Source: pytorch-dnc's argmax task, with lengths up to 4 by default.
    Departure: its targets are the number of the position; ours are the
    position as one-hot class, so that accuracy is defined.

    The inputs are one-hot digits and an end marker. The target is at the step
    of the end marker.

    Args:
        min_length: int, at least 1, number of digits. Default 2.
        max_length: int, number of digits, and of classes. Default 10.
        buckets: int, number of padded lengths. Default 1.
        digits: int, at least 1, number of different digits, from 0 on.
            Default 5.

    Example:

    >>> task = keras_memory.tasks.Argmax()
    >>> batch = task.sample(np.random.default_rng(1), batch_size=2)
    >>> batch.inputs.shape, batch.targets.shape
    ((2, 11, 6), (2, 11, 10))
    """

    min_length: int = 2
    max_length: int = 10
    buckets: int = 1

    name: ClassVar[str] = "argmax"
    unit: ClassVar[str] = "digits"
    kind: ClassVar[str] = "class"

    @property
    def output_size(self) -> int:
        return self.max_length

    def sequences(
        self,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
        longest: int | None = None,
    ) -> Batch:
        """A `Batch` with T = length + 1; only the last step counts."""
        if length > self.max_length:
            raise ValueError(
                "`length` must be at most `max_length`, the number of classes "
                "of the argmax task. Received: "
                f"length={length}, max_length={self.max_length}"
            )
        values, (inputs, targets, mask) = self._draw(rng, batch_size, length)
        targets[np.arange(batch_size), length, values.argmax(axis=1)] = 1.0
        mask[:, length] = 1.0
        return Batch(inputs, targets, mask)


TASKS = {
    task.name: task
    for task in (
        Copy,
        RepeatCopy,
        AssociativeRecall,
        Chain,
        NGrams,
        PrioritySort,
        Adding,
        Argmax,
    )
}


def dataset(
    task: Task, batch_size: int, seed: int = 1, first_step: int = 0
) -> Any:
    """An endless `tf.data.Dataset` of batches for Keras's `fit`.

    Args:
        task: a task of this module.
        batch_size: int, at least 1.
        seed: int; seed and step number determine a batch.
        first_step: int, number of the first batch, to continue an earlier
            training.

    Returns:
        Dataset of (inputs, targets, mask); Keras takes the mask as
        `sample_weight`. It is endless, so set `steps_per_epoch`. Batches have
        several lengths.

    Raises:
        ValueError: `task` is no task, or a size is out of its range.
    """
    if not callable(getattr(task, "sample", None)):
        raise ValueError(
            "`task` must be a task, such as `tasks.Copy()`. "
            f"Received: task={task!r}"
        )
    batch_size = check_size("batch_size", batch_size)
    seed = check_size("seed", seed, least=0)
    first_step = check_size("first_step", first_step, least=0)
    import tensorflow as tf

    def batches():
        for step in itertools.count(first_step):
            rng = np.random.default_rng([seed, step])
            yield tuple(task.sample(rng, batch_size))

    def spec(*shape):
        return tf.TensorSpec((batch_size, None, *shape), "float32")

    # Prefetching would draw a batch before the curriculum moves on.
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    # There is nothing to tune, and the end would wait for the tuner's thread.
    options.autotune.enabled = False
    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            spec(task.input_size),
            spec(task.output_size),
            spec(),
        ),
    ).with_options(options)
