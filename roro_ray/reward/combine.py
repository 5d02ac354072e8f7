"""From verdicts to the reward that trains the router: R = outcome - cost_weight * large share + beta * process.

Credit goes to the whole trajectory (the paper), or, `credit=step`, to the step that earned it: a criterion
names a step, so its part of the score belongs to that step's decision, and a step's part of the cost to the
decision that spent it. What names no step (the outcome, `overall` criteria) stays with every decision.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.types import Trajectory, Verdict

CREDITS = ("trajectory", "step")


def combine_reward(trajectory: Trajectory, verdict: Verdict | None, cost_weight: float, beta: float) -> float | None:
    """The reward of one trajectory, or None (an error value: drop and count) where a part of it is missing.

    With `beta` 0 the verdict is not looked at: the outcome-only control.
    """
    if trajectory.correct is None:
        return None
    reward = float(trajectory.correct) - cost_weight * trajectory.large_share
    if beta == 0:
        return reward
    if verdict is None or verdict.error is not None or not math.isfinite(verdict.score):
        return None
    return reward + beta * verdict.score


def step_advantages(
    trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict | None], cost_weight: float, beta: float
) -> list[tuple[float, ...] | None]:
    """One advantage for each decision of each trajectory of one group, centred over the group.

    advantage = (outcome + beta * score of what names no step), centred over the trajectories,
    + (beta * step score - the step's part of the cost), centred over the steps with the same label.
    A trajectory's step parts and its rest add up to `combine_reward`. None where that is None.
    """
    rests: list[float | None] = []
    parts: list[tuple[float, ...]] = []
    for trajectory, verdict in zip(trajectories, verdicts, strict=True):
        reward = combine_reward(trajectory, verdict, cost_weight, beta)
        own = _step_parts(trajectory, verdict, cost_weight, beta) if reward is not None else ()
        parts.append(own)
        rests.append(None if reward is None else reward - sum(own))
    known = [rest for rest in rests if rest is not None]
    mean = sum(known) / len(known) if known else 0.0
    by_name: dict[str, list[float]] = defaultdict(list)
    for trajectory, own in zip(trajectories, parts, strict=True):
        for name, part in zip(_step_names(trajectory), own, strict=False):
            by_name[name].append(part)
    means = {name: sum(values) / len(values) for name, values in by_name.items()}
    return [
        None
        if rest is None
        else tuple(rest - mean + part - means[name] for name, part in zip(_step_names(trajectory), own, strict=True))
        for trajectory, rest, own in zip(trajectories, rests, parts, strict=True)
    ]


def _step_parts(trajectory: Trajectory, verdict: Verdict | None, cost_weight: float, beta: float) -> tuple[float, ...]:
    top = max(len(trajectory.steps[0].decision.probabilities) - 1, 1) if trajectory.steps else 1
    scores = verdict.step_scores if verdict is not None and beta else (0.0,) * len(trajectory.steps)
    return tuple(
        beta * score - cost_weight * step.model / (top * len(trajectory.steps))
        for step, score in zip(trajectory.steps, scores, strict=True)
    )


def _step_names(trajectory: Trajectory) -> list[str]:
    """A step's label (`B`), or its index where its text has none: what makes steps of two trajectories comparable."""
    names = []
    for index, step in enumerate(trajectory.steps):
        label, colon, _ = step.text.partition(": ")
        names.append(label if colon and len(label) <= 12 else str(index))
    return names


def check_credit(credit: str) -> None:
    """Raise ConfigError for a credit that does not exist."""
    if credit not in CREDITS:
        raise ConfigError(
            f"router.credit is {credit!r}: expected one of {', '.join(CREDITS)}{did_you_mean(credit, CREDITS)}"
        )
