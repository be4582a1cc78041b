"""Heads in a trace: their names, and where they look."""

import math

import numpy as np

HEADS = "write_weighting", "read_weighting"


def by_place(trace):
    """The parts of a trace: dict from a place, such as "block0", or "", to a
    dict of what is there."""
    places = {}
    for name, values in trace.items():
        place, _, kind = name.rpartition("/")
        places.setdefault(place, {})[kind] = values
    return places


def head_weightings(trace):
    """Names in a trace: of where heads write and read, or else of all its
    weightings."""
    names = [name for name in HEADS if name in trace]
    return names or [name for name in trace if name.endswith("_weighting")]


def heads_of(trace):
    """Where heads write and read: dict from "write 0", "read 0", ... to
    (T, N), of a trace of one sequence; of other names all its weightings."""
    every = [named_heads(name, trace) for name in head_weightings(trace)]
    return dict(head for heads in every for head in heads.items())


def named_heads(name, trace):
    """One weighting of a trace of one sequence: dict from the names of its
    heads to (T, N)."""
    values = np.asarray(trace[name], "float64")
    names = head_names(name, values.shape[1:-1], trace)
    values = values.reshape(len(values), -1, values.shape[-1])
    return dict(zip(names, values.swapaxes(0, 1)))


def head_names(name, shape, trace):
    """Names of the heads of a gate or weighting.

    Args:
        name: str, its name in the trace.
        shape: (heads,), (read heads, write heads), or () for one head.
        trace: dict; its weightings tell how many heads read and write.
    """
    word = name.removesuffix("_weighting").removesuffix("_gate")
    word = word.replace("_", " ")
    if len(shape) > 1:
        pairs = np.ndindex(*shape)
        return [f"{word}, read {read}, write {write}" for read, write in pairs]
    heads = [  # as gates and contents of all heads have them
        f"{kind.removesuffix('_weighting')} {head}"
        for kind in sorted(HEADS)
        if kind in trace
        for head in range(np.prod(np.shape(trace[kind])[1:-1], dtype=int))
    ]
    count = math.prod(shape)
    if len(heads) == count and name not in HEADS:
        return [f"{word}, {head}" for head in heads]
    return [f"{word} {head}" for head in range(count)]
