"""Where things are: cameras, the sphere around an agent, and its image.

Pure functions without weights or state, for Egospheric Spatial Memory (Lenton
et al. 2021, arXiv 2102.07764). Axes: B batch, n points or pixels of any shape,
H rows and W columns of the sphere's image, C channels.

A frame has x to the left, y up and z forward, in metres. A pose is (3, 4), a
rotation beside a translation, and acts on points: it maps coordinates in one
frame to those in another. On the sphere a point has an azimuth, 0 forward and
pi / 2 to the left, a polar angle, 0 up and pi down, both in radians, and a
radius in metres. In the sphere's image it has a column from 0, behind, over
W / 2, forward, to W, behind, a row from 0, up, to H, down, both in pixels, and
the radius as its depth.

Where a camera, or a robot, comes in, `convention` names the axes that it has:

    convention  a camera's x, y, z      an agent's x, y, z
    "esm"       left, up, forward       left, up, forward    (the default)
    "opencv"    right, down, forward    right, down, forward
    "opengl"    right, up, back         right, up, back
    "ros"       right, down, forward    forward, left, up

"opencv" is also that of most drivers and data sets, and "ros" that of ROS: an
optical frame and a body's. `inverse_intrinsics` is the inverse of the usual
K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in all of them but "esm", where its
first two rows have the other sign, so that it gives (x, y, 1).

Arrays of different float dtypes are computed in the widest of them.
"""

import contextlib
import functools
import itertools
import math

import keras
import numpy as np
from keras import ops

from keras_memory.checks import LONGEST_AXIS
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_one_of
from keras_memory.checks import check_size
from keras_memory.checks import is_number

CONVENTIONS = {  # where x, y and z point, of cameras and of agents
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
TINY = 1e-30  # of squares: what is shorter is the origin
SMALL = 1e-6  # squared angles below are those of no turn
UPRIGHT = 1e-8  # squared angles from the poles below which all are the same
ROTATION_TOLERANCE = 1e-3  # of what a rotation times its transpose is


# Conventions.


def camera_axes(convention):
    """The pose from a camera's frame to the same with axes as here.

    Args:
        convention: `"esm"`, `"opencv"`, `"opengl"` or `"ros"`; see above.

    Returns:
        (3, 4) float64 array.

    Example:

    >>> right, down, forward = camera_axes("opencv")[:, :3].T
    >>> right
    array([-1.,  0.,  0.])
    """
    return _axes(convention, 0)


def agent_axes(convention):
    """As `camera_axes`, of an agent's frame."""
    return _axes(convention, 1)


def _axes(convention, whose):
    check_one_of("convention", convention, CONVENTIONS)
    ways = [WAYS[way] for way in CONVENTIONS[convention][whose]]
    return np.eye(4)[:3] @ np.block(
        [[np.transpose(ways), np.zeros((3, 1))], [np.eye(4)[3:]]]
    )


def _optical_axes(convention):
    """(3, 3), from what inverse intrinsics give to a camera's axes."""
    given = "esm" if convention == "esm" else "opencv"
    return camera_axes(convention)[:, :3].T @ camera_axes(given)[:, :3]


# Cameras.


def inverse_intrinsics(focal_lengths, principal_point, convention="esm"):
    """What maps pixels of a pinhole camera to directions in its frame.

    Args:
        focal_lengths: (fx, fy) in pixels.
        principal_point: (cx, cy) in pixels, to the right and down from the
            centre of the pixel in the corner; the image's middle is at
            ((w - 1) / 2, (h - 1) / 2).
        convention: str; see above. Of any but `"esm"` it is the inverse of
            K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].

    Returns:
        (3, 3) float64 array: times (column, row, 1) it gives (x, y, 1).

    Raises:
        ValueError: a focal length that is not positive, or no two finite
            numbers.

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
            "`focal_lengths` must be two positive numbers of pixels. "
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
            f"`{name}` must be two finite numbers of pixels. "
            f"Received: {name}={pair.tolist()}"
        )
    return pair


def _sign(convention):
    """Of the first two entries on the diagonal of inverse intrinsics."""
    check_one_of("convention", convention, CONVENTIONS)
    return -1 if convention == "esm" else 1


def is_camera(inverse_intrinsics, convention="esm"):
    """Which matrices are the inverse intrinsics of a pinhole camera.

    Args:
        inverse_intrinsics: (..., 3, 3), any value.
        convention: str; see above.

    Returns:
        (...) bool; False for NaN, the signs of another convention, the
        intrinsics K themselves, and for another last row than (0, 0, 1).
    """
    (matrix,) = _tensors(inverse_intrinsics=(inverse_intrinsics, (..., 3, 3)))
    scales = ops.stack([matrix[..., 0, 0], matrix[..., 1, 1]], axis=-1)
    scales, offsets = (
        _sign(convention) * part for part in (scales, matrix[..., :2, 2])
    )
    # Of the inverse, offsets are minus those of the middle; no focal length is
    # shorter than a pixel.
    is_inverse = ops.any((scales <= 1.0) | (offsets <= 0.0), axis=-1)
    last = matrix[..., 2, :] - ops.cast([0, 0, 1], ops.dtype(matrix))
    # A comparison with NaN is False.
    return (
        ops.all(scales > 0.0, axis=-1)
        & is_inverse
        & ops.all(ops.abs(last) < ROTATION_TOLERANCE, axis=-1)
        & ops.all(ops.isfinite(matrix), axis=(-2, -1))
    )


def check_camera(name, matrix, convention="esm"):
    """Raises ValueError for finite matrices that are no inverse intrinsics.

    Args:
        name: str, of the argument, for the error.
        matrix: (..., 3, 3) NumPy array.
        convention: str; see above.
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
            why = "It is K itself: give its inverse, `np.linalg.inv(K)`"
    alike = [one for one in CONVENTIONS if is_right(first, one)]
    if alike:
        words = " and ".join(f'"{one}"' for one in alike)
        why = f"It has the signs of {words}: say which convention it is"
    raise ValueError(
        f"`{name}` must be the inverse of a camera's intrinsics, of "
        f"`convention={convention!r}`. {why}. Received: {first.tolist()}"
    )


def check_depth(name, depth, depth_scale=None):
    """Raises ValueError for whole numbers of no known unit.

    Args:
        name: str, of the argument, for the error.
        depth: array of real numbers.
        depth_scale: metres in a unit of it, or None for metres.
    """
    if not hasattr(depth, "dtype"):
        depth = np.asarray(depth)
    dtype = str(getattr(depth.dtype, "name", depth.dtype))
    if depth_scale is None and "int" in dtype:
        raise ValueError(
            f"`{name}` must be in metres, of a float dtype. Cameras give "
            "integers in other units, mostly millimetres: give "
            f"`depth_scale=0.001`, the metres in a unit. Received: {dtype}"
        )


def check_depth_scale(depth_scale):
    """A positive number of metres, or None; else ValueError."""
    if depth_scale is None:
        return None
    if not is_number(depth_scale) or depth_scale <= 0:
        raise ValueError(
            "`depth_scale` must be a positive number, the metres in a unit of "
            f"depth, or None. Received: depth_scale={depth_scale!r}"
        )
    return float(depth_scale)


def pixels_to_camera(
    depth, inverse_intrinsics, convention="esm", depth_scale=None
):
    """Coordinates of what a pinhole camera sees.

    Args:
        depth: (..., h, w) along the optical axis, in metres, or in units of
            `depth_scale`.
        inverse_intrinsics: (..., 3, 3), as `inverse_intrinsics` gives it.
        convention: str, of the camera; see above.
        depth_scale: metres in a unit of depth, such as 0.001 for millimetres;
            None (default) for metres, of a float dtype.

    Returns:
        (..., h, w, 3) metres in the camera's frame.

    Raises:
        ValueError: integer depth without its scale, or a NumPy array of
            intrinsics that are of another convention or not inverted.
    """
    matrix = inverse_intrinsics
    tensors = _tensors(
        depth=(depth, (..., "h", "w")), inverse_intrinsics=(matrix, (..., 3, 3))
    )
    _check_leads(depth=tensors[0], inverse_intrinsics=tensors[1])
    check_depth("depth", depth, check_depth_scale(depth_scale))
    if not ops.is_tensor(matrix) and not isinstance(matrix, keras.KerasTensor):
        check_camera("inverse_intrinsics", np.asarray(matrix), convention)
    depth, matrix = tensors
    if depth_scale is not None:
        depth = depth * depth_scale
    dtype = ops.dtype(depth)
    rows, columns = np.mgrid[: depth.shape[-2], : depth.shape[-1]]
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    matrix = _product(ops.cast(_optical_axes(convention), dtype), matrix)
    directions = _turned(ops.cast(pixels, dtype), matrix[..., None, None, :, :])
    return directions * depth[..., None]


# Poses.


def transform(points, pose):
    """Coordinates of points in another frame.

    Args:
        points: (B, n, 3) metres.
        pose: (B, 3, 4), from their frame to the other.

    Returns:
        (B, n, 3) metres.
    """
    points, pose = _tensors(
        points=(points, ("B", "n", 3)), pose=(pose, ("B", 3, 4))
    )
    return _turned(points, pose[..., None, :, :3]) + pose[..., None, :, 3]


def rotation_matrix(rotation_vector):
    """The rotation about an axis, by Rodrigues' formula.

    Args:
        rotation_vector: (..., 3), along the axis, as long as the angle in
            radians; counter-clockwise as seen from its tip.

    Returns:
        (..., 3, 3). Gradients are finite where the angle is 0.

    Example:

    >>> half_turn = np.array([0.0, np.pi, 0.0])
    >>> ops.convert_to_numpy(rotation_matrix(half_turn)).round(6) + 0.0
    array([[-1.,  0.,  0.],
           [ 0.,  1.,  0.],
           [ 0.,  0., -1.]])
    """
    (vector,) = _tensors(rotation_vector=(rotation_vector, (..., 3)))
    square = ops.sum(vector * vector, axis=-1)[..., None, None]
    is_small = square < SMALL
    angle = ops.sqrt(ops.where(is_small, 1.0, square))
    by_sine = ops.where(is_small, 1.0 - square / 6.0, ops.sin(angle) / angle)
    by_cosine = ops.where(
        is_small,
        0.5 - square / 24.0,
        (1.0 - ops.cos(angle)) / (angle * angle),
    )
    x, y, z = (vector[..., i] for i in range(3))
    zero = ops.zeros_like(x)
    cross = ops.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1)
    cross = ops.reshape(cross, (*ops.shape(x), 3, 3))
    identity = ops.eye(3, dtype=ops.dtype(cross))
    return identity + by_sine * cross + by_cosine * _product(cross, cross)


def pose_matrix(pose_vector):
    """A pose of a translation and a rotation vector.

    Args:
        pose_vector: (..., 6), three metres, then three radians as of
            `rotation_matrix`.

    Returns:
        (..., 3, 4).
    """
    (pose_vector,) = _tensors(pose_vector=(pose_vector, (..., 6)))
    rotation = rotation_matrix(pose_vector[..., 3:])
    return ops.concatenate([rotation, pose_vector[..., :3, None]], axis=-1)


def compose(second, first):
    """The pose that does what `first` does, then what `second` does.

    Args:
        second, first: (..., 3, 4).

    Returns:
        (..., 3, 4).
    """
    second, first = _tensors(
        second=(second, (..., 3, 4)), first=(first, (..., 3, 4))
    )
    _check_leads(second=second, first=first)
    rotation, translation = second[..., :3], second[..., 3:]
    last = ops.cast(np.array([0, 0, 0, 1]), ops.dtype(translation))
    return _product(rotation, first) + translation * last


def invert(pose):
    """The pose that undoes another, (..., 3, 4)."""
    (pose,) = _tensors(pose=(pose, (..., 3, 4)))
    back = ops.swapaxes(pose[..., :3], -1, -2)
    return ops.concatenate([back, -_product(back, pose[..., 3:])], axis=-1)


def motions(poses):
    """How an agent moved from step to step.

    Args:
        poses: (..., T, 3, 4), from the agent's frame at each step to one that
            rests.

    Returns:
        (..., T, 3, 4), from the frame at the step before to that at each step;
        at the first it did not move.
    """
    (poses,) = _tensors(poses=(poses, (..., "T", 3, 4)))
    before = ops.concatenate([poses[..., :1, :, :], poses[..., :-1, :, :]], -3)
    return compose(invert(poses), before)


def is_pose(pose):
    """Which matrices are poses: a rotation beside a finite translation.

    Args:
        pose: (..., 3, 4), any value.

    Returns:
        (...) bool; False for NaN, scalings and mirrors too.
    """
    (pose,) = _tensors(pose=(pose, (..., 3, 4)))
    rotation, translation = pose[..., :3], pose[..., 3]
    transposed = ops.swapaxes(rotation, -1, -2)
    identity = ops.eye(3, dtype=ops.dtype(rotation))
    error = _product(rotation, transposed) - identity
    x, y, z = (rotation[..., i, :] for i in range(3))
    determinant = ops.sum(ops.cross(x, y, axis=-1) * z, axis=-1)
    # A comparison with NaN is False.
    return (
        ops.all(ops.abs(error) < ROTATION_TOLERANCE, axis=(-2, -1))
        & (determinant > 0)
        & ops.all(ops.isfinite(translation), axis=-1)
    )


# The sphere, and its image.


def to_sphere(points):
    """Where points are on the sphere around their frame's origin.

    Args:
        points: (..., 3) metres.

    Returns:
        (..., 3): azimuth in (-pi, pi], polar angle in [0, pi], radius. Straight
        up and down the azimuth is 0, and at the origin all are. Gradients are
        finite everywhere, and 0 where there are none.
    """
    (points,) = _tensors(points=(points, (..., 3)))
    x, y, z = (points[..., i] for i in range(3))
    square = x * x + z * z
    on_axis = square < TINY
    level = ops.where(on_axis, 0.0, ops.sqrt(ops.where(on_axis, 1.0, square)))
    azimuth = ops.arctan2(
        ops.where(on_axis, 0.0, x), ops.where(on_axis, 1.0, z)
    )
    square = square + y * y
    at_origin = square < TINY
    polar = ops.arctan2(level, ops.where(at_origin, 1.0, y))
    root = ops.sqrt(ops.where(at_origin, 1.0, square))
    radius = ops.where(at_origin, 0.0, root)
    return ops.stack([azimuth, polar, radius], axis=-1)


def from_sphere(sphere):
    """Coordinates, in metres, of what `to_sphere` gave: (..., 3)."""
    (sphere,) = _tensors(sphere=(sphere, (..., 3)))
    azimuth, polar, radius = (sphere[..., i] for i in range(3))
    level = radius * ops.sin(polar)
    return ops.stack(
        [
            level * ops.sin(azimuth),
            radius * ops.cos(polar),
            level * ops.cos(azimuth),
        ],
        axis=-1,
    )


def to_pixels(sphere, height, width):
    """Where points are in the image of the sphere.

    Args:
        sphere: (..., 3), as `to_sphere` gives it.
        height, width: ints, H and W.

    Returns:
        (..., 3): column in [0, W), row in [0, H], depth.
    """
    height, width = check_size("height", height), check_size("width", width)
    (sphere,) = _tensors(sphere=(sphere, (..., 3)))
    azimuth, polar, radius = (sphere[..., i] for i in range(3))
    column = (math.pi - azimuth) * (width / (2 * math.pi))
    row = polar * (height / math.pi)
    return ops.stack([column, row, radius], axis=-1)


def from_pixels(pixels, height, width):
    """Azimuth, polar angle and radius of what `to_pixels` gave: (..., 3)."""
    height, width = check_size("height", height), check_size("width", width)
    (pixels,) = _tensors(pixels=(pixels, (..., 3)))
    column, row, depth = (pixels[..., i] for i in range(3))
    azimuth = math.pi - column * (2 * math.pi / width)
    return ops.stack([azimuth, row * (math.pi / height), depth], axis=-1)


def pixel_grid(height, width):
    """(H, W, 2) float32 array: column and row of each pixel's middle."""
    height, width = check_size("height", height), check_size("width", width)
    sizes = [("height", height), ("width", width), ("", 4)]  # and as integers
    check_bytes("The grid", sizes, "int64", on_host=True)
    return _grid(height, width)


@functools.lru_cache(maxsize=8)
def _grid(height, width):
    rows, columns = np.mgrid[:height, :width].astype("float32")
    return np.stack([columns, rows], axis=-1)


def pixel_variance(points, covariance, height, width):
    """How much an uncertain pose of points moves them in the sphere's image.

    To first order: what a small translation, and a small rotation about the
    origin, of that covariance do.

    Args:
        points: (B, n, 3) metres, after the pose.
        covariance: (B, 6, 6), of translation in metres and rotation vector in
            radians, symmetric and not negative.
        height, width: ints, H and W.

    Returns:
        (B, n, 3) variances of columns and rows, in squared pixels, and of
        depth, in squared metres; 0 at the origin.
    """
    height, width = check_size("height", height), check_size("width", width)
    points, covariance = _tensors(
        points=(points, ("B", "n", 3)), covariance=(covariance, ("B", 6, 6))
    )
    is_there = ops.sum(points * points, axis=-1, keepdims=True) > TINY
    points = ops.where(is_there, points, 1.0)
    x, y, z = (points[..., i] for i in range(3))
    radius_2 = x * x + y * y + z * z
    # Beside an axis the slopes are without bound.
    level_2 = at_least(x * x + z * z, UPRIGHT * radius_2)
    level, zero = ops.sqrt(level_2), ops.zeros_like(x)
    azimuth = [z / level_2, zero, -x / level_2]
    polar = [
        x * y / (level * radius_2),
        -level / radius_2,
        z * y / (level * radius_2),
    ]
    depth = [part / ops.sqrt(radius_2) for part in (x, y, z)]
    slopes = [
        ops.stack(slope, axis=-1) * scale
        for slope, scale in (
            (azimuth, width / (2 * math.pi)),
            (polar, height / math.pi),
            (depth, 1.0),
        )
    ]
    by_move = ops.stack(slopes, axis=-2)
    by_turn = ops.cross(points[..., None, :], by_move, axis=-1)
    jacobian = ops.concatenate([by_move, by_turn], axis=-1)  # (B, n, 3, 6)
    spread = _product(jacobian, covariance[:, None])
    variance = ops.sum(spread * jacobian, axis=-1)
    return ops.where(is_there, variance, 0.0)


def turn_covariance(covariance, rotation):
    """The covariance of a small motion, in a frame with other axes.

    Args:
        covariance: (..., 6, 6), of translation and rotation vector.
        rotation: (3, 3), from the axes that these have to the others.

    Returns:
        (..., 6, 6).
    """
    covariance, rotation = _tensors(
        covariance=(covariance, (..., 6, 6)), rotation=(rotation, (3, 3))
    )
    none = ops.zeros_like(rotation)
    turn = ops.concatenate(
        [
            ops.concatenate([rotation, none], axis=-1),
            ops.concatenate([none, rotation], axis=-1),
        ],
        axis=-2,
    )
    return _product(_product(turn, covariance), ops.transpose(turn))


# Measurements.


def fuse(means, variances):
    """The product of Gaussians: what measurements of the same thing tell.

    Source: Lenton et al. 2021, for any number of measurements: v = 1 / sum 1 /
    v_k, m = v sum m_k / v_k.

    Args:
        means: list of arrays of one shape, any finite value.
        variances: likewise, not negative; infinity for what was not measured.

    Returns:
        Mean and variance, of that shape. What nobody measured has the mean 0
        and infinite variance.

    Example:

    >>> ones = np.ones(1)
    >>> mean, variance = fuse([0 * ones, 3 * ones, 6 * ones], [ones] * 3)
    >>> float(mean[0]), float(variance[0])
    (3.0, 0.3333333333333333)
    """
    lists = {"means": means, "variances": variances}
    if not all(hasattr(some, "__iter__") for some in lists.values()) or (
        not 0 < len(means) == len(variances)
    ):
        raise ValueError(
            "`means` and `variances` must be two lists of arrays, of one "
            f"length. Received: means={means!r}, variances={variances!r}"
        )
    axes = tuple(check_array("means[0]", means[0]).shape)
    tensors = _tensors(
        **{
            f"{name}[{i}]": (some[i], axes)
            for name, some in lists.items()
            for i in range(len(some))
        }
    )
    means, variances = tensors[: len(means)], tensors[len(means) :]
    precisions = [1.0 / at_least(variance, TINY) for variance in variances]
    weighted = [mean * precision for mean, precision in zip(means, precisions)]
    return _of_sums(sum(weighted), sum(precisions))


def _of_sums(weighted, precision):
    is_hole = precision <= 0.0
    variance = 1.0 / ops.where(is_hole, 1.0, precision)
    return weighted * variance, ops.where(is_hole, np.inf, variance)


def quantize(mean, variance, valid, height, width, depth_buffer=True):
    """Rounds points to the pixels of the sphere's image.

    A pixel has the points that are within half a pixel of its middle; where
    there are none, it shows the nearest of those that are within one pixel, so
    that what moved is not full of holes. Points keep their own coordinates.

    Source: Lenton et al. 2021: of all points in a pixel the nearest is kept
    (depth buffer), or they are fused by their variances.
    Departure: the reference leaves holes as they are; its depth buffer mixes
    channels of points that are nearly as near; its columns are not continuous
    across the seam; its lower pole is in the upper one's row; and of n points
    that it fuses the variance is n times that of the product of Gaussians.

    Args:
        mean: (B, n, C) column, row, depth, and further channels, finite, depth
            not negative.
        variance: (B, n, C), positive.
        valid: (B, n) bool, False for points that are left out.
        height, width: ints, H and W.
        depth_buffer: bool, keep the nearest (default), or fuse.

    Returns:
        Mean and variance, (B, H, W, C), 0 and infinity where no point is, and
        (B, H, W, 1) bool, True for pixels that have points of their own.
        Gradients flow to the points that are kept.

    Example:

    >>> points = np.array([[[1.2, 0.0, 3.0], [0.9, 0.1, 2.0]]])
    >>> ones = np.ones_like(points)
    >>> mean, variance, own = quantize(points, ones, [[True, True]], 1, 4)
    >>> ops.convert_to_numpy(mean)[0, 0, :, 2]
    array([2., 2., 3., 0.])
    >>> ops.convert_to_numpy(own)[0, 0, :, 0]
    array([False,  True, False, False])
    """
    height, width = check_size("height", height), check_size("width", width)
    check_bool("depth_buffer", depth_buffer)
    sizes, axes = {}, ("B", "n", "C")
    mean, variance = _tensors(
        sizes, mean=(mean, axes), variance=(variance, axes)
    )
    if sizes.get("C", 3) < 3 or sizes.get("n", 1) < 1:
        raise ValueError(
            "`mean` must have at least one point, of at least column, row and "
            f"depth. Received: shape {tuple(mean.shape)}"
        )
    valid = check_array(
        "valid", valid, axes[:2], sizes, kind="mask", dtype="bool"
    )
    valid = ops.reshape(valid, (-1,))
    batch, number, channels = ops.shape(mean)
    if height * width * (batch if isinstance(batch, int) else 1) > LONGEST_AXIS:
        raise ValueError(
            f"`height` x `width` x B must be at most {LONGEST_AXIS}, as pixels "
            f"have int32 numbers. Received: height={height}, width={width}, "
            f"B={batch}"
        )
    shape = (batch, height, width)
    pixels = batch * height * width
    first = height * width * ops.arange(batch, dtype="int32")
    first = ops.reshape(ops.tile(first[:, None], (1, number)), (-1,))

    def place(columns, rows):
        """(B n,) the pixel in a line of all; behind it for what is left out."""
        row = ops.clip(ops.cast(rows, "int32"), 0, height - 1)
        column = ops.cast(columns, "int32") % width
        line = first + ops.reshape(row * width + column, (-1,))
        return ops.where(valid, line, pixels)

    columns, rows = (ops.stop_gradient(mean[..., i]) for i in range(2))
    column, row = ops.floor(columns + 0.5), ops.floor(rows + 0.5)
    # The pixels around each point: its own, which counts more, and others.
    beside = column + ops.sign(columns - column)
    above = row + ops.sign(rows - row)
    own = place(column, row)
    others = [(beside, row), (column, above), (beside, above)]
    line = ops.concatenate([own, *(place(*other) for other in others)])
    nearness = 1.0 / (1.0 + ops.stop_gradient(mean[..., 2]))  # above 0, to 1
    # PyTorch's maxima of segments are those of float32.
    dtype = keras.backend.result_type(ops.dtype(nearness), "float32")
    nearness = ops.reshape(ops.cast(nearness, dtype), (-1,))
    nearness = ops.concatenate([nearness + 1.0, nearness, nearness, nearness])
    most = ops.segment_max(nearness, line, pixels + 1)
    point = ops.tile(ops.arange(batch * number, dtype="int32"), (4,))
    point = ops.where(nearness >= ops.take(most, line), point, -1)
    point = ops.segment_max(point, line, pixels + 1)[:pixels]
    is_hole = (point < 0)[:, None]
    is_own = most[:pixels, None] > 1.0
    both = ops.concatenate([mean, variance], axis=-1)
    both = ops.reshape(both, (-1, 2 * channels))
    kept = ops.take(both, ops.maximum(point, 0), axis=0)
    mean = ops.where(is_hole, 0.0, kept[:, :channels])
    variance = ops.where(is_hole, np.inf, kept[:, channels:])
    if not depth_buffer:
        around = ops.floor((both[:, :1] + 0.5) / width)
        means = both[:, :channels] - ops.pad(
            width * ops.stop_gradient(around), ((0, 0), (0, channels - 1))
        )
        precision = 1.0 / at_least(both[:, channels:], TINY)
        sums = ops.concatenate([means * precision, precision], axis=-1)
        sums = ops.segment_sum(sums, own, pixels + 1)[:pixels]
        fused = _of_sums(sums[:, :channels], sums[:, channels:])
        mean = ops.where(is_own, fused[0], mean)
        variance = ops.where(is_own, fused[1], variance)
    # Beside the seam, columns go on beyond the first and the last.
    grid = ops.cast(ops.arange(pixels) % width, ops.dtype(mean))[:, None]
    around = ops.round(ops.stop_gradient(mean[:, :1] - grid) / width)
    mean = ops.concatenate([mean[:, :1] - width * around, mean[:, 1:]], -1)
    return (
        ops.reshape(mean, (*shape, channels)),
        ops.reshape(variance, (*shape, channels)),
        ops.reshape(is_own & ops.logical_not(is_hole), (*shape, 1)),
    )


def pad_sphere(image, size):
    """Continues an image of the sphere across its poles and its seam.

    Args:
        image: (B, H, W, C), W even.
        size: int, from 0 to H, how many pixels to each side; at most W.

    Returns:
        (B, H + 2 size, W + 2 size, C).

    Example:

    >>> image = np.arange(4.0).reshape(1, 1, 4, 1)
    >>> ops.convert_to_numpy(pad_sphere(image, 1))[0, ..., 0]
    array([[1., 2., 3., 0., 1., 2.],
           [3., 0., 1., 2., 3., 0.],
           [1., 2., 3., 0., 1., 2.]])
    """
    size = check_size("size", size, least=0)
    (image,) = _tensors(image=(image, ("B", "H", "W", "C")))
    _check_around(image, size)
    image = _pad_poles(image, size)
    left, right = image[:, :, image.shape[2] - size :], image[:, :, :size]
    return ops.concatenate([left, image, right], axis=2)


def _check_around(image, size):
    """Raises ValueError unless `_pad_poles` can take so many pixels."""
    height, width = image.shape[1:3]
    if width % 2 or size > min(height, width):
        raise ValueError(
            "An image of a sphere must have an even number of columns, and at "
            f"least as many rows and columns as are added, {size}. Received: "
            f"shape {tuple(image.shape)}"
        )


def _pad_poles(image, size):
    height, width = image.shape[1:3]
    # Beyond a pole is the other side.
    other = ops.roll(image, width // 2, axis=2)
    above = ops.flip(other[:, :size], axis=1)
    below = ops.flip(other[:, height - size :], axis=1)
    return ops.concatenate([above, image, below], axis=1)


def smoothing_kernel(size):
    """(size, size) float64 array of an odd size, 1 / (1 + distance in pixels).

    Source: Lenton et al. 2021, smoothing.
    """
    if check_size("size", size) % 2 == 0:
        raise ValueError(
            f"`size` must be odd, to have a middle. Received: size={size}"
        )
    sizes = ("size", size), ("size", size)
    check_bytes("The kernel", sizes, "float64", on_host=True)
    places = np.arange(size) - size // 2
    distance = np.hypot(places[:, None], places[None])
    return 1 / (1 + distance)


def smooth(mean, variance, kernel):
    """The mean around each pixel, by what is near and what is certain.

    Source: Lenton et al. 2021, smoothing: m = sum_j c_j m_j / v_j / sum_j c_j /
    v_j.
    Departure: the reference adds a hundredth of the kernel's sum to the
    denominator, and takes the absolute value.

    Args:
        mean: (B, H, W, C), finite.
        variance: (B, H, W, C), positive.
        kernel: (k, k) array, not negative, symmetric about both its axes, k
            odd and at most 2 H + 1. Its dtype does not count.

    Returns:
        (B, H, W, C) means; variances are not smoothed.
    """
    axes = "B", "H", "W", "C"
    mean, variance = _tensors(mean=(mean, axes), variance=(variance, axes))
    kernel = check_array(
        "kernel", kernel, ("k", "k"), dtype="float64", result="numpy"
    )
    if len(kernel) % 2 == 0:
        raise ValueError(
            "`kernel` must have an odd number of rows, to have a middle. "
            f"Received: shape {kernel.shape}"
        )
    _check_around(mean, len(kernel) // 2)
    if 0 in mean.shape:  # PyTorch has no spectra of nothing
        return mean
    precision = 1.0 / at_least(variance, TINY)
    both = ops.concatenate([mean * precision, precision], axis=-1)
    if keras.backend.backend() == "jax":  # has no float64 unless it is told
        both = _convolved(both, kernel)
    else:
        both = _convolved_by_spectra(both, kernel)
    weighted, precision = ops.split(both, 2, axis=-1)
    return weighted / precision


def _convolved(image, kernel):
    image = pad_sphere(image, kernel.shape[0] // 2)
    channels = image.shape[-1]
    kernel = np.tile(kernel[:, :, None, None], (1, 1, channels, 1))
    return ops.depthwise_conv(image, ops.cast(kernel, ops.dtype(image)))


def _convolved_by_spectra(image, kernel):
    """As `_convolved`, sooner: rows are periodic. In float64, or what is
    certain would drown in rounding what is not."""
    height, width = image.shape[1:3]
    half = kernel.shape[0] // 2
    rows = np.zeros((half + 1, width))
    for column in range(-half, half + 1):
        rows[:, column % width] += kernel[half:, half + column]
    of_kernel = np.fft.rfft(rows).real  # as it is symmetric
    of_kernel = ops.convert_to_tensor(of_kernel, "float64")
    padded = ops.cast(_pad_poles(image, half), "float64")
    spectra = ops.rfft(ops.transpose(padded, (0, 3, 1, 2)))

    def summed(part):
        total = part[:, :, half : half + height] * of_kernel[0]
        for row in range(1, half + 1):
            above = part[:, :, half - row : half - row + height]
            below = part[:, :, half + row : half + row + height]
            total = total + (above + below) * of_kernel[row]
        return total

    real, imaginary = map(summed, spectra)
    result = ops.irfft((real, imaginary), fft_length=width)
    return ops.cast(ops.transpose(result, (0, 2, 3, 1)), ops.dtype(image))


def _tensors(sizes=None, **arrays):
    """Checked tensors, of the widest float dtype among them.

    Args:
        sizes: dict as of `check_array`.
        **arrays: by name, each an array and its axes as of `check_array`.
    """
    sizes = {} if sizes is None else sizes
    tensors = {
        name: check_array(name, value, axes, sizes)
        for name, (value, axes) in arrays.items()
    }
    # Lists and integers have no float dtype of their own.
    dtypes = [
        ops.dtype(tensors[name])
        for name, (value, _) in arrays.items()
        if "float" in str(getattr(value, "dtype", ""))
    ]
    if len(arrays) == 1 or not dtypes:
        return list(tensors.values())
    dtype = _widest(*dtypes)
    return [
        check_array(name, value, axes, dtype=dtype)
        if ops.dtype(tensors[name]) != dtype
        else tensors[name]
        for name, (value, axes) in arrays.items()
    ]


def _widest(*dtypes):
    """As `keras.backend.result_type`, which on PyTorch has no float64."""
    wide = "float64" in dtypes
    return "float64" if wide else keras.backend.result_type(*dtypes)


def _check_leads(**tensors):
    """Raises ValueError unless all axes but the last two can be broadcast."""
    leads = [tuple(tensor.shape)[-3::-1] for tensor in tensors.values()]
    for sizes in itertools.zip_longest(*leads, fillvalue=1):
        if len(set(sizes) - {1, None}) > 1:
            shapes = [tuple(tensor.shape) for tensor in tensors.values()]
            raise ValueError(
                f"`{'` and `'.join(tensors)}` must agree in all axes but their "
                "last two, or have 1 or none there. Received: shapes "
                f"{' and '.join(map(str, shapes))}"
            )


def _product(matrices, others):
    """(..., i, k) products of (..., i, j) with (..., j, k), for a small j.

    Of `ops.matmul` accelerators round the factors to 11 bits or 8, and so 10
    metres to millimetres.
    """
    return sum(
        matrices[..., j, None] * others[..., j, None, :]
        for j in range(matrices.shape[-1])
    )


def _turned(vectors, matrices):
    """(..., 3) products of (..., 3, 3) with (..., 3)."""
    return _product(matrices, vectors[..., None])[..., 0]


def at_least(values, least):
    """As `ops.maximum`, which on PyTorch makes float32 of float64."""
    values, least = _tensors(values=(values, None), least=(least, None))
    return ops.where(values > least, values, least)
