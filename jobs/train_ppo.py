"""A baseline beside stage 4: train the router by RLlib's PPO, on outcome and cost alone.

It needs no stage before it. What it trains is a router like the others, `router/ppo_rllib` in the run directory, and
`jobs.evaluate` compares it with whatever else was trained there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job, run_stage
from jobs._cluster import open_ray
from jobs._progress import Progress
from jobs._terminal import say
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("ppo", "router", "data", "ray", "wandb")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return run_job(make_parser("train_ppo", __doc__ or "", KEYS), _main, argv)


def _main(config: Config, run: RunDir, _: argparse.Namespace) -> None:
    with open_ray(config.ray):
        ppo_stage(config, run)


def ppo_stage(config: Config, run: RunDir) -> None:
    """Train by PPO under `router/ppo_rllib`; finished work is not done again. Needs Ray."""
    from actors.rllib import train_ppo
    from roro_ray.learning.ppo_run import METHOD, load_finished_ppo
    from roro_ray.learning.router_run import FINISHED, METRICS
    from roro_ray.plan import count_ppo_episodes

    directory = run.router(METHOD)
    run.fetch(directory / FINISHED, directory / METRICS)
    if load_finished_ppo(directory, config) is not None:
        say(f"train_ppo: already done in {run.place_of(directory)}")
        return
    run.fetch(directory)
    total = count_ppo_episodes(config)
    with (
        run_stage(run, "train_ppo", "Train the router by PPO (RLlib)") as facts,
        Progress("ppo", total, "episodes") as bar,
    ):

        def progress(done: int, _: int, metrics: dict[str, float]) -> None:
            run.log({"stage": "train_ppo", **metrics})
            bar.start_at(done - int(metrics["episodes"]))
            bar.move_to(done)
            if metrics["iteration"] % config.router.checkpoint_every == 0:
                run.sync(directory)

        result = train_ppo(config, run.path, progress)
        run.sync(directory)
        rows = result.finished.metrics
        facts.update(iterations=len(rows), episodes=int(sum(row["episodes"] for row in rows)), restarts=result.restarts)


if __name__ == "__main__":
    sys.exit(main())
