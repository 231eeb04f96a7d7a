"""Environments with gymnax's interface, their experts, and pictures of what happens in them.

`make` gives any of them by name. Pictures of gymnax's are in `pictures`, those of Brax in `brax_html`.
"""

from rl.envs.brax_env import BraxEnv, BraxParams, BraxState, brax_allowed, brax_environments
from rl.envs.experts import (
    UNREACHABLE,
    Demonstrations,
    action_probabilities,
    colour_distances,
    demonstrations,
    steps_to_finish,
)
from rl.envs.gridworld_pinpad import (
    ACTION_NAMES,
    PAPER_POST_TRAINING,
    PAPER_PRETRAINING,
    EnvParams,
    EnvState,
    GridworldPinpad,
    parse_task,
    subgoal_transitions,
    task_length,
    tasks_without,
)
from rl.envs.make import ActionRepeat, FlattenObservation, RememberLast, Strict, make, names, unwrapped
from rl.envs.probe import PROBES, Probe, ProbeEnv
from rl.envs.render import Episode, episode_frames, episode_gif, episode_picture, episode_png, frame

__all__ = [
    "ACTION_NAMES",
    "PAPER_POST_TRAINING",
    "PAPER_PRETRAINING",
    "PROBES",
    "UNREACHABLE",
    "ActionRepeat",
    "BraxEnv",
    "BraxParams",
    "BraxState",
    "Demonstrations",
    "EnvParams",
    "EnvState",
    "Episode",
    "FlattenObservation",
    "GridworldPinpad",
    "Probe",
    "ProbeEnv",
    "RememberLast",
    "Strict",
    "action_probabilities",
    "brax_allowed",
    "brax_environments",
    "colour_distances",
    "demonstrations",
    "episode_frames",
    "episode_gif",
    "episode_picture",
    "episode_png",
    "frame",
    "make",
    "names",
    "parse_task",
    "steps_to_finish",
    "subgoal_transitions",
    "task_length",
    "tasks_without",
    "unwrapped",
]
