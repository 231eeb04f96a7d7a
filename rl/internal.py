"""Internal RL: reinforcement learning whose action is a code z held on a frozen model's residual stream.

The environment, the frozen base model, the decoder and the switching unit together are an environment whose observation
is the residual stream e_t at a switch and whose action is z. One abstract step holds z, applies its controller, samples
raw actions from the base model and advances the environment until the gate opens (beta >= threshold) or the episode
ends; rewards are summed. `internal_env.py` is that environment, written as the paper defines it (arXiv 2512.20605, C.5,
Algorithms 1-3). `abstract_rollout` here is the fast form: it runs many episodes in lockstep, one raw step at a time,
and the policy acts only in those whose gate has just opened, so nothing waits for anything. Only the policy learns.

Where the paper is silent: the gate is open at reset; the policy's memory advances at switches only; episodes with more
than `max_switches` switches hold their last code to the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl import grpo
from rl.distributions import gaussian_log_prob, gaussian_sample
from rl.grpo import Batch, GRPOConfig, TrainState
from rl.rollout import Step, rollout
from seqmod import backbone, metacontroller
from seqmod.backbone import BackboneConfig
from seqmod.metacontroller import MetacontrollerConfig
from seqmod.mixers.base import Params, rms_norm


@dataclass(frozen=True)
class PolicyConfig:
    """Recurrent Gaussian policy over z: `layers` RG-LRU blocks of `width` over the residual streams seen at switches.

    `latent` Z; `inputs` D of the residual stream. The mean starts at zero and the standard deviation at `initial_std`;
    1 is the prior the decoder was trained under.
    """

    inputs: int
    latent: int
    width: int = 64
    layers: int = 1
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        if not self.initial_std > 0:
            raise ValueError(f"PolicyConfig: initial_std is {self.initial_std}, expected above 0")

    @property
    def backbone(self) -> BackboneConfig:
        """The policy as a sequence model with two heads."""
        return BackboneConfig(
            inputs=self.inputs,
            heads=(("mean", self.latent), ("log_std", self.latent)),
            mixers=("rglru",) * self.layers,
            width=self.width,
            mlp=2 * self.width,
        )


@dataclass(frozen=True)
class Controlled:
    """Static part of the controlled model: base and metacontroller shapes, the controlled `layer`, when z may change.

    The gate opens where the switching unit's beta reaches `threshold`, or at every step if `always_open` (the paper's
    forced switching), at most `max_switches` times an episode.
    """

    model: BackboneConfig
    metacontroller: MetacontrollerConfig
    layer: int
    threshold: float = 0.5
    max_switches: int = 32
    always_open: bool = False

    def __post_init__(self) -> None:
        self.model.check_layer(self.layer)
        if self.metacontroller.width != self.model.width:
            raise ValueError(
                f"Controlled: metacontroller has width {self.metacontroller.width}, "
                f"expected the model's {self.model.width}"
            )
        if self.max_switches < 1:
            raise ValueError(f"Controlled: max_switches is {self.max_switches}, expected at least 1")


class Frozen(NamedTuple):
    """Frozen parameters: the base model's and the metacontroller's."""

    model: Params
    metacontroller: Params


class Memory(NamedTuple):
    """What one lockstep of episodes carries: model halves, history, code in force, policy memory, abstract records."""

    lower: Any
    upper: Any
    h_BH: jax.Array
    z_BZ: jax.Array
    policy: Any
    switches_B: jax.Array
    e_BMD: jax.Array
    z_BMZ: jax.Array
    log_prob_BM: jax.Array


def init_policy(key: jax.Array, config: PolicyConfig) -> Params:
    """Fresh policy parameters, whose codes do not depend on the input: both heads' kernels start at zero."""
    params = backbone.init(key, config.backbone)
    heads = jax.tree.map(jnp.zeros_like, params["heads"])
    heads["log_std"]["bias"] += jnp.log(config.initial_std)
    return {**params, "heads": heads}


def _policy_input(e: jax.Array) -> jax.Array:
    return rms_norm(jnp.ones(e.shape[-1]), e)


def policy_log_prob(config: PolicyConfig, params: Params, e_BMD: jax.Array, z_BMZ: jax.Array) -> jax.Array:
    """Log-density (B, M) of codes given the residual streams at the switches so far."""
    outputs, _ = backbone.apply(params, config.backbone, _policy_input(e_BMD))
    return gaussian_log_prob(outputs["mean"], outputs["log_std"], z_BMZ)


def abstract_rollout(
    config: GRPOConfig,
    controlled: Controlled,
    policy: PolicyConfig,
    env: Any,
    env_params: Any,
    frozen: Frozen,
    params: Params,
    key: jax.Array,
    watch: Callable[[Any], Any] = lambda state: None,
) -> tuple[Batch, dict[str, Any]]:
    """One group of episodes as abstract sequences: inputs e_BMD at switches, actions z_BMZ. Also returns raw-step
    records for analysis: `open_BL` gate, `valid_BL`, and `watched`, whatever `watch` takes of the environment's state
    before each step, each leaf (B, L, ...); and the `final_state`."""
    expected = (controlled.model.width, controlled.metacontroller.latent)
    if (policy.inputs, policy.latent) != expected:
        raise ValueError(
            f"abstract_rollout: policy has inputs and latent {(policy.inputs, policy.latent)}, expected {expected}"
        )
    B, M, Z = config.batch, controlled.max_switches, policy.latent
    model, shape, layer = frozen.model, controlled.model, controlled.layer

    def act(key: jax.Array, step: Step, memory: Memory):
        k_z, k_action = jax.random.split(key)
        e_BD, lower = backbone.lower_step(model, shape, step.obs_BF, memory.lower, layer)
        logit_B = metacontroller.switch_logit(frozen.metacontroller, e_BD, memory.h_BH, memory.z_BZ)
        open_B = (jax.nn.sigmoid(logit_B) >= controlled.threshold) | (step.time == 0) | controlled.always_open
        open_B = open_B & step.running_B & (memory.switches_B < M)
        outputs, _, policy_memory = backbone.step(params, policy.backbone, _policy_input(e_BD), memory.policy)
        proposal_BZ = gaussian_sample(k_z, outputs["mean"], outputs["log_std"])
        log_prob_B = gaussian_log_prob(outputs["mean"], outputs["log_std"], proposal_BZ)
        # Writing beyond the last row is dropped: closed gates write nowhere.
        row_B = jnp.where(open_B, memory.switches_B, M)
        episode_B = jnp.arange(len(open_B))

        def write(buffer, value):
            return buffer.at[episode_B, row_B].set(value, mode="drop")

        z_BZ = jnp.where(open_B[:, None], proposal_BZ, memory.z_BZ)
        logits_BA, upper = backbone.upper_step(
            model, shape, metacontroller.control(frozen.metacontroller, e_BD, z_BZ), memory.upper, layer
        )
        action_B = jax.random.categorical(k_action, logits_BA["action"])
        memory = Memory(
            lower=lower,
            upper=upper,
            h_BH=metacontroller.history_step(frozen.metacontroller, e_BD, memory.h_BH),
            z_BZ=z_BZ,
            policy=jax.tree.map(
                lambda new, old: jnp.where(open_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
                policy_memory,
                memory.policy,
            ),
            switches_B=memory.switches_B + open_B,
            e_BMD=write(memory.e_BMD, e_BD),
            z_BMZ=write(memory.z_BMZ, proposal_BZ),
            log_prob_BM=write(memory.log_prob_BM, log_prob_B),
        )
        return action_B, memory, (open_B, watch(step.state))

    memory = Memory(
        lower=backbone.init_state(shape, B, config.horizon, stop=layer),
        upper=backbone.init_state(shape, B, config.horizon, start=layer),
        h_BH=jnp.zeros((B, controlled.metacontroller.history)),
        z_BZ=jnp.zeros((B, Z)),
        policy=backbone.init_state(policy.backbone, B, M),
        switches_B=jnp.zeros(B, jnp.int32),
        e_BMD=jnp.zeros((B, M, shape.width)),
        z_BMZ=jnp.zeros((B, M, Z)),
        log_prob_BM=jnp.zeros((B, M)),
    )
    episodes, (switches_B, e_BMD, z_BMZ, log_prob_BM) = rollout(
        key,
        env,
        env_params,
        act,
        memory,
        B,
        config.horizon,
        keep=lambda memory: (memory.switches_B, memory.e_BMD, memory.z_BMZ, memory.log_prob_BM),
    )
    batch = Batch(e_BMD, z_BMZ, log_prob_BM, jnp.arange(M)[None] < switches_B[:, None], episodes.return_B)
    open_BL, watched = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), episodes.recorded)
    raw = {"open_BL": open_BL, "valid_BL": episodes.valid_TB.T, "watched": watched, "final_state": episodes.final_state}
    return batch, raw


def internal_update(
    config: GRPOConfig,
    controlled: Controlled,
    policy: PolicyConfig,
    env: Any,
    env_params: Any,
    frozen: Frozen,
    state: TrainState,
    learning_rate: float | jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Collect one group with the current policy and improve the policy on it; base and metacontroller stay frozen."""
    k_rollout, k_learn = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch, raw = abstract_rollout(config, controlled, policy, env, env_params, frozen, state.params, k_rollout)

    def log_prob(params, e, z):
        return policy_log_prob(policy, params, e, z)

    state, metrics = grpo.improve(config, log_prob, learning_rate, state, k_learn, batch)
    metrics["raw_steps"] = raw["valid_BL"].sum(1).mean()
    metrics["full"] = batch.mask_BL.all(1).mean()
    return state, metrics
