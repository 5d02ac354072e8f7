"""Several versions of the router in one worker: who shares, who waits, what is copied."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
import torch

from actors.versions import Room, VersionSlots
from roro_ray.config import RouterConfig
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.router import copy_router, make_router
from roro_ray.types import Trajectory
from tests.fakes import run_specs
from tests.scripted_world import make_scripted_config, make_scripted_queries, make_scripted_runner


class House:
    """Slots of named holders, the weights that were put into each, and what happened."""

    def __init__(self, most: int) -> None:
        numbers = itertools.count()
        self.slots: VersionSlots[list[int]] = VersionSlots(lambda: [next(numbers)], most)
        self.log: list[str] = []

    def load(self, serial: int) -> Callable[[list[int]], Awaitable[None]]:
        async def load(holder: list[int]) -> None:
            self.log.append(f"load {serial} into {holder[0]}")
            await asyncio.sleep(0)
            holder[1:] = [serial]

        return load

    async def stay(self, name: str, serial: int, meet: asyncio.Event | asyncio.Barrier | None = None) -> None:
        async with self.slots.enter(serial, self.load(serial)) as holder:
            self.log.append(f"{name} in")
            if meet is not None:
                await asyncio.wait_for(meet.wait(), 10)
            assert holder[1] == serial, "the weights changed under a run"
            self.log.append(f"{name} out")


def test_two_versions_run_at_once_and_a_third_waits() -> None:
    async def main() -> House:
        house, everyone = House(2), asyncio.Barrier(3)
        runs = [house.stay("a", 1, everyone), house.stay("b", 1, everyone), house.stay("c", 2, everyone)]
        await asyncio.gather(*runs, house.stay("d", 3))
        return house

    house = asyncio.run(main())
    assert len(house.slots) == 2 and sum(line.startswith("load") for line in house.log) == 3
    assert house.log.index("d in") > min(house.log.index("c out"), house.log.index("b out"))


def test_no_copy_is_made_before_it_is_needed() -> None:
    async def main() -> House:
        house = House(3)
        for serial in (1, 1, 2, 1):
            await house.stay("x", serial)
        return house

    house = asyncio.run(main())
    assert len(house.slots) == 1
    assert [line for line in house.log if "load" in line] == ["load 1 into 0", "load 2 into 0", "load 1 into 0"]


def test_the_longest_unused_weights_make_way() -> None:
    async def main() -> House:
        house, both = House(2), asyncio.Barrier(2)
        await asyncio.gather(house.stay("a", 1, both), house.stay("b", 2, both))
        await house.stay("a", 1)
        await house.stay("c", 3)
        await house.stay("a", 1)
        return house

    house = asyncio.run(main())
    assert [line for line in house.log if "load" in line] == ["load 1 into 0", "load 2 into 1", "load 3 into 1"]


def test_a_load_holds_no_other_version_back_and_one_that_fails_is_nobodys_weights() -> None:
    async def main() -> None:
        house, other_is_in = House(2), asyncio.Event()

        async def fail(holder: list[int]) -> None:
            await asyncio.wait_for(other_is_in.wait(), 10)
            raise OSError("no weights")

        async def try_first() -> None:
            with pytest.raises(OSError, match="no weights"):
                async with house.slots.enter(1, fail):
                    raise AssertionError("inside without weights")

        async def second() -> None:
            async with house.slots.enter(2, house.load(2)):
                other_is_in.set()

        await asyncio.gather(try_first(), second())
        await house.stay("again", 1)
        assert house.log[-3:] == ["load 1 into 0", "again in", "again out"]

    asyncio.run(main())


def test_room_bounds_the_episodes_of_all_runs() -> None:
    async def main() -> tuple[int, list[int]]:
        room, inside, most, order = Room(10), 0, 0, []

        async def run(episodes: int) -> None:
            nonlocal inside, most
            async with room.take(episodes):
                inside += episodes
                most = max(most, inside)
                order.append(episodes)
                await asyncio.sleep(0)
                inside -= episodes

        await asyncio.gather(*(run(episodes) for episodes in (6, 4, 5, 5, 3, 7, 10, 1)))
        assert not inside
        return most, order

    most, order = asyncio.run(main())
    assert most == 10 and sorted(order) == [1, 3, 4, 5, 5, 6, 7, 10]


def test_a_copy_of_an_adapter_router_shares_the_frozen_weights() -> None:
    router = make_router(RouterConfig(encoder_rank=2), 2)
    copy = copy_router(router)
    mine, other = dict(router.named_parameters()), dict(copy.named_parameters())
    assert {name for name in mine if mine[name] is not other[name]} == set(router.learned_state())
    assert copy.pieces is router.pieces
    with torch.no_grad():
        other["head.2.bias"].add_(1)
    assert not torch.equal(mine["head.2.bias"], other["head.2.bias"])


def test_a_copied_runner_has_weights_of_its_own_on_the_same_pool() -> None:
    runner = make_scripted_runner(make_scripted_config())
    copy = runner.copy()
    assert copy.pool is runner.pool
    state = {name: tensor.clone() for name, tensor in runner.router.network.state_dict().items()}
    runner.load_router(state, 3)
    state["head.2.bias"] = torch.tensor([-100.0, 100.0])
    copy.load_router(state, 4)
    spec = EpisodeSpec("one", make_scripted_queries(1)[0], "router", seed=1)
    for each, version in ((runner, 3), (copy, 4)):
        [trajectory] = run_specs(each, [spec])
        assert isinstance(trajectory, Trajectory)
        assert {step.decision.version for step in trajectory.steps} == {version}
    assert trajectory.models == (1, 1, 1, 1)
