"""A world of known optimum for the router: four steps, of which only the second needs the large model.

Both models are scripted, so that every float is the same in every process and batch, and whether weights are
bit-equal can be asked. Lives in a module of its own because rollout workers import it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roro_ray.config import STEP_DELIMITER, Config
from roro_ray.engines.pool import EnginePool
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.types import Query
from tests.fakes import ScriptedEngine

HARD_STEP = 1


def _write(model: str, prefix: str) -> str:
    index = prefix.count(STEP_DELIMITER) - 1
    if index >= 3:
        return "Answer: 0" if "wrong" in prefix else "Answer: 42"
    done = "wrong" if index == HARD_STEP and model == "small" else "right"
    return f"{chr(65 + index)}: {done}"


def _confidence(prefix: str) -> float:
    """Low on the step before the hard one: the signal to learn from; else a little different each time."""
    return 0.2 if prefix.count(STEP_DELIMITER) == HARD_STEP else 0.9 + len(prefix) % 7 / 100


def make_engines(delay_s: float = 0.0, **large: Any) -> list[ScriptedEngine]:
    """The small and the large model, alike but for the hard step."""
    small = ScriptedEngine("small", lambda p: _write("small", p), delay_s=delay_s, confidence=_confidence)
    options = {"parameters": 100, "delay_s": delay_s, "confidence": _confidence, **large}
    return [small, ScriptedEngine("large", lambda p: _write("large", p), **options)]


def make_scripted_runner(config: Config, engines: Sequence[Any] = ()) -> Any:
    """As `actors.rollout.make_runner`, with scripted engines (slower by `RORO_TEST_DELAY_S` a step)."""
    from roro_ray.routing.router import make_router
    from roro_ray.routing.router_policy import RouterPolicy
    from roro_ray.routing.runner import Runner

    delay_s = float(config.pool.models[0].path.partition("=")[2] or 0.0)
    pool = EnginePool(list(engines) or make_engines(delay_s))
    network = make_router(config.router, pool.size)
    return Runner(pool, RouterPolicy(network, version=-1), config.episode, config.ray.concurrency)


def make_scripted_config(directory: Path | str = "unused", delay_s: float = 0.0) -> Config:
    """Small settings under which a router learns the optimum in seconds."""
    config = Config(run_dir=str(directory))
    config.pool.models[0].path = f"scripted:delay={delay_s}"
    router = config.router
    router.encoder, router.hidden, router.iterations, router.queries, router.group_size = "", 16, 8, 4, 8
    router.epochs = 1
    router.beta, router.head_lr, router.checkpoint_every, config.evaluate.every = 0.0, 1e-2, 3, 4
    config.episode.timeout_s, config.reward.timeout_s, config.ray.timeout_s = 30.0, 30.0, 60.0
    config.ray.worker_cpus = config.ray.learner_cpus = config.ray.reward_cpus = 0.5
    return config


def make_scripted_queries(count: int = 12) -> list[Query]:
    """Queries that all have the same hard step."""
    return [Query(f"scripted/{i}", "scripted", "train", f"Task {i}.", "42") for i in range(count)]


def make_specs(count: int, strategy: str = "random:0.5") -> list[EpisodeSpec]:
    """One spec a query, each with a seed of its own."""
    return [
        EpisodeSpec(f"{strategy}/{i}", query, strategy, seed=i) for i, query in enumerate(make_scripted_queries(count))
    ]


def exit_worker(prefix: str) -> bool:
    """A model that takes its process down with it."""
    os._exit(1)
