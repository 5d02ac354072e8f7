"""The OpenAPI document: what FastAPI knows of the routes, and the schemas of what they really read and send."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from serve.openapi import chat_request_schema, drop_framework_errors, explain_request_schema, make_operation
from serve.schema import Limits


def make_document(
    app: FastAPI, limits: Limits, names: Sequence[str], models: Sequence[str] = ()
) -> dict[str, Any]:
    """The document of a running server: what can be asked for, and the pool's models (none while loading)."""
    document = drop_framework_errors(copy.deepcopy(app.openapi()))
    routers = [name for name in names if name not in models]  # only what decides can be explained
    bodies = {
        "/v1/chat/completions": chat_request_schema(limits, names, models),
        "/v1/routing/explain": explain_request_schema(limits, routers, models),
    }
    for path, schema in bodies.items():
        document["paths"][path]["post"].update(make_operation(schema, models))
    document["components"] = document.get("components", {}) | {
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}
    }
    document["security"] = [{"key": []}, {}]
    return document
