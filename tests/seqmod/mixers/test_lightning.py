"""The Lightning block against its recurrence, one step and head at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, LightningConfig, lightning
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(params, config: LightningConfig, x_LD: np.ndarray, slopes: list[float]) -> np.ndarray:
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    s_HKV, y_LD = np.zeros((config.heads, config.head_dim, config.head_dim)), np.zeros_like(x_LD)
    for t, x_D in enumerate(x_LD):
        qkv = np.einsum("D,DGHK->GHK", x_D, p["qkv"])
        q_HK, k_HK, v_HV = qkv * sigmoid(qkv)
        y_HV = np.zeros_like(v_HV)
        for h, slope in enumerate(slopes):
            s_HKV[h] = np.exp(-config.layer_factor * slope) * s_HKV[h] + np.outer(k_HK[h], v_HV[h])
            y_HV[h] = q_HK[h] @ s_HKV[h]
        gate_HV = sigmoid(np.einsum("R,RHV->HV", x_D @ p["gate_down"], p["gate_up"]))
        y_LD[t] = np.einsum("HV,HVD->D", gate_HV * y_HV / np.sqrt(np.mean(y_HV**2) + 1e-6), p["out"])
    return y_LD


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_lightning_against_the_recurrence(random_params, factor):
    config = LightningConfig(width=5, heads=3, head_dim=7, gate_rank=2, layer_factor=factor)
    params = random_params(lightning.init, config, scale=0.7)
    x_BLD = sequence(2, 11, 5)
    expected = reference(params, config, np.asarray(x_BLD[1], np.float64), [2**-4, 2**-8, 2**-2])
    np.testing.assert_allclose(run(Case(lightning.MIXER, config, params, x_BLD), x_BLD)[1], expected, 1e-3, 1e-4)


def test_slopes_are_those_of_alibi():
    np.testing.assert_allclose(lightning.slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(lightning.slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    np.testing.assert_allclose(lightning.slopes(1), [1 / 256])
    for heads in range(1, 33):
        slopes = lightning.slopes(heads)
        assert slopes.shape == (heads,)
        assert len(set(slopes)) == heads


def test_the_factor_goes_from_one_to_almost_nothing():
    np.testing.assert_allclose([lightning.layer_factor(layer, 3) for layer in range(3)], [1.00001, 0.50001, 1e-5])
    assert lightning.layer_factor(0, 1) == 1.0


def test_without_decay_the_values_are_weighed_by_scores_alone(random_params):
    config = LightningConfig(width=5, heads=2, head_dim=3, layer_factor=0.0)
    params = random_params(lightning.init, config)
    x_BLD = sequence(2, 7, 5)
    qkv = jnp.einsum("BLD,DGHK->GBLHK", x_BLD, params["qkv"])
    q_BLHK, k_BLHK, _ = np.asarray(qkv, np.float64) * sigmoid(np.asarray(qkv, np.float64))
    expected = np.tril(np.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK))
    np.testing.assert_allclose(lightning.matrix(params, config, x_BLD), expected, rtol=1e-4, atol=1e-6)


def test_lightning_refuses_a_bad_config():
    with pytest.raises(ValueError, match="sizes must be positive"):
        LightningConfig(gate_rank=0)
    with pytest.raises(ValueError, match=r"layer_factor is -0\.5, expected at least 0"):
        LightningConfig(layer_factor=-0.5)
    with pytest.raises(ValueError, match="width 15 is not divisible by heads 4"):
        MIXERS["lightning"].config(15, 4)
