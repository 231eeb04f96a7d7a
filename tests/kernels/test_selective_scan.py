"""What the selective scan has of its own: the published layout, isolation from NaN, and limits of its kernels."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from kernels import SelectiveScanBlocks, selective_scan
from tests.kernels import family
from tests.kernels.family import assert_close, compute, draw
from tests.kernels.ops import SCAN

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("case", ["full", "groups"])
def test_the_reference_is_the_published_recurrence(case):
    """In the layout (B, D, L) and with the discretised arrays of the paper's own reference (arXiv 2312.00752), from a
    state of zero."""
    arguments, options, _ = draw(SCAN, case)
    del arguments["initial_state_BDN"]
    u, delta = (np.moveaxis(np.asarray(arguments[n], np.float64), 1, 2) for n in ("u_BLD", "delta_BLD"))
    A, B, C = (np.asarray(arguments[n], np.float64) for n in ("A_DN", "B_BLN", "C_BLN"))
    if case == "full":
        delta = np.log1p(np.exp(delta + arguments["delta_bias_D"][None, :, None]))
        B, C = B[:, :, None], C[:, :, None]
    B, C = (np.repeat(np.moveaxis(each, 1, 3), u.shape[1] // each.shape[2], axis=1) for each in (B, C))
    a_BDLN = np.exp(np.einsum("bdl,dn->bdln", delta, A))
    x_BDLN = np.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    state, outputs = np.zeros(a_BDLN[:, :, 0].shape), []
    for t in range(u.shape[2]):
        state = a_BDLN[:, :, t] * state + x_BDLN[:, :, t]
        outputs.append(np.einsum("bdn,bdn->bd", state, C[..., t]))
    y_BDL = np.stack(outputs, 2) + u * arguments["D_D"][None, :, None]
    if case == "full":
        z = np.moveaxis(np.asarray(arguments["z_BLD"], np.float64), 1, 2)
        y_BDL = y_BDL * z / (1 + np.exp(-z))
    y, final = selective_scan(**arguments, **options, implementation="reference")
    assert_close((y, final), (np.moveaxis(y_BDL, 2, 1), state), 2e-6)


@pytest.mark.parametrize("implementation", family.ALL)
def test_not_even_nan_crosses_a_boundary(implementation):
    drawn = draw(SCAN, "full")
    ids = np.repeat([[0, 1]], [8, family.LENGTH - 8], axis=1).repeat(2, axis=0).astype(np.int32)
    clean = drawn.arguments | {"segment_ids": ids}
    poisoned = clean | {"u_BLD": clean["u_BLD"].copy()}
    poisoned["u_BLD"][:, 3] = np.nan
    (y, final), _ = compute(SCAN, implementation, drawn._replace(arguments=clean))
    (y_poisoned, final_poisoned), _ = compute(SCAN, implementation, drawn._replace(arguments=poisoned))
    np.testing.assert_array_equal(y_poisoned[:, 8:], y[:, 8:])
    np.testing.assert_array_equal(final_poisoned, final)


def test_tpu_kernels_lower_with_chunks_below_a_tile():
    case, sizes, dtype = SCAN.lowered["tpu"][0]
    run = partial(selective_scan, implementation="pallas_tpu", blocks=SelectiveScanBlocks(chunk=4))
    text = family.lower(family.slopes(run), family.abstract(SCAN, case, sizes, dtype), "tpu")
    assert text.count(family.CALLS["tpu"]) == 2


def test_too_many_states_for_the_gpu():
    arguments = arrays(A_DN=-np.ones((4, 49)), B_BLN=np.ones((2, 3, 49)), C_BLN=np.ones((2, 3, 49)))
    with pytest.raises(NotImplementedError, match=r"selective_scan: .*'pallas_gpu'.* 49 states, more than 48"):
        selective_scan(**arguments, implementation="pallas_gpu")


def test_the_gpu_kernels_need_hopper(ampere):
    with pytest.raises(NotImplementedError, match="it needs compute capability"):
        selective_scan(**arrays(), implementation="pallas")


def arrays(**change: Any) -> dict[str, Any]:
    """Small arguments that are right, but for `change`."""
    shapes = {"u_BLD": (2, 3, 4), "delta_BLD": (2, 3, 4), "A_DN": (4, 5), "B_BLN": (2, 3, 5), "C_BLN": (2, 3, 5)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | {"A_DN": -np.ones((4, 5))} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u_BLD": np.ones((3, 4))}, r"u has shape \(3, 4\), expected \(B, L, D\)"),
        ({"u_BLD": np.ones((2, 0, 4))}, "u has length 0"),
        ({"u_BLD": np.ones((2, 3, 4), int)}, "u has dtype int64, expected a real"),
        ({"A_DN": np.ones((4, 5), np.complex64)}, "A has dtype complex64, expected a real"),
        ({"A_DN": np.ones(4)}, r"A has shape \(4,\), expected \(D, N\)"),
        ({"delta_BLD": np.ones((2, 3, 5))}, r"delta has shape \(2, 3, 5\), expected \(B, L, D\) = \(2, 3, 4\)"),
        ({"B_BLN": np.ones((2, 3, 3, 5))}, "B has 3 groups, expected a divisor of D = 4"),
        ({"C_BLN": np.ones((2, 3, 1, 5))}, r"C has shape \(2, 3, 1, 5\), expected \(B, L, N\) = \(2, 3, 5\)"),
        ({"A_DN": np.full((4, 5), 0.5)}, "A has a positive entry, 0.5, expected none above 0"),
        ({"D_D": np.ones(5)}, r"D has shape \(5,\)"),
        ({"z_BLD": np.ones((2, 3, 1))}, r"z has shape \(2, 3, 1\)"),
        ({"delta_bias_D": np.ones((1, 4))}, r"delta_bias has shape \(1, 4\)"),
        ({"initial_state_BDN": np.ones((2, 5, 4))}, r"initial_state has shape \(2, 5, 4\)"),
        ({"segment_ids": np.ones((3, 2), int)}, r"segment_ids has shape \(3, 2\), expected \(B, L\) = \(2, 3\)"),
        ({"segment_ids": np.ones((2, 3))}, "segment_ids has dtype float64, expected integers"),
        ({"implementation": "best"}, "implementation is 'best', expected one of"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=f"selective_scan: {words}"):
        selective_scan(**arrays(**change))


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"channels": -1}, {"unroll": 0}])
def test_block_sizes_are_positive(sizes):
    with pytest.raises(ValueError, match="SelectiveScanBlocks: sizes must be positive"):
        SelectiveScanBlocks(**sizes)
