"""The pool: which configurations it takes, and what it tells of its models."""

from __future__ import annotations

import asyncio

import pytest

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.pool import EnginePool, make_pool
from roro_ray.errors import ConfigError, EngineError
from tests.fakes import ScriptedEngine

pytestmark = pytest.mark.timeout(60)


def make_config(*models: ModelConfig) -> PoolConfig:
    return PoolConfig(models=list(models))


def test_a_pool_needs_two_models() -> None:
    with pytest.raises(ConfigError, match=r"pool of 1 models \(lonely\).*at least 2"):
        make_pool(make_config(ModelConfig("lonely")))
    with pytest.raises(ConfigError, match="pool of 0 models"):
        EnginePool([])


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="named 'small'"):
        make_pool(make_config(ModelConfig("small"), ModelConfig("small")))


def test_an_unknown_engine_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown engine 'hff' of model 'b'.*did you mean 'hf'"):
        make_pool(make_config(ModelConfig("a"), ModelConfig("b", engine="hff")))


def test_the_order_is_that_of_the_configuration_and_facts_come_with_ready() -> None:
    pool = make_pool(make_config(ModelConfig("a", "world:small"), ModelConfig("b", "world:cross")))
    assert (pool.size, pool.names) == (2, ("a", "b"))
    with pytest.raises(RuntimeError, match="ready"):
        _ = pool.facts
    facts = asyncio.run(pool.ready())
    assert facts == pool.facts == asyncio.run(pool.ready())
    assert [fact.name for fact in facts] == ["a", "b"]
    assert [fact.model for fact in facts] == ["world:small", "world:cross"]
    assert all(fact.parameters > 0 for fact in facts)


def test_models_loaded_at_once_are_those_loaded_one_by_one() -> None:
    async def together() -> list[float]:
        names = ["a", "b", "c", "d"]
        pool = make_pool(make_config(*(ModelConfig(name, f"world:{w}") for name, w in zip(names, WORLD, strict=True))))
        await pool.ready()
        return [(await engine.score_choices("Start with 10. A: ", ("double",))).log_probs[0] for engine in pool.engines]

    async def alone() -> list[float]:
        pools = [make_pool(make_config(ModelConfig("x", f"world:{w}"), ModelConfig("y"))) for w in WORLD]
        return [(await p.engines[0].score_choices("Start with 10. A: ", ("double",))).log_probs[0] for p in pools]

    assert asyncio.run(together()) == pytest.approx(asyncio.run(alone()), abs=1e-4)


WORLD = ("small", "cross", "small", "cross")


def test_a_model_that_does_not_load_fails_the_pool(tmp_path: object) -> None:
    pool = make_pool(make_config(ModelConfig("a"), ModelConfig("b", f"{tmp_path}/nowhere")))
    with pytest.raises(EngineError, match="nowhere"):
        asyncio.run(pool.ready())


def test_any_engine_of_the_protocol_can_join() -> None:
    pool = EnginePool([ScriptedEngine("one"), ScriptedEngine("two"), ScriptedEngine("three")])
    assert [fact.name for fact in asyncio.run(pool.ready())] == ["one", "two", "three"]
