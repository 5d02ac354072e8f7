"""Micro-batching: concurrent asyncio calls become batches for one worker thread.

A batch goes off when the event loop has nothing else to run (so that every episode that can ask has asked) or when
it is full; while the worker computes, the loop gathers the next one. Answers go back as they come, each to the loop
that asked, so the same batcher serves one event loop after another, or several. Cancelled callers leave no work
behind; a batch that fails fails its own callers only. A request may carry a sink, where the worker hands parts of the
answer while it is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from roro_ray.errors import EngineError

Q = TypeVar("Q")
R = TypeVar("R")
_QUIET_ROUNDS = 3  # passes of the event loop without a new request before a batch goes off


@dataclass(eq=False, slots=True)
class Job(Generic[Q, R]):
    """One request and everyone who waits for its answer."""

    request: Q
    key: Hashable | None
    waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[R]]] = field(default_factory=list)
    done: bool = False
    state: object = None  # the worker's own, kept while the job is put back
    sink: object = None  # where the worker hands parts of the answer, if the caller wants them

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits any more: all cancelled, or their event loops closed."""
        return all(future.cancelled() or loop.is_closed() for loop, future in self.waiters)


class Turn:
    """Whose batch runs, among batchers that compute on one device of this process.

    Side by side they would slow each other down, and a fast model would run off with the few requests that its last
    batch set free. In turns, and with a look at the event loop in between, requests gather for one model while the
    other computes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: list[MicroBatcher[Any, Any]] = []

    def take(self, batcher: MicroBatcher[Any, Any]) -> bool:
        """Whether the batcher may run now; if not, it will be told to ask again."""
        with self._lock:
            if self._taken:
                self._waiting.append(batcher)
                return False
            self._taken = True
            return True

    def give_back(self, batcher: MicroBatcher[Any, Any]) -> None:
        """The batcher's batch is over: the others ask again, then it does."""
        with self._lock:
            self._taken = False
            waiting, self._waiting = self._waiting, []
        for other in dict.fromkeys([*waiting, batcher]):
            other.nudge()


class MicroBatcher(Generic[Q, R]):
    """Gathers `submit` calls into batches of at most `batch_size` for `run`, which a worker thread calls.

    `run(jobs)` must `answer` or `fail` each job, or `put_back` it; a job that it leaves, or that is in the batch
    when it raises, fails with an EngineError. `max_wait_s` holds every batch back that long for more requests.
    Batchers that share a `turn` run one batch at a time.
    """

    def __init__(
        self,
        run: Callable[[list[Job[Q, R]]], None],
        batch_size: int,
        max_wait_s: float,
        name: str,
        turn: Turn | None = None,
    ):
        self._turn = turn or Turn()
        self._run = run
        self._batch_size = batch_size
        self._max_wait_s = max_wait_s
        self._name = name
        self._lock = threading.Lock()
        self._pending: deque[Job[Q, R]] = deque()
        self._by_key: dict[Hashable, Job[Q, R]] = {}
        self._busy = False
        self._gathering: asyncio.AbstractEventLoop | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.merged = 0
        self.cancelled = 0
        self._open = 0

    @property
    def active(self) -> int:
        """Computations that are waited for, being made, or given up and not yet cleared away."""
        return self._open

    @property
    def pending(self) -> int:
        """Requests that wait for the next batch."""
        return len(self._pending)

    @property
    def has_waiting_sink(self) -> bool:
        """Whether a request that waits for the next batch wants its answer while it is made."""
        with self._lock:
            return any(job.sink is not None and job.state is None for job in self._pending)

    async def submit(self, request: Q, key: Hashable | None = None) -> R:
        """The answer to one request; requests with the same key share one computation."""
        future = self.enqueue(request, key)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def enqueue(self, request: Q, key: Hashable | None = None, sink: object = None) -> asyncio.Future[R]:
        """The answer to come; whoever no longer wants it must `abandon` it. A request with a sink needs no key."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        with self._lock:
            job = self._by_key.get(key) if key is not None else None
            if job is None:
                job = Job[Q, R](request, key, sink=sink)
                self._pending.append(job)
                self._open += 1
                if key is not None:
                    self._by_key[key] = job
            else:
                self.merged += 1
            job.waiters.append((loop, future))
        self._gather(loop)
        return future

    def abandon(self, future: asyncio.Future[R]) -> None:
        """No longer wait for an answer (event loop); nothing happens where it has come."""
        if future.cancel():
            self.cancelled += 1
        elif not future.cancelled():
            future.exception()  # so that the loop does not report an error that nobody took

    async def run_between(self, work: Callable[[], None]) -> None:
        """Run something in the worker thread, when the batch that it computes at the moment is over."""
        await asyncio.wrap_future(self._executor.submit(work))

    def answer(self, results: list[tuple[Job[Q, R], R]]) -> None:
        """Give results to all who wait for them (worker thread)."""
        self._deliver([(job, result, None) for job, result in results])

    def fail(self, jobs: list[Job[Q, R]], error: Exception) -> None:
        """Raise an error in all who wait for these jobs (worker thread)."""
        self._deliver([(job, None, error) for job in jobs])

    def nudge(self) -> None:
        """Look for requests to run, in an event loop that waits for one (any thread)."""
        with self._lock:
            loops = {loop for job in self._pending for loop, _ in job.waiters if not loop.is_closed()}
        for loop in loops:
            with contextlib.suppress(RuntimeError):  # closed in between
                loop.call_soon_threadsafe(self._gather, loop)

    def put_back(self, jobs: list[Job[Q, R]]) -> None:
        """Return unfinished jobs to the head of the queue (worker thread)."""
        with self._lock:
            self._pending.extendleft(reversed(jobs))

    def drop_abandoned(self, jobs: list[Job[Q, R]]) -> list[Job[Q, R]]:
        """The jobs that someone still waits for; the others are over (worker thread)."""
        with self._lock:
            for job in jobs:
                if job.is_abandoned:
                    self._close(job)
        return [job for job in jobs if not job.done]

    def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            stale = self._gathering is not None and self._gathering.is_closed()
            if self._busy or not self._pending or (self._gathering is not None and not stale):
                return
            self._gathering = loop
        if self._max_wait_s > 0:
            loop.call_later(self._max_wait_s, self._flush, loop, 0, 0)
        else:
            loop.call_soon(self._flush, loop, 0, 0)

    def _flush(self, loop: asyncio.AbstractEventLoop, seen: int, quiet: int) -> None:
        """Start the worker once requests stop coming; runs in the event loop."""
        count = len(self._pending)
        quiet = quiet + 1 if count == seen else 0
        if quiet < _QUIET_ROUNDS and count < self._batch_size:
            loop.call_soon(self._flush, loop, count, quiet)
            return
        with self._lock:
            self._gathering = None
            if self._busy or not self._pending or not self._turn.take(self):
                return
            self._busy = True
        self._executor.submit(self._work)

    def _work(self) -> None:
        with self._lock:
            taken = [self._pending.popleft() for _ in range(min(len(self._pending), self._batch_size))]
        jobs = self.drop_abandoned(taken)
        try:
            if jobs:
                self._run(jobs)
            error: Exception = EngineError(f"{self._name}: the batch ended without an answer")
        except Exception as raised:  # border of the worker thread: the callers get it
            error = EngineError(f"{self._name}: a batch of {len(jobs)} failed: {type(raised).__name__}: {raised}")
            error.__cause__ = raised
        with self._lock:
            waiting = set(map(id, self._pending))
        self.fail([job for job in jobs if not job.done and id(job) not in waiting], error)
        with self._lock:
            self._busy = False
        self._turn.give_back(self)

    def _deliver(self, outcomes: list[tuple[Job[Q, R], R | None, Exception | None]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[R], R | None, Exception | None]]] = {}
        with self._lock:
            for job, result, error in outcomes:
                self._close(job)
                for loop, future in job.waiters:
                    by_loop.setdefault(loop, []).append((future, result, error))
        for loop, settled in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a closed loop waits for nothing
                loop.call_soon_threadsafe(_settle, settled)

    def _close(self, job: Job[Q, R]) -> None:
        if not job.done:
            self._open -= 1
        job.done = True
        if job.key is not None and self._by_key.get(job.key) is job:
            del self._by_key[job.key]


def _settle(outcomes: list[tuple[asyncio.Future[R], R | None, Exception | None]]) -> None:
    for future, result, error in outcomes:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only beside an error
