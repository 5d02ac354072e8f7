"""The Rubricor as a real language model behind an engine: a LoRA adapter that writes JSON under a schema.

It sees the query alone. One call writes a whole rubric; an engine with structured output decodes under the schema, and
whatever comes is read as strictly as any rubric. What fails or does not parse is a value, to be punished or written
again, and never an exception in the middle of a batch.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from roro_ray.engines.formats import PLAIN, PromptFormat
from roro_ray.engines.protocol import Engine, StepRequest, StepResult
from roro_ray.errors import EngineError, EngineUnavailableError
from roro_ray.reward.prompts import is_chat, make_rubric_prompt, make_rubric_schema
from roro_ray.reward.rubric import ReadRubric, read_rubric
from roro_ray.types import Query, Rubric

_RETRIES, _PAUSE_S = 3, 0.5
_REWRITES, _REWRITE_TEMPERATURE = 3, 0.7
_SEED_STRIDE = 1009
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RubricSample:
    """One text of the Rubricor, or why there is none; `result` holds its tokens and their log-probabilities."""

    query: Query
    prompt: str
    result: StepResult | None
    error: str | None = None


async def generate_with_retries(engine: Engine, request: StepRequest) -> StepResult:
    """A step, asked for again after a pause while the model is not to be had.

    Raises:
        EngineError: the engine failed, or was gone too long.
    """
    for attempt in range(_RETRIES):
        try:
            return await engine.generate_step(request)
        except EngineUnavailableError:
            await asyncio.sleep(_PAUSE_S * 2**attempt)
    return await engine.generate_step(request)


def strip_fence(text: str) -> str:
    """The text without a Markdown code fence round all of it, in which chat models like to put JSON."""
    match = _FENCE.fullmatch(text)
    return match[1] if match else text


class EngineRubricor:
    """Writes rubrics through an engine; `version` is that of the adapter's weights.

    Args:
        adapter: name of the Rubricor's adapter in the engine; empty: the base model writes.
        form: the engine's format (`EngineFacts.format`).
        max_tokens: of one rubric.
        concurrency: rubrics in flight.
    """

    def __init__(
        self,
        engine: Engine,
        version: int = 0,
        adapter: str = "",
        form: PromptFormat = PLAIN,
        criteria: tuple[int, int] = (3, 7),
        max_tokens: int = 512,
        concurrency: int = 64,
    ) -> None:
        self.engine = engine
        self.version = version
        self.adapter = adapter
        self.form = form
        self.criteria = criteria
        self.max_tokens = max_tokens
        self._schema = make_rubric_schema(*criteria) if is_chat(form) else ""
        self._concurrency = concurrency

    def take_over(self, adapter: str, version: int) -> None:
        """Write with another version of the adapter, which the engine has loaded."""
        self.adapter, self.version = adapter, version

    async def sample(
        self, queries: Sequence[Query], n: int, seed: int, temperature: float = 1.0
    ) -> list[RubricSample]:
        """`n` texts for each query, those of one query together."""
        gate = asyncio.Semaphore(self._concurrency)

        async def write_one(query: Query, number: int) -> RubricSample:
            prompt = make_rubric_prompt(query, self.form, *self.criteria)
            request = StepRequest(
                prompt,
                self.max_tokens,
                temperature,
                seed=seed * _SEED_STRIDE + number,
                delimiter="",
                adapter=self.adapter,
                schema=self._schema,
            )
            async with gate:
                try:
                    return RubricSample(query, prompt, await generate_with_retries(self.engine, request))
                except EngineError as error:
                    return RubricSample(query, prompt, None, f"{type(error).__name__}: {error}")

        return list(await asyncio.gather(*(write_one(query, k) for query in queries for k in range(n))))

    def read(self, sample: RubricSample) -> ReadRubric:
        """The faithful rubric in a text, or why there is none."""
        if sample.result is None:
            return ReadRubric(None, error=sample.error)
        if sample.result.finish != "stop":
            error = f"rubric of query {sample.query.id!r} did not end within {self.max_tokens} tokens"
            return ReadRubric(None, error=error)
        return read_rubric(strip_fence(sample.result.text), sample.query, self.version, *self.criteria)

    async def write(self, queries: Sequence[Query], seed: int = 0) -> list[Rubric]:
        """One rubric a query: the likeliest text; where that does not parse, sampled ones, a few times.

        A query for which nothing parses gets a rubric without criteria: the Judge answers it with error verdicts,
        which are dropped and counted.
        """
        written: dict[int, Rubric] = {}
        for attempt in range(_REWRITES + 1):
            missing = [index for index in range(len(queries)) if index not in written or not written[index].criteria]
            if not missing:
                break
            temperature = _REWRITE_TEMPERATURE if attempt else 0.0
            samples = await self.sample([queries[index] for index in missing], 1, seed + attempt, temperature)
            for index, sample in zip(missing, samples, strict=True):
                text = sample.result.text if sample.result is not None else sample.error or ""
                nothing = Rubric(queries[index].id, (), text, self.version)
                written[index] = self.read(sample).rubric or nothing
        return [replace(written[index], query_id=query.id) for index, query in enumerate(queries)]
