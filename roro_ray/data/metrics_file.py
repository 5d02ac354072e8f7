"""A file of metrics: one JSON object a line, appended by several processes, read past lines that a kill cut off."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roro_ray.data.files import append_line


def append_metrics(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line, whole or not at all, safely from several processes (see `files.append_line`).

    Raises:
        FullDiskError: there was no room for it.
    """
    append_line(path, json.dumps(_finite({"time": round(time.time(), 3), **record}), default=str))


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a line that a kill cut off is left out."""
    file = Path(path)
    if not file.exists():
        return
    for line in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
