"""NumPy loops of Sparse Access Memory, written from Rae et al. 2016, "Scaling
Memory-Augmented Neural Networks with Sparse Reads and Writes" (arXiv
1610.09027), section 3, to test the layer against.

This file imports nothing from keras_memory. It takes one batch item, one head
and one slot at a time over the whole memory, so nothing in it is sparse.

Letters: B batch, T time, N slots, W slot width, R read heads, K slots that a
head reads (`top_k`). Numbers in brackets are the paper's equations. "Least
recently accessed" is shortened to LRA, as in `lra_slot`.

Where the paper leaves a choice open, or we read it our own way:
- A step writes first, with the read weighting of the step before, and then
  reads the memory after the write: (5) has t - 1, (4) has M_t.
- The paper has one weighting in (5) and in the usage. With several heads, it is
  the mean of theirs.
- The paper names no strength. Here the cosine is multiplied by one per head.
- The softmax is over the K slots only, so their weights sum to 1; weights over
  all slots, cut to the K largest, would not.
- Only written slots are read. A head reads fewer than K slots if fewer are
  written, and gets a zero vector if none is.
- A slot is written from the step on in which it is the LRA slot, also if the
  write gate is 0, because it is set to 0 then; or in which its mean read
  weighting of the step before is above 0, also if the gates let nothing
  through. (Reads are only of written slots, so the second case needs an initial
  read weighting.)
- The LRA slot is the one with the lowest last access; (6) minimizes a usage
  that the text defines as the number of steps since then, which must be meant
  the other way round. Steps count from 1, and 0 stands for no access, for
  unwritten slots and for those that were only ever written with a weight at or
  below the threshold: these tie. The lowest index wins ties.
- An LRA slot whose weights stay at or below the threshold is not accessed, so
  it is the LRA slot of the next step again. (The ring of Supplementary A would
  move on.)
- The write may also add to the LRA slot as a previously read one: it is set to
  0 first.
"""

import functools

import numpy as np
from reference import read
from reference import softmax
from reference import stacked

INTERFACE = (
    "query",
    "strength",
    "word",
    "write_gate",
    "interpolation_gate",
)
COMPLEX_STEP = 1e-30


def cosine(query, slot, norm_epsilon):
    """query, slot (W,) -> scalar."""
    query_norm = np.sqrt(np.sum(query * query) + norm_epsilon)
    slot_norm = np.sqrt(np.sum(slot * slot) + norm_epsilon)
    return np.sum(query * slot) / (query_norm * slot_norm)


def least_recently_accessed(last_access, written):
    """(6): last_access, written (N,) -> slot."""
    lowest = None
    for slot in range(len(last_access)):
        access = last_access[slot] if written[slot] else 0
        if lowest is None or access < lowest[0]:
            lowest = access, slot
    return lowest[1]


def nearest(similarity, written, top_k):
    """similarity, written (N,) -> (K,) slots, the nearest first, then -1s."""
    slots = [slot for slot in range(len(similarity)) if written[slot]]
    # sorted() leaves equal slots in their order.
    slots = sorted(slots, key=lambda slot: -similarity[slot].real)[:top_k]
    return np.array(slots + [-1] * (top_k - len(slots)))


def read_weights_over(positions, similarity, strength):
    """positions (K,), similarity (N,) -> (K,), 0 at positions of -1."""
    weights = np.zeros(len(positions), np.result_type(similarity, strength))
    there = positions >= 0
    if there.any():
        weights[there] = softmax(strength * similarity[positions[there]])
    return weights


def write(interface, state, lra_slot=None):
    """(3), (5): one write of one batch item.

    Returns lra_slot, write_weighting (N,), memory (N, W), written (N,).
    """
    memory, written = state["memory"], state["written"]
    slots = len(memory)
    if lra_slot is None:
        lra_slot = least_recently_accessed(state["last_access"], written)
    lra_slot = int(lra_slot)
    lra = np.eye(slots)[lra_slot]
    previous = np.mean(state["read_weighting"], 0)
    alpha, gamma = interface["write_gate"], interface["interpolation_gate"]
    write_weighting = alpha * (gamma * previous + (1.0 - gamma) * lra)  # (5)
    written = np.array(
        [
            bool(written[slot] or slot == lra_slot or previous[slot].real > 0.0)
            for slot in range(slots)
        ]
    )
    memory = np.array(  # (3)
        [
            (1.0 - lra[slot]) * memory[slot]
            + write_weighting[slot] * interface["word"]
            for slot in range(slots)
        ]
    )
    return lra_slot, write_weighting, memory, written


def content(interface, memory, written, *, top_k, norm_epsilon, positions=None):
    """All heads: similarity (R, N), positions (R, K), weights (R, K)."""
    heads = []
    for head, query in enumerate(interface["query"]):
        cosines = np.array(
            [cosine(query, slot, norm_epsilon) for slot in memory]
        )
        if positions is None:
            slots = nearest(cosines, written, top_k)
        else:
            slots = np.asarray(positions)[head]
        weights = read_weights_over(slots, cosines, interface["strength"][head])
        heads.append((cosines, slots, weights))
    return tuple(np.stack(values) for values in zip(*heads, strict=True))


def scatter(positions, weights, slots):
    """positions (K,), -1 for none, weights (K,) -> weighting (N,)."""
    weighting = np.zeros(slots, weights.dtype)
    for slot, weight in zip(positions, weights, strict=True):
        if slot >= 0:
            weighting[slot] = weight
    return weighting


def accessed(last_access, access, time, access_threshold):
    """last_access, access (N,) -> last_access after the step."""
    return np.array(
        [
            time if access[slot].real > access_threshold else before
            for slot, before in enumerate(last_access)
        ]
    )


def step(
    interface,
    state,
    *,
    top_k,
    access_threshold=0.005,
    norm_epsilon=1e-16,
    choices=None,
):
    """One step of one batch item.

    interface: query (R, W), strength (R,), word (W,), and the scalars
        write_gate (alpha) and interpolation_gate (gamma), all activated.
    state: memory (N, W), read_weighting (R, N) and reads (R, W) of the step
        before, last_access (N,), written (N,), time: steps before this one.
    norm_epsilon: added to each squared norm of a cosine.
    choices: None, or lra_slot and read_positions (R, K) to use instead of the
        own choices.

    Returns the state after the step, and a dict of the values of the step:
    those of the state, and lra_slot, write_weighting (N,), similarity (R, N)
    of all slots, read_positions (R, K) with -1 for none, read_weights (R, K)
    at them, and access (N,), which is compared with the threshold.
    """
    choices = choices or {}
    lra_slot, write_weighting, memory, written = write(
        interface, state, choices.get("lra_slot")
    )
    similarity, read_positions, read_weights = content(
        interface,
        memory,
        written,
        top_k=top_k,
        norm_epsilon=norm_epsilon,
        positions=choices.get("read_positions"),
    )
    read_weighting = np.array(
        [
            scatter(slots, weights, len(memory))
            for slots, weights in zip(read_positions, read_weights, strict=True)
        ]
    )
    access = np.mean(read_weighting, 0) + write_weighting
    time = int(state["time"]) + 1
    state = {
        "memory": memory,
        "read_weighting": read_weighting,
        "reads": np.array([read(memory, w) for w in read_weighting]),  # (4)
        "last_access": accessed(
            state["last_access"], access, time, access_threshold
        ),
        "written": written,
        "time": time,
    }
    values = {
        "lra_slot": lra_slot,
        "write_weighting": write_weighting,
        "similarity": similarity,
        "read_positions": read_positions,
        "read_weights": read_weights,
        "access": access,
    }
    return state, {**state, **values}


def masked_step(state, before, *, top_k):
    """The values of a masked step, which keeps the state.

    before: the values of the step before, or None if this is the first.
    """
    heads, slots = np.shape(state["read_weighting"])
    if before is None:
        before = {
            "read_positions": np.full((heads, top_k), -1),
            "read_weights": np.zeros((heads, top_k)),
        }
    return {
        **state,
        "lra_slot": -1,
        "write_weighting": np.zeros(slots),
        "similarity": np.zeros((heads, slots)),
        "read_positions": before["read_positions"],
        "read_weights": before["read_weights"],
        "access": np.zeros(slots),
    }


def initial_state(batch, memory_slots, slot_size, read_heads):
    """An empty memory: all slots 0 and unwritten."""
    return {
        "memory": np.zeros((batch, memory_slots, slot_size)),
        "read_weighting": np.zeros((batch, read_heads, memory_slots)),
        "reads": np.zeros((batch, read_heads, slot_size)),
        "last_access": np.zeros((batch, memory_slots), "int64"),
        "written": np.zeros((batch, memory_slots), bool),
        "time": np.zeros(batch, "int64"),
    }


def as_numbers(array):
    """float64, or complex128 if it was complex."""
    array = np.asarray(array)
    return array.astype(np.result_type(array, "float64"))


def run_steps(step, masked_step, interfaces, state, mask, choices):
    """All steps of all batch items: `run` with a step of its own.

    step: (interface, state, choices=...) of one batch item -> the state after
        it, and a dict of values.
    masked_step: (state, values of the step before or None) -> dict of values.
    """
    batch, steps = interfaces["query"].shape[:2]
    state = {name: np.asarray(value) for name, value in state.items()}
    state = {
        name: as_numbers(value) if value.dtype.kind in "fc" else value
        for name, value in state.items()
    }
    mask = np.ones((batch, steps), bool) if mask is None else np.asarray(mask)
    trace, ends = [], []
    for b in range(batch):
        trace.append([])
        item = {name: value[b] for name, value in state.items()}
        values = None
        for t in range(steps):
            if mask[b, t]:
                item, values = step(
                    {name: value[b, t] for name, value in interfaces.items()},
                    item,
                    choices=choices
                    and {name: value[b][t] for name, value in choices.items()},
                )
            else:
                values = masked_step(item, values)
            trace[-1].append(values)
        ends.append(item)
    end = {name: np.array([item[name] for item in ends]) for name in state}
    return stacked(trace), end


def run(
    interfaces,
    state=None,
    mask=None,
    *,
    top_k,
    memory_slots=None,
    access_threshold=0.005,
    norm_epsilon=1e-16,
    choices=None,
):
    """All steps of all batch items.

    interfaces: query (B, T, R, W), strength (B, T, R), word (B, T, W),
        write_gate (B, T), interpolation_gate (B, T), all activated.
    state: as `initial_state` makes it, which is the default; needs
        `memory_slots` then.
    mask: None, or (B, T). A masked step, where it is false, keeps the state,
        does not count as a step, and repeats the read of the step before
        (before the first step: `reads` of the state).
    choices: None, or a dict with lra_slot (B, T) and read_positions
        (B, T, R, K) to use instead of the own choices, such as the trace of
        another run.

    Returns a dict of arrays (B, T, ...) with all values that `step` returns,
    and the state after the last step. In masked steps, lra_slot is -1, and
    write_weighting, similarity and access are 0.
    """
    interfaces = {name: as_numbers(interfaces[name]) for name in INTERFACE}
    if state is None:
        batch, _, heads, width = interfaces["query"].shape
        state = initial_state(batch, memory_slots, width, heads)
    return run_steps(
        functools.partial(
            step,
            top_k=top_k,
            access_threshold=access_threshold,
            norm_epsilon=norm_epsilon,
        ),
        functools.partial(masked_step, top_k=top_k),
        interfaces,
        state,
        mask,
        choices,
    )


def loss_gradients(
    interfaces,
    state,
    upstream,
    mask=None,
    *,
    choices=None,
    run=run,
    **options,
):
    """Gradients of sum(reads * upstream), one number at a time.

    upstream: (B, T, R, W).
    choices, options: as for `run`. Without choices, those of a run.
    run: `run`, or that of another model, with its interfaces.

    The slots that are chosen are held fixed. The method is the complex step:
    f'(x) = imag(f(x + ih)) / h, which is exact to rounding for h as small as
    here, because nothing is subtracted; it needs no steps that are small next
    to the norm of a slot, which may be near 0.

    Returns a dict of the gradients by all values of the interfaces, and by
    memory and read_weighting of the state, each of the shape of its values.
    """
    if choices is None:
        choices, _ = run(interfaces, state, mask, **options)
    of = {name: as_numbers(value) for name, value in interfaces.items()}
    of |= {
        name: as_numbers(state[name]) for name in ("memory", "read_weighting")
    }
    gradients = {name: np.zeros(value.shape) for name, value in of.items()}
    for name, gradient in gradients.items():
        for index in np.ndindex(gradient.shape):
            item = slice(index[0], index[0] + 1)  # items are independent
            moved = {n: value[item].astype(complex) for n, value in of.items()}
            moved[name][(0, *index[1:])] += COMPLEX_STEP * 1j
            trace, _ = run(
                {n: moved[n] for n in interfaces},
                {n: moved.get(n, value[item]) for n, value in state.items()},
                None if mask is None else np.asarray(mask)[item],
                choices={n: value[item] for n, value in choices.items()},
                **options,
            )
            loss = np.sum(trace["reads"] * np.asarray(upstream)[item])
            gradient[index] = loss.imag / COMPLEX_STEP
    return gradients
