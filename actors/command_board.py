"""The board of commands between a driver and a worker group that outlives many of them.

The driver puts numbered commands up, every rank of the group takes them in order, rank 0 reports each result. A command
stays up until a checkpoint contains it: a group that is started again takes those behind its checkpoint once more, and
their results are not reported twice. The board is what remembers, so it is not restarted: where its node is lost, the
driver starts a learner anew, from the checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roro_ray.errors import RoroError, TrainingError


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What a started group says: the last command that its checkpoint contains, versions by adapter, seconds to load,
    and the process of every rank that has begun (rank: pid)."""

    serial: int
    versions: dict[str, int]
    seconds: float
    pids: dict[int, int]


class CommandBoard:
    """The actor. Waiting calls give up after `wait_s` and are to be made again."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._commands: dict[int, tuple[Any, ...]] = {}
        self._results: dict[int, Any] = {}
        self._last = 0  # command put up
        self._reported = 0
        self._facts: GroupFacts | None = None
        self._pids: dict[int, int] = {}
        self._starts = 0
        self._fatal: RoroError | None = None

    async def begin(self, rank: int, pid: int, serial: int, versions: dict[str, int], seconds: float) -> None:
        """A rank has loaded the checkpoint behind command `serial`."""
        async with self._changed:
            self._pids[rank] = pid
            if rank == 0:
                self._starts += 1
                if self._facts is None:
                    self._last = self._reported = serial
                self._facts = GroupFacts(serial, versions, seconds, self._pids)
            self._changed.notify_all()

    async def fail(self, error: RoroError) -> None:
        """The group cannot be started, and no restart would cure it."""
        async with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify_all()

    async def state(self, wait_s: float) -> tuple[GroupFacts | None, int, RoroError | None]:
        """Facts of the group (None: not up yet), how often it was started, and what keeps it from starting."""
        await self._wait(lambda: self._facts is not None or self._fatal is not None, wait_s)
        return self._facts, self._starts, self._fatal

    async def submit(self, refs: tuple[Any, ...]) -> int:
        """Put a command up (a reference in a tuple, so that Ray does not fetch it); its number."""
        async with self._changed:
            self._last += 1
            self._commands[self._last] = refs
            self._changed.notify_all()
            return self._last

    async def take(self, serial: int, wait_s: float) -> tuple[Any, ...] | None:
        """A command, or None where it is not up yet.

        Raises:
            TrainingError: it was taken down: the group went on from an older checkpoint than it had reported.
        """
        if serial <= self._last and serial not in self._commands:
            raise TrainingError(
                f"command {serial} is no longer on the board: the group went on from an older checkpoint than the "
                "one that it had reported, which must be damaged. Start the learner anew."
            )
        await self._wait(lambda: serial in self._commands, wait_s)
        return self._commands.get(serial)

    async def report(self, serial: int, result: Any) -> None:
        """The result of a command (perhaps an error); one that was reported before is not reported again."""
        async with self._changed:
            if serial > self._reported:
                self._reported = serial
                self._results[serial] = result
                self._changed.notify_all()

    async def saved(self, serial: int) -> None:
        """A checkpoint contains the commands up to this one: they are taken down."""
        self._commands = {number: refs for number, refs in self._commands.items() if number > serial}

    async def result(self, serial: int, wait_s: float) -> tuple[bool, Any, int]:
        """Whether a command is done, its result (given once), and how often the group was started."""
        await self._wait(lambda: serial in self._results, wait_s)
        return serial in self._results, self._results.pop(serial, None), self._starts

    async def _wait(self, ready: Callable[[], bool], wait_s: float) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(ready), wait_s)
            except TimeoutError:
                return
