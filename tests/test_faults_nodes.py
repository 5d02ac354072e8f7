"""A node of a cluster is lost in the middle of a stage: what ran there runs elsewhere, and the result is the same.

Three raylets on one machine: a head for the driver, and two nodes with what the large model and the learner ask for.
The node that hosts the large model dies while trajectories are collected, and later, after another has joined, the
one that hosts the learner while it trains: raylet, workers and object store at once, as a machine without power.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fake_cluster import Cluster, many_nodes
from test_faults import faults_of, make_config, plain, run_locally, train_straight

from roro_ray.config import Config
from roro_ray.data.collection import collect
from roro_ray.data.run_dir import RunDir, open_run, read_metrics
from roro_ray.data.store import load_trajectories
from roro_ray.learning.router_run import read_metrics as read_rows
from roro_ray.routing.router_files import load_router
from tests.witness import Witness

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
METHOD = "grpo_outcome"
NODE = {"CPU": 2, "spot": 1}


def make_node_config(run_dir: Path, witness: Path) -> Config:
    config = make_config(run_dir, witness)
    config.router.beta = 0.0
    config.ray.resources = {"large": {"spot": 0.1}, "learner": {"spot": 0.1}}
    config.ray.address = "auto"
    return config


def run_stages(run_dir: str, witness: str) -> dict[str, Any]:
    """In a driver of the cluster: collection and router training."""
    from unittest import mock

    from actors.cluster import open_cluster
    from actors.fleet import start_engines
    from actors.rollout import RolloutPool
    from jobs.stages import collect_stage, router_stage
    from tests.witness import make_watched_engine, make_watched_runner

    config = make_node_config(Path(run_dir), Path(witness))
    run = open_run(config)
    with open_cluster(config.ray):
        with mock.patch("actors.rollout.start_engines", lambda config: start_engines(config, make_watched_engine)):
            pool = RolloutPool.start(config, make_watched_runner)
        try:
            collect_stage(config, run, pool)
            router_stage(config, run, pool, METHOD)
        finally:
            pool.stop()
    return {"nodes": sorted({facts.node for facts in pool.facts})}


def node_of(cluster: Cluster, pid: int) -> int | None:
    """The number of the node that a process belongs to; None: the head's, or gone."""
    for number, node in enumerate(cluster.nodes):
        if node.poll() is None and pid in {child.pid for child in psutil.Process(node.pid).children(recursive=True)}:
            return number
    return None


def wait_until(find: Callable[[], Any], driver: threading.Thread, timeout_s: float = 500) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := find()):
        assert driver.is_alive() and time.monotonic() < deadline, "the driver ended, or nothing is seen of it"
        time.sleep(0.01)
    return found


def test_lost_nodes_change_nothing(tmp_path: Path) -> None:
    witness, run = Witness(str(tmp_path / "witness")), RunDir(tmp_path / "run")
    Path(witness.directory).mkdir()
    outcome: dict[str, Any] = {}
    with many_nodes(cpus=4) as cluster:
        cluster.add_node(NODE)
        cluster.add_node(NODE)

        def drive() -> None:
            try:
                outcome.update(
                    cluster.call("test_faults_nodes:run_stages", str(run.path), witness.directory, timeout_s=550)
                )
            except BaseException as error:
                outcome["error"] = error

        driver = threading.Thread(target=drive)
        driver.start()

        def lose_node(pids: Callable[[], list[int]], kind: str) -> None:
            """Kill the node of one of the processes while it has work of a kind in hand (no kind: while it lives)."""
            pid = wait_until(lambda: next((p for p in pids() if node_of(cluster, p) is not None), None), driver)
            cluster.kill_node(node_of(cluster, pid))
            assert not kind or witness.in_hand(kind)[pid] > 0, "killed in the middle of its work"

        def busy(kind: str) -> Callable[[], list[int]]:
            return lambda: [pid for pid, count in witness.in_hand(kind).items() if count > 0]

        lose_node(busy("engine-large"), "engine-large")
        cluster.add_node(NODE)
        wait_until(lambda: run.is_done("collect"), driver)

        def learners() -> list[int]:
            rows = [r for r in read_metrics(run.metrics_file) if r.get("iteration", 0) >= 3]
            return [int(row["pid"]) for row in rows[:1]]

        lose_node(learners, "")
        driver.join(550)
    assert "error" not in outcome, outcome["error"]
    assert len(outcome["nodes"]) == 2, "both workers were on one node"

    config = dataclasses.replace(make_node_config(run.path, Path(witness.directory)))
    collect(config, tmp_path / "straight", run_locally(config))
    assert plain(load_trajectories(run.trajectories)) == plain(load_trajectories(tmp_path / "straight"))
    expected, rows = train_straight(config, tmp_path / "trained")
    weights = load_router(run.router(METHOD)).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [r["iteration"] for r in read_rows(run.router(METHOD) / "metrics.jsonl")] == [r["iteration"] for r in rows]
    assert faults_of(run, "collect")["engine_deaths"] >= 1
    assert faults_of(run, f"train_router-{METHOD}")["learner_restarts"] >= 1
    assert json.loads((run.path / "done" / "collect.json").read_text())["failed"] == 0
