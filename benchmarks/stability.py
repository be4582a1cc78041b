"""Counts NaN values on the copy task, for many seeds.

    python benchmarks/stability.py dnc --steps 500
    python benchmarks/stability.py sam
    python benchmarks/stability.py sdnc

Every step checks the loss, the gradients, the weights after the update, and all
states after the sequence: a NaN at an earlier time step would persist in them.
The optimizer is that of Graves et al. 2016, RMSProp with a momentum of 0.9, in
float32, but gradients are not clipped.
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf

import keras_memory
from keras_memory.training import tasks

TASK = tasks.Copy(max_length=10, buckets=1)
BATCH = 8
ARCHITECTURES = {
    "dnc": (keras_memory.DNCLayer, {}),
    # Fewer slots than time steps, so that slots are erased and used again.
    "sam": (keras_memory.SAMLayer, {"memory_slots": 16}),
    "sdnc": (keras_memory.SDNCLayer, {"memory_slots": 16}),
}
CHECKED = "loss", "gradients", "weights", "states"


def made(name):
    layer_class, arguments = ARCHITECTURES[name]
    layer = layer_class(
        TASK.output_size,
        **arguments,
        activation="sigmoid",
        return_sequences=True,
        return_state=True,
    )
    layer.build((None, None, TASK.input_size))
    return layer


def checked_step(layer, optimizer):
    """Returns a compiled training step: (inputs, targets, mask) -> loss, norm
    of the gradient, and a bool for each of `CHECKED`: whether it is finite."""
    weights = layer.trainable_variables
    loss_of = keras.losses.BinaryCrossentropy(
        reduction="mean_with_sample_weight"
    )

    def all_finite(arrays):
        return tf.reduce_all(
            [
                tf.reduce_all(tf.math.is_finite(array))
                for array in arrays
                if array.dtype.is_floating
            ]
        )

    @tf.function(jit_compile=True)
    def step(inputs, targets, mask):
        with tf.GradientTape() as tape:
            outputs, *states = layer(inputs, training=True)
            loss = loss_of(targets, outputs, mask)
        gradients = tape.gradient(loss, weights)
        optimizer.apply(gradients, weights)
        after = [weight.value for weight in weights]
        parts = [loss], gradients, after, states
        finite = tf.stack([all_finite(part) for part in parts])
        return loss, tf.linalg.global_norm(gradients), finite

    return step


def stability(name, rates, seeds, steps, seen=lambda rate, row: None):
    """Trains a new layer for each learning rate and seed. Calls `seen` after
    each learning rate.

    Returns:
        Dict from the rate to a dict: for each of `CHECKED` the number of runs
        in which it was not finite, the largest norm of a gradient in any run,
        and the median and largest loss of the last 50 steps over the runs.
    """
    layer = made(name)
    optimizer = keras.optimizers.RMSprop(momentum=0.9)
    optimizer.build(layer.trainable_variables)
    step = checked_step(layer, optimizer)
    table = {}
    for rate in rates:
        broken, largest, last = np.zeros(len(CHECKED), int), 0.0, []
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            layer.set_weights(made(name).get_weights())
            for variable in optimizer.variables:
                variable.assign(tf.zeros_like(variable))
            optimizer.learning_rate.assign(rate)
            rng = np.random.default_rng(seed)
            found = []
            for _ in range(steps):
                batch = TASK.sample(rng, BATCH)
                found.append(step(batch.inputs, batch.targets, batch.mask))
            loss, norm, finite = (np.array(part) for part in zip(*found))
            broken += ~finite.all(axis=0)
            largest = max(largest, norm.max())
            last.append(loss[-50:].mean())
        table[rate] = {
            **dict(zip(CHECKED, broken)),
            "largest norm": largest,
            "median loss": np.median(last),
            "largest loss": np.max(last),
        }
        seen(rate, table[rate])
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    rates = 1e-4, 1e-3, 1e-2
    begun = time.perf_counter()
    print(
        "| learning rate | runs | with NaN or infinity in loss | gradients | "
        "weights | states | largest norm of a gradient | loss at the end, "
        "median | largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)

    def seen(rate, row):
        counts = " | ".join(f"{row[part]}" for part in CHECKED)
        print(
            f"| {rate:g} | {arguments.seeds} | {counts} | "
            f"{row['largest norm']:.3g} | {row['median loss']:.3f} | "
            f"{row['largest loss']:.3f} |",
            flush=True,
        )

    stability(
        arguments.architecture, rates, arguments.seeds, arguments.steps, seen
    )
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
