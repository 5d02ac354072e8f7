"""Engines in actors of their own, shared by all rollout workers (pool.placement=actors): for models that are too large
to sit in every worker.

A model has one such actor or several (`actors.fleet`); the worker's side is one `Engine` like any other. For tiny
models it gathers concurrent requests into one remote call, because a call costs about a millisecond and a token far
less; for engines that join requests while others run (`vllm`, `openai`) every request is a call of its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.adapters import Parcel, install
from actors.waiting import unwrap_error, wait_async
from roro_ray.config import Config, ModelConfig, PoolConfig
from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, StepRequest, StepResult
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.engines.replicas import Answer, FleetOptions, Item, ReplicaGoneError, ReplicaLostError
from roro_ray.errors import DeadlineError, EngineError, RoroError
from roro_ray.gpu_checks import count_gpus
from roro_ray.placement import Bundle, role_bundle

MOST_REQUESTS = 10_000  # at once in an actor: under Ray's own bound some would wait outside the engine's batch
_PULSE_S = 10.0  # an actor that does not tell its pulse in this time hangs
_LATE = 0.9  # of the deadline: an engine's clock starts a little after the caller's
MakeEngine = Callable[[ModelConfig, PoolConfig], Engine]


def make_model_engine(model: ModelConfig, pool: PoolConfig) -> Engine:
    """The engine of one model of the pool."""
    from roro_ray.engines.pool import make_engine

    return make_engine(model, pool)


@dataclass(frozen=True, slots=True)
class Pulse:
    """How an engine's actor is: what it has in hand, and for how many seconds it has finished nothing although there
    was something to do (0 while it loads)."""

    in_hand: int
    stuck_s: float


class EngineActor:
    """The actor: one engine, asked in batches. The constructor stores; `ready` loads.

    `before` is what another engine says once it is ready: Ray makes this actor then, and not earlier.
    """

    def __init__(self, make: Callable[[], Engine], before: EngineFacts | None = None) -> None:
        self._engine = make()
        self._loading = asyncio.Lock()
        self._adapters: dict[str, int] = {}
        self._loaded = False
        self._in_hand = 0
        self._given_up = 0  # requests since anything was finished last
        self._finished_at = 0.0

    async def ready(self) -> EngineFacts:
        """Load the model."""
        facts = await self._engine.ready()
        self._loaded = True
        return facts

    async def pulse(self) -> Pulse:
        """Whether the actor is well, as far as it can tell itself."""
        waited_for = self._loaded and (self._in_hand or self._given_up)
        return Pulse(self._in_hand, time.monotonic() - self._finished_at if waited_for else 0.0)

    async def load_adapters(self, parcels: Sequence[Parcel]) -> None:
        """Serve adapters; those that it serves already, in this version or a newer one, cost nothing."""
        await self.ready()
        async with self._loading:
            for parcel in parcels:
                name, version = parcel.adapter.name, parcel.adapter.version
                if self._adapters.get(name, -1) < version:
                    await install(parcel, self._engine)
                    self._adapters[name] = version

    async def serve(self, items: Sequence[Item], parcels: Sequence[Parcel] = ()) -> list[Answer]:
        """One StepResult, ChoiceScores or exception for each request; one that fails does not fail the others.

        `parcels` are the adapters that the caller counts on: after a restart nobody else brings them.
        """
        await self.ready()  # free when loaded; after a restart nobody else asks for it
        if parcels:
            await self.load_adapters(parcels)
        results = await asyncio.gather(*(self._serve_one(item) for item in items), return_exceptions=True)
        if getattr(self._engine, "is_dead", False):
            os._exit(1)  # Ray starts the actor anew, with a new engine, and whoever asked asks again
        return [result if not isinstance(result, BaseException) else _portable(result) for result in results]

    async def _serve_one(self, item: Item) -> StepResult | ChoiceScores:
        if not self._in_hand and not self._given_up:
            self._finished_at = time.monotonic()
        self._in_hand += 1
        given_up = 0
        try:
            if isinstance(item, StepRequest):
                return await self._engine.generate_step(item)
            return await self._engine.score_choices(*item)
        except asyncio.CancelledError:
            given_up = self._given_up + 1  # that nobody waits any more does not make a stuck engine well
            raise
        finally:
            self._in_hand -= 1
            self._given_up = given_up
            if not given_up:
                self._finished_at = time.monotonic()


def _portable(error: BaseException) -> RoroError:
    """An error that pickles: the project's own as it is, any other by its text."""
    return error if isinstance(error, RoroError) else EngineError(f"{type(error).__name__}: {error}")


class ActorReplica:
    """A replica of a model in an EngineActor, for `roro_ray.engines.replica_engine.ReplicaEngine`.

    Args:
        name: the model's.
        load_timeout_s: deadline of `ready` and of adapters.
    """

    def __init__(self, name: str, actor: Any, load_timeout_s: float) -> None:
        self.name = name
        self.actor = actor
        self._load_timeout_s = load_timeout_s

    async def ready(self) -> EngineFacts:
        """Wait until the actor has loaded its model."""
        try:
            facts: EngineFacts = await wait_async(
                self.actor.ready.remote(), f"model {self.name}: ready", self._load_timeout_s, self.actor
            )
        except RayTaskError as error:  # the actor lives, and cannot load its model: asked again it would not either
            raise EngineError(
                f"model {self.name} cannot be loaded: {type(error.cause).__name__}: {error.cause}"
            ) from error
        except RayError as error:
            raise _make_lost(error) from error
        return facts

    async def call(self, items: Sequence[Item], parcels: Sequence[Any]) -> list[Answer]:
        """One remote call; the caller minds the deadline, and cancels what it gives up."""
        ref = self.actor.serve.remote(items, parcels)
        try:
            answers: list[Answer] = await ref
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except RayTaskError as error:
            raise unwrap_error(error) from error
        except RayError as error:
            raise _make_lost(error) from error
        return answers

    async def load_adapters(self, parcels: Sequence[Any]) -> None:
        """Have the actor serve adapters."""
        ref, names = self.actor.load_adapters.remote(parcels), ", ".join(parcel.adapter.name for parcel in parcels)
        try:
            await wait_async(ref, f"model {self.name}: adapter {names}", self._load_timeout_s, self.actor)
        except RayTaskError:
            raise
        except RayError as error:
            raise _make_lost(error) from error

    async def is_well(self, stuck_s: float) -> bool:
        """Whether the actor answers, and its engine has finished something of late."""
        try:
            pulse: Pulse = await wait_async(self.actor.pulse.remote(), "pulse", _PULSE_S, self.actor)
        except DeadlineError:
            return False
        except RayError as error:
            raise _make_lost(error) from error
        return pulse.stuck_s < _LATE * stuck_s

    def end(self) -> None:
        """Kill the process; Ray starts another one where the actor has restarts."""
        ray.kill(self.actor, no_restart=False)


def _make_lost(error: RayError) -> ReplicaLostError:
    lines = str(error).splitlines() or [type(error).__name__]
    kind = ReplicaGoneError if isinstance(error, ActorDiedError) else ReplicaLostError
    return kind(f"{type(error).__name__}: {' '.join(line.strip() for line in lines)[:300]}")


class RemoteEngine(ReplicaEngine):
    """The worker's side of one EngineActor.

    Args:
        actor: handle of the EngineActor.
        timeout_s: deadline of one call; loading after a restart counts.
        gathers: send the requests of a moment in one call (see `FleetOptions`).
    """

    def __init__(self, name: str, actor: Any, timeout_s: float, gathers: bool = True) -> None:
        self.actor = actor
        options = FleetOptions(timeout_s, timeout_s, timeout_s, gathers)
        super().__init__(name, {name: ActorReplica(name, actor, timeout_s)}, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_engine, (self.name, self.actor, self.options, self._parcels)

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        """Serve the adapter in a directory that the actor's node sees."""
        from roro_ray.learning.adapter_files import AdapterVersion

        await self.take_parcel(Parcel(AdapterVersion(name, version, path)))


def _restore_engine(name: str, actor: Any, options: FleetOptions, parcels: dict[str, Parcel]) -> RemoteEngine:
    engine = RemoteEngine(name, actor, options.timeout_s, options.gathers)
    engine.restore(parcels, None)
    return engine


def gathers(model: ModelConfig) -> bool:
    """Whether requests to a model are sent together: `hf` computes in batches and runs tiny models."""
    return model.engine == "hf"


def engine_bundle(config: Config, model: ModelConfig) -> Bundle:
    """What the actor of a model of the pool asks of its node."""
    return role_bundle(config, model.name, config.ray.engine_cpus, count_gpus(model, config.ray))
