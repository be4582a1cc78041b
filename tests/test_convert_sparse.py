"""Compares pytorch-dnc's Sparse Access Memory and Sparse DNC with ours piece by
piece, and converts their weights.

`test_convert_errors.py` tests the errors.
"""

import keras
import numpy as np
import pytest
from harness import close
from harness import golden
from harness import needs_tensorflow
from keras import ops
from test_convert_dnc import inputs_of
from test_convert_dnc import pytorch_weights
from test_convert_dnc import same_weights
from test_convert_dnc import stepped
from test_convert_dnc import swapped
from test_convert_dnc import trains_and_is_saved

import keras_memory
from keras_memory import cli
from keras_memory import convert
from keras_memory.addressing import content_weighting
from keras_memory.addressing import sparse
from keras_memory.addressing.activations import softmax
from keras_memory.convert.weights import NORM_EPSILON
from keras_memory.sam import SAMInterface

each_golden = pytest.mark.parametrize(
    "name", ["sam__a_head", "sam__a_v110", "sdnc__a_head", "sdnc__a_v110"]
)
SAM = {"sparse_reads": 3}
SDNC = {"sparse_reads": 3, "temporal_reads": 2}
each_memory = pytest.mark.parametrize("reads", [SAM, SDNC], ids=["sam", "sdnc"])
SHARED = "rnn_layer_memory_shared"
PRODUCT_EPSILON = 1e-6  # of the reference
START_OF_READ_MODES = 0.1, 0.8, 0.1  # backward, content, forward


class Record:
    """A recorded run: values of each step, (T, B, ...), and the interface."""

    def __init__(self, name):
        self.arrays, self.weights, self.meta = golden(name)
        self.heads, self.width = self.meta["read_heads"], self.meta["cell_size"]
        self.slots = self.meta["nr_cells"]
        kinds = "sparse_reads", "temporal_reads"
        self.reads = {n: self.meta[n] for n in kinds if n in self.meta}
        temporal_reads = self.reads.get("temporal_reads", 0)
        self.visible = self.heads * self.reads["sparse_reads"]
        self.visible += 2 * temporal_reads + 1

    def of_steps(self, part):
        return self.arrays[f"step.layer0.{part}"]

    def after(self, part):
        return self.of_steps(f"state.{part}")

    def before(self, part):
        initial = self.arrays[f"init.mem0.{part}"]
        return np.concatenate([initial[None], self.after(part)[:-1]])

    def interface(self):
        """Parts of the interface before their activations."""
        rows = self.of_steps("ctrl_out") @ (
            self.weights[f"{SHARED}.interface_weights.weight"].T
        )
        rows += self.weights[f"{SHARED}.interface_weights.bias"]
        sizes = [self.heads * self.width, self.width, self.visible, 1]
        assert sum(sizes) == rows.shape[-1]
        return np.split(rows, np.cumsum(sizes)[:-1], axis=-1)


def at(values, slots):
    """Values (..., N) at slots (..., c)."""
    return np.take_along_axis(values, slots, axis=-1)


# Pieces, at the slots of the record.


@each_golden
@needs_tensorflow
def test_writes_at_given_slots_equal_those_of_pytorch(name):
    """Not compared: which slots are visible, which of them are erased, and the
    links of an SDNC.

    In the reference each visible slot has an interpolation gate of its own. So
    each slot is compared with the write of a head that has read this slot only.
    """
    record = Record(name)
    _, write_vector, gates, write_gate = record.interface()
    slots = record.before("read_positions")
    read_weights = at(record.before("read_weights"), slots)
    read_weights[0] += 1.0  # as the reference does in its first step
    usage = at(record.before("usage"), slots)
    is_erased = usage == usage.min(axis=-1, keepdims=True)
    # Another slot to erase, for the slots that are not erased.
    erased = np.take_along_axis(
        slots, is_erased.argmax(axis=-1)[..., None], axis=-1
    )
    erased = np.where(is_erased, slots, erased)

    def each(values):
        """(T, B, ...), for each visible slot: (T B c, ...)."""
        values = np.repeat(values[:, :, None], record.visible, axis=2)
        return ops.convert_to_tensor(values.reshape(-1, *values.shape[3:]))

    def flat(values):
        """(T, B, c) -> (T B c, 1)."""
        return ops.convert_to_tensor(values.reshape(-1, 1))

    last_access = np.ones((slots.size, record.slots), "int32")
    np.put_along_axis(last_access, erased.reshape(-1, 1), 0, axis=1)
    cell = layer_of(record.reads)(
        3, record.slots, record.width, read_heads=1, top_k=1, dtype="float64"
    ).cell
    cell.build((None, 3))
    (state,) = cell.layout.unflatten(cell.get_initial_state(slots.size))
    state = state._replace(
        memory=each(record.before("memory")),
        last_access=ops.convert_to_tensor(last_access),
        read_slots=ops.cast(flat(slots), "int32")[:, None],
        read_weights=flat(read_weights)[:, None],
        time=ops.ones((slots.size, 1), "int32"),
    )
    interface = SAMInterface(
        key=np.ones((slots.size, record.width)),
        strength=np.ones((slots.size, 1)),
        add_vector=each(write_vector),
        write_gate=each(write_gate),
        interpolation_gate=flat(gates),
    )
    if "temporal_reads" in record.reads:
        interface = *interface, np.zeros((slots.size, 3))  # read modes
    (access,) = cell.accesses
    after, inside = access.step(ops.concatenate(interface, axis=-1), state)
    weights = sparse.sum_over_equal(
        inside["write_slots"], inside["write_weights"]
    )[:, 0]
    written = np.take_along_axis(
        ops.convert_to_numpy(after.memory), slots.reshape(-1, 1, 1), axis=1
    )
    expected = np.take_along_axis(
        record.after("memory"), slots[..., None], axis=2
    )
    # Of equal visible slots, the last one's write stays.
    stays = np.array(
        [
            slot not in visible[k + 1 :]
            for visible in slots.reshape(-1, record.visible)
            for k, slot in enumerate(visible)
        ]
    )
    assert 50 <= stays.sum() < slots.size and 0 < is_erased.mean() < 1
    close(written[stays, 0], expected.reshape(-1, record.width)[stays], 1e-10)
    expected = at(record.after("write_weights"), slots).reshape(-1)
    close(weights[stays], expected[stays], 1e-10)


@each_golden
@needs_tensorflow
def test_reads_of_given_slots_equal_those_of_pytorch(name):
    """Not compared: which slots are visible, and the product over heads of the
    read weights that the reference keeps.

    In the reference each head weighs the slots of all heads, and the product of
    the norms has an epsilon, which our cosines do not have.
    """
    record = Record(name)
    query, *_ = record.interface()
    shape = -1, record.heads, record.width
    query = ops.convert_to_tensor(query.reshape(shape))
    memory = record.after("memory").reshape(-1, record.slots, record.width)
    slots = record.after("read_positions").reshape(-1, record.visible)
    rows = sparse.take(ops.convert_to_tensor(memory), ops.cast(slots, "int32"))
    visible = record.after("visible_memory").reshape(rows.shape)
    close(rows, visible, 1e-10)
    of_heads = ops.repeat(rows[:, None], record.heads, axis=1)
    cosines = sparse.cosines(query, of_heads, NORM_EPSILON)
    norms = ops.norm(query, axis=-1)[:, :, None] * ops.norm(of_heads, axis=-1)
    weights = softmax(cosines * norms / (norms + PRODUCT_EPSILON))
    close(
        weights,
        ops.convert_to_numpy(
            content_weighting(
                ops.swapaxes(rows, 1, 2),
                query,
                ops.ones(query.shape[:2], query.dtype),
                NORM_EPSILON,
                PRODUCT_EPSILON,
            )
        ),
        1e-10,
    )
    reads = ops.sum(weights[:, :, :, None] * of_heads, axis=2)
    close(reads, record.after("read_vectors").reshape(shape), 1e-10)
    flat = record.of_steps("read_vectors_flat")
    close(ops.reshape(reads, flat.shape), flat, 1e-10)


# Converted layers.


def layer_of(reads):
    if "temporal_reads" in reads:
        return keras_memory.SDNCLayer
    return keras_memory.SAMLayer


def converted(reads, weights=None, memory_slots=11, read_heads=2, **kwargs):
    """reads: arguments of the converter, and by default of the weights."""
    weights = pytorch_weights(**reads) if weights is None else weights
    with pytest.warns(UserWarning, match="Not carried over") as warned:
        layer = convert.from_pytorch_dnc(
            weights, memory_slots, read_heads, **reads, **kwargs
        )
    (warning,) = warned
    assert warning.filename == __file__
    assert ("read modes" in str(warning.message)) == ("temporal_reads" in reads)
    assert type(layer) is layer_of(reads) and layer.built
    return layer


@each_golden
@needs_tensorflow
def test_a_converted_layer_has_the_interface_of_pytorch(name):
    """Within one call the reference's controller sees no reads, so that this
    holds at all steps. Not compared: the interpolation gate, a mean."""
    record = Record(name)
    layer = converted(
        record.reads,
        record.weights,
        record.slots,
        record.heads,
        dtype="float64",
    )
    x = ops.convert_to_tensor(record.arrays["x"])
    states = layer.cell.get_initial_state(len(x))
    (before,) = layer.cell.layout.unflatten(states)
    controller = tuple(record.arrays[f"init.ctrl_{n}.0"][0] for n in "hc")
    states = layer.cell.pack_state(before._replace(controller=(controller,)))
    _, _, inside = stepped(layer.cell, x, states, feedback=False)
    query, write_vector, gates, write_gate = record.interface()
    steps, batch, _ = query.shape
    mean = gates.mean(axis=-1, keepdims=True)
    read_modes = {}
    if "temporal_reads" in record.reads:  # the reference has none
        ones = np.ones((steps, batch, record.heads, 1))
        read_modes["read_mode"] = ones * START_OF_READ_MODES
    for part, expected in {
        "controller_output": record.of_steps("ctrl_out"),
        "key": query.reshape(steps, batch, record.heads, record.width),
        "strength": np.ones((steps, batch, record.heads)),
        "add_vector": write_vector,
        "write_gate": 1.0 / (1.0 + np.exp(-write_gate)),
        "interpolation_gate": 1.0 / (1.0 + np.exp(-mean)),
        **read_modes,
    }.items():
        close(inside[part], swapped(expected), 1e-10)
    features = np.concatenate(
        [record.of_steps("ctrl_out"), record.of_steps("read_vectors_flat")],
        axis=-1,
    )
    output = record.arrays["output"]
    if output.shape[:2] != (steps, batch):
        output = swapped(output)
    close(layer.cell.project(features), output, 1e-10)


@each_memory
def test_linears_may_be_apart(reads):
    weights = pytorch_weights(**reads)
    gates = 2 * 3 + 2 * reads.get("temporal_reads", 0) + 1
    parts = [10, 5, gates, 1]
    names = "read_query", "write_vector", "interpolation_gate", "write_gate"
    apart = {n: w for n, w in weights.items() if SHARED not in n}
    for end in ("weight", "bias"):
        whole = weights[f"{SHARED}.interface_weights.{end}"]
        assert len(whole) == sum(parts)
        split = np.split(whole, np.cumsum(parts)[:-1])
        for part, value in zip(names, split, strict=True):
            apart[f"{SHARED}.{part}_transform.{end}"] = value
    same_weights(converted(reads, weights), converted(reads, apart))


@pytest.mark.parametrize(
    ("sizes", "top_k"),
    [
        ({}, 3),
        ({"layers": 2, "shared": False, "sparse_reads": 1}, 1),
        ({"kind": "gru", "layers": 2, "hidden": 2}, 3),
        ({"kind": "rnn", "bias": False, "apart": True, "reads": 1}, 3),
        ({"sparse_reads": 11}, 11),
    ],
)
def test_sizes_are_those_of_the_weights(sizes, top_k):
    sizes = {"sparse_reads": 3, **sizes}
    heads = sizes.get("reads", 2)
    # The reference reads at most all slots.
    reads = {"sparse_reads": 100 if top_k == 11 else top_k}
    layer = converted(reads, pytorch_weights(**sizes), read_heads=heads)
    cell = layer.cell
    assert (cell.units, cell.slot_size, cell.top_k) == (3, 5, top_k)
    assert (cell.memory_slots, cell.read_heads) == (11, heads)
    assert len(cell.accesses) == sizes.get("layers", 1)
    assert len(cell.layout.records) == (1 if sizes.get("shared", True) else 2)
    x = inputs_of().astype("float32")
    assert layer(x).shape == (*x.shape[:2], 3)


@pytest.mark.parametrize(
    ("temporal_reads", "in_weights", "sparse_links"),
    [(1, 1, 2), (4, 4, 8), (6, 6, 11), (100, 11, 11)],
)
def test_links_are_those_of_the_reference(
    temporal_reads, in_weights, sparse_links
):
    """Twice as many as its temporal reads, of which it has at most one for each
    slot; and at most one for each of the layer's 11 slots."""
    weights = pytorch_weights(sparse_reads=3, temporal_reads=in_weights)
    reads = {"sparse_reads": 3, "temporal_reads": temporal_reads}
    layer = converted(reads, weights)
    assert (layer.top_k, layer.sparse_links) == (3, sparse_links)


@each_memory
def test_a_converted_layer_trains_and_is_saved(reads, tmp_path):
    trains_and_is_saved(converted(reads), inputs_of(steps=2), tmp_path)


@each_memory
def test_the_command_converts(reads, tmp_path, capsys):
    weights = pytorch_weights(**reads)
    np.savez(tmp_path / "weights.npz", **weights)
    files = [str(tmp_path / "weights.npz"), str(tmp_path / "sparse.keras")]
    options = ["--memory-slots=11", "--read-heads=2"]
    for name, value in reads.items():
        options.append(f"--{name.replace('_', '-')}={value}")
    with pytest.warns(UserWarning, match="Not carried over"):
        assert cli.main(["convert", "pytorch-dnc", *files, *options]) == 0
    name = layer_of(reads).__name__.removesuffix("Layer")
    told = f"{name} from 3 inputs to 3 outputs: 11 slots of 5, 2 read and 1"
    assert told in capsys.readouterr().out
    x = inputs_of().astype("float32")
    model = keras.models.load_model(tmp_path / "sparse.keras")
    expected = converted(reads, weights)(x)
    close(model(x), ops.convert_to_numpy(expected), 1e-6)
