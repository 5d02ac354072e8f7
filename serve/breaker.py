"""Whether a deployment can be reached: bounds every call, and fails calls at once while no replica answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from roro_ray.errors import EngineUnavailableError
from serve.config import RescueConfig

logger = logging.getLogger(__name__)


class SilentReplicaError(EngineUnavailableError):
    """One replica did not answer in time; another one may."""


class Breaker:
    """Open while no replica of a deployment answers: then no call is tried.

    Args:
        name: of the deployment, for messages (`model 'large'`).
        probe: asks for a sign of life; returns as soon as any replica gives one, raises where none can.
    """

    def __init__(self, name: str, probe: Callable[[], Awaitable[Any]], rescue: RescueConfig) -> None:
        self.name = name
        self.is_open = False
        self._probe = probe
        self._rescue = rescue
        self._task: asyncio.Task[None] | None = None
        self._unanswered: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def guard(self) -> AsyncIterator[Callable[[], None]]:
        """Hold one call. It ends when the breaker opens, unless it told before (by the function given) of an answer.

        Raises:
            EngineUnavailableError: the breaker is open, or opens.
            SilentReplicaError: the call takes longer than `step_timeout_s`.
        """
        if self.is_open:
            self.suspect()  # whoever asked for signs of life may have ended, with an event loop
            raise self._closed_off()
        try:
            async with asyncio.timeout(self._rescue.step_timeout_s) as scope:
                self._unanswered.add(scope)
                try:
                    yield lambda: self._unanswered.discard(scope)
                finally:
                    self._unanswered.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            if self.is_open:
                raise self._closed_off() from None
            raise SilentReplicaError(
                f"{self.name}: a replica did not answer within {self._rescue.step_timeout_s:g} s "
                "(rescue.step_timeout_s); another one is asked"
            ) from None

    def suspect(self) -> None:
        """A replica is gone: find out whether another one answers."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._find_out())

    async def _find_out(self) -> None:
        wait_s = self._rescue.failover_s
        while not await self._answers(wait_s):
            if not self.is_open:
                logger.warning("%s: no replica answers within %g s; it is left out until one does", self.name, wait_s)
                self.is_open = True
            now = asyncio.get_running_loop().time()
            for scope in self._unanswered:
                if not scope.expired():  # a call that ends already may take its time, and cannot be told again
                    scope.reschedule(now)
            await asyncio.sleep(self._rescue.probe_s)
        if self.is_open:
            logger.warning("%s: answers again", self.name)
        self.is_open = False

    async def _answers(self, wait_s: float) -> bool:
        try:
            await asyncio.wait_for(_as_coroutine(self._probe()), wait_s)
        except Exception as error:  # whatever keeps the probe from being answered, the answer is no
            logger.debug("%s: no sign of life: %r", self.name, error)
            return False
        return True

    def _closed_off(self) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"{self.name}: no replica of it answers; it is asked again every {self._rescue.probe_s:g} s"
        )


async def _as_coroutine(work: Awaitable[Any]) -> Any:
    return await work
