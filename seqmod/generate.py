"""Continue sequences of tokens with a causal backbone, by sampling or by beam search, in one compiled loop.

Prompts of several lengths are padded on the right: the loop feeds the prompt's token where there is one, and its own
otherwise. What may come next can be restricted by a `Legality`, a small machine that is told every token and says which
may follow: the rules of a game, a grammar, a list of words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmod import backbone
from seqmod.config import BackboneConfig
from seqmod.mixers.base import Params
from seqmod.residual import Edit

_NEVER = -1e30


class Legality(NamedTuple):
    """`advance(state, token_B)` gives the next state, whose leaves have a leading axis B, and which of the vocabulary
    may follow, (B, A). `state` is the one before the first token of the prompt."""

    state: Any
    advance: Callable[[Any, jax.Array], tuple[Any, jax.Array]]


class Generated(NamedTuple):
    """`tokens_BN` that follow the prompts, their natural-log probabilities `log_prob_BN` under the model as restricted
    by the legality (0 after the end), and `length_B`, the number of tokens up to and including the end."""

    tokens_BN: jax.Array
    log_prob_BN: jax.Array
    length_B: jax.Array


class Beams(NamedTuple):
    """`tokens_BWN` of the W best continuations, best first, and the sum of their log-probabilities `log_prob_BW`."""

    tokens_BWN: jax.Array
    log_prob_BW: jax.Array
    length_BW: jax.Array


def sample(
    params: Params,
    config: BackboneConfig,
    prompt_BP: jax.Array,
    steps: int,
    key: jax.Array,
    *,
    head: str = "token",
    prompt_length_B: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    end: int | None = None,
    legality: Legality | None = None,
    edits: Sequence[Edit] = (),
) -> Generated:
    """Sample `steps` tokens after each prompt.

    Args:
        prompt_BP: integer tokens, at least one; `prompt_length_B` says how many of a row count, all if it is absent.
        head: the output that holds the logits of the next token.
        temperature: divides the logits; 0 takes the likeliest token. Traced, so that it may vary without recompiling.
        top_k: sample from the likeliest `top_k` tokens only.
        end: a token after which a row repeats that token.
        legality: what may follow; a row in which nothing may follow gets log-probability -inf.
        edits: of the residual stream at every step, prompt included; operands have no L axis.

    Raises:
        ValueError: an empty prompt, no steps, a head that is not there, `top_k` or `end` outside of the vocabulary, a
            model that is not causal.
    """
    B, P = _check(config, prompt_BP, steps, head, end)
    A = dict(config.heads)[head]
    if top_k is not None and not 1 <= top_k <= A:
        raise ValueError(f"sample: top_k is {top_k}, expected 1 to {A}")
    length_B = jnp.full(B, P) if prompt_length_B is None else prompt_length_B
    temperature = jnp.asarray(temperature, jnp.float32)

    def one(carry, t):
        state, rules, token_B, ended_B = carry
        log_prob_BA, state, rules = _next(params, config, head, token_B, state, rules, legality, edits)
        scaled_BA = log_prob_BA / jnp.maximum(temperature, 1e-6)
        if top_k is not None:
            least_B1 = jax.lax.top_k(scaled_BA, top_k)[0][:, -1:]
            scaled_BA = jnp.where(scaled_BA >= least_B1, scaled_BA, _NEVER)
        drawn_B = jax.random.categorical(jax.random.fold_in(key, t), scaled_BA)
        chosen_B = jnp.where(temperature > 0, drawn_B, log_prob_BA.argmax(-1)).astype(prompt_BP.dtype)
        given_B = jnp.take_along_axis(prompt_BP, jnp.minimum(t + 1, P - 1)[None, None].repeat(B, 0), axis=1)[:, 0]
        in_prompt_B = t + 1 < length_B
        if end is not None:
            chosen_B = jnp.where(ended_B, end, chosen_B)
        log_prob_B = jnp.where(ended_B, 0.0, _pick(log_prob_BA, chosen_B))
        token_B = jnp.where(in_prompt_B, given_B, chosen_B)
        if end is not None:
            ended_B = ended_B | (~in_prompt_B & (token_B == end))
        return (state, rules, token_B, ended_B), (token_B, log_prob_B)

    start = (
        backbone.init_state(config, B, P + steps),
        None if legality is None else legality.state,
        prompt_BP[:, 0],
        jnp.zeros(B, bool),
    )
    _, (token_TB, log_prob_TB) = jax.lax.scan(one, start, jnp.arange(P + steps - 1))
    # Row b's continuation starts where its prompt ends.
    index_BN = length_B[:, None] - 1 + jnp.arange(steps)[None]
    tokens_BN = jnp.take_along_axis(token_TB.T, index_BN, axis=1)
    log_prob_BN = jnp.take_along_axis(log_prob_TB.T, index_BN, axis=1)
    return Generated(tokens_BN, log_prob_BN, _lengths(tokens_BN, end))


def beam_search(
    params: Params,
    config: BackboneConfig,
    prompt_BP: jax.Array,
    steps: int,
    beams: int,
    *,
    head: str = "token",
    end: int | None = None,
    legality: Legality | None = None,
    edits: Sequence[Edit] = (),
) -> Beams:
    """The `beams` likeliest continuations of `steps` tokens that a beam search of that width finds.

    Arguments as of `sample`; prompts are of one length. A beam that has ended stays as it is and competes by the sum of
    its log-probabilities, which is not divided by its length. Beams that do not exist, because fewer continuations are
    legal, have log-probability -inf.
    """
    B, P = _check(config, prompt_BP, steps, head, end)
    if beams < 1:
        raise ValueError(f"beam_search: beams is {beams}, expected at least 1")
    W, A = beams, dict(config.heads)[head]

    def advance(token_N, state, rules):
        return _next(params, config, head, token_N, state, rules, legality, edits)

    def spread(tree):
        return jax.tree.map(lambda x: jnp.repeat(x, W, axis=0) if x.ndim else x, tree)

    state = backbone.init_state(config, B * W, P + steps)
    rules = None if legality is None else spread(legality.state)
    prompt_NP = jnp.repeat(prompt_BP, W, axis=0)

    def read(carry, token_N):
        log_prob_NA, state, rules = advance(token_N, *carry[1:])
        return (log_prob_NA, state, rules), None

    (log_prob_NA, state, rules), _ = jax.lax.scan(
        read, (jnp.zeros((B * W, A)), state, rules), jnp.swapaxes(prompt_NP, 0, 1)
    )

    def one(carry, t):
        log_prob_NA, state, rules, score_BW, ended_BW, tokens_BWN = carry
        step_BWA = log_prob_NA.reshape(B, W, A)
        if end is not None:
            kept_A = jnp.where(jnp.arange(A) == end, 0.0, -jnp.inf)
            step_BWA = jnp.where(ended_BW[..., None], kept_A[None, None], step_BWA)
        score_BW, index_BW = jax.lax.top_k((score_BW[..., None] + step_BWA).reshape(B, W * A), W)
        parent_BW, token_BW = index_BW // A, (index_BW % A).astype(prompt_BP.dtype)
        parent_N = (parent_BW + W * jnp.arange(B)[:, None]).reshape(-1)
        state, rules = jax.tree.map(lambda x: x[parent_N] if x.ndim else x, (state, rules))
        tokens_BWN = jnp.take_along_axis(tokens_BWN, parent_BW[..., None], axis=1)
        tokens_BWN = jax.lax.dynamic_update_index_in_dim(tokens_BWN, token_BW, t, axis=2)
        if end is not None:
            ended_BW = jnp.take_along_axis(ended_BW, parent_BW, axis=1) | (token_BW == end)
        log_prob_NA, state, rules = advance(token_BW.reshape(-1), state, rules)
        return (log_prob_NA, state, rules, score_BW, ended_BW, tokens_BWN), None

    # All beams are the same at first: only one of them may have children.
    score_BW = jnp.full((B, W), -jnp.inf).at[:, 0].set(0.0)
    start = log_prob_NA, state, rules, score_BW, jnp.zeros((B, W), bool), jnp.zeros((B, W, steps), prompt_BP.dtype)
    (*_, score_BW, _, tokens_BWN), _ = jax.lax.scan(one, start, jnp.arange(steps))
    return Beams(tokens_BWN, score_BW, _lengths(tokens_BWN, end))


def _check(config: BackboneConfig, prompt_BP: jax.Array, steps: int, head: str, end: int | None) -> tuple[int, int]:
    if not jnp.issubdtype(prompt_BP.dtype, jnp.integer) or prompt_BP.ndim != 2 or prompt_BP.shape[1] < 1:
        raise ValueError(
            f"generate: prompt has shape {prompt_BP.shape} and type {prompt_BP.dtype}, expected integers (B, P), P >= 1"
        )
    if steps < 1:
        raise ValueError(f"generate: steps is {steps}, expected at least 1")
    sizes = dict(config.heads)
    if head not in sizes:
        raise ValueError(f"generate: head is {head!r}, expected one of {sorted(sizes)}")
    if end is not None and not 0 <= end < sizes[head]:
        raise ValueError(f"generate: end is {end}, expected 0 to {sizes[head] - 1}")
    return prompt_BP.shape[0], prompt_BP.shape[1]


def _next(params, config, head, token_N, state, rules, legality, edits):
    """Log-probabilities (N, A) of what follows the token, and the states after it."""
    outputs, _, state = backbone.step(params, config, token_N, state, edits=edits)
    logits_NA = outputs[head]
    if legality is None:
        return jax.nn.log_softmax(logits_NA), state, rules
    rules, legal_NA = legality.advance(rules, token_N)
    log_prob_NA = jax.nn.log_softmax(jnp.where(legal_NA, logits_NA, _NEVER))
    return jnp.where(legal_NA, log_prob_NA, -jnp.inf), state, rules


def _pick(log_prob_BA: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_prob_BA, token_B[:, None], axis=1)[:, 0]


def _lengths(tokens: jax.Array, end: int | None) -> jax.Array:
    steps = tokens.shape[-1]
    if end is None:
        return jnp.full(tokens.shape[:-1], steps)
    return jnp.where((tokens == end).any(-1), (tokens == end).argmax(-1) + 1, steps)
