"""The page of results and the choice among trainings: computed from the figures, and honest where they disappoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roro_ray.config import Config
from roro_ray.evaluation.comparison import format_comparison
from roro_ray.evaluation.sweeps import QuerySets
from roro_ray.evaluation.tuning import choose_router
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.types import Decision, Query, Step, Trajectory, Usage

pytestmark = pytest.mark.timeout(30)


def make_entry(accuracy: float, share: float, flops: float, change: float | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"accuracy": accuracy, "cost_share": share, "flops": flops, "frontier_area": accuracy - 0.1}
    return entry if change is None else {**entry, "vs_large": {"accuracy": change}}


def make_summary(roro: tuple[float, float], tuned_share: float) -> dict[str, Any]:
    entries = {
        "small": make_entry(0.5, 0.0, 10.0),
        "large": make_entry(1.0, 1.0, 100.0),
        "grpo_outcome_tuned": make_entry(0.99, tuned_share, 50.0),
        "roro": make_entry(*roro, 40.0, roro[0] - 1.0),
        "oracle": make_entry(1.0, 0.1, 20.0),
    }
    control = {"outcome": 0.9, "cost": 0.5}
    return {
        "suites": {"overall": entries, "chain": entries},
        "methods": {method: {"title": method.title()} for method in entries},
        "queries": {"test": 20, "suites": ["chain"]},
        "learning_curves": {"roro": [{"episodes": 128, "accuracy": roro[0], "cost_share": roro[1]}]},
        "judge": {
            "pair_accuracy": {"trained": 0.7},
            "by_kind": {"trained": control},
            "by_round": [{"round": -1, "mean": 0.6}, {"round": 0, "mean": 0.7}],
        },
        "config": {"router": {"iterations": 2, "queries": 4, "group_size": 8}},
        "versions": {"torch": "2.13", "git": {"commit": "abcdef0123456789"}},
    }


TUNING = {0: {"chosen": "b", "candidates": {"b": {"low": 0.1, "high": 0.2, "accuracy": 0.97, "cost_share": 0.3}}}}


def test_the_page_shows_means_with_the_range_over_seeds() -> None:
    page = format_comparison(
        {0: make_summary((1.0, 0.2), 0.3), 1: make_summary((0.99, 0.3), 0.2)}, TUNING, "python -m jobs.compare"
    )
    assert "| Roro (`roro`) | 0.995 [0.990, 1.000] | 0.250 [0.200, 0.300] | 0.40 [0.40, 0.40] |" in page
    assert "every router trained for 64 episodes" in page and "| `roro` | 0.995 @ 0.25 |" in page
    assert "-0.5 points on average (within 1 point) at a large share of 0.250 (at most 0.36)" in page
    assert "against `grpo_outcome_tuned`: large share +0.000 (lower in 1 of 2 seeds)" in page
    assert "| warm start | round 1 |" in page and "b **(chosen)**" in page and "commit abcdef012345" in page


def test_the_page_says_so_when_the_target_is_missed() -> None:
    page = format_comparison({0: make_summary((0.9, 0.5), 0.3)}, TUNING, "x")
    assert "(**not** within 1 point)" in page and "(**more than** 0.36)" in page


def test_a_page_without_reward_and_curves_is_still_a_page() -> None:
    summary = {**make_summary((1.0, 0.2), 0.3), "judge": None, "learning_curves": {}}
    page = format_comparison({0: summary}, {}, "x")
    assert "No reward was learned" in page and "No snapshots" in page


class ScriptedHost:
    """Routers whose accuracy and large share are given by the directory's name, `ACCURACY-SHARE`."""

    def __init__(self) -> None:
        self.accuracy, self.share = 1.0, 1.0

    def use_router(self, directory: Path) -> None:
        self.accuracy, self.share = map(float, directory.name.split("-"))

    def run(self, specs: list[EpisodeSpec]) -> list[Trajectory]:
        alone = specs[0].strategy.startswith("fixed")
        accuracy, share = (1.0, 1.0) if alone else (self.accuracy, self.share)
        return [self._answer(spec, index % 10 < round(10 * accuracy), share) for index, spec in enumerate(specs)]

    def _answer(self, spec: EpisodeSpec, correct: bool, share: float) -> Trajectory:
        models = [1] * round(10 * share) + [0] * (10 - round(10 * share))
        steps = tuple(
            Step(model, "x", 1, 0.9, 0.9, "delimiter", Decision(model, 0.0, (0.5, 0.5)), Usage()) for model in models
        )
        query = spec.query
        return Trajectory(spec.id, query.id, query.suite, "s", 0, 0.0, steps, "1", correct, "answer", Usage(flops=1.0))

    def find_oracle(self, queries: Any) -> Any:
        raise AssertionError("not asked for")


def choose(*names: str) -> str:
    queries = tuple(Query(f"q{i}", "chain", "validation", "?", "1") for i in range(10))
    config = Config()
    config.evaluate.cost_weights = [0.1]
    choice = choose_router(ScriptedHost(), {name: Path(name) for name in names}, QuerySets(queries, ()), config)
    assert set(choice.candidates) == set(names)
    assert np.isclose(choice.candidates[names[0]][1], float(names[0].split("-")[0]))
    return choice.name


def test_the_cheapest_training_at_the_large_models_accuracy_is_chosen() -> None:
    assert choose("1.0-0.8", "1.0-0.3", "0.9-0.1") == "1.0-0.3"


def test_where_none_reaches_it_the_most_accurate_is_chosen() -> None:
    assert choose("0.7-0.1", "0.9-0.9", "0.8-0.2") == "0.9-0.9"
