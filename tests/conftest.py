import gc
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

pytest.register_assert_rewrite("knn")

TESTS = itertools.count(1)

# The slowest files run first, so that both processes end at the same time.
LONGEST = (
    "test_time_loops.py",
    "test_esm.py",
    "test_training.py",
    "test_examples.py",
    "test_callbacks.py",
    "test_memory_wrap.py",
    "test_catalogue.py",
    "test_recurrent.py",
    "test_export.py",
    "test_docstrings.py",
    "test_retrieval.py",
    "test_lowering.py",
    "test_visualization.py",
    "test_docs.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    # TensorFlow, Keras and the tests stay until the end. Garbage collection
    # would look at them again and again, which takes half of this time.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    names = dict(zip(LONGEST, itertools.count()))
    items.sort(key=lambda item: names.get(item.path.name, len(names)))


@pytest.fixture(autouse=True)
def seeded():
    """Fixed seeds, and fresh layer names and global state for each test."""
    import keras

    with pytest.MonkeyPatch.context() as patch:
        if keras.backend.backend() == "tensorflow":
            from tensorflow.python import pywrap_tfe

            # The kernels of all ops would be built anew, which takes a tenth
            # of all time. Of these, only those of `tf.random` have a state.
            patch.setattr(
                pywrap_tfe, "TFE_ContextClearCaches", lambda context: None
            )
        # Garbage collection is left out: it would take a third of all time.
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy("float32")
    if keras.backend.backend() == "jax" and next(TESTS) % 20 == 0:
        import jax

        # Compiled functions take memory maps. XLA crashes when the system
        # runs out of them.
        jax.clear_caches()
        gc.collect()


@pytest.fixture(params=["ring", pytest.param("scann", marks=pytest.mark.scann)])
def store(request):
    """The store that searches a `KNNMemory`."""
    import knn

    if request.param == "scann":
        knn.need_scann()
    return request.param


@pytest.fixture
def trees(monkeypatch):
    """Builds trees from 500 entries on, if a search compares less than half."""
    import knn

    from keras_memory.retrieval import tuning

    knn.need_scann()
    monkeypatch.setattr(tuning, "FLAT", 500)
    monkeypatch.setattr(tuning, "WORTH", 0.5)
    monkeypatch.setattr(tuning, "REBUILT", 0.25)
