"""Attention against the formula, one query and head at a time."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, AttentionConfig, Context, attention, dot_product
from seqmod.mixers.positions import RopeScaling, alibi_slopes, bucket, frequencies, positions, rotate
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")

L, D = 11, 5
BASE = AttentionConfig(width=D, heads=6, head_dim=8, groups=2, buckets=8, max_distance=7)
CONFIGS = {
    "t5": BASE,
    "t5 noncausal": replace(BASE, causal=False),
    "rope": replace(BASE, position="rope", rope_base=100.0),
    "rope on half, noncausal": replace(BASE, position="rope", rope_fraction=0.5, causal=False),
    "alibi": replace(BASE, position="alibi"),
    "alibi noncausal": replace(BASE, position="alibi", causal=False),
    "window": replace(BASE, window=3),
    "window noncausal": replace(BASE, window=3, causal=False, position="none"),
    "qwen": replace(BASE, position="rope", qkv_bias=True, qk_norm=True, window=4),
    "capped": replace(BASE, soft_cap=0.7, scale=0.9, out_bias=True, groups=None),
    "one head of keys": replace(BASE, groups=1, qkv_bias=True, out_bias=True, position="none"),
}


def t5_bucket(distance: int, buckets: int, max_distance: int, causal: bool = True) -> int:
    """Half of the buckets hold one distance each; the others divide the logarithm up to max_distance evenly. Where not
    causal, later keys have the second half of the buckets for themselves."""
    if not causal:
        later = buckets // 2 if distance < 0 else 0
        return later + t5_bucket(abs(distance), buckets // 2, max_distance)
    exact = buckets // 2
    if distance < exact:
        return max(distance, 0)
    fraction = math.log2(distance / exact) / math.log2(max_distance / exact)
    return min(exact + math.floor(fraction * (buckets - exact)), buckets - 1)


def turned(x_K: np.ndarray, position: int, config: AttentionConfig) -> np.ndarray:
    """Each pair of channels i, i + R/2 as a complex number, times e^(i t base^(-2i/R))."""
    rotated = int(config.head_dim * config.rope_fraction)
    half = rotated // 2
    pairs = x_K[:half] + 1j * x_K[half:rotated]
    pairs = pairs * np.exp(1j * position * config.rope_base ** (-2 * np.arange(half) / rotated))
    return np.concatenate([pairs.real, pairs.imag, x_K[rotated:]])


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes by the recursion of its authors."""
    power = 2 ** math.floor(math.log2(heads))
    start = 2 ** (-8 / power)
    own = [start**h for h in range(1, power + 1)]
    return own if power == heads else own + slopes(2 * power)[0::2][: heads - power]


def oracle(params, config: AttentionConfig, x_LD: np.ndarray, last: int = 10**6, context_MD=None) -> np.ndarray:
    """Softmax attention of one sequence, of which causal attention remembers the `last` steps."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    H, K = config.heads, config.head_dim
    source_MD = x_LD if context_MD is None else context_MD
    heads = {}
    for name, source in (("q", x_LD), ("k", source_MD), ("v", source_MD)):
        heads[name] = np.einsum("LD,DHK->LHK", source, p[name])
        if config.qkv_bias:
            heads[name] = heads[name] + p[f"{name}_bias"]
        if config.qk_norm and name != "v":
            heads[name] /= np.sqrt((heads[name] ** 2).mean(-1, keepdims=True) + 1e-6)
            heads[name] *= p[f"{name}_norm"]
    y_LD = np.zeros((len(x_LD), D))
    for t in range(len(x_LD)):
        for h in range(H):
            group = h // (H // (config.groups or H))
            scores, seen = [], []
            for s in range(len(source_MD)):
                if context_MD is None:
                    width = config.window or 10**6
                    if config.causal and not (t - min(width, last) < s <= t):
                        continue
                    if not config.causal and abs(t - s) > width:
                        continue
                q, k = heads["q"][t, h], heads["k"][s, group]
                if config.position == "rope" and context_MD is None:
                    q, k = turned(q, t, config), turned(k, s, config)
                score = (q @ k) * (config.scale or 1 / math.sqrt(K))
                if config.soft_cap:
                    score = config.soft_cap * math.tanh(score / config.soft_cap)
                if config.position == "t5" and context_MD is None:
                    score += p["bias"][t5_bucket(t - s, config.buckets, config.max_distance, config.causal), h]
                if config.position == "alibi":
                    score -= slopes(H)[h] * abs(t - s)
                scores.append(score)
                seen.append(s)
            weights = np.exp(np.array(scores) - max(scores))
            y_LD[t] += (weights / weights.sum()) @ heads["v"][seen, group] @ p["out"][h]
    return y_LD + (p["out_bias"] if config.out_bias else 0)


def build(random_params, config: AttentionConfig) -> Case:
    params = random_params(attention.init, config, scale=0.7)
    return Case(attention.MIXER, config, params, sequence(2, L, D))


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_against_the_formula(name, random_params):
    case = build(random_params, CONFIGS[name])
    expected = oracle(case.params, case.config, np.asarray(case.x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.causal])
def test_steps_against_the_formula_in_a_cache_shorter_than_the_sequence(name, random_params):
    case = build(random_params, CONFIGS[name])
    state = attention.init_state(case.config, 2, 6)
    assert state.k_BMGK.shape == (2, min(6, case.config.window or 6), case.config.kv_heads, 8)
    y_BLD, state = steps(case, case.x_BLD, state)
    expected = oracle(case.params, case.config, np.asarray(case.x_BLD[1], np.float64), last=6)
    np.testing.assert_allclose(y_BLD[1], expected, atol=2e-5)
    assert int(state.time) == L


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_segments_and_the_matrix(name, random_params):
    """Whichever the options, a segment is a sequence with positions of its own, and linear in its values."""
    case = build(random_params, CONFIGS[name])
    segment_ids = jnp.array([[0] * L, [4, 4, 4, 4, 7, 7, 7, 7, 7, 7, 4]])
    packed = run(case, case.x_BLD, segment_ids)
    for start, stop in ((0, 4), (4, 10), (10, 11)):
        alone = oracle(case.params, case.config, np.asarray(case.x_BLD[1, start:stop], np.float64))
        np.testing.assert_allclose(packed[1, start:stop], alone, atol=2e-5)

    @jax.jit
    def dense(params):
        args = (params, case.config, case.x_BLD)
        m_BHLM, v_BLHK = attention.matrix(*args, segment_ids), attention.values(*args, segment_ids)
        return attention.read_out(*args, jnp.einsum("BHLM,BMHK->BLHK", m_BHLM, v_BLHK))

    np.testing.assert_allclose(dense(case.params), packed, atol=2e-5)


@pytest.mark.parametrize("name", ["t5", "t5 noncausal", "capped", "one head of keys"])
def test_cross_attention_against_the_formula(name, random_params):
    case = build(random_params, CONFIGS[name])
    context = Context(sequence(2, 7, D, seed=3))
    expected = oracle(
        case.params,
        case.config,
        np.asarray(case.x_BLD[1], np.float64),
        context_MD=np.asarray(context.x_BMD[1], np.float64),
    )
    np.testing.assert_allclose(run(case, case.x_BLD, None, context)[1], expected, atol=2e-5)


def test_cross_attention_keeps_segments_apart(random_params):
    """Ids of queries and context are compared as they are; a query without keys gets the output of no values."""
    case = build(random_params, CONFIGS["one head of keys"])
    context = Context(sequence(2, 7, D, seed=3), jnp.array([[1] * 7, [5, 5, 5, 2, 2, 2, 5]]))
    queries = jnp.array([[1] * L, [2] * 4 + [5] * 3 + [8] * 4])
    y_BLD = run(case, case.x_BLD, queries, context)
    x_LD, context_MD = np.asarray(case.x_BLD[1], np.float64), np.asarray(context.x_BMD[1], np.float64)
    for where, keys in ((slice(0, 4), [3, 4, 5]), (slice(4, 7), [0, 1, 2, 6])):
        expected = oracle(case.params, case.config, x_LD[where], context_MD=context_MD[keys])
        np.testing.assert_allclose(y_BLD[1, where], expected, atol=2e-5)
    np.testing.assert_allclose(y_BLD[1, 7:], np.broadcast_to(case.params["out_bias"], (4, D)), atol=1e-6)


def test_cross_attention_refuses_what_has_no_meaning():
    context = Context(jnp.ones((2, 7, D)), jnp.zeros((2, 7), jnp.int32))
    for options in ({"position": "rope"}, {"position": "alibi"}, {"window": 3}):
        with pytest.raises(ValueError, match="a context shares no positions"):
            attention.apply({}, replace(BASE, **options), jnp.ones((2, L, D)), None, context)
    with pytest.raises(ValueError, match="expected segment_ids of the queries too"):
        attention.apply({}, BASE, jnp.ones((2, L, D)), None, context)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 17), (8, 37), (7, 53)])
def test_buckets_are_those_of_t5(buckets, max_distance):
    distance = np.arange(3 * max_distance)
    expected = [t5_bucket(int(d), buckets, max_distance) for d in distance]
    got = bucket(jnp.asarray(distance), buckets, max_distance)
    np.testing.assert_array_equal(got, expected)
    assert set(expected) == set(range(buckets)) or max_distance == 17


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 37)])
def test_bidirectional_buckets_are_those_of_t5(buckets, max_distance):
    distance = np.arange(-2 * max_distance, 2 * max_distance)
    expected = [t5_bucket(int(d), buckets, max_distance, causal=False) for d in distance]
    np.testing.assert_array_equal(bucket(jnp.asarray(distance), buckets, max_distance, causal=False), expected)
    # There is no distance 0 to a later key.
    assert set(expected) == set(range(buckets)) - {buckets // 2}


def test_slopes_are_those_of_alibi():
    np.testing.assert_array_equal(alibi_slopes(8), [2.0**-h for h in range(1, 9)])
    for heads in (1, 2, 3, 5, 6, 12, 16):
        np.testing.assert_allclose(alibi_slopes(heads), slopes(heads), rtol=1e-6)


def test_rotation_keeps_norms_and_depends_on_the_distance_only():
    q_HK, k_HK = sequence(3, 10), sequence(3, 10, seed=2)

    def score(t, s):
        q, k = (rotate(x[None], jnp.array([at]), frequencies(50.0, 6))[0] for x, at in ((q_HK, t), (k_HK, s)))
        np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), jnp.linalg.norm(q_HK, axis=-1), rtol=1e-5)
        np.testing.assert_array_equal(q[:, 6:], q_HK[:, 6:])
        return jnp.sum(q * k, axis=-1)

    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    assert (jnp.abs(score(9, 4) - score(9, 5)) > 1e-2).all()


def test_scaled_frequencies_are_linear_in_turns_between_the_limits():
    assert np.array_equal(frequencies(50.0, 6), 50.0 ** -(np.arange(3) / 3))
    assert np.array_equal(frequencies(50.0, 6, RopeScaling(4.0)), frequencies(50.0, 6) / 4)
    # Turns in the context: 4.77, 2.18, 1.00, 0.46, 0.21.
    scaled = frequencies(50.0, 10, RopeScaling(4.0, context=30, low=0.5, high=3.0))
    between = [(30 * f / (2 * np.pi) - 0.5) / 2.5 for f in frequencies(50.0, 10)]
    kept = np.array([1.0, between[1], between[2], 0.0, 0.0])
    np.testing.assert_allclose(scaled, frequencies(50.0, 10) * (kept + (1 - kept) / 4), rtol=1e-14)


@pytest.mark.parametrize("wrong", [{"factor": 0.0}, {"low": 4.0}, {"context": 0}])
def test_a_bad_scaling_is_refused(wrong):
    with pytest.raises(ValueError, match="RopeScaling: got"):
        RopeScaling(**{"factor": 2.0} | wrong)


def test_positions_restart_in_each_segment():
    segment_ids = jnp.array([[3, 3, 3, 1, 3, 3], [0, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(positions(6, segment_ids), [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(positions(3, None), [[0, 1, 2]])


def test_what_is_learned_follows_the_options():
    def names(**options):
        return set(jax.eval_shape(lambda: attention.init(jax.random.key(0), replace(BASE, **options))))

    plain = {"q", "k", "v", "out"}
    assert names() == plain | {"bias"}
    assert names(position="rope", out_bias=True) == plain | {"out_bias"}
    assert names(position="none", qkv_bias=True) == plain | {"q_bias", "k_bias", "v_bias"}
    assert names(position="alibi", qk_norm=True) == plain | {"q_norm", "k_norm"}
    params = attention.init(jax.random.key(0), replace(BASE, width=400, head_dim=16, init_scale=0.5))
    assert params["k"].shape == (400, 2, 16)
    np.testing.assert_allclose(params["k"].std(), (0.5 / 400) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(params["out"].std(), (0.5 / 96) ** 0.5, rtol=0.02)


def test_what_cudnn_is_asked_is_what_a_cpu_computes(monkeypatch, random_params):
    """On a GPU, plain attention is one fused call; run here without cuDNN, its arguments mean the same."""
    asked = []

    def without_cudnn(*args, implementation, **options):
        asked.append(options)
        assert implementation == "cudnn"
        return original(*args, implementation="xla", **options)

    original = jax.nn.dot_product_attention
    plain = replace(BASE, position="rope")
    for options in ({}, {"causal": False}, {"window": 3}, {"window": 1}):
        case = build(random_params, replace(plain, **options))
        with monkeypatch.context() as patch:
            expected = case.mixer.apply(case.params, case.config, case.x_BLD)
            patch.setattr(dot_product, "fuses", lambda q_BLHK: True)
            patch.setattr(jax.nn, "dot_product_attention", without_cudnn)
            fused = case.mixer.apply(case.params, case.config, case.x_BLD)
        np.testing.assert_allclose(fused, expected, atol=1e-5)
    assert len(asked) == 4
    # What the fused call cannot do stays as it is.
    for options in ({"position": "t5"}, {"soft_cap": 1.0}, {"window": 3, "causal": False}):
        case = build(random_params, replace(plain, **options))
        with monkeypatch.context() as patch:
            patch.setattr(dot_product, "fuses", lambda q_BLHK: True)
            patch.setattr(jax.nn, "dot_product_attention", None)
            case.mixer.apply(case.params, case.config, case.x_BLD)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "fuses"),
    [
        ("cpu", "", "bfloat16", 64, False),
        ("gpu", "9.0", "bfloat16", 64, True),
        ("gpu", "8.0", "float16", 128, True),
        ("gpu", "9.0", "float32", 64, False),
        ("gpu", "9.0", "bfloat16", 60, False),
        ("gpu", "9.0", "bfloat16", 256, False),
        ("gpu", "7.5", "float16", 64, False),
        ("gpu", "gfx90a", "bfloat16", 64, False),
    ],
)
def test_where_attention_is_fused(monkeypatch, platform, capability, dtype, head_dim, fuses):
    class Device:
        compute_capability = capability

    q_BLHK = jnp.zeros((1, 2, 3, head_dim), dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert dot_product.fuses(q_BLHK) is fuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "sizes must be positive"),
        ({"groups": 0}, "sizes must be positive"),
        ({"buckets": 1}, "buckets at least 2"),
        ({"groups": 3}, "heads 4 are not divisible by groups 3"),
        ({"position": "sine"}, "position is 'sine', expected 't5', 'rope', 'alibi' or 'none'"),
        ({"max_distance": 16}, "max_distance is 16, expected more than 16"),
        ({"max_distance": 8, "causal": False}, "max_distance is 8, expected more than 8"),
        ({"buckets": 6, "causal": False}, "buckets is 6, expected a multiple of 4"),
        ({"position": "rope", "rope_fraction": 0.2}, "rotates 3 channels"),
        ({"position": "rope", "rope_fraction": 1.5}, "rotates 24 channels"),
        ({"position": "rope", "rope_scaling": 8.0}, "rope_scaling is 8.0, expected a RopeScaling or None"),
        ({"window": 0}, "window is 0, expected a positive number or None"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
    ],
)
def test_attention_refuses_a_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**arguments)


def test_attention_that_is_not_causal_has_no_steps():
    with pytest.raises(ValueError, match="causal is False, but only causal attention has a step form"):
        attention.init_state(replace(BASE, causal=False), 2, 3)


def test_attention_needs_heads_that_divide_the_width():
    with pytest.raises(ValueError, match="width 15 is not divisible by heads 4"):
        MIXERS["attention"].config(15, 4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_sequence_attends_by_rows(monkeypatch, random_params, causal):
    """Outputs and gradients are those of all queries at once, for lengths that rows do and do not divide."""
    config = AttentionConfig(width=6, heads=3, head_dim=2, groups=1, causal=causal, buckets=8, max_distance=9)
    params = random_params(attention.init, config)
    ids_BL = jnp.asarray(np.repeat([[1, 2, 1], [4, 4, 5]], (11, 3, 9), axis=1))

    def both(length):
        def loss(params, x_BLD):
            y_BLD = attention.apply(params, config, x_BLD, ids_BL[:, :length])
            return jnp.square(y_BLD).sum(), y_BLD

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, sequence(2, length, 6))

    expected = {length: both(length) for length in (20, 23)}
    monkeypatch.setattr(dot_product, "LONG", 10)
    monkeypatch.setattr(dot_product, "ROWS", 5)
    for length, whole in expected.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both(length), whole)
