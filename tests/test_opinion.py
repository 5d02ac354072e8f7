"""The rules that turn a router's opinion into a decision, on opinions made by hand."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_ray.config import RouterConfig
from roro_ray.errors import ConfigError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.observation import Observation, make_features
from roro_ray.routing.opinion import (
    TILT_CENTRE,
    TILT_GAIN,
    Opinion,
    charge_opinion,
    decide_greedy,
    decide_priced,
    decide_sampled,
    make_reading,
    tilt,
)
from roro_ray.routing.router import make_router
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.types import Decision, Step, Usage
from tests.fakes import make_query

pytestmark = pytest.mark.timeout(60)


def make_opinion(*odds: float) -> Opinion:
    """An opinion whose log-probabilities differ by these log-odds against the cheapest model."""
    logits = (0.0, *odds)
    total = math.log(sum(math.exp(logit) for logit in logits))
    return Opinion(tuple(logit - total for logit in logits), 7, 12, 5, 100.0)


def observe(seed: int = 0, texts: tuple[str, ...] = (), weight: float = 0.2) -> Observation:
    steps = tuple(Step(0, text, 3, 0.9, 0.8, "delimiter", Decision(0, 0.0, (1.0, 0.0)), Usage()) for text in texts)
    prefix = "\n\n".join(["Say q.", *texts, ""])
    features = make_features(steps, weight, 2)
    return Observation(make_query(), prefix, steps, weight, 2, None, seed, features, CostLedger((10.0, 100.0)))


def test_the_tilt_is_nothing_in_the_middle_and_falls_by_its_gain() -> None:
    config = RouterConfig()
    assert math.sqrt(config.cost_weight_low * config.cost_weight_high) == TILT_CENTRE
    assert tilt(TILT_CENTRE) == 0.0 and tilt(0.0) == math.inf
    assert tilt(TILT_CENTRE / math.e) == pytest.approx(TILT_GAIN) == -tilt(TILT_CENTRE * math.e)
    weights = [0.0, 1e-300, 0.01, 0.1, 1.0, 10.0, 1e300]
    assert sorted(map(tilt, weights), reverse=True) == [tilt(weight) for weight in weights]
    assert len({tilt(weight) for weight in weights}) == len(weights)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, -math.inf])
def test_a_cost_weight_that_is_no_price_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="finite number of at least 0"):
        decide_priced(make_opinion(0.0), weight)


def test_a_priced_decision_by_hand() -> None:
    # Log-odds of 1 for the large model; a weight of e times the centre takes 3 off them.
    opinion = make_opinion(1.0)
    assert decide_priced(opinion, TILT_CENTRE).model == 1
    decision = decide_priced(opinion, TILT_CENTRE * math.e)
    assert (decision.model, decision.log_prob, decision.version) == (0, 0.0, 7)
    assert decision.probabilities == pytest.approx(
        (1 / (1 + math.exp(1 - TILT_GAIN)), 1 / (1 + math.exp(TILT_GAIN - 1)))
    )
    # Of three models, the middle one is shifted by half: at -2 nats for the dearest, 1 - 1 and 1.5 - 2.
    three = make_opinion(1.0, 1.5)
    weight = TILT_CENTRE * math.exp(2 / TILT_GAIN)
    shares = [math.exp(logit) for logit in (0.0, 0.0, -0.5)]
    assert decide_priced(three, weight).probabilities == pytest.approx([share / sum(shares) for share in shares])
    assert decide_priced(three, TILT_CENTRE).model == 2
    assert decide_priced(make_opinion(0.0, 0.0), TILT_CENTRE).model == 0, "of equals the cheapest"


def test_at_the_centre_a_price_changes_nothing() -> None:
    opinion = make_opinion(-0.3, 0.8, 0.1)
    priced, greedy = decide_priced(opinion, TILT_CENTRE), decide_greedy(opinion)
    assert priced.model == greedy.model == 2
    assert priced.probabilities == pytest.approx(greedy.probabilities)


odds = st.lists(st.floats(-30, 30), min_size=1, max_size=4)
weights = st.floats(0, 1e6, allow_subnormal=False)


@given(odds, weights, weights)
@settings(max_examples=300, deadline=None)
def test_raising_the_weight_never_raises_the_chosen_model(odds: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    opinion = make_opinion(*odds)
    cheap, dear = decide_priced(opinion, high), decide_priced(opinion, low)
    assert cheap.model <= dear.model
    for decision in (cheap, dear):
        assert math.isclose(sum(decision.probabilities), 1.0)
        assert decision.probabilities[decision.model] == max(decision.probabilities)


@given(st.floats(-9, 9))
@settings(deadline=None)
def test_the_range_of_weights_spans_what_routers_put_in_their_odds(odds: float) -> None:
    assert decide_priced(make_opinion(odds), 0.01).model == 1
    assert decide_priced(make_opinion(odds), 10.0).model == 0
    assert decide_priced(make_opinion(odds * 10), 0.0) == Decision(1, 0.0, (0.0, 1.0), 7)


def test_sampling_and_greed() -> None:
    opinion = make_opinion(math.log(0.25))  # 0.8 and 0.2
    drawn = [decide_sampled(opinion, observe(seed)) for seed in range(4000)]
    assert abs(sum(decision.model for decision in drawn) / 4000 - 0.2) < 0.025  # four standard errors
    assert {decision.log_prob for decision in drawn} == set(opinion.log_probs)
    assert decide_greedy(opinion) == Decision(0, 0.0, drawn[0].probabilities, 7)


def test_a_reading_holds_texts_and_signals_and_the_opinion_what_it_costs() -> None:
    observation = observe(texts=("A: one", "B: two"))
    reading = make_reading(observation)
    assert reading.texts == ("Say q.", "A: one", "B: two") and reading.features == observation.features
    charge_opinion(observation, Opinion((0.0, -9.0), 1, 12, 5, 100.0))
    assert observation.ledger.commit(0, 3).flops == 12 * 100.0


def test_an_opinion_asked_for_apart_gives_the_policys_own_decisions() -> None:
    """What a process without the network does with an opinion is what the policy does."""
    policy = RouterPolicy(make_router(RouterConfig(), 2), 5)
    observations = [observe(seed, ("A: one",) * (seed % 3), weight) for seed in range(6) for weight in (0.01, 0.2, 3.0)]

    async def decide(observation: Observation) -> None:
        opinion = await policy.judge_reading(make_reading(observation))
        assert (opinion.version, opinion.flops_per_token) == (5, policy.flops_per_token)
        assert (opinion.last_step_tokens > 0) == bool(observation.steps)
        assert opinion.prefix_tokens > opinion.last_step_tokens
        before = observation.ledger.commit(0, 0).flops
        assert before == 0.0, "asking charges nothing"
        assert await policy.decide(observation) == decide_sampled(opinion, observation)
        assert observation.ledger.commit(0, 0).flops == opinion.prefix_tokens * opinion.flops_per_token
        assert await policy.as_greedy().decide(observation) == decide_greedy(opinion)
        assert await policy.as_priced().decide(observation) == decide_priced(opinion, observation.cost_weight)

    async def decide_all() -> None:
        for observation in observations:
            await decide(observation)

    asyncio.run(decide_all())
