"""Local attention: its window, and blocks that give what the dense form gives in memory linear in the length."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, attention, dot_product
from tests.seqmod.mixers.family import sequence

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("causal", [True, False])
def test_the_window_is_that_of_cab(causal):
    config = MIXERS["local"].config(6, 3, causal=causal)
    params = attention.init(jax.random.key(0), config)
    m_BHLM = np.asarray(attention.matrix(params, config, sequence(1, 41, 6)))
    for t in range(41):
        seen = np.flatnonzero((m_BHLM[0] > 0).all(0)[t])
        ahead = 0 if causal else 15
        assert list(seen) == list(range(max(0, t - (14 if causal else 15)), min(40, t + ahead) + 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": "t5", "buckets": 8, "max_distance": 13},
        {"position": "alibi", "soft_cap": 0.8},
        {"position": "rope", "window": 1},
        {"window": 37},
    ],
    ids=str,
)
def test_blocks_are_the_dense_form(monkeypatch, random_params, causal, options):
    """Outputs and gradients, with segments that end within a block, at a block, and span several."""
    config = replace(MIXERS["local"].config(12, 6, causal=causal), groups=2, head_dim=4, **options)
    L = 5 * dot_product.block_length(config.window) + 3
    params = random_params(attention.init, config, scale=0.6)
    x_BLD = sequence(2, L, 12)
    segment_ids = jnp.broadcast_to(jnp.arange(L), (2, L))
    segment_ids = jnp.stack([segment_ids[0] // 50, jnp.where((segment_ids[1] >= 32) & (segment_ids[1] < 71), 1, 0)])
    weight_BLD = sequence(2, L, 12, seed=2)

    def both():
        def outputs(params, x_BLD, segments):
            y_BLD = attention.apply(params, config, x_BLD, segments)
            return (y_BLD * weight_BLD).sum(), y_BLD

        run = jax.jit(jax.grad(outputs, (0, 1), has_aux=True))
        return [run(params, x_BLD, segments) for segments in (None, segment_ids)]

    in_blocks = both()
    with monkeypatch.context() as patch:
        patch.setattr(dot_product, "_attend_in_blocks", None)
        with pytest.raises(TypeError):
            both()
        patch.setattr(dot_product, "block_length", lambda window: L)
        dense = both()
    for ours, theirs in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear_in_the_length(causal):
    """Of the gradient too, at 8192 steps, where L x L scores of one head alone would have 256 MiB."""
    config = MIXERS["local"].config(8, 2, causal=causal)
    params = jax.eval_shape(lambda: attention.init(jax.random.key(0), config))

    def temporary_bytes(length):
        x_BLD = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        grad = jax.jit(jax.grad(lambda params, x_BLD: attention.apply(params, config, x_BLD).sum(), (0, 1)))
        return grad.lower(params, x_BLD).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert long < 4.2 * short
    assert long < 32 * 2**20
