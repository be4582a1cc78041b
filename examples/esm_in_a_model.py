"""A policy with an egospheric memory: encoder, ESM, decoder, trained.

    python examples/esm_in_a_model.py --steps 60
    python examples/esm_in_a_model.py --steps 60 --export served/esm_policy

A camera looks around in a room for four steps. A convolutional encoder computes
features of its images, and `ESMLayer` puts them onto the sphere. A
convolutional decoder reads the map and predicts the direction of the room's
center in the agent's frame, even if the camera does not see it at the last
step. Gradients flow back through the map into the encoder. Prints loss and
error.
"""

import argparse

import keras
import numpy as np
from keras import layers
from keras import ops

import keras_memory
from keras_memory import geometry
from keras_memory import rooms

SIZE, TIMES = 24, 4  # of images, and of sequences
HEIGHT, WIDTH = 24, 48  # of the map
FEATURES = 4
FIELDS = {
    "depth": (TIMES, SIZE, SIZE),
    "color": (TIMES, SIZE, SIZE, 3),
    "inverse_intrinsics": (3, 3),
    "motion": (TIMES, 3, 4),
}


def build():
    """A model from a dict of arrays to a unit vector, (B, 3)."""
    inputs = {
        name: keras.Input(shape, name=name) for name, shape in FIELDS.items()
    }
    encoder = keras.Sequential(
        [
            layers.Conv2D(8, 3, padding="same", activation="gelu"),
            layers.Conv2D(FEATURES, 3, padding="same"),
        ]
    )
    camera = {
        "depth": inputs["depth"],
        "features": layers.TimeDistributed(encoder)(inputs["color"]),
        "inverse_intrinsics": inputs["inverse_intrinsics"],
    }
    seen = keras_memory.ESMLayer(
        HEIGHT,
        WIDTH,
        FEATURES,
        feature_prior=0.0,
        smooth_kernel_size=5,
        name="memory",
    )({"cameras": camera, "motion": inputs["motion"]})
    # Inputs of the decoder: seen or not, distance, and features.
    known = ops.cast(seen.variance[..., 2:3] < 1.0, "float32")
    x = layers.Concatenate()([known, 0.25 * seen.mean[..., 2:]])
    for channels in (8, 16, 16):
        x = layers.Conv2D(
            channels, 3, strides=2, padding="same", activation="gelu"
        )(x)
    x = layers.Dense(32, "gelu")(layers.Flatten()(x))
    x = layers.Dense(3)(x)
    return keras.Model(inputs, layers.UnitNormalization()(x))


def sequences(number, seed):
    """Inputs of the model, and directions of the room's center, (number, 3)."""
    rng = np.random.default_rng(seed)
    room = rooms.Room()
    inverse = rooms.right_angle(SIZE, SIZE)
    data = {name: [] for name in FIELDS}
    targets = []
    for _ in range(number):
        vectors = np.zeros((TIMES, 6), "float32")
        vectors[:, [0, 2]] = rng.uniform(-0.9, 0.9, size=2)
        vectors[:, [0, 2]] += 0.05 * rng.normal(size=(TIMES, 2)).cumsum(0)
        turns = rng.choice([-1, 1]) * rng.uniform(0.6, 1.2, size=TIMES)
        vectors[:, 4] = rng.uniform(-np.pi, np.pi) + turns.cumsum()
        poses = ops.convert_to_numpy(geometry.pose_matrix(vectors))
        frames = [room.render(pose, SIZE, SIZE) for pose in poses]
        data["depth"].append([depth for depth, _ in frames])
        data["color"].append([color for _, color in frames])
        data["inverse_intrinsics"].append(inverse)
        data["motion"].append(ops.convert_to_numpy(geometry.motions(poses)))
        middle = -poses[-1, :, 3] @ poses[-1, :, :3]
        targets.append(middle / np.linalg.norm(middle))
    arrays = {name: np.asarray(data[name], "float32") for name in data}
    return arrays, np.asarray(targets, "float32")


def degrees(targets, outputs):
    """Median angle between directions."""
    cosines = np.clip(np.sum(targets * outputs, axis=-1), -1, 1)
    return float(np.median(np.degrees(np.arccos(cosines))))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="of training (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export", help="folder for a SavedModel")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    keras.utils.set_random_seed(options.seed)
    batch = 16
    number = min(512, batch * options.steps)
    inputs, targets = sequences(number, seed=options.seed)
    others, of_others = sequences(64, seed=options.seed + 1000)
    model = build()
    model.compile(keras.optimizers.Adam(2e-3), "mse", jit_compile=True)
    epochs = -(-options.steps * batch // number)
    before = degrees(of_others, model.predict(others, batch, verbose=0))
    history = model.fit(inputs, targets, batch, epochs, verbose=0)
    after = degrees(of_others, model.predict(others, batch, verbose=0))
    print(f"loss {history.history['loss'][0]:.3f}", end=" ")
    print(f"to {history.history['loss'][-1]:.3f}")
    print(f"median error in other places {before:.0f} to {after:.0f} degrees")
    if options.export:
        keras_memory.export.export_for_serving(
            model, options.export, warm_up=((1, 1),)
        )
        print(f"wrote {options.export}")
    return model


if __name__ == "__main__":
    main()
