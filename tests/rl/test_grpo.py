"""Group-relative policy optimisation: its bookkeeping, its first step by hand, and learning with raw actions; and the
same of any network in any environment."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import group, grpo, normalise
from rl.distributions import categorical_log_prob
from rl.group import GroupConfig, GroupHyper
from rl.grpo import Batch, GRPOConfig, TrainState
from rl.networks import MLP, Memory, actor_critic
from rl.rollout import rollout
from seqmod import BackboneConfig, backbone

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = BackboneConfig(
    inputs=5, heads=(("action", 3),), mixers=("attention", "rglru"), width=8, mlp=11, attention_heads=2, context=20
)


# The optimiser, with a policy that is one vector of logits


def bandit_log_prob(params, inputs, action_BL):
    return categorical_log_prob(jnp.broadcast_to(params, (*action_BL.shape, 3)), action_BL)


def bandit_batch(return_B) -> Batch:
    """Six episodes of at most two steps, collected by the uniform policy."""
    action_BL = jnp.array([[0, 1], [1, 1], [2, 0], [0, 0], [1, 2], [2, 2]])
    mask_BL = jnp.array([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 1]], bool)
    old_BL = jnp.where(mask_BL, -jnp.log(3.0), 99.0)
    return Batch(jnp.zeros((6, 2)), action_BL, old_BL, mask_BL, jnp.asarray(return_B, jnp.float32))


@partial(jax.jit, static_argnums=0)
def improve(config: GRPOConfig, state: TrainState, batch: Batch, learning_rate=0.1):
    return grpo.improve(config, bandit_log_prob, learning_rate, state, jax.random.key(5), batch)


def start(config: GRPOConfig, params) -> TrainState:
    return grpo.start(config, params, jax.random.key(0))


def test_one_step_is_one_step_of_adam_along_the_policy_gradient():
    config = GRPOConfig(batch=6, epochs=1, minibatches=1, max_grad_norm=1e-8)  # so small that Adam's epsilon shows
    returns = np.array([0, 1, 0, 0, 2, 1.0])
    batch = bandit_batch(returns)
    state, metrics = improve(config, start(config, jnp.zeros(3)), batch)
    advantage = (returns - returns.mean()) / (returns.std() + 1e-3)
    mask = np.float64(batch.mask_BL)
    gradient = (
        -(advantage[:, None, None] * mask[..., None] * (np.eye(3)[batch.actions] - 1 / 3)).sum((0, 1)) / mask.sum()
    )
    norm = np.linalg.norm(gradient)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    clipped = gradient * 1e-8 / norm
    np.testing.assert_allclose(state.params, -0.1 * clipped / (np.abs(clipped) + 1e-8), rtol=1e-4)
    np.testing.assert_allclose(metrics["success"], returns.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["steps"], mask.sum(1).mean())
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-6)
    assert int(state.step) == 1


def test_what_is_masked_teaches_nothing():
    config = GRPOConfig(batch=6, epochs=1, minibatches=1)
    batch = bandit_batch([0, 1, 0, 0, 2, 1.0])
    other = batch._replace(actions=jnp.where(batch.mask_BL, batch.actions, 2))
    assert (other.actions != batch.actions).any()
    state = start(config, jnp.array([0.1, -0.2, 0.3]))
    np.testing.assert_array_equal(improve(config, state, other)[0].params, improve(config, state, batch)[0].params)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_equal_returns_change_nothing_but_the_count(value):
    config = GRPOConfig(batch=6, epochs=2, minibatches=3)
    # An optimiser with momentum would move even along a gradient of zero.
    state, _ = improve(config, start(config, jnp.zeros(3)), bandit_batch([0, 1, 0, 0, 2, 1.0]))
    after, metrics = improve(config, state, bandit_batch([value] * 6))
    assert int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    np.testing.assert_allclose(metrics["success"], value)
    assert metrics["grad_norm"] == 0


def test_many_epochs_stop_at_the_clip():
    """Along the gradient of one batch, ratios leave [1 - clip, 1 + clip] only by the last step taken."""
    config = GRPOConfig(batch=6, epochs=400, minibatches=2)
    batch = bandit_batch([1, 0, 0, 1, 0, 0])._replace(
        actions=jnp.array([[0, 0], [1, 1], [1, 1], [0, 0], [1, 1], [1, 1]])
    )
    state, metrics = improve(config, start(config, jnp.zeros(3)), batch, 1e-3)
    ratio = np.asarray(jax.nn.softmax(state.params)) * 3
    assert 1.19 < ratio[0] < 1.25
    assert 0.01 < metrics["kl"] < 0.05


# Groups, and ratios of whole sequences


def test_a_step_at_the_level_of_sequences_gives_each_episode_the_same_weight():
    config = GRPOConfig(batch=6, epochs=1, minibatches=1, max_grad_norm=1e-8, level="sequence")
    returns = np.array([0, 1, 0, 0, 2, 1.0])
    batch = bandit_batch(returns)
    state, metrics = improve(config, start(config, jnp.zeros(3)), batch)
    advantage = (returns - returns.mean()) / (returns.std() + 1e-3)
    mask = np.float64(batch.mask_BL)
    score_B3 = ((np.eye(3)[batch.actions] - 1 / 3) * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    gradient = -(advantage[:, None] * score_B3).mean(0)
    norm = np.linalg.norm(gradient)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    clipped = gradient * 1e-8 / norm
    np.testing.assert_allclose(state.params, -0.1 * clipped / (np.abs(clipped) + 1e-8), rtol=1e-4)


def test_sequences_of_length_one_are_tokens():
    batch = bandit_batch([0, 1, 0, 0, 2, 1.0])
    batch = batch._replace(mask_BL=jnp.array([[True, False]] * 6))
    ends = []
    for level in ("token", "sequence"):
        config = GRPOConfig(batch=6, epochs=7, minibatches=2, level=level)
        ends.append(improve(config, start(config, jnp.zeros(3)), batch)[0].params)
    np.testing.assert_allclose(*ends, rtol=1e-5)
    # So far that ratios have left the clip range.
    assert np.abs(np.log(3 * jax.nn.softmax(ends[0]))).max() > 0.2


def test_an_episode_is_compared_with_its_own_group():
    """What is added to a group's returns, and what other groups' are, has no influence on its advantages."""
    config = GRPOConfig(batch=6, epochs=2, minibatches=3, groups=2)
    expected, _ = improve(config, start(config, jnp.zeros(3)), bandit_batch([0, 1, 0, 0, 2, 1]))
    shifted, _ = improve(config, start(config, jnp.zeros(3)), bandit_batch([8, 9, 8, -4, -2, -3]))
    one_group = GRPOConfig(batch=6, epochs=2, minibatches=3)
    other, _ = improve(one_group, start(one_group, jnp.zeros(3)), bandit_batch([8, 9, 8, -4, -2, -3]))
    np.testing.assert_array_equal(shifted.params, expected.params)
    assert np.abs(other.params - expected.params).max() > 0.01


def test_groups_of_equal_returns_change_nothing():
    config = GRPOConfig(batch=6, epochs=2, minibatches=3, groups=2)
    state, _ = improve(config, start(config, jnp.zeros(3)), bandit_batch([0, 1, 0, 0, 2, 1]))
    after, metrics = improve(config, state, bandit_batch([5, 5, 5, 2, 2, 2]))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert metrics["grad_norm"] == 0
    # Beside a group that has a signal, the other's gradient is zero.
    config = GRPOConfig(batch=6, epochs=1, minibatches=1, groups=2)
    batch = bandit_batch([5, 5, 5, 0, 2, 1])
    without = batch._replace(actions=batch.actions.at[:3].set(2))
    ends = [improve(config, start(config, jnp.zeros(3)), x)[0].params for x in (batch, without)]
    np.testing.assert_array_equal(*ends)


def test_the_clip_can_be_an_argument():
    batch = bandit_batch([0, 1, 0, 0, 2, 1])
    ends = []
    for in_config, given in ((0.05, None), (0.2, 0.05)):
        config = GRPOConfig(batch=6, epochs=7, minibatches=2, clip=in_config)
        run = jax.jit(partial(grpo.improve, config, bandit_log_prob, 0.1))
        ends.append(run(start(config, jnp.zeros(3)), jax.random.key(5), batch, clip=given)[0].params)
    np.testing.assert_allclose(*ends, rtol=1e-6)


# With a sequence model


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(backbone.init, MODEL)


def test_recomputed_log_probabilities_are_those_of_the_rollout(tiny, params):
    config = GRPOConfig(batch=13, horizon=7, minibatches=1)

    @jax.jit
    def both(params, key):
        batch = grpo.raw_rollout(config, MODEL, tiny, tiny.params(longest=9, max_steps=6), params, key)
        return batch, grpo.raw_log_prob(MODEL, params, batch.inputs, batch.actions)

    batch, log_prob_BL = both(params, jax.random.key(1))
    assert batch.inputs.shape == (13, 7, 5)
    assert {2, 5, 6} <= set(batch.mask_BL.sum(1).tolist())
    difference = np.abs(np.where(batch.mask_BL, log_prob_BL - batch.log_prob_BL, 0))
    assert difference.max() < 1e-5
    assert np.ptp(np.asarray(batch.log_prob_BL)[np.asarray(batch.mask_BL)]) > 0.5


def test_raw_actions_learn_a_contextual_bandit(tiny, random_params):
    model = BackboneConfig(inputs=5, heads=(("action", 3),), mixers=("attention",), width=8, mlp=11, attention_heads=2)
    config = GRPOConfig(batch=48, horizon=2, epochs=2, minibatches=2)

    @jax.jit
    def train(state):
        def update(state, _):
            return grpo.raw_update(config, model, tiny, tiny.params(longest=2), state, 0.01)

        return jax.lax.scan(update, state, length=80)

    params = random_params(backbone.init, model)
    state, metrics = train(grpo.start(config, params, jax.random.key(0)))
    assert metrics["success"][:3].mean() < 0.4
    assert metrics["success"][-5:].mean() > 0.9
    assert np.isfinite(metrics["loss"]).all()
    assert int(state.step) == 80


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="batch 7 is not divisible by minibatches 2"):
        GRPOConfig(batch=7, minibatches=2)
    with pytest.raises(ValueError, match="horizon is 0"):
        GRPOConfig(horizon=0)
    with pytest.raises(ValueError, match="max_grad_norm is 0, expected a number above 0"):
        GRPOConfig(max_grad_norm=0)
    with pytest.raises(ValueError, match="epochs 0 and minibatches 4 must be positive"):
        GRPOConfig(epochs=0)
    with pytest.raises(ValueError, match="batch 6 is not divisible by groups 4"):
        GRPOConfig(batch=6, minibatches=1, groups=4)
    with pytest.raises(ValueError, match="level is 'word', expected 'token' or 'sequence'"):
        GRPOConfig(level="word")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="episodes is 1, expected at least 2"):
        GroupConfig(episodes=1)


# Any network in any environment


class WithSpace:
    """Tiny's episodes as an environment that algorithms take."""

    def __init__(self, tiny, params):
        self.default_params = params
        self.reset_env, self.step_env, self.is_truncated = tiny.reset_env, tiny.step_env, tiny.is_truncated

    def action_space(self, params):
        return Three()


class Three:
    """The space of three actions."""

    n = 3


@pytest.mark.parametrize("recurrent", [False, True], ids=["mlp", "memory"])
def test_ratios_are_one_at_the_old_parameters(tiny, recurrent):
    """Or else the mean of ratio - 1 - log ratio would not be 0. Episodes have different lengths."""
    env = WithSpace(tiny, tiny.params(longest=9, max_steps=6, step_reward=1.0))
    memory = Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=8, mlp=11), MLP((7,)))
    network = actor_critic((5,), env.action_space(None), memory if recurrent else MLP((7,)))
    config = GroupConfig(groups=3, episodes=5, horizon=7, epochs=1, minibatches=1, normalise_observations=True)
    algorithm = group.make(config, env, network)
    state = jax.jit(algorithm.init)(jax.random.key(0), GroupHyper(), env.default_params)
    scaled = jax.tree.map(lambda x: 5 * x, state.params)  # a policy far from uniform
    after, metrics = jax.jit(algorithm.update)(state._replace(params=scaled))
    assert abs(metrics["kl"]) < 1e-6
    assert metrics["grad_norm"] > 0
    assert 1 < metrics["episode_length"] < 6
    # The moments are of the steps that were taken; and the critic, which is not used, stays.
    np.testing.assert_allclose(after.observations.samples, metrics["episode_length"] * 15, rtol=1e-3)
    np.testing.assert_array_equal(after.params["value"]["kernel"], scaled["value"]["kernel"])


def test_episodes_of_a_group_have_the_same_start(tiny):
    def policy(key, step, memory):
        action_B = jax.random.randint(key, step.running_B.shape, 0, 3)
        return action_B, memory, (step.obs_BF, action_B)

    key = jax.random.key(2)
    episodes, _ = jax.jit(lambda: rollout(key, tiny, tiny.params(longest=9), policy, (), 15, 9, groups=5))()
    obs_GKF = np.asarray(episodes.recorded[0][0]).reshape(5, 3, 5)
    np.testing.assert_array_equal(obs_GKF, np.repeat(obs_GKF[:, :1], 3, axis=1))
    np.testing.assert_array_equal(*np.broadcast_arrays(episodes.length_B.reshape(5, 3), episodes.length_B[::3, None]))
    assert len(np.unique(obs_GKF[:, 0], axis=0)) > 1
    actions_GK = np.asarray(episodes.recorded[1]).T.reshape(5, 3, -1)
    assert (actions_GK != actions_GK[:, :1]).any()
    with pytest.raises(ValueError, match="batch 15 is not divisible by groups 4"):
        rollout(key, tiny, tiny.params(), policy, (), 15, 9, groups=4)


def test_moments_of_masked_samples_are_those_of_the_samples_that_count():
    rng = np.random.default_rng(0)
    sample, mask = jnp.asarray(rng.standard_normal((5, 7, 3)), jnp.float32), jnp.asarray(rng.random((5, 7)) < 0.4)
    start = normalise.update(normalise.moments((3,)), jnp.ones((2, 3)))
    expected = normalise.update(start, sample[mask])
    masked = normalise.update(start, jnp.where(mask[..., None], sample, jnp.nan), mask)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), masked, expected)
