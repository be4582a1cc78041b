"""SavedModels for TensorFlow Serving, with explicit state for streaming.

A recurrent layer hides its states inside of a call. `_run` calls a model as it
is, but has its recurrent layers start from states that come from outside and
hand out those they reach. A masked step holds a layer's output, which is then
one state more. Whether this streams a model faithfully, which it does not
where a layer looks at other time steps, is found by trying.
"""

import contextlib
import functools
import itertools
import keyword
import os
import re
import shutil
import typing
import uuid
import warnings

import keras
import numpy as np
from keras import ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory import files
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.checks import check_bool
from keras_memory.checks import check_size
from keras_memory.checks import check_whole
from keras_memory.recurrent import controllers
from keras_memory.recurrent.state import select
from keras_memory.retrieval.scann_index import ScannIndex

MOST_WARM_UP_RECORDS = 1000  # TensorFlow Serving refuses a model with more
TEMPORARY = r"\.\d+\.[0-9a-f]{8}"  # folders that exports write to
KERAS_NAME = r"(input_layer|keras_tensor)(_\d+)?"  # of an input without one
TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-1}  # else 1e-5, as for float32

REMEDY = (
    "Call `serving_default` with whole sequences, or take layers that go "
    "forward in time or act on each time step alone."
)

MODELS_CONFIG = """\
model_config_list {{
  config {{
    name: "{name}"
    base_path: "/models/{name}"
    model_platform: "tensorflow"
  }}
}}
"""


def export_for_serving(
    model,
    folder,
    version=1,
    name=None,
    warm_up=((1, 1), (8, 32)),
    exact_search=False,
):
    """Writes a SavedModel that TensorFlow Serving runs without this library.

    Signatures, for any batch size B and number of time steps T:

    - `serving_default`: `inputs` (B, T, D) to `outputs`, the whole sequence.
    - `step`: `inputs` (B, D), one time step, and the states to `outputs` and
      the new states under the same names.
    - `initial_state`: `inputs` (B, D), of which only B counts, to the states
      in front of the first step.

    Names of inputs and outputs: an input has its own name, `keras.Input(...,
    name="sensor")`, or its key where the model takes a dict; an output has its
    key where the model gives a dict. The others are `inputs` and `outputs`, or
    `inputs_0`, `outputs_0`, `outputs_1`, ... by their places among several;
    names that Keras makes up, `input_layer_3`, count as none. TensorFlow takes
    letters, digits and "_": all else becomes "_", and what does not begin with
    a letter or is a word of Python's gets `arg_` in front ("my-input" is
    served as `my_input`, "1st" as `arg_1st`). Of two that are the same the
    second ends in `_1`.

    Names of states: the fields of the layer's state record, so for an
    `NTMLayer` `reads`, `memory`, `read_weighting`, `write_weighting`,
    `controller_h` and `controller_c`; `h` and `c` for an LSTM, `h` for a GRU,
    `state_0`, `state_1`, ... for a cell of your own without a list
    `state_names`. A stack of cells has its numbers behind, `h_0`, and several
    blocks have theirs in front, `block0_controller_h`. The layer's name is in
    front, `lstm_h`, where a model has several recurrent layers or an input or
    output has the name: give layers names, as Keras's own count up. Each state
    is (B, size) in its layer's compute dtype.

    Masks: a step that `Masking` or `Embedding(mask_zero=True)` masks holds the
    states and the output, in `step` as in a sequence; so a client whose batch
    has rows without news sends the mask value for these. The output that is
    held is one state more, `held_output`, in front of it the layer's name if
    there are several; `zero_output_for_mask=True` does without.

    `step` and `initial_state` are written if stepping a random probe gives
    what the whole sequence gives, and left out with a warning if not; a model
    without recurrent layers, such as a Memory Wrap, has neither of them. What
    goes into them: recurrent layers of this library and of Keras, and layers
    that act on each time step alone. What does not: `Bidirectional`,
    `go_backwards`, attention, convolution and pooling over time. Where they
    are left out, or a layer needs it, a number of time steps that the model
    fixes stays fixed. A stateful layer is served as a stateless one: a server
    has no memory of its clients.

    The version folder appears complete or not at all: everything is written
    into a hidden folder beside it, loaded from there and compared with the
    model, and renamed at the end. `<folder>/models.config` is written anew by
    each export, so keep labels and version policies in another file. Serve
    `<folder>` as `/models/<name>`, or edit the `base_path`:

        docker run -p 8500:8500 -p 8501:8501 -v $PWD/<folder>:/models/<name>
            tensorflow/serving --model_config_file=/models/<name>/models.config

    Example (in Python; over gRPC or REST the names are the same):

        served = tf.saved_model.load("served/copy/1").signatures
        states = served["initial_state"](inputs=x[:, 0])
        for t in range(x.shape[1]):
            states = served["step"](inputs=x[:, t], **states)
            outputs = states.pop("outputs")

    Args:
        model: a built Keras model, or a built recurrent layer.
        folder: path of the model's folder; made if absent.
        version: int, at least 1, below 2^63; name of the version's folder.
        name: str of letters, digits, "_", "." and "-", the model's name on
            the server. Default: the name of `folder`.
        warm_up: pairs (batch size, time steps). Requests of these sizes, to
            every signature, are stored with the model, and the server runs
            them before it takes others. Needs tensorflow-serving-api; without
            it none are stored, with a warning.
        exact_search: bool. False (default): a `ScannIndex` is served by ScaNN,
            whose ops the server must have, with a warning. True: it compares
            with all entries, by ops that every server has.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        RuntimeError: another backend than TensorFlow, or what was written
            differs from the model.
        TypeError: `model` is not a Keras model or layer.
        ValueError: the model is not built, an argument is out of range, or
            the version exists.
        OSError: the folder cannot be written.
    """
    _check_model(model)
    folder = files.check_path("folder", folder)
    # TensorFlow Serving takes no other versions.
    target = folder / str(check_whole("version", version, 1, 2**63 - 1))
    name = folder.resolve().name if name is None else name
    _check_name(name)
    warm_up = _as_pairs(warm_up)
    check_bool("exact_search", exact_search)
    with contextlib.ExitStack() as changes:
        for layer in _by_scann(model):
            if exact_search:
                changes.enter_context(_changed(layer, _index=None))
            else:
                warnings.warn(
                    f"{_titled(layer)} is exported with ScaNN's ops, which a "
                    "server must load, `_scann_ops.so` of the package scann; "
                    "the stock image of TensorFlow Serving has none. With "
                    "`exact_search=True` it compares with all entries, by "
                    "ops that every server has.",
                    stacklevel=2,
                )
        temporary = changes.enter_context(_appearing(target))
        functions, probe, expected, obstacle = _take_apart(model)
        if obstacle:
            warnings.warn(
                f"{_titled(model)} is exported without the signatures `step` "
                f"and `initial_state`: {obstacle}",
                stacklevel=2,
            )
        signatures = _save(functions, temporary)
        _check_signatures(signatures, probe, expected, model)
        try:
            _write_warm_up(signatures, name, warm_up, temporary)
        except ImportError as error:
            warnings.warn(
                "The warm-up requests of `export_for_serving` are messages of "
                "tensorflow-serving-api, so this model has none: `pip install "
                f"tensorflow-serving-api~=2.20.0`. Received: {error}",
                stacklevel=2,
            )
        config = temporary / "models.config"
        config.write_text(MODELS_CONFIG.format(name=name))
        files.fsync(config)
        config.replace(folder / config.name)
    return target


# Arguments.


def _check_model(model):
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`export_for_serving` needs Keras on TensorFlow, which writes the "
            "SavedModel: save the model as a .keras file and load it in a "
            "process with the environment variable KERAS_BACKEND=tensorflow. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer, whose weights and "
            f"calculation are to be served. Received: model={model!r}"
        )
    if not model.built:
        raise ValueError(
            "`model` must be built, or it has no weights to export: call it "
            f"on data or call `build(input_shape)`. Received: {_titled(model)}"
        )


def _check_name(name):
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name, re.A):
        raise ValueError(
            '`name` must be letters, digits, "_", "." and "-", as it is a '
            "part of the server's URLs; it is the name of the folder unless "
            f"given. Received: name={name!r}"
        )


def _as_pairs(warm_up):
    try:
        warm_up = [(batch, time) for batch, time in warm_up]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`warm_up` must be pairs (batch size, time steps), such as "
            f"[(1, 1), (8, 32)], or () for none. Received: warm_up={warm_up!r}"
        ) from error
    for batch, time in warm_up:
        check_size("warm_up batch size", batch)
        check_size("warm_up time steps", time)
    if 3 * len(warm_up) > MOST_WARM_UP_RECORDS:
        raise ValueError(
            f"`warm_up` must have at most {MOST_WARM_UP_RECORDS // 3} pairs: "
            "each makes a record for each of three signatures, and TensorFlow "
            f"Serving refuses a model with more than {MOST_WARM_UP_RECORDS}. "
            f"Received: {len(warm_up)} pairs"
        )
    return warm_up


def _by_scann(model):
    """The layers whose SavedModel needs ScaNN's ops."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, ScannIndex) and layer.is_by_scann
    ]


def _titled(layer):
    return f"{type(layer).__name__} {layer.name!r}"


# Names in signatures.


def _names(kind, structure):
    """Names of a model's inputs or outputs; `kind` where they have none."""
    found = keras.tree.flatten_with_path(structure)
    names = []
    for index, (path, tensor) in enumerate(found):
        name = getattr(tensor, "name", "") if kind == "inputs" else ""
        if any(isinstance(key, str) for key in path):
            name = "_".join(map(str, path))
        if not name or re.fullmatch(KERAS_NAME, name):
            name = f"{kind}_{index}" if len(found) > 1 else kind
        names.append(name)
    return _allowed(names)


def _state_names(calls, others):
    """Names of all states, in order; none is among `others`."""
    names = [name for call in calls for name in call.names]
    if len(calls) > 1 or set(_allowed(names)) & set(others):
        layers = _allowed(call.layer.name for call in calls)
        names = [
            f"{layer}_{name}"
            for layer, call in zip(layers, calls)
            for name in call.names
        ]
    return _allowed(names, others)


def _allowed(names, others=()):
    """Names as TensorFlow and Python take them, and all different."""
    allowed = []
    for name in names:
        name = re.sub(r"\W", "_", name, flags=re.ASCII)
        no_letter = not name[:1].isalpha()
        if no_letter or keyword.iskeyword(name) or name == "self":
            name = f"arg_{name}"
        numbers, one = itertools.count(1), name
        while one in allowed or one in others:
            one = f"{name}_{next(numbers)}"
        allowed.append(one)
    return allowed


# The functions behind the signatures.


def _take_apart(model):
    """Makes what is to be served.

    Returns:
        Dict of concrete functions, by signature; dict of probe inputs; dict
        of the model's outputs for them; and why there is no `step`, None if
        there is one, or "" where there is nothing to step.
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
        functions = _streaming(model, shapes, calls, names, time_axes)
        free = {name: ((None, None, *shape[2:]), dtype)}
    functions["serving_default"] = _serving_default(
        model, [free, shapes], probe, outputs
    )
    return functions, probe, outputs, obstacle


def _serving_default(model, choices, probe, expected):
    """Of several shapes of the inputs takes the first that works."""

    def serving_default(**inputs):
        outputs, _ = _run(model, [inputs[name] for name in probe])
        return outputs[-1][1]

    *others, last = choices
    for shapes in others:
        if shapes == last:
            break
        try:
            function = _trace(serving_default, shapes)
            if not _apart(_served(function, probe), expected, model):
                return function
        except Exception:  # any layer may need to know its time steps
            continue
    return _trace(serving_default, last)


def _streaming(model, shapes, calls, names, time_axes):
    """Makes `step` and `initial_state`; arguments as those around it."""
    ((inputs, (shape, dtype)),) = shapes.items()
    one_step = {inputs: ((None, *shape[2:]), dtype)}
    states = {
        name: ((None, *state.shape[1:]), state.dtype)
        for name, state in zip(names, _all_states(calls))
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
        return dict(zip(names, _initial_states(calls, batch)))

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
                f"Received: {_titled(model)}, built for the shape {shape}"
            )
        specs = [(shape, at_least_float32(model.compute_dtype))]
        structure = None
    return {
        name: ((None, *shape[1:]), dtype)
        for name, (shape, dtype) in zip(_names("inputs", structure), specs)
    }


def _probe(model, shapes):
    """Random inputs. Where a layer masks, some time steps are masked."""
    rng = np.random.default_rng(0)
    batch = 2
    if _has_graph(model):
        batch = model.inputs[0].shape[0] or batch
    masked = [
        layer.mask_value
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Masking)
    ] or [0]  # what `Embedding(mask_zero=True)` masks
    probe = {}
    for name, (shape, dtype) in shapes.items():
        shape = _filled(shape, batch, 5)
        values = rng.normal(size=shape)
        if "float" not in dtype:
            values = rng.integers(2, size=shape)  # in every vocabulary
        if values.ndim > 1:
            values[0, -1] = values[-1, shape[1] // 2] = masked[0]
            if shape[1] > 3:
                values[-1, 0] = masked[0]  # before there is what to hold
        probe[name] = values.astype(dtype)
    return probe


def _filled(shape, batch, time):
    return [batch] + [size or time for size in shape[1:]]


def _named(values):
    """Dict of a layer's outputs."""
    return dict(zip(_names("outputs", values), keras.tree.flatten(values)))


def _all_states(calls):
    """The final states of all calls, in order."""
    return [state for call in calls for state in call.states]


def _initial_states(calls, batch):
    """What the recurrent layers start from, in the dtypes of their states."""
    initial = []
    for layer, _, after in calls:
        states = keras.tree.flatten(layer.get_initial_state(batch))
        for held in after[len(states) :]:
            states.append(ops.zeros((batch, *held.shape[1:])))
        initial += [
            ops.cast(state, final.dtype) for state, final in zip(states, after)
        ]
    return initial


# The model with its states outside.


class _Call(typing.NamedTuple):
    """A call of a recurrent layer.

    Args:
        layer: the layer.
        names: names of its states.
        states: list of its final states, with the output that masked steps
            hold as the last where the call had a mask.
    """

    layer: keras.layers.RNN
    names: list
    states: list


def _run(model, inputs, states=None, unroll=False):
    """Calls a model in inference mode, with its states outside.

    Args:
        model: a model or layer.
        inputs: its inputs, as a flat iterable; of one time step if there are
            `states`.
        states: iterable of all states to start from, in order of call, or
            None for what the layers start from.
        unroll: bool, without a loop over time.

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
        def loop(sequences, initial_state, mask, training=False):
            if given is not None:
                initial_state = keras.tree.map_structure(
                    lambda _: next(given), initial_state
                )
            last, whole, after = inner_loop(
                sequences, initial_state, mask, training=training
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
            changes.enter_context(_changed(layer, **attributes))

        # What is within a time step is no loop over the model's time.
        within = {
            id(layer)
            for one in model._flatten_layers()
            if isinstance(one, keras.layers.TimeDistributed)
            for layer in one._flatten_layers(include_self=False)
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
                # They draw random numbers even where none are used.
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
    """`TimeDistributed.call`, which in a graph that does not know the number
    of time steps takes as many as there are rows: Keras 3.15 mistakes them."""

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


def _call(model, inputs):
    inputs = [ops.convert_to_tensor(value) for value in inputs]
    if not _has_graph(model):
        return model(inputs[0], training=False)
    if isinstance(model, keras.Sequential):
        (inputs,) = inputs
    else:
        inputs = keras.tree.pack_sequence_as(model.input, inputs)
    # `__call__` would insist on the number of time steps of the `Input`.
    return model.call(inputs, training=False)


@contextlib.contextmanager
def _changed(layer, **attributes):
    """Gives a layer other attributes for a while, untracked by Keras."""
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
        Why the model cannot be streamed and what to do, or None; and the
        names of those outputs that have a time axis.
    """
    if not calls:
        return "", ()  # nobody expects steps of it
    if len(probe) > 1:
        return (
            f"`step` takes one input, and it has {list(probe)}. Give the "
            "model one input (B, T, D) and take that apart inside.",
            (),
        )
    (inputs,) = probe.values()
    if inputs.shape[1] == 1:
        return "its input has one time step: `keras.Input((None, ...))`.", ()
    states = _initial_states(calls, len(inputs))
    steps = []
    try:
        for time in range(inputs.shape[1]):
            step = inputs[:, time : time + 1]
            outputs, calls = _run(model, [step], states)
            states = _all_states(calls)
            steps.append([of_layer for _, of_layer in outputs])
    except Exception as error:  # any layer may refuse one step alone
        return f"it fails on a single time step: {error} {REMEDY}", ()
    apart = []
    for (layer, expected), *parts in zip(whole, *steps):
        if difference := _apart(_joined(parts, expected), expected, model):
            apart.append((layer, difference))
    if apart and apart[-1][0] is model:
        layer, difference = apart[0]
        return (
            f"step by step, {_titled(layer)} gives other outputs than for the "
            f"whole sequence ({difference}), so it depends on more "
            "than the time step and the states: on other steps, as a layer "
            f"that goes backwards, attends, convolves or pools. {REMEDY}",
            (),
        )
    of_step, of_whole = steps[0][-1], whole[-1][1]
    return None, [
        name for name in of_whole if of_whole[name].shape != of_step[name].shape
    ]


def _joined(steps, whole):
    """Dicts of single steps, put together as the whole sequence has them."""
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


def _apart(actual, expected, model):
    """Says how two dicts of arrays differ, or "" where they do not."""
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


def _tolerance(model):
    dtypes = [layer.compute_dtype for layer in model._flatten_layers()]
    return max(TOLERANCE.get(dtype, 1e-5) for dtype in dtypes)


# Files.


@contextlib.contextmanager
def _appearing(target):
    """Yields a hidden folder that becomes `target`, whole or not at all."""
    folder = target.parent
    if os.path.lexists(target):
        raise ValueError(
            "`version` must be a new one, as servers keep what they have "
            "loaded under its number: choose another, or remove the old one. "
            f"Received: version={target.name}, and {target} exists"
        )
    # Servers do not look at a name that is no number.
    temporary = folder / f".{target.name}.{uuid.uuid4().hex[:8]}"
    lock = _lock_of(temporary)
    with contextlib.ExitStack() as held:
        held.callback(_remove, lock)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            held.enter_context(files.locked(lock))
            temporary.mkdir()
        except OSError as error:
            raise OSError(
                "`folder` must be a folder that can be written, as each "
                f"version becomes a folder in it. Received: folder={folder} "
                f"({error})"
            ) from error
        kept = f"The versions in {folder} are as they were."
        with files.explain_os_errors(target, kept):
            try:
                yield temporary
                for path in [*temporary.rglob("*"), temporary]:
                    files.fsync(path)
                temporary.rename(target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    files.fsync(folder)


def _remove_abandoned(folder):
    """Removes what killed exports have left. Others that write at this moment
    hold a lock, which dies with them."""
    if not files.has_locks():  # nobody can tell
        return
    for path in folder.iterdir():
        if re.fullmatch(TEMPORARY, path.name):
            lock = _lock_of(path)
            with contextlib.suppress(ValueError, OSError), files.locked(lock):
                shutil.rmtree(path, ignore_errors=True)
                _remove(lock)


def _lock_of(temporary):
    """Of a temporary folder. It stands beside it, and is there first."""
    return temporary.with_name(f"{temporary.name}.lock")


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink()


def _save(functions, folder):
    """Writes a SavedModel; returns its signatures, loaded from there."""
    import tensorflow as tf

    module = tf.Module()
    module.all_variables = [f.graph.variables for f in functions.values()]
    with files.explain_os_errors(folder, also=(tf.errors.OpError,)):
        tf.saved_model.save(module, str(folder), signatures=functions)
    _allow_without_xla(folder)
    return tf.saved_model.load(str(folder)).signatures


def _allow_without_xla(folder):
    """Lets functions that ask for XLA run on servers that do not have it."""
    from tensorflow.core.protobuf import saved_model_pb2

    path = folder / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    graph = saved.meta_graphs[0].graph_def
    functions = graph.library.function
    holders = [*graph.node, *functions]
    holders += [node for function in functions for node in function.node_def]
    asking = [h for h in holders if "_XlaMustCompile" in h.attr]
    for holder in asking:
        del holder.attr["_XlaMustCompile"]
    if asking:
        path.write_bytes(saved.SerializeToString())
        # It holds checksums of what was there before; servers do without.
        (folder / "fingerprint.pb").unlink(missing_ok=True)


def _check_signatures(signatures, probe, expected, model):
    """Raises RuntimeError unless what was written does what the model does."""
    actual = {"serving_default": _served(signatures["serving_default"], probe)}
    if "step" in signatures:
        ((name, inputs),) = probe.items()
        states = _served(signatures["initial_state"], {name: inputs[:, 0]})
        steps = []
        for time in range(inputs.shape[1]):
            states[name] = inputs[:, time]
            states = _served(signatures["step"], states)
            steps.append({name: states.pop(name) for name in expected})
        actual["step"] = _joined(steps, expected)
    for signature, outputs in actual.items():
        if difference := _apart(outputs, expected, model):
            raise RuntimeError(
                f"The signature `{signature}` of the SavedModel must give what "
                "the model gives, or it would serve something else. Received: "
                f"a difference of {difference}"
            )


def _served(signature, inputs):
    import tensorflow as tf

    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in signature(**inputs).items()}


def _write_warm_up(signatures, name, warm_up, folder):
    """Stores requests that the server runs before it takes others."""
    if not warm_up:
        return
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2
    from tensorflow_serving.apis import prediction_log_pb2

    records = []
    for (batch, time), signature in itertools.product(warm_up, signatures):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = name
        request.model_spec.signature_name = signature
        _, specs = signatures[signature].structured_input_signature
        inputs = {
            key: np.zeros(
                _filled(spec.shape, batch, time), spec.dtype.as_numpy_dtype
            )
            for key, spec in specs.items()
        }
        for key, value in inputs.items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
        # A request that fails would keep the server from starting.
        _served(signatures[signature], inputs)
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(request)
        records.append(log.SerializeToString())
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    with files.explain_os_errors(path, also=(tf.errors.OpError,)):
        path.parent.mkdir()
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
