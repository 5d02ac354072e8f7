"""Trajectories, queries and preference pairs as Parquet, in files that are whole or not there at all.

A file is written under a hidden temporary name, flushed to disk and renamed: no reader ever sees half of one, and a
shard whose name exists is finished. So a collection that was killed goes on by leaving out the shards that are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from roro_ray.data.files import write_whole
from roro_ray.data.records import make_decoder, make_encoder, make_schema
from roro_ray.errors import DataError
from roro_ray.types import PreferencePair, Query, Trajectory

SUFFIX = ".parquet"
_SOURCES: dict[type, str] = {
    Trajectory: "Run `python -m jobs.collect` first.",
    PreferencePair: "Run `python -m jobs.make_pairs` first.",
    Query: "A server that records its traffic writes them.",
}


def save_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write trajectories to one Parquet file, whole or not at all."""
    _save(path, trajectories, Trajectory)


def load_trajectories(path: str | Path) -> list[Trajectory]:
    """All trajectories of a file, or of a directory's files in the order of their names.

    Raises:
        DataError: nothing is there, a file is truncated or holds something else, or an id occurs twice.
    """
    trajectories = list(iter_trajectories(path))
    seen: set[str] = set()
    for trajectory in trajectories:
        if trajectory.id in seen:
            raise DataError(f"{path}: trajectory {trajectory.id} stands there twice. Delete one of its shards.")
        seen.add(trajectory.id)
    return trajectories


def iter_trajectories(path: str | Path, batch_size: int = 1024) -> Iterator[Trajectory]:
    """Like `load_trajectories`, holding only `batch_size` records at a time (ids are not compared)."""
    return _iterate(path, Trajectory, batch_size)


def save_pairs(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Write preference pairs to one Parquet file, whole or not at all."""
    _save(path, pairs, PreferencePair)


def load_pairs(path: str | Path) -> list[PreferencePair]:
    """All pairs of a file, or of a directory's files in the order of their names.

    Raises:
        DataError: nothing is there, or a file is truncated or holds something else.
    """
    return list(iter_pairs(path))


def iter_pairs(path: str | Path, batch_size: int = 4096) -> Iterator[PreferencePair]:
    """Like `load_pairs`, holding only `batch_size` records at a time."""
    return _iterate(path, PreferencePair, batch_size)


def save_queries(path: str | Path, queries: Iterable[Query]) -> None:
    """Write queries to one Parquet file, whole or not at all."""
    _save(path, queries, Query)


def load_queries(path: str | Path) -> list[Query]:
    """The queries of a file, or of a directory's files in the order of their names; one that is repeated, once.

    Raises:
        DataError: nothing is there, a file is truncated or holds something else, or two different queries have
            one id.
    """
    queries: dict[str, Query] = {}
    for query in iter_queries(path):
        if queries.setdefault(query.id, query) != query:
            raise DataError(f"{path}: two different queries have the id {query.id}. Keep the shards of one recording.")
    return list(queries.values())


def iter_queries(path: str | Path, batch_size: int = 4096) -> Iterator[Query]:
    """Like `load_queries`, holding only `batch_size` records at a time (ids are not compared)."""
    return _iterate(path, Query, batch_size)


def finished_shards(directory: str | Path) -> dict[str, int]:
    """The finished shards of a directory, by name without suffix, each with its number of records.

    Raises:
        DataError: a shard is truncated (another program cut it: ours are renamed when whole).
    """
    paths = sorted(Path(directory).glob(f"*{SUFFIX}"))
    return {path.stem: _open(path).metadata.num_rows for path in paths}


def remove_leftovers(directory: str | Path) -> int:
    """Delete temporary files that a killed writer left behind, and tell how many."""
    leftovers = list(Path(directory).glob(".*.tmp"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _save(path: str | Path, records: Iterable[Any], noun: Any) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = make_encoder(noun)
    table = pa.Table.from_pylist([encode(record) for record in records], schema=make_schema(noun))
    with write_whole(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


def _iterate(path: str | Path, noun: Any, batch_size: int) -> Iterator[Any]:
    decode = make_decoder(noun)
    for file in _files(Path(path), noun):
        for batch in _batches(file, noun, batch_size):
            for record in batch:
                try:
                    yield decode(record)
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{file}: a record is no {noun.__name__} ({error!r}). It was written by another version: "
                        "collect again into a new run_dir."
                    ) from error


def _files(path: Path, noun: type) -> Sequence[Path]:
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(f"No {noun.__name__} file in {path}, expected *{SUFFIX}. {_SOURCES[noun]}")
    return files


def _batches(path: Path, noun: type, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    file = _open(path)
    got = (file.schema_arrow.metadata or {}).get(b"noun", b"unknown records").decode()
    if got != noun.__name__:
        raise DataError(f"{path} holds {got}, expected {noun.__name__}. Check the path.")
    try:
        for batch in file.iter_batches(batch_size):
            yield batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(_damaged(path, error)) from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0][:120]
    return (
        f"{path} is truncated or damaged ({path.stat().st_size} bytes; {reason}). "
        "Delete it and run its stage again: only what it held is made anew."
    )
