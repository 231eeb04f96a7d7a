"""Brax environments through gymnax's interface (Freeman et al., arXiv 2106.13281).

`BraxEnv("ant")` has `reset_env` and `step_env` without auto-reset, and keeps the end of a task (`terminated`) apart
from the time limit (`is_truncated`), which Brax's own wrappers merge. Brax is imported with the first environment.

Decisions. Actions live in [-1, 1]^A, the range that Brax's policies have, and are clipped to it. Time is counted in
steps of Brax, so that an episode has the same length with and without action repeat; as in Brax, the truncation comes
at the first step that reaches it. A repeated action stops at termination: rewards are summed up to there, and the
observation and the metrics are those of the last step taken. Brax's `info` is ignored: `time_out` of the inverted
pendulum says done where the pole has fallen. A step from a state that has ended means nothing: reset first.

Parameters can scale the physics, one value an environment under `vmap` (domain randomisation). What each backend takes:

- `gravity_scale` and `gear_scale` (strength of the motors): all four;
- `friction_scale` (of contacts): all four, in environments that have contacts;
- `mass_scale` (masses and inertias together): generalized and mjx. The other two raise a mass to the power
  1 - `spring_mass_scale` of the model, and an inertia to 1 - `spring_inertia_scale`, and so they raise the scale; where
  both powers are zero (ant, hopper, pusher), every mass is 1 and the scale is refused.
"""

import contextlib
import difflib
import io
import sys
import warnings
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

Backend = Literal["generalized", "positional", "spring", "mjx"]
_NAMES = (
    "ant",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_double_pendulum",
    "inverted_pendulum",
    "pusher",
    "reacher",
    "walker2d",
)
_REFUSED = {
    "swimmer": "its fluid forces call jnp.clip with arguments that JAX no longer has",
    "fast": "it is a stand-in for speed tests without a physical system",
}
_NOISE = (
    "JAXopt is no longer maintained",
    "Brax System, pip[e]?lines and environments",
    "Accessing `(ncon|contact)` directly from `Data` is deprecated",
)


def brax_environments() -> tuple[str, ...]:
    """Names that `BraxEnv` takes; each was traced, reset and step, on each of the four backends."""
    return _NAMES


@struct.dataclass
class BraxState(environment.EnvState):
    """`time` steps of Brax so far, int32; `brax` Brax's own state (physics, observation, reward, metrics)."""

    time: jax.Array  # pyright: ignore[reportIncompatibleVariableOverride]  # gymnax says int but traces it too
    brax: Any


@struct.dataclass
class BraxParams(environment.EnvParams):
    """Traced: `max_steps_in_episode` steps of Brax; scales of the physics, positive scalars, None for the model as it
    is (which compiles to constants, where a scale of 1 costs a few operations)."""

    max_steps_in_episode: int | jax.Array = 1000  # pyright: ignore[reportIncompatibleVariableOverride]  # traced
    gravity_scale: float | jax.Array | None = None
    friction_scale: float | jax.Array | None = None
    mass_scale: float | jax.Array | None = None
    gear_scale: float | jax.Array | None = None


@dataclass(frozen=True)
class BraxEnv(environment.Environment[BraxState, BraxParams]):
    """A Brax environment on one backend.

    `episode_length` is the default time limit in steps of Brax, `action_repeat` how many of them each action lasts,
    `options` pairs of further arguments for Brax's constructor, such as ("terminate_when_unhealthy", False).
    Raises ValueError for a name or a backend that does not exist or does not work, and for lengths below 1.
    """

    name: str = "ant"  # pyright: ignore[reportIncompatibleMethodOverride]  # gymnax has a property
    backend: Backend = "spring"
    episode_length: int = 1000
    action_repeat: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    brax: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name in _REFUSED:
            raise ValueError(f"BraxEnv: name is {self.name!r}, which does not work: {_REFUSED[self.name]}")
        if self.name not in _NAMES:
            near = difflib.get_close_matches(self.name, _NAMES, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(_NAMES)}"
            raise ValueError(f"BraxEnv: there is no environment {self.name!r}; {hint}")
        if self.backend not in get_args(Backend):
            raise ValueError(f"BraxEnv: backend is {self.backend!r}, expected one of {', '.join(get_args(Backend))}")
        if self.episode_length < 1:
            raise ValueError(f"BraxEnv: episode_length is {self.episode_length}, expected at least 1")
        if self.action_repeat < 1:
            raise ValueError(f"BraxEnv: action_repeat is {self.action_repeat}, expected at least 1")
        object.__setattr__(self, "brax", _load(self.name, self.backend, dict(self.options)))

    @property
    def default_params(self) -> BraxParams:
        """The time limit given, and the physics as it is."""
        return BraxParams(max_steps_in_episode=self.episode_length)

    @property
    def num_actions(self) -> int:
        """Number A of action components."""
        return self.brax.action_size

    @cached_property
    def observation_size(self) -> int:
        """Number F of features of an observation; traces a reset once."""
        with brax_allowed():
            return jax.eval_shape(self.brax.reset, jax.random.key(0)).obs.shape[0]

    def action_space(self, params: BraxParams) -> spaces.Box:
        """A components in [-1, 1]."""
        return spaces.Box(-1.0, 1.0, (self.num_actions,), jnp.float32)

    def observation_space(self, params: BraxParams) -> spaces.Box:
        """F features without bounds."""
        return spaces.Box(-jnp.inf, jnp.inf, (self.observation_size,), jnp.float32)

    def reset_env(self, key: jax.Array, params: BraxParams) -> tuple[jax.Array, BraxState]:
        """Draw a start. Returns (obs_F, state)."""
        with brax_allowed():
            # A strong type for every leaf, so that a step can give the same.
            start = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), self.scaled(params).reset(key))
        return start.obs, BraxState(time=jnp.zeros((), jnp.int32), brax=start)

    def step_env(
        self, key: jax.Array, state: BraxState, action: Any, params: BraxParams
    ) -> tuple[jax.Array, BraxState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One action (A,), `action_repeat` times. Returns (obs_F, state, reward, terminated, info).

        Deterministic, `key` is unused. Every metric m of Brax is `info["metrics/m"]`; `discount` is 1 - terminated.
        Raises ValueError for an action of another shape, which would broadcast.
        """
        if jnp.shape(action) != (self.num_actions,):
            raise ValueError(f"BraxEnv: action has shape {jnp.shape(action)}, expected (A,) = ({self.num_actions},)")
        action_A = jnp.clip(action, -1.0, 1.0)
        physics = self.scaled(params)

        def step(before: BraxState) -> BraxState:
            # Brax writes into the dictionaries of the state it is given.
            given = before.brax.replace(metrics=dict(before.brax.metrics), info=dict(before.brax.info))
            after = physics.step(given, action_A)
            after = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, before.brax)
            return BraxState(time=before.time + 1, brax=after)

        def repeat(carry: tuple[BraxState, jax.Array, jax.Array], _: None):
            state, reward, running = carry
            after = step(state)
            state = jax.tree.map(lambda new, old: jnp.where(running, new, old), after, state)
            reward = reward + jnp.where(running, after.brax.reward, 0.0)
            return (state, reward, running & (after.brax.done == 0)), None

        with brax_allowed():
            if self.action_repeat == 1:
                state = step(state)
                reward = state.brax.reward
            else:
                start = (state, jnp.zeros((), jnp.float32), jnp.array(True))
                (state, reward, _), _ = jax.lax.scan(repeat, start, length=self.action_repeat)
        terminated = state.brax.done > 0
        info = {f"metrics/{name}": value for name, value in state.brax.metrics.items()}
        return state.brax.obs, state, reward, terminated, {**info, "discount": 1.0 - terminated}

    def scaled(self, params: BraxParams) -> Any:
        """Brax's environment with the physics of these parameters. Raises ValueError for a scale without effect."""
        system = self.brax.sys
        changes: dict[str, Any] = {}

        def scale(factor: float | jax.Array | None, *paths: str) -> None:
            for path in paths if factor is not None else ():
                changes[path] = attrgetter(path)(system) * factor

        # Brax's own backends read the first of each, mjx the rest.
        scale(params.gravity_scale, "gravity", "opt.gravity")
        scale(params.gear_scale, "actuator.gear", "actuator_gear")
        scale(params.mass_scale, "link.inertia.mass", "link.inertia.i", "body_mass", "body_inertia", "body_subtreemass")
        scale(params.friction_scale, "geom_friction")
        if params.mass_scale is not None and self.backend in ("spring", "positional"):
            powers = float(system.spring_mass_scale), float(system.spring_inertia_scale)
            if powers == (1.0, 1.0):
                raise ValueError(
                    f"BraxEnv: mass_scale has no effect in {self.name} on {self.backend}, where every mass and inertia "
                    "is 1; use the backend generalized or mjx, or gear_scale"
                )
        if not changes:
            return self.brax
        scaled = copy(self.brax)
        scaled.sys = system.tree_replace(changes)
        return scaled


@contextlib.contextmanager
def brax_allowed() -> Iterator[None]:
    """A context in which Brax may run: without the strict promotion of ranks, which it does not pass, and without its
    standing warnings that it and JAXopt are no longer developed and that MJX has moved its contacts."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def _load(name: str, backend: str, options: dict[str, Any]) -> Any:
    """Brax's environment, without the noise of importing Brax and of compiling its models."""
    printed, warned = io.StringIO(), []
    with brax_allowed():
        try:
            with contextlib.redirect_stdout(printed):
                from brax import envs
                from mujoco import (
                    get_mju_user_warning,  # pyright: ignore[reportAttributeAccessIssue]  # compiled
                    set_mju_user_warning,  # pyright: ignore[reportAttributeAccessIssue]
                )
        finally:
            # MJX prints that Warp is missing, which nothing here uses.
            for line in printed.getvalue().splitlines():
                if not line.startswith("Failed to import "):
                    sys.stdout.write(f"{line}\n")
        handler = get_mju_user_warning()
        set_mju_user_warning(warned.append)
        try:
            made = envs.get_environment(name, backend=backend, **options)
        finally:
            set_mju_user_warning(handler)
    for message in warned:
        # The model of the half cheetah sets its mass in a way that MuJoCo will drop.
        if "settotalmass" not in message:
            warnings.warn(message, stacklevel=4)
    return made
