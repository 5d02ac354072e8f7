"""What tests of a running server share: a run to serve without training, the server as a process, its clients."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from processes import ROOT, clean_environment, free_ports, short_temp_dir

MODELS = ("small", "large")


def make_run(folder: Path) -> Path:
    """A run directory with a copy of each shipped model and an untrained router that uses both."""
    from roro_ray.config import Config, ModelConfig
    from roro_ray.engines.loading import resolve_model_path
    from roro_ray.settings import save_config

    run, config = folder / "run", Config()
    config.run_dir = str(run)
    for name in MODELS:
        shutil.copytree(resolve_model_path(f"world:{name}"), folder / name)
    config.pool.models = [ModelConfig(name, str(folder / name)) for name in MODELS]
    save_config(config, run / "config.yaml")
    make_router_files(run / "router" / "roro", 3)
    return run


def make_router_files(directory: Path, version: int, lean: float = 0.0) -> Path:
    """A router whose opinions vary with the text; the more it leans, the likelier the large model."""
    import torch

    from roro_ray.config import RouterConfig
    from roro_ray.routing.router import make_router
    from roro_ray.routing.router_files import save_router

    torch.manual_seed(0)
    router = make_router(RouterConfig(), len(MODELS))
    last = router.head[-1]
    with torch.no_grad():
        last.weight.mul_(500)  # drawn small, so that an untrained router takes every text alike
        last.bias.copy_(torch.tensor([0.0, lean]))
    return save_router(router, directory, version)


@dataclass
class Reply:
    """A streamed answer as a client got it."""

    status: int = 0
    text: str = ""
    done: bool = False
    error: dict[str, Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.done and self.error is None


def make_questions(count: int) -> list[str]:
    """Queries of the embedded world."""
    from roro_ray.world.tasks import make_queries

    return [query.text for query in make_queries("chain", "test", count, 0)]


def make_body(question: str, seed: int = 0, model: str = "auto", **more: Any) -> dict[str, Any]:
    """A request that always has the same answer."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "seed": seed, "temperature": 0}
    return {**body, **more}


@dataclass
class Server:
    """A running server: where it is, and orders to it (`tests/serve_host.py`)."""

    url: str
    process: subprocess.Popen[str]
    run: Path
    log: Path

    def order(self, what: str, **arguments: Any) -> Any:
        """What the server's process answers to an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = read_answer(self.process, self.log)
        assert "found" in answer, answer
        return answer["found"]

    def pids(self, deployment: str) -> list[int]:
        """The processes of a deployment."""
        return list(self.order("pids", deployment=deployment))

    async def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> float:
        """Wait for a condition; gives the seconds that it took."""
        began = time.monotonic()
        while not await asyncio.to_thread(condition):
            assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
        """A streamed answer, read to its end."""
        reply, began = Reply(), time.monotonic()
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            reply.status = response.status_code
            async for line in response.aiter_lines():
                take_line(reply, line)
        reply.seconds = time.monotonic() - began
        return reply

    async def ask_all(self, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
        """Streamed answers, all at once."""
        async with make_client() as client:
            return await asyncio.gather(*(self.stream(client, body) for body in bodies))


def take_line(reply: Reply, line: str) -> None:
    """Add a line of a stream to what a client has."""
    if line == "data: [DONE]":
        reply.done = True
    elif line.startswith("data: "):
        chunk = json.loads(line.removeprefix("data: "))
        reply.error = chunk.get("error", reply.error)
        for choice in chunk.get("choices", []):
            reply.text += choice["delta"].get("content") or ""
        if chunk.get("routing", {}).get("event") == "summary":
            reply.summary = chunk["routing"]


def make_client(timeout_s: float = 90) -> httpx.AsyncClient:
    """A client that opens as many connections as it needs."""
    return httpx.AsyncClient(timeout=timeout_s, limits=httpx.Limits(max_connections=None))


def read_answer(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The next answer of the server's process."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("@"):
            found: dict[str, Any] = json.loads(line[1:])
            return found
    raise AssertionError(f"the server has ended:\n{log.read_text()[-3000:]}")


@contextmanager
def running_server(settings: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server with a Ray of its own on a free port, stopped at the end."""
    with short_temp_dir() as folder:
        run = make_run(folder)
        port = free_ports(1)[0]
        (folder / "settings.json").write_text(json.dumps({"run_dir": str(run), "port": port, **settings}))
        log = folder / "server.log"
        command = [sys.executable, str(ROOT / "tests" / "serve_host.py"), str(folder / "settings.json")]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**clean_environment(folder), **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            url = read_answer(process, log)["url"]
            yield Server(url, process, run, log)
        finally:
            stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """End the server: told to, and with its whole family where that takes too long."""
    import psutil

    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    try:
        process.communicate('{"do": "stop"}\n', timeout=40)
    except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
        process.kill()
    for member in family:
        if member.is_running():
            with_pid(member.pid)


def with_pid(pid: int) -> None:
    """Kill one process, if it is still there."""
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
