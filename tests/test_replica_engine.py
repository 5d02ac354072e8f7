"""One engine of many replicas, without Ray: nothing is lost and nothing doubled when replicas die, hang or are slow."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from roro_ray.engines.lanes import Ticket
from roro_ray.engines.protocol import EngineFacts, StepRequest
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.engines.replicas import Answer, Counts, FleetOptions, Item, ReplicaGoneError, ReplicaLostError, Roster
from roro_ray.errors import EngineError, EngineUnavailableError
from tests.fakes import ScriptedEngine


@dataclass
class LocalReplica:
    """A replica in this process; `up` and `hung` say how it is, `poison` which prefixes end it."""

    name: str
    delay_s: float = 0.0
    up: bool = True
    hung: bool = False
    gone: bool = False
    poison: str = "nothing is poison"
    restarts_in: float | None = 0.05
    served: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    ends: int = 0
    cancelled: int = 0
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)

    def check(self) -> None:
        if self.gone:
            raise ReplicaGoneError(f"{self.name} is gone")
        if not self.up:
            raise ReplicaLostError(f"{self.name} is down")

    async def ready(self) -> EngineFacts:
        self.check()
        return await self.engine.ready()

    async def call(self, items: Sequence[Item], parcels: Sequence[Any]) -> list[Answer]:
        self.check()
        self.sizes.append(len(items))
        self.adapters = [parcel.adapter.name for parcel in parcels]
        try:
            if self.hung:
                await asyncio.Event().wait()
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if any(isinstance(item, StepRequest) and self.poison in item.prefix for item in items):
            self.die()
        self.check()
        self.served += [item.prefix if isinstance(item, StepRequest) else item[0] for item in items]
        return list(await asyncio.gather(*map(self.serve, items), return_exceptions=True))

    async def serve(self, item: Item) -> Any:
        if isinstance(item, StepRequest):
            return await self.engine.generate_step(item)
        return await self.engine.score_choices(*item)

    async def load_adapters(self, parcels: Sequence[Any]) -> None:
        self.check()
        self.adapters = [parcel.adapter.name for parcel in parcels]

    async def is_well(self, stuck_s: float) -> bool:
        self.check()
        return not self.hung

    def end(self) -> None:
        self.ends += 1
        self.hung = False
        self.die()

    def die(self) -> None:
        self.up = False
        if self.restarts_in is not None:
            asyncio.get_running_loop().call_later(self.restarts_in, lambda: setattr(self, "up", True))


def make_engine(*replicas: LocalReplica, **options: Any) -> ReplicaEngine:
    settings = {"timeout_s": 20.0, "step_timeout_s": 0.3, "gathers": False, **options}
    return ReplicaEngine("large", {replica.name: replica for replica in replicas}, FleetOptions(**settings))


async def ask_all(engine: ReplicaEngine, prefixes: Sequence[str]) -> list[Any]:
    calls = [engine.generate_step(StepRequest(prefix, 20)) for prefix in prefixes]
    return await asyncio.gather(*calls, return_exceptions=True)


def make_prefixes(count: int) -> list[str]:
    return [f"Question {i}\n\n" for i in range(count)]


async def expect(prefixes: Sequence[str]) -> list[Any]:
    engine = ScriptedEngine()
    return [await engine.generate_step(StepRequest(prefix, 20)) for prefix in prefixes]


@pytest.mark.parametrize("gathers", [True, False])
async def test_the_same_answers_from_one_replica_or_many(gathers: bool) -> None:
    prefixes = make_prefixes(60)
    for count in (1, 3):
        replicas = [LocalReplica(f"r{i}") for i in range(count)]
        engine = make_engine(*replicas, gathers=gathers)
        assert (await engine.ready()).name == "scripted"
        assert await ask_all(engine, prefixes) == await expect(prefixes)
        assert Counter(p for replica in replicas for p in replica.served) == Counter(prefixes)
        assert all(replica.served for replica in replicas)
        assert max(size for replica in replicas for size in replica.sizes) > 10 if gathers else True
        assert engine.counts.requests == 60 and engine.counts.retried == 0
        scores = await engine.score_choices("Question\n\n", ("a", "b"))
        assert len(scores.log_probs) == 2


@pytest.mark.parametrize("gathers", [True, False])
async def test_a_dead_replica_is_not_waited_for(gathers: bool) -> None:
    dead, fine = LocalReplica("r0", delay_s=0.05, restarts_in=None), LocalReplica("r1")
    engine = make_engine(dead, fine, gathers=gathers)
    prefixes = make_prefixes(30)
    asyncio.get_running_loop().call_later(0.02, dead.die)
    assert await ask_all(engine, prefixes) == await expect(prefixes)
    assert Counter(fine.served) == Counter(prefixes) and not dead.served
    assert engine.counts.retried > 0 and engine.balance.up == ("r1",)
    dead.up = True
    for _ in range(100):  # it is asked until it is ready, and then gets work again
        await asyncio.sleep(0.05)
        if len(engine.balance.up) == 2:
            break
    await ask_all(engine, make_prefixes(60))
    assert dead.served


@pytest.mark.parametrize("gathers", [True, False])
async def test_a_hung_replica_is_killed_and_its_requests_go_elsewhere(gathers: bool) -> None:
    hung, fine = LocalReplica("r0", hung=True, restarts_in=30.0), LocalReplica("r1")
    engine = make_engine(hung, fine, gathers=gathers)
    prefixes = make_prefixes(30)
    assert await ask_all(engine, prefixes) == await expect(prefixes)
    assert Counter(fine.served) == Counter(prefixes)
    assert hung.ends == 1 and engine.counts.hangs == 1 and hung.cancelled > 0


async def test_the_only_replica_hangs_and_is_waited_for_until_it_is_back() -> None:
    hung = LocalReplica("r0", hung=True)
    engine = make_engine(hung, gathers=True)
    prefixes = make_prefixes(30)
    assert await ask_all(engine, prefixes) == await expect(prefixes)
    assert Counter(hung.served) == Counter(prefixes) and hung.ends == 1


async def test_a_replica_that_is_alone_and_slow_is_neither_killed_nor_asked_twice() -> None:
    slow = LocalReplica("r0", delay_s=1.0)
    engine = make_engine(slow)
    prefixes = make_prefixes(5)
    assert await ask_all(engine, prefixes) == await expect(prefixes)
    assert slow.ends == 0 and slow.sizes == [1] * 5 and engine.counts == Counts(requests=5)


async def test_work_moves_away_from_a_slow_replica() -> None:
    replicas = [LocalReplica("r0", delay_s=0.2), LocalReplica("r1", delay_s=0.01), LocalReplica("r2", delay_s=0.01)]
    engine = make_engine(*replicas, step_timeout_s=10.0)

    async def episode(number: int) -> None:
        prefix = f"Question {number}\n\n"
        for _ in range(6):
            prefix += (await engine.generate_step(StepRequest(prefix, 20))).text + "\n\n"

    for start in range(0, 120, 12):
        await asyncio.gather(*(episode(start + i) for i in range(12)))
    served = [len(replica.served) for replica in replicas]
    assert sum(served) == 720 and len({p for replica in replicas for p in replica.served}) == 720
    assert served[0] < 0.15 * 720 and min(served[1:]) > 0.25 * 720
    assert engine.counts.moved > 0


@pytest.mark.parametrize("gathers", [True, False])
async def test_a_request_that_ends_its_replicas_is_given_up_and_takes_nobody_along(gathers: bool) -> None:
    replicas = [LocalReplica(f"r{i}", poison="poison") for i in range(2)]
    engine = make_engine(*replicas, gathers=gathers)
    prefixes = [*make_prefixes(10), "poison\n\n"]
    *good, bad = await ask_all(engine, prefixes)
    assert good == await expect(prefixes[:10])
    assert isinstance(bad, EngineUnavailableError) and "4 replicas in turn were lost" in str(bad)
    assert isinstance(pickle.loads(pickle.dumps(bad)), EngineUnavailableError)


async def test_an_error_of_the_engine_is_the_callers() -> None:
    replica = LocalReplica("r0", engine=ScriptedEngine(fails=lambda prefix: "bad" in prefix))
    bad, good = await ask_all(make_engine(replica), ["bad\n\n", "good\n\n"])
    assert isinstance(bad, EngineError) and "told to fail" in str(bad) and good.text
    assert replica.sizes == [1, 1]


async def test_no_replica_in_time_and_none_that_can_come() -> None:
    down = LocalReplica("r0", up=False, restarts_in=None)
    with pytest.raises(EngineUnavailableError, match=r"no replica was there in 0.5 s \(1 known, none up"):
        await make_engine(down, timeout_s=0.5).generate_step(StepRequest("Q\n\n", 20))
    gone = LocalReplica("r0", gone=True)
    with pytest.raises(EngineUnavailableError, match=r"all its replicas are gone: r0 is gone"):
        await make_engine(gone).generate_step(StepRequest("Q\n\n", 20))


def test_a_replica_lost_in_one_event_loop_is_found_again_in_the_next() -> None:
    dead = LocalReplica("r0", up=False, restarts_in=None)
    engine = make_engine(dead, LocalReplica("r1"))
    assert asyncio.run(ask_all(engine, make_prefixes(20))) == asyncio.run(expect(make_prefixes(20)))
    assert engine.balance.up == ("r1",)
    dead.up = True

    async def main() -> None:
        await ask_all(engine, make_prefixes(1))
        while len(engine.balance.up) < 2:  # a test has a deadline
            await asyncio.sleep(0.02)

    asyncio.run(main())


class LocalRegistry:
    """Gives replicas out once something is needed; takes them back when it is told."""

    def __init__(self, *replicas: LocalReplica, trouble: str = "") -> None:
        self.replicas = {replica.name: replica for replica in replicas}
        self.reports: list[tuple[int, Counts]] = []
        self.trouble = trouble

    async def exchange(self, model: str, holder: str, demand: int, counts: Counts) -> Roster | None:
        self.reports.append((demand, counts))
        if self.trouble:
            return Roster(trouble=self.trouble)
        return Roster(self.replicas, await ScriptedEngine().ready()) if len(self.reports) > 1 else None


def make_elastic(registry: LocalRegistry) -> ReplicaEngine:
    return ReplicaEngine("large", {}, FleetOptions(20.0, 5.0, 5.0, gathers=False, elastic=True), registry)


async def test_requests_wait_for_the_first_replica_and_tell_that_they_do() -> None:
    registry = LocalRegistry(LocalReplica("r0", delay_s=0.02))
    engine = make_elastic(registry)
    prefixes = make_prefixes(20)
    assert (await engine.ready()).name == "scripted"
    assert await ask_all(engine, prefixes) == await expect(prefixes)
    for _ in range(100):
        if registry.reports[-1][0] == 0:
            break
        await asyncio.sleep(0.05)
    demands = [demand for demand, _ in registry.reports]
    assert max(demands) >= 1 and demands[-1] == 0 and registry.reports[-1][1].requests == 20


async def test_what_was_released_is_asked_for_elsewhere_however_often() -> None:
    registry = LocalRegistry(*(LocalReplica(f"r{i}") for i in range(9)))
    engine = make_elastic(registry)
    await engine.ready()
    old = list(registry.replicas.values())
    for replica in old:
        replica.gone = True
    last = LocalReplica("new")
    registry.replicas = {"new": last}
    assert (await ask_all(engine, make_prefixes(12))) == await expect(make_prefixes(12))
    assert len(last.served) == 12 and engine.counts.retried > 0


async def test_a_model_that_cannot_be_loaded_is_told_at_once() -> None:
    engine = make_elastic(LocalRegistry(trouble="no such model"))
    with pytest.raises(EngineUnavailableError, match="no replica can be started: no such model"):
        await engine.generate_step(StepRequest("Q\n\n", 20))


async def test_a_model_that_could_not_be_loaded_is_still_wanted_and_used_as_soon_as_it_can_be() -> None:
    registry = LocalRegistry(trouble="no such model")
    engine = make_elastic(registry)
    for _ in range(2):
        del registry.reports[:]
        with pytest.raises(EngineUnavailableError, match="no such model"):
            await engine.generate_step(StepRequest("Q\n\n", 20))
        assert max(demand for demand, _ in registry.reports) == 1  # else nobody starts one again
    registry.trouble, registry.replicas = "", {"r0": LocalReplica("r0")}
    assert (await engine.generate_step(StepRequest("Q\n\n", 20))).text


async def test_the_first_replica_is_waited_for_longer_than_an_episode_may_take() -> None:
    class LateRegistry(LocalRegistry):
        async def exchange(self, model: str, holder: str, demand: int, counts: Counts) -> Roster | None:
            await asyncio.sleep(0.2)
            return await super().exchange(model, holder, demand, counts)

    late = LateRegistry(LocalReplica("r0"))
    options = FleetOptions(0.1, 5.0, 5.0, gathers=False, elastic=True, ready_timeout_s=5.0)
    assert (await ReplicaEngine("large", {}, options, late).ready()).name == "scripted"
    with pytest.raises(EngineUnavailableError, match=r"no replica was there in 0.3 s"):
        await ReplicaEngine("large", {}, replace(options, ready_timeout_s=0.3)).ready()


async def test_who_waits_behind_others_that_lost_their_replicas_is_not_told_of_missing_replicas() -> None:
    slow = LocalReplica("r0", delay_s=0.5)
    engine = make_engine(slow, timeout_s=0.3, step_timeout_s=5.0)
    tickets = [Ticket(StepRequest(f"{i}\n\n", 20), attempts=3) for i in range(2)]
    first, second = await asyncio.gather(
        *(engine._ask_carefully("r0", ticket) for ticket in tickets), return_exceptions=True
    )
    assert not isinstance(first, BaseException)
    assert isinstance(second, EngineUnavailableError) and "asked one at a time" in str(second)
    assert "no replica was there" not in str(second)


async def test_what_went_elsewhere_since_its_replica_is_down_counts_as_moved_and_stays_there() -> None:
    replicas = [LocalReplica("r0"), LocalReplica("r1")]
    engine = make_engine(*replicas)
    prefix = "Question 1\n\n"
    await engine.generate_step(StepRequest(prefix, 20))
    home = next(replica for replica in replicas if replica.served)
    other = next(replica for replica in replicas if not replica.served)
    home.restarts_in = 0.05
    home.die()
    await engine.generate_step(StepRequest(prefix, 20))
    assert other.served == [prefix]
    assert engine.counts.moved == 1
    while len(engine.balance.up) < 2:  # a test has a deadline
        await asyncio.sleep(0.02)
    await engine.generate_step(StepRequest(prefix + "Step 1\n\n", 20))
    assert len(other.served) == 2  # whose cache is the warm one now


async def test_adapters_reach_every_replica_and_those_that_come_later() -> None:
    first, down = LocalReplica("r0"), LocalReplica("r1", up=False)
    registry = LocalRegistry(first, down)
    registry.reports.append((0, Counts()))
    engine = make_elastic(registry)
    await engine.ready()
    parcel = SimpleNamespace(adapter=SimpleNamespace(name="judge", version=1))
    await engine.take_parcel(parcel)
    assert first.adapters == ["judge"]
    late = LocalReplica("r2")
    registry.replicas = {"r2": late}
    await engine._exchange()
    await engine.generate_step(StepRequest("Q\n\n", 20))
    assert late.adapters == ["judge"]
    assert len(engine.parcels) == 1


def test_a_copy_knows_what_the_original_knew() -> None:
    engine = make_engine(LocalReplica("r0"), LocalReplica("r1"), gathers=True)
    asyncio.run(engine.ready())
    unscripted = dict.fromkeys(engine.replicas)  # a scripted engine's writer does not pickle
    copy = pickle.loads(pickle.dumps(ReplicaEngine("large", unscripted, engine.options)))  # type: ignore[arg-type]
    assert copy.name == "large" and list(copy.replicas) == ["r0", "r1"] and copy.options.gathers
    for _ in range(2):  # an engine serves one event loop after another
        assert asyncio.run(ask_all(engine, make_prefixes(4))) == asyncio.run(expect(make_prefixes(4)))
