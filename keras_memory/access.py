"""What is read and written at the weighted slots of a memory.

Pure functions without weights or state. Axes are always batch B, head H,
slot N, width W.
"""

from keras import ops


def read(memory, weighting):
    """Reads the weighted mean of the slots, one vector a head.

    Source: Graves et al. 2014, eq. 2.

    Args:
        memory: (B, N, W) slot contents.
        weighting: (B, R, N) read weighting.

    Returns:
        (B, R, W) read vectors.
    """
    return ops.matmul(weighting, memory)


def erase_and_add(memory, weighting, erase_vector, add_vector):
    """Writes to the weighted slots: erases first, then adds.

    Source: Graves et al. 2014, eqs. 3-4. With several heads all erase before
    any adds, so that their order does not matter (section 3.2).

    Args:
        memory: (B, N, W) slot contents.
        weighting: (B, H, N) write weighting.
        erase_vector: (B, H, W) in [0, 1], or None to add only; 1 at full
            weighting clears the slot.
        add_vector: (B, H, W); any real value.

    Returns:
        (B, N, W) the memory after the write.
    """
    if erase_vector is not None:
        for head in range(weighting.shape[1]):
            kept = (
                1.0 - weighting[:, head, :, None] * erase_vector[:, head, None]
            )
            memory = memory * kept  # eq. 3
    return memory + ops.matmul(  # eq. 4
        ops.transpose(weighting, (0, 2, 1)), add_vector
    )
