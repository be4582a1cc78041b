"""Frames of depth and colour in a folder, and coloured points in a file.

A folder of frames:

    camera.json         {"focal_lengths": [fx, fy], "principal_point": [cx, cy]}
                        in pixels
    poses.txt           a line for each frame: the 12 numbers, row by row, of
                        the (3, 4) pose from the camera's frame to the world's,
                        in metres
    depth/000000.png    16 bits, millimetres along the optical axis, 0 for
                        pixels without a measurement
    colour/000000.png   8 bits, red, green, blue

Frames are those of `geometry`: x left, y up, z forward. Of a camera whose
frame has x right and y down, as usual in computer vision, turn the poses:
`pose[:, :2] *= -1`.
"""

import contextlib
import json
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_memory import geometry
from keras_memory.files import written_aside

KINDS = "depth", "colour"
MILLIMETRES = 1000.0  # in a metre


class Frames(NamedTuple):
    """Frames of a camera of depth and colour.

    Args:
        depth: (T, h, w) float32, metres along the optical axis; 0 for pixels
            without a measurement.
        colour: (T, h, w, 3) float32 from 0 to 1.
        poses: (T, 3, 4) float32, from the camera's frame to the world's.
        inverse_intrinsics: (3, 3) float32, as `geometry.inverse_intrinsics`
            gives it.
    """

    depth: Any
    colour: Any
    poses: Any
    inverse_intrinsics: Any


def read_frames(folder):
    """Reads a folder of frames.

    Args:
        folder: path.

    Returns:
        `Frames`.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: images of different sizes or another kind, another number
            of poses than of frames, poses that are none, or no two focal
            lengths and principal point.
    """
    folder = pathlib.Path(folder)
    text = (folder / "camera.json").read_text(errors="replace")
    try:
        camera = json.loads(text)
        inverse_intrinsics = geometry.inverse_intrinsics(
            camera["focal_lengths"], camera["principal_point"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "`camera.json` must have `focal_lengths` and `principal_point`, "
            "two numbers each, the first positive. Received: "
            f"{text[:200]!r} in {folder}"
        ) from error
    try:
        poses = np.loadtxt(folder / "poses.txt", "float32", ndmin=2)
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
    wrong = np.flatnonzero(~np.asarray(geometry.is_pose(poses)))
    if len(wrong):
        raise ValueError(
            "Each pose must be a rotation beside a translation. Received: line "
            f"{wrong[0] + 1} of {folder / 'poses.txt'}"
        )
    names = [f"{number:06d}.png" for number in range(len(poses))]
    depth = _read_images(folder / "depth", names, ("I;16", "I"))
    colour = _read_images(folder / "colour", names, ("RGB",))
    if depth.shape != colour.shape[:3]:
        raise ValueError(
            "Images of depth and colour must be of one size. Received: "
            f"{depth.shape[1:]} and {colour.shape[1:3]} in {folder}"
        )
    return Frames(
        depth.astype("float32") / np.float32(MILLIMETRES),
        colour.astype("float32") / np.float32(255),
        poses,
        inverse_intrinsics,
    )


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


def write_frames(folder, frames):
    """Writes a folder of frames, as `read_frames` reads it.

    Args:
        folder: path; made where it is absent.
        frames: `Frames`, up to 65 metres deep.

    Raises:
        ValueError: other shapes, depth that 16 bits of millimetres cannot hold,
            colours beyond 0 and 1, poses that are none, another camera than a
            pinhole, or a folder that holds more frames. Nothing is written
            then.
    """
    from PIL import Image

    depth, colour, poses = map(np.asarray, frames[:3])
    wanted = (*depth.shape, 3), (*depth.shape[:1], 3, 4)
    if (
        depth.ndim != 3
        or not depth.size
        or (colour.shape, poses.shape) != wanted
    ):
        raise ValueError(
            "Frames must be (T, h, w) of depth, (T, h, w, 3) of colour and "
            f"(T, 3, 4) of poses. Received: shapes {depth.shape}, "
            f"{colour.shape} and {poses.shape}"
        )
    millimetres = np.round(depth.astype("float64") * MILLIMETRES)
    if not ((0 <= millimetres) & (millimetres < 1 << 16)).all():
        raise ValueError(
            "`depth` must be from 0 to 65.535 metres. Received: from "
            f"{np.min(depth)} to {np.max(depth)}"
        )
    are_poses = np.asarray(geometry.is_pose(poses.astype("float32")))
    if not are_poses.all():
        raise ValueError(
            "Each pose must be a rotation beside a translation. Received: "
            f"{np.sum(~are_poses)} others"
        )
    focal, middle = _intrinsics(frames.inverse_intrinsics)
    colour = _eight_bits("colour", colour)
    folder = pathlib.Path(folder)
    for more in (folder / kind / f"{len(depth):06d}.png" for kind in KINDS):
        if more.exists():
            raise ValueError(
                "A folder must hold no more frames than are written. Received: "
                f"{len(depth)} frames, and {more}"
            )
    for name in KINDS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "camera.json").write_text(
        json.dumps({"focal_lengths": focal, "principal_point": middle}) + "\n"
    )
    for number, (one, other) in enumerate(zip(millimetres, colour)):
        name = f"{number:06d}.png"
        Image.fromarray(one.astype("uint16")).save(folder / "depth" / name)
        Image.fromarray(other).save(folder / "colour" / name)
    np.savetxt(folder / "poses.txt", poses.reshape(-1, 12))


def _intrinsics(inverse):
    """Focal lengths and principal point, of `geometry.inverse_intrinsics`."""
    inverse = np.asarray(inverse)
    if inverse.shape == (3, 3):
        focal = [-1 / float(x) if x else 0.0 for x in np.diag(inverse)[:2]]
        middle = [float(inverse[i, 2]) * focal[i] for i in range(2)]
        with contextlib.suppress(ValueError):
            pinhole = geometry.inverse_intrinsics(focal, middle)
            if np.allclose(pinhole, inverse, 1e-4, 1e-6):
                return focal, middle
    raise ValueError(
        "`inverse_intrinsics` must be as `geometry.inverse_intrinsics` gives "
        f"it. Received: {inverse.tolist()}"
    )


def _eight_bits(name, colours):
    """From 0 to 1 as from 0 to 255."""
    if not (np.abs(colours - 0.5) <= 0.501).all():  # but for rounding
        raise ValueError(
            f"`{name}` must be from 0 to 1. Received: from {np.min(colours)} "
            f"to {np.max(colours)}"
        )
    return np.round(np.clip(colours, 0, 1) * 255).astype("uint8")


def write_points(path, points, colours):
    """Writes coloured points to a PLY file, which viewers of meshes open.

    Args:
        path: path of the file.
        points: (n, 3) metres.
        colours: (n, 3) from 0 to 1.

    Raises:
        ValueError: other shapes, points that are not finite, or colours beyond
            0 and 1.
    """
    points, colours = np.asarray(points, "<f4"), np.asarray(colours)
    if points.shape != colours.shape or points.shape != (len(points), 3):
        raise ValueError(
            "`points` and `colours` must be (n, 3) both. Received: shapes "
            f"{points.shape} and {colours.shape}"
        )
    if not np.isfinite(points).all():
        raise ValueError("`points` must be finite. Received: NaN or infinity")
    colours = _eight_bits("colours", colours)
    kinds = [(axis, "<f4") for axis in "xyz"]
    kinds += [(colour, "u1") for colour in ("red", "green", "blue")]
    vertices = np.empty(len(points), kinds)
    for i, (name, _) in enumerate(kinds):
        vertices[name] = points[:, i] if i < 3 else colours[:, i - 3]
    names = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0"]
    header += [f"element vertex {len(points)}"]
    header += [f"property {names[kind]} {name}" for name, kind in kinds]
    text = "\n".join([*header, "end_header"]) + "\n"
    with written_aside(pathlib.Path(path)) as aside:
        aside.write_bytes(text.encode("ascii") + vertices.tobytes())
