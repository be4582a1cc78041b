"""The functions that a step is built of, so that its gradient is cheap.

The fast time loop (`recurrent/fast_loop.py`) runs each step twice: in the
forward pass, and again in the backward pass. In the second run, `linear` and
functions decorated with `custom_gradient(..., saves=True)` return their saved
results. The gradient of each `linear` weight is one matrix product after the
loop. Outside of the fast loop these functions just compute.

A function decorated with `custom_gradient` is differentiated

                                  saves=False          saves=True
    inference                     by the backend       by the backend
    training, portable loop       by our gradient      by the backend
    training, fast loop           by our gradient      by our gradient, from
                                                       saved results

This holds on TensorFlow and JAX. On PyTorch the backend always differentiates,
and NumPy has no gradients.
"""

import contextlib
import contextvars
import functools
import inspect
import itertools
import math

import keras
from keras import ops

# The pass over a step that runs in this thread: one of `replay.py`, None
# outside of the fast loop, or `PLAIN`, which leaves gradients to the backend.
current_pass = contextvars.ContextVar("current_pass", default=None)
PLAIN = object()


@contextlib.contextmanager
def custom_gradients(enabled):
    """Context with our custom gradients, or, if not `enabled`, without them.

    Without them the backend differentiates all operations. They are off for
    inference: a custom gradient would be baked into exported models, and it
    breaks forward-mode differentiation. The fast loop always has them.
    """
    if enabled or current_pass.get() is not None:
        yield
        return
    token = current_pass.set(PLAIN)
    try:
        yield
    finally:
        current_pass.reset(token)


def fast_pass():
    """The current pass of the fast loop, or None outside of it."""
    current = current_pass.get()
    return None if current is PLAIN else current


def linear(inputs, kernels, bias=None):
    """Multiplies each input by its kernel, and sums the products and the bias.

    Args:
        inputs: list of (B, D_i) arrays of one dtype.
        kernels: list of (D_i, U) weights, `keras.Variable`, one per input.
        bias: (U,) weight, or None.

    Returns:
        (B, U) in the dtype of `inputs`.
    """
    current = fast_pass()
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
    """Gives a function of arrays a custom gradient.

    Args:
        gradient: (gradient of the result, *arrays, **options) -> gradients of
            the arrays, as a tuple if there are several. It must itself be
            differentiable.
        saves: bool. True: the function must return a list: its result, then
            values that make the gradient cheaper. The decorated function
            returns the result alone. The fast loop saves the list instead of
            computing it twice; `gradient` takes it as its second argument.
            Outside of the fast loop the backend differentiates. The function
            must not call `linear`, nor another function that saves.

    Returns:
        A decorator for functions (*arrays, **options) -> array. The options
        are keyword-only and not arrays.

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
    """Whether our custom gradients apply in a pass, or outside of one."""
    has_custom_gradients = keras.backend.backend() in ("tensorflow", "jax")
    return has_custom_gradients and (current is None or current.differentiates)


def _differentiated(function, gradient, *arrays):
    @ops.custom_gradient
    def call(*arrays):
        def grad_arrays(upstream):
            return gradient(upstream, *arrays)

        return function(*arrays), grad_arrays

    return call(*arrays)


# Gradients (dy, y, x) -> dx of functions y = f(x). They reuse the result y, and
# so are faster than the backend's.
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
    """Computes `function(x)`; saves it if `DERIVATIVES` has its gradient."""
    if not _has_derivative(function):
        return function(x)
    return _activate(x, function=function)


def saved_value(x):
    """Returns `x`, saved so that the backward pass need not compute it."""
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
    """Splits vectors into parts, and applies a function to each part.

    Args:
        functions: sequence with the function of each part. Results of the
            functions in `DERIVATIVES` are saved together. `DERIVATIVES` has
            `keras.activations.sigmoid` but not `ops.sigmoid`, whose result is
            not saved.
        shapes: sequence with the shape of each part, without the batch axis,
            in the order of the parts in `x`.
        x: (B, D), where D is the number of entries of all parts.

    Returns:
        List of arrays (B, *shape).
    """
    if fast_pass() is not None:
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
