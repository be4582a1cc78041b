"""Dropout: one mask for all steps of a sequence."""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.hints import Array
from keras_memory.recurrent import controllers


class SequenceDropout(DropoutRNNCell):
    """The dropout masks of a memory cell, with the methods of Keras's `RNN`.

    `RNN` asks any `DropoutRNNCell` for its masks before the time loop, and
    resets them after it. A memory cell has the masks of its controllers, and
    the bypass mask, for the controller output that bypasses the memory.
    """

    _bypass_mask = None

    def build_dropout(self, widths: Sequence[int]) -> None:
        """Finds the controllers' cells that have dropout.

        Args:
            widths: list of ints, the input width of each block's controller.
        """
        self._dropout_cells = [
            (cell, width)
            for controller, size in zip(self.block_controllers, widths)
            for cell, width in controllers.dropout_cells(controller, size)
            if getattr(cell, "dropout", 1)
            or getattr(cell, "recurrent_dropout", 0)
        ]

    def get_dropout_mask(self, step_input: Array) -> None:
        if self.bypass_dropout:
            self.bypass_mask(step_input)
        for cell, width in self._dropout_cells:
            cell.get_dropout_mask(self._ones(step_input, width))

    def get_recurrent_dropout_mask(self, state: Array) -> None:
        for cell, _ in self._dropout_cells:
            width = (keras.tree.flatten(cell.state_size) or [1])[0]
            cell.get_recurrent_dropout_mask(self._ones(state, width))

    def reset_dropout_mask(self) -> None:
        self._bypass_mask = None
        for cell, _ in self._dropout_cells:
            cell.reset_dropout_mask()

    def reset_recurrent_dropout_mask(self) -> None:
        for cell, _ in self._dropout_cells:
            cell.reset_recurrent_dropout_mask()

    def dropout_masks(self) -> list[tuple[Any, str, Array]]:
        """The current masks, as (cell, attribute, mask)."""
        masks = [(self, "_bypass_mask", self._bypass_mask)]
        for cell, _ in self._dropout_cells:
            if isinstance(cell, SequenceDropout):  # an inner memory cell
                masks += cell.dropout_masks()
                continue
            for name in ("_dropout_mask", "_recurrent_dropout_mask"):
                masks.append((cell, name, getattr(cell, name, None)))
        return [entry for entry in masks if entry[2] is not None]

    @contextlib.contextmanager
    def dropping(self, masks: list[tuple[Any, str, Array]]) -> Iterator[None]:
        """Context whose steps use `masks`, which `dropout_masks` returned."""
        now = [(cell, name, getattr(cell, name)) for cell, name, _ in masks]
        try:
            for cell, name, mask in masks:
                setattr(cell, name, mask)
            yield
        finally:
            for cell, name, mask in now:
                setattr(cell, name, mask)

    def bypass_mask(self, like: Array) -> Array:
        """The bypass mask: (B, F), or (B, 1, F) for sequences; 1 at reads."""
        if self._bypass_mask is None:
            reads = self._ones(like, self.accesses[-1].read_size)
            width = self.features_size - self.accesses[-1].read_size
            mask = keras.random.dropout(
                self._ones(like, width),
                self.bypass_dropout,
                seed=self.seed_generator,
            )
            self._bypass_mask = ops.concatenate([mask, reads], axis=-1)
        mask = self._bypass_mask
        return mask[:, None] if len(like.shape) == 3 else mask

    def _ones(self, like, width):
        return ops.ones((ops.shape(like)[0], width), dtype=self.compute_dtype)
