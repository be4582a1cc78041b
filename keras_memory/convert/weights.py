"""Names and checks weights of other libraries, and assigns them to layers."""

import keras
import numpy as np

from keras_memory.recurrent import controllers

# The references have no epsilon in their norms, so a zero vector gives NaN.
# This epsilon prevents NaN, and is too small to change other norms.
NORM_EPSILON = 1e-30


def torch_name(name):
    """The name of a weight without the prefix of a wrapper."""
    return name.removeprefix("module.")


def canonical_arrays(weights, canonical_name):
    """The arrays as float64, under their canonical names."""
    if not isinstance(weights, dict):
        raise ValueError(
            "`weights` must be a dict of names and arrays. "
            f"Received: {type(weights).__name__}"
        )
    arrays = {}
    for name, value in weights.items():
        try:
            array = np.asarray(value)
        except Exception:  # a tensor that requires a gradient, ragged rows
            array = np.asarray(None)
        if not isinstance(name, str) or array.dtype.kind not in "fiu":
            raise ValueError(
                "`weights` must have names and NumPy arrays of real numbers. "
                f"Received: {name!r} with {type(value).__name__} of type "
                f"{getattr(value, 'dtype', None)}"
            )
        array = array.astype("float64")
        if not np.isfinite(array).all():
            raise ValueError(
                f"`weights` must be finite. Received: {name!r} with NaN or "
                "infinite values"
            )
        canonical = canonical_name(name)
        if not np.array_equal(arrays.setdefault(canonical, array), array):
            raise ValueError(
                f"`weights` has {canonical!r} several times, with different "
                f"values. Received: {list(weights)}"
            )
    return arrays


class Sizes:
    """Reads sizes from the shapes of the arrays."""

    def __init__(self, weights):
        self.weights = weights
        self.sources = []

    def of(self, name, axes):
        self.sources.append(name)
        if name not in self.weights:
            raise ValueError(
                f"`weights` must have {name!r}. "
                f"Received: {sorted(self.weights)}"
            )
        shape = self.weights[name].shape
        if len(shape) != axes or 0 in shape:
            raise ValueError(
                f"{name!r} must have {axes} axes, none of them empty. "
                f"Received: shape {shape}"
            )
        return shape

    def rest(self, name, axis, known, wanted="inputs"):
        """The size of an axis of a matrix, minus the known part of it. Raises
        ValueError if nothing is left for what is `wanted`."""
        shape = self.of(name, 2)
        if shape[axis] <= known:
            raise ValueError(
                f"Axis {axis} of {name!r} must have more than {known} entries: "
                f"{known} follow from the arguments and the sizes of "
                f"{self.sources[:-1]}, the others are for the {wanted}. "
                f"Received: shape {shape}"
            )
        return shape[axis] - known


def check_shapes(weights, shapes, sizes, hint=""):
    """Raises ValueError, which ends with the hint, unless `weights` has these
    names and shapes, which follow from `sizes`."""
    missing = sorted(set(shapes) - set(weights))
    extra = sorted(set(weights) - set(shapes))
    if missing or extra:
        raise ValueError(
            "`weights` must have the arrays of the reference implementation, "
            f"and no others. Missing: {missing}. Unexpected: {extra}{hint}"
        )
    wrong = [
        f"{name!r} must have shape {shape}. Received: {weights[name].shape}"
        for name, shape in shapes.items()
        if weights[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}. The sizes come from {sizes.sources}{hint}"
        )


def split_columns(columns, *sizes):
    """Splits columns into consecutive parts of these sizes."""
    ends = np.cumsum(sizes)
    return [
        columns[:, end - size : end]
        for end, size in zip(ends, sizes, strict=True)
    ]


def tensorflow_lstm(kernel, bias):
    """Converts weights of a TensorFlow 1 or Sonnet 1 LSTM to Keras's.

    These LSTMs have one matrix for input and hidden state and the gates in the
    order i, candidate, f, o, and add 1 to f.
    """

    def in_order(array):
        i, candidate, f, o = np.split(array, 4, axis=-1)
        return np.concatenate([i, f, candidate, o], axis=-1)

    kernel, bias = in_order(kernel), in_order(bias)
    units = len(bias) // 4
    bias[units : 2 * units] += 1.0
    return [kernel[:-units], kernel[-units:], bias]


# Indices of PyTorch's gates in the order of Keras's, for each RNN module.
TORCH_GATES = {"lstm": [0, 1, 2, 3], "gru": [1, 0, 2], "rnn": [0]}


def torch_layers(weights, name):
    """Number of layers of a recurrent network."""
    return sum(key.startswith(f"{name}.weight_ih_l") for key in weights)


def torch_shapes(name, kind, layers, inputs, units, bias=True):
    """Names and shapes of a PyTorch LSTM, GRU or RNN."""
    gates = len(TORCH_GATES[kind]) * units
    shapes = {}
    for layer in range(layers):
        width = units if layer else inputs
        shapes[f"{name}.weight_ih_l{layer}"] = (gates, width)
        shapes[f"{name}.weight_hh_l{layer}"] = (gates, units)
        if bias:
            shapes[f"{name}.bias_ih_l{layer}"] = (gates,)
            shapes[f"{name}.bias_hh_l{layer}"] = (gates,)
    return shapes


def torch_controller(weights, name, kind, layers, bias=True):
    """Converts weights of a PyTorch LSTM, GRU or RNN to Keras's, by layer."""

    def in_order(array):
        gates = np.split(array, len(TORCH_GATES[kind]))
        return np.concatenate([gates[i] for i in TORCH_GATES[kind]])

    arrays = []
    for layer in range(layers):
        for of in ("ih", "hh"):
            arrays.append(in_order(weights[f"{name}.weight_{of}_l{layer}"]).T)
        if bias:
            of_inputs, of_hidden = (
                in_order(weights[f"{name}.bias_{of}_l{layer}"])
                for of in ("ih", "hh")
            )
            # Keras's GRU needs both biases: its reset gate acts on one.
            biases = np.stack([of_inputs, of_hidden])
            arrays.append(biases if kind == "gru" else biases.sum(axis=0))
    return arrays


def torch_cells(kind, units, layers, nonlinearity, bias, layer_kwargs):
    """A controller like PyTorch's: a name if Keras has the same, or cells."""
    options = {"activation": nonlinearity} if kind == "rnn" else {}
    if bias and options.get("activation") != "relu":
        return kind
    return controllers.get(
        kind,
        units,
        layers,
        layer_kwargs.get("controller_dropout", 0.0),
        layer_kwargs.get("seed"),
        layer_kwargs.get("dtype"),
        use_bias=bias,
        **options,
    )


def torch_linear(weights, name):
    """(U + 1, P): the kernel, and the bias as its last row."""
    kernel = weights[f"{name}.weight"].T
    return np.concatenate([kernel, weights[f"{name}.bias"][None]])


def make_layer(layer_class, layer_kwargs, determined, start=None):
    """Makes a layer, after checking which arguments the user may set."""
    start = start or {}
    for name, value in layer_kwargs.items():
        is_weight = isinstance(value, str) and value in ("learned", "random")
        if name in determined or (name in start and not is_weight):
            wanted = determined.get(name, '"learned" or "random"')
            raise ValueError(
                f"`{name}` must be {wanted}, as the weights determine it. "
                f"Received: {name}={value!r}"
            )
    if issubclass(layer_class, keras.layers.RNN):
        start = {"return_sequences": True, **start}
    return layer_class(**{**start, **determined, **layer_kwargs})


def assign_weights(layer, inputs, controllers, interfaces, output, start=()):
    """Builds the layer and fills its weights.

    Args:
        layer: a `MemoryRNN`.
        inputs: int, width of the inputs.
        controllers: for each block a list of its controller's arrays.
        interfaces: for each block (U + 1, P), the bias as last row.
        output: (F + 1, units), the bias as last row.
        start: list with one array for each state tensor; the arrays of states
            that are not weights are ignored. () if the reference starts with
            zeros: learned initial states then start with zeros.
    """
    cell = layer.cell
    if layer.stateful:  # the states need a batch size
        cell.build((None, inputs))
    else:
        layer.build((None, None, inputs))
    for controller, arrays in zip(
        cell.block_controllers, controllers, strict=True
    ):
        controller.set_weights(arrays)
    for (kernel, bias), array in zip(
        [*cell.interfaces, cell.output_projection],
        [*interfaces, output],
        strict=True,
    ):
        kernel.assign(array[:-1])
        bias.assign(array[-1])
    start = start or [
        np.zeros(spec.shape) if spec.initial == "learned" else weight
        for spec, weight in zip(cell.layout.specs, cell.start_weights)
    ]
    for weight, array in zip(cell.start_weights, start):
        if weight is not None:
            weight.assign(array)
    return layer
