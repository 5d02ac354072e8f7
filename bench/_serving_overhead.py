"""What routing over HTTP adds to the models' own time: the same steps by three ways, taking turns.

*served*: requests to the HTTP API with model=auto. *handles*: each request's steps asked of the model deployments'
Serve handles one after the other, with the prefixes that the served answers had. *in process*: the same of engines in
this process, without Ray. The ratio served/handles is what the API and the router cost beside Ray Serve itself.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._serving_client import Client, Reply, run_lanes
from bench._serving_host import ProcessorClock
from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import StepRequest
from roro_ray.routing.observation import FEATURE_NAMES
from roro_ray.routing.opinion import RouterReading
from roro_ray.world.tasks import SUITES, make_queries
from serve.backend import Routers

SERVED, HANDLES, LOCAL = "served", "handles", "in_process"
_SEED = 7  # of the queries, so that they are none of those shown elsewhere


@dataclass(frozen=True, slots=True)
class Recorded:
    """A query and its plain answer: which model wrote each step, and what."""

    text: str
    steps: tuple[tuple[str, str], ...]
    answer: str
    tokens: int

    def requests(self, episode: EpisodeConfig, seed: int) -> list[tuple[str, StepRequest]]:
        """What each step asked of its model. `seed` keeps the engines from taking two requests for one."""
        prefix, found = self.text + STEP_DELIMITER, []
        for model, text in self.steps:
            found.append((model, StepRequest(prefix, episode.max_step_tokens, episode.temperature, seed)))
            prefix += text + STEP_DELIMITER
        return found

    def readings(self) -> list[RouterReading]:
        """What the router reads before each step; the signals do not change how long it takes."""
        texts = [self.text, *(text for _, text in self.steps)]
        return [RouterReading(tuple(texts[: i + 1]), (0.0,) * len(FEATURE_NAMES)) for i in range(len(self.steps))]


async def record(client: Client, count: int, lanes: int = 8) -> list[Recorded]:
    """Plain answers to different queries over all suites, so many at a time.

    Raises:
        AssertionError: one was not answered.
    """
    each = -(-count // len(SUITES))
    suites = [make_queries(suite, "test", each, _SEED) for suite in SUITES]
    queries = [query for group in zip(*suites, strict=True) for query in group]

    async def ask(query: Any) -> Recorded:
        reply = await client.ask(query.text, routing={"trace": True})
        assert reply.status == 200 and reply.body is not None, f"{query.text!r}: {reply.status} {reply.body}"
        steps = tuple((step["model"], step["text"]) for step in reply.body["routing"]["trace"])
        return Recorded(query.text, steps, reply.text, reply.body["usage"]["completion_tokens"])

    return (await run_lanes(queries[:count], lanes, ask))[1]


@dataclass(slots=True)
class Overhead:
    """Measures the three ways on one deployment.

    Args:
        handles: of the models' deployments by name.
        router: as the ingress asks it.
        log: the ingress's access log files are beside this path.
        other_steps: steps that came out otherwise than they were recorded.
    """

    client: Client
    handles: dict[str, Any]
    router: Routers
    local: EnginePool
    episode: EpisodeConfig
    log: Path
    router_version: int
    other_steps: int = 0

    async def compare(self, recorded: Sequence[Recorded], lanes: int, rounds: int) -> dict[str, Any]:
        """Medians over rounds of all ways at one concurrency, their ratios, and processor time by process."""
        items = list(enumerate(recorded))
        ways: dict[str, Callable[[tuple[int, Recorded]], Awaitable[Any]]] = {
            HANDLES: self._by_handles,
            SERVED: self._by_http,
            LOCAL: self._by_engines,
        }
        clock = ProcessorClock()
        walls: dict[str, list[float]] = {way: [] for way in ways}
        spent: dict[str, dict[str, float]] = {way: {} for way in ways}
        for turn in range(rounds):
            order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
            for way in order:
                with clock.spent(spent[way]):
                    walls[way].append((await run_lanes(items, lanes, ways[way]))[0])
        ratios = {way: [a / b for a, b in zip(walls[SERVED], walls[way], strict=True)] for way in (HANDLES, LOCAL)}
        processor = {way: _per_request(spent[way], rounds * len(items)) for way in ways}
        return {
            "concurrency": lanes,
            "requests": len(items),
            "rounds": rounds,
            "ms_per_request": {way: _round(1e3 * statistics.median(walls[way]) / len(items)) for way in ways},
            "ratio": {f"{SERVED}/{way}": _round(statistics.median(found), 3) for way, found in ratios.items()},
            "ratio_by_round": [_round(ratio, 3) for ratio in ratios[HANDLES]],
            "cpu_ms_per_request": processor,
            "cpu_ratio": _round(sum(processor[SERVED].values()) / max(sum(processor[HANDLES].values()), 1e-9), 3),
        }

    async def break_down(self, recorded: Sequence[Recorded]) -> dict[str, float]:
        """Where the milliseconds of one request at a time go; means over requests.

        `http` is what the client waits beyond the ingress's own time (connection, Serve's proxy, both ways); the
        router's and the engines' part is measured by asking their handles for the same; `rest` is the ingress.
        """
        items = list(enumerate(recorded))
        skip = len(self._read_log())
        _, replies = await run_lanes(items, 1, self._traced)
        inside = [line["duration_ms"] for line in self._read_log()[skip:]]
        assert len(inside) == len(items), f"{len(inside)} lines in the access log for {len(items)} requests"
        steps = [sum(step["milliseconds"] for step in _trace(reply)) for reply in replies]
        walls = {
            name: 1e3 * (await run_lanes(items, 1, work))[0] / len(items)
            for name, work in (("h", self._by_handles), ("l", self._by_engines), ("r", self._by_router))
        }
        client, server, step = 1e3 * _mean([reply.seconds for reply in replies]), _mean(inside), _mean(steps)
        parts = {
            "total": client,
            "http": client - server,
            "router_decisions": walls["r"],
            "engine": walls["l"],
            "engine_handles": walls["h"] - walls["l"],
            "rest": server - walls["r"] - walls["h"],
            "steps_by_trace": step,
            "steps_per_request": _mean([len(each.steps) for each in recorded]),
        }
        return {name: _round(value) for name, value in parts.items()}

    async def _by_http(self, item: tuple[int, Recorded]) -> None:
        reply = await self.client.ask(item[1].text)
        assert reply.status == 200, f"{item[1].text!r}: {reply.status} {reply.body}"

    async def _traced(self, item: tuple[int, Recorded]) -> Reply:
        reply = await self.client.ask(item[1].text, routing={"trace": True})
        assert reply.status == 200, f"{item[1].text!r}: {reply.status} {reply.body}"
        return reply

    async def _by_handles(self, item: tuple[int, Recorded]) -> None:
        place, each = item
        for (model, request), (_, text) in zip(each.requests(self.episode, place), each.steps, strict=True):
            handle = self.handles[model].options(method_name="generate_step", session_id=str(place))
            self.other_steps += (await handle.remote(request)).text != text

    async def _by_engines(self, item: tuple[int, Recorded]) -> None:
        place, each = item
        engines = dict(zip(self.local.names, self.local.engines, strict=True))
        for (model, request), (_, text) in zip(each.requests(self.episode, place), each.steps, strict=True):
            self.other_steps += (await engines[model].generate_step(request)).text != text

    async def _by_router(self, item: tuple[int, Recorded]) -> None:
        await self.decide(item[1].readings(), str(item[0]))

    async def decide(self, readings: Sequence[RouterReading], session: str) -> None:
        """Ask the router's deployment for each opinion, one after the other."""
        for reading in readings:
            await self.router.judge_reading(self.router_version, reading, session)

    def _read_log(self) -> list[dict[str, Any]]:
        files = self.log.parent.glob(f"{self.log.stem}-*{self.log.suffix}")
        newest = max(files, key=lambda file: file.stat().st_mtime)
        lines = [json.loads(line) for line in newest.read_text().splitlines()]
        return [line for line in lines if line["endpoint"] == "/v1/chat/completions"]


def _trace(reply: Reply) -> list[dict[str, Any]]:
    assert reply.body is not None
    steps: list[dict[str, Any]] = reply.body["routing"]["trace"]
    return steps


def _per_request(spent: dict[str, float], requests: int) -> dict[str, float]:
    return {role: _round(1e3 * seconds / requests) for role, seconds in spent.items()}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _round(value: float, digits: int = 2) -> float:
    return round(value, digits)
