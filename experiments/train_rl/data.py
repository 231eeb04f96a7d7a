"""What offline algorithms learn from: episodes of the policies of another run, from greedy to random."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.train_rl.load import load_data, restore
from experiments.train_rl.settings import Options, Plan
from rl.offline import Seen, Trajectories, collect_trajectories


def prepare(options: Options[Any, Any]) -> Trajectories | None:
    """The data of a run: none if its algorithm is not offline, those it has if it is resumed, or gathered with its
    seed, the same for all that are trained side by side.

    Raises RunError if there is no policy to gather them with, and ValueError if it is one for another environment.
    """
    settings = options.settings
    if settings.data.run is None:
        return None
    if options.resume and (data := load_data(options.out)) is not None:
        return data
    others, plan, states = restore(settings.data.run)
    for name in ("env", "backend"):
        if getattr(others, name) != getattr(settings, name):
            raise ValueError(
                f"--data is a run with --{name} {getattr(others, name)}, expected {getattr(settings, name)}"
            )
    # Training splits three keys off this one.
    key = jax.random.fold_in(jax.random.key(settings.seed), 3)
    return gather(key, plan, states, settings.data.episodes, settings.data.random)


def gather(key: jax.Array, plan: Plan, states: Any, episodes: int, random: float) -> Trajectories:
    """Episodes of the policies `states` (S, ...), which take turns; L is the length of the longest.

    Policies are greedy, but the share of an episode's actions that are drawn evenly from all rises from 0 in the first
    to `random` in the last.
    """
    seeds = len(jax.tree.leaves(states)[0])
    each = -(-episodes // seeds)
    share_SN = np.resize(np.linspace(0.0, random, episodes, dtype=np.float32), (each, seeds)).T

    def collect(key: jax.Array, state: Any, share_N: jax.Array) -> Trajectories:
        return collect_trajectories(
            key,
            partial(plan.algorithm.act, state),
            plan.env,
            plan.env_params,
            episodes=each,
            horizon=plan.horizon,
            memory=plan.algorithm.init_memory(each),
            greedy=True,
            epsilon=share_N,
        )

    found = jax.device_get(jax.jit(jax.vmap(collect))(jax.random.split(key, seeds), states, share_SN))
    if isinstance(found.obs_NL, Seen):
        found = found._replace(obs_NL=found.obs_NL.obs)
    data = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:episodes], found)
    longest = int(data.mask_NL.sum(1).max())

    def cut(x_NL: np.ndarray) -> jax.Array:
        x_NL = x_NL[:, :longest]
        valid_NL = data.mask_NL[:, :longest].reshape(*x_NL.shape[:2], *(1,) * (x_NL.ndim - 2))
        return jnp.asarray(np.where(valid_NL, x_NL, x_NL.dtype.type(0)))

    return Trajectories(
        cut(data.obs_NL), cut(data.action_NL), cut(data.reward_NL), cut(data.mask_NL), jnp.asarray(data.terminated_N)
    )
