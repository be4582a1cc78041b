"""Both time loops give the same numbers."""

import dataclasses

import harness
import keras
import numpy as np
import pytest
import toy
from catalogue import CASES
from catalogue import COVERED
from catalogue import PLAIN
from catalogue import few_backends_unless
from catalogue import name_of
from catalogue import slow_unless
from keras import ops

import keras_memory
from keras_memory.addressing import usage
from keras_memory.addressing.gradients import activate
from keras_memory.addressing.gradients import custom_gradient
from keras_memory.addressing.gradients import linear
from keras_memory.recurrent import fast_loop

HOLES = np.array([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]], bool)
WAYS = {
    "holes": {"mask": HOLES},
    "whole": {},
    "backwards": {"go_backwards": True},
    "last": {"return_sequences": False},
    "last of holes": {"return_sequences": False, "mask": HOLES},
    "without memory": {"use_memory": False},
}

pytestmark = [
    pytest.mark.every_backend,
    pytest.mark.skipif(
        harness.BACKEND not in ("tensorflow", "jax"),
        reason="not applicable: the fast loop is for TensorFlow and JAX",
    ),
]


def make(case, **more):
    """A layer whose dropout draws the same masks each time."""
    keras.utils.set_random_seed(1)
    layer = harness.built(case, **more)
    for variable in layer.variables:
        if variable.dtype.startswith("uint") or "seed" in variable.path:
            variable.assign(np.ones(variable.shape, variable.dtype))
    return layer


def small(**kwargs):
    return keras_memory.NTMLayer(
        3, memory_slots=7, slot_size=5, controller_units=3, **kwargs
    )


def differentiate(
    case, loop, jit_compile=False, dtype="float32", eagerly=False, **way
):
    """Results of a layer, and the gradients of inputs, states and weights.

    `eagerly`, on TensorFlow: without a graph, since tracing takes longest.
    """
    call = {k: way.pop(k) for k in ("mask", "use_memory") if k in way}
    layer = make(case, loop=loop, return_state=True, dtype=dtype, **way)
    rng = np.random.default_rng(4)
    batch = case.input_shape[0]
    dtype = dtype if dtype.startswith("float") else "float32"
    states = [
        rng.uniform(0, 0.3, size=(batch, size)).astype(dtype)
        for size in layer.cell.state_size
    ]
    x = harness.inputs_of(case).astype(dtype)

    def loss_of(results):
        return sum(
            ops.sum(ops.sin((i + 1.0) * result))
            for i, result in enumerate(results)
            if ops.dtype(result) == ops.dtype(results[0])
        )

    if harness.BACKEND == "jax":
        import jax

        fixed = [v.value for v in layer.non_trainable_variables]

        def loss(weights, x, states):
            results, _ = layer.stateless_call(
                weights, fixed, x, training=True, initial_state=states, **call
            )
            return loss_of(results), results

        loss = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        weights = [v.value for v in layer.trainable_variables]
        (_, results), gradients = jax.jit(loss)(weights, x, states)
        return layer, results, keras.tree.flatten(gradients)
    import tensorflow as tf

    x, *states = map(tf.constant, [x, *states])
    weights = layer.trainable_variables
    sources = [w.value for w in weights] + [x, *states]

    def step():
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            results = layer(x, training=True, initial_state=states, **call)
            loss = loss_of(results)
        return results, tape.gradient(
            loss, sources, unconnected_gradients="zero"
        )

    if not eagerly:
        step = tf.function(step, jit_compile=jit_compile)
    return layer, *step()


def differentiate_portably(case, **arguments):
    """The expected values: computed by Keras's loop, step by step."""
    _, *found = differentiate(case, "portable", eagerly=True, **arguments)
    return found


def same(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        one, other = map(ops.convert_to_numpy, (one, other))
        assert one.dtype == other.dtype
        size = np.abs(other).max() or 1.0
        harness.close(one / size, other / size, tolerance)


def loops_agree(case, way, jit_compile, dtype):
    arguments = {"jit_compile": jit_compile, "dtype": dtype, **WAYS[way]}
    fast, results, gradients = differentiate(case, "auto", **arguments)
    if jit_compile or (case in PLAIN and way == "holes"):
        _, portable, expected = differentiate(case, "portable", **arguments)
    else:
        portable, expected = differentiate_portably(case, **arguments)
    assert fast.time_loop == "fast"
    if {weight.dtype for weight in fast.weights} == {"float64"}:
        of_results, of_gradients = 1e-12, 1e-10
    else:  # a given cell has its own dtype
        of_results, of_gradients = 1e-6, 2e-5
    same(results, portable, of_results)
    same(gradients, expected, of_gradients)
    assert max(np.abs(ops.convert_to_numpy(g)).max() for g in gradients) > 0


def each_way(way, case):
    quick = case is CASES[0] or (way == "holes" and case.name not in COVERED)
    marks = () if quick else (pytest.mark.slow,)
    return few_backends_unless(case in PLAIN, way, case, marks=marks)


@pytest.mark.parametrize(
    ("way", "case"),
    [each_way(way, case) for way in WAYS for case in CASES],
    ids=name_of,
)
def test_both_loops_give_the_same_numbers(way, case):
    wide = harness.BACKEND == "tensorflow"
    loops_agree(case, way, False, "float64" if wide else "float32")


@pytest.mark.parametrize(
    "case", [slow_unless(case in PLAIN, case) for case in CASES], ids=name_of
)
@harness.needs_tensorflow
def test_both_loops_give_the_same_numbers_under_xla(case):
    loops_agree(case, "holes", True, "float32")


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return ops.tanh(x)


@pytest.mark.few_backends
def test_both_loops_agree_with_unknown_activations():
    dtype = "float64" if harness.BACKEND == "tensorflow" else "float32"
    for case in PLAIN:
        kwargs = {
            **case.kwargs,
            "key_activation": Unhashable,
            "add_activation": "softsign",
            "strength_activation": "exponential",
            "product_epsilon": 0.1,
            "controller": lambda: keras.layers.LSTMCell(
                7, "softsign", dtype=dtype
            ),
        }
        case = dataclasses.replace(case, kwargs=kwargs)
        loops_agree(case, "whole", False, dtype)


@pytest.mark.few_backends
@pytest.mark.parametrize("steps", [1, 2])
@harness.needs_tensorflow
def test_both_loops_agree_at_the_smallest_sizes(steps):
    small = {"memory_slots": 1, "slot_size": 1, "read_heads": 1}
    for case in PLAIN:
        sizes = {**case.kwargs, **small, "controller_units": 1}
        sizes |= {"shift_range": 0} if "ntm" in case.name else {}
        case = dataclasses.replace(
            case, kwargs=sizes, input_shape=(1, steps, 1)
        )
        loops_agree(case, "whole", False, "float64")


# Recomputation.


@pytest.mark.few_backends
@pytest.mark.parametrize(
    ("way", "recompute"), [("holes", 3), ("backwards", 1), ("last", "sqrt")]
)
def test_recomputed_steps_give_the_same_numbers(way, recompute):
    wide = harness.BACKEND == "tensorflow"
    arguments = {"dtype": "float64" if wide else "float32", **WAYS[way]}
    portable, expected = differentiate_portably(CASES[0], **arguments)
    layer, results, gradients = differentiate(
        CASES[0], "auto", recompute=recompute, **arguments
    )
    assert layer.time_loop == "fast"
    same(results, portable, 1e-12 if wide else 1e-6)
    same(gradients, expected, 1e-10 if wide else 2e-5)


def plain(**kwargs):
    """The smallest memory, whose loop XLA compiles fastest."""
    cell = keras_memory.MemoryCell(
        3, accesses=[toy.ToyAccess()], controller="dense", controller_units=7
    )
    return keras_memory.MemoryRNN(cell, **kwargs)


@pytest.mark.parametrize("make", [plain, slow_unless(False, small)])
@harness.needs_tensorflow
def test_any_number_of_steps_is_recomputed_under_xla(make):
    import tensorflow as tf

    keras.config.set_dtype_policy("float64")
    layer, of_three, of_root = [
        make(
            recompute=recompute,
            return_sequences=True,
            return_state=True,
        )
        for recompute in (None, 3, "sqrt")
    ]
    x = np.random.default_rng(2).normal(size=(2, 10, 5))
    for one in (layer, of_three, of_root):
        one.build(x.shape)
        one.set_weights(layer.get_weights())

    def slopes(layer, x):
        weights = layer.trainable_variables
        with tf.GradientTape() as tape:
            results = layer(x, training=True)
            loss = sum(tf.reduce_sum(tf.sin(result)) for result in results)
        slopes = tape.gradient(loss, [weight.value for weight in weights])
        return [*results, *slopes]

    def free(layer, jit_compile=False):
        return tf.function(
            lambda x: slopes(layer, x),
            input_signature=[tf.TensorSpec((None, None, 5), "float64")],
            jit_compile=jit_compile,
        )

    expected = free(layer)
    compiled = tf.function(slopes, jit_compile=True)
    x = tf.constant(x)
    same(compiled(of_root, x), expected(x), 1e-10)
    for again in (free(of_root), free(of_three, jit_compile=True)):
        for steps in (1, 3, 10):
            some = x[:, :steps]
            same(again(some), expected(some), 1e-10)


@harness.needs_tensorflow
def test_gradients_of_many_segments_add_up_in_32_bits():
    slopes = []
    for recompute in (None, 1):
        case = dataclasses.replace(CASES[0], input_shape=(2, 200, 5))
        _, _, gradients = differentiate(
            case, "auto", dtype="mixed_bfloat16", recompute=recompute
        )
        slopes.append([ops.cast(g, "float32") for g in gradients])
    same(slopes[1], slopes[0], 0.03)


def test_recomputing_saves_fewer_states():
    """Saves every third of 9 states, as the saved arrays show."""
    x = np.ones((2, 9, 5), "float32")
    saved = {}
    real = fast_loop.scan

    def counting(step, carried, slices, specs, reverse=False):
        after, results = real(step, carried, slices, specs, reverse)
        if not reverse:
            saved[recompute] = saved.get(recompute, []) + [
                array.shape[0] for array in keras.tree.flatten(results)
            ]
        return after, results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_loop, "scan", counting)
        for recompute in (None, 3):
            small(recompute=recompute)(x, training=True)
    assert set(saved[None]) == {9}
    assert set(saved[3]) == {2, 3}  # three steps, and two segments of three


@harness.needs_tensorflow
def test_each_window_of_a_stream_has_its_own_gradients():
    import tensorflow as tf

    x = np.random.default_rng(3).normal(size=(2, 8, 5)).astype("float32")
    stream = small(stateful=True, recompute="sqrt", return_sequences=True)
    whole = small(return_state=True, return_sequences=True)
    for layer in (stream, whole):
        layer.build((2, 4, 5))
    whole.set_weights([weight.numpy() for weight in stream.trainable_weights])

    def slopes(layer, weights, *inputs):
        with tf.GradientTape() as tape:
            results = layer(*inputs, training=True)
            outputs, *states = keras.tree.flatten(results)
            loss = tf.reduce_sum(outputs**2)
        sources = [weight.value for weight in weights]
        return states, tape.gradient(
            loss, sources, unconnected_gradients="zero"
        )

    states, expected = slopes(whole, whole.trainable_weights, x[:, :4])
    _, first = slopes(stream, stream.trainable_weights, x[:, :4])
    same(first, expected, 1e-5)
    _, expected = slopes(whole, whole.trainable_weights, x[:, 4:], states)
    _, second = slopes(stream, stream.trainable_weights, x[:, 4:])
    same(second, expected, 1e-5)


def test_unknown_values_of_recompute_are_refused():
    for recompute in (0, 2.5, "all", True):
        with pytest.raises(ValueError, match="`recompute` must be"):
            small(recompute=recompute)
    with pytest.raises(ValueError, match="`recompute` needs the fast"):
        small(recompute=3, loop="portable")


def test_allocation_by_sorting_has_the_same_gradient(monkeypatch):
    case = next(case for case in PLAIN if case.name == "dnc-default")
    _, expected = differentiate_portably(case)
    monkeypatch.setattr(usage, "MOST_COMPARED_SLOTS", 1)
    _, _, gradients = differentiate(case, "auto")
    same(gradients, expected, 2e-5)
    _, portable = differentiate_portably(case)
    same(gradients, portable, 2e-5)


# The choice of the loop.


def in_training(layer, **call):
    layer(np.ones((2, 3, 5), "float32"), training=True, **call)
    return layer.time_loop


def test_the_fast_loop_is_for_training():
    layer = small()
    assert layer.time_loop is None
    assert in_training(layer) == "fast"
    layer(np.ones((2, 3, 5), "float32"))
    assert layer.time_loop == "fast"  # it reports training
    layer = small()
    layer(np.ones((2, 3, 5), "float32"))
    assert layer.time_loop.startswith("portable: not called")
    layer = small(loop="fast")
    layer(np.ones((2, 3, 5), "float32"))
    assert layer.time_loop == "fast"


def test_the_portable_loop_runs_on_request():
    assert in_training(small(loop="portable")) == 'portable: loop="portable"'
    assert in_training(small(unroll=True)) == "portable: unroll=True"


def draws():
    return keras.Sequential([keras.layers.Dense(3), keras.layers.Dropout(0.3)])


def test_a_step_that_changes_variables_runs_in_the_portable_loop():
    harness.skip_on("jax", because="refused there: see `test_recurrent.py`")
    way = in_training(small(controller=draws()))
    assert way.startswith("portable: each step changes")
    assert "seed" in way
    with pytest.raises(ValueError, match='loop="fast".*each step changes'):
        in_training(small(controller=draws(), loop="fast"))


def test_unknown_loops_are_refused():
    with pytest.raises(ValueError, match=r"`loop` must be one of .*'quick'"):
        small(loop="quick")


def test_the_config_has_loop_and_recompute():
    assert small(loop="portable").get_config()["loop"] == "portable"
    assert small().get_config()["loop"] == "auto"
    assert small(recompute="sqrt").get_config()["recompute"] == "sqrt"


@keras.saving.register_keras_serializable(package="tests")
class Scaled(toy.ToyCell):
    """A custom cell whose step has its own weight."""

    def build(self, input_shape):
        super().build(input_shape)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def step(self, inputs, records, training=False, use_memory=True):
        scaled = ops.cast(inputs, self.compute_dtype) * self.scale
        return super().step(scaled, records, training, use_memory)


def test_weights_of_a_custom_step_get_gradients():
    case = dataclasses.replace(
        CASES[0],
        layer=keras_memory.MemoryRNN,
        kwargs={"cell": lambda: Scaled(3, controller_units=7)},
    )
    layer, _, gradients = differentiate(case, "auto")
    assert layer.time_loop == "fast"
    _, expected = differentiate_portably(case)
    same(gradients, expected, 2e-5)
    paths = [variable.path for variable in layer.trainable_variables]
    (scale,) = [i for i, path in enumerate(paths) if path.endswith("/scale")]
    assert abs(float(gradients[scale])) > 1e-3


def nested():
    """A memory whose controller is a memory, with every kind of dropout."""
    return keras_memory.DNCCell(
        7,
        memory_slots=5,
        slot_size=3,
        controller_units=5,
        controller_dropout=0.3,
        bypass_dropout=0.3,
    )


def test_nested_dropout_is_the_same_in_the_forward_and_backward_pass():
    kwargs = {**CASES[0].kwargs, "controller": nested}
    case = dataclasses.replace(CASES[0], kwargs=kwargs)
    layer, _, gradients = differentiate(case, "auto")
    assert layer.time_loop == "fast"
    _, expected = differentiate_portably(case)
    same(gradients, expected, 2e-5)


def test_steps_that_add_losses_run_in_the_portable_loop():
    regular = keras.layers.Dense(3, activity_regularizer="l2")
    way = in_training(small(controller=regular))
    assert way == "portable: each step adds a loss"
    regular = keras.layers.LSTMCell(3, activity_regularizer="l2")
    way = in_training(small(controller=regular))
    assert way == "portable: each step adds a loss"


def wide():
    return keras_memory.controllers.DenseCell(13, dtype="float32")


@pytest.mark.few_backends
@pytest.mark.parametrize("controller", ["gru", wide], ids=["gru", "wide"])
@harness.needs_tensorflow
def test_both_loops_agree_in_16_bits(controller):
    kwargs = {**CASES[0].kwargs, "controller": controller}
    case = dataclasses.replace(CASES[0], kwargs=kwargs)
    arguments = {"dtype": "mixed_bfloat16"}
    layer, results, gradients = differentiate(case, "auto", **arguments)
    assert layer.time_loop == "fast"
    portable, expected = differentiate_portably(case, **arguments)

    def as_float(arrays):
        return [ops.cast(array, "float32") for array in arrays]

    same(as_float(results), as_float(portable), 0.02)
    same(as_float(gradients), as_float(expected), 0.05)


# Derivatives.


@harness.needs_tensorflow
def test_second_derivatives_are_refused_or_right():
    import tensorflow as tf

    def second(loop):
        layer = make(CASES[0], loop=loop)
        x = tf.constant(harness.inputs_of(CASES[0]))
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 2)
            slope = inner.gradient(loss, x)
            loss = tf.reduce_sum(slope**2)
        return outer.gradient(loss, x)

    assert np.abs(second("portable")).max() > 0
    with pytest.raises(NotImplementedError, match='loop="portable"'):
        second("auto")


@harness.needs_tensorflow
def test_products_have_derivatives_of_any_order():
    """Checks products with a custom gradient by finite differences of it."""
    import tensorflow as tf

    from keras_memory import addressing
    from keras_memory.addressing import slots

    rng = np.random.default_rng(5)

    def array(*shape):
        return tf.constant(rng.uniform(0.1, 0.9, size=shape))

    memory, vectors, weighting = array(2, 3, 5), array(2, 2, 3), array(2, 2, 5)
    places = tf.constant([[4.0, 0.0, 4.0], [1.0, 2.0, 3.0]], "float64")
    functions = {
        lambda x: slots.gather(x, places): (array(2, 5, 3),),
        lambda x: slots.scatter_add(x, places, size=5): (array(2, 3, 2),),
        slots.read: (memory, weighting),
        slots.inner_products: (vectors, memory),
        slots.outer_write: (vectors, weighting),
        addressing.shift: (weighting, array(2, 2, 3)),
        addressing.linkage_after_write: (
            array(2, 2, 5, 5),
            array(2, 2, 5),
            weighting,
        ),
    }
    for function, arguments in functions.items():

        def slope(*arguments, function=function):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                loss = tf.reduce_sum(tf.sin(function(*arguments)))
            return tape.gradient(loss, arguments)

        directions = [array(*a.shape) for a in arguments]
        projections = [array(*a.shape) for a in arguments]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            along = sum(
                tf.reduce_sum(s * p)
                for s, p in zip(slope(*arguments), projections)
            )
        second = tape.gradient(along, arguments)
        found = sum(tf.reduce_sum(s * d) for s, d in zip(second, directions))
        step = 1e-6
        moved = [
            slope(*(a + sign * step * d for a, d in zip(arguments, directions)))
            for sign in (1, -1)
        ]
        expected = sum(
            tf.reduce_sum((up - down) * p)
            for up, down, p in zip(*moved, projections)
        ) / (2 * step)
        harness.close(found, expected, 1e-7)


@pytest.mark.skipif(harness.BACKEND != "jax", reason="JAX has forward mode")
def test_forward_mode_works_outside_of_training():
    import jax

    layer = small()
    x = np.random.default_rng(6).normal(size=(2, 3, 5)).astype("float32")
    layer.build(x.shape)
    along = np.ones_like(x)
    _, forward = jax.jvp(layer, (x,), (along,))
    outputs, pull = jax.vjp(layer, x)
    (back,) = pull(np.ones(outputs.shape, "float32"))
    harness.close(ops.sum(forward), ops.sum(back * along), 1e-5)


# Results that a step saves.


def test_linear_and_kept_only_compute_outside_of_the_loop():
    x = np.ones((2, 3), "float32")
    kernel = np.full((3, 5), 2.0, "float32")
    result = linear([x, x], [kernel, kernel], np.ones(5, "float32"))
    harness.close(result, np.full((2, 5), 13.0, "float32"))
    saving = custom_gradient(None, saves=True)(lambda x: [ops.exp(x), x])
    harness.close(saving(x), np.exp(x))
    harness.close(saving(x=x), np.exp(x))
    harness.close(activate(ops.exp, x), np.exp(x))


@harness.needs_tensorflow
@pytest.mark.parametrize("loop", ["fast", "portable"])
def test_training_calls_leave_no_graphs_behind(loop):
    """A graph that defines a custom gradient would never be freed."""
    import gc

    import tensorflow as tf
    from tensorflow.python.framework.func_graph import FuncGraph

    layer = keras_memory.DNCLayer(
        2, 5, 3, controller_units=3, sparse_links=2, loop=loop
    )
    x = np.ones((2, 3, 4), "float32")

    def call():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True))
        tape.gradient(loss, layer.trainable_weights)
        keras_memory.trace(layer, x)

    def graphs():
        gc.collect()
        return sum(type(one) is FuncGraph for one in gc.get_objects())

    call()
    before = graphs()
    call()
    call()
    assert graphs() == before


@harness.needs_tensorflow
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: keras_memory.NTMLayer(2, 5, 3, controller_units=3, **k),
        slow_unless(
            False,
            lambda **k: keras_memory.DNCLayer(2, 5, 3, controller_units=3, **k),
        ),
    ],
)
@pytest.mark.parametrize("return_sequences", [False, slow_unless(False, True)])
def test_batch_jacobians_are_vectorized(make, return_sequences):
    import tensorflow as tf

    layer = make(return_sequences=return_sequences)
    x = keras.random.normal((2, 3, 4))
    layer(x)

    @tf.function
    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.batch_jacobian(y, x)

    found = jacobian(x).numpy()
    with tf.GradientTape() as tape:
        tape.watch(x)
        first = layer(x)[:, ..., 0]
        first = first[:, -1] if return_sequences else first
    expected = tape.gradient(first, x)
    found = found[:, -1] if return_sequences else found
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
