"""The HTTP service on scripted models: put together in this process, or under uvicorn on a free port of loopback.

`ScriptedRouters` stands in for the router deployment: opinions are a function of what is read, and it can fail, hang or
let a version go. Everything above it is the real service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from roro_ray.engines.pool import EnginePool
from roro_ray.errors import EngineUnavailableError
from roro_ray.evaluation.calibration import Calibration, Interval, OperatingPoint
from roro_ray.routing.opinion import Opinion, RouterReading
from roro_ray.types import Peek
from serve.access_log import AccessLog
from serve.api import ApiOptions, make_api
from serve.backend import LocalBackend, RouterFacts, RouterList, Routers, UnknownRouterError
from serve.metrics import MemoryMetrics
from serve.service import RoutingService, ServiceOptions
from tests.fakes import ScriptedEngine

CHAT = "/v1/chat/completions"
EXPLAIN = "/v1/routing/explain"
ROUTER_FLOPS = 3.0  # per token that the scripted router reads


def every_other(reading: RouterReading) -> float:
    """Probability of the large model: it writes every second step."""
    return 0.9 if len(reading.texts) % 2 == 0 else 0.2


class ScriptedRouters:
    """Routers whose opinion is a function of the reading; tokens are characters.

    `gone` makes a decision after so many steps (None: never) find no router, `dropped` no such version; `hangs` never
    answers.
    """

    def __init__(
        self,
        large: Callable[[RouterReading], float] = every_other,
        versions: Sequence[int] = (3, 7),
        peek: Peek = Peek.NONE,
        calibration: Calibration | None = None,
    ) -> None:
        self.large = large
        self.routers = tuple(RouterFacts(version, peek, calibration) for version in versions)
        self.gone: int | None = None
        self.dropped: int | None = None
        self.hangs = False
        self.asked: list[tuple[int, RouterReading, str]] = []

    async def describe(self) -> RouterList:
        return RouterList(self.routers, self.routers[-1].version)

    async def judge_reading(self, version: int, reading: RouterReading, session: str) -> Opinion:
        self.asked.append((version, reading, session))
        steps = len(reading.texts) - 1
        if self.gone is not None and steps >= self.gone:
            raise EngineUnavailableError("the router was told to be gone")
        if self.dropped is not None and steps >= self.dropped:
            raise UnknownRouterError(f"router version {version} was told to be let go")
        if self.hangs:
            await asyncio.Event().wait()
        share = self.large(reading)
        tokens = [len(text) + 1 for text in reading.texts]
        last = tokens[-1] if steps else 0
        return Opinion((math.log(1 - share), math.log(share)), version, sum(tokens), last, ROUTER_FLOPS)


def make_engines(**options: Any) -> tuple[ScriptedEngine, ScriptedEngine]:
    """Small and large, alike but for their size."""
    return ScriptedEngine("small", **options), ScriptedEngine("large", parameters=100, **options)


def make_calibration(version: int = 7, pool: tuple[str, ...] = ("small", "large")) -> Calibration:
    """Three points, as if measured."""

    def near(value: float) -> Interval:
        return Interval(value, value - 0.01, value + 0.01)

    rows = [(0.05, 0.8, 0.95, 0.01, 1.1), (0.3, 0.4, 0.93, 0.03, 0.7), (2.0, 0.05, 0.6, 0.36, 0.2)]
    points = tuple(OperatingPoint(weight, *map(near, row)) for weight, *row in rows)
    return Calibration(pool, ("small", "large"), version, 100, 0.95, points, near(0.96), near(0.55))


@dataclass
class Served:
    """A service and whatever is below and around it."""

    app: FastAPI
    service: RoutingService
    routers: Any
    metrics: MemoryMetrics
    log_path: Path | None = None
    engines: tuple[Any, ...] = field(default_factory=tuple)

    @property
    def active(self) -> int:
        """Steps being written now."""
        return sum(engine.active for engine in self.engines)

    def log(self) -> list[dict[str, Any]]:
        """The access log's lines."""
        assert self.log_path is not None
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]


def make_served(
    engines: Sequence[Any] | None = None,
    routers: Routers | None = None,
    options: ServiceOptions | None = None,
    api: ApiOptions | None = None,
    log_path: Path | None = None,
    metrics: MemoryMetrics | None = None,
    **more: Any,
) -> Served:
    """A service on scripted engines and routers, unless others are given; `more` goes to the service."""
    pool = EnginePool(engines or make_engines())
    routers = routers or ScriptedRouters()
    metrics = metrics or MemoryMetrics(pool.names)
    service = RoutingService(LocalBackend(pool, routers), options or ServiceOptions(), metrics, **more)
    app = make_api(service, api or ApiOptions(), AccessLog(log_path) if log_path else None)
    return Served(app, service, routers, metrics, log_path, pool.engines)


async def wait_until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    """Poll until something is true; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(served: Served, loaded: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app in this process, once the models are loaded."""
    transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
    served.service.start()
    try:
        if loaded:
            await wait_until(lambda: bool(served.service.model_names()))
        async with httpx.AsyncClient(transport=transport, base_url="http://roro.test") as client:
            yield client
    finally:
        await served.service.close()


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """The app under uvicorn in a thread of its own; its URL, once it takes requests."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True  # whoever is still connected has been tested
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


@contextlib.contextmanager
def serving(served: Served) -> Iterator[str]:
    """The service on loopback, once its models are loaded."""
    with listening(served.app) as url:
        with httpx.Client(base_url=url) as client:
            for _ in range(600):
                if client.get("/v1/models").status_code != 503:
                    break
                threading.Event().wait(0.05)
        yield url


def ask(text: str = "Say q.", model: str = "auto", **fields: Any) -> dict[str, Any]:
    """A request body."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def read_stream(body: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    events = read_events(body)
    assert events[-1] == "[DONE]", events[-1]
    return [json.loads(event) for event in events[:-1]]


def read_events(body: str) -> list[str]:
    """The data of each server-sent event."""
    assert body.endswith("\n\n")
    events = body[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events), events
    return [event.removeprefix("data: ") for event in events]


def join_content(chunks: Sequence[dict[str, Any]], choice: int = 0) -> str:
    """The content of one choice of a stream."""
    return "".join(
        each["delta"].get("content", "") for chunk in chunks for each in chunk["choices"] if each["index"] == choice
    )


def events_of(chunks: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The routing events of one kind."""
    found = [chunk["routing"] for chunk in chunks if chunk.get("routing", {}).get("event") == name]
    return [{key: value for key, value in event.items() if key != "event"} for event in found]


def check_error(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an error that is exactly what it should be."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    error = body["error"]
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["message"] and "Traceback" not in response.text and ".py" not in response.text
    return error["message"]
