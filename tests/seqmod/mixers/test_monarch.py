"""Monarch matrices, and long convolutions both ways and by polynomials, against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MonarchConfig, monarch
from seqmod.mixers import monarch_matrices as matrices
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")


def factors_of(*sizes: int) -> list[jax.Array]:
    shapes = [(*sizes[:s], *sizes[s + 1 :], size, size) for s, size in enumerate(sizes)]
    return [sequence(*shape, seed=s) for s, shape in enumerate(shapes)]


@pytest.mark.parametrize("sizes", [(5,), (3, 3), (2, 5), (2, 3, 5), (2, 2, 2, 2)])
def test_the_stages_are_the_dense_matrix(sizes):
    factors, x = factors_of(*sizes), sequence(4, math.prod(sizes))
    m = np.asarray(matrices.monarch_matrix(factors), np.float64)
    np.testing.assert_allclose(matrices.monarch(factors, x), np.asarray(x) @ m.T, rtol=1e-4, atol=1e-4)


def test_order_two_is_block_diagonal_between_permutations():
    """M = P L P R P with the b x b transposition P."""
    b = 3
    right, left = (np.asarray(factor, np.float64) for factor in factors_of(b, b))
    swap = np.eye(b * b)[np.arange(b * b).reshape(b, b).T.ravel()]

    def block_diagonal(blocks):
        m = np.zeros((b * b, b * b))
        for index, block in enumerate(blocks):
            m[index * b : (index + 1) * b, index * b : (index + 1) * b] = block
        return m

    expected = swap @ block_diagonal(left) @ swap @ block_diagonal(right) @ swap
    np.testing.assert_allclose(matrices.monarch_matrix(factors_of(b, b)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "order"), [(7, 1), (5, 2), (3, 3), (2, 5)])
def test_the_fourier_transform_is_a_monarch_matrix(size, order):
    x = np.random.default_rng(0).standard_normal((2, size**order))
    got = matrices.monarch(matrices.fourier_factors(size, order), jnp.asarray(x, jnp.complex64))
    np.testing.assert_allclose(got, np.fft.fft(x), rtol=1e-4, atol=1e-4)


# The mixer

SMALL = {"width": 3, "features": 5, "filter_width": 4, "filter_layers": 2}


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def filter_reference(p, config: MonarchConfig, length: int) -> np.ndarray:
    k_LD = np.zeros((length, config.width))
    slow, fast = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
    for t in range(length):
        # Bands from 1e-4 to one less than their number.
        angles = [f * 2 * math.pi * t / config.context for f in (1e-4, 1.0)]
        time = t / (config.context - 1)
        h = np.array([time, *map(math.cos, angles), *(-math.sin(angle) for angle in angles)])
        for layer in p["layers"][:-1]:
            h = np.sin(p["frequency"] * (h @ layer["kernel"] + layer["bias"]))
        decay_D = np.exp(-time * np.linspace(slow, fast, config.width))
        k_LD[t] = (h @ p["layers"][-1]["kernel"]) * decay_D
    return k_LD


def two_sided(filters, config: MonarchConfig, params, u_LD: np.ndarray) -> np.ndarray:
    L = len(u_LD)
    ahead, back = (filter_reference(filters[way], config, L) for way in ("ahead", "back"))
    y_LD = np.zeros_like(u_LD)
    for t in range(L):
        for s in range(L):
            y_LD[t] += (ahead[t - s] if s <= t else back[s - t - 1]) * u_LD[s]
    return y_LD


def by_polynomials(filters, config: MonarchConfig, params, u_LD: np.ndarray) -> np.ndarray:
    """M^-1 (M k * M u), with the complex Monarch matrix of N = b^2 and its inverse, for a whole number of blocks."""
    b = config.block
    n, N = b * b // 2, b * b
    low, high = np.tril(params["low"], -1), np.tril(params["high"], -1)
    low += np.diag(np.exp(np.diagonal(params["low"])))
    high += np.array([np.diag(np.exp(np.diagonal(each))) for each in params["high"]])
    root, block_root = np.exp(-2j * np.pi / N), np.exp(-2j * np.pi / b)
    m = np.zeros((N, N), complex)
    for i in range(N):
        for j in range(N):
            j1, j0 = divmod(j, b)
            left = sum(low[power, j0] * root ** (i * power) for power in range(j0, b))
            if j1 < b // 2:
                right = sum(high[j0, power, j1] * block_root ** (i % b * power) for power in range(j1, b // 2))
            else:
                right = block_root ** (i % b * j1)
            m[i, j] = left * right
    y_LD = np.zeros_like(u_LD)
    k_LD = filter_reference(filters["ahead"], config, len(u_LD))
    for d in range(u_LD.shape[1]):
        k, u = (np.pad(signal, (0, N - len(u_LD))) for signal in (k_LD[:, d], u_LD[:, d]))
        full = np.linalg.solve(m, (m @ k) * (m @ u))
        # A filter cut off at the sequence's end changes nothing before it.
        assert np.abs(full.imag).max() < 1e-9
        y_LD[:, d] = full.real[: min(n, len(u_LD))]
    return y_LD


def reference(params, config: MonarchConfig, x_LD: np.ndarray) -> np.ndarray:
    p = float64(params)
    L = len(x_LD)
    raw = np.pad(x_LD @ p["input"] + p["input_bias"], ((2, 0), (0, 0)))
    first, gate, value = np.split(sum(raw[i : i + L] * p["conv"][i] for i in range(3)) + p["conv_bias"], 3, axis=1)
    mix = by_polynomials if config.causal else two_sided
    signals = [first * value, x_LD]
    y = [mix(f, config, p, u) + f["direct"] * u for f, u in zip(p["filters"], signals, strict=False)]
    return (gate * y[0] + sum(y[1:])) @ p["out"] + p["out_bias"]


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_monarch_against_the_equations(random_params, causal, second):
    config = MonarchConfig(**SMALL, context=8, causal=causal, second=second)
    assert config.block == 4
    params = random_params(monarch.init, config)
    for length in (8, 5):
        x_BLD = sequence(2, length, 3)
        expected = reference(params, config, np.asarray(x_BLD[1], np.float64))
        case = Case(monarch.MIXER, config, params, x_BLD)
        np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_by_fft_and_by_matrix_are_the_same(random_params, monkeypatch, causal):
    config = MonarchConfig(**SMALL, context=18, causal=causal)
    params, x_BLD = random_params(monarch.init, config), sequence(2, 13, 3)
    dense_BLD = jax.jit(lambda x_BLD: monarch.apply(params, config, x_BLD))(x_BLD)
    monkeypatch.setattr(monarch, "_FFT_LENGTH", 2)
    monkeypatch.setattr(monarch, "_toeplitz", None)
    by_fft_BLD = jax.jit(lambda x_BLD: monarch.apply(params, config, x_BLD))(x_BLD)
    np.testing.assert_allclose(by_fft_BLD, dense_BLD, rtol=1e-4, atol=1e-5)


def long_matrix(params, config, length: int) -> np.ndarray:
    """The second convolution, which has no gate."""
    m_BHLL = jax.jit(monarch.matrix, static_argnums=1)(params, config, sequence(1, length, 3))
    return np.asarray(m_BHLL[0, 3:], np.float64)


def test_the_identity_gives_a_causal_convolution_and_no_other_does(random_params):
    config = MonarchConfig(**SMALL, context=18, causal=True)
    params = random_params(monarch.init, config)
    plain = params | {"low": jnp.zeros_like(params["low"]), "high": jnp.zeros_like(params["high"])}
    k_LD = filter_reference(float64(params)["filters"][1]["ahead"], config, 13)
    m_DLL = long_matrix(plain, config, 13)
    for d in range(3):
        first = k_LD[:, d] + np.eye(13)[0] * float(params["filters"][1]["direct"][d])
        np.testing.assert_allclose(m_DLL[d, :, 0], first, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(m_DLL[:, 1:, 1:], m_DLL[:, :-1, :-1], rtol=0, atol=1e-6)
    m_DLL = long_matrix(params, config, 13)
    assert np.abs(m_DLL[:, 1:, 1:] - m_DLL[:, :-1, :-1]).max() > 0.05


def test_the_backward_filter_starts_at_lag_one(random_params):
    config = MonarchConfig(**SMALL, context=18)
    params = random_params(monarch.init, config)
    filters = float64(params)["filters"][1]
    m_DLL = long_matrix(params, config, 7)
    ahead_LD, back_LD = (filter_reference(filters[way], config, 7) for way in ("ahead", "back"))
    diagonal = ahead_LD[0] + filters["direct"]
    np.testing.assert_allclose(m_DLL[:, 3, 3], diagonal, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(m_DLL[:, 3, 4], back_LD[0], rtol=1e-4, atol=1e-6)


def test_initial_values():
    config = MonarchConfig(width=5, context=200, causal=True, second=False)
    params = jax.jit(monarch.init, static_argnums=1)(jax.random.key(0), config)
    assert config.block == 20
    filters = params["filters"][0]["ahead"]
    assert (filters["frequency"] == 10).all()
    for layer, fan_in in zip(filters["layers"], (5, 128, 128, 128), strict=True):
        assert 0.95 * fan_in**-0.5 < np.abs(layer["kernel"]).max() <= fan_in**-0.5
    assert set(filters["layers"][3]) == {"kernel"}
    # Near the identity: the mixer starts near a convolution.
    assert float(np.abs(params["low"]).max()) < 0.1
    assert "low" not in jax.eval_shape(lambda: monarch.init(jax.random.key(0), MonarchConfig(width=5)))


@pytest.mark.parametrize("context", [1, 2, 3, 8, 9, 18, 128, 1024])
def test_blocks_hold_twice_the_context(context):
    b = MonarchConfig(context=context).block
    assert b % 2 == 0
    assert b * b >= 2 * context > (b - 2) ** 2


def test_monarch_refuses_what_it_can_not_do():
    with pytest.raises(ValueError, match="sizes must be positive"):
        MonarchConfig(context=0)
    with pytest.raises(ValueError, match="features is 4, expected an odd number"):
        MonarchConfig(features=4)
    config = MonarchConfig(width=3, context=8, causal=True)
    for call in (
        lambda: monarch.apply({}, config, jnp.ones((1, 9, 3))),
        lambda: monarch.matrix({}, config, jnp.ones((1, 9, 3))),
        lambda: monarch.init_state(config, 1, 9),
    ):
        with pytest.raises(ValueError, match="has 9 steps, expected at most context 8"):
            call()
