"""Sources of symbols whose exact conditional probabilities are known.

All are one kind of thing: a machine with S hidden states that emits one of X symbols at each step while it moves,

    joint_SXS[s, x, s'] = P(emit x and move to s' | in s),

started from its stationary distribution. Markov chains of any order, hidden Markov models, probabilistic automata and
the markings of a block-structured process are special cases. What comes next given the past, and what a hidden symbol
is given all others, are then sums over paths of states, taken exactly by the forward and backward recursions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Source(NamedTuple):
    """A source of X symbols with S states: `start_S` and `joint_SXS`, whose last two axes sum to 1."""

    start_S: np.ndarray
    joint_SXS: np.ndarray


def source(joint_SXS: np.ndarray) -> Source:
    """The source started from its stationary distribution, found as the left eigenvector of eigenvalue 1."""
    joint_SXS = np.asarray(joint_SXS, np.float64)
    if not np.allclose(joint_SXS.sum((1, 2)), 1) or (joint_SXS < 0).any():
        raise ValueError("source: entries of a state must be probabilities that sum to 1")
    move_SS = joint_SXS.sum(1)
    S = len(move_SS)
    # pi (P - 1) = 0 with sum(pi) = 1, as one least-squares problem.
    system = np.concatenate([move_SS.T - np.eye(S), np.ones((1, S))])
    start_S = np.linalg.lstsq(system, np.append(np.zeros(S), 1.0), rcond=None)[0]
    return Source(np.maximum(start_S, 0) / np.maximum(start_S, 0).sum(), joint_SXS)


def markov(seed: int, symbols: int, order: int, concentration: float = 0.5) -> Source:
    """A Markov chain of an order: the state is the last `order` symbols; rows are drawn from a Dirichlet."""
    rng = np.random.default_rng(seed)
    S = symbols**order
    joint = np.zeros((S, symbols, S))
    for state, row in enumerate(rng.dirichlet(np.full(symbols, concentration), S)):
        for symbol, p in enumerate(row):
            joint[state, symbol, (state * symbols + symbol) % S] = p
    return source(joint)


def hidden_markov(seed: int, states: int, symbols: int, stay: float = 0.8) -> Source:
    """A hidden Markov model whose state is kept with probability `stay`, else drawn anew, and emits before it moves."""
    rng = np.random.default_rng(seed)
    emit_SX = rng.dirichlet(np.full(symbols, 0.3), states)
    move_SS = stay * np.eye(states) + (1 - stay) * rng.dirichlet(np.ones(states), states)
    return source(emit_SX[:, :, None] * move_SS[:, None])


def automaton(edges: Sequence[Sequence[tuple[int, int]]], symbols: int) -> Source:
    """A probabilistic automaton: of a state's edges (symbol, next state), each is taken with equal probability."""
    joint = np.zeros((len(edges), symbols, len(edges)))
    for state, out in enumerate(edges):
        for symbol, after in out:
            joint[state, symbol, after] += 1 / len(out)
    return source(joint)


def reber() -> Source:
    """The embedded Reber grammar (Cleeremans et al., 1989), one string after the other: what follows the inner string
    depends on the symbol before it. Symbols B T P S X V E are 0 to 6."""
    B, T, P, S, X, V, E = range(7)
    # Nodes of the inner grammar after its B: the pairs of (symbol, node); 5 is its end.
    inner = [[(T, 1), (P, 2)], [(S, 1), (X, 3)], [(T, 2), (V, 4)], [(X, 2), (S, 5)], [(P, 3), (V, 5)]]
    edges: list[list[tuple[int, int]]] = [[(B, 1)], [(T, 2), (P, 2 + 8)]]
    for branch, outer in enumerate((T, P)):
        first = 2 + 8 * branch  # emits the inner B
        edges.append([(B, first + 1)])
        edges += [[(symbol, first + 1 + node) for symbol, node in out] for out in inner]
        edges.append([(E, first + 7)])  # the inner end
        edges.append([(outer, 18)])
    edges.append([(E, 0)])
    return automaton(edges, 7)


def process() -> Source:
    """A block-structured process, as a Petri net's markings: A, then B C in parallel with D or E F, then G, which is
    repeated with probability one half, then H, and again. Symbols A to H are 0 to 7. Of the transitions that a marking
    enables each is taken with equal probability."""
    A, B, C, D, E, F, G, H = range(8)
    left = {0: [(B, 1)], 1: [(C, 2)]}  # 2 is done
    right = {0: [(D, 2), (E, 1)], 1: [(F, 2)]}
    names = {"start": 0, **{(i, j): 1 + 3 * i + j for i in range(3) for j in range(3)}, "loop": 10}
    edges: list[list[tuple[int, int]]] = [[] for _ in range(11)]
    edges[names["start"]] = [(A, names[0, 0])]
    for i in range(3):
        for j in range(3):
            edges[names[i, j]] = [(x, names[after, j]) for x, after in left.get(i, [])]
            edges[names[i, j]] += [(x, names[i, after]) for x, after in right.get(j, [])]
    edges[names[2, 2]] = [(G, names["loop"])]
    edges[names["loop"]] = [(G, names["loop"]), (H, names["start"])]
    return automaton(edges, 8)


def draw(source: Source, key: jax.Array, batch: int, length: int) -> jax.Array:
    """Symbols (B, L) of a source."""
    S, X = source.joint_SXS.shape[:2]
    log_joint = jnp.log(jnp.asarray(source.joint_SXS, jnp.float32).reshape(S, X * S))
    k_start, k_steps = jax.random.split(key)
    state_B = jax.random.categorical(k_start, jnp.log(jnp.asarray(source.start_S, jnp.float32)), shape=(batch,))

    def step(state_B: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn_B = jax.random.categorical(key, log_joint[state_B])
        return drawn_B % S, drawn_B // S

    return jax.lax.scan(step, state_B, jax.random.split(k_steps, length))[1].T


def predict(source: Source, symbols_BL: jax.Array) -> jax.Array:
    """P(symbol t + 1 | symbols 0 .. t), (B, L, X), by the forward recursion."""
    joint_SXS = jnp.asarray(source.joint_SXS, jnp.float32)

    def step(belief_BS: jax.Array, symbol_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        belief_BS = jnp.einsum("BS,BST->BT", belief_BS, joint_SXS[:, symbol_B].swapaxes(0, 1))
        belief_BS = belief_BS / belief_BS.sum(-1, keepdims=True)
        return belief_BS, jnp.einsum("BS,SXT->BX", belief_BS, joint_SXS)

    start_BS = jnp.broadcast_to(jnp.asarray(source.start_S, jnp.float32)[None], (len(symbols_BL), len(joint_SXS)))
    return jnp.swapaxes(jax.lax.scan(step, start_BS, symbols_BL.T)[1], 0, 1)


def fill_in(source: Source, symbols_BL: jax.Array, hidden_BL: jax.Array) -> jax.Array:
    """P(symbol t | all symbols that are not hidden, but t), (B, L, X), by the forward and backward recursions."""
    joint_SXS = jnp.asarray(source.joint_SXS, jnp.float32)
    S, X = joint_SXS.shape[:2]
    seen_LBX = jnp.where(hidden_BL[..., None], 1.0, jax.nn.one_hot(symbols_BL, X)).swapaxes(0, 1)

    def forward(belief_BS: jax.Array, seen_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        after_BS = jnp.einsum("BS,BX,SXT->BT", belief_BS, seen_BX, joint_SXS)
        return after_BS / after_BS.sum(-1, keepdims=True), belief_BS

    def backward(rest_BS: jax.Array, seen_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        before_BS = jnp.einsum("BT,BX,SXT->BS", rest_BS, seen_BX, joint_SXS)
        return before_BS / before_BS.sum(-1, keepdims=True), rest_BS

    B = len(symbols_BL)
    start_BS = jnp.broadcast_to(jnp.asarray(source.start_S, jnp.float32)[None], (B, S))
    _, before_LBS = jax.lax.scan(forward, start_BS, seen_LBX)
    _, after_LBS = jax.lax.scan(backward, jnp.ones((B, S)), seen_LBX, reverse=True)
    p_BLX = jnp.einsum("LBS,SXT,LBT->BLX", before_LBS, joint_SXS, after_LBS)
    return p_BLX / p_BLX.sum(-1, keepdims=True)
