"""The Mamba block against its equations over tensors laid out as in published checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MambaConfig, mamba
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = MambaConfig(width=5, states=3, expand=2, kernel=4, rank=2, bias=True)


def published(config: MambaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by the names and in the shapes that the `transformers` package has."""
    rng, D, I = np.random.default_rng(seed), config.width, config.inner
    R, N, W = config.dt_rank, config.states, config.kernel
    shapes = {
        "in_proj.weight": (2 * I, D),
        "conv1d.weight": (I, 1, W),
        "x_proj.weight": (R + 2 * N, I),
        "dt_proj.weight": (I, R),
        "dt_proj.bias": (I,),
        "A_log": (I, N),
        "D": (I,),
        "out_proj.weight": (D, I),
    }
    if config.conv_bias:
        shapes["conv1d.bias"] = (I,)
    if config.bias:
        shapes |= {"in_proj.bias": (2 * I,), "out_proj.bias": (D,)}
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def silu(x):
    return x / (1 + np.exp(-x))


def mamba_reference(tensors: dict[str, np.ndarray], config: MambaConfig, x_LD: np.ndarray) -> np.ndarray:
    """The equations of the module's docstring, one step at a time."""
    R, N, W = config.dt_rank, config.states, config.kernel
    zero = np.zeros(1)
    uz_L2I = x_LD @ tensors["in_proj.weight"].T + tensors.get("in_proj.bias", zero)
    u_LI, z_LI = np.split(uz_L2I, 2, axis=-1)
    h_IN, y_LD = np.zeros((config.inner, N)), np.zeros_like(x_LD)
    for t in range(len(x_LD)):
        conv_I = np.zeros(config.inner) + tensors.get("conv1d.bias", zero)
        for lag in range(min(W, t + 1)):
            conv_I = conv_I + tensors["conv1d.weight"][:, 0, W - 1 - lag] * u_LI[t - lag]
        u_I = silu(conv_I)
        r_R, B_N, C_N = np.split(tensors["x_proj.weight"] @ u_I, [R, R + N])
        dt_I = np.log1p(np.exp(tensors["dt_proj.weight"] @ r_R + tensors["dt_proj.bias"]))
        h_IN = np.exp(-dt_I[:, None] * np.exp(tensors["A_log"])) * h_IN + (dt_I * u_I)[:, None] * B_N
        y_I = (h_IN @ C_N + tensors["D"] * u_I) * silu(z_LI[t])
        y_LD[t] = tensors["out_proj.weight"] @ y_I + tensors.get("out_proj.bias", zero)
    return y_LD


@pytest.mark.parametrize(
    "config", [CONFIG, MambaConfig(width=5, states=3, conv_bias=False)], ids=["all biases", "no biases"]
)
def test_published_tensors_give_the_published_block(config):
    tensors = published(config)
    params = mamba.from_published(config, tensors)
    case = Case(mamba.MIXER, config, params, sequence(2, 11, 5))
    expected = mamba_reference(tensors, config, np.asarray(case.x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_tensors_that_do_not_fit_are_refused():
    tensors = published(CONFIG)
    with pytest.raises(ValueError, match=r"tensors are \['A_log', .*, expected \['A_log'"):
        mamba.from_published(CONFIG, {name: x for name, x in tensors.items() if name != "D"})
    with pytest.raises(ValueError, match=r"x_proj.weight becomes \(10, 7\), expected \(10, 8\)"):
        mamba.from_published(CONFIG, tensors | {"x_proj.weight": tensors["x_proj.weight"][1:]})


def test_initial_values():
    config = MambaConfig(width=130, layers=7)
    assert (config.inner, config.dt_rank) == (260, 9)
    params = jax.jit(mamba.init, static_argnums=1)(jax.random.key(0), config)
    np.testing.assert_allclose(-np.exp(params["A_log"]), np.broadcast_to(-np.arange(1.0, 17), (260, 16)), rtol=1e-6)
    np.testing.assert_array_equal(params["skip"], 1)
    dt_I = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert 0.001 <= dt_I.min() * 1.0001 < 0.0012
    assert 0.09 < dt_I.max() <= 0.1001
    assert 0.32 < np.abs(params["dt_proj"]).max() <= 1 / 3
    np.testing.assert_allclose(np.square(params["out_proj"]).mean() * 260, 1 / 7, rtol=0.05)
    floored = jax.jit(mamba.init, static_argnums=1)(jax.random.key(0), MambaConfig(width=130, dt_floor=0.02))
    np.testing.assert_allclose(jax.nn.softplus(floored["dt_bias"]).min(), 0.02, rtol=1e-4)


def test_a_step_size_of_zero_changes_nothing():
    """Where dt is zero the state stays and only the skip is left, whatever the input."""
    config = MambaConfig(width=5, states=3)
    params = mamba.from_published(config, published(config))
    params["dt_bias"] = jnp.full(10, -1e3)
    m_BILL = jax.jit(mamba.matrix, static_argnums=1)(params, config, sequence(2, 7, 5))
    skip_IL = np.asarray(params["skip"])[:, None, None] * np.eye(7)
    np.testing.assert_array_equal(m_BILL, np.broadcast_to(skip_IL, (2, 10, 7, 7)))
    state = mamba.init_state(config, 2, 7)._replace(h_BIN=sequence(2, 10, 3))
    _, after = jax.jit(mamba.step, static_argnums=1)(params, config, sequence(2, 5), state)
    np.testing.assert_array_equal(after.h_BIN, state.h_BIN)


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="sizes must be positive"):
        MambaConfig(rank=0)
    with pytest.raises(ValueError, match="dt_floor is 0, expected a positive step size"):
        MambaConfig(dt_floor=0)
    with pytest.raises(ValueError, match=r"MambaConfig: dt_min is 0.5"):
        MambaConfig(dt_min=0.5)
