"""Compares converted weights with stored results of the other implementations,
or with oracles of them (`reference.py`) where no results are stored.

`test_convert_errors.py` tests the errors.
"""

import pathlib

import keras
import numpy as np
import pytest
import reference
from harness import close
from harness import golden
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory import cli
from keras_memory import convert

pytestmark = pytest.mark.every_backend

PYTORCH = ["pytorch_ntm__1r1w_a", "pytorch_ntm__2r2w_b"]
COLLIER = ["collier_ntm__a", "collier_ntm__b"]
IVY = ["ivy_ntm__a", "ivy_ntm__b"]
CELL = "controller/multi_rnn_cell/cell_{}/basic_lstm_cell/{}"
START = "init/learned_init_{}/fully_connected/weights"


def batch_first(array):
    return np.swapaxes(array, 0, 1)


# The references' order of shifts -> offsets -shift_range, ..., shift_range.


def from_pytorch_order(shifts):
    """+1, 0, -1."""
    return shifts[..., ::-1]


def from_collier_order(shifts):
    """0, +1, ..., -1."""
    return np.roll(shifts, np.shape(shifts)[-1] // 2, axis=-1)


PARTS = {
    "key": "key",
    "strength": "beta",
    "interpolation_gate": "gate",
    "shift": "shift",
    "sharpening": "gamma",
    "content_weighting": "w_content",
}


def expected(arrays, kinds, shift_order, prefix=""):
    """Results of a reference, batch first, under this library's names.

    kinds: "R" or "W" for each of the reference's heads.
    """
    readers, writers = (
        [i for i, kind in enumerate(kinds) if kind == wanted] for wanted in "RW"
    )

    def of_heads(name, heads):
        values = [arrays[f"{prefix}head{i}.{name}"] for i in heads]
        if name in ("beta", "gate", "gamma"):
            values = [np.reshape(value, value.shape[:2]) for value in values]
        return batch_first(np.stack(values, axis=2))

    def known(name):
        return f"{prefix}head{writers[0]}.{name}" in arrays

    values = {
        "output": batch_first(arrays["output"]),
        "memory": batch_first(arrays[f"{prefix}memory"]),
        "reads": batch_first(arrays[f"{prefix}reads"]),
        "read_weighting": of_heads("w", readers),
        "write_weighting": of_heads("w", writers),
    }
    for name, theirs in PARTS.items():
        if known(theirs):
            values[name] = of_heads(theirs, readers + writers)
    for name in ("erase", "add"):
        if known(name):
            values[f"{name}_vector"] = of_heads(name, writers)
    if "shift" in values:
        values["shift"] = shift_order(values["shift"])
    return values


def computes(layer, x, values, tolerance):
    """x: (T, B, D), as the references take it."""
    x = batch_first(x).astype(layer.compute_dtype)
    inside = keras_memory.trace(layer, x)
    for name, value in values.items():
        close(inside[name], value, tolerance)
    close(layer(x), values["output"], tolerance)


# Stored results.


def collier_arguments(meta):
    names = "read_heads write_heads shift_range init_mode addressing_mode"
    return {name: meta[name] for name in names.split()}


def converted(name, weights, meta, **kwargs):
    if name in PYTORCH:
        return convert.from_pytorch_ntm(weights, **kwargs)
    return convert.from_collier_ntm(
        weights, **collier_arguments(meta), **kwargs
    )


def expected_of(name, arrays, meta):
    if name in PYTORCH:
        kinds = meta["head_kinds_in_call_order"]
        return expected(arrays, kinds, from_pytorch_order)
    kinds = "R" * meta["read_heads"] + "W" * meta["write_heads"]
    return expected(arrays, kinds, from_collier_order, "step.")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)]
)
@pytest.mark.parametrize("name", PYTORCH + COLLIER)
@needs_tensorflow
def test_a_converted_layer_equals_the_reference(name, dtype, tolerance):
    arrays, weights, meta = golden(name)
    layer = converted(name, weights, meta, dtype=dtype)
    values = expected_of(name, arrays, meta)
    assert set(values) >= {*PARTS, "reads"} - {"content_weighting"}
    computes(layer, arrays["x"], values, tolerance)


@pytest.mark.parametrize("name", PYTORCH + COLLIER)
@needs_tensorflow
def test_a_converted_layer_has_the_gradients_of_the_reference(name):
    """The reference's gradient along a direction of its weights equals the
    layer's along the converted direction."""
    import tensorflow as tf

    arrays, weights, meta = golden(name)

    def layer_of(weights):
        trained = dict.fromkeys(("initial_memory", "initial_reads"), "learned")
        return converted(name, weights, meta, dtype="float64", **trained)

    layer = layer_of(weights)
    assert len(layer.weights) == len(layer.trainable_weights)
    x = tf.constant(batch_first(arrays["x"]))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x) ** 2)
    close(loss, arrays["loss"], 1e-9)
    of_x, gradients = tape.gradient(loss, [x, layer.trainable_weights])
    close(of_x, batch_first(arrays["grad.x"]), 1e-7)
    rng = np.random.default_rng(3)
    for weight, value in weights.items():
        direction = rng.choice([-1.0, 1.0], value.shape)
        ends = [
            layer_of({**weights, weight: value + step}).get_weights()
            for step in (1e-4 * direction, -1e-4 * direction)
        ]
        slope = sum(
            np.sum(gradient * (end - start)) / 2e-4
            for gradient, end, start in zip(gradients, *ends, strict=True)
        )
        close(slope, np.sum(arrays[f"grad.{weight}"] * direction), 1e-7)


@pytest.mark.parametrize("name", PYTORCH + COLLIER)
def test_the_oracles_equal_the_reference(name):
    arrays, weights, meta = golden(name)
    prefix = "ntm." if name in PYTORCH else "ntm/"
    names = {n.removeprefix(prefix): w for n, w in weights.items()}
    if name in PYTORCH:
        kinds = meta["head_kinds_in_call_order"]
        values = reference.pytorch_ntm(names, arrays["x"], kinds)
    else:
        values = reference.collier_ntm(
            names, arrays["x"], **collier_arguments(meta)
        )
    values = expected_of(name, values, meta)
    for part, value in expected_of(name, arrays, meta).items():
        close(values[part], value, 1e-10)


# Oracles, for sizes and orders without stored results.


def drawn(shapes):
    rng = np.random.default_rng(13)
    return {n: rng.normal(size=s, scale=0.5) for n, s in shapes.items()}


def pytorch_weights(
    kinds, slots=7, width=5, units=11, layers=1, inputs=3, outputs=2
):
    """Random weights, named as the oracle wants them."""
    shapes = {
        "mem_bias": (slots, width),
        "controller.lstm_h_bias": (layers, 1, units),
        "controller.lstm_c_bias": (layers, 1, units),
    }
    reads = kinds.count("R")
    for index in range(reads):
        shapes[f"read{index}_bias"] = (1, width)
    for layer in range(layers):
        size = units if layer else inputs + reads * width
        shapes[f"controller.lstm.weight_ih_l{layer}"] = (4 * units, size)
        shapes[f"controller.lstm.weight_hh_l{layer}"] = (4 * units, units)
        shapes[f"controller.lstm.bias_ih_l{layer}"] = (4 * units,)
        shapes[f"controller.lstm.bias_hh_l{layer}"] = (4 * units,)
    for index, kind in enumerate(kinds):
        size = width + 6 if kind == "R" else 3 * width + 6
        name = f"heads.{index}.fc_{'read' if kind == 'R' else 'write'}"
        shapes |= {f"{name}.weight": (size, units), f"{name}.bias": (size,)}
    shapes["fc.weight"] = (outputs, units + reads * width)
    shapes["fc.bias"] = (outputs,)
    return drawn(shapes)


def collier_weights(
    read_heads,
    write_heads,
    shift_range=1,
    init_mode="learned",
    slots=7,
    width=5,
    units=11,
    layers=1,
    inputs=3,
    outputs=2,
):
    heads = read_heads + write_heads
    parameters = heads * (width + 4 + 2 * shift_range)
    parameters += 2 * write_heads * width
    reads = read_heads * width
    shapes = {START.format(i): (1, width) for i in range(read_heads)}
    for index in range(read_heads, read_heads + heads):
        shapes[START.format(index)] = (1, slots)
    if init_mode == "learned":
        shapes[START.format(read_heads + heads)] = (1, slots * width)
    else:
        shapes["init/init_M"] = (slots, width)
    for layer in range(layers):
        size = units + (units if layer else inputs + reads)
        shapes[CELL.format(layer, "kernel")] = (size, 4 * units)
        shapes[CELL.format(layer, "bias")] = (4 * units,)
    for name, size, columns in (
        ("o2p", units, parameters),
        ("o2o", units + reads, outputs),
    ):
        shapes[f"{name}/fully_connected/weights"] = (size, columns)
        shapes[f"{name}/fully_connected/biases"] = (columns,)
    return drawn(shapes)


def inputs_of(steps=5, batch=2, width=3):
    return np.random.default_rng(19).normal(size=(steps, batch, width))


def words(kinds):
    return tuple({"R": "read", "W": "write"}[kind] for kind in kinds)


@pytest.mark.parametrize(
    ("kinds", "sizes", "shape"),
    [
        ("RW", {}, {}),
        ("WR", {"layers": 2}, {}),
        ("RRW", {"layers": 3}, {}),
        ("WWWR", {"outputs": 1}, {}),
        ("RWWRW", {"slots": 13, "width": 2}, {}),
        ("WRRWRWR", {"units": 4}, {"batch": 1}),
        ("RWRWRWRWRWRW", {"units": 6}, {"steps": 2}),
        ("RW", {"slots": 3, "width": 1, "inputs": 1}, {"width": 1}),
        ("WR", {}, {"steps": 1, "batch": 1}),
    ],
    ids=str,
)
@needs_tensorflow
def test_pytorch_ntm_converts_in_other_sizes(kinds, sizes, shape):
    weights = pytorch_weights(kinds, **sizes)
    x = inputs_of(**shape)
    layer = convert.from_pytorch_ntm(weights, dtype="float64")
    assert layer.cell.head_order == words(kinds)
    values = reference.pytorch_ntm(weights, x, kinds)
    computes(layer, x, expected(values, kinds, from_pytorch_order), 1e-9)


@pytest.mark.parametrize(
    ("heads", "options", "sizes", "shape"),
    [
        ((1, 1), {}, {}, {}),
        ((2, 3), {"shift_range": 2}, {"layers": 2}, {}),
        ((3, 1), {"shift_range": 3, "init_mode": "constant"}, {}, {}),
        ((1, 3), {"shift_range": 0, "init_mode": "random"}, {}, {}),
        ((1, 2), {"addressing_mode": "content"}, {"outputs": 1}, {}),
        (
            (2, 1),
            {"addressing_mode": "content", "shift_range": 4},
            {"slots": 5},
            {},
        ),
        ((2, 2), {"init_mode": "random"}, {"layers": 3, "units": 5}, {}),
        ((2, 2), {}, {"slots": 3, "width": 2}, {"batch": 1}),
        ((1, 1), {"init_mode": "constant"}, {}, {"steps": 1, "batch": 1}),
    ],
    ids=str,
)
@needs_tensorflow
def test_collier_ntm_converts_in_other_sizes(heads, options, sizes, shape):
    made = {k: v for k, v in options.items() if k != "addressing_mode"}
    weights = collier_weights(*heads, **made, **sizes)
    x = inputs_of(**shape)
    layer = convert.from_collier_ntm(
        weights, *heads, **options, dtype="float64"
    )
    values = reference.collier_ntm(weights, x, *heads, **options)
    kinds = "R" * heads[0] + "W" * heads[1]
    values = expected(values, kinds, from_collier_order, "step.")
    computes(layer, x, values, 1e-9)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)]
)
@needs_tensorflow
def test_collier_ntm_converts_with_a_memory_near_zero(dtype, tolerance):
    """A constant initial memory is 1e-6."""
    weights = collier_weights(1, 1, init_mode="constant")
    weights["init/init_M"] *= 1e-6
    x = inputs_of()
    arguments = (1, 1, 1, "constant")
    layer = convert.from_collier_ntm(weights, *arguments, dtype=dtype)
    values = reference.collier_ntm(weights, x, *arguments)
    values = expected(values, "RW", from_collier_order, "step.")
    computes(layer, x, values, tolerance)


@needs_tensorflow
def test_collier_ntm_clips_interface_and_output():
    weights = collier_weights(1, 2)
    for name in ("o2p", "o2o"):
        weights[f"{name}/fully_connected/weights"] *= 100
    x = inputs_of()
    for clip_value in (20.0, 3.0):
        values = reference.collier_ntm(weights, x, 1, 2, clip_value=clip_value)
        assert np.abs(values["output"]).max() == clip_value
        given = {"interface_clip": 3.0, "clip_value": 3.0}
        layer = convert.from_collier_ntm(
            weights, 1, 2, dtype="float64", **(given if clip_value == 3 else {})
        )
        values = expected(values, "RWW", from_collier_order, "step.")
        computes(layer, x, values, 1e-9)


def ivy_as_collier(weights, layers, reads, heads):
    """ivy's names and layouts -> Collier's, of which it is a port."""
    cell = "ntm_cell."
    named = {
        "init/init_M": weights[cell + "memory"],
        "o2p/fully_connected/weights": weights[cell + "controller_proj.w"].T,
        "o2p/fully_connected/biases": weights[cell + "controller_proj.b"],
        "o2o/fully_connected/weights": weights[cell + "output_proj.w"].T,
        "o2o/fully_connected/biases": weights[cell + "output_proj.b"],
    }
    for index in range(reads):
        start = weights[f"{cell}read_weights.w_{index}"]
        named[START.format(index)] = start[None]
    for index in range(heads):
        start = weights[f"{cell}write_weights.w_{index}"]
        named[START.format(reads + index)] = start[None]
    for layer in range(layers):
        kernels = [
            weights[f"{cell}controller.{kind}.layer_{layer}.w"]
            for kind in ("input", "recurrent")
        ]
        i, f, candidate, o = np.split(np.concatenate(kernels), 4, axis=-1)
        kernel = np.concatenate([i, candidate, f, o], axis=-1)
        named[CELL.format(layer, "kernel")] = kernel
        named[CELL.format(layer, "bias")] = np.zeros(kernel.shape[1])
    return named


@pytest.mark.parametrize("name", IVY)
@needs_tensorflow
def test_the_first_step_equals_that_of_ivy(name):
    """Only the first step: ivy's erase lacks a pair of brackets, so that its
    memory differs from then on."""
    arrays, weights, meta = golden(name)
    reads, writes = meta["read_heads"], meta["write_heads"]
    shift_range = meta["options"].get("shift_range", 1)
    weights = ivy_as_collier(
        weights, meta["ctrl_layers"], reads, reads + writes
    )
    layer = convert.from_collier_ntm(
        weights, reads, writes, shift_range, "constant", dtype="float64"
    )
    for part in ("memory", "reads"):
        arrays[part] = arrays[f"step.{part}"]
    arrays["output"] = batch_first(arrays["output"])
    kinds = "R" * reads + "W" * writes
    values = expected(arrays, kinds, from_collier_order)
    values = {name: value[:, :1] for name, value in values.items()}
    faulty = values.pop("memory")
    x = batch_first(arrays["x"])[:1]
    computes(layer, x, values, 1e-9)
    memory = keras_memory.trace(layer, batch_first(x))["memory"]
    assert np.abs(memory - faulty).max() > 1e-2


# Names.


def state_dict(weights, encapsulated=True):
    """Weights under PyTorch's names: each head repeats the shared memory."""
    heads = {n.split(".")[1] for n in weights if n.startswith("heads.")}
    named = {n: w for n, w in weights.items() if n != "mem_bias"}
    for name in ("memory", *(f"heads.{i}.memory" for i in heads)):
        named[f"{name}.mem_bias"] = weights["mem_bias"]
    if encapsulated:
        named = {f"ntm.{name}": weight for name, weight in named.items()}
        named["memory.mem_bias"] = weights["mem_bias"]
    return named


@pytest.mark.parametrize("encapsulated", [True, False])
def test_names_of_a_state_dict_are_recognized(encapsulated):
    weights = pytorch_weights("RWR")
    layer = convert.from_pytorch_ntm(weights)
    other = convert.from_pytorch_ntm(
        state_dict(weights, encapsulated), head_order=["read", "write", "read"]
    )
    for weight, same in zip(layer.weights, other.weights, strict=True):
        close(same, ops.convert_to_numpy(weight), 0)


def test_names_of_a_data_parallel_model_are_recognized():
    weights = pytorch_weights("RW")
    named = {f"module.{n}": w for n, w in state_dict(weights).items()}
    layer = convert.from_pytorch_ntm(named)
    close(layer.cell.output_projection[1], weights["fc.bias"], 1e-7)


def test_heads_are_ordered_by_number():
    kinds = "RWRWRWRWRWWR"  # 10 and 11 must not sort before 2
    weights = dict(sorted(pytorch_weights(kinds).items()))
    layer = convert.from_pytorch_ntm(weights)
    assert layer.cell.head_order == words(kinds)


def as_tensorflow_numbers_them(name):
    for index in range(9):
        number = f"_{index}" if index else ""
        name = name.replace(
            f"learned_init_{index}/fully_connected", f"fully_connected{number}"
        )
    return name


@pytest.mark.parametrize("scopes", ["ntm/", "root/rnn/", ""])
def test_names_of_a_checkpoint_are_recognized(scopes):
    weights = collier_weights(2, 1)
    layer = convert.from_collier_ntm(weights, 2, 1)
    named = {
        f"{scopes}{as_tensorflow_numbers_them(name)}:0": weight
        for name, weight in weights.items()
    }
    assert f"{scopes}init/fully_connected/weights:0" in named
    assert f"{scopes}init/fully_connected_5/weights:0" in named
    other = convert.from_collier_ntm(named, 2, 1)
    for weight, same in zip(layer.weights, other.weights, strict=True):
        close(same, ops.convert_to_numpy(weight), 0)


# The converted layer.


def from_pytorch(weights=None, **kwargs):
    weights = pytorch_weights("RW") if weights is None else weights
    return convert.from_pytorch_ntm(weights, **kwargs)


def from_collier(weights=None, read_heads=1, write_heads=1, **kwargs):
    weights = collier_weights(1, 1) if weights is None else weights
    return convert.from_collier_ntm(weights, read_heads, write_heads, **kwargs)


each_converter = pytest.mark.parametrize(
    "converter", [from_pytorch, from_collier]
)


@each_converter
def test_converters_pass_arguments_to_the_layer(converter):
    layer = converter()
    assert isinstance(layer, keras_memory.NTMLayer) and layer.built
    assert layer.return_sequences and not layer.stateful
    other = converter(
        name="copy",
        dtype="mixed_bfloat16",
        return_sequences=False,
        return_state=True,
        trainable=False,
    )
    assert (other.name, other.compute_dtype) == ("copy", "bfloat16")
    assert other.return_state and not other.trainable_weights
    output = other(batch_first(inputs_of()))[0]
    assert output.shape == (2, 2)


def test_learned_starts_are_trained_and_fixed_ones_are_not():
    def trained(layer):
        return {
            weight.name: weight.trainable
            for weight in layer.weights
            if weight.name.startswith("initial_")
        }

    assert trained(from_pytorch()) == {
        "initial_reads": False,
        "initial_memory": False,
        "initial_controller": True,
        "initial_controller_1": True,
    }
    more = from_pytorch(initial_memory="learned", initial_reads="learned")
    assert all(trained(more).values())
    assert set(trained(from_collier())) == {
        "initial_reads",
        "initial_memory",
        "initial_read_weighting",
        "initial_write_weighting",
    }


@each_converter
def test_a_stateful_layer_continues_from_its_state(converter):
    x = batch_first(inputs_of()).astype("float32")
    whole = converter()(x)
    layer = converter(stateful=True)
    chunks = [layer(x[:, :2]), layer(x[:, 2:])]
    close(ops.concatenate(chunks, axis=1), ops.convert_to_numpy(whole), 1e-6)


@each_converter
def test_a_converted_layer_is_saved_and_loaded(converter, tmp_path):
    layer = converter(initial_memory="learned")
    model = keras.Sequential([keras.Input((None, 3)), layer])
    x = batch_first(inputs_of()).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(x), ops.convert_to_numpy(model(x)), 0)


# The command.


def run(capsys, checkpoint, out):
    """Exit code and the lines on stderr."""
    code = cli.main(["convert", "pytorch-ntm", str(checkpoint), str(out)])
    return code, capsys.readouterr().err.splitlines()


def tensors(weights):
    torch = pytest.importorskip("torch", reason="reads PyTorch's files")
    return {
        name: torch.tensor(weight, dtype=torch.float32)
        for name, weight in weights.items()
    }


def save(path, document, **kwargs):
    torch = pytest.importorskip("torch", reason="reads PyTorch's files")
    torch.save(document, path, **kwargs)
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "npz"])
def test_the_command_converts(form, tmp_path, capsys):
    weights = pytorch_weights("WRW", layers=2)
    named = state_dict(weights)
    if form == "npz":
        checkpoint = tmp_path / "weights.npz"
        np.savez(checkpoint, **named)
    else:
        checkpoint = save(
            tmp_path / "checkpoint.model",
            tensors(named),
            _use_new_zipfile_serialization=form == "zip",
        )
    out = tmp_path / "ntm.keras"
    code, errors = run(capsys, checkpoint, out)
    assert (code, errors) == (0, [])
    model = keras.models.load_model(out)
    assert model.input_shape == (None, None, 3)
    assert model.output_shape == (None, None, 2)
    x = inputs_of()
    values = reference.pytorch_ntm(weights, x, "WRW")
    close(model(batch_first(x)), batch_first(values["output"]), 1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {
        checkpoint.name,
        "ntm.keras",
    }


class Trap:
    """Makes a folder if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.mkdir, (pathlib.Path(self.path),)


def is_refused(capsys, checkpoint, out, message):
    before = {path: path.stat() for path in out.parent.glob("*")}
    code, errors = run(capsys, checkpoint, out)
    assert code == 2
    (line,) = errors
    assert line.startswith("keras-memory: error: ") and message in line
    after = {path: path.stat() for path in out.parent.glob("*")}
    assert set(after) == set(before)
    assert all(
        after[path].st_mtime_ns == stat.st_mtime_ns
        for path, stat in before.items()
    )


@pytest.mark.parametrize("form", ["zip", "legacy", "npz"])
def test_the_command_executes_no_pickled_code(form, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    trap = Trap(str(folder / "sprung"))
    checkpoint = tmp_path / f"checkpoint.{'npz' if form == 'npz' else 'model'}"
    weights = state_dict(pytorch_weights("RW"))
    if form == "npz":
        np.savez(checkpoint, **weights, more=np.array(trap, dtype=object))
    else:
        save(
            checkpoint,
            {**tensors(weights), "more": trap},
            _use_new_zipfile_serialization=form == "zip",
        )
    is_refused(capsys, checkpoint, folder / "ntm.keras", checkpoint.name)


@pytest.mark.parametrize("ending", ["model", "npz"])
def test_the_command_refuses_a_damaged_file(ending, tmp_path, capsys):
    checkpoint = tmp_path / f"checkpoint.{ending}"
    weights = state_dict(pytorch_weights("RW"))
    if ending == "npz":
        np.savez(checkpoint, **weights)
    else:
        save(checkpoint, tensors(weights))
    content = checkpoint.read_bytes()
    folder = tmp_path / "out"
    folder.mkdir()
    for damaged in (
        content[: len(content) // 2],
        content[:20],
        b"",
        b"no checkpoint",
    ):
        checkpoint.write_bytes(damaged)
        is_refused(capsys, checkpoint, folder / "ntm.keras", checkpoint.name)


def test_the_command_refuses_anything_but_a_state_dict(tmp_path, capsys):
    weights = tensors(state_dict(pytorch_weights("RW")))
    folder = tmp_path / "out"
    folder.mkdir()
    for document, message in (
        (list(weights.values()), "checkpoint.model"),
        ({"epoch": 3, **weights}, "checkpoint.model"),
        ({"model": weights}, "checkpoint.model"),
        (
            {**weights, "a": weights["ntm.fc.bias"] * 1j},
            "with other entries: ['a'",
        ),
        ({**weights, "b": weights["ntm.fc.bias"].to_sparse()}, "['b']"),
        ({**weights, "ntm.fc.bias": weights["ntm.fc.bias"][:1]}, "fc.weight"),
    ):
        checkpoint = save(tmp_path / "checkpoint.model", document)
        is_refused(capsys, checkpoint, folder / "ntm.keras", message)


def test_the_command_reports_unreadable_and_unwritable_files(
    tmp_path, capsys, monkeypatch
):
    checkpoint = tmp_path / "weights.npz"
    np.savez(checkpoint, **state_dict(pytorch_weights("RW")))
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "ntm.keras"
    is_refused(capsys, tmp_path / "absent.model", out, "absent.model")
    is_refused(capsys, tmp_path, out, tmp_path.name)
    for name in ("ntm.h5", "ntm"):
        is_refused(capsys, checkpoint, folder / name, name)
    is_refused(
        capsys, checkpoint, folder / "none" / "ntm.keras", "none/ntm.keras"
    )

    def save(model, path):
        pathlib.Path(path).write_text("half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", save)
        is_refused(capsys, checkpoint, out, "the disk is full")
    out.write_text("mine")
    is_refused(capsys, checkpoint, out, out.name)
    assert out.read_text() == "mine"
