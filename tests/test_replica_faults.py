"""Replicas in real processes that are killed and stopped under load: each answer comes once, as in the straight run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from actors.engines import ActorReplica, EngineActor
from actors.fleet import Fleet, start_engines
from actors.waiting import find_actor
from roro_ray.config import Config, ModelConfig, PoolConfig
from roro_ray.engines.protocol import StepRequest
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.engines.replicas import FleetOptions
from roro_ray.errors import EngineUnavailableError
from tests.fakes import ScriptedEngine
from tests.scripted_world import exit_worker, make_engines, make_scripted_config

pytestmark = pytest.mark.slow


def make_slow_model(model: ModelConfig, pool: PoolConfig) -> ScriptedEngine:
    return next(engine for engine in make_engines(0.05) if engine.name == model.name)


def make_config(engine: str) -> Config:
    config = make_scripted_config()
    config.pool.placement, config.pool.models[1].engine = "actors", engine  # vllm: a call for each request
    config.ray.engine_cpus, config.ray.replicas = 0.1, {"small": [1, 1], "large": [3, 3]}
    config.ray.step_timeout_s, config.episode.timeout_s = 3.0, 100.0
    return config


async def run_trajectories(engine: ReplicaEngine, count: int, steps: int) -> list[list[tuple[str, float]]]:
    """Text and confidence of each step (a scripted engine's token ids depend on what its process wrote before)."""

    async def run(number: int) -> list[tuple[str, float]]:
        prefix, steps_done = f"Task {number}.\n\n", []
        for _ in range(steps):
            result = await engine.generate_step(StepRequest(prefix, 30))
            steps_done.append((result.text, result.log_probs[0]))
            prefix += result.text + "\n\n"
        return steps_done

    return list(await asyncio.gather(*(run(number) for number in range(count))))


def find_pids(engine: ReplicaEngine) -> list[int]:
    return [find_actor(replica.actor)["Pid"] for replica in engine.replicas.values()]  # type: ignore[attr-defined]


def wait_for_facts(fleet: Fleet, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Facts of the large model, once they meet a condition; a test has a deadline."""
    while not condition(facts := fleet.facts()["large"]):
        time.sleep(0.2)
    return facts


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_one_is_killed_and_one_stopped_under_load(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr("actors.engines._PULSE_S", 3.0)
    fleet = start_engines(make_config(engine), make_slow_model)
    large = fleet.engines[1]
    stopped: list[int] = []

    async def main() -> Any:
        assert (await large.ready()).name == "large"
        calm = await run_trajectories(large, 30, 4)
        loop, pids = asyncio.get_running_loop(), find_pids(large)
        stopped.append(pids[1])
        loop.call_later(0.1, os.kill, pids[0], signal.SIGKILL)
        loop.call_later(0.2, os.kill, pids[1], signal.SIGSTOP)
        disturbed = await run_trajectories(large, 30, 4)
        # Requests are what finds a hung replica, and sees to it that it comes back.
        while (facts := fleet.facts()["large"])["restarts"] < 2 or facts["now"] < 3:
            again = await run_trajectories(large, 30, 4)
            assert again == calm
        return calm, disturbed, facts

    try:
        calm, disturbed, facts = asyncio.run(main())
        assert calm == disturbed
        assert all(steps[-1][0] == "Answer: 42" for steps in calm)
        assert facts["wanted"] == facts["starts"] == 3 and large.counts.hangs >= 1 and large.counts.retried > 0
    finally:
        fleet.stop()
        for pid in stopped:  # a test that fails leaves no stopped process behind
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


class HangingOnceEngine(ScriptedEngine):
    """Hangs on every request until its process has been started a second time."""

    def __init__(self, marker: str) -> None:
        super().__init__("remote", hangs=lambda prefix: self.is_first)
        self.is_first = not os.path.exists(marker)
        with open(marker, "w"):
            pass


def test_the_only_replica_hangs_though_its_process_answers(local_ray: None, tmp_path: Any) -> None:
    actor = ray.remote(EngineActor).options(num_cpus=0.1, max_restarts=-1, max_task_retries=0)
    handle = actor.remote(lambda: HangingOnceEngine(str(tmp_path / "started")))
    options = FleetOptions(timeout_s=100.0, step_timeout_s=3.0, load_timeout_s=100.0)
    engine = ReplicaEngine("remote", {"remote": ActorReplica("remote", handle, 100.0)}, options)

    async def main() -> Any:
        await engine.ready()
        return await asyncio.gather(*(engine.generate_step(StepRequest(f"Q {i}\n\n", 20)) for i in range(20)))

    try:
        assert [result.text for result in asyncio.run(main())] == ["A: note 0"] * 20
        assert find_actor(handle)["NumRestarts"] == 1 and engine.counts.hangs == 1
    finally:
        ray.kill(handle)


def make_deadly_model(model: ModelConfig, pool: PoolConfig) -> ScriptedEngine:
    return ScriptedEngine(model.name, fails=lambda prefix: "deadly" in prefix and exit_worker(prefix))


def test_a_request_that_ends_its_replicas_is_given_up(local_ray: None) -> None:
    config = make_config("vllm")
    config.ray.replicas = {"large": [2, 2]}
    fleet = start_engines(config, make_deadly_model)
    large = fleet.engines[1]

    async def main() -> list[Any]:
        await large.ready()
        prefixes = ["deadly\n\n", *(f"fine {i}\n\n" for i in range(20))]
        calls = (large.generate_step(StepRequest(prefix, 20)) for prefix in prefixes)
        return await asyncio.gather(*calls, return_exceptions=True)

    try:
        deadly, *fine = asyncio.run(main())
        assert isinstance(deadly, EngineUnavailableError) and "4 replicas in turn were lost" in str(deadly)
        assert [result.text for result in fine] == ["A: note 0"] * 20
        wait_for_facts(fleet, lambda facts: facts["restarts"] >= 4)
    finally:
        fleet.stop()


def test_the_boards_process_is_no_loss(local_ray: None) -> None:
    config = make_config("vllm")
    config.ray.replicas, config.ray.replica_target = {"large": [0, 2]}, 4.0
    fleet = start_engines(config, make_slow_model)
    large = fleet.engines[1]

    async def main() -> Any:
        await large.ready()
        os.kill(find_actor(fleet._board)["Pid"], signal.SIGKILL)
        while len(large.replicas) < 2:  # which is asked for, and told of, through the new board
            assert all(len(steps) == 5 for steps in await run_trajectories(large, 16, 5))

    try:
        asyncio.run(main())
        assert find_actor(fleet._board)["NumRestarts"] == 1
    finally:
        fleet.stop()
