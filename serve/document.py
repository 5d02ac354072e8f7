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
    bodies = {"/v1/chat/completions": chat_request_schema, "/v1/routing/explain": explain_request_schema}
    for path, make_schema in bodies.items():
        operation = document["paths"][path]["post"]
        operation.update(make_operation(make_schema(limits, names, models), models))
    document["components"] = document.get("components", {}) | {
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}
    }
    document["security"] = [{"key": []}, {}]
    return document
