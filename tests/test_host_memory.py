"""The slots on the host, compared with a plain model of them."""

import functools
import os
import threading

import numpy as np
import pytest
from keras import ops
from knn import clustered
from knn import need_scann
from knn import random

from keras_memory.addressing import sparse
from keras_memory.recurrent.sparse_layer import Transaction
from keras_memory.retrieval import host_memory
from keras_memory.retrieval import tuning
from keras_memory.retrieval.host_memory import BLOCK
from keras_memory.retrieval.host_memory import UNWRITTEN
from keras_memory.retrieval.host_memory import HostMemory
from keras_memory.retrieval.similarities import unit
from keras_memory.retrieval.tuning import closeness
from keras_memory.retrieval.tuning import recall

pytestmark = pytest.mark.scann

BATCH, WIDTH = 2, 5


@pytest.fixture(autouse=True)
def _with_scann():
    need_scann()


def memory_of(slots, batch=BATCH, width=WIDTH, norm_epsilon=1e-8):
    memory = HostMemory(slots, width, 0.9, norm_epsilon)
    memory.allocate(batch)
    return memory


def write(memory, rng, time, places=3, updated=None):
    """What a step does: writes the oldest slot and others, and marks them."""
    batch = len(memory.memory)
    oldest = memory.least_recently_accessed()
    written = (memory.last_access > UNWRITTEN).sum(axis=1)
    others = [rng.integers(0, max(1, n), places) for n in written]
    slots = np.concatenate([np.stack(others), oldest], axis=1).astype("int32")
    rows = random(batch, *slots.shape[1:], memory.slot_size, seed=time)
    same = slots[:, :, None] == slots[:, None]
    rows = np.take_along_axis(rows, same.argmax(axis=2)[:, :, None], axis=1)
    memory.replace("memory", slots, rows, updated)
    times = np.full(slots.shape, time, "int32")
    memory.replace("last_access", slots, times, updated)
    return slots


def content(memory):
    return memory.memory.copy(), memory.last_access.copy()


def check(memory, queries, top_k):
    """A search finds the nearest slots that are written."""
    found = memory.nearest(queries, top_k)
    for row, keys in enumerate(memory.memory):
        number = int((memory.last_access[row] > UNWRITTEN).sum())
        cosines = unit(queries[row], np) @ unit(keys[:number], np).T
        expected = np.argsort(-cosines, axis=1)[:, :top_k]
        short = top_k - expected.shape[1]
        expected = np.pad(expected, ((0, 0), (0, short)), constant_values=-1)
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize("slots", [1, 7, 3 * BLOCK + 5])
def test_steps_find_the_oldest_and_the_nearest_slots(slots):
    memory, rng = memory_of(slots), np.random.default_rng(3)
    check(memory, random(BATCH, 2, WIDTH), 3)  # nothing is written
    for time in range(1, 40):
        accesses = np.maximum(memory.last_access, 0)
        oldest = memory.least_recently_accessed()
        assert oldest[:, 0].tolist() == accesses.argmin(axis=1).tolist()
        write(memory, rng, time)
        check(memory, random(BATCH, 2, WIDTH, seed=time), min(3, slots))


@pytest.mark.parametrize("norm_epsilon", [1e-8, 0.5])
def test_slots_of_small_numbers_are_as_near_as_in_an_exact_search(norm_epsilon):
    memory = memory_of(60, norm_epsilon=norm_epsilon)
    scales = 10.0 ** np.random.default_rng(3).integers(-12, 9, (BATCH, 60, 1))
    rows = (random(BATCH, 60, WIDTH) * scales).astype("float32")
    queries = random(BATCH, 4, WIDTH, seed=5)
    memory.fill(rows)
    norms = sparse.norms_of(ops.convert_to_tensor(rows), norm_epsilon)
    accesses = ops.ones((BATCH, 60), "int32")
    expected = sparse.nearest(
        ops.convert_to_tensor(rows), norms, accesses, queries, 6
    )
    found = memory.nearest(queries, 6)
    np.testing.assert_array_equal(found, ops.convert_to_numpy(expected))


def test_masked_rows_stay():
    memory, rng = memory_of(9), np.random.default_rng(3)
    for time in range(1, 5):
        write(memory, rng, time)
    before, accesses = content(memory)
    write(memory, rng, 5, updated=np.array([False, True]))
    after, accesses_after = content(memory)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(accesses_after[0], accesses[0])
    assert (after[1] != before[1]).any()
    check(memory, random(BATCH, 2, WIDTH), 4)


@pytest.mark.parametrize("begun", [0, 4, 30], ids=["empty", "part", "full"])
def test_a_rollback_restores_slots_bounds_and_indices(begun):
    memory, rng = memory_of(2 * BLOCK), np.random.default_rng(3)
    if begun == 30:
        memory.fill(random(BATCH, 2 * BLOCK, WIDTH))
    for time in range(2, 2 + begun):
        write(memory, rng, time)
    memory.forget()
    before, oldest = content(memory), memory.least_recently_accessed()
    for time in range(50, 60):
        write(memory, rng, time)
        memory.nearest(random(BATCH, 2, WIDTH), 3)
    assert (memory.memory != before[0]).any()
    memory.roll_back()
    for now, then in zip(content(memory), before):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(memory.least_recently_accessed(), oldest)
    check(memory, random(BATCH, 4, WIDTH), 3)
    write(memory, rng, 70)
    check(memory, random(BATCH, 4, WIDTH), 3)


def test_a_rollback_and_a_reset_lower_the_bounds_of_blocks(monkeypatch):
    monkeypatch.setattr(host_memory, "BLOCK", 4)
    memory, rng = memory_of(12), np.random.default_rng(3)
    for time in range(1, 20):
        write(memory, rng, time)
    memory.forget()
    for time in range(50, 90):
        write(memory, rng, time)
    memory.roll_back()
    accesses = memory.last_access.reshape(BATCH, 3, 4)
    assert (memory._bounds <= accesses.min(axis=2)).all()
    memory.clear()
    assert not memory.least_recently_accessed().any()


def test_an_interrupted_rollback_is_completed(monkeypatch):
    memory, rng = memory_of(12), np.random.default_rng(3)
    for time in range(1, 6):
        write(memory, rng, time)
    transaction, before = Transaction([memory]), content(memory)
    transaction.end()
    (state,) = transaction.begin(np.array([1.0]))
    for time in range(6, 9):
        write(memory, rng, time)

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memory, "_reindex", fail)
        with pytest.raises(KeyboardInterrupt):
            transaction.begin(np.array([2.0]))
    (state,) = transaction.begin(np.array([2.0]))
    assert state == [1.0]
    for now, then in zip(content(memory), before):
        np.testing.assert_array_equal(now, then)
    check(memory, random(BATCH, 2, WIDTH), 3)
    transaction.end()
    assert transaction.begin(np.array([3.0]))[0] == [3.0]


def test_a_call_that_is_undone_while_it_runs_gets_an_error():
    """As if three threads called a layer, the first being the slowest."""
    memory = memory_of(12)
    transaction = Transaction([memory], tokens=[1])
    token = np.zeros((BATCH, 1), "int32")
    _, first = transaction.begin(np.array([1.0]), token)
    memory.check_call(first)
    write(memory, np.random.default_rng(3), 1)
    state, second = transaction.begin(np.array([1.0]), token)
    assert state == [1.0]
    assert not memory.memory.any()
    with pytest.raises(RuntimeError, match="one call at a time"):
        memory.check_call(first)
    memory.check_call(second)
    assert (transaction.end(np.array([2.0]), second)[1] == token).all()
    # The first call has assigned its states, and now ends.
    with pytest.raises(RuntimeError, match="one call at a time"):
        transaction.end(np.array([9.0]), first)
    assert transaction.begin(np.array([9.0]), token)[0] == [2.0]
    # Another thread reads the memory.
    _, third = transaction.begin(np.array([2.0]), token)
    transaction.settle()
    with pytest.raises(RuntimeError, match="one call at a time"):
        memory.check_call(third)


ONE = np.zeros((BATCH, 1), "int32")
LOCKED = {
    "replace": ("memory", ONE, np.ones((BATCH, 1, WIDTH), "float32")),
    "least_recently_accessed": (),
    "nearest": (np.ones((BATCH, 1, WIDTH), "float32"), 1),
    "roll_back": (),
    "clear": (),
    "fill": (np.ones((BATCH, 2, WIDTH), "float32"),),
}


@pytest.mark.parametrize(("name", "arguments"), LOCKED.items(), ids=LOCKED)
def test_a_method_waits_for_the_lock(name, arguments):
    """The thread that builds trees holds it to swap them."""
    memory = memory_of(9)
    method = getattr(memory, name)
    thread = threading.Thread(target=method, args=arguments, daemon=True)
    with memory._lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        assert not memory.memory.any()
    thread.join()


def test_a_write_that_leaves_out_a_slot_is_refused():
    memory = memory_of(9)
    slots = np.array([[0, 1], [0, 0]], "int32")
    rows = np.ones((BATCH, 2, WIDTH), "float32")
    with pytest.raises(ValueError, match="slot 1 of a memory with 0 written"):
        memory.replace("memory", slots, rows)
    assert not memory.memory.any()
    memory.replace("memory", slots, rows, np.array([False, True]))
    assert not memory.memory[0].any()
    memory.replace("memory", slots[::-1], rows, np.array([True, True]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_waits_for_no_thread():
    memory, is_held = memory_of(9), threading.Event()
    memory.fill(random(BATCH, 5, WIDTH))

    def hold():  # as a thread that builds a tree
        with memory._lock:
            is_held.set()
            threading.Event().wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    child = os.fork()
    if not child:
        try:
            is_free = memory._lock.acquire(timeout=1)
            found = memory.nearest(memory.memory[:, :5], 1)[:, :, 0]
            os._exit(7 if is_free and (found == np.arange(5)).all() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    thread.join()


def test_some_rows_are_cleared():
    memory, rng = memory_of(9), np.random.default_rng(3)
    for time in range(1, 6):
        write(memory, rng, time)
    kept = memory.memory[0].copy()
    memory.clear(np.array([False, True]))
    np.testing.assert_array_equal(memory.memory[0], kept)
    assert not memory.memory[1].any()
    assert (memory.last_access[1] == UNWRITTEN).all()
    assert memory.least_recently_accessed()[1] == [0]
    check(memory, random(BATCH, 2, WIDTH), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value):
    memory, rng = memory_of(4), np.random.default_rng(3)
    write(memory, rng, 1)
    rows = np.full((BATCH, 1, WIDTH), value, "float32")
    before = content(memory)
    with pytest.raises(ValueError, match="must stay finite"):
        memory.replace("memory", np.zeros((BATCH, 1), "int32"), rows)
    with pytest.raises(ValueError, match="must be finite"):
        memory.nearest(rows, 1)
    np.testing.assert_array_equal(memory.memory, before[0])


def test_a_tree_finds_most_of_the_nearest_slots():
    """Also of slots that were written after the tree was built."""
    slots, width, top_k = 20_000, 8, 4
    assert slots > tuning.FLAT
    memory = memory_of(slots, 1, width)
    memory.fill(clustered(1, slots, width))
    index = memory._indices[0]
    assert index.leaves is not None

    def recall_now(seed):
        queries = clustered(1, 500, width, seed=seed)
        near = functools.partial(
            closeness, queries[0], memory.memory[0], "cosine"
        )
        found = memory.nearest(queries, top_k)[0]
        cosines = unit(queries[0], np) @ unit(memory.memory[0], np).T
        right = np.argpartition(-cosines, top_k, axis=1)[:, :top_k]
        retrieved = np.where(found >= 0, near(found), -np.inf)
        return recall(retrieved, near(right))

    assert recall_now(2) >= 0.85
    written = clustered(1, 1500, width, seed=9)
    for time, rows in enumerate(np.split(written, 15, axis=1), start=2):
        oldest = memory.least_recently_accessed()[0, 0]
        places = (oldest + np.arange(100, dtype="int32"))[None]
        memory.replace("memory", places, rows)
        times = np.full(places.shape, time, "int32")
        memory.replace("last_access", places, times)
    index.wait()
    assert index.leaves is not None
    np.testing.assert_array_equal(memory.memory[0, :1500], written[0])
    found = memory.nearest(written, 1)[0, :, 0]
    assert (found == np.arange(1500)).mean() >= 0.85
    assert recall_now(3) >= 0.85
