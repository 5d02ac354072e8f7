"""Gather concurrent asyncio calls into batches without waiting for a clock.

A call waits until the event loop has run everything that was ready; whatever calls have arrived by then are
computed together in a worker thread, and those that arrive meanwhile form the next batch. A lone caller is
served at once, a thousand callers in a few passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Turns a function of a batch into an async function of one item.

    Args:
        compute: gives one result per item, in order; runs in one thread, never twice at a time. An exception
            that it raises reaches every caller of that batch, and no other.
        max_batch: most items in one call.
    """

    def __init__(self, compute: Callable[[Sequence[Item]], Sequence[Result]], max_batch: int, name: str) -> None:
        self._compute = compute
        self._max_batch = max_batch
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The result for one item."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            # What another event loop left behind (it was stopped amid a batch) has nobody waiting for it.
            self._pending = []
            self._task = loop.create_task(self._drain())
        future: asyncio.Future[Result] = loop.create_future()
        self._pending.append((item, future))
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending:
            await self._gather()
            batch = [(item, future) for item, future in self._pending[: self._max_batch] if not future.done()]
            del self._pending[: self._max_batch]
            if not batch:
                continue  # every caller gave up (cancelled) before its turn
            try:
                results = await loop.run_in_executor(self._executor, self._compute, [item for item, _ in batch])
            except Exception as error:  # the callers' border: whoever asked must hear of it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _gather(self) -> None:
        """Let the loop run until a pass adds no more items, or the batch is full."""
        seen = -1
        while seen < len(self._pending) < self._max_batch:
            seen = len(self._pending)
            await asyncio.sleep(0)
