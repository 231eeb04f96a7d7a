"""Our algorithms with a peer's settings, as `experiments.bench.rl` runs them beside the peer.

What has no counterpart stays ours: an episode that a time limit cut is bootstrapped, gradients are clipped by their
global norm (rejax clips each entry), Adam has one state for policy and value with epsilon 1e-5, layers begin orthogonal
(rejax: LeCun normal), and DQN's loss is Huber's, with a width at which it is all but quadratic.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench.rl_peers import Run
from experiments.train_rl.algorithms import policy_network
from experiments.train_rl.presets import Preset, preset
from rl import dqn, ppo, sac
from rl.algorithm import Algorithm, check_finite, evaluate
from rl.envs.make import make
from rl.networks import MLP, Memory, actor_critic, q_network, squashed_actor_critics
from seqmod.config import BackboneConfig

ACTIVATIONS = {"tanh": "tanh", "relu": "relu", "swish": "silu"}
# The defaults of rejax's PPO, where it has no published settings.
_REJAX_PPO = {
    "num_envs": 64,
    "num_steps": 64,
    "num_epochs": 8,
    "num_minibatches": 16,
    "learning_rate": 3e-4,
    "max_grad_norm": np.inf,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_eps": 0.2,
    "vf_coef": 0.5,
    "ent_coef": 0.01,
}


class Agent(NamedTuple):
    """An `algorithm` of `updates` in all, its hyperparameters and environment."""

    algorithm: Algorithm
    hyper: Any
    env: Any
    env_params: Any
    updates: int


def agent(run: Run) -> Agent:
    """Ours with the settings of a peer's run, or with our own for the environment where it has none.

    Raises ValueError for settings that have no counterpart here.
    """
    options: dict[str, Any] = {"backend": run.backend} if run.backend else {"flatten": True}
    env, params = make(run.env, **options)
    shape, space = env.observation_space(params).shape, env.action_space(params)
    config, hyper, torso = _settings(run)
    if isinstance(config, ppo.PPOConfig):
        own = _own(run)
        module, network = ppo, actor_critic(shape, space, torso)
        if own:
            network = policy_network(shape, space, torso, own.network)
    elif isinstance(config, dqn.DQNConfig):
        module, network = dqn, q_network(shape, space, torso, dueling=True)
    else:
        module, network = sac, squashed_actor_critics(shape, space, torso)
    # As their loops: purejaxrl's rounds down, the others' round up.
    steps = config.environments * config.steps
    updates = max(1, run.steps // steps if run.peer == "purejaxrl" else -(-run.steps // steps))
    config = replace(config, updates=updates)
    return Agent(module.make(config, env, network), hyper, env, params, updates)


def note(run: Run) -> str:
    """How our settings differ from the peer's."""
    if run.algorithm == "ppo_rnn":
        return "the same; an RG-LRU in place of its GRU"
    own = _own(run)
    return f"own: {own.source}" if own else "the same"


def _unrolled_once(run: Run) -> bool:
    """Whether Brax's PPO unrolls each environment once per update."""
    s = run.settings
    return run.peer == "brax" and s["num_envs"] == s["batch_size"] * s["num_minibatches"]


def _own(run: Run) -> Preset | None:
    """The preset for a Brax environment where the peer's settings have no counterpart here."""
    if not run.backend or _unrolled_once(run):
        return None
    return preset(f"brax/{run.env.removeprefix('brax/')}", "ppo")


def _settings(run: Run) -> tuple[Any, Any, Any]:
    """(config, hyper, torso), the number of updates aside."""
    s = run.settings
    own = _own(run)
    if own:
        return own.config, own.hyper, own.network.torso((), 0)
    if run.peer == "brax":
        return _like_brax(s)
    match run.peer, run.algorithm:
        case "purejaxrl", "ppo" | "ppo_rnn":
            return _like_purejaxrl(s, recurrent=run.algorithm == "ppo_rnn")
        case "rejax", "ppo":
            return _like_rejax(_REJAX_PPO | s)
        case "rejax", "dqn":
            config = dqn.DQNConfig(
                environments=s["num_envs"],
                steps=10,
                capacity=s["buffer_size"],
                learning_starts=s["fill_buffer"],
                gradient_steps=s["num_epochs"],
                batch=s["batch_size"],
                # Its target follows after each step of the environments.
                target_period=s["num_epochs"],
                double=s["ddqn"],
                max_grad_norm=s["max_grad_norm"],
                normalise_observations=s["normalize_observations"],
            )
            hyper = dqn.DQNHyper(
                learning_rate=s["learning_rate"],
                discount=s["gamma"],
                tau=1 - s["polyak"],
                epsilon_start=s["eps_start"],
                epsilon_end=s["eps_end"],
                exploration=s["exploration_fraction"],
                huber=1e3,
            )
            return config, hyper, MLP((64, 64), _activation(s))
        case "rejax", "sac":
            config = sac.SACConfig(
                environments=s["num_envs"],
                steps=50,
                capacity=s["buffer_size"],
                learning_starts=s["fill_buffer"],
                gradient_steps=s["num_epochs"],
                batch=s["batch_size"],
                normalise_observations=s["normalize_observations"],
            )
            hyper = sac.SACHyper(learning_rate=s["learning_rate"], discount=s["gamma"], tau=1 - s["polyak"])
            return config, hyper, MLP((64, 64), _activation(s))
        case _:
            raise ValueError(f"agent: no counterpart of {run.peer} {run.algorithm} in {run.env}")


def _activation(s: dict[str, Any]) -> Any:
    return ACTIVATIONS[s.get("agent_kwargs", {}).get("activation", "swish")]


def _like_purejaxrl(s: dict[str, Any], recurrent: bool) -> tuple[ppo.PPOConfig, ppo.PPOHyper, Any]:
    config = ppo.PPOConfig(
        environments=s["NUM_ENVS"],
        steps=s["NUM_STEPS"],
        epochs=s["UPDATE_EPOCHS"],
        minibatches=s["NUM_MINIBATCHES"],
        max_grad_norm=s["MAX_GRAD_NORM"],
        anneal=s["ANNEAL_LR"],
        clip_value=True,
    )
    hyper = ppo.PPOHyper(s["LR"], s["GAMMA"], s["GAE_LAMBDA"], s["CLIP_EPS"], s["ENT_COEF"], s["VF_COEF"])
    if recurrent:
        # Of the width of its GRU.
        return config, hyper, Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=128, mlp=128), MLP((128,)))
    return config, hyper, MLP((64, 64), s["ACTIVATION"])


def _like_rejax(s: dict[str, Any]) -> tuple[ppo.PPOConfig, ppo.PPOHyper, MLP]:
    config = ppo.PPOConfig(
        environments=s["num_envs"],
        steps=s["num_steps"],
        epochs=s["num_epochs"],
        minibatches=s["num_minibatches"],
        max_grad_norm=s["max_grad_norm"],
        anneal=False,
        clip_value=True,
        normalise_observations=s.get("normalize_observations", False),
    )
    hyper = ppo.PPOHyper(s["learning_rate"], s["gamma"], s["gae_lambda"], s["clip_eps"], s["ent_coef"], s["vf_coef"])
    return config, hyper, MLP((64, 64), _activation(s))


def _like_brax(s: dict[str, Any]) -> tuple[ppo.PPOConfig, ppo.PPOHyper, MLP]:
    """Where each environment is unrolled once per update, for the same work."""
    config = ppo.PPOConfig(
        environments=s["num_envs"],
        steps=s["unroll_length"],
        epochs=s["num_updates_per_batch"],
        minibatches=s["num_minibatches"],
        anneal=False,
        normalise_observations=s["normalize_observations"],
    )
    hyper = ppo.PPOHyper(s["learning_rate"], s["discounting"], entropy=s["entropy_cost"])
    return config, hyper, MLP((64, 64), "tanh")


def train(run: Run, episodes: int = 128) -> dict[str, Any]:
    """Ours with the settings of a peer's run, as `rl_peers.answer` has it: `returns` a row a seed, times in seconds.

    Returns are measured as that peer's are: in training since the last checkpoint for purejaxrl, else over fresh
    `episodes` (32 for Brax) with exploration, or without it for DQN, whose exploration goes on to the end. Raises
    FloatingPointError where observations or losses are not finite.
    """
    ours = agent(run)
    algorithm, horizon = ours.algorithm, int(ours.env_params.max_steps_in_episode)
    count = 32 if run.peer == "brax" else episodes
    edges = np.linspace(0, ours.updates, max(run.checkpoints, 1) + 1).round().astype(int)
    keys_S = jax.random.split(jax.random.key(0), run.seeds)

    def piece(length: int) -> Any:
        def one(state: Any):
            return jax.lax.scan(lambda state, _: algorithm.update(state), state, length=length)

        return jax.jit(jax.vmap(one), donate_argnums=0).lower(shapes).compile()

    def tested(states: Any, key: jax.Array) -> jax.Array:
        def one(state: Any, key: jax.Array) -> jax.Array:
            greedy = run.algorithm == "dqn"
            return evaluate(
                algorithm, state, key, ours.env, ours.env_params, episodes=count, horizon=horizon, greedy=greedy
            ).return_B.mean()

        return jax.vmap(one)(states, jax.random.split(key, run.seeds))

    init = jax.jit(jax.vmap(lambda key: algorithm.init(key, ours.hyper, ours.env_params)))
    shapes = jax.eval_shape(init, keys_S)
    begun = time.perf_counter()
    states = init(keys_S)
    # A piece may be one update longer or shorter than another.
    pieces = {length: piece(length) for length in {int(length) for length in np.diff(edges)}}
    test = None if run.peer == "purejaxrl" else jax.jit(tested).lower(shapes, jax.random.key(1)).compile()
    compiled = time.perf_counter() - begun
    rows, seconds, work = [], 0.0, 0.0
    for index, length in enumerate(np.diff(edges)):
        begun, begun_work = time.perf_counter(), time.process_time()
        states, metrics = jax.block_until_ready(pieces[int(length)](states))
        seconds += time.perf_counter() - begun
        work += time.process_time() - begun_work
        check_finite(metrics, axis=-1)
        rows.append(_trained(metrics) if test is None else test(states, jax.random.fold_in(jax.random.key(1), index)))
    returns = np.stack([np.asarray(row, float) for row in rows], axis=1)
    steps = algorithm.steps_per_update
    return {
        "compile_seconds": compiled,
        "run_seconds": [seconds],
        "cpu_seconds": [work],
        "steps_taken": ours.updates * steps,
        "checkpoint_steps": (edges[1:] * steps).tolist(),
        "returns": [[None if np.isnan(x) else float(x) for x in row] for row in returns],
        "steps_per_second": [ours.updates * steps * run.seeds / seconds],
    }


def _trained(metrics: dict[str, jax.Array]) -> np.ndarray:
    """Mean return (S,) of the episodes that ended within metrics (S, updates); NaN where none did."""
    count_SU = np.asarray(metrics["episodes"], float)
    total_S = np.where(count_SU > 0, np.asarray(metrics["episode_return"], float) * count_SU, 0.0).sum(1)
    with np.errstate(invalid="ignore"):
        return total_S / count_SU.sum(1)
