"""Writing one step at an endpoint: in one request where it can be, in several where small paragraphs are merged.

Endpoints cut a stop string off and bill its tokens. Most streams need no cutting here; one whose endpoint drops the
blank line behind a finished step begins with it once more, so that the delimiter cannot be a stop string there: such a
step is streamed, cut here and then given up, at the price of a few tokens beyond its end.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from roro_ray.engines.api_client import FIELD_REFUSALS, ApiClient, ApiRefusedError
from roro_ray.engines.api_prompts import ApiTraits, Body, make_options, make_prompt, make_schema, split_chat
from roro_ray.engines.api_replies import Reply, make_handles, measure_entropy, read_finish, spell
from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult, check_limits
from roro_ray.errors import EngineError

_CHARACTERS_PER_TOKEN = 4  # of the estimate for the rate limit, corrected by what is billed


@dataclass(slots=True)
class _Draft:
    """A step so far: its text with the kept one, the tokens billed, and what the first reply said of its beginning."""

    request: StepRequest
    text: str
    ids: list[int]
    told: int
    log_probs: list[float] = field(default_factory=list)
    first_entropy: float = math.nan
    prefix_tokens: int = 0
    cached_tokens: int = 0
    replies: int = 0

    def take(self, reply: Reply) -> None:
        """Count a finished reply's tokens, as far as its deltas have not."""
        self.log_probs += [score.log_prob for score in reply.scores]
        if not self.replies:
            if not self.request.kept_ids:  # else its first token was written before
                self.first_entropy = measure_entropy(reply.scores[0] if reply.scores else None)
            length = len(self.request.prefix) // _CHARACTERS_PER_TOKEN
            self.prefix_tokens = length if reply.prompt_tokens is None else reply.prompt_tokens
            self.cached_tokens = reply.cached_tokens
        self.replies += 1

    def tell(self, certain: str, ids: tuple[int, ...]) -> StepDelta:
        """What has become certain since the last delta."""
        new, self.told = certain[self.told :], max(len(certain), self.told)
        return StepDelta(ids, new)

    def finish(self, finish: str) -> StepResult:
        """The step."""
        return StepResult(
            text=self.text,
            token_ids=tuple(self.ids),
            log_probs=tuple(self.log_probs),
            finish=finish,
            prefix_tokens=self.prefix_tokens,
            first_entropy=self.first_entropy,
            cached_tokens=self.cached_tokens,
        )


@dataclass(slots=True)
class _Segment:
    """One reply on its way into a draft. `sent` are the stop strings that the endpoint looks for."""

    request: StepRequest
    sent: tuple[str, ...]
    strip: bool
    before: int  # tokens of the step before this reply
    reply: Reply = field(default_factory=Reply)
    counted: int = 0  # tokens that chunks have brought
    _searched: int = 0

    @property
    def text(self) -> str:
        """The reply's text, without white space that the text before it ends with already."""
        return self.reply.text.lstrip() if self.strip else self.reply.text

    def find_end(self) -> tuple[str, str] | None:
        """(finish, text) where the step's end is in the text itself."""
        text, request = self.text, self.request
        while True:
            stops = [stop for stop in (request.delimiter, *request.stops) if stop]
            found = [(at, stop) for stop in stops if (at := text.find(stop, self._searched)) >= 0]
            if not found:
                return None
            at, stop = min(found)
            if stop != request.delimiter:
                return "marker", text[:at]
            if self.before + max(self.counted, self.reply.tokens) >= request.min_tokens:
                return "delimiter", text[:at]
            self._searched = at + len(stop)

    def certain(self) -> str:
        """The text without what may become a stop string, or a whole character, with the next chunk."""
        text = self.text.rstrip("\ufffd")
        held = 0
        for stop in (self.request.delimiter, *self.request.stops):
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        return text[: len(text) - held]


class _Peeks:
    """The last steps that were cut off: one that is kept is continued, and its ids spell its text and no more."""

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._results: dict[tuple[str, tuple[int, ...]], StepResult] = {}

    def keep(self, prefix: str, result: StepResult) -> None:
        """Remember a step; the oldest is forgotten."""
        self._results[prefix, result.token_ids] = result
        if len(self._results) > self._most:
            del self._results[next(iter(self._results))]

    def find(self, request: StepRequest) -> StepResult | None:
        """The step whose ids a request keeps, if it was written here."""
        return self._results.get((request.prefix, request.kept_ids)) if request.kept_ids else None


class ApiWriter:
    """Writes steps with one model of one endpoint.

    Args:
        plain, thinks: as in `make_prompt`.
    """

    def __init__(self, client: ApiClient, model: str, traits: ApiTraits, plain: bool, thinks: bool) -> None:
        self.client = client
        self.model = model
        self.traits = traits
        self.plain = plain
        self.thinks = thinks
        self._peeks = _Peeks()

    async def write(self, request: StepRequest, live: bool) -> AsyncGenerator[StepDelta | StepResult, None]:
        """Deltas, where it is `live`, and the result.

        Raises:
            EngineError: the request is malformed or refused; EngineUnavailableError: the endpoint cannot be reached.
        """
        check_limits(self.client.name, request)
        kept = spell(request.kept_ids)
        draft = _Draft(request, kept, list(request.kept_ids), told=len(kept))
        if (peek := self._peeks.find(request)) is not None:
            draft.log_probs, draft.first_entropy = list(peek.log_probs), peek.first_entropy
        while (budget := request.max_tokens - len(draft.ids)) > 0:
            segment = self._begin(request, draft)
            ended = None
            async with aclosing(self._receive(request, draft, segment, budget, live)) as chunks:
                async for ids in chunks:
                    ended = segment.find_end()
                    if live:
                        yield draft.tell(draft.text + (ended[1] if ended is not None else segment.certain()), ids)
                    if ended is not None:
                        break  # what the endpoint might still write belongs to no step
            finish, text = ended if ended is not None else self._read_end(segment)
            draft.take(segment.reply)
            draft.text += text
            if finish != "delimiter" or len(draft.ids) >= request.min_tokens:
                break
            draft.text += request.delimiter
        else:
            finish = "length"
        result = draft.finish(finish)
        if finish == "length":
            self._peeks.keep(request.prefix, result)
        yield result

    async def ask(self, prefix: str, options: Body, adapter: str = "") -> Reply:
        """The greedy next token after a prefix, with log-probabilities and whatever else `options` ask for."""
        body = {
            "model": adapter or self.model,
            **make_prompt(self.traits, prefix, self.plain, self.thinks),
            **make_options(self.traits, 1, 0.0, 1.0, 0),
            **options,
        }
        reply = Reply()
        reply.add(await self.client.ask(self.traits.path, body, len(prefix) // _CHARACTERS_PER_TOKEN + 1))
        return reply

    def _begin(self, request: StepRequest, draft: _Draft) -> _Segment:
        traits = self.traits
        sent: tuple[str, ...] = (request.delimiter,) if request.delimiter and not traits.trims else ()
        if traits.tells_stop or not (sent or traits.trims):
            sent += request.stops  # elsewhere one stop string could not be told from another: these are cut here
        before = split_chat(request.prefix + draft.text)[1] if traits.trims else ""
        return _Segment(request, sent, before != before.rstrip(), len(draft.ids))

    async def _receive(
        self, request: StepRequest, draft: _Draft, segment: _Segment, budget: int, live: bool
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """Feed the endpoint's reply into a segment, chunk by chunk, and its tokens into the draft; gives their ids."""
        streamed = live or (self.traits.trims and bool(request.delimiter))
        reply = segment.reply
        async with aclosing(self._send(request, draft.text, segment.sent, budget, streamed)) as chunks:
            async for chunk in chunks:
                scored = len(reply.scores)
                text = reply.add(chunk)
                pieces = [score.text for score in reply.scores[scored:]]
                tokens = (len(pieces) or int(bool(text))) if streamed else reply.tokens
                ids = make_handles(text, tokens, pieces)
                segment.counted += tokens
                draft.ids += ids
                if text or ids:
                    yield ids
        rest = reply.tokens - segment.counted  # those of a stop string, say, which no chunk brought
        segment.counted += max(rest, 0)
        draft.ids += [0] * rest
        if reply.thought and not reply.text:
            raise EngineError(
                f"engine {self.client.name}: {self.client.url} told the thinking apart from the answer, and so nothing "
                "that could be continued: start the server without a reasoning parser, or set thinking=off"
            )

    async def _send(
        self, request: StepRequest, written: str, stops: tuple[str, ...], budget: int, streamed: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The reply or its chunks; what the endpoint does not take of the optional fields is left out from then on."""
        without: dict[str, Any] = {}
        wanted = (["schemas"] if request.schema else []) + (["usage"] if streamed else [])
        while True:
            traits = replace(self.traits, **without)
            body = self._make_body(traits, request, written, stops, budget, streamed)
            used = [name for name in wanted if getattr(traits, name)]
            tokens = len(request.prefix + written) // _CHARACTERS_PER_TOKEN + budget
            try:
                if not streamed:
                    reply = await self.client.ask(traits.path, body, tokens)
                    self.traits = replace(self.traits, **without)
                    yield reply
                    return
                async with aclosing(self.client.stream(traits.path, body, tokens)) as chunks:
                    async for chunk in chunks:
                        self.traits = replace(self.traits, **without)
                        yield chunk
                return
            except ApiRefusedError as error:
                if error.status not in FIELD_REFUSALS or not used:
                    raise
            without[used[0]] = False

    def _make_body(
        self, traits: ApiTraits, request: StepRequest, written: str, stops: tuple[str, ...], budget: int, streamed: bool
    ) -> Body:
        body = {
            "model": request.adapter or self.model,
            **make_prompt(traits, request.prefix + written, self.plain, self.thinks),
            **make_options(traits, budget, request.temperature, request.top_p, request.seed),
        }
        if stops:
            body["stop"] = list(stops)
        if request.schema and traits.schemas:
            body |= make_schema(json.loads(request.schema))
        if streamed and traits.usage:
            # A stream that is given up at its step's end has no last chunk, so its usage is asked for with each.
            body["stream_options"] = {"include_usage": True} | (
                {"continuous_usage_stats": True} if traits.trims else {}
            )
        return body

    def _read_end(self, segment: _Segment) -> tuple[str, str]:
        request = segment.request
        delimiter = request.delimiter if request.delimiter in segment.sent else ""
        try:
            finish, _ = read_finish(segment.reply, delimiter, request.stops)
        except EngineError as error:
            raise EngineError(f"engine {self.client.name}: {error}") from None
        return finish, segment.text
