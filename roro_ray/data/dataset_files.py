"""Reads the rows of a data set by the `datasets` library: a JSONL or Parquet file, a folder of them, or the hub.

Rows come back as plain records with the place that they were read from, grouped by the split that the source itself
names (`train`, `validation`, `test`), or as one group where it names none or only one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roro_ray.errors import DataError

ALL = "all"
Record = dict[str, Any]

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")
_SAME = {"valid": "validation", "val": "validation", "dev": "validation"}
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A record, and where it stands: the file or hub split, and the row in it from 0."""

    place: str
    number: int
    record: Record


def load_rows(source: str) -> dict[str, list[RawRow]]:
    """The rows of a source by the split that it names; under `all` where there is only one group.

    Args:
        source: a path, or a data set of the hub: `owner/name`, `owner/name:config`, either with `@revision`.

    Raises:
        DataError: it does not exist, cannot be reached or cannot be read; says what was tried and what to do.
    """
    path = Path(source).expanduser()
    if path.exists():
        groups = _load_local(path)
    elif (name := _HUB_NAME.fullmatch(source)) and path.suffix not in _BUILDERS:
        groups = _load_hub(source, name["path"], name["config"], name["revision"])
    else:
        raise DataError(
            f"data source {source!r}: no such file or folder (looked in {Path.cwd()}), and not the name of a data set "
            "on the hub (owner/name or owner/name:config). Mend data.sources."
        )
    return {ALL: next(iter(groups.values()))} if len(groups) == 1 else groups


def stamp_source(source: str) -> str:
    """What changes when a local source changes, for caches; empty for the hub."""
    path = Path(source).expanduser()
    if not source or not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return ";".join(f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files)


def _load_local(path: Path) -> dict[str, list[RawRow]]:
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise DataError(f"{path}: expected a file that ends in {', '.join(_BUILDERS)}.")
        return {ALL: list(_number([(str(path), _load_file(path))]))}
    files = sorted(file for file in path.iterdir() if file.suffix in _BUILDERS)
    if not files:
        raise DataError(f"{path}: the folder holds no file that ends in {', '.join(_BUILDERS)}.")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of_name(file.stem) or ALL, []).append(file)
    if ALL in groups and len(groups) > 1:
        raise DataError(
            f"{path}: cannot tell the split of {groups[ALL][0].name} beside {', '.join(sorted(set(groups) - {ALL}))}. "
            "Begin its name with train, validation or test, or give data.sources one file."
        )
    return {
        split: list(_number([(str(file), _load_file(file)) for file in members])) for split, members in groups.items()
    }


def _load_file(path: Path) -> Iterable[Record]:
    from datasets import load_dataset

    try:
        with _quiet():
            rows: Iterable[Record] = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        return rows
    except Exception as error:  # the border to the library: its readers raise their parsers' own errors
        reason = error.__cause__ or error
        raise DataError(
            f"{path}: not readable as {_BUILDERS[path.suffix]} ({type(reason).__name__}: {str(reason)[:300]}). "
            "Expected one record a row, each field of one type in all rows."
        ) from error


def _load_hub(source: str, path: str, config: str | None, revision: str | None) -> dict[str, list[RawRow]]:
    from datasets import load_dataset

    try:
        with _quiet():
            found = load_dataset(path, config, revision=revision)
    except Exception as error:  # the border to the library and to the network
        offline = (
            " HF_HUB_OFFLINE is set: unset it to download." if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else ""
        )
        raise DataError(
            f"{source!r} is no path here, and as a data set of the hub it cannot be loaded ({type(error).__name__}: "
            f"{str(error)[:300]}).{offline} "
            "Without a network, copy its JSONL or Parquet files here and name them: data.sources={SUITE: PATH}."
        ) from error
    groups: dict[str, list[tuple[str, Iterable[Record]]]] = {}
    for split, rows in found.items():
        groups.setdefault(_split_of_name(str(split)) or str(split), []).append((f"{source} ({split})", rows))
    named = {split: members for split, members in groups.items() if _split_of_name(split)}
    if not named and len(groups) > 1:
        raise DataError(
            f"{source!r} has the splits {', '.join(groups)}: expected train, validation or test. Copy the one that you "
            "want to a file and name that in data.sources."
        )
    return {split: list(_number(members)) for split, members in (named or groups).items()}


def _number(members: Iterable[tuple[str, Iterable[Record]]]) -> Iterator[RawRow]:
    for place, rows in members:
        for number, record in enumerate(rows):
            yield RawRow(place, number, dict(record))


def _split_of_name(name: str) -> str | None:
    match = _SPLIT.match(name)
    return _SAME.get(match[1], match[1]) if match else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars: a file of a thousand rows takes a tenth of a second."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
