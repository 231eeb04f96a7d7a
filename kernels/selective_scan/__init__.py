"""Selective scan of Mamba, S6 (Gu and Dao, arXiv 2312.00752, algorithm 2).

    delta'_t = softplus(delta_t + delta_bias)       softplus and bias if asked for
    h_t = exp(delta'_t A) * h_{t-1} + delta'_t u_t B_t
    y_t = (C_t . h_t + D * u_t) * silu(z_t)         skip and gate if given

Each of the D channels has N states with decays of their own; B_t and C_t are shared by the channels of a group. As in
the published kernels the input is discretised by Euler's rule, the state by the exponential.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.checks import (
    check_array,
    check_length,
    check_not_positive,
    check_rank,
    check_segments,
    refuse_float64,
    refuse_old_gpu,
)
from kernels.dispatch import select
from kernels.segments import flip, segment_starts
from kernels.selective_scan.blocks import SelectiveScanBlocks
from kernels.selective_scan.chunked import selective_scan_chunked
from kernels.selective_scan.pallas_gpu import MOST_STATES, selective_scan_gpu
from kernels.selective_scan.pallas_tpu import selective_scan_tpu
from kernels.selective_scan.reference import selective_scan_reference

__all__ = ["SelectiveScanBlocks", "selective_scan", "selective_scan_step"]


def selective_scan(
    u_BLD: jax.Array,
    delta_BLD: jax.Array,
    A_DN: jax.Array,
    B_BLN: jax.Array,
    C_BLN: jax.Array,
    D_D: jax.Array | None = None,
    z_BLD: jax.Array | None = None,
    delta_bias_D: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
    initial_state_BDN: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str = "auto",
    blocks: SelectiveScanBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Run the selective scan over axis 1.

    Args:
        u_BLD: inputs.
        delta_BLD: step sizes, positive once bias and softplus are applied.
        A_DN: rates, real and not positive (-exp(A_log) in Mamba).
        B_BLN, C_BLN: input and output maps, or (B, L, G, N) for G groups of D / G channels that follow each other.
        D_D: weights of the skip connection.
        z_BLD: the output is multiplied by silu(z).
        delta_bias_D: added to delta.
        delta_softplus: pass delta, with its bias, through a softplus.
        initial_state_BDN: h_0, zeros if absent; it enters the segment that is run first.
        segment_ids: (B, L) integers; the state is cleared wherever the id differs from the step before.
        reverse: run from the last step to the first.
        implementation: "auto", "reference", "chunked" or "pallas".
        blocks: block sizes of the chunked form and of the kernels.
        interpret: run a kernel in the interpreter of its platform, as `pallas_call` or `plgpu.kernel` take it, or True.

    Returns:
        y_BLD in the dtype of u, and the final state (B, D, N) in the widest dtype of the inputs, at least float32, in
        which everything is computed.

    Raises:
        ValueError: shapes or dtypes that do not agree, an empty sequence, positive rates (seen only outside of
            transformations), an unknown implementation.
        NotImplementedError: the named implementation can't run here or with these arguments.
    """
    op = "selective_scan"
    check_rank(op, "u", u_BLD, "(B, L, D)")
    B, L, D = u_BLD.shape
    check_length(op, "u", L)
    check_rank(op, "A", A_DN, "(D, N)")
    N = A_DN.shape[1]
    check_rank(op, "B", B_BLN, "(B, L, N)", "(B, L, G, N)")
    if B_BLN.ndim == 3:
        groups, axes = (), "(B, L, N)"
    else:
        groups, axes = (B_BLN.shape[2],), "(B, L, G, N)"
        if groups[0] == 0 or D % groups[0]:
            raise ValueError(f"{op}: B has {groups[0]} groups, expected a divisor of D = {D}")
    check_array(op, "u", u_BLD, "(B, L, D)", (B, L, D))
    check_array(op, "delta", delta_BLD, "(B, L, D)", (B, L, D))
    check_array(op, "A", A_DN, "(D, N)", (D, N))
    check_array(op, "B", B_BLN, axes, (B, L, *groups, N))
    check_array(op, "C", C_BLN, axes, (B, L, *groups, N))
    check_array(op, "D", D_D, "(D,)", (D,))
    check_array(op, "z", z_BLD, "(B, L, D)", (B, L, D))
    check_array(op, "delta_bias", delta_bias_D, "(D,)", (D,))
    check_array(op, "initial_state", initial_state_BDN, "(B, D, N)", (B, D, N))
    check_segments(op, segment_ids, B, L)
    check_not_positive(op, "A", A_DN)
    given = [u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, delta_bias_D, initial_state_BDN]
    dtype = jnp.result_type(jnp.float32, *(array for array in given if array is not None))
    available = {
        "reference": selective_scan_reference,
        "chunked": selective_scan_chunked,
        "pallas_tpu": partial(selective_scan_tpu, interpret=interpret),
        "pallas_gpu": partial(selective_scan_gpu, interpret=interpret),
    }
    refused = refuse_float64(dtype) | refuse_old_gpu(interpret)
    if N > MOST_STATES:
        refused["pallas_gpu"] = f"a channel has {N} states, more than {MOST_STATES}"
    run = select(op, implementation, available, refused=refused)
    if initial_state_BDN is None:
        initial_state_BDN = jnp.zeros((B, D, N), dtype)
    u, delta, rates, maps_in, maps_out = (array.astype(dtype) for array in (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN))
    if delta_bias_D is not None:
        delta = delta + delta_bias_D.astype(dtype)[None, None]
    if delta_softplus:
        delta = jax.nn.softplus(delta)
    maps_in, maps_out = (array.reshape(B, L, -1, N) for array in (maps_in, maps_out))
    if segment_ids is None:
        starts_BL = jnp.zeros((B, L), bool)
    else:
        starts_BL = segment_starts(flip(segment_ids, reverse))
    u_run, delta, maps_in, maps_out = flip((u, delta, maps_in, maps_out), reverse)
    y_BLD, final_BDN = run(
        u_run,
        delta,
        rates,
        maps_in,
        maps_out,
        initial_state_BDN.astype(dtype),
        starts_BL,
        blocks or SelectiveScanBlocks(),
    )
    y_BLD = flip(y_BLD, reverse)
    if D_D is not None:
        y_BLD = y_BLD + D_D.astype(dtype)[None, None] * u
    if z_BLD is not None:
        y_BLD = y_BLD * jax.nn.silu(z_BLD.astype(dtype))
    return y_BLD.astype(jnp.result_type(u_BLD)), final_BDN


def selective_scan_step(
    state_BDN: jax.Array,
    u_BD: jax.Array,
    delta_BD: jax.Array,
    A_DN: jax.Array,
    B_BN: jax.Array,
    C_BN: jax.Array,
    D_D: jax.Array | None = None,
    z_BD: jax.Array | None = None,
    delta_bias_D: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One token from a carried state: y_BD and the next state. Arguments as of `selective_scan`, without L."""
    y_BLD, state_BDN = selective_scan(
        u_BD[:, None],
        delta_BD[:, None],
        A_DN,
        B_BN[:, None],
        C_BN[:, None],
        D_D,
        None if z_BD is None else z_BD[:, None],
        delta_bias_D,
        delta_softplus=delta_softplus,
        initial_state_BDN=state_BDN,
        implementation="reference",
    )
    return y_BLD[:, 0], state_BDN
