"""Sparse reads and writes: a step touches few slots of a large memory.

Source: Rae et al. 2016 (arXiv 1610.09027), section 3. Pure functions without
weights or state. Axes are always batch B, head H, slots N, slot width W, slots
that a step touches P. Inside a step slots come before their width, (B, N, W),
so that a slot is one block of memory.

The fast time loop does not keep a copy of a memory for each step. It needs to
know which slots a step takes and puts, so a state with a row for each slot
(`StateSpec.per_slot`) is only reached by the functions of this module.
"""

import keras
from keras import ops

from keras_memory.addressing.content import cosine_similarity
from keras_memory.addressing.gradients import fast_pass
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.slots import largest
from keras_memory.addressing.slots import put_rows
from keras_memory.addressing.slots import replace_rows
from keras_memory.addressing.slots import rows_at
from keras_memory.addressing.slots import same_place
from keras_memory.addressing.slots import take_rows

# Contents of `last_access` at slots that were never accessed.
UNWRITTEN = -1
NEVER_ACCESSED = 0


def take(memory, slots):
    """Takes rows of a memory.

    Args:
        memory: (B, N, W).
        slots: (B, P) int32 in [0, N).

    Returns:
        (B, P, W), at least float32.
    """
    current = fast_pass()
    if current is not None:
        return current.take(memory, slots)
    return take_rows(memory, slots)


def put(memory, slots, rows):
    """Replaces rows of a memory.

    Args:
        memory: (B, N, W).
        slots: (B, P) int32 in [0, N). A slot may occur several times, with
            rows that are computed alike.
        rows: (B, P, W); their dtype becomes that of the memory.

    Returns:
        (B, N, W).
    """
    current = fast_pass()
    if current is not None:
        return current.put(memory, slots, rows)
    return put_rows(memory, slots, rows)


def chosen(function, *arrays):
    """Returns `function(*arrays)`: arrays without gradient, such as indices.

    The fast loop saves them: its backward pass makes no choice again.
    """
    current = fast_pass()
    if current is not None:
        return current.chosen(function, *arrays)
    return keras.tree.map_structure(ops.stop_gradient, function(*arrays))


def changed(function, state, *arrays):
    """Returns `function(state, *arrays)`: a state per slot without gradient."""
    current = fast_pass()
    if current is not None:
        return current.changed(function, state, *arrays)
    return function(state, *arrays)


def sum_over_equal(slots, weights):
    """Sums weights (B, P) over equal slots (B, P): each of them gets the sum,
    (B, P)."""
    same = ops.cast(same_place(slots, slots), ops.dtype(weights))
    return ops.matmul(same, weights[:, :, None])[:, :, 0]


def least_recently_accessed(last_access):
    """The slot whose last access is the longest ago.

    Source: Rae et al. 2016, section 3.2, eq. 6.

    Args:
        last_access: (B, N) int32, steps of the last access; `UNWRITTEN` and
            `NEVER_ACCESSED` come first, in the order of the slots.

    Returns:
        (B, 1) int32.
    """

    def oldest(last_access):
        last_access = ops.maximum(last_access, NEVER_ACCESSED)
        slot = ops.argmin(last_access, axis=1)
        return ops.cast(slot[:, None], "int32")

    return chosen(oldest, last_access)


def nearest(memory, last_access, queries, top_k, norm_epsilon):
    """The slots that are nearest to each query by their cosine.

    Source: Rae et al. 2016, section 3.1.
    Departure: slots without a write are never found. They all are equal, so
    that only their order would choose among them.

    Args:
        memory: (B, N, W) slot contents.
        last_access: (B, N) int32; `UNWRITTEN` at slots without a write.
        queries: (B, H, W).
        top_k: int K, from 1 to N.
        norm_epsilon: float, added to each squared norm.

    Returns:
        (B, H, K) int32, the nearest first, the first of equally near slots
        first; -1 where fewer than K slots are written.
    """

    def search(memory, last_access, queries):
        memory = ops.cast(memory, at_least_float32(ops.dtype(memory)))
        similarity = cosine_similarity(
            ops.swapaxes(memory, 1, 2), queries, norm_epsilon
        )
        is_written = (last_access > UNWRITTEN)[:, None]
        # Less than any cosine, but more than what `largest` has found before.
        slots = largest(ops.where(is_written, similarity, -2.0), top_k)
        return ops.where(_at(last_access, slots) > UNWRITTEN, slots, -1)

    return chosen(search, memory, last_access, queries)


def cosines(queries, rows, norm_epsilon):
    """Compares each query with its own rows.

    Args:
        queries: (B, H, W).
        rows: (B, H, K, W).
        norm_epsilon: float, added to each squared norm.

    Returns:
        (B, H, K) in [-1, 1].
    """
    heads, count, width = rows.shape[1:]
    rows = ops.swapaxes(ops.reshape(rows, (-1, count, width)), 1, 2)
    queries = ops.reshape(queries, (-1, 1, width))
    cosine = cosine_similarity(rows, queries, norm_epsilon)
    return ops.reshape(cosine, (-1, heads, count))


def mark_written(last_access, slots, is_written):
    """Marks slots as written, which are not accessed thereby.

    Args:
        last_access: (B, N) int32.
        slots: (B, P) int32.
        is_written: (B, P) bool; a slot that occurs several times is written if
            one of them is.

    Returns:
        (B, N) int32.
    """

    def mark(last_access, slots, is_written):
        before = _at(last_access, slots)
        written = sum_over_equal(slots, ops.cast(is_written, "float32"))
        after = ops.where(
            written > 0, ops.maximum(before, NEVER_ACCESSED), before
        )
        return _with_values(last_access, slots, after)

    return changed(mark, last_access, slots, is_written)


def mark_accessed(last_access, slots, weights, threshold, time):
    """Sets the last access of the slots whose weights sum to more than a
    threshold.

    Source: Rae et al. 2016, section 3.2, the usage U.

    Args:
        last_access: (B, N) int32.
        slots: (B, P) int32; a slot may occur several times.
        weights: (B, P).
        threshold: float, delta.
        time: (B, 1) int32, number of the step.

    Returns:
        (B, N) int32.
    """

    def mark(last_access, slots, weights, time):
        total = sum_over_equal(slots, weights)
        after = ops.where(total > threshold, time, _at(last_access, slots))
        return _with_values(last_access, slots, after)

    return changed(mark, last_access, slots, weights, time)


def _at(values, slots):
    """Values (B, N) at slots (B, ...)."""
    return rows_at(values[:, :, None], slots)[..., 0]


def _with_values(values, slots, new):
    """Values (B, N) with new ones (B, P) at slots (B, P)."""
    return replace_rows(values[:, :, None], slots, new[:, :, None])[:, :, 0]
