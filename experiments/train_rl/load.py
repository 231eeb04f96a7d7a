"""What a run has learned, for use in Python."""

import json
from pathlib import Path
from typing import Any

import jax

from experiments.run_directory import RunError
from experiments.train_rl.settings import from_json, plan
from experiments.train_rl.training import STAGE, start
from rl.algorithm import Algorithm
from seqmod import checkpoint


def load(run_directory: str | Path, *, seed: int = 0) -> tuple[Algorithm, Any, Any, Any]:
    """The policy in a run directory: `(algorithm, state, env, env_params)`.

    The state is that of the newest checkpoint, for one of the run's seeds, counted from 0; the run need not be
    finished. `rl.algorithm.evaluate` plays episodes with it, and its updates can be gone on with. Raises RunError for a
    directory without a checkpoint and ValueError for a seed that the run does not have.
    """
    path = Path(run_directory)
    saves = path / "stages" / STAGE / "checkpoints"
    if not (path / "config.json").exists() or checkpoint.latest_step(saves) is None:
        raise RunError(f"{path} has no checkpoint of a training run: name the directory given by --out")
    settings = from_json(json.loads((path / "config.json").read_text())["config"])
    if not 0 <= seed < settings.seeds:
        raise ValueError(f"load: seed is {seed}, expected 0..{settings.seeds - 1}")
    planned = plan(settings)
    like, _ = jax.eval_shape(lambda: start(settings, planned))
    _, training = checkpoint.restore(saves, like)
    state = jax.tree.map(lambda x: x[seed], training.states)
    return planned.algorithm, state, planned.env, planned.env_params
