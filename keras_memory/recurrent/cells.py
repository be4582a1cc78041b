"""Controllers that Keras lacks: recurrent cells, and a dense one."""

import keras
from keras import ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_memory.addressing.gradients import activate
from keras_memory.addressing.gradients import linear
from keras_memory.addressing.scaling import at_least_float32
from keras_memory.addressing.scaling import in_range
from keras_memory.arguments import Arguments
from keras_memory.checks import check_bool
from keras_memory.checks import check_bytes
from keras_memory.checks import check_rate
from keras_memory.checks import check_seed
from keras_memory.checks import check_size
from keras_memory.checks import is_number


@keras.saving.register_keras_serializable(package="keras_memory")
class DenseCell(Arguments, DropoutRNNCell, keras.layers.Layer):
    """A dense layer in the form of an RNN cell without state.

    As a cell, a feed-forward controller can be stacked, and has one dropout
    mask for all steps of a sequence, as recurrent controllers have. Use it in
    `MemoryCell` and `StackedRNNCells`; `keras.layers.RNN` alone needs a cell
    with state.

    Args:
        units: int, at least 1; output width.
        activation: Keras activation. Default `"tanh"`.
        kernel_initializer: Keras initializer.
        bias_initializer: Keras initializer.
        dropout: float in [0, 1), dropout rate of the inputs.
        seed: int from 0 to 2^32 - 1, seed of the dropout; or None.
        **kwargs: of `keras.layers.Layer`.

    Raises:
        ValueError: a size or rate is out of range.

    Example:

    >>> cell = keras_memory.controllers.DenseCell(3)
    >>> output, states = cell(np.ones((2, 5), "float32"), [])
    >>> output.shape, states
    (TensorShape([2, 3]), [])
    """

    recurrent_dropout = 0.0

    def __init__(
        self,
        units,
        activation="tanh",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.units = check_size("units", units)
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.dropout = check_rate("dropout", dropout)
        self.seed = check_seed("seed", seed)
        self.seed_generator = keras.random.SeedGenerator(seed_of(seed))
        self.state_size = []
        self.output_size = units

    def build(self, input_shape):
        sizes = ("width", input_shape[-1]), ("units", self.units)
        check_bytes("The kernel", sizes)
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units),
            initializer=self.kernel_initializer,
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(self.units,),
            initializer=self.bias_initializer,
            name="bias",
        )

    def call(self, inputs, states, training=False):
        inputs, _ = _drop(self, inputs, None, training)
        output = linear([inputs], [self.kernel], self.bias)
        return activate(self.activation, output), states

    def get_initial_state(self, batch_size=None):
        return []

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "dropout": self.dropout,
            "seed": self.seed,
        }


class _OneMask(Arguments):
    """A base before a Keras cell: rejects rates that Keras would clamp, and
    uses one dropout mask for all gates."""

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        **kwargs,
    ):
        check_rate("dropout", dropout)
        check_rate("recurrent_dropout", recurrent_dropout)
        for name in ("use_bias", "unit_forget_bias"):
            if name in kwargs:
                check_bool(name, kwargs[name])
        check_units(type(self), "units", units)
        seed = check_seed("seed", seed)
        super().__init__(
            units,
            activation,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            seed=seed_of(seed),
            **kwargs,
        )
        self.seed = seed
        self.dropout_mask_count = None  # LSTMCell may draw one for each gate


@keras.saving.register_keras_serializable(package="keras_memory")
class LayerNormLSTMCell(_OneMask, keras.layers.LSTMCell):
    """LSTM with layer-normalized products and cell state.

    It has the results and the order of weights of
    `tfa.rnn.LayerNormLSTMCell` of tensorflow-addons 0.23.

    Equations (Ba et al. 2016, supplementary material): LN subtracts the mean
    of a vector, divides by its standard deviation, scales by gamma and adds
    beta. Each LN has its own gamma and beta; s is `recurrent_activation`.

        i, f, g, o = split(LN(x_t W) + LN(h_{t-1} U) + b)
        c_t = LN(s(f) c_{t-1} + s(i) activation(g))
        h_t = s(o) activation(c_t)

    Departure: the normalized c_t is carried to the next step, as in
    tensorflow-addons (`test_steps_equal_tensorflow_addons`). The paper carries
    the sum inside its LN, and normalizes for h_t only.

    State: h, c: (B, units) each, 0 at first.

    Masking and dtype: normalizes in float32 at least. While inputs and states
    are exactly 0, each step multiplies gradients by up to 1 / `norm_epsilon`,
    which overflows within 20 steps: mask padding at the start of a sequence.

    Args:
        units: int, at least 1; output width.
        activation: Keras activation. Default `"tanh"`.
        norm_gamma_initializer: Keras initializer of the three gammas.
        norm_beta_initializer: Keras initializer of the three betas.
        norm_epsilon: positive float, added to each variance.
        **kwargs: of `keras.layers.LSTMCell`, with its defaults. `dropout` and
            `recurrent_dropout`, in [0, 1), are the dropout rates of x_t and
            h_{t-1}; the same units are dropped for all gates and all steps.

    Raises:
        ValueError: a size, rate or epsilon is out of range.

    Example:

    >>> cell = keras_memory.controllers.LayerNormLSTMCell(3)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.ones((2, 7, 5), "float32")).shape
    TensorShape([2, 7, 3])

    References:
        Ba, Kiros, Hinton 2016, "Layer Normalization",
        https://arxiv.org/abs/1607.06450
    """

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        norm_gamma_initializer="ones",
        norm_beta_initializer="zeros",
        norm_epsilon=1e-3,
        **kwargs,
    ):
        super().__init__(units, activation, **kwargs)
        _check_epsilon("norm_epsilon", norm_epsilon)
        self.kernel_norm, self.recurrent_norm, self.state_norm = (
            LayerNormalization(
                epsilon=norm_epsilon,
                gamma_initializer=_fresh(norm_gamma_initializer),
                beta_initializer=_fresh(norm_beta_initializer),
                dtype=self.dtype_policy,
                name=name,
            )
            for name in ("kernel_norm", "recurrent_norm", "state_norm")
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.kernel_norm.build((None, 4 * self.units))
        self.recurrent_norm.build((None, 4 * self.units))
        self.state_norm.build((None, self.units))

    def call(self, inputs, states, training=False):
        h, c = states
        x, h = _drop(self, inputs, h, training)
        z = self.kernel_norm(linear([x], [self.kernel]))
        z = z + self.recurrent_norm(linear([h], [self.recurrent_kernel]))
        if self.use_bias:
            z = z + self.bias
        i, f, g, o = ops.split(z, 4, axis=-1)
        i, f, o = map(self.recurrent_activation, (i, f, o))
        c = self.state_norm(f * c + i * self.activation(g))
        h = o * self.activation(c)
        return h, [h, c]

    def get_config(self):
        norm = self.state_norm.get_config()
        return {
            **super().get_config(),
            "norm_gamma_initializer": norm["gamma_initializer"],
            "norm_beta_initializer": norm["beta_initializer"],
            "norm_epsilon": norm["epsilon"],
        }


@keras.saving.register_keras_serializable(package="keras_memory")
class LayerNormSimpleRNNCell(_OneMask, keras.layers.SimpleRNNCell):
    """Simple RNN with a layer-normalized sum of products.

    It has the results and the order of weights of
    `tfa.rnn.LayerNormSimpleRNNCell` of tensorflow-addons 0.23.

    Equations (Ba et al. 2016, eq. 4): LN subtracts the mean of a vector,
    divides by its standard deviation and scales by gamma.

        h_t = activation(LN(x_t W + h_{t-1} U) + b)

    State: h: (B, units), 0 at first.

    Masking and dtype: normalizes in float32 at least. While inputs and state
    are exactly 0, each step multiplies gradients by up to the root of
    1 / `layernorm_epsilon`, which overflows within 20 steps: mask padding at
    the start of a sequence.

    Args:
        units: int, at least 1; output width.
        activation: Keras activation. Default `"tanh"`.
        layernorm_epsilon: positive float, added to the variance.
        gamma_initializer: Keras initializer of gamma.
        gamma_regularizer: Keras regularizer of gamma.
        gamma_constraint: Keras constraint of gamma.
        **kwargs: of `keras.layers.SimpleRNNCell`, with its defaults.
            `dropout` and `recurrent_dropout`, in [0, 1), are the dropout rates
            of x_t and h_{t-1}; the same units are dropped at all steps.

    Raises:
        ValueError: a size, rate or epsilon is out of range.

    Example:

    >>> cell = keras_memory.controllers.LayerNormSimpleRNNCell(3)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.ones((2, 7, 5), "float32")).shape
    TensorShape([2, 7, 3])

    References:
        Ba, Kiros, Hinton 2016, "Layer Normalization",
        https://arxiv.org/abs/1607.06450
    """

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        layernorm_epsilon=1e-5,
        gamma_initializer="ones",
        gamma_regularizer=None,
        gamma_constraint=None,
        **kwargs,
    ):
        super().__init__(units, activation, **kwargs)
        _check_epsilon("layernorm_epsilon", layernorm_epsilon)
        self.layernorm = LayerNormalization(
            epsilon=layernorm_epsilon,
            center=False,  # `bias` does that
            gamma_initializer=gamma_initializer,
            gamma_regularizer=gamma_regularizer,
            gamma_constraint=gamma_constraint,
            dtype=self.dtype_policy,
            name="layernorm",
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.layernorm.build((None, self.units))

    def call(self, inputs, states, training=False):
        (h,) = states
        x, h = _drop(self, inputs, h, training)
        z = linear([x, h], [self.kernel, self.recurrent_kernel])
        z = self.layernorm(z)
        if self.use_bias:
            z = z + self.bias
        h = self.activation(z)
        return h, [h]

    def get_config(self):
        norm = self.layernorm.get_config()
        return {
            **super().get_config(),
            "layernorm_epsilon": norm["epsilon"],
            "gamma_initializer": norm["gamma_initializer"],
            "gamma_regularizer": norm["gamma_regularizer"],
            "gamma_constraint": norm["gamma_constraint"],
        }


@keras.saving.register_keras_serializable(package="keras_memory")
class PeepholeLSTMCell(_OneMask, keras.layers.LSTMCell):
    """LSTM whose gates see the cell state.

    It has the results and the order of weights of
    `tfa.rnn.PeepholeLSTMCell` of tensorflow-addons 0.23.

    Equations (Gers et al. 2002; in this form Sak et al. 2014, eqs. 1-5):
    p_i, p_f and p_o are the peephole weights, one for each unit; s is
    `recurrent_activation`.

        i, f, g, o = split(x_t W + h_{t-1} U + b)
        c_t = s(f + p_f c_{t-1}) c_{t-1} + s(i + p_i c_{t-1}) activation(g)
        h_t = s(o + p_o c_t) activation(c_t)

    Departure: dropout of h_{t-1} drops the same units for all gates;
    tensorflow-addons draws four masks.

    State: h, c: (B, units) each, 0 at first.

    Args:
        units: int, at least 1; output width.
        activation: Keras activation. Default `"tanh"`.
        **kwargs: of `keras.layers.LSTMCell`, with its defaults. `dropout` and
            `recurrent_dropout`, in [0, 1), are the dropout rates of x_t and
            h_{t-1}; the same units are dropped at all steps.
            `kernel_initializer` also draws the peephole weights.

    Raises:
        ValueError: a size or rate is out of range.

    Example:

    >>> cell = keras_memory.controllers.PeepholeLSTMCell(3)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.ones((2, 7, 5), "float32")).shape
    TensorShape([2, 7, 3])

    References:
        Gers, Schraudolph, Schmidhuber 2002, "Learning Precise Timing with
        LSTM Recurrent Networks", JMLR 3,
        https://www.jmlr.org/papers/volume3/gers02a/gers02a.pdf
        Sak, Senior, Beaufays 2014, "Long Short-Term Memory Recurrent Neural
        Network Architectures for Large Scale Acoustic Modeling",
        https://research.google.com/pubs/archive/43905.pdf
    """

    def build(self, input_shape):
        super().build(input_shape)
        self.peepholes = [
            self.add_weight(
                shape=(self.units,),
                initializer=_fresh(self.kernel_initializer),
                name=f"{gate}_gate_peephole_weights",
            )
            for gate in ("input", "forget", "output")
        ]

    def call(self, inputs, states, training=False):
        h, c = states
        z = _summed_products(self, inputs, h, training)
        i, f, g, o = ops.split(z, 4, axis=-1)
        p_i, p_f, p_o = self.peepholes
        i = self.recurrent_activation(i + p_i * c)
        f = self.recurrent_activation(f + p_f * c)
        c = f * c + i * self.activation(g)
        o = self.recurrent_activation(o + p_o * c)
        h = o * self.activation(c)
        return h, [h, c]


@keras.saving.register_keras_serializable(package="keras_memory")
class NASCell(Arguments, DropoutRNNCell, keras.layers.Layer):
    """The recurrent cell found by neural architecture search.

    It has the results and the order of weights of `tfa.rnn.NASCell` of
    tensorflow-addons 0.23.

    Equations (Zoph & Le 2017, the cell of section 4.2): s is the sigmoid.

        x_0, ..., x_7 = split(x_t W)
        h_0, ..., h_7 = split(m_{t-1} U + b)
        z_k = x_k + h_k
        c_t = tanh(tanh(s(z_0) relu(z_1)) + c_{t-1})
              tanh(s(z_2) + relu(x_3 h_3))
        m_t = tanh(c_t tanh(tanh(tanh(z_4) s(z_5)) + s(tanh(z_6) + s(z_7)))) P

    State: c: (B, units), in [-1, 1]; m, the output: (B, projection), or
    (B, units) without P; 0 at first.

    Masking and dtype: on the JAX and NumPy backends `keras.layers.RNN` repeats
    the first state, here c, at masked steps instead of the output. This
    library's layers repeat the output.

    Args:
        units: int, at least 1; width of c.
        projection: int, at least 1, width of the output, which P produces.
            None: there is no P, and the width is `units`.
        use_bias: bool, adds b.
        kernel_initializer: Keras initializer of W.
        recurrent_initializer: Keras initializer of U.
        projection_initializer: Keras initializer of P.
        bias_initializer: Keras initializer of b.
        dropout: float in [0, 1), dropout rate of x_t; the same units are
            dropped at all steps.
        seed: int from 0 to 2^32 - 1, seed of the dropout; or None.
        **kwargs: of `keras.layers.Layer`.

    Raises:
        ValueError: a size or rate is out of range.

    Example:

    >>> cell = keras_memory.controllers.NASCell(11, projection=3)
    >>> layer = keras.layers.RNN(cell, return_sequences=True)
    >>> layer(np.ones((2, 7, 5), "float32")).shape
    TensorShape([2, 7, 3])

    References:
        Zoph, Le 2017, "Neural Architecture Search with Reinforcement
        Learning", https://arxiv.org/abs/1611.01578
    """

    recurrent_dropout = 0.0

    state_names = ("c", "m")

    def __init__(
        self,
        units,
        projection=None,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="glorot_uniform",
        projection_initializer="glorot_uniform",
        bias_initializer="zeros",
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.units = check_size("units", units)
        if projection is not None:
            check_size("projection", projection)
        self.projection = projection
        self.use_bias = check_bool("use_bias", use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.recurrent_initializer = keras.initializers.get(
            recurrent_initializer
        )
        self.projection_initializer = keras.initializers.get(
            projection_initializer
        )
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.dropout = check_rate("dropout", dropout)
        self.seed = check_seed("seed", seed)
        self.seed_generator = keras.random.SeedGenerator(seed_of(seed))
        self.output_size = units if projection is None else projection
        self.state_size = [units, self.output_size]

    def build(self, input_shape):
        outputs = "8 x units", 8 * self.units
        check_bytes("The kernel", [("width", input_shape[-1]), outputs])
        recurrent = "units or projection", self.output_size
        check_bytes("The recurrent weights", [recurrent, outputs])
        self.recurrent_kernel = self.add_weight(
            shape=(self.output_size, 8 * self.units),
            initializer=self.recurrent_initializer,
            name="recurrent_kernel",
        )
        self.kernel = self.add_weight(
            shape=(input_shape[-1], 8 * self.units),
            initializer=self.kernel_initializer,
            name="kernel",
        )
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(8 * self.units,),
                initializer=self.bias_initializer,
                name="bias",
            )
        if self.projection is not None:
            self.projection_weights = self.add_weight(
                shape=(self.units, self.projection),
                initializer=self.projection_initializer,
                name="projection_weights",
            )

    def call(self, inputs, states, training=False):
        c, m = states
        inputs, m = _drop(self, inputs, m, training)
        x = linear([inputs], [self.kernel])
        bias = self.bias if self.use_bias else None
        h = linear([m], [self.recurrent_kernel], bias)
        third = slice(3 * self.units, 4 * self.units)
        product = x[:, third] * h[:, third]
        z = ops.split(x + h, 8, axis=-1)
        tanh, sigmoid, relu = ops.tanh, ops.sigmoid, ops.relu
        c = tanh(tanh(sigmoid(z[0]) * relu(z[1])) + c)
        c = c * tanh(sigmoid(z[2]) + relu(product))
        left = tanh(tanh(z[4]) * sigmoid(z[5]))
        right = sigmoid(tanh(z[6]) + sigmoid(z[7]))
        m = tanh(c * tanh(left + right))
        if self.projection is not None:
            m = linear([m], [self.projection_weights])
        return m, [c, m]

    def get_initial_state(self, batch_size=None):
        return [
            ops.zeros((batch_size, size), dtype=self.compute_dtype)
            for size in self.state_size
        ]

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "projection": self.projection,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "recurrent_initializer": keras.initializers.serialize(
                self.recurrent_initializer
            ),
            "projection_initializer": keras.initializers.serialize(
                self.projection_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "dropout": self.dropout,
            "seed": self.seed,
        }


def _drop(cell, inputs, hidden, training):
    """Applies the dropout masks of `cell` to inputs and hidden state."""
    if training and 0 < cell.dropout < 1:
        inputs = ops.multiply(inputs, cell.get_dropout_mask(inputs))
    if training and 0 < cell.recurrent_dropout < 1:
        hidden = ops.multiply(hidden, cell.get_recurrent_dropout_mask(hidden))
    return inputs, hidden


def _summed_products(cell, inputs, hidden, training):
    """x W + h U + b, with the dropout masks of `cell` on x and h."""
    return linear(
        _drop(cell, inputs, hidden, training),
        [cell.kernel, cell.recurrent_kernel],
        cell.bias,
    )


def _fresh(initializer):
    """Clones an initializer, as one object draws the same numbers each time."""
    initializer = keras.initializers.get(initializer)
    return initializer.clone() if hasattr(initializer, "clone") else initializer


def _check_epsilon(name, value):
    if not is_number(value) or value <= 0:
        raise ValueError(
            f"`{name}` must be positive, so that the normalization of equal "
            f"numbers does not divide by zero. Received: {name}={value!r}"
        )


# Number of recurrent products of a cell; each has (units, units) weights.
PRODUCTS = {
    keras.layers.LSTMCell: 4,
    keras.layers.GRUCell: 3,
    keras.layers.SimpleRNNCell: 1,
}


def check_units(cell, name, units, layers=1):
    """Raises ValueError unless `units` is a size, and the recurrent weights of
    all layers fit into the machine's memory."""
    check_size(name, units)
    for kind, products in PRODUCTS.items():
        if issubclass(cell, kind):
            outputs = f"{products} x {name}", products * units
            sizes = ("layers", layers), (name, units), outputs
            check_bytes("The recurrent weights", sizes)


def check_kernel(controller, width):
    """Raises ValueError unless the input kernel of one of Keras's cells, for
    inputs of this width, fits into the machine's memory."""
    cell = getattr(controller, "cells", [controller])[0]
    for kind, products in PRODUCTS.items():
        if isinstance(cell, kind):
            outputs = f"{products} x units", products * cell.units
            sizes = ("width of input and reads", width), outputs
            check_bytes("The controller's kernel", sizes)


def seed_of(seed, number=0):
    """The seed of a cell's generator, or None for None.

    It differs for each `number`, and is in the range of all backends.
    """
    return None if seed is None else (seed + number) % 2**31


class LayerNormalization(keras.layers.LayerNormalization):
    """Keras's layer normalization of the last axis, for all finite numbers."""

    def call(self, inputs):
        # If the scale is not 1, the epsilon is below the rounding error, so
        # that it need not be scaled.
        wide = ops.cast(inputs, at_least_float32(ops.dtype(inputs)))
        return super().call(in_range(wide, axis=-1)[0])
