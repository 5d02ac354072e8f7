"""What an endpoint's reply says, read leniently: every server leaves something out, and some tell more than asked.

A reply is one JSON object of /completions or /chat/completions, or the chunks of a stream of them. Token ids are not in
it, so an engine of this kind hands out its own: numbers that spell their token's text, by which a kept peek can be
continued in any process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roro_ray.errors import EngineError

Json = Mapping[str, Any]
_CHARACTERS_PER_TOKEN = 4  # where nothing tells the number of tokens
_CACHED = ("cached_tokens", "prompt_cache_hit_tokens")


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token written: its text, its log-probability, and those of the likeliest alternatives (text, value)."""

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class Reply:
    """One reply, or what came of it so far. `reason` is the endpoint's finish_reason.

    `stop` is the stop string met where the server tells it (`tells_stop`; None then is the end of sequence), and
    `ends` why the answer ended where the endpoint is one of ours. `thought`: text came as separated thinking.
    """

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    reason: str | None = None
    tells_stop: bool = False
    stop: str | None = None
    ends: str | None = None
    thought: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    chunks: int = 0

    def add(self, reply: Json) -> str:
        """Take a whole reply or one chunk; gives its text."""
        usage = reply.get("usage")
        if isinstance(usage, Mapping):
            self._add_usage(usage)
        routing = reply.get("routing")
        if isinstance(routing, Mapping) and routing.get("ends"):
            self.ends = str(routing["ends"][0])
        choices = reply.get("choices")
        return self._add_choice(choices[0]) if isinstance(choices, Sequence) and choices else ""

    def _add_usage(self, usage: Json) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage.get(name), int):
                setattr(self, name, usage[name])
        details = usage.get("prompt_tokens_details")
        for name in _CACHED:
            for place in (usage, details if isinstance(details, Mapping) else {}):
                if isinstance(place.get(name), int):
                    self.cached_tokens = place[name]

    def _add_choice(self, choice: Json) -> str:
        message = choice.get("message") or choice.get("delta") or {}
        text = choice.get("text") if "text" in choice else message.get("content")
        self.thought = self.thought or any(message.get(name) for name in ("reasoning_content", "reasoning"))
        found = read_scores(choice.get("logprobs"))
        self.scores += found
        self.text += text or ""
        self.chunks += bool(text)
        if choice.get("finish_reason"):
            self.reason = str(choice["finish_reason"])
        for name in ("stop_reason", "matched_stop"):
            if name in choice:
                self.tells_stop = True
                self.stop = choice[name] if isinstance(choice[name], str) else self.stop
        return text or ""

    @property
    def tokens(self) -> int:
        """Tokens written, as billed; else as many as were told; else an estimate."""
        if self.completion_tokens is not None:
            return max(self.completion_tokens, 0)
        return len(self.scores) or max(self.chunks, math.ceil(len(self.text) / _CHARACTERS_PER_TOKEN))


def read_scores(logprobs: Any) -> list[TokenScore]:
    """The tokens of a choice's `logprobs`, of either kind; none where it is missing or of another shape."""
    if not isinstance(logprobs, Mapping):
        return []
    if isinstance(logprobs.get("content"), Sequence):
        return [
            TokenScore(
                str(item.get("token", "")),
                float(item["logprob"]),
                tuple((str(top.get("token", "")), float(top["logprob"])) for top in item.get("top_logprobs") or ()),
            )
            for item in logprobs["content"]
            if isinstance(item, Mapping) and item.get("logprob") is not None
        ]
    values = logprobs.get("token_logprobs")
    if not isinstance(values, Sequence):
        return []
    tokens = logprobs.get("tokens") or [""] * len(values)
    tops = logprobs.get("top_logprobs") or [None] * len(values)
    return [
        TokenScore(str(token), float(value), tuple((str(k), float(v)) for k, v in (top or {}).items()))
        for token, value, top in zip(tokens, values, tops, strict=False)
        if value is not None
    ]


def measure_entropy(score: TokenScore | None) -> float:
    """Entropy in nats of a token's distribution: of its alternatives told, and of the rest as one lump; else NaN."""
    if score is None or len(score.top) < 2:
        return math.nan
    told = [math.exp(min(value, 0.0)) for _, value in score.top]
    rest = max(1.0 - sum(told), 0.0)
    return -sum(p * math.log(p) for p in (*told, rest) if p > 0)


def read_finish(reply: Reply, delimiter: str, stops: Iterable[str]) -> tuple[str, str]:
    """(finish, stop string met) of a finished reply.

    Where the endpoint calls both the end of sequence and a stop string "stop", it is taken for the delimiter: at the
    true end the next step comes back empty, and an empty step ends an episode.

    Raises:
        EngineError: the endpoint took the text back (a content filter).
    """
    if reply.reason == "length":
        return "length", ""
    if reply.reason in ("content_filter", "error"):
        raise EngineError(
            f"the endpoint ended a text with finish_reason {reply.reason!r}: it does not let this text pass"
        )
    if reply.tells_stop:
        met = reply.stop
        if met is None:
            return "stop", ""
        return ("delimiter" if met == delimiter else "marker" if met in stops else "stop"), met
    if reply.ends is not None:
        return ("delimiter", delimiter) if reply.ends == "stop_string" and delimiter else ("stop", "")
    return ("delimiter", delimiter) if delimiter else ("stop", "")


def make_handle(text: str) -> int:
    """A number that spells a token's text; 0 spells nothing."""
    return int.from_bytes(b"\1" + text.encode("utf-8", "surrogatepass"), "big") if text else 0


def spell(handles: Iterable[int]) -> str:
    """The text that handles spell.

    Raises:
        EngineError: one of them is no handle of ours.
    """
    return "".join(map(_spell_one, handles))


def _spell_one(handle: int) -> str:
    if handle == 0:
        return ""
    try:
        raw = handle.to_bytes((handle.bit_length() + 7) // 8, "big")
        if raw[0] == 1:
            return raw[1:].decode("utf-8", "surrogatepass")
    except (OverflowError, UnicodeDecodeError):
        pass
    raise EngineError(f"kept id {handle} spells no text: kept ids must come from an engine of the same kind")


def make_handles(text: str, tokens: int, pieces: Sequence[str] = ()) -> tuple[int, ...]:
    """As many handles as tokens that together spell a text: token by token where the pieces are known to spell it."""
    spelt = 0
    handles = []
    for piece in pieces[:tokens]:
        if not text.startswith(piece, spelt) or "\ufffd" in piece:
            break
        handles.append(make_handle(piece))
        spelt += len(piece)
    rest = text[spelt:]
    if rest and len(handles) == tokens and handles:
        rest = _spell_one(handles.pop()) + rest
    if rest:
        handles.append(make_handle(rest))
    return (*handles, *[0] * (tokens - len(handles)))
