"""A file of metrics: one JSON object a line, appended by several processes, read past lines that a kill cut off."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def append_metrics(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write, so that processes do not mix; closes off a half line that a kill left."""
    path = Path(path)
    line = json.dumps(_finite({"time": round(time.time(), 3), **record}), default=str) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Look and write as one: else the look may meet another process's write halfway and take it for a cut line.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


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
