"""Temporary bytes that XLA reserves for loss and gradients (JAX on the CPU)."""

import contextlib
import os

from benchmarks import measure
from benchmarks import references
from benchmarks import report
from benchmarks.sam import ROW

LAYERS = "SAM", "SDNC", "DNC", "NTM"
HEADER = "layer", "slots", "temporary bytes", "times those of SDNC"


def run(layers, slots, json=None):
    """Compiles a step of each layer, prints a table, and returns all numbers.

    Args:
        layers: list of `LAYERS`.
        slots: int, number of slots.
        json: path of a file for all numbers, if any.
    """
    numbers = {"machine": report.machine(), "results": []}
    for layer in layers:
        with on_jax():
            result = measure.alone(temporary_bytes, layer, slots)
        if not isinstance(result, dict):
            result = {"bytes": result}
        numbers["results"].append({"layer": layer, "slots": slots, **result})
        report.write_json(json, numbers)
    table, base = report.Table(HEADER), None
    for record in numbers["results"]:
        if record["layer"] == "SDNC":
            base = record.get("bytes")
    for record in numbers["results"]:
        if "not_run" in record:
            cells = [f"not run: {record['not_run']}", ""]
        else:
            times = f"{record['bytes'] / base:.3g}" if base else ""
            cells = [f"{record['bytes']:,}", times]
        table.add([[record["layer"], f"{slots:,}", *cells]])
    table.end()
    print(
        f"Loss and gradients, T = {ROW['steps']}, batch {ROW['batch']}, as "
        "JAX's `memory_analysis` says. SAM and SDNC start empty, with "
        f"{ROW['steps']} slots.\n{report.on(numbers['machine'])}."
    )
    return numbers


@contextlib.contextmanager
def on_jax():
    """Context in which processes start with Keras's JAX backend, on the CPU."""
    wanted = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def temporary_bytes(layer, slots):
    """Bytes of loss and gradients, on JAX."""
    import jax
    import keras
    import numpy as np

    import keras_memory

    sparse_arguments = (
        {"top_k": ROW["top_k"]} if layer in ("SAM", "SDNC") else {}
    )
    model = keras.Sequential(
        [
            keras.Input((ROW["steps"], ROW["size"])),
            getattr(keras_memory, f"{layer}Layer")(
                ROW["size"],
                memory_slots=slots,
                slot_size=ROW["width"],
                read_heads=references.HEADS,
                controller_units=ROW["units"],
                return_sequences=True,
                **sparse_arguments,
            ),
        ]
    )
    x = np.zeros((ROW["batch"], ROW["steps"], ROW["size"]), "float32")

    def loss(weights, others, x):
        y, _ = model.stateless_call(weights, others, x, training=True)
        return ((y - x) ** 2).mean()

    weights = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]
    step = jax.jit(jax.value_and_grad(loss))
    compiled = step.lower(weights, others, x).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)
