"""The driver of a job is killed in the middle of its work: the same command goes on, and ends as if it had not been.

Models compute in float64, in which a result does not depend on which episodes share a batch, so equal means equal to
the bit. A Rubricor and a Judge that learn in the driver itself go on from their last round, an evaluation begins
anew: its rollouts are not kept, and it changes nothing until it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import SimulatedRunner

from actors.rollout import make_runner
from jobs import evaluate, learn_reward, train_router
from jobs.evaluation_stage import make_query_sets
from roro_ray.config import Config, PairsConfig
from roro_ray.data.collection import training_queries
from roro_ray.data.run_dir import RunDir, open_run, read_json, read_metrics
from roro_ray.data.store import load_trajectories, save_pairs, save_trajectories
from roro_ray.evaluation.evaluate import Inputs, collect_alone
from roro_ray.evaluation.evaluate import evaluate as run_evaluation
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.summary import load_summary, make_summary
from roro_ray.learning.router_run import RouterRun, make_train_queries
from roro_ray.learning.router_run import read_metrics as read_rows
from roro_ray.reward.model import DONE
from roro_ray.reward.pairs import make_pairs
from roro_ray.routing.router_files import load_router
from roro_ray.settings import load_config
from tests.processes import find_processes, short_temp_dir, start_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
METHOD = "grpo_outcome"
SETTINGS = (
    *("data.suites=[chain]", "data.train_queries=12", "data.router_queries=8", "data.validation_queries=2"),
    *("data.test_queries=3", "collect.strategies=[fixed:0,fixed:1,random:0.5]", "evaluate.thresholds=2"),
    *("evaluate.random_shares=[0.5]", "evaluate.cost_weights=[0.1,0.8]", "evaluate.bootstrap=50", "evaluate.every=2"),
    *("evaluate.curve_cost_weights=[0.3]", "router.iterations=6", "router.queries=3", "router.group_size=4"),
    *("router.checkpoint_every=2", "reward.rounds=2", "reward.judge_updates=1", "reward.rubricor_updates=1"),
    *("reward.queries_per_update=4", "ray.timeout_s=400"),
)


def make_run(directory: Path) -> tuple[Config, RunDir]:
    """A run whose first two stages are done, by simulation."""
    config = load_config([*SETTINGS, f"run_dir={directory}"])
    for model in config.pool.models:
        model.dtype = "float64"
    run = open_run(config)
    runner = SimulatedRunner(("chain",), config.data.train_queries, seed=config.data.seed)
    trajectories = runner.collect()
    save_trajectories(run.trajectories / "chain-00000.parquet", trajectories)
    save_pairs(run.pairs / "chain-00000.parquet", make_pairs(runner.queries, trajectories, PairsConfig()))
    run.mark_done("collect")
    run.mark_done("make_pairs")
    return config, run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """One run for all jobs of this file, each killed and run again."""
    return make_run(tmp_path_factory.mktemp("killed") / "run")[1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a job has: sums over other parts round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_when(run: RunDir, command: Sequence[str], seen: Callable[[str], bool]) -> None:
    """Run a job until `seen` (told its output), kill its driver, and wait until Ray has ended with it."""
    with short_temp_dir() as temp_dir:
        process = start_job(temp_dir, "-m", *command, f"run_dir={run.path}")
        deadline = time.monotonic() + 800
        while not seen((temp_dir / "job.log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()[-3000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        while find_processes(temp_dir):
            assert time.monotonic() < deadline, "Ray outlives its driver"
            time.sleep(0.2)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_learn_reward(run: RunDir, tmp_path: Path) -> None:
    rounds = run.reward / "rounds"
    kill_when(run, ["jobs.learn_reward"], lambda text: (rounds / "round_00" / DONE).exists())
    assert not run.is_done("learn_reward") and not (rounds / "round_01" / DONE).exists(), "killed in the second round"
    first = (rounds / "round_00" / DONE).stat().st_mtime_ns
    assert learn_reward.main([f"run_dir={run.path}"]) == 0
    assert (rounds / "round_00" / DONE).stat().st_mtime_ns == first, "a finished round was done again"

    _, straight = make_run(tmp_path / "straight")
    assert learn_reward.main([f"run_dir={straight.path}"]) == 0
    assert files_of(run.reward / "model") == files_of(straight.reward / "model")
    found, expected = (read_json(each.reward / "result.json") for each in (run, straight))
    for part in ("pair_accuracy", "by_kind", "pairs"):
        assert found[part] == expected[part]


def train_straight(config: Config, directory: Path) -> Any:
    """The training in this process, without Ray."""
    from jobs.stages import method_config

    config = method_config(config, METHOD)
    runner, loop, states = make_runner(config, ()), asyncio.new_event_loop(), {}

    def roll_out(specs: Sequence[Any], version: int) -> Any:
        runner.load_router(states[version], version)
        return loop.run_until_complete(runner.run(specs))

    def publish(state: Any, version: int) -> None:
        states[version] = {name: value.detach().clone() for name, value in state.items()}

    training = RouterRun(config, directory, make_train_queries(config), roll_out, None, publish)
    rows = list(training.iterate())
    loop.close()
    return training.trainer.network.state_dict(), rows


@pytest.mark.cluster
def test_train_router(run: RunDir, tmp_path: Path, local_ray: None) -> None:
    directory = run.router(METHOD)
    command = ["jobs.train_router", "--method", METHOD]
    kill_when(run, command, lambda text: len(read_rows(directory / "metrics.jsonl")) >= 3)
    before = len(read_rows(directory / "metrics.jsonl"))
    assert 3 <= before < 6 and (directory / "checkpoints" / "iteration_000002").is_dir(), "killed behind a checkpoint"
    assert train_router.main(["--method", METHOD, f"run_dir={run.path}"]) == 0

    config = load_config([f"run_dir={run.path}"], base=load_saved(run))
    expected, expected_rows = train_straight(config, tmp_path)
    weights = load_router(directory).state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    rows = read_rows(directory / "metrics.jsonl")
    for name in ("iteration", "episodes", "rollouts", "learned", "reward", "loss"):
        assert [row[name] for row in rows] == [row[name] for row in expected_rows], name


def load_saved(run: RunDir) -> Config:
    from roro_ray.settings import load_saved_config

    return load_saved_config(run.config_file)


@pytest.mark.cluster
def test_evaluate(run: RunDir, local_ray: None) -> None:
    kill_when(run, ["jobs.evaluate"], lambda text: "confidence (" in text)
    assert not run.is_done("evaluate") and not run.evaluation.exists(), "nothing is written until it ends"
    assert evaluate.main([f"run_dir={run.path}"]) == 0

    config = load_saved(run)
    alone = collect_alone(training_queries(config), load_trajectories(run.trajectories))
    inputs = Inputs(
        config, make_query_sets(config), {METHOD: run.router(METHOD)} if run.router(METHOD).is_dir() else {}
    )
    with LocalHost(config) as host:
        straight = run_evaluation(dataclasses.replace(inputs, alone=alone), host)
    expected = make_summary(straight, {}, {}, None, config.evaluate.bootstrap, config.seed)["suites"]["overall"]
    found = load_summary(run.evaluation)[0]["suites"]["overall"]
    assert found.keys() == expected.keys() and found["large"]["n"] == 3
    for method in found:
        for name in ("n", "failed", "accuracy", "cost_share", "flops", "frontier_area"):
            wanted = expected[method][name]  # an area needs points that differ in cost: else there is none
            assert found[method][name] == (wanted and pytest.approx(wanted, rel=1e-12)), (method, name)
    faults = [r for r in read_metrics(run.metrics_file) if r.get("event") == "faults" and r["stage"] == "evaluate"]
    assert len(faults) == 1 and faults[0]["failed"] == 0 and faults[0]["rollouts"] >= 5 * len(found)
