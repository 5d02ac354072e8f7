"""The HTTP API: OpenAI's routes, the routing extension, and the playground. It knows no Ray.

Request bodies are read raw and checked by `serve.schema`, so that whatever a client sends ends in the envelope of
`serve.problems`; the OpenAPI document is written by hand beside the checks and tested against them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response

from serve.access_log import AccessLog
from serve.answers import EventStream, client_left, complete_answer, stream_answer, until_gone
from serve.auth import ApiKey
from serve.body import read_body
from serve.checks import HealthCheck, explain
from serve.controls import list_models
from serve.document import make_document
from serve.facts import RequestFacts
from serve.middleware import Guard, Watch
from serve.openapi_responses import (
    chat_responses,
    error_responses,
    explain_responses,
    health_schema,
    info_schema,
    json_response,
    model_schema,
    models_schema,
)
from serve.problems import deadline, install_handlers, model_not_found
from serve.schema import Limits, parse_chat_request, parse_explain_request
from serve.service import RoutingService

_PAGE = Path(__file__).with_name("playground.html")
_VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What the HTTP layer needs beside the service.

    `examples` are queries for the playground; `tells_id` is false where a proxy tells the request's id itself.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Sequence[ApiKey] = ()
    cors_origins: Sequence[str] = ()
    playground: bool = True
    examples: Sequence[str] = ()
    tells_id: bool = True


def make_api(service: RoutingService, options: ApiOptions, log: AccessLog | None = None) -> FastAPI:
    """The ASGI application."""

    @contextlib.asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="roro_ray",
        version=_VERSION,
        lifespan=live,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect names the host that the client claims, and is no answer in the envelope
    )
    install_handlers(app)
    _add_answers(app, service, options)
    _add_facts(app, service, options)
    app.add_middleware(Guard, keys=tuple(options.keys))
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Watch, metrics=service.metrics, log=log, tells_id=options.tells_id)
    return app


def _add_answers(app: FastAPI, service: RoutingService, options: ApiOptions) -> None:
    @app.post("/v1/chat/completions", responses=chat_responses())
    async def complete(request: Request) -> Response:
        facts = _facts(request)
        body = await _read_body(request, options.limits.max_body_bytes, service.options.timeout_s)
        asked = parse_chat_request(body, request.headers, options.limits)
        facts.model, facts.stream, facts.user = asked.model, asked.stream, asked.user or asked.safety_identifier or ""
        if not asked.stream:
            return JSONResponse(await until_gone(request, complete_answer(service, asked, facts)))
        # Entered here, so that a request that cannot start is an error response and not a broken stream.
        stack = contextlib.AsyncExitStack()
        answer = await until_gone(request, stack.enter_async_context(service.answer(asked, facts)))
        return EventStream(stream_answer(service, answer), stack, facts)

    @app.post("/v1/routing/explain", responses=explain_responses())
    async def explain_routing(request: Request) -> Response:
        facts = _facts(request)
        body = await _read_body(request, options.limits.max_body_bytes, service.options.timeout_s)
        asked = parse_explain_request(body, request.headers, options.limits)
        facts.model = asked.chat.model
        return JSONResponse(await until_gone(request, explain(service, asked, facts)))


def _add_facts(app: FastAPI, service: RoutingService, options: ApiOptions) -> None:
    guarded = error_responses(401, 500, 503)

    @app.get("/v1/models", responses={200: json_response("What can be asked for.", models_schema()), **guarded})
    async def models() -> Response:
        pool, routers = service.loaded()
        return JSONResponse({"object": "list", "data": [_model(name) for name in list_models(routers, pool)]})

    one = json_response("One model.", model_schema())

    @app.get("/v1/models/{id}", responses={200: one, **guarded, **error_responses(404)})
    async def model(id: str) -> Response:
        pool, routers = service.loaded()
        names = list_models(routers, pool)
        if id not in names:
            raise model_not_found(id, names)
        return JSONResponse(_model(id))

    @app.get("/v1/routing/info", responses={200: json_response("What is served.", info_schema()), **guarded})
    async def info() -> Response:
        return JSONResponse(_make_info(service, options))

    health_check = HealthCheck(service)

    @app.get(
        "/healthz",
        responses={
            200: json_response("Every model answers.", health_schema()),
            503: json_response("Not every model answers.", health_schema()),
        },
    )
    async def health() -> Response:
        status, found = await health_check.check()
        return JSONResponse(found, status)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(make_document(app, options.limits, service.model_names(), service.pool_names()))

    if options.playground:

        @app.get("/", include_in_schema=False)
        async def playground() -> Response:
            return HTMLResponse(await asyncio.to_thread(_PAGE.read_text, "utf-8"))


def _facts(request: Request) -> RequestFacts:
    facts: RequestFacts = request.state.facts
    return facts


async def _read_body(request: Request, most: int, timeout_s: float) -> bytes:
    """The body, refused where it is too long, or too long in coming."""
    try:
        async with asyncio.timeout(timeout_s):
            return await read_body(request.stream(), request.headers, most)
    except ClientDisconnect:
        raise client_left() from None
    except TimeoutError:
        raise deadline(timeout_s) from None


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "roro_ray"}


def _make_info(service: RoutingService, options: ApiOptions) -> dict[str, Any]:
    pool, routers = service.loaded()
    default = routers.find(routers.default)
    calibration = default.calibration if default is not None else None
    points = [] if calibration is None else calibration.points
    return {
        "models": [
            {"name": name, "parameters": facts.parameters, "flops_per_token": facts.flops_per_token}
            for name, facts in zip(pool.names, pool.facts, strict=True)
        ],
        "routers": [facts.name for facts in routers.routers],
        "default": default.name if default is not None else None,
        "cost_weight": service.weight_range(),
        "calibration": None
        if calibration is None
        else {
            "queries": calibration.queries,
            "confidence": calibration.confidence,
            "points": [
                {
                    "cost_weight": point.cost_weight,
                    **{
                        name: [getattr(point, name).value, getattr(point, name).low, getattr(point, name).high]
                        for name in ("large_share", "accuracy", "accuracy_gap", "flops_ratio")
                    },
                }
                for point in points
            ],
        },
        "limits": {
            "max_completion_tokens": options.limits.max_completion_tokens,
            "max_choices": options.limits.max_choices,
            "max_text_chars": options.limits.max_text_chars,
            "timeout_s": service.options.timeout_s,
        },
        "examples": list(options.examples),
        "needs_key": bool(options.keys),
    }

