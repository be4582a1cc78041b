"""The sparse DNC, compared with its oracle and with links followed by hand.
`test_accesses.py` has the checks of all accesses."""

import harness
import keras
import numpy as np
import pytest
import reference_sdnc
from keras import ops
from test_sam import DTYPE
from test_sam import NORM_EPSILON
from test_sam import assert_gradients
from test_sam import close
from test_sam import parts

import keras_memory
from keras_memory.addressing import sparse
from keras_memory.addressing import sparse_linkage
from keras_memory.addressing.sparse_linkage import Links
from keras_memory.addressing.sparse_linkage import Precedence
from keras_memory.sdnc import SDNCAccess
from keras_memory.sdnc import SDNCState
from keras_memory.sdnc import _links_between

BATCH, TIME = 2, 8


def tensor(x, dtype=DTYPE):
    return ops.convert_to_tensor(x, dtype=dtype)


# Against the oracle, which has the names of the paper and keeps all links.

ORACLE = {"key": "query", "add_vector": "word", "read_mode": "read_modes"}
SIZES = {"memory_slots": 6, "slot_size": 5, "read_heads": 2, "top_k": 6}
CASES = {
    "every slot is read": {},
    "few slots are read": {"top_k": 2},
    "more slots than steps": {"memory_slots": 15, "top_k": 3},
    "one slot": {"memory_slots": 1, "top_k": 1},
    "one head": {"read_heads": 1, "top_k": 3},
}
SLOW = pytest.mark.slow


def cases(*plain):
    """Parametrizes a test; all but the `plain` cases are slow."""
    return pytest.mark.parametrize(
        ("sizes", "is_full"),
        [
            pytest.param(
                *(sizes, is_full),
                id=f"{name}-{word}",
                marks=() if f"{name}-{word}" in plain else SLOW,
            )
            for name, sizes in CASES.items()
            for word, is_full in (("empty", False), ("full", True))
        ],
    )


def access_of(**sizes):
    sizes = {**SIZES, **sizes}
    return SDNCAccess(
        **{"sparse_links": sizes["memory_slots"], **sizes},
        norm_epsilon=NORM_EPSILON,
    )


def inputs(access, seed=3, steps=TIME):
    """Interfaces (B, T, interface_size) before their activations."""
    rng = np.random.default_rng(seed)
    return 1.5 * rng.normal(size=(BATCH, steps, access.interface_size))


def starts(access, is_full):
    """The state of the oracle, and the layer's, in the middle of a sequence or
    at its start."""
    slots, heads, top_k = access.memory_slots, access.read_heads, access.top_k
    count = access.sparse_links
    given = reference_sdnc.initial_state(BATCH, slots, access.slot_size, heads)
    state = SDNCState(
        **{
            name: ops.full(
                (BATCH, *spec.shape), spec.fill, spec.dtype_in(DTYPE)
            )
            for name, spec in access.initial_state._asdict().items()
            if name != "controller"
        }
    )
    if not is_full:
        return given, state
    rng = np.random.default_rng(5)
    given["memory"] = rng.normal(size=given["memory"].shape)
    given["last_access"] = rng.integers(0, 20, size=(BATCH, slots))
    given["written"][:] = True
    given["time"] += 20
    read_slots = np.argsort(rng.normal(size=(BATCH, heads, slots)))
    read_slots = read_slots[..., :top_k]
    weights = rng.dirichlet(np.ones(top_k), size=(BATCH, heads))
    np.put_along_axis(given["read_weighting"], read_slots, weights, axis=2)
    given["precedence"] = 0.9 * rng.dirichlet(np.ones(slots), size=BATCH)
    links = rng.uniform(size=(BATCH, slots, slots))
    links *= rng.uniform(size=links.shape) < 0.6
    links *= 1.0 - np.eye(slots)
    links /= np.maximum(1.0, links.sum(2, keepdims=True))
    given["forward_links"] = links
    given["backward_links"] = np.swapaxes(links, 1, 2)
    all_slots = np.broadcast_to(np.arange(slots), links.shape)
    # Slot i has link j from slot j, so that link number i N + j is N(i, j).
    numbers = np.arange(slots) * count + np.arange(slots)[:, None]
    state = state._replace(
        memory=tensor(given["memory"]),
        norms=sparse.norms_of(tensor(given["memory"]), NORM_EPSILON),
        last_access=tensor(given["last_access"], "int32"),
        read_slots=tensor(read_slots, "int32"),
        read_weights=tensor(weights),
        time=ops.full((BATCH, 1), 20, "int32"),
        predecessors=tensor(np.where(links > 0, all_slots, -1), "int32"),
        link_weights=tensor(links),
        successors=tensor(
            np.where(np.swapaxes(links, 1, 2) > 0, numbers, -1), "int32"
        ),
        precedence_slots=tensor(all_slots[:, 0], "int32"),
        precedence_weights=tensor(given["precedence"]),
    )
    return given, state


def dense_links(state, slots):
    """N and the transpose of P, (B, N, N), from the two directions."""
    by_row, by_column = np.zeros((2, BATCH, slots, slots))
    links = Links(state.predecessors, state.link_weights, state.successors)
    before, weights, numbers = map(ops.convert_to_numpy, links)
    count = before.shape[2]
    for row in range(BATCH):
        for slot in range(slots):
            for earlier, weight in zip(before[row, slot], weights[row, slot]):
                if earlier >= 0:
                    by_row[row, slot, earlier] += weight
            for later, place in (divmod(n, count) for n in numbers[row, slot]):
                if later >= 0 and before[row, later, place] == slot:
                    by_column[row, later, slot] += weights[row, later, place]
    return by_row, by_column


@cases(
    "every slot is read-full",
    "few slots are read-empty",
    "few slots are read-full",
    "one slot-empty",
)
@pytest.mark.few_backends
@pytest.mark.every_backend
def test_steps_equal_the_oracle(sizes, is_full):
    access = access_of(**sizes)
    interface, slots = inputs(access), access.memory_slots
    given, state = starts(access, is_full)
    expected, end = reference_sdnc.run(
        parts(access, interface, ORACLE),
        given,
        top_k=access.top_k,
        sparse_links=access.sparse_links,
        access_threshold=access.access_threshold,
        norm_epsilon=NORM_EPSILON,
        bounded=True,
    )
    for t in range(TIME):
        state, inside = access.step(tensor(interface[:, t]), state)
        read_slots = ops.convert_to_numpy(state.read_slots)
        np.testing.assert_array_equal(
            read_slots, expected["read_positions"][:, t]
        )
        close(state.read_weights, expected["read_weights"][:, t])
        close(state.reads, expected["reads"][:, t])
        close(state.memory, expected["memory"][:, t])
        last_access = ops.convert_to_numpy(state.last_access)
        np.testing.assert_array_equal(
            np.maximum(last_access, 0), expected["last_access"][:, t]
        )
        for links in dense_links(state, slots):
            close(links, expected["forward_links"][:, t])
        precedence = np.zeros((BATCH, slots + 1))
        at = ops.convert_to_numpy(state.precedence_slots)
        weights = ops.convert_to_numpy(state.precedence_weights)
        np.put_along_axis(precedence, at, weights, axis=1)
        close(precedence[:, :slots], expected["precedence"][:, t])
        for name in ("backward", "content", "forward"):
            weighting = np.zeros((BATCH, access.read_heads, slots))
            at = ops.convert_to_numpy(inside[f"{name}_slots"])
            weights = ops.convert_to_numpy(inside[f"{name}_weights"])
            for index in np.ndindex(at.shape):
                if at[index] >= 0:
                    weighting[(*index[:2], at[index])] += weights[index]
            close(weighting, expected[name][:, t])
    assert (ops.convert_to_numpy(state.time)[:, 0] == end["time"]).all()
    # The case is worth its name: links are followed in both directions.
    if slots > 1:
        assert expected["forward"].max() > 0.05
        assert expected["backward"].max() > 0.05


def test_some_weightings_of_the_oracle_are_scaled_down():
    """Otherwise the test above would not cover the scaling."""
    access = access_of()
    given, _ = starts(access, True)
    expected = [
        reference_sdnc.run(
            parts(access, inputs(access), ORACLE),
            given,
            top_k=access.top_k,
            sparse_links=access.sparse_links,
            bounded=bounded,
        )[0]["forward"].sum(-1)
        for bounded in (False, True)
    ]
    assert expected[0].max() > 1.005
    assert expected[1].max() <= 1.0 + 1e-9


@cases("few slots are read-full")
@harness.needs_tensorflow
def test_gradients_of_steps_equal_the_oracle(sizes, is_full):
    import tensorflow as tf

    access, steps = access_of(**sizes), 4
    interface = inputs(access, steps=steps)
    given, state = starts(access, is_full)
    upstream = np.random.default_rng(9).normal(
        size=(BATCH, steps, access.read_heads, access.slot_size)
    )
    variables = [tf.Variable(interface[:, t]) for t in range(steps)]
    memory, weights = tf.Variable(state.memory), tf.Variable(state.read_weights)
    with tf.GradientTape() as tape:
        now = state._replace(
            memory=memory.value(), read_weights=weights.value()
        )
        loss = 0.0
        for t, at in enumerate(variables):
            now, _ = access.step(at.value(), now)
            loss += tf.reduce_sum(now.reads * upstream[:, t])
    by_steps, by_memory, by_weights = tape.gradient(
        loss, (variables, memory, weights), unconnected_gradients="zero"
    )
    expected = reference_sdnc.loss_gradients(
        parts(access, interface, ORACLE),
        given,
        upstream,
        top_k=access.top_k,
        sparse_links=access.sparse_links,
        access_threshold=access.access_threshold,
        norm_epsilon=NORM_EPSILON,
        bounded=True,
    )
    close(by_memory, expected["memory"], 1e-7)
    if is_full:
        at = ops.convert_to_numpy(state.read_slots)
        expected_weights = np.take_along_axis(
            expected["read_weighting"], at, axis=2
        )
        close(by_weights, expected_weights, 1e-7)
    assert_gradients(access, variables, by_steps, expected, ORACLE)


# Links that are cut, compared with dense matrices.


def cut(values, count, before):
    """Sets all but the largest entries to 0. Of equal ones, those that were
    not 0 before stay, then those of the lowest slots."""
    order = sorted(
        np.flatnonzero(values > 0),
        key=lambda slot: (-values[slot], before[slot] == 0, slot),
    )
    kept = np.zeros_like(values)
    kept[order[:count]] = values[order[:count]]
    return kept


def links_of_row(links, row):
    """N (slots, slots), and a set of the pairs (later, earlier) in P."""
    before, weights, numbers = (
        ops.convert_to_numpy(part)[row] for part in links
    )
    slots, count = before.shape
    matrix, pairs = np.zeros((slots, slots)), set()
    for slot in range(slots):
        for earlier, weight in zip(before[slot], weights[slot]):
            assert (earlier >= 0) == (weight > 0)
            if earlier >= 0:
                matrix[slot, earlier] += weight
        own = [divmod(number, count) for number in numbers[slot] if number >= 0]
        assert len({*own}) == len(own)
        pairs |= {(i, slot) for i, k in own if before[i, k] == slot}
    return matrix, pairs


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.few_backends
@pytest.mark.every_backend
def test_the_strongest_links_are_kept_in_both_directions(count):
    """P keeps the strongest links of N to later slots. A link that P has lost
    stays lost until it is written again."""
    slots, rng = 9, np.random.default_rng(2)
    none = ops.full((BATCH, slots, count), -1, "int32")
    links = Links(none, ops.zeros((BATCH, slots, count), DTYPE), none)
    precedence = Precedence(
        ops.full((BATCH, count), -1, "int32"), ops.zeros((BATCH, count), DTYPE)
    )
    matrices = np.zeros((BATCH, slots, slots))
    last = np.zeros((BATCH, slots))
    pairs = [set() for _ in range(BATCH)]
    lost = 0
    for _ in range(15):
        at = rng.integers(0, slots, (BATCH, 4))  # some slots occur twice
        weights = rng.dirichlet(np.ones(4), BATCH) * rng.uniform(
            size=(BATCH, 1)
        )
        links = sparse_linkage.links_after_write(
            links, precedence, tensor(at, "int32"), tensor(weights)
        )
        precedence = sparse_linkage.precedence_after_write(
            precedence, tensor(at, "int32"), tensor(weights)
        )
        for row in range(BATCH):
            w = np.bincount(at[row], weights[row], slots)
            matrix, p = matrices[row], last[row]
            written = np.unique(at[row])
            for i in written:
                new = (1 - w[i]) * matrix[i] + w[i] * p  # eq. 19
                new[i] = 0.0
                matrix[i] = cut(new, count, matrix[i])
            still = {(i, j) for i, j in pairs[row] if matrix[i, j] > 0}
            for j in np.flatnonzero(p):
                column = np.zeros(slots)
                for i in range(slots):
                    if (i, j) in still or (i in written and matrix[i, j] > 0):
                        column[i] = matrix[i, j]
                was = np.array([(i, j) in still for i in range(slots)])
                kept = np.flatnonzero(cut(column, count, was.astype(float)))
                lost += len(kept) < (column > 0).sum()
                still -= {(i, j) for i in range(slots)}
                still |= {(i, j) for i in kept}
            pairs[row] = still
            last[row] = cut((1 - w.sum()) * p + w, count, p)  # eq. 11
            found, found_pairs = links_of_row(links, row)
            close(found, matrix)
            assert found_pairs == still
            dense = np.zeros(slots + 1)
            dense[ops.convert_to_numpy(precedence.slots)[row]] = (
                ops.convert_to_numpy(precedence.weights)[row]
            )
            close(dense[:slots], last[row])
    assert lost  # or P was never cut


# Links by hand.


class Written:
    """Writes slots one after the other, and follows the links."""

    def __init__(self, slots=5, count=2):
        none = ops.full((1, slots, count), -1, "int32")
        self.links = Links(none, ops.zeros((1, slots, count)), none)
        self.precedence = Precedence(none[:, 0], ops.zeros((1, count)))

    def write(self, slot, weight=1.0):
        written = tensor([[slot]], "int32"), tensor([[weight]], "float32")
        self.links = sparse_linkage.links_after_write(
            self.links, self.precedence, *written
        )
        self.precedence = sparse_linkage.precedence_after_write(
            self.precedence, *written
        )
        return self

    def around(self, slot):
        """Dicts from the slots before and after a slot to the weights."""
        found = sparse_linkage.linked_slots(
            self.links, tensor([[slot]], "int32")
        )
        before, to_before, after, to_after = (
            ops.convert_to_numpy(part)[0, 0].tolist() for part in found
        )
        return tuple(
            {slot: round(w, 5) for slot, w in zip(slots, weights) if w > 0}
            for slots, weights in ((before, to_before), (after, to_after))
        )


@pytest.mark.every_backend
def test_the_order_of_writes_is_in_the_links():
    written = Written()
    for slot in (3, 0, 4, 1):
        written.write(slot)
    assert written.around(3) == ({}, {0: 1.0})
    assert written.around(0) == ({3: 1.0}, {4: 1.0})
    assert written.around(4) == ({0: 1.0}, {1: 1.0})
    assert written.around(1) == ({4: 1.0}, {})
    assert written.around(2) == ({}, {})  # never written
    assert written.around(-1) == ({}, {})


@pytest.mark.every_backend
def test_a_slot_that_is_written_again_keeps_its_old_successor_only():
    written = Written()
    for slot in (0, 1, 2, 3, 1):
        written.write(slot)
    # 1 now comes after 3, and no longer after 0; 2 came after 1, and still.
    assert written.around(0) == ({}, {})
    assert written.around(1) == ({3: 1.0}, {2: 1.0})
    assert written.around(2) == ({1: 1.0}, {3: 1.0})
    written.write(4)
    assert written.around(1) == ({3: 1.0}, {2: 1.0, 4: 1.0})


@pytest.mark.every_backend
def test_links_fade_by_the_weight_of_a_write():
    written = Written().write(0).write(1).write(2, weight=0.25)
    # p was 1 at slot 1, is then 0.75 there and 0.25 at slot 2.
    assert written.around(2) == ({1: 0.25}, {})
    written.write(3)
    assert written.around(3) == ({1: 0.75, 2: 0.25}, {})
    written.write(1, weight=0.5)
    assert written.around(1) == ({0: 0.5, 3: 0.5}, {2: 0.25, 3: 0.75})
    # A slot does not follow itself.
    assert written.write(1).around(1)[0] == {3: 0.5}


@pytest.mark.every_backend
def test_of_equal_links_the_older_stays():
    written = Written(count=1)
    for slot in (0, 1, 0, 2):
        written.write(slot)
    assert written.around(0) == ({1: 1.0}, {1: 1.0})  # and not 2
    assert written.around(2) == ({0: 1.0}, {})


@pytest.mark.every_backend
def test_a_link_that_comes_back_has_one_weight():
    written = Written(count=1)
    for slot, weight in ((0, 1.0), (1, 0.4), (2, 0.9), (0, 1.0), (1, 0.5)):
        written.write(slot, weight)
    # In the paper 0.5 in P, which would lose to the 0.54 of slot 2.
    assert written.around(0)[1] == {1: 0.7}


@harness.needs_tensorflow
def test_weightings_that_sum_to_one_have_the_gradient_of_their_parts():
    import tensorflow as tf

    access = access_of(top_k=2, read_heads=1, memory_slots=2)
    previous = tf.Variable([[[0.5, 0.5]]])
    links = tf.constant([[[1.0, 0.0], [1.0, 0.0]]])
    with tf.GradientTape() as tape:
        first = access._follow(links, previous.value())[0, 0, 0]
    np.testing.assert_allclose(tape.gradient(first, previous), [[[1.0, 0.0]]])


# The layer.


def layer_of(**kwargs):
    fixed = {"units": 3, "controller_units": 7, "return_sequences": True}
    sizes = {**SIZES, "top_k": 2, "sparse_links": 3}
    return keras_memory.SDNCLayer(**{**sizes, **fixed, **kwargs})


def sequences(steps=TIME):
    rng = np.random.default_rng(1)
    return rng.normal(size=(BATCH, steps, 4)).astype("float32")


@pytest.mark.every_backend
@pytest.mark.parametrize("slots", [40, pytest.param(3, marks=SLOW)])
def test_an_empty_memory_gives_the_outputs_of_one_with_all_slots(slots):
    x = sequences(5)
    layer = layer_of(memory_slots=slots)
    expected = layer(x)
    whole = layer_of(memory_slots=slots, return_state=True)
    whole.build(x.shape)
    whole.set_weights(layer.get_weights())
    outputs, *states = whole(x)
    close(outputs, ops.convert_to_numpy(expected), 1e-6)
    assert whole.cell.unpack_state(states).successors.shape == (BATCH, slots, 3)


@harness.needs_tensorflow
def test_an_empty_batch_gives_empty_outputs():
    layer = layer_of(return_state=True)
    outputs, *states = layer(np.zeros((0, 1, 4), "float32"))
    assert tuple(outputs.shape) == (0, 1, 3)
    sizes = [(0, size) for size in layer.cell.state_size]
    assert [tuple(state.shape) for state in states] == sizes


# States from outside.


@pytest.mark.every_backend
def test_given_precedence_and_read_weights_are_brought_into_range():
    cell = layer_of().cell
    cell.build((BATCH, 4))
    state = cell.unpack_state(cell.get_initial_state(BATCH))
    states = cell.pack_state(
        state._replace(
            read_weights=np.full((BATCH, 2, 2), 3.0),
            precedence_slots=np.tile([99, 0, -7], (BATCH, 1)),
            precedence_weights=np.tile([1.0, 3.0, -2.0], (BATCH, 1)),
        )
    )
    (found,) = cell.layout.in_range(states)
    close(found.read_weights, np.full((BATCH, 2, 2), 0.5))
    close(found.precedence_slots, np.tile([5, 0, -1], (BATCH, 1)))
    close(found.precedence_weights, np.tile([0.25, 0.75, 0.0], (BATCH, 1)))


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_given_links_to_no_slot_lead_to_the_last(direction):
    """Beyond the slots a gather would be an error on a CPU."""
    access = access_of(sparse_links=3)
    _, state = starts(access_of(), True)
    before, numbers = (99, -1) if direction == "backward" else (0, 10**9)
    links = np.ones((BATCH, 6, 3))
    state = state._replace(
        predecessors=tensor(before * links, "int32"),
        link_weights=tensor(0.3 * links),
        successors=tensor(numbers * links, "int32"),
        precedence_slots=tensor(-links[:, 0], "int32"),
        precedence_weights=tensor(0.0 * links[:, 0]),
    )
    interface = tensor(inputs(access, steps=1)[:, 0])
    after, inside = access.step(interface, state)
    weights = ops.convert_to_numpy(inside[f"{direction}_weights"])
    slots = ops.convert_to_numpy(inside[f"{direction}_slots"])
    assert weights.max() > 0
    assert (slots[weights > 0] == 5).all()
    assert np.isfinite(ops.convert_to_numpy(after.reads)).all()


@pytest.mark.every_backend
def test_negative_links_do_not_cancel_others():
    access = access_of(memory_slots=4, read_heads=1, top_k=1, sparse_links=2)
    links = tensor([[[3.0, -2.9]]])
    weights = access._follow(links, tensor([[[1.0]]]))
    close(weights, [[[1.0, 0.0]]])


def test_void_links_are_not_read():
    access = access_of(memory_slots=6, read_heads=1, top_k=3, sparse_links=2)
    _, state = starts(access, False)
    successors = np.full((BATCH, 6, 2), -1)
    successors[:, 1, 0] = 4 * 2  # but slot 4 has no links
    read_slots = np.tile([1, -1, -1], (BATCH, 1, 1))
    state = state._replace(
        successors=tensor(successors, "int32"),
        read_slots=tensor(read_slots, "int32"),
        read_weights=tensor(np.tile([1.0, 0.0, 0.0], (BATCH, 1, 1))),
    )
    interface = tensor(inputs(access, steps=1)[:, 0])
    after, _ = access.step(interface, state)
    found = np.sort(ops.convert_to_numpy(after.read_slots))
    # Content finds the slots 0 and 1, which the step has written.
    np.testing.assert_array_equal(found[:, 0], [[-1, 0, 1]] * BATCH)


@harness.needs_tensorflow
def test_links_and_precedence_have_no_gradient():
    import tensorflow as tf

    access = access_of(top_k=2)
    _, state = starts(access, True)
    interface = tf.Variable(inputs(access, steps=1)[:, 0])
    with tf.GradientTape() as tape:
        after, _ = access.step(interface.value(), state)
        loss = tf.reduce_sum(after.link_weights**2)
        loss += tf.reduce_sum(after.precedence_weights**2)
    assert tape.gradient(loss, interface) is None


@pytest.mark.slow
@harness.needs_tensorflow
def test_a_memory_that_stays_has_the_gradients_of_the_portable_loop():
    import tensorflow as tf

    found = []
    for loop in ("fast", "portable"):
        keras.utils.set_random_seed(3)
        layer = layer_of(loop=loop, dtype="float64", stateful=True)
        x, mask = sequences().astype("float64"), np.ones((BATCH, TIME), bool)
        mask[1, 3:5] = False
        layer(x)  # so that the slots are written, and linked
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, mask=mask, training=True) ** 2)
        assert layer.time_loop.startswith(loop)
        found.append([loss, *tape.gradient(loss, layer.trainable_variables)])
        states = [ops.convert_to_numpy(state) for state in layer.states]
        found[-1] += states
    for one, other in zip(*found, strict=True):
        close(one, ops.convert_to_numpy(other), 1e-10)


@harness.needs_tensorflow
def test_a_trace_shows_the_links_between_its_slots():
    layer = layer_of(memory_slots=1000, sparse_links=4)
    time = 5
    x = sequences(time)
    inside = keras_memory.trace(layer, x)
    slots = inside["slots"][:, -1]
    assert slots.shape == (BATCH, time)
    linkage = keras_memory.addressing.dense_linkage(
        inside["linkage"], inside["link_columns"]
    )
    assert linkage.shape == (BATCH, time, 1, time, time)
    # The slots are written in their order, so their places are their numbers.
    assert slots.tolist() == [list(range(time))] * BATCH
    for row in range(BATCH):
        expected = np.zeros((time, time))
        for slot in range(time):
            for earlier, weight in zip(
                inside["predecessors"][row, -1, slot],
                inside["link_weights"][row, -1, slot],
            ):
                if earlier >= 0:
                    expected[slot, earlier] = weight
        assert expected.max() > 0.01
        close(linkage[row, -1, 0], expected, 1e-7)
    assert inside["forward_weighting"].shape == (BATCH, time, 2, time)
    keras_memory.visualization.plot_linkage(linkage[0])


def test_a_trace_shows_the_slots_of_the_precedence():
    access = access_of(memory_slots=9, top_k=1, sparse_links=2)
    _, state = starts(access, False)
    state = state._replace(
        precedence_slots=tensor(np.tile([7, -1], (BATCH, 1)), "int32"),
        precedence_weights=tensor(np.tile([1.0, 0.0], (BATCH, 1))),
    )
    interface = tensor(inputs(access, steps=1)[:, 0])
    touched = ops.convert_to_numpy(
        access.touched(*access.step(interface, state))
    )
    assert (touched == 7).any(axis=1).all()


def test_a_trace_shows_no_links_of_missing_slots():
    _, state = starts(access_of(memory_slots=4, sparse_links=2, top_k=2), False)
    before = np.full((BATCH, 4, 2), -1)
    before[:, 0, 0] = 2
    state = state._replace(
        predecessors=tensor(before, "int32"),
        link_weights=tensor(np.where(before >= 0, 0.5, 0.0)),
    )
    slots = np.tile([0, 2, -1], (BATCH, 1))
    links = _links_between(state, tensor(slots, "int32"))
    expected = np.zeros((BATCH, 1, 3, 2))
    expected[:, 0, 0, 0] = 0.5
    close(links["linkage"], expected)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"sparse_links": 0}, "`sparse_links` must be"),
        ({"sparse_links": 7}, "`sparse_links` must be at most `memory_slots`"),
        ({"memory_slots": 2**29}, "int32 numbers. Received: memory_slots=536"),
    ],
)
def test_wrong_sizes_are_errors(sizes, match):
    with pytest.raises(ValueError, match=match):
        layer_of(**{"sparse_links": 4, **sizes})
