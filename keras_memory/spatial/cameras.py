"""Cameras: the axes of their frames, and the directions of their pixels.

Pure functions. A frame has x to the left, y up and z forward, in meters.
`convention` names the axes of a given camera or agent (robot):

    convention  a camera's x, y, z      an agent's x, y, z
    "esm"       left, up, forward       left, up, forward    (the default)
    "opencv"    right, down, forward    right, down, forward
    "opengl"    right, up, back         right, up, back
    "ros"       right, down, forward    forward, left, up

Most drivers and data sets use "opencv". "ros" has the optical frame and the
body frame of ROS. `inverse_intrinsics` is the inverse of the usual K = [[fx, 0,
cx], [0, fy, cy], [0, 0, 1]]; with "esm" its first two rows have the opposite
sign, since x and y point left and up.
"""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import check_one_of
from keras_memory.checks import is_number
from keras_memory.hints import Array
from keras_memory.spatial.tensors import check_leads
from keras_memory.spatial.tensors import float_tensors
from keras_memory.spatial.tensors import matrix_product
from keras_memory.spatial.tensors import turned

CONVENTIONS = {  # directions of x, y and z, for cameras and for agents
    "esm": (("left", "up", "forward"), ("left", "up", "forward")),
    "opencv": (("right", "down", "forward"), ("right", "down", "forward")),
    "opengl": (("right", "up", "back"), ("right", "up", "back")),
    "ros": (("right", "down", "forward"), ("forward", "left", "up")),
}
WAYS = {
    "left": (1, 0, 0),
    "up": (0, 1, 0),
    "forward": (0, 0, 1),
    "right": (-1, 0, 0),
    "down": (0, -1, 0),
    "back": (0, 0, -1),
}
ROW_TOLERANCE = 1e-3  # for the last row of inverse intrinsics, (0, 0, 1)


# Conventions.


def camera_axes(convention: Array) -> np.ndarray:
    """The pose from a camera's frame to the same frame with axes of "esm".

    Args:
        convention: `"esm"`, `"opencv"`, `"opengl"` or `"ros"`; see the module.

    Returns:
        (3, 4) float64 array.

    Example:

    >>> right, down, forward = camera_axes("opencv")[:, :3].T
    >>> right
    array([-1.,  0.,  0.])
    """
    return _axes(convention, 0)


def agent_axes(convention: Array) -> np.ndarray:
    """As `camera_axes`, for an agent's frame."""
    return _axes(convention, 1)


def _axes(convention, whose):
    check_one_of("convention", convention, CONVENTIONS)
    ways = [WAYS[way] for way in CONVENTIONS[convention][whose]]
    return np.eye(4)[:3] @ np.block(
        [[np.transpose(ways), np.zeros((3, 1))], [np.eye(4)[3:]]]
    )


def _optical_axes(convention):
    """(3, 3) from the axes of inverse intrinsics to those of the camera."""
    given = "esm" if convention == "esm" else "opencv"
    return camera_axes(convention)[:, :3].T @ camera_axes(given)[:, :3]


# Cameras.


def inverse_intrinsics(
    focal_lengths: Array, principal_point: Array, convention: str = "esm"
) -> np.ndarray:
    """The matrix that maps a pinhole camera's pixels to directions.

    Args:
        focal_lengths: (fx, fy) in pixels.
        principal_point: (cx, cy) in pixels, right and down from the center of
            the top left pixel; the center of the image is at ((w - 1) / 2, (h -
            1) / 2).
        convention: str; see the module. For all but `"esm"` the result is the
            inverse of K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].

    Returns:
        (3, 3) float64 array, which maps (column, row, 1) to (x, y, 1) in the
        camera's frame.

    Raises:
        ValueError: a focal length that is not positive, or an argument that is
            not two finite numbers.

    Example:

    >>> inverse_intrinsics((2.0, 2.0), (0.5, 0.5))
    array([[-0.5 ,  0.  ,  0.25],
           [ 0.  , -0.5 ,  0.25],
           [ 0.  ,  0.  ,  1.  ]])
    """
    sign = _sign(convention)
    fx, fy = pair = _pair("focal_lengths", focal_lengths)
    cx, cy = _pair("principal_point", principal_point)
    if not (pair > 0).all():
        raise ValueError(
            "`focal_lengths` must be two positive numbers, in pixels. "
            f"Received: focal_lengths={pair.tolist()}"
        )
    return np.array(
        [
            [sign / fx, 0, -sign * cx / fx],
            [0, sign / fy, -sign * cy / fy],
            [0, 0, 1],
        ]
    )


def _pair(name, value):
    pair = check_array(name, value, (2,), dtype="float64", result="numpy")
    if not np.isfinite(pair).all():
        raise ValueError(
            f"`{name}` must be two finite numbers, in pixels. "
            f"Received: {name}={pair.tolist()}"
        )
    return pair


def _sign(convention):
    """The sign of the first two diagonal entries of inverse intrinsics."""
    check_one_of("convention", convention, CONVENTIONS)
    return -1 if convention == "esm" else 1


def is_camera(inverse_intrinsics: Array, convention: str = "esm") -> Array:
    """Which matrices are the inverse intrinsics of a pinhole camera.

    Args:
        inverse_intrinsics: (..., 3, 3), any value.
        convention: str; see the module.

    Returns:
        (...) bool; False for NaN, the signs of another convention, the
        intrinsics K themselves, and a last row other than (0, 0, 1).
    """
    (matrix,) = float_tensors(
        inverse_intrinsics=(inverse_intrinsics, (..., 3, 3))
    )
    scales = ops.stack([matrix[..., 0, 0], matrix[..., 1, 1]], axis=-1)
    scales, offsets = (
        _sign(convention) * part for part in (scales, matrix[..., :2, 2])
    )
    # An inverse has negative offsets (K's are positive) or scales of at most 1
    # (no focal length is shorter than a pixel).
    is_inverse = ops.any((scales <= 1.0) | (offsets <= 0.0), axis=-1)
    last = matrix[..., 2, :] - ops.cast([0, 0, 1], ops.dtype(matrix))
    # A comparison with NaN is False.
    return (
        ops.all(scales > 0.0, axis=-1)
        & is_inverse
        & ops.all(ops.abs(last) < ROW_TOLERANCE, axis=-1)
        & ops.all(ops.isfinite(matrix), axis=(-2, -1))
    )


def check_camera(name, matrix, convention="esm"):
    """Raises ValueError for finite matrices that are not inverse intrinsics.

    Args:
        name: str, of the argument, for the error.
        matrix: (..., 3, 3) NumPy array.
        convention: str; see the module.
    """

    def is_right(matrices, convention=convention):
        return ops.convert_to_numpy(is_camera(matrices, convention))

    matrices = matrix.reshape(-1, 3, 3)
    wrong = np.isfinite(matrices).all((-2, -1)) & ~is_right(matrices)
    if not wrong.any():
        return
    first = matrices[np.argmax(wrong)].astype("float64")
    why = "Its last row must be (0, 0, 1), and its focal lengths positive"
    with contextlib.suppress(np.linalg.LinAlgError):
        if is_right(np.linalg.inv(first), "opencv"):
            why = "It is K itself: pass its inverse, `np.linalg.inv(K)`"
    alike = [
        convention for convention in CONVENTIONS if is_right(first, convention)
    ]
    if alike:
        names = " and ".join(f'"{convention}"' for convention in alike)
        why = f"It has the signs of {names}: set `convention`"
    raise ValueError(
        f"`{name}` must be the inverse of a camera's intrinsics, for "
        f"`convention={convention!r}`. {why}. Received: {first.tolist()}"
    )


def check_depth(name, depth, depth_scale=None):
    """Raises ValueError for integer depth without a scale.

    Args:
        name: str, of the argument, for the error.
        depth: array of real numbers.
        depth_scale: meters per unit of depth, or None for meters.
    """
    if not hasattr(depth, "dtype"):
        depth = np.asarray(depth)
    dtype = str(getattr(depth.dtype, "name", depth.dtype))
    if depth_scale is None and "int" in dtype:
        raise ValueError(
            f"`{name}` must be in meters, of a float dtype. Integers are "
            "usually in millimeters: set `depth_scale=0.001`, the meters per "
            f"unit. Received: {dtype}"
        )


def check_depth_scale(depth_scale):
    """Checks `depth_scale`; returns it as a float, or None."""
    if depth_scale is None:
        return None
    if not is_number(depth_scale) or depth_scale <= 0:
        raise ValueError(
            "`depth_scale` must be a positive number, the meters per unit of "
            f"depth, or None. Received: depth_scale={depth_scale!r}"
        )
    return float(depth_scale)


def pixels_to_camera(
    depth: Array,
    inverse_intrinsics: Array,
    convention: str = "esm",
    depth_scale: float | None = None,
) -> Array:
    """Coordinates of the points that a pinhole camera sees.

    Args:
        depth: (..., h, w) along the optical axis, in meters, or in units of
            `depth_scale`.
        inverse_intrinsics: (..., 3, 3), as returned by `inverse_intrinsics`.
        convention: str, of the camera; see the module.
        depth_scale: meters per unit of depth, such as 0.001 for millimeters;
            None (default) for meters, of a float dtype.

    Returns:
        (..., h, w, 3) meters in the camera's frame.

    Raises:
        ValueError: integer depth without a scale, or a NumPy array of
            intrinsics that have another convention or are not inverted.
    """
    matrix = inverse_intrinsics
    tensors = float_tensors(
        depth=(depth, (..., "h", "w")), inverse_intrinsics=(matrix, (..., 3, 3))
    )
    check_leads(depth=tensors[0], inverse_intrinsics=tensors[1])
    check_depth("depth", depth, check_depth_scale(depth_scale))
    if not ops.is_tensor(matrix) and not isinstance(matrix, keras.KerasTensor):
        check_camera("inverse_intrinsics", np.asarray(matrix), convention)
    depth, matrix = tensors
    if depth_scale is not None:
        depth = depth * depth_scale
    dtype = ops.dtype(depth)
    rows, columns = np.mgrid[: depth.shape[-2], : depth.shape[-1]]
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    matrix = matrix_product(ops.cast(_optical_axes(convention), dtype), matrix)
    directions = turned(ops.cast(pixels, dtype), matrix[..., None, None, :, :])
    return directions * depth[..., None]
