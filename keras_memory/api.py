"""The public names of the package, which `__init__` exports."""

from keras_memory import convert as convert
from keras_memory import retrieval as retrieval
from keras_memory.causal_attention import CausalAttention as CausalAttention
from keras_memory.causal_attention import (
    CausalAttentionState as CausalAttentionState,
)
from keras_memory.dnc import DNCCell as DNCCell
from keras_memory.dnc import DNCLayer as DNCLayer
from keras_memory.dnc import DNCState as DNCState
from keras_memory.esm import ESMCell as ESMCell
from keras_memory.esm import ESMLayer as ESMLayer
from keras_memory.esm import ESMMap as ESMMap
from keras_memory.inspection import callbacks as callbacks
from keras_memory.inspection import explanations as explanations
from keras_memory.inspection.plotting import plot as plot
from keras_memory.knn_attention import KNNAttention as KNNAttention
from keras_memory.knn_attention import KNNAttentionState as KNNAttentionState
from keras_memory.memorizing_transformer import (
    MemorizingTransformer as MemorizingTransformer,
)
from keras_memory.memory_wrap import BaselineMemory as BaselineMemory
from keras_memory.memory_wrap import MemoryWrapLayer as MemoryWrapLayer
from keras_memory.memory_wrap_classifier import (
    MemoryWrapClassifier as MemoryWrapClassifier,
)
from keras_memory.ntm import MERLINState as MERLINState
from keras_memory.ntm import NTMCell as NTMCell
from keras_memory.ntm import NTMLayer as NTMLayer
from keras_memory.ntm import NTMState as NTMState
from keras_memory.recurrent import controllers as controllers
from keras_memory.recurrent.cell import MemoryCell as MemoryCell
from keras_memory.recurrent.interface import Access as Access
from keras_memory.recurrent.interface import StateSpec as StateSpec
from keras_memory.recurrent.layer import MemoryRNN as MemoryRNN
from keras_memory.recurrent.tracing import trace as trace
from keras_memory.recurrent.tracing import trace_model as trace_model
from keras_memory.relative_positions import (
    RelativePositionBias as RelativePositionBias,
)
from keras_memory.retrieval.exact import Neighbours as Neighbours
from keras_memory.retrieval.knn_layer import KNNMemoryLayer as KNNMemoryLayer
from keras_memory.retrieval.knn_memory import KNNMemory as KNNMemory
from keras_memory.retrieval.ring import RingMemory as RingMemory
from keras_memory.retrieval.scann_index import ScannIndex as ScannIndex
from keras_memory.sam import SAMCell as SAMCell
from keras_memory.sam import SAMLayer as SAMLayer
from keras_memory.sam import SAMState as SAMState
from keras_memory.sdnc import SDNCCell as SDNCCell
from keras_memory.sdnc import SDNCLayer as SDNCLayer
from keras_memory.sdnc import SDNCState as SDNCState
from keras_memory.serving import export as export
from keras_memory.spatial import geometry as geometry
from keras_memory.spatial import rgbd as rgbd
from keras_memory.spatial import rooms as rooms
from keras_memory.training import losses as losses
from keras_memory.training import tasks as tasks
