"""Maps on a sphere: the record `ESMMap`, and the base class of its layers."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.addressing.scaling import at_least_float32
from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_closed
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.spatial.cameras import CONVENTIONS
from keras_memory.spatial.cameras import agent_axes
from keras_memory.spatial.cameras import check_depth_scale
from keras_memory.spatial.geometry import pixel_grid
from keras_memory.spatial.inputs import MapInputs
from keras_memory.spatial.inputs import check_limits

SEEN = 0.99  # share of the prior's variance from which on a pixel is a hole
HUGE = 1e25  # treated as infinite: sums and squares would overflow
SPAN = 1e11  # largest ratio of variances: beyond, smoothing loses precision


class ESMMap(NamedTuple):
    """A map on the sphere around an agent, in the agent's frame.

    Args:
        mean: (..., H, W, 3 + F). The first two channels are column and row of
            the point that a pixel shows, in pixels, within one pixel of the
            pixel's center; the third is the point's distance, in meters; the
            others are its features.
        variance: (..., H, W, 3 + F), of each channel: squared pixels, squared
            meters, squared units of the features. Where nothing was seen, it
            is the prior's.
    """

    mean: Any
    variance: Any


class MapLayer(Arguments, MapInputs, keras.layers.Layer):
    """A layer whose state is an `ESMMap`: checks arguments, makes the prior.

    Args:
        height, width, feature_channels, depth_limits, variance_limits,
            depth_prior, feature_prior, smooth_kernel_size, depth_buffer,
            convention, depth_scale: see `ESMLayer`.
        **kwargs: see `keras.layers.Layer`.
    """

    def __init__(
        self,
        height: int = 180,
        width: int = 360,
        feature_channels: int = 3,
        depth_limits: Sequence[float] = (1e-3, 10.0),
        variance_limits: Sequence[float] = (1e-3, 1e4),
        depth_prior: float = 0.01,
        feature_prior: float = 0.5,
        smooth_kernel_size: int | None = 25,
        depth_buffer: bool = True,
        convention: str = "esm",
        depth_scale: float | None = None,
        **kwargs: Unpack[KerasArguments],
    ):
        # In half precision, coordinates would be off by pixels.
        super().__init__(autocast=False, **kwargs)
        self.height = check_size("height", height)
        self.width = check_size("width", width)
        if width % 2:
            raise ValueError(
                "`width` must be even, since beyond a pole the map continues "
                f"half way around. Received: width={width}"
            )
        self.feature_channels = check_size(
            "feature_channels", feature_channels, least=0
        )
        self.depth_limits = check_limits("depth_limits", depth_limits)
        self.variance_limits = check_limits("variance_limits", variance_limits)
        least, largest = self.variance_limits
        if 2 * least > min(largest, height) or largest > SPAN * least:
            raise ValueError(
                "`variance_limits` must be (least, most) with least <= most / "
                f"2, least <= height / 2 and most <= {SPAN:.0e} * least. "
                f"Received: variance_limits={variance_limits!r}, "
                f"height={height}"
            )
        self.depth_prior = check_closed("depth_prior", depth_prior, 0, HUGE)
        self.feature_prior = check_closed(
            "feature_prior", feature_prior, -HUGE, HUGE
        )
        self.smooth_kernel_size = smooth_kernel_size
        if smooth_kernel_size is not None:
            check_size(
                "smooth_kernel_size",
                smooth_kernel_size,
                alternatives=" or None",
            )
            if smooth_kernel_size % 2 == 0:
                raise ValueError(
                    "`smooth_kernel_size` must be odd, so that the kernel has "
                    "a center. "
                    f"Received: smooth_kernel_size={smooth_kernel_size}"
                )
        self.depth_buffer = check_bool("depth_buffer", depth_buffer)
        self.convention = check_one_of("convention", convention, CONVENTIONS)
        self.depth_scale = check_depth_scale(depth_scale)
        self.supports_masking = True
        sizes = [("height", self.height), ("width", self.width)]
        sizes += [("3 + feature_channels", 3 + self.feature_channels)]
        check_bytes("A map", sizes, "float64", on_host=True)
        axes = agent_axes(self.convention)
        back = np.concatenate([axes[:, :3].T, axes[:, 3:]], axis=1)
        self._back = self._array(back)  # to the agent's axes
        self._prior = ESMMap(*map(self._array, self._prior_of_pixels()))

    @property
    def map_dtype(self) -> str:
        """Dtype of all computations: float64 if the layer computes in float64,
        else float32, also under 16-bit policies."""
        return at_least_float32(self.compute_dtype)

    def _array(self, values):
        return np.asarray(values, self.map_dtype)

    def _prior_of_pixels(self):
        """(H, W, 3 + F) mean and variance of unseen pixels."""
        grid = pixel_grid(self.height, self.width)
        rest = [self.depth_prior] + [self.feature_prior] * self.feature_channels
        mean = np.concatenate(
            [grid, np.broadcast_to(rest, (*grid.shape[:2], len(rest)))], -1
        )
        # The prior variance of column and row is the map's height.
        variance = [self.height] * 2 + [self.variance_limits[1]] * len(rest)
        return mean, np.broadcast_to(variance, mean.shape)

    def get_initial_state(self, batch_size: Array) -> ESMMap:
        """An empty map: the prior in all pixels.

        Args:
            batch_size: int or scalar tensor, B.

        Returns:
            `ESMMap`, (B, H, W, 3 + F).
        """
        if not ops.is_tensor(batch_size):
            batch_size = check_size("batch_size", batch_size, least=0)
            self._check_bytes_of_maps(batch_size)
        return self._nothing_seen(batch_size)

    def _check_bytes_of_maps(self, batch_size):
        height, width, channels = self._prior.mean.shape
        sizes = [("batch size", batch_size), ("height", height)]
        sizes += [("width", width), ("3 + feature_channels", channels)]
        check_bytes("A state", sizes, self.map_dtype)

    def _nothing_seen(self, batch_size):
        shape = (batch_size, *self._prior.mean.shape)
        return ESMMap(
            *(
                ops.broadcast_to(ops.convert_to_tensor(part), shape)
                for part in self._prior
            )
        )

    def _is_hole(self, variance):
        """(..., 1) bool, True where a pixel knows no more than the prior."""
        limit = SEEN * self._prior.variance[0, 0]
        limit = ops.convert_to_tensor(self._array(limit))
        return ops.any(variance >= limit, axis=-1, keepdims=True)

    def _check_state(self, name, state, batch=None):
        """Checks a state; returns an `ESMMap` of tensors."""
        parts = state if isinstance(state, (tuple, list)) else ()
        if len(parts) != 2:
            raise ValueError(
                f"`{name}` must be an `ESMMap`, mean and variance. "
                f"Received: {state!r}"
            )
        axes, sizes = ("B", *self._prior.mean.shape), {"B": batch}
        return ESMMap(
            *(
                check_array(
                    f"{name}.{field}", part, axes, sizes, dtype=self.map_dtype
                )
                for field, part in zip(ESMMap._fields, parts)
            )
        )

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None  # a map has no time axis, or a value for each step

    def get_config(self) -> Config:
        names = ("height", "width", "feature_channels", "depth_limits")
        names += ("variance_limits", "depth_prior", "feature_prior")
        names += ("smooth_kernel_size", "depth_buffer", "convention")
        names += ("depth_scale",)
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}


def map_spec(shape, dtype):
    """A symbolic `ESMMap` of a shape and a dtype."""
    return ESMMap(*(keras.KerasTensor(shape, dtype) for _ in range(2)))
