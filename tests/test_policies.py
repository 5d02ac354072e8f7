"""Each routing rule on observations made by hand."""

import asyncio
import math
from dataclasses import replace

import pytest
from fakes import ScriptedEngine, make_fake_pool, make_query

from roro_ray.engines.protocol import StepResult
from roro_ray.errors import ConfigError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.draws import draw_uniform, mix_seed
from roro_ray.routing.observation import FEATURE_NAMES, Observation, make_features, scale_cost_weight
from roro_ray.routing.policies import make_policy
from roro_ray.types import Decision, Peek, Step, Usage

pytestmark = pytest.mark.timeout(30)


def make_step(model: int = 0, confidence: float = 0.9, confidence_min: float = 0.8, pool_size: int = 2) -> Step:
    decision = Decision(model, 0.0, tuple(float(m == model) for m in range(pool_size)))
    return Step(model, "note", 5, confidence, confidence_min, "delimiter", decision, Usage())


def make_draft(probability: float = 0.9, entropy: float = 0.5) -> StepResult:
    return StepResult("note", (1, 2), (0.0, math.log(probability)), "delimiter", 7, entropy)


def observe(
    steps: int | tuple[Step, ...] = 0, peek: StepResult | None = None, seed: int = 0, pool_size: int = 2
) -> Observation:
    written = tuple(make_step() for _ in range(steps)) if isinstance(steps, int) else steps
    features = make_features(written, 0.2, pool_size)
    return Observation(make_query(), "Say q.\n\n", written, 0.2, pool_size, peek, seed, features)


def decide(strategy: str, *observations: Observation, pool_size: int = 2) -> list[Decision]:
    policy = make_policy(strategy, make_fake_pool(*(ScriptedEngine(f"m{i}") for i in range(pool_size))))

    async def decide_all() -> list[Decision]:
        return [await policy.decide(observation) for observation in observations]

    return asyncio.run(decide_all())


def choose(strategy: str, *observations: Observation, pool_size: int = 2) -> list[int]:
    return [decision.model for decision in decide(strategy, *observations, pool_size=pool_size)]


def test_fixed_and_script() -> None:
    assert choose("fixed:1", observe(), observe(3)) == [1, 1]
    assert choose("script:0,1,2", *(observe(i, pool_size=3) for i in range(5)), pool_size=3) == [0, 1, 2, 2, 2]
    assert decide("fixed:0", observe())[0] == Decision(0, 0.0, (1.0, 0.0))


def test_blocks_alternate_and_their_phase_comes_from_the_seed() -> None:
    for seed in range(12):
        models = choose("blocks:2", *(observe(i, seed=seed) for i in range(8)))
        assert models[:4] == models[4:] and sum(models[:4]) == 2
        assert all(models[i] != models[i + 2] for i in range(6))
    starts = {tuple(choose("blocks:2", *(observe(i, seed=seed) for i in range(4)))) for seed in range(40)}
    assert len(starts) == 4


def test_periodic_gives_one_step_in_k_to_the_dearest() -> None:
    for seed in range(12):
        models = choose("periodic:3", *(observe(i, seed=seed, pool_size=3) for i in range(6)), pool_size=3)
        assert models[:3] == models[3:] and sorted(models[:3]) == [0, 0, 2]


def test_random_has_its_share_and_its_log_probability() -> None:
    decisions = decide("random:0.3", *(observe(seed=seed) for seed in range(4000)))
    share = sum(decision.model for decision in decisions) / len(decisions)
    assert abs(share - 0.3) < 0.03  # four standard errors
    for decision in decisions[:50]:
        assert decision.probabilities == (0.7, 0.3)
        assert math.isclose(decision.log_prob, math.log(decision.probabilities[decision.model]))


def test_random_spreads_over_several_dearer_models() -> None:
    models = choose("random:0.6", *(observe(seed=seed, pool_size=4) for seed in range(4000)), pool_size=4)
    assert [abs(models.count(m) / 4000 - share) < 0.03 for m, share in enumerate((0.4, 0.2, 0.2, 0.2))] == [True] * 4
    assert choose("random:0", observe()) == [0] and choose("random:1", observe()) == [1]


def test_confidence_looks_at_the_least_certain_token() -> None:
    sure, unsure = observe(peek=make_draft(0.9)), observe(peek=make_draft(0.6))
    for name in ("confidence", "threshold"):
        assert choose(f"{name}:0.7", sure, unsure) == [0, 1]
    assert decide("confidence:0.7", unsure)[0].signal == pytest.approx(0.6)


def test_prior_confidence_looks_at_the_step_before() -> None:
    observations = observe(), observe((make_step(confidence_min=0.5),)), observe((make_step(1, confidence_min=0.9),))
    assert choose("prior_confidence:0.7", *observations) == [0, 1, 0]


def test_glimpse_looks_at_the_first_token_entropy() -> None:
    assert choose("glimpse:1.0", observe(peek=make_draft(entropy=0.9)), observe(peek=make_draft(entropy=1.1))) == [0, 1]


def test_draft_verify_asks_the_dearest_model() -> None:
    engines = ScriptedEngine("small"), ScriptedEngine("middle"), ScriptedEngine("large", approval=0.6)
    pool = make_fake_pool(*engines)
    ledger = CostLedger([facts.flops_per_token for facts in pool.facts])
    observation = replace(observe(peek=make_draft(), pool_size=3), ledger=ledger)
    for threshold, model in ((0.5, 0), (0.7, 2)):
        policy = make_policy(f"draft_verify:{threshold}", pool)
        assert asyncio.run(policy.decide(observation)).model == model
    assert engines[2].scored == [("Say q.\n\n", "note\n\n")] * 2 and not engines[1].scored
    assert ledger.commit(0, 5).tokens_in == 7 + 5 + 5  # the prefix once, the draft of both threshold's decisions


def test_what_each_policy_peeks_at() -> None:
    pool = make_fake_pool()
    peeks = {"fixed:0": Peek.NONE, "prior_confidence:1": Peek.NONE, "glimpse:1": Peek.FIRST_TOKEN}
    peeks |= {"confidence:1": Peek.STEP, "draft_verify:1": Peek.STEP}
    assert {strategy: make_policy(strategy, pool).peek for strategy in peeks} == peeks


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("confidense:0.5", "did you mean 'confidence'"),
        ("fixed:2", "from 0 to 1"),
        ("fixed", "whole number"),
        ("random:1.5", "from 0 to 1"),
        ("random:x", "got 'x'"),
        ("blocks:0", "at least 1"),
        ("script:0,,1", "got ''"),
        ("confidence:nan", "got 'nan'"),
        ("router", "needs a trained router"),
        ("router:0.5", "takes no value"),
        ("router_priced", "needs a trained router"),
        ("router_prized", "did you mean 'router_priced'"),
    ],
)
def test_a_wrong_strategy_is_refused_with_what_to_do(strategy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(strategy, make_fake_pool())


def test_features_are_in_order_and_scaled() -> None:
    steps = (make_step(0, 0.9, 0.8, 3), make_step(1, 0.7, 0.2, 3))
    features = dict(zip(FEATURE_NAMES, make_features(steps, 1.0, 3, make_draft(0.5, entropy=math.log(2))), strict=True))
    assert features == pytest.approx(
        {
            "cost_weight": 1.0,
            "step_index": 2 / 16,
            "dear_share": 0.25,
            "last_model": 0.5,
            "last_confidence": 0.7,
            "last_confidence_min": 0.2,
            "mean_confidence": 0.8,
            "peek_confidence": 0.75,
            "peek_confidence_min": 0.5,
            "peek_entropy": 0.5,
            "has_peek": 1.0,
        }
    )
    assert make_features((), 0.0, 2)[0] == 0.0 and 0 < scale_cost_weight(0.1) < scale_cost_weight(0.5) < 1


def test_draws_depend_on_every_key_and_look_uniform() -> None:
    draws = [draw_uniform(seed, step, "router") for seed in range(50) for step in range(50)]
    assert len(set(draws)) == len(draws) and all(0 <= draw < 1 for draw in draws)
    counts = [sum(int(draw * 10) == bin for draw in draws) for bin in range(10)]
    assert sum((count - 250) ** 2 / 250 for count in counts) < 27.9  # chi-square, 9 degrees, p = 0.001
    assert draw_uniform(1, 2, "a") != draw_uniform(1, 2, "b") != draw_uniform(2, 1, "b")
    assert mix_seed(7, "x") == mix_seed(7, "x") and 0 <= mix_seed(-1) < 1 << 63
