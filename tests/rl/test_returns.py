"""Returns and advantages against sums written out step by step in float64, over random endings of episodes."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rl.returns import discounted_returns, generalised_advantages, lambda_returns, n_step_returns, vtrace

pytestmark = pytest.mark.usefixtures("quick_compile")

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
CASES = st.fixed_dictionaries(
    {
        "T": st.sampled_from([1, 2, 5, 11]),
        "ends": st.sampled_from([0.0, 0.2, 0.6]),
        "discount": st.sampled_from([0.0, 0.7, 0.99, 1.0]),
        "lambda_": st.sampled_from([0.0, 0.4, 0.95, 1.0]),
        "seed": st.integers(0, 10**6),
    }
)


def draw(T, ends, seed, width=3):
    """A trajectory of `width` environments; the value after a step is the next step's, except where an episode ends."""
    rng = np.random.default_rng(seed)
    reward, value, next_value, log_ratio = rng.standard_normal((4, T, width))
    terminated, truncated = rng.random((2, T, width)) < ends
    goes_on = ~(terminated | truncated)[:-1]
    next_value[:-1][goes_on] = value[1:][goes_on]
    return reward, value, next_value, terminated, truncated, log_ratio


def episodes(terminated, truncated):
    """(first, last, whether it terminated) of every episode, of one environment."""
    first, found = 0, []
    for t in range(len(terminated)):
        if terminated[t] or truncated[t] or t == len(terminated) - 1:
            found.append((first, t, bool(terminated[t])))
            first = t + 1
    return found


def each_environment(function, *arrays):
    """Apply a function of one environment's arrays (T,) to each; a stack of what it gives."""
    columns = [function(*(x[:, e] for x in arrays)) for e in range(arrays[0].shape[1])]
    return np.stack(columns, axis=-1)


def slow_n_step(steps, discount, reward, next_value, terminated, truncated):
    out = np.zeros(len(reward))
    for first, last, dies in episodes(terminated, truncated):
        for t in range(first, last + 1):
            end = min(t + steps - 1, last)
            out[t] = sum(discount ** (k - t) * reward[k] for k in range(t, end + 1))
            if not (dies and end == last):
                out[t] += discount ** (end - t + 1) * next_value[end]
    return out


def slow_lambda(discount, lambda_, reward, next_value, terminated, truncated):
    """The weighted average of all n-step returns."""
    out = np.zeros(len(reward))
    for first, last, _ in episodes(terminated, truncated):
        for t in range(first, last + 1):
            most = last - t + 1
            for n in range(1, most + 1):
                weight = lambda_ ** (n - 1) * (1.0 if n == most else 1 - lambda_)
                out[t] += weight * slow_n_step(n, discount, reward, next_value, terminated, truncated)[t]
    return out


def slow_advantage(discount, lambda_, reward, value, next_value, terminated, truncated):
    out = np.zeros(len(reward))
    for first, last, dies in episodes(terminated, truncated):
        for t in range(first, last + 1):
            for k in range(t, last + 1):
                after = 0.0 if dies and k == last else next_value[k]
                out[t] += (discount * lambda_) ** (k - t) * (reward[k] + discount * after - value[k])
    return out


def slow_vtrace(discount, lambda_, clip_rho, clip_c, log_ratio, reward, value, next_value, terminated, truncated):
    ratio = np.exp(log_ratio)
    rho, c = np.minimum(clip_rho, ratio), lambda_ * np.minimum(clip_c, ratio)
    target, advantage = value.copy(), np.zeros(len(reward))
    for first, last, dies in episodes(terminated, truncated):
        for t in range(first, last + 1):
            for k in range(t, last + 1):
                after = 0.0 if dies and k == last else next_value[k]
                error = rho[k] * (reward[k] + discount * after - value[k])
                target[t] += discount ** (k - t) * np.prod(c[t:k]) * error
        for t in range(first, last + 1):
            after = target[t + 1] if t < last else 0.0 if dies else next_value[t]
            advantage[t] = rho[t] * (reward[t] + discount * after - value[t])
    return np.stack([target, advantage])


@given(CASES)
def test_lambda_and_discounted_returns(case):
    reward, _, next_value, terminated, truncated, _ = draw(case["T"], case["ends"], case["seed"])
    discount, lambda_ = case["discount"], case["lambda_"]
    got = jax.jit(lambda_returns)(reward, next_value, terminated, truncated, discount, lambda_)
    flags = (terminated, truncated)
    expected = each_environment(partial(slow_lambda, discount, lambda_), reward, next_value, *flags)
    np.testing.assert_allclose(got, expected, **CLOSE)
    got = jax.jit(discounted_returns)(reward, terminated, truncated, discount)
    expected = each_environment(partial(slow_n_step, 10**3, discount), reward, 0 * next_value, *flags)
    np.testing.assert_allclose(got, expected, **CLOSE)


@given(CASES)
def test_generalised_advantages(case):
    reward, value, next_value, terminated, truncated, _ = draw(case["T"], case["ends"], case["seed"])
    arrays, rates = (reward, value, next_value, terminated, truncated), (case["discount"], case["lambda_"])
    advantage, target = jax.jit(generalised_advantages)(*arrays, *rates)
    np.testing.assert_allclose(advantage, each_environment(partial(slow_advantage, *rates), *arrays), **CLOSE)
    np.testing.assert_allclose(target, advantage + value, **CLOSE)
    # The two definitions meet: advantages are lambda returns less the value.
    returns = lambda_returns(reward, next_value, terminated, truncated, *rates)
    np.testing.assert_allclose(target, returns, **CLOSE)


@given(CASES, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.5, 1.0, 3.0]))
def test_vtrace(case, clip_rho, clip_c):
    reward, value, next_value, terminated, truncated, log_ratio = draw(case["T"], case["ends"], case["seed"])
    arrays = (log_ratio, reward, value, next_value, terminated, truncated)
    rates = (case["discount"], case["lambda_"], clip_rho, clip_c)
    got = jax.jit(vtrace)(*arrays, *rates)
    slow = each_environment(partial(slow_vtrace, *rates), *arrays)
    np.testing.assert_allclose(jnp.stack(got), slow, rtol=1e-4, atol=1e-4)
    # On policy nothing is clipped at 1, and the targets are lambda returns.
    target, _ = vtrace(0 * log_ratio, *arrays[1:], *rates[:2])
    returns = lambda_returns(reward, next_value, terminated, truncated, *rates[:2])
    np.testing.assert_allclose(target, returns, **CLOSE)


@given(CASES, st.sampled_from([1, 2, 3, 100]))
def test_n_step_returns(case, steps):
    reward, _, next_value, terminated, truncated, _ = draw(case["T"], case["ends"], case["seed"])
    arrays = (reward, next_value, terminated, truncated)
    got = jax.jit(n_step_returns, static_argnums=5)(*arrays, case["discount"], steps)
    slow = each_environment(partial(slow_n_step, steps, case["discount"]), *arrays)
    np.testing.assert_allclose(got, slow, **CLOSE)
    if steps == 1:
        np.testing.assert_allclose(got, lambda_returns(*arrays, case["discount"], 0.0), **CLOSE)
    if steps == 100:
        np.testing.assert_allclose(got, lambda_returns(*arrays, case["discount"], 1.0), **CLOSE)


def test_by_hand():
    reward, next_value = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    terminated = np.array([False, True, False, False, False])
    truncated = np.array([False, False, False, True, False])
    got = discounted_returns(reward, terminated, truncated, 0.5)
    np.testing.assert_array_equal(got, [1 + 1, 2, 4 + 4, 8, 16])
    got = lambda_returns(reward, next_value, terminated, truncated, 0.5, 1.0)
    np.testing.assert_array_equal(got, [1 + 1, 2, 4 + 14, 8 + 20, 16 + 25])
    got = lambda_returns(reward, next_value, terminated, truncated, 0.5, 0.0)
    np.testing.assert_array_equal(got, [1 + 5, 2, 4 + 15, 8 + 20, 16 + 25])
    # Where both flags are set, the episode has terminated.
    both = lambda_returns(reward, next_value, terminated, terminated | truncated, 0.5, 1.0)
    np.testing.assert_array_equal(both[:2], [2, 2])


def outputs(name, reward, value, next_value, terminated, truncated, log_ratio):
    flags = (terminated, truncated)
    if name == "discounted":
        return discounted_returns(reward, *flags, 0.9)
    if name == "lambda":
        return lambda_returns(reward, next_value, *flags, 0.9, 0.8)
    if name == "advantage":
        return generalised_advantages(reward, value, next_value, *flags, 0.9, 0.8)[0]
    if name == "n-step":
        return n_step_returns(reward, next_value, *flags, 0.9, 3)
    return sum(vtrace(log_ratio, reward, value, next_value, *flags, 0.9, 0.8))


ALL = ("discounted", "lambda", "advantage", "n-step", "vtrace")


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
@pytest.mark.parametrize("name", ALL)
def test_nothing_crosses_the_end_of_an_episode(name, flag):
    reward, value, next_value, _, _, log_ratio = draw(7, 0.0, seed=3)
    ended, never = np.zeros((7, 3), bool), np.zeros((7, 3), bool)
    ended[2] = True
    flags = (ended, never) if flag == "terminated" else (never, ended)

    def before(floats):
        reward, value, next_value, log_ratio = floats
        return outputs(name, reward, value, next_value, *flags, log_ratio)[:3].sum()

    floats = tuple(jnp.asarray(x, jnp.float32) for x in (reward, value, next_value, log_ratio))
    gradients = jax.grad(before)(floats)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[3:], np.zeros((4, 3)))
    assert jnp.abs(gradients[0][:3]).min() > 0
    # The value of the final observation counts if, and only if, the episode was truncated.
    if name != "discounted":
        assert bool((gradients[2][2] != 0).all()) == (flag == "truncated")
    # What follows may be anything at all, and after a termination so may the final observation's value.
    wild = [x.at[3:].set(jnp.nan) for x in floats]
    if flag == "terminated":
        wild[2] = wild[2].at[2].set(jnp.nan)
    assert before(tuple(wild)) == before(floats)


@pytest.mark.parametrize("name", ALL)
def test_vmap_jit_and_trailing_axes_agree(name):
    arrays = draw(7, 0.3, seed=5)
    whole = outputs(name, *arrays)
    mapped = jax.jit(jax.vmap(partial(outputs, name), in_axes=1, out_axes=1))(*arrays)
    np.testing.assert_allclose(whole, mapped, rtol=1e-6)
    deeper = outputs(name, *(x[:, :, None] for x in arrays))
    np.testing.assert_array_equal(deeper[:, :, 0], whole)


def test_discounts_are_traced():
    reward, _, next_value, terminated, truncated, _ = draw(5, 0.2, seed=1)

    def first(discount):
        return lambda_returns(reward, next_value, terminated, truncated, discount, 0.9)[0, 0]

    discounts = jnp.array([0.0, 0.5, 0.9])
    np.testing.assert_allclose(jax.vmap(first)(discounts), [first(float(x)) for x in discounts], rtol=1e-6)
    slope = (first(0.51) - first(0.49)) / 0.02
    np.testing.assert_allclose(jax.grad(first)(0.5), slope, rtol=1e-2)


def test_a_huge_ratio_is_clipped_before_it_overflows():
    reward, value, next_value, terminated, truncated, _ = draw(5, 0.2, seed=1)

    def first(log_ratio):
        return vtrace(log_ratio, reward, value, next_value, terminated, truncated, 0.9)[0][0].sum()

    at_clip, gradient = first(jnp.zeros((5, 3))), jax.grad(first)(jnp.full((5, 3), 1e4))
    assert first(jnp.full((5, 3), 1e4)) == at_clip
    np.testing.assert_array_equal(gradient, np.zeros((5, 3)))


def test_integer_rewards_are_numbers():
    flags = (np.zeros(3, bool), np.zeros(3, bool))
    np.testing.assert_array_equal(discounted_returns(np.array([1, 1, 2]), *flags, 0.5), [2.0, 2.0, 2.0])


@pytest.mark.parametrize("name", ["value_T", "next_value_T", "terminated_T", "truncated_T", "log_ratio_T"])
def test_a_wrong_shape_is_named(name):
    names = ("reward_T", "value_T", "next_value_T", "terminated_T", "truncated_T", "log_ratio_T")
    arrays = dict(zip(names, draw(5, 0.2, seed=1), strict=True))
    arrays[name] = arrays[name][:, :2]
    with pytest.raises(ValueError, match=rf"{name} has shape \(5, 2\), expected that of reward_T, \(5, 3\)"):
        vtrace(**arrays, discount=0.9)


def test_what_else_cannot_be_is_refused():
    reward, value, next_value, terminated, truncated, _ = draw(5, 0.2, seed=1)
    nothing = np.zeros((0, 3))
    with pytest.raises(ValueError, match=r"reward_T has shape \(0, 3\)"):
        discounted_returns(nothing, nothing > 0, nothing > 0, 0.9)
    with pytest.raises(ValueError, match=r"reward_T has shape \(\)"):
        discounted_returns(np.ones(()), np.array(False), np.array(False), 0.9)
    with pytest.raises(ValueError, match="terminated_T has dtype float32, expected bool"):
        lambda_returns(reward, next_value, terminated.astype(np.float32), truncated, 0.9, 0.9)
    with pytest.raises(ValueError, match=r"discount has shape \(3,\)"):
        lambda_returns(reward, next_value, terminated, truncated, np.full(3, 0.9), 0.9)
    with pytest.raises(ValueError, match=r"lambda_ has shape \(5, 3\)"):
        generalised_advantages(reward, value, next_value, terminated, truncated, 0.9, value)
    with pytest.raises(ValueError, match="steps is 0"):
        n_step_returns(reward, next_value, terminated, truncated, 0.9, 0)
