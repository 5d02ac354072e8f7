"""What is measured of a method: accuracy, cost, and its frontier between the small and the large model.

All functions take a table of bootstrap weights (see `evaluation.bootstrap`) and return one value per row, so
that point estimates and intervals come from the same arithmetic. A figure that does not exist in a row (no
query left, a large model no better than the small one) is NaN there and becomes null in the summary: never 0
and never infinite.

Definitions, with s and l the accuracies of the small and the large model alone on the same queries:

- `accuracy`, `flops`, `flops_decode`, `large_tokens`, `steps`, `tokens_out`, `usd`: means per query.
- `cost_share`: the large model's share of a query's steps, mean over queries.
- `pgr` = (accuracy - s) / (l - s), the performance gap recovered (RouteLLM, arXiv 2406.18665, section 2).
- `frontier_area`: area under accuracy over cost share in [0, 1]; the line joins the small model alone, the
  settings at the corners of the concave hull *on validation*, and the large model alone (`evaluation.frontier`).
- `apgr` = (frontier_area - s) / (l - s): the integral of `pgr` over the share. RouteLLM defines it so and
  averages ten equal steps of the share; here the integral is exact.
- `cpt50`, `cpt80`, `cpt95`: the least share at which the same line recovers that much of the gap (RouteLLM's
  call-performance threshold, with steps as calls). `cpt50_tokens`, ..: the same in tokens written by the large
  model over those it writes alone, the cost of stepwise routers (TRIM, arXiv 2601.10245).
- `accuracy_at_60_flops`: accuracy of the line over FLOPs at 60% of the large model's FLOPs.
- `flops_at_98_accuracy`: the least FLOPs at which that line has 98% of the large model's accuracy, and
  `flops_share_at_98_accuracy` the same over the large model's FLOPs.

Axes: _K quantity, _Q query, _R bootstrap row, _S setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from roro_ray.evaluation.bootstrap import Floats, weighted_means
from roro_ray.evaluation.frontier import accuracy_at_cost, curve_area, first_cost_at, hull_corners
from roro_ray.routing.episode import EpisodeFailure
from roro_ray.types import Trajectory

QUANTITIES = ("accuracy", "cost_share", "flops", "flops_decode", "large_tokens", "steps", "tokens_out", "usd")
COST_AXES = ("cost_share", "flops", "large_tokens")
GAP_LEVELS = (50, 80, 95)
FRONTIER_METRICS = (
    "frontier_area",
    "apgr",
    *(f"cpt{level}" for level in GAP_LEVELS),
    *(f"cpt{level}_tokens" for level in GAP_LEVELS),
    "accuracy_at_60_flops",
    "flops_at_98_accuracy",
    "flops_share_at_98_accuracy",
)


@dataclass(frozen=True, slots=True)
class Scores:
    """Results of one setting on a list of queries: one column per query, NaN where its rollout was dropped.

    `values_KQ` has the rows of `QUANTITIES`. `failed` counts rollouts that raised, `unscorable` those whose
    answer could not be checked; both are NaN columns and take part in no mean. `error` is the first failure.
    """

    setting: str
    values_KQ: Floats
    failed: int = 0
    unscorable: int = 0
    error: str | None = None

    def of(self, quantity: str) -> Floats:
        """The values of one quantity, shape (queries,)."""
        row: Floats = self.values_KQ[QUANTITIES.index(quantity)]
        return row

    def take(self, columns: Sequence[int] | np.ndarray) -> Scores:
        """The same setting on some of the queries (the counts of dropped rollouts then count those alone)."""
        values_KQ = self.values_KQ[:, columns]
        if not self.failed and not self.unscorable:
            return Scores(self.setting, values_KQ)
        # The two kinds of drop differ in one value: a failed rollout has no steps, an unscorable one has.
        dropped = ~np.isfinite(values_KQ[0])
        failed = int(np.sum(dropped & ~np.isfinite(values_KQ[QUANTITIES.index("steps")])))
        return Scores(self.setting, values_KQ, failed, int(np.sum(dropped)) - failed, self.error if failed else None)


def make_scores(setting: str, outcomes: Sequence[Trajectory | EpisodeFailure]) -> Scores:
    """Turn rollouts, one per query in the order of the queries, into columns of values.

    A trajectory with `correct` None is unscorable.
    """
    values_KQ = np.full((len(QUANTITIES), len(outcomes)), np.nan)
    failed = unscorable = 0
    error = None
    for column, outcome in enumerate(outcomes):
        if isinstance(outcome, EpisodeFailure):
            failed += 1
            error = error or outcome.error
        elif outcome.correct is None:
            unscorable += 1
            values_KQ[QUANTITIES.index("steps"), column] = len(outcome.steps)
        else:
            values_KQ[:, column] = (
                float(outcome.correct),
                outcome.large_share,
                outcome.usage.flops,
                outcome.usage.flops_decode,
                _large_tokens(outcome),
                len(outcome.steps),
                outcome.usage.tokens_out,
                outcome.usage.usd,
            )
    return Scores(setting, values_KQ, failed, unscorable, error)


def _large_tokens(trajectory: Trajectory) -> int:
    """Tokens of the steps that the dearest model wrote."""
    return sum(step.tokens for step in trajectory.steps if step.model == len(step.decision.probabilities) - 1)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A method's settings on the test and validation queries, and which setting is its operating point.

    `corners` names, for each cost axis, the settings that the frontier joins (indices into `test`), chosen on
    validation. A method of one setting (a model alone) has no frontier.
    """

    method: str
    test: tuple[Scores, ...]
    validation: tuple[Scores, ...]
    chosen: int
    corners: dict[str, tuple[int, ...]]

    @property
    def operating(self) -> Scores:
        """The operating point on the test queries."""
        return self.test[self.chosen]

    def take(self, columns: Sequence[int] | np.ndarray) -> Sweep:
        """The same sweep on some of the test queries; what validation chose stays."""
        return Sweep(
            self.method, tuple(scores.take(columns) for scores in self.test), self.validation, self.chosen, self.corners
        )


def choose_corners(settings: Sequence[Scores], small: Scores, large: Scores) -> dict[str, tuple[int, ...]]:
    """For each cost axis, the settings at the corners of the concave hull of validation results.

    The two models alone take part as end points but are not listed. Settings without any value are left out.
    """
    candidates = [*settings, small, large]
    accuracies = [_mean(scores, "accuracy") for scores in candidates]
    chosen = {}
    for axis in COST_AXES:
        corners = hull_corners([_mean(scores, axis) for scores in candidates], accuracies)
        chosen[axis] = tuple(i for i in corners if i < len(settings))
    return chosen


def _mean(scores: Scores, quantity: str) -> float:
    values = scores.of(quantity)[np.isfinite(scores.of("accuracy"))]
    return float(values.mean()) if len(values) else float("nan")


def _scored(scores: Scores, quantity: str) -> Floats:
    """The values of a quantity at queries that have an accuracy: an unscorable rollout counts in no mean."""
    return np.where(np.isfinite(scores.of("accuracy")), scores.of(quantity), np.nan)


def measure_setting(scores: Scores, small: Scores, large: Scores, weights_RQ: Floats) -> dict[str, Floats]:
    """Every quantity of one setting, and `pgr`: a value per bootstrap row."""
    figures = {name: weighted_means(_scored(scores, name), weights_RQ) for name in QUANTITIES}
    figures["pgr"] = _gap_recovered(figures["accuracy"], small, large, weights_RQ)
    return figures


def _gap_recovered(accuracy_R: Floats, small: Scores, large: Scores, weights_RQ: Floats) -> Floats:
    """(value - s) / (l - s); NaN in rows where the large model is no better than the small one."""
    low = weighted_means(small.of("accuracy"), weights_RQ)
    gap = weighted_means(large.of("accuracy"), weights_RQ) - low
    recovered: Floats = np.divide(accuracy_R - low, gap, out=np.full(len(low), np.nan), where=gap > 0)
    return recovered


def measure_frontier(sweep: Sweep, small: Scores, large: Scores, weights_RQ: Floats) -> dict[str, Floats]:
    """The `FRONTIER_METRICS` of a sweep: a value per bootstrap row."""
    low = weighted_means(small.of("accuracy"), weights_RQ)
    high = weighted_means(large.of("accuracy"), weights_RQ)
    gap = np.where(high > low, high - low, np.nan)
    curves = {}
    for axis in COST_AXES:
        points = [small, *(sweep.test[i] for i in sweep.corners[axis]), large]
        cost_RS = np.stack([weighted_means(_scored(scores, axis), weights_RQ) for scores in points], axis=1)
        accuracy_RS = np.stack([weighted_means(scores.of("accuracy"), weights_RQ) for scores in points], axis=1)
        curves[axis] = (cost_RS, accuracy_RS)
    area = curve_area(*curves["cost_share"])
    figures = {"frontier_area": area, "apgr": (area - low) / gap}
    alone = {axis: curves[axis][0][:, -1] for axis in COST_AXES}
    for level in GAP_LEVELS:
        wanted = low + level / 100 * gap
        figures[f"cpt{level}"] = first_cost_at(*curves["cost_share"], wanted)
        figures[f"cpt{level}_tokens"] = _ratio(first_cost_at(*curves["large_tokens"], wanted), alone["large_tokens"])
    figures["accuracy_at_60_flops"] = accuracy_at_cost(*curves["flops"], 0.6 * alone["flops"])
    figures["flops_at_98_accuracy"] = first_cost_at(*curves["flops"], np.where(high > 0, 0.98 * high, np.nan))
    figures["flops_share_at_98_accuracy"] = _ratio(figures["flops_at_98_accuracy"], alone["flops"])
    return figures


def _ratio(numerator_R: Floats, denominator_R: Floats) -> Floats:
    nothing = np.full(len(numerator_R), np.nan)
    ratio: Floats = np.divide(numerator_R, denominator_R, out=nothing, where=denominator_R > 0)
    return ratio


def measure_difference(scores: Scores, other: Scores, weights_RQ: Floats) -> dict[str, Floats]:
    """Paired differences (this minus other) over the queries that both have; the shares of FLOPs and money saved."""
    figures = {
        name: weighted_means(_scored(scores, name) - _scored(other, name), weights_RQ)
        for name in ("accuracy", "cost_share", "flops", "flops_decode", "usd")
    }
    both = np.isfinite(scores.of("accuracy")) & np.isfinite(other.of("accuracy"))
    for name in ("flops", "flops_decode", "usd"):
        base = weighted_means(np.where(both, other.of(name), np.nan), weights_RQ)
        figures[f"{name}_saved"] = _ratio(-figures[name], base)
    return figures
