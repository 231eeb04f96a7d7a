"""Seeds and hyperparameters at once, by `vmap`: a sweep is one compiled program, and its results are arrays.

train = ppo.make_train(config, env, network)
hyper_H = grid(PPOHyper(), learning_rate=[1e-4, 1e-3], clip=[0.1, 0.2, 0.3])      # 6 settings
states, metrics = sweep(train, jax.random.key(0), hyper_H, seeds=8)               # leaves (6, 8, ...)

train = bc.make_train(config, env, network)
states, metrics = sweep(train, jax.random.key(0), grid(BCHyper(), learning_rate=[1e-4, 1e-3]), seeds=8, data=data)
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rl.algorithm import Train


def grid(hyper: Any, **values: ArrayLike) -> Any:
    """All combinations of values of some fields of an algorithm's Hyper, leaves (H,); the other fields as in `hyper`.

    The last field named changes fastest. Raises ValueError for a field that there is not, and for values that are no
    list.
    """
    fields = hyper._asdict()
    for name, each in values.items():
        if name not in fields:
            raise ValueError(f"grid: {name} is no hyperparameter, expected some of {sorted(fields)}")
        if np.ndim(each) != 1 or not np.size(each):
            raise ValueError(f"grid: {name} is {each}, expected a list of values")
    rows = np.array(list(product(*(np.asarray(each) for each in values.values()))), np.float32)
    columns = dict(zip(values, rows.T, strict=True))
    return type(hyper)(**{name: jnp.asarray(columns.get(name, np.full(len(rows), x))) for name, x in fields.items()})


def sweep(
    train: Train,
    key: jax.Array,
    hyper_H: Any,
    seeds: int,
    env_params: Any = None,
    *,
    data: Any = None,
    at_once: int | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Train every setting from the same `seeds` seeds. Returns (states, metrics), leaves (H, S, ...).

    `data`: the data set of an algorithm whose `train` takes (key, data, hyper), see `rl.offline`, and no `env_params`.
    The states of `bc` and `decision_transformer` have it once for each run: where it is large, give a function that
    returns less of them than `train` does.

    `at_once` settings run side by side, all by default; fewer need less memory. Seeds always run side by side.

    Raises ValueError for no seeds, for settings that are not one in each row, and for `at_once` beyond their number.
    """
    if seeds < 1:
        raise ValueError(f"sweep: seeds is {seeds}, expected at least 1")
    shapes = [jnp.shape(x) for x in jax.tree.leaves(hyper_H)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"sweep: fields of hyper_H have shapes {shapes}, expected (H,) all of them, as of grid")
    count = shapes[0][0]
    if at_once is not None and not 1 <= at_once <= count:
        raise ValueError(f"sweep: at_once is {at_once}, expected 1..{count}, the number of settings")

    @jax.jit
    def run(keys_S: jax.Array, hyper_H: Any, data: Any) -> tuple[Any, dict[str, jax.Array]]:
        def one(hyper: Any) -> Any:  # every setting gets the same seeds
            rest = (hyper, env_params) if data is None else (data, hyper)
            return jax.vmap(train, in_axes=(0, None, None))(jax.random.clone(keys_S), *rest)

        return jax.vmap(one)(hyper_H) if at_once is None else jax.lax.map(one, hyper_H, batch_size=at_once)

    return run(jax.random.split(key, seeds), hyper_H, data)
