"""Routing policies: a peek, a signal and a rule each. Every baseline of the field is a few lines here.

A strategy is a string (`random:0.3`), so that it travels through configs, Parquet and remote calls. Policies
keep no state between decisions: draws come from the observation's seed and the step's index alone, so that an
episode is the same whatever else runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from roro_ray.config import STEP_DELIMITER
from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.routing.draws import draw_uniform
from roro_ray.routing.observation import Observation, measure_confidence
from roro_ray.types import Decision, Peek

if TYPE_CHECKING:
    from roro_ray.engines.pool import EnginePool


class Policy(Protocol):
    """Decides which model writes the next step; `version` is -1 for a policy without weights."""

    @property
    def peek(self) -> Peek:
        """What of the cheapest model's next step the observation must hold."""
        ...

    @property
    def version(self) -> int:
        """The version of the weights that decide."""
        ...

    async def decide(self, observation: Observation) -> Decision:
        """Choose a model of the pool."""
        ...


class TrainedPolicy(Policy, Protocol):
    """A policy with weights, which samples, and has twins that take the likeliest model, as it is or at a price."""

    def as_greedy(self) -> Policy:
        """The same weights, deciding by argmax."""
        ...

    def as_priced(self) -> Policy:
        """The same weights, deciding by argmax at the price that the episode's cost weight sets."""
        ...


def choose_model(model: int, pool_size: int, signal: float | None = None) -> Decision:
    """A certain decision, and the signal that it was read from."""
    return Decision(model, 0.0, tuple(float(index == model) for index in range(pool_size)), signal=signal)


class _Rule:
    peek: ClassVar[Peek] = Peek.NONE
    version: ClassVar[int] = -1


@dataclass(frozen=True)
class FixedPolicy(_Rule):
    """One model writes every step."""

    model: int

    async def decide(self, observation: Observation) -> Decision:
        return choose_model(self.model, observation.pool_size)


@dataclass(frozen=True)
class RandomPolicy(_Rule):
    """Each step goes to a dearer model with probability `share`; among several dearer ones, to any of them."""

    share: float

    async def decide(self, observation: Observation) -> Decision:
        dearer = observation.pool_size - 1
        probabilities = (1 - self.share, *(self.share / dearer for _ in range(dearer)))
        uniform = draw_uniform(observation.seed, len(observation.steps), "random")
        if uniform >= self.share:
            return Decision(0, math.log(probabilities[0]), probabilities)
        model = 1 + int(uniform / self.share * dearer)
        return Decision(model, math.log(probabilities[model]), probabilities)


@dataclass(frozen=True)
class BlocksPolicy(_Rule):
    """Blocks of `length` steps by the cheapest and by the dearest model in turn; the seed sets the phase."""

    length: int

    async def decide(self, observation: Observation) -> Decision:
        phase = int(draw_uniform(observation.seed, "phase") * 2 * self.length)
        dear = (len(observation.steps) + phase) // self.length % 2 == 1
        return choose_model(observation.pool_size - 1 if dear else 0, observation.pool_size)


@dataclass(frozen=True)
class PeriodicPolicy(_Rule):
    """Every `period`-th step by the dearest model; the seed sets the phase."""

    period: int

    async def decide(self, observation: Observation) -> Decision:
        phase = int(draw_uniform(observation.seed, "phase") * self.period)
        dear = (len(observation.steps) + phase) % self.period == 0
        return choose_model(observation.pool_size - 1 if dear else 0, observation.pool_size)


@dataclass(frozen=True)
class ScriptPolicy(_Rule):
    """A fixed assignment, by index of the step in the whole trajectory; the last entry is repeated."""

    models: tuple[int, ...]

    async def decide(self, observation: Observation) -> Decision:
        index = min(len(observation.steps), len(self.models) - 1)
        return choose_model(self.models[index], observation.pool_size)


@dataclass(frozen=True)
class ConfidencePolicy(_Rule):
    """The cheapest model drafts the step; if any token's probability is below `threshold`, the dearest writes it."""

    threshold: float
    peek: ClassVar[Peek] = Peek.STEP

    async def decide(self, observation: Observation) -> Decision:
        assert observation.peek is not None, "the episode loop must peek a step for this policy"
        _, confidence = measure_confidence(observation.peek.log_probs)
        dear = confidence < self.threshold
        return choose_model(observation.pool_size - 1 if dear else 0, observation.pool_size, confidence)


@dataclass(frozen=True)
class PriorConfidencePolicy(_Rule):
    """The dearest model writes if the least certain token of the previous step was below `threshold` (no peek).

    The previous step counts whoever wrote it: else one uncertain step would send all later ones to the dearest.
    """

    threshold: float

    async def decide(self, observation: Observation) -> Decision:
        confidence = observation.steps[-1].confidence_min if observation.steps else 1.0
        dear = confidence < self.threshold
        return choose_model(observation.pool_size - 1 if dear else 0, observation.pool_size, confidence)


@dataclass(frozen=True)
class GlimpsePolicy(_Rule):
    """The dearest model writes if the entropy (nats) of the cheapest one's first token exceeds `threshold`."""

    threshold: float
    peek: ClassVar[Peek] = Peek.FIRST_TOKEN

    async def decide(self, observation: Observation) -> Decision:
        assert observation.peek is not None, "the episode loop must peek a token for this policy"
        entropy = observation.peek.first_entropy
        dear = entropy > self.threshold
        return choose_model(observation.pool_size - 1 if dear else 0, observation.pool_size, entropy)


@dataclass(frozen=True)
class DraftVerifyPolicy(_Rule):
    """The dearest model scores the cheapest one's draft and rewrites it if it finds it unlikely.

    The score is the geometric mean of the draft's token probabilities under the dearest model; reading the
    draft is charged as the dearest model's prefill.
    """

    threshold: float
    pool: EnginePool
    peek: ClassVar[Peek] = Peek.STEP

    async def decide(self, observation: Observation) -> Decision:
        draft = observation.peek
        assert draft is not None, "the episode loop must peek a step for this policy"
        top = observation.pool_size - 1
        text = draft.text + (STEP_DELIMITER if draft.finish == "delimiter" else "")
        if not text:
            return choose_model(top, observation.pool_size)  # nothing was drafted, so there is nothing to verify
        scores = await self.pool.engines[top].score_choices(observation.prefix, (text,))
        observation.ledger.charge_verification(top, scores.prefix_tokens, scores.tokens[0])
        likely = math.exp(scores.log_probs[0] / max(scores.tokens[0], 1))
        return choose_model(top if likely < self.threshold else 0, observation.pool_size, likely)


def _read_float(strategy: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"strategy {strategy!r}: got {text!r}, expected a number from {low:g} to {high:g} after ':'")
    return value


def _read_int(strategy: str, text: str, low: int, high: int | None = None) -> int:
    value = int(text) if text.strip().isdecimal() else -1
    if value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"strategy {strategy!r}: got {text!r}, expected a whole number {limit} after ':'")
    return value


def _read_script(strategy: str, text: str, pool_size: int) -> tuple[int, ...]:
    return tuple(_read_int(strategy, part, 0, pool_size - 1) for part in text.split(","))


# strategy name: how its policy is made of (the whole strategy, what follows ':', the pool)
_MAKERS: dict[str, Callable[[str, str, EnginePool], Policy]] = {
    "fixed": lambda s, x, pool: FixedPolicy(_read_int(s, x, 0, pool.size - 1)),
    "random": lambda s, x, pool: RandomPolicy(_read_float(s, x, 0.0, 1.0)),
    "blocks": lambda s, x, pool: BlocksPolicy(_read_int(s, x, 1)),
    "periodic": lambda s, x, pool: PeriodicPolicy(_read_int(s, x, 1)),
    "threshold": lambda s, x, pool: ConfidencePolicy(_read_float(s, x, 0.0, math.inf)),
    "confidence": lambda s, x, pool: ConfidencePolicy(_read_float(s, x, 0.0, math.inf)),
    "prior_confidence": lambda s, x, pool: PriorConfidencePolicy(_read_float(s, x, 0.0, math.inf)),
    "draft_verify": lambda s, x, pool: DraftVerifyPolicy(_read_float(s, x, 0.0, math.inf), pool),
    "glimpse": lambda s, x, pool: GlimpsePolicy(_read_float(s, x, -math.inf, math.inf)),
    "script": lambda s, x, pool: ScriptPolicy(_read_script(s, x, pool.size)),
}
# those that need a trained router: which twin of its policy they are
_TRAINED: dict[str, Callable[[TrainedPolicy], Policy]] = {
    "router": lambda router: router,
    "router_greedy": lambda router: router.as_greedy(),
    "router_priced": lambda router: router.as_priced(),
}
STRATEGY_NAMES: tuple[str, ...] = (*_MAKERS, *_TRAINED)


def make_policy(strategy: str, pool: EnginePool, router: TrainedPolicy | None = None) -> Policy:
    """The policy that a strategy names, for a pool.

    Args:
        strategy: `fixed:M`, `random:SHARE`, `blocks:LEN`, `periodic:K`, `confidence:TAU` (also `threshold:TAU`),
            `prior_confidence:TAU`, `draft_verify:TAU`, `glimpse:TAU`, `script:0,1,..`, `router` (sampled),
            `router_greedy` or `router_priced` (the episode's cost weight sets the price of the dearer models).
        router: the trained router behind the last three.

    Raises:
        ConfigError: unknown strategy, a value out of range, or no router where one is needed.
    """
    name, _, value = strategy.partition(":")
    if name in _TRAINED:
        if value:
            raise ConfigError(f"strategy {strategy!r} takes no value: expected {name!r}")
        if router is None:
            raise ConfigError(f"strategy {strategy!r} needs a trained router and got none: train or load one first")
        return _TRAINED[name](router)
    if name not in _MAKERS:
        hint = did_you_mean(name, STRATEGY_NAMES)
        raise ConfigError(f"unknown strategy {strategy!r}: expected one of {', '.join(STRATEGY_NAMES)}{hint}")
    return _MAKERS[name](strategy, value, pool)
