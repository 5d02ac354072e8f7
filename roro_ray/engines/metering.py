"""What the calls of an engine cost: tokens and US dollars, for whoever asks it outside an episode."""

from __future__ import annotations

from dataclasses import dataclass

from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, Prices, StepRequest, StepResult


@dataclass(slots=True)
class Spent:
    """Tokens and US dollars of the calls made."""

    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    calls: int = 0


class MeteredEngine:
    """An engine that notes what its calls cost; cached tokens are billed at their own price."""

    def __init__(self, engine: Engine, prices: Prices) -> None:
        self.name = engine.name
        self.spent = Spent()
        self._engine = engine
        self._prices = prices

    async def ready(self) -> EngineFacts:
        """The engine's facts."""
        return await self._engine.ready()

    async def generate_step(self, request: StepRequest) -> StepResult:
        """A step, its tokens noted."""
        result = await self._engine.generate_step(request)
        self._note(result.prefix_tokens, result.cached_tokens, len(result.token_ids))
        return result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Scores, their tokens noted: the prefix is read once, each choice behind it."""
        scores = await self._engine.score_choices(prefix, choices, adapter)
        self._note(scores.prefix_tokens + sum(scores.tokens), 0, 0)
        return scores

    def _note(self, read: int, cached: int, written: int) -> None:
        spent, prices = self.spent, self._prices
        spent.calls += 1
        spent.tokens_in += read
        spent.tokens_cached += cached
        spent.tokens_out += written
        spent.usd += (read - cached) * prices.read + cached * prices.cached + written * prices.written
