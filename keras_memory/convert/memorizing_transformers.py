"""Converts models of memorizing-transformers-pytorch."""

import math
from collections.abc import Mapping
from typing import Any

from keras_memory.checks import check_bool
from keras_memory.convert.weights import Sizes
from keras_memory.convert.weights import canonical_arrays
from keras_memory.convert.weights import check_shapes
from keras_memory.convert.weights import make_layer
from keras_memory.convert.weights import torch_name
from keras_memory.hints import Array
from keras_memory.memorizing_transformer import MemorizingTransformer

MAX_DISTANCE = 128  # the reference has no argument for it


def from_memorizing_transformers(
    weights: Mapping[str, Array],
    batch_size: int | None = None,
    misplaced_positions: bool = True,
    **model_kwargs: Any,
) -> MemorizingTransformer:
    """Makes a model from weights of memorizing-transformers-pytorch 0.4.1.

    The model computes the same as the reference where the reference finds the
    nearest entries and its memory is not full: when full, that empties it.

    Args:
        weights: dict of arrays, a state dict of `MemorizingTransformer`; names
            may begin with `module.`.
        batch_size: int, B, of a model with a memory of its own; None (default)
            for a model whose `state=` is passed in and out.
        misplaced_positions: bool. True (default): count distances as the
            reference does, which is wrong behind Transformer-XL memory. False:
            count them right, for training on.
        **model_kwargs: arguments of our model that the weights do not
            determine: `memory_size`, `top_k`, `xl_size`, `xl_layers`, `pad_id`,
            `dtype`, ...

    Returns:
        A built `MemorizingTransformer`.

    Raises:
        ValueError: arrays are missing, unexpected or of a wrong shape, or have
            values that are not finite numbers; the weights determine an
            argument.

    Example:

    >>> file = np.load("tests/goldens/mt__transformer_a.npz")
    >>> weights = {
    ...     n.removeprefix("w."): file[n]
    ...     for n in file.files if n.startswith("w.")
    ... }
    >>> model = keras_memory.convert.from_memorizing_transformers(
    ...     weights, memory_size=100, top_k=3, xl_size=4)
    >>> state = model.create_memories(batch_size=2)
    >>> logits, state = model(file["tokens"][:, :5], state=state)
    >>> logits.shape
    TensorShape([2, 5, 11])
    """
    check_bool("misplaced_positions", misplaced_positions)
    weights = canonical_arrays(weights, torch_name)
    sizes = Sizes(weights)
    num_tokens, dim = sizes.of("token_emb.weight", 2)
    table = "rel_pos_bias.relative_attention_bias.weight"
    num_buckets, num_heads = sizes.of(table, 2)
    width, _ = sizes.of("layers.0.0.fn.to_kv.weight", 2)
    hidden, _ = sizes.of("layers.0.1.fn.net.0.weight", 2)
    key_dim, ff_mult = width // 2, hidden // dim
    depth = len({n.split(".")[1] for n in weights if n.startswith("layers.")})
    memorizing_layers = tuple(
        number
        for number in range(1, depth + 1)
        if f"layers.{number - 1}.0.fn.scale" in weights
    )
    gate = "layers.{}.0.fn.output_gate"
    output_gate = any(gate.format(i) in weights for i in range(depth))
    shapes = {
        "token_emb.weight": (num_tokens, dim),
        table: (num_buckets, num_heads),
        f"knn_{table}": (num_buckets, num_heads),
        "to_logits.0.weight": (dim,),
        "to_logits.0.bias": (dim,),
        "to_logits.1.weight": (num_tokens, dim),
        "to_logits.1.bias": (num_tokens,),
    }
    for index in range(depth):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.0.norm.weight": (dim,),
            f"{layer}.0.norm.bias": (dim,),
            f"{layer}.0.fn.to_q.weight": (num_heads * key_dim, dim),
            f"{layer}.0.fn.to_kv.weight": (2 * key_dim, dim),
            f"{layer}.0.fn.to_out.weight": (dim, num_heads * key_dim),
            f"{layer}.1.norm.weight": (dim,),
            f"{layer}.1.norm.bias": (dim,),
            f"{layer}.1.fn.net.0.weight": (ff_mult * dim, dim),
            f"{layer}.1.fn.net.0.bias": (ff_mult * dim,),
            f"{layer}.1.fn.net.3.weight": (dim, ff_mult * dim),
            f"{layer}.1.fn.net.3.bias": (dim,),
        }
        if index + 1 not in memorizing_layers:
            shapes[f"{layer}.0.fn.to_out.bias"] = (dim,)
            continue
        shapes[f"{layer}.0.fn.scale"] = (num_heads, 1, 1)
        if output_gate:
            shapes[gate.format(index)] = (1,)
    check_shapes(weights, shapes, sizes)
    model = make_layer(
        MemorizingTransformer,
        model_kwargs,
        determined={
            "num_tokens": num_tokens,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "key_dim": key_dim,
            "memorizing_layers": memorizing_layers,
            "ff_mult": ff_mult,
            "num_buckets": num_buckets,
            "max_distance": MAX_DISTANCE,
            "output_gate": output_gate,
            "mixing": "joint_softmax",
            "similarity": "cosine",
            "multi_query": True,
            "misplaced_positions": misplaced_positions,
            "stateful": batch_size is not None,
        },
    )
    model.build((batch_size, None))
    _assign(model, weights)
    return model


def _assign(model, weights):
    model.embedding.set_weights([weights["token_emb.weight"]])
    scale = math.sqrt(model.attentions[0].key_dim)  # of the reference's biases
    for bias, name in (
        (model.position_bias, "rel_pos_bias"),
        (model.knn_position_bias, "knn_rel_pos_bias"),
    ):
        table = weights[f"{name}.relative_attention_bias.weight"]
        bias.embeddings.assign(scale * table)
    blocks = model.norms, model.attentions, model.feed_forwards
    for index, (norm, attention, feed_forward) in enumerate(zip(*blocks)):
        layer = f"layers.{index}"
        norm.set_weights(_pair(weights, f"{layer}.0.norm"))
        start = f"{layer}.0.fn"
        key_value = weights[f"{start}.to_kv.weight"].T
        for weight, array in (
            (attention.query_kernel, weights[f"{start}.to_q.weight"].T),
            (attention.key_kernel, key_value[:, : attention.key_dim]),
            (attention.value_kernel, key_value[:, attention.key_dim :]),
            (attention.output_kernel, weights[f"{start}.to_out.weight"].T),
        ):
            weight.assign(array)
        if f"{start}.scale" in weights:
            attention.log_scale.assign(weights[f"{start}.scale"][:, 0, 0])
        else:
            attention.output_bias.assign(weights[f"{start}.to_out.bias"])
        if attention.output_gate:
            attention.gate_of_output.assign(weights[f"{start}.output_gate"][0])
        start = f"{layer}.1"
        feed_forward.set_weights(
            [
                *_pair(weights, f"{start}.norm"),
                *_linear(weights, f"{start}.fn.net.0"),
                *_linear(weights, f"{start}.fn.net.3"),
            ]
        )
    model.final_norm.set_weights(_pair(weights, "to_logits.0"))
    model.to_logits.set_weights(_linear(weights, "to_logits.1"))


def _pair(weights, name):
    return [weights[f"{name}.weight"], weights[f"{name}.bias"]]


def _linear(weights, name):
    return [weights[f"{name}.weight"].T, weights[f"{name}.bias"]]
