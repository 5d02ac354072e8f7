"""The hindsight oracle: per query, the fewest dear steps that lead to the right answer.

An exact search over who writes each step, with real continuations: a step written by another model changes
everything after it, so nothing is spliced. Prefixes are searched by rising cost (a step by model m costs m,
so with two models the cost is the number of large steps), every prefix once: a step that two models write
alike leads to one prefix, which keeps the search small where steps are easy. The oracle knows the gold
answer; no router can be expected to reach it, and none can be better. With sampling it is defined on the
draws that the episode's seed fixes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roro_ray.config import EpisodeConfig
from roro_ray.engines.protocol import StepRequest
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.episode import find_end, score_text
from roro_ray.routing.transcript import make_prefix
from roro_ray.types import Decision, Query, Step, Usage

if TYPE_CHECKING:
    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.engines.pool import EnginePool

State = tuple[Step, ...]

_BY_ORACLE = Decision(0, 0.0, ())


@dataclass(frozen=True, slots=True)
class OracleResult:
    """What the search found for one query.

    `assignment` is who writes each step (empty where no assignment solves the query), `cost` the sum of its
    model indices: the number of large steps in a pool of two. `exact` is False where the search was cut off at
    its limit: then `assignment` is the dearest model alone if that is right, else empty. `expanded` counts the
    steps asked of the engines. `error` is None, or why the query could not be searched.
    """

    query_id: str
    solved: bool
    cost: int
    assignment: tuple[int, ...]
    exact: bool = True
    expanded: int = 0
    error: str | None = None

    @property
    def strategy(self) -> str:
        """The strategy that rolls the assignment out; a query that nothing solves is left to the cheapest model."""
        return "script:" + ",".join(map(str, self.assignment or (0,)))


async def run_oracle(
    queries: Sequence[Query],
    pool: EnginePool,
    config: EpisodeConfig,
    seed: int = 0,
    max_expanded: int = 4000,
    concurrency: int = 256,
    scorer: AnswerScorer | None = None,
) -> list[OracleResult]:
    """Search every query, many at once so that the engines batch; results in the order of the queries.

    Args:
        seed: the seed of the episodes that the oracle is compared with; it matters only with sampling.
        max_expanded: most steps asked of the engines for one query.
        concurrency: most queries searched at once.
        scorer: of mathematical answers, as for episodes.

    A query whose engine fails gives a result with `error`; it does not take the others with it.
    """
    await pool.ready()
    gate = asyncio.Semaphore(concurrency)

    async def search_one(query: Query) -> OracleResult:
        async with gate:
            search = _Search(query, pool, config, mix_seed(seed, query.id), max_expanded, scorer)
            try:
                async with asyncio.timeout(config.timeout_s):
                    return await search.run()
            except Exception as error:  # the border: a failed search is a value
                reason = f"{type(error).__name__}: {error}"
                return OracleResult(query.id, False, 0, (), False, search.expanded, reason)

    return list(await asyncio.gather(*(search_one(query) for query in queries)))


class _Search:
    """The search of one query: prefixes by rising cost, each visited once."""

    def __init__(
        self,
        query: Query,
        pool: EnginePool,
        config: EpisodeConfig,
        seed: int,
        max_expanded: int,
        scorer: AnswerScorer | None,
    ) -> None:
        self.query, self.pool, self.config, self.scorer = query, pool, config, scorer
        self.seed, self.max_expanded = seed, max_expanded
        self.expanded = 0

    async def run(self) -> OracleResult:
        seen: set[tuple[str, int]] = set()
        waiting: dict[int, list[State]] = defaultdict(list, {0: [()]})
        while waiting:
            cost = min(waiting)
            reached: list[State] = []
            fresh = waiting.pop(cost)
            # The cheapest model's steps cost nothing: follow them to their ends before paying for another.
            while fresh:
                open_states = []
                for state in fresh:
                    # The tokens used so far belong to the state: they bound what may still be written.
                    key = (make_prefix(self.query, state), sum(step.tokens for step in state))
                    if key in seen:
                        continue
                    seen.add(key)
                    if find_end(state, self.config) is None:
                        open_states.append(state)
                    elif await self._is_solution(state):
                        return self._result(state, exact=True)
                reached += open_states
                if self.expanded > self.max_expanded:
                    return await self._give_up()
                fresh = list(await asyncio.gather(*(self._expand(state, 0) for state in open_states)))
            for model in range(1, self.pool.size):
                waiting[cost + model] += await asyncio.gather(*(self._expand(state, model) for state in reached))
            waiting = defaultdict(list, {cost: states for cost, states in waiting.items() if states})
        return OracleResult(self.query.id, False, 0, (), True, self.expanded)

    async def _expand(self, state: State, model: int) -> State:
        """The state after one more step, written as the episode loop would have this model write it."""
        self.expanded += 1
        config = self.config
        budget = min(config.max_step_tokens, config.max_tokens - sum(step.tokens for step in state))
        seed = mix_seed(mix_seed(self.seed, len(state)), model)
        request = StepRequest(make_prefix(self.query, state), budget, config.temperature, seed)
        result = await self.pool.engines[model].generate_step(request)
        tokens = len(result.token_ids)
        return (*state, Step(model, result.text, tokens, 0.0, 0.0, result.finish, _BY_ORACLE, Usage()))

    async def _is_solution(self, state: State) -> bool:
        if find_end(state, self.config) != "answer":
            return False
        return (await score_text(state[-1].text, self.query, self.scorer)).correct is True

    async def _give_up(self) -> OracleResult:
        """Fall back on the dearest model alone."""
        state: State = ()
        while find_end(state, self.config) is None:
            state = await self._expand(state, self.pool.size - 1)
        if await self._is_solution(state):
            return self._result(state, exact=False)
        return OracleResult(self.query.id, False, 0, (), False, self.expanded)

    def _result(self, state: State, exact: bool) -> OracleResult:
        assignment = tuple(step.model for step in state)
        return OracleResult(self.query.id, True, sum(assignment), assignment, exact, self.expanded)
