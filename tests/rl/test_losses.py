"""Losses against hand-worked values and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rl.distributions import categorical_log_prob
from rl.losses import (
    approximate_kl,
    clip_loss,
    group_advantage,
    normalise_advantage,
    policy_gradient_loss,
    sequence_ratio,
    value_loss,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
LOGITS_BLA = jnp.asarray(RNG.standard_normal((5, 3, 4)), jnp.float32)
ACTION_BL = jnp.asarray(RNG.integers(4, size=(5, 3)))
MASK_BL = jnp.arange(3)[None] < jnp.array([[3], [1], [2], [3], [1]])


@jax.jit
def loss_gradient(logits_BLA, return_B):
    old_BL = categorical_log_prob(LOGITS_BLA, ACTION_BL)
    advantage_BL = jnp.broadcast_to(group_advantage(return_B)[:, None], old_BL.shape)
    return jax.grad(
        lambda logits: clip_loss(categorical_log_prob(logits, ACTION_BL), old_BL, advantage_BL, MASK_BL, 0.2)
    )(logits_BLA)


def test_advantage_is_the_formula_of_the_paper():
    returns = np.array([0.0, 1.0, 0.25, 1.0, 0.0, 3.0])
    expected = (returns - returns.mean()) / (returns.std() + 1e-3)
    np.testing.assert_allclose(group_advantage(jnp.asarray(returns, jnp.float32)), expected, rtol=1e-5)
    expected = (returns - returns.mean()) / (returns.std() + 0.5)
    np.testing.assert_allclose(group_advantage(jnp.asarray(returns, jnp.float32), 0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 7 / 3])
def test_equal_returns_give_exactly_no_advantage_and_no_gradient(value):
    # The mean of 13 such numbers is none of them, once rounded.
    np.testing.assert_array_equal(group_advantage(jnp.full(13, value, jnp.float32)), np.zeros(13))
    gradient = loss_gradient(LOGITS_BLA + 0.3, jnp.full(5, value, jnp.float32))
    np.testing.assert_array_equal(gradient, np.zeros((5, 3, 4)))


def test_at_the_old_parameters_the_gradient_is_that_of_reinforce():
    return_B = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0])
    advantage_B = np.float64(group_advantage(return_B))
    expected = np.zeros((5, 3, 4))
    for b, t in np.argwhere(MASK_BL):
        probability_A = np.exp(np.float64(LOGITS_BLA[b, t]))
        score_A = np.eye(4)[ACTION_BL[b, t]] - probability_A / probability_A.sum()
        expected[b, t] = -advantage_B[b] * score_A / 10
    assert int(MASK_BL.sum()) == 10
    np.testing.assert_allclose(loss_gradient(LOGITS_BLA, return_B), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # already likelier by more than the clip: no further
        (1.5, -2.0, 3.0, 3.0),  # likelier though bad: the unclipped value, to come back
        (0.5, 2.0, -1.0, -1.0),  # less likely though good
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    def value(log_prob):
        two = jnp.stack([log_prob, jnp.float32(7)])
        return clip_loss(two, jnp.zeros(2), jnp.array([advantage, 5.0]), jnp.array([True, False]), 0.2)

    got = jax.value_and_grad(value)(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-5, atol=1e-6)


def test_nothing_to_learn_from_is_zero_and_the_masked_may_be_anything():
    nothing = jnp.zeros(3, bool)
    wild = jnp.array([-jnp.inf, jnp.nan, 1e30])
    for loss in (clip_loss(wild, wild, jnp.ones(3), nothing, 0.2), approximate_kl(wild, wild, nothing)):
        assert loss == 0


def test_approximate_kl_is_the_divergence_on_average():
    new, old = RNG.standard_normal((2, 4))
    action_N = jax.random.categorical(jax.random.key(0), jnp.asarray(old, jnp.float32), shape=(100_000,))
    log_new, log_old = (np.log(np.exp(x) / np.exp(x).sum()) for x in (new, old))
    got = approximate_kl(jnp.asarray(log_new)[action_N], jnp.asarray(log_old)[action_N], jnp.ones(100_000, bool))
    np.testing.assert_allclose(got, stats.entropy(np.exp(log_old), np.exp(log_new)), rtol=0.02)
    one = approximate_kl(jnp.array([-1.0, 5.0]), jnp.array([-3.0, 0.0]), jnp.array([True, False]))
    np.testing.assert_allclose(one, np.exp(2) - 1 - 2, rtol=1e-5)


def random_batch(B=5, L=7, seed=1):
    """New and old log-probabilities, advantages and a mask (B, L) of sequences of different lengths, one empty."""
    rng = np.random.default_rng(seed)
    log_prob, old, advantage = rng.standard_normal((3, B, L))
    length = rng.integers(1, L + 1, B)
    length[2] = 0
    return log_prob, old, advantage, np.arange(L)[None] < length[:, None]


def surrogate(ratio, advantage, low, high):
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.5), (0.5, 0.1)])
def test_clip_loss_of_both_levels_against_numpy(low, high):
    new, old, advantage, mask = random_batch()
    tokens, sequences = [], []
    for b in range(5):
        entries = [t for t in range(7) if mask[b, t]]
        tokens += [surrogate(np.exp(new[b, t] - old[b, t]), advantage[b, t], low, high) for t in entries]
        if entries:
            # Equation 7 as it is written: the ratio of the sequence's probabilities to the power of 1 / length.
            product = np.prod([np.exp(new[b, t]) / np.exp(old[b, t]) for t in entries])
            ratio = product ** (1 / len(entries))
            sequences.append(np.mean([surrogate(ratio, advantage[b, t], low, high) for t in entries]))
    arrays = [jnp.asarray(x) for x in (new, old, advantage, mask)]
    np.testing.assert_allclose(clip_loss(*arrays, low, high), -np.mean(tokens), rtol=1e-5)
    np.testing.assert_allclose(clip_loss(*arrays, low, high, level="sequence"), -np.mean(sequences), rtol=1e-5)
    if low == high:
        np.testing.assert_allclose(clip_loss(*arrays, low), -np.mean(tokens), rtol=1e-5)


def test_sequence_ratio_by_hand():
    new = jnp.log(jnp.array([[0.5, 0.5, 0.9], [0.8, 0.2, 0.1], [0.3, 0.3, 0.3]]))
    old = jnp.log(jnp.array([[0.25, 0.25, 0.1], [0.2, 0.1, 0.4], [0.1, 0.1, 0.1]]))
    mask = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    expected = [2, (4 * 2 / 4) ** (1 / 3), 1]
    np.testing.assert_allclose(sequence_ratio(new, old, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(sequence_ratio(old, new, mask), 1 / np.array(expected), rtol=1e-6)


def test_levels_agree_for_sequences_of_one_token():
    new, old, advantage, mask = (jnp.asarray(x[:, :1]) for x in random_batch())

    def loss(new, level):
        return clip_loss(new, old, advantage, mask, 0.2, 0.3, level)

    token, sequence = (jax.value_and_grad(loss)(new, level) for level in ("token", "sequence"))
    np.testing.assert_allclose(token[0], sequence[0], rtol=1e-6)
    np.testing.assert_allclose(token[1], sequence[1], rtol=1e-6)
    assert jnp.abs(token[1]).max() > 0


def test_at_the_old_parameters_every_ratio_is_one():
    _, old, advantage, mask = (jnp.asarray(x) for x in random_batch())
    np.testing.assert_array_equal(sequence_ratio(old, old, mask), np.ones(5))
    gradient = {
        level: jax.grad(lambda new, level=level: clip_loss(new, old, advantage, mask, 0.2, level=level))(old)
        for level in ("token", "sequence")
    }
    advantage, mask = np.float64(advantage), np.asarray(mask)
    np.testing.assert_allclose(gradient["token"], -advantage * mask / mask.sum(), rtol=1e-5)
    # Four sequences that are not empty; every token of one gets the sequence's mean advantage.
    length_B = np.maximum(mask.sum(1, keepdims=True), 1)
    mean_B = (advantage * mask).sum(1, keepdims=True) / length_B
    np.testing.assert_allclose(gradient["sequence"], -mean_B * mask / length_B / 4, rtol=1e-4, atol=1e-7)


def test_a_clipped_sequence_teaches_none_of_its_tokens():
    """Ratios 2 and 1/2 of one sequence cancel at the sequence level, which then isn't clipped; at the token level the
    first is. Ratios 2 and 2 are clipped at both."""
    log_two = jnp.log(2.0)
    new = jnp.stack([jnp.stack([log_two, -log_two]), jnp.stack([log_two, log_two])])
    old, ones, mask = jnp.zeros((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2), bool)
    token = jax.grad(lambda new: clip_loss(new, old, ones, mask, 0.2))(new)
    np.testing.assert_allclose(token, [[0, -0.5 / 4], [0, 0]], rtol=1e-6)
    sequence = jax.grad(lambda new: clip_loss(new, old, ones, mask, 0.2, level="sequence"))(new)
    np.testing.assert_allclose(sequence, [[-1 / 4, -1 / 4], [0, 0]], rtol=1e-6)


def test_bounds_may_differ():
    def slopes(clip, clip_high):
        log_ratio = jnp.log(jnp.array([1.25, 0.75]))
        zeros, mask = jnp.zeros(2), jnp.ones(2, bool)
        return jax.grad(lambda x: clip_loss(x, zeros, jnp.array([1.0, -1.0]), mask, clip, clip_high))(log_ratio)

    np.testing.assert_allclose(slopes(0.2, None), [0, 0])
    np.testing.assert_allclose(slopes(0.2, 0.3), [-1.25 / 2, 0], rtol=1e-6)
    np.testing.assert_allclose(slopes(0.3, 0.2), [0, 0.75 / 2], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(slopes)(0.2, 0.3), [-1.25 / 2, 0], rtol=1e-6)


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match="level is 'episode', expected 'token' or 'sequence'"):
        clip_loss(*(jnp.zeros((1, 1)),) * 3, jnp.ones((1, 1), bool), 0.2, level="episode")


def test_policy_gradient_by_hand():
    log_prob, advantage = jnp.array([[-1.0, -2.0], [-3.0, jnp.nan]]), jnp.array([[2.0, -1.0], [4.0, jnp.inf]])
    mask = jnp.array([[True, True], [True, False]])
    loss, gradient = jax.value_and_grad(policy_gradient_loss)(log_prob, advantage, mask)
    np.testing.assert_allclose(loss, -(-2 + 2 - 12) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-2 / 3, 1 / 3], [-4 / 3, 0]], rtol=1e-6)


def test_advantages_and_targets_are_constants():
    arrays, mask = jnp.array([[0.3, -0.2], [0.4, 0.7]]), jnp.ones(2, bool)
    losses = {
        "policy gradient": lambda x: policy_gradient_loss(arrays[0], x, mask),
        "token": lambda x: clip_loss(arrays[0], arrays[1], x, mask, 0.2),
        "sequence": lambda x: clip_loss(arrays[0], arrays[1], x, mask, 0.2, level="sequence"),
        "target": lambda x: value_loss(arrays[0], x, mask),
        "old value": lambda x: value_loss(arrays[0], arrays[1], mask, x, 0.2),
    }
    for name, loss in losses.items():
        np.testing.assert_array_equal(jax.grad(loss)(jnp.array([0.9, -1.1])), np.zeros(2), err_msg=name)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # moved by less than the clip: the plain error
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),  # moved far towards the target: the clipped error is larger, no further
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, -1.5),  # moved far away: the plain error is larger, to come back
        (3.5, 1.0, 2.0, 0.5 * 1.5**2, 1.5),  # beyond the target by more than the clipped value falls short
        (2.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, slope):
    def total(value):
        two = jnp.stack([value, jnp.float32(jnp.nan)])
        rest = (jnp.array([target, 1.0]), jnp.array([True, False]), jnp.array([old, jnp.inf]), 0.2)
        return value_loss(two, *rest)

    got = jax.value_and_grad(total)(jnp.float32(value))
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-5, atol=1e-6)


def test_value_loss_is_half_the_mean_square():
    value, target, _, mask = random_batch()
    arrays = [jnp.asarray(x) for x in (value, target, mask)]
    expected = np.mean([0.5 * (value[i] - target[i]) ** 2 for i in np.ndindex(5, 7) if mask[i]])
    np.testing.assert_allclose(value_loss(*arrays), expected, rtol=1e-5)
    # A clip wider than any change leaves it as it is.
    np.testing.assert_allclose(value_loss(*arrays, arrays[1], 100.0), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="clip is given but old_value is None"):
        value_loss(*arrays, clip=0.2)
    with pytest.raises(ValueError, match="old_value is given but clip is None"):
        value_loss(*arrays, old_value=arrays[0])


def test_normalised_advantages_have_mean_zero_and_deviation_one():
    _, _, advantage, mask = random_batch()
    chosen = advantage[mask]
    expected = np.where(mask, (advantage - chosen.mean()) / chosen.std(), 0.0)
    wild = jnp.asarray(np.where(mask, advantage, np.nan))
    np.testing.assert_allclose(normalise_advantage(wild, jnp.asarray(mask)), expected, rtol=1e-4, atol=1e-6)
    # Large numbers close together keep their digits.
    far = jnp.array([4096.0, 4096.5, 4097.0])
    np.testing.assert_allclose(
        normalise_advantage(far, jnp.ones(3, bool)), [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [0.1, 7 / 3])
def test_equal_advantages_are_exactly_zero(value):
    mask = jnp.arange(13) > 1
    equal = jnp.where(mask, jnp.float32(value), jnp.nan)
    np.testing.assert_array_equal(normalise_advantage(equal, mask), np.zeros(13))
    np.testing.assert_array_equal(normalise_advantage(equal, jnp.zeros(13, bool)), np.zeros(13))


def test_without_any_entry_every_loss_is_zero():
    nothing, wild = jnp.zeros((2, 3), bool), jnp.full((2, 3), jnp.nan)
    assert policy_gradient_loss(wild, wild, nothing) == 0
    assert value_loss(wild, wild, nothing) == 0
    assert value_loss(wild, wild, nothing, wild, 0.2) == 0
    assert clip_loss(wild, wild, wild, nothing, 0.2, level="sequence") == 0
    gradient = jax.grad(lambda x: clip_loss(x, wild, wild, nothing, 0.2, level="sequence"))(wild)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
