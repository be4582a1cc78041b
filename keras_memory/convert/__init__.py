"""Makes layers from weights of the reference implementations."""

from keras_memory.convert.checkpoints import (
    read_pytorch_checkpoint as read_pytorch_checkpoint,
)
from keras_memory.convert.dnc import from_deepmind_dnc as from_deepmind_dnc
from keras_memory.convert.dnc import from_pytorch_dnc as from_pytorch_dnc
from keras_memory.convert.memorizing_transformers import (
    from_memorizing_transformers as from_memorizing_transformers,
)
from keras_memory.convert.memory_wrap import from_memorywrap as from_memorywrap
from keras_memory.convert.ntm import from_collier_ntm as from_collier_ntm
from keras_memory.convert.ntm import from_pytorch_ntm as from_pytorch_ntm
