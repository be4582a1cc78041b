"""Edge cases and wrong calls of a memory of nearest neighbours.

ScaNN may crash its process, so it runs in a separate one: as a program, this
file prints the outcome of each case with ScaNN.
"""

import contextlib
import functools
import pathlib
import re
import traceback
import warnings

import numpy as np
import programs
import pytest
from knn import SEARCH
from knn import check_add
from knn import check_entries
from knn import check_search
from knn import check_statistics
from knn import clustered
from knn import index_of
from knn import need_scann
from knn import pair
from knn import random
from knn import refuses

from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory
from keras_memory.retrieval.similarities import SIMILARITIES

CASES = {}


def case(function):
    CASES[function.__name__.replace("_", "-")] = function
    return function


def filled(store, **options):
    """A memory with two rows of two entries, and its model."""
    memory, model = pair(store, 3, 5, num_rows=2, value_dim=2, **options)
    keys, values = random(2, 2, 3), random(2, 2, 2, seed=1)
    check_add(memory, model, keys, values)
    return memory, model


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
    """Names, calls on a memory, and the words of the errors."""
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
    """Later calls act as if the refused call had not happened."""
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
    """Always builds trees beyond this number of entries."""
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
    """Cosines are right, and none exceeds 1."""
    scores, mask = found.scores[0], found.mask[0]
    assert (np.abs(scores[mask]) <= 1).all()
    keys, queries = found.keys[0].astype("float64"), queries.astype("float64")
    lengths = np.linalg.norm(keys, axis=-1)
    lengths *= np.linalg.norm(queries, axis=-1)[:, None]
    exact = np.einsum("qkd,qd->qk", keys, queries)
    exact /= np.where(lengths > 0, lengths, 1)
    np.testing.assert_allclose(scores[mask], exact[mask], atol=1e-6)
    near = is_exact & (lengths[:, 0] > 0)  # an equal key is found
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
    """Builds a tree of the keys, then writes the keys once more."""
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
    """Adds entries one by one, past `FLAT` and around the end several times."""
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


@pytest.fixture(scope="module")
def outcomes():
    """The printed outcome of each case with ScaNN."""
    need_scann()
    done = programs.run(pathlib.Path(__file__))
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return done, {line[0]: line[-1] for line in lines if len(line) == 2}


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in ALONE and not OF_TREES.search(name)],
)
def test_odd_and_wrong_calls_work_with_the_ring(name):
    CASES[name]("ring")


@pytest.mark.scann
@pytest.mark.parametrize("name", CASES)
def test_odd_and_wrong_calls_work_with_scann(name, outcomes):
    done, said = outcomes
    assert said.get(name) == "ok", (done.returncode, done.stderr[-2000:])


@pytest.mark.scann
def test_scann_does_not_crash(outcomes):
    done, said = outcomes
    assert done.returncode == 0 and set(said) == set(CASES), done.stderr[-2000:]


def run_cases():
    for name, function in CASES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                function("scann")
            said = "ok"
        except Exception:
            said = repr(traceback.format_exc()[-900:])
        print(name, said, flush=True)


if __name__ == "__main__":
    run_cases()
