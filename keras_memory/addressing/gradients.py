"""What a step is written with, so that its gradient is cheap.

The time loop of `recurrent/fast_loop.py` runs each step twice: forward, and
once more when gradients flow back. `linear` and `kept` hand out in the second
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

# The pass over a step that is under way in this thread, if any.
current_pass = contextvars.ContextVar("current", default=None)

# Whether `with_gradient` is to do more than compute.
_to_train = contextvars.ContextVar("to_train", default=True)


@contextlib.contextmanager
def to_train(training):
    """Where `training` is False, and outside of the fast loop, gradients are
    the backend's: those of our own would stay in a model that is exported, and
    forbid forward mode."""
    before = _to_train.set(bool(training))
    try:
        yield
    finally:
        _to_train.reset(before)


def linear(inputs, kernels, bias=None):
    """The sum of products of inputs with weights.

    Args:
        inputs: list of (B, D_i) arrays of one dtype.
        kernels: list of as many (D_i, U) weights, `keras.Variable`.
        bias: (U,) weight, or None.

    Returns:
        (B, U) in the dtype of `inputs`.
    """
    current = current_pass.get()
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


def kept(function, gradient, *arguments):
    """The result of a function, kept with what its gradient is quicker with.

    Args:
        function: from arrays to a list of arrays, the first is the result; not
            by `linear` or `kept`.
        gradient: (gradient of the result, that whole list, *arguments) ->
            gradients of the arguments.
        *arguments: arrays.

    Returns:
        Array.
    """
    current = current_pass.get()
    if current is None:
        return function(*arguments)[0]
    return current.kept(function, gradient, *arguments)


# Gradients (dy, y, x) -> dx of functions y of x, quicker than the backend's as
# nothing is computed again.
SLOPES = {
    keras.activations.linear: lambda dy, y, x: dy,
    keras.activations.sigmoid: lambda dy, y, x: dy * y * (1.0 - y),
    keras.activations.softplus: lambda dy, y, x: dy * ops.sigmoid(x),
    keras.activations.tanh: lambda dy, y, x: dy * (1.0 - y * y),
}


def _has_slope(function):
    try:
        return function in SLOPES
    except TypeError:  # not hashable
        return False


def activate(function, x):
    """`function(x)`, kept where `SLOPES` has its gradient."""
    if not _has_slope(function):
        return function(x)

    def gradient(upstream, results, x):
        return SLOPES[function](upstream, *results, x)

    return kept(lambda x: [function(x)], gradient, x)


def remember(x):
    """`x`, which the second run takes as it was in the first."""
    return activate(keras.activations.linear, x)


def activate_parts(functions, shapes, x):
    """Takes vectors apart, and each part by a function of its own.

    Args:
        functions: sequence; all are kept together that `SLOPES` has gradients
            of, which are Keras's own activations, not those of `ops`.
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

    if current_pass.get() is None:
        return [f(part) for f, part in zip(functions, parts(x), strict=True)]
    identity = keras.activations.linear
    first = [f if _has_slope(f) else identity for f in functions]
    others = [identity if _has_slope(f) else f for f in functions]

    def together(x):
        return [joined(f(part) for f, part in zip(first, parts(x)))]

    def gradient(upstream, results, x):
        of_parts = zip(first, parts(upstream), parts(*results), parts(x))
        return joined(SLOPES[f](*of_part) for f, *of_part in of_parts)

    x = kept(together, gradient, x)
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
    wanted = _to_train.get() if current is None else current.differentiates
    if not (has_them and wanted):
        return function(*arguments)

    @ops.custom_gradient
    def call(*arguments):
        def of_arguments(upstream):
            return gradient(upstream, *arguments)

        return function(*arguments), of_arguments

    return call(*arguments)
