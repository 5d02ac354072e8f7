"""The replicas of one model, as the driver keeps them: starting, listed, leaving.

`tick` looks and acts and never waits for a replica, so that one driver thread keeps all models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from actors.engines import ActorReplica, Pulse
from actors.fleet_board import GroupState, Listing
from actors.waiting import describe_actor, find_actor, wait_for, wait_some
from roro_ray.engines.protocol import EngineFacts
from roro_ray.engines.replicas import Roster
from roro_ray.engines.scaling import Scaler
from roro_ray.errors import RoroError

logger = logging.getLogger(__name__)

_LOOK_S = 2.0  # between two looks at the state of listed replicas
_TELL_S = 30.0  # a replica that starts for longer than this is told of, once
_LEAVE_S = 2.0  # after which every worker has heard that a replica is off the list
_MOST_LEAVE_S = 600.0  # what is in hand then is asked for elsewhere
_TRIES = 3  # of a process that dies while it loads
_PAUSE_S, _MOST_PAUSE_S = 5.0, 60.0  # before a model is tried again that could not be loaded


@dataclass(slots=True)
class _Start:
    """A replica that was asked for and is not ready."""

    actor: Any
    ready: Any
    since: float
    tries: int = 1
    told: bool = False


@dataclass(slots=True)
class _Leave:
    """A replica that gets no more requests."""

    actor: Any
    since: float
    pulse: Any = None


class Group:
    """The replicas of one model.

    Args:
        start: starts an actor; gives its handle and the reference of its facts.
        load_timeout_s: deadline of a worker that asks a replica whether it is ready.
    """

    def __init__(self, name: str, scaler: Scaler, start: Callable[[], tuple[Any, Any]], load_timeout_s: float) -> None:
        self.name = name
        self.is_elastic = scaler.most > scaler.least
        self._scaler = scaler
        self._start = start
        self._load_timeout_s = load_timeout_s
        self._starting: dict[str, _Start] = {}
        self._listed: dict[str, Any] = {}
        self._leaving: dict[str, _Leave] = {}
        self._dead: set[str] = set()
        self._facts: EngineFacts | None = None
        self._trouble = ""
        self._pause_s, self._retry_at, self._look_at = _PAUSE_S, 0.0, 0.0
        self._wanted = scaler.least
        self._starts = self._releases = self._lost = 0
        self._restarts: dict[str, int] = {}
        self._version = 0
        self._listing: Listing | None = None
        for _ in range(scaler.least):
            self._add(0.0)
        if not self.is_elastic:
            self._listed = {key: start.actor for key, start in self._starting.items()}
            self._starting.clear()

    def replicas(self) -> dict[str, ActorReplica]:
        """Those that may be asked."""
        return {key: ActorReplica(self.name, actor, self._load_timeout_s) for key, actor in self._listed.items()}

    def listing(self) -> Listing:
        """What workers are to know."""
        if self._listing is None or self._listing.version != self._version:
            refs = (ray.put(Roster(self.replicas(), self._facts, self._trouble)),)
            self._listing = Listing(self._version, refs)
        return self._listing

    def handles(self) -> list[Any]:
        """The actors of all replicas, whatever their state."""
        parts: list[_Start | _Leave] = [*self._starting.values(), *self._leaving.values()]
        return [*self._listed.values(), *(part.actor for part in parts)]

    def state(self) -> GroupState:
        """How many there are, and what has happened."""
        now = len(self._listed) - len(self._dead & self._listed.keys())
        return GroupState(now, self._wanted, self._starts, self._releases, self._lost + sum(self._restarts.values()))

    def tick(self, now: float, demand: int) -> None:
        """Look at the replicas, and bring their number nearer to what the demand asks for."""
        if now >= self._look_at or not self.is_elastic:
            self._look_at = now + _LOOK_S
            self._look()
        if not self.is_elastic:
            return
        for key, start in list(self._starting.items()):
            self._look_at_start(key, start, now)
        for key, leave in list(self._leaving.items()):
            self._look_at_leave(key, leave, now)
        self._wanted = self._scaler.decide(now, demand)
        have = len(self._listed) + len(self._starting)
        for _ in range(self._wanted - have):
            self._grow(now)
        for _ in range(have - self._wanted):
            self._shrink(now)

    def _grow(self, now: float) -> None:
        if self._leaving:  # one that is on its way out needs no start
            key, leave = self._leaving.popitem()
            self._listed[key] = leave.actor
            self._releases -= 1
            self._version += 1
        elif now >= self._retry_at:
            self._add(now)

    def _add(self, now: float) -> None:
        actor, ready = self._start()
        self._starting[f"{self.name}-{self._starts}"] = _Start(actor, ready, now)
        self._starts += 1

    def _shrink(self, now: float) -> None:
        self._releases += 1
        if self._starting:
            ray.kill(self._starting.popitem()[1].actor)
            return
        key = next((key for key in self._listed if key in self._dead), None) or list(self._listed)[-1]
        self._leaving[key] = _Leave(self._listed.pop(key), now)
        self._version += 1

    def _look_at_start(self, key: str, start: _Start, now: float) -> None:
        if not wait_some([start.ready], 0.0):
            if not start.told and now - start.since > _TELL_S:
                start.told = True
                logger.warning("model %s: a replica is still starting: %s", self.name, describe_actor(start.actor))
            return
        try:
            self._facts = wait_for(start.ready, f"model {self.name}: ready", 1.0, start.actor)
        except (RoroError, RayError) as error:
            if isinstance(error, RayError) and not isinstance(error, ActorDiedError) and start.tries < _TRIES:
                start.tries += 1
                start.ready = start.actor.ready.remote()
                return
            self._fail(key, start, now, error)
            return
        del self._starting[key]
        self._listed[key] = start.actor
        self._trouble, self._pause_s = "", _PAUSE_S
        self._version += 1
        logger.info("model %s: replica %s is ready", self.name, key)

    def _fail(self, key: str, start: _Start, now: float, error: Exception) -> None:
        ray.kill(start.actor)
        del self._starting[key]
        self._lost += 1
        self._trouble = str(error)
        self._version += 1
        if now >= self._retry_at:  # several that fail together are one try
            self._retry_at, self._pause_s = now + self._pause_s, min(2 * self._pause_s, _MOST_PAUSE_S)
        logger.warning("model %s: a replica could not be started: %s", self.name, error)

    def _look_at_leave(self, key: str, leave: _Leave, now: float) -> None:
        if now - leave.since < _LEAVE_S:
            return
        if leave.pulse is None:
            leave.pulse = leave.actor.pulse.remote()
        if wait_some([leave.pulse], 0.0):
            try:
                pulse: Pulse = wait_for(leave.pulse, f"model {self.name}: pulse", 1.0, leave.actor)
                leave.pulse = None
                if pulse.in_hand and now - leave.since < _MOST_LEAVE_S:
                    return
            except (RoroError, RayError) as error:
                logger.debug("model %s: replica %s died while it left: %r", self.name, key, error)
        elif now - leave.since < _MOST_LEAVE_S:
            return
        del self._leaving[key]
        ray.kill(leave.actor)
        logger.info("model %s: replica %s is released", self.name, key)

    def _look(self) -> None:
        """Which of the listed are dead or being started again, and how often that was so."""
        for key, actor in list(self._listed.items()):
            record = find_actor(actor)
            state = record.get("State", "ALIVE")
            self._restarts[key] = max(self._restarts.get(key, 0), record.get("NumRestarts", 0))
            (self._dead.discard if state == "ALIVE" else self._dead.add)(key)
            if state == "DEAD" and self.is_elastic:  # somebody ended it for good
                del self._listed[key]
                self._dead.discard(key)
                self._lost += 1
                self._version += 1
