"""The time loop of a recurrent memory: two ways, the same numbers.

The portable way is Keras's own RNN loop, on any backend, differentiated by
the backend. The fast way has a gradient of its own: forward, it keeps the
states in front of each step and what `replay.py` is told to; backward, it
runs each step once more without its products with weights, and takes the
gradients of the weights after the loop, in one matrix product each.
"""

import keras
from keras import ops
from keras.src import backend

from keras_memory import replay

LOOPS = ("auto", "fast", "portable")


def run(
    cell,
    sequences,
    records,
    mask=None,
    training=False,
    go_backwards=False,
    unroll=False,
    all_outputs=True,
    use_memory=True,
    loop="auto",
):
    """Steps a memory cell through time.

    Args:
        cell: a `MemoryCell`.
        sequences: (B, T, D).
        records: the cell's state records at the beginning.
        mask: (B, T) bool or None; False holds a row at that step.
        training: bool.
        go_backwards: bool, from the last step to the first.
        unroll: bool, as in `keras.layers.RNN`.
        all_outputs: bool, features of every step, or of the last only.
        use_memory: bool, as in the cell's call.
        loop: one of `LOOPS`; `"auto"` is the fast one in training, where the
            cell fits.

    Returns:
        Features (B, T, F), in the order in which the steps were taken, or
        (B, F) of the last step; the state records at the end; and which loop
        it was: "fast", or "portable: " and why.

    Raises:
        ValueError: loop="fast" where that is not possible.
    """
    inputs = [ops.cast(sequences, cell.compute_dtype)]
    states = keras.tree.flatten(records)
    holds = mask is not None or not all_outputs
    if holds:
        rows = ops.shape(sequences)[0]
        held = ops.zeros((rows, cell.features_size), dtype=cell.compute_dtype)
        states = [held, *states]
    if mask is not None:
        inputs.append(mask)

    # Both are gone when the fast loop runs a step again.
    dropout_masks = cell.dropout_masks()
    autocast = getattr(backend.get_autocast_scope(), "dtype", None)

    def step(inputs, states):
        before = list(states[1:] if holds else states)
        before = keras.tree.pack_sequence_as(records, before)
        with cell.dropping(dropout_masks), backend.AutocastScope(autocast):
            features, after, _ = cell.step(
                inputs[0], before, training, use_memory
            )
        after = keras.tree.flatten(after)
        if holds:
            after = [features, *after]
        if mask is not None:
            after = [
                hold(inputs[1], old, new) for old, new in zip(states, after)
            ]
            features = after[0]
        return features, after

    why = _why_portable(loop, training, unroll)
    if not why:
        survey, specs = _survey(step, inputs, states)
        why = survey.why_not
    if loop == "fast" and why:
        raise ValueError(
            f'loop="fast" is not possible for {cell.name!r} here: {why}'
        )
    if why:
        features, states = _portable(
            step, inputs, states, go_backwards, all_outputs, unroll
        )
    else:
        features, states = _fast(
            step, inputs, states, go_backwards, all_outputs, survey, specs
        )
    if not all_outputs:
        features = states[0]
    states = states[1:] if holds else states
    records = keras.tree.pack_sequence_as(records, list(states))
    return features, records, f"portable: {why}" if why else "fast"


def hold(keep, old, new):
    """Takes `new` in the rows where `keep` (B,) is True, else `old`."""
    keep = ops.reshape(keep, (-1,) + (1,) * (len(new.shape) - 1))
    return ops.where(keep, new, old)


def _why_portable(loop, training, unroll):
    if loop == "portable":
        return 'loop="portable"'
    if backend.backend() not in ("tensorflow", "jax"):
        return f"the fast loop does not run on {backend.backend()}"
    if unroll:
        return "unroll=True"
    if loop == "auto" and not training:
        return "training=False needs no gradients"
    return ""


def _portable(step, inputs, states, go_backwards, all_outputs, unroll):
    """Keras's loop. The mask travels as one more input into each step:
    Keras's own masking takes the first state for the previous output on
    JAX."""
    masked = len(inputs) > 1
    if masked:
        mask = ops.cast(inputs[1], inputs[0].dtype)[:, :, None]
        inputs = [ops.concatenate([inputs[0], mask], axis=-1)]

    def step_of_one(inputs, states):
        if masked:
            return step([inputs[:, :-1], inputs[:, -1] > 0], states)
        return step([inputs], states)

    _, features, states = backend.rnn(
        step_of_one,
        inputs[0],
        states,
        go_backwards=go_backwards,
        unroll=unroll,
        input_length=inputs[0].shape[1],
        return_all_outputs=all_outputs,
    )
    return features, states


def _survey(step, inputs, states):
    """A `replay.Survey` of a step, and `keras.KerasTensor`s like the results
    of `_forward`."""
    found = []

    def run(inputs, states):
        found[:] = [replay.Survey()]  # Keras may run this twice
        return _forward(step, found[0], inputs, states)

    specs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, ops.dtype(x)),
        ([x[:, 0] for x in inputs], states),
    )
    specs = backend.compute_output_spec(run, *specs)
    return found[0], specs


def _forward(step, run, inputs, states):
    """A step, with what its gradient needs."""
    with run:
        features, after = step(inputs, states)
    return after, features, (states, run.inputs, run.results, run.values)


def _fast(step, inputs, states, go_backwards, all_outputs, survey, specs):
    """The loop with a gradient of its own. Features are a list of one array
    within it, or of none where only the last ones are wanted."""
    inputs = [ops.swapaxes(x, 0, 1) for x in inputs]  # time first
    if go_backwards:
        inputs = [ops.flip(x, axis=0) for x in inputs]
    x, *masks = inputs
    _, features_spec, kept_spec = specs
    variables = [v for v in survey.variables if "float" in v.dtype]

    def forward(x, states, linears, values):
        def once(states, inputs):
            run = replay.Forward(linears, zip(variables, values))
            after, features, kept = _forward(step, run, inputs, states)
            return after, ([features] * all_outputs, kept)

        specs = [features_spec] * all_outputs, kept_spec
        after, (features, kept) = _scan(once, states, [x, *masks], specs)

        def gradient(*upstream):
            upstream = keras.tree.flatten(upstream)  # JAX gives one tuple
            return _first_only(backward)(upstream, x, linears, values, kept)

        return (*features, *after), gradient

    def backward(upstream, x, linears, values, kept):
        of_features, of_after = upstream[:all_outputs], upstream[all_outputs:]
        # Here, as in the loop XLA would take the products with swapped axes.
        swapped = [ops.transpose(kernel) for kernel, *_ in linears]

        def once(carried, slices):
            of_after, of_values = carried
            of_features, inputs, (before, _, results, kept) = slices

            def again(x, before, taps, values):
                run = replay.Replay(
                    swapped, zip(variables, values), results, kept, taps
                )
                with run:
                    features, after = step([x, *inputs[1:]], before)
                return [features] * all_outputs, after

            taps = [ops.zeros_like(result) for result in results]
            of_x, of_before, of_results, more = _vjp(
                again,
                (inputs[0], before, taps, values),
                (of_features, of_after),
            )
            of_values = [a + b for a, b in zip(of_values, more)]
            return (of_before, of_values), (of_x, of_results)

        (of_states, of_values), (of_x, of_results) = _scan(
            once,
            (list(of_after), [ops.zeros_like(value) for value in values]),
            (list(of_features), [x, *masks], kept),
            (x[0], kept_spec[2]),
            reverse=True,
        )
        of_linears = [
            _of_weights(inputs, of_result)[: len(weights)]
            for inputs, of_result, weights in zip(kept[1], of_results, linears)
        ]
        return of_x, of_states, of_linears, of_values

    with backend.AutocastScope(None):
        weights = (
            [
                _joined(*weights, result.dtype)
                for weights, result in zip(survey.linears, kept_spec[2])
            ],
            [ops.copy(variable) for variable in variables],
        )
    features_and_states = ops.custom_gradient(forward)(x, states, *weights)
    features = features_and_states[:all_outputs]
    features = ops.swapaxes(features[0], 0, 1) if all_outputs else None
    return features, list(features_and_states[all_outputs:])


def _joined(kernels, bias, dtype):
    """The kernels of a `replay.linear`, one below the other, and its bias."""
    joined = ops.concatenate([ops.cast(kernel, dtype) for kernel in kernels])
    if bias is None:
        return (joined,)
    return joined, ops.cast(ops.copy(bias), dtype)


def _of_weights(inputs, of_results):
    """Gradients of kernel and bias, of all steps (T, B, ...) at once."""
    inputs = ops.reshape(inputs, (-1, inputs.shape[-1]))
    of_results = ops.reshape(of_results, (-1, of_results.shape[-1]))
    return (
        ops.matmul(ops.transpose(inputs), of_results),
        ops.sum(of_results, axis=0),
    )


def _first_only(function):
    """`function`, with a clear error where it is to be differentiated."""

    @ops.custom_gradient
    def call(*arguments):
        def gradient(*upstream):
            raise NotImplementedError(
                "The fast time loop gives first derivatives only. For second "
                'ones take `loop="portable"` as an argument of the layer.'
            )

        return function(*arguments), gradient

    return call


def _scan(step, carried, slices, specs, reverse=False):
    """Loops over the first axis, as `jax.lax.scan` does.

    Args:
        step: (carried, slices of one step) -> (carried, results).
        carried: nested arrays.
        slices: nested arrays (T, ...).
        specs: nested, with shapes and dtypes like the results of `step`.
        reverse: bool, from the last to the first; results stay in place.

    Returns:
        What is carried after the last step, and the results (T, ...).
    """
    if backend.backend() == "jax":
        import jax

        return jax.lax.scan(step, carried, slices, reverse=reverse)
    import tensorflow as tf

    first = keras.tree.flatten(slices)[0]
    length = first.shape[0] or tf.shape(first)[0]
    stacks = keras.tree.map_structure(
        lambda spec: tf.TensorArray(
            spec.dtype, size=length, element_shape=spec.shape
        ),
        specs,
    )

    def body(t, carried, stacks):
        at = length - 1 - t if reverse else t
        now = keras.tree.map_structure(lambda x: x[at], slices)
        carried, results = step(carried, now)
        stacks = keras.tree.map_structure(
            lambda stack, result: stack.write(at, result), stacks, results
        )
        return t + 1, carried, stacks

    _, carried, stacks = tf.while_loop(
        lambda t, *_: t < length,
        body,
        (0, carried, stacks),
        maximum_iterations=length,
    )
    return carried, keras.tree.map_structure(lambda s: s.stack(), stacks)


def _vjp(function, arguments, upstream):
    """Gradients of a function's arguments from those of its results; all
    nested."""
    if backend.backend() == "jax":
        import jax

        _, pull = jax.vjp(function, *arguments)
        return pull(upstream)
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(arguments)
        results = function(*arguments)
    return tape.gradient(
        results,
        arguments,
        output_gradients=upstream,
        unconnected_gradients="zero",
    )
