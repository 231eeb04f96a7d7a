"""Training spread over eight simulated devices, against the same on one.

Each case is a process of its own (`on_devices.py`), as the number of devices is fixed when JAX starts.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from rl.devices import by_environment
from rl.normalise import reward_scale
from rl.vector import Envs

HERE = Path(__file__).parent
TOLERANCE = 1e-3
"""Of parameters. Devices add up gradients in another order, which changes them by about 1e-7. Adam divides by at least
1e-5, so a step at a learning rate of 1e-2 may differ by 1e-4 where a gradient is nearly zero, and there are 12 steps. A
step in a wrong direction would be 1e-2."""


@cache
def facts(*arguments: str) -> dict:
    """What `on_devices.py` finds on eight devices."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "NPROC": "32", "PYTHONPATH": str(HERE.parents[1])}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # as `quick_compile`
    command = [sys.executable, HERE / "on_devices.py", arguments[0], "/dev/stdout", *arguments[1:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TORSOS = [pytest.param("mlp"), pytest.param("memory", marks=pytest.mark.slow)]


@pytest.mark.parametrize("torso", TORSOS)
def test_environments_over_devices_train_as_on_one(torso):
    found = facts(torso)
    assert found["devices"] == 8
    assert found["distance"] < TOLERANCE
    assert found["moved"] > 0.03


@pytest.mark.parametrize("torso", TORSOS)
def test_environments_stay_spread_and_nothing_else_is(torso):
    found = facts(torso)
    assert found["after"] == found["before"]
    environments = {"envs.obs", "envs.first_E", "envs.return_E", "envs.length_E", "rewards.return_E"}
    spread = {name for name, parts in found["before"].items() if parts == 8}
    assert environments < spread
    assert {name.split(".")[0] for name in spread - environments} == (
        {"envs", "memory"} if torso == "memory" else {"envs"}
    )
    assert all(found["before"][name] == 1 for name in found["before"].keys() - spread)


@pytest.mark.parametrize("torso", TORSOS)
def test_devices_exchange_gradients_and_no_rollouts(torso):
    found = facts(torso)
    assert {name for name, _ in found["collectives"]} == {"all-reduce"}
    # Beside the gradients, in one or more parts, there are only means and counts.
    sizes = [size for _, size in found["collectives"]]
    assert found["parameters"] <= sum(sizes) < found["parameters"] + 50


@pytest.mark.slow
def test_seeds_over_devices_train_as_on_one_without_a_word():
    found = facts("seeds")
    assert found["distance"] < TOLERANCE
    assert found["losses"] < 1e-5
    assert found["seeds differ"] > 0.03
    assert set(found["parts"].values()) == {8}
    assert found["collectives"] == []


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_devices(tmp_path):
    found = facts("checkpoints", str(tmp_path))
    assert found["exact"]
    assert found["leaves"] > 40
    assert found["moved"] > 0.01
    assert found["to one"] < TOLERANCE
    assert found["to many"] < TOLERANCE
    assert found["placed"]
    assert found["on one"] == [1]


def state(environments: int) -> dict:
    zeros_E = jnp.zeros(environments)
    envs = Envs({"x": jnp.zeros((environments, 3))}, zeros_E, zeros_E > 0, zeros_E, zeros_E)
    return {"envs": envs, "rewards": reward_scale(environments), "params": {"envs": jnp.zeros((environments, 2))}}


def test_what_cannot_be_spread_is_named():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    with pytest.raises(ValueError, match=r"envs\.state\.x has shape \(5, 3\), which is not divisible by 2 devices"):
        by_environment(state(5), mesh)
    with pytest.raises(ValueError, match=r"no arrays in \['env_params'\]"):
        by_environment(state(4), mesh, also=("env_params",))
    with pytest.raises(ValueError, match=r"no arrays in \['envs'\]"):
        by_environment({"params": jnp.zeros(4)}, mesh)


def test_fields_are_told_by_name_and_not_by_size():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    made = state(4) | {"tasks": {"goal": jnp.zeros(4)}, "envs_seen": jnp.zeros(4)}
    spread = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, sharding in jax.tree.leaves_with_path(by_environment(made, mesh, also=("tasks",)))
        if not sharding.is_fully_replicated
    }
    fields = ("state.x", "obs", "first_E", "return_E", "length_E")
    assert spread == {*(f"envs.{field}" for field in fields), "rewards.return_E", "tasks.goal"}
