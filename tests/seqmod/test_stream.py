"""Streamed losses: the loss and gradient of the whole sequence, in a fraction of the memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import BackboneConfig, backbone
from seqmod.objectives import categorical_nll
from seqmod.rows import map_rows, sum_rows
from seqmod.stream import stream_loss

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, V = 2, 23, 7
CONFIG = BackboneConfig(
    vocabulary=V,
    heads=(("token", V), ("value", 1)),
    mixers=("attention", "rglru"),
    width=8,
    mlp=13,
    attention_heads=2,
    context=20,
)
RNG = np.random.default_rng(0)
TOKENS_BL = jnp.asarray(RNG.integers(0, V, (B, L)))
LABELS_BL = jnp.asarray(RNG.integers(0, V, (B, L)))
# A prompt of 5 steps does not count, nor does some padding.
WEIGHT_BL = jnp.asarray((np.arange(L) >= 5) & (np.arange(L) < np.array([[L], [L - 4]])), jnp.float32)


def step_loss(outputs, targets):
    labels, weight = targets
    nll = (categorical_nll(outputs["token"], labels) * weight).sum()
    return {"nll": nll + (jnp.square(outputs["value"][..., 0]) * weight).sum(), "count": weight.sum()}


def mean(sums):
    return sums["nll"] / sums["count"]


def plain(params, config, **options):
    outputs, _ = backbone.apply(params, config, TOKENS_BL, **options)
    return mean(step_loss(outputs, (LABELS_BL, WEIGHT_BL)))


@pytest.mark.parametrize("chunk", [1, 4, L, 100])
@pytest.mark.parametrize("scan", [False, True])
def test_loss_and_gradient_are_those_of_the_whole(random_params, chunk, scan):
    config = replace(CONFIG, scan=scan, conditioning=0)
    params = random_params(backbone.init, config)
    options = {"segment_ids": jnp.asarray(np.arange(L) >= 11).astype(jnp.int32)[None].repeat(B, 0)}

    @jax.jit
    def both(params):
        streamed = jax.value_and_grad(
            lambda p: mean(stream_loss(p, config, TOKENS_BL, (LABELS_BL, WEIGHT_BL), step_loss, chunk=chunk, **options))
        )(params)
        return streamed, jax.value_and_grad(lambda p: plain(p, config, **options))(params)

    (value, grads), (expected, expected_grads) = both(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for (path, got), want in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-6, jax.tree_util.keystr(path)


def test_a_loss_with_a_clip_is_a_sum_over_steps(random_params):
    """Group-relative policy optimisation: min(ratio A, clip(ratio) A), which has no gradient where it is clipped."""
    params = random_params(backbone.init, CONFIG)
    old_BL, advantage_BL = (jnp.asarray(RNG.standard_normal((B, L)), jnp.float32) for _ in range(2))

    def surrogate(outputs, targets):
        labels, old, advantage = targets
        ratio = jnp.exp(-categorical_nll(outputs["token"], labels) - (old - 2))
        return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage).sum()

    targets = (LABELS_BL, old_BL, advantage_BL)
    got = jax.jit(jax.grad(lambda p: stream_loss(p, CONFIG, TOKENS_BL, targets, surrogate, chunk=6)))(params)
    want = jax.jit(jax.grad(lambda p: surrogate(backbone.apply(p, CONFIG, TOKENS_BL)[0], targets)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


# Rows


def test_rows_are_mapped_and_summed_in_chunks_of_any_size():
    x = jnp.asarray(RNG.standard_normal((B, L, 3)), jnp.float32)
    weight = jnp.asarray(RNG.standard_normal((B, L)), jnp.float32)
    for chunk in (1, 5, L, 50):
        mapped = map_rows(lambda rows: jnp.sin(rows[0]) * rows[1][..., None], (x, weight), chunk)
        np.testing.assert_allclose(mapped, jnp.sin(x) * weight[..., None], rtol=1e-6)
        total = sum_rows(lambda x: {"x": x.sum(), "n": jnp.float32(x.shape[1])}, x, chunk)
        np.testing.assert_allclose(total["x"], x.sum(), rtol=1e-4, atol=1e-5)
        assert total["n"] == L
    with pytest.raises(ValueError, match="chunk is 0, expected at least 1"):
        sum_rows(jnp.sum, x, 0)
