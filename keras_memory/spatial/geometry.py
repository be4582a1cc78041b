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

from keras_memory.checks import check_array
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
    (matrix,) = float_tensors(
        inverse_intrinsics=(inverse_intrinsics, (..., 3, 3))
    )
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
    points, pose = float_tensors(
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
    (vector,) = float_tensors(rotation_vector=(rotation_vector, (..., 3)))
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
    return identity + by_sine * cross + by_cosine * matrix_product(cross, cross)


def pose_matrix(pose_vector):
    """A pose of a translation and a rotation vector.

    Args:
        pose_vector: (..., 6), three metres, then three radians as of
            `rotation_matrix`.

    Returns:
        (..., 3, 4).
    """
    (pose_vector,) = float_tensors(pose_vector=(pose_vector, (..., 6)))
    rotation = rotation_matrix(pose_vector[..., 3:])
    return ops.concatenate([rotation, pose_vector[..., :3, None]], axis=-1)


def compose(second, first):
    """The pose that does what `first` does, then what `second` does.

    Args:
        second, first: (..., 3, 4).

    Returns:
        (..., 3, 4).
    """
    second, first = float_tensors(
        second=(second, (..., 3, 4)), first=(first, (..., 3, 4))
    )
    check_leads(second=second, first=first)
    rotation, translation = second[..., :3], second[..., 3:]
    last = ops.cast(np.array([0, 0, 0, 1]), ops.dtype(translation))
    return matrix_product(rotation, first) + translation * last


def invert(pose):
    """The pose that undoes another, (..., 3, 4)."""
    (pose,) = float_tensors(pose=(pose, (..., 3, 4)))
    back = ops.swapaxes(pose[..., :3], -1, -2)
    return ops.concatenate(
        [back, -matrix_product(back, pose[..., 3:])], axis=-1
    )


def motions(poses):
    """How an agent moved from step to step.

    Args:
        poses: (..., T, 3, 4), from the agent's frame at each step to one that
            rests.

    Returns:
        (..., T, 3, 4), from the frame at the step before to that at each step;
        at the first it did not move.
    """
    (poses,) = float_tensors(poses=(poses, (..., "T", 3, 4)))
    before = ops.concatenate([poses[..., :1, :, :], poses[..., :-1, :, :]], -3)
    return compose(invert(poses), before)


def is_pose(pose):
    """Which matrices are poses: a rotation beside a finite translation.

    Args:
        pose: (..., 3, 4), any value.

    Returns:
        (...) bool; False for NaN, scalings and mirrors too.
    """
    (pose,) = float_tensors(pose=(pose, (..., 3, 4)))
    rotation, translation = pose[..., :3], pose[..., 3]
    transposed = ops.swapaxes(rotation, -1, -2)
    identity = ops.eye(3, dtype=ops.dtype(rotation))
    error = matrix_product(rotation, transposed) - identity
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
    (points,) = float_tensors(points=(points, (..., 3)))
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
    (sphere,) = float_tensors(sphere=(sphere, (..., 3)))
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
    (sphere,) = float_tensors(sphere=(sphere, (..., 3)))
    azimuth, polar, radius = (sphere[..., i] for i in range(3))
    column = (math.pi - azimuth) * (width / (2 * math.pi))
    row = polar * (height / math.pi)
    return ops.stack([column, row, radius], axis=-1)


def from_pixels(pixels, height, width):
    """Azimuth, polar angle and radius of what `to_pixels` gave: (..., 3)."""
    height, width = check_size("height", height), check_size("width", width)
    (pixels,) = float_tensors(pixels=(pixels, (..., 3)))
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
    points, covariance = float_tensors(
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
    spread = matrix_product(jacobian, covariance[:, None])
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
    covariance, rotation = float_tensors(
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
    return matrix_product(matrix_product(turn, covariance), ops.transpose(turn))


def float_tensors(sizes=None, **arrays):
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


def check_leads(**tensors):
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


def matrix_product(matrices, others):
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
    return matrix_product(matrices, vectors[..., None])[..., 0]


def at_least(values, least):
    """As `ops.maximum`, which on PyTorch makes float32 of float64."""
    values, least = float_tensors(values=(values, None), least=(least, None))
    return ops.where(values > least, values, least)
