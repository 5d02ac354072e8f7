"""Stage 1: roll out every strategy on every training query, and keep the trajectories in shards.

The plan follows from the settings alone, so each shard has one name and one content. A shard is written when all its
episodes are over, whole or not at all; a collection that was killed runs the shards that are missing, and so loses no
trajectory and doubles none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from roro_ray.config import Config
from roro_ray.data.sources import make_queries_of, make_stage_queries, suite_names
from roro_ray.data.store import finished_shards, remove_leftovers, save_trajectories
from roro_ray.errors import EngineError
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import Query, Trajectory

RunSpecs = Callable[[Sequence[EpisodeSpec]], list[Trajectory | EpisodeFailure]]
# Above this share of failed rollouts in a shard something is broken, and a shard with holes would hide it.
_MAX_FAILED_SHARE = 0.05
_SEED_STRIDE = 10_000


@dataclass(frozen=True, slots=True)
class Shard:
    """The episodes of one block of queries, under a name that only depends on the plan."""

    name: str
    specs: tuple[EpisodeSpec, ...]


@dataclass(frozen=True, slots=True)
class CollectionFacts:
    """What a collection did: trajectories now on disk, of these made by this call, rollouts that failed, and why.

    `unscored` counts the trajectories made now whose answer could not be checked, `first_unscored` says why.
    """

    trajectories: int
    made: int
    failed: int
    first_error: str | None
    unscored: int = 0
    first_unscored: str | None = None


def training_queries(config: Config) -> list[Query]:
    """The queries of collection and reward learning, all suites."""
    return make_stage_queries(config, "train", config.data.train_queries)


def plan_shards(config: Config) -> list[Shard]:
    """Every shard of the collection, in order."""
    data, size = config.data, config.collect.shard_queries
    shards = []
    for suite in suite_names(data, "train"):
        queries = make_queries_of(data, suite, "train", data.train_queries)
        for number, start in enumerate(range(0, len(queries), size)):
            specs = [spec for query in queries[start : start + size] for spec in _query_specs(query, config)]
            shards.append(Shard(f"{suite}-{number:05d}", tuple(specs)))
    return shards


def collect(
    config: Config, directory: Path, run_specs: RunSpecs, on_progress: Callable[[int], None] = lambda done: None
) -> CollectionFacts:
    """Run the shards that are missing in `directory`.

    Args:
        run_specs: rolls episodes out, results in the order of the specs.
        on_progress: told how many episodes of the whole plan are over.

    Raises:
        EngineError: too many rollouts of a shard failed; finished shards stay.
        DataError: a shard in the directory is damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    finished = finished_shards(directory)
    shards = plan_shards(config)
    over = sum(len(shard.specs) for shard in shards if shard.name in finished)
    total, made, failures, unscored = sum(finished.values()), 0, list[EpisodeFailure](), list[str]()
    on_progress(over)
    for shard in shards:
        if shard.name in finished:
            continue
        trajectories, failed = _run_shard(shard, run_specs)
        save_trajectories(directory / f"{shard.name}.parquet", trajectories)
        made += len(trajectories)
        failures += failed
        unscored += [f"{t.id}: {t.error or 'no gold answer'}" for t in trajectories if t.correct is None]
        over += len(shard.specs)
        on_progress(over)
    first_error, first_unscored = failures[0].error if failures else None, unscored[0] if unscored else None
    return CollectionFacts(total + made, made, len(failures), first_error, len(unscored), first_unscored)


def _query_specs(query: Query, config: Config) -> list[EpisodeSpec]:
    return [
        EpisodeSpec(f"{query.id}/{strategy}/{rollout}", query, strategy, config.seed * _SEED_STRIDE + rollout)
        for strategy in config.collect.strategies
        for rollout in range(config.collect.rollouts)
    ]


def _run_shard(shard: Shard, run_specs: RunSpecs) -> tuple[list[Trajectory], list[EpisodeFailure]]:
    results = run_specs(shard.specs)
    again = [spec for spec, result in zip(shard.specs, results, strict=True) if isinstance(result, EpisodeFailure)]
    # Once more: a rollout fails with its worker, and the worker is back by now.
    second = dict(zip((spec.id for spec in again), run_specs(again) if again else [], strict=True))
    results = [second.get(spec.id, result) for spec, result in zip(shard.specs, results, strict=True)]
    failed = [result for result in results if isinstance(result, EpisodeFailure)]
    if len(failed) > _MAX_FAILED_SHARE * len(results):
        raise EngineError(
            f"collect: {len(failed)} of {len(results)} rollouts of shard {shard.name} failed twice; the first: "
            f"{failed[0].spec_id}: {failed[0].error}. Mend the cause and run again: finished shards are kept."
        )
    return [result for result in results if isinstance(result, Trajectory)], failed
