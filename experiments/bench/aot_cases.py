"""What `aot` compiles: for four devices every op with Pallas kernels, in every way of calling it, of two sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kernels import delta_rule, linear_attention, linear_recurrence, selective_scan

# A GpuTargetConfigProto of XLA, with what the compiler asks for. Sources: NVIDIA's data sheet of the H200 (memory and
# its bandwidth), the CUDA programming guide's table of compute capability 9.0 (threads, registers, shared memory; per
# block up to 227 KiB where a kernel asks for it), the Hopper white paper (multiprocessors of the SXM form, their
# float32 units and clock, L2 cache).
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 141000000000
  memory_bandwidth: 4800000000000
}
"""


@dataclass(frozen=True)
class Target:
    """A device: the runtime that compiles for it, and how that is asked for its description."""

    name: str
    runtime: Literal["tpu", "gpu"]
    description: dict[str, str]


TARGETS = (
    Target("v5e", "tpu", {"platform": "tpu", "topology_name": "v5e:2x2"}),
    Target("v5p", "tpu", {"platform": "tpu", "topology_name": "v5p:2x2x1"}),
    Target("v6e", "tpu", {"platform": "tpu", "topology_name": "v6e:2x2"}),
    Target("H200", "gpu", {"platform": "cuda", "topology_name": "", "topology": "1x1x1", "target_config": H200}),
)
# The small one has no round sizes, so that everything is padded; the realistic one is a layer of a model of a billion
# parameters. D are the channels of the two elementwise ops.
SIZES = {
    "small": {"B": 2, "L": 37, "H": 4, "G": 2, "K": 24, "V": 17, "D": 70, "N": 5},
    "realistic": {"B": 1, "L": 4096, "H": 16, "G": 4, "K": 128, "V": 128, "D": 2048, "N": 16},
}
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "gradients")
# What models keep in float32 beside narrow activations: states, decays, weights.
WIDE = {"initial_state", "initial_state_BHKV", "initial_state_BDN", "log_decay", "log_decay_BLH", "A_DN", "D_D"}


@dataclass(frozen=True)
class Variant:
    """One way to call an op: arguments with the letters of their axes, static options, and sizes that differ.

    `refused` has, for the dtypes that the GPU kernel refuses, words of the reason it gives.
    """

    op: Callable[..., Any]
    name: str
    arguments: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


_Q = {"q_BLHK": "BLHK", "k_BLGK": "BLHK", "v_BLGV": "BLHV"}
_STATE = {"initial_state_BHKV": "BHKV"}
_TOKENS = {"q_BLHK": "BLHK", "k_BLHK": "BLHK", "v_BLHV": "BLHV", "beta_BLH": "BLH", **_STATE}
_SHARED = {"q_BLHK": "BLHK", "k_BLHK": "BLGK", "v_BLHV": "BLGV", "beta_BLH": "BLG", "initial_state_BHKV": "BGKV"}
_SCAN = {"u_BLD": "BLD", "delta_BLD": "BLD", "A_DN": "DN", "B_BLN": "BLN", "C_BLN": "BLN", "initial_state_BDN": "BDN"}
VARIANTS = (
    Variant(linear_recurrence, "real", {"a_BLN": "BLD", "x_BLN": "BLD", "initial_state": "BD"}),
    Variant(linear_attention, "no decay", {**_Q, **_STATE}),
    Variant(linear_attention, "no decay, normalised", _Q, {"normalise": True}, sizes={"K": 64, "V": 64}),
    Variant(linear_attention, "constant per head", {**_Q, "log_decay": "H", **_STATE}),
    Variant(linear_attention, "per head", {**_Q, "log_decay": "BLH", **_STATE}),
    Variant(
        linear_attention,
        "per head, keys shared",
        {**_Q, "k_BLGK": "BLGK", "v_BLGV": "BLGV", "log_decay": "BLH", **_STATE},
    ),
    Variant(linear_attention, "per head, 256 wide", {**_Q, "log_decay": "BLH", **_STATE}, sizes={"K": 256, "V": 256}),
    Variant(linear_attention, "per channel", {**_Q, "log_decay": "BLHK", **_STATE}),
    Variant(delta_rule, "no gate", _TOKENS),
    Variant(delta_rule, "gate", {**_TOKENS, "log_decay_BLH": "BLH"}),
    Variant(delta_rule, "gate, keys shared", {**_SHARED, "log_decay_BLH": "BLG"}),
    Variant(selective_scan, "maps shared", {**_SCAN, "D_D": "D", "z_BLD": "BLD"}, {"delta_softplus": True}),
    Variant(selective_scan, "maps in groups", {**_SCAN, "B_BLN": "BLGN", "C_BLN": "BLGN"}),
    Variant(
        selective_scan, "64 states", _SCAN, sizes={"N": 64}, refused=dict.fromkeys(DTYPES, "64 states, more than 48")
    ),
)


@dataclass(frozen=True)
class Case:
    """One program to compile."""

    variant: Variant
    target: Target
    size: str
    dtype: str
    passes: str

    @property
    def names(self) -> dict[str, str]:
        op, variant = self.variant.op.__name__, self.variant.name
        names = {"op": op, "variant": variant, "target": self.target.name, "size": self.size}
        return names | {"dtype": self.dtype, "pass": self.passes}

    @property
    def refused(self) -> str | None:
        """Words of the reason for which this must be refused, or None if it must compile."""
        return self.variant.refused.get(self.dtype) if self.target.runtime == "gpu" else None

    def arguments(self, sharding: SingleDeviceSharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        sizes = SIZES[self.size] | self.variant.sizes

        def describe(name: str, axes: str) -> jax.ShapeDtypeStruct:
            dtype = jnp.dtype("float32" if name in WIDE else self.dtype)
            return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), dtype, sharding=sharding)

        return {name: describe(name, axes) for name, axes in self.variant.arguments.items()}

    def program(self, arguments: dict[str, jax.Array]) -> Any:
        """Outputs of the op, or gradients of a sum over them."""

        def forward(arguments):
            return self.variant.op(**arguments, implementation=f"pallas_{self.target.runtime}", **self.variant.options)

        def total(arguments):
            return sum(each.astype(jnp.float32).sum() for each in forward(arguments))

        return forward(arguments) if self.passes == "forward" else jax.grad(total)(arguments)


def cases(only: str = "") -> list[Case]:
    """All programs, or those whose names have this in them."""
    every = [Case(*each) for each in product(VARIANTS, TARGETS, SIZES, DTYPES, PASSES)]
    return [case for case in every if only in " / ".join(case.names.values())]
