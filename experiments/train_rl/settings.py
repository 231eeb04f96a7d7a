"""What a run is asked to do: flags, their defaults by environment and algorithm, and what they amount to."""

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from experiments.train_rl.algorithms import ALGORITHMS, NetworkOptions, check_actions
from experiments.train_rl.presets import TINY, preset
from rl.algorithm import Algorithm
from rl.decision_transformer import DTConfig
from rl.envs.brax_env import Backend, brax_environments
from rl.envs.make import make
from rl.group import GroupConfig
from rl.offline import RewardObserved

PROGRAM = "python -m experiments.train_rl"
Size = Literal["standard", "tiny"]


@dataclass(frozen=True)
class DataOptions:
    """What an offline algorithm learns from: episodes of the greedy policies of another run, which take turns."""

    run: Annotated[str | None, tyro.conf.arg(name="data", prefix_name=False)] = None
    """Directory of that run, in the same environment; it has a checkpoint and need not be finished."""
    episodes: int = 200
    """In all."""
    random: float = 1.0
    """The share of actions that are random rises from 0 in the first episode to this in the last."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--data.episodes is {self.episodes}, expected at least 1")
        if not 0 <= self.random <= 1:
            raise ValueError(f"--data.random is {self.random}, expected a share from 0 to 1")


@dataclass(frozen=True)
class Settings[C, H]:
    """Train an algorithm in an environment; the defaults shown are those of --env, --algo and --preset."""

    config: C
    hyper: H
    network: Annotated[NetworkOptions, tyro.conf.arg(name="")]
    env: str
    """Name of the environment: gymnax's, brax/NAME, or GridworldPinpad; all are in rl.envs.names()."""
    algo: str
    """Name of the algorithm: ppo, a2c, group, dqn, sac; from --data: bc, decision_transformer."""
    preset: Size
    """Where defaults come from."""
    steps: int
    """Environment steps of each seed, or gradient steps of an offline algorithm; rounded to whole updates."""
    seeds: int
    """Runs side by side."""
    seed: int = 0
    """Seed k of this run is the same whatever their number."""
    evaluations: int = 20
    """How often the greedy policy is evaluated in the course of a run."""
    episodes: int = 32
    """Episodes of an evaluation, for each seed."""
    checkpoints: int = 5
    """Checkpoints in the course of a run."""
    max_steps: int | None = None
    """Time limit of an episode, in place of the environment's own."""
    backend: Backend | None = None
    """Physics of a Brax environment."""
    data: DataOptions = DataOptions()

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "evaluations", "episodes", "checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")

    def to_json(self) -> dict[str, Any]:
        """For config.json; `from_json` takes it back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        hyper: Any = self.hyper
        nested = {name: dataclasses.asdict(fields[name]) for name in ("config", "network", "data")}
        return fields | nested | {"hyper": hyper._asdict()}


@dataclass(frozen=True)
class Options[C, H]:
    """Train an algorithm in an environment; the defaults shown are those of --env, --algo and --preset."""

    settings: Annotated[Settings[C, H], tyro.conf.arg(name="")]
    out: Path
    """Run directory; must be new or empty without --resume."""
    resume: bool = False
    """Go on with the run in --out."""


class Plan(NamedTuple):
    """What settings amount to: the environment, the algorithm with its number of updates, hyperparameters, `horizon`
    steps of the longest episode, and `chunks` compiled calls of `updates` each, which are `chunk_steps` steps of the
    `unit`: "environment steps" or "gradient steps"."""

    env: Any
    env_params: Any
    algorithm: Algorithm
    hyper: Any
    horizon: int
    chunks: int
    updates: int
    chunk_steps: int
    unit: str

    @property
    def steps(self) -> int:
        """Of all chunks."""
        return self.chunks * self.chunk_steps


def from_json(stored: dict[str, Any]) -> Settings[Any, Any]:
    """Settings from what `to_json` gave."""
    entry = ALGORITHMS[stored["algo"]]
    parts = {"config": entry.config, "hyper": entry.hyper, "network": NetworkOptions, "data": DataOptions}
    built = {name: kind(**_tuples(stored[name])) for name, kind in parts.items()}
    return Settings(**stored | built)


def parse(arguments: list[str]) -> Options[Any, Any]:
    """Options of a command line. Raises ValueError for values that cannot be right."""
    before = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False)
    before.add_argument("--env", default="CartPole-v1")
    before.add_argument("--algo", default="ppo")
    before.add_argument("--preset", default="standard")
    chosen, rest = before.parse_known_args(arguments)
    if chosen.algo not in ALGORITHMS:
        near = difflib.get_close_matches(chosen.algo.lower(), ALGORITHMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no algorithm {chosen.algo!r}, expected one of {', '.join(sorted(ALGORITHMS))}{hint}"
        )
    if chosen.preset not in ("standard", "tiny"):
        raise ValueError(f"--preset is {chosen.preset!r}, expected 'standard' or 'tiny'")
    env_name = f"brax/{chosen.env}" if chosen.env in brax_environments() else chosen.env
    env, params = make(env_name)
    check_actions(chosen.algo, env_name, env.action_space(params))
    given = preset(env_name, chosen.algo) if chosen.preset == "standard" else TINY[chosen.algo]
    settings = Settings(
        config=given.config,
        hyper=given.hyper,
        network=given.network,
        env=env_name,
        algo=chosen.algo,
        preset=chosen.preset,
        steps=given.steps,
        seeds=given.seeds,
        evaluations=given.evaluations,
        episodes=given.episodes,
    )
    default = Options(settings, Path("runs") / "train_rl" / f"{env_name.replace('/', '_')}_{chosen.algo}")
    entry = ALGORITHMS[chosen.algo]
    # The hyperparameters' types say that they may be arrays; a flag is a number.
    numbers = tyro.constructors.ConstructorRegistry()
    numbers.primitive_rule(_number)
    kind = Options[entry.config, entry.hyper]  # pyright: ignore[reportInvalidTypeArguments]  # known only here
    options = tyro.cli(kind, args=rest, default=default, prog=PROGRAM, registry=numbers)
    if options.settings.config.updates != given.config.updates:
        raise ValueError("--config.updates follows from --steps: give that")
    if entry.offline and options.settings.data.run is None:
        raise ValueError(f"{chosen.algo} learns from data: name with --data a run in {env_name} that gathers them")
    if not entry.offline and options.settings.data != DataOptions():
        able = " and ".join(sorted(name for name, entry in ALGORITHMS.items() if entry.offline))
        raise ValueError(f"--data is for {able}: {chosen.algo} learns from what it does itself")
    return options


def plan(settings: Settings[Any, Any]) -> Plan:
    """What is to be run. Raises ValueError for settings that the environment or the algorithm cannot have."""
    options: dict[str, Any] = {} if settings.backend is None else {"backend": settings.backend}
    if options and not settings.env.startswith("brax/"):
        raise ValueError(f"--backend is of Brax environments, which {settings.env} is not")
    if dataclasses.asdict(settings.config).get("params_per_env"):
        raise ValueError("--config.params-per-env needs parameters for every environment: use the algorithm in Python")
    env, env_params = make(settings.env, max_steps=settings.max_steps, **options)
    entry = ALGORITHMS[settings.algo]
    horizon, config = int(env_params.max_steps_in_episode), settings.config
    if isinstance(config, GroupConfig):
        # Episodes end there anyway, and steps are counted by it.
        config = replace(config, horizon=min(config.horizon, horizon))
    if isinstance(config, DTConfig):
        env = RewardObserved(env)
    space = env.action_space(env_params)
    obs_shape = env.observation_space(env_params).shape
    torso = settings.network.torso(obs_shape, horizon)
    network = entry.network(obs_shape, space, torso, settings.network)
    algorithm = entry.make(config, env, network)
    per_update = settings.config.gradient_steps if entry.offline else algorithm.steps_per_update
    if settings.steps < per_update:
        raise ValueError(f"--steps is {settings.steps:,}, less than one update, which takes {per_update:,} steps")
    wanted = round(settings.steps / per_update)
    updates = max(1, round(wanted / settings.evaluations))
    chunks = max(1, round(wanted / updates))
    # The learning rate falls over all updates, so their number is a part of the algorithm.
    algorithm = entry.make(replace(config, updates=chunks * updates), env, network)
    unit = "gradient steps" if entry.offline else "environment steps"
    return Plan(env, env_params, algorithm, settings.hyper, horizon, chunks, updates, updates * per_update, unit)


def _number(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    if info.type != float | jax.Array:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: float(words[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


def _tuples(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
