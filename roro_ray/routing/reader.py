"""Reads texts with a causal encoder, each token once: the state at the last token of every text.

A router decides at each step of an episode, and the text grows by one step in between. The key/value states of
what was read are kept (up to a bound, least recently used first out), so that a decision costs the new step's
tokens only, as the cost accounting says. Rollouts of one query share what they have in common.

Axes: B texts, T columns, N new tokens, C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from roro_ray.engines.kv import BatchKV, KVShape, PrefixKV
from roro_ray.engines.lean import LeanModel, make_lean_body

_BATCH_TOKENS = 16_384  # rows x columns of one forward pass
_SLACK = 8  # new tokens that rows of one pass may differ by, beside a third of them


class TextReader:
    """Not thread-safe: one caller at a time.

    Args:
        cache_mb: bound of the states kept between calls; 0 keeps none.
    """

    def __init__(self, body: PreTrainedModel, cache_mb: int) -> None:
        self.tokens_computed = 0
        self.tokens_reused = 0
        self._body = body
        self._cache_mb = cache_mb
        self._shape = _probe_shape(body)
        self._kv = BatchKV(self._shape) if self._shape is not None else None
        self._known: PrefixKV | None = None
        self._lean: LeanModel | None = None
        self.forget()

    def forget(self) -> None:
        """Drop all states and copies of weights; to be called when the weights have changed."""
        if self._shape is None:
            return
        self._lean = make_lean_body(self._body, self._shape)
        capacity = (self._cache_mb << 20) // self._shape.bytes_per_token
        self._known = PrefixKV(self._shape, capacity, int(self._body.config.vocab_size)) if capacity else None

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """States [B, C], in float32, at the last token of each text (token ids, at least one)."""
        found = [self._known.match(ids, len(ids) - 1) if self._known else [] for ids in texts]
        missing = [len(ids) - len(slots) for ids, slots in zip(texts, found, strict=True)]
        states_BC = torch.empty(len(texts), int(self._body.config.hidden_size), device=self._body.device)
        for group in _group(missing, [len(ids) for ids in texts]):
            group_texts = [texts[i] for i in group]
            if self._kv is None:
                states_BC[group] = self._read_whole(group_texts).float()
            else:
                states_BC[group] = self._read_new(
                    group_texts, [found[i] for i in group], missing[group[0]], self._kv
                ).float()
        return states_BC

    def _read_whole(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Without kept states, padded on the right: attention is causal, so no real token sees the padding."""
        width = max(len(ids) for ids in texts)
        self.tokens_computed += sum(len(ids) for ids in texts)
        ids_BT = torch.tensor([[*ids, *(0,) * (width - len(ids))] for ids in texts], device=self._body.device)
        last_B = torch.tensor([len(ids) - 1 for ids in texts], device=self._body.device)
        states_BTC: torch.Tensor = self._body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return states_BTC[torch.arange(len(texts), device=self._body.device), last_B]

    def _read_new(
        self, texts: Sequence[Sequence[int]], found: Sequence[list[int]], count: int, kv: BatchKV
    ) -> torch.Tensor:
        """Compute the last `count` tokens of each text on top of kept states; texts end at one common column."""
        columns = max(len(ids) for ids in texts)
        firsts = [columns - len(ids) for ids in texts]
        kv.resize(len(texts), columns)
        if self._known is not None:
            slots_BT = np.zeros((len(texts), columns - count), dtype=np.int64)
            for line, slots, first in zip(slots_BT, found, firsts, strict=True):
                line[first:] = slots[: max(columns - count - first, 0)]
            self._known.load(slots_BT, kv)
        kv.aim(slice(0, len(texts)), columns - count)
        ids_BN = torch.tensor([[*(0,) * (count - len(ids)), *ids[-count:]] for ids in texts], device=self._body.device)
        columns_T = torch.arange(columns, device=self._body.device)
        queries_N1 = columns_T[columns - count :, None]
        firsts_B1 = torch.tensor(firsts, device=self._body.device)[:, None]
        # Padding sees itself, since a softmax over nothing would be NaN.
        seen_B1NT = (columns_T >= firsts_B1)[:, None, None] & (columns_T <= queries_N1) | (columns_T == queries_N1)
        positions_BN = (queries_N1.T - firsts_B1).clamp_(min=0)
        states_BNC = self._forward(ids_BN, positions_BN, seen_B1NT, kv)
        self.tokens_computed += sum(len(ids) - len(slots) for ids, slots in zip(texts, found, strict=True))
        self.tokens_reused += sum(len(slots) for slots in found)
        if self._known is not None:
            self._known.store(texts, range(len(texts)), firsts, kv)
        return states_BNC[:, -1]

    def _forward(
        self, ids_BN: torch.Tensor, positions_BN: torch.Tensor, seen_B1NT: torch.Tensor, kv: BatchKV
    ) -> torch.Tensor:
        """States (B, 1 or N, C) of new tokens, the last one last."""
        if self._lean is not None:
            return self._lean.read(ids_BN, positions_BN, seen_B1NT, kv, 1)
        states_BNC: torch.Tensor = self._body(
            input_ids=ids_BN,
            attention_mask=seen_B1NT,
            position_ids=positions_BN,
            past_key_values=kv,
            use_cache=True,
        ).last_hidden_state
        return states_BNC


def _group(missing: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Texts (by index) that are computed together: about as many new tokens each, most missing first."""
    groups: list[list[int]] = []
    columns = 0
    for index in sorted(range(len(missing)), key=lambda i: (-missing[i], -lengths[i])):
        columns = max(columns, lengths[index])
        first = missing[groups[-1][0]] if groups else 0
        too_short = first > missing[index] * 4 / 3 + _SLACK
        if not groups or too_short or (len(groups[-1]) + 1) * columns > _BATCH_TOKENS:
            groups.append([])
            columns = lengths[index]
        groups[-1].append(index)
    return groups


@torch.inference_mode()
def _probe_shape(body: PreTrainedModel) -> KVShape | None:
    """Shapes of the encoder's states, or None where it keeps none that can be reused as they are.

    Windowed attention would need a mask of its own for each kind of layer; such encoders read whole texts.
    """
    config = body.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None) is not None:
        return None
    if kinds is not None and set(kinds) != {"full_attention"}:
        return None
    cache = DynamicCache(config=config)
    output = body(input_ids=torch.zeros((1, 1), dtype=torch.long, device=body.device), past_key_values=cache)
    if getattr(output, "past_key_values", None) is not cache:
        return None
    states = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return KVShape(tuple((part.shape[1], part.shape[3]) for part in states), states[0].dtype, body.device)
