"""Mamba-2 against its recurrence, one step and head at a time, from tensors as models publish them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, Mamba2Config, mamba2, mixing_matrix
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

matrix = jax.jit(mixing_matrix, static_argnums=(0, 2))

D, E, H, P, N, G, W = 5, 20, 10, 2, 3, 5, 4
CONFIG = Mamba2Config(width=D, expand=4, head_dim=P, state=N, groups=G, kernel=W)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def published() -> dict[str, np.ndarray]:
    """Tensors of one block, by their names and with the axes of a PyTorch module."""
    rng = np.random.default_rng(0)
    channels = E + 2 * G * N
    shapes = {
        "in_proj.weight": (E + channels + H, D),
        "conv1d.weight": (channels, 1, W),
        "conv1d.bias": (channels,),
        "A_log": (H,),
        "D": (H,),
        "dt_bias": (H,),
        "norm.weight": (E,),
        "out_proj.weight": (D, E),
    }
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def reference(tensors: dict[str, np.ndarray], config: Mamba2Config, x_LD: np.ndarray) -> np.ndarray:
    s_HNP, y_LD = np.zeros((H, N, P)), np.zeros_like(x_LD)
    z_LE, u_LC, dt_LH = np.split(x_LD @ tensors["in_proj.weight"].T, [E, 2 * E + 2 * G * N], axis=1)
    for t in range(len(x_LD)):
        conv_C = tensors["conv1d.bias"].copy()
        for lag in range(min(W, t + 1)):
            conv_C += tensors["conv1d.weight"][:, 0, W - 1 - lag] * u_LC[t - lag]
        x_E, b_GN, c_GN = np.split(silu(conv_C), [E, E + G * N])
        x_HP, b_GN, c_GN = x_E.reshape(H, P), b_GN.reshape(G, N), c_GN.reshape(G, N)
        y_HP = np.zeros((H, P))
        for h in range(H):
            group = h * G // H
            dt = np.clip(np.log1p(np.exp(dt_LH[t, h] + tensors["dt_bias"][h])), *config.time_step_limit)
            s_HNP[h] = np.exp(-dt * np.exp(tensors["A_log"][h])) * s_HNP[h] + dt * np.outer(b_GN[group], x_HP[h])
            y_HP[h] = c_GN[group] @ s_HNP[h] + tensors["D"][h] * x_HP[h]
        gated = (y_HP.reshape(E) * silu(z_LE[t])).reshape(config.norm_groups, -1)
        normed = gated / np.sqrt(np.mean(gated**2, axis=1, keepdims=True) + config.norm_epsilon)
        y_LD[t] = tensors["out_proj.weight"] @ (normed.reshape(E) * tensors["norm.weight"])
    return y_LD


@pytest.mark.parametrize(("norm_groups", "limit"), [(1, (0.0, math.inf)), (5, (0.4, 0.9))])
def test_mamba2_against_the_recurrence(norm_groups, limit):
    config = Mamba2Config(D, 4, P, N, groups=G, norm_groups=norm_groups, kernel=W, time_step_limit=limit)
    tensors = published()
    x_BLD = sequence(2, 11, D)
    case = Case(mamba2.MIXER, config, mamba2.from_published(tensors), x_BLD)
    expected = reference(tensors, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_published_tensors_have_the_shapes_of_init():
    shapes = jax.eval_shape(lambda: mamba2.init(jax.random.key(0), CONFIG))
    loaded = mamba2.from_published(published())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_sizes_of_the_smallest_published_model():
    """768 wide, 24 heads of 64, 128 states: the projection has 2 E + 2 N + H = 3352 columns."""
    config = Mamba2Config(width=768, head_dim=64, state=128)
    shapes = jax.eval_shape(lambda: mamba2.init(jax.random.key(0), config))
    assert config.heads == 24
    assert shapes["in_proj"].shape == (768, 3352)
    assert shapes["conv"].shape == (4, 1792)
    assert shapes["out_proj"].shape == (1536, 768)


def test_the_matrix_is_semiseparable():
    """Blocks below the diagonal have rank N, however large; the skip is on the diagonal alone."""
    params, x_BLD = mamba2.from_published(published()), sequence(1, 16, D)
    m_HLM = np.asarray(matrix(mamba2.MIXER, params, CONFIG, x_BLD)[0], np.float64)
    for cut in (5, 8, 11):
        singular = np.linalg.svd(m_HLM[:, cut:, :cut], compute_uv=False)
        assert (singular[:, N:] < 1e-5 * singular[:, :1]).all()
        assert (singular[:, N - 1] > 1e-5 * singular[:, 0]).all()
    bare = matrix(mamba2.MIXER, params | {"D": jnp.zeros(H)}, CONFIG, x_BLD)[0]
    skip_HLM = np.asarray(params["D"])[:, None, None] * np.eye(16)
    np.testing.assert_allclose(m_HLM - bare, skip_HLM, rtol=1e-5, atol=1e-6)


def test_mamba2_starts_as_published():
    config = Mamba2Config(width=1000, expand=2, head_dim=1, state=1)
    params = jax.jit(mamba2.init, static_argnums=1)(jax.random.key(0), config)
    rate_H = np.exp(np.asarray(params["A_log"], np.float64))
    np.testing.assert_allclose(np.quantile(rate_H, [0, 0.5, 1]), [1, 8.5, 16], atol=0.6)
    size_H = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert 1e-3 * 0.999 < size_H.min() < 1.1e-3
    assert 0.09 < size_H.max() < 0.1001
    for name, value in (("D", 1), ("norm", 1), ("conv_bias", 0)):
        np.testing.assert_array_equal(params[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": 0}, "sizes must be positive"),
        ({"width": 5, "head_dim": 3}, "inner width 10 is not divisible by head_dim 3"),
        ({"groups": 3}, "4 heads are not divisible by groups 3"),
        ({"norm_groups": 3}, "4 heads are not divisible by norm_groups 3"),
        ({"time_step_min": 0.2}, r"time_step_min is 0\.2 and time_step_max 0\.1, expected 0 < time_step_min"),
        ({"time_step_limit": (1.0, 0.5)}, r"time_step_limit is \(1\.0, 0\.5\), expected 0 <= low < high"),
    ],
)
def test_mamba2_refuses_a_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**arguments)


def test_mamba2_needs_heads_that_divide_the_width():
    with pytest.raises(ValueError, match="mamba2: width 15 is not divisible by heads 4"):
        MIXERS["mamba2"].config(15, 4)
