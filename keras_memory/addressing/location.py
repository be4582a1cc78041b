"""Addressing by location: from the weighting of the step before.

Axes are always batch B, head H, slot N.
"""

import math

from keras import ops

from keras_memory.addressing.activations import grad_softmax
from keras_memory.addressing.gradients import saved
from keras_memory.addressing.gradients import with_gradient
from keras_memory.addressing.slots import row_sum

# Keeps log(0) finite in `sharpen`; small enough to leave the numbers alone,
# large enough that its reciprocal, which the gradient meets, is finite too.
SHARPENING_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-12,
    "float32": 1e-12,
    "float64": 1e-20,
}


def interpolate(content_weighting, previous_weighting, interpolation_gate):
    """Mixes the content weighting with the weighting of the step before.

    Source: Graves et al. 2014, eq. 7.

    Args:
        content_weighting: (B, H, N) weighting.
        previous_weighting: (B, H, N) weighting of the same heads at t - 1.
        interpolation_gate: (B, H) in [0, 1]; 1 takes the content weighting.

    Returns:
        (B, H, N) weighting.
    """

    def mixed(content, previous, gate):
        return [gate * content + (1.0 - gate) * previous]

    def gradient(upstream, _, content, previous, gate):
        return (
            gate * upstream,
            (1.0 - gate) * upstream,
            row_sum(upstream * (content - previous)),
        )

    gate = interpolation_gate[:, :, None]
    return saved(mixed, gradient, content_weighting, previous_weighting, gate)


def shift(weighting, shifts):
    """Moves the focus along the slots, around the end to the beginning.

    Source: Graves et al. 2014, eq. 8.

    Args:
        weighting: (B, H, N) weighting.
        shifts: (B, H, 2 S + 1) distribution over the offsets -S, ..., S; the
            offset +1 moves the focus from slot i to slot i + 1.

    Returns:
        (B, H, N) weighting with the same sum.
    """
    shift_range = shifts.shape[-1] // 2
    if shift_range == 0:
        return shifts * weighting

    def rolled(weighting):
        """By -S, ..., S slots."""
        slots = weighting.shape[-1]
        around = ops.concatenate(
            [
                weighting[:, :, -shift_range:],
                weighting,
                weighting[:, :, :shift_range],
            ],
            axis=-1,
        )
        starts = range(2 * shift_range, -1, -1)
        return [around[:, :, start : start + slots] for start in starts]

    def shifted(weighting, shifts):
        return sum(
            shifts[:, :, index, None] * one
            for index, one in enumerate(rolled(weighting))
        )

    def gradient(upstream, weighting, shifts):
        grad_shifts = [row_sum(upstream * one) for one in rolled(weighting)]
        return (
            shift(upstream, ops.flip(shifts, axis=-1)),
            ops.concatenate(grad_shifts, axis=-1),
        )

    return with_gradient(shifted, gradient, weighting, shifts)


def sharpen(weighting, sharpening):
    """Raises a weighting to a power and normalises it.

    Source: Graves et al. 2014, eq. 9.
    Departure: written as a softmax of logarithms, with `SHARPENING_EPSILON`
    inside, which neither underflows nor divides by zero.

    Args:
        weighting: (B, H, N) weighting.
        sharpening: (B, H) powers, at least 1; 1 only normalises.

    Returns:
        (B, H, N) weighting: non-negative, sums to 1 over N.
    """
    epsilon = SHARPENING_EPSILON[ops.dtype(weighting)]

    def sharpened(weighting, power):
        weighting = weighting + epsilon
        logarithm = ops.log(weighting)
        # The largest is 1, and others may underflow to 0.
        lowest = math.log(epsilon)
        largest = ops.max(logarithm, axis=-1, keepdims=True, initial=lowest)
        powers = ops.exp(power * (logarithm - ops.stop_gradient(largest)))
        return [powers / row_sum(powers), logarithm, weighting]

    def gradient(upstream, saved, _, power):
        # The weighting that was kept: the shift need not be done again.
        result, logarithm, weighting = saved
        grad_logits = grad_softmax(upstream, result)
        return power * grad_logits / weighting, row_sum(grad_logits * logarithm)

    return saved(sharpened, gradient, weighting, sharpening[:, :, None])
