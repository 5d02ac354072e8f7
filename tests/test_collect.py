"""Collection: a plan that depends on the settings alone, resume after kill -9, failures as values."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from roro_ray.config import Config
from roro_ray.data.collection import collect, plan_shards, training_queries
from roro_ray.data.store import finished_shards, load_trajectories
from roro_ray.errors import DataError, RolloutError
from roro_ray.plan import count_collected
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.settings import load_config
from roro_ray.types import Trajectory, Usage

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[1]
OVERRIDES = ["data.suites=[chain,word]", "data.train_queries=7", "collect.shard_queries=3", "collect.rollouts=2"]


def small_config(*overrides: str) -> Config:
    return load_config(["faults.pause_s=0", *OVERRIDES, *overrides])


def answer(spec: EpisodeSpec) -> Trajectory:
    query = spec.query
    return Trajectory(
        spec.id, query.id, query.suite, spec.strategy, spec.seed, 0.0, (), query.answer, True, "answer", Usage()
    )


def run_fine(specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
    return [answer(spec) for spec in specs]


def planned_ids(config: Config) -> list[str]:
    return [spec.id for shard in plan_shards(config) for spec in shard.specs]


def test_the_plan_covers_every_query_strategy_and_rollout_once() -> None:
    config = small_config()
    shards, ids = plan_shards(config), planned_ids(config)
    assert [shard.name for shard in shards] == [f"{suite}-{n:05d}" for suite in ("chain", "word") for n in range(3)]
    assert len(ids) == len(set(ids)) == count_collected(config) == 14 * len(config.collect.strategies) * 2
    assert {spec.query.id for shard in shards for spec in shard.specs} == {q.id for q in training_queries(config)}
    assert shards == plan_shards(small_config())


def test_rollouts_differ_in_seed_and_so_do_runs() -> None:
    first = plan_shards(small_config())[0].specs
    assert len({spec.seed for spec in first if spec.strategy == first[0].strategy}) == 2
    other = plan_shards(small_config("seed=1"))[0].specs
    assert {spec.seed for spec in first}.isdisjoint(spec.seed for spec in other)


def test_collecting_writes_what_was_planned_and_again_does_nothing(tmp_path: Path) -> None:
    config, told = small_config(), list[int]()
    facts = collect(config, tmp_path, run_fine, told.append)
    assert facts.made == facts.trajectories == count_collected(config) and facts.failed == 0
    assert sorted(t.id for t in load_trajectories(tmp_path)) == sorted(planned_ids(config))
    assert told == sorted(told) and told[-1] == count_collected(config)

    def run_never(specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        raise AssertionError("finished work was done again")

    again = collect(config, tmp_path, run_never)
    assert again.made == 0 and again.trajectories == facts.trajectories


def test_a_failed_rollout_is_tried_again(tmp_path: Path) -> None:
    seen: set[str] = set()

    def run_failing_once(specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        results = [answer(s) if s.id in seen else EpisodeFailure(s.id, "worker died") for s in specs]
        seen.update(spec.id for spec in specs)
        return results

    config = small_config()
    assert collect(config, tmp_path, run_failing_once).failed == 0
    assert sorted(t.id for t in load_trajectories(tmp_path)) == sorted(planned_ids(config))


def test_rare_failures_are_left_out_and_counted_and_many_stop_the_stage(tmp_path: Path) -> None:
    config = small_config()
    bad = plan_shards(config)[1].specs[0].id

    def run_with(broken: set[str]):
        return lambda specs: [EpisodeFailure(s.id, "no") if s.id in broken else answer(s) for s in specs]

    facts = collect(config, tmp_path / "rare", run_with({bad}))
    assert facts.failed == 1 and facts.first_error == "no" and facts.made == count_collected(config) - 1
    all_of_shard = {spec.id for spec in plan_shards(config)[1].specs}
    with pytest.raises(
        RolloutError, match=r"shard chain-00001: 48 of 48 rollouts failed for good, tried 2 times.*run again"
    ):
        collect(config, tmp_path / "many", run_with(all_of_shard))
    assert list(finished_shards(tmp_path / "many")) == ["chain-00000"]
    collect(config, tmp_path / "many", run_fine)
    assert sorted(t.id for t in load_trajectories(tmp_path / "many")) == sorted(planned_ids(config))


def test_a_truncated_shard_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    config = small_config()
    collect(config, tmp_path, run_fine)
    shard = tmp_path / "word-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"word-00001\.parquet is truncated"):
        collect(config, tmp_path, run_fine)
    shard.unlink()
    assert collect(config, tmp_path, run_fine).made == len(plan_shards(config)[4].specs)
    assert sorted(t.id for t in load_trajectories(tmp_path)) == sorted(planned_ids(config))


SLOW_COLLECTION = """
import sys, time
from pathlib import Path
from roro_ray.data.collection import collect
from tests.test_collect import run_fine, small_config

def run_slowly(specs):
    time.sleep(0.15)
    return run_fine(specs)

collect(small_config(), Path(sys.argv[1]), run_slowly)
"""


def test_killed_in_the_middle_nothing_is_lost_and_nothing_doubled(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    directory = tmp_path / "trajectories"
    process = subprocess.Popen([sys.executable, "-c", SLOW_COLLECTION, str(directory)], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(directory.glob("*.parquet"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "the collection did not start"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    (directory / ".word-00002.parquet.99999.tmp").write_bytes(b"PAR1 half a shard")
    config = small_config()
    before = finished_shards(directory)
    assert 2 <= len(before) < len(plan_shards(config))
    facts = collect(config, directory, run_fine)
    assert facts.made == count_collected(config) - sum(before.values())
    ids = [trajectory.id for trajectory in load_trajectories(directory)]
    assert sorted(ids) == sorted(planned_ids(config)) and not list(directory.glob(".*"))
