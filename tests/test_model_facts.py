"""Sizes from config.json alone: the counts of loaded models, a mixture of experts by hand, what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from roro_ray.engines.hf import resolve_model_path
from roro_ray.engines.loading import load_model
from roro_ray.engines.model_facts import count_active_parameters, read_model_facts
from roro_ray.errors import EngineError

ModelMaker = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_config_alone_tells_what_the_loaded_model_is(
    family: str, tied: bool, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    directory = tiny_model(family, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(directory)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    facts = read_model_facts(tmp_path)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.active_parameters == count_active_parameters(model)
    assert (facts.active_parameters < facts.parameters) == (family == "qwen3_moe")
    assert facts.architecture == type(model).__name__
    assert (facts.layers, facts.hidden, facts.max_context, facts.tied) == (2, 64, 4096, tied)
    assert facts.vocabulary == model.config.vocab_size


@pytest.mark.parametrize("family", [*FAMILIES, "world:small", "world:cross"])
def test_states_per_token_are_those_that_the_engine_keeps(family: str, tiny_model: ModelMaker) -> None:
    directory = resolve_model_path(family) if ":" in family else tiny_model(family)
    shape = load_model(str(directory), "cpu", "float32").shape
    facts = read_model_facts(directory / "config.json")
    assert facts.kv_bytes_per_token("float32") == shape.bytes_per_token
    assert 2 * facts.kv_bytes_per_token() == shape.bytes_per_token


MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "num_experts": 10,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "tie_word_embeddings": True,
}


def test_a_mixture_of_experts_by_hand() -> None:
    facts = read_model_facts(MOE)
    attention = 8 * 12 + 2 * (8 * 6) + 12 * 8 + 6 + 6 + 8 + 8  # q, k and v, o, their norms, the layer's norms
    expert, router, dense = 3 * 8 * 4, 10 * 8, 3 * 8 * 32
    rest = 100 * 8 + 3 * attention + 2 * router + dense + 8  # tied embeddings once, and the last norm
    assert facts.parameters == rest + 2 * 10 * expert
    assert facts.active_parameters == rest + 2 * 2 * expert
    assert facts.kv_bytes_per_token("float32") == 3 * 2 * 6 * 4


def test_shared_experts_are_always_active() -> None:
    shared = {**MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 16, "mlp_only_layers": []}
    facts = read_model_facts(shared)
    assert facts.parameters - facts.active_parameters == 3 * 8 * (3 * 8 * 4)


def test_experts_as_separate_modules_count_alike() -> None:
    class Separate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = AutoConfig.for_model(**MOE)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(3, 5, bias=False) for _ in range(10))
            self.gate = torch.nn.Linear(3, 10, bias=False)

    assert count_active_parameters(Separate()) == 2 * 15 + 30


def test_a_quantised_copy_counts_as_the_model_that_it_is_of() -> None:
    assert read_model_facts({**MOE, "quantization_config": {"quant_method": "awq", "bits": 4}}) == read_model_facts(MOE)


def test_sizes_of_billions_are_counted_without_weights() -> None:
    facts = read_model_facts(
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "max_position_embeddings": 40960,
        }
    )
    layer = 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144 + 2 * 128 + 2 * 2048
    assert facts.parameters == facts.active_parameters == 151936 * 2048 + 28 * layer + 2048
    assert facts.kv_bytes_per_token() == 2 * 28 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json"),
        ("{", "describes no model"),
        ("[]", "describes no model"),
        ("{}", "describes no model"),
        ('{"model_type": "no-such-model"}', "describes no model"),
        (json.dumps({"model_type": "vit"}), "'vit' cannot be counted"),
    ],
)
def test_what_cannot_be_read_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineError, match=message):
        read_model_facts(tmp_path)


def test_experts_without_their_number_are_told() -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: Any = AutoConfig.for_model("llama")
            self.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    with pytest.raises(EngineError, match="how many a token chooses"):
        count_active_parameters(Strange())
