"""One GRPO update of a language model from a batch of sampled completions, in micro-batches that change no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roro_ray.learning.grpo import LossInputs, make_denominator, make_loss
from roro_ray.learning.sequences import TokenBatch, lm_log_probs, split_batch

Score = Callable[[TokenBatch], tuple[Tensor, Tensor]]
_SUMS = ("loss", "tokens", "rows")


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """How a batch is turned into one optimiser step.

    `max_length` is the constant L of `dr_grpo`: give the sampler's `max_new_tokens`. `max_tokens` bounds the
    padded tokens of one forward pass. `temperature` is the one that the completions were sampled at.
    """

    max_length: int
    normalisation: str = "dr_grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    grad_clip: float = 1.0
    temperature: float = 1.0
    max_tokens: int = 4096


def update_model(
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    batch: TokenBatch,
    settings: UpdateSettings,
    reference: PreTrainedModel | None = None,
) -> dict[str, float]:
    """Take one step on the whole batch; a batch without action tokens takes none.

    Args:
        batch: rows with their advantages; leave out the rows that `make_advantages` dropped (`TokenBatch.select`).
        reference: frozen model of the KL term, needed only with a `kl_weight`.

    Returns:
        metrics of `make_loss` (sums for loss and counts, means over tokens for the rest) and `grad_norm`;
        `empty` is 1 where nothing was learned.
    """
    denominator = make_denominator(batch.action_mask_BT, settings.normalisation, settings.max_length)
    if denominator == 0:
        return {"empty": 1.0, "tokens": 0.0, "rows": 0.0, "loss": 0.0, "grad_norm": 0.0}
    totals: dict[str, float] = {}
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    score = partial(lm_log_probs, model, temperature=settings.temperature)
    score_reference = None if reference is None else partial(lm_log_probs, reference, temperature=settings.temperature)
    for part in split_batch(batch, settings.max_tokens):
        add_metrics(totals, backward_part(part, score, settings, denominator, score_reference))
    metrics = mean_metrics(totals)
    parameters = [p for p in model.parameters() if p.grad is not None]
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip))
    for optimizer in optimizers:
        optimizer.step()
    return metrics


def backward_part(
    part: TokenBatch,
    score: Score,
    settings: UpdateSettings,
    denominator: float,
    reference: Score | None = None,
) -> dict[str, float]:
    """Add the gradient of one micro-batch; its metrics.

    Args:
        score: log-probabilities and entropies [B, T] of a batch, with gradients.
        denominator: `make_denominator` of the whole batch.
        reference: log-probabilities of the KL term; called without gradients.
    """
    log_probs_BT, entropy_BT = score(part)
    reference_BT = None
    if reference is not None:
        with torch.no_grad():
            reference_BT, _ = reference(part)
    inputs = LossInputs(
        log_probs_BT, part.old_log_probs_BT, part.advantages_B, part.action_mask_BT, entropy_BT, reference_BT
    )
    output = make_loss(
        inputs,
        settings.clip_low,
        settings.clip_high,
        settings.normalisation,
        settings.entropy_weight,
        settings.kl_weight,
        denominator,
    )
    output.loss.backward()
    return output.metrics


def add_metrics(totals: dict[str, float], metrics: dict[str, float]) -> None:
    """Add a micro-batch's metrics to the sums over the batch: means count by their tokens."""
    for name, value in metrics.items():
        weight = 1.0 if name in _SUMS else metrics["tokens"]
        totals[name] = totals.get(name, 0.0) + weight * value


def mean_metrics(totals: dict[str, float]) -> dict[str, float]:
    """The metrics of a whole batch from the sums of `add_metrics`."""
    return {n: v if n in _SUMS else v / totals["tokens"] for n, v in totals.items()}
