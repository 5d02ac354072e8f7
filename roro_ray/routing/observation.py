"""What a policy sees before it decides: the text so far, and the scalar signals that cost nothing.

The signals are scaled to about [0, 1] and stored with every step, so that training the router sees exactly
the numbers that the deciding router saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from roro_ray.engines.protocol import StepResult
from roro_ray.routing.cost import CostLedger
from roro_ray.types import Query, Step

FEATURE_NAMES: tuple[str, ...] = (
    "cost_weight",
    "step_index",
    "dear_share",
    "last_model",
    "last_confidence",
    "last_confidence_min",
    "mean_confidence",
    "peek_confidence",
    "peek_confidence_min",
    "peek_entropy",
    "has_peek",
)
_MAX_STEPS = 16  # of an episode of the embedded world
_WEIGHT_LOW, _WEIGHT_HIGH = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Observation:
    """The state before step `len(steps)`.

    `prefix` is the text so far as the dearest model reads it. `seed` fixes every draw of the policy, with
    the step's index. `ledger` takes the cost of whatever a policy computes in order to decide.
    """

    query: Query
    prefix: str
    steps: tuple[Step, ...]
    cost_weight: float
    pool_size: int
    peek: StepResult | None
    seed: int
    features: tuple[float, ...]
    ledger: CostLedger = field(default_factory=CostLedger, repr=False, compare=False)


def measure_confidence(log_probs: Sequence[float]) -> tuple[float, float]:
    """Mean and smallest probability of a step's tokens; (0, 0) where the engine reported none."""
    if not log_probs:
        return 0.0, 0.0
    probabilities = [math.exp(log_prob) for log_prob in log_probs]
    return sum(probabilities) / len(probabilities), min(probabilities)


def scale_cost_weight(cost_weight: float) -> float:
    """The cost weight on a logarithmic scale: 0 at 0.05 and below, 1 at 1.0.

    Weights are drawn log-uniformly in training, so the router sees them spread evenly.
    """
    low, high = math.log(_WEIGHT_LOW), math.log(_WEIGHT_HIGH)
    return (math.log(max(cost_weight, _WEIGHT_LOW)) - low) / (high - low)


def make_features(
    steps: Sequence[Step],
    cost_weight: float,
    pool_size: int,
    peek: StepResult | None = None,
    max_steps: int = _MAX_STEPS,
) -> tuple[float, ...]:
    """The scalar signals in the order of `FEATURE_NAMES`.

    Before the first step there is no confidence to report: 1.0 stands there (nothing went wrong yet). The step's index
    is given as a share of `max_steps` (`episode.max_steps`), so that traces of hundreds of steps stay within [0, 1]. A
    step by nobody of the pool (model -1) counts as one by the cheapest model.
    """
    top = max(pool_size - 1, 1)
    count = len(steps)
    last = steps[-1] if steps else None
    peek_mean, peek_min = measure_confidence(peek.log_probs) if peek is not None else (0.0, 0.0)
    return (
        scale_cost_weight(cost_weight),
        count / max_steps,
        sum(max(step.model, 0) for step in steps) / (top * count) if count else 0.0,
        max(last.model, 0) / top if last else 0.0,
        last.confidence if last else 1.0,
        last.confidence_min if last else 1.0,
        sum(step.confidence for step in steps) / count if count else 1.0,
        peek_mean,
        peek_min,
        1.0 - math.exp(-peek.first_entropy) if peek is not None and not math.isnan(peek.first_entropy) else 0.0,
        1.0 if peek is not None else 0.0,
    )
