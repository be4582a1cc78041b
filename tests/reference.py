"""NumPy loops written from the papers, to test the layers against.

Independent on purpose: this file imports nothing but NumPy, takes one batch
item and one head at a time, and computes in float64. It is read with the
paper open, not run fast.

Letters: B batch, T time, D input width, U controller units, N slots, W slot
width, R read heads, H write heads, K = R + H heads, S = 2 * shift_range + 1
shifts. Numbers in brackets are the equations of Graves et al. 2014
(arXiv 1410.5401).
"""

import numpy as np


def identity(x):
    return x


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def softplus(x):
    return np.logaddexp(0.0, x)


def oneplus(x):
    return 1.0 + softplus(x)


def softmax(x):
    exps = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exps / np.sum(exps, axis=-1, keepdims=True)


# Controllers, one step of one batch item, in Keras's weight layout.


def lstm_step(x, h, c, kernel, recurrent_kernel, bias):
    """x (D,), h and c (U,), kernels (D, 4U), (U, 4U), bias (4U,) -> h, c."""
    z = x @ kernel + h @ recurrent_kernel + bias
    i, f, candidate, o = np.split(z, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
    return sigmoid(o) * np.tanh(c), c


def gru_step(x, h, kernel, recurrent_kernel, bias):
    """x (D,), h (U,), kernels (D, 3U), (U, 3U), bias (2, 3U) -> h.

    Keras's `reset_after=True`: the reset gate acts after the matrix product.
    """
    x_z, x_r, x_h = np.split(x @ kernel + bias[0], 3)
    h_z, h_r, h_h = np.split(h @ recurrent_kernel + bias[1], 3)
    z = sigmoid(x_z + h_z)
    r = sigmoid(x_r + h_r)
    return z * h + (1.0 - z) * np.tanh(x_h + r * h_h)


def rnn_step(x, h, kernel, recurrent_kernel, bias):
    """x (D,), h (U,), kernels (D, U), (U, U), bias (U,) -> h."""
    return np.tanh(x @ kernel + h @ recurrent_kernel + bias)


def dense_step(x, kernel, bias):
    """x (D,), kernel (D, U), bias (U,) -> (U,)."""
    return np.tanh(x @ kernel + bias)


def controller_step(controller, x, h, c, weights):
    """One step of the named controller -> output (U,), h, c."""
    kernel = weights["controller_kernel"]
    bias = weights["controller_bias"]
    if controller == "dense":
        return dense_step(x, kernel, bias), h, c
    recurrent = weights["controller_recurrent_kernel"]
    if controller == "lstm":
        h, c = lstm_step(x, h, c, kernel, recurrent, bias)
    else:
        step = {"gru": gru_step, "rnn": rnn_step}[controller]
        h = step(x, h, kernel, recurrent, bias)
    return h, h, c


# Addressing and access, one head of one batch item.


def cosine_similarity(key, slot, norm_epsilon, product_epsilon):
    """(6): key (W,), slot (W,) -> scalar K[key, slot]."""
    key_norm = np.sqrt(np.sum(key * key) + norm_epsilon)
    slot_norm = np.sqrt(np.sum(slot * slot) + norm_epsilon)
    return np.sum(key * slot) / (key_norm * slot_norm + product_epsilon)


def content_weighting(memory, key, strength, norm_epsilon, product_epsilon):
    """(5): memory (N, W), key (W,), strength scalar -> (N,)."""
    similarity = [
        cosine_similarity(key, slot, norm_epsilon, product_epsilon)
        for slot in memory
    ]
    return softmax(strength * np.array(similarity))


def interpolate(content, previous, gate):
    """(7): content and previous weightings (N,), gate scalar -> (N,)."""
    return gate * content + (1.0 - gate) * previous


def circular_shift(weighting, shift):
    """(8): weighting (N,), shift (S,) over -shift_range..shift_range -> (N,).

    Offset +1 moves the focus from slot i to slot i + 1.
    """
    slots, shift_range = len(weighting), len(shift) // 2
    shifted = np.zeros(slots)
    for i in range(slots):
        for offset in range(-shift_range, shift_range + 1):
            j = (i - offset) % slots
            shifted[i] += weighting[j] * shift[offset + shift_range]
    return shifted


def sharpen(weighting, sharpening, epsilon):
    """(9): weighting (N,), sharpening scalar, at least 1 -> (N,)."""
    powers = (weighting + epsilon) ** sharpening
    return powers / np.sum(powers)


def read(memory, weighting):
    """(2): memory (N, W), weighting (N,) -> (W,)."""
    return sum(w * slot for w, slot in zip(weighting, memory, strict=True))


def erase_slots(memory, weighting, erase_vector):
    """(3): memory (N, W), weighting (N,), erase_vector (W,) -> (N, W)."""
    pairs = zip(weighting, memory, strict=True)
    return np.array([slot * (1.0 - w * erase_vector) for w, slot in pairs])


def add_to_slots(memory, weighting, add_vector):
    """(4): memory (N, W), weighting (N,), add_vector (W,) -> (N, W)."""
    pairs = zip(weighting, memory, strict=True)
    return np.array([slot + w * add_vector for w, slot in pairs])


def write(memory, weightings, erase_vectors, add_vectors):
    """(3), (4): all erases, then all adds, of write heads acting together.

    memory (N, W), weightings (H, N), vectors (H, W) -> (N, W).
    """
    for w, e in zip(weightings, erase_vectors, strict=True):
        memory = erase_slots(memory, w, e)
    for w, a in zip(weightings, add_vectors, strict=True):
        memory = add_to_slots(memory, w, a)
    return memory


def interface_terms(interface, sections):
    """(I,) -> dict of its consecutive sections, each in its range.

    sections: name -> (shape, activation), in the order of the layout.
    """
    stops = np.cumsum([np.prod(shape) for shape, _ in sections.values()])
    terms = {}
    for name, part in zip(
        sections, np.split(interface, stops[:-1]), strict=True
    ):
        shape, activation = sections[name]
        terms[name] = activation(part.reshape(shape))
    return terms


def ntm_sequence(
    x,
    weights,
    *,
    memory_slots,
    slot_size,
    read_heads,
    write_heads,
    norm_epsilon,
    product_epsilon,
    sharpening_epsilon,
    initial,
    controller="lstm",
    shift_range=1,
    head_order="parallel",
    addressing="content_and_location",
    interface_clip=None,
    key_activation=np.tanh,
    add_activation=np.tanh,
    erase=True,
    strength="softplus",
    activation=identity,
    clip_value=None,
):
    """Runs a Neural Turing Machine over x (B, T, D); heads: reads first.

    weights: controller_kernel, controller_recurrent_kernel (not for "dense"),
    controller_bias, interface_kernel (U, I), interface_bias (I,),
    output_kernel (U + R * W, units), output_bias (units,).
    initial: reads (R, W), memory (N, W), read_weighting (R, N),
    write_weighting (H, N); h, c (U,) where the controller has them.
    head_order: "parallel", all heads address the memory of the step before,
    then the writes happen together; or a tuple as ("read", "write"), heads
    act in turn, each on the memory that the one before it left.

    Returns a dict of arrays (B, T, ...), without the interface sections that
    the options leave out.
    """
    x = np.asarray(x, "float64")
    weights = {k: np.asarray(v, "float64") for k, v in weights.items()}
    initial = {k: np.asarray(v, "float64") for k, v in initial.items()}
    heads, shifts = read_heads + write_heads, 2 * shift_range + 1
    strength = {"softplus": softplus, "oneplus": oneplus}[strength]
    location = {"content": False, "content_and_location": True}[addressing]
    sections = {
        "key": ((heads, slot_size), key_activation),
        "strength": ((heads,), strength),
    }
    if location:
        sections["interpolation_gate"] = ((heads,), sigmoid)
        sections["shift"] = ((heads, shifts), softmax)
        sections["sharpening"] = ((heads,), oneplus)
    if erase:
        sections["erase_vector"] = ((write_heads, slot_size), sigmoid)
    sections["add_vector"] = ((write_heads, slot_size), add_activation)

    readers, writers = list(range(read_heads)), list(range(read_heads, heads))
    if head_order == "parallel":
        turns = [(readers, writers)]
    else:
        i, j = iter(readers), iter(writers)
        turns = [
            ([next(i)], []) if kind == "read" else ([], [next(j)])
            for kind in head_order
        ]
        if len(turns) != heads:
            raise ValueError(f"{heads} heads need a turn, not {head_order}.")

    def access(terms, memory, weighting):
        """memory (N, W), weighting (K, N) of the step before -> the new."""
        reads = np.zeros((read_heads, slot_size))
        content = np.zeros((heads, memory_slots))
        weighting = np.array(weighting)
        erases = terms.get("erase_vector", np.zeros((write_heads, slot_size)))
        adds = terms["add_vector"]
        for reading, writing in turns:
            for k in reading + writing:
                key, beta = terms["key"][k], terms["strength"][k]
                w = content[k] = content_weighting(
                    memory, key, beta, norm_epsilon, product_epsilon
                )
                if location:
                    gate = terms["interpolation_gate"][k]
                    gamma = terms["sharpening"][k]
                    w = interpolate(w, weighting[k], gate)
                    w = circular_shift(w, terms["shift"][k])
                    w = sharpen(w, gamma, sharpening_epsilon)
                weighting[k] = w
            for k in reading:
                reads[k] = read(memory, weighting[k])
            h = [k - read_heads for k in writing]
            memory = write(memory, weighting[writing], erases[h], adds[h])
        return reads, memory, weighting, content

    trace = []
    for sequence in x:
        trace.append([])
        reads, memory = initial["reads"], initial["memory"]
        weighting = np.concatenate(
            [initial["read_weighting"], initial["write_weighting"]]
        )
        h, c = initial.get("h"), initial.get("c")
        for x_t in sequence:
            controller_in = np.concatenate([x_t, np.ravel(reads)])
            controller_out, h, c = controller_step(
                controller, controller_in, h, c, weights
            )
            interface = controller_out @ weights["interface_kernel"]
            interface = interface + weights["interface_bias"]
            if interface_clip is not None:
                interface = np.clip(interface, -interface_clip, interface_clip)
            terms = interface_terms(interface, sections)
            reads, memory, weighting, content = access(terms, memory, weighting)
            output = np.concatenate([controller_out, np.ravel(reads)])
            output = output @ weights["output_kernel"] + weights["output_bias"]
            if clip_value is not None:
                output = np.clip(output, -clip_value, clip_value)
            values = {
                "output": activation(output),
                "reads": reads,
                "memory": memory,
                "read_weighting": weighting[:read_heads],
                "write_weighting": weighting[read_heads:],
                "content_weighting": content,
                "controller_output": controller_out,
            }
            trace[-1].append(values | terms)
    return {
        name: np.array([[step[name] for step in item] for item in trace])
        for name in trace[0][0]
    }
