"""Supervised fine-tuning of a causal LM on chosen tokens: the warm start of Rubricor and Judge.

A batch says with its labels which tokens are learned, so that one loop serves texts (every token of a target)
and verdicts (one token here and there in a long text).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from roro_ray.errors import ConfigError

IGNORED = -100  # label of a token that is not learned, as in torch.nn.functional.cross_entropy

SftBatch = tuple[Tensor, Tensor, Tensor]
"""ids, attention mask and labels, each [B, T]; labels are aligned with the ids (the model shifts them)."""


def make_sft_batch(ids: Sequence[Sequence[int]], learned: Sequence[Sequence[bool]], pad_id: int = 0) -> SftBatch:
    """Pad documents on the right; `learned` says of every token whether it is a target.

    Raises:
        ConfigError: ids and flags differ in number or length, or there are no documents.
    """
    if not ids or [len(row) for row in ids] != [len(row) for row in learned]:
        raise ConfigError(
            f"got {len(ids)} documents and {len(learned)} rows of flags: expected one flag per token of every "
            "document, and a document or more"
        )
    rows = [torch.tensor(row) for row in ids]
    labels = [
        torch.where(torch.tensor(flags), row, torch.tensor(IGNORED)) for row, flags in zip(rows, learned, strict=True)
    ]
    return (
        pad_sequence(rows, batch_first=True, padding_value=pad_id),
        pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def sft_loss(model: PreTrainedModel, batch: SftBatch) -> Tensor:
    """Mean cross-entropy, in nats, over the labelled tokens of the batch (0 where none is labelled).

    Raises:
        ConfigError: a document's first token is labelled (nothing predicts it).
    """
    ids_BT, mask_BT, labels_BT = batch
    if bool((labels_BT[:, 0] != IGNORED).any()):
        raise ConfigError("the first token of a document is labelled: nothing predicts it, label later ones only")
    learned_BT = labels_BT != IGNORED
    columns = learned_BT.any(dim=0).nonzero().flatten() - 1
    output = model(input_ids=ids_BT, attention_mask=mask_BT, logits_to_keep=columns, use_cache=False)
    logits_NV = output.logits[learned_BT[:, columns + 1]].float()
    return F.cross_entropy(logits_NV, labels_BT[learned_BT], reduction="sum") / learned_BT.sum().clamp(min=1)


def train_sft(
    model: PreTrainedModel,
    batches: Iterable[SftBatch],
    updates: int,
    learning_rate: float = 1e-3,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    warmup: int = 20,
    grad_clip: float = 1.0,
    on_update: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train in place, with linear warm-up and linear decay to 0.

    Args:
        batches: at least `updates` batches; a generator is read no further.
        learning_rate: of AdamW over the parameters that require a gradient (all, or the adapters); not used
            where `optimizers` are given.
        optimizers: other optimisers, each at its own peak learning rate.
        on_update: called with (updates done, loss) after each one.

    Returns:
        the loss of every update.

    Raises:
        ConfigError: the batches ran out before `updates`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizers is None:
        optimizers = [torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]

    scale = partial(scale_rate, updates=updates, warmup=warmup)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    training = model.training
    model.train()
    losses: list[float] = []
    for batch in itertools.islice(batches, updates):
        loss = sft_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if on_update is not None:
            on_update(len(losses), losses[-1])
    model.train(training)
    if len(losses) < updates:
        raise ConfigError(f"the batches ran out after {len(losses)} of {updates} updates: give more, or ask for fewer")
    return losses


def scale_rate(update: int, updates: int, warmup: int) -> float:
    """Share of the peak learning rate at an update (from 0): linear warm-up, and linear decay to 0 at `updates`."""
    return min((update + 1) / max(warmup, 1), 1.0) * max(1 - update / updates, 0.0)
