"""What an update makes of rollouts that earlier weights made: the policy it is clipped around, and weights.

A trajectory that lags was drawn from the acting policy mu, while the weights are at pi_old when its update begins.

* `ppo` clips the ratio pi / mu around mu itself. It needs nothing else, but the lag uses up the clip range: a decision
  that the updates in between have moved past the border has no gradient, in either of the directions it was moved.
* `decoupled` clips pi / pi_old around pi_old, and weighs every decision by pi_old / mu, cut at `cap`: mu only corrects
  whose sample it is, pi_old bounds the step (Hilton et al., "Batch size-invariance for policy optimization",
  arXiv 2110.00641, eq. 7; AReaL, arXiv 2505.24298, eq. 5). The cut keeps one rare decision from ruling a batch
  (truncated importance sampling, as in IMPALA, arXiv 1802.01561) at the price of a bias towards mu.

Without a lag pi_old is mu, and the two are the same. Axes: `_B` trajectories, `_D` decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LagCorrection:
    """What the loss reads in place of log-probabilities of the acting policy alone.

    `reference_BD` are the log-probabilities that ratios are taken against; advantages are multiplied by `weights_BD`.
    The sums run over decisions: `kl` estimates KL(mu || pi_old) in nats (k3), `cut` counts weights at the cap.
    """

    reference_BD: Tensor
    weights_BD: Tensor
    sums: dict[str, float]


def correct_lag(acting_BD: Tensor, present_BD: Tensor, mask_BD: Tensor, objective: str, cap: float) -> LagCorrection:
    """References and weights of one batch.

    Args:
        acting_BD: log-probabilities of the actions under the weights that acted.
        present_BD: the same under the weights as they are before the update.
        mask_BD: True at decisions; elsewhere both may be anything, and weights are 1.
        objective: `ppo` or `decoupled`.
        cap: most that a decision may weigh.
    """
    gap_BD = torch.where(mask_BD, present_BD - acting_BD, torch.zeros_like(acting_BD))
    ratio_BD = gap_BD.exp()
    sums = {"lag_kl": float((ratio_BD - 1 - gap_BD).sum()), "lag_cut": 0.0}
    if objective == "ppo":
        return LagCorrection(acting_BD, torch.ones_like(acting_BD), sums)
    sums["lag_cut"] = float((ratio_BD > cap).sum())
    return LagCorrection(present_BD, ratio_BD.clamp(max=cap), sums)
