"""From the events of an answer to an HTTP response, whole or as a stream, and what happens when its client leaves.

Whatever ends a response, its client's leaving included, ends the episodes behind it and gives their slots back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.choices import EndEvent, Event, StartEvent, StepEvent, TextEvent
from serve.facts import RequestFacts
from serve.middleware import LEFT
from serve.problems import ApiError, to_api_error
from serve.responses import DONE, ChoiceResult, ChunkMaker, Head, TokenUsage, make_completion, sse, sse_error
from serve.schema import ChatRequest
from serve.service import Answer, RoutingService

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


async def until_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        ApiError: 499, which only the log sees.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_left()
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def client_left() -> ApiError:
    """499: nobody reads this."""
    return ApiError(LEFT, "The client left before the end.", code="client_left")


async def _wait_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def complete_answer(service: RoutingService, asked: ChatRequest, facts: RequestFacts) -> dict[str, Any]:
    """The completion object of a request.

    Raises:
        ApiError: as `RoutingService.answer`.
    """
    ended: dict[int, EndEvent] = {}
    steps = []
    async with service.answer(asked, facts) as answer:
        async for events in answer.events:
            for event in events:
                if isinstance(event, EndEvent):
                    ended[event.choice] = event
                elif isinstance(event, StepEvent):
                    steps.append(event.trace)
        steps.sort(key=lambda step: (step.choice, step.index))
        summary = service.summarise(answer, tuple(steps) if asked.routing.trace else None)
        choices = [
            ChoiceResult(i, end.text, answer.trajectories[i].end, end.thoughts) for i, end in sorted(ended.items())
        ]
        return make_completion(_make_head(service, answer), choices, _usage(answer), summary)


class EventStream(StreamingResponse):
    """Server-sent events that end the work behind them (`stack`) however they end.

    A client may leave before the first event is asked for, or while one is being sent; in both cases the generator of
    the events is not running and could not clean up itself.
    """

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.AsyncExitStack, facts: RequestFacts) -> None:
        super().__init__(
            self._count(events), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )
        self._stack = stack
        self._facts = facts
        self._ended = False

    async def _count(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for event in events:
            yield event
        self._ended = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        # Of newer servers Starlette waits for a failing send, which does not come while a model is silent.
        watched = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        try:
            async with self._stack:
                await super().__call__(watched, receive, send)
        except OSError:  # a broken pipe; everything else that goes wrong amid the events is told as one of them
            pass
        finally:
            if not self._ended:
                self._facts.error = "client_left"


async def stream_answer(service: RoutingService, answer: Answer) -> AsyncIterator[bytes]:
    """The server-sent events of an answer; an error amid it is the last of them."""
    asked, facts = answer.request, answer.facts
    made = ChunkMaker(_make_head(service, answer), asked.include_usage)
    try:
        yield b"".join(sse(made.start(choice)) for choice in range(asked.n))
        async for events in answer.events:
            chunk = b"".join(sse(data) for event in events for data in _make_chunks(made, event, asked))
            if chunk:
                yield chunk
        summary = service.summarise(answer, None)
        if asked.include_usage or asked.routing.trace:
            yield sse(made.summary(_usage(answer) if asked.include_usage else None, summary))
        yield DONE
    except Exception as error:  # the border: the headers are out, so the stream itself must say it
        told = to_api_error(error, facts.request_id)
        facts.error = told.code
        if told.status == 500:
            logger.error("request %s failed amid its stream", facts.request_id, exc_info=error)
        yield sse_error(told)


def _make_chunks(made: ChunkMaker, event: Event, asked: ChatRequest) -> list[dict[str, Any]]:
    if isinstance(event, TextEvent):
        return [made.text(event.choice, event.text, event.thinking)]
    if isinstance(event, EndEvent):
        return [made.finish(event.choice, event.trajectory.end)]
    if not asked.routing.trace:
        return []
    return [made.step_start(event.start) if isinstance(event, StartEvent) else made.step_end(event.trace)]


def _make_head(service: RoutingService, answer: Answer) -> Head:
    pool, _ = service.loaded()
    fingerprint = "-".join(facts.fingerprint[:8] for facts in pool.facts)
    return Head(f"chatcmpl-{answer.facts.request_id}", answer.created, answer.route.name, fingerprint)


def _usage(answer: Answer) -> TokenUsage:
    return TokenUsage(answer.facts.tokens_in, answer.facts.tokens_out)
