"""Group-relative policy optimisation as pure functions: advantages from rewards and group ids, loss from a struct.

One code serves the router (tokens are its decisions), the Rubricor and the Judge (tokens are text). Nothing
here does I/O, knows a model or relies on the position of a row: the group id is a field.

Axes: `_B` rows (one sampled sequence each), `_T` tokens or decisions of a row.

Normalisations, by name (r: rewards of one group; n_i: action tokens of row i; B: rows with an action token):

| name      | advantage                     | sum over tokens of the per-token loss, divided by |
|-----------|-------------------------------|---------------------------------------------------|
| `dr_grpo` | r - mean(r)                   | B x L, L a constant length (`max_length`)         |
| `group`   | (r - mean(r)) / (std(r) + e)  | each row by its n_i, then all by B                |
| `dapo`    | (r - mean(r)) / (std(r) + e)  | the sum of n_i over all rows                      |

Sources: Dr. GRPO (arXiv 2503.20783), GRPO (arXiv 2402.03300, eq. 3), DAPO (arXiv 2503.14476, eq. 8).
std is the sample standard deviation (divisor G - 1) and e = 1e-4, as in TRL.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from roro_ray.errors import ConfigError, did_you_mean

NORMALISATIONS = ("dr_grpo", "group", "dapo")
STD_EPSILON = 1e-4
CONSTANT_SPREAD = 1e-6  # a group whose rewards differ by less tells nothing; float32 sums differ by about 1e-7


class EmptyBatchWarning(RuntimeWarning):
    """Every row of a batch was dropped, so that there is nothing to learn from it."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What `make_loss` reads; every `_BT` tensor has one entry per token, aligned with `mask_BT`.

    `advantages` is [B] (one per row, given to each of its tokens) or [B, T]. `log_probs_BT` carries the gradient,
    and so does `entropy_BT`; `old_log_probs_BT` (of the weights that sampled) and `reference_log_probs_BT` do not.
    Entries outside the mask are ignored, whatever their value.
    """

    log_probs_BT: Tensor
    old_log_probs_BT: Tensor
    advantages: Tensor
    mask_BT: Tensor
    entropy_BT: Tensor | None = None
    reference_log_probs_BT: Tensor | None = None
    group_ids_B: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The scalar loss and its metrics.

    `empty` says that no token was left to learn from and no global denominator was given: the loss is then 0
    with zero gradient, and the caller has to say so or draw again, not to step in silence.
    """

    loss: Tensor
    metrics: dict[str, float]
    empty: bool = False


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """How many rows and groups came in, and how many of them were dropped, and why."""

    rows: int
    groups: int
    error_rows: int
    constant_groups: int
    dropped_rows: int

    @property
    def empty(self) -> bool:
        """Nothing is left."""
        return self.dropped_rows == self.rows


def _check_normalisation(normalisation: str) -> None:
    if normalisation not in NORMALISATIONS:
        raise ConfigError(
            f"unknown normalisation {normalisation!r}: expected one of {', '.join(NORMALISATIONS)}"
            f"{did_you_mean(normalisation, NORMALISATIONS)}"
        )


def make_advantages(rewards_B: Tensor, group_ids_B: Tensor, normalisation: str = "dr_grpo") -> tuple[Tensor, Tensor]:
    """Advantages of rows relative to their group.

    A reward that is not finite is an error value: its row is dropped and leaves its group's statistics alone.
    A group whose remaining rewards are all equal (or that has one row) is dropped whole. `count_groups` counts
    both; an `EmptyBatchWarning` is issued when nothing is left.

    Args:
        rewards_B: one reward a row, NaN where none could be computed.
        group_ids_B: integers, any values in any order; groups may differ in size.
        normalisation: `dr_grpo`, `group` or `dapo` (the table of this module).

    Returns:
        advantages_B (0 where dropped) and kept_B (bool). Dropped rows must not count in the loss: select the
        kept ones, or set their mask to False.

    Raises:
        ConfigError: unknown normalisation, or shapes that differ.
    """
    _check_normalisation(normalisation)
    if rewards_B.ndim != 1 or rewards_B.shape != group_ids_B.shape:
        raise ConfigError(
            f"rewards have shape {tuple(rewards_B.shape)} and group ids {tuple(group_ids_B.shape)}: "
            "give one reward and one group id per row"
        )
    valid_B, constant_B, mean_B, std_B = _group_statistics(rewards_B, group_ids_B)
    kept_B = valid_B & ~constant_B
    advantages_B = rewards_B - mean_B
    if normalisation != "dr_grpo":
        advantages_B = advantages_B / (std_B + STD_EPSILON)
    if not bool(kept_B.any()):
        warnings.warn(
            f"nothing to learn from {len(rewards_B)} rows: {int((~valid_B).sum())} have no reward, and every group "
            "of the others has one constant reward; draw harder queries, larger groups or more exploration",
            EmptyBatchWarning,
            stacklevel=2,
        )
    return torch.where(kept_B, advantages_B, torch.zeros_like(advantages_B)), kept_B


def _group_statistics(rewards_B: Tensor, group_ids_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: has a reward, its group is constant, its group's mean and sample standard deviation."""
    rewards_B = rewards_B if rewards_B.is_floating_point() else rewards_B.float()
    valid_B = rewards_B.isfinite()
    _, group_B = torch.unique(group_ids_B, return_inverse=True)
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    values_B = torch.where(valid_B, rewards_B, torch.zeros_like(rewards_B))
    zeros_G = values_B.new_zeros(groups)
    count_G = zeros_G.index_add(0, group_B, valid_B.to(values_B.dtype))
    mean_B = (zeros_G.index_add(0, group_B, values_B) / count_G.clamp(min=1))[group_B]
    centred_B = torch.where(valid_B, values_B - mean_B, torch.zeros_like(values_B))
    variance_G = zeros_G.index_add(0, group_B, centred_B.square()) / (count_G - 1).clamp(min=1)
    infinity = float("inf")
    low_G = torch.full_like(zeros_G, infinity).scatter_reduce(
        0, group_B, values_B.masked_fill(~valid_B, infinity), "amin"
    )
    high_G = torch.full_like(zeros_G, -infinity).scatter_reduce(
        0, group_B, values_B.masked_fill(~valid_B, -infinity), "amax"
    )
    constant_G = high_G - low_G < CONSTANT_SPREAD  # also true of a group without any reward: -inf - inf
    return valid_B, constant_G[group_B], mean_B, variance_G.sqrt()[group_B]


def _count_distinct(ids_B: Tensor) -> int:
    return len(set(ids_B.tolist()))


def count_groups(rewards_B: Tensor, group_ids_B: Tensor) -> GroupCounts:
    """Count what `make_advantages` drops; `constant_groups` includes groups with fewer than two rewards."""
    valid_B, constant_B, _, _ = _group_statistics(rewards_B, group_ids_B)
    return GroupCounts(
        rows=len(rewards_B),
        groups=_count_distinct(group_ids_B),
        error_rows=int((~valid_B).sum()),
        constant_groups=_count_distinct(group_ids_B[constant_B]),
        dropped_rows=int((~valid_B | constant_B).sum()),
    )


def make_denominator(mask_BT: Tensor, normalisation: str = "dr_grpo", max_length: int | None = None) -> float:
    """What the summed loss is divided by, for a whole batch (last column of the module's table).

    Compute it once over the batch, or add it up over micro-batches and ranks, and give it to every `make_loss`:
    the sum of their losses is then the loss of the whole batch. (DDP averages gradients over W ranks instead of
    adding them: divide the global denominator by W there.)

    Args:
        mask_BT: action mask; rows without a token (dropped ones) do not count.
        max_length: the constant L of `dr_grpo`; the padded width T when None.
    """
    _check_normalisation(normalisation)
    if normalisation == "dapo":
        return float(mask_BT.sum())
    rows = float(mask_BT.any(dim=1).sum())
    if normalisation == "group":
        return rows
    return rows * (mask_BT.shape[1] if max_length is None else max_length)


def make_loss(
    inputs: LossInputs,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalisation: str = "dr_grpo",
    entropy_weight: float = 0.0,
    kl_weight: float = 0.0,
    denominator: float | None = None,
    max_length: int | None = None,
) -> LossOutput:
    """Clipped policy-gradient loss (PPO, arXiv 1707.06347, with group-relative advantages).

    Per token: `-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_weight KL - entropy_weight H`,
    with ratio = exp(log_prob - old_log_prob) and KL the estimator exp(d) - d - 1, d = reference - log_prob
    (GRPO, eq. 4). Tokens are added up and divided by the normalisation's denominator (the module's table); all
    three terms share it, so that their balance does not depend on lengths.

    Args:
        inputs: log-probabilities, advantages and masks.
        clip_low, clip_high: distances of the two clip borders from 1.
        denominator: `make_denominator` of the whole batch, where `inputs` is only a part of it.
        max_length: the constant L of `dr_grpo` where no denominator is given; the padded width T when None.

    Raises:
        ConfigError: unknown normalisation, a KL or entropy weight without its tensor, shapes that differ.
    """
    _check_inputs(inputs, normalisation, entropy_weight, kl_weight)
    mask_BT = inputs.mask_BT.bool()
    if denominator is None:
        denominator = make_denominator(mask_BT, normalisation, max_length)
    token_loss_N, sums = _token_losses(inputs, mask_BT, (1 - clip_low, 1 + clip_high), entropy_weight, kl_weight)
    if normalisation == "group":
        lengths_B1 = mask_BT.sum(dim=1, keepdim=True)
        token_loss_N = token_loss_N / lengths_B1.expand_as(mask_BT)[mask_BT]
    empty = denominator <= 0
    loss = token_loss_N.sum() / (1.0 if empty else denominator)
    return LossOutput(loss, _make_metrics(inputs, mask_BT, loss, sums, empty), empty)


def _token_losses(
    inputs: LossInputs, mask_BT: Tensor, borders: tuple[float, float], entropy_weight: float, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every action token, and the sums over tokens that the metrics are made of."""
    # Selecting before the mathematics keeps infinities and NaN outside the mask out of the gradient.
    log_probs_N = inputs.log_probs_BT[mask_BT]
    log_ratio_N = log_probs_N - inputs.old_log_probs_BT[mask_BT].detach()
    advantages = inputs.advantages if inputs.advantages.ndim == 2 else inputs.advantages[:, None]
    advantages_N = advantages.expand_as(mask_BT)[mask_BT]
    ratio_N = log_ratio_N.exp()
    low, high = borders
    token_loss_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    with torch.no_grad():
        sums = {
            "ratio": ratio_N.sum(),
            "clip_fraction": (((ratio_N < low) & (advantages_N < 0)) | ((ratio_N > high) & (advantages_N > 0))).sum(),
            "old_kl": (ratio_N - 1 - log_ratio_N).sum(),  # KL(old || new), the estimator k3
            "advantage_abs": advantages_N.abs().sum(),
        }
    if inputs.reference_log_probs_BT is not None:
        distance_N = inputs.reference_log_probs_BT[mask_BT].detach() - log_probs_N
        kl_N = distance_N.exp() - distance_N - 1
        token_loss_N = token_loss_N + kl_weight * kl_N
        sums["kl"] = kl_N.detach().sum()
    if inputs.entropy_BT is not None:
        entropy_N = inputs.entropy_BT[mask_BT]
        token_loss_N = token_loss_N - entropy_weight * entropy_N
        sums["entropy"] = entropy_N.detach().sum()
    return token_loss_N, sums


def _make_metrics(
    inputs: LossInputs, mask_BT: Tensor, loss: Tensor, sums: dict[str, Tensor], empty: bool
) -> dict[str, float]:
    """Token means of the sums, and the counts of what was learned from."""
    tokens = int(mask_BT.sum())
    metrics = {name: float(value) / max(tokens, 1) for name, value in sums.items()}
    metrics |= {"loss": float(loss.detach()), "tokens": float(tokens), "empty": float(empty)}
    metrics["rows"] = float(mask_BT.any(dim=1).sum())
    if inputs.group_ids_B is not None:
        metrics["groups"] = float(_count_distinct(inputs.group_ids_B[mask_BT.any(dim=1)]))
    return metrics


def _check_inputs(inputs: LossInputs, normalisation: str, entropy_weight: float, kl_weight: float) -> None:
    _check_normalisation(normalisation)
    if kl_weight and inputs.reference_log_probs_BT is None:
        raise ConfigError(f"kl_weight is {kl_weight} but reference_log_probs_BT is missing: give it, or set it to 0")
    if entropy_weight and inputs.entropy_BT is None:
        raise ConfigError(f"entropy_weight is {entropy_weight} but entropy_BT is missing: give it, or set it to 0")
    shape = inputs.mask_BT.shape
    for name in ("log_probs_BT", "old_log_probs_BT", "entropy_BT", "reference_log_probs_BT"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, expected the mask's {tuple(shape)}")
    if inputs.advantages.shape not in (shape, shape[:1]):
        raise ConfigError(
            f"advantages have shape {tuple(inputs.advantages.shape)}, expected {tuple(shape[:1])} or {tuple(shape)}"
        )
