"""The episode loop: peek, decide, write, until the query is answered or a limit is met.

One loop runs every method: the policy says what it wants to see of the cheapest model's next step. A draft
that is kept is continued (or taken as it is), never generated again; one that is thrown away is charged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.data.verify import is_correct, read_answer
from roro_ray.engines.protocol import StepResult
from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.observation import Observation, make_features
from roro_ray.routing.policies import Policy, choose_model
from roro_ray.routing.step_writer import StepWriter
from roro_ray.routing.watch import EpisodeOptions
from roro_ray.types import Query, Step, Trajectory, Usage

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


async def run_episode(
    spec: EpisodeSpec,
    pool: EnginePool,
    policy: Policy,
    config: EpisodeConfig,
    options: EpisodeOptions | None = None,
) -> Trajectory:
    """Roll out one episode.

    Args:
        pool: a pool that is ready (its `facts` are known).
        options: who watches, and what to do when a model is gone; training gives none.

    Returns:
        the trajectory, the steps of `spec.prefix` and their usage included.

    Raises:
        EngineError: a model failed (`Runner` turns this into an `EpisodeFailure`).
    """
    options = options or EpisodeOptions()
    steps = list(spec.prefix)
    prefix = make_prefix(spec.query, steps)
    ledger = CostLedger([facts.flops_per_token for facts in pool.facts], steps)
    seed = mix_seed(spec.seed, spec.query.id)
    while (end := find_end(steps, config)) is None:
        began = time.perf_counter()
        budget = min(config.max_step_tokens, config.max_tokens - sum(step.tokens for step in steps))
        draws = mix_seed(seed, len(steps))
        writer = StepWriter(pool, ledger, config.temperature, draws, prefix, budget, len(steps), options)
        step = await _make_step(_State(spec, prefix, tuple(steps), pool.size, seed, ledger), writer, policy, options)
        steps.append(step)
        prefix += step.text + STEP_DELIMITER
        if options.watcher is not None:
            options.watcher.on_step(len(steps) - 1, step, time.perf_counter() - began)
            if not options.watcher.wants_more():
                # A stop string that came with the last token allowed is a stop all the same.
                end = "answer" if find_end(steps, config) == "answer" else "stop_string"
                break
    return _make_trajectory(spec, steps, end)


@dataclass(frozen=True, slots=True)
class _State:
    """An episode before one of its steps."""

    spec: EpisodeSpec
    prefix: str
    steps: tuple[Step, ...]
    pool_size: int
    seed: int
    ledger: CostLedger

    def observe(self, draft: StepResult | None) -> Observation:
        features = make_features(self.steps, self.spec.cost_weight, self.pool_size, draft)
        return Observation(
            self.spec.query,
            self.prefix,
            self.steps,
            self.spec.cost_weight,
            self.pool_size,
            draft,
            self.seed,
            features,
            self.ledger,
        )


async def _make_step(state: _State, writer: StepWriter, policy: Policy, options: EpisodeOptions) -> Step:
    """Peek, decide, write. Without the cheapest model to peek at, or without a router, a dearer model takes over."""
    draft, degraded = None, False
    try:
        draft = await writer.peek(policy.peek)
        observation = state.observe(draft)
        decision = await policy.decide(observation)
    except EngineUnavailableError:
        if not options.rescue:
            raise
        # What cannot be asked is not guessed: the answer stays as good as it can be.
        observation = state.observe(draft)
        decision, degraded = choose_model(state.pool_size - 1, state.pool_size), True
    if options.watcher is not None:
        options.watcher.on_decision(len(state.steps), decision, degraded)
    step = await writer.write(decision, draft, observation.features)
    return replace(step, degraded=True) if degraded else step


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
