"""A light HTTP client for the serving benchmark: plain answers and streams, timed and checked for damage.

It shares the machine's cores with the server, so it does no more than a client must: one connection pool, no retries,
and no JSON beyond what is checked.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

PATH = "/v1/chat/completions"
DONE = "[DONE]"
_TIMEOUT_S = 600.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(slots=True)
class Reply:
    """What came back. `text` is the content, `ttft_s` the time until the first of it, `problem` what was wrong.

    `ended_at` is in seconds of `time.perf_counter`; `body` the whole answer of a plain request or an error.
    """

    status: int
    seconds: float
    ended_at: float
    text: str = ""
    ttft_s: float | None = None
    problem: str | None = None
    retry_after: str | None = None
    body: dict[str, Any] | None = None


class Client:
    """Requests to one server; to be used as an asynchronous context."""

    def __init__(self, url: str) -> None:
        self._url = url + PATH
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, text: str, model: str = "auto", **fields: Any) -> Reply:
        """One plain answer."""
        began = time.perf_counter()
        async with self._post(text, model, fields) as response:
            body = await response.json()
            ended = time.perf_counter()
            reply = Reply(response.status, ended - began, ended, body=body)
            reply.retry_after = response.headers.get("retry-after")
        if reply.status == 200:
            reply.text = body["choices"][0]["message"]["content"]
        return reply

    async def stream(
        self, text: str, model: str = "auto", on_start: Callable[[], None] | None = None, **fields: Any
    ) -> Reply:
        """One streamed answer, its form checked; `on_start` is called when its first event is there."""
        began = time.perf_counter()
        reader = _StreamReader(began)
        async with self._post(text, model, {"stream": True, **fields}) as response:
            if response.status != 200:
                body, ended = await response.json(), time.perf_counter()
                retry_after = response.headers.get("retry-after")
                return Reply(response.status, ended - began, ended, retry_after=retry_after, body=body)
            try:
                async for data in response.content.iter_any():
                    if on_start is not None:
                        on_start()
                        on_start = None
                    reader.feed(data)
            except aiohttp.ClientError as error:
                reader.problem = f"the connection broke: {error!r}"
        ended = time.perf_counter()
        return Reply(200, ended - began, ended, "".join(reader.texts), reader.ttft_s, reader.find_problem())

    def _post(self, text: str, model: str, fields: dict[str, Any]) -> Any:
        assert self._session is not None, "use the client as an asynchronous context"
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return self._session.post(self._url, json=body)


class _StreamReader:
    """Server-sent events from bytes that may be cut anywhere."""

    def __init__(self, began: float) -> None:
        self.texts: list[str] = []
        self.ttft_s: float | None = None
        self.problem: str | None = None
        self._began = began
        self._rest = b""
        self._events = 0
        self._finished = self._done = False

    def feed(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            self._read(event.decode())

    def _read(self, event: str) -> None:
        data = event.removeprefix("data: ")
        self._events += 1
        if self._done or data is event:
            self.problem = f"event {self._events} is none, or comes after the end: {event[:80]!r}"
        elif data == DONE:
            self._done = True
        else:
            self._read_chunk(json.loads(data))

    def _read_chunk(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.problem = f"an error amid the stream: {chunk['error']}"
            return
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if self._events == 1 and delta.get("role") != "assistant":
                self.problem = f"the first chunk names no role: {delta}"
            if delta.get("content"):
                if self.ttft_s is None:
                    self.ttft_s = time.perf_counter() - self._began
                self.texts.append(delta["content"])
            self._finished = self._finished or choice["finish_reason"] is not None

    def find_problem(self) -> str | None:
        """What is wrong with a stream that is over, or None."""
        if self.problem is not None:
            return self.problem
        if self._rest or not self._done:
            return f"it ended without {DONE} (after {self._events} events, rest {self._rest[:80]!r})"
        return None if self._finished else "no choice has a finish_reason"


async def run_lanes(
    items: Sequence[_Item], lanes: int, work: Callable[[_Item], Awaitable[_Result]]
) -> tuple[float, list[_Result]]:
    """Do `work` on all items, so many at a time: wall seconds, and the results in the items' order."""
    results: list[Any] = [None] * len(items)
    waiting = iter(enumerate(items))

    async def run_lane() -> None:
        for place, item in waiting:
            results[place] = await work(item)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(lanes):
            group.create_task(run_lane())
    return time.perf_counter() - began, results
