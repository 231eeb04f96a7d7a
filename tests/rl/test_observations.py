"""Observations that are dicts of arrays: the same run as with their numbers in one array."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from rl import a2c, dqn, group, normalise, ppo, sac
from rl.algorithm import evaluate
from rl.networks import ActorCritics, Network
from rl.policies import Categorical, Gaussian

pytestmark = pytest.mark.usefixtures("quick_compile")


@dataclass(frozen=True)
class Sight:
    """An environment with one vector (5,) as observation, as it is or split into a picture (1, 2) and a vector (3,)."""

    env: Any
    continuous: bool
    split: bool

    @property
    def default_params(self):
        return self.env.params(longest=4, max_steps=3, step_reward=0.5)

    def see(self, obs):
        return {"picture": obs[None, :2], "vector": obs[2:]} if self.split else obs

    def reset_env(self, key, params):
        obs, state = self.env.reset_env(key, params)
        return self.see(obs), state

    def step_env(self, key, state, action, params):
        action = (action > 0).sum() if self.continuous else action
        obs, *rest = self.env.step_env(key, state, action, params)
        return self.see(obs), *rest

    def is_truncated(self, state, params):
        return self.env.is_truncated(state, params)

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (2,)) if self.continuous else spaces.Discrete(3)


def join(obs: Any) -> jax.Array:
    """What a network of one's own does with a dict: here it puts the arrays next to each other."""
    if not isinstance(obs, dict):
        return obs
    return jnp.concatenate([obs["picture"].reshape(*obs["vector"].shape[:-1], 2), obs["vector"]], axis=-1)


def linear(outputs: int, heads: Callable[[jax.Array], Any], actions: int = 0) -> Network:
    """What `heads` make of linear functions (..., outputs) of the observation and, if any, the action."""

    def step(params, inputs, memory):
        x = jnp.concatenate([join(inputs[0]), inputs[1]], axis=-1) if actions else join(inputs)
        return heads(x @ params), memory

    return Network(lambda key: jax.random.normal(key, (5 + actions, outputs)), lambda batch: (), step)


def categorical() -> Network:
    return linear(4, lambda y: (Categorical(y[..., :3]), y[..., 3]))


def remembering() -> Network:
    """It sees a sum of past observations."""
    network = categorical()

    def step(params, obs, memory):
        memory = 0.5 * memory + join(obs)
        return network.step(params, memory, ())[0], memory

    return Network(network.init, lambda batch: jnp.zeros((batch, 5)), step, recurrent=True)


def gaussian() -> Network:
    return linear(5, lambda y: (Gaussian(y[..., :2], 0.1 * y[..., 2:4]), y[..., 4]))


def values() -> Network:
    return linear(3, lambda y: y)


def critics() -> ActorCritics:
    return ActorCritics(
        linear(4, lambda y: (y[..., :2], 0.1 * y[..., 2:])), linear(2, lambda y: jnp.moveaxis(y, -1, 0), actions=2)
    )


SIZES = {"environments": 3, "steps": 5, "updates": 2, "normalise_observations": True}
BUFFER = {"capacity": 24, "learning_starts": 9, "batch": 7}
EPISODES = {"groups": 2, "episodes": 3, "horizon": 4, "updates": 2, "minibatches": 2, "normalise_observations": True}


@pytest.mark.parametrize(
    ("module", "config", "hyper", "network", "continuous"),
    [
        (ppo, ppo.PPOConfig(**SIZES, minibatches=5), ppo.PPOHyper(), gaussian, True),
        pytest.param(a2c, a2c.A2CConfig(**SIZES), a2c.A2CHyper(), remembering, False, marks=pytest.mark.slow),
        (group, group.GroupConfig(**EPISODES), group.GroupHyper(), remembering, False),
        pytest.param(dqn, dqn.DQNConfig(**SIZES, **BUFFER), dqn.DQNHyper(), values, False, marks=pytest.mark.slow),
        (sac, sac.SACConfig(**SIZES, **BUFFER, gradient_steps=2), sac.SACHyper(), critics, True),
    ],
    ids=["ppo", "a2c-memory", "group-memory", "dqn", "sac"],
)
def test_a_dict_of_arrays_is_learned_from_as_one_array(
    tiny, module: Any, config: Any, hyper: Any, network: Callable[[], Any], continuous: bool
):
    def run(key, split):
        env = Sight(tiny, continuous, split)
        net, k_train, k_evaluate = network(), *jax.random.split(key)
        state, metrics = module.make_train(config, env, net)(k_train, hyper)
        episodes = evaluate(
            module.make(config, env, net), state, k_evaluate, env, env.default_params, episodes=3, horizon=4
        )
        return state.params, state.observations, metrics, episodes.return_B

    @jax.jit
    def both(key):
        return run(key, False), run(jax.random.clone(key), True)

    one, many = both(jax.random.key(0))
    assert isinstance(many[1], dict)
    assert {name: m.mean.shape for name, m in many[1].items()} == {"picture": (1, 2), "vector": (3,)}
    seen = jax.tree.map(lambda *xs: np.concatenate([x.ravel() for x in xs]), *(m[1:] for m in many[1].values()))
    many = (many[0], normalise.Moments(many[1]["vector"].samples, *seen), *many[2:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, many)
    assert one[1].samples > 10
    assert one[2]["grad_norm"].any()
