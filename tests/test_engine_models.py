"""Which model directories engine `hf` takes, and what it says of those that it does not."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from roro_ray.engines.hf import HfEngine, resolve_model_path
from roro_ray.engines.lean import LeanModel, make_lean
from roro_ray.engines.loading import _read_masks, load_model
from roro_ray.engines.protocol import StepRequest
from roro_ray.errors import ConfigError, EngineError
from roro_ray.world.tasks import make_queries
from roro_ray.world.tokenizer import make_tokenizer

pytestmark = pytest.mark.timeout(60)

SHAPE = {
    "vocab_size": 338,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
HEADS = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 257, "pad_token_id": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {**SHAPE, **HEADS},
    "Mistral": {**SHAPE, **HEADS, "sliding_window": 12},
    "Qwen3": {
        **SHAPE,
        **HEADS,
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma2": {**SHAPE, **HEADS, "sliding_window": 12, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "GPT2": {**SHAPE, "eos_token_id": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "GPTNeoX": {**SHAPE, "intermediate_size": 48, "eos_token_id": 257},
}


def make_directory(directory: Path, family: str) -> PreTrainedModel:
    """A random model of a family with the world's tokenizer, saved."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # large enough that tokens differ
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return model  # type: ignore[no-any-return]


def copy_small(directory: Path) -> Path:
    """A copy of a shipped model to be damaged."""
    return Path(shutil.copytree(resolve_model_path("world:small"), directory / "model"))


def refuse(directory: Path | str) -> str:
    """The engine's message about a directory that it does not take."""
    with pytest.raises(EngineError) as caught:
        asyncio.run(HfEngine("tested", str(directory)).ready())
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_decode_as_the_library_does(tmp_path: Path, family: str) -> None:
    model = make_directory(tmp_path, family)
    texts = ["Start with 12. A: double", "B: ", "x" * 40 + "A: plus 03; B: reverse\n\n"]
    engine = HfEngine("tested", str(tmp_path), memo_entries=0)

    async def run(prefixes: list[str]) -> list[Any]:
        return await asyncio.gather(*(engine.generate_step(StepRequest(p, 20)) for p in prefixes))

    first = asyncio.run(run(texts))
    # The second round starts from the states of the first, beyond a sliding window's edge.
    more = [text + make_tokenizer().decode(result.token_ids[:7]) for text, result in zip(texts, first, strict=True)]
    for text, result in zip(texts + more, first + asyncio.run(run(more)), strict=True):
        ids = make_tokenizer()(text).input_ids
        whole = torch.tensor([[*ids, *result.token_ids]])
        logs = torch.log_softmax(model(input_ids=whole).logits[0].float(), -1)[len(ids) - 1 : -1]
        # Against one pass over the whole text: no cache, no padding, no batch.
        assert result.token_ids == tuple(logs.argmax(-1).tolist())
        assert result.log_probs == pytest.approx(logs.max(-1).values.tolist(), abs=2e-4)
    assert engine.stats.tokens_reused > sum(len(make_tokenizer()(text).input_ids) for text in texts)


def test_the_lean_pass_is_for_the_models_that_it_reproduces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_lean(path: str, dtype: str = "float32") -> bool:
        loaded = load_model(path, "cpu", dtype)
        return make_lean(loaded.model, loaded.shape, loaded.masks) is not None

    assert is_lean("world:small") and is_lean("world:cross")
    assert not is_lean("world:small", "bfloat16")
    for family in ("Mistral", "Qwen3", "Gemma2", "GPT2"):  # windows, other blocks
        make_directory(tmp_path / family, family)
        assert not is_lean(str(tmp_path / family))
    forward = LeanModel.forward
    monkeypatch.setattr(LeanModel, "forward", lambda *arguments: forward(*arguments) * 1.01)
    assert not is_lean("world:small")


def test_a_missing_directory(tmp_path: Path) -> None:
    message = refuse(tmp_path / "nowhere")
    assert "no model directory" in message and "nowhere" in message and "hf download" in message


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    message = refuse(directory)
    assert "no tokenizer" in message and "tokenizer.save_pretrained" in message


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    (directory / "tokenizer.json").write_text("{")
    assert "tokenizer" in refuse(directory)


def test_weights_that_are_not_safetensors(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    (directory / "model.safetensors").unlink()
    assert "no weights at all" in refuse(directory)
    marker = tmp_path / "executed"
    (directory / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    message = refuse(directory)
    assert "pytorch_model.bin" in message and "safetensors" in message and "save_pretrained" in message
    assert not marker.exists()


def test_truncated_weights(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    message = refuse(directory)
    assert "does not load" in message and str(directory) in message


def test_weights_of_another_shape_or_incomplete(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "does not load" in refuse(directory)
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (directory / "config.json").write_text(json.dumps(config | more))
    message = refuse(directory)
    assert "lack" in message and "model.layers.2" in message


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(resolve_model_path("world:cross"), tmp_path / "model"))
    make_tokenizer().save_pretrained(directory)
    assert "not a pair" in refuse(directory)


def test_a_token_added_beyond_the_embeddings_fails_where_it_is_used(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(directory)
    engine = HfEngine("tested", str(directory))

    async def run() -> list[Any]:
        requests = [StepRequest(make_queries("chain", "test", 1)[0].text + "\n\n", 20), StepRequest("<extra>", 20)]
        scores = [engine.score_choices("A: ", ("<extra>",))]
        return await asyncio.gather(*map(engine.generate_step, requests), *scores, return_exceptions=True)

    fine, *failed = asyncio.run(run())
    assert fine.finish == "delimiter"
    assert all(isinstance(error, EngineError) and "338" in str(error) for error in failed)


def test_code_in_a_directory_is_never_run(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (directory / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "executed"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    assert "does not load" in refuse(directory)
    assert not marker.exists()


def test_a_kind_of_layer_that_cannot_be_decoded(tmp_path: Path) -> None:
    directory = copy_small(tmp_path)
    config = load_model(str(directory), "cpu", "float32").model.config
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(EngineError, match="linear_attention"):
        _read_masks(config, directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "world:smal"}, "did you mean 'world:small'"),
        ({"path": "world:small", "dtype": "float23"}, "did you mean 'float32'"),
        ({"path": "world:small", "device": "abacus"}, "device 'abacus'"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        asyncio.run(HfEngine("tested", **settings).ready())


def test_a_failed_load_can_be_tried_again(tmp_path: Path) -> None:
    engine = HfEngine("tested", str(tmp_path / "later"))
    with pytest.raises(EngineError):
        asyncio.run(engine.ready())
    shutil.copytree(resolve_model_path("world:small"), tmp_path / "later")
    assert asyncio.run(engine.ready()).parameters > 0
