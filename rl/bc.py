"""Behaviour cloning: maximum likelihood of the actions of a data set, discrete or continuous, with or without a memory.

With `top` below 1, of the episodes of highest return alone: "%BC" (Chen et al., arXiv 2106.01345, section 5.2). Per
update: some gradient steps on batches drawn from the whole data set. Continuous actions are scaled to the bounds of
their space, and the policy is the Gaussian of the other algorithms.

A network without memory learns from single steps, one with a memory from windows, at whose first step it is blank:
whole episodes, as it will meet them, unless `context` says how many steps.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl import normalise, offline
from rl.algorithm import Algorithm, bad_values
from rl.networks import Network, is_discrete, unroll
from rl.normalise import Moments
from rl.offline import Places, Train, Trajectories, Windows
from rl.policies import POLICIES, Policy, bounds, from_box, to_box


@dataclass(frozen=True)
class BCConfig:
    """`updates` of `gradient_steps` each, on batches of `batch` steps, or windows of `context` steps for a network with
    a memory (None: whole episodes). `top`: the fraction of the data set's steps to learn from, those of the episodes
    of highest return."""

    updates: int = 20
    gradient_steps: int = 100
    batch: int = 256
    context: int | None = None
    top: float = 1.0
    max_grad_norm: float = 1.0
    normalise_observations: bool = True

    def __post_init__(self) -> None:
        for name in ("updates", "gradient_steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"BCConfig: {name} is {getattr(self, name)}, expected at least 1")
        if self.context is not None and self.context < 1:
            raise ValueError(f"BCConfig: context is {self.context}, expected at least 1, or None for whole episodes")
        if not self.max_grad_norm > 0:
            raise ValueError(f"BCConfig: max_grad_norm is {self.max_grad_norm}, expected a number above 0")
        if not 0 < self.top <= 1:
            raise ValueError(f"BCConfig: top is {self.top}, expected a fraction above 0, at most 1")


class BCHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`."""

    learning_rate: float | jax.Array = 1e-3
    weight_decay: float | jax.Array = 0.0


class BCState(NamedTuple):
    """Everything a run is: see `rl.algorithm`."""

    params: Any
    opt_state: Any
    data: Trajectories
    observations: Moments
    update: jax.Array
    key: jax.Array
    hyper: BCHyper


def make(config: BCConfig, env: Any, network: Network) -> Algorithm:
    """Behaviour cloning for the spaces of `env`, with an actor-critic, whose value is not used, or a network whose
    output is a policy. `init(key, hyper, data)` gets `rl.offline.Trajectories`; `steps_per_update` is 0."""
    space = env.action_space(env.default_params)
    box = None if is_discrete(space) else bounds(space)

    def see(seen: Moments, obs: jax.Array) -> jax.Array:
        return normalise.normalise(seen, obs.astype(jnp.float32)) if config.normalise_observations else obs

    def optimiser(hyper: BCHyper) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(),
            optax.add_decayed_weights(hyper.weight_decay),
            optax.scale(-hyper.learning_rate),
        )

    def init(key: jax.Array, hyper: BCHyper, data: Trajectories) -> BCState:
        offline.check(data)
        data = offline.best(data, config.top)
        k_params, k_run = jax.random.split(key)
        params = network.init(k_params)
        hyper = jax.tree.map(jnp.float32, hyper)
        return BCState(
            params=params,
            opt_state=optimiser(hyper).init(params),
            data=data,
            observations=offline.observation_moments(data),
            update=jnp.zeros((), jnp.int32),
            key=k_run,
            hyper=hyper,
        )

    def loss(params: Any, part: Windows) -> tuple[jax.Array, dict[str, jax.Array]]:
        obs_KB, action_KB, mask_KB = (jnp.swapaxes(x, 0, 1) for x in (part.obs_BK, part.action_BK, part.mask_BK))
        first_KB = jnp.zeros_like(mask_KB).at[0].set(True)
        outputs, _ = unroll(network, params, obs_KB, first_KB, network.init_memory(mask_KB.shape[1]))
        policy = _policy(outputs)
        count = mask_KB.sum()
        nll = -jnp.where(mask_KB, policy.log_prob(action_KB), 0.0).sum() / count
        error_KB = policy.mode() != action_KB if box is None else jnp.square(policy.mode() - action_KB).mean(-1)
        return nll, {"loss": nll, "action_error": jnp.where(mask_KB, error_KB, 0.0).sum() / count}

    def update(state: BCState) -> tuple[BCState, dict[str, jax.Array]]:
        k_update = jax.random.fold_in(state.key, state.update)
        whole = network.recurrent and config.context is None
        steps = state.data.mask_NL.shape[1] if whole else config.context or 1
        # An update's random numbers at once: drawing is dear next to a small network. Its windows one batch at a time.
        places = offline.draw_places(
            k_update,
            state.data.length_N,
            config.batch * config.gradient_steps,
            steps if network.recurrent else 1,
            from_start=whole,
        )
        places = jax.tree.map(lambda x: x.reshape(config.gradient_steps, config.batch, *x.shape[1:]), places)
        tx = optimiser(state.hyper)

        def one(carry: tuple[Any, Any], place: Places):
            params, opt_state = carry
            part = offline.windows_at(state.data, place)
            part = part._replace(obs_BK=see(state.observations, part.obs_BK))
            if box is not None:
                part = part._replace(action_BK=from_box(box, part.action_BK))
            grads, metrics = jax.grad(loss, has_aux=True)(params, part)
            updates, opt_state = tx.update(grads, opt_state, params)
            metrics |= {"grad_norm": optax.tree.norm(grads)}
            return (optax.apply_updates(params, updates), opt_state), (metrics, bad_values(part.obs_BK))

        (params, opt_state), (metrics, bad) = jax.lax.scan(one, (state.params, state.opt_state), places)
        new = state._replace(params=params, opt_state=opt_state, update=state.update + 1)
        return new, {**jax.tree.map(jnp.mean, metrics), "bad_observations": bad.sum()}

    def act(state: BCState, key: jax.Array | None, obs_B: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        outputs, memory = network.step(state.params, see(state.observations, obs_B), memory)
        policy = _policy(outputs)
        action = policy.mode() if key is None else policy.sample(key)
        return action if box is None else to_box(box, action), memory

    return Algorithm(init, update, act, network.init_memory, 0)


def make_train(config: BCConfig, env: Any, network: Network) -> Train:
    """`train(key, data, hyper=BCHyper()) -> (state, metrics)`, all updates as one function."""
    return offline.trainer(make(config, env, network), config.updates, BCHyper())


def _policy(outputs: Any) -> Policy:
    """Of an actor-critic's (policy, value), or a policy by itself."""
    return outputs if isinstance(outputs, POLICIES) else outputs[0]
