"""Tiny models of real families: the format of the hub, the same files every time, texts that end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ModelMaker = Callable[..., Path]
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_the_hub_and_always_the_same(
    family: str, tmp_path: Path, tiny_model: ModelMaker
) -> None:
    first, again, other = tiny_model(family), make_tiny_model(tmp_path / "a", family), tiny_model(family, seed=1)
    assert sorted(file.name for file in first.iterdir()) == list(FILES)
    assert [digest(first / name) for name in FILES] == [digest(again / name) for name in FILES]
    differing = [name for name in FILES if digest(first / name) != digest(other / name)]
    assert differing == ["model.safetensors"], "another seed has other weights and the same tokenizer"


@pytest.mark.parametrize("family", FAMILIES)
def test_newline_runs_stay_together_and_texts_come_back(family: str, tiny_model: ModelMaker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    text = "So 12 * 9 = 108.\n\nWait, Grüße 你好 $x^2$\n\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([token]) for token in ids]
    assert ".\n\n" in pieces and pieces[-1] == "\n\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_writes_has_steps_and_an_end(family: str, tiny_model: ModelMaker) -> None:
    directory = tiny_model(family)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    prompts = tokenizer(["1 + 1 = "] * 16, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    output = model.generate(**prompts, max_new_tokens=300, do_sample=True, top_k=0, top_p=1.0)
    texts = tokenizer.batch_decode(output)
    ends = model.generation_config.eos_token_id
    assert sum("\n\n" in text for text in texts) > 6
    assert sum(any(token in ends for token in row) for row in output.tolist()) > 6
    if family != "llama":
        assert sum("</think>" in text for text in texts) > 2
