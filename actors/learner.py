"""Router training as a Ray Train run: the driver's side and the loop of each rank.

The algorithm is `learning.router_training.RouterTrainer`; here are its lifetimes. Each rank rolls out, scores and
differentiates its share of an iteration's groups, gradients are summed over the ranks, rank 0 writes. Checkpoints are
ours (whole or not there), so a worker group that Ray Train restarts, and a run that is started again, go on from the
last one and end with the weights that a run without interruption has. Where the run is remote, each rank works on the
copy of its node: rank 0 uploads every checkpoint, and all ranks begin with the one that is there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.capacity import wait_for_resources
from actors.cluster import note_caller
from actors.placement import make_scaling
from actors.publish import BoardClient, Heard
from actors.reward_service import RewardClient
from actors.rollout import RolloutPool
from actors.storage import drop_train_notes, meet, train_storage
from roro_ray.config import Config
from roro_ray.data.mirror import Mirror, Part
from roro_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeadlineError,
    MissingWeightsError,
    RolloutError,
    RoroError,
    ScoreError,
    TrainingError,
)
from roro_ray.learning.router_run import (
    FINISHED,
    METRICS,
    RESUMED_FROM,
    SNAPSHOTS,
    RouterRun,
    check_resumable,
    load_finished,
    make_train_queries,
)
from roro_ray.placement import Bundle, role_bundle
from roro_ray.routing.router_files import ROUTER_FILES
from roro_ray.types import Query

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]
_POLL_S = 0.25
_END_S = 10.0  # for the other ranks to end after one has told what no restart cures
_START_S = 120.0  # starting a worker group, importing torch and loading the router


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training left: its directory (a saved router), one row of metrics per iteration, and the snapshots.

    `snapshots` maps the number of iterations done to a directory with the router as it then was. `restarts` counts
    the times that the worker group was started again in this run.
    """

    router_dir: Path
    metrics: list[dict[str, float]]
    snapshots: dict[int, Path]
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """What every rank is given."""

    config: Config
    router: Part
    queries: tuple[Query, ...]
    pool: RolloutPool
    reward: RewardClient | None
    channel: str


def train_router(
    config: Config,
    name: str,
    rollout_pool: RolloutPool,
    reward_service: RewardClient | None,
    run_dir: str | Path | Mirror,
    progress: Progress | None = None,
    queries: list[Query] | None = None,
) -> TrainResult:
    """Train a router by GRPO, or go on with a training that was stopped; a finished one is only read.

    Args:
        name: of the training; it writes to `run_dir/router/name`.
        run_dir: a path on a file system that driver and ranks share, or the mirror of a remote run.
        reward_service: may be None where `router.beta` is 0.
        progress: called with (iterations done, iterations, metrics) after each iteration.
        queries: what iterations draw from; the embedded world's training queries when None.

    Raises:
        ConfigError: `beta` > 0 without a reward service.
        ResourceError: the cluster cannot give what the ranks ask for.
        CheckpointError: what lies there was made with other settings or is of another shape.
        TrainingError: the ranks failed more often than `router.max_failures`.
        DeadlineError: no iteration ended for longer than rollouts and scoring may take.
        DataError: the store of a remote run does not answer, or another job has taken it over.
    """
    if config.router.beta and reward_service is None:
        raise ConfigError(
            f"router.beta is {config.router.beta} and there is no reward service: start one, or set router.beta=0."
        )
    router = (run_dir if isinstance(run_dir, Mirror) else Mirror(run_dir)).part(f"router/{name}")
    router.pull(*RESUMED_FROM)
    router_dir = router.path
    finished = load_finished(router_dir, config)
    if finished is not None:
        return TrainResult(router_dir, finished.metrics, finished.snapshots)
    check_resumable(router_dir, config)
    bundles = [_rank_bundle(config)] * config.router.workers
    wait_for_resources(bundles, f"router training {name!r}", config.ray)
    drawn = tuple(queries if queries is not None else make_train_queries(config))
    channel = f"{name}-{uuid.uuid4().hex[:8]}"
    router_dir.mkdir(parents=True, exist_ok=True)
    job = _Job(config, router, drawn, rollout_pool, reward_service, channel)
    restarts = _Watch(job, name, progress).run()
    router.pull(FINISHED, METRICS, SNAPSHOTS, *ROUTER_FILES)
    finished = load_finished(router_dir, config)
    if finished is None:
        raise TrainingError(f"router training {name!r} ended, and {router.place} has no finished router: run it again.")
    drop_train_notes(router)
    return TrainResult(router_dir, finished.metrics, finished.snapshots, restarts)


def _rank_bundle(config: Config) -> Bundle:
    return role_bundle(config, "learner", config.ray.learner_cpus, config.ray.learner_gpus)


class _Watch:
    """Runs Ray Train in a thread, and meanwhile passes the ranks' messages on and minds the deadline.

    In the main thread `fit` would replace the driver's handler of Ctrl-C, and nothing would be heard until the end.
    """

    def __init__(self, job: _Job, name: str, progress: Progress | None) -> None:
        self._job = job
        self._name = name
        self._progress = progress
        self._board: BoardClient = job.pool.board
        self._heard = Heard()
        self._starts = 0
        self._fatal: RoroError | None = None
        self._failure: BaseException | None = None

    def run(self) -> int:
        """Train to the end; returns how often the ranks were started again."""
        config = self._job.config
        thread = threading.Thread(target=self._fit, name=f"train {self._name}", daemon=True)
        patience = _rollout_patience(config) + (config.reward.timeout_s if config.router.beta else 0.0) + _START_S
        thread.start()
        note_caller(thread)
        last = time.monotonic()
        while thread.is_alive():
            thread.join(_POLL_S)
            if self._listen():
                last = time.monotonic()
            if self._fatal is not None and time.monotonic() - last > _END_S:
                break
            if time.monotonic() - last > patience:
                raise DeadlineError(
                    f"router training {self._name!r}: no iteration ended in {patience:g} s. Raise episode.timeout_s or "
                    "reward.timeout_s if the work is merely slow; else see the Train workers' logs."
                )
        self._listen()
        if self._fatal is not None:
            raise self._fatal
        if self._failure is not None:
            raise TrainingError(
                f"router training {self._name!r} failed {config.router.max_failures + 1} times, the last time with: "
                f"{_first_line(self._failure)}. What was learned is kept in "
                f"{self._job.router.place}: run it again to go on."
            ) from self._failure
        return max(self._starts - 1, 0)

    def _listen(self) -> bool:
        """Pass on what the ranks have said; whether they have said anything."""
        self._heard = self._board.hear(self._job.channel, self._heard)
        for message in self._heard.messages:
            if message["kind"] == "started":
                self._starts += 1
            elif message["kind"] == "error":
                self._fatal = self._fatal or message["error"]
            elif self._progress is not None:
                metrics = message["metrics"]
                self._progress(int(metrics["iteration"]), self._job.config.router.iterations, metrics)
        return bool(self._heard.messages)

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        config = self._job.config
        try:
            TorchTrainer(
                train_loop,
                train_loop_config={"job": self._job},
                torch_config=TorchConfig(timeout_s=int(_rollout_patience(config) + config.reward.timeout_s + _START_S)),
                scaling_config=make_scaling(_rank_bundle(config), config.router.workers),
                run_config=RunConfig(
                    name=self._job.channel,  # never used before: resuming is our checkpoints' business
                    **train_storage(self._job.router),
                    failure_config=FailureConfig(max_failures=config.router.max_failures),
                ),
            ).fit()
        except Exception as error:  # the thread's border: `run` raises it in the driver
            self._failure = error


def _rollout_patience(config: Config) -> float:
    """Batches in the air share the workers: one may wait for room until each before it has used up its time."""
    return config.episode.timeout_s * (1 + config.router.max_lag)


def _first_line(error: BaseException) -> str:
    """The line of a Ray Train failure that names the cause (the last one of its traceback)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def train_loop(settings: dict[str, Any]) -> None:
    """What each rank runs.

    An error that no restart cures (wrong settings, an unusable checkpoint, a full disk, more failures than the settings
    bear) is told to the driver, and the loop ends; anything else goes to Ray Train, which starts the group again, and
    that publishes the weights anew.
    """
    job: _Job = settings["job"]
    try:
        _train(job)
    except MissingWeightsError:
        raise
    except (ConfigError, CheckpointError, DataError, RolloutError, ScoreError) as error:
        job.pool.board.tell({"kind": "error", "error": error}, job.channel)


def _train(job: _Job) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from roro_ray.learning.router_training import Share

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    config = job.config

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if world == 1:
            return tensor
        total = tensor.to(device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def publish(state: dict[str, torch.Tensor], version: int) -> None:
        if rank == 0:
            job.pool.publish(state, version, job.channel, keep=config.router.max_lag + 2)
        if world > 1:  # the others may not ask for weights that are not there yet
            torch.distributed.barrier()

    def run(specs: Any, version: int) -> Any:
        return job.pool.run(specs, version, job.channel)

    score = None if job.reward is None else job.reward.score
    started = time.perf_counter()
    meet(job.router, rank, world, RESUMED_FROM)
    directory = job.router.path
    router_run = RouterRun(config, directory, job.queries, run, score, publish, Share(rank, world, add), device)
    if rank == 0:
        resumed = {"iteration": router_run.trainer.iteration, "pid": os.getpid()}
        job.pool.board.tell({"kind": "started", "seconds": time.perf_counter() - started, **resumed}, job.channel)
    for metrics in router_run.iterate():
        if rank == 0:
            if router_run.at_checkpoint:
                job.router.push()
            job.pool.board.tell({"kind": "metrics", "metrics": {**metrics, "pid": os.getpid()}}, job.channel)
        if router_run.at_checkpoint:
            ray.train.report(metrics)  # waits for every rank and the controller, so not every iteration
    if rank == 0:
        job.router.push()
