"""A host in this process: one pool, one event loop, no Ray. What a rollout worker does, for tests and notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from roro_ray.config import Config
from roro_ray.data.scoring import AnswerScorer
from roro_ray.engines.pool import EnginePool, make_pool
from roro_ray.evaluation.methods import Outcome
from roro_ray.evaluation.oracle import OracleResult, run_oracle
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.router_files import load_router
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.routing.runner import Runner
from roro_ray.types import Query


class LocalHost:
    """Implements `evaluation.methods.Host`; use it as a context manager, so that its event loop is closed.

    Args:
        pool: made from `config.pool` where None is given.
    """

    def __init__(self, config: Config, pool: EnginePool | None = None) -> None:
        self.config = config
        self.pool = pool or make_pool(config.pool)
        self._scorer = AnswerScorer.from_config(config.data)
        self._runner = Runner(self.pool, None, config.episode, config.ray.concurrency, self._scorer)
        # Engines gather requests on the loop that they first ran on, so all calls share one.
        self._loop = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._scorer.close()
        self._loop.close()

    def run(self, specs: Sequence[EpisodeSpec]) -> list[Outcome]:
        """Roll out episodes; results in the order of the specs."""
        return self._loop.run(self._runner.run(specs))

    def use_router(self, directory: Path) -> None:
        """Load a saved router for the strategies `router`, `router_greedy` and `router_priced`.

        Raises:
            CheckpointError: the directory holds no router for this pool.
        """
        network = load_router(directory, self.pool.size)
        self._runner.router = RouterPolicy(network, cache_mb=self.config.router.cache_mb)

    def find_oracle(self, queries: Sequence[Query]) -> list[OracleResult]:
        """Search the queries' fewest dear steps."""
        return self._loop.run(
            run_oracle(
                queries,
                self.pool,
                self.config.episode,
                self.config.seed,
                self.config.evaluate.oracle_steps,
                self.config.ray.concurrency,
                self._scorer,
            )
        )
