"""Geometry, compared with values computed by hand, and with the reference where
the reference is right."""

import pathlib

import keras
import numpy as np
import pytest
from harness import gradient
from keras import ops

from keras_memory.spatial import cameras
from keras_memory.spatial import fusion
from keras_memory.spatial import geometry
from keras_memory.spatial import tensors

pytestmark = pytest.mark.every_backend

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FUNCTIONS = "esm__functions_a", "esm__functions_b"


def array(value):
    return np.asarray(ops.convert_to_numpy(value))


def close(one, other, tolerance=1e-6):
    np.testing.assert_allclose(
        array(one), np.asarray(other), rtol=tolerance, atol=tolerance
    )


def golden(name):
    return np.load(GOLDENS / f"{name}.npz")


# Cameras and poses.


def test_inverse_intrinsics_undo_a_pinhole():
    inverse = geometry.inverse_intrinsics((3.0, 5.0), (2.0, 1.0))
    # Two columns right of the center and one row up; x points left.
    close(inverse @ [4.0, 0.0, 1.0], [-2 / 3, 1 / 5, 1.0])


@pytest.mark.parametrize(
    "arguments",
    [
        ((0.0, 1.0), (1.0, 1.0)),
        ((1.0, -1.0), (1.0, 1.0)),
        ((1.0, np.nan), (1.0, 1.0)),
        ((1.0, np.inf), (1.0, 1.0)),
        ((1.0, 1.0), (1.0, np.nan)),
        ((1.0,), (1.0, 1.0)),
        ((1.0, 1.0), (1.0, 1.0, 1.0)),
    ],
)
def test_impossible_cameras_are_refused(arguments):
    with pytest.raises(
        ValueError, match="`(focal_len|principal_p).*(two .*num|2,).*Received:"
    ):
        geometry.inverse_intrinsics(*arguments)


def test_pixels_to_camera_scales_rays_by_depth():
    depth = np.zeros((2, 3, 5), "float32") + 2
    depth[1, 2, 4] = 7
    inverse = geometry.inverse_intrinsics((2.0, 2.0), (2.0, 1.0))
    points = array(geometry.pixels_to_camera(depth, np.stack([inverse] * 2)))
    assert points.shape == (2, 3, 5, 3)
    close(points[0, 1, 2], [0, 0, 2])
    close(points[0, 0, 0], [2, 1, 2])
    close(points[1, 2, 4], [-7, -3.5, 7])


def test_rotations_match_matrices_computed_by_hand():
    quarter = np.pi / 2
    close(
        geometry.rotation_matrix([quarter, 0.0, 0.0]),
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    )
    close(
        geometry.rotation_matrix([0.0, quarter, 0.0]),
        [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    )
    close(
        geometry.rotation_matrix([0.0, 0.0, quarter]),
        [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    )
    close(
        geometry.rotation_matrix(np.zeros((2, 3), "float32")), [np.eye(3)] * 2
    )


def test_small_and_large_turns_are_rotations():
    rng = np.random.default_rng(0)
    for size in (1e-8, 1e-4, 0.9e-3, 1.1e-3, 0.1, 3.0, 20.0):
        vector = rng.normal(size=(5, 3))
        vector *= size / np.linalg.norm(vector, axis=1, keepdims=True)
        matrix = array(geometry.rotation_matrix(vector.astype("float32")))
        close(matrix @ matrix.swapaxes(1, 2), [np.eye(3)] * 5, 1e-5)
        close(np.linalg.det(matrix), np.ones(5), 1e-5)
        # The axis is unchanged.
        close((matrix @ vector[..., None])[..., 0] / size, vector / size, 1e-5)


def test_a_pose_turns_and_then_moves():
    pose = geometry.pose_matrix([1.0, 2.0, 3.0, 0.0, np.pi / 2, 0.0])
    points = np.array([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]], "float32")
    # Forward turns to the left, and left to the back.
    close(
        geometry.transform(points, ops.cast(pose, "float32")[None]),
        [[[2, 2, 3], [1, 2, 2]]],
    )


def poses(seed, *shape, scale=1.0):
    rng = np.random.default_rng(seed)
    vectors = scale * rng.normal(size=(*shape, 6)).astype("float32")
    return geometry.pose_matrix(vectors)


def test_compositions_and_inverses_of_poses_agree():
    first, second = poses(0, 3), poses(1, 3)
    points = np.random.default_rng(2).normal(size=(3, 7, 3)).astype("float32")
    close(
        geometry.transform(points, geometry.compose(second, first)),
        geometry.transform(geometry.transform(points, first), second),
        1e-5,
    )
    nothing = geometry.compose(geometry.invert(first), first)
    close(nothing, [np.eye(3, 4)] * 3, 1e-5)


def test_motions_lead_from_each_pose_to_the_next():
    of_steps = poses(0, 2, 5)
    moves = array(geometry.motions(of_steps))
    close(moves[:, 0], [np.eye(3, 4)] * 2, 1e-5)
    here = np.array([[[0.3, -0.2, 0.9]]], "float32")
    for time in range(1, 5):
        before = geometry.transform(here, of_steps[:1, time - 1])
        after = geometry.transform(
            geometry.transform(here, moves[:1, time]), of_steps[:1, time]
        )
        close(before, after, 1e-5)


def test_is_pose_accepts_only_rotations_with_translations():
    right = array(poses(0, 3))
    wrong = np.stack([right[0]] * 9)
    wrong[0, 1, 1] = np.nan
    wrong[1, 0, 3] = np.inf
    wrong[2, :, :3] *= 1.01
    wrong[3, :, 0] *= -1  # a reflection
    wrong[4] = 0
    wrong[5, 0, :3] = wrong[5, 1, :3]
    wrong[6, 2, 2] += 0.1
    wrong[7, :, :3] = np.inf
    wrong[8, :, 3] = np.nan
    assert array(geometry.is_pose(right)).tolist() == [True] * 3
    assert array(geometry.is_pose(wrong)).tolist() == [False] * 9


# The sphere.

PLACES = [  # meters: x, y, z; azimuth, polar angle, radius
    ([0, 0, 2], [0, np.pi / 2, 2]),
    ([3, 0, 0], [np.pi / 2, np.pi / 2, 3]),
    ([-3, 0, 0], [-np.pi / 2, np.pi / 2, 3]),
    ([0, 0, -1], [np.pi, np.pi / 2, 1]),
    ([0, 5, 0], [0, 0, 5]),
    ([0, -5, 0], [0, np.pi, 5]),
    ([1, np.sqrt(2), 1], [np.pi / 4, np.pi / 4, 2]),
    ([0, 0, 0], [0, 0, 0]),
]


def test_sphere_coordinates_match_values_computed_by_hand():
    points, sphere = np.array(list(zip(*PLACES)), "float32")
    close(geometry.to_sphere(points), sphere)
    close(geometry.from_sphere(sphere), points, 2e-6)


def test_pixels_match_values_computed_by_hand():
    _, sphere = np.array(list(zip(*PLACES)), "float32")
    pixels = geometry.to_pixels(sphere, 180, 360)
    expected = [
        [180, 90, 2],
        [90, 90, 3],
        [270, 90, 3],
        [0, 90, 1],
        [180, 0, 5],
        [180, 180, 5],
        [135, 45, 2],
        [180, 0, 0],
    ]
    close(pixels, expected, 1e-4)
    close(geometry.from_pixels(pixels, 180, 360), sphere, 1e-5)
    other = geometry.to_pixels(sphere, 10, 60)
    close(other, np.multiply(expected, [60 / 360, 10 / 180, 1]), 1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_angles_equal_the_reference(name):
    """All of the reference's conversions of angles are right."""
    d = golden(name)
    height, width = 180, 360
    per_degree = float(
        str(d["__meta__"]).split('"pixels_per_degree": ')[1].split(",")[0]
    )
    pixels = array(geometry.to_pixels(d["angles.sphere"], height, width))
    pixels[..., :2] *= per_degree
    close(pixels, d["angles.pixel"], 1e-5)
    close(
        geometry.from_sphere(d["angles.cam_to_sphere"]),
        d["angles.cam"][..., :3],
        1e-5,
    )
    close(
        geometry.to_sphere(d["angles.cam"][..., :3]),
        d["angles.cam_to_sphere"],
        1e-5,
    )


@pytest.mark.parametrize("name", ["esm__a", "esm__b"])
def test_poses_equal_the_reference(name):
    d = golden(name)
    for pose, matrix in (
        ("control_mean", "agent_rel_mat"),
        ("cam0.pose_mean", "cam0.cam_rel_mat"),
        ("cam1.pose_mean", "cam1.cam_rel_mat"),
    ):
        close(geometry.pose_matrix(d[pose]), d[matrix], 1e-5)
        assert array(geometry.is_pose(d[matrix])).all()


def test_gradients_are_finite_at_axes_and_the_origin():
    points = np.array([p for p, _ in PLACES], "float32")
    for part in range(3):
        slopes = gradient(
            lambda x, part=part: ops.sum(geometry.to_sphere(x)[..., part]),
            points,
        )
        assert np.isfinite(slopes).all()
    turns = np.array([[0, 0, 0], [1e-9, 0, 0], [1e-4, 0, 0]], "float32")
    slopes = gradient(
        lambda x: ops.sum(geometry.rotation_matrix(x)[..., 0, 1]), turns
    )
    close(slopes, [[0, 0, -1]] * 3, 1e-3)  # of minus the angle about z


@pytest.mark.parametrize("size", [(180, 360), (90, 400)])
def test_pixel_variance_equals_that_of_many_draws(size):
    rng = np.random.default_rng(0)
    points = np.array(
        [[[0.2, -0.3, 2.0], [1.0, 1.5, -1.0], [-3.0, 0.2, 0.1]]], "float32"
    )
    spread = 1e-3 * rng.normal(size=(6, 6))
    covariance = spread @ spread.T
    draws = rng.multivariate_normal(np.zeros(6), covariance, 20000)
    moved = geometry.transform(
        np.repeat(points, len(draws), axis=0),
        geometry.pose_matrix(draws.astype("float32")),
    )
    pixels = array(geometry.to_pixels(geometry.to_sphere(moved), *size))
    found = array(
        geometry.pixel_variance(
            points, covariance[None].astype("float32"), *size
        )
    )
    close(found[0] / pixels.var(axis=0), np.ones((3, 3)), 0.05)


def test_pixel_variance_is_finite_everywhere():
    points = np.array([[p for p, _ in PLACES]], "float32")
    covariance = np.eye(6, dtype="float32")[None]
    found = array(geometry.pixel_variance(points, covariance, 180, 360))
    assert np.isfinite(found).all() and (found >= 0).all()
    assert (found[0, -1] == 0).all()


# Fusion.


def test_fusion_of_three_equals_the_product_of_gaussians():
    """The reference is right for two only."""
    x = np.linspace(-20, 20, 200001)
    means, variances = [1.0, -2.0, 4.0], [0.5, 2.0, 3.0]
    product = np.exp(
        -sum((x - m) ** 2 / (2 * v) for m, v in zip(means, variances))
    )
    product /= product.sum()
    mean = (x * product).sum()
    variance = ((x - mean) ** 2 * product).sum()
    found = fusion.fuse(
        [np.full((1,), m) for m in means], [np.full((1,), v) for v in variances]
    )
    close(found[0], [mean], 1e-5)
    close(found[1], [variance], 1e-5)


def test_fusion_ignores_infinite_variance():
    ones, inf = np.ones(2, "float32"), np.array([np.inf, 3.0], "float32")
    mean, variance = fusion.fuse([5 * ones, ones], [inf, inf])
    close(mean, [0, 3])
    assert array(variance).tolist() == [np.inf, 1.5]
    mean, variance = fusion.fuse([5 * ones, ones], [inf, 2 * ones])
    close(mean, [1, 5 * 0.4 + 1 * 0.6], 1e-5)
    close(variance, [2, 1.2], 1e-5)


def test_fusion_of_one_or_of_zero_variance_is_exact():
    mean, variance = fusion.fuse([np.array([3.0])], [np.array([2.0])])
    close([mean[0], variance[0]], [3, 2])
    zero = np.zeros(1, "float32")
    mean, variance = fusion.fuse([zero + 3, zero + 5], [zero, zero + 1])
    close([mean[0], variance[0]], [3, 0])
    slopes = gradient(
        lambda x: ops.sum(fusion.fuse([x, x * 2], [zero, zero + np.inf])[0]),
        zero + 3,
    )
    close(slopes, [1])


@pytest.mark.parametrize("name", ["esm__a", "esm__b"])
def test_fusion_of_two_equals_the_reference(name):
    d = golden(name)
    for time in range(3):
        mean, variance = fusion.fuse(
            [d["step.meas_mean"][:, time], d["step.prior_mean"][time]],
            [d["step.meas_var"][:, time], d["step.prior_var"][time]],
        )
        of_it = d["step.fused_mean_raw"][time], d["step.fused_var_raw"][time]
        close(mean, of_it[0].reshape(mean.shape), 1e-5)
        close(variance, of_it[1].reshape(variance.shape), 1e-5)


# Quantization.


def some_points(depth=(3.0, 2.0, 5.0)):
    """Three points, two of them in one pixel of 4 x 6."""
    mean = np.zeros((1, 3, 5), "float32")
    mean[0, :, 0] = 1.4, 0.6, 5.2
    mean[0, :, 1] = 1.9, 2.3, 3.4
    mean[0, :, 2] = depth
    mean[0, :, 3] = 10, 20, 30
    mean[0, :, 4] = 1, 2, 3
    variance = np.arange(1, 16, dtype="float32").reshape(1, 3, 5)
    return mean, variance


def quantized(*arguments):
    """Mean and variance of the pixels that contain a point."""
    mean, variance, own = fusion.quantize(*arguments)
    return ops.where(own, mean, 0.0), ops.where(own, variance, np.inf)


def test_the_nearest_point_hides_the_others():
    mean, variance = some_points()
    found = quantized(mean, variance, [[True] * 3], 4, 6)
    image, spread = map(array, found)
    close(image[0, 2, 1], mean[0, 1])
    close(spread[0, 2, 1], variance[0, 1])
    close(image[0, 3, 5], mean[0, 2])
    assert np.isinf(spread[..., 0]).sum() == 4 * 6 - 2
    assert (image[np.isinf(spread)] == 0).all()


def test_points_are_fused_without_a_depth_buffer():
    mean, variance = some_points()
    found = quantized(mean, variance, [[True] * 3], 4, 6, False)
    image, spread = map(array, found)
    close(
        [image[0, 2, 1], spread[0, 2, 1]],
        fusion.fuse(list(mean[0, :2]), list(variance[0, :2])),
        1e-5,
    )
    close(image[0, 3, 5], mean[0, 2])
    assert np.isinf(spread[..., 0]).sum() == 4 * 6 - 2


@pytest.mark.parametrize("depth_buffer", [True, False])
def test_invalid_points_are_ignored(depth_buffer):
    mean, variance = some_points()
    image, spread = map(
        array,
        quantized(mean, variance, [[True, False, False]], 4, 6, depth_buffer),
    )
    close(image[0, 2, 1], mean[0, 0], 1e-5)
    assert np.isinf(spread[..., 0]).sum() == 4 * 6 - 1
    nothing = quantized(mean, variance, [[False] * 3], 4, 6, depth_buffer)
    assert (array(nothing[0]) == 0).all() and np.isinf(array(nothing[1])).all()


def test_points_at_the_same_depth_are_not_mixed():
    mean, variance = some_points(depth=(2.0, 2.0, 5.0))
    image = array(quantized(mean, variance, [[True] * 3], 4, 6)[0])
    assert image[0, 2, 1].tolist() in mean[0, :2].tolist()


def test_columns_are_continuous_across_the_seam():
    mean = np.zeros((1, 4, 3), "float32")
    mean[0, :, 0] = 5.4, 5.6, 6.0, 0.3  # of six columns
    mean[0, :, 1] = 1, 2, 3, 0
    mean[0, :, 2] = 1
    image, spread = map(array, quantized(mean, mean + 1, [[True] * 4], 4, 6))
    close(image[0, 1, 5], [5.4, 1, 1])
    close(image[0, 2, 0], [-0.4, 2, 1], 1e-5)
    close(image[0, 3, 0], [0, 3, 1])
    close(image[0, 0, 0], [0.3, 0, 1])


def test_the_lower_pole_is_in_the_last_row():
    mean = np.array([[[2.0, 4.0, 1.0], [3.0, 3.6, 1.0]]], "float32")
    image, _ = quantized(mean, mean, [[True] * 2], 4, 6)
    close(array(image)[0, 3, 2:4], mean[0])


def test_rows_of_a_batch_do_not_mix():
    mean, variance = some_points()
    both = np.concatenate([mean, mean + [0, 0, 0, 1, 0]]).astype("float32")
    image = array(
        quantized(
            both,
            np.concatenate([variance] * 2),
            [[True, True, False], [True, False, True]],
            4,
            6,
        )[0]
    )
    close(image[0, 2, 1], both[0, 1])
    close(image[1, 2, 1], both[1, 0])
    close(image[1, 3, 5], both[1, 2])
    assert (image[0, 3, 5] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_quantization_equals_the_reference(name):
    """Without the depth buffer, means are equal. The reference's variance is
    the harmonic mean; the product of n Gaussians has an nth of it. With the
    depth buffer, pixels where the reference blends nearly equal depths are
    excluded."""
    d = golden(name)
    height, width = d["quant.feat_prior"].shape[1:3]
    mean = np.concatenate([d["quant.pixel_coords"], d["quant.feat"]], -1)
    variance = np.concatenate(
        [d["quant.pixel_coords_var"], d["quant.feat_var"]], -1
    )
    least, most = d["quant.var_threshold"][0, 0]
    rounded = np.round(mean[..., :2])
    # We wrap columns and extend the last row; the reference drops such points.
    valid = ((rounded >= 0) & (rounded < [width, height])).all(-1)
    valid &= ((variance > least) & (variance < most)).all(-1)
    depths = np.full((len(mean), height, width, 2), 9e9)  # the two nearest
    for row, point in np.argwhere(valid):
        x, y = rounded[row, point].astype(int)
        two = [*depths[row, y, x], mean[row, point, 2]]
        depths[row, y, x] = sorted(two)[:2]
    number = d["quant.fuse.counter"]
    hit = number[..., 0] > 0
    image, spread = map(
        array,
        quantized(mean, variance, valid, height, width, False),
    )
    assert ((depths[..., 0] < 9e9) == hit).all()
    assert (number > 1).sum() > 1
    close(image[hit], d["quant.fuse.mean"][hit], 1e-5)
    close(spread[hit] * number[hit], d["quant.fuse.var"][hit], 1e-5)
    image, spread = map(array, quantized(mean, variance, valid, height, width))
    clear = hit & (depths[..., 1] - depths[..., 0] > 0.1)
    assert clear.sum() > 0.8 * hit.sum()
    close(image[clear], d["quant.db.mean"][clear], 1e-5)
    close(spread[clear], d["quant.db.var"][clear], 1e-5)


def test_only_kept_points_have_gradients():
    mean, variance = some_points()
    weights = np.random.default_rng(0).normal(size=(1, 4, 6, 5))
    weights = ops.convert_to_tensor(weights.astype("float32"))

    def total(mean):
        image, _ = quantized(mean, variance, [[True] * 3], 4, 6)
        return ops.sum(image * weights)

    slopes = gradient(total, mean)
    close(slopes[0, 1], array(weights)[0, 2, 1])
    close(slopes[0, 2], array(weights)[0, 3, 5])
    assert (slopes[0, 0] == 0).all()


def test_an_empty_pixel_shows_the_nearest_point_beside_it():
    mean, variance = some_points()  # at (1.4, 1.9), (0.6, 2.3), (5.2, 3.4)
    valid = [[True] * 3]
    image, spread, own = map(
        array, fusion.quantize(mean, variance, valid, 4, 6)
    )
    assert np.argwhere(own[0, ..., 0]).tolist() == [[2, 1], [3, 5]]
    # The first reaches (1, 1) to (2, 2), the second (2, 0) to (3, 1).
    for row, column, point in (
        (1, 1, 0),
        (1, 2, 0),
        (2, 2, 0),
        (2, 0, 1),
        (3, 0, 1),
        (3, 1, 1),
        (3, 5, 2),
    ):
        close(image[0, row, column], mean[0, point])
        close(spread[0, row, column], variance[0, point])
    assert np.isfinite(spread[0, ..., 0]).sum() == 8
    mean[0, 1, 2] = 20.0  # now farther than the first point
    image = array(fusion.quantize(mean, variance, valid, 4, 6)[0])
    close(image[0, 2, 1], mean[0, 0])
    # The last point, in column 5.2, is next to column 0.
    close(image[0, 3, 0], mean[0, 2] - [6, 0, 0, 0, 0])


# Smoothing.


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_equals_the_reference(name):
    d = golden(name)
    size = (d["pad.out"].shape[1] - d["pad.image"].shape[1]) // 2
    close(fusion.pad_sphere(d["pad.image"], size), d["pad.out"])


def test_padding_by_0_changes_nothing():
    image = np.arange(24.0).reshape(1, 2, 4, 3)
    close(fusion.pad_sphere(image, 0), image)


def test_the_kernel_matches_values_computed_by_hand():
    root = 1 / (1 + np.sqrt(2))
    close(
        fusion.smoothing_kernel(3),
        [[root, 0.5, root], [0.5, 1, 0.5], [root, 0.5, root]],
    )
    close(fusion.smoothing_kernel(1), [[1]])


def smoothed(mean, variance, kernel):
    """`fusion.smooth` as plain loops."""
    size = len(kernel) // 2
    mean, variance = (
        array(fusion.pad_sphere(one, size)).astype("float64")
        for one in (mean, variance)
    )
    height, width = mean.shape[1] - 2 * size, mean.shape[2] - 2 * size
    weighted, total = 0.0, 0.0
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            part = np.s_[:, i : i + height, j : j + width]
            weighted = weighted + kernel[i, j] * mean[part] / variance[part]
            total = total + kernel[i, j] / variance[part]
    return weighted / total


@pytest.mark.parametrize("size", [1, 3, 7, 11])
def test_smoothing_equals_plain_loops(size):
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(2, 8, 10, 3)).astype("float32")
    variance = 10 ** rng.uniform(-3, 4, size=mean.shape).astype("float32")
    kernel = fusion.smoothing_kernel(size)
    close(
        fusion.smooth(mean, variance, kernel),
        smoothed(mean, variance, kernel),
        1e-4,
    )


def test_smoothing_stays_accurate_far_from_certain_pixels():
    """Rounding errors of certain pixels elsewhere do not dominate."""
    mean = np.full((1, 40, 80, 1), 0.7, "float32")
    variance = np.full_like(mean, 1e4)
    variance[:, :3] = 1e-3
    mean[:, :3] = 5.0
    kernel = fusion.smoothing_kernel(7)
    found = array(fusion.smooth(mean, variance, kernel))
    close(found[0, 10:], mean[0, 10:], 1e-5)
    close(found, smoothed(mean, variance, kernel), 1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_smoothing_equals_the_reference(name):
    """Equal but for the sign, and a hundredth of the kernel's sum that the
    reference adds to the denominator."""
    d = golden(name)
    mean, variance = d["smooth.mean"], d["smooth.var"]
    size = mean.shape[1] - d["smooth.new_mean"].shape[1] + 1
    inner = np.s_[size // 2 : -(size // 2)]
    places = np.arange(size) - size // 2
    distance = np.hypot(places[:, None], places)
    for channel, scale in enumerate(d["smooth.kernel_scale"]):
        kernel = 1 / (1 + scale * distance)
        some = np.s_[..., channel : channel + 1]
        found = array(fusion.smooth(mean[some], variance[some], kernel))
        ones = np.ones_like(variance[some])
        precision = array(
            fusion.smooth(1 / variance[some], ones, kernel)
        )  # the mean of it
        found = (found * precision / (precision + 0.01))[:, inner, inner]
        close(found, d["smooth.new_mean"][some], 1e-5)
        assert (found > 0).all()


def test_smoothing_keeps_signs_and_has_gradients():
    mean = np.full((1, 4, 6, 2), -2.0, "float32")
    variance = np.ones_like(mean)
    kernel = fusion.smoothing_kernel(3)
    close(fusion.smooth(mean, variance, kernel), mean, 1e-5)
    slopes = gradient(
        lambda x: ops.sum(fusion.smooth(x, variance, kernel)), mean
    )
    close(slopes, np.ones_like(mean), 1e-5)


def results(points, pose):
    """Results of functions of points (1, 3, 3) and a pose (1, 3, 4)."""
    turn = pose[..., :3]
    image, spread = (
        np.tile(part[:, None], (1, 2, 2, 1)) for part in (points, turn + 1)
    )
    covariance = np.tile(turn, (1, 2, 2))
    return [
        geometry.pixels_to_camera(points, turn, "opencv"),
        geometry.transform(points, pose),
        geometry.compose(pose, np.pad(points, [(0, 0), (0, 0), (0, 1)])),
        geometry.pixel_variance(points, covariance, 4, 6),
        *fusion.fuse([points, turn], [turn + 1, points + 2]),
        *fusion.quantize(points, turn + 1, [[True] * 3], 4, 6)[:2],
        fusion.smooth(image[:, :, :2], spread[:, :, :2], np.ones((1, 1))),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("other", ["float32", "float64"])
def test_results_have_the_wider_dtype(dtype, other):
    if keras.backend.backend() == "jax" and "float64" in (dtype, other):
        pytest.skip("has no float64 unless it is told")
    points = np.random.default_rng(0).uniform(0, 1, size=(1, 3, 3))
    pose = np.eye(3, 4)[None]
    wide = results(points, pose)
    found = results(points.astype(dtype), pose.astype(other))
    for one, exact in zip(found, wide):
        assert ops.dtype(one) == max(dtype, other)
        close(one, array(exact), 1e-5)
    alone = [
        geometry.to_sphere(points.astype(dtype)),
        geometry.to_pixels(points.astype(dtype), 4, 6),
        geometry.from_pixels(points.astype(dtype), 4, 6),
        geometry.rotation_matrix(points.astype(dtype)),
    ]
    assert {ops.dtype(one) for one in alone} == {dtype}


def test_lists_and_integers_take_the_dtype_of_arrays():
    if keras.backend.backend() == "jax":
        pytest.skip("has no float64 unless it is told")
    pose = np.eye(3, 4)[None]
    points = geometry.transform([[[0.1, 0.2, 0.3]]], pose)
    assert ops.dtype(points) == "float64"
    close(points, [[[0.1, 0.2, 0.3]]], 1e-15)
    points = geometry.transform(np.array([[[16777217, 0, 1]]]), pose)
    assert array(points)[0, 0, 0] == 16777217


def test_constants_are_as_exact_as_float64():
    inverse = geometry.inverse_intrinsics((3.0, 7.0), (1 / 3, 0.1))
    close(inverse, [[-1 / 3, 0, 1 / 9], [0, -1 / 7, 0.1 / 7], [0, 0, 1]], 1e-16)
    kernel = fusion.smoothing_kernel(3)
    close(kernel[0, 0], 1 / (1 + np.sqrt(2)), 1e-16)
    if keras.backend.backend() == "jax":
        return
    mean = np.random.default_rng(0).normal(size=(1, 4, 6, 2))
    variance = np.exp(mean)
    close(
        fusion.smooth(mean, variance, kernel),
        smoothed(mean, variance, kernel),
        1e-13,
    )


def test_the_nearest_point_is_found_in_full_precision():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("needs float64 in all of Keras")
    mean = np.array([[[1.0, 1.0, 9.0], [1.0, 1.0, 9.0 + 1e-8]]])
    for points in (mean, mean[:, ::-1]):
        image, _ = quantized(points, np.ones_like(mean), [[True] * 2], 2, 4)
        assert array(image)[0, 1, 1, 2] == 9.0


# Conventions.

AXES = {  # of cameras and agents: x, y, z in terms of left, up, forward
    "esm": (np.eye(3), np.eye(3)),
    "opencv": (np.diag([-1, -1, 1]), np.diag([-1, -1, 1])),
    "opengl": (np.diag([-1, 1, -1]), np.diag([-1, 1, -1])),
    "ros": (np.diag([-1, -1, 1]), [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
}


@pytest.mark.parametrize("convention", AXES)
def test_conventions_have_the_documented_axes(convention):
    for axes, wanted in zip(
        (geometry.camera_axes, geometry.agent_axes), AXES[convention]
    ):
        pose = axes(convention)
        assert pose.shape == (3, 4) and array(geometry.is_pose(pose))
        np.testing.assert_array_equal(pose, np.eye(3, 4) * 0 + pose)
        np.testing.assert_array_equal(pose[:, :3], wanted)
        assert (pose[:, 3] == 0).all()


K = np.array([[4.0, 0, 3], [0, 5, 2], [0, 0, 1]])


@pytest.mark.parametrize(
    ("convention", "wanted"),
    [
        ("esm", [-0.5, 0.8, 2]),  # to the right, up, ahead
        ("opencv", [0.5, -0.8, 2]),
        ("opengl", [0.5, 0.8, -2]),
        ("ros", [0.5, -0.8, 2]),
    ],
)
def test_pixels_to_camera_follows_the_convention(convention, wanted):
    """Pixel (4, 0) is right of the center and above it."""
    inverse = geometry.inverse_intrinsics((4, 5), (3, 2), convention)
    if convention != "esm":
        close(inverse, np.linalg.inv(K), 1e-12)
    for depth, scale in (
        (np.full((3, 5), 2.0), None),
        (np.full((3, 5), 2000, "uint16"), 0.001),
        (np.full((3, 5), 2000.0), 0.001),
        (np.full((3, 5), 2), 1),
    ):
        points = geometry.pixels_to_camera(depth, inverse, convention, scale)
        close(array(points)[0, 4], wanted)


def test_integer_depth_needs_a_scale():
    inverse = geometry.inverse_intrinsics((4, 5), (3, 2))
    for dtype in ("uint16", "int32", "int64"):
        depth = np.full((3, 5), 2000, dtype)
        for some in (depth, depth.tolist()):
            with pytest.raises(
                ValueError, match="`depth_scale=0.001`.*: u?int"
            ):
                geometry.pixels_to_camera(some, inverse)
    for scale in (0, -1.0, "mm", np.nan, True):
        with pytest.raises(ValueError, match="`depth_scale` must be.*Received"):
            geometry.pixels_to_camera(depth, inverse, depth_scale=scale)


@pytest.mark.parametrize(
    ("matrix", "convention", "told"),
    [
        (K, "esm", "It is K itself"),
        (K, "opencv", "It is K itself"),
        (np.linalg.inv(K), "esm", 'signs of "opencv"'),
        (np.diag([-1, -1, 1]) @ np.linalg.inv(K), "ros", 'signs of "esm"'),
        (np.linalg.inv(K).T, "opencv", r"last row must be \(0, 0, 1\)"),
        (np.diag([-1, 1, 1]) @ np.linalg.inv(K), "opencv", "focal lengths pos"),
        (np.zeros((3, 3)), "opencv", "focal lengths positive"),
    ],
)
def test_intrinsics_of_another_convention_are_refused(matrix, convention, told):
    assert not array(geometry.is_camera(matrix, convention))
    right = geometry.inverse_intrinsics((4, 5), (3, 2), convention)
    assert array(geometry.is_camera([right, right], convention)).all()
    for given in (matrix, np.stack([right, matrix])):
        with pytest.raises(
            ValueError, match=f"`inverse_intrinsics`.*{told}.*Received"
        ):
            geometry.pixels_to_camera(np.ones((2, 3)), given, convention)


# Checks of arguments.

POSE, POINTS = np.eye(3, 4)[None], np.ones((1, 2, 3))
ANY = np.ones(2)
IMAGE = np.ones((1, 4, 6, 3))
INVERSE = geometry.inverse_intrinsics((4, 5), (3, 2))
SOUND = {
    "inverse_intrinsics": {"focal_lengths": (1, 2), "principal_point": (3, 4)},
    "is_camera": {"inverse_intrinsics": INVERSE},
    "pixels_to_camera": {
        "depth": np.ones((1, 2, 3)),
        "inverse_intrinsics": INVERSE[None],
    },
    "transform": {"points": POINTS, "pose": POSE},
    "rotation_matrix": {"rotation_vector": np.ones(3)},
    "pose_matrix": {"pose_vector": np.ones(6)},
    "compose": {"second": POSE, "first": POSE},
    "invert": {"pose": POSE},
    "motions": {"poses": POSE},
    "is_pose": {"pose": POSE},
    "turn_covariance": {
        "covariance": np.ones((1, 6, 6)),
        "rotation": np.eye(3),
    },
    "to_sphere": {"points": POINTS},
    "from_sphere": {"sphere": POINTS},
    "to_pixels": {"sphere": POINTS, "height": 4, "width": 6},
    "from_pixels": {"pixels": POINTS, "height": 4, "width": 6},
    "pixel_grid": {"height": 4, "width": 6},
    "pixel_variance": {
        "points": POINTS,
        "covariance": np.ones((1, 6, 6)),
        "height": 4,
        "width": 6,
    },
    "fuse": {"means": list(POINTS), "variances": list(POINTS)},
    "quantize": {
        "mean": POINTS,
        "variance": POINTS,
        "valid": np.ones((1, 2), bool),
        "height": 4,
        "width": 6,
    },
    "pad_sphere": {"image": IMAGE, "size": 1},
    "smoothing_kernel": {"size": 3},
    "smooth": {"mean": IMAGE, "variance": IMAGE, "kernel": np.ones((3, 3))},
    "at_least": {"values": ANY, "least": 1.0},
    "camera_axes": {"convention": "ros"},
    "agent_axes": {"convention": "ros"},
}


def unfit(value):
    """Invalid values of an argument."""
    yield from (None, "text", [["a"]], np.ones(3, complex), np.ones(3, bool))
    yield from ([[1.0], [1.0, 2.0]], object())
    if isinstance(value, np.ndarray) and value is not ANY:
        yield from (1.0, np.ones(1))


@pytest.mark.parametrize("name", SOUND)
def test_errors_name_the_wrong_argument(name):
    module = geometry if hasattr(geometry, name) else fusion
    function, sound = getattr(module, name), SOUND[name]
    function(**sound)
    for argument, value in sound.items():
        for wrong in unfit(value):
            with pytest.raises(
                ValueError, match=f"(?s)`{argument}(`|\\[).*Received"
            ):
                function(**{**sound, argument: wrong})


def test_every_function_is_tested_with_wrong_arguments():
    known = {"check_camera", "check_depth", "check_depth_scale", *SOUND}
    known |= {"check_leads", "float_tensors", "matrix_product", "turned"}
    own = {
        name
        for module in (tensors, cameras, geometry, fusion)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
    }
    assert own == known


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pixels_to_camera", {"depth": np.ones((2, 2, 3))}),
        ("transform", {"pose": np.concatenate([POSE] * 2)}),
        ("compose", {"first": np.concatenate([POSE] * 3)}),
        ("pixel_variance", {"covariance": np.ones((2, 6, 6))}),
        ("fuse", {"variances": [np.ones((1, 2, 4))]}),
        ("fuse", {"variances": [POINTS] * 2}),
        ("fuse", {"means": [], "variances": []}),
        ("quantize", {"variance": np.ones((1, 3, 3))}),
        ("quantize", {"valid": np.ones((1, 3), bool)}),
        ("quantize", {"mean": POINTS[..., :2], "variance": POINTS[..., :2]}),
        ("quantize", {"mean": POINTS[:, :0], "variance": POINTS[:, :0]}),
        ("pad_sphere", {"size": 5}),
        ("pad_sphere", {"image": IMAGE[:, :, :5]}),
        ("smooth", {"variance": IMAGE[:, :3]}),
        ("smooth", {"kernel": np.ones((2, 2))}),
        ("smooth", {"kernel": np.ones((11, 11))}),
        ("smoothing_kernel", {"size": 4}),
        ("camera_axes", {"convention": "cv2"}),
    ],
)
def test_disagreeing_sizes_are_refused(name, change):
    sound = SOUND[name]
    if name == "compose":
        sound = {**sound, "second": np.concatenate([POSE] * 2)}
    if name == "pixels_to_camera":
        sound = {**sound, "inverse_intrinsics": np.stack([INVERSE] * 3)}
    with pytest.raises(ValueError, match="must .*Received: "):
        module = geometry if hasattr(geometry, name) else fusion
        getattr(module, name)(**{**sound, **change})


def test_accelerators_do_not_round_factors(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("accelerators round factors of matrix products")

    for name in ("matmul", "einsum", "dot", "tensordot"):
        monkeypatch.setattr(geometry.ops, name, refused)
    pose = geometry.pose_matrix(np.arange(6, dtype="float32")[None] / 6)
    assert array(geometry.is_pose(pose)).all()
    there_and_back = geometry.compose(pose, geometry.invert(pose))
    np.testing.assert_allclose(
        array(there_and_back), np.eye(3, 4)[None], atol=1e-6
    )
    points = geometry.pixels_to_camera(
        np.ones((1, 2, 2), "float32"),
        np.eye(3, dtype="float32")[None],
        convention="opencv",
    )
    points = array(points).reshape(1, 4, 3)
    np.testing.assert_array_equal(
        points[0], [[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
    )
    turned = array(geometry.transform(points, pose))
    pose = array(pose)
    np.testing.assert_allclose(
        turned,
        points @ pose[:, :, :3].swapaxes(1, 2) + pose[:, None, :, 3],
        atol=1e-6,
    )
