"""Attention against the formula, one query and head at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, AttentionConfig, attention
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")


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
    case = Case(attention.MIXER, config, params, x_BLD)
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
        MIXERS["attention"].config(15, 4)
