"""Sampled text as training data: one row per completion, with an action mask, old log-probabilities, one advantage.

Rows are prompt + completion, padded on the right, so that a causal LM needs no position ids. All `_BT` tensors are
aligned with the ids: the entry at t belongs to the token at t, not to the one that it predicts.

Axes: `_B` rows, `_T` tokens of a row, `_V` the vocabulary, `_N` action tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from roro_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of one prompt.

    `prompt` is the index of the prompt in the call; `ids` include the end token or the stop text where one was
    sampled; `text` includes neither. `log_probs` are natural logarithms under the distribution sampled from.
    `finish` is `stop` or `length`.
    """

    prompt: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    finish: str


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows to learn from: ids and masks [B, T], old log-probabilities [B, T] (0 outside the action mask),
    one advantage (or, [B, T], one a token) and one group id a row."""

    ids_BT: Tensor
    attention_mask_BT: Tensor
    action_mask_BT: Tensor
    old_log_probs_BT: Tensor
    advantages_B: Tensor
    group_ids_B: Tensor

    def __len__(self) -> int:
        return len(self.ids_BT)

    @property
    def action_tokens(self) -> int:
        """Tokens to learn from."""
        return int(self.action_mask_BT.sum())

    def select(self, rows: Tensor) -> TokenBatch:
        """The given rows (indices or a bool mask), cut to the longest of them."""
        mask_BT = self.attention_mask_BT[rows]
        width = int(mask_BT.sum(dim=1).max()) if len(mask_BT) else 0
        advantages = self.advantages_B[rows]
        return TokenBatch(
            self.ids_BT[rows, :width],
            mask_BT[:, :width],
            self.action_mask_BT[rows, :width],
            self.old_log_probs_BT[rows, :width],
            advantages if advantages.ndim == 1 else advantages[:, :width],
            self.group_ids_B[rows],
        )

    def to(self, device: str | torch.device) -> TokenBatch:
        """The same on a device."""
        return TokenBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def make_token_batch(
    completions: Sequence[Completion],
    advantages_B: Tensor,
    group_ids_B: Tensor,
    pad_id: int = 0,
    device: str | torch.device = "cpu",
) -> TokenBatch:
    """Pad completions into one batch; only the sampled tokens are actions.

    Raises:
        ConfigError: the numbers of completions, advantages and group ids differ, or there are none.
    """
    if not completions or not len(completions) == len(advantages_B) == len(group_ids_B):
        raise ConfigError(
            f"got {len(completions)} completions, {len(advantages_B)} advantages and {len(group_ids_B)} group ids: "
            "expected the same number of each, at least 1"
        )
    ids = [torch.tensor(c.prompt_ids + c.ids) for c in completions]
    actions = [torch.tensor([False] * len(c.prompt_ids) + [True] * len(c.ids)) for c in completions]
    old = [torch.tensor([0.0] * len(c.prompt_ids) + list(c.log_probs)) for c in completions]
    return TokenBatch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
        pad_sequence(actions, batch_first=True).to(device),
        pad_sequence(old, batch_first=True).to(device),
        advantages_B.to(device),
        group_ids_B.to(device),
    )


def split_batch(batch: TokenBatch, max_tokens: int) -> list[TokenBatch]:
    """Micro-batches of rows of like length, each at most `max_tokens` padded tokens (at least one row).

    With the denominator of the whole batch their losses add up to the loss of the batch, so this saves padding
    and memory and changes no gradient.
    """
    lengths_B = batch.attention_mask_BT.sum(dim=1)
    order = torch.argsort(lengths_B, stable=True).tolist()
    parts: list[list[int]] = [[]]
    for row in order:
        # Rows come by rising length, so the row at hand sets the width of its part.
        if parts[-1] and (len(parts[-1]) + 1) * int(lengths_B[row]) > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return [batch.select(torch.tensor(rows, device=lengths_B.device)) for rows in parts if rows]


def lm_log_probs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every action token, and the entropy of the distribution that it was drawn from.

    Both are [B, T] in float32 (float64 of a model in float64), in nats, at the given sampling temperature, and 0
    outside the action mask. The logits of prompt and padding are never computed where no row needs their column.

    Raises:
        ConfigError: a row's first token is an action (nothing predicts it).
    """
    mask_BT = batch.action_mask_BT
    if bool(mask_BT[:, 0].any()):
        raise ConfigError("the first token of a row is an action: give every completion a prompt of a token or more")
    columns = mask_BT.any(dim=0).nonzero().flatten() - 1
    # No attention mask: padding comes last, so that a causal model's real positions never see it, and attention
    # takes the faster path.
    output = model(input_ids=batch.ids_BT, logits_to_keep=columns, use_cache=False)
    kept_BT = mask_BT[:, columns + 1]
    chosen_N, entropy_N = score_logits(output.logits[kept_BT], batch.ids_BT[mask_BT], temperature)
    zeros_BT = chosen_N.new_zeros(mask_BT.shape)
    return zeros_BT.masked_scatter(mask_BT, chosen_N), zeros_BT.masked_scatter(mask_BT, entropy_N)


def score_logits(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, in nats, in float32 or better."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    log_probs_NV = logits_NV.log_softmax(dim=-1)
    chosen_N = log_probs_NV.gather(1, targets_N[:, None]).squeeze(1)
    entropy_N = -(log_probs_NV.exp() * log_probs_NV.clamp(min=-1e4)).sum(dim=-1)  # 0 x -inf is 0 here
    return chosen_N, entropy_N
