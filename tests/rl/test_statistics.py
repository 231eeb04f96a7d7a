"""Aggregates against SciPy, the standard library, enumeration and hand-worked cases; intervals against theory."""

import itertools
import statistics

import numpy as np
import pytest
from scipy import stats

from rl.statistics import (
    bootstrap_interval,
    curve_statistics,
    interquartile_mean,
    normalise,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)

SCORE_SM = np.random.default_rng(0).standard_normal((7, 5)) + np.arange(5)
OTHER_SM = np.random.default_rng(1).standard_normal((11, 5)) + np.arange(5) * 0.8


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 2), (5, 1), (3, 7), (4, 5), (1, 23)])
def test_interquartile_mean_is_scipys_trimmed_mean(shape):
    score_SM = np.random.default_rng(2).standard_cauchy(shape)
    np.testing.assert_allclose(interquartile_mean(score_SM), stats.trim_mean(score_SM, 0.25, axis=None), rtol=1e-12)


def test_interquartile_mean_ignores_the_outer_quarters():
    assert interquartile_mean([[0, -1e9], [1, 3], [5, 1e9], [4, 100]]) == (1 + 3 + 4 + 5) / 4


def test_optimality_gap_by_hand():
    # Short of 1 by 0.75, 0, 0 and 2; of 2 by 1.75, 1, 0 and 3.
    score_SM = [[0.25, 1.0], [5.0, -1.0]]
    assert optimality_gap(score_SM) == 2.75 / 4
    assert optimality_gap(score_SM, target=2) == 5.75 / 4


def test_probability_of_improvement_is_mann_whitneys():
    # Rounded, so that some are equal.
    score_XM, other_YM = SCORE_SM.round(), OTHER_SM.round()
    most = len(score_XM) * len(other_YM)
    wanted = np.mean([stats.mannwhitneyu(score_XM[:, m], other_YM[:, m]).statistic / most for m in range(5)])
    np.testing.assert_allclose(probability_of_improvement(score_XM, other_YM), wanted, rtol=1e-12)
    back = probability_of_improvement(other_YM, score_XM)
    np.testing.assert_allclose(back, 1 - wanted, rtol=1e-12)
    assert (score_XM[:, None] == other_YM[None]).any()


def test_probability_of_improvement_by_hand():
    # Task 0: 3 beats 1 and 2, 0 neither. Task 1: all equal. Task 2: always better.
    assert probability_of_improvement([[3, 4, 9], [0, 4, 8]], [[1, 4, 7], [2, 4, 7]]) == (0.5 + 0.5 + 1) / 3


def test_performance_profile_counts_what_is_above():
    profile = performance_profile([[0, 1], [2, 2], [3, 8]], [-1, 0, 1.5, 2, 8])
    np.testing.assert_allclose(profile, [1, 5 / 6, 4 / 6, 2 / 6, 0], rtol=1e-12)


def test_performance_profile_has_the_mean_as_its_area():
    score_SM = np.random.default_rng(3).uniform(size=(7, 3))
    edges = np.linspace(0, 1, 100_001)
    middles = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(performance_profile(score_SM, middles).mean(), score_SM.mean(), atol=1e-5)


def test_normalise_puts_references_at_zero_and_one():
    score_SM = normalise([[-500, 9], [-100, 500], [-300, 1000]], [-500, 0], [-100, 500])
    np.testing.assert_allclose(score_SM, [[0, 0.018], [1, 1], [0.5, 2]], rtol=1e-12)


def test_bootstrap_has_the_quantiles_of_all_resamples():
    """Three seeds and two tasks have 27 x 27 equally likely resamples; by their enumeration."""
    score_SM = np.array([[0.0, 10.0], [1.0, 17.0], [4.0, 12.0]])
    drawn = [
        interquartile_mean(np.stack([score_SM[list(first), 0], score_SM[list(second), 1]], axis=1))
        for first in itertools.product(range(3), repeat=3)
        for second in itertools.product(range(3), repeat=3)
    ]
    interval = bootstrap_interval(
        interquartile_mean, score_SM, rng=np.random.default_rng(4), level=0.8, resamples=20_000
    )
    # Between neighbouring values of the 729 on either side, where the share of random resamples may fall.
    low, high = np.quantile(drawn, [0.09, 0.11]), np.quantile(drawn, [0.89, 0.91])
    assert low[0] <= interval.lower <= low[1]
    assert high[0] <= interval.upper <= high[1]
    assert interval.estimate == interquartile_mean(score_SM)
    assert interval.lower < interval.estimate < interval.upper


def test_bootstrap_of_a_mean_has_the_normal_width():
    score_SM = np.random.default_rng(5).standard_normal((53, 3)) * [1, 2, 3]
    interval = bootstrap_interval(np.mean, score_SM, rng=np.random.default_rng(6), level=0.9, resamples=10_000)
    width = stats.norm.ppf(0.95) * np.sqrt(score_SM.var(0).sum() / 53) / 3
    np.testing.assert_allclose(
        [interval.lower, interval.upper], score_SM.mean() + np.array([-width, width]), atol=0.04 * width
    )


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_covers_the_truth_as_often_as_it_says(level):
    """Scores of 23 seeds on three tasks, symmetric around 1, 2 and 3: the true mean is 2."""
    rng, trials, covered = np.random.default_rng(7), 200, 0
    for _ in range(trials):
        score_SM = rng.standard_t(5, size=(23, 3)) + np.array([1, 2, 3])
        interval = bootstrap_interval(np.mean, score_SM, rng=rng, level=level, resamples=200)
        covered += interval.lower <= 2 <= interval.upper
    # Percentile intervals are narrow by sqrt(22 / 23), which costs up to 0.015; three standard errors besides.
    error = 3 * np.sqrt(level * (1 - level) / trials)
    assert level - 0.015 - error < covered / trials < level + error


def test_bootstrap_is_stratified_by_task():
    """Seeds that agree on each task leave nothing uncertain, however far apart the tasks are."""
    score_SM = np.tile([0.0, 3.0, 50.0], (5, 1))
    interval = bootstrap_interval(interquartile_mean, score_SM, rng=np.random.default_rng(8), resamples=100)
    assert interval.lower == interval.upper == interval.estimate


def test_bootstrap_draws_tasks_by_themselves():
    """A task and its negative have sum zero in every seed, but not in resamples."""
    score_SM = np.stack([SCORE_SM[:, 0], -SCORE_SM[:, 0]], axis=1)
    interval = bootstrap_interval(np.sum, score_SM, rng=np.random.default_rng(9), resamples=500)
    assert interval.lower < -0.5
    assert interval.upper > 0.5


def test_bootstrap_of_two_algorithms_and_of_arrays():
    rng = np.random.default_rng(10)
    better = bootstrap_interval(probability_of_improvement, SCORE_SM + 1, OTHER_SM, rng=rng, resamples=500)
    assert 0.5 < better.lower < better.estimate < better.upper <= 1
    thresholds = [-1.0, 1.0, 2.0]
    profile = bootstrap_interval(lambda x: performance_profile(x, thresholds), SCORE_SM, rng=rng, resamples=500)
    assert profile.lower.shape == profile.upper.shape == (3,)
    np.testing.assert_array_equal(profile.estimate, performance_profile(SCORE_SM, thresholds))
    assert (profile.lower <= profile.estimate).all()
    assert (profile.estimate <= profile.upper).all()


def test_bootstrap_repeats_with_its_generator():
    first, again, other = (
        bootstrap_interval(interquartile_mean, SCORE_SM, rng=np.random.default_rng(seed), resamples=50)
        for seed in (11, 11, 12)
    )
    assert first == again
    assert first != other


def test_curve_statistics_are_the_standard_librarys():
    return_SU = np.random.default_rng(13).standard_normal((7, 3))
    curve = curve_statistics(return_SU)
    for u, column in enumerate(return_SU.T):
        wanted = statistics.quantiles(column.tolist(), n=4, method="inclusive")
        np.testing.assert_allclose([curve.lower_U[u], curve.median_U[u], curve.upper_U[u]], wanted, rtol=1e-12)
    one = curve_statistics([[1.0, 2.0]])
    np.testing.assert_array_equal(one, [[1, 2]] * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interquartile_mean([1, 2, 3]), r"interquartile_mean: score_SM has shape \(3,\)"),
        (lambda: interquartile_mean(np.zeros((0, 3))), r"score_SM has shape \(0, 3\)"),
        (lambda: interquartile_mean([[1, 2], [3, np.nan]]), r"score_SM is nan at \(1, 1\)"),
        (lambda: optimality_gap([[1, -np.inf]]), r"optimality_gap: score_SM is -inf at \(0, 1\)"),
        (lambda: optimality_gap([[1]], target=np.nan), "target is nan"),
        (lambda: probability_of_improvement([[1, 2]], [[1]]), "2 tasks and 1"),
        (lambda: performance_profile([[1]], []), r"threshold_N is \[\] of shape \(0,\)"),
        (lambda: performance_profile([[1]], [np.nan]), "threshold_N is"),
        (lambda: normalise([[1, 2]], [0], [1, 1]), r"low_M has shape \(1,\), expected one for each task, \(2,\)"),
        (lambda: normalise([[1, 2]], [0, 1], [1, 1]), "task 1 has low 1.0 and high 1.0"),
        (lambda: normalise([[1, 2]], [np.nan, 0], [1, 1]), "task 0 has low nan"),
        (lambda: curve_statistics(np.zeros((3, 0))), r"curve_statistics: return_SU has shape \(3, 0\)"),
        (lambda: curve_statistics([[np.nan]]), r"return_SU is nan at \(0, 0\)"),
    ],
)
def test_bad_scores_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "no scores"),
        ([SCORE_SM, [[1, 2, 3]]], {}, r"scores\[1\] has 1 seed"),
        ([[[1], [np.inf]]], {}, r"scores\[0\] is inf at \(1, 0\)"),
        ([SCORE_SM], {"level": 1}, "level is 1"),
        ([SCORE_SM], {"level": 95}, "level is 95"),
        ([SCORE_SM], {"resamples": 0}, "resamples is 0"),
    ],
)
def test_bad_bootstraps_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.mean, *scores, rng=np.random.default_rng(14), **options)
