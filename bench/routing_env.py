"""Steps per second of the routing environment, alone and many side by side: `python -m bench.routing_env`.

The embedded world in one process, a random model for each step. Every size steps the same number of episodes' steps on
a pool of its own, so that none profits from steps that another's engines remember; sizes take turns over the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from roro_ray.config import Config
from roro_ray.engines.pool import make_pool
from roro_ray.learning.router_run import make_train_queries
from roro_ray.routing.gym_env import RoutingVectorEnv
from roro_ray.routing.gym_world import RoutingWorld
from roro_ray.routing.router import PieceTokenizer, make_router


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing_env", description=__doc__)
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 8, 32, 128], help="episodes side by side")
    parser.add_argument("--steps", type=int, default=1280, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    rates: dict[int, list[float]] = {size: [] for size in arguments.envs}
    for round_ in range(arguments.rounds):
        for size in arguments.envs:
            rates[size].append(measure(size, arguments.steps, seed=round_))
    for size, found in rates.items():
        shown = ", ".join(f"{rate:.0f}" for rate in found)
        print(f"{size:4d} side by side: {np.median(found):6.0f} steps/s (rounds: {shown})")
    return 0


def measure(size: int, steps: int, seed: int) -> float:
    """Steps per second of `size` environments, the first ticks, in which engines warm up, left out."""
    config = Config()
    config.pool.memo_entries = 0
    network = make_router(config.router, 2)
    pieces, vocabulary = PieceTokenizer(network.tokenizer), int(network.body.config.vocab_size)  # type: ignore[union-attr]
    text = (pieces, vocabulary, config.ppo.text_tokens)
    world = RoutingWorld(make_pool(config.pool), make_train_queries(config), config.episode, config.router, *text)
    env = RoutingVectorEnv(world, size)
    env.reset(seed=seed)
    random = np.random.default_rng(seed)
    for _ in range(3):
        env.step(random.integers(0, 2, size))
    began, ticks = time.perf_counter(), max(steps // size, 1)
    for _ in range(ticks):
        env.step(random.integers(0, 2, size))
    rate = ticks * size / (time.perf_counter() - began)
    env.close()
    return rate


if __name__ == "__main__":
    raise SystemExit(main())
