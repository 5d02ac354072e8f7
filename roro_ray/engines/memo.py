"""What greedy decoding wrote before: asked again, it would write the same.

Only one run is kept for each prefix (and adapter, and way to end), the longest known: a shorter token limit is answered
by cutting it, a kept peek that agrees with it is answered by it. Prefixes are held as 16-byte digests, since texts
would dominate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.protocol import ChoiceScores, StepRequest, StepResult
from roro_ray.engines.scoring import ScoreRequest

_USUAL = (STEP_DELIMITER, (), 0, "")  # how most steps end, and under which adapter


class GreedyMemo:
    """At most `entries` greedy steps by prefix, the oldest forgotten first; 0 entries remember nothing.

    `render` turns the token ids of an unfinished step into its text.
    """

    def __init__(self, entries: int, render: Callable[[tuple[int, ...]], str]):
        self._entries = entries
        self._render = render
        self._steps: dict[bytes, StepResult] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def find(self, request: StepRequest) -> StepResult | None:
        """The result that decoding this request would give, or None where that is not known."""
        if request.temperature > 0 or not self._entries:
            return None
        known = self._steps.get(_digest_step(request))
        if known is None or known.token_ids[: len(request.kept_ids)] != request.kept_ids:
            return None
        length = len(known.token_ids)
        if request.max_tokens < length:
            return self._cut(known, request.max_tokens)
        # An unfinished run answers its own limit only: with more tokens to go it would have gone on.
        return known if known.finish != "length" or request.max_tokens == length else None

    def keep(self, request: StepRequest, result: StepResult) -> None:
        """Remember a decoded greedy step, unless a longer run of the same prefix is known."""
        if request.temperature > 0 or not self._entries or not self._is_greedy(request):
            return
        digest = _digest_step(request)
        known = self._steps.get(digest)
        if known is not None and len(known.token_ids) >= len(result.token_ids):
            return
        while known is None and len(self._steps) >= self._entries:
            self._steps.pop(next(iter(self._steps)), None)
        self._steps[digest] = result

    def _is_greedy(self, request: StepRequest) -> bool:
        """Whether the kept ids are what greedy decoding wrote (only a run that we saw tells)."""
        if not request.kept_ids:
            return True
        known = self._steps.get(_digest_step(request))
        return known is not None and known.token_ids[: len(request.kept_ids)] == request.kept_ids

    def _cut(self, known: StepResult, length: int) -> StepResult:
        ids = known.token_ids[:length]
        return StepResult(
            text=self._render(ids),
            token_ids=ids,
            log_probs=known.log_probs[:length],
            finish="length",
            prefix_tokens=known.prefix_tokens,
            first_entropy=known.first_entropy,
        )


class ScoreMemo:
    """At most `entries` scored requests, the oldest forgotten first: scoring draws nothing, so it repeats itself."""

    def __init__(self, entries: int):
        self._entries = entries
        self._scores: dict[bytes, ChoiceScores] = {}

    def find(self, request: ScoreRequest) -> ChoiceScores | None:
        """The scores that this request would get, or None where that is not known."""
        return self._scores.get(_digest_choices(request)) if self._entries else None

    def keep(self, request: ScoreRequest, scores: ChoiceScores) -> None:
        """Remember the scores of a request."""
        if self._entries:
            while len(self._scores) >= self._entries:
                self._scores.pop(next(iter(self._scores)), None)
            self._scores[_digest_choices(request)] = scores


def _digest_step(request: StepRequest) -> bytes:
    stops = tuple(filter(None, request.stops))
    if (request.delimiter, stops, request.min_tokens, request.adapter) == _USUAL:
        return _digest(request.prefix)
    return _digest_all((request.prefix, request.adapter, str(request.min_tokens), request.delimiter, *stops))


def _digest_choices(request: ScoreRequest) -> bytes:
    return _digest_all((request.prefix, request.adapter, *request.choices))


def _digest_all(parts: tuple[str, ...]) -> bytes:
    # Each part by its own digest, so that no two requests can run together into one text.
    return hashlib.blake2b(b"".join(map(_digest, parts)), digest_size=16).digest()


def _digest(prefix: str) -> bytes:
    return hashlib.blake2b(prefix.encode("utf-8", "surrogatepass"), digest_size=16).digest()
