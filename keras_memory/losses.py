"""Losses and metrics of bit sequences, counted where the mask says.

The loss is Keras's own: `BinaryCrossentropy(reduction=
"mean_with_sample_weight")` with the mask as `sample_weight` is the mean over
the bits that count.
"""

import math

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
        (B,) counts, at least 0.
    """
    wrong = ops.cast((outputs >= 0.5) != (targets >= 0.5), "float32")
    return ops.sum(wrong * mask[:, :, None], axis=(1, 2))


class _MeanOverSequences(keras.metrics.Mean):
    """Mean over the sequences seen since the last reset."""

    def __init__(self, name=None, **kwargs):
        super().__init__(name=name or self.function.__name__, **kwargs)

    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            sample_weight = ops.ones(ops.shape(y_true)[:2])
        targets = ops.cast(y_true, "float32")
        outputs = ops.cast(y_pred, "float32")
        mask = ops.cast(sample_weight, "float32")
        super().update_state(type(self).function(targets, outputs, mask))


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
