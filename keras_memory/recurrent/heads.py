"""Names and weightings of the heads in a trace."""

import math

import numpy as np

HEADS = "write_weighting", "read_weighting"


def by_place(trace):
    """Splits a trace by place: dict from a place, such as "block0" or "", to
    the dict of its entries."""
    places = {}
    for name, values in trace.items():
        place, _, kind = name.rpartition("/")
        places.setdefault(place, {})[kind] = values
    return places


def head_weightings(trace):
    """Names of the write and read weightings in a trace; if it has none, of
    all its weightings."""
    names = [name for name in HEADS if name in trace]
    return names or [name for name in trace if name.endswith("_weighting")]


def heads_of(trace):
    """Weightings of the heads in the trace of one sequence: dict from the
    heads' names, such as "write 0", to (T, N)."""
    every = [named_heads(name, trace) for name in head_weightings(trace)]
    return dict(head for heads in every for head in heads.items())


def named_heads(name, trace):
    """Splits one weighting in the trace of one sequence by head: dict from the
    heads' names to (T, N)."""
    values = np.asarray(trace[name], "float64")
    names = head_names(name, values.shape[1:-1], trace)
    values = values.reshape(len(values), -1, values.shape[-1])
    return dict(zip(names, values.swapaxes(0, 1)))


def head_names(name, shape, trace):
    """Names of the heads of a gate or weighting.

    Args:
        name: str, name of the gate or weighting in the trace.
        shape: its head axes: (), (heads,), (read heads, write heads), or more
            axes, whose indices appear in the names.
        trace: dict; the shapes of its weightings give the number of read and
            write heads.
    """
    word = name.removesuffix("_weighting").removesuffix("_gate")
    word = word.replace("_", " ")
    if len(shape) == 2:
        pairs = np.ndindex(*shape)
        return [f"{word}, read {read}, write {write}" for read, write in pairs]
    heads = [  # for gates of all read and write heads
        f"{kind.removesuffix('_weighting')} {head}"
        for kind in sorted(HEADS)
        if kind in trace
        for head in range(np.prod(np.shape(trace[kind])[1:-1], dtype=int))
    ]
    count = math.prod(shape)
    if len(heads) == count and name not in HEADS:
        return [f"{word}, {head}" for head in heads]
    indices = np.ndindex(*shape or (1,))
    return [f"{word} {', '.join(map(str, index))}" for index in indices]
