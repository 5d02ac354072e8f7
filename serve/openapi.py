"""The request side of the OpenAPI document: JSON Schemas of exactly what `schema` accepts.

The routes read the raw body, so the framework cannot derive these. What JSON Schema cannot say is left to the texts:
the total length of a conversation, that a header and the body agree, and that max_tokens and max_completion_tokens may
both be given where they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.continuation import BEGIN, CONTINUE
from serve.routing_fields import MAX_LARGE_STEPS, MAX_NAME_CHARS
from serve.schema import (
    MAX_METADATA,
    MAX_METADATA_KEY_CHARS,
    MAX_MODEL_CHARS,
    MAX_SEED,
    MAX_STOPS,
    MAX_TAG_CHARS,
    MAX_TEMPERATURE,
    ROLES,
    Limits,
)
from serve.unsupported import UNSUPPORTED, UNSUPPORTED_IN_MESSAGE, UNSUPPORTED_IN_STREAM, Unsupported

Schema = dict[str, Any]
_CONTINUE = (
    "Whether the last message, an assistant's, is the beginning of the answer; only what follows it is returned. "
    "Default: it is, if the last message is an assistant's."
)
_NO_NUL = "^[^\\u0000]*$"


def chat_request_schema(limits: Limits, names: Sequence[str] = (), models: Sequence[str] = ()) -> Schema:
    """The body of POST /v1/chat/completions.

    Args:
        names: what `model` can be; any string without.
        models: the pool's, which `routing.force` can name; any string without.
    """
    properties: Schema = {
        "model": _name(names, MAX_MODEL_CHARS),
        "messages": {
            "type": "array",
            "items": _message(limits),
            "minItems": 1,
            "maxItems": limits.max_messages,
            "description": f"The conversation, at most {limits.max_text_chars} characters in all.",
        },
        "temperature": _nullable("number", minimum=0, maximum=MAX_TEMPERATURE, default=limits.default_temperature),
        "top_p": _nullable("number", exclusiveMinimum=0, maximum=1, default=1),
        "seed": _nullable("integer", minimum=-MAX_SEED, maximum=MAX_SEED),
        "n": _nullable("integer", minimum=1, maximum=limits.max_choices, default=1),
        "stop": _stop(limits),
        "max_tokens": _nullable("integer", minimum=1, maximum=limits.max_completion_tokens, deprecated=True),
        "max_completion_tokens": _nullable("integer", minimum=1, maximum=limits.max_completion_tokens),
        "stream": _nullable("boolean", default=False),
        "stream_options": _object(
            {"include_usage": _nullable("boolean", default=False), **_refused(UNSUPPORTED_IN_STREAM)}, nullable=True
        ),
        "user": _nullable("string", maxLength=MAX_TAG_CHARS, pattern=_NO_NUL),
        "safety_identifier": _nullable("string", maxLength=MAX_TAG_CHARS, pattern=_NO_NUL),
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": MAX_METADATA,
            "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS, "pattern": _NO_NUL},
            "additionalProperties": {"type": "string", "maxLength": MAX_TAG_CHARS, "pattern": _NO_NUL},
        },
        "routing": _routing(models),
        CONTINUE: _nullable("boolean", description=_CONTINUE),
        BEGIN: _nullable("boolean", description=f"The opposite of {CONTINUE}."),
        **_refused(UNSUPPORTED),
    }
    needs_stream = {
        "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
        "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
    }
    one_limit = _not_both("max_tokens", "integer", "max_completion_tokens", "integer")
    rules = [needs_stream, one_limit, *(_not_both_are(CONTINUE, BEGIN, value) for value in (True, False))]
    return {**_object(properties, ["model", "messages"]), "allOf": rules}


def explain_request_schema(limits: Limits, names: Sequence[str] = (), models: Sequence[str] = ()) -> Schema:
    """The body of POST /v1/routing/explain; `models` are the pool's, of which steps can be."""
    schema = chat_request_schema(limits, names, models)
    share = _nullable("number", minimum=0, maximum=1)
    step = {
        "model": _name(models, MAX_MODEL_CHARS),
        "text": {"type": "string", "maxLength": limits.max_text_chars, "pattern": _NO_NUL},
        "tokens": _nullable("integer", minimum=0, maximum=limits.max_completion_tokens),
        "confidence": share,
        "confidence_min": share,
    }
    schema["properties"] |= {
        "stream": {"enum": [False, None]},
        "stream_options": {"type": "null"},
        "steps": {
            "type": ["array", "null"],
            "items": _object(step, ["model", "text"]),
            "maxItems": limits.max_given_steps,
            "description": "Steps written already.",
        },
    }
    return schema


def routing_headers(models: Sequence[str] = ()) -> list[Schema]:
    """The X-Roro headers, as parameters of an operation. They must agree with the body's `routing`."""
    share = "(large_share|accuracy_within)=(0|1|0[.][0-9]{1,6})"
    controls: dict[str, Schema] = {
        "X-Roro-Cost-Weight": {"type": "number", "minimum": 0},
        "X-Roro-Target": {"type": "string", "pattern": f"^{share}$"},
        "X-Roro-Max-Large-Steps": {"type": "integer", "minimum": 0, "maximum": MAX_LARGE_STEPS},
        "X-Roro-Force": _name(models, MAX_NAME_CHARS),
        "X-Roro-Trace": {"type": "boolean"},
    }
    text = "The same as `routing.{}` of the body."
    return [
        {
            "name": name,
            "in": "header",
            "required": False,
            "schema": schema,
            "description": text.format(name.removeprefix("X-Roro-").lower().replace("-", "_")),
        }
        for name, schema in controls.items()
    ]


def make_operation(body: Schema, models: Sequence[str] = ()) -> Schema:
    """What FastAPI's `openapi_extra` needs for a route that reads the raw body."""
    content = {"application/json": {"schema": body}}
    return {"requestBody": {"required": True, "content": content}, "parameters": routing_headers(models)}


def drop_framework_errors(document: Schema) -> Schema:
    """FastAPI's document without the 422 that it promises for every parameter and that no route here sends."""
    for path in document.get("paths", {}).values():
        for operation in path.values():
            if isinstance(operation, dict):
                operation.get("responses", {}).pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document


def _message(limits: Limits) -> Schema:
    text: Schema = {"type": "string", "maxLength": limits.max_text_chars, "pattern": _NO_NUL}
    part = _object({"type": {"const": "text"}, "text": text}, ["type", "text"])
    content = {"anyOf": [text, {"type": "array", "items": part, "minItems": 1}]}
    properties = {"role": {"enum": list(ROLES)}, "content": content, **_refused(UNSUPPORTED_IN_MESSAGE)}
    return _object(properties, ["role", "content"])


def _stop(limits: Limits) -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_chars, "pattern": _NO_NUL}
    return {"anyOf": [{"type": "null"}, text, {"type": "array", "items": text, "maxItems": MAX_STOPS}]}


def _routing(models: Sequence[str]) -> Schema:
    share = _nullable("number", minimum=0, maximum=1)
    only = [
        {"required": [name], "properties": {name: {"type": "number"}}} for name in ("large_share", "accuracy_within")
    ]
    target = _object({"large_share": share, "accuracy_within": share}, nullable=True)
    # `oneOf` would refuse the null that the object's own type allows.
    target["anyOf"] = [{"type": "null"}, {"type": "object", "oneOf": only}]
    properties = {
        "cost_weight": _nullable("number", minimum=0, maximum=1e300),
        "target": target,
        "max_large_steps": _nullable("integer", minimum=0, maximum=MAX_LARGE_STEPS),
        "force": {"anyOf": [{"type": "null"}, _name(models, MAX_NAME_CHARS)]},
        "trace": _nullable("boolean", default=False),
    }
    contradictions = [
        _not_both("cost_weight", "number", "target", "object"),
        _not_both("force", "string", "cost_weight", "number"),
        _not_both("force", "string", "target", "object"),
    ]
    return {**_object(properties, nullable=True), "allOf": contradictions}


def _not_both(one: str, one_type: str, other: str, other_type: str) -> Schema:
    """Not both given; null is not given, hence the types."""
    properties = {one: {"type": one_type}, other: {"type": other_type}}
    return {"not": {"type": "object", "required": [one, other], "properties": properties}}


def _not_both_are(one: str, other: str, value: bool) -> Schema:
    return {"not": {"required": [one, other], "properties": {one: {"const": value}, other: {"const": value}}}}


def _refused(table: dict[str, Unsupported]) -> Schema:
    return {
        name: {"enum": [*rule.neutral, None], "description": f"Not supported. {rule.reason}."}
        for name, rule in table.items()
    }


def _name(names: Sequence[str], max_chars: int) -> Schema:
    if names:
        return {"type": "string", "enum": list(names)}
    return {"type": "string", "minLength": 1, "maxLength": max_chars, "pattern": _NO_NUL}


def _object(properties: Schema, required: Sequence[str] = (), nullable: bool = False) -> Schema:
    made: Schema = {
        "type": ["object", "null"] if nullable else "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return made | ({"required": list(required)} if required else {})


def _nullable(kind: str, **rules: Any) -> Schema:
    return {"type": [kind, "null"], **rules}
