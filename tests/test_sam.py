"""Sparse Access Memory, compared with its oracle and with values computed by
hand. `test_accesses.py` has the checks of all accesses."""

import dataclasses
from typing import Any
from typing import NamedTuple

import harness
import keras
import numpy as np
import pytest
import reference_sam
from keras import ops

import keras_memory
from keras_memory.addressing import sparse
from keras_memory.recurrent.interface import StateSpec
from keras_memory.sam import SAMAccess
from keras_memory.sam import SAMState

BATCH, TIME = 2, 9
NORM_EPSILON = 1e-8
DTYPE = "float32" if harness.BACKEND == "jax" else "float64"
# Keras's products are of float32 on other backends.
TOLERANCE = 1e-9 if harness.BACKEND == "tensorflow" else 2e-5


def close(actual, expected, tolerance=TOLERANCE):
    harness.close(ops.convert_to_numpy(actual), expected, tolerance=tolerance)


# Against the oracle, which has the names of the paper.

ORACLE = {"key": "query", "add_vector": "word"}


def access_of(**sizes):
    return SAMAccess(**{**SIZES, "norm_epsilon": NORM_EPSILON, **sizes})


SIZES = {"memory_slots": 7, "slot_size": 5, "read_heads": 2, "top_k": 3}
CASES = {
    "more slots than steps": {"memory_slots": 23},
    "fewer slots than steps": {},
    "one slot": {"memory_slots": 1, "top_k": 1},
    "one head": {"read_heads": 1},
    "every slot is read": {"memory_slots": 4, "top_k": 4},
    "high threshold": {"access_threshold": 0.4},
}
each_case = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)


def inputs(access, seed=3, steps=TIME):
    """Interfaces (B, T, interface_size) before their activations."""
    rng = np.random.default_rng(seed)
    return 1.5 * rng.normal(size=(BATCH, steps, access.interface_size))


def parts(access, interface, names=ORACLE):
    """The oracle's interfaces; `names` has those that differ there."""
    shape = interface.shape[:2]
    split = access.split(
        ops.convert_to_tensor(
            interface.reshape(-1, access.interface_size), dtype=DTYPE
        )
    )
    named = {
        names.get(name, name): ops.convert_to_numpy(part).reshape(
            *shape, *part.shape[1:]
        )
        for name, part in split._asdict().items()
    }
    for gate in ("write_gate", "interpolation_gate"):
        named[gate] = named[gate][..., 0]
    return named


def assert_gradients(access, interfaces, gradients, expected, names=ORACLE):
    """Compares the gradients of interfaces, lists of a (B, interface_size) for
    each step, with those by the parts of the oracle's."""
    import tensorflow as tf

    for t, (at, by_step) in enumerate(zip(interfaces, gradients)):
        # The chain from the oracle's interfaces to those before activations.
        with tf.GradientTape() as tape:
            split = access.split(at.value())
            total = sum(
                tf.reduce_sum(
                    part
                    * expected[names.get(name, name)][:, t].reshape(
                        tuple(part.shape)
                    )
                )
                for name, part in split._asdict().items()
            )
        by_parts = tape.gradient(total, at)
        size = 1.0 + np.abs(by_parts).max()
        close(by_step / size, by_parts / size, 1e-8)


def empty(access):
    return SAMState(
        *(
            None
            if spec == ()
            else ops.full((BATCH, *spec.shape), spec.fill, spec.dtype or DTYPE)
            for spec in access.initial_state
        )
    )


def filled(access, seed=5):
    """A state in the middle of a sequence, for layer and oracle."""
    rng = np.random.default_rng(seed)
    slots, heads, top_k = access.memory_slots, access.read_heads, access.top_k
    given = reference_sam.initial_state(BATCH, slots, access.slot_size, heads)
    given["memory"] = rng.normal(size=given["memory"].shape)
    given["last_access"] = rng.integers(0, 20, size=(BATCH, slots))
    given["written"][:] = True
    given["time"] += 20
    read_slots = np.stack(
        [
            [rng.permutation(slots)[:top_k] for _ in range(heads)]
            for _ in range(BATCH)
        ]
    )
    weights = rng.dirichlet(np.ones(top_k), size=(BATCH, heads))
    np.put_along_axis(given["read_weighting"], read_slots, weights, axis=2)
    given["reads"] = np.einsum(
        "brn,bnw->brw", given["read_weighting"], given["memory"]
    )
    return given, SAMState(
        reads=ops.convert_to_tensor(given["reads"], dtype=DTYPE),
        memory=ops.convert_to_tensor(given["memory"], dtype=DTYPE),
        norms=sparse.norms_of(
            ops.convert_to_tensor(given["memory"], dtype=DTYPE), NORM_EPSILON
        ),
        last_access=ops.convert_to_tensor(given["last_access"], dtype="int32"),
        block_access=ops.zeros((BATCH, -(-slots // sparse.BLOCK)), "int32"),
        read_slots=ops.convert_to_tensor(read_slots, dtype="int32"),
        read_weights=ops.convert_to_tensor(weights, dtype=DTYPE),
        time=ops.full((BATCH, 1), 20, "int32"),
    )


def run(access, interface, state):
    """Runs the steps of an access: a list of (state, inside)."""
    steps = []
    for t in range(interface.shape[1]):
        state, inside = access.step(
            ops.convert_to_tensor(interface[:, t], dtype=DTYPE), state
        )
        steps.append((state, inside))
    return steps


@each_case
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.every_backend
def test_steps_equal_the_oracle(sizes, is_full):
    access = access_of(**sizes)
    interface = inputs(access)
    given, state = filled(access) if is_full else (None, empty(access))
    steps = run(access, interface, state)
    expected, end = reference_sam.run(
        parts(access, interface),
        given,
        top_k=access.top_k,
        memory_slots=access.memory_slots,
        access_threshold=access.access_threshold,
        norm_epsilon=NORM_EPSILON,
    )
    for t, (state, inside) in enumerate(steps):
        close(state.reads, expected["reads"][:, t])
        close(state.memory, expected["memory"][:, t])
        slots = ops.convert_to_numpy(state.read_slots)
        np.testing.assert_array_equal(slots, expected["read_positions"][:, t])
        close(state.read_weights, expected["read_weights"][:, t])
        last_access = ops.convert_to_numpy(state.last_access)
        np.testing.assert_array_equal(
            np.maximum(last_access, 0), expected["last_access"][:, t]
        )
        np.testing.assert_array_equal(
            last_access > sparse.UNWRITTEN, expected["written"][:, t]
        )
        written = np.zeros(last_access.shape)
        at = ops.convert_to_numpy(inside["write_slots"])
        for b, weights in enumerate(
            ops.convert_to_numpy(inside["write_weights"])
        ):
            np.add.at(written[b], at[b], weights)
        close(written, expected["write_weighting"][:, t])
        assert (at[:, -1] == expected["lra_slot"][:, t]).all()
    assert (ops.convert_to_numpy(state.time)[:, 0] == end["time"]).all()
    # The case is worth its name: slots are written again and read twice.
    if access.memory_slots < TIME and access.access_threshold < 0.1:
        assert len(np.unique(expected["lra_slot"][0])) < TIME


@each_case
@pytest.mark.parametrize("is_full", [False, True])
@harness.needs_tensorflow
def test_gradients_of_steps_equal_the_oracle(sizes, is_full):
    import tensorflow as tf

    access, steps = access_of(**sizes), 5
    interface = inputs(access, steps=steps)
    given, state = (
        filled(access)
        if is_full
        else (
            reference_sam.initial_state(
                BATCH,
                access.memory_slots,
                access.slot_size,
                access.read_heads,
            ),
            empty(access),
        )
    )
    upstream = np.random.default_rng(9).normal(
        size=(BATCH, steps, access.read_heads, access.slot_size)
    )
    memory, weights = tf.Variable(state.memory), tf.Variable(state.read_weights)
    steps_of = [tf.Variable(interface[:, t]) for t in range(steps)]
    with tf.GradientTape() as tape:
        now = state._replace(
            memory=memory.value(), read_weights=weights.value()
        )
        loss = 0.0
        for t, at in enumerate(steps_of):
            after, _ = access.step(at.value(), now)
            loss += tf.reduce_sum(after.reads * upstream[:, t])
            now = after
    by_steps, by_memory, by_weights = tape.gradient(
        loss, (steps_of, memory, weights), unconnected_gradients="zero"
    )
    expected = reference_sam.loss_gradients(
        parts(access, interface),
        given,
        upstream,
        top_k=access.top_k,
        access_threshold=access.access_threshold,
        norm_epsilon=NORM_EPSILON,
    )
    close(by_memory, expected["memory"], 1e-7)
    at = ops.convert_to_numpy(state.read_slots)
    if is_full:
        expected_weights = np.take_along_axis(
            expected["read_weighting"], at, axis=2
        )
        close(by_weights, expected_weights, 1e-7)
    assert_gradients(access, steps_of, by_steps, expected)


@pytest.mark.every_backend
def test_written_slots_are_not_accessed():
    last_access = ops.convert_to_tensor([[-1, 4, -1]], dtype="int32")
    slots = ops.convert_to_tensor([[0, 0, 1]], dtype="int32")
    after = sparse.mark_written(last_access, slots)
    assert ops.convert_to_numpy(after).tolist() == [[0, 4, -1]]
    assert ops.convert_to_numpy(last_access).tolist() == [[-1, 4, -1]]


@pytest.mark.every_backend
def test_weights_of_equal_slots_add_up_to_an_access():
    last_access = ops.convert_to_tensor([[1, 2, 0]], dtype="int32")
    slots = ops.convert_to_tensor([[0, 1, 0]], dtype="int32")
    weights = ops.convert_to_tensor([[0.3, 0.4, 0.2]])
    time = ops.convert_to_tensor([[7]], dtype="int32")
    after = sparse.mark_accessed(last_access, slots, weights, 0.45, time)
    assert ops.convert_to_numpy(after).tolist() == [[7, 2, 0]]


@pytest.mark.every_backend
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_weight_of_the_threshold_is_no_access(threshold):
    last_access = ops.convert_to_tensor([[1, 2]], dtype="int32")
    slots = ops.convert_to_tensor([[0, 1]], dtype="int32")
    weights = ops.convert_to_tensor([[threshold, threshold + 0.25]])
    time = ops.convert_to_tensor([[7]], dtype="int32")
    after = sparse.mark_accessed(last_access, slots, weights, threshold, time)
    assert ops.convert_to_numpy(after).tolist() == [[1, 7]]


@pytest.mark.every_backend
@pytest.mark.parametrize("slots", [6, 23])
def test_the_slot_accessed_longest_ago_is_found_in_blocks(slots, monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK", 4)
    rng = np.random.default_rng(4)
    last_access = np.full((BATCH, slots), sparse.UNWRITTEN)
    bounds = ops.zeros((BATCH, -(-slots // 4)), "int32")
    for time in range(1, 2 * slots):
        slot, bounds = sparse.least_recently_accessed(
            ops.convert_to_tensor(last_access, dtype="int32"), bounds
        )
        expected = np.maximum(last_access, 0).argmin(axis=1)
        assert ops.convert_to_numpy(slot)[:, 0].tolist() == expected.tolist()
        for row, found in enumerate(expected):
            last_access[row, [found, *rng.integers(0, slots, 2)]] = time
        accesses = np.maximum(last_access, 0)
        for row, of_row in enumerate(ops.convert_to_numpy(bounds)):
            for block, bound in enumerate(of_row):
                assert bound <= accesses[row, 4 * block : 4 * block + 4].min()


@pytest.mark.every_backend
@pytest.mark.parametrize("count", [1, 4, 6, 11, 12])
def test_the_first_unwritten_slot_is_found_in_given_states(count, monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK", 4)
    cell = keras_memory.SAMCell(3, memory_slots=12, slot_size=5, top_k=2)
    cell.build((BATCH, 4))
    states = cell.state_with(np.ones((BATCH, count, 5), "float32"))
    (record,) = cell.layout.unflatten(states)
    slot, _ = sparse.least_recently_accessed(
        record.last_access, record.block_access
    )
    assert (ops.convert_to_numpy(slot) == count % 12).all()


@pytest.mark.every_backend
def test_blocks_change_nothing_else(monkeypatch):
    access = access_of(memory_slots=7)
    interface = inputs(access, steps=20)
    expected, _ = run(access, interface, filled(access)[1])[-1]
    monkeypatch.setattr(sparse, "BLOCK", 3)
    after, _ = run(access, interface, filled(access)[1])[-1]
    assert after.block_access.shape == (BATCH, 3)
    for field in set(SAMState._fields) - {"block_access", "controller"}:
        close(getattr(after, field), getattr(expected, field), 1e-12)


# A memory that starts empty.


def layer_of(**kwargs):
    fixed = {"units": 3, "controller_units": 7, "return_sequences": True}
    return keras_memory.SAMLayer(**{**SIZES, **fixed, **kwargs})


def sequences(steps=TIME, batch=BATCH):
    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, steps, 4)).astype("float32")


@pytest.mark.every_backend
@pytest.mark.parametrize("slots", [3, TIME, 50])
def test_an_empty_memory_gives_the_outputs_of_one_with_all_slots(slots):
    x = sequences()
    layer = layer_of(memory_slots=slots, num_layers=2)
    expected = layer(x)
    whole = layer_of(memory_slots=slots, num_layers=2, return_state=True)
    whole.build(x.shape)
    whole.set_weights(layer.get_weights())
    outputs, *states = whole(x)
    close(outputs, ops.convert_to_numpy(expected), 1e-6)
    assert whole.cell.unpack_state(states).memory.shape[1] == slots


@harness.needs_tensorflow
def test_an_empty_memory_of_many_slots_needs_no_space():
    """A memory of all slots would take 2 TB."""
    layer = layer_of(memory_slots=2**30, slot_size=512, top_k=4)
    x = sequences()
    inside = keras_memory.trace(layer, x)
    assert inside["memory"].shape == (BATCH, TIME, TIME, 512)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile("sgd", "mse")
    y = np.zeros((BATCH, TIME, 3))
    assert np.isfinite(model.train_on_batch(x, y))
    with pytest.raises(ValueError, match="A state would take"):
        layer.cell.get_initial_state(BATCH)


@harness.needs_tensorflow
@pytest.mark.parametrize("batch", [BATCH, None])
@pytest.mark.parametrize("steps", [TIME, None])
def test_batch_and_time_may_be_unknown(batch, steps):
    import tensorflow as tf

    layer, x = layer_of(memory_slots=20), sequences()

    @tf.function(input_signature=[tf.TensorSpec((batch, steps, 4))])
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = ops.sum(layer(x, training=True) ** 2)
        return loss, tape.gradient(loss, layer.trainable_variables)

    loss, found = gradients(x)
    assert layer.time_loop == "fast"
    with tf.GradientTape() as tape:
        expected = ops.sum(layer(x) ** 2)
    close(loss, expected.numpy(), 1e-5)
    for one, other in zip(
        found, tape.gradient(expected, layer.trainable_variables)
    ):
        close(one, other.numpy(), 1e-5)


@harness.needs_tensorflow
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_segments_work_in_16_bits(dtype):
    import tensorflow as tf

    def gradients(**kwargs):
        keras.utils.set_random_seed(1)
        layer = layer_of(memory_slots=4, dtype=dtype, **kwargs)
        with tf.GradientTape() as tape:
            y = layer(sequences(7), training=True)
            loss = tf.reduce_sum(tf.cast(y, "float32") ** 2)
        assert layer.time_loop == "fast"
        return tape.gradient(loss, layer.trainable_variables)

    for whole, parts in zip(gradients(), gradients(recompute=3)):
        close(parts, ops.convert_to_numpy(whole), 2e-2)


# A memory that is full.


@pytest.mark.every_backend
def test_given_contents_are_found_and_kept():
    layer = layer_of(memory_slots=12, units=None, read_heads=1, top_k=1)
    x = sequences(steps=3)
    layer.build(x.shape)
    rng = np.random.default_rng(2)
    contents = rng.normal(size=(BATCH, 9, SIZES["slot_size"]))
    # The key is the third content, and nothing is written.
    kernel, bias = layer.cell.interfaces[0]
    kernel.assign(np.zeros(kernel.shape))
    values = np.zeros(bias.shape)
    values[: SIZES["slot_size"]] = contents[0, 2]
    values[-2] = -60.0
    bias.assign(values)
    states = layer.cell.state_with(contents.astype("float32"))
    outputs = ops.convert_to_numpy(layer(x, initial_state=states))
    reads = outputs[0, :, -SIZES["slot_size"] :]
    np.testing.assert_allclose(reads, contents[0, [2] * 3], atol=1e-6)
    record = layer.cell.unpack_state(states)
    written = ops.convert_to_numpy(record.last_access) > sparse.UNWRITTEN
    assert written.sum() == 9 * BATCH
    # The first steps write to the slots behind the contents.
    inside = keras_memory.trace(layer, x, initial_state=states)
    assert inside["write_slots"][0, :, -1].tolist() == [9, 9, 9]


@harness.needs_tensorflow
@pytest.mark.parametrize(
    ("slots", "masked"),
    [
        (4, True),
        pytest.param(4, False, marks=pytest.mark.slow),
        pytest.param(40, True, marks=pytest.mark.slow),
        (40, False),
        (300, True),
        pytest.param(300, False, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_full_memory_equal_automatic_ones(
    slots, masked, monkeypatch
):
    import tensorflow as tf

    monkeypatch.setattr(sparse, "BLOCK", 8)
    kwargs = {"memory_slots": slots, "return_state": True, "dtype": "float64"}
    layer = layer_of(num_layers=2, **kwargs)
    x, rng = sequences().astype("float64"), np.random.default_rng(7)
    layer.build(x.shape)
    states = layer.cell.state_with(rng.normal(size=(BATCH, slots, 5)))
    variables = [tf.Variable(state) for state in states]
    projections = [
        rng.normal(size=(BATCH, size)) for size in layer.cell.state_size
    ]
    mask = None
    if masked:
        mask = rng.random((BATCH, TIME)) < 0.6

    def gradients(loop):
        layer.loop = loop
        with tf.GradientTape() as tape:
            y, *after = layer(
                x,
                initial_state=[state.value() for state in variables],
                mask=mask,
                training=True,
            )
            loss = ops.sum(y**2) + sum(
                ops.sum(state * projection)
                for state, projection in zip(after, projections)
                if state.dtype == "float64"
            )
        assert layer.time_loop.startswith(loop)
        with_gradient = [v for v in variables if v.dtype == "float64"]
        sources = [*layer.trainable_variables, *with_gradient]
        found = tape.gradient(loss, sources, unconnected_gradients="zero")
        return [*after, *found]

    for fast, portable in zip(gradients("fast"), gradients("portable")):
        close(fast, ops.convert_to_numpy(portable), 1e-10)


@pytest.mark.parametrize("shape", [(2, 13, 5), (2, 3, 4), (3, 5), (2, 0, 5)])
def test_wrong_contents_are_refused(shape):
    layer = layer_of(memory_slots=12)
    layer.build((BATCH, TIME, 4))
    with pytest.raises(ValueError, match="`contents` must"):
        layer.cell.state_with(np.zeros(shape, "float32"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top_k": 8}, "`top_k` must be at most `memory_slots`"),
        ({"top_k": 0}, "`top_k` must be"),
        ({"memory_slots": 0}, "`memory_slots` must be"),
        ({"access_threshold": 1.0}, "`access_threshold` must be"),
        ({"norm_epsilon": 0.0}, "`norm_epsilon` must be"),
        ({"strength_activation": "tahn"}, "tahn"),
    ],
)
def test_wrong_arguments_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        layer_of(**wrong)


@pytest.mark.every_backend
def test_rows_of_a_batch_are_independent():
    layer, x = layer_of(memory_slots=4), sequences(batch=3)
    together = ops.convert_to_numpy(layer(x))
    for b in range(3):
        close(layer(x[b : b + 1]), together[b : b + 1], 1e-6)


def persistent(slots=40, **kwargs):
    """A stateful layer with a full memory, a layer that is not stateful, with
    the same weights, and the states."""
    stateful = layer_of(memory_slots=slots, stateful=True, **kwargs)
    plain = layer_of(memory_slots=slots, return_state=True, **kwargs)
    for layer in (stateful, plain):
        layer.build(sequences().shape)
    plain.set_weights(stateful.get_weights())
    contents = np.random.default_rng(8).normal(size=(BATCH, slots, 5))
    states = plain.cell.state_with(contents.astype("float32"))
    for variable, state in zip(stateful.states, states):
        variable.assign(state)
    return stateful, plain, states


def assert_states(layer, expected):
    for variable, state in zip(layer.states, expected):
        close(variable, ops.convert_to_numpy(state), 1e-5)


@harness.needs_tensorflow
@pytest.mark.parametrize(
    "compiled", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_forward_passes_without_a_backward_pass_change_the_memory_once(
    compiled,
):
    import tensorflow as tf

    stateful, plain, states = persistent()
    x = sequences()
    call = tf.function(
        lambda x: stateful(x, training=True), jit_compile=compiled
    )
    for _ in range(3):
        outputs, *states = plain(x, initial_state=states)
        close(call(x), outputs.numpy(), 1e-5)
        assert_states(stateful, states)


@harness.needs_tensorflow
@pytest.mark.parametrize(
    "compiled", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_two_forward_passes_before_a_backward_pass(compiled):
    import tensorflow as tf

    stateful, plain, states = persistent()
    x, y = sequences(), sequences()[:, ::-1]

    @tf.function(jit_compile=compiled)
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(stateful(x, training=True) ** 2)
            stateful(y, training=True)
        return tape.gradient(loss, stateful.trainable_variables)

    found = gradients(x, y)
    with tf.GradientTape() as tape:
        outputs, *states = plain(x, initial_state=states, training=True)
        loss = tf.reduce_sum(outputs**2)
    expected = tape.gradient(loss, plain.trainable_variables)
    for one, other in zip(found, expected):
        close(one, other.numpy(), 1e-4)
    _, *states = plain(y, initial_state=states)
    assert_states(stateful, states)


@keras.saving.register_keras_serializable(package="tests")
class Failing(keras.layers.GRUCell):
    """A controller that can fail."""

    fails = False

    def call(self, *args, **kwargs):
        if self.fails:
            raise RuntimeError("this step fails")
        return super().call(*args, **kwargs)


@pytest.mark.every_backend
def test_a_call_that_fails_leaves_the_memory_as_it_was():
    controller = Failing(7)
    stateful, plain, states = persistent(controller=controller)
    controller.fails = True
    with pytest.raises(RuntimeError, match="this step fails"):
        stateful(sequences())
    assert_states(stateful, states)
    controller.fails = False
    outputs, *states = plain(sequences(), initial_state=states)
    close(stateful(sequences()), ops.convert_to_numpy(outputs), 1e-5)
    assert_states(stateful, states)


class PairState(NamedTuple):
    reads: Any
    left: Any
    right: Any
    counter: Any
    controller: Any = ()


@dataclasses.dataclass(frozen=True, eq=False)
class PairAccess:
    """Two memories: what it takes from one at some slots, it puts into the
    other at the same slots."""

    memory_slots: int = 90
    wrong: bool = False
    interface_size = 3
    read_size = 3

    @property
    def initial_state(self):
        shape = self.memory_slots, self.interface_size
        return PairState(
            reads=StateSpec((1, self.interface_size)),
            left=StateSpec(shape, per_slot=True),
            right=StateSpec(shape, per_slot=True),
            counter=StateSpec(shape[:1], dtype="int32", per_slot=True),
        )

    def step(self, interface, state):
        def slots_of(interface):
            digits = ops.floor(1e4 * ops.abs(interface[:, :2]))
            return ops.cast(digits, "int32") % self.memory_slots

        first = sparse.chosen(slots_of, interface)
        second = sparse.chosen(lambda x: (7 * x + 3) % self.memory_slots, first)
        rows = sparse.take(state.left, first) + interface[:, None]
        right = sparse.put(state.right, first, rows)
        left = sparse.put(state.left, second, 0.5 * rows)
        counter = state.counter
        if self.wrong:
            counter = sparse.put(counter, first, first)
        seen = sparse.take(right, second) * sparse.take(left, second)
        reads = ops.sum(seen, axis=1, keepdims=True)
        return PairState(reads, left, right, counter), {}


class PairCell(keras_memory.MemoryCell, access=PairAccess):
    """One step."""


class PairLayer(keras_memory.MemoryRNN, cell=PairCell):
    """`PairCell` over sequences."""


@harness.needs_tensorflow
def test_memories_with_the_same_slots_keep_their_own_gradients():
    import tensorflow as tf

    layer = PairLayer(3, controller="dense", return_state=True, dtype="float64")
    x = sequences().astype("float64")
    layer.build(x.shape)
    rng = np.random.default_rng(3)
    states = layer.cell.get_initial_state(BATCH)
    memories = [tf.Variable(rng.normal(size=s.shape)) for s in states[1:3]]

    def gradients(loop):
        layer.loop = loop
        with tf.GradientTape() as tape:
            given = [states[0], *(m.value() for m in memories), *states[3:]]
            y, *after = layer(x, initial_state=given, training=True)
            loss = ops.sum(y**2) + sum(ops.sum(s**2) for s in after[:3])
        assert layer.time_loop.startswith(loop)
        return tape.gradient(loss, [*memories, *layer.trainable_variables])

    for fast, portable in zip(gradients("fast"), gradients("portable")):
        assert np.any(portable)
        close(fast, portable.numpy(), 1e-10)


@pytest.mark.every_backend
def test_a_memory_without_slots_for_has_all_its_slots():
    layer, x = PairLayer(3, controller="dense"), sequences()
    assert layer(x).shape == (BATCH, 3)
    assert not layer.cell.starts_empty
    assert keras_memory.trace(layer, x)["left"].shape == (BATCH, TIME, 90, 3)


@harness.needs_tensorflow
def test_rows_of_a_state_without_gradient_are_not_put():
    layer = PairLayer(3, wrong=True, controller="dense")
    with pytest.raises(ValueError, match="`update` changes rows without"):
        layer(sequences(), training=True)


@pytest.mark.every_backend
@pytest.mark.parametrize("written", [0, 1])
def test_a_written_slot_is_found_where_products_are_nan(written):
    memory, last_access = np.zeros((1, 2, 2)), np.full((1, 2), sparse.UNWRITTEN)
    memory[0, written] = [3e38, -3e38]  # products: infinity less infinity
    last_access[0, written] = 1
    memory = ops.convert_to_tensor(memory, dtype="float32")
    norms = ops.ones((1, 2), "float32")
    last_access = ops.convert_to_tensor(last_access, dtype="int32")
    key = ops.convert_to_tensor([[[1e9, 1e9]]], dtype="float32")
    with np.errstate(all="ignore"):
        slots = sparse.nearest(memory, norms, last_access, key, 2)
    assert ops.convert_to_numpy(slots).tolist() == [[[written, -1]]]


@pytest.mark.every_backend
@pytest.mark.parametrize("size", [1e15, 1e30])
def test_norms_of_huge_rows_have_the_epsilon(size):
    rows = np.random.default_rng(3).normal(size=(1, 4, 5)) * size
    given = ops.convert_to_tensor(rows, dtype="float32")
    norms = ops.convert_to_numpy(sparse.norms_of(given, 1e30))
    close(norms / np.sqrt((rows**2).sum(axis=2) + 1e30), np.ones((1, 4)), 1e-6)


@harness.needs_tensorflow
def test_norms_of_given_contents_are_those_of_the_memory_in_16_bits():
    layer = layer_of(memory_slots=9, dtype="mixed_float16")
    layer.build(sequences().shape)
    contents = np.random.default_rng(3).normal(size=(BATCH, 9, 5))
    record = layer.cell.unpack_state(layer.cell.state_with(contents))
    rows = ops.convert_to_numpy(record.memory)
    assert rows.dtype == "float16"
    assert np.any(rows != contents.astype("float32"))
    expected = np.sqrt((rows.astype("float32") ** 2).sum(axis=2) + NORM_EPSILON)
    close(record.norms, expected, 1e-6)


@pytest.mark.every_backend
def test_a_trace_leaves_out_the_slots_of_masked_steps():
    layer, x = layer_of(memory_slots=300), sequences()
    layer.build(x.shape)
    contents = np.random.default_rng(6).normal(size=(BATCH, 300, 5))
    states = layer.cell.state_with(contents.astype("float32"))
    mask = np.zeros((BATCH, TIME), bool)
    mask[:, 0] = True
    masked = keras_memory.trace(layer, x, initial_state=states, mask=mask)
    alone = keras_memory.trace(layer, x[:, :1], initial_state=states)
    np.testing.assert_array_equal(masked["slots"][:, 0], alone["slots"][:, 0])


@harness.needs_tensorflow
def test_a_memory_may_stay_unused():
    import tensorflow as tf

    layer, x = layer_of(memory_slots=300, return_state=True), sequences()
    layer.build(x.shape)
    contents = np.random.default_rng(8).normal(size=(BATCH, 300, 5))
    states = layer.cell.state_with(contents.astype("float32"))
    memory = tf.Variable(states[1])
    with tf.GradientTape() as tape:
        y, _, after, *_ = layer(
            x,
            initial_state=[states[0], memory.value(), *states[2:]],
            training=True,
            use_memory=False,
        )
        loss = tf.reduce_sum(y**2) + tf.reduce_sum(after)
    kernel = layer.cell.output_projection[0]
    by_memory, by_kernel = tape.gradient(loss, [memory, kernel])
    assert layer.time_loop == "fast"
    close(by_memory, np.ones(memory.shape))
    assert np.abs(by_kernel).sum() > 0
    inside = keras_memory.trace(layer, x, use_memory=False)
    assert inside["output"].shape == (BATCH, TIME, 3)
    assert "read_weighting" not in inside


@harness.needs_tensorflow
@pytest.mark.parametrize("slots", [5, 300])
def test_a_batch_may_be_empty(slots):
    import tensorflow as tf

    layer = layer_of(memory_slots=slots, return_state=True)
    with tf.GradientTape() as tape:
        y, *_ = layer(np.zeros((0, 3, 4), "float32"), training=True)
        loss = tf.reduce_sum(y)
    assert y.shape == (0, 3, 3)
    for gradient in tape.gradient(loss, layer.trainable_variables):
        assert not np.any(gradient)


@pytest.mark.every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_a_trace_shows_the_slots_that_a_sequence_touches(masked):
    layer, x = layer_of(memory_slots=300, num_layers=2), sequences()
    layer.build(x.shape)
    rng = np.random.default_rng(6)
    states = layer.cell.state_with(rng.normal(size=(BATCH, 300, 5)))
    mask = np.ones((BATCH, TIME), bool)
    mask[0, 3] = mask[1, 0] = not masked
    inside = keras_memory.trace(layer, x, initial_state=states, mask=mask)
    before = layer.cell.unpack_state(states)
    layer.return_state = True
    _, *states = layer(x, initial_state=states, mask=mask)
    after = layer.cell.unpack_state(states)
    touched = np.any(
        ops.convert_to_numpy(after.memory)
        != ops.convert_to_numpy(before.memory),
        axis=2,
    )
    slots = inside["block1/slots"]
    for b in range(BATCH):
        shown = slots[b, 0][slots[b, 0] >= 0]
        assert (np.diff(shown) > 0).all()
        assert {*np.flatnonzero(touched[b])} <= {*shown.tolist()}
        for field in ("memory", "last_access", "norms"):
            values = inside[f"block1/{field}"][b, -1, : len(shown)]
            expected = ops.convert_to_numpy(getattr(after, field))[b, shown]
            close(values, expected, 1e-6)
    for block in ("block0", "block1"):
        reads = np.einsum(
            "btrp,btpw->btrw",
            inside[f"{block}/read_weighting"],
            inside[f"{block}/memory"],
        )
        close(inside[f"{block}/reads"], reads, 1e-6)
    assert slots.shape[2] < 200
    assert "block1/block_access" not in inside


# Serving.


@harness.needs_tensorflow
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_stream_has_the_slots_of_its_steps(blocks, tmp_path):
    import tensorflow as tf

    layer = layer_of(memory_slots=10_000, num_layers=blocks)
    model = keras.Sequential([keras.Input((None, 4)), layer])
    x = sequences(8)
    folder = keras_memory.export.export_for_serving(
        model, tmp_path / "sam", max_steps=8, warm_up=[(1, 1)]
    )
    served = tf.saved_model.load(folder).signatures
    states = served["initial_state"](inputs=x[:, 0])
    assert states["memory"].shape == (BATCH, 8 * blocks * SIZES["slot_size"])
    assert states["last_access"].dtype == tf.int32
    expected = model(x)
    for t in range(x.shape[1]):
        states = served["step"](inputs=x[:, t], **states)
        close(states.pop("outputs"), expected[:, t].numpy(), 1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_steps"):
        served["step"](inputs=x[:, 0], **states)
    with pytest.raises(ValueError, match="`max_steps` must be"):
        keras_memory.export.export_for_serving(
            model, tmp_path / "short", max_steps=4
        )
