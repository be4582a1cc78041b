"""Losses and metrics of sequences, counted where the mask says.

The loss of bits and of classes is Keras's own: `BinaryCrossentropy(reduction=
"mean_with_sample_weight")` with the mask as `sample_weight` is the mean over
the bits that count.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops


def bits_per_sequence(targets, outputs, mask):
    """Cross-entropy of each sequence in bits, as the NTM paper reports it.

    Source: Graves et al. 2014, section 4 ("cost per sequence (bits)").

    Args:
        targets: (B, T, bits) of 0 and 1.
        outputs: (B, T, bits) probabilities.
        mask: (B, T), 1 where the target counts, else 0.

    Returns:
        (B,) bits, at least 0: 8 for eight outputs of one half.
    """
    entropy = ops.binary_crossentropy(targets, outputs)
    return ops.sum(entropy * mask[:, :, None], axis=(1, 2)) / math.log(2.0)


def wrong_bits_per_sequence(targets, outputs, mask):
    """Number of wrong bits of each sequence, after rounding the outputs.

    Args:
        targets: (B, T, bits) of 0 and 1.
        outputs: (B, T, bits) probabilities; at least one half counts as 1.
        mask: (B, T), 1 where the target counts, else 0.

    Returns:
        (B,) counts, at least 0; NaN where an output is.
    """
    wrong = ops.cast((outputs >= 0.5) != (targets >= 0.5), "float32")
    wrong = ops.where(ops.isnan(outputs), float("nan"), wrong)
    return ops.sum(wrong * mask[:, :, None], axis=(1, 2))


def error_rate(targets, outputs, mask):
    """Share of the steps of each sequence at which another class is likelier.

    Args:
        targets: (B, T, classes), 1 for the right class, else 0.
        outputs: (B, T, classes) probabilities.
        mask: (B, T), 1 where the target counts, else 0.

    Returns:
        (B,) shares from 0 to 1; NaN where an output is.
    """
    wrong = ops.argmax(outputs, axis=-1) != ops.argmax(targets, axis=-1)
    unknown = ops.any(ops.isnan(outputs), axis=-1)
    wrong = ops.where(unknown, float("nan"), ops.cast(wrong, "float32"))
    return ops.sum(wrong * mask, axis=1) / ops.sum(mask, axis=1)


def absolute_error_of_sum(targets, outputs, mask):
    """How far the sum of a sequence's outputs is from that of its targets.

    Source: pytorch-dnc's adding task.

    Args:
        targets: (B, T, size) numbers.
        outputs: (B, T, size) numbers.
        mask: (B, T), 1 where outputs and targets count, else 0.

    Returns:
        (B,) errors, at least 0.
    """
    return ops.abs(ops.sum((outputs - targets) * mask[:, :, None], axis=(1, 2)))


@keras.saving.register_keras_serializable(package="keras_memory")
class SquaredErrorOfSum(keras.losses.Loss):
    """Mean over sequences of the square of `absolute_error_of_sum`.

    Args:
        name: str. Default `"squared_error_of_sum"`.

    Call arguments:
        y_true: (B, T, size) numbers.
        y_pred: (B, T, size) numbers.
        sample_weight: (B, T) mask, 1 where they count, else 0; None counts all.
    """

    def __init__(self, name="squared_error_of_sum"):
        super().__init__(name=name)

    def get_config(self):
        return {"name": self.name}

    def __call__(self, y_true, y_pred, sample_weight=None):
        # The mask goes in before the sum, so not where Keras would weigh.
        error = absolute_error_of_sum(*_floats(y_true, y_pred, sample_weight))
        return ops.mean(ops.square(error))

    def call(self, y_true, y_pred):
        return self(y_true, y_pred)


def _floats(y_true, y_pred, sample_weight):
    if sample_weight is None:
        sample_weight = ops.ones(ops.shape(y_true)[:2])
    elif len(sample_weight.shape) != 2:
        raise ValueError(
            "`sample_weight` is the mask (B, T) of sequences (B, T, size). "
            f"Received: sample_weight of shape {tuple(sample_weight.shape)}"
        )
    return [
        ops.cast(part, "float32") for part in (y_true, y_pred, sample_weight)
    ]


class _MeanOverSequences(keras.metrics.Mean):
    """Mean over the sequences seen since the last reset."""

    def __init__(self, name=None, **kwargs):
        super().__init__(name=name or self.function.__name__, **kwargs)

    def update_state(self, y_true, y_pred, sample_weight=None):
        values = type(self).function(*_floats(y_true, y_pred, sample_weight))
        super().update_state(values)


@keras.saving.register_keras_serializable(package="keras_memory")
class BitsPerSequence(_MeanOverSequences):
    """Mean of `bits_per_sequence`, for `compile(weighted_metrics=[...])`.

    Args:
        name: str. Default `"bits_per_sequence"`.
        dtype: of the metric.
    """

    function = staticmethod(bits_per_sequence)


@keras.saving.register_keras_serializable(package="keras_memory")
class WrongBitsPerSequence(_MeanOverSequences):
    """Mean of `wrong_bits_per_sequence`, for `compile(weighted_metrics=...)`.

    Args:
        name: str. Default `"wrong_bits_per_sequence"`.
        dtype: of the metric.
    """

    function = staticmethod(wrong_bits_per_sequence)


@keras.saving.register_keras_serializable(package="keras_memory")
class ErrorRate(_MeanOverSequences):
    """Mean of `error_rate`, for `compile(weighted_metrics=[...])`.

    Args:
        name: str. Default `"error_rate"`.
        dtype: of the metric.
    """

    function = staticmethod(error_rate)


@keras.saving.register_keras_serializable(package="keras_memory")
class AbsoluteErrorOfSum(_MeanOverSequences):
    """Mean of `absolute_error_of_sum`, for `compile(weighted_metrics=[...])`.

    Args:
        name: str. Default `"absolute_error_of_sum"`.
        dtype: of the metric.
    """

    function = staticmethod(absolute_error_of_sum)


class Kind(NamedTuple):
    """What comes with a kind of targets: see `tasks.Task`.

    Args:
        activation: of the model's outputs.
        loss: makes the loss.
        metrics: metrics that `fit` reports; the first counts the errors.
    """

    activation: str
    loss: Callable
    metrics: list

    def make_metrics(self):
        return [metric() for metric in self.metrics]

    @property
    def error(self):
        """Name of the metric that counts the errors."""
        return self.metrics[0].function.__name__


KINDS = {
    "bits": Kind(
        "sigmoid",
        functools.partial(
            keras.losses.BinaryCrossentropy,
            reduction="mean_with_sample_weight",
        ),
        [WrongBitsPerSequence, BitsPerSequence],
    ),
    "class": Kind(
        "softmax",
        functools.partial(
            keras.losses.CategoricalCrossentropy,
            reduction="mean_with_sample_weight",
        ),
        [ErrorRate],
    ),
    "sum": Kind("linear", SquaredErrorOfSum, [AbsoluteErrorOfSum]),
}
