"""Tasks by hand: what is asked has the answer that the ideal observer gives."""

import jax
import numpy as np
import pytest

from experiments.next_element import tasks

B, L = 40, 24


def batch(task) -> list[np.ndarray]:
    return [np.asarray(part) for part in jax.jit(task, static_argnums=(1, 2))(jax.random.key(0), B, L)]


@pytest.mark.parametrize(
    ("causal", "name"), [(True, n) for n in tasks.CAUSAL] + [(False, n) for n in tasks.BIDIRECTIONAL]
)
def test_batches_fit_the_shared_vocabulary(causal, name):
    tokens, labels, weights, ideal = batch((tasks.CAUSAL if causal else tasks.BIDIRECTIONAL)[name])
    assert {part.shape for part in (tokens, labels, weights, ideal)} == {(B, L)}
    assert tokens.min() >= 0
    assert tokens.max() < tasks.VOCABULARY
    assert labels[weights > 0].max() < tasks.HIDDEN
    assert set(np.unique(weights)) == {0.0, 1.0} or (causal and name in tasks.SOURCES)
    assert (ideal[weights > 0] > 0).all()
    assert ideal.max() <= 1 + 1e-5


def test_a_recalled_value_was_seen_with_its_key():
    tokens, labels, weights, _ = batch(tasks.recall)
    for row in range(B):
        seen = {}
        for t in range(0, L, 2):
            key, value = tokens[row, t : t + 2]
            if weights[row, t]:
                assert labels[row, t] == seen[key] == value
            assert seen.setdefault(key, value) == value
        assert len(seen) == 6
    assert weights[:, :12].sum() == 0
    assert (weights[:, 12:].sum(1) == (L - 12) / 2).all()
    with pytest.raises(ValueError, match="length is 13, expected an even number of at least 14"):
        tasks.recall(jax.random.key(0), B, 13)


def test_a_copy_repeats_what_came_before_the_mark():
    tokens, labels, weights, _ = batch(tasks.copy)
    assert (tokens[:, L // 2] == tasks.MARK).all()
    for row in range(B):
        np.testing.assert_array_equal(labels[row, weights[row] > 0], tokens[row, : L // 2])


def test_a_hidden_copy_is_known_from_its_other_occurrence():
    tokens, labels, weights, ideal = batch(tasks.fill_in_copy)
    np.testing.assert_array_equal(labels[:, : L // 2], labels[:, L // 2 :])
    for row, t in zip(*np.nonzero(weights), strict=True):
        other = (t + L // 2) % L
        assert tokens[row, t] == tasks.HIDDEN
        if tokens[row, other] == tasks.HIDDEN:
            assert ideal[row, t] == 1 / 16
        else:
            assert tokens[row, other] == labels[row, t]
            assert ideal[row, t] == 1


def test_hidden_symbols_are_those_of_the_source():
    tokens, labels, weights, _ = batch(tasks.BIDIRECTIONAL["process"])
    np.testing.assert_array_equal(tokens == tasks.HIDDEN, weights > 0)
    np.testing.assert_array_equal(tokens[weights == 0], labels[weights == 0])
    assert 0.2 < weights.mean() < 0.3
