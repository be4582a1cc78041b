"""Trains Memory Wrap on few data; shows accuracy and the decisive examples.

    python examples/memory_wrap_digits.py
    python examples/memory_wrap_digits.py --samples 100 200 500 all --seeds 10

Trains the same convolutional encoder with four heads: a linear layer, the
classifier of Memory Wrap without a memory, `BaselineMemory`, and Memory Wrap.
The data are the 8 x 8 digits of scikit-learn. Prints accuracy on test images,
and draws the examples behind some answers. With `--out`, writes the Memory Wrap
of the first seed as a .keras file and a SavedModel.

`--dataset cifar10` and `svhn` are downloaded (`svhn` needs SciPy); anything
else is the path of an .npz file with x_train, y_train, x_test, y_test: images
(N, H, W) or (N, H, W, channels), from 0 to 1 or whole numbers from 0 to 255,
and labels, whole numbers or one-hot.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np

import keras_memory
from keras_memory import explanations

MODELS = "standard", "standard, same classifier", "baseline", "memory wrap"
MEMORY = 100  # examples
SVHN = "http://ufldl.stanford.edu/housenumbers/"


def load(dataset, seed):
    """Shuffled training images in [0, 1] and labels, then test ones."""
    rng = np.random.default_rng(seed)
    if dataset == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SystemExit(
                "The digits are scikit-learn's: `pip install scikit-learn`. "
                f"Received: {error}"
            ) from error

        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 8, 8) / 16
        order = rng.permutation(len(x))
        x, y = x[order], y[order]
        parts = x[:1200], y[:1200], x[1200:], y[1200:]
    elif dataset == "cifar10":
        train, test = keras.datasets.cifar10.load_data()
        parts = *train, *test
    elif dataset == "svhn":
        parts = [array for part in ("train", "test") for array in svhn(part)]
    else:
        with np.load(dataset) as file:
            names = "x_train", "y_train", "x_test", "y_test"
            parts = [file[name] for name in names]
    x, y, x_test, y_test = (np.asarray(part) for part in parts)
    order = rng.permutation(len(x))
    return images(x)[order], classes(y)[order], images(x_test), classes(y_test)


def svhn(part):
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise SystemExit(
            "The files of SVHN are read by SciPy: `pip install scipy`. "
            f"Received: {error}"
        ) from error

    name = f"{part}_32x32.mat"
    file = loadmat(keras.utils.get_file(name, SVHN + name))
    return file["X"].transpose(3, 0, 1, 2), file["y"] % 10


def images(x):
    """(N, H, W, channels) in float32, from 0 to 1."""
    scale = 255 if x.dtype.kind in "iu" else 1
    x = x.reshape(*x.shape[:3], -1).astype("float32") / scale
    if not (x.shape[-1] in (1, 3) and x.min() >= 0 and x.max() <= 1):
        raise SystemExit(
            "Images must have one channel or three, and values from 0 to 1 or "
            f"whole numbers from 0 to 255. Received: {x.shape[-1]} channels, "
            f"values from {scale * x.min():g} to {scale * x.max():g}"
        )
    return x


def classes(y):
    """(N,) of (N,), (N, 1) or one-hot."""
    one_hot = y.ndim == 2 and y.shape[1] > 1
    return y.argmax(axis=1) if one_hot else y.ravel()


def make_encoder(shape, filters):
    """Convolutions down to 2 x 2 or 3 x 3 pixels."""
    layers = [keras.Input(shape)]
    size = min(shape[:2])
    while size > 3:
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.MaxPool2D(),
        ]
        size, filters = size // 2, min(2 * filters, 128)
    return keras.Sequential([*layers, keras.layers.Flatten()])


def make_model(kind, shape, classes, filters):
    encoder = make_encoder(shape, filters)
    dense = keras.layers.Dense
    if kind == "standard":
        return keras.Sequential([encoder, dense(classes)])
    if kind == "standard, same classifier":  # that of `BaselineMemory`
        width = encoder.output_shape[-1]
        return keras.Sequential(
            [encoder, dense(2 * width, "relu"), dense(classes)]
        )
    return keras_memory.MemoryWrapClassifier(
        encoder, classes, memory_size=MEMORY, baseline=kind == "baseline"
    )


def train(kind, x, y, steps, filters, batch_size=20):
    model = make_model(kind, x.shape[1:], int(y.max()) + 1, filters)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    a_pass = -(-len(x) // batch_size)
    extra = {}
    if isinstance(model, keras_memory.MemoryWrapClassifier):
        extra["memory_data"] = (x, y)
    epochs, rest = divmod(steps, a_pass)
    for count, length in ((epochs, len(x)), (1, rest * batch_size)):
        if count and length:
            some = x[:length], y[:length]
            model.fit(*some, batch_size, epochs=count, verbose=0, **extra)
    return model


def measure(model, x, y, draws):
    """Accuracy and, for a memory, that of explanations; means over draws."""
    if not isinstance(model, keras_memory.MemoryWrapClassifier):
        return {"accuracy": model.evaluate(x, y, verbose=0)[1]}
    results = [
        explanations.explanation_accuracy(model, x, y) for _ in range(draws)
    ]
    found = {}
    for name in results[0]:  # None without a counterfactual
        values = [r[name] for r in results if r[name] is not None]
        found[name] = float(np.mean(values)) if values else np.nan
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dataset",
        default="digits",
        help="digits, cifar10, svhn, or the path of an .npz file with x_train, "
        "y_train, x_test, y_test",
    )
    parser.add_argument(
        "--samples",
        nargs="+",
        default=["200"],
        help=f'of the training data, at least {MEMORY}, or "all"',
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    for name, default, of in (
        ("--steps", 300, "of training, 20 images each"),
        ("--filters", 32, "of the first convolution"),
        ("--seeds", 1, "runs of each model"),
        ("--draws", 5, "memories of each measurement"),
    ):
        parser.add_argument(name, type=int, default=default, help=of)
    parser.add_argument(
        "--picture", default="memory_wrap.png", help="file for explanations"
    )
    parser.add_argument("--json", help="file to write all results to")
    parser.add_argument("--out", help="folder for the first Memory Wrap")
    options = parser.parse_args(arguments)
    for samples in options.samples:
        if samples != "all" and not (
            samples.isdecimal() and int(samples) >= MEMORY
        ):
            parser.error(
                f'--samples must be "all", or {MEMORY}, the size of a memory, '
                f"or more. Received: {samples}"
            )
    for name in ("steps", "filters", "seeds", "draws"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    results = []
    first = None
    for samples in options.samples:
        for kind in options.models:
            found, begun = [], time.perf_counter()
            for seed in range(1, options.seeds + 1):
                keras.utils.set_random_seed(seed)
                x, y, x_test, y_test = load(options.dataset, seed)
                if samples != "all":
                    x, y = x[: int(samples)], y[: int(samples)]
                model = train(kind, x, y, options.steps, options.filters)
                found.append(measure(model, x_test, y_test, options.draws))
                if kind == "memory wrap" and first is None:
                    first = model, x, y, x_test, y_test
            seconds = (time.perf_counter() - begun) / options.seeds
            print(f"{samples:>4} samples, {kind}:", end=" ")
            for name in found[0]:
                values = [100 * one[name] for one in found]
                deviation = f" +- {np.std(values):.1f}" * (len(values) > 1)
                print(f"{name} {np.mean(values):.1f}{deviation} %", end=", ")
            print(f"{seconds:.0f} s a run", flush=True)
            results.append({"samples": samples, "model": kind, "seeds": found})
            if options.json:
                pathlib.Path(options.json).write_text(json.dumps(results))
    if first is None:
        return results
    model, x, y, x_test, y_test = first
    model.set_memory(x[:MEMORY], y[:MEMORY])
    if options.out:
        out = pathlib.Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        model.save(out / "model.keras")
        entry = keras.Input(x.shape[1:])
        # Also serves the weights of the examples.
        served = keras.Model(entry, model(entry, return_weights=True))
        print(keras_memory.export.export_for_serving(served, out))
    wrong = model.predict(x_test, verbose=0).argmax(axis=1) != y_test
    right, wrong = (np.flatnonzero(one)[:2] for one in (~wrong, wrong))
    shown = [*right, *wrong]
    labels = y_test[shown]
    picture = explanations.picture(model, x_test[shown], labels=labels)
    path = pathlib.Path(options.picture)
    picture.savefig(path)
    print(f"picture: {path}, {len(wrong)} wrong answers at its end")
    return results


if __name__ == "__main__":
    main()
