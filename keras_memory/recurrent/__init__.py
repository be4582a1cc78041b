"""How a step runs: controller, interface and access, through time.

`cell.py` has the step, `layer.py` the layer that takes it through time, and
`interface.py` what a new architecture must provide.
"""

from keras_memory.recurrent.cell import MemoryCell as MemoryCell
from keras_memory.recurrent.interface import Access as Access
from keras_memory.recurrent.interface import StateSpec as StateSpec
from keras_memory.recurrent.layer import MemoryRNN as MemoryRNN
from keras_memory.recurrent.tracing import Trace as Trace
from keras_memory.recurrent.tracing import trace as trace
from keras_memory.recurrent.tracing import trace_model as trace_model
