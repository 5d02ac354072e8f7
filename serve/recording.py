"""Records served trajectories as the shards that collection writes, so that the router can learn from its traffic.

A request only puts its trajectory into a bounded queue; one thread writes. Whatever goes wrong there (a full disk, a
record that Parquet does not take, the size limit) is counted and logged, and never reaches a request. Each replica
writes files of its own, its queries before its trajectories, so that whoever reads a trajectory finds its query.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from roro_ray.data.records import make_encoder, make_schema
from roro_ray.data.store import SUFFIX, save_queries, save_trajectories
from roro_ray.errors import ConfigError
from roro_ray.types import Query, Trajectory
from serve.metrics import Metrics, NoMetrics

logger = logging.getLogger(__name__)
DROP_REASONS = ("queue", "disk", "limit", "closed", "invalid")
SUITE = "served"
_WARN_EVERY_S = 60.0
Pair = tuple[Query, Trajectory]


@dataclass(frozen=True, slots=True)
class RecordingFacts:
    """What a recorder has done: trajectories on disk from it, those not kept by reason, and whether it is full."""

    recorded: int
    dropped: dict[str, int]
    full: bool


class Recorder:
    """Writes `trajectories/served-<replica>-<n>.parquet` and `queries/` likewise under a directory.

    Args:
        replica: part of the files' names; a second recorder of the same name takes `<replica>-2`, and so on.
        flush_every: trajectories that make a shard; a smaller one is written after `flush_s`.
        redact: keep keyed hashes (of a random key that is not stored) in place of all texts.
        max_queue: trajectories that may wait to be written; more are dropped.
        max_mb: size of the whole directory, all replicas', from which on nothing is recorded any more. Each replica
            may pass it by one shard.

    Raises:
        ConfigError: a number that cannot be meant.
        OSError: the directory cannot be made or written.
    """

    def __init__(
        self,
        directory: str | Path,
        replica: str = "0",
        flush_every: int = 200,
        flush_s: float = 30.0,
        redact: bool = False,
        max_queue: int = 2000,
        max_mb: float = 1024.0,
        metrics: Metrics | None = None,
    ) -> None:
        _check({"flush_every": flush_every, "flush_s": flush_s, "max_queue": max_queue, "max_mb": max_mb})
        self.directory = Path(directory)
        self._flush_every, self._flush_s, self._max_queue = min(flush_every, max_queue), flush_s, max_queue
        self._max_bytes = max_mb * 2**20
        self._metrics = metrics or NoMetrics()
        for part in ("trajectories", "queries"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        self._name, self._lock_file = _claim_name(self.directory, replica)
        self._number = _prepare_numbering(self.directory, self._name)
        self._namer = _Namer(redact)
        self._wake = threading.Condition()
        self._waiting: list[Pair] = []
        self._closing = self._full = False
        self._recorded = 0
        self._dropped: Counter[str] = Counter()
        self._warned_at = -_WARN_EVERY_S
        self._thread = threading.Thread(target=self._run, name="roro-recorder", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def record(self, query: Query, trajectory: Trajectory) -> bool:
        """Take a finished trajectory; returns at once, False where it is not kept (counted by reason).

        The query's own id need not be unique: recorded queries are named by their text.
        """
        if not trajectory.steps:
            return self._drop(1, "invalid")  # no decision to learn from
        with self._wake:
            if not (self._closing or self._full or len(self._waiting) >= self._max_queue):
                self._waiting.append((query, trajectory))
                if len(self._waiting) >= self._flush_every:
                    self._wake.notify()
                return True
            reason = "closed" if self._closing else "limit" if self._full else "queue"
        return self._drop(1, reason)

    def facts(self) -> RecordingFacts:
        """What has been done so far."""
        with self._wake:
            return RecordingFacts(self._recorded, dict(self._dropped), self._full)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, and end the thread; what comes later is dropped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("recording: the last shard is not written yet after %g s", timeout_s)
        elif not self._lock_file.closed:
            Path(self._lock_file.name).unlink(missing_ok=True)
            self._lock_file.close()
        atexit.unregister(self.close)

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or len(self._waiting) >= self._flush_every, self._flush_s)
                # Never more at once: Arrow holds the interpreter while it takes a batch (200 trajectories: some 6 ms).
                batch, self._waiting = self._waiting[: self._flush_every], self._waiting[self._flush_every :]
                closing = self._closing and not self._waiting
            if batch:
                self._keep(batch)

    def _keep(self, batch: list[Pair]) -> None:
        """Write a batch or drop it. A border: whatever happens here must not end the recording."""
        pairs: list[Pair] = []
        try:
            if _measure(self.directory) >= self._max_bytes:
                self._stop_full(len(batch))
                return
            pairs = [self._namer.rename(query, trajectory) for query, trajectory in batch]
            self._write(pairs)
        except OSError as error:
            self._lose(len(batch), "disk", error)
        except Exception as error:
            good = [pair for pair in pairs if _can_be_stored(pair)]  # one bad record must not cost the others
            self._lose(len(batch) - len(good), "invalid", error)
            if good:
                self._keep_good(good)

    def _keep_good(self, pairs: list[Pair]) -> None:
        try:
            self._write(pairs)
        except Exception as error:
            self._lose(len(pairs), "disk", error)

    def _write(self, pairs: list[Pair]) -> None:
        name = f"served-{self._name}-{self._number:06d}{SUFFIX}"
        save_queries(self.directory / "queries" / name, {query.id: query for query, _ in pairs}.values())
        save_trajectories(self.directory / "trajectories" / name, [trajectory for _, trajectory in pairs])
        self._number += 1
        with self._wake:
            self._recorded += len(pairs)
        self._metrics.observe_recorded(len(pairs))

    def _drop(self, count: int, reason: str) -> bool:
        with self._wake:
            self._dropped[reason] += count
        self._metrics.observe_dropped(count, reason)
        return False

    def _lose(self, count: int, reason: str, error: Exception) -> None:
        if not count:
            return
        self._drop(count, reason)
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            logger.warning("recording: %d trajectories lost (%s: %s); serving goes on", count, reason, error)

    def _stop_full(self, count: int) -> None:
        with self._wake:
            first, self._full = not self._full, True
            count += len(self._waiting)
            self._waiting = []
        self._drop(count, "limit")
        if first:
            limit = self._max_bytes / 2**20
            logger.warning(
                "recording: %s holds its %g MB (recording.max_mb); nothing more is recorded. Move the shards "
                "away and restart the server to go on.",
                self.directory,
                limit,
            )


class _Namer:
    """Gives unique ids, and takes texts away where they must not be kept.

    A query is named by its text, so that every replica and every restart gives one text one id, and trajectories of
    one query can be compared; when redacted, only within one recorder, whose key is in its memory alone.
    """

    def __init__(self, redact: bool) -> None:
        self._redact = redact
        self._key = secrets.token_bytes(32) if redact else b""
        self._run = secrets.token_hex(6)
        self._count = 0

    def rename(self, query: Query, trajectory: Trajectory) -> Pair:
        """Query and trajectory as they are stored: no gold answer, not scored."""
        self._count += 1
        number = f"{self._run}-{self._count:08d}"
        query_id = f"{SUITE}/{self._hash(query.text)}"
        stored = Query(query_id, query.suite, query.split, query.text, answer="")
        kept = replace(trajectory, id=f"{number}/{trajectory.id}", query_id=query_id, correct=None)
        if not self._redact:
            return stored, kept
        steps = tuple(replace(step, text=self._hash(step.text)) for step in kept.steps)
        answer = None if kept.answer is None else self._hash(kept.answer)
        return replace(stored, text=self._hash(query.text)), replace(kept, id=number, steps=steps, answer=answer)

    def _hash(self, text: str) -> str:
        return blake2b(text.encode(errors="surrogatepass"), key=self._key, digest_size=16).hexdigest()


def _check(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"recording.{name} is {value}, expected a number above 0")


def _claim_name(directory: Path, replica: str) -> tuple[str, IO[str]]:
    """A name that no living recorder uses here, and the lock file that holds it until it is closed."""
    base = re.sub(r"[^A-Za-z0-9_-]", "-", replica)[:64] or "0"
    number = 1
    while True:
        name = base if number == 1 else f"{base}-{number}"
        path = directory / f".served-{name}.lock"
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the name may have removed the file between our opening and our locking it.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return name, file
        except BlockingIOError:
            number += 1
        file.close()


def _prepare_numbering(directory: Path, name: str) -> int:
    """The number after the last one used; removes what a killed recorder of this name left unfinished."""
    for leftover in directory.glob(f"*/.served-{name}-??????{SUFFIX}.*.tmp"):
        leftover.unlink(missing_ok=True)
    shards = directory.glob(f"*/served-{name}-??????{SUFFIX}")
    numbers = [int(shard.stem[-6:]) for shard in shards if shard.stem[-6:].isdigit()]
    return max(numbers, default=-1) + 1


def _measure(directory: Path) -> int:
    """Bytes of all shards of the directory."""
    total = 0
    for shard in directory.glob(f"*/*{SUFFIX}"):
        with suppress(FileNotFoundError):  # somebody moves shards away: welcome
            total += shard.stat().st_size
    return total


def _can_be_stored(pair: Pair) -> bool:
    """Whether Arrow takes both records (not: half a surrogate pair in a text, an integer beyond 64 bits)."""
    kinds: tuple[Any, ...] = (Query, Trajectory)
    try:
        for noun, record in zip(kinds, pair, strict=True):
            pa.Table.from_pylist([make_encoder(noun)(record)], schema=make_schema(noun))
    except Exception:
        return False
    return True
