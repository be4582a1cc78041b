"""Training steps of Sparse Access Memory over the number of slots."""

import functools

import numpy as np

from benchmarks import cases
from benchmarks import measure
from benchmarks import report

SIZES = {"steps": 40, "batch": 4, "inputs": 16, "width": 32, "units": 100}
HEADS, TOP_K = 4, 4
SLOTS = {
    "1K": 2**10,
    "16K": 2**14,
    "64K": 2**16,
    "1M": 2**20,
    "4M": 2**22,
}
STEPS = {"1M slots, 1,000 steps": (2**20, 1000)}
HEADER = "slots", "ms", "times that of 1K", "memory, MB", "that of 1K, MB"
SECONDS = 300


def jobs(threads):
    """Dict from each variant to the arguments of a `measure.Worker`."""
    variants = {name: (slots, SIZES["steps"]) for name, slots in SLOTS.items()}
    prepare = functools.partial(cases.prepare, threads)
    return {
        name: (prepare, functools.partial(ours, *arguments))
        for name, arguments in {**variants, **STEPS}.items()
    }


def run(rounds, threads, json=None):
    """Measures, prints a table, and returns all numbers.

    Args:
        rounds: number of measured steps.
        threads: number of threads of each process.
        json: path of a file for all numbers, if any.
    """
    machine = report.machine()

    def write(results):
        report.write_json(json, {"machine": machine, "results": results})

    results = measure.compare(
        jobs(threads), rounds, seen=write, seconds=SECONDS
    )
    first, rows = next(iter(results.values())), []
    for variant, result in results.items():
        if "not_run" in result:
            rows.append([variant, f"not run: {result['not_run']}", "", "", ""])
            continue
        cells = [variant, report.short(result["milliseconds"]), "", "", ""]
        if "not_run" not in first and variant in SLOTS:
            quartiles = measure.ratio(first, result)
            result["ratio_quartiles"] = quartiles
            cells[2] = report.with_spread(quartiles)
        for column, of in ((3, result), (4, first)):
            if of.get("megabytes") is not None:
                cells[column] = f"{of['megabytes']:.0f}"
        rows.append(cells)
    write(results)
    print(report.table(HEADER, rows) + "\n")
    print(
        f"A training step of a memory that starts empty: {SIZES['steps']} "
        f"steps, batch {SIZES['batch']}, LSTM of {SIZES['units']}, slots of "
        f"{SIZES['width']}, {HEADS} read heads of {TOP_K} slots. Medians of "
        f"{report.counted(rounds, 'step')} in turn, each variant in a process "
        f"of its own with {report.counted(threads, 'thread')}; ratios with the "
        f"middle half.\n{report.on(machine)}."
    )
    return results


def ours(slots, steps):
    """Returns a function that trains a layer for one step."""
    import keras
    import tensorflow as tf

    import keras_memory

    shape = SIZES["batch"], steps, SIZES["inputs"]
    x = tf.constant(np.random.default_rng(1).normal(size=shape), "float32")
    layer = keras_memory.SAMLayer(
        SIZES["inputs"],
        memory_slots=slots,
        slot_size=SIZES["width"],
        read_heads=HEADS,
        top_k=TOP_K,
        controller_units=SIZES["units"],
        return_sequences=True,
    )
    model = keras.Sequential([keras.Input((None, shape[-1])), layer])
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=50.0)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - x) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return lambda: float(step(x))
