"""Engines in actors of their own: one model per actor, shared by all rollout workers (pool.placement=actors).

For models that are too large to sit in every worker. The worker's side is an `Engine` like any other. For tiny models
it gathers concurrent requests into one remote call, because a call costs about a millisecond and a token far less; for
engines that join requests while others run (`vllm`, `openai`) every request is a call of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray

from actors.adapters import Parcel, install
from actors.placement import bundle_options, role_bundle
from actors.resources import Bundle
from actors.waiting import wait_async
from roro_ray.config import Config, ModelConfig, PoolConfig
from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, StepRequest, StepResult
from roro_ray.errors import EngineError, RoroError
from roro_ray.gpu_checks import count_gpus, shares_gpu
from roro_ray.learning.adapter_files import AdapterVersion

MOST_REQUESTS = 10_000  # at once in an actor: under Ray's own bound some would wait outside the engine's batch
_MOST_CALLS = 2  # in flight per worker and model: the next batch gathers while these are computed
Item = StepRequest | tuple[str, tuple[str, ...], str]
MakeEngine = Callable[[ModelConfig, PoolConfig], Engine]


def make_model_engine(model: ModelConfig, pool: PoolConfig) -> Engine:
    """The engine of one model of the pool."""
    from roro_ray.engines.pool import make_engine

    return make_engine(model, pool)


class EngineActor:
    """The actor: one engine, asked in batches. The constructor stores; `ready` loads.

    `before` is what another engine says once it is ready: Ray makes this actor then, and not earlier.
    """

    def __init__(self, make: Callable[[], Engine], before: EngineFacts | None = None) -> None:
        self._engine = make()
        self._loading = asyncio.Lock()
        self._adapters: dict[str, int] = {}

    async def ready(self) -> EngineFacts:
        """Load the model."""
        return await self._engine.ready()

    async def load_adapters(self, parcels: Sequence[Parcel]) -> None:
        """Serve adapters; those that it serves already, in this version or a newer one, cost nothing."""
        await self._engine.ready()
        async with self._loading:
            for parcel in parcels:
                name, version = parcel.adapter.name, parcel.adapter.version
                if self._adapters.get(name, -1) < version:
                    await install(parcel, self._engine)
                    self._adapters[name] = version

    async def serve(self, items: Sequence[Item], parcels: Sequence[Parcel] = ()) -> list[Any]:
        """One StepResult, ChoiceScores or exception for each request; one that fails does not fail the others.

        `parcels` are the adapters that the caller counts on: after a restart nobody else brings them.
        """
        await self._engine.ready()  # free when loaded; after a restart nobody else asks for it
        await self.load_adapters(parcels)
        results = await asyncio.gather(*(self._serve_one(item) for item in items), return_exceptions=True)
        if getattr(self._engine, "is_dead", False):
            os._exit(1)  # Ray starts the actor anew, with a new engine, and asks it again
        return [result if not isinstance(result, BaseException) else _portable(result) for result in results]

    async def _serve_one(self, item: Item) -> StepResult | ChoiceScores:
        if isinstance(item, StepRequest):
            return await self._engine.generate_step(item)
        return await self._engine.score_choices(*item)


def _portable(error: BaseException) -> RoroError:
    """An error that pickles: the project's own as it is, any other by its text."""
    return error if isinstance(error, RoroError) else EngineError(f"{type(error).__name__}: {error}")


class RemoteEngine:
    """The worker's side of an EngineActor.

    Args:
        actor: handle of the EngineActor.
        timeout_s: deadline of one call; loading after a restart counts.
        gathers: send the requests of a moment in one call. Right where a step takes about as long as a call; where it
            takes seconds, a shared call would hold back all its steps until the longest of them is written.
    """

    def __init__(self, name: str, actor: Any, timeout_s: float, gathers: bool = True) -> None:
        self.name = name
        self.actor = actor
        self._timeout_s = timeout_s
        self._gathers = gathers
        self._parcels: dict[str, Parcel] = {}
        self._pending: list[tuple[Item, asyncio.Future[Any]]] = []
        self._calls = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_engine, (self.name, self.actor, self._timeout_s, self._gathers, self._parcels)

    async def take_parcel(self, parcel: Parcel) -> None:
        """Have the actor serve an adapter, now and after a restart."""
        held = self._parcels.get(parcel.adapter.name)
        if held is None or held.adapter.version < parcel.adapter.version:
            await self._wait(self.actor.load_adapters.remote([parcel]), f"adapter {parcel.adapter.name}")
            self._parcels[parcel.adapter.name] = parcel

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        """Serve the adapter in a directory that the actor's node sees."""
        await self.take_parcel(Parcel(AdapterVersion(name, version, path)))

    async def ready(self) -> EngineFacts:
        """Wait until the actor has loaded its model."""
        return await self._wait(self.actor.ready.remote(), "ready")

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step."""
        return await self._submit(request)

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score continuations."""
        return await self._submit((prefix, choices, adapter))

    async def _submit(self, item: Item) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._gathers:
            await self._serve([(item, future)])
            return future.result()
        self._pending.append((item, future))
        self._start_call()
        return await future

    def _start_call(self) -> None:
        if self._calls < _MOST_CALLS:
            self._calls += 1
            task = asyncio.get_running_loop().create_task(self._call())
            self._tasks.add(task)  # the loop holds tasks only weakly
            task.add_done_callback(self._tasks.discard)

    async def _call(self) -> None:
        try:
            seen = -1
            while seen < len(self._pending):  # until a pass of the event loop brings no more
                seen = len(self._pending)
                await asyncio.sleep(0)
            batch = [(item, future) for item, future in self._pending if not future.done()]
            self._pending.clear()
            if batch:
                await self._serve(batch)
        finally:
            self._calls -= 1
            if self._pending:
                self._start_call()

    async def _serve(self, batch: Sequence[tuple[Item, asyncio.Future[Any]]]) -> None:
        try:
            ref = self.actor.serve.remote([item for item, _ in batch], list(self._parcels.values()))
            results = await self._wait(ref, f"{len(batch)} requests")
        except Exception as error:  # the callers' border: whoever asked must hear of it
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def _wait(self, ref: Any, what: str) -> Any:
        return await wait_async(ref, f"model {self.name}: {what}", self._timeout_s, self.actor)


def _restore_engine(
    name: str, actor: Any, timeout_s: float, gathers: bool, parcels: dict[str, Parcel]
) -> RemoteEngine:
    engine = RemoteEngine(name, actor, timeout_s, gathers)
    engine._parcels = dict(parcels)
    return engine


def gathers(model: ModelConfig) -> bool:
    """Whether requests to a model are sent together: `hf` computes in batches and runs tiny models."""
    return model.engine == "hf"


def engine_bundle(config: Config, model: ModelConfig) -> Bundle:
    """What the actor of a model of the pool asks of its node."""
    return role_bundle(config, model.name, config.ray.engine_cpus, count_gpus(model, config.ray))


def start_engines(config: Config, make: MakeEngine = make_model_engine) -> tuple[RemoteEngine, ...]:
    """One actor per model of the pool, cheap to dear; they load when first asked whether they are ready.

    Those that may share a GPU load one after another: vLLM measures what memory is free while it starts.
    """
    engines: list[RemoteEngine] = []
    before: tuple[Any, ...] = ()
    for model in config.pool.models:
        actor = ray.remote(EngineActor).options(
            **bundle_options(engine_bundle(config, model)),
            max_restarts=-1,
            max_task_retries=3,
            max_concurrency=MOST_REQUESTS,
        )
        shares = shares_gpu(model, config.ray)
        handle = actor.remote(partial(make, model, config.pool), *(before if shares else ()))
        if shares:
            before = (handle.ready.remote(),)
        engines.append(RemoteEngine(model.name, handle, config.episode.timeout_s, gathers(model)))
    return tuple(engines)
