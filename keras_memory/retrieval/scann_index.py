"""Approximate nearest-neighbor search by ScaNN's ops, also in a SavedModel.

Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector
Quantization" (arXiv 1908.10396). ScaNN crashes or returns wrong results on
invalid vectors and sizes, so these are checked before ScaNN is called. Axes: Q
queries, M entries, D width of keys, V width of values, K neighbors.
"""

import contextlib
import functools
import os
import uuid
import weakref
import zlib
from typing import Any
from typing import Unpack

import keras
import numpy as np
from keras import ops

from keras_memory.arguments import Arguments
from keras_memory.arguments import KerasArguments
from keras_memory.checks import check_array
from keras_memory.checks import check_bool
from keras_memory.checks import check_exact
from keras_memory.checks import check_one_of
from keras_memory.checks import check_open
from keras_memory.checks import check_process
from keras_memory.checks import check_size
from keras_memory.hints import Array
from keras_memory.hints import Config
from keras_memory.hints import Shape
from keras_memory.retrieval import tuning
from keras_memory.retrieval.entries import KEY_REMEDY
from keras_memory.retrieval.entries import VALUE_REMEDY
from keras_memory.retrieval.entries import check_bytes_of_entries
from keras_memory.retrieval.entries import check_top_k
from keras_memory.retrieval.entries import check_value_dtype
from keras_memory.retrieval.entries import let_in
from keras_memory.retrieval.entries import of_values
from keras_memory.retrieval.exact import Neighbours
from keras_memory.retrieval.exact import nearest
from keras_memory.retrieval.similarities import SIMILARITIES
from keras_memory.retrieval.similarities import about_middle
from keras_memory.retrieval.similarities import is_sound
from keras_memory.retrieval.similarities import middle
from keras_memory.retrieval.similarities import places_of_sample
from keras_memory.retrieval.similarities import similarity_of
from keras_memory.retrieval.similarities import unit
from keras_memory.retrieval.tuning import best_tree
from keras_memory.retrieval.tuning import candidates
from keras_memory.retrieval.tuning import check_scann
from keras_memory.retrieval.tuning import configured


@keras.saving.register_keras_serializable(package="keras_memory")
class ScannIndex(Arguments, keras.layers.Layer):
    """Finds the nearest of many fixed entries in the graph, by ScaNN's ops.

    For entries that no longer change: kNN language models, Memory Wrap over a
    whole training set. The index, a tree of compressed vectors, is part of a
    SavedModel. ScaNN's candidates are compared exactly with the keys, which are
    weights.

    Where it runs: TensorFlow on a CPU. XLA cannot compile ScaNN's ops, so Keras
    uses `jit_compile=False` for models with this layer, and no gradient flows
    through the choice of entries. A process that loads such a SavedModel, also
    a server, must load the ops first, by `tf.load_op_library` of
    `_scann_ops.so` in the package scann; the stock image of TensorFlow Serving
    lacks them. `exact=True` compares with all entries instead, by stock ops on
    any backend; `export_for_serving(..., exact_search=True)` exports a model
    trained with ScaNN in this way.

    State: non-trainable weights `memory_keys` (M, D), `memory_values` (M, V)
    and `memory_version`, 0 without entries, else a checksum of the keys. A
    `.keras` file stores these weights. The index is rebuilt whenever the keys
    have changed, also after `set_weights`.

    ScaNN compares all entries if there are at most 16,384, or if every tree
    would have to compare a quarter of them or more.

    Args:
        memory_size: int, M, number of entries.
        top_k: int, K, from 1 to M, 10 by default.
        value_dim: int, V, width of values, 0 (default) for none.
        similarity: `"dot"` (default), `"cosine"` or `"l2"`, minus the squared
            distance.
        target_recall: float in (0, 1), 0.95 by default, the recall that trees
            are tuned for.
        exact: bool, False by default; True compares with all entries, without
            ScaNN.
        value_dtype: str, dtype in which values are stored and returned:
            `"int32"` or `"int64"` for integers such as ids, `"float16"`,
            `"bfloat16"`, `"float32"` or `"float64"`; None (default) stores
            them in float32 and returns them in the compute dtype.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        queries: (..., D). A query with a NaN, an infinity or a component
            beyond 1e15 finds nothing.

    Returns:
        `retrieval.Neighbours`. Gradients flow from scores to queries.

    Raises:
        ImportError: ScaNN cannot be imported, and `exact` is False.
        ValueError: an argument out of range, a backend other than TensorFlow
            unless `exact`, entries that are not finite, or a call before
            `set_memory`.

    Example:

    >>> index = ScannIndex(memory_size=3, top_k=2)
    >>> index.set_memory(np.eye(3, dtype="float32"))
    >>> index(np.array([[0.0, 2.0, 1.0]], "float32")).indices
    <tf.Tensor: shape=(1, 2), dtype=int32, numpy=array([[1, 2]], dtype=int32)>
    """

    def __init__(
        self,
        memory_size: int,
        top_k: int = 10,
        value_dim: int = 0,
        similarity: str = "dot",
        target_recall: float = 0.95,
        exact: bool = False,
        value_dtype: str | None = None,
        **kwargs: Unpack[KerasArguments],
    ):
        super().__init__(**kwargs)
        self.memory_size = check_size("memory_size", memory_size)
        self.top_k: int = check_top_k(top_k, memory_size)
        self.value_dim = check_size("value_dim", value_dim, least=0)
        self.similarity = check_one_of("similarity", similarity, SIMILARITIES)
        check_open("target_recall", target_recall)
        self.target_recall = target_recall
        self.exact = check_bool("exact", exact)
        self.value_dtype: str | None = check_value_dtype(value_dtype)
        self.supports_jit = exact
        if not exact:
            check_scann("`ScannIndex`", "Or use `exact=True`")
            if keras.backend.backend() != "tensorflow":
                raise ValueError(
                    "The backend must be TensorFlow, since ScaNN's ops are for "
                    "TensorFlow; or use `exact=True`. Received: "
                    f"KERAS_BACKEND={keras.backend.backend()}"
                )
        self._index = None  # ScaNN's, for `_version` of the memory
        self._version = 0

    def build(self, queries_shape: Shape) -> None:
        key_dim = queries_shape[-1] if len(queries_shape) > 1 else None
        if key_dim is None:
            raise ValueError(
                "`queries` must be (..., D) with a known size D, the width of "
                f"the keys. Received: shape {tuple(queries_shape)}"
            )

        def weight(name, shape, dtype="float32", kind=keras.Variable):
            with keras.name_scope(self.name, caller=self):
                return kind(
                    "zeros",
                    shape=shape,
                    dtype=dtype,
                    trainable=False,
                    autocast=False,
                    name=name,
                )

        slots = [("memory_size", self.memory_size)]
        check_bytes_of_entries(
            slots, key_dim, self.value_dim, "float32", self.value_dtype
        )
        watched = functools.partial(_Watched, self._match_version)
        self.memory_keys = weight(
            "memory_keys", (self.memory_size, key_dim), kind=watched
        )
        self.memory_values = None
        if self.value_dim:
            shape = (self.memory_size, self.value_dim)
            dtype = self.value_dtype or "float32"
            self.memory_values = weight("memory_values", shape, dtype)
        self.memory_version = weight("memory_version", (), "int32", watched)
        self.built = True

    def set_memory(self, keys: Array, values: Array | None = None) -> None:
        """Sets the entries and builds the index (seconds for 100,000 entries).

        A function traced before, such as that of `model.predict`, raises an
        error instead of using the old entries: trace it again, by
        `model.make_predict_function(force=True)`.

        Args:
            keys: (M, D), finite, each component within +-1e15.
            values: (M, V), likewise; None if V is 0.

        Raises:
            ValueError: wrong shapes, or values that are not finite.
        """
        check_process("ScannIndex")
        sizes = {"memory_size": self.memory_size, "value_dim": self.value_dim}
        if self.built:
            sizes["D"] = self.memory_keys.shape[-1]
        keys = check_array(
            "keys",
            keys,
            ("memory_size", "D"),
            sizes,
            dtype="float32",
            remedy=KEY_REMEDY,
        )
        sound = [keys]
        if self.value_dim or values is not None:
            given = values
            values = check_array(
                "values",
                given,
                ("memory_size", "value_dim"),
                sizes,
                **of_values(self.value_dtype, "float32"),
            )
            # Calls return values in this dtype.
            back = self.value_dtype or self.compute_dtype
            check_exact("values", given, back, VALUE_REMEDY)
            sound += [values] if "float" in ops.dtype(values) else []
        if not all(bool(ops.all(is_sound(part))) for part in sound):
            raise ValueError(
                "Entries must be finite and within +-1e15, or products "
                "overflow. Received: NaN, infinity or larger values"
            )
        if not self.built:
            self.build(tuple(keys.shape))
        if self.value_dim:
            self.memory_values.assign(values)
        self.memory_version.assign(0)  # avoids a second checksum
        self.memory_keys.assign(keys)
        self.memory_version.assign(1)
        self._renew()

    def _match_version(self):
        """Sets the version to the keys' checksum, if there are entries."""
        if self.exact or not self.built:
            return
        import tensorflow as tf

        if not tf.executing_eagerly():
            raise ValueError(
                "The weights of a `ScannIndex` must be changed in eager code, "
                "since the index is rebuilt from them. Received: a change "
                "inside a `tf.function`"
            )
        version = int(self.memory_version)
        if version:
            checksum = zlib.crc32(ops.convert_to_numpy(self.memory_keys))
            checksum = max(1, checksum & 0x7FFFFFFF)
            if version != checksum:
                self.memory_version.assign(checksum)

    def _renew(self):
        """Rebuilds the index if the entries have changed.

        Returns:
            bool, whether there are entries.
        """
        with _outside_of_graphs():
            try:
                version = int(self.memory_version)
            except TypeError:  # traced by JAX, which has no index
                return True
            if version != self._version:
                self._version, self._index = version, None
                if version and not self.exact:
                    keys = ops.convert_to_tensor(self.memory_keys)
                    keys = ops.convert_to_numpy(keys)
                    self._index = _Index(
                        keys, self.similarity, self.top_k, self.target_recall
                    )
        return version != 0

    @property
    def is_by_scann(self) -> bool:
        """Whether searches currently use ScaNN."""
        return self._index is not None

    def __call__(self, queries: Array, **named: Any) -> Neighbours:
        check_process("ScannIndex")
        queries = let_in("queries", queries, (None, ..., None))
        return super().__call__(queries, **named)

    def call(self, queries: Array) -> Neighbours:
        queries = self._checked(queries)
        if not self._renew():
            raise ValueError(
                "The index must have entries: call `set_memory`, or load "
                "weights. Received: a call without entries"
            )
        shape = (*ops.shape(queries)[:-1], self.top_k)
        flat = ops.reshape(queries, (-1, queries.shape[-1]))
        sound = is_sound(flat)[:, None]
        flat = ops.where(sound, ops.cast(flat, "float32"), 0.0)
        keys = ops.convert_to_tensor(self.memory_keys)
        with self._current():
            if self._index is None:
                slots, search_scores = self._compare(
                    ops.stop_gradient(flat), keys
                )
            else:
                slots, search_scores = self._index.search(
                    ops.stop_gradient(flat), self.top_k
                )
        keys = ops.take(keys, slots, axis=0)
        scores = similarity_of(flat[:, None], keys, self.similarity)
        if slots.shape[1] != self.top_k:  # more candidates, to pick by score
            scores = ops.where(search_scores > -np.inf, scores, -np.inf)
            search_scores, best = ops.top_k(scores, self.top_k)
            scores = ops.take_along_axis(scores, best, axis=1)
            slots = ops.take_along_axis(slots, best, axis=1)
            keys = ops.take_along_axis(keys, best[..., None], axis=1)
        mask = sound & (search_scores > -np.inf)
        keys = ops.where(mask[..., None], keys, 0)
        if self.value_dim:
            values = ops.take(
                ops.convert_to_tensor(self.memory_values), slots, axis=0
            )
            values = ops.where(mask[..., None], values, 0)
        else:
            values = ops.zeros((*ops.shape(slots), 0))
        return Neighbours(
            ops.reshape(ops.where(mask, scores, -np.inf), shape),
            ops.reshape(ops.where(mask, slots, -1), shape),
            ops.reshape(mask, shape),
            ops.reshape(
                ops.cast(keys, self.compute_dtype), (*shape, keys.shape[-1])
            ),
            ops.reshape(
                ops.cast(values, self.value_dtype or self.compute_dtype),
                (*shape, self.value_dim),
            ),
        )

    def _compare(self, queries, keys):
        bias = None
        if self.similarity == "cosine":
            queries, keys = unit(queries), unit(keys)
        if self.similarity == "l2":
            sample = ops.take(keys, places_of_sample(keys.shape[0]), axis=0)
            queries, keys, bias = about_middle(queries, keys, sample)
        return nearest(queries, keys, self.top_k, bias)[::-1]

    @contextlib.contextmanager
    def _current(self):
        """Raises an error in a graph traced for other entries."""
        if self._index is None:
            yield
            return
        import tensorflow as tf

        check = tf.debugging.assert_equal(
            self.memory_version.value,
            self._version,
            "The entries were changed after this function was traced, so the "
            "function still finds the old ones. Trace it again, for a model by "
            "`model.make_predict_function(force=True)`",
        )
        with tf.control_dependencies([check] if check is not None else []):
            yield

    def _checked(self, queries):
        key_dim = self.memory_keys.shape[-1]
        return check_array("queries", queries, (None, ..., key_dim))

    def compute_output_spec(self, queries: Array) -> Neighbours:
        self._checked(queries)
        shape = (*queries.shape[:-1], self.top_k)
        dtype = self.compute_dtype
        return Neighbours(
            keras.KerasTensor(shape, "float32"),
            keras.KerasTensor(shape, "int32"),
            keras.KerasTensor(shape, "bool"),
            keras.KerasTensor((*shape, queries.shape[-1]), dtype),
            keras.KerasTensor(
                (*shape, self.value_dim), self.value_dtype or dtype
            ),
        )

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self._renew()

    def get_build_config(self) -> Config | None:
        if not self.built:
            return None
        return {"input_shape": (None, self.memory_keys.shape[-1])}

    def build_from_config(self, config: Config) -> None:
        self.build(config["input_shape"])

    def get_config(self) -> Config:
        names = ("memory_size", "top_k", "value_dim", "similarity")
        names += ("target_recall", "exact", "value_dtype")
        config = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **config}


def _outside_of_graphs():
    """A context in which values can be read while a function is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


class _Watched(keras.Variable):
    """A weight that calls a function after each assignment."""

    def __init__(self, changed, *arguments, **options):
        self._changed = changed
        super().__init__(*arguments, **options)

    def assign(self, value):
        value = super().assign(value)
        self._changed()
        return value


class _Index:
    """ScaNN's ops over (M, D) keys, and the tensors from which another process
    restores the index."""

    def __init__(self, keys, similarity, top_k, target_recall):
        from scann.scann_ops.py import scann_ops

        self._negative = similarity == "l2"
        self._similarity = similarity
        self._center = middle(keys[places_of_sample(len(keys))], np)
        vectors = ops.convert_to_numpy(self._prepared(keys))

        def make(leaves, is_hashed):
            builder = scann_ops.builder(
                vectors, 10, tuning.DISTANCES[similarity]
            )
            name = f"keras_memory-{uuid.uuid4()}"
            scann = configured(builder, leaves, is_hashed)
            scann = scann.build(shared_name=name)
            scann.name = name
            # TensorFlow would keep the resource until the process ends.
            destroy = functools.partial(_destroy, scann.searcher_handle)
            weakref.finalize(scann, destroy, os.getpid()).atexit = False
            return _GraphSearcher(scann, is_hashed, self._negative)

        best = None
        if len(keys) > tuning.FLAT:
            queries = vectors[:: -(-len(keys) // tuning.SAMPLE)]
            best = best_tree(
                make,
                vectors,
                "l2" if self._negative else "dot",  # unit vectors, if cosine
                queries,
                top_k,
                target_recall,
                is_hashed=True,
            )
        self.leaves = self.leaves_to_search = None
        searcher = make(None, False)
        if best is not None:
            searcher, self.leaves, self.leaves_to_search = best
        self.is_hashed = searcher.is_hashed
        self.tensors = searcher.scann.serialize_to_module()
        self._scann = searcher.scann  # lives as long as this

    def _prepared(self, vectors):
        if self._similarity == "l2":
            return vectors - self._center
        return unit(vectors) if self._similarity == "cosine" else vectors

    def search(self, queries, top_k):
        """As `Searcher.search`, for tensors."""
        import tensorflow as tf
        from scann.scann_ops.py import scann_ops

        part, scann = self.tensors, self._scann
        if tf.executing_eagerly():
            return self._found_by(scann, queries, top_k)
        # Finds the resource of this name; another process creates it.
        handle = scann_ops.tensors_to_scann(
            part.dataset,
            part.scann_config,
            part.serialized_partitioner,
            part.datapoint_to_token,
            part.ah_codebook,
            part.hashed_dataset,
            part.int8_dataset,
            part.int8_multipliers,
            part.dp_norms,
            shared_name=scann.name,
        )
        return self._found_by(scann_ops.ScannSearcher(handle), queries, top_k)

    def _found_by(self, scann, queries, top_k):
        import tensorflow as tf

        searcher = _GraphSearcher(scann, self.is_hashed, self._negative)
        queries = self._prepared(queries)
        slots, scores = searcher.search(queries, top_k, self.leaves_to_search)
        if self.leaves is None:
            return slots, scores
        # Queries whose leaves hold too few entries search all leaves.
        number = ops.sum(ops.cast(scores > -np.inf, "int32"), axis=-1)

        def search_more():
            few = tf.where(number < top_k)
            given = tf.gather_nd(queries, few)
            more = searcher.search(given, top_k, self.leaves)
            return tuple(
                tf.tensor_scatter_nd_update(before, few, after)
                for before, after in zip((slots, scores), more)
            )

        is_enough = ops.all(number >= top_k)
        return tf.cond(is_enough, lambda: (slots, scores), search_more)


def _destroy(handle, process):
    if os.getpid() != process:  # a fork would hang: no TensorFlow threads
        return
    import tensorflow as tf
    from tensorflow.python.eager import context

    with tf.init_scope():
        tf.raw_ops.DestroyResourceOp(resource=handle)
    context.context().clear_kernel_cache()  # also holds a reference


class _GraphSearcher:
    """`Searcher`, by ScaNN's ops."""

    def __init__(self, scann, is_hashed, negative):
        self.scann, self.is_hashed, self._negative = scann, is_hashed, negative

    def search(self, queries, top_k, leaves_to_search=None):
        """As `Searcher.search`."""
        top_k, reordered = candidates(top_k, self.is_hashed)
        slots, distances = self.scann.search_batched_parallel(
            queries, top_k, reordered, leaves_to_search
        )
        slots = self._as_wide_as(top_k, queries, slots, 0)
        distances = self._as_wide_as(top_k, queries, distances, np.nan)
        if self._negative:
            distances = -distances
        return slots, ops.where(ops.isnan(distances), -np.inf, distances)

    def _as_wide_as(self, top_k, queries, results, filling):
        """(Q, `top_k`) results. ScaNN's are narrower if no query found as many,
        (0, 0) without queries, and have no known shape in a graph."""
        import tensorflow as tf

        if results.shape == (queries.shape[0], top_k):
            return results
        rows = tf.shape(queries)[0]
        width = tf.size(results) // tf.maximum(rows, 1)
        results = tf.reshape(results, (rows, width))
        missing = [[0, 0], [0, top_k - width]]
        results = tf.pad(results, missing, constant_values=filling)
        return tf.ensure_shape(results, (None, top_k))
