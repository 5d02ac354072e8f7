"""The methods that are compared, as sweeps of settings, and how they are rolled out.

Every method is a list of settings, and a setting is a strategy that the one episode loop knows. Rollouts go
through a `Host`, which is a Runner in this process or a pool of rollout workers, so that the comparison is the
same everywhere. All methods share one seed per query: their draws, and so their differences, are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from roro_ray.config import EvaluateConfig
from roro_ray.evaluation.metrics import Scores, make_scores
from roro_ray.evaluation.operating_point import choose_thresholds
from roro_ray.evaluation.oracle import OracleResult
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import Query, Trajectory

Outcome = Trajectory | EpisodeFailure


class Host(Protocol):
    """Where the models live: rolls out episodes, takes over a router, runs the oracle's search."""

    def run(self, specs: Sequence[EpisodeSpec]) -> Sequence[Outcome]:
        """Roll out episodes; results in the order of the specs, a failed one as an `EpisodeFailure`."""
        ...

    def use_router(self, directory: Path) -> None:
        """Load a saved router for the strategies `router`, `router_greedy` and `router_priced`."""
        ...

    def find_oracle(self, queries: Sequence[Query]) -> Sequence[OracleResult]:
        """Run `evaluation.oracle.run_oracle` where the engines are; results in the order of the queries."""
        ...


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """How reports speak of a method: its title, what it sees of the next step, and its rule in a few words."""

    title: str
    peek: str
    rule: str


METHODS: dict[str, MethodInfo] = {
    "small": MethodInfo("Small alone", "none", "the small model writes every step"),
    "large": MethodInfo("Large alone", "none", "the large model writes every step"),
    "random": MethodInfo("Random shares", "none", "each step goes to the large model with a fixed probability"),
    "query_level": MethodInfo("Query-level router", "none", "predicts from the query whether the small model fails"),
    "confidence": MethodInfo("Confidence (STEER-like)", "step", "rewrites a draft with an unsure token"),
    "draft_verify": MethodInfo("Draft and verify (RSD-like)", "step", "rewrites a draft that the large model doubts"),
    "glimpse": MethodInfo("GlimpRouter", "first token", "escalates where the first token is uncertain"),
    "grpo_outcome": MethodInfo("GRPO, outcome only", "router", "trained on outcome and cost alone"),
    "grpo_outcome_tuned": MethodInfo("GRPO, outcome only, tuned", "router", "its cost weight tuned on validation"),
    "ppo_rllib": MethodInfo("PPO by RLlib, outcome only", "router", "another library, on outcome and cost alone"),
    "random_rubrics": MethodInfo("GRPO + random rubrics", "router", "the process reward reads random rubrics"),
    "fixed_rubric": MethodInfo("GRPO + one fixed rubric", "router", "the process reward reads one rubric for all"),
    "roro": MethodInfo("RoRo", "router", "trained on outcome, cost and the rubric's verdict"),
    "roro_step": MethodInfo("RoRo, credit per step", "router", "a criterion that names a step credits that step"),
    "oracle": MethodInfo("Hindsight oracle", "answers", "knows the gold answer: the bound, not a rival"),
}
# A threshold that keeps every draft, so that a rule's signal can be watched along the small model's own text.
KEEP_ALL = {"confidence": "confidence:0", "draft_verify": "draft_verify:0", "glimpse": "glimpse:1e9"}
_WAVE = 4096  # episodes whose trajectories are held at once


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a sweep: a label for reports, the strategy, and the cost weight told to a router."""

    label: str
    strategy: str
    cost_weight: float = 0.0


def fixed_setting(model: int, label: str) -> Setting:
    """One model alone."""
    return Setting(label, f"fixed:{model}")


def random_settings(config: EvaluateConfig) -> list[Setting]:
    """The sweep of random shares."""
    return [Setting(f"share {share:g}", f"random:{share!r}") for share in config.random_shares]


def router_settings(cost_weights: Sequence[float]) -> list[Setting]:
    """The sweep of a trained router: greedy decisions at each cost weight."""
    return [Setting(f"cost weight {weight:g}", "router_greedy", weight) for weight in cost_weights]


def threshold_settings(method: str, watched: Sequence[Outcome], count: int) -> list[Setting]:
    """The sweep of a threshold rule: quantiles of its signal along rollouts that kept every draft.

    Where no signal was recorded (no rollout succeeded) the thresholds are evenly spaced in (0, 1).
    """
    signals = [
        step.decision.signal
        for outcome in watched
        if isinstance(outcome, Trajectory)
        for step in outcome.steps
        if step.decision.signal is not None
    ]
    thresholds = choose_thresholds(signals or [i / 100 for i in range(101)], count)
    return [Setting(f"threshold {tau:.6g}", f"{method}:{tau!r}") for tau in thresholds]


def make_specs(method: str, settings: Sequence[Setting], queries: Sequence[Query], seed: int) -> list[EpisodeSpec]:
    """The episodes of some settings on some queries, setting by setting."""
    return [
        EpisodeSpec(f"{method}/{setting.label}/{query.id}", query, setting.strategy, seed, setting.cost_weight)
        for setting in settings
        for query in queries
    ]


def run_settings(
    host: Host, method: str, settings: Sequence[Setting], queries: Sequence[Query], seed: int
) -> list[Sequence[Outcome]]:
    """Roll out every setting on every query; one sequence of outcomes per setting, in the order of the queries."""
    outcomes = host.run(make_specs(method, settings, queries, seed))
    size = len(queries)
    return [outcomes[i * size : (i + 1) * size] for i in range(len(settings))]


def score_settings(
    host: Host, method: str, settings: Sequence[Setting], queries: Sequence[Query], seed: int
) -> list[Scores]:
    """Roll out every setting and keep the scores alone: trajectories are large, and a sweep has many.

    As many settings at once as make about `_WAVE` episodes.
    """
    scores: list[Scores] = []
    at_once = max(_WAVE // max(len(queries), 1), 1)
    for start in range(0, len(settings), at_once):
        wave = settings[start : start + at_once]
        runs = run_settings(host, method, wave, queries, seed)
        scores += [make_scores(setting.label, run) for setting, run in zip(wave, runs, strict=True)]
    return scores
