"""Measures the recall of a tree while the encoder of its keys is trained.

Shows which share of the entries may be overwritten before a rebuild.
"""

import math
import multiprocessing
import sys
import time
from concurrent import futures

import numpy as np

from benchmarks import neighbours
from benchmarks import report
from benchmarks.neighbours import DIM

ENTRIES, STEPS, ADDED = 64_000, 2000, 32  # all are overwritten once
QUERIES, EVERY, TOP_K = 500, 100, 32  # EVERY: steps between recalls
SEARCHED = 256  # queries of each step, for tuning trees
BATCH, LEARNING_RATE = 256, 1e-3
NEVER = {"REBUILT": math.inf, "WORN": math.inf}
UNTRIED = {"TRIED": (math.inf, math.inf)}
RULES = {  # constants of `tuning`; the first tree is the same
    "never": {**NEVER, **UNTRIED},
    "after 12.5 %": {"REBUILT": 0.125, **UNTRIED},
    "after 50 %": {"REBUILT": 0.5, **UNTRIED},
    "never, but tried": NEVER,
    "tried, after 50 % or when worn": {},
}
HEADER = (
    "built anew",
    "recall, mean",
    "least",
    "last",
    "search, ms",
    "trees built anew",
    "s of each",
    "leaves searched, first",
    "last",
)


def run(threads, seen=lambda numbers: None):
    """Measures, prints two tables, and returns all numbers. Calls `seen` with
    the numbers so far whenever there are more."""
    print("drift ...", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    table = report.Table(HEADER)
    with futures.ProcessPoolExecutor(1, context) as pool:
        numbers = {**pool.submit(trained, threads).result(), "rules": {}}
        rules = numbers["rules"]
        for name, rule in RULES.items():
            rules[name] = pool.submit(tried, rule).result()
            table.add(rows_of({name: rules[name]}))
            seen(numbers)
    table.end()
    steps = next(iter(rules.values()))["steps"]
    rows = [
        [step, *(f"{one['recalls'][i]:.3f}" for one in rules.values())]
        for i, step in enumerate(steps)
    ]
    print(report.table(["step", *rules], rows) + "\n")
    print(
        f"Recall@{TOP_K} of {QUERIES} queries, of {ENTRIES:,} entries, "
        f"{ADDED} of which are overwritten at each step; just before the step "
        f"that is named. Over all steps the keys of the same inputs moved by "
        f"{report.short(numbers['moved'])} of their length; the classifier's "
        f"loss went from {report.short(numbers['losses'][0])} to "
        f"{report.short(numbers['losses'][-1])}.\n"
    )
    return numbers


def rows_of(rules):
    rows = []
    for name, one in rules.items():
        seconds = one["tree_seconds"] / max(1, one["trees_built"])
        first, last = one["leaves"][0], one["leaves"][-1]
        rows.append(
            [
                name,
                f"{np.mean(one['recalls']):.3f}",
                f"{min(one['recalls']):.3f}",
                f"{one['recalls'][-1]:.3f}",
                report.short(one["search_ms"]),
                one["trees_built"],
                report.short(seconds) if one["trees_built"] else "",
                _of_leaves(first),
                _of_leaves(last),
            ]
        )
    return rows


def _of_leaves(leaves):
    return f"{leaves[1]} of {leaves[0]}" if leaves[0] else "all compared"


_drift = None  # in a separate process, shared by all rules


def trained(threads):
    """Trains the encoder; runs in a separate process."""
    global _drift
    neighbours.prepare(threads)
    _drift = Drift()
    return {"losses": _drift.losses, "moved": _drift.moved}


def tried(rule):
    """Tries a rule on the same keys; runs in the same separate process."""
    return _drift.tried(rule)


class Drift:
    """Outputs of an encoder that learns to separate clusters: `first`, the
    `keys` and `queries` of each step, and further queries, `asked`, of some
    steps."""

    def __init__(self):
        import keras

        data = neighbours.Data("clustered", seed=2)
        encoder = keras.Sequential(
            [
                keras.Input((DIM,)),
                keras.layers.Dense(DIM, activation="tanh"),
                keras.layers.Dense(DIM),
            ]
        )
        classes = keras.layers.Dense(neighbours.CLUSTERS)
        model = keras.Sequential([encoder, classes])
        model.compile(
            keras.optimizers.Adam(LEARNING_RATE),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

        def encoded(number):
            return encoder(data.draw(number)).numpy()

        self.first = np.concatenate(
            [encoded(1000) for _ in range(-(-ENTRIES // 1000))]
        )[:ENTRIES]
        fixed = data.draw(1000)
        before = encoder(fixed).numpy()
        self.keys, self.queries, self.asked, self.losses = [], [], {}, []
        for step in range(1, STEPS + 1):
            inputs, labels = data.draw_with_clusters(BATCH)
            self.losses.append(float(model.train_on_batch(inputs, labels)))
            self.keys.append(encoded(ADDED))
            self.queries.append(encoded(SEARCHED))
            if step == 1 or step % EVERY == 0:
                self.asked[step] = encoded(QUERIES)
        moved = np.linalg.norm(encoder(fixed).numpy() - before, axis=1)
        self.moved = float(np.mean(moved / np.linalg.norm(before, axis=1)))

    def tried(self, rule):
        """Returns the recall of a memory whose trees are rebuilt by a rule."""
        import keras_memory
        from keras_memory.retrieval import tuning

        before = {name: getattr(tuning, name) for name in rule}
        try:
            return self._tried(keras_memory.KNNMemory, tuning, rule)
        finally:
            vars(tuning).update(before)

    def _tried(self, made, tuning, rule):
        memory = made(
            DIM,
            ENTRIES,
            1,
            value_dim=0,
            search_method="approximate",
            background=False,
        )
        index = memory._indexes[0]
        some = min(ADDED, ENTRIES)
        memory.add(self.first[None, :some])
        memory.search(self.queries[0][None], TOP_K)  # for tuning the tree
        memory.add(self.first[None, some:])
        vars(tuning).update(rule)
        trees = neighbours.Trees()
        found = {"steps": [], "recalls": [], "leaves": []}
        times = []
        for step, keys in enumerate(self.keys, start=1):
            if step in self.asked:
                found["steps"].append(step)
                found["recalls"].append(self._recall(memory, self.asked[step]))
                leaves = index.leaves, index.leaves_to_search
                found["leaves"].append(leaves)
            begun = time.perf_counter()
            memory.search(
                self.queries[step - 1][None], TOP_K, return_keys=False
            )
            times.append(1e3 * (time.perf_counter() - begun))
            memory.add(keys[None])
        found["search_ms"] = float(np.median(times))
        return {**found, **trees.tell()}

    def _recall(self, memory, queries):
        keys, _ = memory.entries()
        # `entries` starts with the oldest, at the slot to be written next.
        slots = memory._slots(0)
        return neighbours.recall(
            queries,
            keys,
            slots,
            memory.search(queries[None], TOP_K, return_keys=False).indices[0],
            neighbours.least_right(queries, keys, TOP_K),
        )
