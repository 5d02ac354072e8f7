"""Engine `vllm` against engine `hf`, tokens a second at batches of 1, 8 and 64: `python -m bench.engines`.

Both write the same greedy steps of the embedded world (queries with some of their steps), memo off, each kept asked by
as many callers as the batch is large, taking turns within one run. Steps must be the same, but for ties: a request
whose two best tokens are closer than the engines' rounding may part them, and is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench._pool import has_vllm
from bench._turns import Arm, Counts, Turn, compare, spread, take_turns, tell_machine
from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.pool import make_engine
from roro_ray.engines.protocol import StepRequest, StepResult
from roro_ray.world.tasks import SUITES, draw_programs, render_query, render_solution

ENGINES = ("hf", "vllm")
TIES = 0.01  # share of steps that may differ
MAX_TOKENS = 48


def make_requests(count: int, turn: int) -> list[StepRequest]:
    """The next step behind every part of the solutions of some queries, other queries in every turn."""
    requests: list[StepRequest] = []
    programs = [draw_programs(suite, "test", turn) for suite in SUITES]
    while len(requests) < count:
        for suite in programs:
            program = next(suite)
            parts = [render_query(program), *render_solution(program)]
            requests += [
                StepRequest("".join(f"{part}\n\n" for part in parts[:end]), MAX_TOKENS) for end in range(1, len(parts))
            ]
    return requests[:count]


async def write_steps(engine: Any, requests: Sequence[StepRequest], batch: int) -> list[StepResult]:
    """The steps, at most `batch` of them at a time."""
    results: list[StepResult | None] = [None] * len(requests)
    queue = iter(enumerate(requests))

    async def run_lane() -> None:
        for index, request in queue:
            results[index] = await engine.generate_step(request)

    await asyncio.gather(*(run_lane() for _ in range(batch)))
    return [result for result in results if result is not None]


def count_different(ours: Sequence[StepResult], theirs: Sequence[StepResult]) -> int:
    """Steps that differ in their text or in how they end."""
    return sum((a.text, a.finish) != (b.text, b.finish) for a, b in zip(ours, theirs, strict=True))


async def compare_engines(engines: dict[str, Any], batch: int, count: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each engine, their ratio, and how many steps differed.

    Raises:
        ValueError: more steps differ than ties explain.
    """
    written: dict[tuple[int, str], list[StepResult]] = {}
    calls = dict.fromkeys(engines, 0)

    def make_arm(name: str) -> Arm:
        async def run(turn: int, requests: list[StepRequest]) -> Counts:
            results = written[turn, name] = await write_steps(engines[name], requests, batch)
            return Counts((sum(len(result.token_ids) for result in results),))

        def prepare(_: str) -> Awaitable[Counts]:
            turn, calls[name] = calls[name], calls[name] + 1
            # Queries of other batch sizes would be known to the prefix caches.
            return run(turn, make_requests(count, 1000 * batch + turn))

        return prepare

    turns = await take_turns({name: make_arm(name) for name in engines}, rounds)
    first, *others = engines
    total = sum(len(results) for results in written.values()) // len(engines)
    different = sum(
        count_different(written[turn, first], written[turn, name]) for turn in range(rounds + 1) for name in others
    )
    if different > TIES * total * len(others):
        raise ValueError(f"{different} of {total} steps differ between {', '.join(engines)}: more than ties explain")
    return summarise(turns, different, total)


def summarise(turns: dict[str, list[Turn]], different: int, total: int) -> dict[str, Any]:
    """Rates, and how many times the rate of `hf` the rate of `vllm` is."""
    speeds = {
        name: spread([turn.counts.written[0] / turn.wall_s for turn in runs]).median for name, runs in turns.items()
    }
    ratios = {by: dataclasses.asdict(compare(turns["hf"], turns["vllm"], by=by)) for by in ("wall_s", "cpu_s")}
    return {"tokens_per_s": speeds, "vllm over hf": ratios, "different": different, "steps": total}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All models and batch sizes; prints as it goes."""
    found: dict[str, Any] = {}
    for path in options.models:
        config = PoolConfig(memo_entries=0, batch_size=max(options.batches))
        settings: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
        if options.memory_fraction:
            settings["memory_fraction"] = options.memory_fraction
        engines = {name: make_engine(ModelConfig(name, path, name, **settings), config) for name in ENGINES}
        for engine in engines.values():
            await engine.ready()
        for batch in options.batches:
            started = time.perf_counter()
            count = min(max(options.requests, batch * 4), options.requests * batch)
            result = await compare_engines(engines, batch, count, options.rounds)
            found[f"{path} {batch}"] = result
            tell(path, batch, result, time.perf_counter() - started)
        close = getattr(engines["vllm"], "close", None)
        if close is not None:
            close()
    return found


def tell(path: str, batch: int, result: dict[str, Any], seconds: float) -> None:
    """Print one line."""
    speeds, ratio = result["tokens_per_s"], result["vllm over hf"]
    told = [f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})" for value in ratio.values()]
    print(
        f"{path} batch {batch:3}: hf {speeds['hf']:8.0f} tokens/s, vllm {speeds['vllm']:8.0f}, vllm over hf {told[0]}, "
        f"by processor time {told[1]}; {result['different']} of {result['steps']} steps differ ({seconds:.0f} s)",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: a line for each model and batch size, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["world:small", "world:large"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=64, help="least number of steps in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory-fraction", type=float, default=0.0, help="of a GPU, for vllm")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    options = parser.parse_args(argv)
    if not has_vllm():
        return
    if options.quick:
        options.models, options.batches, options.requests, options.rounds = options.models[:1], [1, 8], 8, 2
    torch.set_num_threads(1)
    disable_progress_bar()
    print(tell_machine())
    print(json.dumps(asyncio.run(measure(options))))


if __name__ == "__main__":
    main()
