"""Trajectories per second: 64 concurrent episodes against one at a time.

    OMP_NUM_THREADS=1 python -m bench.rollouts

Every contestant rolls out the same episodes with the same models, greedy and with the memo off, taking turns within
one run; the median over the rounds counts. One at a time means: the library's own `generate` called step by step, and
this project's engine asked by one episode at a time, with and without the states of earlier prefixes. All must write
the same steps (checked). Three workloads: all steps by the small model, 30% at random by the large one, all by it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from roro_ray.config import STEP_DELIMITER, EpisodeConfig, PoolConfig
from roro_ray.engines.hf import resolve_model_path
from roro_ray.engines.pool import make_pool
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.runner import Runner
from roro_ray.types import Trajectory
from roro_ray.world.tasks import SUITES, make_queries

Steps = list[tuple[str, ...]]
Arm = Callable[[list[EpisodeSpec], list[tuple[int, ...]]], Steps]
CONCURRENT = "64 concurrent"


def make_specs(count: int, seed: int, strategy: str = "random:0.3") -> list[EpisodeSpec]:
    """Episodes over all suites."""
    queries = [q for suite in SUITES for q in make_queries(suite, "test", -(-count // len(SUITES)), seed)]
    return [EpisodeSpec(query.id, query, strategy) for query in queries[:count]]


def make_engine_arm(concurrency: int, cache_mb: int) -> Arm:
    """This project's runner on a pool of its own, its models loaded and warm."""
    pool = make_pool(PoolConfig(memo_entries=0, cache_mb=cache_mb))
    runner = Runner(pool, None, EpisodeConfig(), concurrency)

    def run(specs: list[EpisodeSpec], _: list[tuple[int, ...]]) -> Steps:
        results = asyncio.run(runner.run(specs))
        assert all(isinstance(result, Trajectory) for result in results), "an episode failed"
        return [tuple(step.text for step in result.steps) for result in results if isinstance(result, Trajectory)]

    run(make_specs(4, seed=99), [])
    return run


def make_library_arm() -> Arm:
    """A plain loop: one `generate` a step, by the model that the strategy gives the step to."""
    paths = [resolve_model_path(model.path) for model in PoolConfig().models]
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    tokenizers: list[Any] = [AutoTokenizer.from_pretrained(path) for path in paths]

    def run_one(spec: EpisodeSpec, writers: Sequence[int]) -> tuple[str, ...]:
        text, steps = spec.query.text + STEP_DELIMITER, []
        for writer in writers:
            tokenizer = tokenizers[writer]
            inputs = tokenizer(text, return_tensors="pt")
            output = models[writer].generate(
                **inputs,
                max_new_tokens=EpisodeConfig().max_step_tokens,
                do_sample=False,
                stop_strings=[STEP_DELIMITER],
                tokenizer=tokenizer,
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = output.sequences[0, inputs.input_ids.shape[1] :]
            steps.append(tokenizer.decode(new, skip_special_tokens=True).split(STEP_DELIMITER)[0])
            text += steps[-1] + STEP_DELIMITER
        return tuple(steps)

    return lambda specs, writers: [run_one(spec, models) for spec, models in zip(specs, writers, strict=True)]


def compare(arms: dict[str, Arm], strategy: str, episodes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of each arm: median rate, its ratio to the first arm's, and the same by processor time (less noisy)."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for seed in range(rounds):
        specs = make_specs(episodes, seed, strategy)
        writers = find_writers(specs)
        written: dict[str, Steps] = {}
        for name, run in arms.items():
            wall, processor = time.perf_counter(), time.process_time()
            written[name] = run(specs, writers)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
        for name, steps in written.items():
            assert steps == written[CONCURRENT], f"{name} wrote other steps"
    first = seconds[CONCURRENT]
    return {
        name: {
            "trajectories_per_s": round(statistics.median(episodes / wall for wall, _ in found), 1),
            "ratio": round(statistics.median(a / b for (a, _), (b, _) in zip(found, first, strict=True)), 1),
            "cpu_ms_per_trajectory": round(statistics.median(1e3 * cpu / episodes for _, cpu in found), 1),
            "cpu_ratio": round(statistics.median(a / b for (_, a), (_, b) in zip(found, first, strict=True)), 1),
        }
        for name, found in seconds.items()
    }


def find_writers(specs: list[EpisodeSpec]) -> list[tuple[int, ...]]:
    """Which model writes each step of each episode."""
    results = asyncio.run(Runner(make_pool(PoolConfig()), None, EpisodeConfig(), 64).run(specs))
    return [result.models for result in results if isinstance(result, Trajectory)]


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description="Trajectories per second: 64 concurrent episodes, one at a time.")
    parser.add_argument("--episodes", type=int, default=160, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=["fixed:0", "random:0.3", "fixed:1"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    arms: dict[str, Arm] = {
        CONCURRENT: make_engine_arm(64, cache_mb=256),
        "one at a time, library's generate": make_library_arm(),
        "one at a time, no prefix states": make_engine_arm(1, cache_mb=0),
        "one at a time": make_engine_arm(1, cache_mb=256),
    }
    summary = {}
    for strategy in options.strategies:
        summary[strategy] = compare(arms, strategy, options.episodes, options.rounds)
        print(f"{strategy:34} trajectories/s   ratio   CPU ms each   ratio")
        for name, found in summary[strategy].items():
            rate, ratio, cpu, cpu_ratio = found.values()
            print(f"    {name:34} {rate:10.1f} {ratio:7.1f} {cpu:13.1f} {cpu_ratio:7.1f}", flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
