"""Two questions that generate no answer: is every model alive, and how would a step be routed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import StepRequest
from roro_ray.errors import RoroError
from roro_ray.routing.observation import FEATURE_NAMES, make_features
from roro_ray.routing.opinion import Opinion, RouterReading, decide_priced
from roro_ray.types import Decision, Peek, Step, Usage
from serve.backend import RouterFacts, UnknownRouterError
from serve.continuation import find_beginning
from serve.facts import RequestFacts
from serve.policies import cap_decision
from serve.problems import bad_request, deadline, unavailable
from serve.schema import ExplainRequest, GivenStep
from serve.service import RoutingService

_HEALTH_S = 5.0
_HEALTH_TEXT = "Hello."


Found = tuple[int, dict[str, Any]]


class HealthCheck:
    """Shares one check among all who ask while it runs: it needs no key, so it must not be a way to load the models."""

    def __init__(self, service: RoutingService) -> None:
        self._service = service
        self._running: asyncio.Task[Found] | None = None

    async def check(self) -> Found:
        """HTTP status and what was found."""
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(check_health(self._service))
        return await asyncio.shield(self._running)


async def check_health(service: RoutingService) -> Found:
    """One tiny route through every model and the router: HTTP status and what was found; raises nothing."""
    try:
        pool, routers = service.loaded()
    except RoroError as error:
        return 503, {"status": "loading", "message": str(error), "models": {}, "router": None}
    session = f"health-{time.monotonic_ns()}"
    request = StepRequest(_HEALTH_TEXT + STEP_DELIMITER, 1)
    reading = RouterReading((_HEALTH_TEXT,), make_features((), 0.0, pool.size))
    checks = [_probe(engine.generate_step(request)) for engine in service.backend.pool(session).engines]
    router = _probe(service.backend.routers.judge_reading(routers.default, reading, session))
    *models, decided = await asyncio.gather(*checks, router)
    ok = decided["ok"] and all(model["ok"] for model in models)
    found = {
        "status": "ok" if ok else "unavailable",
        "models": dict(zip(pool.names, models, strict=True)),
        "router": {"version": routers.default, **decided},
    }
    return (200 if ok else 503), found


async def _probe(work: Awaitable[Any]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        await asyncio.wait_for(work, _HEALTH_S)
    except Exception as error:  # whatever it is, the answer is that this part does not work
        return {"ok": False, "error": type(error).__name__}
    return {"ok": True, "milliseconds": round(1000 * (time.perf_counter() - began), 3)}


async def explain(service: RoutingService, asked: ExplainRequest, facts: RequestFacts) -> dict[str, Any]:
    """What the router decides before each of the given steps and after the last, without generating anything.

    Raises:
        ApiError: a single model was asked for, the router peeks at text that would have to be generated, or a given
            step lacks what the router looks at; 429 where the server is full, 503 and 504 as for an answer.
    """
    try:
        async with asyncio.timeout(service.options.timeout_s), service.admission.enter(1):
            return await _explain(service, asked, facts)
    except TimeoutError:
        raise deadline(service.options.timeout_s) from None
    except UnknownRouterError:
        raise unavailable("This version of the router was let go just now. Try again.") from None


async def _explain(service: RoutingService, asked: ExplainRequest, facts: RequestFacts) -> dict[str, Any]:
    route, text = service.plan(asked.chat)
    pool, _ = service.loaded()
    if route.facts is None:
        raise bad_request(f"model {route.name!r} is a single model: nothing is decided. Ask for 'auto'.", "model")
    if route.facts.peek != Peek.NONE:
        raise bad_request(
            f"{route.name} looks at the {route.facts.peek.value.replace('_', ' ')} of the cheapest model before it "
            "decides, so its decisions are known only while an answer is generated: use routing.trace there",
            "model",
        )
    facts.router_version = route.version
    begun = find_beginning(asked.chat).steps
    steps = [*begun, *(_read_step(step, index, pool) for index, step in enumerate(asked.steps))]
    places = range(len(begun), len(steps) + 1)
    opinions = [await _ask(service, route.facts, text, steps[:index], route.cost_weight, pool) for index in places]
    most = route.max_large_steps
    decisions = [
        cap_decision(decide_priced(opinion, route.cost_weight), steps[:index], most)
        for index, opinion in zip(places, opinions, strict=True)
    ]
    weights = [] if route.facts.calibration is None else [p.cost_weight for p in route.facts.calibration.points]
    last = [await _ask(service, route.facts, text, steps, weight, pool) for weight in weights]
    swept = [
        cap_decision(decide_priced(opinion, weight), steps, most) for opinion, weight in zip(last, weights, strict=True)
    ]
    return {
        "router": route.name,
        "router_version": route.version,
        "decisions": [
            {"index": index, "cost_weight": route.cost_weight, **_show(decision, pool)}
            for index, decision in zip(places, decisions, strict=True)
        ],
        "by_cost_weight": [
            {"cost_weight": weight, **_show(decision, pool)} for weight, decision in zip(weights, swept, strict=True)
        ],
    }


async def _ask(
    service: RoutingService, facts: RouterFacts, text: str, steps: Sequence[Step], weight: float, pool: EnginePool
) -> Opinion:
    features = make_features(steps, weight, pool.size, max_steps=service.options.episode.max_steps)
    reading = RouterReading((text, *(step.text for step in steps)), features)
    assert len(reading.features) == len(FEATURE_NAMES)
    return await service.backend.routers.judge_reading(facts.version, reading, "explain")


def _read_step(given: GivenStep, index: int, pool: EnginePool) -> Step:
    where = f"steps[{index}]"
    if given.model not in pool.names:
        raise bad_request(
            f"{where}.model is {given.model!r}: expected a model of the pool, one of {', '.join(pool.names)}",
            f"{where}.model",
        )
    for name in ("confidence", "confidence_min"):
        if getattr(given, name) is None:
            raise bad_request(
                f"{where}.{name} is missing, and the router looks at it: give the steps as routing.trace told them",
                f"{where}.{name}",
            )
    assert given.confidence is not None and given.confidence_min is not None  # checked above
    nothing = Decision(pool.names.index(given.model), 0.0, ())
    return Step(
        pool.names.index(given.model),
        given.text,
        given.tokens or 0,
        given.confidence,
        given.confidence_min,
        "delimiter",
        nothing,
        Usage(),
    )


def _show(decision: Decision, pool: EnginePool) -> dict[str, Any]:
    return {
        "model": pool.names[decision.model],
        "probabilities": dict(zip(pool.names, decision.probabilities, strict=True)),
    }
