"""The Judge as a real language model behind an engine: one question a call, verdicts from token probabilities.

Base model and Judge are one engine: the Judge is a LoRA adapter of it. The first question about a trajectory is asked
alone and the others after it, so that they find the trajectory in the engine's prefix cache. Verdicts are remembered
per (text, question) as long as the adapter's version stays. What cannot be read is an error value and never 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, StepRequest
from roro_ray.errors import ConfigError, EngineError, EngineUnavailableError
from roro_ray.reward.fitting import CountTokens, estimate_tokens
from roro_ray.reward.judge import make_error_verdict, make_verdict
from roro_ray.reward.judge_text import VERDICTS
from roro_ray.reward.prompts import JudgePrompt
from roro_ray.types import Criterion, Query, Rubric, Trajectory, Verdict

_MEMO_ENTRIES = 400_000
_RETRIES, _PAUSE_S = 3, 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """P(yes) and P(no), normalised over the two, and `mass`, what they have of the whole distribution together."""

    yes: float
    no: float
    mass: float


class EngineJudge:
    """Judges trajectories through an engine; `version` is that of the adapter's weights.

    Args:
        adapter: name of the Judge's adapter in the engine; empty: the base model judges.
        prompt: the engine's format and context (see `make_judge_prompt`).
        concurrency: trajectories read at once.
        by_text: read the verdict off one written word, for endpoints that cannot score continuations.
    """

    def __init__(
        self,
        engine: Engine,
        version: int = 0,
        adapter: str = "",
        prompt: JudgePrompt | None = None,
        concurrency: int = 64,
        by_text: bool = False,
    ) -> None:
        self.engine = engine
        self.adapter = adapter
        self.prompt = prompt or JudgePrompt()
        self.by_text = by_text
        self.tokens_read = 0  # prompts' tokens, cached ones included
        self.tokens_written = 0
        self._version = version
        self._concurrency = concurrency
        self._memo: dict[bytes, Reading] = {}

    @property
    def version(self) -> int:
        """Of the adapter's weights; verdicts of another version are forgotten."""
        return self._version

    def take_over(self, adapter: str, version: int) -> None:
        """Judge with another version of the adapter, which the engine has loaded."""
        if (adapter, version) != (self.adapter, self._version):
            self._memo.clear()
        self.adapter, self._version = adapter, version

    async def score(self, query: Query, trajectory: Trajectory, rubric: Rubric) -> Verdict:
        """The verdict of one trajectory; an error verdict where the engine fails or gives no probabilities."""
        if not rubric.criteria:
            return make_error_verdict(f"rubric of query {rubric.query_id!r} has no criteria", self.version)
        version = self.version
        try:
            readings = await self.read(query, trajectory, rubric.criteria)
        except (EngineError, ConfigError) as error:
            return make_error_verdict(f"{type(error).__name__}: {error}", version)
        return make_verdict(rubric, trajectory, [r.yes for r in readings], [r.no for r in readings], version)

    async def score_groups(
        self, queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]], rubrics: Sequence[Rubric]
    ) -> list[tuple[Verdict, ...]]:
        """One verdict per trajectory of each query under the query's rubric, at most `concurrency` at once."""
        gate = asyncio.Semaphore(self._concurrency)

        async def score_one(query: Query, trajectory: Trajectory, rubric: Rubric) -> Verdict:
            async with gate:
                return await self.score(query, trajectory, rubric)

        work = [
            [score_one(query, trajectory, rubric) for trajectory in group]
            for query, group, rubric in zip(queries, groups, rubrics, strict=True)
        ]
        verdicts = iter(await asyncio.gather(*(each for group in work for each in group)))
        return [tuple(next(verdicts) for _ in group) for group in groups]

    async def read(self, query: Query, trajectory: Trajectory, criteria: Sequence[Criterion]) -> list[Reading]:
        """The reading of each criterion.

        Raises:
            EngineError: the engine failed again and again, or gave no probabilities.
            ConfigError: the query alone is longer than the context.
        """
        questions = [self.prompt.make_question(criterion) for criterion in criteria]
        head = self.make_head(query, trajectory, questions)
        first = await self._read_one(head, questions[0]) if questions else None
        rest = await asyncio.gather(*(self._read_one(head, question) for question in questions[1:]))
        return [first, *rest] if first is not None else []

    def make_head(self, query: Query, trajectory: Trajectory, questions: Sequence[str]) -> str:
        """The text that the questions about a trajectory share."""
        longest = max((self.prompt.count(question) for question in questions), default=0)
        return self.prompt.make_head(query, trajectory, longest)

    async def _read_one(self, head: str, question: str) -> Reading:
        text = self.prompt.join(head, question)
        key, version = hashlib.sha256(text.encode("utf-8", "replace")).digest(), self._version
        known = self._memo.get(key)
        if known is None:
            known = await self._ask(text)
            if version == self._version:
                if len(self._memo) >= _MEMO_ENTRIES:
                    self._memo.clear()
                self._memo[key] = known
        return known

    async def _ask(self, text: str) -> Reading:
        for attempt in range(_RETRIES + 1):
            try:
                return await (self._ask_word(text) if self.by_text else self._ask_scores(text))
            except EngineUnavailableError:
                if attempt == _RETRIES:
                    raise
                await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    async def _ask_scores(self, text: str) -> Reading:
        if self.adapter:
            scores = await self.engine.score_choices(text, VERDICTS, self.adapter)
        else:
            scores = await self.engine.score_choices(text, VERDICTS)
        self.tokens_read += scores.prefix_tokens
        return read_scores(scores)

    async def _ask_word(self, text: str) -> Reading:
        request = StepRequest(text, max_tokens=4, delimiter="", adapter=self.adapter)
        result = await self.engine.generate_step(request)
        self.tokens_read += result.prefix_tokens
        self.tokens_written += len(result.token_ids)
        word = result.text.strip().strip("\"'*.!").lower()
        if word not in VERDICTS:
            raise EngineError(f"the Judge wrote {result.text[:40]!r}: expected yes or no")
        return Reading(float(word == "yes"), float(word == "no"), 1.0)


def read_scores(scores: ChoiceScores) -> Reading:
    """P(yes) and P(no) from log-probabilities, normalised over the two: a chat model spreads mass over `Yes`, ` yes`.

    Raises:
        EngineError: neither has a probability.
    """
    yes, no = scores.log_probs
    top = max(yes, no)
    if not math.isfinite(top) or math.isnan(yes) or math.isnan(no):
        raise EngineError(f"the Judge gave yes and no log-probabilities {yes} and {no}: expected a finite one")
    weight = math.exp(yes - top), math.exp(no - top)
    return Reading(weight[0] / sum(weight), weight[1] / sum(weight), math.exp(min(top, 0.0)) * sum(weight))


def make_judge_prompt(facts: EngineFacts, max_tokens: int = 0, count: CountTokens = estimate_tokens) -> JudgePrompt:
    """The prompt for an engine: its format, and the lesser of its context and `max_tokens` (0: the context alone)."""
    bounds = [bound for bound in (facts.max_context, max_tokens) if bound]
    return JudgePrompt(facts.format, min(bounds) if bounds else None, count)
