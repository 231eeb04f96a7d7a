"""Data sets: what was collected against a replay, and windows, filters and returns against NumPy."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.offline import (
    RewardObserved,
    Trajectories,
    best,
    check,
    collect_trajectories,
    concatenate,
    observation_moments,
    returns_to_go,
    sample_windows,
)
from rl.rollout import rollout

pytestmark = pytest.mark.usefixtures("quick_compile")

N, L, F = 7, 11, 3
LENGTHS = (5, 11, 1, 7, 3, 2, 10)


def dataset(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, steps: int = L) -> Trajectories:
    """Noise, also after the ends; action t of episode n is 100 n + t."""
    rng = np.random.default_rng(seed)
    count = len(lengths)
    return Trajectories(
        obs_NL=jnp.asarray(rng.standard_normal((count, steps, F)), jnp.float32),
        action_NL=jnp.asarray(100 * np.arange(count)[:, None] + np.arange(steps)[None], jnp.int32),
        reward_NL=jnp.asarray(rng.standard_normal((count, steps)), jnp.float32),
        mask_NL=jnp.asarray(np.arange(steps)[None] < np.array(lengths)[:, None]),
        terminated_N=jnp.asarray(rng.random(count) < 0.5),
    )


def one_by_one(data: Trajectories) -> list[dict[str, np.ndarray]]:
    """Each episode without padding, in float64."""
    arrays = jax.tree.map(np.asarray, data)
    return [
        {
            "obs": arrays.obs_NL[n, :length].astype(np.float64),
            "action": arrays.action_NL[n, :length],
            "reward": arrays.reward_NL[n, :length].astype(np.float64),
        }
        for n, length in enumerate(arrays.mask_NL.sum(1))
    ]


def act(key, obs_BF, memory_B):
    """Random, and counts its steps; without a key, the action after the one that is right."""
    right_B = (obs_BF[:, :3].argmax(-1) + 2) % 3
    action_B = right_B if key is None else jax.random.randint(key, (len(obs_BF),), 0, 3)
    return action_B, memory_B + 1


@pytest.mark.parametrize("limits", [{"longest": 5}, {"longest": 9, "max_steps": 3}, {"longest": 19}])
def test_collected_rewards_follow_their_actions(tiny, limits):
    params = tiny.params(step_reward=0.5, final_reward=2.0, **limits)
    data = jax.jit(
        lambda key: collect_trajectories(
            key, act, tiny, params, episodes=17, horizon=7, memory=jnp.zeros(17, jnp.int32)
        )
    )(jax.random.key(0))
    check(data)
    assert data.obs_NL.shape == (17, 7, 5)
    for n, episode in enumerate(one_by_one(data)):
        context = episode["obs"][0, :3].argmax()
        right_T = episode["action"] == (context + 1) % 3
        expected_T = 0.5 * right_T
        if data.terminated_N[n]:
            expected_T[-1] += 2.0 * right_T.all()
        np.testing.assert_array_equal(episode["reward"], expected_T)
        np.testing.assert_array_equal(episode["obs"][:, 3].astype(int), 1 - np.arange(len(right_T)) % 2)
        # What did not terminate ran until a limit.
        assert data.terminated_N[n] or len(right_T) == min(limits.get("max_steps", 7), 7)
    assert data.terminated_N.all() == (limits["longest"] == 5)
    assert len({len(episode["reward"]) for episode in one_by_one(data)}) > 1 or "max_steps" in limits
    assert not np.asarray(data.reward_NL)[~np.asarray(data.mask_NL)].any()


def test_greedy_and_random_actions(tiny):
    params = tiny.params(longest=5)
    space = SimpleNamespace(sample=lambda key: jax.random.randint(key, (), 0, 3))

    class Spacious(type(tiny)):
        def action_space(self, params):
            return space

    @jax.jit
    def run(epsilon):
        return collect_trajectories(
            jax.random.key(2),
            act,
            Spacious(),
            params,
            episodes=401,
            horizon=5,
            memory=jnp.zeros(401, jnp.int32),
            greedy=True,
            epsilon=epsilon,
        )

    def shares(epsilon):
        obs_NLF, action_NL, _, mask_NL, _ = (np.asarray(x) for x in run(epsilon))
        offset_NL = (action_NL - obs_NLF[..., :3].argmax(-1)) % 3
        return np.bincount(offset_NL[mask_NL], minlength=3) / mask_NL.sum()

    np.testing.assert_array_equal(shares(0.0), [0, 0, 1])
    # 1200 steps: a standard deviation is below 0.015.
    np.testing.assert_allclose(shares(0.5), [1 / 6, 1 / 6, 2 / 3], atol=0.06)
    np.testing.assert_allclose(shares(1.0), [1 / 3, 1 / 3, 1 / 3], atol=0.06)


def test_a_policy_sees_the_reward_of_the_step_before(tiny):
    params = tiny.params(longest=19, step_reward=0.5)

    def policy(key, step, memory):
        action_B = jax.random.randint(key, step.running_B.shape, 0, 3)
        right_B = action_B == (step.obs_BF.obs[:, :3].argmax(-1) + 1) % 3
        return action_B, memory, (step.obs_BF.reward, right_B)

    episodes, _ = rollout(jax.random.key(0), RewardObserved(tiny), params, policy, (), 11, 7)
    seen_TB, right_TB = (np.asarray(x) for x in episodes.recorded)
    valid_TB = np.asarray(episodes.valid_TB)
    np.testing.assert_array_equal(seen_TB[0], 0)
    np.testing.assert_array_equal(seen_TB[1:][valid_TB[1:]], 0.5 * right_TB[:-1][valid_TB[1:]])


def test_joined_sets_keep_their_episodes():
    parts = dataset(0), dataset(1, (2, 3), 5), dataset(2, (13,), 13)
    joined = concatenate(*parts)
    assert joined.mask_NL.shape == (N + 3, 13)
    expected = [episode for part in parts for episode in one_by_one(part)]
    for got, episode in zip(one_by_one(joined), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, episode)
    np.testing.assert_array_equal(joined.terminated_N, np.concatenate([part.terminated_N for part in parts]))
    np.testing.assert_allclose(joined.return_N, [episode["reward"].sum() for episode in expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_returns_to_go(discount):
    data = dataset()
    got_NL = np.asarray(returns_to_go(data.reward_NL, data.mask_NL, discount))
    for n, episode in enumerate(one_by_one(data)):
        reward_T = episode["reward"]
        expected_T = [sum(discount**k * r for k, r in enumerate(reward_T[t:])) for t in range(len(reward_T))]
        np.testing.assert_allclose(got_NL[n, : len(reward_T)], expected_T, rtol=1e-5, atol=1e-6)
        assert not got_NL[n, len(reward_T) :].any()


def test_moments_are_those_of_all_steps():
    data = dataset()
    rows = np.concatenate([episode["obs"] for episode in one_by_one(data)])
    moments = observation_moments(data)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-5)
    assert moments.samples == sum(LENGTHS)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 1.0])
def test_the_best_episodes_fill_their_fraction(fraction):
    data = dataset()
    return_N = [episode["reward"].sum() for episode in one_by_one(data)]
    order = sorted(range(N), key=lambda n: -return_N[n])
    kept, steps = [order[0]], LENGTHS[order[0]]
    for n in order[1:]:
        if steps + LENGTHS[n] > fraction * sum(LENGTHS):
            break
        kept, steps = [*kept, n], steps + LENGTHS[n]
    length_N = np.where(np.isin(np.arange(N), kept), LENGTHS, 0)
    np.testing.assert_array_equal(best(data, fraction).length_N, length_N)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("from_start", [False, True])
def test_windows_are_pieces_of_episodes(pad, from_start):
    data, K = dataset(), 4
    windows = sample_windows(jax.random.key(0), data, 53, K, pad=pad, from_start=from_start)
    episodes = one_by_one(data)
    for b in range(53):
        mask_K = np.asarray(windows.mask_BK[b])
        steps = mask_K.sum()
        # Padding is on one side.
        np.testing.assert_array_equal(mask_K, np.arange(K) >= K - steps if pad == "left" else np.arange(K) < steps)
        n, start = divmod(int(windows.action_BK[b][mask_K][0]), 100)
        assert steps == min(K, LENGTHS[n] - start)
        assert start == 0 or not from_start
        piece = slice(start, start + steps)
        reward_T = episodes[n]["reward"]
        np.testing.assert_array_equal(windows.time_BK[b][mask_K], np.arange(start, start + steps))
        np.testing.assert_array_equal(windows.action_BK[b][mask_K], episodes[n]["action"][piece])
        np.testing.assert_array_equal(windows.obs_BK[b][mask_K], episodes[n]["obs"][piece])
        np.testing.assert_array_equal(windows.reward_BK[b][mask_K], reward_T[piece])
        left_T = reward_T[::-1].cumsum()[::-1][piece]
        np.testing.assert_allclose(windows.left_BK[b][mask_K], left_T, rtol=1e-5, atol=1e-6)
        for x in (windows.obs_BK, windows.action_BK, windows.reward_BK, windows.left_BK, windows.time_BK):
            assert not np.asarray(x[b])[~mask_K].any()


def test_every_step_is_as_likely_to_begin_a_window():
    data, draws = best(dataset(), 0.8), 20_000
    lengths = np.asarray(data.length_N)
    assert (lengths == 0).any()
    windows = sample_windows(jax.random.key(0), data, draws, 2)
    count = Counter(np.asarray(windows.action_BK[:, 0]).tolist())
    steps = {100 * n + t for n in range(N) for t in range(lengths[n])}
    assert set(count) == steps
    expected = draws / len(steps)
    # Four standard deviations and a bit, of some dozens of counts.
    assert max(abs(value - expected) for value in count.values()) < 4.5 * expected**0.5

    starts = sample_windows(jax.random.key(1), data, draws, 2, from_start=True)
    count = Counter(np.asarray(starts.action_BK[:, 0]).tolist())
    assert set(count) == {100 * n for n in range(N) if lengths[n]}
    expected = draws / len(count)
    assert max(abs(value - expected) for value in count.values()) < 4.5 * expected**0.5


def test_the_key_decides_the_windows():
    data = dataset()
    again = [sample_windows(jax.random.key(seed), data, 19, 3).action_BK for seed in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


def test_what_follows_an_episode_has_no_influence():
    data = dataset()
    poisoned = data._replace(
        obs_NL=jnp.where(data.mask_NL[..., None], data.obs_NL, jnp.nan),
        reward_NL=jnp.where(data.mask_NL, data.reward_NL, jnp.nan),
    )
    check(poisoned)
    for draw in (
        lambda x: sample_windows(jax.random.key(0), x, 31, 4),
        lambda x: (best(x, 0.5).mask_NL, observation_moments(x), x.return_N),
    ):
        jax.tree.map(np.testing.assert_array_equal, draw(poisoned), draw(data))


def test_errors_say_what_is_wrong(tiny):
    data = dataset()
    for change, match in (
        ({"mask_NL": jnp.zeros((0, L), bool)}, r"\(0, 11\), expected \(N, L\) with at least one"),
        ({"reward_NL": data.reward_NL[:, :5]}, r"reward_NL has shape \(7, 5\), expected it to begin with .*\(7, 11\)"),
        ({"terminated_N": jnp.zeros(3, bool)}, r"terminated_N has shape \(3,\), expected \(7,\)"),
        ({"mask_NL": data.mask_NL.at[4].set(False)}, "episode 4 of 7 has no steps"),
        ({"mask_NL": data.mask_NL.at[3, 2].set(False)}, "episode 3 of 7 has gaps"),
        ({"reward_NL": data.reward_NL.at[1, 2].set(jnp.nan)}, "episode 1 of 7 has a reward that is not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            check(data._replace(**change))
    with pytest.raises(ValueError, match="no data sets are given"):
        concatenate()
    with pytest.raises(ValueError, match="data set 1 has observations"):
        concatenate(data, data._replace(obs_NL=data.obs_NL[..., :2]))
    with pytest.raises(ValueError, match=r"fraction is 0.0, expected a number above 0"):
        best(data, 0.0)
    with pytest.raises(ValueError, match="batch is 0 and steps 3"):
        sample_windows(jax.random.key(0), data, 0, 3)
    with pytest.raises(ValueError, match="pad is 'up'"):
        sample_windows(jax.random.key(0), data, 2, 3, pad="up")
    for options, match in (
        ({"episodes": 0, "horizon": 3}, "episodes is 0, expected at least 1"),
        ({"episodes": 3, "horizon": 0}, "horizon is 0, expected at least 1"),
        ({"episodes": 3, "horizon": 3, "epsilon": 1.5}, "epsilon is 1.5, expected a probability"),
    ):
        with pytest.raises(ValueError, match=match):
            collect_trajectories(jax.random.key(0), act, tiny, tiny.params(), **options)
