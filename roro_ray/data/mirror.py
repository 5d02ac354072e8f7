"""A run directory that lies behind a URI, worked on in a copy on this node's disk.

Parquet, safetensors and `torch.save` want local files, and half written files must never be seen. So a process works on
a copy in the cache directory: `pull` downloads what it is going to read and does not have, `push` uploads what changed,
in an order in which every reader finds whole results (`data.push_order`). An index beside the copy says of each file
what it was like when it was last the same here and there: so a file that changed here is uploaded, an object that
somebody replaced is downloaded again, and nothing else travels.

A local place needs none of this: the copy is the place, and `pull` and `push` do nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from roro_ray.cluster_config import StorageConfig
from roro_ray.data.files import explain_unusable
from roro_ray.data.lease import Lease
from roro_ray.data.mirror_index import Index, is_below, is_ours, read_index, scan, side_by_side, stat_file
from roro_ray.data.push_order import Phase, plan_push
from roro_ray.data.stores import Entry, Store, is_remote, local_path
from roro_ray.errors import DataError

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# Never removed from the store because a file is gone here: somebody may have cleaned the cache.
_KEPT = ("trajectories", "pairs", "config.yaml", "versions.json", METRICS)
_ROUNDS = 10  # times that a pull looks again because something changed meanwhile


class Mirror:
    """The copy of one place. It can be sent to other processes, each of which works on the copy of its own node.

    Args:
        place: a path or a URI.
        storage: where copies are kept, and options of the file system.
        session: of the lease under which this process may upload; empty where it only reads.
    """

    def __init__(self, place: str | Path, storage: StorageConfig | None = None, session: str = "") -> None:
        self.storage = storage or StorageConfig()
        self.session = session
        self.is_remote = is_remote(place)
        self.place = str(place).rstrip("/") if self.is_remote else str(local_path(place))

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever gets it, on this node or another, may have another working directory.
        return (Mirror, (name_place(self.place), self.storage, self.session))

    @cached_property
    def local(self) -> Path:
        """The copy on this node; of a local place, the place itself."""
        return self._folder / self.place.rpartition("/")[2] if self.is_remote else Path(self.place)

    @cached_property
    def store(self) -> Store:
        """The objects. Raises ConfigError where the URI or the options make no sense."""
        return Store(self.place, self.storage.options)

    def part(self, name: str) -> Part:
        """A folder of the place."""
        return Part(self, name)

    def place_of(self, path: Path) -> str:
        """What a path in the copy is called by everybody else."""
        return f"{self.place}/{path.relative_to(self.local).as_posix()}" if self.is_remote else str(path)

    def has(self, name: str) -> bool:
        """True where a file, or anything below a folder, is here or in the store."""
        here = self.local / name
        if here.is_file() or (here.is_dir() and any(here.iterdir())):
            return True
        return self.is_remote and any(map(is_ours, self.store.list(name)))

    def join(self, previous: str | None = None) -> None:
        """Make the copy fit for a session's work: what is other than in the store is dropped.

        What an interrupted job of this very copy could not upload is kept, as long as nobody else has written since.

        Args:
            previous: the session that wrote before this one; None: this one.
        """
        if not self.is_remote:
            return
        with self._locked() as index:
            trusted = bool(index.session) and index.session == (self.session if previous is None else previous)
            there, dropped = self.store.list(), 0
            known_there = {name: entry.signature for name, entry in there.items()}
            index.files = {n: known for n, known in index.files.items() if known[1] == known_there.get(n, "")}
            for name, stat in scan(self.local).items():
                known = index.files.get(name)
                unpushed = known is None or known[0] != stat
                if unpushed and not (trusted and (known is not None or name not in there)):
                    (self.local / name).unlink(missing_ok=True)
                    index.files.pop(name, None)
                    dropped += 1
            gone = [name for name in index.files if not (self.local / name).is_file()]
            for name in gone:
                del index.files[name]
            index.session = self.session
        if dropped:
            logger.info("%s: %d files of the copy were outdated and are dropped", self.place, dropped)

    def pull(self, *parts: str) -> None:
        """Download what this copy lacks or has otherwise, of the given files and folders (all of them when none is).

        Looks again until nothing changes any more, so that what it gives was in the store at one moment. A file that
        changed here and not there stays as it is.

        Raises:
            ConfigError: no credentials, no such bucket, a package is missing.
            DataError: the store does not answer, the disk is full, or another process keeps writing.
        """
        if not self.is_remote:
            return
        with self._locked() as index:
            for attempt in range(_ROUNDS):
                there: dict[str, Entry] = {}
                for part in parts or ("",):
                    there |= {name: entry for name, entry in self.store.list(part).items() if is_ours(name)}
                wanted = [name for name, entry in there.items() if self._is_wanted(index, name, entry, attempt)]
                self._forget_gone(index, parts, there)
                if not wanted:
                    return
                side_by_side(partial(self._download_entry, index, there), wanted)
        raise DataError(f"{self.place}: other processes keep changing it. Wait until they end, and try again.")

    def push(self, *parts: str, skip: Sequence[str] = ()) -> int:
        """Upload what changed in the given files and folders (all of them when none is given); the number of files.

        Args:
            skip: files and folders that are left out.

        Raises:
            ConfigError: no credentials, no such bucket.
            DataError: the store does not answer, or another job has taken over the run.
        """
        if not self.is_remote:
            return 0
        with self._locked() as index:
            here = {n: s for n, s in scan(self.local).items() if is_below(n, parts or ("",)) and not is_below(n, skip)}
            changed = {name for name, stat in here.items() if name not in index.files or index.files[name][0] != stat}
            removed = {
                name
                for name in index.files.keys() - here.keys()
                if is_below(name, parts or ("",)) and not is_below(name, (*skip, *_KEPT))
            }
            if not changed and not removed:
                return 0
            if self.session:
                Lease(self.store).check(self.session)
            there = set(self.store.list()) if (changed | removed) - {METRICS} else set(index.files)
            for phase in plan_push(changed, removed & there, there):
                self._run_phase(index, phase)
            for name in removed:
                index.files.pop(name, None)
        return len(changed) + len(removed)

    def _run_phase(self, index: Index, phase: Phase) -> None:
        side_by_side(lambda name: self._upload(index, name), phase.uploads)
        side_by_side(lambda name: self._remove(index, name), phase.deletions)

    def _upload(self, index: Index, name: str) -> None:
        file = self.local / name
        try:
            stat = stat_file(file)  # before: what is written while it is read counts as not uploaded
            entry = self.store.put(file, name)
        except FileNotFoundError:
            return  # dropped meanwhile: the next push removes what there is of it
        index.files[name] = (stat, entry.signature)

    def _remove(self, index: Index, name: str) -> None:
        self.store.delete(name)
        index.files.pop(name, None)

    def _download_entry(self, index: Index, there: Mapping[str, Entry], name: str) -> None:
        self._download(index, name, there[name])

    def _download(self, index: Index, name: str, entry: Entry) -> None:
        file = self.local / name
        try:
            self.store.get(name, file)
        except FileNotFoundError:
            return  # removed meanwhile: the next look tells
        index.files[name] = (stat_file(file), entry.signature)

    def _is_wanted(self, index: Index, name: str, entry: Entry, attempt: int) -> bool:
        known = index.files.get(name)
        if known is None or not (self.local / name).is_file():
            return True
        if entry.signature is None or name == METRICS:  # nobody can tell, or it grows all the time: once is enough
            return attempt == 0 and (entry.signature is None or known[1] != entry.signature)
        return known[1] != entry.signature

    def _forget_gone(self, index: Index, parts: Sequence[str], there: dict[str, Entry]) -> None:
        """Remove files whose object is gone; those that changed here since stay, and count as new."""
        for name in [name for name in index.files if name not in there and is_below(name, parts or ("",))]:
            stat, _ = index.files.pop(name)
            file = self.local / name
            if file.is_file() and stat_file(file) == stat:
                file.unlink()

    @cached_property
    def _folder(self) -> Path:
        """What this node keeps of the place: the copy, its index and a lock."""
        given = self.storage.cache_dir
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roro_ray" / "runs"
        options = json.dumps(self.storage.options, sort_keys=True, default=str)  # an endpoint is another store
        digest = hashlib.sha256(f"{self.place}\n{options}".encode()).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.place.partition("://")[2])[-40:].strip("-.")
        return (Path(given).expanduser() if given else user).resolve() / f"{readable}-{digest}"

    @contextmanager
    def _locked(self) -> Iterator[Index]:
        """The index, for one process or thread of this node at a time; written back also where the block fails."""
        file = self._folder / "index.json"
        with explain_unusable(f"storage.cache_dir={self._folder.parent}"):
            self.local.mkdir(parents=True, exist_ok=True)
            lock_file = (self._folder / "lock").open("w")
        with lock_file as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            index = read_index(file)
            try:
                yield index
            finally:
                index.save(file, self.place)


@dataclass(frozen=True, slots=True)
class Part:
    """A folder of a mirror: what is handed to processes that work on one training or one model."""

    mirror: Mirror
    name: str

    @property
    def path(self) -> Path:
        """Where it lies on this node."""
        return (self.mirror.local / self.name).resolve()

    @property
    def place(self) -> str:
        """Where it lies for everybody."""
        return f"{self.mirror.place}/{self.name}" if self.mirror.is_remote else str(self.path)

    def pull(self, *names: str) -> None:
        """See `Mirror.pull`; names are below this folder."""
        self.mirror.pull(*(f"{self.name}/{name}" for name in names) if names else (self.name,))

    def push(self) -> None:
        """See `Mirror.push`."""
        self.mirror.push(self.name)

    def remove(self, name: str) -> None:
        """Remove a folder that is not mirrored, here and in the store."""
        if self.mirror.is_remote:
            for each in self.mirror.store.list(f"{self.name}/{name}"):
                self.mirror.store.delete(each)
        shutil.rmtree(self.path / name, ignore_errors=True)


def name_place(place: str | Path) -> str:
    """A place as a process elsewhere finds it: an absolute path, or the URI.

    Symbolic links stay: on another node the same name may lead elsewhere, to the mount of one shared folder.
    """
    return str(place) if is_remote(place) else str(local_path(place).absolute())


def fetch(place: str | Path, storage: StorageConfig, *names: str) -> Path:
    """A folder that is only read, on this node: itself where it is local, else a copy that is brought up to date.

    Args:
        names: of files and folders in it; all of it when none is given.
    """
    mirror = Mirror(place, storage)
    mirror.pull(*names)
    return mirror.local
