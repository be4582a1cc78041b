"""Compares ScaNN with faiss and exact search on a store without changes."""

import functools
import sys
import tempfile
import time

import numpy as np

from benchmarks import measure
from benchmarks import neighbours
from benchmarks import references
from benchmarks import report

SIZE, QUERIES, BATCH, TOP_K = 1_000_000, 10_000, 1000, 10
TARGETS = 0.95, 0.99
SAMPLE = 2000  # queries that choose the parameters of faiss
REPEATS = 3  # of the chosen points, to find the fastest index
ROUGHLY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ROUGHLY += 384, 512, 768, 1024, 1536, 2048
FACTORS = 2, 4, 8, 16, 32, 64  # of k, for the candidates to rescore
GRID = {  # faiss's name of an index, and the searched parameter
    "IVF1000,Flat": "nprobe",
    "IVF2000,Flat": "nprobe",
    "IVF4000,Flat": "nprobe",
    "IVF2000,PQ32x4fs,RFlat": "nprobe",
    "IVF4000,PQ32x4fs,RFlat": "nprobe",
    "HNSW16,Flat": "efSearch",
}
QUICK = "IVF1000,Flat", "IVF2000,PQ32x4fs,RFlat"
EXACT = "faiss", "NumPy", "ScaNN"
FEW = 100  # queries that NumPy compares at a time
GOALS = {0.95: ("faiss", 1.7), 0.99: ("exact", 15)}
GOAL_MEGABYTES = 150  # beyond the vectors, at a recall of 0.95
SECONDS = 1800
GRID_HEADER = (
    "data",
    "index",
    "recall asked for",
    "parameters",
    "queries a second",
    "recall",
    "MB over vectors",
    "build, s",
)
HEADER = (
    "data",
    "variant",
    "recall asked for",
    "queries a second",
    "recall",
    "MB over vectors",
    "build, s",
    "times as fast",
    "goal",
)


def run(kind, rounds, threads, quick=False, seen=lambda numbers: None):
    """Measures, prints two tables, and returns all numbers of one kind of data.
    The arguments are those of `retrieval.run`, and `seen`, a function of the
    numbers so far, called whenever there are more."""
    numbers = {"grid": {}, "exact": {}, "results": []}
    table = report.Table(GRID_HEADER)

    def found(part, name, result):
        numbers[part][name] = result
        seen(numbers)

    def in_turn(results):
        numbers["results"] = [
            {"kind": what, "asked_for": target, **result}
            for (what, target), result in results.items()
        ]
        seen(numbers)

    with tempfile.TemporaryDirectory(prefix="static-") as folder:
        _say(kind, "right neighbours")
        measure.alone(prepare_data, folder, kind, threads)
        grid, exact_ones = numbers["grid"], numbers["exact"]
        for spec in QUICK if quick else GRID:
            _say(kind, spec)
            result = {"not_run": 'needs `pip install -e ".[bench]"`'}
            if references.installed("faiss"):
                result = measure.alone(of_grid, folder, spec, threads)
            found("grid", spec, result)
            table.add(grid_rows(kind, {spec: result}))
        table.end()
        for name in EXACT:
            _say(kind, f"exact, {name}")
            result = {"not_run": "is not installed"}
            if name == "NumPy" or references.installed(name.lower()):
                result = measure.alone(of_exact, folder, name, threads)
            found("exact", name, result)
        _say(kind, "in turn")
        choice = chosen(grid, exact_ones)
        results = measure.compare(
            jobs(folder, choice, threads),
            rounds,
            seen=in_turn,
            seconds=SECONDS,
        )
    add_numbers(results, choice)
    in_turn(results)
    print(report.table(HEADER, rows_of(kind, results)) + "\n")
    print(
        f"{SIZE:,} x {neighbours.DIM}, {QUERIES:,} queries in batches of "
        f"{BATCH:,} (exact search: one batch, of which NumPy takes {FEW} at a "
        f"time), recall@{TOP_K}. Medians of "
        f"{report.counted(rounds, 'step')} in turn, "
        f"{report.counted(threads, 'thread')}; ratios with the middle half.\n"
    )
    return numbers


def _say(kind, what):
    print(f"static, {kind}: {what} ...", file=sys.stderr, flush=True)


# Functions that run in separate processes.


def prepare_faiss(threads):
    neighbours.use_cores(threads)
    import faiss

    faiss.omp_set_num_threads(threads)


def prepare_data(folder, kind, threads):
    """Writes vectors, queries and scores of the last right neighbours."""
    data = neighbours.Data(kind, seed=2)
    vectors, queries = data.draw(SIZE), data.draw(QUERIES)
    if references.installed("faiss"):
        prepare_faiss(threads)
        import faiss

        index = faiss.IndexFlatIP(neighbours.DIM)
        index.add(vectors)
        least = index.search(queries, TOP_K)[0][:, -1]
    else:
        least = neighbours.least_right(queries, vectors, TOP_K)
    for name, array in (
        ("vectors", vectors),
        ("queries", queries),
        ("least", least),
    ):
        np.save(f"{folder}/{name}.npy", array)


class Store:
    """Memory-mapped vectors, and an index made of them.

    Args:
        folder: that of `prepare_data`.
        make: function of the vectors that returns a search: a function from
            (Q, D) queries to (Q, TOP_K) numbers.
        queries: number of queries of a step.
    """

    def __init__(self, folder, make, queries=None):
        self.vectors, self.queries, self.least = (
            np.load(f"{folder}/{name}.npy", mmap_mode="r")
            for name in ("vectors", "queries", "least")
        )
        self.queries = np.array(self.queries[:queries])
        measure.forget_peak()
        before = measure.memory()
        begun = time.perf_counter()
        self.search = make(self.vectors)
        self.seconds = time.perf_counter() - begun
        measure.forget_peak()
        self.megabytes = None
        if "RssAnon" in before:
            added = measure.memory()["RssAnon"] - before["RssAnon"]
            self.megabytes = added - self.vectors.nbytes / 2**20

    def __call__(self, queries=None):
        queries = self.queries if queries is None else queries
        found = [
            self.search(queries[i : i + BATCH])
            for i in range(0, len(queries), BATCH)
        ]
        return np.concatenate(found)

    def recall(self, number=None):
        queries = self.queries[:number]
        return self.recall_of(self(queries), queries)

    def recall_of(self, found, queries):
        number = len(queries)
        return neighbours.recall(
            queries,
            self.vectors,
            np.arange(len(self.vectors)),
            found,
            self.least[:number],
        )

    def tell(self):
        return {
            "queries": len(self.queries),
            "recall": self.recall(),
            "megabytes": self.megabytes,
            "build_seconds": self.seconds,
        }


def of_grid(folder, spec, threads):
    """Builds an index, writes it, and searches for its parameters.

    Returns:
        Dict: `megabytes`, `build_seconds`, `points`, all tried points, and
        `best`, the best point for each of `TARGETS` that was reached.
    """
    prepare_faiss(threads)
    import faiss

    made = []

    def make(vectors):
        index = faiss.index_factory(
            neighbours.DIM, spec, faiss.METRIC_INNER_PRODUCT
        )
        index.train(vectors)
        index.add(vectors)
        made.append(index)
        return lambda queries: index.search(queries, TOP_K)[1]

    store = Store(folder, make, SAMPLE)
    faiss.write_index(made[0], path_of(folder, spec))
    name = GRID[spec]
    least = TOP_K if name == "efSearch" else 1
    most = int(spec[3:].split(",")[0]) if name == "nprobe" else max(ROUGHLY)
    values = [value for value in ROUGHLY if least <= value < most] + [most]
    points = []
    for factor in FACTORS if "RFlat" in spec else [None]:
        more = {"k_factor_rf": factor} if factor else {}
        candidates = [{name: value, **more} for value in values]
        points += bisected(
            candidates, functools.partial(point_of, store, made[0])
        )
    best = {}
    for target in TARGETS:
        right = [point for point in points if point["recall"] >= target]
        if not right:
            continue
        found = max(right, key=lambda point: point["queries_per_second"])
        again = [
            point_of(store, made[0], found["parameters"])["queries_per_second"]
            for _ in range(REPEATS)
        ]
        best[target] = {**found, "queries_per_second": float(np.median(again))}
    return {
        "megabytes": store.megabytes,
        "build_seconds": store.seconds,
        "points": points,
        "best": best,
    }


def bisected(candidates, tried):
    """Points around the first ones that reach each of `TARGETS`.

    Args:
        candidates: parameters, in order of increasing recall.
        tried: function from parameters to a point.
    """
    points = {}

    def at(place):
        if place not in points:
            points[place] = tried(candidates[place])
        return points[place]

    for target in TARGETS:
        low, high = -1, len(candidates)
        while high - low > 1:
            middle = (low + high) // 2
            if at(middle)["recall"] >= target:
                high = middle
            else:
                low = middle
    return [points[place] for place in sorted(points)]


def path_of(folder, spec):
    return f"{folder}/{spec.replace(',', '-')}.faiss"


def point_of(store, index, parameters):
    """Speed and recall of an index with these parameters."""
    set_parameters(index, parameters)
    begun = time.perf_counter()
    found = store()
    seconds = time.perf_counter() - begun
    return {
        "parameters": parameters,
        "queries_per_second": len(store.queries) / seconds,
        "recall": store.recall_of(found, store.queries),
    }


def set_parameters(index, parameters):
    import faiss

    for name, value in parameters.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)


def of_exact(folder, name, threads):
    """Numbers of an exact search of one batch."""
    PREPARED[name](threads)
    store = exact(folder, name)
    store()
    begun = time.perf_counter()
    found = store()
    seconds = time.perf_counter() - begun
    return {
        "queries_per_second": len(store.queries) / seconds,
        "recall": store.recall_of(found, store.queries),
        "megabytes": store.megabytes,
        "build_seconds": store.seconds,
    }


def exact(folder, name):
    """A `Store` that compares queries with all vectors."""

    def faiss(vectors):
        import faiss

        index = faiss.IndexFlatIP(neighbours.DIM)
        index.add(vectors)
        return lambda queries: index.search(queries, TOP_K)[1]

    def numpy(vectors):
        vectors = np.array(vectors)

        def search(queries):
            found = []
            for i in range(0, len(queries), FEW):
                products = queries[i : i + FEW] @ vectors.T
                few = np.argpartition(products, -TOP_K, axis=1)[:, -TOP_K:]
                some = np.take_along_axis(products, few, axis=1)
                order = np.argsort(-some, axis=1)
                found.append(np.take_along_axis(few, order, axis=1))
            return np.concatenate(found)

        return search

    def scann(vectors):
        from scann.scann_ops.py import scann_ops_pybind

        from keras_memory.retrieval import tuning

        searcher = (
            scann_ops_pybind.builder(vectors, TOP_K, "dot_product")
            .score_brute_force()
            .build()
        )
        searcher.searcher.set_num_threads(tuning.threads())
        return lambda queries: searcher.search_batched_parallel(queries)[0]

    made = {"faiss": faiss, "NumPy": numpy, "ScaNN": scann}
    return Store(folder, made[name], BATCH)


def stored_index(folder, spec, parameters):
    """A `Store` of an index written by `of_grid`."""

    def make(vectors):
        import faiss

        index = faiss.read_index(path_of(folder, spec))
        set_parameters(index, parameters)
        return lambda queries: index.search(queries, TOP_K)[1]

    return Store(folder, make)


def ours(folder, target):
    """A `Store` that searches with ScaNN, as keras_memory does."""

    def make(vectors):
        import keras_memory

        memory = keras_memory.KNNMemory(
            neighbours.DIM,
            len(vectors),
            1,
            value_dim=0,
            search_method="approximate",
            target_recall=target,
        )
        memory.add(vectors[None])
        memory.wait()
        return lambda queries: memory.search(
            queries[None], TOP_K, return_keys=False
        ).indices[0]

    return Store(folder, make)


# Tables.


def chosen(grid, exact_ones):
    """The fastest faiss index for each recall, the fastest exact one, and ours.

    Returns:
        Dict from ("faiss", "exact" or "ours", recall) to a dict: `name`, and
        the numbers measured before.
    """
    found = {}
    for target in TARGETS:
        right = [
            {
                **one["best"][target],
                "megabytes": one["megabytes"],
                "build_seconds": one["build_seconds"],
                "name": spec,
            }
            for spec, one in grid.items()
            if target in one.get("best", {})
        ]
        found["faiss", target] = _fastest(right)
    ran = [
        {**one, "name": name}
        for name, one in exact_ones.items()
        if "not_run" not in one
    ]
    found["exact", 1.0] = _fastest(ran)
    for target in TARGETS:
        found["ours", target] = {"name": f"target_recall={target}"}
    return found


def _fastest(candidates):
    return max(
        candidates, key=lambda one: one["queries_per_second"], default=None
    )


def jobs(folder, choice, threads):
    """Dict from each of `chosen` to the arguments of a `measure.Worker`, or to
    a text that says why it cannot run."""
    found = {}
    for (what, target), one in choice.items():
        prepared, arguments = prepare_faiss, ()
        if what == "ours":
            made, arguments = ours, (target,)
            prepared = neighbours.prepare
            if not references.installed("scann"):
                one = None
        elif one and what == "faiss":
            made, arguments = stored_index, (one["name"], one["parameters"])
        elif one:
            made, arguments = exact, (one["name"],)
            prepared = PREPARED[one["name"]]
        found[what, target] = "none can be had"
        if one:
            found[what, target] = (
                functools.partial(prepared, threads),
                functools.partial(made, folder, *arguments),
            )
    return found


def add_numbers(results, choice):
    """Adds names, queries per second and ratios to results."""
    for (what, target), result in results.items():
        result["kind"], result["asked_for"] = what, target
        result["name"] = (choice[what, target] or {}).get("name", "")
        if "not_run" in result:
            continue
        parameters = (choice[what, target] or {}).get("parameters")
        if parameters:
            result["parameters"] = parameters
        told = result.pop("told")
        told = result.pop("told_after", told)
        result["queries_per_second"] = (
            told["queries"] / result["milliseconds"] * 1e3
        )
        result["recall"] = told["recall"]
        before = told if what == "ours" else choice[what, target]
        result["over_vectors_megabytes"] = before["megabytes"]
        result["build_seconds"] = before["build_seconds"]
        result["queries"] = told["queries"]
    for target in TARGETS:
        own = results["ours", target]
        for key in (("faiss", target), ("exact", 1.0)):
            other = results[key]
            if "not_run" in own or "not_run" in other:
                continue
            scale = own["queries"] / other["queries"]
            own[f"times_{key[0]}"] = [
                scale * one for one in measure.ratio(own, other)
            ]


def grid_rows(kind, grid):
    rows = []
    for spec, one in grid.items():
        for target in TARGETS:
            start = [kind, spec, target]
            found = one.get("best", {}).get(target)
            if found is None:
                reason = one.get("not_run", "not reached")
                rows.append([*start, reason, *[""] * (len(GRID_HEADER) - 4)])
                continue
            rows.append(
                [
                    *start,
                    _listed(found["parameters"]),
                    report.short(found["queries_per_second"]),
                    f"{found['recall']:.3f}",
                    report.short(one["megabytes"]),
                    report.short(one["build_seconds"]),
                ]
            )
    return rows


def _listed(parameters):
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def rows_of(kind, results):
    rows = []
    for (what, target), result in results.items():
        variant = " ".join(
            [what, result["name"], _listed(result.get("parameters", {}))]
        ).strip()
        start = [kind, variant, target]
        if "not_run" in result:
            reason = f"not run: {result['not_run']}"
            rows.append([*start, reason, *[""] * (len(HEADER) - 4)])
            continue
        ratios, goals = [], []
        if what == "ours":
            for other in ("faiss", "exact"):
                if f"times_{other}" in result:
                    spread = report.with_spread(result[f"times_{other}"])
                    ratios.append(f"{other}: {spread}")
            other, goal = GOALS.get(target, ("", ""))
            goals.append(f"{other}: {goal}")
            if target == TARGETS[0]:
                goals.append(f"{GOAL_MEGABYTES} MB")
        rows.append(
            [
                *start,
                report.short(result["queries_per_second"]),
                f"{result['recall']:.4f}",
                report.short(result["over_vectors_megabytes"]),
                report.short(result["build_seconds"]),
                "; ".join(ratios),
                "; ".join(goals),
            ]
        )
    return rows


PREPARED = {
    "faiss": prepare_faiss,
    "NumPy": neighbours.use_cores,
    "ScaNN": neighbours.prepare,
}
