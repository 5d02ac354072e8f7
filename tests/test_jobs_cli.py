"""The shell of the jobs: fast help, dry run, exit codes, one clear message, progress, the table."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from jobs._cli import make_parser, resolve_config, run_job, run_stage
from jobs._progress import Progress
from jobs._table import format_results
from jobs._together import run_together
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, open_run, read_metrics
from roro_ray.errors import DataError, EngineError
from roro_ray.plan import describe_plan
from roro_ray.settings import load_config

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[1]
VERBS = (
    *("collect", "make_pairs", "warm_start", "learn_reward", "train_router", "evaluate"),
    *("calibrate", "demo", "compare", "doctor"),
)


@pytest.fixture(autouse=True)
def keep_process_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "WANDB_SILENT"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def start(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"jobs.{verb}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=50)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_fast_and_lists_the_settings(verb: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start(verb, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "settings (key=default)" in done.stdout and "--dry-run" in done.stdout
    # Processor time: the wall clock of a busy machine says nothing about this program.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "doctor"])
def test_a_dry_run_prints_the_plan_and_touches_nothing(verb: str, tmp_path: Path, capsys) -> None:
    module = importlib.import_module(f"jobs.{verb}")
    code = module.main(["--dry-run", f"run_dir={tmp_path / 'run'}", "data.train_queries=7", "router.group_size=3"])
    printed = capsys.readouterr().out
    assert code == 0 and not (tmp_path / "run").exists()
    assert "280 trajectories" in printed and "16 queries x 3 rollouts = 48 trajectories" in printed
    assert "2 logical CPUs" in printed


def test_the_plan_follows_the_settings() -> None:
    overrides = ["ray.workers=4", "router.workers=2", "router.iterations=3", "data.suites=[chain]"]
    plan = describe_plan(load_config(overrides))
    assert "3.5 logical CPUs" in plan and "64 a learner" in plan and "384 episodes" in plan


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_key_is_one_message_and_code_2(verb: str, tmp_path: Path, capsys) -> None:
    module = importlib.import_module(f"jobs.{verb}")
    assert module.main([f"run_dir={tmp_path / 'run'}", "router.betta=1"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'router.beta'" in message and "Traceback" not in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_settings_file_is_one_message(tmp_path: Path, capsys) -> None:
    module = importlib.import_module("jobs.collect")
    assert module.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "Settings file not found" in capsys.readouterr().err


NEEDS = {
    "make_pairs": "collect",
    "learn_reward": "make_pairs",
    "train_router": "learn_reward",
    "evaluate": "collect",
    "calibrate": "train_router",
}


@pytest.mark.parametrize(("verb", "needs"), NEEDS.items())
def test_a_stage_names_the_stage_that_is_missing(verb: str, needs: str, tmp_path: Path, capsys) -> None:
    module = importlib.import_module(f"jobs.{verb}")
    assert module.main([f"run_dir={tmp_path / 'run'}"]) == 2
    assert f"python -m jobs.{needs} run_dir={tmp_path / 'run'}" in capsys.readouterr().err


def run_with(main, *argv: str) -> int:
    return run_job(make_parser("test", "A job.", ("data",)), main, argv)


def failing(error: BaseException):
    def main(config: Config, run: RunDir, arguments: object) -> None:
        raise error

    return main


def lines_said(capsys) -> list[str]:
    """What a job said in a log: each line behind its time; without the first line, which names the run."""
    lines = capsys.readouterr().err.splitlines()
    times = [re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines]
    assert all(times), lines
    return [line[20:] for line in lines if " (Python " not in line]


def test_an_error_of_the_project_is_told_and_recorded(tmp_path: Path, capsys) -> None:
    assert run_with(failing(EngineError("no model in /x: give another path")), f"run_dir={tmp_path}/r") == 2
    assert lines_said(capsys) == ["python -m jobs.test: no model in /x: give another path"]
    (record,) = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert (record["event"], record["error"]) == ("failure", "EngineError")
    assert record["message"] == "no model in /x: give another path"


def test_an_error_inside_rays_wrapper_is_unwrapped(tmp_path: Path, capsys) -> None:
    class Wrapper(Exception):
        cause = DataError("x.parquet is truncated")

    assert run_with(failing(Wrapper("a page of traceback")), f"run_dir={tmp_path}/r") == 2
    assert lines_said(capsys) == ["python -m jobs.test: x.parquet is truncated"]


def test_an_unexpected_error_shows_its_traceback_and_is_recorded(tmp_path: Path, capsys) -> None:
    assert run_with(failing(ZeroDivisionError("boom")), f"run_dir={tmp_path}/r") == 1
    message = capsys.readouterr().err
    assert "Traceback" in message and message.endswith("python -m jobs.test failed: ZeroDivisionError: boom\n")
    assert next(read_metrics(tmp_path / "r" / "metrics.jsonl"))["error"] == "ZeroDivisionError"


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, capsys) -> None:
    assert run_with(failing(KeyboardInterrupt()), f"run_dir={tmp_path}/r") == 130
    assert lines_said(capsys) == ["Stopped by SIGINT. The same command goes on from here."]
    (record,) = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert (record["event"], record["signal"]) == ("stopped", "SIGINT")


@pytest.mark.parametrize("end", ["inside the job", "inside Ray's wait", "while Ray starts"])
def test_sigterm_unwinds_the_job_and_is_told(end: str, tmp_path: Path, capsys) -> None:
    given_back = []

    def main(config: Config, run: RunDir, arguments: object) -> None:
        try:
            if end == "while Ray starts":
                sys.exit(signal.SIGTERM)  # as the handler does that `ray.init` puts in
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            if end == "inside Ray's wait":
                raise KeyboardInterrupt from error  # Ray's core hands on no subclass
            raise
        finally:
            given_back.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run_with(main, f"run_dir={tmp_path}/r") == 143
    assert given_back and signal.getsignal(signal.SIGTERM) is before
    assert lines_said(capsys)[-1] == "Stopped by SIGTERM. The same command goes on from here."
    (record,) = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert (record["event"], record["signal"]) == ("stopped", "SIGTERM")


def test_a_second_sigterm_ends_a_job_whose_way_out_takes_long(tmp_path: Path) -> None:
    code = """
import signal, sys, time
from jobs._cli import make_parser, run_job

def main(config, run, arguments):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        signal.raise_signal(signal.SIGTERM)  # at once: the same request, as `timeout` sends it to the group too
        print("giving back", flush=True)
        time.sleep(60)
        print("given back", flush=True)

run_job(make_parser("test", "A job.", ("data",)), main)
"""
    command = [sys.executable, "-c", code, f"run_dir={tmp_path}/r"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "giving back\n"
        time.sleep(1.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert process.stdout.read() == "" and "a second SIGTERM" in process.stderr.read()


def test_a_relative_run_is_refused_where_ray_would_delete_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert run_with(lambda *_: None, "run_dir=runs/mine") == 2
    assert "run_dir=runs/mine is relative" in capsys.readouterr().err and not (copy / "runs").exists()
    assert run_with(lambda *_: None, "run_dir=file://runs/mine") == 2
    assert "run_dir=file://runs/mine is relative" in capsys.readouterr().err and not (copy / "runs").exists()
    assert run_with(lambda *_: None, f"run_dir={tmp_path}/r") == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_with(lambda *_: None, "run_dir=~/mine") == 0 and (tmp_path / "mine" / "config.yaml").is_file()


def test_a_run_in_memory_is_refused_since_nobody_else_would_see_it(capsys) -> None:
    assert run_with(lambda *_: None, "run_dir=memory://bucket/run") == 2
    assert "run_dir=memory://bucket/run lies in the memory of one process" in capsys.readouterr().err


def test_a_collision_names_the_key_and_the_way_out(tmp_path: Path, capsys) -> None:
    run = open_run(load_config([f"run_dir={tmp_path}/r"]))
    run.trajectories.mkdir()
    (run.trajectories / "a.parquet").touch()
    assert run_with(failing(AssertionError()), f"run_dir={tmp_path}/r", "data.train_queries=3") == 2
    assert "collect was made with data.train_queries=80, now data.train_queries=3" in capsys.readouterr().err


def test_a_warning_is_one_line_and_said_once(tmp_path: Path, capsys) -> None:
    def warn_again(*_: object) -> None:
        for _ in range(2):
            warnings.warn("slow disk", stacklevel=1)
            warnings.simplefilter("always")  # as any use of catch_warnings makes Python forget what it has shown

    with warnings.catch_warnings():
        assert run_with(warn_again, f"run_dir={tmp_path}/r", "wandb.project=mine") == 0
    *said, end = lines_said(capsys)
    assert said == ["warning: wandb.project=mine will be ignored (wandb.mode=disabled).", "warning: slow disk"]
    assert re.fullmatch(rf"python -m jobs.test: finished in [\d.]+ s, all of it in {tmp_path}/r", end)


def test_a_run_keeps_its_settings_for_the_next_stage(tmp_path: Path) -> None:
    open_run(load_config([f"run_dir={tmp_path}/r", "data.train_queries=9"]))
    config = resolve_config([f"run_dir={tmp_path}/r", "router.beta=0.5"], None)
    assert (config.data.train_queries, config.router.beta) == (9, 0.5)


def test_a_stage_is_recorded_and_reopens_the_later_ones(tmp_path: Path) -> None:
    run = open_run(load_config([f"run_dir={tmp_path}/r"]))
    for stage in ("collect", "train_router-roro", "evaluate"):
        run.mark_done(stage)
    with run_stage(run, "make_pairs", "Pairs") as facts:
        facts["pairs"] = 3
    assert run.done_facts("make_pairs")["pairs"] == 3
    assert [run.is_done(stage) for stage in ("collect", "train_router-roro", "evaluate")] == [True, False, False]
    assert [record["stage"] for record in read_metrics(run.metrics_file)] == ["make_pairs"]


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    run = open_run(load_config([f"run_dir={tmp_path}/r"]))
    with pytest.raises(RuntimeError), run_stage(run, "collect", "Collect"):
        raise RuntimeError("no")
    assert not run.is_done("collect")


def test_stages_run_together_and_the_first_failure_is_raised() -> None:
    import threading

    both = threading.Barrier(2, timeout=20)
    run_together(both.wait, both.wait)

    unwound = []

    def work() -> None:
        try:
            while True:
                time.sleep(0.01)
        finally:
            unwound.append("work")

    def fail() -> None:
        raise EngineError("first")

    with pytest.raises(EngineError, match="first"):
        run_together(work, fail)
    assert unwound == ["work"], "the other stage gives back what it holds before the failure is told"


def test_a_stage_that_cannot_be_stopped_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    def fail() -> None:
        raise EngineError("first")

    monkeypatch.setattr("jobs._together._UNWIND_S", 0.1)
    with pytest.raises(EngineError, match="first"):
        run_together(threading.Event().wait, fail)


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr("jobs._progress.time.monotonic", lambda: next(now))
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with Progress("collect", 500, "episodes", done=100) as bar:
        bar.move_to(200)
    # 100 of this run in 10 s; what an earlier run had done does not count.
    assert shown.getvalue()[20:] == "collect: 200/500 episodes (40%), 10/s, 30 s left\n"


def test_the_table_shows_every_method_and_where_the_report_lies(tmp_path: Path) -> None:
    def entry(accuracy: float | None, share: float, flops: float) -> dict[str, object]:
        interval = None if accuracy is None else [accuracy - 0.1, accuracy]
        figures = {"accuracy": accuracy, "cost_share": share, "flops": flops, "flops_decode": flops / 2}
        return {**figures, "ci": {"accuracy": interval, "cost_share": None}}

    summary = {
        "suites": {"overall": {"large": entry(0.9, 1.0, 200.0), "roro": entry(None, 0.25, 50.0)}},
        "methods": {"large": {"title": "Large alone"}, "roro": {"title": "RoRo"}},
        "queries": {"test": 7, "suites": ["chain"]},
        "headline": {"text": "RoRo saves much."},
        "skipped": {"query_level": "nothing to learn from"},
    }
    text = format_results(json.loads(json.dumps(summary)), RunDir(tmp_path))
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["Large alone"][2:] == ["90.0%", "[80.0,", "90.0]", "1.00", "1.00", "1.00"]
    assert rows["RoRo"][1:] == ["-", "0.25", "0.25", "0.25"]
    assert "RoRo saves much." in text and "query_level (nothing to learn from)" in text
    assert text.endswith(f"Report: {(tmp_path / 'report.html').resolve()}")


@pytest.mark.slow
def test_wandb_offline_holds_the_metrics(tmp_path: Path) -> None:
    def main(config: Config, run: RunDir, arguments: object) -> None:
        run.log({"stage": "train_router/roro", "reward": 0.5, "note": "text", "bad": float("nan")})

    assert run_with(main, f"run_dir={tmp_path}/r", "wandb.mode=offline") == 0
    (file,) = (tmp_path / "r" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train_router/roro/reward" in file.read_bytes()
    assert [record["bad"] for record in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [None]
