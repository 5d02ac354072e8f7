"""The access log: one line of JSON per request, without a word of the conversation and without keys.

Every string that a client gave is escaped and cut, so that it can neither forge a line nor fill the disk. The client's
own name for its user may be personal, so only a keyed hash of it is kept: equal users can be counted, not read.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import sys
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from logging.handlers import RotatingFileHandler
from pathlib import Path

from serve.facts import RequestFacts

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LONGEST = 200  # characters kept of a string that a client gave
_DIGITS = 3  # decimals of milliseconds


def make_request_id(header: str | None) -> str:
    """The client's X-Request-ID if it is 1 to 128 of letters, digits and `._:-`, else a new one."""
    if header is not None and _REQUEST_ID.fullmatch(header):
        return header
    return f"req-{uuid.uuid4().hex}"


class AccessLog:
    """Writes the lines; a full disk costs lines (counted in `failed`, told once), never a request.

    Args:
        path: a file; empty: stdout.
        replica: replicas must not share a file (one would rotate it away from the other), so each writes
            `<stem>-<replica><suffix>`.
        max_mb: size at which the file is set aside; the last `backups` of them are kept.
        user_key: secret of the users' hashes; empty: a random one, so that hashes agree within one process only.
    """

    def __init__(
        self, path: str | Path = "", replica: str = "", max_mb: float = 64.0, backups: int = 5, user_key: str = ""
    ) -> None:
        self.failed = 0
        self._key = user_key.encode()[:64] or secrets.token_bytes(32)
        self._handler = _make_handler(str(path), replica, int(max_mb * 2**20), backups)
        self._handler.setFormatter(logging.Formatter("%(message)s"))
        self._handler.handleError = self._on_error  # type: ignore[method-assign]

    def write(self, facts: RequestFacts) -> None:
        """Log a request that is over; never raises for a disk that fails."""
        self._handler.handle(logging.makeLogRecord({"msg": self.format(facts)}))

    def format(self, facts: RequestFacts) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": _clean(facts.request_id),
            "client": _clean(facts.client),
            "key": _clean(facts.key_name),
            "endpoint": _clean(facts.endpoint),
            "model": _clean(facts.model),
            "router_version": facts.router_version,
            "status": facts.status,
            "error": None if facts.error is None else _clean(facts.error),
            "stream": facts.stream,
            "duration_ms": _number(facts.duration_ms),
            "ttft_ms": _number(facts.ttft_ms),
            "queue_ms": _number(facts.queue_ms),
            "steps": dict(facts.steps),
            "tokens_in": facts.tokens_in,
            "tokens_out": facts.tokens_out,
            "flops": _number(facts.flops),
            "flops_saved": _number(facts.flops_saved),
            "degraded": facts.degraded,
            "ends": list(facts.ends),
            "user": self._hash_user(facts.user),
        }
        return json.dumps(line, separators=(",", ":")).replace("\x7f", "\\u007f")

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what a full disk did not take is lost, as it was counted
            self._handler.close()

    def _hash_user(self, user: str) -> str | None:
        return blake2b(user.encode(errors="replace"), key=self._key, digest_size=8).hexdigest() if user else None

    def _on_error(self, record: logging.LogRecord) -> None:
        self.failed += 1
        if self.failed == 1:
            logger.warning("access log: lines are being lost (%s); make room on its disk", sys.exc_info()[1])


def _make_handler(path: str, replica: str, max_bytes: int, backups: int) -> logging.Handler:
    if not path:
        return logging.StreamHandler(sys.stdout)
    file = Path(path)
    if replica:
        file = file.with_name(f"{file.stem}-{replica}{file.suffix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return RotatingFileHandler(file, maxBytes=max_bytes, backupCount=backups, encoding="utf-8")


def _clean(text: str) -> str:
    """A client's string, cut; JSON's own escaping takes care of line ends, control characters and the rest."""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _number(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else round(value, _DIGITS)
