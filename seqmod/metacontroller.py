"""The metacontroller: finds temporally abstract actions in a frozen model's residual stream (arXiv 2512.20605, D.2).

It reads the residual stream e_t of one layer and edits it by a low-rank linear map that a latent code z_t generates:

    h_t = GRU(e_t, h_{t-1})                                   history
    s   = embedder(e_1..T)                                    summary of the whole sequence, future included
    mu_t, sigma_t = f_enc(e_t, h_{t-1}, s),  z~_t ~ N(mu_t, sigma_t^2)
    beta_t = f_switch(e_t, h_{t-1}, z_{t-1}) in [0, 1]        causal switching unit
    z_t = beta_t z~_t + (1 - beta_t) z_{t-1}                  temporal integration
    e_t <- e_t + B(z_t) A(z_t) e_t                            decoder, a hypernetwork of rank R

Training minimises, over expert sequences, sum_t -log p(a_t | o_1..t, z_1..t) + alpha KL(N(mu_t, sigma_t) || N(0, I)).

Where the paper is silent: beta is a scalar, and beta_1 = 1 (there is no code to keep, and reinforcement learning must
act at reset); the embedder is a pair of RG-LRU stacks, one reading forward and one backward, whose outputs after the
whole sequence make up one s for all steps (`summary`), or whose backward outputs give an s_t for every suffix
(`suffix`); the stream is RMS-normalised before it is read, never before it is edited; log sigma is clipped to [-5, 2].
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmod import backbone
from seqmod.mixers.base import Params, rms_norm, scaled_normal
from seqmod.residual import low_rank_update

Embedder = Literal["summary", "suffix"]
Gate = Literal["sigmoid", "gumbel", "straight_through"]


@dataclass(frozen=True)
class MetacontrollerConfig:
    """Sizes as in Table A9: `latent` Z, `history` n_h, `embedding` n_s, hidden widths, `rank` R.

    `width` is the width D of the residual stream it controls. `gate` is how beta is relaxed while training: the plain
    sigmoid, a Gumbel-sigmoid sample, or the thresholded sample with the gradient of the sigmoid.
    """

    width: int = 64
    latent: int = 8
    history: int = 32
    embedding: int = 32
    encoder_hidden: int = 64
    switch_hidden: int = 64
    decoder_hidden: int = 32
    rank: int = 16
    embedder: Embedder = "summary"
    embedder_layers: int = 1
    embedder_width: int = 64
    gate: Gate = "sigmoid"
    gate_temperature: float = 1.0
    gate_bias: float = 0.0
    initial_log_sigma: float = -1.0

    def __post_init__(self) -> None:
        sizes = (self.width, self.latent, self.history, self.embedding, self.rank, self.embedder_layers)
        hidden = (self.encoder_hidden, self.switch_hidden, self.decoder_hidden, self.embedder_width)
        if min(*sizes, *hidden) < 1:
            raise ValueError(f"MetacontrollerConfig: sizes must be positive, got {self}")
        if self.embedder not in get_args(Embedder):
            raise ValueError(
                f"MetacontrollerConfig: embedder is {self.embedder!r}, expected one of {get_args(Embedder)}"
            )
        if self.gate not in get_args(Gate):
            raise ValueError(f"MetacontrollerConfig: gate is {self.gate!r}, expected one of {get_args(Gate)}")
        if self.gate_temperature <= 0:
            raise ValueError(f"MetacontrollerConfig: gate_temperature is {self.gate_temperature}, expected > 0")

    @property
    def embedder_config(self) -> backbone.BackboneConfig:
        """The embedder as a small backbone."""
        return backbone.BackboneConfig(
            inputs=self.width,
            heads=(("summary", self.embedding),),
            mixers=("rglru",) * self.embedder_layers,
            width=self.embedder_width,
            mlp=2 * self.embedder_width,
        )


class Unrolled(NamedTuple):
    """`z_BLZ` codes in force, `beta_BL` gate, `mu_BLZ` and `log_sigma_BLZ` of the proposals, `kl_BL` in nats."""

    z_BLZ: jax.Array
    beta_BL: jax.Array
    mu_BLZ: jax.Array
    log_sigma_BLZ: jax.Array
    kl_BL: jax.Array


def init(key: jax.Array, config: MetacontrollerConfig) -> Params:
    """Fresh parameters as a nested dict."""
    k_embed, k_gru, k_enc, k_enc2, k_sw, k_sw2, k_dec, k_dec2, k_dec3, k_bias = jax.random.split(key, 10)
    D, Z, H, S, R = config.width, config.latent, config.history, config.embedding, config.rank
    k_gru_x, k_gru_h = jax.random.split(k_gru)
    return {
        "embedder": jax.vmap(lambda key: backbone.init(key, config.embedder_config))(jax.random.split(k_embed)),
        "gru": {
            "input": scaled_normal(k_gru_x, (D, 3 * H), D, 1.0),
            "state": scaled_normal(k_gru_h, (H, 3 * H), H, 1.0),
            "bias": jnp.zeros(3 * H),
        },
        "encoder": {
            "hidden": scaled_normal(k_enc, (D + H + S, config.encoder_hidden), D + H + S, 1.0),
            "hidden_bias": jnp.zeros(config.encoder_hidden),
            "out": scaled_normal(k_enc2, (config.encoder_hidden, 2 * Z), config.encoder_hidden, 1.0),
            "out_bias": jnp.concatenate([jnp.zeros(Z), jnp.full(Z, config.initial_log_sigma)]),
        },
        "switch": {
            "hidden": scaled_normal(k_sw, (D + H + Z, config.switch_hidden), D + H + Z, 1.0),
            "hidden_bias": jnp.zeros(config.switch_hidden),
            "out": scaled_normal(k_sw2, (config.switch_hidden, 1), config.switch_hidden, 0.1),
            "out_bias": jnp.full(1, config.gate_bias),
        },
        "decoder": {
            "hidden": scaled_normal(k_dec, (Z, config.decoder_hidden), Z, 1.0),
            "hidden_bias": jnp.zeros(config.decoder_hidden),
            "down": scaled_normal(k_dec2, (config.decoder_hidden, R, D), config.decoder_hidden * D, 1.0),
            "down_bias": scaled_normal(k_bias, (R, D), D, 1.0),
            "up": scaled_normal(k_dec3, (config.decoder_hidden, D, R), config.decoder_hidden * R, 0.1),
            "up_bias": jnp.zeros((D, R)),
        },
    }


def _row(bias: jax.Array, like: jax.Array) -> jax.Array:
    return bias.reshape((1,) * (like.ndim - 1) + (-1,))


def _norm(e: jax.Array) -> jax.Array:
    return rms_norm(jnp.ones(e.shape[-1]), e)


def history_step(params: Params, e_BD: jax.Array, h_BH: jax.Array) -> jax.Array:
    """h_t from the residual stream (B, D) and h_{t-1} (B, n_h)."""
    return _gru(params["gru"], _norm(e_BD) @ params["gru"]["input"] + _row(params["gru"]["bias"], e_BD), h_BH)


def _gru(gru: Params, from_input: jax.Array, h_BH: jax.Array) -> jax.Array:
    reset_x, update_x, new_x = jnp.split(from_input, 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(h_BH @ gru["state"], 3, axis=-1)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
    return update * h_BH + (1 - update) * new


def history(params: Params, config: MetacontrollerConfig, e_BLD: jax.Array) -> jax.Array:
    """h_{t-1} for every step, (B, L, n_h): what was known before the step."""
    from_input = _norm(e_BLD) @ params["gru"]["input"] + _row(params["gru"]["bias"], e_BLD)

    def step(h_BH, x_B3H):
        return _gru(params["gru"], x_B3H, h_BH), h_BH

    start = jnp.zeros((e_BLD.shape[0], config.history))
    before_LBH = jax.lax.scan(step, start, jnp.swapaxes(from_input, 0, 1))[1]
    return jnp.swapaxes(before_LBH, 0, 1)


def embed(params: Params, config: MetacontrollerConfig, e_BLD: jax.Array, valid_BL: jax.Array) -> jax.Array:
    """s for every step, (B, L, n_s): the same for all steps (`summary`), or of the suffix from that step (`suffix`)."""
    x_BLD = _norm(e_BLD) * valid_BL[..., None]
    # The backward reader starts at the last valid step: padding is moved to the end of the reversed sequence.
    length_B1 = valid_BL.sum(1, keepdims=True)
    order_BL = (length_B1 - 1 - jnp.arange(valid_BL.shape[1])[None]) % valid_BL.shape[1]
    reversed_BLD = jnp.take_along_axis(x_BLD, order_BL[..., None], axis=1)

    def read(network: Params, x_BLD: jax.Array) -> jax.Array:
        return backbone.apply(network, config.embedder_config, x_BLD)[0]["summary"]

    out_2BLS = jax.vmap(read)(params["embedder"], jnp.stack([x_BLD, reversed_BLD]))
    if config.embedder == "suffix":
        return jnp.take_along_axis(out_2BLS[1], order_BL[..., None], axis=1)
    last_B11 = jnp.maximum(length_B1 - 1, 0)[..., None]
    summary_BS = jnp.take_along_axis(out_2BLS.sum(0), last_B11, axis=1)
    return jnp.broadcast_to(summary_BS, (*valid_BL.shape, config.embedding))


def switch_logit(params: Params, e: jax.Array, h_before: jax.Array, z_before: jax.Array) -> jax.Array:
    """Logit of beta_t, shape (...), from e (..., D), h_{t-1} and z_{t-1}."""
    return _switch_head(params["switch"], _switch_static(params["switch"], e, h_before), z_before)


def _switch_static(switch: Params, e: jax.Array, h_before: jax.Array) -> jax.Array:
    seen = jnp.concatenate([_norm(e), h_before], axis=-1)
    return seen @ switch["hidden"][: seen.shape[-1]] + _row(switch["hidden_bias"], seen)


def _switch_head(switch: Params, static: jax.Array, z_before: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(static + z_before @ switch["hidden"][-z_before.shape[-1] :])
    return (hidden @ switch["out"] + _row(switch["out_bias"], hidden))[..., 0]


def decode(params: Params, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Controller of a code z (..., Z): down (..., R, D) and up (..., D, R) for `low_rank_update`."""
    decoder = params["decoder"]
    hidden = jax.nn.relu(z @ decoder["hidden"] + _row(decoder["hidden_bias"], z))
    down = jnp.einsum("...H,HRD->...RD", hidden, decoder["down"])
    up = jnp.einsum("...H,HDR->...DR", hidden, decoder["up"])
    lead = (1,) * (z.ndim - 1)
    return down + decoder["down_bias"].reshape(*lead, *down.shape[-2:]), up + decoder["up_bias"].reshape(
        *lead, *up.shape[-2:]
    )


def control(params: Params, e: jax.Array, z: jax.Array) -> jax.Array:
    """The residual stream (..., D) edited by the controller of z (..., Z)."""
    return low_rank_update(e, *decode(params, z))


def relax(config: MetacontrollerConfig, logit: jax.Array, noise: jax.Array) -> jax.Array:
    """beta from its logit; `noise` is standard logistic, used by the Gumbel and straight-through gates."""
    if config.gate == "sigmoid":
        return jax.nn.sigmoid(logit)
    soft = jax.nn.sigmoid((logit + noise) / config.gate_temperature)
    if config.gate == "gumbel":
        return soft
    return soft + jax.lax.stop_gradient((soft > 0.5).astype(soft.dtype) - soft)


def unroll(
    params: Params,
    config: MetacontrollerConfig,
    key: jax.Array,
    e_BLD: jax.Array,
    valid_BL: jax.Array,
    *,
    forced_beta: float | None = None,
    deterministic: bool = False,
    gate_noise: bool = True,
    binary: bool = False,
    view_BLD: jax.Array | None = None,
) -> Unrolled:
    """Run over expert sequences, future included.

    Args:
        e_BLD: residual stream of the frozen model at the controlled layer.
        view_BLD: the same for a transformed copy of the sequences, which the embedder and the encoder read instead, so
            that codes can only say what the transformation leaves as it is; the gate always reads e_BLD.
        valid_BL: steps that belong to the sequence (a prefix).
        forced_beta: a constant gate instead of the switching unit's from step 2 on (1.0 is the paper's
            forced-switching baseline).
        deterministic: the proposals' means instead of samples.
        gate_noise: whether gates that are sampled in training are sampled here; reinforcement learning does not.
        binary: threshold the gate at one half, as in reinforcement learning.
    """
    k_z, k_gate = jax.random.split(key)
    B, L, _ = e_BLD.shape
    h_BLH = history(params, config, e_BLD)
    read_BLD, read_h_BLH = (e_BLD, h_BLH) if view_BLD is None else (view_BLD, history(params, config, view_BLD))
    s_BLS = embed(params, config, read_BLD, valid_BL)
    encoder = params["encoder"]
    seen = jnp.concatenate([_norm(read_BLD), read_h_BLH, s_BLS], axis=-1)
    hidden = jax.nn.relu(seen @ encoder["hidden"] + _row(encoder["hidden_bias"], seen))
    mu_BLZ, log_sigma_BLZ = jnp.split(hidden @ encoder["out"] + _row(encoder["out_bias"], hidden), 2, axis=-1)
    log_sigma_BLZ = jnp.clip(log_sigma_BLZ, -5.0, 2.0)
    noise_BLZ = jax.random.normal(k_z, mu_BLZ.shape)
    proposal_BLZ = mu_BLZ if deterministic else mu_BLZ + jnp.exp(log_sigma_BLZ) * noise_BLZ
    static_BLX = _switch_static(params["switch"], e_BLD, h_BLH)
    logistic_BL = jax.random.logistic(k_gate, (B, L)) if gate_noise else jnp.zeros((B, L))
    first_BL = jnp.broadcast_to(jnp.arange(L)[None] == 0, (B, L))

    def step(z_BZ, inputs):
        static_BX, proposal_BZ, logistic_B, first_B = inputs
        beta_B = relax(config, _switch_head(params["switch"], static_BX, z_BZ), logistic_B)
        if forced_beta is not None:
            beta_B = jnp.full_like(beta_B, forced_beta)
        if binary:
            beta_B = (beta_B >= 0.5).astype(beta_B.dtype)
        beta_B = jnp.where(first_B, 1.0, beta_B)
        z_BZ = beta_B[:, None] * proposal_BZ + (1 - beta_B[:, None]) * z_BZ
        return z_BZ, (z_BZ, beta_B)

    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (static_BLX, proposal_BLZ, logistic_BL, first_BL))
    _, (z_LBZ, beta_LB) = jax.lax.scan(step, jnp.zeros((B, config.latent)), inputs)
    kl_BL = 0.5 * (jnp.square(mu_BLZ) + jnp.exp(2 * log_sigma_BLZ) - 1 - 2 * log_sigma_BLZ).sum(-1)
    return Unrolled(jnp.swapaxes(z_LBZ, 0, 1), beta_LB.T, mu_BLZ, log_sigma_BLZ, kl_BL)


class Metacontroller(nn.Module):
    """Linen module around `init` and `unroll`: returns the edited stream and the unrolled codes."""

    config: MetacontrollerConfig

    @nn.compact
    def __call__(self, e_BLD: jax.Array, valid_BL: jax.Array) -> tuple[jax.Array, Unrolled]:
        params = self.param("metacontroller", lambda key: init(key, self.config))
        out = unroll(params, self.config, self.make_rng("latent"), e_BLD, valid_BL)
        return control(params, e_BLD, out.z_BLZ), out
