"""The jobs as users start them: submitted to a Ray that runs, stopped or killed and run again, as the README says."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from roro_ray.config import Config
from roro_ray.data.collection import plan_shards
from roro_ray.data.run_dir import RunDir, read_metrics
from roro_ray.data.store import finished_shards, load_trajectories
from roro_ray.settings import load_config
from tests.documents import find_commands
from tests.processes import ROOT, TINY, find_processes, run_job, short_temp_dir, start_job
from tests.submission import Cluster, running_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
QUICK = str(ROOT / "jobs" / "configs" / "quick.yaml")
RUNTIME_ENV = ROOT / "jobs" / "runtime_env.yaml"
TRAINING = ("python", "-m", "jobs.train_router", "--method", "grpo_outcome", "router.iterations=8")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage in seconds; float64, in which a result does not depend on which episodes share a batch."""
    models = [dataclasses.asdict(model) | {"dtype": "float64"} for model in Config().pool.models]
    content = {
        "pool": {"models": models},
        "data": {"suites": ["chain"], "train_queries": 40, "router_queries": 12}
        | {"validation_queries": 4, "test_queries": 4},
        "collect": {"shard_queries": 2, "strategies": ["fixed:0", "fixed:1", "random:0.5"]},
        "reward": {"rounds": 1, "judge_updates": 2, "rubricor_updates": 4, "queries_per_update": 8},
        "router": {"iterations": 2, "queries": 4, "group_size": 4, "checkpoint_every": 2},
        "evaluate": {"cost_weights": [0.1, 0.8], "random_shares": [0.5], "thresholds": 2, "bootstrap": 100}
        | {"every": 1, "curve_cost_weights": [0.3]},
        "calibrate": {"cost_weights": [0.03, 0.25, 2.0], "queries": 4, "bootstrap": 100},
        "ray": {"timeout_s": 300},  # on a machine that does much else
    }
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def stages(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[list[str]]]:
    """The commands of the stages as the README lists them, for one run."""
    run = RunDir(tmp_path_factory.mktemp("straight") / "run")
    commands = [shlex.split(command) for command in find_commands("README.md") if "run_dir=" in command]
    # The submitted demo does the same stages at once; CI runs the demo itself.
    (submitted,) = [command for command in commands if command[0] == "ray"]
    assert (ROOT / submitted[submitted.index("--runtime-env") + 1]).is_file() and "jobs.demo" in submitted
    commands.remove(submitted)
    for command in commands:
        command[:] = [f"run_dir={run.path}" if word.startswith("run_dir=") else word for word in command]
    commands[0] += ["--config", str(settings)]  # the later ones find the settings in the run
    return run, commands


@pytest.fixture(scope="module")
def collected(cluster: Cluster, stages: tuple[RunDir, list[list[str]]]) -> tuple[RunDir, str]:
    """A collection that was submitted and left alone, and its log."""
    run, commands = stages
    return run, cluster.run("straight-0", *commands[0], runtime_env=RUNTIME_ENV)


@pytest.fixture(scope="module")
def straight(
    cluster: Cluster, stages: tuple[RunDir, list[list[str]]], collected: tuple[RunDir, str]
) -> tuple[RunDir, list[str]]:
    """The same run after each other stage was submitted and left alone; and all the logs."""
    run, (_, *commands) = stages
    logs = [cluster.run(f"straight-{n}", *words, runtime_env=RUNTIME_ENV) for n, words in enumerate(commands, 1)]
    return run, [collected[1], *logs]


@pytest.mark.cluster
def test_every_stage_as_a_job_leaves_its_result_and_a_log_to_read(
    cluster: Cluster, straight: tuple[RunDir, list[str]]
) -> None:
    run, logs = straight
    for stage in ("collect", "make_pairs", "learn_reward", "train_router-roro", "evaluate", "calibrate"):
        assert run.is_done(stage), stage
    assert run.report.stat().st_size > 10_000 and (run.router("roro") / "calibration.json").is_file()
    for log in logs:
        lines = log.splitlines()
        events = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
        assert f" in {run.path} (Python " in events[0] and lines[0] == events[0]
        assert f"all of it in {run.path}" in events[-1] and lines[-1] == events[-1]
        # The other lines are the table on stdout: nothing of Ray, no bar, no colours.
        assert "\x1b" not in log and "\r" not in log and "(pid=" not in log and "WARNING" not in log, log
        assert len(set(lines[1:-1]) - {""}) == len([line for line in lines[1:-1] if line]), log
    assert any("Joined the Ray at" in line and "CPU 4" in line for line in logs[0].splitlines())
    cluster.wait_until_empty()


def test_a_collection_that_is_stopped_goes_on_and_equals_a_straight_one(
    cluster: Cluster, settings: Path, collected: tuple[RunDir, str], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    command = ("python", "-m", "jobs.collect", "--config", str(settings), "seed=1", f"run_dir={run.path}")
    cluster.submit("collect", *command, runtime_env=RUNTIME_ENV)
    cluster.wait_until("collect", lambda: any(run.trajectories.glob("*.parquet")))
    stopped = cluster.ray_job("stop", "collect")
    assert "was stopped" in stopped.stdout + stopped.stderr
    log = cluster.read_log("collect")
    assert cluster.find("collect")["status"] == "STOPPED", log
    assert log.splitlines()[-1].endswith("Stopped by SIGTERM. The same command goes on from here.")
    *_, last = read_metrics(run.metrics_file)
    assert (last["event"], last["signal"]) == ("stopped", "SIGTERM")
    assert 1 <= len(finished_shards(run.trajectories)) < 20 and not run.is_done("collect")
    cluster.wait_until_empty()

    cluster.run("collect-again", *command, runtime_env=RUNTIME_ENV)
    assert _read_steps(run) == _read_steps(collected[0])
    cluster.wait_until_empty()


def _read_steps(run: RunDir) -> list[tuple[object, ...]]:
    """What was written by whom in each trajectory, by id; a trajectory that is there twice would be here twice."""
    return sorted(
        (each.id, each.correct, *((step.model, step.text) for step in each.steps))
        for each in load_trajectories(run.trajectories)
    )


@pytest.mark.cluster
def test_a_training_that_is_stopped_goes_on_to_the_same_weights(
    cluster: Cluster, settings: Path, tmp_path: Path
) -> None:
    straight, stopped = (RunDir(tmp_path / name) for name in ("straight", "stopped"))
    command = (*TRAINING, "--config", str(settings))
    cluster.submit("train", *command, f"run_dir={stopped.path}", runtime_env=RUNTIME_ENV)
    cluster.wait_until("train", lambda: len(_read_iterations(stopped)) >= 3)
    cluster.ray_job("stop", "train")
    assert cluster.find("train")["status"] == "STOPPED", cluster.read_log("train")
    assert "Stopped by SIGTERM" in cluster.read_log("train")
    before = len(_read_iterations(stopped))
    assert before < 8, "the job was to be stopped in the middle"
    cluster.wait_until_empty()  # Ray Train's controller, its workers and their placement group too

    cluster.run("train-again", *command, f"run_dir={stopped.path}", runtime_env=RUNTIME_ENV)
    again = _read_iterations(stopped)[before:]
    assert again == list(range(again[0], 9)) and again[0] > 1, "it began anew"
    cluster.run("train-straight", *command, f"run_dir={straight.path}", runtime_env=RUNTIME_ENV)
    one, other = (load_file(run.router("grpo_outcome") / "router.safetensors") for run in (straight, stopped))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    cluster.wait_until_empty()


def _read_iterations(run: RunDir) -> list[int]:
    return [int(record["iteration"]) for record in read_metrics(run.metrics_file) if "iteration" in record]


def test_exit_codes_of_jobs_are_told(cluster: Cluster, tmp_path: Path) -> None:
    shown = cluster.ray_job(
        *("submit", "--working-dir", ".", "--submission-id", "users-error", "--"),
        *("python", "-m", "jobs.collect", "run_dir=runs/mine"),
    )
    assert shown.returncode == 1 and "run_dir=runs/mine is relative" in shown.stdout  # Ray's CLI knows only 0 and 1
    assert cluster.find("users-error")["driver_exit_code"] == 2
    broken = "import sys; from jobs import collect; collect._main = None; sys.exit(collect.main(sys.argv[1:]))"
    cluster.submit("our-error", "python", "-c", broken, f"run_dir={tmp_path / 'run'}")
    assert cluster.wait("our-error")["driver_exit_code"] == 1
    assert "TypeError" in cluster.read_log("our-error")


def test_a_job_with_a_ray_of_its_own_is_stopped_by_sigterm(tmp_path: Path) -> None:
    """With a Ray of its own, while two stages run side by side in threads and the main thread waits for both."""
    run = RunDir(tmp_path / "run")
    small = [*TINY, "data.train_queries=12", "collect.shard_queries=12", "router.iterations=500", f"run_dir={run.path}"]
    with short_temp_dir() as temp_dir:
        process = start_job(temp_dir, "-m", "jobs.demo", "--quick", *small)
        deadline = time.monotonic() + 200
        while not _read_iterations(run):
            assert process.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()[-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, (temp_dir / "job.log").read_text()[-3000:]
        assert "Stopped by SIGTERM" in (temp_dir / "job.log").read_text()
        _wait_until_ended(temp_dir)
    *_, last = read_metrics(run.metrics_file)
    assert (last["event"], last["signal"]) == ("stopped", "SIGTERM")


def _wait_until_ended(temp_dir: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while left := find_processes(temp_dir):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_collect_killed_and_run_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*TINY, f"run_dir={run_dir}", "data.train_queries=40", "collect.shard_queries=2"]
    with short_temp_dir() as temp_dir:
        process = start_job(temp_dir, "-m", "jobs.collect", *overrides)
        deadline = time.monotonic() + 120
        while len(list((run_dir / "trajectories").glob("*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        _wait_until_ended(temp_dir)  # Ray ends with the driver that started it
    before = finished_shards(run_dir / "trajectories")
    planned = [spec.id for shard in plan_shards(load_config(overrides)) for spec in shard.specs]
    assert 2 <= len(before) < 20, "the job was to be killed in the middle"
    with short_temp_dir() as temp_dir:
        run_job(temp_dir, "-m", "jobs.collect", f"run_dir={run_dir}")
        assert not find_processes(temp_dir), "the job left processes behind"
    assert sorted(trajectory.id for trajectory in load_trajectories(run_dir / "trajectories")) == sorted(planned)
    facts = json.loads((run_dir / "done" / "collect.json").read_text())
    assert facts["made"] == len(planned) - sum(before.values())


@pytest.mark.cluster
def test_compare_killed_and_run_again_keeps_what_was_trained(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_dir, page = tmp_path / "run", tmp_path / "results.md"
    command = ["-m", "jobs.compare", "--quick", "--seeds", "1", "--output", str(page), *TINY, f"run_dir={run_dir}"]
    command += ["reward.judge_updates=1", "reward.rubricor_updates=2", "router.queries=2", "collect.rollouts=1"]
    marker = run_dir / "seed0" / "router" / "grpo_outcome" / "FINISHED.json"
    with short_temp_dir() as temp_dir:
        process = start_job(temp_dir, *command, address=cluster.address)
        deadline = time.monotonic() + 200
        while not marker.exists():
            assert process.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()[-3000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert not page.exists()
    trained = marker.stat().st_mtime_ns
    cluster.wait_until_empty()  # the cluster gives back what the killed one held
    with short_temp_dir() as temp_dir:
        run_job(temp_dir, *command, timeout_s=400, address=cluster.address)
    assert marker.stat().st_mtime_ns == trained, "a finished training was done again"
    text = page.read_text()
    for method in ("roro", "roro_step", "random_rubrics", "fixed_rubric", "grpo_outcome_tuned"):
        assert f"(`{method}`)" in text
    assert "jobs.compare --quick --seeds 1" in text


def test_the_other_commands_of_the_readme_run_too(tmp_path: Path) -> None:
    commands = [command for command in find_commands("README.md") if "run_dir=" not in command]  # those: `straight`
    assert "make demo" in commands and any("--dry-run" in command for command in commands)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "curl":  # asks a server: test_documents
            continue
        if words[0] == "make":
            # The chores run themselves in .ci/run; here it is enough that make knows what to do.
            shown = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert shown.returncode == 0 and "python -m" in shown.stdout, command
            continue
        assert words[:2] == ["python", "-m"], f"do not know how to try {command!r}"
        with short_temp_dir() as temp_dir:
            run_job(temp_dir, "-m", *words[2:], f"run_dir={tmp_path / 'run'}")
