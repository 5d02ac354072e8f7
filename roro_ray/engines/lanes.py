"""Requests on their way to one replica: gathered into calls where that pays, each call under a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from roro_ray.engines.balance import Balance
from roro_ray.engines.replicas import (
    Answer,
    FleetOptions,
    Item,
    NotSentError,
    Replica,
    ReplicaLostError,
    measure_work,
)
from roro_ray.errors import EngineUnavailableError

_MOST_CALLS = 2  # in flight per worker and replica, where requests are gathered: the next batch gathers meanwhile
ALONE = 2  # attempts after which a request travels alone: it may be what ended the replicas that it was on


@dataclass(eq=False, slots=True)
class Ticket:
    """A request, and how often it was given to a replica that then was lost."""

    item: Item
    attempts: int = 0


class Dispatcher(Protocol):
    """What a lane needs of the engine that it belongs to."""

    balance: Balance
    options: FleetOptions

    @property
    def parcels(self) -> Sequence[Any]:
        """The adapters that every call brings along."""
        ...

    def has_other(self, key: str) -> bool:
        """Whether another replica could take what this one does not answer."""
        ...

    def suspect(self, key: str) -> asyncio.Task[bool]:
        """Ask nothing more of a replica until a probe has told whether it is well; the task tells."""
        ...

    def lose(self, key: str, error: ReplicaLostError) -> None:
        """A replica is dead or starting again."""
        ...


class Lane:
    """The way to one replica."""

    def __init__(self, key: str, replica: Replica, dispatcher: Dispatcher) -> None:
        self.key = key
        self.replica = replica
        self._dispatcher = dispatcher
        self._pending: list[tuple[Ticket, asyncio.Future[Any]]] = []
        self._calls = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, ticket: Ticket) -> Any:
        """The answer to one request.

        Raises:
            ReplicaLostError: the replica died or did not answer in time.
            Exception: what the engine raised on this request.
        """
        balance = self._dispatcher.balance
        balance.take(self.key)
        try:
            if not self._dispatcher.options.gathers or ticket.attempts >= ALONE:
                answer = (await self._call([ticket]))[0]
                if isinstance(answer, BaseException):
                    raise answer
                return answer
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._pending.append((ticket, future))
            self._start_call()
            return await future
        finally:
            balance.give_back(self.key)

    def flush(self, error: NotSentError) -> None:
        """Give back what was not sent yet."""
        pending, self._pending = self._pending, []
        for _, future in pending:
            if not future.done():
                future.set_exception(error)

    def _start_call(self) -> None:
        if self._calls < _MOST_CALLS:
            self._calls += 1
            task = asyncio.get_running_loop().create_task(self._call_pending())
            self._tasks.add(task)  # the loop holds tasks only weakly
            task.add_done_callback(self._tasks.discard)

    async def _call_pending(self) -> None:
        try:
            seen = -1
            while seen < len(self._pending):  # until a pass of the event loop brings no more
                seen = len(self._pending)
                await asyncio.sleep(0)
            batch = [(ticket, future) for ticket, future in self._pending if not future.done()]
            self._pending.clear()
            if batch:
                await self._serve(batch)
        finally:
            self._calls -= 1
            if self._pending:
                self._start_call()

    async def _serve(self, batch: Sequence[tuple[Ticket, asyncio.Future[Any]]]) -> None:
        try:
            answers = await self._call([ticket for ticket, _ in batch])
        except Exception as error:  # the callers' border: whoever asked must hear of it
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    async def _call(self, tickets: Sequence[Ticket]) -> list[Answer]:
        balance, items = self._dispatcher.balance, [ticket.item for ticket in tickets]
        number = balance.begin(self.key)
        answers: list[Answer] | None = None
        call = asyncio.ensure_future(self.replica.call(items, self._dispatcher.parcels))
        try:
            answers = await self._watch(call, max(ticket.attempts for ticket in tickets))
        except ReplicaLateError:
            balance.finish(self.key, number, *measure_work(items, ()))
            raise
        except ReplicaLostError as error:
            self._dispatcher.lose(self.key, error)
            raise
        finally:
            call.cancel()  # a late answer is nobody's; nothing happens where the call is over
            balance.finish(self.key, number, *(measure_work(items, answers) if answers is not None else ()))
        return answers

    async def _watch(self, call: asyncio.Future[list[Answer]], attempts: int) -> list[Answer]:
        """The call's result. Past the deadline it is given up where another replica can take its requests, or where
        the probe finds this one hung; a replica that is alone and merely slow is waited for."""
        options = self._dispatcher.options
        started = asyncio.get_running_loop().time()
        while not (await asyncio.wait({call}, timeout=options.step_timeout_s))[0]:
            probe = self._dispatcher.suspect(self.key)
            error = ReplicaLateError(f"no answer in {options.step_timeout_s:g} s (ray.step_timeout_s)")
            if attempts + 1 < options.attempts and self._dispatcher.has_other(self.key):
                raise error
            either: set[asyncio.Future[Any]] = {call, probe}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                break
            if probe.cancelled() or not probe.result():
                raise error
            if asyncio.get_running_loop().time() - started >= options.timeout_s:
                raise EngineUnavailableError(
                    f"a replica that is well did not answer a request in {options.timeout_s:g} s: raise "
                    "episode.timeout_s if the work is merely slow"
                )
        return call.result()


class ReplicaLateError(ReplicaLostError):
    """A replica did not answer in time, which its probe looks into."""
