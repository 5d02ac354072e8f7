"""The replicas of one model as one worker sees them: the ways to them, and what becomes of those that are lost.

A replica that misses a deadline is suspected: it gets nothing more until a probe has told whether it is well. One that
is not is killed; like one that died, it is asked until it is ready again, whoever starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from roro_ray.engines.balance import Balance, State
from roro_ray.engines.lanes import Lane
from roro_ray.engines.protocol import EngineFacts
from roro_ray.engines.replicas import FleetOptions, NotSentError, Replica, ReplicaGoneError, ReplicaLostError
from roro_ray.errors import EngineUnavailableError, RoroError

logger = logging.getLogger(__name__)

_PAUSE_S, _MOST_PAUSE_S = 0.1, 2.0  # before a replica that was lost is asked again


class Crew:
    """The replicas of a model, for one worker and one event loop after another.

    Attributes:
        parcels: the adapters that every call brings along, so that a replica that starts later gets them as well.
        hangs: replicas that were killed because they did not answer.
        trouble: what last kept a replica from being ready.
    """

    def __init__(self, name: str, options: FleetOptions, clock: Callable[[], float]) -> None:
        self.name = name
        self.options = options
        self.balance = Balance(clock)
        self.lanes: dict[str, Lane] = {}
        self.parcels: Sequence[Any] = ()
        self.hangs = 0
        self.trouble = ""
        self._gone: set[str] = set()
        self._waiters: set[asyncio.Future[None]] = set()
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def set_replicas(self, replicas: Mapping[str, Replica]) -> None:
        """The replicas that there are from now on; of those that stay, everything stays known."""
        removed = self.lanes.keys() - replicas.keys()
        for key in removed:
            self.lanes.pop(key).flush(NotSentError("the replica was released"))
        self._gone -= removed
        for key in replicas:
            if key not in self.lanes:
                self.lanes[key] = Lane(key, replicas[key], self)
        if set(self.balance.members) != replicas.keys():
            self.balance.set_members(list(replicas))
        self.wake()

    def has_other(self, key: str) -> bool:
        """Whether another replica could take what this one does not answer."""
        return any(other != key for other in self.balance.up)

    def suspect(self, key: str) -> asyncio.Task[bool]:
        """Ask nothing more of a replica until a probe has told whether it is well; the task tells."""
        if self.balance.state(key) is State.UP:
            self.balance.set_state(key, State.SUSPECT)
            self.lanes[key].flush(NotSentError("the replica is suspected to hang"))
        return self.start(f"probe {key}", lambda: self._probe(key))

    def lose(self, key: str, error: ReplicaLostError) -> None:
        """A replica is dead or starting again: nothing more is asked of it until it is ready."""
        lane = self.lanes.get(key)
        if lane is None or self.balance.state(key) is State.DOWN:
            return
        logger.warning("model %s: replica %s is lost: %s", self.name, key, error)
        self.balance.set_state(key, State.DOWN)
        lane.flush(NotSentError("the replica died"))
        self.start(f"revive {key}", lambda: self._revive(key))

    async def _probe(self, key: str) -> bool:
        lane = self.lanes.get(key)
        if lane is None:
            return False
        try:
            well = await lane.replica.is_well(self.options.step_timeout_s)
        except ReplicaLostError as error:
            self.lose(key, error)
            return False
        if well:
            self._set_up(key)
        else:
            self.hangs += 1
            lane.replica.end()
            self.lose(key, ReplicaLostError("it hangs and was killed"))
        return well

    async def _revive(self, key: str) -> None:
        """Ask a lost replica until it is ready again."""
        pause = _PAUSE_S
        while (lane := self.lanes.get(key)) is not None and self.balance.state(key) is State.DOWN:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE_S)
            try:
                async with asyncio.timeout(self.options.load_timeout_s):
                    await lane.replica.ready()
            except ReplicaGoneError as error:
                self._gone.add(key)
                self.trouble = str(error)
                self.wake()
                return
            except ReplicaLostError:
                continue
            except (RoroError, TimeoutError) as error:
                self.trouble = str(error) or f"a replica was not ready in {self.options.load_timeout_s:g} s"
                continue
            self._set_up(key)

    def _set_up(self, key: str) -> None:
        self.balance.set_state(key, State.UP)
        self.wake()

    def tend(self) -> None:
        """See to it that each replica that is not up is asked, in this event loop (the one before may have ended)."""
        for key in self.balance.members:
            state = self.balance.state(key)
            if state is State.SUSPECT:
                self.suspect(key)
            elif state is State.DOWN and key not in self._gone:
                self.start(f"revive {key}", partial(self._revive, key))

    async def load(self, key: str) -> EngineFacts:
        """Facts of a replica, which may die while it loads."""
        pause = _PAUSE_S
        while True:
            try:
                return await self.lanes[key].replica.ready()
            except ReplicaGoneError:
                raise
            except ReplicaLostError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_PAUSE_S)

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait for a condition on the replicas.

        Raises:
            EngineUnavailableError: it is not true within `timeout_s` (None: a request's time), or can never be.
        """
        timeout_s = self.options.timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._check_hope()
                    self.tend()
                    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiters.add(future)
                    try:
                        await future
                    finally:
                        self._waiters.discard(future)
        except TimeoutError:
            raise EngineUnavailableError(self._describe_wait(timeout_s)) from None

    def _describe_wait(self, timeout_s: float) -> str:
        if self.balance.up:
            return (
                f"model {self.name}: a request over which replicas were lost waited {timeout_s:g} s for others like "
                "it, which are asked one at a time in the end. See the replicas' logs; a model whose steps take "
                "longer needs a higher ray.step_timeout_s."
            )
        trouble = f"; {self.trouble}" if self.trouble else ""
        return (
            f"model {self.name}: no replica was there in {timeout_s:g} s ({len(self.balance.members)} known, none "
            f"up{trouble}). Where the cluster has no room, add nodes or lower ray.replicas; else see the replicas' "
            "logs."
        )

    def _check_hope(self) -> None:
        """Refuse to wait for what cannot come."""
        members = self.balance.members
        if self.options.elastic:
            if self.trouble and not members:
                raise EngineUnavailableError(f"model {self.name}: no replica can be started: {self.trouble}")
        elif all(key in self._gone for key in members):
            raise EngineUnavailableError(f"model {self.name}: all its replicas are gone: {self.trouble}")

    def wake(self) -> None:
        """Have everybody who waits look at their condition again."""
        for future in self._waiters:
            if not future.done():
                future.set_result(None)

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """The task of that name in this event loop, started unless it runs."""
        loop = asyncio.get_running_loop()
        task = self._tasks.get(name)
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._tasks[name] = loop.create_task(work(), name=f"model {self.name}: {name}")
        return task
