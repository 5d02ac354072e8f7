"""Learning curves: what a router can do after so many training episodes, on validation queries.

Each snapshot is swept over a few cost weights and read at the operating point, by the rule that the final
evaluation uses: the cheapest within the allowed distance of the large model, else the most accurate. The
setting is chosen on the queries on which it is shown, so a curve leans optimistic, equally for every method;
the final figures on test queries do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roro_ray.evaluation.bootstrap import interval, make_resamples, point, weighted_means
from roro_ray.evaluation.methods import Host, router_settings, score_settings
from roro_ray.evaluation.metrics import Scores
from roro_ray.evaluation.operating_point import choose_setting
from roro_ray.types import Query


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A router as it was saved after `episodes` training episodes."""

    episodes: int
    directory: Path


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of a learning curve; None where no rollout could be scored. Intervals are 95% bootstrap ones."""

    episodes: int
    setting: str
    accuracy: float | None
    cost_share: float | None
    accuracy_interval: list[float] | None
    cost_share_interval: list[float] | None
    dropped: int


@dataclass(frozen=True, slots=True)
class CurveRule:
    """How a snapshot is read: the cost weights swept, the large model on the same queries, and the slack."""

    cost_weights: Sequence[float]
    large: Scores
    slack: float
    seed: int
    resamples: int


def measure_curve(
    host: Host, method: str, snapshots: Sequence[Snapshot], queries: Sequence[Query], rule: CurveRule
) -> list[CurvePoint]:
    """Measure each snapshot of one method, by rising episodes."""
    weights_RQ = make_resamples([query.suite for query in queries], rule.resamples, rule.seed)
    points = []
    for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.episodes):
        host.use_router(snapshot.directory)
        settings = router_settings(rule.cost_weights)
        scores = score_settings(host, f"{method}@{snapshot.episodes}", settings, queries, rule.seed)
        chosen = scores[choose_setting(scores, rule.large, rule.slack)]
        accuracy = weighted_means(chosen.of("accuracy"), weights_RQ)
        share = weighted_means(chosen.of("cost_share"), weights_RQ)
        points.append(
            CurvePoint(
                episodes=snapshot.episodes,
                setting=chosen.setting,
                accuracy=point(accuracy),
                cost_share=point(share),
                accuracy_interval=interval(accuracy),
                cost_share_interval=interval(share),
                dropped=sum(score.failed + score.unscorable for score in scores),
            )
        )
    return points
