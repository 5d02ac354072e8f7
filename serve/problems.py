"""Errors as clients see them: one exception with a status, always sent in OpenAI's envelope.

Clients of the OpenAI schema read `{"error": {"message", "type", "param", "code"}}` and nothing else, so every way in
which a request can fail ends here: our own `ApiError`, the framework's 404, 405 and 422 (sent as 400, for which the
clients have a class), and any unexpected exception, whose traceback stays in the server's log beside a request id.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from roro_ray.errors import EngineError, QueueFullError, RoroError, did_you_mean
from serve.access_log import make_request_id

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
REQUEST_ID_HEADER = "x-request-id"


class ApiError(RoroError):
    """A request that cannot be answered, as the client is told: status, envelope fields, headers.

    `param` is the path of the field at fault (`messages[0].content`), a header's name, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; an exception would otherwise be rebuilt from its message alone.
        return ApiError, (self.status, self.message, self.type, self.param, self.code, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request says something that cannot be done."""
    return ApiError(400, message, param=param, code=code)


def unauthorised() -> ApiError:
    """401: no key or a wrong one. The same words for both, and never the key itself."""
    message = "Missing or incorrect API key. Send the header 'Authorization: Bearer KEY' with a key of this server."
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, "authentication_error", None, "invalid_api_key", headers)


def model_not_found(name: str, known: Sequence[str]) -> ApiError:
    """404: no router and no model is called so."""
    hint = did_you_mean(name, known)
    message = f"Unknown model {name[:128]!r}{hint}. Models of this server: {', '.join(known)} (see GET /v1/models)."
    return ApiError(404, message, "not_found_error", "model", "model_not_found")


def too_large(limit_bytes: int) -> ApiError:
    """413: the body has more bytes than this server reads."""
    message = f"The request's body is larger than the {limit_bytes} bytes that this server reads. Send a shorter one."
    return ApiError(413, message, code=_CODES[413])


def unsupported_media(message: str, header: str) -> ApiError:
    """415: the body is not JSON in UTF-8, or says that it is not."""
    return ApiError(415, message, param=header, code=_CODES[415])


def too_many(retry_after_s: float) -> ApiError:
    """429: the queue is full."""
    headers = _retry_after(retry_after_s)
    message = f"This server is full. Try again in {headers['Retry-After']} s."
    return ApiError(429, message, "rate_limit_error", None, "rate_limit_exceeded", headers)


def loading(retry_after_s: float) -> ApiError:
    """503: models are still loading."""
    headers = _retry_after(retry_after_s)
    message = f"The models are still loading. Try again in {headers['Retry-After']} s."
    return ApiError(503, message, "server_error", None, "loading", headers)


def deadline(timeout_s: float) -> ApiError:
    """504: the request did not finish in its time."""
    message = f"The request did not finish within its {timeout_s:g} s. Ask for less (max_tokens, n) or try again."
    return ApiError(504, message, "timeout", None, "deadline_exceeded")


def unavailable(message: str, retry_after_s: float = 1.0) -> ApiError:
    """503: no model that could answer can be reached."""
    return ApiError(503, message, "server_error", None, "unavailable", _retry_after(retry_after_s))


def internal(request_id: str | None = None) -> ApiError:
    """500: our fault. Tells the request id under which the server's log has the traceback."""
    where = f" (request id {request_id})" if request_id else ""
    message = f"The server failed on this request{where}. Its log says why."
    return ApiError(500, message, "server_error", None, "internal_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def envelope(error: ApiError) -> dict[str, Any]:
    """The body of an error response."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def to_api_error(error: BaseException, request_id: str | None = None) -> ApiError:
    """What a client is told of an exception; only errors made for clients tell their own words.

    An `EngineError` is a 503: another replica or a later moment may do better. What is not known is a 500.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return too_many(1.0)
    if isinstance(error, TimeoutError):  # DeadlineError is one
        message = "A model did not answer in time. Ask for less (max_tokens, n) or try again."
        return ApiError(504, message, "timeout", None, "deadline_exceeded")
    if isinstance(error, EngineError):
        return unavailable("No model could write the next step. Try again.")
    return internal(request_id)


def request_id_of(request: Request) -> str:
    """The request's id: the one that the middleware gave it (`request.state.request_id`), else a new one."""
    known = getattr(request.state, "request_id", None)
    return known if isinstance(known, str) else make_request_id(None)


def error_response(error: ApiError, request_id: str | None = None) -> JSONResponse:
    """The HTTP response of an error."""
    headers = dict(error.headers)
    if request_id:
        headers[REQUEST_ID_HEADER] = request_id
    return JSONResponse(envelope(error), error.status, headers)


def from_http_exception(error: HTTPException, path: str = "") -> ApiError:
    """The framework's own errors (unknown route, wrong method) in our envelope; headers such as Allow are kept."""
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = f"Unknown URL {path[:200]!r}. GET /openapi.json lists the routes of this server."
    elif error.status_code == 405:
        message = f"This method is not allowed here; {path[:200]!r} takes {headers.get('Allow', 'another one')}."
    else:
        message = str(error.detail)
    fallback = "server_error" if error.status_code >= 500 else "invalid_request_error"
    kind = _TYPES.get(error.status_code, fallback)
    return ApiError(error.status_code, message, kind, None, _CODES.get(error.status_code), headers)


def from_validation_error(error: RequestValidationError) -> ApiError:
    """FastAPI's 422 as a 400 on the first field at fault; what was sent is not repeated."""
    problems = error.errors()
    if not problems:
        return bad_request("The request is not valid.")
    first = problems[0]
    param = make_param(first.get("loc", ()))
    message = f"{param}: {first.get('msg', 'not valid')}." if param else f"{first.get('msg', 'not valid')}."
    return bad_request(message, param)


def make_param(location: tuple[int | str, ...]) -> str | None:
    """A pydantic location as a path: `("body", "messages", 0, "role")` is `messages[0].role`."""
    parts = location[1:] if location and location[0] in {"body", "query", "path", "header", "cookie"} else location
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path or None


def install_handlers(app: FastAPI) -> None:
    """Make every error of an app leave in the envelope."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        request_id = request_id_of(request)
        if isinstance(error, HTTPException):
            told = from_http_exception(error, request.url.path)
        elif isinstance(error, RequestValidationError):
            told = from_validation_error(error)
        else:
            told = to_api_error(error, request_id)
            if told.status == 500 and not isinstance(error, ApiError):
                logger.error("request %s failed", request_id, exc_info=error)
        facts = getattr(request.state, "facts", None)
        if facts is not None:
            facts.error = told.code
        return error_response(told, request_id)

    for kind in (RoroError, TimeoutError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, on_error)
