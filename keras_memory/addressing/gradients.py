"""What a step is written with, so that its gradient is cheap.

The time loop of `recurrent/fast_loop.py` runs each step twice: forward, and
once more when gradients flow back. `linear` and `saved` hand out in the second
run what they gave in the first, and the gradients of all `linear` weights are
taken after the loop, in one matrix product each. Outside of that loop they
just compute.
"""

import contextlib
import contextvars
import itertools
import math

import keras
from keras import ops

# The pass over a step under way in this thread: one of `replay.py`, None
# outside of the fast loop, or `PLAIN`, which leaves gradients to the backend.
current_pass = contextvars.ContextVar("current_pass", default=None)
PLAIN = object()


@contextlib.contextmanager
def custom_gradients(enabled):
    """Whether operations have our own gradients outside of the fast loop.

    They are off for inference: a custom gradient would be baked into exported
    models, and it breaks forward-mode differentiation.
    """
    if enabled or current_pass.get() is not None:
        yield
        return
    token = current_pass.set(PLAIN)
    try:
        yield
    finally:
        current_pass.reset(token)


def _fast_pass():
    """The pass of the fast loop that is under way, or None."""
    current = current_pass.get()
    return None if current is PLAIN else current


def linear(inputs, kernels, bias=None):
    """The sum of products of inputs with weights.

    Args:
        inputs: list of (B, D_i) arrays of one dtype.
        kernels: list of as many (D_i, U) weights, `keras.Variable`.
        bias: (U,) weight, or None.

    Returns:
        (B, U) in the dtype of `inputs`.
    """
    current = _fast_pass()
    weights = [*kernels] if bias is None else [*kernels, bias]
    if current is not None and all(
        isinstance(weight, keras.Variable) for weight in weights
    ):
        return current.linear(inputs, kernels, bias)
    dtype = inputs[0].dtype
    result = sum(
        ops.matmul(x, ops.cast(kernel, dtype))
        for x, kernel in zip(inputs, kernels, strict=True)
    )
    return result if bias is None else result + ops.cast(bias, dtype)


def saved(function, gradient, *arguments):
    """The result of a function, kept with what its gradient is quicker with.

    Args:
        function: from arrays to a list of arrays, the first is the result; not
            by `linear` or `saved`.
        gradient: (gradient of the result, that whole list, *arguments) ->
            gradients of the arguments.
        *arguments: arrays.

    Returns:
        Array.
    """
    current = _fast_pass()
    if current is None:
        return function(*arguments)[0]
    return current.saved(function, gradient, *arguments)


# Gradients (dy, y, x) -> dx of functions y of x, quicker than the backend's as
# nothing is computed again.
DERIVATIVES = {
    keras.activations.linear: lambda dy, y, x: dy,
    keras.activations.sigmoid: lambda dy, y, x: dy * y * (1.0 - y),
    keras.activations.softplus: lambda dy, y, x: dy * ops.sigmoid(x),
    keras.activations.tanh: lambda dy, y, x: dy * (1.0 - y * y),
}


def _has_derivative(function):
    try:
        return function in DERIVATIVES
    except TypeError:  # not hashable
        return False


def activate(function, x):
    """`function(x)`, kept where `DERIVATIVES` has its gradient."""
    if not _has_derivative(function):
        return function(x)

    def gradient(upstream, results, x):
        return DERIVATIVES[function](upstream, *results, x)

    return saved(lambda x: [function(x)], gradient, x)


def saved_value(x):
    """`x`, which the second run takes as it was in the first."""
    return activate(keras.activations.linear, x)


def activate_each(functions, shapes, x):
    """Takes vectors apart, and each part by a function of its own.

    Args:
        functions: sequence; those that `DERIVATIVES` has, Keras's own
            activations, not those of `ops`, are saved together.
        shapes: sequence with the shape of each part, without the batch axis,
            in the order in which they stand in `x`.
        x: (B, D), D entries of all parts.

    Returns:
        List of arrays (B, *shape).
    """
    sizes = [math.prod(shape) for shape in shapes]
    ends = list(itertools.accumulate(sizes))[:-1]

    def parts(x):
        parts = ops.split(x, ends, axis=-1)
        return [
            ops.reshape(part, (-1, *shape))
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def joined(parts):
        return ops.concatenate(
            [ops.reshape(x, (-1, size)) for x, size in zip(parts, sizes)],
            axis=-1,
        )

    if _fast_pass() is None:
        return [f(part) for f, part in zip(functions, parts(x), strict=True)]
    identity = keras.activations.linear
    first = [f if _has_derivative(f) else identity for f in functions]
    others = [identity if _has_derivative(f) else f for f in functions]

    def together(x):
        return [joined(f(part) for f, part in zip(first, parts(x)))]

    def gradient(upstream, results, x):
        of_parts = zip(first, parts(upstream), parts(*results), parts(x))
        return joined(DERIVATIVES[f](*of_part) for f, *of_part in of_parts)

    x = saved(together, gradient, x)
    return [f(part) for f, part in zip(others, parts(x), strict=True)]


def with_gradient(function, gradient, *arguments):
    """`function(*arguments)`, differentiated by `gradient`.

    Args:
        function: from arrays to one array.
        gradient: (gradient of the result, *arguments) -> gradients of the
            arguments, by functions that can be differentiated in turn.
        *arguments: arrays.

    Returns:
        Array.
    """
    has_them = keras.backend.backend() in ("tensorflow", "jax")
    current = current_pass.get()
    wanted = current is None or (
        current is not PLAIN and current.differentiates
    )
    if not (has_them and wanted):
        return function(*arguments)

    @ops.custom_gradient
    def call(*arguments):
        def grad_arguments(upstream):
            return gradient(upstream, *arguments)

        return function(*arguments), grad_arguments

    return call(*arguments)
