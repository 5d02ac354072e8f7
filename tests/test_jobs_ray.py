"""The jobs as users start them: killed and resumed, submitted to a Ray that runs, and as the README says."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from roro_ray.data.collection import plan_shards
from roro_ray.data.store import finished_shards, load_trajectories
from roro_ray.settings import load_config
from tests.documents import find_commands
from tests.processes import BIN, ROOT, TINY, find_processes, run_job, running_ray, short_temp_dir, start_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
QUICK = str(ROOT / "jobs" / "configs" / "quick.yaml")


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
        while find_processes(temp_dir):  # Ray ends with the driver that started it
            assert time.monotonic() < deadline, [each.cmdline()[:3] for each in find_processes(temp_dir)]
            time.sleep(0.2)
    before = finished_shards(run_dir / "trajectories")
    planned = [spec.id for shard in plan_shards(load_config(overrides)) for spec in shard.specs]
    assert 2 <= len(before) < 20, "the job was to be killed in the middle"
    with short_temp_dir() as temp_dir:
        run_job(temp_dir, "-m", "jobs.collect", f"run_dir={run_dir}")
        assert not find_processes(temp_dir), "the job left processes behind"
    assert sorted(trajectory.id for trajectory in load_trajectories(run_dir / "trajectories")) == sorted(planned)
    facts = json.loads((run_dir / "done" / "collect.json").read_text())
    assert facts["made"] == len(planned) - sum(before.values())


def test_the_demo_as_a_job_of_a_ray_that_runs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running_ray() as (_, environment, address):
        command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
        command += ["python", "-m", "jobs.demo", "--quick", f"run_dir={run_dir}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "succeeded" in done.stdout and f"Report: {run_dir / 'report.html'}" in done.stdout
    summary = json.loads((run_dir / "evaluation" / "summary.json").read_text())
    assert {"small", "large", "grpo_outcome", "roro", "oracle"} <= set(summary["suites"]["overall"])
    assert (run_dir / "report.html").stat().st_size > 10_000 and (run_dir / "frontier.png").stat().st_size > 10_000


def test_compare_killed_and_run_again_keeps_what_was_trained(tmp_path: Path) -> None:
    run_dir, page = tmp_path / "run", tmp_path / "results.md"
    command = ["-m", "jobs.compare", "--quick", "--seeds", "1", "--output", str(page), *TINY, f"run_dir={run_dir}"]
    marker = run_dir / "seed0" / "router" / "grpo_outcome" / "FINISHED.json"
    with short_temp_dir() as temp_dir:
        process = start_job(temp_dir, *command)
        deadline = time.monotonic() + 200
        while not marker.exists():
            assert process.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()[-3000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert not page.exists()
    trained = marker.stat().st_mtime_ns
    with short_temp_dir() as temp_dir:
        run_job(temp_dir, *command, timeout_s=400)
    assert marker.stat().st_mtime_ns == trained, "a finished training was done again"
    text = page.read_text()
    for method in ("roro", "roro_step", "random_rubrics", "fixed_rubric", "grpo_outcome_tuned"):
        assert f"(`{method}`)" in text
    assert "jobs.compare --quick --seeds 1" in text


def test_every_command_of_the_readme_runs_in_quick_form(tmp_path: Path) -> None:
    commands = find_commands("README.md")
    assert sum(command.startswith("python -m jobs.") for command in commands) >= 5 and "make demo" in commands
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
        kept = [word for word in words[3:] if not word.startswith("run_dir=")]
        with short_temp_dir() as temp_dir:
            run_job(temp_dir, "-m", words[2], "--config", QUICK, *TINY, *kept, f"run_dir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
