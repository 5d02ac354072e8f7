"""The rollout pool: same results as one process, exact versions, and nothing lost or doubled when workers die."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayError

from actors.dispatch import assign_workers
from actors.engines import EngineActor, RemoteEngine
from actors.fleet import start_engines
from actors.rollout import RolloutPool, make_runner
from actors.waiting import find_actor, wait_for
from roro_ray.config import Config
from roro_ray.engines.protocol import StepRequest
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.errors import ConfigError, DeadlineError, EngineError, ResourceError
from roro_ray.routing.episode import EpisodeFailure
from roro_ray.routing.router import make_router
from roro_ray.types import Trajectory
from tests.fakes import ScriptedEngine, run_specs
from tests.scripted_world import exit_worker, make_engines, make_scripted_config, make_scripted_runner, make_specs


def test_queries_stay_together_and_loads_even() -> None:
    ids = [f"q{i}" for i in range(40) for _ in range(8)]
    chosen = assign_workers(ids, 4)
    assert max(Counter(chosen).values()) <= 1.1 * len(ids) / 4 + 1
    homes = {query: {worker for other, worker in zip(ids, chosen, strict=True) if other == query} for query in ids}
    assert sum(len(workers) == 1 for workers in homes.values()) >= 36
    assert assign_workers(ids[:80], 4) == chosen[:80] or max(Counter(chosen[:80]).values()) > 22
    assert set(assign_workers(["one"] * 100, 4)) == {0, 1, 2, 3}  # even one query alone is spread


@pytest.fixture(scope="module")
def pool(local_ray: None) -> Iterator[RolloutPool]:
    config = make_scripted_config(delay_s=0.02)
    pool = RolloutPool.start(config, make_scripted_runner)
    yield pool
    pool.stop()


def plain(results: list[Any]) -> list[Any]:
    return [dataclasses.asdict(result) for result in results]


@pytest.mark.slow
def test_the_same_as_in_one_process(pool: RolloutPool) -> None:
    specs = make_specs(12) + make_specs(12, "fixed:0")
    told: list[tuple[int, int]] = []
    results = pool.run(specs, progress=lambda done, total: told.append((done, total)))
    assert [result.id for result in results] == [spec.id for spec in specs]
    assert plain(results) == plain(run_specs(make_scripted_runner(make_scripted_config()), specs))
    assert told[-1] == (24, 24)
    assert pool.run([]) == []
    assert plain(dataclasses.replace(pool, chunk=1).run(specs)) == plain(results)


@pytest.mark.slow
def test_episodes_of_slow_engines_come_and_go_one_by_one(local_ray: None) -> None:
    config = make_scripted_config()
    config.pool.models[1].engine = "vllm"  # the scripted runner has no use for it
    slow = RolloutPool.start(config, make_scripted_runner)
    slow.stop()
    assert slow.chunk == 1


@pytest.mark.slow
def test_an_unknown_strategy_is_the_callers_fault(pool: RolloutPool) -> None:
    with pytest.raises(ConfigError, match="randon"):
        pool.run(make_specs(2, "randon:0.5"))


def biased_state(config: Config, model: int) -> dict[str, torch.Tensor]:
    """Weights of a router that always takes one model."""
    state = make_router(config.router, 2).state_dict()
    state["head.2.weight"].zero_()
    state["head.2.bias"].copy_(torch.tensor([100.0, 0.0] if model == 0 else [0.0, 100.0]))
    return state


@pytest.mark.slow
def test_workers_pull_the_version_asked_for(pool: RolloutPool) -> None:
    config = make_scripted_config()
    specs = make_specs(6, "router")
    pool.publish(biased_state(config, 0), 4)
    pool.publish(biased_state(config, 1), 5)
    for version, model in ((5, 1), (4, 0), (None, 1)):
        decisions = [step.decision for result in pool.run(specs, version) for step in result.steps]
        assert {(d.model, d.version) for d in decisions} == {(model, version or 5)}
    with pytest.raises(ConfigError, match=r"version 3 are not on the board.*\[4, 5\]"):
        pool.run(specs, 3)
    with ThreadPoolExecutor(2) as threads:  # two versions at once
        runs = [threads.submit(pool.run, specs * 4, version) for version in (4, 5) for _ in range(3)]
        found = [{step.decision.version for result in run.result() for step in result.steps} for run in runs]
    assert found == [{4}] * 3 + [{5}] * 3
    pool.publish(biased_state(config, 0), 5)  # the same number again, as after a learner's restart
    assert {step.model for result in pool.run(specs, 5) for step in result.steps} == {0}


def wait_for_restart(worker: Any, old_pid: int, timeout_s: float) -> int:
    """The pid of the worker's new process; a call that meets the dying one fails and is asked again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            pid = wait_for(worker.ready.remote(), "restarted worker", timeout_s).pid
        except RayError:
            pid = old_pid
        if pid != old_pid or time.monotonic() > deadline:
            return pid
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_workers_lose_and_double_nothing(pool: RolloutPool) -> None:
    specs = [spec for seed in range(20) for spec in _reseed(make_specs(12, "router"), seed)]
    pool.publish(biased_state(make_scripted_config(), 1), 9)
    expected = plain(pool.run(specs))
    victim = pool.workers[0]
    pid = find_actor(victim)["Pid"]
    killer = threading.Timer(0.15, lambda: os.kill(pid, signal.SIGKILL))
    killer.start()
    assert plain(pool.run(specs)) == expected
    assert len({spec.id for spec in specs}) == len(specs)
    killer.join()
    assert wait_for_restart(victim, pid, 30) != pid
    assert plain(pool.run(specs[:24])) == expected[:24]  # with the weights pulled again


def _reseed(specs: list[Any], seed: int) -> list[Any]:
    return [dataclasses.replace(spec, id=f"{spec.id}/{seed}", seed=seed) for spec in specs]


def make_deadly_runner(config: Config, engines: Any) -> Any:
    small, _ = make_engines()
    return make_scripted_runner(config, [small, ScriptedEngine("large", fails=exit_worker)])


def make_hanging_runner(config: Config, engines: Any) -> Any:
    small, _ = make_engines()
    return make_scripted_runner(config, [small, ScriptedEngine("large", hangs=lambda prefix: True)])


@pytest.mark.slow
def test_an_episode_that_kills_its_workers_is_given_up(local_ray: None) -> None:
    config = make_scripted_config()
    config.faults.worker_attempts = 2
    pool = RolloutPool.start(config, make_deadly_runner)
    try:
        with pytest.raises(EngineError, match=r"of query scripted/0.*died 2 times"):
            pool.run(make_specs(1, "fixed:1"))
    finally:
        pool.stop()


@pytest.mark.slow
def test_an_episode_that_hangs(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_scripted_config()
    config.episode.timeout_s = 1.0
    config.ray.workers = 1
    pool = RolloutPool.start(config, make_hanging_runner)
    try:
        results = pool.run([*make_specs(1, "fixed:1"), *make_specs(1, "fixed:0")])
        assert isinstance(results[0], EpisodeFailure) and "timeout_s" in results[0].error
        assert isinstance(results[1], Trajectory)
        monkeypatch.setattr("actors.dispatch._GRACE_S", 0.0)
        with pytest.raises(DeadlineError, match=r"0 of 1 done.*RolloutWorker .*ALIVE"):
            dataclasses.replace(pool, timeout_s=0.2).run(make_specs(1, "fixed:1"))
        pool.stop()
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"no rollout worker is left.*DEAD"):
            pool.run(make_specs(1, "fixed:0"))
        assert time.monotonic() - started < 10
    finally:
        for worker in pool.workers:
            ray.kill(worker)


@pytest.mark.slow
def test_too_many_workers(local_ray: None) -> None:
    config = make_scripted_config()
    config.ray.workers = 1000
    refusal = r"the rollout pool can never start: it asks for 1000 parts of .*CPU 0\.5.* each, and at most"
    with pytest.raises(ResourceError, match=refusal):
        RolloutPool.start(config, make_scripted_runner)


class CountingActor(EngineActor):
    """An EngineActor that tells the sizes of its calls."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.sizes: list[int] = []

    async def serve(self, items: Any, parcels: Any = ()) -> list[Any]:
        self.sizes.append(len(items))
        return await super().serve(items, parcels)

    async def get_sizes(self) -> list[int]:
        return self.sizes


def make_failing_engine() -> ScriptedEngine:
    return ScriptedEngine("remote", fails=lambda prefix: "bad" in prefix, delay_s=0.01)


@pytest.mark.slow
def test_remote_requests_share_calls(local_ray: None) -> None:
    actor = ray.remote(CountingActor).options(num_cpus=0).remote(make_failing_engine)
    engine = RemoteEngine("remote", actor, 30.0)

    async def main() -> list[Any]:
        assert (await engine.ready()).name == "remote"
        requests = [StepRequest(f"{'bad' if i == 7 else 'good'} {i}\n\n", 20) for i in range(50)]
        calls = [engine.generate_step(request) for request in requests]
        return await asyncio.gather(*calls, engine.score_choices("good\n\n", ("a", "b")), return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results[7], EngineError) and "told to fail" in str(results[7])
    assert all(result.text == "A: note 0" for i, result in enumerate(results[:50]) if i != 7)
    assert len(results[50].log_probs) == 2
    assert sum(wait_for(actor.get_sizes.remote(), "sizes", 20)) == 51
    assert len(wait_for(actor.get_sizes.remote(), "sizes", 20)) <= 2
    ray.kill(actor)


def make_hanging_engine() -> ScriptedEngine:
    return ScriptedEngine("remote", hangs=lambda prefix: "long" in prefix, fails=lambda prefix: "bad" in prefix)


@pytest.mark.slow
@pytest.mark.parametrize("gathers", [True, False])
def test_a_long_step_holds_others_back_only_where_they_share_a_call(local_ray: None, gathers: bool) -> None:
    actor = ray.remote(CountingActor).options(num_cpus=0).remote(make_hanging_engine)
    engine = pickle.loads(pickle.dumps(RemoteEngine("remote", actor, 30.0, gathers)))

    async def main() -> list[Any]:
        await engine.ready()
        prefixes = ["long", "bad", *(f"good {i}" for i in range(8))]
        tasks = [asyncio.create_task(engine.generate_step(StepRequest(f"{p}\n\n", 20))) for p in prefixes]
        done, _ = await asyncio.wait(tasks[1:], timeout=3.0 if gathers else 20.0)
        tasks[0].cancel()
        return [task.exception() or task.result() if task in done else None for task in tasks[1:]]

    bad, *good = asyncio.run(main())
    if gathers:
        assert bad is None and set(good) == {None}
    else:
        assert "told to fail" in str(bad) and all(result.text == "A: note 0" for result in good)
        assert wait_for(actor.get_sizes.remote(), "sizes", 20) == [1] * 10
    ray.kill(actor)


def make_remote_runner(config: Config, engines: Any) -> Any:
    assert all(isinstance(engine, ReplicaEngine) for engine in engines) and len(engines) == 2
    return make_scripted_runner(config, engines)


@pytest.mark.slow
def test_engines_in_actors_give_the_same(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.rollout.start_engines", lambda config: start_engines(config, make_scripted_engine))
    config = make_scripted_config()
    config.pool.placement = "actors"
    config.ray.workers, config.ray.engine_cpus = 2, 0.1
    pool = RolloutPool.start(config, make_remote_runner)
    try:
        specs = make_specs(12)
        expected = plain(run_specs(make_scripted_runner(make_scripted_config()), specs))
        assert plain(pool.run(specs)) == expected
        actor = next(iter(pool.engines[0].replicas.values())).actor
        os.kill(find_actor(actor)["Pid"], signal.SIGKILL)
        assert plain(pool.run(specs)) == expected
        facts = pool.fleet_facts()
        assert {name: (fact["now"], fact["starts"]) for name, fact in facts.items()} == {
            "small": (1, 1),
            "large": (1, 1),
        }
    finally:
        pool.stop()


def make_scripted_engine(model: Any, pool: Any) -> ScriptedEngine:
    return next(engine for engine in make_engines() if engine.name == model.name)


@pytest.mark.slow
def test_the_worlds_models_in_actors(local_ray: None) -> None:
    from roro_ray.routing.episode import EpisodeSpec
    from roro_ray.world.tasks import make_queries

    config = Config()
    config.pool.placement = "actors"
    config.ray.workers, config.ray.engine_cpus = 1, 0.5
    config.router.encoder = ""
    specs = [EpisodeSpec(q.id, q, "random:0.5", seed=1) for q in make_queries("chain", "test", 6, 0)]
    pool = RolloutPool.start(config)
    try:
        results = pool.run(specs)
        assert [fact.name for fact in pool.facts[0].engines] == ["small", "large"]
    finally:
        pool.stop()
    texts = [[step.text for step in result.steps] for result in results]
    alone = run_specs(make_runner(config, ()), specs)
    assert texts == [[step.text for step in result.steps] for result in alone]
