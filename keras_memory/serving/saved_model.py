"""Writes SavedModels, compares them, and adds warm-up requests."""

import contextlib
import itertools
import os
import re
import shutil
import uuid

import numpy as np

from keras_memory import files
from keras_memory.serving.streaming import filled
from keras_memory.serving.streaming import joined_steps
from keras_memory.serving.streaming import largest_difference
from keras_memory.serving.streaming import served

MOST_WARM_UP_RECORDS = 1000  # TensorFlow Serving refuses a model with more
TEMPORARY = r"\.\d+\.[0-9a-f]{8}"  # names of the exports' temporary folders


# Files.


@contextlib.contextmanager
def appearing_folder(target):
    """Yields a hidden folder, and renames it to `target` on success."""
    folder = target.parent
    if os.path.lexists(target):
        raise ValueError(
            "`version` must be a new one, as servers do not reload a version: "
            "choose another number, or remove the old version. "
            f"Received: version={target.name}, and {target} exists"
        )
    # Servers ignore folders whose name is not a number.
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
                "`folder` must be a writable folder, as each version becomes "
                f"a folder in it. Received: folder={folder} "
                f"({error})"
            ) from error
        kept = f"The versions in {folder} are unchanged."
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
    """Removes temporary folders of killed exports.

    A running export holds a lock, which the system releases when it is killed.
    """
    if not files.has_locks():  # cannot tell killed exports from running ones
        return
    for path in folder.iterdir():
        if re.fullmatch(TEMPORARY, path.name):
            lock = _lock_of(path)
            with contextlib.suppress(ValueError, OSError), files.locked(lock):
                shutil.rmtree(path, ignore_errors=True)
                _remove(lock)


def _lock_of(temporary):
    """Path of a temporary folder's lock, which is made first, beside it."""
    return temporary.with_name(f"{temporary.name}.lock")


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink()


def save_functions(functions, folder):
    """Writes a SavedModel; returns its signatures, loaded from there."""
    import tensorflow as tf

    module = tf.Module()
    module.all_variables = [f.graph.variables for f in functions.values()]
    with files.explain_os_errors(folder, also=(tf.errors.OpError,)):
        tf.saved_model.save(module, str(folder), signatures=functions)
    _allow_without_xla(folder)
    return tf.saved_model.load(str(folder)).signatures


def _allow_without_xla(folder):
    """Lets functions that require XLA run on servers without XLA."""
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
        # Its checksums are now wrong, and servers do not need it.
        (folder / "fingerprint.pb").unlink(missing_ok=True)


def check_signatures(signatures, probe, expected, model):
    """Raises RuntimeError unless the signatures give the model's outputs."""
    actual = {"serving_default": served(signatures["serving_default"], probe)}
    if "step" in signatures:
        ((name, inputs),) = probe.items()
        states = served(signatures["initial_state"], {name: inputs[:, 0]})
        steps = []
        for time in range(inputs.shape[1]):
            states[name] = inputs[:, time]
            states = served(signatures["step"], states)
            steps.append({name: states.pop(name) for name in expected})
        actual["step"] = joined_steps(steps, expected)
    for signature, outputs in actual.items():
        if difference := largest_difference(outputs, expected, model):
            raise RuntimeError(
                f"The signature `{signature}` of the SavedModel must give the "
                f"outputs of the model. Received: a difference of {difference}"
            )


def write_warm_up(signatures, name, warm_up, folder):
    """Stores requests that the server runs before it accepts others."""
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
                filled(spec.shape, batch, time), spec.dtype.as_numpy_dtype
            )
            for key, spec in specs.items()
        }
        if signature == "step":  # zeros need not be states
            function = signatures["initial_state"]
            _, names = function.structured_input_signature
            first = served(function, {name: inputs[name] for name in names})
            inputs.update({k: v for k, v in first.items() if k in inputs})
        for key, value in inputs.items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
        # A request that fails would keep the server from starting.
        served(signatures[signature], inputs)
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(request)
        records.append(log.SerializeToString())
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    with files.explain_os_errors(path, also=(tf.errors.OpError,)):
        path.parent.mkdir()
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
