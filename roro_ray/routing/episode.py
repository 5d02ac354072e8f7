"""The episode loop: peek, decide, write, until the query is answered or a limit is met.

One loop runs every method: the policy says what it wants to see of the cheapest model's next step. A draft
that is kept is continued (or taken as it is), never generated again; one that is thrown away is charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.data.verify import is_correct, read_answer
from roro_ray.engines.protocol import StepRequest, StepResult
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.observation import Observation, make_features, measure_confidence
from roro_ray.routing.policies import Policy
from roro_ray.types import Decision, Peek, Query, Step, Trajectory, Usage

if TYPE_CHECKING:
    from roro_ray.engines.pool import EnginePool


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What to roll out: a query under a strategy, from `prefix` on where some steps are already written.

    The same spec gives the same trajectory. Draws differ between queries of equal seed, and agree between
    strategies on one query, so that comparisons are paired.
    """

    id: str
    query: Query
    strategy: str
    seed: int = 0
    cost_weight: float = 0.0
    prefix: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class EpisodeFailure:
    """A rollout that failed, as a value: which one, and why."""

    spec_id: str
    error: str


def make_prefix(query: Query, steps: Sequence[Step]) -> str:
    """The text that the next step follows: query and steps, each ended by the step delimiter."""
    return "".join([query.text, STEP_DELIMITER, *(step.text + STEP_DELIMITER for step in steps)])


def find_end(steps: Sequence[Step], config: EpisodeConfig) -> str | None:
    """Why the episode is over, or None where it goes on.

    A step that was cut off by the token limit states no answer, even if it begins like one.
    """
    if not steps:
        return None
    last = steps[-1]
    if last.finish != "length" and read_answer(last.text) is not None:
        return "answer"
    if not last.text.strip():
        return "empty"
    if last.finish == "stop":
        return "stop"
    tail = steps[-config.max_repeats :]
    if len(tail) == config.max_repeats > 1 and all(step.text == last.text for step in tail):
        return "repeated"
    if sum(step.tokens for step in steps) >= config.max_tokens:
        return "token_limit"
    return "step_limit" if len(steps) >= config.max_steps else None


async def run_episode(spec: EpisodeSpec, pool: EnginePool, policy: Policy, config: EpisodeConfig) -> Trajectory:
    """Roll out one episode.

    Args:
        pool: a pool that is ready (its `facts` are known).

    Returns:
        the trajectory, the steps of `spec.prefix` and their usage included.

    Raises:
        EngineError: a model failed (`Runner` turns this into an `EpisodeFailure`).
    """
    steps = list(spec.prefix)
    prefix = make_prefix(spec.query, steps)
    ledger = CostLedger([facts.flops_per_token for facts in pool.facts], steps)
    seed = mix_seed(spec.seed, spec.query.id)
    while (end := find_end(steps, config)) is None:
        budget = min(config.max_step_tokens, config.max_tokens - sum(step.tokens for step in steps))
        writer = _StepWriter(pool, ledger, config.temperature, mix_seed(seed, len(steps)), prefix, budget)
        draft = await writer.peek(policy.peek)
        features = make_features(steps, spec.cost_weight, pool.size, draft)
        observation = Observation(
            spec.query, prefix, tuple(steps), spec.cost_weight, pool.size, draft, seed, features, ledger
        )
        decision = await policy.decide(observation)
        step = await writer.write(decision, draft, features)
        steps.append(step)
        prefix += step.text + STEP_DELIMITER
    return _make_trajectory(spec, steps, end)


@dataclass(slots=True)
class _StepWriter:
    """Makes one step of an episode and charges the ledger for it."""

    pool: EnginePool
    ledger: CostLedger
    temperature: float
    seed: int
    prefix: str
    max_tokens: int

    async def _generate(self, model: int, max_tokens: int, kept_ids: tuple[int, ...] = ()) -> StepResult:
        request = StepRequest(self.prefix, max_tokens, self.temperature, mix_seed(self.seed, model), kept_ids)
        result = await self.pool.engines[model].generate_step(request)
        self.ledger.charge_generation(model, result, len(kept_ids))
        return result

    async def peek(self, peek: Peek) -> StepResult | None:
        """The part of the cheapest model's next step that the policy wants to see."""
        if peek == Peek.NONE:
            return None
        return await self._generate(0, 1 if peek == Peek.FIRST_TOKEN else self.max_tokens)

    async def write(self, decision: Decision, draft: StepResult | None, features: tuple[float, ...]) -> Step:
        """The step by the model decided on, continuing the draft where that model made it."""
        discarded = 0
        if draft is None:
            result = await self._generate(decision.model, self.max_tokens)
        elif decision.model != 0:
            discarded = len(draft.token_ids)
            result = await self._generate(decision.model, self.max_tokens)
        elif draft.finish == "length" and len(draft.token_ids) < self.max_tokens:
            result = await self._generate(0, self.max_tokens, draft.token_ids)
        else:
            result = draft
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
        )


def _make_trajectory(spec: EpisodeSpec, steps: Sequence[Step], end: str) -> Trajectory:
    answer = read_answer(steps[-1].text) if end == "answer" else None
    return Trajectory(
        id=spec.id,
        query_id=spec.query.id,
        suite=spec.query.suite,
        strategy=spec.strategy,
        seed=spec.seed,
        cost_weight=spec.cost_weight,
        steps=tuple(steps),
        answer=answer,
        correct=is_correct(answer, spec.query),
        end=end,
        usage=sum((step.usage for step in steps), Usage()),
    )
