"""Every wait has a deadline, and what can never fit is refused at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import ray

from actors.cluster import open_cluster
from actors.waiting import describe_actor, wait_async, wait_for
from roro_ray.config import RayConfig
from roro_ray.errors import DeadlineError, QueueFullError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


class Sleeper:
    """An actor that answers, sleeps or fails as it is told."""

    async def sleep(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def fail(self, error: Exception) -> None:
        raise error

    async def ask(self, other: Any, seconds: float, timeout_s: float) -> float:
        return await wait_async(other.sleep.remote(seconds), "the other's sleep", timeout_s, other)


@pytest.fixture
def sleeper() -> Any:
    actor = ray.remote(Sleeper).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


def test_values_come_back(sleeper: Any) -> None:
    assert wait_for(sleeper.sleep.remote(0), "one", 20) == 0
    assert wait_for([sleeper.sleep.remote(0.01 * i) for i in range(3)], "three", 20) == [0, 0.01, 0.02]


def test_a_deadline_says_what_how_long_and_the_actors_state(sleeper: Any) -> None:
    wait_for(sleeper.sleep.remote(0), "start", 20)
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"judging 3 trajectories: no answer in 0\.2 s \(Sleeper .*ALIVE"):
        wait_for(sleeper.sleep.remote(5), "judging 3 trajectories", 0.2, sleeper)
    assert time.monotonic() - started < 3


def test_a_deadline_inside_an_actor(sleeper: Any) -> None:
    other = ray.remote(Sleeper).options(num_cpus=0).remote()
    assert wait_for(sleeper.ask.remote(other, 0, 20), "asking", 30) == 0
    with pytest.raises(DeadlineError, match=r"the other's sleep: no answer in 0\.2 s \(Sleeper .*ALIVE"):
        wait_for(sleeper.ask.remote(other, 5, 0.2), "asking", 20)
    ray.kill(other)


def test_a_deadline_on_an_actor_without_resources() -> None:
    actor = ray.remote(Sleeper).options(num_cpus=100).remote()
    with pytest.raises(DeadlineError, match=r"PENDING_CREATION.*waiting for resources, available now: CPU"):
        wait_for(actor.sleep.remote(0), "an actor that cannot start", 0.3, [actor])
    ray.kill(actor)


def test_our_errors_come_back_as_themselves(sleeper: Any) -> None:
    with pytest.raises(QueueFullError) as caught:
        wait_for(sleeper.fail.remote(QueueFullError("no room")), "failing", 20)
    assert type(caught.value) is QueueFullError and str(caught.value) == "no room"
    with pytest.raises(ZeroDivisionError):  # others in Ray's wrapper, which is one of them too
        wait_for(sleeper.fail.remote(ZeroDivisionError("x")), "failing", 20)


def test_a_dead_actor_is_described(sleeper: Any) -> None:
    wait_for(sleeper.sleep.remote(0), "start", 20)
    ray.kill(sleeper)
    with pytest.raises(ray.exceptions.RayActorError):
        wait_for(sleeper.sleep.remote(0), "a dead actor", 20)
    assert "DEAD" in describe_actor(sleeper)


def test_a_cluster_in_use_is_joined_and_left_running() -> None:
    with open_cluster(RayConfig(address="local")) as facts:
        assert not facts.started and facts.resources["CPU"] == 4
    assert ray.is_initialized()
