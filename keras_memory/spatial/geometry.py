"""Geometry: poses, the sphere around an agent, and its image.

Pure functions without weights or state, for Egospheric Spatial Memory (Lenton
et al. 2021, arXiv 2102.07764). Axes: B batch, n points or pixels of any shape,
H rows and W columns of the sphere's image, C channels.

A frame has x to the left, y up and z forward, in meters. A pose is (3, 4), a
rotation beside a translation, and maps the coordinates of points in one frame
to those in another. On the sphere a point has an azimuth (0 forward, pi / 2
left) and a polar angle (0 up, pi down), both in radians, and a radius in
meters. In the sphere's image a point has a column (0 behind, W / 2 forward, W
behind again) and a row (0 up, H down), both in pixels, and the radius as its
depth.

This module also exports functions of `cameras.py`, such as
`inverse_intrinsics`; that file has the table of conventions for the axes of a
camera or a robot.

If float dtypes differ, functions compute in the widest one.
"""

import functools
import math

import numpy as np
from keras import ops

from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.spatial.cameras import CONVENTIONS as CONVENTIONS
from keras_memory.spatial.cameras import agent_axes as agent_axes
from keras_memory.spatial.cameras import camera_axes as camera_axes
from keras_memory.spatial.cameras import (
    inverse_intrinsics as inverse_intrinsics,
)
from keras_memory.spatial.cameras import is_camera as is_camera
from keras_memory.spatial.cameras import pixels_to_camera as pixels_to_camera
from keras_memory.spatial.tensors import at_least
from keras_memory.spatial.tensors import check_leads
from keras_memory.spatial.tensors import float_tensors
from keras_memory.spatial.tensors import matrix_product
from keras_memory.spatial.tensors import turned

TINY = 1e-30  # squared lengths below count as 0
SMALL = 1e-6  # squared angles below use a series
UPRIGHT = 1e-8  # least squared angle from the poles, to bound derivatives
ROTATION_TOLERANCE = 1e-3  # for R R^T against the identity


# Poses.


def transform(points: Array, pose: Array) -> Array:
    """Coordinates of points in another frame.

    Args:
        points: (B, n, 3) meters.
        pose: (B, 3, 4), from the frame of the points to the other frame.

    Returns:
        (B, n, 3) meters.
    """
    points, pose = float_tensors(
        points=(points, ("B", "n", 3)), pose=(pose, ("B", 3, 4))
    )
    return turned(points, pose[..., None, :, :3]) + pose[..., None, :, 3]


def rotation_matrix(rotation_vector: Array) -> Array:
    """The rotation about an axis, by Rodrigues' formula.

    Args:
        rotation_vector: (..., 3), along the axis, with the angle in radians as
            its length; counter-clockwise as seen from its tip.

    Returns:
        (..., 3, 3). Gradients are finite at the angle 0 too.

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


def pose_matrix(pose_vector: Array) -> Array:
    """The pose with a given translation and rotation vector.

    Args:
        pose_vector: (..., 6), translation in meters, then rotation vector in
            radians, as for `rotation_matrix`.

    Returns:
        (..., 3, 4).
    """
    (pose_vector,) = float_tensors(pose_vector=(pose_vector, (..., 6)))
    rotation = rotation_matrix(pose_vector[..., 3:])
    return ops.concatenate([rotation, pose_vector[..., :3, None]], axis=-1)


def compose(second: Array, first: Array) -> Array:
    """The pose that applies `first`, then `second`.

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


def invert(pose: Array) -> Array:
    """The inverse of a pose, (..., 3, 4)."""
    (pose,) = float_tensors(pose=(pose, (..., 3, 4)))
    back = ops.swapaxes(pose[..., :3], -1, -2)
    return ops.concatenate(
        [back, -matrix_product(back, pose[..., 3:])], axis=-1
    )


def motions(poses: Array) -> Array:
    """The motions of an agent from step to step.

    Args:
        poses: (..., T, 3, 4), from the agent's frame at each step to a fixed
            frame.

    Returns:
        (..., T, 3, 4), from the agent's frame at the step before to its frame
        at each step; the identity at the first step.
    """
    (poses,) = float_tensors(poses=(poses, (..., "T", 3, 4)))
    before = ops.concatenate([poses[..., :1, :, :], poses[..., :-1, :, :]], -3)
    return compose(invert(poses), before)


def is_pose(pose: Array) -> Array:
    """Which matrices are poses: a rotation beside a finite translation.

    Args:
        pose: (..., 3, 4), any value.

    Returns:
        (...) bool; also False for NaN, scalings and reflections.
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


def to_sphere(points: Array) -> Array:
    """Spherical coordinates of points, around the origin of their frame.

    Args:
        points: (..., 3) meters.

    Returns:
        (..., 3): azimuth in (-pi, pi], polar angle in [0, pi], radius. The
        azimuth is 0 straight up and down; all three are 0 at the origin.
        Gradients are finite everywhere, and 0 where they are undefined.
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


def from_sphere(sphere: Array) -> Array:
    """The inverse of `to_sphere`: (..., 3) coordinates in meters."""
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


def to_pixels(sphere: Array, height: int, width: int) -> Array:
    """Pixel coordinates of points in the image of the sphere.

    Args:
        sphere: (..., 3), as returned by `to_sphere`.
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


def from_pixels(pixels: Array, height: int, width: int) -> Array:
    """The inverse of `to_pixels`: (..., 3) azimuth, polar angle and radius."""
    height, width = check_size("height", height), check_size("width", width)
    (pixels,) = float_tensors(pixels=(pixels, (..., 3)))
    column, row, depth = (pixels[..., i] for i in range(3))
    azimuth = math.pi - column * (2 * math.pi / width)
    return ops.stack([azimuth, row * (math.pi / height), depth], axis=-1)


def pixel_grid(height: int, width: int) -> np.ndarray:
    """(H, W, 2) float32 array: column and row of each pixel's center."""
    height, width = check_size("height", height), check_size("width", width)
    sizes = [("height", height), ("width", width), ("", 4)]  # and as integers
    check_bytes("The grid", sizes, "int64", on_host=True)
    return _grid(height, width)


@functools.lru_cache(maxsize=8)
def _grid(height, width):
    rows, columns = np.mgrid[:height, :width].astype("float32")
    return np.stack([columns, rows], axis=-1)


def pixel_variance(
    points: Array, covariance: Array, height: int, width: int
) -> Array:
    """The variance of points in the sphere's image, due to an uncertain pose.

    To first order in a small translation, and a small rotation about the
    origin, with the given covariance.

    Args:
        points: (B, n, 3) meters, after the pose.
        covariance: (B, 6, 6), of translation in meters and rotation vector in
            radians, symmetric and not negative.
        height, width: ints, H and W.

    Returns:
        (B, n, 3) variances of columns and rows, in squared pixels, and of
        depth, in squared meters; 0 at the origin.
    """
    height, width = check_size("height", height), check_size("width", width)
    points, covariance = float_tensors(
        points=(points, ("B", "n", 3)), covariance=(covariance, ("B", 6, 6))
    )
    is_there = ops.sum(points * points, axis=-1, keepdims=True) > TINY
    points = ops.where(is_there, points, 1.0)
    x, y, z = (points[..., i] for i in range(3))
    radius_2 = x * x + y * y + z * z
    # Near the vertical axis the derivatives would be unbounded.
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


def turn_covariance(covariance: Array, rotation: Array) -> Array:
    """Rotates the covariance of a small motion to a frame with other axes.

    Args:
        covariance: (..., 6, 6), of translation and rotation vector.
        rotation: (3, 3), from the axes of the covariance to the new ones.

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
