"""NumPy loops of the Sparse Differentiable Neural Computer, written from Rae et
al. 2016, "Scaling Memory-Augmented Neural Networks with Sparse Reads and
Writes" (arXiv 1610.09027), Supplementary D, to test the layer against.

This file imports nothing from keras_memory. It takes one batch item, one head
and one row at a time over the whole memory, and its links are N x N matrices,
so nothing in it is sparse.

Memory, usage and content reads are SAM's, as the paper says, so their letters
and choices are those of `reference_sam.py`. K_L is the number of entries that a
row of links keeps (`sparse_links`). Numbers in brackets are the paper's
equations.

Who comes after whom:
- forward_links is the paper's N, which approximates the DNC's L:
  forward_links[i, j] is the degree to which i was written after j. Row i has
  the predecessors of i; column j has the successors of j.
- backward_links is the paper's P, which approximates the transpose of L:
  backward_links[i, j] is the degree to which j was written after i. Row i has
  the successors of i; column j has the predecessors of j.
- Both fade with the write weight of the successor only: what is written anew
  loses its predecessors and keeps its successors. Without cuts, each is the
  transpose of the other. Cuts make them differ: forward_links keeps K_L
  predecessors of each slot and any number of successors, backward_links keeps
  K_L successors of each slot and any number of predecessors.
- A forward read from j goes to all successors of j in column j of
  forward_links (21), and a backward read to all predecessors of j in column j
  of backward_links (22). Neither goes along a row.

Where the paper leaves a choice open, or we read it our own way:
- No slot is its own predecessor: (13) has L(i, i) = 0, (19) and (20) do not
  say. The diagonal is set to 0 before rows are cut.
- Rows and precedence keep their largest entries. The paper names their number
  only. Among equal entries, those that were not 0 before the step come first,
  then those of the lower index.
- Precedence is cut after (11), and only cut precedence enters links. The write
  weighting is not cut: it has as many entries as a step writes to. (The paper
  says that p has at most K_L entries as other weight vectors do, and may mean
  this one, too.)
- Links change with the write weighting only: an LRA slot that is written with
  a weight below 1 keeps a part of its links, although its old word is gone.
- Forward and backward reads start from the head's own read weighting of the
  step before, after its cut, and use the links after the write of the step, as
  N_t and P_t in (21) and (22).
- The paper only says that a 3-way softmax selects. As in the DNC, its three
  weights, the read modes, mix the weightings: backward, content, forward.
- The mixture keeps its K largest entries, as in section 3.1, and is not
  normalized again. Forward and backward weightings alone are not cut. The lower
  index comes first among equal entries. Only slots that content or a link
  names are kept, also if their weight is 0 because of a mode of 0.
- Nothing in the paper bounds a forward or backward weighting: column sums of
  both matrices may be above 1, since no link fades when its predecessor is
  written again. So a read weighting may sum to more than 1, and its slots'
  weights may be above 1. Then a write weighting may be, too, which makes 1 - w
  of (11), (19) and (20) negative. `bounded` scales such a weighting down to a
  sum of 1, as the layer does.
- Links to or from unwritten slots are only in an initial state. They stay, but
  an unwritten slot is not read.
- Links and precedence are constants for gradients: the paper passes none
  through the matrices. The other factor of (21) and (22), the previous read
  weighting, has a gradient, as in the DNC.
"""

import functools

import numpy as np
import reference_sam
from reference import read
from reference_sam import accessed
from reference_sam import as_numbers
from reference_sam import content
from reference_sam import run_steps
from reference_sam import scatter
from reference_sam import write

INTERFACE = (*reference_sam.INTERFACE, "read_modes")


def largest(values, count, before):
    """Sets all but the `count` largest entries to 0.

    values, before (N,): the entries after and before an update.
    """
    order = sorted(
        np.flatnonzero(values),
        # sorted() leaves equal entries in their order.
        key=lambda slot: (-values[slot], before[slot] == 0.0),
    )
    kept = np.zeros_like(values)
    kept[order[:count]] = values[order[:count]]
    return kept


def preceded(precedence, write_weighting, sparse_links):
    """(11): precedence, write_weighting (N,) -> (N,)."""
    after = (1.0 - np.sum(write_weighting)) * precedence + write_weighting
    return largest(after, sparse_links, precedence)


def forward_linked(links, precedence, write_weighting, sparse_links):
    """(19): links (N, N), precedence, write_weighting (N,) -> (N, N)."""
    after = np.zeros_like(links)
    for slot, weight in enumerate(write_weighting):
        row = (1.0 - weight) * links[slot] + weight * precedence
        row[slot] = 0.0
        after[slot] = largest(row, sparse_links, links[slot])
    return after


def backward_linked(links, precedence, write_weighting, sparse_links):
    """(20): links (N, N), precedence, write_weighting (N,) -> (N, N)."""
    after = np.zeros_like(links)
    for slot, preceding in enumerate(precedence):
        row = (1.0 - write_weighting) * links[slot]
        row = row + write_weighting * preceding
        row[slot] = 0.0
        after[slot] = largest(row, sparse_links, links[slot])
    return after


def follow(links, weighting, bounded=False):
    """(21), (22): links (N, N), a head's previous weighting (N,) -> (N,)."""
    followed = np.array([np.sum(row * weighting) for row in links])
    total = np.sum(followed)
    return followed / total if bounded and total.real > 1.0 else followed


def kept_slots(mixture, candidates, top_k):
    """mixture (N,), candidates: slots -> (K,), the largest first, then -1s."""
    slots = sorted(candidates, key=lambda slot: (-mixture[slot].real, slot))
    return np.array([*slots, *[-1] * top_k][:top_k])


def step(
    interface,
    state,
    *,
    top_k,
    sparse_links,
    access_threshold=0.005,
    norm_epsilon=1e-16,
    bounded=False,
    choices=None,
):
    """One step of one batch item.

    interface: that of `reference_sam.step`, and read_modes (R, 3), activated,
        for backward, content and forward.
    state: that of `reference_sam.step`, and forward_links (N, N),
        backward_links (N, N), precedence (N,).
    sparse_links: the number of entries that a row of links and the precedence
        keep.
    bounded: whether forward and backward weightings sum to at most 1.
    choices: None, or lra_slot, content_positions (R, K) and read_positions
        (R, K) to use instead of the own choices.

    Returns the state after the step, and a dict of the values of the step:
    those of the state, and lra_slot, write_weighting (N,), similarity (R, N),
    content_positions (R, K) with -1 for none, content_weights (R, K) at them,
    the weightings (R, N) content, backward, forward and mixture, which is
    before its cut, read_positions (R, K) and read_weights (R, K) of its kept
    entries, the largest first, and access (N,).
    """
    choices = choices or {}
    slots, heads = len(state["memory"]), len(interface["query"])

    # Write.
    lra_slot, write_weighting, memory, written = write(
        interface, state, choices.get("lra_slot")
    )

    # Links. The real part is a constant for the complex step.
    before = state["precedence"], write_weighting.real, sparse_links
    forward_links = forward_linked(state["forward_links"], *before)
    backward_links = backward_linked(state["backward_links"], *before)
    precedence = preceded(*before)

    # Read.
    similarity, content_positions, content_weights = content(
        interface,
        memory,
        written,
        top_k=top_k,
        norm_epsilon=norm_epsilon,
        positions=choices.get("content_positions"),
    )
    read_heads = []
    for head in range(heads):
        previous = state["read_weighting"][head]
        weightings = (
            follow(backward_links, previous, bounded),
            scatter(content_positions[head], content_weights[head], slots),
            follow(forward_links, previous, bounded),
        )
        mixture = sum(
            mode * weighting
            for mode, weighting in zip(
                interface["read_modes"][head], weightings, strict=True
            )
        )
        if "read_positions" in choices:
            positions = np.asarray(choices["read_positions"][head])
        else:
            candidates = [
                slot
                for slot in range(slots)
                if written[slot] and any(w[slot] != 0.0 for w in weightings)
            ]
            positions = kept_slots(mixture, candidates, top_k)
        weights = np.where(positions < 0, 0.0, mixture[positions])
        read_weighting = scatter(positions, weights, slots)
        read_heads.append(
            {
                **dict(zip(("backward", "content", "forward"), weightings)),
                "mixture": mixture,
                "read_positions": positions,
                "read_weights": weights,
                "read_weighting": read_weighting,
                "reads": read(memory, read_weighting),  # (4)
            }
        )
    reads = {
        name: np.array([values[name] for values in read_heads])
        for name in read_heads[0]
    }

    # Usage.
    access = np.mean(reads["read_weighting"], 0) + write_weighting
    time = int(state["time"]) + 1
    state = {
        "memory": memory,
        "read_weighting": reads["read_weighting"],
        "reads": reads["reads"],
        "last_access": accessed(
            state["last_access"], access, time, access_threshold
        ),
        "written": written,
        "time": time,
        "forward_links": forward_links,
        "backward_links": backward_links,
        "precedence": precedence,
    }
    values = {
        "lra_slot": lra_slot,
        "write_weighting": write_weighting,
        "similarity": similarity,
        "content_positions": content_positions,
        "content_weights": content_weights,
        "access": access,
    }
    return state, {**reads, **values, **state}


def masked_step(state, before, *, top_k):
    """The values of a masked step, which keeps the state.

    before: the values of the step before, or None if this is the first.
    """
    values = reference_sam.masked_step(state, before, top_k=top_k)
    heads, slots = np.shape(state["read_weighting"])
    return {
        **values,
        "content_positions": np.full((heads, top_k), -1),
        "content_weights": np.zeros((heads, top_k)),
        **{
            name: np.zeros((heads, slots))
            for name in ("backward", "content", "forward", "mixture")
        },
    }


def initial_state(batch, memory_slots, slot_size, read_heads):
    """An empty memory without links: (10), (17), (18)."""
    return {
        **reference_sam.initial_state(
            batch, memory_slots, slot_size, read_heads
        ),
        "forward_links": np.zeros((batch, memory_slots, memory_slots)),
        "backward_links": np.zeros((batch, memory_slots, memory_slots)),
        "precedence": np.zeros((batch, memory_slots)),
    }


def run(
    interfaces,
    state=None,
    mask=None,
    *,
    top_k,
    sparse_links,
    memory_slots=None,
    access_threshold=0.005,
    norm_epsilon=1e-16,
    bounded=False,
    choices=None,
):
    """All steps of all batch items.

    interfaces: those of `reference_sam.run`, and read_modes (B, T, R, 3).
    state: as `initial_state` makes it, which is the default; needs
        `memory_slots` then.
    mask: None, or (B, T), as for `reference_sam.run`.
    choices: None, or a dict with lra_slot (B, T), content_positions
        (B, T, R, K) and read_positions (B, T, R, K) to use instead of the own
        choices, such as the trace of another run.

    Returns a dict of arrays (B, T, ...) with all values that `step` returns,
    and the state after the last step. In masked steps, lra_slot and
    content_positions are -1, and all other values are 0, except for those of
    the state, read_positions and read_weights.
    """
    interfaces = {name: as_numbers(interfaces[name]) for name in INTERFACE}
    if state is None:
        batch, _, heads, width = interfaces["query"].shape
        state = initial_state(batch, memory_slots, width, heads)
    return run_steps(
        functools.partial(
            step,
            top_k=top_k,
            sparse_links=sparse_links,
            access_threshold=access_threshold,
            norm_epsilon=norm_epsilon,
            bounded=bounded,
        ),
        functools.partial(masked_step, top_k=top_k),
        interfaces,
        state,
        mask,
        choices,
    )


def loss_gradients(interfaces, state, upstream, mask=None, **options):
    """Gradients of sum(reads * upstream), as `reference_sam.loss_gradients`.

    upstream: (B, T, R, W). options: as for `run`.

    The slots that are chosen and the links are held fixed.

    Returns a dict of the gradients by all values of the interfaces, and by
    memory and read_weighting of the state, each of the shape of its values.
    Those by read_modes take the three modes as independent.
    """
    return reference_sam.loss_gradients(
        interfaces, state, upstream, mask, run=run, **options
    )
