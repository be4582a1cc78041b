"""Egospheric Spatial Memory, compared with the reference and with a room."""

import functools
import itertools
import json
import pathlib
import warnings

import harness
import keras
import numpy as np
import pytest
from catalogue import slow_unless
from keras import ops

import keras_memory
from keras_memory import esm
from keras_memory.spatial import fusion
from keras_memory.spatial import geometry
from keras_memory.spatial import inputs as inputs_module
from keras_memory.spatial import rooms

GOLDENS = pathlib.Path(__file__).parent / "goldens"
RECORDED = (
    pathlib.Path(__file__).parents[2] / "shared/goldens/esm__recorded_0.npz"
)


def array(value):
    return np.asarray(ops.convert_to_numpy(value))


def arrays(maps):
    return esm.ESMMap(*map(array, maps))


def close(one, other, tolerance=1e-5):
    np.testing.assert_allclose(
        array(one), array(other), rtol=tolerance, atol=tolerance
    )


def still(*lead):
    return np.tile(np.eye(3, 4, dtype="float32"), (*lead, 1, 1))


def seen(seed=0, batch=2, times=3, height=5, width=7, channels=3, cameras=1):
    """Random inputs: points all around, small motions."""
    rng = np.random.default_rng(seed)
    lead = batch, times

    def pose(scale):
        vectors = scale * rng.normal(size=(*lead, 6))
        return array(geometry.pose_matrix(vectors.astype("float32")))

    def camera():
        shape = (*lead, height, width)
        points = rng.normal(size=(*shape, 3))
        points *= rng.uniform(1, 4, size=(*shape, 1)) / np.linalg.norm(
            points, axis=-1, keepdims=True
        )
        return {
            "points": points.astype("float32"),
            "features": rng.normal(size=(*shape, channels)).astype("float32"),
            "variance": rng.uniform(
                0.01, 0.5, size=(*shape, 3 + channels)
            ).astype("float32"),
            "mask": rng.uniform(size=shape) < 0.9,
            "pose": pose(0.1),
        }

    return {
        "cameras": [camera() for _ in range(cameras)],
        "motion": pose(0.05),
    }


SIZES = {"height": 8, "width": 12, "smooth_kernel_size": 3}


def layer_of(**options):
    options = {**SIZES, "return_sequences": True, **options}
    return keras_memory.ESMLayer(**options)


def at(inputs, time):
    """Inputs of one step, or of a slice of steps."""
    return keras.tree.map_structure(lambda x: x[:, time], inputs)


# The reference.


def of_golden(d, number=2):
    cameras = [
        {
            "points": d[f"cam{i}.img_mean"][..., :3],
            "features": d[f"cam{i}.img_mean"][..., 3:],
            "variance": d[f"cam{i}.img_var"],
            "mask": d[f"cam{i}.validity_mask"][..., 0] > 0,
            "pose": d[f"cam{i}.cam_rel_mat"],
        }
        for i in range(number)
    ]
    return {"cameras": cameras, "motion": d["agent_rel_mat"]}


def own_of(found):
    """The pixels that contain a point, as the reference counts them."""
    mean, variance, own = map(array, found)
    return esm.ESMMap(mean, np.where(own, variance, np.inf))


def is_clear(pixels, depth, valid, height, width, share=0.02):
    """Where the reference's depth buffer is right: a single point, or a nearest
    point well in front of the others; away from poles and seam.

    Returns:
        (B, H, W) bool.
    """
    column = np.round(pixels[..., 0]).astype(int) % width
    row = np.round(pixels[..., 1]).astype(int)
    clear = np.ones((len(pixels), height, width), bool)
    span = depth.max() - depth.min()
    for b in range(len(pixels)):
        nearest = np.full((height, width), -np.inf)
        for i in np.argsort(depth[b]):
            if valid[b, i] and 0 <= row[b, i] < height:
                y, x = row[b, i], column[b, i]
                if depth[b, i] - nearest[y, x] < share * span:
                    clear[b, y, x] = False
                if nearest[y, x] == -np.inf:
                    nearest[y, x] = depth[b, i]
    clear[:, :1], clear[:, :, :1] = False, False
    clear[:, -1:], clear[:, :, -1:] = False, False
    return clear


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["esm__a", "esm__b"])
def test_projection_equals_the_reference(name):
    """Measurements of two cameras, and the memory after each motion.

    With the depth buffer, the reference quantizes all cameras together, like a
    single camera with both images here. Only pixels where its depth buffer is
    right are compared (`is_clear`)."""
    d = np.load(GOLDENS / f"{name}.npz")
    height, width = d["empty_memory.mean"].shape[2:4]
    cell = keras_memory.ESMCell(
        height, width, d["empty_memory.mean"].shape[-1] - 3, dtype="float32"
    )
    compared = 0
    for time in range(3):
        inputs = at(of_golden(d), time)
        lines = []
        for camera in inputs["cameras"]:
            points = geometry.transform(
                camera["points"].reshape(len(camera["pose"]), -1, 3),
                camera["pose"],
            )
            lines.append(points)
        points = np.concatenate([array(one) for one in lines], axis=1)

        def joined(key, inputs=inputs):
            parts = [
                np.asarray(c[key]).reshape(
                    len(c["pose"]), -1, *c[key].shape[3:]
                )
                for c in inputs["cameras"]
            ]
            joint = np.concatenate(parts, axis=1)[:, None]
            return ops.convert_to_tensor(joint.astype("float32"))

        mask = joined("mask") > 0
        found = own_of(
            cell.observe(
                joined("features"),
                points=points[:, None].astype("float32"),
                variance=joined("variance"),
                mask=mask,
            )
        )
        of_it = (
            d["step.meas_mean"][:, time],
            d["step.meas_var"][:, time],
        )
        pixels = array(
            geometry.to_pixels(geometry.to_sphere(points), height, width)
        )
        clear = is_clear(
            pixels[..., :2], pixels[..., 2], array(mask)[:, 0], height, width
        )
        hit = np.isfinite(found.variance[..., 0]) & clear
        assert (
            (of_it[1][..., 0] < 1e11) == np.isfinite(found.variance[..., 0])
        )[:, 1:-1, 1:-1].mean() > 0.999
        close(found.mean[hit], of_it[0][hit], 1e-4)
        # The reference's depth buffer adds depth and so rounds.
        error = np.abs(found.variance[hit] - of_it[1][hit])
        assert error.max() < 0.01
        compared += hit.sum()
    assert compared > 200


@pytest.mark.parametrize("name", ["esm__a", "esm__b"])
def test_reprojection_equals_the_reference(name):
    """The memory after each motion, from the reference's memory before it."""
    d = np.load(GOLDENS / f"{name}.npz")
    shape = d["empty_memory.mean"].shape
    height, width = shape[2:4]
    cell = keras_memory.ESMCell(height, width, shape[-1] - 3)
    compared = 0
    for time in range(3):
        if time:
            before = (
                d["step.fused_mean"][time - 1],
                d["step.fused_var"][time - 1],
            )
        elif "memory_in.mean" in d:
            before = d["memory_in.mean"][:, 0], d["memory_in.var"][:, 0]
        else:
            continue
        before = [one.astype("float32") for one in before]
        motion = d["agent_rel_mat"][:, time].astype("float32")
        found = own_of(cell.move(esm.ESMMap(*before), motion))
        mean, variance = d["step.prior_mean"][time], d["step.prior_var"][time]
        flat = before[0].reshape(len(before[0]), -1, shape[-1])
        points = geometry.transform(
            geometry.from_sphere(
                geometry.from_pixels(flat[..., :3], height, width)
            ),
            motion,
        )
        pixels = array(
            geometry.to_pixels(geometry.to_sphere(points), height, width)
        )
        known = (before[1] < 0.99 * d["empty_memory.var"][0, 0, 0, 0]).all(-1)
        clear = is_clear(
            pixels[..., :2],
            pixels[..., 2],
            known.reshape(len(known), -1),
            height,
            width,
        )
        hit = np.isfinite(found.variance[..., 0]) & clear
        close(found.mean[hit], mean[hit], 1e-4)
        close(found.variance[hit], variance[hit], 1e-4)
        compared += hit.sum()
    assert compared > 200


def test_a_step_equals_the_reference():
    """Holes, their variance and smoothing; all features are positive."""
    d = np.load(GOLDENS / "esm__b.npz")
    shape = d["empty_memory.mean"].shape
    cell = keras_memory.ESMCell(
        *shape[2:4], shape[-1] - 3, smooth_kernel_size=5
    )
    kernel = fusion.smoothing_kernel(5)
    for time in range(3):
        state = esm.ESMMap(
            d["step.fused_mean_raw"][time][:, 0].astype("float32"),
            d["step.fused_var"][time].astype("float32"),
        )
        shown = arrays(cell.smooth(state))
        close(shown.variance, d["step.fused_var"][time])
        precision = 1 / state.variance[..., 2:]
        around = array(
            fusion.smooth(precision, np.ones_like(precision), kernel)
        )
        hole = (state.variance >= 0.99 * cell._prior.variance[0, 0]).any(-1)
        assert 0.1 < hole.mean() < 0.95
        # The reference adds a hundredth of the kernel's sum to the denominator.
        expected = d["step.fused_mean"][time].astype("float32")
        theirs = shown.mean[..., 2:] * around / (around + 0.01)
        theirs = np.where(hole[..., None], theirs, shown.mean[..., 2:])
        inner = np.s_[:, 1:]
        close(theirs[inner], expected[..., 2:][inner], 1e-4)
        close(shown.mean[..., :2], state.mean[..., :2])


@pytest.mark.every_backend
@pytest.mark.skipif(not RECORDED.exists(), reason="no recorded data here")
def test_recorded_data_gives_the_map_of_the_reference():
    """A frame recorded by the reference's authors; row 0 is excluded."""
    d = np.load(RECORDED)
    cell = keras_memory.ESMCell()
    inputs = at(of_golden(d, number=1), 0)
    state = cell.get_initial_state(1)
    shown, state = (arrays(one) for one in cell(inputs, state))
    mean, variance = (
        d[f"memory_out_recorded.{name}"][:, 0, 1:] for name in ("mean", "var")
    )
    of_it = variance[..., 2] < 9900
    ours = state.variance[:, 1:, :, 2] < 9900
    assert ours[of_it].mean() > 0.999 and of_it[ours].mean() > 0.96
    both = of_it & ours
    assert both.sum() > 5000
    span = mean.reshape(-1, 6).max(0) - mean.reshape(-1, 6).min(0)
    right = (np.abs(state.mean[:, 1:] - mean) <= 1e-3 * span).all(-1)
    assert right[both].mean() > 0.97
    close(state.variance[:, 1:][both], variance[both], 1e-6)
    assert all(np.isfinite(part).all() for part in shown)


# State, time, and batches.


def test_single_steps_equal_a_sequence():
    inputs = seen(cameras=2)
    whole, last = layer_of(return_state=True)(inputs)
    cell = keras_memory.ESMCell(**SIZES)
    state = cell.get_initial_state(2)
    for time in range(3):
        shown, state = cell(at(inputs, time), state)
        close(shown.mean, whole.mean[:, time])
        close(shown.variance, whole.variance[:, time])
    close(state.mean, last.mean)
    parts = []
    for part in (slice(0, 2), slice(2, 3)):
        state = None if part.start == 0 else state
        shown, state = layer_of(return_state=True)(
            at(inputs, part), initial_state=state
        )
        parts.append(array(shown.mean))
    close(np.concatenate(parts, axis=1), whole.mean)


def test_without_return_sequences_the_last_map_is_returned():
    inputs = seen()
    whole = layer_of()(inputs)
    last = layer_of(return_sequences=False)(inputs)
    close(last.mean, whole.mean[:, -1])
    close(last.variance, whole.variance[:, -1])


def test_rows_of_a_batch_do_not_mix():
    inputs = seen(batch=3)
    whole = layer_of()(inputs)
    for row in range(3):
        alone = layer_of()(
            keras.tree.map_structure(lambda x, r=row: x[r : r + 1], inputs)
        )
        close(alone.mean[0], whole.mean[row])


@pytest.mark.every_backend
def test_a_stateful_layer_continues_from_its_state():
    inputs = seen(times=4)
    whole = layer_of()(inputs)
    layer = layer_of(stateful=True)
    for _ in range(2):
        for part in (slice(0, 1), slice(1, 4)):
            close(layer(at(inputs, part)).mean, whole.mean[:, part])
        layer.reset_state()
    assert len(layer.non_trainable_variables) == 2
    assert not layer.weights  # as weights, states would fix the batch size
    entry = keras.tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype.name), inputs
    )
    with pytest.raises(ValueError, match="fixed batch size.*Received: motion"):
        layer_of(stateful=True)(entry)
    with pytest.raises(ValueError, match="`cameras` and `motion`.*Received"):
        layer_of(stateful=True)({"cameras": inputs["cameras"]})


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stateful_layer_refuses_another_batch_size(batch):
    layer = layer_of(stateful=True)
    layer(seen(batch=2))
    before = arrays(layer.states)
    with pytest.raises(
        ValueError, match="`motion` .*batch size.*Received: sha"
    ):
        layer(seen(batch=batch))
    for part, other in zip(arrays(layer.states), before):
        close(part, other, 0)


@harness.needs_tensorflow
def test_a_stateful_model_refuses_a_smaller_last_batch():
    inputs = seen(batch=3, times=2)
    entry = entry_of(inputs, batch=2, times=2)
    model = keras.Model(entry, layer_of(stateful=True)(entry))
    with pytest.raises(
        Exception, match="(?s)expected shape .*with_state_must_be_2"
    ):
        model.predict(inputs, batch_size=2, verbose=0)


@harness.needs_tensorflow
def test_a_stateful_model_is_served_as_a_stateless_one(tmp_path):
    import tensorflow as tf

    from keras_memory.serving import export

    inputs = seen(batch=2, times=3)
    entry = entry_of(inputs, batch=2, times=3)
    stateful, plain = (
        keras.Model(entry, layer_of(stateful=kept)(entry))
        for kept in (True, False)
    )
    expected = arrays(plain(inputs))
    stateful(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns of missing signatures
        export.export_for_serving(stateful, tmp_path, warm_up=((2, 3),))
    served = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    names = sorted(served.structured_input_signature[1])
    assert names[0] == "cameras_0_features" and names[-1] == "motion"
    given = dict(zip(names, keras.tree.flatten(inputs)))
    for _ in range(2):
        found = served(**given)
        for index, wanted in enumerate(expected):
            close(found[f"outputs_{index}"], wanted, 1e-5)


def test_a_map_needs_no_features():
    inputs = seen(times=3)
    expected = arrays(layer_of()(inputs))
    for camera in inputs["cameras"]:
        camera["features"] = camera["features"][..., :0]
        if "variance" in camera:
            camera["variance"] = camera["variance"][..., :3]
    found = arrays(layer_of(feature_channels=0)(inputs))
    for part, other in zip(found, expected):
        close(part, other[..., :3], 1e-5)


def test_pose_covariance_becomes_the_variance_of_the_map():
    point = np.array([[0.5, 1.0, 2.0]], "float32")
    inputs = {
        "cameras": {
            "points": point[None, None, None],
            "features": np.ones((1, 1, 1, 1, 3), "float32"),
            "pose_covariance": np.diag([0.1, 0.2, 0.3, 0.01, 0.02, 0.03])[
                None
            ].astype("float32"),
        },
        "motion": still(1, 1),
    }
    layer = layer_of(return_state=True, return_sequences=False)
    found = arrays(layer(inputs)[1])
    wanted = geometry.pixel_variance(
        point[None],
        inputs["cameras"]["pose_covariance"],
        layer.height,
        layer.width,
    )
    row, column = np.argwhere(found.variance[0, ..., 2] < 100)[0]
    close(
        found.variance[0, row, column, :3],
        np.maximum(array(wanted)[0, 0], layer.variance_limits[0]),
        1e-4,
    )
    inputs["cameras"]["pose_covariance"] *= -1  # subtracts nothing
    found = arrays(layer(inputs)[1])
    close(found.variance[0, row, column, :3], layer.variance_limits[0], 1e-6)


def test_masked_steps_change_nothing():
    inputs = seen(times=4)
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 1]], bool)
    found = layer_of(return_state=True)(inputs, mask=mask)
    found, state = map(arrays, found)
    for row in range(2):
        kept = np.flatnonzero(mask[row])
        some = keras.tree.map_structure(
            lambda x, r=row, k=kept: x[r : r + 1, k], inputs
        )
        alone, after = layer_of(return_state=True)(some)
        close(found.mean[row, kept], alone.mean[0])
        close(state.mean[row], after.mean[0])
    close(found.mean[0, 1], found.mean[0, 0])
    empty = arrays(layer_of().smooth(layer_of().get_initial_state(1)))
    close(found.mean[1, 0], empty.mean[0])


def test_constant_cameras_need_no_time_axis():
    inputs = seen()
    camera = inputs["cameras"][0]
    camera["pose"] = np.repeat(camera["pose"][:, :1], 3, axis=1)
    whole = layer_of()(inputs)
    inputs["cameras"][0] = {**camera, "pose": camera["pose"][:, 0]}
    close(layer_of()(inputs).mean, whole.mean)
    inputs["cameras"] = inputs["cameras"][0]  # a single camera
    close(layer_of()(inputs).mean, whole.mean)


def test_depth_equals_points_along_the_optical_axis():
    inverse = geometry.inverse_intrinsics((4.0, 4.0), (3.0, 2.0))
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 3, size=(2, 3, 5, 7)).astype("float32")
    features = rng.normal(size=(2, 3, 5, 7, 3)).astype("float32")
    points = geometry.pixels_to_camera(depth, inverse[None, None])
    by_points = layer_of()(
        {
            "cameras": {"points": points, "features": features},
            "motion": still(2, 3),
        }
    )
    for value in (depth, depth[..., None]):
        by_depth = layer_of()(
            {
                "cameras": {
                    "depth": value,
                    "features": features,
                    "inverse_intrinsics": np.stack([inverse] * 2),
                },
                "motion": still(2, 3),
            }
        )
        close(by_depth.mean, by_points.mean)


def points_of(found, time):
    """Sorted columns and rows of all points of a map."""
    known = found.variance[0, time, ..., 2] < 1
    return np.unique(found.mean[0, time, known, :2].round(4), axis=0).tolist()


def test_a_point_lands_where_computed_by_hand():
    """A point 2 m ahead; the agent walks 1 m ahead and turns left."""
    quarter = geometry.pose_matrix([0.0, 0, 0, 0, -np.pi / 2, 0])
    ahead = geometry.pose_matrix([0.0, 0, -1.0, 0, 0, 0])
    motion = np.stack([np.eye(3, 4), geometry.compose(quarter, ahead)])[None]
    points = np.zeros((1, 2, 1, 1, 3), "float32")
    points[..., 2] = 2.0
    found = arrays(
        keras_memory.ESMLayer(
            6, 12, 1, smooth_kernel_size=None, return_sequences=True
        )(
            {
                "cameras": {
                    "points": points,
                    "features": points[..., 2:] * 0 + 7,
                    "mask": np.array([1, 0], bool).reshape(1, 2, 1, 1),
                },
                "motion": motion.astype("float32"),
            }
        )
    )
    close(found.mean[0, 0, 3, 6], [6, 3, 2, 7])
    # Now the point is on the right, a quarter of twelve columns off center.
    close(found.mean[0, 1, 3, 9], [9, 3, 1, 7])
    assert points_of(found, 1) == [[9, 3]]


# Conventions: a pixel right of the center and above it.

BY_HAND = {  # motion: a meter ahead, then a quarter turn left; pose: 0.3 m up
    # in the agent, looking to its right
    "esm": (
        [[0, 0, -1, 1], [0, 1, 0, 0], [1, 0, 0, 0]],
        [[0, 0, -1, 0], [0, 1, 0, 0.3], [1, 0, 0, 0]],
        [-0.5, 0.8, 2],
    ),
    "opencv": (
        [[0, 0, 1, -1], [0, 1, 0, 0], [-1, 0, 0, 0]],
        [[0, 0, 1, 0], [0, 1, 0, -0.3], [-1, 0, 0, 0]],
        [0.5, -0.8, 2],
    ),
    "opengl": (
        [[0, 0, -1, -1], [0, 1, 0, 0], [1, 0, 0, 0]],
        [[0, 0, -1, 0], [0, 1, 0, 0.3], [1, 0, 0, 0]],
        [0.5, 0.8, -2],
    ),
    "ros": (
        [[0, 1, 0, 0], [-1, 0, 0, 1], [0, 0, 1, 0]],
        [[-1, 0, 0, 0], [0, 0, -1, 0], [0, -1, 0, 0.3]],
        [0.5, -0.8, 2],
    ),
}
K = np.array([[4.0, 0, 3], [0, 5, 2], [0, 0, 1]])


def one_pixel(convention, depth=2.0, dtype="float32"):
    """Inputs: a pixel seen two meters ahead at first, then a motion."""
    image = np.zeros((1, 2, 3, 5), dtype)
    image[0, 0, 0, 4] = depth
    inverse = geometry.inverse_intrinsics((4, 5), (3, 2))
    if convention != "esm":
        inverse = np.linalg.inv(K)
    camera = {
        "depth": image,
        "features": np.ones((1, 2, 3, 5, 1), "float32"),
        "inverse_intrinsics": inverse[None],
    }
    motion = still(1, 2)
    motion[0, 1] = BY_HAND[convention][0]
    return {"cameras": camera, "motion": motion}


def place(right, up, ahead, height=60, width=120):
    """Column, row and distance."""
    point = np.array([[-right, up, ahead]], "float32")
    return array(geometry.to_pixels(geometry.to_sphere(point), height, width))[
        0
    ]


def places(found):
    """(T, 3): column, row and distance of the only point in each map."""
    rows = []
    for mean, variance in zip(found.mean[0], found.variance[0]):
        (row,) = np.unique(mean[variance[..., 2] < 1].round(3), axis=0)
        rows.append(row[:3])
    return np.array(rows)


def sphere_of(convention, **options):
    return keras_memory.ESMLayer(
        60,
        120,
        1,
        smooth_kernel_size=None,
        return_sequences=True,
        convention=convention,
        **options,
    )


@pytest.mark.parametrize("given", ["depth", "points"])
@pytest.mark.parametrize("convention", BY_HAND)
def test_conventions_match_places_computed_by_hand(convention, given):
    inputs = one_pixel(convention)
    if given == "points":
        camera = inputs["cameras"]
        points = np.zeros((1, 2, 3, 5, 3), "float32")
        points[0, 0, 0, 4] = BY_HAND[convention][2]
        mask = camera.pop("depth") > 0
        del camera["inverse_intrinsics"]
        camera |= {"points": points, "mask": mask}
    layer = sphere_of(convention)
    wanted = [place(0.5, 0.8, 2), place(1, 0.8, -0.5)]
    close(places(arrays(layer(inputs))), wanted, 2e-3)
    pose = np.array(BY_HAND[convention][1])[None]
    inputs["cameras"]["pose"] = pose
    inputs["motion"] = still(1, 2)
    found = places(arrays(layer(inputs)))
    close(found, [place(2, 1.1, -0.5)] * 2, 2e-3)


def test_covariances_follow_the_axes_of_the_convention():
    """The motion is uncertain along the forward axis and about the up axis."""
    found = []
    for convention in BY_HAND:
        inputs = one_pixel(convention)
        spread = [0, 0, 0.01, 0, 0.02, 0]
        if convention == "ros":
            spread = [0.01, 0, 0, 0, 0, 0.02]
        spread = np.diag(spread)[None, None].astype("float32")
        inputs["motion_covariance"] = np.repeat(spread, 2, axis=1)
        inputs["cameras"]["pose_covariance"] = spread[0]
        found.append(arrays(sphere_of(convention)(inputs)))
    assert found[0].variance[..., 2].min() > 0.005
    for other in found[1:]:
        close(other.variance, found[0].variance, 1e-4)
        close(other.mean, found[0].mean, 1e-4)


def test_cells_follow_conventions():
    cell = keras_memory.ESMCell(
        60, 120, 1, smooth_kernel_size=None, convention="ros"
    )
    inputs, state = one_pixel("ros"), cell.get_initial_state(1)
    for time, wanted in enumerate([place(0.5, 0.8, 2), place(1, 0.8, -0.5)]):
        camera = {**inputs["cameras"]}
        for name in ("depth", "features"):
            camera[name] = camera[name][:, time]
        motion = inputs["motion"][:, time]
        _, state = cell({"cameras": camera, "motion": motion}, state)
        found = esm.ESMMap(*(part[:, None] for part in arrays(state)))
        close(places(found), [wanted], 2e-3)


@pytest.mark.parametrize(
    ("matrix", "convention", "told"),
    [
        (np.linalg.inv(K), "esm", 'signs of "opencv" and "opengl" and'),
        (K, "opencv", "It is K itself"),
        (K, "esm", "It is K itself"),
        (geometry.inverse_intrinsics((4, 5), (3, 2)), "ros", 'of "esm"'),
    ],
)
def test_intrinsics_of_another_convention_are_refused(matrix, convention, told):
    inputs = one_pixel(convention)
    camera = inputs["cameras"]
    camera["inverse_intrinsics"] = matrix[None]
    words = rf"\['inverse_intrinsics'\]` must.*{told}.*Received"
    for given in (
        inputs,
        {**inputs, "cameras": [camera]},
        keras.tree.map_structure(ops.convert_to_tensor, inputs),
    ):
        with pytest.raises(ValueError, match=words):
            sphere_of(convention)(given)


def test_a_model_ignores_a_camera_of_another_convention():
    """Inside a model, the values are unknown when it is built."""
    inputs = one_pixel("opencv")
    entry = entry_of(inputs, times=2)
    entry["cameras"]["inverse_intrinsics"] = keras.Input((3, 3))
    model = keras.Model(keras.tree.flatten(entry), sphere_of("esm")(entry))
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    found = arrays(model(keras.tree.flatten(inputs)))
    assert (found.variance[..., 2] > 9000).all()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_integer_depth_is_refused_without_its_scale(dtype):
    inputs = one_pixel("opencv", 2000, dtype)
    told = r"`cameras\['depth'\]`.*`depth_scale=0.001`.*Received: u?int"
    with pytest.raises(ValueError, match=told):
        sphere_of("opencv")(inputs)
    with pytest.raises(ValueError, match=told):
        sphere_of("opencv")(entry_of(inputs))
    camera = {**inputs["cameras"]}
    for name in ("depth", "features"):
        camera[name] = camera[name][:, 0]
    cell = keras_memory.ESMCell(60, 120, 1, convention="opencv")
    with pytest.raises(ValueError, match="`depth` .*`depth_scale=0.001`"):
        cell.observe(**camera)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_depth_is_multiplied_by_its_scale(dtype):
    inputs = one_pixel("opencv", 2000, dtype)
    expected = arrays(sphere_of("opencv")(one_pixel("opencv")))
    layer = sphere_of("opencv", depth_scale=0.001)
    entry = entry_of(inputs, times=2)
    entry["cameras"]["inverse_intrinsics"] = keras.Input((3, 3))
    model = keras.Model(keras.tree.flatten(entry), layer(entry))
    calls = [lambda: layer(inputs), lambda: model(keras.tree.flatten(inputs))]
    if harness.BACKEND == "tensorflow" and dtype == "uint16":
        import tensorflow as tf

        calls += [lambda: tf.function(layer)(inputs)]
    for call in calls:
        for one, other in zip(arrays(call()), expected):
            close(one, other)


def test_float64_layers_have_float64_constants():
    harness.skip_on(*harness.OTHERS, because="needs float64 in all of Keras")
    inputs = one_pixel("opencv", dtype="float64")
    inputs["cameras"]["inverse_intrinsics"] = geometry.inverse_intrinsics(
        (4 / 3, 5 / 3), (3, 2), "opencv"
    )[None]
    layer = keras_memory.ESMLayer(
        6, 12, 1, convention="opencv", dtype="float64", return_state=True
    )
    shown, state = map(arrays, layer(inputs))
    radius = np.sqrt((2 * 3 / 4) ** 2 + (2 * 6 / 5) ** 2 + 4)
    moved = np.sqrt((2 * 3 / 4) ** 2 + (2 * 6 / 5) ** 2 + 1)
    known = state.variance[0, ..., 2] < 1
    np.testing.assert_allclose(
        state.mean[0, known, 2], moved, rtol=1e-14, atol=0
    )
    assert radius > moved
    # Equals smoothing by loops, with the kernel in float64.
    kernel = 1 / (1 + np.hypot(*np.mgrid[-6:7, -6:7]))
    mean, variance = (
        array(fusion.pad_sphere(part[..., 2:], 6)) for part in state
    )
    row, column = np.argwhere(~known)[5]
    part = np.s_[0, row : row + 13, column : column + 13]
    weights = kernel[..., None] / variance[part]
    wanted = (weights * mean[part]).sum((0, 1)) / weights.sum((0, 1))
    np.testing.assert_allclose(
        shown.mean[0, row, column, 2:], wanted, rtol=1e-13
    )


# Cameras and variances.


def test_cameras_are_fused_as_gaussians():
    """Three cameras at one place: the reference is wrong for more than two."""
    points = np.zeros((1, 1, 1, 1, 3), "float32") + [0.1, 0.0, 2.0]
    cameras = [
        {
            "points": points + [0, 0, shift],
            "features": np.full((1, 1, 1, 1, 1), feature, "float32"),
            "variance": np.full((1, 1, 1, 1, 4), variance, "float32"),
        }
        for shift, feature, variance in ((0, -1, 0.5), (0.2, 2, 2), (0, 5, 0.1))
    ]
    found = arrays(
        keras_memory.ESMLayer(18, 36, 1, smooth_kernel_size=None)(
            {"cameras": cameras, "motion": still(1, 1)}
        )
    )
    precision = 1 / 0.5 + 1 / 2 + 1 / 0.1
    close(found.variance[0, 9, 18, 3], 1 / precision)
    feature = (-1 / 0.5 + 2 / 2 + 5 / 0.1) / precision
    close(found.mean[0, 9, 18, 3], feature)


def test_the_order_of_cameras_does_not_matter():
    inputs = seen(cameras=3)
    one = layer_of()(inputs)
    other = layer_of()({**inputs, "cameras": inputs["cameras"][::-1]})
    close(one.mean, other.mean, 1e-4)


@pytest.mark.parametrize("times", [1, 3])
def test_an_empty_batch_gives_empty_maps(times):
    inputs = at(seen(), slice(0, times))
    none = keras.tree.map_structure(lambda x: x[:0], inputs)
    for found in (
        layer_of()(none),
        keras_memory.ESMCell(**SIZES)(
            at(none, 0), layer_of().get_initial_state(0)
        )[1],
    ):
        assert found.mean.shape[0] == 0 and found.mean.shape[-3:] == (8, 12, 6)
        assert tuple(found.variance.shape) == tuple(found.mean.shape)


def test_cameras_may_have_different_sizes():
    inputs, other = seen(), seen(seed=1, height=3, width=11)
    inputs["cameras"] += other["cameras"]
    assert layer_of()(inputs).mean.shape == (2, 3, 8, 12, 6)


def test_uncertain_motion_widens_the_map_until_it_is_forgotten():
    inputs = seen(times=3)
    inputs["cameras"][0]["mask"][:, 1:] = False
    sure = arrays(layer_of()(inputs))
    known = sure.variance[..., 2] < 9000
    covariance = np.broadcast_to(np.eye(6, dtype="float32"), (2, 3, 6, 6))
    inputs["motion_covariance"] = 1e-4 * covariance
    unsure = arrays(layer_of()(inputs))
    assert (unsure.variance[:, 2] >= sure.variance[:, 2] - 1e-6).all()
    wider = (
        unsure.variance[:, 2][known[:, 2]] - sure.variance[:, 2][known[:, 2]]
    )
    assert (wider[:, 2] > 1e-4).mean() > 0.9  # from two translations
    assert (wider[:, 3:] == 0).all()
    inputs["motion_covariance"] = 1e8 * covariance
    lost = arrays(layer_of()(inputs))
    assert (lost.variance[:, 2, ..., 2] > 9000).all()


def test_without_a_depth_buffer_points_are_fused():
    points = np.zeros((1, 1, 1, 2, 3), "float32") + [0, 0, 2.0]
    points[0, 0, 0, 1, 2] = 4.0
    camera = {
        "points": points,
        "features": points[..., 2:],
        "variance": np.ones((1, 1, 1, 2, 4), "float32"),
    }
    inputs = {"cameras": camera, "motion": still(1, 1)}
    for depth_buffer, depth, variance in ((True, 2, 1), (False, 3, 0.5)):
        found = arrays(
            keras_memory.ESMLayer(
                6, 12, 1, smooth_kernel_size=None, depth_buffer=depth_buffer
            )(inputs)
        )
        close(found.mean[0, 3, 6, 2:], [depth, depth])
        close(found.variance[0, 3, 6], [variance] * 4)


# Invalid inputs.


@pytest.mark.every_backend
def test_bad_pixels_are_ignored():
    inputs = seen(batch=1, times=1, height=4, width=5)
    camera = inputs["cameras"][0]
    camera["mask"][:] = True
    good = np.ones((4, 5), bool)

    def spoil(name, place, value):
        camera[name] = camera[name].copy()
        camera[name][(0, 0, *place)] = value
        good[place[:2]] = False

    spoil("points", (0, 0, 1), np.nan)
    spoil("points", (0, 1, 0), np.inf)
    spoil("points", (0, 2), 0.0)  # at the origin, as the pose is the identity
    spoil("points", (0, 3), 1e-4)
    spoil("points", (1, 0), 100.0)
    spoil("features", (1, 1, 2), np.nan)
    spoil("features", (1, 2, 0), -np.inf)
    spoil("variance", (1, 3, 4), np.nan)
    spoil("variance", (2, 0, 2), -1.0)
    spoil("variance", (2, 1, 0), 1e9)
    spoil("variance", (2, 2, 0), np.inf)
    camera["pose"] = still(1, 1)
    found = layer_of()(inputs)
    camera["mask"] = good[None, None]
    expected = layer_of()(inputs)
    assert good.sum() == 9
    for one, other in zip(found, expected):
        assert np.isfinite(array(one)).all()
        close(one, other)


def test_invalid_depth_is_ignored():
    depth = np.full((1, 1, 2, 4), 2.0, "float32")
    depth[0, 0, 0] = 0.0, -1.0, np.nan, np.inf
    depth[0, 0, 1, 0] = -np.inf
    camera = {
        "depth": depth,
        "features": np.ones((1, 1, 2, 4, 3), "float32"),
        "inverse_intrinsics": geometry.inverse_intrinsics((2, 2), (1.5, 0.5))[
            None
        ],
    }
    layer = keras_memory.ESMLayer(90, 180, return_sequences=True)
    found = arrays(layer({"cameras": camera, "motion": still(1, 1)}))
    assert all(np.isfinite(part).all() for part in found)
    assert len(points_of(found, 0)) == 3
    camera["inverse_intrinsics"] = camera["inverse_intrinsics"] * np.nan
    found = arrays(layer({"cameras": camera, "motion": still(1, 1)}))
    assert all(np.isfinite(part).all() for part in found)
    assert (found.variance[..., 2] > 9000).all()


def no_poses():
    pose = still(1)[0]
    for change in (np.nan, np.inf, 0.0, 2.0, -1.0):
        with np.errstate(invalid="ignore"):
            yield pose * change
    mirror = pose.copy()
    mirror[0, 0] = -1
    yield mirror
    far = pose.copy()
    far[1, 3] = np.nan
    yield far


def test_a_camera_with_an_invalid_pose_is_ignored():
    for pose in no_poses():
        inputs = seen(cameras=2)
        expected = layer_of()({**inputs, "cameras": inputs["cameras"][:1]})
        inputs["cameras"][1]["pose"] = np.broadcast_to(pose, (2, 3, 3, 4))
        found = layer_of()(inputs)
        close(found.mean, expected.mean)
        close(found.variance, expected.variance)


def test_an_invalid_motion_resets_the_map():
    for motion in no_poses():
        inputs = seen(times=2)
        inputs["motion"][0, 1] = motion
        found = layer_of()(inputs)
        inputs["motion"][0, 1] = np.eye(3, 4)
        expected = layer_of()(at(inputs, slice(1, 2)))
        close(found.mean[0, 1], expected.mean[0, 0])
        assert all(np.isfinite(array(part)).all() for part in found)


def test_frames_without_a_valid_pixel_keep_the_map():
    inputs = seen(times=3)
    inputs["motion"] = still(2, 3)
    inputs["cameras"][0]["mask"][:, 1:] = False
    found = layer_of()(inputs)
    close(found.mean[:, 2], found.mean[:, 0], 1e-4)
    inputs["cameras"][0]["mask"][:] = False
    found = arrays(layer_of(smooth_kernel_size=None)(inputs))
    prior = layer_of()._prior
    close(found.mean[0, 0], prior.mean)
    close(found.variance[0, 0], prior.variance)


def gradients(layer, inputs, weights):
    """Gradients of a weighted sum of the map by all floating-point inputs."""
    flat = keras.tree.flatten(inputs)
    real = [i for i, x in enumerate(flat) if x.dtype != bool]

    def total(*values):
        given = list(flat)
        for i, value in zip(real, values):
            given[i] = value
        maps = layer(keras.tree.pack_sequence_as(inputs, given))
        pairs = zip(maps, map(ops.convert_to_tensor, weights))
        return sum(ops.sum(part * one) for part, one in pairs)

    values = [ops.convert_to_tensor(flat[i]) for i in real]
    if harness.BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values)
            y = total(*values)
        found = tape.gradient(y, values, unconnected_gradients="zero")
        found = [array(one) for one in found]
    elif harness.BACKEND == "jax":
        import jax

        found = jax.grad(total, argnums=tuple(range(len(values))))(*values)
        found = [np.asarray(one) for one in found]
    else:
        for value in values:
            value.requires_grad_()
        y = total(*values)
        y.backward()
        found = [
            np.zeros(v.shape) if v.grad is None else v.grad.numpy()
            for v in values
        ]
    result = [None] * len(flat)
    for i, one in zip(real, found):
        result[i] = one
    names = keras.tree.pack_sequence_as(inputs, result)
    return names, lambda *xs: float(array(total(*xs))), values, real


def weights_of(layer, inputs):
    rng = np.random.default_rng(5)
    maps = layer(inputs)
    parts = [rng.normal(size=part.shape) for part in maps]
    # Exclude the large variances of the prior.
    parts[1] = parts[1] * (array(maps.variance) < 100)
    parts[0][..., :2] *= 0.1
    return [part.astype(ops.dtype(maps.mean)) for part in parts]


@pytest.mark.parametrize("depth_buffer", [True, slow_unless(False, False)])
def test_gradients_equal_finite_differences(depth_buffer):
    harness.skip_on(*harness.OTHERS, because="needs float64 in all of Keras")
    layer = layer_of(
        dtype="float64",
        depth_buffer=depth_buffer,
        smooth_kernel_size=3,
    )
    inputs = keras.tree.map_structure(
        lambda x: x if x.dtype == bool else x.astype("float64"),
        seen(times=2, height=3, width=4),
    )
    inputs["motion"] = array(
        geometry.pose_matrix(
            0.05 * np.random.default_rng(3).normal(size=(2, 2, 6))
        )
    )
    camera = inputs["cameras"][0]
    camera["pose"] = array(
        geometry.pose_matrix(
            0.1 * np.random.default_rng(4).normal(size=(2, 2, 6))
        )
    )
    weights = weights_of(layer, inputs)
    found, total, values, real = gradients(layer, inputs, weights)
    flat = [one for one in keras.tree.flatten(found) if one is not None]
    rng = np.random.default_rng(0)
    small, compared = 1e-6, 0
    for number, slopes in enumerate(flat):
        values_of = [array(value).copy() for value in values]
        for _ in range(5):
            place = tuple(rng.integers(0, n) for n in slopes.shape)
            ends = []
            for sign in (1, -1):
                moved = [value.copy() for value in values_of]
                moved[number][place] += sign * small
                ends.append(total(*map(ops.convert_to_tensor, moved)))
            difference = (ends[0] - ends[1]) / (2 * small)
            # The gradient is undefined where a point changes its pixel.
            if abs(difference) < 1e4:
                np.testing.assert_allclose(
                    slopes[place], difference, rtol=1e-4, atol=1e-4
                )
                compared += abs(difference) > 1e-6
    assert compared > 5


@pytest.mark.every_backend
def test_gradients_are_finite_where_pixels_are_bad():
    inputs = seen(times=2)
    camera = inputs["cameras"][0]
    camera["points"][0, 0, 0, 0] = np.nan
    camera["points"][0, 1, 1, 1] = 0.0
    camera["points"][0, 1, 1, 2] = [0, 2, 0]
    camera["points"][0, 1, 1, 3] = [0, -2, 0]
    camera["features"][1, 0, 0, 0] = np.inf
    camera["variance"][1, 0, 0, 1] = np.nan
    camera["variance"][1, 0, 0, 2] = 0.0
    camera["pose"][1, 0] = np.nan
    inputs["motion"][1, 1] = np.nan
    layer = layer_of()
    weights = weights_of(layer, inputs)
    found = gradients(layer, inputs, weights)[0]
    for one in keras.tree.flatten(found):
        assert one is None or np.isfinite(one).all()
    depth = np.full((2, 2, 5, 7), 2.0, "float32")
    depth[0, 0, 0, :4] = 0.0, np.nan, np.inf, -1.0
    inverse = np.stack([rooms.right_angle(5, 7)] * 2)
    inverse = np.repeat(inverse[:, None], 2, axis=1)
    inverse[1, 1] = np.nan
    del camera["points"]
    camera |= {"depth": depth, "inverse_intrinsics": inverse}
    found = gradients(layer, inputs, weights_of(layer, inputs))[0]
    for one in keras.tree.flatten(found):
        assert one is None or np.isfinite(one).all()


@pytest.mark.parametrize("value", [0.0, 1e-16, 1e20, 3e38, "x 1e-15", "z"])
@pytest.mark.parametrize("covariance", [0.0, 1.0, 1e30, 3e38])
def test_gradients_are_finite_wherever_points_are(value, covariance):
    points = np.full((1, 2, 1, 2, 3), 1.0, "float32")
    points[:, 1] = {"x 1e-15": [1e-15, 1, 0], "z": [0, 1, 0]}.get(value, value)
    spread = np.broadcast_to(np.eye(6) * covariance, (1, 2, 6, 6))
    inputs = {
        "cameras": {
            "points": points,
            "features": np.ones_like(points),
            "pose": still(1, 2),
            "pose_covariance": spread.astype("float32"),
        },
        "motion": still(1, 2),
    }
    layer = layer_of()
    found, *_ = gradients(layer, inputs, [np.ones((), "float32")] * 2)
    assert all(np.isfinite(g).all() for g in keras.tree.flatten(found))
    inputs["cameras"]["features"] = np.full_like(points, 1e38)
    assert all(np.isfinite(array(part)).all() for part in layer(inputs))


def broken(change):
    inputs = seen()
    change(inputs, inputs["cameras"][0])
    return inputs


def cut(name, *axes):
    def change(inputs, camera):
        where = inputs if name in inputs else camera
        where[name] = where[name][axes]

    return change


def emptied(name, axis):
    def change(inputs, camera):
        where = inputs if name in inputs else camera
        where[name] = np.take(where[name], [], axis)

    return change


WRONG = {
    "no time": (emptied("motion", 1), "`motion` must have no axis"),
    "no features' rows": (emptied("features", 0), r"\['features'\]` must"),
    "no rows": (emptied("points", 2), r"\['(points|features)'\]` must"),
    "bfloat16": (
        lambda i, c: i.update(motion=ops.cast(i["motion"], "bfloat16")),
        "`motion` must have a more precise",
    ),
    "no dict": (lambda i, c: i.clear(), "must be a dict with `cameras`"),
    "no motion": (lambda i, c: i.pop("motion"), "`cameras` and `motion`"),
    "motion of 2": (cut("motion", ..., slice(2), slice(None)), "`motion` must"),
    "motion flat": (cut("motion", slice(None), 0), "`motion` must"),
    "no camera": (lambda i, c: i["cameras"].clear(), "at least one camera"),
    "an array": (
        lambda i, c: i["cameras"].append(np.ones(3)),
        r"`cameras\[1\]` must be a dict",
    ),
    "no features": (lambda i, c: c.pop("features"), "must have `features`"),
    "no points": (lambda i, c: c.pop("points"), "either `points` or `depth`"),
    "another name": (
        lambda i, c: c.update(image=c["mask"]),
        r"`cameras\[0\]` must have no keys",
    ),
    "another in all": (
        lambda i, c: i.update(image=i["motion"]),
        "Inputs must have no keys",
    ),
    "depth too": (
        lambda i, c: c.update(depth=c["points"][..., 0]),
        "either `points` or `depth`",
    ),
    "no intrinsics": (
        lambda i, c: c.update(depth=c.pop("points")[..., 0]),
        "must have `inverse_intrinsics`",
    ),
    "features of 2": (
        cut("features", ..., slice(2)),
        r"\['features'\]` must be an array \(B, T, h, w, F\)",
    ),
    "fewer rows": (
        cut("points", slice(None), slice(None), slice(4)),
        r"\['features'\]` must",
    ),
    "fewer steps": (
        cut("features", slice(None), slice(2)),
        r"\['features'\]` must",
    ),
    "fewer in batch": (cut("features", slice(1)), r"\['features'\]` must"),
    "flat mask": (cut("mask", ..., 0), r"\['mask'\]` must"),
    "variance of F": (cut("variance", ..., slice(3)), r"\['variance'\]` must"),
    "pose of 2": (cut("pose", ..., slice(2), slice(None)), r"\['pose'\]` must"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_refused(name):
    change, words = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){words}.*Received"):
        layer_of()(broken(change))


def test_wrong_states_and_masks_are_refused():
    inputs = seen()
    state = layer_of().get_initial_state(2)
    part = state.mean
    for wrong in (
        state[:1],
        (part[:1],) * 2,
        (part[..., :5],) * 2,
        (part, None),
    ):
        with pytest.raises(ValueError, match="`initial_state.* must.*Received"):
            layer_of()(inputs, initial_state=wrong)
    for mask in (np.ones((2, 2), bool), np.ones(2, bool)):
        with pytest.raises(ValueError, match="`mask` must be.*Received"):
            layer_of()(inputs, mask=mask)


OUT_OF_RANGE = [
    ("height", [0, -1, 2.5, True, None]),
    ("width", [0, 7, 2.0, None]),
    ("feature_channels", [-1, 1.0, None, True]),
    ("depth_limits", [(1, 1), (0, 1), (-1, 1), (1,), 3, None, (1, np.inf)]),
    ("variance_limits", [(1, 1), (0, 1), (2, 1), (1, 2, 3), "ab", None]),
    ("variance_limits", [(1, 1.5), (100, 1e4), (1e-8, 1e4), (1e-3, 1e20)]),
    ("depth_prior", [np.nan, None, "1", 1e30, -1.0]),
    ("feature_prior", [np.inf, None, True, -1e300]),
    ("smooth_kernel_size", [0, 2, -3, 4.0, "3"]),
    ("depth_buffer", [1, None]),
    ("convention", ["cv2", None, 1]),
    ("depth_scale", [0, -1.0, "mm", np.nan, True]),
    ("return_sequences", [1, None]),
    ("return_state", [1, None]),
    ("stateful", [0, "no"]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OUT_OF_RANGE for value in values],
)
def test_arguments_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*Received: .*{name}="):
        layer_of(**{name: value})


# Checks of arguments.

UNFIT_BOOL = np.ones((2, 3), bool)
UNFIT = (
    "text",
    [["a"]],
    np.array([["a"]]),
    np.ones(3, complex),
    [[1.0], [1.0, 2.0]],
    np.ones(3),
    1.0,
    object(),
    keras.KerasTensor((2,)),
)


def all_fields():
    inputs = seen(times=2)
    spread = np.ones((2, 2, 6, 6), "float32")
    inputs["motion_covariance"] = spread
    inputs["cameras"][0]["pose_covariance"] = spread
    inverse = geometry.inverse_intrinsics((4, 5), (3, 2))[None].repeat(2, 0)
    other = {name: inputs["cameras"][0][name] for name in ("features", "mask")}
    other |= {"depth": np.ones((2, 2, 5, 7)), "inverse_intrinsics": inverse}
    return {**inputs, "cameras": [inputs["cameras"][0], other]}


def fields():
    inputs = all_fields()
    yield from ((None, name) for name in inputs_module.MOTION)
    for number, camera in enumerate(inputs["cameras"]):
        yield from ((number, name) for name in camera)


@pytest.mark.parametrize(("camera", "name"), list(fields()))
def test_errors_name_the_wrong_field(camera, name):
    path, unfit = f"`{name}`", list(UNFIT)
    if camera is not None:
        path = rf"`cameras\[{camera}\]\['{name}'\]`"
    if name != "mask":
        unfit += [UNFIT_BOOL]
    for wrong in unfit:
        inputs = all_fields()
        where = inputs if camera is None else inputs["cameras"][camera]
        where[name] = wrong
        with pytest.raises(ValueError, match=f"{path}.*Received"):
            layer_of()(inputs)


def test_errors_name_wrong_states_and_masks():
    inputs, layer = seen(), layer_of()
    cell, state = keras_memory.ESMCell(**SIZES), layer.get_initial_state(2)
    motion = inputs["motion"][:, 0]
    for wrong in (*UNFIT, UNFIT_BOOL):
        pair = (state.mean, wrong)
        for call in (
            lambda w=wrong: cell(at(inputs, 0), w),
            lambda p=pair: cell(at(inputs, 0), p),
            lambda w=wrong: cell.move(w, motion),
            lambda p=pair: cell.smooth(p),
            lambda p=pair: layer(inputs, initial_state=p),
        ):
            with pytest.raises(ValueError, match="state.* must be.*Received"):
                call()
        if wrong is not UNFIT_BOOL:
            with pytest.raises(ValueError, match="`mask` must be.*Received"):
                layer(inputs, mask=wrong)
            with pytest.raises(ValueError, match="`motion` must be.*Received"):
                cell.move(state, wrong)
    with pytest.raises(ValueError, match="`state` must be.*Received: None"):
        cell(at(inputs, 0), None)
    with pytest.raises(ValueError, match="must have `motion`"):
        cell.move(state, None)
    for wrong in (None, "2", -1, 2.5):
        with pytest.raises(ValueError, match="`batch_size` must be.*Received"):
            layer.get_initial_state(wrong)


def test_lists_and_integers_are_accepted():
    inputs = seen(batch=1, times=1, height=2, width=3)
    for name in ("points", "features"):
        camera = inputs["cameras"][0]
        camera[name] = camera[name].round().astype("int64")
    inputs["cameras"][0]["mask"] = np.ones((1, 1, 2, 3), "uint8") * 255
    expected = layer_of()(
        keras.tree.map_structure(lambda x: x.astype("float32"), inputs)
    )
    lists = {
        "cameras": [
            {name: x.tolist() for name, x in inputs["cameras"][0].items()}
        ],
        "motion": inputs["motion"].tolist(),
    }
    for given in (inputs, lists):
        close(layer_of()(given).mean, expected.mean)


# In models.


def entry_of(inputs, batch=None, times=None):
    def one(x):
        shape = (batch, times, *x.shape[2:])
        return keras.Input(batch_shape=shape, dtype=x.dtype.name)

    return keras.tree.map_structure(one, inputs)


@pytest.mark.parametrize("jit_compile", [False, slow_unless(False, True)])
def test_a_cnn_is_trained_through_the_map(jit_compile):
    if harness.BACKEND == "torch" and jit_compile:
        pytest.skip("PyTorch compiles no loops")
    inputs = seen(batch=4, times=2, height=8, width=6)
    entry = entry_of(inputs, times=2)
    camera = entry["cameras"][0]
    camera = {
        **camera,
        "features": keras.layers.TimeDistributed(
            keras.layers.Conv2D(2, 3, padding="same")
        )(camera["features"]),
    }
    seen_map = layer_of(feature_channels=2, return_sequences=False)(
        {**entry, "cameras": [{**camera, "variance": None}]}
    )
    x = keras.layers.Flatten()(seen_map.mean)
    model = keras.Model(keras.tree.flatten(entry), keras.layers.Dense(2)(x))
    model.compile("sgd", "mse", jit_compile=jit_compile)
    before = [array(w) for w in model.trainable_weights]
    model.fit(keras.tree.flatten(inputs), np.ones((4, 2)), epochs=2, verbose=0)
    after = [array(w) for w in model.trainable_weights]
    for one, other in zip(before, after):
        assert np.isfinite(other).all() and (one != other).any()


def test_batch_and_time_may_be_unknown():
    inputs = seen()
    entry = entry_of(inputs)
    model = keras.Model(
        keras.tree.flatten(entry), layer_of(return_state=True)(entry)
    )
    assert model.outputs[0].shape == (None, None, 8, 12, 6)
    for batch, times in itertools.product((1, 2), (1, 2, 3)):
        some = keras.tree.map_structure(
            lambda x, b=batch, t=times: x[:b, :t], inputs
        )
        found, _ = model.predict(keras.tree.flatten(some), verbose=0)
        close(found.mean, layer_of()(some).mean)


def test_configs_and_files_restore_the_layer(tmp_path):
    options = {
        "height": 10,
        "width": 14,
        "feature_channels": 2,
        "depth_limits": (0.1, 5.0),
        "variance_limits": (0.01, 100.0),
        "depth_prior": 1.0,
        "feature_prior": 0.1,
        "smooth_kernel_size": None,
        "depth_buffer": False,
        "convention": "ros",
        "depth_scale": 0.001,
        "return_sequences": True,
        "return_state": True,
        "stateful": True,
    }
    layer = keras_memory.ESMLayer(**options)
    config = json.loads(json.dumps(layer.get_config()))
    copy = keras_memory.ESMLayer.from_config(config)
    for name, value in options.items():
        given = getattr(copy, name)
        assert (tuple(given) if isinstance(given, list) else given) == value
    cell = keras_memory.ESMCell(10, 14)
    config = json.loads(json.dumps(cell.get_config()))
    assert keras_memory.ESMCell.from_config(config).width == 14
    inputs = seen()
    entry = entry_of(inputs)
    model = keras.Model(keras.tree.flatten(entry), layer_of()(entry))
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    given = keras.tree.flatten(inputs)
    close(copy(given)[0], model(given)[0])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_computes_in_float32(policy):
    inputs = seen()
    found = layer_of(dtype=policy)(inputs)
    assert {ops.dtype(part) for part in found} == {"float32"}
    close(found.mean, layer_of()(inputs).mean)


def test_one_pixel_and_one_step_give_finite_maps():
    inputs = seen(batch=1, times=1, height=1, width=1)
    inputs["cameras"][0]["mask"][:] = True
    found = arrays(keras_memory.ESMLayer(1, 2, smooth_kernel_size=1)(inputs))
    assert found.mean.shape == (1, 1, 2, 6)
    assert all(np.isfinite(part).all() for part in found)


# A room.

ROOM = rooms.Room()


@pytest.mark.parametrize(
    "origin, directions",
    [
        ((np.nan, 0, 0), [(0, 0, 1)]),
        ((9, 0, 0), [(0, 0, 1)]),
        ((0, 0, 0), [(0, 0, 1), (0, 0, 0)]),
        ((0, 0, 0), [(0, np.inf, 1)]),
    ],
)
def test_invalid_rays_are_refused(origin, directions):
    with pytest.raises(ValueError, match="`(origin|directions)`.* must be"):
        ROOM.cast(origin, directions)


def test_too_large_maps_and_images_are_refused_at_once():
    cell = keras_memory.ESMCell(height=10, width=20)
    with pytest.raises(ValueError, match="A state would take .*batch size="):
        cell.get_initial_state(10**9)
    render = functools.partial(ROOM.render, np.eye(3, 4))
    for make in (geometry.pixel_grid, render):
        with pytest.raises(ValueError, match="would take .*height=1000000 x"):
            make(10**6, 10**6)
    with pytest.raises(ValueError, match="would take .*size=2000001"):
        fusion.smoothing_kernel(2 * 10**6 + 1)
    points = np.ones((1, 2, 4))
    with pytest.raises(ValueError, match="`height` x `width` x B must be"):
        fusion.quantize(points, points, points[..., 0] > 0, 10**6, 10**6)


MAP = {"height": 90, "width": 180}


def turned(angles, positions=None):
    """Poses of an agent that looks at these angles, counted to the left."""
    vectors = np.zeros((len(angles), 6), "float32")
    vectors[:, 4] = angles
    if positions is not None:
        vectors[:, :3] = positions
    return array(geometry.pose_matrix(vectors))


def filmed(poses, size=96, depth_noise=0.0, motion_noise=0.0, seed=0):
    """Inputs (1, T, ...) of a camera that is carried through the room."""
    rng = np.random.default_rng(seed)
    frames = [ROOM.render(pose, size, size) for pose in poses]
    depth = np.stack([d for d, _ in frames])
    color = np.stack([c for _, c in frames])
    depth = depth + depth_noise * rng.normal(size=depth.shape)
    motion = array(geometry.motions(poses))
    error = motion_noise * rng.normal(size=(len(poses), 6))
    motion = geometry.compose(
        array(geometry.pose_matrix(error.astype("float32"))), motion
    )
    inverse = rooms.right_angle(size, size)[None]
    camera = {
        "depth": depth[None].astype("float32"),
        "features": color[None],
        "inverse_intrinsics": inverse,
    }
    inputs = {"cameras": camera, "motion": array(motion)[None]}
    if depth_noise:
        variance = np.full((1, *depth.shape, 6), 1e-3, "float32")
        # The variance is that of the distance, which exceeds the depth.
        ones = np.ones((1, size, size), "float32")
        points = geometry.pixels_to_camera(ones, inverse)
        longer = np.linalg.norm(array(points), axis=-1)
        variance[..., 2] = (depth_noise * longer) ** 2
        camera["variance"] = variance
    if motion_noise:
        covariance = motion_noise**2 * np.eye(6, dtype="float32")
        inputs["motion_covariance"] = np.tile(covariance, (1, len(poses), 1, 1))
    return inputs


def errors(pose, mean, variance):
    """Relative errors of depth, errors of colors, and the seen pixels."""
    seen_there = variance[..., 2] < 9000
    distance, color = ROOM.render_sphere(
        pose, mean[..., :2], MAP["height"], MAP["width"]
    )
    relative = (mean[..., 2] - distance) / distance
    return (
        relative[seen_there],
        (mean[..., 3:] - color)[seen_there],
        seen_there,
    )


def psnr(errors):
    return -10 * np.log10(np.mean(errors**2))


@functools.cache
def mapper(depth_buffer):
    layer = keras_memory.ESMLayer(
        **MAP,
        smooth_kernel_size=None,
        return_sequences=True,
        variance_limits=(1e-6, 1e4),
        depth_buffer=depth_buffer,
    )
    if harness.BACKEND == "jax":
        import jax

        return jax.jit(layer)
    if harness.BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(layer, jit_compile=True)
    return layer


def walked(poses, depth_buffer=True, **options):
    """The map at each step."""
    inputs = filmed(poses, **options)
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    return [part[0] for part in arrays(mapper(depth_buffer)(inputs))]


def test_the_map_equals_the_room():
    angles = np.linspace(0, 2 * np.pi, 25)
    positions = np.stack(
        [0.4 * np.sin(angles), 0.1 * np.sin(2 * angles), 0.3 * np.cos(angles)],
        axis=1,
    )
    poses = turned(angles, positions)
    mean, variance = walked(poses)
    relative, color, seen_there = errors(poses[-1], mean[-1], variance[-1])
    assert np.median(np.abs(relative)) < 0.01
    assert psnr(color) > 25
    reach = reachable(poses)
    assert 0.3 < reach.mean() < 0.6
    assert seen_there[reach].mean() > 0.95


def reachable(poses):
    """(H, W) bool: pixels of the last map that the camera has had in view."""
    sizes = MAP["height"], MAP["width"]
    grid = geometry.pixel_grid(*sizes)
    distance, _ = ROOM.render_sphere(poses[-1], grid, *sizes)
    pixels = np.concatenate([grid, distance[..., None]], axis=-1)
    points = geometry.from_sphere(geometry.from_pixels(pixels, *sizes))
    points = array(points).reshape(-1, 3) @ poses[-1, :, :3].T
    points = points + poses[-1, :, 3]
    seen_once = np.zeros(len(points), bool)
    for pose in poses:
        x, y, z = ((points - pose[:, 3]) @ pose[:, :3]).T
        in_view = (z > 0) & (np.abs(x) < 0.98 * z) & (np.abs(y) < 0.98 * z)
        way, _ = ROOM.cast(pose[:, 3], points - pose[:, 3])
        seen_once |= in_view & (way > 0.99)
    return seen_once.reshape(sizes)


def test_the_map_survives_a_walk_there_and_back():
    steps = np.arange(201)
    angles = 0.8 * np.sin(2 * np.pi * steps / 50)
    forth = 1 - np.abs(steps - 100) / 100
    positions = np.stack([0.5 * forth, 0.1 * forth, 0.6 * forth], axis=1)
    poses = turned(angles, positions)

    def medians(depth_noise):
        mean, variance = walked(poses, size=64, depth_noise=depth_noise)
        first, _, before = errors(poses[0], mean[0], variance[0])
        last, _, after = errors(poses[-1], mean[-1], variance[-1])
        assert (before & after).sum() > 0.99 * before.sum()
        return np.median(np.abs(first)), np.median(np.abs(last[before[after]]))

    first, last = medians(depth_noise=0.01)
    assert 1e-3 < first and last < 1.5 * first
    # Without noise the first map is exact up to rounding.
    first, last = medians(depth_noise=0.0)
    assert first < 1e-6 and last < 2e-4


def test_noise_degrades_the_map_smoothly():
    angles = np.linspace(0, np.pi / 2, 9)
    poses = turned(angles)
    medians = []
    for scale in (0.0, 0.01, 0.03, 0.1):
        mean, variance = walked(
            poses, depth_noise=scale, motion_noise=scale / 10
        )
        relative = errors(poses[-1], mean[-1], variance[-1])[0]
        medians.append(np.median(np.abs(relative)))
    assert (np.diff(medians) > 0).all() and medians[-1] < 0.1


@pytest.mark.parametrize(
    ("depth_noise", "motion_noise"),
    [(0.05, 0.0), (0.1, 0.0), (0.1, 0.005), (0.1, 0.01)],
)
def test_the_variance_predicts_the_error_of_the_map(depth_noise, motion_noise):
    """About 68 % of the errors are within one standard deviation. The direction
    contributes by how much depth changes within its standard deviation. Points
    are fused: with noise, the nearest of several points is too near."""
    poses = turned(np.linspace(0, np.pi / 2, 9))

    def distance(pixels, *shift):
        sizes = MAP["height"], MAP["width"]
        return ROOM.render_sphere(poses[-1], pixels + shift, *sizes)[0]

    within = []
    for seed in range(6 if motion_noise else 2):
        mean, variance = walked(
            poses,
            depth_buffer=False,
            size=64,
            depth_noise=depth_noise,
            motion_noise=motion_noise,
            seed=seed,
        )
        known = variance[-1, ..., 2] < 9000
        pixels, depth = mean[-1, known, :2], mean[-1, known, 2]
        column, row, total = variance[-1, known, :3].T
        for spread, shift in ((column, (0.5, 0)), (row, (0, 0.5))):
            back = -np.array(shift)
            slope = distance(pixels, *shift) - distance(pixels, *back)
            total = total + slope**2 * spread
        error = depth - distance(pixels, 0, 0)
        within.append(np.mean(np.abs(error) < np.sqrt(total)))
    assert abs(np.mean(within) - 0.68) < 0.1


def test_the_room_matches_distances_computed_by_hand():
    room = rooms.Room(size=(4, 2, 6), boxes=[((-0.5, -0.5, 1), (0.5, 0.5, 2))])
    ways = np.array([[0, 0, 1], [0, 0, -1], [1, 0, 0], [0, -2, 0], [1, 0, 1.0]])
    distance, color = room.cast([0, 0, 0], ways)
    close(distance, [1, 3, 2, 0.5, 2])
    assert ((0 <= color) & (color <= 1)).all()
    pose = np.eye(3, 4)
    depth, _ = room.render(pose, 5, 5)
    close(depth[2, 2], 1)
    around, _ = room.render_sphere(pose, [[4, 2], [2, 2], [0, 2]], 4, 8)
    close(around, [1, 2, 3])


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (1, 2)},
        {"size": (1, 0, 1)},
        {"size": None},
        {"size": "123"},
        {"size": [True] * 3},
        {"boxes": [((1, 1, 1), (0, 2, 2))]},
        {"boxes": None},
        {"boxes": "text"},
        {"boxes": [1, 2, 3]},
        {"boxes": [((1, 1), (2, 2))]},
        {"boxes": np.ones((1, 2, 3), complex)},
    ],
)
def test_impossible_rooms_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`.* must.*Received"):
        rooms.Room(**arguments)


def test_errors_name_wrong_views():
    sound = {
        "cast": {"origin": np.zeros(3), "directions": np.ones((2, 3))},
        "render": {
            "pose": np.eye(3, 4),
            "height": 2,
            "width": 4,
            "inverse_intrinsics": rooms.right_angle(2, 4),
        },
        "render_sphere": {
            "pose": np.eye(3, 4),
            "pixels": np.ones(2),
            "height": 2,
            "width": 4,
        },
    }
    for method, arguments in sound.items():
        call = getattr(ROOM, method)
        call(**arguments)
        for name in arguments:
            for wrong in (*UNFIT[:5], UNFIT_BOOL, np.ones(5), None):
                if name == "inverse_intrinsics" and wrong is None:
                    continue
                with pytest.raises(ValueError, match=f"`{name}`.*Received"):
                    call(**{**arguments, name: wrong})
    with pytest.raises(ValueError, match='signs of "opencv"'):
        ROOM.render(np.eye(3, 4), 2, 4, np.linalg.inv(K))
    for wrong in ((None, 2), (2, "a"), (0, 1)):
        with pytest.raises(ValueError, match="`(height|width)`.*Received"):
            rooms.right_angle(*wrong)
