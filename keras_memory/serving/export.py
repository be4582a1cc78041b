"""SavedModels for TensorFlow Serving, with explicit state for streaming.

A recurrent layer hides its states inside of a call. `_run` calls a model as it
is, but has its recurrent layers start from states that come from outside and
hand out those they reach. A masked step holds a layer's output, which is then
one state more. Whether this streams a model faithfully, which it does not
where a layer looks at other time steps, is found by trying.
"""

import contextlib
import pathlib
import re
import warnings
from collections.abc import Iterable
from collections.abc import Sequence

import keras

from keras_memory import files
from keras_memory.checks import check_bool
from keras_memory.checks import check_size
from keras_memory.checks import check_whole
from keras_memory.hints import PathLike
from keras_memory.serving.saved_model import MOST_WARM_UP_RECORDS
from keras_memory.serving.saved_model import appearing_folder
from keras_memory.serving.saved_model import check_signatures
from keras_memory.serving.saved_model import save_functions
from keras_memory.serving.saved_model import write_warm_up
from keras_memory.serving.streaming import changed_attributes
from keras_memory.serving.streaming import take_apart
from keras_memory.serving.streaming import titled

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
    model: keras.layers.Layer,
    folder: PathLike,
    version: int = 1,
    name: str | None = None,
    warm_up: Iterable[Sequence[int]] = ((1, 1), (8, 32)),
    exact_search: bool = False,
) -> pathlib.Path:
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
                changes.enter_context(changed_attributes(layer, _index=None))
            else:
                warnings.warn(
                    f"{titled(layer)} is exported with ScaNN's ops, which a "
                    "server must load, `_scann_ops.so` of the package scann; "
                    "the stock image of TensorFlow Serving has none. With "
                    "`exact_search=True` it compares with all entries, by "
                    "ops that every server has.",
                    stacklevel=2,
                )
        temporary = changes.enter_context(appearing_folder(target))
        functions, probe, expected, obstacle = take_apart(model)
        if obstacle:
            warnings.warn(
                f"{titled(model)} is exported without the signatures `step` "
                f"and `initial_state`: {obstacle}",
                stacklevel=2,
            )
        signatures = save_functions(functions, temporary)
        check_signatures(signatures, probe, expected, model)
        try:
            write_warm_up(signatures, name, warm_up, temporary)
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
            f"on data or call `build(input_shape)`. Received: {titled(model)}"
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
        if getattr(layer, "is_by_scann", False)
    ]
