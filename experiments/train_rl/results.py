"""What a finished run says: result.json, curves, a rendered episode, report.html."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plotting
from experiments.report import Block, Claim, Figure, Section, Table, Text, write_report
from experiments.runner import RunDirectory
from experiments.train_rl.presets import THRESHOLDS
from experiments.train_rl.settings import Plan, Settings
from experiments.train_rl.training import Trained
from rl.envs import pictures, render
from rl.envs.brax_env import BraxEnv
from rl.envs.brax_html import episode_html
from rl.envs.gridworld_pinpad import GridworldPinpad
from rl.offline import RewardObserved, Trajectories

FRAMES = 300
"""The most steps of an episode that are shown."""


def conclude(
    run: RunDirectory, settings: Settings[Any, Any], plan: Plan, trained: Trained, data: Trajectories | None = None
) -> dict[str, Any]:
    """Writes everything and returns what is in result.json."""
    returns_S = trained.metrics["greedy_return"][-1]
    claim = _claim(settings, returns_S, trained.untrained_S)
    low, middle, high = (float(x) for x in np.quantile(returns_S, [0.25, 0.5, 0.75]))
    result = {
        "claim": claim.claim,
        "measured": {
            "return": float(returns_S.mean()),
            "returns": returns_S,
            "untrained_returns": trained.untrained_S,
            "episodes": settings.episodes,
            plan.unit.replace(" ", "_"): plan.steps,
            "steps_per_second": _speed(run, settings, plan),
        },
        "holds": claim.holds,
        "seeds": settings.seeds,
        "spread": {"min": returns_S.min(), "quartiles": [low, middle, high], "max": returns_S.max()},
        "claims": [asdict(claim)],
    }
    about = f"{settings.seeds} seeds of {plan.steps:,} {plan.unit} each"
    if data is not None:
        return_N = np.asarray(data.return_N)
        told = {"min": return_N.min(), "mean": return_N.mean(), "max": return_N.max()}
        result["measured"]["data_returns"] = told
        about += f", on {len(return_N)} episodes of {settings.data.run} with returns from {told['min']:.4g} to "
        about += f"{told['max']:.4g}, {told['mean']:.4g} in the mean"
    run.write_result(result)
    curves = _curves(run.figure("curves.png"), settings, plan, trained)
    shown = episode(run, settings, plan, trained.states)
    rows = [
        [seed, float(untrained), float(last)]
        for seed, (untrained, last) in enumerate(zip(trained.untrained_S, returns_S, strict=True))
    ]
    table = Table(
        ["seed", "untrained", "trained"],
        rows,
        f"Mean returns of {settings.episodes} episodes: of the policy as it began, and of the greedy one at the end.",
    )
    report = write_report(
        run.path / "report.html",
        f"{settings.algo.upper()} in {settings.env}",
        f"{about}. Every setting is in config.json.",
        [claim],
        [
            Section("Learning", [Figure(curves), table]),
            Section("An episode of the first seed, greedy", [shown]),
            Section("The policy in Python", [Text(_HINT.format(path=run.path))]),
        ],
    )
    print(f"[{'holds' if claim.holds else 'does not hold'}] {claim.claim}: {claim.measured}")
    print(f"report: {report}\n{_HINT.format(path=run.path)}")
    return result


_HINT = 'from experiments.train_rl.load import load; algorithm, state, env, env_params = load("{path}")'


def _speed(run: RunDirectory, settings: Settings[Any, Any], plan: Plan) -> float | None:
    """Steps per second, those of all seeds together, evaluations included; None after one chunk."""
    # The first chunk compiles; the median leaves out what passed between an interruption and its end.
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    seconds = np.diff([json.loads(line)["time"] for line in lines])
    steps = settings.seeds * plan.chunk_steps
    return steps / float(np.median(seconds)) if len(seconds) and np.median(seconds) > 0 else None


def _claim(settings: Settings[Any, Any], returns_S: np.ndarray, untrained_S: np.ndarray) -> Claim:
    name, env = settings.algo.upper(), settings.env
    mean, spread = (
        float(returns_S.mean()),
        f"{returns_S.min():.4g} to {returns_S.max():.4g} over {len(returns_S)} seeds",
    )
    threshold = THRESHOLDS.get(env)
    if threshold is None:
        return Claim(
            f"{name} learns in {env} (in every seed, a higher return than the untrained policy's)",
            f"mean return {mean:.4g} ({spread}), untrained {untrained_S.mean():.4g}",
            bool((returns_S > untrained_S).all()),
        )
    return Claim(
        f"{name} solves {env} (mean return {threshold:g})", f"mean return {mean:.4g} ({spread})", mean >= threshold
    )


def _curves(path: Path, settings: Settings[Any, Any], plan: Plan, trained: Trained) -> Path:
    """Median and quartiles over seeds of the greedy policy's return, and of the policy's that explored, if any did."""
    fig, axes = plotting.figure(width=6.5, height=3.6)
    ax = axes[0, 0]
    steps = plan.chunk_steps * np.arange(1, plan.chunks + 1)
    plotting.line_with_band(ax, steps, trained.metrics["greedy_return"].T, "greedy")
    if "episode_return" in trained.metrics:
        seen_CS = trained.metrics["episode_return"]
        told = np.isfinite(seen_CS).all(1)  # long episodes may not end within a chunk
        if told.any():
            plotting.line_with_band(ax, steps[told], seen_CS[told].T, "in training")
    if (threshold := THRESHOLDS.get(settings.env)) is not None:
        ax.axhline(threshold, color="0.5", linestyle="--", linewidth=1)
    ax.axhline(float(np.median(trained.untrained_S)), color="0.7", linestyle=":", linewidth=1)
    ax.set_xlabel(plan.unit)
    ax.set_ylabel("return")
    band = ", median and quartiles over seeds" if settings.seeds > 1 else ""
    ax.set_title(f"{settings.algo.upper()} in {settings.env}{band}", fontsize=10)
    return plotting.save(fig, path)


def episode(run: RunDirectory, settings: Settings[Any, Any], plan: Plan, states: Any) -> Block:
    """One greedy episode of the first seed, as a GIF, or a page of its own for Brax."""
    state, env = jax.tree.map(lambda x: x[0], states), plan.env
    steps = min(plan.horizon, FRAMES)
    state_S, reward_T, done_T = jax.device_get(
        jax.jit(lambda: play(plan, state, jax.random.key(settings.seed), steps))()
    )
    if isinstance(env, RewardObserved):
        env, state_S = env.env, state_S.env
    length = int(done_T.argmax()) + 1 if done_T.any() else steps
    state_S, reward_T = jax.tree.map(lambda x: x[: length + 1], state_S), reward_T[:length]
    caption = f"{length} steps, return {reward_T.sum():.4g}"
    if not done_T.any() and steps < plan.horizon:
        caption = f"The first {length} steps, return so far {reward_T.sum():.4g}"
    if isinstance(env, BraxEnv):
        path = episode_html(env, state_S, run.figure("episode.html"), np.append(0.0, reward_T))
        return Text(f"{caption}: open figures/{path.name}, beside this report.")
    path = run.figure("episode.gif")
    if isinstance(env, GridworldPinpad):
        objects_J, task_K = state_S.objects_J[0], state_S.task_K[0]
        seen = render.Episode(env, state_S.agent, objects_J, task_K, horizon=plan.horizon)
        render.episode_gif(path, render.episode_frames(seen))
        return Figure(path, caption)
    try:
        frames = pictures.frames(env, state_S, reward_T, plan.env_params, side=240)
    except ValueError as no_picture:
        return Text(f"{caption}; {no_picture}")
    pictures.gif(frames, path, fps=25)
    return Figure(path, caption)


def play(plan: Plan, state: Any, key: jax.Array, steps: int) -> tuple[Any, jax.Array, jax.Array]:
    """Greedy steps from a reset, on beyond the end of the episode: the environment's states, leaves (S, ...) with
    S = T + 1, rewards (T,), and whether each step was an end (T,)."""
    env, params, algorithm = plan.env, plan.env_params, plan.algorithm
    k_reset, k_step = jax.random.split(key)
    obs, first = env.reset_env(k_reset, params)

    def one(carry: tuple[Any, Any, Any], key: jax.Array):
        obs, before, memory = carry
        action_B, memory = algorithm.act(state, None, jax.tree.map(lambda x: x[None], obs), memory)
        obs, after, reward, terminated, _ = env.step_env(key, before, action_B[0], params)
        return (obs, after, memory), (after, reward, terminated | env.is_truncated(after, params))

    carry = (obs, first, algorithm.init_memory(1))
    _, (after_T, reward_T, done_T) = jax.lax.scan(one, carry, jax.random.split(k_step, steps))
    state_S = jax.tree.map(lambda x, later: jnp.concatenate([x[None], later]), first, after_T)
    return state_S, reward_T, done_T
