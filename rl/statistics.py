"""Aggregates of scores over seeds and tasks, with intervals. NumPy alone; results are float64.

Scores are `score_SM`, a row a seed and a column a task, already on one scale (`normalise`). A few seeds say little
about a mean, so every aggregate here takes an interval from `bootstrap_interval`. Source: Agarwal et al., Deep
reinforcement learning at the edge of the statistical precipice, arXiv 2108.13264.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Interval(NamedTuple):
    """A statistic of the scores themselves, and its bounds; each a scalar or an array, as the statistic is."""

    estimate: Array
    lower: Array
    upper: Array


class CurveStatistics(NamedTuple):
    """Median and quartiles over seeds at each of U points of a learning curve."""

    median_U: Array
    lower_U: Array
    upper_U: Array


def _matrix(function: str, argument: str, values: Any, axes: str) -> Array:
    """As a float64 matrix.

    Raises:
        ValueError: it isn't a matrix, is empty, or has an entry that is not finite.
    """
    matrix = np.asarray(values, np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{function}: {argument} has shape {matrix.shape}, expected {axes}, neither empty")
    if not np.isfinite(matrix).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(matrix))[0])
        raise ValueError(f"{function}: {argument} is {matrix[where]} at {where}, expected finite numbers")
    return matrix


def _scores(function: str, argument: str, values: Any) -> Array:
    return _matrix(function, argument, values, "(seeds, tasks)")


def normalise(score_SM: Any, low_M: Any, high_M: Any) -> Array:
    """(score - low) / (high - low) for each task, such as with a random and an optimal policy's. Shape (S, M).

    Raises:
        ValueError: not one low and one high a task, or a high that isn't above its low.
    """
    score_SM = _scores("normalise", "score_SM", score_SM)
    M = score_SM.shape[1]
    bounds = []
    for argument, values in (("low_M", low_M), ("high_M", high_M)):
        bound_M = np.asarray(values, np.float64)
        if bound_M.shape != (M,):
            raise ValueError(f"normalise: {argument} has shape {bound_M.shape}, expected one for each task, ({M},)")
        bounds.append(bound_M)
    low_M, high_M = bounds
    wrong_M = ~(np.isfinite(low_M) & np.isfinite(high_M) & (high_M > low_M))
    if wrong_M.any():
        task = int(wrong_M.argmax())
        raise ValueError(f"normalise: task {task} has low {low_M[task]} and high {high_M[task]}, expected low < high")
    return (score_SM - low_M) / (high_M - low_M)


def interquartile_mean(score_SM: Any) -> float:
    """Mean of the middle half of all scores of all tasks together.

    A quarter of their number, rounded down, is left out at each end, as by `scipy.stats.trim_mean`. Source: section 4.
    """
    sorted_N = np.sort(_scores("interquartile_mean", "score_SM", score_SM), axis=None)
    out = len(sorted_N) // 4
    return float(sorted_N[out : len(sorted_N) - out].mean())


def optimality_gap(score_SM: Any, target: float = 1.0) -> float:
    """By how much scores fall short of `target` on average; those above it count as `target`. Source: section 4."""
    score_SM = _scores("optimality_gap", "score_SM", score_SM)
    if not np.isfinite(target):
        raise ValueError(f"optimality_gap: target is {target}, expected a finite number")
    return float((target - np.minimum(score_SM, target)).mean())


def probability_of_improvement(score_XM: Any, other_YM: Any) -> float:
    """Chance that a seed of the first scores above one of the other on a task drawn at random; equal ones count half.

    The numbers of seeds may differ. Source: section 4; per task it is the Mann-Whitney U over its maximum.
    """
    score_XM = _scores("probability_of_improvement", "score_XM", score_XM)
    other_YM = _scores("probability_of_improvement", "other_YM", other_YM)
    if score_XM.shape[1] != other_YM.shape[1]:
        raise ValueError(
            f"probability_of_improvement: {score_XM.shape[1]} tasks and {other_YM.shape[1]}, expected the same tasks"
        )
    difference_XYM = score_XM[:, None] - other_YM[None]
    return float(((difference_XYM > 0) + 0.5 * (difference_XYM == 0)).mean())


def performance_profile(score_SM: Any, threshold_N: Any) -> Array:
    """The share of all scores above each threshold, shape (N,): one minus their distribution. Source: section 4."""
    score_SM = _scores("performance_profile", "score_SM", score_SM)
    threshold_N = np.asarray(threshold_N, np.float64)
    if threshold_N.ndim != 1 or not threshold_N.size or np.isnan(threshold_N).any():
        raise ValueError(
            f"performance_profile: threshold_N is {threshold_N} of shape {threshold_N.shape}, "
            "expected a list of numbers, not empty"
        )
    return (score_SM.reshape(-1, 1) > threshold_N).mean(0)


def bootstrap_interval(
    statistic: Callable[..., Any],
    *scores: Any,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """A percentile interval for `statistic(*scores)`, by the bootstrap stratified by task.

    Each of `scores` is one algorithm's (S, M). A resample draws, for every algorithm and task by itself, as many seeds
    as there are, with replacement. `level` is the share of resamples between the bounds. The statistic may return an
    array, whose entries have an interval each. Few seeds give too narrow ones: for a mean by sqrt((S - 1) / S).

    Raises:
        ValueError: no scores, or one seed alone, which has no spread to resample; bad `level` or `resamples`.
    """
    if not scores:
        raise ValueError("bootstrap_interval: no scores, expected at least one (seeds, tasks)")
    matrices = [_scores("bootstrap_interval", f"scores[{i}]", each) for i, each in enumerate(scores)]
    for i, matrix in enumerate(matrices):
        if len(matrix) < 2:
            raise ValueError(f"bootstrap_interval: scores[{i}] has {len(matrix)} seed, expected at least 2")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap_interval: level is {level}, expected between 0 and 1")
    if resamples < 1:
        raise ValueError(f"bootstrap_interval: resamples is {resamples}, expected at least 1")
    drawn = []
    for _ in range(resamples):
        seeds = [rng.integers(len(matrix), size=matrix.shape) for matrix in matrices]
        pairs = zip(matrices, seeds, strict=True)
        drawn.append(statistic(*(np.take_along_axis(matrix, seed_SM, axis=0) for matrix, seed_SM in pairs)))
    tail = (1 - level) / 2
    lower, upper = np.quantile(np.asarray(drawn, np.float64), [tail, 1 - tail], axis=0)
    return Interval(np.asarray(statistic(*matrices), np.float64), np.asarray(lower), np.asarray(upper))


def curve_statistics(return_SU: Any) -> CurveStatistics:
    """Median and quartiles over seeds of learning curves, a row a seed and a column an update or evaluation.

    Quartiles between two seeds are interpolated linearly.
    """
    return_SU = _matrix("curve_statistics", "return_SU", return_SU, "(seeds, updates)")
    lower_U, median_U, upper_U = np.quantile(return_SU, [0.25, 0.5, 0.75], axis=0)
    return CurveStatistics(median_U, lower_U, upper_U)
