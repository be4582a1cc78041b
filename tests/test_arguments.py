"""Checks of constructor arguments, and of sizes that exceed the machine."""

import dataclasses
import functools
import inspect
import json
import pickle

import keras
import numpy as np
import pytest
import toy
from catalogue import CASES
from catalogue import OTHERS
from catalogue import WRAPS
from catalogue import name_of

import keras_memory
from keras_memory import checks
from keras_memory.checks import LONGEST_AXIS
from keras_memory.checks import MOST_LAYERS
from keras_memory.checks import MOST_SEED
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import is_number
from keras_memory.checks import plain
from keras_memory.recurrent import cells
from keras_memory.recurrent import controllers
from keras_memory.retrieval.ring import RingMemory
from keras_memory.training import config
from keras_memory.training import presets
from keras_memory.training import runs
from keras_memory.training import tasks

CELLS = [
    cells.DenseCell,
    cells.LayerNormLSTMCell,
    cells.LayerNormSimpleRNNCell,
    cells.NASCell,
    cells.PeepholeLSTMCell,
]
OF_NUMPY = {bool: np.bool_, int: np.int64, float: np.float32, str: np.str_}


def mapped(value, function):
    """Maps numbers and texts within lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)(mapped(item, function) for item in value)
    if type(value) is dict:
        return {key: mapped(item, function) for key, item in value.items()}
    return function(value) if type(value) in OF_NUMPY else value


def of_numpy(value):
    return OF_NUMPY[type(value)](value)


def without_axes(value):
    return np.array(of_numpy(value))


def as_in_float32(value):
    return float(np.float32(value)) if type(value) is float else value


def numbers_of(cls):
    """Arguments with a numeric default, and their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if type(parameter.default) in (bool, int, float)
    }


def made(cls, kwargs, function):
    keras.utils.clear_session(free_memory=False)  # the same names
    kwargs = {
        key: value() if callable(value) else mapped(value, function)
        for key, value in {**numbers_of(cls), **kwargs}.items()
    }
    return cls(name="made", trainable=function(True), **kwargs)


def check_plain(cls, kwargs):
    expected = made(cls, kwargs, as_in_float32).get_config()
    for function in (of_numpy, without_axes):
        layer = made(cls, kwargs, function)
        assert json.dumps(layer.get_config()) == json.dumps(expected)
    keras.utils.clear_session(free_memory=False)
    again = cls.from_config(json.loads(json.dumps(expected)))
    assert json.dumps(again.get_config()) == json.dumps(expected)


@pytest.mark.parametrize("case", [*CASES, *WRAPS, *OTHERS], ids=name_of)
def test_configs_hold_plain_numbers_whatever_was_given(case):
    kwargs = dict(case.kwargs)
    if case in WRAPS:
        kwargs.setdefault("units", case.output_size)
    if issubclass(case.layer, keras_memory.MemoryRNN):
        kwargs.update(seed=7, recompute=2)
    if case.layer is keras_memory.MemoryWrapClassifier:
        kwargs.update(seed=7, fixed_memory_size=7)
    if case.name == "memory-rnn":
        del kwargs["seed"]
    if kwargs.get("loop") == "portable":
        del kwargs["recompute"]
    check_plain(case.layer, kwargs)


@pytest.mark.parametrize("cls", CELLS)
def test_configs_of_controllers_hold_plain_numbers(cls):
    check_plain(cls, {"units": 5, "seed": 7, "dropout": 0.5})


def test_configs_of_nested_keras_layers_hold_plain_numbers():
    cell = keras.layers.LSTMCell(np.int64(5), dropout=np.float32(0.5))
    initializer = keras.initializers.RandomNormal(np.float32(0.5), np.int64(1))
    layer = keras_memory.NTMLayer(
        3, controller=cell, kernel_initializer=initializer
    )
    document = json.dumps(layer.get_config())
    assert '"units": 5' in document and '"stddev": 1' in document


def test_a_numpy_width_works_in_models_and_files(tmp_path):
    layer = keras_memory.NTMLayer(np.int64(4), np.int32(5), np.uint8(3))
    model = keras.Sequential([keras.Input((3, 2)), layer])
    assert model.output_shape == (None, 4)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[0].units == 4 and again.layers[0].slot_size == 3


def test_plain_converts_only_numpy_scalars():
    array, layer = np.arange(3), keras.layers.Dense(3)
    for value in (array, layer, "text", None, 2.5):
        assert plain(value) is value
    deep = plain({np.str_("a"): [np.float16(1.5), (np.uint8(2), layer)]})
    assert deep == {"a": [1.5, (2, layer)]}
    assert type(deep["a"][0]) is float and type(deep["a"][1][0]) is int
    assert type(plain(np.longdouble(1.5))) is float


FLAGS = [
    (keras_memory.NTMLayer, {"units": 3}),
    (keras_memory.DNCLayer, {"units": 3}),
    (keras_memory.ESMLayer, {"height": 4, "width": 8}),
    (keras_memory.ScannIndex, {"memory_size": 20}),
    (keras_memory.KNNMemory, {"key_dim": 3, "memory_size": 4}),
    *((cell, {"units": 3}) for cell in CELLS),
]


@pytest.mark.parametrize(
    ("cls", "kwargs", "flag"),
    [
        pytest.param(cls, kwargs, flag, id=f"{cls.__name__}-{flag}")
        for cls, kwargs in FLAGS
        for flag in [
            *(n for n, v in numbers_of(cls).items() if type(v) is bool),
            *(["trainable"] if cls is not keras_memory.KNNMemory else []),
        ]
    ],
)
def test_a_flag_must_be_a_bool(cls, kwargs, flag):
    for value in (0, 1, np.int64(1), "yes", None):
        with pytest.raises(ValueError) as error:
            cls(**kwargs, **{flag: value})
        message = f"`{flag}` must be True or False. Received: {flag}={value}"
        assert message in str(error.value).replace("'", "")


def test_numpy_bools_are_accepted_as_flags():
    assert check_bool("erase", np.True_) is True
    layer = keras_memory.NTMLayer(3, unroll=np.True_, stateful=np.False_)
    assert layer.unroll is True and layer.stateful is False


def test_numpy_bools_are_accepted_in_calls():
    layer = keras_memory.NTMLayer(3)
    x = np.ones((2, 3, 4), "float32")
    np.testing.assert_array_equal(
        layer(x, use_memory=np.False_), layer(x, use_memory=False)
    )
    states = layer.cell.get_initial_state(2)
    for output, other in zip(
        layer.cell(x[:, 0], states, use_memory=np.False_),
        layer.cell(x[:, 0], states, use_memory=False),
    ):
        keras.tree.map_structure(np.testing.assert_array_equal, output, other)


# Numbers and names.


@pytest.mark.parametrize("size", [30, 400])
def test_numbers_beyond_64_bits_are_checked(size):
    assert is_number(10**size) is (size == 30)
    for name in ("clip_value", "norm_epsilon", "initial_memory"):
        if size == 30:
            keras_memory.NTMLayer(3, **{name: 10**size})
            continue
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            keras_memory.NTMLayer(3, **{name: 10**size})


NTM = functools.partial(keras_memory.NTMLayer, 3)
COLLIER = functools.partial(keras_memory.convert.from_collier_ntm, {}, 1, 1)
DNC = functools.partial(keras_memory.convert.from_pytorch_dnc, {}, 7, 2)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (NTM, "addressing writing loop recompute key_activation"),
        (functools.partial(keras_memory.MemoryWrapLayer, 3), "similarity"),
        (COLLIER, "init_mode addressing_mode"),
        (DNC, "nonlinearity"),
        (functools.partial(runs.compare, ["run"], "path"), "by"),
    ],
)
def test_an_array_is_no_name(make, names):
    for name in names.split():
        told = f"`{name}` must be .*Received: |activation function"
        with pytest.raises(ValueError, match=told):
            make(**{name: np.ones(2)})


# Runs.


@pytest.mark.parametrize("name", ["default", "dnc", "lstm", "paper"])
def test_run_configurations_accept_numpy_numbers(name):
    expected = presets.PRESETS["copy"][name]

    def renewed(value):
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
        }
        return type(value)(
            **{
                key: renewed(field)
                if dataclasses.is_dataclass(field)
                else mapped(field, np.float64)
                if type(field) is float
                else mapped(field, of_numpy)
                if key != "optimizer_options"
                else mapped(field, lambda v: np.array(v))
                for key, field in fields.items()
            }
        )

    made = renewed(expected)
    assert config.to_json(made) == config.to_json(expected)
    assert config.from_json(config.to_json(made)) == made == expected


@pytest.mark.parametrize("curriculum", [[3, 5], np.array([3, 5])])
def test_run_configurations_accept_lists_and_integers(curriculum):
    given = dataclasses.replace(
        presets.PRESETS["copy"]["default"],
        curriculum=curriculum,
        learning_rate=1,
    )
    again = config.from_json(config.to_json(given))
    assert again == given and again.curriculum == (3, 5)
    assert config.to_json(again) == config.to_json(given)


@pytest.mark.parametrize(
    ("owner", "flag"),
    [("model", "erase"), (None, "learning_rate_decay"), (None, "jit_compile")],
)
def test_a_flag_of_a_run_must_be_a_bool(owner, flag):
    preset = presets.PRESETS["copy"]["default"]
    given = preset if owner is None else getattr(preset, owner)
    wanted = f"`{flag}` must be (True or False|of type bool)"
    with pytest.raises(ValueError, match=wanted):
        dataclasses.replace(given, **{flag: 1})


def test_seeds_out_of_range_are_refused():
    preset = presets.PRESETS["copy"]["default"]
    assert dataclasses.replace(preset, seed=MOST_SEED).seed == MOST_SEED
    for options in (
        {"bypass_dropout": 0.5},
        {"controller_dropout": 0.5, "controller_layers": 2},
        {"controller": "nas", "controller_dropout": 0.5},
        {"controller": "layer_norm_lstm", "controller_dropout": 0.5},
    ):
        cell = keras_memory.NTMCell(3, 4, 2, seed=MOST_SEED, **options)
        cell.build((1, 2))
        states = cell.get_initial_state(1)
        cell(np.ones((1, 2), "float32"), states, training=True)
        assert cell.get_config()["seed"] == MOST_SEED
    for cell in CELLS:
        assert cell(3, seed=MOST_SEED).get_config()["seed"] == MOST_SEED
        for seed in (-1, 2**32, 1.5, True):
            with pytest.raises(ValueError, match="`seed` must be an integer"):
                cell(3, seed=seed)
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        dataclasses.replace(preset, seed=2**32)


@pytest.mark.parametrize("order", [["read", "write"], ("read", "write")])
def test_arrays_and_lists_are_accepted_for_tuples(order):
    expected = keras_memory.NTMCell(3, head_order=order, name="made")
    cell = keras_memory.NTMCell(3, head_order=np.array(order), name="made")
    assert cell.get_config() == expected.get_config()
    assert cell.head_order == ("read", "write")
    limits = np.array([0.5, 2], "float32")
    cell = keras_memory.ESMCell(4, 8, depth_limits=limits)
    assert json.dumps(cell.get_config()["depth_limits"]) == "[0.5, 2.0]"
    for wrong in (np.ones((2, 2)), np.array("read"), np.arange(2)):
        with pytest.raises(ValueError, match="`head_order` must"):
            keras_memory.NTMCell(3, head_order=wrong)
        with pytest.raises(ValueError, match="`depth_limits` must"):
            keras_memory.ESMCell(4, 8, depth_limits=wrong)


# Names.


class Taking(toy.ToyCell):
    """Takes arguments that its signature does not name."""

    def __init__(self, units, **kwargs):
        self.depth = kwargs.pop("depth", 1)
        super().__init__(units, **kwargs)


class TakingLayer(keras_memory.MemoryRNN, cell=Taking):
    pass


class Doubled(keras_memory.NTMLayer):
    """Passes all arguments on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


PUBLIC = [
    value
    for value in vars(keras_memory).values()
    if isinstance(value, type)
    and (
        issubclass(value, keras.layers.Layer) or value is keras_memory.KNNMemory
    )
]


def enough(cls):
    """The required arguments of a class."""
    given = {
        "cell": lambda: toy.ToyCell(3),
        "encoder": lambda: keras.layers.Dense(3),
        "accesses": lambda: [toy.ToyAccess()],
    }
    names = inspect.signature(cls).parameters.values()
    kwargs = {
        p.name: given.get(p.name, lambda: 40)()
        for p in names
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    if cls is Doubled:
        kwargs = {"units": 3}
    if cls is keras_memory.MemoryRNN:
        kwargs = {"cell": given["cell"]()}
    if cls is keras_memory.ScannIndex:
        kwargs["exact"] = True
    return kwargs


each_class = pytest.mark.parametrize(
    "cls", [*PUBLIC, *CELLS, toy.ToyLayer, TakingLayer, Doubled]
)


@each_class
def test_errors_of_unknown_arguments_name_the_called_class(cls):
    kwargs = enough(cls)
    cls(**kwargs)
    with pytest.raises(TypeError) as error:
        cls(**kwargs, nonsense=4)
    assert str(error.value).startswith(
        f"{cls.__name__} has no argument `nonsense`. "
    )
    assert "nonsense=4" in str(error.value)
    for name in numbers_of(cls):
        with pytest.raises(TypeError) as error:
            cls(**kwargs, **{name[:-1]: 4})
        text = str(error.value)
        assert text.startswith(f"{cls.__name__} has no argument `{name[:-1]}`")
        assert "Did you mean" in text and f"`{name}`" in text


@each_class
def test_errors_of_argument_counts_name_the_called_class(cls):
    if enough(cls) and cls is not keras_memory.MemoryRNN:
        with pytest.raises(TypeError, match=f"^{cls.__name__}: missing"):
            cls()
    first = [toy.ToyCell(3)] if cls is keras_memory.MemoryRNN else []
    with pytest.raises(TypeError, match=f"^{cls.__name__}"):
        cls(*first, *range(1, 60))


class OwnLayer(keras_memory.MemoryRNN, cell=toy.ToyCell):
    """Names only some of its arguments."""

    def __init__(self, units, extra=1, **kwargs):
        super().__init__(units, **kwargs)


@pytest.mark.parametrize(
    ("cls", "name", "hint"),
    [
        (keras_memory.NTMCell, "accesses", "It has: units, memory_slots"),
        (keras_memory.NTMLayer, "accesses", "It has: units, memory_slots"),
        (keras_memory.NTMLayer, "cell", "It has: units, memory_slots"),
        (keras_memory.NTMLayer, "nr_cells", "It has: units, memory_slots"),
        (OwnLayer, "widht", "Did you mean `width`"),
        (OwnLayer, "nonsense", "It has: units, extra, .*, width, "),
    ],
)
def test_hints_name_arguments_that_a_class_takes(cls, name, hint):
    started = f"^{cls.__name__} has no argument `{name}`. {hint}"
    with pytest.raises(TypeError, match=started) as error:
        cls(3, **{name: 4})
    told = str(error.value).partition(" Received: ")[0]
    assert not {"accesses", "cell"} & {
        *told.partition("It has: ")[2].split(", ")
    }


@pytest.mark.parametrize("arguments", [{"foo": 1}, {}])
def test_errors_about_arguments_can_be_pickled(arguments):
    with pytest.raises(TypeError) as error:
        keras_memory.NTMLayer(**arguments)
    again = pickle.loads(pickle.dumps(error.value))
    assert isinstance(error.value, type(again))
    assert str(again) == str(error.value)


def test_keywords_of_keras_and_of_custom_cells_are_accepted():
    layer = TakingLayer(3, depth=2, name="mine", dtype="float64")
    assert layer.cell.depth == 2
    assert layer.name == "mine" and layer.dtype == "float64"
    with pytest.warns(UserWarning, match="input_shape"):
        keras_memory.KNNMemoryLayer(40, input_shape=(3, 4))
    cells.LayerNormLSTMCell(3, implementation=1)


def test_keras_finds_the_wrapped_arguments():
    parameters = inspect.signature(keras_memory.NTMCell).parameters
    assert list(parameters)[:3] == ["units", "memory_slots", "slot_size"]
    assert "__wrapped__" in vars(keras_memory.NTMCell.__init__)


# Attributes.


class Crowded(toy.ToyCell):
    """Has arguments named like attributes of the layer."""

    def __init__(self, units, state_size=3, stateful=5, name=None, **kwargs):
        super().__init__(units, name=name, **kwargs)
        self.stateful = stateful


class CrowdedLayer(keras_memory.MemoryRNN, cell=Crowded):
    pass


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_arguments_of_the_cell_are_attributes_of_the_layer(case):
    layer = case.make(name="made")
    if case.layer is keras_memory.MemoryRNN:
        return
    config = layer.get_config()
    for name in {*inspect.signature(case.layer).parameters} - {"kwargs"}:
        owner = layer if name in vars(layer) else layer.cell
        assert getattr(layer, name) is getattr(owner, name)
    with pytest.raises(AttributeError, match="`units` is an argument of the"):
        layer.units = 5
    assert layer.get_config() == config
    assert layer.name == "made" and layer.loop == "auto"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layer.nonsense  # noqa: B018


def test_attributes_of_the_layer_hide_those_of_the_cell():
    layer = CrowdedLayer(3, name="mine", return_sequences=True)
    assert layer.stateful is False and layer.name == "mine"
    assert layer.state_size == layer.cell.state_size
    regularizer = keras.regularizers.L2()
    layer = keras_memory.DNCLayer(3, activity_regularizer=regularizer)
    assert layer.activity_regularizer is regularizer
    assert layer.dtype == "float32" and layer.trainable is True
    layer.trainable = False
    assert layer.cell.trainable is False
    model = keras.Sequential([keras.Input((3, 2)), layer])
    model.summary(expand_nested=True, print_fn=len)


def test_a_regularizer_that_would_do_nothing_is_refused():
    cell = keras_memory.NTMCell(3, activity_regularizer="l2")
    told = "`activity_regularizer` must be given to the layer .* Received: "
    with pytest.raises(ValueError, match=told):
        keras_memory.MemoryRNN(cell)
    layer = keras_memory.NTMLayer(3, activity_regularizer="l2")
    layer(np.ones((2, 3, 4), "float32"))
    assert len(layer.losses) == 1


def test_a_controller_as_attribute_is_tracked_once(tmp_path):
    cell = keras.layers.LSTMCell(5)
    layer = keras_memory.NTMLayer(3, 4, 2, controller=cell)
    model = keras.Sequential([keras.Input((3, 2)), layer])
    assert layer.controller is cell
    assert len({id(weight) for weight in layer.weights}) == len(layer.weights)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(model.get_weights(), again.get_weights()):
        np.testing.assert_array_equal(one, other)


# Sizes.

HUGE = LONGEST_AXIS


@pytest.fixture
def small_machine(monkeypatch):
    """A machine with 16 GB and no accelerator."""
    monkeypatch.setattr(checks, "machine_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(checks, "has_accelerator", lambda: False)


def built(layer, *shape):
    layer.build(shape)


SIZES = {
    "memory_slots=": lambda n: keras_memory.NTMLayer(3, memory_slots=n),
    "slot_size=": lambda n: keras_memory.NTMLayer(3, slot_size=n),
    "read_heads=": lambda n: keras_memory.NTMLayer(3, read_heads=n),
    "write_heads=": lambda n: keras_memory.DNCLayer(3, write_heads=n),
    "sparse_links=": lambda n: keras_memory.DNCLayer(
        3, n // 8, 1, 1, sparse_links=n // 8
    ),
    "controller_units=": lambda n: keras_memory.DNCLayer(3, controller_units=n),
    "controller_layers=": lambda n: keras_memory.NTMLayer(
        3, controller_layers=n
    ),
    "num_layers=": lambda n: keras_memory.DNCLayer(3, num_layers=n),
    "units=": lambda n: built(keras_memory.NTMLayer(n), 2, 3, 4),
    "dense": lambda n: built(
        keras_memory.NTMLayer(3, controller="dense", controller_units=n),
        2,
        3,
        4,
    ),
    "8 x units=": lambda n: built(
        keras_memory.NTMLayer(3, controller="nas", controller_units=n), 2, 3, 4
    ),
    "width of input and reads=": lambda n: built(
        keras_memory.NTMLayer(3, memory_slots=3, slot_size=n // 8), 2, 3, 4
    ),
    "ring: memory_size=": lambda n: RingMemory(64, n).initial_state(2),
    "memory_size=2147483647 x key_dim": lambda n: built(
        keras_memory.KNNMemoryLayer(n), 2, 3, 4
    ),
    "num_rows=1 x memory_size=": lambda n: keras_memory.KNNMemory(
        64, n // 64, value_dim=640, search_method="exact"
    ),
    "num_rows=": lambda n: keras_memory.KNNMemory(1, 1, num_rows=n),
    "index: memory_size=": lambda n: built(
        keras_memory.ScannIndex(n, exact=True), 2, 64
    ),
    "wrap: memory_size=": lambda n: built(
        keras_memory.MemoryWrapLayer(3, memory_size=n), 2, 64
    ),
    "2 x features=": lambda n: built(keras_memory.MemoryWrapLayer(n), 2, 64),
    "height=": lambda n: keras_memory.ESMLayer(height=n),
    "feature_channels=": lambda n: keras_memory.ESMCell(feature_channels=n),
    "units=2147483647 x 4": lambda n: cells.LayerNormLSTMCell(n),
    "bits=": lambda n: tasks.Copy(bits=n),
    "max_length=": lambda n: tasks.Copy(max_length=n),
    "max_repeats=": lambda n: tasks.RepeatCopy(max_repeats=n),
    "vectors=": lambda n: tasks.AssociativeRecall(vectors=n),
    "context=": lambda n: tasks.NGrams(n, n, context=n - 1),
    "digits=": lambda n: tasks.Adding(digits=n),
    "batch_size=": lambda n: config.override(
        presets.PRESETS["copy"]["default"], [f"batch_size={n}"]
    ),
    "LSTM": lambda n: config.LSTMConfig(units=n),
    "LSTM layers": lambda n: config.LSTMConfig(num_layers=n),
    "config": lambda n: config.NTMConfig(
        controller_layers=n, initialization="pytorch-ntm"
    ),
    "config units": lambda n: config.NTMConfig(
        controller_units=n, initialization="pytorch-ntm"
    ),
    "test length": lambda n: config.override(
        presets.PRESETS["copy"]["default"], [f"test_lengths=({n},)"]
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_does_not_fit_is_refused_at_once(name, small_machine):
    make = SIZES[name]
    with pytest.raises(ValueError, match="would take .*B, but |at most") as e:
        make(HUGE)
    if name.endswith("="):
        assert name.rpartition(": ")[2] in str(e.value)
    for size in (2**31, 2**70):
        with pytest.raises(ValueError, match="at most|would take"):
            make(size)


def test_the_error_for_too_large_linkage_names_sparse_links(small_machine):
    with pytest.raises(ValueError, match="linkage.*40 GB.*`sparse_links`") as e:
        keras_memory.DNCLayer(3, memory_slots=100_000)
    assert "memory_slots=100000" in str(e.value)
    keras_memory.DNCLayer(3, memory_slots=100_000, sparse_links=8)
    keras_memory.DNCLayer(3, memory_slots=100_000, linkage=False)


@pytest.mark.parametrize("size", [None, -1, "2", 2.0, np.int64(-1)])
def test_a_wrong_batch_size_is_refused(size):
    layer = keras_memory.NTMLayer(3)
    layer.build((None, 3, 2))
    with pytest.raises(ValueError, match="`batch_size` must be an integer"):
        layer.cell.get_initial_state(size)
    assert layer.cell.get_initial_state(np.int64(2))[0].shape == (2, 20)


def test_states_of_too_large_a_batch_are_refused(small_machine):
    layer = keras_memory.DNCLayer(3, memory_slots=10_000)
    layer.build((None, 3, 2))
    with pytest.raises(ValueError, match="400 GB.*batch size=1000 x"):
        layer.cell.get_initial_state(1000)


def test_too_many_layers_over_all_blocks_are_refused():
    with pytest.raises(ValueError, match="`controller_layers`.*100 blocks"):
        keras_memory.DNCLayer(3, num_layers=100, controller_layers=100)
    with pytest.raises(ValueError, match=f"most {MOST_LAYERS}"):
        controllers.get("lstm", 3, MOST_LAYERS + 1)


def test_too_large_batches_are_refused_before_they_are_drawn(small_machine):
    rng = np.random.default_rng(1)
    for task in (task() for task in tasks.TASKS.values()):
        if task.name == "chain":  # its items are different
            task = dataclasses.replace(task, bits=31)
        with pytest.raises(ValueError, match="batch_size=.*|must be|longer"):
            task.sample(rng, 2**31 - 1)
        if task.name != "argmax":
            with pytest.raises(ValueError, match="batch of.*time steps="):
                task.sample(rng, 1, length=2**31 - 1)


def test_check_bytes_refuses_more_than_the_machine_has(monkeypatch):
    sizes = [("rows", None), ("slots", 2_000), ("width", 1_000_000)]
    monkeypatch.setattr(checks, "has_accelerator", lambda: False)
    monkeypatch.setattr(checks, "machine_bytes", lambda: 8_000_000_000)
    check_bytes("The memory", sizes)  # exactly fits
    monkeypatch.setattr(checks, "machine_bytes", lambda: 7_999_999_999)
    check_bytes("The memory", sizes, "bfloat16")
    with pytest.raises(ValueError, match="The memory would take 8 GB.*slots=2"):
        check_bytes("The memory", sizes)
    monkeypatch.setattr(checks, "machine_bytes", lambda: None)
    check_bytes("The memory", sizes, on_host=True)
    with pytest.raises(ValueError, match="would take 8,000 EB"):
        check_bytes("The memory", [*sizes, ("more", 10**12)])
    monkeypatch.setattr(checks, "machine_bytes", lambda: 1)
    monkeypatch.setattr(checks, "has_accelerator", lambda: True)
    check_bytes("The memory", sizes)  # an accelerator may have room
    with pytest.raises(ValueError, match="8 GB"):
        check_bytes("The memory", sizes, on_host=True)


def test_machine_bytes_is_plausible_or_unknown():
    size = checks.machine_bytes()
    assert size is None or 10**8 < size < 2**50


def test_more_buckets_than_lengths_are_accepted():
    rng = np.random.default_rng(1)
    few = tasks.Copy(max_length=5, buckets=3)
    ends = {few.sample(rng, 1).mask.shape[1] for _ in range(50)}
    assert ends == {4, 8, 11}
    many = dataclasses.replace(few, buckets=HUGE)
    assert many.sample(rng, 1).mask.shape[1] <= 11


@pytest.mark.parametrize(
    "make, old, new",
    [
        (keras_memory.KNNMemoryLayer, "method", "search_method"),
        (keras_memory.KNNMemoryLayer, "max_memories", "memory_size"),
        (keras_memory.KNNMemory, "dim", "key_dim"),
        (keras_memory.KNNMemory, "store", "search_method"),
        (keras_memory.MemoryWrapLayer, "distance", "similarity"),
        (keras_memory.MemoryWrapLayer, "fixed_memory_size", "memory_size"),
        (keras_memory.MemoryWrapClassifier, "distance", "similarity"),
        (keras_memory.DNCLayer, "layers", "num_layers"),
        (keras_memory.DNCCell, "layers", "num_layers"),
    ],
)
def test_errors_of_renamed_arguments_give_the_new_name(make, old, new):
    told = f"no argument `{old}`: it is called `{new}` now.*{old}=3"
    with pytest.raises(TypeError, match=told):
        make(2, **{old: 3})


def test_errors_of_old_files_give_the_new_argument_name(tmp_path):
    import zipfile

    model = keras.Sequential([keras.Input((3, 2)), keras_memory.DNCLayer(2)])
    model.save(tmp_path / "new.keras")
    with zipfile.ZipFile(tmp_path / "new.keras") as new:
        with zipfile.ZipFile(tmp_path / "old.keras", "w") as old:
            for name in new.namelist():
                data = new.read(name).replace(b'"num_layers"', b'"layers"')
                old.writestr(name, data)
    with pytest.raises(TypeError, match="`layers`: it is called `num_layers`"):
        keras.saving.load_model(tmp_path / "old.keras")


def test_a_suggestion_has_all_words_of_the_given_name():
    with pytest.raises(TypeError, match="Did you mean `memory_slots`"):
        keras_memory.NTMLayer(3, slots=4)


@pytest.mark.parametrize("dtype, fits", [("int32", True), ("int64", False)])
def test_bytes_of_values_depend_on_their_dtype(dtype, fits, small_machine):
    ring = RingMemory(1, 5 * 10**6, 600, value_dtype=dtype)
    if fits:  # 12 GB
        ring._check_bytes(1, "float32")
    else:
        with pytest.raises(ValueError, match="The values would take 24 GB"):
            ring._check_bytes(1, "float32")


def test_too_many_neighbours_are_refused(small_machine):
    memory = keras_memory.KNNMemory(2, 3, search_method="exact")
    memory.add(np.eye(2), np.eye(2))
    with pytest.raises(ValueError, match="neighbours.*top_k=1000000000"):
        memory.search(np.eye(2), top_k=10**9)


def test_the_memory_limit_of_the_process_is_respected(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (12345, -1))
    checks.machine_bytes.cache_clear()
    try:
        assert checks.machine_bytes() == 12345
    finally:
        checks.machine_bytes.cache_clear()


@pytest.mark.parametrize("path", [None, 3])
def test_errors_name_a_wrong_path_argument(path):
    memory = keras_memory.KNNMemory(2, 3, search_method="exact")
    for call in (memory.save, memory.load, memory.open):
        with pytest.raises(ValueError, match="`folder` must be a path"):
            call(path)
    with pytest.raises(ValueError, match="`path` must be a path"):
        keras_memory.convert.read_pytorch_checkpoint(path)
