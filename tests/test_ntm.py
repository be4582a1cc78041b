"""The Neural Turing Machine, compared with its oracle and with values computed
by hand. `test_accesses.py` has the checks of all accesses."""

import itertools

import keras
import numpy as np
import pytest
import reference
from access_harness import BATCH
from access_harness import IN_TURN
from access_harness import NTM
from access_harness import TIME
from access_harness import UNITS
from access_harness import WIDTH
from access_harness import close
from access_harness import few
from access_harness import numbers
from access_harness import set_interface_bias
from catalogue import slow_unless
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory.addressing import content
from keras_memory.addressing import location

NAN = float("nan")

ntm, randomised, like = NTM.make, NTM.randomised, NTM.like


def initial_weights(layer):
    weights = layer.cell.weights
    return {w.name: w for w in weights if w.name.startswith("initial_")}


# Against the oracle.

BY_NAME = {
    "linear": reference.identity,
    "tanh": np.tanh,
    "sigmoid": reference.sigmoid,
}


def oracle(layer, x):
    """The results of `reference.ntm_sequence` for the layer's weights."""
    cell, config = layer.cell, layer.cell.get_config()
    controller = cell.block_controllers[0]
    weights = {
        "controller_kernel": controller.kernel,
        "controller_bias": controller.bias,
        "interface_kernel": cell.interfaces[0][0],
        "interface_bias": cell.interfaces[0][1],
        "output_kernel": cell.output_projection[0],
        "output_bias": cell.output_projection[1],
    }
    if config["controller"] != "dense":
        weights["controller_recurrent_kernel"] = controller.recurrent_kernel
    start = cell.unpack_state(cell.get_initial_state(batch_size=1))
    initial = {
        name: ops.convert_to_numpy(value)[0]
        for name, value in start._asdict().items()
        if not isinstance(value, tuple)
    }
    states = keras.tree.flatten(start.controller)
    states = [ops.convert_to_numpy(state)[0] for state in states]
    initial |= dict(zip(("h", "c"), states))
    same = (
        "memory_slots slot_size read_heads write_heads controller head_order "
        "addressing shift_range erase interface_clip clip_value "
        "product_epsilon writing retroactive_discount"
    )
    norm_epsilon = config["norm_epsilon"]
    if norm_epsilon is None:
        norm_epsilon = content.NORM_EPSILON[layer.compute_dtype]
    return reference.ntm_sequence(
        x,
        {name: ops.convert_to_numpy(w) for name, w in weights.items()},
        initial=initial,
        norm_epsilon=norm_epsilon,
        sharpening_epsilon=location.SHARPENING_EPSILON[layer.compute_dtype],
        strength=config["strength_activation"],
        key_activation=BY_NAME[config["key_activation"]],
        add_activation=BY_NAME[config["add_activation"]],
        activation=BY_NAME[config["activation"]],
        **{name: config[name] for name in same.split()},
    )


def equals_the_oracle(layer, x, tolerance=1e-11):
    expected = oracle(layer, x)
    inside = keras_memory.trace(layer, x)
    assert set(inside) == set(expected)
    for name, value in expected.items():
        close(inside[name], value, tolerance)
    close(layer(x), expected["output"], tolerance)
    return expected


ADDRESSINGS = ["content_and_location", "content"]


@pytest.mark.parametrize(
    ("head_order", "addressing", "erase", "controller"),
    [
        *itertools.product(
            ["parallel", IN_TURN, "writes_in_turn"],
            ADDRESSINGS,
            [True, False],
            ["lstm"],
        ),
        *(
            # Heads act the same with each controller.
            slow_unless(
                others == (IN_TURN, "content_and_location", True),
                *others,
                controller,
            )
            for controller in ("gru", "rnn", "dense")
            for others in itertools.product(
                ["parallel", IN_TURN], ADDRESSINGS, [True, False]
            )
        ),
    ],
)
@needs_tensorflow
def test_equals_the_oracle(head_order, addressing, erase, controller):
    layer = randomised(
        head_order=head_order,
        addressing=addressing,
        erase=erase,
        controller=controller,
        read_heads=2,
        write_heads=3,
        shift_range=2,
        initial_memory="random",
        initial_reads="learned",
        initial_weighting="learned",
        initial_controller_state="learned",
        dtype="float64",
    )
    equals_the_oracle(layer, numbers())


# The option to compare with, to see that this one has an effect.
OPTIONS = {
    "interface_clip": 0.4,
    "clip_value": 0.3,
    "activation": "sigmoid",
    "key_activation": "linear",
    "add_activation": "linear",
    "strength_activation": "oneplus",
    "norm_epsilon": 0.3,
    "product_epsilon": 0.2,
    "shift_range": 0,
    "initial_memory": 0.2,
    "initial_reads": 0.4,
    "initial_weighting": 0.3,
    "initial_controller_state": 0.4,
}


@pytest.mark.parametrize("option", OPTIONS)
@needs_tensorflow
def test_each_option_equals_the_oracle_and_has_an_effect(option):
    fixed = {
        "read_heads": 2,
        "write_heads": 2,
        "initial_memory": -0.3,
        "initial_weighting": "constant",
        "dtype": "float64",
    }
    layer = randomised(**{**fixed, option: OPTIONS[option]})
    x = few()
    output = equals_the_oracle(layer, x)["output"]
    if option != "shift_range":  # changes the weights
        without = ops.convert_to_numpy(like(layer, **fixed)(x))
        assert np.abs(output - without).max() > 1e-3
    if option == "clip_value":
        assert np.isclose(np.abs(output), 0.3).any()


@needs_tensorflow
def test_clip_value_acts_before_the_activation():
    layer = randomised(clip_value=0.3, activation="sigmoid", dtype="float64")
    output = equals_the_oracle(layer, numbers())["output"]
    edge = reference.sigmoid(np.array([-0.3, 0.3]))
    assert output.min() == edge[0] and output.max() == edge[1]


def test_float32_equals_the_oracle():
    layer = randomised(
        scale=0.5, read_heads=2, write_heads=2, initial_memory="random"
    )
    equals_the_oracle(layer, numbers().astype("float32"), 1e-4)


@pytest.mark.parametrize("writing", ["addressed", "sequential"])
@pytest.mark.parametrize("shape", [(1, 1, WIDTH), (1, TIME, WIDTH), (2, 1, 3)])
@needs_tensorflow
def test_one_item_and_one_step_equal_the_oracle(shape, writing):
    layer = randomised(
        initial_memory="random", writing=writing, dtype="float64"
    )
    equals_the_oracle(layer, numbers(shape=shape))


# MERLIN's writing.


def written(**kwargs):
    """A layer with fewer slots than time steps, so that it overwrites slots."""
    fixed = {
        "writing": "sequential",
        "memory_slots": 5,
        "slot_size": 4,
        "read_heads": 2,
        "initial_memory": "random",
        "initial_reads": "learned",
        "initial_weighting": "learned",
        "dtype": "float64",
    }
    return randomised(**{**fixed, **kwargs})


LONG = (BATCH, 13, WIDTH)
WRITE_FIRST = ("write", "read", "read")


@pytest.mark.parametrize(
    ("head_order", "discount", "erase"),
    [
        # All pairs with the default head order.
        slow_unless(
            (discount is None) == (erase != (head_order == WRITE_FIRST)),
            head_order,
            discount,
            erase,
        )
        for head_order in ("parallel", WRITE_FIRST, ("read", "write", "read"))
        for discount in (None, 0.7)
        for erase in (True, False)
    ],
)
@needs_tensorflow
def test_sequential_writing_equals_the_oracle(head_order, discount, erase):
    layer = written(
        head_order=head_order, retroactive_discount=discount, erase=erase
    )
    equals_the_oracle(layer, numbers(shape=LONG))


@pytest.mark.parametrize(
    "options",
    [
        {"memory_slots": 13},
        {"memory_slots": 17},
        {"addressing": "content"},
        {"memory_slots": 1, "shift_range": 0},
        {"retroactive_discount": 0.0},
    ],
    ids=str,
)
@needs_tensorflow
def test_sequential_writing_in_other_sizes_equals_the_oracle(options):
    layer = written(**{"retroactive_discount": 0.9, **options})
    inside = equals_the_oracle(layer, numbers(shape=LONG))
    slots = inside["write_weighting"][:, :, 0].argmax(-1)
    first = slots[:, : layer.cell.memory_slots]
    assert (first == np.arange(first.shape[1])).all()


@needs_tensorflow
def test_sequential_writing_does_not_count_masked_steps():
    layer = written(retroactive_discount=0.7)
    x = numbers(shape=LONG)
    mask = np.ones(LONG[:2], bool)
    mask[0, [0, 4, 5, 9]] = mask[1, [3, 12]] = False
    output = ops.convert_to_numpy(layer(x, mask=mask))
    inside = keras_memory.trace(layer, x, mask=mask)
    for row, kept in enumerate(mask):
        expected = oracle(layer, x[row : row + 1, kept])
        close(output[row, kept], expected["output"][0], 1e-11)
        for name, value in expected.items():
            close(inside[name][row, kept], value[0], 1e-11)
    assert (inside["usage"][0, 0] == -1).all()


@pytest.mark.parametrize(
    ("erase", "memory"),
    [
        (True, [[1, 0, 0, 0], [1, 1, 2, 0], [1, 2, 4, 0], [1, 3, 8, 0]]),
        (False, [[1, 0, 0, 0], [1, 1, 2, 0], [1, 2, 6, 2], [1, 3, 14, 8]]),
    ],
)
def test_sequential_writing_matches_values_computed_by_hand(erase, memory):
    """Two slots, read evenly, take 1, 2, 4 and 8 in their first half."""
    layer = ntm(
        memory_slots=2,
        slot_size=2,
        controller=keras.layers.Dense(1, kernel_initializer="ones"),
        addressing="content",
        writing="sequential",
        retroactive_discount=0.5,
        erase=erase,
        add_activation="linear",
        initial_memory=0.0,
        kernel_initializer="zeros",
    )
    layer.build((1, 4, 1))
    controller = layer.cell.block_controllers[0]
    controller.kernel.assign([[1.0], [0.0], [0.0]])
    layer.cell.interfaces[0][0].assign([[0.0, 0.0, 0.0, 1.0]])
    start = layer.cell.unpack_state(layer.cell.get_initial_state(1))
    close(start.usage, [[-1, -1]], 0)
    close(start.write_weighting, [[[0, 0]]], 0)
    close(start.retroactive_weighting, [[[0, 0]]], 0)
    inside = keras_memory.trace(layer, np.reshape([1.0, 2, 4, 8], (1, 4, 1)))
    close(inside["read_weighting"][0, :, 0], np.full((4, 2), 0.5))
    close(inside["memory"][0], np.reshape(memory, (4, 2, 2)))
    slots = inside["write_weighting"][0, :, 0]
    close(slots, [[1, 0], [0, 1], [0, 1], [0, 1]], 0)
    close(inside["usage"][0], [[0, -1], [0.5, 0], [1, 0.5], [1.5, 1]])
    later = [[0, 0], [0.5, 0], [0.25, 0], [0.125, 0]]
    if not erase:
        later[2:] = [[0.25, 0.5], [0.125, 0.75]]
    close(inside["retroactive_weighting"][0, :, 0], later)


@pytest.mark.parametrize(
    ("slots", "dtype"),
    [
        slow_unless(slots < 100, slots, dtype)
        for slots in (31, 300)
        for dtype in ("mixed_float16", "mixed_bfloat16")
    ],
)
@needs_tensorflow
def test_sequential_writing_fills_every_slot_in_16_bits(slots, dtype):
    """Every slot is written once; then the least used slots are overwritten."""
    layer = randomised(
        memory_slots=slots,
        slot_size=2,
        controller="dense",
        controller_units=3,
        writing="sequential",
        retroactive_discount=0.9,
        dtype=dtype,
    )
    steps = slots + 10
    inside = keras_memory.trace(layer, numbers(shape=(1, steps, WIDTH)))
    for name, value in inside.items():
        assert np.isfinite(value.astype("float32")).all(), name
    written = inside["write_weighting"][0, :, 0].argmax(-1)
    assert written[:slots].tolist() == list(range(slots))
    usage = inside["usage"][0].astype("float32")
    for step in range(slots, steps):
        assert usage[step, written[step]] == usage[step].min()


def test_writes_in_turn_match_values_computed_by_hand():
    """Two heads write 2 and 3 to the only slot and erase what is in it."""
    for head_order, expected in (("parallel", 5), ("writes_in_turn", 3)):
        layer = ntm(
            memory_slots=1,
            write_heads=2,
            head_order=head_order,
            addressing="content",
            add_activation="linear",
            initial_memory=0.5,
            kernel_initializer="zeros",
        )
        layer.build((1, 1, WIDTH))
        set_interface_bias(
            layer, erase_vector=60.0, add_vector=[[2.0] * 5, [3.0] * 5]
        )
        inside = keras_memory.trace(layer, numbers(shape=(1, 1, WIDTH)))
        close(inside["memory"], np.full((1, 1, 1, 5), expected))
        close(inside["reads"], np.full((1, 1, 1, 5), 0.5))


# Initial states.


def test_constant_initial_values_are_not_weights():
    layer = ntm(read_heads=2, initial_weighting="constant", controller="gru")
    layer.build((BATCH, TIME, WIDTH))
    assert not initial_weights(layer)
    state = layer.cell.unpack_state(layer.cell.get_initial_state(BATCH))
    close(state.reads, np.zeros((BATCH, 2, 5)), 0)
    close(state.memory, np.full((BATCH, 11, 5), 1e-6), 1e-12)
    on_the_first = np.eye(11)[:1]
    close(state.read_weighting, np.tile(on_the_first, (BATCH, 2, 1)), 0)
    close(state.write_weighting, np.tile(on_the_first, (BATCH, 1, 1)), 0)
    (hidden,) = keras.tree.flatten(state.controller)
    close(hidden, np.zeros((BATCH, 7)), 0)


@pytest.mark.parametrize("start", ["learned", "random"])
def test_learned_and_random_initial_values_are_weights(start):
    layer = ntm(
        read_heads=2,
        initial_memory=start,
        initial_reads=start,
        initial_weighting=start,
        initial_controller_state=start,
    )
    layer.build((BATCH, TIME, WIDTH))
    shapes = {
        "initial_reads": (2, 5),
        "initial_memory": (11, 5),
        "initial_read_weighting": (2, 11),
        "initial_write_weighting": (1, 11),
        "initial_controller": (7,),
        "initial_controller_1": (7,),
    }
    weights = initial_weights(layer)
    values = {name: ops.convert_to_numpy(w) for name, w in weights.items()}
    assert {name: value.shape for name, value in values.items()} == shapes
    for name, weight in weights.items():
        assert weight.trainable == (start == "learned")
        assert values[name].std() > 0.01, "the slots must differ at the start"
    bound = 1 / np.sqrt(11 + 5)
    assert 0.8 * bound < np.abs(values["initial_memory"]).max() <= bound
    state = layer.cell.unpack_state(layer.cell.get_initial_state(BATCH))
    for item in range(BATCH):
        close(state.reads[item], values["initial_reads"])
        close(state.memory[item], values["initial_memory"])
        for name in ("read_weighting", "write_weighting"):
            close(
                getattr(state, name)[item],
                reference.softmax(values[f"initial_{name}"]),
            )
        hidden, cell = keras.tree.flatten(state.controller)
        close(hidden[item], values["initial_controller"])
        close(cell[item], values["initial_controller_1"])


def test_content_addressing_has_no_initial_weighting_to_learn():
    layer = ntm(addressing="content", initial_weighting="learned")
    layer.build((BATCH, TIME, WIDTH))
    assert not initial_weights(layer)


# Invariants of the layer.


@pytest.mark.parametrize("addressing", ["content", "content_and_location"])
def test_permuting_the_slots_does_not_change_the_output(addressing):
    """Memory and weightings are permuted alike. With shifts, only rotations of
    the slots keep the output."""
    layer = randomised(
        initial_memory="random",
        initial_weighting="random",
        addressing=addressing,
        scale=0.5,
    )
    x = numbers()
    before = keras_memory.trace(layer, x)
    order = np.roll(np.arange(11), 4)
    if addressing == "content":
        order = np.random.default_rng(3).permutation(11)
    for name, weight in initial_weights(layer).items():
        value = ops.convert_to_numpy(weight)
        axis = 0 if name == "initial_memory" else 1
        weight.assign(np.take(value, order, axis=axis))
    after = keras_memory.trace(layer, x)
    close(after["output"], before["output"], 1e-4)
    close(after["memory"], before["memory"][:, :, order], 1e-4)
    for name in ("read_weighting", "write_weighting", "content_weighting"):
        close(after[name], before[name][..., order], 1e-4)
        assert np.abs(after[name] - before[name]).max() > 1e-2


def test_parallel_heads_see_the_memory_of_the_step_before():
    """In parallel, a read head never sees the write of its own step. In turn,
    it does if it comes after the write head."""
    shape = (BATCH, 1, WIDTH)
    x = numbers(shape=shape)
    outputs = {}
    for order in ("parallel", ("read", "write"), ("write", "read")):
        layer = randomised(head_order=order, initial_memory=0.0)
        outputs[order] = keras_memory.trace(layer, x)
    close(outputs["parallel"]["reads"], np.zeros((BATCH, 1, 1, 5)), 0)
    close(outputs[("read", "write")]["reads"], np.zeros((BATCH, 1, 1, 5)), 0)
    assert np.abs(outputs[("write", "read")]["reads"]).min() > 1e-4


# Errors.


STARTS = ["zeros", None, True, NAN, float("inf"), [0.0]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("units", [0, 2.0]),
        ("memory_slots", [0, -1, 2.0, "2", None]),
        ("slot_size", [0, -1, 2.0, "2", None]),
        ("read_heads", [0, -1, 2.0, "2", None]),
        ("write_heads", [0, -1, 2.0, "2", None]),
        ("shift_range", [-1, 1.0, None]),
        ("interface_clip", [0, -1.0, NAN]),
        ("norm_epsilon", [0, -1e-9, NAN]),
        ("product_epsilon", [-1e-9, NAN]),
        ("initial_memory", STARTS),
        ("initial_reads", STARTS),
        ("initial_weighting", STARTS),
        ("addressing", ["location", None, True]),
        ("writing", ["serial", None, True]),
        ("retroactive_discount", [-0.1, 1.0, 1, NAN, "0.5", True]),
        ("erase", [None, 1, "yes"]),
        (
            "head_order",
            [
                ("read", "read"),
                ("read",),
                ("read", "write", "write"),
                ("read", "wirte"),
            ],
        ),
        # Bools and texts are no numbers.
        ("memory_slots", [True]),
        ("slot_size", [True]),
        ("read_heads", [True]),
        ("write_heads", [True]),
        ("shift_range", [True]),
        ("interface_clip", ["1"]),
        ("norm_epsilon", ["0"]),
        ("product_epsilon", ["0", None]),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError) as error:
            ntm(**{name: value})
        assert f"`{name}`" in str(error.value)
        assert f"Received: {name}={value!r}" in str(error.value)


@pytest.mark.parametrize("value", ["serial", 5, None])
def test_wrong_head_orders_are_refused(value):
    with pytest.raises(ValueError, match="`head_order`.*once") as error:
        ntm(head_order=value)
    assert f"Received: head_order={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "received"),
    [
        ({"write_heads": 2}, "write_heads=2"),
        ({"retroactive_discount": 0.5}, "slot_size=5"),
        (
            {
                "writing": "addressed",
                "retroactive_discount": 0.5,
                "slot_size": 4,
            },
            "writing='addressed'",
        ),
    ],
)
def test_sequential_writing_refuses_conflicting_options(options, received):
    with pytest.raises(ValueError, match=f"sequential.*{received}"):
        ntm(**{"writing": "sequential", **options})


def test_a_negative_initial_weighting_is_refused():
    with pytest.raises(ValueError, match="`initial_weighting`.*-0.5"):
        ntm(initial_weighting=-0.5)


@pytest.mark.parametrize(
    ("shift_range", "memory_slots"), [(1, 2), (3, 6), (1, 1)]
)
def test_overlapping_shifts_are_refused(shift_range, memory_slots):
    sizes = {"shift_range": shift_range, "memory_slots": memory_slots}
    message = f"shift_range={shift_range}, memory_slots={memory_slots}"
    with pytest.raises(ValueError, match="2 \\* shift_range.*" + message):
        ntm(**sizes)
    # Content addressing has no shifts.
    assert ntm(addressing="content", **sizes)(numbers()).shape[-1] == UNITS


def test_as_many_shifts_as_slots_are_accepted():
    assert ntm(shift_range=5)(numbers()).shape[-1] == UNITS
