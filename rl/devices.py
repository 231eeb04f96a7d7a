"""Training over several devices, of one process or many: environments or seeds are spread over a mesh's axis "data".

An algorithm's update knows nothing of devices. Where the arrays of its state lie decides where it runs, the compiler
adds what devices must tell each other, and results are those of one device, to rounding.

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    shardings = by_environment(jax.eval_shape(algorithm.init, key, hyper, env_params), mesh)
    init = jax.jit(algorithm.init, out_shardings=shardings)
    update = jax.jit(algorithm.update, out_shardings=(shardings, None))
    state, metrics = update(init(key, hyper, env_params))

`out_shardings` keeps the state where it is; without it, that is the compiler's choice. Every device has the parameters,
steps its own environments and computes gradients of what they saw, which are summed over devices. For that a minibatch
must take equally from the environments of every device: in PPO, `shards` is a multiple of the number of devices.
Without, every device receives all data and learns from all of it, which is right but no faster. `resets` below the
number of environments makes devices wait for each other in every step.

Seeds need not talk. Each device trains its part of them, with `train` or with one update of many states:

    states, metrics = jax.jit(over_seeds(train, mesh))(jax.random.split(key, seeds))

Several hosts run the same program, which begins with

    jax.distributed.initialize(coordinator_address="host0:1234", num_processes=n, process_id=i)

without arguments under Slurm, Open MPI and on Cloud TPUs, and before it imports gymnax or Brax, which compute as they
are imported. CPUs need `jax.config.update("jax_cpu_collectives_implementation", "gloo")` before it. `jax.devices()` are
then those of all hosts, and the lines above train over them. Parameters and metrics are whole on every host and can be
read (`jax.device_get`), the environments cannot; `seqmod.checkpoint` is for runs of one process.

A checkpoint made with some number of devices is gone on with by another; restored arrays lie where `like` says:

    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    step, state = checkpoint.restore(directory, like)
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ENVIRONMENTS = ("envs", "memory", "rewards.return_E")
"""The fields of an algorithm's state whose leaves have a leading axis of environments: those of `rl.vector.Envs`, of a
network's memory, and the returns by which rewards are scaled."""


def by_environment(state: Any, mesh: Mesh, *, also: tuple[str, ...] = ()) -> Any:
    """Shardings of a state's leaves (arrays or shapes): the fields `ENVIRONMENTS` and `also` are spread over the axis
    "data" of the mesh, all others are on every device.

    `also`: further fields whose leaves have a leading axis of environments, as `env_params` has with `params_per_env`.
    Raises ValueError for a leaf that cannot be spread evenly, a field in `also` that is not there, and a state without
    environments.
    """
    parts, found = mesh.shape["data"], set()

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        inside = {field for field in (*ENVIRONMENTS, *also) if f"{name}.".startswith(f"{field}.")}
        found.update(inside)
        if inside and (not leaf.shape or leaf.shape[0] % parts):
            raise ValueError(
                f"by_environment: {name} has shape {leaf.shape}, which is not divisible by {parts} devices"
            )
        return NamedSharding(_auto(mesh), PartitionSpec("data") if inside else PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    if missing := {"envs", *also} - found:
        raise ValueError(f"by_environment: there are no arrays in {sorted(missing)} of a {type(state).__name__}")
    return shardings


def over_seeds(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`jax.vmap(function)`, each device of the mesh's axis "data" computing its part; to be compiled. Arguments and
    results have a leading axis of seeds, divisible by the devices."""
    spec = PartitionSpec("data")
    # Unchecked, because loops begin with constants, which do not count as different on each device.
    return jax.shard_map(jax.vmap(function), mesh=_auto(mesh), in_specs=spec, out_specs=spec, check_vma=False)


def _auto(mesh: Mesh) -> Mesh:
    """Without explicit axis types: where arrays lie is then no part of their types."""
    return Mesh(mesh.devices, mesh.axis_names)
