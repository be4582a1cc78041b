"""Training steps of Sparse Access Memory on a full memory that stays, with an
exact search under XLA and with ScaNN on the host."""

import argparse
import time

import numpy as np

from benchmarks import cases
from benchmarks import references
from benchmarks import report
from benchmarks.sam import ROW

SLOTS = {"16K": 2**14, "1M": 2**20}
CONTENTS = "clustered", "gaussian"
METHODS = "exact", "approximate"
CENTERS = 1000
WARM_UP = 4  # training steps before those that are measured
# Keys compared with all slots, to measure recall.
SAMPLE = 500
HEADER = "slots", "contents", "search", "ms", "fill, s", "recall"


def contents_of(kind, slots, batch, width, seed=1):
    """(B, N, W) float32: Gaussian, or in clusters, which suit a tree."""
    rng = np.random.default_rng(seed)
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
    given = contents_of(kind, slots, sizes["batch"], sizes["width"])
    begin = time.perf_counter()
    layer.set_memory(given)
    seconds = time.perf_counter() - begin
    shape = sizes["batch"], sizes["steps"], sizes["size"]
    x = np.random.default_rng(1).normal(size=shape)
    step = cases.training_step(
        layer,
        keras.losses.MeanSquaredError(),
        keras.optimizers.Adam(1e-3, global_clipnorm=50.0),
        *(x, x),
        jit_compile=search_method == "exact",
    )
    return step, layer, seconds


def recall_of(layer, train):
    """The share of the nearest slots that the heads find in a training step:
    a sample of their keys, compared with all slots after the step."""
    from keras_memory.retrieval.similarities import unit
    from keras_memory.retrieval.tuning import closeness
    from keras_memory.retrieval.tuning import recall

    (memory,) = layer._memories
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
    found, shares = nearest(keys, ROW["top_k"]), []
    for slots, queries, vectors in zip(found, keys, memory.memory):
        cosines = unit(queries, np) @ unit(vectors, np).T
        right = np.argpartition(-cosines, ROW["top_k"], axis=1)[
            :, : ROW["top_k"]
        ]
        near = closeness(queries, vectors, "cosine", np.maximum(slots, 0))
        near = np.where(slots >= 0, near, -np.inf)
        expected = closeness(queries, vectors, "cosine", right)
        shares.append(recall(near, expected))
    return float(np.mean(shares))


def measured(slots, search_method, kind, rounds, sizes=ROW):
    """Milliseconds of each training step, seconds to fill the memory, and
    recall."""
    train, layer, seconds = prepared(slots, search_method, kind, sizes)
    is_exact, times = search_method == "exact", []
    for _ in range(WARM_UP):
        train()
        if not is_exact:  # trees are tuned with the keys of the heads
            layer._memories[0].wait()
    for _ in range(rounds):
        begin = time.perf_counter()
        train()
        times.append(1000 * (time.perf_counter() - begin))
    return {
        "milliseconds": times,
        "fill_seconds": seconds,
        "recall": 1.0 if is_exact else recall_of(layer, train),
    }


def main(arguments=None):
    """Measures the chosen cases, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=ROW["batch"])
    parser.add_argument("--slots", nargs="+", default=[*SLOTS], choices=SLOTS)
    parser.add_argument("--contents", nargs="+", default=CONTENTS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args(arguments)
    cases.prepare(options.threads)
    sizes, rows = {**ROW, "batch": options.batch}, []
    for slots in options.slots:
        for kind in options.contents:
            for method in options.methods:
                result = measured(
                    SLOTS[slots], method, kind, options.rounds, sizes
                )
                rows.append(
                    [
                        slots,
                        kind,
                        method,
                        f"{np.median(result['milliseconds']):.0f}",
                        f"{result['fill_seconds']:.0f}",
                        f"{result['recall']:.3f}",
                    ]
                )
                print(*rows[-1], flush=True)
    print(report.table(HEADER, rows))


if __name__ == "__main__":
    main()
