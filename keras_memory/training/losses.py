"""Losses and metrics of sequences, with a mask of the steps that count.

Outputs at steps that do not count affect neither a result nor a gradient, even
if they are NaN. Sequences without a step that counts are left out of every
mean. NaN at a step that counts makes the result NaN.
"""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras.src import backend

from keras_memory.addressing.scaling import at_least_float32
from keras_memory.checks import check_array
from keras_memory.hints import Array
from keras_memory.hints import Config


def bits_per_sequence(targets: Array, outputs: Array, mask: Array) -> Array:
    """Cross-entropy of each sequence in bits, as the NTM paper reports it.

    Source: Graves et al. 2014, section 4 ("cost per sequence (bits)").

    Args:
        targets: (B, T, bits) of 0 and 1.
        outputs: (B, T, bits) probabilities.
        mask: (B, T), 1 where the target counts, else 0; or bool.

    Returns:
        (B,) bits, at least 0; eight outputs of 0.5 give 8 bits.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    targets, outputs, mask = _where_it_counts(targets, outputs, mask)
    entropy = ops.binary_crossentropy(targets, outputs)
    return ops.sum(entropy * mask[:, :, None], axis=(1, 2)) / math.log(2.0)


def wrong_bits_per_sequence(
    targets: Array, outputs: Array, mask: Array
) -> Array:
    """Number of wrong bits of each sequence, after rounding the outputs.

    Args:
        targets: (B, T, bits) of 0 and 1.
        outputs: (B, T, bits) probabilities; at least one half counts as 1.
        mask: (B, T), 1 where the target counts, else 0; or bool.

    Returns:
        (B,) counts, at least 0; NaN if an output that counts is NaN.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    targets, outputs, mask = _where_it_counts(targets, outputs, mask)
    wrong = ops.cast((outputs >= 0.5) != (targets >= 0.5), outputs.dtype)
    wrong = ops.where(ops.isnan(outputs), float("nan"), wrong)
    return ops.sum(wrong * mask[:, :, None], axis=(1, 2))


def error_rate(targets: Array, outputs: Array, mask: Array) -> Array:
    """Share of the steps of each sequence with a wrong predicted class.

    Args:
        targets: (B, T, classes), 1 for the right class, else 0.
        outputs: (B, T, classes) probabilities.
        mask: (B, T), 1 where the target counts, else 0; or bool.

    Returns:
        (B,) shares from 0 to 1; 0 if no step counts, NaN if an output that
        counts is NaN.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    targets, outputs, mask = _where_it_counts(targets, outputs, mask)
    wrong = ops.argmax(outputs, axis=-1) != ops.argmax(targets, axis=-1)
    unknown = ops.any(ops.isnan(outputs), axis=-1)
    wrong = ops.where(unknown, float("nan"), ops.cast(wrong, outputs.dtype))
    wrong = ops.sum(wrong * mask, axis=1)
    return ops.divide_no_nan(wrong, ops.sum(mask, axis=1))


def absolute_error_of_sum(targets: Array, outputs: Array, mask: Array) -> Array:
    """Absolute difference of the sums of a sequence's outputs and targets.

    Source: pytorch-dnc's adding task.

    Args:
        targets: (B, T, size) numbers.
        outputs: (B, T, size) numbers.
        mask: (B, T), 1 where outputs and targets count, else 0; or bool.

    Returns:
        (B,) errors, at least 0.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    targets, outputs, mask = _where_it_counts(targets, outputs, mask)
    return ops.abs(ops.sum((outputs - targets) * mask[:, :, None], axis=(1, 2)))


def _where_it_counts(
    targets, outputs, mask, names=("targets", "outputs", "mask"), dtype=None
):
    """Checks targets, outputs and mask, and casts them to one dtype.

    At steps that do not count, targets and outputs become 0.5: they are equal,
    and every loss here is finite.
    """
    sizes = {}
    axes = ("B", "T", "size")
    targets = check_array(names[0], targets, axes, sizes)
    outputs = check_array(names[1], outputs, axes, sizes)
    mask = check_array(names[2], mask, axes[:2], sizes, kind="mask")
    if dtype is None:
        dtype = at_least_float32(ops.dtype(outputs))
    targets, outputs, mask = (
        ops.cast(part, dtype) for part in (targets, outputs, mask)
    )
    counts = ops.not_equal(mask, 0)[:, :, None]
    return (
        ops.where(counts, targets, 0.5),
        ops.where(counts, outputs, 0.5),
        mask,
    )


def _of_keras(y_true, y_pred, sample_weight, dtype):
    """`_where_it_counts` for the arguments of Keras's losses and metrics."""
    mask = backend.get_keras_mask(y_pred)  # set by `Masking`, for example
    if sample_weight is None:
        sample_weight = mask
    elif mask is not None:
        sizes = {"B": mask.shape[0], "T": mask.shape[1]}
        sample_weight = check_array(
            "sample_weight", sample_weight, ("B", "T"), sizes, "mask", dtype
        )
        sample_weight = sample_weight * ops.cast(mask, dtype)
    if sample_weight is None:
        y_pred = check_array("y_pred", y_pred, ("B", "T", "size"))
        sample_weight = ops.ones_like(y_pred[..., 0], dtype)
    names = "y_true", "y_pred", "sample_weight"
    return _where_it_counts(y_true, y_pred, sample_weight, names, dtype)


class _Counted:
    """Makes a loss of Keras average only over the steps that count.

    The mask is the argument `sample_weight`.
    """

    def __init__(
        self, reduction: str = "mean_with_sample_weight", **kwargs: Any
    ):
        super().__init__(reduction=reduction, **kwargs)

    def __call__(
        self, y_true: Array, y_pred: Array, sample_weight: Array | None = None
    ) -> Array:
        return super().__call__(
            *_of_keras(y_true, y_pred, sample_weight, self.dtype)
        )


@keras.saving.register_keras_serializable(package="keras_memory")
class BitsCrossentropy(_Counted, keras.losses.BinaryCrossentropy):
    """Keras's `BinaryCrossentropy`, averaged over the bits that count.

    Args:
        **kwargs: arguments of `keras.losses.BinaryCrossentropy`.

    Call arguments:
        y_true: (B, T, bits) of 0 and 1.
        y_pred: (B, T, bits) probabilities.
        sample_weight: (B, T) mask, 1 where they count, else 0; None counts all.
    """


@keras.saving.register_keras_serializable(package="keras_memory")
class ClassCrossentropy(_Counted, keras.losses.CategoricalCrossentropy):
    """Keras's `CategoricalCrossentropy`, averaged over the steps that count.

    Args:
        **kwargs: arguments of `keras.losses.CategoricalCrossentropy`.

    Call arguments:
        y_true: (B, T, classes), 1 for the right class, else 0.
        y_pred: (B, T, classes) probabilities.
        sample_weight: (B, T) mask, 1 where they count, else 0; None counts all.
    """


@keras.saving.register_keras_serializable(package="keras_memory")
class SquaredErrorOfSum(keras.losses.Loss):
    """Mean of the squared `absolute_error_of_sum`.

    Sequences without a step that counts are left out of the mean.

    Args:
        name: str. Default `"squared_error_of_sum"`.

    Call arguments:
        y_true: (B, T, size) numbers.
        y_pred: (B, T, size) numbers.
        sample_weight: (B, T) mask, 1 where they count, else 0; None counts all.
    """

    def __init__(self, name: str = "squared_error_of_sum"):
        super().__init__(name=name)

    def get_config(self) -> Config:
        return {"name": self.name}

    def __call__(
        self, y_true: Array, y_pred: Array, sample_weight: Array | None = None
    ) -> Array:
        # Mask before the sum over time; Keras would apply weights after it.
        parts = _of_keras(y_true, y_pred, sample_weight, self.dtype)
        squares = ops.square(absolute_error_of_sum(*parts))
        number = ops.sum(ops.cast(_some_count(parts[-1]), self.dtype))
        return ops.divide_no_nan(ops.sum(squares), number)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        return self(y_true, y_pred)


def _some_count(mask):
    """(B,) bool, True for sequences with a step that counts."""
    return ops.any(ops.not_equal(mask, 0), axis=1)


class _MeanOverSequences(keras.metrics.Mean):
    """Mean over the sequences with a step that counts, since the last reset."""

    def __init__(self, name: str | None = None, **kwargs: Any):
        super().__init__(name=name or self.function.__name__, **kwargs)

    def update_state(
        self, y_true: Array, y_pred: Array, sample_weight: Array | None = None
    ) -> None:
        parts = _of_keras(y_true, y_pred, sample_weight, self.dtype)
        values = type(self).function(*parts)
        super().update_state(values, _some_count(parts[-1]))


@keras.saving.register_keras_serializable(package="keras_memory")
class BitsPerSequence(_MeanOverSequences):
    """Mean of `bits_per_sequence`, for `compile(weighted_metrics=[...])`.

    Args:
        name: str. Default `"bits_per_sequence"`.
        dtype: dtype of the metric.
    """

    function = staticmethod(bits_per_sequence)


@keras.saving.register_keras_serializable(package="keras_memory")
class WrongBitsPerSequence(_MeanOverSequences):
    """Mean of `wrong_bits_per_sequence`, for `compile(weighted_metrics=...)`.

    Args:
        name: str. Default `"wrong_bits_per_sequence"`.
        dtype: dtype of the metric.
    """

    function = staticmethod(wrong_bits_per_sequence)


@keras.saving.register_keras_serializable(package="keras_memory")
class ErrorRate(_MeanOverSequences):
    """Mean of `error_rate`, for `compile(weighted_metrics=[...])`.

    Args:
        name: str. Default `"error_rate"`.
        dtype: dtype of the metric.
    """

    function = staticmethod(error_rate)


@keras.saving.register_keras_serializable(package="keras_memory")
class AbsoluteErrorOfSum(_MeanOverSequences):
    """Mean of `absolute_error_of_sum`, for `compile(weighted_metrics=[...])`.

    Args:
        name: str. Default `"absolute_error_of_sum"`.
        dtype: dtype of the metric.
    """

    function = staticmethod(absolute_error_of_sum)


class Kind(NamedTuple):
    """Activation, loss and metrics for a kind of targets (see `tasks.Task`).

    Args:
        activation: activation of the model's outputs.
        loss: function that makes the loss.
        metrics: metrics that `fit` reports; the first counts the errors.
    """

    activation: str
    loss: Callable[[], keras.losses.Loss]
    metrics: list[type[keras.metrics.Metric]]

    def make_metrics(self) -> list[keras.metrics.Metric]:
        return [metric() for metric in self.metrics]

    @property
    def error(self) -> str:
        """Name of the metric that counts the errors."""
        return self.metrics[0].function.__name__


KINDS = {
    "bits": Kind(
        "sigmoid", BitsCrossentropy, [WrongBitsPerSequence, BitsPerSequence]
    ),
    "class": Kind("softmax", ClassCrossentropy, [ErrorRate]),
    "sum": Kind("linear", SquaredErrorOfSum, [AbsoluteErrorOfSum]),
}
