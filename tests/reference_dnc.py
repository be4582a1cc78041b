"""Two other implementations of the Differentiable Neural Computer, as NumPy
loops with their own names, layouts and conventions. This file imports nothing
from keras_memory."""

import numpy as np
from reference import sigmoid
from reference import softmax
from reference import softplus
from reference import stacked

USAGE_EPSILON = 1e-6


def content_weights(memory, key, strength, norm_epsilon):
    """strength: the factor of the cosine."""
    norm = np.sqrt(key @ key + norm_epsilon)
    cosines = [
        slot @ key / (norm * np.sqrt(slot @ slot + norm_epsilon) + 1e-6)
        for slot in memory
    ]
    return softmax(strength * np.array(cosines))


def allocation_weights(usage):
    """The lower of equally free slots comes first."""
    usage = USAGE_EPSILON + (1.0 - USAGE_EPSILON) * usage
    allocation, product = np.zeros_like(usage), 1.0
    for slot in np.argsort(-(1.0 - usage), kind="stable"):
        allocation[slot] = (1.0 - usage[slot]) * product
        product *= usage[slot]
    return allocation


def used(usage, write_weights, free_gate, read_weights):
    usage = usage + (1.0 - usage) * (1.0 - np.prod(1.0 - write_weights, 0))
    for gate, weights in zip(free_gate, read_weights, strict=True):
        usage = usage * (1.0 - gate * weights)
    return usage


def linked(link, precedence, write_weights):
    """Of one head."""
    after = np.zeros_like(link)
    for i, to in enumerate(write_weights):
        for j, of in enumerate(write_weights):
            if i != j:
                after[i, j] = (1.0 - to - of) * link[i, j] + to * precedence[j]
    return after


def preceded(precedence, write_weights):
    """Of one head."""
    return (1.0 - np.sum(write_weights)) * precedence + write_weights


def written(memory, write_weights, erase_vectors, write_vectors):
    heads = list(zip(write_weights, erase_vectors, write_vectors, strict=True))
    for weights, erase, _ in heads:
        memory = memory * (1.0 - np.outer(weights, erase))
    for weights, _, vector in heads:
        memory = memory + np.outer(weights, vector)
    return memory


def as_float64(arrays):
    return {k: np.asarray(v, "float64") for k, v in arrays.items()}


def time_first(trace, but=()):
    return {
        name: value if name in but else np.swapaxes(value, 0, 1)
        for name, value in stacked(trace).items()
    }


# google-deepmind/dnc.


def deepmind_access(weights, inputs, state):
    """One step of `access.MemoryAccess` for one item of a batch.

    weights: named `memory_access/<part>/w`, `memory_access/<part>/b`.
    inputs: (D,). state: dict without the batch axis.

    Returns the state after the step, with the reads as `access_output`, and a
    dict of all other values; strengths are those before softplus.
    """
    writes, _ = state["write_weights"].shape
    reads, _ = state["read_weights"].shape

    def linear(name, heads=None):
        name = f"memory_access/{name}"
        values = inputs @ weights[f"{name}/w"] + weights[f"{name}/b"]
        return values.reshape(heads, -1) if heads else values

    interface = {
        "write_vectors": linear("write_vectors", writes),
        "erase_vectors": sigmoid(linear("erase_vectors", writes)),
        "free_gate": sigmoid(linear("free_gate")),
        "allocation_gate": sigmoid(linear("allocation_gate")),
        "write_gate": sigmoid(linear("write_gate")),
        "read_mode": np.stack(
            [softmax(mode) for mode in linear("read_mode", reads)]
        ),
        "write_content_keys": linear("write_keys", writes),
        "write_content_strengths": linear("write_strengths"),
        "read_content_keys": linear("read_keys", reads),
        "read_content_strengths": linear("read_strengths"),
    }

    def content(kind, memory):
        return [
            content_weights(memory, key, softplus(strength), 1e-6)
            for key, strength in zip(
                interface[f"{kind}_content_keys"],
                interface[f"{kind}_content_strengths"],
                strict=True,
            )
        ]

    usage = used(
        state["usage"],
        state["write_weights"],
        interface["free_gate"],
        state["read_weights"],
    )
    write_content = content("write", state["memory"])
    allocations, write_weights, taken = [], [], usage
    for head in range(writes):
        to_free = interface["allocation_gate"][head]
        gate = interface["write_gate"][head]
        allocation = allocation_weights(taken)
        taken = taken + (1.0 - taken) * to_free * gate * allocation
        allocations.append(allocation)
        write_weights.append(
            gate * (to_free * allocation + (1 - to_free) * write_content[head])
        )
    memory = written(
        state["memory"],
        write_weights,
        interface["erase_vectors"],
        interface["write_vectors"],
    )
    link = [
        linked(*of_head)
        for of_head in zip(state["link"], state["precedence"], write_weights)
    ]
    precedence = [
        preceded(*of_head)
        for of_head in zip(state["precedence"], write_weights)
    ]
    read_weights = []
    for head, weights_of_content in enumerate(content("read", memory)):
        before = state["read_weights"][head]
        mode = interface["read_mode"][head]
        weights_of_head = mode[2 * writes] * weights_of_content
        for write in range(writes):
            backward, forward = link[write].T @ before, link[write] @ before
            weights_of_head += mode[write] * backward
            weights_of_head += mode[writes + write] * forward
        read_weights.append(weights_of_head)
    state = {
        "access_output": np.stack(read_weights) @ memory,
        "memory": memory,
        "read_weights": np.stack(read_weights),
        "write_weights": np.stack(write_weights),
        "link": np.stack(link),
        "precedence": np.stack(precedence),
        "usage": usage,
    }
    inside = {f"if.{name}": value for name, value in interface.items()}
    return state, {**inside, "allocation": np.stack(allocations)}


def deepmind_start(weights, x, memory_slots):
    """Its initial state."""
    reads = weights["memory_access/read_strengths/b"].size
    writes = weights["memory_access/write_strengths/b"].size
    width = weights["memory_access/write_vectors/b"].size // writes
    units = weights["lstm/b_gates"].size // 4
    shapes = {
        "access_output": (reads, width),
        "memory": (memory_slots, width),
        "read_weights": (reads, memory_slots),
        "write_weights": (writes, memory_slots),
        "link": (writes, memory_slots, memory_slots),
        "precedence": (writes, memory_slots),
        "usage": (memory_slots,),
        "ctrl_h": (units,),
        "ctrl_c": (units,),
    }
    batch = np.shape(x)[1]
    return {f"init.{n}": np.zeros((batch, *shapes[n])) for n in shapes}


def deepmind_dnc(weights, x, memory_slots, clip_value=None, initial=None):
    """`dnc.DNC` of google-deepmind/dnc.

    weights: named as in a checkpoint, without a scope in front of `lstm/`,
        `memory_access/` and `output_linear/`.
    x: (T, B, D).
    initial: dict of arrays (B, ...) named as `deepmind_start` names them.

    Returns a dict of arrays (T, B, ...): `output`, and as `step.*` the state
    after each step and the values of the step.
    """
    weights, x = as_float64(weights), np.asarray(x, "float64")
    if initial is None:
        initial = deepmind_start(weights, x, memory_slots)

    def clipped(values):
        limit = np.inf if clip_value is None else clip_value
        return np.clip(values, -limit, limit)

    trace = []
    for b in range(x.shape[1]):
        trace.append([])
        state = {
            name.removeprefix("init."): value[b]
            for name, value in as_float64(initial).items()
        }
        for x_t in x[:, b]:
            joined = np.concatenate([x_t, state["access_output"].ravel()])
            joined = np.concatenate([joined, state["ctrl_h"]])
            i, j, f, o = np.split(
                joined @ weights["lstm/w_gates"] + weights["lstm/b_gates"], 4
            )
            c = sigmoid(f + 1.0) * state["ctrl_c"] + sigmoid(i) * np.tanh(j)
            h = sigmoid(o) * np.tanh(c)
            control = clipped(h)
            after, inside = deepmind_access(weights, control, state)
            state = {**after, "ctrl_h": clipped(h), "ctrl_c": clipped(c)}
            features = np.concatenate([control, after["access_output"].ravel()])
            output = features @ weights["output_linear/w"]
            output = clipped(output + weights["output_linear/b"])
            inside = {f"step.{n}": v for n, v in {**inside, **state}.items()}
            trace[-1].append({"output": output, **inside})
    return time_first(trace)


# ixaxaar/pytorch-dnc.


def torch_rnn(weights, name, kind, x, h, c, nonlinearity):
    """One step of PyTorch's LSTM, GRU or RNN; h, c: one vector a layer."""
    h, c = list(h), list(c)

    def linear(of, layer, values):
        bias = weights.get(f"{name}.bias_{of}_l{layer}", 0.0)
        return weights[f"{name}.weight_{of}_l{layer}"] @ values + bias

    for k in range(len(h)):
        of_x, of_h = linear("ih", k, x), linear("hh", k, h[k])
        if kind == "lstm":
            i, f, g, o = np.split(of_x + of_h, 4)
            c[k] = sigmoid(f) * c[k] + sigmoid(i) * np.tanh(g)
            h[k] = sigmoid(o) * np.tanh(c[k])
        elif kind == "gru":
            (r, z, n), (r_h, z_h, n_h) = np.split(of_x, 3), np.split(of_h, 3)
            r, z = sigmoid(r + r_h), sigmoid(z + z_h)
            h[k] = (1.0 - z) * np.tanh(n + r * n_h) + z * h[k]
        elif nonlinearity == "relu":
            h[k] = np.maximum(of_x + of_h, 0.0)
        else:
            h[k] = np.tanh(of_x + of_h)
        x = h[k]
    return h, c


def pytorch_memory(weights, name, control, state):
    """One step of its `Memory` for one item of a batch.

    name: of the memory, `rnn_layer_memory_shared` or `rnn_layer_memory_<i>`.

    Returns the state after the step, and a dict of the interface and all other
    values.
    """
    reads, slots = state["read_weights"].shape
    width = state["memory"].shape[1]
    sizes = {
        "read_keys": (reads, width),
        "read_strengths": (reads,),
        "write_key": (1, width),
        "write_strength": (1,),
        "erase_vector": (1, width),
        "write_vector": (1, width),
        "free_gates": (reads,),
        "allocation_gate": (1,),
        "write_gate": (1,),
        "read_modes": (reads, 3),
    }

    def linear(of):
        return (
            weights[f"{name}.{of}.weight"] @ control
            + (weights[f"{name}.{of}.bias"])
        )

    if f"{name}.interface_weights.weight" in weights:
        ends = np.cumsum([np.prod(size) for size in sizes.values()])[:-1]
        parts = np.split(linear("interface_weights"), ends)
    else:
        parts = [linear(f"{part}_transform") for part in sizes]
    p = {
        part: values.reshape(sizes[part])
        for part, values in zip(sizes, parts, strict=True)
    }
    for part in p:
        if "key" in part or part == "write_vector":
            p[part] = np.tanh(p[part])
        elif "strength" in part:
            p[part] = softplus(p[part])
        elif part == "read_modes":
            p[part] = np.stack([softmax(mode) for mode in p[part]])
        else:
            p[part] = sigmoid(p[part])

    usage = used(
        state["usage_vector"],
        state["write_weights"],
        p["free_gates"],
        state["read_weights"],
    )
    allocation = allocation_weights(usage)
    write_content = content_weights(
        state["memory"], p["write_key"][0], p["write_strength"][0], 0.0
    )
    gate, to_free = p["write_gate"][0], p["allocation_gate"][0]
    write_weights = gate * (
        to_free * allocation + (1.0 - to_free) * write_content
    )
    memory = written(
        state["memory"],
        write_weights[None],
        p["erase_vector"],
        p["write_vector"],
    )
    link = linked(
        state["link_matrix"][0], state["precedence"][0], write_weights
    )
    precedence = preceded(state["precedence"][0], write_weights)
    read_content = np.stack(
        [
            content_weights(memory, key, strength, 0.0)
            for key, strength in zip(p["read_keys"], p["read_strengths"])
        ]
    )
    forward = np.stack([link @ before for before in state["read_weights"]])
    backward = np.stack([link.T @ before for before in state["read_weights"]])
    read_weights = np.stack(
        [
            mode[0] * b + mode[1] * f + mode[2] * c
            for mode, b, f, c in zip(
                p["read_modes"], backward, forward, read_content
            )
        ]
    )
    state = {
        "memory": memory,
        "link_matrix": link[None],
        "precedence": precedence[None],
        "read_weights": read_weights,
        "write_weights": write_weights[None],
        "usage_vector": usage,
    }
    return state, {
        **{f"if.{part}": value for part, value in p.items()},
        "write_content": write_content[None],
        "allocation": allocation[None],
        "read_content": read_content,
        "forward_w": forward[:, None],
        "backward_w": backward[:, None],
        "read_vectors": (read_weights @ memory).ravel(),
    }


def pytorch_start(weights, batch, memory_slots, read_heads):
    """Its initial state, if the controllers' was 0."""
    layers = sum(n.endswith(".weight_ih_l0") for n in weights)
    kind = next(n for n in weights if "_layer_0.w" in n).split("_")[0]
    hidden = sum(n.startswith(f"{kind}_layer_0.weight_ih") for n in weights)
    units = weights[f"{kind}_layer_0.weight_hh_l0"].shape[1]
    reads_size = weights["output.weight"].shape[1] - units
    shared = any("memory_shared" in name for name in weights)
    shapes = {"last_read": (batch, reads_size)}
    for memory in range(1 if shared else layers):
        shapes |= {
            f"mem{memory}.{name}": (batch, *shape)
            for name, shape in {
                "memory": (memory_slots, reads_size // read_heads),
                "link_matrix": (1, memory_slots, memory_slots),
                "precedence": (1, memory_slots),
                "read_weights": (read_heads, memory_slots),
                "write_weights": (1, memory_slots),
                "usage_vector": (memory_slots,),
            }.items()
        }
    for layer in range(layers):
        shapes[f"ctrl_h.{layer}"] = (hidden, batch, units)
        if kind == "lstm":
            shapes[f"ctrl_c.{layer}"] = (hidden, batch, units)
    return {f"init.{name}": np.zeros(shape) for name, shape in shapes.items()}


def pytorch_dnc(
    weights,
    x,
    memory_slots,
    read_heads,
    nonlinearity="tanh",
    clip=20.0,
    initial=None,
    feedback=True,
):
    """`DNC` of ixaxaar/pytorch-dnc.

    weights: its state dict. x: (B, T, D).
    initial: dict of arrays named `init.*`, as `pytorch_start` makes it.
    feedback: True: as if called once per step. False: as if called once for all
        steps, so that each step sees the reads from before the call.

    Returns a dict of `output` (B, T, D), and as `step.layer<l>.*` (T, ...) the
    values of each step.
    """
    weights, x = as_float64(weights), np.asarray(x, "float64")
    if initial is None:
        initial = pytorch_start(weights, len(x), memory_slots, read_heads)
    initial = as_float64(initial)
    layers = sum(n.endswith(".weight_ih_l0") for n in weights)
    kind = next(n for n in weights if "_layer_0.w" in n).split("_")[0]
    shared = any("memory_shared" in name for name in weights)
    trace = []
    for b in range(len(x)):
        trace.append([])
        hidden, cells = (
            [
                initial[name][:, b] if name in initial else ()
                for name in (f"init.ctrl_{s}.{k}" for k in range(layers))
            ]
            for s in "hc"
        )
        states = [
            {
                name.removeprefix(f"init.mem{memory}."): value[b]
                for name, value in initial.items()
                if name.startswith(f"init.mem{memory}.")
            }
            for memory in range(1 if shared else layers)
        ]
        last_read = initial["init.last_read"][b]
        for x_t in x[b]:
            values = {}
            features = np.concatenate([x_t, last_read])
            for k in range(layers):
                step = f"step.layer{k}."
                values[step + "layer_input"] = features
                hidden[k], cells[k] = torch_rnn(
                    weights,
                    f"{kind}_layer_{k}",
                    kind,
                    features,
                    hidden[k],
                    cells[k],
                    nonlinearity,
                )
                control = hidden[k][-1]
                if clip:
                    control = np.clip(control, -clip, clip)
                memory = 0 if shared else k
                states[memory], inside = pytorch_memory(
                    weights,
                    f"rnn_layer_memory_{'shared' if shared else k}",
                    control,
                    states[memory],
                )
                values[step + "ctrl_out"] = control
                values[step + "ctrl_h"] = np.stack(hidden[k])
                if kind == "lstm":
                    values[step + "ctrl_c"] = np.stack(cells[k])
                values |= {step + name: v for name, v in inside.items()}
                values |= {
                    f"{step}state.{name}": v
                    for name, v in states[memory].items()
                }
                features = np.concatenate([control, inside["read_vectors"]])
            if feedback:
                last_read = inside["read_vectors"]
            values["output"] = (
                weights["output.weight"] @ features + weights["output.bias"]
            )
            trace[-1].append(values)
    values = time_first(trace, but=["output"])
    for name in values:
        if name.endswith(("ctrl_h", "ctrl_c")):  # PyTorch's layout of layers
            values[name] = np.swapaxes(values[name], 1, 2)
    return values
