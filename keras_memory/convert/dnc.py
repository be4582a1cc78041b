"""Converts Differentiable Neural Computers of DeepMind and pytorch-dnc, and
pytorch-dnc's Sparse Access Memory and Sparse DNC."""

import re
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import overload

import numpy as np

from keras_memory.checks import check_clip
from keras_memory.checks import check_closed
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.convert.weights import NORM_EPSILON
from keras_memory.convert.weights import TORCH_GATES
from keras_memory.convert.weights import Sizes
from keras_memory.convert.weights import assign_weights
from keras_memory.convert.weights import canonical_arrays
from keras_memory.convert.weights import check_shapes
from keras_memory.convert.weights import make_layer
from keras_memory.convert.weights import split_columns
from keras_memory.convert.weights import tensorflow_lstm
from keras_memory.convert.weights import torch_cells
from keras_memory.convert.weights import torch_controller
from keras_memory.convert.weights import torch_layers
from keras_memory.convert.weights import torch_linear
from keras_memory.convert.weights import torch_name
from keras_memory.convert.weights import torch_shapes
from keras_memory.dnc import DNCInterface
from keras_memory.dnc import DNCLayer
from keras_memory.hints import Array
from keras_memory.sam import SAMInterface
from keras_memory.sam import SAMLayer
from keras_memory.sdnc import SDNCLayer


def from_deepmind_dnc(
    weights: Mapping[str, Array],
    memory_slots: int,
    clip_value: float | None = None,
    **layer_kwargs: Any,
) -> DNCLayer:
    """Makes a DNC from the weights of google-deepmind/dnc.

    The layer computes the same as the reference's `dnc.DNC`, including its
    differences from the paper: strengths are a softplus, without 1 added;
    usage passes no gradient to the write weightings.

    Args:
        weights: dict of arrays with the names of a TensorFlow 1 checkpoint
            (`tf.train.load_checkpoint`), without an optimizer's variables.
            Names may begin with any scope and end in `:0`.
        memory_slots: int, at least 1, `memory_size` of the reference.
        clip_value: float above 0 or None, `clip_value` of the reference (20 in
            its `train.py`): clips controller output, controller state and
            output.
        **layer_kwargs: arguments of `DNCLayer` that the weights do not
            determine: `dtype`, `name`, `stateful`, ... `return_sequences` is
            True by default.

    Returns:
        A built `DNCLayer`. If it is stateful, only its cell is built; the
        first batch makes the states.

    Raises:
        ValueError: arrays are missing, unexpected or of a wrong shape, or have
            values that are not finite numbers; an argument is out of its
            range, or the weights determine it.

    Example:

    >>> file = np.load("tests/goldens/dm_dnc__full_b.npz")
    >>> weights = {n[2:]: file[n] for n in file.files if n.startswith("w.")}
    >>> layer = keras_memory.convert.from_deepmind_dnc(weights, 5)
    >>> layer(np.zeros((2, 7, 4), "float32")).shape
    TensorShape([2, 7, 4])
    """
    check_size("memory_slots", memory_slots)
    check_clip("clip_value", clip_value)
    weights = canonical_arrays(weights, _deepmind_name)
    sizes = Sizes(weights)
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
    check_shapes(weights, shapes, sizes)

    def linear(name):
        return np.concatenate(
            [weights[f"{name}/w"], weights[f"{name}/b"][None]]
        )

    columns = DNCInterface(
        *[part and linear(f"memory_access/{part[0]}") for part in parts]
    )
    layer = make_layer(
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
            "num_layers": 1,
            "usage_gradient": False,
            "key_activation": "linear",
            "add_activation": "linear",
            "norm_epsilon": 1e-6,
            **_OF_BOTH_DNCS,
        },
    )
    return assign_weights(
        layer,
        inputs,
        [tensorflow_lstm(weights["lstm/w_gates"], weights["lstm/b_gates"])],
        [_dnc_interface(columns, readers, writers)],
        linear("output_linear"),
    )


@overload
def from_pytorch_dnc(
    weights: Mapping[str, Array],
    memory_slots: int,
    read_heads: int,
    nonlinearity: str = "tanh",
    clip: float | None = 20.0,
    *,
    sparse_reads: None = None,
    temporal_reads: None = None,
    **layer_kwargs: Any,
) -> DNCLayer: ...


@overload
def from_pytorch_dnc(
    weights: Mapping[str, Array],
    memory_slots: int,
    read_heads: int,
    nonlinearity: str = "tanh",
    clip: float | None = 20.0,
    *,
    sparse_reads: int,
    temporal_reads: None = None,
    **layer_kwargs: Any,
) -> SAMLayer: ...


@overload
def from_pytorch_dnc(
    weights: Mapping[str, Array],
    memory_slots: int,
    read_heads: int,
    nonlinearity: str = "tanh",
    clip: float | None = 20.0,
    *,
    sparse_reads: int,
    temporal_reads: int,
    **layer_kwargs: Any,
) -> SDNCLayer: ...


def from_pytorch_dnc(
    weights: Mapping[str, Array],
    memory_slots: int,
    read_heads: int,
    nonlinearity: str = "tanh",
    clip: float | None = 20.0,
    *,
    sparse_reads: int | None = None,
    temporal_reads: int | None = None,
    **layer_kwargs: Any,
) -> DNCLayer | SAMLayer | SDNCLayer:
    """Makes a DNC, SAM or SDNC from the weights of ixaxaar/pytorch-dnc, 1.1.0
    or 2.0.0b1.

    The DNC computes the same as the reference's `DNC`, called one step at a
    time with the state of the last step. This includes its differences from
    the paper: strengths are a softplus, without 1 added; keys and write
    vectors pass a tanh.

    The SAM and the SDNC are starts for further training. They have the
    reference's controllers, keys, add vectors, write gates and output, but
    their memory is that of the paper, so they compute other reads. A warning
    lists what is not carried over. The reference has an interpolation gate for
    each slot that it sees, the layer has one: it starts as their mean, before
    the sigmoid. The reference has no strengths: they start as 1 for all
    inputs. A head of the reference weighs the slots of all heads and the least
    used one, a head of the layer only its own `top_k`.

    The reference's SDNC has no read modes: its heads weigh linked slots by
    content, like all others. Read modes start as 0.1 backward, 0.8 content and
    0.1 forward, for all inputs: close to reads by content, and the modes can
    still learn. A slot of the reference has 2 `temporal_reads` links in each
    direction. `sparse_links` is the same number, or `memory_slots` if that is
    less.

    Departures: within one call the reference never feeds reads back to the
    controller; the layer always does. The reference draws the controller's
    initial state anew at each call; here it is 0, unless
    `initial_controller_state` changes it. If several layers share a memory,
    the reference has one set of interface weights for all; here each layer has
    its own, which start equal.

    Args:
        weights: dict of arrays, a state dict of `DNC`, `SAM` or `SDNC`; names
            may begin with `module.`.
        memory_slots: int, at least 1, `nr_cells` of the reference.
        read_heads: int, at least 1, must match the reference. The shapes of
            the weights reject most wrong values, not all.
        nonlinearity: `"tanh"` or `"relu"`, for `rnn_type="rnn"`.
        clip: float, at least 0, `clip` of the reference: clips the
            controllers' outputs; 0 or None does not clip.
        sparse_reads: None (default) for a DNC. For a SAM or SDNC, int, at
            least 1, must match the reference: the number of slots that each
            head finds by its key.
        temporal_reads: None (default) for a DNC or SAM. For an SDNC, int, at
            least 1, must match the reference: the number of slots that its
            heads read forward, and backward. The shapes only tell
            `read_heads * sparse_reads + 2 * temporal_reads`, so wrong values
            with the same sum are not rejected.
        **layer_kwargs: arguments of the layer that the weights do not
            determine: `dtype`, `name`, `stateful`, ... `return_sequences` is
            True by default.

    Returns:
        A built `DNCLayer`, `SAMLayer` or `SDNCLayer`. If it is stateful, only
        its cell is built; the first batch makes the states.

    Raises:
        ValueError: arrays are missing, unexpected or of a wrong shape, or have
            values that are not finite numbers; an argument is out of its
            range, or the weights determine it; `temporal_reads` without
            `sparse_reads`.

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
        check_closed("clip", clip, 0)
    if sparse_reads is not None:
        check_size("sparse_reads", sparse_reads)
    if temporal_reads is not None:
        check_size("temporal_reads", temporal_reads)
        if sparse_reads is None:
            raise ValueError(
                "`temporal_reads` needs `sparse_reads`: an SDNC has both. "
                f"Received: temporal_reads={temporal_reads!r}, "
                "sparse_reads=None"
            )
    check_one_of("nonlinearity", nonlinearity, ("tanh", "relu"))
    weights = canonical_arrays(weights, torch_name)
    rnns = [
        re.fullmatch(r"((\w+)_layer_\d+)\.weight_ih_l0", name)
        for name in weights
    ]
    kinds = {match[2] for match in rnns if match}
    if len(kinds) != 1 or not kinds <= set(TORCH_GATES):
        raise ValueError(
            "`weights` must be the state_dict of a pytorch-dnc model, with "
            "controllers of one kind, such as 'lstm_layer_0.weight_ih_l0'. "
            f"Received: {sorted(weights)}"
        )
    (kind,) = kinds
    if nonlinearity != "tanh" and kind != "rnn":
        raise ValueError(
            f"`nonlinearity` must be 'tanh' for these {kind!r} weights: "
            "only 'rnn' has a choice. "
            f"Received: nonlinearity={nonlinearity!r}"
        )
    layers = len(list(filter(None, rnns)))
    first = f"{kind}_layer_0"
    hidden_layers = torch_layers(weights, first)
    bias = any(".bias_ih_l" in n or ".bias_hh_l" in n for n in weights)
    shared = any("memory_shared" in name for name in weights)
    memories = [
        f"rnn_layer_memory_{'shared' if shared else layer}"
        for layer in range(layers)
    ]
    apart = any("_transform." in name for name in weights)

    sizes = Sizes(weights)
    (outputs,) = sizes.of("output.bias", 1)
    _, units = sizes.of(f"{first}.weight_hh_l0", 2)
    reads_size = sizes.rest("output.weight", 1, units, "reads")
    width, rest = divmod(reads_size, read_heads)
    if rest:
        raise ValueError(
            "`read_heads` must divide the width of all reads, which is "
            f"{reads_size} according to 'output.weight'. "
            f"Received: read_heads={read_heads}"
        )
    sizes.sources.append(f"read_heads={read_heads}")
    inputs = sizes.rest(f"{first}.weight_ih_l0", 1, reads_size)
    if sparse_reads is None:
        memory_kind = _pytorch_dnc(read_heads, width)
    else:
        sizes.sources.append(
            f"{sparse_reads=}, {temporal_reads=}, {memory_slots=}"
        )
        # As in the reference, both are at most the number of slots.
        sizes_of_reads = read_heads, width, min(sparse_reads, memory_slots)
        if temporal_reads is None:
            memory_kind = _pytorch_sam(*sizes_of_reads)
        else:
            linked = 2 * min(temporal_reads, memory_slots)
            memory_kind = _pytorch_sdnc(*sizes_of_reads, linked, memory_slots)
    parts = memory_kind.parts
    shapes = {
        "output.weight": (outputs, units + reads_size),
        "output.bias": (outputs,),
    }
    for layer in range(layers):
        width_in = (units if layer else inputs) + reads_size
        shapes |= torch_shapes(
            f"{kind}_layer_{layer}", kind, hidden_layers, width_in, units, bias
        )
    for memory in set(memories):
        linears = {"interface_weights": sum(n for _, n in parts.values())}
        if apart:
            linears = {f"{n}_transform": size for n, size in parts.values()}
        for name, size in linears.items():
            shapes[f"{memory}.{name}.weight"] = (size, units)
            shapes[f"{memory}.{name}.bias"] = (size,)
    check_shapes(weights, shapes, sizes, memory_kind.hint)

    def interface(memory):
        if apart:
            columns = [
                torch_linear(weights, f"{memory}.{name}_transform")
                for name, _ in parts.values()
            ]
        else:
            columns = split_columns(
                torch_linear(weights, f"{memory}.interface_weights"),
                *[size for _, size in parts.values()],
            )
        return memory_kind.interface(dict(zip(parts, columns)))

    layer = make_layer(
        memory_kind.layer,
        layer_kwargs,
        determined={
            "units": outputs,
            "memory_slots": memory_slots,
            "slot_size": width,
            "read_heads": read_heads,
            "controller": torch_cells(
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
            "num_layers": layers,
            "share_memory": shared,
            **memory_kind.arguments,
        },
    )
    if memory_kind.lost:
        name = memory_kind.layer.__name__.removesuffix("Layer")
        warnings.warn(
            "The layer has the controllers, keys, add vectors, write gates and "
            f"output of pytorch-dnc's {name}, but the memory of the paper, so "
            "it reads other vectors: train it further. Not carried over: "
            f"{'; '.join(memory_kind.lost)}",
            stacklevel=2,
        )
    return assign_weights(
        layer,
        inputs,
        [
            torch_controller(
                weights, f"{kind}_layer_{layer}", kind, hidden_layers, bias
            )
            for layer in range(layers)
        ],
        [interface(memory) for memory in memories],
        torch_linear(weights, "output"),
    )


class _PytorchMemory(NamedTuple):
    """A memory of pytorch-dnc, and the layer that its weights become.

    Args:
        layer: class of the layer.
        parts: dict from the names of interface parts here to their names there
            and sizes, in the order of the columns there.
        interface: function(dict of columns by our names) -> (U + 1, P), the
            layer's interface.
        arguments: dict of layer arguments that this kind determines.
        hint: end of the errors about wrong weights.
        lost: tuple of texts: what is not carried over.
    """

    layer: type
    parts: dict[str, tuple[str, int]]
    interface: Callable
    arguments: dict
    hint: str
    lost: tuple[str, ...] = ()


def _pytorch_dnc(read_heads, width):
    def interface(columns):
        columns = DNCInterface(**columns, **_NO_OPTIONS)
        return _dnc_interface(columns, read_heads, write_heads=1)

    return _PytorchMemory(
        layer=DNCLayer,
        parts={
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
        },
        interface=interface,
        arguments={
            "write_heads": 1,
            "usage_gradient": True,
            "key_activation": "tanh",
            "add_activation": "tanh",
            "norm_epsilon": NORM_EPSILON,
            **_OF_BOTH_DNCS,
        },
        hint=". Without `sparse_reads` and `temporal_reads` the weights must "
        "be of a DNC: a SAM needs `sparse_reads`, an SDNC needs both",
    )


def _pytorch_sam(read_heads, width, top_k, linked=0):
    """linked: number of slots that the reference's SDNC sees beyond a SAM's."""
    gates = read_heads * top_k + linked + 1

    def interface(columns):
        strength = np.zeros((len(columns["key"]), read_heads))
        strength[-1] = np.log(np.expm1(1.0))  # 1, after the softplus
        gate = columns.pop("interpolation_gate").mean(axis=1, keepdims=True)
        columns = SAMInterface(
            **columns, strength=strength, interpolation_gate=gate
        )
        return np.concatenate(columns, axis=1)

    return _PytorchMemory(
        layer=SAMLayer,
        parts={
            "key": ("read_query", read_heads * width),
            "add_vector": ("write_vector", width),
            "interpolation_gate": ("interpolation_gate", gates),
            "write_gate": ("write_gate", 1),
        },
        interface=interface,
        arguments={
            "top_k": top_k,
            "access_threshold": 0.005,
            "key_activation": "linear",
            "add_activation": "linear",
            "strength_activation": "softplus",
            "interface_layer_norm": False,
            "activation": None,
        },
        hint=". With `sparse_reads` alone the weights must be of a SAM: an "
        "SDNC needs `temporal_reads` too",
        lost=(
            f"the interpolation gates of {gates} slots (the layer has one "
            "gate, which starts as their mean)",
            "the softmax over the slots of all heads (a head of the layer "
            "weighs its own slots only)",
            "the search by distance (the layer searches by cosine)",
            "the choice of the slot to erase",
            "the initial value of the memory (the layer's starts empty)",
        ),
    )


def _pytorch_sdnc(read_heads, width, top_k, linked, memory_slots):
    sam = _pytorch_sam(read_heads, width, top_k, linked)

    def interface(columns):
        columns = sam.interface(columns)
        modes = np.zeros((len(columns), read_heads, 3))
        modes[-1] = np.log([0.1, 0.8, 0.1])  # backward, content, forward
        modes = modes.reshape(len(columns), -1)
        return np.concatenate([columns, modes], axis=1)

    return sam._replace(
        layer=SDNCLayer,
        interface=interface,
        arguments={**sam.arguments, "sparse_links": min(linked, memory_slots)},
        hint=". With `sparse_reads` and `temporal_reads` the weights must be "
        "of an SDNC",
        lost=(
            *sam.lost,
            "the weights of linked slots, by content (the layer has read "
            "modes, which start as 0.1 backward, 0.8 content and 0.1 forward)",
            "the links (the reference keeps only the diagonals of its link "
            "matrices)",
        ),
    )


# Settings that both DNCs share, and the interface parts that neither has.
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


def _deepmind_name(name):
    name = name.removesuffix(":0")
    match = re.match(r"(?:.*/)?((?:lstm|memory_access|output_linear)/.*)", name)
    return match[1] if match else name


def _dnc_interface(columns, read_heads, write_heads):
    """Joins a `DNCInterface` of columns to one projection.

    The read modes of each head are backward, forward, content in the
    references, and backward, content, forward in the projection.
    """
    modes = np.arange(2 * write_heads + 1)
    modes[write_heads:] = np.roll(modes[write_heads:], 1)
    heads = np.split(columns.read_mode, read_heads, axis=1)
    read_mode = np.concatenate([head[:, modes] for head in heads], axis=1)
    columns = columns._replace(read_mode=read_mode)
    return np.concatenate([c for c in columns if c is not None], axis=1)
