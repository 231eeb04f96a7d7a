"""The environment of internal RL, one episode at a time, as the paper defines it (arXiv 2512.20605, C.5, Alg. 1-3).

It has the interface of a gymnax 1.x environment: the observation is the residual stream e_t at a switch, the action a
code z, and a step lasts until the gate opens or the raw episode ends. Any algorithm that takes such an environment can
learn in it, and `jax.vmap` makes a batch of it, in which every step waits for the longest. `internal.abstract_rollout`
gives the same episodes without waiting; this is what it is tested against.

    hold z:  a_t ~ base(e_t + B(z) A(z) e_t),  o_{t+1}, r_t from the raw environment,  h_t = GRU(e_t, h_{t-1}),
             e_{t+1} = lower(o_{t+1}),  beta_{t+1} = f_switch(e_{t+1}, h_t, z)     until beta_{t+1} >= threshold

The reward is the sum of the r_t. The decisions where the paper is silent are those of `internal.py`: after the last of
`max_switches` codes the gate stays shut, and the episode ends within that step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl.internal import Controlled, Frozen
from seqmod import backbone, metacontroller


class InternalParams(NamedTuple):
    """Traced parameters: the raw environment's `env`, and the `frozen` base model and metacontroller."""

    env: Any
    frozen: Frozen


class InternalState(NamedTuple):
    """One episode between two abstract steps.

    The raw environment's state `raw`; the residual stream `e_1D` of its observation, which `lower` has read and `upper`
    has not; the history `h_1H` before it; `time` raw steps and `switches` codes so far; `terminated`. Arrays of the
    model have a batch axis of one.
    """

    raw: Any
    lower: Any
    upper: Any
    e_1D: jax.Array
    h_1H: jax.Array
    time: jax.Array
    switches: jax.Array
    terminated: jax.Array


@dataclass(frozen=True)
class InternalEnv:
    """Internal RL in the raw environment `env`, whose episodes last at most `horizon` raw steps."""

    env: Any
    controlled: Controlled
    horizon: int

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"InternalEnv: horizon is {self.horizon}, expected at least 1")

    @property
    def observation_size(self) -> int:
        """Width D of the residual stream."""
        return self.controlled.model.width

    @property
    def action_size(self) -> int:
        """Number Z of latent dimensions."""
        return self.controlled.metacontroller.latent

    def reset_env(self, key: jax.Array, params: InternalParams) -> tuple[jax.Array, InternalState]:
        """Reset the raw environment with `key`. Returns (e_D, state); the gate is open at reset."""
        shape, layer = self.controlled.model, self.controlled.layer
        obs_F, raw = self.env.reset_env(key, params.env)
        lower = backbone.init_state(shape, 1, self.horizon, stop=layer)
        e_1D, lower = backbone.lower_step(params.frozen.model, shape, obs_F[None], lower, layer)
        state = InternalState(
            raw=raw,
            lower=lower,
            upper=backbone.init_state(shape, 1, self.horizon, start=layer),
            e_1D=e_1D,
            h_1H=jnp.zeros((1, self.controlled.metacontroller.history)),
            time=jnp.zeros((), jnp.int32),
            switches=jnp.zeros((), jnp.int32),
            terminated=jnp.zeros((), bool),
        )
        return e_1D[0], state

    def step_env(
        self, key: jax.Array, state: InternalState, z_Z: jax.Array, params: InternalParams
    ) -> tuple[jax.Array, InternalState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """Hold a code until the gate opens or the episode ends. Returns (e_D, state, reward, terminated, info).

        The reward is summed over raw steps, whose number is `info["raw_steps"]`. An episode that has ended stays as it
        is: no raw step, no reward.
        """
        controlled, frozen = self.controlled, params.frozen
        shape, layer, z_1Z = controlled.model, controlled.layer, z_Z[None]
        switches = state.switches + 1

        def goes_on(carry: tuple[InternalState, jax.Array, jax.Array]) -> jax.Array:
            state, _, is_open = carry
            return ~(is_open | state.terminated | self.is_truncated(state, params))

        def raw_step(
            carry: tuple[InternalState, jax.Array, jax.Array],
        ) -> tuple[InternalState, jax.Array, jax.Array]:
            state, reward_sum, _ = carry
            k_action, k_env = jax.random.split(jax.random.fold_in(key, state.time))
            controlled_1D = metacontroller.control(frozen.metacontroller, state.e_1D, z_1Z)
            outputs, upper = backbone.upper_step(frozen.model, shape, controlled_1D, state.upper, layer)
            action = jax.random.categorical(k_action, outputs["action"][0])
            obs_F, raw, reward, terminated, _ = self.env.step_env(k_env, state.raw, action, params.env)
            h_1H = metacontroller.history_step(frozen.metacontroller, state.e_1D, state.h_1H)
            e_1D, lower = backbone.lower_step(frozen.model, shape, obs_F[None], state.lower, layer)
            beta = jax.nn.sigmoid(metacontroller.switch_logit(frozen.metacontroller, e_1D, h_1H, z_1Z))[0]
            is_open = ((beta >= controlled.threshold) | controlled.always_open) & (switches < controlled.max_switches)
            state = InternalState(raw, lower, upper, e_1D, h_1H, state.time + 1, switches, terminated)
            return state, reward_sum + reward, is_open

        start = (state._replace(switches=switches), jnp.zeros(()), jnp.zeros((), bool))
        after, reward_sum, _ = jax.lax.while_loop(goes_on, raw_step, start)
        info = {"raw_steps": after.time - state.time, "discount": 1.0 - after.terminated}
        return after.e_1D[0], after, reward_sum, after.terminated, info

    def is_truncated(self, state: InternalState, params: InternalParams) -> jax.Array:
        """Whether the raw episode is cut off, by its own environment or at `horizon`."""
        return self.env.is_truncated(state.raw, params.env) | (state.time >= self.horizon)
