"""The Differentiable Neural Computer, compared with its oracle and with values
computed by hand. `test_accesses.py` has the checks of all accesses."""

import concurrent.futures
import threading

import keras
import numpy as np
import pytest
import reference
from access_harness import ALL_IN_ONE
from access_harness import BATCH
from access_harness import DNC
from access_harness import TIME
from access_harness import UNITS
from access_harness import WIDTH
from access_harness import bias_of
from access_harness import close
from access_harness import dnc_states
from access_harness import few
from access_harness import largest_links
from access_harness import numbers
from catalogue import slow_unless
from harness import act
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory import DNCState
from keras_memory import addressing
from keras_memory.addressing import usage
from keras_memory.addressing.linkage import dense_linkage

NAN = float("nan")

dnc, built, randomised, like = DNC.make, DNC.built, DNC.randomised, DNC.like


def with_dense_links(inside):
    """A trace, or a state as a dict, with N x N links."""
    inside = dict(inside)
    for name in [name for name in inside if name.endswith("link_columns")]:
        columns = inside.pop(name)
        name = name.replace("link_columns", "linkage")
        inside[name] = dense_linkage(inside[name], columns)
    return inside


# Against the oracle.

BY_NAME = {
    "linear": reference.identity,
    "tanh": np.tanh,
    "sigmoid": reference.sigmoid,
    "softplus": reference.softplus,
    "oneplus": reference.oneplus,
}


def oracle(layer, x, states=None, use_memory=True):
    """The results of `reference.dnc_sequence` for the layer's weights."""
    cell, config = layer.cell, layer.cell.get_config()
    weights = []
    for block, controller in enumerate(cell.block_controllers):
        weights.append(
            {
                "controller_kernel": controller.kernel,
                "controller_bias": controller.bias,
                "interface_kernel": cell.interfaces[block][0],
                "interface_bias": cell.interfaces[block][1],
            }
        )
        if config["controller"] != "dense":
            weights[-1]["controller_recurrent_kernel"] = (
                controller.recurrent_kernel
            )
        if config["interface_layer_norm"]:
            weights[-1]["gamma"] = cell.interface_norms[block].gamma
            weights[-1]["beta"] = cell.interface_norms[block].beta
    weights[-1]["output_kernel"] = cell.output_projection[0]
    weights[-1]["output_bias"] = cell.output_projection[1]
    if states is None:
        states = cell.get_initial_state(batch_size=len(x))
    records = cell.unpack_state(states)
    records = (records,) if isinstance(records, DNCState) else records
    initial = [
        with_dense_links(
            {
                name: ops.convert_to_numpy(value)
                for name, value in record._asdict().items()
                if name != "controller" and not isinstance(value, tuple)
            }
        )
        for record in records
    ]
    controllers = [
        [ops.convert_to_numpy(state) for state in keras.tree.flatten(one)]
        for record in records
        for one in record.controller
    ]
    same = (
        "slot_size read_heads write_heads controller share_memory "
        "linkage sparse_links content_masks deallocation link_sharpening "
        "clip_value interface_layer_norm product_epsilon"
    )
    epsilons = {}
    for name in ("norm_epsilon", "usage_epsilon"):
        epsilons[name] = config[name]
        if config[name] is None:
            wide = layer.compute_dtype == "float64"
            epsilons[name] = 1e-16 if wide else 1e-8
    return reference.dnc_sequence(
        x,
        [
            {k: ops.convert_to_numpy(w) for k, w in one.items()}
            for one in weights
        ],
        initial=initial,
        initial_controllers=controllers,
        **epsilons,
        strength=BY_NAME[config["strength_activation"]],
        key_activation=BY_NAME[config["key_activation"]],
        add_activation=BY_NAME[config["add_activation"]],
        activation=BY_NAME[config["activation"]],
        use_memory=use_memory,
        layers=config["num_layers"],
        **{name: config[name] for name in same.split()},
    )


def equals_the_oracle(layer, x, states=None, tolerance=1e-11, **kwargs):
    expected = oracle(layer, x, states, **kwargs)
    inside = keras_memory.trace(layer, x, initial_state=states, **kwargs)
    inside = with_dense_links(inside)
    assert set(inside) == set(expected)
    for name, value in expected.items():
        try:
            close(inside[name], value, tolerance)
        except AssertionError as error:
            raise AssertionError(name) from error
    output = layer(x, initial_state=states, **kwargs)
    close(output, expected["output"], tolerance)
    return expected


@pytest.mark.parametrize(
    ("controller", "write_heads"),
    [
        ("lstm", 1),
        ("lstm", 3),
        # Heads act the same with each controller.
        *(("gru", 1), ("rnn", 3), ("dense", 1)),
        *(
            slow_unless(False, controller, heads)
            for controller, heads in (("gru", 3), ("rnn", 1), ("dense", 3))
        ),
    ],
)
@needs_tensorflow
def test_equals_the_oracle(controller, write_heads):
    layer = randomised(
        controller=controller,
        write_heads=write_heads,
        initial_memory="random",
        initial_controller_state="learned",
        dtype="float64",
    )
    x = numbers()
    equals_the_oracle(layer, x)
    equals_the_oracle(layer, x, dnc_states(layer))


# The option, and whether the layer has other weights without it.
OPTIONS = {
    "key_activation": "tanh",
    "add_activation": "tanh",
    "strength_activation": "softplus",
    "norm_epsilon": 0.3,
    "product_epsilon": 0.2,
    "usage_epsilon": 0.1,
    "deallocation": True,
    "content_masks": True,
    "link_sharpening": True,
    "linkage": False,
    "sparse_links": 3,
    "interface_layer_norm": True,
    "clip_value": 0.3,
    "activation": "sigmoid",
}
WITH_OTHER_WEIGHTS = {
    "content_masks",
    "link_sharpening",
    "linkage",
    "sparse_links",  # has other states
    "interface_layer_norm",
}


@pytest.mark.parametrize("option", OPTIONS)
@needs_tensorflow
def test_each_option_equals_the_oracle_and_has_an_effect(option):
    fixed = {"write_heads": 2, "dtype": "float64"}
    layer = randomised(**fixed, **{option: OPTIONS[option]})
    x, states = few(), dnc_states(layer)
    output = equals_the_oracle(layer, x, states)["output"]
    if option not in WITH_OTHER_WEIGHTS:
        without = like(layer, **fixed)(x, initial_state=states)
        assert np.abs(output - ops.convert_to_numpy(without)).max() > 1e-4
    if option == "clip_value":
        assert np.isclose(np.abs(output), 0.3).any()


@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "controller": "gru"},
        {"num_layers": 3, "write_heads": 2, **ALL_IN_ONE},
        {"num_layers": 2, "linkage": False, "controller": "dense"},
        {"num_layers": 2, "sparse_links": 2, "controller": "dense"},
    ],
    ids=["two", "three with all options", "no linkage", "sparse links"],
)
@needs_tensorflow
def test_several_layers_equal_the_oracle(options, share_memory):
    layer = randomised(share_memory=share_memory, dtype="float64", **options)
    equals_the_oracle(layer, few(), dnc_states(layer))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 1, WIDTH)),
        ({"write_heads": 3, "read_heads": 1}, (1, TIME, WIDTH)),
        ({"memory_slots": 1}, (2, 1, WIDTH)),
        ({"slot_size": 1, "write_heads": 2}, (3, 2, 1)),
        ({"memory_slots": 2, "slot_size": 1, **ALL_IN_ONE}, (1, 3, 1)),
        ({"memory_slots": 1, "sparse_links": 1}, (1, 3, 1)),
        ({"sparse_links": 1, "read_heads": 1, **ALL_IN_ONE}, (1, 5, 1)),
    ],
    ids=str,
)
@needs_tensorflow
def test_other_sizes_equal_the_oracle(options, shape):
    layer = randomised(shape=shape, dtype="float64", **options)
    states = dnc_states(layer, batch=shape[0])
    equals_the_oracle(layer, numbers(shape=shape), states)


@pytest.mark.parametrize("start", ["constant", 0.3, "learned"])
@needs_tensorflow
def test_initial_memories_equal_the_oracle(start):
    layer = randomised(initial_memory=start, dtype="float64")
    x = numbers()
    if start == "learned":
        equals_the_oracle(layer, x)
    # Rounding decides only which of equal slots is used first.
    close(layer(x), oracle(layer, x)["output"], 1e-11)
    memory = layer.cell.unpack_state(layer.cell.get_initial_state(1)).memory
    if start == "learned":
        (weight,) = [
            w for w in layer.trainable_weights if w.name == "initial_memory"
        ]
        close(memory[0], weight, 0)
    else:
        close(memory, np.full((1, 11, 5), {"constant": 0.0}.get(start, start)))


@needs_tensorflow
def test_sorting_the_slots_equals_the_oracle(monkeypatch):
    monkeypatch.setattr(usage, "MOST_COMPARED_SLOTS", 0)
    layer = randomised(write_heads=3, initial_memory="random", dtype="float64")
    equals_the_oracle(layer, numbers())
    equals_the_oracle(layer, numbers(), dnc_states(layer))


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"num_layers": 2, "share_memory": False}]
)
@needs_tensorflow
def test_without_its_memory_the_layer_equals_the_oracle(options):
    layer = randomised(dtype="float64", **options)
    states = dnc_states(layer)
    equals_the_oracle(layer, numbers(), states, use_memory=False)


def test_float32_equals_the_oracle():
    layer = randomised(scale=0.5, write_heads=2)
    x = numbers().astype("float32")
    equals_the_oracle(layer, x, dnc_states(layer), tolerance=2e-5)


def test_all_states_start_at_zero():
    layer = built(write_heads=2, num_layers=2, share_memory=False)
    first, second = layer.cell.unpack_state(layer.cell.get_initial_state(3))
    shapes = {
        "reads": (3, 2, 5),
        "memory": (3, 11, 5),
        "usage": (3, 11),
        "linkage": (3, 2, 11, 11),
        "precedence": (3, 2, 11),
        "read_weighting": (3, 2, 11),
        "write_weighting": (3, 2, 11),
    }
    for record in (first, second):
        assert record._fields == (*shapes, "controller", "link_columns")
        for name, shape in shapes.items():
            close(getattr(record, name), np.zeros(shape), 0)


def test_interface_size_equals_the_paper():
    layer = built(write_heads=1, read_heads=3)
    width, heads = 5, 3
    expected = width * heads + 3 * width + 5 * heads + 3
    assert layer.cell.interfaces[0][0].shape == (7, expected)


# Single steps of the memory, with an interface set by hand.


def a_step(access, state, **values):
    interface = bias_of(access, **values)[None].astype("float32")
    return act(access, ops.convert_to_tensor(interface), state)


def by_hand(**options):
    """An access and its initial state, for one batch item."""
    layer = built(controller="dense", read_heads=1, **options)
    cell = layer.cell
    state = cell.unpack_state(cell.get_initial_state(1))
    return cell.accesses[0], state._replace(controller=())


def one_hot(slot, slots=11):
    return np.eye(slots, dtype="float32")[slot]


def tensor(value):
    return ops.convert_to_tensor(np.asarray(value, "float32"))


ON, OFF = 100.0, -100.0


def free_only(state, slot):
    """The state with a single unused slot, after a step without writes."""
    return state._replace(
        usage=tensor(1.0 - one_hot(slot))[None],
        write_weighting=ops.zeros_like(state.write_weighting),
    )


def test_links_record_the_order_of_writing():
    access, state = by_hand()
    for slot in (0, 3, 1):
        state, inside = a_step(
            access,
            free_only(state, slot),
            write_gate=ON,
            allocation_gate=ON,
            free_gate=OFF,
            add_vector=slot + 1.0,
        )
        close(inside["allocation_weighting"], [[one_hot(slot)]], 1e-4)
        close(state.write_weighting, [[one_hot(slot)]], 1e-4)
        close(state.precedence, [[one_hot(slot)]], 1e-4)
    links = np.zeros((11, 11))
    links[3, 0] = links[1, 3] = 1.0
    close(state.linkage, [[links]], 1e-4)
    # The read modes: backward, content, forward.
    for start, mode, end in (
        (0, (0, 0, ON), 3),
        (3, (0, 0, ON), 1),
        (1, (ON, 0, 0), 3),
        (3, (ON, 0, 0), 0),
    ):
        after, _ = a_step(
            access,
            state._replace(read_weighting=tensor([[one_hot(start)]])),
            write_gate=OFF,
            read_mode=mode,
        )
        close(after.read_weighting, [[one_hot(end)]], 1e-4)
        close(after.reads, np.full((1, 1, 5), end + 1.0), 1e-3)
        close(after.linkage, state.linkage, 1e-4)


def test_each_write_head_has_its_own_links():
    orders = ((0, 3, 1), (5, 1, 2))
    linkage, precedence = np.zeros((1, 2, 11, 11)), np.zeros((1, 2, 11))
    linkage, precedence = tensor(linkage), tensor(precedence)
    for slots in zip(*orders):
        written = tensor([[one_hot(slot) for slot in slots]])
        linkage = addressing.linkage_after_write(linkage, precedence, written)
        precedence = addressing.precedence_after_write(precedence, written)
    close(precedence, [[one_hot(1), one_hot(2)]], 0)
    expected = np.zeros((1, 2, 11, 11))
    expected[0, 0, 3, 0] = expected[0, 0, 1, 3] = 1.0
    expected[0, 1, 1, 5] = expected[0, 1, 2, 1] = 1.0
    close(linkage, expected, 0)
    read = tensor([[one_hot(1), one_hot(5), one_hot(3)]])
    forward, backward = addressing.follow_links(linkage, read)
    none = np.zeros(11)
    close(
        forward,
        [[[none, one_hot(2)], [none, one_hot(1)], [one_hot(1), none]]],
        0,
    )
    close(
        backward,
        [[[one_hot(3), one_hot(5)], [none, none], [one_hot(0), none]]],
        0,
    )


def test_rewriting_a_slot_removes_its_links():
    access, state = by_hand()
    for slot in (0, 3, 1, 0):
        gates = {"write_gate": ON, "allocation_gate": ON}
        state, _ = a_step(access, free_only(state, slot), **gates)
    links = np.zeros((11, 11))
    links[1, 3] = links[0, 1] = 1.0
    close(state.linkage, [[links]], 1e-4)


@pytest.mark.parametrize("deallocation", [False, True])
def test_freed_slots_are_allocated_next(deallocation):
    access, state = by_hand(deallocation=deallocation)
    full = state._replace(
        usage=ops.ones((1, 11)),
        memory=ops.ones((1, 11, 5)),
        read_weighting=tensor([[one_hot(7)]]),
    )
    for free_gate, free in ((ON, one_hot(7)), (OFF, np.zeros(11))):
        after, inside = a_step(
            access,
            full,
            free_gate=free_gate,
            allocation_gate=ON,
            write_gate=ON,
        )
        close(inside["retention"], [1.0 - free])
        close(after.usage, [1.0 - free])
        close(inside["allocation_weighting"], [[free]], 1e-5)
        close(after.write_weighting, [[free]], 1e-5)
    # Freed slots are erased only with deallocation; the write adds zeros.
    after, _ = a_step(access, full, free_gate=ON, write_gate=OFF)
    erased = one_hot(7) if deallocation else np.zeros(11)
    close(after.memory, np.ones((1, 11, 5)) * (1.0 - erased)[:, None])


def test_a_second_write_head_takes_another_slot():
    access, state = by_hand(write_heads=2)
    usage = tensor([1.0 - one_hot(2) - 0.6 * one_hot(6)])
    for gate, second in ((ON, one_hot(6)), (OFF, one_hot(2))):
        _, inside = a_step(
            access,
            state._replace(usage=usage),
            write_gate=[gate, ON],
            allocation_gate=ON,
        )
        first, second_found = inside["allocation_weighting"][0]
        assert int(np.argmax(first)) == 2
        assert int(np.argmax(second_found)) == int(np.argmax(second))
        close(second_found[2], 1.0 if gate == OFF else 0.0, 1e-4)
    # Slot 6 is 0.6 free; the first head has taken 1e-6 of it.
    close(inside["allocation_weighting"][0, 0, 6], 0.0, 1e-5)


def test_reads_see_the_write_of_their_own_step():
    access, state = by_hand(memory_slots=1)
    after, _ = a_step(
        access, state, write_gate=ON, allocation_gate=OFF, add_vector=3.0
    )
    close(after.memory, np.full((1, 1, 5), 3.0))
    # Without links, only content addressing reads, at a third of the weight.
    close(after.read_weighting, [[[1 / 3]]])
    close(after.reads, np.full((1, 1, 5), 1.0))


def test_sharpened_links_are_uniform_where_links_are_absent():
    access, state = by_hand(link_sharpening=True)
    _, inside = a_step(access, state, forward_sharpening=3.0)
    for name in ("forward_weighting", "backward_weighting"):
        close(inside[name], np.full((1, 1, 1, 11), 1 / 11))


# Sparse links.


def gradients_of(layer, x, states, jit_compile=False, eagerly=False):
    """Gradients of inputs, weights and states; the loss is of outputs and all
    states but the links."""
    import tensorflow as tf

    x, states = tf.constant(x), [tf.constant(state) for state in states]
    weights = layer.trainable_weights
    variables = [x, *[weight.value for weight in weights], *states]
    kept = ["link" not in name for name in layer.cell.layout.names]

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            output, *after = layer(x, initial_state=states, training=True)
            loss = tf.reduce_sum(tf.sin(output))
            for state, counts in zip(after, kept):
                loss += tf.reduce_sum(tf.sin(2 * state)) if counts else 0.0
        return output, tape.gradient(loss, variables)

    if not eagerly:  # tracing takes longest
        gradients = tf.function(gradients, jit_compile=jit_compile)
    output, found = gradients()
    states = layer.cell.unpack_state(found[-len(states) :])
    return output, found[: -len(kept)], states


SLOWER = ("auto", True), ("portable", False)


@pytest.mark.parametrize(
    ("loop", "jit_compile"),
    [("auto", False), *(slow_unless(False, *way) for way in SLOWER)],
)
@needs_tensorflow
def test_as_many_sparse_links_as_slots_equal_dense_links(loop, jit_compile):
    fixed = {
        "write_heads": 2,
        "controller": "dense",
        "initial_memory": "random",
        "return_state": True,
        "loop": loop,
        "dtype": "float64",
    }
    dense = randomised(**fixed)
    sparse = like(dense, sparse_links=11, **fixed)
    x, states = few(), dnc_states(dense)
    record = dense.cell.unpack_state(states)
    links, columns = largest_links(ops.convert_to_numpy(record.linkage), 11)
    record = record._replace(linkage=links, link_columns=columns)
    given = sparse.cell.pack_state(record)
    expected = keras_memory.trace(dense, x, initial_state=states)
    inside = keras_memory.trace(sparse, x, initial_state=given)
    for name, value in with_dense_links(inside).items():
        close(value, expected[name], 1e-12)
    output, of_weights, of_states = gradients_of(sparse, x, given, jit_compile)
    expected, *others = gradients_of(dense, x, states, eagerly=True)
    close(output, expected, 1e-12)
    for found, one in zip(of_weights, others[0], strict=True):
        close(found, one, 1e-12 * max(1.0, np.abs(one).max()))
    of_states, others = of_states._asdict(), others[1]._asdict()
    assert (ops.convert_to_numpy(of_states["link_columns"]) == 0).all()
    of_links = ops.convert_to_numpy(others.pop("linkage"))
    at_columns = np.take_along_axis(of_links, columns, axis=-1)
    close(of_states["linkage"], at_columns, 1e-12 * np.abs(of_links).max())
    for name in ("precedence", "write_weighting", "read_weighting", "memory"):
        size = max(1.0, np.abs(others[name]).max())
        close(of_states[name], others[name], 1e-12 * size)


@pytest.mark.parametrize(("heads", "entries"), [(1, 1), (2, 1), (2, 3)])
def test_single_links_are_kept_exactly(heads, entries):
    """With one slot written per step, each row has only one link. The initial
    state of zeros has equal columns, which must not matter."""
    rng = np.random.default_rng(3)
    linkage = tensor(np.zeros((BATCH, heads, 11, 11)))
    precedence = tensor(np.zeros((BATCH, heads, 11)))
    sparse = tensor(np.zeros((BATCH, heads, entries, 11)))
    columns = sparse
    for _ in range(17):
        slots = rng.integers(0, 11, size=(BATCH, heads))
        written = tensor(np.eye(11)[slots])
        after = precedence, written
        linkage = addressing.linkage_after_write(linkage, *after)
        sparse, columns = addressing.sparse_linkage_after_write(
            sparse, columns, *after
        )
        precedence = addressing.precedence_after_write(*after)
        close(as_matrix(sparse, columns), linkage, 0)
        read = tensor(reference.softmax(rng.normal(size=(BATCH, 3, 11))))
        found = addressing.follow_sparse_links(sparse, columns, read)
        for one, other in zip(found, addressing.follow_links(linkage, read)):
            close(one, other)
    assert ops.convert_to_numpy(linkage).sum() > 3


def as_matrix(linkage, columns):
    """The links of a step, slots last, as an N x N matrix."""
    linkage, columns = map(ops.convert_to_numpy, (linkage, columns))
    return dense_linkage(linkage.swapaxes(-1, -2), columns.swapaxes(-1, -2))


def test_rows_of_sparse_links_have_each_column_once():
    layer = randomised(write_heads=2, sparse_links=4, initial_memory="random")
    x = 2.0 * numbers(shape=(BATCH, 20, WIDTH)).astype("float32")
    inside = keras_memory.trace(layer, x)
    columns = inside["link_columns"]
    assert columns.shape == (BATCH, 20, 2, 11, 4)
    assert (columns == np.round(columns)).all()
    assert columns.min() == 0 and columns.max() == 10
    assert (np.diff(np.sort(columns, axis=-1), axis=-1) > 0).all()
    # Columns have changed, and the diagonal has no link.
    assert (columns[:, -1] != np.arange(4)).any()
    links = with_dense_links(inside)["linkage"]
    assert (np.diagonal(links, axis1=-2, axis2=-1) == 0).all()
    assert links.min() >= 0 and (links.sum(-1) <= 1 + 1e-6).all()


@needs_tensorflow
def test_sparse_links_train_with_any_batch_size():
    import tensorflow as tf

    layer = randomised(sparse_links=3, controller="dense")
    x = numbers().astype("float32")

    @tf.function(input_signature=[tf.TensorSpec((None, None, WIDTH))])
    def free(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return tape.gradient(loss, layer.trainable_weights)

    for found, one in zip(free(x), free(x[:1])):
        assert np.isfinite(found).all() and np.isfinite(one).all()
    assert layer.time_loop == "fast"


# Invariants.


SLOT_AXES = {
    "memory": [-2],
    "usage": [-1],
    "retention": [-1],
    "precedence": [-1],
    "linkage": [-1, -2],
}


def permuted(name, value, order):
    axes = [-1] if name.endswith("weighting") else SLOT_AXES.get(name, [])
    for axis in axes:
        value = np.take(value, order, axis=axis)
    return value


@pytest.mark.parametrize(
    "options",
    [{}, {"write_heads": 3}, {"write_heads": 2, **ALL_IN_ONE}],
    ids=["default", "heads", "all options"],
)
@needs_tensorflow
def test_permuting_the_slots_does_not_change_the_output(options):
    layer = randomised(scale=0.6, dtype="float64", **options)
    x, states = numbers(), dnc_states(layer)
    before = keras_memory.trace(layer, x, initial_state=states)
    order = np.random.default_rng(3).permutation(11)
    record = layer.cell.unpack_state(states)
    fields = {
        name: permuted(name, ops.convert_to_numpy(value), order)
        for name, value in record._asdict().items()
        if not isinstance(value, tuple)  # of the controller, or empty
    }
    states = layer.cell.pack_state(record._replace(**fields))
    after = keras_memory.trace(layer, x, initial_state=states)
    for name, value in before.items():
        close(after[name], permuted(name, value, order), 1e-10)
    assert np.abs(after["usage"] - before["usage"]).max() > 1e-2


def test_the_input_may_be_time_first():
    layer = randomised()
    time_first = numbers(shape=(TIME, BATCH, WIDTH)).astype("float32")
    entry = keras.Input(batch_shape=(TIME, BATCH, WIDTH))
    output = ops.swapaxes(layer(ops.swapaxes(entry, 0, 1)), 0, 1)
    model = keras.Model(entry, output)
    expected = ops.convert_to_numpy(layer(np.swapaxes(time_first, 0, 1)))
    result = model(ops.convert_to_tensor(time_first))
    close(result, np.swapaxes(expected, 0, 1))
    assert result.shape == (TIME, BATCH, UNITS)


# Allocation.

USAGES = {
    "random": np.random.default_rng(2).uniform(size=(5, 13)),
    "ties": np.random.default_rng(3).integers(0, 4, size=(5, 13)) / 4,
    "nearly free": 1e-3 * np.random.default_rng(4).uniform(size=(5, 13)),
    "nearly full": 1 - 1e-3 * np.random.default_rng(4).uniform(size=(5, 13)),
    "all free": np.zeros((2, 13)),
    "all used": np.ones((2, 13)),
    "half": np.full((2, 13), 0.5),
    "one slot": np.array([[0.0], [0.3], [1.0]]),
    "two slots": np.array([[0.3, 0.2], [0.2, 0.3], [0.0, 1.0], [1.0, 0.0]]),
    "two alike": np.array([[0.0, 0.0], [0.4, 0.4], [1.0, 1.0]]),
}


@pytest.mark.parametrize("name", USAGES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-6), pytest.param("float64", 1e-12, marks=needs_tensorflow)],
)
def test_both_forms_of_allocation_equal_the_oracle(name, dtype, tolerance):
    usage = USAGES[name].astype(dtype)
    expected = [reference.allocation(one, 1e-6) for one in usage]
    found = []
    for sort in (True, False, None):
        given = ops.convert_to_tensor(usage)
        found.append(addressing.allocation(given, 1e-6, sort=sort))
        assert ops.dtype(found[-1]) == dtype
        close(found[-1], expected, tolerance)
    close(found[0], found[1], tolerance)


@pytest.mark.parametrize("sort", [True, False])
def test_allocation_matches_values_computed_by_hand(sort):
    usage = [[0.5, 0.25, 0.75], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]
    expected = [
        [0.5 * 0.25, 0.75, 0.25 * 0.25 * 0.5],
        [0.5, 0.5 * 0.5, 0.5 * 0.5 * 0.5],
        [0.0, 1.0, 0.0],
    ]
    close(addressing.allocation(tensor(usage), 1e-12, sort), expected)
    found = addressing.allocation(tensor(usage), 0.2, sort)
    raised = 0.2 + 0.8 * 0.25
    close(found[0, :2], [(1 - 0.6) * raised, 1 - raised])


@pytest.mark.parametrize("sort", [True, False])
def test_the_first_of_equally_used_slots_is_allocated(sort):
    for value in (0.0, 0.3, 0.9):
        usage = np.full((1, 13), value)
        usage[0, 2] = 0.95
        found = addressing.allocation(tensor(usage), 1e-6, sort)
        found = ops.convert_to_numpy(found)[0]
        others = np.delete(found, 2)
        assert (np.diff(others) <= 0).all() and others[0] > others[1]
        assert found[2] <= others[-1]


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 7])
@needs_tensorflow
def test_gradients_of_allocation_equal_finite_differences(slots, sort):
    import tensorflow as tf

    rng = np.random.default_rng(4)
    usage = rng.permuted(np.linspace(0.05, 0.95, 3 * slots)).reshape(3, slots)
    projection = rng.normal(size=usage.shape)

    def loss(usage):
        found = addressing.allocation(usage, 1e-6, sort)
        return tf.reduce_sum(projection * found)

    usage = tf.constant(usage)
    with tf.GradientTape() as tape:
        tape.watch(usage)
        value = loss(usage)
    gradient = tape.gradient(value, usage).numpy()
    for index in np.ndindex(*usage.shape):
        step = np.zeros(usage.shape)
        step[index] = 1e-6
        slope = float(loss(usage + step) - loss(usage - step)) / 2e-6
        assert abs(slope - gradient[index]) < 1e-8
    assert np.abs(gradient).min() > 1e-7


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@needs_tensorflow
def test_gradients_of_allocation_are_finite_at_0_and_1(dtype, sort):
    import tensorflow as tf

    for values in (
        np.zeros((1, 7)),
        np.ones((1, 7)),
        [[0, 0, 1, 1, 0.5, 0, 1]],
        [[0.0]],
        [[1.0]],
    ):
        usage = tf.constant(values, dtype)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(usage)
            found = addressing.allocation(usage, 1e-6, sort)
        jacobian = tape.jacobian(found, usage, experimental_use_pfor=False)
        jacobian = jacobian.numpy()
        assert np.isfinite(jacobian).all()
        # No derivative of the allocation exceeds 1.
        assert 0.5 < np.abs(jacobian).max() < 1.001


# The gradient through usage.


@needs_tensorflow
def test_without_usage_gradient_the_output_is_the_same():
    layer = randomised(scale=0.6, write_heads=2)
    x, states = numbers(), dnc_states(layer)
    stopped = like(layer, write_heads=2, usage_gradient=False)
    close(stopped(x, initial_state=states), layer(x, initial_state=states), 0)


@needs_tensorflow
def test_usage_gradient_only_stops_gradients_to_write_weightings():
    """Gradients equal those with constant write weightings in the usage."""
    import tensorflow as tf

    fixed = {"write_heads": 2, "dtype": "float64"}
    passing = built(**fixed).cell.accesses[0]
    layer = built(usage_gradient=False, **fixed)
    stopping = layer.cell.accesses[0]
    rng = np.random.default_rng(17)
    interfaces = [
        tf.constant(rng.normal(size=(BATCH, passing.interface_size)))
        for _ in range(3)
    ]
    start = layer.cell.unpack_state(dnc_states(layer))
    start = start._replace(controller=())
    variables = [*interfaces, *start[:-2]]
    projections = [rng.normal(size=value.shape) for value in start[:-2]]

    def gradients(access, told_of):
        with tf.GradientTape() as tape:
            tape.watch(variables)
            state = start
            for interface in interfaces:
                written = told_of(state.write_weighting)
                state = state._replace(write_weighting=written)
                state, _ = act(access, interface, state)
            loss = sum(
                tf.reduce_sum(p * value)
                for p, value in zip(projections, state[:-2])
            )
        return [
            np.zeros(v.shape) if g is None else g.numpy()
            for v, g in zip(variables, tape.gradient(loss, variables))
        ]

    stopped = gradients(stopping, tf.identity)
    for found, expected in zip(stopped, gradients(passing, tf.stop_gradient)):
        close(found, expected, 1e-12)
    whole = gradients(passing, tf.identity)
    name = {n: i for i, n in enumerate(start._fields, len(interfaces))}
    assert (stopped[name["write_weighting"]] == 0).all()
    assert np.abs(whole[name["write_weighting"]]).max() > 1e-3
    for other in ("usage", "read_weighting", "linkage", "precedence"):
        assert np.abs(stopped[name[other]]).max() > 1e-6, other
    assert np.abs(whole[0] - stopped[0]).max() > 1e-3


# Singular points.


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@pytest.mark.parametrize("used", [0.0, 1.0])
@needs_tensorflow
def test_usage_and_weightings_of_0_and_1_have_finite_gradients(used, dtype):
    """All slots are used, or none; reads and writes were at a single slot."""
    import tensorflow as tf

    layer = built(dtype=dtype, initial_memory="random", return_state=True)
    states = layer.cell.unpack_state(layer.cell.get_initial_state(BATCH))
    single = np.broadcast_to(one_hot(4), (BATCH, 2, 11))
    states = layer.cell.pack_state(
        states._replace(
            usage=np.full((BATCH, 11), used),
            precedence=single[:, :1],
            read_weighting=single,
            write_weighting=single[:, :1],
        )
    )
    states = [tf.Variable(state) for state in states]
    with tf.GradientTape() as tape:
        output = layer(few(), initial_state=states)[0]
        loss = tf.reduce_mean(tf.cast(output, "float32") ** 2)
    for gradient in tape.gradient(loss, [*states, *layer.trainable_weights]):
        value = ops.convert_to_numpy(tf.cast(gradient, "float64"))
        assert np.isfinite(value).all() and np.abs(value).max() < 1e4


# Without memory, and resets.


def copies(states):
    """NumPy copies, which later calls cannot change."""
    return [np.array(ops.convert_to_numpy(state)) for state in states]


def equal(states, others):
    assert len(states) == len(others)
    for state, other in zip(copies(states), copies(others)):
        assert state.dtype == other.dtype
        np.testing.assert_array_equal(state, other)


TWO_MEMORIES = {"num_layers": 2, "share_memory": False}


@pytest.mark.parametrize(
    "options", [{}, TWO_MEMORIES, {"num_layers": 2}], ids=str
)
def test_without_memory_only_the_controller_states_change(options):
    layer = randomised(return_state=True, units=None, **options)
    x = numbers().astype("float32")
    states = dnc_states(layer)
    output, *after = layer(x, initial_state=states, use_memory=False)
    of_controller = ["controller" in name for name in layer.cell.layout.names]
    assert any(of_controller) and not all(of_controller)
    for before, now, moves in zip(copies(states), copies(after), of_controller):
        assert (before != now).any() == moves
    assert (ops.convert_to_numpy(output)[:, :, 7:] == 0).all()
    # The contents of the memory do not matter.
    others = [
        a if moves else b
        for a, b, moves in zip(states, dnc_states(layer, 4), of_controller)
    ]
    close(layer(x, initial_state=others, use_memory=False)[0], output, 0)
    assert np.abs(output - layer(x, initial_state=states)[0]).max() > 1e-3


@pytest.mark.parametrize("value", [None, 1, 0, "yes"])
def test_use_memory_must_be_true_or_false(value):
    layer, x = randomised(), numbers().astype("float32")
    for call in (
        lambda: layer(x, use_memory=value),
        lambda: layer.cell(x[:, 0], dnc_states(layer), use_memory=value),
        lambda: keras_memory.trace(layer, x, use_memory=value),
    ):
        with pytest.raises(ValueError, match="`use_memory`.*Received"):
            call()


@pytest.mark.parametrize("options", [{}, TWO_MEMORIES], ids=str)
@pytest.mark.parametrize("part", ["memory", "controller"])
@pytest.mark.parametrize("rows", [None, [True, False, True], [False] * 3])
def test_resets_change_only_the_given_part_and_rows(rows, part, options):
    layer = randomised(
        initial_memory="random", initial_controller_state="random", **options
    )
    states = dnc_states(layer, batch=3)
    kept = copies(states)
    reset = getattr(layer, f"reset_{part}")
    after = copies(reset(states) if rows is None else reset(states, rows=rows))
    starts = copies(layer.cell.get_initial_state(3))
    is_reset = np.ones(3, bool) if rows is None else np.array(rows)
    in_part = [
        ("controller" in name) == (part == "controller")
        for name in layer.cell.layout.names
    ]
    assert 0 < sum(in_part) < len(in_part)
    for before, now, start, reached in zip(kept, after, starts, in_part):
        changed = is_reset & reached
        np.testing.assert_array_equal(now[changed], start[changed])
        np.testing.assert_array_equal(now[~changed], before[~changed])
        assert (before != start).any()
    equal(states, kept)  # given states are not modified


@needs_tensorflow
def test_resets_work_in_a_graph_of_any_batch_size():
    import tensorflow as tf

    layer = randomised()
    states = dnc_states(layer)
    signature = [tf.TensorSpec((None, n)) for n in layer.cell.state_size]

    @tf.function(input_signature=[signature])
    def reset(states):
        return layer.reset_memory(states, rows=[True, False])

    for value, expected in zip(
        reset(list(states)), layer.reset_memory(states, rows=[True, False])
    ):
        close(value, expected, 0)


def test_reset_states_of_a_stateful_layer_are_copies():
    """On PyTorch they must not be views of the layer's states."""
    layer = built(stateful=True)
    x = numbers().astype("float32")
    layer(x)
    for reset in (layer.reset_memory, layer.reset_controller):
        after = reset()
        before = copies(after)
        layer(x)
        for value, kept in zip(copies(after), before):
            np.testing.assert_array_equal(value, kept)


def test_a_reset_memory_acts_like_a_new_one():
    layer = randomised(controller="dense", return_state=True)
    x = numbers().astype("float32")
    fresh = layer(x)[0]
    states = layer.reset_memory(dnc_states(layer), rows=[True, False])
    output = ops.convert_to_numpy(layer(x, initial_state=states)[0])
    close(output[0], fresh[0])
    assert np.abs(output[1] - ops.convert_to_numpy(fresh)[1]).max() > 1e-3


@pytest.mark.parametrize("part", ["memory", "controller"])
def test_resets_change_a_stateful_layer_unless_states_are_given(part):
    layer = randomised(stateful=True)
    x = numbers().astype("float32")
    layer(x)
    before = copies(layer.states)
    reset = getattr(layer, f"reset_{part}")
    expected = copies(reset(before, rows=[False, True]))
    equal(layer.states, before)  # given states: the layer keeps its own
    equal(reset(rows=[False, True]), expected)
    equal(layer.states, expected)
    reset()
    equal(layer.states, reset(before))
    assert any((a != b).any() for a, b in zip(before, expected))
    # The layer continues from the reset states.
    going_on = like(layer, return_state=True)
    follows = going_on(x, initial_state=copies(layer.states))[0]
    close(layer(x), follows)


@pytest.mark.parametrize("part", ["memory", "controller"])
@pytest.mark.parametrize(
    "rows",
    [
        [True],
        [True] * 3,
        [[True, False]],
        [1, 0],
        [1.0, 0.0],
        [None, True],
        True,
        "all",
    ],
    ids=str,
)
def test_wrong_rows_are_refused(rows, part):
    layer = randomised()
    with pytest.raises(
        ValueError, match="`rows` must be an array .B,. of bool"
    ):
        getattr(layer, f"reset_{part}")(dnc_states(layer), rows=rows)


def test_resets_of_missing_states_are_refused():
    layer = randomised()
    for reset in (layer.reset_memory, layer.reset_controller):
        with pytest.raises(ValueError, match="`states`.*stateful=False"):
            reset()
        states = dnc_states(layer)
        for wrong in (
            states[:-1],
            [states[0][:1], *states[1:]],
            layer.cell.unpack_state(states),
            [None] * 9,
            states[0],
        ):
            with pytest.raises(ValueError, match="must be 9 states.*Received"):
                reset(wrong)
        with pytest.raises(ValueError, match="`states`.*functional"):
            reset([keras.Input(state.shape[1:]) for state in states])
    not_called = built(stateful=True)
    not_called.states = None
    with pytest.raises(ValueError, match="`states`.*stateful=True"):
        not_called.reset_memory()


def test_use_memory_is_separate_in_each_thread(monkeypatch):
    layer = randomised()
    x = numbers().astype("float32")
    expected = [layer(x, use_memory=asked) for asked in (True, False)]
    both_are_in = threading.Barrier(2, timeout=60)
    inner_loop = layer.inner_loop

    def waiting(*arguments, **more):
        both_are_in.wait()
        return inner_loop(*arguments, **more)

    monkeypatch.setattr(layer, "inner_loop", waiting)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = pool.map(
            lambda asked: layer(x, use_memory=asked), (True, False)
        )
    for output, one in zip(outputs, expected, strict=True):
        close(output, one, 0)


# Bypass dropout.


def test_bypass_dropout_drops_only_the_controller_output():
    shape = (13, TIME, WIDTH)
    fixed = {"units": None, "controller_units": 29, "seed": 3}
    layer = built(shape, bypass_dropout=0.4, **fixed)
    x = numbers(shape=shape).astype("float32")
    dropped = ops.convert_to_numpy(layer(x, training=True))
    whole = ops.convert_to_numpy(layer(x))
    without = built(shape, **fixed)
    for mine, other in zip(layer.trainable_weights, without.trainable_weights):
        other.assign(mine)
    close(without(x, training=True), whole)
    close(dropped[:, :, 29:], whole[:, :, 29:])
    ratio = dropped[:, :, :29] / whole[:, :, :29]
    close(ratio, np.where(ratio > 0.1, 1 / 0.6, 0.0), 1e-4)
    close(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), 1e-4)
    share = (ratio[:, 0] == 0).mean()
    assert 0.3 < share < 0.5
    assert (ratio[0, 0] != ratio[1, 0]).any()
    # The next batch drops other units; a layer of the same seed, the same.
    again = ops.convert_to_numpy(layer(x, training=True))
    assert ((again == 0) != (dropped == 0)).any()
    same = built(shape, bypass_dropout=0.4, **fixed)
    for mine, other in zip(layer.trainable_weights, same.trainable_weights):
        other.assign(mine)
    close(same(x, training=True), dropped, 0)


def test_bypass_dropout_comes_before_the_projection():
    layer = built(bypass_dropout=0.5, seed=3)
    features = built(bypass_dropout=0.5, seed=3, units=None)
    for mine, other in zip(
        [w for w in layer.trainable_weights if "output" not in w.name],
        features.trainable_weights,
    ):
        other.assign(mine)
    x = numbers().astype("float32")
    dropped = ops.convert_to_numpy(features(x, training=True))
    kernel, bias = map(ops.convert_to_numpy, layer.cell.output_projection)
    close(layer(x, training=True), dropped @ kernel + bias, 1e-5)
    assert (dropped[:, :, :7] == 0).any() and (dropped[:, :, :7] != 0).any()


# Bidirectional.


def bidirectional(**kwargs):
    layer = keras.layers.Bidirectional(dnc(**kwargs))
    layer.build((BATCH, TIME, WIDTH))
    rng = np.random.default_rng(9)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def test_bidirectional_equals_one_layer_in_each_direction():
    both = bidirectional()
    ahead, back = built(), built()
    ahead.cell.set_weights(both.forward_layer.cell.get_weights())
    back.cell.set_weights(both.backward_layer.cell.get_weights())
    x = numbers().astype("float32")
    found = ops.convert_to_numpy(both(x))
    assert found.shape == (BATCH, TIME, 2 * UNITS)
    close(found[:, :, :UNITS], ahead(x), 1e-5)
    of_back = ops.convert_to_numpy(back(x[:, ::-1]))[:, ::-1]
    close(found[:, :, UNITS:], of_back, 1e-5)
    assert np.abs(found[:, :, :UNITS] - found[:, :, UNITS:]).max() > 0.1
    # A masked end acts like a shorter sequence.
    length = 4
    mask = np.arange(TIME)[None].repeat(BATCH, 0) < length
    masked = ops.convert_to_numpy(both(x, mask=ops.convert_to_tensor(mask)))
    cut = ops.convert_to_numpy(both(x[:, :length]))
    close(masked[:, :length], cut, 1e-5)
    assert np.abs(cut[:, :, UNITS:] - found[:, :length, UNITS:]).max() > 1e-3


def test_bidirectional_trains_and_is_restored_from_a_file(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, WIDTH)),
            keras.layers.Bidirectional(dnc(content_masks=True)),
            keras.layers.Dense(1),
        ]
    )
    x = few().astype("float32")
    if keras.backend.backend() != "numpy":
        model.compile("adam", "mse", run_eagerly=True)
        y = x.sum(-1, keepdims=True)
        losses = model.fit(x, y, epochs=2, verbose=0).history["loss"]
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(x), model(x), 0)


# Errors.


STARTS = ["zeros", None, True, NAN, float("inf"), [0.0]]
SIZE = [0, -1, 2.0, "2", None, True]
SWITCH = [None, 1, 0, "yes"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("units", [0, -1, 2.0, True]),
        *((name, SIZE) for name in ("memory_slots", "slot_size", "num_layers")),
        *((name, SIZE) for name in ("read_heads", "write_heads")),
        ("sparse_links", [value for value in SIZE if value is not None]),
        *((name, SIZE) for name in ("controller_units", "controller_layers")),
        *(
            (name, SWITCH)
            for name in (
                "share_memory",
                "linkage",
                "content_masks",
                "deallocation",
                "link_sharpening",
                "usage_gradient",
                "interface_layer_norm",
            )
        ),
        ("initial_memory", STARTS),
        ("initial_controller_state", STARTS),
        ("norm_epsilon", [0, -1e-9, NAN, "0", True]),
        ("product_epsilon", [-1e-9, NAN, "0", None, True]),
        ("usage_epsilon", [0, 1e-31, 0.2, 1.0, -1.0, NAN, "0", True]),
        ("bypass_dropout", [-0.1, 1.0, 1, NAN, "0.5", None, True]),
        ("clip_value", [0, -1.0, NAN, "1"]),
        ("seed", [-1, 1.0, "1", True]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError) as error:
            dnc(**{name: value})
        assert f"`{name}`" in str(error.value), value
        assert f"Received: {name}={value!r}" in str(error.value), value


def test_sparse_links_need_links_and_slots():
    with pytest.raises(ValueError, match="`sparse_links`.*linkage=False"):
        dnc(linkage=False, sparse_links=3)
    with pytest.raises(ValueError, match="sparse_links=12.*memory_slots=11"):
        dnc(sparse_links=12)


@pytest.mark.parametrize(
    ("dtype", "slots"),
    [("bfloat16", 257), ("mixed_bfloat16", 257), ("mixed_float16", 2049)],
)
def test_sparse_links_need_a_dtype_that_holds_every_column(dtype, slots):
    fixed = {"dtype": dtype, "controller": "dense"}
    message = f"`memory_slots`.*with `sparse_links`.*memory_slots={slots}"
    with pytest.raises(ValueError, match=message):
        built(memory_slots=slots, sparse_links=3, **fixed)
    built(memory_slots=slots - 1, sparse_links=3, **fixed)
    built(memory_slots=slots, **fixed)


def test_sharpened_links_need_links():
    with pytest.raises(ValueError, match="`link_sharpening`.*linkage=False"):
        dnc(linkage=False, link_sharpening=True)


def test_a_wrong_field_of_the_state_is_named():
    layer = built()
    state = layer.cell.unpack_state(dnc_states(layer))
    with pytest.raises(ValueError, match="`linkage` must be an array .batch,"):
        layer.cell.pack_state(state._replace(linkage=np.zeros((2, 11, 11))))
