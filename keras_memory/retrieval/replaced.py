"""Detects fixed memories that were replaced while traced graphs read them."""

import keras
import ml_dtypes


def mark_of_replaced(dtype):
    """The number that fills a replaced memory: one unlikely in encodings.

    NaN would not do: diverging training fills memories with NaN too.
    """
    return float(ml_dtypes.finfo(keras.backend.standardize_dtype(dtype)).min)


def is_replaced(values):
    """Whether a fixed memory, (M, D), was replaced by one of another size after
    a TensorFlow graph was traced around it. None outside of such graphs.

    Raises:
        InvalidArgumentError: when the graph runs, if it was replaced. XLA drops
            assertions, so callers set their results to NaN.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    if tf.executing_eagerly():
        return None
    replaced = tf.reduce_all(values[0] == mark_of_replaced(values.dtype))
    message = (
        "The memory was replaced by one of another size after this function "
        "was traced, so the function still reads the old one. Trace it again: "
        "create a new `tf.function`, or call the model's `compile`."
    )
    tf.debugging.Assert(~replaced, [message])
    return replaced
