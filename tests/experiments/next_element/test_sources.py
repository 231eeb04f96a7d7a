"""Sources of symbols against sums over all paths, and against what they are meant to be."""

import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.next_element import sources

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = {
    "markov": sources.markov(0, 3, 2),
    "hidden": sources.hidden_markov(1, 3, 4),
    "automaton": sources.automaton([[(0, 1), (1, 0)], [(2, 0)]], 3),
}


def probability(source, word) -> float:
    """P(word), by a product of matrices."""
    belief = source.start_S
    for symbol in word:
        belief = belief @ source.joint_SXS[:, symbol]
    return belief.sum()


def words(source, length):
    return list(product(range(source.joint_SXS.shape[1]), repeat=length))


@pytest.mark.parametrize("name", SMALL)
def test_predictions_are_ratios_of_the_probabilities_of_words(name):
    source = SMALL[name]
    possible = [word for word in words(source, 4) if probability(source, word) > 0]
    got = sources.predict(source, jnp.array(possible))
    for row, word in enumerate(possible):
        for t in range(4):
            past = probability(source, word[: t + 1])
            expected = [probability(source, (*word[: t + 1], x)) / past for x in range(source.joint_SXS.shape[1])]
            np.testing.assert_allclose(got[row, t], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_hidden_symbols_by_the_probabilities_of_words(name):
    source = SMALL[name]
    X = source.joint_SXS.shape[1]
    word = next(word for word in words(source, 5) if probability(source, word) > 0)
    hidden = np.array([False, True, True, False, True])
    got = sources.fill_in(source, jnp.array([word]), jnp.asarray(hidden)[None])[0]
    for t in range(5):
        total = np.zeros(X)
        for other in words(source, 5):
            if all(other[s] == word[s] for s in range(5) if s != t and not hidden[s]):
                total[other[t]] += probability(source, other)
        np.testing.assert_allclose(got[t], total / total.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_drawn_has_the_probabilities_of_words(name):
    source = SMALL[name]
    drawn = np.asarray(sources.draw(source, jax.random.key(0), 20000, 3))
    for word in words(source, 3):
        p = probability(source, word)
        assert abs((drawn == np.array(word)).all(1).mean() - p) < 5 * np.sqrt(p * (1 - p) / 20000) + 1e-6


def test_a_markov_chain_looks_back_by_its_order_only():
    source = sources.markov(3, 3, 2)
    one, two = jnp.array([[0, 1, 2, 1]]), jnp.array([[2, 2, 2, 1]])
    np.testing.assert_allclose(
        sources.predict(source, one)[0, -1], sources.predict(source, two)[0, -1], rtol=1e-5, atol=1e-7
    )
    entropy = -(np.log(np.where(source.joint_SXS > 0, source.joint_SXS, 1)) * source.joint_SXS).sum((1, 2))
    symbols = sources.draw(source, jax.random.key(0), 500, 60)
    nll = -jnp.log(jnp.take_along_axis(sources.predict(source, symbols)[:, :-1], symbols[:, 1:, None], axis=-1))
    np.testing.assert_allclose(nll.mean(), source.start_S @ entropy, rtol=0.02)


def test_reber_strings_end_as_they_began():
    """In the embedded grammar the last symbol but one is the second; the inner strings obey Reber's grammar."""
    symbols = np.asarray(sources.draw(sources.reber(), jax.random.key(0), 50, 200))
    # Node by node: 3 is reached by T S* X, then X leads to the other loop T* V, from which P leads back to 3.
    loop = "(?:XT*VP)*"
    inner = f"B(?:TS*X{loop}(?:S|XT*VV)|PT*V(?:V|P{loop}(?:S|XT*VV)))E"
    string = re.compile(f"B(?P<outer>[TP])(?P<inner>{inner})(?P=outer)E")
    found = 0
    for row in symbols:
        text = "".join("BTPSXVE"[symbol] for symbol in row)
        start = text.find("EB")
        while (match := string.match(text, start + 1)) is not None:
            found += 1
            start = match.end() - 1
        # What is left is the beginning of one more string.
        assert len(text) - start < 60
    assert found > 300


def test_the_process_runs_its_blocks_in_order():
    symbols = np.asarray(sources.draw(sources.process(), jax.random.key(0), 20, 300))
    seen = set()
    for row in symbols:
        text = "".join("ABCDEFGH"[symbol] for symbol in row)
        for case in text.split("H")[1:-1]:
            assert case[0] == "A"
            body = case[1:].rstrip("G")
            assert case.endswith("G")
            left = [x for x in body if x in "BC"]
            right = [x for x in body if x in "DEF"]
            assert left == ["B", "C"]
            assert right in (["D"], ["E", "F"])
            seen.add(body)
    assert seen == {"".join(w) for r in ("D", "EF") for w in interleavings("BC", r)}


def interleavings(a: str, b: str):
    if not a or not b:
        yield a + b
        return
    yield from (a[0] + rest for rest in interleavings(a[1:], b))
    yield from (b[0] + rest for rest in interleavings(a, b[1:]))


def test_what_is_no_distribution_is_refused():
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        sources.source(np.ones((2, 3, 2)))
