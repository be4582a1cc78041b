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
from keras_memory.addressing.scaling import in_range
from keras_memory.addressing.slots import largest
from keras_memory.addressing.slots import precise_products
from keras_memory.addressing.slots import put_rows
from keras_memory.addressing.slots import replace_rows
from keras_memory.addressing.slots import rows_at
from keras_memory.addressing.slots import same_place
from keras_memory.addressing.slots import select
from keras_memory.addressing.slots import take_rows

# Contents of `last_access` at slots that were never accessed.
UNWRITTEN = -1
NEVER_ACCESSED = 0
# Of slots without a write: below any cosine.
LOWEST_SCORE = -1e30
# Slots for which `block_access` has one entry.
BLOCK = 256


class Slots:
    """A state with a row for each slot, within a time loop.

    Args:
        index: int, which state of the loop.
        array: (B, N, ...); None where a pass of the fast loop does not have it.
        updated: (B,) bool or None; False: the row of the batch is masked, and
            stays as it is.
        puts: tuple of (slots, rows), what the step has put so far.
    """

    def __init__(self, index, array, updated=None, puts=()):
        self.index, self.array = index, array
        self.updated, self.puts = updated, puts

    def after(self, array, *puts):
        """The state with another array, and more `puts`."""
        puts = (*self.puts, *puts)
        return Slots(self.index, array, self.updated, puts)

    def exchanged(self, array):
        """The state with a new array."""
        if self.updated is not None:
            array = select(self.updated, array, self.array)
        return self.after(array)

    def taken(self, slots):
        """The rows (B, P, ...) at slots (B, P)."""
        return rows_at(self.array, slots)

    def replaced(self, slots, rows):
        """The state with other rows (B, P, ...) at slots (B, P)."""
        if self.updated is not None:
            rows = select(self.updated, rows, self.taken(slots))
        return self.after(put_rows(self.array, slots, rows))


class HostSlots(Slots):
    """A state whose rows stay on the host (`retrieval/host_memory.py`).

    In the graph the state is a token, which each call of the host takes and
    returns, so that calls run in the order of a step.

    Args:
        index: int, which state of the loop.
        calls: the `HostCalls` of the step, shared by states of one memory.
        name: str, name of the array on the host.
        puts: as of `Slots`.
    """

    def __init__(self, index, calls, name, puts=()):
        self.index, self.calls, self.name = index, calls, name
        self.puts = puts

    @property
    def array(self):
        return self.calls.token

    def after(self, array, *puts):
        puts = (*self.puts, *puts)
        return HostSlots(self.index, self.calls, self.name, puts)

    def taken(self, slots):
        memory = self.calls.memory
        array = getattr(memory, self.name)
        shape = (*slots.shape, *array.shape[2:])
        return self.calls.result(
            lambda slots: memory.take(self.name, slots),
            keras.KerasTensor(shape, array.dtype.name),
            slots,
        )

    def replaced(self, slots, rows):
        def replace(*arrays):
            self.calls.memory.replace(self.name, *arrays)

        updated = self.calls.updated
        masks = [] if updated is None else [updated]
        self.calls.run(replace, [], slots, rows, *masks)
        return self

    def least_recently_accessed(self):
        memory = self.calls.memory
        spec = keras.KerasTensor((len(memory.memory), 1), "int32")
        return self.calls.result(memory.least_recently_accessed, spec)

    def nearest(self, queries, top_k):
        memory = self.calls.memory
        shape = (*queries.shape[:2], top_k)
        return self.calls.result(
            lambda queries: memory.nearest(queries, top_k),
            keras.KerasTensor(shape, "int32"),
            queries,
        )


class HostCalls:
    """The calls of a memory on the host within one step, in their order.

    Args:
        memory: a `HostMemory`.
        token: (B, 1) int32; None where a pass of the fast loop calls nothing.
        updated: (B,) bool or None, as of `Slots`.
    """

    def __init__(self, memory, token, updated):
        self.memory, self.token, self.updated = memory, token, updated

    def run(self, function, specs, *arrays):
        """Calls a function of NumPy arrays, whose results have these specs."""

        def call(token, *arrays):
            return (token, *(function(*arrays) or ()))

        specs = [keras.KerasTensor(self.token.shape, "int32"), *specs]
        self.token, *results = call_host(call, specs, self.token, *arrays)
        return results

    def result(self, function, spec, *arrays):
        """Calls a function with one result."""
        return self.run(lambda *a: (function(*a),), [spec], *arrays)[0]


def call_host(function, specs, *arrays):
    """Calls a function of NumPy arrays from a graph (TensorFlow).

    Args:
        function: (*arrays) -> list of arrays.
        specs: list of arrays with shape and dtype of each result.
        *arrays: tensors.

    Returns:
        List of tensors.
    """
    import tensorflow as tf

    dtypes = [spec.dtype for spec in specs]
    results = tf.numpy_function(function, arrays, dtypes)
    return [
        tf.ensure_shape(result, spec.shape)
        # A single result is not in a list.
        for result, spec in zip(keras.tree.flatten(results), specs)
    ]


def with_slots(states, kinds, updated):
    """Replaces the states that have a row for each slot by `Slots`.

    Args:
        states: list of arrays.
        kinds: list with the `StateSpec` of each state.
        updated: (B,) bool or None, as of `Slots`.

    Returns:
        List of arrays and `Slots`.
    """
    replaced, calls = [], {}
    for index, (state, kind) in enumerate(zip(states, kinds)):
        if kind.on_host is not None:
            memory, name = kind.on_host
            of_memory = calls.setdefault(
                id(memory), HostCalls(memory, state, updated)
            )
            state = HostSlots(index, of_memory, name)
        elif kind.per_slot:
            state = Slots(index, state, updated)
        replaced.append(state)
    return replaced


def array_of(state):
    """The array of a state that may be `Slots`."""
    return state.array if isinstance(state, Slots) else state


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
    return take_rows(array_of(memory), slots)


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
    return _replaced(memory, slots, rows)


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
    if _is_replayed():
        return state
    before = _rows_at(state, slots)
    after = function(before, *map(array_of, arrays))
    return _replaced(state, slots, ops.stop_gradient(after))


def _is_replayed():
    current = fast_pass()
    return current is not None and not current.has_arrays


def _rows_at(state, slots):
    if isinstance(state, Slots):
        return state.taken(slots)
    return rows_at(state, slots)


def _replaced(state, slots, rows):
    if isinstance(state, Slots):
        return state.replaced(slots, rows)
    return put_rows(state, slots, rows)


def sum_over_equal(slots, weights):
    """Sums weights (B, P) over equal slots (B, P): each of them gets the sum,
    (B, P)."""
    same = ops.cast(same_place(slots, slots), ops.dtype(weights))
    return ops.matmul(same, weights[:, :, None])[:, :, 0]


def least_recently_accessed(last_access, block_access):
    """The slot whose last access is the longest ago.

    Source: Rae et al. 2016, section 3.2, eq. 6.

    A step must not look at all slots of a large memory. So the memory has
    blocks of `BLOCK` slots, of which each has a bound: none of its slots was
    accessed before. Accesses only make last accesses later, so a bound stays
    true. A search compares the slots of the block with the lowest bound. If all
    were accessed later, it raises the bound, and compares again.

    Args:
        last_access: (B, N) int32, steps of the last access; `UNWRITTEN` and
            `NEVER_ACCESSED` come first, in the order of the slots.
        block_access: (B, ceil(N / BLOCK)) int32, the bounds.

    Returns:
        The slot, (B, 1) int32, and the bounds after the search.
    """
    if _is_replayed():
        return chosen(None), block_access
    if isinstance(last_access, HostSlots):
        return chosen(last_access.least_recently_accessed), block_access
    slot, bounds = _search_blocks(array_of(last_access), array_of(block_access))
    slot = chosen(lambda: slot)
    if isinstance(block_access, Slots):
        return slot, block_access.exchanged(bounds)
    return slot, bounds


def _search_blocks(last_access, block_access):
    number = ops.shape(last_access)[1]

    def oldest(slots):
        """The first slot of the lowest last access, and that access."""
        accesses = ops.maximum(rows_at(last_access, slots), NEVER_ACCESSED)
        place = ops.argmin(accesses, axis=1)[:, None]
        return rows_at(slots, place), ops.min(accesses, axis=1, keepdims=True)

    def compare(bounds, slot, is_behind):
        block = ops.argmin(bounds, axis=1)[:, None]
        # The last block may be smaller: it has its last slot several times.
        slots = block * BLOCK + ops.arange(BLOCK, dtype="int32")
        slot, lowest = oldest(ops.minimum(slots, number - 1))
        is_behind = lowest > rows_at(bounds, block)
        return replace_rows(bounds, block, lowest), slot, is_behind

    first = ops.zeros_like(block_access[:, 0])[:, None]
    if block_access.shape[1] == 1:
        slots = ops.arange(number, dtype="int32")
        slot, _ = oldest(first + slots)
        return slot, block_access
    bounds, slot, _ = ops.while_loop(
        lambda bounds, slot, is_behind: ops.any(is_behind),
        compare,
        (block_access, first, first == 0),
    )
    return slot, bounds


def nearest(memory, norms, last_access, queries, top_k):
    """The slots that are nearest to each query by their cosine.

    Source: Rae et al. 2016, section 3.1.
    Departure: slots without a write are never found. They all are equal, so
    that only their order would choose among them.

    Args:
        memory: (B, N, W) slot contents.
        norms: (B, N) float32, of the slots.
        last_access: (B, N) int32; `UNWRITTEN` at slots without a write.
        queries: (B, H, W).
        top_k: int K, from 1 to N.

    Returns:
        (B, H, K) int32, the nearest first, the first of equally near slots
        first; -1 where fewer than K slots are written.
    """

    def search(memory, norms, last_access, queries):
        queries, _ = in_range(queries, axis=-1)
        memory = ops.cast(memory, ops.dtype(queries))
        products = precise_products(queries, ops.swapaxes(memory, 1, 2))
        # The norm of a query does not change the order of its cosines.
        scores = products * ops.cast(1.0 / norms, ops.dtype(products))[:, None]
        is_written = (last_access > UNWRITTEN)[:, None]
        scores = ops.where(is_written, scores, LOWEST_SCORE)
        # Also where a product of huge numbers is infinite or NaN.
        scores = ops.where(scores > LOWEST_SCORE, scores, LOWEST_SCORE)
        slots = largest(scores, top_k)
        return ops.where(rows_at(last_access, slots) > UNWRITTEN, slots, -1)

    if isinstance(memory, HostSlots):
        return chosen(lambda: memory.nearest(queries, top_k))
    return chosen(search, memory, norms, last_access, queries)


def update_norms(norms, memory, slots, norm_epsilon):
    """Sets the norms of slots that were written.

    Args:
        norms: (B, N) float32.
        memory: (B, N, W) slot contents.
        slots: (B, P) int32.
        norm_epsilon: float, added to each squared norm.

    Returns:
        (B, N) float32.
    """
    if isinstance(memory, HostSlots):
        return norms  # an index has its own

    def norm(_, memory):
        return norms_of(take_rows(memory, slots), norm_epsilon)

    return update(norm, norms, slots, memory)


def norms_of(rows, norm_epsilon):
    """Norms (B, P) float32 of rows (B, P, W), as in `cosines`."""
    rows, scale = in_range(rows, axis=-1)
    squares = ops.sum(rows * rows, axis=-1, keepdims=True)
    norms = ops.sqrt(squares + norm_epsilon * scale * scale) / scale
    return ops.cast(norms[:, :, 0], "float32")


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

    def mark(before, is_written):
        written = sum_over_equal(slots, ops.cast(is_written, "float32"))
        after = ops.maximum(before, NEVER_ACCESSED)
        return ops.where(written > 0, after, before)

    return update(mark, last_access, slots, is_written)


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
