"""Errors of the kernels against float64, for the table in `kernels/README.md`.

The oracle is the token scan of the same op in float64, on the same inputs: those in bfloat16 are rounded first, so that
what is measured is the computation, and the rounding of results to bfloat16. Errors are relative, in the L2 norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import cases, contenders

SIZES = cases.Sizes(H=2, K=32, V=32, D=64, real=128, complex=128)
LENGTHS = {
    "reference": (256, 4096),
    "scan": (256, 4096),
    "chunked": (256, 4096),
    "pallas_tpu interpreted": (256,),
    "pallas_gpu interpreted": (64,),
}
# Their token scan has a written backward pass; the others have no `scan`.
SCANNED = ("linear", "linear_head", "linear_channel", "delta", "delta_gated")


@dataclass(frozen=True)
class Error:
    """Relative errors of the output and of the gradient that is worst, or the reason why there are none."""

    case: str
    narrow: bool
    implementation: str
    length: int
    output: float = float("nan")
    gradient: float = float("nan")
    worst: str = ""
    reason: str = ""


def _results(case: str, implementation: str, arrays: dict, cotangent):
    run = contenders.find(case, f"ours {implementation}")

    def both(arrays, cotangent):
        output, pull = jax.vjp(lambda arrays: run(**arrays), arrays)
        return output, pull(cotangent.astype(output.dtype))[0]

    output, gradients = jax.jit(both)(arrays, cotangent)
    wide = np.complex128 if case == "complex" else np.float64
    return {name: np.asarray(array).astype(wide) for name, array in ({"y": output} | gradients).items()}


def compare(case: str, narrow: bool, implementation: str, length: int, sizes: cases.Sizes = SIZES) -> Error:
    """Errors of one implementation on one case."""
    drawn = cases.draw(case, length, sizes)
    arrays = {
        name: jnp.asarray(array, jnp.bfloat16 if narrow and name not in cases.WIDE else array.dtype)
        for name, array in drawn.items()
    }
    cotangent = arrays.pop("cotangent")
    wide = np.complex128 if case == "complex" else np.float64
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(array).astype(wide)) for name, array in arrays.items()}
        wanted = _results(case, "reference", exact, jnp.asarray(np.asarray(cotangent).astype(wide)))
    try:
        found = _results(case, implementation, arrays, cotangent)
    except NotImplementedError as error:
        return Error(case, narrow, implementation, length, reason=str(error))
    errors = {
        name: float(np.linalg.norm((found[name] - wanted[name]).ravel()) / np.linalg.norm(wanted[name].ravel()))
        for name in wanted
    }
    output = errors.pop("y")
    worst = max(errors, key=lambda name: errors[name])
    return Error(case, narrow, implementation, length, output, errors[worst], worst)


def measure(which: Sequence[str]) -> list[Error]:
    """Errors of all implementations that a case has; complex numbers have no narrow form."""
    return [
        compare(case, narrow, implementation, length)
        for case in which
        for narrow in ((False,) if case == "complex" else (False, True))
        for implementation, lengths in LENGTHS.items()
        for length in lengths
        if implementation != "scan" or case in SCANNED
    ]


def table(errors: Sequence[Error]) -> str:
    """Markdown: a row for each case and kind of inputs, a column for each implementation and length; then refusals."""
    columns = list(dict.fromkeys((error.implementation, error.length) for error in errors))
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for error in errors:
        inputs = "bfloat16" if error.narrow else "complex64" if error.case == "complex" else "float32"
        cells.setdefault((error.case, inputs), {})[error.implementation, error.length] = (
            "refused" if error.reason else f"{error.output:.1e}, {error.gradient:.1e} ({error.worst})"
        )
    lines = [["case", "inputs", *(f"{name}, {length}" for name, length in columns)]]
    lines.append(["---"] * len(lines[0]))
    lines += [[*row, *(found.get(column, "-") for column in columns)] for row, found in cells.items()]
    refused = dict.fromkeys(f"- {error.case}: {error.reason}" for error in errors if error.reason)
    listed = ["", "Refused:", *refused] if refused else []
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + listed)
