"""Published reinforcement learning in JAX: how each peer is installed and called, and what it learned here.

Each peer runs in a virtual environment of its own below `.cache/bench/rl`, with the versions that it needs, one process
a run. The functions `train_*` run inside of it and load by name what is installed there. Hyperparameters are the peer's
own published ones for the environment, with the changes that are named in `RUNS`. Results go to `rl_peers.json`, after
each run; those that are there aren't repeated, unless they failed.

Command: python -m experiments.bench.rl_peers [--only TEXT] [--again] [--purejaxrl REPOSITORY]
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "bench" / "rl"
RESULTS = Path(__file__).with_suffix(".json")
PUREJAXRL = "https://github.com/luchris429/purejaxrl"
PUREJAXRL_COMMIT = "31756b197773a52db763fdbe6d635e4b46522a73"
REPORTED = ("jax", "gymnax", "rejax", "brax", "flax", "optax", "distrax", "mujoco", "numpy")
# jax 0.11 has lost what Brax's training calls, and jax 0.9 is the last for Python 3.11.
REQUIREMENTS = {
    "rejax": ("jax==0.11.2", "rejax==0.1.3", "gymnax==0.0.9", "brax==0.14.2", "mujoco<5", "six"),
    "purejaxrl": ("jax==0.11.2", "gymnax==0.0.9", "distrax", "flax", "optax", "brax==0.14.2", "mujoco<5", "six"),
    "brax": ("jax==0.9.2", "brax==0.14.2", "mujoco<5"),
}
PYTHON = {"brax": "python3.11"}

# fmt: off
# purejaxrl: the settings at the end of ppo.py, ppo_rnn.py and ppo_continuous_action.py, and those for MinAtar of
# examples/brax_minatar.ipynb.
PURE_PPO = {
    "LR": 2.5e-4, "NUM_ENVS": 4, "NUM_STEPS": 128, "UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh",
    "ANNEAL_LR": True, "DEBUG": False,
}
PURE_MINATAR = PURE_PPO | {"LR": 5e-3, "NUM_ENVS": 64, "NUM_MINIBATCHES": 8, "ACTIVATION": "relu"}
PURE_BRAX = PURE_PPO | {
    "LR": 3e-4, "NUM_ENVS": 128, "NUM_STEPS": 10, "NUM_MINIBATCHES": 2, "ENT_COEF": 0.0, "ANNEAL_LR": False,
    "NORMALIZE_ENV": True,
}
# rejax: configs/gymnax/*.yaml, configs/brax/*.yaml and benchmark/breakout_1m.yaml.
REJAX_PPO = {
    "agent_kwargs": {"activation": "tanh"}, "num_envs": 5, "num_steps": 100, "num_epochs": 5, "num_minibatches": 5,
    "learning_rate": 0.00075, "max_grad_norm": 0.5, "gamma": 0.99, "gae_lambda": 0.95, "clip_eps": 0.2,
    "ent_coef": 0.01, "vf_coef": 0.5,
}
REJAX_ACROBOT = REJAX_PPO | {"normalize_observations": True}
REJAX_MOUNTAINCAR = REJAX_PPO | {
    "num_envs": 10, "num_steps": 20, "learning_rate": 2.5e-4, "gae_lambda": 0.98, "ent_coef": 0.0,
}
REJAX_BREAKOUT = REJAX_PPO | {
    "num_envs": 32, "num_steps": 32, "num_epochs": 4, "num_minibatches": 4, "learning_rate": 0.00025674088686342003,
    "max_grad_norm": 1, "gamma": 0.995,
}
REJAX_ANT = REJAX_PPO | {
    "num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16, "learning_rate": 0.00010838581269344756,
    "gamma": 0.98, "gae_lambda": 0.8, "normalize_observations": True,
}
REJAX_HALFCHEETAH = REJAX_PPO | {
    "num_envs": 32, "num_steps": 32, "num_epochs": 2, "num_minibatches": 2, "learning_rate": 0.0017203361125365498,
    "max_grad_norm": 5, "gae_lambda": 0.8, "normalize_observations": True,
}
REJAX_DQN = {
    "agent": "DuelingQNetwork", "agent_kwargs": {"activation": "swish"}, "num_envs": 10, "buffer_size": 50_000,
    "fill_buffer": 5_000, "batch_size": 100, "max_grad_norm": 10, "learning_rate": 0.001, "num_epochs": 5,
    "polyak": 0.98, "eps_start": 1, "eps_end": 0.05, "exploration_fraction": 0.5, "gamma": 0.99, "ddqn": True,
    "normalize_observations": False,
}
REJAX_SAC = {
    "agent_kwargs": {"activation": "swish"}, "num_envs": 1, "buffer_size": 10_000, "fill_buffer": 256,
    "batch_size": 256, "learning_rate": 0.01, "num_epochs": 1, "gamma": 0.99, "polyak": 0.98,
    "target_entropy_ratio": None, "normalize_observations": True,
}
# Brax: notebooks/training.ipynb, whose ant has 4096 environments and batches of 2048, and its halfcheetah 2048 and 512.
BRAX_PPO = {
    "episode_length": 1000, "normalize_observations": True, "action_repeat": 1, "learning_rate": 3e-4,
    "num_minibatches": 32,
}
BRAX_ANT = BRAX_PPO | {
    "reward_scaling": 10, "unroll_length": 5, "num_updates_per_batch": 4, "discounting": 0.97, "entropy_cost": 1e-2,
    "num_envs": 256, "batch_size": 128,
}
BRAX_HALFCHEETAH = BRAX_PPO | {
    "reward_scaling": 1, "unroll_length": 20, "num_updates_per_batch": 8, "discounting": 0.95, "entropy_cost": 0.001,
    "num_envs": 128, "batch_size": 32,
}
# fmt: on


@dataclass(frozen=True)
class Run:
    """Training of `seeds` agents. `checkpoints` is how often returns are reported; 0 trains without evaluation.

    `backend` is Brax's physics. `repeats` times the compiled program again (not for Brax). `note` says how the settings
    differ from the published ones.
    """

    peer: str
    algorithm: str
    env: str
    steps: int
    seeds: int
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoints: int = 10
    backend: str = ""
    repeats: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        if self.peer not in REQUIREMENTS:
            raise ValueError(f"Run: peer is {self.peer!r}, expected one of {', '.join(REQUIREMENTS)}")
        for name, least in (("steps", 1), ("seeds", 1), ("repeats", 1), ("checkpoints", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Run: {name} is {getattr(self, name)}, expected at least {least}")

    @property
    def name(self) -> str:
        """The name under which its result is kept."""
        backend = f" {self.backend}" if self.backend else ""
        return f"{self.peer} {self.algorithm} {self.env}{backend} {self.steps} steps {self.seeds} seeds"


_OF_CARTPOLE = "none published for this environment: those of CartPole-v1"
_SHORT = "published for 5242880 steps"
_SIXTEENTH = "num_envs and batch_size are a sixteenth of the published ones"
# fmt: off
RUNS = (
    Run("rejax", "ppo", "CartPole-v1", 500_000, 5, REJAX_PPO, note="published for 100000 steps"),
    Run("purejaxrl", "ppo", "CartPole-v1", 500_000, 5, PURE_PPO),
    Run("rejax", "ppo", "Acrobot-v1", 500_000, 5, REJAX_ACROBOT, note="published for 100000 steps"),
    Run("purejaxrl", "ppo", "Acrobot-v1", 500_000, 5, PURE_PPO, note=_OF_CARTPOLE),
    Run("rejax", "ppo", "MountainCar-v0", 500_000, 5, REJAX_MOUNTAINCAR, note="published as not solved"),
    Run("purejaxrl", "ppo", "MountainCar-v0", 500_000, 5, PURE_PPO, note=_OF_CARTPOLE),
    Run("rejax", "ppo", "FourRooms-misc", 500_000, 32, checkpoints=5, note="none published: the defaults of its class"),
    Run("purejaxrl", "ppo", "FourRooms-misc", 500_000, 5, PURE_PPO, note=_OF_CARTPOLE),
    Run("purejaxrl", "ppo", "Breakout-MinAtar", 1_000_000, 8, PURE_MINATAR, note="published for 10000000 steps"),
    Run("rejax", "ppo", "Breakout-MinAtar", 1_000_000, 3, REJAX_BREAKOUT, 5),
    Run("purejaxrl", "ppo_rnn", "MemoryChain-bsuite", 250_000, 3, PURE_PPO, note=_OF_CARTPOLE),
    Run("purejaxrl", "ppo_rnn", "MetaMaze-misc", 500_000, 3, PURE_PPO, note=_OF_CARTPOLE),
    Run("rejax", "dqn", "CartPole-v1", 100_000, 32, REJAX_DQN, 5),
    Run("rejax", "sac", "Pendulum-v1", 20_000, 3, REJAX_SAC, 5, note="published for 10000 steps"),
    Run("brax", "ppo", "ant", 1_024_000, 2, BRAX_ANT, 5, "spring", note=_SIXTEENTH),
    Run("brax", "ppo", "halfcheetah", 1_024_000, 2, BRAX_HALFCHEETAH, 5, "spring", note=_SIXTEENTH),
    Run("purejaxrl", "ppo", "MemoryChain-bsuite", 250_000, 3, PURE_PPO, note=_OF_CARTPOLE),
    Run("purejaxrl", "ppo", "MetaMaze-misc", 500_000, 3, PURE_PPO, note=_OF_CARTPOLE),
    Run("brax", "ppo", "ant", 1_024_000, 2, BRAX_ANT, 5, "mjx", note=_SIXTEENTH),
    Run("brax", "ppo", "halfcheetah", 1_024_000, 2, BRAX_HALFCHEETAH, 5, "mjx", note=_SIXTEENTH),
    Run("purejaxrl", "ppo_continuous_action", "ant", 1_024_000, 2, PURE_BRAX, 5, "spring",
        note="published for hopper, positional, 50000000 steps, and 16 times the environments and minibatches"),
    Run("purejaxrl", "ppo_continuous_action", "halfcheetah", 1_024_000, 2, PURE_BRAX, 5, "spring",
        note="published for hopper, positional, 50000000 steps, and 16 times the environments and minibatches"),
    Run("rejax", "ppo", "brax/ant", 1_024_000, 2, REJAX_ANT, 2, "spring", note=_SHORT),
    Run("rejax", "ppo", "brax/halfcheetah", 1_024_000, 2, REJAX_HALFCHEETAH, 2, "spring", note=_SHORT),
)
# fmt: on


def find(peer: str, algorithm: str, env: str, backend: str = "") -> Run:
    """The run above with these names, to train as it is or after `dataclasses.replace`."""
    found = [run for run in RUNS if (run.peer, run.algorithm, run.env, run.backend) == (peer, algorithm, env, backend)]
    if not found:
        raise ValueError(f"find: no run of {peer} {algorithm} {env} {backend}; there are {[run.name for run in RUNS]}")
    return found[0]


def _compiled(train, seeds: int, repeats: int) -> tuple[Any, dict[str, Any]]:
    """The results of `train` for keys of all seeds at once, and its times."""
    jax = importlib.import_module("jax")
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    begun = time.perf_counter()
    program = jax.jit(jax.vmap(train)).lower(keys).compile()
    compiled = time.perf_counter() - begun
    results, seconds, work = None, [], []
    for _ in range(repeats):
        begun, begun_work = time.perf_counter(), time.process_time()
        results = jax.block_until_ready(program(keys))
        seconds.append(time.perf_counter() - begun)
        work.append(time.process_time() - begun_work)
    return results, {"compile_seconds": compiled, "run_seconds": seconds, "cpu_seconds": work}


def train_rejax(run: Run) -> dict[str, Any]:
    """rejax. Returns are means over 128 fresh episodes of the sampling policy, and part of what is timed."""
    np, rejax = importlib.import_module("numpy"), importlib.import_module("rejax")
    pieces = max(run.checkpoints, 1)
    settings = run.settings | {"total_timesteps": run.steps, "eval_freq": run.steps // pieces}
    if run.backend:
        settings["env_params"] = {"backend": run.backend}
    agent = rejax.get_algo(run.algorithm).create(env=run.env, skip_initial_evaluation=True, **settings)
    if not run.checkpoints:
        agent = agent.replace(eval_callback=lambda agent, state, key: ())
    # Both loops of a peer's `train` round up.
    step = agent.num_envs * (agent.num_steps if run.algorithm == "ppo" else 1)
    every = -(-agent.eval_freq // step) * step
    evaluations = -(-run.steps // agent.eval_freq)
    (state, reported), times = _compiled(agent.train, run.seeds, run.repeats)
    done = int(state.global_step[0])
    if done != every * evaluations:
        raise RuntimeError(f"rejax took {done} steps, expected {every * evaluations}")
    returns = np.asarray(reported[1], np.float64).mean(-1).tolist() if run.checkpoints else []
    at = [every * (piece + 1) for piece in range(evaluations)] if run.checkpoints else []
    return times | {"steps_taken": done, "checkpoint_steps": at, "returns": returns}


def train_purejaxrl(run: Run) -> dict[str, Any]:
    """purejaxrl. Returns are means over the training episodes that ended since the last checkpoint."""
    np, jnp = importlib.import_module("numpy"), importlib.import_module("jax.numpy")
    sys.path.insert(0, str(FOLDER / "purejaxrl" / "source" / "purejaxrl"))
    # Its wrappers import the grid worlds that only another of its files uses.
    sys.modules["navix"] = types.ModuleType("navix")
    peer = importlib.import_module(run.algorithm)
    linen = importlib.import_module("flax.linen")

    class GRUCell:
        """As an older flax had it, with the hidden size that ppo_rnn.py uses."""

        def __new__(cls):
            return linen.GRUCell(features=128)

        @staticmethod
        def initialize_carry(key, batch, size):
            return jnp.zeros((*batch, size))

    vars(peer)["nn"] = types.SimpleNamespace(**vars(linen) | {"GRUCell": GRUCell})
    if run.backend:
        vars(peer)["BraxGymnaxWrapper"] = partial(vars(peer)["BraxGymnaxWrapper"], backend=run.backend)
    config = run.settings | {"TOTAL_TIMESTEPS": run.steps, "ENV_NAME": run.env}
    train = peer.make_train(config)

    def reduced(key):
        out = train(key)
        info = out["metrics" if "metrics" in out else "metric"]
        ended_UTE = info["returned_episode"]
        sum_U = jnp.sum(info["returned_episode_returns"] * ended_UTE, axis=(1, 2))
        return sum_U, ended_UTE.sum((1, 2)), out["runner_state"][0].params

    (sum_SU, count_SU, _), times = _compiled(reduced, run.seeds, run.repeats)
    edges = np.linspace(0, sum_SU.shape[1], run.checkpoints + 1).round().astype(int)
    returns = []
    for sum_U, count_U in zip(np.asarray(sum_SU, np.float64), np.asarray(count_SU), strict=True):
        pieces = [slice(first, last) for first, last in itertools.pairwise(edges)]
        counts = [int(count_U[piece].sum()) for piece in pieces]
        returns.append([sum_U[piece].sum() / n if n else None for piece, n in zip(pieces, counts, strict=True)])
    update = config["NUM_ENVS"] * config["NUM_STEPS"]
    steps = {"steps_taken": int(sum_SU.shape[1]) * update, "checkpoint_steps": (edges[1:] * update).tolist()}
    return times | steps | {"returns": returns if run.checkpoints else []}


def train_brax(run: Run) -> dict[str, Any]:
    """Brax's own PPO, seed after seed. Returns are means over 32 fresh episodes of the sampling policy; not timed.

    It compiles on its first rounds of training. Each of the two is taken to have run as long as the mean of the others.
    """
    jax, envs = importlib.import_module("jax"), importlib.import_module("brax.envs")
    train = importlib.import_module(f"brax.training.agents.{run.algorithm}.train").train
    if run.checkpoints in (1, 2):
        raise ValueError(
            f"train_brax: checkpoints is {run.checkpoints}, expected 0 or at least 3: the first two compile"
        )
    # Without evaluation there is no report before training either.
    evaluation = {"num_evals": run.checkpoints + 1} if run.checkpoints else {"num_evals": 5, "run_evals": False}
    returns, at, compiled, seconds = [], [], [], []
    cache = tempfile.mkdtemp()  # so that the second seed needn't compile again
    jax.config.update("jax_compilation_cache_dir", cache)
    for seed in range(run.seeds):
        reports: list[tuple[int, dict[str, Any]]] = []
        train(
            environment=envs.get_environment(run.env, backend=run.backend),
            num_timesteps=run.steps,
            num_eval_envs=32,
            **evaluation,
            seed=seed,
            progress_fn=lambda steps, metrics, reports=reports: reports.append((int(steps), dict(metrics))),
            **run.settings,
        )
        reports = reports[1 if run.checkpoints else 0 :]
        at = [steps for steps, _ in reports]
        if run.checkpoints:
            returns.append([float(metrics["eval/episode_reward"]) for _, metrics in reports])
        rounds = [at[0] / float(metrics["training/sps"]) for _, metrics in reports]
        typical = sum(rounds[2:]) / (len(rounds) - 2)
        compiled.append(max(sum(rounds[:2]) - 2 * typical, 0.0))
        seconds.append(typical * len(rounds))
    shutil.rmtree(cache)
    times = {"compile_seconds": compiled[0], "run_seconds": [sum(seconds)]}
    return times | {"steps_taken": at[-1], "checkpoint_steps": at if run.checkpoints else [], "returns": returns}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def answer(run: Run) -> dict[str, Any]:
    """Train in this process, which has the peer's environment. Times are in seconds; `returns` has a row a seed."""
    loads = [os.getloadavg()[0]]
    result = {"rejax": train_rejax, "purejaxrl": train_purejaxrl, "brax": train_brax}[run.peer](run)
    loads.append(os.getloadavg()[0])
    versions = {name: _version(name) for name in REPORTED if _version(name)}
    if run.peer == "purejaxrl":
        versions["purejaxrl"] = PUREJAXRL_COMMIT
    steps = result["steps_taken"] * run.seeds
    speed = {"steps_per_second": [steps / each for each in result["run_seconds"]], "load_averages": loads}
    result = result | speed | {"versions": {"python": sys.version.split()[0]} | versions}
    return json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 3))


def environment(peer: str, purejaxrl: str = PUREJAXRL) -> Path:
    """The interpreter of a peer's environment, which is made if it isn't there. `purejaxrl`: where to clone it from.

    Raises:
        RuntimeError: it can't be installed, with the last words of the step that failed.
    """
    place = FOLDER / peer
    python, done = place / "bin" / "python", place / "installed"
    if done.exists():
        return python
    steps = [
        [PYTHON.get(peer, sys.executable), "-m", "venv", str(place)],
        [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *REQUIREMENTS[peer]],
    ]
    if peer == "purejaxrl":
        source = str(place / "source")
        steps += [["rm", "-rf", source], ["git", "clone", "--quiet", purejaxrl, source]]
        steps += [["git", "-C", source, "checkout", "--quiet", PUREJAXRL_COMMIT]]
    for step in steps:
        process = subprocess.run(step, capture_output=True, text=True, check=False)
        if process.returncode:
            last = (process.stderr.strip() or process.stdout.strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"{peer} is not installed: {last}")
    done.touch()
    return python


def ask(run: Run, patience: float = 1200, purejaxrl: str = PUREJAXRL) -> dict[str, Any]:
    """The answer of a process in the peer's environment; {"failed": reason} if there is none in `patience` seconds."""
    quiet = {"PYTHONWARNINGS": "ignore", "JAX_TRACEBACK_FILTERING": "off"}  # so that the error is the last line
    variables = os.environ | quiet | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    try:
        python = environment(run.peer, purejaxrl)
        command = [str(python), "-m", "experiments.bench.rl_peers", "--answer", json.dumps(asdict(run))]
        options = {"capture_output": True, "text": True, "check": False, "timeout": patience}
        process = subprocess.run(command, cwd=ROOT, env=variables, **options)
    except RuntimeError as error:
        return {"failed": str(error)}
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {patience:.0f} s"}
    if process.returncode:
        return {"failed": (process.stderr.strip() or "no message").splitlines()[-1][:300]}
    return json.loads(process.stdout.splitlines()[-1])


def record(run: Run, result: dict[str, Any]) -> None:
    """Put a result into the file, which is whole at every moment."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    made = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m experiments.bench.rl_peers --only {run.name!r}",
    }
    kept[run.name] = asdict(run) | made | result
    text = json.dumps(kept, indent=1)
    # A list of numbers is one line.
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    beside = RESULTS.with_suffix(".json.new")
    beside.write_text(text + "\n")
    beside.replace(RESULTS)


def main() -> None:
    """Run what is asked for and not yet recorded."""
    parser = argparse.ArgumentParser(description="Train published reinforcement learning in JAX.")
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--again", action="store_true", help="also those that are recorded")
    parser.add_argument("--patience", type=float, default=1200, help="seconds that a run may take")
    parser.add_argument("--purejaxrl", default=PUREJAXRL, help="the repository to clone purejaxrl from")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a peer prints isn't the answer
        print(json.dumps(answer(Run(**json.loads(options.answer)))), file=answers, flush=True)
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for run in RUNS:
        done = run.name in kept and "failed" not in kept[run.name]
        if options.only not in run.name or (done and not options.again):
            continue
        result = ask(run, options.patience, options.purejaxrl)
        record(run, result)
        if "failed" in result:
            print(f"{run.name}: failed: {result['failed']}", flush=True)
            continue
        last = [row[-1] for row in result["returns"]]
        speed = max(result["steps_per_second"])
        print(
            f"{run.name}: returns {last}, {speed:.0f} steps/s, compiled in {result['compile_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
