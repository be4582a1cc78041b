"""Where to read and write: weightings over the slots of a memory.

Pure functions without weights or state. Axes are always batch B, head H,
slot N, width W. A weighting is non-negative and sums to at most one over N.
"""

import keras
from keras import ops

# Keeps log(0) finite in `sharpen`; small enough to leave the numbers alone,
# large enough that its reciprocal, which the gradient meets, is finite too.
SHARPENING_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-12,
    "float32": 1e-12,
    "float64": 1e-20,
}

# Norms below the root of this are those of an empty slot.
NORM_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-8,
    "float32": 1e-8,
    "float64": 1e-16,
}


def cosine_similarity(memory, keys, norm_epsilon, product_epsilon=0.0):
    """Compares each key with each slot by the angle between them.

    Source: Graves et al. 2014, eq. 6.
    Departure: `norm_epsilon` stands inside the root of each norm, so that an
    all-zero slot or key has similarity 0 and finite gradients.

    Args:
        memory: (B, N, W) slot contents; any real value.
        keys: (B, H, W) look-up vectors, one per head; any real value.
        norm_epsilon: float, at least 0, added to each squared norm.
        product_epsilon: float, at least 0, added to the product of norms.

    Returns:
        (B, H, N) similarities in [-1, 1].

    Raises:
        ValueError: the last axes of `memory` and `keys` differ.
    """
    if memory.shape[-1] != keys.shape[-1]:
        raise ValueError(
            "`memory` and `keys` must have the same width (their last axis) "
            "to be compared. "
            f"Received: memory.shape={tuple(memory.shape)}, "
            f"keys.shape={tuple(keys.shape)}"
        )
    dot = ops.matmul(keys, ops.transpose(memory, (0, 2, 1)))
    key_norm = ops.sqrt(ops.sum(keys * keys, axis=-1) + norm_epsilon)
    slot_norm = ops.sqrt(ops.sum(memory * memory, axis=-1) + norm_epsilon)
    norms = key_norm[:, :, None] * slot_norm[:, None, :]
    return dot / (norms + product_epsilon)


def content_weighting(
    memory, keys, strengths, norm_epsilon, product_epsilon=0.0
):
    """Weighs slots by how closely they match each head's key.

    Source: Graves et al. 2014, eqs. 5-6.

    Args:
        memory: (B, N, W) slot contents; any real value.
        keys: (B, H, W) look-up vectors, one per head; any real value.
        strengths: (B, H), at least 0, no unit; 0 gives uniform weighting.
        norm_epsilon: see `cosine_similarity`.
        product_epsilon: see `cosine_similarity`.

    Returns:
        (B, H, N) weighting: non-negative, sums to 1 over N.

    Raises:
        ValueError: the last axes of `memory` and `keys` differ.
    """
    similarity = cosine_similarity(memory, keys, norm_epsilon, product_epsilon)
    return softmax(strengths[:, :, None] * similarity)


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
    return gate * content_weighting + (1.0 - gate) * previous_weighting


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
    return sum(
        shifts[:, :, index, None] * ops.roll(weighting, offset, axis=-1)
        for index, offset in enumerate(range(-shift_range, shift_range + 1))
    )


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
    logits = sharpening[:, :, None] * ops.log(weighting + epsilon)
    return softmax(logits)


def least_used(usage):
    """Points at the slot of lowest usage, the first of several.

    Source: Wayne et al. 2018, of the row that is written.

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
    """Usage after a read: a slot's usage is how much it was read so far.

    Source: Wayne et al. 2018. Reading a slot that was never written (-1) is
    no use of it.

    Args:
        usage: (B, N), -1 or at least 0.
        read_weighting: (B, R, N) weighting.

    Returns:
        (B, N) usage.
    """
    read = ops.sum(read_weighting, axis=1)
    return ops.where(usage < 0, usage, usage + read)


def softmax(logits):
    """Softmax over the last axis, without Keras's warning where that has one
    entry: there may be one slot, or one shift."""
    if logits.shape[-1] == 1:
        return ops.ones_like(logits)
    return ops.softmax(logits, axis=-1)


def oneplus(x):
    """1 + log(1 + exp(x)), at least 1.

    Source: Graves et al. 2016 (Nature 538), Methods, of the key strengths.
    """
    return 1.0 + ops.softplus(x)


# Registered, or a saved model would come back with Keras's own sparsemax.
@keras.saving.register_keras_serializable(package="keras_memory")
def sparsemax(logits, axis=-1):
    """Projects logits onto the probability simplex: a softmax with zeros.

    Source: Martins & Astudillo 2016 (arXiv 1602.02068), Algorithm 1.
    Departure: the maximum is subtracted first, which changes nothing but the
    rounding; 16-bit logits are computed in float32.

    `keras.ops.sparsemax` of Keras 3.15 does not sum to 1 where more than one
    entry is positive (Keras issue 23425).

    Args:
        logits: array of any shape; any real value. -inf gives 0. Integers
            become float32.
        axis: int, the axis to sum to 1 over.

    Returns:
        Array like `logits`: non-negative, sums to 1 over `axis`; all NaN where
        there is a NaN or +inf, or -inf only, along `axis`.
    """
    logits = ops.convert_to_tensor(logits)
    if "float" not in ops.dtype(logits):
        logits = ops.cast(logits, "float32")
    dtype = "float64" if ops.dtype(logits) == "float64" else "float32"
    z = ops.cast(logits, dtype)
    z = z - ops.stop_gradient(ops.max(z, axis=axis, keepdims=True))
    ranked = ops.flip(ops.sort(z, axis=axis), axis=axis)
    rank = ops.cumsum(ops.ones_like(z), axis=axis, dtype=dtype)
    sums = ops.cumsum(ranked, axis=axis, dtype=dtype)
    support = 1.0 + rank * ranked > sums

    def total(x):
        return ops.sum(x, axis=axis, keepdims=True)

    inside = ops.where(support, ranked, ops.zeros_like(ranked))
    threshold = (total(inside) - 1.0) / total(ops.cast(support, dtype))
    # XLA's maximum passes over NaN, but the sum does not.
    threshold = ops.where(ops.isnan(total(z)), total(z), threshold)
    return ops.cast(ops.relu(z - threshold), logits.dtype)
