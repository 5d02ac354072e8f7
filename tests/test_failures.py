"""Failure policies: what is tried again, what is borne, which groups are viable, and that errors are never scores."""

from __future__ import annotations

import asyncio
import math
import pickle
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs._faults import count_faults, make_rates
from roro_ray.cluster_config import FaultsConfig
from roro_ray.config import Config
from roro_ray.data.collection import collect, plan_shards
from roro_ray.data.run_dir import RunDir, read_metrics
from roro_ray.data.store import load_trajectories
from roro_ray.errors import ConfigError, RolloutError, ScoreError
from roro_ray.learning.router_plan import make_plan
from roro_ray.learning.router_rewards import collect_rollouts, score_rollouts, weigh_rollouts
from roro_ray.learning.router_run import RouterRun
from roro_ray.routing.episode import EpisodeFailure
from roro_ray.routing.failures import FailFast, MinimumViableGroup, Retry, SteadyRun, Tally, make_policy, try_again
from roro_ray.routing.router import make_router
from roro_ray.settings import load_config
from roro_ray.types import Query, Trajectory, Verdict
from tests.scripted_world import make_scripted_config, make_scripted_queries, make_scripted_runner, make_specs
from tests.test_collect import run_fine, small_config

Run = Callable[[Sequence[Any]], list[Any]]


def failing(times: dict[int, int]) -> tuple[Run, list[list[int]]]:
    """A run of numbers that fails on each the given number of times (and else gives ten times it), and its calls."""
    calls: list[list[int]] = []

    def run(items: Sequence[int]) -> list[Any]:
        calls.append(list(items))
        results: list[Any] = []
        for item in items:
            times[item] = times.get(item, 0) - 1
            results.append(None if times[item] >= 0 else item * 10)
        return results

    return run, calls


@pytest.mark.parametrize(
    ("policy", "expected", "calls", "pauses", "tally"),
    [
        (FailFast(), [0, None, None, 30], [[0, 1, 2, 3]], [], Tally(4, 2, 0, 2)),
        (Retry(2, 0.5), [0, 10, None, 30], [[0, 1, 2, 3], [1, 2]], [0.5], Tally(4, 3, 2, 1)),
        (Retry(4, 0.5), [0, 10, 20, 30], [[0, 1, 2, 3], [1, 2], [2], [2]], [0.5, 1.0, 2.0], Tally(4, 4, 4, 0)),
        (MinimumViableGroup(3, 2, 0.25), [0, 10, None, 30], [[0, 1, 2, 3], [1, 2]], [0.25], Tally(4, 3, 2, 1)),
    ],
)
def test_what_failed_is_tried_again_in_its_place(
    policy: Any, expected: list[Any], calls: list[list[int]], pauses: list[float], tally: Tally
) -> None:
    run, seen = failing({1: 1, 2: 3})
    slept: list[float] = []
    own = Tally()
    assert try_again(range(4), run, lambda result: result is None, policy, own, slept.append) == expected
    assert (seen, slept, own) == (calls, pauses, tally)


def test_the_policies_of_the_settings() -> None:
    faults = FaultsConfig(attempts=3, pause_s=0.1, max_failed_share=0.2, min_group=4)
    assert make_policy(faults) == Retry(3, 0.1, 0.2)
    faults.rollouts = "minimum_group"
    assert make_policy(faults) == MinimumViableGroup(4, 3, 0.1)
    assert make_policy(faults, grouped=False) == Retry(3, 0.1, 0.2)
    faults.rollouts = "fail_fast"
    assert make_policy(faults) == FailFast()
    assert [make_policy(FaultsConfig()).least_group, MinimumViableGroup(4).least_group] == [2, 4]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["faults.rollouts=retri"], "did you mean 'retry'"),
        (["faults.attempts=0"], r"faults\.attempts: got 0, expected at least 1"),
        (["faults.max_score_errors=1.5"], r"expected a share from 0 to 1"),
        (["faults.rollouts=minimum_group", "faults.min_group=99"], r"faults\.min_group=99 and router\.group_size="),
    ],
)
def test_settings_that_cannot_work(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(overrides)


def test_settings_that_would_be_ignored() -> None:
    with pytest.warns(UserWarning, match=r"faults\.min_group=3 will be ignored \(faults\.rollouts=retry\)"):
        load_config(["faults.min_group=3"])
    with pytest.warns(UserWarning, match=r"faults\.attempts=3 will be ignored \(faults\.rollouts=fail_fast\)"):
        load_config(["faults.rollouts=fail_fast", "faults.attempts=3"])


def test_how_much_may_be_lost() -> None:
    def lost(count: int) -> list[EpisodeFailure]:
        return [EpisodeFailure(f"spec {i}", "it broke") for i in range(count)]

    for policy, borne in ((FailFast(), 0), (Retry(max_share=0.1), 2), (MinimumViableGroup(2), 19)):
        policy.check(lost(borne), 20, "stage")
        with pytest.raises(
            RolloutError, match=rf"stage: .*{'20' if borne == 19 else borne + 1}.*spec 0: it broke"
        ) as e:
            policy.check(lost(borne + 1), 20, "stage")
        assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    Retry(max_share=0.29).check(lost(29), 100, "stage")  # 0.29 * 100 is less than 29


def test_a_query_that_keeps_too_few_is_left_out_of_a_collection(tmp_path: Path) -> None:
    config = small_config("faults.rollouts=minimum_group", "faults.min_group=5", "router.group_size=8")
    specs = plan_shards(config)[0].specs
    first, second = list(dict.fromkeys(spec.query.id for spec in specs))[:2]
    of_first = [spec.id for spec in specs if spec.query.id == first]
    bad = {*of_first[4:], next(spec.id for spec in specs if spec.query.id == second)}
    assert len(of_first) > 5, "four are left of the first query, all but one of the second"

    def run(part: Sequence[Any]) -> list[Any]:
        return [EpisodeFailure(s.id, "no") if s.id in bad else run_fine([s])[0] for s in part]

    facts = collect(config, tmp_path, run)
    kept = {trajectory.id for trajectory in load_trajectories(tmp_path)}
    planned = {spec.id for shard in plan_shards(config) for spec in shard.specs}
    assert kept == planned - set(of_first) - bad
    assert (facts.failed, facts.small_groups, facts.groups) == (len(bad), 1, 14)
    assert facts.tally == Tally(len(planned), 2 * len(bad), len(bad), len(bad))


# Groups of router training


def roll_out(config: Config, failed: set[int] = frozenset()) -> Any:
    """The rollouts of the first iteration, those at some positions failed."""
    runner = make_scripted_runner(config)
    plan = make_plan(make_scripted_queries(), config.router, 0, 0)
    specs = [spec for group in plan for spec in group.specs]
    runner.load_router(make_network(config).state_dict(), 0)
    results = asyncio.run(runner.run(specs))
    results = [
        EpisodeFailure(s.id, "no") if i in failed else r for i, (s, r) in enumerate(zip(specs, results, strict=True))
    ]
    return collect_rollouts(plan, results, 0)


def make_network(config: Config) -> Any:
    torch.manual_seed(1)
    return make_router(config.router, 2)


@pytest.mark.parametrize(("least", "small"), [(2, 1), (4, 2), (8, 3)])
def test_groups_that_lost_too_many_are_dropped_and_the_others_learned_from(least: int, small: int) -> None:
    config = make_scripted_config()  # 4 groups of 8
    rollouts = roll_out(config, {*range(0, 7), *range(8, 13), 16})  # 1, 3, 7 and 8 are left
    weighed = weigh_rollouts(rollouts, [None] * 19, config.router, least)
    whole = weigh_rollouts(roll_out(config), [None] * 32, config.router, least)
    assert weighed.sums["small_groups"] == small and weighed.sums["groups"] == 4 and weighed.sums["failed"] == 13
    left_out = {group.query.id for group in rollouts.groups[:small]}
    assert not {query.id for query in weighed.queries} & left_out
    kept = {t.id: values for t, values in zip(weighed.trajectories, weighed.values, strict=True)}
    full = {t.id: values for t, values in zip(whole.trajectories, whole.values, strict=True)}
    last = [t.id for t in rollouts.trajectories if t.query_id == rollouts.groups[3].query.id]
    assert last and all(kept.get(name) == full.get(name) for name in last), "a whole group is learned from as ever"


# Scores that fail


def judge_fails(trajectory: Trajectory) -> bool:
    """About 20% of trajectories, by their ids alone."""
    return zlib.crc32(trajectory.id.encode()) % 5 == 0


def score_most(queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]]) -> list[tuple[Verdict, ...]]:
    """A Judge that likes few large steps, and fails on a fifth."""
    return [
        tuple(
            Verdict(math.nan, error="the judge is out") if judge_fails(t) else Verdict(1.0 - 2 * t.large_share)
            for t in group
        )
        for group in groups
    ]


def train(config: Config, directory: Path, score: Any) -> tuple[Any, list[dict[str, float]], list[str]]:
    """A training in this process; its trainer, metrics, and the ids of all that was rolled out."""
    runner = make_scripted_runner(config)
    states: dict[int, Any] = {}
    seen: list[str] = []

    def run(specs: Sequence[Any], version: int) -> list[Any]:
        runner.load_router(states[version], version)
        results = asyncio.run(runner.run(specs))
        seen.extend(result.id for result in results)
        return results

    def publish(state: Any, version: int) -> None:
        states[version] = {name: value.detach().clone() for name, value in state.items()}

    training = RouterRun(config, directory, make_scripted_queries(), run, score, publish)
    return training.trainer, list(training.iterate()), seen


def test_a_fifth_of_the_scores_failing_is_dropped_counted_and_never_0(tmp_path: Path) -> None:
    config = make_scripted_config()
    config.router.beta, config.router.iterations = 1.0, 4
    trainer, rows, seen = train(config, tmp_path / "a", score_most)
    size = config.router.queries * config.router.group_size
    for number, row in enumerate(rows):
        part = seen[number * size : (number + 1) * size]
        errors = sum(zlib.crc32(name.encode()) % 5 == 0 for name in part)
        assert row["unscored"] == row["dropped_errors"] == errors > 0 and row["scored"] == size - errors
        assert row["score_error_rate"] == errors / size and row["episodes"] == size and row["failed_rate"] == 0
        assert row["learned"] <= size - errors and row["learned"] > 0
    assert 0.1 < sum(row["unscored"] for row in rows) / (4 * size) < 0.3

    # Dropped means that the others are as if these had never been: not a 0, which would pull their group's mean.
    rollouts = roll_out(config)
    weighed = weigh_rollouts(rollouts, score_rollouts(rollouts, score_most, 0.5), config.router)
    kept = {t.id: value[0] for t, value in zip(weighed.trajectories, weighed.values, strict=True)}
    assert kept and not any(judge_fails(t) for t in weighed.trajectories)
    for query in {t.query_id for t in weighed.trajectories}:
        assert sum(kept[t.id] for t in weighed.trajectories if t.query_id == query) == pytest.approx(0, abs=1e-12)
    other, _, _ = train(config, tmp_path / "b", score_most)
    states = trainer.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_too_many_failing_scores_end_the_iteration(tmp_path: Path) -> None:
    config = make_scripted_config()
    config.router.beta, config.faults.max_score_errors = 1.0, 0.05
    with pytest.raises(ScoreError, match=r"\d of 32 scores .* share of 0\.05 .*: the judge is out.*last checkpoint"):
        train(config, tmp_path, score_most)


# The record of a stage


def test_counts_and_rates_of_a_stage(tmp_path: Path) -> None:
    run, facts = RunDir(tmp_path), dict[str, object]()
    with count_faults(run, "collect", facts) as faults:
        faults.add_tally(Tally(rollouts=40, failed_tries=5, retried=4, failed=1))
        faults.add({"groups": 10, "small_groups": 0, "worker_deaths": 1})
        faults.add({"worker_deaths": 1})
    assert facts == {"failed_tries": 5, "retried": 4, "failed": 1, "worker_deaths": 2}
    record = next(read_metrics(run.metrics_file))
    assert record["event"] == "faults" and record["stage"] == "collect" and record["rollouts"] == 40
    assert record["rates"].pop("worker_deaths_per_hour") > 0
    assert record["rates"] == {"failed_tries": round(5 / 44, 6), "retried": 0.1, "failed": 0.025, "small_groups": 0.0}
    assert make_rates({"learner_restarts": 2, "scores": 0, "score_errors": 0}, 1800) == {
        "learner_restarts_per_hour": 4.0
    }
    with pytest.raises(ZeroDivisionError), count_faults(run, "evaluate", facts) as faults:
        faults.add({"rollouts": 3, "failed": 1})
        raise ZeroDivisionError
    assert [line["stage"] for line in read_metrics(run.metrics_file)] == ["collect", "evaluate"]


def test_a_steady_run_counts_over_its_calls() -> None:
    runner = make_scripted_runner(make_scripted_config())
    tried: list[str] = []

    def run(specs: Sequence[Any]) -> list[Any]:
        results = asyncio.run(runner.run(specs))
        fresh = {spec.id for spec in specs} - set(tried)
        tried.extend(spec.id for spec in specs)
        return [EpisodeFailure(r.id, "once") if r.id in fresh and r.seed % 3 == 0 else r for r in results]

    steady = SteadyRun(run, Retry(2, 0.0), "stage")
    specs = make_specs(6)
    again = steady(specs[:4]) + steady(specs[4:])
    assert again == asyncio.run(runner.run(specs)), "what is tried again is what it would have been"
    assert steady.tally == Tally(rollouts=6, failed_tries=2, retried=2, failed=0)
    with pytest.raises(RolloutError, match=r"^part 3: 1 of 1 rollouts failed, .*fail_fast"):
        SteadyRun(lambda part: [EpisodeFailure(s.id, "no") for s in part], FailFast(), "stage")(specs[:1], "part 3")
