"""ProbSparse attention against the paper's algorithm, and its limit."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import mixing_matrix, probsparse
from seqmod.mixers.probsparse import ProbSparseConfig
from tests.seqmod.mixers.dense import full_attention, join, softmax, split
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L = 6, 3, 29


def algorithm(params, x_LD, size: int, seed: int) -> tuple[np.ndarray, list[set[int]]]:
    """Outputs, and the selected queries of each head."""
    sampled = np.argsort(np.random.default_rng(seed).random(len(x_LD)))[:size]
    heads = split(params, x_LD)
    y_HLK, selected = np.zeros_like(heads[0]), []
    for h, (q, k, v) in enumerate(zip(*heads, strict=True)):
        scores = q @ k[sampled].T
        top = np.argsort(-(scores.max(1) - scores.mean(1)))[:size]
        y_HLK[h] = v.mean(0)
        for t in top:
            y_HLK[h, t] = softmax(k @ q[t] / math.sqrt(q.shape[-1])) @ v
        selected.append(set(top.tolist()))
    return join(params, y_HLK), selected


@pytest.mark.parametrize(("factor", "length"), [(1, 29), (2, 29), (1, 13), (3, 13), (1, 1), (1, 2)])
def test_it_is_the_algorithm(random_params, factor, length):
    config = ProbSparseConfig(width=D, heads=H, factor=factor, seed=5)
    params = random_params(probsparse.init, config)
    x_BLD = sequence(2, L, D)
    where = np.sort(np.random.default_rng(3).permutation(L)[:length])
    mask_BL = jnp.zeros((2, L), bool).at[:, where].set(True)
    size = max(1, min(length, factor * math.ceil(math.log(length))))
    assert size == probsparse.sample_size(config, length)
    padded_BLD = jnp.where(mask_BL[..., None], x_BLD, 100 * x_BLD)
    y_BLD = run(Case(probsparse.MIXER, config, params, x_BLD), padded_BLD, mask_BL)
    m_BHLL = np.asarray(mixing_matrix(probsparse.MIXER, params, config, x_BLD, mask_BL=mask_BL))
    for row in range(2):
        expected, selected = algorithm(params, x_BLD[row, where], size, seed=5)
        np.testing.assert_allclose(y_BLD[row, where], expected, rtol=1e-4, atol=1e-5)
        if size < length:
            for h, steps in enumerate(selected):
                uneven = np.ptp(m_BHLL[row, h][np.ix_(where, where)], axis=1) > 1e-6
                assert set(np.flatnonzero(uneven)) == steps


def test_every_query_selected_is_full_attention(random_params):
    config = ProbSparseConfig(width=D, heads=H, factor=L)
    params = random_params(probsparse.init, config)
    x_BLD = sequence(2, L, D)
    y_BLD = run(Case(probsparse.MIXER, config, params, x_BLD), x_BLD)
    np.testing.assert_allclose(y_BLD[1], full_attention(params, x_BLD[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "width 64 is not divisible by heads 5"),
        ({"factor": 0}, "factor is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProbSparseConfig(**arguments)
