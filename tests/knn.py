"""Compares `KNNMemory` with a list of entries."""

import collections
import dataclasses
import math
import re
from concurrent import futures

import numpy as np
import pytest

from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory

TOLERANCE = 1e-5  # of scores, by the lengths of the vectors
SEARCH = {"ring": "exact", "scann": "approximate", "auto": "auto"}


def need_scann():
    reason = tuning.import_error()
    if reason is not None:
        pytest.skip(reason)


def random(*shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def clustered(rows, n, dim, seed=7, centers=1, number=40):
    """Vectors in clusters, which suit a tree; the centers have a fixed seed."""
    centers = 3.0 * random(number, dim, seed=centers)
    rng = np.random.default_rng(seed)
    chosen = centers[rng.integers(0, number, size=(rows, n))]
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
    """The expected memory: a list of entries for each row, oldest first."""

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
        self.longest = [0.0] * num_rows  # norm of an added key

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
        """Moves entries to the slots that they have after loading a file."""
        for row, entries in enumerate(self.rows):
            self.added[row] = len(entries)
            lengths = [np.linalg.norm(entry.key) for entry in entries]
            self.longest[row] = max(lengths, default=0.0)
            self.rows[row] = [
                Entry(slot, entry.key, entry.value)
                for slot, entry in enumerate(entries)
            ]

    def scores(self, row, queries):
        """(Q, n) similarities in float64, and (Q, 1) the scale of rounding."""
        shape = (-1, self.key_dim)
        keys = [entry.key for entry in self.rows[row]]
        keys = np.array(keys, "float64").reshape(shape)
        queries = queries.astype("float64")
        of_keys = np.linalg.norm(keys, axis=1)
        lengths = np.linalg.norm(queries, axis=1)[:, None]
        if self.similarity == "l2":
            squares = (queries[:, None] - keys) ** 2
            # ScaNN centers on a mean of keys that may be deleted by now.
            return -squares.sum(-1), (lengths + self.longest[row]) ** 2
        products = queries @ keys.T
        if self.similarity == "dot":
            return products, lengths * of_keys.max(initial=0.0)
        both = lengths * of_keys
        cosines = np.where(both > 0, products / np.where(both > 0, both, 1), 0)
        return cosines, np.ones_like(lengths)

    def search(self, row, slots):
        """Counts a search of a row that found these slots."""
        times = collections.Counter(slots)
        for entry in self.rows[row]:
            entry.age += 1
            entry.hits += times[entry.slot]
            found = times[entry.slot] > 0
            entry.age_since_hit = 0 if found else entry.age_since_hit + 1


def contents(memory):
    """For each row, the bytes of its keys and values, by age."""
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
    """Asserts that a search finds existing entries, and the nearest if exact.
    Returns how many of the nearest it found, and how many there are."""
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


def as_sets(mask, keys, values):
    """For each query, the set of (key, value) pairs found."""
    rows, queries, _ = mask.shape
    return [
        {
            (keys[i, j, k].tobytes(), values[i, j, k].tobytes())
            for k in np.flatnonzero(mask[i, j])
        }
        for i in range(rows)
        for j in range(queries)
    ]


def index_of(memory, row=0):
    """ScaNN's index of a row."""
    return memory._indexes[row]


def run_threads(functions):
    with futures.ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def refuses(call, wanted, received):
    """Asserts a ValueError that names the expected and the received value."""
    pattern = re.compile(f"{wanted}.* Received: .*{received}", re.DOTALL)
    try:
        call()
    except ValueError as error:
        assert pattern.search(str(error)), (str(error), pattern.pattern)
    else:
        raise AssertionError(f"not refused: {pattern.pattern}")


# Memories on a disk.

SIZES_OF_FILE = {"key_dim": 3, "memory_size": 7, "num_rows": 3, "value_dim": 2}


def stored(folder, mode="a", **options):
    return KNNMemory.open(folder, mode, search_method="exact", **options)


def loaded(folder):
    return KNNMemory.load(folder, search_method="exact")
