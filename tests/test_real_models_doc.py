"""docs/real-models.md: every command of a job plans as it stands there, and what is pasted is what is printed."""

from __future__ import annotations

import importlib
import re
import shlex
import warnings
from pathlib import Path

import pytest

from jobs import collect
from roro_ray.estimate.costs import make_cost_table
from roro_ray.settings import load_config, save_config
from tests.documents import ROOT, find_blocks, find_commands

pytestmark = pytest.mark.timeout(60)
DOCUMENT = "docs/real-models.md"
JOBS = [command for command in find_commands(DOCUMENT) if "jobs." in command]
_CORES = re.compile(r"this machine has \d+ cores")


def arguments_of(command: str) -> tuple[str, list[str]]:
    """The job's name and its arguments, from `python -m jobs.NAME ..`, also behind `ray job submit .. --`."""
    words = shlex.split(command)
    start = words.index("-m")
    return words[start + 1].removeprefix("jobs."), words[start + 2 :]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the runs that the document speaks of have been begun."""
    directory = tmp_path_factory.mktemp("begun")
    for name in ("one_gpu", "api_pair"):
        config = load_config([], ROOT / "configs" / f"{name}.yaml")
        save_config(config, directory / config.run_dir / "config.yaml")
    (directory / "configs").symlink_to(ROOT / "configs")
    return directory


@pytest.fixture
def runs(begun: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as working directory."""
    monkeypatch.chdir(begun)
    monkeypatch.setenv("HF_HUB_CACHE", str(begun / "empty"))
    return begun


@pytest.mark.parametrize("command", JOBS)
def test_every_command_of_a_job_plans(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, arguments = arguments_of(command)
    if job in ("doctor", "costs"):
        load_config([], runs / arguments[arguments.index("--config") + 1])
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = importlib.import_module(f"jobs.{job}").main([*arguments, "--dry-run"])
    printed = capsys.readouterr().out
    assert code == 0 and "assumed      " in printed and "WARNING" not in printed


def test_every_stage_is_shown_for_one_gpu_and_the_right_ones_for_keys() -> None:
    stages = ["collect", "make_pairs", "warm_start", "learn_reward", "train_router", "evaluate", "calibrate"]
    named = [arguments_of(command) for command in JOBS]
    for run, left_out in (("one_gpu", ()), ("api_pair", ("warm_start", "learn_reward"))):
        shown = {job for job, arguments in named if any(run in argument for argument in arguments)}
        assert set(stages) - shown == set(left_out), run


def test_the_pasted_plan_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert collect.main(["--config", "configs/one_gpu.yaml", "--dry-run"]) == 0
    (pasted,) = find_blocks(DOCUMENT, "text")
    assert _CORES.sub("", pasted.strip()) == _CORES.sub("", capsys.readouterr().out.strip())


def test_the_table_of_hours_is_what_the_plans_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    lines = (ROOT / DOCUMENT).read_text("utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if " | " in line]
    names = next(row for row in rows if row[0].startswith("expected, by these"))[1:]
    assert len(names) == 4
    for column, name in enumerate(names, 1):
        assert collect.main(["--config", str(ROOT / "configs" / f"{name}.yaml"), "--dry-run"]) == 0
        plan = capsys.readouterr().out
        total = next(row for row in rows if row[0] == "GPU hours in all")[column]
        assert f"expected     {total} GPU hours in all" in plan
        for stage in ("collect", "warm_start", "learn_reward", "train_router", "evaluate"):
            told = next(row for row in rows if row[0] == f"`{stage}`" and len(row) == 5)[column]
            part = plan.partition(f"expected     {stage}:")[2].partition("expected ")[0]
            assert f"{told} GPU(s)" in part, (name, stage)


def test_the_shares_of_gpu_seconds_are_those_of_the_table() -> None:
    text = (ROOT / DOCUMENT).read_text("utf-8")
    told = {"same_family": "{} of its GPU seconds in the 1.7B", "one_gpu": "{} in the 0.6B and 8B pair"}
    for name, words in told.items():
        table = make_cost_table(load_config([], ROOT / "configs" / f"{name}.yaml"))
        row = next(line for line in table.splitlines() if line.startswith("40% dear steps")).split()
        assert words.format(row[7]) in " ".join(text.split()), name
