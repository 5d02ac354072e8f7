"""Calls of one HTTP request to one deployment: each must be a call of its own to Serve."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from ray.serve.context import _get_serve_request_context, _set_request_context

from serve.calls import ask


@dataclass
class _Handle:
    """Keeps the request ids under which Serve would have filed the calls."""

    ids: list[tuple[str, str]] = field(default_factory=list)

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        context = _get_serve_request_context()
        self.ids.append((context.request_id, context._internal_request_id))
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.set_result(arguments)
        return answer


async def test_calls_of_one_request_are_not_taken_for_one() -> None:
    _set_request_context(request_id="req-1", _internal_request_id="of the HTTP request")
    handle = _Handle()
    found = await asyncio.gather(*(ask(cast(Any, handle), number) for number in range(5)))
    assert found == [(number,) for number in range(5)]
    names, own = zip(*handle.ids, strict=True)
    assert set(names) == {"req-1"}, "the id that the logs tell has changed"
    assert len({*own, "of the HTTP request"}) == 6
