"""Nearest neighbours, and the memory of entries in the graph.

As a program on the JAX backend, this file lowers the memory for other devices.
"""

import inspect
import itertools
import json
import pathlib

import harness
import keras
import numpy as np
import programs
import pytest
from harness import close
from harness import gradient
from keras import ops

from keras_memory import retrieval
from keras_memory.addressing import slots as slots_module
from keras_memory.retrieval import exact as exact_module
from keras_memory.retrieval import knn_layer
from keras_memory.retrieval import ring as ring_module
from keras_memory.retrieval import similarities as similarities_module

pytestmark = pytest.mark.every_backend


def brute_force(queries, keys, top_k, bias):
    products = queries @ keys.T + bias
    order = np.argsort(-products, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(products, order, axis=1), order


@pytest.mark.parametrize("block", [3, 4, 11, 16, 100])
@pytest.mark.parametrize("top_k", [1, 5, 11])
def test_nearest_equals_brute_force(block, top_k, monkeypatch):
    monkeypatch.setattr(exact_module, "BLOCK", block)
    rng = np.random.default_rng(7)
    queries, keys = rng.normal(size=(5, 2)), rng.normal(size=(11, 2))
    for bias in (None, rng.normal(size=11), rng.normal(size=(5, 11))):
        arrays = [
            None if a is None else ops.convert_to_tensor(a, "float32")
            for a in (queries, keys, bias)
        ]
        found, places = retrieval.nearest(*arrays[:2], top_k, arrays[2])
        expected = brute_force(
            queries, keys, top_k, 0 if bias is None else bias
        )
        close(found, expected[0].astype("float32"), 1e-5)
        assert (ops.convert_to_numpy(places) == expected[1]).all()


def test_keys_with_minus_infinity_come_last(monkeypatch):
    for block in (2, 9):
        monkeypatch.setattr(exact_module, "BLOCK", block)
        keys = ops.convert_to_tensor(np.arange(5.0)[:, None], "float32")
        bias = ops.convert_to_tensor(
            [-np.inf, 0.0, 0.0, -np.inf, -np.inf], "float32"
        )
        found, places = retrieval.nearest(keys[4:], keys, 3, bias)
        assert ops.convert_to_numpy(found).tolist() == [[8.0, 4.0, -np.inf]]
        assert ops.convert_to_numpy(places)[:, :2].tolist() == [[2, 1]]


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_out_of_range_is_refused(top_k):
    keys = ops.ones((5, 2))
    with pytest.raises(ValueError, match=r"top_k=.*keys of shape \(5, 2\)"):
        retrieval.nearest(keys, keys, top_k)


@harness.needs_tensorflow
def test_nearest_compiles_with_a_free_number_of_keys(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(exact_module, "BLOCK", 4)
    rng = np.random.default_rng(7)
    queries = tf.constant(rng.normal(size=(3, 2)), "float32")
    keys = tf.constant(rng.normal(size=(11, 2)), "float32")
    expected = retrieval.nearest(queries, keys, 2)

    def search(queries, keys):
        return retrieval.nearest(queries, keys, 2)

    free = tf.TensorSpec((None, 2))
    compiled = tf.function(search, jit_compile=True)
    for function in (
        compiled,
        tf.function(search, input_signature=[free, free]),
    ):
        for one, other in zip(function(queries, keys), expected):
            close(one, other, 1e-6)


# A memory in the graph.

SOME = [("exact", "dot"), ("auto", "l2")]
SIMILARITY = pytest.mark.parametrize(
    "similarity", similarities_module.SIMILARITIES
)
METHOD = pytest.mark.parametrize("method", ring_module.SEARCH_METHODS)


def random(*shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tensors(*arrays):
    return [a if a is None else ops.convert_to_tensor(a) for a in arrays]


def arrays_of(record):
    """A state or a search result as NumPy arrays; 16 bits become float32."""
    parts = [
        ops.cast(part, "float32") if "float" in ops.dtype(part) else part
        for part in record
    ]
    parts = map(ops.convert_to_numpy, parts)
    return type(record)(*parts) if hasattr(record, "_fields") else tuple(parts)


class Model:
    """The expected memory: lists of (slot, key, value), oldest first."""

    def __init__(self, ring, batch):
        self.ring = ring
        self.rows, self.added = [[] for _ in range(batch)], [0] * batch

    def add(self, keys, values, mask=None):
        kept = np.ones(keys.shape[:2], bool) if mask is None else mask
        for row, i in np.argwhere(kept):
            slot = self.added[row] % self.ring.memory_size
            self.rows[row].append((slot, keys[row, i], values[row, i]))
            del self.rows[row][: -self.ring.memory_size]
            self.added[row] += 1

    def clear(self, rows):
        for row in np.flatnonzero(rows):
            self.rows[row], self.added[row] = [], 0

    def scores(self, row, query):
        keys = np.array([key for _, key, _ in self.rows[row]], "float64")
        keys = keys.reshape(-1, self.ring.key_dim)
        return similarities(query.astype("float64"), keys, self.ring.similarity)


def similarities(query, keys, similarity):
    if similarity == "l2":
        return -((query - keys) ** 2).sum(-1)
    products = keys @ query
    if similarity == "cosine":
        lengths = np.linalg.norm(query) * np.linalg.norm(keys, axis=1)
        return products / np.where(lengths > 0, lengths, 1)
    return products


def check_found(found, model, queries, top_k, tolerance=1e-5):
    """The result must hold the nearest entries of the model."""
    found = arrays_of(found)
    shape = (*queries.shape[:-1], top_k)
    widths = (), (), (), (model.ring.key_dim,), (model.ring.value_dim,)
    assert [part.shape for part in found] == [(*shape, *w) for w in widths]
    assert found.scores.dtype == "float32" and found.mask.dtype == bool
    assert found.indices.dtype == "int32"
    for place in np.ndindex(shape[:-1]):
        scores, slots, mask, keys, values = (part[place] for part in found)
        entries = {slot: rest for slot, *rest in model.rows[place[0]]}
        truths = model.scores(place[0], queries[place])
        n = min(top_k, len(entries))
        assert mask.tolist() == [True] * n + [False] * (top_k - n)
        assert (slots[n:] == -1).all() and (scores[n:] == -np.inf).all()
        assert not keys[n:].any() and not values[n:].any()
        assert len(set(slots[:n])) == n
        best = np.sort(truths)[::-1][:n]
        np.testing.assert_allclose(scores[:n], best, tolerance, tolerance)
        of_slot = dict(zip(entries, truths))
        true = [of_slot[slot] for slot in slots[:n]]
        np.testing.assert_allclose(scores[:n], true, tolerance, tolerance)
        for slot, key, value in zip(slots[:n], keys, values):
            assert (key == entries[slot][0]).all()
            assert (value == entries[slot][1]).all()


def check_state(state, model):
    state, size = arrays_of(state), model.ring.memory_size
    assert state.count.dtype == "int32"
    assert (0 <= state.count).all() and (state.count < 2 * size).all()
    assert (state.count % size == np.array(model.added) % size).all()
    sizes = ops.convert_to_numpy(model.ring.size(retrieval.RingState(*state)))
    assert sizes.tolist() == list(map(len, model.rows))
    for row, entries in enumerate(model.rows):
        for slot, key, value in entries:
            assert (state.keys[row, slot] == key).all()
            assert (state.values[row, slot] == value).all()


class Pair:
    """A state and its model; every operation is applied to both."""

    def __init__(self, ring, batch, dtype="float32"):
        self.ring, self.model = ring, Model(ring, batch)
        self.state = ring.initial_state(batch, dtype)

    def add(self, keys, values, mask=None):
        self.state = self.ring.add(self.state, *tensors(keys, values, mask))
        self.model.add(keys, values, mask)
        check_state(self.state, self.model)

    def clear(self, rows):
        rows = np.array(rows)
        self.state = self.ring.clear(self.state, *tensors(rows))
        self.model.clear(rows)
        check_state(self.state, self.model)

    def search(self, queries, top_k, **options):
        found = self.ring.search(self.state, *tensors(queries), top_k)
        check_found(found, self.model, queries, top_k, **options)
        return found

    def fill(self, n, seed=0, mask=None):
        batch = len(self.model.rows)
        keys = random(batch, n, self.ring.key_dim, seed=seed)
        values = random(batch, n, self.ring.value_dim, seed=seed + 1)
        self.add(keys, values, mask)


@METHOD
@SIMILARITY
def test_the_ring_equals_a_list_of_entries(similarity, method):
    ring = retrieval.RingMemory(5, 40, 2, similarity, method)
    both, queries = Pair(ring, 3), random(3, 2, 5)
    both.search(queries, 3)
    both.fill(1)
    both.search(queries, 3)
    both.fill(7, seed=1, mask=np.random.default_rng(1).random((3, 7)) < 0.5)
    both.fill(7, seed=2, mask=np.zeros((3, 7), bool))
    both.fill(29, seed=3)  # not full
    both.search(queries, 3)
    both.fill(7, seed=4)  # wraps around
    both.search(queries, 3)
    both.fill(93, seed=5)  # more than the memory holds
    both.search(queries, 40)
    both.search(random(3, 2, 1, 5, seed=3), 3)
    both.search(random(3, 5, seed=3), 3)
    both.clear([True, False, True])
    some = np.random.default_rng(2).random((3, 93)) < [[0.1], [0.5], [0.9]]
    both.fill(93, seed=6, mask=some)
    both.search(queries, 3)


@pytest.mark.few_backends
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("size", [9, 17, 31])
def test_partly_filled_groups_are_searched_correctly(size, top_k):
    """`GROUP` does not divide these numbers of slots."""
    ring = retrieval.RingMemory(2, size, search_method="auto")
    both = Pair(ring, 2)
    for n in (0, 1, 1, size - 2):
        if n:
            both.fill(n, seed=n)
        both.search(random(2, 3, 2), top_k)


@pytest.mark.few_backends
@pytest.mark.parametrize(
    "dim, size, value_dim, batch",
    [(1, 5, 2, 2), (3, 1, 2, 2), (3, 5, 0, 2), (3, 5, None, 1), (1, 1, 1, 1)],
)
def test_the_smallest_sizes_are_searched_correctly(dim, size, value_dim, batch):
    ring = retrieval.RingMemory(dim, size, value_dim)
    both = Pair(ring, batch)
    for n in (1, 3, 2 * size + 1):
        both.fill(n, seed=n)
        both.search(random(batch, 2, dim), size)
        both.search(random(batch, 0, dim), 1)


def test_values_may_be_left_out():
    ring = retrieval.RingMemory(3, 5, value_dim=0)
    state = ring.initial_state(2)
    keys = random(2, 2, 3)
    for one, other in zip(
        ring.add(state, *tensors(keys)),
        ring.add(state, *tensors(keys, np.zeros((2, 2, 0), "float32"))),
    ):
        assert (ops.convert_to_numpy(one) == ops.convert_to_numpy(other)).all()


def test_adding_no_entries_changes_nothing():
    both = Pair(retrieval.RingMemory(3, 5), 2)
    both.fill(0)


def test_no_slot_is_written_with_two_contents(monkeypatch):
    """Otherwise the device would decide which write wins."""
    written = []

    def noted(entries, slots, new):
        written.append(arrays_of((slots, new)))
        return write(entries, slots, new)

    write = ring_module.replace_rows
    monkeypatch.setattr(ring_module, "replace_rows", noted)
    both = Pair(retrieval.RingMemory(3, 5, 2), 2)
    for seed, n in enumerate((1, 4, 7, 23)):
        both.fill(n, seed=seed, mask=random(2, n, seed=seed) > [[-0.5], [0.5]])
        both.fill(n, seed=seed + 9)
    assert len(written) == 16
    for slots, new in written:
        for row, some in zip(slots, new):
            pairs = {(slot, x.tobytes()) for slot, x in zip(row, some)}
            assert len(pairs) == len(set(row))


def test_counts_stay_small_after_many_entries():
    both = Pair(retrieval.RingMemory(1, 3), 2)
    rng = np.random.default_rng(0)
    for step in range(20):
        n = (1, 2, 7)[step % 3]
        both.fill(n, seed=step, mask=rng.random((2, n)) < 0.8)
    assert min(both.model.added) > 40


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1.1e15])
def test_entries_that_cannot_be_compared_are_not_stored(number):
    ring = retrieval.RingMemory(3, 7, 2, "l2")
    both, queries = Pair(ring, 2), random(2, 3, 3)
    keys, values = random(2, 5, 3), random(2, 5, 2)
    both.add(keys.copy(), values.copy())
    keys[0, 1, 2] = values[1, 3, 0] = keys[1, 4, 0] = number
    kept = np.ones((2, 5), bool)
    kept[[0, 1, 1], [1, 3, 4]] = False
    both.state = ring.add(both.state, *tensors(keys, values))
    both.model.add(keys, values, kept)
    check_state(both.state, both.model)
    found = both.search(queries, 4)
    # A query with the number finds nothing; other queries are unaffected.
    broken = queries.copy()
    broken[1, 1, 0] = number
    after = ring.search(both.state, *tensors(broken), 4)
    of_broken = np.arange(6).reshape(2, 3) == 4
    for one, other, missing in zip(
        arrays_of(found), arrays_of(after), (-np.inf, -1, False, 0.0, 0.0)
    ):
        assert (one[~of_broken] == other[~of_broken]).all()
        assert (other[of_broken] == missing).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_state_in_16_bits_returns_its_dtype(dtype):
    ring = retrieval.RingMemory(3, 5, 2)
    both = Pair(ring, 2, dtype)
    keys, values = (
        ops.convert_to_numpy(ops.cast(ops.cast(x, dtype), "float32"))
        for x in (random(2, 3, 3), random(2, 3, 2))
    )
    both.add(keys, values)
    found = both.search(random(2, 2, 3), 5)
    assert ops.dtype(found.keys) == ops.dtype(found.values) == dtype
    assert ops.dtype(both.state.keys) == dtype
    # Entries too large for the dtype are not stored.
    large = np.full((2, 1, 3), 1e5, "float32")
    state = ring.add(both.state, *tensors(large, values[:, :1]))
    expected = 3 if dtype == "float16" else 4
    assert ops.convert_to_numpy(state.count).tolist() == [expected] * 2


def test_inputs_of_other_dtypes_are_cast():
    ring = retrieval.RingMemory(2, 5)
    state = ring.initial_state(1)
    keys = np.arange(6).reshape(1, 3, 2)
    state = ring.add(state, keys.astype("uint8"), keys.astype("float64"))
    for queries in (
        keys.astype("int32"),
        keys.tolist(),
        keys.astype("float16"),
    ):
        found = arrays_of(ring.search(state, queries, 1))
        assert found.scores[0, :, 0].tolist() == [5.0, 23.0, 41.0]
        assert (found.keys == [4.0, 5.0]).all()


def test_zero_vectors_have_cosine_0():
    ring = retrieval.RingMemory(2, 5, similarity="cosine")
    both = Pair(ring, 1)
    keys = np.array([[[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]], "float32")
    both.add(keys, keys)
    found = arrays_of(both.search(keys, 3))
    assert (found.scores[0, 0] == 0.0).all()
    assert found.indices[0, 1].tolist() == [1, 0, 2]


@METHOD
def test_cosines_do_not_depend_on_scale(method):
    ring = retrieval.RingMemory(7, 90, 0, "cosine", method)
    directions = random(1, 80, 7)
    largest = np.abs(directions).max(axis=-1, keepdims=True)
    tiny = float(np.finfo("float32").tiny)
    scales = np.array([1, 1e-11, 1e-14, 1e-30, 1e15, tiny])
    keys = directions / largest * scales[np.arange(80) % 6, None]
    queries = directions / largest * scales[np.arange(80) // 6 % 6, None]
    keys, queries = keys.astype("float32"), queries.astype("float32")
    for array in (keys, queries):  # a device may flush these to zero
        array[np.abs(array) < tiny] = 0
    found = arrays_of(
        ring.search(ring.add(ring.initial_state(1), keys), queries, 3)
    )
    assert (np.abs(found.scores) <= 1).all()
    assert np.isfinite(np.arccos(found.scores)).all()
    units = [
        array[0].astype("float64")
        / np.linalg.norm(array[0].astype("float64"), axis=-1, keepdims=True)
        for array in (queries, keys)
    ]
    exact = np.sort(units[0] @ units[1].T)[:, ::-1]
    np.testing.assert_allclose(found.scores[0], exact[:, :3], atol=5e-7)


def test_cosines_of_equal_vectors_are_at_most_1():
    vectors = ops.convert_to_tensor(random(4000, 11))
    found = similarities_module.similarity_of(vectors, vectors, "cosine")
    found = ops.convert_to_numpy(found)
    assert found.max() == 1 and found.min() > 1 - 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e-11, 1e-30, 1e15])
def test_gradients_of_cosines_are_exact_at_every_scale(scale):
    """Includes a key in the same direction, and keys of one component."""
    harness.skip_on("numpy", because="not applicable: no gradients here")
    directions = random(3, 5)
    directions[0] = [0, 2, 0, 0, 0]
    queries, keys = (directions * scale).astype("float32"), random(3, 5, seed=8)
    keys[2] = 1.7 * directions[2]

    def total(queries):
        cosines = similarities_module.similarity_of(
            queries, ops.convert_to_tensor(keys), "cosine"
        )
        return ops.sum(cosines)

    q, k = (
        x.astype("float64")
        / np.linalg.norm(x.astype("float64"), axis=-1, keepdims=True)
        for x in (queries, keys)
    )
    exact = k - (q * k).sum(-1, keepdims=True) * q
    exact /= np.linalg.norm(directions, axis=-1, keepdims=True)
    actual = gradient(total, queries).astype("float64") * scale
    np.testing.assert_allclose(actual, exact, atol=2e-6)
    zeros = gradient(total, np.zeros_like(queries))
    assert (zeros == 0).all()


# Sizes beyond 32 bits.


@pytest.mark.parametrize("size", [1, 2, 63, 64, 34_636_834, 1 << 30])
def test_a_sample_has_evenly_spaced_slots(size):
    expected = [step * (size - 1) // 62 for step in range(63)]
    assert similarities_module.places_of_sample(size).tolist() == expected
    sizes = ops.convert_to_tensor(np.array([[size], [1]], "int32"))
    places = ops.convert_to_numpy(
        similarities_module.places_of_sample(sizes, ops)
    )
    assert places.dtype == "int32"
    assert places.tolist() == [expected, [0] * 63]


def test_counts_are_exact_in_the_largest_memory():
    size, longest = 1 << 30, (1 << 31) - 1
    pairs = [
        (count, added)
        for count in (0, 1, size - 1, size, 2 * size - 1)
        for added in (0, 1, size - 1, size, longest)
    ]
    counts, added = np.array(pairs, "int32").T
    found = ring_module._after(*tensors(counts, added), size)
    expected = [
        sum(pair) if sum(pair) < size else size + sum(pair) % size
        for pair in pairs
    ]
    assert ops.convert_to_numpy(found).tolist() == expected
    with pytest.raises(ValueError, match="`memory_size`.*at most 1073741824"):
        retrieval.RingMemory(1, size + 1)


@harness.needs_tensorflow
def test_no_index_overflows_32_bits():
    """Only traced: such a memory would need some 50 GB."""
    import tensorflow as tf

    ring = retrieval.RingMemory(1, 1 << 30, 1, search_method="auto")
    shapes = [(4, 1 << 30, 1), (4, 1 << 30, 1), (4,), (4, 5, 1)]
    *state, entries = (
        tf.TensorSpec(shape, "int32" if len(shape) == 1 else "float32")
        for shape in shapes
    )

    def step(state, entries):
        state = ring.add(state, entries, entries)
        return ring.search(state, entries, 3)

    graph = (
        tf.function(step)
        .get_concrete_function(retrieval.RingState(*state), entries)
        .graph
    )
    axes = [
        axis
        for operation in graph.get_operations()
        for output in operation.outputs
        for axis in (output.shape.as_list() if output.shape.rank else [])
    ]
    assert max(axis for axis in axes if axis) == 1 << 30
    gathers = [op for op in graph.get_operations() if "Scatter" in op.type]
    assert gathers and all(op.inputs[1].dtype == "int64" for op in gathers)


# Empty queries and batches.


@METHOD
@SIMILARITY
def test_empty_queries_and_batches_give_empty_results(method, similarity):
    ring = retrieval.RingMemory(3, 40, 2, similarity, method)
    both = Pair(ring, 2)
    both.fill(30)
    for shape in ((2, 0, 3), (2, 0, 4, 3), (2, 4, 0, 3)):
        both.search(np.zeros(shape, "float32"), 3)
    none = Pair(ring, 0)
    none.fill(5)
    none.clear(np.zeros(0, bool))
    for shape in ((0, 4, 3), (0, 3), (0, 0, 3)):
        none.search(np.zeros(shape, "float32"), 3)


@harness.needs_tensorflow
@pytest.mark.parametrize("jit_compile", [True, False])
def test_empty_queries_and_batches_give_empty_results_in_graphs(jit_compile):
    import tensorflow as tf

    ring = retrieval.RingMemory(3, 40, 2, "cosine", "auto")
    layer = layer_of(
        40, search_method="auto", write="always", similarity="cosine"
    )
    keys = random(2, 30, 3)
    layer(*tensors(keys, keys, keys))
    layer(*tensors(keys[:, :0], keys[:, :0], keys[:, :0]))

    def step(state, keys, values, queries):
        return ring.search(ring.add(state, keys, values), queries, 3)

    both = Pair(ring, 2)
    both.fill(30)
    function = tf.function(step, jit_compile=jit_compile)
    for batch, n, number in ((2, 0, 0), (2, 3, 0), (0, 3, 4), (0, 0, 0)):
        state = both.state if batch else ring.initial_state(0)
        found = function(
            state,
            *tensors(
                random(batch, n, 3),
                random(batch, n, 2),
                random(batch, number, 3),
            ),
        )
        assert found.values.shape == (batch, number, 3, 2)
        assert found.scores.shape == (batch, number, 3)
    search = tf.function(layer, jit_compile=jit_compile)
    assert search(tf.zeros((2, 0, 3))).keys.shape == (2, 0, 3, 3)


@harness.needs_tensorflow
def test_a_graph_adds_an_unknown_number_of_no_entries():
    import tensorflow as tf

    ring = retrieval.RingMemory(3, 7, 2)
    both = Pair(ring, 2)
    both.fill(5)
    signature = [
        retrieval.RingState(
            *(tf.TensorSpec(x.shape, x.dtype) for x in both.state)
        ),
        tf.TensorSpec((None, None, 3)),
        tf.TensorSpec((None, None, 2)),
    ]
    add = tf.function(ring.add, input_signature=signature)
    for n in (0, 4, 0, 17):
        given = random(2, n, 3), random(2, n, 2)
        both.state = add(both.state, *tensors(*given))
        both.model.add(*given)
        check_state(both.state, both.model)


def test_nearest_takes_biases_of_other_dtypes():
    keys = random(5, 3)
    expected = brute_force(keys, keys, 2, np.arange(5))
    for given in (np.arange(5), np.arange(5.0), np.arange(5, dtype="float16")):
        found, places = retrieval.nearest(*tensors(keys, keys), 2, given)
        close(found, expected[0].astype("float32"), 1e-5)
        assert (ops.convert_to_numpy(places) == expected[1]).all()


@pytest.mark.parametrize("number", [5, 30])
def test_nearest_of_no_queries_is_empty(number, monkeypatch):
    monkeypatch.setattr(exact_module, "BLOCK", 10)
    keys = ops.convert_to_tensor(random(number, 3))
    found, places = retrieval.nearest(ops.zeros((0, 3)), keys, 2)
    assert tuple(found.shape) == tuple(places.shape) == (0, 2)


# Checks of array arguments.

WRONG_ARRAYS = {
    "text": "text",
    "texts": np.full((2, 4, 3), "1"),
    "bool": np.ones((2, 4, 3), bool),
    "complex": np.ones((2, 4, 3), "complex64"),
    "none": None,
    "rank": np.float32(1),
    "ragged": [[1.0], [1.0, 2.0]],
    "object": np.ones((2, 4, 3), object),
}
CALLS = {
    "ring-add-keys": lambda wrong, ring, state, good: ring.add(
        state, wrong, good
    ),
    "ring-add-values": lambda wrong, ring, state, good: ring.add(
        state, good, wrong
    ),
    "ring-search-queries": lambda wrong, ring, state, good: ring.search(
        state, wrong, 1
    ),
    "state-keys": lambda wrong, ring, state, good: ring.search(
        state._replace(keys=wrong), good, 1
    ),
    "state-values": lambda wrong, ring, state, good: ring.add(
        state._replace(values=wrong), good, good
    ),
    "state-count": lambda wrong, ring, state, good: ring.size(
        state._replace(count=wrong)
    ),
    "nearest-queries": lambda wrong, ring, state, good: retrieval.nearest(
        wrong, good[0], 1
    ),
    "nearest-keys": lambda wrong, ring, state, good: retrieval.nearest(
        good[0], wrong, 1
    ),
    "layer-queries": lambda wrong, ring, state, good: layer_of()(
        wrong, good, good
    ),
    "layer-keys": lambda wrong, ring, state, good: layer_of()(
        good, wrong, good
    ),
    "layer-values": lambda wrong, ring, state, good: layer_of()(
        good, good, wrong
    ),
}


@pytest.mark.parametrize("kind", WRONG_ARRAYS)
@pytest.mark.parametrize("call", CALLS)
def test_wrong_arrays_are_named(call, kind):
    if call in ("layer-keys", "layer-values") and kind == "none":
        pytest.skip("which may be left out")
    ring = retrieval.RingMemory(3, 5)
    good, name = random(2, 4, 3), call.split("-")[-1]
    name = f"state.{name}" if call.startswith("state") else name
    with pytest.raises((ValueError, TypeError), match=f"`{name}` must be .*"):
        CALLS[call](WRONG_ARRAYS[kind], ring, ring.initial_state(2), good)


@pytest.mark.parametrize("wrong", [None, "text", -1, 1.5, True, (2,)])
def test_wrong_batch_sizes_are_named(wrong):
    with pytest.raises(ValueError, match="`batch_size` must be"):
        retrieval.RingMemory(3, 5).initial_state(wrong)


@pytest.mark.parametrize("wrong", [None, "text", 3, np.ones(3), ()])
def test_wrong_states_are_named(wrong):
    ring = retrieval.RingMemory(3, 5)
    for call in (
        lambda: ring.size(wrong),
        lambda: ring.clear(wrong, [True]),
        lambda: ring.add(wrong, random(1, 2, 3)),
        lambda: ring.search(wrong, random(1, 2, 3), 1),
    ):
        with pytest.raises(ValueError, match="`state` must be a `RingState`"):
            call()


@pytest.mark.parametrize(
    "wrong", ["text", np.ones(7, bool), np.ones((3, 6)), np.ones((1, 1, 7))]
)
def test_wrong_biases_are_named(wrong):
    with pytest.raises(ValueError, match="`bias` must be"):
        retrieval.nearest(random(2, 3), random(7, 3), 1, wrong)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("keys_mask", "text"),
        ("keys_mask", np.ones((2, 4))),
        ("keys_mask", np.ones((2, 3), bool)),
        ("clear", np.ones(2)),
        ("clear", np.ones(3, bool)),
        ("keys", random(3, 4, 3)),
        ("values", random(2, 5, 3)),
        ("queries", random(2, 5, 2)),
    ],
)
def test_wrong_arguments_of_the_layer_are_named(name, wrong):
    layer, good = layer_of(write="always"), random(2, 4, 3)
    layer(good, good, good)
    name = {"keys_mask": "mask", "clear": "rows"}.get(name, name)
    given = {"queries": good, "keys": good, "values": good}
    keyword = {"mask": "keys_mask", "rows": "clear"}.get(name, name)
    with pytest.raises(ValueError, match=f"`({name}|{keyword})` must"):
        layer(**{**given, keyword: wrong})


@METHOD
def test_l2_is_exact_far_from_zero(method):
    ring = retrieval.RingMemory(3, 40, similarity="l2", search_method=method)
    both = Pair(ring, 2)
    keys = random(2, 35, 3) + np.float32(1e4)
    both.add(keys, keys)
    queries = random(2, 4, 3, seed=2) + np.float32(1e4)
    both.search(queries, 4, tolerance=1e-4)


@METHOD
def test_l2_is_exact_beside_a_key_far_away(method):
    ring = retrieval.RingMemory(3, 40, similarity="l2", search_method=method)
    both = Pair(ring, 2)
    keys = random(2, 35, 3)
    keys[:, 7] = 1e6
    both.add(keys, keys)
    both.search(random(2, 4, 3, seed=2), 4, tolerance=1e-4)


@METHOD
@pytest.mark.parametrize("number", [4, 8, 11])
def test_many_queries_are_searched_in_parts(method, number, monkeypatch):
    monkeypatch.setattr(ring_module, "QUERIES", 4)
    both = Pair(retrieval.RingMemory(3, 40, search_method=method), 2)
    both.fill(30)
    queries = random(2, number, 3)
    queries[1, number - 1] = np.nan
    found = both.ring.search(both.state, *tensors(queries), 3)
    monkeypatch.setattr(ring_module, "QUERIES", 100)
    expected = both.ring.search(both.state, *tensors(queries), 3)
    for one, other in zip(arrays_of(found), arrays_of(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert arrays_of(found).mask.sum() == 3 * (2 * number - 1)


@METHOD
@SIMILARITY
def test_gradients_equal_finite_differences(similarity, method):
    """Gradients flow from scores to queries, and none to stored entries."""
    harness.skip_on("numpy", because="not applicable: no gradients here")
    ring = retrieval.RingMemory(3, 40, 2, similarity, method)
    keys, values = random(2, 4, 3), random(2, 4, 2)
    mask = np.array([[True] * 4, [True, False, False, True]])
    state = ring.add(ring.initial_state(2), *tensors(keys, values, mask))
    queries, weights = random(2, 2, 3, seed=3), random(2, 2, 3, seed=4)
    queries[0, 1] = np.nan
    found = arrays_of(ring.search(state, *tensors(queries), 3))
    assert found.mask[0, 0].all() and found.mask[1, 0].sum() == 2

    def total(queries, state=state):
        found = ring.search(state, queries, 3)
        scores = ops.where(found.mask, found.scores, 0.0)
        return ops.sum(scores * ops.convert_to_tensor(weights))

    actual = gradient(total, queries)
    expected, step = np.zeros((2, 2, 3)), 1e-5
    for row, query, axis in np.ndindex(2, 2, 3):
        there = found.mask[row, query]
        moved = queries[row, query].astype("float64")
        for sign in (1, -1) if there.any() else ():
            moved[axis] = float(queries[row, query, axis]) + sign * step
            near = found.keys[row, query, there].astype("float64")
            scores = similarities(moved, near, similarity)
            change = scores @ weights[row, query, there]
            expected[row, query, axis] += sign * change / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    def through_memory(keys):
        more = ring.add(state, keys, keys[:, :, :2])
        found = ring.search(more, *tensors(queries), 3)
        kept = ops.sum(ops.where(found.mask, found.scores, 0.0))
        return kept + ops.sum(found.keys) + ops.sum(found.values)

    assert (gradient(through_memory, keys) == 0).all()

    def through_state(keys):
        return total(*tensors(queries), state._replace(keys=keys))

    assert (gradient(through_state, arrays_of(state).keys) == 0).all()
    # Gradients of zero vectors are finite.
    zeros = gradient(total, np.zeros_like(queries))
    assert np.isfinite(zeros).all()


SOME_OR_ALL = pytest.mark.parametrize(
    "method, similarity",
    [
        pytest.param(*both, marks=[] if both in SOME else pytest.mark.slow)
        for both in itertools.product(
            ring_module.SEARCH_METHODS, similarities_module.SIMILARITIES
        )
    ],
)


@harness.needs_tensorflow
@SOME_OR_ALL
def test_the_ring_compiles_with_a_free_batch(similarity, method, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(ring_module, "QUERIES", 4)
    ring = retrieval.RingMemory(3, 40, 2, similarity, method)

    def step(state, keys, values, mask, rows, queries):
        state = ring.clear(state, rows)
        found = ring.search(state, queries, 3)
        return ring.add(state, keys, values, mask), found

    free = [(None, 5, 3), (None, 5, 2), (None, 5), (None,), (None, 6, 3)]
    dtypes = ["float32", "float32", "bool", "bool", "float32"]
    of_state = retrieval.RingState(
        tf.TensorSpec((None, 40, 3)),
        tf.TensorSpec((None, 40, 2)),
        tf.TensorSpec((None,), "int32"),
    )
    signature = [of_state, *map(tf.TensorSpec, free, dtypes)]
    compiled = tf.function(step, input_signature=signature, jit_compile=True)
    for batch in (1, 3):
        both = Pair(ring, batch)
        both.fill(38)
        state = both.state
        for seed in range(2):
            mask = random(batch, 5, seed=seed) > 0
            given = random(batch, 5, 3, seed=seed), random(batch, 5, 2)
            rows = np.arange(batch) == 1 + seed
            queries = random(batch, 6, 3, seed=seed + 1)
            state, found = compiled(
                state, *tensors(*given, mask, rows, queries)
            )
            both.clear(rows)
            check_found(found, both.model, queries, 3)
            both.add(*given, mask)
            check_state(state, both.model)


WRONG_CALLS = {
    "key-width": ("add", [(2, 3, 4), (2, 3, 2)], r"`keys` .*\(B, n, 3\)"),
    "key-axes": ("add", [(2, 3), (2, 3, 2)], r"`keys` .*\(B, n, 3\)"),
    "key-rows": ("add", [(1, 3, 3), (1, 3, 2)], "`keys` .*B=2"),
    "value-width": ("add", [(2, 3, 3), (2, 3, 3)], r"`values` .*\(B, n, 2\)"),
    "value-rows": ("add", [(2, 3, 3), (1, 3, 2)], "`values` .*B=2"),
    "value-number": ("add", [(2, 3, 3), (2, 4, 2)], "`values` .*n=3"),
    "no-values": ("add", [(2, 3, 3), None], r"`values` .*\(B, n, 2\)"),
    "mask": ("add", [(2, 3, 3), (2, 3, 2), (2, 2)], r"`mask` .*\(B, n\)"),
    "mask-axes": ("add", [(2, 3, 3), (2, 3, 2), (2, 3, 1)], r"`mask` .*\(B, n"),
    "query-width": ("search", [(2, 3, 4)], r"`queries` .*\(B, \.\.\., 3\)"),
    "query-rows": ("search", [(3, 1, 3)], r"`queries` .*B=2"),
    "query-axes": ("search", [(3,)], r"`queries` .*\(B, \.\.\., 3\)"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_shapes_are_refused(name):
    ring = retrieval.RingMemory(3, 5, 2)
    method, shapes, wanted = WRONG_CALLS[name]
    given = [None if s is None else np.ones(s, "float32") for s in shapes]
    if method == "search":
        given.append(2)
    with pytest.raises(ValueError, match=f"{wanted}.*Received: (shape|None)"):
        getattr(ring, method)(ring.initial_state(2), *given)


@pytest.mark.parametrize("top_k", [0, -1, 6, 1.0, True, None, "1"])
def test_top_k_of_the_ring_out_of_range_is_refused(top_k):
    ring = retrieval.RingMemory(3, 5)
    with pytest.raises(ValueError, match="`top_k` must .*Received: top_k="):
        ring.search(ring.initial_state(2), random(2, 1, 3), top_k)
    if type(top_k) is int:
        with pytest.raises(ValueError, match="`top_k` must .*Received: top_k="):
            retrieval.KNNMemoryLayer(5, top_k=top_k)


@pytest.mark.parametrize("rows", [[[True], [False]], [True], [0], [0, 1], True])
def test_clear_refuses_wrong_rows(rows):
    ring = retrieval.RingMemory(3, 5)
    state = ring.initial_state(2)
    state = ring.add(state, *tensors(random(2, 2, 3), random(2, 2, 3)))
    with pytest.raises(ValueError, match="`rows` must .*Received: "):
        ring.clear(state, np.array(rows))


@pytest.mark.parametrize(
    "name, values",
    [
        ("key_dim", [0, 1.5, None]),
        ("memory_size", [0, -1, True]),
        ("value_dim", [-1, 2.0]),
        ("similarity", ["euclid", None]),
        ("search_method", ["fast", None]),
        ("target_recall", [-0.1, 1.1, np.nan, None]),
    ],
)
def test_arguments_of_the_ring_out_of_range_are_refused(name, values):
    for value in values:
        options = {"key_dim": 3, "memory_size": 5, name: value}
        told = f"`{name}` must be .*Received: {name}={value!r}"
        with pytest.raises(ValueError, match=told):
            retrieval.RingMemory(**options)
        if name in (
            "memory_size",
            "similarity",
            "search_method",
            "target_recall",
        ):
            options = {"memory_size": 5, "top_k": 1, name: value}
            with pytest.raises(ValueError, match=told):
                retrieval.KNNMemoryLayer(**options)
    with pytest.raises(ValueError, match="`write` must .*write='sometimes'"):
        retrieval.KNNMemoryLayer(5, top_k=1, write="sometimes")


def test_a_target_recall_of_0_is_refused():
    with pytest.raises(ValueError, match="`target_recall`"):
        retrieval.RingMemory(3, 5, target_recall=0.0)


def test_entries_may_be_lists():
    ring = retrieval.RingMemory(2, 3, value_dim=1)
    state = ring.add(ring.initial_state(1), [[[1.0, 2.0]]], [[[3.0]]], [[True]])
    found = arrays_of(ring.search(state, [[[1.0, 0.0]]], 1))
    assert found.keys.tolist() == [[[[1.0, 2.0]]]]
    assert found.values.tolist() == [[[[3.0]]]]


def test_sizes_of_numpy_become_ints():
    wide = np.int64(2), np.int32(3), np.int16(1)
    ring = retrieval.RingMemory(*wide)
    sizes = (ring.key_dim, ring.memory_size, ring.value_dim)
    layer = retrieval.KNNMemoryLayer(np.int64(5), top_k=np.int64(2))
    assert {type(n) for n in (*sizes, layer.memory_size, layer.top_k)} == {int}
    state = ring.add(ring.initial_state(1), [[[1.0, 2.0]]], [[[3.0]]])
    found = arrays_of(ring.search(state, [[[1.0, 0.0]]], np.int64(2)))
    assert found.mask.tolist() == [[[True, False]]]
    json.dumps(layer.get_config())


@pytest.mark.parametrize(
    "name, shape",
    [
        ("keys", (2, 4, 3)),
        ("keys", (2, 5, 4)),
        ("values", (2, 5, 3)),
        ("values", (2, 5)),
        ("count", (2, 1)),
    ],
)
def test_states_of_another_memory_are_refused(name, shape):
    ring = retrieval.RingMemory(3, 5, 2)
    state = ring.initial_state(2)
    part = ops.zeros(shape, getattr(state, name).dtype)
    state = state._replace(**{name: part})
    told = rf"`state.{name}` must be an array \(B.*Received: shape"
    with pytest.raises(ValueError, match=told):
        ring.search(state, random(2, 1, 3), 1)
    with pytest.raises(ValueError, match=told):
        ring.add(state, random(2, 1, 3), random(2, 1, 2))


# The layer.


def layer_of(memory_size=11, top_k=3, **options):
    return retrieval.KNNMemoryLayer(memory_size, top_k, **options)


def contents(layer):
    return arrays_of(layer.state)


def same(one, other):
    return all((a == b).all() for a, b in zip(one, other))


def test_a_query_finds_entries_of_earlier_calls_only():
    layer = layer_of()
    model = Model(retrieval.RingMemory(5, 11, 2), 3)
    for seed in range(4):
        keys, values = random(3, 4, 5, seed=seed), random(3, 4, 2, seed=seed)
        found = layer(*tensors(keys, keys, values), training=True)
        check_found(found, model, keys, 3)  # without the keys of this call
        model.add(keys, values)
        check_state(layer.state, model)
        check_found(layer(*tensors(keys)), model, keys, 3)
        check_state(layer.state, model)
    names = [weight.name for weight in layer.non_trainable_weights]
    assert names == ["memory_keys", "memory_values", "memory_count"]
    assert not layer.trainable_weights
    layer.reset_state()
    assert not contents(layer).count.any()
    assert not arrays_of(layer(*tensors(keys))).mask.any()


@pytest.mark.parametrize("write", knn_layer.WRITES)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_writes_when_the_write_argument_says(write, training):
    layer = layer_of(write=write)
    keys = random(2, 4, 3)
    found = layer(*tensors(keys, keys, keys), training=training)
    assert not arrays_of(found).mask.any()
    writes = write == "always" or write == "training" and training
    assert contents(layer).count.tolist() == [4 * writes] * 2
    rows = np.array([True, False])
    found = layer(*tensors(keys), clear=rows, training=training)
    assert arrays_of(found).mask.any((1, 2)).tolist() == [False, writes]
    expected = [0, 4] if writes else [0, 0]
    assert contents(layer).count.tolist() == expected
    # With write="never", `clear` applies to this call only.
    layer.write = "always"
    layer(*tensors(keys, keys, keys))
    layer.write = "never"
    assert not arrays_of(layer(*tensors(keys), clear=[True] * 2)).mask.any()
    assert arrays_of(layer(*tensors(keys))).mask.all()


def test_masked_keys_are_not_written():
    keys, kept = (
        random(2, 4, 3),
        np.array([[True] * 4, [False, True, True, False]]),
    )
    layer = layer_of(write="always")
    model = Model(retrieval.RingMemory(3, 11), 2)
    layer(*tensors(keys, keys, keys), keys_mask=kept)
    model.add(keys, keys, kept)
    check_state(layer.state, model)
    # The mask of the keys is used, too, in a Functional model.
    queries = keras.Input(batch_shape=(2, 5, 3))
    entry = keras.Input(batch_shape=(2, 4, 3))
    masked = keras.layers.Masking()(entry)
    other = layer_of(write="always")
    model_of_it = keras.Model([queries, entry], other(queries, masked, masked))
    marked = np.where(kept[..., None], keys, 0.0)
    model_of_it([random(2, 5, 3), marked])
    check_state(other.state, model)


def test_keys_alone_are_stored_and_values_alone_are_refused():
    layer = layer_of(write="always")
    keys = random(2, 4, 3)
    assert not arrays_of(layer(*tensors(keys))).mask.any()
    layer(*tensors(keys, keys))
    found = layer(*tensors(keys))
    model = Model(retrieval.RingMemory(3, 11, 0), 2)
    model.add(keys, np.zeros((2, 4, 0), "float32"))
    check_found(found, model, keys, 3)
    with pytest.raises(
        ValueError, match=r"`values` must be an array \(B, n, 0\)"
    ):
        layer(*tensors(keys, keys, keys))


def test_an_unknown_batch_size_is_refused():
    entry = keras.Input((4, 3))
    with pytest.raises(ValueError, match="known batch size.*Received: shape"):
        layer_of()(entry, entry, entry)


def test_a_config_restores_the_layer():
    layer = layer_of(
        similarity="l2",
        search_method="auto",
        target_recall=0.9,
        write="always",
        memory_dtype="float16",
        value_dtype="int32",
        name="remembers",
        dtype="mixed_float16",
    )
    config = json.loads(json.dumps(layer.get_config()))
    copy = retrieval.KNNMemoryLayer.from_config(config)
    assert copy.get_config() == layer.get_config()
    arguments = inspect.signature(retrieval.KNNMemoryLayer).parameters
    assert set(arguments) - {"kwargs"} <= set(config)
    assert all(
        getattr(copy, n) == getattr(layer, n)
        for n in arguments
        if n != "kwargs"
    )


@pytest.mark.few_backends
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_returns_the_compute_dtype(policy):
    layer = layer_of(write="always", dtype=policy, similarity="cosine")
    keys = random(2, 4, 3)
    for _ in range(2):
        found = layer(*tensors(keys, keys, keys))
    assert ops.dtype(found.scores) == "float32"
    assert ops.dtype(found.keys) == ops.dtype(found.values) == policy[6:]
    found = arrays_of(found)
    assert found.mask.all() and found.indices[0, :, 0].tolist() == [0, 1, 2, 3]
    assert all(np.isfinite(part).all() for part in found)
    np.testing.assert_allclose(found.scores[..., 0], 1.0, atol=1e-2)
    np.testing.assert_allclose(found.values[:, :, 0], keys, atol=2e-2)
    assert ops.dtype(layer.memory_keys) == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_memory_stored_in_16_bits_returns_the_compute_dtype(dtype):
    layer = layer_of(write="always", memory_dtype=dtype)
    keys = random(2, 4, 3)
    layer(*tensors(keys, keys, keys))
    found = layer(*tensors(keys))
    assert (
        ops.dtype(layer.memory_keys) == ops.dtype(layer.memory_values) == dtype
    )
    assert ops.dtype(found.keys) == "float32"
    rounded = ops.convert_to_numpy(ops.cast(ops.cast(keys, dtype), "float32"))
    model = Model(retrieval.RingMemory(3, 11), 2)
    model.add(rounded, rounded)
    check_found(found, model, keys, 3)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_a_memory_of_integers_is_refused(dtype):
    with pytest.raises(ValueError, match="floating-point.*Received: memory_"):
        layer_of(memory_dtype=dtype)


# Integer values.

ID = (1 << 24) + 1  # the first integer that float32 rounds
VALUE_DTYPES = ["int32", "int64", "float64", "float16", "bfloat16"]


def skip_without(dtype):
    if dtype.endswith("64"):
        harness.skip_on("jax", because="not applicable: no 64 bits here")


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_values_come_back_in_their_dtype(dtype):
    skip_without(dtype)
    ring = retrieval.RingMemory(2, 5, 1, value_dtype=dtype)
    state = ring.initial_state(1, "bfloat16")
    ids = {"int32": [ID, -(1 << 31)], "int64": [ID, (1 << 63) - 1]}
    ids = ids.get(dtype, [3, 4])
    if dtype == "float64":
        ids = [1 / 3, 1e-300]
    keys = np.eye(2, dtype="float32")[None]
    state = ring.add(state, keys, np.array(ids)[None, :, None])
    assert ops.dtype(state.keys) == "bfloat16"
    found = ring.search(state, keys, 3)
    assert ops.dtype(found.values) == ops.dtype(state.values) == dtype
    values = ops.convert_to_numpy(found.values)[0, :, :, 0]
    assert values.tolist() == [[*ids, 0], [*ids[::-1], 0]]


@pytest.mark.parametrize(
    "dtype, policy", [("int32", "mixed_float16"), ("int64", "float32")]
)
def test_a_layer_returns_ids_exactly(dtype, policy, tmp_path):
    skip_without(dtype)

    def made():
        queries = keras.Input(batch_shape=(1, 2, 2))
        ids = keras.Input(batch_shape=(1, 2, 1), dtype=dtype)
        layer = layer_of(5, 1, value_dtype=dtype, dtype=policy, write="always")
        return keras.Model([queries, ids], layer(queries, queries, ids).values)

    model, keys = made(), np.eye(2, dtype="float32")[None]
    ids = np.array([[[ID], [ID + 2]]], dtype)
    model.predict([keys, ids], verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    again = made()
    again.load_weights(tmp_path / "model.weights.h5")
    for one in (model, again):
        found = one.predict([keys, ids], verbose=0)
        assert found.dtype == dtype
        assert found[0, :, 0, 0].tolist() == [ID, ID + 2]


def test_a_layer_checks_arrays_before_the_backend_casts_them():
    """JAX would cut them to 32 bits."""
    layer, keys = layer_of(5, 1, value_dtype="int32"), np.ones((1, 1, 2))
    layer(keys, keys, np.array([[[ID]]]), training=True)
    assert contents(layer).values[0, 0] == ID
    with pytest.raises(ValueError, match=f"`values` .*int32 keeps.*{ID << 30}"):
        layer(keys, keys, np.array([[[ID << 30]]]))
    with pytest.raises(ValueError, match="`keys` .*float32 keeps.*16777217"):
        layer(np.full((1, 1, 2), ID), np.full((1, 1, 2), ID), [[[1]]])


@pytest.mark.parametrize("values", [np.array([[[2049]]]), [[[2049]]]])
def test_a_layer_refuses_values_that_its_outputs_would_round(values):
    layer, keys = layer_of(5, 1, dtype="mixed_float16"), np.ones((1, 1, 2))
    with pytest.raises(ValueError, match="`values` .*float16 keeps.*2049"):
        layer(keys, keys, values, training=True)


def test_a_layer_stores_keys_and_values_unrounded():
    layer = layer_of(5, 1, write="always", dtype="mixed_float16")
    keys = np.array([[[1.0, 1 / 3]]], "float32")
    layer(*tensors(keys, keys, keys))
    assert (contents(layer).keys[:, :1] == keys).all()
    assert (contents(layer).values[:, :1] == keys).all()


@pytest.mark.parametrize(
    "dtype, given, told",
    [
        (None, np.array([[[ID]]]), 'float32 keeps.*value_dtype="int32"'),
        (None, [[[ID]]], "Received: 16777217"),
        (None, ops.ones((1, 1, 1), "int32"), "float32 keeps.*dtype int32"),
        ("float16", np.array([[[4097]]]), "float16 keeps.*4097"),
        ("int32", np.array([[[1 << 31]]]), 'int32 keeps.*"int64"'),
        ("int32", np.ones((1, 1, 1)), "of integers.*dtype float64"),
        ("int32", [[[1.0]]], '`value_dtype="int32"'),
        ("int32", ops.ones((1, 1, 1)), "of integers.*dtype float32"),
        ("int32", np.ones((1, 1, 1), "uint32") << 31, "int32 keeps"),
    ],
)
def test_values_that_would_be_rounded_are_refused(dtype, given, told):
    ring = retrieval.RingMemory(2, 5, 1, value_dtype=dtype)
    with pytest.raises(ValueError, match=f"`values` must be .*{told}"):
        ring.add(ring.initial_state(1), np.ones((1, 1, 2)), given)


def test_keys_that_would_be_rounded_are_refused():
    ring = retrieval.RingMemory(2, 5, 0)
    state = ring.initial_state(1)
    for keys in (np.full((1, 1, 2), ID), ops.ones((1, 1, 2), "int32")):
        with pytest.raises(ValueError, match="`keys` must be .*float32 keeps"):
            ring.add(state, keys)
    ring.add(state, np.full((1, 1, 2), ID - 1))
    with pytest.raises(ValueError, match="`dtype` must.*`value_dtype` is for"):
        ring.initial_state(1, "int32")


def test_a_layer_refuses_dtypes_that_a_graph_might_round():
    entry = keras.Input(batch_shape=(1, 2, 2))
    ids = keras.Input(batch_shape=(1, 2, 1), dtype="int32")
    with pytest.raises(ValueError, match='`values`.*value_dtype="int32"'):
        layer_of(5, 1)(entry, entry, ids)
    with pytest.raises(ValueError, match='`values`.*value_dtype="int32"'):
        layer_of(5, 1, value_dtype="int32")(entry, entry, entry)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float8", 3, "text"])
def test_other_dtypes_of_values_are_refused(dtype):
    with pytest.raises(ValueError, match="`value_dtype` must be one of.*None"):
        retrieval.RingMemory(2, 5, value_dtype=dtype)
    with pytest.raises(ValueError, match="`value_dtype` must be one of.*None"):
        layer_of(value_dtype=dtype)


@pytest.mark.skipif(harness.BACKEND != "jax", reason="of JAX")
def test_64_bits_must_be_enabled_in_jax():
    with pytest.raises(ValueError, match="`value_dtype`.*jax_enable_x64"):
        retrieval.RingMemory(2, 5, value_dtype="int64")
    with pytest.raises(ValueError, match="`dtype`.*jax_enable_x64"):
        retrieval.RingMemory(2, 5).initial_state(1, "float64")


BATCH, TIME = 3, 4


def remembering(has_clear=False, **options):
    """A model that answers from its memory, and its memory layer."""
    layer = layer_of(17, name="memory", **options)
    x = keras.Input(batch_shape=(BATCH, TIME, 5))
    y = keras.Input(batch_shape=(BATCH, TIME, 2))
    clear = [keras.Input(batch_shape=(BATCH,), dtype="bool")] * has_clear
    keys = keras.layers.Dense(3, name="keys")(x)
    found = layer(keys, keys, y, clear=clear[0] if clear else None)
    near = ops.softmax(ops.where(found.mask, found.scores, -1e9))
    read = ops.sum(near[..., None] * found.values, axis=2)
    outputs = keras.layers.Dense(2)(ops.concatenate([keys, read], axis=-1))
    return keras.Model([x, y, *clear], outputs), layer


def fed(steps, seed=0):
    shape = BATCH * steps, TIME
    return random(*shape, 5, seed=seed), random(*shape, 2, seed=seed)


HOW = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}


@pytest.mark.few_backends
@pytest.mark.parametrize(
    "write, how",
    [
        ("training", "xla"),
        ("training", "graph"),
        pytest.param("always", "eager", marks=pytest.mark.slow),
        pytest.param("never", "eager", marks=pytest.mark.slow),
        pytest.param("always", "xla", marks=pytest.mark.slow),
        pytest.param("never", "xla", marks=pytest.mark.slow),
    ],
)
def test_fit_fills_the_memory_and_evaluation_does_not(write, how):
    harness.skip_on(
        "numpy", because="not applicable: Keras does not train here"
    )
    if how == "xla":
        harness.skip_on("torch", because="not run: a minute of compilation")
    model, layer = remembering(write=write)
    model.compile("sgd", "mse", **HOW[how])
    x, y = fed(steps=3)
    fit = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    loss = model.fit([x, y], y, **fit).history["loss"]
    assert np.isfinite(loss).all()
    after = contents(layer)
    count = 0 if write == "never" else 3 * TIME
    assert after.count.tolist() == [count] * BATCH
    for step in range(3 if count else 0):  # they are in order
        values = after.values[:, step * TIME : (step + 1) * TIME]
        assert (values == y[step * BATCH : (step + 1) * BATCH]).all()
    assert after.keys[:, :count].any() or not count
    model.evaluate([x, y], y, batch_size=BATCH, verbose=0)
    model.predict([x, y], batch_size=BATCH, verbose=0)
    assert same(contents(layer), after) == (write != "always")
    if write == "always":
        assert (contents(layer).count % 17 == 9 * TIME % 17).all()
    weights = {w.path: ops.convert_to_numpy(w) for w in model.weights}
    model.fit([x, y], y, **fit)
    assert (contents(layer).count == after.count).all() == (write == "never")
    for weight in model.trainable_weights:
        moved = weights[weight.path] != ops.convert_to_numpy(weight)
        assert moved.any() and np.isfinite(ops.convert_to_numpy(weight)).all()


def test_clear_can_be_an_input_of_a_model():
    model, layer = remembering(has_clear=True, write="always")
    x, y = fed(steps=1)
    none, some = np.zeros(BATCH, bool), np.array([True, False, False])
    model.predict([x, y, none], verbose=0)
    model.predict([x, y, some], verbose=0)
    assert contents(layer).count.tolist() == [4, 8, 8]
    model.predict([x, y, ~some], verbose=0)
    assert contents(layer).count.tolist() == [8, 4, 4]


@harness.needs_tensorflow
@pytest.mark.parametrize("how", ["graph", "xla"])
def test_a_smaller_last_batch_is_refused(how):
    model, layer = remembering(write="always")
    model.compile("sgd", "mse", **HOW[how])
    x, y = (part[:-1] for part in fed(steps=2))
    told = r"(?s)not compatible with expected shape \[3,.*with_state_must_be_3"
    with pytest.raises(Exception, match=told):
        model.predict([x, y], batch_size=BATCH, verbose=0)
    assert np.isfinite(contents(layer).keys).all()


def test_saved_files_keep_the_entries(tmp_path):
    model, layer = remembering(write="always")
    x, y = fed(steps=1)
    for seed in range(5):  # wraps around
        model.predict(list(fed(steps=1, seed=seed)), verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    fresh, other = remembering(write="always")
    fresh.load_weights(tmp_path / "model.weights.h5")
    for copy in (loaded.get_layer("memory"), other):
        assert same(contents(copy), contents(layer))
    for copy in (loaded.get_layer("memory"), other, layer):
        copy.write = "never"
    for copy in (loaded, fresh):
        close(copy([x, y]), model([x, y]), tolerance=0)
    layer.reset_state()
    assert not arrays_of(layer.state).count.any()


def test_a_clone_starts_empty():
    model, layer = remembering(write="always")
    model.predict(list(fed(steps=1)), verbose=0)
    copy = keras.models.clone_model(model)
    assert not contents(copy.get_layer("memory")).count.any()
    assert contents(layer).count.all()


@harness.needs_tensorflow
@pytest.mark.parametrize(
    "method",
    [
        "auto",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("exact", "approximate")
        ),
    ],
)
def test_an_export_gives_the_same_results(method, tmp_path):
    import tensorflow as tf

    model, layer = remembering(search_method=method)
    for seed in range(5):
        model(list(fed(steps=1, seed=seed)), training=True)
    before = contents(layer)
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "model"))
    x, y = fed(steps=1, seed=9)
    expected = model([x, y])
    for _ in range(2):
        close(served.serve([x, y]), expected, tolerance=1e-6)
    assert same(contents(layer), before)


# Other devices.


@harness.needs_tensorflow
def test_the_ring_lowers_for_other_devices():
    """JAX lowers for a device without having one."""
    pytest.importorskip("jax")
    # XLA's code for this CPU need not be fast.
    on_cpu = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    on_cpu["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    text = programs.output(pathlib.Path(__file__), **on_cpu)
    lines = dict(map(json.loads, text.splitlines()))
    assert list(lines) == list(ring_module.SEARCH_METHODS)
    for platforms, difference in lines.values():
        assert platforms == ["tpu", "cuda", "cpu"] and difference < 1e-5


def lower():
    """Prints a line for each ring that lowers."""
    import jax
    from jax import export

    for method, similarity in zip(
        ring_module.SEARCH_METHODS, similarities_module.SIMILARITIES
    ):
        ring = retrieval.RingMemory(3, 40, 2, similarity, method)

        @jax.jit
        def step(state, keys, values, mask, queries, ring=ring):
            state = ring.add(state, keys, values, mask)
            return ring.search(state, queries, 3).scores

        state = retrieval.RingState(*map(np.asarray, ring.initial_state(2)))
        given = random(2, 5, 3), random(2, 5, 2), random(2, 5) > 0
        given += (random(2, 7, 3, seed=1),)
        lowered = export.export(step, platforms=("tpu", "cuda", "cpu"))(
            state, *given
        )
        scores = np.asarray(step(state, *given))
        there = scores > -np.inf
        difference = (np.asarray(lowered.call(state, *given)) - scores)[there]
        told = list(lowered.platforms), float(np.abs(difference).max())
        print(json.dumps([method, told]), flush=True)


# Accelerators.


def rounding_matmul(one, other):
    """Multiplies like a GPU that rounds factors to 11 bits."""
    halves = []
    for x in map(ops.convert_to_numpy, (one, other)):
        bits = np.ascontiguousarray(x, "float32").view("uint32")
        bits = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        halves.append(bits.view("float32"))
    return ops.convert_to_tensor(np.matmul(*halves))


@harness.needs_tensorflow
def test_products_stay_exact_where_factors_are_rounded(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, columns = rng.normal(size=(2, 64, 64)).astype("float32")
    exact = vectors.astype("float64") @ columns.astype("float64")
    monkeypatch.setattr(exact_module.ops, "matmul", rounding_matmul)
    errors = []
    for rounds in (False, True):
        monkeypatch.setattr(slots_module, "_rounds", lambda: rounds)  # noqa: B023
        found = slots_module.precise_products(
            *map(ops.convert_to_tensor, (vectors, columns))
        )
        errors.append(np.abs(ops.convert_to_numpy(found) - exact).max())
    assert errors[0] > 1e-3
    # Each product lacks the term of both remainders (2^-20), and the two small
    # terms are rounded (2^-22).
    assert errors[1] < (np.abs(vectors) @ np.abs(columns)).max() * 2**-19


@pytest.mark.skipif(harness.BACKEND != "jax", reason="of JAX")
def test_products_ask_for_full_precision():
    import jax

    zeros = np.zeros((3, 3), "float32")
    steps = str(jax.make_jaxpr(slots_module.precise_products)(zeros, zeros))
    assert "HIGHEST" in steps


@pytest.mark.parametrize("number", [1, 5, 64, 257, 4096])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_largest_equals_top_k(number, top_k):
    if top_k > number:
        pytest.skip("fewer than K")
    values = np.random.default_rng(number).normal(size=(2, 3, number))
    values = values.astype("float32")
    values[0, 0, number // 2 + 8 :] = -np.inf
    found, places = map(
        ops.convert_to_numpy, exact_module.largest(values, top_k)
    )
    np.testing.assert_array_equal(found, -np.sort(-values)[..., :top_k])
    np.testing.assert_array_equal(
        np.take_along_axis(values, places, axis=-1), found
    )


@harness.needs_tensorflow
@pytest.mark.parametrize("search", ["nearest", "exact", "auto"])
def test_neighbours_stay_exact_where_factors_are_rounded(search, monkeypatch):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(1, 2000, 16)).astype("float32")
    queries = rng.normal(size=(1, 300, 16)).astype("float32")

    def found():
        if search == "nearest":
            keys_, queries_ = map(ops.convert_to_tensor, (keys[0], queries[0]))
            places = retrieval.nearest(queries_, keys_, 32)[1][None]
        else:
            ring = retrieval.RingMemory(16, 2000, search_method=search)
            state = ring.add(ring.initial_state(1), keys, keys)
            places = ring.search(state, queries, 32).indices
        return np.sort(ops.convert_to_numpy(places), axis=-1)

    right = found()
    monkeypatch.setattr(exact_module.ops, "matmul", rounding_matmul)
    assert (found() != right).any()
    monkeypatch.setattr(slots_module, "_rounds", lambda: True)
    np.testing.assert_array_equal(found(), right)


@harness.needs_tensorflow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_products_keep_other_dtypes(dtype, monkeypatch):
    monkeypatch.setattr(slots_module, "_rounds", lambda: True)
    ones = ops.ones((2, 2), dtype)
    found = slots_module.precise_products(ones, ones)
    assert ops.dtype(found) == dtype
    assert (ops.convert_to_numpy(found) == 2).all()


@harness.needs_tensorflow
def test_rounding_is_expected_on_gpus_with_tensor_float_32(monkeypatch):
    import tensorflow as tf

    assert not slots_module._rounds() or tf.config.list_physical_devices("GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    assert slots_module._rounds()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        assert not slots_module._rounds()
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)


if __name__ == "__main__":
    lower()
