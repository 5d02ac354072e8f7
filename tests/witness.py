"""Proof that a process was killed in the middle of its work: what it began and never ended stands in a file.

Each process appends a line when it begins a piece of work and one when it ends it; whoever kills looks for a process
that has some in hand, and looks again when it is gone. Lives in a module of its own because actors import it.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from roro_ray.config import Config, ModelConfig, PoolConfig
from roro_ray.engines.pool import EnginePool
from roro_ray.types import Criterion, Query, Rubric, Trajectory, Verdict
from tests.scripted_world import make_engines


@dataclass(frozen=True)
class Witness:
    """The files of a directory, one for each kind of work."""

    directory: str

    @contextmanager
    def work(self, kind: str) -> Iterator[None]:
        """A piece of work by this process."""
        self._write(kind, 1)
        try:
            yield
        finally:
            self._write(kind, -1)

    def _write(self, kind: str, change: int) -> None:
        descriptor = os.open(Path(self.directory) / kind, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{os.getpid()} {change}\n".encode())
        os.close(descriptor)

    def in_hand(self, kind: str) -> Counter[int]:
        """Pieces of work begun and not ended, by process."""
        path = Path(self.directory) / kind
        counts: Counter[int] = Counter()
        for line in path.read_text().splitlines() if path.exists() else []:
            pid, change = line.split()
            counts[int(pid)] += int(change)
        return counts

    def kill(self, kind: str, timeout_s: float = 300) -> int:
        """SIGKILL a process that has work of a kind in hand; its pid, once it is gone with the work undone."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert time.monotonic() < deadline, f"nobody has work of kind {kind} in hand"
            busy = [pid for pid, count in self.in_hand(kind).items() if count > 0 and psutil.pid_exists(pid)]
            if busy:
                os.kill(busy[0], signal.SIGKILL)
                gone_by = time.monotonic() + 20
                while psutil.pid_exists(busy[0]) and psutil.Process(busy[0]).status() != psutil.STATUS_ZOMBIE:
                    assert time.monotonic() < gone_by, f"process {busy[0]} does not die"
                    time.sleep(0.01)
                if self.in_hand(kind)[busy[0]] > 0:  # it may have ended its work in that very moment
                    return busy[0]
            time.sleep(0.005)


class WatchedEngine:
    """An engine whose requests are witnessed."""

    def __init__(self, engine: Any, witness: Witness, kind: str) -> None:
        self._engine, self._witness, self._kind = engine, witness, kind
        self.name = engine.name

    async def ready(self) -> Any:
        return await self._engine.ready()

    async def generate_step(self, request: Any) -> Any:
        with self._witness.work(self._kind):
            return await self._engine.generate_step(request)

    async def score_choices(self, *args: Any) -> Any:
        with self._witness.work(self._kind):
            return await self._engine.score_choices(*args)


def find_witness(config: Config | PoolConfig) -> Witness:
    """The witness that the settings name (`path` of the first model: scripted:DELAY:DIRECTORY)."""
    pool = config.pool if isinstance(config, Config) else config
    return Witness(pool.models[0].path.split(":")[2])


def make_watched_engine(model: ModelConfig, pool: PoolConfig) -> WatchedEngine:
    """A scripted model of the pool, in an actor of its own."""
    delay_s = float(pool.models[0].path.split(":")[1])
    engine = next(engine for engine in make_engines(delay_s) if engine.name == model.name)
    return WatchedEngine(engine, find_witness(pool), f"engine-{model.name}")


def make_watched_runner(config: Config, engines: Sequence[Any] = ()) -> Any:
    """As `scripted_world.make_scripted_runner`; what a worker waits for is its work."""
    from roro_ray.routing.router import make_router
    from roro_ray.routing.router_policy import RouterPolicy
    from roro_ray.routing.runner import Runner

    watched = [WatchedEngine(engine, find_witness(config), "worker") for engine in engines or make_engines()]
    network = make_router(config.router, len(watched))
    return Runner(EnginePool(watched), RouterPolicy(network, version=-1), config.episode, config.ray.concurrency)


class WatchedReward:
    """A reward model that likes few large steps; some work, and witnessed."""

    version = 0

    def __init__(self, witness: Witness | None = None) -> None:
        self._witness = witness

    def write_rubrics(self, queries: Sequence[Query], seed: int) -> list[Rubric]:
        return [Rubric(query.id, (Criterion("few large steps", 1.0),), "", 0) for query in queries]

    def score(self, queries: Any, groups: Sequence[Sequence[Trajectory]], rubrics: Any = None) -> Any:
        if self._witness is not None:
            with self._witness.work("reward"):
                time.sleep(0.2)
        return [tuple(Verdict(1.0 - 2 * t.large_share) for t in group) for group in groups]


def load_watched_reward(directory: str | None, config: Any) -> WatchedReward:
    """The reward model of the service; its directory is the witness's."""
    assert directory is not None
    return WatchedReward(Witness(directory))
