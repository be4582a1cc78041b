"""The Differentiable Neural Computer against its oracle, finite differences,
cases solved by hand, and where mathematics is singular."""

import itertools

import keras
import numpy as np
import pytest
import reference
from harness import needs_tensorflow
from keras import ops

import keras_memory
from keras_memory import DNCState
from keras_memory import addressing

BATCH, TIME, WIDTH, UNITS = 2, 6, 3, 2
SIZES = {
    "memory_slots": 11,
    "slot_size": 5,
    "read_heads": 2,
    "controller_units": 7,
}
NAN = float("nan")


def dnc(**kwargs):
    fixed = {"units": UNITS, **SIZES, "return_sequences": True}
    return keras_memory.DNCLayer(**{**fixed, **kwargs})


def built(shape=(BATCH, TIME, WIDTH), **kwargs):
    layer = dnc(**kwargs)
    layer.build(shape)
    return layer


def randomised(seed=5, scale=1.0, shape=(BATCH, TIME, WIDTH), **kwargs):
    """A layer whose weights are all drawn anew."""
    layer = built(shape, **kwargs)
    rng = np.random.default_rng(seed)
    for weight in layer.cell.weights:
        if "seed" not in weight.path:
            weight.assign(rng.normal(size=weight.shape, scale=scale))
    return layer


def like(layer, **kwargs):
    """A layer of other arguments with the weights of `layer`."""
    other = built(**kwargs)
    other.cell.set_weights(layer.cell.get_weights())
    return other


def numbers(seed=7, shape=(BATCH, TIME, WIDTH)):
    return np.random.default_rng(seed).normal(size=shape)


def close(actual, expected, tolerance=1e-6):
    actual = ops.convert_to_numpy(actual)
    expected = ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all() and np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def some_state(layer, seed=13, batch=BATCH):
    """States as they are in the middle of a sequence, none of them zero."""
    rng = np.random.default_rng(seed)
    records = layer.cell.initial_records

    def weighting(shape, total=0.9):
        return total * reference.softmax(rng.normal(size=(batch, *shape)))

    def of(record):
        slots = record.usage.shape[0]
        linkage = precedence = ()
        if record.linkage != ():
            heads = record.linkage.shape[0]
            linkage = weighting((heads, slots, slots)) / slots
            linkage = linkage * (1.0 - np.eye(slots))
            precedence = weighting((heads, slots), 0.8)
        return DNCState(
            reads=rng.normal(size=(batch, *record.reads.shape)),
            memory=rng.normal(size=(batch, *record.memory.shape)),
            usage=rng.uniform(size=(batch, slots)),
            linkage=linkage,
            precedence=precedence,
            read_weighting=weighting(record.read_weighting.shape),
            write_weighting=weighting(record.write_weighting.shape),
            controller=keras.tree.map_structure(
                lambda initial: 0.5 * rng.normal(size=(batch, *initial.shape)),
                record.controller,
            ),
        )

    made = tuple(of(record) for record in records)
    return layer.cell.pack_state(made if len(made) > 1 else made[0])


# Against the oracle.

BY_NAME = {
    "linear": reference.identity,
    "tanh": np.tanh,
    "sigmoid": reference.sigmoid,
    "softplus": reference.softplus,
    "oneplus": reference.oneplus,
}


def oracle(layer, x, states=None, use_memory=True):
    """What `reference.dnc_sequence` says that the layer does."""
    cell, config = layer.cell, layer.cell.get_config()
    weights = []
    for block, controller in enumerate(cell.block_controllers):
        weights.append(
            {
                "controller_kernel": controller.kernel,
                "controller_bias": controller.bias,
                "interface_kernel": cell.interfaces[block][0],
                "interface_bias": cell.interfaces[block][1],
            }
        )
        if config["controller"] != "dense":
            weights[-1]["controller_recurrent_kernel"] = (
                controller.recurrent_kernel
            )
        if config["interface_layer_norm"]:
            weights[-1]["gamma"] = cell.interface_norms[block].gamma
            weights[-1]["beta"] = cell.interface_norms[block].beta
    weights[-1]["output_kernel"] = cell.output_projection[0]
    weights[-1]["output_bias"] = cell.output_projection[1]
    if states is None:
        states = cell.get_initial_state(batch_size=len(x))
    records = cell.unpack_state(states)
    records = (records,) if isinstance(records, DNCState) else records
    initial = [
        {
            name: ops.convert_to_numpy(value)
            for name, value in record._asdict().items()
            if name != "controller" and not isinstance(value, tuple)
        }
        for record in records
    ]
    controllers = [
        [ops.convert_to_numpy(state) for state in keras.tree.flatten(one)]
        for record in records
        for one in record.controller
    ]
    same = (
        "slot_size read_heads write_heads controller layers share_memory "
        "linkage content_masks deallocation link_sharpening clip_value "
        "interface_layer_norm product_epsilon usage_epsilon"
    )
    norm_epsilon = config["norm_epsilon"]
    if norm_epsilon is None:
        norm_epsilon = 1e-16 if layer.compute_dtype == "float64" else 1e-8
    return reference.dnc_sequence(
        x,
        [{k: ops.convert_to_numpy(w) for k, w in one.items()} for one in weights],
        initial=initial,
        initial_controllers=controllers,
        norm_epsilon=norm_epsilon,
        strength=BY_NAME[config["strength_activation"]],
        key_activation=BY_NAME[config["key_activation"]],
        add_activation=BY_NAME[config["add_activation"]],
        activation=BY_NAME[config["activation"]],
        use_memory=use_memory,
        **{name: config[name] for name in same.split()},
    )


def equals_the_oracle(layer, x, states=None, tolerance=1e-11, **kwargs):
    expected = oracle(layer, x, states, **kwargs)
    inside = keras_memory.trace(layer, x, initial_state=states, **kwargs)
    assert set(inside) == set(expected)
    for name, value in expected.items():
        try:
            close(inside[name], value, tolerance)
        except AssertionError as error:
            raise AssertionError(name) from error
    output = layer(x, initial_state=states, **kwargs)
    close(output, expected["output"], tolerance)
    return expected


@pytest.mark.parametrize("write_heads", [1, 3])
@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "dense"])
@needs_tensorflow
def test_equals_the_oracle(controller, write_heads):
    layer = randomised(
        controller=controller,
        write_heads=write_heads,
        initial_memory="random",
        initial_controller_state="learned",
        dtype="float64",
    )
    x = numbers()
    equals_the_oracle(layer, x)
    equals_the_oracle(layer, x, some_state(layer))
