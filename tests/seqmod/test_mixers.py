"""The contract that every mixer keeps, and each mixer against an independent float64 reference."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from seqmod.mixers import MIXERS, RGLRU, Attention, AttentionConfig, Mixer, RGLRUConfig, attention, base, rglru

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, D, H = 2, 7, 15, 3
MODULES: dict[str, Callable[[Any], nn.Module]] = {"attention": Attention, "rglru": RGLRU}


class Case(NamedTuple):
    mixer: Mixer
    config: Any
    params: Any
    x_BLD: jax.Array
    module: nn.Module


@pytest.fixture(scope="module", params=sorted(MIXERS))
def case(request, random_params) -> Case:
    mixer = MIXERS[request.param]
    config = mixer.config(D, H, 1.0, 20)
    params = random_params(mixer.init, config)
    x_BLD = sequence(B, L, D)
    return Case(mixer, config, params, x_BLD, MODULES[request.param](config))


def sequence(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def run(case: Case, x_BLD, segment_ids=None):
    return jax.jit(case.mixer.apply, static_argnums=1)(case.params, case.config, x_BLD, segment_ids)


def influence(case: Case, segment_ids) -> np.ndarray:
    """Largest derivative (L, L) of output step by input step, in the first sequence."""
    return np.abs(jacobian(case.mixer.apply, case.config, case.params, case.x_BLD[:1], segment_ids)).max((1, 3))


@partial(jax.jit, static_argnums=(0, 1))
def jacobian(apply, config, params, x_1LD, segment_ids):
    return jax.jacrev(lambda x_LD: apply(params, config, x_LD[None], segment_ids)[0])(x_1LD[0])


def steps(case: Case, x_BLD, state):
    def step(state, x_BD):
        y_BD, state = case.mixer.step(case.params, case.config, x_BD, state)
        return state, y_BD

    state, y_LBD = jax.jit(lambda x, state: jax.lax.scan(step, state, x))(jnp.swapaxes(x_BLD, 0, 1), state)
    return jnp.swapaxes(y_LBD, 0, 1), state


# The family


def test_shape_and_dtype(case):
    y_BLD = run(case, case.x_BLD)
    assert (y_BLD.shape, y_BLD.dtype) == ((B, L, D), jnp.float32)
    assert float(jnp.std(y_BLD)) > 0.01


def test_a_step_sees_itself_and_the_past_only(case):
    seen_LL = influence(case, jnp.zeros((1, L), jnp.int32))
    assert (seen_LL[np.triu_indices(L, 1)] == 0).all()
    assert (seen_LL[np.tril_indices(L)] > 0).all()


def test_steps_from_a_carried_state_agree_with_the_parallel_form(case):
    cut = 5
    start_BLD, state = steps(case, case.x_BLD[:, :cut], case.mixer.init_state(case.config, B, L))
    rest_BLD, _ = steps(case, case.x_BLD[:, cut:], state)
    together = jnp.concatenate([start_BLD, rest_BLD], axis=1)
    np.testing.assert_allclose(together, run(case, case.x_BLD), rtol=1e-4, atol=2e-6)


def test_the_state_keeps_its_shapes_and_dtypes(case):
    state = case.mixer.init_state(case.config, B, L)
    x_BD = case.x_BLD[:, 0]
    _, after = jax.eval_shape(lambda: case.mixer.step(case.params, case.config, x_BD, state))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_jit_changes_nothing(case):
    plain = case.mixer.apply(case.params, case.config, case.x_BLD)
    np.testing.assert_allclose(run(case, case.x_BLD), plain, rtol=1e-5, atol=1e-6)


def test_segments_are_sequences_of_their_own(case):
    # Of lengths 1, 2 and 4: shorter and longer than a convolution's kernel less one. An id that comes back is another.
    segment_ids = jnp.array([[2, 5, 5, 2, 2, 2, 2], [4, 4, 4, 4, 1, 1, 6]])
    packed_BLD = run(case, case.x_BLD, segment_ids)
    for row, bounds in enumerate(([0, 1, 3, 7], [0, 4, 6, 7])):
        for start, stop in pairwise(bounds):
            alone = run(case, case.x_BLD[row : row + 1, start:stop])[0]
            np.testing.assert_allclose(packed_BLD[row, start:stop], alone, rtol=1e-4, atol=2e-6)
    segment_L = np.array([0, 1, 1, 2, 2, 2, 2])
    seen_LL = influence(case, segment_ids[:1])
    assert (seen_LL[segment_L[:, None] != segment_L[None]] == 0).all()


@pytest.mark.parametrize("length", [1, 2, L])
def test_one_segment_is_no_segments_however_short(case, length):
    x_BLD = case.x_BLD[:, :length]
    one = run(case, x_BLD, jnp.full((B, length), 3))
    assert one.shape == x_BLD.shape
    np.testing.assert_allclose(one, run(case, x_BLD), rtol=1e-5, atol=1e-6)


@partial(jax.jit, static_argnums=(0, 1))
def gradients(apply, config, params, x_BLD):
    return jax.grad(lambda params, x_BLD: jnp.square(apply(params, config, x_BLD)).mean(), (0, 1))(params, x_BLD)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_gradients_are_finite(case, scale):
    grads = gradients(case.mixer.apply, case.config, case.params, scale * case.x_BLD)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert scale != 1.0 or np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_a_row_does_not_depend_on_the_batch(case):
    y_BLD = run(case, case.x_BLD)
    np.testing.assert_allclose(run(case, case.x_BLD[1:])[0], y_BLD[1], rtol=1e-5, atol=1e-6)
    other = run(case, case.x_BLD.at[0].add(3.0))
    np.testing.assert_array_equal(other[1], y_BLD[1])
    assert (other[0] != y_BLD[0]).any()


def test_the_linen_module_is_the_pure_function(case):
    variables = jax.eval_shape(case.module.init, jax.random.key(0), case.x_BLD)
    assert jax.tree.map(jnp.shape, variables["params"]["mixer"]) == jax.tree.map(jnp.shape, case.params)
    ids = jnp.array([[0] * 3 + [1] * 4] * B)
    y_BLD = jax.jit(case.module.apply)({"params": {"mixer": case.params}}, case.x_BLD, ids)
    np.testing.assert_allclose(y_BLD, run(case, case.x_BLD, ids), rtol=1e-6, atol=1e-6)


def test_the_family_is_complete():
    assert set(MODULES) == set(MIXERS)


# Attention


def t5_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """Half of the buckets hold one distance each; the others divide the logarithm up to max_distance evenly."""
    exact = buckets // 2
    if distance < exact:
        return distance
    fraction = math.log2(distance / exact) / math.log2(max_distance / exact)
    return min(exact + math.floor(fraction * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 17), (8, 37), (7, 53)])
def test_buckets_are_those_of_t5(buckets, max_distance):
    distance = np.arange(3 * max_distance)
    expected = [t5_bucket(int(d), buckets, max_distance) for d in distance]
    got = attention.bucket(jnp.asarray(distance), buckets, max_distance)
    np.testing.assert_array_equal(got, expected)
    assert set(expected) == set(range(buckets)) or max_distance == 17


def attention_reference(params, config: AttentionConfig, x_LD: np.ndarray, window: int) -> np.ndarray:
    """Softmax attention over the last `window` steps, one query and head at a time."""
    qkv, out, bias = (np.asarray(params[name], np.float64) for name in ("qkv", "out", "bias"))
    q, k, v = np.einsum("LD,DGHK->GLHK", x_LD, qkv)
    y_LD = np.zeros_like(x_LD)
    for t in range(len(x_LD)):
        past = range(max(0, t - window + 1), t + 1)
        for h in range(config.heads):
            scores = [
                q[t, h] @ k[s, h] / math.sqrt(config.head_dim)
                + bias[t5_bucket(t - s, config.buckets, config.max_distance), h]
                for s in past
            ]
            weights = np.exp(scores - np.max(scores))
            mixed = sum(w * v[s, h] for w, s in zip(weights / weights.sum(), past, strict=True))
            y_LD[t] += mixed @ out[h]
    return y_LD


def test_attention_against_the_formula_and_a_cache_shorter_than_the_sequence(random_params):
    config = AttentionConfig(width=5, heads=3, head_dim=2, buckets=4, max_distance=6)
    params = random_params(attention.init, config, scale=1.0)
    x_BLD = sequence(2, 11, 5)
    case = Case(attention.MIXER, config, params, x_BLD, Attention(config))
    exact = np.asarray(x_BLD, np.float64)
    np.testing.assert_allclose(run(case, x_BLD)[1], attention_reference(params, config, exact[1], 11), atol=1e-5)
    windowed, state = steps(case, x_BLD, attention.init_state(config, 2, 4))
    np.testing.assert_allclose(windowed[1], attention_reference(params, config, exact[1], 4), atol=1e-5)
    assert int(state.time) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "sizes must be positive"),
        ({"buckets": 1}, "buckets at least 2"),
        ({"max_distance": 16}, "max_distance is 16, expected more than 16"),
    ],
)
def test_attention_refuses_a_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**arguments)


def test_attention_needs_heads_that_divide_the_width():
    with pytest.raises(ValueError, match="width 15 is not divisible by heads 4"):
        MIXERS["attention"].config(15, 4, 1.0, 128)


# RG-LRU


def rglru_reference(params, config: RGLRUConfig, x_LD: np.ndarray) -> np.ndarray:
    """The equations of the module's docstring, one step at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size = config.recurrence // config.heads
    u_LN, h_N, y_LD = x_LD @ p["input"], np.zeros(config.recurrence), np.zeros_like(x_LD)
    for t, x_D in enumerate(x_LD):
        conv_N = p["conv_bias"].copy()
        for lag in range(min(config.kernel, t + 1)):
            conv_N += p["conv"][config.kernel - 1 - lag] * u_LN[t - lag]
        r_N, i_N = np.zeros_like(h_N), np.zeros_like(h_N)
        for head in range(config.heads):
            block = slice(head * size, (head + 1) * size)
            for gate, g_N in enumerate((r_N, i_N)):
                logit = conv_N[block] @ p["gates"][gate, head] + p["gates_bias"][gate, block]
                g_N[block] = 1 / (1 + np.exp(-logit))
        a_N = np.exp(-8 * np.log1p(np.exp(p["decay"])) * r_N)
        h_N = a_N * h_N + np.sqrt(1 - a_N**2) * i_N * conv_N
        branch = x_D @ p["gate"]
        gelu = 0.5 * branch * (1 + np.tanh(math.sqrt(2 / math.pi) * (branch + 0.044715 * branch**3)))
        assert np.abs(gelu - 0.5 * branch * (1 + erf(branch / math.sqrt(2)))).max() < 1e-3
        y_LD[t] = (gelu * h_N) @ p["out"]
    return y_LD


def test_rglru_against_the_equations(random_params):
    config = RGLRUConfig(width=5, recurrence=6, heads=3, kernel=4)
    params = random_params(rglru.init, config, scale=0.5)
    x_BLD = sequence(2, 11, 5)
    case = Case(rglru.MIXER, config, params, x_BLD, RGLRU(config))
    expected = rglru_reference(params, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_rglru_starts_with_slow_decays():
    config = RGLRUConfig(width=3, recurrence=1000, heads=2)
    decay_N = jax.jit(lambda key: rglru.init(key, config)["decay"])(jax.random.key(0))
    decay_N = np.exp(-8 * np.log1p(np.exp(np.asarray(decay_N, np.float64))))
    assert 0.9 <= decay_N.min() < 0.901
    assert 0.998 < decay_N.max() <= 0.9991


def test_rglru_refuses_a_bad_config():
    with pytest.raises(ValueError, match="recurrence 7 is not divisible by heads 2"):
        RGLRUConfig(width=5, recurrence=7, heads=2)
    with pytest.raises(ValueError, match="sizes must be positive"):
        RGLRUConfig(width=5, recurrence=0, heads=2)


# What they share


def test_scaled_normal_has_the_variance_it_says():
    x = scaled = np.asarray(base.scaled_normal(jax.random.key(0), (400, 250), 7, 0.1))
    assert abs(x.var() / (0.1 / 7) - 1) < 0.02
    assert abs(scaled.mean()) < 0.001
    # Truncated at two standard deviations of the normal that it is cut from.
    assert np.abs(scaled).max() <= 2 / 0.8796 * math.sqrt(0.1 / 7) * 1.0001


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    gain = jnp.array([1.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(base.rms_norm(gain, x), [[1.2, -3.2, 0, 0], [0, 0, 0, 0]], rtol=1e-5)
