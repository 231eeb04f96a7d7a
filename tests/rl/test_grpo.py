"""Group-relative policy optimisation: its bookkeeping, its first step by hand, and learning with raw actions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import grpo
from rl.distributions import categorical_log_prob
from rl.grpo import Batch, GRPOConfig, TrainState
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
    with pytest.raises(ValueError, match="epochs 0 and minibatches 4 must be positive"):
        GRPOConfig(epochs=0)
