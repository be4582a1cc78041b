"""Usage of slots, and allocation of free slots.

Axes are always batch B, head H, slot N.
"""

import math

import numpy as np
from keras import ops

from keras_memory.addressing.gradients import custom_gradient

# Usage of an unused slot. 1 minus this rounds to 1, so that unused slots are
# equally free and are allocated one after the other.
USAGE_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-8,
    "float32": 1e-8,
    "float64": 1e-16,
}

# Up to this many slots `allocation` compares all pairs; above, it sorts.
MOST_COMPARED_SLOTS = 128


def least_used(usage):
    """Selects the slot of lowest usage; ties go to the first slot.

    Source: Wayne et al. 2018, choice of the row to write.

    Args:
        usage: (B, N); any real value.

    Returns:
        (B, 1, N) weighting: 1 at one slot, 0 at the others; no gradient.
    """
    slot = ops.argmin(usage, axis=-1)
    weighting = ops.one_hot(slot, usage.shape[-1], dtype=ops.dtype(usage))
    return weighting[:, None]


def mark_used(usage, write_weighting):
    """Usage after a write: slots written for the first time go from -1 to 0.

    Source: Wayne et al. 2018; -1 is our mark of a slot that was never
    written, so that no counter of steps is needed.

    Args:
        usage: (B, N), -1 or at least 0.
        write_weighting: (B, 1, N) weighting, 1 at one slot.

    Returns:
        (B, N) usage.
    """
    return ops.maximum(usage, write_weighting[:, 0] - 1.0)


def add_usage(usage, read_weighting):
    """Usage after a read: the sum of a slot's read weightings so far.

    Source: Wayne et al. 2018. Reading a slot that was never written (-1) does
    not count.

    Args:
        usage: (B, N), -1 or at least 0.
        read_weighting: (B, R, N) weighting.

    Returns:
        (B, N) usage.
    """
    read = ops.sum(read_weighting, axis=1)
    return ops.where(usage < 0, usage, usage + read)


def retention(free_gate, read_weighting):
    """How much of each slot is kept after it was read.

    Source: Graves et al. 2016 (Nature 538), Methods, memory retention vector.

    Args:
        free_gate: (B, R) in [0, 1]; 1 frees what the head has read.
        read_weighting: (B, R, N) weighting of the step before.

    Returns:
        (B, N) in [0, 1].
    """
    return _product_of_heads(1.0 - free_gate[:, :, None] * read_weighting)


def usage_after_write(usage, write_weighting):
    """Usage of each slot after the write heads have written.

    Source: Graves et al. 2016, Methods, usage vector; several write heads
    count as if they wrote one after another.

    Args:
        usage: (B, N) in [0, 1].
        write_weighting: (B, H, N) weighting of the step before.

    Returns:
        (B, N) in [0, 1].
    """
    return usage + (1.0 - usage) * (
        1.0 - _product_of_heads(1.0 - write_weighting)
    )


def _product_of_heads(x):
    """(B, H, N) -> (B, N). Not `ops.prod`: on JAX its gradient fails with a
    symbolic batch size, which exported models have."""
    return math.prod(x[:, head] for head in range(x.shape[1]))


def _free_and_used(usage, epsilon):
    share = 1.0 - epsilon
    return share * (1.0 - usage), epsilon + share * usage


def _grad_allocate(upstream, saved, usage, epsilon, sort):
    weighting, share, *orders = saved
    free, used = _free_and_used(usage, epsilon)
    grad_before = upstream * weighting
    if sort:
        grad_log = _sum_of_earlier(grad_before, *orders, from_the_end=True)
    else:
        is_freer = _is_freer(free, usage.dtype)
        grad_log = ops.matmul(grad_before[:, None], is_freer)[:, 0]
    return (1.0 - epsilon) * (grad_log / used - upstream * share)


@custom_gradient(_grad_allocate, saves=True)
def _allocate(usage, *, epsilon, sort):
    free, used = _free_and_used(usage, epsilon)
    if sort:
        order = ops.argsort(-free, axis=-1)
        orders = [order, ops.argsort(order, axis=-1)]
        before = _sum_of_earlier(ops.log(used), *orders)
    else:
        orders = []
        is_freer = _is_freer(free, usage.dtype)
        before = ops.matmul(is_freer, ops.log(used)[:, :, None])[:, :, 0]
    share = ops.exp(before)
    return [free * share, share, *orders]


def allocation(usage, usage_epsilon=None, sort=None):
    """Weighs slots by how free they are: the freest one first.

    Source: Graves et al. 2016, Methods, dynamic memory allocation:
    a[phi(j)] = (1 - u[phi(j)]) prod_{i < j} u[phi(i)], where phi sorts the
    slots by ascending usage; ties go to the lower slot.
    Departure: u is `usage_epsilon` + (1 - `usage_epsilon`) usage, and the
    product is a sum of logarithms, so that gradients are finite at usage 0
    and 1.

    Args:
        usage: (B, N) in [0, 1].
        usage_epsilon: float in (0, 1); None for the default in
            `USAGE_EPSILON`.
        sort: bool. True sorts the slots, in time N log N. False compares all
            pairs, in time N^2, which is faster for few slots. Both give the
            same results. None chooses by N.

    Returns:
        (B, N) weighting: non-negative, sums to at most 1 over N.
    """
    slots = usage.shape[-1]
    if usage_epsilon is None:
        usage_epsilon = USAGE_EPSILON[ops.dtype(usage)]
    if sort is None:
        sort = slots > MOST_COMPARED_SLOTS

    return _allocate(usage, epsilon=usage_epsilon, sort=sort)


def _is_freer(free, dtype):
    """(B, N, N), 1 if slot j is freer than slot i, or as free and lower."""
    free_i, free_j = free[:, :, None], free[:, None, :]
    lower = np.tri(free.shape[-1], k=-1, dtype=bool)
    tied = ops.logical_and(free_j == free_i, lower)
    return ops.cast(ops.logical_or(free_j > free_i, tied), dtype)


def _sum_of_earlier(x, order, place, from_the_end=False):
    """For each slot, the sum of x over the slots before it in `order`.

    `place` is the position of each slot in `order`. With `from_the_end` the
    sum is over the slots after it.
    """
    ranked = ops.take_along_axis(x, order, axis=-1)
    if from_the_end:
        ranked = ops.flip(ranked, axis=-1)
    sums = ops.cumsum(ranked[:, :-1], axis=-1)
    sums = ops.concatenate([ops.zeros_like(x[:, :1]), sums], axis=-1)
    if from_the_end:
        sums = ops.flip(sums, axis=-1)
    return ops.take_along_axis(sums, place, axis=-1)
