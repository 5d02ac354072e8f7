"""The hindsight oracle against brute force over all assignments, with engines whose steps follow a rule."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from roro_ray.config import Config, EpisodeConfig
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.oracle import run_oracle
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.runner import Runner
from roro_ray.types import Query, Trajectory
from roro_ray.world.tasks import make_queries
from tests.fakes import ScriptedEngine, make_fake_pool, run_specs

CONFIG = EpisodeConfig()


def write_as(skill: int):
    """A writer for queries such as `abr`: it solves steps a; from skill 1 also b; from skill 2 also c.

    A step it cannot solve spoils the answer until a step `r` starts anew; `x` defeats everybody.
    """

    def write(prefix: str) -> str:
        plan, *steps = prefix.strip().split("\n\n")
        if len(steps) == len(plan):
            spoiled = False
            for step in steps:
                spoiled = not step.endswith("reset") and (spoiled or step.endswith("bad"))
            return f"Answer: {0 if spoiled else 42}"
        kind = plan[len(steps)]
        if kind == "r":
            return f"{len(steps)} reset"
        return f"{len(steps)} {'ok' if kind in 'abc'[: skill + 1] else 'bad'}"

    return write


def make_pool(models: int = 2):
    return make_fake_pool(*(ScriptedEngine(f"m{i}", write_as(i), parameters=10 * 10**i) for i in range(models)))


def find(plans, models=2, **options):
    queries = [Query(f"q/{i}", "test", "test", plan, "42") for i, plan in enumerate(plans)]
    pool = make_pool(models)
    return queries, pool, asyncio.run(run_oracle(queries, pool, CONFIG, **options))


def brute_force(query, pool, models):
    """The least cost over all assignments, each rolled out by the episode loop; None where none is right."""
    length = len(query.text) + 1
    assignments = list(itertools.product(range(models), repeat=length))
    specs = [EpisodeSpec(str(a), query, "script:" + ",".join(map(str, a))) for a in assignments]
    outcomes = run_specs(Runner(pool, None, CONFIG), specs)
    costs = [sum(a) for a, outcome in zip(assignments, outcomes, strict=True) if outcome.correct]
    return min(costs, default=None)


@pytest.mark.parametrize("models", [2, 3])
def test_oracle_equals_brute_force(models):
    rng = random.Random(0)
    alphabet = "aabbcrx" if models == 3 else "aabbrx"
    plans = ["".join(rng.choices(alphabet, k=rng.randint(2, 4))) for _ in range(15)]
    queries, pool, results = find(plans, models)
    expected = [brute_force(query, pool, models) for query in queries]
    assert [result.cost if result.solved else None for result in results] == expected
    assert None in expected and any(expected), "the plans must hold solvable and unsolvable queries"
    assert all(result.exact and result.error is None for result in results)


def test_the_assignment_found_is_right_when_rolled_out():
    queries, pool, results = find(["abba", "bab", "brab", "xrb"])
    specs = [EpisodeSpec(r.query_id, q, r.strategy) for q, r in zip(queries, results, strict=True)]
    outcomes = run_specs(Runner(pool, None, CONFIG), specs)
    for result, outcome in zip(results, outcomes, strict=True):
        assert isinstance(outcome, Trajectory) and outcome.correct
        assert outcome.models == result.assignment
        assert sum(outcome.models) == result.cost


def test_reset_forgives_what_came_before():
    _, _, results = find(["bbbr", "brb"])
    assert [result.cost for result in results] == [0, 1]


def test_equal_steps_are_searched_once():
    # On easy steps both models write the same, so the prefixes do not double: the search stays linear.
    _, _, results = find(["a" * 10 + "x"])
    assert not results[0].solved and results[0].exact
    assert results[0].expanded <= 4 * 12 + 4
    assert results[0].strategy == "script:0"


def test_search_cut_off_falls_back_on_the_large_model():
    _, _, results = find(["b" * 8, "x" + "b" * 8], max_expanded=20)
    assert results[0].solved and not results[0].exact
    assert results[0].assignment == (1,) * 9
    assert not results[1].solved and not results[1].exact


def test_failing_engine_is_a_value():
    broken = ScriptedEngine("m0", write_as(0), fails=lambda prefix: prefix.startswith("bb"))
    pool = make_fake_pool(broken, ScriptedEngine("m1", write_as(1), parameters=100))
    queries = [Query(f"q/{plan}", "test", "test", plan, "42") for plan in ("ab", "bb")]
    good, bad = asyncio.run(run_oracle(queries, pool, CONFIG))
    assert good.solved and good.cost == 1 and good.error is None
    assert not bad.solved and bad.error is not None and "told to fail" in bad.error


def test_hanging_engine_meets_the_deadline():
    hanging = ScriptedEngine("m0", write_as(0), hangs=lambda prefix: True)
    pool = make_fake_pool(hanging, ScriptedEngine("m1", write_as(1), parameters=100))
    query = Query("q", "test", "test", "ab", "42")
    result = asyncio.run(run_oracle([query], pool, EpisodeConfig(timeout_s=0.2)))[0]
    assert result.error is not None and "TimeoutError" in result.error


def test_step_limit_ends_the_search():
    queries = [Query("q", "test", "test", "a" * 6, "42")]
    results = asyncio.run(run_oracle(queries, make_pool(), EpisodeConfig(max_steps=4)))
    assert not results[0].solved and results[0].exact


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_found_assignments_hold_on_the_embedded_world(temperature):
    # With sampling too: the search draws every step as the episode loop would, from the episode's seed.
    config = Config(episode=EpisodeConfig(temperature=temperature), seed=3)
    queries = [query for suite in ("chain", "list") for query in make_queries(suite, "validation", 5)]
    with LocalHost(config) as host:
        results = host.find_oracle(queries)
        specs = [EpisodeSpec(q.id, q, r.strategy, config.seed) for q, r in zip(queries, results, strict=True)]
        outcomes = host.run(specs)
        alone = host.run([EpisodeSpec(q.id, q, "fixed:1", config.seed) for q in queries])
    for result, outcome, large in zip(results, outcomes, alone, strict=True):
        assert result.error is None and result.exact
        assert isinstance(outcome, Trajectory) and outcome.correct is result.solved
        if result.solved:
            assert outcome.models == result.assignment
        if isinstance(large, Trajectory) and large.correct:
            assert result.solved and result.cost <= len(large.steps)
    assert sum(result.solved for result in results) >= 7
    assert any(result.solved and result.cost > 0 for result in results)
