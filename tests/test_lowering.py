"""Every layer lowers for TPU and CUDA with the JAX backend on any machine."""

import json
import pathlib

import programs
import pytest
from catalogue import name_of
from catalogue import of_layers
from catalogue import of_wraps

pytest.importorskip("jax")


@pytest.fixture(scope="module")
def lowered(request):
    program = pathlib.Path(__file__).parent / "jax_lowering.py"
    selected = [
        item.callspec.params["case"].name
        for item in request.session.items
        if item.path == request.path and "case" in item.callspec.params
    ]
    # XLA's code for this CPU need not be fast.
    on_cpu = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    on_cpu["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    text = programs.output(program, *selected, **on_cpu)
    lines = map(json.loads, text.splitlines())
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("case", [*of_layers, *of_wraps], ids=name_of)
def test_forward_and_training_steps_lower_for_all_devices(case, lowered):
    line = lowered[case.name]
    assert line["forward"] == line["train"] == ["tpu", "cuda", "cpu"]
    assert line["backward"] == line["forward"]
    assert line["difference"] < 1e-6


@pytest.mark.parametrize("name", ["callback", "eigenvalues"])
def test_functions_that_cannot_lower_are_noticed(name, lowered):
    assert lowered[f"control-{name}"]["error"]
