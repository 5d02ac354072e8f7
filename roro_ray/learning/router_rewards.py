"""From finished rollouts to advantages: rewards of each group, what was dropped and why, and what to learn from.

Axes: `_B` trajectories, `_T` decisions of a trajectory.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roro_ray.config import RouterConfig
from roro_ray.errors import RoroError, ScoreError
from roro_ray.learning.grpo import CONSTANT_SPREAD, EmptyBatchWarning, count_groups, make_advantages
from roro_ray.learning.router_plan import GroupPlan
from roro_ray.reward.combine import combine_reward, step_advantages
from roro_ray.routing.episode import EpisodeFailure
from roro_ray.routing.failures import Tally
from roro_ray.types import Query, Trajectory, Verdict

_COUNTS = (
    *("rollouts", "failed_tries", "retried", "failed", "stale", "episodes", "learned", "dropped"),
    *("dropped_errors", "scored", "unscored", "groups", "small_groups", "constant_groups"),
)
Score = Callable[[Sequence[Query], Sequence[Sequence[Trajectory]]], Sequence[Sequence[Verdict]]]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The trajectories of some groups, in one list, with the group of each; failures are counted, not kept.

    `stale` counts trajectories that another version of the router decided than was asked for; `tally` the tries.
    """

    groups: tuple[GroupPlan, ...]
    trajectories: tuple[Trajectory, ...]
    group_of: tuple[int, ...]  # position in `groups`
    failures: tuple[str, ...] = ()
    stale: int = 0
    tally: Tally = field(default_factory=Tally)

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
    groups: Sequence[GroupPlan],
    results: Sequence[Trajectory | EpisodeFailure],
    version: int,
    tally: Tally | None = None,
) -> Rollouts:
    """Sort the results (in the order of the groups' specs) into trajectories, failures and stale ones.

    Args:
        tally: of the tries behind the results; None: there was one of each.

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
    tally = tally or Tally(rollouts=len(results), failed_tries=len(failures), failed=len(failures))
    return Rollouts(tuple(groups), tuple(trajectories), tuple(group_of), tuple(failures), stale, tally)


def score_rollouts(rollouts: Rollouts, score: Score | None, max_errors: float = 1.0) -> list[Verdict | None]:
    """The Judge's verdict on each trajectory, None for all of them where there is no Judge.

    Args:
        max_errors: share of the verdicts that may be errors (`faults.max_score_errors`).

    Raises:
        ScoreError: more are; the first is told.
    """
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
    _check_errors(rollouts, verdicts, max_errors)
    return verdicts


def _check_errors(rollouts: Rollouts, verdicts: Sequence[Verdict | None], most: float) -> None:
    errors = [
        f"{trajectory.id}: {verdict.error or f'the score is {verdict.score}'}"
        for trajectory, verdict in zip(rollouts.trajectories, verdicts, strict=True)
        if verdict is not None and not _is_scored(verdict)
    ]
    if len(errors) > most * len(verdicts):
        raise ScoreError(
            f"{len(errors)} of {len(verdicts)} scores of an iteration failed, expected at most a share of {most:g} "
            f"(faults.max_score_errors); the first: {errors[0]}. A router that learned from the rest would learn from "
            "what happens to be scored. Look at the reward service, then run again: training goes on from its last "
            "checkpoint."
        )


def _is_scored(verdict: Verdict) -> bool:
    return verdict.error is None and math.isfinite(verdict.score)


def weigh_rollouts(
    rollouts: Rollouts, verdicts: Sequence[Verdict | None], config: RouterConfig, least_group: int = 2
) -> Advantages:
    """Rewards, advantages and the sums behind the metrics.

    Rows without a reward and constant groups are left out, and whole groups of which fewer than `least_group` rollouts
    have one (the failure policy's minimum).
    """
    rewards = [
        combine_reward(trajectory, verdict, rollouts.groups[group].cost_weight, config.beta)
        for trajectory, verdict, group in zip(rollouts.trajectories, verdicts, rollouts.group_of, strict=True)
    ]
    rewards_B = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
    group_ids_B = torch.tensor(rollouts.group_of, dtype=torch.int64)
    small = _find_small(rollouts, rewards, least_group)
    used_B = torch.tensor([group not in small for group in rollouts.group_of], dtype=torch.bool)
    usable_B = torch.where(used_B, rewards_B, math.nan)
    with warnings.catch_warnings():  # whether the whole batch is empty is known only after every rank has spoken
        warnings.simplefilter("ignore", EmptyBatchWarning)
        advantages_B, kept_B = make_advantages(usable_B, group_ids_B, config.normalisation)
    if config.credit == "step":
        values = _step_values(rollouts, verdicts, config)
        kept = [i for i, v in enumerate(values) if used_B[i] and any(abs(each) > CONSTANT_SPREAD for each in v)]
    else:
        kept = [int(i) for i in kept_B.nonzero().flatten()]
        values = [(float(a),) * len(t.steps) for a, t in zip(advantages_B, rollouts.trajectories, strict=True)]
    kept = [i for i in kept if rollouts.trajectories[i].steps]
    queries = rollouts.queries
    return Advantages(
        [queries[i] for i in kept],
        [rollouts.trajectories[i] for i in kept],
        [values[i] for i in kept],
        _make_sums(rollouts, verdicts, rewards_B, group_ids_B, used_B)
        | {"small_groups": float(len(small)), "learned": float(len(kept))}
        | {"dropped": float(len(rollouts.trajectories) - len(kept))},
    )


def _find_small(rollouts: Rollouts, rewards: Sequence[float | None], least: int) -> set[int]:
    """The groups that lost rollouts or rewards and have fewer than `least` left."""
    left = Counter(group for group, reward in zip(rollouts.group_of, rewards, strict=True) if reward is not None)
    planned = {position: len(group.specs) for position, group in enumerate(rollouts.groups)}
    return {position for position, size in planned.items() if left[position] < min(least, size)}


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
    rollouts: Rollouts, verdicts: Sequence[Verdict | None], rewards_B: Tensor, group_ids_B: Tensor, used_B: Tensor
) -> dict[str, float]:
    """Sums and counts that ranks can add up; `finish_metrics` divides them."""
    valid_B = ~rewards_B.isnan()
    scored = [v.score for v in verdicts if v is not None and _is_scored(v)]
    trajectories, tally = rollouts.trajectories, rollouts.tally
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
        "rollouts": float(tally.rollouts),
        "failed_tries": float(tally.failed_tries),
        "retried": float(tally.retried),
        "failed": float(len(rollouts.failures)),
        "stale": float(rollouts.stale),
        "groups": float(len(rollouts.groups)),
        "dropped_errors": float((~valid_B).sum()),
        "constant_groups": float(count_groups(rewards_B[used_B], group_ids_B[used_B]).constant_groups),
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
        "failed_rate": mean("failed", "rollouts"),
        "retried_rate": mean("retried", "rollouts"),
        "small_group_rate": mean("small_groups", "groups"),
        "score_error_rate": sums["unscored"] / judged if (judged := sums["scored"] + sums["unscored"]) else math.nan,
    }
    return metrics | {name: sums[name] for name in _COUNTS}


def count_failures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What of an iteration's metrics counts failures, and of how many they are."""
    names = ("rollouts", "failed_tries", "retried", "failed", "groups", "small_groups")
    counts = {name: metrics[name] for name in names}
    return counts | {"scores": metrics["scored"] + metrics["unscored"], "score_errors": metrics["unscored"]}
