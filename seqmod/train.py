"""Supervised training as one compiled program: sample a batch, take a gradient step, many times over.

The state carries its own step and key; the batch of a step is a function of both, so a resumed run sees the same data.
Sweeps (several models on the same batches, each with its own hyperparameter) are a leading axis of the state. `fit` is
the whole loop, with checkpoints and exact resume; experiments bring their own, around the same `make_chunk`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from seqmod import checkpoint

# Parameters that weight decay leaves alone, by the last name of their path: biases, gains, decays, step sizes, skips.
_UNDECAYED = (
    *("bias", "norm", "gain", "scale", "skip", "direct", "D", "fixed"),
    *("decay", "A_log", "dt", "rate", "nu", "theta", "gamma", "frequency"),
)
Decayed = Literal["all", "matrices"]


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW behind a global-norm clip. `steps` in all; `schedule` after `warmup` steps: constant, or falling
    linearly to 0, or as a cosine to 2%.

    `batch` sequences a step, in `accumulate` parts whose gradients are averaged. `average` is the decay of an
    exponential moving average of the parameters, 0 for none. Weight decay applies to `decayed`: all parameters, or
    matrices alone, without biases, gains and the rates of recurrences.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.03
    steps: int = 1000
    batch: int = 128
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    max_grad_norm: float = 1.0
    beta2: float = 0.999
    decayed: Decayed = "all"
    accumulate: int = 1
    average: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"AdamWConfig: steps {self.steps} and batch {self.batch} must be at least 1, "
                f"and warmup {self.warmup} below steps"
            )
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(f"AdamWConfig: batch {self.batch} is not divisible by accumulate {self.accumulate}")
        if not 0 <= self.average < 1:
            raise ValueError(f"AdamWConfig: average is {self.average}, expected at least 0 and below 1")

    def rate(self, step: ArrayLike) -> jax.Array:
        """Learning rate of a step, counted from 0."""
        step = jnp.asarray(step)
        warm = jnp.minimum((step + 1) / (self.warmup + 1), 1.0)
        if self.schedule == "constant":
            return self.learning_rate * warm
        done = jnp.clip((step - self.warmup) / (self.steps - self.warmup), 0.0, 1.0)
        if self.schedule == "linear":
            return self.learning_rate * warm * (1 - done)
        return self.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + jnp.cos(jnp.pi * done)))

    def make(self) -> optax.GradientTransformation:
        """The optimiser."""
        mask = is_matrix if self.decayed == "matrices" else None
        adamw = optax.adamw(self.rate, b2=self.beta2, weight_decay=self.weight_decay, mask=mask)
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adamw)


def is_matrix(params: Any) -> Any:
    """For each parameter, whether it is a matrix: neither a vector, nor what its name says needs no weight decay."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        return leaf.ndim > 1 and not any(
            name == end or name.endswith(f"_{end}") for name in names for end in _UNDECAYED
        )

    return jax.tree_util.tree_map_with_path(decays, params)


class TrainState(NamedTuple):
    """`params` and optimiser state (with a leading axis in a sweep), `step`, the run's `key`, and the moving average of
    the parameters if there is one."""

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    average: Any = None


Sample = Callable[[jax.Array], Any]
"""key -> batch."""
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""(params, batch, key, step[, hyper]) -> (loss, metrics)."""


def start(
    params: Any, tx: optax.GradientTransformation, key: jax.Array, *, sweep: bool = False, average: bool = False
) -> TrainState:
    """State before the first step. In a `sweep` the params have a leading axis, one model each."""
    opt_state = jax.vmap(tx.init)(params) if sweep else tx.init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key, params if average else None)


def make_chunk(
    sample: Sample,
    loss: Loss,
    tx: optax.GradientTransformation,
    steps: int,
    hyper: Any = None,
    *,
    accumulate: int = 1,
    average: float = 0.0,
    mesh: Mesh | None = None,
) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled function that takes `steps` steps and returns the metrics of each, `loss` among them.

    With `hyper` (a pytree whose leaves have a leading axis) it is a sweep: model i is trained with hyper[i], all on the
    same batches, and metrics have shape (steps, models).

    `accumulate` splits the leading axis of a batch in as many parts, whose losses, gradients and metrics are averaged:
    the step of the whole batch, where the loss is a mean over equal parts. `average` is the decay of the moving average
    that `start` was asked for; early on it is nearer to a plain mean (of step t, min(average, (1 + t) / (10 + t))).
    `mesh` spreads the leading axis of a batch over its axis "data": parameters stay as they were placed.
    """

    def gradients(params, batch, key, step, *hyper):
        grad = jax.value_and_grad(loss, has_aux=True)
        if accumulate == 1:
            return grad(params, batch, key, step, *hyper)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        results = jax.lax.map(
            lambda part: grad(params, part[0], part[1], step, *hyper), (parts, jax.random.split(key, accumulate))
        )
        return jax.tree.map(lambda x: x.mean(0), results)

    def update(params, opt_state, batch, key, step, *hyper):
        (value, metrics), grads = gradients(params, batch, key, step, *hyper)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": value, **metrics}

    def one(state: TrainState, _: None):
        k_batch, k_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = sample(k_batch)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, _spread(mesh, "data"))
        if hyper is None:
            params, opt_state, metrics = update(state.params, state.opt_state, batch, k_loss, state.step)
        else:
            each = jax.vmap(
                lambda params, opt_state, hyper: update(params, opt_state, batch, k_loss, state.step, hyper)
            )
            params, opt_state, metrics = each(state.params, state.opt_state, hyper)
        mean = state.average
        if mean is not None:
            keep = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            mean = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, mean, params)
        return TrainState(params, opt_state, state.step + 1, state.key, mean), metrics

    return jax.jit(lambda state: jax.lax.scan(one, state, length=steps))


def _spread(mesh: Mesh, *axes: str) -> NamedSharding:
    """Arrays whose first axis is spread over a mesh's axes, and whose other axes are left to the compiler."""
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(*axes))


def evaluate(params: Any, sample: Sample, loss: Loss, key: jax.Array, batches: int) -> dict[str, jax.Array]:
    """Means of the loss and its metrics over `batches` fresh batches, compiled."""

    def one(key: jax.Array) -> dict[str, jax.Array]:
        k_batch, k_loss = jax.random.split(key)
        value, metrics = loss(params, sample(k_batch), k_loss, jnp.zeros((), jnp.int32))
        return {"loss": value, **metrics}

    means = jax.jit(lambda keys: jax.tree.map(jnp.mean, jax.lax.map(one, keys)))
    return means(jax.random.split(key, batches))


def fit(
    init: Callable[[jax.Array], Any],
    sample: Sample,
    loss: Loss,
    config: AdamWConfig,
    key: jax.Array,
    *,
    directory: str | Path | None = None,
    every: int = 100,
    evaluation: Callable[[Any], dict[str, jax.Array]] | None = None,
    report: Callable[[int, dict[str, np.ndarray]], None] | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train from `init(key)` for `config.steps` steps; returns the last state and the metrics of this call, (steps,).

    Every `every` steps, which must divide the number of steps, a compiled chunk ends: `report(step, metrics)` is
    called, with what `evaluation(params)` gives of the moving average, or else of the parameters, under "eval/" names;
    and a checkpoint is written below `directory`, if one is named, from the newest of which a later call goes on: its
    end is that of an uninterrupted run, bit for bit. With a `mesh`, parameters are replicated and batches spread over
    its axis "data"; `config.batch` is `sample`'s affair.

    Raises:
        ValueError: `every` does not divide the number of steps.
        FloatingPointError: the loss is no longer finite; the last checkpoint is kept.
        CheckpointMismatch: the directory holds checkpoints of another config.
    """
    if every < 1 or config.steps % every:
        raise ValueError(f"fit: every is {every}, expected a divisor of the {config.steps} steps")
    tx = config.make()
    k_init, k_train = jax.random.split(key)
    state = start(jax.jit(init)(k_init), tx, k_train, average=bool(config.average))
    if mesh is not None:
        state = jax.device_put(state, _spread(mesh))
    record = asdict(config) | {"every": every}
    if directory is not None and checkpoint.latest_step(directory) is not None:
        _, state = checkpoint.restore(directory, state, record)
    chunk = make_chunk(sample, loss, tx, every, accumulate=config.accumulate, average=config.average, mesh=mesh)
    history: list[dict[str, np.ndarray]] = []
    while (done := int(state.step)) < config.steps:
        state, metrics = chunk(state)
        metrics = {name: np.asarray(values) for name, values in metrics.items()}
        if not np.isfinite(metrics["loss"]).all():
            first = done + int(np.flatnonzero(~np.isfinite(metrics["loss"]))[0])
            raise FloatingPointError(f"fit: the loss is {metrics['loss'][first - done]} at step {first}")
        history.append(metrics)
        if directory is not None:
            checkpoint.save(directory, done + every, state, record)
        if report is not None:
            judged = {}
            if evaluation is not None:
                judged = evaluation(state.params if state.average is None else state.average)
            report(done + every, metrics | {f"eval/{name}": np.asarray(value) for name, value in judged.items()})
    joined = {name: np.concatenate([part[name] for part in history]) for name in history[0]} if history else {}
    return state, joined
