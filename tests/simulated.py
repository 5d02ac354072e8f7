"""A simulated pool for the reward's tests: programs solved without a language model.

The large writer computes every step rightly; the small one has the misconception of the embedded world
(`misapply_operation`) and is off by one on every other value at a hard step.
Rollouts are exact, so that tests know what is needed and what is waste.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import Decision, Query, Step, Trajectory, Usage
from roro_ray.world.tasks import (
    LABELS,
    Operation,
    Program,
    apply_operation,
    draw_programs,
    make_queries,
    misapply_operation,
    render_query,
    render_step,
)

STRATEGIES = ("fixed:0", "fixed:1", "random:0.2", "random:0.4", "random:0.6", "random:0.5", "random:0.3", "random:0.7")


def make_step(model: int, text: str) -> Step:
    """A step with the fields that the reward reads."""
    probabilities = (1.0 - model, float(model))
    return Step(model, text, 10, 0.9, 0.9, "delimiter", Decision(model, 0.0, probabilities), Usage())


def make_trajectory(
    query: Query, models: Sequence[int], texts: Sequence[str], name: str = "t", correct: bool = True
) -> Trajectory:
    """A trajectory of given writers and texts."""
    steps = tuple(make_step(model, text) for model, text in zip(models, texts, strict=True))
    answer = texts[-1].removeprefix("Answer: ") if texts[-1].startswith("Answer: ") else None
    return Trajectory(
        f"{query.id}/{name}", query.id, query.suite, "script", 0, 0.0, steps, answer, correct, "answer", Usage()
    )


def compute_small(operation: Operation, value: int, modulus: int) -> int:
    """The small writer's result."""
    slip = operation.is_hard and value % 2
    return (misapply_operation(operation, value, modulus) + slip) % modulus


class SimulatedRunner:
    """`run(specs)` for strategies fixed, random and script, prefixes included; counts what it was asked."""

    def __init__(
        self, suites: Sequence[str] = ("chain",), count: int = 20, split: str = "train", seed: int = 7
    ) -> None:
        self.queries: list[Query] = []
        self.programs: dict[str, Program] = {}
        self.asked = 0
        for suite in suites:
            programs = draw_programs(suite, split, seed)
            for query, program in zip(make_queries(suite, split, count, seed), programs, strict=False):
                assert render_query(program) == query.text
                self.queries.append(query)
                self.programs[query.id] = program

    def run(self, specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        """Roll out every spec."""
        self.asked += len(specs)
        return [self._run_one(spec) for spec in specs]

    def collect(self, strategies: Sequence[str] = STRATEGIES) -> list[Trajectory]:
        """One trajectory a query and strategy."""
        specs = [EpisodeSpec(f"{q.id}/{i}", q, s, seed=i) for q in self.queries for i, s in enumerate(strategies)]
        return [t for t in self.run(specs) if isinstance(t, Trajectory)]

    def _run_one(self, spec: EpisodeSpec) -> Trajectory:
        program = self.programs[spec.query.id]
        steps = list(spec.prefix)
        value = int(steps[-1].text.rpartition(" ")[2]) if steps else program.start
        models = self._models(spec)
        for index in range(len(steps), len(program.operations)):
            compute = apply_operation if models[index] else compute_small
            result = compute(program.operations[index], value, program.modulus)
            steps.append(make_step(models[index], render_step(LABELS[index], program.operations[index], value, result)))
            value = result
        if len(steps) == len(program.operations):
            steps.append(make_step(models[len(steps)], f"Answer: {value:02d}"))
        answer = steps[-1].text.removeprefix("Answer: ")
        query = spec.query
        return Trajectory(
            spec.id, query.id, query.suite, spec.strategy, spec.seed, 0.0, tuple(steps), answer, answer == query.answer,
            "answer", Usage(),
        )  # fmt: skip

    def _models(self, spec: EpisodeSpec) -> list[int]:
        name, _, value = spec.strategy.partition(":")
        if name == "script":
            given = [int(part) for part in value.split(",")]
            return list(itertools.islice(itertools.chain(given, itertools.repeat(given[-1])), 16))
        share = float(value)
        rng = random.Random(f"{spec.query.id}/{spec.seed}")
        return [int(rng.random() < share) for _ in range(16)]
