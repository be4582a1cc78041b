"""Relative positions of queries and keys.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", 2020 (arXiv 1910.10683), section 2.1. Axes: H heads,
T queries, S keys.
"""

from typing import Any
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.checks import check_array
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape


@keras.saving.register_keras_serializable(package="keras_memory")
class RelativePositionBias(Arguments, keras.layers.Layer):
    """Adds to attention logits by the distance from the query back to the key.

    Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1: each head has a
    learned number for each bucket of distances. The first half of the buckets
    are single distances; the others grow logarithmically up to `max_distance`;
    larger distances share the last bucket.

    Args:
        num_heads: int, H.
        num_buckets: int, at least 2, even. Default 32.
        max_distance: int, more than `num_buckets` / 2. Default 128.
        embeddings_initializer: initializer of the numbers.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        distances: (...) int32, in tokens; those below 0 count as 0.

    Returns:
        (..., H).

    Raises:
        ValueError: an argument out of range.

    Example:

    >>> layer = RelativePositionBias(num_heads=3)
    >>> layer(np.arange(5)).shape
    TensorShape([5, 3])
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        embeddings_initializer: Any = "random_normal",
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        self.num_heads = check_size("num_heads", num_heads)
        self.num_buckets = check_size("num_buckets", num_buckets, least=2)
        self.max_distance = check_size("max_distance", max_distance)
        if num_buckets % 2 or max_distance <= num_buckets // 2:
            raise ValueError(
                "`num_buckets` must be even, and `max_distance` more than half "
                "of it: that many buckets are single distances. Received: "
                f"num_buckets={num_buckets}, max_distance={max_distance}"
            )
        self.embeddings_initializer = keras.initializers.get(
            embeddings_initializer
        )

    def build(self, input_shape: Shape = ()) -> None:
        self.embeddings = self.add_weight(
            shape=(self.num_buckets, self.num_heads),
            initializer=self.embeddings_initializer,
            name="embeddings",
        )
        self.built = True

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape, self.num_heads)

    def call(self, distances: Array) -> Array:
        distances = check_array("distances", distances, kind="integer")
        buckets = self.buckets(distances)
        # A product, whose gradient is faster than that of a look-up.
        one_hot = ops.one_hot(
            buckets, self.num_buckets, dtype=self.compute_dtype
        )
        return ops.matmul(one_hot, self.embeddings)

    def buckets(self, distances: Array) -> Array:
        """The bucket of each distance, int32 from 0 to `num_buckets` - 1."""
        distances = ops.cast(distances, "int32")
        single = self.num_buckets // 2
        number = np.arange(1, self.num_buckets - single)
        first = single * (self.max_distance / single) ** (
            number / (self.num_buckets - single)
        )
        # The first distance of each further bucket.
        first = ops.convert_to_tensor(np.ceil(first - 1e-9), "int32")
        is_beyond = ops.cast(distances[..., None] >= first, "int32")
        return ops.clip(distances, 0, single) + ops.sum(is_beyond, axis=-1)

    def of_segment(
        self, queries: Array, keys: Array, shift: Array | None = None
    ) -> Array:
        """The bias of each pair, if the queries are at the end of the keys.

        Args:
            queries, keys: ints or scalar tensors, T and S >= T.
            shift: (B,) int32, tokens by which the queries are moved back, if
                any.

        Returns:
            (H, T, S), with `shift` (B, H, T, S).
        """
        # From the largest distance, of the last query to the first key, down.
        number = queries + keys - 1
        distances = keys - 1 - ops.arange(number, dtype="int32")
        if shift is not None:
            distances = distances - shift[:, None]
        bias = ops.swapaxes(self(distances), -1, -2)  # (..., H, number)
        # Query i sees `number` distances from place T - 1 - i on. With one
        # more column, reading on in rows of `number` moves by one each time.
        bias = ops.pad(bias, [*[(0, 0)] * (len(bias.shape) - 1), (0, 1)])
        lead = tuple(ops.shape(bias)[:-1])
        bias = ops.tile(bias, (*[1] * len(lead), queries))
        bias = bias[..., queries - 1 : queries - 1 + queries * number]
        bias = ops.reshape(bias, (*lead, queries, number))
        return bias[..., :keys]

    def get_config(self) -> Config:
        config = {
            "num_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
        }
        return {**super().get_config(), **config}
