"""Rubrics that learn nothing: random and fixed ones, the controls that show whether the rubric matters."""

from __future__ import annotations

import random
from collections.abc import Sequence

from roro_ray.reward.freeform import draw_free_kinds, find_steps, is_free, read_free
from roro_ray.reward.rubric import (
    MODELS,
    WEIGHTS,
    WRITTEN_BY,
    format_rubric,
    make_overall_criterion,
    make_step_criterion,
)
from roro_ray.types import Criterion, Query, Rubric

# The same three lines for every query, in words that name no step: what a rubric is without a Rubricor.
FIXED_CRITERIA = (
    Criterion("overall: hard steps written by the large model", 5.0, None, "large"),
    Criterion("overall: easy steps written by the small model", 3.0, None, "small"),
    make_overall_criterion("small", 1.0),
)


def make_fixed_rubric(query: Query) -> Rubric:
    """The one fixed rubric."""
    return Rubric(query.id, FIXED_CRITERIA, format_rubric(FIXED_CRITERIA))


def make_random_rubric(query: Query, seed: int = 0, max_criteria: int = 7) -> Rubric:
    """A well-formed rubric with random steps (or kinds of steps, where the query labels none), writers and weights.

    The same for the same query and seed.
    """
    rng = random.Random(f"{seed}/{query.id}")
    draw = draw_free_criteria if is_free(query) else draw_random_criteria
    return make_rubric_of(query, draw(query, rng, max_criteria))


def count_criteria(query: Query, max_criteria: int = 7) -> int:
    """How many criteria a complete rubric has: the overall one and one a step, as many as are allowed."""
    return min(len(find_steps(query)) + 1, max_criteria)


def draw_random_criteria(query: Query, rng: random.Random, max_criteria: int = 7) -> list[Criterion]:
    """An overall criterion and one for each step, or for random ones where there are too many; in order."""
    steps = find_steps(query)
    chosen = sorted(rng.sample(range(len(steps)), count_criteria(query, max_criteria) - 1))
    overall = make_overall_criterion(rng.choice(MODELS), rng.choice(WEIGHTS))
    return [
        overall,
        *(make_step_criterion(*steps[index], rng.choice(MODELS), rng.choice(WEIGHTS)) for index in chosen),
    ]


def draw_free_criteria(query: Query, rng: random.Random, max_criteria: int = 7) -> list[Criterion]:
    """An overall criterion and some about kinds of steps, for a query that labels no steps."""
    kinds = draw_free_kinds(rng, rng.randint(min(3, max_criteria), max_criteria) - 1)
    criteria = [
        read_free(Criterion(kind + WRITTEN_BY.format(rng.choice(MODELS)), rng.choice(WEIGHTS))) for kind in kinds
    ]
    return [make_overall_criterion(rng.choice(MODELS), rng.choice(WEIGHTS)), *criteria]


def make_rubric_of(query: Query, criteria: Sequence[Criterion]) -> Rubric:
    """A rubric of given criteria."""
    return Rubric(query.id, tuple(criteria), format_rubric(criteria))


def shuffle_rubrics(rubrics: Sequence[Rubric], queries: Sequence[Query]) -> list[Rubric]:
    """Another query's rubric for each query, the next one of the same suite where there is one.

    Only the labels' agreement with the query is lost, not the format or the distribution of rubrics.
    """
    by_suite: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        by_suite.setdefault(query.suite, []).append(index)
    result: list[Rubric] = list(rubrics)
    for members in by_suite.values():
        for position, index in enumerate(members):
            other = rubrics[members[(position + 1) % len(members)]]
            result[index] = Rubric(queries[index].id, other.criteria, other.text, other.version)
    return result
