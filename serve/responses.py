"""Completion objects and stream chunks in OpenAI's schema, with a `routing` object that says who wrote what.

Unmodified clients skip fields that they do not know, so the extension rides on the official objects; everything else
is exactly theirs. Numbers that JSON cannot hold (NaN where a step has no token) are sent as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roro_ray.config import STEP_DELIMITER
from serve.problems import ApiError, envelope
from serve.stop_filter import StopFilter as StopFilter

DONE = b"data: [DONE]\n\n"
_LENGTH_ENDS = frozenset({"step_limit", "token_limit"})


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats. `created` is in Unix seconds; `model` as the client named it."""

    id: str
    created: int
    model: str
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens prefilled and decoded by every model touched, discarded drafts included."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class StepStart:
    """A step is about to be written. `probabilities` by model name; `probability` is that of the model chosen."""

    choice: int
    index: int
    model: str
    probability: float
    probabilities: Mapping[str, float]
    router_version: int
    degraded: bool = False


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A step that was written. `capped`: max_large_steps kept a dearer model from writing it."""

    choice: int
    index: int
    model: str
    probability: float
    probabilities: Mapping[str, float]
    router_version: int
    text: str
    tokens: int
    discarded: int
    confidence: float
    confidence_min: float
    flops: float
    milliseconds: float
    degraded: bool = False
    capped: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One finished choice: its content and why the trajectory ended (`Trajectory.end`).

    `reasoning` is what stood before the answer, None for models that answer without a thinking block.
    """

    index: int
    content: str
    end: str
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class RoutingSummary:
    """All choices of one answer together.

    `steps` counts by model name; `router` and `cost_weight` are None where no router decided. `trace` is None where
    the client did not ask for it (a stream has told the steps before).
    """

    router: str | None
    router_version: int
    cost_weight: float | None
    steps: Mapping[str, int]
    large_share: float
    flops: float
    flops_large_only: float
    degraded: bool
    ends: tuple[str, ...]
    trace: tuple[StepTrace, ...] | None = None


def finish_reason(end: str) -> str:
    """OpenAI's word for a trajectory's end: `length` where a limit cut it off, else `stop`."""
    return "length" if end in _LENGTH_ENDS else "stop"


def join_steps(texts: Sequence[str]) -> str:
    """The content of an answer made of these steps."""
    return STEP_DELIMITER.join(texts)


def make_completion(
    head: Head, choices: Sequence[ChoiceResult], usage: TokenUsage, routing: RoutingSummary
) -> dict[str, Any]:
    """The chat.completion object of an answer that is not streamed."""
    return {
        **_make_head(head, "chat.completion"),
        "choices": [_make_choice(choice) for choice in choices],
        "usage": make_usage(usage),
        "routing": make_routing(routing),
    }


def make_usage(usage: TokenUsage) -> dict[str, int]:
    """The usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def make_routing(summary: RoutingSummary) -> dict[str, Any]:
    """The routing object; `flops_saved` is against the large model alone, negative where routing cost more."""
    made: dict[str, Any] = {
        "router": summary.router,
        "router_version": summary.router_version,
        "cost_weight": _number(summary.cost_weight),
        "steps": dict(summary.steps),
        "large_share": _number(summary.large_share),
        "flops": _number(summary.flops),
        "flops_large_only": _number(summary.flops_large_only),
        "flops_saved": _number(summary.flops_large_only - summary.flops),
        "degraded": summary.degraded,
        "ends": list(summary.ends),
    }
    if summary.trace is not None:
        made["trace"] = [make_step(step) for step in summary.trace]
    return made


def make_step(step: StepTrace) -> dict[str, Any]:
    """One step of the trace."""
    return {
        **_make_decision(step),
        "text": step.text,
        "tokens": step.tokens,
        "discarded": step.discarded,
        "confidence": _number(step.confidence),
        "confidence_min": _number(step.confidence_min),
        "flops": _number(step.flops),
        "milliseconds": _number(step.milliseconds),
        "degraded": step.degraded,
        "capped": step.capped,
    }


class ChunkMaker:
    """The chunks of one stream, in the order in which the client should see them.

    `include_usage`: the client asked for it, so that every chunk but the last has `"usage": null`, as OpenAI's do.
    """

    def __init__(self, head: Head, include_usage: bool = False) -> None:
        self._head = _make_head(head, "chat.completion.chunk")
        self._include_usage = include_usage

    def start(self, choice: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        return self._chunk([_make_delta(choice, {"role": "assistant", "content": ""})])

    def text(self, choice: int, text: str, thinking: bool = False) -> dict[str, Any]:
        """More content, or more of the thinking before it (`reasoning_content`, as other servers call it)."""
        return self._chunk([_make_delta(choice, {"reasoning_content" if thinking else "content": text})])

    def step_start(self, step: StepStart) -> dict[str, Any]:
        """Before a step's text, for clients that ask for the trace."""
        made = _make_decision(step) | {"degraded": step.degraded}
        return self._chunk([_make_delta(step.choice, {})], {"event": "step_start", **made})

    def step_end(self, step: StepTrace) -> dict[str, Any]:
        """After a step's text, for clients that ask for the trace."""
        return self._chunk([_make_delta(step.choice, {})], {"event": "step_end", **make_step(step)})

    def finish(self, choice: int, end: str) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk([_make_delta(choice, {}, finish_reason(end))])

    def summary(self, usage: TokenUsage | None, routing: RoutingSummary) -> dict[str, Any]:
        """The last chunk of the stream: usage where it was asked for, and the routing summary."""
        chunk = self._chunk([], {"event": "summary", **make_routing(routing)})
        if usage is not None:
            chunk["usage"] = make_usage(usage)
        return chunk

    def _chunk(self, choices: list[dict[str, Any]], routing: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": choices}
        if self._include_usage:
            chunk["usage"] = None
        if routing is not None:
            chunk["routing"] = routing
        return chunk


def sse(data: Mapping[str, Any]) -> bytes:
    """One server-sent event. ASCII only: some clients end a line at U+2028 or U+0085, which JSON may hold bare."""
    return b"data: " + json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"


def sse_error(error: ApiError) -> bytes:
    """An error amid a stream, after which the stream ends without `[DONE]`."""
    return sse(envelope(error))


def _make_head(head: Head, kind: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def _make_choice(choice: ChoiceResult) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    return {
        "index": choice.index,
        "message": message,
        "logprobs": None,
        "finish_reason": finish_reason(choice.end),
    }


def _make_delta(choice: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}


def _make_decision(step: StepStart | StepTrace) -> dict[str, Any]:
    return {
        "choice": step.choice,
        "index": step.index,
        "model": step.model,
        "probability": _number(step.probability),
        "probabilities": {name: _number(share) for name, share in step.probabilities.items()},
        "router_version": step.router_version,
    }


def _number(value: float | None) -> float | None:
    """A number as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None
