"""Hand work to the workers: near the memos that know its queries, evenly, and again where a worker dies.

Each result has one place, filled once, so that nothing is lost and nothing doubled however many workers die.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError

from actors.waiting import describe_actor, find_actor, wait_for, wait_some
from roro_ray.errors import DeadlineError, EngineError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
# The worker, its node, or the node that held its finished answer is gone.
_DEATHS = (RayActorError, NodeDiedError, ObjectLostError)
_REST_S = 0.5  # before a worker that failed is asked whether it is alive again
_GRACE_S = 30.0  # beyond the episodes' own deadline, for loading after a restart
_LOAD_SLACK = 1.1


@dataclass(slots=True)
class _Chunk:
    """Positions of some items, and how often they were tried."""

    positions: list[int]
    attempts: int = 0


def assign_workers(query_ids: Sequence[str], workers: int) -> list[int]:
    """A worker for each item: the one that its query's id hashes to, or the least loaded where that one is full.

    Items of one query stay together while the load allows (consistent hashing with bounded loads,
    arXiv 1608.01350), so that a worker's memo sees the same query again; needs no state, so every caller agrees.
    """
    most = -(-len(query_ids) * _LOAD_SLACK // workers)
    loads = [0] * workers
    homes: dict[str, int] = {}
    chosen = []
    for query_id in query_ids:
        home = homes.get(query_id, zlib.crc32(query_id.encode()) % workers)
        if loads[home] >= most:
            home = loads.index(min(loads))
        homes[query_id] = home
        loads[home] += 1
        chosen.append(home)
    return chosen


@dataclass(frozen=True, slots=True)
class Limits:
    """How work is handed out.

    `timeout_s` is the longest time without any result, `chunk` most items in one call, `concurrency` most items at a
    time on one worker, `attempts` how many workers may die over one chunk: then it is the culprit.
    """

    timeout_s: float
    chunk: int
    concurrency: int
    attempts: int = 4


class Dispatch(Generic[Item]):
    """One run of some items over the workers.

    Args:
        query_ids: of each item, for its home.
        call: sends some items to a worker; the reference holds their results in order.
    """

    def __init__(
        self,
        workers: Sequence[Any],
        items: Sequence[Item],
        query_ids: Sequence[str],
        call: Callable[[Any, Sequence[Item]], Any],
        limits: Limits,
    ) -> None:
        self._workers = list(workers)
        self._items = items
        self._query_ids = query_ids
        self._call = call
        self._limits = limits
        self._most_calls = max(1, limits.concurrency // limits.chunk)
        self._queues = self._make_queues(limits.chunk)
        self._flying: dict[Any, tuple[int, _Chunk]] = {}
        self._down: dict[int, float] = {}
        self._results: list[Any] = [None] * len(items)

    def _make_queues(self, size: int) -> list[deque[_Chunk]]:
        mine: list[list[int]] = [[] for _ in self._workers]
        for position, worker in enumerate(assign_workers(self._query_ids, len(self._workers))):
            mine[worker].append(position)
        return [deque(_Chunk(own[i : i + size]) for i in range(0, len(own), size)) for own in mine]

    def run(self, progress: Progress | None = None) -> list[Any]:
        """Everything, in the order of the items.

        Raises:
            DeadlineError: no result for longer than the limit.
            EngineError: no worker is left, or the same items ended too many of them.
        """
        done, heard, patience = 0, time.monotonic(), self._limits.timeout_s + _GRACE_S
        while done < len(self._items):
            self._fill()
            if not self._flying:  # every worker is down, and one at least is coming back
                time.sleep(_REST_S / 2)
            finished = sum(self._take(ref) for ref in wait_some(list(self._flying), 1.0))
            if finished:
                done, heard = done + finished, time.monotonic()
                if progress is not None:
                    progress(done, len(self._items))
            elif time.monotonic() - heard > patience:
                states = "; ".join(describe_actor(worker) for worker in self._workers)
                raise DeadlineError(
                    f"episodes: {done} of {len(self._items)} done, and none more in {patience:g} s "
                    f"({states}). Raise episode.timeout_s if they are merely slow; else see the workers' logs."
                )
        return self._results

    def _fill(self) -> None:
        """Give every living worker as many calls as it may have, first its own, then the longest queue's."""
        calls = [0] * len(self._workers)
        for worker, _ in self._flying.values():
            calls[worker] += 1
        for worker in range(len(self._workers)):
            while calls[worker] < self._most_calls and any(self._queues) and self._is_up(worker):
                queue = self._queues[worker] or max(self._queues, key=len)
                chunk = queue.popleft()
                items = [self._items[position] for position in chunk.positions]
                self._flying[self._call(self._workers[worker], items)] = (worker, chunk)
                calls[worker] += 1

    def _is_up(self, worker: int) -> bool:
        if worker not in self._down:
            return True
        if time.monotonic() < self._down[worker]:
            return False
        state = find_actor(self._workers[worker]).get("State", "ALIVE")
        if state == "ALIVE":
            del self._down[worker]
            return True
        self._down[worker] = time.monotonic() + _REST_S
        if state == "DEAD" and all(find_actor(other).get("State") == "DEAD" for other in self._workers):
            raise EngineError(
                f"no rollout worker is left: {describe_actor(self._workers[worker])}. They were stopped, or their node "
                "is gone; start the stage again, finished work is kept."
            )
        return False

    def _take(self, ref: Any) -> int:
        """Store one call's results; how many. A call whose worker died is queued again."""
        worker, chunk = self._flying.pop(ref)
        try:
            results = wait_for(ref, "a worker's results", self._limits.timeout_s, self._workers[worker])
        except _DEATHS as error:
            if isinstance(error, RayTaskError):  # the worker lives, and tells of something else that died
                raise
            self._mourn(worker, chunk, error)
            return 0
        for position, result in zip(chunk.positions, results, strict=True):
            self._results[position] = result
        return len(results)

    def _mourn(self, worker: int, chunk: _Chunk, error: BaseException) -> None:
        self._down[worker] = time.monotonic() + _REST_S
        chunk.attempts += 1
        if chunk.attempts >= self._limits.attempts:
            raise EngineError(
                f"{len(chunk.positions)} episodes (first: of query {self._query_ids[chunk.positions[0]]}) were given "
                f"up: the worker that ran them died {chunk.attempts} times (faults.worker_attempts), the last time "
                f"with: {error}. A worker that is killed for memory needs a smaller pool.batch_size or "
                "ray.concurrency."
            ) from error
        logger.warning("worker %d died; its %d episodes run elsewhere", worker, len(chunk.positions))
        self._queues[worker].appendleft(chunk)
