"""What `jobs.doctor` finds, one thing at a time."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `ok`, `warn` (works, but) or `fail`, what was found, and what to do about it."""

    status: str
    name: str
    found: str
    fix: str = ""

    def line(self) -> str:
        """The finding as a line for a person."""
        return f"{_MARKS[self.status]}  {self.name:<18} {self.found}" + (f"\n      -> {self.fix}" if self.fix else "")


def find_version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
