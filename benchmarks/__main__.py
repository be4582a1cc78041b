"""Training steps of keras_memory and of other implementations, in turn.

    python -m benchmarks [--pytorch-ntm CHECKOUT] [--rounds 20] [--json FILE]

Each round takes one step of each variant, so that what else the machine does
hits all of them alike. Times are medians in milliseconds; a ratio is the
median over the rounds of the reference's time by the variant's, with the
middle half of the rounds behind it. A step is forward, loss, gradients and
optimizer, of the same sizes on both sides; of the NTM, ours takes the loss of
all 41 steps and pytorch-ntm of the last 20. PyTorch has --threads threads,
TensorFlow as many as it takes. The first step of the first case includes
imports. Goals are those of the project.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import resource
import statistics
import sys
import time

import numpy as np

from benchmarks import references

STEPS_BEFORE = 3

NTM = {"steps": 41, "bits": 8, "slots": 128, "width": 20, "units": 100}
DNC = {"steps": 40, "size": 64, "slots": 100, "width": 32, "units": 128}
CASES = {
    "ntm-1": ("ntm", {**NTM, "batch": 1}, 60),
    "ntm-16": ("ntm", {**NTM, "batch": 16}, 25),
    "dnc-1": ("dnc", {**DNC, "batch": 1}, 14),
    "dnc-16": ("dnc", {**DNC, "batch": 16}, 7),
    "dnc-512": ("dnc", {**DNC, "batch": 1, "slots": 512}, 6),
}


def ours(kind, sizes, loop="auto", jit_compile=True):
    """A function that trains one of our layers for one step."""
    import keras
    import tensorflow as tf

    import keras_memory

    rng = np.random.default_rng(1)
    batch, steps = sizes["batch"], sizes["steps"]
    if kind == "ntm":
        bits = sizes["bits"]
        x = rng.integers(0, 2, (batch, steps, bits + 1))
        y = x[:, :, :bits]
        layer = keras_memory.NTMLayer(
            bits,
            memory_slots=sizes["slots"],
            slot_size=sizes["width"],
            controller_units=sizes["units"],
            activation="sigmoid",
            return_sequences=True,
            loop=loop,
        )
        loss_of = keras.losses.BinaryCrossentropy()
        optimizer = keras.optimizers.RMSprop(
            1e-4, rho=0.95, momentum=0.9, clipvalue=10.0
        )
    else:
        x = y = rng.uniform(size=(batch, steps, sizes["size"]))
        layer = keras_memory.DNCLayer(
            sizes["size"],
            memory_slots=sizes["slots"],
            slot_size=sizes["width"],
            read_heads=4,
            controller_units=sizes["units"],
            return_sequences=True,
            loop=loop,
        )
        loss_of = keras.losses.MeanSquaredError()
        optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=50.0)
    model = keras.Sequential([keras.Input((None, x.shape[-1])), layer])
    optimizer.build(model.trainable_variables)
    x, y = (tf.constant(a, "float32") for a in (x, y))

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return lambda: float(step(x, y))


def variants_of(kind, sizes, checkout):
    """Functions that make a step, by the variant's name; the reference first.
    What cannot be had is a text that says why."""
    return {
        "reference": references.step_of(kind, sizes, checkout),
        "fast loop": lambda: ours(kind, sizes),
        "portable loop": lambda: ours(kind, sizes, "portable"),
        "fast, no XLA": lambda: ours(kind, sizes, jit_compile=False),
        "portable, no XLA": lambda: ours(kind, sizes, "portable", False),
    }


def measure(variants, rounds):
    """Medians, ratios and first steps of variants, by name."""
    steps, first = {}, {}
    for name, make in variants.items():
        if not callable(make):
            continue
        start = time.perf_counter()
        steps[name] = make()
        steps[name]()
        first[name] = time.perf_counter() - start
        for _ in range(STEPS_BEFORE):
            steps[name]()
    wall = {name: [] for name in steps}
    cpu = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before = time.perf_counter(), time.process_time()
            step()
            wall[name].append(1e3 * (time.perf_counter() - before[0]))
            cpu[name].append(1e3 * (time.process_time() - before[1]))
    results = {}
    for name in steps:
        results[name] = {
            "milliseconds": statistics.median(wall[name]),
            "cpu_milliseconds": statistics.median(cpu[name]),
            "first_step_seconds": first[name],
        }
        if "reference" in steps:
            ratios = [a / b for a, b in zip(wall["reference"], wall[name])]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            results[name] |= {"ratio": ratio, "ratio_range": [low, high]}
    for name, make in variants.items():
        if not callable(make):
            results[name] = {"not_run": make}
    return results


def versions():
    names = ("keras", "tensorflow", "torch", "dnc", "numpy")
    found = {name: importlib.util.find_spec(name) for name in names}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{
            name: importlib.metadata.version(name)
            for name in names
            if found[name]
        },
    }


def row(case, name, result, goal):
    if "not_run" in result:
        return f"| {case} | {name} | not run: {result['not_run']} | | | | |"
    ratio = ""
    if "ratio" in result:
        low, high = result["ratio_range"]
        ratio = f"{result['ratio']:.1f} ({low:.1f} to {high:.1f})"
    return (
        f"| {case} | {name} | {result['milliseconds']:.2f} | "
        f"{result['cpu_milliseconds']:.2f} | "
        f"{result['first_step_seconds']:.1f} | {ratio} | "
        f"{goal if name == 'fast loop' else ''} |"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--pytorch-ntm", help="a checkout of pytorch-ntm")
    parser.add_argument("--json", help="file to write all numbers to")
    options = parser.parse_args(arguments)
    references.set_threads(options.threads)
    print(versions(), file=sys.stderr)
    print("| case | variant | ms | CPU ms | first step s | ratio | goal |")
    print("|---|---|---|---|---|---|---|")
    report = {"versions": versions(), "threads_of_torch": options.threads}
    for case in options.cases:
        kind, sizes, goal = CASES[case]
        variants = variants_of(kind, sizes, options.pytorch_ntm)
        report[case] = measure(variants, options.rounds)
        for name, result in report[case].items():
            print(row(case, name, result, goal), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report["peak_megabytes"] = peak
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
