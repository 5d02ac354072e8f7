"""The copy of a remote run: what travels, in which order, and that no kill leaves half a result for a reader."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roro_ray.cluster_config import StorageConfig
from roro_ray.data.mirror import Mirror, fetch
from roro_ray.data.push_order import plan_push
from roro_ray.data.run_dir import open_run, read_metrics, saved_config
from roro_ray.errors import CheckpointError, ConfigError, DataError
from roro_ray.learning.checkpoints import MARKER, check_complete, find_checkpoint, write_directory
from roro_ray.settings import load_config

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore::roro_ray.learning.checkpoints.IncompleteCheckpointWarning"),
]


class Killed(BaseException):
    """The process is gone: nothing that it would have done afterwards happens."""


class Dying:
    """A file system whose process is killed before its `last`-th change of the store."""

    def __init__(self, system: Any, last: int) -> None:
        self._system, self._left, self._lock = system, last, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._system, name)
        if name not in ("put_file", "pipe_file", "rm_file"):
            return found

        def change(*args: Any, **more: Any) -> Any:
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    raise Killed
            return found(*args, **more)

        return change


@pytest.fixture
def place() -> str:
    return f"memory://{uuid.uuid4().hex}/runs/one"


def make_mirror(place: str, cache: Path, last: int | None = None) -> Mirror:
    mirror = Mirror(place, StorageConfig(cache_dir=str(cache)))
    if last is not None:
        mirror.store._system = Dying(mirror.store._system, last)
    return mirror


def write(mirror: Mirror, **files: str) -> None:
    for name, text in files.items():
        path = mirror.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_local_place_is_the_place_itself(tmp_path: Path) -> None:
    for place in (str(tmp_path / "run"), f"file://{tmp_path}/run"):
        mirror = Mirror(place, StorageConfig(cache_dir=str(tmp_path / "cache")))
        mirror.pull()
        assert mirror.local == tmp_path / "run" and mirror.place == str(tmp_path / "run") and not mirror.is_remote
        assert mirror.push() == 0 and not (tmp_path / "cache").exists()
    assert fetch(tmp_path, StorageConfig()) == tmp_path


def test_what_changed_travels_and_nothing_else(place: str, tmp_path: Path) -> None:
    one, two = make_mirror(place, tmp_path / "a"), make_mirror(place, tmp_path / "b")
    write(one, **{"config.yaml": "c", "trajectories/x.parquet": "1", "pairs/x.parquet": "2", ".hidden.tmp": "3"})
    write(one, **{"wandb/log": "4", "router/roro/ray_train/notes": "5", "router/.roro.12.tmp/half": "6"})
    assert one.push() == 3 and one.push() == 0
    assert sorted(one.store.list()) == ["config.yaml", "pairs/x.parquet", "trajectories/x.parquet"]
    two.pull("trajectories")
    assert [path.name for path in two.local.rglob("*") if path.is_file()] == ["x.parquet"], "only what is asked for"
    assert two.has("pairs") and not two.has("reward") and two.has("trajectories/x.parquet")
    before = (two.local / "trajectories" / "x.parquet").stat().st_mtime_ns
    two.pull()
    assert (two.local / "trajectories" / "x.parquet").stat().st_mtime_ns == before, "what is here already stays"
    assert two.push() == 0, "what was downloaded is no change"
    write(one, **{"pairs/x.parquet": "3"})  # of the same size
    assert one.push() == 1
    two.pull("pairs")
    assert (two.local / "pairs" / "x.parquet").read_text() == "3"


def test_an_object_that_another_process_replaced_or_removed_is_noticed(place: str, tmp_path: Path) -> None:
    mirror = make_mirror(place, tmp_path)
    write(mirror, **{"evaluation/summary.json": "old", "report.html": "page"})
    mirror.push()
    mirror.store.write("evaluation/summary.json", b"new")
    mirror.store.delete("report.html")
    mirror.pull()
    assert (mirror.local / "evaluation" / "summary.json").read_text() == "new"
    assert not (mirror.local / "report.html").exists()


def test_a_change_here_is_not_undone_by_a_pull(place: str, tmp_path: Path) -> None:
    mirror = make_mirror(place, tmp_path)
    write(mirror, **{"metrics.jsonl": "1\n"})
    mirror.push()
    write(mirror, **{"metrics.jsonl": "1\n2\n"})
    mirror.pull()
    assert (mirror.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert mirror.push() == 1 and mirror.store.read("metrics.jsonl") == b"1\n2\n"


def test_a_cache_that_was_cleaned_removes_no_results(place: str, tmp_path: Path) -> None:
    mirror = make_mirror(place, tmp_path)
    write(mirror, **{"config.yaml": "c", "trajectories/x.parquet": "1", "reward/model/DONE": ""})
    mirror.push()
    for name in ("trajectories/x.parquet", "config.yaml"):
        (mirror.local / name).unlink()
    mirror.push()  # while a job works
    assert {"trajectories/x.parquet", "config.yaml"} <= set(mirror.store.list())
    shutil.rmtree(mirror.local)
    mirror.join()  # and the next job
    assert mirror.push() == 0 and mirror.has("reward/model")
    mirror.pull()
    assert (mirror.local / "trajectories" / "x.parquet").read_text() == "1"


def test_what_could_not_be_uploaded_is_kept_unless_another_went_on(place: str, tmp_path: Path) -> None:
    here, there = make_mirror(place, tmp_path / "a"), make_mirror(place, tmp_path / "b")
    here.session = "first"
    here.join("")
    write(here, **{"pairs/a.parquet": "kept"})  # and then the store was away
    here.session = "second"
    here.join("first")
    assert (here.local / "pairs" / "a.parquet").read_text() == "kept", "nobody wrote since"
    there.session = "third"
    there.join("second")
    write(there, **{"pairs/a.parquet": "theirs"})
    there.session = ""
    there.push()
    here.session = "fourth"
    here.join("third")
    assert not (here.local / "pairs" / "a.parquet").exists(), "the run went on without it"
    here.pull()
    assert (here.local / "pairs" / "a.parquet").read_text() == "theirs"


def test_two_runs_and_two_endpoints_have_copies_of_their_own(tmp_path: Path) -> None:
    def local(place: str, **options: Any) -> Path:
        return Mirror(place, StorageConfig(cache_dir=str(tmp_path), options=options)).local

    places = {local("s3://a/run"), local("s3://b/run"), local("s3://a/run", endpoint_url="http://other")}
    assert len(places) == 3 and all(path.name == "run" for path in places) and "a-run" in str(min(places))


def test_a_mirror_travels_to_other_processes(place: str, tmp_path: Path) -> None:
    mirror = make_mirror(place, tmp_path)
    mirror.session = "mine"
    write(mirror, **{"router/roro/router.json": "{}"})
    part = pickle.loads(pickle.dumps(mirror.part("router/roro")))
    assert part.mirror.session == "mine" and part.path == mirror.local / "router" / "roro"
    assert part.place == f"{place}/router/roro" == mirror.place_of(part.path)


class Shelf(LocalFileSystem):
    """A file system without whole uploads: what is being written is seen."""

    protocol = ("shelf",)
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("shelf://")

    def put_file(self, lpath: str, rpath: str, **more: Any) -> None:
        self.seen.append(rpath.rpartition("/")[2])
        super().put_file(lpath, rpath, **more)


def test_a_relative_place_is_the_same_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mirror = Mirror("runs/mine")
    assert mirror.place == "runs/mine", "as its user calls it"
    sent = pickle.dumps(mirror.part("router/roro"))
    monkeypatch.chdir(tmp_path.parent)  # as Ray Train's workers do
    part = pickle.loads(sent)
    assert part.path == tmp_path / "runs/mine/router/roro" and part.place == str(part.path)


def test_a_link_stays_what_other_nodes_know(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "shared").symlink_to(tmp_path / "mount")
    assert pickle.loads(pickle.dumps(Mirror(tmp_path / "shared/run"))).place == f"{tmp_path}/shared/run"


def test_where_uploads_are_seen_they_are_written_beside_and_renamed(tmp_path: Path) -> None:
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    mirror = make_mirror(f"shelf://{tmp_path}/far/run", tmp_path / "cache")
    write(mirror, **{"pairs/x.parquet": "1"})
    mirror.push()
    assert all(name.startswith(".x.parquet.") and name.endswith(".tmp") for name in Shelf.seen) and Shelf.seen
    other = make_mirror(f"shelf://{tmp_path}/far/run", tmp_path / "other")
    other.pull()
    assert (other.local / "pairs" / "x.parquet").read_text() == "1"
    assert [path.name for path in (tmp_path / "far" / "run" / "pairs").iterdir()] == ["x.parquet"]


def test_the_order_of_a_push() -> None:
    old, new = "router/r/checkpoints/iteration_000001", "router/r/checkpoints/iteration_000002"
    changed = {f"{new}/a", f"{new}/{MARKER}", "config.yaml", "done/train.json", "router/r/FINISHED.json"}
    changed |= {"router/r/router.json", "router/r/router.safetensors", "metrics.jsonl"}
    removed = {f"{old}/a", f"{old}/{MARKER}", "done/evaluate.json"}
    there = {*removed, "router/r/router.json", "router/r/router.safetensors", "router/r/calibration.json"}
    steps = [(phase.uploads, phase.deletions) for phase in plan_push(changed, removed, there)]
    assert steps == [
        (("config.yaml",), ()),
        ((), ("done/evaluate.json",)),
        ((), ("router/r/router.json",)),
        (("metrics.jsonl", f"{new}/a", "router/r/router.safetensors"), ()),
        ((f"{new}/{MARKER}",), ()),
        (("router/r/router.json",), ()),
        (("router/r/FINISHED.json",), ()),
        (("done/train.json",), ()),
        ((), (f"{old}/{MARKER}",)),
        ((), (f"{old}/a",)),
    ]
    # A marker that was taken away, and whose file did not change, is put back.
    again = plan_push({"reward/model/judge/w"}, set(), {"reward/model/DONE", "reward/model/judge/w"})
    assert [(p.uploads, p.deletions) for p in again] == [
        ((), ("reward/model/DONE",)),
        (("reward/model/judge/w",), ()),
        (("reward/model/DONE",), ()),
    ]


# What a stage does to the copy; every file says of which generation it is.


def save_checkpoint(root: Path, generation: int) -> None:
    folder = root / "router" / "r" / "checkpoints"
    with write_directory(folder / f"iteration_{generation:06d}") as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(str(generation))
    for old in sorted(folder.glob("iteration_*"))[:-2]:
        shutil.rmtree(old)


def save_router(root: Path, generation: int) -> None:
    folder = root / "router" / "r"
    (folder / "encoder").mkdir(parents=True, exist_ok=True)
    (folder / "FINISHED.json").unlink(missing_ok=True)
    for name in ("encoder/config.json", "router.safetensors", "router.json"):
        (folder / name).write_text(str(generation))


def finish(root: Path, generation: int) -> None:
    save_router(root, generation)
    (root / "router" / "r" / "FINISHED.json").write_text(str(generation))


def save_reward(root: Path, generation: int) -> None:
    reopen(root, generation)
    folder = root / "reward" / "model"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "judge").mkdir(parents=True)
    for name in ("judge/w", "judge/v", "DONE"):
        (folder / name).write_text(str(generation))


def mark_done(root: Path, generation: int) -> None:
    (root / "done").mkdir(exist_ok=True, parents=True)
    save_reward(root, generation)
    (root / "done" / "learn_reward.json").write_text(str(generation))


def reopen(root: Path, generation: int) -> None:
    (root / "done" / "learn_reward.json").unlink(missing_ok=True)


def add_shard(root: Path, generation: int) -> None:
    (root / "trajectories").mkdir(exist_ok=True, parents=True)
    (root / "trajectories" / f"{generation}.parquet").write_text(str(generation))


ACTIONS = (save_checkpoint, save_router, finish, save_reward, mark_done, reopen, add_shard)


def view(root: Path) -> dict[str, str]:
    """What a reader takes from a run: the generation of each result that a marker vouches for; fails on a mix."""
    found: dict[str, str] = {}
    checkpoint = find_checkpoint(root / "router" / "r" / "checkpoints")
    if checkpoint is not None:
        texts = {(checkpoint / name).read_text() for name in ("a", "b")}
        assert len(texts) == 1, f"{checkpoint} is of {texts}"
        found["checkpoint"] = texts.pop()
    for name, marker, covered in (
        ("router", "router/r/router.json", ("router/r/router.safetensors", "router/r/encoder/config.json")),
        ("finished", "router/r/FINISHED.json", ("router/r/router.json", "router/r/router.safetensors")),
        ("reward", "reward/model/DONE", ("reward/model/judge/w", "reward/model/judge/v")),
        ("done", "done/learn_reward.json", ("reward/model/DONE", "reward/model/judge/w")),
    ):
        if (root / marker).exists():
            generations = {(root / file).read_text() for file in (marker, *covered)}
            assert len(generations) == 1, f"{name} is of {generations}"
            found[name] = generations.pop()
    for shard in (root / "trajectories").glob("*.parquet"):
        assert shard.read_text() == shard.stem
        found[f"shard {shard.stem}"] = shard.stem
    return found


def read_fresh(place: str, cache: Path) -> dict[str, str]:
    shutil.rmtree(cache, ignore_errors=True)
    mirror = make_mirror(place, cache)
    mirror.pull()
    return view(mirror.local)


def check_kill(before: list[Any], after: list[Any], last: int, tmp_path: Path) -> bool:
    """Kill the push of `after` at one operation; whether it came so far."""
    place = f"memory://{uuid.uuid4().hex}/run"
    work, fresh = tmp_path / "work", tmp_path / "fresh"
    shutil.rmtree(work, ignore_errors=True)
    mirror = make_mirror(place, work)
    mirror.local.mkdir(parents=True)
    for generation, action in enumerate(before):
        action(mirror.local, generation)
    mirror.push()
    old = view(mirror.local)
    for generation, action in enumerate(after, len(before)):
        action(mirror.local, generation)
    new, dying, killed = view(mirror.local), make_mirror(place, work, last), False
    try:
        dying.push()
    except Killed:
        killed = True
    seen = read_fresh(place, fresh)
    for name, generation in seen.items():
        assert generation in (old.get(name), new.get(name)), f"{name} of {generation} after {last} operations"
    if "checkpoint" in old:
        assert "checkpoint" in seen, "one at least is always whole"
    assert {name for name in old if name.startswith("shard")} <= seen.keys(), "what was finished is not lost"
    make_mirror(place, work).push()  # the next run
    assert read_fresh(place, fresh) == new
    return killed


def test_a_reader_finds_the_old_or_the_new_results_wherever_a_push_was_killed(tmp_path: Path) -> None:
    before = [save_checkpoint, save_checkpoint, finish, mark_done, add_shard]
    after = [add_shard, reopen, save_checkpoint, save_checkpoint, finish, mark_done]
    operations = next(last for last in range(1000) if not check_kill(before, after, last, tmp_path))
    assert operations > 20


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(ACTIONS), max_size=4),
    st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4),
    st.integers(0, 12),
)
def test_whatever_was_done_between_two_pushes(tmp_path: Path, before: list[Any], after: list[Any], last: int) -> None:
    check_kill(before, after, last, tmp_path)


def test_a_pull_sees_no_mix_while_a_router_is_replaced(place: str, tmp_path: Path) -> None:
    writer, reader = make_mirror(place, tmp_path / "w"), make_mirror(place, tmp_path / "r")
    finish(writer.local, 1)
    writer.push()
    finish(writer.local, 2)
    downloaded = []
    get = reader.store.get

    def get_late(name: str, target: Path) -> None:
        get(name, target)
        if not downloaded:
            downloaded.append(name)
            writer.push()  # all of it, behind the reader's first file

    reader.store.get = get_late  # type: ignore[method-assign]
    reader.pull()
    assert view(reader.local) == {"router": "2", "finished": "2"}


def test_a_reader_gives_up_where_somebody_writes_all_the_time(place: str, tmp_path: Path) -> None:
    writer, reader = make_mirror(place, tmp_path / "w"), make_mirror(place, tmp_path / "r")
    count = iter(range(1000))
    get = reader.store.get

    def get_and_change(name: str, target: Path) -> None:
        get(name, target)
        writer.store.write("report.html", str(next(count)).encode())

    reader.store.get = get_and_change  # type: ignore[method-assign]
    writer.store.write("report.html", b"0")
    with pytest.raises(DataError, match="keep changing"):
        reader.pull()


def test_a_checkpoint_cut_short_in_the_store_is_refused_as_on_a_disk(place: str, tmp_path: Path) -> None:
    mirror, other = make_mirror(place, tmp_path / "a"), make_mirror(place, tmp_path / "b")
    save_checkpoint(mirror.local, 1)
    mirror.push()
    name = "router/r/checkpoints/iteration_000001"
    mirror.store.write(f"{name}/a", b"other")
    other.pull()
    with pytest.raises(CheckpointError, match="expected 1"):
        check_complete(other.local / name)


def test_a_run_in_memory_from_one_copy_to_the_next(place: str, tmp_path: Path) -> None:
    def options(cache: str, *more: str) -> Any:
        return load_config([f"run_dir={place}", f"storage.cache_dir={tmp_path / cache}", "storage.sync_s=0.05", *more])

    first = open_run(options("a", "router.beta=0.5"))
    assert first.place == place and first.path.is_relative_to(tmp_path / "a")
    first.log({"step": 1})
    first.mark_done("collect", seconds=1.0)
    deadline = threading.Event()
    for _ in range(200):  # by the thread, without being asked
        if first.mirror.store.read("metrics.jsonl"):
            break
        deadline.wait(0.05)
    assert json.loads(first.mirror.store.read("metrics.jsonl") or b"{}")["step"] == 1
    with pytest.raises(DataError, match=r"is working on this run\. Only one job"):
        open_run(options("b"))
    first.log({"step": 2})
    first.close()
    first.close()
    loaded = saved_config(place, StorageConfig(cache_dir=str(tmp_path / "c")))
    assert loaded is not None and loaded.router.beta == 0.5 and loaded.storage.cache_dir == str(tmp_path / "c")
    second = open_run(options("b", "router.beta=0.5"))
    assert second.is_done("collect") and [r["step"] for r in read_metrics(second.metrics_file)] == [1, 2]
    second.reopen_after("collect")
    second.close()
    MemoryFileSystem().pipe(f"{place}/trajectories/a.parquet", b"x")
    with pytest.raises(ConfigError, match=rf"{place} holds a run whose collect was made with seed=0, now seed=1"):
        open_run(options("b", "seed=1"))
    open_run(options("c")).close()  # the refused job let go of the run


def test_a_folder_that_is_no_run_is_not_touched(place: str, tmp_path: Path) -> None:
    MemoryFileSystem().pipe(f"{place}/thesis.txt", b"mine")
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        open_run(load_config([f"run_dir={place}", f"storage.cache_dir={tmp_path}"]))
    assert [Path(name).name for name in MemoryFileSystem().find(place)] == ["thesis.txt"]


@pytest.mark.parametrize("key", ["key", "secret", "token", "client_kwargs.aws_secret_access_key", "sas_token"])
def test_secrets_are_refused_where_they_would_be_saved(key: str) -> None:
    head, _, tail = key.partition(".")
    value = f"{{{head}: {{{tail}: hunter2}}}}" if tail else f"{{{head}: hunter2}}"
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        load_config([f"storage.options={value}"])
    assert "hunter2" not in str(caught.value) and "environment" in str(caught.value)


def test_google_storage_that_refuses_is_told_at_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Forbidden: https://storage.googleapis.com/b/bucket\nno storage.objects.get")  # as gcsfs does

    store = Mirror(place).store
    monkeypatch.setattr(store, "_system", SimpleNamespace(invalidate_cache=lambda: None, cat_file=refuse))
    monkeypatch.setattr(store, "_pauses_s", ())
    with pytest.raises(ConfigError, match="not allowed to read x"):
        store.read("x")


def test_options_and_places_that_are_none() -> None:
    load_config(["storage.options={token: anon, client_kwargs: {region_name: eu-west-1}}", "run_dir=gs://bucket/run"])
    with pytest.raises(ConfigError, match="contains a password"):
        load_config(["run_dir=ftp://me:hunter2@host/run"])
    with pytest.raises(ConfigError, match=r"sync_s: got 0"):
        load_config(["storage.sync_s=0"])
    with pytest.raises(ConfigError, match=r"fsspec knows no protocol 's4'.*s3://bucket/run"):
        Mirror("s4://bucket/run").pull()
    with pytest.raises(ConfigError, match=r"pip install (gcsfs|adlfs)"):
        Mirror("abfs://bucket/run").pull()
