"""Tests of folders of frames and of point files."""

import json

import numpy as np
import pytest
from test_full_disk import files_of_at_most

from keras_memory.spatial import geometry
from keras_memory.spatial import rgbd

PIL = pytest.importorskip("PIL.Image")


def frames():
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 9, size=(3, 5, 7)).round(3).astype("float32")
    depth[0, 0, 0] = 0.0
    color = rng.integers(0, 256, size=(3, 5, 7, 3)) / 255
    vectors = rng.normal(size=(3, 6)).astype("float32")
    return rgbd.Frames(
        depth,
        color.astype("float32"),
        np.asarray(geometry.pose_matrix(vectors)),
        geometry.inverse_intrinsics((6.0, 5.0), (3.2, 2.1)),
    )


def test_frames_are_read_as_written(tmp_path):
    written = frames()
    rgbd.write_frames(tmp_path / "there", written)
    found = rgbd.read_frames(tmp_path / "there")
    dtypes = ["float32", "float32", "float64", "float64"]
    assert [part.dtype for part in found] == dtypes
    for one, other in zip(found, written):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    camera = json.loads((tmp_path / "there" / "camera.json").read_text())
    assert np.allclose(camera["focal_lengths"], [6, 5])
    assert np.allclose(camera["principal_point"], [3.2, 2.1])


def test_poses_far_from_the_origin_are_exact(tmp_path):
    """For example, in UTM coordinates."""
    some = frames()
    poses = some.poses.astype("float64")
    poses[:, 0, 3] += 5e5 + 1e-3 * np.arange(3)
    rgbd.write_frames(tmp_path, some._replace(poses=poses))
    np.testing.assert_allclose(
        rgbd.read_frames(tmp_path).poses, poses, rtol=0, atol=1e-9
    )


def test_frames_are_converted_between_conventions(tmp_path):
    """Frames of each convention are read in each other convention."""
    some = frames()
    turned = some.poses.copy()
    turned[:, :, :2] *= -1  # x points right, y down
    flipped = some.poses.copy()
    flipped[:, :, [0, 2]] *= -1  # x points right, z back
    inverse = np.linalg.inv([[6, 0, 3.2], [0, 5, 2.1], [0, 0, 1]])
    cases = {
        "esm": some,
        "opencv": some._replace(poses=turned, inverse_intrinsics=inverse),
        "ros": some._replace(poses=turned, inverse_intrinsics=inverse),
        "opengl": some._replace(poses=flipped, inverse_intrinsics=inverse),
    }
    for written, given in cases.items():
        folder = tmp_path / written
        rgbd.write_frames(folder, given, convention=written)
        for wanted, expected in cases.items():
            found = rgbd.read_frames(folder, convention=wanted)
            for one, other in zip(found, expected):
                np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    camera = json.loads((tmp_path / "opencv" / "camera.json").read_text())
    assert camera["convention"] == "opencv"
    for call in (
        lambda: rgbd.read_frames(tmp_path / "esm", "cv2"),
        lambda: rgbd.write_frames(tmp_path / "esm", some, None),
    ):
        with pytest.raises(ValueError, match="`convention` must.*Received"):
            call()
    with pytest.raises(ValueError, match='signs of "esm"'):
        rgbd.write_frames(tmp_path / "a", some, "opencv")
    with pytest.raises(ValueError, match='signs of "opencv"'):
        rgbd.write_frames(tmp_path / "a", cases["opencv"])


def test_a_full_disk_keeps_the_old_frames(tmp_path):
    some, folder = frames(), tmp_path / "a" / "b"

    def content():
        paths = sorted(path for path in tmp_path.rglob("*"))
        return [(p, p.read_bytes() if p.is_file() else None) for p in paths]

    for before in ("nothing", "other frames"):
        if before == "other frames":
            rgbd.write_frames(folder, some._replace(depth=some.depth + 1))
            (folder / "notes").write_text("mine")
        old = content()
        for size in (30, 150, 400):  # in camera.json, images, poses.txt
            with pytest.raises(
                OSError, match=f"write {folder}: File too.*Nothing was changed"
            ):
                with files_of_at_most(size):
                    rgbd.write_frames(folder, some)
            assert content() == old
    rgbd.write_frames(folder, some)
    np.testing.assert_allclose(rgbd.read_frames(folder).depth, some.depth)
    assert not list(folder.glob(".*")) and (folder / "notes").exists()


def broken(folder):
    def camera(text):
        (folder / "camera.json").write_text(text)

    def poses(text):
        (folder / "poses.txt").write_text(text)

    def image(name, array):
        PIL.fromarray(array).save(folder / name)

    lines = (folder / "poses.txt").read_text().splitlines()
    yield "a file", lambda: (folder / "camera.json").unlink(), FileNotFoundError
    yield "json", lambda: camera("{"), "`camera.json` must have"
    yield "list", lambda: camera("[1, 2]"), "`camera.json` must have"
    yield "key", lambda: camera('{"focal_lengths": [5, 5]}'), "`principal_point"
    none = '{"focal_lengths": [5, 0], "principal_point": [1, 1]}'
    yield "focal", lambda: camera(none), "two positive `focal_lengths`"
    other = json.dumps(
        {
            **json.loads((folder / "camera.json").read_text()),
            "convention": "cv2",
        }
    )
    yield "convention", lambda: camera(other), "`convention`, one of"
    yield "numbers", lambda: poses("1 2 3\n"), "lines of 12 numbers"
    scaled = " ".join(str(2 * float(x)) for x in lines[1].split())
    yield "words", lambda: poses("a b c\n"), "lines of 12 numbers"
    yield "pose", lambda: poses(f"{lines[0]}\n{scaled}\n"), "rotation beside"
    yield "fewer", lambda: poses("\n".join(lines[:2])), "a pose for each frame"
    yield (
        "more",
        lambda: poses("\n".join([*lines, lines[0]])),
        FileNotFoundError,
    )
    small = np.zeros((4, 7), "uint16")
    yield "size", lambda: image("depth/000001.png", small), "have the same size"
    gray = np.zeros((5, 7), "uint8")
    yield "kind", lambda: image("color/000001.png", gray), "have the mode 'RGB'"
    eight = np.zeros((5, 7), "uint8")
    yield (
        "bits",
        lambda: image("depth/000001.png", eight),
        "have the mode 'I;16'",
    )


NAMES = ("a file", "json", "list", "key", "focal", "numbers", "pose")
NAMES += ("convention", "words", "fewer", "more", "size", "kind", "bits")


@pytest.mark.parametrize("name", NAMES)
def test_broken_folders_are_refused(name, tmp_path):
    rgbd.write_frames(tmp_path, frames())
    ((change, wanted),) = [c[1:] for c in broken(tmp_path) if c[0] == name]
    change()
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=f"{wanted}.*Received"):
            rgbd.read_frames(tmp_path)
    else:
        with pytest.raises(wanted):
            rgbd.read_frames(tmp_path)


def test_depth_and_color_of_different_sizes_are_refused(tmp_path):
    some = frames()
    rgbd.write_frames(tmp_path, some)
    less = some._replace(depth=some.depth[:, :4], color=some.color[:, :4])
    rgbd.write_frames(tmp_path / "less", less)
    (tmp_path / "color").rename(tmp_path / "before")
    (tmp_path / "less" / "color").rename(tmp_path / "color")
    with pytest.raises(ValueError, match=r"the same size.*\(5, 7\).*\(4, 7\)"):
        rgbd.read_frames(tmp_path)


def unlike(frames):
    for value in (-1.0, 70.0, np.nan):
        depth = frames.depth.copy()
        depth[1, 2, 3] = value
        yield {"depth": depth}, "0 to 65.535 meters"
    yield {"depth": frames.depth[1:]}, "`frames.color` must be an array.*T=2"
    for name in ("color", "poses"):
        told = f"`frames.{name}` must be an array.*T=3"
        yield {name: getattr(frames, name)[1:]}, told
    yield (
        {"depth": frames.depth[..., None]},
        r"depth` must be an array \(T, h, w",
    )
    for name in frames._fields:
        for wrong in (None, "text", [["a"]], np.ones(2), np.ones(3, complex)):
            yield {name: wrong}, f"`frames.{name}` must be an array"
        yield {name: np.ones((2, 2), bool)}, f"`frames.{name}` must be an array"
    whole = (1000 * frames.depth).astype("uint16")
    yield {"depth": whole}, "`frames.depth` must be in meters.*depth_scale"
    none = {name: getattr(frames, name)[:0] for name in frames._fields[:3]}
    yield none, "`frames.depth` must have no axis"
    yield {"color": frames.color * np.nan}, "color` must be from 0 to 1"
    yield {"color": frames.color * 255}, "color` must be from 0 to 1"
    inverse = frames.inverse_intrinsics
    skewed = inverse + np.eye(3, k=1, dtype="float32")
    for other in (
        -inverse,
        inverse * np.nan,
        inverse * 0,
        inverse[None],
        skewed,
    ):
        told = "inverse_intrinsics` must be"
        yield {"inverse_intrinsics": other}, told
    yield {"poses": frames.poses * 2}, "a rotation beside"


def test_wrong_frames_are_refused_and_not_written(tmp_path):
    some = frames()
    for change, told in unlike(some):
        with pytest.raises(ValueError, match=f"{told}.*Received"):
            rgbd.write_frames(tmp_path / "there", some._replace(**change))
    for wrong in (None, "text", some[:3], np.ones(4)):
        with pytest.raises(ValueError, match="`frames` must be.*Received"):
            rgbd.write_frames(tmp_path / "there", wrong)
    for call in (lambda: rgbd.write_frames(None, some), rgbd.read_frames):
        with pytest.raises((ValueError, TypeError), match="folder"):
            call()
    with pytest.raises(ValueError, match="`folder` must be.*Received"):
        rgbd.read_frames(3)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_more_frames_is_not_overwritten(tmp_path):
    some = frames()
    rgbd.write_frames(tmp_path, some)
    less = rgbd.Frames(
        *(part[:2] for part in some[:3]), some.inverse_intrinsics
    )
    with pytest.raises(ValueError, match="no more frames.*Received: 2 frames"):
        rgbd.write_frames(tmp_path, less)
    rgbd.write_frames(tmp_path, some)
    assert len(rgbd.read_frames(tmp_path).poses) == 3


def test_points_are_written_as_a_ply_file(tmp_path):
    points = np.array([[1.5, -2, 3], [0, 0, 1]])
    rgbd.write_points(tmp_path / "a.ply", points, [[0, 0.5, 1], [1, 0, 0.2]])
    header, _, data = (
        (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    )
    assert header.decode().split("\n") == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 2",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {c}" for c in ("red", "green", "blue")),
        "",
    ]
    assert len(data) == 2 * 15
    assert np.frombuffer(data[:12], "<f4").tolist() == [1.5, -2, 3]
    assert list(data[12:15]) == [0, 128, 255]
    assert list(data[27:30]) == [255, 0, 51]


@pytest.mark.parametrize(
    ("points", "colors"),
    [
        (np.ones((2, 3)), np.ones((3, 3))),
        (np.ones((2, 2)), np.ones((2, 3))),
        (np.ones((2, 3)), np.ones((2, 4))),
        (np.ones((2, 3)), np.ones((2, 1))),
        (np.ones((2, 3)), np.ones(2)),
        (np.ones((1, 3)), np.full((1, 3), 100, "uint8")),
        (np.ones(3), np.ones(3)),
        (np.full((1, 3), np.nan), np.ones((1, 3))),
        (np.ones((1, 3)), np.full((1, 3), np.nan)),
        ("text", np.ones((1, 3))),
        (None, np.ones((1, 3))),
        (np.ones((1, 3)), [["a", "b", "c"]]),
        (np.ones((1, 3), complex), np.ones((1, 3))),
        (np.ones((1, 3)), np.ones((1, 3), bool)),
        ([[1, 2, 3], [1]], np.ones((1, 3))),
    ],
)
def test_wrong_points_leave_no_file(points, colors, tmp_path):
    with pytest.raises(ValueError, match="must be.*Received"):
        rgbd.write_points(tmp_path / "a.ply", points, colors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_keeps_the_old_points(old, tmp_path):
    path = tmp_path / "a.ply"
    if old:
        path.write_bytes(old)
    before = list(tmp_path.iterdir())
    with pytest.raises(
        OSError, match=f"write {path}: File too large. Nothing was changed"
    ):
        with files_of_at_most(100):
            rgbd.write_points(path, np.ones((99, 3)), np.ones((99, 3)))
    assert list(tmp_path.iterdir()) == before
    assert not old or path.read_bytes() == old
    with pytest.raises(ValueError, match="`path` must be.*Received"):
        rgbd.write_points(None, np.ones((1, 3)), np.ones((1, 3)))
