"""Decisions gathered into remote calls: nothing lost, nothing mixed up, fewer calls than readings."""

from __future__ import annotations

import asyncio

import pytest

from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.opinion import Opinion, RouterReading
from serve.gather import Gatherer


class FakeRouter:
    """Answers with the length of the text as version, after a while; remembers its calls."""

    def __init__(self, delay_s: float = 0.001, fails: bool = False) -> None:
        self.calls: list[tuple[int, int, str]] = []
        self.delay_s = delay_s
        self.fails = fails

    async def ask(self, version: int, readings: tuple[RouterReading, ...], session: str) -> list[Opinion]:
        self.calls.append((version, len(readings), session))
        await asyncio.sleep(self.delay_s)
        if self.fails:
            raise EngineUnavailableError("gone")
        return [Opinion((0.0,), version, int(reading.texts[0]), 0, 0.0) for reading in readings]


def read(number: int) -> RouterReading:
    return RouterReading((str(number),), ())


async def test_each_reading_gets_its_own_opinion_in_few_calls() -> None:
    router = FakeRouter()
    gatherer = Gatherer(router.ask, 1)
    opinions = await asyncio.gather(*(gatherer.judge_reading(3, read(i), f"s{i}") for i in range(700)))
    assert [opinion.prefix_tokens for opinion in opinions] == list(range(700))
    assert sum(count for _, count, _ in router.calls) == 700
    assert len(router.calls) == 3, "700 readings at once are three calls of at most 256"


async def test_versions_and_lanes_are_never_mixed() -> None:
    router = FakeRouter()
    gatherer = Gatherer(router.ask, 4)
    opinions = await asyncio.gather(*(gatherer.judge_reading(i % 2, read(i), f"s{i}") for i in range(200)))
    assert [opinion.version for opinion in opinions] == [i % 2 for i in range(200)]
    assert {session for _, _, session in router.calls} == {f"lane-{i}" for i in range(4)}
    # The same session takes the same lane again.
    before = len(router.calls)
    await gatherer.judge_reading(0, read(1), "s7")
    await gatherer.judge_reading(0, read(1), "s7")
    assert router.calls[before][2] == router.calls[before + 1][2]


async def test_readings_gather_while_calls_are_under_way() -> None:
    router = FakeRouter(delay_s=0.05)
    gatherer = Gatherer(router.ask, 1)
    tasks = []
    for i in range(20):
        tasks.append(asyncio.create_task(gatherer.judge_reading(0, read(i), "s")))
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    assert sum(count for _, count, _ in router.calls) == 20
    assert len(router.calls) < 20, "with two calls under way the others wait for the next"


async def test_an_error_reaches_all_who_share_the_call_and_the_next_call_is_tried() -> None:
    router = FakeRouter(fails=True)
    gatherer = Gatherer(router.ask, 1)
    results = await asyncio.gather(*(gatherer.judge_reading(0, read(i), "s") for i in range(5)), return_exceptions=True)
    assert all(isinstance(result, EngineUnavailableError) for result in results)
    router.fails = False
    assert (await gatherer.judge_reading(0, read(8), "s")).prefix_tokens == 8


async def test_a_caller_that_leaves_takes_nobody_with_it() -> None:
    router = FakeRouter(delay_s=0.02)
    gatherer = Gatherer(router.ask, 1)
    tasks = [asyncio.create_task(gatherer.judge_reading(0, read(i), "s")) for i in range(3)]
    await asyncio.sleep(0.005)
    tasks[1].cancel()
    assert (await tasks[0]).prefix_tokens == 0
    assert (await tasks[2]).prefix_tokens == 2
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert not gatherer._open, "an idle gatherer keeps nothing"
