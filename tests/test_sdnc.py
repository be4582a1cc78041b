"""The sparse DNC, compared with its oracle and with links followed by hand.
`test_accesses.py` has the checks of all accesses."""

import harness
import keras
import numpy as np
import pytest
import reference_sdnc
from keras import ops

import keras_memory
from keras_memory.addressing import sparse
from keras_memory.addressing import sparse_linkage
from keras_memory.addressing.sparse_linkage import Links
from keras_memory.addressing.sparse_linkage import Precedence
from keras_memory.sdnc import SDNCAccess
from keras_memory.sdnc import SDNCState

BATCH, TIME = 2, 12
NORM_EPSILON = 1e-8
DTYPE = "float32" if harness.BACKEND == "jax" else "float64"
# Keras's products are of float32 on other backends.
TOLERANCE = 1e-9 if harness.BACKEND == "tensorflow" else 2e-5


def close(actual, expected, tolerance=TOLERANCE):
    harness.close(ops.convert_to_numpy(actual), expected, tolerance=tolerance)


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
each_case = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)


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


def parts(access, interface):
    """The oracle's interfaces."""
    shape = interface.shape[:2]
    split = access.split(tensor(interface.reshape(-1, access.interface_size)))
    named = {
        ORACLE.get(name, name): ops.convert_to_numpy(part).reshape(
            *shape, *part.shape[1:]
        )
        for name, part in split._asdict().items()
    }
    for gate in ("write_gate", "interpolation_gate"):
        named[gate] = named[gate][..., 0]
    return named


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


@each_case
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.every_backend
def test_steps_equal_the_oracle(sizes, is_full):
    access = access_of(**sizes)
    interface, slots = inputs(access), access.memory_slots
    given, state = starts(access, is_full)
    expected, end = reference_sdnc.run(
        parts(access, interface),
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


@pytest.mark.every_backend
def test_weightings_that_would_grow_are_scaled_down():
    """Some case of the test above is bounded, or it would prove less."""
    access = access_of()
    given, _ = starts(access, True)
    expected = [
        reference_sdnc.run(
            parts(access, inputs(access)),
            given,
            top_k=access.top_k,
            sparse_links=access.sparse_links,
            bounded=bounded,
        )[0]["forward"].sum(-1)
        for bounded in (False, True)
    ]
    assert expected[0].max() > 1.05
    assert expected[1].max() <= 1.0 + 1e-9


@each_case
@pytest.mark.parametrize("is_full", [False, True])
@harness.needs_tensorflow
def test_gradients_of_steps_equal_the_oracle(sizes, is_full):
    import tensorflow as tf

    access, steps = access_of(**sizes), 5
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
        parts(access, interface),
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
    # The chain from the oracle's interfaces to those before activations.
    for t, at in enumerate(variables):
        with tf.GradientTape() as tape:
            split = access.split(at.value())
            total = sum(
                tf.reduce_sum(
                    part
                    * expected[ORACLE.get(name, name)][:, t].reshape(
                        tuple(part.shape)
                    )
                )
                for name, part in split._asdict().items()
            )
        by_parts = tape.gradient(total, at)
        size = 1.0 + np.abs(by_parts).max()
        close(by_steps[t] / size, by_parts / size, 1e-8)
