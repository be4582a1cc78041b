"""Converters refuse wrong weights and arguments, and their errors name them."""

import numpy as np
import pytest
import test_convert as ntm
import test_convert_dnc as dnc
from test_convert import CELL
from test_convert import START


def from_pytorch_sam(weights=None, sparse_reads=3, **kwargs):
    weights = WEIGHTS["pytorch-sam"] if weights is None else weights
    return dnc.from_pytorch(weights, sparse_reads=sparse_reads, **kwargs)


def from_pytorch_sdnc(weights=None, temporal_reads=2, **kwargs):
    weights = WEIGHTS["pytorch-sdnc"] if weights is None else weights
    return from_pytorch_sam(weights, temporal_reads=temporal_reads, **kwargs)


CONVERTERS = {
    "pytorch-ntm": ntm.from_pytorch,
    "collier-ntm": ntm.from_collier,
    "deepmind-dnc": dnc.from_deepmind,
    "pytorch-dnc": dnc.from_pytorch,
    "pytorch-sam": from_pytorch_sam,
    "pytorch-sdnc": from_pytorch_sdnc,
}
WEIGHTS = {
    "pytorch-ntm": ntm.pytorch_weights("RW"),
    "collier-ntm": ntm.collier_weights(1, 1),
    "deepmind-dnc": dnc.deepmind_weights(),
    "pytorch-dnc": dnc.pytorch_weights(),
    "pytorch-sam": dnc.pytorch_weights(sparse_reads=3),
    "pytorch-sdnc": dnc.pytorch_weights(sparse_reads=3, temporal_reads=2),
}
SHAPES = {
    "pytorch-ntm": {
        "mem_bias": (7, 5),
        "controller.lstm.bias_hh_l0": (44,),
        "controller.lstm_c_bias": (1, 1, 11),
        "heads.0.fc_read.weight": (11, 11),
        "heads.1.fc_write.bias": (21,),
        "fc.weight": (2, 16),
    },
    "collier-ntm": {
        START.format(2): (1, 7),
        START.format(3): (1, 35),
        CELL.format(0, "kernel"): (19, 44),
        "o2p/fully_connected/weights": (11, 32),
        "o2o/fully_connected/weights": (16, 2),
    },
    "deepmind-dnc": {
        "lstm/w_gates": (20, 28),
        "memory_access/read_mode/w": (7, 6),
        "memory_access/free_gate/b": (2,),
        "memory_access/write_vectors/w": (7, 5),
        "output_linear/w": (17, 2),
    },
    "pytorch-dnc": {
        "lstm_layer_0.bias_ih_l0": (28,),
        "lstm_layer_0.bias_hh_l0": (28,),
        "rnn_layer_memory_shared.interface_weights.weight": (38, 7),
        "rnn_layer_memory_shared.interface_weights.bias": (38,),
    },
    "pytorch-sam": {
        "lstm_layer_0.bias_hh_l0": (28,),
        "rnn_layer_memory_shared.interface_weights.weight": (23, 7),
        "rnn_layer_memory_shared.interface_weights.bias": (23,),
    },
    "pytorch-sdnc": {
        "rnn_layer_memory_shared.interface_weights.weight": (27, 7),
        "rnn_layer_memory_shared.interface_weights.bias": (27,),
    },
}
EXTRA = {  # weights that no model has
    "pytorch-ntm": ["beta1_power"],
    "collier-ntm": ["beta1_power"],
    "deepmind-dnc": ["beta1_power", "memory_access/more/w", "lstm/w_gates_1"],
    "pytorch-dnc": [
        "more",
        "lstm_layer_0.weight_hr_l0",
        "lstm_layer_0.weight_ih_l0_reverse",
        "rnn_layer_memory_0.interface_weights.bias",
    ],
    "pytorch-sam": ["more", "lstm_layer_0.weight_hr_l0"],
    "pytorch-sdnc": ["more", "lstm_layer_0.weight_hr_l0"],
}


def wrong_weights():
    """Names, converters, weights, and the words of the errors."""
    for converter, weights in WEIGHTS.items():
        for name, value in weights.items():
            rest = {n: weights[n] for n in weights if n != name}
            yield f"without {name}", converter, rest, [name]
            for what, wrong in ("more", value[None]), ("empty", value[:0]):
                given = {**weights, name: wrong}
                told = [name, str(wrong.shape)]
                yield f"{what} {name}", converter, given, told
        for name, shape in SHAPES[converter].items():
            assert weights[name].shape == shape
            wrong = weights[name][..., :-1]
            told = [name, str(shape), str(wrong.shape)]
            yield f"cut {name}", converter, {**weights, name: wrong}, told
        *_, (last, value) = weights.items()
        for what, wrong in (
            ("nan", value * np.nan),
            ("infinity", value + [*np.zeros(value.shape[-1] - 1), np.inf]),
            ("complex", value * (1 + 1j)),
            ("None", None),
            ("text", "text"),
            ("object", object()),
            ("ragged", [[1.0], [1.0, 2.0]]),
        ):
            yield f"{what} {last}", converter, {**weights, last: wrong}, [last]
        for extra in EXTRA[converter]:
            for shape in ((), (5,)):
                given = {**weights, extra: np.ones(shape)}
                yield f"extra {extra} {shape}", converter, given, [extra]
        yield "no weights", converter, {}, ["weight"]
        yield "a list", converter, [weights], ["dict"]
    differ = ntm.state_dict(WEIGHTS["pytorch-ntm"])
    differ["ntm.heads.1.memory.mem_bias"] = np.zeros((7, 5))
    yield "memories that differ", "pytorch-ntm", differ, ["mem_bias"]
    for kinds in ("R", "W", "RR", ""):
        weights = ntm.pytorch_weights(kinds)
        yield f"heads {kinds or None}", "pytorch-ntm", weights, ["head"]
    for name, missing in (
        ("lstm_layer_0.weight_ih_l1", "lstm_layer_0."),
        (
            "rnn_layer_memory_shared.read_keys_transform.bias",
            "rnn_layer_memory_shared.",
        ),
    ):
        weights = {**WEIGHTS["pytorch-dnc"], name: np.ones(5)}
        told = [f"Missing: ['{missing}"]
        yield f"one of another model, {name}", "pytorch-dnc", weights, told
    for apart in (False, True):
        of_dnc = dnc.pytorch_weights(apart=apart)
        of_sam = dnc.pytorch_weights(sparse_reads=3, apart=apart)
        of_sdnc = dnc.pytorch_weights(
            sparse_reads=3, temporal_reads=2, apart=apart
        )
        for given, converter, weights, told in (
            ("a DNC", "pytorch-sam", of_dnc, "weights must be of a SAM"),
            ("a DNC", "pytorch-sdnc", of_dnc, "weights must be of an SDNC"),
            ("a SAM", "pytorch-dnc", of_sam, "a SAM needs `sparse_reads`"),
            ("a SAM", "pytorch-sdnc", of_sam, "weights must be of an SDNC"),
            ("an SDNC", "pytorch-dnc", of_sdnc, "an SDNC needs both"),
            ("an SDNC", "pytorch-sam", of_sdnc, "`temporal_reads` too"),
        ):
            name = f"{given}{', apart' * apart}"
            part = "interpolation_gate" if apart else "interface_weights"
            yield name, converter, weights, [told, part]
    both = dnc.pytorch_weights(kind="gru") | WEIGHTS["pytorch-dnc"]
    told = ["controllers of one kind"]
    yield "controllers of two kinds", "pytorch-dnc", both, told


BAD_SIZES = [-1, 1.0, True, None]
NAN = float("nan")
SLOTS = [0, -1, 7.0, True, None, "7"]
REFUSED = {
    "pytorch-ntm": {},
    "collier-ntm": {
        "read_heads": [0, *BAD_SIZES],
        "write_heads": [0, *BAD_SIZES],
        "shift_range": BAD_SIZES,
        "init_mode": ["zeros", None],
        "addressing_mode": ["location", None],
    },
    "deepmind-dnc": {
        "memory_slots": SLOTS,
        "clip_value": [0, -1.0, NAN, "20", True],
    },
    "pytorch-dnc": {
        "memory_slots": SLOTS,
        "read_heads": [0, -1, 2.0, True, None],
        "nonlinearity": ["sigmoid", None, 1, "relu"],  # relu: for an LSTM
        "clip": [-1.0, NAN, "20", False, True],
        "sparse_reads": [0, -1, 2.0, True, "3"],
        "temporal_reads": [0, -1, 2, 2.0, True, "3"],  # 2: no sparse_reads
    },
    "pytorch-sam": {"memory_slots": SLOTS, "sparse_reads": [0, 2.0, True]},
    "pytorch-sdnc": {
        "memory_slots": SLOTS,
        "sparse_reads": [0, 2.0, True],
        "temporal_reads": [0, -1, 2.0, True, "3"],
    },
}
OF_NTMS = {
    "units": 2,
    "memory_slots": 7,
    "slot_size": 5,
    "controller": "lstm",
    "controller_units": 11,
    "controller_layers": 1,
    "addressing": "content_and_location",
    "erase": True,
    "writing": "addressed",
    "key_activation": "tanh",
    "add_activation": "tanh",
    "strength_activation": "softplus",
    "activation": "sigmoid",
    "norm_epsilon": 0.1,
    "product_epsilon": 0.1,
    "initial_memory": 0.0,
    "initial_reads": "constant",
    "initial_weighting": 0.5,
}
OF_DNCS = {
    "units": 3,
    "slot_size": 5,
    "write_heads": 1,
    "controller": "lstm",
    "controller_units": 7,
    "controller_layers": 1,
    "controller_clip": None,
    "controller_state_clip": 20.0,
    "num_layers": 1,
    "linkage": False,
    "content_masks": True,
    "deallocation": True,
    "link_sharpening": True,
    "interface_layer_norm": True,
    "usage_gradient": True,
    "key_activation": "linear",
    "add_activation": "tanh",
    "strength_activation": "oneplus",
    "activation": "tanh",
    "norm_epsilon": 0.1,
    "product_epsilon": 0.0,
    "usage_epsilon": 1e-5,
}
OF_SAM = {
    "units": 3,
    "slot_size": 5,
    "top_k": 3,
    "controller": "lstm",
    "num_layers": 1,
    "share_memory": True,
    "access_threshold": 0.1,
    "key_activation": "tanh",
    "add_activation": "tanh",
    "strength_activation": "oneplus",
    "interface_layer_norm": True,
}
DETERMINED = {  # arguments fixed by the weights
    "pytorch-ntm": {
        **OF_NTMS,
        "read_heads": 1,
        "write_heads": 1,
        "shift_range": 1,
    },
    "collier-ntm": {
        **OF_NTMS,
        "head_order": "parallel",
        "initial_controller_state": "learned",
    },
    "deepmind-dnc": {**OF_DNCS, "read_heads": 2},
    "pytorch-dnc": {**OF_DNCS, "share_memory": True, "clip_value": 20.0},
    "pytorch-sam": OF_SAM,
    "pytorch-sdnc": {**OF_SAM, "sparse_links": 4},
}


def wrong_arguments():
    """Names, converters, arguments, and the words of the errors."""
    for converter in CONVERTERS:
        for name, values in REFUSED[converter].items():
            for value in values:
                told = [f"`{name}`", f"Received: {name}={value!r}"]
                yield f"{name}={value!r}", converter, {name: value}, told
        for name, value in DETERMINED[converter].items():
            told = [f"`{name}`", f"{name}={value!r}"]
            yield f"determined {name}", converter, {name: value}, told
    read, write = "read", "write"
    for order in (
        (write, read),
        (read,),
        (read, write, write),
        (read, "wirte"),
        "parallel",
        5,
    ):
        name = f"head_order={order!r}"
        yield name, "pytorch-ntm", {"head_order": order}, ["`head_order`"]
    for name, value, wrong in (
        ("read_heads", 2, "cell_0"),
        ("write_heads", 2, "learned_init_4"),
        ("shift_range", 2, "o2p"),
        ("init_mode", "constant", "init_M"),
    ):
        yield f"other {name}", "collier-ntm", {name: value}, [wrong]
    for read_heads in (1, 3, 4, 5, 10, 11, 1000):
        for apart in (False, True):
            weights = dnc.pytorch_weights(apart=apart)
            given = {"weights": weights, "read_heads": read_heads}
            name = f"{read_heads} read heads{', apart' * apart}"
            yield name, "pytorch-dnc", given, ["read_heads"]
    for sparse_reads in (1, 2, 4, 11):
        name, given = f"{sparse_reads=}", {"sparse_reads": sparse_reads}
        yield name, "pytorch-sam", given, ["interface_weights", name]
    for temporal_reads in (1, 3, 11):
        name, given = f"{temporal_reads=}", {"temporal_reads": temporal_reads}
        yield name, "pytorch-sdnc", given, ["interface_weights", name]
    given = {"memory_slots": 2}  # fewer than 3 reads
    yield "fewer slots", "pytorch-sam", given, ["memory_slots=2"]
    for given, name in (
        ({"memory_slots": 1}, "memory_slots=1"),  # fewer than 2 temporal reads
        ({"sparse_reads": 4}, "sparse_reads=4"),
    ):
        yield f"other {name}", "pytorch-sdnc", given, [name]
    # One head of width 4 has an interface as long as three of width 1.
    weights = dnc.pytorch_weights(reads=1, width=4)
    given = {"weights": weights, "read_heads": 3}
    yield "heads of another width", "pytorch-dnc", given, ["read_heads"]


def each(cases):
    return pytest.mark.parametrize(
        "converter, given, told",
        [
            pytest.param(
                CONVERTERS[converter],
                given,
                told,
                id=f"{converter}: {name}",
                marks=pytest.mark.every_backend if "ntm" in converter else (),
            )
            for name, converter, given, told in cases
        ],
    )


def check_refused(told, converter, *arguments, **named):
    with pytest.raises(ValueError) as error:
        converter(*arguments, **named)
    for part in told:
        assert part in str(error.value)


@each(wrong_weights())
def test_wrong_weights_are_refused(converter, given, told):
    check_refused(told, converter, given)


@each(wrong_arguments())
def test_wrong_arguments_are_refused(converter, given, told):
    check_refused(told, converter, **given)
