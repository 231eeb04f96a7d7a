"""A sweep against its runs one by one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.sweep import grid, sweep

pytestmark = pytest.mark.usefixtures("quick_compile")


class Hyper(NamedTuple):
    rate: float | jax.Array = 0.5
    scale: float | jax.Array = 2.0
    shift: float | jax.Array = 1.0


def train(key, hyper, env_params=None):
    """A stand-in with the signature of any algorithm's: three noisy updates."""
    offset = 0.0 if env_params is None else env_params

    def update(state, noise):
        state = state + hyper.rate * (hyper.scale * noise + hyper.shift + offset)
        return state, {"loss": state}

    return jax.lax.scan(update, jnp.zeros(()), jax.random.normal(key, (3,)))


@pytest.mark.parametrize("at_once", [None, 1, 4])
def test_each_setting_gets_each_seed(at_once):
    hyper_H = grid(Hyper(), shift=[1.0, 2.0], rate=[0.1, 0.2, 0.3])
    np.testing.assert_allclose(hyper_H.shift, [1, 1, 1, 2, 2, 2])
    np.testing.assert_allclose(hyper_H.rate, [0.1, 0.2, 0.3] * 2, rtol=1e-6)
    np.testing.assert_allclose(hyper_H.scale, [2.0] * 6)
    state, metrics = sweep(train, jax.random.key(0), hyper_H, 5, 0.25, at_once=at_once)
    assert (state.shape, metrics["loss"].shape) == ((6, 5), (6, 5, 3))
    keys_S = jax.random.split(jax.random.key(0), 5)
    for setting, seed in ((0, 0), (4, 3), (5, 4)):
        hyper = jax.tree.map(lambda x, setting=setting: x[setting], hyper_H)
        _, wanted = train(jax.random.clone(keys_S[seed]), hyper, 0.25)
        np.testing.assert_allclose(metrics["loss"][setting, seed], wanted["loss"], rtol=1e-6)


@pytest.mark.parametrize("at_once", [None, 1])
def test_each_setting_of_an_offline_algorithm_gets_each_seed_and_all_data(at_once):
    hyper_H, data = grid(Hyper(), shift=[1.0, 2.0, 3.0]), jnp.array([0.25, 4.0])

    def offline(key, data, hyper):
        return train(key, hyper, data.sum())

    got = sweep(offline, jax.random.key(0), hyper_H, 2, data=data, at_once=at_once)
    wanted = sweep(train, jax.random.key(0), hyper_H, 2, 4.25, at_once=at_once)
    assert got[0].shape == (3, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_wrong_sweeps_are_named():
    with pytest.raises(ValueError, match="lerning_rate is no hyperparameter, expected some of"):
        grid(Hyper(), lerning_rate=[1.0])
    with pytest.raises(ValueError, match=r"rate is 1.0, expected a list"):
        grid(Hyper(), rate=1.0)
    with pytest.raises(ValueError, match=r"rate is \[\], expected a list"):
        grid(Hyper(), rate=[])
    for hyper_H in (Hyper(), grid(Hyper(), rate=[1.0, 2.0])._replace(rate=jnp.ones(3)), ()):
        with pytest.raises(ValueError, match=r"fields of hyper_H have shapes \[.*\], expected \(H,\) all"):
            sweep(train, jax.random.key(0), hyper_H, 1)
    with pytest.raises(ValueError, match="seeds is 0"):
        sweep(train, jax.random.key(0), grid(Hyper(), rate=[1.0]), 0)
    with pytest.raises(ValueError, match=r"at_once is 3, expected 1\.\.2"):
        sweep(train, jax.random.key(0), grid(Hyper(), rate=[1.0, 2.0]), 1, at_once=3)
