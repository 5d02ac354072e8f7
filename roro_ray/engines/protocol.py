"""What every engine can do: write one step, whole or as it comes, score given continuations, say when it is ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, cast


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Ask for the next step after `prefix` (the query and the steps so far, ending with the step delimiter).

    `kept_ids` are token ids of a kept peek, as this engine returned them: the step continues them, and the
    result contains them. `max_tokens` bounds the whole step, kept ids included. Greedy where `temperature`
    is 0; otherwise `seed` fixes the draw, whatever else is in the batch, among the most probable tokens that
    together reach `top_p`, in (0, 1] (the nucleus of the distribution at that temperature).
    """

    prefix: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    kept_ids: tuple[int, ...] = ()
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step as an engine wrote it.

    `text` has no delimiter and no end-of-sequence; `token_ids` and `log_probs` (natural logarithms at
    temperature 1) hold every token decoded, the delimiter or end-of-sequence included. `finish` is
    `delimiter`, `stop` (end of sequence) or `length`. `prefix_tokens` is the length of the prefix in this
    engine's tokens; `first_entropy` the entropy in nats of the first token's distribution.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str
    prefix_tokens: int
    first_entropy: float


@dataclass(frozen=True, slots=True)
class StepDelta:
    """What came of a step since the last delta: tokens, and the text that is certain by now.

    Certain text is never part of a delimiter that may be forming, never half a character, never an
    end-of-sequence. It may lag behind the tokens, or be empty.
    """

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """For each continuation: the sum of its tokens' log-probabilities, their number, and the smallest one."""

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    min_log_probs: tuple[float, ...]
    prefix_tokens: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a loaded engine says of itself; `flops_per_token` is 2 x parameters."""

    name: str
    model: str
    device: str
    parameters: int
    flops_per_token: float
    seconds: float
    fingerprint: str


class Engine(Protocol):
    """A model that writes steps. The constructor stores; `ready` loads and may be called again at no cost."""

    name: str

    async def ready(self) -> EngineFacts:
        """Load the model and tell its facts.

        Raises:
            EngineError: the model directory is missing, incomplete or has no tokenizer.
        """
        ...

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step; concurrent calls are batched and do not change each other's result."""
        ...

    async def score_choices(self, prefix: str, choices: tuple[str, ...]) -> ChoiceScores:
        """Score given continuations of a prefix without generating."""
        ...


class StreamingEngine(Engine, Protocol):
    """An engine that also tells a step while it writes it."""

    def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """Deltas, any number of them, and as the last item the result that `generate_step` would have given.

        Kept ids and the deltas' tokens are the beginning of the result's tokens. The kept ids' text, without an
        unfinished character at its end, and the deltas' texts are the beginning of the result's text: what is
        missing of it is known with the result only. Closing the iterator gives the step up.
        """
        ...


def stream_step(engine: Engine, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
    """A step as the engine writes it, or whole from an engine that does not stream."""
    if hasattr(engine, "stream_step"):
        return cast(StreamingEngine, engine).stream_step(request)
    return _stream_whole(engine, request)


async def _stream_whole(engine: Engine, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
    yield await engine.generate_step(request)
