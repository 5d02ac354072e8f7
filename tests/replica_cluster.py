"""What the driver of the autoscaling test runs: rollouts whose large model lives on nodes that come when needed."""

from __future__ import annotations

import os
import time
from typing import Any

from actors.fleet import Fleet, start_engines
from actors.rollout import RolloutPool
from roro_ray.config import Config, ModelConfig, PoolConfig
from tests.fakes import ScriptedEngine, run_specs
from tests.scripted_world import make_engines, make_scripted_config, make_scripted_runner, make_specs


def make_slow_engine(model: ModelConfig, pool: PoolConfig) -> ScriptedEngine:
    """The scripted model of that name, slow enough that requests wait for each other."""
    return next(engine for engine in make_engines(0.2) if engine.name == model.name)


def make_cluster_config(most: int) -> Config:
    """The large model on nodes with an `accelerator`, of which there are none to begin with."""
    config = make_scripted_config()
    config.pool.placement = "actors"
    config.ray.workers, config.ray.worker_cpus, config.ray.engine_cpus, config.ray.timeout_s = 1, 0.2, 0.1, 100.0
    config.ray.resources = {"large": {"accelerator": 1.0}}
    config.ray.replicas = {"large": [0, most]}
    config.ray.replica_target, config.ray.replica_idle_s = 8.0, 2.0
    config.episode.timeout_s = 100.0
    return config


def run_from_nothing(most: int, episodes: int) -> dict[str, Any]:
    """Replicas and nodes while rollouts ask for the large model, and after; whether the trajectories are right."""
    import dataclasses

    import ray

    import actors.rollout

    def start(config: Config) -> Fleet:
        return start_engines(config, make_slow_engine)

    actors.rollout.start_engines = start
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    pool = RolloutPool.start(make_cluster_config(most), make_scripted_runner)
    try:
        sizes: list[tuple[int, int]] = []
        assert pool.fleet is not None
        pool.fleet.watch(lambda facts: sizes.append((facts["large"]["now"], count_nodes())))
        idle = wait_for_release(pool)
        specs = make_specs(episodes)
        results = pool.run(specs)
        while max(now for now, _ in sizes) < most:  # the first replica is quick; the test has a deadline
            assert len(pool.run(specs)) == episodes
        expected = run_specs(make_scripted_runner(make_scripted_config()), specs)
        right = [dataclasses.asdict(a) == dataclasses.asdict(b) for a, b in zip(results, expected, strict=True)]
        while count_nodes() > 1:  # the test has a deadline
            time.sleep(0.5)
        return {"right": sum(right), "sizes": sizes, "idle": idle, "facts": wait_for_release(pool)}
    finally:
        pool.stop()


def wait_for_release(pool: RolloutPool) -> dict[str, int]:
    """Facts of the large model once no replica of it is there."""
    while (facts := pool.fleet_facts()["large"])["now"] or facts["wanted"]:
        time.sleep(0.2)
    return facts


def count_nodes() -> int:
    """Nodes that are alive, the head among them."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())
