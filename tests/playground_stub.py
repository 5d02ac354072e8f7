"""A small service that speaks the HTTP API the playground talks to, for tests of the page without models or Ray.

Steps are those of the embedded world: `large` computes, `small` multiplies and subtracts without carry or borrow, and
the choice between them moves with the cost weight, so that what the page shows is consistent in itself. A word in
square brackets in the query asks for trouble: `[full]`, `[bad]`, `[lost]`, `[broken]`, `[degraded]`, `[hostile]`,
`[slow]`, `[split]`.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

PAGE = Path(__file__).parent.parent / "serve" / "playground.html"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
EXAMPLES = [
    "Start with 47. A: double; B: times 06; C: plus 05; D: reverse; E: subtract 27; F: at least 40.",
    "Start with 36. A: double; B: times 04; C: subtract 38.",
    "Start with 82. A: plus 09; B: remainder by 07; C: times 08; D: reverse; E: double.",
]
FLOPS_PER_TOKEN = {"small": 143_648.0, "large": 2_107_584.0}
ROUTER_FLOPS = 146_000.0
HOSTILE = (
    "A: <img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> \u00e9\u4e16\U0001f642"
)
POINTS = [
    # cost weight, large share, accuracy, FLOPs against large alone
    (0.05, 0.64, 0.994, 1.02),
    (0.08, 0.51, 0.992, 0.97),
    (0.13, 0.40, 0.990, 0.91),
    (0.2, 0.33, 0.988, 0.86),
    (0.3, 0.288, 0.986, 0.81),
    (0.5, 0.22, 0.936, 0.66),
    (0.8, 0.13, 0.83, 0.42),
    (1.2, 0.05, 0.64, 0.2),
]


@dataclass
class Seen:
    """What the service was asked, and how many streams are open."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    active: int = 0
    peak: int = 0
    key: str = ""
    calibrated: bool = True
    pace_s: float = 0.004


def _without_carry(a: int, b: int) -> int:
    return (a % 10 * b) % 10 + 10 * ((a // 10 * b) % 10)


def _without_borrow(a: int, b: int) -> int:
    return (a % 10 - b % 10) % 10 + 10 * ((a // 10 - b // 10) % 10)


def _work(phrase: str, value: int, exact: bool) -> tuple[str, int, bool]:
    """The written form of one operation, its result, and whether it is hard for the small model."""
    number = int(found.group()) if (found := re.search(r"\d+", phrase)) else 0
    if phrase == "double":
        return f"dbl {value:02d}", value * 2 % 100, False
    if phrase == "reverse":
        return f"rev {value:02d}", int(f"{value:02d}"[::-1]), False
    if phrase.startswith("times"):
        made = value * number % 100 if exact else _without_carry(value, number)
        return f"{value:02d} * {number:02d}", made, True
    if phrase.startswith("remainder"):
        return f"{value:02d} % {number:02d}", value % number if exact else 0, True
    if phrase.startswith("at least"):
        return f"max {value:02d} {number:02d}", max(value, number), False
    if phrase.startswith("plus"):
        return f"{value:02d} + {number:02d}", (value + number) % 100, number > 9
    made = (value - number) % 100 if exact else _without_borrow(value, number)
    return f"{value:02d} - {number:02d}", made, number > 9


class Solution:
    """One answer being written: who writes the next step, and what everything cost."""

    def __init__(self, query: str, model: str, cost_weight: float) -> None:
        operations = re.findall(r"([A-H]): ([a-z ]+(?:\d+)?)", query)
        self.query, self.model, self.cost_weight = query, model, cost_weight
        self.operations = [(label, phrase.strip()) for label, phrase in operations] or [("A", "double")]
        self.value = int(found.group(1)) if (found := re.search(r"Start with (\d+)", query)) else 21
        self.written = len(query) // 3
        self.prompt = self.written
        self.known = {"small": 0, "large": 0}
        self.steps: list[dict[str, Any]] = []
        self.usage = [0, 0]
        self.flops = 0.0

    def decide(self, hard: bool) -> tuple[str, dict[str, float]]:
        logit = (2.6 if hard else -5.5) - 2.2 * math.log(max(self.cost_weight, 1e-6) / 0.3)
        large = 1 / (1 + math.exp(-max(min(logit, 30), -30)))
        if self.model in FLOPS_PER_TOKEN:
            large = float(self.model == "large")
        return ("large" if large > 0.5 else "small"), {"small": round(1 - large, 4), "large": round(large, 4)}

    def next_step(self) -> dict[str, Any]:
        index = len(self.steps)
        if index == len(self.operations):
            model, probabilities = self.decide(False)
            text = f"Answer: {self.value:02d}"
        else:
            label, phrase = self.operations[index]
            model, probabilities = self.decide(_work(phrase, self.value, True)[2])
            left, self.value, _ = _work(phrase, self.value, model == "large")
            text = f"{label}: {left} = {self.value:02d}"
        if "[hostile]" in self.query and index == 0:
            text = HOSTILE
        tokens = max(len(text) // 2, 4)
        prefilled = self.written - self.known[model]
        flops = FLOPS_PER_TOKEN[model] * (tokens + prefilled)
        if self.model not in FLOPS_PER_TOKEN:
            flops += ROUTER_FLOPS * tokens
        self.usage = [self.usage[0] + prefilled, self.usage[1] + tokens]
        self.flops += flops
        self.written += tokens
        self.known[model] = self.written
        degraded = "[degraded]" in self.query and index == 1
        step = {"choice": 0, "index": index, "model": model, "probability": probabilities[model]}
        step |= {"probabilities": probabilities, "router_version": 30, "text": text, "tokens": tokens, "discarded": 0}
        step |= {"confidence": 0.99, "confidence_min": 0.9, "flops": flops, "milliseconds": tokens * 1.1}
        step |= {"degraded": degraded, "capped": False}
        self.steps.append(step)
        return step

    @property
    def done(self) -> bool:
        return len(self.steps) > len(self.operations)

    def summary(self) -> dict[str, Any]:
        by_model = {name: sum(step["model"] == name for step in self.steps) for name in FLOPS_PER_TOKEN}
        alone = FLOPS_PER_TOKEN["large"] * self.written
        facts = {"router": "router-v30", "router_version": 30, "cost_weight": self.cost_weight, "steps": by_model}
        facts |= {"large_share": by_model["large"] / len(self.steps), "flops": self.flops, "flops_large_only": alone}
        facts |= {"flops_saved": alone - self.flops, "degraded": any(step["degraded"] for step in self.steps)}
        return {"event": "summary", **facts, "ends": ["answer"]}


def _info(seen: Seen) -> dict[str, Any]:
    def around(value: float, margin: float) -> list[float]:
        return [value, max(value - margin, 0.0), min(value + margin, 1.0)]

    points = [
        {
            "cost_weight": weight,
            "large_share": around(share, 0.021),
            "accuracy": around(accuracy, 0.002 + 0.1 * (1 - accuracy)),
            "flops_ratio": [ratio, ratio - 0.03, ratio + 0.03],
        }
        for weight, share, accuracy, ratio in POINTS
    ]
    return {
        "models": [
            {"name": name, "parameters": int(flops / 2), "flops_per_token": flops}
            for name, flops in FLOPS_PER_TOKEN.items()
        ],
        "routers": ["router-v30"],
        "default": "router-v30",
        "cost_weight": {"default": 0.2449, "low": 0.05, "high": 1.2},
        "calibration": {"queries": 500, "confidence": 0.95, "points": points} if seen.calibrated else None,
        "limits": {"max_body_bytes": 262144},
        "examples": EXAMPLES,
        "needs_key": bool(seen.key),
    }


def _problem(status: int, kind: str, message: str, param: str | None = None, **headers: str) -> Response:
    error = {"message": message, "type": kind, "param": param, "code": None}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": error}, status, {"x-request-id": "req-stub", **headers})


def _refusal(body: dict[str, Any], query: str) -> Response | None:
    if "[full]" in query:
        return _problem(429, "rate_limit_error", "All 8 places are taken; try again.", retry_after="2")
    if "[bad]" in query:
        return _problem(400, "invalid_request_error", "cost_weight must be at least 0.", "routing.cost_weight")
    allowed = {"model", "messages", "stream", "stream_options", "routing"}
    if unknown := set(body) - allowed:
        return _problem(400, "invalid_request_error", f"Unknown field {sorted(unknown)[0]}.", sorted(unknown)[0])
    return None


def _frame(value: dict[str, Any] | str) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


def _chunk(delta: dict[str, Any] | None, **more: Any) -> str:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": more.pop("finish", None)}]
    return _frame({"id": "c-1", "object": "chat.completion.chunk", "model": "auto", "choices": choices, **more})


async def _write(solution: Solution, pace_s: float) -> AsyncIterator[str]:
    """The frames of one streamed answer with the trace."""
    yield _chunk({"role": "assistant", "content": ""})
    while not solution.done:
        step = solution.next_step()
        slow = 4.0 if step["model"] == "large" else 1.0
        start = ("choice", "index", "model", "probability", "probabilities", "router_version", "degraded")
        if step["index"]:
            yield _chunk({"content": "\n\n"})
        yield _chunk({}, routing={"event": "step_start", **{name: step[name] for name in start}})
        for begin in range(0, len(step["text"]), 3):
            await asyncio.sleep(pace_s * slow)
            yield _chunk({"content": step["text"][begin : begin + 3]})
        yield _chunk({}, routing={"event": "step_end", **step})
        if step["index"] == 1 and "[lost]" in solution.query:
            return
        if step["index"] == 1 and "[broken]" in solution.query:
            error = {"message": "Every model is unavailable.", "type": "server_error", "param": None, "code": None}
            yield _frame({"error": error})
            return
    yield _chunk({}, finish="stop")
    read, written = solution.usage
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    yield _chunk(None, usage=usage, routing=solution.summary())
    yield _frame("[DONE]")


async def _bytes(frames: AsyncIterator[str], seen: Seen, split: bool) -> AsyncIterator[bytes]:
    """Frames as they go out; `split` cuts them into pieces of two bytes, with CRLF line ends and a comment."""
    seen.active += 1
    seen.peak = max(seen.peak, seen.active)
    try:
        async for frame in frames:
            if not split:
                yield frame.encode()
                continue
            data = (": keep-alive\n\n" + frame).replace("\n", "\r\n").encode()
            for begin in range(0, len(data), 2):
                yield data[begin : begin + 2]
                if data[begin + 2 : begin + 3] and data[begin + 2] & 0xC0 == 0x80:
                    await asyncio.sleep(0.02)  # so that half a character reaches the browser on its own
    finally:
        seen.active -= 1


def make_stub(seen: Seen) -> FastAPI:
    """The service; what it was asked is noted in `seen`."""
    app = FastAPI()

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"content-security-policy": POLICY})

    @app.get("/v1/routing/info")
    async def info() -> dict[str, Any]:
        return _info(seen)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        seen.bodies.append(body)
        if seen.key and request.headers.get("authorization") != f"Bearer {seen.key}":
            return _problem(401, "authentication_error", "This service needs an API key.")
        query = body["messages"][-1]["content"]
        if refusal := _refusal(body, query):
            return refusal
        solution = Solution(query, body["model"], body.get("routing", {}).get("cost_weight", 0.2449))
        frames = _write(solution, 0.3 if "[slow]" in query else seen.pace_s)
        return StreamingResponse(_bytes(frames, seen, "[split]" in query), media_type="text/event-stream")

    return app
