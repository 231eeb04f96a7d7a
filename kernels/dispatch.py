"""Picks the implementation of an op: a named one runs or raises with the reason, and only `auto` chooses.

Every op has `reference` (a scan over tokens, the definition), `chunked` (XLA with a written backward pass) and Pallas
kernels, `pallas_tpu` and `pallas_gpu`; `pallas` is the one of the default platform. The two long names exist so that a
kernel can be interpreted, or lowered for a platform, on a machine without it. An op may have a `scan` too: the forward
pass of `reference` with a written backward pass, for CPUs.
"""

from collections.abc import Mapping, Sequence

import jax

# What `auto` tries on each platform, in this order. The Pallas kernels have been interpreted and lowered but never
# timed on a device: until they are, they run only where they are named.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("scan", "chunked", "reference"),
    "gpu": ("chunked", "reference"),
    "tpu": ("chunked", "reference"),
}
# Bytes of state up to which an op's scan over tokens is ahead of its chunks on a CPU.
SCANNED_BYTES = {"linear_attention": 128 * 1024, "delta_rule": 256 * 1024}
PALLAS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


def auto_for(op: str, state_bytes: int) -> Mapping[str, Sequence[str]]:
    """The order of `auto` for an op with a state of that size: a `scan` only where it stays in a core's cache."""
    return AUTO if state_bytes <= SCANNED_BYTES[op] else AUTO | {"cpu": AUTO["cpu"][1:]}


def select[Implementation](
    op: str,
    implementation: str,
    available: Mapping[str, Implementation],
    *,
    refused: Mapping[str, str] | None = None,
    auto: Mapping[str, Sequence[str]] = AUTO,
) -> Implementation:
    """The entry of `available` that `implementation` names, or that `auto` prefers on the default platform.

    Args:
        op: name of the op, for messages.
        implementation: "auto", "pallas", or a key of `available`.
        available: what the op has, by name.
        refused: names that can't run the present arguments, with the reason; `auto` passes over them.
        auto: names in order of preference, by platform.

    Raises:
        ValueError: unknown implementation.
        NotImplementedError: the one that was named is refused, or nothing is left for `auto`.
    """
    refused = refused or {}
    platform = jax.default_backend()
    name = implementation
    if name == "auto":
        preferred = auto.get(platform, AUTO["cpu"])
        name = next((each for each in preferred if each in available and each not in refused), None)
        if name is None:
            reasons = "; ".join(f"{each}: {refused.get(each, 'not written')}" for each in preferred)
            raise NotImplementedError(f"{op}: no implementation runs this on {platform} ({reasons})")
    elif name == "pallas":
        name = PALLAS.get(platform)
        if name is None or name not in available:
            kernels = [each for each in PALLAS.values() if each in available]
            raise NotImplementedError(f"{op}: no Pallas kernel for the default platform {platform}, only {kernels}")
    if name not in available:
        names = ", ".join(["auto", "pallas", *available])
        raise ValueError(f"{op}: implementation is {implementation!r}, expected one of {names}")
    if name in refused:
        raise NotImplementedError(f"{op}: implementation {name!r} can't run this: {refused[name]}")
    return available[name]
