"""Nystromformer against the formula, its limits, and the landmarks that it shares with LARA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import heads, nystromformer
from seqmod.mixers.nystromformer import NystromformerConfig
from tests.seqmod.mixers.dense import full_attention, join, segment_means, softmax, split
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L = 6, 3, 11


def formula(params, x_LD, landmarks: int, iterations: int) -> np.ndarray:
    q, k, v = split(params, x_LD)
    q = q / np.sqrt(q.shape[-1])
    ql, kl = segment_means(q, landmarks), segment_means(k, landmarks)
    f, a, g = (softmax(one @ two.swapaxes(1, 2)) for one, two in ((q, kl), (ql, kl), (ql, k)))
    eye = np.eye(a.shape[-1])
    inverse = []
    for a_RR in a:
        z_RR = a_RR.T / a_RR.sum(0).max()
        for _ in range(iterations):
            az_RR = a_RR @ z_RR
            z_RR = z_RR @ (13 * eye - az_RR @ (15 * eye - az_RR @ (7 * eye - az_RR))) / 4
        inverse.append(z_RR)
    return join(params, f @ np.stack(inverse) @ (g @ v))


@pytest.mark.parametrize(("landmarks", "length"), [(4, 11), (3, 9), (1, 11), (16, 5)])
def test_it_is_the_formula(random_params, landmarks, length):
    config = NystromformerConfig(width=D, heads=H, landmarks=landmarks)
    params = random_params(nystromformer.init, config)
    x_BLD = sequence(2, L, D)
    # Valid steps with padding before, after and between them are the sequence of these alone.
    where = np.sort(np.random.default_rng(3).permutation(L)[:length])
    mask_BL = jnp.zeros((2, L), bool).at[:, where].set(True)
    y_BLD = run(Case(nystromformer.MIXER, config, params, x_BLD), x_BLD, mask_BL)
    np.testing.assert_allclose(y_BLD[1, where], formula(params, x_BLD[1, where], landmarks, 6), rtol=1e-4, atol=1e-5)


def test_a_landmark_for_every_step_and_the_exact_inverse_make_full_attention(random_params):
    config = NystromformerConfig(width=D, heads=H, landmarks=L, iterations=40)
    params = random_params(nystromformer.init, config, scale=1.0)
    with jax.enable_x64(True):
        x_1LD = jnp.asarray(np.random.default_rng(1).standard_normal((1, L, D)))
        y_LD = nystromformer.apply(params, config, x_1LD)[0]
        np.testing.assert_allclose(y_LD, full_attention(params, x_1LD[0]), atol=1e-6)


def test_steps_towards_the_inverse_converge():
    rng = np.random.default_rng(0)
    matrices = softmax(3 * rng.standard_normal((2, 1, 5, 5)))
    matrices[1, 0, 4], matrices[1, 0, :, 4] = 0, 0
    with jax.enable_x64(True):
        inverse = nystromformer.pseudo_inverse(jnp.asarray(matrices), 30)
        np.testing.assert_allclose(inverse, np.linalg.pinv(matrices, rcond=1e-10), atol=1e-9)


def test_the_start_of_the_inverse_is_a_head_s_own():
    """The largest column sum over a batch would make a sequence's output depend on the others."""
    one, two = softmax(np.random.default_rng(0).standard_normal((2, 1, 1, 5, 5)))
    both = jnp.asarray(np.concatenate([one, two], axis=1), jnp.float32)
    start = nystromformer.pseudo_inverse(both, 0)
    for head, a in enumerate((one, two)):
        np.testing.assert_allclose(start[:, head], a[:, 0].swapaxes(1, 2) / a.sum(2).max(), rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 4, 7, 11])
def test_landmarks_divide_the_valid_steps(length):
    mask_BL = np.zeros((2, L), bool)
    mask_BL[0, :length] = True
    mask_BL[1, L - length :] = True
    shares_BLR, live_BR = heads.landmark_shares(jnp.asarray(mask_BL), 4)
    R = min(4, length)
    np.testing.assert_array_equal(live_BR, [[slot < R for slot in range(4)]] * 2)
    assert (np.asarray(shares_BLR)[~mask_BL] == 0).all()
    for row in range(2):
        means_RL = segment_means(np.eye(length)[None], 4)[0]
        np.testing.assert_allclose(shares_BLR[row, mask_BL[row], :R].T, means_RL, rtol=1e-6)
        assert (np.asarray(shares_BLR)[row, :, R:] == 0).all()


def test_no_valid_step_is_no_error(random_params):
    config = NystromformerConfig(width=D, heads=H)
    params = random_params(nystromformer.init, config)
    y_BLD = nystromformer.apply(params, config, sequence(1, 5, D), jnp.zeros((1, 5), bool))
    assert np.isfinite(y_BLD).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "width 64 is not divisible by heads 5"),
        ({"landmarks": 0}, "landmarks is 0, expected at least 1"),
        ({"iterations": -1}, "iterations is -1, expected at least 0"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NystromformerConfig(**arguments)
