"""A pre-norm residual block, e <- e + mixer(norm(e)), then e <- e + mlp(norm(e)), in parallel and in step form.

The parts are those of published models: RMS or layer norm (Zhang & Sennrich, arXiv 1910.07467; Ba et al., arXiv
1607.06450), a plain MLP or a gated one (Shazeer, arXiv 2002.05202), or none, and per-token conditioning by a shift and
scale of what is normalised, which start at zero (adaptive layer norm: Peebles & Xie, arXiv 2212.09748, section 3.2).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from seqmod.mixers import mixer_of
from seqmod.mixers.base import Mixer, Params, apply_mixer, over_last, project, rms_norm, scaled_normal
from seqmod.rows import map_rows

Norm = Literal["rms", "layer"]
Activation = Literal["relu", "gelu", "swiglu", "geglu"]
_NONLINEAR = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


@dataclass(frozen=True)
class BlockConfig:
    """One block: the config of its mixer, and of an MLP of hidden width `mlp` F, or none if that is 0.

    `output_bias` gives the MLP's second map a bias, `conditioning` C is the number of features that shift and scale.
    The MLP is computed for `row_chunk` steps at a time, and again in the backward pass, if that is not 0.
    """

    mixer_config: Any
    width: int
    mlp: int
    activation: Activation = "relu"
    norm: Norm = "rms"
    epsilon: float = 1e-6
    output_bias: bool = False
    conditioning: int = 0
    init_scale: float = 1.0
    row_chunk: int = 0

    def __post_init__(self) -> None:
        if self.activation not in _NONLINEAR:
            raise ValueError(f"BlockConfig: activation is {self.activation!r}, expected one of {get_args(Activation)}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"BlockConfig: norm is {self.norm!r}, expected one of {get_args(Norm)}")
        if self.mixer_config.width != self.width:
            raise ValueError(f"BlockConfig: the mixer's width is {self.mixer_config.width}, expected {self.width}")

    @property
    def mixer(self) -> Mixer:
        """The mixer of the config."""
        return mixer_of(self.mixer_config)

    @property
    def causal(self) -> bool:
        """Whether the mixer looks only backwards; one that could do either says so in its config."""
        both = {"causal self", "noncausal self"} <= self.mixer.patterns
        return self.mixer_config.causal if both else "causal self" in self.mixer.patterns

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation in ("swiglu", "geglu")


def init_norm(config: BlockConfig) -> Any:
    """A gain (D,), or a dict of a gain and a bias."""
    gain = jnp.ones(config.width)
    return gain if config.norm == "rms" else {"gain": gain, "bias": jnp.zeros(config.width)}


def normalise(config: BlockConfig, params: Any, e: jax.Array) -> jax.Array:
    """The norm over the last axis, computed in float32."""
    if config.norm == "rms":
        return rms_norm(params, e, config.epsilon)
    wide = e.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + config.epsilon)
    return (normed * over_last(params["gain"], e.ndim) + over_last(params["bias"], e.ndim)).astype(e.dtype)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x W + b over the last axis, in the type of x."""
    y = project("...I,IO->...O", x, kernel)
    return y if bias is None else y + over_last(bias, y.ndim).astype(y.dtype)


def init(key: jax.Array, config: BlockConfig) -> Params:
    """Fresh parameters of a block."""
    k_mixer, k_up, k_down = jax.random.split(key, 3)
    D, F, scale = config.width, config.mlp, config.init_scale
    params = {"mixer_norm": init_norm(config), "mixer": config.mixer.init(k_mixer, config.mixer_config)}
    if F:
        params |= {
            "mlp_norm": init_norm(config),
            "mlp_up": scaled_normal(k_up, (D, F), D, scale),
            "mlp_up_bias": jnp.zeros(F),
            "mlp_down": scaled_normal(k_down, (F, D), F, scale),
        }
        if config.gated:
            k_gate = jax.random.fold_in(k_up, 1)
            params |= {"mlp_gate": scaled_normal(k_gate, (D, F), D, scale), "mlp_gate_bias": jnp.zeros(F)}
        if config.output_bias:
            params["mlp_down_bias"] = jnp.zeros(D)
    if config.conditioning:
        params["condition"] = jnp.zeros((config.conditioning, 4 if F else 2, D))
    return params


def _adapted(params: Params, config: BlockConfig, part: int, normed: jax.Array, conditioning: jax.Array | None):
    if conditioning is None:
        return normed
    kernel_C2D = params["condition"][:, 2 * part : 2 * part + 2]
    change = project("...C,CGD->G...D", conditioning.astype(normed.dtype), kernel_C2D)
    return normed * (1 + change[0]) + change[1]


def _mlp(params: Params, config: BlockConfig, e: jax.Array, conditioning: jax.Array | None) -> jax.Array:
    if not config.mlp:
        return e
    normed = _adapted(params, config, 1, normalise(config, params["mlp_norm"], e), conditioning)
    hidden = affine(normed, params["mlp_up"], params["mlp_up_bias"])
    nonlinear = _NONLINEAR[config.activation]
    if config.gated:
        hidden = nonlinear(affine(normed, params["mlp_gate"], params["mlp_gate_bias"])) * hidden
    else:
        hidden = nonlinear(hidden)
    return e + affine(hidden, params["mlp_down"], params.get("mlp_down_bias"))


def apply(
    params: Params,
    config: BlockConfig,
    e_BLD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
    conditioning_BLC: jax.Array | None = None,
) -> jax.Array:
    """The residual stream after the block, (B, L, D)."""
    normed = _adapted(params, config, 0, normalise(config, params["mixer_norm"], e_BLD), conditioning_BLC)
    y_BLD = apply_mixer(
        config.mixer, params["mixer"], config.mixer_config, normed, segment_ids=segment_ids, mask_BL=mask_BL
    )
    rows = e_BLD + y_BLD, conditioning_BLC
    if not config.row_chunk or not config.mlp:
        return _mlp(params, config, *rows)
    return map_rows(lambda rows: _mlp(params, config, *rows), rows, config.row_chunk)


def step(
    params: Params, config: BlockConfig, e_BD: jax.Array, state: Any, conditioning_BC: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """One token through the block: the residual stream (B, D) after it, and the mixer's state."""
    mixer = config.mixer
    if mixer.step is None:
        raise ValueError(f"{mixer.kind.__name__}: this mixer is not causal and has no step form")
    normed = _adapted(params, config, 0, normalise(config, params["mixer_norm"], e_BD), conditioning_BC)
    y_BD, state = mixer.step(params["mixer"], config.mixer_config, normed, state)
    return _mlp(params, config, e_BD + y_BD, conditioning_BC), state
