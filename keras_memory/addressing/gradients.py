"""What a step is written with, so that its gradient is cheap.

The time loop of `recurrent/fast_loop.py` runs each step twice: forward, and
once more when gradients flow back. `linear`, and functions decorated with
`custom_gradient(..., saves=True)`, return in the second run what they returned
in the first. The gradients of all `linear` weights are taken after the loop, in
one matrix product each. Outside of that loop they just compute.

A function decorated with `custom_gradient` is differentiated

                                  saves=False          saves=True
    inference                     by the backend       by the backend
    training, portable loop       by our gradient      by the backend
    training, fast loop           by our gradient      by our gradient, of
                                                       saved results
"""

import contextlib
import contextvars
import functools
import inspect
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
    """Inside, the backend differentiates all operations, unless `enabled`, or
    inside the fast loop.

    Our own gradients are off for inference: a custom gradient would be baked
    into exported models, and it breaks forward-mode differentiation.
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


def custom_gradient(gradient, saves=False):
    """Decorates a function of arrays with a gradient of its own.

    Args:
        gradient: (gradient of the result, *arrays, **options) -> gradients of
            the arrays, as a tuple if there are several. It is written with
            functions that can be differentiated in turn.
        saves: bool. True: the decorated function is written to return a list,
            its result and what makes the gradient cheaper. The fast loop saves
            this list and does not compute it twice; `gradient` takes it as its
            second argument. Outside of the fast loop the backend
            differentiates. The function must not call `linear`, nor another
            one that saves.

    Returns:
        A decorator for functions (*arrays, **options) -> array, whose options
        are keyword-only and no arrays.

    >>> def grad_square(grad_y, x):
    ...     return 2.0 * x * grad_y
    >>> @custom_gradient(grad_square)
    ... def square(x):
    ...     return x * x
    """

    def decorate(function):
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

        @functools.wraps(function)
        def decorated(*arrays, **options):
            for name in names[len(arrays) :]:  # arrays passed by keyword
                arrays += (options.pop(name),)
            current = current_pass.get()
            if saves and (current is None or current is PLAIN):
                return function(*arrays, **options)[0]
            if current is PLAIN or not (saves or _differentiates(current)):
                return function(*arrays, **options)
            given = function, gradient
            if options:
                given = (functools.partial(f, **options) for f in given)
            if saves:
                return current.saved(*given, *arrays)
            return _differentiated(*given, *arrays)

        decorated.gradient, decorated.saves = gradient, saves
        return decorated

    return decorate


def _differentiates(current):
    """Whether our own gradients differentiate what runs now: a pass, or a step
    outside of one."""
    has_custom_gradients = keras.backend.backend() in ("tensorflow", "jax")
    return has_custom_gradients and (current is None or current.differentiates)


def _differentiated(function, gradient, *arrays):
    @ops.custom_gradient
    def call(*arrays):
        def grad_arrays(upstream):
            return gradient(upstream, *arrays)

        return function(*arrays), grad_arrays

    return call(*arrays)


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


def _grad_activate(upstream, saved, x, function):
    return DERIVATIVES[function](upstream, *saved, x)


@custom_gradient(_grad_activate, saves=True)
def _activate(x, *, function):
    return [function(x)]


def activate(function, x):
    """`function(x)`, saved where `DERIVATIVES` has its gradient."""
    if not _has_derivative(function):
        return function(x)
    return _activate(x, function=function)


def saved_value(x):
    """`x`, saved: the backward pass does not compute it again."""
    return activate(keras.activations.linear, x)


def _grad_activate_each(upstream, saved, x, functions, shapes):
    arrays = (_split(y, shapes) for y in (upstream, *saved, x))
    return _joined(
        DERIVATIVES[function](*parts)
        for function, *parts in zip(functions, *arrays)
    )


@custom_gradient(_grad_activate_each, saves=True)
def _activate_each(x, *, functions, shapes):
    parts = zip(functions, _split(x, shapes))
    return [_joined(function(part) for function, part in parts)]


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
    if _fast_pass() is not None:
        identity = keras.activations.linear
        known = [f if _has_derivative(f) else identity for f in functions]
        x = _activate_each(x, functions=known, shapes=shapes)
        functions = [identity if _has_derivative(f) else f for f in functions]
    parts = zip(functions, _split(x, shapes), strict=True)
    return [function(part) for function, part in parts]


def _split(x, shapes):
    """(B, D) -> list of (B, *shape)."""
    ends = list(itertools.accumulate(map(math.prod, shapes)))[:-1]
    parts = zip(ops.split(x, ends, axis=-1), shapes, strict=True)
    return [ops.reshape(part, (-1, *shape)) for part, shape in parts]


def _joined(parts):
    """List of (B, *shape) -> (B, D)."""
    return ops.concatenate(
        [ops.reshape(x, (-1, math.prod(x.shape[1:]))) for x in parts], axis=-1
    )
