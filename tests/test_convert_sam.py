"""Compares pytorch-dnc's Sparse Access Memory with ours piece by piece, and
converts its weights.

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
from keras_memory import SAMState
from keras_memory import cli
from keras_memory import convert
from keras_memory.addressing import content_weighting
from keras_memory.addressing import sparse
from keras_memory.addressing.activations import softmax
from keras_memory.convert.weights import NORM_EPSILON
from keras_memory.sam import SAMAccess
from keras_memory.sam import SAMInterface

each_golden = pytest.mark.parametrize("name", ["sam__a_head", "sam__a_v110"])
SHARED = "rnn_layer_memory_shared"
PRODUCT_EPSILON = 1e-6  # of the reference


class Record:
    """A recorded run: values of each step, (T, B, ...), and the interface."""

    def __init__(self, name):
        self.arrays, self.weights, self.meta = golden(name)
        self.heads, self.width = self.meta["read_heads"], self.meta["cell_size"]
        self.slots = self.meta["nr_cells"]
        self.visible = self.heads * self.meta["sparse_reads"] + 1

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
    """Not compared: which slots are visible, and which of them are erased.

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
    memory = record.before("memory")
    steps, batch, _ = slots.shape
    access = SAMAccess(record.slots, record.width, read_heads=1, top_k=1)
    items, compared = np.arange(batch), 0
    for t, j in np.ndindex(steps, record.visible):
        slot = slots[t, :, j]
        other = slots[t, items, is_erased[t].argmax(axis=-1)]
        last_access = np.ones((batch, record.slots), "int32")
        last_access[items, np.where(is_erased[t, :, j], slot, other)] = 0
        state = SAMState(
            reads=None,
            memory=ops.convert_to_tensor(memory[t]),
            norms=ops.ones((batch, record.slots)),
            block_access=ops.zeros((batch, 1), "int32"),
            last_access=ops.convert_to_tensor(last_access),
            read_slots=ops.cast(slot[:, None, None], "int32"),
            read_weights=ops.convert_to_tensor(
                read_weights[t, :, j, None, None]
            ),
            time=ops.ones((batch, 1), "int32"),
        )
        interface = SAMInterface(
            key=np.ones((batch, record.width)),
            strength=np.ones((batch, 1)),
            add_vector=write_vector[t],
            write_gate=write_gate[t],
            interpolation_gate=gates[t, :, j, None],
        )
        interface = ops.convert_to_tensor(np.concatenate(interface, axis=-1))
        after, inside = access.step(interface, state)
        weights = sparse.sum_over_equal(
            inside["write_slots"], inside["write_weights"]
        )
        # Of equal visible slots, the last one's write stays.
        for b in np.flatnonzero(~(slots[t, :, j + 1 :].T == slot).any(axis=0)):
            compared += 1
            close(
                after.memory[b, slot[b]],
                record.after("memory")[t, b, slot[b]],
                1e-10,
            )
            expected = record.after("write_weights")[t, b, slot[b]]
            close(weights[b, 0], expected, 1e-10)
    assert 50 <= compared < slots.size and 0 < is_erased.mean() < 1


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


def converted(weights=None, memory_slots=11, read_heads=2, **kwargs):
    weights = pytorch_weights(sparse_reads=3) if weights is None else weights
    kwargs = {"sparse_reads": 3, **kwargs}
    with pytest.warns(UserWarning, match="over: the interpolation gates of"):
        return convert.from_pytorch_dnc(
            weights, memory_slots, read_heads, **kwargs
        )


@each_golden
@needs_tensorflow
def test_a_converted_layer_has_the_interface_of_pytorch(name):
    """Within one call the reference's controller sees no reads, so that this
    holds at all steps. Not compared: the interpolation gate, a mean."""
    record = Record(name)
    layer = converted(
        record.weights,
        record.slots,
        record.heads,
        sparse_reads=record.meta["sparse_reads"],
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
    for part, expected in {
        "controller_output": record.of_steps("ctrl_out"),
        "key": query.reshape(steps, batch, record.heads, record.width),
        "strength": np.ones((steps, batch, record.heads)),
        "add_vector": write_vector,
        "write_gate": 1.0 / (1.0 + np.exp(-write_gate)),
        "interpolation_gate": 1.0 / (1.0 + np.exp(-mean)),
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


def test_linears_may_be_apart():
    weights = pytorch_weights(sparse_reads=3)
    parts = [10, 5, 7, 1]
    names = "read_query", "write_vector", "interpolation_gate", "write_gate"
    apart = {n: w for n, w in weights.items() if SHARED not in n}
    for end in ("weight", "bias"):
        whole = weights[f"{SHARED}.interface_weights.{end}"]
        split = np.split(whole, np.cumsum(parts)[:-1])
        for part, value in zip(names, split, strict=True):
            apart[f"{SHARED}.{part}_transform.{end}"] = value
    same_weights(converted(weights), converted(apart))


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
    layer = converted(
        pytorch_weights(**sizes),
        read_heads=heads,
        # The reference reads at most all slots.
        sparse_reads=100 if top_k == 11 else top_k,
    )
    assert isinstance(layer, keras_memory.SAMLayer) and layer.built
    cell = layer.cell
    assert (cell.units, cell.slot_size, cell.top_k) == (3, 5, top_k)
    assert (cell.memory_slots, cell.read_heads) == (11, heads)
    assert len(cell.accesses) == sizes.get("layers", 1)
    assert len(cell.layout.records) == (1 if sizes.get("shared", True) else 2)
    x = inputs_of().astype("float32")
    assert layer(x).shape == (*x.shape[:2], 3)


def test_a_converted_layer_trains_and_is_saved(tmp_path):
    trains_and_is_saved(converted(), inputs_of(steps=3), tmp_path)


def test_the_command_converts(tmp_path, capsys):
    weights = pytorch_weights(sparse_reads=3)
    np.savez(tmp_path / "weights.npz", **weights)
    files = [str(tmp_path / "weights.npz"), str(tmp_path / "sam.keras")]
    options = "--memory-slots=11 --read-heads=2 --sparse-reads=3".split()
    with pytest.warns(UserWarning, match="Not carried over"):
        assert cli.main(["convert", "pytorch-dnc", *files, *options]) == 0
    told = "SAM from 3 inputs to 3 outputs: 11 slots of 5, 2 read and 1 write"
    assert told in capsys.readouterr().out
    x = inputs_of().astype("float32")
    model = keras.models.load_model(tmp_path / "sam.keras")
    close(model(x), ops.convert_to_numpy(converted(weights)(x)), 1e-6)
