"""Tiny random models in exactly the format of the hub: what a test runs in place of Qwen3, Llama 3 or a distill.

Tokenizers are byte-level BPEs of about 1,000 tokens with the real families' pre-tokenizer, control tokens and chat
templates. Weights are random, but not flat: tokens that end a step, a thinking block or a text are made likely enough
for texts to have all of them. Same arguments, same files, so that tests may share a directory.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_families import CHATML_TEMPLATE, FAMILY_FACTS, MATHS, QWEN3, THINK, Family
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from roro_ray.world.tasks import SUITES, draw_programs, render_query, render_solution

FAMILIES = ("qwen3", "llama", "qwen3_moe", "deepseek_qwen")
_VOCABULARY = 1000  # learned tokens, bytes included
_HEAD = 32  # head width: the least that vLLM's CPU attention takes
_SPREAD = 0.3  # standard deviation of embeddings
_CONSTANT = 2.0  # what channel 0 carries
_POSITIONS = 4096
_SHARES = {"<think>": 1e-4, "</think>": 0.01}  # of all next tokens, roughly
_STEP, _END = 0.02, 0.005  # the same for each token that ends a step, and a text

# One pattern but for the length of digit runs: newline runs stay together, also behind punctuation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tiny_model(
    directory: str | Path,
    family: str = "qwen3",
    seed: int = 0,
    thinking: bool = True,
    layers: int = 2,
    hidden: int = 64,
    tied: bool = False,
) -> Path:
    """Save a tiny random model of a family in hub format and give its directory; takes about a tenth of a second.

    Models of one family share a tokenizer whatever their seed and size (`hidden` is a multiple of 64), as the real ones
    do. `thinking=False` leaves the thinking tokens out of vocabulary and template (llama never has them). `tied`:
    input and output embeddings are one matrix, as in the smaller Qwen3; then no token is made likelier.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    facts = _without_thinking(FAMILY_FACTS[family]) if not thinking else FAMILY_FACTS[family]
    tokenizer = Tokenizer.from_str(_make_tokenizer(facts))
    tokenizer.save(str(path / "tokenizer.json"))
    _save_tokenizer_files(path, facts)
    ends = [tokenizer.token_to_id(token) for token in facts.ends]
    vocabulary = math.ceil(tokenizer.get_vocab_size() / 64) * 64  # padded, as the real ones are
    bos = tokenizer.token_to_id(facts.bos) if facts.bos else None
    config = _make_config(family, vocabulary, layers, hidden)
    config.update({"bos_token_id": bos, "eos_token_id": tokenizer.token_to_id(facts.eos), "tie_word_embeddings": tied})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make_model(config, tokenizer, ends)
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=ends, pad_token_id=tokenizer.token_to_id(facts.pad), do_sample=True, top_p=0.95
    )
    model.save_pretrained(path)
    return path


def _without_thinking(facts: Family) -> Family:
    control = tuple(token for token in facts.control if token not in THINK)
    template = CHATML_TEMPLATE if facts is QWEN3 else facts.template.replace("<think>\\n", "")
    return Family(**{**vars(facts), "control": control, "template": template})


@functools.cache
def _make_tokenizer(facts: Family) -> str:
    """The tokenizer of a family, in the words of its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=facts.digits != ""))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT % facts.digits), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_training_texts(), trainer)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in facts.control])
    if facts.bos is not None and facts.adds_bos:
        bos = processors.TemplateProcessing(
            single=f"{facts.bos} $A",
            pair=f"{facts.bos} $A {facts.bos} $B",
            special_tokens=[(facts.bos, tokenizer.token_to_id(facts.bos))],
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return str(tokenizer.to_str())


def _training_texts() -> list[str]:
    texts = [MATHS, *MATHS.split("\n")]
    for suite in SUITES:
        programs = draw_programs(suite, "train", 0)
        for _ in range(40):
            program = next(programs)
            texts.append("".join(f"{part}\n\n" for part in (render_query(program), *render_solution(program))))
    return texts


def _save_tokenizer_files(path: Path, facts: Family) -> None:
    tokens = {"bos_token": facts.bos, "eos_token": facts.eos, "pad_token": facts.pad}
    ids = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    config = {
        "add_bos_token": facts.adds_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in ids
        },
        **tokens,
        "chat_template": facts.template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": _POSITIONS,
        "tokenizer_class": facts.tokenizer_class,
        "unk_token": None,
    }
    for name, values in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {key: text for key, text in tokens.items() if text is not None}),
    ):
        (path / name).write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _make_config(family: str, vocabulary: int, layers: int, hidden: int) -> PreTrainedConfig:
    heads = hidden // _HEAD
    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": _POSITIONS,
        "rope_theta": 1_000_000.0,
        "initializer_range": 2.0 / math.sqrt(hidden),
        "dtype": "float32",
    }
    if family == "qwen3":
        return Qwen3Config(**common, head_dim=_HEAD)
    if family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "norm_topk_prob": True}
        return Qwen3MoeConfig(**common, head_dim=_HEAD, decoder_sparse_step=1, mlp_only_layers=[], **experts)
    if family == "deepseek_qwen":
        return Qwen2Config(**common)
    return LlamaConfig(**common)


_CLASSES: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    Qwen3Config: Qwen3ForCausalLM,
    Qwen3MoeConfig: Qwen3MoeForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    LlamaConfig: LlamaForCausalLM,
}


@torch.no_grad()
def _make_model(config: PreTrainedConfig, tokenizer: Tokenizer, ends: Sequence[int]) -> PreTrainedModel:
    """Random weights; channel 0 carries the same through all layers, by which some tokens are made likelier."""
    model = _CLASSES[type(config)](config).eval()
    size = tokenizer.get_vocab_size()
    embedding = model.get_input_embeddings().weight.normal_(0.0, _SPREAD)
    head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(0.0, _SPREAD)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
        elif name.endswith("down_proj"):  # of all experts together
            weight[:, 0] = 0.0
    if config.tie_word_embeddings:
        return model
    head.normal_(0.0, _SPREAD)[:, 0] = 0.0
    embedding[:, 0] = _CONSTANT
    states = model.model(torch.randint(size, (8, 64))).last_hidden_state.flatten(0, 1)
    total = (states @ head[:size].T).logsumexp(-1).mean()
    for token in range(len(head)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        share = _END if token in ends else _SHARES.get(text, _STEP if "\n\n" in text else None)
        share = 1e-6 if token >= size else share
        if share is not None:
            head[token, 0] += (total + math.log(share) - (states @ head[token]).mean()) / states[:, 0].mean()
    return model


def text_of(seed: int, words: int = 40) -> str:
    """A text for tests, in words that the tokenizers know."""
    rng = random.Random(seed)
    return " ".join(rng.choice(MATHS.split()) for _ in range(words))
