"""SavedModels for TensorFlow Serving, with explicit state for streaming.

A recurrent layer hides its states inside of a call. `_run` calls a model as it
is, but has its recurrent layers start from states that come from outside and
hand out those they reach. Whether that streams a model faithfully, which it
does not where a layer looks at other time steps, is found by trying.
"""

import contextlib
import functools
import itertools
import os
import pathlib
import re
import shutil
import uuid
import warnings

import keras
import numpy as np
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.checks import check_bool
from keras_memory.checks import check_size
from keras_memory.scann_index import ScannIndex

MOST_WARM_UP_RECORDS = 1000  # TensorFlow Serving refuses a model with more
TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-1}  # else 1e-5, as for float32

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
    - `step`: `inputs` (B, D), one time step, and the states `state_0`,
      `state_1`, ... to `outputs` and the new states under the same names.
    - `initial_state`: `inputs` (B, D), of which only B counts, to the states
      in front of the first step.

    Each state is (B, size) in its layer's compute dtype. They are numbered in
    the order in which the model calls its recurrent layers, and within a layer
    as its `return_state` gives them. A model with several inputs or outputs
    has its inputs under their Keras names and `outputs_0`, `outputs_1`, ...

    `step` and `initial_state` are written if stepping a random probe gives
    what the whole sequence gives, and left out with a warning if not; a model
    without recurrent layers, such as a Memory Wrap, has neither of them. What
    goes into them: recurrent layers of this library and of Keras, and layers
    that act on each time step alone. What does not: `Bidirectional`,
    `go_backwards`, attention, convolution and pooling over time, and masks,
    as the output that a masked step holds is not a state. Where they are left
    out, a number of time steps that the model fixes stays fixed. A stateful
    layer is served as a stateless one: a server has no memory of its clients.

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
        version: int, at least 1; name of the version's folder.
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
    folder = pathlib.Path(folder)
    target = folder / str(version)
    name = folder.resolve().name if name is None else name
    _check_model(model)
    check_size("version", version)
    _check_name(name)
    _check_warm_up(warm_up)
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
        _check_signatures(signatures, probe, expected, _tolerance(model))
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
        _flush(config)
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


def _check_warm_up(warm_up):
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


def _by_scann(model):
    """The layers whose SavedModel needs ScaNN's ops."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, ScannIndex) and layer.is_by_scann
    ]


def _titled(layer):
    return f"{type(layer).__name__} {layer.name!r}"


# The functions behind the signatures.


def _take_apart(model):
    """Makes what is to be served.

    Returns:
        Dict of concrete functions, by signature; dict of probe inputs; dict
        of the model's outputs for them; and why there is no `step`, None if
        there is one, or "" where there is nothing to step.
    """
    import tensorflow as tf

    shapes = _input_shapes(model)
    probe = _probe(model, shapes)
    whole, calls = _run(model, probe.values())
    obstacle, time_axes = _try_streaming(model, probe, whole, calls)
    functions = {}
    if obstacle is None:
        ((shape, dtype),) = shapes.values()
        functions = _streaming(model, shape, dtype, calls, time_axes)
        shapes = {"inputs": ((None, None, *shape[2:]), dtype)}

    def serving_default(**inputs):
        outputs, _ = _run(model, [inputs[name] for name in shapes])
        return outputs[-1][1]

    functions["serving_default"] = _trace(
        serving_default,
        {name: tf.TensorSpec(*spec, name) for name, spec in shapes.items()},
    )
    return functions, probe, whole[-1][1], obstacle


def _streaming(model, shape, dtype, calls, time_axes):
    """Makes `step` and `initial_state`; arguments as those around it."""
    import tensorflow as tf

    inputs = {"inputs": tf.TensorSpec((None, *shape[2:]), dtype, "inputs")}
    states = {
        name: tf.TensorSpec((None, *state.shape[1:]), state.dtype, name)
        for name, state in _states(after for _, after in calls).items()
    }

    def step(inputs, **before):
        before = [before[name] for name in states]
        outputs, calls = _run(model, [inputs[:, None]], before, unroll=True)
        outputs = {
            name: output[:, 0] if name in time_axes else output
            for name, output in outputs[-1][1].items()
        }
        return {**outputs, **_states(after for _, after in calls)}

    def initial_state(inputs):
        return _initial_states(calls, tf.shape(inputs)[0])

    return {
        "step": _trace(step, {**inputs, **states}),
        "initial_state": _trace(initial_state, inputs),
    }


def _trace(function, specs):
    import tensorflow as tf

    function = tf.function(function, autograph=False)
    return function.get_concrete_function(**specs)


def _has_graph(model):
    """True for Functional and Sequential models."""
    return getattr(model, "inputs", None) is not None


def _input_shapes(model):
    """Dict of the inputs' (shape, dtype), with a free batch size."""
    if _has_graph(model):
        inputs = {i.name: (i.shape, i.dtype) for i in model.inputs}
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
        wide = model.compute_dtype == "float64"
        inputs = {"inputs": (shape, "float64" if wide else "float32")}
    if len(inputs) == 1:
        inputs = dict(zip(["inputs"], inputs.values()))
    return {
        name: ((None, *shape[1:]), dtype)
        for name, (shape, dtype) in inputs.items()
    }


def _probe(model, shapes):
    """Random inputs. Where a layer masks, two time steps are masked."""
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
        shape = _filled(shape, batch, 3)
        values = rng.normal(size=shape)
        if "float" not in dtype:
            values = rng.integers(2, size=shape)  # in every vocabulary
        if values.ndim > 1:
            values[0, -1] = values[-1, shape[1] // 2] = masked[0]
        probe[name] = values.astype(dtype)
    return probe


def _filled(shape, batch, time):
    return [batch] + [size or time for size in shape[1:]]


def _named(name, structure):
    values = keras.tree.flatten(structure)
    if len(values) == 1:
        return {name: values[0]}
    return {f"{name}_{index}": value for index, value in enumerate(values)}


def _states(structures):
    states = keras.tree.flatten(list(structures))
    return {f"state_{index}": state for index, state in enumerate(states)}


def _initial_states(calls, batch):
    """What the recurrent layers start from, in the dtypes of their states."""
    initial = _states(layer.get_initial_state(batch) for layer, _ in calls)
    after = _states(after for _, after in calls)
    return {
        name: keras.ops.cast(state, after[name].dtype)
        for name, state in initial.items()
    }


# The model with its states outside.


def _run(model, inputs, states=None, unroll=False):
    """Calls a model in inference mode, with its states outside.

    Args:
        model: a model or layer.
        inputs: its inputs, as a flat iterable.
        states: iterable of all states to start from, in order of call, or
            None for what the layers start from.
        unroll: bool, without a loop over time.

    Returns:
        List of (layer, dict of outputs), in order of call, the model itself
        last; and list of (recurrent layer, final states), in order of call.
    """
    given = None if states is None else iter(states)
    outputs, calls = [], []

    def noting(layer, call):
        @functools.wraps(call)
        def noted(*args, **kwargs):
            values = call(*args, **kwargs)
            outputs.append((layer, _named("outputs", values)))
            return values

        return noted

    def opened(layer, inner_loop):
        def loop(sequences, initial_state, mask, training=False):
            if given is not None:
                initial_state = keras.tree.map_structure(
                    lambda _: next(given), initial_state
                )
            *values, after = inner_loop(
                sequences, initial_state, mask, training=training
            )
            calls.append((layer, after))
            return *values, after

        return loop

    with contextlib.ExitStack() as changes:

        def change(layer, **attributes):
            changes.enter_context(_changed(layer, **attributes))

        for layer in getattr(model, "layers", []):
            change(layer, call=noting(layer, layer.call))
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.RNN):
                change(
                    layer,
                    inner_loop=opened(layer, layer.inner_loop),
                    unroll=unroll,
                    stateful=False,
                    use_cudnn=False,  # the server may have no GPU
                )
            elif getattr(layer, "stateful", False):  # such as a map
                change(layer, stateful=False)
            if isinstance(layer, DropoutRNNCell):
                # They draw random numbers even where none are used.
                change(
                    layer,
                    get_dropout_mask=lambda *_: None,
                    get_recurrent_dropout_mask=lambda *_: None,
                )
        values = _call(model, inputs)
    return [*outputs, (model, _named("outputs", values))], calls


def _call(model, inputs):
    inputs = [keras.ops.convert_to_tensor(value) for value in inputs]
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


def _try_streaming(model, probe, whole, calls):
    """Runs the probe step by step and compares with the whole sequence.

    Args:
        model: a model or layer.
        probe: dict of its inputs.
        whole, calls: what `_run` returns for the probe.

    Returns:
        Why the model cannot be streamed, or None; and the names of those
        outputs that have a time axis.
    """
    if not calls:
        return "", ()  # nobody expects steps of it
    if len(probe) > 1:
        return f"`step` takes one input, and it has {list(probe)}.", ()
    (inputs,) = probe.values()
    if inputs.shape[1] == 1:
        return "its input has one time step: `keras.Input((None, ...))`.", ()
    states = _initial_states(calls, len(inputs))
    steps = []
    try:
        for time in range(inputs.shape[1]):
            step = inputs[:, time : time + 1]
            outputs, calls = _run(model, [step], states.values())
            states = _states(after for _, after in calls)
            steps.append([of_layer for _, of_layer in outputs])
    except Exception as error:  # any layer may refuse one step alone
        return f"it fails on a single time step: {error}", ()
    apart = []
    for (layer, expected), *parts in zip(whole, *steps):
        difference = _difference(_joined(parts, expected), expected)
        if not difference <= _tolerance(model):
            apart.append((layer, difference))
    if apart and apart[-1][0] is model:
        layer, difference = apart[0]
        return (
            f"step by step, {_titled(layer)} gives other outputs than for the "
            f"whole sequence (by {difference:.1e}), so it depends on more "
            "than the time step and the states: on other steps, as a layer "
            "that goes backwards, attends, convolves or pools, or on a mask.",
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


def _difference(actual, expected):
    """Largest difference of two dicts of arrays, relative where above 1."""
    differences = [0.0]
    for name in expected:
        value, whole = (
            np.asarray(values[name]).astype("float64")
            for values in (actual, expected)
        )
        if value.shape != whole.shape:
            return np.inf
        scale = np.maximum(1.0, np.abs(whole).max(initial=0))
        differences.append(np.abs(value - whole).max(initial=0) / scale)
    return np.max(differences)  # NaN if there is one


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
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            "`folder` must be a folder that can be written, as each version "
            f"becomes a folder in it. Received: folder={folder} ({error})"
        ) from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        temporary.rename(target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path):
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save(functions, folder):
    """Writes a SavedModel; returns its signatures, loaded from there."""
    import tensorflow as tf

    module = tf.Module()
    module.all_variables = [f.graph.variables for f in functions.values()]
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


def _check_signatures(signatures, probe, expected, limit):
    """Raises RuntimeError unless what was written does what the model does."""
    actual = {"serving_default": _served(signatures["serving_default"], probe)}
    if "step" in signatures:
        (inputs,) = probe.values()
        states = _served(signatures["initial_state"], {"inputs": inputs[:, 0]})
        steps = []
        for time in range(inputs.shape[1]):
            states["inputs"] = inputs[:, time]
            states = _served(signatures["step"], states)
            steps.append({name: states.pop(name) for name in expected})
        actual["step"] = _joined(steps, expected)
    for name, outputs in actual.items():
        difference = _difference(outputs, expected)
        if not difference <= limit:
            raise RuntimeError(
                f"The signature `{name}` of the SavedModel must give what the "
                f"model gives, to {limit:.0e}, or it would serve something "
                f"else. Received: a difference of {difference:.1e} (inf where "
                "shapes differ)"
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

    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
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
            writer.write(log.SerializeToString())
