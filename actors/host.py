"""The rollout workers as an evaluation sees them: episodes, routers from disk, the oracle's search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.rollout import RolloutPool
from roro_ray.errors import MissingWeightsError
from roro_ray.evaluation.oracle import OracleResult
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.router_files import load_router
from roro_ray.types import Query, Trajectory

_CHANNELS = itertools.count()


class ClusterHost:
    """Implements `evaluation.methods.Host` on a rollout pool.

    Args:
        seed: of the episodes that the oracle is compared with.
        on_episodes: told of the episodes done since it was last called.
    """

    def __init__(self, pool: RolloutPool, seed: int, on_episodes: Callable[[int], None] = lambda count: None) -> None:
        self._pool = pool
        self._seed = seed
        self._on_episodes = on_episodes
        # Of its own: a training that runs beside the evaluation publishes too.
        self._channel = f"host-{next(_CHANNELS)}"
        self._version: int | None = None
        self._state: dict[str, Any] = {}

    def run(self, specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        """Roll out episodes; results in the order of the specs."""
        over = 0

        def count(done: int, _: int) -> None:
            nonlocal over
            self._on_episodes(done - over)
            over = done

        try:
            return self._pool.run(specs, self._version, self._channel, count)
        except MissingWeightsError:
            if self._version is None:
                raise
            over = 0
            self._pool.publish(self._state, self._version, self._channel)
            return self._pool.run(specs, self._version, self._channel, count)

    def use_router(self, directory: Path) -> None:
        """Publish a saved router to the workers.

        Raises:
            CheckpointError: the directory holds no router for this pool.
        """
        network = load_router(directory, len(self._pool.facts[0].engines))
        self._version, self._state = (self._version or 0) + 1, network.learned_state()
        self._pool.publish(self._state, self._version, self._channel)

    def find_oracle(self, queries: Sequence[Query]) -> list[OracleResult]:
        """Search the queries' fewest dear steps, each where the memo knows it.

        Raises:
            DeadlineError: no answer within the episodes' deadline.
        """
        return self._pool.find_oracle(queries, self._seed)
