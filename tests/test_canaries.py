"""The private hooks of Keras and TensorFlow that this library hangs on.

Each test fails where a new version changes a hook, and says what depended on
it. `test_recurrent.py` has the canaries of `keras.layers.RNN`, `test_slots.py`
that of XLA.
"""

import inspect

import keras
import numpy as np
import pytest
from harness import needs_tensorflow
from keras import ops
from keras.src import backend
from keras.src.backend.common.symbolic_scope import get_symbolic_scope

import keras_memory


def test_canary_autocast_scopes_set_the_dtype_of_variables():
    variable = keras.Variable(np.ones(3, "float32"))
    with backend.AutocastScope("float16"):
        assert backend.get_autocast_scope().dtype == "float16", (
            "keras.src.backend.get_autocast_scope() no longer gives the scope "
            "that is open, with its dtype. The time loop hands this dtype to "
            "the steps that it runs again."
        )
        assert ops.dtype(variable.value) == "float16"
        with backend.AutocastScope(None):
            assert ops.dtype(variable.value) == "float32", (
                "AutocastScope(None) no longer switches autocasting off. The "
                "fast time loop takes gradients of float32 weights within it."
            )
    assert backend.get_autocast_scope() is None


def test_canary_backends_compute_output_specs():
    spec = backend.compute_output_spec(
        lambda x: (x, [ops.sum(x, axis=1)]), keras.KerasTensor((None, 3))
    )
    assert [tuple(part.shape) for part in keras.tree.flatten(spec)] == [
        (None, 3),
        (None,),
    ], (
        "keras.src.backend.compute_output_spec no longer gives the shapes of "
        "what a function returns, with free batch sizes. The fast time loop "
        "finds the shapes of a step's results by it."
    )


def test_canary_stateless_scopes_tell_what_is_read_and_changed():
    class Scope(keras.StatelessScope):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.read, self.changed = [], []

        def get_current_value(self, ref):
            self.read.append(ref)
            return super().get_current_value(ref)

        def add_update(self, update):
            self.changed.append(update[0])
            return super().add_update(update)

    first, second = (keras.Variable(np.ones(3, "float32")) for _ in range(2))
    with Scope([(first, ops.zeros(3))]) as outer:
        with Scope() as scope:
            first.value  # noqa: B018
            second.assign(ops.zeros(3))
        assert scope.original_scope is outer, (
            "keras.StatelessScope no longer has the scope around it as "
            "`original_scope`. On JAX the fast time loop finds the values of "
            "variables there."
        )
    hooks = "keras.StatelessScope no longer asks its {} for each variable that "
    assert any(ref is first for ref in scope.read), (
        hooks.format("get_current_value") + "is read. The fast time loop finds "
        "the weights of a step by it."
    )
    assert any(ref is second for ref in scope.changed), (
        hooks.format("add_update") + "is assigned. The fast time loop refuses "
        "steps that change variables by it."
    )


def test_canary_a_built_layer_takes_weights_if_it_is_unlocked():
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    what = (
        "keras.layers.Layer no longer has `_tracker` with `locked`, `lock` and "
        "`unlock`, or `_untrack_variable`. Memory Wrap replaces the weights "
        "of its fixed memory by them."
    )
    assert layer._tracker.locked is True, what
    with pytest.raises(ValueError, match="cannot add"):
        layer.add_weight((3,), name="more")
    layer._tracker.unlock()
    weight = layer.add_weight((3,), name="more")
    layer._tracker.lock()
    assert len(layer.weights) == 3, what
    layer._untrack_variable(weight)
    assert len(layer.weights) == 2, what


def test_canary_layers_list_the_layers_inside():
    cell = keras.layers.LSTMCell(3)
    inner = keras.layers.RNN(cell)
    outer = keras.layers.TimeDistributed(inner)
    model = keras.Sequential([keras.Input((5, 4, 2)), outer])
    layers = list(model._flatten_layers())
    what = (
        "keras.layers.Layer._flatten_layers no longer gives a layer and all "
        "layers inside of it. Callbacks, tracing and exports find recurrent "
        "layers by it."
    )
    for layer in (model, outer, inner, cell):
        assert any(found is layer for found in layers), what
    within = list(outer._flatten_layers(include_self=False))
    assert within[0] is inner and outer not in within, what


def test_canary_tensors_carry_their_mask():
    x = np.ones((2, 3, 4), "float32")
    x[1, 2] = 0.0
    masked = keras.layers.Masking()(ops.convert_to_tensor(x))
    mask = backend.get_keras_mask(masked)
    assert mask is not None, (
        "keras.src.backend.get_keras_mask no longer gives the mask of a "
        "tensor. `MemoryRNN` reads it where Keras hands no mask on, with "
        "`initial_state`."
    )
    expected = [[True, True, True], [True, True, False]]
    assert ops.convert_to_numpy(mask).tolist() == expected


def test_canary_the_mask_of_outputs_leaves_entries_out_of_the_loss():
    y, outputs = np.zeros((2, 2)), np.array([[[1.0], [3.0]], [[5.0], [7.0]]])
    outputs = ops.convert_to_tensor(outputs, "float32")
    backend.set_keras_mask(outputs, ops.convert_to_tensor([[1, 1], [1, 0]]))
    loss = keras.losses.MeanSquaredError()(y[..., None], outputs)
    assert np.isclose(ops.convert_to_numpy(loss), (1 + 9 + 25) / 3), (
        "keras.src.backend.set_keras_mask no longer leaves entries out of the "
        "loss. `MemorizingTransformer` leaves out padding so."
    )


def test_canary_symbolic_scopes_mark_calls_that_build_a_model():
    scopes = []

    class Looking(keras.layers.Layer):
        def call(self, x):
            scopes.append(get_symbolic_scope())
            return x + 1.0

    assert get_symbolic_scope() is None
    Looking()(keras.Input((3,)))
    assert scopes and scopes[-1] is not None, (
        "Keras no longer opens a SymbolicScope where it calls a layer on "
        "symbolic tensors. `trace_model` tells these calls from real ones by "
        "it."
    )
    Looking()(np.ones((2, 3), "float32"))
    assert scopes[-1] is None


def test_canary_an_lstm_has_a_switch_for_cudnn():
    layer = keras.layers.LSTM(3, use_cudnn=False)
    assert layer.use_cudnn is False, (
        "keras.layers.LSTM no longer has `use_cudnn`. Exports switch cuDNN "
        "off by it, as one step with a state handed in needs the plain loop."
    )


@needs_tensorflow
def test_canary_exports_run_without_xla_marks_and_checksums(tmp_path):
    import tensorflow as tf

    model = keras.Sequential(
        [keras.Input((5, 2)), keras_memory.NTMLayer(3, 4, 2)]
    )
    function = tf.function(lambda x: model(x), jit_compile=True)
    spec = tf.TensorSpec((None, 5, 2), "float32")
    concrete = function.get_concrete_function(spec)
    marked = "_XlaMustCompile" in concrete.function_def.attr
    assert marked, (
        "TensorFlow no longer marks functions with jit_compile=True by the "
        "attribute `_XlaMustCompile`. Exports take this mark away, so that "
        "servers without XLA run them: `saved_model.py`."
    )
    folder = keras_memory.export.export_for_serving(model, tmp_path / "model")
    folder = next((tmp_path / "model").glob("*/saved_model.pb")).parent
    assert b"_XlaMustCompile" not in (folder / "saved_model.pb").read_bytes()
    (folder / "fingerprint.pb").unlink(missing_ok=True)
    loaded = tf.saved_model.load(str(folder))
    assert "serving_default" in loaded.signatures, (
        "A SavedModel without `fingerprint.pb` does not load any more. "
        "Exports delete it where they have changed the graph."
    )


def test_canary_result_type_is_that_of_keras():
    assert keras.backend.result_type("float16", "float32") == "float32"
    assert "result_type" in vars(keras.backend), (
        "keras.backend.result_type is gone. Losses and maps compute in the "
        "widest dtype of their arguments by it."
    )
    assert inspect.isfunction(keras.backend.result_type)
