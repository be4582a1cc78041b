"""Reads and writes folders of RGB-D frames; writes colored points to a file.

A folder of frames:

    camera.json         {"focal_lengths": [fx, fy], "principal_point": [cx, cy]}
                        in pixels; optionally "convention", the axes of the
                        camera's frame, such as "opencv"; "esm" by default
    poses.txt           a line for each frame: the 12 numbers, row by row, of
                        the (3, 4) pose from the camera's frame to the world's,
                        in meters
    depth/000000.png    16 bits, millimeters along the optical axis, 0 for
                        pixels without a measurement
    color/000000.png    8 bits, red, green, blue

The camera's axes are those of a convention of `geometry`: by default x left, y
up and z forward; with "opencv", as in most data sets and drivers, x right, y
down and z forward. The axes of the world are arbitrary.
"""

import contextlib
import json
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_memory.checks import check_array
from keras_memory.checks import check_one_of
from keras_memory.files import atomic_write
from keras_memory.files import atomic_write_all
from keras_memory.files import check_path
from keras_memory.hints import Array
from keras_memory.hints import PathLike
from keras_memory.spatial import cameras
from keras_memory.spatial import geometry

KINDS = "depth", "color"
MILLIMETRES = 1000.0  # per meter
AXES: dict[str, tuple[str | int, ...]] = {
    "depth": ("T", "h", "w"),
    "color": ("T", "h", "w", 3),
    "poses": ("T", 3, 4),
    "inverse_intrinsics": (3, 3),
}


class Frames(NamedTuple):
    """Frames of an RGB-D camera.

    Args:
        depth: (T, h, w) float32, meters along the optical axis; 0 for pixels
            without a measurement.
        color: (T, h, w, 3) float32 from 0 to 1.
        poses: (T, 3, 4) float64, from the camera's frame to the world's.
        inverse_intrinsics: (3, 3) float64, as returned by
            `geometry.inverse_intrinsics`.
    """

    depth: Any
    color: Any
    poses: Any
    inverse_intrinsics: Any


def read_frames(folder: PathLike, convention: str = "esm") -> Frames:
    """Reads a folder of frames.

    Args:
        folder: path.
        convention: str, of `geometry`: the axes of the camera for the returned
            poses and intrinsics, whatever the convention of the folder.

    Returns:
        `Frames`.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: images of different sizes or of a wrong kind, different
            numbers of poses and frames, invalid poses, or invalid focal
            lengths or principal point.
    """
    wanted = cameras.camera_axes(convention)[:, :3]
    folder = check_path("folder", folder)
    text = (folder / "camera.json").read_text(errors="replace")
    try:
        camera = json.loads(text)
        inverse_intrinsics = cameras.inverse_intrinsics(
            camera["focal_lengths"], camera["principal_point"], convention
        )
        given = cameras.camera_axes(camera.get("convention", "esm"))[:, :3]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "`camera.json` must have two positive `focal_lengths` and two "
            "numbers as `principal_point`, and may have `convention`, one of "
            f"{tuple(cameras.CONVENTIONS)}. Received: "
            f"{text[:200]!r} in {folder}"
        ) from error
    try:
        poses = np.loadtxt(folder / "poses.txt", "float64", ndmin=2)
    except ValueError as error:
        raise ValueError(
            "`poses.txt` must have lines of 12 numbers. Received: "
            f"{error} in {folder}"
        ) from error
    if poses.shape[1] != 12 or not len(poses):
        raise ValueError(
            "`poses.txt` must have lines of 12 numbers. Received: shape "
            f"{poses.shape} in {folder}"
        )
    poses = poses.reshape(-1, 3, 4)
    wrong = np.flatnonzero(~_are_poses(poses))
    if len(wrong):
        raise ValueError(
            "Each pose must be a rotation beside a translation. Received: line "
            f"{wrong[0] + 1} of {folder / 'poses.txt'}"
        )
    names = [f"{number:06d}.png" for number in range(len(poses))]
    depth = _read_images(folder / "depth", names, ("I;16", "I"))
    color = _read_images(folder / "color", names, ("RGB",))
    if depth.shape != color.shape[:3]:
        raise ValueError(
            "Depth and color images must have the same size. Received: "
            f"{depth.shape[1:]} and {color.shape[1:3]} in {folder}"
        )
    return Frames(
        depth.astype("float32") / np.float32(MILLIMETRES),
        color.astype("float32") / np.float32(255),
        poses
        @ np.block([[given.T @ wanted, np.zeros((3, 1))], [np.eye(4)[3:]]]),
        inverse_intrinsics,
    )


def _are_poses(matrices):
    return ops.convert_to_numpy(geometry.is_pose(matrices))


def _read_images(folder, names, modes):
    from PIL import Image

    images = []
    for name in names:
        with Image.open(folder / name) as image:
            if image.mode not in modes:
                raise ValueError(
                    f"Each image must have the mode {modes[0]!r}. Received: "
                    f"{image.mode!r}, {folder / name}"
                )
            images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                "All images must have the same size. Received: "
                f"{images[-1].shape} and {images[0].shape}, {folder / name}"
            )
    more = folder / f"{len(names):06d}.png"
    if more.exists():
        raise ValueError(
            "There must be a pose for each frame. Received: "
            f"{len(names)} poses, and {more}"
        )
    return np.stack(images)


def write_frames(
    folder: PathLike, frames: Frames, convention: str = "esm"
) -> None:
    """Writes a folder of frames for `read_frames`.

    Args:
        folder: path; created if absent.
        frames: `Frames`, with depth up to 65.535 meters.
        convention: str, of `geometry`: the axes of the camera for the given
            poses and intrinsics.

    Raises:
        ValueError: wrong shapes, depth that 16 bits of millimeters cannot hold,
            integer depth, colors outside of [0, 1], invalid poses, intrinsics
            of no pinhole camera, or a folder that holds more frames. Nothing
            is written then.
        OSError: for example, a full disk. The folder is unchanged.
    """
    from PIL import Image

    folder = check_path("folder", folder)
    check_one_of("convention", convention, cameras.CONVENTIONS)
    if not isinstance(frames, tuple) or len(frames) != len(Frames._fields):
        raise ValueError(f"`frames` must be a `Frames`. Received: {frames!r}")
    frames, sizes = Frames(*frames), {}
    depth, color, poses, inverse = (
        _array(f"frames.{name}", getattr(frames, name), axes, sizes)
        for name, axes in AXES.items()
    )
    cameras.check_depth("frames.depth", frames.depth)
    if not depth.size:
        raise ValueError(
            "`frames.depth` must have no axis of size 0. Received: "
            f"shape {depth.shape}"
        )
    millimetres = np.round(depth * MILLIMETRES)
    if not ((0 <= millimetres) & (millimetres < 1 << 16)).all():
        raise ValueError(
            "`frames.depth` must be from 0 to 65.535 meters. Received: from "
            f"{np.min(depth)} to {np.max(depth)}"
        )
    are_poses = _are_poses(poses)
    if not are_poses.all():
        raise ValueError(
            "Each pose must be a rotation beside a translation. Received: "
            f"{np.sum(~are_poses)} invalid poses"
        )
    focal, middle = _intrinsics(
        "frames.inverse_intrinsics", inverse, convention
    )
    color = _eight_bits("frames.color", color)
    for more in (folder / kind / f"{len(depth):06d}.png" for kind in KINDS):
        if more.exists():
            raise ValueError(
                "`folder` must hold no more frames than are written. Received: "
                f"{len(depth)} frames, and {more}"
            )
    camera = {"focal_lengths": focal, "principal_point": middle}
    if convention != "esm":
        camera["convention"] = convention
    with atomic_write_all(folder) as aside:
        for name in KINDS:
            (aside / name).mkdir()
        (aside / "camera.json").write_text(json.dumps(camera) + "\n")
        for number, (depth_image, color_image) in enumerate(
            zip(millimetres, color)
        ):
            name = f"{number:06d}.png"
            Image.fromarray(depth_image.astype("uint16")).save(
                aside / "depth" / name
            )
            Image.fromarray(color_image).save(aside / "color" / name)
        np.savetxt(aside / "poses.txt", poses.reshape(-1, 12))


def _array(name, value, axes, sizes):
    return check_array(
        name, value, axes, sizes, dtype="float64", result="numpy"
    )


def _intrinsics(name, inverse, convention):
    """Focal lengths and principal point, from inverse intrinsics."""
    cameras.check_camera(name, inverse, convention)
    focal = [1 / abs(x) if x else 0.0 for x in np.diag(inverse)[:2].tolist()]
    middle = np.abs(focal) * inverse[:2, 2]
    middle = (middle if convention == "esm" else -middle).tolist()
    with contextlib.suppress(ValueError):
        pinhole = cameras.inverse_intrinsics(focal, middle, convention)
        if np.allclose(pinhole, inverse, 1e-4, 1e-6):
            return focal, middle
    raise ValueError(
        f"`{name}` must be as returned by `geometry.inverse_intrinsics`. "
        f"Received: {inverse.tolist()}"
    )


def _eight_bits(name, colors):
    """Colors from 0 to 1 as uint8 from 0 to 255."""
    if not (np.abs(colors - 0.5) <= 0.501).all():  # allows for rounding
        raise ValueError(
            f"`{name}` must be from 0 to 1. Received: from {np.min(colors)} "
            f"to {np.max(colors)}"
        )
    return np.round(np.clip(colors, 0, 1) * 255).astype("uint8")


def write_points(path: PathLike, points: Array, colors: Array) -> None:
    """Writes colored points to a PLY file, which mesh viewers open.

    Args:
        path: path of the file.
        points: (n, 3) meters.
        colors: (n, 3) from 0 to 1.

    Raises:
        ValueError: wrong shapes, points that are not finite, or colors outside
            of [0, 1].
        OSError: for example, a full disk. An existing file is unchanged.
    """
    path, sizes = check_path("path", path), {}
    points = _array("points", points, ("n", 3), sizes).astype("<f4")
    colors = _array("colors", colors, ("n", 3), sizes)
    if not np.isfinite(points).all():
        raise ValueError("`points` must be finite. Received: NaN or infinity")
    colors = _eight_bits("colors", colors)
    kinds = [(axis, "<f4") for axis in "xyz"]
    kinds += [(color, "u1") for color in ("red", "green", "blue")]
    vertices = np.empty(len(points), kinds)
    for i, (name, _) in enumerate(kinds):
        vertices[name] = points[:, i] if i < 3 else colors[:, i - 3]
    names = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0"]
    header += [f"element vertex {len(points)}"]
    header += [f"property {names[kind]} {name}" for name, kind in kinds]
    text = "\n".join([*header, "end_header"]) + "\n"
    with atomic_write(path) as aside:
        aside.write_bytes(text.encode("ascii") + vertices.tobytes())
