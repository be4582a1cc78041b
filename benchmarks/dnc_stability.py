"""Counts NaN values of the DNC on the copy task, for many seeds.

    python benchmarks/dnc_stability.py --seeds 20 --steps 500

Every step checks the loss, the gradient of each weight before clipping, and all
states after the sequence: a NaN at an earlier time step would persist in them.
The optimizer is that of Graves et al. 2016: RMSProp with a momentum of 0.9 and
gradients clipped to +-10, in float32.
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


def made(**kwargs):
    layer = keras_memory.DNCLayer(
        TASK.output_size,
        **kwargs,
        activation="sigmoid",
        return_sequences=True,
        return_state=True,
    )
    layer.build((None, None, TASK.input_size))
    return layer


def checked_step(layer, optimizer):
    """Returns a compiled training step: (inputs, targets, mask) -> loss,
    largest gradient, and whether loss, gradients and states are finite."""
    weights = layer.trainable_variables
    loss_of = keras.losses.BinaryCrossentropy(
        reduction="mean_with_sample_weight"
    )

    def all_finite(arrays):
        return tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(array)) for array in arrays]
        )

    @tf.function(jit_compile=True)
    def step(inputs, targets, mask):
        with tf.GradientTape() as tape:
            outputs, *states = layer(inputs)
            loss = loss_of(targets, outputs, mask)
        gradients = tape.gradient(loss, weights)
        optimizer.apply(gradients, weights)
        largest = tf.reduce_max([tf.reduce_max(abs(g)) for g in gradients])
        finite = [all_finite(part) for part in ([loss], gradients, states)]
        return loss, largest, tf.stack(finite)

    return step


def stability(rates, seeds, steps, seen=lambda rate, row: None, **kwargs):
    """Trains a new DNC for each learning rate and seed. Calls `seen` after each
    learning rate.

    Returns:
        Dict from the rate to a dict: the number of runs with nonfinite loss,
        gradients or states, the largest entry of a gradient in any run, and the
        median and largest loss of the last 50 steps over the runs.
    """
    layer = made(**kwargs)
    optimizer = keras.optimizers.RMSprop(momentum=0.9, clipvalue=10.0)
    optimizer.build(layer.trainable_variables)
    step = checked_step(layer, optimizer)
    table = {}
    for rate in rates:
        broken, largest, last = np.zeros(3, int), 0.0, []
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            layer.set_weights(made(**kwargs).get_weights())
            for variable in optimizer.variables:
                variable.assign(tf.zeros_like(variable))
            optimizer.learning_rate.assign(rate)
            rng = np.random.default_rng(seed)
            found = []
            for _ in range(steps):
                batch = TASK.sample(rng, BATCH)
                found.append(step(batch.inputs, batch.targets, batch.mask))
            loss, gradient, finite = (np.array(part) for part in zip(*found))
            broken += ~finite.all(axis=0)
            largest = max(largest, gradient.max())
            last.append(loss[-50:].mean())
        table[rate] = {
            "loss": broken[0],
            "gradients": broken[1],
            "states": broken[2],
            "largest gradient": largest,
            "median loss": np.median(last),
            "largest loss": np.max(last),
        }
        seen(rate, table[rate])
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    rates = 1e-4, 1e-3, 1e-2
    begun = time.perf_counter()
    print(
        "| learning rate | runs | with NaN or infinity in loss | gradients | "
        "states | largest gradient | loss at the end, median | largest |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)

    def seen(rate, row):
        print(
            f"| {rate:g} | {arguments.seeds} | {row['loss']} | "
            f"{row['gradients']} | {row['states']} | "
            f"{row['largest gradient']:.3g} | {row['median loss']:.3f} | "
            f"{row['largest loss']:.3f} |",
            flush=True,
        )

    stability(rates, arguments.seeds, arguments.steps, seen)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
