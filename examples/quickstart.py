"""A memory in your own model, trained by `fit` and by a custom loop.

    python examples/quickstart.py --steps 200

The task is an echo: the model sees random bits and must repeat them after a
pause.
"""

import argparse

import keras
import numpy as np
import tensorflow as tf

import keras_memory


def echo(rng, batch=16, length=5, bits=3):
    """(B, 2 length, bits) sequences, and targets: their echo in the second
    half."""
    sequence = rng.integers(0, 2, (batch, length, bits)).astype("float32")
    silence = np.zeros_like(sequence)
    inputs = np.concatenate([sequence, silence], axis=1)
    targets = np.concatenate([silence, sequence], axis=1)
    return inputs, targets


def make_model(bits=3):
    return keras.Sequential(
        [
            keras.Input((None, bits)),
            keras_memory.NTMLayer(
                32, memory_slots=16, slot_size=8, return_sequences=True
            ),
            keras.layers.Dense(bits, activation="sigmoid"),
        ]
    )


def train_with_fit(steps, rng):
    model = make_model()
    model.compile(
        keras.optimizers.Adam(1e-2, clipnorm=1.0),
        "binary_crossentropy",
        metrics=["binary_accuracy"],
        jit_compile=True,
    )
    inputs, targets = echo(rng, batch=16 * steps)
    model.fit(inputs, targets, batch_size=16, verbose=2)
    return model


def train_by_hand(steps, rng):
    model = make_model()
    optimizer = keras.optimizers.Adam(1e-2, clipnorm=1.0)
    loss_of = keras.losses.BinaryCrossentropy()
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True)
    def step(inputs, targets):
        with tf.GradientTape() as tape:
            loss = loss_of(targets, model(inputs, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    for number in range(1, steps + 1):
        loss = step(*echo(rng))
        if number % 50 == 0 or number == steps:
            print(f"step {number}: loss {float(loss):.4f}")
    return model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(arguments).steps
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)

    print("with fit")
    train_with_fit(steps, rng)
    print("with a GradientTape")
    model = train_by_hand(steps, rng)

    inputs, _ = echo(rng, batch=1)
    inside = keras_memory.trace(model.layers[0], inputs)
    for name, values in inside.items():
        print(f"{name:22} {values.shape}")


if __name__ == "__main__":
    main()
