"""Entries of the accesses, which address, read and write a memory.

`ENTRIES` has one entry per access, with the options that deserve a run of
their own. `test_accesses.py` runs every check on every entry.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import reference
from keras import ops

import keras_memory

BATCH, TIME, WIDTH, UNITS = 2, 6, 3, 2
SHAPE = (BATCH, TIME, WIDTH)
MIXED = ("mixed_float16", "mixed_bfloat16")
ALL_SIZES = ("float32", "float64", "mixed_float16")


def numbers(seed=7, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


def few(seed=7):
    """Inputs of three steps, for checks that gain nothing from more."""
    return numbers(seed)[:, :3]


def close(actual, expected, tolerance=1e-6):
    actual = ops.convert_to_numpy(actual)
    expected = ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all() and np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def bias_of(access, **values):
    """An interface vector with the named parts set and the others 0."""
    filled = []
    for name, shape in access.parts._asdict().items():
        value = values.pop(name, 0.0)
        if shape is not None:
            filled.append(np.broadcast_to(value, shape).ravel())
    assert not values
    return np.concatenate(filled)


def set_interface_bias(layer, **values):
    bias = layer.cell.interfaces[0][1]
    bias.assign(bias_of(layer.cell.accesses[0], **values))


# Entries and their points.


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A setting in which a check runs.

    Args:
        name: str, part of the test's name.
        options: dict of arguments of the layer.
        bias: dict of biases of parts of the interface; the others are 0.
        dtype: dtype policy of the layer.
        bounds: upper bounds of gradients: of inputs and weights, and of initial
            states, None where these have no meaning.
        without: names of the invariants that the options remove, or of the
            states that they leave without a gradient.
        slow: bool; True: runs with `-m slow` only. Checks of invariants run
            small weights with `-m slow` only, and large weights always.
    """

    name: str
    options: dict = dataclasses.field(default_factory=dict)
    bias: dict = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    bounds: tuple = (1e2, 1e4)
    without: str = ""
    slow: bool = False

    def __str__(self):
        dtype = "" if self.dtype == "float32" else f" in {self.dtype}"
        return self.name + dtype


def with_dtypes(dtypes, *args, **kwargs):
    return [Point(*args, dtype=dtype, **kwargs) for dtype in dtypes]


def reached_states(layer):
    _, *states = layer(few(seed=13))
    return states


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An access to test, within its layer.

    Args:
        name: str, of the tests.
        layer: class of the layer.
        sizes: dict of arguments of the layer.
        invariants: dict from names in `trace` to functions (value, tolerance)
            that assert the invariant of each step.
        learned: names of the arguments that turn initial states into weights.
        weightings, gradients, saturated, singular, zeros, sixteen_bits:
            lists of `Point`, for the tests of each kind.
        states: function of a layer that returns states like those in the middle
            of a sequence, where gradients have no kinks.
        no_gradient: names of states whose gradient is 0.
        not_tiny: names of `invariants` whose values must not be close to zero:
            there the check would prove nothing.
        gradient_time: int, number of steps to differentiate.
    """

    name: str
    layer: type
    sizes: dict
    invariants: dict
    learned: str
    weightings: list
    gradients: list
    saturated: list
    singular: list
    zeros: list
    sixteen_bits: list
    states: Callable = reached_states
    no_gradient: str = ""
    not_tiny: str = ""
    gradient_time: int = TIME

    def make(self, **kwargs):
        fixed = {"units": UNITS, **self.sizes, "return_sequences": True}
        return self.layer(**{**fixed, **kwargs})

    def built(self, shape=SHAPE, **kwargs):
        layer = self.make(**kwargs)
        layer.build(shape)
        return layer

    def randomised(self, seed=5, scale=1.0, shape=SHAPE, **kwargs):
        """A layer with all weights drawn at random."""
        layer = self.built(shape, **kwargs)
        rng = np.random.default_rng(seed)
        for weight in layer.cell.weights:
            if "seed" not in weight.path:
                weight.assign(rng.normal(size=weight.shape, scale=scale))
        return layer

    def like(self, layer, **kwargs):
        """A layer with other arguments and the weights of `layer`."""
        other = self.built(**kwargs)
        other.cell.set_weights(layer.cell.get_weights())
        return other

    def at(self, point, **kwargs):
        """A layer with the settings of a point that also returns its state."""
        fixed = {"dtype": point.dtype, "return_state": True}
        layer = self.built(**{**fixed, **point.options, **kwargs})
        set_interface_bias(layer, **point.bias)
        return layer


# Invariants.


def sums_to_one(value, tolerance):
    assert (value >= 0).all()
    close(value.sum(-1), np.ones(value.shape[:-1]), tolerance)


def sums_to_at_most_one(value, tolerance):
    assert (value >= 0).all() and (value.sum(-1) <= 1 + tolerance).all()


def is_share(value, tolerance):
    assert (value >= 0).all() and (value <= 1 + tolerance).all()


def is_positive(value, tolerance):
    assert (value > 0).all()


def is_at_least_one(value, tolerance):
    assert (value >= 1).all()


def are_links(value, tolerance):
    sums_to_at_most_one(value, tolerance)
    if value.shape[-1] == value.shape[-2]:  # not with sparse links
        sums_to_at_most_one(np.swapaxes(value, -1, -2), tolerance)
        assert (np.diagonal(value, axis1=-2, axis2=-1) == 0).all()


# The Neural Turing Machine.

IN_TURN = ("read", "write", "write", "read", "write")
GATES = ("strength", "interpolation_gate", "sharpening", "erase_vector")
PAST_ONLY = {"interpolation_gate": -60, "shift": [0, 60, 0]}
NTM_SATURATED = {
    f"{part} {value:+}": {part: value}
    for part in ("key", *GATES, "add_vector")
    for value in (60, -60)
} | {
    "shift back": {"shift": [60, 0, 0]},
    "shift on": {"shift": [0, 0, 60]},
    "no shift": {"shift": [0, 60, 0]},
    "sharp on one slot": {"shift": [0, 60, 0], "sharpening": 60},
    "sharp by content": dict.fromkeys(GATES[:3], 60),
    "sharp on the past": {**PAST_ONLY, "sharpening": 60},
    "all on": dict.fromkeys(GATES, 60),
    "all off": dict.fromkeys(GATES, -60),
}
ONE_HOT = {"initial_weighting": "constant", "initial_memory": "random"}
# An all-zero weighting comes from a number and is not learned. The gradient of
# sharpening there is that of the logarithm at its epsilon.
NOWHERE = {"initial_weighting": 0.0, "initial_memory": "random"}

NTM = Entry(
    "ntm",
    keras_memory.NTMLayer,
    {"memory_slots": 11, "slot_size": 5, "controller_units": 7},
    invariants={
        sums_to_one: "read_weighting write_weighting content_weighting shift",
        sums_to_at_most_one: "retroactive_weighting",
        is_share: "interpolation_gate erase_vector",
        is_positive: "strength",
        is_at_least_one: "sharpening",
    },
    learned="initial_memory initial_reads initial_weighting "
    "initial_controller_state",
    weightings=[
        *(
            Point(
                name,
                {"read_heads": 2, "write_heads": 3, "head_order": order},
                without="retroactive_weighting",
                slow=True,
            )
            for name, order in (("parallel", "parallel"), ("in turn", IN_TURN))
        ),
        Point(
            "sequential",
            {
                "slot_size": 4,
                "writing": "sequential",
                "retroactive_discount": 0.7,
            },
            without="erase_vector",
            slow=True,
        ),
    ],
    gradients=[
        Point("heads", {"read_heads": 2, "write_heads": 3, "shift_range": 2}),
        Point(
            "writes in turn",
            {"write_heads": 3, "head_order": "writes_in_turn"},
            slow=True,
        ),
        Point(
            "in turn",
            {
                "write_heads": 2,
                "head_order": ("write", "read", "write"),
                "controller": "gru",
                "strength_activation": "oneplus",
                "product_epsilon": 0.2,
            },
        ),
        Point(
            "content",
            {
                "addressing": "content",
                "erase": False,
                "controller": "dense",
                "controller_layers": 2,
                "activation": "tanh",
            },
            without="read_weighting write_weighting",
        ),
        Point(
            "unprojected",
            {
                "controller": "rnn",
                "interface_clip": 1.5,
                "norm_epsilon": 0.1,
                "units": None,
            },
        ),
        Point(
            "sequential",
            {
                "read_heads": 2,
                "slot_size": 4,
                "memory_slots": 3,
                "writing": "sequential",
                "retroactive_discount": 0.7,
            },
            without="usage",  # which only chooses a slot
        ),
        Point(
            "sequential, content",
            {
                "memory_slots": 3,
                "writing": "sequential",
                "addressing": "content",
                "head_order": ("write", "read"),
                "erase": False,
            },
            without="read_weighting write_weighting "
            "retroactive_weighting usage",
        ),
    ],
    saturated=[
        *(
            Point(name, {"read_heads": 2}, bias)
            for name, bias in NTM_SATURATED.items()
        ),
        *(
            point
            for name in ("all on", "all off", "sharp on one slot")
            for point in with_dtypes(MIXED, name, {}, NTM_SATURATED[name])
        ),
    ],
    singular=[
        *with_dtypes(ALL_SIZES, "default"),
        *with_dtypes(
            ALL_SIZES, "one slot", {"memory_slots": 1, "shift_range": 0}
        ),
        Point(
            "one slot, learned start",
            {
                "memory_slots": 1,
                "shift_range": 0,
                "initial_weighting": "learned",
            },
        ),
        Point(
            "one slot by content", {"memory_slots": 1, "addressing": "content"}
        ),
        *with_dtypes(ALL_SIZES, "zero memory", {"initial_memory": 0.0}),
        Point(
            "zero memory, added only", {"initial_memory": 0.0, "erase": False}
        ),
        Point("equal slots", {"initial_memory": 0.5}),
        Point("tiny memory", {"initial_memory": 1e-30}),
        Point("one-hot start", ONE_HOT, PAST_ONLY),
        Point("one-hot start, sharp", ONE_HOT, {**PAST_ONLY, "sharpening": 60}),
        Point(
            "nowhere at the start",
            {"initial_weighting": 0.0},
            bounds=(1e2, None),
        ),
        Point(
            "nowhere, gate nearly shut",
            NOWHERE,
            {"interpolation_gate": -15},
            bounds=(1e2, None),
        ),
        *with_dtypes(
            ALL_SIZES,
            "nowhere, gate shut",
            NOWHERE,
            {"interpolation_gate": -60},
            bounds=(1e2, None),
        ),
        Point("in turn", {"head_order": ("write", "read")}),
    ],
    zeros=with_dtypes(ALL_SIZES, "default", {"initial_memory": 0.0}),
    sixteen_bits=[
        point
        for dtypes in (("float16", "bfloat16"), MIXED)
        for point in (
            *with_dtypes(dtypes, "zero memory", {"initial_memory": 0.0}),
            *with_dtypes(dtypes, "content", {"addressing": "content"}),
        )
    ],
)


# The Differentiable Neural Computer.

ALL_IN_ONE = {
    "content_masks": True,
    "link_sharpening": True,
    "deallocation": True,
    "interface_layer_norm": True,
    "key_activation": "tanh",
    "strength_activation": "softplus",
}
MASKS = ("read_mask", "write_mask")
SHARPENINGS = ("forward_sharpening", "backward_sharpening")
OF_OPTIONS = " ".join([*MASKS, *SHARPENINGS])
OF_LINKS = "linkage precedence forward_weighting backward_weighting read_mode"
FULL_AND_FREED = {
    "write_gate": 1,
    "allocation_gate": 1,
    "free_gate": 1,
    "read_mode": [1, 0, 0],
}
GATES_AND_STRENGTHS = dict.fromkeys(
    "read_strength write_strength free_gate allocation_gate write_gate "
    "erase_vector forward_sharpening backward_sharpening".split(),
    1,
)
THREE_SLOTS = {"memory_slots": 3, "initial_memory": "random"}


def largest_links(linkage, count):
    """The largest entries of each row, and their columns."""
    columns = np.argsort(-linkage, axis=-1)[..., :count]
    return np.take_along_axis(linkage, columns, axis=-1), columns


def dnc_states(layer, seed=13, batch=BATCH):
    """Nonzero states like those in the middle of a sequence."""
    rng = np.random.default_rng(seed)
    records = layer.cell.layout.records

    def weighting(shape, total=0.9):
        return total * reference.softmax(rng.normal(size=(batch, *shape)))

    def of(record):
        slots = record.usage.shape[0]
        linkage = precedence = columns = ()
        if record.linkage != ():
            heads = record.linkage.shape[0]
            linkage = weighting((heads, slots, slots)) / slots
            linkage = linkage * (1.0 - np.eye(slots))
            precedence = weighting((heads, slots), 0.8)
        if record.link_columns != ():
            linkage, columns = largest_links(
                linkage, record.link_columns.shape[-1]
            )
        return keras_memory.DNCState(
            reads=rng.normal(size=(batch, *record.reads.shape)),
            memory=rng.normal(size=(batch, *record.memory.shape)),
            usage=rng.uniform(size=(batch, slots)),
            linkage=linkage,
            precedence=precedence,
            read_weighting=weighting(record.read_weighting.shape),
            write_weighting=weighting(record.write_weighting.shape),
            controller=keras.tree.map_structure(
                lambda initial: 0.5 * rng.normal(size=(batch, *initial.shape)),
                record.controller,
            ),
            link_columns=columns,
        )

    made = tuple(of(record) for record in records)
    return layer.cell.pack_state(made if len(made) > 1 else made[0])


def dnc_saturated(name, parts, sign=1, size=1e4, options=THREE_SLOTS, **kwargs):
    """A point with parts of the interface far from 0."""
    switches = {
        "content_masks": any(part in MASKS for part in parts),
        "link_sharpening": any(part in SHARPENINGS for part in parts),
    }
    bias = {part: sign * size * np.array(one) for part, one in parts.items()}
    return Point(f"{name} {sign:+}", {**options, **switches}, bias, **kwargs)


DNC = Entry(
    "dnc",
    keras_memory.DNCLayer,
    {
        "memory_slots": 11,
        "slot_size": 5,
        "read_heads": 2,
        "controller_units": 7,
    },
    invariants={
        sums_to_one: "read_content_weighting write_content_weighting read_mode",
        sums_to_at_most_one: "read_weighting write_weighting precedence "
        "allocation_weighting forward_weighting backward_weighting",
        are_links: "linkage",
        is_share: "usage retention free_gate allocation_gate write_gate "
        "read_mask write_mask erase_vector",
        is_positive: "read_strength write_strength",
        is_at_least_one: "forward_sharpening backward_sharpening",
    },
    learned="initial_memory initial_controller_state",
    states=dnc_states,
    no_gradient="link_columns",
    not_tiny="linkage",
    gradient_time=4,
    weightings=[
        Point("default", without=OF_OPTIONS),
        Point("heads", {"write_heads": 3}, without=OF_OPTIONS),
        Point("all options", {"write_heads": 2, **ALL_IN_ONE}),
        Point(
            "no linkage",
            {"num_layers": 2, "linkage": False},
            without=f"{OF_OPTIONS} {OF_LINKS}",
            slow=True,
        ),
        Point("two layers", {"num_layers": 2}, without=OF_OPTIONS, slow=True),
    ],
    gradients=[
        Point(
            "all options",
            {"write_heads": 2, "controller": "gru", **ALL_IN_ONE},
        ),
        Point(
            "sparse links",
            {"sparse_links": 3, "write_heads": 2, "controller": "dense"},
        ),
        Point(
            "two memories",
            {"num_layers": 2, "share_memory": False, "controller": "rnn"},
            # The first block sees the reads of the last block.
            without="reads",
            slow=True,
        ),
        Point(
            "no linkage",
            {
                "num_layers": 2,
                "linkage": False,
                "controller": "dense",
                "product_epsilon": 0.2,
                "norm_epsilon": 0.1,
            },
            slow=True,
        ),
    ],
    saturated=[
        *(
            dnc_saturated(part, {part: 1}, sign)
            for parts, signs in (
                ("read_strength write_gate free_gate write_mask", (1, -1)),
                ("read_key write_key write_strength erase_vector", (1,)),
                ("allocation_gate read_mask", (1,)),
                ("forward_sharpening backward_sharpening", (1,)),
            )
            for part in parts.split()
            for sign in signs
        ),
        # Add vectors of 1e4 give outputs of 1e4, which the loss squares.
        dnc_saturated("add_vector", {"add_vector": 1}, bounds=(1e9, 1e9)),
        dnc_saturated("reads by content", {"read_mode": [0, 1, 0]}),
        dnc_saturated("reads go forward", {"read_mode": [0, 0, 1]}),
        dnc_saturated(
            "all written to free slots",
            {"write_gate": 1, "allocation_gate": 1, "free_gate": -1},
        ),
        dnc_saturated("all full and freed", FULL_AND_FREED),
        dnc_saturated("all gates and strengths", GATES_AND_STRENGTHS),
        *(
            dnc_saturated(
                name, parts, sign, 60, {"memory_slots": 3}, dtype=dtype
            )
            for name, parts in (
                ("all full and freed", FULL_AND_FREED),
                ("all gates and strengths", GATES_AND_STRENGTHS),
            )
            for sign in (1, -1)
            for dtype in MIXED
        ),
    ],
    singular=[
        Point("default"),
        Point("several heads", {"write_heads": 3}),
        *with_dtypes(ALL_SIZES, "one slot", {"memory_slots": 1}),
        Point("one slot, all options", {"memory_slots": 1, **ALL_IN_ONE}),
        Point("slots of width one", {"slot_size": 1}),
        Point("equal slots", {"initial_memory": 0.5}),
        Point("tiny memory", {"initial_memory": 1e-30}),
        *with_dtypes(
            ("float32", "mixed_float16"),
            "all options",
            {"write_heads": 2, **ALL_IN_ONE},
        ),
        Point("no linkage", {"linkage": False}),
        *with_dtypes(
            ("float32", "mixed_float16"),
            "sparse links",
            {"sparse_links": 3, "write_heads": 2},
        ),
        Point("sparse links, one slot", {"sparse_links": 1, "memory_slots": 1}),
    ],
    zeros=[
        *with_dtypes(ALL_SIZES, "default", {"initial_memory": 0.0}),
        # The gradient of the cosine at zero is at most 1 / norm_epsilon.
        *(
            Point(
                "all options",
                ALL_IN_ONE,
                dtype=dtype,
                bounds=(1e4, 1e9),
                slow=dtype != "mixed_float16",
            )
            for dtype in ALL_SIZES
        ),
    ],
    sixteen_bits=[
        *with_dtypes(("float16", "bfloat16"), "default"),
        *with_dtypes(MIXED, "all options", ALL_IN_ONE),
    ],
)


# Sparse Access Memory.

SAM_GATES = ("strength", "write_gate", "interpolation_gate")
SAM_SATURATED = {
    f"{part} {value:+}": {part: value}
    for part in ("key", *SAM_GATES, "add_vector")
    for value in (60, -60)
} | {
    "all on": dict.fromkeys(SAM_GATES, 60),
    "all off": dict.fromkeys(SAM_GATES, -60),
}
ONE_SLOT = {"memory_slots": 1, "top_k": 1}

SAM = Entry(
    "sam",
    keras_memory.SAMLayer,
    {
        "memory_slots": 11,
        "slot_size": 5,
        "read_heads": 2,
        "top_k": 3,
        "controller_units": 7,
    },
    invariants={
        sums_to_at_most_one: "read_weights write_weights",
        is_share: "write_gate interpolation_gate",
        is_positive: "strength",
    },
    learned="initial_controller_state",
    no_gradient="norms last_access block_access read_slots time",
    weightings=[
        Point("default"),
        Point("few slots", {"memory_slots": 3}),
        Point("two layers", {"num_layers": 2}, slow=True),
    ],
    gradients=[
        Point("default"),
        Point(
            "two layers, few slots",
            {
                "num_layers": 2,
                "memory_slots": 4,
                "controller": "gru",
                "key_activation": "tanh",
                "strength_activation": "softplus",
                "norm_epsilon": 0.1,
            },
        ),
        Point(
            "two memories",
            {"num_layers": 2, "share_memory": False, "controller": "dense"},
            without="reads",
            slow=True,
        ),
        Point("one slot", {**ONE_SLOT, "units": None}, slow=True),
    ],
    saturated=[
        *(
            # Add vectors of 60 are read as they are.
            Point(name, {}, bias, bounds=(1e5 if "add" in name else 1e2, 1e4))
            for name, bias in SAM_SATURATED.items()
        ),
        *(
            point
            for name in ("all on", "all off")
            for point in with_dtypes(MIXED, name, {}, SAM_SATURATED[name])
        ),
    ],
    singular=[
        *with_dtypes(ALL_SIZES, "default"),
        *with_dtypes(ALL_SIZES, "one slot", ONE_SLOT),
        Point("slots of width one", {"slot_size": 1}),
        Point("every slot is read", {"memory_slots": 3}),
    ],
    zeros=with_dtypes(ALL_SIZES, "default"),
    sixteen_bits=[
        *with_dtypes(("float16", "bfloat16"), "default"),
        *with_dtypes(MIXED, "few slots", {"memory_slots": 3}),
    ],
)

# The sparse DNC. What does not depend on links is tested with SAM.

SDNC_ALL = {
    f"all {word}": {**dict.fromkeys(SAM_GATES, value), "read_mode": modes}
    for word, value, modes in (
        ("on, forward", 60, (-60, -60, 60)),
        ("off, backward", -60, (60, -60, -60)),
    )
}
ONE_LINK = {**ONE_SLOT, "sparse_links": 1}

SDNC = dataclasses.replace(
    SAM,
    name="sdnc",
    layer=keras_memory.SDNCLayer,
    sizes={**SAM.sizes, "sparse_links": 3},
    invariants={
        **SAM.invariants,
        sums_to_at_most_one: "read_weights write_weights precedence_weights "
        "link_weights content_weights forward_weights backward_weights",
        sums_to_one: "read_mode",
    },
    no_gradient=SAM.no_gradient + " predecessors link_weights successors "
    "precedence_slots precedence_weights",
    weightings=[
        Point("default"),
        Point("few slots", {"memory_slots": 3}, slow=True),
        Point("two layers", {"num_layers": 2}, slow=True),
    ],
    gradients=[],  # links have none: `test_sdnc.py` compares an oracle
    saturated=[Point(name, {}, bias) for name, bias in SDNC_ALL.items()],
    singular=[
        Point("default", dtype="mixed_float16"),
        Point("one slot", ONE_LINK),
        Point("every slot is read", {"memory_slots": 3}, slow=True),
    ],
    zeros=[Point("default")],
    sixteen_bits=[Point("default", dtype="float16")],
)

ENTRIES = [NTM, DNC, SAM, SDNC]
