"""Maps a room with an egospheric memory while a camera moves through it.

    python examples/mapping_a_room.py --out runs/room
    python examples/mapping_a_room.py --frames my_frames --out runs/mine
    tensorboard --logdir runs/room/logs

By default the room is rendered, with a little depth noise. `--frames` takes
your own folder, in the layout of `keras_memory.rgbd` (`--write` writes the
rendered frames in that layout). Prints the error of the map. Writes `room.gif`,
the camera's images beside the map of color, depth and uncertainty; `room.png`,
the last picture; the same to TensorBoard; and `room.ply`, the final map as
colored points.
"""

import argparse
import pathlib
import tempfile
import time

import keras
import numpy as np
from keras import ops

import keras_memory
from keras_memory import callbacks
from keras_memory import geometry
from keras_memory import rgbd
from keras_memory import rooms
from keras_memory import visualization

HEIGHT, WIDTH = 180, 360  # of the map, pixels
SIZE = 128  # of the camera's images, pixels
NOISE = 0.01  # meters, standard deviation of the rendered depth


def walk(steps):
    """Poses of a camera that turns once, on a small circle."""
    angles = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    vectors = np.zeros((steps, 6), "float32")
    vectors[:, 0] = 0.5 * np.sin(angles)
    vectors[:, 1] = 0.1 * np.sin(2 * angles)
    vectors[:, 2] = 0.5 * np.cos(angles) - 0.5
    vectors[:, 4] = angles
    return ops.convert_to_numpy(geometry.pose_matrix(vectors))


def drawn(room, steps, seed=1):
    """Renders `rgbd.Frames` of the walk."""
    poses = walk(steps)
    depth, color = zip(*(room.render(pose, SIZE, SIZE) for pose in poses))
    noise = np.random.default_rng(seed).normal(size=np.shape(depth))
    return rgbd.Frames(
        (depth + NOISE * noise).astype("float32"),
        np.stack(color),
        poses,
        rooms.right_angle(SIZE, SIZE),
    )


def mapped(frames):
    """Yields the map after each frame."""
    cell = keras_memory.ESMCell(
        HEIGHT,
        WIDTH,
        depth_limits=(1e-3, max(10.0, 1.1 * float(frames.depth.max()))),
    )
    step = cell
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(cell, jit_compile=True)
    state = cell.get_initial_state(batch_size=1)
    motions = geometry.motions(frames.poses)
    for depth, color, motion in zip(frames.depth, frames.color, motions):
        camera = {
            "depth": depth[None],
            "features": color[None],
            "inverse_intrinsics": frames.inverse_intrinsics[None],
        }
        shown, state = step({"cameras": camera, "motion": motion[None]}, state)
        yield tuple(ops.convert_to_numpy(part)[0] for part in (*shown, *state))


def picture(frames, number, shown, farthest):
    """Draws the camera's image beside the map."""
    figure = visualization.Figure((8.4, 7.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    seen = left.subplots(2, 1)
    seen[0].imshow(np.clip(frames.color[number], 0, 1))
    depth = np.where(frames.depth[number] > 0, frames.depth[number], np.nan)
    seen[1].imshow(depth, vmin=0.0, vmax=farthest)
    for ax, title in zip(seen, ("the camera sees", f"depth, frame {number}")):
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_axis_off()
    axes = right.subplots(3, 1)
    visualization.plot_sphere(*shown, axes, farthest, "the map, smoothed")
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, help="frames (default: 48, or all of your own)"
    )
    parser.add_argument("--frames", help="folder of your own frames")
    parser.add_argument("--write", help="folder to leave the drawn frames in")
    parser.add_argument("--out", help="folder for pictures, logs and points")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    if options.frames and options.write:
        parser.error("--write writes drawn frames, not those of --frames")
    with tempfile.TemporaryDirectory() as temporary:
        run(options, pathlib.Path(options.out or temporary))


def run(options, folder):
    room = None
    if options.frames:
        frames = rgbd.read_frames(options.frames)
        if not frames.depth.any():
            raise SystemExit(
                f"no depth in any of the frames of {options.frames}"
            )
        frames = rgbd.Frames(
            *(part[: options.steps] for part in frames[:3]),
            frames.inverse_intrinsics,
        )
    else:
        room = rooms.Room()
        frames = drawn(room, options.steps or 48)
        if options.write:
            rgbd.write_frames(options.write, frames)
    farthest = float(frames.depth.max())
    pictures, began = [], time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for number, (*shown, mean, variance) in enumerate(mapped(frames)):
        figure = picture(frames, number, shown, farthest)
        pictures.append(visualization.to_image(figure))
        seen = variance[..., 2] < 1.0
        is_last = number + 1 == len(frames.depth)
        if room is not None and (is_last or (number + 1) % 12 == 0):
            distance, _ = room.render_sphere(
                frames.poses[number], mean[..., :2], HEIGHT, WIDTH
            )
            error = np.abs(mean[..., 2] - distance)[seen] / distance[seen]
            print(
                f"frame {number + 1}: {seen.mean():.0%} of the sphere seen, "
                f"median error of depth {np.median(error):.2%}"
            )
    seconds = time.perf_counter() - began
    print(f"{len(pictures)} frames in {seconds:.1f} s, pictures included")

    sphere = geometry.from_pixels(mean[None, seen, :3], HEIGHT, WIDTH)
    points = geometry.transform(geometry.from_sphere(sphere), frames.poses[-1:])
    # A pixel without a point shows that of a neighbour.
    points, places = np.unique(
        ops.convert_to_numpy(points)[0], axis=0, return_index=True
    )
    rgbd.write_points(folder / "room.ply", points, mean[seen, 3:][places])
    (folder / "room.gif").write_bytes(visualization.to_gif(pictures, 150))
    (folder / "room.png").write_bytes(visualization.to_png(pictures[-1]))
    callbacks.write_images(folder / "logs", "map", pictures)
    if options.out:
        print(f"wrote room.gif, room.png, room.ply and logs to {folder}")


if __name__ == "__main__":
    main()
