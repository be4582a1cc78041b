"""What an access, its class and its steps must be, and errors for others."""

import copy
import dataclasses
import inspect
from typing import Any
from typing import NamedTuple

import harness
import keras
import numpy as np
import pytest
import toy
from keras import ops

from keras_memory import MemoryCell
from keras_memory import MemoryRNN
from keras_memory import NTMCell
from keras_memory import NTMLayer
from keras_memory import StateSpec
from keras_memory.ntm import NTMAccess
from keras_memory.recurrent.serialization import init_parameters

X = np.ones((2, 3, 5), "float32")


def mine(**attributes):
    """A subclass of `ToyAccess` with some attributes replaced."""
    return type("Mine", (toy.ToyAccess,), attributes)


def with_field(name, kind=Any, default=1):
    return dataclasses.make_dataclass(
        "Mine",
        [(name, kind, default)],
        bases=(toy.ToyAccess,),
        frozen=True,
        eq=False,
    )


def new(name, base, **keywords):
    """`class name(base, **keywords)`."""
    return type(name, (base,), {}, **keywords)


# States.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": 3}, "`shape` must be a tuple of .* shape=3"),
        ({"shape": (None, 3)}, "`shape` must"),
        ({"shape": (2.0, 3)}, "`shape` must"),
        ({"shape": (0,)}, "`shape` must be .* at least 1"),
        ({"shape": (3,), "transposed": True}, "`shape` must .* two at least"),
        ({"shape": (3,), "transposed": 1}, "`transposed` must be True or"),
        ({"initial": None}, "`initial` must be .* initial=None"),
        ({"initial": "learnt"}, "`initial` must"),
        ({"initial": np.nan}, "`initial` must"),
        ({"constant": np.ones(4)}, r"`constant` must .*shape \(4,\)"),
        ({"constant": np.ones((2, 3))}, "`constant` must"),
        ({"constant": "a"}, "`constant` must"),
        ({"activation": "softmax"}, "`activation` must be a function"),
        ({"into_range": 3}, "`into_range` must be a function"),
        ({"dtype": "int64"}, '`dtype` must be "int32", "float32" or None'),
        ({"per_slot": 1}, "`per_slot` must be True or"),
        ({"dtype": "int32", "initial": "learned"}, "must start from a const"),
        (
            {"shape": (2, 3), "per_slot": True, "transposed": True},
            "not be transposed",
        ),
    ],
    ids=str,
)
def test_a_wrong_state_is_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        StateSpec(**{"shape": (3,), **arguments})
    assert "Received: " in str(error.value)


def test_shapes_may_be_lists_and_numpy_numbers():
    assert StateSpec([np.int64(2), 3]).shape == (2, 3)
    assert StateSpec((2, 3), constant=[[1], [2]]).fill == [[1], [2]]


# Attributes.


class NoStep:
    interface_size = 3
    read_size = 3
    initial_state = toy.ToyState(StateSpec((1, 3)), ())


def with_states(reads, total):
    return {"initial_state": toy.ToyState(reads, total)}


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (lambda: toy.ToyAccess, r"`accesses` must have .* `ToyAccess\(\)`"),
        (NoStep, "`NoStep` must have the attribute `step`"),
        (mine(step=3), "`Mine.step` must be a method"),
        *(
            (mine(interface_size=size), "`Mine.interface_size` must be an int")
            for size in (None, "3", 3.0, -1, (3,), lambda self: 3)
        ),
        *(
            (mine(read_size=size), "`Mine.read_size` must be the number")
            for size in (3.0, [3])
        ),
        (
            mine(**with_states(np.ones((1, 3)), ())),
            "`Mine.initial_state.reads` must be a `StateSpec`. Rec.*array",
        ),
        (
            mine(**with_states((), ())),
            "`Mine.initial_state.reads` must be a `StateSpec`. Received: ..",
        ),
        (
            mine(**with_states(StateSpec((1, 3)), None)),
            r"`Mine.initial_state.total` must be .*, or \(\).*Received: None",
        ),
    ],
)
def test_a_wrong_attribute_of_an_access_is_refused(access, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MemoryCell(2, [access()])


def test_an_error_within_a_property_is_not_hidden():
    def read_size(self):
        return self.nonsense

    with pytest.raises(AttributeError, match="nonsense"):
        MemoryCell(2, [mine(read_size=property(read_size))()])


# Classes.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: new("C", NTMCell, memory_slots=7), "C must begin .*slots': 7"),
        (lambda: new("C", MemoryCell, acess=toy.ToyAccess), "C must begin"),
        (lambda: new("C", toy.ToyCell, num_layers=3), "C must begin"),
        *(
            (
                lambda name=name: new(
                    "C", MemoryCell, access=toy.ToyAccess, **{name: 1}
                ),
                f"keywords of C must .*seed.* Received: {name}=1",
            )
            for name in ("typo", "width", "dtype", "units", "accesses")
        ),
        (
            lambda: new("C", MemoryCell, access=lambda: toy.ToyAccess()),
            "`access` of C must be a dataclass",
        ),
        (
            lambda: new("C", MemoryCell, access=toy.ToyAccess()),
            "`access` of C must be a dataclass.*ToyAccess.width=3",
        ),
        (
            lambda: new("C", NTMCell, access=toy.ToyAccess),
            r"`access` must belong .*Received: class C\(NTMCell\)",
        ),
        (
            lambda: type(
                "C",
                (MemoryCell,),
                {"__init__": lambda self: None},
                access=toy.ToyAccess,
            ),
            "`access` must belong to a class without `__init__`",
        ),
        (
            lambda: new(
                "C", MemoryCell, access=with_field("z", dataclasses.InitVar)
            ),
            "`access` of C must have its fields as arguments.*z",
        ),
        (lambda: new("L", MemoryRNN, cell=toy.ToyAccess), "`cell` of L must"),
        (lambda: new("L", MemoryRNN, cell=toy.ToyCell(3)), "`cell` of L must"),
        (
            lambda: new("L", NTMLayer, cell=toy.ToyCell),
            "`cell` of L must be a subclass of NTMCell",
        ),
    ],
)
def test_a_wrong_class_is_refused(make, message):
    with pytest.raises(TypeError, match=message) as error:
        make()
    assert "Received: " in str(error.value)


def test_a_field_has_no_name_of_the_cell_or_the_layer():
    layer = MemoryRNN(toy.ToyCell(3), stateful=True)
    layer(X)
    names = {*dir(layer), *dir(layer.cell), *init_parameters(MemoryRNN)}
    names |= {"_mine", "self", "kwargs", "input_shape", "implementation"}
    for name in sorted(names - {"width"}):
        if name.startswith("__"):
            continue
        with pytest.raises(TypeError, match=f"Mine must not .* `{name}`"):
            new("C", MemoryCell, access=with_field(name))(2)


def test_an_access_may_add_fields_to_one_with_keyword_fields():
    access = dataclasses.make_dataclass(
        "Mine",
        [("gain", float, 1.0)],
        bases=(NTMAccess,),
        frozen=True,
        eq=False,
    )
    cell = new("C", MemoryCell, access=access)
    arguments = list(inspect.signature(cell).parameters)
    assert arguments[4:7] == ["write_heads", "gain", "head_order"]
    assert cell(2, 5, 3, 1, 1, 0.5, erase=False).gain == 0.5


def test_a_field_that_is_no_argument_is_none_of_the_cell():
    once = dataclasses.field(init=False, default=3)
    cell = new("C", MemoryCell, access=with_field("once", int, once))
    assert "once" not in inspect.signature(cell).parameters
    assert cell(2).accesses[0].once == 3


def test_equal_accesses_have_a_memory_each():
    access = dataclasses.make_dataclass(
        "Mine", [], bases=(toy.ToyAccess,), frozen=True
    )
    cell = new("C", MemoryCell, access=access)(
        2, num_layers=2, share_memory=False
    )
    assert cell.accesses[0] == cell.accesses[1]
    assert cell.memory_of_block == [0, 1]
    assert cell.state_names[-1] == "block1_controller_c"


# Steps.


class Other(NamedTuple):
    reads: Any
    other: Any
    controller: Any = ()


def state(**fields):
    return lambda i, s: (s._replace(**{n: f(i) for n, f in fields.items()}), {})


def entry(name, value):
    return lambda i, s: (s, {name: value})


LIKE_BEFORE = r"`Mine.step` must return `{}` with .*: shape \({}\), dtype float"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda i, s: s, "must return the state, a ToyState, .*: ToyState"),
        (lambda i, s: ({}, s), r"must return .*: \(dict, ToyState\)"),
        (lambda i, s: (s, None), r"must return .*: \(ToyState, NoneType\)"),
        (lambda i, s: (tuple(s), {}), r"must return .*: \(tuple, dict\)"),
        (lambda i, s: (Other(*s), {}), r"must return .*: \(Other, dict\)"),
        *(
            (state(total=change), LIKE_BEFORE.format("total", "2, 3"))
            for change in (
                lambda i: ops.concatenate([i, i], 1),
                lambda i: i[:, :2],
                lambda i: i[0],
                lambda i: i[:1],
                lambda i: i[:, None],
                lambda i: ops.cast(i, "int32"),
                lambda i: ops.cast(i, "float16"),
                lambda i: 1.0,
                lambda i: None,
                lambda i: (i, i),
                lambda i: (),
            )
        ),
        (
            state(reads=lambda i: i),
            LIKE_BEFORE.format("reads", "2, 1, 3")
            + r".*Received: shape \(2, 3\)",
        ),
        *(
            (entry(name, X[:2]), f"names other than .*Received: {name!r}")
            for name in ("output", "controller_output", "total", "reads", 3)
        ),
        *(
            (entry("n", value), "must return `n` for `trace` as an array")
            for value in (3, np.float32(3), np.ones(3), None, [1, 2])
        ),
    ],
)
def test_a_wrong_result_of_a_step_is_refused(step, message):
    access = mine(step=lambda self, interface, state: step(interface, state))
    layer = MemoryRNN(MemoryCell(2, [access()]))
    with pytest.raises((ValueError, TypeError), match=message) as error:
        layer(X)
    assert "`Mine.step` must" in str(error.value)


def test_numpy_is_no_state():
    harness.skip_on("numpy", because="its tensors are NumPy's")
    step = state(total=lambda i: np.ones((2, 3), "float32"))
    access = mine(step=lambda self, interface, state: step(interface, state))
    with pytest.raises(ValueError, match="`total` .* Received: ndarray"):
        MemoryRNN(MemoryCell(2, [access()]))(X)


# Configurations.


@keras.saving.register_keras_serializable(package="tests")
def doubled(x):
    return 2 * x


@dataclasses.dataclass(frozen=True, eq=False)
class SquashAccess(toy.ToyAccess):
    squash: Any = keras.activations.sigmoid
    by_name: Any = "tanh"


@keras.saving.register_keras_serializable(package="tests")
class SquashCell(MemoryCell, access=SquashAccess):
    pass


@keras.saving.register_keras_serializable(package="tests")
class SquashLayer(MemoryRNN, cell=SquashCell):
    pass


OBJECTS = {
    "function of Keras": keras.activations.tanh,
    "own function": doubled,
    "nested": [doubled, {"a": keras.activations.tanh}],
    "text": "tanh",
    "array": np.ones(3, "float16"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_in_fields_survive_a_configuration(name, tmp_path):
    given = OBJECTS[name]
    layer = SquashLayer(3, squash=given, name="squash")
    model = keras.Sequential([keras.Input(X.shape[1:]), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    copies = [
        loaded,
        copy.deepcopy(layer),
        keras.models.clone_model(model).layers[0],
        keras.layers.Bidirectional(layer).forward_layer,
        SquashCell.from_config(layer.cell.get_config()),
    ]
    for made in copies:
        found = made.squash
        assert type(found) is type(given) or isinstance(found, list)
        assert np.all(found == given)


def test_an_initializer_in_a_field_survives_a_configuration():
    layer = SquashLayer(3, squash=keras.initializers.Constant(4))
    again = SquashLayer.from_config(layer.get_config())
    assert isinstance(again.squash, keras.initializers.Constant)
    assert again.squash.value == 4


def test_custom_objects_are_used():
    def own(x):
        return x

    config = SquashLayer(3, squash=own).get_config()
    again = SquashLayer.from_config(config, custom_objects={"own": own})
    assert again.squash is own


def test_a_field_with_a_name_as_default_is_saved_by_name():
    config = SquashLayer(3, by_name=keras.activations.relu).get_config()
    assert config["by_name"] == "relu"
    config = NTMLayer(3, key_activation=keras.activations.relu).get_config()
    assert config["key_activation"] == "relu"


@pytest.mark.parametrize("value", [object(), np.tanh, {1, 2}, [object()]])
def test_a_field_that_cannot_be_saved_is_refused(value):
    with pytest.raises(TypeError, match="`squash` must be .* to be saved. Rec"):
        SquashLayer(3, squash=value).get_config()


@keras.saving.register_keras_serializable(package="tests")
class NotedCell(toy.ToyCell):
    """Its `from_config` differs from its `__init__`."""

    def get_config(self):
        return {**super().get_config(), "note": 1}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        assert config.pop("note") == 1
        return super().from_config(config)


@keras.saving.register_keras_serializable(package="tests")
class NotedLayer(MemoryRNN, cell=NotedCell):
    def __init__(self, units, extra=1, **kwargs):
        super().__init__(units, **kwargs)
        self.extra = extra

    def get_config(self):
        return {**super().get_config(), "extra": self.extra}


def test_a_cell_may_have_its_own_from_config(tmp_path):
    layer = NotedLayer(
        3,
        extra=2,
        width=4,
        controller=keras.layers.GRUCell(7),
        dtype="mixed_bfloat16",
        name="noted",
        return_sequences=True,
    )
    model = keras.Sequential([keras.Input(X.shape[1:]), layer])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    made = again.layers[0]
    assert made.extra == 2 and made.width == 4 and made.name == "noted"
    config = {**layer.get_config(), "controller": made.controller}
    assert {**made.get_config(), "controller": made.controller} == config
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert copy.deepcopy(layer).width == 4
