"""A textured room with boxes: exact depth and color from any pose.

Ray-cast in NumPy, for demonstrations and tests of spatial memory. Frames are
those of `geometry`: x left, y up, z forward, in meters.
"""

import numpy as np

from keras_memory.checks import check_array
from keras_memory.checks import check_bytes
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.spatial import cameras

COLORS = np.array(  # one for each side: -x, +x, -y, +y, -z, +z
    [
        [0.75, 0.35, 0.30],
        [0.30, 0.55, 0.75],
        [0.55, 0.45, 0.35],
        [0.85, 0.85, 0.80],
        [0.45, 0.65, 0.40],
        [0.80, 0.65, 0.35],
    ]
)


class Room:
    """A room with boxes in it.

    Args:
        size: (x, y, z) meters, size of the room; its center is the origin.
        boxes: (n, 2, 3) lower and upper corners of boxes, in meters.

    Raises:
        ValueError: wrong shapes, a size that is not positive, or corners in
            the wrong order.

    Example:

    >>> room = Room()
    >>> depth, color = room.render(np.eye(3, 4), height=4, width=6)
    >>> depth.shape, color.shape
    ((4, 6), (4, 6, 3))
    """

    def __init__(
        self,
        size: Array = (6.0, 3.0, 5.0),
        boxes: Array = (
            ((-2.6, -1.5, 1.0), (-1.6, -0.4, 2.0)),
            ((1.0, -1.5, 1.2), (1.8, 0.4, 1.9)),
            ((-1.2, -1.5, -2.3), (0.4, -0.7, -1.5)),
            ((2.1, -1.5, -1.2), (2.9, 0.9, -0.4)),
        ),
    ):
        half = _array("size", size, (3,)) / 2
        if isinstance(boxes, (list, tuple)) and not boxes:
            boxes = np.zeros((0, 2, 3))
        boxes = _array("boxes", boxes, ("n", 2, 3))
        if not (half > 0).all():
            raise ValueError(
                "`size` must be three positive numbers, in meters. "
                f"Received: size={size!r}"
            )
        if not (boxes[:, 0] < boxes[:, 1]).all():
            raise ValueError(
                "Each of `boxes` must be a lower and an upper corner. "
                f"Received: boxes={boxes.tolist()}"
            )
        self.room: np.ndarray = np.stack([-half, half])
        self.boxes: np.ndarray = boxes

    def cast(
        self, origin: Array, directions: Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """Casts rays to the first surface that they hit.

        Args:
            origin: (3,) meters, inside the room and outside the boxes.
            directions: (..., 3), of any length but 0.

        Returns:
            (...) distances, in lengths of the directions, and (..., 3) colors
            from 0 to 1.

        Raises:
            ValueError: an origin outside the room or inside a box, or a
                direction of length 0 or with a number that is not finite.
        """
        origin = _array("origin", origin, (3,))
        directions = _array("directions", directions, (..., 3))
        lower, upper = self.room
        is_inside = (lower <= origin).all() and (origin <= upper).all()
        if not is_inside or any(
            (low < origin).all() and (origin < high).all()
            for low, high in self.boxes
        ):
            raise ValueError(
                "`origin`, the camera's position, must be inside the room and "
                f"outside its boxes. Received: {origin.tolist()}, a room from "
                f"{lower.tolist()} to {upper.tolist()}"
            )
        lengths = np.abs(directions).sum(axis=-1)
        if not ((0 < lengths) & np.isfinite(lengths)).all():
            raise ValueError(
                "`directions` must be finite and not of length 0. Received: "
                f"{directions[~((0 < lengths) & np.isfinite(lengths))][0]}"
            )
        _, leave, _, axis = _crossings(self.room, origin, directions)
        distance = leave
        for box in self.boxes:
            enter, leave, in_axis, _ = _crossings(box, origin, directions)
            hits = (0 < enter) & (enter < leave) & (enter < distance)
            distance = np.where(hits, enter, distance)
            axis = np.where(hits, in_axis, axis)
        points = origin + distance[..., None] * directions
        ahead = np.take_along_axis(directions, axis[..., None], axis=-1) > 0
        color = COLORS[2 * axis + ahead[..., 0]]
        # A pattern with patches of about half a meter.
        x, y, z = np.moveaxis(points, -1, 0)
        pattern = np.sin(5 * x + 2 * y) * np.sin(6 * y - z) * np.sin(5 * z + x)
        return distance, color * (0.75 + 0.25 * pattern[..., None])

    def render(
        self,
        pose: Array,
        height: int,
        width: int,
        inverse_intrinsics: Array | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Renders the view of a pinhole camera.

        Args:
            pose: (3, 4), from the camera's frame to the room's.
            height, width: ints, h and w in pixels.
            inverse_intrinsics: (3, 3), as returned by
                `geometry.inverse_intrinsics`; by default a view 90 degrees
                wide.

        Returns:
            (h, w) meters along the optical axis, and (h, w, 3) colors, both
            float32.
        """
        height, width = check_size("height", height), check_size("width", width)
        sizes = [("height", height), ("width", width), ("of a ray", 30)]
        check_bytes("The picture", sizes, "float64", on_host=True)
        pose = _array("pose", pose, (3, 4))
        inverse = right_angle(height, width)
        if inverse_intrinsics is not None:
            name = "inverse_intrinsics"
            inverse = _array(name, inverse_intrinsics, (3, 3))
            cameras.check_camera(name, inverse)
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
        directions = pixels @ (pose[:, :3] @ inverse).T
        depth, color = self.cast(pose[:, 3], directions)
        return depth.astype("float32"), color.astype("float32")

    def render_sphere(
        self, pose: Array, pixels: Array, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Renders pixels of the map around an agent.

        Args:
            pose: (3, 4), from the agent's frame to the room's.
            pixels: (..., 2) columns and rows, not necessarily integers.
            height, width: ints, H and W of the map.

        Returns:
            (...) distances in meters, and (..., 3) colors, both float32.
        """
        height, width = check_size("height", height), check_size("width", width)
        pose = _array("pose", pose, (3, 4))
        pixels = _array("pixels", pixels, (..., 2))
        azimuth = np.pi - pixels[..., 0] * (2 * np.pi / width)
        polar = pixels[..., 1] * (np.pi / height)
        level = np.sin(polar)
        directions = [
            level * np.sin(azimuth),
            np.cos(polar),
            level * np.cos(azimuth),
        ]
        distance, color = self.cast(
            pose[:, 3], np.stack(directions, axis=-1) @ pose[:, :3].T
        )
        return distance.astype("float32"), color.astype("float32")


def right_angle(height: int, width: int) -> np.ndarray:
    """(3, 3) inverse intrinsics of a camera that sees 90 degrees across."""
    height, width = check_size("height", height), check_size("width", width)
    middle = (width - 1) / 2, (height - 1) / 2
    return cameras.inverse_intrinsics((width / 2, width / 2), middle)


def _array(name, value, axes):
    return check_array(name, value, axes, dtype="float64", result="numpy")


def _crossings(box, origin, directions):
    """Where rays enter and leave a box, and the axes of the faces crossed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ways = (box - origin)[..., None, :] / directions.reshape(1, -1, 3)
    # 0 / 0: the ray lies in the plane of the face, which does not bound it.
    first = np.where(np.isnan(ways), -np.inf, ways).min(axis=0)
    last = np.where(np.isnan(ways), np.inf, ways).max(axis=0)
    shape = directions.shape[:-1]
    parts = first.max(-1), last.min(-1), first.argmax(-1), last.argmin(-1)
    return tuple(part.reshape(shape) for part in parts)
