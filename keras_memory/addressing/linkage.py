"""Temporal links: which slot was written right after which.

Axes are always batch B, head H, slot N.
"""

import numpy as np
from keras import ops

from keras_memory.addressing.gradients import custom_gradient
from keras_memory.addressing.gradients import saved_value
from keras_memory.addressing.slots import gather
from keras_memory.addressing.slots import inner_products
from keras_memory.addressing.slots import largest
from keras_memory.addressing.slots import outer_write
from keras_memory.addressing.slots import read
from keras_memory.addressing.slots import scatter_add


def _grad_links(grad_links, linkage, precedence, weighting):
    grad_links = _between_slots(grad_links)
    grad_kept_share = grad_links * linkage
    ones = ops.ones_like(precedence)
    return (
        grad_links * _kept_share(weighting),
        inner_products(weighting, grad_links),
        read(grad_links, precedence)
        - read(grad_kept_share, ones)
        - inner_products(ones, grad_kept_share),
    )


@custom_gradient(_grad_links)
def _links(linkage, precedence, weighting):
    """Links after a write, (B H, N, N), with batch and heads in one axis;
    `precedence` and `weighting` are (B H, 1, N)."""
    new = weighting[:, 0, :, None] * precedence
    return _between_slots(_kept_share(weighting) * linkage + new)


def _between_slots(links):
    """Sets the links of slots to themselves to 0."""
    slot = ops.arange(links.shape[-1])
    return ops.where(slot[:, None] != slot, links, 0.0)


def _kept_share(weighting):
    return 1.0 - weighting[:, 0, :, None] - weighting


def linkage_after_write(linkage, precedence, write_weighting):
    """Links each slot to the one written before it.

    Source: Graves et al. 2016, Methods, temporal memory linkage.

    Args:
        linkage: (B, H, N, N); entry i, j says how much slot i was written
            right after slot j. Rows and columns sum to at most 1.
        precedence: (B, H, N) precedence of the step before: how much each slot
            was the last one written.
        write_weighting: (B, H, N) weighting of this step.

    Returns:
        (B, H, N, N) linkage, with a zero diagonal.
    """
    heads, slots = write_weighting.shape[1:]
    linkage = _links(
        ops.reshape(linkage, (-1, slots, slots)),
        ops.reshape(precedence, (-1, 1, slots)),
        ops.reshape(write_weighting, (-1, 1, slots)),
    )
    return ops.reshape(linkage, (-1, heads, slots, slots))


def precedence_after_write(precedence, write_weighting):
    """Updates the precedence: how much each slot was the last one written.

    Source: Graves et al. 2016, Methods, temporal memory linkage.

    Args:
        precedence: (B, H, N) in [0, 1], sums to at most 1 over N.
        write_weighting: (B, H, N) weighting of this step.

    Returns:
        (B, H, N) precedence, in the same range.
    """
    written = ops.sum(write_weighting, axis=-1, keepdims=True)
    return (1.0 - written) * precedence + write_weighting


def _grad_forward_and_backward(upstream, links, weighting):
    grad_forward, grad_backward = ops.split(upstream, 2, axis=1)
    return (
        outer_write(
            ops.concatenate([grad_forward, weighting], axis=1),
            ops.concatenate([weighting, grad_backward], axis=1),
        ),
        inner_products(grad_forward, links) + read(links, grad_backward),
    )


@custom_gradient(_grad_forward_and_backward)
def _forward_and_backward(links, weighting):
    """(B, N, N), (B, R, N) -> (B, 2 R, N), the forward weightings first."""
    return ops.concatenate(
        [read(links, weighting), inner_products(weighting, links)], axis=1
    )


def follow_links(linkage, read_weighting):
    """Moves read weightings along the links.

    The forward weighting is on the slots written right after the slots that
    were read, the backward weighting on those written right before.

    Source: Graves et al. 2016, Methods, temporal memory linkage.

    Args:
        linkage: (B, H, N, N) links of each write head.
        read_weighting: (B, R, N) weighting of the step before.

    Returns:
        Forward and backward weightings, (B, R, H, N) each; they sum to at
        most 1 over N.
    """
    readers, slots = read_weighting.shape[1:]
    writers = linkage.shape[1]
    links = ops.reshape(linkage, (-1, slots, slots))
    weighting = ops.stack([read_weighting] * writers, axis=1)
    weighting = ops.reshape(weighting, (-1, readers, slots))
    weightings = saved_value(_forward_and_backward(links, weighting))
    weightings = ops.reshape(weightings, (-1, writers, 2 * readers, slots))
    return ops.split(ops.swapaxes(weightings, 1, 2), 2, axis=1)


def sparse_linkage_after_write(linkage, columns, precedence, write_weighting):
    """Like `linkage_after_write`, for K entries of each row, in time N K.

    Source: Graves et al. 2016, Methods, sparse link matrix. New links come
    from the K largest entries of write weighting and precedence; each row
    keeps the K largest of its old and new entries. Dropped entries are not
    compensated by normalization, so that with K = N the links are those of
    `linkage_after_write`. The values of entries have a gradient; their choice
    has none. For small K: merging new entries takes K^3.

    Args:
        linkage: (B, H, K, N); entry k, i says how much slot i was written
            right after slot `columns`[k, i]. At least 0; sums over K to at
            most 1.
        columns: (B, H, K, N) whole numbers in [0, N), as floats; the K columns
            of a slot i are distinct. Their gradient is zero.
        precedence: (B, H, N) precedence of the step before: how much each slot
            was the last one written.
        write_weighting: (B, H, N) weighting of this step.

    Returns:
        (B, H, K, N) linkage, and (B, H, K, N) columns.
    """
    heads, entries, slots = linkage.shape[1:]
    # Old links decay.
    at_columns = _at(
        write_weighting, ops.reshape(columns, (-1, heads, entries * slots))
    )
    at_columns = ops.reshape(at_columns, (-1, heads, entries, slots))
    linkage = (1.0 - write_weighting[:, :, None] - at_columns) * linkage
    slot = ops.arange(slots, dtype=ops.dtype(columns))
    linkage = ops.where(columns != slot, linkage, 0.0)
    # New links: (B, H, K rows, K columns).
    rows = _largest_places(write_weighting, entries)
    recent = _largest_places(precedence, entries)
    new = (
        _at(write_weighting, rows)[:, :, :, None]
        * _at(precedence, recent)[:, :, None]
    )
    between = rows[:, :, :, None] != recent[:, :, None]
    new = ops.where(between, new, 0.0)
    # A new link is added to the old one in the same row and column.
    each_entry = ops.repeat(rows[:, :, None], entries, axis=2)
    old = ops.swapaxes(_at(linkage, each_entry), 2, 3)
    old_columns = ops.swapaxes(_at(columns, each_entry), 2, 3)
    same = old_columns[:, :, :, :, None] == recent[:, :, None, None]
    nth = ops.cumsum(ops.cast(same, "int32"), axis=3)
    same = ops.logical_and(same, nth == 1)  # an all-zero state repeats a column
    old = old + ops.sum(ops.where(same, new[:, :, :, None], 0.0), axis=4)
    # The K largest stay. -1 excludes new links that were added to `old`, and
    # links of a slot to itself.
    is_new = ops.logical_and(between, ops.logical_not(ops.any(same, axis=3)))
    candidates = ops.concatenate([old, ops.where(is_new, new, -1.0)], axis=3)
    candidate_columns = ops.concatenate(
        [old_columns, ops.repeat(recent[:, :, None], entries, axis=2)], axis=3
    )
    staying = _largest_places(candidates, entries)
    is_row = _put(ops.ones_like(rows), rows, slots)[:, :, None] > 0

    def with_rows(matrix, values):
        selected = ops.swapaxes(_at(values, staying), 2, 3)
        return ops.where(is_row, _put(selected, each_entry, slots), matrix)

    columns = with_rows(columns, candidate_columns)
    return with_rows(linkage, candidates), ops.stop_gradient(columns)


def follow_sparse_links(linkage, columns, read_weighting):
    """Like `follow_links`, for K entries of each row, in time N K.

    Args:
        linkage, columns: see `sparse_linkage_after_write`.
        read_weighting: (B, R, N) weighting of the step before.

    Returns:
        Forward and backward weightings, (B, R, H, N) each; they sum to at
        most 1 over N.
    """
    entries, slots = linkage.shape[2:]
    weighting = ops.swapaxes(read_weighting, 1, 2)
    heads = weighting.shape[-1]
    forward, backward = [], []
    for head in range(linkage.shape[1]):
        links = linkage[:, head, :, :, None]
        places = ops.reshape(columns[:, head], (-1, entries * slots))
        ahead = ops.reshape(
            gather(weighting, places), (-1, entries, slots, heads)
        )
        forward.append(ops.sum(links * ahead, axis=1))
        back = links * weighting[:, None]
        back = ops.reshape(back, (-1, entries * slots, heads))
        backward.append(scatter_add(back, places, size=slots))
    return tuple(
        ops.transpose(saved_value(ops.stack(weightings, axis=1)), (0, 3, 1, 2))
        for weightings in (forward, backward)
    )


def _largest_places(x, count):
    """Indices of the `count` largest entries of the last axis, as floats."""
    return ops.cast(largest(x, count), ops.dtype(x))


def _at(x, places):
    """Takes the entries of (..., N) at places (..., P): (..., P)."""
    values = gather(
        ops.reshape(x, (-1, x.shape[-1], 1)),
        ops.reshape(places, (-1, places.shape[-1])),
    )
    return ops.reshape(values, (-1, *places.shape[1:]))


def _put(x, places, size):
    """Adds the entries of (..., P) up at places (..., P): (..., size)."""
    count = x.shape[-1]
    sums = scatter_add(
        ops.reshape(x, (-1, count, 1)),
        ops.reshape(places, (-1, count)),
        size=size,
    )
    return ops.reshape(sums, (-1, *x.shape[1:-1], size))


def dense_linkage(linkage, columns):
    """Converts the links of a DNC with `sparse_links` to N x N links.

    Args:
        linkage: (..., N, K) links, from `trace` or a `DNCState`.
        columns: (..., N, K) whole numbers in [0, N), the `link_columns` from
            there.

    Returns:
        (..., N, N) array, 0 where no link is kept, for `plot_linkage`.

    Raises:
        ValueError: the shapes differ.
    """
    linkage, columns = np.asarray(linkage), np.asarray(columns)
    if linkage.shape != columns.shape or linkage.ndim < 2:
        raise ValueError(
            "`linkage` and `columns` must both be (..., N, K). Received: "
            f"linkage.shape={linkage.shape}, columns.shape={columns.shape}"
        )
    slots = linkage.shape[-2]
    dense = np.zeros((*linkage.shape[:-1], slots), linkage.dtype)
    *places, _ = np.indices(linkage.shape, sparse=True)
    np.add.at(dense, (*places, columns.astype("int64")), linkage)
    return dense
