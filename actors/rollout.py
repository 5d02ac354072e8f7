"""Rollout workers: actors that host the pool's engines and the router and run episodes, and the pool of them.

A worker is a thin shell round `routing.runner.Runner`. It holds nothing that cannot be had again (engines load from
disk, weights are pulled from the board, an episode is a function of its spec), so it restarts freely, and what it was
running is given to another worker: each result has one place, filled once, so that none is lost and none doubled.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError

from actors.capacity import check_resources, wait_for_resources
from actors.dispatch import Dispatch, Limits, Progress
from actors.engines import engine_bundle, gathers
from actors.fleet import Fleet, Listener, start_engines
from actors.placement import bundle_options
from actors.publish import CHANNEL, BoardClient, Weights
from actors.versions import Room, VersionSlots
from actors.waiting import wait_async, wait_for
from roro_ray.config import Config
from roro_ray.engines.protocol import Engine, EngineFacts
from roro_ray.errors import MissingWeightsError
from roro_ray.placement import Bundle, count_replicas, role_bundle
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import Query, Trajectory

if TYPE_CHECKING:
    from roro_ray.evaluation.oracle import OracleResult

Results = list[Trajectory | EpisodeFailure]
MakeRunner = Callable[[Config, Sequence[Engine]], Any]
_PULL_TIMEOUT_S = 120.0
_CHUNK = 64  # most specs in one remote call: what is done again when a worker dies


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker that is ready: its process, its node, its models, and the seconds that loading took."""

    pid: int
    node: str
    engines: tuple[EngineFacts, ...]
    seconds: float


def make_runner(config: Config, engines: Sequence[Engine]) -> Any:
    """The runner of one worker: with its own engines, or with `engines` where they live in actors of their own."""
    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.engines.pool import EnginePool, make_pool
    from roro_ray.routing.router import make_router
    from roro_ray.routing.router_policy import RouterPolicy
    from roro_ray.routing.runner import Runner

    pool = EnginePool(engines) if engines else make_pool(config.pool)
    network = make_router(config.router, pool.size).to(config.router.device or config.pool.models[0].device)
    policy = RouterPolicy(network, version=-1, cache_mb=config.router.cache_mb)
    return Runner(pool, policy, config.episode, config.ray.concurrency, AnswerScorer.from_config(config.data))


class RolloutWorker:
    """The actor. The constructor stores; `ready` (or the first `run` after a restart) loads."""

    def __init__(self, config: Config, engines: Sequence[Engine], make: MakeRunner) -> None:
        self._config = config
        self._engines = engines
        self._make = make
        self._runner: Any = None
        self._facts: WorkerFacts | None = None
        self._loading = asyncio.Lock()
        self._room = Room(config.ray.concurrency)
        # Trainings that run side by side may ask for two versions even where nothing lags.
        self._versions: VersionSlots[Any] = VersionSlots(self._make_holder, max(2, config.router.max_lag + 1))

    async def ready(self) -> WorkerFacts:
        """Load the models once and tell the facts."""
        async with self._loading:
            if self._facts is None:
                started = time.perf_counter()
                runner = self._make(self._config, self._engines)
                engines = tuple(await runner.pool.ready())
                node = ray.get_runtime_context().get_node_id()
                self._runner = runner
                self._facts = WorkerFacts(os.getpid(), node, engines, time.perf_counter() - started)
        return self._facts

    async def run(self, specs: Sequence[EpisodeSpec], weights: Weights | None) -> Results:
        """Run the episodes; those of the router under exactly these weights."""
        await self.ready()
        if weights is None:
            return await self._run_with(self._runner, specs)

        async def pull(runner: Any) -> None:
            from safetensors.torch import load

            blob = await wait_async(
                weights.refs[0], f"the router's weights of version {weights.version}", _PULL_TIMEOUT_S
            )
            runner.load_router(load(blob), weights.version)

        async with self._versions.enter(weights.serial, pull) as runner:
            return await self._run_with(runner, specs)

    async def _run_with(self, runner: Any, specs: Sequence[EpisodeSpec]) -> Results:
        async with self._room.take(min(len(specs), self._config.ray.concurrency)):
            results: Results = await runner.run(specs)
        return results

    def _make_holder(self) -> Any:
        """What one version of the router is loaded into: the worker's own runner first, then copies of it."""
        return self._runner.copy() if len(self._versions) else self._runner

    async def find_oracle(self, queries: Sequence[Query], seed: int) -> list[OracleResult]:
        """The fewest dear steps of each query (see `evaluation.oracle`), with this worker's engines."""
        from roro_ray.evaluation.oracle import run_oracle

        await self.ready()
        concurrency = self._config.ray.concurrency
        return await run_oracle(
            queries,
            self._runner.pool,
            self._config.episode,
            seed,
            self._config.evaluate.oracle_steps,
            concurrency,
            self._runner.scorer,
        )


@dataclass(frozen=True)
class RolloutPool:
    """The workers as the driver and the learner see them; a handle that pickles and can be used from both at once."""

    workers: tuple[Any, ...]
    engines: tuple[Any, ...]
    board: BoardClient
    facts: tuple[WorkerFacts, ...]
    timeout_s: float
    concurrency: int
    chunk: int = _CHUNK
    worker_attempts: int = 4
    fleet: Fleet | None = None

    @classmethod
    def start(cls, config: Config, make: MakeRunner = make_runner) -> RolloutPool:
        """Start `config.ray.workers` workers (and one actor per model with pool.placement=actors); wait until ready.

        Raises:
            ResourceError: the cluster cannot give what they ask for.
            EngineError: a model could not be loaded.
            DeadlineError: not ready within `ray.timeout_s`.
        """
        settings = config.ray
        bundles = pool_bundles(config)
        wait_for_resources(bundles, "the rollout pool", settings)
        late = _late_bundles(config)
        if late:  # started later, but what can never be had is refused now
            check_resources(late, "a replica", settings)
        fleet = start_engines(config) if config.pool.placement == "actors" else None
        engines = fleet.engines if fleet is not None else ()
        actor = ray.remote(RolloutWorker).options(
            **bundle_options(worker_bundle(config)),
            max_restarts=-1,
            max_task_retries=0,  # `Dispatch` retries elsewhere, without waiting for the restart
            scheduling_strategy="SPREAD",
        )
        workers: tuple[Any, ...] = tuple(actor.remote(config, engines, make) for _ in range(settings.workers))
        board = BoardClient.start()
        try:
            refs = [worker.ready.remote() for worker in workers]
            growth_s = (settings.grow_timeout_s or settings.timeout_s) if late else 0.0
            facts = wait_for(refs, "rollout workers: ready", settings.timeout_s + growth_s, workers)
        except BaseException:
            for handle in (*workers, board.actor):
                ray.kill(handle)
            if fleet is not None:
                fleet.stop()
            raise
        # Episodes that take minutes come and go one by one: in a shared call all would wait for the longest.
        chunk = _CHUNK if all(gathers(model) for model in config.pool.models) else 1
        limits = (config.episode.timeout_s, settings.concurrency, chunk, config.faults.worker_attempts)
        return cls(workers, engines, board, tuple(facts), *limits, fleet)

    def run(
        self,
        specs: Sequence[EpisodeSpec],
        version: int | None = None,
        channel: str = CHANNEL,
        progress: Progress | None = None,
    ) -> Results:
        """Run the episodes on all workers; results in the order of the specs, failures as values.

        Args:
            version: of the weights that `router` strategies use; None takes the last published.
            channel: under which they were published.
            progress: called with (episodes done, episodes) as results arrive.

        Raises:
            ConfigError: a strategy does not exist.
            MissingWeightsError: the version does not exist, or was lost with the board.
            DeadlineError: nothing arrived for longer than `episode.timeout_s`.
            EngineError: no worker is left, or the same episodes ended several workers.
        """
        needs_router = any(spec.strategy.startswith("router") for spec in specs)
        weights = self.board.look_up(version, channel) if needs_router else None  # None: the network's first ones
        query_ids = [spec.query.id for spec in specs]

        def call(worker: Any, part: Sequence[EpisodeSpec]) -> Any:
            return worker.run.remote(part, weights)

        try:
            return Dispatch(self.workers, specs, query_ids, call, self._limits(self.chunk)).run(progress)
        except ObjectLostError as error:  # the board died, and with it the weights that it owned
            raise MissingWeightsError(f"the router's weights of version {version} were lost: {error}") from error

    def find_oracle(self, queries: Sequence[Query], seed: int) -> list[OracleResult]:
        """The fewest dear steps of each query, searched where the memo knows it; results in the queries' order.

        Raises:
            DeadlineError: nothing arrived for longer than `episode.timeout_s`.
            EngineError: no worker is left, or the same queries ended several workers.
        """

        def call(worker: Any, part: Sequence[Query]) -> Any:
            return worker.find_oracle.remote(part, seed)

        ids = [query.id for query in queries]
        return Dispatch(self.workers, queries, ids, call, self._limits(_CHUNK)).run()

    def _limits(self, chunk: int) -> Limits:
        return Limits(self.timeout_s, chunk, self.concurrency, self.worker_attempts)

    def publish(self, state: dict[str, Any], version: int, channel: str = CHANNEL, keep: int = 2) -> None:
        """Publish the router's weights: later runs under this version, or under none named, use them."""
        from safetensors.torch import save

        blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
        self.board.publish(blob, version, channel, keep)

    def stop(self) -> None:
        """End the workers, the engines' actors and the board."""
        for worker in self.workers:
            ray.kill(worker)
        if self.fleet is not None:
            self.fleet.stop()
        self.board.stop()

    def fleet_facts(self) -> dict[str, dict[str, int]]:
        """The replicas of each model (see `Fleet.facts`); empty where the workers host the models themselves."""
        return self.fleet.facts() if self.fleet is not None else {}

    def watch_fleet(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` told the facts whenever the number of replicas changes; call what is returned to end it."""
        return self.fleet.watch(listener) if self.fleet is not None else lambda: None


def pool_bundles(config: Config) -> list[Bundle]:
    """What the rollout pool asks of the cluster, one bundle an actor."""
    bundles = [worker_bundle(config)] * config.ray.workers
    if config.pool.placement == "actors":
        for model in config.pool.models:
            bundles += [engine_bundle(config, model)] * count_replicas(config, model.name)[0]
    return bundles


def _late_bundles(config: Config) -> list[Bundle]:
    """What the first replica asks for of each model that begins with none."""
    if config.pool.placement != "actors":
        return []
    models = [model for model in config.pool.models if not count_replicas(config, model.name)[0]]
    return [engine_bundle(config, model) for model in models]


def worker_bundle(config: Config) -> Bundle:
    """What one rollout worker asks of its node."""
    return role_bundle(config, "rollout", config.ray.worker_cpus, config.ray.worker_gpus)
