"""The structured matrices, entry by entry, and the block around them."""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import StructuredConfig, structured
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

FORMS = [
    ("dense", False),
    ("dft", False),
    *((structure, data) for structure in ("toeplitz", "vandermonde", "cauchy", "low_rank") for data in (False, True)),
]
B, L, D, E, H, K, C = 2, 7, 5, 6, 3, 4, 11


def config_of(structure: str, data: bool, **changes) -> StructuredConfig:
    return StructuredConfig(structure, data, D, E, H, K, kernel=3, context=C, **changes)


def silu(x):
    return x / (1 + np.exp(-x))


def entry(structure, data, p, q_LHK, k_LHK, i, j, h) -> float:
    """An entry of M before the scale, as the paper and the authors' code have it."""
    q, k = q_LHK[i, h], k_LHK[j, h]
    if structure == "dense":
        return p["matrix"][h, i, j]
    if structure == "dft":
        return math.cos(2 * math.pi * i * j / C)
    if structure == "toeplitz":
        return q_LHK[i - j, h, 0] if i >= j else k_LHK[j - i, h, 0]
    if structure == "vandermonde":
        if data:
            return sum(np.cos(2 * np.pi * 1e-3 * q * j) - np.cos(2 * np.pi * 1e-3 * k * i))
        return sum(np.cos(2 * np.pi * q * j) + np.cos(2 * np.pi * k * i))
    if structure == "cauchy":
        bias = math.exp(p["log_bias"]) if data else 0
        return sum(1 / ((np.exp(q) + bias) + (np.exp(k) + bias) + 1e-8))
    return q @ k


def reference(params, config: StructuredConfig, x_LD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M (H, L, L) and the output."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, data = len(x_LD), config.data_dependent
    z_LE, u_LN = np.split(x_LD @ p["input"], [E], axis=1)
    padded = np.pad(u_LN, ((1, 1), (0, 0)))
    u_LN = sum(padded[i : i + length] * p["conv"][i] for i in range(3)) + p["conv_bias"]
    v_LHV = silu(u_LN[:, :E]).reshape(length, H, -1)
    q_LHK = k_LHK = np.zeros((length, H, 0))
    if data:
        qk_LN = silu(u_LN[:, E:]) if config.structure in ("toeplitz", "low_rank") else u_LN[:, E:]
        q_LHK, k_LHK = (part.reshape(length, H, -1) for part in np.split(qk_LN, 2, axis=1))
    elif "q" in p:
        q_LHK, k_LHK = p["q"], p["k"]
    scale = {"dense": C, "dft": C, "toeplitz": 4 * C, "vandermonde": 2 * C * K}.get(config.structure, C * K) ** -0.5
    m_HLL = np.array(
        [
            [
                [scale * entry(config.structure, data, p, q_LHK, k_LHK, i, j, h) for j in range(length)]
                for i in range(length)
            ]
            for h in range(H)
        ]
    )
    y_LE = (v_LHV + np.einsum("HLM,MHV->LHV", m_HLL, v_LHV)).reshape(length, E)
    normed = y_LE / np.sqrt((y_LE**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]
    return m_HLL, (normed * silu(z_LE)) @ p["out"]


def mixer_of(structure: str):
    return getattr(structured, structure.upper())


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: form[0] + ("-data" if form[1] else ""))
def case(request, random_params) -> Case:
    config = config_of(*request.param)
    return Case(mixer_of(request.param[0]), config, random_params(structured.init, config), sequence(B, L, D))


def matrix_of(case: Case, x_BLD=None, segments=None) -> np.ndarray:
    x_BLD = case.x_BLD if x_BLD is None else x_BLD
    m_BHLL = jax.jit(structured.matrix, static_argnums=1)(case.params, case.config, x_BLD, segments)
    return np.asarray(m_BHLL, np.float64) - np.eye(x_BLD.shape[1])


def test_every_form_against_its_definition(case):
    expected, y_LD = reference(case.params, case.config, np.asarray(case.x_BLD[1], np.float64))
    np.testing.assert_allclose(matrix_of(case)[1], expected, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(run(case, case.x_BLD)[1], y_LD, rtol=1e-4, atol=1e-5)
    x_BLD = sequence(B, C, D)
    _, y_LD = reference(case.params, case.config, np.asarray(x_BLD[0], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[0], y_LD, rtol=1e-4, atol=1e-5)


def test_forms_without_data_are_constants_of_limited_length(case):
    longer_BLD = sequence(B, C + 1, D)
    if case.config.data_dependent:
        assert run(case, longer_BLD).shape == longer_BLD.shape
        assert (matrix_of(case)[0] != matrix_of(case)[1]).any()
        return
    m_HLL = matrix_of(case)[0]
    np.testing.assert_array_equal(m_HLL, matrix_of(case)[1])
    np.testing.assert_allclose(m_HLL[:, :5, :5], matrix_of(case, case.x_BLD[:, :5])[0], rtol=1e-5, atol=1e-7)
    for function in (structured.apply, structured.matrix):
        with pytest.raises(ValueError, match="has 12 steps, expected at most context 11"):
            function(case.params, case.config, longer_BLD)


def test_forms_without_data_keep_segments_apart(case):
    """Those with data are in the family's test."""
    ids_BL = jnp.array([[2, 5, 5, 2, 2, 2, 2], [4, 4, 4, 4, 1, 1, 6]])
    packed_BLD = run(case, case.x_BLD, ids_BL)
    for row, bounds in enumerate(((0, 1, 3, 7), (0, 4, 6, 7))):
        for start, stop in pairwise(bounds):
            alone = run(case, case.x_BLD[row : row + 1, start:stop])[0]
            np.testing.assert_allclose(packed_BLD[row, start:stop], alone, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("data", [False, True])
def test_toeplitz_by_fft_is_the_dense_product(random_params, monkeypatch, data):
    config = config_of("toeplitz", data)
    params, x_BLD = random_params(structured.init, config), sequence(B, L, D)
    dense_BLD = jax.jit(lambda x_BLD: structured.apply(params, config, x_BLD))(x_BLD)
    called = []
    convolve = structured._convolve
    monkeypatch.setattr(structured, "_FFT_LENGTH", L)
    monkeypatch.setattr(structured, "_convolve", lambda *args: called.append(1) or convolve(*args))
    by_fft_BLD = jax.jit(lambda x_BLD: structured.apply(params, config, x_BLD))(x_BLD)
    np.testing.assert_allclose(by_fft_BLD, dense_BLD, rtol=1e-4, atol=2e-6)
    assert called


@pytest.mark.parametrize("data", [False, True])
def test_a_toeplitz_matrix_has_constant_diagonals(random_params, data):
    config = config_of("toeplitz", data)
    m_BHLL = matrix_of(Case(structured.TOEPLITZ, config, random_params(structured.init, config), sequence(B, L, D)))
    np.testing.assert_allclose(m_BHLL[..., 1:, 1:], m_BHLL[..., :-1, :-1], rtol=0, atol=1e-6)
    assert (m_BHLL[..., 0, 1] != m_BHLL[..., 1, 0]).all()


def test_the_dft_of_a_whole_context(random_params):
    config = config_of("dft", False)
    case = Case(structured.DFT, config, random_params(structured.init, config), sequence(B, C, D))
    expected = np.fft.fft(np.eye(C)).real / math.sqrt(C)
    np.testing.assert_allclose(matrix_of(case), np.broadcast_to(expected, (B, H, C, C)), rtol=0, atol=1e-6)


def test_a_low_rank_matrix_has_low_rank(random_params):
    config = StructuredConfig("low_rank", True, D, E, H, 2, kernel=3, context=C)
    case = Case(structured.LOW_RANK, config, random_params(structured.init, config), sequence(B, L, D))
    for m_LL in matrix_of(case)[0]:
        singular = np.linalg.svd(m_LL, compute_uv=False)
        assert singular[1] > 1e-3 * singular[0]
        assert singular[2] < 1e-5 * singular[0]


def test_initial_values():
    def init(structure, data=False, context=C):
        config = StructuredConfig(structure, data, D, E, H, K, context=context)
        return jax.jit(structured.init, static_argnums=1)(jax.random.key(0), config)

    assert np.isclose(np.exp(init("cauchy", True)["log_bias"]), 0.5)
    assert not init("vandermonde")["q"].any()
    assert set(init("dft")) == set(init("low_rank", True)) == {"input", "conv", "conv_bias", "norm", "out"}
    for structure in ("low_rank", "cauchy"):
        q = np.asarray(init(structure, context=401)["q"])
        assert q.shape == (401, H, K)
        assert abs(q.std() / math.sqrt(2 / ((H + 401) * K)) - 1) < 0.05
    matrix = np.asarray(init("dense", context=83)["matrix"])
    assert abs(matrix.std() / math.sqrt(2 / (83 * (H + 83))) - 1) < 0.05
    taps = np.abs(np.asarray(init("toeplitz", context=401)["q"]))
    limit = math.sqrt(6 / (H + 2 * 401 - 1))
    assert 0.99 * limit < taps.max() <= limit


def test_a_config_says_what_it_can_not_be():
    with pytest.raises(ValueError, match="structure is 'sparse', expected one of"):
        StructuredConfig("sparse")  # pyright: ignore[reportArgumentType]
    for structure in ("dense", "dft"):
        with pytest.raises(ValueError, match=f"{structure} has only a data-independent form"):
            StructuredConfig(structure)
        assert not mixer_of(structure).config(4, 2, causal=False).data_dependent
    with pytest.raises(ValueError, match="kernel is 4, expected an odd number"):
        StructuredConfig(kernel=4)
    with pytest.raises(ValueError, match="sizes must be positive"):
        StructuredConfig(context=0)
    with pytest.raises(ValueError, match="not divisible by heads 5"):
        StructuredConfig(heads=5)
    assert structured.CAUCHY.config(4, 2, causal=False).data_dependent
    assert not structured.CAUCHY.config(4, 2, causal=False, data_dependent=False).data_dependent
