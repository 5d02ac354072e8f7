"""The Serve shells: a deployment per model, one for the routers, and the HTTP ingress. Each only wires and forwards."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from roro_ray.cluster_config import StorageConfig
from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.data.mirror import fetch
from roro_ray.engines.pool import make_engine
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepDelta, StepRequest, StepResult, stream_step
from roro_ray.errors import ConfigError, EngineError, RoroError
from roro_ray.evaluation.calibration import check_calibration, load_calibration
from roro_ray.routing.opinion import Opinion, RouterReading
from roro_ray.routing.router_files import ROUTER_FILES, load_router
from roro_ray.routing.router_policy import CACHE_MB, RouterPolicy
from serve.access_log import AccessLog
from serve.api import ApiOptions, make_api
from serve.auth import ApiKey, load_keys, parse_keys
from serve.backend import LoadedRouters, RouterFacts, RouterList
from serve.config import Served, ServerConfig
from serve.metrics import RayMetrics
from serve.recording import Recorder
from serve.remote import ServeBackend
from serve.schema import Limits
from serve.service import RoutingService, ServiceOptions

logger = logging.getLogger(__name__)
_LANES_PER_ROUTER = 8  # enough that hashing spreads them evenly over the router's replicas
_CHUNK_S = 0.0005  # for each stream under way a replica waits so long between two parts of one stream


class ModelReplica:
    """One model of the pool: the same engine as in a rollout worker."""

    def __init__(self, model: ModelConfig, pool: PoolConfig) -> None:
        self._engine = make_engine(model, pool)
        self._facts: EngineFacts | None = None
        self._streams = 0
        self._calls = 0
        self._steps = 0

    async def check_health(self) -> None:
        """Serve sends requests to a replica once this has returned for the first time: then the model is loaded.

        Raises:
            EngineError: the model cannot be loaded, or its engine died behind it; Serve starts the replica anew.
        """
        await self.facts()
        if getattr(self._engine, "is_dead", False):
            raise EngineError(f"the engine of model {self._engine.name!r} died: a new replica takes its place")

    async def facts(self) -> EngineFacts:
        """Load the model and tell its facts."""
        if self._facts is None:
            self._facts = await self._engine.ready()
        return self._facts

    async def ping(self) -> bool:
        """Answer: the process lives."""
        return True

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step."""
        self._calls += 1
        self._steps += 1
        try:
            return await self._engine.generate_step(request)
        finally:
            self._calls -= 1

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score continuations."""
        return await self._engine.score_choices(prefix, choices, adapter)

    async def stream_step(self, request: StepRequest) -> AsyncIterator[list[StepDelta | StepResult]]:
        """Write one step and tell it in parts; the more streams, the more tokens travel in one part.

        Every part costs about as much as a token of a small model, so that 500 streams of single tokens would keep
        the machine busy with parts alone.
        """
        self._streams += 1
        self._steps += 1
        try:
            stream = cast("AsyncGenerator[StepDelta | StepResult, None]", stream_step(self._engine, request))
            async with aclosing(stream) as parts:
                async for part in parts:
                    yield [part]
                    if self._streams > 1 and isinstance(part, StepDelta):
                        await asyncio.sleep(_CHUNK_S * self._streams)
        finally:
            self._streams -= 1

    async def active(self) -> dict[str, int]:
        """Work in hand (calls, streams, rows in the engine), steps asked for so far, and the process that tells it."""
        rows = getattr(self._engine, "active", 0)
        return {
            "calls": self._calls,
            "streams": self._streams,
            "rows": rows,
            "steps": self._steps,
            "pid": os.getpid(),
        }


class RouterReplica:
    """Router networks of several versions, micro-batched; `user_config` brings new ones in while it answers.

    Args:
        directory: the router that is served where `user_config` names none that can be loaded: a path or a URI.
        pool: the models to choose from; a router for another number of models is refused.
        storage: how to read routers that lie behind a URI.
    """

    def __init__(
        self,
        directory: str,
        pool: PoolConfig,
        device: str = "cpu",
        cache_mb: int = CACHE_MB,
        storage: StorageConfig | None = None,
    ) -> None:
        self._storage = storage or StorageConfig()
        self._pool = pool
        self._device, self._cache_mb = device, cache_mb
        self._loaded = LoadedRouters()
        self._first = directory

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the routers that `user_config` names (`{"routers": [DIRECTORY, ..]}`); the last one becomes the default.

        Versions loaded before stay for the trajectories that use them. Once a router answers, a mistake is logged and
        changes nothing: Serve would stop every replica that raised here, and nothing would be left to answer.

        Raises:
            ConfigError: before any router answers: not such a mapping, or two directories hold one version.
            CheckpointError: before any router answers: no directory, nor the first one, holds a router for this pool.
        """
        try:
            found = await asyncio.to_thread(self._load, self._read_names(user_config))
        except (RoroError, OSError) as error:
            if not self._loaded.versions:
                raise
            logger.error("new routers are refused, versions %s go on: %s", self._loaded.versions, error)
            return
        for policy, facts in found:
            self._loaded.add(policy, facts)
        logger.info("routers loaded: %s", ", ".join(facts.name for _, facts in found))

    def _read_names(self, user_config: dict[str, Any]) -> list[str]:
        unknown = sorted(set(user_config) - {"routers"})
        directories = user_config.get("routers", [])
        if unknown or not isinstance(directories, list) or not all(isinstance(item, str) for item in directories):
            raise ConfigError(
                f"user_config of the router: got {user_config!r}, expected {{'routers': [DIRECTORY, ..]}} with "
                "directories that save_router wrote, the newest last"
            )
        return directories or [self._first]

    def _load(self, directories: list[str]) -> list[tuple[RouterPolicy, RouterFacts]]:
        found, errors = [], []
        for directory in directories:
            try:
                found.append(self._read(fetch(directory, self._storage, *ROUTER_FILES)))
            except (RoroError, OSError) as error:
                errors.append(error)
        if errors and not self._loaded.versions:
            # A replica that starts must answer with what there is: the one before it refused these routers as well.
            logger.error("not all of the routers %s can be loaded: %s", directories, "; ".join(map(str, errors)))
            found = found or [self._read(fetch(self._first, self._storage, *ROUTER_FILES))]
        elif errors:
            raise errors[0]
        versions = [facts.version for _, facts in found]
        for version in versions:
            if versions.count(version) > 1:
                raise ConfigError(f"user_config of the router: two of {directories} have version {version}: give one")
        return found

    def _read(self, directory: Path) -> tuple[RouterPolicy, RouterFacts]:
        network = load_router(directory, len(self._pool.models)).to(self._device)
        policy = RouterPolicy(network, cache_mb=self._cache_mb)
        calibration, problem = None, None
        try:
            calibration = load_calibration(directory)
        except RoroError as error:
            problem = str(error)
        if calibration is not None and calibration.router_version != policy.version:
            try:
                check_calibration(calibration, calibration.pool, policy.version)
            except RoroError as error:
                calibration, problem = None, str(error)
        return policy, RouterFacts(policy.version, policy.peek, calibration, problem)

    async def describe(self) -> RouterList:
        """What is loaded."""
        return await self._loaded.describe()

    async def ping(self) -> bool:
        """Answer: the process lives."""
        return True

    async def judge_readings(self, version: int, readings: Sequence[RouterReading]) -> list[Opinion]:
        """The opinions of one version, computed together with those of other calls."""
        return list(await asyncio.gather(*(self._loaded.judge_reading(version, reading) for reading in readings)))


class IngressReplica:
    """The HTTP API on top of the other deployments."""

    def __init__(self, served: Served, models: dict[str, DeploymentHandle[Any]], router: DeploymentHandle[Any]) -> None:
        config = served.config
        metrics = RayMetrics(list(models))
        replica = serve.get_replica_context().replica_id.unique_id
        lanes = 1 if config.routers.max_replicas == 1 else _LANES_PER_ROUTER * config.routers.max_replicas
        backend = ServeBackend(models, router, config.rescue, metrics, lanes)
        recorder = _make_recorder(config, replica, metrics)
        options = ServiceOptions(
            episode=served.episode,
            timeout_s=config.answer.timeout_s,
            max_concurrent=config.answer.max_concurrent,
            max_queue=config.answer.max_queue,
            cost_weight=config.cost_weight,
            chat_template=config.answer.chat_template,
        )
        self._service = RoutingService(backend, options, metrics, recorder)
        self._api = ApiOptions(
            limits=make_limits(served),
            keys=read_keys(config),
            cors_origins=config.security.cors_origins,
            playground=config.security.playground,
            examples=served.examples,
            tells_id=False,
        )
        self._log = AccessLog(config.access_log, replica)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._service, self._api, self._log)


def make_limits(served: Served) -> Limits:
    """What one request may ask for."""
    answer, episode = served.config.answer, served.episode
    return Limits(
        max_body_bytes=answer.max_body_bytes,
        max_messages=answer.max_messages,
        max_text_chars=answer.max_text_chars,
        max_completion_tokens=answer.max_completion_tokens or episode.max_tokens,
        max_choices=answer.max_choices,
        default_temperature=answer.temperature if answer.temperature >= 0 else episode.temperature,
    )


def read_keys(config: ServerConfig) -> tuple[ApiKey, ...]:
    """The API keys of the file and of the settings."""
    security = config.security
    from_file = load_keys(security.key_file) if security.key_file else ()
    return (*from_file, *parse_keys(security.key_hashes))


def _make_recorder(config: ServerConfig, replica: str, metrics: RayMetrics) -> Recorder | None:
    recording = config.recording
    if not recording.directory:
        return None
    return Recorder(
        str(Path(recording.directory).resolve()),
        replica,
        recording.flush_every,
        recording.flush_s,
        recording.redact,
        max_mb=recording.max_mb,
        metrics=metrics,
    )
