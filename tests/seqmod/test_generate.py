"""Sampling and beam search against brute force over all continuations."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import BackboneConfig, Edit, backbone, generate

pytestmark = pytest.mark.usefixtures("quick_compile")

A, B, P, N = 4, 2, 3, 4
CONFIG = BackboneConfig(
    vocabulary=A, heads=(("token", A),), mixers=("rglru", "attention"), width=8, mlp=13, attention_heads=2, context=20
)
PROMPT_BP = jnp.array([[1, 3, 0], [2, 2, 1]])
END = 3


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(backbone.init, CONFIG, scale=0.9)


def legality() -> generate.Legality:
    """A token may not follow itself, nor the last but one."""

    def advance(last_B2, token_B):
        last_B2 = jnp.stack([last_B2[:, 1], token_B], axis=1)
        return last_B2, (jnp.arange(A)[None, :, None] != last_B2[:, None]).all(-1)

    return generate.Legality(jnp.full((B, 2), -1), advance)


def every(params, *, legal: bool = False, end: int | None = None) -> list[dict[tuple[int, ...], float]]:
    """For each prompt, every continuation and its log-probability by the parallel form."""
    continuations = np.array(list(product(range(A), repeat=N)))
    found = []
    for prompt_P in np.asarray(PROMPT_BP):
        whole = np.concatenate([np.tile(prompt_P, (len(continuations), 1)), continuations], axis=1)
        logits = np.asarray(jax.jit(backbone.apply, static_argnums=1)(params, CONFIG, jnp.asarray(whole))[0]["token"])
        total: dict[tuple[int, ...], float] = {}
        for row, logit in zip(whole, logits.astype(np.float64), strict=True):
            score, ended = 0.0, False
            for t in range(P, P + N):
                allowed = [a for a in range(A) if not legal or a not in row[t - 2 : t]]
                if ended:
                    score += 0.0 if row[t] == end else -np.inf
                elif row[t] not in allowed:
                    score = -np.inf
                else:
                    score += logit[t - 1, row[t]] - np.log(np.exp(logit[t - 1, allowed]).sum())
                ended = ended or row[t] == end
            if np.isfinite(score):
                total[tuple(map(int, row[P:]))] = score
        found.append(total)
    return found


@partial(jax.jit, static_argnames=("end", "legal", "top_k"))
def draw(params, keys, temperature=1.0, end=None, legal=False, top_k=None):
    rules = legality() if legal else None
    return jax.vmap(
        lambda key: generate.sample(
            params, CONFIG, PROMPT_BP, N, key, temperature=temperature, end=end, legality=rules, top_k=top_k
        )
    )(keys)


@pytest.mark.parametrize(("legal", "end"), [(False, None), (True, None), (False, END), (True, END)])
def test_samples_have_the_models_distribution(params, legal, end):
    samples = 4000
    drawn = draw(params, jax.random.split(jax.random.key(0), samples), end=end, legal=legal)
    for row, exact in enumerate(every(params, legal=legal, end=end)):
        assert abs(sum(map(np.exp, exact.values())) - 1) < 1e-4
        counts: dict[tuple[int, ...], int] = {}
        tokens, scores = np.asarray(drawn.tokens_BN[:, row]), np.asarray(drawn.log_prob_BN[:, row]).sum(-1)
        for sequence, score in zip(map(tuple, tokens.tolist()), scores, strict=True):
            assert abs(score - exact[sequence]) < 1e-3
            counts[sequence] = counts.get(sequence, 0) + 1
        for sequence, score in exact.items():
            p = np.exp(score)
            assert abs(counts.get(sequence, 0) / samples - p) < 5 * np.sqrt(p * (1 - p) / samples) + 1e-3
        ends = (tokens == END).argmax(-1) + 1 if end == END else np.full(samples, N)
        expected = np.where((tokens == END).any(-1), ends, N)
        np.testing.assert_array_equal(drawn.length_B[:, row], expected)


def test_no_temperature_takes_the_likeliest(params):
    greedy = generate.sample(params, CONFIG, PROMPT_BP, N, jax.random.key(0), temperature=0.0)
    sequence = PROMPT_BP
    for _ in range(N):
        logits = backbone.apply(params, CONFIG, sequence)[0]["token"][:, -1]
        sequence = jnp.concatenate([sequence, logits.argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(greedy.tokens_BN, sequence[:, P:])
    one = draw(params, jax.random.split(jax.random.key(1), 20), top_k=1)
    np.testing.assert_array_equal(one.tokens_BN, jnp.broadcast_to(greedy.tokens_BN[None], (20, B, N)))


def test_prompts_of_several_lengths_are_continued_as_if_alone(params):
    padded_BP = jnp.array([[1, 3, 0], [2, 0, 0]])
    together = generate.sample(
        params, CONFIG, padded_BP, N, jax.random.key(0), temperature=0.0, prompt_length_B=jnp.array([3, 1])
    )
    for row, length in enumerate((3, 1)):
        alone = generate.sample(
            params, CONFIG, padded_BP[row : row + 1, :length], N, jax.random.key(0), temperature=0.0
        )
        np.testing.assert_array_equal(together.tokens_BN[row], alone.tokens_BN[0])
        np.testing.assert_allclose(together.log_prob_BN[row], alone.log_prob_BN[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("legal", "end"), [(False, None), (True, None), (False, END), (True, END)])
def test_a_wide_beam_finds_the_best_continuations(params, legal, end):
    """With a beam for every prefix nothing is lost."""
    W = A ** (N - 1)
    rules = legality() if legal else None
    found = generate.beam_search(params, CONFIG, PROMPT_BP, N, W, end=end, legality=rules)
    for row, exact in enumerate(every(params, legal=legal, end=end)):
        best = sorted(exact.items(), key=lambda item: -item[1])[:W]
        for place, (sequence, score) in enumerate(best[:12]):
            assert abs(found.log_prob_BW[row, place] - score) < 1e-3
            assert tuple(found.tokens_BWN[row, place].tolist()) == sequence
        assert (np.asarray(found.log_prob_BW[row, len(best) :]) == -np.inf).all()


def test_a_narrow_beam_is_a_search_by_hand(params):
    found = generate.beam_search(params, CONFIG, PROMPT_BP, N, 2)
    for row in range(B):
        beams = [((), 0.0)]
        for _ in range(N):
            children = []
            for tokens, score in beams:
                sequence = jnp.concatenate([PROMPT_BP[row], jnp.array(tokens, jnp.int32)])[None]
                log_prob_A = jax.nn.log_softmax(backbone.apply(params, CONFIG, sequence)[0]["token"][0, -1])
                children += [((*tokens, a), score + float(log_prob_A[a])) for a in range(A)]
            beams = sorted(children, key=lambda child: -child[1])[:2]
        for place, (tokens, score) in enumerate(beams):
            assert tuple(found.tokens_BWN[row, place].tolist()) == tokens
            assert abs(float(found.log_prob_BW[row, place]) - score) < 1e-3


def test_edits_steer_what_is_generated(params):
    edits = [Edit(2, "replace", jnp.linspace(-2.0, 2.0, 8))]
    steered = generate.sample(params, CONFIG, PROMPT_BP, N, jax.random.key(0), temperature=0.0, edits=edits)
    # The last layer's stream is the same at every step, so the tokens are.
    assert len(set(steered.tokens_BN.ravel().tolist())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_BP": jnp.zeros((2, 0), jnp.int32)}, r"prompt has shape \(2, 0\)"),
        ({"prompt_BP": jnp.zeros((2, 3))}, "expected integers"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"head": "value"}, r"head is 'value', expected one of \['token'\]"),
        ({"end": 4}, "end is 4, expected 0 to 3"),
        ({"top_k": 5}, "top_k is 5, expected 1 to 4"),
    ],
)
def test_a_bad_request_is_refused(params, options, message):
    arguments = {"prompt_BP": PROMPT_BP, "steps": N, "key": jax.random.key(0), **options}
    with pytest.raises(ValueError, match=message):
        generate.sample(params, CONFIG, **arguments)


def test_no_beams_are_refused(params):
    with pytest.raises(ValueError, match="beams is 0, expected at least 1"):
        generate.beam_search(params, CONFIG, PROMPT_BP, N, 0)
