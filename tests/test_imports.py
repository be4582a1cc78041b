"""Tests of the package's structure: the order of imports, and their cost."""

import ast
import importlib.util
import pathlib

import programs
import pytest

import keras_memory
from keras_memory import api

PACKAGE = pathlib.Path(__file__).parents[1] / "keras_memory"

# Each module may import modules of the lines above its own. A folder's
# `__init__` comes after its last module.
LAYERS = [
    ["checks", "files", "hints"],
    ["arguments"],
    ["addressing.gradients", "addressing.scaling"],
    ["addressing.slots"],
    ["addressing.slot_states"],
    ["addressing.activations"],
    ["addressing.content", "addressing.location"],
    ["addressing.usage", "addressing.linkage", "addressing.sparse"],
    ["addressing.sparse_linkage"],
    ["addressing"],
    ["recurrent.heads", "visualization.images"],
    ["visualization.curves", "visualization.tiles"],
    ["visualization.plots"],
    ["visualization"],
    ["recurrent.cells", "recurrent.replay", "recurrent.state"],
    ["recurrent.backend", "recurrent.controllers", "recurrent.interface"],
    ["recurrent.cell_states", "recurrent.contract", "recurrent.dropout"],
    ["recurrent.fast_loop", "recurrent.serialization"],
    ["recurrent.loop"],
    ["recurrent.cell"],
    ["recurrent.layer"],
    ["recurrent.sparse_layer", "recurrent.tracing"],
    ["recurrent"],
    ["ntm", "dnc"],
    ["spatial.tensors"],
    ["spatial.cameras"],
    ["spatial.geometry", "spatial.inputs"],
    ["spatial.fusion", "spatial.maps", "spatial.rgbd", "spatial.rooms"],
    ["spatial.loop"],
    ["spatial"],
    ["retrieval.batches", "retrieval.exact", "retrieval.forks"],
    ["retrieval.replaced"],
    ["retrieval.similarities", "retrieval.store"],
    ["retrieval.entries", "retrieval.examples"],
    ["retrieval.ring", "retrieval.tuning"],
    ["retrieval.exact_row", "retrieval.knn_layer", "retrieval.scann_row"],
    ["retrieval.durable", "retrieval.host_memory", "retrieval.scann_index"],
    ["retrieval.knn_memory"],
    ["retrieval"],
    ["sam"],
    ["sdnc"],
    ["relative_positions"],
    ["causal_attention"],
    ["knn_attention"],
    ["esm", "memory_wrap"],
    ["memory_wrap_classifier", "memorizing_transformer"],
    ["inspection.explanations"],
    ["inspection.plotting", "inspection.probe"],
    ["inspection.callbacks"],
    ["inspection"],
    ["serving.streaming"],
    ["serving.saved_model"],
    ["serving.export"],
    ["serving"],
    ["convert.weights", "convert.checkpoints"],
    ["convert.ntm", "convert.dnc", "convert.memory_wrap"],
    ["convert.memorizing_transformers"],
    ["convert"],
    ["training.task", "training.losses"],
    ["training.tasks"],
    ["training.config"],
    ["training.presets", "training.runs"],
    ["training.callbacks"],
    ["training.runner"],
    ["training"],
    ["api"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def name_of(path):
    """`recurrent.cell` for recurrent/cell.py, `recurrent` for its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imported_by(source):
    """Modules of keras_memory that a source text imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "keras_memory":
                for alias in node.names:
                    name = f"{module}.{alias.name}".lstrip(".")
                    is_module = name in RANK or not module
                    if name != "__version__":
                        yield name if is_module else module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == "keras_memory":
                    yield module or "the package itself"


def misplaced(module, source):
    """Modules that `module` imports from its own line or from lines below."""
    return [
        name
        for name in imported_by(source)
        if RANK.get(name, len(LAYERS)) >= RANK[module]
    ]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    assert name in RANK, f"give {name} its place in LAYERS"
    assert misplaced(name, MODULES[name].read_text()) == []


def test_modules_in_folders_are_checked():
    assert "recurrent.cell" in MODULES and "recurrent" in MODULES
    assert len(MODULES) > 30


def test_the_check_finds_upward_and_sideways_imports():
    assert misplaced("ntm", "from keras_memory import cli") == ["cli"]
    assert misplaced("ntm", "from keras_memory.dnc import DNCCell") == ["dnc"]
    assert misplaced("ntm", "import keras_memory.training as t") == ["training"]
    assert misplaced("ntm", "from .recurrent import trace") != []
    assert misplaced("ntm", "from keras_memory import NTMLayer") != []
    assert misplaced("ntm", "from keras_memory.recurrent import trace") == []
    inside = "from keras_memory.recurrent import layer"
    assert misplaced("recurrent.cell", inside) == ["recurrent.layer"]
    inside = "from keras_memory.recurrent.layer import MemoryRNN"
    assert misplaced("recurrent.cell", inside) == ["recurrent.layer"]
    assert misplaced("recurrent.layer", "from keras_memory import recurrent")


def test_all_lists_every_public_name():
    names = [name for name in vars(api) if not name.startswith("_")]
    assert sorted([*names, "visualization"]) == sorted(keras_memory.__all__)
    for name in keras_memory.__all__:
        assert getattr(keras_memory, name) is not None


def test_dir_lists_no_modules_of_python():
    names = {*dir(keras_memory)}
    assert names >= {*keras_memory.__all__, "training", "__version__"}
    assert not names & {"TYPE_CHECKING", "importlib", "pathlib", "sys"}


def test_import_is_light():
    """Beyond the modules of `import keras`, only our own modules are imported,
    and no system module that Windows lacks. Figures do without pyplot."""
    new = programs.output(
        "import os, sys, keras; before = set(sys.modules)\n"
        "del os.fork, os.register_at_fork; sys.modules['fcntl'] = None\n"
        "import keras_memory, keras_memory.cli, keras_memory.training\n"
        "print(*sorted({m.partition('.')[0] for m in"
        " set(sys.modules) - before} - {'keras_memory', 'keras'}))\n"
        "sys.modules['matplotlib.pyplot'] = None\n"
        "keras_memory.visualization.Figure"
    ).split()
    heavy = {"scann", "tensorboard", "PIL", "matplotlib"}
    heavy |= {"tensorflow_serving", "grpc"}
    assert not heavy & set(new)


TRAINED = """
import sys; sys.argv[0] = "keras-memory"
import keras_memory
assert "keras" not in sys.modules
from keras_memory.training import runs  # as the command does
import keras
registered = keras.saving.get_registered_object("keras_memory>NTMLayer")
from keras_memory import cli
settings = (
    "max_length=2 buckets=1 test_lengths=() probe_lengths=() batch_size=2 "
    "memory_slots=5 slot_size=3 controller_units=3"
)
arguments = ["train", "copy", "--steps", "1", "--out", "run"]
arguments += [f"--set={setting}" for setting in settings.split()]
assert cli.main(arguments) == 0
print(*sys.modules)
assert registered is keras_memory.NTMLayer
from keras_memory import *
assert NTMLayer and callbacks and trace
assert not hasattr(keras_memory, "nothing")
"""


def test_training_an_ntm_imports_no_other_memory(tmp_path):
    """The command loads public names on first use. This includes classes that
    only Keras looks up, when it loads a file."""
    new = programs.output(TRAINED, cwd=tmp_path).split()
    assert "keras_memory.ntm" in new
    other = {"scann", "sqlite3", "keras_memory.api"}
    other |= {f"keras_memory.{name}" for name in ("memory_wrap", "retrieval")}
    assert not other & set(new)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_one_backend_is_enough(backend):
    """Works without other backends and without optional packages."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    absent = {"tensorflow", "jax", "torch"} - {backend}
    absent |= {"tensorboard", "tensorflow_serving", "scann", "sklearn"}
    absent |= {"PIL", "matplotlib"}
    shape, indices, error = programs.output(
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import keras_memory, numpy as np\n"
        "layer = keras_memory.NTMLayer(3, memory_slots=7, slot_size=5)\n"
        "print(tuple(layer(np.ones((2, 5, 4), 'float32')).shape))\n"
        "index = keras_memory.ScannIndex(5, 2, exact=True)\n"
        "index.set_memory(np.eye(5))\n"
        "print(np.asarray(index(np.eye(5)).indices)[:, 0].tolist())\n"
        "try: keras_memory.ScannIndex(5, 2)\n"
        "except ImportError as error: print(error)",
        KERAS_BACKEND=backend,
    ).splitlines()
    assert shape == "(2, 3)"
    # Without ScaNN, only the exact search works.
    assert indices == "[0, 1, 2, 3, 4]"
    assert "pip install scann==1.4.2" in error
    assert "exact=True" in error and "ModuleNotFoundError" in error
