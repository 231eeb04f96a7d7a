"""Our own forms of every case, and the textbook ones that they are measured against.

Each contender is a function of the named arrays of `cases.draw` that returns the output, from a state of zeros.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.cases import CASES
from kernels import delta_rule, linear_attention, linear_recurrence, selective_scan

Contender = Callable[..., jax.Array]


def ours(case: str, implementation: str, interpret: Any = False) -> Contender:
    """The public op of a case, with a named implementation."""
    options = {"implementation": implementation, "interpret": interpret}

    def run(**arrays: jax.Array) -> jax.Array:
        if case.startswith("linear"):
            return linear_attention(arrays["q"], arrays["k"], arrays["v"], arrays.get("g"), **options)[0]
        if case.startswith("delta"):
            q, k, v, beta = (arrays[name] for name in ("q", "k", "v", "beta"))
            return delta_rule(q, k, v, beta, arrays.get("g"), **options)[0]
        if case == "selective":
            return selective_scan(*(arrays[name] for name in ("u", "delta", "A", "B", "C")), **options)[0]
        return linear_recurrence(arrays["a"], arrays["x"], **options)[0]

    return run


def _causal_decays(g_BLH: jax.Array | None, L: int) -> jax.Array:
    """exp(g_{j+1} + .. + g_i) for j <= i, else 0: (B, H, L, L), or (1, 1, L, L) without decay."""
    seen = jnp.tri(L, dtype=bool)[None, None]
    if g_BLH is None:
        return seen.astype(jnp.float32)
    sums_BHL = jnp.moveaxis(jnp.cumsum(g_BLH, axis=1), 1, 2)
    return jnp.exp(jnp.where(seen, sums_BHL[..., :, None] - sums_BHL[..., None, :], -jnp.inf))


def quadratic_linear(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None = None) -> jax.Array:
    """Linear attention as a product with its whole mixing matrix, (B, H, L, L); decays per head or none."""
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k) * _causal_decays(g, q.shape[1])
    return jnp.einsum("bhlm,bmhv->blhv", scores, v)


def quadratic_channel(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
    """The same with decays per channel: (B, H, L, L, K) numbers, since a product of two factors would overflow."""
    L = q.shape[1]
    sums = jnp.moveaxis(jnp.cumsum(g, axis=1), 1, 2)
    seen = jnp.tri(L, dtype=bool)[None, None, :, :, None]
    decay = jnp.exp(jnp.where(seen, sums[:, :, :, None] - sums[:, :, None], -jnp.inf))
    scores = jnp.einsum("blhk,bhlmk,bmhk->bhlm", q, decay, k)
    return jnp.einsum("bhlm,bmhv->blhv", scores, v)


def quadratic_delta(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array | None = None) -> jax.Array:
    """The delta rule as one triangular system of L equations, then a product with the mixing matrix."""
    L = q.shape[1]
    decay = _causal_decays(g, L)
    lower = jnp.tril(jnp.einsum("blhk,bmhk->bhlm", k, k) * decay, -1) * jnp.moveaxis(beta, 1, 2)[..., None]
    right = jnp.moveaxis(beta[..., None] * v, 1, 2)
    write = jax.scipy.linalg.solve_triangular(lower, right, lower=True, unit_diagonal=True)
    return jnp.einsum("bhlm,bhmv->blhv", jnp.einsum("blhk,bmhk->bhlm", q, k) * decay, write)


def _scan_diagonal(a: jax.Array, x: jax.Array) -> jax.Array:
    """All states of h_t = a_t h_{t-1} + x_t by `jax.lax.associative_scan`; `a` may have axes of length 1."""

    def join(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(join, (a, x), axis=1)[1]


def associative_linear(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None = None) -> jax.Array:
    """Linear attention from all its states."""
    writes = k[..., None] * v[..., None, :]
    log_decay = jnp.zeros((*k.shape[:3], 1)) if g is None else g.reshape(*k.shape[:3], -1)
    return jnp.einsum("blhk,blhkv->blhv", q, _scan_diagonal(jnp.exp(log_decay)[..., None], writes))


def associative_delta(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array | None = None
) -> jax.Array:
    """The delta rule from all its states: transitions are K x K matrices, whose product it takes."""
    steps = beta[..., None, None] * k[..., None]
    turn = jnp.eye(k.shape[-1])[None, None, None] - steps * k[..., None, :]
    if g is not None:
        turn = jnp.exp(g)[..., None, None] * turn

    def join(first, second):
        return second[0] @ first[0], second[0] @ first[1] + second[1]

    states = jax.lax.associative_scan(join, (turn, steps * v[..., None, :]), axis=1)[1]
    return jnp.einsum("blhk,blhkv->blhv", q, states)


def associative_selective(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
    """The selective scan from all its states."""
    decay = jnp.exp(delta[..., None] * A[None, None])
    return (_scan_diagonal(decay, (delta * u)[..., None] * B[:, :, None]) * C[:, :, None]).sum(-1)


def associative_recurrence(a: jax.Array, x: jax.Array) -> jax.Array:
    """The linear recurrence itself."""
    return _scan_diagonal(a, x)


QUADRATIC: dict[str, Contender] = {
    "linear": quadratic_linear,
    "linear_head": quadratic_linear,
    "linear_channel": quadratic_channel,
    "delta": quadratic_delta,
    "delta_gated": quadratic_delta,
}
ASSOCIATIVE: dict[str, Contender] = {
    "linear": associative_linear,
    "linear_head": associative_linear,
    "linear_channel": associative_linear,
    "delta": associative_delta,
    "delta_gated": associative_delta,
    "selective": associative_selective,
    "real": associative_recurrence,
    "complex": associative_recurrence,
}


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal softmax attention, by cuDNN on a GPU: a yardstick, not the same function."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def find(case: str, name: str) -> Contender:
    """The contender of that name.

    Raises:
        NotImplementedError: the case has none.
    """
    if name.startswith("ours "):
        implementation = name.removeprefix("ours ")
        interpreted = implementation.endswith(" interpreted")
        return ours(case, implementation.removesuffix(" interpreted"), interpreted)
    if name == "softmax attention" and case in CASES:
        return attention
    table = {"quadratic": QUADRATIC, "associative scan": ASSOCIATIVE}[name]
    if case not in table:
        raise NotImplementedError("one mixing matrix a channel, L x L each: no form worth running")
    return table[case]
