"""Micro-batching: what goes together, who gets which answer, and that nothing hangs."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from roro_ray.engines.batching import Job, MicroBatcher, Turn
from roro_ray.errors import EngineError

pytestmark = pytest.mark.timeout(20)


class Doubler:
    """Answers twice the request, notes its batches; can be held in the middle of one, fail or forget."""

    def __init__(self, batch_size: int = 64, max_wait_s: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.started, self.hold = threading.Event(), threading.Event()
        self.hold.set()
        self.batcher: MicroBatcher[int, int] = MicroBatcher(self.run, batch_size, max_wait_s, "doubler")

    def run(self, jobs: list[Job[int, int]]) -> None:
        self.batches.append([job.request for job in jobs])
        self.started.set()
        assert self.hold.wait(10)
        if any(job.request < 0 for job in jobs):
            raise ValueError("a negative number")
        self.batcher.answer([(job, 2 * job.request) for job in jobs if job.request != 666])

    async def ask(self, *numbers: int) -> list[object]:
        return await asyncio.gather(*(self.batcher.submit(n) for n in numbers), return_exceptions=True)


async def wait_until(condition: object) -> None:
    """Let the event loop run until a callable is true."""
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the condition never came true")


async def test_concurrent_requests_go_together_and_get_their_own_answers() -> None:
    doubler = Doubler()
    assert await doubler.ask(*range(50)) == [2 * n for n in range(50)]
    assert len(doubler.batches) == 1


async def test_a_batch_is_never_larger_than_its_bound() -> None:
    doubler = Doubler(batch_size=8)
    assert await doubler.ask(*range(30)) == [2 * n for n in range(30)]
    assert sorted(map(len, doubler.batches)) == [6, 8, 8, 8]


async def test_requests_wait_for_late_ones_when_asked_to() -> None:
    doubler = Doubler(max_wait_s=0.1)

    async def late(n: int) -> int:
        await asyncio.sleep(0.02 * n)
        return await doubler.batcher.submit(n)

    assert await asyncio.gather(*(late(n) for n in range(3))) == [0, 2, 4]
    assert doubler.batches == [[0, 1, 2]]


async def test_what_comes_while_a_batch_runs_makes_the_next_one() -> None:
    doubler = Doubler()
    doubler.hold.clear()
    first = asyncio.create_task(doubler.batcher.submit(1))
    await wait_until(doubler.started.is_set)
    others = [asyncio.create_task(doubler.batcher.submit(n)) for n in (2, 3)]
    await wait_until(lambda: doubler.batcher.pending == 2)
    doubler.hold.set()
    assert [await first, *[await other for other in others]] == [2, 4, 6]
    assert doubler.batches == [[1], [2, 3]]


async def test_requests_with_one_key_share_one_computation() -> None:
    doubler = Doubler()
    assert await asyncio.gather(*(doubler.batcher.submit(4, key="four") for _ in range(5))) == [8] * 5
    assert doubler.batches == [[4]]
    assert doubler.batcher.merged == 4
    assert await doubler.batcher.submit(4, key="four") == 8  # over: computed again
    assert doubler.batches == [[4], [4]]


async def test_a_cancelled_sharer_does_not_take_the_answer_from_the_others() -> None:
    doubler = Doubler()
    doubler.hold.clear()
    tasks = [asyncio.create_task(doubler.batcher.submit(4, key="four")) for _ in range(2)]
    await wait_until(doubler.started.is_set)
    tasks[0].cancel()
    doubler.hold.set()
    assert await tasks[1] == 8
    assert tasks[0].cancelled()


async def test_a_request_cancelled_in_the_queue_is_never_computed() -> None:
    doubler = Doubler()
    doubler.hold.clear()
    first = asyncio.create_task(doubler.batcher.submit(1))
    await wait_until(doubler.started.is_set)
    waiting = [asyncio.create_task(doubler.batcher.submit(n)) for n in (2, 3)]
    await wait_until(lambda: doubler.batcher.pending == 2)
    waiting[0].cancel()
    await asyncio.sleep(0)
    doubler.hold.set()
    assert await first == 2
    assert await waiting[1] == 6
    assert doubler.batches == [[1], [3]]


async def test_a_batch_that_raises_fails_its_own_requests_and_no_others() -> None:
    doubler = Doubler(batch_size=2)
    results = await doubler.ask(1, -1, 2, 3)
    assert [type(result) for result in results] == [EngineError, EngineError, int, int]
    assert "a negative number" in str(results[0])
    assert "ValueError" in str(results[0])
    assert await doubler.ask(5) == [10]


async def test_a_forgotten_request_fails_instead_of_hanging() -> None:
    doubler = Doubler()
    forgotten, answered = await doubler.ask(666, 1)
    assert isinstance(forgotten, EngineError)
    assert answered == 2


async def test_work_put_back_is_finished_later() -> None:
    seen: list[list[int]] = []
    batcher: MicroBatcher[int, int]

    def run(jobs: list[Job[int, int]]) -> None:
        seen.append([job.request for job in jobs])
        whole = [job for job in jobs if job.state or job.request < 3]
        rest = [job for job in jobs if job not in whole]
        for job in rest:
            job.state = "half done"
        batcher.put_back(rest)
        batcher.answer([(job, job.request) for job in whole])

    batcher = MicroBatcher(run, 64, 0.0, "putter")
    assert await asyncio.gather(*(batcher.submit(n) for n in range(5))) == list(range(5))
    assert seen == [[0, 1, 2, 3, 4], [3, 4]]


def test_one_batcher_serves_one_event_loop_after_another() -> None:
    doubler = Doubler()
    for n in range(3):
        assert asyncio.run(doubler.ask(n, n + 1)) == [2 * n, 2 * n + 2]


def test_a_loop_that_ends_amid_a_batch_leaves_nothing_stuck() -> None:
    doubler = Doubler()
    doubler.hold.clear()

    async def abandon() -> None:
        task = asyncio.create_task(doubler.batcher.submit(1))
        await wait_until(doubler.started.is_set)
        queued = asyncio.create_task(doubler.batcher.submit(2))
        await wait_until(lambda: doubler.batcher.pending == 1)
        assert not task.done() and not queued.done()

    asyncio.run(abandon())
    doubler.hold.set()
    assert asyncio.run(doubler.ask(3)) == [6]
    assert 2 not in [number for batch in doubler.batches for number in batch]


def test_a_loop_that_ends_before_its_batch_goes_off_leaves_nothing_stuck() -> None:
    doubler = Doubler(max_wait_s=5.0)

    async def abandon() -> None:
        asyncio.create_task(doubler.batcher.submit(1))  # noqa: RUF006  # cancelled with the loop, on purpose
        await asyncio.sleep(0)

    asyncio.run(abandon())
    doubler.batcher._max_wait_s = 0.0
    assert asyncio.run(doubler.ask(3)) == [6]


def test_two_loops_in_two_threads_share_a_batcher() -> None:
    doubler = Doubler()
    results: dict[int, list[object]] = {}

    async def many(start: int) -> list[object]:
        return [number for k in range(20) for number in await doubler.ask(*range(start + k, start + k + 5))]

    def work(start: int) -> None:
        results[start] = asyncio.run(many(start))

    threads = [threading.Thread(target=work, args=(start,)) for start in (100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for start in (100, 200):
        assert results[start] == [2 * n for k in range(20) for n in range(start + k, start + k + 5)]


async def test_batchers_that_share_a_turn_never_run_side_by_side() -> None:
    turn, running, most = Turn(), [0], [0]

    def make(name: str) -> MicroBatcher[int, int]:
        def run(jobs: list[Job[int, int]]) -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.002)
            running[0] -= 1
            if any(job.request == 7 for job in jobs):
                raise ValueError("seven")
            batcher.answer([(job, job.request) for job in jobs])

        batcher = MicroBatcher(run, 4, 0.0, name, turn)
        return batcher

    batchers = [make(name) for name in "abc"]
    asked = [batcher.submit(n) for n in range(12) for batcher in batchers]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert most == [1]
    assert [r for r in results if not isinstance(r, EngineError)] == [
        n for n in (0, 1, 2, 3, 8, 9, 10, 11) for _ in "abc"
    ]


async def test_requests_gather_for_one_batcher_while_another_has_the_turn() -> None:
    turn = Turn()
    slow, quick = Doubler(), Doubler()
    slow.batcher._turn = quick.batcher._turn = turn
    slow.hold.clear()
    first = asyncio.create_task(slow.batcher.submit(1))
    await wait_until(slow.started.is_set)
    others = []
    for n in range(5):
        others.append(asyncio.create_task(quick.batcher.submit(n)))
        await asyncio.sleep(0.002)
    assert quick.batches == []
    slow.hold.set()
    assert [await first, *[await other for other in others]] == [2, 0, 2, 4, 6, 8]
    assert quick.batches == [[0, 1, 2, 3, 4]]


def test_a_loop_that_ends_while_it_waits_for_its_turn_blocks_nobody() -> None:
    turn = Turn()
    slow, quick = Doubler(), Doubler()
    slow.batcher._turn = quick.batcher._turn = turn
    slow.hold.clear()

    async def abandon() -> None:
        tasks = [asyncio.create_task(slow.batcher.submit(1))]
        await wait_until(slow.started.is_set)
        tasks.append(asyncio.create_task(quick.batcher.submit(2)))
        await wait_until(lambda: turn._waiting)
        assert not any(task.done() for task in tasks)

    asyncio.run(abandon())
    slow.hold.set()
    assert asyncio.run(quick.ask(3)) == [6]
    assert asyncio.run(slow.ask(4)) == [8]
