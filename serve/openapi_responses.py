"""The response side of the OpenAPI document: JSON Schemas of what the routes send, errors included."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_THOUGHTS: Schema = {"type": "string", "description": "What a thinking model wrote before its answer."}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_FLAG: Schema = {"type": "boolean"}
_SHARES: Schema = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
_FINISH: Schema = {"enum": ["stop", "length"]}

# What each error status means, for the document; every one has the envelope as its body.
ERRORS: dict[int, str] = {
    400: "The request says something that cannot be done; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not said to be JSON in UTF-8.",
    429: "The server is full; see Retry-After.",
    500: "The server failed; its log has the reason under the request id.",
    503: "The models are loading or cannot be reached; see Retry-After.",
    504: "The request did not finish in its time.",
}
_RETRY = frozenset({429, 503})


def error_schema() -> Schema:
    """The envelope of every error."""
    error = {"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT}
    return _object({"error": _object(error, closed=True)}, closed=True)


def error_responses(*statuses: int) -> dict[int | str, Schema]:
    """FastAPI's `responses` for these error statuses (all of `ERRORS` without arguments)."""
    return {status: _error_response(status) for status in statuses or ERRORS}


def json_response(description: str, schema: Schema) -> Schema:
    """A response whose body is JSON."""
    return _response(description, {"application/json": {"schema": schema}})


def chat_responses() -> dict[int | str, Schema]:
    """FastAPI's `responses` for POST /v1/chat/completions."""
    content = {
        "application/json": {"schema": completion_schema()},
        "text/event-stream": {"itemSchema": _server_sent_event()},
    }
    return {200: _response("The answer, or its stream.", content), **error_responses()}


def _server_sent_event() -> Schema:
    """One event of a stream, as OpenAPI 3.2 describes it; tools that know only 3.1 pass over `itemSchema`."""
    told = {"anyOf": [chunk_schema(), error_schema()]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": told}
    return _object({"data": {"anyOf": [{"const": "[DONE]"}, data]}})


def explain_responses() -> dict[int | str, Schema]:
    """FastAPI's `responses` for POST /v1/routing/explain."""
    return {200: json_response("What the router would decide.", explain_schema()), **error_responses()}


def completion_schema() -> Schema:
    """A chat.completion with its routing."""
    message = _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}})
    message["properties"]["reasoning_content"] = _THOUGHTS  # of models that think only
    choice = {"index": _COUNT, "message": message, "logprobs": {"type": "null"}, "finish_reason": _FINISH}
    return _object(
        {
            **_head("chat.completion"),
            "choices": {"type": "array", "items": _object(choice), "minItems": 1},
            "usage": usage_schema(),
            "routing": routing_schema(),
        }
    )


def chunk_schema() -> Schema:
    """A chat.completion.chunk; `usage` and `routing` only where they were asked for."""
    delta = {
        "type": "object",
        "properties": {"role": {"const": "assistant"}, "content": _TEXT, "reasoning_content": _THOUGHTS},
    }
    finish = {"enum": ["stop", "length", None]}
    choice = _object({"index": _COUNT, "delta": delta, "logprobs": {"type": "null"}, "finish_reason": finish})
    schema = _object({**_head("chat.completion.chunk"), "choices": {"type": "array", "items": choice}})
    start = {**_decision(), "event": {"const": "step_start"}, "degraded": _FLAG}
    events = [_object(start), _event("step_end", step_schema()), _event("summary", routing_schema())]
    schema["properties"] |= {
        "usage": {"anyOf": [{"type": "null"}, usage_schema()]},
        "routing": {"oneOf": events},
    }
    return schema


def usage_schema() -> Schema:
    """Tokens of every model touched."""
    return _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})


def routing_schema() -> Schema:
    """Who wrote the answer and what it cost."""
    schema = _object(
        {
            "router": _MAYBE_TEXT,
            "router_version": {"type": "integer"},
            "cost_weight": _MAYBE_NUMBER,
            "steps": {"type": "object", "additionalProperties": _COUNT},
            "large_share": _MAYBE_NUMBER,
            "flops": _MAYBE_NUMBER,
            "flops_large_only": _MAYBE_NUMBER,
            "flops_saved": _MAYBE_NUMBER,
            "degraded": _FLAG,
            "ends": {"type": "array", "items": _TEXT},
        }
    )
    schema["properties"]["trace"] = {"type": "array", "items": step_schema()}
    return schema


def step_schema() -> Schema:
    """One step of the trace."""
    measured = dict.fromkeys(("confidence", "confidence_min", "flops", "milliseconds"), _MAYBE_NUMBER)
    counted = {"tokens": _COUNT, "discarded": _COUNT}
    return _object({**_decision(), "text": _TEXT, **counted, **measured, "degraded": _FLAG, "capped": _FLAG})


def explain_schema() -> Schema:
    """Decisions at the request's cost weight, and over the range of weights."""
    choice = {"cost_weight": _MAYBE_NUMBER, "model": _TEXT, "probabilities": _SHARES}
    return _object(
        {
            "router": _MAYBE_TEXT,
            "router_version": {"type": "integer"},
            "decisions": {"type": "array", "items": _object({"index": _COUNT, **choice})},
            "by_cost_weight": {"type": "array", "items": _object(choice)},
        }
    )


def model_schema() -> Schema:
    """One model of GET /v1/models."""
    return _object({"id": _TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": _TEXT})


def models_schema() -> Schema:
    """GET /v1/models."""
    return _object({"object": {"const": "list"}, "data": {"type": "array", "items": model_schema()}})


def health_schema() -> Schema:
    """GET /healthz, whether 200 or 503."""
    answered = _object({"ok": {"const": True}, "milliseconds": _NUMBER})
    model = {"oneOf": [answered, _object({"ok": {"const": False}, "error": _TEXT})]}
    return _object(
        {
            "status": _TEXT,
            "models": {"type": "object", "additionalProperties": model},
            "router": {"type": ["object", "null"]},
        }
    )


def info_schema() -> Schema:
    """GET /v1/routing/info."""
    model = _object({"name": _TEXT, "parameters": _COUNT, "flops_per_token": _NUMBER})
    interval = {"type": "array", "items": _MAYBE_NUMBER, "minItems": 3, "maxItems": 3}
    figures = dict.fromkeys(("large_share", "accuracy", "accuracy_gap", "flops_ratio"), interval)
    points = {"type": "array", "items": _object({"cost_weight": _NUMBER, **figures})}
    calibration = _object({"queries": _COUNT, "confidence": _NUMBER, "points": points})
    return _object(
        {
            "models": {"type": "array", "items": model},
            "routers": {"type": "array", "items": _TEXT},
            "default": _MAYBE_TEXT,
            "cost_weight": _object({"default": _MAYBE_NUMBER, "low": _MAYBE_NUMBER, "high": _MAYBE_NUMBER}),
            "calibration": {"anyOf": [{"type": "null"}, calibration]},
            "limits": {"type": "object"},
            "examples": {"type": "array", "items": _TEXT},
            "needs_key": _FLAG,
        }
    )


def _error_response(status: int) -> Schema:
    made = json_response(ERRORS[status], error_schema())
    if status in _RETRY:
        made["headers"]["Retry-After"] = {"required": True, "schema": {"type": "integer", "minimum": 1}}
    return made


def _response(description: str, content: Schema) -> Schema:
    return {
        "description": description,
        "content": content,
        "headers": {"x-request-id": {"required": True, "schema": _TEXT}},
    }


def _head(kind: str) -> Schema:
    return {
        "id": _TEXT,
        "object": {"const": kind},
        "created": {"type": "integer"},
        "model": _TEXT,
        "system_fingerprint": _MAYBE_TEXT,
    }


def _decision() -> Schema:
    return {
        "choice": _COUNT,
        "index": _COUNT,
        "model": _TEXT,
        "probability": _MAYBE_NUMBER,
        "probabilities": _SHARES,
        "router_version": {"type": "integer"},
    }


def _event(name: str, schema: Schema) -> Schema:
    """An object of a stream's `routing`, told apart by its event."""
    properties = {"event": {"const": name}, **schema["properties"]}
    return schema | {"properties": properties, "required": ["event", *schema["required"]]}


def _object(properties: Schema, closed: bool = False) -> Schema:
    """An object that has all of these."""
    made: Schema = {"type": "object", "properties": properties, "required": list(properties)}
    return made | ({"additionalProperties": False} if closed else {})
