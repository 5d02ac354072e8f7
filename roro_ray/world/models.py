"""The embedded world's models: their shapes, and where the shipped weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from roro_ray.world.corpus import CorpusSpec
from roro_ray.world.tokenizer import make_char_tokenizer, make_tokenizer

WEIGHTS_DIR = Path(__file__).parent / "weights"
MAX_POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape, corpus and training budget of one tiny model; `lookahead` trains the boundary to see the next step."""

    family: str
    width: int
    layers: int
    heads: int
    inner: int
    corpus: CorpusSpec
    tokens: int
    learning_rate: float
    lookahead: int = 0


MODELS = {
    "small": ModelSpec("qwen3", 48, 2, 3, 128, CorpusSpec(0.2, 0.6, 1.0, ("max", "min", "set")), 4_000_000, 3e-3),
    "large": ModelSpec("qwen3", 160, 3, 5, 480, CorpusSpec(drill=0.55), 6_000_000, 4e-3),
    "cross": ModelSpec("llama", 56, 2, 4, 160, CorpusSpec(all_easy=0.6, misconceived=1.0), 12_000_000, 3e-3),
    "encoder": ModelSpec("qwen3", 48, 2, 3, 128, CorpusSpec(misconceived=0.5), 4_000_000, 5e-3, lookahead=6),
}


def make_tokenizer_for(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The tokenizer of a model's family."""
    return make_char_tokenizer() if spec.family == "llama" else make_tokenizer()


def make_model(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of the given shape (seed torch before the call)."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.width,
        "intermediate_size": spec.inner,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.heads,
        "head_dim": spec.width // spec.heads,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if spec.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return Qwen3ForCausalLM(Qwen3Config(**shape))
