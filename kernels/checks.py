"""Arguments of the ops: errors that name the op, the argument, what it is and what was expected."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def check_array(op: str, name: str, array: jax.Array | None, axes: str, shape: tuple[int, ...]) -> None:
    """Refuses another shape than `shape`, whose axes are called `axes`, and what isn't a real floating type.

    None passes: it stands for an argument that was left out.
    """
    if array is None:
        return
    if array.shape != shape:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {axes} = {shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{op}: {name} has dtype {array.dtype}, expected a real floating type")


def check_not_positive(op: str, name: str, array: jax.Array | None) -> None:
    """Refuses positive entries, where entries can be looked at: not inside of transformations."""
    if array is None or isinstance(array, Tracer) or not array.size:
        return
    if (largest := array.max()) > 0:
        raise ValueError(f"{op}: {name} has a positive entry, {largest}, expected none above 0")


def check_rank(op: str, name: str, array: jax.Array, *axes: str) -> None:
    """Refuses another number of axes than one of `axes` has, such as "(B, L, D)"."""
    if array.ndim not in [each.count(",") + 1 for each in axes]:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {' or '.join(axes)}")


def check_length(op: str, name: str, length: int) -> None:
    if length == 0:
        raise ValueError(f"{op}: {name} has length 0, expected at least 1")


def check_segments(op: str, segment_ids: jax.Array | None, B: int, L: int) -> None:
    if segment_ids is None:
        return
    if segment_ids.shape != (B, L):
        raise ValueError(f"{op}: segment_ids has shape {segment_ids.shape}, expected (B, L) = {(B, L)}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{op}: segment_ids has dtype {segment_ids.dtype}, expected integers")


def refuse_float64(dtype: jnp.dtype) -> dict[str, str]:
    """Reasons for `kernels.dispatch.select` against the kernels, which compute in float32."""
    if dtype == jnp.float64:
        return dict.fromkeys(("pallas_gpu", "pallas_tpu"), "it computes in float32, not float64")
    return {}


def refuse_old_gpu(interpret: Any) -> dict[str, str]:
    """Reasons for `kernels.dispatch.select` against Mosaic GPU kernels on the GPU at hand, unless interpreted."""
    if jax.default_backend() == "gpu" and not interpret:
        capability = jax.devices()[0].compute_capability
        if float(capability) < 9:
            return {"pallas_gpu": f"it needs compute capability 9.0 (Hopper), and this GPU has {capability}"}
    return {}
