"""What every engine can do: write one step, whole or as it comes, score given continuations, say when it is ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol, cast

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.formats import PLAIN, PromptFormat
from roro_ray.errors import EngineError


@dataclass(frozen=True, slots=True)
class PrefixIds:
    """Token ids of the first `characters` characters of a prefix, in the tokens of the engine that is asked."""

    ids: tuple[int, ...]
    characters: int


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Ask for the next step after `prefix` (the query and the steps so far, ending with the step delimiter).

    `kept_ids` are token ids of a kept peek, as this engine returned them: the step continues them, and the
    result contains them. `max_tokens` bounds the whole step, kept ids included. Greedy where `temperature`
    is 0; otherwise `seed` fixes the draw, whatever else is in the batch, among the most probable tokens that
    together reach `top_p`, in (0, 1] (the nucleus of the distribution at that temperature).

    The step ends with the first `delimiter` that is complete after at least `min_tokens` tokens (earlier ones belong
    to the step; an empty `delimiter` never ends it), with one of `stops` (such as the end of a thinking block; finish
    `marker`), or with the end of sequence. `known` are the token ids of the beginning of `prefix`, where they are
    known: an engine that takes them encodes only the rest. `adapter` names a LoRA adapter that the engine has loaded
    (empty: the base model), `schema` is a JSON schema that an engine with structured output decodes under (others
    ignore it: the caller reads the text strictly anyway).
    """

    prefix: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    kept_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    known: PrefixIds | None = None
    delimiter: str = STEP_DELIMITER
    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    adapter: str = ""
    schema: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step as an engine wrote it.

    `text` has no delimiter, no marker and no end-of-sequence; `token_ids` and `log_probs` (natural logarithms at
    temperature 1) hold every token decoded, the delimiter or end-of-sequence included. `finish` is
    `delimiter`, `stop` (end of sequence), `marker` (one of the request's `stops`) or `length`. `prefix_tokens` is the
    length of the prefix in this engine's tokens, of which `cached_tokens` were not computed anew; `first_entropy` the
    entropy in nats of the first token's distribution (NaN where the engine does not tell).

    An engine that takes ids (`PrefixIds`) gives in `encoded_ids` those of the part of the prefix that it encoded
    itself, and says with `exact` that `token_ids` spell `text` and the delimiter (or marker) and nothing else.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str
    prefix_tokens: int
    first_entropy: float
    cached_tokens: int = 0
    encoded_ids: tuple[int, ...] = ()
    exact: bool = False


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
class Prices:
    """US dollars a token: read for the first time, read again (cached), and written."""

    read: float = 0.0
    cached: float = 0.0
    written: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a loaded engine says of itself.

    `flops_per_token` is 2 x the parameters that a token passes through (of a mixture of experts, the active ones).
    `tokenizer` is a digest of the vocabulary and how it is used: engines of one digest exchange token ids (empty: this
    one takes none). `format` is how its model wants a query and an unfinished answer written down.
    """

    name: str
    model: str
    device: str
    parameters: int
    flops_per_token: float
    seconds: float
    fingerprint: str
    tokenizer: str = ""
    format: PromptFormat = PLAIN
    prices: Prices = field(default_factory=Prices)
    max_context: int | None = None


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

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score given continuations of a prefix without generating, under the adapter of that name."""
        ...


class AdapterEngine(Engine, Protocol):
    """An engine that serves LoRA adapters beside its base model."""

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        """Serve the adapter in directory `path` (peft format) under `name`, in place of an older version of it.

        Requests under way end with the version that they began with. The same version again costs nothing.

        Raises:
            EngineError: the directory holds no adapter for this model.
        """
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


def check_limits(engine: str, request: StepRequest) -> None:
    """Refuse limits that contradict each other; `engine` is the name that the message gives.

    Raises:
        EngineError: names the values.
    """
    if request.max_tokens < max(1, len(request.kept_ids)):
        raise EngineError(
            f"engine {engine}: max_tokens={request.max_tokens} with {len(request.kept_ids)} kept ids: expected at "
            "least 1 and at least the number of kept ids, since it bounds the whole step"
        )
    if not 0 < request.top_p <= 1:
        raise EngineError(
            f"engine {engine}: top_p={request.top_p}: expected a number above 0 and at most 1 (1 samples from the "
            "whole distribution, temperature=0 takes the most probable token)"
        )
