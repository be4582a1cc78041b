"""ScaNN's trees in a memory of nearest neighbours."""

import contextlib
import gc
import threading
import warnings

import numpy as np
import pytest
from knn import check_add
from knn import check_entries
from knn import check_search
from knn import clustered
from knn import index_of
from knn import pair
from knn import random

from keras_memory.retrieval import scann_row
from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory
from keras_memory.retrieval.similarities import SIMILARITIES


@pytest.mark.scann
@pytest.mark.parametrize("target", [0.8, 0.95])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_tree_reaches_the_target_recall(trees, similarity, target):
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
    assert memory.recall(queries) == 1.0  # announces its top_k
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
def test_one_small_search_does_not_tune_a_tree(trees, background, first):
    """A tree tuned with few queries, or for fewer neighbours, is retuned."""
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
def test_a_search_finds_as_many_as_requested(trees):
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
def test_equal_keys_count_equally_in_recall(trees):
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
def test_a_tree_follows_written_entries(trees, monkeypatch):
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
    # All entries are overwritten by entries in other places.
    moved = clustered(1, 1000, 8, centers=2)
    queries = clustered(1, 256, 8, seed=5, centers=2)
    for begin in range(0, 1000, 40):
        some = moved[:, begin : begin + 40]
        check_add(memory, model, some, some)
        # New entries are found before a tree contains them.
        found = memory.search(some, 10)
        assert (found.scores[..., 0] > -1e-3).mean() > 0.9
        memory.search(queries, 10)
    assert len(built) >= 4 and all(built)
    assert memory.recall(queries, top_k=10) >= 0.92
    right, wanted = check_search(memory, model, queries, 10, is_exact=False)
    assert right / wanted >= 0.92
    check_entries(memory, model)


@pytest.mark.scann
def test_all_entries_are_compared_where_no_tree_helps(trees, monkeypatch):
    monkeypatch.setattr(tuning, "WORTH", 0.25)
    memory, model = pair("scann", 32, 900, similarity="l2")
    keys = random(1, 900, 32)
    check_add(memory, model, keys, keys)
    index = index_of(memory)
    assert index.leaves is index.leaves_to_search is index.building is None
    queries = random(1, 50, 32, seed=8)
    assert memory.recall(queries) == 1.0
    check_search(memory, model, queries, 9)
    # The same holds after there has been a tree.
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
def test_writes_continue_after_a_tree_is_given_up(trees, monkeypatch):
    memory, model = pair("scann", 8, 900)
    keys, queries = clustered(1, 2000, 8), random(1, 50, 8)
    check_add(memory, model, keys[:, :900], keys[:, :900])
    memory.search(queries, 9)
    assert index_of(memory).leaves is not None
    monkeypatch.setattr(scann_row.ScannRow, "_best_tree", no_tree)
    for begin in range(900, 2000, 90):  # without searches
        some = keys[:, begin : begin + 90]
        check_add(memory, model, some, some)
    check_search(memory, model, queries, 9)
    assert index_of(memory).leaves is None


@pytest.mark.scann
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_compressed_vectors_follow_written_entries(compressed, similarity):
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
    # More neighbours than the searched leaves hold.
    right, wanted = check_search(memory, model, queries, 1200, is_exact=False)
    assert right == wanted


@pytest.fixture
def compressed(trees, monkeypatch):
    """Makes a memory of 1,200 compressed entries."""
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
    """A memory, its model, and trees built in the background."""
    options = {
        "similarity": similarity,
        "of_memory": {"background": background},
    }
    return pair("scann", 8, 1000, **options)


@pytest.fixture
def held(trees, monkeypatch):
    """Two events: a build has started; the build may continue."""
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
def test_searches_and_adds_continue_during_a_build(held):
    began, go = held
    memory, model = beside("l2")
    keys, queries = clustered(1, 1100, 8), clustered(1, 50, 8, seed=5)
    index = index_of(memory)
    check_add(memory, model, keys[:, :700], keys[:, :700])
    assert began.wait(60)
    check_search(memory, model, queries, 9)
    # New entries wrap around the end and overwrite old ones.
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
    # Overwritten entries are gone.
    gone = memory.search(keys[:, :100], 9).keys[0].reshape(-1, 8)
    assert not (gone[:, None] == keys[0, :100]).all(-1).any()


@pytest.mark.scann
@pytest.mark.parametrize("n", [0, 50, 600])
def test_a_memory_may_be_cleared_during_a_build(held, n):
    began, go = held
    memory, model = beside("l2")
    old, new = clustered(1, 700, 8), clustered(1, n, 8, centers=2)
    queries = clustered(1, 50, 8, seed=5, centers=2)
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
def test_outdated_trees_are_not_built(trees, monkeypatch):
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
    for i in range(4):  # three builds are outdated before their turn
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


@pytest.mark.scann
def test_a_memory_may_be_cleared_before_a_tree_is_tuned(trees):
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
def test_a_failed_build_warns_and_searches_exactly(
    trees, background, monkeypatch
):
    memory, model = beside("l2", background)
    keys, queries = clustered(1, 1000, 8), clustered(1, 50, 8, seed=5)

    def fails(*arguments):
        raise RuntimeError("no tree today")

    with monkeypatch.context() as patch:
        patch.setattr(scann_row.ScannRow, "_best_tree", fails)
        for begin, end in ((0, 600), (600, 800)):
            some = keys[:, begin:end]
            with pytest.warns(RuntimeWarning, match="build.*no tree today"):
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
    """`ScannRow._best_tree` if no tree helps."""


def fail_in_the_midst(patch):
    upsert = scann_row.Searcher.upsert

    def fails(searcher, slots, size, vectors):
        half = len(slots) // 2
        upsert(searcher, slots[:half], size, vectors[:half])
        raise RuntimeError("half of it")

    patch.setattr(scann_row.Searcher, "upsert", fails)


@pytest.mark.scann
@pytest.mark.parametrize("has_tree", [False, True])
def test_a_half_failed_write_drops_the_tree(trees, has_tree, monkeypatch):
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
            with pytest.warns(RuntimeWarning, match="update its.*half of it"):
                check_add(memory, model, some, some)
        check_search(memory, model, queries, 9)
        assert index.leaves is None
        check_add(memory, model, some, some)
        check_search(memory, model, queries, 9)
    check_entries(memory, model)


@pytest.mark.scann
def test_a_failed_write_rebuilds_the_tree(trees, monkeypatch):
    memory, model = pair("scann", 8, 1000)
    keys, queries = clustered(1, 900, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys[:, :800], keys[:, :800])
    memory.search(queries, 9)
    with monkeypatch.context() as patch:
        fail_in_the_midst(patch)
        with pytest.warns(RuntimeWarning, match="update its.*half of it"):
            check_add(memory, model, keys[:, 800:], keys[:, 800:])
    assert index_of(memory).leaves is not None
    check_search(memory, model, queries, 9, is_exact=False)
    assert memory.recall(queries, top_k=9) >= 0.92


@pytest.mark.scann
def test_entries_added_during_a_build_survive_it(held, monkeypatch):
    began, go = held
    memory, model = beside("dot")
    keys, queries = clustered(1, 900, 8), clustered(1, 50, 8, seed=5)
    check_add(memory, model, keys[:, :600], keys[:, :600])
    assert began.wait(60)
    check_add(memory, model, keys[:, 600:], keys[:, 600:])
    check_search(memory, model, queries, 9)
    with monkeypatch.context() as patch:
        fail_in_the_midst(patch)
        with pytest.warns(
            RuntimeWarning, match="build or tune a tree.*half of it"
        ):
            go.set()
            memory.wait()
    check_search(memory, model, queries, 9)
    check_entries(memory, model)


@pytest.mark.scann
def test_a_failed_write_with_warnings_as_errors_keeps_entries(
    held, monkeypatch
):
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
