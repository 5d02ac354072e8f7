"""What it costs to change the writer at every step, at a concurrency of 32: `python -m bench.switching`.

Every arm writes the same number of tokens with each of two models, behind prompts of its own (cold caches), and all
take turns within one run. A step is a fixed number of tokens. The arms, each with one part more than the one before:

- whole: one half of the texts by each model, uninterrupted;
- prefill: what the bound adds, each model reading once the tokens that it did not write;
- stepwise: as whole, but step by step through the project's episode loop (stop and restart);
- switching: the models take turns at every step (prefill of the switch);
- routed: as switching, and a router is asked at every step (its decisions).

The bound is whole + prefill. `whole again` is whole a second time: how far two equal arms lie apart here.
Of `--variants`: text handed over instead of token ids, cache blocks of 128 tokens, and steps by either model at random.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench._episodes import Shape, count_read, count_written, make_scripts, make_texts, run_episodes
from bench._pool import add_pool_options, has_vllm, make_pool_config
from bench._turns import Arm, Counts, Turn, check_counts, compare, subtract, take_turns, tell_machine
from roro_ray.config import RouterConfig
from roro_ray.engines.loading import load_tokenizer
from roro_ray.engines.pool import EnginePool, make_pool
from roro_ray.engines.protocol import EngineFacts, PrefixIds, StepRequest, StepResult
from roro_ray.routing.router import make_router
from roro_ray.routing.router_policy import RouterPolicy

AIMS = {"bound": 1.10, "whole": 1.3}
WRITING = ("whole", "whole again", "stepwise", "switching", "routed")


class TextOnly:
    """An engine that is handed text, and encodes all of it anew at every step."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.name = engine.name

    @property
    def stats(self) -> Any:
        return self.engine.stats

    async def ready(self) -> EngineFacts:
        return dataclasses.replace(await self.engine.ready(), tokenizer="")

    async def generate_step(self, request: StepRequest) -> StepResult:
        result: StepResult = await self.engine.generate_step(dataclasses.replace(request, known=None))
        return dataclasses.replace(result, encoded_ids=(), exact=False)


def make_arms(pool: EnginePool, shape: Shape, tokenizer: Any, router: Any) -> dict[str, Arm]:
    """The arms by name; `pool` is ready."""
    same, turns = make_scripts(shape, "same"), make_scripts(shape, "alternate")

    def make_episodes(scripts: Sequence[tuple[int, ...]], asked: Any = None) -> Arm:
        return lambda turn: run_episodes(pool, shape, make_texts(shape, turn, tokenizer), scripts, asked)

    def write_whole(turn: str) -> Awaitable[Counts]:
        texts = make_texts(shape, turn, tokenizer)
        requests = [
            (script[0], StepRequest(text + "\n\n", shape.tokens, delimiter=""))
            for text, script in zip(texts, same, strict=True)
        ]
        return ask(pool, requests)

    def prefill(turn: str) -> Awaitable[Counts]:
        return read(make_readings(shape, turn, tokenizer, turns))

    async def read(requests: Sequence[tuple[int, StepRequest]]) -> Counts:
        return Counts((0,) * pool.size, (await ask(pool, requests)).read)

    return {
        "whole": write_whole,
        "prefill": prefill,
        "stepwise": make_episodes(same),
        "switching": make_episodes(turns),
        "routed": make_episodes(turns, router),
        "whole again": write_whole,
    }


def make_readings(
    shape: Shape, turn: str, tokenizer: Any, scripts: Sequence[Sequence[int]]
) -> list[tuple[int, StepRequest]]:
    """For each episode and model, a prompt as long as what the model did not write of it.

    The query's own prompt is part of it for one of the two models only: `whole` has it read by the other one.
    """
    queries = make_texts(shape, turn, tokenizer)
    filler = tokenizer(" ".join(queries), add_special_tokens=False)["input_ids"]
    filler = filler * (2 * shape.tokens // len(filler) + 2)
    requests = []
    for index, (text, script) in enumerate(zip(queries, scripts, strict=True)):
        for model in (0, 1):
            count = sum(writer != model for writer in script) * shape.step_tokens
            head = tokenizer(f"{turn}{index:03d}{model} ", add_special_tokens=False)["input_ids"]
            if model != index % 2:
                count += len(tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = (head + filler[index:])[:count]
            read = str(tokenizer.decode(ids))
            requests.append((model, StepRequest(read, 1, delimiter="", known=PrefixIds(tuple(ids), len(read)))))
    return requests


async def ask(pool: EnginePool, requests: Sequence[tuple[int, StepRequest]]) -> Counts:
    """Make all requests at once, each of the model of its index."""
    before = count_read(pool)
    results = await asyncio.gather(*(pool.engines[model].generate_step(request) for model, request in requests))
    written = [0] * pool.size
    for (model, _), result in zip(requests, results, strict=True):
        written[model] += len(result.token_ids)
    return Counts(tuple(written), tuple(b - a for a, b in zip(before, count_read(pool), strict=True)))


def summarise(turns: dict[str, list[Turn]], by: str) -> dict[str, dict[str, float]]:
    """Ratios and parts, by clock (`wall_s`) or by processor time (`cpu_s`)."""
    whole, prefill = turns["whole"], turns["prefill"]
    found = {
        "routed / bound": compare(turns["routed"], whole, prefill, by=by),
        "routed / whole": compare(turns["routed"], whole, by=by),
        "whole again / whole": compare(turns["whole again"], whole, by=by),
        "part: stop and restart": subtract(turns["stepwise"], whole, whole, by),
        "part: prefill of the switch": subtract(turns["switching"], turns["stepwise"], whole, by),
        "part: router decisions": subtract(turns["routed"], turns["switching"], whole, by),
        "prefill of the bound": compare(prefill, whole, by=by),
    }
    known = {"whole", "prefill", "stepwise", "switching", "routed", "whole again"}
    found |= {f"{name} / switching": compare(turns[name], turns["switching"], by=by) for name in turns.keys() - known}
    return {name: dataclasses.asdict(value) for name, value in found.items()}


async def make_variants(pool: EnginePool, shape: Shape, tokenizer: Any, blocks: EnginePool | None) -> dict[str, Arm]:
    """Arms that change one thing of `switching`."""
    turns, mixed = make_scripts(shape, "alternate"), make_scripts(shape, "random")
    texts = EnginePool([TextOnly(engine) for engine in pool.engines])
    await texts.ready()
    variants: dict[str, Arm] = {
        "text": lambda turn: run_episodes(texts, shape, make_texts(shape, turn, tokenizer), turns),
        "random": lambda turn: run_episodes(pool, shape, make_texts(shape, turn, tokenizer), mixed),
    }
    if blocks is not None:
        await blocks.ready()
        variants["blocks of 128"] = lambda turn: run_episodes(
            blocks, shape, make_texts(shape, turn, tokenizer), turns
        )
    return variants


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Load the models, run all lengths of a step, print a table each."""
    config = make_pool_config(options, directory, options.engine, options.episodes)
    pool = make_pool(config)
    await pool.ready()
    tokenizer = load_tokenizer(config.models[0].path)
    torch.manual_seed(0)
    router = RouterPolicy(make_router(RouterConfig(encoder=options.router_encoder), pool.size))
    blocks = None
    if options.variants and options.engine == "vllm" and options.devices[0] == "cpu":
        blocks = make_pool(make_pool_config(options, directory, options.engine, options.episodes, block_size=128))
    summary: dict[str, Any] = {}
    for step_tokens in options.step_tokens:
        shape = Shape(options.episodes, options.steps, step_tokens, options.prompt_tokens)
        arms = make_arms(pool, shape, tokenizer, router)
        if options.variants:
            arms |= await make_variants(pool, shape, tokenizer, blocks)
        started = tell_machine()
        turns = await take_turns(arms, options.rounds)
        written = count_written(shape, make_scripts(shape, "alternate"))
        check_counts(turns, written, [name for name in arms if name != "prefill"])
        summary[str(step_tokens)] = found = {by: summarise(turns, by) for by in ("wall_s", "cpu_s")}
        found["machine"] = {"before": started, "after": tell_machine()}
        tell(shape, turns, found)
    for engine in (*pool.engines, *(blocks.engines if blocks is not None else ())):
        if hasattr(engine, "close"):
            engine.close()
    return summary


def tell(shape: Shape, turns: dict[str, list[Turn]], found: dict[str, Any]) -> None:
    """Print the table of one shape."""
    print(f"\n{shape} ({found['machine']['before']}; after: {found['machine']['after']})")
    print(f"{'arm':16} {'wall s':>22} {'CPU s':>22}   written   read of prompts")
    for name, runs in turns.items():
        wall, cpu = (compare(runs, [dataclasses.replace(run, wall_s=1, cpu_s=1) for run in runs], by=by) for by in BY)
        print(f"{name:16} {wall!s:>22} {cpu!s:>22}   {runs[0].counts.written} {runs[0].counts.read}")
    print(f"{'':34} {'by clock':>24} {'by processor time':>24}")
    for name in found["wall_s"]:
        clock, cpu = (found[by][name] for by in BY)
        told = [f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})" for value in (clock, cpu)]
        aim = next((f"   aim: at most {aim:.2f}" for part, aim in AIMS.items() if name == f"routed / {part}"), "")
        print(f"{name:34} {told[0]:>24} {told[1]:>24}{aim}", flush=True)


BY = ("wall_s", "cpu_s")


def main(argv: list[str] | None = None) -> None:
    """Command line: tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", choices=("vllm", "hf"))
    parser.add_argument("--episodes", type=int, default=32, help="all at once")
    parser.add_argument("--steps", type=int, default=8, help="of an episode; an even number")
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--router-encoder", default=RouterConfig().encoder)
    parser.add_argument("--variants", action="store_true", help="arms that change one thing each")
    parser.add_argument("--quick", action="store_true", help="few short steps, to see that it runs")
    add_pool_options(parser)
    options = parser.parse_args(argv)
    if options.engine == "vllm" and not has_vllm():
        return
    if options.steps % 2 or options.episodes % 2:
        parser.error("--steps and --episodes must be even, so that each model writes one half")
    if options.quick:
        options.episodes, options.steps, options.step_tokens, options.rounds = 4, 4, [8], 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(asyncio.run(measure(options, Path(directory)))))


if __name__ == "__main__":
    main()
