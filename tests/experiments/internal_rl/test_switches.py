"""Scores of the gate against brute force and hand-made cases."""

import itertools

import numpy as np
import pytest

from experiments.internal_rl.discover import matched_switches, switch_scores


def brute_force(predicted, true, tolerance):
    """Largest one-to-one matching, by trying every assignment."""
    best = 0
    for size in range(min(len(predicted), len(true)) + 1):
        for chosen in itertools.permutations(predicted, size):
            for partners in itertools.combinations(true, size):
                if all(abs(a - b) <= tolerance for a, b in zip(chosen, partners, strict=True)):
                    best = size
    return best


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_matches_against_brute_force(tolerance):
    rng = np.random.default_rng(tolerance)
    for _ in range(60):
        predicted = np.sort(rng.choice(11, rng.integers(0, 5), replace=False))
        true = np.sort(rng.choice(11, rng.integers(0, 5), replace=False))
        assert matched_switches(predicted, true, tolerance) == brute_force(predicted, true, tolerance)


def test_hand_made_case():
    subgoal = np.array([[0, 0, 0, 1, 1, 1, 2, 2]])
    opened = np.array([[1, 0, 0, 1, 0, 0, 0, 1]], bool)
    valid = np.ones((1, 8), bool)
    exact, near = switch_scores(opened, subgoal, valid, 0), switch_scores(opened, subgoal, valid, 1)
    assert exact == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "ratio": 1.0}
    assert near == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "ratio": 1.0}


def test_first_step_and_padding_do_not_count():
    subgoal = np.array([[0, 0, 1, 1, 2]])
    opened = np.array([[1, 0, 1, 0, 1]], bool)
    valid = np.array([[1, 1, 1, 1, 0]], bool)
    assert switch_scores(opened, subgoal, valid, 0) == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "ratio": 1.0}


def test_an_open_gate_has_full_recall_and_low_precision():
    subgoal = np.repeat(np.arange(4), 8)[None]
    valid = np.ones_like(subgoal, bool)
    scores = switch_scores(valid, subgoal, valid, 0)
    assert scores["recall"] == 1.0
    assert scores["precision"] == pytest.approx(3 / 31)
