"""Environments with gymnax's interface, their experts, and pictures of what happens in them."""

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
from rl.envs.render import Episode, episode_frames, episode_gif, episode_picture, episode_png, frame

__all__ = [
    "ACTION_NAMES",
    "PAPER_POST_TRAINING",
    "PAPER_PRETRAINING",
    "UNREACHABLE",
    "Demonstrations",
    "EnvParams",
    "EnvState",
    "Episode",
    "GridworldPinpad",
    "action_probabilities",
    "colour_distances",
    "demonstrations",
    "episode_frames",
    "episode_gif",
    "episode_picture",
    "episode_png",
    "frame",
    "parse_task",
    "steps_to_finish",
    "subgoal_transitions",
    "task_length",
    "tasks_without",
]
