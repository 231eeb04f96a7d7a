"""Training with seeds side by side: a compiled chunk is some updates of every seed, then an evaluation of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runner import NonFiniteLoss, RunDirectory, train_chunks
from experiments.train_rl.settings import Plan, Settings
from rl.algorithm import check_finite, evaluate
from rl.offline import Trajectories

STAGE = "train"


class Training(NamedTuple):
    """States of the algorithm, leaves (S, ...); the key of evaluations; and the number of chunks so far."""

    states: Any
    k_evaluate: jax.Array
    chunks: jax.Array


class Trained(NamedTuple):
    """The last `states` (S, ...), `metrics` (chunks, S), and the mean return `untrained_S` of the policies as they
    began."""

    states: Any
    metrics: dict[str, np.ndarray]
    untrained_S: np.ndarray


def start(settings: Settings[Any, Any], plan: Plan, data: Trajectories | None = None) -> tuple[Training, jax.Array]:
    """Before training, on `data` if the algorithm is offline, and the mean return (S,) of the policy as it begins, with
    its exploration."""
    k_run, k_untrained, k_evaluate = jax.random.split(jax.random.key(settings.seed), 3)
    seeds_S = jnp.arange(settings.seeds)
    keys_S = jax.vmap(lambda index: jax.random.fold_in(k_run, index))(seeds_S)
    source = plan.env_params if data is None else data
    states = jax.vmap(lambda key: plan.algorithm.init(key, plan.hyper, source))(keys_S)
    untrained_S = _returns(settings, plan, states, k_untrained, greedy=False)
    return Training(states, k_evaluate, jnp.zeros((), jnp.int32)), untrained_S


def make_chunk(
    settings: Settings[Any, Any], plan: Plan
) -> Callable[[Training], tuple[Training, dict[str, jax.Array], jax.Array]]:
    """A compiled function of a state, which it donates: `(state, metrics (1, S), bad_US)`, where bad_US counts the
    observations of each update that were not finite."""

    def chunk(state: Training):
        def update(states: Any, _: None):
            return jax.vmap(plan.algorithm.update)(states)

        states, metrics_US = jax.lax.scan(update, state.states, length=plan.updates)
        bad_US = metrics_US.pop("bad_observations")
        k_episodes = jax.random.fold_in(state.k_evaluate, state.chunks)
        return_S = _returns(settings, plan, states, k_episodes, greedy=True)
        metrics = {name: value_S[None] for name, value_S in _summary(metrics_US).items()}
        # A scalar too, for the eye: it is shown beside the progress bar.
        metrics |= {"greedy_return": return_S[None], "mean_greedy_return": return_S.mean()}
        return Training(states, state.k_evaluate, state.chunks + 1), metrics, bad_US

    return jax.jit(chunk, donate_argnums=0)


def train(run: RunDirectory, settings: Settings[Any, Any], plan: Plan, data: Trajectories | None = None) -> Trained:
    """All chunks, or those that are left of an interrupted run. Raises what `train_chunks` raises, and NonFiniteLoss
    for observations that are not finite."""
    state, untrained_S = jax.jit(lambda data: start(settings, plan, data))(data)
    chunk, steps = make_chunk(settings, plan), plan.chunk_steps

    def checked(state: Training) -> tuple[Training, dict[str, jax.Array]]:
        before = int(state.chunks) * steps
        state, metrics, bad_US = chunk(state)
        try:
            check_finite({"bad_observations": bad_US})
        except FloatingPointError as error:
            raise NonFiniteLoss(f"stage {STAGE}: after step {before:,}: {error}") from error
        return state, metrics

    state, metrics = train_chunks(
        run,
        STAGE,
        state,
        checked,
        plan.chunks,
        units_per_chunk=steps,
        unit="steps",
        config=settings.to_json(),
        checkpoint_every=max(1, plan.chunks // settings.checkpoints),
    )
    return Trained(state.states, metrics, np.asarray(untrained_S))


def _returns(settings: Settings[Any, Any], plan: Plan, states: Any, key: jax.Array, *, greedy: bool) -> jax.Array:
    """Mean return (S,) of some episodes of each seed's policy."""

    def one(state: Any, key: jax.Array) -> jax.Array:
        episodes = evaluate(
            plan.algorithm,
            state,
            key,
            plan.env,
            plan.env_params,
            episodes=settings.episodes,
            horizon=plan.horizon,
            greedy=greedy,
        )
        return episodes.return_B.mean()

    return jax.vmap(one)(states, jax.random.split(key, settings.seeds))


def _summary(metrics_US: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Over the updates of a chunk: the number of episodes, means over episodes for what is told of them, and means over
    updates for all else. An offline algorithm tells of no episodes."""
    summary = {}
    for name, value_US in metrics_US.items():
        if name == "episodes":
            summary[name] = value_US.sum(0)
        elif name.startswith("episode_"):
            episodes_US = metrics_US["episodes"]
            total_S = jnp.where(episodes_US > 0, value_US * episodes_US, 0.0).sum(0)
            summary[name] = total_S / episodes_US.sum(0)  # NaN where no episode ended
        else:
            summary[name] = value_US.mean(0)
    return summary
