"""PPO on simulated devices, in processes that tests start, with environment variables that say how many.

    python on_devices.py mlp|memory FILE                     environments spread over all devices
    python on_devices.py seeds FILE
    python on_devices.py checkpoints FILE FOLDER
    python on_devices.py process FILE ADDRESS PROCESS_ID     over the devices of two processes that meet at ADDRESS

What was found is written to FILE, as JSON.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl import devices, ppo
from rl.algorithm import Algorithm
from rl.networks import MLP, Memory, actor_critic
from seqmod import checkpoint
from seqmod.config import BackboneConfig

ENVIRONMENTS, STEPS = 16, 5
HYPER = ppo.PPOHyper(learning_rate=1e-2)
TORSOS = {
    "mlp": MLP((16,)),  # as wide as there are environments: its width must not be taken for them
    "memory": Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=16, mlp=6), MLP((5,), "relu")),
}


def environment() -> Any:
    # Not above: gymnax computes while it is imported, which must not be before processes have met.
    from rl.envs.probe import PROBES

    return next(p.env for p in PROBES if p.name.startswith("policy") and not p.env.continuous)


def build(torso: str, shards: int = 8) -> Algorithm:
    env = environment()
    network = actor_critic((1,), env.action_space(env.default_params), TORSOS[torso])
    config = ppo.PPOConfig(
        environments=ENVIRONMENTS,
        steps=STEPS,
        updates=8,
        epochs=2,
        minibatches=2,
        normalise_observations=True,
        normalise_rewards=True,
        shards=shards,
    )
    return ppo.make(config, env, network)


def start(algorithm: Algorithm, seed: int = 0) -> tuple[Any, ...]:
    return jax.random.key(seed), HYPER, jax.tree.map(jnp.asarray, environment().default_params)


def train(update: Any, state: Any, updates: int) -> Any:
    for _ in range(updates):
        state, _ = update(state)
    return state


def alone(algorithm: Algorithm, updates: int) -> Any:
    return train(jax.jit(algorithm.update), jax.jit(algorithm.init)(*start(algorithm)), updates)


def spread(algorithm: Algorithm) -> tuple[Any, Any, Any]:
    """(state before any update, shardings, compiled update) over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    shardings = devices.by_environment(jax.eval_shape(algorithm.init, *start(algorithm)), mesh)
    state = jax.jit(algorithm.init, out_shardings=shardings)(*start(algorithm))
    return state, shardings, jax.jit(algorithm.update, out_shardings=(shardings, None)).lower(state).compile()


def numbers(tree: Any) -> np.ndarray:
    """All parameters, in a row."""
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def distance(a: Any, b: Any) -> float:
    return float(np.abs(numbers(a.params) - numbers(b.params)).max())


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Name of each, and the number of elements that it gives."""
    found = []
    pattern = r"= (\([^=]*?\)|\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    for shapes, name in re.findall(pattern, re.sub(r"/\*.*?\*/", "", compiled.as_text())):
        sizes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((name, sum(int(np.prod(size)) for size in sizes)))
    return found


def placed(state: Any) -> dict[str, int]:
    """For each leaf the number of different parts that devices hold of it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): len(
            {str(index) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def environments(torso: str) -> dict[str, Any]:
    algorithm = build(torso)
    state, _, update = spread(algorithm)
    end = train(update, state, 3)
    return {
        "devices": jax.device_count(),
        "distance": distance(end, alone(algorithm, 3)),
        "moved": distance(end, state),
        "parameters": numbers(state.params).size,
        "before": placed(state),
        "after": placed(end),
        "collectives": collectives(update),
    }


def seeds() -> dict[str, Any]:
    algorithm, count = build("mlp", shards=1), 2 * jax.device_count()

    def run(key: jax.Array) -> Any:
        state = algorithm.init(key, *start(algorithm)[1:])
        return jax.lax.scan(lambda state, _: algorithm.update(state), state, length=3)

    keys_S = jax.random.split(jax.random.key(0), count)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    compiled = jax.jit(devices.over_seeds(run, mesh)).lower(keys_S).compile()
    states, metrics = compiled(keys_S)
    same, same_metrics = jax.jit(jax.vmap(run))(keys_S)
    return {
        "distance": distance(states, same),
        "losses": float(np.abs(np.asarray(metrics["loss"]) - np.asarray(same_metrics["loss"])).max()),
        "seeds differ": float(np.ptp(np.asarray(states.params["policy"]["kernel"]), axis=0).max()),
        "parts": placed(states),
        "collectives": collectives(compiled),
    }


def checkpoints(folder: Path) -> dict[str, Any]:
    """After two updates, over to another number of devices, and two more."""
    algorithm = build("mlp")
    begin, shardings, update = spread(algorithm)
    single = jax.jit(algorithm.update)
    one = jax.jit(algorithm.init)(*start(algorithm))
    saved = {"many": train(update, begin, 2), "one": train(single, one, 2)}
    for name, state in saved.items():
        checkpoint.save(folder / name, 2, state)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), begin, shardings)
    _, to_one = checkpoint.restore(folder / "many", jax.eval_shape(lambda: one))
    _, to_many = checkpoint.restore(folder / "one", like)
    uninterrupted = train(single, saved["one"], 2)
    exact = [
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(*(jax.tree.leaves(without_keys(t)) for t in (to_one, saved["many"])), strict=True)
    ]
    return {
        "exact": all(exact),
        "leaves": len(exact),
        "to one": distance(train(single, to_one, 2), uninterrupted),
        "to many": distance(train(update, to_many, 2), uninterrupted),
        "moved": distance(uninterrupted, saved["one"]),
        "placed": placed(to_many) == placed(begin),
        "on one": sorted(set(placed(to_one).values())),
    }


def without_keys(state: Any) -> Any:
    return state._replace(key=jax.random.key_data(state.key))


def process(address: str, index: int) -> dict[str, Any]:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=index, initialization_timeout=300)
    state, _, update = spread(build("mlp"))
    end, metrics = update(train(update, state, 2))
    return {
        "devices": jax.device_count(),
        "here": jax.local_device_count(),
        "rows here": sum(part.data.shape[0] for part in end.envs.obs.addressable_shards),
        "params": numbers(end.params).tolist(),
        "loss": float(metrics["loss"]),
    }


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    task, file, *rest = sys.argv[1:]
    match task:
        case "seeds":
            facts = seeds()
        case "checkpoints":
            facts = checkpoints(Path(rest[0]))
        case "process":
            facts = process(rest[0], int(rest[1]))
        case torso:
            facts = environments(torso)
    Path(file).write_text(json.dumps(facts))
