"""States: which rows go on, and what a stateful layer carries between calls."""

import keras
from keras import ops


def select(updated, new, old):
    """Takes `new` where `updated`, of its first axes, is True, else `old`."""
    more = len(new.shape) - len(updated.shape)
    return ops.where(updated[(..., *[None] * more)], new, old)


class LayerState(keras.layers.Layer):
    """Holds the state of a stateful layer, apart from its weights.

    Its variables are among the `variables` of the layer that it is an attribute
    of, as those of seeds and metrics are: every backend trains, compiles and
    exports with them. They are not among the `weights`: a stateful layer has
    the weights of a stateless one, and of one of another batch size, and no
    file keeps its state.

    Args:
        variables: list of (name, shape, initializer), the last a function
            (shape, dtype) -> tensor.
        variable_dtype: str, of the variables.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, variables, variable_dtype, **kwargs):
        super().__init__(trainable=False, **kwargs)
        for name, shape, initializer in variables:
            self.add_weight(
                shape=shape,
                initializer=initializer,
                dtype=variable_dtype,
                trainable=False,
                autocast=False,
                name=name,
            )
        self.built = True

    @property
    def weights(self):
        return []

    def save_own_variables(self, store):
        """Saves nothing."""

    def load_own_variables(self, store):
        """Loads nothing."""
