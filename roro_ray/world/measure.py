"""Measure the shipped models on the test split: `python -m roro_ray.world.measure` prints docs/world.md's tables."""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Sequence

from roro_ray.config import EpisodeConfig, ModelConfig, PoolConfig
from roro_ray.engines.pool import EnginePool, make_pool
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.runner import Runner
from roro_ray.types import Query, Trajectory
from roro_ray.world.tasks import LABELS, SUITES, Operation, apply_operation, draw_programs, make_queries, render_step

_CONFIDENT = 0.9


def name_operation(operation: Operation) -> str:
    """The operation's name, two-digit sums and differences apart: `add`, `add2`, `mul`, .."""
    return operation.name + ("2" if operation.is_hard and operation.name in ("add", "sub") else "")


async def roll_out(pool: EnginePool, model: int, queries: Sequence[Query]) -> list[Trajectory]:
    """Every query solved by one model alone."""
    specs = [EpisodeSpec(f"{query.id}/{model}", query, f"fixed:{model}") for query in queries]
    results = await Runner(pool, None, EpisodeConfig()).run(specs)
    return [result for result in results if isinstance(result, Trajectory)]


def count_operations(suite: str, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """Per operation: right, wrong though sure (smallest token probability above 0.9), all.

    A step is right when it applies the operation truly to the value before it, whatever that value is.
    """
    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for trajectory, program in zip(trajectories, draw_programs(suite, "test", 0), strict=False):
        value = program.start
        for label, operation, step in zip(LABELS, program.operations, trajectory.steps, strict=False):
            result = apply_operation(operation, value, program.modulus)
            right = step.text == render_step(label, operation, value, result)
            entry = counts[name_operation(operation)]
            entry[0] += right
            entry[1] += not right and step.confidence_min > _CONFIDENT
            entry[2] += 1
            written = step.text.rpartition("= ")[2]
            if not written.isdigit():
                break
            value = int(written)
    return counts


async def measure(model_path: str, count: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Accuracy of one model by suite, and its counts by operation over all suites."""
    pool = make_pool(PoolConfig(models=[ModelConfig("model", model_path), ModelConfig("large", "world:large")]))
    await pool.ready()
    accuracy: dict[str, float] = {}
    operations: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for suite in SUITES:
        trajectories = await roll_out(pool, 0, make_queries(suite, "test", count))
        accuracy[suite] = sum(t.correct is True for t in trajectories) / count
        for name, entry in count_operations(suite, trajectories).items():
            operations[name] = [a + b for a, b in zip(operations[name], entry, strict=True)]
    return accuracy, operations


def main(argv: list[str] | None = None) -> None:
    """Command line of this module: Markdown tables on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=400, help="test queries per suite")
    arguments = parser.parse_args(argv)
    results = {name: asyncio.run(measure(f"world:{name}", arguments.queries)) for name in ("small", "cross", "large")}
    print(f"Accuracy alone on {arguments.queries} test queries a suite, greedy:\n")
    print(f"| model | {' | '.join(SUITES)} | mean |\n|{'---|' * (len(SUITES) + 2)}")
    for name, (accuracy, _) in results.items():
        mean = sum(accuracy.values()) / len(accuracy)
        print(f"| {name} | {' | '.join(f'{accuracy[s]:.3f}' for s in SUITES)} | {mean:.3f} |")
    names = sorted(results["small"][1])
    print(f"\nSteps right (in brackets: wrong with every token's probability above {_CONFIDENT}):\n")
    print(f"| model | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, (_, operations) in results.items():
        cells = [f"{right / n:.2f} ({sure / n:.2f})" for right, sure, n in (operations[op] for op in names)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
