"""What the serving benchmark runs on: a run to serve, models that can be slowed, deployments, and processor time."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import psutil
import torch

from roro_ray.config import Config, PoolConfig, RouterConfig
from roro_ray.data.run_dir import open_run
from roro_ray.engines.pool import EnginePool, make_pool
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router
from serve.config import Served
from serve.metrics import NoMetrics

if TYPE_CHECKING:
    from serve.remote import ServeBackend

APP = "roro"
ROLES = ("ingress", "router", "models", "proxy", "client", "ray")  # whose processor time is told apart
_READY_S = 180.0
_HEAD_SCALE = 100.0  # makes the decisions of an untrained head depend on the text, and decidedly so
_Result = TypeVar("_Result")


def make_run(folder: Path) -> Path:
    """A run with an untrained router on the shipped encoder, whose decisions differ from text to text."""
    run = open_run(Config(run_dir=str(folder)))
    torch.manual_seed(0)
    router = make_router(RouterConfig(prior=0.5), 2)
    with torch.no_grad():
        router.head[-1].weight.mul_(_HEAD_SCALE)  # type: ignore[operator, union-attr]
    save_router(router, run.router("roro"), version=1)
    return folder


class LoopThread:
    """An event loop in a thread of its own: Serve's handles stay tied to the loop of their first call until the end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


# Models


def slow_down(engine: Any, token_ms: float) -> None:
    """Make each forward pass of a loaded engine take so much longer, without using the processor.

    So a pass over a batch takes as long as one of a large model on an accelerator would, and writes the same.
    """
    decoder = engine._decoder
    forward: Callable[..., Any] = decoder._forward

    def wait_and_forward(*arguments: Any) -> Any:
        time.sleep(token_ms / 1000)
        return forward(*arguments)

    decoder._forward = wait_and_forward


async def make_local_pool(config: PoolConfig, token_ms: float) -> EnginePool:
    """The same engines in this process."""
    pool = make_pool(config)
    await pool.ready()
    if token_ms:
        for engine in pool.engines:
            slow_down(engine, token_ms)
    return pool


def _make_slow_replica(token_ms: float) -> type:
    from serve.deployments import ModelReplica

    class SlowReplica(ModelReplica):
        """A model whose passes take longer."""

        _slowed = False

        async def facts(self) -> Any:
            facts = await super().facts()
            if not self._slowed:
                self._slowed = True
                slow_down(self._engine, token_ms)
            return facts

    return SlowReplica


# Deployments


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def deploy(served: Served, url: str, token_ms: float) -> None:
    """Serve this in place of what is served now; returns once it answers."""
    from ray import serve

    from serve import app

    serve.delete(APP)
    replica = _make_slow_replica(token_ms) if token_ms else app.ModelReplica
    with mock.patch.object(app, "ModelReplica", replica):
        serve.run(app.make_application(served), name=APP, route_prefix="/")
    wait_ready(url)


def wait_ready(url: str) -> None:
    """Wait until the models are loaded."""
    deadline = time.monotonic() + _READY_S
    last = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=30) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            last = repr(error)
        time.sleep(0.2)
    raise TimeoutError(f"{url}/healthz is not 200 after {_READY_S:.0f} s (last: {last})")


def connect(served: Served) -> tuple[dict[str, Any], ServeBackend]:
    """Handles of the models' deployments by the model's name, and the models and router as the ingress asks them."""
    from ray import serve

    from serve.remote import ServeBackend

    handles: dict[str, Any] = {
        model.name: serve.get_deployment_handle(f"model-{model.name}", APP) for model in served.pool.models
    }
    router: Any = serve.get_deployment_handle("router", APP)
    return handles, ServeBackend(handles, router, served.config.rescue, NoMetrics())


def with_answers(served: Served, **limits: Any) -> Served:
    """The same under other limits of `answer`."""
    config = served.config
    return replace(served, config=replace(config, answer=replace(config.answer, **limits)))


# Processor time


class ProcessorClock:
    """Processor seconds so far of this process and of everything that it started, by role.

    Processes are looked up when the clock is made: make a new one after each deployment.
    """

    def __init__(self) -> None:
        own = psutil.Process()
        self._processes: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
        self._processes["client"].append(own)
        for process in own.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                self._processes[_find_role(process)].append(process)

    def read(self) -> dict[str, float]:
        """Seconds by role."""
        return {role: sum(map(_read_seconds, members)) for role, members in self._processes.items()}

    @contextlib.contextmanager
    def spent(self, into: dict[str, float]) -> Iterator[None]:
        """Add what the block spends."""
        before = self.read()
        yield
        for role, seconds in self.read().items():
            into[role] = into.get(role, 0.0) + seconds - before[role]


def _find_role(process: psutil.Process) -> str:
    line = process.cmdline()
    title = line[0] if line else process.name()
    replica = re.search(r"ServeReplica:[^:]+:(ingress|router|model)\b", title)
    if replica:
        return "models" if replica[1] == "model" else replica[1]
    return "proxy" if "ProxyActor" in title or "haproxy" in title.rsplit("/", 1)[-1].lower() else "ray"


def _read_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system
