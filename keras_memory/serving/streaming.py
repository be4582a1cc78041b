"""A model as functions to serve: whole sequences, and one step at a time."""

import contextlib
import functools
import itertools
import keyword
import re
import typing

import keras
import numpy as np
from keras import ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.slots import select
from keras_memory.recurrent import controllers

KERAS_NAME = r"(input_layer|keras_tensor)(_\d+)?"  # names that Keras generates
PROBE_STEPS = 5  # of the random inputs by which models are compared
TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-1}  # else 1e-5, as for float32

REMEDY = (
    "Call `serving_default` with whole sequences, or use layers that go "
    "forward in time or act on each time step alone."
)


def titled(layer):
    """Class and name of a layer, for errors."""
    return f"{type(layer).__name__} {layer.name!r}"


# Names in signatures.


def _names(kind, structure):
    """Names of a model's inputs or outputs; `kind` where they have none."""
    leaves = keras.tree.flatten_with_path(structure)
    names = []
    for index, (path, tensor) in enumerate(leaves):
        name = getattr(tensor, "name", "") if kind == "inputs" else ""
        if any(isinstance(key, str) for key in path):
            name = "_".join(map(str, path))
        if not name or re.fullmatch(KERAS_NAME, name):
            name = f"{kind}_{index}" if len(leaves) > 1 else kind
        names.append(name)
    return _allowed(names)


def _state_names(calls, taken):
    """Names of all states, in order; none is among `taken`."""
    names = [name for call in calls for name in call.names]
    if len(calls) > 1 or set(_allowed(names)) & set(taken):
        layers = _allowed(call.layer.name for call in calls)
        names = [
            f"{layer}_{name}"
            for layer, call in zip(layers, calls)
            for name in call.names
        ]
    return _allowed(names, taken)


def _allowed(names, taken=()):
    """Makes names valid for TensorFlow and Python, and unique."""
    allowed = []
    for name in names:
        name = re.sub(r"\W", "_", name, flags=re.ASCII)
        no_letter = not name[:1].isalpha()
        if no_letter or keyword.iskeyword(name) or name == "self":
            name = f"arg_{name}"
        numbers, candidate = itertools.count(1), name
        while candidate in allowed or candidate in taken:
            candidate = f"{name}_{next(numbers)}"
        allowed.append(candidate)
    return allowed


# The functions behind the signatures.


def take_apart(model, max_steps=None):
    """Makes the functions behind the signatures.

    Args:
        model: a model or layer.
        max_steps: see `export_for_serving`.

    Returns:
        Dict of concrete functions, by signature; dict of probe inputs; dict
        of the model's outputs for them; and the reason why there is no `step`:
        None if there is one, "" if the model has no recurrent layers.
    """
    shapes = _input_shapes(model)
    probe = _probe(model, shapes)
    whole, calls = _run(model, probe.values())
    outputs = whole[-1][1]
    names = _state_names(calls, [*shapes, *outputs])
    obstacle, time_axes = _try_streaming(model, probe, whole, calls, names)
    functions, free = {}, shapes
    if obstacle is None:
        ((name, (shape, dtype)),) = shapes.items()
        functions = _streaming(
            model, shapes, calls, names, time_axes, max_steps
        )
        free = {name: ((None, None, *shape[2:]), dtype)}
    functions["serving_default"] = _serving_default(
        model, [free, shapes], probe, outputs
    )
    return functions, probe, outputs, obstacle


def _serving_default(model, choices, probe, expected):
    """Traces the model with the first of `choices` of shapes that works."""

    def serving_default(**inputs):
        outputs, _ = _run(model, [inputs[name] for name in probe])
        return outputs[-1][1]

    *preferred, last = choices
    for shapes in preferred:
        if shapes == last:
            break
        try:
            function = _trace(serving_default, shapes)
            if not largest_difference(served(function, probe), expected, model):
                return function
        except Exception:  # a layer may need a fixed number of time steps
            continue
    return _trace(serving_default, last)


def _streaming(model, shapes, calls, names, time_axes, max_steps):
    """Makes the functions `step` and `initial_state`."""
    ((inputs, (shape, dtype)),) = shapes.items()
    one_step = {inputs: ((None, *shape[2:]), dtype)}
    states = {
        name: ((None, *state.shape[1:]), state.dtype)
        for name, state in zip(names, _initial_states(calls, 1, max_steps))
    }

    def step(**given):
        sequence = given[inputs][:, None]
        before = [given[name] for name in names]
        outputs, after = _run(model, [sequence], before, unroll=True)
        outputs = {
            name: output[:, 0] if name in time_axes else output
            for name, output in outputs[-1][1].items()
        }
        return {**outputs, **dict(zip(names, _all_states(after)))}

    def initial_state(**given):
        batch = ops.shape(given[inputs])[0]
        return dict(zip(names, _initial_states(calls, batch, max_steps)))

    return {
        "step": _trace(step, {**one_step, **states}),
        "initial_state": _trace(initial_state, one_step),
    }


def _trace(function, shapes):
    """A concrete function of inputs with these (shape, dtype), by name."""
    import tensorflow as tf

    specs = {name: tf.TensorSpec(*spec, name) for name, spec in shapes.items()}
    function = tf.function(function, autograph=False)
    return function.get_concrete_function(**specs)


def _has_graph(model):
    """True for Functional and Sequential models."""
    return getattr(model, "inputs", None) is not None


def _input_shapes(model):
    """Dict of the inputs' (shape, dtype), with a free batch size."""
    if _has_graph(model):
        specs = [(i.shape, i.dtype) for i in model.inputs]
        is_plain = isinstance(model, keras.Sequential)
        structure = model.inputs[0] if is_plain else model.input
    else:
        shape = (model.get_build_config() or {}).get("input_shape")
        if not isinstance(shape, (tuple, list)) or not all(
            size is None or isinstance(size, int) for size in shape
        ):
            raise ValueError(
                "`model` must have one input of known shape. Put it into a "
                "Functional model: `keras.Model(inputs, model(inputs))`. "
                f"Received: {titled(model)}, built for the shape {shape}"
            )
        specs = [(shape, at_least_float32(model.compute_dtype))]
        structure = None
    return {
        name: ((None, *shape[1:]), dtype)
        for name, (shape, dtype) in zip(_names("inputs", structure), specs)
    }


def _probe(model, shapes):
    """Random inputs. If a layer masks, some time steps are masked."""
    rng = np.random.default_rng(0)
    batch = 2
    if _has_graph(model):
        batch = model.inputs[0].shape[0] or batch
    masked = [
        layer.mask_value
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Masking)
    ] or [0]  # the value that `Embedding(mask_zero=True)` masks
    probe = {}
    for name, (shape, dtype) in shapes.items():
        shape = filled(shape, batch, PROBE_STEPS)
        values = rng.normal(size=shape)
        if "float" not in dtype:
            values = rng.integers(2, size=shape)  # valid in every vocabulary
        if values.ndim > 1:
            values[0, -1] = values[-1, shape[1] // 2] = masked[0]
            if shape[1] > 3:
                values[-1, 0] = masked[0]  # no earlier output to repeat
        probe[name] = values.astype(dtype)
    return probe


def filled(shape, batch, time):
    """Replaces the unknown sizes of a shape."""
    return [batch] + [size or time for size in shape[1:]]


def _named(values):
    """Dict of a layer's outputs, by name."""
    return dict(zip(_names("outputs", values), keras.tree.flatten(values)))


def _all_states(calls):
    """The final states of all calls, in order."""
    return [state for call in calls for state in call.states]


def _initial_states(calls, batch, steps=None):
    """Initial states of the recurrent layers, in the final states' dtypes, for
    a stream of at most so many steps."""
    initial = []
    for layer, _, after in calls:
        if getattr(layer.cell, "starts_empty", False):
            states = layer.cell.get_initial_state(batch, steps)
        else:
            states = keras.tree.flatten(layer.get_initial_state(batch))
        for held in after[len(states) :]:
            states.append(ops.zeros((batch, *held.shape[1:])))
        initial += [
            ops.cast(state, final.dtype) for state, final in zip(states, after)
        ]
    return initial


# Calling a model with explicit states.


class _Call(typing.NamedTuple):
    """A call of a recurrent layer.

    Args:
        layer: the layer.
        names: names of its states.
        states: list of its final states. If the call had a mask, the output
            that masked steps repeat comes last.
    """

    layer: keras.layers.RNN
    names: list
    states: list


def _run(model, inputs, states=None, unroll=False):
    """Calls a model in inference mode, with explicit states.

    Args:
        model: a model or layer.
        inputs: its inputs, as a flat iterable; of one time step if there are
            `states`.
        states: iterable of all initial states, in order of call; None for the
            layers' own.
        unroll: bool, whether to unroll the loop over time.

    Returns:
        List of (layer, dict of outputs), in order of call, the model itself
        last; and list of `_Call`, in order of call.
    """
    given = None if states is None else iter(states)
    outputs, calls = [], []

    def noting(layer, call):
        @functools.wraps(call)
        def noted(*args, **kwargs):
            values = call(*args, **kwargs)
            outputs.append((layer, _named(values)))
            return values

        return noted

    def opened(layer, inner_loop):
        def loop(sequences, initial_state, mask, training=False, *arguments):
            if given is not None:
                initial_state = keras.tree.map_structure(
                    lambda _: next(given), initial_state
                )
                if getattr(layer.cell, "starts_empty", False):
                    sequences = _with_room(layer, initial_state, sequences)
            last, whole, after = inner_loop(
                sequences, initial_state, mask, training, *arguments
            )
            call = _Call(
                layer,
                controllers.state_names(layer.cell),
                keras.tree.flatten(after),
            )
            if mask is not None and not layer.zero_output_for_mask:
                if given is not None:
                    valid = ops.cast(mask[:, 0], "bool")
                    last = select(valid, last, next(given))
                    whole = last[:, None]
                call.names.append("held_output")
                call.states.append(last)
            calls.append(call)
            return last, whole, after

        return loop

    with contextlib.ExitStack() as changes:

        def change(layer, **attributes):
            changes.enter_context(changed_attributes(layer, **attributes))

        # Layers inside `TimeDistributed` do not loop over the model's time.
        within = {
            id(layer)
            for wrapper in model._flatten_layers()
            if isinstance(wrapper, keras.layers.TimeDistributed)
            for layer in wrapper._flatten_layers(include_self=False)
        }
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.TimeDistributed):
                change(layer, call=_at_once(layer, layer.call))
            if isinstance(layer, keras.layers.RNN):
                change(layer, stateful=False, use_cudnn=False)
                if id(layer) not in within:
                    loop = opened(layer, layer.inner_loop)
                    change(layer, inner_loop=loop, unroll=unroll)
            elif getattr(layer, "stateful", False):  # such as a map
                change(layer, stateful=False)
            if isinstance(layer, DropoutRNNCell):
                # It draws masks even in inference, where none are used.
                change(
                    layer,
                    get_dropout_mask=lambda *_: None,
                    get_recurrent_dropout_mask=lambda *_: None,
                )
        for layer in getattr(model, "layers", []):
            change(layer, call=noting(layer, layer.call))
        values = _call(model, inputs)
    return [*outputs, (model, _named(values))], calls


def _at_once(layer, call):
    """`TimeDistributed.call` that works for an unknown number of time steps.

    In a graph Keras 3.15 takes the batch size for the unknown number.
    """

    @functools.wraps(call)
    def at_once(inputs, training=None, mask=None):
        if inputs.shape[1] is not None:
            return call(inputs, training=training, mask=mask)

        def flat(values):
            return ops.reshape(values, (-1, *ops.shape(values)[2:]))

        arguments = {}
        if layer.layer._call_has_mask_arg and mask is not None:
            arguments["mask"] = flat(mask)
        if layer.layer._call_has_training_arg:
            arguments["training"] = training
        values = layer.layer.call(flat(inputs), **arguments)
        rows = ops.shape(inputs)[:2]
        return ops.reshape(values, (*rows, *ops.shape(values)[1:]))

    return at_once


def _with_room(layer, states, sequences):
    """Returns `sequences`, with an error where a memory has no slot left."""
    has_room = layer.cell.has_room(states)
    if has_room is None:
        return sequences
    import tensorflow as tf

    error = (
        f"{titled(layer)} was exported with `max_steps`, and a stream has more "
        "steps: begin a new one, or export the model for longer streams."
    )
    with tf.control_dependencies([tf.debugging.Assert(has_room, [error])]):
        return tf.identity(sequences)


def _call(model, inputs):
    inputs = [ops.convert_to_tensor(value) for value in inputs]
    if not _has_graph(model):
        return model(inputs[0], training=False)
    if isinstance(model, keras.Sequential):
        (inputs,) = inputs
    else:
        inputs = keras.tree.pack_sequence_as(model.input, inputs)
    # `__call__` would reject other numbers of time steps than the `Input`'s.
    return model.call(inputs, training=False)


@contextlib.contextmanager
def changed_attributes(layer, **attributes):
    """Changes attributes of a layer temporarily, untracked by Keras."""
    own = vars(layer)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


# Streaming, compared with the whole sequence.


def _try_streaming(model, probe, whole, calls, names):
    """Runs the probe step by step and compares with the whole sequence.

    Args:
        model: a model or layer.
        probe: dict of its inputs.
        whole, calls: what `_run` returns for the probe.
        names: names of the states.

    Returns:
        The reason why the model cannot be streamed and the remedy, or None;
        and the names of the outputs with a time axis.
    """
    if not calls:
        return "", ()  # nothing to stream, so no warning
    if len(probe) > 1:
        return (
            f"`step` takes one input, and the model has {list(probe)}. Give "
            "the model one input (B, T, D) and split it inside.",
            (),
        )
    (inputs,) = probe.values()
    if inputs.shape[1] == 1:
        return "its input has one time step: use `keras.Input((None, ...))`", ()
    states = _initial_states(calls, *inputs.shape[:2])
    steps = []
    try:
        for time in range(inputs.shape[1]):
            step = inputs[:, time : time + 1]
            outputs, calls = _run(model, [step], states)
            states = _all_states(calls)
            steps.append([of_layer for _, of_layer in outputs])
    except Exception as error:  # a layer may reject a single time step
        return f"it fails on a single time step: {error} {REMEDY}", ()
    apart = []
    for (layer, expected), *parts in zip(whole, *steps):
        if difference := largest_difference(
            joined_steps(parts, expected), expected, model
        ):
            apart.append((layer, difference))
    if apart and apart[-1][0] is model:
        layer, difference = apart[0]
        return (
            f"step by step, {titled(layer)} gives other outputs than for the "
            f"whole sequence ({difference}), so it depends on other time "
            "steps, like a layer that goes backwards, attends, convolves or "
            f"pools. {REMEDY}",
            (),
        )
    of_step, of_whole = steps[0][-1], whole[-1][1]
    return None, [
        name for name in of_whole if of_whole[name].shape != of_step[name].shape
    ]


def joined_steps(steps, whole):
    """Joins dicts of single steps to the shapes of the whole sequence."""
    joined = {}
    for name, expected in whole.items():
        values = [np.asarray(step[name]) for step in steps]
        if values[0].shape == expected.shape:
            joined[name] = values[-1]
        elif values[0].ndim < len(expected.shape):
            joined[name] = np.stack(values, axis=1)
        else:
            joined[name] = np.concatenate(values, axis=1)
    return joined


def _tolerance(model):
    dtypes = [layer.compute_dtype for layer in model._flatten_layers()]
    return max(TOLERANCE.get(dtype, 1e-5) for dtype in dtypes)


def served(signature, inputs):
    """Outputs of a signature, called as a server calls it."""
    import tensorflow as tf

    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in signature(**inputs).items()}


def largest_difference(actual, expected, model):
    """Describes how two dicts of arrays differ; "" if they do not."""
    tolerance, apart = _tolerance(model), ""
    for name in expected:
        value, whole = (
            np.asarray(values[name]).astype("float64")
            for values in (actual, expected)
        )
        if value.shape != whole.shape:
            return f"`{name}` of shape {value.shape}, not {whole.shape}"
        scale = np.maximum(1.0, np.abs(whole).max(initial=0))
        difference = np.abs(value - whole).max(initial=0) / scale
        if not difference <= tolerance:  # or NaN
            apart = f"`{name}` by {difference:.1e}, above {tolerance:.0e}"
    return apart
