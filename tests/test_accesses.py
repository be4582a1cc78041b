"""Every access keeps its invariants and has finite, exact gradients, also at
singular points."""

import numpy as np
import pytest
from access_harness import BATCH
from access_harness import ENTRIES
from access_harness import TIME
from access_harness import WIDTH
from access_harness import close
from access_harness import few
from access_harness import numbers
from access_harness import set_interface_bias
from catalogue import name_of
from harness import needs_tensorflow
from keras import ops

import keras_memory


def each_point(check):
    """Parametrizes a test by entry, and by the entry's points for the check."""
    return pytest.mark.parametrize(
        ("entry", "point"),
        [
            pytest.param(
                entry,
                point,
                id=f"{entry.name}-{point}",
                marks=pytest.mark.slow if point.slow else (),
            )
            for entry in ENTRIES
            for point in getattr(entry, check)
        ],
    )


each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=name_of)


def assert_invariants(entry, inside, tolerance):
    """Returns the names of the invariants that were checked."""
    checked = set()
    for holds, names in entry.invariants.items():
        for name, value in inside.items():
            name = name.split("/")[-1]
            if name in names.split():
                holds(value, tolerance)
                checked.add(name)
    return checked


@pytest.mark.parametrize(
    ("entry", "point", "scale"),
    [
        pytest.param(
            *(entry, point, scale),
            id=f"{entry.name}-{point}-{scale}",
            marks=pytest.mark.slow if point.slow and scale < 1 else (),
        )
        for entry in ENTRIES
        for point in entry.weightings
        for scale in (0.5, 2.0)
    ],
)
def test_invariants_hold_at_every_step(entry, point, scale):
    layer = entry.randomised(scale=scale, **point.options)
    inside = keras_memory.trace(layer, 3 * numbers(shape=(BATCH, 13, WIDTH)))
    checked = assert_invariants(entry, inside, 1e-6)
    names = " ".join(entry.invariants.values()).split()
    assert checked == set(names) - set(point.without.split())
    for name, value in inside.items():
        if name.split("/")[-1] in entry.not_tiny.split():
            assert value.max() > 0.05


# Gradients against finite differences.


def names_without_gradient(entry, loss, variables, rng):
    """Asserts that gradients equal finite differences in random directions.
    Returns the names of the variables that the loss does not depend on."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(
        value, list(variables.values()), unconnected_gradients="zero"
    )
    without = set()
    for (name, variable), gradient in zip(variables.items(), gradients):
        gradient = ops.convert_to_numpy(gradient)
        if name in entry.no_gradient.split():
            assert (gradient == 0).all()
            continue
        start = ops.convert_to_numpy(variable).copy()
        direction = rng.normal(size=start.shape)
        values = []
        for step in (1e-5, -1e-5):
            variable.assign(start + step * direction)
            values.append(float(loss()))
        variable.assign(start)
        slope = (values[0] - values[1]) / 2e-5
        length = np.linalg.norm(gradient)
        if length == 0:
            without.add(name)
        error = abs(np.sum(gradient * direction) - slope)
        assert error <= 1e-6 * length, (name, error, length)
    return without


@each_point("gradients")
@needs_tensorflow
def test_gradients_equal_finite_differences(entry, point):
    import tensorflow as tf

    layer = entry.randomised(
        scale=0.6,
        return_state=True,
        dtype="float64",
        **dict.fromkeys(entry.learned.split(), "learned"),
        **point.options,
    )
    states = [tf.Variable(state) for state in entry.states(layer)]
    rng = np.random.default_rng(11)
    shape = (BATCH, entry.gradient_time, WIDTH)
    x = tf.Variable(numbers(shape=shape))
    mask = np.ones(shape[:2], bool)
    mask[1, shape[1] // 2 : -1] = False
    projection = rng.normal(size=(*shape[:2], layer.cell.output_size))

    @tf.function  # traced once for both calls: tracing takes longest
    def loss_from(states):
        output = layer(x, initial_state=states, mask=mask)[0]
        return tf.reduce_sum(projection * output)

    def loss_from_own_start():
        return loss_from(layer.cell.get_initial_state(batch_size=BATCH))

    def loss_from_states():
        return loss_from([state.value() for state in states])

    value = tf.reduce_sum(projection * layer(x, mask=mask)[0])
    close(loss_from_own_start(), value, 1e-11)
    weights = {weight.path: weight for weight in layer.trainable_weights}
    assert not names_without_gradient(
        entry, loss_from_own_start, {"x": x, **weights}, rng
    )
    fields = [n.removeprefix("initial_") for n in layer.cell.layout.names]
    by_name = dict(zip(fields, states, strict=True))
    assert names_without_gradient(
        entry, loss_from_states, {"x": x, **by_name}, rng
    ) == set(point.without.split())


# Singular points.


def assert_bounded(entry, layer, x, bound=1e2, bound_of_states=1e4):
    """Asserts that all values are finite and gradients bounded. The loss is the
    squares of the outputs plus the means of the final states; its gradients are
    with respect to inputs and weights, and to the initial states."""
    import tensorflow as tf

    x = tf.cast(x, layer.compute_dtype)
    layer.build(x.shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        start = layer.cell.get_initial_state(batch_size=x.shape[0])
        tape.watch(start)
        output, *final = layer(x, initial_state=start)
        loss = tf.reduce_sum(tf.cast(output, "float32") ** 2)
        for state in final:
            loss += tf.reduce_mean(tf.cast(state, "float32"))
    assert ops.dtype(output) == layer.compute_dtype
    inside = keras_memory.trace(layer, x)
    inside = {name: value.astype("float64") for name, value in inside.items()}
    for value in (output, *final, *inside.values()):
        assert np.isfinite(tf.cast(value, "float64").numpy()).all()
    weightings = {n: value for n, value in inside.items() if "weighting" in n}
    assert_invariants(entry, weightings, 2e-2)
    variables = [x, *layer.trainable_weights, *start]
    sizes = [
        0.0
        if gradient is None
        else np.abs(tf.cast(gradient, "float64").numpy()).max()
        for gradient in tape.gradient(loss, variables)
    ]
    assert 0 < np.max(sizes[: -len(start)]) < bound
    if bound_of_states is not None:
        assert np.max(sizes[-len(start) :]) < bound_of_states


@each_point("saturated")
@needs_tensorflow
def test_saturated_gates_have_bounded_gradients(entry, point):
    assert_bounded(entry, entry.at(point), few(), *point.bounds)


@each_point("singular")
@needs_tensorflow
def test_singular_points_have_bounded_gradients(entry, point):
    assert_bounded(entry, entry.at(point), few(), *point.bounds)


@each_point("zeros")
@needs_tensorflow
def test_zero_memory_keys_and_inputs_have_bounded_gradients(entry, point):
    layer = entry.at(point, kernel_initializer="zeros")
    x = 0 * few()
    assert_bounded(entry, layer, x, *point.bounds)
    set_interface_bias(layer, add_vector=0.5)
    kernel = layer.cell.output_projection[0]
    kernel.assign(np.ones(kernel.shape))
    assert_bounded(entry, layer, x, *point.bounds)


@each_entry
def test_one_slot_gives_no_warnings(entry, recwarn):
    points = [
        point
        for point in entry.singular
        if point.options.get("memory_slots") == 1 and point.dtype == "float32"
    ]
    assert points
    for point in points:
        entry.make(**point.options)(few().astype("float32"))
    assert not [warning for warning in recwarn if "axis" in str(warning)]


@pytest.mark.parametrize("shape", [(1, TIME, WIDTH), (2, 1, WIDTH), (1, 1, 1)])
@each_entry
@needs_tensorflow
def test_one_item_and_one_step_are_finite(entry, shape):
    layer = entry.make(return_state=True)
    assert_bounded(entry, layer, numbers(shape=shape))


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@pytest.mark.parametrize("controller", ["lstm", "dense"])
@each_entry
@needs_tensorflow
def test_huge_inputs_have_bounded_gradients(entry, controller, dtype):
    layer = entry.make(controller=controller, dtype=dtype, return_state=True)
    assert_bounded(entry, layer, 1e4 * few(), 1e6, 1e6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_entry
@needs_tensorflow
def test_a_huge_interface_has_finite_gradients(entry, dtype):
    layer = entry.randomised(controller="dense", dtype=dtype, return_state=True)
    kernel = layer.cell.interfaces[0][0]
    kernel.assign(1e4 * numbers(shape=kernel.shape))
    assert_bounded(entry, layer, few(), np.inf, np.inf)


@each_point("sixteen_bits")
@needs_tensorflow
def test_16_bits_are_finite_and_close_to_32_bits(entry, point):
    # A dense controller, as TensorFlow cannot draw the orthogonal recurrent
    # kernels of Keras in bfloat16.
    layer = entry.at(point, controller="dense")
    assert_bounded(entry, layer, few(), *point.bounds)
    # The outputs are close to those in 32 bits.
    wide = entry.like(layer, controller="dense", **point.options)
    difference = ops.cast(layer(few())[0], "float32") - wide(few())
    assert np.abs(ops.convert_to_numpy(difference)).max() < 0.03


# Errors.


@pytest.mark.parametrize(
    "name",
    [
        "key_activation",
        "add_activation",
        "strength_activation",
        "activation",
        "kernel_initializer",
        "bias_initializer",
    ],
)
@each_entry
def test_unknown_keras_names_are_refused(entry, name):
    with pytest.raises(ValueError, match="tahn"):
        entry.make(**{name: "tahn"})
