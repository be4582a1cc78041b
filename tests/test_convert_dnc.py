"""Compares converted weights of two other DNCs with their stored results, or
with oracles of them (`reference_dnc.py`) where no results are stored.

`test_convert_errors.py` tests the errors.
"""

import keras
import numpy as np
import pytest
import reference_dnc
from harness import TRAINS
from harness import act
from harness import close
from harness import golden
from harness import needs_tensorflow
from harness import slots_last
from keras import ops

import keras_memory
from keras_memory import DNCState
from keras_memory import addressing
from keras_memory import cli
from keras_memory import convert

DEEPMIND = ["dm_dnc__full_a", "dm_dnc__full_b", "dm_dnc__full_zerostate_e"]
ACCESS = [name.replace("full", "access") for name in DEEPMIND]
STEPWISE = [
    "pytorch_dnc_stepwise__lstm_1l_shared_r2_a",
    "pytorch_dnc_stepwise__gru_2l_shared_r1_b",
]
IN_ONE_CALL = [
    "pytorch_dnc__lstm_1l_shared_r1_a",
    "pytorch_dnc__gru_2l_unshared_r4_b",
]
TIED = "pytorch_dnc__lstm_1l_shared_r2_zerostate_e"


def swapped(array):
    """(T, B, ...) <-> (B, T, ...)."""
    return np.swapaxes(array, 0, 1)


def started(arrays):
    return {n: v for n, v in arrays.items() if n.startswith("init.")}


# Their names -> ours. Theirs: array names, time first. Ours: (B, T, ...).


def deepmind_modes(heads):
    """Read modes: ours are backward, content, forward."""
    return [*range(heads), 2 * heads, *range(heads, 2 * heads)]


OF_DEEPMIND = {
    "reads": "access_output",
    "memory": "memory",
    "read_weighting": "read_weights",
    "write_weighting": "write_weights",
    "linkage": "link",
    "precedence": "precedence",
    "usage": "usage",
    "controller_output": "ctrl_h",
    "allocation_weighting": "allocation",
    "read_key": "if.read_content_keys",
    "read_strength": "if.read_content_strengths",
    "write_key": "if.write_content_keys",
    "write_strength": "if.write_content_strengths",
    "erase_vector": "if.erase_vectors",
    "add_vector": "if.write_vectors",
    "free_gate": "if.free_gate",
    "allocation_gate": "if.allocation_gate",
    "write_gate": "if.write_gate",
    "read_mode": "if.read_mode",
}


def expected_of_deepmind(arrays):
    values = {}
    if "step.ctrl_h" in arrays:
        values["output"] = swapped(arrays["output"])
    for ours, theirs in OF_DEEPMIND.items():
        if (name := f"step.{theirs}") not in arrays:
            continue
        value = arrays[name]
        if "strength" in ours:
            value = np.logaddexp(value, 0.0)
        if ours == "read_mode":
            value = value[..., deepmind_modes(value.shape[-1] // 2)]
        values[ours] = swapped(value)
    if "reads" not in values:
        values["reads"] = swapped(arrays["output"])
    return values


OF_PYTORCH = {
    "controller_output": "ctrl_out",
    "memory": "state.memory",
    "usage": "state.usage_vector",
    "linkage": "state.link_matrix",
    "precedence": "state.precedence",
    "read_weighting": "state.read_weights",
    "write_weighting": "state.write_weights",
    "read_key": "if.read_keys",
    "read_strength": "if.read_strengths",
    "write_key": "if.write_key",
    "write_strength": "if.write_strength",
    "erase_vector": "if.erase_vector",
    "add_vector": "if.write_vector",
    "free_gate": "if.free_gates",
    "allocation_gate": "if.allocation_gate",
    "write_gate": "if.write_gate",
    "write_content_weighting": "write_content",
    "allocation_weighting": "allocation",
    "read_content_weighting": "read_content",
    "forward_weighting": "forward_w",
    "backward_weighting": "backward_w",
}


def expected_of_pytorch(arrays):
    layers = sum(name.endswith(".layer_input") for name in arrays)
    values = {"output": arrays["output"]}
    for layer in range(layers):
        step = f"step.layer{layer}."
        block = f"block{layer}/" if layers > 1 else ""
        for ours, theirs in OF_PYTORCH.items():
            values[block + ours] = swapped(arrays[step + theirs])
        modes = arrays[f"{step}if.read_modes"][..., [0, 2, 1]]
        values[f"{block}read_mode"] = swapped(modes)
        reads = swapped(arrays[f"{step}read_vectors"])
        heads = modes.shape[2]
        values[f"{block}reads"] = reads.reshape(*reads.shape[:2], heads, -1)
    return values


def controllers_of_deepmind(arrays):
    """Controller states after each step: list of (T, B, units)."""
    return [arrays["step.ctrl_h"], arrays["step.ctrl_c"]]


def controllers_of_pytorch(arrays):
    layers = sum(name.endswith(".layer_input") for name in arrays)
    states = []
    for layer in range(layers):
        h = arrays[f"step.layer{layer}.ctrl_h"]
        c = arrays.get(f"step.layer{layer}.ctrl_c")
        for hidden in range(h.shape[1]):
            states += [s[:, hidden] for s in (h, c) if s is not None]
    return states


def deepmind_state(initial):
    return DNCState(
        reads=initial["init.access_output"],
        memory=initial["init.memory"],
        usage=initial["init.usage"],
        linkage=initial["init.link"],
        precedence=initial["init.precedence"],
        read_weighting=initial["init.read_weights"],
        write_weighting=initial["init.write_weights"],
        controller=((initial["init.ctrl_h"], initial["init.ctrl_c"]),),
    )


def pytorch_state(initial):
    """A tuple of records where the reference has several memories."""
    layers = sum(name.startswith("init.ctrl_h") for name in initial)
    memories = sum(name.endswith(".usage_vector") for name in initial)
    controllers = []
    for layer in range(layers):
        kinds = [
            initial[name]
            for name in (f"init.ctrl_h.{layer}", f"init.ctrl_c.{layer}")
            if name in initial
        ]
        hidden_layers = kinds[0].shape[0]
        controllers.append(
            tuple(
                tuple(kind[hidden] for kind in kinds)
                for hidden in range(hidden_layers)
            )
        )
    records = []
    for memory in range(memories):
        of_memory = f"init.mem{memory}."
        heads = initial[f"{of_memory}read_weights"].shape[1]
        width = initial[f"{of_memory}memory"].shape[2]
        records.append(
            DNCState(
                reads=ops.reshape(
                    initial["init.last_read"], (-1, heads, width)
                ),
                memory=initial[f"{of_memory}memory"],
                usage=initial[f"{of_memory}usage_vector"],
                linkage=initial[f"{of_memory}link_matrix"],
                precedence=initial[f"{of_memory}precedence"],
                read_weighting=initial[f"{of_memory}read_weights"],
                write_weighting=initial[f"{of_memory}write_weights"],
                controller=(
                    tuple(controllers)
                    if memories == 1
                    else (controllers[memory],)
                ),
            )
        )
    return tuple(records) if memories > 1 else records[0]


def deepmind(weights, meta, **kwargs):
    return convert.from_deepmind_dnc(
        weights, meta["memory_size"], meta["clip_value"], **kwargs
    )


def pytorch(weights, meta, **kwargs):
    return convert.from_pytorch_dnc(
        weights,
        meta["nr_cells"],
        meta["read_heads"],
        clip=meta["clip"],
        **kwargs,
    )


def layer_and_state(name, weights, meta, initial, **kwargs):
    if name in DEEPMIND:
        layer, state = deepmind(weights, meta, **kwargs), deepmind_state
    else:
        layer, state = pytorch(weights, meta, **kwargs), pytorch_state
    return layer, layer.cell.pack_state(state(initial))


def expected_of(name, arrays):
    """Inputs (B, T, D), values, controller states."""
    if name in DEEPMIND:
        return (
            swapped(arrays["x"]),
            expected_of_deepmind(arrays),
            controllers_of_deepmind(arrays),
        )
    return (
        arrays["x"],
        expected_of_pytorch(arrays),
        controllers_of_pytorch(arrays),
    )


def stepped(cell, x, states, feedback=True):
    """Runs a cell step by step.

    feedback: False: as in the other implementation within one call, each step
        sees the reads from before the call.

    Returns the outputs (B, T, units), the controllers' states as a list over
    time of flat lists, and a dict of the other values.
    """
    records = cell.layout.unflatten(states)
    first = [record.reads for record in records]
    outputs, controllers, inside = [], [], {}
    for t in range(x.shape[1]):
        if not feedback:
            records = tuple(
                record._replace(reads=reads)
                for record, reads in zip(records, first)
            )
        features, records, blocks = cell.step(x[:, t], records)
        outputs.append(cell.project(features))
        controllers.append(keras.tree.flatten([r.controller for r in records]))
        for name, value in cell._named(blocks).items():
            inside.setdefault(name, []).append(value)
    inside = {name: ops.stack(value, axis=1) for name, value in inside.items()}
    outputs = inside["output"] = ops.stack(outputs, axis=1)
    return outputs, controllers, inside


def computes(layer, x, states, expected, controllers, tolerance, feedback=True):
    x = ops.convert_to_tensor(x.astype(layer.compute_dtype))
    _, states_after, inside = stepped(layer.cell, x, states, feedback)
    if feedback:
        close(layer(x, initial_state=states), expected["output"], tolerance)
    for name, value in expected.items():
        close(inside[name], value, tolerance)
    for t, flat in enumerate(states_after):
        for state, of_theirs in zip(flat, controllers, strict=True):
            close(state, of_theirs[t], tolerance)


# Stored results.


@pytest.mark.parametrize("name", DEEPMIND)
def test_the_oracle_equals_the_results_of_deepmind(name):
    arrays, weights, meta = golden(name)
    weights = {n.removeprefix("dnc/"): w for n, w in weights.items()}
    values = reference_dnc.deepmind_dnc(
        weights,
        arrays["x"],
        meta["memory_size"],
        meta["clip_value"],
        started(arrays),
    )
    for part in [n for n in arrays if n.startswith(("output", "step."))]:
        close(values[part], arrays[part], 1e-10)


@pytest.mark.parametrize("name", ACCESS)
def test_the_access_of_the_oracle_equals_that_of_deepmind(name):
    arrays, weights, _ = golden(name)
    for b in range(arrays["x"].shape[1]):
        state = {n[5:]: v[b] for n, v in started(arrays).items()}
        for t, x_t in enumerate(arrays["x"][:, b]):
            state, inside = reference_dnc.deepmind_access(weights, x_t, state)
            close(state["access_output"], arrays["output"][t, b], 1e-10)
            for part in [n for n in arrays if n.startswith("step.")]:
                value = {**state, **inside}[part[5:]]
                close(value, arrays[part][t, b], 1e-10)


@pytest.mark.parametrize("name", STEPWISE + IN_ONE_CALL)
def test_the_oracle_equals_the_results_of_pytorch(name):
    arrays, weights, meta = golden(name)
    values = reference_dnc.pytorch_dnc(
        weights,
        arrays["x"],
        meta["nr_cells"],
        meta["read_heads"],
        clip=meta["clip"],
        initial=started(arrays),
        feedback=meta["stepwise"],
    )
    for part in [n for n in arrays if n.startswith(("output", "step."))]:
        if not part.endswith("allocation_order"):
            close(values[part], arrays[part], 1e-10)


@pytest.mark.parametrize("name", DEEPMIND + STEPWISE + IN_ONE_CALL)
@needs_tensorflow
def test_a_converted_layer_equals_the_reference(name):
    arrays, weights, meta = golden(name)
    layer, states = layer_and_state(
        name, weights, meta, started(arrays), dtype="float64"
    )
    x, expected, controllers = expected_of(name, arrays)
    assert len(expected) >= 9
    computes(
        layer, x, states, expected, controllers, 1e-9, name not in IN_ONE_CALL
    )


@pytest.mark.parametrize("name", [*DEEPMIND[:2], *STEPWISE])
def test_a_converted_layer_equals_the_reference_in_float32(name):
    arrays, weights, meta = golden(name)
    layer, states = layer_and_state(name, weights, meta, started(arrays))
    x, expected, _ = expected_of(name, arrays)
    output = layer(x.astype("float32"), initial_state=states)
    close(output, expected["output"], 1e-5)


@needs_tensorflow
def test_the_interface_is_equal_where_slot_order_is_undefined():
    """`topk` leaves the order of equally used slots undefined, so that memory,
    reads and outputs of this file cannot be compared. Within one call they do
    not reach the controller, whose interface is compared at all steps."""
    arrays, weights, meta = golden(TIED)
    layer, states = layer_and_state(
        TIED, weights, meta, started(arrays), dtype="float64"
    )
    x, expected, controllers = expected_of(TIED, arrays)
    parts = [n for n in OF_PYTORCH if OF_PYTORCH[n].startswith("if.")]
    _, states_after, inside = stepped(layer.cell, x, states, feedback=False)
    for part in ("controller_output", "read_mode", *parts):
        close(inside[part], expected[part], 1e-9)
    for part in ("usage", "write_content_weighting"):
        close(inside[part][:, 0], expected[part][:, 0], 1e-9)
    for t, flat in enumerate(states_after):
        for state, of_theirs in zip(flat, controllers, strict=True):
            close(state, of_theirs[t], 1e-9)


# Gradients. Keras's weights are permutations and sums of the reference's, so
# the gradients of the reference's weights follow from Keras's.


def gates(array, order):
    return np.concatenate(
        [np.split(array, len(order), axis=-1)[i] for i in order], axis=-1
    )


def interface_parts(array, sizes):
    """(..., P) -> dict, in the order of `sizes`."""
    ends = np.cumsum(list(sizes.values()))
    assert ends[-1] == array.shape[-1]
    return dict(zip(sizes, np.split(array, ends[:-1], axis=-1)))


def access_gradients(kernel, bias, reads, writes, width):
    """Gradients under the names of DeepMind's linear layers."""
    sizes = {
        "read_keys": reads * width,
        "read_strengths": reads,
        "write_keys": writes * width,
        "write_strengths": writes,
        "erase_vectors": writes * width,
        "write_vectors": writes * width,
        "free_gate": reads,
        "allocation_gate": writes,
        "write_gate": writes,
        "read_mode": reads * (2 * writes + 1),
    }
    theirs = {}
    for end, array in (("w", kernel), ("b", bias)):
        parts = interface_parts(array, sizes)
        modes = parts["read_mode"].reshape(*array.shape[:-1], reads, -1)
        order = [*range(writes), *range(writes + 1, 2 * writes + 1), writes]
        parts["read_mode"] = modes[..., order].reshape(*array.shape[:-1], -1)
        for name, part in parts.items():
            theirs[f"memory_access/{name}/{end}"] = part
    return theirs


def deepmind_gradients(gradients, meta):
    controllers, interfaces, (kernel, bias) = gradients
    (input_kernel, recurrent_kernel, gates_bias) = controllers[0]
    both = np.concatenate([input_kernel, recurrent_kernel])
    of_access = access_gradients(
        *interfaces[0], meta["num_reads"], meta["num_writes"], meta["word_size"]
    )
    theirs = {
        "lstm/w_gates": gates(both, [0, 2, 1, 3]),
        "lstm/b_gates": gates(gates_bias, [0, 2, 1, 3]),
        **of_access,
        "output_linear/w": kernel,
        "output_linear/b": bias,
    }
    return {f"dnc/{name}": value for name, value in theirs.items()}


def pytorch_gradients(gradients, meta):
    controllers, interfaces, (kernel, bias) = gradients
    theirs = {"output.weight": kernel.T, "output.bias": bias}
    kind, reads = meta["rnn_type"], meta["read_heads"]
    for block, arrays in enumerate(controllers):
        order = [0, 1, 2, 3] if kind == "lstm" else [1, 0, 2]
        for hidden in range(meta["num_hidden_layers"]):
            of_x, of_h, of_bias = arrays[3 * hidden : 3 * hidden + 3]
            if kind == "lstm":  # both biases have the gradient of their sum
                of_bias = [of_bias, of_bias]
            values = {
                "weight_ih": gates(of_x, order).T,
                "weight_hh": gates(of_h, order).T,
                "bias_ih": gates(of_bias[0], order),
                "bias_hh": gates(of_bias[1], order),
            }
            for name, value in values.items():
                theirs[f"{kind}_layer_{block}.{name}_l{hidden}"] = value
    memories = range(len(interfaces))
    if meta["share_memory"]:  # its layers share one interface; ours do not
        interfaces = [[sum(of) for of in zip(*interfaces, strict=True)]]
        memories = ["shared"]
    sizes = {
        "read_keys": reads * meta["cell_size"],
        "read_strengths": reads,
        "write_key": meta["cell_size"],
        "write_strength": 1,
        "erase_vector": meta["cell_size"],
        "write_vector": meta["cell_size"],
        "free_gates": reads,
        "allocation_gate": 1,
        "write_gate": 1,
        "read_modes": 3 * reads,
    }
    for memory, (kernel, bias) in zip(memories, interfaces, strict=True):
        for end, array in (("weight", kernel), ("bias", bias)):
            parts = interface_parts(array, sizes)
            modes = parts["read_modes"].reshape(*array.shape[:-1], reads, 3)
            modes = modes[..., [0, 2, 1]].reshape(*array.shape[:-1], -1)
            parts["read_modes"] = modes
            name = f"rnn_layer_memory_{memory}"
            if meta["independent_linears"]:
                for part, value in parts.items():
                    theirs[f"{name}.{part}_transform.{end}"] = value.T
            else:
                whole = np.concatenate(list(parts.values()), axis=-1)
                theirs[f"{name}.interface_weights.{end}"] = whole.T
    return theirs


@pytest.mark.parametrize("name", DEEPMIND + STEPWISE + IN_ONE_CALL)
@needs_tensorflow
def test_a_converted_layer_has_the_gradients_of_the_reference(name):
    import tensorflow as tf

    arrays, weights, meta = golden(name)
    initial = {n: tf.constant(v) for n, v in started(arrays).items()}
    x = tf.constant(arrays["x"])
    with tf.GradientTape() as tape:
        tape.watch([x, initial])
        layer, states = layer_and_state(
            name, weights, meta, initial, dtype="float64"
        )
        ours = tf.transpose(x, (1, 0, 2)) if name in DEEPMIND else x
        if name in IN_ONE_CALL:
            output, _, _ = stepped(layer.cell, ours, states, feedback=False)
        else:
            output = layer(ours, initial_state=states)
        loss = tf.reduce_sum(output**2)
    cell = layer.cell
    sources = (
        [one.trainable_weights for one in cell.block_controllers],
        [list(one) for one in cell.interfaces],
        list(cell.output_projection),
    )
    flat = keras.tree.flatten(sources)
    assert {id(w) for w in flat} == {id(w) for w in layer.trainable_weights}
    of_x, of_initial, gradients = tape.gradient(
        loss,
        [x, initial, [weight.value for weight in flat]],
        unconnected_gradients="zero",
    )
    close(loss, arrays["loss"], 1e-9)
    gradients = keras.tree.pack_sequence_as(
        sources, [ops.convert_to_numpy(gradient) for gradient in gradients]
    )
    theirs = (deepmind_gradients if name in DEEPMIND else pytorch_gradients)(
        gradients, meta
    )
    assert set(theirs) == set(weights)
    for part, gradient in {"x": of_x, **of_initial, **theirs}.items():
        close(gradient, arrays[f"grad.{part}"], 1e-7)


# Single parts of DeepMind's DNC.


def drawn(shapes, scale=0.7):
    rng = np.random.default_rng(13)
    return {n: rng.normal(size=s, scale=scale) for n, s in shapes.items()}


def deepmind_weights(
    reads=2, writes=1, width=5, units=7, inputs=3, outputs=2, of_access=None
):
    """Random weights, named as the oracle wants them."""
    shapes = {
        "lstm/w_gates": (inputs + reads * width + units, 4 * units),
        "lstm/b_gates": (4 * units,),
        "output_linear/w": (units + reads * width, outputs),
        "output_linear/b": (outputs,),
    }
    for name, size in {
        "write_vectors": writes * width,
        "erase_vectors": writes * width,
        "free_gate": reads,
        "allocation_gate": writes,
        "write_gate": writes,
        "read_mode": reads * (2 * writes + 1),
        "write_keys": writes * width,
        "write_strengths": writes,
        "read_keys": reads * width,
        "read_strengths": reads,
    }.items():
        shapes[f"memory_access/{name}/w"] = (units, size)
        shapes[f"memory_access/{name}/b"] = (size,)
    return {**drawn(shapes), **(of_access or {})}


def cell_of(meta, of_access=None):
    """The cell of a converted DNC with the access options of `meta`."""
    weights = deepmind_weights(
        meta["num_reads"],
        meta["num_writes"],
        meta["word_size"],
        meta.get("input_size", 7),
        of_access=of_access,
    )
    layer = convert.from_deepmind_dnc(
        weights, meta["memory_size"], dtype="float64"
    )
    return layer.cell


def gradients_are(tape, loss, arrays, names, constants):
    close(loss, arrays["loss"], 1e-9)
    gradients = tape.gradient(
        loss, [constants[n] for n in names], unconnected_gradients="zero"
    )
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient, arrays[f"grad.{name}"], 1e-7)


def taped(arrays, names):
    import tensorflow as tf

    constants = {name: tf.constant(arrays[name]) for name in names}
    tape = tf.GradientTape()
    return tape, constants


@pytest.mark.parametrize("size", "ab")
@needs_tensorflow
def test_content_weighting_equals_that_of_deepmind(size):
    arrays, _, meta = golden(f"dm_dnc__content_{size}")
    access = cell_of(meta).accesses[0]
    names = ["memory", "keys", "strengths"]
    tape, given = taped(arrays, names)
    with tape:
        tape.watch(given)
        strengths = access.activations.read_strength(given["strengths"])
        memory = slots_last(given["memory"])
        output = access.by_content(memory, given["keys"], strengths, None)
        loss = ops.sum(output**2)
    close(output, arrays["output"], 1e-9)
    gradients_are(tape, loss, arrays, names, given)


@pytest.mark.parametrize("size", "ab")
@needs_tensorflow
def test_linkage_equals_that_of_deepmind(size):
    arrays, _, _ = golden(f"dm_dnc__linkage_{size}")
    names = ["write_weights", "read_weights", "prev_link", "prev_precedence"]
    tape, given = taped(arrays, names)
    with tape:
        tape.watch(given)
        link, precedence = given["prev_link"], given["prev_precedence"]
        loss = 0.0
        for t in range(len(arrays["write_weights"])):
            write_weights = given["write_weights"][t]
            link = addressing.linkage_after_write(
                link, precedence, write_weights
            )
            precedence = addressing.precedence_after_write(
                precedence, write_weights
            )
            forward, backward = addressing.follow_links(
                link, given["read_weights"][t]
            )
            for name, value in (
                ("link", link),
                ("precedence", precedence),
                ("forward", forward),
                ("backward", backward),
            ):
                close(value, arrays[name][t], 1e-9)
                if name != "link":
                    loss += ops.sum(value**2)
    gradients_are(tape, loss, arrays, names, given)


@pytest.mark.parametrize("size", "ab")
@needs_tensorflow
def test_usage_and_allocation_equal_those_of_deepmind(size):
    arrays, _, meta = golden(f"dm_dnc__freeness_{size}")
    access = cell_of(meta).accesses[0]
    assert not access.usage_gradient
    names = ["write_weights", "free_gate", "read_weights", "prev_usage"]
    names.append("write_gates")
    tape, given = taped(arrays, names)
    with tape:
        tape.watch(given)
        written = ops.stop_gradient(given["write_weights"])
        usage = addressing.usage_after_write(
            given["prev_usage"], written
        ) * addressing.retention(given["free_gate"], given["read_weights"])
        allocation = access.allocate(usage, given["write_gates"])
        loss = ops.sum(usage**2) + ops.sum(allocation**2)
    close(usage, arrays["usage"], 1e-9)
    close(allocation, arrays["allocation"], 1e-9)
    gradients_are(tape, loss, arrays, names, given)
    tied = ops.convert_to_tensor(arrays["tied_usage"])
    assert len(np.unique(tied[0])) < tied.shape[1]
    allocation = access.allocate(tied, given["write_gates"])
    close(allocation, arrays["tied_allocation"], 1e-9)
    first = access.allocate(tied, given["write_gates"])[:, 0]
    for sort in (True, False):
        close(
            addressing.allocation(tied, access.usage_epsilon, sort),
            ops.convert_to_numpy(first),
            1e-9,
        )


@pytest.mark.parametrize("name", ACCESS)
@needs_tensorflow
def test_the_access_equals_that_of_deepmind(name):
    """Without its controller: the interface is a projection of the inputs."""
    import tensorflow as tf

    arrays, weights, meta = golden(name)
    cell = cell_of(meta, of_access=weights)
    (access,), ((kernel, bias),) = cell.accesses, cell.interfaces
    initial = {n: tf.constant(v) for n, v in started(arrays).items()}
    x = tf.constant(arrays["x"])
    reads = {"init.access_output": tf.zeros(arrays["output"].shape[1:])}
    no_controller = {f"init.ctrl_{kind}": tf.zeros(()) for kind in "hc"}
    trace = []
    with tf.GradientTape() as tape:
        tape.watch([x, initial])
        state = deepmind_state({**initial, **reads, **no_controller})
        loss = 0.0
        for x_t in x:
            state, inside = act(access, x_t @ kernel + bias, state)
            fields = state._replace(controller=())._asdict()
            trace.append({**fields, **inside})
            loss += tf.reduce_sum(state.reads**2)
    expected = expected_of_deepmind(arrays)
    assert set(expected) == set(OF_DEEPMIND) - {"controller_output"}
    for part, value in expected.items():
        close(ops.stack([one[part] for one in trace], axis=1), value, 1e-9)
    close(loss, arrays["loss"], 1e-9)
    of_x, of_initial, *gradients = tape.gradient(
        loss,
        [x, initial, kernel.value, bias.value],
        unconnected_gradients="zero",
    )
    theirs = access_gradients(
        *map(ops.convert_to_numpy, gradients),
        meta["num_reads"],
        meta["num_writes"],
        meta["word_size"],
    )
    assert set(theirs) == set(weights)
    assert not np.any(of_initial["init.write_weights"])  # usage stops it
    for part, gradient in {"x": of_x, **of_initial, **theirs}.items():
        close(gradient, arrays[f"grad.{part}"], 1e-7)


# Oracles, for sizes and options without stored results.


def inputs_of(batch=2, steps=4, width=3):
    return np.random.default_rng(19).normal(size=(batch, steps, width))


def somewhere(start):
    """States like those in the middle of a sequence, with the names and shapes
    of `start`. No two slots are equally used."""
    rng = np.random.default_rng(17)

    def weighting(shape, total=0.9):
        return total * reference_dnc.softmax(rng.normal(size=shape))

    drawn = {}
    for name, zeros in start.items():
        shape = zeros.shape
        if "usage" in name:
            drawn[name] = rng.uniform(size=shape)
        elif "link" in name:
            links = weighting(shape) / shape[-1]
            drawn[name] = links * (1.0 - np.eye(shape[-1]))
        elif "weights" in name or "precedence" in name:
            drawn[name] = weighting(shape)
        else:
            drawn[name] = rng.normal(size=shape, scale=0.5)
    return drawn


DEEPMIND_CASES = {
    "more_heads": ({"reads": 3, "writes": 2}, 11, None, {}),
    "clipped": (
        {"reads": 1, "writes": 3, "width": 2, "units": 11},
        7,
        0.3,
        {"batch": 3},
    ),
    "one_slot": (
        {"reads": 2, "writes": 2, "outputs": 1},
        1,
        None,
        {"batch": 1},
    ),
    "one_step": (
        {"reads": 5, "writes": 1, "width": 1},
        13,
        20.0,
        {"steps": 1, "batch": 1},
    ),
    "one_of_all": (
        {"reads": 1, "width": 1, "units": 1, "inputs": 1, "outputs": 1},
        2,
        1.0,
        {"width": 1, "steps": 7},
    ),
}


@pytest.mark.parametrize("case", DEEPMIND_CASES)
@needs_tensorflow
def test_deepmind_dnc_converts_in_other_sizes(case):
    sizes, slots, clip, shape = DEEPMIND_CASES[case]
    weights, x = deepmind_weights(**sizes), inputs_of(**shape)
    layer = convert.from_deepmind_dnc(weights, slots, clip, dtype="float64")
    arguments = (weights, swapped(x), slots, clip)
    initial = somewhere(reference_dnc.deepmind_start(*arguments[:3]))
    values = reference_dnc.deepmind_dnc(*arguments, initial)
    if case == "clipped":
        for part in ("output", "step.ctrl_h", "step.ctrl_c"):
            assert np.max(np.abs(values[part])) == clip
    computes(
        layer,
        x,
        layer.cell.pack_state(deepmind_state(initial)),
        expected_of_deepmind(values),
        controllers_of_deepmind(values),
        1e-9,
    )


def pytorch_weights(
    kind="lstm",
    layers=1,
    hidden=1,
    shared=True,
    apart=False,
    bias=True,
    reads=2,
    width=5,
    units=7,
    inputs=3,
    sparse_reads=None,
    temporal_reads=0,
):
    """Random weights, named as the oracle wants them: of a DNC, or of a SAM or
    SDNC with `sparse_reads`."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind] * units
    reads_size = reads * width
    shapes = {"output.weight": (inputs, units + reads_size)}
    shapes["output.bias"] = (inputs,)
    for layer in range(layers):
        of_layer = (units if layer else inputs) + reads_size
        for k in range(hidden):
            for of, size in (("ih", units if k else of_layer), ("hh", units)):
                name = f"{kind}_layer_{layer}.{{}}_{of}_l{k}"
                shapes[name.format("weight")] = (gates, size)
                if bias:
                    shapes[name.format("bias")] = (gates,)
    parts = {
        "read_keys": reads_size,
        "read_strengths": reads,
        "write_key": width,
        "write_strength": 1,
        "erase_vector": width,
        "write_vector": width,
        "free_gates": reads,
        "allocation_gate": 1,
        "write_gate": 1,
        "read_modes": 3 * reads,
    }
    if sparse_reads is not None:
        visible = reads * sparse_reads + 2 * temporal_reads + 1
        parts = {
            "read_query": reads_size,
            "write_vector": width,
            "interpolation_gate": visible,
            "write_gate": 1,
        }
    linears = {"interface_weights": sum(parts.values())}
    if apart:
        linears = {f"{part}_transform": parts[part] for part in parts}
    for memory in ["shared"] if shared else range(layers):
        for linear, size in linears.items():
            name = f"rnn_layer_memory_{memory}.{linear}"
            shapes[f"{name}.weight"] = (size, units)
            shapes[f"{name}.bias"] = (size,)
    return drawn(shapes)


PYTORCH_CASES = {
    "lstm_of_two_unshared": (
        {"layers": 2, "hidden": 2, "shared": False, "apart": True, "reads": 3},
        11,
        {},
        {},
    ),
    "gru_without_bias": (
        {"kind": "gru", "hidden": 3, "bias": False, "reads": 1},
        7,
        {},
        {"batch": 3},
    ),
    "tanh_of_three_shared": (
        {"kind": "rnn", "layers": 3, "apart": True, "width": 2},
        5,
        {"clip": 0.5},
        {},
    ),
    "relu_of_two_unshared_without_bias": (
        {
            "kind": "rnn",
            "layers": 2,
            "hidden": 2,
            "shared": False,
            "bias": False,
        },
        7,
        {"nonlinearity": "relu", "clip": 0.5},
        {},
    ),
    "relu_not_clipped": (
        {"kind": "rnn", "units": 11},
        7,
        {"nonlinearity": "relu", "clip": 0},
        {"steps": 7},
    ),
    "lstm_of_three_shared_without_bias": (
        {"layers": 3, "hidden": 2, "bias": False, "reads": 4, "width": 1},
        13,
        {},
        {"batch": 1},
    ),
    "one_slot": (
        {"kind": "gru", "layers": 2, "hidden": 2},
        1,
        {},
        {"batch": 1},
    ),
    "one_step": (
        {"kind": "gru", "layers": 3, "shared": False, "inputs": 1},
        7,
        {},
        {"steps": 1, "batch": 1, "width": 1},
    ),
}


@pytest.mark.parametrize("case", PYTORCH_CASES)
@needs_tensorflow
def test_pytorch_dnc_converts_in_other_sizes(case):
    sizes, slots, options, shape = PYTORCH_CASES[case]
    weights, x = pytorch_weights(**sizes), inputs_of(**shape)
    reads = sizes.get("reads", 2)
    layer = convert.from_pytorch_dnc(
        weights, slots, reads, **options, dtype="float64"
    )
    initial = somewhere(
        reference_dnc.pytorch_start(weights, len(x), slots, reads)
    )
    values = reference_dnc.pytorch_dnc(
        weights, x, slots, reads, **options, initial=initial
    )
    if (clip := options.get("clip")) is not None:
        assert (np.max(values["step.layer0.ctrl_out"]) == clip) == (clip > 0)
    computes(
        layer,
        x,
        layer.cell.pack_state(pytorch_state(initial)),
        expected_of_pytorch(values),
        controllers_of_pytorch(values),
        1e-9,
    )


@needs_tensorflow
def test_converted_layers_start_from_zero():
    """Three slots: with more unused slots, usages after the first step are so
    close that rounding decides which slot is used next."""
    slots, x = 3, inputs_of()
    weights = deepmind_weights(writes=2)
    layer = convert.from_deepmind_dnc(weights, slots, dtype="float64")
    values = reference_dnc.deepmind_dnc(weights, swapped(x), slots)
    close(layer(x), swapped(values["output"]), 1e-9)
    for sizes in ({}, {"kind": "gru", "layers": 2, "shared": False}):
        weights = pytorch_weights(**sizes)
        layer = convert.from_pytorch_dnc(weights, slots, 2, dtype="float64")
        values = reference_dnc.pytorch_dnc(weights, x, slots, 2)
        close(layer(x), values["output"], 1e-9)


# Names.


def same_weights(layer, other):
    for weight, same in zip(layer.weights, other.weights, strict=True):
        close(same, ops.convert_to_numpy(weight), 0)


@pytest.mark.parametrize("scopes", ["dnc/", "root/rnn/dnc/", ""])
def test_names_of_a_checkpoint_are_recognized(scopes):
    weights = deepmind_weights()
    named = {f"{scopes}{name}:0": value for name, value in weights.items()}
    same_weights(
        convert.from_deepmind_dnc(weights, 7),
        convert.from_deepmind_dnc(named, 7),
    )


def test_names_of_a_data_parallel_model_are_recognized():
    weights = pytorch_weights(layers=2, shared=False)
    named = {f"module.{name}": value for name, value in weights.items()}
    same_weights(
        convert.from_pytorch_dnc(weights, 7, 2),
        convert.from_pytorch_dnc(named, 7, 2),
    )


def test_layers_are_ordered_by_number():
    """10 must not sort between 1 and 2."""
    weights = pytorch_weights(kind="rnn", layers=11, shared=False, units=2)
    layer = convert.from_pytorch_dnc(dict(sorted(weights.items())), 3, 2)
    for k, (_, bias) in enumerate(layer.cell.interfaces):
        name = f"rnn_layer_memory_{k}.interface_weights.bias"
        close(bias[:-6], weights[name][:-6], 1e-6)


# The converted layer.


def from_deepmind(weights=None, memory_slots=7, **kwargs):
    weights = deepmind_weights() if weights is None else weights
    return convert.from_deepmind_dnc(weights, memory_slots, **kwargs)


def from_pytorch(weights=None, memory_slots=7, read_heads=2, **kwargs):
    weights = pytorch_weights() if weights is None else weights
    return convert.from_pytorch_dnc(weights, memory_slots, read_heads, **kwargs)


def weights_of(converter):
    if converter is from_deepmind:
        return deepmind_weights()
    return pytorch_weights()


each_converter = pytest.mark.parametrize(
    "converter", [from_deepmind, from_pytorch]
)


@each_converter
def test_converters_pass_arguments_to_the_layer(converter):
    layer = converter()
    assert isinstance(layer, keras_memory.DNCLayer) and layer.built
    assert layer.return_sequences and not layer.stateful
    assert all(weight.trainable for weight in layer.weights)
    other = converter(
        name="copy",
        dtype="mixed_bfloat16",
        return_sequences=False,
        return_state=True,
        trainable=False,
        bypass_dropout=0.1,
        initial_memory="learned",
    )
    assert (other.name, other.compute_dtype) == ("copy", "bfloat16")
    assert other.return_state and not other.trainable_weights
    output = other(inputs_of().astype("float32"))[0]
    assert output.shape == (2, layer.cell.units)


@each_converter
def test_learned_starts_begin_like_the_reference(converter):
    x = inputs_of().astype("float32")
    layer = converter(
        initial_memory="learned", initial_controller_state="learned"
    )
    assert sum(weight is not None for weight in layer.cell.start_weights) > 1
    np.testing.assert_array_equal(layer(x), converter()(x))
    drawn = converter(initial_memory="random")
    assert np.abs(drawn(x) - converter()(x)).max() > 1e-4


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_reaches_each_layer_of_a_controller(bias):
    weights = pytorch_weights(hidden=2, bias=bias)
    layer = from_pytorch(weights, controller_dropout=0.3, seed=7)
    (controller,) = layer.cell.block_controllers
    assert [cell.dropout for cell in controller.cells] == [0.3, 0.3]
    assert [cell.seed for cell in controller.cells] == [7, 8]
    with pytest.raises(ValueError, match="`controller_dropout`"):
        from_pytorch(weights, controller_dropout=1.5)


@each_converter
def test_a_stateful_layer_continues_from_its_state(converter):
    x = inputs_of().astype("float32")
    whole = converter()(x)
    layer = converter(stateful=True)
    chunks = [layer(x[:, :3]), layer(x[:, 3:])]
    close(ops.concatenate(chunks, axis=1), ops.convert_to_numpy(whole), 1e-5)


KINDS = {
    "deepmind": from_deepmind,
    "gru": lambda: from_pytorch(
        pytorch_weights(kind="gru", layers=2, hidden=2, shared=False)
    ),
    "relu": lambda: from_pytorch(
        pytorch_weights(kind="rnn", layers=2), nonlinearity="relu"
    ),
    "two_relu_without_bias": lambda: from_pytorch(
        pytorch_weights(kind="rnn", layers=2, hidden=2, bias=False),
        nonlinearity="relu",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_layer_trains_and_is_saved(kind, tmp_path):
    trains_and_is_saved(KINDS[kind](), inputs_of(steps=2), tmp_path)


def trains_and_is_saved(layer, x, tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), layer])
    x = x.astype("float32")
    if TRAINS:
        before = model.get_weights()
        model.compile("sgd", "mse", run_eagerly=True)
        y = np.ones(model.compute_output_shape(x.shape), "float32")
        loss = model.fit(x, y, verbose=0).history["loss"]
        assert np.isfinite(loss).all()
        for old, new in zip(before, model.get_weights(), strict=True):
            assert np.isfinite(new).all() and np.any(old != new)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(x), ops.convert_to_numpy(model(x)), 0)


# The command.

COMMANDS = {
    "deepmind-dnc": (from_deepmind, [], {}),
    "deepmind-dnc, clipped": (
        from_deepmind,
        ["--clip=0.1"],
        {"clip_value": 0.1},
    ),
    "pytorch-dnc": (from_pytorch, ["--read-heads=2"], {}),
    "pytorch-dnc, not clipped": (
        from_pytorch,
        ["--read-heads=2", "--clip=0"],
        {"clip": 0},
    ),
}


def command(name, folder, converter, *options):
    np.savez(folder / "weights.npz", **weights_of(converter))
    files = [str(folder / "weights.npz"), str(folder / "dnc.keras")]
    name, _, _ = name.partition(",")
    return cli.main(["convert", name, *files, *options])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_converts(name, tmp_path, capsys):
    converter, options, kwargs = COMMANDS[name]
    slots = "--memory-slots=7"
    assert command(name, tmp_path, converter, slots, *options) == 0
    printed = capsys.readouterr()
    assert not printed.err
    x = 5.0 * inputs_of().astype("float32")
    layer = converter(**kwargs)
    sizes = f"from 3 inputs to {layer.cell.units} outputs: 7 slots of 5, 2 read"
    assert f"DNC {sizes}" in printed.out
    model = keras.models.load_model(tmp_path / "dnc.keras")
    close(model(x), ops.convert_to_numpy(layer(x)), 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deepmind-dnc", [], "deepmind-dnc needs --memory-slots"),
        ("pytorch-dnc", ["--memory-slots=7"], "needs --read-heads"),
        ("pytorch-dnc", ["--read-heads=2"], "needs --memory-slots"),
        (
            "deepmind-dnc",
            ["--memory-slots=7", "--nonlinearity=relu"],
            "does not take --nonlinearity",
        ),
        ("deepmind-dnc", ["--memory-slots=0"], "`memory_slots`"),
        (
            "pytorch-dnc",
            ["--memory-slots=7", "--read-heads=2", "--clip=nan"],
            "`clip`",
        ),
    ],
)
def test_the_command_refuses_wrong_arguments(
    name, options, message, tmp_path, capsys
):
    converter, _, _ = COMMANDS[name]
    assert command(name, tmp_path, converter, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras-memory: error: ") and message in line
    assert not (tmp_path / "dnc.keras").exists()
