"""The stages as one line each for the jobs that chain them: read what the stage before left, work, write, record.

A stage that is finished is not done again. The algorithms are in `roro_ray`, the placement in `actors`; what is here is
the order of things and what is shown while they happen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from jobs._cli import run_stage, say
from jobs._progress import Progress
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

if TYPE_CHECKING:
    from actors.rollout import Results, RolloutPool
    from roro_ray.routing.episode import EpisodeSpec


@contextmanager
def open_pool(config: Config) -> Iterator[RolloutPool]:
    """A Ray (started here unless one is joined) and the rollout workers on it."""
    from actors.cluster import open_cluster
    from actors.rollout import RolloutPool

    with open_cluster(config.ray):
        pool = RolloutPool.start(config)
        try:
            yield pool
        finally:
            pool.stop()


def collect_stage(config: Config, run: RunDir, pool: RolloutPool) -> None:
    """Stage 1: roll out every strategy on the training queries; goes on where it was interrupted."""
    from roro_ray.data.collection import collect
    from roro_ray.plan import count_collected

    if _skip(run, "collect"):
        return
    total = count_collected(config)
    with run_stage(run, "collect", "Collect trajectories") as facts, Progress("collect", total, "episodes") as bar:
        over = 0

        def run_specs(specs: Sequence[EpisodeSpec]) -> Results:
            return pool.run(specs, progress=lambda done, _: bar.move_to(over + done))

        def move(done: int) -> None:
            nonlocal over
            over = done
            bar.start_at(done)

        result = collect(config, run.trajectories, run_specs, move)
        facts.update(trajectories=result.trajectories, made=result.made, failed=result.failed)
        if result.first_error:
            say(f"  {result.failed} rollouts failed and are left out; the first: {result.first_error}")
            run.log({"event": "failure", "stage": "collect", "message": result.first_error, "count": result.failed})


def pairs_stage(config: Config, run: RunDir, pool: RolloutPool) -> None:
    """Stage 2: preference pairs by outcome, cost and process quality."""
    from collections import Counter

    from roro_ray.data.collection import training_queries
    from roro_ray.data.store import load_trajectories, save_pairs
    from roro_ray.reward.pairs import make_pairs, process_candidates
    from roro_ray.reward.process import measure_process

    if _skip(run, "make_pairs"):
        return
    run.require("collect")
    with run_stage(run, "make_pairs", "Make preference pairs") as facts:
        queries, trajectories = training_queries(config), load_trajectories(run.trajectories)
        candidates = process_candidates(trajectories, config.pairs)

        def run_specs(specs: Sequence[EpisodeSpec]) -> Results:
            with Progress("interventions", len(specs), "episodes") as bar:
                return pool.run(specs, progress=lambda done, _: bar.move_to(done))

        measured = measure_process(
            queries, candidates, run_specs, config.pairs, config.episode.temperature, config.seed
        )
        quality = {name: process.quality for name, process in measured.items()}
        pairs = make_pairs(queries, trajectories, config.pairs, quality, config.seed)
        save_pairs(run.pairs / "pairs.parquet", pairs)
        facts.update(pairs=len(pairs), **Counter(str(pair.kind) for pair in pairs))
        facts.update(unmeasured=len(candidates) - len(measured))


def method_config(config: Config, method: str) -> Config:
    """The settings of one way to train the router, from those of the run."""
    router, reward = config.router, config.reward
    if method in ("grpo_outcome", "grpo_outcome_tuned"):
        router = replace(router, beta=0.0, credit="trajectory")
    elif method == "roro_step":
        router = replace(router, credit="step")
    elif method in ("random_rubrics", "fixed_rubric"):
        reward = replace(reward, rubric_source="random" if method == "random_rubrics" else "fixed")
    return replace(config, router=router, reward=reward)


def _skip(run: RunDir, stage: str) -> bool:
    if run.is_done(stage):
        say(f"{stage}: already done in {run.path}")
        return True
    return False
