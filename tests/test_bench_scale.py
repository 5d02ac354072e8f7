"""The bench of scale: its latency model, its simulated engines, and a run of each part that stays in one process."""

from __future__ import annotations

import asyncio
import json

import pytest

from bench import scale
from bench._latency import LatencyModel, Shape, SimulatedEngine, measure_latency
from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import StepRequest
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.runner import Runner
from roro_ray.types import Trajectory
from tests.fakes import ScriptedEngine, make_query

LATENCY = LatencyModel((1, 8, 32), (0.001, 0.002, 0.008), 0.0001)


def test_the_latency_model_lies_on_its_points_and_on_lines_between() -> None:
    assert LATENCY.seconds(0, 10, 1) == pytest.approx(0.01)
    assert LATENCY.seconds(0, 10, 20) == pytest.approx(0.05)
    assert LATENCY.seconds(100, 10, 64) == pytest.approx(0.01 + 0.08), "beyond the last point: the last point"
    assert LATENCY.stretch(3).seconds(100, 10, 20) == pytest.approx(3 * LATENCY.seconds(100, 10, 20))


async def test_latency_is_measured_by_asking_the_engine() -> None:
    engine = ScriptedEngine("slow", lambda prefix: "x" * 40, delay_s=0.001)
    found = await measure_latency(engine, ["a query"], batches=(1, 2), tokens=4, rounds=1)
    # One warm-up of 2 requests, 2 of the reading, and (1 + 2) requests of 4 tokens and of 1 token.
    assert found.in_hand == (1, 2) and len(engine.requests) == 2 + 2 + 2 * (1 + 2)
    assert all(value >= 0 for value in (*found.write_s, found.read_s))
    assert len({request.prefix for request in engine.requests}) == len(engine.requests), "no prompt twice"


async def test_a_simulated_replica_writes_so_many_at_once_and_knows_what_it_wrote() -> None:
    engine = SimulatedEngine("small", LATENCY.stretch(0.1), Shape(3, 20), slots=2)
    prefix = "q" * 400 + STEP_DELIMITER
    first, *_ = await asyncio.gather(*(engine.generate_step(StepRequest(prefix, 100)) for _ in range(5)))
    assert engine.in_hand == 0 and engine.written == 5 and engine.busy_s > 0
    assert 10 <= len(first.token_ids) <= 30 and first.finish == "delimiter"
    second = await engine.generate_step(StepRequest(prefix + first.text + STEP_DELIMITER, 100))
    assert (first.cached_tokens, second.cached_tokens) == (0, first.prefix_tokens)
    third = await engine.generate_step(StepRequest(prefix + 2 * (first.text + STEP_DELIMITER), 100))
    assert third.finish == "stop" and third.text == "Answer: 2"


async def test_episodes_of_simulated_engines_have_the_steps_that_were_asked_for() -> None:
    shape = Shape(4, 10)
    pool = EnginePool([SimulatedEngine(name, LATENCY.stretch(0.01), shape, 4) for name in ("small", "large")])
    runner = Runner(pool, None, EpisodeConfig(max_steps=4, max_step_tokens=20), 8)
    specs = [EpisodeSpec(f"{i}", make_query(name=f"{i}"), "random:0.5", i) for i in range(12)]
    for result in await runner.run(specs):
        assert isinstance(result, Trajectory) and len(result.steps) == 4 and result.end == "answer"


def test_the_parts_of_one_process_tell_their_figures(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--parts episodes replicas --replicas 1 2 --episodes 4 --slots 2 --steps 2 --step-tokens 10 --step-s 0.1"
    scale.main([*words.split(), "--ramp", "0.3", "--window", "0.7"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [(each["part"], each["episodes"], each["replicas"]) for each in found] == [
        ("episodes", 4, 2),
        ("replicas", 2, 1),
        ("replicas", 5, 2),
    ]
    assert found[1]["efficiency"] == 1, "one replica is the measure of the others"
    for each in found:
        assert each["steps_s"] > 0 and each["cpu_ms_step"] > 0
        assert each["efficiency"] == pytest.approx(each["steps_s"] / each["ideal_steps_s"], abs=2e-3)
    assert json.loads(lines[0])["latency"]["pace"] > 0
