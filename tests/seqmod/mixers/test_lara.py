"""LARA against the formula, and its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import lara
from seqmod.mixers.lara import LARAConfig
from tests.seqmod.mixers.dense import join, segment_means, softmax, split
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L = 6, 3, 11


def formula(params, x_LD, landmarks: int) -> np.ndarray:
    """One head, query and landmark at a time."""
    noise = np.asarray(params["fixed"]["noise"], np.float64)
    heads = split(params, x_LD)
    y_HLK = np.zeros_like(heads[0])
    for h, (q, k, v) in enumerate(zip(*heads, strict=True)):
        mu = (segment_means(q[None], landmarks) + segment_means(k[None], landmarks))[0]
        w = mu + noise[: len(mu), h]
        root = np.sqrt(q.shape[-1])

        def log_feature(x, w, root=root):
            return (w @ x - x @ x / 2) / root

        reads, masses = [], []
        for w_K in w:
            logs = np.array([log_feature(key, w_K) for key in k])
            reads.append(softmax(logs) @ v)
            masses.append(np.log(np.exp(logs).sum()))
        for t, query in enumerate(q):
            logits = [
                mu[c] @ query / root + log_feature(query, w[c]) + masses[c] - log_feature(mu[c], w[c])
                for c in range(len(mu))
            ]
            y_HLK[h, t] = softmax(np.array(logits)) @ np.array(reads)
    return join(params, y_HLK)


@pytest.mark.parametrize(("landmarks", "length"), [(4, 11), (3, 8), (16, 5)])
def test_it_is_the_formula(random_params, landmarks, length):
    config = LARAConfig(width=D, heads=H, landmarks=landmarks)
    params = random_params(lara.init, config)
    x_BLD = sequence(2, L, D)
    where = np.sort(np.random.default_rng(3).permutation(L)[:length])
    mask_BL = jnp.zeros((2, L), bool).at[:, where].set(True)
    y_BLD = run(Case(lara.MIXER, config, params, x_BLD), x_BLD, mask_BL)
    np.testing.assert_allclose(y_BLD[1, where], formula(params, x_BLD[1, where], landmarks), rtol=1e-4, atol=1e-5)


def test_with_one_landmark_all_queries_read_the_same(random_params):
    config = LARAConfig(width=D, heads=H, landmarks=1)
    y_BLD = lara.apply(random_params(lara.init, config), config, sequence(2, L, D))
    np.testing.assert_allclose(y_BLD, np.broadcast_to(y_BLD[:, :1], y_BLD.shape), atol=1e-6)
    assert np.abs(y_BLD).max() > 0.1


def test_noise_is_zero_at_first_and_standard_normal_when_drawn():
    config = LARAConfig(width=64, heads=4, landmarks=31)
    params = lara.init(jax.random.key(0), config)
    assert not np.asarray(params["fixed"]["noise"]).any()
    drawn = lara.resample(jax.random.key(1), params, config)
    noise = np.asarray(drawn["fixed"]["noise"])
    assert noise.shape == (31, 4, 16)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert drawn["qkv"] is params["qkv"]
    x_BLD = sequence(1, L, 64)
    assert not np.allclose(lara.apply(drawn, config, x_BLD), lara.apply(params, config, x_BLD), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heads": 5}, "width 64 is not divisible by heads 5"), ({"landmarks": 0}, "landmarks is 0, expected at least 1")],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LARAConfig(**arguments)
