"""Frontiers: accuracy against a cost, as the straight lines between chosen settings.

A method is a sweep of settings (cost weights, thresholds, shares). Its frontier joins some of them, with the
small model alone at one end and the large model alone at the other, by straight lines. A point on a line is
not an invention: serving each query by one of two settings at random reaches it. Which settings are joined is
decided on validation (the corners of the concave hull there), never on the test queries: the largest of many
noisy test points would be a flattering choice. On test, the chosen settings are sorted by their test cost and
joined as they fall, even where the line then bends the wrong way.

Axes: _R bootstrap row, _S setting (see `evaluation.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roro_ray.evaluation.bootstrap import Floats


def hull_corners(costs: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Indices of the corners of the upper concave hull of points, by rising cost (Andrew's monotone chain).

    Points with a NaN are left out. Of points with equal cost only the most accurate can be a corner.
    """
    finite = [i for i, pair in enumerate(zip(costs, accuracies, strict=True)) if np.all(np.isfinite(pair))]
    corners: list[int] = []
    for i in sorted(finite, key=lambda i: (costs[i], -accuracies[i])):
        if corners and costs[corners[-1]] == costs[i]:
            continue
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            turn = (costs[b] - costs[a]) * (accuracies[i] - accuracies[a])
            turn -= (accuracies[b] - accuracies[a]) * (costs[i] - costs[a])
            if turn < 0:  # b lies above the line from a to i
                break
            corners.pop()
        corners.append(i)
    return corners


def _sorted_curves(cost_RS: Floats, accuracy_RS: Floats) -> tuple[Floats, Floats]:
    """Each row's points by rising cost, at equal cost by rising accuracy."""
    order = np.lexsort((accuracy_RS, cost_RS), axis=-1)
    return np.take_along_axis(cost_RS, order, -1), np.take_along_axis(accuracy_RS, order, -1)


def curve_area(cost_RS: Floats, accuracy_RS: Floats) -> Floats:
    """Area under the straight lines through the points, over costs in [0, 1].

    The line is level before the first point and after the last. The points must lie in [0, 1] (shares).
    A row with a NaN gives NaN.
    """
    cost, accuracy = _sorted_curves(cost_RS, accuracy_RS)
    middle = np.sum(np.diff(cost, axis=-1) * (accuracy[:, 1:] + accuracy[:, :-1]) / 2, axis=-1)
    area: Floats = middle + cost[:, 0] * accuracy[:, 0] + (1 - cost[:, -1]) * accuracy[:, -1]
    return area


def hull_area(points: Sequence[tuple[float, float]]) -> float:
    """Area under the concave hull of (cost, accuracy) points over costs in [0, 1], level beyond its ends."""
    costs, accuracies = [cost for cost, _ in points], [accuracy for _, accuracy in points]
    corners = hull_corners(costs, accuracies)
    if not corners:
        return float("nan")
    rows = [np.array([[values[i] for i in corners]]) for values in (costs, accuracies)]
    return float(curve_area(rows[0], rows[1])[0])


def first_cost_at(cost_RS: Floats, accuracy_RS: Floats, level_R: Floats) -> Floats:
    """The least cost at which the straight lines through the points reach an accuracy; NaN where they never do."""
    cost, accuracy = _sorted_curves(cost_RS, accuracy_RS)
    rows = np.arange(len(cost))
    reached = accuracy >= level_R[:, None]
    first = np.argmax(reached, axis=-1)
    before = np.maximum(first - 1, 0)
    rise = accuracy[rows, first] - accuracy[rows, before]
    part = np.divide(level_R - accuracy[rows, before], rise, out=np.zeros(len(rows)), where=rise > 0)
    crossing = cost[rows, before] + part * (cost[rows, first] - cost[rows, before])
    value = np.where(first == 0, cost[:, 0], crossing)
    broken = np.isnan(cost).any(-1) | np.isnan(accuracy).any(-1) | np.isnan(level_R)
    return np.where(reached.any(-1) & ~broken, value, np.nan)


def accuracy_at_cost(cost_RS: Floats, accuracy_RS: Floats, budget_R: Floats) -> Floats:
    """The accuracy of the straight lines through the points at a cost.

    NaN where the budget is below the cheapest point; the last point's accuracy where it is above the dearest.
    """
    cost, accuracy = _sorted_curves(cost_RS, accuracy_RS)
    rows, last = np.arange(len(cost)), cost.shape[1] - 1
    left = np.sum(cost <= budget_R[:, None], axis=-1) - 1
    start, stop = np.clip(left, 0, last), np.clip(left + 1, 0, last)
    width = cost[rows, stop] - cost[rows, start]
    part = np.divide(budget_R - cost[rows, start], width, out=np.zeros(len(rows)), where=width > 0)
    value = accuracy[rows, start] + part * (accuracy[rows, stop] - accuracy[rows, start])
    broken = np.isnan(cost).any(-1) | np.isnan(accuracy).any(-1) | np.isnan(budget_R)
    return np.where((left >= 0) & ~broken, value, np.nan)
