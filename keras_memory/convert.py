"""Weights of the reference implementations -> layers of this library."""

import pickle
import re

import keras
import numpy as np

from keras_memory.checks import check_between
from keras_memory.checks import check_bool
from keras_memory.checks import check_clip
from keras_memory.checks import check_size
from keras_memory.dnc import DNCInterface
from keras_memory.dnc import DNCLayer
from keras_memory.files import check_path
from keras_memory.memory_wrap import BaselineMemory
from keras_memory.memory_wrap import MemoryWrapLayer
from keras_memory.ntm import NTMInterface
from keras_memory.ntm import NTMLayer
from keras_memory.recurrent import controllers


def from_pytorch_ntm(weights, head_order=None, **layer_kwargs):
    """Makes an NTM of the weights of loudinthecloud/pytorch-ntm.

    The layer computes what the reference computes: `NTM.forward`, step by
    step, from a new sequence on.

    Departures, where the reference divides by next to nothing: it adds 1e-16
    to memory and key and bounds the product of their norms by 1e-8, and does
    not quite normalise a weighting whose powers sum to less than about 1e-8,
    which needs an interpolation gate as low in the first step. The initial
    memory and reads, which it never trains, are weights that are not trained;
    `initial_memory="learned"`, `initial_reads="learned"` train them.

    Args:
        weights: dict of arrays, a state dict of `EncapsulatedNTM` or of the
            `NTM` inside it; the leading `ntm.` and `memory.` may be absent.
        head_order: the reference's list of heads, such as `("read", "write",
            "read", "write")`; None takes it from the names in `weights`.
        **layer_kwargs: arguments of `NTMLayer` that the weights leave open:
            `dtype`, `name`, `stateful`, ... `return_sequences` is True by
            default.

    Returns:
        A built `NTMLayer`. Its read heads are numbered in the order in which
        they come in the list, and so are its write heads. Of a stateful one
        the cell is built, and the states come with the first batch.

    Raises:
        ValueError: arrays are missing, too many or misshapen, or hold
            anything but finite numbers; `head_order` is not that of the
            weights; an argument is one that the weights determine; there are
            fewer than 3 slots, which a shift by one goes around.

    Example:

    >>> file = np.load("tests/goldens/pytorch_ntm__2r2w_b.npz")
    >>> weights = {n[2:]: file[n] for n in file.files if n.startswith("w.")}
    >>> layer = keras_memory.convert.from_pytorch_ntm(
    ...     weights, ("read", "write", "read", "write")
    ... )
    >>> layer(np.zeros((2, 7, 3), "float32")).shape
    TensorShape([2, 7, 5])
    """
    weights = _arrays(weights, _pytorch_name)
    heads = {}
    for name in weights:
        if match := re.fullmatch(r"heads\.(\d+)\.fc_(\w+)\.\w+", name):
            heads[int(match[1])] = match[2]
    if not heads:
        raise ValueError(
            "`weights` must have heads, such as 'heads.0.fc_read.weight'. "
            f"Received: {sorted(weights)}"
        )
    in_weights = tuple(heads[index] for index in sorted(heads))
    if head_order is None:
        head_order = in_weights
    if isinstance(head_order, list):
        head_order = tuple(head_order)
    if head_order != in_weights or set(head_order) != {"read", "write"}:
        raise ValueError(
            "`head_order` must have read and write heads, and be that of the "
            f"weights, whose names say {in_weights}. "
            f"Received: head_order={head_order!r}"
        )
    readers = [i for i, kind in enumerate(head_order) if kind == "read"]
    writers = [i for i, kind in enumerate(head_order) if kind == "write"]
    lstm = "controller.lstm"
    layers = _torch_layers(weights, lstm)

    sizes = _Sizes(weights)
    slots, _ = sizes.of("mem_bias", 2)
    _, width = sizes.of("read0_bias", 2)
    (outputs,) = sizes.of("fc.bias", 1)
    *_, controller_units = sizes.of(f"{lstm}_h_bias", 3)
    reads_size = len(readers) * width
    inputs = sizes.rest(f"{lstm}.weight_ih_l0", 1, reads_size)
    shapes = {
        "mem_bias": (slots, width),
        "fc.weight": (outputs, controller_units + reads_size),
        "fc.bias": (outputs,),
        f"{lstm}_h_bias": (layers, 1, controller_units),
        f"{lstm}_c_bias": (layers, 1, controller_units),
    }
    for read in range(len(readers)):
        shapes[f"read{read}_bias"] = (1, width)
    shapes |= _torch_shapes(
        lstm, "lstm", layers, inputs + reads_size, controller_units
    )
    for index, kind in enumerate(head_order):
        size = width + 6 + (2 * width if kind == "write" else 0)
        name = f"heads.{index}.fc_{kind}"
        shapes[f"{name}.weight"] = (size, controller_units)
        shapes[f"{name}.bias"] = (size,)
    _check_shapes(weights, shapes, sizes)

    def head(index):
        kind = head_order[index]
        columns = _torch_linear(weights, f"heads.{index}.fc_{kind}")
        parts = _split(columns, width, 1, 1, 3, 1, width, width)
        # Its first shift moves the focus by +1, its last by -1.
        parts[3] = parts[3][:, ::-1]
        return _head(parts, kind == "write")

    start = [
        np.stack(
            [weights[f"read{read}_bias"][0] for read in range(len(readers))]
        ),
        weights["mem_bias"],
        None,
        None,
    ]
    for layer in range(layers):
        for state in ("h", "c"):
            start.append(weights[f"{lstm}_{state}_bias"][layer, 0])
    layer = _layer(
        NTMLayer,
        layer_kwargs,
        determined={
            "units": outputs,
            "memory_slots": slots,
            "slot_size": width,
            "read_heads": len(readers),
            "write_heads": len(writers),
            "controller": "lstm",
            "controller_units": controller_units,
            "controller_layers": layers,
            "head_order": head_order,
            "addressing": "content_and_location",
            "shift_range": 1,
            "erase": True,
            "writing": "addressed",
            "key_activation": "linear",
            "add_activation": "linear",
            "strength_activation": "softplus",
            "activation": "sigmoid",
            "initial_weighting": 0.0,
            "norm_epsilon": _NORM_EPSILON,
            "product_epsilon": 0.0,
        },
        start={
            "initial_memory": "random",
            "initial_reads": "random",
            "initial_controller_state": "learned",
        },
    )
    return _assign(
        layer,
        inputs,
        [_torch_controller(weights, lstm, "lstm", layers)],
        [_interface([head(index) for index in readers + writers])],
        _torch_linear(weights, "fc"),
        start,
    )


def from_collier_ntm(
    weights,
    read_heads,
    write_heads,
    shift_range=1,
    init_mode="learned",
    addressing_mode="content_and_location",
    **layer_kwargs,
):
    """Makes an NTM of the weights of MarkPKCollier/NeuralTuringMachine.

    The layer computes what the reference's `NTMCell` computes (Collier & Beel
    2018). Where that trains a weight behind a tanh (initial reads, and the
    initial memory unless `init_mode="constant"`), the layer trains the value
    itself. Departure: `shift_range=0` is no shift; the reference, whose list
    of shifts then goes wrong, moves by one and by two slots.

    Args:
        weights: dict of arrays with the names of a TensorFlow 1 checkpoint
            (`tf.train.load_checkpoint`), without an optimizer's variables.
            Names may begin with any scope and end in `:0`.
        read_heads: int, at least 1.
        write_heads: int, at least 1.
        shift_range: int, at least 0, as the reference was made with.
        init_mode: `"learned"`, `"constant"` or `"random"`, likewise.
        addressing_mode: `"content_and_location"` or `"content"`, likewise.
            The weights cannot tell if this, or "random" for "constant", is
            wrong.
        **layer_kwargs: arguments of `NTMLayer` that the weights leave open:
            `dtype`, `name`, `stateful`, ... By default `return_sequences` is
            True, and `interface_clip` and `clip_value` are 20, the default of
            the reference's `clip_value`.

    Returns:
        A built `NTMLayer`; of a stateful one the cell is built, and the states
        come with the first batch.

    Raises:
        ValueError: arrays are missing, too many or misshapen, or hold
            anything but finite numbers; an argument is out of its range, or
            is one that the weights determine.

    Example:

    >>> file = np.load("tests/goldens/collier_ntm__a.npz")
    >>> weights = {n[2:]: file[n] for n in file.files if n.startswith("w.")}
    >>> layer = keras_memory.convert.from_collier_ntm(weights, 1, 1)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 3])

    References:
        Collier, Beel (2018), Implementing Neural Turing Machines,
        https://arxiv.org/abs/1807.08518
    """
    check_size("read_heads", read_heads)
    check_size("write_heads", write_heads)
    check_size("shift_range", shift_range, least=0)
    for name, value, allowed in (
        ("init_mode", init_mode, ("learned", "constant", "random")),
        (
            "addressing_mode",
            addressing_mode,
            ("content_and_location", "content"),
        ),
    ):
        if value not in allowed:
            raise ValueError(
                f"`{name}` must be one of {allowed}. Received: {name}={value!r}"
            )
    by_location = addressing_mode == "content_and_location"
    weights = _arrays(weights, _collier_name)
    cell = "controller/multi_rnn_cell/cell_{}/basic_lstm_cell/{}"
    layers = sum(name.endswith("cell/kernel") for name in weights)
    heads = read_heads + write_heads
    initial = [
        f"init/learned_init_{index}/fully_connected/weights"
        for index in range(read_heads + heads + 1)
    ]
    *initial, initial_memory = initial
    if init_mode != "learned":
        initial_memory = "init/init_M"

    sizes = _Sizes(weights)
    _, width = sizes.of(initial[0], 2)
    _, slots = sizes.of(initial[read_heads], 2)
    (outputs,) = sizes.of("o2o/fully_connected/biases", 1)
    (gates,) = sizes.of(cell.format(0, "bias"), 1)
    controller_units = gates // 4
    reads_size = read_heads * width
    inputs = sizes.rest(
        cell.format(0, "kernel"), 0, reads_size + controller_units
    )
    shifts = 2 * shift_range + 1
    interface = heads * (width + 3 + shifts) + 2 * write_heads * width
    shapes = {
        initial_memory: (
            (1, slots * width) if init_mode == "learned" else (slots, width)
        ),
        "o2p/fully_connected/weights": (controller_units, interface),
        "o2p/fully_connected/biases": (interface,),
        "o2o/fully_connected/weights": (controller_units + reads_size, outputs),
        "o2o/fully_connected/biases": (outputs,),
    }
    for index, name in enumerate(initial):
        shapes[name] = (1, width if index < read_heads else slots)
    for layer in range(layers):
        size = controller_units if layer else inputs + reads_size
        shapes[cell.format(layer, "kernel")] = (
            size + controller_units,
            4 * controller_units,
        )
        shapes[cell.format(layer, "bias")] = (4 * controller_units,)
    _check_shapes(weights, shapes, sizes)

    def linear(name):
        kernel = weights[f"{name}/fully_connected/weights"]
        bias = weights[f"{name}/fully_connected/biases"]
        return np.concatenate([kernel, bias[None]])

    columns = _split(
        linear("o2p"),
        *[width + 3 + shifts] * heads,
        *[width] * (2 * write_heads),
    )
    offsets = range(-shift_range, shift_range + 1)

    def head(index):
        parts = _split(columns[index], width, 1, 1, shifts, 1)
        # Shifts come in the order 0, +1, ..., -1.
        parts[3] = parts[3][:, [offset % shifts for offset in offsets]]
        if not by_location:
            parts[2:5] = None, None, None
        write = index - read_heads
        if write >= 0:
            at = heads + 2 * write
            parts += columns[at : at + 2]
        return _head(parts, write >= 0)

    controller = []
    for layer in range(layers):
        controller += _tensorflow_lstm(
            weights[cell.format(layer, "kernel")],
            weights[cell.format(layer, "bias")],
        )
    memory = weights[initial_memory].reshape(slots, width)
    of_start = [weights[name][0] for name in initial]
    start = [
        np.tanh(of_start[:read_heads]),
        memory if init_mode == "constant" else np.tanh(memory),
        np.stack(of_start[read_heads : 2 * read_heads]),
        np.stack(of_start[2 * read_heads :]),
    ]
    layer = _layer(
        NTMLayer,
        {"interface_clip": 20.0, "clip_value": 20.0, **layer_kwargs},
        determined={
            "units": outputs,
            "memory_slots": slots,
            "slot_size": width,
            "read_heads": read_heads,
            "write_heads": write_heads,
            "controller": "lstm",
            "controller_units": controller_units,
            "controller_layers": layers,
            "head_order": "writes_in_turn",
            "addressing": addressing_mode,
            "shift_range": shift_range,
            "erase": True,
            "writing": "addressed",
            "key_activation": "tanh",
            "add_activation": "tanh",
            "strength_activation": "softplus",
            "activation": None,
            "initial_controller_state": "constant",
            "norm_epsilon": _NORM_EPSILON,
            "product_epsilon": 1e-8,
        },
        start={
            "initial_memory": "learned",
            "initial_reads": "learned",
            "initial_weighting": "learned",
        },
    )
    return _assign(
        layer,
        inputs,
        [controller],
        [_interface([head(index) for index in range(heads)])],
        linear("o2o"),
        start,
    )


def from_deepmind_dnc(weights, memory_slots, clip_value=None, **layer_kwargs):
    """Makes a DNC of the weights of google-deepmind/dnc.

    The layer computes what the reference's `dnc.DNC` computes, also where
    that differs from the paper: strengths are a softplus (not 1 more), usage
    passes no gradient to the write weightings.

    Args:
        weights: dict of arrays with the names of a TensorFlow 1 checkpoint
            (`tf.train.load_checkpoint`), without an optimizer's variables.
            Names may begin with any scope and end in `:0`.
        memory_slots: int, at least 1, `memory_size` of the reference.
        clip_value: float above 0 or None, as the reference was made with
            (its `train.py` has 20): clips controller output, controller state
            and output.
        **layer_kwargs: arguments of `DNCLayer` that the weights leave open:
            `dtype`, `name`, `stateful`, ... `return_sequences` is True by
            default.

    Returns:
        A built `DNCLayer`; of a stateful one the cell is built, and the states
        come with the first batch.

    Raises:
        ValueError: arrays are missing, too many or misshapen, or hold
            anything but finite numbers; an argument is out of its range, or
            is one that the weights determine.

    Example:

    >>> file = np.load("tests/goldens/dm_dnc__full_b.npz")
    >>> weights = {n[2:]: file[n] for n in file.files if n.startswith("w.")}
    >>> layer = keras_memory.convert.from_deepmind_dnc(weights, 5)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 4])
    """
    check_size("memory_slots", memory_slots)
    check_clip("clip_value", clip_value)
    weights = _arrays(weights, _deepmind_name)
    sizes = _Sizes(weights)
    (outputs,) = sizes.of("output_linear/b", 1)
    (readers,) = sizes.of("memory_access/read_strengths/b", 1)
    (writers,) = sizes.of("memory_access/write_strengths/b", 1)
    (keys,) = sizes.of("memory_access/read_keys/b", 1)
    (gates,) = sizes.of("lstm/b_gates", 1)
    width, units = keys // readers, gates // 4
    inputs = sizes.rest("lstm/w_gates", 0, readers * width + units)
    parts = DNCInterface(
        read_key=("read_keys", readers * width),
        read_strength=("read_strengths", readers),
        write_key=("write_keys", writers * width),
        write_strength=("write_strengths", writers),
        erase_vector=("erase_vectors", writers * width),
        add_vector=("write_vectors", writers * width),
        free_gate=("free_gate", readers),
        allocation_gate=("allocation_gate", writers),
        write_gate=("write_gate", writers),
        read_mode=("read_mode", readers * (2 * writers + 1)),
        **_NO_OPTIONS,
    )
    shapes = {
        "lstm/w_gates": (inputs + readers * width + units, 4 * units),
        "lstm/b_gates": (4 * units,),
        "output_linear/w": (units + readers * width, outputs),
        "output_linear/b": (outputs,),
    }
    for name, size in filter(None, parts):
        shapes[f"memory_access/{name}/w"] = (units, size)
        shapes[f"memory_access/{name}/b"] = (size,)
    _check_shapes(weights, shapes, sizes)

    def linear(name):
        return np.concatenate(
            [weights[f"{name}/w"], weights[f"{name}/b"][None]]
        )

    columns = DNCInterface(
        *[part and linear(f"memory_access/{part[0]}") for part in parts]
    )
    layer = _layer(
        DNCLayer,
        layer_kwargs,
        determined={
            "units": outputs,
            "memory_slots": memory_slots,
            "slot_size": width,
            "read_heads": readers,
            "write_heads": writers,
            "controller": "lstm",
            "controller_units": units,
            "controller_layers": 1,
            "controller_clip": clip_value,
            "controller_state_clip": clip_value,
            "clip_value": clip_value,
            "layers": 1,
            "usage_gradient": False,
            "key_activation": "linear",
            "add_activation": "linear",
            "norm_epsilon": 1e-6,
            **_OF_BOTH_DNCS,
        },
    )
    return _assign(
        layer,
        inputs,
        [_tensorflow_lstm(weights["lstm/w_gates"], weights["lstm/b_gates"])],
        [_dnc_interface(columns, readers, writers)],
        linear("output_linear"),
    )


def from_pytorch_dnc(
    weights,
    memory_slots,
    read_heads,
    nonlinearity="tanh",
    clip=20.0,
    **layer_kwargs,
):
    """Makes a DNC of the weights of ixaxaar/pytorch-dnc, 1.1.0 or 2.0.0b1.

    The layer computes what the reference's `DNC` computes when it is called
    one step at a time with its state handed on, also where that differs from
    the paper: strengths are a softplus (not 1 more), keys and write vectors
    pass a tanh.

    Departures: within one call the reference never feeds reads back to the
    controller; the layer always does. The reference draws the controller's
    initial state anew at each call; here it is 0, unless
    `initial_controller_state` says otherwise. With one memory for several
    layers the reference has one set of interface weights for all; here each
    layer has its own, which start equal.

    Args:
        weights: dict of arrays, a state dict of `DNC`; names may begin with
            `module.`.
        memory_slots: int, at least 1, `nr_cells` of the reference.
        read_heads: int, at least 1, likewise. Few wrong numbers fit the
            weights, but those cannot be told.
        nonlinearity: `"tanh"` or `"relu"`, of `rnn_type="rnn"`.
        clip: float, at least 0, as the reference was made with: clips the
            controllers' outputs; 0 or None does not.
        **layer_kwargs: arguments of `DNCLayer` that the weights leave open:
            `dtype`, `name`, `stateful`, ... `return_sequences` is True by
            default.

    Returns:
        A built `DNCLayer`; of a stateful one the cell is built, and the states
        come with the first batch.

    Raises:
        ValueError: arrays are missing, too many or misshapen, or hold
            anything but finite numbers; an argument is out of its range, or
            is one that the weights determine.

    Example:

    >>> name = "pytorch_dnc_stepwise__lstm_1l_shared_r2_a.npz"
    >>> file = np.load(f"tests/goldens/{name}")
    >>> weights = {n[2:]: file[n] for n in file.files if n.startswith("w.")}
    >>> layer = keras_memory.convert.from_pytorch_dnc(weights, 7, 2)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 4])
    """
    check_size("memory_slots", memory_slots)
    check_size("read_heads", read_heads)
    if clip is not None:
        check_between("clip", clip, 0)
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(
            "`nonlinearity` must be 'tanh' or 'relu'. "
            f"Received: nonlinearity={nonlinearity!r}"
        )
    weights = _arrays(weights, _torch_name)
    rnns = [
        re.fullmatch(r"((\w+)_layer_\d+)\.weight_ih_l0", name)
        for name in weights
    ]
    kinds = {match[2] for match in rnns if match}
    if len(kinds) != 1 or not kinds <= set(_TORCH_GATES):
        raise ValueError(
            "`weights` must have controllers of one kind, such as "
            f"'lstm_layer_0.weight_ih_l0'. Received: {sorted(weights)}"
        )
    (kind,) = kinds
    if nonlinearity != "tanh" and kind != "rnn":
        raise ValueError(
            f"`nonlinearity` must be 'tanh' for these weights, of {kind!r}: "
            "only 'rnn' has a choice. "
            f"Received: nonlinearity={nonlinearity!r}"
        )
    layers = len(list(filter(None, rnns)))
    first = f"{kind}_layer_0"
    hidden_layers = _torch_layers(weights, first)
    bias = any(".bias_ih_l" in n or ".bias_hh_l" in n for n in weights)
    shared = any("memory_shared" in name for name in weights)
    memories = [
        f"rnn_layer_memory_{'shared' if shared else layer}"
        for layer in range(layers)
    ]
    apart = any("_transform." in name for name in weights)

    sizes = _Sizes(weights)
    (outputs,) = sizes.of("output.bias", 1)
    _, units = sizes.of(f"{first}.weight_hh_l0", 2)
    reads_size = sizes.rest("output.weight", 1, units)
    width, rest = divmod(reads_size, read_heads)
    if rest:
        raise ValueError(
            "`read_heads` must divide the width of all reads, which is "
            f"{reads_size} by 'output.weight'. "
            f"Received: read_heads={read_heads}"
        )
    sizes.sources.append(f"read_heads={read_heads}")
    inputs = sizes.rest(f"{first}.weight_ih_l0", 1, reads_size)
    # As they follow one another where they are in one matrix.
    parts = {
        "read_key": ("read_keys", read_heads * width),
        "read_strength": ("read_strengths", read_heads),
        "write_key": ("write_key", width),
        "write_strength": ("write_strength", 1),
        "erase_vector": ("erase_vector", width),
        "add_vector": ("write_vector", width),
        "free_gate": ("free_gates", read_heads),
        "allocation_gate": ("allocation_gate", 1),
        "write_gate": ("write_gate", 1),
        "read_mode": ("read_modes", 3 * read_heads),
    }
    shapes = {
        "output.weight": (outputs, units + reads_size),
        "output.bias": (outputs,),
    }
    for layer in range(layers):
        width_in = (units if layer else inputs) + reads_size
        shapes |= _torch_shapes(
            f"{kind}_layer_{layer}", kind, hidden_layers, width_in, units, bias
        )
    for memory in set(memories):
        linears = {"interface_weights": sum(n for _, n in parts.values())}
        if apart:
            linears = {f"{n}_transform": size for n, size in parts.values()}
        for name, size in linears.items():
            shapes[f"{memory}.{name}.weight"] = (size, units)
            shapes[f"{memory}.{name}.bias"] = (size,)
    _check_shapes(weights, shapes, sizes)

    def interface(memory):
        if apart:
            columns = [
                _torch_linear(weights, f"{memory}.{name}_transform")
                for name, _ in parts.values()
            ]
        else:
            columns = _split(
                _torch_linear(weights, f"{memory}.interface_weights"),
                *[size for _, size in parts.values()],
            )
        columns = DNCInterface(**dict(zip(parts, columns)), **_NO_OPTIONS)
        return _dnc_interface(columns, read_heads, write_heads=1)

    layer = _layer(
        DNCLayer,
        layer_kwargs,
        determined={
            "units": outputs,
            "memory_slots": memory_slots,
            "slot_size": width,
            "read_heads": read_heads,
            "write_heads": 1,
            "controller": _torch_cells(
                kind,
                units,
                hidden_layers,
                nonlinearity,
                bias,
                layer_kwargs,
            ),
            "controller_units": units,
            "controller_layers": hidden_layers,
            "controller_clip": clip or None,
            "controller_state_clip": None,
            "clip_value": None,
            "layers": layers,
            "share_memory": shared,
            "usage_gradient": True,
            "key_activation": "tanh",
            "add_activation": "tanh",
            "norm_epsilon": _NORM_EPSILON,
            **_OF_BOTH_DNCS,
        },
    )
    return _assign(
        layer,
        inputs,
        [
            _torch_controller(
                weights, f"{kind}_layer_{layer}", kind, hidden_layers, bias
            )
            for layer in range(layers)
        ],
        [interface(memory) for memory in memories],
        _torch_linear(weights, "output"),
    )


def from_memorywrap(weights, baseline=False, **layer_kwargs):
    """Makes a Memory Wrap of the weights of KRLGroup's memorywrap 1.1.7.

    The layer computes what the reference computes.

    Args:
        weights: dict of arrays, a state dict of `MemoryWrapLayer` or
            `BaselineMemory` with its own classifier or with one linear layer
            in its place; names may begin with `module.`. Of a larger model:
            those of its layer, without the layer's name.
        baseline: bool, whether they are of `BaselineMemory`; the weights do
            not tell.
        **layer_kwargs: arguments of our layer that the weights leave open:
            `distance` as the reference was made with, `top_k`, `dtype`,
            `name`, ...

    Returns:
        A built `MemoryWrapLayer` or `BaselineMemory`.

    Raises:
        ValueError: arrays are missing, too many or misshapen, or hold
            anything but finite numbers; an argument is one that the weights
            determine.

    Example:

    >>> file = np.load("tests/goldens/memorywrap__a.npz")
    >>> start = "MemoryWrapLayer.w."
    >>> weights = {
    ...     n.removeprefix(start): file[n]
    ...     for n in file.files if n.startswith(start)
    ... }
    >>> layer = keras_memory.convert.from_memorywrap(weights)
    >>> layer([np.zeros((2, 6)), np.zeros((9, 6))]).shape
    TensorShape([2, 3])
    """
    check_bool("baseline", baseline)
    weights = _arrays(weights, _torch_name)
    sizes = _Sizes(weights)
    linear = "classifier.weight" in weights
    names = ["classifier"] if linear else ["classifier.fc1", "classifier.fc2"]
    shapes = {}
    _, features = sizes.of(f"{names[0]}.weight", 2)
    size = features
    for name in names:
        (units,) = sizes.of(f"{name}.bias", 1)
        shapes[f"{name}.weight"] = (units, size)
        shapes[f"{name}.bias"] = (units,)
        size = units
    _check_shapes(weights, shapes, sizes)
    if features % 2 and not baseline:
        raise ValueError(
            f"{names[0] + '.weight'!r} must see encodings and as much of the "
            "memory, an even number of features; those of `BaselineMemory` "
            f"need baseline=True. Received: {features} features"
        )
    dtype = layer_kwargs.get("dtype")
    layers = [keras.layers.Dense(units, dtype=dtype)]
    if not linear:
        hidden = len(weights["classifier.fc1.bias"])
        layers.insert(0, keras.layers.Dense(hidden, "relu", dtype=dtype))
    layer = _layer(
        BaselineMemory if baseline else MemoryWrapLayer,
        layer_kwargs,
        determined={
            "units": units,
            "head": None,
            "classifier": layers[0] if linear else keras.Sequential(layers),
        },
    )
    layer.build((None, features if baseline else features // 2))
    for dense, name in zip(layers, names, strict=True):
        kernel_and_bias = _torch_linear(weights, name)
        dense.set_weights([kernel_and_bias[:-1], kernel_and_bias[-1]])
    return layer


def read_pytorch_checkpoint(path):
    """Reads a state dict from a file, and executes nothing in it.

    Args:
        path: path of what `torch.save(net.state_dict(), path)` wrote, for
            which torch must be installed, or of an `.npz` of arrays.

    Returns:
        Dict of NumPy arrays.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, or has anything but arrays in it.
        ImportError: torch is not installed.
    """
    path = check_path("path", path)
    with path.open("rb") as file:  # an error of its own if that cannot be
        if path.suffix == ".npz":
            try:
                return dict(np.load(file, allow_pickle=False))
            except Exception as error:
                raise ValueError(
                    "An .npz file must be an archive of arrays. "
                    f"{path}: {error}"
                ) from error
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Checkpoints of PyTorch are read by PyTorch: pip install torch. "
            "Or save the arrays to an .npz file where it is installed"
        ) from error
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "A checkpoint must have tensors only, and no objects that would "
            f"run code when they are read, as {path} has, or it is damaged"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"A checkpoint must be a state dict saved by `torch.save`. {path} "
            f"is empty, damaged or something else: {error!r}"
        ) from error
    tensors = document if isinstance(document, dict) else {"": document}
    wrong = [
        name
        for name, t in tensors.items()
        if not torch.is_tensor(t)
        or t.layout != torch.strided
        or t.device.type != "cpu"
        or t.is_quantized
        or t.is_complex()
    ]
    if wrong:
        raise ValueError(
            "A checkpoint must be a state dict: names and dense tensors of "
            f"real numbers. Received: {path}, where these are none: {wrong}"
        )
    return {name: t.detach().double().numpy() for name, t in tensors.items()}


# The references have no epsilon in their norms, which gives NaN for a zero
# vector; this one is too small to be seen beside any other.
_NORM_EPSILON = 1e-30

# What the two DNCs have in common, and an interface without our options.
_OF_BOTH_DNCS = {
    "linkage": True,
    "sparse_links": None,
    "content_masks": False,
    "deallocation": False,
    "link_sharpening": False,
    "interface_layer_norm": False,
    "strength_activation": "softplus",
    "activation": None,
    "product_epsilon": 1e-6,
    "usage_epsilon": 1e-6,
}
_NO_OPTIONS = {
    "read_mask": None,
    "write_mask": None,
    "forward_sharpening": None,
    "backward_sharpening": None,
}


def _pytorch_name(name):
    name = name.removeprefix("module.").removeprefix("ntm.")
    return re.sub(r"^(heads\.\d+\.)?memory\.mem_bias$", "mem_bias", name)


def _torch_name(name):
    return name.removeprefix("module.")


def _deepmind_name(name):
    name = name.removesuffix(":0")
    match = re.match(r"(?:.*/)?((?:lstm|memory_access|output_linear)/.*)", name)
    return match[1] if match else name


def _collier_name(name):
    name = name.removesuffix(":0")
    match = re.match(r"(?:.*/)?((?:init|controller|o2p|o2o)/.*)", name)
    if match is None:
        return name
    # TensorFlow numbers the layers of one scope: no number, _1, _2, ...
    return re.sub(
        r"^init/fully_connected(?:_(\d+))?/",
        lambda found: f"init/learned_init_{found[1] or 0}/fully_connected/",
        match[1],
    )


def _arrays(weights, canonical_name):
    """The arrays as float64, by their canonical names."""
    if not isinstance(weights, dict):
        raise ValueError(
            "`weights` must be a dict of names and arrays. "
            f"Received: {type(weights).__name__}"
        )
    arrays = {}
    for name, value in weights.items():
        try:
            array = np.asarray(value)
        except Exception:  # a tensor that has a gradient, rows of two lengths
            array = np.asarray(None)
        if not isinstance(name, str) or array.dtype.kind not in "fiu":
            raise ValueError(
                "`weights` must have names and NumPy arrays of real numbers. "
                f"Received: {name!r} with {type(value).__name__} of type "
                f"{getattr(value, 'dtype', None)}"
            )
        array = array.astype("float64")
        if not np.isfinite(array).all():
            raise ValueError(
                f"`weights` must be finite. Received: {name!r} with NaN or "
                "infinite values"
            )
        canonical = canonical_name(name)
        if not np.array_equal(arrays.setdefault(canonical, array), array):
            raise ValueError(
                f"`weights` has {canonical!r} several times, with different "
                f"values. Received: {list(weights)}"
            )
    return arrays


class _Sizes:
    """Reads sizes off the arrays that determine them."""

    def __init__(self, weights):
        self.weights = weights
        self.sources = []

    def of(self, name, axes):
        self.sources.append(name)
        if name not in self.weights:
            raise ValueError(
                f"`weights` must have {name!r}. "
                f"Received: {sorted(self.weights)}"
            )
        shape = self.weights[name].shape
        if len(shape) != axes or 0 in shape:
            raise ValueError(
                f"{name!r} must have {axes} axes, none of them empty. "
                f"Received: shape {shape}"
            )
        return shape

    def rest(self, name, axis, known):
        """What an axis of a matrix has beside what is known to be there."""
        shape = self.of(name, 2)
        if shape[axis] <= known:
            raise ValueError(
                f"Axis {axis} of {name!r} must hold the inputs, at least one, "
                f"beside the reads and the controller's own: {known} by the "
                f"number of read heads and the sizes of {self.sources}. "
                f"Received: shape {shape}"
            )
        return shape[axis] - known


def _check_shapes(weights, shapes, sizes):
    """Raises ValueError unless `weights` has these names and shapes, which
    follow from `sizes`."""
    missing = sorted(set(shapes) - set(weights))
    extra = sorted(set(weights) - set(shapes))
    if missing or extra:
        raise ValueError(
            "`weights` must have the arrays of the reference implementation, "
            f"and no others. Missing: {missing}. Too many: {extra}"
        )
    wrong = [
        f"{name!r} must have shape {shape}. Received: {weights[name].shape}"
        for name, shape in shapes.items()
        if weights[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}. The sizes are those of {sizes.sources}"
        )


def _split(columns, *sizes):
    """Consecutive columns of these sizes."""
    ends = np.cumsum(sizes)
    return [
        columns[:, end - size : end]
        for end, size in zip(ends, sizes, strict=True)
    ]


def _head(parts, writes):
    """`NTMInterface` of one head's columns; None where it has none."""
    return NTMInterface(*parts[:5], *(parts[5:] if writes else (None, None)))


def _interface(heads):
    """One projection for all heads, read heads first, part by part."""
    return np.concatenate(
        [
            columns
            for part in zip(*heads, strict=True)
            for columns in part
            if columns is not None
        ],
        axis=1,
    )


def _tensorflow_lstm(kernel, bias):
    """Keras's weights of a TensorFlow 1 or Sonnet 1 LSTM: one matrix for
    input and hidden state, gates in the order i, candidate, f, o, and 1 added
    to f."""

    def in_order(array):
        i, candidate, f, o = np.split(array, 4, axis=-1)
        return np.concatenate([i, f, candidate, o], axis=-1)

    kernel, bias = in_order(kernel), in_order(bias)
    units = len(bias) // 4
    bias[units : 2 * units] += 1.0
    return [kernel[:-units], kernel[-units:], bias]


# PyTorch's RNN modules: gates, and their order in Keras.
_TORCH_GATES = {"lstm": [0, 1, 2, 3], "gru": [1, 0, 2], "rnn": [0]}


def _torch_layers(weights, name):
    return sum(one.startswith(f"{name}.weight_ih_l") for one in weights)


def _torch_shapes(name, kind, layers, inputs, units, bias=True):
    """Names and shapes of a PyTorch LSTM, GRU or RNN."""
    gates = len(_TORCH_GATES[kind]) * units
    shapes = {}
    for layer in range(layers):
        width = units if layer else inputs
        shapes[f"{name}.weight_ih_l{layer}"] = (gates, width)
        shapes[f"{name}.weight_hh_l{layer}"] = (gates, units)
        if bias:
            shapes[f"{name}.bias_ih_l{layer}"] = (gates,)
            shapes[f"{name}.bias_hh_l{layer}"] = (gates,)
    return shapes


def _torch_controller(weights, name, kind, layers, bias=True):
    """Keras's weights of a PyTorch LSTM, GRU or RNN, layer after layer."""

    def in_order(array):
        gates = np.split(array, len(_TORCH_GATES[kind]))
        return np.concatenate([gates[i] for i in _TORCH_GATES[kind]])

    arrays = []
    for layer in range(layers):
        for of in ("ih", "hh"):
            arrays.append(in_order(weights[f"{name}.weight_{of}_l{layer}"]).T)
        if bias:
            of_inputs, of_hidden = (
                in_order(weights[f"{name}.bias_{of}_l{layer}"])
                for of in ("ih", "hh")
            )
            # Keras's GRU has both, as its reset gate acts on one of them.
            both = np.stack([of_inputs, of_hidden])
            arrays.append(both if kind == "gru" else both.sum(axis=0))
    return arrays


def _torch_cells(kind, units, layers, nonlinearity, bias, layer_kwargs):
    """A controller like PyTorch's; its name where it is like Keras's own."""
    options = {"activation": nonlinearity} if kind == "rnn" else {}
    if bias and options.get("activation") != "relu":
        return kind
    return controllers.get(
        kind,
        units,
        layers,
        layer_kwargs.get("controller_dropout", 0.0),
        layer_kwargs.get("seed"),
        layer_kwargs.get("dtype"),
        use_bias=bias,
        **options,
    )


def _torch_linear(weights, name):
    """(U + 1, P): the kernel, and the bias as its last row."""
    kernel = weights[f"{name}.weight"].T
    return np.concatenate([kernel, weights[f"{name}.bias"][None]])


def _dnc_interface(columns, read_heads, write_heads):
    """One projection of a `DNCInterface` of columns whose read modes are, for
    each head, backward, forward, content."""
    modes = np.arange(2 * write_heads + 1)
    modes[write_heads:] = np.roll(modes[write_heads:], 1)
    heads = np.split(columns.read_mode, read_heads, axis=1)
    read_mode = np.concatenate([head[:, modes] for head in heads], axis=1)
    columns = columns._replace(read_mode=read_mode)
    return np.concatenate([c for c in columns if c is not None], axis=1)


def _layer(layer_class, layer_kwargs, determined, start=None):
    """The layer, after a look at what the user may set."""
    start = start or {}
    for name, value in layer_kwargs.items():
        is_weight = isinstance(value, str) and value in ("learned", "random")
        if name in determined or (name in start and not is_weight):
            wanted = determined.get(name, '"learned" or "random"')
            raise ValueError(
                f"`{name}` is determined by the weights and must be {wanted}. "
                f"Received: {name}={value!r}"
            )
    if issubclass(layer_class, keras.layers.RNN):
        start = {"return_sequences": True, **start}
    return layer_class(**{**start, **determined, **layer_kwargs})


def _assign(layer, inputs, controllers, interfaces, output, start=()):
    """Builds the layer and fills its weights.

    Args:
        layer: a `MemoryRNN`.
        inputs: int, width of the inputs.
        controllers: for each block a list of its controller's arrays.
        interfaces: for each block (U + 1, P), the bias as last row.
        output: (F + 1, units), the bias as last row.
        start: list with one array for each state tensor; those of states that
            are not weights are not looked at. () where the reference starts
            with zeros: so do then those that are learned.
    """
    cell = layer.cell
    if layer.stateful:  # the states need a batch size
        cell.build((None, inputs))
    else:
        layer.build((None, None, inputs))
    for controller, arrays in zip(
        cell.block_controllers, controllers, strict=True
    ):
        controller.set_weights(arrays)
    for (kernel, bias), array in zip(
        [*cell.interfaces, cell.output_projection],
        [*interfaces, output],
        strict=True,
    ):
        kernel.assign(array[:-1])
        bias.assign(array[-1])
    initials = keras.tree.flatten(cell.initial_records)
    start = start or [
        np.zeros(initial.shape) if initial.start == "learned" else weight
        for initial, weight in zip(initials, cell.start_weights)
    ]
    for weight, array in zip(cell.start_weights, start):
        if weight is not None:
            weight.assign(array)
    return layer
