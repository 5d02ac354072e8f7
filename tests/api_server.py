"""An OpenAI-compatible endpoint whose answers are written down: it can lack, refuse or spoil whatever real ones do.

Tokens are words with the space before them, single other characters, and runs of newlines. An answer is continued where
the unfinished text is its beginning; what is asked beyond the script goes on with " ok".
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]
LOG_PROB = math.log(0.75)
END = "<end>"


@dataclass(frozen=True)
class Failure:
    """What is answered in place of a reply; `drops` closes the connection instead."""

    status: int = 500
    message: str = "told to fail"
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    body: str | None = None


def split_tokens(text: str) -> list[str]:
    return re.findall(r"\n+| ?\w+|.", text, re.DOTALL)


@dataclass
class ScriptedApi:
    """What the endpoint does.

    `answers` by question. `chat` is how a last message is continued (`continue_final_message`, `prefix`, `trailing`, or
    `restarts`: not at all). `refuses` are fields that are a 400 (`refusal`); `top_logprobs` the most alternatives (-1:
    log-probabilities are refused, -2: left out in silence). `failures` come first, one for each request. `breaks` ends
    streams after so many chunks, `pause_s` stands before each chunk.
    """

    answers: dict[str, str]
    completions: bool = True
    chat: str = ""
    tells_stop: bool = True
    trims: bool = False
    refuses: tuple[str, ...] = ()
    refusal: str = "Unrecognized request argument supplied: {}"
    top_logprobs: int = 20
    ignores_stop: bool = False
    separates_thinking: bool = False
    drops_thoughts: bool = False
    key: str = ""
    failures: list[Failure] = field(default_factory=list)
    breaks: int | None = None
    pause_s: float = 0.0
    requests: list[tuple[str, Json]] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    left: int = 0

    @property
    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        return Starlette(routes=routes)

    @property
    def steps(self) -> list[Json]:
        """Requests since the list was cleared, without what was refused."""
        return [body for _, body in self.requests]

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "scripted", "max_model_len": 4096}]})

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, "/completions", self.completions)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, "/chat/completions", bool(self.chat))

    async def _answer(self, request: Request, path: str, there: bool) -> Response:
        body = await request.json()
        self.requests.append((path, body))
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refuse(401, f"Incorrect API key provided: {request.headers.get('authorization')}")
        if not there:
            return refuse(404, f"no {path} here")
        if self.failures:
            return fail(self.failures.pop(0))
        wrong = self._find_fault(body, path)
        if wrong:
            return refuse(400, wrong)
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            await asyncio.sleep(self.pause_s)
            reply = self._write(body, path)
        finally:
            self.active -= 1
        if not body.get("stream"):
            return JSONResponse(reply)
        return StreamingResponse(self._stream(reply, body, path), media_type="text/event-stream")

    def _find_fault(self, body: Json, path: str) -> str:
        for name in self.refuses:
            if name in body:
                return self.refusal.format(name)
        wanted = body.get("top_logprobs", body.get("logprobs"))
        if wanted and self.top_logprobs == -1:
            return "logprobs is not supported"
        if not isinstance(wanted, bool) and (wanted or 0) > max(self.top_logprobs, 0) >= 0 and self.top_logprobs != -2:
            return f"top_logprobs must be at most {self.top_logprobs}"
        if path == "/completions":
            return ""
        last = body["messages"][-1]
        if self.chat == "continue_final_message":
            flag = body.get("continue_final_message", False)
            if not isinstance(flag, bool):
                return "continue_final_message must be a boolean"
            if flag and body.get("add_generation_prompt", True):
                return "Cannot set both continue_final_message and add_generation_prompt"
        if self.drops_thoughts and last["role"] == "assistant" and "</think>" in last["content"]:
            return "the final message does not appear in the chat after applying the chat template"
        if self.chat == "prefix" and not isinstance(last.get("prefix", False), bool):
            return "prefix must be a boolean"
        return ""

    def _read_prompt(self, body: Json, path: str) -> tuple[str, str]:
        """(question, unfinished answer) as the model sees them."""
        if path == "/completions":
            prompt = body["prompt"]
            for question in self.answers:
                if question in prompt:
                    return question, prompt.partition(question)[2].removeprefix("\n\n")
            return "", ""
        *_, last = body["messages"]
        question = next(message["content"] for message in body["messages"] if message["role"] == "user")
        if last["role"] != "assistant":
            return question, ""
        goes_on = {
            "continue_final_message": body.get("continue_final_message"),
            "prefix": last.get("prefix"),
            "trailing": True,
        }.get(self.chat)
        content = last["content"].rstrip() if self.trims else last["content"]
        return question, content if goes_on else ""

    def _continue(self, question: str, begun: str) -> list[str]:
        """The tokens that the model would write."""
        if question.startswith("Repeat this sentence exactly"):
            whole = question.partition(": ")[2]
        else:
            whole = self.answers.get(question, begun + " ok")
        if begun.startswith(whole):  # all is said
            return [END]
        rest = whole[len(begun) :] if whole.startswith(begun) else whole
        return [*split_tokens(rest), END]

    def _write(self, body: Json, path: str) -> Json:
        question, begun = self._read_prompt(body, path)
        tokens = self._continue(question, begun)[: body.get("max_tokens") or body["max_completion_tokens"]]
        text, met, used, finish = "", None, [], "length"
        stops = [] if self.ignores_stop else body.get("stop") or []
        for token in tokens:
            used.append(token)
            if token == END:
                finish = "stop"
                break
            text += token
            found = [(text.index(stop), stop) for stop in stops if stop in text]
            if found:
                at, met = min(found)
                text, finish = text[:at], "stop"
                break
        choice: Json = {"index": 0, "finish_reason": finish}
        if self.tells_stop:
            choice["stop_reason"] = met
        prompt_tokens = len(split_tokens(question)) + len(split_tokens(begun)) + 3
        if path == "/completions":
            choice["text"] = text
            scored = split_tokens(body["prompt"]) if body.get("echo") else []
            if body.get("echo"):
                choice["text"] = body["prompt"] + text
                prompt_tokens = len(scored)
            choice["logprobs"] = self._score_text(scored + used, body, bool(body.get("echo")))
        else:
            message = {"role": "assistant", "content": text}
            if self.separates_thinking:
                message = {"role": "assistant", "content": None, "reasoning_content": text}
            choice["message"] = message
            choice["logprobs"] = self._score_chat(used, body)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(used),
            "total_tokens": prompt_tokens + len(used),
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        return {"id": "x", "object": "reply", "model": "scripted", "choices": [choice], "usage": usage, "used": used}

    def _score_text(self, tokens: Sequence[str], body: Json, echo: bool) -> Json | None:
        if not body.get("logprobs") or self.top_logprobs < 0:
            return None
        values: list[float | None] = [LOG_PROB] * len(tokens)
        tops: list[Json | None] = [{token: LOG_PROB, "other": math.log(0.125)} for token in tokens]
        if echo:
            values[0], tops[0] = None, None
        return {"tokens": list(tokens), "token_logprobs": values, "top_logprobs": tops, "text_offset": []}

    def _score_chat(self, tokens: Sequence[str], body: Json) -> Json | None:
        if not body.get("logprobs") or self.top_logprobs < 0:
            return None
        top = [{"token": "other", "logprob": math.log(0.125)}] if body.get("top_logprobs") else []
        return {
            "content": [
                {
                    "token": token,
                    "logprob": LOG_PROB,
                    "top_logprobs": [{"token": token, "logprob": LOG_PROB}, *top] if top else [],
                }
                for token in tokens
            ]
        }

    async def _stream(self, reply: Json, body: Json, path: str) -> AsyncIterator[bytes]:
        choice, used = reply["choices"][0], reply["used"]
        chat = path == "/chat/completions"
        left = (choice["message"]["content"] or "") if chat else choice["text"]
        logprobs = choice.get("logprobs")
        try:
            for index, token in enumerate(used):
                await asyncio.sleep(self.pause_s)
                piece, left = left[: len(token)], left[len(token) :]
                last = index + 1 == len(used)
                part: Json = {"index": 0, "finish_reason": choice["finish_reason"] if last else None}
                part |= {"delta": {"content": piece}} if chat else {"text": piece}
                if self.tells_stop:
                    part["stop_reason"] = choice["stop_reason"] if last else None
                if logprobs and chat:
                    part["logprobs"] = {"content": logprobs["content"][index : index + 1]}
                elif logprobs:
                    part["logprobs"] = {name: values[index : index + 1] for name, values in logprobs.items()}
                yield sse({"id": "x", "choices": [part]})
                if self.breaks is not None and index + 1 >= self.breaks:
                    yield sse({"error": {"message": "the model is gone", "code": 500}})
                    return
            if (body.get("stream_options") or {}).get("include_usage"):
                yield sse({"id": "x", "choices": [], "usage": reply["usage"]})
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise


class Host:
    """One server for many endpoints, each under a path of its own: starting one for each test would take longer."""

    def __init__(self) -> None:
        self.url = ""
        self._apps: list[Starlette] = []

    def add(self, api: ScriptedApi) -> str:
        """The url of an endpoint (without /v1), once the host listens."""
        self._apps.append(api.app)
        return f"{self.url}/{len(self._apps) - 1}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            _, number, path = scope["path"].split("/", 2)
            await self._apps[int(number)]({**scope, "path": f"/{path}"}, receive, send)


def sse(chunk: Json) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "code": None}}, status)


def fail(failure: Failure) -> Response:
    if failure.body is not None:
        return PlainTextResponse(failure.body, failure.status, failure.headers)
    error = {"message": failure.message, "type": "error", "code": failure.code}
    return JSONResponse({"error": error}, failure.status, failure.headers)
