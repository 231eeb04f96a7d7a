"""What the delta rule has of its own: the chunkwise form of its paper, tables of keys, and limits of its kernels."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import DeltaRuleBlocks, delta_rule
from tests.kernels.family import assert_close, draw
from tests.kernels.ops import DELTA

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_reference_is_the_published_chunkwise_form():
    """With the whole sequence as one chunk: U = (I + tril(diag(b) K K^T, -1))^-1 diag(b) (V - K S), O = Q S +
    tril(Q K^T) U, S' = S + K^T U (Yang et al., arXiv 2406.06484, equations 7 to 11)."""
    arguments, options, _ = draw(DELTA, "full")
    arguments["log_decay_BLH"] = np.zeros_like(arguments["log_decay_BLH"])
    o, final = delta_rule(**arguments, **options, implementation="reference")
    for b, h in np.ndindex(*o.shape[::2]):
        q, k, v = (np.asarray(arguments[name][b, :, h], np.float64) for name in ("q_BLHK", "k_BLHK", "v_BLHV"))
        beta, S = arguments["beta_BLH"][b, :, h, None], arguments["initial_state_BHKV"][b, h]
        written = np.linalg.inv(np.eye(len(k)) + np.tril(beta * (k @ k.T), -1)) @ (beta * (v - k @ S))
        assert_close(o[b, :, h], options["scale"] * (q @ S + np.tril(q @ k.T) @ written), 2e-6)
        assert_close(final[b, h], S + k.T @ written, 2e-6)


def test_the_reference_is_the_published_gated_recurrence():
    """S_t = S_{t-1} a_t (I - b_t k_t k_t^T) + b_t v_t k_t^T, the state transposed (arXiv 2412.06464, equation 10)."""
    arguments, options, _ = draw(DELTA, "full")
    o, final = delta_rule(**arguments, **options, implementation="reference")
    for b, h in np.ndindex(*o.shape[::2]):
        S = np.asarray(arguments["initial_state_BHKV"][b, h].T, np.float64)
        for t in range(o.shape[1]):
            q, k, v = (arguments[name][b, t, h] for name in ("q_BLHK", "k_BLHK", "v_BLHV"))
            a, beta = np.exp(arguments["log_decay_BLH"][b, t, h]), arguments["beta_BLH"][b, t, h]
            S = S @ (a * (np.eye(len(k)) - beta * np.outer(k, k))) + beta * np.outer(v, k)
            assert_close(o[b, t, h], options["scale"] * S @ q, 2e-5)
        assert_close(final[b, h], S.T, 2e-6)


def test_orthogonal_keys_store_and_replace_values():
    """With unit keys and beta = 1 a state is a table: writing a key again replaces its value, and nothing else."""
    K, V = DELTA.sizes["K"], DELTA.sizes["V"]
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, V)), jnp.float32)
    written = [0, 1, 2, 1, 0, 4]
    k = jnp.eye(K)[jnp.array(written)][None, :, None]
    _, final = delta_rule(k, k, v, jnp.ones((1, 6, 1)), implementation="chunked", blocks=DeltaRuleBlocks(chunk=4))
    wanted = np.zeros((K, V), np.float32)
    for step, row in enumerate(written):
        wanted[row] = v[0, step, 0]
    np.testing.assert_allclose(final[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(("heads", "K", "words"), [(1, 257, "257 numbers"), (8, 256, "8 queries .* 256 need")])
def test_what_the_gpu_has_no_room_for(heads, K, words):
    q, k, v, beta = (jnp.ones(shape) for shape in ((1, 2, heads, K), (1, 2, 1, K), (1, 2, 1, 8), (1, 2, 1)))
    with pytest.raises(NotImplementedError, match=f"delta_rule: .*'pallas_gpu'.* {words}"):
        delta_rule(q, k, v, beta, implementation="pallas_gpu")


def test_the_gpu_kernels_need_hopper(ampere):
    with pytest.raises(NotImplementedError, match="it needs compute capability"):
        delta_rule(**arrays(), implementation="pallas")


def arrays(**change: Any) -> dict[str, Any]:
    """Small arguments that are right, but for `change`."""
    shapes = {"q_BLHK": (2, 3, 4, 5), "k_BLHK": (2, 3, 4, 5), "v_BLHV": (2, 3, 4, 7), "beta_BLH": (2, 3, 4)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k_BLHK": np.ones((3, 4, 5))}, r"k has shape \(3, 4, 5\), expected \(B, L, H, K\)"),
        ({"k_BLHK": np.ones((2, 0, 4, 5))}, "k has length 0"),
        ({"q_BLHK": np.ones((2, 3, 6, 5))}, "q has 6 heads, expected a multiple of those of k, H = 4"),
        ({"q_BLHK": np.ones((2, 3, 4, 7))}, r"q has shape \(2, 3, 4, 7\), expected \(B, L, R H, K\) = \(2, 3, 4, 5\)"),
        ({"k_BLHK": np.ones((2, 3, 4, 5), int)}, "k has dtype int64, expected a real"),
        ({"v_BLHV": np.ones((2, 3, 1, 7))}, r"v has shape \(2, 3, 1, 7\)"),
        ({"beta_BLH": np.ones((2, 3, 1))}, r"beta has shape \(2, 3, 1\), expected \(B, L, H\) = \(2, 3, 4\)"),
        ({"log_decay_BLH": np.ones((2, 3, 4, 5))}, r"log_decay has shape \(2, 3, 4, 5\)"),
        ({"log_decay_BLH": np.full((2, 3, 4), 0.5)}, "log_decay has a positive entry, 0.5, expected none above 0"),
        ({"initial_state_BHKV": np.ones((2, 4, 7, 5))}, r"initial_state has shape \(2, 4, 7, 5\)"),
        ({"segment_ids": np.ones((3, 2), int)}, r"segment_ids has shape \(3, 2\), expected \(B, L\) = \(2, 3\)"),
        ({"segment_ids": np.ones((2, 3))}, "segment_ids has dtype float64, expected integers"),
        ({"implementation": "best"}, "implementation is 'best', expected one of"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=f"delta_rule: {words}"):
        delta_rule(**arrays(**change))


@pytest.mark.parametrize("chunk", [0, -4, 12])
def test_chunks_are_powers_of_two(chunk):
    with pytest.raises(ValueError, match=f"DeltaRuleBlocks: chunk is {chunk}, expected a power of two"):
        DeltaRuleBlocks(chunk=chunk)
