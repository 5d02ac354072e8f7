"""Sweeps of every kind of method: rolled out, put together from the two models alone, or filled by the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from roro_ray.evaluation.bootstrap import Floats
from roro_ray.evaluation.methods import Host, Outcome, Setting, score_settings
from roro_ray.evaluation.metrics import COST_AXES, QUANTITIES, Scores, Sweep, choose_corners, make_scores
from roro_ray.evaluation.operating_point import choose_setting, choose_thresholds
from roro_ray.evaluation.oracle import OracleResult
from roro_ray.types import Query


@dataclass(frozen=True, slots=True)
class QuerySets:
    """The queries on which settings are chosen, and those on which they are reported."""

    validation: tuple[Query, ...]
    test: tuple[Query, ...]

    @property
    def all(self) -> tuple[Query, ...]:
        """Validation, then test."""
        return self.validation + self.test


@dataclass(frozen=True, slots=True)
class Anchors:
    """The two models alone, on both sets of queries: the ends of every frontier."""

    small: Sweep
    large: Sweep
    slack: float


def single_sweep(method: str, scores: Scores, validation_size: int) -> Sweep:
    """A method of one setting, from its scores on validation and test queries in one row."""
    validation, test = split_scores(scores, validation_size)
    return Sweep(method, (test,), (validation,), 0, {})


def split_scores(scores: Scores, validation_size: int) -> tuple[Scores, Scores]:
    """Scores on validation and test queries in one row, parted."""
    columns = np.arange(scores.values_KQ.shape[1])
    return scores.take(columns[:validation_size]), scores.take(columns[validation_size:])


def make_sweep(method: str, settings: Sequence[Scores], validation_size: int, anchors: Anchors) -> Sweep:
    """A sweep whose operating point and frontier corners are chosen on validation, by the rule for all methods."""
    parts = [split_scores(scores, validation_size) for scores in settings]
    validation = tuple(part[0] for part in parts)
    small, large = anchors.small.validation[0], anchors.large.validation[0]
    chosen = choose_setting(validation, large, anchors.slack)
    corners = choose_corners(validation, small, large)
    return Sweep(method, tuple(part[1] for part in parts), validation, chosen, corners)


def run_sweep(
    host: Host, method: str, settings: Sequence[Setting], queries: QuerySets, seed: int, anchors: Anchors
) -> Sweep:
    """Roll out a sweep on validation and test queries in one go."""
    scores = score_settings(host, method, settings, queries.all, seed)
    return make_sweep(method, scores, len(queries.validation), anchors)


def query_level_sweep(fails_Q: Floats, flops_Q: Floats, anchors: Anchors, thresholds: int) -> Sweep:
    """The query-level router, put together from the rollouts of the two models alone: no new ones are needed.

    Args:
        fails_Q: predicted probability that the small model fails, for the validation and then the test queries.
        flops_Q: what reading each query costs the predictor, charged whichever model is chosen.
    """
    small_KQ, large_KQ = (
        np.concatenate([sweep.validation[0].values_KQ, sweep.test[0].values_KQ], axis=1)
        for sweep in (anchors.small, anchors.large)
    )
    size = anchors.small.validation[0].values_KQ.shape[1]
    settings = []
    for tau in choose_thresholds(fails_Q[:size], thresholds):
        values_KQ = np.where(fails_Q > tau, large_KQ, small_KQ)
        values_KQ[QUANTITIES.index("flops")] += flops_Q
        settings.append(_with_drops(Scores(f"threshold {tau:.6g}", values_KQ)))
    return make_sweep("query_level", settings, size, anchors)


def _with_drops(scores: Scores) -> Scores:
    """Count the dropped rollouts of a row that was put together from other rows."""
    return replace(scores, failed=1).take(np.arange(scores.values_KQ.shape[1]))


def oracle_sweep(outcomes: Sequence[Outcome], results: Sequence[OracleResult], small: Scores) -> Sweep:
    """The oracle's frontier on the test queries: queries are served as found, cheapest first, the rest by the small.

    Each setting is a highest share of large steps that is still paid for one query, so the line through the
    settings fills queries by rising cost exactly. The operating point pays for every query that can be solved.
    """
    served = make_scores("every solvable query", outcomes)
    solved = np.array([result.solved for result in results])
    share_Q = served.of("cost_share")
    # A query whose search or rollout failed stays dropped at every level: nothing is known of its cost.
    lost = ~np.isfinite(served.of("accuracy")) | np.array([result.error is not None for result in results])
    settings = []
    for level in sorted({float(share) for share in share_Q[solved & ~lost]} | {0.0}):
        values_KQ: Floats = np.where(solved & (share_Q <= level), served.values_KQ, small.values_KQ)
        values_KQ[:, lost] = np.nan
        settings.append(Scores(f"share up to {level:.3g}", values_KQ, int(lost.sum()), 0, served.error))
    every = tuple(range(len(settings)))
    return Sweep("oracle", tuple(settings), (), len(settings) - 1, dict.fromkeys(COST_AXES, every))
