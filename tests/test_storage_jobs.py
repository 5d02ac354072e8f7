"""All stages on a run in S3, each as a process of its own that finds nothing on its disk; a driver is killed midway."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from roro_ray.cluster_config import StorageConfig
from roro_ray.data.mirror import Mirror
from roro_ray.data.store import load_trajectories
from tests.processes import TINY, find_processes, run_job, short_temp_dir, start_job
from tests.s3_store import running_s3

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
RUN = "s3://bucket/runs/one"
FEW = (
    *TINY,
    "data.train_queries=10",
    "collect.strategies=[fixed:0,fixed:1,random:0.5]",
    "collect.rollouts=2",
    "collect.shard_queries=5",
    "pairs.continuations=1",
    "pairs.folds=3",
    "reward.rounds=1",
    "reward.judge_updates=2",
    "reward.rubricor_updates=1",
    "reward.queries_per_update=4",
    "router.iterations=3",
    "router.queries=3",
    "router.group_size=2",
    "router.checkpoint_every=1",
    "evaluate.cost_weights=[0.1]",
    "evaluate.random_shares=[0.5]",
    "evaluate.curve_cost_weights=[0.1]",
    "evaluate.thresholds=2",
    "evaluate.bootstrap=50",
    "ray.workers=1",
)


def test_every_stage_on_another_machine_and_a_driver_killed_in_training(tmp_path: Path) -> None:
    with running_s3("bucket") as (options, _):
        given = [f"run_dir={RUN}", f"storage.options={{endpoint_url: '{options['endpoint_url']}'}}"]

        def read(machine: str = "reader") -> Mirror:
            mirror = Mirror(RUN, StorageConfig(cache_dir=str(tmp_path / machine), options=options))
            mirror.pull()
            return mirror

        def stage(verb: str, machine: str, *more: str) -> str:
            with short_temp_dir() as temp_dir:
                cache = f"storage.cache_dir={tmp_path / machine}"
                return run_job(temp_dir, "-m", f"jobs.{verb}", *given, cache, *more, timeout_s=400)

        stage("collect", "one", *FEW)
        assert len(load_trajectories(read().local / "trajectories")) == 60
        stage("make_pairs", "two")
        stage("learn_reward", "three")
        with short_temp_dir() as temp_dir:
            cache = f"storage.cache_dir={tmp_path / 'four'}"
            driver = start_job(temp_dir, "-m", "jobs.train_router", *given, cache)
            checkpoint = "router/roro/checkpoints/iteration_000001/COMPLETE.json"
            mirror, deadline = (
                Mirror(RUN, StorageConfig(str(tmp_path / "four"), options=options)),
                time.monotonic() + 400,
            )
            while not mirror.store.list(checkpoint):
                assert driver.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()[-4000:]
                time.sleep(0.05)
            driver.send_signal(signal.SIGKILL)
            driver.wait(10)
            while find_processes(temp_dir):
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert not mirror.store.list("router/roro/FINISHED.json"), "it was to be killed midway"
        stage("train_router", "five")
        rows = [json.loads(line) for line in (read().local / "router/roro/metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == [1, 2, 3], "no iteration is lost or counted twice"
        assert not mirror.store.list("router/roro/ray_train"), "Ray Train's own notes are removed"
        printed = stage("evaluate", "six")
        assert f"Report: {RUN}/report.html" in printed
        found = read().local
        summary = json.loads((found / "evaluation" / "summary.json").read_text())
        assert {"small", "large", "roro"} <= set(summary["suites"]["overall"])
        assert (found / "report.html").stat().st_size > 10_000
        # Training read no trajectories, and so none was downloaded.
        assert not any(found_file.suffix == ".parquet" for found_file in (tmp_path / "five").rglob("*"))
        saved = "".join(path.read_text(errors="replace") for path in found.rglob("*.*") if path.is_file())
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in saved
