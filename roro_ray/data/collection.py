"""Stage 1: roll out every strategy on every training query, and keep the trajectories in shards.

The plan follows from the settings alone, so each shard has one name and one content. A shard is written when all its
episodes are over, whole or not at all; a collection that was killed runs the shards that are missing, and so loses no
trajectory and doubles none. Rollouts that failed are tried again, and those lost for good left out and counted, as the
settings under `faults` say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from roro_ray.config import Config
from roro_ray.data.sources import make_queries_of, make_stage_queries, suite_names
from roro_ray.data.store import finished_shards, remove_leftovers, save_trajectories
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.failures import RunSpecs, SteadyRun, Tally, make_policy
from roro_ray.types import Query, Trajectory

_SEED_STRIDE = 10_000


@dataclass(frozen=True, slots=True)
class Shard:
    """The episodes of one block of queries, under a name that only depends on the plan."""

    name: str
    specs: tuple[EpisodeSpec, ...]


@dataclass(frozen=True, slots=True)
class CollectionFacts:
    """What a collection did: trajectories now on disk, of these made by this call, rollouts lost for good, and why.

    `unscored` counts the trajectories made now whose answer could not be checked, `first_unscored` says why. `tally`
    counts this call's rollouts and tries, `groups` its queries, `small_groups` those that were left out whole because
    too few of their rollouts were left.
    """

    trajectories: int
    made: int
    failed: int
    first_error: str | None
    unscored: int = 0
    first_unscored: str | None = None
    tally: Tally = field(default_factory=Tally)
    groups: int = 0
    small_groups: int = 0


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
        RolloutError: more rollouts of a shard failed than the policy bears; finished shards stay.
        DataError: a shard in the directory is damaged, or the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    finished = finished_shards(directory)
    shards = plan_shards(config)
    over = sum(len(shard.specs) for shard in shards if shard.name in finished)
    policy = make_policy(config.faults)
    run = SteadyRun(run_specs, policy, "collect")
    made, queries, small, failures, unscored = 0, 0, 0, list[EpisodeFailure](), list[str]()
    on_progress(over)
    for shard in shards:
        if shard.name in finished:
            continue
        results = run(shard.specs, f"collect, shard {shard.name}")
        trajectories, left_out = _keep_groups(shard.specs, results, policy.least_group)
        save_trajectories(directory / f"{shard.name}.parquet", trajectories)
        made, small = made + len(trajectories), small + left_out
        queries += len({spec.query.id for spec in shard.specs})
        failures += [result for result in results if isinstance(result, EpisodeFailure)]
        unscored += [f"{t.id}: {t.error or 'no gold answer'}" for t in trajectories if t.correct is None]
        over += len(shard.specs)
        on_progress(over)
    return CollectionFacts(
        trajectories=sum(finished.values()) + made,
        made=made,
        failed=len(failures),
        first_error=failures[0].error if failures else None,
        unscored=len(unscored),
        first_unscored=unscored[0] if unscored else None,
        tally=run.tally,
        groups=queries,
        small_groups=small,
    )


def _keep_groups(
    specs: Sequence[EpisodeSpec], results: Sequence[Trajectory | EpisodeFailure], least: int
) -> tuple[list[Trajectory], int]:
    """The trajectories of queries that lost no rollout or have `least` left, and how many queries are left out."""
    left = Counter(s.query.id for s, result in zip(specs, results, strict=True) if isinstance(result, Trajectory))
    hurt = {s.query.id for s, result in zip(specs, results, strict=True) if isinstance(result, EpisodeFailure)}
    small = {query for query in hurt if left[query] < least}
    return [t for t in results if isinstance(t, Trajectory) and t.query_id not in small], len(small)


def _query_specs(query: Query, config: Config) -> list[EpisodeSpec]:
    return [
        EpisodeSpec(f"{query.id}/{strategy}/{rollout}", query, strategy, config.seed * _SEED_STRIDE + rollout)
        for strategy in config.collect.strategies
        for rollout in range(config.collect.rollouts)
    ]
