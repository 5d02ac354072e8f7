"""Small real classes that stand in for dear ones: a scripted engine that is fine, slow, failing or hanging."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.formats import PLAIN, PromptFormat
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, Prices, StepDelta, StepRequest, StepResult
from roro_ray.errors import EngineError, EngineUnavailableError
from roro_ray.types import Query

Writer = Callable[[str], str]
END = "<end>"


def write_notes(steps: int = 3, answer: str = "42") -> Writer:
    """A writer of `steps` numbered notes and then the answer; it counts the steps that the prefix holds."""

    def write(prefix: str) -> str:
        index = prefix.count(STEP_DELIMITER) - 1
        return f"{chr(65 + index)}: note {index}" if index < steps else f"Answer: {answer}"

    return write


def make_query(answer: str = "42", name: str = "q") -> Query:
    """A query that any scripted engine can take."""
    return Query(f"test/{name}", "test", "test", f"Say {name}.", answer)


class ScriptedEngine:
    """An engine whose steps are a function of the prefix, with `chars_per_token` characters a token.

    A step ends with one delimiter token, an answer with one end token. `confidence` gives the probability of
    each of a step's tokens, `approval` what `score_choices` finds of a continuation's tokens. `delay_s` makes
    it slow (spread over the tokens of a streamed step), `fails` raises on the requests for which it is true, `hangs`
    never answers them; `dies` gives the number of tokens (None: never) after which the engine is unavailable for a
    prefix. `active` counts the steps that are being written.
    """

    def __init__(
        self,
        name: str = "scripted",
        write: Writer | None = None,
        *,
        parameters: int = 10,
        chars_per_token: int = 1,
        confidence: Callable[[str], float] | float = 0.9,
        approval: Callable[[str, str], float] | float = 0.9,
        entropy: float = 0.5,
        delay_s: float = 0.0,
        fails: Callable[[str], bool] = lambda prefix: False,
        hangs: Callable[[str], bool] = lambda prefix: False,
        dies: Callable[[str], int | None] = lambda prefix: None,
    ) -> None:
        self.name = name
        self.write = write or write_notes()
        self.parameters = parameters
        self.chars_per_token = chars_per_token
        self.confidence = confidence
        self.approval = approval
        self.entropy = entropy
        self.delay_s = delay_s
        self.fails = fails
        self.hangs = hangs
        self.dies = dies
        self.active = 0
        self.requests: list[StepRequest] = []
        self.scored: list[tuple[str, str]] = []
        self._vocabulary: dict[str, int] = {}

    async def ready(self) -> EngineFacts:
        return EngineFacts(self.name, "scripted", "none", self.parameters, 2.0 * self.parameters, 0.0, self.name)

    def split(self, text: str) -> list[str]:
        """The tokens of a text; the delimiter is always one of them."""
        pieces = []
        for index, part in enumerate(text.split(STEP_DELIMITER)):
            pieces += [STEP_DELIMITER] if index else []
            pieces += [part[i : i + self.chars_per_token] for i in range(0, len(part), self.chars_per_token)]
        return pieces

    async def _behave(self, prefix: str) -> None:
        await asyncio.sleep(self.delay_s)
        await self._misbehave(prefix)

    async def _misbehave(self, prefix: str) -> None:
        if self.hangs(prefix):
            await asyncio.Event().wait()
        if self.fails(prefix):
            raise EngineError(f"engine {self.name!r} was told to fail")

    async def generate_step(self, request: StepRequest) -> StepResult:
        self.requests.append(request)
        with self._counted():
            await self._behave(request.prefix)
            result, _ = self._compose(request)
            self._die(request, len(result.token_ids) - len(request.kept_ids))
        return result

    async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """One delta for each token that is not kept, then the result."""
        self.requests.append(request)
        kept = len(request.kept_ids)
        with self._counted():
            await self._misbehave(request.prefix)
            result, pieces = self._compose(request)
            written, told = "".join(pieces[:kept]), len("".join(pieces[:kept]))
            for count, (token, piece) in enumerate(zip(result.token_ids[kept:], pieces[kept:], strict=True)):
                await asyncio.sleep(self.delay_s / (len(pieces) - kept))
                self._die(request, count)
                written += piece
                new = written.rstrip("\n")[told:]  # a newline may be the beginning of a delimiter
                told += len(new)
                yield StepDelta((token,), new)
            self._die(request, len(pieces) - kept)
        yield result

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def _die(self, request: StepRequest, tokens: int) -> None:
        limit = self.dies(request.prefix)
        if limit is not None and tokens >= limit:
            raise EngineUnavailableError(f"engine {self.name!r} was told to die after {limit} tokens")

    def _compose(self, request: StepRequest) -> tuple[StepResult, list[str]]:
        """The step, and the text of each of its tokens (none for delimiter and end)."""
        text = self.write(request.prefix)
        final = text.startswith("Answer: ")
        pieces = [*self.split(text), END if final else STEP_DELIMITER]
        cut = len(pieces) > request.max_tokens
        pieces = pieces[: request.max_tokens]
        ids = tuple(self._vocabulary.setdefault(piece, len(self._vocabulary)) for piece in pieces)
        assert ids[: len(request.kept_ids)] == request.kept_ids, "the peek handed back is not this step's beginning"
        probability = self.confidence(request.prefix) if callable(self.confidence) else self.confidence
        texts = ["" if piece in (END, STEP_DELIMITER) else piece for piece in pieces]
        result = StepResult(
            text="".join(texts),
            token_ids=ids,
            log_probs=(math.log(probability),) * len(ids),
            finish="length" if cut else "stop" if final else "delimiter",
            prefix_tokens=len(self.split(request.prefix)),
            first_entropy=self.entropy,
        )
        return result, texts

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        self.scored += [(prefix, choice) for choice in choices]
        await self._behave(prefix)
        tokens = tuple(len(self.split(choice)) for choice in choices)
        logs = tuple(
            math.log(self.approval(prefix, choice) if callable(self.approval) else self.approval) for choice in choices
        )
        return ChoiceScores(
            tuple(log * count for log, count in zip(logs, tokens, strict=True)), tokens, logs, len(self.split(prefix))
        )


class CharacterEngine:
    """An engine whose tokens are characters, and which takes and gives their ids; it ends texts as a request asks.

    `write` gives all that the model would go on to write after a prefix; behind it stands the end of sequence. The
    requests that it got are kept, and the ids that it was spared to encode must be right.
    """

    END_ID = 0

    def __init__(
        self,
        name: str,
        write: Writer,
        *,
        parameters: int = 10,
        tokenizer: str = "characters",
        format: PromptFormat = PLAIN,
        prices: Prices | None = None,
        offset: int = 0,
    ) -> None:
        self.name, self.write, self.parameters, self.offset = name, write, parameters, offset
        self.tokenizer, self.format, self.prices = tokenizer, format, prices or Prices()
        self.requests: list[StepRequest] = []

    async def ready(self) -> EngineFacts:
        return EngineFacts(
            *(self.name, "characters", "none", self.parameters, 2.0 * self.parameters, 0.0, self.name),
            tokenizer=self.tokenizer,
            format=self.format,
            prices=self.prices,
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """A character's code, moved on by `offset`, so that tokenizers differ."""
        return tuple(ord(character) + 1 + self.offset for character in text)

    async def generate_step(self, request: StepRequest) -> StepResult:
        self.requests.append(request)
        known = request.known
        if known is not None:
            assert known.ids == self.encode(request.prefix[: known.characters]), "ids that do not spell the prefix"
        text, finish, marker = self._cut(request, self.write(request.prefix))
        ids = self.encode(text + marker) + ((self.END_ID,) if finish == "stop" else ())
        return StepResult(
            text=text,
            token_ids=ids,
            log_probs=(math.log(0.9),) * len(ids),
            finish=finish,
            prefix_tokens=len(request.prefix),
            first_entropy=0.5,
            encoded_ids=self.encode(request.prefix[known.characters if known is not None else 0 :])
            if self.tokenizer
            else (),
            exact=finish != "stop",
        )

    @staticmethod
    def _cut(request: StepRequest, text: str) -> tuple[str, str, str]:
        ends = [(text.find(stop), "marker", stop) for stop in request.stops]
        if request.delimiter:
            least = max(request.min_tokens - len(request.delimiter), 0)
            ends.append((text.find(request.delimiter, least), "delimiter", request.delimiter))
        found = sorted(end for end in ends if end[0] >= 0)
        if found and found[0][0] + len(found[0][2]) <= request.max_tokens:
            at, finish, marker = found[0]
            return text[:at], finish, marker
        if len(text) >= request.max_tokens:
            return text[: request.max_tokens], "length", ""
        return text, "stop", ""

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        logs = tuple(math.log(0.9) * len(choice) for choice in choices)
        return ChoiceScores(logs, tuple(map(len, choices)), (math.log(0.9),) * len(choices), len(prefix))


def make_fake_pool(*engines: Engine) -> EnginePool:
    """A ready pool of scripted engines; two of them by default, the second ten times as large."""
    pool = EnginePool(engines or (ScriptedEngine("small"), ScriptedEngine("large", parameters=100)))
    asyncio.run(pool.ready())
    return pool


def run_specs(runner: object, specs: Sequence[object]) -> list:
    """Run episodes from a test that is not async."""
    return asyncio.run(runner.run(specs))  # type: ignore[attr-defined]
