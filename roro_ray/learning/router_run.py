"""A router training on disk: what is written when, how a stopped one goes on, and how a finished one is read.

Layout of a training's directory: `metrics.jsonl` (one line per iteration), `checkpoints/`, `snapshots/iteration_N/`
(the router as it was after N iterations, for learning curves), the trained router itself, and `FINISHED.json`, which
comes last.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from roro_ray.config import Config
from roro_ray.data.files import append_line, explain_full_disk, write_whole
from roro_ray.data.sources import describe_sources, make_stage_queries
from roro_ray.errors import CheckpointError
from roro_ray.learning.checkpoints import (
    check_settings,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from roro_ray.learning.router_pipeline import Run
from roro_ray.learning.router_rewards import Score
from roro_ray.learning.router_training import Publish, RouterTrainer, Share
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.router import RouterNetwork, make_router
from roro_ray.routing.router_files import save_router
from roro_ray.types import Query

FINISHED = "FINISHED.json"
METRICS = "metrics.jsonl"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
RESUMED_FROM = (CHECKPOINTS, METRICS, FINISHED)  # what a training reads that goes on
# Settings that may change between a run and its resumption without changing what is learned up to there.
_FREE = (
    *("iterations", "workers", "checkpoint_every", "max_failures"),
    *("micro_batch", "gradient_checkpointing", "cache_mb"),
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished training as it lies on disk."""

    metrics: list[dict[str, float]]
    snapshots: dict[int, Path]


def load_finished(directory: Path, config: Config) -> Finished | None:
    """A training that has done `router.iterations` iterations, or None where there is (more) to do.

    Raises:
        CheckpointError: it was made with other settings.
    """
    marker = directory / FINISHED
    if not marker.is_file():
        return None
    facts = json.loads(marker.read_text())
    check_settings(facts["settings"], fix_settings(config), directory)
    if facts["iterations"] < config.router.iterations:
        return None
    if facts["iterations"] > config.router.iterations:
        raise CheckpointError(
            f"{str(directory)!r} holds a router trained for {facts['iterations']} iterations, and router.iterations is "
            f"{config.router.iterations}: raise it, or use another run directory."
        )
    return Finished(read_metrics(directory / METRICS), list_snapshots(directory))


def check_resumable(directory: Path, config: Config) -> None:
    """Raise CheckpointError where a training lies there that these settings cannot go on with."""
    checkpoint = find_checkpoint(directory / CHECKPOINTS)
    if checkpoint is not None:
        check_settings(read_state(checkpoint)["settings"], fix_settings(config), checkpoint)


def fix_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what is learned: a resumed run must have the same."""
    settings: dict[str, Any] = {key: value for key, value in asdict(config.router).items() if key not in _FREE}
    if config.router.beta:
        settings["reward.rubric_source"] = config.reward.rubric_source
    return add_task_settings(settings, config)


def add_task_settings(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """A method's own settings with those of the task that every way to train a router has, as JSON gives them back."""
    settings = {**settings, "seed": config.seed}
    settings |= {f"episode.{key}": value for key, value in asdict(config.episode).items() if key != "timeout_s"}
    settings |= {f"data.{key}": getattr(config.data, key) for key in ("suites", "router_queries", "seed")}
    settings |= {f"data.{key}": value for key, value in describe_sources(config.data).items()}
    settings["pool.models"] = [model.path for model in config.pool.models]
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def make_train_queries(config: Config) -> list[Query]:
    """The queries that router training draws from, all training suites."""
    return make_stage_queries(config, "train", config.data.router_queries)


def list_snapshots(directory: Path) -> dict[int, Path]:
    """Snapshots by the number of iterations done."""
    paths = sorted((directory / SNAPSHOTS).glob("iteration_*"))
    return {int(path.name.removeprefix("iteration_")): path for path in paths}


def save_snapshot(network: RouterNetwork, directory: Path, point: int, version: int) -> None:
    """Keep the network as it is at a point of the learning curve: whole or, where the disk is full, not at all.

    Args:
        directory: of the training.
        point: iterations done, as `list_snapshots` counts them.
        version: that the saved router says of itself.

    Raises:
        FullDiskError: there was no room.
    """
    final = directory / SNAPSHOTS / f"iteration_{point:06d}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_full_disk(final):
            save_router(network, temporary, version)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a disk that is full would stay so
        raise
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line that was cut short is left out."""
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def format_metrics(metrics: dict[str, float]) -> str:
    """One line of JSON; NaN, which JSON has no word for, as null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}) + "\n"


def cut_metrics(path: Path, iteration: int) -> None:
    """Leave the lines of iterations up to this one: what comes later will be done, and written, again."""
    rows = [row for row in read_metrics(path) if row["iteration"] <= iteration]
    with write_whole(path) as temporary:
        temporary.write_text("".join(map(format_metrics, rows)))


class RouterRun:
    """Trains in a directory, from its last whole checkpoint on. Only rank 0 writes.

    Args:
        directory: of this training; the other arguments as for `RouterTrainer`.

    Raises:
        CheckpointError: the checkpoint there does not fit these settings.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        queries: Sequence[Query],
        run: Run,
        score: Score | None,
        publish: Publish,
        share: Share | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config = config
        self._directory = directory
        self._writes = share is None or share.rank == 0
        self._settings = fix_settings(config)
        torch.manual_seed(mix_seed(config.seed, "router weights"))
        network = make_router(config.router, len(config.pool.models)).to(device)
        if config.router.gradient_checkpointing:
            network.checkpoint_activations()
        self.trainer = RouterTrainer(config, network, queries, run, score, publish, share)
        checkpoint = find_checkpoint(directory / CHECKPOINTS)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.trainer, self._settings)
        self._share = share or Share()

    @property
    def at_checkpoint(self) -> bool:
        """A checkpoint is due after the iteration just done (the same answer on every rank)."""
        done, settings = self.trainer.iteration, self._config.router
        return done % settings.checkpoint_every == 0 or done >= settings.iterations

    def iterate(self) -> Iterator[dict[str, float]]:
        """Do the iterations that are left, each written before its metrics are given."""
        directory, trainer, total = self._directory, self.trainer, self._config.router.iterations
        # No rank may pass over a checkpoint that another resumes from: all have chosen theirs before one is written.
        self._share.add(torch.zeros(1))
        if self._writes:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / FINISHED).unlink(missing_ok=True)
            cut_metrics(directory / METRICS, trainer.iteration)
            self._save_snapshot()
        trainer.begin()
        try:
            while trainer.iteration < total:
                metrics = trainer.step()
                if self._writes:
                    self._write(metrics)
                yield metrics
        finally:
            trainer.close()
        if self._writes:
            save_router(trainer.network, directory, trainer.iteration)
            facts = {"iterations": trainer.iteration, "settings": self._settings}
            with write_whole(directory / FINISHED) as temporary:
                temporary.write_text(json.dumps(facts, indent=1) + "\n")

    def _write(self, metrics: dict[str, float]) -> None:
        append_line(self._directory / METRICS, format_metrics(metrics).rstrip("\n"))
        self._save_snapshot()
        if self.at_checkpoint:
            save_checkpoint(self._directory / CHECKPOINTS, self.trainer, self._settings)

    def _save_snapshot(self) -> None:
        done, total = self.trainer.iteration, self._config.router.iterations
        if done % self._config.evaluate.every and done < total:
            return
        save_snapshot(self.trainer.network, self._directory, done, done)
