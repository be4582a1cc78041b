import gc
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

TESTS = itertools.count(1)


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
