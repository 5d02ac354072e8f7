"""Models and routers behind Serve handles, as the episode loop sees them: engines and a router like any other.

A call that meets a dead replica is made again on another one, from the tokens that have come already, so that no step
is lost and none written twice. Where no replica answers, a breaker opens: calls fail at once with
EngineUnavailableError (the episode goes on with another model) until a probe finds the model alive again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from actors.waiting import unwrap_error
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepDelta, StepRequest, StepResult
from roro_ray.errors import EngineError, EngineUnavailableError
from roro_ray.routing.opinion import Opinion, RouterReading
from serve.backend import RouterList, Routers, UnknownRouterError
from serve.config import RescueConfig
from serve.metrics import Metrics

logger = logging.getLogger(__name__)
_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError, BackPressureError)
_UNKNOWN_ROUNDS = 40  # a new router version reaches all replicas within a few seconds
_UNKNOWN_WAIT_S = 0.1


class Breaker:
    """Whether a deployment can be reached. Open: no call is tried.

    Args:
        name: of the model, for messages.
        probe: a tiny call to the deployment.
    """

    def __init__(self, name: str, probe: Callable[[], Awaitable[Any]], rescue: RescueConfig) -> None:
        self.name = name
        self.is_open = False
        self._probe = probe
        self._rescue = rescue
        self._task: asyncio.Task[None] | None = None
        self._unanswered: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def guard(self) -> AsyncIterator[Callable[[], None]]:
        """Hold one call: it fails when the breaker opens before the call has told (by the function given) of an answer.

        Raises:
            EngineUnavailableError: the breaker is open or opens, or the call takes longer than `step_timeout_s`.
        """
        if self.is_open:
            raise self._unavailable("no replica of it answers")
        try:
            async with asyncio.timeout(self._rescue.step_timeout_s) as scope:
                self._unanswered.add(scope)
                try:
                    yield lambda: self._unanswered.discard(scope)
                finally:
                    self._unanswered.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise self._unavailable("no replica of it answers in time") from None

    def suspect(self) -> None:
        """A replica is gone: find out whether another one answers."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._find_out())

    async def _find_out(self) -> None:
        wait_s = self._rescue.failover_s
        while not await self._answers(wait_s):
            if not self.is_open:
                logger.warning("model %s: no replica answers within %g s; another model takes over", self.name, wait_s)
                self.is_open = True
            now = asyncio.get_running_loop().time()
            for scope in self._unanswered:
                scope.reschedule(now)
            await asyncio.sleep(self._rescue.probe_s)
        if self.is_open:
            logger.warning("model %s: answers again", self.name)
        self.is_open = False

    async def _answers(self, wait_s: float) -> bool:
        try:
            await asyncio.wait_for(_as_coroutine(self._probe()), wait_s)
        except (TimeoutError, RayError, RuntimeError, *_GONE):
            return False
        return True

    def _unavailable(self, why: str) -> EngineUnavailableError:
        return EngineUnavailableError(f"model {self.name!r}: {why}; it is asked again every {self._rescue.probe_s:g} s")


async def _as_coroutine(work: Awaitable[Any]) -> Any:
    return await work


@dataclass
class HandleEngine:
    """A model's deployment as an `Engine`; `session` keeps one trajectory's calls on one replica."""

    name: str
    handle: DeploymentHandle[Any]
    breaker: Breaker
    rescue: RescueConfig
    metrics: Metrics
    session: str = ""
    _attempt: int = field(default=0, repr=False)

    async def ready(self) -> EngineFacts:
        """Wait until a replica has loaded the model."""
        facts: EngineFacts = await self.handle.options(method_name="facts").remote()
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

    async def score_choices(self, prefix: str, choices: tuple[str, ...]) -> ChoiceScores:
        """Score continuations; errors as for `generate_step`."""
        scores: ChoiceScores = await self._call("score_choices", prefix, choices)
        return scores

    async def _call(self, method: str, *arguments: Any) -> Any:
        last: BaseException | None = None
        for _ in range(self.rescue.retries + 1):
            handle = self._target(method)
            try:
                async with self.breaker.guard():
                    return await handle.remote(*arguments)
            except (*_GONE, RayTaskError) as error:
                last = self._on_failure(error)
        raise self._gone(last)

    async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """Write one step token by token; a replica that dies is followed by another, from the next token on."""
        last: BaseException | None = None
        for _ in range(self.rescue.retries + 1):
            handle = self._target("stream_step", stream=True)
            try:
                async with self.breaker.guard() as answered, contextlib.aclosing(_read(handle, request)) as parts:
                    async for part in parts:
                        answered()
                        if isinstance(part, StepDelta):
                            request = replace(request, kept_ids=(*request.kept_ids, *part.token_ids))
                        yield part
                        if isinstance(part, StepResult):
                            return
            except (*_GONE, RayTaskError) as error:
                last = self._on_failure(error)
        raise self._gone(last)

    def _target(self, method: str, stream: bool = False) -> DeploymentHandle[Any]:
        # Another session for another try: it leads to another replica.
        session = f"{self.session}+{self._attempt}" if self._attempt else self.session
        return self.handle.options(method_name=method, stream=stream, session_id=session)

    def _on_failure(self, error: BaseException) -> BaseException:
        own = unwrap_error(error)
        if isinstance(own, EngineError) and not isinstance(own, EngineUnavailableError):
            raise own from error
        if isinstance(error, RayTaskError) and not isinstance(error, _GONE) and own is error:
            raise EngineError(f"model {self.name!r} failed: {type(error.cause).__name__}: {error.cause}") from error
        self._attempt += 1
        self.metrics.observe_retry(self.name)
        self.breaker.suspect()
        return error

    def _gone(self, last: BaseException | None) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"model {self.name!r}: {self.rescue.retries + 1} replicas failed on one step (last: {type(last).__name__})"
        )


async def _read(handle: DeploymentHandle[Any], request: StepRequest) -> AsyncGenerator[StepDelta | StepResult, None]:
    """The parts of a remote stream; closing it cancels the remote generator."""
    response = cast("DeploymentResponseGenerator[Any]", handle.remote(request))
    done = False
    try:
        async for parts in response:
            for part in parts:
                yield part
        done = True
    finally:
        if not done:
            response.cancel()


class HandleRouters:
    """The router's deployment as `Routers`."""

    def __init__(self, handle: DeploymentHandle[Any], breaker: Breaker, rescue: RescueConfig) -> None:
        self._handle = handle
        self._breaker = breaker
        self._rescue = rescue

    async def describe(self) -> RouterList:
        """What the replica asked has loaded."""
        found: RouterList = await self._handle.options(method_name="describe").remote()
        return found

    async def judge_reading(self, version: int, reading: RouterReading, session: str) -> Opinion:
        """The opinion of one version; a replica that does not have it yet is asked again for a while.

        Raises:
            EngineUnavailableError: no replica can be reached.
            UnknownRouterError: none has that version.
        """
        failures, last = 0, None
        for attempt in range(_UNKNOWN_ROUNDS):
            label = f"{session}+{attempt}" if attempt else session
            handle = self._handle.options(method_name="judge_reading", session_id=label)
            try:
                async with self._breaker.guard():
                    opinion: Opinion = await handle.remote(version, reading)
                    return opinion
            except (*_GONE, RayTaskError) as error:
                last = unwrap_error(error)
                if isinstance(last, UnknownRouterError):
                    await asyncio.sleep(_UNKNOWN_WAIT_S)
                    continue
                if isinstance(error, RayTaskError) and not isinstance(error, _GONE):
                    raise last from error
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
    """

    def __init__(
        self,
        models: dict[str, DeploymentHandle[Any]],
        router: DeploymentHandle[Any],
        rescue: RescueConfig,
        metrics: Metrics,
    ) -> None:
        self._engines = []
        for name, handle in models.items():
            breaker = Breaker(name, handle.options(method_name="ping").remote, rescue)
            self._engines.append(HandleEngine(name, handle, breaker, rescue, metrics))
        breaker = Breaker("router", router.options(method_name="ping").remote, rescue)
        self._routers = HandleRouters(router, breaker, rescue)
        self._pool = EnginePool(self._engines)

    @property
    def routers(self) -> Routers:
        """The routers."""
        return self._routers

    async def ready(self) -> EnginePool:
        """Wait for the models' facts."""
        await self._pool.ready()
        return self._pool

    def pool(self, session: str) -> EnginePool:
        """The pool, with every call of one trajectory going to the same replica of a model."""
        return self._pool.with_engines([engine.bind(session) for engine in self._engines])

