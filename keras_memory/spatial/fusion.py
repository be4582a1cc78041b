"""Maps on a sphere: quantizes points to pixels, fuses and smooths them."""

import keras
import numpy as np
from keras import ops

from keras_memory.checks import LONGEST_AXIS
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.spatial.geometry import TINY
from keras_memory.spatial.tensors import at_least
from keras_memory.spatial.tensors import float_tensors

# Measurements.


def fuse(means, variances):
    """Fuses measurements of the same quantity: the product of Gaussians.

    Source: Lenton et al. 2021, for any number of measurements: v = 1 / sum 1 /
    v_k, m = v sum m_k / v_k.

    Args:
        means: list of arrays of one shape, any finite value.
        variances: likewise, not negative; infinity for no measurement.

    Returns:
        Mean and variance, of that shape; 0 and infinity where there is no
        measurement.

    Example:

    >>> ones = np.ones(1)
    >>> mean, variance = fuse([0 * ones, 3 * ones, 6 * ones], [ones] * 3)
    >>> float(mean[0]), float(variance[0])
    (3.0, 0.3333333333333333)
    """
    lists = {"means": means, "variances": variances}
    if not all(hasattr(arrays, "__iter__") for arrays in lists.values()) or (
        not 0 < len(means) == len(variances)
    ):
        raise ValueError(
            "`means` and `variances` must be two non-empty lists of arrays, of "
            "the same length. "
            f"Received: means={means!r:.200}, variances={variances!r:.200}"
        )
    axes = tuple(check_array("means[0]", means[0]).shape)
    tensors = float_tensors(
        **{
            f"{name}[{i}]": (arrays[i], axes)
            for name, arrays in lists.items()
            for i in range(len(arrays))
        }
    )
    means, variances = tensors[: len(means)], tensors[len(means) :]
    precisions = [1.0 / at_least(variance, TINY) for variance in variances]
    weighted = [mean * precision for mean, precision in zip(means, precisions)]
    return _from_sums(sum(weighted), sum(precisions))


def _from_sums(weighted, precision):
    is_hole = precision <= 0.0
    variance = 1.0 / ops.where(is_hole, 1.0, precision)
    return weighted * variance, ops.where(is_hole, np.inf, variance)


def quantize(mean, variance, valid, height, width, depth_buffer=True):
    """Rounds points to the pixels of the sphere's image.

    A point belongs to the pixel whose center is within half a pixel of it. A
    pixel without points shows the nearest of the points within one pixel, so
    that motion tears no holes into the map. Points keep their own coordinates.

    Source: Lenton et al. 2021: of all points in a pixel the nearest is kept
    (depth buffer), or the points are fused by their variances.
    Departure: the reference leaves holes as they are; its depth buffer mixes
    channels of points of similar depth; its columns are not continuous across
    the seam; it puts the lower pole into the row of the upper one; and its
    variance of n fused points is n times that of the product of Gaussians.

    Args:
        mean: (B, n, C) column, row, depth, and further channels; finite, depth
            not negative.
        variance: (B, n, C), positive.
        valid: (B, n) bool, False for points that are left out.
        height, width: ints, H and W.
        depth_buffer: bool. True (default): keep the nearest point. False: fuse
            the points.

    Returns:
        Mean and variance, (B, H, W, C), 0 and infinity for pixels that show no
        point, and (B, H, W, 1) bool, True for pixels that contain points.
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
    mean, variance = float_tensors(
        sizes, mean=(mean, axes), variance=(variance, axes)
    )
    if sizes.get("C", 3) < 3 or sizes.get("n", 1) < 1:
        raise ValueError(
            "`mean` must have at least one point, and the channels column, row "
            f"and depth. Received: shape {tuple(mean.shape)}"
        )
    valid = check_array(
        "valid", valid, axes[:2], sizes, kind="mask", dtype="bool"
    )
    valid = ops.reshape(valid, (-1,))
    batch, number, channels = ops.shape(mean)
    if height * width * (batch if isinstance(batch, int) else 1) > LONGEST_AXIS:
        raise ValueError(
            f"`height` x `width` x B must be at most {LONGEST_AXIS}, since "
            f"int32 numbers index the pixels. Received: height={height}, "
            f"width={width}, B={batch}"
        )
    shape = (batch, height, width)
    pixels = batch * height * width
    first = height * width * ops.arange(batch, dtype="int32")
    first = ops.reshape(ops.tile(first[:, None], (1, number)), (-1,))

    def place(columns, rows):
        """(B n,) flat pixel indices; one past the last for invalid points."""
        row = ops.clip(ops.cast(rows, "int32"), 0, height - 1)
        column = ops.cast(columns, "int32") % width
        line = first + ops.reshape(row * width + column, (-1,))
        return ops.where(valid, line, pixels)

    columns, rows = (ops.stop_gradient(mean[..., i]) for i in range(2))
    column, row = ops.floor(columns + 0.5), ops.floor(rows + 0.5)
    # The pixels around each point: its own, which has priority, and neighbors.
    beside = column + ops.sign(columns - column)
    above = row + ops.sign(rows - row)
    own = place(column, row)
    neighbors = [(beside, row), (column, above), (beside, above)]
    line = ops.concatenate([own, *(place(*pixel) for pixel in neighbors)])
    nearness = 1.0 / (1.0 + ops.stop_gradient(mean[..., 2]))  # in (0, 1]
    # PyTorch computes segment maxima in float32.
    dtype = keras.backend.result_type(ops.dtype(nearness), "float32")
    nearness = ops.reshape(ops.cast(nearness, dtype), (-1,))
    nearness = ops.concatenate([nearness + 1.0, nearness, nearness, nearness])
    largest = ops.segment_max(nearness, line, pixels + 1)
    point = ops.tile(ops.arange(batch * number, dtype="int32"), (4,))
    point = ops.where(nearness >= ops.take(largest, line), point, -1)
    point = ops.segment_max(point, line, pixels + 1)[:pixels]
    is_hole = (point < 0)[:, None]
    is_own = largest[:pixels, None] > 1.0
    moments = ops.concatenate([mean, variance], axis=-1)
    moments = ops.reshape(moments, (-1, 2 * channels))
    kept = ops.take(moments, ops.maximum(point, 0), axis=0)
    mean = ops.where(is_hole, 0.0, kept[:, :channels])
    variance = ops.where(is_hole, np.inf, kept[:, channels:])
    if not depth_buffer:
        around = ops.floor((moments[:, :1] + 0.5) / width)
        means = moments[:, :channels] - ops.pad(
            width * ops.stop_gradient(around), ((0, 0), (0, channels - 1))
        )
        precision = 1.0 / at_least(moments[:, channels:], TINY)
        sums = ops.concatenate([means * precision, precision], axis=-1)
        sums = ops.segment_sum(sums, own, pixels + 1)[:pixels]
        fused = _from_sums(sums[:, :channels], sums[:, channels:])
        mean = ops.where(is_own, fused[0], mean)
        variance = ops.where(is_own, fused[1], variance)
    # At the seam, columns continue beyond the first and the last.
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
        size: int, pixels to add on each side, from 0 to the smaller one of H
            and W.

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
    (image,) = float_tensors(image=(image, ("B", "H", "W", "C")))
    _check_around("image", image, size)
    image = _pad_poles(image, size)
    left, right = image[:, :, image.shape[2] - size :], image[:, :, :size]
    return ops.concatenate([left, image, right], axis=2)


def _check_around(name, image, size):
    """Raises ValueError unless `_pad_poles` can add `size` pixels."""
    height, width = image.shape[1:3]
    if width % 2 or size > min(height, width):
        raise ValueError(
            f"`{name}` must have an even number of columns, and at least "
            f"{size} rows and columns: the padding copies as many. "
            f"Received: shape {tuple(image.shape)}"
        )


def _pad_poles(image, size):
    height, width = image.shape[1:3]
    # Beyond a pole the image continues half way around the sphere.
    opposite = ops.roll(image, width // 2, axis=2)
    top = ops.flip(opposite[:, :size], axis=1)
    bottom = ops.flip(opposite[:, height - size :], axis=1)
    return ops.concatenate([top, image, bottom], axis=1)


def smoothing_kernel(size):
    """The smoothing weights around a pixel: 1 / (1 + distance in pixels).

    Source: Lenton et al. 2021, smoothing.

    Args:
        size: int, odd.

    Returns:
        (size, size) float64 array.
    """
    if check_size("size", size) % 2 == 0:
        raise ValueError(
            "`size` must be odd, so that the kernel has a center. "
            f"Received: size={size}"
        )
    sizes = ("size", size), ("size", size)
    check_bytes("The kernel", sizes, "float64", on_host=True)
    places = np.arange(size) - size // 2
    distance = np.hypot(places[:, None], places[None])
    return 1 / (1 + distance)


def smooth(mean, variance, kernel):
    """The mean around each pixel, weighted by proximity and certainty.

    Source: Lenton et al. 2021, smoothing: m = sum_j c_j m_j / v_j / sum_j c_j /
    v_j.
    Departure: the reference adds a hundredth of the kernel's sum to the
    denominator, and takes the absolute value.

    Args:
        mean: (B, H, W, C), finite.
        variance: (B, H, W, C), positive.
        kernel: (k, k) array of any dtype, not negative, symmetric about both
            its axes, k odd and at most 2 H + 1.

    Returns:
        (B, H, W, C) means; variances are not smoothed.
    """
    axes = "B", "H", "W", "C"
    mean, variance = float_tensors(mean=(mean, axes), variance=(variance, axes))
    kernel = check_array(
        "kernel", kernel, ("k", "k"), dtype="float64", result="numpy"
    )
    if len(kernel) % 2 == 0:
        raise ValueError(
            "`kernel` must have an odd number of rows, to have a center. "
            f"Received: shape {kernel.shape}"
        )
    _check_around("mean", mean, len(kernel) // 2)
    if 0 in mean.shape:  # PyTorch has no FFT of empty tensors
        return mean
    precision = 1.0 / at_least(variance, TINY)
    stacked = ops.concatenate([mean * precision, precision], axis=-1)
    if keras.backend.backend() == "jax":  # lacks float64 by default
        stacked = _convolved(stacked, kernel)
    else:
        stacked = _convolved_by_spectra(stacked, kernel)
    weighted, precision = ops.split(stacked, 2, axis=-1)
    return weighted / precision


def _convolved(image, kernel):
    image = pad_sphere(image, kernel.shape[0] // 2)
    channels = image.shape[-1]
    kernel = np.tile(kernel[:, :, None, None], (1, 1, channels, 1))
    return ops.depthwise_conv(image, ops.cast(kernel, ops.dtype(image)))


def _convolved_by_spectra(image, kernel):
    """As `_convolved`, but faster, by FFT along the rows, which are periodic.

    In float64: rounding errors of certain pixels would swamp uncertain ones.
    """
    height, width = image.shape[1:3]
    half = kernel.shape[0] // 2
    rows = np.zeros((half + 1, width))
    for column in range(-half, half + 1):
        rows[:, column % width] += kernel[half:, half + column]
    spectrum = np.fft.rfft(rows).real  # real, since the kernel is symmetric
    spectrum = ops.convert_to_tensor(spectrum, "float64")
    padded = ops.cast(_pad_poles(image, half), "float64")
    spectra = ops.rfft(ops.transpose(padded, (0, 3, 1, 2)))

    def summed(part):
        total = part[:, :, half : half + height] * spectrum[0]
        for row in range(1, half + 1):
            upper = part[:, :, half - row : half - row + height]
            lower = part[:, :, half + row : half + row + height]
            total = total + (upper + lower) * spectrum[row]
        return total

    real, imaginary = map(summed, spectra)
    result = ops.irfft((real, imaginary), fft_length=width)
    return ops.cast(ops.transpose(result, (0, 2, 3, 1)), ops.dtype(image))
