"""Short depthwise convolutions over a sequence, as many mixers have before their recurrence.

    causal:    y_t = b + sum_i w_i u_{t - (W - 1) + i}          i = 0 .. W - 1
    centred:   y_t = b + sum_i w_i u_{t - (W - 1) // 2 + i}     W odd

Steps outside of a step's own segment count as zeros.
"""

import jax
import jax.numpy as jnp

from seqmod.mixers.base import over_last, segment_runs


def short_convolution(
    u_BLN: jax.Array,
    kernel_WN: jax.Array,
    bias_N: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    causal: bool = True,
) -> jax.Array:
    """The convolution of all steps, (B, L, N) to (B, L, N). Raises ValueError for a centred one of even width."""
    L, W = u_BLN.shape[1], kernel_WN.shape[0]
    if not causal and W % 2 == 0:
        raise ValueError(f"short_convolution: kernel has {W} steps, expected an odd number of a centred one")
    ahead = 0 if causal else (W - 1) // 2
    behind = W - 1 - ahead
    padding = ((0, 0), (behind, ahead))
    padded_BLN = jnp.pad(u_BLN, (*padding, (0, 0)))
    runs_BL = padded_runs_BL = None
    if segment_ids is not None:
        # The zeros of the padding are zeros to any segment.
        runs_BL = segment_runs(segment_ids)
        padded_runs_BL = jnp.pad(runs_BL, padding)
    kernel_WN = kernel_WN.astype(u_BLN.dtype)
    y_BLN = jnp.zeros_like(u_BLN) if bias_N is None else jnp.broadcast_to(over_last(bias_N, 3), u_BLN.shape)
    y_BLN = y_BLN.astype(u_BLN.dtype)
    for i in range(W):
        tap_BLN = padded_BLN[:, i : i + L]
        if runs_BL is not None and padded_runs_BL is not None:
            same_BL = runs_BL == padded_runs_BL[:, i : i + L]
            tap_BLN = jnp.where(same_BL[..., None], tap_BLN, 0)
        y_BLN = y_BLN + tap_BLN * over_last(kernel_WN[i], 3)
    return y_BLN


def short_convolution_step(
    u_BN: jax.Array, window_BWN: jax.Array, kernel_WN: jax.Array, bias_N: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One causal step after the last inputs (B, W - 1, N), the window: y_BN and the next window."""
    window_BWN = jnp.concatenate([window_BWN, u_BN[:, None].astype(window_BWN.dtype)], axis=1)
    y_BN = (window_BWN * kernel_WN[None]).sum(1)
    if bias_N is not None:
        y_BN = y_BN + bias_N[None]
    return y_BN.astype(u_BN.dtype), window_BWN[:, 1:]
