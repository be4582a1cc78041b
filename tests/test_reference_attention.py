"""The oracle of the attention of Memorizing Transformers, compared with
recorded values and tested by its properties."""

import json
import pathlib

import numpy as np
import pytest
from reference_attention import attention
from reference_attention import directional_derivative
from reference_attention import initial_state
from reference_attention import position_bucket

GOLDENS = pathlib.Path(__file__).parent / "goldens"
WIDTH, OUT, BATCH = 7, 5, 2
RETRIEVAL = {
    "heads": 2,
    "key_dim": 3,
    "value_dim": 2,
    "multi_query": False,
    "xl_size": 4,
    "memory_size": 11,
    "top_k": 3,
}
MIXINGS = "gate", "informed_gate", "joint_softmax"
SIMILARITIES = "cosine", "dot"


def random_weights(rng, multi_query=False):
    kv_heads = 1 if multi_query else 2
    shapes = {
        "query_kernel": (WIDTH, 2 * 3),
        "key_kernel": (WIDTH, kv_heads * 3),
        "value_kernel": (WIDTH, kv_heads * 2),
        "output_kernel": (2 * 2, OUT),
        "output_bias": (OUT,),
        "output_gate": (),
        "embeddings": (8, 2),
        "log_scale": (2,),
        "gate_bias": (2,),
        "gate_kernel": (2, 4),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def random_x(rng, steps, batch=BATCH):
    return rng.normal(size=(batch, steps, WIDTH))


def every_mixing(test):
    test = pytest.mark.parametrize("mixing", MIXINGS)(test)
    return pytest.mark.parametrize("similarity", SIMILARITIES)(test)


def assert_entries(entries, keys, values):
    assert len(entries) == len(keys)
    for (key, value), its_key, its_value in zip(entries, keys, values):
        np.testing.assert_allclose(key, its_key, atol=1e-14)
        np.testing.assert_allclose(value, its_value, atol=1e-14)


def assert_states_close(state, expected):
    assert len(state) == len(expected)
    for row, its in zip(state, expected):
        assert row["added"] == its["added"]
        for name in ("xl", "memory"):
            keys, values = zip(*its[name]) if its[name] else ((), ())
            assert_entries(row[name], keys, values)


def filled_state(rng, weights, **options):
    """The state after a segment that leaves 7 entries in memory."""
    x = random_x(rng, options["xl_size"] + 7)
    return attention(weights, x, **options)[1]


# Recorded values.


def golden(name):
    arrays = dict(np.load(GOLDENS / f"mt__{name}.npz"))
    meta = json.loads(str(arrays.pop("__meta__")))
    key_kernel, value_kernel = np.split(arrays["w.to_kv.weight"].T, 2, 1)
    weights = {
        "query_kernel": arrays["w.to_q.weight"].T,
        "key_kernel": key_kernel,
        "value_kernel": value_kernel,
        "output_kernel": arrays["w.to_out.weight"].T,
    }
    options = {
        "heads": meta["heads"],
        "key_dim": meta["dim_head"],
        "value_dim": meta["dim_head"],
        "multi_query": True,
        "xl_size": meta["xl_max_memories"],
        "position_bias": arrays["rel_pos_bias"][0],
    }
    if name.startswith("knn"):
        weights["log_scale"] = arrays["w.scale"].ravel()
        weights["output_gate"] = arrays["w.output_gate"][0]
        options |= {
            "memory_size": 20,
            "top_k": meta["num_retrieved_memories"],
            "mixing": "joint_softmax",
            "similarity": "cosine",
        }
    else:
        weights["output_bias"] = arrays["w.to_out.bias"]
        options["memory"] = False
    return arrays, weights, options


def golden_entries(array):
    """array (n, 2, D) of one batch row -> list of entries with one head."""
    return [(key[None], value[None]) for key, value in array]


def golden_state(arrays, xl="xl_memory", memory="knn_memory_before"):
    stored = arrays.get(memory, np.zeros((BATCH, 0, 2, 1)))
    return [
        {
            "xl": golden_entries(arrays[xl][b]),
            "memory": golden_entries(stored[b]),
            "added": len(stored[b]),
        }
        for b in range(BATCH)
    ]


@pytest.mark.parametrize("name", ["attention_b", "knn_attention_b"])
def test_outputs_and_states_equal_recorded_ones(name):
    arrays, weights, options = golden(name)
    outputs, state = attention(
        weights, arrays["x"], golden_state(arrays), **options
    )
    np.testing.assert_allclose(outputs, arrays["output"], rtol=0, atol=1e-10)
    assert_states_close(
        state, golden_state(arrays, "new_xl_memory", "knn_memory_after")
    )


@pytest.mark.parametrize("name", ["attention_b", "knn_attention_b"])
def test_gradients_equal_recorded_ones(name):
    """The recorded loss is the sum of the squares of the outputs."""
    arrays, weights, options = golden(name)
    rng = np.random.default_rng(0)
    key_gradient, value_gradient = np.split(arrays["grad.to_kv.weight"].T, 2, 1)
    gradients = {
        "x": arrays["grad.x"],
        "position_bias": arrays["grad.rel_pos_bias"][0],
        "query_kernel": arrays["grad.to_q.weight"].T,
        "key_kernel": key_gradient,
        "value_kernel": value_gradient,
        "output_kernel": arrays["grad.to_out.weight"].T,
    }
    if name.startswith("knn"):
        gradients["log_scale"] = arrays["grad.scale"].ravel()
        gradients["output_gate"] = arrays["grad.output_gate"][0]
    else:
        gradients["output_bias"] = arrays["grad.to_out.bias"]
    for moved, gradient in gradients.items():
        direction = rng.normal(size=np.shape(gradient))
        derivative = directional_derivative(
            weights,
            arrays["x"],
            golden_state(arrays),
            2.0 * arrays["output"],
            {moved: direction},
            **options,
        )
        expected = np.sum(gradient * direction)
        np.testing.assert_allclose(derivative, expected, rtol=1e-9)


# Local attention.


@every_mixing
def test_outputs_depend_on_no_later_token(mixing, similarity):
    rng = np.random.default_rng(1)
    options = {**RETRIEVAL, "mixing": mixing, "similarity": similarity}
    weights = random_weights(rng)
    state = filled_state(rng, weights, **options)
    x = random_x(rng, 5)
    before, _ = attention(weights, x, state, **options)
    for t in range(5):
        moved = x.copy()
        moved[:, t] += 1.0
        after, _ = attention(weights, moved, state, **options)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.isclose(after[:, t:], before[:, t:]).any()


@pytest.mark.parametrize(
    "retrieval",
    [
        {"memory": False},
        {"mixing": "gate", "similarity": "cosine"},
        {"mixing": "joint_softmax", "similarity": "dot"},
    ],
)
def test_two_segments_equal_one(retrieval):
    rng = np.random.default_rng(2)
    options = {**RETRIEVAL, **retrieval, "xl_size": 13, "max_distance": 9}
    weights = random_weights(rng)
    x = random_x(rng, 11)
    expected, _ = attention(weights, x, **options)
    first, state = attention(weights, x[:, :4], **options)
    assert [len(row["xl"]) for row in state] == [4, 4]
    second, state = attention(weights, x[:, 4:], state, **options)
    assert [len(row["xl"]) for row in state] == [11, 11]
    assert not any(row["memory"] for row in state)
    outputs = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(outputs, expected, atol=1e-13)


def test_a_position_bias_equals_its_embeddings():
    rng = np.random.default_rng(3)
    options = {**RETRIEVAL, "xl_size": 3, "memory": False}
    weights = random_weights(rng)
    state = filled_state(rng, weights, **options)
    x = random_x(rng, 5)
    expected, _ = attention(weights, x, state, max_distance=6, **options)
    embeddings = weights.pop("embeddings")
    bias = np.full((2, 5, 9), np.nan)  # one column too many in front
    for t in range(5):
        for column in range(1, t + 5):
            distance = t + 4 - column
            bias[:, t, column] = embeddings[position_bucket(distance, 8, 6)]
    outputs, _ = attention(weights, x, state, position_bias=bias, **options)
    np.testing.assert_allclose(outputs, expected, atol=1e-13)


@pytest.mark.parametrize(
    "buckets, max_distance, expected",
    [
        # From 4 on, the bucket is 4 + floor(2 log2(n / 4)).
        (8, 16, {3: 3, 4: 4, 5: 4, 6: 5, 7: 5, 8: 6, 11: 6, 12: 7, 99: 7}),
        # From 3 on, it is 3 + floor(log2(n / 3)).
        (6, 24, {2: 2, 3: 3, 5: 3, 6: 4, 11: 4, 12: 5, 23: 5, 24: 5}),
        # From 1 on, it is 1 + floor(log10(n)).
        (4, 1000, {0: 0, 1: 1}),
        (32, 128, {15: 15, 16: 16, 18: 16, 19: 17, 32: 21, 64: 26, 128: 31}),
        (1, 128, {0: 0, 5: 0}),
    ],
)
def test_buckets_of_distances(buckets, max_distance, expected):
    for distance, bucket in expected.items():
        assert position_bucket(distance, buckets, max_distance) == bucket


# Padding and documents.


@every_mixing
def test_padding_changes_nothing(mixing, similarity):
    """One batch row has padding in front, inside and at the end, one has none.
    Both have the same tokens."""
    rng = np.random.default_rng(4)
    options = {**RETRIEVAL, "mixing": mixing, "similarity": similarity}
    weights = random_weights(rng)
    state = filled_state(rng, weights, **options)[:1] * 2
    tokens = random_x(rng, 5, batch=1)[0]
    valid = np.zeros(9, bool)
    valid[[1, 2, 5, 6, 7]] = True
    x = np.full((2, 9, WIDTH), np.nan)
    mask = np.zeros((2, 9), bool)
    clear = np.ones((2, 9), bool)
    for row, its_valid in enumerate([valid, np.arange(9) < 5]):
        mask[row] = its_valid
        x[row, its_valid] = tokens
        clear[row, its_valid] = [False, False, False, True, False]
    for starts in (None, clear):
        outputs, after = attention(
            weights, x, state, mask=mask, clear=starts, **options
        )
        np.testing.assert_array_equal(outputs[0, mask[0]], outputs[1, mask[1]])
        assert not outputs[~mask].any()
        assert_states_close(after[:1], after[1:])
        expected, end = attention(
            weights,
            tokens[None],
            state[:1],
            clear=None if starts is None else clear[1:, :5],
            **options,
        )
        np.testing.assert_array_equal(outputs[1, :5], expected[0])
        assert_states_close(after[1:], end)


@every_mixing
def test_documents_of_a_segment_are_apart(mixing, similarity):
    """Documents start at the tokens 2 and 5."""
    rng = np.random.default_rng(5)
    options = {**RETRIEVAL, "mixing": mixing, "similarity": similarity}
    options["xl_size"] = 2
    weights = random_weights(rng)
    state = filled_state(rng, weights, **options)
    x = random_x(rng, 9)
    clear = np.zeros((BATCH, 9), bool)
    clear[:, [2, 5]] = True
    outputs, end = attention(weights, x, state, clear=clear, **options)
    parts = [
        attention(weights, x[:, :2], state, **options),
        attention(weights, x[:, 2:5], None, **options),
        attention(weights, x[:, 5:], None, **options),
    ]
    expected = np.concatenate([part for part, _ in parts], axis=1)
    np.testing.assert_allclose(outputs, expected, atol=1e-13)
    assert_states_close(end, parts[-1][1])
    assert [row["added"] for row in end] == [2, 2]


def test_a_segment_that_starts_a_document_forgets_the_state():
    rng = np.random.default_rng(6)
    options = {**RETRIEVAL, "mixing": "gate", "similarity": "dot"}
    weights = random_weights(rng)
    x = random_x(rng, 3)
    state = attention(weights, random_x(rng, 13), **options)[1]
    clear = np.array([True, False])
    outputs, end = attention(weights, x, state, clear=clear, **options)
    fresh, fresh_end = attention(weights, x, **options)
    kept, kept_end = attention(weights, x, state, **options)
    np.testing.assert_array_equal(outputs, [fresh[0], kept[1]])
    assert_states_close(end, [fresh_end[0], kept_end[1]])
    by_token = np.zeros((BATCH, 3), bool)
    by_token[0, 0] = True
    same, _ = attention(weights, x, state, clear=by_token, **options)
    np.testing.assert_array_equal(same, outputs)
    padding = np.zeros((BATCH, 3), bool)
    _, end = attention(weights, x, state, mask=padding, clear=clear, **options)
    assert_states_close(end, [initial_state(1)[0], state[1]])
    everywhere = np.ones((BATCH, 3), bool)
    _, end = attention(
        weights, x, state, mask=padding, clear=everywhere, **options
    )
    assert_states_close(end, state)


# Memory.


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("xl_size", [0, 3])
def test_memory_holds_the_newest_entries(xl_size, similarity):
    rng = np.random.default_rng(7)
    options = {**RETRIEVAL, "mixing": "gate", "similarity": similarity}
    options |= {"xl_size": xl_size, "memory_size": 5}
    weights = random_weights(rng)
    segments = [random_x(rng, steps) for steps in (2, 7, 1, 3)]
    state = None
    for count, x in enumerate(segments, 1):
        _, state = attention(weights, x, state, **options)
        tokens = np.concatenate(segments[:count], axis=1)
        left = max(tokens.shape[1] - xl_size, 0)
        for row, its_tokens in zip(state, tokens):
            keys = (its_tokens @ weights["key_kernel"]).reshape(-1, 2, 3)
            values = (its_tokens @ weights["value_kernel"]).reshape(-1, 2, 2)
            directions = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
            newest = slice(max(left - 5, 0), left)
            assert_entries(row["memory"], directions[newest], values[newest])
            assert row["added"] == left
            xl_keys = directions if similarity == "cosine" else keys
            assert_entries(row["xl"], xl_keys[left:], values[left:])


def test_memory_that_is_not_written_stays():
    rng = np.random.default_rng(8)
    options = {**RETRIEVAL, "mixing": "gate", "similarity": "cosine"}
    weights = random_weights(rng)
    x = random_x(rng, 6)
    state = attention(weights, random_x(rng, 7), **options)[1]
    for clear in (None, np.array([True, False])):
        expected, written = attention(weights, x, state, clear=clear, **options)
        outputs, end = attention(
            weights, x, state, clear=clear, write=False, **options
        )
        np.testing.assert_array_equal(outputs, expected)
        for row, its, before in zip(end, written, state):
            its = {**before, "xl": its["xl"]}
            assert_states_close([row], [its])


def test_the_state_before_is_not_changed():
    rng = np.random.default_rng(9)
    options = {**RETRIEVAL, "mixing": "gate", "similarity": "cosine"}
    weights = random_weights(rng)
    state = attention(weights, random_x(rng, 7), **options)[1]
    copy = [
        {name: v if name == "added" else [*v] for name, v in row.items()}
        for row in state
    ]
    attention(weights, random_x(rng, 9), state, **options)
    assert_states_close(state, copy)


# Retrieval. In these tests, the first 3 numbers of a token are its query, the
# next 3 its key and the last its value. There is one head.

ONE_HEAD = {"heads": 1, "key_dim": 3, "value_dim": 1, "multi_query": True}


def plain_weights(**weights):
    eye = np.eye(WIDTH)
    return {
        "query_kernel": eye[:, :3],
        "key_kernel": eye[:, 3:6],
        "value_kernel": eye[:, 6:],
        "output_kernel": np.ones((1, 1)),
        "log_scale": [np.log(2.0)],
        **weights,
    }


STORED = [
    {
        "xl": [],
        "memory": [
            (np.array([key]), np.array([[value]]))
            for key, value in (
                ([1.0, 0.0, 0.0], 10.0),
                ([0.0, 0.6, 0.8], 20.0),
                ([0.0, 0.0, 1.0], 30.0),
            )
        ],
        "added": 9,
    }
]


def one_output(x, weights, state=STORED, **options):
    options = {
        "memory_size": 7,
        "top_k": 2,
        "xl_size": 0,
        "mixing": "gate",
        "similarity": "cosine",
        **options,
    }
    outputs, _ = attention(weights, [[x]], state, **ONE_HEAD, **options)
    return outputs[0, 0, 0]


# Cosines with the stored keys are 0, 0.96 and 0.8.
TOKEN = np.array([0.0, 1.8, 2.4, 0.0, 0.0, 5.0, 1.0])
TOKEN_COSINES = np.array([0.0, 1.0, 0.8])


def test_a_gate_mixes_the_nearest_entries_with_local_attention():
    e, f = np.exp(2.0 * TOKEN_COSINES[1:])
    retrieved = (20.0 * e + 30.0 * f) / (e + f)
    for gate in (0.0, 0.25, 1.0):
        with np.errstate(divide="ignore"):
            bias = np.log(gate) - np.log(1.0 - gate)
        output = one_output(TOKEN, plain_weights(gate_bias=[bias]))
        np.testing.assert_allclose(output, gate * retrieved + 1.0 - gate)


def test_one_softmax_joins_the_nearest_entries_and_local_attention():
    e, f = np.exp(2.0 * TOKEN_COSINES[1:])
    for similarity, logit in (
        ("cosine", 2.0 * 0.8),
        ("dot", 2.4 * 5.0 / np.sqrt(3.0)),
    ):
        output = one_output(
            TOKEN,
            plain_weights(),
            mixing="joint_softmax",
            similarity=similarity,
        )
        g = np.exp(logit)
        expected = (20.0 * e + 30.0 * f + 1.0 * g) / (e + f + g)
        np.testing.assert_allclose(output, expected)


@pytest.mark.parametrize("feature", range(4))
@pytest.mark.parametrize("top_k", [2, 5])
def test_features_of_an_informed_gate(feature, top_k):
    found = [1, 2] if top_k == 2 else [1, 2, 0]
    cosines = TOKEN_COSINES[found]
    weights = np.exp(2.0 * cosines)
    retrieved = np.sum(weights * (10.0 * np.array(found) + 10.0))
    retrieved /= np.sum(weights)
    ages = 2 - np.array(found)
    value = (
        len(found) / top_k,
        1.0,
        np.mean(cosines),
        np.mean(np.log(1 + ages)) / np.log(8.0),
    )[feature]
    logit = 0.5 - 3.0 * value
    gate = 1.0 / (1.0 + np.exp(-logit))
    output = one_output(
        TOKEN,
        plain_weights(gate_bias=[0.5], gate_kernel=[-3.0 * np.eye(4)[feature]]),
        mixing="informed_gate",
        top_k=top_k,
    )
    np.testing.assert_allclose(output, gate * retrieved + 1.0 - gate)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_empty_memory_leaves_local_attention(mixing):
    weights = plain_weights(gate_bias=[50.0], gate_kernel=np.ones((1, 4)))
    state = initial_state(1)
    assert one_output(TOKEN, weights, state, mixing=mixing) == 1.0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_length_of_a_query_does_not_matter(scale):
    weights = plain_weights(gate_bias=[0.0])
    scaled = TOKEN * np.repeat([scale, 1.0], [3, 4])
    np.testing.assert_allclose(
        one_output(scaled, weights), one_output(TOKEN, weights), rtol=1e-14
    )


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_query_of_zeros_is_finite(mixing):
    weights = plain_weights(gate_bias=[0.0], gate_kernel=np.ones((1, 4)))
    x = np.zeros(WIDTH)
    x[6] = 1.0
    output = one_output(x, weights, mixing=mixing, top_k=3)
    share = {"gate": 0.5, "joint_softmax": 0.75}
    if mixing in share:  # the mean of what memory holds is 20
        expected = 20.0 * share[mixing] + 1.0 - share[mixing]
        np.testing.assert_allclose(output, expected)
    assert np.isfinite(output)


@every_mixing
def test_multi_query_attention_equals_equal_heads(mixing, similarity):
    rng = np.random.default_rng(10)
    options = {**RETRIEVAL, "mixing": mixing, "similarity": similarity}
    options.pop("multi_query")
    shared = random_weights(rng, multi_query=True)
    equal = {
        **shared,
        "key_kernel": np.tile(shared["key_kernel"], 2),
        "value_kernel": np.tile(shared["value_kernel"], 2),
    }
    states = [None, None]
    for _ in range(3):
        x = random_x(rng, 5)
        (one, states[0]), (many, states[1]) = (
            attention(weights, x, state, multi_query=multi, **options)
            for weights, multi, state in zip(
                (shared, equal), (True, False), states
            )
        )
        np.testing.assert_allclose(one, many, atol=1e-13)
    assert states[0][0]["memory"][0][0].shape == (1, 3)
    assert states[1][0]["memory"][0][0].shape == (2, 3)


@every_mixing
def test_heads_are_apart(mixing, similarity):
    rng = np.random.default_rng(12)
    options = {**RETRIEVAL, "mixing": mixing, "similarity": similarity}
    weights = random_weights(rng)
    weights |= {"output_kernel": np.eye(4), "output_bias": np.zeros(4)}
    state = filled_state(rng, weights, **options)
    x = random_x(rng, 5)
    outputs, _ = attention(weights, x, state, **options)
    for h in range(2):
        alone = {
            "query_kernel": weights["query_kernel"][:, 3 * h :][:, :3],
            "key_kernel": weights["key_kernel"][:, 3 * h :][:, :3],
            "value_kernel": weights["value_kernel"][:, 2 * h :][:, :2],
            "output_kernel": np.eye(2),
            "output_gate": weights["output_gate"],
            "embeddings": weights["embeddings"][:, h:],
            **{
                name: weights[name][h:]
                for name in ("log_scale", "gate_bias", "gate_kernel")
            },
        }
        its_state = [
            {
                name: row[name]
                if name == "added"
                else [(k[h : h + 1], v[h : h + 1]) for k, v in row[name]]
                for name in row
            }
            for row in state
        ]
        expected, _ = attention(alone, x, its_state, **{**options, "heads": 1})
        np.testing.assert_allclose(
            outputs[..., 2 * h :][..., :2], expected, atol=1e-13
        )


def test_plain_attention_takes_no_part_in_retrieval():
    rng = np.random.default_rng(13)
    options = {**RETRIEVAL, "mixing": "gate", "similarity": "cosine"}
    weights = random_weights(rng)
    state = filled_state(rng, weights, **options)
    x = random_x(rng, 5)
    outputs, end = attention(weights, x, state, memory=False, **options)
    options = {
        name: RETRIEVAL[name]
        for name in ("heads", "key_dim", "value_dim", "multi_query", "xl_size")
    }
    alone = [{**row, "memory": [], "added": 0} for row in state]
    expected, its_end = attention(weights, x, alone, memory=False, **options)
    np.testing.assert_array_equal(outputs, expected)
    for row, its, before in zip(end, its_end, state):
        assert_states_close([row], [{**before, "xl": its["xl"]}])


def test_memory_takes_real_parts():
    rng = np.random.default_rng(14)
    options = {**RETRIEVAL, "mixing": "gate", "similarity": "cosine"}
    x = random_x(rng, 6) + 1e-30j
    _, state = attention(random_weights(rng), x, **options)
    for row in state:
        assert len(row["memory"]) == 2
        for name, is_complex in (("xl", True), ("memory", False)):
            for key, value in row[name]:
                assert np.iscomplexobj(key) == is_complex
                assert np.iscomplexobj(value) == is_complex


@every_mixing
def test_derivatives_equal_finite_differences(mixing, similarity):
    """Moves are too small to change which entries are found."""
    rng = np.random.default_rng(11)
    options = {**RETRIEVAL, "mixing": mixing, "similarity": similarity}
    weights = random_weights(rng)
    state = filled_state(rng, weights, **options)
    options |= {"clear": np.eye(5, dtype=bool)[[3, 4]]}
    x = random_x(rng, 5)
    upstream = rng.normal(size=(BATCH, 5, OUT))
    directions = {
        name: rng.normal(size=np.shape(value))
        for name, value in {**weights, "x": x}.items()
    }
    derivative = directional_derivative(
        weights, x, state, upstream, directions, **options
    )
    losses = []
    for h in (1e-6, -1e-6):
        moved = {
            name: value + h * directions[name]
            for name, value in {**weights, "x": x}.items()
        }
        outputs, _ = attention(moved, moved.pop("x"), state, **options)
        losses.append(np.sum(outputs * upstream))
    np.testing.assert_allclose(
        (losses[0] - losses[1]) / 2e-6, derivative, rtol=1e-6
    )
