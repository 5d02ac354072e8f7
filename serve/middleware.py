"""Around every request: its id, its key, its line in the access log and its counts; and no page of another site.

Written as plain ASGI, since the framework's own middleware class reads streams through a buffer and hides from a
handler that its client has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access_log import AccessLog, make_request_id
from serve.auth import ApiKey, authenticate
from serve.facts import RequestFacts
from serve.metrics import Metrics
from serve.problems import REQUEST_ID_HEADER, ApiError, error_response, internal

logger = logging.getLogger(__name__)

LEFT = 499  # the status in our log of a client that left before the end
_GUARDED = "/v1/"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": _POLICY,
    "cache-control": "no-store",
}


@dataclass
class Watch:
    """The outermost middleware.

    Args:
        log: None keeps no access log.
        tells_id: whether to answer with the request's id; Serve's proxy does so itself.
    """

    app: ASGIApp
    metrics: Metrics
    log: AccessLog | None
    tells_id: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = scope.get("client")
        facts = RequestFacts(
            request_id=make_request_id(headers.get(REQUEST_ID_HEADER)),
            endpoint=scope["path"],
            client=client[0] if client else "",
            status=LEFT,
        )
        scope.setdefault("state", {})
        scope["state"]["facts"], scope["state"]["request_id"] = facts, facts.request_id
        began, started = time.perf_counter(), False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                facts.status = message["status"]
                shown = MutableHeaders(scope=message)
                if self.tells_id:
                    shown[REQUEST_ID_HEADER] = facts.request_id
                elif REQUEST_ID_HEADER in shown:
                    del shown[REQUEST_ID_HEADER]
                for name, value in _HEADERS.items():
                    shown.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except asyncio.CancelledError:
            facts.status, facts.error = LEFT, "client_left"
            raise
        except Exception as error:
            # The last border: whatever nobody foresaw is a 500 like any other, with its id and its counts.
            logger.error("request %s failed", facts.request_id, exc_info=error)
            told = internal(facts.request_id)
            facts.error = told.code
            if started:
                raise  # the server cuts the connection, so that half an answer is not taken for a whole one
            await error_response(told, facts.request_id)(scope, receive, answer)
        finally:
            facts.duration_ms = 1000 * (time.perf_counter() - began)
            route = scope.get("route")
            facts.endpoint = getattr(route, "path", facts.endpoint)
            self.metrics.observe_request(facts)
            if self.log is not None:
                self.log.write(facts)


@dataclass
class Guard:
    """Lets a request in with a key; the middleware next to the app, so that a refusal is an answer like any other.

    Args:
        keys: keys that open `/v1/`; none: it is open.
    """

    app: ASGIApp
    keys: Sequence[ApiKey]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_GUARDED):
            facts: RequestFacts = scope["state"]["facts"]
            try:
                facts.key_name = authenticate(Headers(scope=scope).get("authorization"), self.keys)
            except ApiError as error:
                facts.error = error.code
                await error_response(error, facts.request_id)(scope, receive, send)
                return
        await self.app(scope, receive, send)
