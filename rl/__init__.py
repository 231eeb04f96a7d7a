"""Environments, algorithms and internal RL, compiled end to end.

Algorithms, one file each, have one shape (`algorithm`): `ppo`, `a2c`, `group`, `dqn`, `sac`, and from data `bc` and
`decision_transformer`. They are made of `vector` (many environments at once), `networks`, `policies`, `collect`,
`replay`, `normalise`, and the pure functions of `returns`, `losses` and `distributions`. `sweep` runs seeds and
hyperparameters side by side, `statistics` says what they show, `devices` spreads a run.

Internal RL is `internal`, and the same as an environment for other algorithms `internal_env`; `grpo` is its optimiser,
`rollout` the loop over whole episodes. Environments are imported from `rl.envs`, which alone needs gymnax and Brax.
"""

from rl import (
    a2c,
    algorithm,
    bc,
    collect,
    decision_transformer,
    devices,
    distributions,
    dqn,
    group,
    grpo,
    internal,
    internal_env,
    losses,
    networks,
    normalise,
    offline,
    policies,
    ppo,
    replay,
    returns,
    rollout,
    sac,
    statistics,
    sweep,
    vector,
)
from rl.a2c import A2CConfig, A2CHyper
from rl.algorithm import Algorithm
from rl.bc import BCConfig, BCHyper
from rl.decision_transformer import DTConfig, DTHyper
from rl.dqn import DQNConfig, DQNHyper
from rl.group import GroupConfig, GroupHyper
from rl.grpo import GRPOConfig
from rl.internal import Controlled, Frozen, PolicyConfig
from rl.internal_env import InternalEnv, InternalParams, InternalState
from rl.networks import CNN, MLP, Memory, Network
from rl.offline import RewardObserved, Trajectories
from rl.ppo import PPOConfig, PPOHyper
from rl.sac import SACConfig, SACHyper

__all__ = [
    "CNN",
    "MLP",
    "A2CConfig",
    "A2CHyper",
    "Algorithm",
    "BCConfig",
    "BCHyper",
    "Controlled",
    "DQNConfig",
    "DQNHyper",
    "DTConfig",
    "DTHyper",
    "Frozen",
    "GRPOConfig",
    "GroupConfig",
    "GroupHyper",
    "InternalEnv",
    "InternalParams",
    "InternalState",
    "Memory",
    "Network",
    "PPOConfig",
    "PPOHyper",
    "PolicyConfig",
    "RewardObserved",
    "SACConfig",
    "SACHyper",
    "Trajectories",
    "a2c",
    "algorithm",
    "bc",
    "collect",
    "decision_transformer",
    "devices",
    "distributions",
    "dqn",
    "group",
    "grpo",
    "internal",
    "internal_env",
    "losses",
    "networks",
    "normalise",
    "offline",
    "policies",
    "ppo",
    "replay",
    "returns",
    "rollout",
    "sac",
    "statistics",
    "sweep",
    "vector",
]
