"""A small Serve for test_serve_affinity: `python tests/affinity_host.py CALLS LANES SESSIONS` prints answers.

A process of its own, since the one that runs the tests may hold another Ray.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


class Echo:
    """Tells which process answered."""

    async def ping(self, value: int) -> tuple[int, int]:
        await asyncio.sleep(0.001)
        return value, os.getpid()


class Caller:
    """Makes many calls while it handles one request, as an answer with several choices does."""

    def __init__(self, echo: Any) -> None:
        self._echo = echo

    async def run(self, calls: int, lanes: int, sessions: int) -> list[tuple[int, int]]:
        from serve.affinity import make_session

        numbers, answers = iter(range(calls)), []

        async def lane() -> None:
            for number in numbers:
                session = make_session(f"session-{number % sessions}")
                answers.append(await self._echo.options(method_name="ping", session_id=session).remote(number))

        await asyncio.gather(*(lane() for _ in range(lanes)))
        return answers


def main(calls: int, lanes: int, sessions: int) -> None:
    """Deploy two echoes, ask, print, stop."""
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "0"
    import ray
    from ray import serve

    from actors.cluster import start_local
    from serve.app import AFFINITY

    folder = Path(tempfile.mkdtemp(prefix="roro-ray-"))
    start_local(200, folder, 4)
    try:
        serve.start(http_options={"location": "NoServer"})
        small: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1000}
        echo = serve.deployment(name="echo", num_replicas=2, request_router_config=AFFINITY, **small)(Echo).bind()
        serve.run(serve.deployment(name="caller", **small)(Caller).bind(echo), name="affinity", route_prefix=None)

        async def ask() -> Any:
            return await serve.get_app_handle("affinity").run.remote(calls, lanes, sessions)

        print(json.dumps(asyncio.run(asyncio.wait_for(ask(), 60))), flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
