"""How a method's operating point and thresholds are chosen: on validation, by one rule for every method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roro_ray.errors import ConfigError
from roro_ray.evaluation.bootstrap import Floats
from roro_ray.evaluation.metrics import Scores


def choose_setting(settings: Sequence[Scores], large: Scores, slack: float) -> int:
    """The index of the cheapest setting within `slack` of the large model's accuracy, else of the most accurate.

    Cheap means a low cost share, then few FLOPs; among equally accurate settings the cheaper one. Settings and
    the large model must be scores of the same validation queries. A setting without any value is passed over;
    if none has one, the first is taken (its figures are null all the same).

    Raises:
        ConfigError: there is no setting to choose from.
    """
    if not settings:
        raise ConfigError("no setting to choose an operating point from: expected at least one sweep value")
    target = _mean(large, "accuracy") - slack
    rows = []
    for index, scores in enumerate(settings):
        accuracy = _mean(scores, "accuracy")
        if np.isfinite(accuracy):
            rows.append((accuracy, _mean(scores, "cost_share"), _mean(scores, "flops"), index))
    if not rows:
        return 0
    # A hair of tolerance: 0.98 - 0.01 must admit 0.97 whatever the rounding.
    good = [row for row in rows if row[0] >= target - 1e-9]
    if good:
        return min(good, key=lambda row: row[1:])[-1]
    return min(rows, key=lambda row: (-row[0], *row[1:]))[-1]


def _mean(scores: Scores, quantity: str) -> float:
    values = scores.of(quantity)[np.isfinite(scores.of("accuracy"))]
    return float(values.mean()) if len(values) else float("nan")


def choose_thresholds(signal: Sequence[float] | Floats, count: int) -> list[float]:
    """`count` thresholds at evenly spaced inner quantiles of a signal seen on validation, without repeats.

    Quantile i/(count + 1) for i = 1..count: the i-th threshold parts about that share of the decisions.

    Raises:
        ConfigError: `count` is not positive.
    """
    if count < 1:
        raise ConfigError(f"evaluate.thresholds is {count}: expected 1 or more")
    values = np.asarray([value for value in signal if np.isfinite(value)])
    if not len(values):
        return [0.5]  # nothing was seen; any threshold is as good, and the sweep must have a setting
    levels = np.arange(1, count + 1) / (count + 1)
    return sorted({float(value) for value in np.quantile(values, levels)})
