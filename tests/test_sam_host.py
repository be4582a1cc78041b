"""SAM with its memory on the host: numbers, transactions and refusals.

With few slots the search on the host is exact, so it equals the other engine.
"""

import types

import keras
import numpy as np
import pytest
from harness import BACKEND
from harness import close
from harness import needs_tensorflow
from keras import ops
from knn import clustered
from knn import need_scann
from knn import random

import keras_memory
from keras_memory import checks
from keras_memory.retrieval import tuning
from keras_memory.retrieval.scann_row import ScannRow

SIZES = {"memory_slots": 40, "slot_size": 5, "read_heads": 2, "top_k": 3}
BATCH, TIME, WIDTH = 2, 9, 4


def on_host(test):
    """Marks a test that needs ScaNN and TensorFlow."""
    test = pytest.mark.usefixtures("_with_scann")(test)
    return pytest.mark.scann(needs_tensorflow(test))


@pytest.fixture
def _with_scann():
    need_scann()


def layer_of(
    search_method="approximate",
    batch=BATCH,
    layer=keras_memory.SAMLayer,
    **kwargs,
):
    """A built stateful layer; all have the same weights."""
    keras.utils.set_random_seed(5)
    fixed = {"units": 3, "controller_units": 7, "return_sequences": True}
    layer = layer(
        **{**SIZES, **fixed, "stateful": True, **kwargs},
        search_method=search_method,
    )
    layer.build((batch, None, WIDTH))
    return layer


def pair(**kwargs):
    return layer_of("exact", **kwargs), layer_of(**kwargs)


def inputs(steps=TIME, batch=BATCH, seed=1):
    return random(batch, steps, WIDTH, seed=seed)


def contents(count=30, batch=BATCH):
    return random(batch, count, SIZES["slot_size"], seed=2)


def content(layer):
    """Everything that a call may change."""
    states = [ops.convert_to_numpy(state).copy() for state in layer.states]
    accesses = [memory.last_access.copy() for memory in layer._memories]
    return [*states, *layer.get_memory(), *accesses]


def assert_same(now, then):
    for one, other in zip(now, then, strict=True):
        np.testing.assert_array_equal(one, other)


def gradients(layer, x, mask=None, compiled=False):
    import tensorflow as tf

    def compute(x):
        with tf.GradientTape() as tape:
            y = layer(x, mask=mask, training=True)
            loss = ops.sum(y**2)
        return [y, *tape.gradient(loss, layer.trainable_variables)]

    compute = tf.function(compute) if compiled else compute
    return compute(ops.convert_to_tensor(x))


CASES = {
    "one memory": {"norm_epsilon": 0.5},
    "two blocks": {"num_layers": 2},
    "two memories": {"num_layers": 2, "share_memory": False},
    "one row": {"batch": 1},
    "one step": {"steps": 1},
    "one slot": {"memory_slots": 1, "top_k": 1},
    "fewer slots than steps": {"memory_slots": 4},
    "last output": {"return_sequences": False},
    "backwards": {"go_backwards": True},
    "learned states": {"initial_controller_state": "learned"},
    "links": {"layer": keras_memory.SDNCLayer, "memory_slots": 8},
}


@on_host
@pytest.mark.parametrize(
    ("case", "masked"),
    [
        pytest.param(
            case,
            masked,
            id=f"{name}, {'masked' if masked else 'filled'}",
            # Each case runs with a mask or without; both are slow.
            marks=[] if number % 2 == masked else pytest.mark.slow,
        )
        for number, (name, case) in enumerate(CASES.items())
        for masked in (False, True)
    ],
)
def test_all_numbers_equal_those_of_the_exact_search(case, masked):
    check_numbers(case, filled=not masked, masked=masked)


@on_host
def test_all_numbers_of_a_graph_equal_those_of_the_exact_search():
    check_numbers(CASES["two memories"], True, True, compiled=True)


def check_numbers(case, filled, masked, compiled=False):
    case = dict(case)
    steps, batch = case.pop("steps", TIME), case.get("batch", BATCH)
    exact, layer = pair(**case)
    count = min(30, layer.memory_slots)
    mask = None
    if masked:
        mask = np.random.default_rng(7).random((batch, steps)) < 0.6
    if filled:
        exact.set_memory(contents(count, batch))
        layer.set_memory(contents(count, batch))
    for seed in range(2):
        x = inputs(steps, batch, seed)
        expected = gradients(exact, x, mask, compiled)
        for one, other in zip(gradients(layer, x, mask, compiled), expected):
            close(one, other.numpy(), tolerance=1e-5)
        for one, other in zip(layer.get_memory(), exact.get_memory()):
            close(one, other, tolerance=1e-5)
        _compare_states(layer, exact)
    assert layer.time_loop == "fast"


def _compare_states(layer, exact):
    """States of both layers, on the host or not; all but the memories."""
    names = zip(exact.cell.state_names, exact.states)
    expected = {name: state.numpy() for name, state in names}
    memories = iter(layer._memories)
    for name, state in zip(layer.cell.state_names, layer.states):
        if name.endswith("last_access"):
            memory = next(memories)
            np.testing.assert_array_equal(memory.last_access, expected[name])
        elif name.endswith(("predecessors", "link_weights", "successors")):
            links = getattr(memory, name).reshape(expected[name].shape)
            close(links, expected[name], tolerance=1e-5)
        elif not name.endswith("memory"):
            close(state.numpy(), expected[name], tolerance=1e-5)


@on_host
@pytest.mark.parametrize(("eager", "together"), [(False, 2), (True, 1)])
def test_fit_and_predict_give_the_same_numbers(eager, together):
    x, y = inputs(batch=8), np.zeros((8, TIME, 3), "float32")
    results = []
    for layer in pair():
        model = keras.Sequential([keras.Input(batch_shape=(2, 9, 4)), layer])
        model.compile(
            "sgd", "mse", run_eagerly=eager, steps_per_execution=together
        )
        assert not (model.jit_compile and layer.search_method != "exact")
        model.fit(x, y, batch_size=2, shuffle=False, verbose=0)
        outputs = model.predict(x, batch_size=2, verbose=0)
        results.append([outputs, *model.get_weights(), *layer.get_memory()])
    for one, other in zip(*results, strict=True):
        close(one, other, tolerance=1e-5)


@on_host
def test_fewer_written_slots_than_requested_have_no_weight():
    layer = layer_of()
    layer(inputs(1))
    record = layer.cell.layout.unflatten(layer.states)[0]
    slots = ops.convert_to_numpy(record.read_slots)
    assert slots.tolist() == [[[0, -1, -1]] * 2] * BATCH
    weights = ops.convert_to_numpy(record.read_weights)
    assert weights.tolist() == [[[1, 0, 0]] * 2] * BATCH


# Transactions.


@on_host
def test_forward_passes_without_a_backward_pass_count():
    import tensorflow as tf

    exact, layer = pair()
    for one in (exact, layer):
        one(inputs(seed=1), training=True)
        with tf.GradientTape() as tape:
            first = one(inputs(seed=2), training=True)
            second = one(inputs(seed=3), training=True)
            loss = ops.sum(first**2) + ops.sum(second**2)
        one.found = tape.gradient(loss, one.trainable_variables)
    for one, other in zip(layer.found, exact.found):
        close(one.numpy(), other.numpy(), tolerance=1e-5)
    close(layer.get_memory()[0], exact.get_memory()[0], tolerance=1e-5)
    _compare_states(layer, exact)


class Failing(Exception):
    pass


@on_host
@pytest.mark.parametrize(
    ("blocks", "compiled", "method", "begun"),
    [
        (1, False, "search", 0),
        (2, False, "write", 1),
        (2, True, "search", 1),
        (1, True, "write", 0),
    ],
)
def test_a_call_that_fails_changes_nothing(
    blocks, compiled, method, begun, monkeypatch
):
    import tensorflow as tf

    layer = layer_of(num_layers=blocks, share_memory=False)
    twin = layer_of(num_layers=blocks, share_memory=False)
    call = tf.function(layer.__call__) if compiled else layer
    for seed in range(begun):
        twin(inputs(seed=seed))
        call(ops.convert_to_tensor(inputs(seed=seed)))
    before = content(layer)
    calls, original = [], getattr(ScannRow, method)

    def fail_later(self, *arguments):
        calls.append(0)
        if len(calls) > 5 * BATCH * blocks:
            raise Failing("injected")
        return original(self, *arguments)

    x = ops.convert_to_tensor(inputs(seed=7))
    for _ in range(2):  # the second call restores what the first one left
        with monkeypatch.context() as patch:
            patch.setattr(ScannRow, method, fail_later)
            with pytest.raises((Failing, tf.errors.OpError), match="injected"):
                call(x)
        calls.clear()
        # The failed call went far enough to write.
        assert any(memory._journal for memory in layer._memories)
    close(call(x).numpy(), twin(x).numpy(), tolerance=1e-6)
    assert_same(content(layer), content(twin))
    # The memory is right also if nobody calls the layer again.
    with monkeypatch.context() as patch:
        patch.setattr(ScannRow, method, fail_later)
        calls.extend([0] * 5 * BATCH * blocks)
        with pytest.raises((Failing, tf.errors.OpError), match="injected"):
            call(x)
    assert_same(layer.get_memory(), twin.get_memory())
    assert (content(layer)[0] == content(twin)[0]).all()
    assert begun == 0 or any(part.any() for part in before)


@on_host
def test_states_that_a_failed_call_assigned_are_restored():
    """As if it failed between two assignments."""
    layer, twin = layer_of(), layer_of()
    for one in (layer, twin):
        one(inputs(seed=1))
    states = [ops.convert_to_numpy(state) for state in layer.states]
    assert not layer._starts
    layer._transaction.begin(*states)
    for state in layer.states[:3]:
        state.assign(ops.ones_like(state))
    layer.get_memory()
    x = inputs(seed=2)
    close(layer(x).numpy(), twin(x).numpy(), tolerance=1e-6)
    assert_same(content(layer), content(twin))


@on_host
@pytest.mark.parametrize("eager", [False, True])
def test_a_call_counts_if_a_later_layer_fails(eager):
    import tensorflow as tf

    def fail(x):
        raise Failing("injected")

    class Last(keras.layers.Layer):
        def call(self, x):
            (x,) = [tf.numpy_function(fail, [x], "float32")]
            return tf.ensure_shape(x, (BATCH, TIME, 3))

    layer, twin = layer_of(), layer_of()
    twin(inputs())
    model = keras.Sequential([keras.Input(batch_shape=(2, 9, 4)), layer])
    model.add(Last())
    model.compile("sgd", "mse", run_eagerly=eager)
    for _ in range(3):
        layer.reset_state()
        with pytest.raises((Failing, tf.errors.OpError), match="injected"):
            model.predict(inputs(), verbose=0)
        assert_same(content(layer), content(twin))
    x = inputs(seed=2)
    close(layer(x).numpy(), twin(x).numpy(), tolerance=1e-6)


@on_host
def test_a_call_during_another_ends_that_one(monkeypatch):
    """As if two threads called the layer."""
    layer, twin = layer_of(), layer_of()
    for one in (layer, twin):
        one(inputs(seed=1))
    x, search, calls = inputs(3, seed=2), ScannRow.search, []

    def search_after_a_call(self, *arguments):
        calls.append(0)
        if len(calls) == 4:
            close(layer(x).numpy(), twin(x).numpy(), tolerance=1e-6)
        return search(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ScannRow, "search", search_after_a_call)
        with pytest.raises(RuntimeError, match="one call at a time"):
            layer(inputs(seed=3))
    assert_same(content(layer), content(twin))


@on_host
def test_states_without_their_memory_are_refused():
    layer = layer_of()
    layer(inputs())
    states = [ops.convert_to_numpy(state).copy() for state in layer.states]
    layer.reset_state()
    for variable, state in zip(layer.states, states):
        variable.assign(state)
    with pytest.raises(ValueError, match="states that write to slot"):
        layer(inputs())
    layer.reset_state()
    assert_same(content(layer), content(layer_of()))


@on_host
def test_two_calls_in_one_graph_keep_their_order():
    import tensorflow as tf

    exact, layer = pair()

    @tf.function
    def twice(first, second):
        return layer(first), layer(second)

    x = [inputs(seed=seed) for seed in range(2)]
    for _ in range(5):
        found = twice(*map(ops.convert_to_tensor, x))
        expected = [exact(part) for part in x]
        for one, other in zip(found, expected):
            close(one.numpy(), other.numpy(), tolerance=1e-5)


@on_host
def test_nan_is_refused_before_it_reaches_the_memory():
    import tensorflow as tf

    layer = layer_of()
    layer(inputs())
    before = content(layer)
    x = inputs()
    x[0, 5] = np.nan
    with pytest.raises((ValueError, tf.errors.OpError), match="finite"):
        layer(x)
    layer.get_memory()  # rolls back
    assert_same(content(layer), before)


# Filling and resetting.


@on_host
def test_a_reset_clears_what_a_failed_call_wrote(monkeypatch):
    layer, x = layer_of(), inputs(1)
    first = layer(x).numpy()

    def fail(*arguments):
        raise Failing("injected")

    with monkeypatch.context() as patch:
        patch.setattr(ScannRow, "write", fail)
        with pytest.raises(Failing, match="injected"):
            layer(x)
    assert layer._memories[0].memory[:, 1].any()
    layer.reset_state()
    assert_same(content(layer), content(layer_of()))
    # The next call does not restore the states before the failed one.
    close(layer(x).numpy(), first, tolerance=1e-6)


@on_host
def test_resets_clear_the_memory():
    exact, layer = pair()
    rows = np.array([False, True])
    first, x = layer(inputs()).numpy(), inputs(seed=4)
    exact(inputs())
    for one in (exact, layer):
        one.reset_memory(rows=rows)
    assert not layer.get_memory()[0][1].any()
    assert layer.get_memory()[0][0].any()
    close(layer(x).numpy(), exact(x).numpy(), tolerance=1e-5)
    for one in (exact, layer):
        one.reset_controller()
    close(layer(x).numpy(), exact(x).numpy(), tolerance=1e-5)
    for one in (exact, layer):
        one.reset_memory()
    assert not layer.get_memory()[0].any()
    close(layer(x).numpy(), exact(x).numpy(), tolerance=1e-5)
    layer.reset_state()
    close(layer(inputs()).numpy(), first, tolerance=1e-6)


@pytest.mark.every_backend
def test_an_exact_memory_is_filled():
    layer = layer_of("exact")
    other = layer_of("exact", stateful=False)
    layer(inputs())
    layer.set_memory(contents())
    np.testing.assert_array_equal(layer.get_memory()[0][:, :30], contents())
    states = other.cell.state_with(contents())
    x = inputs(seed=3)
    outputs = ops.convert_to_numpy(other(x, initial_state=states))
    close(ops.convert_to_numpy(layer(x)), outputs, tolerance=1e-5)


def test_wrong_contents_are_refused():
    layer = layer_of("exact")
    for shape in [(2, 41, 5), (2, 3, 4), (3, 3, 5), (3, 5), (2, 0, 5)]:
        with pytest.raises(ValueError, match="`contents` must"):
            layer.set_memory(np.zeros(shape, "float32"))


@pytest.mark.parametrize("stateful", [False, True])
def test_a_layer_without_states_has_no_memory(stateful):
    layer = keras_memory.SAMLayer(3, **SIZES, stateful=stateful)
    with pytest.raises(ValueError, match="must be stateful and built"):
        layer.set_memory(contents())
    with pytest.raises(ValueError, match="must be stateful and built"):
        layer.get_memory()


@on_host
def test_contents_that_are_not_finite_are_refused():
    layer, given = layer_of(), contents()
    layer.set_memory(given)
    given[0, 3] = np.inf
    with pytest.raises(ValueError, match="must be finite"):
        layer.set_memory(given)
    assert layer.get_memory()[0].any()


@on_host
def test_a_tree_searches_a_large_memory():
    """The reads of both engines are mostly equal, and the memory stays full."""
    slots = 20_000
    assert slots > tuning.FLAT
    kwargs = {"memory_slots": slots, "slot_size": 8}
    exact, layer = pair(**kwargs)
    given = clustered(BATCH, slots, 8)
    exact.set_memory(given)
    layer.set_memory(given)
    assert all(index.leaves for index in layer._memories[0]._indices)
    x = inputs(1)
    for one in (exact, layer):
        one(x)
    _, expected = _reads(exact)
    _, found = _reads(layer)
    hits = [
        len({*row} & {*right})
        for row, right in zip(found.reshape(-1, 3), expected.reshape(-1, 3))
    ]
    assert sum(hits) / expected.size >= 0.5  # of few queries
    for seed in range(3):
        layer(inputs(seed=seed))
    assert (layer._memories[0].last_access >= 0).all()


def _reads(layer):
    record = layer.cell.layout.unflatten(layer.states)[0]
    return map(ops.convert_to_numpy, (record.reads, record.read_slots))


# Refusals, and what works.

WRONG = {
    "stateless": ({"stateful": False}, "needs stateful=True"),
    "return_state": ({"return_state": True}, "needs return_state=False"),
    "recompute": ({"recompute": 2}, "needs recompute=None"),
    "unroll": ({"unroll": True}, "needs unroll=False"),
    "loop": ({"loop": "portable"}, 'needs loop="auto"'),
    "float64": ({"dtype": "float64"}, 'needs dtype="float32"'),
    "16 bits": ({"dtype": "mixed_bfloat16"}, 'needs dtype="float32"'),
}


@on_host
@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        layer_of(**wrong)


@on_host
def test_uses_without_the_memory_are_refused(tmp_path):
    import tensorflow as tf

    layer, x = layer_of(), inputs()
    layer(x)
    before = content(layer)
    states = [*layer.states]
    model = keras.Sequential([keras.Input(batch_shape=(2, 9, 4)), layer])
    refused = {
        "`initial_state` must be None": lambda: layer(x, initial_state=states),
        "A trace cannot reach": lambda: keras_memory.trace(layer, x),
        "A trace .*reach": lambda: keras_memory.trace_model(model, x),
        "An export cannot reach": lambda: (
            keras_memory.export.export_for_serving(model, tmp_path / "sam")
        ),
        "A call of a cell cannot": lambda: layer.cell(x[:, 0], states),
        "use `layer.set_memory": lambda: layer.cell.state_with(contents()),
        "`states` must be None": lambda: layer.reset_memory(states),
        r"`MemoryRNN\(cell\)` cannot": lambda: keras_memory.MemoryRNN(
            layer.cell
        ),
        "XLA cannot": lambda: tf.function(layer, jit_compile=True)(x),
        "A SavedModel cannot reach": lambda: model.export(
            tmp_path / "sam", verbose=False
        ),
    }
    for words, call in refused.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert_same(content(layer), before)


@on_host
def test_calls_that_would_write_twice_are_refused(monkeypatch):
    import tensorflow as tf

    with keras.RematScope(mode="full"):
        layer = layer_of()
        with pytest.raises(ValueError, match="RematScope"):
            layer(inputs())
    layer = layer_of()
    strategy = types.SimpleNamespace(num_replicas_in_sync=2)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    with pytest.raises(ValueError, match="Received: 2 replicas"):
        layer(inputs())
    assert not layer.get_memory()[0].any()


@on_host
def test_a_fork_resets_no_states(monkeypatch):
    layer = layer_of()
    monkeypatch.setattr(checks, "_forked_from", 1)
    for call in (layer.reset_state, layer.reset_memory):
        with pytest.raises(RuntimeError, match="in a fork"):
            call()


@on_host
def test_keras_turns_xla_off():
    model = keras.Sequential([keras.Input(batch_shape=(2, 9, 4)), layer_of()])
    model.compile("sgd", "mse")
    assert model.jit_compile is False
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
        model.predict(inputs(), verbose=0)


@on_host
def test_copies_have_memories_of_their_own(tmp_path):
    layer, x = layer_of(), inputs()
    model = keras.Sequential([keras.Input(batch_shape=(2, 9, 4)), layer])
    first = model(x).numpy()
    model.save(tmp_path / "sam.keras")
    loaded = keras.saving.load_model(tmp_path / "sam.keras")
    cloned = keras.models.clone_model(model)
    cloned.set_weights(model.get_weights())
    for copy in (loaded, cloned):
        assert copy.layers[0].search_method == "approximate"
        assert not copy.layers[0].get_memory()[0].any()
        close(copy(x).numpy(), first, tolerance=1e-6)


@pytest.mark.slow
@on_host
def test_bidirectional_works():
    results = []
    for layer in pair():
        both = keras.layers.Bidirectional(layer)
        model = keras.Sequential([keras.Input(batch_shape=(2, 9, 4)), both])
        keras.utils.set_random_seed(3)
        model.set_weights([random(*w.shape) for w in model.get_weights()])
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(inputs(), np.zeros((2, 9, 6)), verbose=0)
        results.append(model.predict(inputs(), verbose=0))
    close(*results, tolerance=1e-5)


def test_without_scann_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(tuning, "import_error", lambda: "ImportError: none")
    with pytest.raises(ImportError, match='use search_method="exact"'):
        layer_of()


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has it")
@pytest.mark.every_backend
def test_other_backends_refuse_the_host(monkeypatch):
    monkeypatch.setattr(tuning, "import_error", lambda: None)
    with pytest.raises(ValueError, match="backend must be TensorFlow"):
        layer_of()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"search_method": "approx"}, "`search_method` must be"),
        ({"target_recall": 1.0}, "`target_recall` must be"),
    ],
)
def test_wrong_arguments_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        keras_memory.SAMLayer(3, **SIZES, **wrong)


# What `engine` says.


def engine(layer, compiled=None, **kwargs):
    if compiled is None:
        layer(inputs(), **kwargs)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        tf.function(lambda x: layer(x, **kwargs), jit_compile=compiled)(
            inputs()
        )
    return layer.engine.partition(":")[0]


@pytest.mark.every_backend
def test_the_engine_of_a_memory_that_starts_empty():
    layer = layer_of("exact", stateful=False)
    assert layer.engine.startswith("empty: ")
    assert engine(layer) == "empty"
    states = layer.cell.state_with(contents())
    assert engine(layer, initial_state=states) == "copied"
    assert engine(layer) == "empty"


@needs_tensorflow
def test_the_engine_depends_on_xla():
    layer = layer_of("exact")
    assert engine(layer, compiled=True) == "in place"
    assert engine(layer, compiled=False) == "copied"
    assert "jit_compile=True" in layer.engine
    layer = layer_of("exact", stateful=False)
    states = layer.cell.state_with(contents())
    assert engine(layer, compiled=True, initial_state=states) == "copied"
    assert "`initial_state` was given" in layer.engine
    for stateful in (False, True):
        layer = layer_of("exact", stateful=stateful, return_state=True)
        assert engine(layer, compiled=True) == "copied"
        assert "`return_state=True`" in layer.engine


@pytest.mark.skipif(BACKEND != "jax", reason="the engine of JAX")
@pytest.mark.every_backend
def test_the_engine_of_jax():
    assert engine(layer_of("exact")) == "in place"


@on_host
def test_the_engine_on_the_host():
    layer = layer_of()
    assert layer.engine.startswith("host: ")
    assert engine(layer) == "host"
