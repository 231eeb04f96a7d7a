"""Everything that can be set in the internal-RL experiment, and its three presets."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from rl.envs.gridworld_pinpad import (
    Coding,
    EnvParams,
    GridworldPinpad,
    parse_task,
    tasks_without,
)
from rl.grpo import GRPOConfig
from seqmod.backbone import BackboneConfig
from seqmod.metacontroller import MetacontrollerConfig
from seqmod.train import AdamWConfig


def _text(task: tuple[int, ...]) -> str:
    return "".join(map(str, task))


@dataclass(frozen=True)
class World:
    """Grid, tasks, and how long episodes are.

    Tasks are written as digits. A subgoal is a run of `subgoal_colours` colours. Without `pretraining` tasks, all tasks
    of `task_length` subgoals are used that contain no withheld transition.
    """

    size: int = 12
    colours: int = 4
    walls: int = 2
    coding: Coding = "relative"
    subgoal_colours: int = 1
    task_length: int = 3
    pretraining: tuple[str, ...] = ()
    post_training: str = "0123"
    withheld: tuple[str, ...] = ("01", "12", "23", "30")
    """Subgoal transitions that no pretraining task may have; the post-training task's are withheld in any case."""
    horizon: int = 100
    """Steps after which an episode is truncated."""
    window: int = 40
    """Steps of a demonstration that the models are trained on."""
    noise: float = 0.0
    """The expert's eps in pretraining; all later stages use clean demonstrations."""

    @property
    def env(self) -> GridworldPinpad:
        """The environment."""
        return GridworldPinpad(size=self.size, colours=self.colours, walls=self.walls, coding=self.coding)

    @property
    def subgoals(self) -> int:
        """Number of subgoals."""
        return self.colours // self.subgoal_colours

    def split(self, task: str) -> tuple[int, ...]:
        """Subgoals of a task. Raises ValueError where its colours do not form subgoals."""
        colours, width = parse_task(task), self.subgoal_colours
        runs = [colours[start : start + width] for start in range(0, len(colours), width)]
        for run in runs:
            if run != tuple(range(run[0], run[0] + width)) or run[0] % width:
                raise ValueError(f"World: task {task!r} does not consist of subgoals of {width} colours")
        return tuple(run[0] // width for run in runs)

    @property
    def unseen(self) -> set[tuple[int, int]]:
        """Subgoal transitions that no pretraining task has."""
        return {pair for task in (self.post_training, *self.withheld) for pair in pairwise(self.split(task))}

    @property
    def pretraining_tasks(self) -> tuple[str, ...]:
        """The tasks of the demonstrations."""
        if self.pretraining:
            return self.pretraining
        width = self.subgoal_colours
        tasks = tasks_without(self.subgoals, self.task_length, self.unseen)
        return tuple(_text(tuple(width * s + i for s in task for i in range(width))) for task in tasks)

    def __post_init__(self) -> None:
        _ = self.env, self.pretraining_params, self.post_training_params
        if self.window < 1:
            raise ValueError(f"World: window is {self.window}, expected at least 1")
        for task in self.pretraining_tasks:
            seen = set(pairwise(self.split(task))) & self.unseen
            if seen:
                raise ValueError(f"World: pretraining task {task!r} has the withheld transitions {sorted(seen)}")

    @property
    def pretraining_params(self) -> EnvParams:
        """Environment parameters for demonstrations."""
        return self.env.make_params([parse_task(task) for task in self.pretraining_tasks], self.horizon)

    @property
    def post_training_params(self) -> EnvParams:
        """Environment parameters for reinforcement learning."""
        return self.env.make_params([parse_task(self.post_training)], self.horizon)


@dataclass(frozen=True)
class Base:
    """The base model: `layers` blocks of one `mixer`."""

    mixer: str = "attention"
    layers: int = 4
    width: int = 64
    mlp: int = 256
    heads: int = 4
    context: int = 32
    init_scale: float = 1.0

    def model(self, world: World) -> BackboneConfig:
        """Its backbone for a world."""
        env = world.env
        return BackboneConfig(
            inputs=env.observation_size,
            heads=(("action", env.num_actions), ("observation", env.observation_size)),
            mixers=(self.mixer,) * self.layers,
            width=self.width,
            mlp=self.mlp,
            attention_heads=self.heads,
            context=self.context,
            init_scale=self.init_scale,
        )


@dataclass(frozen=True)
class Pretrain:
    """Base-model training: weight `observation_weight` (the paper's lambda) of the next-observation loss."""

    optimiser: AdamWConfig = AdamWConfig(
        learning_rate=2e-3, weight_decay=0.05, steps=10_000, batch=128, warmup=200, schedule="cosine"
    )
    observation_weight: float = 0.01
    chunk: int = 100
    """Steps in one compiled call; all numbers of steps are multiples of it."""
    snapshots: tuple[float, ...] = (0.05, 0.25)
    """Fractions of training at which the model is kept for the probes."""


@dataclass(frozen=True)
class Probe:
    """Linear probes of the subgoal, at every layer and snapshot."""

    optimiser: AdamWConfig = AdamWConfig(learning_rate=1e-2, weight_decay=0.0, steps=400, batch=64)


@dataclass(frozen=True)
class Control:
    """Supervised low-rank controllers, one for each colour or subgoal, at every layer."""

    optimiser: AdamWConfig = AdamWConfig(
        learning_rate=3e-3, weight_decay=0.0, steps=600, batch=64, warmup=20, schedule="cosine"
    )
    rank: int = 16
    episodes: int = 1024
    """Episodes of each evaluation on the post-training task."""
    raw_episodes: int = 32_768
    """Episodes of the uncontrolled base model on it."""


@dataclass(frozen=True)
class Discover:
    """Metacontroller training on the frozen base: one model learns codes, then one for each KL weight is trained on.

    First a single metacontroller is trained for `learn_steps` at the small KL weight `learn_alpha`, until its codes say
    where a demonstration goes. Then `optimiser` goes on from it once for each weight of `alphas`, on the same batches;
    the weight rises geometrically from `learn_alpha` over the first `ramp` of the steps. `chosen` is the weight that
    internal RL uses. Without `learn_steps` all start fresh; without `ramp` the weight is constant, as in the paper.
    More than 50 (first phase) or 100 steps are rounded down to a multiple of that.

    With `turned_view` the encoder reads each demonstration as it would be in a world turned or mirrored at random,
    through the last layer's stream, so that a code cannot name a direction.
    """

    learn_steps: int = 1000
    learn_batch: int = 256
    learn_rate: float = 3e-3
    learn_alpha: float = 1e-4
    optimiser: AdamWConfig = AdamWConfig(
        learning_rate=3e-3, weight_decay=0.03, steps=1200, batch=64, warmup=50, schedule="cosine"
    )
    metacontroller: MetacontrollerConfig = MetacontrollerConfig(
        gate="straight_through", gate_bias=-1.5, initial_log_sigma=-2.0
    )
    alphas: tuple[float, ...] = (0.01, 0.05, 0.17)
    chosen: float = 0.05
    ramp: float = 0.25
    turned_view: bool = True
    held_out: int = 512
    """Held-out demonstrations that the gate is measured on."""

    def __post_init__(self) -> None:
        if self.chosen not in self.alphas:
            raise ValueError(f"Discover: chosen is {self.chosen}, expected one of alphas {self.alphas}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"Discover: ramp is {self.ramp}, expected a fraction of training")
        if self.ramp and min(self.learn_alpha, *self.alphas) <= 0:
            raise ValueError(
                f"Discover: a geometric ramp needs weights above 0, got {self.learn_alpha} and {self.alphas}"
            )
        if self.learn_steps < 0:
            raise ValueError(f"Discover: learn_steps is {self.learn_steps}, expected at least 0")

    @property
    def learn_optimiser(self) -> AdamWConfig:
        """The optimiser of the first phase; ValueError without one."""
        return replace(
            self.optimiser,
            learning_rate=self.learn_rate,
            steps=self.learn_steps,
            batch=self.learn_batch,
            warmup=min(self.optimiser.warmup, self.learn_steps - 1),
            schedule="constant",
        )


@dataclass(frozen=True)
class Reinforce:
    """Internal RL and its baselines, each with the same number of episodes per seed."""

    grpo: GRPOConfig = GRPOConfig(horizon=64)
    raw_grpo: GRPOConfig = GRPOConfig(horizon=64, epochs=1)
    updates: int = 120
    learning_rate: float = 1e-3
    raw_learning_rate: float = 3e-4
    policy_width: int = 64
    initial_std: float = 2.0
    """Of the policy over codes. Codes of more than unit length steer harder than the prior's (README)."""
    max_switches: int = 24
    seeds: int = 5
    forced_baseline: bool = False
    """Whether to train the forced-switching baseline too."""
    seeds_by: Literal["map", "vmap"] = "map"
    """Seeds one after another (faster on a CPU, where a batch fills the cores) or side by side."""
    chunk: int = 4
    """Updates in one compiled call."""


@dataclass(frozen=True)
class Config:
    """The whole experiment. `layer` is the controlled layer of the residual stream."""

    world: World = field(default_factory=World)
    base: Base = field(default_factory=Base)
    pretrain: Pretrain = field(default_factory=Pretrain)
    probe: Probe = field(default_factory=Probe)
    control: Control = field(default_factory=Control)
    discover: Discover = field(default_factory=Discover)
    reinforce: Reinforce = field(default_factory=Reinforce)
    layer: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self.model.check_layer(self.layer)
        if self.discover.metacontroller.width != self.base.width:
            raise ValueError(
                f"Config: discover.metacontroller.width is {self.discover.metacontroller.width}, "
                f"expected base.width {self.base.width}"
            )

    @property
    def model(self) -> BackboneConfig:
        """Backbone of the base model."""
        return self.base.model(self.world)
