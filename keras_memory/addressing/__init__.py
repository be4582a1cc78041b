"""Addressing, reading and writing of a memory, as pure functions of arrays.

They have no weights and no state. `ntm.py`, `dnc.py` and `sam.py` combine them.
"""

from keras_memory.addressing.activations import (
    activation_by_name as activation_by_name,
)
from keras_memory.addressing.activations import not_negative as not_negative
from keras_memory.addressing.activations import oneplus as oneplus
from keras_memory.addressing.activations import softmax as softmax
from keras_memory.addressing.activations import sparsemax as sparsemax
from keras_memory.addressing.content import (
    content_weighting as content_weighting,
)
from keras_memory.addressing.content import (
    cosine_similarity as cosine_similarity,
)
from keras_memory.addressing.content import entropy as entropy
from keras_memory.addressing.linkage import dense_linkage as dense_linkage
from keras_memory.addressing.linkage import follow_links as follow_links
from keras_memory.addressing.linkage import (
    follow_sparse_links as follow_sparse_links,
)
from keras_memory.addressing.linkage import (
    linkage_after_write as linkage_after_write,
)
from keras_memory.addressing.linkage import (
    precedence_after_write as precedence_after_write,
)
from keras_memory.addressing.linkage import (
    sparse_linkage_after_write as sparse_linkage_after_write,
)
from keras_memory.addressing.location import interpolate as interpolate
from keras_memory.addressing.location import sharpen as sharpen
from keras_memory.addressing.location import shift as shift
from keras_memory.addressing.slots import erase_and_add as erase_and_add
from keras_memory.addressing.slots import read as read
from keras_memory.addressing.usage import add_usage as add_usage
from keras_memory.addressing.usage import allocation as allocation
from keras_memory.addressing.usage import least_used as least_used
from keras_memory.addressing.usage import mark_used as mark_used
from keras_memory.addressing.usage import retention as retention
from keras_memory.addressing.usage import usage_after_write as usage_after_write
