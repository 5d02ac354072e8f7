"""Scored rollouts ahead of the learner: iteration i acts with the weights of version max(i - max_lag, 0), exactly.

With `max_lag` = 0 everything happens in turn. With more, the rollouts of the next `max_lag` iterations are in the air
while the learner works: each batch starts as soon as the weights that it acts with are published, beside the batches
before it, so that the last slow episodes of one leave no engine idle. Batches are scored one after the other, in the
order of the iterations, while others still roll out or are learned from. Which version acts depends on the iteration
alone and never on what happened to be newest, so a run is the same whatever the timing, and what was in the air when
it was stopped is done again, the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from roro_ray.config import Config
from roro_ray.learning.router_plan import make_plan
from roro_ray.learning.router_rewards import Rollouts, Score, collect_rollouts, score_rollouts
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.failures import SteadyRun, make_policy
from roro_ray.types import Query, Trajectory, Verdict

Run = Callable[[Sequence[EpisodeSpec], int], Sequence[Trajectory | EpisodeFailure]]


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """One iteration's rollouts of one rank with their verdicts, and the seconds that each of the two took."""

    version: int
    rollouts: Rollouts
    verdicts: list[Verdict | None]
    rollout_s: float
    score_s: float


def acting_version(iteration: int, max_lag: int) -> int:
    """The version of the weights that an iteration's rollouts are made with."""
    return max(iteration - max_lag, 0)


class RolloutPipeline:
    """What is in the air, by iteration.

    Args:
        run: rolls specs out under a published version; called from `max_lag` + 1 threads.
        score: the Judge, or None; called by one thread at a time, for the iterations in their order.
        rank, world: of the learner; it has the groups rank, rank + world, ...
    """

    def __init__(
        self, config: Config, queries: Sequence[Query], run: Run, score: Score | None, rank: int = 0, world: int = 1
    ) -> None:
        self._config = config
        self._queries = list(queries)
        self._run = run
        self._score = score
        self._rank, self._world = rank, world
        self._max_lag = config.router.max_lag
        self._rolling = ThreadPoolExecutor(self._max_lag + 1, "rollouts") if self._max_lag else None
        self._scoring = ThreadPoolExecutor(1, "scoring") if self._max_lag else None
        self._flying: dict[int, Future[ScoredBatch]] = {}

    def take(self, iteration: int) -> ScoredBatch:
        """An iteration's batch, after those of the next ones were sent on their way.

        To be called with every iteration in turn, when the version `iteration` is published.

        Raises:
            RoroError: what rollouts or scoring of this iteration raised.
        """
        if self._rolling is None or self._scoring is None:
            return self._judge(*self._roll_out(iteration))
        last = min(iteration + self._max_lag, self._config.router.iterations - 1)
        for ahead in range(iteration, max(last, iteration) + 1):
            if ahead not in self._flying:
                rolling = self._rolling.submit(self._roll_out, ahead)
                self._flying[ahead] = self._scoring.submit(self._judge_rolled, rolling)
        return self._flying.pop(iteration).result()

    def close(self) -> None:
        """Start nothing more; what is in the air is not waited for."""
        for executor in (self._rolling, self._scoring):
            if executor is not None:
                executor.shutdown(wait=False, cancel_futures=True)

    def _roll_out(self, iteration: int) -> tuple[Rollouts, int, float]:
        started = time.perf_counter()
        version = acting_version(iteration, self._max_lag)
        plan = make_plan(self._queries, self._config.router, self._config.seed, iteration)
        groups = plan[self._rank :: self._world]
        run = SteadyRun(
            lambda specs: self._run(specs, version), make_policy(self._config.faults), f"iteration {iteration + 1}"
        )
        results = run([spec for group in groups for spec in group.specs])
        return collect_rollouts(groups, results, version, run.tally), version, time.perf_counter() - started

    def _judge_rolled(self, rolling: Future[tuple[Rollouts, int, float]]) -> ScoredBatch:
        return self._judge(*rolling.result())

    def _judge(self, rollouts: Rollouts, version: int, rollout_s: float) -> ScoredBatch:
        started = time.perf_counter()
        verdicts = score_rollouts(
            rollouts, self._score if self._config.router.beta else None, self._config.faults.max_score_errors
        )
        return ScoredBatch(version, rollouts, verdicts, rollout_s, time.perf_counter() - started)
