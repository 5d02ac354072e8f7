"""Step-by-step routing as Gymnasium environments, one episode at a time or many that share the models' batches.

An episode is a query, an action the model that writes its next step; observations and rewards are those of
`routing.gym_world`. Both environments run the one episode loop (`routing.stepped`), so what is learned here holds
wherever a router is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from roro_ray.routing.draws import mix_seed
from roro_ray.routing.gym_world import Info, Obs, RoutingWorld, Seat, StepResult

T = TypeVar("T")


class RoutingEnv(gym.Env[Obs, int]):
    """One episode at a time.

    `reset(seed=..)` fixes the query, the cost weight and every draw of this and the following episodes; its options
    (`query`: an id, `cost_weight`, `seed`: the episode's) overrule what was drawn. The info at the end holds the
    `trajectory`. An episode that fails, or whose answer cannot be scored, is truncated with reward 0 and tells its
    `failure`: it has no outcome, and 0 is not one.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, world: RoutingWorld) -> None:
        self.world = world
        self.observation_space = world.observation_space
        self.action_space = world.action_space  # type: ignore[assignment]  # Discrete's elements are numpy's integers
        self._seat = Seat(world)
        self._loop = asyncio.new_event_loop()
        self._run(world.pool.ready())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, Info]:
        """Begin an episode."""
        super().reset(seed=seed)
        return self._run(self._seat.begin(self.np_random, options))

    def step(self, action: int) -> StepResult:
        """Let a model write the next step."""
        return self._run(self._seat.act(int(action)))

    def close(self) -> None:
        """Abandon the episode."""
        if not self._loop.is_closed():
            self._run(self._seat.stop())
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)


def spread_seed(seed: int, index: int) -> int:
    """The seed of one environment among many; not `seed + index`, since RLlib's env runners have seeds in a row."""
    return mix_seed(seed, index) % 2**31


class RoutingVectorEnv(gym.vector.VectorEnv[Obs, npt.NDArray[Any], npt.NDArray[Any]]):
    """Several episodes side by side in one event loop: their steps meet in the engines' batches.

    Seeded with `seed`, environment i is a `RoutingEnv` seeded with `spread_seed(seed, i)`. A finished one is reset at
    its next step (Gymnasium's `NEXT_STEP`).
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # as Gymnasium declares it
        "render_modes": [],
        "autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP,
    }

    def __init__(self, world: RoutingWorld, num_envs: int) -> None:
        self.world = world
        self.num_envs = num_envs
        self.single_observation_space = world.observation_space
        self.single_action_space = world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seats = [Seat(world) for _ in range(num_envs)]
        self._randoms = [np.random.default_rng() for _ in range(num_envs)]
        self._over = [True] * num_envs
        self._loop = asyncio.new_event_loop()
        self._run(world.pool.ready())

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Obs, Info]:
        """Begin an episode in each environment."""
        if isinstance(seed, int):
            seed = [spread_seed(seed, index) for index in range(self.num_envs)]
        seeds = seed or [None] * self.num_envs
        for index, each in enumerate(seeds):
            if each is not None:
                self._randoms[index], _ = gym.utils.seeding.np_random(each)

        async def begin() -> list[tuple[Obs, Info]]:
            return await asyncio.gather(
                *(seat.begin(random, options) for seat, random in zip(self._seats, self._randoms, strict=True))
            )

        begun = self._run(begin())
        self._over = [False] * self.num_envs
        infos: Info = {}
        for index, (_, info) in enumerate(begun):
            infos = self._add_info(infos, info, index)
        return self._stack([obs for obs, _ in begun]), infos

    def step(self, actions: npt.NDArray[Any]) -> tuple[Obs, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], Info]:
        """Let a model write the next step of each episode; where one was over, the next one begins instead."""

        async def advance() -> list[StepResult]:
            return await asyncio.gather(*(self._advance(index, int(actions[index])) for index in range(self.num_envs)))

        results = self._run(advance())
        self._over = [terminated or truncated for _, _, terminated, truncated, _ in results]
        infos: Info = {}
        for index, result in enumerate(results):
            infos = self._add_info(infos, result[4], index)
        observations, rewards, terminated, truncated, _ = zip(*results, strict=True)
        return (
            self._stack(observations),
            np.asarray(rewards, dtype=np.float64),
            np.asarray(terminated, dtype=np.bool_),
            np.asarray(truncated, dtype=np.bool_),
            infos,
        )

    async def _advance(self, index: int, action: int) -> StepResult:
        if not self._over[index]:
            return await self._seats[index].act(action)
        observation, info = await self._seats[index].begin(self._randoms[index])
        return observation, 0.0, False, False, info

    def close_extras(self, **_: Any) -> None:
        """Abandon the episodes."""

        async def stop() -> None:
            await asyncio.gather(*(seat.stop() for seat in self._seats))

        if not self._loop.is_closed():
            self._run(stop())
            self._loop.close()

    def _stack(self, observations: Sequence[Obs]) -> Obs:
        empty = create_empty_array(self.single_observation_space, self.num_envs)
        return cast(Obs, concatenate(self.single_observation_space, observations, empty))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)
