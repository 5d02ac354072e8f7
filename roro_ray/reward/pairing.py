"""Stage 2: from collected trajectories to preference pairs, one shard of the collection at a time.

All trajectories of a query lie in one shard, so no more than a shard is ever held: long traces are read, compared and
let go. Each shard's pairs go into a file of their own, whole or not at all; a stage that was interrupted does
those that are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from roro_ray.config import Config
from roro_ray.data.store import SUFFIX, finished_shards, load_pairs, load_trajectories, remove_leftovers, save_pairs
from roro_ray.errors import DataError
from roro_ray.reward.pairs import make_pairs, process_candidates
from roro_ray.reward.process import Run, measure_process
from roro_ray.types import Query


@dataclass(slots=True)
class PairFacts:
    """Pairs now on disk, by kind; trajectories whose process quality could not be measured, in the shards done now."""

    kinds: Counter[str] = field(default_factory=Counter)
    unmeasured: int = 0

    @property
    def pairs(self) -> int:
        """Pairs of all kinds."""
        return self.kinds.total()


def pair_shards(
    config: Config,
    trajectories: Path,
    pairs: Path,
    queries: Sequence[Query],
    run: Run,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairFacts:
    """Make the pairs of every shard in the directory `trajectories` that has none in `pairs` yet.

    Args:
        queries: of the collection.
        run: rolls the interventions out, results in order.
        on_progress: told how many shards are done, and of how many.

    Raises:
        DataError: there are no trajectories, or a shard is damaged.
    """
    pairs.mkdir(parents=True, exist_ok=True)
    remove_leftovers(pairs)
    names, done, facts = sorted(finished_shards(trajectories)), finished_shards(pairs), PairFacts()
    if not names:
        raise DataError(f"No trajectories in {trajectories}. Run `python -m jobs.collect` first.")
    for number, name in enumerate(names):
        on_progress(number, len(names))
        file = pairs / f"{name}{SUFFIX}"
        if name not in done:
            collected = load_trajectories(trajectories / f"{name}{SUFFIX}")
            candidates = process_candidates(collected, config.pairs)
            measured = measure_process(queries, candidates, run, config.pairs, config.episode.temperature, config.seed)
            quality = {identity: process.quality for identity, process in measured.items()}
            save_pairs(file, make_pairs(queries, collected, config.pairs, quality, config.seed))
            facts.unmeasured += len(candidates) - len(measured)
        facts.kinds.update(str(pair.kind) for pair in load_pairs(file))
    on_progress(len(names), len(names))
    return facts
