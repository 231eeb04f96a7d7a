"""Learning at small size, on every kind of environment: returns above what an untrained policy or a lesser network has.

Sizes are the least at which each of several seeds passed with room to spare.
"""

from functools import partial

import jax
import numpy as np
import pytest

from rl import networks, ppo
from rl.algorithm import evaluate
from rl.envs import make
from rl.networks import CNN, MLP, Memory
from rl.ppo import PPOConfig, PPOHyper
from seqmod.config import BackboneConfig

pytestmark = pytest.mark.slow
MEMORY = Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=32, mlp=64, context=128), MLP((32,), "relu"))


@pytest.fixture(autouse=True)
def _mapped_scans_over_keys():
    """The check of key reuse takes the keys of a mapped scan for used twice."""
    with jax.debug_key_reuse(False):
        yield


def returns(name, torso, config, hyper, *, horizon, seeds=3, **options) -> tuple[np.ndarray, np.ndarray]:
    """Mean returns (S,) of trained and untrained policies, actions drawn, each over 32 episodes."""
    env, params = make(name, **options)
    network = networks.actor_critic(env.observation_space(params).shape, env.action_space(params), torso)
    algorithm = ppo.make(config, env, network)

    @jax.jit
    @jax.vmap
    def run(key):
        k_train, k_before, k_after = jax.random.split(key, 3)
        judge = partial(evaluate, algorithm, env=env, env_params=params, episodes=32, horizon=horizon, greedy=False)
        before = algorithm.init(k_train, hyper, params)
        after, _ = jax.lax.scan(lambda state, _: algorithm.update(state), before, length=config.updates)
        return judge(after, k_after).return_B.mean(), judge(before, k_before).return_B.mean()

    trained_S, untrained_S = run(jax.random.split(jax.random.key(0), seeds))
    return np.asarray(trained_S), np.asarray(untrained_S)


def test_cart_pole():
    config = PPOConfig(environments=8, steps=64, updates=80)
    trained_S, untrained_S = returns("CartPole-v1", MLP(), config, PPOHyper(learning_rate=5e-3), horizon=500)
    assert np.median(trained_S) > 475  # gymnasium's threshold
    assert untrained_S.max() < 60


def test_acrobot():
    config = PPOConfig(environments=16, steps=64, updates=80)
    hyper = PPOHyper(learning_rate=3e-3)
    # One seed in twelve had not learned by then.
    trained_S, untrained_S = returns("Acrobot-v1", MLP(), config, hyper, horizon=500, seeds=5)
    assert np.median(trained_S) > -100  # gymnasium's threshold
    assert untrained_S.max() < -300


def test_four_rooms():
    config = PPOConfig(environments=64, steps=32, updates=80)
    hyper = PPOHyper(learning_rate=3e-3, entropy=0.02)
    trained_S, untrained_S = returns("FourRooms-misc", MLP(), config, hyper, horizon=100, max_steps=100)
    assert np.median(trained_S) > 0.9
    assert untrained_S.max() < 0.6


def test_breakout_from_images():
    config = PPOConfig(environments=64, steps=32, updates=50)
    torso = CNN((16,), 3, (64,))
    trained_S, untrained_S = returns(
        "Breakout-MinAtar", torso, config, PPOHyper(learning_rate=3e-3), horizon=300, seeds=1
    )
    assert trained_S.min() > 4
    assert untrained_S.max() < 2


def test_a_memory_remembers_what_a_feed_forward_network_cannot():
    config = PPOConfig(environments=32, steps=32, updates=60, minibatches=2)
    hyper = PPOHyper(learning_rate=3e-3)
    with_memory_S, _ = returns("MemoryChain-bsuite", MEMORY, config, hyper, horizon=20)
    without_S, _ = returns("MemoryChain-bsuite", MLP((32,)), config, hyper, horizon=20)
    assert with_memory_S.min() > 0.9
    assert np.abs(without_S).max() < 0.6  # a coin decides: 32 episodes of -1 or 1


def test_a_pole_in_brax():
    config = PPOConfig(environments=32, steps=32, updates=60, normalise_observations=True)
    hyper = PPOHyper(learning_rate=3e-3, entropy=0.0)
    trained_S, untrained_S = returns("brax/inverted_pendulum", MLP((32, 32)), config, hyper, horizon=200, max_steps=200)
    assert np.median(trained_S) > 150
    assert untrained_S.max() < 60
