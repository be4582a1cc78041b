"""Correct uses, in which a type checker finds nothing; they run, too."""

import pathlib
from typing import Any
from typing import assert_type

import keras
import numpy as np

import keras_memory
from keras_memory import DNCCell
from keras_memory import DNCLayer
from keras_memory import ESMLayer
from keras_memory import KNNMemory
from keras_memory import NTMCell
from keras_memory import NTMLayer
from keras_memory import SAMLayer
from keras_memory import SDNCLayer
from keras_memory import callbacks
from keras_memory import convert
from keras_memory import geometry
from keras_memory import losses
from keras_memory import rooms
from keras_memory import tasks

x = np.ones((2, 5, 4), "float32")

# Recurrent layers and their cells.

ntm = NTMLayer(
    3,
    memory_slots=7,
    slot_size=5,
    head_order=("read", "write"),
    controller=keras.layers.GRUCell(4),
    activation=keras.activations.sigmoid,
    initial_memory=0.5,
    return_sequences=True,
    name="ntm",
    dtype="float32",
)
assert_type(ntm, NTMLayer)
assert_type(ntm.cell, NTMCell)
assert_type(ntm.memory_slots, int)
assert_type(ntm.cell.slot_size, int)
assert_type(ntm.units, int | None)
assert_type(ntm.clip_value, float | None)
assert_type(ntm.return_sequences, bool)
assert_type(ntm.time_loop, str | None)
y = ntm(x, mask=np.ones((2, 5), bool), use_memory=True)
assert_type(ntm.cell.get_initial_state(2), list[Any])
assert_type(NTMCell(None, 7, 5, writing="sequential"), NTMCell)
assert_type(NTMLayer.from_config(ntm.get_config()), NTMLayer)

dnc = DNCLayer(3, 7, 5, 2, sparse_links=2, num_layers=2, stateful=True)
assert_type(dnc.cell, DNCCell)
assert_type(dnc.sparse_links, int | None)
assert_type(dnc.num_layers, int)
dnc(x)
dnc.reset_state()
assert_type(dnc.reset_memory(rows=[True, False]), list[Any])


def converted(weights: dict[str, np.ndarray]) -> None:  # is not called
    assert_type(convert.from_pytorch_dnc(weights, 7, 2), DNCLayer)
    sam = convert.from_pytorch_dnc(weights, 7, 2, sparse_reads=3)
    assert_type(sam, SAMLayer)
    sdnc = convert.from_pytorch_dnc(
        weights, 7, 2, sparse_reads=3, temporal_reads=2
    )
    assert_type(sdnc, SDNCLayer)


class Mine(NTMLayer):
    """A layer of a user's own."""


assert_type(Mine(3, memory_slots=7).read_heads, int)

trace = keras_memory.trace(ntm, x)
assert_type(trace["memory"], np.ndarray)
assert trace["memory"].shape == (2, 5, 7, 5)
model = keras.Sequential([keras.Input((5, 4)), ntm])
outputs, traces = keras_memory.trace_model(model, x)
assert_type(traces, dict[str, dict[str, Any]])


class MyAccess:
    """An access of a user's own."""

    interface_size = 3
    read_size = 3

    @property
    def initial_state(self) -> keras_memory.NTMState:
        spec = keras_memory.StateSpec((1, 3), "learned")
        nothing = keras_memory.StateSpec((1, 1))
        return keras_memory.NTMState(spec, nothing, nothing, nothing)

    def step(self, interface: Any, state: Any) -> tuple[Any, dict[str, Any]]:
        return state._replace(reads=interface[:, None]), {}


access: keras_memory.Access = MyAccess()
cell = keras_memory.MemoryCell(2, [access], controller="dense", seed=1)
layer = keras_memory.MemoryRNN(cell, return_sequences=True)
assert_type(layer.cell, keras_memory.MemoryCell)
assert layer(x).shape == (2, 5, 2)

# Memories of pairs.

ring = keras_memory.RingMemory(key_dim=4, memory_size=3, value_dim=0)
state = ring.add(ring.initial_state(2), x)
assert_type(ring.search(state, x, top_k=2), keras_memory.Neighbours)
knn_layer = keras_memory.KNNMemoryLayer(10, top_k=2, write="always")
assert_type(knn_layer(x, x, x), keras_memory.Neighbours)

memory = KNNMemory(4, 3, num_rows=2, value_dim=0, search_method="exact")
assert_type(memory.add(x), np.ndarray)
assert_type(memory.search(x, top_k=1, rows=[0, 1]).mask, Any)
assert_type(memory.recall(top_k=1), float)
assert_type(memory.entries(row=1), tuple[np.ndarray, np.ndarray])

index = keras_memory.ScannIndex(memory_size=2, top_k=1, exact=True)
index.set_memory(np.eye(2, dtype="float32"))
assert_type(index(np.eye(2, dtype="float32")), keras_memory.Neighbours)

# Memory Wrap.

images = np.random.default_rng(1).random((12, 4, 4), "float32")
labels = np.arange(12) % 3
wrap = keras_memory.MemoryWrapLayer(3, head="dense", top_k=2, name="wrap")
wrap([images[:2, 0], images[2:, 0]])
keras_memory.BaselineMemory(3, classifier=keras.layers.Dense(3))
classifier = keras_memory.MemoryWrapClassifier(
    keras.layers.Flatten(), 3, memory_size=5, similarity="l2", seed=1
)
classifier.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
classifier.fit(images, labels, batch_size=6, verbose=0)
assert_type(classifier.predict(images, draws=2, verbose=0), np.ndarray)
classifier.set_memory(images, labels)
why = keras_memory.explanations.explain(classifier, images[:2])[0]
assert_type(why, keras_memory.explanations.Explanation)
assert_type(why.weights, np.ndarray)
assert_type(why.classes, np.ndarray)

# Where things are.

esm = ESMLayer(4, 8, feature_channels=3, smooth_kernel_size=None)
assert_type(esm.height, int)
assert_type(esm.get_initial_state(2), keras_memory.ESMMap)
room = rooms.Room(size=(6.0, 3.0, 5.0), boxes=[])
depth, color = room.render(np.eye(3, 4), height=3, width=4)
assert_type(depth, np.ndarray)
camera = {
    "depth": depth[None, None],
    "features": color[None, None],
    "inverse_intrinsics": rooms.right_angle(3, 4)[None],
}
motion = np.eye(3, 4, dtype="float32")[None, None]
state = esm.get_initial_state(1)
seen = esm(
    {"cameras": [camera], "motion": motion}, (state.mean, state.variance)
)
assert_type(geometry.pixel_grid(4, 8), np.ndarray)
points = geometry.transform(np.ones((1, 2, 3), "float32"), motion[0])

# Training and pictures.

task = tasks.Copy(max_length=2, buckets=1, bits=3)
batch = task.sample(np.random.default_rng(1), batch_size=2, length=2)
assert_type(batch.mask, np.ndarray)
assert_type(task.input_size, int)
model = keras.Sequential(
    [keras.Input((None, 4)), NTMLayer(3, 7, 5, return_sequences=True)]
)
model.compile("sgd", losses.BitsCrossentropy(from_logits=True))
assert_type(losses.BitsPerSequence(name="bits"), losses.BitsPerSequence)
errors = losses.error_rate(batch.targets, batch.targets, batch.mask)
callbacks.MemoryTensorBoard(pathlib.Path("logs"), batch, every=2)
callbacks.ProbePictures(batch, "pictures", title=lambda epoch: f"{epoch}")

draw = keras_memory.visualization
figure = keras_memory.plot(ntm, x, row=1)
assert_type(figure, draw.Figure)
figure = draw.plot_task(trace, x, figure=draw.plot_task(trace, x))
assert_type(draw.to_png(draw.to_image(figure)), bytes)
draw.plot_memory(trace["memory"][0], ax=figure.axes[0], slots=[1, 2])
draw.plot_learning({"NTM": [{"loss": [1.0, 0.5]}]}, names=["loss"])
draw.plot_curves({"a run": ([1, 2], [0.5, 0.25])}, ax=np.array(figure.axes[:1]))
heat = np.zeros((4, 4))
draw.plot_tiles([[draw.Tile(images[0], "digit", heat=heat)]])
