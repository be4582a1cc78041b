"""Egospheric Spatial Memory: a map of the surroundings of a moving agent.

Lenton et al. 2021, "End-to-End Egospheric Spatial Memory" (arXiv 2102.07764).
Axes: B batch, T time, h rows and w columns of a camera's image, H rows and W
columns of the map, F features.
"""

import functools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import KerasArguments
from keras_memory.arguments import given
from keras_memory.checks import check_batch
from keras_memory.checks import check_bool
from keras_memory.checks import with_rows_of
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.recurrent.state import LayerState
from keras_memory.spatial import fusion
from keras_memory.spatial import geometry
from keras_memory.spatial.inputs import CAMERA
from keras_memory.spatial.inputs import MOTION
from keras_memory.spatial.inputs import as_mask
from keras_memory.spatial.inputs import check_has
from keras_memory.spatial.inputs import check_inputs
from keras_memory.spatial.loop import over_time
from keras_memory.spatial.maps import HUGE
from keras_memory.spatial.maps import ESMMap
from keras_memory.spatial.maps import MapLayer
from keras_memory.spatial.maps import map_spec
from keras_memory.spatial.tensors import at_least

VAGUE = 1e9  # squared meters or radians: variance from which a pose is unknown


class _ESM(MapLayer):
    """The paper's step, shared by `ESMCell` and `ESMLayer`."""

    def step(
        self,
        cameras: Sequence[Mapping[str, Array]],
        motion: Mapping[str, Array],
        state: Sequence[Array],
    ) -> ESMMap:
        """Moves the map with the agent, and fuses it with the cameras' maps.

        Args:
            cameras: list of dicts, arguments of `observe`.
            motion: dict, arguments of `move` besides `state`.
            state: `ESMMap`.

        Returns:
            `ESMMap`.
        """
        seen = [self.move(state, **motion)]
        seen += [self.observe(**camera) for camera in cameras]
        # Points beside a pixel count only if no point is in it.
        is_beside = ops.logical_not(
            functools.reduce(ops.logical_or, [own for *_, own in seen])
        )
        mean, variance = fusion.fuse(
            [mean for mean, _, _ in seen],
            [
                ops.where(own | is_beside, variance, np.inf)
                for _, variance, own in seen
            ],
        )
        is_hole = self._is_hole(variance)
        return ESMMap(
            ops.where(is_hole, self._prior.mean, mean),
            ops.where(is_hole, self._prior.variance, variance),
        )

    def move(
        self,
        state: Sequence[Array],
        motion: Array,
        motion_covariance: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Projects the map into the agent's frame after a motion.

        Args:
            state: `ESMMap`.
            motion: (B, 3, 4) pose, from the agent's frame before the motion to
                its frame after.
            motion_covariance: (B, 6, 6), of the motion; None if it is certain.

        Returns:
            Mean, variance, and which pixels contain points; see
            `fusion.quantize`.
        """
        state = self._check_state("state", state)
        given = {"motion": motion, "motion_covariance": motion_covariance}
        given = self._fields("", given, MOTION, ("B",), self._sizes())
        check_has("", given, "motion")
        pose, covariance = self._of_agent(*map(given.get, MOTION))
        valid = ops.logical_not(self._is_hole(state.variance))
        if not self.depth_buffer:
            # A point shown by several pixels would be fused with itself: keep
            # only the pixel that contains it.
            middle = ops.convert_to_tensor(self._prior.mean[..., :2])
            away = ops.stop_gradient(state.mean[..., :2]) - middle
            columns, rows = away[..., :1], away[..., 1:]
            columns = columns - self.width * ops.round(columns / self.width)
            valid = valid & (ops.abs(columns) <= 0.5) & (ops.abs(rows) <= 0.5)
        mean, variance, valid = map(_in_line, (*state, valid))
        sphere = geometry.from_pixels(mean[..., :3], self.height, self.width)
        return self._project(
            geometry.from_sphere(sphere),
            mean[..., 3:],
            variance,
            valid,
            geometry.compose(pose, self._back),
            covariance,
        )

    def observe(
        self,
        features: Array,
        points: Array | None = None,
        depth: Array | None = None,
        inverse_intrinsics: Array | None = None,
        variance: Array | None = None,
        mask: Array | None = None,
        pose: Array | None = None,
        pose_covariance: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Projects a camera's image to a map in the agent's frame.

        Args:
            features, points, depth, inverse_intrinsics, variance, mask, pose,
                pose_covariance: see `ESMLayer`; without the axis of time.

        Returns:
            Mean, variance, and which pixels contain points; see
            `fusion.quantize`.
        """
        given = self._camera(
            "",
            {
                "features": features,
                "points": points,
                "depth": depth,
                "inverse_intrinsics": inverse_intrinsics,
                "variance": variance,
                "mask": mask,
                "pose": pose,
                "pose_covariance": pose_covariance,
            },
            ("B",),
            self._sizes(),
        )
        features, points, depth, inverse, variance, mask, pose, covariance = (
            given.get(name) for name in CAMERA
        )
        if depth is None:
            valid = ops.ones_like(points[..., :1], dtype="bool")
        else:
            seen = (depth > 0) & (depth < HUGE)
            known = geometry.is_camera(inverse, self.convention)
            known = known[:, None, None]
            valid = (seen & known)[..., None]
            points = geometry.pixels_to_camera(
                ops.where(seen, depth, 1.0),
                ops.where(known, inverse, 1.0),
                self.convention,
                self.depth_scale,
            )
        if mask is not None:
            valid = valid & mask[..., None]
        if variance is None:
            variance = ops.zeros_like(ops.concatenate([points, features], -1))
        if pose is None:  # the camera looks in the agent's direction
            axes = geometry.camera_axes(self.convention)
            pose = self._back[:, :3] @ self._array(axes)
            pose = ops.convert_to_tensor(pose[None])
            pose = ops.repeat(pose, ops.shape(features)[0], axis=0)
        return self._project(
            *map(_in_line, (points, features, variance, valid)),
            *self._of_agent(pose, covariance),
        )

    def _of_agent(self, pose, covariance):
        """Converts a pose into the agent's frame, and its covariance, from the
        axes of `convention` to those of "esm"."""
        axes = self._array(geometry.agent_axes(self.convention))
        if covariance is not None:
            covariance = geometry.turn_covariance(covariance, axes[:, :3])
        return geometry.compose(axes, pose), covariance

    def _project(self, points, features, variance, valid, pose, covariance):
        """Projects (B, n, ...) points in any frame to a map in the agent's."""
        known = geometry.is_pose(pose)[:, None, None]
        if covariance is not None:
            known = known & _all_below(VAGUE, covariance, axis=(-2, -1))
            covariance = ops.where(known, covariance, 0.0)
        pose = ops.where(known, pose, self._array(np.eye(3, 4)))
        valid = valid & known & ops.all(variance >= 0, -1, keepdims=True)
        for part in (points, features, variance):
            valid = valid & _all_below(HUGE, part, axis=-1)
        # Invalid points would make gradients NaN.
        points, features, variance = (
            ops.where(valid, part, 1.0) for part in (points, features, variance)
        )
        points = geometry.transform(points, pose)
        nearest, farthest = self.depth_limits
        sizes = ops.abs(points)
        valid = valid & ops.any(2 * sizes >= nearest, axis=-1, keepdims=True)
        valid = valid & ops.all(sizes <= farthest, axis=-1, keepdims=True)
        points = ops.where(valid, points, 1.0)
        if covariance is not None:
            by_pose = geometry.pixel_variance(
                points, covariance, self.height, self.width
            )
            variance = ops.concatenate(
                [
                    variance[..., :3] + at_least(by_pose, 0.0),
                    variance[..., 3:],
                ],
                axis=-1,
            )
        pixels = geometry.to_pixels(
            geometry.to_sphere(points), self.height, self.width
        )
        depth = pixels[..., 2:]
        valid = valid & (depth >= nearest) & (depth <= farthest)
        valid = valid & ops.logical_not(self._is_hole(variance))
        variance = at_least(variance, self.variance_limits[0])
        return fusion.quantize(
            ops.concatenate([pixels, features], axis=-1),
            variance,
            valid[..., 0],
            self.height,
            self.width,
            self.depth_buffer,
        )

    def smooth(self, state: Sequence[Array]) -> ESMMap:
        """Fills the holes of a map with depth and features around them.

        Args:
            state: `ESMMap`.

        Returns:
            `ESMMap` with unchanged variance.
        """
        if self.smooth_kernel_size is None:
            return self._check_state("state", state)
        mean, variance = self._check_state("state", state)
        around_all = 2 * min(self.height, self.width) + 1
        size = min(self.smooth_kernel_size, around_all)
        around = fusion.smooth(
            mean[..., 2:], variance[..., 2:], fusion.smoothing_kernel(size)
        )
        rest = ops.where(self._is_hole(variance), around, mean[..., 2:])
        return ESMMap(ops.concatenate([mean[..., :2], rest], -1), variance)


@keras.saving.register_keras_serializable(package="keras_memory")
class ESMCell(_ESM):
    """One step of `ESMLayer`; see there for the full documentation.

    Args:
        height, width, feature_channels, depth_limits, variance_limits,
            depth_prior, feature_prior, smooth_kernel_size, depth_buffer,
            convention, depth_scale: see `ESMLayer`.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        inputs: dict; see `ESMLayer`, without the axis of time.
        state: `ESMMap`, from `get_initial_state` or the previous step.

    Returns:
        The map, an `ESMMap` of (B, H, W, 3 + F) with smoothed holes, and the
        state for the next step, the same map without smoothing.

    Raises:
        ValueError: see `ESMLayer`.

    Example:

    >>> cell = ESMCell(height=4, width=8, feature_channels=1)
    >>> seen = {
    ...     "points": np.array([[[[0.0, 0.0, 2.0]]]], "float32"),
    ...     "features": np.ones((1, 1, 1, 1), "float32"),
    ... }
    >>> still = np.eye(3, 4, dtype="float32")[None]
    >>> state = cell.get_initial_state(batch_size=1)
    >>> shown, state = cell({"cameras": [seen], "motion": still}, state)
    >>> ops.convert_to_numpy(state.mean)[0, 2, 4]
    array([4., 2., 2., 1.], dtype=float32)
    """

    def __call__(
        self, inputs: Mapping[str, Any], state: Sequence[Array], **kwargs: Any
    ) -> tuple[ESMMap, ESMMap]:
        # Keras makes tensors of arrays, and its errors name no argument.
        cameras, motion = self._parsed(inputs, ("B",))
        state = self._check_state("state", state, motion["motion"].shape[0])
        inputs = {"cameras": cameras, **motion}
        return super().__call__(inputs, state, **kwargs)

    def call(
        self, inputs: Mapping[str, Any], state: Sequence[Array]
    ) -> tuple[ESMMap, ESMMap]:
        cameras, motion = self._parsed(inputs, ("B",))
        state = self._check_state("state", state, motion["motion"].shape[0])
        state = self.step(cameras, motion, state)
        return self.smooth(state), state

    def compute_output_spec(
        self, inputs: Mapping[str, Any], state: Sequence[Array]
    ) -> tuple[ESMMap, ESMMap]:
        cameras, motion = self._parsed(inputs, ("B",))
        shape = (motion["motion"].shape[0], *self._prior.mean.shape)
        return tuple(map_spec(shape, self.map_dtype) for _ in range(2))


@keras.saving.register_keras_serializable(package="keras_memory")
class ESMLayer(_ESM):
    """Maps the view of cameras onto a sphere around a moving agent.

    A memory without weights. Each step projects the map into the agent's new
    frame, and fuses it with depth and features of each camera by their
    variances. The map's center is forward, its top row is up. Default frames
    are those of the paper: x left, y up, z forward; `convention` selects
    others.

    Your own camera: set `convention="opencv"` for OpenCV and most drivers,
    `convention="ros"` for ROS; pass `np.linalg.inv(K)` as `inverse_intrinsics`,
    and set `depth_scale=0.001` for depth in millimeters.

    Source: Lenton et al. 2021 (arXiv 2102.07764).
    Departures from the reference (ivy_memory), which has faults: any number of
    cameras are fused, as in the paper; the nearest point hides others in all
    channels; holes have the prior's depth; smoothing keeps signs; gradients
    flow through the projection; columns are continuous across the seam, and
    the lower pole is in the last row; points beyond `depth_limits` are left out
    instead of clipped; variances are limited when they are measured, so step by
    step and whole sequences agree; covariances of poses count.

    Equations, in the order of `step`:
        re-projection: p' = R p + t for each pixel that was seen, in `move`.
        quantization: round to pixels; keep the nearest of several points, or
        fuse them, in `fusion.quantize`.
        fusion: v = 1 / sum_k 1 / v_k, m = v sum_k m_k / v_k, of the map and
        each camera, in `fusion.fuse`.
        smoothing: m = sum_j c_j m_j / v_j / sum_j c_j / v_j with c = 1 / (1 +
        distance in pixels), where nothing was seen, in `fusion.smooth`; only
        for the returned map, not for the state.

    State: `ESMMap`, mean and variance, (B, H, W, 3 + F) each, initially the
    prior.

    Masking and dtype: points are left out if masked, not finite, at or behind
    the camera, beyond `depth_limits`, or at least as uncertain as the prior. A
    camera with an invalid pose, or with intrinsics of another convention, is
    ignored; such intrinsics raise an error if given as NumPy arrays, or in the
    first call. An invalid motion resets the map. A step masked by `mask`
    changes nothing. The layer computes and returns float32, or float64 if that
    is its `dtype`.

    Gradients flow from the map to features, depth, variances and poses of the
    points that are kept. The choice of pixels and of nearest points has no
    gradient.

    Args:
        height, width: ints, H, 180 by default, and W, 360 by default, even.
        feature_channels: int, F, 3 by default.
        depth_limits: (least, most) distance in meters, (0.001, 10) by default.
        variance_limits: (least, most), (0.001, 10000) by default. The least is
            the lower limit of the variance of all channels, and at most half
            the height; decrease it for a camera exact to less than 3 cm, for
            example to 0.0001. The most is the prior variance of depth and
            features, from 2 to 1e11 times the least. The prior variance of
            columns and rows is `height`.
        depth_prior: float, meters, 0.01 by default.
        feature_prior: float, 0.5 by default.
        smooth_kernel_size: int, odd, pixels, 25 by default; reduced if it
            reaches around a small map. None for no smoothing.
        depth_buffer: bool. True (default): keep the nearest of the points in a
            pixel. False: fuse them.
        convention: str, the axes x, y, z of the inputs. `points` have the axes
            of a camera, `motion` and its covariance those of the agent, and a
            camera's `pose` maps from the camera's axes to the agent's:
            `"esm"` (default): left, up, forward, both;
            `"opencv"`: right, down, forward, both;
            `"opengl"`: right, up, back, both;
            `"ros"`: a camera has right, down, forward (optical frame), the
            agent forward, left, up (body frame).
            `inverse_intrinsics` is `np.linalg.inv(K)` of the usual K, or with
            `"esm"` the result of `geometry.inverse_intrinsics`.
        depth_scale: float, meters per unit of `depth`, such as 0.001 for
            millimeters. None (default): depth is in meters, of a float dtype.
        return_sequences: bool, False by default. True: return the map after
            each step. False: after the last step.
        return_state: bool, False by default. True: return the state too.
        stateful: bool, False by default. True: continue from the state of the
            previous batch. Needs a fixed batch size; `reset_state()` resets the
            state to the prior. The state is not a weight and is not saved.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        inputs: dict with
            `motion`: (B, T, 3, 4) pose, from the agent's frame at the previous
            step to its frame at this step.
            `motion_covariance`: (B, T, 6, 6), optional, the uncertainty of the
            motion: covariance of a small motion after it, translation in meters
            and rotation vector about the agent in radians.
            `cameras`: a dict, or a list of any number, each with
            `features` (B, T, h, w, F);
            `points` (B, T, h, w, 3), coordinates in the camera's frame in
            meters, or `depth` (B, T, h, w) along the optical axis, in meters
            or in units of `depth_scale`, and `inverse_intrinsics` (B, T, 3, 3);
            `variance` (B, T, h, w, 3 + F), optional, of columns and rows in
            squared pixels of the map, of distance in squared meters, and of
            features; the least by default;
            `mask` (B, T, h, w) bool, optional, False for pixels to leave out;
            `pose` (B, T, 3, 4), optional, from the camera's frame to the
            agent's; by default the camera is at the agent and looks forward;
            `pose_covariance` (B, T, 6, 6), optional, like that of the motion.
            `inverse_intrinsics`, `pose` and `pose_covariance` may lack T if
            they are the same at all steps.
        initial_state: `ESMMap`; the prior by default.
        mask: (B, T) bool, False for steps that are left out.

    Returns:
        `ESMMap`, (B, T, H, W, 3 + F) with `return_sequences`, else (B, H, W,
        3 + F); with `return_state` a pair of the map and the state.

    Raises:
        ValueError: an argument out of range, wrong shapes, a camera without
            features, or without depth or points, integer depth without
            `depth_scale`, intrinsics that are not inverted or of another
            convention, or a batch size that differs from that of a stateful
            layer.

    A functional model loaded from a `.keras` file returns lists instead of
    `ESMMap`s, since Keras saves no named tuples.

    Example:

    >>> layer = ESMLayer(height=90, width=180, return_sequences=True)
    >>> camera = {
    ...     "depth": np.full((2, 5, 32, 32), 2.0, "float32"),
    ...     "features": np.zeros((2, 5, 32, 32, 3), "float32"),
    ...     "inverse_intrinsics": np.stack(
    ...         [geometry.inverse_intrinsics((16.0, 16.0), (15.5, 15.5))] * 2
    ...     ),
    ... }
    >>> still = np.tile(np.eye(3, 4, dtype="float32"), (2, 5, 1, 1))
    >>> seen = layer({"cameras": camera, "motion": still})
    >>> tuple(seen.mean.shape)
    (2, 5, 90, 180, 6)
    >>> float(seen.mean[0, 0, 45, 90, 2]) < 2.01
    True

    References:
        Lenton, James, Clark, Davison, "End-to-End Egospheric Spatial Memory",
        ICLR 2021, https://arxiv.org/abs/2102.07764
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
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        stateful: bool = False,
        **kwargs: Unpack[KerasArguments],
    ):
        of_map = given(locals())
        for name in ("return_sequences", "return_state", "stateful"):
            del of_map[name]
        super().__init__(**of_map)
        self.return_sequences = check_bool("return_sequences", return_sequences)
        self.return_state = check_bool("return_state", return_state)
        self.stateful = check_bool("stateful", stateful)
        self._state = None

    @property
    def states(self) -> ESMMap | None:
        """`ESMMap` of the state variables of a stateful layer, which are not
        weights; None if the layer is not stateful or not yet built."""
        return self._state and ESMMap(*self._state.variables)

    def build(self, inputs_shape: Any) -> None:
        if self.stateful:
            check_inputs(inputs_shape)
            batch = inputs_shape["motion"][0]
            if batch is None:
                raise ValueError(
                    "A stateful layer must have a fixed batch size: use "
                    "`keras.Input(batch_shape=...)`. Received: motion of shape "
                    f"{tuple(inputs_shape['motion'])}"
                )
            self._check_bytes_of_maps(batch)

            def initializer(prior):
                return lambda shape, dtype: (
                    # A copy, not a view: PyTorch writes to it in place.
                    ops.zeros(shape, dtype) + ops.cast(prior, dtype)
                )

            self._state = LayerState(
                [
                    (
                        name,
                        (batch, *prior.shape),
                        self.map_dtype,
                        initializer(prior),
                    )
                    for name, prior in self._prior._asdict().items()
                ],
                name="state",
                dtype=self.dtype_policy,
            )
        self.built = True

    def __call__(
        self,
        inputs: Mapping[str, Any],
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        # Keras makes tensors of arrays, and its errors name no argument.
        cameras, motion = self._parsed(inputs, ("B", "T"))
        batch, times = motion["motion"].shape[:2]
        if initial_state is not None:
            initial_state = self._check_state(
                "initial_state", initial_state, batch
            )
        return super().__call__(
            {"cameras": cameras, **motion},
            initial_state=initial_state,
            mask=as_mask(mask, batch, times),
            **kwargs,
        )

    def call(
        self,
        inputs: Mapping[str, Any],
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
    ) -> Any:
        cameras, motion = self._parsed(inputs, ("B", "T"))
        unchecked = motion["motion"]
        if self.stateful:
            check = functools.partial(
                check_batch, "motion", size=self.states.mean.shape[0]
            )
            motion, cameras = keras.tree.map_structure(check, (motion, cameras))
        batch, times = motion["motion"].shape[:2]
        if initial_state is not None:
            state = self._check_state("initial_state", initial_state, batch)
        elif self.stateful:
            # Copies: PyTorch updates the variables in place, but the gradient
            # needs the old values.
            state = ESMMap(*map(ops.copy, self.states))
        else:
            state = self._nothing_seen(ops.shape(motion["motion"])[0])
        constant = [
            {
                name: value
                for name, value in camera.items()
                if len(value.shape) == 1 + len(CAMERA[name])
            }
            for camera in cameras
        ]
        changing = [
            {name: camera[name] for name in camera if name not in same}
            for camera, same in zip(cameras, constant)
        ]
        given = [changing, motion]
        if (mask := as_mask(mask, batch, times)) is not None:
            given.append(mask)

        def step(given, before):
            cameras, motion, *kept = given
            cameras = [
                {**camera, **same} for camera, same in zip(cameras, constant)
            ]
            state = self.step(cameras, motion, before)
            if kept:
                kept = kept[0][:, None, None, None]
                pairs = zip(state, before)
                state = ESMMap(*(ops.where(kept, *pair) for pair in pairs))
            return self.smooth(state) if self.return_sequences else state, state

        shown, state = over_time(step, given, state, self.return_sequences)
        if self.stateful:
            for variable, part in zip(self.states, state):
                variable.assign(part)
        if not self.return_sequences:
            shown = self.smooth(state)
        if self.stateful:
            shown = ESMMap(*(with_rows_of(part, unchecked) for part in shown))
        return (shown, state) if self.return_state else shown

    def compute_output_spec(
        self,
        inputs: Mapping[str, Any],
        initial_state: Sequence[Array] | None = None,
        mask: Array | None = None,
    ) -> Any:
        _, motion = self._parsed(inputs, ("B", "T"))
        batch, times = motion["motion"].shape[:2]
        shape = (batch, *self._prior.mean.shape)
        shown = (batch, times, *shape[1:]) if self.return_sequences else shape
        shown = map_spec(shown, self.map_dtype)
        state = map_spec(shape, self.map_dtype)
        return (shown, state) if self.return_state else shown

    def reset_state(self) -> None:
        """Resets the map of a stateful layer to the prior."""
        for variable, prior in zip(self.states or (), self._prior):
            variable.assign(ops.broadcast_to(prior, variable.shape))

    def get_config(self) -> Config:
        names = "return_sequences", "return_state", "stateful"
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}


def _in_line(image):
    """Flattens (B, h, w, C) to (B, h w, C)."""
    batch, height, width, channels = ops.shape(image)
    return ops.reshape(image, (batch, height * width, channels))


def _all_below(limit, values, axis):
    """Whether |values| < limit all along `axis`, with keepdims; NaN: False."""
    return ops.all(ops.abs(values) < limit, axis=axis, keepdims=True)
