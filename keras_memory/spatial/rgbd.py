"""Frames of depth and color in a folder, and colored points in a file.

A folder of frames:

    camera.json         {"focal_lengths": [fx, fy], "principal_point": [cx, cy]}
                        in pixels; and "convention": "opencv", say, the axes of
                        the camera's frame, if they are not those of "esm"
    poses.txt           a line for each frame: the 12 numbers, row by row, of
                        the (3, 4) pose from the camera's frame to the world's,
                        in metres
    depth/000000.png    16 bits, millimetres along the optical axis, 0 for
                        pixels without a measurement
    color/000000.png   8 bits, red, green, blue

The camera's axes are those of a convention of `geometry`: x left, y up and z
forward by default, and x right and y down where `camera.json` says "opencv", as
most data sets and drivers have them. Those of the world are of no matter.
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
MILLIMETRES = 1000.0  # in a metre
AXES: dict[str, tuple[str | int, ...]] = {
    "depth": ("T", "h", "w"),
    "color": ("T", "h", "w", 3),
    "poses": ("T", 3, 4),
    "inverse_intrinsics": (3, 3),
}


class Frames(NamedTuple):
    """Frames of a camera of depth and color.

    Args:
        depth: (T, h, w) float32, metres along the optical axis; 0 for pixels
            without a measurement.
        color: (T, h, w, 3) float32 from 0 to 1.
        poses: (T, 3, 4) float64, from the camera's frame to the world's.
        inverse_intrinsics: (3, 3) float64, as `geometry.inverse_intrinsics`
            gives it.
    """

    depth: Any
    color: Any
    poses: Any
    inverse_intrinsics: Any


def read_frames(folder: PathLike, convention: str = "esm") -> Frames:
    """Reads a folder of frames.

    Args:
        folder: path.
        convention: str, of `geometry`: the axes of the camera that the poses
            and intrinsics are to have, whatever they have in the folder.

    Returns:
        `Frames`.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: images of different sizes or another kind, another number
            of poses than of frames, poses that are none, or no two focal
            lengths and principal point.
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
            "`camera.json` must have `focal_lengths` and `principal_point`, "
            "two numbers each, the first positive, and may have `convention`, "
            f"one of {tuple(cameras.CONVENTIONS)}. Received: "
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
            "Images of depth and color must be of one size. Received: "
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
                    f"An image must be of the kind {modes[0]!r}. Received: "
                    f"{image.mode!r}, {folder / name}"
                )
            images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                "All images must be of one size. Received: "
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
    """Writes a folder of frames, as `read_frames` reads it.

    Args:
        folder: path; made where it is absent.
        frames: `Frames`, up to 65 metres deep.
        convention: str, of `geometry`: the axes of the camera that the poses
            and intrinsics have.

    Raises:
        ValueError: other shapes, depth that 16 bits of millimetres cannot hold,
            or of integers, colors beyond 0 and 1, poses that are none, another
            camera than a pinhole, or a folder that holds more frames. Nothing
            is written then.
        OSError: a full disk, say. What was in the folder is as it was.
    """
    from PIL import Image

    folder = check_path("folder", folder)
    check_one_of("convention", convention, cameras.CONVENTIONS)
    if not isinstance(frames, tuple) or len(frames) != len(Frames._fields):
        raise ValueError(f"`frames` must be `Frames`. Received: {frames!r}")
    frames, sizes = Frames(*frames), {}
    depth, color, poses, inverse = (
        _array(f"frames.{name}", getattr(frames, name), axes, sizes)
        for name, axes in AXES.items()
    )
    cameras.check_depth("frames.depth", frames.depth)
    if not depth.size:
        raise ValueError(
            "`frames.depth` must have at least one of each axis. Received: "
            f"shape {depth.shape}"
        )
    millimetres = np.round(depth * MILLIMETRES)
    if not ((0 <= millimetres) & (millimetres < 1 << 16)).all():
        raise ValueError(
            "`frames.depth` must be from 0 to 65.535 metres. Received: from "
            f"{np.min(depth)} to {np.max(depth)}"
        )
    are_poses = _are_poses(poses)
    if not are_poses.all():
        raise ValueError(
            "Each pose must be a rotation beside a translation. Received: "
            f"{np.sum(~are_poses)} others"
        )
    focal, middle = _intrinsics(
        "frames.inverse_intrinsics", inverse, convention
    )
    color = _eight_bits("frames.color", color)
    for more in (folder / kind / f"{len(depth):06d}.png" for kind in KINDS):
        if more.exists():
            raise ValueError(
                "A folder must hold no more frames than are written. Received: "
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
    """Focal lengths and principal point, of `geometry.inverse_intrinsics`."""
    cameras.check_camera(name, inverse, convention)
    focal = [1 / abs(x) if x else 0.0 for x in np.diag(inverse)[:2].tolist()]
    middle = np.abs(focal) * inverse[:2, 2]
    middle = (middle if convention == "esm" else -middle).tolist()
    with contextlib.suppress(ValueError):
        pinhole = cameras.inverse_intrinsics(focal, middle, convention)
        if np.allclose(pinhole, inverse, 1e-4, 1e-6):
            return focal, middle
    raise ValueError(
        f"`{name}` must be as `geometry.inverse_intrinsics` gives it. "
        f"Received: {inverse.tolist()}"
    )


def _eight_bits(name, colors):
    """From 0 to 1 as from 0 to 255."""
    if not (np.abs(colors - 0.5) <= 0.501).all():  # but for rounding
        raise ValueError(
            f"`{name}` must be from 0 to 1. Received: from {np.min(colors)} "
            f"to {np.max(colors)}"
        )
    return np.round(np.clip(colors, 0, 1) * 255).astype("uint8")


def write_points(path: PathLike, points: Array, colors: Array) -> None:
    """Writes colored points to a PLY file, which viewers of meshes open.

    Args:
        path: path of the file.
        points: (n, 3) metres.
        colors: (n, 3) from 0 to 1.

    Raises:
        ValueError: other shapes, points that are not finite, or colors beyond
            0 and 1.
        OSError: a full disk, say. A file that was there is as it was.
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
