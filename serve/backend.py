"""What the service asks of the machinery below it, whether that is Ray Serve or one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from roro_ray.engines.pool import EnginePool
from roro_ray.errors import RoroError
from roro_ray.evaluation.calibration import Calibration
from roro_ray.routing.opinion import Opinion, RouterReading
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.types import Peek


class UnknownRouterError(RoroError, KeyError):
    """A router version that is not (or not yet, or no longer) loaded where it was asked for."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "unknown router version"


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """One loaded router: its version, what it peeks at, the middle of the range that it knows, its calibration.

    `problem` says why there is no calibration, where one was found but refused.
    """

    version: int
    peek: Peek
    calibration: Calibration | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """What a client calls it."""
        return f"router-v{self.version}"


@dataclass(frozen=True, slots=True)
class RouterList:
    """The routers that can be asked for, and the version behind `auto`."""

    routers: tuple[RouterFacts, ...]
    default: int

    def find(self, version: int) -> RouterFacts | None:
        """The router of a version, or None."""
        return next((facts for facts in self.routers if facts.version == version), None)


class Routers(Protocol):
    """Router networks somewhere, several versions at a time."""

    async def describe(self) -> RouterList:
        """What is loaded."""
        ...

    async def judge_reading(self, version: int, reading: RouterReading, session: str) -> Opinion:
        """The opinion of one version.

        Raises:
            UnknownRouterError: that version is not loaded.
            EngineUnavailableError: no router can be reached.
        """
        ...


class Backend(Protocol):
    """Models and routers."""

    @property
    def routers(self) -> Routers:
        """The routers."""
        ...

    async def ready(self) -> EnginePool:
        """Wait until the models have told their facts; the pool for no session in particular."""
        ...

    def pool(self, session: str) -> EnginePool:
        """The pool as one trajectory should use it, so that each model's calls meet the same replica."""
        ...


class LoadedRouters:
    """Router networks in this process, newest last; an old version stays for whoever still uses it.

    Args:
        keep: versions that stay loaded.
    """

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._policies: dict[int, RouterPolicy] = {}
        self._facts: dict[int, RouterFacts] = {}
        self._default = -1

    def add(self, policy: RouterPolicy, facts: RouterFacts) -> None:
        """Load one more version and make it the default; the oldest beyond `keep` are let go."""
        self._policies.pop(facts.version, None)
        self._policies[facts.version], self._facts[facts.version] = policy, facts
        self._default = facts.version
        while len(self._policies) > self._keep:
            oldest = next(iter(self._policies))
            del self._policies[oldest], self._facts[oldest]

    @property
    def versions(self) -> Sequence[int]:
        """The versions loaded, oldest first."""
        return tuple(self._policies)

    async def describe(self) -> RouterList:
        """What is loaded."""
        return RouterList(tuple(self._facts[version] for version in self._policies), self._default)

    async def judge_reading(self, version: int, reading: RouterReading, session: str = "") -> Opinion:
        """The opinion of one version; readings that meet are computed together."""
        policy = self._policies.get(version)
        if policy is None:
            raise UnknownRouterError(f"router version {version} is not loaded: loaded are {self.versions}")
        return await policy.judge_reading(reading)


class LocalBackend:
    """Everything in this process: for tests, and to serve without Ray."""

    def __init__(self, pool: EnginePool, routers: Routers) -> None:
        self._pool = pool
        self._routers = routers

    @property
    def routers(self) -> Routers:
        """The routers."""
        return self._routers

    async def ready(self) -> EnginePool:
        """Load the models."""
        await self._pool.ready()
        return self._pool

    def pool(self, session: str) -> EnginePool:
        """The one pool."""
        return self._pool
