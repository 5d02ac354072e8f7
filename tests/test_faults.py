"""Processes of a running stage are killed in the middle of their work: it ends as if nothing had happened.

Which test kills what, with SIGKILL, in which job (`yes`: here; a name: in that test file):

| killed         | collect           | learn_reward              | train_router        | evaluate            |
|----------------|-------------------|---------------------------|---------------------|---------------------|
| engine's actor | yes               | faults_reward             | yes                 | yes                 |
| rollout worker | yes, rollout_pool | there is none             | yes                 | yes, also searching |
| reward service | there is none     | there is none             | yes, reward_service | there is none       |
| learner worker | there is none     | faults_reward, lm_learner | yes, learner        | there is none       |
| board          | not used          | on the driver's node      | yes                 | yes                 |
| driver         | jobs_ray          | faults_drivers            | faults_drivers      | faults_drivers      |
| node           | faults_nodes      | by its actors             | faults_nodes        | by its actors       |
| (disk full)    | faults_disk       | faults_disk               | faults_disk         | faults_disk         |

Every kill is proven to be in the middle of work: the dead process had begun what it never ended (tests/witness.py).
Models are scripted, so that every float is the same in every process and batch, and equal means equal to the bit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.fleet import start_engines
from actors.host import ClusterHost
from actors.reward_service import RewardClient
from actors.rollout import RolloutPool
from actors.waiting import find_actor
from jobs.evaluation_stage import evaluate_stage
from jobs.stages import collect_stage, router_stage
from roro_ray.config import Config
from roro_ray.data.collection import collect
from roro_ray.data.run_dir import RunDir, open_run, read_metrics
from roro_ray.data.store import load_trajectories
from roro_ray.engines.pool import EnginePool
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.summary import load_summary
from roro_ray.learning.router_run import FINISHED, RouterRun, make_train_queries
from roro_ray.learning.router_run import read_metrics as read_rows
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import load_router, save_router
from tests.scripted_world import make_engines, make_scripted_config, make_scripted_runner, make_specs
from tests.witness import WatchedReward, Witness, load_watched_reward, make_watched_engine, make_watched_runner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
DELAY_S = 0.05


def make_config(run_dir: Path, witness: Path) -> Config:
    """A pipeline of seconds on scripted models, in actors of their own."""
    config = make_scripted_config(run_dir)
    config.pool.models[0].path = f"scripted:{DELAY_S}:{witness}"
    config.pool.placement = "actors"
    config.ray.engine_cpus = 0.1
    data = config.data
    data.suites, data.train_queries, data.router_queries = ["chain"], 6, 8
    data.validation_queries, data.test_queries = 2, 3
    config.collect.strategies = ["random:0.3", "random:0.7", "fixed:1"]  # no fixed:0: no model to read queries with
    config.router.beta, config.router.iterations, config.router.checkpoint_every = 1.0, 8, 2
    config.reward.rubric_source = "warm"
    config.evaluate.bootstrap = 20
    config.faults.pause_s = 0.1
    return config


@dataclasses.dataclass(frozen=True)
class World:
    """Settings, the pool that everything is done to, and the witness of it."""

    config: Config
    pool: RolloutPool
    witness: Witness

    def run(self, directory: Path) -> tuple[Config, RunDir]:
        """A new run of these settings."""
        config = dataclasses.replace(self.config, run_dir=str(directory))
        return config, open_run(config)


@pytest.fixture(scope="module")
def world(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    config = make_config(Path("unused"), tmp_path_factory.mktemp("witness"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.rollout.start_engines", lambda config: start_engines(config, make_watched_engine))
        pool = RolloutPool.start(config, make_watched_runner)
    yield World(config, pool, Witness(config.pool.models[0].path.split(":")[2]))
    pool.stop()


@contextmanager
def storm(*blows: Callable[[], None]) -> Iterator[None]:
    """Strike the blows one after the other, beside what the block does; all must have struck when it ends."""
    failures: list[BaseException] = []

    def strike() -> None:
        try:
            for blow in blows:
                blow()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    yield
    thread.join(5)
    assert not thread.is_alive(), "the stage was over before all was struck"
    assert not failures, failures


def faults_of(run: RunDir, stage: str) -> dict[str, Any]:
    return next(r for r in read_metrics(run.metrics_file) if r.get("event") == "faults" and r["stage"] == stage)


def plain(trajectories: Sequence[Any]) -> dict[str, Any]:
    return {trajectory.id: dataclasses.asdict(trajectory) for trajectory in trajectories}


def run_locally(config: Config) -> Callable[[Sequence[Any]], Any]:
    runner = make_scripted_runner(make_scripted_config())
    return lambda specs: asyncio.run(runner.run(specs))


def test_collect(world: World, tmp_path: Path) -> None:
    config, run = world.run(tmp_path / "run")
    with storm(lambda: world.witness.kill("engine-large"), lambda: world.witness.kill("worker")):
        collect_stage(config, run, world.pool)
    collect(config, tmp_path / "straight", run_locally(config))
    found = load_trajectories(run.trajectories)  # refuses an id that stands there twice
    assert len(found) == 6 * 3 * config.collect.rollouts
    assert plain(found) == plain(load_trajectories(tmp_path / "straight"))
    faults = faults_of(run, "collect")
    assert faults["worker_deaths"] >= 1 and faults["engine_deaths"] >= 1 and faults["failed"] == 0
    assert faults["rates"]["worker_deaths_per_hour"] > 0 and faults["rates"]["failed"] == 0


def train_straight(config: Config, directory: Path) -> Any:
    """The training without a storm, in this process."""
    runner, states = make_scripted_runner(config_without_delay(config)), {}

    def run(specs: Sequence[Any], version: int) -> Any:
        runner.load_router(states[version], version)
        return asyncio.run(runner.run(specs))

    def publish(state: Any, version: int) -> None:
        states[version] = {name: value.detach().clone() for name, value in state.items()}

    training = RouterRun(config, directory, make_train_queries(config), run, WatchedReward().score, publish)
    rows = list(training.iterate())
    return training.trainer.network.state_dict(), rows


def config_without_delay(config: Config) -> Config:
    models = [dataclasses.replace(config.pool.models[0], path="scripted"), *config.pool.models[1:]]
    return dataclasses.replace(config, pool=dataclasses.replace(config.pool, models=models))


def test_train_router(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = world.run(tmp_path / "run")
    client = RewardClient.start(config, world.witness.directory, load_watched_reward)

    @contextmanager
    def open_reward(config: Config, run: RunDir) -> Iterator[RewardClient]:
        yield client

    monkeypatch.setattr("jobs.stages._open_reward", open_reward)

    def strike_learner() -> None:
        """In the middle of an iteration behind a checkpoint; and the board with it."""
        while not (rows := [r for r in read_metrics(run.metrics_file) if r.get("iteration", 0) >= 3]):
            time.sleep(0.05)
        world.witness.kill("worker")  # what the learner waits for
        os.kill(int(rows[0]["pid"]), signal.SIGKILL)
        os.kill(find_actor(world.pool.board.actor)["Pid"], signal.SIGKILL)

    blows = (lambda: world.witness.kill("engine-small"), lambda: world.witness.kill("reward"), strike_learner)
    try:
        with storm(*blows):
            router_stage(config, run, world.pool, "roro")
    finally:
        client.stop()
    expected, expected_rows = train_straight(config, tmp_path / "straight")
    weights = load_router(run.router("roro")).state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    rows = read_rows(run.router("roro") / "metrics.jsonl")
    counted = ("iteration", "reward", "process", "episodes", "rollouts", "failed", "unscored", "learned")
    assert [{name: row[name] for name in counted} for row in rows] == [
        {name: row[name] for name in counted} for row in expected_rows
    ]
    faults = faults_of(run, "train_router-roro")
    assert faults["learner_restarts"] >= 1 and faults["reward_restarts"] >= 1
    assert faults["worker_deaths"] >= 1 and faults["engine_deaths"] >= 1
    assert faults["failed"] == faults["score_errors"] == 0
    assert faults["scores"] >= 8 * 32  # iterations that were done twice count twice: they were paid for
    done = json.loads((run.path / "done" / "train_router-roro.json").read_text())
    assert done["learner_restarts"] >= 1 and "failed" not in done


def prepare_evaluation(config: Config, run: RunDir) -> None:
    """Trajectories and a router, as if made by the stages before."""
    collect(config, run.trajectories, run_locally(config))
    run.mark_done("collect")
    torch.manual_seed(5)
    save_router(make_router(config.router, 2), run.router("roro"), 8)
    (run.router("roro") / FINISHED).write_text("{}")


class NoPool:
    """Has the host of an evaluation in this process; no actor of it can die."""

    workers = ()

    def fleet_facts(self) -> dict[str, Any]:
        return {}

    def watch_fleet(self, listener: Any) -> Callable[[], None]:
        return lambda: None


def test_evaluate(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = world.run(tmp_path / "run")
    prepare_evaluation(config, run)

    def strike_board() -> None:
        os.kill(find_actor(world.pool.board.actor)["Pid"], signal.SIGKILL)

    blows = (lambda: world.witness.kill("engine-large"), lambda: world.witness.kill("worker"), strike_board)
    with storm(*blows):
        summary = evaluate_stage(config, run, world.pool)
    faults = faults_of(run, "evaluate")
    assert faults["worker_deaths"] >= 1 and faults["engine_deaths"] >= 1
    assert faults["failed"] == faults["oracle_errors"] == 0 and faults["rollouts"] > 50

    config, other = world.run(tmp_path / "straight")
    prepare_evaluation(config, other)
    with LocalHost(config, EnginePool(make_engines())) as host:
        monkeypatch.setattr("actors.host.ClusterHost", lambda pool, seed, count: host)
        straight = evaluate_stage(config, other, NoPool())  # type: ignore[arg-type]
    for part in ("suites", "headline", "learning_curves", "skipped"):
        assert summary[part] == straight[part], part
    assert load_summary(run.evaluation)[1] == load_summary(other.evaluation)[1]


def test_a_worker_dies_while_it_searches_for_the_oracle(world: World) -> None:
    queries = make_train_queries(world.config)
    with storm(lambda: world.witness.kill("worker")):
        found = world.pool.find_oracle(queries, 0)
    with LocalHost(world.config, EnginePool(make_engines())) as host:
        assert found == host.find_oracle(queries)


def test_the_board_dies_and_takes_the_weights_along(world: World, tmp_path: Path) -> None:
    host, results = ClusterHost(world.pool, 0), []
    for seed in (5, 6):  # the second router is published by the board's second life
        torch.manual_seed(seed)
        host.use_router(save_router(make_router(world.config.router, 2), tmp_path / str(seed)))
        results.append(plain(host.run(make_specs(4, "router"))))
        pid = find_actor(world.pool.board.actor)["Pid"]
        os.kill(pid, signal.SIGKILL)
        assert plain(host.run(make_specs(4, "router"))) == results[-1]
        assert find_actor(world.pool.board.actor)["Pid"] != pid
    assert results[0] != results[1]
