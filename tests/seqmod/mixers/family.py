"""Every mixer, in every pattern it has, and the ways to run one."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmod.mixers import MIXERS, Context, Mixer, apply_mixer

# Heads of 6, so that they have pairs of channels to rotate; 16 slots in landmarks or caches are more than L.
B, L, M, D, H = 2, 7, 5, 18, 3

# Steps into the past that a mixer sees, where that is fewer than L.
REACH: dict[str, int] = {"gam": 3}

# Pairs of the steps below that happen to have no weight, in a mixer that cuts queries and keys off at zero.
UNSEEN: dict[str, int] = {"cosformer": 1}


class Case(NamedTuple):
    mixer: Mixer
    config: Any
    params: Any
    x_BLD: jax.Array


def names(*, pattern: str = "", packs: bool | None = None, linear: bool = False) -> list[str]:
    """Mixers that have a pattern, keep packed sequences apart, or are linear."""
    return [
        name
        for name, mixer in MIXERS.items()
        if (not pattern or pattern in mixer.patterns)
        and packs in (None, mixer.packs)
        and (not linear or mixer.linear is not None)
    ]


def self_patterns(**kwargs) -> list[tuple[str, bool]]:
    """(name, causal) of every mixer that maps a sequence to itself."""
    return [(name, causal) for causal in (True, False) for name in names(pattern=pattern_of(causal), **kwargs)]


def pattern_of(causal: bool) -> str:
    return "causal self" if causal else "noncausal self"


def sequence(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def build(random_params, name: str, causal: bool) -> Case:
    mixer = MIXERS[name]
    config = mixer.config(D, H, 1.0, 20, causal)
    return Case(mixer, config, random_params(mixer.init, config), sequence(B, L, D))


def run(case: Case, x_BLD: jax.Array, segments=None, context: Context | None = None) -> jax.Array:
    """The parallel form; `segments` are ids or a mask, whichever the mixer takes."""
    ids, mask = (segments, None) if case.mixer.packs else (None, segments)
    return _run(case.mixer, case.config, case.params, x_BLD, ids, mask, context)


@partial(jax.jit, static_argnums=(0, 1))
def _run(mixer, config, params, x_BLD, segment_ids, mask_BL, context):
    return apply_mixer(mixer, params, config, x_BLD, segment_ids=segment_ids, mask_BL=mask_BL, context=context)


def influence(case: Case, segments=None) -> np.ndarray:
    """Largest derivative (L, L) of output step by input step, in the first sequence."""
    return np.abs(_jacobian(case.mixer.apply, case.config, case.params, case.x_BLD[:1], segments)).max((1, 3))


@partial(jax.jit, static_argnums=(0, 1))
def _jacobian(apply, config, params, x_1LD, segments):
    return jax.jacrev(lambda x_LD: apply(params, config, x_LD[None], segments)[0])(x_1LD[0])


def steps(case: Case, x_BLD: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """The step form over a sequence, from a state."""

    def step(state, x_BD):
        y_BD, state = case.mixer.step(case.params, case.config, x_BD, state)
        return state, y_BD

    state, y_LBD = jax.jit(lambda x, state: jax.lax.scan(step, state, x))(jnp.swapaxes(x_BLD, 0, 1), state)
    return jnp.swapaxes(y_LBD, 0, 1), state
