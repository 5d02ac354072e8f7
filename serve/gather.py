"""Decisions of the moment in one remote call: a call costs as much as ten of the router's decisions.

The first one goes off as soon as the event loop has nothing else that might ask; while calls are under way the next
ones gather. Trajectories are dealt into lanes by their session, one lane's calls always meeting the same replica, so
that the states that a replica keeps of the texts stay of use where there are several replicas.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from roro_ray.routing.opinion import Opinion, RouterReading

Ask = Callable[[int, tuple[RouterReading, ...], str], Awaitable[list[Opinion]]]
_MOST_CALLS = 2  # of one lane at a time: the next one gathers while these are computed
_MOST_READINGS = 256  # in one call
_QUIET_PASSES = 2  # of the event loop without a new reading before a call goes off
_Waiting = list[tuple[RouterReading, "asyncio.Future[Opinion]"]]


@dataclass(slots=True)
class _Lane:
    """Readings of one version and lane that wait, and the calls under way."""

    waiting: _Waiting = field(default_factory=list)
    calls: int = 0


class Gatherer:
    """Turns single readings into calls of many.

    Args:
        ask: the remote call: version, readings, session of the lane; one opinion for each reading.
        lanes: into how many lanes sessions are dealt.
    """

    def __init__(self, ask: Ask, lanes: int) -> None:
        self._ask = ask
        self._lanes = lanes
        self._open: dict[tuple[int, int], _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def judge_reading(self, version: int, reading: RouterReading, session: str) -> Opinion:
        """The opinion on one reading; raises what the call that it shares raises."""
        key = (version, zlib.crc32(session.encode()) % self._lanes)
        lane = self._open.setdefault(key, _Lane())
        future: asyncio.Future[Opinion] = asyncio.get_running_loop().create_future()
        lane.waiting.append((reading, future))
        self._start(key, lane)
        return await future

    def _start(self, key: tuple[int, int], lane: _Lane) -> None:
        if lane.calls < _MOST_CALLS:
            lane.calls += 1
            task = asyncio.get_running_loop().create_task(self._call(key, lane))
            self._tasks.add(task)  # the loop holds tasks only weakly
            task.add_done_callback(self._tasks.discard)

    async def _call(self, key: tuple[int, int], lane: _Lane) -> None:
        try:
            seen = -1
            while seen < len(lane.waiting):
                seen = len(lane.waiting)
                for _ in range(_QUIET_PASSES):
                    await asyncio.sleep(0)
            batch = [pair for pair in lane.waiting[:_MOST_READINGS] if not pair[1].done()]
            del lane.waiting[:_MOST_READINGS]
            if batch:
                await self._answer(key, batch)
        finally:
            lane.calls -= 1
            if lane.waiting:
                self._start(key, lane)
            elif not lane.calls:
                self._open.pop(key, None)

    async def _answer(self, key: tuple[int, int], batch: _Waiting) -> None:
        version, number = key
        try:
            opinions = await self._ask(version, tuple(reading for reading, _ in batch), f"lane-{number}")
        except Exception as error:  # the border: whoever waits must hear of it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), opinion in zip(batch, opinions, strict=True):
            if not future.done():
                future.set_result(opinion)
