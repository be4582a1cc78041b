"""Every public callable that takes arrays refuses wrong ones, with an error
that names the argument, the expected and the received value."""

import inspect

import keras
import numpy as np
import pytest

import keras_memory
from keras_memory import retrieval
from keras_memory.checks import check_labels
from keras_memory.spatial import fusion
from keras_memory.spatial import geometry
from keras_memory.spatial import rooms
from keras_memory.training import losses

RNG = np.random.default_rng(5)


def real(*shape):
    return RNG.uniform(0.1, 1.0, shape).astype("float32")


def pose(*shape):
    return np.broadcast_to(np.eye(3, 4, dtype="float32"), (*shape, 3, 4)).copy()


CAMERA = np.asarray(geometry.inverse_intrinsics((3.0, 3.0), (2.0, 2.0)))
SEQUENCES = {"targets": real(2, 5, 3), "outputs": real(2, 5, 3)}
MASKED = {**SEQUENCES, "mask": np.ones((2, 5), "float32")}
AS_KERAS = {"y_true": real(2, 5, 3), "y_pred": real(2, 5, 3)}


def layer_of(cls, *args, **kwargs):
    return lambda **arrays: cls(*args, **kwargs)(**arrays)


def ring(method):
    memory = retrieval.RingMemory(3, 7)
    state = memory.initial_state(2)
    return lambda **arrays: getattr(memory, method)(state, **arrays)


def knn(method):
    memory = keras_memory.KNNMemory(3, 7, 2, search_method="exact")
    return lambda **arrays: getattr(memory, method)(**arrays)


def cell(**arrays):
    own = keras_memory.NTMCell(2, 5, 3, controller_units=4)
    own.build((2, 3))
    return own(arrays["inputs"], own.get_initial_state(2))


def updated(metric):
    def update(**arrays):
        arrays["sample_weight"] = arrays.pop("sample_weight", None)
        metric().update_state(**arrays)

    return update


def searched(**arrays):
    return keras_memory.KNNMemoryLayer(7, 2)(
        arrays["queries"], arrays["keys"], arrays["values"]
    )


def fixed(**arrays):
    index = keras_memory.ScannIndex(5, 2, value_dim=2, exact=True)
    index.set_memory(**arrays)


def asked(**arrays):
    index = keras_memory.ScannIndex(5, 2, exact=True)
    index.set_memory(real(5, 3))
    return index(**arrays)


def wrapped(cls):
    def call(**arrays):
        layer = cls(2)
        return layer(arrays["encodings"], arrays["memory_encodings"])

    return call


def remembered(**arrays):
    layer = keras_memory.MemoryWrapLayer(2)
    layer.build((None, 3))
    layer.set_memory(**arrays)


def traced(**arrays):
    layer = keras_memory.NTMLayer(2, 5, 3, controller_units=4)
    return keras_memory.trace(layer, **arrays)


def recurrent(cls):
    return lambda sequences: cls(2, 5, 3, controller_units=4)(sequences)


def mapped(**arrays):
    layer = keras_memory.ESMLayer(4, 8, feature_channels=1)
    inputs = {
        "cameras": {"features": real(2, 3, 4, 4, 1), "points": None},
        "motion": pose(2, 3),
    }
    inputs["cameras"]["points"] = real(2, 3, 4, 4, 3)
    for name, value in arrays.items():
        place = inputs if name == "motion" else inputs["cameras"]
        place[name] = value
    return layer(inputs)


# Functions, and valid array arguments. For each argument the test tries text,
# bools, complex numbers, None, no axis, and a last axis of another size.
CALLS = {
    "NTMLayer": (
        recurrent(keras_memory.NTMLayer),
        {"sequences": real(2, 3, 4)},
    ),
    "DNCLayer": (
        recurrent(keras_memory.DNCLayer),
        {"sequences": real(2, 3, 4)},
    ),
    "SAMLayer": (
        recurrent(keras_memory.SAMLayer),
        {"sequences": real(2, 3, 4)},
    ),
    "NTMCell": (cell, {"inputs": real(2, 3)}),
    "trace": (traced, {"inputs": real(2, 3, 4)}),
    "MemoryWrapLayer": (
        wrapped(keras_memory.MemoryWrapLayer),
        {"encodings": real(2, 3), "memory_encodings": real(5, 3)},
    ),
    "BaselineMemory": (
        wrapped(keras_memory.BaselineMemory),
        {"encodings": real(2, 3), "memory_encodings": real(5, 3)},
    ),
    "MemoryWrapLayer.set_memory": (
        remembered,
        {"memory_encodings": real(5, 3)},
    ),
    "check_labels": (
        lambda y: check_labels(y, 5, 3),
        {"y": np.eye(5, 3, dtype="float32")},
    ),
    "ESMLayer": (
        mapped,
        {
            "features": real(2, 3, 4, 4, 1),
            "points": real(2, 3, 4, 4, 3),
            "motion": pose(2, 3),
        },
    ),
    "ScannIndex.set_memory": (
        fixed,
        {"keys": real(5, 3), "values": real(5, 2)},
    ),
    "ScannIndex": (asked, {"queries": real(2, 3)}),
    "KNNMemoryLayer": (
        searched,
        {
            "queries": real(2, 4, 3),
            "keys": real(2, 5, 3),
            "values": real(2, 5, 3),
        },
    ),
    "CausalAttention": (
        lambda x: keras_memory.CausalAttention(2, 3)(x),
        {"x": real(2, 4, 3)},
    ),
    "KNNAttention": (
        lambda x: keras_memory.KNNAttention(2, 3, 7, 2)(x),
        {"x": real(2, 4, 3)},
    ),
    "RelativePositionBias": (
        lambda distances: keras_memory.RelativePositionBias(2)(distances),
        {"distances": np.arange(6).reshape(2, 3)},
    ),
    "MemorizingTransformer": (
        lambda **arrays: keras_memory.MemorizingTransformer(
            7, 4, 1, 2, 3, memory_size=7, top_k=2, stateful=False
        )(**arrays),
        {
            "tokens": np.arange(6).reshape(2, 3),
            "labels": np.arange(6).reshape(2, 3),
        },
    ),
    "KNNMemory.add": (
        knn("add"),
        {"keys": real(2, 4, 3), "values": real(2, 4, 3)},
    ),
    "KNNMemory.search": (
        lambda **arrays: knn("search")(top_k=2, **arrays),
        {"queries": real(2, 4, 3)},
    ),
    "RingMemory.add": (
        ring("add"),
        {"keys": real(2, 4, 3), "values": real(2, 4, 3)},
    ),
    "RingMemory.search": (
        lambda **arrays: ring("search")(top_k=2, **arrays),
        {"queries": real(2, 4, 3)},
    ),
    "retrieval.nearest": (
        lambda **arrays: retrieval.nearest(top_k=2, **arrays),
        {"queries": real(2, 3), "keys": real(5, 3)},
    ),
    "losses.bits_per_sequence": (losses.bits_per_sequence, MASKED),
    "losses.wrong_bits_per_sequence": (losses.wrong_bits_per_sequence, MASKED),
    "losses.error_rate": (losses.error_rate, MASKED),
    "losses.absolute_error_of_sum": (losses.absolute_error_of_sum, MASKED),
    "losses.SquaredErrorOfSum": (
        lambda **arrays: losses.SquaredErrorOfSum()(**arrays),
        AS_KERAS,
    ),
    "losses.BitsCrossentropy": (
        lambda **arrays: losses.BitsCrossentropy()(**arrays),
        AS_KERAS,
    ),
    "losses.ClassCrossentropy": (
        lambda **arrays: losses.ClassCrossentropy()(**arrays),
        AS_KERAS,
    ),
    "losses.BitsPerSequence": (updated(losses.BitsPerSequence), AS_KERAS),
    "losses.WrongBitsPerSequence": (
        updated(losses.WrongBitsPerSequence),
        AS_KERAS,
    ),
    "losses.ErrorRate": (updated(losses.ErrorRate), AS_KERAS),
    "losses.AbsoluteErrorOfSum": (updated(losses.AbsoluteErrorOfSum), AS_KERAS),
    "geometry.pixels_to_camera": (
        geometry.pixels_to_camera,
        {
            "depth": real(2, 4, 4),
            "inverse_intrinsics": CAMERA[None].repeat(2, 0),
        },
    ),
    "geometry.transform": (
        geometry.transform,
        {"points": real(2, 5, 3), "pose": pose(2)},
    ),
    "geometry.rotation_matrix": (
        geometry.rotation_matrix,
        {"rotation_vector": real(2, 3)},
    ),
    "geometry.pose_matrix": (geometry.pose_matrix, {"pose_vector": real(2, 6)}),
    "geometry.compose": (
        geometry.compose,
        {"second": pose(2), "first": pose(2)},
    ),
    "geometry.invert": (geometry.invert, {"pose": pose(2)}),
    "geometry.motions": (geometry.motions, {"poses": pose(2, 3)}),
    "geometry.is_pose": (geometry.is_pose, {"pose": pose(2)}),
    "geometry.to_sphere": (geometry.to_sphere, {"points": real(2, 3)}),
    "geometry.from_sphere": (geometry.from_sphere, {"sphere": real(2, 3)}),
    "geometry.to_pixels": (
        lambda **arrays: geometry.to_pixels(height=4, width=8, **arrays),
        {"sphere": real(2, 3)},
    ),
    "geometry.from_pixels": (
        lambda **arrays: geometry.from_pixels(height=4, width=8, **arrays),
        {"pixels": real(2, 3)},
    ),
    "geometry.pixel_variance": (
        lambda **arrays: geometry.pixel_variance(height=4, width=8, **arrays),
        {"points": real(2, 5, 3), "covariance": real(2, 6, 6)},
    ),
    "geometry.quantize": (
        lambda **arrays: fusion.quantize(
            valid=np.ones((2, 5), "bool"), height=4, width=8, **arrays
        ),
        {"mean": real(2, 5, 4), "variance": real(2, 5, 4)},
    ),
    "geometry.smooth": (
        lambda **arrays: fusion.smooth(
            kernel=fusion.smoothing_kernel(3), **arrays
        ),
        {"mean": real(2, 4, 8, 3), "variance": real(2, 4, 8, 3)},
    ),
    "geometry.inverse_intrinsics": (
        geometry.inverse_intrinsics,
        {"focal_lengths": real(2), "principal_point": real(2)},
    ),
    "geometry.pad_sphere": (
        lambda **arrays: fusion.pad_sphere(size=1, **arrays),
        {"image": real(2, 4, 8, 3)},
    ),
    "rooms.Room.render": (
        lambda **arrays: rooms.Room().render(height=4, width=4, **arrays),
        {"pose": pose()},
    ),
    "rooms.Room.cast": (
        lambda **arrays: rooms.Room().cast(**arrays),
        {"origin": real(3), "directions": real(5, 3)},
    ),
}

# Arguments whose last axis may have any size.
ANY_SIZE = {
    ("NTMLayer", "sequences"),
    ("DNCLayer", "sequences"),
    ("SAMLayer", "sequences"),
    ("trace", "inputs"),
    ("CausalAttention", "x"),
    ("KNNAttention", "x"),
    ("RelativePositionBias", "distances"),
    ("geometry.pad_sphere", "image"),
    ("geometry.pixels_to_camera", "depth"),
    ("KNNMemoryLayer", "values"),
    ("ScannIndex.set_memory", "keys"),
}

OPTIONAL = {
    ("KNNMemoryLayer", "keys"),
    ("KNNMemoryLayer", "values"),
    ("MemorizingTransformer", "labels"),
}

# Arguments that may be bools or integers.
ALSO_BOOL = {"mask", "y"}

# Functions that take sizes, names, lists of arrays (`test_geometry.py`) or
# values checked before.
TAKE_NONE = {
    "geometry.agent_axes",
    "geometry.at_least",
    "geometry.camera_axes",
    "geometry.check_camera",
    "geometry.check_depth",
    "geometry.check_depth_scale",
    "geometry.fuse",
    "geometry.is_camera",
    "geometry.pixel_grid",
    "geometry.smoothing_kernel",
    "geometry.turn_covariance",
    "losses.Kind",
}


def wrong(name, array):
    """Pairs of a description and a wrong value."""
    array = np.asarray(array)
    yield "text", np.full(array.shape, "a")
    if name not in ALSO_BOOL:
        yield "bool", array > 0
    yield "complex", array.astype("complex64")
    yield "None", None
    yield "no axis", np.float32(1.0)
    yield "another size", np.concatenate([array, array[..., :1]], axis=-1)


@pytest.mark.parametrize("name", CALLS)
def test_errors_name_the_wrong_array(name):
    call, arrays = CALLS[name]
    call(**arrays)
    for argument, array in arrays.items():
        for kind, value in wrong(argument, array):
            if kind == "another size" and (name, argument) in ANY_SIZE:
                continue
            if kind == "None" and (name, argument) in OPTIONAL:
                continue
            if kind == "text" and keras.backend.backend() != "tensorflow":
                continue  # Keras cannot make a tensor of it
            where = f"{name}({argument}: {kind})"
            try:
                call(**{**arrays, argument: value})
            except (ValueError, TypeError) as error:
                text = str(error)
            else:
                pytest.fail(f"{where} is taken")
            # If two arguments disagree, the error may name either.
            names = arrays if kind == "another size" else [argument]
            assert any(one in text for one in names), f"{where}: {text}"
            assert "Received: " in text, f"{where}: {text}"


def test_integers_are_accepted_for_real_numbers():
    for name in ("geometry.to_sphere", "retrieval.nearest", "RingMemory.add"):
        call, arrays = CALLS[name]
        call(**{key: np.ones(x.shape, "int32") for key, x in arrays.items()})


def public_callables():
    for module in ("geometry", "losses"):
        for name, value in vars(getattr(keras_memory, module)).items():
            own = getattr(value, "__module__", "") == f"keras_memory.{module}"
            if own and callable(value) and name[0] != "_":
                yield f"{module}.{name}"
    for name in dir(keras_memory):
        value = getattr(keras_memory, name)
        if inspect.isclass(value) and issubclass(value, keras.layers.Layer):
            yield name


def test_every_public_callable_is_tested():
    told = {name for name in CALLS} | TAKE_NONE
    same = {  # callables tested through others
        "DNCCell": "NTMCell",
        "ESMCell": "ESMLayer",
        "MemoryCell": "NTMCell",
        "MemoryRNN": "NTMLayer",
        "SAMCell": "NTMCell",
        "SDNCCell": "NTMCell",
        "SDNCLayer": "SAMLayer",
        "MemoryWrapClassifier": "MemoryWrapLayer",
    }
    assert {same.get(name, name) for name in public_callables()} <= told
