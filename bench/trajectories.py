"""Trajectories a second at 64 concurrent queries, against a loop like SpecReason's: `python -m bench.trajectories`.

Same models, same number of steps and tokens, the same steps by the large model; in ours a router is asked at every
step. Arms take turns within one run:

- routed: this project's episode loop, all queries at once, both engines in this process;
- loop over HTTP: two servers, one query at a time, text prompts: draft, verification, rewriting of what is rejected;
- loop in process: the same loop on the engines of `routed`, which leaves out HTTP and the servers' processes.

The loop writes more than it keeps, since it drafts every step with the small model: that is its method. What it does
not do is said in `bench/_specreason.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from bench._episodes import Shape, count_written, make_scripts, make_texts, run_episodes
from bench._pool import add_pool_options, has_vllm, make_pool_config
from bench._specreason import Completer, EngineCompleter, ServerCompleter, Work, serve_pool, solve, total
from bench._turns import Arm, Counts, Turn, check_counts, spread, take_turns, tell_machine
from roro_ray.config import RouterConfig
from roro_ray.engines.loading import load_tokenizer
from roro_ray.engines.pool import make_pool
from roro_ray.routing.router import make_router
from roro_ray.routing.router_policy import RouterPolicy

AIM = 10.0
ROUTED = "routed"
POSITIONS = 4096


def make_loop(completer: Completer, shape: Shape, scripts: Sequence[Sequence[int]], tokenizer: Any) -> Arm:
    """The loop as an arm: one query after the other. Counts are of kept tokens.

    Raises:
        ValueError: the loop did not write what it should.
    """

    async def run(texts: Sequence[str]) -> Counts:
        work = zip(texts, scripts, strict=True)
        works = [await solve(completer, text, script, shape.step_tokens) for text, script in work]
        check_work(total(works), shape, scripts)
        return Counts(total(works).kept)

    return lambda turn: run(make_texts(shape, turn, tokenizer))


def check_work(work: Work, shape: Shape, scripts: Sequence[Sequence[int]]) -> None:
    """See that a draft was made and scored for every step, and that the rejected ones were written again.

    Raises:
        ValueError: names what differs.
    """
    expected = Work(
        count_written(shape, scripts), sum(map(sum, scripts)) * shape.step_tokens, sum(map(len, scripts))
    )
    if work != expected:
        raise ValueError(f"the loop wrote {work}, expected {expected}: its time is not comparable")


def summarise(turns: dict[str, list[Turn]], queries: dict[str, int]) -> dict[str, Any]:
    """Trajectories a second of each arm, and how many times the others' rate the first one's is, round by round."""
    found: dict[str, Any] = {"trajectories_per_s": {}}
    for name, runs in turns.items():
        rates = spread([queries[name] / run.wall_s for run in runs])
        found["trajectories_per_s"][name] = dataclasses.asdict(rates)
    for by in ("wall_s", "cpu_s"):
        found[by] = {
            name: dataclasses.asdict(
                spread(
                    [
                        (getattr(theirs, by) / queries[name]) / (getattr(ours, by) / queries[ROUTED])
                        for ours, theirs in zip(turns[ROUTED], runs, strict=True)
                    ]
                )
            )
            for name, runs in turns.items()
            if name != ROUTED
        }
    return found


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Load, run, print a table."""
    shape = Shape(options.concurrency, options.steps, options.step_tokens, options.prompt_tokens)
    few = dataclasses.replace(shape, episodes=options.loop_queries)
    config = make_pool_config(options, directory, options.engine, options.concurrency)
    pool = make_pool(config)
    await pool.ready()
    tokenizer = load_tokenizer(config.models[0].path)
    torch.manual_seed(0)
    router = RouterPolicy(make_router(RouterConfig(encoder=options.router_encoder), pool.size))
    scripts = make_scripts(shape, "random", options.large_share)

    def route(turn: str) -> Awaitable[Counts]:
        return run_episodes(pool, shape, make_texts(shape, turn, tokenizer), scripts, router)

    async with AsyncExitStack() as stack:
        loop_scripts = scripts[: few.episodes]
        arms: dict[str, Arm] = {ROUTED: route}
        if not options.no_servers:
            urls = await stack.enter_async_context(serve_pool(config, POSITIONS))
            arms["loop over HTTP"] = make_loop(ServerCompleter(urls), few, loop_scripts, tokenizer)
        arms["loop in process"] = make_loop(EngineCompleter(pool.engines), few, loop_scripts, tokenizer)
        started = tell_machine()
        turns = await take_turns(arms, options.rounds)
    check_counts(turns, count_written(shape, scripts), [ROUTED])
    check_counts(turns, count_written(few, loop_scripts), [name for name in arms if name != ROUTED])
    found = summarise(turns, {name: shape.episodes if name == ROUTED else few.episodes for name in arms})
    found["machine"] = {"before": started, "after": tell_machine()}
    for engine in pool.engines:
        if hasattr(engine, "close"):
            engine.close()
    tell(shape, found)
    return found


def tell(shape: Shape, found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{shape} ({found['machine']['before']}; after: {found['machine']['after']})")
    for name, rate in found["trajectories_per_s"].items():
        line = f"{name:16} {rate['median']:8.2f} trajectories/s ({rate['low']:.2f} to {rate['high']:.2f})"
        if name != ROUTED:
            by = [
                f"{value['median']:.1f} x ({value['low']:.1f} to {value['high']:.1f})"
                for value in (found["wall_s"][name], found["cpu_s"][name])
            ]
            line += f"; routed is {by[0]}, by processor time {by[1]} (aim: at least {AIM:.0f} x)"
        print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line: a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", choices=("vllm", "hf"))
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--large-share", type=float, default=0.25, help="of the steps, by the large model")
    parser.add_argument("--loop-queries", type=int, default=4, help="that the loop solves in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--router-encoder", default=RouterConfig().encoder)
    parser.add_argument("--no-servers", action="store_true", help="only the loop in process")
    parser.add_argument("--quick", action="store_true", help="few short steps without servers, to see that it runs")
    add_pool_options(parser)
    options = parser.parse_args(argv)
    if options.engine == "vllm" and not has_vllm():
        return
    if options.quick:
        options.concurrency, options.steps, options.step_tokens = 8, 4, 8
        options.loop_queries, options.rounds, options.no_servers = 2, 2, True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(asyncio.run(measure(options, Path(directory)))))


if __name__ == "__main__":
    main()
