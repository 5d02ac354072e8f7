"""The run directory: resume, collisions, metrics that survive a kill, versions."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from roro_ray.data.run_dir import append_metrics, open_run, read_json, read_metrics, saved_config
from roro_ray.errors import ConfigError, DataError
from roro_ray.settings import load_config

pytestmark = pytest.mark.timeout(60)


def settings(path: Path, *overrides: str):
    return load_config([f"run_dir={path}", *overrides])


def test_a_new_run_holds_its_settings_and_versions(tmp_path: Path) -> None:
    config = settings(tmp_path / "new", "router.beta=0.5")
    run = open_run(config)
    assert saved_config(run.path) == config
    versions = read_json(run.path / "versions.json")
    assert versions["python"] and versions["pyarrow"] and "git" in versions
    if versions["git"] is not None:
        assert len(versions["git"]["commit"]) == 40


def test_the_same_settings_go_on_and_finished_stages_are_known(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path / "run"))
    assert not run.is_done("collect")
    with pytest.raises(DataError, match=r"python -m jobs\.collect"):
        run.require("collect")
    run.mark_done("collect", seconds=3.5)
    again = open_run(settings(tmp_path / "run", "ray.workers=1"))
    again.require("collect")
    assert again.done_facts("collect")["seconds"] == 3.5
    assert saved_config(run.path).ray.workers == 1


def test_a_setting_of_a_stage_that_is_there_cannot_change(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path / "run"))
    run.trajectories.mkdir()
    (run.trajectories / "a.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"collect was made with seed=0, now seed=1.*another run_dir"):
        open_run(settings(tmp_path / "run", "seed=1"))
    assert saved_config(run.path).seed == 0
    # A stage that has no output yet may still change, and so may what never shapes a result.
    open_run(settings(tmp_path / "run", "router.beta=0.1", "episode.timeout_s=5"))


def test_a_directory_that_is_no_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        open_run(settings(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_used_is_told_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for below in ("run", "run/deeper"):
        with pytest.raises(ConfigError, match=rf"run_dir={tmp_path}/file/{below} cannot be used: .*Not a directory"):
            open_run(settings(tmp_path / "file" / below))
    with pytest.raises(ConfigError, match=r"run_dir=.* cannot be used: .*File name too long"):
        saved_config(tmp_path / ("x" * 300))
    cache = settings(tmp_path, f"storage.cache_dir={tmp_path}/file/cache").storage
    with pytest.raises(ConfigError, match=rf"storage\.cache_dir={tmp_path}/file/cache cannot be used"):
        saved_config("memory://nowhere/run", cache)


def test_stages_side_by_side_forget_the_same_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(settings(tmp_path / "run"))
    run.mark_done("evaluate")
    both = list((run.path / "done").glob("evaluate*.json"))
    run.reopen_after("train_router-roro")
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(both))  # looked before the other removed it
    run.reopen_after("train_router-grpo_outcome")
    assert not run.is_done("evaluate")


def test_a_line_cut_by_a_kill_harms_no_other(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_metrics(file, {"step": 1})
    with file.open("a") as handle:
        handle.write('{"step": 2, "los')
    append_metrics(file, {"step": 3, "path": tmp_path})
    assert [record["step"] for record in read_metrics(file)] == [1, 3]
    assert list(read_metrics(tmp_path / "none.jsonl")) == []


def append_many(file: str, process: int) -> None:
    for index in range(200):
        append_metrics(file, {"process": process, "index": index, "text": "x" * 500})


def test_processes_append_without_mixing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_many, args=(str(file), n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(50)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((r["process"], r["index"]) for r in records) == [(p, i) for p in range(2) for i in range(200)]


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json cannot be read"):
        read_json(tmp_path / "x.json")
