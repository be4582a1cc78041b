"""States with a row for each slot, within a time loop.

A time loop wraps such states, `StateSpec(per_slot=True)`, before a step and
unwraps them after it. A step reaches them by the functions of `sparse.py`.
"""

import keras
from keras import ops

from keras_memory.addressing.slots import replace_rows
from keras_memory.addressing.slots import rows_at
from keras_memory.addressing.slots import select
from keras_memory.addressing.slots import with_one_gradient


class SlotState:
    """A state with a row for each slot, within a time loop.

    Args:
        index: int, which state of the loop.
        array: (B, N, ...); None in the backward pass of the fast loop, which
            does not have it.
        updated: (B,) bool or None; False: the row of the batch is masked, and
            stays as it is.
        puts: tuple of (slots, rows), what the step has put so far, for the
            backward pass.
    """

    def __init__(self, index, array, updated=None, puts=()):
        self.index, self.array = index, array
        self.updated, self.puts = updated, puts

    def after(self, array, *puts):
        """The state with this array, and more `puts`."""
        puts = (*self.puts, *puts)
        return SlotState(self.index, array, self.updated, puts)

    def exchanged(self, array):
        """The state with this array where it is not masked."""
        if self.updated is not None:
            array = select(self.updated, array, self.array)
        return self.after(array)

    def taken(self, slots):
        """The rows (B, P, ...) at slots (B, P)."""
        return rows_at(self.array, slots)

    def entries(self, numbers):
        """The entries (B, ...) at numbers (B, ...) of a state (B, N, K): entry
        k of slot i has the number i K + k."""
        rows, slots, count = ops.shape(self.array)
        flat = ops.reshape(self.array, (rows, slots * count))
        # A state from outside may hold any numbers.
        return rows_at(flat, ops.clip(numbers, 0, slots * count - 1))

    def replaced(self, slots, rows, differentiates=False):
        """The state with other rows (B, P, ...) at slots (B, P).

        `differentiates`: bool; True: the backend takes the gradient, so only
        the first of equal slots may have one.
        """
        rows = ops.cast(rows, ops.dtype(self.array))
        if self.updated is not None:
            rows = select(self.updated, rows, self.taken(slots))
        if differentiates:
            rows = with_one_gradient(slots, rows)
        return self.after(replace_rows(self.array, slots, rows))


class HostSlotState(SlotState):
    """A state whose rows stay on the host (`retrieval/host_memory.py`).

    In the graph the state is a token, which each call of the host takes and
    returns, so that calls run in the order of a step. `calls` has the token of
    all states of a memory.

    Args:
        index: int, which state of the loop.
        calls: the `HostCalls` of the step, shared by states of one memory.
        name: str, name of the array on the host.
        puts: as of `SlotState`.
    """

    def __init__(self, index, calls, name, puts=()):
        self.index, self.calls, self.name = index, calls, name
        self.puts = puts

    @property
    def array(self):
        return self.calls.token

    def after(self, array, *puts):
        puts = (*self.puts, *puts)
        return HostSlotState(self.index, self.calls, self.name, puts)

    def taken(self, slots):
        memory = self.calls.memory
        array = getattr(memory, self.name)
        shape = (*slots.shape, *array.shape[2:])
        return self.calls.result(
            lambda slots: memory.take(self.name, slots),
            keras.KerasTensor(shape, array.dtype.name),
            slots,
        )

    def entries(self, numbers):
        memory = self.calls.memory
        dtype = getattr(memory, self.name).dtype.name
        return self.calls.result(
            lambda numbers: memory.take_entries(self.name, numbers),
            keras.KerasTensor(numbers.shape, dtype),
            numbers,
        )

    def replaced(self, slots, rows, differentiates=False):
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
        token: (B, 1) int32; None in the backward pass of the fast loop, which
            calls nothing.
        updated: (B,) bool or None, as of `SlotState`.
    """

    def __init__(self, memory, token, updated):
        self.memory, self.token, self.updated = memory, token, updated

    def run(self, function, specs, *arrays):
        """Calls a function of NumPy arrays, whose results have these specs. It
        may return None if there are none."""

        def call(token, *arrays):
            self.memory.check_call(token)
            return (token, *(function(*arrays) or ()))

        specs = [keras.KerasTensor(self.token.shape, "int32"), *specs]
        self.token, *results = call_host(call, specs, self.token, *arrays)
        return results

    def result(self, function, spec, *arrays):
        """Calls a function with one result."""
        return self.run(lambda *a: (function(*a),), [spec], *arrays)[0]


def call_host(function, specs, *arrays):
    """Calls a function of NumPy arrays from a graph (TensorFlow). The call has
    no gradient, and XLA cannot compile it.

    Args:
        function: (*arrays) -> list or tuple of arrays.
        specs: list of objects with the shape and dtype of each result.
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
    """Replaces the states that have a row for each slot by `SlotState`.

    Args:
        states: list of arrays.
        kinds: list with the `StateSpec` of each state.
        updated: (B,) bool or None, as of `SlotState`.

    Returns:
        List of arrays and `SlotState`.
    """
    replaced, calls = [], {}
    for index, (state, kind) in enumerate(zip(states, kinds)):
        if kind.on_host is not None:
            memory, name = kind.on_host
            of_memory = calls.setdefault(
                id(memory), HostCalls(memory, state, updated)
            )
            state = HostSlotState(index, of_memory, name)
        elif kind.per_slot:
            state = SlotState(index, state, updated)
        replaced.append(state)
    return replaced


def array_of(state):
    """The array of a state that may be `SlotState`."""
    return state.array if isinstance(state, SlotState) else state
