"""The time loop with a custom gradient (custom VJP).

It saves memory by rematerialisation (gradient checkpointing): the forward pass
saves the input state of each step and the results of its products with weights;
the backward pass runs each step again with the saved results, so that no weight
product is computed twice. It saves time by deferred weight gradients: the
gradients of all steps are collected, and each weight then takes one matrix
product instead of one a step.

forward, step t :  state[t] --step--> state[t+1]
    saved: state[t]; inputs and results of each `linear`; values of each
    function with `custom_gradient(..., saves=True)`
backward, step t:  state[t] --step with saved results--> vjp
    => gradient of state[t], and of the result of each `linear`
after the loop  :  grad W = (all inputs)^T @ (all gradients of results)
    one product for each weight
memories        :  states with a row for each slot (`StateSpec.per_slot`) are
    not saved; the rows that a step takes, the slots that it puts and its
    choices are. The backward loop carries the gradients of all slots that the
    loop touches; each step changes those of its own (`addressing/sparse.py`)
in segments     :  states saved every k steps (`recompute`); the forward pass
    of a segment runs again before its backward pass

`replay.py` has the passes over one step.
"""

import math

import keras
import numpy as np
from keras import ops
from keras.src import backend

from keras_memory.addressing.slots import is_first
from keras_memory.addressing.slots import replace_rows
from keras_memory.addressing.slots import rows_at
from keras_memory.recurrent import replay
from keras_memory.recurrent.backend import add_rows
from keras_memory.recurrent.backend import scan
from keras_memory.recurrent.backend import vjp


def shape_pass(step, inputs, states, kinds):
    """Runs a `replay.ShapePass` of a step, and returns it.

    `kinds` has the `StateSpec` of each state.
    """
    passes = []

    def run(inputs, states):
        passes[:] = [replay.ShapePass(kinds)]  # Keras may run this twice
        return _forward(step, passes[0], inputs, states, kinds)

    specs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, ops.dtype(x)),
        ([x[:, 0] for x in inputs], states),
    )
    specs = backend.compute_output_spec(run, *specs)
    passes[0].specs = specs
    return passes[0]


def _forward(step, run, inputs, states, kinds):
    """Runs a step; also returns the arrays that its gradient needs."""
    with run:
        features, after = step(inputs, states)
    before = [s for s, kind in zip(states, kinds) if not kind.per_slot]
    return after, features, run.saved_arrays(before)


def run_fast(
    step, inputs, states, go_backwards, all_outputs, recompute, shapes
):
    """Runs the loop with the custom gradient, as a whole or in segments."""
    inputs = [ops.swapaxes(x, 0, 1) for x in inputs]  # time first
    if go_backwards:
        inputs = [ops.flip(x, axis=0) for x in inputs]
    with backend.AutocastScope(None):
        weights = (
            [
                _joined(*weights, result.dtype)
                for weights, result in zip(
                    shapes.linears, shapes.specs[2].results
                )
            ],
            [ops.copy(variable) for variable in shapes.variables],
        )
    loop = _Loop(step, all_outputs, shapes)

    def in_segments(segment):
        # T = first + n segment: the first part runs without recomputation.
        first = (steps - 1) % segment + 1
        segmented = _LoopInSegments(segment, step, all_outputs, shapes)
        # If T is unknown it might be 1. The second loop, which cannot be
        # compiled empty, then repeats that step, and its result is discarded.
        start = first if known else ops.minimum(first, steps - 1)
        head, states_between = loop.run(
            [x[:first] for x in inputs], states, weights
        )
        rest, after = segmented.run(
            [x[start:] for x in inputs], states_between, weights
        )
        features = [ops.concatenate(parts)[:steps] for parts in zip(head, rest)]
        if not known:
            after = [
                ops.where(first < steps, new, old)
                for new, old in zip(after, states_between)
            ]
        return features, after

    steps = inputs[0].shape[0] or ops.shape(inputs[0])[0]
    known = isinstance(steps, int)
    segment = _square_root(steps) if recompute == "sqrt" else recompute
    if recompute is None or (known and steps <= segment):
        features, states = loop.run(inputs, states, weights)
    elif known:
        features, states = in_segments(segment)
    else:
        longest = ops.maximum(steps - 1, 1)
        features, states = in_segments(ops.minimum(segment, longest))
    return ops.swapaxes(features[0], 0, 1) if all_outputs else None, states


def _square_root(steps):
    if isinstance(steps, int):
        return math.isqrt(steps)
    return ops.cast(ops.sqrt(ops.cast(steps, "float32")), steps.dtype)


class _Loop:
    """Loops over inputs (T, B, ...), and saves the arrays that the gradient
    needs at every step.

    Features are a list of one array, or an empty list if only the last
    features are wanted. States with a `dtype` have no gradient.

    Args:
        step: function (inputs, states) -> (features, states).
        all_outputs: bool.
        shapes: the `replay.ShapePass` of the step.
    """

    def __init__(self, step, all_outputs, shapes):
        self.step = step
        self.all_outputs = int(all_outputs)
        self.shapes = shapes
        _, self.features_spec, self.saved_spec = shapes.specs
        # Indices of states: all with a gradient, those among them that are
        # memories or not, and those that are saved.
        kinds = [*enumerate(shapes.kinds)]
        self.with_gradient = [i for i, kind in kinds if not kind.dtype]
        self.saved = [i for i, kind in kinds if not kind.per_slot]
        self.memories = sorted({*shapes.takes, *(of for of, _ in shapes.puts)})
        self.others = [i for i in self.with_gradient if i in self.saved]

    def run(self, inputs, states, weights):
        """Returns features and states, with the custom gradient."""

        def call(x, with_gradient, linears, values):
            steps = [x, *inputs[1:]], linears, values
            before = _placed(states, self.with_gradient, with_gradient)
            features, after, saved = self.forward(before, *steps)

            def gradient(*upstream):
                upstream = keras.tree.flatten(upstream)  # JAX passes one tuple
                return _first_only(self.backward)(
                    upstream[: self.all_outputs],
                    _at(upstream[self.all_outputs :], self.with_gradient),
                    saved,
                    *steps,
                )

            return (*features, *after), gradient

        results = ops.custom_gradient(call)(
            inputs[0], _at(states, self.with_gradient), *weights
        )
        results = list(results)
        return results[: self.all_outputs], results[self.all_outputs :]

    def forward(self, states, inputs, linears, values):
        """Returns features, states, and the arrays to save."""

        def once(states, inputs):
            variables = zip(self.shapes.variables, values)
            run = replay.Forward(linears, variables)
            after, features, saved = _forward(
                self.step, run, inputs, states, self.shapes.kinds
            )
            return after, ([features] * self.all_outputs, saved)

        specs = [self.features_spec] * self.all_outputs, self.saved_spec
        after, (features, saved) = scan(once, states, inputs, specs)
        return features, after, saved

    def backward(
        self, grad_features, grad_after, saved, inputs, linears, values
    ):
        """Gradients of x, states with a gradient, linears and values."""
        # The kernels are transposed before the loop. Inside it XLA would merge
        # the transposition into each product, which is slower.
        swapped = [ops.transpose(kernel) for kernel, *_ in linears]

        def once(carried, slices):
            grad_after, grad_memories, grad_values = carried
            grad_features, saved, inputs = slices
            updated = inputs[1] if len(inputs) > 1 else None
            grad_memories, grad_put = dict(grad_memories), []
            put_slots = self.shapes.slots_of_puts(saved)
            for (index, _), slots in reversed(
                [*zip(self.shapes.puts, put_slots)]
            ):
                grad_memories[index], grad = _grad_put(
                    grad_memories[index], slots, updated
                )
                grad_put.insert(0, grad)

            states = [None] * len(self.shapes.kinds)
            states = _placed(states, self.saved, saved.states)

            def again(x, before, pre_activations, zero_rows, values):
                run = replay.Replay(
                    swapped,
                    zip(self.shapes.variables, values),
                    saved,
                    pre_activations,
                    zero_rows,
                )
                with run:
                    features, after = self.step(
                        [x, *inputs[1:]], _placed(states, self.others, before)
                    )
                return (
                    [features] * self.all_outputs,
                    _at(after, self.others),
                    run.put_rows,
                )

            grad_x, grad_before, grad_results, grad_taken, more = vjp(
                again,
                (
                    inputs[0],
                    _at(states, self.others),
                    # Zeros whose gradients are those of results and rows.
                    [ops.zeros_like(result) for result in saved.results],
                    _zeros([rows for _, rows in saved.taken]),
                    values,
                ),
                (grad_features, grad_after, grad_put),
            )
            for index, (slots, _), grad in zip(
                self.shapes.takes, saved.taken, grad_taken
            ):
                grad_memories[index] = _grad_take(
                    grad_memories[index], slots, grad
                )
            return (grad_before, grad_memories, _sum(grad_values, more)), (
                grad_x,
                grad_results,
            )

        by_index = dict(zip(self.with_gradient, grad_after))
        saved, touched = self._numbered(saved, by_index)
        (grad_others, grad_memories, grad_values), (grad_x, grad_results) = (
            scan(
                once,
                (
                    [by_index[i] for i in self.others],
                    {
                        i: _widened(slots.take(by_index[i]))
                        if i in by_index
                        else slots.zeros(
                            self.shapes.kinds[i].on_host[0].slot_size
                        )
                        for i, slots in touched.items()
                    },
                    _zeros(values),
                ),
                (grad_features, saved, inputs),
                (_spec(inputs[0][0]), self.saved_spec.results),
                reverse=True,
            )
        )
        by_index.update(zip(self.others, grad_others))
        for i, slots in touched.items():
            if i in by_index:
                by_index[i] = slots.put(by_index[i], grad_memories[i])
        grad_states = _cast_like(
            [by_index[i] for i in self.with_gradient], grad_after
        )
        grad_values = _cast_like(grad_values, values)
        grad_linears = [
            _grad_weights(x, grad_result)[: len(weights)]
            for x, grad_result, weights in zip(
                saved.inputs, grad_results, linears
            )
        ]
        return grad_x, grad_states, grad_linears, grad_values

    def _numbered(self, saved, gradients):
        """Numbers the slots that the loop touched, memory by memory.

        Args:
            saved: `replay.Saved` of all steps.
            gradients: dict from the index of a state to the gradient of the
                state after the loop; without memories on the host.

        Returns:
            `saved`, with numbers in place of slots, and a dict from the index
            of each memory to a `_SlotNumbers`.
        """
        taken, put_slots = list(saved.taken), list(saved.put_slots)
        # Of the puts, those whose slots are no take's, as in `put_slots`.
        puts_of = [of for of, take in self.shapes.puts if take is None]
        touched = {}
        for index in self.memories:
            takes = [i for i, of in enumerate(self.shapes.takes) if of == index]
            puts = [i for i, of in enumerate(puts_of) if of == index]
            touched[index] = slots = _SlotNumbers(
                [taken[i][0] for i in takes] + [put_slots[i] for i in puts],
                gradients[index].shape[1] if index in gradients else math.inf,
            )
            for i, numbers in zip(takes, slots.numbers):
                taken[i] = numbers, taken[i][1]
            for i, numbers in zip(puts, slots.numbers[len(takes) :]):
                put_slots[i] = numbers
        return saved._replace(taken=taken, put_slots=put_slots), touched


class _SlotNumbers:
    """Numbers different slots of a memory from 0, in each row of the batch.

    The backward loop then needs rows for these slots only. It needs all slots
    anyway where the loop touches as many.

    Args:
        slots: list of (T, B, P) int32.
        size: int N, or None if it is unknown. Infinity: slots are always
            numbered.

    Attributes:
        numbers: list of (T, B, P) int32, in place of `slots`.
    """

    def __init__(self, slots, size):
        self.numbers, self.slots = slots, None
        steps = slots[0].shape[0]
        counts = [part.shape[2] for part in slots]
        if size is None or (steps is not None and steps * sum(counts) >= size):
            return
        joined = ops.swapaxes(ops.concatenate(slots, axis=2), 0, 1)
        shape = ops.shape(joined)
        # (B, T P)
        self.slots = ops.reshape(joined, (shape[0], shape[1] * shape[2]))
        order = ops.argsort(self.slots, axis=1)
        ordered = rows_at(self.slots, order)
        is_new = ordered[:, 1:] != ordered[:, :-1]
        number = ops.cumsum(ops.cast(is_new, "int32"), axis=1)
        number = ops.pad(number, ((0, 0), (1, 0)))
        none = ops.zeros_like(self.slots)
        self.number_at = replace_rows(none, order, number)
        self.slot_of_number = replace_rows(none, number, ordered)
        numbers = ops.reshape(self.number_at, shape)
        numbers = ops.swapaxes(numbers, 0, 1)
        self.numbers = ops.split(numbers, np.cumsum(counts)[:-1], axis=2)

    def take(self, memory):
        """The rows (B, T P, ...) of the touched slots: row i is that of slot
        number i. Rows of unused numbers are arbitrary."""
        if self.slots is None:
            return memory
        return rows_at(memory, self.slot_of_number)

    def zeros(self, width):
        """Zero rows, by number."""
        return ops.zeros((*ops.shape(self.slots), width), "float32")

    def put(self, memory, rows):
        """The memory with rows (B, T P, ...), as from `take`."""
        if self.slots is None:
            return rows
        rows = ops.cast(rows_at(rows, self.number_at), ops.dtype(memory))
        return replace_rows(memory, self.slots, rows)


class _LoopInSegments(_Loop):
    """Saves only the states before each segment; the gradient runs the steps
    of the segment again. T is a multiple of `segment`, the number of steps in a
    segment."""

    def __init__(self, segment, *arguments):
        super().__init__(*arguments)
        self.segment = segment

    def forward(self, states, inputs, linears, values):
        forward = super().forward

        def once(states, inputs):
            features, after, _ = forward(states, inputs, linears, values)
            return after, (features, states)

        features_spec = _spec(self.features_spec, self.segment)
        after, (features, saved) = scan(
            once,
            states,
            self._cut(inputs),
            ([features_spec] * self.all_outputs, states),
        )
        return self._join(features), after, saved

    def backward(
        self, grad_features, grad_after, saved, inputs, linears, values
    ):
        forward, backward = super().forward, super().backward

        def once(carried, slices):
            grad_after, grad_weights = carried
            grad_features, before, inputs = slices
            _, _, saved = forward(before, inputs, linears, values)
            grad_x, grad_before, *more = backward(
                grad_features, grad_after, saved, inputs, linears, values
            )
            return (grad_before, _sum(grad_weights, more)), grad_x

        (grad_states, grad_weights), grad_x = scan(
            once,
            (grad_after, _zeros([linears, values])),
            (self._cut(grad_features), saved, self._cut(inputs)),
            _spec(inputs[0][0], self.segment),
            reverse=True,
        )
        grad_weights = _cast_like(grad_weights, [linears, values])
        return self._join(grad_x), grad_states, *grad_weights

    def _cut(self, arrays):
        """(T, ...) -> (segments, steps per segment, ...)."""
        return keras.tree.map_structure(
            lambda x: ops.reshape(x, (-1, self.segment, *ops.shape(x)[1:])),
            arrays,
        )

    def _join(self, arrays):
        return keras.tree.map_structure(
            lambda x: ops.reshape(x, (-1, *ops.shape(x)[2:])), arrays
        )


def _at(states, indices):
    return [states[index] for index in indices]


def _placed(states, indices, replaced):
    """A list of states with other ones at some indices."""
    states = list(states)
    for index, state in zip(indices, replaced):
        states[index] = state
    return states


def _spec(x, *steps):
    """Shape and dtype like those of `x`, with an axis of `steps` in front."""
    steps = [n if isinstance(n, int) else None for n in steps]
    return keras.KerasTensor((*steps, *x.shape), ops.dtype(x))


def _grad_put(gradient, slots, updated):
    """The backward pass of a `put`.

    Args:
        gradient: (B, N, W), that of the memory after it.
        slots: (B, P) int32.
        updated: (B,) bool or None; False: the row of the batch was masked.

    Returns:
        The gradient of the memory before it, and of the rows, (B, P, W).
    """
    rows = rows_at(gradient, slots)
    # Equal slots have equal rows: the gradient is that of the first one.
    none = ops.zeros_like(rows)
    grad_rows = ops.where(is_first(slots)[:, :, None], rows, none)
    left = none
    if updated is not None:
        grad_rows = ops.where(updated[:, None, None], grad_rows, none)
        left = ops.where(updated[:, None, None], none, rows)
    return replace_rows(gradient, slots, left), grad_rows


def _grad_take(gradient, slots, grad_rows):
    """The backward pass of a `take`: the gradient of the memory."""
    grad_rows = ops.cast(grad_rows, ops.dtype(gradient))
    return add_rows(gradient, slots, grad_rows)


# Gradients of weights and memories are summed in at least float32, since 16
# bits would round at each step.


def _sum_dtype(x):
    return backend.result_type(ops.dtype(x), "float32")


def _widened(x):
    return ops.cast(x, _sum_dtype(x))


def _zeros(arrays):
    return keras.tree.map_structure(
        lambda x: ops.zeros_like(x, dtype=_sum_dtype(x)), arrays
    )


def _sum(sums, more):
    return keras.tree.map_structure(
        lambda a, b: a + ops.cast(b, ops.dtype(a)), sums, more
    )


def _cast_like(arrays, references):
    return keras.tree.map_structure(
        lambda a, b: ops.cast(a, ops.dtype(b)), arrays, references
    )


def _joined(kernels, bias, dtype):
    """The kernels of a `linear`, stacked along the input axis, and its bias."""
    joined = ops.concatenate([ops.cast(kernel, dtype) for kernel in kernels])
    if bias is None:
        return (joined,)
    return joined, ops.cast(ops.copy(bias), dtype)


def _grad_weights(inputs, grad_results):
    """Gradients of kernel and bias over all steps (T, B, ...) at once."""
    inputs = ops.reshape(inputs, (-1, inputs.shape[-1]))
    grad_results = ops.reshape(grad_results, (-1, grad_results.shape[-1]))
    return (
        ops.matmul(ops.transpose(inputs), grad_results),
        ops.sum(grad_results, axis=0),
    )


def _first_only(function):
    """Wraps `function`: differentiating it raises a clear error."""

    @ops.custom_gradient
    def call(*arguments):
        def gradient(*upstream):
            raise NotImplementedError(
                "The fast time loop has first derivatives only. For second "
                'derivatives pass `loop="portable"` to the layer.'
            )

        return function(*arguments), gradient

    return call
