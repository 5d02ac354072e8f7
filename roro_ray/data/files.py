"""Files that are whole or not there: written beside under a hidden name, then renamed.

A reader, or the next run after a kill or on a full disk, finds the old file or the new one and never half of one.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from roro_ray.errors import ConfigError, FullDiskError, RoroError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Writers in native code say only that they failed: with less room than this it was for want of it.
_LEAST_FREE = 64 * 2**10


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Give the path to write to; it takes the place of `path` when the block ends, and is removed where it fails.

    The hidden name ends in `.tmp` and holds the process id, so that processes that write one file do not mix; the last
    one to end wins. The folder must exist.

    Raises:
        FullDiskError: there was no room for it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_full_disk(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a disk that is full would stay so
        raise


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, whoever wrote, into one that names the file and says what to do.

    Raises:
        FullDiskError: there was no room; what was raised is its cause.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if not _is_full(error, path.parent):
            raise
        raise FullDiskError(
            f"{path} could not be written: no space is left on its file system. What was written before is whole. Make "
            "room there, or move the run directory to a larger disk, and run the same command again: it goes on."
        ) from error


@contextmanager
def explain_unusable(setting: str) -> Iterator[None]:
    """Turn what the system says of a folder that cannot be used (its rights, a file in its way) into a clear error.

    Args:
        setting: what names the folder, such as `run_dir=/shared/runs/one`.

    Raises:
        ConfigError: names it, and what the system said.
    """
    try:
        yield
    except RoroError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{setting} cannot be used: {error}. Expected a folder in which this user may make files and read them: "
            "correct its rights, or give another one."
        ) from error


def _is_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    try:
        facts = os.statvfs(folder)
    except OSError:
        return False
    return facts.f_bavail * facts.f_frsize < _LEAST_FREE


def append_line(path: str | Path, line: str) -> None:
    """Append one line (without its end), whole or not at all, safely from several processes.

    A half line that a kill left is closed off first.

    Raises:
        FullDiskError: there was no room for it; the file is as before.
    """
    path = Path(path)
    with explain_full_disk(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # Look and write as one: else the look may meet another process's write halfway and take it for a cut line.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            cut = size and os.pread(descriptor, 1, size - 1) != b"\n"
            content = (("\n" if cut else "") + line + "\n").encode()
            try:
                written = os.write(descriptor, content)
                if written < len(content):  # the part for which there was room
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                with suppress(OSError):  # a device has no size
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
