"""Files that are whole or not there: written beside under a hidden name, then renamed.

A reader, or the next run after a kill, finds the old file or the new one and never half of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Give the path to write to; it takes the place of `path` when the block ends, and is removed where it fails.

    The hidden name ends in `.tmp` and holds the process id, so that processes that write one file do not mix; the last
    one to end wins. The folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a disk that is full would stay so
        raise
