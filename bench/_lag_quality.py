"""What a lag costs in quality: routers trained at several lags and objectives, measured on queries held out.

What a training learns is a function of its settings and seed, whatever the timing, so everything happens in one
process a seed, whose models remember their greedy steps for all of its trainings.
"""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from roro_ray.config import Config
from roro_ray.data.sources import make_stage_queries
from roro_ray.evaluation.bootstrap import interval, make_resamples, weighted_means
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.methods import fixed_setting, router_settings, score_settings
from roro_ray.evaluation.metrics import Scores
from roro_ray.evaluation.operating_point import choose_setting
from roro_ray.learning.grpo import EmptyBatchWarning
from roro_ray.learning.router_run import make_train_queries
from roro_ray.learning.router_training import RouterTrainer
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.routing.runner import Runner


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to train."""

    max_lag: int
    objective: str = "ppo"

    @property
    def name(self) -> str:
        """`0`, `2 ppo`, `2 decoupled`."""
        return f"{self.max_lag} {self.objective}" if self.max_lag else "0"


@dataclass(slots=True)
class Found:
    """Of one arm and one seed, a value per test query, and the training's own metrics.

    `gain` is what the router is trained for, outcome - cost weight x share of large steps, mean over the cost weights
    of the sweep; `accuracy` and `large_share` are those of the operating point that validation chose.
    """

    gain: np.ndarray
    accuracy: np.ndarray
    large_share: np.ndarray
    training: dict[str, float] = field(default_factory=dict)


def measure_quality(config: Config, arms: Sequence[Arm], seeds: Sequence[int], processes: int = 1) -> dict[str, Any]:
    """Every arm's figures against the first's: means over seeds, differences paired by query and seed."""
    if processes == 1:
        by_seed = [measure_seed(config, arms, seed) for seed in seeds]
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as executor:
            by_seed = list(executor.map(measure_seed, repeat(config), repeat(arms), seeds))
    suites = [query.suite for query in make_stage_queries(config, "test", config.data.test_queries)]
    weights_RQ = make_resamples(suites, config.evaluate.bootstrap, config.seed)
    return {arm.name: _compare(arm.name, arms[0].name, by_seed, weights_RQ) for arm in arms}


def _compare(name: str, first: str, by_seed: Sequence[dict[str, Found]], weights_RQ: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for quantity in ("gain", "accuracy", "large_share"):
        own_SQ = np.stack([getattr(of_seed[name], quantity) for of_seed in by_seed])
        base_SQ = np.stack([getattr(of_seed[first], quantity) for of_seed in by_seed])
        difference_R = weighted_means((own_SQ - base_SQ).mean(0), weights_RQ)
        limits = interval(difference_R)
        found[quantity] = round(float(own_SQ.mean()), 4)
        found[f"{quantity}_difference"] = round(float(difference_R[0]), 4)
        found[f"{quantity}_interval"] = None if limits is None else [round(limit, 4) for limit in limits]
        found[f"{quantity}_by_seed"] = [round(float(value), 4) for value in (own_SQ - base_SQ).mean(1)]
    for key in by_seed[0][name].training:
        found[key] = round(float(np.mean([of_seed[name].training[key] for of_seed in by_seed])), 4)
    return found


def measure_seed(config: Config, arms: Sequence[Arm], seed: int) -> dict[str, Found]:
    """All arms of one seed, on one pool whose memo they share."""
    torch.set_num_threads(1)
    config = copy.deepcopy(config)
    config.seed = seed
    with TemporaryDirectory() as directory, LocalHost(config) as host:
        found = {}
        for arm in arms:
            config.router.max_lag, config.router.objective = arm.max_lag, arm.objective
            training = train_arm(config, host, Path(directory) / arm.name)
            host.use_router(Path(directory) / arm.name)
            found[arm.name] = _read_router(config, host, training)
    return found


def train_arm(config: Config, host: LocalHost, directory: Path) -> dict[str, float]:
    """Train by outcome and cost alone, in this process; the router goes to a directory. Returns what training told."""
    torch.manual_seed(config.seed)
    network = make_router(config.router, host.pool.size)
    runner = Runner(host.pool, RouterPolicy(make_router(config.router, host.pool.size), -1), config.episode)
    states: dict[int, dict[str, torch.Tensor]] = {}
    turn = threading.Lock()

    def run(specs: Sequence[Any], version: int) -> list[Any]:
        with turn:  # one runner, one version at a time: what is learned is the same
            runner.load_router(states[version], version)
            return asyncio.run(runner.run(specs))

    def publish(state: dict[str, torch.Tensor], version: int) -> None:
        states[version] = {name: tensor.detach().clone() for name, tensor in state.items()}

    trainer = RouterTrainer(config, network, make_train_queries(config), run, None, publish)
    trainer.begin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyBatchWarning)
        rows = [trainer.step() for _ in range(config.router.iterations)]
    trainer.close()
    save_router(network, directory, trainer.iteration)
    metrics = {name: np.asarray([row.get(name, 0.0) for row in rows]) for name in ("reward", "lag_kl", "lag_cut")}
    clipped = [row.get("clip_fraction", 0.0) for row in rows]
    return {
        "reward_area": float(metrics["reward"].mean()),  # of all rollouts of the training
        "lag_kl_mean": float(metrics["lag_kl"].mean()),
        "lag_kl_most": float(metrics["lag_kl"].max()),
        "lag_cut_mean": float(metrics["lag_cut"].mean()),
        "clipped_mean": float(np.mean(clipped)),
    }


def _read_router(config: Config, host: LocalHost, training: dict[str, float]) -> Found:
    settings = router_settings(config.evaluate.curve_cost_weights)
    scores: dict[str, list[Scores]] = {}
    large: dict[str, Scores] = {}
    for split, count in (("validation", config.data.validation_queries), ("test", config.data.test_queries)):
        queries = make_stage_queries(config, split, count)
        scores[split] = score_settings(host, split, settings, queries, config.seed)
        [large[split]] = score_settings(host, split, [fixed_setting(host.pool.size - 1, "large")], queries, config.seed)
    test = scores["test"]
    chosen = test[choose_setting(scores["validation"], large["validation"], config.evaluate.accuracy_slack)]
    gains = [
        each.of("accuracy") - setting.cost_weight * each.of("cost_share")
        for each, setting in zip(test, settings, strict=True)
    ]
    return Found(np.mean(gains, axis=0), chosen.of("accuracy"), chosen.of("cost_share"), training)
