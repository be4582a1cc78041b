"""Processes with a memory of nearest neighbours that fork or are killed.

As a program, with a folder and a number, this file kills that many writers.
"""

import contextlib
import functools
import os
import pathlib
import signal
import sys
import time
import traceback

import keras
import numpy as np
import programs
import pytest
from catalogue import slow_unless
from knn import SIZES_OF_FILE
from knn import Model
from knn import as_sets
from knn import contents
from knn import loaded
from knn import need_scann
from knn import random
from knn import stored

from keras_memory.retrieval import durable
from keras_memory.retrieval import tuning
from keras_memory.retrieval.store import Store
from keras_memory.retrieval.store import exists

# Forks.

FORKS_OF_MANY_THREADS = """
import os, sys, threading
import numpy as np
from keras_memory import KNNMemory

is_used, *stores = sys.argv[1:]
names = {"ring": "exact", "scann": "approximate"}
keys = np.ones((1, 2, 3))


def hold(memory, is_held):
    with memory._lock:
        is_held.set()
        threading.Event().wait(0.2)


def fork(memory, statuses):
    child = os.fork()
    if not child:
        memory.add(keys, keys)
        os._exit(int(memory.size()[0]))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


for store in stores:
    memory = KNNMemory(3, 50, search_method=names[store], background=False)
    is_held, statuses = threading.Event(), []
    threads = [
        threading.Thread(target=fork, args=(memory, statuses))
        for _ in range(8)
    ]
    threading.Thread(target=hold, args=(memory, is_held)).start()
    is_held.wait()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.add(keys, keys)
    print(store, statuses, flush=True)
"""


FORKS_THAT_SEARCH = """
from keras import ops
from keras_memory import retrieval
keys = np.random.default_rng(0).normal(size=(900, 64)).astype("float32")
ring = retrieval.RingMemory(64, 5)
if is_used == "used":
    ops.convert_to_numpy(ops.matmul(ops.ones((300, 300)), ops.ones((300, 300))))
for store in stores:
    memory = KNNMemory(64, 1000, search_method=names[store])
    memory.add(keys, keys)
    child = os.fork()
    if not child:
        calls = [lambda: memory.search(keys, 3).mask.all()]
        if is_used == "used":
            calls += [lambda: ring.initial_state(1)]
            calls += [lambda: retrieval.nearest(keys, keys, 3)]
        for call in calls:
            try:
                print(store, "found", call(), flush=True)
            except RuntimeError as error:
                print(store, error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@functools.cache
def printed(is_used):
    """For each installed store, the lines that the program above printed."""
    stores = ["ring"] if tuning.import_error() else ["ring", "scann"]
    program = FORKS_OF_MANY_THREADS + FORKS_THAT_SEARCH
    text = programs.output(program, is_used, *stores, timeout=120)
    lines = [line.split(" ", 1) for line in text.splitlines()]
    return {
        store: [text for of, text in lines if of == store] for store in stores
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
@pytest.mark.parametrize("is_used", ["used", slow_unless(False, "new")])
def test_a_search_in_a_fork_works_or_says_to_spawn(store, is_used):
    """A fork lacks the threads of the backend that its parent has used."""
    backend = keras.backend.backend()
    _, searched, *others = printed(is_used)[store]
    refused = 'get_context("spawn")'
    can = store == "scann" or is_used == "new" or backend == "numpy"
    assert searched == "found True" if can else refused in searched
    assert len(others) == (0 if is_used == "new" else 2)
    assert backend == "numpy" or all(refused in told for told in others)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_forks_of_many_threads_do_not_wait_for_locks(store):
    """Threads fork at once while another thread holds the lock."""
    statuses, *_ = printed("used")[store]
    assert statuses == "[2, 2, 2, 2, 2, 2, 2, 2]"


FORKED = """
import os, sys, threading, warnings
import numpy as np
from keras_memory import KNNMemory
from keras_memory.retrieval import tuning
warnings.simplefilter("error")
tuning.FLAT = 500
rng = np.random.default_rng(0)
centers = rng.normal(size=(20, 8))
keys = centers[rng.integers(20, size=900)] + 0.1 * rng.normal(size=(900, 8))
memory, go = KNNMemory(8, 1000, search_method="approximate"), threading.Event()
memory._builder.submit(go.wait, 60)
memory.add(keys[None], keys[None])
child = os.fork()
if not child:
    index = memory._indexes[0]
    assert not index.leaves
    for _ in range(2):
        memory.search(keys[None, :300], 5)
        memory.wait()
    assert index.leaves, "no tree"
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go.set()
memory.wait()
assert memory._indexes[0].leaves
atexit.unregister(gc.freeze)  # the program ends as others do
for _ in range(50):  # trees that the program does not wait for at its end
    other = KNNMemory(8, 1000, search_method="approximate")
    other.add(keys[None], keys[None])
print("over")
"""


@pytest.mark.scann
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_a_fork_builds_its_own_trees():
    need_scann()
    assert programs.output(FORKED, timeout=120) == "over\n"


# Processes that are killed.

SIZES_OF_KILLED = {**SIZES_OF_FILE, "memory_size": 20}


def act(memory, number):
    """Applies the operation with this number to a memory or a model."""
    rng = np.random.default_rng(number)
    if rng.random() < 0.15:
        memory.clear(rng.permutation(3)[: rng.integers(0, 3)])
        return
    rows = rng.permutation(3)[: rng.integers(1, 4)]
    shape = len(rows), rng.choice([0, 1, 2, 3, 5, 8, 13, 45])
    keys = rng.normal(size=(*shape, 3)).astype("float32")
    values = rng.normal(size=(*shape, 2)).astype("float32")
    memory.add(keys, values, rng.random(shape) < 0.7, rows)


def act_until_same(memory, model, number, most):
    """Advances the model until it equals the memory; returns the number."""
    wanted = contents(memory)
    for count in range(number, number + most):
        if contents(model) == wanted:
            return count
        act(model, count)
    raise AssertionError(f"as after none of {number}, ..., {count} operations")


def write_on(folder, number, told):
    rng = np.random.default_rng(number)
    memory = stored(folder, **SIZES_OF_KILLED)
    while True:
        act(memory, number)
        number += 1
        if rng.random() < 0.2:
            memory.flush()
            os.write(told, b"%d\n" % number)


def read_on(folder, told):
    while not exists(folder):
        time.sleep(0.01)
    memory, model = stored(folder, "r"), Model(**SIZES_OF_KILLED)
    number, queries = 0, random(3, 4, 3)
    while True:
        if memory.refresh():
            os.write(told, b".")
        number = act_until_same(memory, model, number, 100_000)
        found = memory.search(queries, 5)
        for row, entries in enumerate(model.rows):
            mask, *both = (part[row][None] for part in found[2:])
            pairs = {(x.key.tobytes(), x.value.tobytes()) for x in entries}
            assert all(some <= pairs for some in as_sets(mask, *both))
            most = min(5, len(entries))
            assert (mask.sum(-1) == most).all()
            truths, _ = model.scores(row, queries[row])
            best = np.sort(truths)[:, ::-1][:, :most]
            scores = found.scores[row, :, :most]
            assert (np.abs(scores - best) < 1e-4).all()


def in_a_child(function, *arguments):
    """A process that runs the function, and a pipe with its reports."""
    heard, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        return child, heard
    try:
        function(*arguments, told)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def kill(child, heard):
    """Kills the child and returns its reports."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it had ended by itself"
    with open(heard, "rb") as file:
        return file.read()


def run_kills(folder, number):
    durable.FILE_LEAST = 17_000  # slightly more than four pages
    rng = np.random.default_rng(int(number))
    model, known, first = Model(**SIZES_OF_KILLED), 0, set()
    reader = in_a_child(read_on, folder)
    for _ in range(int(number)):
        writer = in_a_child(write_on, folder, known)
        time.sleep(rng.uniform(0.0, 0.3))
        told = kill(*writer).split()
        if not exists(folder):
            assert not told
            continue
        acknowledged = int(told[-1]) if told else known
        for count in range(known, acknowledged):
            act(model, count)
        known = act_until_same(loaded(folder), model, acknowledged, 200)
        with contextlib.closing(Store(folder, "r")) as store:
            first.add(store._meta.first)
    print(known, len(first), len(kill(*reader)))


def kill_writers(folder, number):
    """Returns the numbers of operations, file rewrites and refreshes."""
    one = {"KERAS_BACKEND": "numpy", "OPENBLAS_NUM_THREADS": "1"}
    done = programs.run(pathlib.Path(__file__), folder, number, **one)
    assert done.returncode == 0, done.stderr[-3000:]
    print(number, "kills; operations, rewrites, refreshes:", done.stdout)
    return map(int, done.stdout.split())


def test_killed_writers_lose_no_flushed_entries(tmp_path):
    operations, rewrites, news = kill_writers(tmp_path / "memory", 3)
    assert operations > 5 and rewrites and news


if __name__ == "__main__":
    run_kills(*sys.argv[1:])
