"""Data and recall, shared by the benchmarks of retrieval."""

import functools
import os
import time

import numpy as np

from benchmarks import cases

DIM = 64
KINDS = "clustered", "unclustered"
CLUSTERS, DEVIATION = 1000, 0.5
SLACK = 1e-5  # of a score: the rounding error of a right neighbour


def prepare(threads):
    """Imports TensorFlow and keras_memory with this number of threads."""
    use_cores(threads)
    cases.prepare(threads)


def use_cores(number):
    """Limits this process, and the processes it starts, to some cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:number])


class Data:
    """Draws vectors of one distribution.

    Args:
        kind: one of `KINDS`.
        seed: int, seed of the vectors; the centers are always the same.
    """

    def __init__(self, kind, seed):
        self.rng = np.random.default_rng(seed)
        self.centers = None
        if kind == "clustered":
            centers = np.random.default_rng(1)
            self.centers = centers.standard_normal((CLUSTERS, DIM), "float32")

    def draw(self, *shape):
        """(*shape, DIM) float32."""
        if self.centers is None:
            return self.rng.standard_normal((*shape, DIM), "float32")
        return self.draw_with_clusters(*shape)[0]

    def draw_with_clusters(self, *shape):
        """(*shape, DIM) float32, and their clusters, (*shape)."""
        vectors = self.rng.standard_normal((*shape, DIM), "float32")
        clusters = self.rng.integers(0, CLUSTERS, shape)
        vectors *= np.float32(DEVIATION)
        vectors += self.centers[clusters]
        return vectors, clusters


class Trees:
    """Counts the trees that ScaNN builds in this process, and times them."""

    def __init__(self):
        from keras_memory.retrieval import scann_row

        self.built, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        build = scann_row.ScannRow._build
        build = getattr(build, "__wrapped__", build)

        @functools.wraps(build)
        def timed(*args):
            self.built += 1
            begun, cpu_begun = time.perf_counter(), time.thread_time()
            try:
                return build(*args)
            finally:
                self.seconds += time.perf_counter() - begun
                self.cpu_seconds += time.thread_time() - cpu_begun

        scann_row.ScannRow._build = timed

    def tell(self):
        """Numbers of the trees built since the last call."""
        told = {
            "trees_built": self.built,
            "tree_seconds": self.seconds,
            "tree_cpu_seconds": self.cpu_seconds,  # of the building threads
        }
        self.built, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        return told


def least_right(queries, keys, top_k):
    """(Q,): the score of each query's last right neighbour, by brute force."""
    least = [
        np.partition(some @ keys.T, -top_k, axis=1)[:, -top_k]
        for some in np.split(queries, range(100, len(queries), 100))
    ]
    return np.concatenate(least)


def recall(queries, keys, numbers, found, least):
    """The share of the right neighbours that were found.

    An entry is right if its score reaches that of the last right neighbour,
    minus `SLACK`, since entries may be equally near. Entries found twice count
    once; entries that are not in the memory do not count.

    Args:
        queries: (Q, D).
        keys: (n, D), keys of the memory.
        numbers: (n,), distinct numbers of the entries.
        found: (Q, K), numbers of the found entries; -1 for none.
        least: (Q,), the result of `least_right`.

    Returns:
        float in [0, 1].
    """
    order = np.argsort(numbers)
    places = np.searchsorted(numbers, found, sorter=order)
    places = order[np.minimum(places, len(numbers) - 1)]
    scores = np.einsum("qkd,qd->qk", keys[places], queries)
    least = least - SLACK * (1 + np.abs(least))
    is_right = (numbers[places] == found) & (scores >= least[:, None])
    right = np.sort(np.where(is_right, found, -1), axis=1)
    different = np.diff(right, axis=1, prepend=-1) > 0
    return float(different.sum() / found.size)
