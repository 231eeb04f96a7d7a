"""Environments, algorithms and internal RL, compiled end to end.

`grpo` is the optimiser, `internal` internal RL with it, `internal_env` the same as an environment for other algorithms,
`rollout` the loop that they share. Environments are imported from `rl.envs`, which alone needs gymnax and brax.
"""

from rl import distributions, grpo, internal, internal_env, losses, rollout
from rl.grpo import GRPOConfig
from rl.internal import Controlled, Frozen, PolicyConfig
from rl.internal_env import InternalEnv, InternalParams, InternalState

__all__ = [
    "Controlled",
    "Frozen",
    "GRPOConfig",
    "InternalEnv",
    "InternalParams",
    "InternalState",
    "PolicyConfig",
    "distributions",
    "grpo",
    "internal",
    "internal_env",
    "losses",
    "rollout",
]
