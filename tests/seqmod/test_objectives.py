"""Losses against NumPy, factor by factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.objectives import (
    categorical_nll,
    corrupt,
    distribution_nll,
    factored_nll,
    future_tokens,
    masked_mean,
    masked_token,
    next_observation,
    next_token,
    step_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.float64(x)
    return x - np.log(np.exp(x).sum())


def test_categorical_nll():
    logits, labels = 3 * RNG.standard_normal((2, 3, 5)), RNG.integers(5, size=(2, 3))
    expected = [[-log_softmax(logits[b, t])[labels[b, t]] for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(categorical_nll(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)


@pytest.mark.parametrize("factors", [(7,), (3, 3, 3), (2, 5, 5, 3, 2), (1, 4)])
def test_factored_nll_is_the_sum_over_factors(factors):
    logits = 3 * RNG.standard_normal((2, 3, sum(factors)))
    labels = np.stack([RNG.integers(size, size=(2, 3)) for size in factors], axis=-1)
    one_hot, expected = np.zeros_like(logits), np.zeros((2, 3))
    for index in np.ndindex(2, 3):
        start = 0
        for size, label in zip(factors, labels[index], strict=True):
            one_hot[index][start + label] = 1
            expected[index] -= log_softmax(logits[index][start : start + size])[label]
            start += size
    got = factored_nll(jnp.asarray(logits), jnp.asarray(one_hot), factors)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logits have 7 features, expected sum\(3, 5\)"):
        factored_nll(jnp.zeros((2, 7)), jnp.zeros((2, 7)), (3, 5))


def test_masked_mean():
    values, mask = jnp.array([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]]), jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_allclose(masked_mean(values, mask), 7 / 3, rtol=1e-6)
    assert masked_mean(values, jnp.zeros((2, 3), bool)) == 0


def test_distribution_nll():
    logits, target = 3 * RNG.standard_normal((2, 3, 5)), RNG.dirichlet(np.ones(5), (2, 3))
    expected = [[-(target[b, t] * log_softmax(logits[b, t])).sum() for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(distribution_nll(jnp.asarray(logits), jnp.asarray(target)), expected, rtol=1e-5)
    labels = RNG.integers(5, size=(2, 3))
    hard = distribution_nll(jnp.asarray(logits), jax.nn.one_hot(labels, 5))
    np.testing.assert_allclose(hard, categorical_nll(jnp.asarray(logits), jnp.asarray(labels)), rtol=1e-5)
    # An impossible token that never occurs costs nothing, in value or gradient.
    impossible = jnp.array([0.0, -jnp.inf, 1.0])
    value, grad = jax.value_and_grad(distribution_nll)(impossible, jnp.array([0.5, 0.0, 0.5]))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def pairs(length, ahead, ids=None, valid=None, prompt=0):
    """The steps t that may be asked for t + ahead, by enumeration."""
    found = []
    for t in range(length - ahead):
        same = ids is None or len(set(ids[t : t + ahead + 1])) == 1
        if same and (valid is None or (valid[t] and valid[t + ahead])) and t + ahead >= prompt:
            found.append(t)
    return found


@pytest.mark.parametrize("ahead", [1, 2, 3, 9])
def test_step_weights_by_enumeration(ahead):
    ids = np.array([[1, 1, 1, 4, 4, 1, 1], [2, 2, 2, 2, 2, 2, 3]])
    valid = np.array([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]], bool)
    prompts = np.array([3, 1])
    got = step_weights(
        7, ahead, segment_ids=jnp.asarray(ids), mask_BL=jnp.asarray(valid), prompt_length_B=jnp.asarray(prompts)
    )
    for row in range(2):
        expected = pairs(7, ahead, ids[row].tolist(), valid[row], prompts[row])
        assert np.flatnonzero(got[row]).tolist() == expected
    assert np.flatnonzero(step_weights(7, ahead)[0]).tolist() == pairs(7, ahead)
    with pytest.raises(ValueError, match="ahead is 0, expected at least 1"):
        step_weights(7, 0)


def test_next_token_and_future_tokens():
    logits, tokens = 3 * RNG.standard_normal((2, 7, 3, 5)), RNG.integers(5, size=(2, 7))
    losses = {1: [], 2: [], 3: []}
    for b, t, i in np.ndindex(2, 7, 3):
        if t + i + 1 < 7:
            losses[i + 1].append(-log_softmax(logits[b, t, i])[tokens[b, t + i + 1]])
    got = next_token(jnp.asarray(logits[:, :, 0]), jnp.asarray(tokens))
    np.testing.assert_allclose(got, np.mean(losses[1]), rtol=1e-5)
    one = future_tokens(jnp.asarray(logits[:, :, :1]), jnp.asarray(tokens), 0.3)
    np.testing.assert_allclose(one, got, rtol=1e-6)
    weighted = sum(0.8 ** (i - 1) * sum(losses[i]) for i in losses)
    count = sum(0.8 ** (i - 1) * len(losses[i]) for i in losses)
    three = future_tokens(jnp.asarray(logits), jnp.asarray(tokens), 0.8)
    np.testing.assert_allclose(three, weighted / count, rtol=1e-5)
    # Only tokens from step 4 on are to be learned.
    late = future_tokens(jnp.asarray(logits), jnp.asarray(tokens), 0.8, jnp.arange(7)[None].repeat(2, 0) >= 4)
    total, count = 0.0, 0.0
    for b, t, i in np.ndindex(2, 7, 3):
        if 4 <= t + i + 1 < 7:
            total -= 0.8**i * log_softmax(logits[b, t, i])[tokens[b, t + i + 1]]
            count += 0.8**i
    np.testing.assert_allclose(late, total / count, rtol=1e-5)


def test_next_observation():
    factors = (2, 3)
    logits, labels = RNG.standard_normal((2, 4, 5)), np.stack([RNG.integers(n, size=(2, 4)) for n in factors], -1)
    one_hot = np.concatenate([np.eye(n)[labels[..., i]] for i, n in enumerate(factors)], -1)
    expected = np.mean(
        [
            -log_softmax(logits[b, t, :2])[labels[b, t + 1, 0]] - log_softmax(logits[b, t, 2:])[labels[b, t + 1, 1]]
            for b in range(2)
            for t in range(3)
        ]
    )
    got = next_observation(jnp.asarray(logits), jnp.asarray(one_hot), factors)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_corruption_has_its_rates_and_spares_padding():
    tokens = jnp.asarray(RNG.integers(0, 50, (400, 250)))
    valid = jnp.arange(250)[None] < 200 + 0 * tokens
    corrupted = corrupt(jax.random.key(0), tokens, 50, 50, rate=0.3, mask_BL=valid)
    hidden = np.asarray(corrupted.hidden_BL)
    assert not hidden[:, 200:].any()
    assert (np.asarray(corrupted.tokens_BL)[~hidden] == np.asarray(tokens)[~hidden]).all()
    assert abs(hidden[:, :200].mean() - 0.3) < 0.01
    inside = np.asarray(corrupted.tokens_BL)[hidden]
    assert abs((inside == 50).mean() - 0.8) < 0.01
    assert abs((inside == np.asarray(tokens)[hidden]).mean() - (0.1 + 0.1 / 50)) < 0.01
    logits = jnp.asarray(RNG.standard_normal((400, 250, 51)), jnp.float32)
    expected = categorical_nll(logits, tokens)[hidden].mean()
    np.testing.assert_allclose(masked_token(logits, tokens, corrupted.hidden_BL), expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"rate is 1\.5, expected 0 to 1"):
        corrupt(jax.random.key(0), tokens, 50, 50, rate=1.5)
