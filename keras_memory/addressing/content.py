"""Addressing by content: weighs slots by their similarity to a key.

Pure functions without weights or state. Axes are always batch B, head H,
width W, slot N. A weighting is non-negative and sums to at most one over N.
"""

import numpy as np
from keras import ops

from keras_memory.addressing.activations import grad_softmax
from keras_memory.addressing.activations import softmax
from keras_memory.addressing.gradients import custom_gradient
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.scaling import in_range
from keras_memory.addressing.slots import inner_products
from keras_memory.addressing.slots import outer_write
from keras_memory.addressing.slots import read
from keras_memory.addressing.slots import row_sum

# Added to squared norms: a slot with a norm far below its root counts as empty.
NORM_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-8,
    "float32": 1e-8,
    "float64": 1e-16,
}


def cosine_similarity(
    memory, keys, norm_epsilon=None, product_epsilon=0.0, masks=None
):
    """Compares each key with each slot by the angle between them.

    Source: Graves et al. 2014, eq. 6; with masks Csordas & Schmidhuber 2019
    (arXiv 1904.10278), masked content addressing.
    Departure: `norm_epsilon` is added inside the root of each norm, so that an
    all-zero slot or key has similarity 0 and finite gradients. Vectors may be
    as large as their dtype allows; 16-bit vectors are compared in float32.

    Args:
        memory: (B, W, N) slot contents; any real value.
        keys: (B, H, W) look-up vectors, one per head; any real value.
        norm_epsilon: float above 0, added to each squared norm; None for the
            default in `NORM_EPSILON`.
        product_epsilon: float, at least 0, added to the product of norms.
        masks: (B, H, W) in [0, 1] or None: the weight of each of the W entries
            of the key and of every slot.

    Returns:
        (B, H, N) similarities in [-1, 1].

    Raises:
        ValueError: `memory` and `keys` differ in W.
    """
    heads, slots = keys.shape[1], memory.shape[2]
    dtype = ops.dtype(memory)
    if norm_epsilon is None:
        norm_epsilon = NORM_EPSILON[dtype]
    memory, keys = _to_compare(memory, keys, masks)
    similarity = _compare(memory, keys, norm_epsilon, product_epsilon)[0]
    if masks is not None:
        similarity = ops.reshape(similarity, (-1, heads, slots))
    return ops.cast(similarity, dtype)


def _to_compare(memory, keys, masks):
    """Casts memory and keys to the dtype of the comparison, and masks them.

    With masks each head has a masked memory of its own: the results are
    (B H, W, N) and (B H, 1, W).
    """
    if memory.shape[1] != keys.shape[2]:
        raise ValueError(
            "`memory` (B, W, N) and `keys` (B, H, W) must have the same width "
            "W to be compared. "
            f"Received: memory.shape={tuple(memory.shape)}, "
            f"keys.shape={tuple(keys.shape)}"
        )
    dtype = at_least_float32(ops.dtype(memory))
    memory, keys = ops.cast(memory, dtype), ops.cast(keys, dtype)
    if masks is None:
        return memory, keys
    masks = ops.cast(masks, dtype)
    width, slots = memory.shape[1:]
    memory = memory[:, None] * masks[:, :, :, None]
    return (
        ops.reshape(memory, (-1, width, slots)),
        ops.reshape(keys * masks, (-1, 1, width)),
    )


def _compare(memory, keys, norm_epsilon, product_epsilon):
    """Compares keys with slots, which are first scaled to avoid overflow.

    Returns similarities (B, H, N), the scales of keys (B, H, 1) and slots
    (B, 1, N), and the norms of the scaled keys and slots.
    """
    memory, slot_scale = in_range(memory, axis=1)
    keys, key_scale = in_range(keys, axis=-1)
    slot_norms = ops.sum(memory * memory, axis=1, keepdims=True)
    key_norms = ops.sum(keys * keys, axis=-1, keepdims=True)
    slot_norms = ops.sqrt(slot_norms + norm_epsilon * slot_scale * slot_scale)
    key_norms = ops.sqrt(key_norms + norm_epsilon * key_scale * key_scale)
    product = key_norms * slot_norms
    if product_epsilon:
        product = product + product_epsilon * key_scale * slot_scale
    similarity = inner_products(keys, memory) / product
    # Only rounding errors leave [-1, 1]: clip the value, but not the gradient.
    outside = ops.clip(similarity, -1.0, 1.0) - similarity
    similarity = similarity + ops.stop_gradient(outside)
    return similarity, key_scale, slot_scale, key_norms, slot_norms


def _grad_weigh(
    upstream, saved, memory, keys, strengths, norm_epsilon, product_epsilon
):
    weighting, similarity, key_scale, slot_scale = saved[:4]
    key_norms, slot_norms = saved[4:]
    memory, keys = memory * slot_scale, keys * key_scale
    grad_logits = grad_softmax(upstream, weighting)
    by_similarity = grad_logits * similarity
    sums = row_sum(by_similarity)
    grad_strengths = sums
    norms = key_norms * slot_norms
    if product_epsilon:
        epsilon = product_epsilon * key_scale * slot_scale
        share = norms / (norms + epsilon)
        grad_logits, by_similarity = share * grad_logits, share * by_similarity
        sums = row_sum(by_similarity)
    grad_dot = strengths * grad_logits / norms
    grad_key_norms = strengths * sums / key_norms
    grad_slot_norms = ops.matmul(ops.swapaxes(strengths, 1, 2), by_similarity)
    grad_memory = outer_write(keys, grad_dot) - memory * (
        grad_slot_norms / slot_norms**2
    )
    grad_keys = read(memory, grad_dot) - keys / key_norms * grad_key_norms
    return grad_memory * slot_scale, grad_keys * key_scale, grad_strengths


@custom_gradient(_grad_weigh, saves=True)
def _weigh(memory, keys, strengths, *, norm_epsilon, product_epsilon):
    """Content weighting of memory and keys that `_to_compare` returned, and
    what `_compare` returned, which the gradient uses."""
    compared = _compare(memory, keys, norm_epsilon, product_epsilon)
    return [softmax(strengths * compared[0]), *compared]


def content_weighting(
    memory, keys, strengths, norm_epsilon=None, product_epsilon=0.0, masks=None
):
    """Weighs slots by how closely they match each head's key.

    Source: Graves et al. 2014, eqs. 5-6.

    Args:
        memory: (B, W, N) slot contents; any real value.
        keys: (B, H, W) look-up vectors, one per head; any real value.
        strengths: (B, H), at least 0, no unit; 0 gives uniform weighting.
        norm_epsilon, product_epsilon, masks: see `cosine_similarity`.

    Returns:
        (B, H, N) weighting: non-negative, sums to 1 over N.

    Raises:
        ValueError: `memory` and `keys` differ in W.
    """
    heads, slots = keys.shape[1], memory.shape[2]
    dtype = ops.dtype(memory)
    if norm_epsilon is None:
        norm_epsilon = NORM_EPSILON[dtype]
    memory, keys = _to_compare(memory, keys, masks)
    strengths = ops.cast(
        ops.reshape(strengths, (-1, keys.shape[1], 1)), ops.dtype(keys)
    )
    weighting = _weigh(
        memory,
        keys,
        strengths,
        norm_epsilon=norm_epsilon,
        product_epsilon=product_epsilon,
    )
    return ops.cast(ops.reshape(weighting, (-1, heads, slots)), dtype)


def entropy(weighting):
    """How widely a weighting is spread, in bits: the sum of -w log2 w.

    0 if one slot has all the weight, log2(N) if all slots have the same. A
    weighting that sums to less than 1 is not rescaled: a head that reads
    nothing has 0.

    Args:
        weighting: (..., N), not negative.

    Returns:
        (...) float64.

    Raises:
        ValueError: `weighting` has no slots, or negative entries.

    >>> print(entropy([[1.0, 0.0], [0.5, 0.5], [0.5, 0.0]]))
    [0.  1.  0.5]
    """
    weighting = np.asarray(weighting, "float64")
    if not weighting.ndim or not weighting.shape[-1]:
        raise ValueError(
            "`weighting` must have the shape (..., N) with at least one slot. "
            f"Received: shape {weighting.shape}"
        )
    if np.any(weighting < -1e-6):  # beyond rounding errors
        raise ValueError(
            "`weighting` must not be negative. "
            f"Received: a minimum of {np.nanmin(weighting)}"
        )
    bits = np.log2(np.where(weighting <= 0, 1.0, weighting))
    return 0.0 - (weighting * bits).sum(axis=-1)
