"""Models and routers behind Serve handles, as the episode loop sees them: engines and a router like any other.

A call that meets a dead or silent replica is made again on another one, from the tokens that have come already, so that
no step is lost and none written twice. Where no replica answers, a breaker opens: calls fail at once with
EngineUnavailableError (the episode goes on with another model) until a probe finds the deployment alive again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from actors.waiting import unwrap_error
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepDelta, StepRequest, StepResult
from roro_ray.errors import EngineError, EngineUnavailableError
from roro_ray.routing.opinion import Opinion, RouterReading
from serve.affinity import make_session
from serve.backend import RouterList, Routers, UnknownRouterError
from serve.breaker import Breaker, SilentReplicaError
from serve.calls import FAILURES, Handle, ask, ask_plainly, is_replica_failure, read_parts
from serve.config import RescueConfig
from serve.gather import Gatherer
from serve.metrics import Metrics

_UNKNOWN_ROUNDS = 40  # a new router version reaches all replicas within a few seconds
_UNKNOWN_WAIT_S = 0.1
_DESCRIBE_S = 10.0
_PROBED = 3  # replicas asked for a sign of life at once: one of them may be the one that hangs


@dataclass
class HandleEngine:
    """A model's deployment as an `Engine`; `session` keeps one trajectory's calls on one replica."""

    name: str
    handle: Handle
    breaker: Breaker
    rescue: RescueConfig
    metrics: Metrics
    session: str = ""
    _attempt: int = field(default=0, repr=False)  # stays up: the replica that failed one step is not asked for the next

    async def ready(self) -> EngineFacts:
        """Wait until a replica has loaded the model.

        Raises:
            EngineUnavailableError: a replica died meanwhile; ask again.
        """
        facts: EngineFacts = await ask_plainly(self.handle.options(method_name="facts"), f"model {self.name!r}")
        return facts

    def bind(self, session: str) -> HandleEngine:
        """The same engine for one trajectory."""
        return replace(self, session=session, _attempt=0)

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step.

        Raises:
            EngineUnavailableError: no replica can be reached.
            EngineError: the model refused the request.
        """
        result: StepResult = await self._call("generate_step", request)
        return result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score continuations; errors as for `generate_step`."""
        scores: ChoiceScores = await self._call("score_choices", prefix, choices, adapter)
        return scores

    async def _call(self, method: str, *arguments: Any) -> Any:
        last: BaseException | None = None
        for _ in range(self.rescue.retries + 1):
            handle = self._target(method)
            try:
                async with self.breaker.guard():
                    return await ask(handle, *arguments)
            except FAILURES as error:
                last = self._on_failure(error)
        raise self._gone(last)

    async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """Write one step token by token; a replica that dies is followed by another, from the next token on.

        After a change of replica no text is told before the result: whether the first one held text back (half a
        delimiter, half a character) cannot be seen from here.
        """
        last: BaseException | None = None
        kept = len(request.kept_ids)
        for _ in range(self.rescue.retries + 1):
            handle = self._target("stream_step", stream=True)
            told = len(request.kept_ids) == kept
            try:
                async with self.breaker.guard() as answered, contextlib.aclosing(read_parts(handle, request)) as parts:
                    async for part in parts:
                        answered()
                        if isinstance(part, StepDelta):
                            request = replace(request, kept_ids=(*request.kept_ids, *part.token_ids))
                        yield part if told or isinstance(part, StepResult) else replace(part, text="")
                        if isinstance(part, StepResult):
                            return
                raise SilentReplicaError(f"model {self.name!r}: a stream ended without a result")
            except FAILURES as error:
                last = self._on_failure(error)
        raise self._gone(last)

    def _target(self, method: str, stream: bool = False) -> Handle:
        session = make_session(self.session, self._attempt)
        return self.handle.options(method_name=method, stream=stream, session_id=session)

    def _on_failure(self, error: BaseException) -> BaseException:
        if not is_replica_failure(error):
            own = unwrap_error(error)
            if isinstance(own, EngineError):
                raise own from error
            cause = getattr(error, "cause", error)
            raise EngineError(f"model {self.name!r} failed: {type(cause).__name__}: {cause}") from error
        self._attempt += 1
        self.metrics.observe_retry(self.name)
        self.breaker.suspect()
        return error

    def _gone(self, last: BaseException | None) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"model {self.name!r}: {self.rescue.retries + 1} replicas failed on one step (last: {last!r})"
        )


class HandleRouters:
    """The router's deployment as `Routers`; decisions of the moment share a call (`Gatherer`).

    Args:
        lanes: into how many lanes trajectories are dealt; with one replica more are of no use.
    """

    def __init__(self, handle: Handle, breaker: Breaker, rescue: RescueConfig, lanes: int = 1) -> None:
        self._handle = handle
        self._breaker = breaker
        self._rescue = rescue
        self._gatherer = Gatherer(self._judge_readings, lanes)

    async def describe(self) -> RouterList:
        """What the replica asked has loaded.

        Raises:
            EngineUnavailableError: it is gone; ask again.
            TimeoutError: it does not answer.
        """
        async with asyncio.timeout(_DESCRIBE_S):
            found: RouterList = await ask_plainly(self._handle.options(method_name="describe"), "the router")
        return found

    async def judge_reading(self, version: int, reading: RouterReading, session: str) -> Opinion:
        """The opinion of one version; a replica that does not have it yet is asked again for a while.

        Raises:
            EngineUnavailableError: no replica can be reached, or the network failed.
            UnknownRouterError: none has that version.
        """
        return await self._gatherer.judge_reading(version, reading, session)

    async def _judge_readings(self, version: int, readings: tuple[RouterReading, ...], session: str) -> list[Opinion]:
        failures, last = 0, None
        for attempt in range(_UNKNOWN_ROUNDS):
            handle = self._handle.options(method_name="judge_readings", session_id=make_session(session, attempt))
            try:
                async with self._breaker.guard():
                    opinions: list[Opinion] = await ask(handle, version, readings)
                    return opinions
            except FAILURES as error:
                last = unwrap_error(error)
                if isinstance(last, UnknownRouterError):
                    await asyncio.sleep(_UNKNOWN_WAIT_S)
                    continue
                if not is_replica_failure(error):
                    raise EngineUnavailableError(f"the router failed on a decision: {last!r}") from error
                self._breaker.suspect()
                failures += 1
                if failures > self._rescue.retries:
                    break
        if isinstance(last, UnknownRouterError):
            raise last
        raise EngineUnavailableError(f"the router: {failures} replicas failed on one decision (last: {last!r})")


class ServeBackend:
    """Models and routers in deployments of their own.

    Args:
        models: handle of each model's deployment by name, cheap to dear.
        lanes: of the router's calls, see `HandleRouters`.
    """

    def __init__(
        self, models: dict[str, Handle], router: Handle, rescue: RescueConfig, metrics: Metrics, lanes: int = 1
    ) -> None:
        self._engines = []
        for name, handle in models.items():
            breaker = Breaker(f"model {name!r}", _Probe(handle), rescue)
            self._engines.append(HandleEngine(name, handle, breaker, rescue, metrics))
        self._routers = HandleRouters(router, Breaker("the router", _Probe(router), rescue), rescue, lanes)
        self._pool = EnginePool(self._engines)

    @property
    def routers(self) -> Routers:
        """The routers."""
        return self._routers

    async def ready(self) -> EnginePool:
        """Wait for the models' facts.

        Raises:
            EngineUnavailableError: a replica died meanwhile; ask again.
        """
        await self._pool.ready()
        return self._pool

    def pool(self, session: str) -> EnginePool:
        """The pool, with every call of one trajectory going to the same replica of a model."""
        return self._pool.with_engines([engine.bind(session) for engine in self._engines])


@dataclass(frozen=True)
class _Probe:
    """Asks several replicas of a deployment for a sign of life at once; one is enough."""

    handle: Handle

    async def __call__(self) -> None:
        calls = [
            asyncio.ensure_future(
                ask(self.handle.options(method_name="ping", session_id=make_session("probe", attempt)))
            )
            for attempt in range(_PROBED)
        ]
        try:
            failure: BaseException | None = None
            for call in asyncio.as_completed(calls):
                try:
                    await call
                    return
                except FAILURES as error:
                    is_replica_failure(error)
                    failure = error
            raise EngineUnavailableError("no replica gave a sign of life") from failure
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
