"""Run many episodes at once in one process: the shell-free core of every rollout worker.

Engines batch whatever requests meet in the event loop, so throughput comes from concurrency. A rollout that
fails or does not end in time is a value in the result, never an exception that takes the others with it.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from roro_ray.config import EpisodeConfig
from roro_ray.errors import ConfigError
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec, run_episode
from roro_ray.routing.policies import Policy, make_policy
from roro_ray.types import Trajectory

if TYPE_CHECKING:
    import torch

    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.engines.pool import EnginePool
    from roro_ray.routing.router_policy import RouterPolicy

logger = logging.getLogger(__name__)


class Runner:
    """A pool, the router's present weights, and the episodes run with them.

    Args:
        scorer: of mathematical answers; None: only exact answers are scored.
        router: behind the strategies `router`, `router_greedy` and `router_priced`; None where neither is used.
        concurrency: most episodes in flight.
    """

    def __init__(
        self,
        pool: EnginePool,
        router: RouterPolicy | None,
        config: EpisodeConfig,
        concurrency: int = 256,
        scorer: AnswerScorer | None = None,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency is {concurrency}: expected at least 1 episode at a time")
        self.pool = pool
        self.router = router
        self.config = config
        self.concurrency = concurrency
        self.scorer = scorer

    def load_router(self, state_dict: dict[str, torch.Tensor], version: int) -> None:
        """Take over newer weights; call between runs, not during one.

        Raises:
            ConfigError: this runner was made without a router.
            CheckpointError: weights of another shape.
        """
        if self.router is None:
            raise ConfigError("got weights for a runner without a router: make it with Runner(pool, router, ..)")
        self.router.load(state_dict, version)

    def copy(self) -> Runner:
        """A runner on the same pool whose router has weights of its own, to run other versions beside this one's."""
        router = None if self.router is None else self.router.copy()
        return Runner(self.pool, router, self.config, self.concurrency, self.scorer)

    async def run(self, specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        """Run the episodes; results in the order of the specs.

        Raises:
            ConfigError: a strategy does not exist or lacks its router (raised before anything runs).
        """
        if not specs:
            return []
        await self.pool.ready()
        policies = {
            strategy: make_policy(strategy, self.pool, self.router)
            for strategy in dict.fromkeys(spec.strategy for spec in specs)
        }
        results: list[Trajectory | EpisodeFailure] = [EpisodeFailure(spec.id, "did not run") for spec in specs]
        deadline = asyncio.get_running_loop().time() + self.config.timeout_s
        # Each lane takes the next spec when its episode is over: no more tasks than episodes in flight.
        queue = iter(enumerate(specs))

        async def run_lane(queue: Iterator[tuple[int, EpisodeSpec]]) -> None:
            for index, spec in queue:
                results[index] = await self._run_one(spec, policies[spec.strategy], deadline)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.concurrency, len(specs))):
                group.create_task(run_lane(queue))
        return results

    async def _run_one(self, spec: EpisodeSpec, policy: Policy, deadline: float) -> Trajectory | EpisodeFailure:
        try:
            async with asyncio.timeout_at(deadline):
                return await run_episode(spec, self.pool, policy, self.config, scorer=self.scorer)
        except TimeoutError as error:
            reason = str(error) or f"not finished within {self.config.timeout_s:g} s (episode.timeout_s)"
            return EpisodeFailure(spec.id, f"{type(error).__name__}: {reason}")
        except Exception as error:  # the border: a failed rollout is a value
            logger.debug("episode %s failed:\n%s", spec.id, traceback.format_exc())
            return EpisodeFailure(spec.id, f"{type(error).__name__}: {error}")
