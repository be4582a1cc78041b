"""Where to read and write: weightings over the slots of a memory.

Pure functions without weights or state. Axes are always batch B, head H,
width W, slot N. A weighting is non-negative and sums to at most one over N.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_memory.access import match
from keras_memory.access import put
from keras_memory.access import read
from keras_memory.access import spread
from keras_memory.access import take
from keras_memory.access import total
from keras_memory.numerics import at_least_float32
from keras_memory.numerics import in_range
from keras_memory.replay import SLOPES
from keras_memory.replay import kept
from keras_memory.replay import remember
from keras_memory.replay import with_gradient

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

# Usage of an unused slot. One less this is rounded to one, so that unused
# slots are all as free and taken one after the other.
USAGE_EPSILON = {
    "float16": 1e-4,
    "bfloat16": 1e-8,
    "float32": 1e-8,
    "float64": 1e-16,
}

# `allocation` compares so many slots each with each, and sorts more.
MOST_COMPARED_SLOTS = 128


def cosine_similarity(
    memory, keys, norm_epsilon=None, product_epsilon=0.0, masks=None
):
    """Compares each key with each slot by the angle between them.

    Source: Graves et al. 2014, eq. 6; with masks Csordas & Schmidhuber 2019
    (arXiv 1904.10278), masked content addressing.
    Departure: `norm_epsilon` stands inside the root of each norm, so that an
    all-zero slot or key has similarity 0 and finite gradients. Vectors may be
    as large as their dtype allows; 16 bits are compared in float32.

    Args:
        memory: (B, W, N) slot contents; any real value.
        keys: (B, H, W) look-up vectors, one per head; any real value.
        norm_epsilon: float above 0, added to each squared norm; None for
            that of `NORM_EPSILON`.
        product_epsilon: float, at least 0, added to the product of norms.
        masks: (B, H, W) in [0, 1] or None: how much each entry counts, of the
            key and of every slot.

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
    return ops.cast(ops.reshape(similarity, (-1, heads, slots)), dtype)


def _to_compare(memory, keys, masks):
    """Memory and keys in the dtype to compare in. With masks each head sees
    what its own leaves of the memory: (B H, W, N) and (B H, 1, W)."""
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
    """Similarities (B, H, N); and, of keys (B, H, 1) and of slots (B, 1, N),
    the scales to compare them at and their norms at these scales."""
    memory, slot_scale = in_range(memory, axis=1)
    keys, key_scale = in_range(keys, axis=-1)
    slot_norms = ops.sum(memory * memory, axis=1, keepdims=True)
    key_norms = ops.sum(keys * keys, axis=-1, keepdims=True)
    slot_norms = ops.sqrt(slot_norms + norm_epsilon * slot_scale * slot_scale)
    key_norms = ops.sqrt(key_norms + norm_epsilon * key_scale * key_scale)
    product = key_norms * slot_norms
    if product_epsilon:
        product = product + product_epsilon * key_scale * slot_scale
    similarity = match(keys, memory) / product
    # Only rounding leaves [-1, 1]: the slope is that of what was rounded.
    outside = ops.clip(similarity, -1.0, 1.0) - similarity
    similarity = similarity + ops.stop_gradient(outside)
    return similarity, key_scale, slot_scale, key_norms, slot_norms


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

    def weighed(memory, keys, strengths):
        compared = _compare(memory, keys, norm_epsilon, product_epsilon)
        return [softmax(strengths * compared[0]), *compared]

    def gradient(upstream, kept, memory, keys, strengths):
        weighting, similarity, key_scale, slot_scale = kept[:4]
        key_norms, slot_norms = kept[4:]
        memory, keys = memory * slot_scale, keys * key_scale
        of_logits = _of_softmax(upstream, weighting)
        by_similarity = of_logits * similarity
        sums = total(by_similarity)
        of_strengths = sums
        norms = key_norms * slot_norms
        if product_epsilon:
            epsilon = product_epsilon * key_scale * slot_scale
            share = norms / (norms + epsilon)
            of_logits, by_similarity = share * of_logits, share * by_similarity
            sums = total(by_similarity)
        of_dot = strengths * of_logits / norms
        of_key_norms = strengths * sums / key_norms
        of_slot_norms = ops.matmul(ops.swapaxes(strengths, 1, 2), by_similarity)
        of_memory = spread(keys, of_dot) - memory * (
            of_slot_norms / slot_norms**2
        )
        of_keys = read(memory, of_dot) - keys / key_norms * of_key_norms
        return of_memory * slot_scale, of_keys * key_scale, of_strengths

    memory, keys = _to_compare(memory, keys, masks)
    strengths = ops.cast(
        ops.reshape(strengths, (-1, keys.shape[1], 1)), ops.dtype(keys)
    )
    weighting = kept(weighed, gradient, memory, keys, strengths)
    return ops.cast(ops.reshape(weighting, (-1, heads, slots)), dtype)


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
            total(upstream * (content - previous)),
        )

    gate = interpolation_gate[:, :, None]
    return kept(mixed, gradient, content_weighting, previous_weighting, gate)


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
        of_shifts = [total(upstream * one) for one in rolled(weighting)]
        return (
            shift(upstream, ops.flip(shifts, axis=-1)),
            ops.concatenate(of_shifts, axis=-1),
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
        return [powers / total(powers), logarithm, weighting]

    def gradient(upstream, kept, _, power):
        # The weighting that was kept: the shift need not be done again.
        result, logarithm, weighting = kept
        of_logits = _of_softmax(upstream, result)
        return power * of_logits / weighting, total(of_logits * logarithm)

    return kept(sharpened, gradient, weighting, sharpening[:, :, None])


def not_negative(x):
    """0 instead of what is below; the slope of 0 itself is 1."""
    return ops.where(x < 0, ops.zeros_like(x), x)


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
    """Usage of each slot after what the write heads have taken.

    Source: Graves et al. 2016, Methods, usage vector; with several write
    heads it is written as if they came one after another.

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
    """(B, H, N) -> (B, N). JAX's gradient of `ops.prod` is none of a free
    batch size, which a model is exported with."""
    return math.prod(x[:, head] for head in range(x.shape[1]))


def allocation(usage, usage_epsilon=None, sort=None):
    """Weighs slots by how free they are: the freest one first.

    Source: Graves et al. 2016, Methods, dynamic memory allocation:
    a[phi(j)] = (1 - u[phi(j)]) prod_{i < j} u[phi(i)], where phi has the
    slots by ascending usage; of slots of equal usage the lower comes first.
    Departure: u is `usage_epsilon` + (1 - `usage_epsilon`) usage, and the
    product is a sum of logarithms, so that gradients are finite at usage 0
    and 1.

    Args:
        usage: (B, N) in [0, 1].
        usage_epsilon: float in (0, 1); None for that of `USAGE_EPSILON`.
        sort: bool, True to sort the slots, in time N log N, False to compare
            each with each, in time N^2 but faster for few. The numbers are the
            same. None: by N.

    Returns:
        (B, N) weighting: non-negative, sums to at most 1 over N.
    """
    slots = usage.shape[-1]
    if usage_epsilon is None:
        usage_epsilon = USAGE_EPSILON[ops.dtype(usage)]
    if sort is None:
        sort = slots > MOST_COMPARED_SLOTS

    def free_and_used(usage):
        share = 1.0 - usage_epsilon
        return share * (1.0 - usage), usage_epsilon + share * usage

    def allocated(usage):
        free, used = free_and_used(usage)
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

    def gradient(upstream, kept, usage):
        weighting, share, *orders = kept
        free, used = free_and_used(usage)
        of_before = upstream * weighting
        if sort:
            of_log = _sum_of_earlier(of_before, *orders, from_the_end=True)
        else:
            is_freer = _is_freer(free, usage.dtype)
            of_log = ops.matmul(of_before[:, None], is_freer)[:, 0]
        return (1.0 - usage_epsilon) * (of_log / used - upstream * share)

    return kept(allocated, gradient, usage)


def _is_freer(free, dtype):
    """(B, N, N), 1 where slot j is freer than slot i, or as free and lower."""
    mine, other = free[:, :, None], free[:, None, :]
    lower = np.tri(free.shape[-1], k=-1, dtype=bool)
    tied = ops.logical_and(other == mine, lower)
    return ops.cast(ops.logical_or(other > mine, tied), dtype)


def _sum_of_earlier(x, order, place, from_the_end=False):
    """For each slot the sum of x over those that `order` has before it, where
    it has the place `place`."""
    ranked = ops.take_along_axis(x, order, axis=-1)
    if from_the_end:
        ranked = ops.flip(ranked, axis=-1)
    sums = ops.cumsum(ranked[:, :-1], axis=-1)
    sums = ops.concatenate([ops.zeros_like(x[:, :1]), sums], axis=-1)
    if from_the_end:
        sums = ops.flip(sums, axis=-1)
    return ops.take_along_axis(sums, place, axis=-1)


def linkage_after_write(linkage, precedence, write_weighting):
    """Links each slot to the one written before it.

    Source: Graves et al. 2016, Methods, temporal memory linkage.

    Args:
        linkage: (B, H, N, N); entry i, j says how much slot i was written
            right after slot j. Rows and columns sum to at most 1.
        precedence: (B, H, N), of the step before: how much each slot was the
            last one written.
        write_weighting: (B, H, N) weighting of this step.

    Returns:
        (B, H, N, N) linkage, with a zero diagonal.
    """
    heads, slots = write_weighting.shape[1:]

    def between_slots(links):
        slot = ops.arange(slots)
        return ops.where(slot[:, None] != slot, links, 0.0)

    def kept_share(weighting):
        return 1.0 - weighting[:, 0, :, None] - weighting

    def links(linkage, precedence, weighting):
        new = weighting[:, 0, :, None] * precedence
        return between_slots(kept_share(weighting) * linkage + new)

    def gradient(of_links, linkage, precedence, weighting):
        of_links = between_slots(of_links)
        of_kept = of_links * linkage
        ones = ops.ones_like(precedence)
        return (
            of_links * kept_share(weighting),
            match(weighting, of_links),
            read(of_links, precedence)
            - read(of_kept, ones)
            - match(ones, of_kept),
        )

    # Each head has links of its own: (B H, N, N) and (B H, 1, N).
    arguments = [
        ops.reshape(linkage, (-1, slots, slots)),
        ops.reshape(precedence, (-1, 1, slots)),
        ops.reshape(write_weighting, (-1, 1, slots)),
    ]
    linkage = with_gradient(links, gradient, *arguments)
    return ops.reshape(linkage, (-1, heads, slots, slots))


def precedence_after_write(precedence, write_weighting):
    """How much each slot was the last one written.

    Source: Graves et al. 2016, Methods, temporal memory linkage.

    Args:
        precedence: (B, H, N) in [0, 1], sums to at most 1 over N.
        write_weighting: (B, H, N) weighting of this step.

    Returns:
        (B, H, N), likewise.
    """
    written = ops.sum(write_weighting, axis=-1, keepdims=True)
    return (1.0 - written) * precedence + write_weighting


def follow_links(linkage, read_weighting):
    """Goes from what was read to what was written after and before it.

    Source: Graves et al. 2016, Methods, temporal memory linkage.

    Args:
        linkage: (B, H, N, N), one for each write head.
        read_weighting: (B, R, N) weighting of the step before.

    Returns:
        Forward and backward weightings, (B, R, H, N) each; they sum to at
        most 1 over N.
    """
    readers, slots = read_weighting.shape[1:]
    writers = linkage.shape[1]
    links = ops.reshape(linkage, (-1, slots, slots))
    weighting = ops.stack([read_weighting] * writers, axis=1)
    weighting = ops.reshape(weighting, (-1, readers, slots))

    def both(links, weighting):
        return ops.concatenate(
            [read(links, weighting), match(weighting, links)], axis=1
        )

    def gradient(upstream, links, weighting):
        of_forward, of_backward = ops.split(upstream, 2, axis=1)
        return (
            spread(
                ops.concatenate([of_forward, weighting], axis=1),
                ops.concatenate([weighting, of_backward], axis=1),
            ),
            match(of_forward, links) + read(links, of_backward),
        )

    weightings = remember(with_gradient(both, gradient, links, weighting))
    weightings = ops.reshape(weightings, (-1, writers, 2 * readers, slots))
    return ops.split(ops.swapaxes(weightings, 1, 2), 2, axis=1)


def sparse_linkage_after_write(linkage, columns, precedence, write_weighting):
    """`linkage_after_write` that keeps K entries of each row, in time N K.

    Source: Graves et al. 2016, Methods, sparse link matrix. New links come
    from the K largest entries of write weighting and precedence; a row keeps
    the K largest of what it had and of what is new. Nothing is normalised when
    entries are left out, so that with K = N the links are those of
    `linkage_after_write`. The choice of entries has no gradient, their values
    have. For small K: merging what is new takes K^3.

    Args:
        linkage: (B, H, K, N); entry k, i says how much slot i was written
            right after slot `columns`[k, i]. At least 0; sums over K to at
            most 1.
        columns: (B, H, K, N) whole numbers in [0, N), as floats; those of a
            slot i differ from each other. Their gradient is zero.
        precedence: (B, H, N), of the step before: how much each slot was the
            last one written.
        write_weighting: (B, H, N) weighting of this step.

    Returns:
        (B, H, K, N) linkage, and (B, H, K, N) columns.
    """
    heads, entries, slots = linkage.shape[1:]
    # What is there becomes less.
    at_columns = _at(
        write_weighting, ops.reshape(columns, (-1, heads, entries * slots))
    )
    at_columns = ops.reshape(at_columns, (-1, heads, entries, slots))
    linkage = (1.0 - write_weighting[:, :, None] - at_columns) * linkage
    slot = ops.arange(slots, dtype=ops.dtype(columns))
    linkage = ops.where(columns != slot, linkage, 0.0)
    # What is new: (B, H, K rows, K columns).
    rows = _largest(write_weighting, entries)
    recent = _largest(precedence, entries)
    new = (
        _at(write_weighting, rows)[:, :, :, None]
        * _at(precedence, recent)[:, :, None]
    )
    between = rows[:, :, :, None] != recent[:, :, None]
    new = ops.where(between, new, 0.0)
    # It is added to what its row has in the same column.
    each_entry = ops.repeat(rows[:, :, None], entries, axis=2)
    old = ops.swapaxes(_at(linkage, each_entry), 2, 3)
    old_columns = ops.swapaxes(_at(columns, each_entry), 2, 3)
    same = old_columns[:, :, :, :, None] == recent[:, :, None, None]
    nth = ops.cumsum(ops.cast(same, "int32"), axis=3)
    same = ops.logical_and(same, nth == 1)  # a state of zeros has equal ones
    old = old + ops.sum(ops.where(same, new[:, :, :, None], 0.0), axis=4)
    # The K largest stay; -1 is what is in `old` now, or no link.
    other = ops.logical_and(between, ops.logical_not(ops.any(same, axis=3)))
    both = ops.concatenate([old, ops.where(other, new, -1.0)], axis=3)
    columns_of_both = ops.concatenate(
        [old_columns, ops.repeat(recent[:, :, None], entries, axis=2)], axis=3
    )
    staying = _largest(both, entries)
    is_row = _put(ops.ones_like(rows), rows, slots)[:, :, None] > 0

    def with_rows(matrix, both):
        found = ops.swapaxes(_at(both, staying), 2, 3)
        return ops.where(is_row, _put(found, each_entry, slots), matrix)

    columns = with_rows(columns, columns_of_both)
    return with_rows(linkage, both), ops.stop_gradient(columns)


def follow_sparse_links(linkage, columns, read_weighting):
    """`follow_links` where K entries of each row are kept, in time N K.

    Args:
        linkage, columns: see `sparse_linkage_after_write`.
        read_weighting: (B, R, N) weighting of the step before.

    Returns:
        Forward and backward weightings, (B, R, H, N) each; they sum to at
        most 1 over N.
    """
    entries, slots = linkage.shape[2:]
    weighting = ops.swapaxes(read_weighting, 1, 2)
    heads = weighting.shape[-1]
    forward, backward = [], []
    for head in range(linkage.shape[1]):
        links = linkage[:, head, :, :, None]
        places = ops.reshape(columns[:, head], (-1, entries * slots))
        ahead = ops.reshape(
            take(weighting, places), (-1, entries, slots, heads)
        )
        forward.append(ops.sum(links * ahead, axis=1))
        back = links * weighting[:, None]
        back = ops.reshape(back, (-1, entries * slots, heads))
        backward.append(put(back, places, slots))
    return tuple(
        ops.transpose(remember(ops.stack(found, axis=1)), (0, 3, 1, 2))
        for found in (forward, backward)
    )


def _largest(x, count):
    """Where the `count` largest entries of the last axis are, as floats; of
    equal ones the first."""
    x = ops.stop_gradient(x)
    if keras.backend.backend() in ("tensorflow", "jax"):
        return ops.cast(ops.top_k(x, count)[1], ops.dtype(x))
    found, place = [], ops.arange(x.shape[-1])  # top_k takes any of equal ones
    for _ in range(count):
        found.append(ops.argmax(x, axis=-1, keepdims=True))
        x = ops.where(place == found[-1], -np.inf, x)
    return ops.cast(ops.concatenate(found, axis=-1), ops.dtype(x))


def _at(x, places):
    """(..., N) at places (..., P) of the same leading axes: (..., P)."""
    found = take(
        ops.reshape(x, (-1, x.shape[-1], 1)),
        ops.reshape(places, (-1, places.shape[-1])),
    )
    return ops.reshape(found, (-1, *places.shape[1:]))


def _put(x, places, size):
    """(..., P) to places (..., P), added up: (..., size)."""
    count = x.shape[-1]
    found = put(
        ops.reshape(x, (-1, count, 1)), ops.reshape(places, (-1, count)), size
    )
    return ops.reshape(found, (-1, *x.shape[1:-1], size))


def softmax(logits):
    """Softmax over the last axis, without Keras's warning where that has one
    entry: there may be one slot, or one shift."""
    return (
        ops.softmax(logits) if logits.shape[-1] > 1 else ops.ones_like(logits)
    )


def oneplus(x):
    """1 + log(1 + exp(x)), at least 1.

    Source: Graves et al. 2016 (Nature 538), Methods, of the key strengths.
    """
    return 1.0 + ops.softplus(x)


def _of_softmax(dy, y, x=None):
    dy = dy * y
    return dy - y * total(dy)


SLOPES[softmax] = _of_softmax
SLOPES[oneplus] = SLOPES[keras.activations.softplus]


def activation_by_name(name):
    """A Keras activation, or `"oneplus"`."""
    return oneplus if name == "oneplus" else keras.activations.get(name)


# Registered, or a saved model would come back with Keras's own sparsemax.
@keras.saving.register_keras_serializable(package="keras_memory")
def sparsemax(logits, axis=-1):
    """Projects logits onto the probability simplex: a softmax with zeros.

    Source: Martins & Astudillo 2016 (arXiv 1602.02068), eqs. 2-3.
    Departure: their Algorithm 1 sorts; here the support shrinks until it stays
    (Michelot 1986), in a few passes over the logits. The maximum is subtracted
    first, which changes nothing but the rounding; 16-bit logits are computed
    in float32.

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
    z = ops.cast(logits, at_least_float32(ops.dtype(logits)))
    # `initial`, or Keras refuses an array of no rows.
    most = ops.max(z, axis=axis, keepdims=True, initial=-np.inf)
    z = z - ops.stop_gradient(most)

    def total(x):
        return ops.sum(x, axis=axis, keepdims=True)

    def threshold_of(z, support):
        inside = ops.where(support, z, ops.zeros_like(z))
        count = total(ops.cast(support, ops.dtype(z)))
        return (total(inside) - 1.0) / ops.maximum(count, 1.0)

    fixed = ops.stop_gradient(z)

    def shrinks(support, smaller):
        return ops.any(ops.not_equal(support, smaller))

    def shrink(support, smaller):
        return smaller, smaller & (fixed > threshold_of(fixed, smaller))

    # What is 1 below the maximum or lower is outside.
    none, first = ops.zeros_like(z, dtype="bool"), fixed > -1.0
    _, support = ops.while_loop(shrinks, shrink, (none, first))
    threshold = threshold_of(z, support)
    # XLA's maximum passes over NaN, but the sum does not.
    threshold = ops.where(ops.isnan(total(z)), total(z), threshold)
    return ops.cast(ops.relu(z - threshold), logits.dtype)


def dense_linkage(linkage, columns):
    """Makes N x N links of those that a DNC with `sparse_links` keeps.

    Args:
        linkage: (..., N, K) links, as `trace` or a `DNCState` have them.
        columns: (..., N, K) whole numbers in [0, N), their `link_columns`.

    Returns:
        (..., N, N) array, 0 where no link is kept, for `plot_linkage`.

    Raises:
        ValueError: the shapes differ.
    """
    linkage, columns = np.asarray(linkage), np.asarray(columns)
    if linkage.shape != columns.shape or linkage.ndim < 2:
        raise ValueError(
            "`linkage` and `columns` must both be (..., N, K). Received: "
            f"linkage.shape={linkage.shape}, columns.shape={columns.shape}"
        )
    slots = linkage.shape[-2]
    dense = np.zeros((*linkage.shape[:-1], slots), linkage.dtype)
    *places, _ = np.indices(linkage.shape, sparse=True)
    np.add.at(dense, (*places, columns.astype("int64")), linkage)
    return dense


def entropy(weighting):
    """How widely a weighting is spread, in bits: the sum of -w log2 w.

    0 where one slot has all, log2(N) where all share alike. A weighting that
    sums to less than 1 is not rescaled: a head that looks nowhere has 0.

    Args:
        weighting: (..., N), not negative.

    Returns:
        (...) float64.

    Raises:
        ValueError: `weighting` has no slots, or is negative somewhere.

    >>> print(entropy([[1.0, 0.0], [0.5, 0.5], [0.5, 0.0]]))
    [0.  1.  0.5]
    """
    weighting = np.asarray(weighting, "float64")
    if not weighting.ndim or not weighting.shape[-1]:
        raise ValueError(
            "`weighting` must have the shape (..., N), of N slots. "
            f"Received: shape {weighting.shape}"
        )
    if np.any(weighting < -1e-6):  # less is rounding
        raise ValueError(
            "`weighting` must not be negative. "
            f"Received: a smallest of {np.nanmin(weighting)}"
        )
    bits = np.log2(np.where(weighting <= 0, 1.0, weighting))
    return 0.0 - (weighting * bits).sum(axis=-1)
