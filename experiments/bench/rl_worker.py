"""One process that compiles training runs and times them on request, in a peer's environment or in ours.

Requests and answers are lines of JSON: {"do": "compile", "with": {"run": a Run's fields}} gives `compile_seconds`,
{"do": "run", "with": {}} the `seconds` of training once more. It loads by name what is installed where it runs.

Command, as started by `experiments.bench.rl`: python -m experiments.bench.rl_worker ours|rejax|purejaxrl|brax
"""

import importlib
import json
import os
import queue
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from experiments.bench.rl_peers import FOLDER, Run

Once = Callable[[], float]


def rejax(run: Run) -> tuple[Once, float]:
    """Its own train function, without evaluations."""
    settings = run.settings | {"total_timesteps": run.steps, "eval_freq": run.steps}
    peer = importlib.import_module("rejax").get_algo(run.algorithm)
    agent = peer.create(env=run.env, skip_initial_evaluation=True, **settings)
    agent = agent.replace(eval_callback=lambda agent, state, key: ())
    return compiled(lambda key: agent.train(key)[0], run.seeds)


def purejaxrl(run: Run) -> tuple[Once, float]:
    """Its own train function, of whose metrics only sums are kept."""
    sys.path.insert(0, str(FOLDER / "purejaxrl" / "source" / "purejaxrl"))
    # Its wrappers import the grid worlds that only another of its files uses.
    sys.modules["navix"] = types.ModuleType("navix")
    peer = importlib.import_module(run.algorithm)
    train = peer.make_train(run.settings | {"TOTAL_TIMESTEPS": run.steps, "ENV_NAME": run.env})

    def reduced(key):
        out = train(key)
        info = out["metrics"]
        ended = info["returned_episode"]
        return (info["returned_episode_returns"] * ended).sum((1, 2)), ended.sum((1, 2)), out["runner_state"][0]

    return compiled(reduced, run.seeds)


def ours(run: Run) -> tuple[Once, float]:
    """Ours with the settings of the peer that the run names."""
    algorithm, hyper, _, env_params, updates = importlib.import_module("experiments.bench.rl_ours").agent(run)
    jax = importlib.import_module("jax")

    def train(key):
        state = algorithm.init(jax.random.wrap_key_data(key), hyper, env_params)
        return jax.lax.scan(lambda state, _: algorithm.update(state), state, length=updates)

    return compiled(train, run.seeds)


def compiled(train: Callable[[Any], Any], seeds: int) -> tuple[Once, float]:
    """Training of all seeds at once, mapped over if there are several, and the seconds that its compilation took."""
    jax = importlib.import_module("jax")
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    function, argument = (jax.vmap(train), keys) if seeds > 1 else (train, keys[0])
    begun = time.perf_counter()
    program = jax.jit(function).lower(argument).compile()
    seconds = time.perf_counter() - begun

    def once() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(program(argument))
        return time.perf_counter() - begun

    return once, seconds


def brax(run: Run, rounds: int = 100) -> tuple[Once, float]:
    """Its train function, whose rounds of `run.steps` wait to be asked for. It compiles in the first two."""
    train = importlib.import_module(f"brax.training.agents.{run.algorithm}.train").train
    networks = importlib.import_module("brax.training.agents.ppo.networks")
    flax, envs = importlib.import_module("flax.linen"), importlib.import_module("brax.envs")
    factory = partial(
        networks.make_ppo_networks,
        policy_hidden_layer_sizes=(64, 64),
        value_hidden_layer_sizes=(64, 64),
        activation=flax.tanh,
    )
    go, done = queue.Queue(), queue.Queue()

    def progress(steps: int, metrics: dict[str, Any]) -> None:
        done.put(None)
        go.get()

    def whole() -> None:
        try:
            train(
                environment=envs.get_environment(run.env, backend=run.backend),
                num_timesteps=run.steps * rounds,
                num_evals=rounds + 1,
                run_evals=False,
                network_factory=factory,
                progress_fn=progress,
                **run.settings,
            )
        except Exception as error:
            done.put(error)

    threading.Thread(target=whole, daemon=True).start()

    def once() -> float:
        begun = time.perf_counter()
        go.put(None)
        if (error := done.get()) is not None:
            raise error
        return time.perf_counter() - begun

    begun = time.perf_counter()
    if (error := done.get()) is not None:
        raise error
    once()
    seconds = time.perf_counter() - begun
    return once, seconds - 2 * once()


class Local:
    """Answers requests in this process; one compiled run at a time."""

    def __init__(self, family: str) -> None:
        self.prepare = {"ours": ours, "rejax": rejax, "purejaxrl": purejaxrl, "brax": brax}[family]
        self.once: Once | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; {"refused": reason} where there is none."""
        try:
            if request["do"] == "compile":
                self.once, seconds = self.prepare(replace(Run(**request["with"]["run"]), checkpoints=0))
                return {"compile_seconds": seconds}
            if self.once is None:
                raise ValueError("nothing is compiled")
            return {"seconds": self.once()}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return {"refused": f"{type(error).__name__}: {lines[0][:120]}"}

    def close(self) -> None:
        """Forget the run."""
        self.once = None


def serve(family: str) -> None:
    """Answer requests from standard input until it ends. What others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Local(family)
    for line in sys.stdin:
        print(json.dumps(worker.ask(json.loads(line))), file=answers)


if __name__ == "__main__":
    serve(*sys.argv[1:])
