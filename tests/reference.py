"""NumPy loops written from the papers, to test the layers against.

This file is independent on purpose: it imports only NumPy, takes one batch item
and one head at a time, and computes in float64. It is meant to be compared with
the paper, not to be fast.

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


class SequentialWriter:
    """Chooses MERLIN's slots from the history of writes of one batch item.

    erase: whether overwriting a slot removes its content and its remaining
    retroactive writes.
    discount: gamma of retroactive writing, or None for none.
    """

    def __init__(self, slots, erase, discount):
        self.erase, self.discount = erase, discount
        self.time = 0
        self.written_at = [[] for _ in range(slots)]  # not overwritten
        self.seen = np.zeros(slots)  # sum of read weightings since the first
        self.retroactive = np.zeros(slots)

    def see(self, weightings):
        """Adds read weightings (R, N) of the slots written so far."""
        for weighting in weightings:
            for slot, times in enumerate(self.written_at):
                if times:
                    self.seen[slot] += weighting[slot]

    def write(self, memory, add_vector):
        """memory (N, W) -> the memory after the step's write, one-hot (N,)."""
        memory, slots = np.array(memory), len(memory)
        unwritten = [s for s in range(slots) if not self.written_at[s]]
        slot = unwritten[0] if unwritten else int(np.argmin(self.seen))
        if self.erase:
            memory[slot] = 0.0
            self.written_at[slot] = []
        first = slice(0, len(add_vector))
        memory[slot, first] += add_vector
        if self.discount is not None:
            second = slice(len(add_vector), None)
            for s, times in enumerate(self.written_at):
                ages = [self.time - time for time in times]
                self.retroactive[s] = (1.0 - self.discount) * sum(
                    self.discount ** (age - 1) for age in ages
                )
                memory[s, second] += self.retroactive[s] * add_vector
        self.written_at[slot].append(self.time)
        self.time += 1
        return memory, np.eye(slots)[slot]

    @property
    def usage(self):
        """(N,): -1 for slots without a write."""
        written = [bool(times) for times in self.written_at]
        return np.where(written, self.seen, -1.0)

    @property
    def retroactive_weighting(self):
        return np.array(self.retroactive)[None]


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
    writing="addressed",
    retroactive_discount=None,
):
    """Runs a Neural Turing Machine over x (B, T, D); heads: reads first.

    weights: controller_kernel, controller_recurrent_kernel (not for "dense"),
    controller_bias, interface_kernel (U, I), interface_bias (I,),
    output_kernel (U + R * W, units), output_bias (units,).
    initial: reads (R, W), memory (N, W), read_weighting (R, N),
    write_weighting (H, N); h, c (U,) where the controller has them.
    head_order: "parallel": all heads address the memory of the step before,
    then all writes happen together. "writes_in_turn": the same, but each write
    head erases and adds before the next one. A tuple such as ("read", "write"):
    heads act in turn, each on the memory left by the head before it.
    writing: "sequential": as in MERLIN (Wayne et al. 2018, arXiv 1803.10760),
    with `SequentialWriter`, instead of write heads that address the memory.

    Returns a dict of arrays (B, T, ...), without the interface sections that
    the options leave out.
    """
    x = np.asarray(x, "float64")
    weights = {k: np.asarray(v, "float64") for k, v in weights.items()}
    initial = {k: np.asarray(v, "float64") for k, v in initial.items()}
    sequential = writing == "sequential"
    heads, shifts = read_heads + write_heads, 2 * shift_range + 1
    addressers = read_heads if sequential else heads
    strength = {"softplus": softplus, "oneplus": oneplus}[strength]
    location = {"content": False, "content_and_location": True}[addressing]
    sections = {
        "key": ((addressers, slot_size), key_activation),
        "strength": ((addressers,), strength),
    }
    if location:
        sections["interpolation_gate"] = ((addressers,), sigmoid)
        sections["shift"] = ((addressers, shifts), softmax)
        sections["sharpening"] = ((addressers,), oneplus)
    if erase and not sequential:
        sections["erase_vector"] = ((write_heads, slot_size), sigmoid)
    add_size = slot_size if retroactive_discount is None else slot_size // 2
    sections["add_vector"] = ((write_heads, add_size), add_activation)

    readers, writers = list(range(read_heads)), list(range(read_heads, heads))
    if isinstance(head_order, str):
        turns = [(readers, writers)]
    else:
        i, j = iter(readers), iter(writers)
        turns = [
            ([next(i)], []) if kind == "read" else ([], [next(j)])
            for kind in head_order
        ]
        if len(turns) != heads:
            raise ValueError(f"{heads} heads need a turn, not {head_order}.")

    def access(terms, memory, weighting, writer):
        """memory (N, W), weighting (K, N) of the step before -> new ones."""
        reads = np.zeros((read_heads, slot_size))
        content = np.zeros((addressers, memory_slots))
        weighting = np.array(weighting)
        erases = terms.get("erase_vector", np.zeros((write_heads, slot_size)))
        adds = terms["add_vector"]
        for reading, writing in turns:
            for k in reading + ([] if sequential else writing):
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
            if sequential:
                writer.see(weighting[reading])
                for k in writing:
                    memory, weighting[k] = writer.write(memory, adds[0])
                continue
            groups = [[k] for k in writing]
            if head_order == "parallel":
                groups = [writing]
            for group in groups:
                h = [k - read_heads for k in group]
                memory = write(memory, weighting[group], erases[h], adds[h])
        return reads, memory, weighting, content

    trace = []
    for sequence in x:
        trace.append([])
        reads, memory = initial["reads"], initial["memory"]
        weighting = np.concatenate(
            [initial["read_weighting"], initial["write_weighting"]]
        )
        h, c = initial.get("h"), initial.get("c")
        writer = SequentialWriter(memory_slots, erase, retroactive_discount)
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
            reads, memory, weighting, content = access(
                terms, memory, weighting, writer
            )
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
            if sequential:
                values["usage"] = writer.usage
                values["retroactive_weighting"] = writer.retroactive_weighting
            trace[-1].append(values | terms)
    return stacked(trace)


def stacked(trace):
    """List over B of lists over T of dicts -> dict of arrays (B, T, ...)."""
    return {
        name: np.array([[step[name] for step in item] for item in trace])
        for name in trace[0][0]
    }


# The Differentiable Neural Computer (Graves et al. 2016). The paper does not
# number its equations.


def masked_content_weighting(
    memory, key, strength, mask, norm_epsilon, product_epsilon
):
    """memory (N, W), key (W,), strength scalar, mask (W,) -> (N,).

    The mask multiplies the key and each slot (Csordas & Schmidhuber 2019).
    """
    masked = np.array([slot * mask for slot in memory])
    return content_weighting(
        masked, key * mask, strength, norm_epsilon, product_epsilon
    )


def retention(free_gate, read_weighting):
    """psi: free_gate (R,), read_weighting (R, N) -> (N,)."""
    psi = np.ones(read_weighting.shape[1])
    for f, w in zip(free_gate, read_weighting, strict=True):
        psi = psi * (1.0 - f * w)
    return psi


def usage_after(usage, write_weighting, psi):
    """u: usage (N,), write_weighting (H, N), psi (N,) -> (N,)."""
    for w in write_weighting:
        usage = usage + w - usage * w
    return usage * psi


def allocation(usage, epsilon):
    """a: usage (N,) -> (N,), the freest slot first; ties go to the lower slot.

    Slots are sorted by 1 - usage, so that usages below the rounding of 1 tie:
    for slots never used, a second write head finds usages such as 1e-16, 1e-32,
    1e-48, left by the allocation of the first head.
    """
    free = [1.0 - u for u in usage]
    usage = [epsilon + (1.0 - epsilon) * u for u in usage]
    weighting, product = np.zeros(len(usage)), 1.0
    for slot in sorted(range(len(usage)), key=lambda i: (-free[i], i)):
        weighting[slot] = (1.0 - usage[slot]) * product
        product *= usage[slot]
    return weighting


def linkage_after(linkage, precedence, write_weighting):
    """L: linkage (N, N), precedence and write_weighting (N,) -> (N, N)."""
    w, slots = write_weighting, len(write_weighting)
    after = np.zeros((slots, slots))
    for i in range(slots):
        for j in range(slots):
            if i != j:
                kept = (1.0 - w[i] - w[j]) * linkage[i, j]
                after[i, j] = kept + w[i] * precedence[j]
    return after


def largest(x, count):
    """Indices of the largest entries of x (N,); ties keep their order."""
    return sorted(range(len(x)), key=lambda i: (-x[i], i))[:count]


def sparse_linkage_after(linkage, precedence, write_weighting, count):
    """`linkage_after` of a matrix with at most `count` entries in a row."""
    w, slots = write_weighting, len(write_weighting)
    after = np.array(
        [
            [(1.0 - w[i] - w[j]) * linkage[i, j] for j in range(slots)]
            for i in range(slots)
        ]
    )
    for i in largest(w, count):
        for j in largest(precedence, count):
            if i != j:
                after[i, j] += w[i] * precedence[j]
        kept = largest(after[i], count)
        for j in range(slots):
            if j not in kept:
                after[i, j] = 0.0
    return after


def precedence_after(precedence, write_weighting):
    """p: precedence and write_weighting (N,) -> (N,)."""
    return (1.0 - np.sum(write_weighting)) * precedence + write_weighting


def dnc_step(
    terms,
    state,
    *,
    linkage,
    sparse_links,
    deallocation,
    link_sharpening,
    **epsilons,
):
    """One step of the memory of one batch item, without the controller.

    terms: the interface's sections, each without batch axis; state: dict of
    memory (N, W), usage (N,), linkage (H, N, N) and precedence (H, N),
    read_weighting (R, N), write_weighting (H, N).

    Returns the state after the step, with reads (R, W), and a dict of the rest.
    """
    usage_epsilon = epsilons.pop("usage_epsilon")
    memory = state["memory"]
    no_mask = np.ones(memory.shape[1])
    read_heads, write_heads = len(terms["free_gate"]), len(terms["write_gate"])
    masks = {
        kind: terms.get(f"{kind}_mask", [no_mask] * heads)
        for kind, heads in (("read", read_heads), ("write", write_heads))
    }

    def by_content(kind, head, memory):
        return masked_content_weighting(
            memory,
            terms[f"{kind}_key"][head],
            terms[f"{kind}_strength"][head],
            masks[kind][head],
            **epsilons,
        )

    psi = retention(terms["free_gate"], state["read_weighting"])
    usage = usage_after(state["usage"], state["write_weighting"], psi)

    allocations, write_contents, write_weighting = [], [], []
    taken = usage
    for h in range(write_heads):
        g_a, g_w = terms["allocation_gate"][h], terms["write_gate"][h]
        a = allocation(taken, usage_epsilon)
        taken = taken + (1.0 - taken) * g_a * g_w * a
        c = by_content("write", h, memory)
        allocations.append(a)
        write_contents.append(c)
        write_weighting.append(g_w * (g_a * a + (1.0 - g_a) * c))

    if deallocation:
        memory = np.array([p * slot for p, slot in zip(psi, memory)])
    memory = write(
        memory, write_weighting, terms["erase_vector"], terms["add_vector"]
    )
    after = {
        "memory": memory,
        "usage": usage,
        "write_weighting": np.array(write_weighting),
    }
    if linkage:
        links, last = state["linkage"], state["precedence"]
        function, more = linkage_after, ()
        if sparse_links is not None:
            function, more = sparse_linkage_after, (sparse_links,)
        after["linkage"] = np.array(
            [
                function(links[h], last[h], write_weighting[h], *more)
                for h in range(write_heads)
            ]
        )
        after["precedence"] = np.array(
            [
                precedence_after(last[h], write_weighting[h])
                for h in range(write_heads)
            ]
        )

    read_contents, read_weighting, reads = [], [], []
    forwards, backwards = [], []
    for r in range(read_heads):
        c = by_content("read", r, memory)
        read_contents.append(c)
        w = c
        if linkage:
            before = state["read_weighting"][r]
            forward = [links @ before for links in after["linkage"]]
            backward = [links.T @ before for links in after["linkage"]]
            if link_sharpening:
                for h in range(write_heads):
                    d = forward[h] ** terms["forward_sharpening"][r, h]
                    forward[h] = d / np.sum(d)
                    d = backward[h] ** terms["backward_sharpening"][r, h]
                    backward[h] = d / np.sum(d)
            modes = [*backward, c, *forward]
            pairs = zip(terms["read_mode"][r], modes, strict=True)
            w = sum(mode * one for mode, one in pairs)
            forwards.append(forward)
            backwards.append(backward)
        read_weighting.append(w)
        reads.append(read(memory, w))
    after["read_weighting"] = np.array(read_weighting)
    after["reads"] = np.array(reads)
    details = {
        "retention": psi,
        "allocation_weighting": allocations,
        "write_content_weighting": write_contents,
        "read_content_weighting": read_contents,
    }
    if linkage:
        details["forward_weighting"] = forwards
        details["backward_weighting"] = backwards
    return after, details


def layer_norm(x, gamma, beta, epsilon=1e-3):
    """x (I,) -> (I,), as Keras's LayerNormalization."""
    variance = np.mean((x - np.mean(x)) ** 2)
    return (x - np.mean(x)) / np.sqrt(variance + epsilon) * gamma + beta


def dnc_sequence(
    x,
    weights,
    *,
    slot_size,
    read_heads,
    write_heads,
    norm_epsilon,
    product_epsilon,
    usage_epsilon,
    initial,
    initial_controllers,
    controller="lstm",
    layers=1,
    share_memory=True,
    linkage=True,
    sparse_links=None,
    content_masks=False,
    deallocation=False,
    link_sharpening=False,
    key_activation=identity,
    add_activation=identity,
    strength=oneplus,
    interface_layer_norm=False,
    activation=identity,
    clip_value=None,
    use_memory=True,
):
    """Runs a Differentiable Neural Computer over x (B, T, D).

    weights: list of one dict a layer, as those of `ntm_sequence`, with gamma
    and beta (I,) where the interface is normalized; the last one has
    output_kernel and output_bias too.
    initial: list of one dict a memory with the fields of `dnc_step` and
    reads, (B, ...) each; initial_controllers: list of one list a layer with
    those of h, c (B, U) that its controller has.

    Returns a dict of arrays (B, T, ...), with "block0/" and so on in front of
    the names where there are several layers.
    """
    x = np.asarray(x, "float64")
    weights = [
        {k: np.asarray(v, "float64") for k, v in one.items()} for one in weights
    ]
    n_reads, n_writes, width = read_heads, write_heads, slot_size
    sections = {
        "read_key": ((n_reads, width), key_activation),
        "read_strength": ((n_reads,), strength),
        "write_key": ((n_writes, width), key_activation),
        "write_strength": ((n_writes,), strength),
        "erase_vector": ((n_writes, width), sigmoid),
        "add_vector": ((n_writes, width), add_activation),
        "free_gate": ((n_reads,), sigmoid),
        "allocation_gate": ((n_writes,), sigmoid),
        "write_gate": ((n_writes,), sigmoid),
    }
    if linkage:
        sections["read_mode"] = ((n_reads, 2 * n_writes + 1), softmax)
    if content_masks:
        sections["read_mask"] = ((n_reads, width), sigmoid)
        sections["write_mask"] = ((n_writes, width), sigmoid)
    if linkage and link_sharpening:
        sections["forward_sharpening"] = ((n_reads, n_writes), oneplus)
        sections["backward_sharpening"] = ((n_reads, n_writes), oneplus)

    trace = []
    for item, sequence in enumerate(x):
        trace.append([])
        states = [
            {k: np.asarray(v[item], "float64") for k, v in one.items()}
            for one in initial
        ]
        carried = [
            [np.asarray(v[item], "float64") for v in one] + [None, None]
            for one in initial_controllers
        ]
        h, c = [one[0] for one in carried], [one[1] for one in carried]
        for x_t in sequence:
            values = {}
            reads = states[-1]["reads"]
            if not use_memory:
                reads = np.zeros(reads.shape)
            out = x_t
            for layer in range(layers):
                memory = 0 if share_memory else layer
                out, h[layer], c[layer] = controller_step(
                    controller,
                    np.concatenate([out, np.ravel(reads)]),
                    h[layer],
                    c[layer],
                    weights[layer],
                )
                inside = {}
                if use_memory:
                    interface = out @ weights[layer]["interface_kernel"]
                    interface = interface + weights[layer]["interface_bias"]
                    if interface_layer_norm:
                        interface = layer_norm(
                            interface,
                            weights[layer]["gamma"],
                            weights[layer]["beta"],
                        )
                    terms = interface_terms(interface, sections)
                    states[memory], inside = dnc_step(
                        terms,
                        states[memory],
                        linkage=linkage,
                        sparse_links=sparse_links,
                        deallocation=deallocation,
                        link_sharpening=link_sharpening,
                        norm_epsilon=norm_epsilon,
                        product_epsilon=product_epsilon,
                        usage_epsilon=usage_epsilon,
                    )
                    inside |= terms
                    reads = states[memory]["reads"]
                inside = {**states[memory], **inside, "controller_output": out}
                prefix = f"block{layer}/" if layers > 1 else ""
                values |= {prefix + k: v for k, v in inside.items()}
            output = np.concatenate([out, np.ravel(reads)])
            output = output @ weights[-1]["output_kernel"]
            output = output + weights[-1]["output_bias"]
            if clip_value is not None:
                output = np.clip(output, -clip_value, clip_value)
            values["output"] = activation(output)
            trace[-1].append(values)
    return stacked(trace)


# Other implementations, with their own names, layouts and conventions, time
# first: x (T, B, D) -> dict of arrays (T, B, ...). Their M is W here.


def time_first(trace):
    return {k: np.swapaxes(v, 0, 1) for k, v in stacked(trace).items()}


def pytorch_ntm(weights, x, kinds):
    """loudinthecloud/pytorch-ntm.

    weights: the state dict of its `NTM`, `memory.mem_bias` as `mem_bias`.
    kinds: "R" or "W" for each head, in the order of its list.
    """
    weights = {k: np.asarray(v, "float64") for k, v in weights.items()}
    memory_0 = weights["mem_bias"]
    slots, width = memory_0.shape
    ends = np.cumsum([width, 1, 1, 3, 1, width])

    def linear(name, values):
        return weights[f"{name}.weight"] @ values + weights[f"{name}.bias"]

    def cosine(a, b):
        norms = [max(np.sqrt(v @ v), 1e-8) for v in (a, b)]
        return a @ b / np.prod(norms)

    trace = []
    for b in range(x.shape[1]):
        trace.append([])
        memory = memory_0
        reads = [weights[f"read{i}_bias"][0] for i in range(kinds.count("R"))]
        h, c = (
            [layer[0] for layer in weights[f"controller.lstm_{state}_bias"]]
            for state in "hc"
        )
        w_prev = [np.zeros(slots) for _ in kinds]
        for x_t in np.asarray(x, "float64")[:, b]:
            out = np.concatenate([x_t, *reads])
            for k in range(len(h)):
                gates = sum(
                    weights[f"controller.lstm.weight_{kind}_l{k}"] @ values
                    + weights[f"controller.lstm.bias_{kind}_l{k}"]
                    for kind, values in (("ih", out), ("hh", h[k]))
                )
                i, f, g, o = np.split(gates, 4)
                c[k] = sigmoid(f) * c[k] + sigmoid(i) * np.tanh(g)
                out = h[k] = sigmoid(o) * np.tanh(c[k])
            reads, values = [], {}
            for index, kind in enumerate(kinds):
                fc = {"R": "read", "W": "write"}[kind]
                key, beta, gate, shift, gamma, e, a = np.split(
                    linear(f"heads.{index}.fc_{fc}", out), ends
                )
                beta, gate = softplus(beta), sigmoid(gate)
                shift, gamma = softmax(shift), 1.0 + softplus(gamma)
                w = w_content = softmax(
                    beta
                    * np.array(
                        [cosine(slot + 1e-16, key + 1e-16) for slot in memory]
                    )
                )
                w = gate * w + (1.0 - gate) * w_prev[index]
                w = np.array(
                    [
                        shift[0] * w[i - 1]
                        + shift[1] * w[i]
                        + shift[2] * w[(i + 1) % slots]
                        for i in range(slots)
                    ]
                )
                w = w**gamma / (np.sum(w**gamma) + 1e-16)
                w_prev[index] = w
                head = {
                    "key": key,
                    "beta": beta,
                    "gate": gate,
                    "shift": shift,
                    "gamma": gamma,
                    "w_content": w_content,
                    "w": w,
                }
                if kind == "R":
                    reads.append(w @ memory)
                else:
                    head["erase"], head["add"] = sigmoid(e), a
                    memory = memory * (1.0 - np.outer(w, sigmoid(e)))
                    memory = memory + np.outer(w, a)
                for name, value in head.items():
                    values[f"head{index}.{name}"] = value
            output = sigmoid(linear("fc", np.concatenate([out, *reads])))
            values |= {"output": output, "memory": memory, "reads": reads}
            trace[-1].append(values)
    return time_first(trace)


def collier_ntm(
    weights,
    x,
    read_heads,
    write_heads,
    shift_range=1,
    init_mode="learned",
    addressing_mode="content_and_location",
    clip_value=20.0,
):
    """MarkPKCollier/NeuralTuringMachine.

    Except for shift_range=0: its code moves the focus by one slot and by two,
    this function by none.

    weights: by their names inside the scope of its cell.
    """
    weights = {k: np.asarray(v, "float64") for k, v in weights.items()}
    heads, shifts = read_heads + write_heads, 2 * shift_range + 1
    cell = "controller/multi_rnn_cell/cell_{}/basic_lstm_cell/{}"
    layers = sum(name.endswith("cell/kernel") for name in weights)

    def learned_init(index):
        return weights[f"init/learned_init_{index}/fully_connected/weights"][0]

    def linear(name, values):
        values = values @ weights[f"{name}/fully_connected/weights"]
        values = values + weights[f"{name}/fully_connected/biases"]
        return np.clip(values, -clip_value, clip_value)

    width, slots = len(learned_init(0)), len(learned_init(read_heads))
    if init_mode == "learned":
        m = np.tanh(learned_init(read_heads + heads).reshape(slots, width))
    else:
        m = weights["init/init_M"]
        m = np.tanh(m) if init_mode == "random" else m
    ends = np.cumsum([width, 1, 1, shifts])
    per_head = width + 1 + 1 + shifts + 1

    def address(parameters, prev_m, prev_w):
        k, beta, g, s, gamma = np.split(parameters, ends)
        k, beta, g, s = np.tanh(k), softplus(beta), sigmoid(g), softmax(s)
        gamma = 1.0 + softplus(gamma)
        similarity = [
            k @ row / (np.sqrt(k @ k) * np.sqrt(row @ row) + 1e-8)
            for row in prev_m
        ]
        w = w_content = softmax(beta * np.array(similarity))
        if addressing_mode == "content_and_location":
            w_g = g * w + (1.0 - g) * prev_w
            w = np.zeros(slots)
            for j in range(-shift_range, shift_range + 1):
                for i in range(slots):
                    w[i] += s[j] * w_g[(i - j) % slots]  # s[-1] is shift -1
            w = w**gamma / np.sum(w**gamma)
        terms = {"key": k, "beta": beta[0], "w_content": w_content, "w": w}
        if addressing_mode == "content_and_location":
            terms |= {"gate": g[0], "shift": s, "gamma": gamma[0]}
        return terms

    trace = []
    for b in range(x.shape[1]):
        trace.append([])
        memory = m
        reads = [np.tanh(learned_init(i)) for i in range(read_heads)]
        w_list = [softmax(learned_init(read_heads + i)) for i in range(heads)]
        units = len(weights[cell.format(0, "bias")]) // 4
        h = [np.zeros(units) for _ in range(layers)]
        c = [np.zeros(units) for _ in range(layers)]
        for x_t in np.asarray(x, "float64")[:, b]:
            out = np.concatenate([x_t, *reads])
            for layer in range(layers):
                gates = np.concatenate([out, h[layer]])
                gates = gates @ weights[cell.format(layer, "kernel")]
                gates = gates + weights[cell.format(layer, "bias")]
                i, j, f, o = np.split(gates, 4)
                kept = sigmoid(f + 1.0) * c[layer]
                c[layer] = kept + sigmoid(i) * np.tanh(j)
                out = h[layer] = sigmoid(o) * np.tanh(c[layer])
            parameters = linear("o2p", out)
            of_heads = np.split(parameters[: heads * per_head], heads)
            erase_add = np.split(
                parameters[heads * per_head :], 2 * write_heads
            )
            values, before = {}, memory
            for k in range(heads):
                head = address(of_heads[k], before, w_list[k])
                w_list[k] = head["w"]
                if k >= read_heads:
                    e, a = erase_add[2 * (k - read_heads) :][:2]
                    head["erase"], head["add"] = sigmoid(e), np.tanh(a)
                    w = head["w"]
                    memory = memory * (1.0 - np.outer(w, head["erase"]))
                    memory = memory + np.outer(w, head["add"])
                for name, value in head.items():
                    values[f"step.head{k}.{name}"] = value
            reads = [w_list[k] @ before for k in range(read_heads)]
            output = linear("o2o", np.concatenate([out, *reads]))
            values |= {"output": output, "step.memory": memory}
            trace[-1].append(values | {"step.reads": reads})
    return time_first(trace)
