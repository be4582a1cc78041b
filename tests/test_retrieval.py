"""Nearest neighbours."""

import harness
import numpy as np
import pytest
from harness import close
from keras import ops

from keras_memory import retrieval


def brute_force(queries, keys, top_k, bias):
    products = queries @ keys.T + bias
    order = np.argsort(-products, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(products, order, axis=1), order


@pytest.mark.parametrize("block", [3, 4, 11, 16, 100])
@pytest.mark.parametrize("top_k", [1, 5, 11])
def test_nearest_is_brute_force(block, top_k, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", block)
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
        monkeypatch.setattr(retrieval, "BLOCK", block)
        keys = ops.convert_to_tensor(np.arange(5.0)[:, None], "float32")
        bias = ops.convert_to_tensor(
            [-np.inf, 0.0, 0.0, -np.inf, -np.inf], "float32"
        )
        found, places = retrieval.nearest(keys[4:], keys, 3, bias)
        assert ops.convert_to_numpy(found).tolist() == [[8.0, 4.0, -np.inf]]
        assert ops.convert_to_numpy(places)[:, :2].tolist() == [[2, 1]]


@pytest.mark.parametrize("top_k", [0, 6])
def test_another_top_k_is_refused(top_k):
    keys = ops.ones((5, 2))
    with pytest.raises(ValueError, match=r"top_k=.*keys of shape \(5, 2\)"):
        retrieval.nearest(keys, keys, top_k)


@harness.needs_tensorflow
def test_nearest_compiles_with_a_free_number_of_keys(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(retrieval, "BLOCK", 4)
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
