"""Several sequences in one row, none of which sees another, within a budget of tokens.

A row of packed sequences has no padding, and its memory is known beforehand. Sequences are told apart by their
position ids, which begin at 0 with each: transformers makes the block-diagonal causal mask of them (sdpa) or the
lengths that a varlen kernel takes (flash_attention_2); `packed_attention` is given the lengths themselves. Losses and
gradients are those of the sequences one by one.

The logits of a long row never exist as a whole: `PackedScorer` applies the output layer to a chunk of tokens at a
time and computes the chunk again in the backward pass.

Axes: `_B` sequences, `_T` tokens of one, `_N` tokens of a packed row, `_A` its action tokens, `_D` hidden units, `_V`
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from roro_ray.errors import ConfigError
from roro_ray.learning.packed_attention import LENGTHS, SEGMENTS, packed_row
from roro_ray.learning.sequences import TokenBatch, score_logits

_PROBE_IDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Sequences laid end to end: ids and positions [1, N], where the actions are predicted from, and the actions.

    `predicting_A` are places in the row (each before its action), `targets_A` the action tokens, both in the order of
    the [B, T] mask read row by row.
    """

    ids_1N: Tensor
    positions_1N: Tensor
    predicting_A: Tensor
    targets_A: Tensor


def pack_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences by row: first fit, longest first (at most 11/9 of the fewest rows possible, and one).

    Raises:
        ConfigError: a sequence is longer than the budget.
    """
    for index, length in enumerate(lengths):
        if length > budget:
            raise ConfigError(
                f"sequence {index} has {length} tokens, more than the {budget} of a packed row: raise "
                "lora.token_budget, or leave such a sequence out (or cut it) before it gets here."
            )
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if fitting is None:
            rows.append([])
            room.append(budget)
            fitting = len(rows) - 1
        rows[fitting].append(index)
        room[fitting] -= lengths[index]
    return [sorted(row) for row in rows]


def spread_rows(lengths: Sequence[int], budget: int, world: int) -> list[list[list[int]]]:
    """The rows of every rank, the same number for each (a rank may get empty ones), of as equal length as may be.

    Collective operations need every rank to take part in every pass. As many passes as `pack_lengths` needs; within
    them the longest sequence goes to the emptiest row, unless that breaks the budget.

    Raises:
        ConfigError: a sequence is longer than the budget.
    """
    packed = pack_lengths(lengths, budget)
    count = -(-len(packed) // world) * world
    if world > 1 and count:
        even: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            emptiest = loads.index(min(loads))
            even[emptiest].append(index)
            loads[emptiest] += lengths[index]
        if max(loads) <= budget:
            packed = [sorted(row) for row in even]
    packed += [[]] * (count - len(packed))
    return [packed[rank::world] for rank in range(world)]


def pack_row(ids_BT: Tensor, attention_mask_BT: Tensor, action_mask_BT: Tensor) -> PackedRow:
    """Lay right-padded sequences end to end.

    Raises:
        ConfigError: a sequence's first token is an action (nothing predicts it), padding is, or there is no action.
    """
    check_actions(attention_mask_BT, action_mask_BT)
    real_BT = attention_mask_BT.bool()
    columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return PackedRow(
        ids_BT[real_BT][None],
        columns_T.expand_as(ids_BT)[real_BT][None],
        action_mask_BT[real_BT].nonzero().flatten() - 1,
        ids_BT[action_mask_BT],
    )


class PackedScorer(nn.Module):
    """A causal language model as a function from packed rows to the log-probabilities of their actions.

    Body and output layer are called within one `forward`, so that DistributedDataParallel and FSDP2 can wrap it.

    Args:
        model: with or without LoRA layers; on its device.
        chunk: tokens whose logits are held at once.

    Raises:
        ConfigError: the model does more to its logits than its output layer (such as capping them), or lets packed
            sequences see each other.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        _check_output_layer(model)
        _check_packing(model)

    def forward(
        self, ids_1N: Tensor, positions_1N: Tensor, predicting_A: Tensor, targets_A: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each action and entropy of its distribution, [A] each, in nats at that temperature.

        Takes the fields of a `PackedRow`, since wrappers look for tensors among the arguments.
        """
        hidden_AD = _run_body(self.model, ids_1N, positions_1N)[0, predicting_A]
        chosen, entropies = [], []
        for start in range(0, len(hidden_AD), self.chunk):
            part = slice(start, start + self.chunk)
            chosen_C, entropy_C = checkpoint(
                self._score, hidden_AD[part], targets_A[part], temperature, use_reentrant=False
            )
            chosen.append(chosen_C)
            entropies.append(entropy_C)
        return torch.cat(chosen), torch.cat(entropies)

    def _score(self, hidden_CD: Tensor, targets_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits_CV = cast(nn.Module, self.model.get_output_embeddings())(hidden_CD)
        return score_logits(logits_CV, targets_C, temperature)


def _run_body(model: PreTrainedModel, ids_1N: Tensor, positions_1N: Tensor) -> Tensor:
    """Last hidden states [1, N, D] of a packed row."""
    inputs: dict[str, Any] = {"input_ids": ids_1N, "position_ids": positions_1N, "use_cache": False}
    if model.config._attn_implementation != SEGMENTS:
        return cast(Tensor, model.base_model(**inputs).last_hidden_state)
    starts = (positions_1N[0] == 0).nonzero().flatten().tolist()
    lengths = [stop - start for start, stop in pairwise([*starts, ids_1N.shape[1]])]
    with packed_row():
        return cast(Tensor, model.base_model(**inputs, **{LENGTHS: lengths}).last_hidden_state)


def _check_packing(model: PreTrainedModel) -> None:
    """Raise ConfigError where the second of two packed sequences comes out otherwise than alone."""
    ids_1N = torch.tensor([(*_PROBE_IDS, *_PROBE_IDS[::-1])], device=model.device)
    positions_1N = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        packed = _run_body(model, ids_1N, positions_1N)[:, 3:]
        alone = _run_body(model, ids_1N[:, 3:], positions_1N[:, 3:])
    model.train(training)
    tolerance = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2
    if not float((packed - alone).norm()) <= tolerance * float(alone.norm()):
        raise ConfigError(
            f"{type(model).__name__} with attention {model.config._attn_implementation} lets packed sequences see each "
            "other: set another lora.attention, or choose another base model."
        )


def _check_output_layer(model: PreTrainedModel) -> None:
    """Raise ConfigError unless logits are the output layer of the body's last hidden state, and nothing else."""
    ids = torch.tensor([_PROBE_IDS], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        got = cast(nn.Module, model.get_output_embeddings())(hidden)
    model.train(training)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        raise ConfigError(
            f"{type(model).__name__} changes its logits behind its output layer (such as by a cap or a scale), and "
            "learning computes them in chunks from the output layer alone: choose a base model that does not."
        )


def check_actions(attention_mask_BT: Tensor, action_mask_BT: Tensor) -> None:
    """Raise ConfigError where an action has nothing that predicts it, or is padding, or there is no action."""
    if not bool(action_mask_BT.any()):
        raise ConfigError("no token of a packed row is an action: leave out sequences without one")
    if bool(action_mask_BT[:, 0].any()):
        raise ConfigError("the first token of a row is an action: give every completion a prompt of a token or more")
    if bool((action_mask_BT & ~attention_mask_BT.bool()).any()):
        raise ConfigError("a padding token is marked as an action: the action mask must lie inside the attention mask")


def make_idle_batch() -> TokenBatch:
    """A sequence for a rank that has nothing to do: it goes through every layer, and its loss is weighed with 0."""
    ones_B = torch.ones(1)
    real_BT = torch.ones(1, 2, dtype=torch.long)
    action_BT = torch.tensor([[False, True]])
    return TokenBatch(torch.zeros(1, 2, dtype=torch.long), real_BT, action_BT, torch.zeros(1, 2), ones_B, ones_B.long())


def scatter_actions(values_A: Tensor, action_mask_BT: Tensor) -> Tensor:
    """Values of a row's actions back at their places in [B, T], 0 elsewhere."""
    return values_A.new_zeros(action_mask_BT.shape).masked_scatter(action_mask_BT, values_A)
