"""Tensors of coordinates: a common float dtype, full-precision products."""

import itertools

import keras
from keras import ops

from keras_memory.checks import check_array


def float_tensors(sizes=None, **arrays):
    """Checked tensors, cast to the widest float dtype among them.

    Args:
        sizes: dict, see `check_array`.
        **arrays: by name, pairs of an array and its axes; see `check_array`.
    """
    sizes = {} if sizes is None else sizes
    tensors = {
        name: check_array(name, value, axes, sizes)
        for name, (value, axes) in arrays.items()
    }
    # Lists and integers have no float dtype of their own.
    dtypes = [
        ops.dtype(tensors[name])
        for name, (value, _) in arrays.items()
        if "float" in str(getattr(value, "dtype", ""))
    ]
    if len(arrays) == 1 or not dtypes:
        return list(tensors.values())
    dtype = _widest(*dtypes)
    return [
        check_array(name, value, axes, dtype=dtype)
        if ops.dtype(tensors[name]) != dtype
        else tensors[name]
        for name, (value, axes) in arrays.items()
    ]


def _widest(*dtypes):
    """As `keras.backend.result_type`, which lacks float64 on PyTorch."""
    wide = "float64" in dtypes
    return "float64" if wide else keras.backend.result_type(*dtypes)


def check_leads(**tensors):
    """Raises ValueError unless all axes but the last two broadcast."""
    leads = [tuple(tensor.shape)[-3::-1] for tensor in tensors.values()]
    for sizes in itertools.zip_longest(*leads, fillvalue=1):
        if len(set(sizes) - {1, None}) > 1:
            shapes = [tuple(tensor.shape) for tensor in tensors.values()]
            raise ValueError(
                f"`{'` and `'.join(tensors)}` must broadcast in all axes but "
                "the last two. Received: shapes "
                f"{' and '.join(map(str, shapes))}"
            )


def matrix_product(matrices, factors):
    """(..., i, k) products of (..., i, j) with (..., j, k), for a small j.

    In `ops.matmul`, accelerators round factors to 11 bits or 8: an error of
    millimeters or more at 10 meters.
    """
    return sum(
        matrices[..., j, None] * factors[..., j, None, :]
        for j in range(matrices.shape[-1])
    )


def turned(vectors, matrices):
    """(..., 3) products of (..., 3, 3) matrices with (..., 3) vectors."""
    return matrix_product(matrices, vectors[..., None])[..., 0]


def at_least(values, least):
    """As `ops.maximum`, which on PyTorch casts float64 to float32."""
    values, least = float_tensors(values=(values, None), least=(least, None))
    return ops.where(values > least, values, least)
