"""Lowers catalogue cases for other devices, on the JAX backend.

Run as a program with KERAS_BACKEND=jax and names of cases; prints one JSON
line a case:
{"name", "forward", "backward", "train", "difference"}, and one for each
control. "backward" is the gradient of a forward pass of free sizes, which
Keras's `model.export` writes too.
`jax.export` lowers for a platform without having one. It fails for functions
that call back to the host, or that have no kernel on the platform.
"""

import json
import sys

import jax
import keras
import numpy as np
from catalogue import CASES
from catalogue import WRAPS
from jax import export

PLATFORMS = ("tpu", "cuda", "cpu")


def lower(function, *arguments):
    return export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)


def lower_case(case):
    keras.utils.set_random_seed(1)
    inputs = case.entry()
    model = keras.Model(inputs, case.make()(inputs))
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    x = case.inputs(np.random.default_rng(3))
    trainable = [v.value for v in model.trainable_variables]
    other = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in optimizer.variables]

    def forward(trainable, other, x):
        return model.stateless_call(trainable, other, x)[0]

    def backward(trainable, other, x):
        outputs, pull = jax.vjp(forward, trainable, other, x)
        return pull(jax.tree.map(jax.numpy.ones_like, outputs))

    def train(trainable, other, state, x):
        def loss(trainable):
            outputs, after = model.stateless_call(
                trainable, other, x, training=True
            )
            return (outputs**2).mean(), after

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(
            trainable
        )
        return (
            value,
            after,
            optimizer.stateless_apply(state, gradients, trainable),
        )

    b, t = export.symbolic_shape("b, t")
    free = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        case.free_shapes(b, t),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    exported = lower(forward, trainable, other, free)
    pulled = lower(backward, trainable, other, free)
    trained = lower(train, trainable, other, state, x)
    difference = np.abs(exported.call(trainable, other, x) - model(x)).max()
    return {
        "forward": list(exported.platforms),
        "backward": list(pulled.platforms),
        "train": list(trained.platforms),
        "difference": float(difference),
    }


def control(name, function):
    """Lowers a function that must fail: the error, or None without one."""
    try:
        lower(function, np.ones((3, 3), "float32"))
    except Exception as error:
        return {"name": name, "error": str(error)}
    return {"name": name, "error": None}


def call_back(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.asarray, shape, x)


if __name__ == "__main__":
    for case in [case for case in CASES + WRAPS if case.name in sys.argv]:
        print(json.dumps({"name": case.name, **lower_case(case)}), flush=True)
    controls = {
        "control-callback": call_back,
        "control-eigenvalues": lambda x: jax.numpy.linalg.eig(x)[0],
    }
    for name, function in controls.items():
        print(json.dumps(control(name, function)), flush=True)
    sys.exit(0)
