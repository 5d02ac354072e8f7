"""Admission: bounded, in order of arrival, and no slot lost whoever leaves when."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission import Admission
from serve.problems import ApiError
from serve.service import ServiceOptions
from tests.serving import CHAT, ask, check_error, make_engines, make_served, running, wait_until

pytestmark = pytest.mark.timeout(60)
SLOTS, QUEUE = 4, 3
_turn = 0


class _Client:
    """One request: `finish` ends its work, cancelling its task makes it leave; it entered in the loop's turn `turn`."""

    def __init__(self, admission: Admission, weight: int) -> None:
        self.weight = weight
        self.inside = False
        self.turn: int | None = None
        self.refused: ApiError | None = None
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._run(admission))

    async def _run(self, admission: Admission) -> None:
        try:
            async with admission.enter(self.weight):
                self.inside = True
                self.turn = _turn
                try:
                    await self._end.wait()
                finally:
                    self.inside = False
        except ApiError as error:
            self.refused = error

    def finish(self) -> None:
        self._end.set()


# What happens, and whether the event loop gets a turn afterwards: events of one turn meet in every order.
_EVENTS = st.lists(
    st.tuples(
        st.one_of(
            st.tuples(st.just("come"), st.integers(1, SLOTS)),
            st.tuples(st.sampled_from(["finish", "leave"]), st.integers(0, QUEUE)),
        ),
        st.integers(0, 2),
    ),
    max_size=40,
)


@given(_EVENTS)
@settings(max_examples=400, deadline=None)
def test_slots_are_bounded_fifo_and_never_lost(events: list[tuple[tuple[str, int], int]]) -> None:
    asyncio.run(_check(events))


async def _check(events: list[tuple[tuple[str, int], int]]) -> None:
    admission, clients = Admission(SLOTS, QUEUE), list[_Client]()
    for (kind, value), turns in events:
        if kind == "come":
            clients.append(_Client(admission, value))
        elif those := [c for c in clients if not c.task.done() and (c.inside or kind == "leave")]:
            client = those[value % len(those)]
            client.finish() if kind == "finish" else client.task.cancel()
        for _ in range(turns):
            await _settle(1)
            held = sum(client.weight for client in clients if client.inside)
            assert held <= admission.used <= SLOTS and admission.waiting <= QUEUE
    await _settle()
    # Whoever waits is not kept out by room that is there.
    assert admission.used == sum(client.weight for client in clients if client.inside)
    waiting = deque(c for c in clients if not c.inside and not c.task.done())
    assert len(waiting) == admission.waiting
    assert not waiting or admission.used + waiting[0].weight > SLOTS
    # In order of arrival; who is called from the queue begins a turn later than who finds room at once.
    turns_in = [client.turn for client in clients if client.turn is not None]
    assert all(max(turns_in[:index]) <= turn + 1 for index, turn in enumerate(turns_in) if index)
    assert all(c.refused.status == 429 and int(c.refused.headers["Retry-After"]) >= 1 for c in clients if c.refused)
    for client in clients:
        client.finish()
    results = await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
    assert (admission.used, admission.waiting) == (0, 0)


async def _settle(turns: int = 20) -> None:
    global _turn
    for _ in range(turns):
        _turn += 1
        await asyncio.sleep(0)


@pytest.mark.parametrize("first", ["leave", "finish", "finish and a turn"])
async def test_a_waiter_that_leaves_in_the_moment_of_its_turn(first: str) -> None:
    admission = Admission(1, 2)
    holder, waiter, next_one = (_Client(admission, 1) for _ in range(3))
    await _settle()
    if first == "leave":
        waiter.task.cancel()
    holder.finish()
    if first == "finish and a turn":
        await _settle(1)
    if first != "leave":
        waiter.task.cancel()
    await _settle()
    assert waiter.task.cancelled() and next_one.inside and admission.used == 1
    next_one.finish()
    await _settle()
    assert (admission.used, admission.waiting) == (0, 0)


async def test_how_long_to_wait_follows_how_long_answers_take() -> None:
    admission = Admission(2, 0)
    now = 0.0
    asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
    assert admission.retry_after_s() == 1
    for _ in range(60):
        async with admission.enter(1):
            now += 20.0
    assert admission.retry_after_s() == 10


async def test_a_full_server_refuses_at_once_and_takes_the_next_when_there_is_room() -> None:
    open_gate = asyncio.Event()
    engines = make_engines(hangs=lambda prefix: "wait" in prefix and not open_gate.is_set())
    served = make_served(engines, options=ServiceOptions(max_concurrent=2, max_queue=1))
    async with running(served) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask("wait", n=2)))
        await wait_until(lambda: served.active == 2)
        second = asyncio.create_task(client.post(CHAT, json=ask("next")))
        await wait_until(lambda: served.service.admission.waiting == 1)
        for body in (ask(), ask(stream=True)):
            refused = await client.post(CHAT, json=body)
            check_error(refused, 429, code="rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
        refused = await client.post("/v1/routing/explain", json=ask())
        check_error(refused, 429, code="rate_limit_exceeded")
        assert (await client.get("/v1/models")).status_code == 200, "what takes no model is answered"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert (await second).json()["choices"][0]["message"]["content"].endswith("42")
        assert (served.service.admission.used, served.service.admission.waiting, served.active) == (0, 0, 0)
    assert served.metrics.total("roro_requests", code="429") == 3
    assert served.metrics.snapshot()["roro_queue_depth"] == served.metrics.snapshot()["roro_in_flight_requests"] == 0
