"""Runs in S3, against a server of the test's own: errors that users meet, stores that are busy, leases, kills."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from actors.storage import drop_train_notes, train_storage
from roro_ray.cluster_config import StorageConfig
from roro_ray.data import stores
from roro_ray.data.lease import NAME, Holder, Lease
from roro_ray.data.mirror import Mirror, fetch
from roro_ray.data.run_dir import open_run
from roro_ray.errors import CheckpointError, ConfigError, DataError
from roro_ray.learning.checkpoints import MARKER, check_complete, find_checkpoint, write_directory
from roro_ray.settings import load_config
from tests.s3_store import Gate, running_s3

pytestmark = pytest.mark.timeout(120)
PLACE = "s3://bucket/runs/one"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[dict[str, Any], Gate]]:
    with running_s3("bucket") as found:
        yield found


@pytest.fixture
def options(server: tuple[dict[str, Any], Gate], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(stores, "PAUSES_S", (0.01, 0.01, 0.01))
    system = s3fs.S3FileSystem(**server[0])
    yield server[0]
    server[1].fails = lambda method, path, writes: False
    s3fs.S3FileSystem.clear_instance_cache()
    if system.exists("bucket/runs"):
        system.rm("bucket/runs", recursive=True)


@pytest.fixture
def gate(server: tuple[dict[str, Any], Gate]) -> Gate:
    return server[1]


def make_mirror(cache: Path, options: dict[str, Any], place: str = PLACE) -> Mirror:
    return Mirror(place, StorageConfig(cache_dir=str(cache), options=options))


def save_checkpoint(root: Path, number: int) -> None:
    with write_directory(root / "checkpoints" / f"iteration_{number:06d}") as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(str(number))


def test_what_is_here_comes_back_there(options: dict[str, Any], tmp_path: Path) -> None:
    one, two = make_mirror(tmp_path / "a", options), make_mirror(tmp_path / "b", options)
    save_checkpoint(one.local, 1)
    assert one.push() == 3 and one.push() == 0
    two.pull()
    check_complete(two.local / "checkpoints" / "iteration_000001")
    assert two.push() == 0 and two.has("checkpoints") and not two.has("router")
    one.store.write("checkpoints/iteration_000001/a", b"2")  # of the same size: only the checksum tells
    two.pull()
    with pytest.raises(CheckpointError, match="changed after it was written"):
        check_complete(two.local / "checkpoints" / "iteration_000001")
    model = fetch(f"{PLACE}/checkpoints/iteration_000001", two.storage, "b")
    assert [path.name for path in model.iterdir()] == ["b"]


def test_the_newer_checkpoint_is_whole_before_the_older_one_goes(
    options: dict[str, Any], gate: Gate, tmp_path: Path
) -> None:
    mirror = make_mirror(tmp_path / "a", options)
    save_checkpoint(mirror.local, 1)
    mirror.push()
    save_checkpoint(mirror.local, 2)
    for path in (mirror.local / "checkpoints" / "iteration_000001").iterdir():
        path.unlink()
    gate.log.clear()
    mirror.push()
    writes = [(method, path.rpartition("checkpoints/")[2]) for method, path in gate.log if method in ("PUT", "DELETE")]
    old, new = "iteration_000001", "iteration_000002"
    assert sorted(writes[:2]) == [("PUT", f"{new}/a"), ("PUT", f"{new}/b")]
    assert writes[2:4] == [("PUT", f"{new}/{MARKER}"), ("DELETE", f"{old}/{MARKER}")]
    assert sorted(writes[4:]) == [("DELETE", f"{old}/a"), ("DELETE", f"{old}/b")]


def test_a_store_that_goes_away_in_the_middle_leaves_one_whole_checkpoint(
    options: dict[str, Any], gate: Gate, tmp_path: Path
) -> None:
    mirror = make_mirror(tmp_path / "work", options)
    save_checkpoint(mirror.local, 0)
    mirror.push()
    for number in range(1, 7):  # each time after one write more
        save_checkpoint(mirror.local, number)
        for path in (mirror.local / "checkpoints" / f"iteration_{number - 1:06d}").iterdir():
            path.unlink()
        first = gate.writes
        gate.fails = lambda method, path, writes, last=first + number: (
            method in ("PUT", "DELETE", "POST") and writes >= last
        )
        with pytest.raises(DataError, match=r"after 4 tries the store still answers.*[Rr]un the same command again"):
            mirror.push()
        gate.fails = lambda method, path, writes: False
        reader = make_mirror(tmp_path / f"reader{number}", options)
        reader.pull()
        found = find_checkpoint(reader.local / "checkpoints")
        assert found is not None and found.name in (f"iteration_{number:06d}", f"iteration_{number - 1:06d}")
        make_mirror(tmp_path / "work", options).push()
        reader.pull()
        found = find_checkpoint(reader.local / "checkpoints")
        assert found is not None and found.name == f"iteration_{number:06d}"


def test_a_busy_store_is_tried_again(options: dict[str, Any], gate: Gate, tmp_path: Path) -> None:
    mirror = make_mirror(tmp_path, options)
    save_checkpoint(mirror.local, 1)
    seen: set[tuple[str, str]] = set()

    def the_first_time(method: str, path: str, writes: int) -> bool:
        new = (method, path) not in seen
        seen.add((method, path))
        return new

    gate.refused, gate.fails = 0, the_first_time
    mirror.push()
    make_mirror(tmp_path / "b", options).pull()
    assert gate.refused > 5
    assert len(mirror.store.list()) == 3


def test_what_users_get_wrong_is_told_with_the_way_out(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_one(place: str, given: dict[str, Any]) -> None:
        config = load_config([f"run_dir={place}", f"storage.cache_dir={tmp_path}"])
        config.storage.options = given
        open_run(config)

    with pytest.raises(ConfigError, match=r"s3://nowhere/run: .*no such bucket.*Create it first"):
        open_one("s3://nowhere/run", options)
    with pytest.raises(ConfigError, match=r"storage\.options do not suit s3://.*'endpoint'.*s3fs"):
        open_one(PLACE, {"endpoint": "x"})
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match=r"not allowed to .*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as caught:
        open_one(PLACE, options)
    assert secret not in str(caught.value)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # `fsspec.registry` is a view; the module of that name holds the dict behind it.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"not installed.*`pip install s3fs`, on every node"):
        open_one(PLACE, options)


def test_one_job_at_a_time(options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_mirror(tmp_path, options).store
    mine, other = Lease(store), Lease(store)
    session, before = mine.take()
    assert before is None
    with pytest.raises(DataError, match=r"is working on this run\. Only one job at a time"):
        other.take()
    mine.renew()
    mine.release()
    second, last = other.take()
    assert last is not None and last.session == session and last.released
    with pytest.raises(DataError, match=r"may write there no more, .* took over"):
        mine.check(session)
    writer = make_mirror(tmp_path, options)
    writer.session = session
    writer.local.mkdir(parents=True)
    (writer.local / "report.html").write_text("late")
    with pytest.raises(DataError, match="took over"):
        writer.push()
    assert not store.list("report.html"), "a job that lost the run changes nothing in it"
    other.check(second)


def test_the_lease_of_a_killed_job_is_taken_over(options: dict[str, Any], tmp_path: Path) -> None:
    store = make_mirror(tmp_path, options).store
    code = (
        "import os, sys, json\n"
        "from roro_ray.data.stores import Store\n"
        "from roro_ray.data.lease import Lease\n"
        f"Lease(Store({PLACE!r}, json.loads(sys.argv[1]))).take()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(options)], timeout=60, check=False)
    killed = Lease(store).look()
    assert killed is not None and not killed.released
    Lease(store).take()  # at once: the process can be seen to be gone
    # Of another machine, which nobody can look at: taken over when it was not renewed for a while.
    elsewhere = Holder("theirs", "ann@far", "other-boot/pid:[1]/7/1", beat=3, time=killed.time)
    store.write(NAME, json.dumps({**{f: getattr(elsewhere, f) for f in Holder.__dataclass_fields__}}).encode())
    waits: list[float] = []

    def renew(seconds: float) -> None:
        waits.append(seconds)
        store.write(NAME, json.dumps({"session": "theirs", "owner": "ann@far", "process": "x", "beat": 4}).encode())

    with pytest.raises(DataError, match="ann@far is working on this run"):
        Lease(store, beat_s=0.05, sleep=renew).take()
    assert waits, "it looked for a sign of life"
    session, before = Lease(store, beat_s=0.05).take()
    assert before is not None and before.session == "theirs" and session != "theirs"


def test_ray_trains_notes_go_where_every_node_sees_them(options: dict[str, Any], tmp_path: Path) -> None:
    part = make_mirror(tmp_path, options).part("router/roro")
    given = train_storage(part)
    assert given["storage_path"] == "bucket/runs/one/router/roro/ray_train"
    system = given["storage_filesystem"]
    with system.open_output_stream(f"{given['storage_path']}/one/marker") as stream:
        stream.write(b"x")
    part.mirror.pull()
    assert not part.path.exists() or not any(part.path.rglob("marker")), "they are not mirrored"
    drop_train_notes(part)
    assert not part.mirror.store.list("router/roro")
    assert train_storage(Mirror(tmp_path).part("a")) == {"storage_path": str(tmp_path / "a" / "ray_train")}


def test_the_thread_tells_of_trouble_and_goes_on(
    options: dict[str, Any], gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [f"run_dir={PLACE}", f"storage.cache_dir={tmp_path}", "storage.sync_s=0.02"]
    config = load_config(settings)
    config.storage.options = options
    run = open_run(config)
    with caplog.at_level(logging.WARNING):
        gate.fails = lambda method, path, writes: method == "PUT"
        run.log({"step": 1})
        while "could not upload metrics.jsonl" not in caplog.text:
            pass
        gate.fails = lambda method, path, writes: False
        run.close()
    assert b'"step": 1' in (run.mirror.store.read("metrics.jsonl") or b"")
    assert (Lease(run.mirror.store).look() or Holder("", "", "")).released
