"""The hierarchy of two models: what is whole, what sees what, and samples one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import BackboneConfig, backbone, hierarchical
from seqmod.hierarchical import HierarchicalConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, K, F, Z = 2, 4, 3, 5, 7
CONFIG = HierarchicalConfig(
    low=BackboneConfig(inputs=F, heads=(("summary", Z),), mixers=("lru",), width=6, mlp=11, attention_heads=2),
    high=BackboneConfig(inputs=Z, heads=(("x", 2), ("y", 3)), mixers=("rglru",), width=8, mlp=13, attention_heads=2),
    factor=K,
)
X_BLF = jnp.asarray(np.random.default_rng(1).standard_normal((B, T * K, F)), jnp.float32)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(hierarchical.init, CONFIG)


apply = jax.jit(hierarchical.apply, static_argnums=1)


@jax.jit
def low(params, x_BLF):
    return backbone.apply(params, CONFIG.low, x_BLF)[0]["summary"]


@jax.jit
def high(params, z_BTZ):
    return backbone.apply(params, CONFIG.high, z_BTZ)[0]


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6), got, expected)


def test_it_is_the_high_model_of_last_outputs_of_chunks_alone(params):
    """One chunk at a time, each in a call of its own."""
    z_BTZ = jnp.stack([low(params["low"], X_BLF[:, i * K : (i + 1) * K])[:, -1] for i in range(T)], axis=1)
    expected = high(params["high"], z_BTZ)
    outputs = apply(params, CONFIG, X_BLF)
    assert {name: y.shape for name, y in outputs.items()} == {"x": (B, T, 2), "y": (B, T, 3)}
    assert_close(outputs, expected)


def test_an_output_sees_the_samples_up_to_the_end_of_its_chunk(params):
    @jax.jit
    def jacobian(x_LF):
        return jax.jacrev(lambda x_LF: hierarchical.apply(params, CONFIG, x_LF[None])["y"][0])(x_LF)

    seen_TL = np.abs(jacobian(X_BLF[0])).max((1, 3))
    expected_TL = np.arange(T * K)[None] < (np.arange(T)[:, None] + 1) * K
    np.testing.assert_array_equal(seen_TL > 0, expected_TL)


def test_samples_one_by_one_give_the_same(params):
    @jax.jit
    def stream(x_BLF, state):
        def step(state, x_BF):
            outputs, new, state = hierarchical.step(params, CONFIG, x_BF, state)
            return state, (outputs, new)

        return jax.lax.scan(step, state, jnp.swapaxes(x_BLF, 0, 1))

    cut = 7  # within a chunk
    state, start = stream(X_BLF[:, :cut], hierarchical.init_state(CONFIG, B, T * K))
    state, rest = stream(X_BLF[:, cut:], state)
    outputs, new_L = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), start, rest)
    np.testing.assert_array_equal(new_L, np.arange(T * K) % K == K - 1)
    streamed = {name: jnp.swapaxes(y_LB, 0, 1) for name, y_LB in outputs.items()}
    expected = apply(params, CONFIG, X_BLF)
    ends_T = hierarchical.chunk_ends(T * K, K)
    assert_close({name: y_BL[:, ends_T] for name, y_BL in streamed.items()}, expected)
    for name, y_BL in streamed.items():
        assert (y_BL[:, : K - 1] == 0).all()
        # Between the ends of chunks, outputs stay.
        np.testing.assert_array_equal(y_BL[:, K : 2 * K - 1], np.repeat(streamed[name][:, K - 1 : K], K - 1, axis=1))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), hierarchical.init_state(CONFIG, B, T * K))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes


def test_one_sample_per_chunk_leaves_the_high_model(params):
    """The low model then is a function of each sample alone."""
    config = HierarchicalConfig(CONFIG.low, CONFIG.high, factor=1)
    x_BLF = X_BLF[:, :5]
    z_BLZ = low(params["low"], x_BLF.reshape(B * 5, 1, F)).reshape(B, 5, Z)
    assert_close(apply(params, config, x_BLF), high(params["high"], z_BLZ))
    np.testing.assert_array_equal(hierarchical.chunk_ends(5, 1), np.arange(5))


def test_segments_of_chunks_are_sequences_of_their_own(params):
    packed = apply(params, CONFIG, X_BLF, segment_ids=jnp.array([[3, 1, 1, 1]] * B))
    alone = [apply(params, CONFIG, x) for x in (X_BLF[:, :K], X_BLF[:, K:])]
    assert_close(packed, {name: jnp.concatenate([part[name] for part in alone], axis=1) for name in packed})


def test_gradients_reach_all_of_both_models():
    def loss(params):
        return sum(jnp.square(y).sum() for y in hierarchical.apply(params, CONFIG, X_BLF).values())

    params = jax.jit(lambda key: hierarchical.init(key, CONFIG))(jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_helpers():
    np.testing.assert_array_equal(hierarchical.chunk_ends(11, 3), [2, 5, 8])
    doubled = hierarchical.with_differences(X_BLF)
    np.testing.assert_array_equal(doubled[..., :F], X_BLF)
    np.testing.assert_array_equal(doubled[:, 0, F:], 0)
    np.testing.assert_allclose(np.cumsum(doubled[..., F:], axis=1) + X_BLF[:, :1], X_BLF, atol=1e-5)


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(ValueError, match="x has 11 samples, expected a multiple of factor 3"):
        hierarchical.apply(params, CONFIG, X_BLF[:, :11])
    with pytest.raises(ValueError, match="factor is 0"):
        HierarchicalConfig(CONFIG.low, CONFIG.high, factor=0)
    with pytest.raises(ValueError, match=r"expected one, of the 7 inputs of high"):
        HierarchicalConfig(CONFIG.high, CONFIG.high)
    both_ways = BackboneConfig(inputs=F, heads=(("summary", Z),), mixers=("lru",), causal=False)
    with pytest.raises(ValueError, match="low has blocks that are not causal"):
        HierarchicalConfig(both_ways, CONFIG.high)
