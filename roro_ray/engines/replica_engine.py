"""One engine made of many replicas: a request goes to one of them, and to another where that one is lost.

A step is a function of its request, so that it may be asked for again: what a replica that died or hangs had in hand is
given to another at once, late answers are dropped, and each caller gets one result. A replica that misses a deadline is
suspected: it gets nothing more until a probe has told whether it is well; one that is not is killed, and whoever starts
replicas starts it anew. After a bounded number of replicas a request fails, and says what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from roro_ray.engines.balance import Balance, State
from roro_ray.engines.lanes import ALONE, Lane, Ticket
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepRequest, StepResult
from roro_ray.engines.replicas import (
    Counts,
    FleetOptions,
    Item,
    NotSentError,
    Registry,
    Replica,
    ReplicaGoneError,
    ReplicaLostError,
    Roster,
    get_prefix,
)
from roro_ray.errors import EngineUnavailableError, RoroError

logger = logging.getLogger(__name__)

_FEW = 8  # requests at a time of those that may be to blame for the loss of replicas
_REPORT_S = 0.5  # between two reports of what is needed
_PAUSE_S, _MOST_PAUSE_S = 0.1, 2.0  # before a replica that was lost is asked again


class ReplicaEngine:
    """An `Engine` over the replicas of one model; pickles, each copy with a view of its own.

    Args:
        replicas: those that there are, by a name that all holders give them.
        registry: hears what is needed and tells which replicas there are; None: they stay as given.
        clock: seconds, for the speed of replicas (a simulation has its own).
    """

    def __init__(
        self,
        name: str,
        replicas: Mapping[str, Replica],
        options: FleetOptions,
        registry: Registry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.options = options
        self.balance = Balance(clock)
        self._registry = registry
        self._lanes: dict[str, Lane] = {}
        self._parcels: dict[str, Any] = {}
        self._facts: EngineFacts | None = None
        self._trouble = ""
        self._gone: set[str] = set()
        self._counts = Counts()
        self._open = 0
        self._careful: dict[int, int] = {}  # requests on their last attempts, by how many may be asked for at once
        self._waiters: set[asyncio.Future[None]] = set()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._holder = uuid.uuid4().hex
        self._heard = -1e9
        self._set_replicas(replicas)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, self.replicas, self.options, self._registry, self._parcels, self._facts)

    @property
    def parcels(self) -> Sequence[Any]:
        """The adapters that every call brings along, so that a replica that starts later gets them as well."""
        return list(self._parcels.values())

    @property
    def counts(self) -> Counts:
        """What happened to the requests of this copy so far."""
        return Counts(self._counts.requests, self._counts.retried, self.balance.moved, self._counts.hangs)

    @property
    def replicas(self) -> dict[str, Replica]:
        """Those that this copy knows of."""
        return {key: lane.replica for key, lane in self._lanes.items()}

    async def ready(self) -> EngineFacts:
        """Wait until the replicas have loaded their model; of those that come and go, until the first has."""
        if self._facts is None and self.options.elastic:
            self._open += 1
            try:
                self._nudge()
                await self._wait_until(lambda: self._facts is not None)
            finally:
                self._open -= 1
        if self._facts is None:
            self._facts = (await asyncio.gather(*(self._load(key) for key in self._lanes)))[0]
        return self._facts

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step.

        Raises:
            EngineUnavailableError: no replica could be had, or each that the request was given to was lost.
        """
        result: StepResult = await self._submit(request)
        return result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score continuations."""
        scores: ChoiceScores = await self._submit((prefix, choices, adapter))
        return scores

    async def take_parcel(self, parcel: Any) -> None:
        """Have every replica serve an adapter, those that come later and those that are started again as well."""
        held = self._parcels.get(parcel.adapter.name)
        if held is not None and held.adapter.version >= parcel.adapter.version:
            return

        async def bring(lane: Lane) -> None:
            with contextlib.suppress(ReplicaLostError):  # it gets the adapter with its next call
                await lane.replica.load_adapters([parcel])

        await asyncio.gather(*(bring(self._lanes[key]) for key in self.balance.up))
        self._parcels[parcel.adapter.name] = parcel

    async def _submit(self, item: Item) -> Any:
        ticket, prefix = Ticket(item), get_prefix(item)
        self._counts.requests += 1
        self._open += 1
        if self._registry is not None:
            self._nudge()
        try:
            while True:
                key = self.balance.pick(prefix)
                if key is None:
                    await self._wait_until(lambda: bool(self.balance.up))
                    continue
                try:
                    if ticket.attempts < ALONE:
                        return await self._lanes[key].ask(ticket)
                    return await self._ask_carefully(key, ticket)
                except NotSentError:
                    continue
                except ReplicaLostError as error:
                    await self._consider(ticket, error)
        finally:
            self._open -= 1

    async def _ask_carefully(self, key: str, ticket: Ticket) -> Any:
        """Ask for what may have ended two replicas: few such requests at a time, and the last attempt of each with no
        other one beside it, so that the culprit takes nobody along."""
        most = 1 if ticket.attempts + 1 >= self.options.attempts else _FEW
        await self._wait_until(lambda: self._careful.get(most, 0) < most)
        if key not in self.balance.up:
            raise NotSentError("the replica was lost meanwhile")
        self._careful[most] = self._careful.get(most, 0) + 1
        try:
            return await self._lanes[key].ask(ticket)
        finally:
            self._careful[most] -= 1
            self._wake()

    async def _consider(self, ticket: Ticket, error: ReplicaLostError) -> None:
        """Whether to try again."""
        self._counts.retried += 1
        if isinstance(error, ReplicaGoneError) and self._registry is not None:
            await self._exchange()  # released since this copy last heard: the request is not to blame
            return
        ticket.attempts += 1
        if ticket.attempts >= self.options.attempts:
            raise EngineUnavailableError(
                f"model {self.name}: {ticket.attempts} replicas in turn were lost over one request, the last one with: "
                f"{error}. See their logs; a model whose steps take longer needs a higher ray.step_timeout_s."
            ) from error

    # Which replicas there are.

    def _set_replicas(self, replicas: Mapping[str, Replica]) -> None:
        removed = self._lanes.keys() - replicas.keys()
        for key in removed:
            self._lanes.pop(key).flush(NotSentError("the replica was released"))
        self._gone -= removed
        for key in replicas:
            if key not in self._lanes:
                self._lanes[key] = Lane(key, replicas[key], self)
        if set(self.balance.members) != replicas.keys():
            self.balance.set_members(list(replicas))
        self._wake()

    def has_other(self, key: str) -> bool:
        """Whether another replica could take what this one does not answer."""
        return any(other != key for other in self.balance.up)

    def suspect(self, key: str) -> asyncio.Task[bool]:
        """Ask nothing more of a replica until a probe has told whether it is well; the task tells."""
        if self.balance.state(key) is State.UP:
            self.balance.set_state(key, State.SUSPECT)
            self._lanes[key].flush(NotSentError("the replica is suspected to hang"))
        return self._start(f"probe {key}", lambda: self._probe(key))

    def lose(self, key: str, error: ReplicaLostError) -> None:
        """A replica is dead or starting again: nothing more is asked of it until it is ready."""
        lane = self._lanes.get(key)
        if lane is None or self.balance.state(key) is State.DOWN:
            return
        logger.warning("model %s: replica %s is lost: %s", self.name, key, error)
        self.balance.set_state(key, State.DOWN)
        lane.flush(NotSentError("the replica died"))
        self._start(f"revive {key}", lambda: self._revive(key))

    async def _probe(self, key: str) -> bool:
        lane = self._lanes.get(key)
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
            self._counts.hangs += 1
            lane.replica.end()
            self.lose(key, ReplicaLostError("it hangs and was killed"))
        return well

    async def _revive(self, key: str) -> None:
        """Ask a lost replica until it is ready again."""
        pause = _PAUSE_S
        while (lane := self._lanes.get(key)) is not None and self.balance.state(key) is State.DOWN:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE_S)
            try:
                async with asyncio.timeout(self.options.load_timeout_s):
                    await lane.replica.ready()
            except ReplicaGoneError as error:
                self._gone.add(key)
                self._trouble = str(error)
                self._wake()
                return
            except ReplicaLostError:
                continue
            except (RoroError, TimeoutError) as error:
                self._trouble = str(error) or f"a replica was not ready in {self.options.load_timeout_s:g} s"
                if isinstance(error, TimeoutError):
                    lane.replica.end()
                continue
            self._set_up(key)

    def _set_up(self, key: str) -> None:
        self.balance.set_state(key, State.UP)
        self._wake()

    async def _load(self, key: str) -> EngineFacts:
        """Facts of a replica, which may die while it loads."""
        pause = _PAUSE_S
        while True:
            try:
                return await self._lanes[key].replica.ready()
            except ReplicaGoneError:
                raise
            except ReplicaLostError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_PAUSE_S)

    # Waiting for them, and telling that they are needed.

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(self.options.timeout_s):
                while not condition():
                    self._check_hope()
                    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiters.add(future)
                    try:
                        await future
                    finally:
                        self._waiters.discard(future)
        except TimeoutError:
            raise EngineUnavailableError(
                f"model {self.name}: no replica was there in {self.options.timeout_s:g} s "
                f"({len(self.balance.members)} known, none up{'; ' + self._trouble if self._trouble else ''}). Where "
                "the cluster has no room, add nodes or lower ray.replicas; else see the replicas' logs."
            ) from None

    def _check_hope(self) -> None:
        """Refuse to wait for what cannot come."""
        members = self.balance.members
        if self.options.elastic:
            if self._trouble and not members:
                raise EngineUnavailableError(f"model {self.name}: no replica can be started: {self._trouble}")
        elif all(key in self._gone for key in members):
            raise EngineUnavailableError(f"model {self.name}: all its replicas are gone: {self._trouble}")

    def _wake(self) -> None:
        for future in self._waiters:
            if not future.done():
                future.set_result(None)

    def _nudge(self) -> None:
        self._start("report", self._report)

    async def _report(self) -> None:
        if self.balance.up:  # requests that come and go one by one are not worth a report each
            await asyncio.sleep(self._heard + _REPORT_S - time.monotonic())
        while True:
            told = self._open
            await self._exchange()
            if not told and not self._open:
                return
            await asyncio.sleep(_REPORT_S)

    async def _exchange(self) -> None:
        if self._registry is None:
            return
        roster = await self._registry.exchange(self.name, self._holder, self._open, self.counts)
        self._heard = time.monotonic()
        if roster is not None:
            self._take_roster(roster)

    def _take_roster(self, roster: Roster) -> None:
        self._facts = roster.facts or self._facts
        self._trouble = roster.trouble
        self._set_replicas(roster.replicas)

    def _start(self, name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """The task of that name in this event loop, started unless it runs."""
        loop = asyncio.get_running_loop()
        task = self._tasks.get(name)
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._tasks[name] = loop.create_task(work(), name=f"model {self.name}: {name}")
        return task


def _restore(
    name: str,
    replicas: Mapping[str, Replica],
    options: FleetOptions,
    registry: Registry | None,
    parcels: Mapping[str, Any],
    facts: EngineFacts | None,
) -> ReplicaEngine:
    engine = ReplicaEngine(name, replicas, options, registry)
    engine._parcels, engine._facts = dict(parcels), facts
    return engine
