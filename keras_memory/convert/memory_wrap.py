"""Converts layers of memorywrap."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_memory.checks import check_bool
from keras_memory.convert.weights import Sizes
from keras_memory.convert.weights import canonical_arrays
from keras_memory.convert.weights import check_shapes
from keras_memory.convert.weights import make_layer
from keras_memory.convert.weights import torch_linear
from keras_memory.convert.weights import torch_name
from keras_memory.hints import Array
from keras_memory.memory_wrap import BaselineMemory
from keras_memory.memory_wrap import MemoryWrapLayer


def from_memorywrap(
    weights: Mapping[str, Array], baseline: bool = False, **layer_kwargs: Any
) -> MemoryWrapLayer | BaselineMemory:
    """Makes a Memory Wrap from the weights of KRLGroup's memorywrap 1.1.7.

    The layer computes the same as the reference.

    Args:
        weights: dict of arrays, a state dict of `MemoryWrapLayer` or
            `BaselineMemory` with its own classifier or with one linear layer
            in its place; names may begin with `module.`. From a larger model,
            take the arrays of this layer and remove the layer's name.
        baseline: bool, whether the weights are of `BaselineMemory`; their
            names and shapes do not tell.
        **layer_kwargs: arguments of our layer that the weights do not
            determine: `similarity` (which must match the reference), `top_k`,
            `dtype`, `name`, ...

    Returns:
        A built `MemoryWrapLayer` or `BaselineMemory`.

    Raises:
        ValueError: arrays are missing, unexpected or of a wrong shape, or have
            values that are not finite numbers; the weights determine an
            argument.

    Example:

    >>> file = np.load("tests/goldens/memorywrap__a.npz")
    >>> start = "MemoryWrapLayer.w."
    >>> weights = {
    ...     n.removeprefix(start): file[n]
    ...     for n in file.files if n.startswith(start)
    ... }
    >>> layer = keras_memory.convert.from_memorywrap(weights)
    >>> layer([np.zeros((2, 6)), np.zeros((9, 6))]).shape
    TensorShape([2, 3])
    """
    check_bool("baseline", baseline)
    weights = canonical_arrays(weights, torch_name)
    sizes = Sizes(weights)
    linear = "classifier.weight" in weights
    names = ["classifier"] if linear else ["classifier.fc1", "classifier.fc2"]
    shapes = {}
    _, features = sizes.of(f"{names[0]}.weight", 2)
    size = features
    for name in names:
        (units,) = sizes.of(f"{name}.bias", 1)
        shapes[f"{name}.weight"] = (units, size)
        shapes[f"{name}.bias"] = (units,)
        size = units
    check_shapes(weights, shapes, sizes)
    if features % 2 and not baseline:
        raise ValueError(
            f"{names[0] + '.weight'!r} must have an even number of features, "
            "half for the encodings and half for the memory; weights of "
            "`BaselineMemory` need baseline=True. "
            f"Received: {features} features"
        )
    dtype = layer_kwargs.get("dtype")
    layers = [keras.layers.Dense(units, dtype=dtype)]
    if not linear:
        hidden = len(weights["classifier.fc1.bias"])
        layers.insert(0, keras.layers.Dense(hidden, "relu", dtype=dtype))
    layer = make_layer(
        BaselineMemory if baseline else MemoryWrapLayer,
        layer_kwargs,
        determined={
            "units": units,
            "head": None,
            "classifier": layers[0] if linear else keras.Sequential(layers),
        },
    )
    layer.build((None, features if baseline else features // 2))
    for dense, name in zip(layers, names, strict=True):
        kernel_and_bias = torch_linear(weights, name)
        dense.set_weights([kernel_and_bias[:-1], kernel_and_bias[-1]])
    return layer
