import dataclasses

import harness
import keras
import numpy as np
import pytest

from keras_memory import losses as on_tensors
from keras_memory import tasks

losses = harness.on_arrays(on_tensors)


def sample(length=None, longest=None, seed=3, **arguments):
    task = tasks.Copy(**{"bits": 3, "max_length": 7, **arguments})
    rng = np.random.default_rng(seed)
    return task.sample(rng, 5, longest=longest, length=length)


def test_copy_has_the_sequence_the_marker_and_the_answer():
    inputs, targets, mask = sample(length=4)
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
    seen = {}
    for seed in range(200):
        inputs, targets, mask = sample(seed=seed, max_length=10, buckets=3)
        length = int(mask[0].sum())
        seen[length] = (inputs.shape[1] - 1) // 2
        assert inputs[:, length, 3].all()
        np.testing.assert_array_equal(
            targets[:, length + 1 : 2 * length + 1], inputs[:, :length, :3]
        )
        assert not inputs[:, length + 1 :].any()
    assert set(seen) == set(range(1, 11))
    assert {seen[n] for n in seen} == {4, 7, 10}
    assert all(
        padded == min(b for b in (4, 7, 10) if b >= length)
        for length, padded in seen.items()
    )


def test_copy_draws_up_to_the_curriculum():
    lengths = {
        int(sample(seed=seed, longest=3).mask[0].sum()) for seed in range(100)
    }
    assert lengths == {1, 2, 3}


def test_a_seed_and_a_step_determine_a_batch():
    def first(seed, step):
        data = tasks.dataset(tasks.Copy(), 2, seed=seed, first_step=step)
        return [part.numpy() for part in next(iter(data))]

    same = [np.array_equal(*pair) for pair in zip(first(1, 5), first(1, 5))]
    assert all(same)
    assert not np.array_equal(first(1, 5)[1], first(2, 5)[1])
    data = iter(tasks.dataset(tasks.Copy(), 2, seed=1))
    later = [next(data) for _ in range(6)][5]
    for part, other in zip(later, first(1, 5)):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 0}, {"buckets": 0}, {"min_length": 2.0}, {"min_length": 8}],
)
def test_impossible_tasks_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        sample(**arguments)


def test_a_task_is_its_ranges():
    task = tasks.Copy(bits=5)
    assert dataclasses.asdict(task)["bits"] == task.output_size == 5
    assert task.input_size == 6


TARGETS = np.array([[[1, 0], [1, 1], [0, 0]], [[0, 1], [1, 0], [1, 1]]], "f4")
MASK = np.array([[0, 1, 1], [0, 1, 0]], "f4")


def test_bits_per_sequence_of_a_coin_is_the_number_of_bits():
    coin = np.full_like(TARGETS, 0.5)
    harness.close(losses.bits_per_sequence(TARGETS, coin, MASK), [4.0, 2.0])


def test_bits_per_sequence_by_hand():
    outputs = np.where(TARGETS > 0, 0.25, 0.125).astype("f4")
    # -log2(1/4) = 2 for a one, -log2(7/8) for a zero
    zero = -np.log2(0.875)
    expected = [4 + 2 * zero, 2 + zero]
    harness.close(losses.bits_per_sequence(TARGETS, outputs, MASK), expected)


def test_wrong_bits_are_counted_where_the_mask_says():
    outputs = TARGETS.copy()
    outputs[0, 0] = 1 - outputs[0, 0]  # does not count
    outputs[0, 2, 1] = 0.6
    outputs[1, 1] = 1 - outputs[1, 1]
    wrong = losses.wrong_bits_per_sequence(TARGETS, outputs, MASK)
    harness.close(wrong, [1.0, 2.0], tolerance=0)


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (losses.BitsPerSequence(), losses.bits_per_sequence),
        (losses.WrongBitsPerSequence(), losses.wrong_bits_per_sequence),
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


def test_the_loss_is_the_mean_over_the_bits_that_count():
    """What `losses.py` says of Keras's own loss."""
    outputs = np.random.default_rng(3).uniform(size=TARGETS.shape).astype("f4")
    loss = keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight")
    bits = losses.bits_per_sequence(TARGETS, outputs, MASK)
    expected = np.log(2) * float(keras.ops.sum(bits)) / (2 * MASK.sum())
    harness.close(loss(TARGETS, outputs, sample_weight=MASK), expected)
