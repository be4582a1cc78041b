"""What a step of a memory cell remembers for its gradient.

The fast time loop of `scan.py` runs each step twice: forward, and once more
when gradients flow back. The functions here are what a step is written with,
so that the second run is cheap: `linear` and `kept` hand out what they gave
in the first, and the gradients of all `linear` weights are taken after the
loop, in one matrix product each. Outside of that loop they just compute.
"""

import contextlib
import contextvars
import itertools
import math

import keras
from keras import ops

# The pass over a step that is under way in this thread, if any.
_current = contextvars.ContextVar("current", default=None)

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
    current = _current.get()
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
    current = _current.get()
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

    if _current.get() is None:
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
    current = _current.get()
    wanted = _to_train.get() if current is None else current.differentiates
    if not (has_them and wanted):
        return function(*arguments)

    @ops.custom_gradient
    def call(*arguments):
        def of_arguments(upstream):
            return gradient(upstream, *arguments)

        return function(*arguments), of_arguments

    return call(*arguments)


class _Pass:
    """One run of a step. `linears` and values kept are told apart by the
    order in which they come, which is the same in all runs."""

    may_change = False
    # Whether gradients are taken of this run. In a graph each custom gradient
    # is registered with TensorFlow for ever, so the others define none.
    differentiates = False

    def __init__(self, scope):
        self.scope = scope

    def __enter__(self):
        self.token = _current.set(self)
        self.scope.__enter__()
        return self

    def __exit__(self, *raised):
        self.scope.__exit__(*raised)
        _current.reset(self.token)
        if raised[0] is None and self.scope.changed and not self.may_change:
            raise RuntimeError(
                "A step in the fast time loop changed variables that it did "
                'not change before; take `loop="portable"`. Changed: '
                f"{[variable.path for variable in self.scope.changed]}"
            )


class _Scope(keras.StatelessScope):
    """Sees which variables are read, and which would be changed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._read, self._changed = {}, {}

    def get_current_value(self, ref):
        self._read.setdefault(id(ref), ref)
        # Keras asks the innermost scope only, but in its training on JAX the
        # outermost one alone has the values.
        value, scope = super().get_current_value(ref), self.original_scope
        while value is None and scope is not None:
            value = scope.get_current_value(ref)
            scope = scope.original_scope
        return value

    def add_update(self, update):
        self._changed.setdefault(id(update[0]), update[0])
        return super().add_update(update)

    @property
    def read(self):
        return list(self._read.values())

    @property
    def changed(self):
        return list(self._changed.values())


class Forward(_Pass):
    """The first run.

    Args:
        linears: list of (kernel, bias) or (kernel,) arrays, for each call of
            `linear`, its kernels one below the other.
        variables: list of (variable, array) pairs to compute with.

    Attributes:
        inputs: list of (B, D), what came to each `linear`.
        results: list of (B, U), what it gave.
        values: list of lists of arrays, what each `kept` gave.
    """

    def __init__(self, linears, variables, **of_scope):
        super().__init__(_Scope(variables, **of_scope))
        self.linears = iter(linears)
        self.inputs, self.results, self.values = [], [], []

    def linear(self, inputs, kernels, bias):
        kernel, *bias = next(self.linears)
        self.inputs.append(_joined(inputs))
        self.results.append(sum(bias, ops.matmul(self.inputs[-1], kernel)))
        return self.results[-1]

    def kept(self, function, gradient, *arguments):
        self.values.append(function(*arguments))
        return self.values[-1][0]


class Replay(_Pass):
    """The second run, in which gradients are taken.

    Args:
        kernels: list of (U, D), the kernels of `Forward`'s `linears` with
            their axes swapped.
        variables: as in `Forward`.
        results, values: lists, those of the first run.
        taps: list of arrays like `results`, which get their gradients.
    """

    differentiates = True

    def __init__(self, kernels, variables, results, values, taps):
        super().__init__(_Scope(variables))
        self.kernels, self.taps = iter(kernels), iter(taps)
        self.results, self.values = iter(results), iter(values)

    def linear(self, inputs, kernels, bias):
        kernel, result = next(self.kernels), next(self.results)

        @ops.custom_gradient
        def again(joined, tap):
            def gradient(upstream):
                return ops.matmul(upstream, kernel), upstream

            return result, gradient

        return again(_joined(inputs), next(self.taps))

    def kept(self, function, gradient, *arguments):
        values = next(self.values)

        @ops.custom_gradient
        def again(*arguments):
            def of_arguments(upstream):
                return gradient(upstream, values, *arguments)

            return values[0], of_arguments

        return again(*arguments)


class Survey(Forward):
    """A first run on arrays without numbers, to find out what a step asks for.

    Attributes:
        linears: list of (kernels, bias), a call of `linear` each.
        variables: list of the other variables that the step reads.
    """

    may_change = True

    def __init__(self):
        super().__init__([], [], collect_losses=True)
        self.linears = []

    def linear(self, inputs, kernels, bias):
        self.linears.append((kernels, bias))
        rows, dtype = ops.shape(inputs[0])[0], inputs[0].dtype
        self.inputs.append(_joined(inputs))
        self.results.append(ops.zeros((rows, kernels[0].shape[-1]), dtype))
        return self.results[-1]

    @property
    def variables(self):
        return self.scope.read

    @property
    def why_not(self):
        """Why the step cannot be run twice, or an empty text."""
        if self.scope.changed:
            paths = ", ".join(variable.path for variable in self.scope.changed)
            return f"each step changes {paths}"
        if self.scope.losses:
            return "each step adds a loss"
        return ""


def _joined(inputs):
    return inputs[0] if len(inputs) == 1 else ops.concatenate(inputs, axis=-1)
