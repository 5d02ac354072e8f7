"""Clients that leave before, amid or while a server sends, called as an ASGI server would: nothing stays behind.

Slots must be free by the end of the call itself, not at the garbage collector's next visit or a turn of the loop later.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serve.service import ServiceOptions
from tests.serving import CHAT, EXPLAIN, ask, make_engines, make_served, running, wait_until

pytestmark = pytest.mark.timeout(60)


async def test_a_body_whose_client_leaves_is_no_error_of_ours(tmp_path: Path) -> None:
    served = make_served(log_path=tmp_path / "log")
    async with running(served):
        sent = await call(served.app, [{"type": "http.request", "body": b'{"mo', "more_body": True}])
    assert served.metrics.total("roro_requests", code="499") == 1 and served.log()[-1]["error"] == "client_left"
    assert all(message.get("status", 499) == 499 for message in sent)


async def test_a_body_that_never_ends_meets_the_deadline() -> None:
    served = make_served(options=ServiceOptions(timeout_s=0.1))
    async with running(served):
        begun = {"type": "http.request", "body": b"{", "more_body": True}
        sent = await asyncio.wait_for(call(served.app, [begun], lambda: False), 20)
    assert sent[0]["status"] == 504 and json.loads(sent[1]["body"])["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["at once", "amid a step"])
async def test_whoever_leaves_takes_nothing_along(stream: bool, when: str, tmp_path: Path) -> None:
    served = make_served(make_engines(hangs=lambda prefix: "B: note" in prefix), log_path=tmp_path / "log")
    body = {"type": "http.request", "body": json.dumps(ask(n=2, stream=stream)).encode(), "more_body": False}
    async with running(served):
        until = (lambda: True) if when == "at once" else (lambda: served.active == 2)
        await asyncio.wait_for(call(served.app, [body], until), 20)
        assert served.service.admission.used == 0 and served.active == 0
    assert served.metrics.snapshot()["roro_in_flight_requests"] == 0
    assert served.log()[-1]["error"] == "client_left"


@pytest.mark.parametrize(("path", "stream"), [(CHAT, False), (CHAT, True), (EXPLAIN, False)])
async def test_whoever_leaves_the_queue_makes_room_in_it(path: str, stream: bool, tmp_path: Path) -> None:
    options = ServiceOptions(max_concurrent=1, max_queue=1)
    served = make_served(make_engines(hangs=lambda prefix: True), options=options, log_path=tmp_path / "log")
    body = {"type": "http.request", "body": json.dumps(ask(stream=stream)).encode(), "more_body": False}
    async with running(served) as client:
        holder = asyncio.create_task(client.post(CHAT, json=ask()))
        await wait_until(lambda: served.active == 1)
        waiting = served.service.admission
        await asyncio.wait_for(call(served.app, [body], lambda: waiting.waiting == 1, path=path), 20)
        assert (waiting.waiting, waiting.used) == (0, 1)
        assert served.log()[-1]["error"] == "client_left"
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)


@pytest.mark.parametrize("fails_after", [1, 3, None])
async def test_a_client_that_a_newer_server_loses_frees_its_slots(fails_after: int | None, tmp_path: Path) -> None:
    """Newer servers let a send fail; while a model is silent nothing is sent, so that the leaving itself must count."""
    hangs = make_engines(hangs=lambda prefix: fails_after is None and "B: note" in prefix, delay_s=0.01)
    served = make_served(hangs, log_path=tmp_path / "log")
    body = {"type": "http.request", "body": json.dumps(ask(stream=True)).encode(), "more_body": False}

    def leaves() -> bool:
        return fails_after is None and any("B: note" in request.prefix for request in served.engines[0].requests)

    async with running(served):
        await asyncio.wait_for(call(served.app, [body], leaves, fails_after, spec="2.4"), 20)
        assert served.service.admission.used == 0 and served.active == 0
    assert served.log()[-1]["error"] == "client_left"


async def call(
    app: Any,
    messages: list[dict[str, Any]],
    until: Any = lambda: True,
    fails_after: int | None = None,
    spec: str = "2.3",
    path: str = CHAT,
) -> list[dict[str, Any]]:
    """Call the app as a server would: `messages` come, then the client leaves once `until` is true.

    `fails_after`: sending fails after so many messages, as on a broken pipe.
    """
    sent: list[dict[str, Any]] = []
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        await wait_until(until)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if fails_after is not None and len(sent) >= fails_after:
            raise BrokenPipeError("broken pipe")
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"roro.test")],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return sent
