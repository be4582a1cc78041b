"""A Neural Turing Machine in a subclassed model with a custom training loop.

    python examples/run_through.py --steps 100

Inputs with several batch axes, here (1, 2, 3, 32), are reshaped around the
layer. The model learns to sum its inputs.
"""

import argparse

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_memory


class Model(keras.Model):
    """(..., time, features) -> (..., time, units)."""

    def __init__(self, units):
        super().__init__()
        self.before = keras.layers.Dense(16, "tanh")
        self.memory = keras_memory.NTMLayer(
            units, memory_slots=16, slot_size=8, return_sequences=True
        )

    def call(self, inputs, training=False):
        sequences = ops.reshape(inputs, (-1, *inputs.shape[-2:]))
        outputs = self.memory(self.before(sequences), training=training)
        return ops.reshape(outputs, (*inputs.shape[:-1], outputs.shape[-1]))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(arguments).steps
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)

    inputs = rng.normal(size=(1, 2, 3, 32)).astype("float32")
    targets = np.cumsum(inputs, axis=-2)[..., :4]
    model = Model(units=4)
    print("outputs", model(inputs).shape)
    model.summary()

    optimizer = keras.optimizers.Adam(1e-2, clipnorm=1.0)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = ops.mean(ops.square(outputs - targets))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    optimizer.build(model.trainable_variables)
    for number in range(1, steps + 1):
        loss = float(step())
        if number % 20 == 0 or number == steps:
            print(f"step {number}: loss {loss:.4f}")
    return loss


if __name__ == "__main__":
    main()
