"""LoRA adapters in engine `hf`: what the library computes with them, kept apart from each other, swapped by version."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from roro_ray.engines.hf import HfEngine
from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult
from roro_ray.errors import EngineError

pytestmark = pytest.mark.timeout(60)
ModelMaker = Callable[..., Path]
PREFIXES = ("Start with 12. ", "1 + 1 = ", "Let $x$ be", "Okay, so")


@pytest.fixture(scope="module")
def adapters(tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as peft saves them: two of the small model, a newer one of the first, one of another model."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for index, (name, settings) in enumerate(
        {
            "judge": {},
            "judge-2": {},
            "rubricor": {},
            "foreign": {"hidden": 128},
            "experts": {"family": "qwen3_moe"},
        }.items()
    ):
        torch.manual_seed(index)
        model = AutoModelForCausalLM.from_pretrained(tiny_model(**settings))
        target: Any = ["q_proj", "v_proj"] if name == "rubricor" else "all-linear"
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=target, init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(root / name)
        made[name] = root / name
    return made


def make_engine(path: Path, **settings: Any) -> HfEngine:
    engine = HfEngine("tested", str(path), **{"memo_entries": 0, "adapters": 2, **settings})
    asyncio.run(engine.ready())
    return engine


def load(engine: HfEngine, name: str, path: Path, version: int = 0) -> None:
    asyncio.run(engine.load_adapter(name, str(path), version))


def generate(engine: HfEngine, requests: Sequence[StepRequest]) -> list[StepResult]:
    async def run() -> list[StepResult]:
        return await asyncio.gather(*(engine.generate_step(request) for request in requests))

    return asyncio.run(run())


def decode(model: Any, tokenizer: Any, prefix: str, count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, each from a pass over the whole text."""
    ids, logs = tokenizer(prefix).input_ids, []
    start = len(ids)
    with torch.inference_mode():
        for _ in range(count):
            log, token = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).max(-1)
            ids.append(int(token))
            logs.append(log.item())
    return ids[start:], logs


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_steps_and_scores_are_those_of_the_library(
    family: str, tiny_model: ModelMaker, adapters: dict[str, Path]
) -> None:
    path = adapters["judge" if family == "qwen3" else "experts"]
    engine, tokenizer = make_engine(tiny_model(family)), AutoTokenizer.from_pretrained(tiny_model(family))
    load(engine, "judge", path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    for name in ("", "judge"):
        model = PeftModel.from_pretrained(base, path).eval() if name else base.eval()
        requests = [StepRequest(prefix, 8, delimiter="", adapter=name) for prefix in PREFIXES]
        for prefix, result in zip(PREFIXES, generate(engine, requests), strict=True):
            ids, logs = decode(model, tokenizer, prefix, len(result.token_ids))
            assert result.token_ids == tuple(ids)
            assert result.log_probs == pytest.approx(logs, abs=1e-4)
        prefix_ids, choice_ids = (tokenizer.encode(text) for text in ("1 + 1 =", " 2"))
        with torch.inference_mode():
            logits = model(torch.tensor([[*prefix_ids, *choice_ids]])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prefix_ids) - 1 + i, token].item() for i, token in enumerate(choice_ids))
        scores = asyncio.run(engine.score_choices("1 + 1 =", (" 2",), name))
        assert scores.log_probs[0] == pytest.approx(expected, abs=1e-4)


def test_adapters_base_and_versions_do_not_mix(tiny_model: ModelMaker, adapters: dict[str, Path]) -> None:
    names = ("", "judge", "rubricor")
    requests = [
        StepRequest(prefix, 12, temperature, seed, delimiter="", adapter=name)
        for prefix in PREFIXES
        for name in names
        for temperature, seed in ((0.0, 0), (1.0, 1))
    ]
    alone = make_engine(tiny_model(), cache_mb=0)
    together = make_engine(tiny_model(), memo_entries=1000)
    for engine in (alone, together):
        load(engine, "judge", adapters["judge"])
        load(engine, "rubricor", adapters["rubricor"])
    expected = {request: generate(alone, [request])[0] for request in requests}
    for seed in range(3):
        order = random.Random(seed).sample(requests, len(requests))
        for request, got in zip(order, generate(together, order), strict=True):
            assert got.token_ids == expected[request].token_ids
            assert got.log_probs == pytest.approx(expected[request].log_probs, abs=1e-4)
    assert together.stats.tokens_reused > 0 and together.stats.memo_hits > 0
    by_name = {name: [expected[r].token_ids for r in requests if r.adapter == name] for name in names}
    assert by_name[""] != by_name["judge"] != by_name["rubricor"] != by_name[""]


def test_a_newer_version_replaces_an_older_one_and_what_is_remembered_of_it(
    tiny_model: ModelMaker, adapters: dict[str, Path]
) -> None:
    engine = make_engine(tiny_model(), memo_entries=1000)
    requests = [StepRequest(prefix, 12, delimiter="", adapter="judge") for prefix in PREFIXES]
    results = {}
    for version, name in enumerate(("judge", "judge-2", "judge")):
        load(engine, "judge", adapters[name], version)
        hits = engine.stats.memo_hits
        results[version] = generate(engine, requests)
        scored = [asyncio.run(engine.score_choices("1 + 1 = ", ("2",), "judge")) for _ in range(2)]
        assert engine.stats.memo_hits == hits + 1, "only the second time it is scored"
        assert scored[0] == scored[1]
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in results[2]]
    assert [r.token_ids for r in results[0]] != [r.token_ids for r in results[1]]
    names = {name.split(".")[-2] for name, _ in engine._decoder._model.named_parameters() if "lora" in name}
    assert len(names) == 1, "older versions are gone"


def test_the_same_version_again_costs_nothing(
    tiny_model: ModelMaker, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = make_engine(tiny_model())
    path = Path(shutil.copytree(adapters["judge"], tmp_path / "judge"))
    load(engine, "judge", path, 3)
    shutil.rmtree(path)
    load(engine, "judge", path, 3)
    with pytest.raises(EngineError, match="lacks adapter_config"):
        load(engine, "judge", path, 4)
    assert generate(engine, [StepRequest("1 + 1", 4, adapter="judge")])


async def test_a_request_under_way_ends_with_the_version_that_it_began_with(
    tiny_model: ModelMaker, adapters: dict[str, Path]
) -> None:
    engine = HfEngine("tested", str(tiny_model()), memo_entries=0, adapters=1)
    await engine.load_adapter("judge", str(adapters["judge"]), 0)
    for seed in range(5, 30):  # an answer that takes a while, whatever the adapter's weights are
        request = StepRequest("Okay, so", 200, temperature=1.0, seed=seed, delimiter="", adapter="judge")
        old = await engine.generate_step(request)
        if len(old.token_ids) > 50:
            break
    stream = engine.stream_step(request)
    assert isinstance(await anext(stream), StepDelta)
    later = asyncio.create_task(engine.load_adapter("judge", str(adapters["judge-2"]), 1))
    queued = asyncio.create_task(engine.generate_step(request))  # before the newer version is there
    last = [part async for part in stream][-1]
    assert isinstance(last, StepResult) and last.token_ids == old.token_ids
    await later
    assert (await queued).token_ids == old.token_ids
    assert (await engine.generate_step(request)).token_ids != old.token_ids
    assert all(not adapter.holders for adapter in engine._adapters._loaded.values())


async def test_requests_given_up_hold_no_version(tiny_model: ModelMaker, adapters: dict[str, Path]) -> None:
    engine = HfEngine("tested", str(tiny_model()), memo_entries=0, adapters=1)
    await engine.load_adapter("judge", str(adapters["judge"]), 0)
    request = StepRequest("Okay, so", 500, temperature=1.0, delimiter="", adapter="judge")
    task = asyncio.create_task(engine.generate_step(request))
    stream = engine.stream_step(request)
    await anext(stream)
    task.cancel()
    await stream.aclose()
    await asyncio.gather(task, return_exceptions=True)
    assert all(not adapter.holders for adapter in engine._adapters._loaded.values())
    await engine.load_adapter("judge", str(adapters["judge-2"]), 1)
    assert (await engine.score_choices("1 + 1", ("2",), "judge")).tokens == (1,)


def test_half_precision_models_take_adapters(tiny_model: ModelMaker, adapters: dict[str, Path]) -> None:
    engine = make_engine(tiny_model(), dtype="bfloat16")
    load(engine, "judge", adapters["judge"])
    base, adapted = generate(engine, [StepRequest("1 + 1", 8, delimiter="", adapter=name) for name in ("", "judge")])
    assert base.log_probs != adapted.log_probs
    kinds = {(part.dtype, part.device.type) for part in engine._decoder._model.parameters()}
    assert kinds == {(torch.bfloat16, "cpu")}


def test_what_is_no_adapter_of_this_model_is_told(
    tiny_model: ModelMaker, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = make_engine(tiny_model())
    load(engine, "judge", adapters["judge"])
    request = StepRequest("1 + 1", 8, adapter="judge")
    before = generate(engine, [request])
    broken = Path(shutil.copytree(adapters["judge"], tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"not this")
    bare = Path(shutil.copytree(adapters["judge"], tmp_path / "bare"))
    (bare / "adapter_model.safetensors").unlink()
    (bare / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    narrow = Path(shutil.copytree(adapters["rubricor"], tmp_path / "narrow"))
    config = json.loads((narrow / "adapter_config.json").read_text())
    (narrow / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "k_proj"]}))
    for path, message in (
        (tmp_path / "nowhere", "lacks adapter_config.json"),
        (bare, "lacks adapter_model.safetensors"),
        (broken, "does not fit the model"),
        (adapters["foreign"], "does not fit the model"),
        (narrow, "trained on another model or is incomplete"),
    ):
        with pytest.raises(EngineError, match=message):
            load(engine, "rubricor", path)
        with pytest.raises(EngineError, match="no adapter 'rubricor' is loaded"):
            generate(engine, [StepRequest("1 + 1", 8, adapter="rubricor")])
    load(engine, "rubricor", adapters["rubricor"])
    with pytest.raises(EngineError, match="at most 2"):
        load(engine, "third", adapters["judge-2"])
    with pytest.raises(EngineError, match="did you mean 'judge'"):
        asyncio.run(engine.score_choices("1 + 1", ("2",), "jugde"))
    assert [result.token_ids for result in generate(engine, [request])] == [before[0].token_ids]
    with pytest.raises(EngineError, match="adapters"):
        load(make_engine(tiny_model(), adapters=0), "judge", adapters["judge"])
