"""Activations that Keras lacks, or that raise warnings in Keras."""

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.gradients import DERIVATIVES
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.slots import row_sum


def not_negative(x):
    """Replaces negative entries by 0. The gradient at 0 itself is 1."""
    return ops.where(x < 0, ops.zeros_like(x), x)


def into_unit_range(x, sums=None):
    """Brings entries into [0, 1], or, with `sums`, sums to at most 1. Within
    this range the gradient is 1."""
    x = not_negative(x)
    if sums is None:
        return ops.where(x > 1, ops.ones_like(x), x)
    return x / ops.stop_gradient(ops.maximum(sums(x), 1.0))


def sums_into_unit_range(x):
    """Scales rows whose entries sum to more than 1, so that they sum to 1, and
    replaces negative entries by 0, as `into_unit_range` does."""
    return into_unit_range(x, lambda x: ops.sum(x, axis=-1, keepdims=True))


def softmax(logits):
    """Softmax over the last axis.

    Keras warns about an axis of one entry, which is valid here: there may be
    one slot, or one shift.
    """
    if logits.shape[-1] == 1:  # None if the size is unknown
        return ops.ones_like(logits)
    return ops.softmax(logits)


def oneplus(x):
    """1 + log(1 + exp(x)), at least 1.

    Source: Graves et al. 2016 (Nature 538), Methods, key strengths.
    """
    return 1.0 + ops.softplus(x)


def grad_softmax(dy, y, x=None):
    """Gradient of the logits of `softmax`, from its result `y`."""
    dy = dy * y
    return dy - y * row_sum(dy)


DERIVATIVES[softmax] = grad_softmax
DERIVATIVES[oneplus] = DERIVATIVES[keras.activations.softplus]


def activation_by_name(name):
    """Returns a Keras activation, or `oneplus`, which Keras lacks."""
    is_own = isinstance(name, str) and name == "oneplus"
    return oneplus if is_own else keras.activations.get(name)


@keras.saving.register_keras_serializable(package="keras_memory")
def gelu(x):
    """x times the standard normal distribution function of x.

    Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415), section 2. TensorFlow's
    `tf.nn.gelu`, which Keras calls, has only the digits of float32 in float64.
    """
    return 0.5 * x * (1.0 + ops.erf(x * 0.5**0.5))


# Without registration, a loaded model would use Keras's own sparsemax.
@keras.saving.register_keras_serializable(package="keras_memory")
def sparsemax(logits, axis=-1):
    """Projects logits onto the probability simplex: a softmax with zeros.

    Source: Martins & Astudillo 2016 (arXiv 1602.02068), eqs. 2-3.
    Departure: their Algorithm 1 sorts the logits; here the support shrinks
    until it no longer changes (Michelot 1986), which takes a few passes. The
    maximum is subtracted first, which affects only rounding. 16-bit logits are
    computed in float32.

    `keras.ops.sparsemax` of Keras 3.15 does not sum to 1 where more than one
    entry is positive (Keras issue 23425).

    Args:
        logits: array of any shape; any real value. -inf gives 0. Integers
            become float32.
        axis: int, the axis to sum to 1 over.

    Returns:
        Array like `logits`: non-negative, sums to 1 over `axis`. Vectors along
        `axis` with a NaN or +inf, or with -inf only, give NaN everywhere.
    """
    logits = ops.convert_to_tensor(logits)
    if "float" not in ops.dtype(logits):
        logits = ops.cast(logits, "float32")
    z = ops.cast(logits, at_least_float32(ops.dtype(logits)))
    # Without `initial`, Keras rejects an array of no rows.
    largest = ops.max(z, axis=axis, keepdims=True, initial=-np.inf)
    z = z - ops.stop_gradient(largest)

    def row_sum(x):
        return ops.sum(x, axis=axis, keepdims=True)

    def threshold_of(z, support):
        inside = ops.where(support, z, ops.zeros_like(z))
        count = row_sum(ops.cast(support, ops.dtype(z)))
        return (row_sum(inside) - 1.0) / ops.maximum(count, 1.0)

    fixed = ops.stop_gradient(z)

    def shrinks(support, smaller):
        return ops.any(ops.not_equal(support, smaller))

    def shrink(support, smaller):
        return smaller, smaller & (fixed > threshold_of(fixed, smaller))

    # Logits at least 1 below the maximum are outside of the support.
    none, first = ops.zeros_like(z, dtype="bool"), fixed > -1.0
    _, support = ops.while_loop(shrinks, shrink, (none, first))
    threshold = threshold_of(z, support)
    # XLA's maximum ignores NaN; the sum does not.
    threshold = ops.where(ops.isnan(row_sum(z)), row_sum(z), threshold)
    return ops.cast(ops.relu(z - threshold), logits.dtype)
