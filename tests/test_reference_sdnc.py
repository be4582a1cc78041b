"""The oracle of the Sparse Differentiable Neural Computer, compared with values
computed by hand."""

import numpy as np
import pytest
import reference_sdnc
from reference import softmax
from reference_sdnc import INTERFACE
from reference_sdnc import loss_gradients
from reference_sdnc import run

A, B, C, D = range(4)  # words, and the slots that they are written to
WORDS = np.eye(5)[:4]
SIZES = {"memory_slots": 7, "top_k": 1, "sparse_links": 7}


# Steps, which change nothing by default: they write with a gate of 0.

FORWARD = {"read_modes": [[0.0, 0.0, 1.0]]}
BACKWARD = {"read_modes": [[1.0, 0.0, 0.0]]}


def write(word, gate=1.0):
    """Writes to the least recently accessed slot."""
    return {"word": WORDS[word], "write_gate": gate}


def rewrite(word):
    """Writes to the slots of the read before."""
    return {"word": WORDS[word], "write_gate": 1.0, "interpolation_gate": 1.0}


def find(word):
    """Reads by content; its strength leaves no weight for other words."""
    return {"query": WORDS[word][None]}


def interfaces_of(*steps):
    steps = [
        {
            "query": np.zeros((1, 5)),
            "strength": [1000.0],
            "word": np.zeros(5),
            "write_gate": 0.0,
            "interpolation_gate": 0.0,
            "read_modes": [[0.0, 1.0, 0.0]],
            **step,
        }
        for step in steps
    ]
    return {
        name: np.array([[step[name] for step in steps]]) for name in INTERFACE
    }


def trace_of(*steps, **sizes):
    """Values (T, ...) of one batch item and one head."""
    trace, _ = run(interfaces_of(*steps), **{**SIZES, **sizes})
    return {name: value[0] for name, value in trace.items()}


def matrix(links, slots=7):
    """links: {(i, j): value}."""
    values = np.zeros((slots, slots))
    for index, value in links.items():
        values[index] = value
    return values


def vector(entries, slots=7):
    return np.array([entries.get(slot, 0.0) for slot in range(slots)])


def random_interfaces(seed=0, batch=3, steps=11, heads=2, width=5):
    rng = np.random.default_rng(seed)
    return {
        "query": rng.normal(size=(batch, steps, heads, width)),
        "strength": 1.0 + rng.exponential(size=(batch, steps, heads)),
        "word": rng.normal(size=(batch, steps, width)),
        "write_gate": rng.uniform(size=(batch, steps)),
        "interpolation_gate": rng.uniform(size=(batch, steps)),
        "read_modes": softmax(rng.normal(size=(batch, steps, heads, 3))),
    }


RANDOM = {"memory_slots": 7, "top_k": 3}


# The order of writes.


def test_a_list_is_read_forward_and_backward():
    reads = [find(A), FORWARD, BACKWARD, FORWARD, FORWARD, BACKWARD, BACKWARD]
    trace = trace_of(write(A), write(B), write(C), *reads)
    forward = matrix({(B, A): 1.0, (C, B): 1.0})
    np.testing.assert_array_equal(trace["forward_links"][-1], forward)
    np.testing.assert_array_equal(trace["backward_links"][-1], forward.T)
    np.testing.assert_array_equal(trace["precedence"][-1], vector({C: 1.0}))
    slots = [A, B, A, B, C, B, A]
    assert trace["read_positions"][3:, 0, 0].tolist() == slots
    assert (trace["read_weights"][3:] == 1.0).all()
    np.testing.assert_array_equal(trace["reads"][3:, 0], WORDS[slots])


@pytest.mark.parametrize("move, word", [(FORWARD, C), (BACKWARD, A)])
def test_a_slot_without_links_reads_nothing_by_them(move, word):
    """C has no successor, A has no predecessor."""
    trace = trace_of(write(A), write(B), write(C), find(word), move, move)
    assert trace["read_positions"][3, 0, 0] == word
    assert not trace["read_weighting"][4:].any()
    assert not trace["reads"][4:].any()


def test_a_rewritten_slot_loses_its_predecessor_and_keeps_its_successor():
    trace = trace_of(write(A), write(B), write(C), find(B), rewrite(D))
    np.testing.assert_array_equal(
        trace["write_weighting"][-1], vector({B: 1.0})
    )
    forward = matrix({(B, C): 1.0, (C, B): 1.0})
    np.testing.assert_array_equal(trace["forward_links"][-1], forward)
    np.testing.assert_array_equal(trace["backward_links"][-1], forward.T)
    np.testing.assert_array_equal(trace["precedence"][-1], vector({B: 1.0}))


def test_a_slot_is_never_its_own_predecessor():
    trace = trace_of(write(A), write(B), find(B), rewrite(C), write(D))
    # (19) by itself would have 1 at (B, B) after the fourth step.
    np.testing.assert_array_equal(trace["forward_links"][3], matrix({}))
    np.testing.assert_array_equal(trace["backward_links"][3], matrix({}))
    forward = matrix({(2, B): 1.0})
    np.testing.assert_array_equal(trace["forward_links"][4], forward)
    np.testing.assert_array_equal(trace["backward_links"][4], forward.T)


def test_links_see_the_write_of_the_step():
    """A read that follows a link in the step in which it arises."""
    trace = trace_of(write(A), {**write(B), **FORWARD})
    assert trace["read_positions"][0, 0, 0] == A
    assert trace["read_positions"][1, 0, 0] == B


def test_partial_writes_leave_partial_links():
    trace = trace_of(write(A, 0.5), write(B, 0.5), write(C, 0.5))
    forward = matrix({(B, A): 0.25, (C, A): 0.125, (C, B): 0.25})
    np.testing.assert_array_equal(trace["forward_links"][-1], forward)
    np.testing.assert_array_equal(trace["backward_links"][-1], forward.T)
    np.testing.assert_array_equal(
        trace["precedence"][-1], vector({A: 0.125, B: 0.25, C: 0.5})
    )


def test_an_erased_slot_keeps_the_links_that_its_write_leaves():
    """The third step erases A's slot, and writes a quarter to it."""
    trace = trace_of(
        write(A), {**write(B), **find(B)}, write(C, 0.25), memory_slots=2
    )
    assert trace["lra_slot"].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(trace["memory"][-1][0], 0.25 * WORDS[C])
    forward = matrix({(1, 0): 1.0, (0, 1): 0.25}, 2)
    np.testing.assert_array_equal(trace["forward_links"][-1], forward)


def test_links_equal_the_sum_over_all_writes():
    """The closed form of (11) and (19), for links that are not cut."""
    trace, _ = run(random_interfaces(), sparse_links=7, **RANDOM)
    for item in range(3):
        writes = trace["write_weighting"][item]
        forward = np.zeros((7, 7))
        for s, weighting in enumerate(writes):
            precedence = np.zeros(7)
            for r in range(s):
                rest = np.prod(1.0 - np.sum(writes[r + 1 : s], axis=1))
                precedence += writes[r] * rest
            rest = np.prod(1.0 - writes[s + 1 :], axis=0)
            forward += np.outer(weighting * rest, precedence)
        np.fill_diagonal(forward, 0.0)
        links = trace["forward_links"][item, -1]
        np.testing.assert_allclose(links, forward, atol=1e-13)
        links = trace["backward_links"][item, -1]
        np.testing.assert_allclose(links, forward.T, atol=1e-13)
        assert np.count_nonzero(links) > 20


# Cuts.


def test_rows_and_precedence_keep_their_largest_entries():
    steps = write(A, 0.5), write(B, 0.5), write(C, 0.5)
    trace = trace_of(*steps, sparse_links=1)
    # The cut precedence has no A when C is written.
    forward = matrix({(B, A): 0.25, (C, B): 0.25})
    np.testing.assert_array_equal(trace["forward_links"][-1], forward)
    np.testing.assert_array_equal(trace["backward_links"][-1], forward.T)
    np.testing.assert_array_equal(trace["precedence"][-1], vector({C: 0.5}))


def test_a_full_row_exchanges_its_smallest_entry():
    before = matrix({(C, A): 0.4, (C, B): 0.8}, 4)
    after = reference_sdnc.forward_linked(
        before, vector({D: 0.6}, 4), vector({C: 0.5}, 4), 2
    )
    expected = matrix({(C, B): 0.4, (C, D): 0.3}, 4)
    np.testing.assert_allclose(after, expected, atol=1e-15)


def test_directions_are_cut_apart():
    """B and C follow A. Each keeps its predecessor; A keeps one successor."""
    precedence, weighting = vector({A: 1.0}, 3), vector({B: 0.5, C: 0.5}, 3)
    arguments = np.zeros((3, 3)), precedence, weighting, 1
    forward = reference_sdnc.forward_linked(*arguments)
    backward = reference_sdnc.backward_linked(*arguments)
    np.testing.assert_array_equal(
        forward, matrix({(B, A): 0.5, (C, A): 0.5}, 3)
    )
    np.testing.assert_array_equal(backward, matrix({(A, B): 0.5}, 3))
    np.testing.assert_array_equal(
        reference_sdnc.follow(forward, vector({A: 1.0}, 3)),
        vector({B: 0.5, C: 0.5}, 3),
    )
    np.testing.assert_array_equal(
        reference_sdnc.follow(backward, vector({C: 1.0}, 3)), np.zeros(3)
    )


@pytest.mark.parametrize(
    "values, before, expected",
    [
        ([0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0]),
        ([0.5, 0.5, 0.5], [0.0, 0.0, 0.7], [0.5, 0.0, 0.5]),
        ([0.5, 0.4, 0.6], [0.0, 0.8, 0.0], [0.5, 0.0, 0.6]),
        ([0.0, 0.1, 0.0], [0.3, 0.0, 0.0], [0.0, 0.1, 0.0]),
    ],
)
def test_earlier_and_lower_entries_win_ties(values, before, expected):
    kept = reference_sdnc.largest(np.array(values), 2, np.array(before))
    assert kept.tolist() == expected


def test_rows_and_precedence_are_within_their_limit():
    trace, _ = run(random_interfaces(), sparse_links=2, **RANDOM)
    for name in ("forward_links", "backward_links", "precedence"):
        counts = np.count_nonzero(trace[name], axis=-1)
        assert counts.max() == 2
    columns = np.count_nonzero(trace["forward_links"], axis=-2)
    assert columns.max() > 2


def test_as_many_links_as_slots_are_all_links():
    interfaces = random_interfaces()
    cut, _ = run(interfaces, sparse_links=2, **RANDOM)
    every, end = run(interfaces, sparse_links=7, **RANDOM)
    more, more_end = run(interfaces, sparse_links=23, **RANDOM)
    for name, value in every.items():
        np.testing.assert_array_equal(value, more[name])
    for name, value in end.items():
        np.testing.assert_array_equal(value, more_end[name])
    assert not np.allclose(every["reads"], cut["reads"])


# Reads.


def test_modes_mix_backward_content_and_forward():
    """The mixture has 5 at content, 3 at forward and 2 at backward."""
    mixed = {**find(D), "read_modes": [[0.2, 0.5, 0.3]]}
    steps = write(A), write(B), write(C), write(D), find(B), mixed
    weights = {A: 0.2, C: 0.3, D: 0.5}
    trace = trace_of(*steps, top_k=3)
    np.testing.assert_array_equal(trace["mixture"][-1, 0], vector(weights))
    assert trace["read_positions"][-1, 0].tolist() == [D, C, A]
    assert trace["read_weights"][-1, 0].tolist() == [0.5, 0.3, 0.2]
    np.testing.assert_allclose(
        trace["reads"][-1, 0], 0.2 * WORDS[A] + 0.3 * WORDS[C] + 0.5 * WORDS[D]
    )
    # Two of three are kept, and their weights do not change.
    trace = trace_of(*steps, top_k=2)
    np.testing.assert_array_equal(trace["mixture"][-1, 0], vector(weights))
    assert trace["read_positions"][-1, 0].tolist() == [D, C]
    np.testing.assert_array_equal(
        trace["read_weighting"][-1, 0], vector({C: 0.3, D: 0.5})
    )
    np.testing.assert_allclose(
        trace["reads"][-1, 0], 0.3 * WORDS[C] + 0.5 * WORDS[D]
    )


def test_heads_follow_links_from_their_own_reads():
    one = interfaces_of(write(A), write(B), write(C), find(B), FORWARD)
    two = interfaces_of(write(A), write(B), write(C), find(A), FORWARD)
    both = {
        name: np.concatenate([one[name], two[name]], axis=2)
        if name in ("query", "strength", "read_modes")
        else one[name]
        for name in INTERFACE
    }
    trace, _ = run(both, **SIZES)
    assert trace["read_positions"][0, -1, :, 0].tolist() == [C, B]


def test_each_direction_follows_columns_of_its_own_links():
    trace, _ = run(random_interfaces(), sparse_links=1, **RANDOM)
    forward, backward = trace["forward_links"], trace["backward_links"]
    assert not np.allclose(forward, backward.swapaxes(2, 3))
    previous = trace["read_weighting"][:, :-1]
    for name, links in {"forward": forward, "backward": backward}.items():
        expected = np.einsum("btij,btrj->btri", links[:, 1:], previous)
        np.testing.assert_allclose(trace[name][:, 1:], expected, atol=1e-15)
        assert not trace[name][:, 0].any()


def test_a_read_by_links_is_an_access():
    trace = trace_of(write(A), write(B), write(C), find(A), FORWARD)
    # A is the nearest slot of the last step, but not what it reads.
    assert trace["content"][-1, 0, A] == 1.0
    assert trace["last_access"][-1, [A, B, C]].tolist() == [4, 5, 3]


def test_slots_that_are_unwritten_are_not_read():
    state = reference_sdnc.initial_state(1, 7, 5, 1)
    state["read_weighting"][0, 0] = vector({A: 0.9})
    state["forward_links"][0] = matrix({(B, A): 1.0, (C, A): 1.0})
    state["memory"][:] = 1.0
    state["written"][0, [A, C, D]] = True
    state["last_access"][0, [A, C, D]] = 1, 1, -1
    state["time"][:] = 1
    trace, _ = run(interfaces_of(FORWARD), state, top_k=3, sparse_links=7)
    assert trace["lra_slot"][0, 0] == D
    for name, weights in {
        "forward": {B: 0.9, C: 0.9},
        "read_weighting": {C: 0.9},
    }.items():
        np.testing.assert_array_equal(trace[name][0, 0, 0], vector(weights))


def test_weights_may_exceed_one():
    """A has two successors, as it was written twice: forward reads both with
    weight 1, and backward comes to A from both."""
    trace = trace_of(
        write(A),
        write(B),
        find(A),
        rewrite(A),
        {**write(C), **find(A)},
        FORWARD,
        BACKWARD,
        top_k=2,
    )
    forward = matrix({(A, B): 1.0, (B, A): 1.0, (C, A): 1.0})
    np.testing.assert_array_equal(trace["forward_links"][-1], forward)
    np.testing.assert_array_equal(
        trace["read_weighting"][-2, 0], vector({B: 1.0, C: 1.0})
    )
    np.testing.assert_array_equal(
        trace["read_weighting"][-1, 0], vector({A: 2.0})
    )


# Sizes, batches and masks.


def test_one_slot_has_no_links():
    interfaces = random_interfaces()
    trace, _ = run(interfaces, memory_slots=1, top_k=1, sparse_links=1)
    assert not trace["forward_links"].any()
    assert not trace["backward_links"].any()
    content = interfaces["read_modes"][..., 1]
    np.testing.assert_array_equal(trace["read_weighting"][..., 0], content)


def test_one_step_has_no_links():
    interfaces = random_interfaces(steps=1)
    trace, end = run(interfaces, sparse_links=7, **RANDOM)
    assert trace["reads"].shape == (3, 1, 2, 5)
    assert not end["forward_links"].any()
    written = trace["write_weighting"][:, 0]
    np.testing.assert_array_equal(end["precedence"], written)
    gates = interfaces["write_gate"] * (1.0 - interfaces["interpolation_gate"])
    np.testing.assert_array_equal(written[:, 0], gates[:, 0])


def test_batch_items_are_independent():
    interfaces = random_interfaces()
    together, _ = run(interfaces, sparse_links=2, **RANDOM)
    assert not np.allclose(together["reads"][0], together["reads"][1])
    for item in range(3):
        one = {name: v[item : item + 1] for name, v in interfaces.items()}
        alone, _ = run(one, sparse_links=2, **RANDOM)
        for name, value in alone.items():
            np.testing.assert_array_equal(value[0], together[name][item])


def test_two_halves_equal_the_whole():
    interfaces = random_interfaces()
    whole, end = run(interfaces, sparse_links=2, **RANDOM)
    state = None
    for part in (slice(0, 4), slice(4, None)):
        half = {name: value[:, part] for name, value in interfaces.items()}
        trace, state = run(half, state, sparse_links=2, **RANDOM)
        np.testing.assert_array_equal(trace["reads"], whole["reads"][:, part])
    for name, value in end.items():
        np.testing.assert_array_equal(state[name], value)


def test_masked_steps_keep_the_state():
    interfaces = random_interfaces()
    mask = np.ones((3, 11), bool)
    mask[:, [0, 4, 5, 10]] = False
    trace, end = run(interfaces, None, mask, sparse_links=2, **RANDOM)
    shorter = {name: value[:, mask[0]] for name, value in interfaces.items()}
    expected, expected_end = run(shorter, sparse_links=2, **RANDOM)
    for name, value in expected.items():
        np.testing.assert_array_equal(trace[name][:, mask[0]], value)
    for name, value in expected_end.items():
        np.testing.assert_array_equal(end[name], value)
        before = trace[name][:, 3]
        np.testing.assert_array_equal(trace[name][:, 5], before)


# Gradients.


def test_gradients_stop_at_links_and_pass_the_read_before():
    """The second step reads B by the link from A: its weight is
    forward_links[B, A] * the read weight of A, and its word is 0.5 * B's."""
    interfaces = interfaces_of(write(A, 0.8), {**write(B, 0.5), **FORWARD})
    state = reference_sdnc.initial_state(1, 3, 5, 1)
    upstream = np.zeros((1, 2, 1, 5))
    upstream[0, 1, 0, B] = 1.0
    options = {"top_k": 1, "sparse_links": 3}
    trace, _ = run(interfaces, state, **options)
    link = 0.5 * 0.8  # forward_links[B, A]
    np.testing.assert_allclose(trace["reads"][0, 1, 0], link * 0.5 * WORDS[B])
    gradients = loss_gradients(interfaces, state, upstream, **options)
    # The gate of A's write would have a gradient through the link only.
    np.testing.assert_allclose(gradients["write_gate"], [[0.0, link]])
    # The first step's content mode is the read weight of A.
    np.testing.assert_allclose(
        gradients["read_modes"][0, :, 0],
        [[0.0, link * 0.5, 0.0], [0.0, 0.0, link * 0.5]],
    )
    np.testing.assert_allclose(
        gradients["word"][0], [np.zeros(5), link * 0.5 * WORDS[B]]
    )


def test_a_mode_of_zero_has_a_gradient():
    """The second step reads A by content. A link leads to B."""
    interfaces = interfaces_of(write(A), {**write(B), **find(A)})
    state = reference_sdnc.initial_state(1, 3, 5, 1)
    upstream = np.zeros((1, 2, 1, 5))
    upstream[0, 1, 0] = 2.0 * WORDS[A] + 3.0 * WORDS[B]
    gradients = loss_gradients(
        interfaces, state, upstream, top_k=2, sparse_links=3
    )
    np.testing.assert_allclose(
        gradients["read_modes"][0, 1, 0], [0.0, 2.0, 3.0]
    )


def test_gradients_equal_finite_differences():
    """Without interpolation, links depend on no value that is moved here."""
    batch, steps, slots = 2, 4, 5
    interfaces = random_interfaces(batch=batch, steps=steps)
    interfaces["interpolation_gate"][:] = 0.0
    rng = np.random.default_rng(7)
    state = reference_sdnc.initial_state(batch, slots, 5, 2)
    state["memory"] = rng.normal(size=state["memory"].shape)
    state["written"][:] = True
    state["last_access"] = np.arange(batch * slots).reshape(batch, slots)
    state["time"][:] = batch * slots
    state["precedence"] = rng.dirichlet(np.ones(slots), size=batch)
    links = rng.dirichlet(np.ones(slots), size=(batch, slots))
    links *= 1.0 - np.eye(slots)
    state["forward_links"] = links
    state["backward_links"] = links.swapaxes(1, 2)
    state["read_weighting"] = rng.dirichlet(np.ones(slots), size=(batch, 2))
    options = {"top_k": 3, "sparse_links": 2}
    upstream = rng.normal(size=(batch, steps, 2, 5))
    gradients = loss_gradients(interfaces, state, upstream, **options)
    choices, _ = run(interfaces, state, **options)
    moved_names = "query", "strength", "word", "read_modes"
    for name in (*moved_names, "memory", "read_weighting"):
        values = interfaces if name in moved_names else state
        direction = rng.normal(size=values[name].shape)
        losses = []
        for h in (1e-6, -1e-6):
            moved = {**values, name: values[name] + h * direction}
            arguments = (
                (moved, state) if name in moved_names else (interfaces, moved)
            )
            trace, _ = run(*arguments, choices=choices, **options)
            losses.append(np.sum(trace["reads"] * upstream))
        slope = (losses[0] - losses[1]) / 2e-6
        expected = np.sum(gradients[name] * direction)
        assert abs(expected) > 0.01
        np.testing.assert_allclose(slope, expected, rtol=1e-6)
