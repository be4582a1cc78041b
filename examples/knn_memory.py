"""Fills, searches, saves and reopens a memory of digits.

    python examples/knn_memory.py
    python examples/knn_memory.py --shifts 0 --out runs/knn

Keys are 1,200 of scikit-learn's 8 x 8 digits, and copies shifted by up to two
pixels; values are their digits. The remaining images are the queries. The
answer is the most frequent digit of the nearest neighbours. Prints accuracy,
recall, and queries per second of exact search, and of ScaNN if installed. Then
the entries are flushed to a folder, as in a running program, and reopened, as
after a kill. Writes a picture of some neighbours.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from keras_memory import KNNMemory
from keras_memory import visualization
from keras_memory.retrieval import tuning

NEIGHBOURS = 8


def digits(shifts, seed=1):
    """Keys (M, 64) and their digits (M, 1), then queries and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            "The digits are scikit-learn's: `pip install scikit-learn`. "
            f"Received: {error}"
        ) from error

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8) / 16, labels[order]
    known, asked = images[:1200], images[1200:]
    moves = range(-shifts, shifts + 1)
    wide = np.pad(known, ((0, 0), (shifts, shifts), (shifts, shifts)))
    shifted = [
        wide[:, shifts + y : shifts + y + 8, shifts + x : shifts + x + 8]
        for y in moves
        for x in moves
    ]
    keys = np.concatenate(shifted).reshape(-1, 64)
    values = np.tile(labels[:1200], len(shifted))[:, None]
    return keys, values, asked.reshape(-1, 64), labels[1200:]


def answers(found):
    """The most frequent digit of the neighbours of each query."""
    votes = found.values[0, :, :, 0, None] == np.arange(10)
    return votes.sum(axis=1).argmax(axis=1)


def picture(queries, labels, found, rows):
    """Draws each query beside its neighbours, in blue if of the same class."""
    drawn = []
    for row in rows:
        image, right = queries[row].reshape(8, 8), str(labels[row])
        tiles = [visualization.Tile(image, "query", right)]
        for score, key, (value,) in zip(
            found.scores[0, row], found.keys[0, row], found.values[0, row]
        ):
            tiles.append(
                visualization.Tile(
                    key.reshape(8, 8),
                    f"{np.sqrt(-score):.2f} away",
                    str(int(value)),
                    visualization.LINES[int(value != labels[row])],
                )
            )
        drawn.append(tiles)
    return visualization.plot_tiles(drawn)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="searches timed (default: 10)"
    )
    parser.add_argument(
        "--shifts",
        type=int,
        default=2,
        choices=range(4),
        help="pixels by which copies are shifted, 0 for none (default: 2)",
    )
    parser.add_argument("--out", help="folder for memory and picture")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        run(options, pathlib.Path(options.out or temporary))


def run(options, folder):
    keys, values, queries, labels = digits(options.shifts)
    sizes = {"key_dim": 64, "value_dim": 1, "memory_size": len(keys)}
    methods = ["exact", "approximate"]
    if tuning.import_error() is not None:
        print(
            "without ScaNN, `pip install scann==1.4.2`: "
            f"{tuning.import_error()}"
        )
        methods.remove("approximate")
    for method in methods:
        memory = KNNMemory(**sizes, similarity="l2", search_method=method)
        memory.add(keys[None], values[None])
        memory.search(queries[None], NEIGHBOURS)
        memory.wait()  # builds a tree if there are many entries
        began = time.perf_counter()
        for _ in range(options.steps):
            found = memory.search(queries[None], NEIGHBOURS)
        seconds = (time.perf_counter() - began) / options.steps
        right = (answers(found) == labels).mean()
        recall = memory.recall(queries[None], NEIGHBOURS)
        print(
            f"{method}: {len(keys):,} entries, {len(queries)} queries, "
            f"{NEIGHBOURS} neighbours: {right:.1%} right, recall {recall:.3f}, "
            f"{len(queries) / seconds:,.0f} queries a second"
        )

    durable = folder / "memory"
    with KNNMemory.open(durable, "a", **sizes, similarity="l2") as memory:
        memory.clear()  # of an earlier run
        for begin in range(0, len(keys), 1000):
            some = slice(begin, begin + 1000)
            memory.add(keys[None, some], values[None, some])
            memory.flush()  # from now on, a kill loses no entry
    with KNNMemory.open(durable, "r") as memory:
        again = memory.entries()
    same = all(
        np.array_equal(one, other.astype("float32"))
        for one, other in zip(again, (keys, values))
    )
    print(
        f"opened again: {len(again[0]):,} entries, "
        f"{'as they were' if same else 'which is WRONG'}"
    )

    wrong = np.flatnonzero(answers(found) != labels)[:2]
    figure = picture(queries, labels, found, [0, 1, 2, *wrong])
    path = folder / "neighbours.png"
    figure.savefig(path)
    if options.out:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
