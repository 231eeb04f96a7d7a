"""What the benchmark of the kernels runs: cases, their inputs, and the work that each needs. NumPy only.

Inputs are drawn from the seed, the same in every process. A case is a function of named arrays with one output; what is
differentiated is that output's product with `cotangent`, with respect to every input.
"""

from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Rows of the batch; heads, keys and values of the matrix states; channels and states of the diagonal ones."""

    B: int = 1
    H: int = 4
    K: int = 64
    V: int = 64
    D: int = 256
    N: int = 16
    real: int = 1024
    complex: int = 512


CPU = Sizes()
GPU = Sizes(B=2, H=16, K=128, V=128, D=2048, N=16, real=4096, complex=2048)
TINY = Sizes(B=1, H=1, K=8, V=8, D=8, N=4, real=8, complex=4)
SIZES = {"cpu": CPU, "gpu": GPU, "tiny": TINY}

CASES = {
    "linear": "linear attention, no decay",
    "linear_head": "linear attention, decay per head and step",
    "linear_channel": "linear attention, decay per channel",
    "delta": "delta rule",
    "delta_gated": "gated delta rule",
    "selective": "selective scan",
    "real": "linear recurrence, real",
    "complex": "linear recurrence, complex",
}
# What decays are made of stays float32 where the other inputs are narrow.
WIDE = ("g", "beta", "delta", "A", "a")


def shapes(case: str, length: int, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs by name, in the order in which the op takes them."""
    B, L, H, K, V, D, N = sizes.B, length, sizes.H, sizes.K, sizes.V, sizes.D, sizes.N
    if case in ("real", "complex"):
        return dict.fromkeys(("a", "x"), (B, L, sizes.real if case == "real" else sizes.complex))
    if case == "selective":
        return {"u": (B, L, D), "delta": (B, L, D), "A": (D, N), "B": (B, L, N), "C": (B, L, N)}
    found: dict[str, tuple[int, ...]] = {"q": (B, L, H, K), "k": (B, L, H, K), "v": (B, L, H, V)}
    if case.startswith("delta"):
        found["beta"] = (B, L, H)
    if case in ("linear_head", "delta_gated"):
        found["g"] = (B, L, H)
    if case == "linear_channel":
        found["g"] = (B, L, H, K)
    return found


def output_shape(case: str, length: int, sizes: Sizes) -> tuple[int, ...]:
    """Shape of the output."""
    return shapes(case, length, sizes)[{"selective": "u", "real": "x", "complex": "x"}.get(case, "v")]


def draw(case: str, length: int, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs in float32 or complex64, and the `cotangent` of the output. Keys of the delta rule have unit length.

    Log-decays lie between -0.01 and -0.2 a step, so that some peers can be given them as products.
    """
    generator = np.random.default_rng([seed, length, *map(ord, case)])
    dtype = np.complex64 if case == "complex" else np.float32

    def normal(shape):
        found = generator.standard_normal(shape)
        return found + 1j * generator.standard_normal(shape) if case == "complex" else found

    arrays = {name: normal(shape) for name, shape in shapes(case, length, sizes).items()}
    if case.startswith("delta"):
        for name in "qk":
            arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
        arrays["beta"] = generator.uniform(0.1, 0.9, arrays["beta"].shape)
    elif case.startswith("linear"):
        arrays["q"] /= np.sqrt(sizes.K)
    if "g" in arrays:
        arrays["g"] = -generator.uniform(0.01, 0.2, arrays["g"].shape)
    if case == "selective":
        arrays["delta"] = generator.uniform(0.01, 0.1, arrays["delta"].shape)
        arrays["A"] = -np.broadcast_to(1.0 + np.arange(sizes.N), arrays["A"].shape)
    if case in ("real", "complex"):
        size = generator.uniform(0.8, 0.999, arrays["a"].shape)
        arrays["a"] = size * arrays["a"] / np.abs(arrays["a"]) if case == "complex" else size
    arrays["cotangent"] = normal(output_shape(case, length, sizes))
    return {name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()}


def flops(case: str, length: int, sizes: Sizes, backward: bool) -> float:
    """Floating-point operations that the recurrence itself needs, exponentials counted as one; chunked forms do more.

    Linear attention reads and writes a state of K V numbers, the delta rule reads it twice. A backward pass is counted
    as two forward ones.
    """
    steps = sizes.B * length
    each = {
        "real": 2 * sizes.real,
        "complex": 8 * sizes.complex,
        "selective": 7 * sizes.D * sizes.N,
        "linear": 4 * sizes.H * sizes.K * sizes.V,
        "delta": 6 * sizes.H * sizes.K * sizes.V,
        # Causal softmax attention, for the yardstick of the GPU: two products with half of all pairs.
        "attention": sizes.H * length * (sizes.K + sizes.V),
    }[case.split("_")[0]]
    return float(steps * each * (3 if backward else 1))


def traffic(case: str, length: int, sizes: Sizes, backward: bool, narrow: int) -> float:
    """Fewest bytes to and from memory: inputs and output once, with gradients thrice and twice.

    `narrow` is the size in bytes of what isn't `WIDE`.
    """
    width = 8 if case == "complex" else 4
    inputs = sum(
        prod(shape) * (width if name in WIDE else min(narrow, width))
        for name, shape in shapes(case, length, sizes).items()
    )
    output = prod(output_shape(case, length, sizes)) * min(narrow, width)
    return float(3 * inputs + 2 * output if backward else inputs + output)
