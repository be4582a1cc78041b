"""Sparse temporal links: which slots were written right after which.

Source: Rae et al. 2016 (arXiv 1610.09027), Supplementary D. Functions without
weights and gradients. Axes are always batch B, slots N, links K that a slot
keeps in each direction, slots P that a step writes to, entries Q of a
precedence.

A link leads from a slot to one that was written after it. The paper has two
matrices with few entries in a row: N has the links of each slot to earlier
slots, and P those to later slots. Here P has no weights of its own: its entries
say where in N a link is, so that a link has one weight.

    slot 7, written after slots 3 and 5     slot 3, written before slot 7
    predecessors  [3,   5  ]                successors  [7 K + 0, -1]
    weights       [0.9, 0.1]                (link 0 of slot 7)
"""

from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_memory.addressing import sparse
from keras_memory.addressing.slots import is_first
from keras_memory.addressing.slots import same_place


class Links(NamedTuple):
    """The links of all slots: states with a row for each slot.

    Args:
        predecessors: (B, N, K) int32, the slots that each slot was written
            after, columns of the paper's N, at most once each; -1 for none.
        weights: (B, N, K) in [0, 1], how much the slot was written right after
            each of them, entries of the paper's N; 0 for none. A row sums to
            at most 1.
        successors: (B, N, K) int32, numbers of links to later slots, columns of
            the paper's P; -1 for none. Number i K + k is the link
            `predecessors[:, i, k]`, which leads to slot i. An entry is void if
            that link starts at another slot now.
    """

    predecessors: Any
    weights: Any
    successors: Any


class Precedence(NamedTuple):
    """How much each slot was the last one written, p.

    Args:
        slots: (B, Q) int32, different slots, then -1 for none.
        weights: (B, Q) in [0, 1]; 0 for none. They sum to at most 1.
    """

    slots: Any
    weights: Any


def precedence_after_write(precedence, slots, weights):
    """Updates the precedence.

    Source: Rae et al. 2016, Supplementary D, eq. 11. The Q largest entries are
    kept.

    Args:
        precedence: `Precedence`.
        slots: (B, P) int32, those that a step writes to. A slot may occur
            several times.
        weights: (B, P), their weights, which sum to at most 1. Those of equal
            slots are summed.

    Returns:
        `Precedence`.
    """
    is_same = same_place(precedence.slots, slots)
    kept = 1.0 - ops.sum(weights, axis=1, keepdims=True)
    kept = kept * precedence.weights
    kept = kept + ops.sum(ops.where(is_same, weights[:, None], 0.0), axis=2)
    is_new = ops.logical_and(
        is_first(slots), ops.logical_not(ops.any(is_same, axis=1))
    )
    new = ops.where(is_new, sparse.sum_over_equal(slots, weights), 0.0)
    count = precedence.slots.shape[1]
    joined = _join(precedence.slots, slots), _join(kept, new)
    is_kept = _strongest(*joined, count)
    return Precedence(
        _first_kept(is_kept, count, joined[0] + 1) - 1,
        _first_kept(is_kept, count, joined[1]),
    )


def links_after_write(links, precedence, slots, weights):
    """Links the slots that a step writes to with those written before.

    Source: Rae et al. 2016, Supplementary D, eqs. 19 and 20. Each slot
    keeps its K strongest links to earlier slots. Of the links so kept, each
    slot also keeps the K strongest to later slots.
    Departure: in the paper P has its own weights. Here a link has one weight,
    that of N: P loses a link that N loses, and a link that P gets back has its
    weight in N.

    Args:
        links: `Links`.
        precedence: the `Precedence` before the step.
        slots: (B, P) int32, as in `precedence_after_write`.
        weights: (B, P), likewise.

    Returns:
        `Links`. The rows of `slots` have changed, and in `successors` those of
        the slots of the precedence.
    """
    if sparse.is_replayed():
        return links
    predecessors, weights = _predecessors_after_write(
        sparse.rows_of(links.predecessors, slots),
        sparse.rows_of(links.weights, slots),
        precedence,
        slots,
        sparse.sum_over_equal(slots, weights),
    )
    links = links._replace(
        predecessors=sparse.with_rows(links.predecessors, slots, predecessors),
        weights=sparse.with_rows(links.weights, slots, weights),
    )
    count = predecessors.shape[2]
    numbers = slots[:, :, None] * count + ops.arange(count, dtype="int32")
    # Where the links of the written slots come from the precedence.
    is_link = same_place(predecessors, precedence.slots[:, None])
    is_once = ops.logical_and(weights > 0.0, is_first(slots)[:, :, None])
    is_link = ops.logical_and(is_link, is_once[..., None])  # (B, P, K, Q)
    new = _sum_where(is_link, numbers[..., None], axis=2)
    new_weights = _sum_where(is_link, weights[..., None], axis=2)
    successors = _successors_after_write(
        links,
        precedence.slots,
        ops.swapaxes(new, 1, 2),
        ops.swapaxes(new_weights, 1, 2),
    )
    return links._replace(successors=successors)


def _predecessors_after_write(before, weights_before, precedence, slots, total):
    """Rows of N after a write: N_t(i, j) = (1 - w(i)) N_{t-1}(i, j) + w(i) p(j)
    (eq. 19). A link keeps its place in the row; new links take the places of
    lost ones.

    Args:
        before, weights_before: (B, P, K), rows of `Links`.
        precedence: `Precedence`, p.
        slots, total: (B, P), the slots i of the rows, and their weights w(i).

    Returns:
        The rows after the write, and their weights.
    """
    count = before.shape[2]
    w, p = total[:, :, None], precedence.weights[:, None]
    is_same = same_place(before, precedence.slots[:, None])  # (B, P, K, Q)
    strengthened = _sum_where(is_same, p[:, :, None], axis=3)
    old = (1.0 - w) * weights_before + w * strengthened
    earlier = ops.repeat(precedence.slots[:, None], slots.shape[1], axis=1)
    is_known = ops.logical_or(
        ops.any(is_same, axis=2), ops.equal(earlier, slots[:, :, None])
    )
    new = ops.where(is_known, 0.0, w * p)
    is_kept = _strongest(_join(before, earlier), _join(old, new), count)
    stays, enters = is_kept[:, :, :count], is_kept[:, :, count:]
    # The first new link takes the first free place, and so on.
    is_free = ops.logical_not(stays)
    takes = ops.logical_and(
        ops.logical_and(is_free[..., None], enters[:, :, None]),
        same_place(_ordinal(is_free), _ordinal(enters)),
    )
    earlier = _sum_where(takes, earlier[:, :, None] + 1, axis=3) - 1
    return (
        ops.where(stays, before, earlier),
        ops.where(stays, old, _sum_where(takes, new[:, :, None], axis=3)),
    )


def _successors_after_write(links, slots, new, new_weights):
    """`Links.successors` after a write.

    Args:
        links: `Links`, of which the other states are those after the write.
        slots: (B, Q), slots of the precedence; -1 for none, which come last.
        new: (B, Q, P), numbers of links from these slots to written ones.
        new_weights: (B, Q, P), their weights; 0 for none.
    """
    # An entry of -1 repeats the first slot with its links, so that equal slots
    # get equal rows.
    is_slot = (slots >= 0)[:, :, None]
    new = ops.where(is_slot, new, new[:, :1])
    new_weights = ops.where(is_slot, new_weights, new_weights[:, :1])
    slots = ops.where(slots >= 0, slots, ops.maximum(slots[:, :1], 0))
    old = sparse.rows_of(links.successors, slots)
    _, old_weights = _links_at(links, old, slots)
    is_known = same_place(new, ops.where(old_weights > 0.0, old, -1))
    new_weights = ops.where(ops.any(is_known, axis=3), 0.0, new_weights)
    joined, count = _join(old, new), old.shape[2]
    is_kept = _strongest(joined, _join(old_weights, new_weights), count)
    return sparse.with_rows(
        links.successors, slots, _first_kept(is_kept, count, joined + 1) - 1
    )


def linked_slots(links, slots):
    """The slots that are linked with others.

    Args:
        links: `Links`.
        slots: (B, P) int32; -1 for none.

    Returns:
        The slots before each, (B, P, K) int32, and the weights of the links;
        the slots after each, and those weights. Without a link the weight is 0.
    """

    def linked():
        rows = ops.maximum(slots, 0)
        before = sparse.rows_of(links.predecessors, rows)
        before_weights = sparse.rows_of(links.weights, rows)
        numbers = sparse.rows_of(links.successors, rows)
        after, after_weights = _links_at(links, numbers, rows)
        is_slot = (slots >= 0)[:, :, None]
        return (
            before,
            ops.where(is_slot, before_weights, 0.0),
            after,
            ops.where(is_slot, after_weights, 0.0),
        )

    return sparse.chosen(linked)


def _links_at(links, numbers, slots):
    """The later slots and weights of links by number.

    Args:
        links: `Links`.
        numbers: (B, P, K), rows of `successors`.
        slots: (B, P), the slots of these rows.

    Returns:
        The slots (B, P, K), and the weights; 0 for void links.
    """
    is_own = ops.equal(
        sparse.entries_of(links.predecessors, numbers), slots[:, :, None]
    )
    is_link = ops.logical_and(numbers >= 0, is_own)
    weights = sparse.entries_of(links.weights, numbers)
    weights = ops.where(is_link, weights, 0.0)
    return numbers // numbers.shape[2], weights


def _strongest(places, weights, count):
    """Which entries of the last axis are the `count` largest, and above 0.

    The first `count` entries were there before, if only as void links. Of equal
    weights these come first, then those of the lowest place.

    Args:
        places: (..., n) int32, at least -1.
        weights: (..., n).
        count: int, at most n.

    Returns:
        (..., n) bool.
    """
    is_old = np.arange(places.shape[-1]) < count
    order = ops.where(is_old, places - np.iinfo("int32").max, places)
    is_larger = weights[..., None, :] > weights[..., None]
    is_equal = ops.equal(weights[..., None, :], weights[..., None])
    is_before = ops.logical_and(
        is_equal, order[..., None, :] < order[..., None]
    )
    rank = _count(ops.logical_or(is_larger, is_before))
    return ops.logical_and(rank < count, weights > 0.0)


def _first_kept(is_kept, count, values):
    """The kept values (..., n) as the first entries of (..., count), then 0."""
    ordinal = np.arange(1, count + 1, dtype="int32")
    is_at = ops.logical_and(
        is_kept[..., None, :],
        ops.equal(_ordinal(is_kept)[..., None, :], ordinal[:, None]),
    )
    return _sum_where(is_at, values[..., None, :], axis=-1)


def _ordinal(is_one):
    """1 for the first True of the last axis, 2 for the second, ..."""
    return ops.cumsum(ops.cast(is_one, "int32"), axis=-1)


def _count(is_one):
    return ops.sum(ops.cast(is_one, "int32"), axis=-1)


def _sum_where(condition, values, axis):
    return ops.sum(ops.where(condition, values, 0), axis=axis)


def _join(a, b):
    return ops.concatenate([a, b], axis=-1)
