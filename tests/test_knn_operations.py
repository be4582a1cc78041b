"""Random operations on a memory of nearest neighbours, in random order."""

import tempfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from knn import SEARCH
from knn import check_add
from knn import check_entries
from knn import check_search
from knn import check_statistics
from knn import index_of
from knn import pair
from knn import random

from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory
from keras_memory.retrieval.similarities import SIMILARITIES

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
    """Random vectors, some of them equal and some 0."""
    vectors = rng.normal(size=shape)
    alike = rng.integers(-1, 2, size=shape) * (rng.random(shape[-1]) < 0.5)
    same = rng.random((*shape[:-1], 1)) < 0.2
    return np.where(same, alike, vectors).astype("float32")


def play(store, options, operations, draw, most, tally):
    """Applies operations to a memory and its model. The tally counts searches
    of trees, the neighbours they found, and the neighbours there were."""
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
    """Plays this number of sequences of operations; few ones are fixed."""
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
def test_any_operations_equal_those_on_lists(store, number):
    assert play_many(number, store, sizes(12), anywhere) == (0, 1.0)


@pytest.mark.scann
@FEW_OR_MANY
def test_any_operations_on_trees_find_near_neighbours(
    number, trees, monkeypatch
):
    monkeypatch.setattr(tuning, "FLAT", 30)
    centers = 3.0 * random(9, 4, seed=1)

    def around(rng, shape):
        chosen = centers[rng.integers(0, 9, size=shape[:-1]), : shape[-1]]
        return (chosen + 0.2 * rng.normal(size=shape)).astype("float32")

    options = sizes(160, least=60, rows=2)
    searches, found = play_many(number, "scann", options, around, 8)
    assert searches > number / 5
    # Few runs search some sixty neighbours in random trees, others thousands.
    assert found >= (0.6 if number < 100 else 0.9)
