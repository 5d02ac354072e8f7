"""The replicas of the pool's models (`ray.replicas`): started, grown and shrunk with demand, and ended by the driver.

Workers hold an engine a model (`ReplicaEngine`) and mind themselves which replica is slow, hangs or is dead; a process
that ends is started again by Ray. What is decided here, by a thread of the process that owns the pool, is how many
there are: a replica is started as soon as the demand asks (its actor may wait until an autoscaler has brought a node)
and is listed once it is ready; one that was needed by nobody for `ray.replica_idle_s` is taken off the list, ends
what it has in hand, and is ended, so that its node can go. Models of a fixed number of replicas need no thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from actors.engines import MOST_REQUESTS, EngineActor, MakeEngine, engine_bundle, gathers, make_model_engine
from actors.fleet_board import BoardRegistry, read_facts, start_board, steer
from actors.group import Group
from actors.placement import bundle_options
from actors.waiting import wait_some
from roro_ray.config import Config, ModelConfig
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.engines.replicas import FleetOptions
from roro_ray.engines.scaling import Scaler
from roro_ray.errors import DeadlineError
from roro_ray.gpu_checks import shares_gpu
from roro_ray.placement import count_replicas

logger = logging.getLogger(__name__)

Facts = dict[str, dict[str, int]]
Listener = Callable[[Facts], None]
_TICK_S = 0.5
_STEP_SHARE = 0.25  # of an episode's deadline, for one call: so that there is time for others
_READY_SHARE = 0.9  # of the pool's deadline, for a first replica: its worker can tell why none came


class Fleet:
    """The engines of a pool and what keeps their replicas; in another process, a handle that can be asked for facts.

    Attributes:
        engines: one a model, cheap to dear; they pickle.
    """

    def __init__(self, engines: Sequence[ReplicaEngine], board: Any, groups: Sequence[Group] = ()) -> None:
        self.engines = tuple(engines)
        self._board = board
        self._groups = {group.name: group for group in groups}
        self._listeners: list[Listener] = []
        self._stop = threading.Event()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._thread: threading.Thread | None = None
        if any(group.is_elastic for group in groups):
            self._thread = threading.Thread(target=self._keep, name="replicas", daemon=True)
            self._thread.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return Fleet, (self.engines, self._board)

    def facts(self) -> Facts:
        """By model: replicas `now` and `wanted`; `starts`, `releases`, `restarts` of replicas; `requests`, of which
        `retried` and `moved`, and replicas found to hang (`hangs`), as workers told within the last second."""
        if self._groups and self._thread is None:
            try:
                self._tick({})
            except (DeadlineError, RayError) as error:
                logger.warning("the replicas could not be looked at: %s", error)
        return read_facts(self._board)

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` told the facts whenever the number of replicas changes; call what is returned to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def stop(self) -> None:
        """End all replicas and the board."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10.0)
        for handle in [*(handle for group in self._groups.values() for handle in group.handles()), self._board]:
            ray.kill(handle)

    def _keep(self) -> None:
        demand: dict[str, int] = {}
        while not self._stop.is_set() and ray.is_initialized():  # a call would start a Ray where there is none
            try:
                demand = self._tick(demand)
            except (DeadlineError, RayError) as error:
                logger.warning("the replicas could not be looked after: %s", error)
            except Exception:  # the border: a thread that ends would leave requests waiting for replicas
                if ray.is_initialized():
                    logger.exception("the replicas could not be looked after")
            self._stop.wait(_TICK_S)

    def _tick(self, demand: Mapping[str, int]) -> dict[str, int]:
        """Bring every group to what the demand asks for, tell the board, and get the demand of now."""
        for group in self._groups.values():
            group.tick(time.monotonic(), demand.get(group.name, 0))
        states = {name: group.state() for name, group in self._groups.items()}
        demand = steer(self._board, {n: g.listing() for n, g in self._groups.items() if g.is_elastic}, states)
        sizes = {name: (state.now, state.wanted) for name, state in states.items()}
        if sizes != self._sizes:
            self._sizes = sizes
            for listener in list(self._listeners):
                listener(read_facts(self._board))
        return demand


def start_engines(config: Config, make: MakeEngine = make_model_engine) -> Fleet:
    """The engines of the pool, cheap to dear, and the least number of replicas of each; they load while others start.

    Those that may share a GPU load one after another: vLLM measures what memory is free while it starts.
    """
    board = start_board()
    starter = _Starter(config, make)
    groups, engines = [], []
    for model in config.pool.models:
        scaler = Scaler(*count_replicas(config, model.name), config.ray.replica_target, config.ray.replica_idle_s)
        group = Group(model.name, scaler, partial(starter.start, model), config.ray.timeout_s)
        options = make_options(config, model)
        replicas = {} if group.is_elastic else group.replicas()
        groups.append(group)
        engines.append(ReplicaEngine(model.name, replicas, options, BoardRegistry(board)))
    return Fleet(engines, board, groups)


def make_options(config: Config, model: ModelConfig) -> FleetOptions:
    """How the replicas of a model of the pool are asked."""
    (least, most), settings = count_replicas(config, model.name), config.ray
    launch_s = (settings.grow_timeout_s or settings.timeout_s) if not least else 0.0
    return FleetOptions(
        timeout_s=config.episode.timeout_s,
        step_timeout_s=settings.step_timeout_s or _STEP_SHARE * config.episode.timeout_s,
        load_timeout_s=settings.timeout_s,
        gathers=gathers(model),
        elastic=most > least,
        ready_timeout_s=launch_s + _READY_SHARE * settings.timeout_s,
    )


class _Starter:
    """Starts actors of models."""

    def __init__(self, config: Config, make: MakeEngine) -> None:
        self._config = config
        self._make = make
        self._before: Any = None  # the facts of the actor started last of those that may share a GPU

    def start(self, model: ModelConfig) -> tuple[Any, Any]:
        """An actor, and the reference of its facts."""
        actor = ray.remote(EngineActor).options(
            **bundle_options(engine_bundle(self._config, model)),
            max_restarts=-1,
            max_task_retries=0,  # whoever asked asks another replica, without waiting for the restart
            max_concurrency=MOST_REQUESTS,
        )
        shares = shares_gpu(model, self._config.ray)
        waits = shares and self._before is not None and not wait_some([self._before], 0.0)
        handle: Any = actor.remote(partial(self._make, model, self._config.pool), *([self._before] if waits else []))
        ready = handle.ready.remote()
        if shares:
            self._before = ready
        return handle, ready
