"""One engine made of many replicas: a request goes to one of them, and to another where that one is lost.

A step is a function of its request, so that it may be asked for again: what a replica that died or hangs (`crew.Crew`)
had in hand is given to another at once, late answers are dropped, and each caller gets one result. After a bounded
number of replicas a request fails, and says what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from roro_ray.engines.balance import Balance
from roro_ray.engines.crew import Crew
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
from roro_ray.errors import EngineUnavailableError

_FEW = 8  # requests at a time of those that may be to blame for the loss of replicas
_REPORT_S = 0.5  # between two reports of what is needed


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
        self._crew = Crew(name, options, clock)
        self._registry = registry
        self._parcels: dict[str, Any] = {}
        self._facts: EngineFacts | None = None
        self._requests = self._retried = 0
        self._open = 0
        self._careful: dict[int, int] = {}  # requests on their last attempts, by how many may be asked for at once
        self._holder = uuid.uuid4().hex
        self._heard = -1e9
        self._crew.set_replicas(replicas)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, self.replicas, self.options, self._registry, self._parcels, self._facts)

    def restore(self, parcels: Mapping[str, Any], facts: EngineFacts | None) -> None:
        """Take over what another copy knew."""
        self._parcels, self._facts = dict(parcels), facts
        self._crew.parcels = list(self._parcels.values())

    @property
    def parcels(self) -> Sequence[Any]:
        """The adapters that every replica is to serve."""
        return self._crew.parcels

    @property
    def balance(self) -> Balance:
        """Which replica gets what."""
        return self._crew.balance

    @property
    def counts(self) -> Counts:
        """What happened to the requests of this copy so far."""
        return Counts(self._requests, self._retried, self.balance.moved, self._crew.hangs)

    @property
    def replicas(self) -> dict[str, Replica]:
        """Those that this copy knows of."""
        return {key: lane.replica for key, lane in self._crew.lanes.items()}

    async def ready(self) -> EngineFacts:
        """Wait until the replicas have loaded their model; of those that come and go, until the first has."""
        if self._facts is None and self.options.elastic:
            self._open += 1
            try:
                self._nudge()
                await self._ask_again()
                await self._crew.wait_until(lambda: self._facts is not None, self.options.ready_timeout_s)
            finally:
                self._open -= 1
        if self._facts is None:
            self._facts = (await asyncio.gather(*(self._crew.load(key) for key in self._crew.lanes)))[0]
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

        await asyncio.gather(*(bring(self._crew.lanes[key]) for key in self.balance.up))
        self._parcels[parcel.adapter.name] = parcel
        self._crew.parcels = list(self._parcels.values())

    async def _submit(self, item: Item) -> Any:
        ticket, prefix = Ticket(item), get_prefix(item)
        self._requests += 1
        self._open += 1
        if self._registry is not None:
            self._nudge()
        try:
            while True:
                key = self.balance.pick(prefix)
                if len(self.balance.up) < len(self.balance.members):
                    self._crew.tend()
                if key is None:
                    await self._ask_again()
                    await self._crew.wait_until(lambda: bool(self.balance.up))
                    continue
                try:
                    if ticket.attempts < ALONE:
                        return await self._crew.lanes[key].ask(ticket)
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
        await self._crew.wait_until(lambda: self._careful.get(most, 0) < most)
        if key not in self.balance.up:
            raise NotSentError("the replica was lost meanwhile")
        self._careful[most] = self._careful.get(most, 0) + 1
        try:
            return await self._crew.lanes[key].ask(ticket)
        finally:
            self._careful[most] -= 1
            self._crew.wake()

    async def _consider(self, ticket: Ticket, error: ReplicaLostError) -> None:
        """Whether to try again."""
        self._retried += 1
        if isinstance(error, ReplicaGoneError) and self._registry is not None:
            await self._exchange()  # released since this copy last heard: the request is not to blame
            return
        ticket.attempts += 1
        if ticket.attempts >= self.options.attempts:
            raise EngineUnavailableError(
                f"model {self.name}: {ticket.attempts} replicas in turn were lost over one request, the last one with: "
                f"{error}. See their logs; a model whose steps take longer needs a higher ray.step_timeout_s."
            ) from error

    async def _ask_again(self) -> None:
        """Where no replica could be started: that one is wanted still must be told, and it may have come meanwhile."""
        if self._crew.trouble and not self.balance.members:
            await self._exchange()

    def _nudge(self) -> None:
        self._crew.start("report", self._report)

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
        self._crew.trouble = roster.trouble
        self._crew.set_replicas(roster.replicas)


def _restore(
    name: str,
    replicas: Mapping[str, Replica],
    options: FleetOptions,
    registry: Registry | None,
    parcels: Mapping[str, Any],
    facts: EngineFacts | None,
) -> ReplicaEngine:
    engine = ReplicaEngine(name, replicas, options, registry)
    engine.restore(parcels, facts)
    return engine
