"""What a run has learned, for use in Python."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.run_directory import RunError
from experiments.train_rl.settings import Plan, Settings, from_json, plan
from experiments.train_rl.training import STAGE, start
from rl.algorithm import Algorithm
from rl.offline import Trajectories
from seqmod import checkpoint, npz

DATA = "data"
"""The stage of a run in which an offline algorithm's data are gathered."""


def load(run_directory: str | Path, *, seed: int = 0) -> tuple[Algorithm, Any, Any, Any]:
    """The policy in a run directory: `(algorithm, state, env, env_params)`.

    The state is that of the newest checkpoint, for one of the run's seeds, counted from 0; the run need not be
    finished. `rl.algorithm.evaluate` plays episodes with it, and its updates can be gone on with. The environment of a
    Decision Transformer shows it its rewards. Raises RunError for a directory without a checkpoint and ValueError for
    a seed that the run does not have.
    """
    settings, planned, states = restore(run_directory)
    if not 0 <= seed < settings.seeds:
        raise ValueError(f"load: seed is {seed}, expected 0..{settings.seeds - 1}")
    return planned.algorithm, jax.tree.map(lambda x: x[seed], states), planned.env, planned.env_params


def restore(run_directory: str | Path) -> tuple[Settings[Any, Any], Plan, Any]:
    """What a run was asked to do, what that amounts to, and the states (S, ...) of its newest checkpoint. Raises
    RunError for a directory without one."""
    path = Path(run_directory)
    saves = path / "stages" / STAGE / "checkpoints"
    if not (path / "config.json").exists() or checkpoint.latest_step(saves) is None:
        raise RunError(f"{path} has no checkpoint of a training run: name the directory given by --out")
    settings = from_json(json.loads((path / "config.json").read_text())["config"])
    planned = plan(settings)
    like, _ = jax.eval_shape(lambda data: start(settings, planned, data), load_data(path))
    _, training = checkpoint.restore(saves, like)
    return settings, planned, training.states


def load_data(run_directory: str | Path) -> Trajectories | None:
    """What the offline algorithm of a run learns from; None where there is nothing of the kind."""
    path = Path(run_directory) / "stages" / DATA / "arrays.npz"
    if not path.exists():
        return None
    return Trajectories(**{name: jnp.asarray(x) for name, x in npz.read(path).items()})
