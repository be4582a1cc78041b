import gc
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

TESTS = itertools.count(1)

# Files that take longest begin, so that two processes end at the same time.
LONGEST = (
    "test_time_loops.py",
    "test_knn_memory.py",
    "test_esm.py",
    "test_training.py",
    "test_examples.py",
    "test_callbacks.py",
    "test_lowering.py",
    "test_docstrings.py",
    "test_docs.py",
)


def pytest_collection_modifyitems(items):
    names = dict(zip(LONGEST, itertools.count()))
    items.sort(key=lambda item: names.get(item.path.name, len(names)))


@pytest.fixture(autouse=True)
def seeded():
    """Fixed seeds, and names and global state that no other test has used."""
    # Without its garbage collection, which would take a third of all time.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy("float32")
    if keras.backend.backend() == "jax" and next(TESTS) % 20 == 0:
        import jax

        # Each function that is compiled takes memory maps, and where there
        # are too many for the system, XLA crashes.
        jax.clear_caches()
        gc.collect()
