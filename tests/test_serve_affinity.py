"""Session affinity on a real Serve: calls of one request, many at once, all arrive; a session stays on its replica."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.affinity import make_session, split_session


def test_a_session_id_tells_its_try() -> None:
    assert split_session(make_session("a+b", 3)) == ("a+b", 3)
    assert split_session("plain") == ("plain", 0)
    assert split_session("odd+name") == ("odd+name", 0)


def make_classes() -> tuple[type, type]:
    """Made in a function, so that they travel by value: a replica cannot import a test module."""

    class Echo:
        """Tells which process answered."""

        async def ping(self, value: int) -> tuple[int, int]:
            await asyncio.sleep(0.001)
            return value, os.getpid()


    class Caller:
        """Makes many calls while it handles one request, as an answer with several choices does."""

        def __init__(self, echo: object) -> None:
            self._echo = echo

        async def run(self, calls: int, lanes: int, sessions: int) -> list[tuple[int, int]]:
            numbers, answers = iter(range(calls)), []

            async def lane() -> None:
                for number in numbers:
                    session = make_session(f"session-{number % sessions}")
                    handle = self._echo.options(method_name="ping", session_id=session)  # type: ignore[attr-defined]
                    answers.append(await handle.remote(number))

            await asyncio.gather(*(lane() for _ in range(lanes)))
            return answers

    return Echo, Caller


@pytest.fixture(scope="module")
def caller() -> Iterator[object]:
    import ray
    from ray import serve

    from actors.cluster import start_local
    from serve.app import AFFINITY

    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    folder = tempfile.mkdtemp(prefix="roro-ray-")
    start_local(200, Path(folder), 4)
    try:
        serve.start(http_options={"location": "NoServer"})
        echo_class, caller_class = make_classes()
        small = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1000}
        echo = serve.deployment(name="echo", num_replicas=2, request_router_config=AFFINITY, **small)(
            echo_class
        ).bind()
        serve.run(serve.deployment(name="caller", **small)(caller_class).bind(echo), name="affinity", route_prefix=None)
        yield serve
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_all_calls_of_one_request_arrive_and_sessions_stay(caller: object) -> None:
    async def ask() -> list[tuple[int, int]]:
        handle = caller.get_app_handle("affinity")  # type: ignore[attr-defined]
        return await asyncio.wait_for(_await(handle.run.remote(600, 32, 40)), 60)

    answers = asyncio.run(ask())
    assert sorted(number for number, _ in answers) == list(range(600))
    homes: dict[int, set[int]] = {}
    for number, pid in answers:
        homes.setdefault(number % 40, set()).add(pid)
    assert all(len(pids) == 1 for pids in homes.values()), "a session's calls met two replicas"
    assert len(set.union(*homes.values())) == 2, "40 sessions should spread over both replicas"


async def _await(response: object) -> list[tuple[int, int]]:
    return await response  # type: ignore[misc]
