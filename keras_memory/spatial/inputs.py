"""What an egospheric memory is given: cameras and motions, checked."""

import keras
import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import is_number
from keras_memory.checks import plain_tuple
from keras_memory.spatial.cameras import check_camera
from keras_memory.spatial.cameras import check_depth

# Axes behind batch and time of what a camera tells, and of the motion.
CAMERA = {
    "features": ("h", "w", "F"),
    "points": ("h", "w", 3),
    "depth": ("h", "w"),
    "inverse_intrinsics": (3, 3),
    "variance": ("h", "w", "3 + F"),
    "mask": ("h", "w"),
    "pose": (3, 4),
    "pose_covariance": (6, 6),
}
MOTION = {"motion": (3, 4), "motion_covariance": (6, 6)}
CONSTANT = "inverse_intrinsics", "pose", "pose_covariance"  # they may be


class MapInputs:
    """What layers with a map are given, as checked tensors.

    A base of layers that have the attributes `feature_channels`, `convention`,
    `depth_scale` and `map_dtype`.
    """

    def _sizes(self):
        return {"F": self.feature_channels, "3 + F": 3 + self.feature_channels}

    def _parsed(self, inputs, lead):
        """Checked tensors: a list of dicts for the cameras, and a dict for the
        motion. `lead` names their first axes."""
        check_inputs(inputs)
        motion = {key: inputs[key] for key in inputs if key != "cameras"}
        sizes = self._sizes()
        motion = self._fields("", motion, MOTION, lead, sizes)
        check_has("", motion, "motion")
        cameras = inputs["cameras"]
        if not isinstance(cameras, (list, tuple)):
            return [self._camera("cameras", cameras, lead, sizes)], motion
        if not cameras:
            raise ValueError(
                "There must be at least one camera. Received: cameras=[]"
            )
        return [
            self._camera(f"cameras[{number}]", camera, lead, sizes)
            for number, camera in enumerate(cameras)
        ], motion

    def _camera(self, path, camera, lead, sizes):
        """The fields of a camera that are not None, as tensors."""
        if not isinstance(camera, dict):
            raise ValueError(
                f"`{path}` must be a dict with some of {tuple(CAMERA)}. "
                f"Received: {camera!r}"
            )
        own = dict(sizes)  # each may have images of another size
        fields = self._fields(path, camera, CAMERA, lead, own)
        sizes.update({axis: own[axis] for axis in lead if axis in own})
        check_has(path, fields, "features")
        if ("points" in fields) == ("depth" in fields):
            raise ValueError(
                f"{path_name(path)} must have either `points` or `depth`. "
                f"Received: {sorted(fields)}"
            )
        if ("depth" in fields) != ("inverse_intrinsics" in fields):
            raise ValueError(
                f"{path_name(path)} must have `inverse_intrinsics` with "
                f"`depth`, and only with that. Received: {sorted(fields)}"
            )
        return fields

    def _fields(self, path, given, axes_of, lead, sizes):
        """The fields that are not None, as tensors."""
        if not set(given) <= set(axes_of):
            raise ValueError(
                f"{path_name(path)} may have {tuple(axes_of)}. "
                f"Received: {sorted(given)}"
            )
        return {
            name: self._field(
                f"{path}['{name}']" if path else name,
                name,
                value,
                (*lead, *axes_of[name]),
                sizes,
            )
            for name, value in given.items()
            if value is not None
        }

    def _field(self, path, name, value, axes, sizes):
        """A tensor of what was given under a name, with axes as named."""
        kind, dtype = "real", self.map_dtype
        if name == "mask":
            kind, dtype = "mask", "bool"
        # Only what has numbers has a rank, by which some axes are left out.
        rank = len(check_array(path, value, kind=kind).shape)
        if name == "depth":
            check_depth(path, value, self.depth_scale)
        if name in CONSTANT and rank == len(axes) - 1:
            axes = (axes[0], *axes[-2:])
        is_image = name in ("depth", "mask") and rank == len(axes) + 1
        given = (*axes, 1) if is_image else axes
        tensor = check_array(path, value, given, sizes, kind, dtype)
        shape = tuple(tensor.shape)
        if 0 in (n for axis, n in zip(axes, shape) if axis not in ("B", "F")):
            raise ValueError(
                f"`{path}` must have at least one of each axis but B and F. "
                f"Received: shape {shape}"
            )
        if (3, 4) == axes[-2:] and "bfloat16" in str(
            getattr(value, "dtype", "")
        ):
            raise ValueError(
                f"`{path}` must be more exact, as no rotation is one in "
                "bfloat16. (A model of that policy casts its inputs: give the "
                "one around it another.) Received: dtype bfloat16"
            )
        if name == "inverse_intrinsics":
            # Of a tensor only once, as a device would have to be waited for.
            known = ops.is_tensor(value) and self.built
            known = None if known else values_of(value)
            if known is not None:
                check_camera(path, known, self.convention)
        return tensor[..., 0] if is_image else tensor


def values_of(array):
    """A NumPy array, or None of a tensor that has no values yet."""
    if isinstance(array, keras.KerasTensor):
        return None
    try:
        return np.asarray(ops.convert_to_numpy(array))
    except (NotImplementedError, TypeError, RuntimeError):  # while tracing
        return None


def as_mask(mask, batch, times):
    """(B, T) bools, of what a user or Keras gives."""
    given = [leaf for leaf in keras.tree.flatten(mask) if leaf is not None]
    if not given:
        return None
    sizes = {"B": batch, "T": times}
    return check_array(
        "mask", given[0], ("B", "T"), sizes, kind="mask", dtype="bool"
    )


def check_inputs(inputs):
    """Raises ValueError unless there are cameras and a motion."""
    is_dict = isinstance(inputs, dict)
    if not is_dict or not {"cameras", "motion"} <= set(inputs):
        raise ValueError(
            "Inputs must be a dict with `cameras` and `motion`. Received: "
            f"{sorted(inputs) if is_dict else type(inputs).__name__}"
        )


def check_has(path, given, name):
    """Raises ValueError unless there is a field of that name."""
    if name not in given:
        raise ValueError(
            f"{path_name(path)} must have `{name}`. Received: {sorted(given)}"
        )


def path_name(path):
    """How an error names the place `path`, or the inputs as a whole."""
    return f"`{path}`" if path else "Inputs"


def check_limits(name, limits):
    """A pair, from something positive to something larger."""
    pair = plain_tuple(limits)
    pair = pair if isinstance(pair, tuple) else ()
    is_right = len(pair) == 2 and all(map(is_number, pair))
    if not is_right or not 0 < pair[0] < pair[1]:
        raise ValueError(
            f"`{name}` must be two positive numbers, the least and the most. "
            f"Received: {name}={limits!r}"
        )
    return pair
