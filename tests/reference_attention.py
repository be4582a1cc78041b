"""NumPy loops of the attention of Memorizing Transformers, written from Wu et
al. 2022, "Memorizing Transformers" (arXiv 2203.08913), section 3, to test the
layer against.

This file imports only NumPy. It takes one batch row, one token and one head at
a time, and computes in float64. It takes complex numbers too, for gradients by
the complex step, and then chooses neighbors by the real parts.

Letters: B batch, T time (the tokens of a segment), H heads, G heads of keys and
values (1 for multi-query attention, else H), D key size, V value size, K
entries that a head retrieves (`top_k`), N entries that memory holds
(`memory_size`), X entries that the XL memory holds (`xl_size`), S columns of a
ready position bias.

An entry is a pair (key (G, D), value (G, V)) of one token. The state of a batch
row is a dict:
- xl: list of at most X entries, the oldest first. These are the latest tokens,
  the memory of Transformer-XL.
- memory: list of at most N entries, the oldest first.
- added: the number of entries that were added to memory since it was cleared.

Where the paper leaves a choice open, or we read it our own way:
- The paper normalizes keys and queries, and leaves the scale of the logits
  open. With similarity "cosine", all logits are cosines times
  exp(log_scale[h]). With "dot", local logits are dot products of vectors that
  are not normalized, divided by sqrt(D). Logits of memory are the same for
  both.
- A vector of zeros stays so when it is normalized.
- The XL memory and memory share no entries: an entry is added to memory when it
  leaves the XL memory. If X is 0, all tokens of a segment are added at its end.
- The XL memory holds keys as local attention uses them, normalized for
  "cosine". Memory holds normalized keys for both.
- Each head searches with its own query. In multi-query attention, all heads
  search the same keys.
- A head uses fewer than K entries if memory has fewer. Its gate is 0 if there
  are none.
- The position bias is added to scaled local logits. Retrieved entries have
  none.
- Distances count tokens without padding. XL entries are in front of the
  segment.
- Buckets are computed in integers. The logarithms of the formula may be rounded
  to the wrong side of an integer.
- The gate is the weight of the memory: g V_m + (1 - g) V_l. The paper's is a
  bias per head ("gate"). Ours, "informed_gate", adds features of what the head
  found: the number of entries / K, the largest cosine, the mean cosine, and the
  mean of log(1 + age) / log(1 + N). An entry's age is the number of entries
  that were added after it.
- "joint_softmax", which is not the paper's, is one softmax over retrieved and
  local entries.
- The output gate, which is not the paper's, multiplies the output after the
  bias is added.
- In the paper, documents start with a segment. Here, they may start at any
  token. The tokens before the start still use the state. The token at the start
  and those after it use nothing older, and nothing older is kept.
- The paper has no gradient through memory. So memory takes the real parts of
  entries. The XL memory takes complex numbers.
- `write=False` neither writes nor clears memory. The XL memory is written and
  cleared as ever, and the entries that leave it are lost.
"""

import numpy as np

COMPLEX_STEP = 1e-30


def as_numbers(array):
    """float64, or complex128 if it was complex."""
    array = np.asarray(array)
    return array.astype(np.result_type(array, "float64"))


def sigmoid(x):
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # no overflow, also for complex x


def softmax(logits):
    """logits: list of numbers -> (len(logits),)."""
    logits = np.array(logits)
    exps = np.exp(logits - np.max(logits.real))
    return exps / np.sum(exps)


def normalized(vector):
    """vector (D,) -> (D,) of length 1, or 0 if it is 0."""
    largest = np.max(np.abs(vector.real))
    if largest == 0.0:
        return np.zeros_like(vector)
    vector = vector / largest  # squares of small numbers would be 0
    return vector / np.sqrt(np.sum(vector * vector))


def each_normalized(vectors):
    """vectors (G, D) -> (G, D)."""
    return np.array([normalized(vector) for vector in vectors])


def position_bucket(distance, buckets, max_distance):
    """Raffel et al. 2020, for keys that are not after the query -> integer.

    Distances below e = buckets // 2 have a bucket each. From there on, buckets
    are e + floor(log(n / e) / log(max_distance / e) * (buckets - e)), up to the
    last one. That floor is the largest k for which
    (max_distance / e)^k <= (n / e)^(buckets - e).
    """
    distance, max_distance = int(distance), int(max_distance)
    exact = buckets // 2
    if distance < exact:
        return distance
    wide = buckets - exact
    k = 0
    while k + 1 < wide and (
        max_distance ** (k + 1) * exact ** (wide - k - 1) <= distance**wide
    ):
        k += 1
    return exact + k


def nearest(cosines, top_k):
    """cosines: list -> list of at most top_k slots, the nearest first."""
    slots = sorted(range(len(cosines)), key=lambda slot: -cosines[slot].real)
    return slots[:top_k]


def bias_by_distance(embeddings, h, distance, max_distance):
    """embeddings (buckets, H) -> scalar."""
    bucket = position_bucket(distance, len(embeddings), max_distance)
    return embeddings[bucket, h]


def weighted(weights, values):
    """weights (n,), values: list of n (V,) -> (V,)."""
    return sum(w * value for w, value in zip(weights, values, strict=True))


def memory_gate(weights, h, cosines, ages, *, mixing, memory_size, top_k):
    """cosines, ages: lists of the retrieved entries of a head -> scalar."""
    if not cosines:
        return 0.0
    logit = weights["gate_bias"][h]
    if mixing == "informed_gate":
        ages = [np.log(1 + age) / np.log(1 + memory_size) for age in ages]
        features = [
            len(cosines) / top_k,
            cosines[0],
            sum(cosines) / len(cosines),
            sum(ages) / len(ages),
        ]
        logit = logit + np.sum(weights["gate_kernel"][h] * np.array(features))
    return sigmoid(logit)


def head_output(
    weights,
    h,
    query,
    local,
    stored,
    *,
    mixing,
    similarity,
    memory_size,
    top_k,
):
    """One token and one head -> (V,).

    query: (D,), not normalized.
    local: list of (key (D,), value (V,), bias) that the token attends to. Keys
        are normalized for "cosine".
    stored: list of (key (D,), value (V,)) that it may retrieve, the oldest
        first, with normalized keys; None for plain attention.
    """
    values = [value for _, value, _ in local]
    if stored is not None:
        direction = normalized(query)
        scale = np.exp(weights["log_scale"][h])
    if stored is not None and similarity == "cosine":
        logits = [
            np.sum(direction * key) * scale + bias for key, _, bias in local
        ]
    else:
        logits = [
            np.sum(query * key) / np.sqrt(len(query)) + bias
            for key, _, bias in local
        ]
    if stored is None:
        return weighted(softmax(logits), values)

    cosines = [np.sum(direction * key) for key, _ in stored]
    slots = nearest(cosines, top_k)
    cosines = [cosines[slot] for slot in slots]
    memory_logits = [cosine * scale for cosine in cosines]
    memory_values = [stored[slot][1] for slot in slots]
    if mixing == "joint_softmax":
        return weighted(softmax(memory_logits + logits), memory_values + values)
    output = weighted(softmax(logits), values)
    if not slots:
        return output
    ages = [len(stored) - 1 - slot for slot in slots]
    gate = memory_gate(
        weights,
        h,
        cosines,
        ages,
        mixing=mixing,
        memory_size=memory_size,
        top_k=top_k,
    )
    memory_output = weighted(softmax(memory_logits), memory_values)
    return gate * memory_output + (1.0 - gate) * output


def row_state_after(
    state, entries, *, forget, xl_size, memory_size, write, memory
):
    """The state of a batch row after a segment.

    entries: those of the segment from its last start on, the oldest first.
    forget: whether the last document started with the segment or in it.
    """
    xl = entries if forget else state["xl"] + entries
    leaving = max(len(xl) - xl_size, 0)
    leaving, xl = xl[:leaving], xl[leaving:]
    if not (memory and write):
        return {**state, "xl": xl}
    leaving = [
        (each_normalized(key.real), np.copy(value.real))
        for key, value in leaving
    ]
    stored = leaving if forget else state["memory"] + leaving
    return {
        "xl": xl,
        "memory": stored[max(len(stored) - memory_size, 0) :],
        "added": len(leaving) + (0 if forget else state["added"]),
    }


def row_attention(
    weights,
    x,
    state,
    valid,
    starts,
    *,
    forget,
    heads,
    key_dim,
    value_dim,
    multi_query,
    xl_size,
    memory_size,
    top_k,
    mixing,
    similarity,
    max_distance,
    position_bias,
    write,
    memory,
):
    """One batch row: x (T, width), valid, starts (T,) -> (T, out), state.

    starts: where documents start.
    forget: whether a document starts with the segment, even if it has no token.
    """
    kv_heads = 1 if multi_query else heads
    steps = len(x)
    outputs = [np.zeros(weights["output_kernel"].shape[1])] * steps
    own = []  # (position, step, entry) of the tokens of the document so far
    document_is_new = forget
    position = 0
    for t in range(steps):
        if not valid[t]:
            continue
        if starts[t]:
            own = []
            document_is_new = True
        queries = (x[t] @ weights["query_kernel"]).reshape(heads, key_dim)
        keys = (x[t] @ weights["key_kernel"]).reshape(kv_heads, key_dim)
        if memory and similarity == "cosine":
            keys = each_normalized(keys)
        values = (x[t] @ weights["value_kernel"]).reshape(kv_heads, value_dim)
        own.append((position, t, (keys, values)))

        xl = [] if document_is_new else state["xl"]
        stored = [] if document_is_new else state["memory"]
        # Positions and steps of XL entries are negative.
        attended = [
            (i - len(xl), i - len(xl), entry) for i, entry in enumerate(xl)
        ] + own
        outputs_of_heads = []
        for h in range(heads):
            g = 0 if multi_query else h
            local = []
            for key_position, step, (entry_keys, entry_values) in attended:
                bias = 0.0
                if position_bias is not None:
                    column = position_bias.shape[2] - steps + step
                    assert column >= 0, "position_bias has too few columns"
                    bias = position_bias[h, t, column]
                elif "embeddings" in weights:
                    bias = bias_by_distance(
                        weights["embeddings"],
                        h,
                        position - key_position,
                        max_distance,
                    )
                local.append((entry_keys[g], entry_values[g], bias))
            outputs_of_heads.append(
                head_output(
                    weights,
                    h,
                    queries[h],
                    local,
                    [(key[g], value[g]) for key, value in stored]
                    if memory
                    else None,
                    mixing=mixing,
                    similarity=similarity,
                    memory_size=memory_size,
                    top_k=top_k,
                )
            )
        output = np.concatenate(outputs_of_heads) @ weights["output_kernel"]
        if "output_bias" in weights:
            output = output + weights["output_bias"]
        if "output_gate" in weights:
            output = output * np.tanh(weights["output_gate"])
        outputs[t] = output
        position += 1
    state = row_state_after(
        state,
        [entry for _, _, entry in own],
        forget=document_is_new,
        xl_size=xl_size,
        memory_size=memory_size,
        write=write,
        memory=memory,
    )
    return np.array(outputs), state


def initial_state(batch):
    """An empty XL memory and memory for each batch row."""
    return [{"xl": [], "memory": [], "added": 0} for _ in range(batch)]


def attention(
    weights,
    x,
    state=None,
    *,
    heads,
    key_dim,
    value_dim,
    multi_query,
    xl_size,
    memory_size=None,
    top_k=None,
    mixing=None,
    similarity=None,
    max_distance=128,
    position_bias=None,
    mask=None,
    clear=None,
    write=True,
    memory=True,
):
    """One segment of all batch rows.

    weights: dict of query_kernel (width, H D), key_kernel (width, G D),
        value_kernel (width, G V), output_kernel (H V, out), and where they are
        used: output_bias (out,), output_gate (), embeddings (buckets, H) of the
        position bias, log_scale (H,), gate_bias (H,), gate_kernel (H, 4).
    x: (B, T, width).
    state: list of the states of batch rows, as `initial_state` makes it, which
        is the default. It is not changed.
    mixing: "gate", "informed_gate" or "joint_softmax".
    similarity: "cosine" or "dot".
    max_distance: that of the buckets of the position bias.
    position_bias: None, or a ready bias (H, T, S) to use instead of embeddings.
        The last T columns are the tokens of the segment, padding included. The
        XL entries are in front of them, the newest next to them.
    mask: None, or (B, T), False at padding. Padding is not attended to, kept or
        counted.
    clear: None; (B, T), True where a document starts, ignored at padding; or
        (B,), True if one starts with the segment, even if that is all padding.
    write: False leaves memory as it is. The XL memory is written anyway.
    memory: False computes plain attention, with dot products divided by
        sqrt(D). It retrieves nothing, and leaves memory as it is.

    Returns (B, T, out), which is 0 at padding, and the state after the segment.
    """
    if memory:
        if mixing not in ("gate", "informed_gate", "joint_softmax"):
            raise ValueError(f"mixing={mixing!r}")
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity={similarity!r}")
    weights = {name: as_numbers(value) for name, value in weights.items()}
    x = as_numbers(x)
    batch, steps, _ = x.shape
    if state is None:
        state = initial_state(batch)
    if position_bias is not None:
        position_bias = as_numbers(position_bias)
    valid = np.ones((batch, steps), bool) if mask is None else np.asarray(mask)
    starts = np.zeros((batch, steps), bool)
    forget = np.zeros(batch, bool)
    if clear is not None:
        clear = np.asarray(clear)
        if clear.ndim == 1:
            forget = clear
        else:
            starts = clear
    outputs, states = [], []
    for b in range(batch):
        output, after = row_attention(
            weights,
            x[b],
            state[b],
            valid[b],
            starts[b],
            forget=bool(forget[b]),
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            multi_query=multi_query,
            xl_size=xl_size,
            memory_size=memory_size,
            top_k=top_k,
            mixing=mixing,
            similarity=similarity,
            max_distance=max_distance,
            position_bias=position_bias,
            write=write,
            memory=memory,
        )
        outputs.append(output)
        states.append(after)
    return np.array(outputs), states


def directional_derivative(
    weights, x, state, upstream, directions, *, position_bias=None, **options
):
    """The derivative of sum(outputs * upstream) along `directions`, a scalar.

    upstream: (B, T, out). Its padding should be 0.
    directions: dict of arrays by names of weights, "x" or "position_bias", each
        of the shape of its array. All are moved at once. For the gradient by
        one number, all others are 0.
    options: as for `attention`.

    The method is the complex step: f'(x) = imag(f(x + ih)) / h, which is exact
    to rounding, because nothing is subtracted. The retrieved entries are held
    fixed, since the real parts do not move.
    """
    arrays = {**weights, "x": x, "position_bias": position_bias}
    for name, direction in directions.items():
        step = COMPLEX_STEP * 1j * np.asarray(direction)
        arrays[name] = np.asarray(arrays[name]) + step
    x, position_bias = arrays.pop("x"), arrays.pop("position_bias")
    outputs, _ = attention(
        arrays, x, state, position_bias=position_bias, **options
    )
    return np.sum(outputs * upstream).imag / COMPLEX_STEP
