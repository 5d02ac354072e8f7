"""The episode loop turned inside out: an episode that stops at each decision and waits for its caller's.

`run_episode` asks a policy; a caller who acts step by step (a Gymnasium environment, a person) wants to be asked. Here
the policy is a coroutine that hands the observation out and sleeps until a decision comes in, so the loop itself, with
its peeks, limits, costs and scores, is the same one that every method runs in.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from roro_ray.config import EpisodeConfig
from roro_ray.routing.episode import EpisodeSpec, run_episode
from roro_ray.routing.observation import Observation
from roro_ray.types import Decision, Peek, Trajectory

if TYPE_CHECKING:
    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.engines.pool import EnginePool


class SteppedEpisode:
    """One episode: `begin`, then `act` until a trajectory comes back. All calls belong to one event loop.

    It is itself the policy (`routing.policies.Policy`) that the loop asks.

    Args:
        pool: a pool that is ready.
        peek: what an observation holds of the cheapest model's next step.
        scorer: of mathematical answers; None: only exact answers are scored.
    """

    version = -1

    def __init__(
        self,
        spec: EpisodeSpec,
        pool: EnginePool,
        config: EpisodeConfig,
        peek: Peek = Peek.NONE,
        scorer: AnswerScorer | None = None,
    ) -> None:
        self.spec = spec
        self.peek = peek
        self._pool, self._config, self._scorer = pool, config, scorer
        self._task: asyncio.Task[Trajectory] | None = None
        self._asked: asyncio.Future[Observation] | None = None
        self._answer: asyncio.Future[Decision] | None = None

    async def decide(self, observation: Observation) -> Decision:
        """Called by the episode loop: hand the observation out and wait."""
        assert self._asked is not None, "an episode asks only while its caller waits"
        self._answer = asyncio.get_running_loop().create_future()
        self._asked.set_result(observation)
        return await self._answer

    async def begin(self) -> Observation:
        """Start; returns what stands before the first decision.

        Raises:
            TimeoutError: nothing came for `episode.timeout_s`.
            EngineError: a model failed.
        """
        assert self._task is None, "an episode begins once"
        run = run_episode(self.spec, self._pool, self, self._config, scorer=self._scorer)
        self._asked = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(run)
        first = await self._next()
        assert isinstance(first, Observation), "an episode without steps is not over"
        return first

    async def act(self, decision: Decision) -> Observation | Trajectory:
        """Write the next step as decided; returns what stands before the one after, or the finished trajectory.

        Raises:
            TimeoutError: nothing came for `episode.timeout_s`.
            EngineError: a model failed.
        """
        assert self._answer is not None and not self._answer.done(), "act answers an observation, once"
        self._asked = asyncio.get_running_loop().create_future()
        self._answer.set_result(decision)
        return await self._next()

    async def _next(self) -> Observation | Trajectory:
        assert self._task is not None and self._asked is not None
        waiting: set[asyncio.Future[Any]] = {self._task, self._asked}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=self._config.timeout_s)
        if self._asked.done():
            return self._asked.result()
        if self._task.done():
            return self._task.result()
        await self.stop()
        raise TimeoutError(f"no step within {self._config.timeout_s:g} s (episode.timeout_s)")

    async def stop(self) -> None:
        """Abandon what is left of the episode."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
