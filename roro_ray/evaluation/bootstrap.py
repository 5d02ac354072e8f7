"""Paired bootstrap over queries, vectorised: one table of weights serves every method and every figure.

A resample is a row of counts: how often each query was drawn. Every figure of the evaluation is computed for
all rows at once, and row 0 counts every query once, so that the point estimate and its resamples come from
the same code. Because all methods share the rows, differences between methods are paired.

Axes: _Q query, _R row (0 the point estimate, 1.. the resamples), _S setting of a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from roro_ray.errors import ConfigError

Floats = NDArray[np.float64]

_LEAST_FINITE = 0.5  # an interval needs a value in at least half of the resamples


def make_resamples(strata: Sequence[str], count: int, seed: int) -> Floats:
    """Draw `count` bootstrap resamples of queries, with replacement within each stratum (a suite).

    Returns:
        weights of shape (count + 1, queries): row 0 is all ones, each other row holds how often each query
        was drawn; the counts of a stratum sum to its size.

    Raises:
        ConfigError: a negative count.
    """
    if count < 0:
        raise ConfigError(f"evaluate.bootstrap is {count}: expected the number of resamples, 0 or more")
    rng = np.random.default_rng(seed)
    weights = np.zeros((count + 1, len(strata)))
    weights[0] = 1.0
    names = np.asarray(strata)
    for name in dict.fromkeys(strata):
        columns = np.flatnonzero(names == name)
        size = len(columns)
        weights[1:, columns] = rng.multinomial(size, np.full(size, 1.0 / size), size=count)
    return weights


def weighted_means(values_Q: Floats, weights_RQ: Floats) -> Floats:
    """The mean of one value per query under every row of weights; NaN values (dropped rollouts) count nowhere.

    Returns:
        shape (rows,); NaN in a row that drew no query with a value.
    """
    valid = np.isfinite(values_Q)
    total = weights_RQ @ np.where(valid, values_Q, 0.0)
    size = weights_RQ @ valid.astype(float)
    means: Floats = np.divide(total, size, out=np.full(len(weights_RQ), np.nan), where=size > 0)
    return means


def interval(values_R: Floats, level: float = 0.95) -> list[float] | None:
    """The percentile interval of the resamples (rows 1..), or None where fewer than half of them have a value."""
    resamples = values_R[1:]
    finite = resamples[np.isfinite(resamples)]
    if len(finite) == 0 or len(finite) < _LEAST_FINITE * len(resamples):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def point(values_R: Floats) -> float | None:
    """The point estimate (row 0), or None where it does not exist."""
    value = float(values_R[0])
    return value if np.isfinite(value) else None
