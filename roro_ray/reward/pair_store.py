"""Preference pairs whose trajectories stay on disk until they are needed.

A run on real models has tens of thousands of trajectories of tens of thousands of characters each. What stays in memory
is the index: each query's pairs, and in which shard its trajectories lie. Every noun that draws or splits queries takes
the index as it takes `QueryPairs`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roro_ray.data.records import make_decoder
from roro_ray.data.store import SUFFIX, iter_pairs
from roro_ray.errors import DataError
from roro_ray.reward.preference import OUTCOME_TIMES, QueryPairs, group_pairs
from roro_ray.types import PairKind, PreferencePair, Query, Trajectory


@dataclass(frozen=True, slots=True)
class StoredPairs:
    """One query, its pairs, and the shard that holds its trajectories."""

    query: Query
    pairs: tuple[PreferencePair, ...]
    fold: int
    shard: Path

    @property
    def has_outcome(self) -> bool:
        """True where some rollouts of the query are right and some wrong."""
        return any(pair.kind == PairKind.OUTCOME for pair in self.pairs)

    @property
    def draw_weight(self) -> int:
        """How often the query is drawn, relative to others."""
        return OUTCOME_TIMES if self.has_outcome else 1

    def load(self, pairs: Sequence[PreferencePair] = ()) -> QueryPairs:
        """The query with the trajectories of its pairs, or of the given ones of them.

        Raises:
            DataError: the shard is damaged or lacks one of them.
        """
        chosen = tuple(pairs) or self.pairs
        wanted = {identity for pair in chosen for identity in (pair.preferred, pair.rejected)}
        found = [t for t in _read_trajectories(self.shard, self.query.id) if t.id in wanted]
        missing = sorted(wanted - {trajectory.id for trajectory in found})
        if missing:
            raise DataError(f"{self.shard} lacks trajectory {missing[0]} of a pair: run `python -m jobs.make_pairs`.")
        return group_pairs([self.query], found, chosen)[0]


def index_pairs(queries: Sequence[Query], trajectories: Path, pairs: Path) -> list[StoredPairs]:
    """The queries that have pairs, in their order; no trajectory is read but its id.

    Args:
        trajectories, pairs: files or directories of shards, as collection and pairing leave them.

    Raises:
        DataError: nothing is there, or a pair's query has no trajectories.
    """
    of_query: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in iter_pairs(pairs):
        of_query[pair.query_id].append(pair)
    shards = dict(_list_queries(trajectories))
    lost = sorted(of_query.keys() - shards.keys())
    if lost:
        raise DataError(f"{trajectories} has no trajectory of query {lost[0]}, which {pairs} compares: collect again.")
    return [
        StoredPairs(query, tuple(of_query[query.id]), of_query[query.id][0].fold, shards[query.id])
        for query in queries
        if query.id in of_query
    ]


def _list_queries(path: Path) -> Iterator[tuple[str, Path]]:
    """Each query id with the shard that holds its trajectories."""
    for file in sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]:
        try:
            column = pq.read_table(file, columns=["query_id"])["query_id"]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{file} is truncated, damaged or holds no trajectories: {error}") from error
        for identity in column.unique().to_pylist():
            yield identity, file


def _read_trajectories(file: Path, query_id: str) -> list[Trajectory]:
    try:
        table = pq.read_table(file, filters=[("query_id", "==", query_id)])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is truncated or damaged: {error}") from error
    decode = make_decoder(Trajectory)
    return [decode(record) for record in table.to_pylist()]
