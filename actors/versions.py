"""Several versions of the router in one rollout worker, and a bound on the episodes that it runs at once.

With a lag, batches under different weights are in the air together; were a worker to hold one version at a time, the
batches would wait for each other's last episodes. A copy costs what training changes (a small head, a tiny encoder or
an adapter: frozen weights are shared), and is made only when it is needed beside the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Slot(Generic[T]):
    """One holder of weights: whose they are, and how many runs use them."""

    holder: T
    serial: int = -1
    loaded: bool = False
    inside: int = 0
    used: int = 0  # when it was last entered, counted in entries
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class VersionSlots(Generic[T]):
    """Lets every run in with the weights that it asks for, at most `most` different ones at a time.

    Runs under the same weights share a holder. A run under others takes a holder that nobody uses (the longest unused
    one), or a new one while there are fewer than `most`; else it waits until one is free.
    """

    def __init__(self, make: Callable[[], T], most: int) -> None:
        self._make = make
        self._most = most
        self._slots: list[_Slot[T]] = []
        self._entries = 0
        self._change = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._slots)

    @asynccontextmanager
    async def enter(self, serial: int, load: Callable[[T], Awaitable[None]]) -> AsyncIterator[T]:
        """Inside, the weights of `serial` (not negative) are in the holder and stay there.

        Args:
            load: puts the weights into a holder; called unless they are there. What it raises is raised here.
        """
        async with self._change:
            await self._change.wait_for(lambda: self._find(serial) is not None)
            slot = self._find(serial)
            assert slot is not None, "the condition above"
            if slot.serial != serial:
                slot.serial, slot.loaded = serial, False
            slot.inside += 1
            self._entries += 1
            slot.used = self._entries
        try:
            async with slot.loading:  # whoever comes first loads; runs under other weights go on meanwhile
                if not slot.loaded:
                    await load(slot.holder)
                    slot.loaded = True
            yield slot.holder
        finally:
            async with self._change:
                slot.inside -= 1
                self._change.notify_all()

    def _find(self, serial: int) -> _Slot[T] | None:
        """The slot for these weights: theirs, an idle one, a new one, or None where all are in use by others."""
        for slot in self._slots:
            if slot.serial == serial:
                return slot
        idle = [slot for slot in self._slots if not slot.inside]
        if idle:
            return min(idle, key=lambda slot: slot.used)
        if len(self._slots) >= self._most:
            return None
        self._slots.append(_Slot(self._make()))
        return self._slots[-1]


class Room:
    """Room for `size` episodes; calls that find none wait, in about the order in which they came."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._change = asyncio.Condition()

    @asynccontextmanager
    async def take(self, episodes: int) -> AsyncIterator[None]:
        """Inside, there is room for so many; a call larger than all the room gets it when the room is empty."""
        async with self._change:
            await self._change.wait_for(lambda: not self._taken or self._taken + episodes <= self._size)
            self._taken += episodes
        try:
            yield
        finally:
            async with self._change:
                self._taken -= episodes
                self._change.notify_all()
