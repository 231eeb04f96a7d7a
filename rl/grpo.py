"""Group-relative policy optimisation: PPO's clipped objective with the batch itself as the baseline, no critic.

One optimiser serves both kinds of reinforcement learning of the paper (arXiv 2512.20605, C.5): `internal.py` gives it
sequences of abstract actions z, and `raw_update` here gives it the base model's own actions; `group.py` gives it those
of any policy in any environment. A batch is one or more groups: all episodes of a group have the same task, and every
step of an episode has the episode's advantage. Probability ratios are those of single actions, as in GRPO (Shao et al.,
arXiv 2402.03300), or of whole episodes, as in GSPO (Zheng et al., arXiv 2507.18071).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl.distributions import categorical_log_prob
from rl.losses import Level, approximate_kl, clip_loss, group_advantage
from rl.rollout import Step, rollout
from seqmod import backbone
from seqmod.backbone import BackboneConfig


@dataclass(frozen=True)
class GRPOConfig:
    """`batch` episodes, in `groups` of equal size, of at most `horizon` steps per update; `epochs` passes over them in
    `minibatches`. The clipped ratio is that of a "token", an action, or of a "sequence", an episode's actions."""

    batch: int = 512
    horizon: int = 100
    epochs: int = 4
    minibatches: int = 4
    clip: float = 0.2
    max_grad_norm: float = 1.0
    advantage_epsilon: float = 1e-3
    groups: int = 1
    level: Level = "token"

    def __post_init__(self) -> None:
        if min(self.batch, self.epochs, self.minibatches) < 1:
            raise ValueError(
                f"GRPOConfig: batch {self.batch}, epochs {self.epochs} and minibatches {self.minibatches} "
                "must be positive"
            )
        if self.groups < 1 or self.batch % self.groups:
            raise ValueError(f"GRPOConfig: batch {self.batch} is not divisible by groups {self.groups}")
        if self.batch % self.minibatches:
            raise ValueError(f"GRPOConfig: batch {self.batch} is not divisible by minibatches {self.minibatches}")
        if self.horizon < 1:
            raise ValueError(f"GRPOConfig: horizon is {self.horizon}, expected at least 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"GRPOConfig: max_grad_norm is {self.max_grad_norm}, expected a number above 0")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"GRPOConfig: level is {self.level!r}, expected 'token' or 'sequence'")


class Batch(NamedTuple):
    """Sequences to learn from, each leaf with the episode axis first, group after group: `inputs` of the policy, its
    `actions`, their `log_prob_BL` when they were taken, `mask_BL` and `return_B`."""

    inputs: Any
    actions: Any
    log_prob_BL: jax.Array
    mask_BL: jax.Array
    return_B: jax.Array


class TrainState(NamedTuple):
    """Policy `params`, optimiser state, number of updates so far and the run's `key`."""

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


def optimiser(config: GRPOConfig, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    """Adam (no weight decay, as in Tables A13, A14) behind a global-norm clip."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(learning_rate))


def improve(
    config: GRPOConfig,
    log_prob: Callable[[Any, Any, Any], jax.Array],
    learning_rate: float | jax.Array,
    state: TrainState,
    key: jax.Array,
    batch: Batch,
    *,
    clip: float | jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Optimise the clipped objective on a batch. `log_prob(params, inputs, actions)` gives (B, L); `clip` is that of
    `config` unless given.

    A group whose episodes all have the same return carries no signal: its gradient is exactly zero. A batch of such
    groups is skipped.
    """
    tx = optimiser(config, learning_rate)
    clip = config.clip if clip is None else clip
    return_GK = batch.return_B.reshape(config.groups, -1)
    advantage_B = jax.vmap(partial(group_advantage, epsilon=config.advantage_epsilon))(return_GK).reshape(-1)

    def loss(params, part: Batch, advantage_B):
        log_prob_BL = log_prob(params, part.inputs, part.actions)
        advantage_BL = jnp.broadcast_to(advantage_B[:, None], log_prob_BL.shape)
        value = clip_loss(log_prob_BL, part.log_prob_BL, advantage_BL, part.mask_BL, clip, level=config.level)
        return value, approximate_kl(log_prob_BL, part.log_prob_BL, part.mask_BL)

    def minibatch(carry, index_B):
        params, opt_state = carry
        part, advantage = jax.tree.map(lambda x: x[index_B], (batch, advantage_B))
        (value, kl), grads = jax.value_and_grad(loss, has_aux=True)(params, part, advantage)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (value, kl, optax.tree.norm(grads))

    def order(key):
        return jax.random.permutation(key, config.batch).reshape(config.minibatches, -1)

    # Drawn here: mapped over seeds, the branch below may take arrays but no keys.
    order_EMI = jax.vmap(order)(jax.random.split(key, config.epochs))

    def learn(carry):
        return jax.lax.scan(lambda carry, order_MI: jax.lax.scan(minibatch, carry, order_MI), carry, order_EMI)

    def skip(carry):
        zeros = jnp.zeros((config.epochs, config.minibatches))
        return carry, (zeros, zeros, zeros)

    has_signal = (return_GK != return_GK[:, :1]).any()
    (params, opt_state), (value, kl, norm) = jax.lax.cond(has_signal, learn, skip, (state.params, state.opt_state))
    metrics = {
        "success": batch.return_B.mean(),
        "loss": value.mean(),
        "kl": kl[-1].mean(),
        "grad_norm": norm.mean(),
        "steps": batch.mask_BL.sum(1).mean(),
    }
    return TrainState(params, opt_state, state.step + 1, state.key), metrics


def start(config: GRPOConfig, params: Any, key: jax.Array) -> TrainState:
    """State before the first update."""
    return TrainState(params, optimiser(config, 1.0).init(params), jnp.zeros((), jnp.int32), key)


def raw_rollout(
    config: GRPOConfig, model: BackboneConfig, env: Any, env_params: Any, params: Any, key: jax.Array
) -> Batch:
    """Episodes of the base model acting by its own action head, one token a step."""

    def policy(key: jax.Array, step: Step, memory: Any):
        outputs, _, memory = backbone.step(params, model, step.obs_BF, memory)
        action_B = jax.random.categorical(key, outputs["action"])
        log_prob_B = categorical_log_prob(outputs["action"], action_B)
        return action_B, memory, (step.obs_BF, action_B, log_prob_B)

    memory = backbone.init_state(model, config.batch, config.horizon)
    episodes, _ = rollout(key, env, env_params, policy, memory, config.batch, config.horizon)
    obs, action, log_prob = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), episodes.recorded)
    return Batch(obs, action, log_prob, episodes.valid_TB.T, episodes.return_B)


def raw_log_prob(model: BackboneConfig, params: Any, obs_BLF: jax.Array, action_BL: jax.Array) -> jax.Array:
    """Log-probability (B, L) of actions under the base model, in its parallel form."""
    outputs, _ = backbone.apply(params, model, obs_BLF)
    return categorical_log_prob(outputs["action"], action_BL)


def raw_update(
    config: GRPOConfig,
    model: BackboneConfig,
    env: Any,
    env_params: Any,
    state: TrainState,
    learning_rate: float | jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Collect one group with the current model and fine-tune all its parameters on it: raw-action RL."""
    k_rollout, k_learn = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = raw_rollout(config, model, env, env_params, state.params, k_rollout)

    def log_prob(params, obs, action):
        return raw_log_prob(model, params, obs, action)

    return improve(config, log_prob, learning_rate, state, k_learn, batch)
