"""From finished rollouts to advantages: rewards of each group, what was dropped and why, and what to learn from.

Axes: `_B` trajectories, `_T` decisions of a trajectory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roro_ray.config import RouterConfig
from roro_ray.errors import RoroError
from roro_ray.learning.grpo import CONSTANT_SPREAD, EmptyBatchWarning, count_groups, make_advantages
from roro_ray.learning.router_plan import GroupPlan
from roro_ray.reward.combine import combine_reward, step_advantages
from roro_ray.routing.episode import EpisodeFailure
from roro_ray.types import Query, Trajectory, Verdict

Score = Callable[[Sequence[Query], Sequence[Sequence[Trajectory]]], Sequence[Sequence[Verdict]]]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The trajectories of some groups, in one list, with the group of each; failures are counted, not kept.

    `stale` counts trajectories that another version of the router decided than was asked for.
    """

    groups: tuple[GroupPlan, ...]
    trajectories: tuple[Trajectory, ...]
    group_of: tuple[int, ...]  # position in `groups`
    failures: tuple[str, ...] = ()
    stale: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    @property
    def queries(self) -> list[Query]:
        """The query of each trajectory."""
        return [self.groups[group].query for group in self.group_of]


@dataclass(frozen=True, slots=True)
class Advantages:
    """The trajectories to learn from, with one advantage for each of their decisions, and sums for the metrics."""

    queries: list[Query]
    trajectories: list[Trajectory]
    values: list[tuple[float, ...]]
    sums: dict[str, float]


def collect_rollouts(
    groups: Sequence[GroupPlan], results: Sequence[Trajectory | EpisodeFailure], version: int
) -> Rollouts:
    """Sort the results (in the order of the groups' specs) into trajectories, failures and stale ones.

    Raises:
        RoroError: no rollout is left; the first failure is told.
    """
    trajectories: list[Trajectory] = []
    group_of: list[int] = []
    failures: list[str] = []
    stale = 0
    owners = [position for position, group in enumerate(groups) for _ in group.specs]
    for position, result in zip(owners, results, strict=True):
        if isinstance(result, EpisodeFailure):
            failures.append(f"{result.spec_id}: {result.error}")
        elif any(step.decision.version != version for step in result.steps):
            stale += 1
        else:
            trajectories.append(result)
            group_of.append(position)
    if results and not trajectories:
        raise RoroError(
            f"of {len(results)} rollouts {len(failures)} failed (the first: {failures[0] if failures else 'none'}) and "
            f"{stale} were made by another version of the router than {version}: nothing is left to learn from. Look "
            "at the models and at episode.timeout_s."
        )
    return Rollouts(tuple(groups), tuple(trajectories), tuple(group_of), tuple(failures), stale)


def score_rollouts(rollouts: Rollouts, score: Score | None) -> list[Verdict | None]:
    """The Judge's verdict on each trajectory, None for all of them where there is no Judge."""
    if score is None or not rollouts.trajectories:
        return [None] * len(rollouts.trajectories)
    present = sorted(set(rollouts.group_of))
    members = {group: [i for i, owner in enumerate(rollouts.group_of) if owner == group] for group in present}
    scored = score(
        [rollouts.groups[group].query for group in present],
        [[rollouts.trajectories[i] for i in members[group]] for group in present],
    )
    verdicts: list[Verdict | None] = [None] * len(rollouts.trajectories)
    for group, of_group in zip(present, scored, strict=True):
        for index, verdict in zip(members[group], of_group, strict=True):
            verdicts[index] = verdict
    return verdicts


def weigh_rollouts(rollouts: Rollouts, verdicts: Sequence[Verdict | None], config: RouterConfig) -> Advantages:
    """Rewards, advantages and the sums behind the metrics; rows without a reward and constant groups are left out."""
    rewards = [
        combine_reward(trajectory, verdict, rollouts.groups[group].cost_weight, config.beta)
        for trajectory, verdict, group in zip(rollouts.trajectories, verdicts, rollouts.group_of, strict=True)
    ]
    rewards_B = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
    group_ids_B = torch.tensor(rollouts.group_of, dtype=torch.int64)
    with warnings.catch_warnings():  # whether the whole batch is empty is known only after every rank has spoken
        warnings.simplefilter("ignore", EmptyBatchWarning)
        advantages_B, kept_B = make_advantages(rewards_B, group_ids_B, config.normalisation)
    if config.credit == "step":
        values = _step_values(rollouts, verdicts, config)
        kept = [i for i, value in enumerate(values) if any(abs(each) > CONSTANT_SPREAD for each in value)]
    else:
        kept = [int(i) for i in kept_B.nonzero().flatten()]
        values = [(float(a),) * len(t.steps) for a, t in zip(advantages_B, rollouts.trajectories, strict=True)]
    kept = [i for i in kept if rollouts.trajectories[i].steps]
    queries = rollouts.queries
    return Advantages(
        [queries[i] for i in kept],
        [rollouts.trajectories[i] for i in kept],
        [values[i] for i in kept],
        _make_sums(rollouts, verdicts, rewards_B, group_ids_B, len(kept)),
    )


def _step_values(
    rollouts: Rollouts, verdicts: Sequence[Verdict | None], config: RouterConfig
) -> list[tuple[float, ...]]:
    """Step-level advantages of every trajectory; empty where it has no reward."""
    values: list[tuple[float, ...]] = [()] * len(rollouts.trajectories)
    for position, group in enumerate(rollouts.groups):
        rows = [i for i, owner in enumerate(rollouts.group_of) if owner == position]
        weighed = step_advantages(
            [rollouts.trajectories[i] for i in rows], [verdicts[i] for i in rows], group.cost_weight, config.beta
        )
        for row, value in zip(rows, weighed, strict=True):
            values[row] = value or ()
    return values


def _make_sums(
    rollouts: Rollouts, verdicts: Sequence[Verdict | None], rewards_B: Tensor, group_ids_B: Tensor, kept: int
) -> dict[str, float]:
    """Sums and counts that ranks can add up; `finish_metrics` divides them."""
    counts = count_groups(rewards_B, group_ids_B)
    valid_B = ~rewards_B.isnan()
    scored = [v.score for v in verdicts if v is not None and v.error is None and math.isfinite(v.score)]
    trajectories = rollouts.trajectories
    return {
        "episodes": float(len(trajectories)),
        "rewarded": float(valid_B.sum()),
        "reward": float(rewards_B[valid_B].sum()),
        "outcome": float(sum(t.correct is True for t in trajectories)),
        "large_share": sum(t.large_share for t in trajectories),
        "steps": float(sum(len(t.steps) for t in trajectories)),
        "scored": float(len(scored)),
        "process": sum(scored),
        "unscored": float(sum(v is not None for v in verdicts) - len(scored)),
        "failed": float(len(rollouts.failures)),
        "stale": float(rollouts.stale),
        "dropped": float(len(trajectories) - kept),
        "dropped_errors": float(counts.error_rows),
        "constant_groups": float(counts.constant_groups),
        "learned": float(kept),
    }


def finish_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means of what `_make_sums` summed over (all ranks'), counts as they are; NaN stands for a mean of nothing."""

    def mean(name: str, count: str) -> float:
        return sums[name] / sums[count] if sums[count] else math.nan

    metrics = {
        "reward": mean("reward", "rewarded"),
        "outcome": mean("outcome", "episodes"),
        "large_share": mean("large_share", "episodes"),
        "steps": mean("steps", "episodes"),
        "process": mean("process", "scored"),
    }
    counts = ("episodes", "learned", "dropped", "dropped_errors", "constant_groups", "unscored", "failed", "stale")
    return metrics | {name: sums[name] for name in counts}
