"""The cost of episodes, by hand: small 20 FLOPs a token, large 200, one token a character and a delimiter.

The query `Say q.` is 6 + 1 tokens, a note `A: note 0` 9 + 1, the answer `Answer: 42` 10 + 1.
"""

import asyncio
import random

import pytest
from fakes import ScriptedEngine, make_fake_pool, make_query

from roro_ray.config import EpisodeConfig
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.episode import EpisodeSpec, run_episode
from roro_ray.routing.policies import make_policy
from roro_ray.types import Trajectory, Usage

pytestmark = pytest.mark.timeout(30)
SMALL, LARGE = 20.0, 200.0


def roll_out(strategy: str, *engines: ScriptedEngine, prefix: tuple = ()) -> Trajectory:
    pool = make_fake_pool(*engines)
    spec = EpisodeSpec("e", make_query(), strategy, prefix=prefix)
    return asyncio.run(run_episode(spec, pool, make_policy(strategy, pool), EpisodeConfig()))


def usage(small_in: int = 0, small_out: int = 0, large_in: int = 0, large_out: int = 0) -> Usage:
    return Usage(
        tokens_in=small_in + large_in,
        tokens_out=small_out + large_out,
        flops=SMALL * (small_in + small_out) + LARGE * (large_in + large_out),
        flops_decode=SMALL * small_out + LARGE * large_out,
    )


def test_one_writer_reads_the_query_once_and_decodes_the_rest() -> None:
    steps = roll_out("fixed:0").steps
    assert [step.usage for step in steps] == [usage(7, 10), usage(0, 10), usage(0, 10), usage(0, 11)]
    assert [step.tokens for step in steps] == [10, 10, 10, 11]


def test_a_new_writer_reads_what_the_others_wrote() -> None:
    steps = roll_out("script:0,1,0,1").steps
    assert [step.usage for step in steps] == [
        usage(small_in=7, small_out=10),
        usage(large_in=17, large_out=10),
        usage(small_in=10, small_out=10),
        usage(large_in=10, large_out=11),
    ]


def test_a_kept_peek_costs_nothing_more_than_writing_the_step() -> None:
    alone = [step.usage for step in roll_out("fixed:0").steps]
    for strategy in ("glimpse:9", "confidence:0"):
        trajectory = roll_out(strategy)
        assert [step.usage for step in trajectory.steps] == alone, strategy
        assert all(step.discarded == 0 for step in trajectory.steps)


def test_a_discarded_first_token_is_charged() -> None:
    steps = roll_out("glimpse:-1").steps
    assert [step.usage for step in steps] == [
        usage(7, 1, 7, 10),
        usage(10, 1, 0, 10),
        usage(10, 1, 0, 10),
        usage(10, 1, 0, 11),
    ]
    assert all(step.discarded == 1 for step in steps)


def test_a_discarded_draft_is_charged_whole() -> None:
    steps = roll_out("confidence:0.95").steps
    assert [step.usage for step in steps] == [
        usage(7, 10, 7, 10),
        usage(10, 10, 0, 10),
        usage(10, 10, 0, 10),
        usage(10, 11, 0, 11),
    ]
    assert [step.discarded for step in steps] == [10, 10, 10, 11]


def test_a_verifier_pays_for_the_drafts_that_it_reads_and_keeps_them() -> None:
    # The answer's end of sequence is no text, so the verifier reads 10 of its 11 tokens.
    steps = roll_out("draft_verify:0.5").steps
    assert [step.usage for step in steps] == [usage(7, 10, 17), usage(0, 10, 10), usage(0, 10, 10), usage(0, 11, 10)]


def test_a_rejecting_verifier_forgets_the_draft_but_not_the_prefix() -> None:
    engines = (ScriptedEngine("small"), ScriptedEngine("large", parameters=100, approval=0.1))
    steps = roll_out("draft_verify:0.5", *engines).steps
    assert [step.usage for step in steps] == [
        usage(7, 10, 7 + 10, 10),
        usage(10, 10, 10, 10),
        usage(10, 10, 10, 10),
        usage(10, 11, 10, 11),
    ]


def test_each_model_counts_in_its_own_tokens() -> None:
    # Small: 3 characters a token, so the query is 2 + 1 tokens and a note 3 + 1.
    engines = (ScriptedEngine("small", chars_per_token=3), ScriptedEngine("large", parameters=100))
    trajectory = roll_out("script:0,1,0,1", *engines)
    assert [step.text for step in trajectory.steps] == ["A: note 0", "B: note 1", "C: note 2", "Answer: 42"]
    assert [step.usage for step in trajectory.steps] == [
        usage(small_in=3, small_out=4),
        usage(large_in=17, large_out=10),
        usage(small_in=4, small_out=4),
        usage(large_in=10, large_out=11),
    ]


@pytest.mark.parametrize("strategy", ["fixed:1", "script:0,1,1,0", "glimpse:9", "glimpse:-1", "confidence:0.5"])
def test_going_on_from_a_prefix_costs_what_the_whole_episode_costs(strategy: str) -> None:
    unsure = ScriptedEngine("small", confidence=lambda prefix: 0.4 if "note 0" in prefix else 0.9)
    engines = (unsure, ScriptedEngine("large", parameters=100))
    whole = roll_out(strategy, *engines)
    for count in range(len(whole.steps)):
        assert roll_out(strategy, *engines, prefix=whole.steps[:count]) == whole, count


def test_going_on_with_another_writer_charges_its_reading() -> None:
    whole = roll_out("fixed:0")
    switched = roll_out("fixed:1", prefix=whole.steps[:2])
    assert switched.steps[:2] == whole.steps[:2]
    assert [step.usage for step in switched.steps[2:]] == [usage(large_in=27, large_out=10), usage(large_out=11)]


def test_whoever_writes_last_has_processed_the_whole_text_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        models = [rng.randrange(2) for _ in range(4)]
        steps = roll_out("script:" + ",".join(map(str, models))).steps
        for model, flops in enumerate((SMALL, LARGE)):
            own = [index for index, writer in enumerate(models) if writer == model]
            if own:
                text = 7 + sum(step.tokens for step in steps[: own[-1] + 1])
                assert sum(steps[index].usage.flops for index in own) == flops * text


def test_the_router_reads_each_token_once() -> None:
    ledger = CostLedger([SMALL, LARGE])
    ledger.charge_router(prefix_tokens=7, last_step_tokens=0, flops_per_token=3.0)
    assert ledger.commit(0, 10) == Usage(flops=21.0)
    ledger.charge_router(prefix_tokens=17, last_step_tokens=10, flops_per_token=3.0)
    assert ledger.commit(0, 10) == Usage(flops=30.0)


def test_the_sum_over_steps_is_the_trajectory() -> None:
    trajectory = roll_out("confidence:0.95")
    assert trajectory.usage == usage(37, 41, 7, 41)
    assert trajectory.usage.flops == sum(step.usage.flops for step in trajectory.steps)
