"""One chunk of the delta rule as a few matrix products: what the chunked form and the kernels have in common.

With G_i the sum of the log-decays up to step i of the chunk and S the state that enters it, the rows written to the
state, u_i = b_i (v_i - e^{g_i} S_{i-1}^T k_i), solve a unit lower triangular system,

    (I + strictly lower part of b_i e^{G_i - G_j} k_i.k_j) U = b (V - e^G K S),

after which the chunk is linear attention with U in place of V:

    O = e^G Q S + (lower part of e^{G_i - G_j} q_i.k_j) U,    S' = e^{G_C} S + (e^{G_C - G} K)^T U.

That is the WY form, with the solution of the triangular system in place of its inverse. No exponent is positive: the
sums of log-decays between two steps are formed as such, masked before they are added up, not as differences of
cumulative sums, which lose the weak decays that follow a strong one. Steps on two sides of a segment boundary do not
see each other.

All arrays are matrices of one head: per-step numbers are rows (1, C), and the R queries of a step that share a state
are R blocks of C rows.
"""

import jax
import jax.numpy as jnp


def matmul(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Product that contracts these axes, in full precision where the default is less."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def solve(lower_CC: jax.Array, right_CV: jax.Array) -> jax.Array:
    """X of (I + lower) X = right, for a strictly lower triangular matrix, by matrix products; C is a power of two.

    The inverse of the blocks on the diagonal grows from 1 to C: that of [[a, 0], [c, b]] is [[a', 0], [-b' c a', b']]
    where a' and b' are those of a and b. Unlike a series of powers it is as stable as substitution, and unlike
    substitution it runs in kernels, and on a CPU without a call to BLAS for each small system.
    """
    return _solve(lower_CC, right_CV)[0]


def _solve(lower_CC: jax.Array, right_CV: jax.Array):
    C = lower_CC.shape[0]
    i_CC = jax.lax.broadcasted_iota(jnp.int32, (C, C), 0)
    j_CC = jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)
    zero = jnp.zeros((), lower_CC.dtype)
    inverse_CC = jnp.where(i_CC == j_CC, jnp.ones((), lower_CC.dtype), zero)
    for level in range(C.bit_length() - 1):
        # Blocks of 2**level steps that are the lower and the left one of a pair.
        i_block, j_block = (jax.lax.shift_right_logical(each, jnp.int32(level)) for each in (i_CC, j_CC))
        c_CC = jnp.where((i_block == j_block + 1) & (i_block % 2 == 1), lower_CC, zero)
        inverse_CC = inverse_CC - matmul(matmul(inverse_CC, c_CC), inverse_CC)
    solution_CV = matmul(inverse_CC, right_CV)
    return solution_CV, (inverse_CC, solution_CV)


def _solve_backward(residuals, d_CV: jax.Array):
    inverse_CC, solution_CV = residuals
    d_CV = matmul(inverse_CC, d_CV, (0, 0))
    return -matmul(d_CV, solution_CV, (1, 1)), d_CV


solve.defvjp(_solve, _solve_backward)


def run_chunk(
    S_KV: jax.Array,
    q_RCK: jax.Array,
    k_CK: jax.Array,
    v_CV: jax.Array,
    beta_1C: jax.Array,
    log_decay_1C: jax.Array | None,
    run_1C: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The state after the chunk and its outputs (R C, V).

    `run_1C` counts the segment boundaries of the chunk up to and with each step; where it is 0 the state still reaches.
    """
    C, dtype = k_CK.shape[0], k_CK.dtype
    i_CC = jax.lax.broadcasted_iota(jnp.int32, (C, C), 0)
    j_CC = jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)
    zero = jnp.zeros((), dtype)

    def column(row_1C: jax.Array) -> jax.Array:
        return jnp.where(i_CC == j_CC, row_1C, jnp.zeros((), row_1C.dtype)).sum(1, keepdims=True)

    beta_C1, run_C1, last_11 = column(beta_1C), column(run_1C), run_1C.max(1, keepdims=True)
    seen_CC = (i_CC >= j_CC) & (run_C1 == run_1C)
    enters_C1, leaves_C1, stays_11 = run_C1 == 0, run_C1 == last_11, last_11 == 0
    if log_decay_1C is None:
        decay_CC, enter_C1, leave_C1, stay_11 = (
            jnp.where(mask, jnp.ones((), dtype), zero) for mask in (seen_CC, enters_C1, leaves_C1, stays_11)
        )
    else:
        # (i, j) is the sum over j < l <= i.
        ones_CC = jnp.where(i_CC >= j_CC, jnp.ones((), dtype), zero)
        between_CC = matmul(ones_CC, jnp.where(i_CC > j_CC, column(log_decay_1C), zero))
        until_C1 = jnp.where(i_CC >= j_CC, log_decay_1C, zero).sum(1, keepdims=True)
        after_C1 = jnp.where(i_CC < j_CC, log_decay_1C, zero).sum(1, keepdims=True)
        total_11 = log_decay_1C.sum(1, keepdims=True)
        decay_CC, enter_C1, leave_C1, stay_11 = (
            jnp.exp(jnp.where(mask, exponent, -jnp.inf))
            for mask, exponent in (
                (seen_CC, between_CC),
                (enters_C1, until_C1),
                (leaves_C1, after_C1),
                (stays_11, total_11),
            )
        )
    lower_CC = jnp.where(i_CC > j_CC, beta_C1 * decay_CC * matmul(k_CK, k_CK, (1, 1)), zero)
    write_CV = solve(lower_CC, beta_C1 * (v_CV - enter_C1 * matmul(k_CK, S_KV)))
    R = q_RCK.shape[0] // C
    enter_RC1, decay_RCC = (jnp.concatenate([each] * R) if R > 1 else each for each in (enter_C1, decay_CC))
    o_RCV = enter_RC1 * matmul(q_RCK, S_KV) + matmul(decay_RCC * matmul(q_RCK, k_CK, (1, 1)), write_CV)
    return stay_11 * S_KV + matmul(leave_C1 * k_CK, write_CV, (0, 0)), o_RCV
