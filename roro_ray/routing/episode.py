"""The episode loop: peek, decide, write, until the query is answered or a limit is met.

One loop runs every method: the policy says what it wants to see of the cheapest model's next step. A draft
that is kept is continued (or taken as it is), never generated again; one that is thrown away is charged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from roro_ray.config import EpisodeConfig
from roro_ray.data.scoring import Score
from roro_ray.data.verify import is_correct, read_answer
from roro_ray.engines.protocol import StepResult
from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.observation import Observation, make_features
from roro_ray.routing.policies import Policy, choose_model
from roro_ray.routing.step_writer import StepWriter
from roro_ray.routing.transcript import Transcript
from roro_ray.routing.watch import EpisodeOptions
from roro_ray.types import Query, Step, Trajectory, Usage

if TYPE_CHECKING:
    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.engines.pool import EnginePool


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What to roll out: a query under a strategy, from `prefix` on where some steps are already written.

    `opening` is the beginning of the step behind them, where that is written too.

    The same spec gives the same trajectory. Draws differ between queries of equal seed, and agree between
    strategies on one query, so that comparisons are paired.
    """

    id: str
    query: Query
    strategy: str
    seed: int = 0
    cost_weight: float = 0.0
    prefix: tuple[Step, ...] = ()
    opening: str = ""


@dataclass(frozen=True, slots=True)
class EpisodeFailure:
    """A rollout that failed, as a value: which one, and why."""

    spec_id: str
    error: str


def find_end(steps: Sequence[Step], config: EpisodeConfig, thinks: bool = False) -> str | None:
    """Why no further step is routed, or None where the episode goes on.

    A step that was cut off by the token limit states no answer, even if it begins like one; nor does any step of a
    thinking block (`thinks`), which ends where a model closes it (`thought`).
    """
    if not steps:
        return None
    last = steps[-1]
    if last.finish == "marker":
        return "thought"
    if not thinks and last.finish != "length" and read_answer(last.text) is not None:
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
    scorer: AnswerScorer | None = None,
) -> Trajectory:
    """Roll out one episode.

    Where the pool's models think, the steps are those of the thinking block, and one model that the configuration names
    writes the final answer behind it, whatever the policy: methods differ by their steps alone.

    Args:
        pool: a pool that is ready (its `facts` are known).
        options: who watches, and what to do when a model is gone; training gives none.
        scorer: checks mathematical answers; without one only those that can be compared exactly are scored.

    Returns:
        the trajectory, the steps of `spec.prefix` and their usage included.

    Raises:
        EngineError: a model failed (`Runner` turns this into an `EpisodeFailure`).
    """
    options = options or EpisodeOptions()
    steps = list(spec.prefix)
    transcript = Transcript(spec.query, steps, pool.facts, config.instruction)
    facts = pool.facts
    ledger = CostLedger([each.flops_per_token for each in facts], steps, [each.prices for each in facts])
    seed = mix_seed(spec.seed, spec.query.id)
    while (end := find_end(steps, config, transcript.thinks)) is None:
        began = time.perf_counter()
        budget = min(config.max_step_tokens, config.max_tokens - sum(step.tokens for step in steps))
        draws = mix_seed(seed, len(steps))
        opening = spec.opening if len(steps) == len(spec.prefix) else ""
        page = transcript.page(min_tokens=config.min_step_tokens, opening=opening)
        writer = StepWriter(pool, ledger, config.temperature, draws, page, budget, len(steps), options)
        state = _State(spec, page.prefix(pool.size - 1), tuple(steps), pool.size, seed, ledger, config.max_steps)
        step, result = await _make_step(state, writer, policy, options)
        steps.append(replace(step, text=opening + step.text))
        transcript.add(step.model, opening + step.text, result)
        if options.watcher is not None:
            # Told of what was written now: its reader has the opening.
            options.watcher.on_step(len(steps) - 1, step, time.perf_counter() - began)
            if not options.watcher.wants_more():
                # A stop string that came with the last token allowed is a stop all the same.
                end = "answer" if find_end(steps, config, transcript.thinks) == "answer" else "stop_string"
                break
    conclusion = None
    if transcript.thinks and end != "stop_string":
        conclusion = await _conclude(pool, transcript, ledger, steps, config, mix_seed(seed, len(steps)), options)
    return await _make_trajectory(spec, steps, conclusion, end, scorer)


async def _conclude(
    pool: EnginePool,
    transcript: Transcript,
    ledger: CostLedger,
    steps: Sequence[Step],
    config: EpisodeConfig,
    seed: int,
    options: EpisodeOptions,
) -> Step:
    """The final answer behind the thinking block, which is closed here where no model closed it."""
    began, index = time.perf_counter(), len(steps)
    model = {"large": pool.size - 1, "small": 0}.get(config.answer_by, steps[-1].model)
    page = transcript.page(closing=True)
    writer = StepWriter(pool, ledger, config.temperature, seed, page, config.max_answer_tokens, index, options)
    decision = choose_model(model, pool.size)
    if options.watcher is not None:
        options.watcher.on_close(index)
        options.watcher.on_decision(index, decision, False)
    step, _ = await writer.write(decision)
    if options.watcher is not None:
        options.watcher.on_step(index, step, time.perf_counter() - began)
    return step


@dataclass(frozen=True, slots=True)
class _State:
    """An episode before one of its steps."""

    spec: EpisodeSpec
    prefix: str
    steps: tuple[Step, ...]
    pool_size: int
    seed: int
    ledger: CostLedger
    max_steps: int

    def observe(self, draft: StepResult | None) -> Observation:
        features = make_features(self.steps, self.spec.cost_weight, self.pool_size, draft, self.max_steps)
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


async def _make_step(
    state: _State, writer: StepWriter, policy: Policy, options: EpisodeOptions
) -> tuple[Step, StepResult]:
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
    step, result = await writer.write(decision, draft, observation.features)
    return (replace(step, degraded=True) if degraded else step), result


async def score_text(text: str | None, query: Query, scorer: AnswerScorer | None) -> Score:
    """Whether the answer that a text states is right (None: it states none)."""
    if scorer is not None:
        return await scorer.score(text, query)
    answer = read_answer(text) if text is not None else None
    if query.grader == "exact":
        return Score(is_correct(answer, query), answer)
    return Score(None, answer, f"nobody here grades {query.grader!r} answers: give the runner an AnswerScorer")


async def _make_trajectory(
    spec: EpisodeSpec, steps: Sequence[Step], conclusion: Step | None, end: str, scorer: AnswerScorer | None
) -> Trajectory:
    if conclusion is not None:
        score = await score_text(conclusion.text, spec.query, scorer)
        if conclusion.finish == "length":
            end = "token_limit"
        elif score.answer is not None:
            end = "answer"
        elif end == "thought":
            end = "stop"
    else:
        score = await score_text(steps[-1].text if end == "answer" else None, spec.query, scorer)
    written = (*steps, conclusion) if conclusion is not None else steps
    return Trajectory(
        id=spec.id,
        query_id=spec.query.id,
        suite=spec.query.suite,
        strategy=spec.strategy,
        seed=spec.seed,
        cost_weight=spec.cost_weight,
        steps=tuple(steps),
        answer=score.answer,
        correct=score.correct,
        end=end,
        usage=sum((step.usage for step in written), Usage()),
        conclusion=conclusion,
        error=score.error,
    )
