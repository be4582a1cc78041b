"""Wrong uses: errors for a type checker, each by the rule behind its line."""

import keras
import numpy as np

import keras_memory as km
from keras_memory import callbacks
from keras_memory import controllers
from keras_memory import convert
from keras_memory import explanations
from keras_memory import export
from keras_memory import geometry
from keras_memory import losses
from keras_memory import rgbd
from keras_memory import rooms
from keras_memory import tasks
from keras_memory import training
from keras_memory import visualization

x = np.ones((2, 5, 4), "float32")
encoder = keras.layers.Flatten()

# An argument that a class does not have.

km.NTMLayer(64, memory_slotz=3)  # error: reportCallIssue
km.DNCLayer(64, writing="sequential")  # error: reportCallIssue
km.MemoryCell(3, [], memory_slots=3)  # error: reportCallIssue
km.ESMLayer(smooth_size=3)  # error: reportCallIssue
km.ESMCell(return_sequences=True)  # error: reportCallIssue
km.MemoryWrapLayer(3, topk=3)  # error: reportCallIssue
km.BaselineMemory(3, distance="l2")  # error: reportCallIssue
km.MemoryWrapClassifier(encoder, 3, sead=1)  # error: reportCallIssue
km.KNNMemoryLayer(3, method="exact")  # error: reportCallIssue
km.KNNMemory(4, 3, store="ring")  # error: reportCallIssue
km.RingMemory(4, 3, dtype="int32")  # error: reportCallIssue
km.ScannIndex(3, search_method="exact")  # error: reportCallIssue
km.trace(km.NTMLayer(3), x, states=None)  # error: reportCallIssue
tasks.Copy(max_len=3)  # error: reportCallIssue
rooms.Room(walls=3)  # error: reportCallIssue
callbacks.MemoryTensorBoard("logs", x, period=2)  # error: reportCallIssue

# One that it lacks.

km.NTMLayer()  # error: reportCallIssue
km.MemoryCell(3)  # error: reportCallIssue
km.KNNMemory(4)  # error: reportCallIssue
geometry.transform(x)  # error: reportCallIssue
losses.error_rate(x, x)  # error: reportCallIssue

# A value of another type.

layer = km.NTMLayer("64")  # error: reportArgumentType
km.NTMLayer(3, 7, 5, 1, 1, "parallel")  # error: reportCallIssue
km.DNCLayer(3, linkage="yes")  # error: reportArgumentType
km.NTMLayer(3, controller=3)  # error: reportArgumentType
km.MemoryRNN(3, return_sequences="all")  # error: reportArgumentType
km.ESMLayer(depth_limits=3.0)  # error: reportArgumentType
km.KNNMemoryLayer("3")  # error: reportArgumentType
km.trace("ntm", x)  # error: reportArgumentType
km.trace_model(x, x)  # error: reportArgumentType
km.plot(x, x)  # error: reportArgumentType
explanations.explain("wrap", x)  # error: reportArgumentType
callbacks.pictures(3)  # error: reportArgumentType
export.export_for_serving("model", "served")  # error: reportArgumentType
convert.from_pytorch_ntm(x)  # error: reportArgumentType
convert.from_deepmind_dnc({}, "5")  # error: reportArgumentType
dnc_of = convert.from_pytorch_dnc
dnc_of({}, 7, 2, temporal_reads=2)  # error: reportArgumentType
controllers.get("lstm", "3", 1)  # error: reportArgumentType
tasks.dataset("copy", 3)  # error: reportArgumentType
training.train("copy", "run")  # error: reportArgumentType
rgbd.write_frames("frames", x)  # error: reportArgumentType
visualization.plot_gates(x)  # error: reportArgumentType
visualization.plot_task({}, width="wide")  # error: reportArgumentType

# What is not there.

km.NTMLayers(3)  # error: reportAttributeAccessIssue
value = km.trace(km.NTMLayer(3), x).reads  # error: reportAttributeAccessIssue
value = km.KNNMemory(4, 3).search(x, 1).ids  # error: reportAttributeAccessIssue
ring = km.RingMemory(4, 3)
value = ring.initial_state(2).size  # error: reportAttributeAccessIssue
slots: str = km.NTMLayer(3).memory_slots  # error: reportAssignmentType
size: str = km.DNCLayer(3).cell.slot_size  # error: reportAssignmentType


class NoAccess:
    """It cannot act on a memory."""

    interface_size = 3


km.MemoryCell(3, [NoAccess()])  # error: reportArgumentType
