"""Sparse reads and writes: a step touches few slots of a large memory.

Source: Rae et al. 2016 (arXiv 1610.09027), section 3. Functions without
weights. Axes are always batch B, head H, slots N, slot width W, slots that a
step touches P. Inside a step slots come before their width, (B, N, W), so that
a slot is one block of memory.

The fast time loop does not keep a copy of a memory for each step. It records
which slots a step takes and puts, so a step reaches a state with a row for each
slot (`StateSpec.per_slot`) only by the functions of this module.
"""

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.content import cosine_similarity
from keras_memory.addressing.gradients import fast_pass
from keras_memory.addressing.scaling import in_range
from keras_memory.addressing.slot_states import HostSlotState
from keras_memory.addressing.slot_states import SlotState
from keras_memory.addressing.slot_states import array_of
from keras_memory.addressing.slots import largest
from keras_memory.addressing.slots import precise_products
from keras_memory.addressing.slots import replace_rows
from keras_memory.addressing.slots import rows_at
from keras_memory.addressing.slots import same_place
from keras_memory.addressing.slots import take_rows

# `last_access` of slots that were never written, and of slots that were
# written, but never accessed.
UNWRITTEN = -1
NEVER_ACCESSED = 0
# Score of slots whose products are NaN; that of unwritten slots is lower.
LOWEST_SCORE = -1e30
# More than any slot.
NO_SLOT = np.iinfo("int32").max
# Slots for which `block_access` has one entry.
BLOCK = 256


def take(memory, slots):
    """Takes rows of a memory.

    Args:
        memory: (B, N, W), a state in the compute dtype.
        slots: (B, P) int32 in [0, N).

    Returns:
        (B, P, W), at least float32.
    """
    current = fast_pass()
    if current is not None:
        return current.take(memory, slots)
    return take_rows(array_of(memory), slots)


def put(memory, slots, rows):
    """Replaces rows of a memory.

    Args:
        memory: (B, N, W), a state in the compute dtype.
        slots: (B, P) int32 in [0, N). A slot may occur several times, with
            rows that are computed alike.
        rows: (B, P, W); their dtype becomes that of the memory.

    Returns:
        (B, N, W).
    """
    current = fast_pass()
    if current is not None:
        return current.put(memory, slots, rows)
    return with_rows(memory, slots, rows, differentiates=True)


def chosen(function, *arrays):
    """Returns `function(*arrays)`: arrays without gradient, such as indices.

    The fast loop saves them: its backward pass makes no choice again.
    """
    current = fast_pass()
    arrays = [array_of(array) for array in arrays]
    if current is not None:
        return current.chosen(function, *arrays)
    return keras.tree.map_structure(ops.stop_gradient, function(*arrays))


def update(function, state, slots, *arrays):
    """Changes rows of a state per slot without gradient, such as counters.

    Args:
        function: (rows before, *arrays) -> rows after, (B, P, ...).
        state: (B, N, ...).
        slots: (B, P) int32. A slot may occur several times, with rows after
            that are equal.
        *arrays: further arguments of the function.

    Returns:
        The state after the change.
    """
    if is_replayed():
        return state
    before = rows_of(state, slots)
    after = function(before, *map(array_of, arrays))
    return with_rows(state, slots, ops.stop_gradient(after))


def is_replayed():
    """Whether this is the backward pass of the fast loop. It has no states with
    a row for each slot, and takes the choices that the forward pass saved."""
    current = fast_pass()
    return current is not None and not current.has_arrays


def rows_of(state, slots):
    """Takes rows (B, P, ...) of a state per slot without gradient."""
    return _wrapped(state).taken(slots)


def entries_of(state, numbers):
    """Takes entries (B, ...) of a state per slot (B, N, K) without gradient:
    entry k of slot i has the number i K + k. Other numbers give any entry."""
    return _wrapped(state).entries(numbers)


def with_rows(state, slots, rows, differentiates=False):
    """Replaces rows (B, P, ...) of a state per slot.

    `differentiates`: bool; True: the backend takes the gradient of the rows, so
    of equal slots only the first may have one.
    """
    after = _wrapped(state).replaced(slots, rows, differentiates)
    return after if isinstance(state, SlotState) else after.array


def _wrapped(state):
    return state if isinstance(state, SlotState) else SlotState(None, state)


def sum_over_equal(slots, weights):
    """Sums weights (B, P) over equal slots (B, P): each of them gets the sum,
    (B, P)."""
    same = same_place(slots, slots)
    return ops.sum(ops.where(same, weights[:, None], 0.0), axis=2)


def largest_sums(slots, weights, count):
    """The slots whose weights sum to most.

    Args:
        slots: (B, H, n) int32; -1 for none. A slot may occur several times,
            and its weights are summed.
        weights: (B, H, n), not negative.
        count: int K.

    Returns:
        (B, H, K) int32, the largest sum first, of equal ones the lowest slot;
        -1 where there are fewer than K different slots.
    """

    def choose(slots, weights):
        is_same = same_place(slots, slots)
        sums = ops.sum(ops.where(is_same, weights[:, :, None], 0.0), axis=3)
        sums = ops.where(slots >= 0, sums, -1.0)
        found = []
        for _ in range(count):
            # Without `initial`, Keras rejects the extremes of an empty batch.
            largest = ops.max(sums, axis=2, keepdims=True, initial=-1.0)
            is_largest = ops.logical_and(ops.equal(sums, largest), sums >= 0.0)
            slot = ops.min(
                ops.where(is_largest, slots, NO_SLOT),
                axis=2,
                keepdims=True,
                initial=NO_SLOT,
            )
            sums = ops.where(ops.equal(slots, slot), -1.0, sums)
            found.append(ops.where(ops.equal(slot, NO_SLOT), -1, slot))
        return ops.concatenate(found, axis=2)

    return chosen(choose, slots, weights)


def least_recently_accessed(last_access, block_access):
    """The slot whose last access is the longest ago.

    Source: Rae et al. 2016, section 3.2, eq. 6.
    Departure: eq. 6 takes the minimum of the time since the last access, by
    which the paper must mean the maximum.

    The slots are in blocks of `BLOCK`, each with a lower bound of its last
    accesses. Accesses only increase them, so that a bound stays valid. A search
    compares the slots of the block with the lowest bound. If all were accessed
    later, it raises the bound, and searches again. So it does not look at all
    slots of a large memory.

    Args:
        last_access: (B, N) int32, steps of the last access; `UNWRITTEN` and
            `NEVER_ACCESSED` come first, in the order of the slots.
        block_access: (B, ceil(N / BLOCK)) int32, the bounds.

    Returns:
        The slot, (B, 1) int32, and the bounds after the search.
    """
    if is_replayed():
        return chosen(None), block_access
    if isinstance(last_access, HostSlotState):
        return chosen(last_access.least_recently_accessed), block_access
    # Not within `chosen`, which would save the bounds of each step.
    slot, bounds = _search_blocks(array_of(last_access), array_of(block_access))
    slot = chosen(lambda slot: slot, slot)
    if isinstance(block_access, SlotState):
        return slot, block_access.exchanged(bounds)
    return slot, bounds


def _search_blocks(last_access, block_access):
    number = ops.shape(last_access)[1]

    def oldest(slots):
        """The first slot of the lowest last access, and that access."""
        accesses = ops.maximum(rows_at(last_access, slots), NEVER_ACCESSED)
        place = ops.argmin(accesses, axis=1)[:, None]
        return rows_at(slots, place), rows_at(accesses, place)

    def compare(bounds, slot, is_behind):
        block = ops.argmin(bounds, axis=1)[:, None]
        # The last block may be smaller: it has its last slot several times.
        slots = block * BLOCK + ops.arange(BLOCK, dtype="int32")
        slot, lowest = oldest(ops.minimum(slots, number - 1))
        is_behind = lowest > rows_at(bounds, block)
        return replace_rows(bounds, block, lowest), slot, is_behind

    zeros = ops.zeros_like(block_access[:, 0])[:, None]
    if block_access.shape[1] == 1:  # comparing once is enough
        slot, _ = oldest(zeros + ops.arange(number, dtype="int32"))
        return slot, block_access
    bounds, slot, _ = ops.while_loop(
        lambda bounds, slot, is_behind: ops.any(is_behind),
        compare,
        (block_access, zeros, ops.ones_like(zeros, dtype="bool")),
    )
    return slot, bounds


def nearest(memory, norms, last_access, queries, top_k):
    """The slots that are nearest to each query by their cosine.

    Source: Rae et al. 2016, section 3.1.
    Departure: slots without a write are never found. They all are equal, so
    that only their order would choose among them.

    Args:
        memory: (B, N, W) slot contents.
        norms: (B, N), at least float32, of the slots.
        last_access: (B, N) int32; `UNWRITTEN` at slots without a write.
        queries: (B, H, W).
        top_k: int K, from 1 to N.

    Returns:
        (B, H, K) int32, the nearest first, of equal slots the first; -1 where
        fewer than K slots are written.
    """

    def search(memory, norms, last_access, queries):
        queries, _ = in_range(queries, axis=-1)
        memory = ops.cast(memory, ops.dtype(queries))
        products = precise_products(queries, ops.swapaxes(memory, 1, 2))
        # The norm of a query does not change the order of its cosines.
        scores = products * ops.cast(1.0 / norms, ops.dtype(products))[:, None]
        # A product of huge numbers may be NaN.
        scores = ops.where(scores > LOWEST_SCORE, scores, LOWEST_SCORE)
        is_written = (last_access > UNWRITTEN)[:, None]
        scores = ops.where(is_written, scores, 2 * LOWEST_SCORE)
        slots = largest(scores, top_k)
        return ops.where(rows_at(last_access, slots) > UNWRITTEN, slots, -1)

    if isinstance(memory, HostSlotState):
        return chosen(lambda: memory.nearest(queries, top_k))
    return chosen(search, memory, norms, last_access, queries)


def update_norms(norms, memory, slots, norm_epsilon):
    """Sets the norms of slots that were written.

    Args:
        norms: (B, N), at least float32.
        memory: (B, N, W) slot contents.
        slots: (B, P) int32.
        norm_epsilon: float, added to each squared norm.

    Returns:
        (B, N).
    """
    if isinstance(memory, HostSlotState):
        return norms  # an index has its own

    def norm(_, memory):
        return norms_of(take_rows(memory, slots), norm_epsilon)

    return update(norm, norms, slots, memory)


def norms_of(rows, norm_epsilon):
    """Norms (B, P) of rows (B, P, W), at least float32, as in `cosines`."""
    rows, scale = in_range(rows, axis=-1)
    squares = ops.sum(rows * rows, axis=-1, keepdims=True)
    norms = ops.sqrt(squares + norm_epsilon * scale * scale) / scale
    return norms[:, :, 0]


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


def mark_written(last_access, slots):
    """Marks slots as written. This does not count as an access.

    Args:
        last_access: (B, N) int32.
        slots: (B, P) int32.

    Returns:
        (B, N) int32.
    """

    def mark(before):
        return ops.maximum(before, NEVER_ACCESSED)

    return update(mark, last_access, slots)


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

    def mark(before, weights, time):
        total = sum_over_equal(slots, weights)
        return ops.where(total > threshold, time, before)

    return update(mark, last_access, slots, weights, time)
