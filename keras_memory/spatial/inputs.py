"""Checks of the inputs of Egospheric Spatial Memory: cameras and motions."""

import keras
import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import is_number
from keras_memory.checks import plain_tuple
from keras_memory.spatial.cameras import check_camera
from keras_memory.spatial.cameras import check_depth

# Axes of each field after batch and time.
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
CONSTANT = "inverse_intrinsics", "pose", "pose_covariance"  # may lack time


class MapInputs:
    """Turns the inputs of a layer with a map into checked tensors.

    A base class; the layer must have the attributes `feature_channels`,
    `convention`, `depth_scale` and `map_dtype`.
    """

    def _sizes(self):
        return {"F": self.feature_channels, "3 + F": 3 + self.feature_channels}

    def _parsed(self, inputs, lead):
        """Returns checked tensors: a list of dicts, one for each camera, and a
        dict for the motion. `lead` names the first axes of all tensors."""
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
                "`cameras` must have at least one camera. Received: cameras=[]"
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
        own = dict(sizes)  # image sizes may differ between cameras
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
                f"{path_name(path)} must have `inverse_intrinsics` if it has "
                f"`depth`, and only then. Received: {sorted(fields)}"
            )
        return fields

    def _fields(self, path, given, axes_of, lead, sizes):
        """The fields that are not None, as tensors."""
        if not set(given) <= set(axes_of):
            raise ValueError(
                f"{path_name(path)} must have no keys but {tuple(axes_of)}. "
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
        """Checks one field and returns it as a tensor with the given axes."""
        kind, dtype = "real", self.map_dtype
        if name == "mask":
            kind, dtype = "mask", "bool"
        # The rank tells whether optional axes are left out.
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
                f"`{path}` must have no axis of size 0 but B and F. "
                f"Received: shape {shape}"
            )
        if (3, 4) == axes[-2:] and "bfloat16" in str(
            getattr(value, "dtype", "")
        ):
            raise ValueError(
                f"`{path}` must have a more precise dtype: rounded to bfloat16 "
                "it is no rotation. (A model with a bfloat16 policy casts its "
                "inputs: give the outer model another policy.) "
                "Received: dtype bfloat16"
            )
        if name == "inverse_intrinsics":
            # Tensors are checked only once: reading values waits for a device.
            known = ops.is_tensor(value) and self.built
            known = None if known else values_of(value)
            if known is not None:
                check_camera(path, known, self.convention)
        return tensor[..., 0] if is_image else tensor


def values_of(array):
    """The values as a NumPy array; None for a symbolic tensor."""
    if isinstance(array, keras.KerasTensor):
        return None
    try:
        return np.asarray(ops.convert_to_numpy(array))
    except (NotImplementedError, TypeError, RuntimeError):  # while tracing
        return None


def as_mask(mask, batch, times):
    """Checks a mask from a user or from Keras: (B, T) bool, or None."""
    given = [leaf for leaf in keras.tree.flatten(mask) if leaf is not None]
    if not given:
        return None
    sizes = {"B": batch, "T": times}
    return check_array(
        "mask", given[0], ("B", "T"), sizes, kind="mask", dtype="bool"
    )


def check_inputs(inputs):
    """Raises ValueError unless inputs have `cameras` and `motion`."""
    is_dict = isinstance(inputs, dict)
    if not is_dict or not {"cameras", "motion"} <= set(inputs):
        raise ValueError(
            "Inputs must be a dict with `cameras` and `motion`. Received: "
            f"{sorted(inputs) if is_dict else type(inputs).__name__}"
        )


def check_has(path, given, name):
    """Raises ValueError unless `given` has the field `name`."""
    if name not in given:
        raise ValueError(
            f"{path_name(path)} must have `{name}`. Received: {sorted(given)}"
        )


def path_name(path):
    """The name of `path` in an error, or of the inputs as a whole."""
    return f"`{path}`" if path else "Inputs"


def check_limits(name, limits):
    """Checks a pair of numbers, 0 < least < most."""
    pair = plain_tuple(limits)
    pair = pair if isinstance(pair, tuple) else ()
    is_right = len(pair) == 2 and all(map(is_number, pair))
    if not is_right or not 0 < pair[0] < pair[1]:
        raise ValueError(
            f"`{name}` must be two positive numbers, the smaller one first. "
            f"Received: {name}={limits!r}"
        )
    return pair
