"""The bench of asynchrony measures what it says, in its smallest form and without Ray. No time is asserted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bench import _lag_speed
from bench._lag_quality import Arm, measure_quality
from bench._lag_speed import PacedEngine, Site, model_seconds, time_arm
from bench.asynchrony import make_quality_config
from roro_ray.engines.protocol import StepRequest
from roro_ray.types import Verdict
from tests.fakes import ScriptedEngine
from tests.scripted_world import make_scripted_config, make_scripted_queries, make_scripted_runner


def test_a_paced_engine_writes_the_same_and_takes_the_time_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    inner = ScriptedEngine("small")
    request = StepRequest("Say q.\n\n", 40)
    whole = asyncio.run(inner.generate_step(request))
    monkeypatch.setattr(_lag_speed.asyncio, "sleep", sleep)
    assert asyncio.run(PacedEngine(inner, 0.5).generate_step(request)) == whole
    assert slept[-1] == 0.5 * len(whole.token_ids)
    kept = StepRequest("Say q.\n\n", 40, kept_ids=whole.token_ids[:3])
    assert asyncio.run(PacedEngine(inner, 0.5).generate_step(kept)) == whole
    assert slept[-1] == 0.5 * (len(whole.token_ids) - 3)


def test_an_arm_trains_under_its_lag_and_its_own_name() -> None:
    config = make_scripted_config()
    config.router.iterations, config.router.beta = 4, 0.3
    runner, states, asked = make_scripted_runner(config), {}, []

    def run(specs: Any, version: int, name: str) -> list[Any]:
        asked.append((int(specs[0].id.split("-")[2]), version, name))
        own = runner.copy()
        own.load_router(states[name, version], version)
        return list(asyncio.run(own.run(specs)))

    def publish(state: Any, version: int, name: str, keep: int) -> None:
        states[name, version] = {key: tensor.clone() for key, tensor in state.items()}

    def score(queries: Any, groups: Any) -> list[tuple[Verdict, ...]]:
        return [tuple(Verdict(0.1 * sum(step.model for step in t.steps)) for t in group) for group in groups]

    row = time_arm(Site(run, publish, score), config, make_scripted_queries(), 2, "two")
    assert sorted(asked) == [(0, 0, "two"), (1, 0, "two"), (2, 0, "two"), (3, 1, "two")]
    assert row["seconds"] > 0 and row["learn"] > 0 and 0 <= row["overlap"] <= 1


def test_the_model_of_the_pipeline_by_hand() -> None:
    assert model_seconds(0, 5, 3.0, 1.0, 2.0) == 6.0
    # A lag of 1: batches 0 and 1 begin at 0, batch 2 with version 1 at 6, batch 3 with version 2 at 8.
    ready = [6.0, 8.0, 12.0, 14.0]
    assert [n * model_seconds(1, n, 3.0, 1.0, 2.0) for n in (1, 2, 3, 4)] == pytest.approx(ready)
    assert model_seconds(50, 1000, 3.0, 1.0, 2.0) == pytest.approx(2.0, abs=0.01)  # the learner never waits
    assert model_seconds(50, 1000, 3.0, 4.0, 2.0) == pytest.approx(4.0, abs=0.01)  # the Judge is the slowest


def test_quality_in_its_smallest_form() -> None:
    found = measure_quality(make_quality_config(quick=True), [Arm(0), Arm(1), Arm(1, "decoupled")], range(1))
    assert list(found) == ["0", "1 ppo", "1 decoupled"]
    base = found["0"]
    assert base["gain_difference"] == base["accuracy_difference"] == base["lag_kl_most"] == 0
    for row in found.values():
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["large_share"] <= 1 and row["gain"] <= row["accuracy"] + 1
        assert row["gain_interval"][0] <= row["gain_difference"] <= row["gain_interval"][1]
    assert found["1 ppo"]["lag_kl_most"] > 0
