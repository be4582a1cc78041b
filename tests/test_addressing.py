"""Tests of `addressing`, which computes where to read and write."""

import harness
import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_memory import addressing as on_tensors
from keras_memory.addressing.content import NORM_EPSILON
from keras_memory.addressing.location import SHARPENING_EPSILON

pytestmark = pytest.mark.every_backend

addressing = harness.on_arrays(on_tensors)
BATCH, HEADS, SLOTS, WIDTH = 2, 3, 7, 5

needs_float64 = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="compares in float64, which the TensorFlow backend computes in",
)
needs_gradients = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="takes gradients with TensorFlow's GradientTape",
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def weightings(rng, heads=HEADS, slots=SLOTS):
    return reference.softmax(2 * rng.normal(size=(BATCH, heads, slots)))


def loop(function, *arrays):
    """Applies an oracle to each batch item and head, and stacks the results."""
    return np.array(
        [
            [
                function(*(a[item, head] for a in arrays))
                for head in range(arrays[0].shape[1])
            ]
            for item in range(arrays[0].shape[0])
        ]
    )


def close(actual, expected, tolerance):
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def is_weighting(value, tolerance=1e-6):
    value = ops.convert_to_numpy(value)
    assert np.isfinite(value).all() and (value >= 0).all()
    close(value.sum(-1), np.ones(value.shape[:-1]), tolerance)


# Against the oracle, in float64.


@needs_float64
@pytest.mark.parametrize(
    ("norm_epsilon", "product_epsilon"),
    [(0.0, 0.0), (1e-16, 0.0), (0.7, 0.0), (0.0, 0.3), (0.7, 0.3)],
)
def test_content_weighting_equals_the_oracle(
    rng, norm_epsilon, product_epsilon
):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS))
    keys = rng.normal(size=(BATCH, HEADS, WIDTH))
    strengths = rng.uniform(0.1, 9.0, size=(BATCH, HEADS))
    epsilons = (norm_epsilon, product_epsilon)
    similarity = addressing.cosine_similarity(memory, keys, *epsilons)
    weighting = addressing.content_weighting(memory, keys, strengths, *epsilons)
    for item in range(BATCH):
        for head in range(HEADS):
            key = keys[item, head]
            close(
                similarity[item, head],
                [
                    reference.cosine_similarity(key, slot, *epsilons)
                    for slot in memory[item].T
                ],
                1e-12,
            )
            close(
                weighting[item, head],
                reference.content_weighting(
                    memory[item].T, key, strengths[item, head], *epsilons
                ),
                1e-12,
            )


@needs_float64
def test_interpolate_equals_the_oracle(rng):
    content, previous = weightings(rng), weightings(rng)
    gate = rng.uniform(size=(BATCH, HEADS))
    close(
        addressing.interpolate(content, previous, gate),
        loop(reference.interpolate, content, previous, gate),
        1e-12,
    )


@needs_float64
@pytest.mark.parametrize("shift_range", [0, 1, 2, 3])
def test_shift_equals_the_oracle(rng, shift_range):
    weighting = weightings(rng)
    shifts = weightings(rng, slots=2 * shift_range + 1)
    close(
        addressing.shift(weighting, shifts),
        loop(reference.circular_shift, weighting, shifts),
        1e-12,
    )


@needs_float64
def test_sharpen_equals_the_oracle(rng):
    weighting = weightings(rng)
    weighting[0, 0, :3] = 0.0
    sharpening = rng.uniform(1.0, 5.0, size=(BATCH, HEADS))
    close(
        addressing.sharpen(weighting, sharpening),
        loop(
            lambda w, gamma: reference.sharpen(
                w, gamma, SHARPENING_EPSILON["float64"]
            ),
            weighting,
            sharpening,
        ),
        1e-12,
    )


def test_oneplus_equals_the_oracle_and_is_at_least_1():
    x = np.array([-800.0, -1.0, 0.0, 1.0, 800.0], "float32")
    close(addressing.oneplus(x), reference.oneplus(x.astype("float64")), 1e-4)
    assert (ops.convert_to_numpy(addressing.oneplus(x)) >= 1).all()
    close(addressing.oneplus(0.0 * x), np.full(5, 1.0 + np.log(2.0)), 1e-6)


# Two slots, computed by hand.


def test_two_slots_match_values_computed_by_hand():
    memory = np.array([[[2.0, 0.0], [0.0, 3.0]]], "float32")
    key = np.array([[[5.0, 0.0]]], "float32")
    strength = np.array([[np.log(3.0)]], "float32")
    # The angles are 0 and a quarter turn: similarities 1 and 0.
    similarity = addressing.cosine_similarity(memory, key, 0.0)
    close(similarity, [[[1.0, 0.0]]], 1e-6)
    # exp(ln 3 * 1) : exp(ln 3 * 0) = 3 : 1.
    content = addressing.content_weighting(memory, key, strength, 0.0)
    close(content, [[[3 / 4, 1 / 4]]], 1e-6)
    # A third of that, two thirds of the previous (0, 1).
    gate = np.array([[1 / 3]], "float32")
    previous = np.array([[[0.0, 1.0]]], "float32")
    gated = addressing.interpolate(content, previous, gate)
    close(gated, [[[1 / 4, 3 / 4]]], 1e-6)
    # A fifth moves to the next slot; with two slots, that is a swap.
    shifts = np.array([[[0.0, 4 / 5, 1 / 5]]], "float32")
    shifted = addressing.shift(gated, shifts)
    close(shifted, [[[7 / 20, 13 / 20]]], 1e-6)
    # 7 ** 2 : 13 ** 2 = 49 : 169.
    sharpened = addressing.sharpen(shifted, np.array([[2.0]], "float32"))
    close(sharpened, [[[49 / 218, 169 / 218]]], 1e-6)


def test_epsilons_of_the_similarity_match_values_computed_by_hand():
    memory = np.array([[[3.0], [4.0]]], "float32")
    key = np.array([[[1.0, 0.0]]], "float32")
    # 3 / (1 * 5) without epsilons.
    close(addressing.cosine_similarity(memory, key, 0.0), [[[0.6]]], 1e-6)
    # Added to the squares: sqrt(25 + 11) = 6 and sqrt(1 + 11).
    expected = 3 / (6 * np.sqrt(12))
    close(addressing.cosine_similarity(memory, key, 11.0), [[[expected]]], 1e-6)
    # Added to the product: 3 / (1 * 5 + 5).
    close(addressing.cosine_similarity(memory, key, 0.0, 5.0), [[[0.3]]], 1e-6)


# Invariants.


def test_content_weighting_sums_to_1(rng):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS)).astype("float32")
    keys = rng.normal(size=(BATCH, HEADS, WIDTH)).astype("float32")
    for strength in (0.0, 1.0, 1e4):
        strengths = np.full((BATCH, HEADS), strength, "float32")
        is_weighting(
            addressing.content_weighting(memory, keys, strengths, 1e-8)
        )


def test_permuted_slots_permute_the_content_weighting(rng):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS)).astype("float32")
    keys = rng.normal(size=(BATCH, HEADS, WIDTH)).astype("float32")
    strengths = rng.uniform(1, 5, size=(BATCH, HEADS)).astype("float32")
    order = rng.permutation(SLOTS)
    before = addressing.content_weighting(memory, keys, strengths, 1e-8)
    after = addressing.content_weighting(
        memory[:, :, order], keys, strengths, 0.0
    )
    close(after, ops.convert_to_numpy(before)[:, :, order], 1e-6)
    assert np.abs(ops.convert_to_numpy(after - before)).max() > 0.1


def test_the_length_of_keys_and_slots_does_not_matter(rng):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS)).astype("float32")
    keys = rng.normal(size=(BATCH, HEADS, WIDTH)).astype("float32")
    close(
        addressing.cosine_similarity(37 * memory, 0.1 * keys, 0.0),
        ops.convert_to_numpy(addressing.cosine_similarity(memory, keys, 0.0)),
        1e-5,
    )


def test_strength_0_is_uniform(rng):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS)).astype("float32")
    keys = rng.normal(size=(BATCH, HEADS, WIDTH)).astype("float32")
    weighting = addressing.content_weighting(
        memory, keys, np.zeros((BATCH, HEADS), "float32"), 1e-8
    )
    close(weighting, np.full((BATCH, HEADS, SLOTS), 1 / SLOTS), 1e-6)


def test_large_strength_finds_the_stored_vector(rng):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS)).astype("float32")
    keys = memory.transpose(0, 2, 1)[:, [4, 0, 6]]
    weighting = addressing.content_weighting(
        memory, keys, np.full((BATCH, HEADS), 1e3, "float32"), 1e-8
    )
    close(weighting, np.stack([np.eye(SLOTS)[[4, 0, 6]]] * BATCH), 1e-5)


def test_gates_0_and_1_select_one_weighting(rng):
    content, previous = weightings(rng), weightings(rng)
    gate = np.zeros((BATCH, HEADS))
    close(addressing.interpolate(content, previous, gate), previous, 1e-7)
    close(addressing.interpolate(content, previous, gate + 1), content, 1e-7)


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
def test_shift_moves_slot_i_to_slot_i_plus_the_offset(offset):
    shifts = np.eye(5)[None, None, offset + 2]
    for slot in (0, 3, SLOTS - 1):
        close(
            addressing.shift(np.eye(SLOTS)[None, None, slot], shifts),
            np.eye(SLOTS)[None, None, (slot + offset) % SLOTS],
            0,
        )


def test_shift_preserves_the_sum(rng):
    weighting = 0.3 * weightings(rng)
    shifted = addressing.shift(weighting, weightings(rng, slots=5))
    close(
        ops.convert_to_numpy(shifted).sum(-1),
        np.full((BATCH, HEADS), 0.3),
        1e-6,
    )


def test_each_head_has_its_own_shift(rng):
    weighting = weightings(rng, heads=1).repeat(HEADS, axis=1)
    shifts = np.stack([np.eye(HEADS)] * BATCH)
    shifted = addressing.shift(weighting, shifts)
    for head, offset in enumerate((-1, 0, 1)):
        close(shifted[:, head], np.roll(weighting[:, 0], offset, axis=-1), 1e-7)


def test_sharpening_by_1_only_normalizes(rng):
    weighting = 0.3 * weightings(rng)
    sharpened = addressing.sharpen(
        weighting.astype("float32"), np.ones((BATCH, HEADS), "float32")
    )
    close(sharpened, weighting / 0.3, 1e-6)


def test_large_sharpening_picks_the_maximum(rng):
    weighting = weightings(rng).astype("float32")
    sharpened = addressing.sharpen(
        weighting, np.full((BATCH, HEADS), 1e3, "float32")
    )
    close(sharpened, np.eye(SLOTS)[weighting.argmax(-1)], 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sharpen_is_accurate_where_powers_underflow(dtype):
    uniform = np.full((1, 1, 128), 1 / 128, dtype)
    power = np.array([[60.0]], dtype)  # 128 ** -60 is 0 in float32
    close(addressing.sharpen(uniform, power), uniform, 1e-6)
    close(addressing.sharpen(0 * uniform, power), uniform, 1e-6)
    one_hot = np.eye(128, dtype=dtype)[None, :1]
    for gamma in (1.0, 60.0):
        sharpened = addressing.sharpen(one_hot, np.array([[gamma]], dtype))
        close(sharpened, one_hot, 1e-6)
        is_weighting(sharpened)


def test_results_keep_the_dtype(rng):
    for dtype in ("float32", "float64"):
        weighting = ops.convert_to_tensor(weightings(rng), dtype=dtype)
        power = ops.ones((BATCH, HEADS), dtype=dtype)
        expected = weighting.dtype  # JAX may not have float64
        assert addressing.sharpen(weighting, power).dtype == expected
        assert addressing.shift(weighting, weighting).dtype == expected


# Errors and singular points.


def test_keys_of_another_width_are_refused():
    memory, keys = np.zeros((2, 5, 7)), np.zeros((2, 3, 4))
    message = r"same width.*\(2, 5, 7\).*\(2, 3, 4\)"
    with pytest.raises(ValueError, match=message):
        addressing.cosine_similarity(memory, keys, 1e-8)
    with pytest.raises(ValueError, match=message):
        addressing.content_weighting(memory, keys, np.zeros((2, 3)), 1e-8)


@needs_gradients
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("slots", "key"), [(0, 0), (0, 1), (1, 0)])
def test_gradients_are_bounded_at_zero_memory_and_zero_keys(dtype, slots, key):
    import tensorflow as tf

    memory = tf.fill((1, 2, 3), tf.cast(slots, dtype))
    keys = tf.fill((1, 1, 2), tf.cast(key, dtype))
    strengths = tf.ones((1, 1), dtype)
    with tf.GradientTape() as tape:
        tape.watch([memory, keys, strengths])
        weighting = addressing.content_weighting(
            memory, keys, strengths, NORM_EPSILON[dtype]
        )
        loss = tf.reduce_sum(weighting * [0.0, 2.0, 3.0])
    is_weighting(weighting)
    for gradient in tape.gradient(loss, [memory, keys, strengths]):
        assert np.isfinite(gradient).all()
        # The gradient of the cosine at 0 is 1 / sqrt(epsilon).
        assert np.abs(gradient).max() <= 2 / np.sqrt(NORM_EPSILON[dtype])


@needs_gradients
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("power", [1.0, 2.0, 61.0])
def test_gradients_of_sharpening_are_bounded_at_one_hot_weightings(
    dtype, power
):
    import tensorflow as tf

    weighting = tf.constant([[[0.0, 1.0, 0.0]]], dtype)
    sharpening = tf.constant([[power]], dtype)
    with tf.GradientTape() as tape:
        tape.watch([weighting, sharpening])
        sharpened = addressing.sharpen(weighting, sharpening)
        loss = tf.reduce_sum(sharpened * [1.0, 2.0, 3.0])
    is_weighting(sharpened)
    for gradient in tape.gradient(loss, [weighting, sharpening]):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() < 100


# Up to the largest finite numbers.


LARGEST = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.4e38}


def gradients(function, *arrays):
    """Result, and gradients of its weighted sum, in float64."""
    import tensorflow as tf

    arrays = [tf.convert_to_tensor(array) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        result = tf.cast(function(*arrays), "float64")
        weights = tf.reshape(tf.range(tf.size(result)) % 5 - 2, result.shape)
        loss = tf.reduce_sum(result * tf.cast(weights, "float64"))
    results = [result, *tape.gradient(loss, arrays)]
    return [tf.cast(result, "float64").numpy() for result in results]


def content_in(dtype, size, of_keys, masked, memory, keys, strengths, masks):
    import tensorflow as tf

    def weighted(memory, keys, strengths):
        return on_tensors.content_weighting(
            memory,
            keys,
            strengths,
            1e-30,
            masks=tf.cast(masks, dtype) if masked else None,
        )

    arrays = memory * size, keys * of_keys, strengths
    arrays = [tf.cast(array, dtype) for array in arrays]
    weighting, of_memory, of_keys_, *rest = gradients(weighted, *arrays)
    return weighting, of_memory * size, of_keys_ * of_keys, *rest


@needs_gradients
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", LARGEST)
def test_content_weighting_is_accurate_up_to_the_largest_numbers(
    rng, dtype, masked
):
    arrays = (
        rng.uniform(-1, 1, size=(BATCH, WIDTH, SLOTS)),
        rng.uniform(-1, 1, size=(BATCH, HEADS, WIDTH)),
        rng.uniform(0.1, 9.0, size=(BATCH, HEADS)),
        rng.integers(0, 4, size=(BATCH, HEADS, WIDTH)) / 3,
    )
    expected = content_in("float64", 1.0, 1.0, masked, *arrays)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    for size, of_keys in [(1e3, 1.0), (1.0, 1e3)]:
        if dtype != "float16":  # gradients would underflow there
            size, of_keys = size**10, of_keys**10
        found = content_in(dtype, size, of_keys, masked, *arrays)
        for one, other in zip(found, expected):
            close(one, other, tolerance)
    largest = LARGEST[dtype]
    found = content_in(dtype, largest, largest, masked, *arrays)
    close(found[0], expected[0], tolerance)
    assert all(np.isfinite(one).all() for one in found)


@needs_gradients
def test_slots_of_very_different_sizes_are_compared_accurately(rng):
    memory = rng.uniform(-1, 1, size=(BATCH, WIDTH, SLOTS))
    sizes = np.array([1.0, 3e38, 1e-3, 1e25, 1e12, 1e-2, 1e38])
    keys = rng.uniform(-1, 1, size=(BATCH, HEADS, WIDTH))
    for epsilons in ((1e-20, 0.0), (1e-20, 1e-3), (0.7, 0.0)):
        close(
            addressing.cosine_similarity(
                (memory * sizes).astype("float32"),
                keys.astype("float32"),
                *epsilons,
            ),
            addressing.cosine_similarity(memory * sizes, keys, *epsilons),
            1e-6,
        )


@pytest.mark.parametrize("masked", [False, True])
def test_similarities_are_at_most_1(rng, masked):
    vectors = rng.normal(size=(1, 20, 300)).astype("float32")
    vectors *= 10.0 ** rng.integers(1, 30, size=(1, 1, 300))
    memory = np.concatenate([vectors, -vectors], axis=2)
    keys = vectors.transpose(0, 2, 1)
    similarity = addressing.cosine_similarity(
        memory,
        keys,
        masks=np.ones((1, 300, 20), "float32") if masked else None,
    )
    similarity = ops.convert_to_numpy(similarity)[0]
    assert np.abs(similarity).max() == 1.0
    assert np.isfinite(np.arccos(similarity)).all()
    close(similarity[:, :300].diagonal(), np.ones(300), 1e-6)


@needs_gradients
def test_gradients_of_equal_vectors_equal_those_of_the_cosine(rng):
    memory = rng.normal(size=(1, WIDTH, 300)).astype("float32")
    keys = memory.transpose(0, 2, 1)

    def cosines(memory, keys):
        return on_tensors.cosine_similarity(memory, keys, 1e-12)

    found = gradients(cosines, memory, keys)
    expected = gradients(
        cosines, *(a.astype("float64") for a in (memory, keys))
    )
    for one, other in zip(found, expected):
        close(one, other, 1e-4 * np.abs(other).max())


@needs_gradients
@pytest.mark.parametrize("dtype", LARGEST)
def test_sharpening_is_accurate_up_to_the_largest_power(dtype):
    import tensorflow as tf

    # Two tied slots, a much smaller one, and an empty one.
    weighting = tf.constant([[[0.375, 0.375, 0.25, 0.0]]], dtype)
    largest = LARGEST[dtype]
    for power in (1.0, 60.0, 5e3, largest / 2, largest):
        sharpening = tf.constant([[power]], dtype)
        sharpened, of_weighting, of_power = gradients(
            on_tensors.sharpen, weighting, sharpening
        )
        is_weighting(sharpened, 1e-2 if "16" in dtype else 1e-6)
        if power > 100:
            close(sharpened, [[[0.5, 0.5, 0.0, 0.0]]], 1e-2)
            # The upstream gradients -2 and -1, times p y (1 - y) / w.
            slope = float(tf.cast(sharpening, "float64")[0, 0]) / 4 / 0.375
            close(of_weighting / slope, [[[-1.0, 1.0, 0.0, 0.0]]], 1e-2)
            close(of_power, [[0.0]], 1e-6)


def test_the_largest_strength_finds_the_stored_vector(rng):
    memory = rng.normal(size=(BATCH, WIDTH, SLOTS)).astype("float32")
    keys = memory.transpose(0, 2, 1)[:, [4, 0, 6]]
    weighting = addressing.content_weighting(
        memory, keys, np.full((BATCH, HEADS), 3.4e38, "float32")
    )
    close(weighting, np.stack([np.eye(SLOTS)[[4, 0, 6]]] * BATCH), 1e-6)


# Sparsemax, against tensorflow-addons and entmax.


def sparsemax_golden(file, case):
    file = np.load(harness.GOLDENS / f"{file}.npz")
    prefix = f"{case}."
    return {
        key.removeprefix(prefix): file[key]
        for key in file.files
        if key.startswith(prefix)
    }


def gradient_of_sum_of_squares(function, z):
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        z = tf.constant(z)
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = tf.reduce_sum(function(z) ** 2)
        return tape.gradient(loss, z)
    if backend == "torch":
        import torch

        z = torch.tensor(z, requires_grad=True)
        (function(z) ** 2).sum().backward()
        return z.grad
    if backend == "numpy":
        pytest.skip("Keras has no gradients on NumPy")
    import jax

    return jax.grad(lambda z: (function(z) ** 2).sum())(z)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("of", ["tfa__sparsemax", "sparsemax_entmax_"])
@pytest.mark.parametrize("case", ["case0", "case1", "ties", "large", "single"])
def test_sparsemax_equals_references(of, name, case):
    golden = sparsemax_golden(f"{of}_{name}", case)
    if not golden:
        pytest.skip(f"{of} has no such case")
    z = golden["z"]
    if ops.dtype(ops.convert_to_tensor(z)) == "float64":
        tolerances = 1e-9, 1e-7
    elif case == "large":
        pytest.skip("these logits have no exact float32, all that JAX has")
    else:
        tolerances = 1e-6, 1e-6
    for axis, suffix in ((-1, ""), (0, "_axis0")):

        def project(logits, axis=axis):
            return addressing.sparsemax(logits, axis)

        if "p" + suffix not in golden:
            continue
        p, gradient = golden["p" + suffix], golden["grad_of_sum_p2" + suffix]
        close(project(z), p, tolerances[0])
        close(gradient_of_sum_of_squares(project, z), gradient, tolerances[1])


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's
@pytest.mark.parametrize("name", ["a", "b"])
def test_sparsemax_of_infinities_and_nan_equals_tensorflow_addons(name):
    golden = sparsemax_golden(f"tfa__sparsemax_{name}", "nan_ok_inf")
    close(addressing.sparsemax(golden["z"]), golden["p"], 0)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(addressing.sparsemax, jit_compile=True)
        close(compiled(golden["z"]), golden["p"], 0)


def test_sparsemax_has_gradients_beside_minus_infinity():
    z = np.array([[0.3, -np.inf, 0.1], [-np.inf, 7.0, -np.inf]], "float32")
    gradient = gradient_of_sum_of_squares(addressing.sparsemax, z)
    close(gradient, [[0.2, 0.0, -0.2], [0.0, 0.0, 0.0]], 1e-6)


def test_sparsemax_finds_a_support_that_shrinks_one_by_one():
    z, below = [0.0, -0.5], 1e-5
    while z[-1] > -1:
        k = len(z)
        z.append((sum(z) - 1) / k - below)  # leaves the support
        below *= 1.1 * (k + 2) * k / (k + 1)
    assert len(z) > 8
    p = addressing.sparsemax(np.array([z[::-1], z[4:] + z[:4]], "float32"))
    expected = np.array([0.75, 0.25] + [0.0] * (len(z) - 2))
    close(p, [expected[::-1], np.roll(expected, -4)], 1e-6)


def test_sparsemax_casts_integers_to_float32():
    weights = addressing.sparsemax(np.array([[0, 0], [3, 1]]))
    close(weights, [[0.5, 0.5], [1.0, 0.0]], 1e-7)
    assert ops.dtype(weights) == "float32"


def test_sparsemax_is_accurate_in_16_bits():
    for dtype in ("float16", "bfloat16"):
        z = ops.convert_to_tensor([[0.25, -1000.0] * 300], dtype=dtype)
        p = addressing.sparsemax(z)
        assert ops.dtype(p) == dtype
        p = ops.convert_to_numpy(ops.cast(p, "float32"))
        close(p, [[1 / 300, 0] * 300], 1e-5)


def test_a_saved_model_keeps_this_sparsemax():
    dense = keras.layers.Dense(3, activation=on_tensors.sparsemax)
    copy = keras.layers.Dense.from_config(dense.get_config())
    assert copy.activation is on_tensors.sparsemax
