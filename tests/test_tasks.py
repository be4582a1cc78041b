"""Tests of tasks and losses. Plain loops compute the targets from the
inputs."""

import collections
import dataclasses
import functools
import math
import statistics
from time import sleep

import harness
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_memory.training import losses as on_tensors
from keras_memory.training import tasks

losses = harness.on_arrays(on_tensors)

SMALL = {
    "copy": tasks.Copy(2, 7, buckets=3, bits=5),
    "repeat-copy": tasks.RepeatCopy(
        2, 5, buckets=3, bits=7, min_repeats=2, max_repeats=5
    ),
    "associative-recall": tasks.AssociativeRecall(
        2, 7, buckets=5, bits=11, vectors=3
    ),
    "chain": tasks.Chain(3, 11, buckets=3, bits=5, queries=2),
    "n-grams": tasks.NGrams(5, 13, buckets=3, context=3),
    "priority-sort": tasks.PrioritySort(
        3, 11, buckets=3, bits=5, sorted_vectors=7
    ),
    "adding": tasks.Adding(2, 11, buckets=3, digits=7),
    "argmax": tasks.Argmax(3, 11, buckets=2, digits=5),
}
each_task = pytest.mark.parametrize("task", SMALL.values(), ids=SMALL)
ROWS = 3
DRAWS = 300


def draw(task, seed=3, rows=ROWS, **arguments):
    return task.sample(np.random.default_rng(seed), rows, **arguments)


@functools.cache
def draws(task, longest=None):
    return [draw(task, seed, longest=longest) for seed in range(DRAWS)]


def without_padding(batch):
    end = int(np.flatnonzero(batch.mask[0])[-1]) + 1
    return tasks.Batch(*(part[:, :end] for part in batch))


def marked(row, channel):
    """The steps with a mark in this channel and no other input."""
    steps = [time for time, step in enumerate(row) if step[channel]]
    for time in steps:
        assert row[time] == one_hot(channel, len(row[time]))
    return steps


def one_hot(place, size):
    return [float(n == place) for n in range(size)]


def blank(rows):
    return not any(any(row) for row in rows)


# Each function returns, for a row of inputs, its length and a dict of the
# expected targets at unmasked steps (None: the inputs do not determine them).


def answer_of_copy(task, row):
    [end] = marked(row, task.bits)
    assert blank(row[end + 1 :])
    sequence = [step[: task.bits] for step in row[:end]]
    return end, dict(enumerate(sequence, end + 1))


def repeats_of(task, row):
    [end] = marked(row, task.bits)
    choices = range(task.min_repeats, task.max_repeats + 1)
    scale = statistics.pstdev(choices) or 1.0
    repeats = row[end + 1][-1] * scale + statistics.mean(choices)
    assert abs(repeats - round(repeats)) < 1e-5
    return round(repeats)


def answer_of_repeat_copy(task, row):
    [end] = marked(row, task.bits)
    assert blank([row[end + 1][:-1]] + row[end + 2 :])
    assert not any(step[-1] for step in row[: end + 1])
    copies = [
        step[: task.bits] + [0.0]
        for _ in range(repeats_of(task, row))
        for step in row[:end]
    ]
    copies.append(one_hot(task.bits, task.bits + 1))
    return end, dict(enumerate(copies, end + 2))


def items_and_place(task, row):
    """All items, the place of the requested one, and the last delimiter."""
    delimiters = marked(row, task.bits)
    start, end = marked(row, task.bits + 1)
    size = task.vectors + 1
    assert delimiters == list(range(0, start, size)) and end - start == size
    *items, query = (
        [step[: task.bits] for step in row[time + 1 : time + size]]
        for time in [*delimiters, start]
    )
    assert blank(row[end + 1 :])
    [place] = [n for n, item in enumerate(items) if item == query]
    return items, place, end


def answer_of_associative_recall(task, row):
    items, place, end = items_and_place(task, row)
    return len(items), dict(enumerate(items[place + 1], end + 1))


def queries_of(task, row):
    """All items, and for each query its step, the place of the queried item
    and the step from there to the answer."""
    start = next(t for t, step in enumerate(row) if any(step[task.bits :]))
    items = [step[: task.bits] for step in row[:start]]
    assert len({tuple(item) for item in items}) == start
    queries = []
    for time in range(start, start + 2 * task.queries, 2):
        *item, before, after = row[time]
        assert {before, after} == {0.0, 1.0}
        queries.append((time, items.index(item), -1 if before else 1))
        assert blank([row[time + 1]])
    return items, queries


def answer_of_chain(task, row):
    items, queries = queries_of(task, row)
    assert all(0 <= place + step for _, place, step in queries)
    answers = {time + 1: items[place + step] for time, place, step in queries}
    return len(items), answers


def answer_of_n_grams(task, row):
    bits = dict(enumerate(row[1:]))
    steps = range(task.context - 1, len(row))
    return len(row) + 1, {time: bits.get(time) for time in steps}


def answer_of_priority_sort(task, row):
    [end] = marked(row, task.bits + 1)
    assert blank(row[end + 1 :])
    vectors = [(step[task.bits], step[: task.bits]) for step in row[:end]]
    highest = []
    while len(highest) * task.max_length < end * task.sorted_vectors:
        highest.append(max(vectors))
        vectors.remove(highest[-1])
    return end, dict(enumerate((v for _, v in highest), end + 1))


def digits_of(task, row):
    [end] = marked(row, task.digits)
    assert blank(row[end + 1 :])
    digits = [step.index(1.0) for step in row[:end]]
    assert row[:end] == [one_hot(n, task.digits + 1) for n in digits]
    return digits


def answer_of_adding(task, row):
    length = len(digits_of(task, row))
    return length, dict.fromkeys(range(length + 1))


def answer_of_argmax(task, row):
    digits = digits_of(task, row)
    best = 0
    for place, digit in enumerate(digits):
        if digit > digits[best]:
            best = place
    return len(digits), {len(digits): one_hot(best, task.max_length)}


def answer_of(task, row):
    name = task.name.replace("-", "_")
    return globals()[f"answer_of_{name}"](task, row.tolist())


def length_of(task, batch):
    lengths = {answer_of(task, row)[0] for row in without_padding(batch).inputs}
    [length] = lengths
    return length


def check_answers(task, batch):
    for row, targets, mask in zip(*without_padding(batch)):
        _, answer = answer_of(task, row)
        assert len(row) == max(answer) + 1
        for time, counts in enumerate(mask):
            assert counts == float(time in answer)
            if answer.get(time) is not None:
                assert targets[time].tolist() == answer[time]
    if task.name != "n-grams":  # it predicts from the first step on
        assert not batch.targets[batch.mask == 0].any()


def test_every_task_is_in_the_table():
    assert {name: type(task) for name, task in SMALL.items()} == tasks.TASKS
    assert all(name == task.name for name, task in SMALL.items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    {
        "copy": (41, 9, 8),
        "repeat-copy": (10 + 2 + 10 * 10 + 1, 10, 9),
        "associative-recall": (6 * (1 + 3) + 5 + 3, 8, 6),
        "chain": (16 + 2 * 4, 10, 8),
        "n-grams": (199, 1, 1),
        "priority-sort": (20 + 1 + 16, 10, 8),
        "adding": (101, 6, 1),
        "argmax": (11, 6, 10),
    }.items(),
)
def test_tasks_have_the_sizes_of_their_source_by_default(name, sizes):
    task = tasks.TASKS[name]()
    assert (task.time_steps, task.input_size, task.output_size) == sizes


@each_task
def test_targets_follow_from_the_inputs(task):
    for batch in draws(task)[::3]:
        check_answers(task, batch)


@each_task
def test_batches_have_the_declared_widths_in_float32(task):
    for batch in draws(task):
        inputs, targets, mask = batch
        steps = ROWS, mask.shape[1]
        assert inputs.shape == (*steps, task.input_size)
        assert targets.shape == (*steps, task.output_size)
        assert mask.shape == steps
        for part in batch:
            assert part.dtype == np.float32
            assert np.isfinite(part).all()
        if task.kind == "bits":
            assert set(np.unique(targets)) <= {0, 1}
        elif task.kind == "class":
            assert (targets[mask == 1].sum(axis=-1) == 1).all()
        else:
            assert task.kind == "sum"


@each_task
def test_batches_are_padded_to_the_next_bucket_with_zeros(task):
    shares = range(1, task.buckets + 1)
    ends = [math.ceil(n * task.time_steps / task.buckets) for n in shares]
    seen = set()
    for batch in draws(task):
        real = without_padding(batch).mask.shape[1]
        seen.add(batch.mask.shape[1])
        assert batch.mask.shape[1] == min(end for end in ends if end >= real)
        assert not any(part[:, real:].any() for part in batch)
    assert seen <= set(ends) and len(seen) > 1
    assert max(seen) == ends[-1] == task.time_steps
    whole = dataclasses.replace(task, buckets=1)
    assert {draw(whole, n).mask.shape[1] for n in range(9)} == {max(ends)}


@each_task
def test_without_buckets_time_is_padded_to_powers_of_two(task):
    free = dataclasses.replace(task, buckets=0)
    seen = set()
    for batch in draws(free)[:50]:
        real, time = without_padding(batch).mask.shape[1], batch.mask.shape[1]
        assert time in (2, 4, 8, 16, 32, 64) and time / 2 < real <= time
        assert not any(part[:, real:].any() for part in batch)
        seen.add(time)
    assert len(seen) > 1


@each_task
def test_lengths_are_drawn_evenly_from_the_range(task):
    counts = collections.Counter(length_of(task, b) for b in draws(task))
    assert set(counts) == set(range(task.min_length, task.max_length + 1))
    assert min(counts.values()) > DRAWS / len(counts) / 2
    fixed = dataclasses.replace(task, min_length=task.max_length)
    assert length_of(fixed, draw(fixed)) == task.max_length


@each_task
def test_a_curriculum_bounds_the_lengths(task):
    longest = task.min_length + 1
    batches = draws(task, longest)[:50]
    lengths = {length_of(task, batch) for batch in batches}
    assert lengths == {task.min_length, longest}
    if task.name == "repeat-copy":
        assert repeats_in(task, batches) == {2, 3}
        # The curriculum never goes below the task's minimum.
        often = dataclasses.replace(task, min_repeats=5, max_repeats=7)
        assert repeats_in(often, draws(often, longest)[:50]) == {5}


def repeats_in(task, batches):
    return {repeats_of(task, b.inputs[0].tolist()) for b in batches}


@each_task
def test_a_length_can_be_given_and_is_not_padded(task):
    for length in (task.min_length, task.max_length + 3):
        if task.name == "argmax" and length > task.max_length:
            with pytest.raises(ValueError, match="Received"):
                draw(task, length=length)
            continue
        for seed in range(9):
            batch = draw(task, seed, length=length)
            assert batch.mask.shape[1] == without_padding(batch).mask.shape[1]
            assert length_of(task, batch) == length
            check_answers(task, batch)
    more = {"repeats": 5} if task.name == "repeat-copy" else {}
    longest = draw(task, length=task.max_length, **more)
    assert longest.mask.shape[1] == task.time_steps


@each_task
def test_a_seed_determines_a_batch(task):
    first, same, other = (draw(task, n, length=11) for n in (1, 1, 2))
    for part, equal in zip(first, same):
        np.testing.assert_array_equal(part, equal)
    assert first.inputs[0].tolist() != first.inputs[1].tolist()
    assert first.inputs.tolist() != other.inputs.tolist()


@each_task
def test_tasks_with_equal_ranges_are_equal(task):
    copy = type(task)(**dataclasses.asdict(task))
    assert copy == task == dataclasses.replace(task)
    assert hash(copy) == hash(task)
    longer = dataclasses.replace(task, max_length=17, min_length=17)
    assert longer != task
    assert length_of(longer, draw(longer)) == 17


@each_task
def test_impossible_tasks_are_refused(task):
    names = [field.name for field in dataclasses.fields(task)]
    assert {"min_length", "max_length", "buckets"} < set(names)
    wrong = [{name: v} for name in names for v in (-1, 2.0, True, "2", None)]
    wrong += [{name: 0} for name in names if name != "buckets"]
    wrong.append({"min_length": task.max_length + 1})
    wrong += {
        "repeat-copy": [{"min_repeats": 6}],
        "associative-recall": [{"min_length": 1}],
        "chain": [{"min_length": 1}, {"bits": 3}, {"max_length": 33}],
        "n-grams": [{"min_length": 3}, {"context": 5}],
        "priority-sort": [{"sorted_vectors": 12}],
    }.get(task.name, [])
    for change in wrong:
        with pytest.raises(ValueError, match="Received"):
            dataclasses.replace(task, **change)
            pytest.fail(f"{change} was taken")


@each_task
def test_lengths_that_the_task_cannot_have_are_refused(task):
    wrong = [{"length": value} for value in (0, -1, 2.0, True)]
    wrong += {
        "repeat-copy": [{"length": 3, "repeats": n} for n in (0, 2.0, True)],
        "associative-recall": [{"length": 1}],
        "chain": [{"length": 1}, {"length": 33}],
        "n-grams": [{"length": 1}, {"length": 3}],
    }.get(task.name, [])
    for change in wrong:
        with pytest.raises(ValueError, match="Received"):
            draw(task, **change)
            pytest.fail(f"{change} was taken")


@each_task
def test_a_curriculum_below_the_shortest_length_is_refused(task):
    for longest in (0, 2.0, True, task.min_length - 1):
        with pytest.raises(ValueError, match="Received"):
            draw(task, longest=longest)
            pytest.fail(f"{longest} was taken")


def test_copy_has_the_sequence_the_marker_and_the_answer():
    task = tasks.Copy(bits=3, max_length=7)
    inputs, targets, mask = draw(task, rows=5, length=4)
    assert inputs.shape == (5, 9, 4)
    assert targets.shape == (5, 9, 3)
    np.testing.assert_array_equal(targets[:, 5:], inputs[:, :4, :3])
    assert set(np.unique(inputs[:, :4, :3])) == {0, 1}
    np.testing.assert_array_equal(inputs[:, 4], [[0, 0, 0, 1]] * 5)
    assert not inputs[:, 5:].any()
    assert not inputs[:, :4, 3].any()
    assert not targets[:, :5].any()
    np.testing.assert_array_equal(mask, [[0] * 5 + [1] * 4] * 5)


def test_copy_pads_to_its_buckets():
    task = tasks.Copy(bits=3, max_length=10, buckets=3)
    padded = {}
    for seed in range(100):
        inputs, targets, mask = draw(task, seed)
        length = int(mask[0].sum())
        padded[length] = inputs.shape[1]
        assert inputs[:, length, 3].all()
        assert not inputs[:, length + 1 :].any()
    # T of the lengths: 3, 5, 7 | 9, 11, 13 | 15, 17, 19, 21
    ends = [7] * 3 + [14] * 3 + [21] * 4
    assert padded == dict(zip(range(1, 11), ends))


@pytest.mark.parametrize(
    "name", ["copy", "repeat-copy", "associative-recall", "priority-sort"]
)
def test_answer_bits_are_fair_and_independent(name):
    task = SMALL[name]
    rng = np.random.default_rng(3)
    _, targets, mask = task.sample(rng, 2000, length=5)
    bits = targets[:, np.flatnonzero(mask[0]), : task.bits]
    bits = bits[:, :-1] if name == "repeat-copy" else bits
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.06  # 5 deviations
    flat = bits.reshape(len(bits), -1)
    flat = flat[:, : 5 * task.bits]  # contains no copies of bits
    apart = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(apart).max() < 0.12


def test_repeat_copy_ends_with_a_marker():
    task = SMALL["repeat-copy"]
    for repeats in (1, 2, 5, 8):  # 1 and 8 are out of the task's range
        inputs, targets, mask = draw(task, length=3, repeats=repeats)
        end = 3 + 2 + 3 * repeats
        assert mask.shape[1] == end + 1
        assert mask[:, 5:].all() and not mask[:, :5].any()
        assert targets[:, end, 7].all() and not targets[:, :end, 7].any()
        assert not targets[:, end, :7].any()
        for copy in np.split(targets[:, 5:end, :7], repeats, axis=1):
            np.testing.assert_array_equal(copy, inputs[:, :3, :7])


@pytest.mark.parametrize(("least", "most"), [(1, 10), (3, 7), (2, 3), (4, 4)])
def test_the_number_of_repeats_has_mean_0_and_variance_1(least, most):
    task = tasks.RepeatCopy(min_repeats=least, max_repeats=most)
    scalars = [
        draw(task, length=2, repeats=repeats).inputs[0, 3, -1]
        for repeats in range(least, most + 1)
    ]
    assert np.isfinite(scalars).all()
    assert abs(np.mean(scalars)) < 1e-6
    assert abs(np.var(scalars) - (least < most)) < 1e-6
    assert (np.diff(scalars) > 0).all()
    beyond = draw(task, length=2, repeats=most + 3).inputs[0, 3, -1]
    assert np.isfinite(beyond) and beyond > scalars[-1]


def test_every_number_of_repeats_is_drawn_with_every_length():
    task = SMALL["repeat-copy"]
    pairs = {
        (length_of(task, batch), *repeats_in(task, [batch]))
        for batch in draws(task)
    }
    assert pairs == {(n, m) for n in (2, 3, 4, 5) for m in (2, 3, 4, 5)}


@pytest.mark.parametrize("length", [2, 3, 7])
def test_every_item_but_the_last_is_asked_for(length):
    task = SMALL["associative-recall"]
    batch = draw(task, rows=200, length=length)
    places = collections.Counter(
        items_and_place(task, row.tolist())[1] for row in batch.inputs
    )
    assert set(places) == set(range(length - 1))
    assert min(places.values()) > 200 / (length - 1) / 2


@pytest.mark.parametrize("length", [2, 3, 7])
def test_every_neighbor_is_asked_for(length):
    task = SMALL["chain"]
    batch = draw(task, rows=400, length=length)
    of_rows = [queries_of(task, row.tolist())[1] for row in batch.inputs]
    pairs = [(place, place + step) for row in of_rows for _, place, step in row]
    neighbors = [(n, n + 1) for n in range(length - 1)]
    neighbors += [(n + 1, n) for n in range(length - 1)]
    counts = collections.Counter(pairs)
    assert set(counts) == set(neighbors)
    assert min(counts.values()) > 800 / len(neighbors) / 2
    # The queries of a sequence do not depend on each other.
    both = {tuple(query[1:] for query in row) for row in of_rows}
    assert len(both) > 0.8 * len(neighbors) ** 2


def test_a_chain_may_have_all_items_that_there_are():
    task = tasks.Chain(max_length=8, bits=3)
    batch = draw(task, rows=200, length=8)
    check_answers(task, batch)
    numbers = batch.inputs[:, :8, :3] @ [4, 2, 1]
    np.testing.assert_array_equal(np.sort(numbers), [range(8)] * 200)
    counts = np.array([np.bincount(column) for column in numbers.T.astype(int)])
    assert counts.min() > 25 - 4 * 5  # each number at each place


def test_items_of_a_chain_may_have_more_bits_than_an_integer():
    task = tasks.Chain(bits=70)
    batch = draw(task, rows=300, length=5)
    check_answers(task, batch)
    means = batch.inputs[:, :5, :70].mean(axis=(0, 1))
    assert np.abs(means - 0.5).max() < 5 * 0.5 / math.sqrt(5 * 300)


def test_a_chain_of_too_few_bits_names_both_sizes():
    with pytest.raises(ValueError, match="max_length=17, bits=4"):
        tasks.Chain(max_length=17, bits=4)
    with pytest.raises(ValueError, match="length=17, bits=4"):
        draw(tasks.Chain(bits=4), length=17)


def contexts(task, batch):
    """(row, step, context, next bit) of every unmasked step, in order."""
    for n, (row, targets, mask) in enumerate(zip(*batch)):
        bits = [int(bit) for bit in row[:, 0]]
        for time in np.flatnonzero(mask):
            context = tuple(bits[time - task.context + 1 : time + 1])
            yield n, time, context, int(targets[time, 0])


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda: (tasks.NGrams(), draw(tasks.NGrams(), rows=5)),
        lambda: (
            tasks.NGrams(3, 29, 3, 2),
            draws(tasks.NGrams(3, 29, 3, 2))[0],
        ),
        lambda: (SMALL["n-grams"], draw(SMALL["n-grams"], length=31)),
    ],
    ids=["default", "padded", "longer"],
)
def test_the_optimal_predictor_counts_the_bits_after_each_context(batch_of):
    task, batch = batch_of()
    outputs = task.optimal_outputs(batch)
    assert outputs.shape == batch.targets.shape
    assert outputs.dtype == np.float32
    expected = np.full(outputs.shape, 0.5)
    seen = collections.Counter()
    for row, time, context, bit in contexts(task, batch):
        ones, zeros = seen[row, context, 1], seen[row, context, 0]
        expected[row, time, 0] = (ones + 0.5) / (ones + zeros + 1)
        seen[row, context, bit] += 1
    counts = batch.mask == 1
    harness.close(outputs[counts], expected[counts])
    assert (outputs[:, : task.context - 1] == 0.5).all()


def test_n_grams_targets_are_the_next_inputs():
    for batch in draws(SMALL["n-grams"]):
        inputs, targets, mask = without_padding(batch)
        np.testing.assert_array_equal(targets[:, :-1], inputs[:, 1:])
        assert set(np.unique([inputs, targets])) == {0, 1}
        expected = [[0] * 2 + [1] * (mask.shape[1] - 2)] * ROWS
        np.testing.assert_array_equal(mask, expected)


def test_n_grams_draw_a_new_table_for_each_sequence():
    task = tasks.NGrams(2001, 2001, context=2)
    seen = collections.defaultdict(list)
    for row, _, context, bit in contexts(task, draw(task, rows=7)):
        seen[row, context].append(bit)
    tables = collections.defaultdict(list)
    for (_, context), bits in seen.items():
        if len(bits) >= 200:
            half = len(bits) // 2
            first, second = np.mean(bits[:half]), np.mean(bits[half:])
            spread = math.sqrt(np.var(bits) * 4 / len(bits))
            assert abs(first - second) < 4 * spread + 1 / half
            tables[context].append(np.mean(bits))
    assert len(tables) == 4
    for frequencies in tables.values():
        assert np.ptp(frequencies) > 0.2


def test_n_grams_draw_tables_from_the_prior_of_the_optimal_predictor():
    """Among steps with prediction p, the share of ones is p."""
    task = tasks.NGrams(60, 60, context=2)
    batch = draw(task, rows=1500)
    outputs = task.optimal_outputs(batch)[batch.mask == 1, 0]
    bits = batch.targets[batch.mask == 1, 0]
    for said in (1 / 4, 1 / 2, 3 / 4, 1 / 6, 5 / 6, 1 / 8, 7 / 8, 1 / 20):
        chosen = bits[np.abs(outputs - said) < 1e-6]
        assert len(chosen) > 500
        spread = math.sqrt(said * (1 - said) / len(chosen))
        assert abs(chosen.mean() - said) < 4 * spread
    # The bits before the first whole context are fair coins.
    assert np.abs(batch.inputs[:, :2].mean(axis=0) - 0.5).max() < 0.06


def test_no_other_predictor_of_n_grams_costs_less_than_the_optimal():
    task = tasks.NGrams()
    batch = draw(task, rows=100)
    optimal = task.optimal_outputs(batch)
    coin, fixed, laplace = (np.full_like(optimal, 0.5) for _ in range(3))
    follow = collections.defaultdict(list)
    seen = collections.Counter()
    steps = list(contexts(task, batch))
    for row, time, context, bit in steps:
        follow[context].append(bit)
        ones, zeros = seen[row, context, 1], seen[row, context, 0]
        laplace[row, time] = (ones + 1) / (ones + zeros + 2)
        seen[row, context, bit] += 1
    for row, time, context, _ in steps:  # the best table in hindsight
        fixed[row, time] = np.mean(follow[context])

    def cost(outputs):
        bits = losses.bits_per_sequence(batch.targets, outputs, batch.mask)
        return keras.ops.convert_to_numpy(bits)

    harness.close(cost(coin), np.full(100, 195.0), tolerance=1e-3)
    best = cost(optimal).mean()
    assert best < cost(laplace).mean() - 1
    assert best < 0.8 * cost(fixed).mean() < 0.8 * 195


def test_priority_sort_asks_for_the_first_16_of_20():
    inputs, targets, mask = draw(tasks.PrioritySort(), rows=50)
    np.testing.assert_array_equal(mask, [[0] * 21 + [1] * 16] * 50)
    for row, sorted_vectors in zip(inputs, targets[:, 21:]):
        priorities = row[:20, 8].tolist()
        order = [priorities.index(p) for p in sorted(priorities)[::-1]]
        np.testing.assert_array_equal(sorted_vectors, row[order[:16], :8])
    priorities = inputs[:, :20, 8]
    assert np.abs(priorities).max() <= 1
    assert abs(priorities.mean()) < 0.06
    assert abs(priorities.var() - 1 / 3) < 0.03
    corners = priorities.min(), priorities.max()
    assert corners[0] < -0.95 and corners[1] > 0.95


def test_targets_of_adding_add_up_to_the_sum_of_the_digits():
    task = SMALL["adding"]
    seen = collections.Counter()
    for batch in draws(task):
        for row, targets in zip(batch.inputs, batch.targets):
            digits = digits_of(task, row.tolist())
            assert targets.sum() == sum(digits)
            seen.update(digits)
    assert set(seen) == set(range(7))
    assert min(seen.values()) > 0.8 * max(seen.values())
    nothing = draw(tasks.Adding(digits=1), length=3)
    assert not nothing.targets.any()


def test_argmax_names_the_first_of_equal_digits():
    task = SMALL["argmax"]
    batch = draw(task, rows=300, length=7)
    ties, places = 0, set()
    for row, targets in zip(batch.inputs, batch.targets):
        digits = digits_of(task, row.tolist())
        place = digits.index(max(digits))
        ties += digits.count(max(digits)) > 1
        places.add(place)
        assert targets[7].tolist() == one_hot(place, 11)
    assert ties > 50 and places == set(range(7))
    same = draw(tasks.Argmax(digits=1), length=4)
    assert same.targets[:, 4, 0].all()


@pytest.mark.parametrize("name", ["copy", "repeat-copy", "n-grams", "adding"])
def test_a_seed_and_a_step_determine_a_batch(name):
    task = SMALL[name]

    def data(seed, step=0):
        return iter(tasks.dataset(task, 2, seed=seed, first_step=step))

    def first(seed, step):
        return [part.numpy() for part in next(data(seed, step))]

    for part, same in zip(first(1, 5), first(1, 5)):
        np.testing.assert_array_equal(part, same)
    assert not np.array_equal(first(1, 5)[1], first(2, 5)[1])
    batches = data(1)
    later = [next(batches) for _ in range(9)]
    for part, other in zip(later[5], first(1, 5)):
        np.testing.assert_array_equal(part, other)
    assert len({inputs.shape[1] for inputs, _, _ in later}) > 1
    for batch in later:
        check_answers(task, tasks.Batch(*(part.numpy() for part in batch)))
    widths = task.input_size, task.output_size
    specs = tasks.dataset(task, 2).element_spec
    expected = [(2, None, width) for width in widths] + [(2, None)]
    assert [tuple(spec.shape) for spec in specs] == expected


TARGETS = np.array([[[1, 0], [1, 1], [0, 0]], [[0, 1], [1, 0], [1, 1]]], "f4")
MASK = np.array([[0, 1, 1], [0, 1, 0]], "f4")


def test_bits_per_sequence_of_coin_flips_is_the_number_of_bits():
    coin = np.full_like(TARGETS, 0.5)
    harness.close(losses.bits_per_sequence(TARGETS, coin, MASK), [4.0, 2.0])


def test_bits_per_sequence_matches_values_computed_by_hand():
    outputs = np.where(TARGETS > 0, 0.25, 0.125).astype("f4")
    # -log2(1/4) = 2 for a one, -log2(7/8) for a zero
    zero = -np.log2(0.875)
    expected = [4 + 2 * zero, 2 + zero]
    harness.close(losses.bits_per_sequence(TARGETS, outputs, MASK), expected)


def test_wrong_bits_are_counted_only_under_the_mask():
    outputs = TARGETS.copy()
    outputs[0, 0] = 1 - outputs[0, 0]  # masked
    outputs[0, 2, 1] = 0.6
    outputs[1, 1] = 1 - outputs[1, 1]
    wrong = losses.wrong_bits_per_sequence(TARGETS, outputs, MASK)
    harness.close(wrong, [1.0, 2.0], tolerance=0)


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (losses.BitsPerSequence(), losses.bits_per_sequence),
        (losses.WrongBitsPerSequence(), losses.wrong_bits_per_sequence),
        (losses.ErrorRate(), losses.error_rate),
        (losses.AbsoluteErrorOfSum(), losses.absolute_error_of_sum),
    ],
)
def test_metrics_are_means_over_sequences(metric, function):
    outputs = np.random.default_rng(3).uniform(size=TARGETS.shape)
    metric.reset_state()
    metric.update_state(TARGETS, outputs, MASK)
    metric.update_state(TARGETS[:1], outputs[:1], MASK[:1])
    each = keras.ops.convert_to_numpy(
        function(TARGETS, outputs.astype("f4"), MASK)
    )
    harness.close(metric.result(), (each.sum() + each[0]) / 3)
    config = keras.metrics.serialize(metric)
    assert type(keras.metrics.deserialize(config)) is type(metric)


def test_the_loss_is_the_mean_over_unmasked_bits():
    """Checks the statement in `losses.py` about Keras's own loss."""
    outputs = np.random.default_rng(3).uniform(size=TARGETS.shape).astype("f4")
    loss = keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight")
    bits = losses.bits_per_sequence(TARGETS, outputs, MASK)
    expected = np.log(2) * float(keras.ops.sum(bits)) / (2 * MASK.sum())
    harness.close(loss(TARGETS, outputs, sample_weight=MASK), expected)


@pytest.mark.parametrize("longest, most", [(None, 7), (2, 2), (3, 7)])
def test_a_finished_curriculum_draws_every_number_of_repeats(longest, most):
    task = tasks.RepeatCopy(max_length=3, max_repeats=7, buckets=1)
    rng = np.random.default_rng(3)
    seen = {
        int(batch.mask[0].sum()) - 1  # length * repeats, and an end marker
        for batch in (task.sample(rng, 1, longest=longest) for _ in range(200))
    }
    assert max(seen) == (longest or 3) * most


def test_the_pipeline_draws_no_batch_ahead():
    """Otherwise a curriculum would change the task too late."""
    drawn = []

    class Task(tasks.Copy):
        def sample(self, rng, batch_size):
            drawn.append(batch_size)
            return super().sample(rng, batch_size)

    data = iter(tasks.dataset(Task(max_length=3), 2))
    for count in range(1, 5):
        next(data)
        sleep(0.05)
        assert len(drawn) == count


def test_error_rate_matches_values_computed_by_hand():
    outputs = np.array(
        [[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], [[1, 0], [0.3, 0.7], [0, 1]]],
        "f4",
    )
    targets = np.array(
        [[[0, 1], [0, 1], [1, 0]], [[0, 1], [0, 1], [1, 0]]], "f4"
    )
    harness.close(losses.error_rate(targets, outputs, MASK), [0.5, 0.0])


def test_errors_of_sums_match_values_computed_by_hand():
    outputs = TARGETS + np.array([9.0, 0.5, -2.0], "f4")[:, None]
    errors = losses.absolute_error_of_sum(TARGETS, outputs, MASK)
    harness.close(errors, [3.0, 1.0])
    loss = losses.SquaredErrorOfSum()
    harness.close(loss(TARGETS, outputs, sample_weight=MASK), 5.0)
    harness.close(loss(TARGETS, outputs), (15.0**2 + 15.0**2) / 2)
    config = keras.losses.serialize(loss)
    assert type(keras.losses.deserialize(config)) is type(loss)


@pytest.mark.parametrize("kind", losses.KINDS)
def test_nan_outputs_give_nan_metrics(kind):
    targets = np.zeros((1, 2, 3), "f4")
    outputs = targets.copy()
    outputs[0, 1, 2] = np.nan
    for metric in losses.KINDS[kind].make_metrics():
        metric.update_state(targets, outputs)
        assert np.isnan(float(metric.result()))


def losses_and_metrics(kind):
    kind = losses.KINDS[kind]
    return [kind.loss(), *kind.make_metrics()]


def value_of(one, *batch):
    """The value of a loss, or of a metric after this batch only."""
    return float(keras.ops.convert_to_numpy(one(*batch)))


@pytest.mark.parametrize("weight", [None, np.nan, np.inf, -1e30])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_masked_steps_do_not_change_losses_and_metrics(kind, weight):
    """One sequence has only masked steps."""
    rng = np.random.default_rng(3)
    targets = np.eye(3, dtype="f4")[rng.integers(3, size=(3, 5))]
    outputs = rng.uniform(0.1, 1, targets.shape).astype("f4")
    mask = np.array([[0, 1, 1, 0, 0], [0] * 5, [1] * 5], "f4")
    alone = outputs.copy()
    if weight is not None:
        outputs[mask == 0] = targets[mask == 0] = weight
    some = [0, 2]
    for one, other in zip(losses_and_metrics(kind), losses_and_metrics(kind)):
        expected = value_of(other, targets[some], alone[some], mask[some])
        assert np.isfinite(expected) and expected != 0
        for counts in (mask, mask.astype("int32"), mask.astype("bool")):
            if isinstance(one, keras.metrics.Metric):
                one.reset_state()
            found = value_of(one, targets, outputs, counts)
            harness.close(found, expected, 1e-6)
            # A fully masked batch has no effect either.
            nothing = value_of(one, targets, outputs, 0 * mask)
            is_metric = isinstance(one, keras.metrics.Metric)
            harness.close(nothing, expected if is_metric else 0.0, 1e-6)
        outputs[0, 1, 1], before = np.nan, outputs[0, 1, 1]  # unmasked
        assert np.isnan(value_of(one, targets, outputs, mask))
        outputs[0, 1, 1] = before


@pytest.mark.parametrize("kind", losses.KINDS)
def test_gradients_of_masked_steps_are_zero(kind):
    targets = np.eye(3, dtype="f4")[[[0, 2, 1, 1], [1, 2, 0, 0]]]
    outputs = np.full_like(targets, 0.3)
    mask = np.array([[0, 1, 1, 0], [0, 0, 0, 0]], "f4")
    targets[mask == 0] = outputs[mask == 0] = np.nan
    loss = losses.KINDS[kind].loss()
    outputs = tf.constant(outputs)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        value = loss(targets, outputs, mask)
    slope = tape.gradient(value, outputs).numpy()
    assert (slope[mask == 0] == 0).all()
    assert np.isfinite(slope).all() and slope[mask == 1].any()


@pytest.mark.parametrize("kind", losses.KINDS)
def test_a_mask_on_the_outputs_excludes_steps(kind):
    targets = np.eye(3, dtype="f4")[[[0, 2, 1, 1], [1, 2, 0, 0]]]
    mask = np.array([[0, 1, 1, 0], [1, 1, 0, 1]], "bool")
    layers = [keras.layers.Masking(), keras.layers.ReLU()]
    inputs = np.where(mask[..., None], 0.2 + 0.1 * targets, 0).astype("f4")
    for one, other in zip(losses_and_metrics(kind), losses_and_metrics(kind)):
        outputs = layers[1](layers[0](inputs))
        outputs._keras_mask = layers[0].compute_mask(inputs)
        expected = value_of(other, targets, inputs, mask)
        harness.close(value_of(one, targets, outputs), expected, 1e-6)
        some = np.ones(mask.shape, "f4")
        harness.close(value_of(one, targets, outputs, some), expected, 1e-6)


def test_losses_and_metrics_keep_float64():
    rng = np.random.default_rng(3)
    outputs = rng.uniform(size=TARGETS.shape)
    for function in (losses.bits_per_sequence, losses.absolute_error_of_sum):
        found = function(TARGETS, outputs, MASK)
        assert keras.ops.dtype(found) == "float64"
    metric = losses.AbsoluteErrorOfSum(dtype="float64")
    metric.update_state(TARGETS, outputs, MASK)
    each = np.abs(((outputs - TARGETS) * MASK[..., None]).sum(axis=(1, 2)))
    harness.close(np.asarray(metric.result()), each.mean(), 1e-12)


@pytest.mark.parametrize(
    "name", [*(kind for kind in losses.KINDS), "functions"]
)
def test_arrays_other_than_sequences_are_refused(name):
    if name == "functions":
        calls = [
            losses.bits_per_sequence,
            losses.wrong_bits_per_sequence,
            losses.error_rate,
            losses.absolute_error_of_sum,
        ]
        names = "targets", "outputs", "mask"
    else:
        calls, names = losses_and_metrics(name), ("y_true", "y_pred")
        names += ("sample_weight",)
    good = [TARGETS, TARGETS, MASK]
    wrong = ["text", TARGETS[:1], TARGETS[0], TARGETS.astype("complex64")]
    for call in calls:
        for index, argument in enumerate(names):
            bad = list(wrong)
            if index < 2:
                bad += [TARGETS > 0]
            if index < 2 or name == "functions":
                bad += [None]
            for one in bad:
                arguments = [*good]
                arguments[index] = one
                told = "|".join(f"`{n}`" for n in names)
                with pytest.raises(ValueError, match=told) as error:
                    call(*arguments)
                assert "Received: " in str(error.value)
                if not hasattr(one, "shape") or one.shape != (1, 3, 2):
                    assert f"`{argument}`" in str(error.value)


def test_weights_of_whole_sequences_are_refused():
    for metric in (losses.WrongBitsPerSequence(), losses.SquaredErrorOfSum()):
        with pytest.raises(ValueError, match=r"`sample_weight`.*shape \(2,\)"):
            metric(TARGETS, TARGETS, sample_weight=np.ones(2, "f4"))


@pytest.mark.parametrize("kind", losses.KINDS)
def test_the_first_metric_of_a_kind_counts_its_errors(kind):
    kind = losses.KINDS[kind]
    assert kind.make_metrics()[0].name == kind.error
    perfect = np.eye(3, dtype="f4")[[[0, 2, 1]]]
    for metric in kind.make_metrics():
        metric.update_state(perfect, perfect)
        assert abs(float(metric.result())) < 1e-3
