"""A PPO training on disk, apart from the library that trains: its settings, its budget, and what it leaves.

It leaves what GRPO's training leaves (`learning.router_run`): `metrics.jsonl`, `snapshots/iteration_N/`, a saved
router, and `FINISHED.json` last; so evaluation, calibration and serving know no difference. A batch of PPO holds
decisions, not groups of episodes: snapshot N is taken as soon as the episodes of N iterations of GRPO are done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roro_ray.config import Config
from roro_ray.data.files import write_whole
from roro_ray.learning.checkpoints import check_settings
from roro_ray.learning.router_run import (
    FINISHED,
    METRICS,
    Finished,
    add_task_settings,
    cut_metrics,
    format_metrics,
    list_snapshots,
    save_snapshot,
)
from roro_ray.learning.router_run import read_metrics as read_rows
from roro_ray.plan import count_ppo_episodes
from roro_ray.routing.router import RouterNetwork
from roro_ray.routing.router_files import save_router

METHOD = "ppo_rllib"
CHECKPOINTS = "ppo_rllib"  # RLlib's own, below the training's directory
# The network and the episodes; how GRPO trains is not PPO's concern.
_ROUTER_KEYS = (
    *("encoder", "encoder_revision", "encoder_dtype", "encoder_rank", "hidden", "prior", "peek"),
    *("cost_weight_low", "cost_weight_high", "final_lr", "grad_clip"),
)
_FREE = ("episodes", "envs", "learners", "text_tokens")


def fix_ppo_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what is learned: a resumed training must have the same."""
    settings: dict[str, Any] = {f"ppo.{key}": value for key, value in asdict(config.ppo).items() if key not in _FREE}
    settings |= {f"router.{key}": getattr(config.router, key) for key in _ROUTER_KEYS}
    return add_task_settings(settings, config)


def load_finished_ppo(directory: Path, config: Config) -> Finished | None:
    """A training that has had its episodes, or None where there are (more) to do.

    Raises:
        CheckpointError: it was made with other settings.
    """
    marker = directory / FINISHED
    if not marker.is_file():
        return None
    facts = json.loads(marker.read_text())
    check_settings(facts["settings"], fix_ppo_settings(config), directory)
    if facts["budget"] < count_ppo_episodes(config):
        return None
    return Finished(read_rows(directory / METRICS), list_snapshots(directory))


class PpoRun:
    """What a training writes beside the library's checkpoints.

    Args:
        directory: of this training.
        iteration, episodes: what a checkpoint that is gone on from had done.
    """

    def __init__(self, config: Config, directory: Path, iteration: int, episodes: int) -> None:
        self._config = config
        self._directory = directory
        self.iteration = iteration
        self.episodes = episodes
        self.budget = count_ppo_episodes(config)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FINISHED).unlink(missing_ok=True)
        cut_metrics(directory / METRICS, iteration)

    @property
    def is_over(self) -> bool:
        """The episodes are used up."""
        return self.episodes >= self.budget

    @property
    def progress(self) -> float:
        """Share of the episodes that are done, at most 1."""
        return min(self.episodes / self.budget, 1.0)

    def write(self, metrics: Mapping[str, float], network: RouterNetwork) -> None:
        """Record an iteration; `metrics` has its number and the episodes that ended in it."""
        before = self.episodes
        self.iteration, self.episodes = int(metrics["iteration"]), before + int(metrics["episodes"])
        with (self._directory / METRICS).open("a") as file:
            file.write(format_metrics(dict(metrics)))
        self.save_snapshot(network, before)

    def save_snapshot(self, network: RouterNetwork, before: int = -1) -> None:
        """Keep the network if a point of the learning curve lies between `before` episodes and now."""
        batch = self._config.router.queries * self._config.router.group_size
        every = self._config.evaluate.every * batch
        if self.episodes // every == before // every and not (self.is_over and before < self.budget):
            return
        point = self.budget // batch if self.is_over else self.episodes // every * self._config.evaluate.every
        save_snapshot(network, self._directory, point, self.iteration)

    def finish(self, network: RouterNetwork) -> None:
        """Save the trained router; the training counts as finished from then on."""
        save_router(network, self._directory, self.iteration)
        facts = {"iterations": self.iteration, "episodes": self.episodes, "budget": self.budget}
        with write_whole(self._directory / FINISHED) as temporary:
            temporary.write_text(json.dumps({**facts, "settings": fix_ppo_settings(self._config)}, indent=1) + "\n")
