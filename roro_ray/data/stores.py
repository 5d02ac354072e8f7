"""Objects behind any fsspec URI: listed with what tells two contents apart, read and written whole, errors made clear.

Errors that pass (a busy or unreachable store) are tried again with growing pauses; those that do not (no credentials,
no bucket, a package that is missing) are told at once with what to do. No message contains the options or credentials.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from roro_ray.data.files import write_whole
from roro_ray.errors import ConfigError, DataError, RoroError, did_you_mean

logger = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before an operation is tried again
# Where one upload replaces an object at once; elsewhere (sftp, hdfs, smb ..) a file is written beside and renamed.
_WHOLE_UPLOADS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "obs", "tos", "memory"})
# What a listing tells of an object's content, the surest first. A time alone may repeat, so it comes last.
_CONTENT_KEYS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "md5", "checksum")
_TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs"}
_ENVIRONMENT = {
    "s3fs": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gcsfs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
    "adlfs": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_CONNECTION_STRING",
}
_CREDENTIAL_ERRORS = ("credential", "tokenretrieval", "refresherror", "unauthorized", "profilenotfound")
# Numbers of OSError that another try cannot change.
_REDIRECTED = 78  # EREMCHG on Linux: the bucket lies in another region
_LASTING = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EMSGSIZE, errno.ENAMETOOLONG, _REDIRECTED)


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing: its size in bytes and a signature of its content; None where the store tells neither
    a checksum nor a time, and a copy can never be known to be current."""

    size: int
    signature: str | None


def is_remote(place: str | Path) -> bool:
    """True for a URI of anything but this machine's file system."""
    return "://" in str(place) and not str(place).startswith(("file://", "local://"))


def local_path(place: str | Path) -> Path:
    """The path that a local place (a path, or a `file://` URI) names; `~` is the user's home."""
    text = str(place)
    return Path(os.path.expanduser(text.partition("://")[2] if "://" in text else text))


def check_shared(place: str | Path) -> None:
    """Refuse a place that only the process that made it can see.

    Raises:
        ConfigError: it lies in this process's memory.
    """
    if str(place).startswith("memory://"):
        raise ConfigError(
            f"run_dir={place} lies in the memory of one process: neither Ray's workers nor the next job would see it. "
            "Give a path, or the URI of a store such as s3://bucket/run."
        )


class Store:
    """The objects below one URI, by their names relative to it; open it with a URI of any protocol that fsspec knows.

    Raises:
        ConfigError: an unknown protocol, a missing package, or options that the file system does not take.
    """

    def __init__(self, place: str, options: Mapping[str, Any] | None = None, pauses_s: Sequence[float] | None = None):
        self.place = place.rstrip("/")
        self.protocol = place.partition("://")[0]
        self._pauses_s = PAUSES_S if pauses_s is None else pauses_s
        self._system = _open_system(self.place, self.protocol, dict(options or {}))
        self._root = str(self._system._strip_protocol(self.place)).rstrip("/")

    @property
    def system(self) -> Any:
        """The fsspec file system."""
        return self._system

    @property
    def root(self) -> str:
        """The place without its protocol, as the file system takes it."""
        return self._root

    def list(self, part: str = "") -> dict[str, Entry]:
        """The objects whose name is `part` or lies below it; all of them when it is empty."""

        def find() -> dict[str, Any]:
            self._system.invalidate_cache()
            try:
                return dict(self._system.find(self._path(part), detail=True))
            except FileNotFoundError:
                return {}

        found = self._try(f"list {part or 'the run'}", find)
        start = len(self._root) + 1
        names = {str(path).lstrip("/") if not self._root.startswith("/") else str(path): i for path, i in found.items()}
        return {path[start:]: _make_entry(info) for path, info in names.items() if info.get("type", "file") == "file"}

    def info(self, name: str) -> Entry:
        """One object as `list` tells it.

        Raises:
            FileNotFoundError: it is not there.
        """

        def ask() -> Any:
            self._system.invalidate_cache()
            return self._system.info(self._path(name))

        return _make_entry(self._try(f"look at {name}", ask, missing_is_fine=True))

    def read(self, name: str) -> bytes | None:
        """The content of a small object, or None where it is not there."""

        def cat() -> bytes:
            self._system.invalidate_cache()
            return bytes(self._system.cat_file(self._path(name)))

        try:
            return self._try(f"read {name}", cat, missing_is_fine=True)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, whole."""
        self._try(f"write {name}", lambda: self._whole(name, lambda path: self._system.pipe_file(path, content)))

    def get(self, name: str, target: Path) -> None:
        """Download an object to a path, which gets it whole or not at all.

        Raises:
            FileNotFoundError: it is not there (any more).
            DataError: the disk is full, or the store does not answer.
        """
        target.parent.mkdir(parents=True, exist_ok=True)

        def download() -> None:
            with write_whole(target) as temporary:
                self._system.get_file(self._path(name), str(temporary))

        self._try(f"download {name}", download, missing_is_fine=True)

    def put(self, source: Path, name: str) -> Entry:
        """Upload a file, and give the object as `list` tells it.

        Raises:
            FileNotFoundError: the file is gone.
        """
        what = f"upload {name}"

        def upload() -> None:
            self._whole(name, lambda path: self._system.put_file(str(source), path))

        try:
            self._try(what, upload, missing_is_fine=True)
        except FileNotFoundError as error:
            clear = _explain_lasting(error, self.place, self.protocol, what)
            if source.exists() and clear is not None:
                raise clear from error
            raise
        return self.info(name)

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is fine."""
        with suppress(FileNotFoundError):
            self._try(f"remove {name}", lambda: self._system.rm_file(self._path(name)), missing_is_fine=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _whole(self, name: str, write: Callable[[str], Any]) -> None:
        """Have an object written so that no reader sees half of it."""
        path = self._path(name)
        if self.protocol in _WHOLE_UPLOADS:
            write(path)
            return
        folder, _, last = path.rpartition("/")
        self._system.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{last}.{os.getpid()}.tmp"
        write(temporary)
        self._system.mv(temporary, path)

    def _try(self, what: str, action: Callable[[], T], missing_is_fine: bool = False) -> T:
        for pause_s in (*self._pauses_s, None):
            try:
                return action()
            except RoroError:  # the disk is full
                raise
            except Exception as error:  # the store's border: whatever its library raises
                if missing_is_fine and isinstance(error, FileNotFoundError) and not _is_no_bucket(error):
                    raise
                clear = _explain_lasting(error, self.place, self.protocol, what)
                if clear is not None:
                    raise clear from error
                if pause_s is None:
                    raise DataError(
                        f"{self.place}: could not {what}, after {len(self._pauses_s) + 1} tries the store still "
                        f"answers {_name(error)}. Run the same command again once it is back: what is there stays."
                    ) from error
                logger.warning("%s: could not %s (%s), trying again in %g s", self.place, what, _name(error), pause_s)
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


def _open_system(place: str, protocol: str, options: dict[str, Any]) -> Any:
    import fsspec

    package = _PACKAGES.get(protocol, protocol)
    try:
        return fsspec.core.url_to_fs(place, **options)[0]
    except ImportError as error:
        raise ConfigError(
            f"run_dir={place}: the protocol {protocol}:// needs a package that is not installed ({error}). "
            f"`pip install {package}`, on every node of the cluster."
        ) from error
    except ValueError as error:
        known = sorted(fsspec.available_protocols())
        if protocol not in known:
            raise ConfigError(
                f"run_dir={place}: fsspec knows no protocol {protocol!r}{did_you_mean(protocol, known)}. Expected a "
                "path or a URI such as s3://bucket/run or gs://bucket/run."
            ) from error
        raise ConfigError(f"storage.options do not suit {protocol}://: {error}. See {package}'s options.") from error
    except TypeError as error:
        raise ConfigError(f"storage.options do not suit {protocol}://: {error}. See {package}'s options.") from error


def _explain_lasting(error: Exception, place: str, protocol: str, what: str) -> ConfigError | DataError | None:
    """The clear form of an error that no other try cures; None for one that may pass."""
    package = _PACKAGES.get(protocol, protocol)
    kind = type(error).__name__.lower()
    refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # the latter is gcsfs
    if refused or any(sign in kind for sign in _CREDENTIAL_ERRORS):
        variables = _ENVIRONMENT.get(package, f"what {package} reads")
        return ConfigError(
            f"{place}: not allowed to {what} ({_name(error)}). Expected credentials in the environment of this process "
            f"and of every Ray worker ({variables}), with the right to list, read, write and delete there; secrets do "
            "not belong into storage.options, which are saved."
        )
    if isinstance(error, FileNotFoundError):
        return ConfigError(
            f"{place}: could not {what}, the store has no such bucket ({_name(error)}). Create it first, or correct "
            "run_dir."
        )
    if isinstance(error, ImportError):
        return ConfigError(f"{place}: {error}. `pip install {package}`, on every node of the cluster.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{place}: could not {what}, the disk is full ({_name(error)}). Free some space, or set storage.cache_dir "
            "to a disk that has it, and run the same command again."
        )
    if isinstance(error, TypeError):  # some systems look at their options only now
        return ConfigError(f"storage.options do not suit {protocol}://: {error}. See {package}'s options.")
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in _LASTING):
        return DataError(
            f"{place}: could not {what}: {_name(error)}. Check run_dir and storage.options (region, endpoint_url)."
        )
    return None


def _is_no_bucket(error: Exception) -> bool:
    return "bucket does not exist" in str(error).lower()


def _name(error: BaseException) -> str:
    """An error in a few words: its class and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _make_entry(info: Mapping[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    for key in (*_CONTENT_KEYS, *_TIME_KEYS):
        if info.get(key):
            return Entry(size, f"{size}:{key.lower()}:{_format(info[key])}")
    return Entry(size, None)


def _format(value: Any) -> str:
    """The same text for the same time, which some systems tell as a date here and as seconds there."""
    if isinstance(value, datetime):
        value = value.timestamp()
    return f"{value:.6f}" if isinstance(value, float) else str(value)
