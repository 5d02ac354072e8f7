"""Engines and routers behind Serve handles, and the breaker: on handles whose replicas die, hang, refuse or fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from fakes import ScriptedEngine
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult
from roro_ray.errors import EngineError, EngineUnavailableError
from roro_ray.routing.opinion import Opinion, RouterReading
from roro_ray.types import Peek
from serve.affinity import SessionRouter, make_session, split_session
from serve.backend import RouterFacts, RouterList, UnknownRouterError
from serve.breaker import Breaker, SilentReplicaError
from serve.config import RescueConfig
from serve.metrics import MemoryMetrics
from serve.remote import HandleEngine, HandleRouters, ServeBackend

pytestmark = pytest.mark.timeout(30)
RESCUE = RescueConfig(retries=2, step_timeout_s=0.3, failover_s=0.1, probe_s=0.02)
REQUEST = StepRequest("Q\n\n", 20)
TEXT = "A: note 0"
READING = RouterReading(("Q",), (0.0,))
OPINION = Opinion((-0.1, -2.4), 7, 3, 1, 2.0)


def remote(error: Exception) -> RayTaskError:
    """An error of our own code in a replica, as a handle raises it."""
    return RayTaskError("call", "Traceback", error).as_instanceof_cause()


class LostConnection(grpc.RpcError):
    """What gRPC raises of a peer that went away."""


Failure = Callable[[], BaseException]  # a new one for each raise, since an exception keeps where it has been
GONE: dict[str, Failure] = {
    "died": ActorDiedError,
    "unavailable": lambda: ActorUnavailableError("gone", b"\0" * 16),
    "connection": LostConnection,
    "back-pressure": lambda: BackPressureError(3, 2),
    "stopping": lambda: RuntimeError("Unexpected error (StatusCode.UNAVAILABLE)"),
    "cancelled request": lambda: RequestCancelledError("r"),
    "failed deployment": lambda: DeploymentUnavailableError("model"),  # type: ignore[arg-type]
    "cancelled": asyncio.CancelledError,  # by a replica that stops, not by the caller
    "loading": lambda: remote(EngineUnavailableError("loading")),
    "died behind": lambda: remote(ActorDiedError()),
}
ALL_GONE = pytest.mark.parametrize("error", GONE.values(), ids=GONE.keys())


@dataclass
class Replica:
    """One process behind a handle.

    `fails` raises at calls, in a stream after `after` tokens; `hangs` never answers, in a stream after `after` tokens.
    """

    fails: Failure | None = None
    hangs: bool = False
    after: int = 0
    slow_s: float = 0.0
    calls: list[str] = field(default_factory=list)
    requests: list[StepRequest] = field(default_factory=list)
    engine: ScriptedEngine = field(default_factory=lambda: ScriptedEngine("small"))
    routers: dict[int, Opinion] = field(default_factory=lambda: {7: OPINION})

    async def answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        self.calls.append(method)
        await self._misbehave()
        if method == "generate_step":
            self.requests.append(arguments[0])
            return await self.engine.generate_step(*arguments)
        if method == "judge_readings":
            if arguments[0] not in self.routers:
                raise remote(UnknownRouterError(f"no version {arguments[0]}"))
            return [self.routers[arguments[0]] for _ in arguments[1]]
        if method == "describe":
            return RouterList((RouterFacts(7, Peek.NONE),), 7)
        return await self.engine.ready() if method == "facts" else True

    async def stream(self, request: StepRequest) -> AsyncIterator[list[StepDelta | StepResult]]:
        self.calls.append("stream_step")
        self.requests.append(request)
        count = 0
        if not self.after:
            await self._misbehave()
        async for part in self.engine.stream_step(request):
            yield [part]
            count += 1
            if count == self.after:
                await self._misbehave()

    async def _misbehave(self) -> None:
        await asyncio.sleep(self.slow_s)
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails is not None:
            raise self.fails()


@dataclass
class Response:
    """What a handle's call gives: to be awaited, or iterated over."""

    work: Any
    on_cancel: Callable[[], None]
    cancelled: bool = False

    def __await__(self) -> Any:
        return self.work.__await__()

    def __aiter__(self) -> Any:
        return self.work.__aiter__()

    def cancel(self) -> None:
        self.cancelled = True
        self.on_cancel()


@dataclass
class Handle:
    """A deployment's handle: each try of a session goes to the next replica; with none, calls wait."""

    replicas: list[Replica]
    method: str = ""
    session: str = ""
    cancelled: list[str] = field(default_factory=list)

    def options(self, method_name: str, session_id: str = "", stream: bool = False) -> Handle:
        assert stream == (method_name == "stream_step")
        return replace(self, method=method_name, session=session_id)

    def remote(self, *arguments: Any) -> Response:
        replicas = self.replicas or [Replica(hangs=True)]
        replica = replicas[split_session(self.session)[1] % len(replicas)]
        streams = self.method == "stream_step"
        work: Any = replica.stream(*arguments) if streams else replica.answer(self.method, arguments)
        return Response(work, lambda: self.cancelled.append(self.method))


@dataclass
class Setting:
    """An engine on a handle, and what it is made of."""

    handle: Handle
    engine: HandleEngine
    breaker: Breaker
    metrics: MemoryMetrics

    @property
    def retries(self) -> float:
        return self.metrics.total("roro_retries", model="small")


def make_setting(*replicas: Replica, rescue: RescueConfig = RESCUE) -> Setting:
    handle, metrics = Handle(list(replicas)), MemoryMetrics(["small"])
    backend = ServeBackend({"small": handle, "large": handle}, handle, rescue, metrics)  # type: ignore[dict-item, arg-type]
    engine = backend.pool("s").engines[0]
    assert isinstance(engine, HandleEngine)
    return Setting(handle, engine, engine.breaker, metrics)


async def read(engine: HandleEngine, request: StepRequest = REQUEST) -> tuple[str, list[int], StepResult]:
    """Told text, told tokens, result."""
    text, tokens, result = "", [], None
    async for part in engine.stream_step(request):
        if isinstance(part, StepDelta):
            text += part.text
            tokens += part.token_ids
        else:
            result = part
    assert result is not None
    return text, tokens, result


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


# Whole steps


async def test_a_step_comes_from_the_sessions_replica() -> None:
    setting = make_setting(Replica(), Replica())
    assert (await setting.engine.generate_step(REQUEST)).text == TEXT
    assert [len(replica.calls) for replica in setting.handle.replicas] == [1, 0]
    assert setting.retries == 0


@ALL_GONE
async def test_a_dead_replica_is_followed_by_the_next(error: Failure) -> None:
    setting = make_setting(Replica(fails=error), Replica())
    assert (await setting.engine.generate_step(REQUEST)).text == TEXT
    assert setting.retries == 1
    await setting.engine.generate_step(REQUEST)
    # The next step goes straight to the replica that answered.
    assert setting.handle.replicas[0].calls.count("generate_step") == 1
    assert not setting.breaker.is_open


async def test_an_error_of_the_model_is_not_tried_again() -> None:
    setting = make_setting(Replica(fails=lambda: remote(EngineError("too long"))), Replica())
    with pytest.raises(EngineError, match="too long") as caught:
        await setting.engine.generate_step(REQUEST)
    assert not isinstance(caught.value, EngineUnavailableError)
    assert setting.handle.replicas[1].calls == []


async def test_an_error_that_nobody_foresaw_names_model_and_cause() -> None:
    setting = make_setting(Replica(fails=lambda: remote(ZeroDivisionError("division by zero"))), Replica())
    with pytest.raises(EngineError, match=r"model 'small' failed: ZeroDivisionError: division by zero"):
        await setting.engine.generate_step(REQUEST)
    assert setting.retries == 0


async def test_a_silent_replica_is_left_for_the_next_in_time() -> None:
    setting = make_setting(Replica(hangs=True), Replica())
    began = time.monotonic()
    assert (await setting.engine.generate_step(REQUEST)).text == TEXT
    assert RESCUE.step_timeout_s <= time.monotonic() - began < 2
    assert setting.handle.cancelled.count("generate_step") == 1
    assert setting.retries == 1
    await asyncio.sleep(2 * RESCUE.failover_s)
    assert not setting.breaker.is_open  # the other replica gave a sign of life


async def test_a_late_answer_within_the_time_is_taken() -> None:
    setting = make_setting(Replica(slow_s=0.15), Replica())
    assert (await setting.engine.generate_step(REQUEST)).text == TEXT
    assert setting.retries == 0


async def test_when_every_replica_fails_the_model_is_unavailable() -> None:
    setting = make_setting(Replica(fails=ActorDiedError), Replica(fails=ActorDiedError))
    with pytest.raises(EngineUnavailableError, match="3 replicas failed on one step"):
        await setting.engine.generate_step(REQUEST)
    assert setting.retries == 3


async def test_a_caller_that_leaves_takes_its_call_back() -> None:
    setting = make_setting(Replica(hangs=True), Replica())
    task = asyncio.create_task(setting.engine.generate_step(REQUEST))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert setting.handle.cancelled == ["generate_step"]
    assert setting.handle.replicas[1].calls == []
    assert setting.retries == 0


# Streams


async def test_a_stream_is_told_as_it_comes() -> None:
    setting = make_setting(Replica())
    text, tokens, result = await read(setting.engine)
    assert text == TEXT == result.text
    assert tuple(tokens) == result.token_ids
    assert setting.handle.cancelled == []


@ALL_GONE
@pytest.mark.parametrize("after", [0, 1, 4, 10])
async def test_a_broken_stream_goes_on_elsewhere_from_the_next_token(after: int, error: Failure) -> None:
    first, second = Replica(fails=error, after=after), Replica()
    second.engine = first.engine  # of the same vocabulary
    setting = make_setting(first, second)
    text, tokens, result = await read(setting.engine)
    assert result.text == TEXT
    assert tuple(tokens) == result.token_ids
    assert TEXT.startswith(text)
    assert text == (TEXT if not after else TEXT[:after])
    assert second.requests[0].kept_ids == result.token_ids[:after]
    assert setting.retries == 1


async def test_a_stream_that_falls_silent_goes_on_elsewhere() -> None:
    first, second = Replica(hangs=True, after=3), Replica()
    second.engine = first.engine
    setting = make_setting(first, second)
    _, tokens, result = await read(setting.engine)
    assert result.text == TEXT
    assert tuple(tokens) == result.token_ids
    assert setting.handle.cancelled.count("stream_step") == 1


async def test_a_stream_without_a_result_is_asked_for_again() -> None:
    class Short(ScriptedEngine):
        async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
            async for part in super().stream_step(request):
                if isinstance(part, StepDelta):
                    yield part

    short = Short("small")
    setting = make_setting(Replica(engine=short), Replica())
    setting.handle.replicas[1].engine._vocabulary = short._vocabulary
    _, tokens, result = await read(setting.engine)
    assert (result.text, tuple(tokens)) == (TEXT, result.token_ids)


async def test_the_models_own_error_ends_a_stream() -> None:
    setting = make_setting(Replica(fails=lambda: remote(EngineError("bad batch")), after=2), Replica())
    with pytest.raises(EngineError, match="bad batch"):
        await read(setting.engine)
    assert setting.handle.replicas[1].calls == []


async def test_closing_a_stream_cancels_the_remote_one() -> None:
    setting = make_setting(Replica())
    stream = setting.engine.stream_step(REQUEST)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert setting.handle.cancelled == ["stream_step"]


# The breaker


async def test_without_replicas_the_breaker_opens_and_calls_fail_at_once() -> None:
    setting = make_setting()
    calls = [asyncio.create_task(setting.engine.generate_step(REQUEST)) for _ in range(3)]
    streams = [asyncio.create_task(read(setting.engine)) for _ in range(3)]
    await asyncio.sleep(0.01)
    began = time.monotonic()
    setting.breaker.suspect()
    for task in calls + streams:
        with pytest.raises(EngineUnavailableError, match="no replica of it answers"):
            await task
    assert time.monotonic() - began < RESCUE.step_timeout_s
    began = time.monotonic()
    with pytest.raises(EngineUnavailableError):
        await setting.engine.generate_step(REQUEST)
    assert time.monotonic() - began < 0.05


async def test_an_open_breaker_closes_when_a_replica_is_back() -> None:
    setting = make_setting()
    setting.breaker.suspect()
    await wait_until(lambda: setting.breaker.is_open)
    setting.handle.replicas.append(Replica())
    await wait_until(lambda: not setting.breaker.is_open)
    assert (await setting.engine.generate_step(REQUEST)).text == TEXT


async def test_one_replica_that_hangs_does_not_open_the_breaker() -> None:
    setting = make_setting(Replica(hangs=True), Replica())
    setting.breaker.suspect()
    await asyncio.sleep(3 * RESCUE.failover_s)
    assert not setting.breaker.is_open


async def test_a_stream_that_has_begun_outlives_the_breaker() -> None:
    slow = Replica(engine=ScriptedEngine("small", delay_s=0.2))
    setting = make_setting(slow, rescue=replace(RESCUE, step_timeout_s=10.0))
    stream = setting.engine.stream_step(REQUEST)
    parts = [await anext(stream)]
    setting.handle.replicas.clear()
    setting.breaker.suspect()
    await wait_until(lambda: setting.breaker.is_open)
    parts += [part async for part in stream]
    assert isinstance(parts[-1], StepResult)


async def test_an_errors_inside_a_guard_stay_what_they_are() -> None:
    breaker = Breaker("it", lambda: asyncio.sleep(0), RESCUE)
    with pytest.raises(TimeoutError) as caught:
        async with breaker.guard():
            raise TimeoutError("the callers own")
    assert not isinstance(caught.value, SilentReplicaError)


async def test_a_call_that_takes_long_to_end_does_not_keep_the_breaker_open_for_good() -> None:
    lives: list[bool] = []

    async def probe() -> None:
        if not lives:
            raise EngineUnavailableError("no sign of life")

    breaker = Breaker("it", probe, RESCUE)

    async def call() -> None:
        async with breaker.guard():
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(5 * RESCUE.probe_s)  # as long as the breaker takes to look at it again

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    breaker.suspect()
    with pytest.raises(EngineUnavailableError):
        await task
    lives.append(True)
    await wait_until(lambda: not breaker.is_open)


def test_a_breaker_that_was_open_when_its_event_loop_ended_closes_in_the_next() -> None:
    lives: list[bool] = []

    async def probe() -> None:
        if not lives:
            raise EngineUnavailableError("no sign of life")

    breaker = Breaker("it", probe, RESCUE)

    async def fail() -> None:
        breaker.suspect()
        await wait_until(lambda: breaker.is_open)

    async def recover() -> None:
        with pytest.raises(EngineUnavailableError):
            async with breaker.guard():
                pass
        await wait_until(lambda: not breaker.is_open)

    asyncio.run(fail())
    lives.append(True)
    asyncio.run(recover())


# The router


def make_routers(*replicas: Replica) -> tuple[Handle, HandleRouters]:
    handle = Handle(list(replicas))
    backend = ServeBackend({"small": handle, "large": handle}, handle, RESCUE, MemoryMetrics([]))  # type: ignore[dict-item, arg-type]
    routers = backend.routers
    assert isinstance(routers, HandleRouters)
    return handle, routers


@ALL_GONE
async def test_a_router_that_died_is_followed_by_the_next(error: Failure) -> None:
    _, routers = make_routers(Replica(fails=error), Replica())
    assert await routers.judge_reading(7, READING, "s") == OPINION


async def test_a_version_that_a_replica_does_not_have_yet_is_waited_for() -> None:
    handle, routers = make_routers(Replica(routers={}))
    task = asyncio.create_task(routers.judge_reading(7, READING, "s"))
    await asyncio.sleep(0.15)
    handle.replicas[0].routers[7] = OPINION
    assert await task == OPINION


async def test_a_version_that_no_replica_has_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.remote._UNKNOWN_WAIT_S", 0.001)
    _, routers = make_routers(Replica(routers={}))
    with pytest.raises(UnknownRouterError, match="no version 7"):
        await routers.judge_reading(7, READING, "s")


async def test_no_router_at_all_is_unavailable() -> None:
    _, routers = make_routers()
    with pytest.raises(EngineUnavailableError):
        await routers.judge_reading(7, READING, "s")


async def test_a_router_that_fails_is_unavailable_too() -> None:
    _, routers = make_routers(Replica(fails=lambda: remote(ZeroDivisionError("nan"))), Replica())
    with pytest.raises(EngineUnavailableError, match="nan"):
        await routers.judge_reading(7, READING, "s")


@ALL_GONE
async def test_asking_a_dead_router_what_it_has_can_be_tried_again(error: Failure) -> None:
    handle, routers = make_routers(Replica(fails=error))
    with pytest.raises(EngineUnavailableError):
        await routers.describe()
    handle.replicas[0].fails = None
    assert (await routers.describe()).default == 7


async def test_a_silent_router_does_not_hold_up_who_asks_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.remote._DESCRIBE_S", 0.05)
    _, routers = make_routers(Replica(hangs=True))
    with pytest.raises(TimeoutError):
        await routers.describe()


async def test_models_that_die_while_they_load_are_asked_again() -> None:
    handle = Handle([Replica(fails=ActorDiedError)])
    backend = ServeBackend({"small": handle, "large": handle}, handle, RESCUE, MemoryMetrics([]))  # type: ignore[dict-item, arg-type]
    with pytest.raises(EngineUnavailableError):
        await backend.ready()


# Which replica


def test_a_session_tells_its_try() -> None:
    assert split_session(make_session("req-1", 2)) == ("req-1", 2)
    assert split_session("a+b") == ("a+b", 0)
    assert split_session(make_session("a+7")) == ("a+7", 0)
    assert split_session("3f2c") == ("3f2c", 0)


@dataclass
class Known:
    """A replica as Serve's router knows it."""

    replica_id: str


async def choose(
    monkeypatch: pytest.MonkeyPatch, session: str, unheard: dict[str, float]
) -> tuple[list[str], list[str]]:
    ranks = [[Known(name)] for name in ("a", "b", "c")]

    async def ranked(self: object, candidates: object, pending: object) -> list[list[Known]]:
        return ranks

    monkeypatch.setattr("serve.affinity.ConsistentHashRouter.choose_replicas", ranked)
    asked: list[str] = []

    class Cache:
        def invalidate_key(self, replica_id: str) -> None:
            asked.append(replica_id)

    monkeypatch.setattr(SessionRouter, "replica_queue_len_cache", Cache())
    router = SessionRouter.__new__(SessionRouter)
    router._unheard = unheard

    @dataclass
    class Metadata:
        session_id: str

    @dataclass
    class Pending:
        metadata: Metadata

    found = await router.choose_replicas([], Pending(Metadata(session)))
    return [rank[0].replica_id for rank in found], asked


async def test_each_try_begins_at_another_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [(await choose(monkeypatch, make_session("s", attempt), {}))[0] for attempt in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


async def test_a_replica_that_took_nothing_for_long_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    _, asked = await choose(monkeypatch, make_session("s"), {"a": now, "b": now - 60})
    assert asked == ["b"]
