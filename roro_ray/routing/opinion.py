"""From what the router thinks to what is done: the pure half of the router's policy.

The network may sit in another process, so what it reads and what it answers are plain values, and the rules
that turn its opinion into a decision (drawn, likeliest, or at a price) need no tensors. The priced rule is the
one knob of serving: see `tilt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.config import RouterConfig
from roro_ray.errors import ConfigError
from roro_ray.routing.draws import draw_uniform
from roro_ray.routing.observation import Observation
from roro_ray.types import Decision

# Middle of the range of weights that routers are trained on, on the logarithmic scale on which they are drawn.
TILT_CENTRE = math.sqrt(RouterConfig().cost_weight_low * RouterConfig().cost_weight_high)
# Nats by which the odds of the dearest model fall for each factor e of the cost weight. Routers trained here put their
# log-odds within 9 of 0, and ln(TILT_CENTRE / 0.01) = 3.2: at 3 a weight of 0.01 takes the dearest model always, and
# one of 10 the cheapest (docs/decisions.md).
TILT_GAIN = 3.0


@dataclass(frozen=True, slots=True)
class RouterReading:
    """What the network is given for one decision.

    `texts` are the query's text and each step's, without delimiters; `features` the signals of
    `observation.FEATURE_NAMES`.
    """

    texts: tuple[str, ...]
    features: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Opinion:
    """What the network thinks of one decision, and what its reading has to be charged.

    `log_probs` are over the pool, `version` is the weights'. `prefix_tokens` counts the text in the router's
    own tokens, `last_step_tokens` those of the last step (0 before the first), `flops_per_token` is the cost
    of reading one.
    """

    log_probs: tuple[float, ...]
    version: int
    prefix_tokens: int
    last_step_tokens: int
    flops_per_token: float


def make_reading(observation: Observation) -> RouterReading:
    """The part of an observation that the network reads."""
    return RouterReading(
        (observation.query.text, *(step.text for step in observation.steps)), tuple(observation.features)
    )


def charge_opinion(observation: Observation, opinion: Opinion) -> None:
    """Charge the router for the text that it had not read before this decision."""
    observation.ledger.charge_router(opinion.prefix_tokens, opinion.last_step_tokens, opinion.flops_per_token)


def decide_sampled(opinion: Opinion, observation: Observation) -> Decision:
    """Draw a model, with the uniform that the observation's seed and step index fix."""
    probabilities = _exponentiate(opinion.log_probs)
    model = _invert(probabilities, draw_uniform(observation.seed, len(observation.steps), "router"))
    return Decision(model, opinion.log_probs[model], probabilities, opinion.version)


def decide_greedy(opinion: Opinion) -> Decision:
    """Take the likeliest model."""
    probabilities = _exponentiate(opinion.log_probs)
    return Decision(probabilities.index(max(probabilities)), 0.0, probabilities, opinion.version)


def decide_priced(opinion: Opinion, cost_weight: float) -> Decision:
    """Take the likeliest model at a price: raising the cost weight never raises the model chosen.

    Each model's log-probability is shifted by `tilt(cost_weight)` times its place in the pool, from 0
    (cheapest) to 1 (dearest); of models that tie, the cheapest is taken. `Decision.probabilities` is the
    softmax of the shifted values.

    Raises:
        ConfigError: a cost weight that is negative or not finite.
    """
    shift = tilt(cost_weight)
    top = max(len(opinion.log_probs) - 1, 1)
    if math.isinf(shift):
        probabilities = tuple(float(model == top) for model in range(len(opinion.log_probs)))
        return Decision(top, 0.0, probabilities, opinion.version)
    tilted = [log_prob + shift * model / top for model, log_prob in enumerate(opinion.log_probs)]
    highest = max(tilted)
    masses = [math.exp(value - highest) for value in tilted]
    probabilities = tuple(mass / sum(masses) for mass in masses)
    return Decision(tilted.index(highest), 0.0, probabilities, opinion.version)


def tilt(cost_weight: float) -> float:
    """Nats that a cost weight adds to the log-odds of the dearest model over the cheapest.

    Falls with the weight, by `TILT_GAIN` for each factor e; 0 at `TILT_CENTRE`, infinite at 0. A policy of
    greatest entropy is softmax(value / temperature), so that another price of the dear model is a shift of its
    logit; a router's own reading of the cost weight moves it too little to span the frontier.

    Raises:
        ConfigError: a cost weight that is negative or not finite.
    """
    if not (math.isfinite(cost_weight) and cost_weight >= 0):
        raise ConfigError(
            f"the cost weight is {cost_weight}: expected a finite number of at least 0; "
            f"0 always takes the dearest model, {TILT_CENTRE:.2g} is what the router thinks itself, more is cheaper"
        )
    if cost_weight == 0:
        return math.inf
    return -TILT_GAIN * (math.log(cost_weight) - math.log(TILT_CENTRE))


def _exponentiate(log_probs: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.exp(log_prob) for log_prob in log_probs)


def _invert(probabilities: Sequence[float], uniform: float) -> int:
    """The model at which the cumulative probability passes the uniform."""
    total = 0.0
    for model, probability in enumerate(probabilities):
        total += probability
        if uniform < total:
            return model
    return len(probabilities) - 1  # rounding left the total just below 1
