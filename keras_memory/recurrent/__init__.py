"""How a step runs: controller, interface and access, through time.

The call path of `layer(x)`:

    layer.py        MemoryRNN.call: checks, states, dropout masks
    loop.py         run: the portable loop, or `fast_loop.py` in training
    cell.py         MemoryCell.step, for each block of a step:
        controllers.py  step: the controller
        ntm.py, dnc.py, sam.py  step of the access: splits the interface
                        (`interface.py`), then `addressing/`
    cell.py         MemoryCell.project: the output, after the loop

`state.py` has the layout of states: flat tensors outside of a step, named
records inside, where slots come last. `cell_states.py` has the methods of a
cell for its states. `contract.py` checks accesses and the results of their
steps.

A new architecture is one file at the top of the package: a state record, an
access (`interface.Access`, a dataclass), `class MyCell(MemoryCell,
access=MyAccess)` and `class MyLayer(MemoryRNN, cell=MyCell)`. For `from
keras_memory import MyLayer` add it to `api.py` and to `__all__`, for
`keras-memory train --preset` to `MODELS` in `training/config.py` and to
`PRESETS` in `cli.py`, for the tests to
`tests/catalogue.py`, `ENTRIES` in `tests/access_harness.py` and the import
ranks in `tests/test_imports.py`.
"""

from keras_memory.recurrent.cell import MemoryCell as MemoryCell
from keras_memory.recurrent.interface import Access as Access
from keras_memory.recurrent.interface import StateSpec as StateSpec
from keras_memory.recurrent.layer import MemoryRNN as MemoryRNN
from keras_memory.recurrent.tracing import Trace as Trace
from keras_memory.recurrent.tracing import trace as trace
from keras_memory.recurrent.tracing import trace_model as trace_model
