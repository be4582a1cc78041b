"""Milliseconds of one NTM training step on this machine.

    python benchmarks/ntm_training_step.py

Sizes are those of the copy task with sequences of 20 vectors: T = 41, N = 128,
W = 20, an LSTM of 100. The variants run in turn, a step of each at a time, so
that what else the machine does hits all of them alike; medians are printed.
"""

import argparse
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

import keras_memory


def training_step(batch, controller, jit_compile, steps=41, bits=8):
    model = keras.Sequential(
        [
            keras.Input((steps, bits + 1)),
            keras_memory.NTMLayer(
                bits,
                controller=controller,
                activation="sigmoid",
                return_sequences=True,
            ),
        ]
    )
    optimizer = keras.optimizers.RMSprop(1e-4)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, 2, (batch, steps, bits + 1)).astype("float32")
    inputs, targets = tf.constant(inputs), tf.constant(inputs[:, :, :bits])

    @tf.function(jit_compile=jit_compile)
    def step():
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = keras.losses.binary_crossentropy(targets, outputs)
            loss = tf.reduce_mean(loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return lambda: step().numpy()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    rounds = parser.parse_args(arguments).steps
    variants = {
        (controller, batch, jit): training_step(batch, controller, jit)
        for controller in ("lstm", "dense")
        for batch in (1, 16)
        for jit in (True, False)
    }
    for step in variants.values():
        step()
        step()
    times = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, step in variants.items():
            start = time.perf_counter()
            step()
            times[variant].append(1e3 * (time.perf_counter() - start))
    print("controller  batch  XLA    ms a step (median)")
    for (controller, batch, jit), measured in times.items():
        median = statistics.median(measured)
        print(f"{controller:10}  {batch:5}  {jit!s:5}  {median:8.2f}")


if __name__ == "__main__":
    main()
