"""Addressing by location: moves the weighting of the step before.

Axes are always batch B, head H, slot N.
"""

import math

from keras import ops

from keras_memory.addressing.activations import grad_softmax
from keras_memory.addressing.gradients import custom_gradient
from keras_memory.addressing.slots import row_sum

# Keeps log(0) finite in `sharpen`. Small enough not to change results, but
# large enough that its reciprocal, which the gradient contains, is finite.
SHARPENING_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-12,
    "float32": 1e-12,
    "float64": 1e-20,
}


def _grad_interpolate(upstream, _, content, previous, gate):
    gate = gate[:, :, None]
    grad_gate = row_sum(upstream * (content - previous))[:, :, 0]
    return gate * upstream, (1.0 - gate) * upstream, grad_gate


@custom_gradient(_grad_interpolate, saves=True)
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
    gate = interpolation_gate[:, :, None]
    return [gate * content_weighting + (1.0 - gate) * previous_weighting]


def _grad_shift(upstream, weighting, shifts):
    rolled = _rolled(weighting, shifts.shape[-1] // 2)
    grad_shifts = [row_sum(upstream * moved) for moved in rolled]
    return (
        shift(upstream, ops.flip(shifts, axis=-1)),
        ops.concatenate(grad_shifts, axis=-1),
    )


@custom_gradient(_grad_shift)
def shift(weighting, shifts):
    """Moves the focus along the slots; the last slot wraps to the first.

    Source: Graves et al. 2014, eq. 8.

    Args:
        weighting: (B, H, N) weighting.
        shifts: (B, H, 2 S + 1) distribution over the offsets -S, ..., S; the
            offset +1 moves the focus from slot i to slot i + 1.

    Returns:
        (B, H, N) weighting with the same sum.
    """
    rolled = _rolled(weighting, shifts.shape[-1] // 2)
    return sum(
        shifts[:, :, index, None] * moved for index, moved in enumerate(rolled)
    )


def _rolled(weighting, shift_range):
    """A weighting moved by -shift_range, ..., shift_range slots."""
    if not shift_range:
        return [weighting]
    slots = weighting.shape[-1]
    last, first = weighting[:, :, -shift_range:], weighting[:, :, :shift_range]
    around = ops.concatenate([last, weighting, first], axis=-1)
    starts = range(2 * shift_range, -1, -1)
    return [around[:, :, start : start + slots] for start in starts]


def _grad_sharpen(upstream, saved, _, sharpening):
    # This uses the saved weighting, so that the shift need not run again.
    result, logarithm, weighting = saved
    grad_logits = grad_softmax(upstream, result)
    grad_power = row_sum(grad_logits * logarithm)[:, :, 0]
    return sharpening[:, :, None] * grad_logits / weighting, grad_power


@custom_gradient(_grad_sharpen, saves=True)
def sharpen(weighting, sharpening):
    """Raises a weighting to a power and normalizes it.

    Source: Graves et al. 2014, eq. 9.
    Departure: written as a softmax of logarithms, with `SHARPENING_EPSILON`
    inside, which neither underflows nor divides by zero.

    Args:
        weighting: (B, H, N) weighting.
        sharpening: (B, H) powers, at least 1; 1 only normalizes.

    Returns:
        (B, H, N) weighting: non-negative, sums to 1 over N.
    """
    epsilon = SHARPENING_EPSILON[ops.dtype(weighting)]
    weighting = weighting + epsilon
    logarithm = ops.log(weighting)
    # The largest power is exactly 1; others may underflow to 0.
    lowest = math.log(epsilon)
    largest = ops.max(logarithm, axis=-1, keepdims=True, initial=lowest)
    logits = logarithm - ops.stop_gradient(largest)
    powers = ops.exp(sharpening[:, :, None] * logits)
    return [powers / row_sum(powers), logarithm, weighting]
