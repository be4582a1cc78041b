"""Reading from and writing to the weighted slots of a memory.

Pure functions without weights or state. Axes are always batch B, head H,
width W, slot N: inside a step slots come last, which is fastest.

`read`, `inner_products` and `outer_write` are the products of memory,
weightings and vectors; the gradients of each are the other two. `gather` and
`scatter_add` are each other's gradient.
"""

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.gradients import custom_gradient
from keras_memory.addressing.scaling import at_least_float32

# Without XLA each operation is a separate call, so that one batched product of
# small matrices is fastest. XLA is faster with sums over any but the last axis,
# and with products of one matrix and one vector (`benchmarks/README.md`).


def _grad_read(grad_reads, memory, weighting):
    return outer_write(grad_reads, weighting), inner_products(
        grad_reads, memory
    )


@custom_gradient(_grad_read)
def read(memory, weighting):
    """Reads the weighted sum of the slots, one vector per head.

    Source: Graves et al. 2014, eq. 2.

    Args:
        memory: (B, W, N) slot contents.
        weighting: (B, R, N) read weighting.

    Returns:
        (B, R, W) read vectors.
    """
    if not compiles():
        return ops.matmul(weighting, ops.transpose(memory, (0, 2, 1)))
    heads = [
        ops.matmul(memory, weighting[:, head, :, None])[:, :, 0]
        for head in range(weighting.shape[1])
    ]
    return ops.stack(heads, axis=1)


def _grad_inner_products(grad_products, vectors, memory):
    return read(memory, grad_products), outer_write(vectors, grad_products)


@custom_gradient(_grad_inner_products)
def inner_products(vectors, memory):
    """Inner product of each vector with each slot.

    Args:
        vectors: (B, H, W), one for each head.
        memory: (B, W, N) slot contents.

    Returns:
        (B, H, N).
    """
    if not compiles():
        return ops.matmul(vectors, memory)
    heads, width = vectors.shape[1:]
    if width > 32:  # more than a sum handles in one pass
        if heads == 1 and width > 128:  # else XLA goes column by column
            return ops.matmul(ops.repeat(vectors, 2, axis=1), memory)[:, :1]
        return ops.matmul(vectors, memory)
    return ops.sum(vectors[:, :, :, None] * memory[:, None], axis=2)


def _grad_outer_write(grad_memory, vectors, weighting):
    return read(grad_memory, weighting), inner_products(vectors, grad_memory)


@custom_gradient(_grad_outer_write)
def outer_write(vectors, weighting):
    """Distributes vectors over the slots by their weightings.

    Args:
        vectors: (B, H, W), one for each head.
        weighting: (B, H, N).

    Returns:
        (B, W, N), the sum over the heads.
    """
    heads = vectors.shape[1]
    if heads > (4 if compiles() else 1):
        return ops.matmul(ops.transpose(vectors, (0, 2, 1)), weighting)
    return sum(
        vectors[:, head, :, None] * weighting[:, head, None]
        for head in range(heads)
    )


def erase_and_add(memory, weighting, erase_vector, add_vector):
    """Writes to the weighted slots: erases first, then adds.

    Source: Graves et al. 2014, eqs. 3-4. With several heads all erase before
    any adds, so that their order does not matter (section 3.2).

    Args:
        memory: (B, W, N) slot contents.
        weighting: (B, H, N) write weighting.
        erase_vector: (B, H, W) in [0, 1], or None to add only; 1 at full
            weighting clears the slot.
        add_vector: (B, H, W); any real value.

    Returns:
        (B, W, N) the memory after the write.
    """
    if erase_vector is not None:
        for head in range(weighting.shape[1]):
            selection = slice(head, head + 1)
            erased = outer_write(
                erase_vector[:, selection], weighting[:, selection]
            )
            memory = memory * (1.0 - erased)  # eq. 3
    return memory + outer_write(add_vector, weighting)  # eq. 4


def _grad_gather(grad_gathered, vectors, places):
    size = vectors.shape[1]
    grad_vectors = scatter_add(grad_gathered, places, size=size)
    return grad_vectors, ops.zeros_like(places)


@custom_gradient(_grad_gather)
def gather(vectors, places):
    """Takes the vectors at the given places.

    Args:
        vectors: (B, N, D); any real value.
        places: (B, P) whole numbers in [0, N), as floats; their gradient is
            zero.

    Returns:
        (B, P, D).
    """
    flat = ops.reshape(vectors, (-1, vectors.shape[2]))
    flat = ops.take(flat, _in_batch(places, vectors.shape[1]), axis=0)
    return ops.reshape(flat, (-1, places.shape[1], vectors.shape[2]))


def _grad_scatter_add(grad_sums, vectors, places, size):
    return gather(grad_sums, places), ops.zeros_like(places)


@custom_gradient(_grad_scatter_add)
def scatter_add(vectors, places, *, size):
    """Adds vectors up at the given places.

    Args:
        vectors: (B, P, D); any real value.
        places: (B, P) whole numbers in [0, N), as floats; their gradient is
            zero.
        size: int N, number of places.

    Returns:
        (B, N, D), 0 at places without vectors.
    """
    rows, width = ops.shape(vectors)[0], vectors.shape[2]
    flat = ops.reshape(vectors, (-1, width))
    flat = _sums(flat, _in_batch(places, size), rows * size)
    return ops.reshape(flat, (-1, size, width))


def rows_at(vectors, places):
    """Takes the entries of (B, N, ...) at places (B, P, ...) of whole numbers:
    (B, P, ...)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(vectors, places, batch_dims=1)
    return vectors[_rows_of(places), ops.cast(places, _index_dtype())]


def replace_rows(vectors, places, rows):
    """Replaces the entries of (B, N, ...) at places (B, P) of whole numbers by
    rows (B, P, ...). Places that occur several times must have equal rows."""
    if keras.backend.backend() == "numpy":  # where Keras writes in place
        vectors = vectors.copy()
    return ops.scatter_update(vectors, *pairs_of(places, rows))


def pairs_of(places, rows):
    """Indices (B P, 2), of row and place, and the rows (B P, ...), for updates
    at places (B, P). A flat index over all rows could exceed 2^31."""
    indices = [ops.broadcast_to(_rows_of(places), ops.shape(places))]
    indices.append(ops.cast(places, _index_dtype()))
    return (
        ops.reshape(ops.stack(indices, axis=-1), (-1, 2)),
        ops.reshape(rows, (-1, *rows.shape[2:])),
    )


def _rows_of(places):
    """The row index of each of (B, ...) places: (B, 1 ...)."""
    rows = ops.arange(ops.shape(places)[0], dtype=_index_dtype())
    return ops.reshape(rows, (-1, *[1] * (len(places.shape) - 1)))


def _index_dtype():
    """int32 in JAX, which lacks int64 by default; else int64, since TensorFlow
    flattens the pairs to a single index."""
    return "int32" if keras.backend.backend() == "jax" else "int64"


def take_rows(memory, slots):
    """`rows_at` in a dtype to compute with."""
    rows = rows_at(memory, slots)
    return ops.cast(rows, at_least_float32(ops.dtype(rows)))


def with_one_gradient(slots, rows):
    """Rows (B, P, ...) to replace those of slots (B, P): of rows of equal slots
    only the first has a gradient."""
    if keras.backend.backend() == "jax":  # whose update sees to that
        return rows
    return select(is_first(slots), rows, ops.stop_gradient(rows))


def select(updated, new, old):
    """`new` where `updated` is True, else `old`, which have further axes."""
    more = len(new.shape) - len(updated.shape)
    return ops.where(updated[(..., *[None] * more)], new, old)


def same_place(places, others):
    """(..., P), (..., Q) -> (..., P, Q) bool, True where they are the same
    place."""
    return ops.equal(places[..., None], others[..., None, :])


def is_first(places):
    """(B, P) -> (B, P) bool, False where a place has occurred before."""
    is_before = np.tri(places.shape[1], k=-1, dtype=bool)
    is_same = ops.logical_and(same_place(places, places), is_before)
    return ops.logical_not(ops.any(is_same, axis=2))


def largest(x, count):
    """Indices of the `count` largest entries of the last axis, as int32; ties
    go to the first entry. They have no gradient."""
    x = ops.stop_gradient(x)
    if keras.backend.backend() in ("tensorflow", "jax"):
        return ops.cast(ops.top_k(x, count)[1], "int32")
    # On other backends `top_k` breaks ties arbitrarily.
    indices, place = [], ops.arange(x.shape[-1])
    for _ in range(count):
        indices.append(ops.argmax(x, axis=-1, keepdims=True))
        x = ops.where(place == indices[-1], -np.inf, x)
    return ops.cast(ops.concatenate(indices, axis=-1), "int32")


def precise_products(vectors, columns):
    """A matrix product in the full precision of its dtype, on accelerators too.

    By default JAX and TensorFlow let a GPU round float32 factors to 11 bits,
    and a TPU to 8: at least one in two thousand neighbors would be wrong.

    Args:
        vectors: (..., n, D).
        columns: (..., D, m), vectors as columns.

    Returns:
        (..., n, m).
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            return ops.matmul(vectors, columns)
    dtypes = {ops.dtype(vectors), ops.dtype(columns)}
    if backend == "tensorflow" and dtypes == {"float32"} and _rounds():
        (high, low), (columns, rest) = map(_halves, (vectors, columns))
        small = ops.matmul(high, rest) + ops.matmul(low, columns)
        return ops.matmul(high, columns) + small
    return ops.matmul(vectors, columns)


def _rounds():
    import tensorflow as tf

    may = tf.config.experimental.tensor_float_32_execution_enabled()
    return may and bool(tf.config.list_physical_devices("GPU"))


def _halves(x):
    """Splits x into its leading 11 bits and the remainder (TensorFlow)."""
    import tensorflow as tf

    bits = tf.bitcast(x, "uint32") & np.uint32(0xFFFFE000)
    high = tf.bitcast(bits, "float32")
    return high, x - high


def row_sum(x):
    """Sums over the last axis and keeps it: (B, H, N) -> (B, H, 1)."""
    devices = keras.distribution.list_devices() if compiles() else []
    if devices and all("cpu" in device.lower() for device in devices):
        # As one product of two matrices: XLA refuses the gradient of others for
        # an unknown batch size.
        slots = x.shape[-1]
        flat = ops.reshape(x, (-1, slots))
        sums = ops.matmul(flat, ops.ones((slots, 1), x.dtype))
        return ops.reshape(sums, (-1, *x.shape[1:-1], 1))
    # In matrix products a GPU or TPU may round the factors to fewer bits.
    return ops.sum(x, axis=-1, keepdims=True)


def _in_batch(places, size):
    """(B, P) places among N each -> (B P,) places among all B N."""
    first = size * ops.arange(ops.shape(places)[0], dtype="int32")
    return ops.reshape(ops.cast(places, "int32") + first[:, None], (-1,))


def _sums(vectors, places, size):
    """(P, D), (P,) -> (size, D)."""
    if keras.backend.backend() == "torch":
        # Keras's `segment_sum` computes in float32 on PyTorch.
        return ops.zeros((size, vectors.shape[1]), vectors.dtype).index_add(
            0, places, vectors
        )
    return ops.segment_sum(vectors, places, size)


def compiles():
    """Whether XLA compiles the current computation."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util

        return control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        )
    return keras.backend.backend() == "jax"
