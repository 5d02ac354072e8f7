"""One GRPO update of a language model from a batch of sampled completions, in micro-batches that change no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from roro_ray.learning.grpo import LossInputs, make_denominator, make_loss
from roro_ray.learning.sequences import TokenBatch, lm_log_probs, split_batch


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
    for part in split_batch(batch, settings.max_tokens):
        metrics = _backward(model, part, settings, denominator, reference)
        for name, value in metrics.items():
            weight = 1.0 if name in ("loss", "tokens", "rows") else metrics["tokens"]
            totals[name] = totals.get(name, 0.0) + weight * value
    metrics = {n: v if n in ("loss", "tokens", "rows") else v / totals["tokens"] for n, v in totals.items()}
    parameters = [p for p in model.parameters() if p.grad is not None]
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip))
    for optimizer in optimizers:
        optimizer.step()
    return metrics


def _backward(
    model: PreTrainedModel,
    part: TokenBatch,
    settings: UpdateSettings,
    denominator: float,
    reference: PreTrainedModel | None,
) -> dict[str, float]:
    """Add the gradient of one micro-batch; its metrics."""
    log_probs_BT, entropy_BT = lm_log_probs(model, part, settings.temperature)
    reference_BT = None
    if reference is not None:
        with torch.no_grad():
            reference_BT, _ = lm_log_probs(reference, part, settings.temperature)
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
