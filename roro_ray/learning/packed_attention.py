"""Attention of a packed row sequence by sequence: no mask of N x N, and no work on what a mask would throw away.

With `sdpa` transformers gives a packed row of N tokens a block-diagonal mask, and the kernel computes all N x N scores.
Here every sequence of the row goes through torch's causal kernel by itself, which needs no mask (flash attention on a
GPU, without the package of that name). Registered with transformers under the name SEGMENTS; outside of a packed row it
is `sdpa`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from roro_ray.errors import ConfigError

SEGMENTS = "segments"
LENGTHS = "packed_lengths"  # argument of a model's forward that its layers hand on: tokens of each sequence of the row
_inside_packed_row: ContextVar[bool] = ContextVar("inside a packed row", default=False)


@contextmanager
def packed_row() -> Iterator[None]:
    """Within it no masks are made; every forward call must give LENGTHS."""
    token = _inside_packed_row.set(True)
    try:
        yield
    finally:
        _inside_packed_row.reset(token)


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers makes once per forward pass."""
    return None if _inside_packed_row.get() else sdpa_mask(*args, **kwargs)


def attend_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row; query, key and value are [1, heads, N, width].

    Raises:
        ConfigError: the model's attention is more than a softmax of scaled products.
    """
    if packed_lengths is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    odd = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if odd:
        raise ConfigError(
            f"{type(module).__name__} asks its attention for {', '.join(odd)}, which lora.attention={SEGMENTS} does "
            "not know: set lora.attention=flash_attention_2 or sdpa, whichever the model supports."
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts, start = [], 0
    for length in packed_lengths:
        q, k, v = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        mask = None if sliding_window is None or length <= sliding_window else _make_band(length, sliding_window, q)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling))
        start += length
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _make_band(length: int, window: int, like: Tensor) -> Tensor:
    """True where a token sees another: itself and the `window - 1` before it."""
    places_T = torch.arange(length, device=like.device)
    distance_TT = places_T[:, None] - places_T[None, :]
    return (distance_TT >= 0) & (distance_TT < window)


AttentionInterface.register(SEGMENTS, attend_segments)
AttentionMaskInterface.register(SEGMENTS, make_mask)
