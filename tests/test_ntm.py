"""The Neural Turing Machine against its oracle, finite differences, cases
solved by hand, and where mathematics is singular."""

import itertools

import keras
import numpy as np
import pytest
import reference
from catalogue import slow_unless
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory.addressing import content
from keras_memory.addressing import location

BATCH, TIME, WIDTH, UNITS = 2, 6, 3, 2
SIZES = {"memory_slots": 11, "slot_size": 5, "controller_units": 7}
IN_TURN = ("read", "write", "write", "read", "write")
NAN = float("nan")


def ntm(**kwargs):
    fixed = {"units": UNITS, **SIZES, "return_sequences": True}
    return keras_memory.NTMLayer(**{**fixed, **kwargs})


def randomised(seed=5, scale=1.0, **kwargs):
    """A layer whose weights are all drawn anew."""
    layer = ntm(**kwargs)
    layer.build((BATCH, TIME, WIDTH))
    rng = np.random.default_rng(seed)
    for weight in layer.cell.weights:
        weight.assign(rng.normal(size=weight.shape, scale=scale))
    return layer


def like(layer, **kwargs):
    """A layer of other arguments with the weights of `layer`."""
    other = ntm(**kwargs)
    other.build((BATCH, TIME, WIDTH))
    other.cell.set_weights(layer.cell.get_weights())
    return other


def initial_weights(layer):
    weights = layer.cell.weights
    return {w.name: w for w in weights if w.name.startswith("initial_")}


def numbers(seed=7, shape=(BATCH, TIME, WIDTH)):
    return np.random.default_rng(seed).normal(size=shape)


def few():
    """Numbers for three steps, where more would show nothing else."""
    return numbers()[:, :3]


def close(actual, expected, tolerance=1e-6):
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# Against the oracle.

BY_NAME = {
    "linear": reference.identity,
    "tanh": np.tanh,
    "sigmoid": reference.sigmoid,
}


def oracle(layer, x):
    """What `reference.ntm_sequence` says that the layer does."""
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
            # What heads do is the same with each controller.
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


# With what the option is compared, to see that it does something.
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
def test_each_option_equals_the_oracle_and_does_something(option):
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
    if option != "shift_range":  # which has other weights
        without = ops.convert_to_numpy(like(layer, **fixed)(x))
        assert np.abs(output - without).max() > 1e-3
    if option == "clip_value":
        assert np.isclose(np.abs(output), 0.3).any()


@needs_tensorflow
def test_clip_value_acts_in_front_of_the_activation():
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
    """A layer that overwrites: it has fewer slots than a sequence steps."""
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
        # By default all pairs.
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
def test_sequential_writing_by_hand(erase, memory):
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
def test_sequential_writing_in_16_bits(slots, dtype):
    """Every slot is written before any is again, and then the least used."""
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


def test_writes_in_turn_by_hand():
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


# Gradients against finite differences.


@pytest.mark.parametrize(
    "options",
    [
        {"read_heads": 2, "write_heads": 3, "shift_range": 2},
        slow_unless(False, {"write_heads": 3, "head_order": "writes_in_turn"}),
        {
            "write_heads": 2,
            "head_order": ("write", "read", "write"),
            "controller": "gru",
            "strength_activation": "oneplus",
            "product_epsilon": 0.2,
        },
        {
            "addressing": "content",
            "erase": False,
            "controller": "dense",
            "controller_layers": 2,
            "activation": "tanh",
        },
        {
            "controller": "rnn",
            "interface_clip": 1.5,
            "norm_epsilon": 0.1,
            "units": None,
        },
        {
            "read_heads": 2,
            "slot_size": 4,
            "memory_slots": 3,
            "writing": "sequential",
            "retroactive_discount": 0.7,
        },
        {
            "memory_slots": 3,
            "writing": "sequential",
            "addressing": "content",
            "head_order": ("write", "read"),
            "erase": False,
        },
    ],
    ids=[
        "heads",
        "writes in turn",
        "in turn",
        "content",
        "unprojected",
        "sequential",
        "sequential, content",
    ],
)
@needs_tensorflow
def test_gradients_equal_finite_differences(options):
    import tensorflow as tf

    layer = randomised(
        scale=0.6,
        initial_memory="learned",
        initial_reads="learned",
        initial_weighting="learned",
        initial_controller_state="learned",
        dtype="float64",
        **options,
    )
    rng = np.random.default_rng(11)
    x = tf.Variable(numbers())
    states = [
        tf.Variable(state * (1.0 + 0.3 * rng.uniform(size=state.shape)))
        for state in layer.cell.get_initial_state(batch_size=BATCH)
    ]
    mask = np.ones((BATCH, TIME), bool)
    mask[1, 3:5] = False
    projection = rng.normal(size=(BATCH, TIME, layer.cell.output_size))

    @tf.function  # once for both: tracing takes longest
    def loss_from(states):
        output = layer(x, initial_state=states, mask=mask)
        return tf.reduce_sum(projection * output)

    def loss_from_own_start():
        return loss_from(layer.cell.get_initial_state(batch_size=BATCH))

    def loss_from_states():
        return loss_from([state.value() for state in states])

    value = tf.reduce_sum(projection * layer(x, mask=mask))
    close(loss_from_own_start(), value, 1e-11)
    without_gradient = []
    for loss, variables in (
        (loss_from_own_start, [x, *layer.trainable_weights]),
        (loss_from_states, [x, *states]),
    ):
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(value, variables)
        for index, variable in enumerate(variables):
            if gradients[index] is None:
                without_gradient.append(index)
                continue
            gradient = ops.convert_to_numpy(gradients[index])
            start = ops.convert_to_numpy(variable).copy()
            direction = rng.normal(size=start.shape)
            values = []
            for step in (1e-5, -1e-5):
                variable.assign(start + step * direction)
                values.append(float(loss()))
            variable.assign(start)
            slope = (values[0] - values[1]) / 2e-5
            length = np.linalg.norm(gradient)
            if length == 0:
                without_gradient.append(index)
            error = abs(np.sum(gradient * direction) - slope)
            assert error <= 1e-6 * length, (index, variable.shape)
    # By content alone, nothing depends on the weightings of the step before,
    # and usage only chooses a slot.
    states = layer.cell.layout.records[0]._fields
    used = {"read_weighting", "write_weighting"}
    if options.get("addressing") == "content":
        used = set()
    if "retroactive_discount" in options:
        used |= {"write_weighting", "retroactive_weighting"}
    unused = {n for n in states if "weighting" in n or n == "usage"} - used
    assert {states[index - 1] for index in without_gradient} == unused


# Where mathematics is singular.


def set_interface_bias(layer, **values):
    """Fills the named parts of the interface's bias, the others with 0."""
    filled, (_, bias) = [], layer.cell.interfaces[0]
    for name, shape in layer.cell.accesses[0].parts._asdict().items():
        if shape is not None:
            part = np.broadcast_to(values.pop(name, 0.0), shape)
            filled.append(part.ravel())
    assert not values
    bias.assign(np.concatenate(filled))


def largest_gradients(layer, x, only_weights=False):
    """Largest absolute gradients of sum(output ** 2) with respect to inputs
    and weights, and to the initial states; all must be finite."""
    import tensorflow as tf

    x = tf.cast(x, layer.compute_dtype)
    layer.build(x.shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        start = layer.cell.get_initial_state(batch_size=x.shape[0])
        tape.watch(start)
        output = layer(x, initial_state=start)
        loss = tf.reduce_sum(tf.cast(output, "float32") ** 2)
    assert np.isfinite(ops.convert_to_numpy(output).astype("float32")).all()
    inside = keras_memory.trace(layer, x)
    for name, value in inside.items():
        value = value.astype("float32")
        assert np.isfinite(value).all(), name
        if "weighting" in name:
            assert (value >= 0).all(), name
            close(value.sum(-1), np.ones(value.shape[:-1]), 2e-2)

    variables = [x, *layer.trainable_weights, *start]
    sizes = []
    for gradient in tape.gradient(loss, variables):
        sizes.append(0.0)
        if gradient is not None:
            value = ops.convert_to_numpy(tf.cast(gradient, "float64"))
            sizes[-1] = np.abs(value).max()
    of_weights = np.max(sizes[: -len(start)])
    of_states = 0.0 if only_weights else np.max(sizes[-len(start) :])
    assert np.isfinite(of_weights) and np.isfinite(of_states)
    return of_weights, of_states


SATURATED = {
    f"{part} {value:+}": {part: value}
    for part in (
        "key",
        "strength",
        "interpolation_gate",
        "sharpening",
        "erase_vector",
        "add_vector",
    )
    for value in (60, -60)
}
SATURATED |= {
    "shift back": {"shift": [60, 0, 0]},
    "shift on": {"shift": [0, 0, 60]},
    "no shift": {"shift": [0, 60, 0]},
    "sharp on one slot": {"shift": [0, 60, 0], "sharpening": 60},
    "sharp by content": {
        "interpolation_gate": 60,
        "strength": 60,
        "sharpening": 60,
    },
    "sharp on the past": {
        "interpolation_gate": -60,
        "shift": [0, 60, 0],
        "sharpening": 60,
    },
    "all on": dict.fromkeys(
        ("strength", "interpolation_gate", "sharpening", "erase_vector"), 60
    ),
    "all off": dict.fromkeys(
        ("strength", "interpolation_gate", "sharpening", "erase_vector"), -60
    ),
}


@pytest.mark.parametrize("name", SATURATED)
@needs_tensorflow
def test_saturated_gates(name):
    layer = ntm(read_heads=2)
    layer.build((BATCH, TIME, WIDTH))
    set_interface_bias(layer, **SATURATED[name])
    of_weights, of_states = largest_gradients(layer, few())
    assert 0 < of_weights < 1e2
    assert of_states < 1e5


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["all on", "all off", "sharp on one slot"])
@needs_tensorflow
def test_saturated_gates_in_16_bits(name, dtype):
    layer = ntm(dtype=dtype)
    layer.build((BATCH, TIME, WIDTH))
    set_interface_bias(layer, **SATURATED[name])
    of_weights, of_states = largest_gradients(layer, few())
    assert 0 < of_weights < 1e2
    assert of_states < 1e5


SINGULAR = {
    "default": ({}, {}),
    "one slot": ({"memory_slots": 1, "shift_range": 0}, {}),
    "one slot by content": ({"memory_slots": 1, "addressing": "content"}, {}),
    "zero memory": ({"initial_memory": 0.0}, {}),
    "zero memory, added only": ({"initial_memory": 0.0, "erase": False}, {}),
    "equal slots": ({"initial_memory": 0.5}, {}),
    "tiny memory": ({"initial_memory": 1e-30}, {}),
    "one-hot start": (
        {"initial_weighting": "constant", "initial_memory": "random"},
        {"interpolation_gate": -60, "shift": [0, 60, 0]},
    ),
    "one-hot start, sharp": (
        {"initial_weighting": "constant", "initial_memory": "random"},
        {"interpolation_gate": -60, "shift": [0, 60, 0], "sharpening": 60},
    ),
    "nowhere at the start": ({"initial_weighting": 0.0}, {}),
    "nowhere, gate nearly shut": (
        {"initial_weighting": 0.0, "initial_memory": "random"},
        {"interpolation_gate": -15},
    ),
    "nowhere, gate shut": (
        {"initial_weighting": 0.0, "initial_memory": "random"},
        {"interpolation_gate": -60},
    ),
    "in turn": ({"head_order": ("write", "read")}, {}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(SINGULAR, ["float32"]),
        *itertools.product(
            ["default", "one slot", "zero memory", "nowhere, gate shut"],
            ["float64", "mixed_float16"],
        ),
    ],
)
@needs_tensorflow
def test_singular_points(name, dtype):
    options, bias = SINGULAR[name]
    layer = ntm(dtype=dtype, **options)
    layer.build((BATCH, TIME, WIDTH))
    set_interface_bias(layer, **bias)
    # A weighting that is zero everywhere is a number, nothing learns it, and
    # the slope of sharpening there is that of the logarithm at its epsilon.
    no_weighting = options.get("initial_weighting") == 0.0
    of_weights, of_states = largest_gradients(
        layer, few(), only_weights=no_weighting
    )
    assert 0 < of_weights < 1e2
    assert of_states < 1e5


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@needs_tensorflow
def test_zero_memory_zero_keys_and_zero_inputs(dtype):
    layer = ntm(dtype=dtype, initial_memory=0.0, kernel_initializer="zeros")
    of_weights, of_states = largest_gradients(layer, 0 * few())
    assert of_weights == of_states == 0
    set_interface_bias(layer, add_vector=0.5)
    layer.cell.output_projection[0].assign(np.ones((12, UNITS)))
    of_weights, of_states = largest_gradients(layer, 0 * few())
    assert 0 < of_weights < 1e4
    assert of_states < 1e5


def test_one_slot_and_no_shift_give_no_warnings(recwarn):
    for start in ("constant", "learned"):
        layer = ntm(memory_slots=1, shift_range=0, initial_weighting=start)
        layer(numbers().astype("float32"))
    warnings = [warning for warning in recwarn if "axis" in str(warning)]
    assert not warnings


@pytest.mark.parametrize("shape", [(1, TIME, WIDTH), (2, 1, WIDTH), (1, 1, 1)])
@needs_tensorflow
def test_one_item_and_one_step_are_finite(shape):
    layer = ntm()
    of_weights, of_states = largest_gradients(layer, numbers(shape=shape))
    assert 0 < of_weights < 1e2
    assert of_states < 1e5


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@pytest.mark.parametrize("controller", ["lstm", "dense"])
@needs_tensorflow
def test_huge_inputs(controller, dtype):
    layer = ntm(controller=controller, dtype=dtype)
    of_weights, of_states = largest_gradients(layer, 1e4 * few())
    assert 0 < of_weights < 1e6
    assert of_states < 1e6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@needs_tensorflow
def test_huge_interface(dtype):
    layer = randomised(controller="dense", dtype=dtype)
    kernel = layer.cell.interfaces[0][0]
    kernel.assign(1e4 * numbers(shape=kernel.shape))
    of_weights, _ = largest_gradients(layer, few())
    assert of_weights > 0


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"]
)
@pytest.mark.parametrize(
    "options",
    [{"initial_memory": 0.0}, {"addressing": "content"}],
    ids=["zero memory", "content"],
)
@needs_tensorflow
def test_16_bits(options, dtype):
    # A dense controller: TensorFlow has no orthogonal matrices in bfloat16,
    # which Keras draws for recurrent kernels.
    layer = ntm(dtype=dtype, controller="dense", **options)
    of_weights, of_states = largest_gradients(layer, few())
    assert 0 < of_weights < 1e2
    assert of_states < 1e5
    # Close to the same in 32 bits.
    wide = like(layer, dtype="float32", controller="dense", **options)
    difference = ops.convert_to_numpy(
        ops.cast(layer(few()), "float32") - wide(few())
    )
    assert np.abs(difference).max() < 0.03


# What the layer starts with.


def test_constant_initial_values():
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
def test_initial_values_that_are_weights(start):
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


def test_by_content_there_is_no_initial_weighting_to_learn():
    layer = ntm(addressing="content", initial_weighting="learned")
    layer.build((BATCH, TIME, WIDTH))
    assert not initial_weights(layer)


# Invariants of the whole.


@pytest.mark.parametrize("head_order", ["parallel", IN_TURN])
def test_weightings_are_weightings_at_every_step(head_order):
    layer = randomised(read_heads=2, write_heads=3, head_order=head_order)
    inside = keras_memory.trace(layer, 3 * numbers())
    names = [name for name in inside if "weighting" in name] + ["shift"]
    assert len(names) == 4
    for name in names:
        assert (inside[name] >= 0).all()
        close(inside[name].sum(-1), np.ones(inside[name].shape[:-1]))
    assert (inside["strength"] > 0).all() and (inside["sharpening"] >= 1).all()
    for name in ("interpolation_gate", "erase_vector"):
        assert (inside[name] >= 0).all() and (inside[name] <= 1).all()


@pytest.mark.parametrize("addressing", ["content", "content_and_location"])
def test_slots_have_no_order_but_that_of_the_shifts(addressing):
    """Permuting the slots permutes memory and weightings and leaves the
    output as it is; with shifts, turning them does."""
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
    """In parallel a read head never sees the write of its own step; in turn
    it does if it comes after it."""
    shape = (BATCH, 1, WIDTH)
    x = numbers(shape=shape)
    outputs = {}
    for order in ("parallel", ("read", "write"), ("write", "read")):
        layer = randomised(head_order=order, initial_memory=0.0)
        outputs[order] = keras_memory.trace(layer, x)
    close(outputs["parallel"]["reads"], np.zeros((BATCH, 1, 1, 5)), 0)
    close(outputs[("read", "write")]["reads"], np.zeros((BATCH, 1, 1, 5)), 0)
    assert np.abs(outputs[("write", "read")]["reads"]).min() > 1e-4


# What is refused.


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
        # Neither a bool is a number nor a text.
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
def test_arguments_that_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError) as error:
            ntm(**{name: value})
        assert f"`{name}`" in str(error.value)
        assert f"Received: {name}={value!r}" in str(error.value)


@pytest.mark.parametrize("value", ["serial", 5, None])
def test_head_orders_that_are_no_list(value):
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
def test_what_sequential_writing_needs(options, received):
    with pytest.raises(ValueError, match=f"sequential.*{received}"):
        ntm(**{"writing": "sequential", **options})


def test_a_negative_weighting_is_none():
    with pytest.raises(ValueError, match="`initial_weighting`.*-0.5"):
        ntm(initial_weighting=-0.5)


@pytest.mark.parametrize(
    ("shift_range", "memory_slots"), [(1, 2), (3, 6), (1, 1)]
)
def test_shifts_that_overlap(shift_range, memory_slots):
    sizes = {"shift_range": shift_range, "memory_slots": memory_slots}
    message = f"shift_range={shift_range}, memory_slots={memory_slots}"
    with pytest.raises(ValueError, match="2 \\* shift_range.*" + message):
        ntm(**sizes)
    # By content there are no shifts.
    assert ntm(addressing="content", **sizes)(numbers()).shape[-1] == UNITS


def test_as_many_shifts_as_slots():
    assert ntm(shift_range=5)(numbers()).shape[-1] == UNITS


@pytest.mark.parametrize(
    "name",
    [
        "key_activation",
        "add_activation",
        "strength_activation",
        "activation",
        "kernel_initializer",
        "bias_initializer",
    ],
)
def test_names_that_keras_does_not_know(name):
    with pytest.raises(ValueError, match="tahn"):
        ntm(**{name: "tahn"})
