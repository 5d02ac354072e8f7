"""Makes one step of an episode: peeks, generates, goes on with another model where one is gone, charges for it all."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult, stream_step
from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.observation import measure_confidence
from roro_ray.routing.transcript import Page
from roro_ray.routing.watch import EpisodeOptions, ShownText
from roro_ray.types import Decision, Peek, Step

if TYPE_CHECKING:
    from roro_ray.engines.pool import EnginePool


@dataclass(slots=True)
class StepWriter:
    """The step that follows a page, of at most `max_tokens` tokens; `seed` fixes its draws."""

    pool: EnginePool
    ledger: CostLedger
    temperature: float
    seed: int
    page: Page
    max_tokens: int
    index: int = 0
    options: EpisodeOptions = field(default_factory=EpisodeOptions)
    _shown: ShownText | None = None
    _drafted: int = 0  # tokens of the draft that the model asked last continues
    _lost: int = 0  # tokens that the model asked last wrote before it was gone
    _told: int = 0  # tokens by models that are gone whose text was told, and so stays

    def __post_init__(self) -> None:
        watcher = self.options.watcher
        if watcher is not None and watcher.wants_text:
            self._shown = ShownText(watcher, self.index)

    async def peek(self, peek: Peek) -> StepResult | None:
        """The part of the cheapest model's next step that the policy wants to see.

        Raises:
            EngineError: the cheapest model failed; EngineUnavailableError where it is gone.
        """
        if peek == Peek.NONE:
            return None
        request = self._request(0, 1 if peek == Peek.FIRST_TOKEN else self.max_tokens)
        result = await self.pool.engines[0].generate_step(request)
        self.page.note(0, result)
        self.ledger.charge_generation(0, result)
        return result

    async def write(
        self, decision: Decision, draft: StepResult | None = None, features: tuple[float, ...] = ()
    ) -> tuple[Step, StepResult]:
        """The step by the model decided on, continuing the draft where that model made it; and how its engine put it.

        Raises:
            EngineError: the model failed; EngineUnavailableError where no model can be had.
        """
        discarded = 0 if draft is None or decision.model == 0 else len(draft.token_ids)
        kept = draft if decision.model == 0 else None
        degraded = False
        try:
            result = await self._write_with(decision.model, kept)
        except EngineUnavailableError as error:
            if not self.options.rescue:
                raise
            decision, result = await self._rescue(decision, error)
            degraded = True
        if self._shown is not None:
            self._shown.finish(result.text)
        tokens = self._told + len(result.token_ids)
        confidence, confidence_min = measure_confidence(result.log_probs)
        step = Step(
            model=decision.model,
            text=result.text,
            tokens=tokens,
            confidence=confidence,
            confidence_min=confidence_min,
            finish=result.finish,
            decision=decision,
            usage=self.ledger.commit(decision.model, len(result.token_ids)),
            discarded=discarded,
            features=features,
            degraded=degraded,
        )
        return step, result

    async def _write_with(self, model: int, draft: StepResult | None) -> StepResult:
        if draft is not None and (draft.finish != "length" or len(draft.token_ids) >= self.max_tokens):
            return draft
        kept_ids = draft.token_ids if draft is not None else ()
        request = replace(self._request(model, self.max_tokens), kept_ids=kept_ids)
        self._drafted = len(kept_ids)
        if self._shown is not None and draft is not None:
            self._shown.feed(draft.text.rstrip("\ufffd"))  # the stream tells an unfinished character anew
        result = await self._generate(model, request)
        self.page.note(model, result)
        self.ledger.charge_generation(model, result, len(kept_ids))
        return result

    def _request(self, model: int, max_tokens: int) -> StepRequest:
        return self.page.ask(model, max_tokens, self.temperature, mix_seed(self.seed, model), self.options.top_p)

    async def _generate(self, model: int, request: StepRequest) -> StepResult:
        engine = self.pool.engines[model]
        if self._shown is None:
            return await engine.generate_step(request)
        self._lost = 0
        stream = cast("AsyncGenerator[StepDelta | StepResult, None]", stream_step(engine, request))
        async with aclosing(stream) as parts:
            async for part in parts:
                if isinstance(part, StepResult):
                    return part
                self._lost += len(part.token_ids)
                self._shown.feed(part.text)
        raise EngineUnavailableError(f"model {engine.name!r} ended a stream without a result: ask another replica")

    async def _rescue(self, decision: Decision, error: EngineUnavailableError) -> tuple[Decision, StepResult]:
        """Another model goes on from the last text that was told; nothing of it is taken back or said twice."""
        for model in nearest_models(decision.model, self.pool.size):
            self.ledger.charge_lost(decision.model, self._lost)
            told = self._shown.take_back() if self._shown is not None else ""
            self._told = self._told + self._drafted + self._lost if told else 0
            self._drafted = self._lost = 0
            decision = replace(decision, model=model, log_prob=0.0, version=-1)
            if self.options.watcher is not None:
                self.options.watcher.on_decision(self.index, decision, True)
            try:
                return decision, await self._continue(model, told)
            except EngineUnavailableError as another:
                error = another
        raise error

    async def _continue(self, model: int, told: str) -> StepResult:
        """The step by `model` after `told`, which others wrote."""
        request = self._request(model, max(self.max_tokens - self._told, 1))
        result = await self._generate(model, replace(request, prefix=request.prefix + told))
        self.ledger.charge_generation(model, result)
        return replace(result, text=told + result.text, exact=False)


def nearest_models(model: int, pool_size: int) -> list[int]:
    """The other models of the pool, nearest first; of two equally near ones the dearer."""
    others = [other for other in range(pool_size) if other != model]
    return sorted(others, key=lambda other: (abs(other - model), -other))
