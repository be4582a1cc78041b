"""Compares kNN memories with memorizing-transformers-pytorch."""

import functools
import multiprocessing
import sys
import tempfile
import time

import numpy as np

from benchmarks import key_drift
from benchmarks import measure
from benchmarks import neighbours
from benchmarks import references
from benchmarks import report
from benchmarks import static_store
from benchmarks.neighbours import DIM

ROWS, HEADS, QUERIES, TOP_K, ADDED = 2, 8, 512, 32, 512
CASES = {  # entries per row, target recall, target speedup
    "2K": (1 << 11, 1.0, 2.5),
    "16K": (1 << 14, 1.0, 1.3),
    "64K": (1 << 16, 0.95, 3),
    "256K": (1 << 18, 0.95, 3.5),
}
IN_GRAPH = 1 << 14  # largest memory that a graph compares fully
SAMPLE = 1000  # queries, of all rows, that measure recall
REFERENCES = {
    "reference, a process for each row": True,
    "reference, one process": False,
}
PACKAGES = (
    "keras",
    "tensorflow",
    "scann",
    "memorizing-transformers-pytorch",
    "faiss-cpu",
    "faiss-gpu",
    "torch",
    "numpy",
)
SECONDS = 1200  # time limit of filling a variant, and of a step
HEADER = (
    "entries a row",
    "data",
    "variant",
    "ms",
    "search, ms",
    "add, ms",
    "recall",
    "asked for",
    "times as fast",
    "goal",
    "trees built",
)


def run(names, kinds, rounds, threads, quick=False, json=None):
    """Measures, prints tables, and returns all numbers.

    Args:
        names: keys of `CASES`, or "static" or "drift".
        kinds: some of `neighbours.KINDS`, for all but "drift".
        rounds: number of measured steps.
        threads: number of threads of each process.
        quick: bool, True for a smaller grid of the static store.
        json: path of a file for all numbers, if any.
    """
    numbers = {
        "machine": report.machine(PACKAGES),
        "threads": threads,
        "rounds": rounds,
        "dynamic": [],
    }

    def write(**more):
        numbers.update(more)
        report.write_json(json, numbers)

    table = report.Table(HEADER)
    for name in (name for name in names if name in CASES):
        for kind in kinds:
            print(f"{name}, {kind} ...", file=sys.stderr, flush=True)
            before = numbers["dynamic"]

            def seen(results, name=name, kind=kind, before=before):
                found = [
                    {"case": name, "data": kind, "variant": variant, **result}
                    for variant, result in results.items()
                ]
                write(dynamic=before + found)

            results = measured(name, kind, rounds, threads, seen)
            seen(results)
            table.add(rows_of(name, kind, results))
    table.end()
    if table.rows:
        print(
            f"{ROWS} x {HEADS} x {QUERIES} queries, top_k {TOP_K}, then "
            f"{ADDED} entries added to each of {ROWS} rows; D = V = {DIM}. "
            f"Medians of {report.counted(rounds, 'step')} in turn, "
            f"{report.counted(threads, 'thread')}. Times as fast as the faster "
            "reference (*), with the middle half. Recall at first, and after "
            "the last step. Trees that were built during the rounds, or "
            "begun, are in their times.\n"
        )
    if "static" in names:
        for kind in kinds:
            before = numbers.get("static", {})

            def of_static(found, kind=kind, before=before):
                write(static={**before, kind: found})

            static_store.run(kind, rounds, threads, quick, of_static)
    if "drift" in names:
        key_drift.run(threads, lambda found: write(drift=found))
    print(f"{report.on(numbers['machine'])}.")
    return numbers


def measured(name, kind, rounds, threads, seen=None):
    """Results of a case by variant, with ratios and spread."""
    # Processes are killed, so their files in the folder are removed here.
    with tempfile.TemporaryDirectory(prefix="retrieval-") as folder:
        results = measure.compare(
            jobs(CASES[name][0], kind, threads, folder),
            rounds,
            seen=seen,
            seconds=SECONDS,
        )
    ran = [name for name in REFERENCES if "not_run" not in results[name]]
    faster = min(
        ran, key=lambda name: results[name]["milliseconds"], default=None
    )
    for result in results.values():
        if "not_run" not in result and faster:
            result["faster_reference"] = faster
            result["ratio_quartiles"] = measure.ratio(result, results[faster])
            result["ratios"] = {
                name: measure.ratio(result, results[name]) for name in ran
            }
    return results


def rows_of(name, kind, results):
    rows = []
    for variant, result in results.items():
        start = [name, kind, variant]
        if "not_run" in result:
            reason = f"not run: {result['not_run']}"
            rows.append([*start, reason, *[""] * (len(HEADER) - 4)])
            continue
        first = result["told"]
        last = result.get("told_after", first)
        if variant == result.get("faster_reference"):
            start[-1] += " (*)"
        is_ours = variant not in REFERENCES
        rows.append(
            [
                *start,
                report.short(result["milliseconds"]),
                report.short(last["search_ms"]),
                report.short(last["add_ms"]),
                f"{first['recall']:.3f}, {last['recall']:.3f}",
                CASES[name][1] if is_ours else "",
                report.with_spread(result.get("ratio_quartiles")),
                CASES[name][2] if is_ours else "",
                last.get("trees_built", ""),
            ]
        )
    return rows


def jobs(size, kind, threads, folder):
    """Dict from each variant to the arguments of a `measure.Worker`, or to a
    text that says why it cannot run."""
    found = {}
    for i, (name, processes) in enumerate(REFERENCES.items()):
        found[name] = 'needs `pip install -e ".[bench]"`'
        if has_reference():
            found[name] = (
                functools.partial(prepare_reference, threads),
                functools.partial(
                    Reference, size, kind, f"{folder}/{i}", processes
                ),
            )
    prepared = functools.partial(neighbours.prepare, threads)
    found['KNNMemory, search_method="approximate"'] = (
        'needs `pip install -e ".[retrieval]"`'
    )
    if references.installed("scann"):
        found['KNNMemory, search_method="approximate"'] = (
            prepared,
            functools.partial(OfKNNMemory, size, kind, "approximate"),
        )
    found['KNNMemory, search_method="exact"'] = (
        prepared,
        functools.partial(OfKNNMemory, size, kind, "exact"),
    )
    if size <= IN_GRAPH:
        for name, jit_compile in (
            ("RingMemory, XLA", True),
            ("RingMemory, no XLA", False),
        ):
            found[name] = (
                prepared,
                functools.partial(OfRingMemory, size, kind, jit_compile),
            )
    return found


def has_reference():
    names = "torch", "faiss", "einops_exts", "memorizing_transformers_pytorch"
    return all(map(references.installed, names))


def prepare_reference(threads):
    neighbours.use_cores(threads)
    references.prepare(threads, None)
    import faiss
    import memorizing_transformers_pytorch  # noqa: F401

    # Otherwise joblib would start no processes from here.
    multiprocessing.current_process()._config["daemon"] = False
    faiss.omp_set_num_threads(threads)


class Step:
    """A search and an addition in a memory with `size` entries in each row.

    The first component of an entry's value is its number, which identifies it.
    Once they are full, all variants get the same vectors.
    """

    def __init__(self, size, kind):
        self.size = size
        self.data = neighbours.Data(kind, seed=2)
        self.number = 0
        self.parts = []
        self.fill()
        self.data = neighbours.Data(kind, seed=3)

    def entries(self, size):
        """(ROWS, size, DIM) keys and values."""
        keys, values = self.data.draw(ROWS, size), self.data.draw(ROWS, size)
        numbers = np.arange(self.number, self.number + size)
        values[..., 0] = numbers  # exact up to 2^24
        self.number += size
        return keys, values

    def before(self):
        """Draws queries and entries, in the form that the variant takes."""
        self.queries = self.data.draw(ROWS, HEADS, QUERIES)
        self.given = self.converted(self.queries, *self.entries(ADDED))

    def __call__(self):
        queries, keys, values = self.given
        begun = time.perf_counter()
        found = self.search(queries)
        between = time.perf_counter()
        self.add(keys, values)
        ended = time.perf_counter()
        self.parts.append((1e3 * (between - begun), 1e3 * (ended - between)))
        return found

    def tell(self):
        """Recall, and median times of the parts since the last call."""
        # The second of each round's two steps is measured.
        search, add = np.median(self.parts[1::2] or self.parts, axis=0)
        self.parts = []
        self.before()
        values, mask = self.arrays(self.search(self.given[0]))
        flat = self.queries.reshape(ROWS, -1, DIM)
        some = slice(None, None, -(-flat.shape[1] * ROWS // SAMPLE))
        recalls = []
        for row in range(ROWS):
            keys, of_keys = self.held(row)
            numbers = values.reshape(*flat.shape[:2], TOP_K, DIM)[row, some]
            recalls.append(
                neighbours.recall(
                    flat[row, some],
                    keys,
                    of_keys[:, 0],
                    np.where(
                        mask.reshape(*flat.shape[:2], TOP_K)[row, some],
                        numbers[..., 0],
                        -1,
                    ),
                    neighbours.least_right(flat[row, some], keys, TOP_K),
                )
            )
        return {
            "recall": float(np.mean(recalls)),
            "search_ms": float(search),
            "add_ms": float(add),
        }


class Reference(Step):
    """The reference, restored to `size` entries before each step."""

    def __init__(self, size, kind, path, processes):
        from memorizing_transformers_pytorch import knn_memory

        self.memory = knn_memory.KNNMemory(
            DIM,
            4 * size,  # a full index is cleared
            ROWS,
            memmap_filename=path,
            multiprocessing=processes,
        )
        self.jobs = self.memory.n_jobs
        super().__init__(size, kind)

    def fill(self):
        import faiss

        self._add_untimed(self.entries(self.size - ADDED))
        self.saved = [
            (faiss.clone_index(knn.index), knn.ids) for knn in self.memory.knns
        ]
        self.last = self.entries(ADDED)

    def before(self):
        import faiss

        for knn, (index, ids) in zip(self.memory.knns, self.saved):
            knn.index, knn.ids = faiss.clone_index(index), ids
        self.memory.db_offsets[:] = self.size - ADDED
        # A copy has no spare capacity: its first addition would move all.
        self._add_untimed(self.last)
        super().before()

    def _add_untimed(self, entries):
        import torch

        self.memory.n_jobs = 1
        self.memory.add(torch.from_numpy(np.stack(entries, axis=2)))
        self.memory.n_jobs = self.jobs

    def converted(self, queries, keys, values):
        import torch

        entries = np.stack([keys, values], axis=2)
        return torch.from_numpy(queries), torch.from_numpy(entries), None

    def search(self, queries):
        return self.memory.search(queries, TOP_K)

    def add(self, entries, _):
        self.memory.add(entries)

    def arrays(self, found):
        entries, mask = found
        return entries[..., 1, :].numpy(), mask.numpy()

    def held(self, row):
        entries = self.memory.db[row, : self.memory.db_offsets[row]]
        return np.array(entries[:, 0]), np.array(entries[:, 1])

    def tell(self):
        from joblib.externals import loky

        told = super().tell()
        if self.jobs > 1:  # otherwise they outlive this process
            loky.get_reusable_executor().shutdown(kill_workers=True)
        return told


class OfKNNMemory(Step):
    """`KNNMemory`, in host memory."""

    def __init__(self, size, kind, search_method):
        import keras_memory

        self.memory = keras_memory.KNNMemory(
            DIM, size, ROWS, search_method=search_method
        )
        self.trees = neighbours.Trees()
        super().__init__(size, kind)

    def fill(self):
        from keras_memory.retrieval import tuning

        first = min(self.size, ADDED)
        self.memory.add(*self.entries(first))
        # Queries tune the tree.
        self.memory.search(self.data.draw(ROWS, HEADS, QUERIES), TOP_K)
        if first < self.size:
            self.memory.add(*self.entries(self.size - first))
        self.memory.wait()
        if (
            self.memory.search_method == "approximate"
            and self.size > tuning.FLAT
        ):
            # Halfway between two rebuilds: the average age of a tree.
            steps = int(tuning.REBUILT / 2 * self.size / ADDED)
            for _ in range(min(steps, self.size // ADDED)):
                self.memory.add(*self.entries(ADDED))
            self.memory.wait()

    def converted(self, *arrays):
        return arrays

    def search(self, queries):
        return self.memory.search(queries, TOP_K)

    def add(self, keys, values):
        self.memory.add(keys, values)

    def arrays(self, found):
        return found.values, found.mask

    def held(self, row):
        return self.memory.entries(row)

    def tell(self):
        told = super().tell()
        if self.memory.search_method == "approximate":
            told.update(self.trees.tell())
            told["leaves"] = [
                (index.leaves, index.leaves_to_search)
                for index in self.memory._indexes
            ]
        return told


class OfRingMemory(Step):
    """`RingMemory`, in the graph."""

    def __init__(self, size, kind, jit_compile):
        import tensorflow as tf

        from keras_memory import retrieval

        ring = retrieval.RingMemory(DIM, size, search_method="auto")
        options = {"jit_compile": jit_compile, "autograph": False}
        self._search = tf.function(
            lambda state, queries: ring.search(state, queries, TOP_K), **options
        )
        self._add = tf.function(ring.add, **options)
        self._fill = ring.add
        self.state = ring.initial_state(ROWS)
        super().__init__(size, kind)

    def fill(self):
        self.state = self._fill(self.state, *self.entries(self.size))

    def converted(self, *arrays):
        import tensorflow as tf

        return [tf.constant(array) for array in arrays]

    def search(self, queries):
        found = self._search(self.state, queries)
        found.mask.numpy()  # waits for the result
        return found

    def add(self, keys, values):
        self.state = self._add(self.state, keys, values)
        self.state.count.numpy()

    def arrays(self, found):
        return found.values.numpy(), found.mask.numpy()

    def held(self, row):
        return self.state.keys[row].numpy(), self.state.values[row].numpy()
