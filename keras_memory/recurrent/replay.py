"""The passes of the fast time loop over a step.

`ShapePass` runs once, on symbolic arrays, and finds the products with weights.
`Forward` saves the results of these products, the values that custom gradients
need, choices, and the rows that a step takes from a memory. `Replay` uses them
instead of computing them again.
`addressing/gradients.py` has the functions that a step is built of.
"""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_memory.addressing.gradients import current_pass
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.slots import same_place


class _Pass:
    """One run of a step. Products, saved values, choices, takes and puts are
    matched by their order, which is the same in all runs."""

    may_change = False
    # Whether this run has the arrays of states with a row for each slot.
    has_arrays = True
    # Whether this run is differentiated. Other runs define no custom gradients,
    # as TensorFlow registers each one in a graph forever.
    differentiates = False

    def __init__(self, scope):
        self.scope = scope

    def __enter__(self):
        self.token = current_pass.set(self)
        self.scope.__enter__()
        return self

    def __exit__(self, *raised):
        self.scope.__exit__(*raised)
        current_pass.reset(self.token)
        if raised[0] is None and self.scope.changed and not self.may_change:
            raise RuntimeError(
                "A step must not change variables in the fast time loop: use "
                '`loop="portable"`. Received: changes of '
                f"{[variable.path for variable in self.scope.changed]}"
            )


class _Scope(keras.StatelessScope):
    """Records which variables are read, and which would be changed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._read, self._changed = {}, {}

    def get_current_value(self, ref):
        self._read.setdefault(id(ref), ref)
        # Keras asks only the innermost scope, but in training on JAX only the
        # outermost scope has the values.
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


class Saved(NamedTuple):
    """The arrays of one step that its gradient needs: the states before it,
    without those that have a row for each slot, and attributes of `Forward`."""

    states: Any
    inputs: Any
    results: Any
    values: Any
    choices: Any
    taken: Any
    put_slots: Any


class Forward(_Pass):
    """The run of the forward pass, which saves values for the gradient.

    Args:
        linears: list of (kernel, bias) or (kernel,) arrays, one for each call
            of `linear`, with its kernels stacked along the input axis.
        variables: list of (variable, array) pairs to compute with.

    Attributes:
        inputs: list of (B, D), the inputs of each `linear`.
        results: list of (B, U), the results of each `linear`.
        values: list of lists of arrays, the results of each `saved`.
        choices: list, the results of each `chosen`.
        takes: list of ints, which state each `take` is of.
        taken: list of (slots, rows), of each `take`.
        put_slots: list of slots, of each `put` of other slots than those of a
            `take` (mostly a step puts what it took).
    """

    def __init__(self, linears, variables, **of_scope):
        super().__init__(_Scope(variables, **of_scope))
        self.linears = iter(linears)
        self.inputs, self.results, self.values = [], [], []
        self.choices, self.taken, self.put_slots = [], [], []
        self.takes = []

    def saved_arrays(self, states):
        """`Saved` arrays, with the states before the step."""
        return Saved(
            states,
            self.inputs,
            self.results,
            self.values,
            self.choices,
            self.taken,
            self.put_slots,
        )

    def linear(self, inputs, kernels, bias):
        kernel, *bias = next(self.linears)
        self.inputs.append(_joined(inputs))
        self.results.append(sum(bias, ops.matmul(self.inputs[-1], kernel)))
        return self.results[-1]

    def saved(self, function, gradient, *arguments):
        self.values.append(function(*arguments))
        return self.values[-1][0]

    def chosen(self, function, *arguments):
        self.choices.append(function(*arguments))
        return self.choices[-1]

    def take(self, memory, slots):
        rows = memory.taken(slots)
        self.takes.append(memory.index)
        self.taken.append((slots, rows))
        return ops.cast(rows, at_least_float32(ops.dtype(rows)))

    def put(self, memory, slots, rows):
        if self.take_of(memory, slots) is None:
            self.put_slots.append(slots)
        return memory.replaced(slots, rows)

    def take_of(self, memory, slots):
        """Which `take` of the memory had this very array of slots, or None."""
        for number, (index, (taken, _)) in enumerate(
            zip(self.takes, self.taken)
        ):
            if index == memory.index and taken is slots:
                return number
        return None


class Replay(_Pass):
    """The run of the backward pass, which is differentiated.

    Args:
        kernels: list of (U, D), the kernels of `Forward`'s `linears` with
            their axes swapped.
        variables: as in `Forward`.
        saved: `Saved` arrays.
        pre_activations: list of zeros like `saved.results`, whose gradients are
            those of the results.
        zero_rows: list of zeros like the rows of `saved.taken`, whose gradients
            are those of the rows.

    Attributes:
        put_rows: list of rows, of each `put`.
    """

    differentiates = True
    has_arrays = False

    def __init__(self, kernels, variables, saved, pre_activations, zero_rows):
        super().__init__(_Scope(variables))
        self.kernels, self.pre_activations = (
            iter(kernels),
            iter(pre_activations),
        )
        self.results, self.values = iter(saved.results), iter(saved.values)
        self.choices, self.taken = iter(saved.choices), iter(saved.taken)
        self.zero_rows, self.put_rows = iter(zero_rows), []

    def linear(self, inputs, kernels, bias):
        kernel, result = next(self.kernels), next(self.results)

        @ops.custom_gradient
        def again(joined, pre_activation):
            def gradient(upstream):
                return ops.matmul(upstream, kernel), upstream

            return result, gradient

        return again(_joined(inputs), next(self.pre_activations))

    def saved(self, function, gradient, *arguments):
        values = next(self.values)

        @ops.custom_gradient
        def again(*arguments):
            def grad_arguments(upstream):
                return gradient(upstream, values, *arguments)

            return values[0], grad_arguments

        return again(*arguments)

    def chosen(self, function, *arguments):
        return next(self.choices)

    def take(self, memory, slots):
        (_, taken), zeros = next(self.taken), next(self.zero_rows)
        taken = ops.cast(taken, ops.dtype(zeros))
        rows = taken + zeros
        for put_slots, new_rows in memory.puts:
            # This step put rows there before: the last put counts. Their value
            # is the saved one; only the gradient goes to `new_rows`.
            is_same = same_place(slots, put_slots)
            is_first = ops.cumsum(ops.cast(is_same, "int32"), axis=2) == 1
            which = ops.cast(is_same & is_first, ops.dtype(rows))
            new_rows = new_rows - ops.stop_gradient(new_rows)
            rows = ops.where(
                ops.any(is_same, axis=2)[:, :, None],
                taken + ops.matmul(which, new_rows),
                rows,
            )
        return rows

    def put(self, memory, slots, rows):
        self.put_rows.append(rows)
        return memory.after(None, (slots, rows))


class ShapePass(Forward):
    """A run on symbolic arrays, which finds the weights that a step uses.

    Attributes:
        kinds: list, the `StateSpec` of each state.
        specs: what the run returned, as `keras.KerasTensor`s.
        linears: list of (kernels, bias), one for each call of `linear`.
        puts: list of (which state each `put` is of, `take_of` its slots).
        variables: list of the other variables of floats that the step reads.
    """

    may_change = True

    def __init__(self, kinds):
        super().__init__([], [], collect_losses=True)
        self.kinds, self.specs = kinds, None
        self.linears, self.puts = [], []

    def linear(self, inputs, kernels, bias):
        self.linears.append((kernels, bias))
        rows, dtype = ops.shape(inputs[0])[0], inputs[0].dtype
        self.inputs.append(_joined(inputs))
        self.results.append(ops.zeros((rows, kernels[0].shape[-1]), dtype))
        return self.results[-1]

    def take(self, memory, slots):
        self._check_has_gradient(memory)
        return super().take(memory, slots)

    def put(self, memory, slots, rows):
        self._check_has_gradient(memory)
        self.puts.append((memory.index, self.take_of(memory, slots)))
        return super().put(memory, slots, rows)

    def _check_has_gradient(self, memory):
        kind = self.kinds[getattr(memory, "index", 0)]
        if not kind.per_slot or (kind.dtype and not kind.on_host):
            raise ValueError(
                "`take` and `put` need a state with `per_slot=True` and the "
                "compute dtype; `update` changes rows without gradient. "
                f"Received: {kind}"
            )

    def slots_of_puts(self, saved):
        """The slots of each `put`, from `Saved` arrays."""
        others = iter(saved.put_slots)
        return [
            next(others) if take is None else saved.taken[take][0]
            for _, take in self.puts
        ]

    @property
    def variables(self):
        return [v for v in self.scope.read if "float" in v.dtype]

    @property
    def why_not(self):
        """The reason why the step cannot run twice, or an empty text."""
        if self.scope.changed:
            paths = ", ".join(variable.path for variable in self.scope.changed)
            return f"each step changes {paths}"
        if self.scope.losses:
            return "each step adds a loss"
        return ""


def _joined(inputs):
    return inputs[0] if len(inputs) == 1 else ops.concatenate(inputs, axis=-1)
