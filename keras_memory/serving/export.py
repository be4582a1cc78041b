"""SavedModels for TensorFlow Serving, with explicit state for streaming.

A recurrent layer hides its states inside a call. `streaming._run` calls an
unchanged model, but takes the initial states as inputs and returns the final
ones. At a masked step a layer repeats its last output, so this output is one
more state. A layer that looks at other time steps cannot be streamed: the
export steps through a probe and compares the outputs with those of the whole
sequence.
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
from keras_memory.serving.streaming import PROBE_STEPS
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
    max_steps: int | None = None,
) -> pathlib.Path:
    """Writes a SavedModel that TensorFlow Serving runs without this library.

    Signatures, for any batch size B and number of time steps T:

    - `serving_default`: `inputs` (B, T, D) to `outputs`, the whole sequence.
    - `step`: `inputs` (B, D), one time step, and the states to `outputs` and
      the new states under the same names.
    - `initial_state`: `inputs` (B, D), of which only B matters, to the states
      before the first step.

    Names of inputs and outputs: an input keeps its own name, as in
    `keras.Input(..., name="sensor")`, or its key if the model takes a dict. An
    output keeps its key if the model returns a dict. The others are named
    `inputs` and `outputs`, or `inputs_0`, `outputs_0`, `outputs_1`, ... if
    there are several. Names that Keras generates, such as `input_layer_3`, are
    ignored. Characters other than letters, digits and "_" become "_". A name
    that does not begin with a letter, or is a keyword of Python, gets the
    prefix `arg_` ("my-input" is served as `my_input`, "1st" as `arg_1st`). The
    second of two equal names ends in `_1`.

    Names of states: the fields of the layer's state record. For an `NTMLayer`
    these are `reads`, `memory`, `read_weighting`, `write_weighting`,
    `controller_h` and `controller_c`; for an LSTM `h` and `c`; for a GRU `h`;
    for your own cell its list `state_names`, or else `state_0`, `state_1`, ...
    In a stack of cells, the cell's number comes last (`h_0`); with several
    blocks, the block's number comes first (`block0_controller_h`). The layer's
    name comes first (`lstm_h`) if a model has several recurrent layers, or an
    input or output of the same name: name your layers, as the default names of
    Keras count up. Each state is (B, size) in its layer's compute dtype.

    Masks: a step that `Masking` or `Embedding(mask_zero=True)` masks keeps the
    states and repeats the output, in `step` as in a sequence. So a client
    sends the mask value for rows of its batch without new data. The repeated
    output is one more state, `held_output`, with the layer's name in front if
    there are several; layers with `zero_output_for_mask=True` do not need it.

    `step` and `initial_state` are written if stepping through a random probe
    gives the outputs of the whole sequence, and otherwise left out with a
    warning. Supported are recurrent layers of this library and of Keras, and
    layers that act on each time step alone. Not supported are `Bidirectional`,
    `go_backwards`, attention, and convolution and pooling over time. A model
    without recurrent layers, such as a Memory Wrap, has only
    `serving_default`. If a model fixes the number of time steps, the export
    keeps it when the signatures are left out or a layer needs it. A stateful
    layer is served as stateless: a server keeps no states of its clients.

    The version folder appears complete or not at all: the export writes to a
    hidden folder beside it, loads the SavedModel from there, compares it with
    the model, and renames the folder at the end. Each export overwrites
    `<folder>/models.config`, so keep labels and version policies in another
    file. Serve `<folder>` as `/models/<name>`, or edit the `base_path`:

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
            them before it accepts others. Needs tensorflow-serving-api;
            without it, the export warns and stores none.
        exact_search: bool. False (default): a `ScannIndex` searches with
            ScaNN's ops, which the server must have; the export warns. True: it
            compares with all entries, using ops that every server has.
        max_steps: int, at least 5, or None: the longest stream, for a layer
            whose memory starts empty (`SAMLayer`). Its states then have only
            the slots that so many steps can write to, which keeps messages
            small (gRPC clients receive at most 4 MB by default); a further
            `step` fails with an error. None (default): all slots.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        RuntimeError: the backend is not TensorFlow, or the SavedModel gives
            other outputs than the model.
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
    for layer in model._flatten_layers():
        if hasattr(layer, "check_not_on_host"):
            layer.check_not_on_host("An export")
    if max_steps is not None:
        check_size("max_steps", max_steps, PROBE_STEPS, " or None")
    with contextlib.ExitStack() as changes:
        for layer in _by_scann(model):
            if exact_search:
                changes.enter_context(changed_attributes(layer, _index=None))
            else:
                warnings.warn(
                    f"{titled(layer)} is exported with ScaNN's ops, which a "
                    "server must load (`_scann_ops.so` of the package scann); "
                    "the stock image of TensorFlow Serving lacks them. With "
                    "`exact_search=True` it compares with all entries, using "
                    "ops that every server has.",
                    stacklevel=2,
                )
        temporary = changes.enter_context(appearing_folder(target))
        functions, probe, expected, obstacle = take_apart(model, max_steps)
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
                "The model is exported without warm-up requests, which need "
                "tensorflow-serving-api: `pip install "
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
            f"`model` must be a Keras model or layer. Received: model={model!r}"
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
            "part of the server's URLs; by default it is the folder's name. "
            f"Received: name={name!r}"
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
