"""Training batches, each with a memory beside its inputs."""

import keras
import numpy as np

from keras_memory.checks import check_size


class MemoryBatches(keras.utils.PyDataset):
    """Batches of arrays, each with a memory beside its inputs."""

    def __init__(self, arrays, batch_size, rng, draw):
        super().__init__()
        self.arrays, self.rng, self.draw = arrays, rng, draw
        self.batch_size = check_size("batch_size", batch_size)
        self.order = np.arange(len(arrays[0]))
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index):
        begin = index * self.batch_size
        rows = self.order[begin : begin + self.batch_size]
        x, *rest = (array[rows] for array in self.arrays)
        return (x, self.draw()), *rest

    def on_epoch_end(self):
        if self.rng is not None:
            self.rng.shuffle(self.order)


def with_memories(dataset, draw):
    """Adds a memory beside the inputs of each batch of a `tf.data.Dataset`."""
    import tensorflow as tf

    def memories():
        while True:
            yield draw()

    first = draw()
    drawn = tf.data.Dataset.from_generator(
        memories, output_signature=tf.TensorSpec(first.shape, first.dtype)
    )
    batches = tf.data.Dataset.zip((dataset, drawn))
    batches = batches.map(
        lambda batch, memory: ((batch[0], memory), *batch[1:])
    )
    length = dataset.cardinality()
    if length >= 0:  # infinite and unknown cardinalities are negative
        batches = batches.apply(tf.data.experimental.assert_cardinality(length))
    return batches
