"""Who may start now: a bounded number of answers under way, a bounded queue, and 429 at once beyond it.

A client that is told at once to come back can; one that waits in a queue without end times out and asks again, which
makes the queue longer still.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serve.problems import too_many

_SMOOTHING = 0.1


class Admission:
    """Slots for answers under way; a request takes one for each of its choices, in order of arrival.

    Args:
        slots: answers under way at once.
        queue: requests that may wait.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.queue = queue
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._seconds = 1.0  # running mean of how long an answer takes

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def enter(self, weight: int) -> AsyncIterator[None]:
        """Hold `weight` slots while the block runs.

        Raises:
            ApiError: 429 where the queue is full.
        """
        await self._take(weight)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            self._seconds += _SMOOTHING * (loop.time() - began - self._seconds)
            self._give_back(weight)

    async def _take(self, weight: int) -> None:
        if not self._waiting and self.used + weight <= self.slots:
            self.used += weight
            return
        if len(self._waiting) >= self.queue:
            raise too_many(self.retry_after_s())
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (weight, future)
        self._waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give_back(weight)  # the slots came in the same moment as the cancellation
            else:
                if entry in self._waiting:  # `_wake` has taken it out where slots came after the cancellation
                    self._waiting.remove(entry)
                self._wake()
            raise

    def _give_back(self, weight: int) -> None:
        self.used -= weight
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self.used + self._waiting[0][0] <= self.slots:
            weight, future = self._waiting.popleft()
            if not future.done():
                self.used += weight
                future.set_result(None)

    def retry_after_s(self) -> int:
        """Whole seconds after which the queue should have room, from how long answers take now."""
        return max(1, math.ceil(self._seconds * (len(self._waiting) + 1) / self.slots))
