"""One case for each public layer, and for each option that deserves a run.

`harness.py` has the checks that every layer must pass. Sizes are different
primes, so that a transposed axis fails.
"""

import dataclasses

import keras
import pytest
import toy

import keras_memory
from keras_memory.recurrent import cells


@dataclasses.dataclass(frozen=True, eq=False)  # a key of `harness.ran`
class Case:
    """A recurrent layer to test.

    Args:
        name: str, the test's name.
        layer: class of the layer.
        kwargs: dict of its arguments; a callable value is called for each
            new layer, where it must not be shared.
        input_shape: (B, T, D).
        output_size: width of the output.
    """

    name: str
    layer: type
    kwargs: dict
    input_shape: tuple = (2, 7, 5)
    output_size: int = 3

    def make(self, **more):
        return self._make({"return_sequences": True}, more)

    def _make(self, defaults, more):
        kwargs = {
            key: value() if callable(value) else value
            for key, value in self.kwargs.items()
        }
        return self.layer(**{**defaults, **kwargs, **more})

    def inputs(self, rng):
        return rng.normal(size=self.input_shape).astype("float32")

    def few_inputs(self, rng):
        """Inputs of four time steps, for checks that gain nothing from more."""
        return self.inputs(rng)[:, :4]

    def entry(self):
        return keras.Input((None, self.input_shape[-1]))

    def free_shapes(self, batch, time):
        return (batch, time, self.input_shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class WrapCase(Case):
    """A layer that takes encodings and a memory."""

    input_shape: tuple = ((3, 5), (7, 5))

    def make(self, **more):
        return self._make({"units": self.output_size}, more)

    def inputs(self, rng):
        return [
            rng.normal(size=shape).astype("float32")
            for shape in self.input_shape
        ]

    few_inputs = inputs

    def entry(self):
        return [keras.Input(shape[1:]) for shape in self.input_shape]

    def free_shapes(self, batch, time):
        encodings, memory = self.input_shape
        return [(batch, *encodings[1:]), (time, *memory[1:])]


def own_cell():
    return toy.PlainCell(13)


def stacked_cells():
    return keras.layers.StackedRNNCells(
        [
            keras.layers.GRUCell(7),
            cells.PeepholeLSTMCell(3),
            cells.NASCell(5, projection=13),
        ]
    )


def feed_forward():
    return toy.feed_forward(13)


def maker(prefix, layer, **sizes):
    """A function that makes cases of a layer: (name, output_size, **kwargs)."""

    def make(name, output_size=3, **kwargs):
        kwargs = {"units": 3, **sizes, **kwargs}
        return Case(f"{prefix}-{name}", layer, kwargs, output_size=output_size)

    return make


ntm = maker(
    "ntm",
    keras_memory.NTMLayer,
    memory_slots=11,
    slot_size=5,
    controller_units=13,
)
dnc = maker(
    "dnc",
    keras_memory.DNCLayer,
    memory_slots=7,
    slot_size=5,
    read_heads=2,
    controller_units=11,
)
sam = maker(
    "sam",
    keras_memory.SAMLayer,
    memory_slots=11,
    slot_size=5,
    read_heads=2,
    top_k=3,
    controller_units=13,
)
sdnc = maker(
    "sdnc",
    keras_memory.SDNCLayer,
    memory_slots=5,  # fewer than steps, so slots are written again
    slot_size=5,
    read_heads=2,
    top_k=2,
    sparse_links=3,
    controller_units=13,
)

CASES = [
    ntm("default"),
    ntm(
        "writes-in-turn-learned-start",
        read_heads=2,
        write_heads=3,
        head_order="writes_in_turn",
        controller="gru",
        initial_memory="learned",
        initial_reads="learned",
        initial_weighting="learned",
        initial_controller_state="learned",
    ),
    ntm(
        "heads-in-turn-random-start",
        read_heads=2,
        write_heads=2,
        head_order=("read", "write", "read", "write"),
        shift_range=2,
        initial_memory="random",
        initial_reads="random",
        initial_weighting="random",
        initial_controller_state="random",
    ),
    ntm(
        "content-dense",
        addressing="content",
        erase=False,
        num_layers=2,
        share_memory=False,
        controller="dense",
        controller_layers=2,
    ),
    ntm(
        "clips-dropout",
        controller="layer_norm_rnn",
        controller_layers=2,
        controller_dropout=0.3,
        interface_clip=2.0,
        clip_value=1.0,
        controller_clip=0.7,
        controller_state_clip=0.9,
        activation="sigmoid",
        key_activation="linear",
        add_activation="linear",
        strength_activation="oneplus",
        product_epsilon=1e-6,
        norm_epsilon=1e-4,
    ),
    ntm(
        "merlin",
        controller="layer_norm_lstm",
        slot_size=6,
        memory_slots=5,  # fewer than steps, so slots are overwritten
        read_heads=2,
        addressing="content",
        writing="sequential",
        retroactive_discount=0.7,
        initial_memory=0.0,
    ),
    ntm("unprojected-own-cell", 18, units=None, controller=own_cell),
    ntm("stacked-cells", controller=stacked_cells),
    ntm("feed-forward", controller=feed_forward),
    dnc("default", initial_memory="learned"),
    dnc(
        "all-options",
        write_heads=3,
        content_masks=True,
        deallocation=True,
        link_sharpening=True,
        interface_layer_norm=True,
        bypass_dropout=0.3,
        initial_memory="random",
    ),
    dnc(
        "two-layers-as-pytorch-dnc",
        num_layers=2,
        controller="gru",
        controller_layers=2,
        controller_dropout=0.3,
        controller_clip=0.7,
        key_activation="tanh",
        add_activation="tanh",
        strength_activation="softplus",
        product_epsilon=1e-6,
    ),
    dnc(
        "two-memories-as-deepmind",
        num_layers=2,
        share_memory=False,
        write_heads=2,
        usage_gradient=False,
        controller_clip=0.7,
        controller_state_clip=0.9,
        clip_value=1.0,
        norm_epsilon=1e-6,
        usage_epsilon=1e-5,
    ),
    dnc(
        "sparse-links",
        sparse_links=3,
        write_heads=2,
        controller="dense",
        initial_memory="random",
    ),
    dnc("no-linkage", linkage=False, controller="dense", initial_memory=1e-6),
    sam("default"),
    sam(
        "all-options-few-slots",
        memory_slots=4,  # fewer than steps, so slots are written again
        num_layers=2,
        controller="dense",
        access_threshold=0.2,
        key_activation="tanh",
        add_activation="tanh",
        strength_activation="softplus",
        norm_epsilon=1e-4,
    ),
    sdnc("default"),
    Case(
        "memory-rnn",
        keras_memory.MemoryRNN,
        {"cell": lambda: keras_memory.NTMCell(3, 11, 5, controller_units=13)},
    ),
    Case("two-blocks", toy.ToyLayer, {"units": 3, "controller_units": 7}),
    Case(
        "two-blocks-one-memory",
        toy.ToyLayer,
        {"units": 3, "controller_units": 7, "share_memory": True},
    ),
]


def dense(units):
    return lambda: keras.layers.Dense(units)


def einsum():
    return keras.layers.EinsumDense("ij,jk->ik", 3, bias_axes="k")


def two_layers():
    return keras.Sequential(
        [keras.layers.Dense(11, "tanh"), keras.layers.Dense(3)]
    )


WRAPS = [
    WrapCase("wrap-default", keras_memory.MemoryWrapLayer, {}),
    WrapCase(
        "wrap-dense-head",
        keras_memory.MemoryWrapLayer,
        {"head": "dense", "classifier": two_layers},
    ),
    WrapCase(
        "wrap-dot-nearest",
        keras_memory.MemoryWrapLayer,
        {
            "similarity": "dot",
            "head": dense(2),
            "classifier": einsum,
            "top_k": 2,
        },
    ),
    WrapCase("baseline-default", keras_memory.BaselineMemory, {}),
    WrapCase(
        "baseline-linear",
        keras_memory.BaselineMemory,
        {"similarity": "l2", "classifier": dense(3), "top_k": 4},  # no head:
        # its bias moves all encodings alike and would have no gradient
    ),
    WrapCase(
        "wrap-classifier",
        keras_memory.MemoryWrapClassifier,
        {"encoder": dense(2), "memory_size": 7, "head": dense(4)},
    ),
    WrapCase(
        "wrap-classifier-baseline",
        keras_memory.MemoryWrapClassifier,
        {"encoder": dense(4), "memory_size": 7, "baseline": True},
    ),
]


@dataclasses.dataclass(frozen=True)
class OtherCase:
    """A layer with other inputs or outputs. `test_retrieval`, `test_esm` and
    `test_scann_index` have the remaining checks of the harness."""

    name: str
    layer: type
    kwargs: dict

    def make(self):
        return self.layer(**self.kwargs)


ESM = {
    "height": 6,
    "width": 10,
    "feature_channels": 2,
    "depth_limits": [0.1, 5.0],
    "variance_limits": [0.01, 100.0],
    "depth_prior": 1.0,
    "feature_prior": 0.1,
    "smooth_kernel_size": None,
    "depth_buffer": False,
}

OTHERS = [
    OtherCase(
        "knn-memory-layer",
        keras_memory.KNNMemoryLayer,
        {
            "memory_size": 11,
            "top_k": 5,
            "similarity": "l2",
            "search_method": "auto",
            "target_recall": 0.8,
            "write": "always",
            "memory_dtype": "bfloat16",
            "value_dtype": "float16",
        },
    ),
    OtherCase(
        "scann-index",
        keras_memory.ScannIndex,
        {
            "memory_size": 11,
            "top_k": 5,
            "value_dim": 3,
            "similarity": "cosine",
            "target_recall": 0.8,
            "exact": True,
        },
    ),
    OtherCase(
        "relative-position-bias",
        keras_memory.RelativePositionBias,
        {"num_heads": 3, "num_buckets": 8, "max_distance": 20},
    ),
    OtherCase(
        "causal-attention",
        keras_memory.CausalAttention,
        {
            "num_heads": 3,
            "key_dim": 5,
            "value_dim": 2,
            "output_dim": 4,
            "xl_size": 7,
            "multi_query": False,
            "position_bias": None,
            "dropout": 0.1,
            "use_bias": True,
            "use_output_bias": True,
            "output_gate": True,
            "stateful": True,
            "return_state": True,
        },
    ),
    OtherCase(
        "knn-attention",
        keras_memory.KNNAttention,
        {
            "num_heads": 3,
            "key_dim": 5,
            "memory_size": 11,
            "top_k": 7,
            "mixing": "informed_gate",
            "similarity": "dot",
            "memory_dropout": 0.1,
            "search_method": "exact",
            "target_recall": 0.8,
            "memory_dtype": "bfloat16",
            "position_bias": "t5",
        },
    ),
    OtherCase(
        "memorizing-transformer",
        keras_memory.MemorizingTransformer,
        {
            "num_tokens": 11,
            "dim": 7,
            "depth": 3,
            "memorizing_layers": [1, 3],
            "memory_size": 13,
            "top_k": 5,
            "xl_size": 2,
            "xl_layers": [2],
            "pad_id": 0,
            "stateful": False,
        },
    ),
    OtherCase("esm-layer", keras_memory.ESMLayer, {**ESM, "stateful": True}),
    OtherCase("esm-cell", keras_memory.ESMCell, ESM),
]

# One case for each layer. The sparse DNC is a SAM with one more part in a step:
# most of what depends on the layer is tested with SAM.
LAYERS = list(
    {
        case.layer: case
        for case in reversed([*CASES, *WRAPS])
        if case.layer is not keras_memory.SDNCLayer
    }.values()
)


# Cases whose numbers `.ci/run` compares on every backend.
PLAIN = [case for case in CASES if case.name in ("ntm-default", "dnc-default")]


def slow_unless(first, *values):
    return pytest.param(*values, marks=() if first else pytest.mark.slow)


def few_backends_unless(first, *values, marks=()):
    marks = (*marks, *(() if first else (pytest.mark.few_backends,)))
    return pytest.param(*values, marks=marks)


def name_of(value):
    return getattr(value, "name", value)


# Parametrizes slow checks that hardly depend on the options: one case of each
# layer always runs, the others with `-m slow`.
each_case = pytest.mark.parametrize("case", CASES, ids=name_of)
of_layers = [slow_unless(case in LAYERS, case) for case in CASES]
of_wraps = [slow_unless(case in LAYERS, case) for case in WRAPS]
each_layer = pytest.mark.parametrize("case", of_layers, ids=name_of)

# Cases whose parts occur in other cases too, and whose options change neither
# weights nor states.
COVERED = "dnc-two-layers-as-pytorch-dnc", "ntm-heads-in-turn-random-start"
LIKE_SAM = ("sdnc-default",)
OF_OPTIONS = "ntm-content-dense", "ntm-clips-dropout", "dnc-all-options"


def each_case_without(*names):
    cases = [slow_unless(case.name not in names, case) for case in CASES]
    return pytest.mark.parametrize("case", cases, ids=name_of)


each_shape = each_case
each_structure = each_case_without(*COVERED, *LIKE_SAM)
each_state = each_case_without(*COVERED, *OF_OPTIONS, *LIKE_SAM)
if keras.backend.backend() in ("jax", "torch"):
    # `test_same_numbers` compares outputs, states and gradients of each case.
    each_shape = each_structure = each_state = each_layer
