"""Data for offline algorithms: whose actions they are, and how many of them are random."""

import jax
import numpy as np
import pytest

from experiments.train_rl.data import gather
from experiments.train_rl.settings import parse, plan
from experiments.train_rl.training import start

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS, EPISODES, HORIZON = 2, 131, 23


@pytest.fixture(scope="module", autouse=True)
def unchecked_keys():
    """JAX's check takes keys that a scan runs over, itself mapped over seeds, for used twice."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture(scope="module")
def policies():
    """A plan, and the states of two policies that differ."""
    settings = parse(["--env", "CartPole-v1", "--preset", "tiny", "--max-steps", str(HORIZON)]).settings
    planned = plan(settings)
    return planned, jax.jit(lambda: start(settings, planned))()[0].states


def other_actions(planned, states, data) -> tuple[np.ndarray, np.ndarray]:
    """Of how many steps of each episode the action is not the greedy one of its policy; and of the other's."""
    greedy_SNL = np.stack(
        [
            planned.algorithm.act(jax.tree.map(lambda x, seed=seed: x[seed], states), None, data.obs_NL, ())[0]
            for seed in range(SEEDS)
        ]
    )
    other_SN = ((greedy_SNL != data.action_NL[None]) & data.mask_NL[None]).sum(-1)
    turn_N = np.arange(len(data.action_NL))
    return other_SN[turn_N % SEEDS, turn_N], other_SN[(turn_N + 1) % SEEDS, turn_N]


def test_policies_take_turns_and_are_greedy(policies):
    data = gather(jax.random.key(1), *policies, episodes=EPISODES, random=0.0)
    own_N, others_N = other_actions(*policies, data)
    np.testing.assert_array_equal(own_N, 0)
    assert others_N.sum() > EPISODES
    assert data.mask_NL.shape == (EPISODES, data.length_N.max())


def test_random_actions_become_more_from_episode_to_episode(policies):
    """Of two actions that are drawn evenly, one is the greedy one. So many are cut down while some still run."""
    data = gather(jax.random.key(1), *policies, episodes=EPISODES, random=0.8)
    own_N, _ = other_actions(*policies, data)
    share_N = np.linspace(0, 0.8, EPISODES)
    assert own_N[0] == 0
    for half in (slice(None, EPISODES // 2), slice(EPISODES // 2, None)):
        length_N, chance_N = np.asarray(data.length_N)[half], share_N[half] / 2
        spread = np.sqrt((length_N * chance_N * (1 - chance_N)).sum())
        assert abs(own_N[half].sum() - (length_N * chance_N).sum()) < 3 * spread
    # In CartPole every step is rewarded; after the end there is nothing.
    np.testing.assert_array_equal(data.return_N, data.length_N)
    assert not np.asarray(data.obs_NL)[~np.asarray(data.mask_NL)].any()


def test_a_policy_that_sees_its_rewards_gathers_plain_observations(policies):
    arguments = ["--env", "CartPole-v1", "--algo", "decision_transformer", "--preset", "tiny", "--data", "elsewhere"]
    planned = plan(parse([*arguments, "--max-steps", "5"]).settings)
    other = gather(jax.random.key(1), *policies, episodes=EPISODES, random=0.8)
    state = jax.jit(planned.algorithm.init)(jax.random.key(0), planned.hyper, other)
    data = gather(jax.random.key(1), planned, jax.tree.map(lambda x: x[None], state), episodes=3, random=0.0)
    assert data.obs_NL.shape == (*data.mask_NL.shape, 4)
