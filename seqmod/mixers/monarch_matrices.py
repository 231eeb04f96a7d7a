"""Monarch matrices of any order (Dao et al., arXiv 2204.00595; Fu et al., arXiv 2310.12109).

A matrix of order p acts on vectors of N = n_0 n_1 .. n_{p-1} numbers in p stages, each of which turns one digit of the
index into another, by a matrix of its own for any value of the other digits. Of order 2, with blocks of b:

    M[i1 b + i0, j1 b + j0] = L_{i0}[i1, j0] R_{j0}[i0, j1]        2 b^3 multiplications for N = b^2

With digits j_0 .. j_{p-1} of an input's index, the most significant first, and i_{p-1} .. i_0 of an output's, factor s
has the shape (n_0, .., n_{p-1}) without n_s, then (n_s, n_s): it makes i_s of j_s, given i_0 .. i_{s-1} and
j_{s+1} .. j_{p-1}. The factors of order 2 are (R, L).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def monarch(factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """The product (..., N) of the matrix with these factors, and vectors x (..., N)."""
    order = len(factors)
    sizes = [factor.shape[-1] for factor in factors]
    digits = "abcdefgh"[:order]
    t = x.reshape(*x.shape[:-1], *sizes)
    for s, factor in enumerate(factors):
        others = digits.replace(digits[s], "")
        t = jnp.einsum(f"{others}y{digits[s]},...{digits}->...{digits.replace(digits[s], 'y')}", factor, t)
    return jnp.moveaxis(t, range(-order, 0), range(-1, -order - 1, -1)).reshape(x.shape)


def monarch_matrix(factors: Sequence[jax.Array]) -> jax.Array:
    """The matrix (N, N) of `monarch`: an entry is the product of one number of each factor."""
    order = len(factors)
    sizes = [factor.shape[-1] for factor in factors]
    made, given = "ABCDEFGH"[:order], "abcdefgh"[:order]
    terms = [made[:s] + given[s + 1 :] + made[s] + given[s] for s in range(order)]
    m = jnp.einsum(f"{','.join(terms)}->{made[::-1]}{given}", *factors)
    return m.reshape(math.prod(sizes), math.prod(sizes))


def fourier_factors(size: int, order: int) -> list[jax.Array]:
    """Factors of the discrete Fourier transform of size^order numbers, which is a Monarch matrix."""
    factors = []
    for s in range(order):
        # The output's index modulo size^(s + 1), by axes i_0 .. i_{s-1}, then order - 1 - s digits j, then i_s.
        made = np.zeros((size,) * order, np.int64)
        for r in range(s + 1):
            made += (
                np.arange(size).reshape([size if axis == (order - 1 if r == s else r) else 1 for axis in range(order)])
                * size**r
            )
        turns = made[..., None] * np.arange(size) % size ** (s + 1) / size ** (s + 1)
        factors.append(jnp.asarray(np.exp(-2j * np.pi * turns), jnp.complex64))
    return factors
