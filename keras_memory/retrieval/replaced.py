"""Fixed memories that made way for others, while graphs still read them."""

import keras
import ml_dtypes


def mark_of_replaced(dtype):
    """What a memory is filled with that made way for another one: a number
    that encodings hardly have. Training that diverges makes memories of NaN.
    """
    return float(ml_dtypes.finfo(keras.backend.standardize_dtype(dtype)).min)


def is_replaced(values):
    """Whether a fixed memory, (M, D), has made way for one of another size
    since a graph of TensorFlow was traced around it. None where no graph is
    traced.

    Raises:
        InvalidArgumentError: while the graph runs, if it has. XLA drops
            assertions, so that callers make their results NaN.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    if tf.executing_eagerly():
        return None
    replaced = tf.reduce_all(values[0] == mark_of_replaced(values.dtype))
    message = (
        "A memory of another number of examples was set after this function "
        "was traced, which would go on looking at the one before: trace it "
        "anew, by making another `tf.function`, a model's by `compile`."
    )
    tf.debugging.Assert(~replaced, [message])
    return replaced
