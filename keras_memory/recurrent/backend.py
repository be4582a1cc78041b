"""Loops and gradients that `keras.ops` does not have."""

import keras
from keras import ops
from keras.src import backend

from keras_memory.addressing.slots import pairs_of


def scan(step, carried, slices, specs, reverse=False):
    """Loops over the first axis, as `jax.lax.scan` does.

    Args:
        step: (carried, slices of one step) -> (carried, results).
        carried: nested arrays.
        slices: nested arrays (T, ...).
        specs: nested, with the shapes and dtypes of the results of `step`.
        reverse: bool, loop from the last to the first; the results are in the
            order of `slices` all the same.

    Returns:
        `carried` after the last step, and the results (T, ...).
    """
    if backend.backend() == "jax":
        import jax

        return jax.lax.scan(step, carried, slices, reverse=reverse)
    first = keras.tree.flatten(slices)[0]
    if backend.backend() != "tensorflow":
        times, results = range(first.shape[0]), []
        for at in reversed(times) if reverse else times:
            now = keras.tree.map_structure(lambda x: x[at], slices)  # noqa: B023
            carried, result = step(carried, now)
            results.append(result)
        results = reversed(results) if reverse else results
        stacks = keras.tree.map_structure(lambda *xs: ops.stack(xs), *results)
        return carried, stacks
    import tensorflow as tf

    length = first.shape[0] or tf.shape(first)[0]
    stacks = keras.tree.map_structure(
        lambda spec: tf.TensorArray(
            spec.dtype, size=length, element_shape=spec.shape
        ),
        specs,
    )

    def body(t, carried, stacks):
        at = length - 1 - t if reverse else t
        now = keras.tree.map_structure(lambda x: x[at], slices)
        carried, results = step(carried, now)
        stacks = keras.tree.map_structure(
            lambda stack, result: stack.write(at, result), stacks, results
        )
        return t + 1, carried, stacks

    _, carried, stacks = tf.while_loop(
        lambda t, *_: t < length,
        body,
        (0, carried, stacks),
        maximum_iterations=length,
    )
    return carried, keras.tree.map_structure(lambda s: s.stack(), stacks)


def add_rows(vectors, places, rows):
    """Adds rows (B, P, D) to the vectors (B, N, D) at places (B, P) of int32;
    rows at the same place add up. On TensorFlow and JAX."""
    indices, rows = pairs_of(places, rows)
    if backend.backend() == "jax":
        return vectors.at[indices[:, 0], indices[:, 1]].add(rows)
    import tensorflow as tf

    return tf.tensor_scatter_nd_add(vectors, indices, rows)


def vjp(function, arguments, upstream):
    """Gradients of a function's arguments, from the gradients of its results.

    Arguments, results and gradients are nested arrays. On TensorFlow and JAX.
    """
    if backend.backend() == "jax":
        import jax

        _, pull = jax.vjp(function, *arguments)
        return pull(upstream)
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(arguments)
        results = function(*arguments)
    return tape.gradient(
        results,
        arguments,
        output_gradients=upstream,
        unconnected_gradients="zero",
    )
