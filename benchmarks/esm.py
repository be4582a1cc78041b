"""Compares Egospheric Spatial Memory with ivy_memory: a frame, its stages."""

import functools
import pathlib
import sys
import types

import numpy as np

from benchmarks import cases
from benchmarks import measure
from benchmarks import report

SIZE = 128  # of the camera's images
LARGE, SMALL = (180, 360), (90, 180)  # of maps
REFERENCE = "ivy_memory"
CHECKOUTS = "ivy", "deps", "memory", "vision", "mech"  # folders in `--ivy`
FRAME, TRAINING = "a frame", "a training step"
GOALS = {FRAME: 20, TRAINING: 60}  # milliseconds
VARIANTS = {  # the timed part, and whether XLA compiles it
    f"{FRAME}, XLA": (FRAME, True),
    "the camera's pixels, XLA": ("observe", True),
    "the map's pixels, XLA": ("move", True),
    "both, and fusion, XLA": ("step", True),
    "smoothing 25 x 25, XLA": ("smooth", True),
    f"{TRAINING}, XLA": (TRAINING, True),
    f"{FRAME}, no XLA": (FRAME, False),
    f"{TRAINING}, no XLA": (TRAINING, False),
    f"{FRAME}, XLA, {SMALL[0]} x {SMALL[1]}": ("small", True),
}
HEADER = "variant", "ms", "times as fast as a frame of the reference", "goal"
SECONDS = 120


def run(rounds, threads, ivy=None, json=None):
    """Measures, prints a table, and returns all numbers.

    Args:
        rounds: number of measured frames.
        threads: number of threads of each process.
        ivy: path of a folder with `CHECKOUTS`, if any.
        json: path of a file for all numbers, if any.
    """
    machine = report.machine()

    def write(results):
        report.write_json(json, {"machine": machine, "results": results})

    results = measure.compare(
        jobs(threads, ivy), rounds, seen=write, seconds=SECONDS
    )
    reference, rows = results[REFERENCE], []
    for variant, result in results.items():
        cells = [variant, "", "", ""]
        if "not_run" in result:
            cells[1] = f"not run: {result['not_run']}"
        else:
            cells[1] = report.short(result["milliseconds"])
            if "not_run" not in reference:
                quartiles = measure.ratio(result, reference)
                result["ratio_quartiles"] = quartiles
                cells[2] = report.with_spread(quartiles)
        kind = VARIANTS.get(variant, ("", False))
        if kind[1] and kind[0] in GOALS:
            cells[3] = f"{GOALS[kind[0]]} ms"
        rows.append(cells)
    write(results)
    print(report.table(HEADER, rows) + "\n")
    print(
        f"An image of {SIZE} x {SIZE} into a map of 180 x 360, but for the "
        "last, batch 1. Medians of "
        f"{report.counted(rounds, 'frame')} in turn, each variant in a process "
        f"of its own with {report.counted(threads, 'thread')}; ratios with the "
        f"middle half.\n{report.on(machine)}."
    )
    return results


def jobs(threads, ivy):
    """Dict from each variant to the arguments of a `measure.Worker`, or to a
    text that says why it cannot run."""
    found = {REFERENCE: "needs `--ivy` with a folder of checkouts"}
    if ivy:
        found[REFERENCE] = (
            functools.partial(prepare_reference, threads, ivy),
            reference,
        )
    for name, arguments in VARIANTS.items():
        found[name] = (
            functools.partial(cases.prepare, threads),
            functools.partial(ours, *arguments),
        )
    return found


def is_ivy(folder):
    return all((pathlib.Path(folder) / one).is_dir() for one in CHECKOUTS)


def frame():
    """Returns depth and colors of a room, (1, h, w) and (1, h, w, 3)."""
    from keras_memory.spatial import rooms

    return [
        part[None] for part in rooms.Room().render(np.eye(3, 4), SIZE, SIZE)
    ]


MOTION = np.array([[0.02, 0.0, 0.05, 0.0, 0.03, 0.0]], "float32")


def ours(kind, jit_compile):
    """Returns a function for a part of a step, with a filled map."""
    import tensorflow as tf

    import keras_memory
    from keras_memory.spatial import geometry
    from keras_memory.spatial import rooms

    depth, color = map(tf.constant, frame())
    inverse = tf.constant(rooms.right_angle(SIZE, SIZE)[None])
    camera = {"depth": depth, "features": color, "inverse_intrinsics": inverse}
    motion = tf.constant(geometry.pose_matrix(MOTION))
    cell = keras_memory.ESMCell(*(SMALL if kind == "small" else LARGE))

    def whole(camera, state):
        return cell({"cameras": camera, "motion": motion}, state)

    def training(camera, state):
        with tf.GradientTape() as tape:
            tape.watch(camera["features"])
            shown, _ = whole(camera, state)
            loss = tf.reduce_mean(shown.mean[..., 3:] ** 2)
        return tape.gradient(loss, camera["features"])

    parts = {
        FRAME: whole,
        "small": whole,
        TRAINING: training,
        "observe": lambda camera, state: cell.observe(**camera),
        "move": lambda camera, state: cell.move(state, motion),
        "step": lambda camera, state: cell.step(
            [camera], {"motion": motion}, state
        ),
        "smooth": lambda camera, state: cell.smooth(state),
    }
    state = cell.get_initial_state(1)
    for _ in range(3):
        _, state = whole(camera, state)
    part = tf.function(parts[kind], jit_compile=jit_compile, autograph=False)

    def step():
        return [one.numpy() for one in tf.nest.flatten(part(camera, state))]

    return step


def prepare_reference(threads, folder):
    import torch

    torch.set_num_threads(threads)
    # PyTorch's own scatter replaces the one that ivy imports.
    scatter = types.ModuleType("torch_scatter")

    def scattered(src, index, out, reduce):
        how = {"sum": "sum", "min": "amin", "max": "amax"}[reduce]
        return out.scatter_reduce_(0, index, src, how)

    scatter.scatter = scattered
    sys.modules["torch_scatter"] = scatter
    sys.path[:0] = [str(pathlib.Path(folder) / one) for one in CHECKOUTS]
    import ivy

    ivy.set_backend("torch")
    import ivy_memory.geometric.esm  # noqa: F401


def reference():
    """Returns a function for a frame with ivy_memory, with a filled map too."""
    import torch
    from ivy_memory.geometric.containers import ESMCamMeasurement
    from ivy_memory.geometric.containers import ESMObservation
    from ivy_memory.geometric.esm import ESM

    depth, color = frame()
    half = SIZE / 2
    rows, columns = np.mgrid[:SIZE, :SIZE]
    x = ((SIZE - 1) / 2 - columns) / half * depth
    y = ((SIZE - 1) / 2 - rows) / half * depth
    image = np.concatenate([np.stack([x, y, depth], axis=-1), color], axis=-1)
    image = torch.tensor(image[None].astype("float32"))
    still = torch.eye(4)[None, None, :3]
    moved = still.clone()
    moved[..., 2, 3] = -0.05
    camera = ESMCamMeasurement(
        img_mean=image,
        cam_rel_mat=still,
        img_var=torch.full_like(image, 1e-3),
        validity_mask=torch.ones(1, 1, SIZE, SIZE, 1),
        pose_mean=torch.zeros(1, 1, 6),
        pose_cov=torch.zeros(1, 1, 6, 6),
    )
    seen = ESMObservation(
        img_meas={"camera": camera},
        agent_rel_mat=moved,
        control_mean=torch.zeros(1, 1, 6),
        control_cov=torch.zeros(1, 1, 6, 6),
    )
    memory = ESM()
    with torch.no_grad():
        state = memory(seen)

    def step():
        with torch.no_grad():
            memory(seen, state)

    return step
