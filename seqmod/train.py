"""Supervised training as one compiled program: sample a batch, take a gradient step, many times over.

The state carries its own step and key; the batch of a step is a function of both, so a resumed run sees the same data.
Sweeps (several models on the same batches, each with its own hyperparameter) are a leading axis of the state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW behind a global-norm clip. `steps` in all; `schedule` after `warmup` steps: constant, or cosine to 2%."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.03
    steps: int = 1000
    batch: int = 128
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = 1.0
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"AdamWConfig: steps {self.steps} and batch {self.batch} must be at least 1, "
                f"and warmup {self.warmup} below steps"
            )

    def rate(self, step: ArrayLike) -> jax.Array:
        """Learning rate of a step, counted from 0."""
        step = jnp.asarray(step)
        warm = jnp.minimum((step + 1) / (self.warmup + 1), 1.0)
        if self.schedule == "constant":
            return self.learning_rate * warm
        done = jnp.clip((step - self.warmup) / (self.steps - self.warmup), 0.0, 1.0)
        return self.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + jnp.cos(jnp.pi * done)))

    def make(self) -> optax.GradientTransformation:
        """The optimiser."""
        adamw = optax.adamw(self.rate, b2=self.beta2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adamw)


class TrainState(NamedTuple):
    """`params` and optimiser state (with a leading axis in a sweep), `step`, and the run's `key`."""

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


Sample = Callable[[jax.Array], Any]
"""key -> batch."""
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""(params, batch, key, step[, hyper]) -> (loss, metrics)."""


def start(params: Any, tx: optax.GradientTransformation, key: jax.Array, *, sweep: bool = False) -> TrainState:
    """State before the first step. In a `sweep` the params have a leading axis, one model each."""
    opt_state = jax.vmap(tx.init)(params) if sweep else tx.init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key)


def make_chunk(
    sample: Sample, loss: Loss, tx: optax.GradientTransformation, steps: int, hyper: Any = None
) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled function that takes `steps` steps and returns the metrics of each, `loss` among them.

    With `hyper` (a pytree whose leaves have a leading axis) it is a sweep: model i is trained with hyper[i], all on the
    same batches, and metrics have shape (steps, models).
    """

    def update(params, opt_state, batch, key, step, *hyper):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key, step, *hyper)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": value, **metrics}

    def one(state: TrainState, _: None):
        k_batch, k_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = sample(k_batch)
        if hyper is None:
            params, opt_state, metrics = update(state.params, state.opt_state, batch, k_loss, state.step)
        else:
            each = jax.vmap(
                lambda params, opt_state, hyper: update(params, opt_state, batch, k_loss, state.step, hyper)
            )
            params, opt_state, metrics = each(state.params, state.opt_state, hyper)
        return TrainState(params, opt_state, state.step + 1, state.key), metrics

    return jax.jit(lambda state: jax.lax.scan(one, state, length=steps))
