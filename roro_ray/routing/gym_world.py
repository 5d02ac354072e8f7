"""What routing environments are made of: the episodes' world, what is seen of it, and one seat at its table.

An observation is what the router network reads, in its own tokens: the scalar signals, and the text so far. The reward
comes at the end: the outcome minus the cost term, as GRPO's without a process reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from roro_ray.config import STEP_DELIMITER, EpisodeConfig, RouterConfig
from roro_ray.errors import ConfigError, DataError, EngineError
from roro_ray.reward.combine import combine_reward
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.observation import FEATURE_NAMES, Observation, make_features, scale_cost_weight
from roro_ray.routing.policies import choose_model
from roro_ray.routing.router import PieceTokenizer
from roro_ray.routing.stepped import SteppedEpisode
from roro_ray.types import Peek, Query, Trajectory

if TYPE_CHECKING:
    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.engines.pool import EnginePool

Obs = dict[str, npt.NDArray[Any]]
Info = dict[str, Any]
StepResult = tuple[Obs, float, bool, bool, Info]
_MOST_BEGINNINGS = 5  # episodes in a row that fail before their first decision


@dataclass(frozen=True)
class RoutingWorld:
    """What episodes are made of; shared by the environments of a process.

    Args:
        queries: what episodes draw from.
        router: its cost weights and its peek are those of the episodes.
        pieces: the router's tokenizer; None leaves the text out of the observations.
        vocabulary: of that tokenizer.
        text_tokens: most tokens of text that an observation can hold.
        scorer: of mathematical answers; None: only exact answers are scored.
    """

    pool: EnginePool
    queries: Sequence[Query]
    episode: EpisodeConfig
    router: RouterConfig
    pieces: PieceTokenizer | None = None
    vocabulary: int = 0
    text_tokens: int = 0
    scorer: AnswerScorer | None = None

    def __post_init__(self) -> None:
        if not self.queries:
            raise ConfigError("an environment needs queries and got none: raise data.router_queries")

    @property
    def action_space(self) -> gym.spaces.Discrete[np.int64]:
        """The models of the pool, from cheap to dear."""
        return gym.spaces.Discrete(self.pool.size)

    @property
    def observation_space(self) -> gym.spaces.Dict:
        """See `make_observation_space`."""
        high = self.router.cost_weight_high
        return make_observation_space(self.vocabulary if self.pieces else 0, self.text_tokens, high)

    def observe(self, texts: Sequence[str], features: Sequence[float], whole: bool = True) -> Obs:
        """The observation of some texts (query, steps) and signals; with `whole` false its text may be cut short.

        Raises:
            DataError: the text has more than `text_tokens` tokens.
        """
        found: Obs = {"signals": np.asarray(features, dtype=np.float32)}
        if self.pieces is None:
            return found
        ids = [token for text in texts for token in self.pieces.encode(text + STEP_DELIMITER)]
        if len(ids) > self.text_tokens and whole:
            raise DataError(
                f"an episode's text has {len(ids)} of the router's tokens, expected at most {self.text_tokens}: "
                "raise ppo.text_tokens"
            )
        del ids[self.text_tokens :]
        found["text"] = np.zeros(self.text_tokens, dtype=np.int32)
        found["text"][: len(ids)] = ids
        found["length"] = np.asarray([len(ids)], dtype=np.int32)
        return found


def make_observation_space(vocabulary: int, text_tokens: int, cost_weight_high: float = 1.0) -> gym.spaces.Dict:
    """`signals` (F, of `observation.FEATURE_NAMES`) and, for a vocabulary above 0, `text` (T, ids) and its `length`."""
    top = max(1.0, scale_cost_weight(cost_weight_high))  # that of the cost weight; all other signals end at 1
    spaces: dict[str, gym.Space[Any]] = {"signals": gym.spaces.Box(0.0, top, (len(FEATURE_NAMES),), np.float32)}
    if vocabulary:
        spaces["text"] = gym.spaces.Box(0, vocabulary - 1, (text_tokens,), np.int32)
        spaces["length"] = gym.spaces.Box(0, text_tokens, (1,), np.int32)
    return gym.spaces.Dict(spaces)


class Seat:
    """One episode after another, each drawn from a generator; the asynchronous half of an environment."""

    def __init__(self, world: RoutingWorld) -> None:
        self._world = world
        self._episode: SteppedEpisode | None = None
        self._last: Obs = {}

    async def begin(self, random: np.random.Generator, options: dict[str, Any] | None = None) -> tuple[Obs, Info]:
        """Draw an episode and start it; one that fails at once is drawn again.

        Raises:
            EngineError: several in a row failed at once.
        """
        for attempt in range(_MOST_BEGINNINGS):
            await self.stop()
            spec = self._draw(random, options or {})
            self._episode = SteppedEpisode(
                spec, self._world.pool, self._world.episode, Peek(self._world.router.peek), self._world.scorer
            )
            try:
                self._last = self._observe(await self._episode.begin())
                return self._last, {"query": spec.query.id}
            except (EngineError, TimeoutError, DataError) as error:
                if attempt == _MOST_BEGINNINGS - 1:
                    raise EngineError(
                        f"{_MOST_BEGINNINGS} episodes in a row failed before their first decision, the last with: "
                        f"{error}. See whether the pool's models answer (python -m jobs.doctor)"
                    ) from error
        raise AssertionError("unreachable")

    async def act(self, action: int) -> StepResult:
        """Write the next step. A failed or unscored episode ends as truncated, with its `failure` in the info."""
        episode = self._episode
        assert episode is not None, "reset the environment before its first step"
        try:
            found = await episode.act(choose_model(action, self._world.pool.size))
        except (EngineError, TimeoutError, DataError) as error:
            return self._last, 0.0, False, True, {"failure": f"{type(error).__name__}: {error}"}
        if isinstance(found, Observation):
            self._last = self._observe(found)
            return self._last, 0.0, False, False, {}
        reward = combine_reward(found, None, episode.spec.cost_weight, beta=0.0)
        final, info = self._observe_end(episode.spec, found), {"trajectory": found}
        if reward is None:
            return final, 0.0, False, True, info | {"failure": found.error or "the answer could not be scored"}
        return final, reward, True, False, info

    async def stop(self) -> None:
        """Abandon the episode at hand."""
        if self._episode is not None:
            await self._episode.stop()

    def _draw(self, random: np.random.Generator, options: dict[str, Any]) -> EpisodeSpec:
        world = self._world
        query = world.queries[int(random.integers(len(world.queries)))]
        low, high = math.log(world.router.cost_weight_low), math.log(world.router.cost_weight_high)
        cost_weight, seed = math.exp(random.uniform(low, high)), int(random.integers(2**31))
        if "query" in options:
            chosen = [each for each in world.queries if each.id == options["query"]]
            if not chosen:
                raise ConfigError(f"reset got the query {options['query']!r}, expected the id of one of this world's")
            query = chosen[0]
        cost_weight, seed = float(options.get("cost_weight", cost_weight)), int(options.get("seed", seed))
        return EpisodeSpec(f"step/{query.id}/{seed}", query, "step", seed, cost_weight)

    def _observe(self, observation: Observation) -> Obs:
        return self._world.observe(
            (observation.query.text, *(step.text for step in observation.steps)), observation.features
        )

    def _observe_end(self, spec: EpisodeSpec, trajectory: Trajectory) -> Obs:
        """The state behind the last step, which nobody decides in: so its text may be cut."""
        world, steps = self._world, trajectory.steps
        features = make_features(steps, spec.cost_weight, world.pool.size, None, world.episode.max_steps)
        return world.observe((spec.query.text, *(step.text for step in steps)), features, whole=False)
