"""Slow motion seen by fast sensors, generated from a key.

    v_t = rho v_{t-1} + sqrt(1 - rho^2) e_t                    velocities, the target: each of variance 1
    x_i = tanh(W v_t) + level_j vibration_i + drift_i + noise_i        for the k samples i of step t

Vibration is a sine of a frequency of its own for each sensor and sequence, under an amplitude that wanders at the slow
rate; drift is a random walk. The mixing matrix is the same for all sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class SensorConfig:
    """`targets` O velocities and `sensors` F, with `factor` k samples to a step. `memory` is the time constant of
    velocities and of the vibration's amplitude, in steps; frequencies are in cycles a sample; `drift` and `noise` are
    standard deviations a sample."""

    targets: int = 2
    sensors: int = 4
    factor: int = 10
    memory: float = 5.0
    frequencies: tuple[float, float] = (0.16, 0.4)
    drift: float = 0.02
    noise: float = 0.3

    def __post_init__(self) -> None:
        if min(self.targets, self.sensors, self.factor) < 1:
            raise ValueError(f"SensorConfig: targets, sensors and factor must be at least 1, got {self}")
        if self.memory <= 0 or min(self.drift, self.noise) < 0:
            raise ValueError(f"SensorConfig: memory must be positive, drift and noise not negative, got {self}")
        low, high = self.frequencies
        if not 0 <= low <= high <= 0.5:
            raise ValueError(f"SensorConfig: frequencies are {self.frequencies}, expected 0 <= low <= high <= 0.5")


class Batch(NamedTuple):
    """`target_BTO` at the slow rate; at the fast one, L = T k, sensors without vibration and the vibration alone."""

    target_BTO: jax.Array
    still_BLF: jax.Array
    vibration_BLF: jax.Array

    def samples(self, level: float | jax.Array) -> jax.Array:
        """What sensors show (B, L, F) where vibration is `level` times as strong."""
        return self.still_BLF + level * self.vibration_BLF


def mixing(config: SensorConfig) -> np.ndarray:
    """W (F, O), always the same for a config."""
    return np.random.default_rng(0).standard_normal((config.sensors, config.targets)).astype(np.float32)


def wandering(key: jax.Array, shape: tuple[int, int, int], memory: float) -> jax.Array:
    """Ornstein-Uhlenbeck paths (B, T, N) of variance 1 at every step, correlated over `memory` steps."""
    rho = jnp.exp(-1.0 / memory)
    noise_TBN = jax.random.normal(key, shape).swapaxes(0, 1)

    def move(v_BN: jax.Array, noise_BN: jax.Array):
        v_BN = rho * v_BN + jnp.sqrt(1 - rho**2) * noise_BN
        return v_BN, v_BN

    _, rest_TBN = jax.lax.scan(move, noise_TBN[0], noise_TBN[1:])
    return jnp.concatenate([noise_TBN[:1], rest_TBN]).swapaxes(0, 1)


def draw(key: jax.Array, batch: int, steps: int, config: SensorConfig) -> Batch:
    """`batch` sequences of `steps` T slow steps."""
    k_target, k_amplitude, k_frequency, k_phase, k_drift, k_noise = jax.random.split(key, 6)
    F, L = config.sensors, steps * config.factor
    target_BTO = wandering(k_target, (batch, steps, config.targets), config.memory)
    seen_BTF = jnp.tanh(jnp.einsum("BTO,FO->BTF", target_BTO, mixing(config)))
    drift_BLF = config.drift * jnp.cumsum(jax.random.normal(k_drift, (batch, L, F)), axis=1)
    noise_BLF = config.noise * jax.random.normal(k_noise, (batch, L, F))
    amplitude_BTF = jnp.abs(wandering(k_amplitude, (batch, steps, F), config.memory))
    frequency_B1F = jax.random.uniform(
        k_frequency, (batch, 1, F), minval=config.frequencies[0], maxval=config.frequencies[1]
    )
    phase_B1F = jax.random.uniform(k_phase, (batch, 1, F), maxval=2 * jnp.pi)
    wave_BLF = jnp.sin(2 * jnp.pi * frequency_B1F * jnp.arange(L, dtype=jnp.float32)[None, :, None] + phase_B1F)
    seen_BLF, amplitude_BLF = (jnp.repeat(x, config.factor, axis=1) for x in (seen_BTF, amplitude_BTF))
    return Batch(target_BTO, seen_BLF + drift_BLF + noise_BLF, amplitude_BLF * wave_BLF)
