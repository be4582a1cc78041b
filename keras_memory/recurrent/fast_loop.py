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
in segments     :  states saved every k steps (`recompute`); the forward pass
    of a segment runs again before its backward pass

`replay.py` has the passes over one step.
"""

import math

import keras
from keras import ops
from keras.src import backend

from keras_memory.recurrent import replay
from keras_memory.recurrent.backend import scan
from keras_memory.recurrent.backend import vjp


def shape_pass(step, inputs, states):
    """Runs a `replay.ShapePass` of a step. Returns it, and `keras.KerasTensor`s
    like the results of `_forward`."""
    passes = []

    def run(inputs, states):
        passes[:] = [replay.ShapePass()]  # Keras may run this twice
        return _forward(step, passes[0], inputs, states)

    specs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, ops.dtype(x)),
        ([x[:, 0] for x in inputs], states),
    )
    specs = backend.compute_output_spec(run, *specs)
    return passes[0], specs


def _forward(step, run, inputs, states):
    """Runs a step; also returns the arrays that its gradient needs."""
    with run:
        features, after = step(inputs, states)
    return after, features, (states, run.inputs, run.results, run.values)


def run_fast(
    step, inputs, states, go_backwards, all_outputs, recompute, shapes, specs
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
                for weights, result in zip(shapes.linears, specs[2][2])
            ],
            [ops.copy(variable) for variable in variables],
        )
    loop = _Loop(step, all_outputs, variables, specs)

    def in_segments(segment):
        # T = first + n segment: the first part runs without recomputation.
        first = (steps - 1) % segment + 1
        segmented = _LoopInSegments(
            segment, step, all_outputs, variables, specs
        )
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
    features are wanted.
    """

    def __init__(self, step, all_outputs, variables, specs):
        self.step = step
        self.all_outputs = int(all_outputs)
        self.variables = variables
        _, self.features_spec, self.saved_spec = specs

    def run(self, inputs, states, weights):
        """Returns features and states, with the custom gradient."""

        def call(x, states, linears, values):
            steps = [x, *inputs[1:]], linears, values
            features, after, saved = self.forward(states, *steps)

            def gradient(*upstream):
                upstream = keras.tree.flatten(upstream)  # JAX passes one tuple
                return _first_only(self.backward)(
                    upstream[: self.all_outputs],
                    upstream[self.all_outputs :],
                    saved,
                    *steps,
                )

            return (*features, *after), gradient

        results = ops.custom_gradient(call)(inputs[0], states, *weights)
        results = list(results)
        return results[: self.all_outputs], results[self.all_outputs :]

    def forward(self, states, inputs, linears, values):
        """Returns features, states, and the arrays to save."""

        def once(states, inputs):
            run = replay.Forward(linears, zip(self.variables, values))
            after, features, saved = _forward(self.step, run, inputs, states)
            return after, ([features] * self.all_outputs, saved)

        specs = [self.features_spec] * self.all_outputs, self.saved_spec
        after, (features, saved) = scan(once, states, inputs, specs)
        return features, after, saved

    def backward(
        self, grad_features, grad_after, saved, inputs, linears, values
    ):
        """Gradients of x, states, linears and values."""
        # The kernels are transposed before the loop. Inside it XLA would merge
        # the transposition into each product, which is slower.
        swapped = [ops.transpose(kernel) for kernel, *_ in linears]

        def once(carried, slices):
            grad_after, grad_values = carried
            grad_features, (before, _, results, saved), inputs = slices

            def again(x, before, pre_activations, values):
                run = replay.Replay(
                    swapped,
                    zip(self.variables, values),
                    results,
                    saved,
                    pre_activations,
                )
                with run:
                    features, after = self.step([x, *inputs[1:]], before)
                return [features] * self.all_outputs, after

            # Zeros whose gradients are those of the results.
            pre_activations = [ops.zeros_like(result) for result in results]
            grad_x, grad_before, grad_results, more = vjp(
                again,
                (inputs[0], before, pre_activations, values),
                (grad_features, grad_after),
            )
            return (grad_before, _sum(grad_values, more)), (
                grad_x,
                grad_results,
            )

        (grad_states, grad_values), (grad_x, grad_results) = scan(
            once,
            (grad_after, _zeros(values)),
            (grad_features, saved, inputs),
            (_spec(inputs[0][0]), self.saved_spec[2]),
            reverse=True,
        )
        grad_values = _cast_like(grad_values, values)
        grad_linears = [
            _grad_weights(x, grad_result)[: len(weights)]
            for x, grad_result, weights in zip(saved[1], grad_results, linears)
        ]
        return grad_x, grad_states, grad_linears, grad_values


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


# Gradients of weights are summed in at least float32, since 16 bits would round
# at each step.


def _zeros(arrays):
    return keras.tree.map_structure(
        lambda x: ops.zeros_like(
            x, dtype=backend.result_type(ops.dtype(x), "float32")
        ),
        arrays,
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
