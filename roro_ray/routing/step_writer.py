"""Makes one step of an episode: peeks, generates, goes on with another model where one is gone, charges for it all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult, stream_step
from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.observation import measure_confidence
from roro_ray.routing.watch import EpisodeOptions, ShownText
from roro_ray.types import Decision, Peek, Step

if TYPE_CHECKING:
    from roro_ray.engines.pool import EnginePool


@dataclass(slots=True)
class StepWriter:
    """The step after `prefix`, of at most `max_tokens` tokens; `seed` fixes its draws."""

    pool: EnginePool
    ledger: CostLedger
    temperature: float
    seed: int
    prefix: str
    max_tokens: int
    index: int = 0
    options: EpisodeOptions = field(default_factory=EpisodeOptions)
    _shown: ShownText | None = None
    _lost: list[int] = field(default_factory=list)  # token ids that a model wrote before it was gone

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
        self.ledger.charge_generation(0, result)
        return result

    async def write(self, decision: Decision, draft: StepResult | None, features: tuple[float, ...]) -> Step:
        """The step by the model decided on, continuing the draft where that model made it.

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
        tokens = len(result.token_ids)
        confidence, confidence_min = measure_confidence(result.log_probs)
        return Step(
            model=decision.model,
            text=result.text,
            tokens=tokens,
            confidence=confidence,
            confidence_min=confidence_min,
            finish=result.finish,
            decision=decision,
            usage=self.ledger.commit(decision.model, tokens),
            discarded=discarded,
            features=features,
            degraded=degraded,
        )

    async def _write_with(self, model: int, draft: StepResult | None) -> StepResult:
        if draft is not None and (draft.finish != "length" or len(draft.token_ids) >= self.max_tokens):
            return draft
        kept_ids = draft.token_ids if draft is not None else ()
        request = self._request(model, self.max_tokens, kept_ids)
        if self._shown is not None and draft is not None:
            self._shown.feed(draft.text.rstrip("\ufffd"))  # the stream tells an unfinished character anew
        result = await self._generate(model, request)
        self.ledger.charge_generation(model, result, len(kept_ids))
        return result

    def _request(self, model: int, max_tokens: int, kept_ids: tuple[int, ...] = ()) -> StepRequest:
        seed = mix_seed(self.seed, model)
        return StepRequest(self.prefix, max_tokens, self.temperature, seed, kept_ids, self.options.top_p)

    async def _generate(self, model: int, request: StepRequest) -> StepResult:
        engine = self.pool.engines[model]
        if self._shown is None:
            return await engine.generate_step(request)
        self._lost.clear()
        async for part in stream_step(engine, request):
            if isinstance(part, StepDelta):
                self._lost.extend(part.token_ids)
                self._shown.feed(part.text)
            else:
                return part
        raise EngineUnavailableError(f"model {engine.name!r} ended a stream without a result: ask another replica")

    async def _rescue(self, decision: Decision, error: EngineUnavailableError) -> tuple[Decision, StepResult]:
        """Another model goes on from the last text that was told; nothing of it is taken back or said twice."""
        for model in nearest_models(decision.model, self.pool.size):
            self.ledger.charge_lost(decision.model, len(self._lost))
            told = self._shown.text if self._shown is not None else ""
            lost = len(self._lost) if told else 0
            decision = replace(decision, model=model, log_prob=0.0, version=-1)
            if self.options.watcher is not None:
                self.options.watcher.on_decision(self.index, decision, True)
            try:
                return decision, await self._continue(model, told, lost)
            except EngineUnavailableError as another:
                error = another
        raise error

    async def _continue(self, model: int, told: str, lost: int) -> StepResult:
        """The step by `model` after `told`, which another one wrote in `lost` tokens."""
        request = self._request(model, max(self.max_tokens - lost, 1))
        result = await self._generate(model, replace(request, prefix=self.prefix + told))
        self.ledger.charge_generation(model, result)
        return replace(result, text=told + result.text)


def nearest_models(model: int, pool_size: int) -> list[int]:
    """The other models of the pool, nearest first; of two equally near ones the dearer."""
    others = [other for other in range(pool_size) if other != model]
    return sorted(others, key=lambda other: (abs(other - model), -other))


def certain_decision(model: int, pool_size: int) -> Decision:
    """A decision that no policy took, since it could not be asked."""
    return Decision(model, 0.0, tuple(float(index == model) for index in range(pool_size)), signal=math.nan)
