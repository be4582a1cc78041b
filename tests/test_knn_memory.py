"""A memory of nearest neighbours: it loses nothing, and nothing breaks it.

Run as a program with a name of `PROGRAMS`, this is what tests start in a
process of its own.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent import futures

import hypothesis
import keras
import ml_dtypes
import numpy as np
import pytest
from catalogue import slow_unless
from harness import golden
from hypothesis import strategies
from keras import ops

from keras_memory import retrieval
from keras_memory.retrieval import durable
from keras_memory.retrieval import knn_memory
from keras_memory.retrieval import ring as ring_module
from keras_memory.retrieval import scann_row
from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory
from keras_memory.retrieval.similarities import SIMILARITIES
from keras_memory.retrieval.store import Operation
from keras_memory.retrieval.store import Store
from keras_memory.retrieval.store import exists

TOLERANCE = 1e-5  # of scores, by the lengths of the vectors


SEARCH = {"ring": "exact", "scann": "approximate", "auto": "auto"}


def need_scann():
    reason = tuning.import_error()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["ring", pytest.param("scann", marks=pytest.mark.scann)])
def store(request):
    if request.param == "scann":
        need_scann()
    return request.param


@pytest.fixture
def trees(monkeypatch):
    """Trees from 500 entries on, if they compare less than half of them."""
    need_scann()
    monkeypatch.setattr(tuning, "FLAT", 500)
    monkeypatch.setattr(tuning, "WORTH", 0.5)
    monkeypatch.setattr(tuning, "REBUILT", 0.25)


def random(*shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def clustered(rows, n, dim, seed=7, centres=1, number=40):
    """Vectors that a tree can tell apart, around the same centres each time."""
    centres = 3.0 * random(number, dim, seed=centres)
    rng = np.random.default_rng(seed)
    chosen = centres[rng.integers(0, number, size=(rows, n))]
    return (chosen + 0.2 * rng.normal(size=chosen.shape)).astype("float32")


# The model.


@dataclasses.dataclass
class Entry:
    slot: int
    key: np.ndarray
    value: np.ndarray
    hits: int = 0
    age: int = 0
    age_since_hit: int = 0


class Model:
    """A memory as a list of entries for each row, the oldest first."""

    def __init__(
        self, key_dim, memory_size, num_rows=1, value_dim=None, similarity="dot"
    ):
        self.key_dim, self.memory_size, self.num_rows = (
            key_dim,
            memory_size,
            num_rows,
        )
        self.value_dim = key_dim if value_dim is None else value_dim
        self.similarity = similarity
        self.rows = [[] for _ in range(num_rows)]
        self.added = [0] * num_rows
        self.longest = [0.0] * num_rows  # key that was added

    def which(self, rows):
        if rows is None:
            return list(range(self.num_rows))
        rows = np.asarray(rows)
        return (np.flatnonzero(rows) if rows.dtype == bool else rows).tolist()

    def add(self, keys, values=None, mask=None, rows=None):
        if values is None:
            values = np.zeros((*keys.shape[:2], 0), "float32")
        slots = np.full(keys.shape[:2], -1)
        for i, row in enumerate(self.which(rows)):
            for j in range(keys.shape[1]):
                if mask is not None and not mask[i, j]:
                    continue
                slot = self.added[row] % self.memory_size
                slots[i, slots[i] == slot] = -1
                slots[i, j] = slot
                self.rows[row].append(Entry(slot, keys[i, j], values[i, j]))
                length = np.linalg.norm(keys[i, j].astype("float64"))
                self.longest[row] = max(self.longest[row], length)
                del self.rows[row][: -self.memory_size]
                self.added[row] += 1
        return slots

    def clear(self, rows=None):
        for row in self.which(rows):
            self.rows[row], self.added[row], self.longest[row] = [], 0, 0.0

    def load(self):
        """What a file keeps: entries, in slots as they come."""
        for row, entries in enumerate(self.rows):
            self.added[row] = len(entries)
            lengths = [np.linalg.norm(entry.key) for entry in entries]
            self.longest[row] = max(lengths, default=0.0)
            self.rows[row] = [
                Entry(slot, entry.key, entry.value)
                for slot, entry in enumerate(entries)
            ]

    def scores(self, row, queries):
        """(Q, n) similarities in float64, and (Q, 1) what rounding goes by."""
        shape = (-1, self.key_dim)
        keys = [entry.key for entry in self.rows[row]]
        keys = np.array(keys, "float64").reshape(shape)
        queries = queries.astype("float64")
        of_keys = np.linalg.norm(keys, axis=1)
        lengths = np.linalg.norm(queries, axis=1)[:, None]
        if self.similarity == "l2":
            squares = (queries[:, None] - keys) ** 2
            # ScaNN's distances are from a mean of keys that may be gone.
            return -squares.sum(-1), (lengths + self.longest[row]) ** 2
        products = queries @ keys.T
        if self.similarity == "dot":
            return products, lengths * of_keys.max(initial=0.0)
        both = lengths * of_keys
        cosines = np.where(both > 0, products / np.where(both > 0, both, 1), 0)
        return cosines, np.ones_like(lengths)

    def search(self, row, slots):
        """A search of a row, which found those slots."""
        times = collections.Counter(slots)
        for entry in self.rows[row]:
            entry.age += 1
            entry.hits += times[entry.slot]
            found = times[entry.slot] > 0
            entry.age_since_hit = 0 if found else entry.age_since_hit + 1


def contents(memory):
    """Of each row the bytes of its keys and of its values, by age."""
    if isinstance(memory, Model):
        return [
            (
                b"".join(entry.key.tobytes() for entry in entries),
                b"".join(entry.value.tobytes() for entry in entries),
            )
            for entries in memory.rows
        ]
    rows = map(memory.entries, range(memory.num_rows))
    return [(keys.tobytes(), values.tobytes()) for keys, values in rows]


def check_entries(memory, model):
    assert contents(memory) == contents(model)
    size = memory.size()
    assert size.dtype == "int32"
    assert size.tolist() == [len(entries) for entries in model.rows]
    for row, number in enumerate(size):
        keys, values = memory.entries(row)
        assert keys.shape == (number, model.key_dim)
        assert values.shape == (number, model.value_dim)
        assert keys.dtype == values.dtype == "float32"


def check_search(memory, model, queries, top_k, rows=None, is_exact=True):
    """A search finds what is there, and if it is exact the nearest. Gives how
    many of those it found, and how many there are."""
    found = memory.search(queries, top_k, rows)
    which = model.which(rows)
    shape = (*queries.shape[:-1], top_k)
    widths = (), (), (), (model.key_dim,), (model.value_dim,)
    assert [part.shape for part in found] == [(*shape, *w) for w in widths]
    dtypes = ["float32", "int32", "bool", "float32", "float32"]
    assert [part.dtype.name for part in found] == dtypes
    number = math.prod(shape[1:-1])
    found = [
        part.reshape(len(which), number, top_k, *width)
        for part, width in zip(found, widths)
    ]
    right = wanted = 0
    for i, row in enumerate(which):
        of_row = queries[i].reshape(number, model.key_dim)
        of_all = is_exact(row) if callable(is_exact) else is_exact
        of_slot = {entry.slot: entry for entry in model.rows[row]}
        places = {slot: place for place, slot in enumerate(of_slot)}
        truths, scales = model.scores(row, of_row)
        for j, (truth, scale) in enumerate(zip(truths, scales)):
            scores, slots, mask, keys, values = (part[i, j] for part in found)
            most = min(top_k, len(of_slot))
            n = mask.sum()
            assert n == most or not of_all and n < most
            assert mask[:n].all()
            assert (slots[n:] == -1).all() and (scores[n:] == -np.inf).all()
            assert not keys[n:].any() and not values[n:].any()
            scores, slots = scores[:n], slots[:n].tolist()
            assert len(set(slots)) == n
            for slot, key, value in zip(slots, keys, values):
                assert key.tobytes() == of_slot[slot].key.tobytes()
                assert value.tobytes() == of_slot[slot].value.tobytes()
            tolerance = TOLERANCE * scale[0]
            true = truth[[places[slot] for slot in slots]]
            best = np.sort(truth)[::-1][:most]
            assert (np.abs(scores - true) <= tolerance).all()
            assert (np.diff(scores) <= tolerance).all()
            if of_all:
                assert (np.abs(scores - best) <= tolerance).all()
            right += (true >= best[-1:] - tolerance).sum() if most else 0
            wanted += most
        model.search(row, found[1][i][found[2][i]].tolist())
    return right, wanted


def check_statistics(memory, model):
    for row, entries in enumerate(model.rows):
        statistics = memory.statistics(row)
        for name, of_row in statistics._asdict().items():
            assert of_row.dtype == "int64"
            expected = [getattr(entry, name) for entry in entries]
            assert of_row.tolist() == expected, name


def pair(store, *sizes, of_memory=None, **options):
    """A memory, and a model of it."""
    more = {
        "search_method": SEARCH[store],
        "background": False,
        **(of_memory or {}),
    }
    return KNNMemory(*sizes, **options, **more), Model(*sizes, **options)


def check_add(memory, model, *arguments, **named):
    slots = memory.add(*arguments, **named)
    assert slots.dtype == "int32"
    assert (slots == model.add(*arguments, **named)).all()
    return slots


# As the model.

SIZES = {  # dim, memory_size, num_rows, value_dim
    "all-differ": (5, 11, 3, 2),
    "values-as-wide": (5, 11, 3, None),
    "no-values": (5, 7, 3, 0),
    "one-slot": (5, 1, 3, 2),
    "one-wide": (1, 7, 3, 1),
}
CASES_OF_SIZES = [(sizes, "dot") for sizes in SIZES]
CASES_OF_SIZES += [("all-differ", "cosine"), ("all-differ", "l2")]


@pytest.mark.parametrize("sizes, similarity", CASES_OF_SIZES)
def test_all_is_as_in_a_list(store, sizes, similarity):
    memory, model = pair(store, *SIZES[sizes], similarity=similarity)
    dim, width, size = memory.key_dim, memory.value_dim, memory.memory_size
    rng = np.random.default_rng(3)

    def entries(rows, n):
        arrays = (
            rng.normal(size=(rows, n, dim)),
            rng.normal(size=(rows, n, width)),
        )
        return [array.astype("float32") for array in arrays]

    def look(queries, top_k, rows=None):
        queries = rng.normal(size=(*queries, dim)).astype("float32")
        check_entries(memory, model)
        check_search(memory, model, queries, top_k, rows)

    look((3, 2), 2)
    check_add(memory, model, *entries(3, 4))
    look((3, 2), 3)
    # With some axes, or without, and more asked for than there is.
    look((3, 2, 1, 2), 2)
    look((3,), size + 2)
    # Some entries, some rows, in their own order.
    check_add(memory, model, *entries(3, 5), mask=rng.random((3, 5)) < 0.5)
    check_add(memory, model, *entries(2, 3), rows=[2, 0])
    look((2, 3), 4, rows=np.array([2, 1]))
    mask = np.array([[False] * 3, [True, False, True]])
    check_add(memory, model, *entries(2, 3), mask, np.array([1, 1, 0]) > 0)
    look((1, 2), 3, rows=[False, True, False])
    # Nothing.
    check_add(memory, model, *entries(3, 0))
    check_add(memory, model, *entries(3, 2), mask=np.zeros((3, 2), bool))
    check_add(memory, model, *entries(0, 2), rows=[])
    look((3, 0), 2)
    look((3, 1, 0, 2), 2)
    # More than there is room for, and around the end.
    check_add(memory, model, *entries(3, 2 * size + 3))
    look((3, 1), size)
    for _ in range(3):
        check_add(memory, model, *entries(1, size // 2 + 1), rows=[1])
    look((3, 1), 2)
    for rows in ([1], [True, False, True], None):
        memory.clear(rows)
        model.clear(rows)
        look((3, 1), 2)
        check_add(memory, model, *entries(1, 2), rows=[1])
        look((3, 1), 3)


def test_no_rows(store):
    memory, model = pair(store, 3, 5, num_rows=2)
    check_search(memory, model, random(0, 4, 3), 3, rows=[])
    check_search(memory, model, random(0, 3), 3, rows=np.zeros(2, bool))
    assert memory.recall(random(0, 4, 3), rows=[]) == 1.0


def test_one_row(store):
    memory, model = pair(store, 3, 5)
    for n in (2, 4, 1):
        check_add(memory, model, random(1, n, 3, seed=n), random(1, n, 3))
        check_search(memory, model, random(1, 4, 3), 3, rows=[0])
    check_entries(memory, model)


def test_one_row_without_its_axis(store):
    memory, other = (
        KNNMemory(3, 5, search_method=SEARCH[store], value_dim=2) for _ in "12"
    )
    keys, values, mask = random(4, 3), random(4, 2), np.arange(4) != 1
    slots = memory.add(keys, values, mask)
    assert (slots == other.add(keys[None], values[None], mask[None])[0]).all()
    assert slots.shape == (4,)
    memory.add(keys[:1], values[:1], rows=[0])
    other.add(keys[None, :1], values[None, :1])
    for queries in (random(7, 3), random(1, 3), random(0, 3)):
        found, expected = (
            memory.search(queries, 2),
            other.search(queries[None], 2),
        )
        for one, wanted in zip(found, expected):
            assert one.shape == wanted.shape[1:] and (one == wanted[0]).all()
    assert memory.recall(random(7, 3)) == 1.0
    for wrong in (
        {"values": values[None]},
        {"values": values, "mask": mask[None]},
        {"values": values[:3]},
    ):
        with pytest.raises(
            ValueError, match="must be .4, 2.|must be .4,. bool"
        ):
            memory.add(keys, **wrong)
    with pytest.raises(ValueError, match="nan in row 0, at .1, 2."):
        memory.add(
            np.where(np.arange(12).reshape(4, 3) == 5, np.nan, keys), values
        )
    two = KNNMemory(3, 5, num_rows=2, value_dim=2, search_method=SEARCH[store])
    with pytest.raises(ValueError, match=r"`keys` must be \(1, n, 3\)"):
        two.add(keys, values, rows=[1])


@pytest.mark.parametrize("name", ["return_keys", "return_values"])
def test_entries_are_not_handed_to_a_search(store, name):
    memory = KNNMemory(3, 5, search_method=SEARCH[store])
    told = f"`{name}` must be True or False.*Received"
    with pytest.raises(ValueError, match=told):
        memory.search(random(1, 2, 3), 1, **{name: random(1, 2, 3)})


# Values of other dtypes.

ID = (1 << 24) + 1  # the first that float32 does not keep
VALUES = {
    "int32": [ID, -(1 << 31), (1 << 31) - 1],
    "int64": [ID, -(1 << 63), (1 << 63) - 1],
    "float64": [1 / 3, 1e-300, -0.0],
    "float16": [1.5, 65504.0, 1e-7],
    "bfloat16": [1.5, 3.0e14, 1e-30],
}


@pytest.mark.parametrize("dtype", VALUES)
def test_values_come_back_in_their_dtype(store, dtype, tmp_path):
    values = np.array(VALUES[dtype]).astype(dtype)[None, :, None]
    keys = np.eye(3)[None]
    options = {
        "value_dim": 1,
        "value_dtype": dtype,
        "search_method": SEARCH[store],
    }
    memory = KNNMemory(3, 5, **options)
    memory.add(keys, values)
    memory.save(tmp_path / "saved")
    with KNNMemory.open(
        tmp_path / "open", "a", key_dim=3, memory_size=5, **options
    ) as writer:
        writer.add(keys, values[:, :1].repeat(3, axis=1))
        writer.clear()
        writer.add(keys, values)
        writer.flush()
        reader = KNNMemory.open(tmp_path / "open", search_method=SEARCH[store])
        everything = writer._operations(writer._count)
        writer._file.commit(everything, replace=True)
    reader.refresh()
    for one in (
        memory,
        reader,
        KNNMemory.load(tmp_path / "saved", search_method=SEARCH[store]),
        KNNMemory.load(
            tmp_path / "open", value_dtype=dtype, search_method=SEARCH[store]
        ),
    ):
        found = one.search(keys, 4)
        assert found.values.dtype == one.entries()[1].dtype == dtype
        assert found.values[0, :, 0].tobytes() == values.tobytes()
        assert (found.values[0, :, 3] == 0).all()
        assert f"value_dtype={dtype!r}" in repr(one)
    for other in ("float32", None):
        with pytest.raises(ValueError, match="`value_dtype` must be that of"):
            KNNMemory.load(tmp_path / "saved", value_dtype=other)


@pytest.mark.parametrize(
    "dtype, values, told",
    [
        (None, [[[ID]]], 'float32 keeps.*value_dtype="int32".*16777217'),
        ("float16", [[[2049]]], "float16 keeps exactly"),
        ("float16", [[[1e5]]], "finite.*100000.0 in .* as float16"),
        ("int32", [[[1 << 31]]], '"int64".*2147483648'),
        ("int32", [[[1.0]]], 'of integers|be integers.*`value_dtype="int32"'),
        ("int64", ops.ones((1, 1, 1)), "be integers.*dtype float32"),
        ("int64", np.array([[[1 << 63]]], "uint64"), "int64 keeps"),
        ("int64", [[[True]]], "be integers.*dtype bool"),
    ],
)
def test_values_that_would_be_rounded_are_refused(dtype, values, told):
    memory = KNNMemory(
        2, 5, value_dim=1, value_dtype=dtype, search_method="exact"
    )
    with pytest.raises(ValueError, match=f"`values` must .*{told}"):
        memory.add(np.ones((1, 1, 2)), values)
    assert memory.size() == [0]


def test_keys_that_would_be_rounded_are_refused(store):
    memory = KNNMemory(2, 5, value_dim=0, search_method=SEARCH[store])
    with pytest.raises(ValueError, match="`keys` must .*float32 keeps exactly"):
        memory.add(np.full((1, 1, 2), ID))
    memory.add(np.full((1, 1, 2), ID - 1))


# Numbers of queries.


def test_few_shapes_are_searched(monkeypatch):
    """As each is compiled on some backends, and its code is kept."""
    asked, search = set(), retrieval.RingMemory.search

    def noted(ring, state, queries, top_k):
        asked.add((state.keys.shape, queries.shape, top_k))
        return search(ring, state, queries, top_k)

    monkeypatch.setattr(retrieval.RingMemory, "search", noted)
    memory, model = pair("ring", 3, 40)
    for number in (*range(1, 40), 300, 1030, 2065):
        if number < 40:
            check_add(memory, model, random(1, 1, 3), random(1, 1, 3))
        check_search(memory, model, random(1, number, 3), 1 + number % 9)
    sizes = {queries[1] for _, queries, _ in asked}
    assert sizes == {16, 32, 64, 512, 1024}
    assert {top_k for *_, top_k in asked} == {1, 2, 4, 8, 16}


# Forks.

FORK_THAT_SEARCHES = """
import os, sys
import numpy as np
from keras import ops
from keras_memory import KNNMemory, retrieval
store, is_used = sys.argv[1:]
keys = np.random.default_rng(0).normal(size=(900, 64)).astype("float32")
names = {"ring": "exact", "scann": "approximate"}
memory = KNNMemory(64, 1000, search_method=names[store])
memory.add(keys, keys)
ring = retrieval.RingMemory(64, 5)
if is_used == "used":
    ops.convert_to_numpy(ops.matmul(ops.ones((300, 300)), ops.ones((300, 300))))
child = os.fork()
if not child:
    calls = [lambda: memory.search(keys, 3).mask.all()]
    if is_used == "used":
        calls += [lambda: ring.initial_state(1)]
        calls += [lambda: retrieval.nearest(keys, keys, 3)]
    for call in calls:
        try:
            print("found", call(), flush=True)
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
@pytest.mark.parametrize("is_used", ["used", slow_unless(False, "new")])
def test_a_search_in_a_fork(store, is_used):
    """Of a process that used the backend, whose threads are not there."""
    backend = keras.backend.backend()
    done = subprocess.run(
        [sys.executable, "-c", FORK_THAT_SEARCHES, store, is_used],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    searched, *others = done.stdout.splitlines()
    refused = 'get_context("spawn")'
    can = store == "scann" or is_used == "new" or backend == "numpy"
    assert searched == "found True" if can else refused in searched
    assert is_used == "new" or len(others) == 2
    assert backend == "numpy" or all(refused in told for told in others)


FORK_OF_MANY_THREADS = """
import os, sys, threading
import numpy as np
from keras_memory import KNNMemory

names = {"ring": "exact", "scann": "approximate"}
method = names[sys.argv[1]]
memory = KNNMemory(3, 50, search_method=method, background=False)
keys = np.ones((1, 2, 3))
is_held, may_go = threading.Event(), threading.Event()


def hold():
    with memory._lock:
        is_held.set()
        may_go.wait(0.2)


def fork():
    child = os.fork()
    if not child:
        memory.add(keys, keys)
        os._exit(int(memory.size()[0]))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


statuses = []
threads = [threading.Thread(target=fork) for _ in range(8)]
threading.Thread(target=hold).start()
is_held.wait()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
memory.add(keys, keys)
print(statuses)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_forks_of_many_threads_wait_for_no_lock(store):
    """Another thread has the lock at the time, and threads fork at once."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_OF_MANY_THREADS, store],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2, 2, 2, 2, 2, 2, 2, 2]\n"


def test_slots_are_where_searches_find_entries(store):
    memory = KNNMemory(3, 7, similarity="l2", search_method=SEARCH[store])
    keys = random(1, 17, 3)
    for begin, end in ((0, 2), (2, 8), (8, 17)):
        some = keys[:, begin:end]
        slots = memory.add(some, some)
        found = memory.search(some, 1)
        assert (found.indices[0, -7:, 0] == slots[0, -7:]).all()
        assert (slots[0, :-7] == -1).all()
    assert slots.tolist() == [[-1, -1, 3, 4, 5, 6, 0, 1, 2]]


def test_rows_do_not_touch_each_other(store):
    memory = KNNMemory(3, 7, num_rows=3, search_method=SEARCH[store])
    memory.add(random(3, 9, 3), random(3, 9, 3))
    before, queries = contents(memory), random(3, 2, 3, seed=5)
    found = memory.search(queries, 4)
    memory.add(random(1, 4, 3), random(1, 4, 3), rows=[1])
    some = np.array([[False] * 2, [True, False], [False] * 2])
    memory.add(random(3, 2, 3), random(3, 2, 3), mask=some)
    moved = contents(memory)
    memory.search(queries[:1], 1, rows=[1])
    assert contents(memory) == moved
    memory.clear([1])
    after = memory.search(queries, 4)
    assert not after.mask[1].any() and after.mask[[0, 2]].all()
    for row in (0, 2):
        for one, other in zip(found, after):
            assert one[row].tobytes() == other[row].tobytes()
        assert contents(memory)[row] == moved[row] == before[row]
    assert moved[1] != before[1]


def test_what_is_not_asked_for_is_not_given(store):
    memory = KNNMemory(3, 7, value_dim=2, search_method=SEARCH[store])
    memory.add(random(1, 4, 3), random(1, 4, 2))
    queries = random(1, 2, 1, 3)
    whole = memory.search(queries, 5)
    for keys, values in ((False, True), (True, False), (False, False)):
        found = memory.search(
            queries, 5, return_keys=keys, return_values=values
        )
        for one, other in zip(found[:3], whole):
            assert (one == other).all()
        for is_asked, one, other in zip((keys, values), found[3:], whole[3:]):
            other = other[..., : None if is_asked else 0]
            assert one.shape == other.shape and (one == other).all()


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float64", ml_dtypes.bfloat16, "int8", "uint16", "int64", list],
    ids=str,
)
def test_numbers_of_any_kind(store, dtype):
    whole = np.arange(12.0).reshape(1, 4, 3)
    given = whole.tolist() if dtype is list else whole.astype(dtype)
    memory = KNNMemory(3, 7, search_method=SEARCH[store])
    memory.add(given, given, mask=[[True, False, True, True]], rows=(0,))
    keys, values = memory.entries()
    assert (keys == whole[0, [0, 2, 3]]).all() and (values == keys).all()
    found = memory.search(given, 1)
    assert (found.scores[0, :, 0] == whole[0] @ whole[0, 3]).all()


def test_tensors(store):
    memory, model = pair(store, 3, 7, num_rows=2)
    arrays = random(2, 4, 3), random(2, 4, 3, seed=1)
    mask = np.array([[True, False, True, True]] * 2)
    model.add(*arrays, mask)
    memory.add(*map(ops.convert_to_tensor, (*arrays, mask)))
    both = ops.convert_to_tensor([1, 0])
    model.add(*arrays, rows=[1, 0])
    memory.add(*map(keras.Variable, arrays), rows=both)
    check_entries(memory, model)
    queries = ops.convert_to_tensor(arrays[0])
    found = memory.search(queries, 2, rows=ops.convert_to_tensor([True, True]))
    for one, other in zip(found, memory.search(arrays[0], 2)):
        assert isinstance(one, np.ndarray) and (one == other).all()
    half = ops.cast(queries, "bfloat16")
    memory.add(half, half)
    rounded = arrays[0].astype(ml_dtypes.bfloat16).astype("float32")
    assert (memory.entries(1)[0][-4:] == rounded[1]).all()


def test_what_is_given_may_change_later(store):
    memory, model = pair(store, 3, 7)
    keys = random(1, 4, 3)
    check_add(memory, model, keys.copy(), keys.copy())
    given = keys.copy()
    memory.add(given[:, :2], given[:, :2])
    model.add(keys[:, :2].copy(), keys[:, :2].copy())
    given[:] = np.nan
    for _ in range(2):
        for array in memory.entries():
            array[:] = np.nan
        for array in memory.search(keys, 2)[3:]:
            array[:] = np.nan
    check_entries(memory, model)
    check_search(memory, model, keys, 3)


# Statistics.


def test_statistics_are_those_of_a_loop(store):
    kept = {"keep_statistics": True}
    memory, model = pair(store, 2, 5, num_rows=3, of_memory=kept)
    rng, most = np.random.default_rng(2), 0
    for step in range(12):
        rows = rng.permutation(3)[: rng.integers(1, 4)]
        n = rng.integers(0, 4)
        arrays = rng.normal(size=(2, len(rows), n, 2)).astype("float32")
        check_add(memory, model, *arrays, rows=rows)
        if step % 7 == 6:
            memory.clear(rows[:1])
            model.clear(rows[:1])
        queries = random(len(rows), step % 4, 2, seed=step)
        check_search(memory, model, queries, 1 + step % 7, rows)
        check_statistics(memory, model)
        memory.recall(top_k=2)
        memory.recall(queries, top_k=2, rows=rows)
        check_statistics(memory, model)
        most = max([most, *memory.statistics(0).hits])
    assert most > 2


def test_statistics_must_be_asked_for(store):
    memory = KNNMemory(2, 5, search_method=SEARCH[store])
    with pytest.raises(ValueError, match="made.*keep_statistics=False"):
        memory.statistics()


def test_statistics_beside_recall(monkeypatch):
    memory = KNNMemory(2, 5, search_method="exact", keep_statistics=True)
    memory.add(random(1, 3, 2), random(1, 3, 2))
    got, real = [], knn_memory.recall

    def recall(*arguments):
        thread = threading.Thread(target=lambda: got.append(ages()))
        thread.start()
        thread.join(0.3)
        got.insert(0, thread)
        return real(*arguments)

    def ages():
        with contextlib.suppress(ValueError):
            return memory.statistics().age

    monkeypatch.setattr(knn_memory, "recall", recall)
    memory.recall()
    thread = next(x for x in got if isinstance(x, threading.Thread))
    thread.join()
    assert any(x is not None and x is not thread for x in got)


# The reference.


def as_sets(mask, keys, values):
    """Of each query the (key, value) pairs that were found."""
    rows, queries, _ = mask.shape
    return [
        {
            (keys[i, j, k].tobytes(), values[i, j, k].tobytes())
            for k in np.flatnonzero(mask[i, j])
        }
        for i in range(rows)
        for j in range(queries)
    ]


class InGraph:
    """`RingMemory` with the methods of `KNNMemory`."""

    def __init__(self, method, key_dim, memory_size, num_rows):
        self.ring = retrieval.RingMemory(
            key_dim, memory_size, search_method=method
        )
        self.state = self.ring.initial_state(num_rows)

    def add(self, keys, values):
        self.state = self.ring.add(self.state, keys, values)

    def clear(self, rows=None):
        rows = np.isin(np.arange(len(self.state.count)), rows or range(9))
        self.state = self.ring.clear(self.state, rows)

    def search(self, queries, top_k):
        found = self.ring.search(self.state, queries, top_k)
        return retrieval.Neighbours(*map(ops.convert_to_numpy, found))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("kind", ["ring", "scann", "exact", "auto"])
def test_what_the_reference_should_find(kind, name):
    """Operations as memorizing-transformers-pytorch 0.4.1 did them.

    `ideal_*` is an exact search of the newest `memory_size` entries. What the
    reference found differs once there are more: one entry too many empties its
    index, so that searches find nothing until the next `add`, with which its
    ids begin at 0 while the slots go on, so that keys and values of others are
    returned; also the count begins without the batch that was too much; `add`
    moves rows on that it does not write. Where it differs (MANIFEST.md of the
    goldens), ours is right.
    """
    arrays, _, meta = golden(f"mt__knn_memory_{name}")
    sizes = meta["dim"], meta["max_memories"], meta["batch"]
    if kind in ring_module.SEARCH_METHODS:
        memory = InGraph(kind, *sizes)
    else:
        if kind == "scann":
            need_scann()
        memory = KNNMemory(*sizes, search_method=SEARCH[kind])
    differs = 0
    for i, op in enumerate(meta["ops"]):
        if op["op"] == "add":
            new = arrays[f"op{i}.memories"]
            memory.add(new[:, :, 0], new[:, :, 1])
        elif op["op"] == "clear":
            rows = op["batch_indices"]
            memory.clear(None if rows == "all" else rows)
        else:
            found = memory.search(arrays[f"op{i}.queries"], meta["topk"])
            ours = as_sets(found.mask, found.keys, found.values)
            ideal, reference = (
                as_sets(mask, both[..., 0, :], both[..., 1, :])
                for mask, both in (
                    (arrays[f"op{i}.{of}_mask"], arrays[f"op{i}.{of}_kv"])
                    for of in ("ideal", "reference")
                )
            )
            assert ours == ideal
            assert list(map(len, ours)) == found.mask.sum(-1).ravel().tolist()
            assert (ours == reference) == op["reference_agrees_with_exact_fifo"]
            differs += ours != reference
    assert differs == 4


def test_no_pickles_and_copies(store):
    memory = KNNMemory(3, 5, search_method=SEARCH[store])
    for how in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="`save` and `load`.*Received"):
            how(memory)


# Trees.


def index_of(memory, row=0):
    return memory._indexes[row]


@pytest.mark.scann
@pytest.mark.parametrize("target", [0.8, 0.95])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_tree_finds_what_it_should(trees, similarity, target):
    memory, model = pair(
        "scann",
        8,
        1500,
        similarity=similarity,
        of_memory={"target_recall": target},
    )
    keys = clustered(1, 1500, 8)
    queries = clustered(1, 256, 8, seed=5)
    check_add(memory, model, keys[:, :400], keys[:, :400])
    assert memory.recall(queries) == 1.0  # tells what is asked for
    check_add(memory, model, keys[:, 400:], keys[:, 400:])
    index = index_of(memory)
    memory.search(queries, 32)
    assert index.leaves > index.leaves_to_search > 0
    assert memory.recall(queries) >= target - 0.03
    others = clustered(1, 500, 8, seed=6)
    assert memory.recall(others) >= target - 0.05
    assert memory.recall() >= target - 0.05
    some = queries[:, ::4]
    told = memory.recall(some)
    right, wanted = check_search(memory, model, some, 32, is_exact=False)
    assert abs(right / wanted - told) < 2e-3


@pytest.mark.scann
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("first", [1, 3])
def test_one_small_search_does_not_decide(trees, background, first):
    """A tree that is tried with few queries, or for fewer neighbours."""
    memory, _ = beside("l2", background)
    keys, queries = clustered(1, 1000, 8), clustered(1, 400, 8, seed=5)
    memory.add(keys, keys)
    memory.wait()
    index = index_of(memory)
    for _ in range(3):
        memory.search(queries[:, :first], 1)
        memory.wait()
    assert index.leaves_to_search
    fewer = index.leaves_to_search
    found = memory.search(queries, 200)  # more leaves than it is tuned for
    assert found.mask.all()
    memory.wait()
    memory.search(queries, 200)
    memory.wait()
    assert index.leaves is None or index.leaves_to_search > fewer
    assert memory.recall(queries, top_k=200) >= 0.92


@pytest.mark.scann
def test_all_that_is_asked_for_is_found(trees):
    memory, model = pair("scann", 8, 1000, similarity="l2")
    keys, queries = clustered(1, 1000, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys, keys)
    memory.search(queries, 2)
    assert index_of(memory).leaves_to_search < index_of(memory).leaves
    for top_k in (100, 999, 1000):
        found = memory.search(queries[:, :20], top_k)
        assert found.mask.all()
        assert len(set(found.indices[0, 0].tolist())) == top_k
    check_search(memory, model, queries, 1000)


@pytest.mark.scann
def test_equal_keys_count_alike(trees):
    memory = KNNMemory(8, 1000, search_method="approximate", background=False)
    few = random(1, 20, 8)
    keys = np.tile(few, (1, 50, 1))
    memory.add(keys, keys)
    assert memory.recall(few, top_k=10) == 1.0
    assert memory.recall(top_k=10) == 1.0
    assert index_of(memory).leaves is not None
    exact = KNNMemory(8, 1000, search_method="exact", similarity="cosine")
    exact.add(keys, keys)
    assert exact.recall(few, top_k=10) == 1.0


@pytest.mark.scann
def test_a_tree_follows_what_is_written(trees, monkeypatch):
    built, best = [], scann_row.ScannRow._best_tree

    def counted(index, *arguments):
        built.append(best(index, *arguments))
        return built[-1]

    monkeypatch.setattr(scann_row.ScannRow, "_best_tree", counted)
    memory, model = pair("scann", 8, 1000, similarity="l2")
    arrays = [clustered(1, 1000, 8)] * 2
    check_add(memory, model, *arrays)
    queries = clustered(1, 256, 8, seed=5)
    memory.search(queries, 10)
    assert len(built) == 1 and memory.recall(queries, top_k=10) >= 0.92
    # All are overwritten, by others that lie elsewhere.
    moved = clustered(1, 1000, 8, centres=2)
    queries = clustered(1, 256, 8, seed=5, centres=2)
    for begin in range(0, 1000, 40):
        some = moved[:, begin : begin + 40]
        check_add(memory, model, some, some)
        # What was just written is found, though no tree was built of it.
        found = memory.search(some, 10)
        assert (found.scores[..., 0] > -1e-3).mean() > 0.9
        memory.search(queries, 10)
    assert len(built) >= 4 and all(built)
    assert memory.recall(queries, top_k=10) >= 0.92
    right, wanted = check_search(memory, model, queries, 10, is_exact=False)
    assert right / wanted >= 0.92
    check_entries(memory, model)


@pytest.mark.scann
def test_where_no_tree_helps_all_are_compared(trees, monkeypatch):
    monkeypatch.setattr(tuning, "WORTH", 0.25)
    memory, model = pair("scann", 32, 900, similarity="l2")
    keys = random(1, 900, 32)
    check_add(memory, model, keys, keys)
    index = index_of(memory)
    assert index.leaves is index.leaves_to_search is index.building is None
    queries = random(1, 50, 32, seed=8)
    assert memory.recall(queries) == 1.0
    check_search(memory, model, queries, 9)
    # Nor when a tree was there before.
    for seed, helps in ((1, True), (2, False), (3, True)):
        share = 0.5 if helps else 0.25
        monkeypatch.setattr(tuning, "WORTH", share)
        keys = (clustered if helps else random)(1, 900, 32, seed=seed)
        check_add(memory, model, keys, keys)
        memory.search(keys[:, ::3], 9)
        check_add(memory, model, keys, keys)
        memory.search(keys[:, ::3], 9)
        assert (index.leaves is not None) == helps
        if not helps:
            check_search(memory, model, queries, 9)


@pytest.mark.scann
def test_writes_after_a_tree_was_given_up(trees, monkeypatch):
    memory, model = pair("scann", 8, 900)
    keys, queries = clustered(1, 2000, 8), random(1, 50, 8)
    check_add(memory, model, keys[:, :900], keys[:, :900])
    memory.search(queries, 9)
    assert index_of(memory).leaves is not None
    monkeypatch.setattr(scann_row.ScannRow, "_best_tree", no_tree)
    for begin in range(900, 2000, 90):  # without a search between
        some = keys[:, begin : begin + 90]
        check_add(memory, model, some, some)
    check_search(memory, model, queries, 9)
    assert index_of(memory).leaves is None


@pytest.mark.scann
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_compressed_vectors_follow_what_is_written(compressed, similarity):
    memory, model, queries = compressed(similarity)
    index = index_of(memory)
    for begin in (1200, 1300, 1400):
        some = clustered(1, 1500, 8)[:, begin : begin + 100]
        check_add(memory, model, some, some)
        assert index.leaves
        right, wanted = check_search(memory, model, queries, 10, is_exact=False)
        assert right / wanted > 0.67


@pytest.mark.scann
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_compressed_vectors_have_exact_scores(compressed, similarity):
    memory, model, queries = compressed(similarity)
    right, wanted = check_search(memory, model, queries, 10, is_exact=False)
    assert right / wanted > 0.67
    # More than the leaves hold.
    right, wanted = check_search(memory, model, queries, 1200, is_exact=False)
    assert right == wanted


@pytest.fixture
def compressed(trees, monkeypatch):
    """Makes a memory of 1,200 entries that are compressed."""
    monkeypatch.setattr(tuning, "HASHED", 600)

    def make(similarity):
        options = {
            "similarity": similarity,
            "of_memory": {"target_recall": 0.7},
        }
        memory, model = pair("scann", 8, 1200, **options)
        keys, queries = clustered(1, 1200, 8), clustered(1, 60, 8, seed=5)
        check_add(memory, model, keys[:, :400], keys[:, :400])
        check_search(memory, model, queries, 10)
        check_add(memory, model, keys[:, 400:], keys[:, 400:])
        index = index_of(memory)
        assert index.leaves
        # ScaNN cannot write to compressed vectors of squared distances.
        assert index._searcher.is_hashed == (similarity != "l2")
        return memory, model, queries

    return make


def beside(similarity, background=True):
    """A memory whose trees are built beside the searches."""
    options = {
        "similarity": similarity,
        "of_memory": {"background": background},
    }
    return pair("scann", 8, 1000, **options)


@pytest.fixture
def held(trees, monkeypatch):
    """Events: a tree has begun to be built; it may go on."""
    began, go = threading.Event(), threading.Event()
    best = scann_row.ScannRow._best_tree

    def waiting(index, *arguments):
        began.set()
        assert go.wait(60)
        return best(index, *arguments)

    monkeypatch.setattr(scann_row.ScannRow, "_best_tree", waiting)
    yield began, go
    go.set()


@pytest.mark.scann
def test_searches_and_adds_go_on_while_a_tree_is_built(held):
    began, go = held
    memory, model = beside("l2")
    keys, queries = clustered(1, 1100, 8), clustered(1, 50, 8, seed=5)
    index = index_of(memory)
    check_add(memory, model, keys[:, :700], keys[:, :700])
    assert began.wait(60)
    check_search(memory, model, queries, 9)
    # New ones, and around the end: old ones are overwritten.
    for begin, end in ((700, 703), (703, 1000), (1000, 1100)):
        some = keys[:, begin:end]
        check_add(memory, model, some, some)
        check_search(memory, model, queries, 9)
        assert index.leaves is None and not index.building.done()
    go.set()
    memory.wait()
    memory.wait()
    assert index.leaves is not None
    new = keys[:, 700:]
    found = memory.search(new, 1)
    assert (found.scores[..., 0] > -1e-3).mean() > 0.95
    check_entries(memory, model)
    right, wanted = check_search(memory, model, queries, 9, is_exact=False)
    assert right / wanted >= 0.92
    # What they overwrote is nowhere.
    gone = memory.search(keys[:, :100], 9).keys[0].reshape(-1, 8)
    assert not (gone[:, None] == keys[0, :100]).all(-1).any()


@pytest.mark.scann
@pytest.mark.parametrize("n", [0, 50, 600])
def test_a_memory_that_is_cleared_while_a_tree_is_built(held, n):
    began, go = held
    memory, model = beside("l2")
    old, new = clustered(1, 700, 8), clustered(1, n, 8, centres=2)
    queries = clustered(1, 50, 8, seed=5, centres=2)
    memory.add(old, old)
    assert began.wait(60)
    building = index_of(memory).building
    memory.clear()
    check_search(memory, model, queries, 3)
    check_add(memory, model, new, new)
    check_search(memory, model, queries, 3)
    go.set()
    building.result(60)
    memory.wait()
    index = index_of(memory)
    assert (index.leaves is None) == (n <= 500)
    check_entries(memory, model)
    check_search(memory, model, queries, 3, is_exact=n <= 500)
    if n > 500:
        assert memory.recall(queries, top_k=10) >= 0.92


@pytest.mark.scann
def test_trees_that_nobody_wants_are_not_built(trees, monkeypatch):
    asked, best = [], scann_row.ScannRow._best_tree

    def noted(index, vectors, *arguments):
        asked.append(vectors[0, 0])
        return best(index, vectors, *arguments)

    monkeypatch.setattr(scann_row.ScannRow, "_best_tree", noted)
    memory = KNNMemory(8, 1000, search_method="approximate")
    builder, go = memory._builder, threading.Event()

    def keep_busy():
        began = threading.Event()
        builder.submit(lambda: began.set() or go.wait(60))
        assert began.wait(60)

    keep_busy()
    keys = clustered(1, 700, 8)
    for i in range(4):  # three of them are forgotten before it is their turn
        memory.clear()
        keys[0, 0, 0] = i
        memory.add(keys, keys)
    go.set()
    memory.wait()
    assert asked == [3.0] and index_of(memory).leaves is not None
    go.clear()
    keep_busy()
    memory.add(keys, keys)
    building = index_of(memory).building
    del memory
    gc.collect()
    go.set()
    building.result(60)
    assert asked == [3.0] and not builder.is_open


FORKED = """
import os, sys, threading, warnings
import numpy as np
from keras_memory import KNNMemory
from keras_memory.retrieval import tuning
warnings.simplefilter("error")
tuning.FLAT = 500
rng = np.random.default_rng(0)
centres = rng.normal(size=(20, 8))
keys = centres[rng.integers(20, size=900)] + 0.1 * rng.normal(size=(900, 8))
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
for _ in range(50):  # trees that the program does not wait for at its end
    other = KNNMemory(8, 1000, search_method="approximate")
    other.add(keys[None], keys[None])
print("over")
"""


@pytest.mark.scann
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_a_fork_builds_trees_of_its_own():
    need_scann()
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "over\n"


@pytest.mark.scann
def test_a_memory_that_is_cleared_before_a_tree_is_tried(trees):
    memory, model = beside("l2")
    keys, queries = clustered(1, 1200, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys[:, :1000], keys[:, :1000])
    memory.wait()
    memory.search(queries, 9)
    memory.wait()
    index, go = index_of(memory), threading.Event()
    assert index.leaves is not None
    memory._builder.submit(go.wait, 60)
    check_add(memory, model, keys[:, 1000:], keys[:, 1000:])
    building = index.building
    memory.clear()
    model.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        go.set()
        building.result(60)
        check_search(memory, model, queries, 9)


@pytest.mark.scann
@pytest.mark.parametrize("background", [True, False])
def test_a_tree_that_cannot_be_built(trees, background, monkeypatch):
    memory, model = beside("l2", background)
    keys, queries = clustered(1, 1000, 8), clustered(1, 50, 8, seed=5)

    def fails(*arguments):
        raise RuntimeError("no tree today")

    with monkeypatch.context() as patch:
        patch.setattr(scann_row.ScannRow, "_best_tree", fails)
        for begin, end in ((0, 600), (600, 800)):
            some = keys[:, begin:end]
            with pytest.warns(RuntimeWarning, match="built.*no tree today"):
                check_add(memory, model, some, some)
                memory.wait()
            check_search(memory, model, queries, 9)
            assert index_of(memory).leaves is None
            assert memory.recall(queries) == 1.0
    check_add(memory, model, keys[:, 800:], keys[:, 800:])
    memory.wait()
    assert index_of(memory).leaves is not None
    check_search(memory, model, queries, 9, is_exact=False)


def no_tree(*arguments):
    """As `ScannRow._best_tree`, where none helps."""


def fail_in_the_midst(patch):
    upsert = scann_row.Searcher.upsert

    def fails(searcher, slots, size, vectors):
        half = len(slots) // 2
        upsert(searcher, slots[:half], size, vectors[:half])
        raise RuntimeError("half of it")

    patch.setattr(scann_row.Searcher, "upsert", fails)


@pytest.mark.scann
@pytest.mark.parametrize("has_tree", [False, True])
def test_a_write_that_fails_in_the_midst(trees, has_tree, monkeypatch):
    memory, model = pair("scann", 8, 1000)
    n = 800 if has_tree else 300
    keys, queries = clustered(1, 1200, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys[:, :n], keys[:, :n])
    check_search(memory, model, queries, 9, is_exact=not has_tree)
    index = index_of(memory)
    assert (index.leaves is not None) == has_tree
    monkeypatch.setattr(scann_row.ScannRow, "_best_tree", no_tree)
    for begin, end in ((n, n + 60), (n + 60, n + 63), (n + 63, n + 100)):
        some = keys[:, begin:end]
        with monkeypatch.context() as patch:
            fail_in_the_midst(patch)
            with pytest.warns(RuntimeWarning, match="written.*half of it"):
                check_add(memory, model, some, some)
        check_search(memory, model, queries, 9)
        assert index.leaves is None
        check_add(memory, model, some, some)
        check_search(memory, model, queries, 9)
    check_entries(memory, model)


@pytest.mark.scann
def test_a_write_that_fails_has_its_tree_built_anew(trees, monkeypatch):
    memory, model = pair("scann", 8, 1000)
    keys, queries = clustered(1, 900, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys[:, :800], keys[:, :800])
    memory.search(queries, 9)
    with monkeypatch.context() as patch:
        fail_in_the_midst(patch)
        with pytest.warns(RuntimeWarning, match="written.*half of it"):
            check_add(memory, model, keys[:, 800:], keys[:, 800:])
    assert index_of(memory).leaves is not None
    check_search(memory, model, queries, 9, is_exact=False)
    assert memory.recall(queries, top_k=9) >= 0.92


@pytest.mark.scann
def test_a_new_tree_that_what_came_meanwhile_breaks(held, monkeypatch):
    began, go = held
    memory, model = beside("dot")
    keys, queries = clustered(1, 900, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys[:, :600], keys[:, :600])
    assert began.wait(60)
    check_add(memory, model, keys[:, 600:], keys[:, 600:])
    check_search(memory, model, queries, 9)
    with monkeypatch.context() as patch:
        fail_in_the_midst(patch)
        with pytest.warns(RuntimeWarning, match="built a tree.*half of it"):
            go.set()
            memory.wait()
    check_search(memory, model, queries, 9)
    check_entries(memory, model)


@pytest.mark.scann
def test_a_write_that_fails_where_warnings_are_errors(held, monkeypatch):
    began, go = held
    memory, model = beside("l2")
    keys = clustered(1, 700, 8)
    check_add(memory, model, keys[:, :600], keys[:, :600])
    assert began.wait(60)
    memory.search(keys[:, :9], 9)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        fail_in_the_midst(patch)
        with contextlib.suppress(RuntimeWarning):
            memory.add(keys[:, 600:], keys[:, 600:])
    model.add(keys[:, 600:], keys[:, 600:])
    go.set()
    memory.wait()
    check_entries(memory, model)
    right, wanted = check_search(
        memory, model, keys[:, 600:], 9, is_exact=False
    )
    assert right / wanted > 0.92


def run_threads(functions):
    with futures.ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def test_many_threads(store, monkeypatch):
    """All add, search and clear at once; a value is twice its key."""
    monkeypatch.setattr(tuning, "FLAT", 200)
    memory = KNNMemory(
        4, 600, num_rows=2, search_method=SEARCH[store], keep_statistics=True
    )
    end = time.monotonic() + 0.7
    done = collections.Counter()

    def work(kind, seed):
        rng = np.random.default_rng(seed)
        while time.monotonic() < end:
            row = int(rng.integers(2))
            some = clustered(1, 60, 4, seed=rng.integers(1 << 30))
            if kind == "add":
                slots = memory.add(some, 2 * some, rows=[row])
                assert (slots >= 0).all()
            elif kind == "clear":
                memory.clear([row])
                time.sleep(0.2)
            elif kind == "look":
                keys, values = memory.entries(row)
                assert (values == 2 * keys).all()
                hits, age, since = memory.statistics(row)
                assert (0 <= since).all() and (since <= age).all()
                assert 0 <= memory.size()[row] <= 600
                time.sleep(0.02)
            else:
                found = memory.search(some, 7, rows=[row])
                assert (found.values == 2 * found.keys).all()
                assert (found.mask == (found.indices >= 0)).all()
                products = (found.keys * some[:, :, None]).sum(-1)
                wrong = np.abs(products - found.scores) > 1e-2
                assert not (wrong & found.mask).any()
            done[kind] += 1

    kinds = ["add", "add", "search", "search", "clear", "look"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run_threads(
            [
                functools.partial(work, kind, seed)
                for seed, kind in enumerate(kinds)
            ]
        )
        memory.wait()
    assert len(done) == 4, done
    for row in range(2):
        keys, values = memory.entries(row)
        assert (values == 2 * keys).all()
    assert memory.recall(top_k=7) > 0.9


# What is wrong, and what is odd. In a process of its own for ScaNN, which may
# bring it down.

CASES = {}


def case(function):
    CASES[function.__name__.replace("_", "-")] = function
    return function


def filled(store, **options):
    """Two rows of two entries, and the model."""
    memory, model = pair(store, 3, 5, num_rows=2, value_dim=2, **options)
    keys, values = random(2, 2, 3), random(2, 2, 2, seed=1)
    check_add(memory, model, keys, values)
    return memory, model


def refuses(call, wanted, received):
    """A ValueError says what was wanted, and what arrived."""
    pattern = re.compile(f"{wanted}.* Received: .*{received}", re.DOTALL)
    try:
        call()
    except ValueError as error:
        assert pattern.search(str(error)), (str(error), pattern.pattern)
    else:
        raise AssertionError(f"not refused: {pattern.pattern}")


def with_one(value, *shape, dtype="float32"):
    array = np.ones(shape, dtype)
    array[-1, -1, -1] = value
    return array


NOT_NUMBERS = {
    "complex": np.ones((2, 3, 3), "complex64"),
    "object": np.ones((2, 3, 3), object),
    "text": np.full((2, 3, 3), "1"),
    "bool": np.ones((2, 3, 3), bool),
    "date": np.zeros((2, 3, 3), "M8[s]"),
}
WRONG_ROWS = {
    "twice": [1, 1],
    "negative": [-1],
    "too-large": [2],
    "float": [0.0],
    "text": ["0"],
    "scalar": 0,
    "nested": [[0, 1]],
    "short-bools": [True],
    "long-bools": [True, False, True],
    "scalar-bool": True,
    "ragged": [[0], [0, 1]],
    "huge": [1 << 70],
}


def dashed(shape):
    return "x".join(map(str, shape)) or "scalar"


def wrong_arguments():
    """Names, calls on a memory, and what the errors say."""
    keys, values = np.ones((2, 3, 3), "f4"), np.ones((2, 3, 2), "f4")
    queries = keys

    def add(**changes):
        named = {"keys": keys, "values": values, **changes}
        return lambda memory: memory.add(**named)

    def search(**changes):
        named = {"queries": queries, "top_k": 2, **changes}
        return lambda memory: memory.search(**named)

    for number in (np.nan, np.inf, -np.inf, 1e20, -1.01e15):
        told = re.escape(str(float(np.float32(number))))
        told += r" in row 1, at \(1, 2, \d"
        new = with_one(number, 2, 3, 3)
        yield f"add-keys-{number}", add(keys=new), "`keys` .*finite", told
        yield f"search-{number}", search(queries=new), "`queries` .*fini", told
        new = with_one(number, 2, 3, 2)
        yield f"add-values-{number}", add(values=new), "`values` .*fini", told
    far = with_one(1e300, 2, 3, 3, dtype="float64")
    yield "add-1e300", add(keys=far), "`keys` .*finite", "1e\\+300 in row 1"
    large = with_one(3 << 60, 2, 3, 3, dtype="int64")
    yield "add-large-ints", add(keys=large), "`keys` .*within", "in row 1"
    yield (
        "row-of-a-nan",
        lambda memory: memory.add(
            with_one(np.nan, 1, 1, 3), np.ones((1, 1, 2)), rows=[1]
        ),
        "`keys` .*finite",
        r"nan in row 1, at \(0, 0, 2\)",
    )
    for shape in ((2, 3), (2, 3, 4), (1, 3, 3), (3, 3, 3), (2, 3, 3, 1), (3,)):
        new, told = np.ones(shape, "f4"), re.escape(f"shape {shape}, rows=[0")
        yield (
            f"add-keys-{dashed(shape)}",
            add(keys=new),
            r"`keys` .*\(2, n, 3\)",
            told,
        )
    for shape in ((2, 3, 3), (2, 2, 2), (1, 3, 2), (2, 3), (2, 3, 2, 1), ()):
        new, told = np.ones(shape, "f4"), re.escape(f"shape {shape}, rows=[0")
        wanted = r"`values` .*\(2, 3, 2\)"
        yield f"add-values-{dashed(shape)}", add(values=new), wanted, told
    for shape in ((2, 3, 4), (1, 3, 3), (3, 3, 3), (3,), (2, 0), ()):
        new, told = np.ones(shape, "f4"), re.escape(f"shape {shape}, rows=[0")
        wanted = r"`queries` .*\(2, \.\.\., 3\)"
        yield f"search-{dashed(shape)}", search(queries=new), wanted, told
    yield "add-no-values", add(values=None), "`values` must", "shape ()"
    yield "add-no-keys", add(keys=None), "`keys` must", "shape ()"
    ragged = [[[1.0] * 3] * 3, [[1.0] * 3] * 2]
    yield "add-ragged", add(keys=ragged), "`keys` must be an array", "list"
    for name, new in NOT_NUMBERS.items():
        told = re.escape(f"dtype {new.dtype}")
        yield f"add-{name}", add(keys=new), "`keys` .*real numbers", told
        new_values = new[..., :2]
        wanted = "`values` .*real numbers"
        yield f"add-values-{name}", add(values=new_values), wanted, told
        wanted = "`queries` .*real numbers"
        yield f"search-{name}", search(queries=new), wanted, told
    for name, rows in WRONG_ROWS.items():
        told = "list" if name == "ragged" else "num_rows=2"
        for of, function in {
            "add": add(rows=rows),
            "search": search(rows=rows),
            "clear": lambda memory, rows=rows: memory.clear(rows),
            "recall": lambda memory, rows=rows: memory.recall(rows=rows),
        }.items():
            yield f"{of}-rows-{name}", function, "`rows` must", told
    one = r"`keys` .*\(1, n, 3\)"
    yield (
        "add-one-of-rows",
        add(rows=[1]),
        one,
        r"shape \(2, 3, 3\), rows=\[1\]",
    )
    for row in (2, -1, 0.0, "text", None):
        for name in ("entries", "statistics"):
            yield (
                f"{name}-{row}",
                lambda memory, row=row, name=name: getattr(memory, name)(row),
                "`rows` must",
                "num_rows=2",
            )
    for mask in (
        np.ones((2, 2), bool),
        np.ones((2, 3, 1), bool),
        np.ones((2, 3), int),
        np.ones((2, 3)),
        True,
        [1, 2],
    ):
        array = np.asarray(mask)
        told = re.escape(f"shape {array.shape}, dtype {array.dtype}")
        name = f"add-mask-{dashed(array.shape)}-{array.dtype}"
        yield name, add(mask=mask), r"`mask` .*\(2, 3\) bool", told
    for number in (0, -1, 1.5, True, "3", None, np.array([1])):
        told = re.escape(f"{number!r}")
        call = search(top_k=number)
        yield f"top-k-{number}", call, "`top_k` must be an integer", told
        for name in ("top_k", "sample"):
            yield (
                f"recall-{name}-{number}",
                lambda memory, more={name: number}: memory.recall(**more),
                f"`{name}` must be an integer",
                told,
            )


def check_refused(memory, model, call, wanted, received):
    refuses(lambda: call(memory), wanted, received)
    check_entries(memory, model)
    check_statistics(memory, model)


def check_goes_on(memory, model):
    """What comes next is as if nothing had been."""
    queries = random(2, 3, 3)
    check_search(memory, model, queries, 9)
    check_add(memory, model, random(2, 4, 3), random(2, 4, 2))
    check_search(memory, model, queries, 9)
    check_entries(memory, model)
    check_statistics(memory, model)


@case
def refusals_one_after_another(store):
    memory, model = filled(store, of_memory={"keep_statistics": True})
    check_search(memory, model, random(2, 3, 3), 9)
    for _, *refusal in wrong_arguments():
        check_refused(memory, model, *refusal)
    check_goes_on(memory, model)


def check_one_refusal(store, name):
    memory, model = filled(store, of_memory={"keep_statistics": True})
    check_search(memory, model, random(2, 3, 3), 9)
    for other, *refusal in wrong_arguments():
        if other == name:
            check_refused(memory, model, *refusal)
    check_goes_on(memory, model)


CASES.update(
    (name, functools.partial(check_one_refusal, name=name))
    for name, *_ in wrong_arguments()
)
ALONE = frozenset(name for name, *_ in wrong_arguments())


@contextlib.contextmanager
def with_trees(flat, hashed=1 << 30):
    """Builds trees beyond so many entries, come what may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "FLAT", flat)
        patch.setattr(tuning, "HASHED", hashed)
        patch.setattr(tuning, "WORTH", 1e9)
        yield


@case
def empty(store):
    for similarity in SIMILARITIES:
        memory, model = pair(store, 3, 5, num_rows=2, similarity=similarity)
        queries = random(2, 2, 3)
        check_search(memory, model, queries, 2)
        assert memory.recall() == memory.recall(queries) == 1.0
        check_add(memory, model, random(2, 2, 3), random(2, 2, 3))
        memory.clear()
        model.clear()
        check_search(memory, model, queries, 2)
        check_add(memory, model, random(2, 0, 3), random(2, 0, 3))
        check_search(memory, model, queries, 7)
        memory.clear()
        memory.wait()
        check_entries(memory, model)


@case
def more_asked_for_than_there_is(store):
    memory, model = filled(store)
    for top_k in (2, 3, 5, 6, 100):
        check_search(memory, model, random(2, 3, 3), top_k)
    check_search(memory, model, random(2, 3, 3), np.int64(3))


@case
def zeros_have_no_direction(store):
    memory, model = pair(store, 3, 9, similarity="cosine")
    keys = random(1, 4, 3)
    keys[0, 1:3] = 0.0
    check_add(memory, model, keys, keys)
    queries = random(1, 3, 3)
    queries[0, 1] = 0.0
    check_search(memory, model, queries, 4)
    found = memory.search(queries, 4)
    assert (found.scores[0, 1] == 0.0).all() and found.mask.all()
    assert (found.scores[np.isin(found.indices, [1, 2])] == 0.0).all()


@case
def keys_that_are_the_same(store):
    for similarity in SIMILARITIES:
        memory, model = pair(store, 3, 9, similarity=similarity)
        keys, values = np.full((1, 7, 3), 0.3, "f4"), random(1, 7, 3)
        for _ in range(2):
            check_add(memory, model, keys, values)
            for top_k in (1, 5, 8):
                check_search(memory, model, random(1, 4, 3), top_k)


@case
def no_queries(store):
    memory, model = filled(store)
    for shape in ((2, 0, 3), (2, 0, 4, 3), (2, 4, 0, 3)):
        check_search(memory, model, np.zeros(shape, "f4"), 2)


@case
def many_queries(store):
    memory, model = filled(store)
    check_search(memory, model, random(2, 1500, 3), 1)


@case
def the_smallest(store):
    for similarity in SIMILARITIES:
        memory, model = pair(store, 1, 1, similarity=similarity)
        for number in (0.0, 1.0, -2.0):
            some = np.full((1, 1, 1), number, "f4")
            check_add(memory, model, some, some)
            check_search(memory, model, some, 1)
            check_search(memory, model, some[0], 2)


MAGNITUDES = {"huge": (1e15,), "tiny": (1e-30,), "both": (1e15, 1e-30, 0.0)}
MAGNITUDES["least"] = (3e-38, 1e-14)


def check_cosines(found, queries, is_exact):
    """They are right, and none is beyond 1."""
    scores, mask = found.scores[0], found.mask[0]
    assert (np.abs(scores[mask]) <= 1).all()
    keys, queries = found.keys[0].astype("float64"), queries.astype("float64")
    lengths = np.linalg.norm(keys, axis=-1)
    lengths *= np.linalg.norm(queries, axis=-1)[:, None]
    exact = np.einsum("qkd,qd->qk", keys, queries)
    exact /= np.where(lengths > 0, lengths, 1)
    np.testing.assert_allclose(scores[mask], exact[mask], atol=1e-6)
    near = is_exact & (lengths[:, 0] > 0)  # of which an equal key is found
    np.testing.assert_allclose(scores[near, 0], 1, atol=1e-6)


def check_magnitudes(store, magnitudes, n):
    rng = np.random.default_rng(4)
    for similarity in SIMILARITIES:
        memory = KNNMemory(
            3,
            n,
            similarity=similarity,
            search_method=SEARCH[store],
            background=False,
        )
        keys = rng.choice([-1.0, -0.5, 0.5, 1.0], size=(1, n, 3))
        keys = (keys * rng.choice(magnitudes, size=(1, n, 1))).astype("f4")
        for _ in range(2):
            memory.add(keys, keys)
            found = memory.search(keys[:, ::-1], 7)
            assert (
                found.mask.any() and np.isfinite(found.scores[found.mask]).all()
            )
            assert (found.scores[found.mask] < np.inf).all()
            assert (found.keys == found.values).all()
            assert 0.0 <= memory.recall() <= 1.0
            if similarity == "cosine":
                check_cosines(found, keys[0, ::-1], n <= tuning.FLAT)
        assert memory.entries()[0].tobytes() == keys[0].tobytes()


for _name, _numbers in MAGNITUDES.items():

    @case
    def _of(store, numbers=_numbers):
        check_magnitudes(store, numbers, 50)

    @case
    def _tree(store, numbers=_numbers):
        with with_trees(100):
            check_magnitudes(store, numbers, 200)

    CASES[f"magnitudes-{_name}"] = CASES.pop("-of")
    CASES[f"magnitudes-{_name}-in-a-tree"] = CASES.pop("-tree")


def check_tree(store, keys, similarities):
    """A tree of any keys at all, which are then written once more."""
    n = keys.shape[1]
    for similarity in similarities:
        dim = keys.shape[2]
        memory, model = pair(store, dim, n, similarity=similarity)
        check_add(memory, model, keys, keys)
        queries = keys[:, :: -(-n // 20)]
        for top_k in (1, 7, n):
            check_search(memory, model, queries, top_k, is_exact=False)
        for begin in range(0, n, -(-n // 3)):
            some = keys[:, begin : begin + 30]
            check_add(memory, model, some, some)
            check_search(memory, model, queries, 7, is_exact=False)
        check_entries(memory, model)
        if store == "scann" and n > tuning.FLAT:
            assert index_of(memory).leaves


TREES = {
    "one-wide": random(1, 301, 1),
    "constant": np.full((1, 320, 3), 0.7, "f4"),
    "zeros": np.zeros((1, 320, 3), "f4"),
    "two-points": np.where(
        random(1, 320, 1) > 0, random(3), -random(3, seed=2)
    ),
    "points-of-one-axis": random(1, 320, 1) * np.eye(3, dtype="f4")[1],
    "no-clusters": random(1, 320, 40),
}


def check_kind_of_tree(store, hashed, *arguments):
    with with_trees(300, hashed):
        check_tree(store, *arguments)


for _name, _keys in TREES.items():
    for _kind, *_arguments in (
        ("tree", 1 << 30, _keys, SIMILARITIES),
        ("compressed", 300, _keys, SIMILARITIES),
    ):
        CASES[f"{_kind}-{_name}"] = lambda store, arguments=_arguments: (
            check_kind_of_tree(store, *arguments)
        )


@case
def one_at_a_time_over_all_borders(store):
    """From nothing over `FLAT` and around the end, again and again."""
    with with_trees(20):
        for similarity in SIMILARITIES:
            memory, model = pair(store, 2, 50, similarity=similarity)
            keys = clustered(1, 120, 2, number=5)
            for i in range(120):
                some = keys[:, i : i + 1]
                check_add(memory, model, some, some)
                if store == "scann" or i % 17 == 0:
                    is_exact = index_of(memory).size <= 20 or store == "ring"
                    check_search(memory, model, some, 3, is_exact=is_exact)
            check_entries(memory, model)


@case
def an_add_that_goes_around_the_end_of_a_tree(store):
    with with_trees(20):
        memory, model = pair(store, 2, 50)
        for seed, n in enumerate((45, 9, 49, 50, 51, 120, 1)):
            keys = clustered(1, n, 2, seed=seed, number=5)
            check_add(memory, model, keys, keys)
            check_search(memory, model, keys, 3, is_exact=store == "ring")
            check_entries(memory, model)


OF_TREES = re.compile("^tree-(?!constant)|^compressed|-in-a-tree")


def run_program(*arguments, **variables):
    return subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def outcomes():
    """What the process said of each case with ScaNN."""
    need_scann()
    done = run_program("cases", "scann")
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return done, {line[0]: line[-1] for line in lines if len(line) == 2}


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in ALONE and not OF_TREES.search(name)],
)
def test_odd_and_wrong_with_the_ring(name):
    CASES[name]("ring")


@pytest.mark.scann
@pytest.mark.parametrize("name", CASES)
def test_odd_and_wrong_with_scann(name, outcomes):
    done, said = outcomes
    assert said.get(name) == "ok", (done.returncode, done.stderr[-2000:])


@pytest.mark.scann
def test_no_crash(outcomes):
    done, said = outcomes
    assert done.returncode == 0 and set(said) == set(CASES), done.stderr[-2000:]


def run_cases(store):
    for name, function in CASES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                function(store)
            said = "ok"
        except Exception:
            said = repr(traceback.format_exc()[-900:])
        print(name, said, flush=True)


def test_l2_far_from_zero(store):
    memory, model = pair(store, 5, 90, similarity="l2")
    keys, queries = random(1, 70, 5) + 1e4, random(1, 11, 5, seed=1) + 1e4
    check_far(memory, model, keys, queries)


def test_l2_beside_one_key_far_away(store):
    memory, model = pair(store, 5, 90, similarity="l2")
    keys, queries = random(1, 70, 5), random(1, 11, 5, seed=1)
    keys[0, 7] = 1e6
    check_far(memory, model, keys, queries)


@pytest.mark.scann
def test_l2_where_the_first_keys_are_far_away():
    need_scann()
    memory, model = pair("scann", 5, 90, similarity="l2")
    check_add(memory, model, random(1, 4, 5), random(1, 4, 5))
    check_search(memory, model, random(1, 3, 5), 2)
    keys, queries = random(1, 70, 5) + 1e4, random(1, 11, 5, seed=1) + 1e4
    check_far(memory, model, keys, queries)


def check_far(memory, model, keys, queries):
    """Rounding is small beside the distances of near neighbours."""
    keys, queries = keys.astype("float32"), queries.astype("float32")
    check_add(memory, model, keys, keys)
    found = memory.search(queries, 7)
    truths, _ = model.scores(0, queries[0])
    best = np.sort(truths)[:, ::-1][:, :7]
    np.testing.assert_allclose(found.scores[0], best, rtol=1e-3)


OUT_OF_RANGE = [
    ("key_dim", [0, -1, 1.5, True, "3", None, [3]]),
    ("memory_size", [0, -1, 2.0, True, None, 1 << 31]),
    ("num_rows", [0, -1, 1.0, False, None]),
    ("value_dim", [-1, 2.0, True, "2"]),
    ("similarity", ["euclid", None, 3, "DOT"]),
    ("search_method", ["faiss", None, True]),
    ("target_recall", [-0.1, 1.1, np.nan, np.inf, "1", None, True]),
    ("background", [1, None, "yes"]),
    ("keep_statistics", [0, None, "no"]),
]


@pytest.mark.parametrize("name, values", OUT_OF_RANGE)
def test_arguments_out_of_range(name, values):
    for value in values:
        options = {"key_dim": 3, "memory_size": 5, "search_method": "exact"}
        options[name] = value
        told = re.escape(f"{name}={value!r}")
        make = functools.partial(KNNMemory, **options)
        refuses(make, f"`{name}` must be", told)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_target_of_nothing_or_all(value):
    with pytest.raises(ValueError, match="`target_recall`"):
        KNNMemory(3, 5, search_method="exact", target_recall=value)


@pytest.mark.parametrize("row", [True, False])
def test_a_bool_is_no_row(row):
    memory = KNNMemory(3, 5, search_method="exact", keep_statistics=True)
    for call in (memory.entries, memory.statistics):
        refuses(functools.partial(call, row), "`row", repr(row))


def test_a_memory_says_what_it_is(store):
    memory = KNNMemory(
        3, 5, value_dim=0, similarity="l2", search_method=SEARCH[store]
    )
    assert repr(memory) == (
        "KNNMemory(key_dim=3, memory_size=5, num_rows=1, value_dim=0, "
        f"similarity='l2', search_method={SEARCH[store]!r}, target_recall=0.95)"
    )


# Which store.


@pytest.mark.scann
@pytest.mark.parametrize("has, chosen", [(True, "ring"), (False, "scann")])
def test_the_store_that_is_chosen(has, chosen, monkeypatch):
    need_scann()
    monkeypatch.setattr(knn_memory, "has_accelerator", lambda: has)
    assert KNNMemory(3, 5).search_method == SEARCH[chosen]
    assert KNNMemory(3, 5, search_method="auto").search_method == SEARCH[chosen]
    for store in ("ring", "scann"):
        assert (
            KNNMemory(3, 5, search_method=SEARCH[store]).search_method
            == SEARCH[store]
        )


def test_a_store_is_chosen_on_any_backend():
    assert KNNMemory(3, 5).search_method in ("exact", "approximate")


def run_without_scann(folder):
    sys.modules["scann"] = None
    for reason in ("halted; None in sys.modules", "RuntimeError: no such CPU"):
        for chosen in ("auto", "ring"):
            memory, model = pair(chosen, 3, 5)
            assert memory.search_method == "exact"
            check_add(memory, model, random(1, 4, 3), random(1, 4, 3))
            check_search(memory, model, random(1, 2, 3), 3)
        memory.save(f"{folder}/memory")
        for make in (
            lambda: KNNMemory(3, 5, search_method="approximate"),
            lambda: KNNMemory.load(
                f"{folder}/memory", search_method="approximate"
            ),
        ):
            try:
                make()
            except ImportError as error:
                assert "pip install scann==1.4.2" in str(error), error
                assert reason in str(error), error
                print("refused")
        model.load()
        check_entries(KNNMemory.load(f"{folder}/memory"), model)
        sys.modules.pop("scann", None)
        sys.path.insert(0, folder)
        tuning.import_error.cache_clear()


def test_where_scann_is_not_there(tmp_path):
    """Or there, and does not work."""
    (tmp_path / "scann").mkdir()
    text = "raise RuntimeError('no such CPU')"
    (tmp_path / "scann" / "__init__.py").write_text(text)
    done = run_program("without-scann", tmp_path, KERAS_BACKEND="numpy")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused"] * 4


# Files.

SIZES_OF_FILE = {"key_dim": 3, "memory_size": 7, "num_rows": 3, "value_dim": 2}


def files(folder):
    """All but what SQLite keeps while a memory is open."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix not in (".sqlite-wal", ".sqlite-shm")
    }


def fill(memory, *others, n=5, seed=0):
    keys = random(3, n, 3, seed=seed)
    values = random(3, n, memory.value_dim, seed=seed + 1)
    for one in (memory, *others):
        one.add(keys, values)


def stored(folder, mode="a", **options):
    return KNNMemory.open(folder, mode, search_method="exact", **options)


def loaded(folder):
    return KNNMemory.load(folder, search_method="exact")


@pytest.mark.parametrize("similarity, value_dim", [("dot", 0), ("l2", 2)])
def test_what_is_saved_is_loaded(store, similarity, value_dim, tmp_path):
    sizes = 3, 7, 3, value_dim
    memory, model = pair(store, *sizes, similarity=similarity)
    other = "ring" if tuning.import_error() else "scann"
    other = {"ring": other, "scann": "ring"}[store]
    folder = tmp_path / "new" / "memory"
    queries = random(3, 2, 3)
    for step in range(4):  # nothing; some; around the end; cleared rows
        if step:
            fill(memory, model, n=4, seed=step)
        if step == 3:
            memory.clear([0, 2])
            model.clear([0, 2])
            arrays = random(1, 2, 3), random(1, 2, value_dim)
            check_add(memory, model, *arrays, rows=[2])
        memory.save(folder)
        copy = KNNMemory.load(
            folder, search_method=SEARCH[other], background=False
        )
        assert (
            copy._config() == memory._config()
            and copy.search_method == SEARCH[other]
        )
        check_entries(copy, model)
        # It is not connected with the file, and goes on.
        _, of_copy = pair("ring", *sizes, similarity=similarity)
        of_copy.rows = list(model.rows)
        of_copy.load()
        check_search(copy, of_copy, queries, 9)
        fill(copy, of_copy, n=3, seed=9)
        check_search(copy, of_copy, queries, 9)
        check_entries(memory, model)
        check_search(memory, model, queries, 9)
    assert sorted(files(folder)) == ["lock", "memory.sqlite"]


def test_what_is_saved_takes_the_place_of_what_was_there(tmp_path):
    old = KNNMemory(2, 500, num_rows=5, similarity="l2", search_method="exact")
    old.add(random(5, 400, 2), random(5, 400, 2))
    old.save(tmp_path)
    memory, model = pair("ring", **SIZES_OF_FILE)
    fill(memory, model)
    reader = stored(tmp_path, "r")
    memory.save(str(tmp_path))
    check_entries(loaded(tmp_path), model)
    assert len(files(tmp_path)["memory.sqlite"]) == 4 * 4096
    # Who had the old one open has it still.
    for _ in range(2):
        with pytest.raises(ValueError, match='"key_dim": 2'):
            reader.refresh()
        assert contents(reader) == contents(old)


def test_statistics_begin_with_a_file(tmp_path):
    memory, model = pair("ring", **SIZES_OF_FILE)
    fill(memory, model)
    memory.save(tmp_path)
    kept = {"search_method": "exact", "keep_statistics": True}
    copy = KNNMemory.load(tmp_path, **kept)
    check_statistics(copy, model)
    check_search(copy, model, random(3, 2, 3), 2)
    check_statistics(copy, model)


def test_no_memory_to_load(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        for call in (KNNMemory.load, stored, KNNMemory.open):
            with pytest.raises((FileNotFoundError, NotADirectoryError)):
                call(folder)
    assert list(files(tmp_path)) == ["file"]
    with pytest.raises(ValueError, match="`mode` must .*mode='w'"):
        stored(tmp_path, "w")
    with pytest.raises(ValueError, match="`key_dim` must .*key_dim=0"):
        stored(tmp_path / "new", key_dim=0, memory_size=5)
    with pytest.raises(TypeError, match="color"):
        stored(tmp_path / "new", key_dim=3, memory_size=5, color="red")
    assert not (tmp_path / "new").exists()


DAMAGES = {
    "cut": lambda data: data[:-3],
    "a-bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_is_refused(damage, tmp_path):
    memory, model = pair("ring", **SIZES_OF_FILE)
    fill(memory, model)
    memory.save(tmp_path)
    path = tmp_path / "memory.sqlite"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = files(tmp_path)
    for call in (loaded, stored, lambda x: stored(x, **SIZES_OF_FILE)):
        with pytest.raises(ValueError, match="memory.sqlite.*Received: "):
            call(tmp_path)
    assert files(tmp_path) == before
    path.unlink()
    memory.save(tmp_path)
    check_entries(loaded(tmp_path), model)


SAME = {**SIZES_OF_FILE, "similarity": "dot", "value_dtype": "float32"}
OF_OTHERS = {
    "other-sizes": ({"key_width": 2}, []),
    "a-size-more": ({**SAME, "heads": 2}, []),
    "a-size-less": (SIZES_OF_FILE, []),
    "a-size-of-another-kind": ({**SAME, "key_dim": "3"}, []),
    "no-such-row": (SAME, [(3, 3, 2, 1.0)]),
    "no-row": (SAME, [(-1, 3, 2, 1.0)]),
    "another-width": (SAME, [(0, 5, 2, 1.0)]),
    "one-wide": (SAME, [(0, 1, 1, 1.0)]),
    "a-nan": (SAME, [(0, 3, 2, np.nan)]),
    "too-large": (SAME, [(0, 3, 2, 1e20)]),
}


@pytest.mark.parametrize(
    "name",
    [name for name in OF_OTHERS],
)
def test_a_store_of_something_else_is_refused(name, tmp_path):
    config, operations = OF_OTHERS[name]
    operations = [
        Operation(
            row,
            np.full((2, width), number, "float32"),
            np.full((2, value_width), number, "float32"),
        )
        for row, width, value_width, number in operations
    ]
    Store(tmp_path, "a", config, operations).close()
    with pytest.raises(ValueError, match="Received: "):
        loaded(tmp_path)


def test_sizes_of_numpy_are_saved(tmp_path):
    memory = KNNMemory(np.int64(3), np.int32(7), search_method="exact")
    memory.add(random(1, 2, 3), random(1, 2, 3))
    memory.save(tmp_path)
    assert contents(loaded(tmp_path)) == contents(memory)


def test_a_memory_is_made_and_opened_again(tmp_path):
    folder = tmp_path / "of" / "it"
    model = Model(**SIZES_OF_FILE)
    with stored(folder, **SIZES_OF_FILE) as memory:
        fill(memory, model)
        check_entries(memory, model)
        check_entries(stored(folder, "r"), Model(**SIZES_OF_FILE))
        memory.flush()
        check_entries(stored(folder, "r"), model)
    some = {"key_dim": 3, "memory_size": 7, "similarity": "dot"}
    for options in ({}, some, SIZES_OF_FILE):
        with stored(folder, **options) as memory:
            check_entries(memory, model)
            fill(memory, model, seed=len(options))
            memory.clear([1])
            model.clear([1])
            check_search(memory, model, random(3, 2, 3), 3)
        with stored(folder, "r", **options) as memory:
            check_entries(memory, model)
    before = files(folder)
    for name, value, shown in (
        ("key_dim", 4, 4),
        ("memory_size", 8, 8),
        ("num_rows", 1, 1),
        ("value_dim", None, 3),
        ("similarity", "l2", "l2"),
    ):
        told = f"`{name}` must .* {name}={shown!r}, and {name}="
        told += f"{SAME[name]!r} in {re.escape(str(folder))}"
        for mode in ("a", "r"):
            with pytest.raises(ValueError, match=told):
                stored(folder, mode, **{**SIZES_OF_FILE, name: value})
        assert files(folder) == before
    with stored(folder) as memory:  # it was let go each time
        check_entries(memory, model)


def test_one_writer_and_readers(tmp_path):
    model, seen = Model(**SIZES_OF_FILE), Model(**SIZES_OF_FILE)
    queries = random(3, 2, 3)
    memory = stored(tmp_path, **SIZES_OF_FILE)
    for call in (stored, memory.save, KNNMemory(**SIZES_OF_FILE).save):
        with pytest.raises(ValueError, match="Only one process at a time"):
            call(tmp_path)
    reader = stored(tmp_path, "r")
    assert reader.refresh() is False
    for step in range(4):
        fill(memory, model, seed=step)
        if step % 2:
            memory.clear([step % 3])
            model.clear([step % 3])
        assert reader.refresh() is False
        memory.flush()
        check_entries(reader, seen)
        assert reader.refresh() is True
        seen.rows = [list(entries) for entries in model.rows]
        check_entries(reader, seen)
        check_search(memory, model, queries, 3)
        found, other = (one.search(queries, 3) for one in (reader, memory))
        assert all((a == b).all() for a, b in zip(found, other))
    memory.flush()
    assert reader.refresh() is False
    refuses(lambda: fill(reader), "open for appending", "mode='r'")
    refuses(reader.clear, "open for appending", "mode='r'")
    refuses(reader.flush, "open for appending", "mode='r'")
    refuses(memory.refresh, "open for reading", "mode='a'")
    check_entries(reader, seen)
    # Kept elsewhere, it is a memory of its own.
    reader.save(tmp_path / "copy")
    check_entries(loaded(tmp_path / "copy"), seen)
    memory.close()
    with stored(tmp_path) as memory:
        check_entries(memory, model)
        check_search(reader, model, queries, 3)
    reader.close()


def test_a_memory_without_a_folder():
    memory, model = pair("ring", **SIZES_OF_FILE)
    refuses(memory.flush, "`flush` needs", "mode=None")
    refuses(memory.refresh, "`refresh` needs", "mode=None")
    memory.close()
    memory.close()
    fill(memory, model)
    with memory as same:
        assert same is memory
    check_entries(memory, model)


def test_a_memory_that_is_closed(tmp_path):
    model = Model(**SIZES_OF_FILE)
    memory = stored(tmp_path / "a", **SIZES_OF_FILE)
    fill(memory, model)
    memory.close()
    memory.close()
    check_search(memory, model, random(3, 2, 3), 3)
    check_entries(memory, model)
    refuses(lambda: fill(memory), "open for appending", "mode='closed'")
    refuses(memory.clear, "open for appending", "mode='closed'")
    refuses(memory.flush, "`flush` needs", "mode='closed'")
    refuses(memory.refresh, "`refresh` needs", "mode='closed'")
    memory.save(tmp_path / "b")
    check_entries(loaded(tmp_path / "b"), model)
    # What an error ends is kept.
    with pytest.raises(ZeroDivisionError), stored(tmp_path / "a") as memory:
        fill(memory, model, seed=5)
        raise ZeroDivisionError
    with stored(tmp_path / "a", "r") as memory:
        check_entries(memory, model)
    check_search(memory, model, random(3, 2, 3), 3)
    refuses(memory.refresh, "`refresh` needs", "mode='closed'")


@contextlib.contextmanager
def full_disk(room):
    """No file grows beyond so many bytes."""
    kind = resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_a_full_disk(is_rewritten, tmp_path, monkeypatch):
    sizes = {**SIZES_OF_FILE, "memory_size": 4000}
    model = Model(**sizes)
    memory = stored(tmp_path, **sizes)
    fill(memory, model)
    memory.flush()
    before = contents(memory)
    memory.clear([1])
    model.clear([1])
    if is_rewritten:
        monkeypatch.setattr(durable, "FILE_LEAST", 0)
        monkeypatch.setattr(durable, "FILE_FACTOR", 0)
    for seed in range(2):
        fill(memory, model, n=1000, seed=seed)
        for call in (memory.flush, memory.flush, memory.close):
            with full_disk(40_000), pytest.raises(OSError, match="needs room"):
                call()
        assert contents(loaded(tmp_path)) == before
        check_entries(memory, model)
        check_search(memory, model, random(3, 2, 3), 3)
        with pytest.raises(ValueError, match="Only one process"):
            stored(tmp_path)
        memory.flush()
        before = contents(memory)
        assert contents(loaded(tmp_path)) == before
    memory.close()
    check_entries(loaded(tmp_path), model)


def file_size(folder):
    return (folder / "memory.sqlite").stat().st_size


def test_a_file_does_not_grow_without_bound(tmp_path, monkeypatch):
    least = 1 << 22  # as much as SQLite keeps beside the file
    monkeypatch.setattr(durable, "FILE_LEAST", least)
    sizes = {
        "key_dim": 600,
        "memory_size": 400,
        "num_rows": 2,
        "value_dim": 400,
    }
    of_entries = 4 * (600 + 400) * 400 * 2
    with stored(tmp_path, **sizes) as memory, stored(tmp_path, "r") as reader:
        numbers = [0]
        for step in range(50):  # 20 times what there is room for
            memory.add(random(2, 160, 600, seed=step), random(2, 160, 400))
            memory.flush()
            assert reader.refresh()
            numbers.append(file_size(tmp_path))
        assert contents(reader) == contents(memory)
        assert of_entries < max(numbers) < 2 * of_entries + least
        assert sum(b < a for a, b in zip(numbers, numbers[1:])) > 5
        assert contents(loaded(tmp_path)) == contents(memory)
        monkeypatch.setattr(durable, "FILE_LEAST", 0)
        memory.clear()
        memory.flush()
        assert file_size(tmp_path) < 20_000
    assert contents(loaded(tmp_path)) == contents(memory)


def test_only_what_is_new_is_written(tmp_path):
    """What was overwritten or cleared before it was flushed is not."""
    model = Model(**SIZES_OF_FILE)
    with stored(tmp_path, **SIZES_OF_FILE) as memory:
        for step in range(100):
            fill(memory, model, seed=step)
        memory.clear([1])
        model.clear([1])
        memory.flush()
        fill(memory, model, n=2)
    with contextlib.closing(Store(tmp_path, "r")) as store:
        counts = [(x.row, len(x.keys)) for x in store.operations(3, 2, "f4")]
    clear = [(1, 0)]
    once = [(0, 7), (2, 7)]
    assert counts == [(-1, 0), *clear, *once, (0, 2), (1, 2), (2, 2)]
    check_entries(loaded(tmp_path), model)


def test_large_rows_are_stored_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "BLOCK", 45)  # two entries
    model = Model(**SIZES_OF_FILE)
    with stored(tmp_path, **SIZES_OF_FILE) as memory:
        fill(memory, model)
    with contextlib.closing(Store(tmp_path, "r")) as store:
        counts = [len(x.keys) for x in store.operations(3, 2, "f4")]
    assert counts == [0, *[2, 2, 1] * 3]
    check_entries(loaded(tmp_path), model)


def test_a_file_that_is_written_anew_beside_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "FILE_LEAST", 0)
    monkeypatch.setattr(durable, "FILE_FACTOR", 0)
    model = Model(**SIZES_OF_FILE)
    memory = stored(tmp_path, **SIZES_OF_FILE)
    with memory, stored(tmp_path, "r") as reader:
        for step in range(4):  # not full at any time
            fill(memory, model, n=2, seed=step)
            memory.flush()
            assert reader.refresh()
            check_entries(reader, model)
            if step == 2:
                memory.clear([0, 2])
                model.clear([0, 2])


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_a_reader_that_finds_damage(is_rewritten, tmp_path, monkeypatch):
    model = Model(**SIZES_OF_FILE)
    with stored(tmp_path, **SIZES_OF_FILE) as memory:
        fill(memory, model)
        memory.flush()
        reader = stored(tmp_path, "r")
        fill(memory, seed=3)
        if is_rewritten:
            monkeypatch.setattr(durable, "FILE_LEAST", 0)
            monkeypatch.setattr(durable, "FILE_FACTOR", 0)
    path = tmp_path / "memory.sqlite"
    data, last = path.read_bytes(), memory.entries(2)[1].tobytes()[-20:]
    assert data.count(last) == 1
    path.write_bytes(data.replace(last, bytes(20)))
    for _ in range(2):
        refuses(reader.refresh, "must be", "checksum")
        check_entries(reader, model)
    path.write_bytes(data)
    assert reader.refresh()
    assert contents(reader) == contents(memory)


def test_threads_that_add_and_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "FILE_LEAST", 20_000)
    sizes = {"key_dim": 3, "memory_size": 40, "num_rows": 3, "value_dim": 2}
    memory = stored(tmp_path, **sizes)

    def work(row):
        for step in range(60):
            n = step % 5
            arrays = random(1, n, 3, seed=step), random(1, n, 2)
            memory.add(*arrays, rows=[row])
            if step % 7 == row:
                memory.flush()
            if step % 29 == 11 + row:
                memory.clear([row])

    run_threads([functools.partial(work, row) for row in range(3)])
    memory.close()
    assert contents(loaded(tmp_path)) == contents(memory)
    assert all(size > 20 for size in memory.size())


# Processes that are killed.

SIZES_OF_KILLED = {**SIZES_OF_FILE, "memory_size": 20}


def act(memory, number):
    """The operation of that number, on a memory or a model."""
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
    """Steps the model on until it is as the memory; gives the number."""
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
    """A process that does it, and the end of a pipe that it tells through."""
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
    """Gives what it told."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it had ended by itself"
    with open(heard, "rb") as file:
        return file.read()


def run_kills(folder, number):
    durable.FILE_LEAST = 17_000  # four pages, and little more
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
    """Operations, times that the file was written anew, and refreshes."""
    one = {"KERAS_BACKEND": "numpy", "OPENBLAS_NUM_THREADS": "1"}
    done = run_program("kills", folder, number, **one)
    assert done.returncode == 0, done.stderr[-3000:]
    print(number, "kills; operations, rewrites, refreshes:", done.stdout)
    return map(int, done.stdout.split())


def test_writers_that_are_killed(tmp_path):
    operations, rewrites, news = kill_writers(tmp_path / "memory", 3)
    assert operations > 5 and rewrites and news


@pytest.mark.slow
def test_many_writers_that_are_killed(tmp_path):
    operations, rewrites, news = kill_writers(tmp_path / "memory", 60)
    assert operations > 1000 and rewrites > 10 and news > 30


# Any operations.

OPERATIONS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(
            ["add", "add", "add", "search", "search", "clear", "save"]
        ),
        strategies.integers(0, (1 << 32) - 1),
    ),
    min_size=1,
    max_size=15,
)


def sizes(most, least=1, rows=3):
    return strategies.fixed_dictionaries(
        {
            "key_dim": strategies.integers(1, 4),
            "memory_size": strategies.integers(least, most),
            "num_rows": strategies.integers(1, rows),
            "value_dim": strategies.integers(0, 3),
            "similarity": strategies.sampled_from(SIMILARITIES),
        }
    )


def anywhere(rng, shape):
    """Some are the same, and some 0."""
    vectors = rng.normal(size=shape)
    alike = rng.integers(-1, 2, size=shape) * (rng.random(shape[-1]) < 0.5)
    same = rng.random((*shape[:-1], 1)) < 0.2
    return np.where(same, alike, vectors).astype("float32")


def play(store, options, operations, draw, most, tally):
    """Operations on a memory and on a model. The tally counts the searches of
    trees, what they found, and what there was."""
    kept = {"keep_statistics": True}
    memory, model = pair(store, **options, of_memory=kept)
    dim, width, size = model.key_dim, model.value_dim, model.memory_size

    def is_exact(row):
        return store == "ring" or index_of(memory, row).leaves is None

    for name, seed in operations:
        rng = np.random.default_rng(seed)
        order = rng.permutation(model.num_rows)
        some = order[: rng.integers(1, model.num_rows + 1)]
        rows = [None, some, np.isin(np.sort(order), some)][rng.integers(3)]
        number = len(model.which(rows))
        if name == "add":
            n = rng.integers(0, 2 * size + 2)
            mask = rng.random((number, n)) < 0.7 if rng.random() < 0.5 else None
            keys = draw(rng, (number, n, dim))
            values = rng.normal(size=(number, n, width)).astype("float32")
            check_add(memory, model, keys, values, mask, rows)
        elif name == "search":
            axes = [(), (3,), (2, 2), (0,)][rng.integers(4)]
            queries = draw(rng, (number, *axes, dim))
            top_k = rng.integers(1, most or size + 3)
            has_tree = not all(map(is_exact, model.which(rows)))
            found = check_search(memory, model, queries, top_k, rows, is_exact)
            if has_tree or store == "ring" or most is None:
                tally += [has_tree, *found]
        elif name == "clear":
            memory.clear(rows)
            model.clear(rows)
        else:
            with tempfile.TemporaryDirectory() as folder:
                memory.save(folder)
                again = {
                    "search_method": SEARCH[store],
                    "background": False,
                    **kept,
                }
                memory = KNNMemory.load(folder, **again)
            model.load()
        check_entries(memory, model)
        check_statistics(memory, model)


def play_many(number, store, options, draw, most=None):
    """So many sequences of operations, the same ones if they are few."""
    done, tally = [], np.zeros(3)

    @hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=number < 100,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(options, OPERATIONS)
    def each(options, operations):
        done.append(len(operations))
        play(store, options, operations, draw, most, tally)

    each()
    assert len(done) >= number
    searches, right, wanted = tally
    print(f"{len(done)} sequences of {sum(done)} operations, {searches:.0f}")
    print(f"searches of trees, {right / wanted} of all entries found")
    return searches, right / wanted


FEW_OR_MANY = pytest.mark.parametrize(
    "number", [25, pytest.param(1000, marks=pytest.mark.slow)]
)


@FEW_OR_MANY
def test_any_operations(store, number):
    assert play_many(number, store, sizes(12), anywhere) == (0, 1.0)


@pytest.mark.scann
@FEW_OR_MANY
def test_any_operations_on_trees(number, trees, monkeypatch):
    monkeypatch.setattr(tuning, "FLAT", 30)
    centres = 3.0 * random(9, 4, seed=1)

    def around(rng, shape):
        chosen = centres[rng.integers(0, 9, size=shape[:-1]), : shape[-1]]
        return (chosen + 0.2 * rng.normal(size=shape)).astype("float32")

    options = sizes(160, least=60, rows=2)
    searches, found = play_many(number, "scann", options, around, 8)
    assert searches > number / 5
    # Some sixty neighbours, of trees that chance plants, or thousands.
    assert found >= (0.6 if number < 100 else 0.9)


PROGRAMS = {
    "cases": run_cases,
    "without-scann": run_without_scann,
    "kills": run_kills,
}

if __name__ == "__main__":
    _name, *_arguments = sys.argv[1:]
    PROGRAMS[_name](*_arguments)
