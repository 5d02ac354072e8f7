"""What became of the pairs that a strong LLM wrote about: one record a pair, one line a record, never written twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roro_ray.data.run_dir import append_metrics, read_metrics

STATUSES = ("kept", "inconsistent", "unfaithful", "unparsed", "failed")  # how far a pair came, the furthest first


@dataclass(frozen=True, slots=True)
class PairRecord:
    """What became of one pair: a line of the cache.

    `yes_preferred` and `yes_rejected` are the writer's P(yes) of each criterion on the two trajectories.
    """

    key: str
    query_id: str
    kind: str
    preferred: str
    rejected: str
    status: str
    text: str = ""
    criteria: tuple[tuple[str, float], ...] = ()
    yes_preferred: tuple[float, ...] = ()
    yes_rejected: tuple[float, ...] = ()
    attempts: int = 0
    error: str | None = None
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    usd: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The record of a JSONL line; `load_record` reads it back."""
        return asdict(self)


def load_record(record: dict[str, Any]) -> PairRecord | None:
    """A record from a JSONL line, or None where it is none of this version."""
    names = set(PairRecord.__dataclass_fields__)
    known: dict[str, Any] = {key: value for key, value in record.items() if key in names}
    try:
        for name in ("yes_preferred", "yes_rejected"):
            known[name] = tuple(float(value) for value in record.get(name, ()))
        known["criteria"] = tuple((str(text), float(weight)) for text, weight in record.get("criteria", ()))
        result = PairRecord(**known)
    except (TypeError, ValueError):
        return None
    return result if result.status in STATUSES else None


class RecordCache:
    """The records on disk by key; a failed pair is not kept there, so that the next run tries it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = (load_record(line) for line in read_metrics(path))
        self._records = {record.key: record for record in loaded if record is not None}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: str) -> PairRecord | None:
        """The record of a pair, or None where it is yet to be written about."""
        return self._records.get(key)

    def add(self, record: PairRecord) -> None:
        """Keep a record, as one line that is written whole."""
        if record.status == "failed":
            return
        self._records[record.key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_metrics(self.path, record.as_json())


def count_records(records: Iterable[PairRecord]) -> dict[str, float]:
    """How many pairs were written about, parsed, faithful and consistent, and what all of it cost."""
    records = list(records)
    by_status = Counter(record.status for record in records)
    kept = by_status["kept"]
    faithful = kept + by_status["inconsistent"]
    parsed = faithful + by_status["unfaithful"]
    return {
        "pairs": len(records),
        "written": len(records) - by_status["failed"],
        "parsed": parsed,
        "faithful": faithful,
        "consistent": kept,
        "failed": by_status["failed"],
        "tokens_in": sum(record.tokens_in for record in records),
        "tokens_cached": sum(record.tokens_cached for record in records),
        "tokens_out": sum(record.tokens_out for record in records),
        "usd": round(sum(record.usd for record in records), 6),
    }
