"""The forward pass of Llama- and Qwen3-shaped models with a third of the operations.

A tiny model's forward pass is mostly the cost of starting operations. The library's modules start about sixty a layer;
here the projections that read the same input are one product, additions ride on products, and normalisation and
rotation treat queries and keys together. Same weights, same numbers to rounding: `make_lean` compares with the model
itself before it hands the pass out, and gives None where anything differs or the family is another.

Axes: B rows, N new tokens, T columns, H query and key heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel, Qwen3ForCausalLM, Qwen3Model

from roro_ray.engines.kv import BatchKV, KVShape

_TOLERANCE = 1e-3  # of logits or states, in float32
_MOST_PARAMETERS = 100_000_000  # beyond, arithmetic dominates, and a second copy of the weights is dear


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, projections stored for `x @ w`."""

    norm: torch.Tensor
    query_key_value: torch.Tensor
    query_key_norm: torch.Tensor | None  # (H, D)
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class LeanModel:
    """A copy of a model's weights, and its forward pass over the states in a `BatchKV`.

    Args:
        body: the model without its output layer.
        head: the output layer's weight; None for a model that is asked for states only.
    """

    def __init__(self, body: Any, head: torch.Tensor | None = None):
        config: Any = body.config
        self._query_heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = body.layers[0].self_attn.head_dim
        self._epsilon = config.rms_norm_eps
        self._embed: torch.Tensor = body.embed_tokens.weight
        self._head = head
        self._norm: torch.Tensor = body.norm.weight
        self._rotary: Any = body.rotary_emb
        self._layers = [_read_layer(layer, self._query_heads, self._key_heads) for layer in body.layers]

    def forward(
        self, tokens_BN: torch.Tensor, positions_BN: torch.Tensor, mask: torch.Tensor, kv: BatchKV, keep: int
    ) -> torch.Tensor:
        """Logits (B, keep, V) of the last `keep` tokens; their states are left in `kv`, which has been aimed."""
        assert self._head is not None, "this model was made to give states"
        return functional.linear(self.read(tokens_BN, positions_BN, mask, kv, keep), self._head)

    def read(
        self, tokens_BN: torch.Tensor, positions_BN: torch.Tensor, mask: torch.Tensor, kv: BatchKV, keep: int
    ) -> torch.Tensor:
        """Like `forward`, but the states (B, keep, C) before the output layer."""
        rows, count = tokens_BN.shape
        x = functional.embedding(tokens_BN, self._embed)
        cos, sin = self._rotary(x, positions_BN)
        half = self._width // 2
        # rotate_half(x) is x rolled by half its width, its first half negated: the sign goes into the sine.
        cos, sin = cos[:, :, None], torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, :, None]
        x = x.view(rows * count, -1)
        for index, layer in enumerate(self._layers):
            x = self._attend(layer, index, x, (rows, count), (cos, sin), mask, kv)
            hidden = functional.rms_norm(x, self._norm.shape, layer.mlp_norm, self._epsilon) @ layer.gate_up
            gate, up = hidden.chunk(2, -1)
            x = torch.addmm(x, functional.silu(gate).mul_(up), layer.down)
        x = x.view(rows, count, -1)[:, -keep:]
        return functional.rms_norm(x, self._norm.shape, self._norm, self._epsilon)

    def _attend(
        self,
        layer: _Layer,
        index: int,
        x: torch.Tensor,
        shape: tuple[int, int],
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        kv: BatchKV,
    ) -> torch.Tensor:
        heads = self._query_heads + self._key_heads
        hidden = functional.rms_norm(x, self._norm.shape, layer.norm, self._epsilon) @ layer.query_key_value
        hidden = hidden.view(*shape, heads + self._key_heads, self._width)
        query_key, value = hidden[:, :, :heads], hidden[:, :, heads:]
        if layer.query_key_norm is not None:
            query_key = functional.rms_norm(query_key, (self._width,), None, self._epsilon) * layer.query_key_norm
        cos, sin = rotation
        query_key = torch.addcmul(query_key * cos, query_key.roll(self._width // 2, -1), sin)
        keys, values = kv.write(query_key[:, :, self._query_heads :], value, index)
        query = query_key[:, :, : self._query_heads].transpose(1, 2)
        attended = functional.scaled_dot_product_attention(
            query, keys, values, mask, enable_gqa=self._query_heads != self._key_heads
        )
        return torch.addmm(x, attended.transpose(1, 2).reshape(x.shape[0], -1), layer.output)


def make_lean(model: PreTrainedModel, shape: KVShape, masks: dict[str, int | None]) -> LeanModel | None:
    """The lean pass of a model, or None where it would not be the same."""
    if not isinstance(model, LlamaForCausalLM | Qwen3ForCausalLM) or list(masks.values()) != [None]:
        return None
    if not _is_suitable(model, shape):
        return None
    lean = LeanModel(model.model, model.lm_head.weight)
    return lean if _agrees(lean.forward, lambda **given: model(**given).logits, model, shape) else None


def make_lean_body(body: PreTrainedModel, shape: KVShape) -> LeanModel | None:
    """The lean pass of a model without output layer and with full attention, for its states (`read`), or None.

    Its weights are a copy: make it anew when the body's have changed.
    """
    if not isinstance(body, LlamaModel | Qwen3Model) or not _is_suitable(body, shape):
        return None
    lean = LeanModel(body)
    return lean if _agrees(lean.read, lambda **given: body(**given).last_hidden_state, body, shape) else None


def _is_suitable(model: PreTrainedModel, shape: KVShape) -> bool:
    config: Any = model.config
    has_bias = any(name.endswith(".bias") for name, _ in model.named_parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plain = not has_bias and config.hidden_act == "silu"
    return plain and shape.dtype == torch.float32 and parameters <= _MOST_PARAMETERS


@torch.inference_mode()
def _agrees(
    lean: Callable[..., torch.Tensor], expected: Callable[..., torch.Tensor], model: PreTrainedModel, shape: KVShape
) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    tokens_BN = (torch.arange(24, device=shape.device).view(2, 12) * 7919) % vocabulary
    positions_BN = torch.arange(12, device=shape.device).expand(2, 12)
    mask = torch.ones((2, 1, 12, 12), dtype=torch.bool, device=shape.device).tril()
    kv = BatchKV(shape)
    kv.resize(2, 12)
    kv.aim(slice(0, 2), 0)
    wanted = expected(input_ids=tokens_BN, position_ids=positions_BN, use_cache=False)
    return torch.allclose(lean(tokens_BN, positions_BN, mask, kv, 12), wanted, atol=_TOLERANCE)


def _read_layer(layer: Any, query_heads: int, key_heads: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norm = None
    if hasattr(attention, "q_norm"):
        norm = torch.stack([attention.q_norm.weight] * query_heads + [attention.k_norm.weight] * key_heads)
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    return _Layer(
        norm=layer.input_layernorm.weight,
        query_key_value=torch.cat(parts).T.contiguous(),
        query_key_norm=norm,
        output=attention.o_proj.weight.T.contiguous(),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T.contiguous(),
        down=mlp.down_proj.weight.T.contiguous(),
    )
