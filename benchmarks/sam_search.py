"""Training steps of Sparse Access Memory on a full, stateful memory, with an
exact search under XLA and with ScaNN on the host."""

import json as json_module
import pathlib
import sys
import time

import numpy as np

from benchmarks import cases
from benchmarks import references
from benchmarks import report
from benchmarks.sam import ROW

SLOTS = {"16K": 2**14, "1M": 2**20}
CONTENTS = "clustered", "gaussian"
METHODS = "exact", "approximate"
CENTERS = 1000  # of the clusters
# Training steps before those that are measured. ScaNN's trees are tuned again
# with their keys.
TUNING_STEPS = 4
SAMPLE = 500  # keys that are compared with all slots, to measure recall
HEADER = "slots", "contents", "search", "batch", "ms", "fill, s", "recall"


def run(slots, contents, methods, batch, rounds, threads, json=None):
    """Measures, prints a table, and returns all numbers.

    Args:
        slots, contents, methods: lists of keys of `SLOTS`, of `CONTENTS` and of
            `METHODS`.
        batch: int, sequences of a step.
        rounds: number of measured steps.
        threads: number of threads.
        json: path of a file for all numbers, if any. It keeps the records of
            other cases that are in it.
    """
    cases.prepare(threads)
    sizes, table = {**ROW, "batch": batch}, report.Table(HEADER)
    numbers = {"machine": report.machine(), "results": []}
    if json is not None and pathlib.Path(json).exists():
        text = pathlib.Path(json).read_text()
        numbers["results"] = json_module.loads(text)["results"]
    for name in slots:
        for kind in contents:
            for method in methods:
                case = {
                    "slots": SLOTS[name],
                    "contents": kind,
                    "search": method,
                    "batch": batch,
                    "rounds": rounds,
                    "threads": threads,
                }
                print(f"{name}, {kind}, {method} ...", file=sys.stderr)
                result = measured(SLOTS[name], method, kind, rounds, sizes)
                others = [
                    record
                    for record in numbers["results"]
                    if any(record.get(key) != case[key] for key in case)
                ]
                numbers["results"] = [*others, {**case, **result}]
                report.write_json(json, numbers)
                table.add([cells({**case, **result})])
    table.end()
    print(f"{report.on(numbers['machine'])}.")
    return numbers


def cells(record):
    return [
        f"{record['slots']:,}",
        record["contents"],
        record["search"],
        record["batch"],
        report.short(float(np.median(record["milliseconds"]))),
        report.short(record["fill_seconds"]),
        f"{record['recall']:.3f}",
    ]


def make_contents(kind, slots, batch, width):
    """(B, N, W) float32: Gaussian, or clustered, where a tree helps."""
    rng = np.random.default_rng(1)
    given = rng.standard_normal((batch, slots, width), "float32")
    if kind == "clustered":
        centers = np.random.default_rng(0).standard_normal((CENTERS, width))
        chosen = rng.integers(0, CENTERS, (batch, slots))
        given = 0.3 * given + centers.astype("float32")[chosen]
    return given


def prepared(slots, search_method, kind, sizes=ROW):
    """Returns a function that trains a layer for one step, the layer, and the
    seconds that it took to fill the memory."""
    import keras

    import keras_memory

    layer = keras_memory.SAMLayer(
        sizes["size"],
        memory_slots=slots,
        slot_size=sizes["width"],
        read_heads=references.HEADS,
        top_k=sizes["top_k"],
        controller_units=sizes["units"],
        return_sequences=True,
        stateful=True,
        search_method=search_method,
    )
    layer.build((sizes["batch"], None, sizes["size"]))
    given = make_contents(kind, slots, sizes["batch"], sizes["width"])
    begin = time.perf_counter()
    layer.set_memory(given)
    seconds = time.perf_counter() - begin
    shape = sizes["batch"], sizes["steps"], sizes["size"]
    x = np.random.default_rng(1).normal(size=shape)
    step = cases.training_step(
        layer,
        keras.losses.MeanSquaredError(),
        keras.optimizers.Adam(1e-3, global_clipnorm=50.0),
        x,
        x,
        jit_compile=search_method == "exact",
    )
    return step, layer, seconds


def measure_recall(memory, train, top_k):
    """Searches the keys of one training step again after it. Returns the share
    of the nearest slots that are found, for the first `SAMPLE` keys."""
    from keras_memory.retrieval.similarities import unit
    from keras_memory.retrieval.tuning import closeness
    from keras_memory.retrieval.tuning import recall

    keys, nearest = [], memory.nearest

    def recorded(queries, top_k):
        keys.append(queries)
        return nearest(queries, top_k)

    memory.nearest = recorded
    train()
    memory.nearest = nearest
    # (steps, B, H, W) -> (B, steps x H, W)
    keys = np.stack(keys).swapaxes(0, 1)
    keys = keys.reshape(len(memory.memory), -1, keys.shape[-1])
    keys = keys[:, : max(1, SAMPLE // len(keys))]
    found, shares = nearest(keys, top_k), []
    for slots, queries, vectors in zip(found, keys, memory.memory):
        cosines = unit(queries, np) @ unit(vectors, np).T
        right = np.argpartition(-cosines, top_k, axis=1)[:, :top_k]
        near = closeness(queries, vectors, "cosine", np.maximum(slots, 0))
        near = np.where(slots >= 0, near, -np.inf)
        expected = closeness(queries, vectors, "cosine", right)
        shares.append(recall(near, expected))
    return float(np.mean(shares))


def measured(slots, search_method, kind, rounds, sizes=ROW):
    """Milliseconds of each training step, seconds to fill the memory, and
    recall."""
    train, layer, seconds = prepared(slots, search_method, kind, sizes)
    memory, times = layer.cell.accesses[0].host_memory, []
    for _ in range(TUNING_STEPS):
        train()
        if memory is not None:
            memory.wait()
    for _ in range(rounds):
        begin = time.perf_counter()
        train()
        times.append(1000 * (time.perf_counter() - begin))
    return {
        "milliseconds": times,
        "fill_seconds": seconds,
        "recall": 1.0
        if memory is None
        else measure_recall(memory, train, sizes["top_k"]),
    }
