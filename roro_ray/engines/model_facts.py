"""What a model's config.json says of its size, without its weights: parameters, active parameters, states per token.

Counts are exact, not formulas: the architecture is built on torch's meta device, which allocates nothing, and its
parameters are counted. Of a mixture of experts a token passes through a few experts a layer; the others are not active.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from roro_ray.errors import EngineError

BUILDING = threading.Lock()  # of the library's models: its loader keeps global state, which two threads would mix up
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "auto": 2, "fp8": 1}
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_STATELESS = ("linear_attention", "mamba", "conv", "recurrent")  # layers whose memory does not grow with the text


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of a causal language model.

    `active_parameters` are those that one token passes through (all, but for a mixture of experts); `kv_width` is the
    number of values that a token leaves in the caches of all layers together; `max_context` is None where positions
    are unlimited; `tied` says that input and output embeddings are one matrix, which is counted once.
    """

    architecture: str
    parameters: int
    active_parameters: int
    layers: int
    hidden: int
    kv_width: int
    vocabulary: int
    max_context: int | None
    tied: bool

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Bytes of keys and values of one token in all layers (of a sliding window, while it is inside)."""
        if dtype not in _BYTES:
            raise ValueError(f"unknown dtype {dtype!r} of a key/value cache: expected one of {', '.join(_BYTES)}")
        return self.kv_width * _BYTES[dtype]


def read_model_facts(source: Path | str | Mapping[str, Any] | PreTrainedConfig) -> ModelShape:
    """The shape of a model from its directory, its config.json, or what stands there.

    Raises:
        EngineError: there is no config.json, it is damaged, or it describes no causal language model that the library
            knows (code from the hub is not run).
    """
    config = source if isinstance(source, PreTrainedConfig) else _read_config(source)
    try:
        with BUILDING, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # border: whatever the library raises on a configuration
        raise EngineError(
            f"a model of type {getattr(config, 'model_type', None)!r} cannot be counted ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}): expected the config.json of a causal "
            "language model that transformers knows without code from the hub"
        ) from error
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    return ModelShape(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        active_parameters=count_active_parameters(model),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        kv_width=_count_kv_width(text),
        vocabulary=int(text.vocab_size),
        max_context=int(positions) if positions else None,
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    )


def count_active_parameters(model: torch.nn.Module) -> int:
    """Parameters that one token passes through: all but the experts of each layer that are not chosen.

    Routers and shared experts count whole, and so do embeddings, as in the total.

    Raises:
        EngineError: the model has experts and its configuration does not say how many a token chooses.
    """
    active = sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] != "experts":
            continue
        own = sum(parameter.numel() for parameter in module.parameters())
        experts = len(module) if isinstance(module, torch.nn.ModuleList) else len(next(module.parameters()))
        active -= own - own * _read_chosen(model) // experts
    return active


def _read_chosen(model: torch.nn.Module) -> int:
    config: Any = model.config
    text = config.get_text_config()
    chosen = next((value for key in _CHOSEN if isinstance(value := getattr(text, key, None), int)), None)
    if chosen is None:
        raise EngineError(
            f"{type(model).__name__} is a mixture of experts, but its config.json does not say how many a token "
            f"chooses: expected one of {', '.join(_CHOSEN)}"
        )
    return chosen


def _count_kv_width(text: Any) -> int:
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(not kind.startswith(_STATELESS) for kind in kinds)
    if getattr(text, "kv_lora_rank", None):  # latent attention keeps one compressed vector and the rotated part
        return layers * int(text.kv_lora_rank + text.qk_rope_head_dim)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * layers * int(heads) * int(width)


def _read_config(source: Path | str | Mapping[str, Any]) -> PreTrainedConfig:
    told = "the configuration"
    try:
        if isinstance(source, Mapping):
            values: Any = source
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            told = str(path)
            values = json.loads(path.read_text(encoding="utf-8"))
        # Without the library's quantiser: the count is that of the model, not of its packed copy.
        return AutoConfig.for_model(**{key: values[key] for key in values if key != "quantization_config"})
    except Exception as error:  # border: whatever stands in the file
        raise EngineError(
            f"{told} describes no model ({type(error).__name__}: {error}): expected a config.json in Hugging Face "
            "format, with a model_type that transformers knows"
        ) from error
