"""Converts Neural Turing Machines of pytorch-ntm and of Collier and Beel."""

import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.convert.weights import NORM_EPSILON
from keras_memory.convert.weights import Sizes
from keras_memory.convert.weights import assign_weights
from keras_memory.convert.weights import canonical_arrays
from keras_memory.convert.weights import check_shapes
from keras_memory.convert.weights import make_layer
from keras_memory.convert.weights import split_columns
from keras_memory.convert.weights import tensorflow_lstm
from keras_memory.convert.weights import torch_controller
from keras_memory.convert.weights import torch_layers
from keras_memory.convert.weights import torch_linear
from keras_memory.convert.weights import torch_shapes
from keras_memory.hints import Array
from keras_memory.ntm import NTMInterface
from keras_memory.ntm import NTMLayer


def from_pytorch_ntm(
    weights: Mapping[str, Array],
    head_order: Sequence[str] | None = None,
    **layer_kwargs: Any,
) -> NTMLayer:
    """Makes an NTM from the weights of loudinthecloud/pytorch-ntm.

    The layer computes the same as the reference's `NTM.forward`, step by step,
    from the start of a sequence.

    Departures, where the reference divides by almost 0: the reference adds
    1e-16 to memory and key and bounds the product of their norms by 1e-8; it
    does not quite normalize a weighting whose powers sum to less than about
    1e-8, which requires an equally small interpolation gate in the first step.
    As in the reference, the initial memory and reads are weights that are not
    trained; `initial_memory="learned"`, `initial_reads="learned"` train them.

    Args:
        weights: dict of arrays, a state dict of `EncapsulatedNTM` or of the
            `NTM` inside it; the leading `ntm.` and `memory.` may be absent.
        head_order: the reference's list of heads, such as `("read", "write",
            "read", "write")`; None takes it from the names in `weights`.
        **layer_kwargs: arguments of `NTMLayer` that the weights do not
            determine: `dtype`, `name`, `stateful`, ... `return_sequences` is
            True by default.

    Returns:
        A built `NTMLayer`. Its read heads are numbered in the order of the
        list, and so are its write heads. If it is stateful, only its cell is
        built; the first batch makes the states.

    Raises:
        ValueError: arrays are missing, unexpected or of a wrong shape, or have
            values that are not finite numbers; `head_order` does not match the
            weights; the weights determine an argument; there are fewer than 3
            slots, so that shifts by one overlap.

    Example:

    >>> file = np.load("tests/goldens/pytorch_ntm__2r2w_b.npz")
    >>> weights = {n[2:]: file[n] for n in file.files if n.startswith("w.")}
    >>> layer = keras_memory.convert.from_pytorch_ntm(
    ...     weights, ("read", "write", "read", "write")
    ... )
    >>> layer(np.zeros((2, 7, 3), "float32")).shape
    TensorShape([2, 7, 5])
    """
    weights = canonical_arrays(weights, _pytorch_name)
    heads = {}
    for name in weights:
        if match := re.fullmatch(r"heads\.(\d+)\.fc_(\w+)\.\w+", name):
            heads[int(match[1])] = match[2]
    if not heads:
        raise ValueError(
            "`weights` must be the state_dict of a pytorch-ntm model, with "
            "heads such as 'heads.0.fc_read.weight'. "
            f"Received: {sorted(weights)}"
        )
    in_weights = tuple(heads[index] for index in sorted(heads))
    if head_order is None:
        head_order = in_weights
    if isinstance(head_order, list):
        head_order = tuple(head_order)
    if head_order != in_weights or set(head_order) != {"read", "write"}:
        raise ValueError(
            "`head_order` must have read and write heads, and match the names "
            f"in the weights, {in_weights}. "
            f"Received: head_order={head_order!r}"
        )
    readers = [i for i, kind in enumerate(head_order) if kind == "read"]
    writers = [i for i, kind in enumerate(head_order) if kind == "write"]
    lstm = "controller.lstm"
    layers = torch_layers(weights, lstm)

    sizes = Sizes(weights)
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
    shapes |= torch_shapes(
        lstm, "lstm", layers, inputs + reads_size, controller_units
    )
    for index, kind in enumerate(head_order):
        size = width + 6 + (2 * width if kind == "write" else 0)
        name = f"heads.{index}.fc_{kind}"
        shapes[f"{name}.weight"] = (size, controller_units)
        shapes[f"{name}.bias"] = (size,)
    check_shapes(weights, shapes, sizes)

    def head(index):
        kind = head_order[index]
        columns = torch_linear(weights, f"heads.{index}.fc_{kind}")
        parts = split_columns(columns, width, 1, 1, 3, 1, width, width)
        # The reference's first shift moves the focus by +1, its last by -1.
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
    layer = make_layer(
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
            "norm_epsilon": NORM_EPSILON,
            "product_epsilon": 0.0,
        },
        start={
            "initial_memory": "random",
            "initial_reads": "random",
            "initial_controller_state": "learned",
        },
    )
    return assign_weights(
        layer,
        inputs,
        [torch_controller(weights, lstm, "lstm", layers)],
        [_interface([head(index) for index in readers + writers])],
        torch_linear(weights, "fc"),
        start,
    )


def from_collier_ntm(
    weights: Mapping[str, Array],
    read_heads: int,
    write_heads: int,
    shift_range: int = 1,
    init_mode: str = "learned",
    addressing_mode: str = "content_and_location",
    **layer_kwargs: Any,
) -> NTMLayer:
    """Makes an NTM from the weights of MarkPKCollier/NeuralTuringMachine.

    The layer computes the same as the reference's `NTMCell` (Collier & Beel
    2018). The reference trains the initial reads, and the initial memory
    unless `init_mode="constant"`, as the input of a tanh; the layer trains
    their values. Departure: `shift_range=0` means no shift; the reference then
    has a wrong list of shifts, and moves by one and by two slots.

    Args:
        weights: dict of arrays with the names of a TensorFlow 1 checkpoint
            (`tf.train.load_checkpoint`), without an optimizer's variables.
            Names may begin with any scope and end in `:0`.
        read_heads: int, at least 1.
        write_heads: int, at least 1.
        shift_range: int, at least 0, must match the reference.
        init_mode: `"learned"`, `"constant"` or `"random"`, must match the
            reference.
        addressing_mode: `"content_and_location"` or `"content"`, must match
            the reference. The shapes of the weights cannot reject a wrong
            `addressing_mode`, or "random" instead of "constant".
        **layer_kwargs: arguments of `NTMLayer` that the weights do not
            determine: `dtype`, `name`, `stateful`, ... By default
            `return_sequences` is True, and `interface_clip` and `clip_value`
            are 20, the default of the reference's `clip_value`.

    Returns:
        A built `NTMLayer`. If it is stateful, only its cell is built; the
        first batch makes the states.

    Raises:
        ValueError: arrays are missing, unexpected or of a wrong shape, or have
            values that are not finite numbers; an argument is out of its
            range, or the weights determine it.

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
    check_one_of("init_mode", init_mode, ("learned", "constant", "random"))
    choices = "content_and_location", "content"
    check_one_of("addressing_mode", addressing_mode, choices)
    by_location = addressing_mode == "content_and_location"
    weights = canonical_arrays(weights, _collier_name)
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

    sizes = Sizes(weights)
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
    check_shapes(weights, shapes, sizes)

    def linear(name):
        kernel = weights[f"{name}/fully_connected/weights"]
        bias = weights[f"{name}/fully_connected/biases"]
        return np.concatenate([kernel, bias[None]])

    columns = split_columns(
        linear("o2p"),
        *[width + 3 + shifts] * heads,
        *[width] * (2 * write_heads),
    )
    offsets = range(-shift_range, shift_range + 1)

    def head(index):
        parts = split_columns(columns[index], width, 1, 1, shifts, 1)
        # The reference's shifts have the order 0, +1, ..., -1.
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
        controller += tensorflow_lstm(
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
    layer = make_layer(
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
            "norm_epsilon": NORM_EPSILON,
            "product_epsilon": 1e-8,
        },
        start={
            "initial_memory": "learned",
            "initial_reads": "learned",
            "initial_weighting": "learned",
        },
    )
    return assign_weights(
        layer,
        inputs,
        [controller],
        [_interface([head(index) for index in range(heads)])],
        linear("o2o"),
        start,
    )


def _pytorch_name(name):
    name = name.removeprefix("module.").removeprefix("ntm.")
    return re.sub(r"^(heads\.\d+\.)?memory\.mem_bias$", "mem_bias", name)


def _collier_name(name):
    name = name.removesuffix(":0")
    match = re.match(r"(?:.*/)?((?:init|controller|o2p|o2o)/.*)", name)
    if match is None:
        return name
    # TensorFlow numbers the layers of one scope: no number, _1, _2, ...
    return re.sub(
        r"^init/fully_connected(?:_(\d+))?/",
        lambda layer: f"init/learned_init_{layer[1] or 0}/fully_connected/",
        match[1],
    )


def _head(parts, writes):
    """`NTMInterface` of one head's columns; None for parts that it lacks."""
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
