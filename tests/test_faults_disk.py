"""A disk that is full while a stage writes: a clear error, nothing half-written, and the same command goes on.

The run directory lies on a file system of its own, of a megabyte or a few; a file of ballast takes what room there is.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collect import planned_ids, run_fine, small_config
from test_faults import NoPool, make_config, prepare_evaluation
from test_faults_drivers import make_run

from jobs import learn_reward
from jobs.evaluation_stage import evaluate_stage
from roro_ray.config import Config
from roro_ray.data.collection import collect, plan_shards
from roro_ray.data.files import append_line, write_whole
from roro_ray.data.metrics_file import append_metrics, read_metrics
from roro_ray.data.run_dir import open_run
from roro_ray.data.store import finished_shards, load_trajectories
from roro_ray.engines.pool import EnginePool
from roro_ray.errors import FullDiskError
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.learning.checkpoints import check_complete, list_checkpoints
from roro_ray.learning.router_run import FINISHED, RouterRun
from roro_ray.reward.model import DONE, make_reward, save_reward
from roro_ray.routing.router_files import load_router
from tests.scripted_world import make_engines, make_scripted_config, make_scripted_queries, make_scripted_runner

MESSAGE = r"could not be written: no space is left on its file system.*run the same command again: it goes on"


class Disk:
    """A small file system, and the ballast on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def leave(self, size: int) -> None:
        """Fill it up to so many bytes."""
        self.clear()
        facts = os.statvfs(self.path)
        with self._ballast.open("wb") as file:
            file.write(bytes(max(facts.f_bavail * facts.f_frsize - size, 0)))

    def clear(self) -> None:
        """Take the ballast away."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def mounted(path: Path, size: int) -> Iterator[Disk]:
    """A file system of `size` bytes."""
    path.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a file system of its own needs to be root, and a container that allows it")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", 2**20) as disk:
        yield disk


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob(".*") if path.name.endswith(".tmp")]


def test_a_device_without_room(tmp_path: Path) -> None:
    """Where no file system can be mounted, this stands for one that is full."""
    with pytest.raises(FullDiskError, match=r"/dev/full could not be written"):
        append_line("/dev/full", "a line")
    with pytest.raises(OSError, match="Is a directory"):  # another error stays what it is
        append_line(tmp_path, "a line")
    with pytest.raises(FullDiskError, match=MESSAGE), write_whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        with open("/dev/full", "w") as file:
            file.write("the rest")
    assert not list(tmp_path.iterdir())


def test_metrics(disk: Disk) -> None:
    file = disk.path / "metrics.jsonl"
    disk.leave(20_000)
    with pytest.raises(FullDiskError, match=r"metrics\.jsonl"):
        for number in range(100):
            append_metrics(file, {"number": number, "text": "x" * 900})
    kept = [record["number"] for record in read_metrics(file)]
    assert kept == list(range(len(kept))) and 5 < len(kept) < 100 and file.read_bytes().endswith(b"}\n")
    disk.clear()
    append_metrics(file, {"number": -1})
    assert [record["number"] for record in read_metrics(file)] == [*kept, -1]


def test_collect(disk: Disk) -> None:
    config, directory = small_config(), disk.path / "trajectories"
    disk.leave(40_000)
    with pytest.raises(FullDiskError, match=rf"\w+-0000\d\.parquet {MESSAGE}"):
        collect(config, directory, run_fine)
    finished = finished_shards(directory)
    assert 0 < len(finished) < len(plan_shards(config)) and not leftovers(directory)
    disk.clear()
    facts = collect(config, directory, run_fine)
    assert facts.made == len(planned_ids(config)) - sum(finished.values())
    assert sorted(t.id for t in load_trajectories(directory)) == sorted(planned_ids(config))


def train(config: Config, directory: Path) -> dict[str, torch.Tensor]:
    runner, states = make_scripted_runner(config), {}

    def run(specs: Sequence[Any], version: int) -> Any:
        runner.load_router(states[version], version)
        return asyncio.run(runner.run(specs))

    def publish(state: Any, version: int) -> None:
        states[version] = {name: value.detach().clone() for name, value in state.items()}

    training = RouterRun(config, directory, make_scripted_queries(), run, None, publish)
    list(training.iterate())
    return training.trainer.network.state_dict()


def test_train_router(disk: Disk, tmp_path: Path) -> None:
    """Whatever file it is that finds no room: a snapshot, a checkpoint, the metrics, the router itself."""
    config = make_scripted_config()
    config.router.iterations, config.router.checkpoint_every, config.evaluate.every = 5, 1, 2
    expected = train(config, tmp_path / "straight")
    named = set()
    for number, room in enumerate(range(4096, 61_440, 8192)):
        directory = disk.path / f"router{number}"
        disk.leave(room)
        with pytest.raises(FullDiskError, match=MESSAGE) as error:
            train(config, directory)
        named.add(str(Path(str(error.value).split(" could not")[0]).relative_to(directory).parts[0]))
        assert not (directory / FINISHED).exists() and not leftovers(directory)
        for checkpoint in list_checkpoints(directory / "checkpoints"):
            check_complete(checkpoint)
        disk.clear()
        weights = train(config, directory)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert all(torch.equal(load_router(directory).state_dict()[name], expected[name]) for name in expected)
    assert {"snapshots", "checkpoints"} <= named, named


def test_evaluate(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(disk.path / "run", tmp_path)
    run = open_run(config)
    prepare_evaluation(config, run)
    with LocalHost(config, EnginePool(make_engines())) as host:
        monkeypatch.setattr("actors.host.ClusterHost", lambda pool, seed, count: host)
        disk.leave(30_000)
        with pytest.raises(FullDiskError, match=MESSAGE):
            evaluate_stage(config, run, NoPool())  # type: ignore[arg-type]
        assert not run.is_done("evaluate") and not leftovers(run.path)
        disk.clear()
        summary = evaluate_stage(config, run, NoPool())  # type: ignore[arg-type]
    assert run.is_done("evaluate") and summary["suites"]["overall"]["large"]["n"] == 3
    assert run.report.stat().st_size > 10_000


@pytest.mark.timeout(240)
@pytest.mark.ray
def test_learn_reward_as_a_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, _ = make_run(tmp_path / "measured")
    saved = save_reward(make_reward(config.reward), tmp_path / "model")
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    with mounted(tmp_path / "disk", int(1.7 * size)) as disk:
        _, run = make_run(disk.path / "run")
        assert learn_reward.main([f"run_dir={run.path}"]) == 2
        assert "round_01 could not be written: no space is left" in capfd.readouterr().err
        assert [path.parent.name for path in (run.reward / "rounds").glob(f"*/{DONE}")] == ["round_00"]
        assert not leftovers(run.path) and not run.is_done("learn_reward")
        subprocess.run(["mount", "-o", f"remount,size={5 * size}", str(disk.path)], check=True)
        assert learn_reward.main([f"run_dir={run.path}"]) == 0
        assert run.is_done("learn_reward") and (run.reward / "model" / DONE).is_file()
