"""Rubrics of queries that label no steps: what a criterion may say, and the controls for such queries."""

from __future__ import annotations

import json

import pytest

from roro_ray.reward.freeform import STEP_KINDS, find_objection, is_free
from roro_ray.reward.generic import make_fixed_rubric, make_random_rubric, shuffle_rubrics
from roro_ray.reward.rubric import is_faithful, make_criterion, read_rubric
from roro_ray.types import Query
from roro_ray.world.tasks import SUITES, make_queries

pytestmark = pytest.mark.timeout(30)

DUCKS = Query("gsm8k/0", "gsm8k", "train", "Janet's 16 ducks lay 16 eggs. She sells them at $2.50 each.", "40")


@pytest.mark.parametrize(
    "text",
    [
        "Steps that set up equations are written by the large model",
        "overall: mostly written by the small model",
        "steps 2 and 3 are left to the larger model",
        "the first 2 steps are planned by the large model",
        "50% of the steps come from the small language model",
        "the final answer is written by the small model",
        "routine arithmetic with 16 and 2.50 is done by the small model",
        "the key step about the right triangle goes to the large model",
        "steps that compute an expected value use the large model",
        "results are combined by the large model",
    ],
)
def test_a_free_criterion_says_who_writes_which_steps(text: str) -> None:
    assert find_objection(make_criterion(text, 1.0), DUCKS) is None
    assert is_faithful(make_criterion(text, 1.0), DUCKS)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("steps are short and clear", "neither the small nor the large"),
        ("the larger number is computed first", "neither the small nor the large"),
        ("the answer is 40, found by the large model", "whether an answer is right"),
        ("the large model reaches the correct answer", "whether an answer is right"),
        ("the solution of the small model is wrong", "whether an answer is right"),
        ("the result equals forty (large model)", "whether an answer is right"),
        ("the large model solves the problem", "whether an answer is right"),
        ("the large model writes \\boxed at the end", "whether an answer is right"),
        ("give full marks to the large model", "whether an answer is right"),
        ("the true answer comes from the large model", "whether an answer is right"),
        ("the product 640 is computed by the large model", "brings the number 640"),
        ("the step that gets 2.5 is written by the large model", "brings the number 2.5"),
    ],
)
def test_other_criteria_are_dropped_with_the_reason(text: str, why: str) -> None:
    objection = find_objection(make_criterion(text, 1.0), DUCKS)
    assert objection is not None and why in objection
    assert not is_faithful(make_criterion(text, 1.0), DUCKS)


def test_a_free_rubric_is_read_and_the_rest_dropped() -> None:
    criteria = ["A: planning steps use the large model", "small models, not large models, add up", "the answer is 4"]
    text = json.dumps([{"criterion": criterion, "weight": 2} for criterion in criteria])
    read = read_rubric(text, DUCKS)
    assert read.rubric is not None
    assert [(c.label, c.model) for c in read.rubric.criteria] == [(None, "large"), (None, None)]
    assert [c.text for c in read.dropped] == ["the answer is 4"]
    nothing = read_rubric("\n".join(f"be right ({i})" for i in (1, 2, 3)).replace("right (2", "good (2"), DUCKS)
    assert nothing.rubric is None and nothing.error is not None


def test_what_differs_in_case_only_is_said_once() -> None:
    text = "Planning by the large model (1)\nplanning by the large model (2)\nsums by the small model (3)"
    read = read_rubric(text, DUCKS)
    assert read.rubric is not None and len(read.rubric.criteria) == 2 and len(read.dropped) == 1


def test_random_rubrics_of_free_queries_are_well_formed_different_and_reproducible() -> None:
    rubrics = [make_random_rubric(DUCKS, seed) for seed in range(100)]
    for seed, rubric in enumerate(rubrics):
        read = read_rubric(rubric.text, DUCKS)
        assert read.rubric is not None and read.rubric.criteria == rubric.criteria and not read.dropped
        assert rubric == make_random_rubric(DUCKS, seed)
    assert {len(rubric.criteria) for rubric in rubrics} == {3, 4, 5, 6, 7}
    assert len({rubric.text for rubric in rubrics}) == 100
    assert all(any(kind in rubric.text for rubric in rubrics) for kind in STEP_KINDS)
    assert len(make_random_rubric(DUCKS, 0, max_criteria=2).criteria) == 2


def test_the_other_controls_take_free_queries() -> None:
    others = [DUCKS, Query("gsm8k/1", "gsm8k", "train", "How many bolts?", "3")]
    assert not read_rubric(make_fixed_rubric(DUCKS).text, DUCKS).dropped
    rubrics = [make_random_rubric(query) for query in others]
    shuffled = shuffle_rubrics(rubrics, others)
    assert [rubric.text for rubric in shuffled] == [rubrics[1].text, rubrics[0].text]
    assert [rubric.query_id for rubric in shuffled] == [query.id for query in others]


def test_queries_of_the_world_are_not_free() -> None:
    assert not any(is_free(query) for suite in SUITES for query in make_queries(suite, "train", 20))
    assert is_free(DUCKS)
