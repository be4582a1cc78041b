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
"""

import functools
import math

import keras
import numpy as np
from keras import ops

TINY = 1e-30  # of squares: what is shorter is the origin
SMALL = 1e-6  # squared angles below are those of no turn
UPRIGHT = 1e-8  # squared angles from the poles below which all are the same
ROTATION_TOLERANCE = 1e-3  # of what a rotation times its transpose is


def inverse_intrinsics(focal_lengths, principal_point):
    """What maps pixels of a pinhole camera to directions in its frame.

    Args:
        focal_lengths: (fx, fy) in pixels.
        principal_point: (cx, cy) in pixels, to the right and down from the
            centre of the pixel in the corner; the image's middle is at
            ((w - 1) / 2, (h - 1) / 2).

    Returns:
        (3, 3) float32 array: times (column, row, 1) it gives (x, y, 1).

    Raises:
        ValueError: a focal length that is not positive, or no two finite
            numbers.

    Example:

    >>> inverse_intrinsics((2.0, 2.0), (0.5, 0.5))
    array([[-0.5 ,  0.  ,  0.25],
           [ 0.  , -0.5 ,  0.25],
           [ 0.  ,  0.  ,  1.  ]], dtype=float32)
    """
    focal_lengths = np.asarray(focal_lengths, "float64")
    principal_point = np.asarray(principal_point, "float64")
    are_pairs = focal_lengths.shape == principal_point.shape == (2,)
    are_finite = np.isfinite([*focal_lengths.flat, *principal_point.flat]).all()
    if not are_pairs or not are_finite or not (focal_lengths > 0).all():
        raise ValueError(
            "A camera must have two positive focal lengths and two coordinates "
            "of its principal point, in pixels. Received: "
            f"focal_lengths={focal_lengths.tolist()}, "
            f"principal_point={principal_point.tolist()}"
        )
    (fx, fy), (cx, cy) = focal_lengths, principal_point
    matrix = [[-1 / fx, 0, cx / fx], [0, -1 / fy, cy / fy], [0, 0, 1]]
    return np.array(matrix, "float32")


def pixels_to_camera(depth, inverse_intrinsics):
    """Coordinates of what a pinhole camera sees.

    Args:
        depth: (..., h, w) metres along the optical axis.
        inverse_intrinsics: (..., 3, 3), as `inverse_intrinsics` gives it.

    Returns:
        (..., h, w, 3) metres in the camera's frame.
    """
    depth, inverse_intrinsics = _tensors(depth, inverse_intrinsics)
    height, width = depth.shape[-2:]
    rows, columns = np.mgrid[:height, :width].astype("float32")
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    pixels = ops.cast(pixels, ops.dtype(depth))
    directions = _turned(pixels, inverse_intrinsics[..., None, None, :, :])
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
    points, pose = _tensors(points, pose)
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
    vector = ops.convert_to_tensor(rotation_vector)
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
    pose_vector = ops.convert_to_tensor(pose_vector)
    rotation = rotation_matrix(pose_vector[..., 3:])
    return ops.concatenate([rotation, pose_vector[..., :3, None]], axis=-1)


def compose(second, first):
    """The pose that does what `first` does, then what `second` does.

    Args:
        second, first: (..., 3, 4).

    Returns:
        (..., 3, 4).
    """
    first, second = _tensors(first, second)
    rotation, translation = second[..., :3], second[..., 3:]
    last = ops.cast(np.array([0, 0, 0, 1]), ops.dtype(translation))
    return _product(rotation, first) + translation * last


def invert(pose):
    """The pose that undoes another, (..., 3, 4)."""
    (pose,) = _tensors(pose)
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
    poses = ops.convert_to_tensor(poses)
    before = ops.concatenate([poses[..., :1, :, :], poses[..., :-1, :, :]], -3)
    return compose(invert(poses), before)


def is_pose(pose):
    """Which matrices are poses: a rotation beside a finite translation.

    Args:
        pose: (..., 3, 4), any value.

    Returns:
        (...) bool; False for NaN, scalings and mirrors too.
    """
    (pose,) = _tensors(pose)
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
    (points,) = _tensors(points)
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
    (sphere,) = _tensors(sphere)
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
    (sphere,) = _tensors(sphere)
    azimuth, polar, radius = (sphere[..., i] for i in range(3))
    column = (math.pi - azimuth) * (width / (2 * math.pi))
    row = polar * (height / math.pi)
    return ops.stack([column, row, radius], axis=-1)


def from_pixels(pixels, height, width):
    """Azimuth, polar angle and radius of what `to_pixels` gave: (..., 3)."""
    (pixels,) = _tensors(pixels)
    column, row, depth = (pixels[..., i] for i in range(3))
    azimuth = math.pi - column * (2 * math.pi / width)
    return ops.stack([azimuth, row * (math.pi / height), depth], axis=-1)


@functools.lru_cache(maxsize=8)
def pixel_grid(height, width):
    """(H, W, 2) float32 array: column and row of each pixel's middle."""
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
    points, covariance = _tensors(points, covariance)
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
    means, variances = _tensors(*means), _tensors(*variances)
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
    mean, variance = _tensors(mean, variance)
    valid = ops.reshape(ops.cast(valid, "bool"), (-1,))
    batch, number, channels = ops.shape(mean)
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
    nearness = ops.reshape(ops.cast(nearness, "float32"), (-1,))
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
    image = _pad_poles(ops.convert_to_tensor(image), size)
    left, right = image[:, :, image.shape[2] - size :], image[:, :, :size]
    return ops.concatenate([left, image, right], axis=2)


def _pad_poles(image, size):
    height, width = image.shape[1:3]
    # Beyond a pole is the other side.
    other = ops.roll(image, width // 2, axis=2)
    above = ops.flip(other[:, :size], axis=1)
    below = ops.flip(other[:, height - size :], axis=1)
    return ops.concatenate([above, image, below], axis=1)


def smoothing_kernel(size):
    """(size, size) float32 array, 1 / (1 + distance in pixels).

    Source: Lenton et al. 2021, smoothing.
    """
    places = np.arange(size) - size // 2
    distance = np.hypot(places[:, None], places[None])
    return (1 / (1 + distance)).astype("float32")


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
            odd and at most 2 H + 1.

    Returns:
        (B, H, W, C) means; variances are not smoothed.
    """
    mean, variance = _tensors(mean, variance)
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


def _tensors(*arrays):
    return [ops.convert_to_tensor(array) for array in arrays]


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
    return ops.where(values > least, values, least)
