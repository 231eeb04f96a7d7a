"""Every algorithm and preset makes a run, and every kind of environment a picture."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.report import Figure, Text
from experiments.runner import RunDirectory
from experiments.train_rl.algorithms import ALGORITHMS, NetworkOptions
from experiments.train_rl.presets import PRESETS, THRESHOLDS, TINY
from experiments.train_rl.results import episode
from experiments.train_rl.settings import from_json, parse, plan
from experiments.train_rl.training import make_chunk, start
from rl.envs.make import names
from rl.networks import CNN, MLP, Memory
from rl.offline import Trajectories

pytestmark = pytest.mark.usefixtures("quick_compile")

EXAMPLES = {"*": {"discrete": "Catch-bsuite", "continuous": "Reacher-misc"}, "MinAtar": "Breakout-MinAtar"}
EXAMPLES |= {"brax": "brax/inverted_pendulum"}


@pytest.fixture(scope="module", autouse=True)
def unchecked_keys():
    """JAX's check takes keys that a scan runs over, itself mapped over seeds, for used twice."""
    with jax.debug_key_reuse(False):
        yield


def flags(env: str, algo: str) -> list[str]:
    """Names of both, and of data where they are needed."""
    return ["--env", env, "--algo", algo, *(["--data", "elsewhere"] if ALGORITHMS[algo].offline else [])]


def test_the_tables_name_what_there_is():
    assert set(TINY) == set(ALGORITHMS)
    assert {algo for name, algo in PRESETS if name == "*"} == set(ALGORITHMS)
    assert set(THRESHOLDS) <= set(names())
    assert {name for name, _ in PRESETS} <= {*names(), *EXAMPLES}


@pytest.mark.parametrize(("name", "algo"), PRESETS, ids=lambda x: x)
def test_a_preset_makes_a_run_of_about_its_steps(name, algo):
    env = EXAMPLES.get(name, name)
    if isinstance(env, dict):
        env = env[ALGORITHMS[algo].actions[0]]
    settings = parse(flags(env, algo)).settings
    planned = plan(settings)
    given = PRESETS[name, algo]
    assert (settings.config, settings.hyper, settings.steps) == (given.config, given.hyper, given.steps)
    assert abs(planned.steps - settings.steps) <= 0.1 * settings.steps
    assert 2 / 3 <= planned.chunks / settings.evaluations <= 3 / 2
    assert from_json(settings.to_json()) == settings


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_gives_what_a_run_needs(algo):
    env = "CartPole-v1" if "discrete" in ALGORITHMS[algo].actions else "Pendulum-v1"
    settings = parse([*flags(env, algo), "--preset", "tiny"]).settings
    planned, offline = plan(settings), ALGORITHMS[algo].offline
    data = None
    if offline:
        mask_NL = jnp.ones((3, 7), bool)
        data = Trajectories(jnp.zeros((3, 7, 4)), jnp.zeros((3, 7), int), jnp.zeros((3, 7)), mask_NL, mask_NL[:, 0])
    state, untrained_S = jax.eval_shape(lambda data: start(settings, planned, data), data)
    after, metrics, bad_US = jax.eval_shape(make_chunk(settings, planned), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert untrained_S.shape == (2,)
    assert bad_US.shape == (planned.updates, 2)
    told = ("action_error",) if offline else ("episodes", "episode_return", "episode_length")
    for name in ("loss", "greedy_return", *told):
        assert metrics[name].shape == (1, 2), name


def test_flags_set_every_part():
    arguments = ["--algo", "dqn", "--config.batch", "7", "--hyper.discount", "0.5", "--hidden", "3", "5", "--dueling"]
    settings = parse([*arguments, "--network", "mlp", "--seed", "11"]).settings
    assert settings.config == replace(PRESETS["CartPole-v1", "dqn"].config, batch=7)
    assert settings.hyper == PRESETS["CartPole-v1", "dqn"].hyper._replace(discount=0.5)
    assert (settings.network.hidden, settings.network.dueling, settings.seed) == ((3, 5), True, 11)


def test_networks_go_by_observations_and_by_name():
    options = NetworkOptions(hidden=(3, 5))
    assert options.torso((4,), 20) == MLP((3, 5), "tanh")
    assert options.torso((10, 10, 4), 20) == CNN((16,), hidden=(3, 5), activation="tanh")
    memory = replace(options, network="attention", layers=2, width=8).torso((4,), 41)
    assert isinstance(memory, Memory)
    assert (memory.backbone.mixers, memory.backbone.width, memory.backbone.context) == (("attention",) * 2, 8, 41)
    # Attention takes no context of 16 or less.
    assert isinstance(replace(options, network="attention").torso((4,), 8), Memory)
    with pytest.raises(ValueError, match="--layers is 0, expected at least 1"):
        replace(options, network="rglru", layers=0).torso((4,), 20)


def of_one_seed(env: str, algo: str):
    """Settings, plan, and an untrained state of one seed."""
    settings = parse(["--env", env, "--algo", algo, "--preset", "tiny", "--max-steps", "11"]).settings
    planned = plan(settings)
    init = jax.jit(lambda: planned.algorithm.init(jax.random.key(3), planned.hyper, planned.env_params))
    return settings, planned, jax.tree.map(lambda x: x[None], init())


def test_a_grid_world_is_shown_with_its_task(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, resume=False)
    shown = episode(run, *of_one_seed("GridworldPinpad", "a2c"))
    assert isinstance(shown, Figure)
    with Image.open(shown.image) as gif:
        assert np.asarray(gif.convert("RGB")).std() > 10
        assert 1 <= gif.n_frames <= 12


def test_an_environment_without_a_picture_says_so(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, resume=False)
    shown = episode(run, *of_one_seed("SimpleBandit-bsuite", "dqn"))
    assert isinstance(shown, Text)
    assert shown.text.startswith("1 steps, return ")
    assert "there is no picture of" in shown.text
