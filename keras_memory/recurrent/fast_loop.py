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
    not saved, but the rows that a step takes, and its choices; the backward
    loop carries the gradient of the memory, in which each step changes the rows
    that it took and put (`addressing/sparse.py`)
in segments     :  states saved every k steps (`recompute`); the forward pass
    of a segment runs again before its backward pass

`replay.py` has the passes over one step.
"""

import itertools
import math

import keras
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
    """Runs a `replay.ShapePass` of a step. Returns it, and `keras.KerasTensor`s
    like the results of `_forward`."""
    passes = []

    def run(inputs, states):
        passes[:] = [replay.ShapePass()]  # Keras may run this twice
        per_slot = iter(range(len(states)))
        states = [
            replay.Slots(next(per_slot), state) if kind.per_slot else state
            for state, kind in zip(states, kinds)
        ]
        return _forward(step, passes[0], inputs, states, kinds)

    specs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, ops.dtype(x)),
        ([x[:, 0] for x in inputs], states),
    )
    specs = backend.compute_output_spec(run, *specs)
    return passes[0], specs


def _forward(step, run, inputs, states, kinds):
    """Runs a step; also returns the arrays that its gradient needs."""
    with run:
        features, after = step(inputs, states)
    after = [replay.array_of(state) for state in after]
    before = [s for s, kind in zip(states, kinds) if not kind.per_slot]
    return after, features, run.saved_arrays(before)


def run_fast(
    step,
    inputs,
    states,
    go_backwards,
    all_outputs,
    recompute,
    kinds,
    shapes,
    specs,
):
    """Runs the loop with the custom gradient, as a whole or in segments."""
    inputs = [ops.swapaxes(x, 0, 1) for x in inputs]  # time first
    if go_backwards:
        inputs = [ops.flip(x, axis=0) for x in inputs]
    variables = [v for v in shapes.variables if "float" in v.dtype]
    with backend.AutocastScope(None):
        weights = (
            [
                _joined(*weights, result.dtype)
                for weights, result in zip(shapes.linears, specs[2].results)
            ],
            [ops.copy(variable) for variable in variables],
        )
    arguments = step, all_outputs, variables, specs, kinds, shapes
    loop = _Loop(*arguments)

    def in_segments(segment):
        # T = first + n segment: the first part runs without recomputation.
        first = (steps - 1) % segment + 1
        segmented = _LoopInSegments(segment, *arguments)
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
    features are wanted. `kinds` has the `StateSpec` of each state. Whole
    numbers have no gradient. The gradient of a state with a row for each slot
    is one array, in which each step changes the rows that it took and put.
    """

    def __init__(self, step, all_outputs, variables, specs, kinds, shapes):
        self.step = step
        self.all_outputs = int(all_outputs)
        self.variables = variables
        _, self.features_spec, self.saved_spec = specs
        self.kinds = kinds
        self.takes, self.puts = shapes.takes, shapes.puts

    def _with_gradient(self, states):
        """Selects the states that have a gradient."""
        return [s for s, kind in zip(states, self.kinds) if not kind.dtype]

    def _merged(self, with_gradient, others):
        """Undoes `_with_gradient`; `others` is a list of all states."""
        given = iter(with_gradient)
        return [
            other if kind.dtype else next(given)
            for other, kind in zip(others, self.kinds)
        ]

    def run(self, inputs, states, weights):
        """Returns features and states, with the custom gradient."""

        def call(x, with_gradient, linears, values):
            steps = [x, *inputs[1:]], linears, values
            before = self._merged(with_gradient, states)
            features, after, saved = self.forward(before, *steps)

            def gradient(*upstream):
                upstream = keras.tree.flatten(upstream)  # JAX passes one tuple
                return _first_only(self.backward)(
                    upstream[: self.all_outputs],
                    self._with_gradient(upstream[self.all_outputs :]),
                    saved,
                    *steps,
                )

            return (*features, *after), gradient

        results = ops.custom_gradient(call)(
            inputs[0], self._with_gradient(states), *weights
        )
        results = list(results)
        return results[: self.all_outputs], results[self.all_outputs :]

    def forward(self, states, inputs, linears, values):
        """Returns features, states, and the arrays to save."""

        def once(states, inputs):
            run = replay.Forward(linears, zip(self.variables, values))
            after, features, saved = _forward(
                self.step, run, inputs, states, self.kinds
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
            for index, slots in reversed([*zip(self.puts, saved.put_slots)]):
                grad_memories[index], grad = _grad_put(
                    grad_memories[index], slots, updated
                )
                grad_put.insert(0, grad)

            def again(x, before, pre_activations, zero_rows, values):
                run = replay.Replay(
                    swapped,
                    zip(self.variables, values),
                    saved,
                    pre_activations,
                    zero_rows,
                )
                with run:
                    features, after = self.step(
                        [x, *inputs[1:]], self._replayed(before, saved.states)
                    )
                return (
                    [features] * self.all_outputs,
                    self._kept(after),
                    run.put_rows,
                )

            grad_x, grad_before, grad_results, grad_taken, more = vjp(
                again,
                (
                    inputs[0],
                    self._before(saved.states),
                    # Zeros whose gradients are those of results and rows.
                    [ops.zeros_like(result) for result in saved.results],
                    _zeros([rows for _, rows in saved.taken]),
                    values,
                ),
                (grad_features, grad_after, grad_put),
            )
            for index, (slots, _), grad in zip(
                self.takes, saved.taken, grad_taken
            ):
                grad_memories[index] = _grad_take(
                    grad_memories[index], slots, grad
                )
            return (grad_before, grad_memories, _sum(grad_values, more)), (
                grad_x,
                grad_results,
            )

        upstream = grad_after
        grad_after, grad_memories = self._apart(upstream)
        (grad_before, grad_memories, grad_values), (grad_x, grad_results) = (
            scan(
                once,
                (grad_after, grad_memories, _zeros(values)),
                (grad_features, saved, inputs),
                (_spec(inputs[0][0]), self.saved_spec.results),
                reverse=True,
            )
        )
        grad_states = _cast_like(
            self._together(grad_before, grad_memories), upstream
        )
        grad_values = _cast_like(grad_values, values)
        grad_linears = [
            _grad_weights(x, grad_result)[: len(weights)]
            for x, grad_result, weights in zip(
                saved.inputs, grad_results, linears
            )
        ]
        return grad_x, grad_states, grad_linears, grad_values

    # Lists of states, or of their gradients, in the backward pass.

    def _replayed(self, with_gradient, saved):
        """All states before a step: `saved` ones, of which those with a
        gradient are given, and `replay.Slots`."""
        given, saved = iter(with_gradient), iter(saved)
        slots, states = itertools.count(), []
        for kind in self.kinds:
            if kind.per_slot:
                states.append(replay.Slots(next(slots)))
            else:
                state = next(saved)
                states.append(state if kind.dtype else next(given))
        return states

    def _before(self, saved):
        """The `saved` states that have a gradient."""
        kinds = [kind for kind in self.kinds if not kind.per_slot]
        return [s for s, kind in zip(saved, kinds) if not kind.dtype]

    def _kept(self, after):
        """The states after a step that have a gradient, without memories."""
        return [
            state
            for state, kind in zip(after, self.kinds)
            if not (kind.per_slot or kind.dtype)
        ]

    def _apart(self, gradients):
        """Splits gradients of states: a list, and a dict of those of memories,
        by their numbers among the states with a row for each slot."""
        given, slots = iter(gradients), itertools.count()
        others, memories = [], {}
        for kind in self.kinds:
            index = next(slots) if kind.per_slot else None
            if kind.dtype:
                continue
            if kind.per_slot:
                gradient = next(given)
                memories[index] = ops.cast(gradient, _sum_dtype(gradient))
            else:
                others.append(next(given))
        return others, memories

    def _together(self, others, memories):
        """Undoes `_apart`."""
        others, memories = iter(others), iter(memories.values())
        return [
            next(memories if kind.per_slot else others)
            for kind in self.kinds
            if not kind.dtype
        ]


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
