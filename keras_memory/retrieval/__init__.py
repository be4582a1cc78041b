"""Memories of (key, value) pairs, and search for the nearest keys.

`exact.py`, `ring.py` and `knn_layer.py` search in the graph, on any backend.
`knn_memory.py` keeps a memory in host RAM, searched by ScaNN or exactly, and
saves it to disk. `scann_index.py` runs ScaNN's ops in the graph. `examples.py`,
`batches.py` and `replaced.py` serve memories of examples, as in Memory Wrap.
"""

from keras_memory.retrieval.exact import Neighbours as Neighbours
from keras_memory.retrieval.exact import nearest as nearest
from keras_memory.retrieval.knn_layer import KNNMemoryLayer as KNNMemoryLayer
from keras_memory.retrieval.knn_memory import KNNMemory as KNNMemory
from keras_memory.retrieval.ring import RingMemory as RingMemory
from keras_memory.retrieval.ring import RingState as RingState
from keras_memory.retrieval.scann_index import ScannIndex as ScannIndex
