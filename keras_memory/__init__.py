"""Neural memory as Keras layers."""

from keras_memory import controllers
from keras_memory.ntm import NTMCell
from keras_memory.ntm import NTMLayer
from keras_memory.ntm import NTMState
from keras_memory.recurrent import MemoryCell
from keras_memory.recurrent import MemoryRNN
from keras_memory.recurrent import trace

__version__ = "0.1.0"
