"""A memory of nearest neighbours equals a list of entries in every call."""

import collections
import contextlib
import copy
import functools
import pickle
import re
import sys
import threading
import time
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
from harness import golden
from keras import ops
from knn import SEARCH
from knn import as_sets
from knn import check_add
from knn import check_entries
from knn import check_search
from knn import check_statistics
from knn import clustered
from knn import contents
from knn import need_scann
from knn import pair
from knn import random
from knn import refuses
from knn import run_threads

from keras_memory import retrieval
from keras_memory.retrieval import knn_memory
from keras_memory.retrieval import ring as ring_module
from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory

# The memory equals the model.

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
def test_the_memory_equals_a_list_of_entries(store, sizes, similarity):
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
    # Queries with and without axes; `top_k` beyond the number of entries.
    look((3, 2, 1, 2), 2)
    look((3,), size + 2)
    # Some entries, some rows, in their own order.
    check_add(memory, model, *entries(3, 5), mask=rng.random((3, 5)) < 0.5)
    check_add(memory, model, *entries(2, 3), rows=[2, 0])
    look((2, 3), 4, rows=np.array([2, 1]))
    mask = np.array([[False] * 3, [True, False, True]])
    check_add(memory, model, *entries(2, 3), mask, np.array([1, 1, 0]) > 0)
    look((1, 2), 3, rows=[False, True, False])
    # No entries, no queries, no rows.
    check_add(memory, model, *entries(3, 0))
    check_add(memory, model, *entries(3, 2), mask=np.zeros((3, 2), bool))
    check_add(memory, model, *entries(0, 2), rows=[])
    look((3, 0), 2)
    look((3, 1, 0, 2), 2)
    # More entries than the memory holds, and around the end.
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


def test_searching_no_rows_is_empty(store):
    memory, model = pair(store, 3, 5, num_rows=2)
    check_search(memory, model, random(0, 4, 3), 3, rows=[])
    check_search(memory, model, random(0, 3), 3, rows=np.zeros(2, bool))
    assert memory.recall(random(0, 4, 3), rows=[]) == 1.0


def test_a_memory_of_one_row_works_with_a_row_axis(store):
    memory, model = pair(store, 3, 5)
    for n in (2, 4, 1):
        check_add(memory, model, random(1, n, 3, seed=n), random(1, n, 3))
        check_search(memory, model, random(1, 4, 3), 3, rows=[0])
    check_entries(memory, model)


def test_a_memory_of_one_row_works_without_a_row_axis(store):
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
def test_return_keys_and_return_values_must_be_bools(store, name):
    memory = KNNMemory(3, 5, search_method=SEARCH[store])
    told = f"`{name}` must be True or False.*Received"
    with pytest.raises(ValueError, match=told):
        memory.search(random(1, 2, 3), 1, **{name: random(1, 2, 3)})


# Values of other dtypes.

ID = (1 << 24) + 1  # the first integer that float32 rounds
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
        with pytest.raises(
            ValueError, match="`value_dtype` must match the stored"
        ):
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


def test_searches_are_padded_to_a_few_shapes(monkeypatch):
    """Some backends compile each shape, and keep the code."""
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


def test_add_returns_the_slots_that_searches_report(store):
    memory = KNNMemory(3, 7, similarity="l2", search_method=SEARCH[store])
    keys = random(1, 17, 3)
    for begin, end in ((0, 2), (2, 8), (8, 17)):
        some = keys[:, begin:end]
        slots = memory.add(some, some)
        found = memory.search(some, 1)
        assert (found.indices[0, -7:, 0] == slots[0, -7:]).all()
        assert (slots[0, :-7] == -1).all()
    assert slots.tolist() == [[-1, -1, 3, 4, 5, 6, 0, 1, 2]]


def test_rows_do_not_affect_each_other(store):
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


def test_searches_return_only_the_requested_parts(store):
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
def test_numbers_of_any_dtype_are_accepted(store, dtype):
    whole = np.arange(12.0).reshape(1, 4, 3)
    given = whole.tolist() if dtype is list else whole.astype(dtype)
    memory = KNNMemory(3, 7, search_method=SEARCH[store])
    memory.add(given, given, mask=[[True, False, True, True]], rows=(0,))
    keys, values = memory.entries()
    assert (keys == whole[0, [0, 2, 3]]).all() and (values == keys).all()
    found = memory.search(given, 1)
    assert (found.scores[0, :, 0] == whole[0] @ whole[0, 3]).all()


def test_tensors_are_accepted(store):
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


def test_later_changes_of_given_arrays_have_no_effect(store):
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


def test_statistics_equal_those_of_a_loop(store):
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
    with pytest.raises(ValueError, match="created.*keep_statistics=False"):
        memory.statistics()


def test_recall_does_not_change_the_statistics(monkeypatch):
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
def test_searches_equal_the_exact_search_of_the_reference(kind, name):
    """Repeats recorded operations of memorizing-transformers-pytorch 0.4.1.

    `ideal_*` is an exact search of the newest `memory_size` entries. Results of
    the reference differ once there are more entries. One entry too many empties
    its index, and searches find nothing until the next `add`. Then its ids
    start at 0 while the slots continue, so that it returns keys and values of
    other entries. Its count omits the batch that did not fit. Its `add` also
    advances rows that it does not write. Wherever results differ (MANIFEST.md
    of the goldens), ours are right.
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


def test_pickles_and_copies_are_refused(store):
    memory = KNNMemory(3, 5, search_method=SEARCH[store])
    for how in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="`save` and `load`.*Received"):
            how(memory)


def test_many_threads_keep_the_memory_consistent(store, monkeypatch):
    """All threads add, search and clear at once; values are twice their
    keys."""
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


def test_l2_is_accurate_far_from_zero(store):
    memory, model = pair(store, 5, 90, similarity="l2")
    keys, queries = random(1, 70, 5) + 1e4, random(1, 11, 5, seed=1) + 1e4
    check_far(memory, model, keys, queries)


def test_l2_is_accurate_beside_a_key_far_away(store):
    memory, model = pair(store, 5, 90, similarity="l2")
    keys, queries = random(1, 70, 5), random(1, 11, 5, seed=1)
    keys[0, 7] = 1e6
    check_far(memory, model, keys, queries)


@pytest.mark.scann
def test_l2_is_accurate_after_first_keys_near_zero():
    need_scann()
    memory, model = pair("scann", 5, 90, similarity="l2")
    check_add(memory, model, random(1, 4, 5), random(1, 4, 5))
    check_search(memory, model, random(1, 3, 5), 2)
    keys, queries = random(1, 70, 5) + 1e4, random(1, 11, 5, seed=1) + 1e4
    check_far(memory, model, keys, queries)


def check_far(memory, model, keys, queries):
    """Rounding errors are small compared with distances of near neighbours."""
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
def test_arguments_out_of_range_are_refused(name, values):
    for value in values:
        options = {"key_dim": 3, "memory_size": 5, "search_method": "exact"}
        options[name] = value
        told = re.escape(f"{name}={value!r}")
        make = functools.partial(KNNMemory, **options)
        refuses(make, f"`{name}` must be", told)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_target_recall_of_0_or_1_is_refused(value):
    with pytest.raises(ValueError, match="`target_recall`"):
        KNNMemory(3, 5, search_method="exact", target_recall=value)


@pytest.mark.parametrize("row", [True, False])
def test_a_bool_is_refused_as_a_row(row):
    memory = KNNMemory(3, 5, search_method="exact", keep_statistics=True)
    for call in (memory.entries, memory.statistics):
        refuses(functools.partial(call, row), "`row", repr(row))


def test_the_repr_lists_the_arguments(store):
    memory = KNNMemory(
        3, 5, value_dim=0, similarity="l2", search_method=SEARCH[store]
    )
    assert repr(memory) == (
        "KNNMemory(key_dim=3, memory_size=5, num_rows=1, value_dim=0, "
        f"similarity='l2', search_method={SEARCH[store]!r}, target_recall=0.95)"
    )


# The choice of a store.


@pytest.mark.scann
@pytest.mark.parametrize("has, chosen", [(True, "ring"), (False, "scann")])
def test_the_store_depends_on_the_installed_scann(has, chosen, monkeypatch):
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


@pytest.mark.parametrize(
    "reason", ["halted; None in sys.modules", "RuntimeError: no such CPU"]
)
def test_without_scann_the_search_is_exact(reason, tmp_path, monkeypatch):
    """Includes a ScaNN that is installed but broken."""
    if reason.startswith("halted"):
        monkeypatch.setitem(sys.modules, "scann", None)
    else:
        monkeypatch.delitem(sys.modules, "scann", raising=False)
        (tmp_path / "scann").mkdir()
        text = "raise RuntimeError('no such CPU')"
        (tmp_path / "scann" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    without_cache = tuning.import_error.__wrapped__
    for module in (tuning, knn_memory):
        monkeypatch.setattr(module, "import_error", without_cache)
    monkeypatch.setattr(knn_memory, "has_accelerator", lambda: False)
    for chosen in ("auto", "ring"):
        memory, model = pair(chosen, 3, 5)
        assert memory.search_method == "exact"
        check_add(memory, model, random(1, 4, 3), random(1, 4, 3))
        check_search(memory, model, random(1, 2, 3), 3)
    folder = tmp_path / "memory"
    memory.save(folder)
    for make in (
        lambda: KNNMemory(3, 5, search_method="approximate"),
        lambda: KNNMemory.load(folder, search_method="approximate"),
    ):
        with pytest.raises(
            ImportError, match="pip install scann==1.4.2"
        ) as caught:
            make()
        assert reason in str(caught.value)
    model.load()
    check_entries(KNNMemory.load(folder), model)
