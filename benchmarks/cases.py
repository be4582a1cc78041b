"""Sizes of the comparisons, and training steps of our layers."""

import functools
import os

import numpy as np

from benchmarks import references

NTM = {"steps": 41, "bits": 8, "slots": 128, "width": 20, "units": 100}
DNC = {"steps": 40, "size": 64, "slots": 100, "width": 32, "units": 128}
BASES = {"ntm": {**NTM, "batch": 1}, "dnc": {**DNC, "batch": 1}}
CASES = {  # the layer, its sizes, and the target speedup
    "ntm-1": ("ntm", BASES["ntm"], 60),
    "ntm-16": ("ntm", {**NTM, "batch": 16}, 25),
    "dnc-1": ("dnc", BASES["dnc"], 14),
    "dnc-16": ("dnc", {**DNC, "batch": 16}, 7),
    "dnc-512": ("dnc", {**BASES["dnc"], "slots": 512}, 6),
}
VARIANTS = {
    "fast loop": {},
    "portable loop": {"loop": "portable"},
    "fast loop, no XLA": {"jit_compile": False},
    "portable loop, no XLA": {"loop": "portable", "jit_compile": False},
}


def jobs(kind, sizes, threads, checkout, variants=None):
    """Dict from each variant to the arguments of a `measure.Worker`, or to a
    text that says why it cannot run. The reference comes first, by its name;
    then all `VARIANTS`, or the given ones."""
    ours_of = functools.partial(ours, kind, sizes)
    prepared = functools.partial(prepare, threads)
    return {
        references.NAMES[kind]: references.job(kind, sizes, threads, checkout),
        **{
            name: (prepared, functools.partial(ours_of, **VARIANTS[name]))
            for name in variants or VARIANTS
        },
    }


def prepare(threads):
    """Imports and starts TensorFlow on the CPU with this number of threads."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    import keras

    import keras_memory  # noqa: F401

    tf.zeros(())
    keras.utils.set_random_seed(1)


def ours(kind, sizes, loop="auto", jit_compile=True):
    """Returns a function that trains one of our layers for one step."""
    import keras

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
    return training_step(layer, loss_of, optimizer, x, y, jit_compile)


def training_step(layer, loss_of, optimizer, x, y, jit_compile=True):
    """Returns a function that trains a layer for one step. Without an optimizer
    it only computes the loss and the gradients."""
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((None, x.shape[-1])), layer])
    variables = model.trainable_variables
    if optimizer is not None:
        optimizer.build(variables)
    x, y = (tf.constant(a, "float32") for a in (x, y))

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, variables)
        if optimizer is None:
            return loss, gradients  # XLA leaves out what is not returned
        optimizer.apply(gradients, variables)
        return loss, []

    return lambda: float(step(x, y)[0])
