"""Compares Memory Wrap with memorywrap: training steps and answers."""

import functools
import sys

import numpy as np

from benchmarks import cases
from benchmarks import measure
from benchmarks import references
from benchmarks import report

BATCH, WIDTH, CLASSES = 128, 1280, 10
CASES = {  # the timed part, sizes, and the target speedup
    "train, 100 examples": ("train", (WIDTH, 100), 1.5),
    "train, 1,000 examples": ("train", (WIDTH, 1000), 1.5),
    "answer, 100 examples": ("answer", (WIDTH, 100), 3),
    "answer, 50,000 examples of 64": ("answer", (64, 50_000), None),
    "answer, 1,000,000 examples of 64": ("answer", (64, 1_000_000), None),
}
REFERENCE = "memorywrap"
SECONDS = 120  # time limit of a variant's first steps, and of a step
OURS = {
    "train": {"XLA": {}, "no XLA": {"jit_compile": False}},
    "answer": {
        "XLA": {},
        "no XLA": {"jit_compile": False},
        "no XLA, bfloat16": {"jit_compile": False, "dtype": "mixed_bfloat16"},
        "XLA, top_k=32": {"top_k": 32},
        "no XLA, top_k=32": {"top_k": 32, "jit_compile": False},
        "no XLA, 32 of KNNMemory": {"candidates": 32, "jit_compile": False},
    },
}
HEADER = (
    "case",
    "variant",
    "threads",
    "ms",
    "memory, MB",
    "times as fast",
    "goal",
)


def run(names, threads, rounds, json=None):
    """Measures, prints a table, and returns all numbers.

    Args:
        names: keys of `CASES`.
        threads: list of numbers of threads; all take turns.
        rounds: number of measured steps.
        json: path of a file for all numbers, if any.
    """
    table, numbers = report.Table(HEADER), []
    machine = report.machine()
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        kind, sizes, goal = CASES[name]
        before = numbers

        def write(results, name=name, before=before):
            found = before + [
                {"case": name, "variant": variant, "threads": count, **result}
                for (variant, count), result in results.items()
            ]
            report.write_json(json, {"machine": machine, "results": found})
            return found

        results = measure.compare(
            jobs(kind, sizes, threads), rounds, seen=write, seconds=SECONDS
        )
        rows = []
        for (variant, count), result in results.items():
            reference = results[REFERENCE, count]
            cells = ["", "", ""]
            if "not_run" in result:
                cells[0] = f"not run: {result['not_run']}"
            else:
                cells[:2] = (
                    report.short(result["milliseconds"]),
                    report.short(result["megabytes"]),
                )
                if "not_run" not in reference:
                    quartiles = measure.ratio(result, reference)
                    result["ratio_quartiles"] = quartiles
                    cells[2] = report.with_spread(quartiles)
            wanted = goal if goal and variant != REFERENCE else ""
            rows.append([name, variant, count, *cells, wanted])
        table.add(rows)
        numbers = write(results)
    table.end()
    print(
        f"Batch {BATCH}, medians of {report.counted(rounds, 'step')} in turn, "
        "each variant in a process of its own; ratios with the middle half.\n"
        f"{report.on(machine)}."
    )
    return numbers


def jobs(kind, sizes, threads):
    """Dict from each variant and number of threads to the arguments of a
    `measure.Worker`, or to a text that says why it cannot run."""
    found = {}
    variants = OURS[kind]
    if sizes[1] <= 1000:  # otherwise all are compared anyway
        variants = {
            name: options
            for name, options in variants.items()
            if not {"top_k", "candidates"} & set(options)
        }
    for count in threads:
        found[REFERENCE, count] = 'needs `pip install -e ".[bench]"`'
        if all(map(references.installed, ("torch", "memorywrap"))):
            found[REFERENCE, count] = (
                functools.partial(references.prepare, count, None),
                functools.partial(memorywrap, kind, *sizes),
            )
        for name, options in variants.items():
            found[name, count] = (
                functools.partial(cases.prepare, count),
                functools.partial(ours, kind, *sizes, **options),
            )
    return found


def data(width, examples):
    """Encodings and memory, like those of a network that ends with a ReLU, and
    labels."""
    rng = np.random.default_rng(1)
    encodings, memory = (
        np.maximum(rng.normal(size=(n, width)), 0).astype("float32")
        for n in (BATCH, examples)
    )
    return encodings, memory, rng.integers(0, CLASSES, BATCH)


def ours(
    kind,
    width,
    examples,
    jit_compile=True,
    dtype="float32",
    top_k=None,
    candidates=None,
):
    """Returns a function for a training step with the paper's optimizer, or for
    answers with an encoded memory, or with this number of candidates found by a
    `KNNMemory`."""
    import keras
    import tensorflow as tf

    import keras_memory

    encodings, memory, labels = map(tf.constant, data(width, examples))
    layer = keras_memory.MemoryWrapLayer(CLASSES, top_k=top_k, dtype=dtype)
    layer.build([encodings.shape, memory.shape])
    if candidates is not None:
        knn = keras_memory.KNNMemory(
            width, examples, value_dim=0, similarity="cosine"
        )
        knn.add(memory[None])
        knn.search(encodings[None], candidates)
        knn.wait()
        answer = tf.function(
            lambda *parts: layer(parts[:2], memory_mask=parts[2]),
            jit_compile=jit_compile,
            autograph=False,
        )

        def answered():
            found = knn.search(encodings[None], candidates)
            parts = encodings, found.keys[0], found.mask[0]
            return answer(*map(tf.constant, parts)).numpy()

        return answered
    if kind == "answer":
        layer.set_memory(memory)
        del memory
        answer = tf.function(
            lambda x: layer(x), jit_compile=jit_compile, autograph=False
        )
        return lambda: answer(encodings).numpy()
    optimizer = keras.optimizers.SGD(
        1e-2, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    optimizer.build(layer.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(jit_compile=jit_compile)
    def step(encodings, memory, labels):
        # Includes the gradients of encodings and memory: an encoder needs them.
        inputs, variables = [encodings, memory], layer.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = loss_of(labels, layer(inputs, training=True))
        *of_inputs, a, b, c, d = tape.gradient(loss, [*inputs, *variables])
        optimizer.apply([a, b, c, d], variables)
        return loss, of_inputs

    return lambda: float(step(encodings, memory, labels)[0])


def memorywrap(kind, width, examples):
    """The same with memorywrap, which computes all keys for each answer."""
    import torch
    from memorywrap import MemoryWrapLayer

    encodings, memory, labels = map(torch.tensor, data(width, examples))
    layer = MemoryWrapLayer(width, CLASSES)
    if kind == "answer":

        def answer():
            with torch.no_grad():
                return layer(encodings, memory)

        return answer
    inputs = encodings.requires_grad_(), memory.requires_grad_()
    optimizer = torch.optim.SGD(
        layer.parameters(), 1e-2, 0.9, nesterov=True, weight_decay=5e-4
    )

    def step():
        optimizer.zero_grad()
        for one in inputs:
            one.grad = None
        loss = torch.nn.functional.cross_entropy(layer(*inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
